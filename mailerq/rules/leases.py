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

An address that no other instance has announced in the last `MEMORY_SECONDS` needs no lease: its
instance is *alone*, and goes on without the broker. Where another one has announced it, nobody
sends from the address without a lease.

The instances that can use an address try to lock it in an order that all of them know (`ranked`),
and only while nobody announces that it has the lock. Announcements save attempts; the lock decides.

Guarantees
----------
- At no moment two instances that have heard of each other may use an address. An answer proves that
  the broker took what was sent before it freed the lock, so the old lease ends at most `LEASE`
  after the lock was free, and the new one begins `TAKEOVER` after that. This needs a broker whose
  locks are exclusive, and clocks that run at the same rate within a tenth; what the clocks show
  does not matter.
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

MEMORY_SECONDS: Final = 7 * 86400.0
"""How long an instance that had an address is remembered, also over restarts."""

RETRY: Final = 2 * SECOND
"""After an attempt that failed."""


class Lease:
    """The right to send from one address, as it is now: from `since` until `until`, or `alone`."""

    __slots__ = ("alone", "ip", "since", "until")

    def __init__(self, ip: str, since: int = 0, until: int = 0, *, alone: bool = False) -> None:
        self.ip = ip
        self.since = since
        """From when: a rate may be used one of its intervals later."""
        self.until = until
        self.alone = alone
        """No other instance has the address."""

    def __repr__(self) -> str:
        alone = ", alone" if self.alone else ""
        return f"<lease of {self.ip} from {self.since} until {self.until}{alone}>"

    def is_valid(self, now: int) -> bool:
        """Whether the address may be used."""
        return self.alone or self.since <= now < self.until

    def begin(self) -> int:
        """The time from which intervals of rates count."""
        return 0 if self.alone else self.since


def ranked(ip: str, names: Iterable[str]) -> list[str]:
    """Instances in the order in which they try to own an address: another one for each address.

    >>> ranked("192.0.2.1", ["a", "b", "c"]) == ranked("192.0.2.1", ["c", "b", "a"])
    True
    """
    return sorted(names, key=lambda name: blake2b(f"{ip} {name}".encode(), digest_size=8).digest())


class Ownership:
    """The addresses that one instance owns, or would like to.

    >>> owner = Ownership("a", {"192.0.2.1": 0.0})
    >>> _ = owner.offer({"192.0.2.1"}, 0.0)
    >>> owner.attempts(0, {})
    ['192.0.2.1']
    >>> owner.locked("192.0.2.1", now=0)
    >>> owner.proved(8 * SECOND)
    >>> lease = owner.leases["192.0.2.1"]
    >>> lease.is_valid(0), lease.is_valid(8 * SECOND), lease.is_valid(13 * SECOND)
    (False, True, False)
    """

    def __init__(self, name: str, rivals: Mapping[str, float] | None = None) -> None:
        """`rivals` is what `rivals` was at the end of an earlier run."""
        self.name = name
        self.leases: dict[str, Lease] = {}
        """One for each address that this instance can send from."""
        self.rivals: dict[str, float] = dict(rivals or {})
        """When another instance last announced an address, in seconds since 1970."""
        self.held: set[str] = set()
        """Addresses whose lock this instance has."""
        self._free_since: dict[str, int] = {}
        self._tried: dict[str, int] = {}

    def offer(self, ips: Collection[str], wall: float) -> list[str]:
        """Set the addresses that this instance can send from; returns locks to give up.

        `wall` is in seconds since 1970.
        """
        for ip in ips:
            if ip not in self.leases:
                self.leases[ip] = Lease(ip, alone=self._is_alone(ip, wall))
        gone = [ip for ip in self.leases if ip not in ips]
        given_up = [ip for ip in gone if ip in self.held]
        for ip in gone:
            self.unlocked(ip)
            del self.leases[ip]
            self._free_since.pop(ip, None)
            self._tried.pop(ip, None)
        return given_up

    def heard(self, ips: Collection[str], wall: float) -> None:
        """Another instance announces that it can send from these addresses."""
        for ip in ips:
            lease = self.leases.get(ip)
            if lease is not None:
                self.rivals[ip] = wall
                lease.alone = False

    def forget(self, wall: float) -> None:
        """Forget instances that have not announced an address for long."""
        for ip in [ip for ip, last in self.rivals.items() if abs(wall - last) > MEMORY_SECONDS]:
            del self.rivals[ip]
            if ip in self.leases:
                self.leases[ip].alone = True

    def _is_alone(self, ip: str, wall: float) -> bool:
        last = self.rivals.get(ip)
        return last is None or abs(wall - last) > MEMORY_SECONDS

    def attempts(
        self, now: int, others: Mapping[str, Collection[str]], held: Collection[str] = ()
    ) -> list[str]:
        """The addresses to lock now.

        `others` maps the name of each living instance to the addresses that it can send from;
        `held` are those whose lock one of them announces.
        """
        found = []
        for ip in self.leases:
            if ip in self.held:
                continue
            if ip in held:
                self._free_since.pop(ip, None)
                continue
            since = self._free_since.setdefault(ip, now)
            rivals = [name for name, ips in others.items() if ip in ips]
            place = ranked(ip, {*rivals, self.name}).index(self.name)
            if now < since + place * STEP or now < self._tried.get(ip, now - RETRY) + RETRY:
                continue
            self._tried[ip] = now
            found.append(ip)
        return found

    def locked(self, ip: str, now: int) -> None:
        """The broker has given the lock of an address; `now` is after its answer."""
        self.held.add(ip)
        lease = self.leases[ip]
        lease.since, lease.until = now + TAKEOVER, 0
        self._free_since.pop(ip, None)
        self._tried.pop(ip, None)

    def proved(self, sent: int) -> None:
        """The broker has answered what was sent at `sent`, on the connection with the locks."""
        for ip in self.held:
            lease = self.leases[ip]
            lease.until = max(lease.until, sent + LEASE)

    def unlocked(self, ip: str) -> None:
        """The lock of an address is given up; call this first."""
        self.held.discard(ip)
        self.leases[ip].until = 0

    def disconnected(self) -> None:
        """The connection is over, and all locks with it."""
        for ip in tuple(self.held):
            self.unlocked(ip)
