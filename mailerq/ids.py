"""Message ids of the built-in generator, for programs that load no plugins.

An engine calls `mailerq.plugins.Plugins.message_id`, where a plugin may supply the ids.
"""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

from mailerq import _core

__all__ = ["machine_number", "new_id", "set_machine"]


def machine_number(server_id: int | None, hostname: str) -> int:
    """Return the 35 bits that identify this machine in message ids.

    The top bit is set if the number is derived from the machine id and the host name.
    """
    if server_id is not None:
        return server_id & (1 << 34) - 1
    try:
        identity = Path("/etc/machine-id").read_bytes()
    except OSError:
        identity = b""
    digest = hashlib.blake2b(identity + hostname.encode() + socket.gethostname().encode())
    return 1 << 34 | int.from_bytes(digest.digest()[:8]) & (1 << 34) - 1


def set_machine(server_id: int | None, hostname: str) -> None:
    """Set the machine number in the message ids of this process."""
    _core.set_machine(machine_number(server_id, hostname))


def new_id() -> str:
    """Return a message id that is unique on this machine."""
    return _core.generate_ids(1)
