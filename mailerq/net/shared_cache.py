"""Keep answers for a time; tasks that ask for one key at the same time share one lookup."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import trio

__all__ = ["MAX_ENTRIES", "SharedCache"]

Value = TypeVar("Value")

MAX_ENTRIES: Final = 10_000
"""Answers of one kind; the oldest is forgotten first."""


@dataclass(slots=True)
class _Flight(Generic[Value]):
    """A lookup under way; without a value when it ends, its task was cancelled."""

    landed: trio.Event = field(default_factory=trio.Event)
    value: Value | None = None
    has_value: bool = False


class SharedCache(Generic[Value]):
    """Answers by key. Times are bounded by `minimum` and `maximum` seconds.

    A lookup returns its answer and how long to keep it, in seconds; None: not at all. A cache
    belongs to one trio loop.
    """

    def __init__(self, minimum: float, maximum: float) -> None:
        self._minimum = minimum
        self._maximum = maximum
        self._kept: dict[str, tuple[float, Value]] = {}
        self._flights: dict[str, _Flight[Value]] = {}

    def put(self, key: str, value: Value, seconds: float) -> None:
        """Keep an answer."""
        self._kept.pop(key, None)
        if len(self._kept) >= MAX_ENTRIES:
            del self._kept[next(iter(self._kept))]
        seconds = min(max(seconds, self._minimum), self._maximum)
        self._kept[key] = trio.current_time() + seconds, value

    def forget(self, key: str) -> None:
        """Look up a key again."""
        self._kept.pop(key, None)

    async def get(
        self,
        key: str,
        look_up: Callable[[str], Awaitable[tuple[Value, float | None]]],
        *,
        late: Callable[[str], Value],
        seconds: float,
    ) -> Value:
        """The answer for a key, or what `late` makes if a lookup takes longer than `seconds`."""
        while True:
            kept = self._kept.get(key)
            if kept is not None and trio.current_time() < kept[0]:
                return kept[1]
            flight = self._flights.get(key)
            if flight is None:
                break
            await flight.landed.wait()
            if flight.has_value:
                return flight.value  # type: ignore[return-value]
        flight = self._flights[key] = _Flight()
        try:
            with trio.move_on_after(seconds) as scope:
                value, keep = await look_up(key)
            if scope.cancelled_caught:
                value, keep = late(key), None
            flight.value, flight.has_value = value, True
        finally:
            del self._flights[key]
            flight.landed.set()
        if keep is None:
            self._kept.pop(key, None)
        else:
            self.put(key, value, keep)
        return value
