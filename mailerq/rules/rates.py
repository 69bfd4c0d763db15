"""Rates a minute, spread evenly: the generic cell rate algorithm in integer nanoseconds.

A cell is one number: the time at which the next unit may go. `advanced` moves it on by the cost of
what went. A caller that comes late by up to `SLACK` loses nothing, so timers that fire late do not
lower the rate. `cost` allows for the slack: no minute, wherever it begins, sees more than the
limit.

Bytes are charged after the size is known, so a cell may run ahead: a message larger than the limit
of a minute goes once, and the following ones wait for as long as it takes.
"""

from __future__ import annotations

from typing import Final

__all__ = ["MINUTE", "SLACK", "advanced", "cost", "cost_of_day"]

MINUTE: Final = 60_000_000_000
"""The interval of all rates, in nanoseconds."""

DAY: Final = 1440 * MINUTE

SLACK: Final = 20_000_000
"""Lateness that is made up for, in nanoseconds."""


def cost(count: int, per_minute: int) -> int:
    """The time that `count` units take at a rate, in nanoseconds, rounded up.

    >>> cost(1, 600), cost(1500, 90_000)
    (100033334, 1000333334)
    """
    return -(-count * (MINUTE + SLACK) // per_minute)


def cost_of_day(per_day: int) -> int:
    """The time that one unit takes at a rate a day, in nanoseconds, rounded up.

    >>> cost_of_day(86400)
    1000000232
    """
    return -(-(DAY + SLACK) // per_day)


def advanced(cell: int, now: int, cost: int) -> int:
    """The cell after something of a `cost` went at `now`; it may go if ``cell <= now``.

    >>> cell = advanced(0, now=5 * MINUTE, cost=cost(1, 60))
    >>> cell - 5 * MINUTE  # a second, less the slack that nobody used
    980333334
    """
    return max(cell, now - SLACK) + cost
