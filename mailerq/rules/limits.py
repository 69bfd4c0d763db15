"""Rate limits for each client."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from mailerq.address import parse_peer

__all__ = ["ClientLimits", "network_of"]

MAX_CLIENTS: Final = 100_000
"""Counters of clients that are kept; the least recently used one is dropped first."""

SECONDS: Final = 60.0
"""The interval of all rates."""


class ClientLimits:
    """Rates for each client, as token buckets that refill evenly over a minute.

    `per_minute` maps the name of a counter to its limit; 0 or a missing name means no limit. A
    client may use the limit of a whole minute at once, and then as much as refills. `now` is in
    seconds of a monotonic clock. A client is named by the `network_of` its address.

    >>> limits = ClientLimits({"messages": 2})
    >>> [limits.take("192.0.2.1", "messages", now=0.0) for _ in range(3)]
    [True, True, False]
    >>> limits.take("192.0.2.1", "messages", now=30.0)
    True
    """

    def __init__(self, per_minute: Mapping[str, int]) -> None:
        self._levels: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()
        self.set_bounds(per_minute)

    def set_bounds(self, per_minute: Mapping[str, int]) -> None:
        """Other bounds from now on; what was counted stays counted."""
        self._bounds = {name: bound for name, bound in per_minute.items() if bound > 0}

    def take(self, client: str, what: str, now: float, count: int = 1) -> bool:
        """Take `count` tokens; return False, and take none, if the client has fewer."""
        bound = self._bounds.get(what)
        if bound is None:
            return True
        key = (client, what)
        used, since = self._levels.get(key, (0.0, now))
        used = max(0.0, used - max(0.0, now - since) * bound / SECONDS)
        allowed = used + count <= bound
        if allowed:
            used += count
        self._levels[key] = (used, now)
        self._levels.move_to_end(key)
        if len(self._levels) > MAX_CLIENTS:
            self._levels.popitem(last=False)
        return allowed

    def give_back(self, client: str, what: str) -> None:
        """Undo a `take` of one."""
        key = (client, what)
        if key in self._levels:
            used, since = self._levels[key]
            self._levels[key] = (max(0.0, used - 1), since)


@lru_cache(maxsize=4096)
def network_of(address: str, prefix4: int = 32, prefix6: int = 64) -> str:
    """Return the network that counts as one client.

    An IPv6 host has at least a /64, and many providers assign a /56 or a /48.

    >>> network_of("192.0.2.1"), network_of("2001:db8:1:2::3", prefix6=48)
    ('192.0.2.1/32', '2001:db8:1::/48')
    """
    ip = parse_peer(address)
    prefix = prefix4 if ip.version == 4 else prefix6
    return str(ipaddress.ip_network((ip, prefix), strict=False))
