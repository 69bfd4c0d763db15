"""When a message is tried again, and when it has failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mailerq.errors import MessageError
from mailerq.message import parse_time
from mailerq.properties import is_delays

__all__ = ["expires_at", "next_attempt", "not_before"]

MIN_DELAY: Final = 1
"""Least seconds between attempts, whatever ``retries`` says: a delay of 0 would be a busy loop."""

JITTER: Final = 0.1
"""Each delay varies by up to this fraction, either way."""


def not_before(properties: Mapping[str, Any], *, now: float) -> float | None:
    """The time in ``delayed``, before which a message must not be sent.

    The time is void if it counts from a future attempt: the clock was wrong then.
    """
    results = properties.get("results")
    if isinstance(results, list) and results and isinstance(results[-1], dict):
        tried = _time_in(results[-1], "time")
        if tried is not None and tried > now:
            return None
    return _time_in(properties, "delayed")


def expires_at(properties: Mapping[str, Any], *, now: float, max_delivertime: float) -> float:
    """When a message expires: ``maxdelivertime``, or `max_delivertime` after it was first ``seen``.

    For a message without ``seen``, `now` counts.
    """
    expires = _time_in(properties, "maxdelivertime")
    if expires is not None:
        return expires
    seen = _time_in(properties, "seen")
    return (now if seen is None else seen) + max_delivertime


def next_attempt(
    properties: Mapping[str, Any],
    *,
    attempt: int,
    now: float,
    expires: float,
    intervals: Sequence[int],
    max_attempts: int,
    own_fault: bool = False,
    after: float | None = None,
    lot: float = 0.5,
) -> float | None:
    """When a message is tried again after attempt number `attempt`; None: it has failed.

    The message's own ``retries`` and ``maxattempts`` override `intervals` and `max_attempts`. The
    last delay repeats; zero attempts means no limit. An attempt that a fault of this host ended
    (`own_fault`) is never the last. `after` takes the place of the delay. A message
    whose next attempt would come after `expires` has failed now.

    Mail that failed together would come back together, so `lot`, from 0 to 1, moves the delays of
    `intervals` by up to `JITTER` either way. ``retries`` are kept exactly.

    >>> next_attempt({}, attempt=1, now=0, expires=999, intervals=(10, 20), max_attempts=0)
    10.0
    >>> next_attempt({}, attempt=7, now=0, expires=999, intervals=(10, 20), max_attempts=0)
    20.0
    >>> next_attempt({}, attempt=7, now=0, expires=15, intervals=(10, 20), max_attempts=0)
    """
    limit = properties.get("maxattempts")
    if not isinstance(limit, int):
        limit = max_attempts
    if 0 < limit <= attempt and not own_fault:
        return None
    delays = properties.get("retries")
    spread = 0.0
    if not delays or not is_delays(delays):
        delays, spread = intervals, JITTER * (2 * lot - 1)
    delay = max(delays[min(attempt, len(delays)) - 1], MIN_DELAY)
    if after is not None:
        delay, spread = max(after, MIN_DELAY), 0.0
    if now + delay > expires:
        return None
    return min(now + max(delay * (1 + spread), MIN_DELAY), expires)


def _time_in(properties: Mapping[str, Any], name: str) -> float | None:
    value = properties.get(name)
    if value is None:
        return None
    try:
        return parse_time(value)
    except MessageError:
        return None
