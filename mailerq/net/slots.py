"""Limits on what is open at a time, one within another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, Self

__all__ = ["Slots"]

SHORT: Final = 0.8
"""Slots are short above this share in use."""


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
        self.within = within
        self._lock = threading.Lock()
        self.on_release: Callable[[], object] | None = None
        """Called after each release, also of slots within these, on the releasing thread."""

    def take(self) -> bool:
        """Take one; False if none is left."""
        with self._lock:
            if self.used >= self.limit or (self.within and not self.within.take()):
                return False
            self.used += 1
            return True

    def release(self) -> None:
        with self._lock:
            self.used -= 1
        if self.within:
            self.within.release()
        if self.on_release is not None:
            self.on_release()

    @property
    def available(self) -> bool:
        """Whether `take` would succeed now."""
        return self.left > 0

    @property
    def left(self) -> float:
        """How many more `take` would give now."""
        left = max(self.limit - self.used, 0)
        return left if self.within is None else min(left, self.within.left)

    @property
    def are_short(self) -> bool:
        """Whether most of them are in use."""
        return self.used >= self.limit * SHORT or (
            self.within is not None and self.within.are_short
        )

    @property
    def are_exceeded(self) -> bool:
        """Whether more are in use than allowed, after `limit` was lowered."""
        return self.used > self.limit or (self.within is not None and self.within.are_exceeded)

    def __str__(self) -> str:
        return f"{self.used} of {self.limit}"
