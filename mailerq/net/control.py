"""The socket on which the command line talks to a running engine.

A request and its reply are one JSON object on a line each; a few commands reply with any number of
lines, until the asker closes the connection. The socket is in the queue directory:
users that may read the queue may ask.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import trio

from mailerq.errors import MailerqError
from mailerq.message import decode_properties, encode_properties
from mailerq.plugins import stray_close
from mailerq.privileges import as_owner

__all__ = [
    "Commands", "Lines", "Request", "Send", "note", "reply_to", "serve", "serve_one",
]  # fmt: skip

log = logging.getLogger("mailerq.control")
operators = logging.getLogger("mailerq.operator")

SOCKET_NAME: Final = "control"

LINE_LIMIT: Final = 1 << 16
"""Bytes of a request."""

ASK_SECONDS: Final = 10.0

MAX_NOTE: Final = 2_000
"""Characters of a line that an operator's command writes into the log."""

EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED)
EXHAUSTED_SECONDS: Final = 0.1
"""Pause when the process has no descriptors or memory left."""

Request = dict[str, Any]
Commands = Mapping[str, Callable[[Request], Awaitable[object] | object]]
"""Each command gets the whole request, and returns the reply or an awaitable of the reply."""

Send = Callable[[bytes], Awaitable[None]]
"""Sends lines. When the asker is gone, the call is cancelled."""


@dataclass(frozen=True, slots=True)
class Lines:
    """A reply of any number of lines: `write` sends them, without a timeout."""

    write: Callable[[Send], Awaitable[None]]


@contextmanager
def _address(directory: str) -> Iterator[str]:
    """The socket's address through a descriptor of its directory.

    A path may be longer than the 108 bytes of a socket address.
    """
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET_NAME}"
    finally:
        os.close(descriptor)


async def serve(
    directory: str,
    commands: Commands,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests until cancelled."""
    original = _listen(directory)
    # A plugin may close the descriptor. With the original open the loop notices.
    sock = original.dup()
    try:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                try:
                    stream = trio.SocketStream((await sock.accept())[0])
                except (OSError, trio.ClosedResourceError) as error:
                    if isinstance(error, OSError) and error.errno in EXHAUSTED:
                        await trio.sleep(EXHAUSTED_SECONDS)
                        continue
                    sock.detach()
                    sock = await _copy(original)
                    stray_close("the control socket")
                else:
                    nursery.start_soon(serve_one, stream, commands)
    finally:
        sock.close()
        original.close()
        _remove(directory)


async def _copy(sock: trio.socket.SocketType) -> trio.socket.SocketType:
    """A copy of a socket, once there is a descriptor for it. Raises OSError."""
    while True:
        try:
            return sock.dup()
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
            await trio.sleep(EXHAUSTED_SECONDS)


def _remove(directory: str) -> None:
    """Remove the socket. On a read-only disk it stays, and the next start removes it."""
    try:
        with as_owner(directory):
            os.unlink(os.path.join(directory, SOCKET_NAME))
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("the control socket stays in %s: %s", directory, error.strerror)


def _listen(directory: str) -> trio.socket.SocketType:
    """The listening socket. One left by a killed process is not in use."""
    path = os.path.join(directory, SOCKET_NAME)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with as_owner(directory), _address(directory) as address:
            with suppress(FileNotFoundError):
                os.unlink(path)
            sock.bind(address)
            os.chmod(path, 0o660)
        sock.listen(16)
    except BaseException:
        sock.close()
        raise
    return trio.socket.from_stdlib_socket(sock)


async def serve_one(stream: trio.SocketStream, commands: Commands) -> None:
    """Answer the request of one connection, and close it."""
    with suppress(OSError):  # a plugin may have closed the descriptor
        async with stream:
            with trio.move_on_after(ASK_SECONDS):
                lines = await _answer(stream, commands)
            if lines is not None:
                await _write(stream, lines)


async def _answer(stream: trio.SocketStream, commands: Commands) -> Lines | None:
    """Answer in one line, or return what answers in more."""
    request = b""
    try:
        while not request.endswith(b"\n"):
            data = await stream.receive_some()
            if not data or len(request) > LINE_LIMIT:
                return None
            request += data
        reply = await _result(request, commands)
        if isinstance(reply, Lines):
            return reply
        await stream.send_all(encode_properties(reply) + b"\n")
    except trio.BrokenResourceError:
        log.debug("the asker of %r did not wait", request)
    return None


async def _write(stream: trio.SocketStream, lines: Lines) -> None:
    """Send lines until their end, or until the asker is gone."""

    async def send(data: bytes) -> None:
        try:
            await stream.send_all(data)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            nursery.cancel_scope.cancel()
            await trio.lowlevel.checkpoint()

    async def watch() -> None:
        with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            while await stream.receive_some():
                pass
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await lines.write(send)
        nursery.cancel_scope.cancel()


def note(request: Request) -> dict[str, bool]:
    """Write what an operator does into the application log."""
    operators.info("%s", str(request.get("text"))[:MAX_NOTE])
    return {"ok": True}


async def reply_to(request: bytes, commands: Commands) -> bytes:
    """The line that answers a request; a failure is its ``error``."""
    reply = await _result(request, commands)
    if isinstance(reply, Lines):
        reply = {"error": "the command needs a connection of its own"}
    return encode_properties(reply) + b"\n"


async def _result(request: bytes, commands: Commands) -> object:
    """The reply to a request."""
    reply: object
    try:
        document = decode_properties(request)
        command = document.get("command")
        action = commands.get(command) if isinstance(command, str) else None
        if action is None:
            reply = {"error": f"unknown command; known are {', '.join(sorted(commands))}"}
        else:
            reply = action(document)
            if isinstance(reply, Awaitable):
                reply = await reply
    except MailerqError as error:
        reply = {"error": str(error)}
    except Exception as error:
        log.exception("a command failed")
        reply = {"error": f"{type(error).__name__}: {error}"}
    return reply
