"""Count replies for the triggers of patterns, which name a number within a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

from mailerq.rules.answers import Trigger

__all__ = ["Triggers"]

MAX_KEYS: Final = 4096
"""Counters that are kept; the least recently used one is dropped first."""


class Triggers:
    """Counters, one for each key. `now` is in seconds of a monotonic clock.

    A trigger that has been met begins anew.

    >>> triggers, three = Triggers(), Trigger(3, 60.0)
    >>> [triggers.met("key", three, now) for now in (0.0, 50.0, 61.0, 62.0, 63.0)]
    [False, False, False, True, False]
    """

    def __init__(self, most: int = MAX_KEYS) -> None:
        self._most = most
        self._times: OrderedDict[Hashable, list[float]] = OrderedDict()
        # Lists: they are short, and an empty deque takes ten times as much.

    def __len__(self) -> int:
        return len(self._times)

    def met(self, key: Hashable, trigger: Trigger, now: float) -> bool:
        """Count a reply; return whether it is the last one that the trigger needs."""
        if trigger.replies == 1:
            return True
        times = self._times.setdefault(key, [])
        self._times.move_to_end(key)
        times.append(now)
        while times[0] <= now - trigger.seconds:
            del times[0]
        if len(times) >= trigger.replies:
            del self._times[key]
            return True
        if len(self._times) > self._most:
            self._times.popitem(last=False)
        return False
