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

from mailerq.locks import Lead
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
        self.is_damaged = False
        """The lease file exists, but its content is lost."""
        self._path = os.path.join(directory, FILE_NAME)
        self._lead = Lead(os.path.join(directory, LOCK_NAME))
        self._seen: tuple[int, int, int] | None = None
        self._said: dict[str, str] = {}
        self._synced: set[str] | None = None
        with open(BOOT_FILE, encoding="ascii") as file:
            self._boot = file.read().strip()

    def lead(self) -> bool:
        """Whether this process is the one that belongs to the cluster, from now on."""
        try:
            leads = self._lead.take()
        except OSError as error:
            self._say(
                self._lead.path,
                f"cannot be locked: {error.strerror or error}. This instance does not belong to the"
                " cluster, and mail from addresses that others have too waits",
            )
            return False
        self._said.pop(self._lead.path, None)
        return leads

    def write(self, state: State) -> None:
        """Replace what the file says."""
        path = f"{self._path}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        state.boot = self._boot
        rivals = set(state.rivals)
        try:
            with open(os.open(path, flags, 0o640), "wb") as file:
                file.write(_encode(state))
                if rivals != self._synced:
                    # Which addresses others have must survive a power cut, and changes seldom.
                    file.flush()
                    os.fsync(file.fileno())
            os.rename(path, self._path)
        except OSError as error:
            self._say(self._path, f"cannot be written: {error.strerror or error}")
        else:
            self._synced = rivals
            self._said.pop(self._path, None)

    def _say(self, path: str, text: str) -> None:
        if self._said.get(path) != text:
            self._said[path] = text
            log.error("%s %s", path, text)

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
            self.is_damaged = True
            self._say(
                self._path,
                f"cannot be read: {error}. Other instances may have each of our addresses, so mail"
                " waits until this one has their locks",
            )
            return None
        self._seen, self.is_damaged = identity, False
        if state.boot != self._boot:
            state.leases, state.held, state.others, state.knows = {}, [], [], False
        return state

    def close(self) -> None:
        """Leave the cluster to another process."""
        with suppress(OSError):
            self._lead.close()


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
