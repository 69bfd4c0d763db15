"""When a message is tried again, and when it is given up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mailerq.errors import MessageError
from mailerq.message import parse_time
from mailerq.properties import is_delays

__all__ = ["expires_at", "next_attempt", "not_before"]

MIN_DELAY: Final = 1
"""Seconds between two attempts at least, whatever ``retries`` says: a delay of 0 would be a
loop at full speed."""

JITTER: Final = 0.1
"""The share of a delay that the next attempt may come earlier or later."""


def not_before(properties: Mapping[str, Any], *, now: float) -> float | None:
    """The time in ``delayed``, before which a message is not to be sent.

    It is void when it counts from an attempt that is yet to come: the clock was wrong then.
    """
    match properties.get("results"):
        case [*_, {"time": _} as last]:
            tried = _time_in(last, "time")
            if tried is not None and tried > now:
                return None
    return _time_in(properties, "delayed")


def expires_at(properties: Mapping[str, Any], *, now: float, max_delivertime: float) -> float:
    """When a message is given up: ``maxdelivertime``, or so long after it was first ``seen``.

    `now` stands for that where the message has never been seen.
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
    lot: float = 0.5,
) -> float | None:
    """When a message goes again after attempt number `attempt`; None: it has failed.

    The message's own ``retries`` and ``maxattempts`` come before `intervals` and
    `max_attempts`; the last delay repeats, and zero attempts is no limit. An attempt that ended
    by a fault of this host, `own_fault`, is never the last one. What would go after it has
    expired has failed now.

    Mail that failed together would come back together, so `lot`, from 0 to 1, moves the delays of
    `intervals` by up to `JITTER` either way. ``retries`` are kept exactly.

    >>> next_attempt({}, attempt=1, now=0, expires=999, intervals=(10, 20), max_attempts=0)
    10
    >>> next_attempt({}, attempt=7, now=0, expires=999, intervals=(10, 20), max_attempts=0)
    20
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
