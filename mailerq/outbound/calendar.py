"""The hours at which mail may go, as far as they matter now.

A `Calendar` keeps the answers until some hours begin or end, so that many flows cost little. The
wall clock may be set at any time: it is compared once a minute at least.

Everything here runs on the home worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final

from mailerq.rules.hours import Hours, opening

__all__ = ["Calendar"]

CLOCK_SECONDS: Final = 60.0
"""Interval of the check of the wall clock."""


class Calendar:
    """When all of some hours allow mail; `clock` gives seconds since 1970."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.now = clock
        self.every: tuple[Hours, ...] = ()
        """The hours whose beginning and end `advance` notes."""
        self._since = self._until = -math.inf
        self._openings: dict[tuple[Hours, ...], float] = {}

    def set(self, every: Iterable[Hours]) -> None:
        """Other hours from now on."""
        self.every = tuple(every)
        self._until = -math.inf

    def opening(self, every: tuple[Hours, ...]) -> float:
        """When mail may go; 0 if it may now."""
        found = self._openings.get(every)
        if found is None:
            now = self.now()
            found = opening(every, now)
            found = self._openings[every] = 0.0 if found == now else found
        return found

    def advance(self) -> bool:
        """Whether some hours have begun or ended."""
        if not self.every:
            return False
        now, since = self.now(), self._since
        self._since = now
        if since <= now < self._until:
            return False
        self._openings.clear()
        self._until = min(hours.change(now) for hours in self.every)
        return True

    @property
    def seconds(self) -> float:
        """When to `advance` again."""
        if not self.every:
            return math.inf
        return min(max(self._until - self.now(), 0.0), CLOCK_SECONDS)
