"""Bounds on what is open at a time, one within another."""

from __future__ import annotations

import threading
from typing import Final, Self

__all__ = ["Slots"]

SHORT: Final = 0.8
"""The share that is in use when they begin to be short."""


class Slots:
    """At most `limit` of something, and no more than `within` has left. Any thread may ask.

    `limit` may be set at any time; what is in use stays.

    >>> both = Slots(2)
    >>> incoming, outgoing = Slots(2, within=both), Slots(1, within=both)
    >>> incoming.take(), incoming.take(), outgoing.take()
    (True, True, False)
    """

    def __init__(self, limit: float, *, within: Self | None = None) -> None:
        self.limit = limit
        self.used = 0
        self._within = within
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Take one, or say that there is none."""
        with self._lock:
            if self.used >= self.limit or (self._within and not self._within.take()):
                return False
            self.used += 1
            return True

    def release(self) -> None:
        with self._lock:
            self.used -= 1
            if self._within:
                self._within.release()

    @property
    def are_short(self) -> bool:
        """Whether most of them are in use."""
        return self.used >= self.limit * SHORT or (
            self._within is not None and self._within.are_short
        )

    @property
    def are_exceeded(self) -> bool:
        """Whether more are in use than may be, since `limit` was lowered."""
        return self.used > self.limit or (self._within is not None and self._within.are_exceeded)

    def __str__(self) -> str:
        return f"{self.used} of {self.limit}"
