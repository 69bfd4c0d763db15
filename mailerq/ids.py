"""Message ids of the built-in generator, for a program that loads no plugins.

An engine takes its ids from `mailerq.plugins.Plugins.message_id`, which asks the plugin that
owns them.
"""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

from mailerq import _core

__all__ = ["machine_number", "new_id", "set_machine"]


def machine_number(server_id: int | None, hostname: str) -> int:
    """The 35 bits that stand for this machine in message ids; the top one says "derived"."""
    if server_id is not None:
        return server_id & (1 << 34) - 1
    try:
        identity = Path("/etc/machine-id").read_bytes()
    except OSError:
        identity = b""
    digest = hashlib.blake2b(identity + hostname.encode() + socket.gethostname().encode())
    return 1 << 34 | int.from_bytes(digest.digest()[:8]) & (1 << 34) - 1


def set_machine(server_id: int | None, hostname: str) -> None:
    """Say which machine stands in the ids of this process from now on."""
    _core.set_machine(machine_number(server_id, hostname))


def new_id() -> str:
    """A new message id, different from all others of this machine."""
    return _core.generate_ids(1)
