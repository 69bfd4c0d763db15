"""Send a request to a running engine, without an event loop (see `mailerq.net.control`)."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

__all__ = ["ask", "lines"]

SOCKET_NAME: Final = "control"

ASK_SECONDS: Final = 10.0


def ask(
    directory: str, command: str, *, timeout: float = ASK_SECONDS, **arguments: object
) -> dict[str, Any]:
    """Ask the engine on that queue directory. Raises OSError if none answers."""
    with _asked(directory, command, timeout, arguments) as sock:
        chunks = []
        while data := sock.recv(1 << 16):
            chunks.append(data)
    try:
        reply = json.loads(b"".join(chunks))
    except ValueError:
        raise OSError("it closed without a reply") from None
    return reply if isinstance(reply, dict) else {"reply": reply}


def lines(directory: str, command: str, **arguments: object) -> Iterator[dict[str, Any]]:
    """The lines of a reply that has any number, as they come. Raises OSError."""
    with _asked(directory, command, ASK_SECONDS, arguments) as sock:
        sock.settimeout(None)
        with sock.makefile("rb") as file:
            for line in file:
                yield json.loads(line)


@contextmanager
def _asked(
    directory: str, command: str, timeout: float, arguments: dict[str, object]
) -> Iterator[socket.socket]:
    """A connection on which the request is sent."""
    # Through a descriptor of the directory: its path may be too long for a socket address.
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout)
            sock.connect(f"/proc/self/fd/{descriptor}/{SOCKET_NAME}")
            sock.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            yield sock
    finally:
        os.close(descriptor)
