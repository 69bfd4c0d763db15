"""Timers: one time for each thing, cheap while the time is far."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import chain
from typing import Generic, Protocol, TypeVar

__all__ = ["Times"]


class Timed(Protocol):
    """A thing with a time; infinity means none. Only the thing's `Times` changes `when`."""

    when: float


T = TypeVar("T", bound=Timed)


class Times(Generic[T]):
    """Things with one time each, on the caller's clock.

    The times of one second share a list until that second has begun. A thing whose time is far
    costs a place in such a list, which is a tenth of an entry in a heap. A changed time leaves its
    old place behind, which is skipped.

    >>> class Thing:
    ...     when = math.inf
    >>> one, two, times = Thing(), Thing(), Times()
    >>> times.set(one, 5.5), times.set(two, 3.0), times.set(one, 4.5)
    (None, None, None)
    >>> list(times.pop_until(4.5)) == [two, one]
    True
    """

    def __init__(self) -> None:
        self._far: dict[int, list[T]] = {}
        self._seconds: list[int] = []  # the keys of _far, a heap
        self._near: list[tuple[float, int, T]] = []  # a heap
        self._begun: float = -math.inf
        """The latest second whose times are near."""
        self._count = 0
        self._places = 0
        self._set = 0

    def __len__(self) -> int:
        """Things that have a time."""
        return self._set

    def set(self, thing: T, when: float) -> None:
        """Set a thing's time, replacing an earlier setting."""
        if thing.when == when:
            return
        if thing.when == math.inf:
            self._set += 1
        thing.when = when
        self._put(thing)
        self._tidy()

    def set_earlier(self, thing: T, when: float) -> None:
        """`set`, unless the thing has an earlier time."""
        if when < thing.when:
            self.set(thing, when)

    def discard(self, thing: T) -> None:
        if thing.when < math.inf:
            thing.when = math.inf
            self._set -= 1
            self._tidy()

    @property
    def first(self) -> float:
        """Nothing is due before this time. Exact once its second has begun; infinity for never."""
        near = self._near
        while near and near[0][2].when != near[0][0]:
            heapq.heappop(near)
            self._places -= 1
        far = self._seconds[0] if self._seconds else math.inf
        return min(near[0][0], far) if near else far

    def pop_until(self, now: float) -> Iterator[T]:
        """Remove the things whose time has come, in order."""
        while self.first <= now:
            while self._seconds and self._seconds[0] <= now:
                self._begin(heapq.heappop(self._seconds))
            if self.first <= now:
                thing = heapq.heappop(self._near)[2]
                self._places -= 1
                self.discard(thing)
                yield thing

    def _begin(self, second: int) -> None:
        """Put the times of a second in order."""
        self._begun = max(self._begun, second)
        for thing in self._far.pop(second):
            self._places -= 1
            if second <= thing.when < second + 1:
                self._put(thing)

    def _put(self, thing: T) -> None:
        self._places += 1
        second = math.floor(thing.when)
        if second <= self._begun:
            self._count += 1
            heapq.heappush(self._near, (thing.when, self._count, thing))
        elif second in self._far:
            self._far[second].append(thing)
        else:
            self._far[second] = [thing]
            heapq.heappush(self._seconds, second)

    def _tidy(self) -> None:
        """Drop the old places when one in five is old."""
        if self._places <= self._set * 5 // 4 + 64:
            return
        places = chain((place[2] for place in self._near), *self._far.values())
        things = dict.fromkeys(thing for thing in places if thing.when < math.inf)
        self._far, self._seconds, self._near, self._places = {}, [], [], 0
        for thing in things:
            self._put(thing)
