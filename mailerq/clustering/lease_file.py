"""The file in which one process of a daemon tells the others which addresses may be used.

One process of a daemon belongs to the cluster, the one that has the lock of the file; the others
read what it writes. Times are those of `boot_time`, which all processes of a host share. A file of
an earlier boot tells of rivals only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import msgspec

from mailerq.queues.locks import FileLock, Held
from mailerq.rules.cluster import Here
from mailerq.rules.leases import Lease

__all__ = ["LeaseFile", "State"]

log = logging.getLogger("mailerq.cluster")

FILE_NAME: Final = "cluster.leases"
LOCK_NAME: Final = "cluster.lock"

BOOT_FILE: Final = "/proc/sys/kernel/random/boot_id"


class State(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the file says."""

    boot: str = ""
    leases: dict[str, tuple[int, int, bool]] = {}
    """`since`, `until` and `alone` of each address that this host has."""
    held: list[str] = []
    rivals: dict[str, float] = {}
    others: list[Here] = []
    """The last announcements of the other instances."""
    knows: bool = False
    """All that are there have been heard."""


_decode: Final = msgspec.json.Decoder(State).decode
_encode: Final = msgspec.json.Encoder().encode


class LeaseFile:
    """The file of a queue directory. The methods block for some microseconds."""

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, FILE_NAME)
        self._lock_path = os.path.join(directory, LOCK_NAME)
        self._lock: FileLock | None = None
        self._seen: tuple[int, int, int] | None = None
        self._failed = False
        with open(BOOT_FILE, encoding="ascii") as file:
            self._boot = file.read().strip()

    def lead(self) -> bool:
        """Whether this process is the one that belongs to the cluster, from now on."""
        try:
            if self._lock is not None:
                self._lock.check()
                return True
        except OSError:
            self._lock = None  # a plugin has closed the file
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._lock = FileLock(os.open(self._lock_path, flags, 0o600))
        except Held:
            return False
        except OSError as error:
            self._say(f"{self._lock_path} cannot be locked: {error.strerror or error}")
            return False
        return True

    def write(self, state: State) -> None:
        """Replace what the file says."""
        path = f"{self._path}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        state.boot = self._boot
        try:
            file = os.open(path, flags, 0o640)
            try:
                os.write(file, _encode(state))
            finally:
                os.close(file)
            os.rename(path, self._path)
        except OSError as error:
            self._say(f"{self._path} cannot be written: {error.strerror or error}")
        else:
            self._failed = False

    def _say(self, text: str) -> None:
        if not self._failed:
            self._failed = True
            log.error("%s", text)

    def read(self) -> State | None:
        """What the file says, if that is new. Leases of an earlier boot are left out."""
        try:
            found = os.stat(self._path)
            identity = found.st_ino, found.st_mtime_ns, found.st_size
            if identity == self._seen:
                return None
            with open(self._path, "rb") as file:
                state = _decode(file.read())
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            self._say(f"{self._path} cannot be read: {error}")
            return None
        self._seen = identity
        if state.boot != self._boot:
            state.leases, state.held, state.others, state.knows = {}, [], [], False
        return state

    def close(self) -> None:
        """Leave the cluster to another process."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with suppress(OSError):
                lock.close()


def follow(leases: dict[str, Lease], told: Mapping[str, tuple[int, int, bool]]) -> list[str]:
    """Change leases to what another process tells; returns the addresses with another lease."""
    changed = []
    for ip in [ip for ip in leases if ip not in told]:
        del leases[ip]
        changed.append(ip)
    for ip, (since, until, alone) in told.items():
        lease = leases.get(ip)
        if lease is None:
            lease = leases[ip] = Lease(ip)
            changed.append(ip)
        if (lease.since, lease.alone) != (since, alone) or lease.until < until:
            changed.append(ip)
        lease.since, lease.until, lease.alone = since, until, alone
    return changed
