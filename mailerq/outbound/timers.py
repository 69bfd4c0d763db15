"""Timers: one time for each thing, in one heap."""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

__all__ = ["Times"]

T = TypeVar("T", bound=Hashable)


class Times(Generic[T]):
    """Things with one time each, on the caller's clock.

    >>> times = Times()
    >>> times.set("a", 5.0), times.set("b", 3.0), times.set("a", 4.0)
    (None, None, None)
    >>> times.first, list(times.pop_until(4.0)), times.first
    (3.0, ['b', 'a'], inf)
    """

    def __init__(self) -> None:
        self._times: dict[T, float] = {}
        self._heap: list[tuple[float, int, T]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._times)

    def get(self, thing: T) -> float | None:
        return self._times.get(thing)

    def set(self, thing: T, when: float) -> None:
        """Set a thing's time, replacing an earlier setting."""
        if self._times.get(thing) == when:
            return
        self._times[thing] = when
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, thing))
        if len(self._heap) > 2 * len(self._times) + 64:
            self._heap = [each for each in self._heap if self._times.get(each[2]) == each[0]]
            heapq.heapify(self._heap)

    def set_earlier(self, thing: T, when: float) -> None:
        """`set`, unless the thing has an earlier time."""
        if when < self._times.get(thing, math.inf):
            self.set(thing, when)

    def discard(self, thing: T) -> None:
        self._times.pop(thing, None)

    @property
    def first(self) -> float:
        """The earliest time; infinity if there is none."""
        heap = self._heap
        while heap and self._times.get(heap[0][2]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else math.inf

    def pop_until(self, now: float) -> Iterator[T]:
        """Remove the things whose time has come, in order."""
        while self.first <= now:
            thing = heapq.heappop(self._heap)[2]
            del self._times[thing]
            yield thing
