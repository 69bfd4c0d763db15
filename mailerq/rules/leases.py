"""Which instance of a cluster may send from a local address: a lock, and a lease that proves it.

Theory of operation
-------------------
Limits belong to local addresses. Where several instances can send from one address, one of them
*owns* the address, and counts its limits alone.

The broker has a lock for each address. A lock belongs to one connection, and is free when that
connection is over. This decides between instances that the broker can reach. An owner that is cut
off does not hear that its connection is over, so it may use the address only for the time of its
*lease*: `LEASE` after it sent something that the broker has answered on the connection with the
lock. A new owner waits `TAKEOVER` after it has the lock, which is longer.

The instances that can use an address try to lock it in an order that all of them know (`ranked`),
and only while nobody announces that it has the lock. Announcements save attempts; the lock decides.

Guarantees
----------
- At no moment two instances may use an address. An answer proves that the broker took what was
  sent before it freed the lock, so the old lease ends at most `LEASE` after the lock was free, and
  the new one begins `TAKEOVER` after that. This needs a broker whose locks are exclusive, and clocks
  that run at the same rate within a tenth; what the clocks show does not matter.
- Limits hold over a change of the owner. Sends of a rate have a distance of its interval, and a new
  owner waits for one interval of each rate, see `Lease.since`.

Times are integer nanoseconds of a clock that only goes forward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from hashlib import blake2b
from typing import Final

__all__ = ["LEASE", "RETRY", "STEP", "TAKEOVER", "Lease", "Ownership", "ranked"]

SECOND: Final = 1_000_000_000

LEASE: Final = 5 * SECOND
"""How long an owner goes on without an answer of the broker."""

TAKEOVER: Final = LEASE * 11 // 10
"""How long a new owner waits: the lease, and a tenth for clocks that run at other rates."""

STEP: Final = SECOND // 2
"""Each instance tries this much later than the one ranked before it."""

RETRY: Final = 2 * SECOND
"""After an attempt that failed."""


class Lease:
    """The right to send from one address, as it is now: from `since` until `until`."""

    __slots__ = ("ip", "since", "until")

    def __init__(self, ip: str, since: int = 0, until: int = 0) -> None:
        self.ip = ip
        self.since = since
        """From when: a rate may be used one of its intervals later."""
        self.until = until

    def __repr__(self) -> str:
        return f"<lease of {self.ip} from {self.since} until {self.until}>"

    def is_valid(self, now: int) -> bool:
        """Whether the address may be used."""
        return self.since <= now < self.until


def ranked(ip: str, names: Iterable[str]) -> list[str]:
    """Instances in the order in which they try to own an address: another one for each address.

    >>> ranked("192.0.2.1", ["a", "b", "c"]) == ranked("192.0.2.1", ["c", "b", "a"])
    True
    """
    return sorted(names, key=lambda name: blake2b(f"{ip} {name}".encode(), digest_size=8).digest())


class Ownership:
    """The addresses that one instance owns, or would like to.

    >>> owner = Ownership("a")
    >>> owner.available = {"192.0.2.1"}
    >>> owner.attempts(0, {})
    ['192.0.2.1']
    >>> owner.locked("192.0.2.1", now=0)
    >>> owner.proved(8 * SECOND)
    >>> lease = owner.leases["192.0.2.1"]
    >>> lease.is_valid(0), lease.is_valid(8 * SECOND), lease.is_valid(13 * SECOND)
    (False, True, False)
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.available: Collection[str] = ()
        """The addresses that this instance can send from."""
        self.leases: dict[str, Lease] = {}
        """One for each address that was available, kept for the whole run."""
        self.held: set[str] = set()
        """Addresses whose lock this instance has."""
        self._free_since: dict[str, int] = {}
        self._tried: dict[str, int] = {}

    def attempts(self, now: int, others: Mapping[str, Collection[str]]) -> list[str]:
        """The addresses to lock now; `others` has what other instances announce to hold, and could.

        `others` maps the name of each living instance to the addresses that it can send from; see
        `free` for those that are held.
        """
        found = []
        for ip in self.available:
            if ip in self.held:
                continue
            since = self._free_since.setdefault(ip, now)
            rivals = [name for name, ips in others.items() if ip in ips]
            place = ranked(ip, {*rivals, self.name}).index(self.name)
            if now < since + place * STEP or now < self._tried.get(ip, now - RETRY) + RETRY:
                continue
            self._tried[ip] = now
            found.append(ip)
        return found

    def taken(self, ips: Collection[str]) -> None:
        """Others announce that they have these locks now: do not try them."""
        for ip in ips:
            self._free_since.pop(ip, None)

    def locked(self, ip: str, now: int) -> None:
        """The broker has given the lock of an address; `now` is after its answer."""
        self.held.add(ip)
        lease = self.lease(ip)
        lease.since, lease.until = now + TAKEOVER, 0
        self._free_since.pop(ip, None)
        self._tried.pop(ip, None)

    def lease(self, ip: str) -> Lease:
        """The lease of an address, which is not valid unless the address is owned."""
        lease = self.leases.get(ip)
        if lease is None:
            lease = self.leases[ip] = Lease(ip)
        return lease

    def proved(self, sent: int) -> None:
        """The broker has answered what was sent at `sent`, on the connection with the locks."""
        for ip in self.held:
            lease = self.leases[ip]
            lease.until = max(lease.until, sent + LEASE)

    def unlocked(self, ip: str) -> None:
        """The lock of an address is given up; call this first."""
        self.held.discard(ip)
        self.lease(ip).until = 0

    def disconnected(self) -> None:
        """The connection is over, and all locks with it."""
        for ip in tuple(self.held):
            self.unlocked(ip)
