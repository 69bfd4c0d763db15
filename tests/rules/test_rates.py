"""Rates: never above the limit in any minute, and never idle when allowed."""

from __future__ import annotations

from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st

from mailerq.rules.rates import MINUTE, SLACK, advanced, cost

LIMITS = st.integers(1, 100_000)
PAUSES = st.lists(
    st.one_of(st.integers(0, 10 * SLACK), st.integers(0, 2 * MINUTE)), min_size=1, max_size=300
)


def sent_at(per_minute: int, pauses: list[int]) -> list[int]:
    """Times of sending by a sender that comes late by each of the pauses."""
    now, cell, times = 1_000 * MINUTE, 0, []
    for pause in pauses:
        now = max(now + pause, cell)
        cell = advanced(cell, now, cost(1, per_minute))
        times.append(now)
    return times


@given(LIMITS, PAUSES)
def test_no_minute_has_more_than_the_limit(per_minute: int, pauses: list[int]) -> None:
    times = sent_at(per_minute, pauses)
    for index, start in enumerate(times):
        assert bisect_left(times, start + MINUTE) - index <= per_minute


@given(st.integers(1, 60_000), st.lists(st.integers(0, SLACK // 2), min_size=100, max_size=400))
def test_timers_that_fire_late_do_not_lower_the_rate(per_minute: int, delays: list[int]) -> None:
    now, cell, times = 0, 0, []
    for delay in delays:
        now = max(now, cell) + (delay if cell > now else 0)
        cell = advanced(cell, now, cost(1, per_minute))
        times.append(now)
    assert times[-1] - times[0] <= (len(times) - 1) * cost(1, per_minute) + SLACK


@given(LIMITS, st.integers(0, 10**9))
def test_something_may_go_as_soon_as_what_went_before_has_had_its_time(
    per_minute: int, wait: int
) -> None:
    cell = advanced(0, now=MINUTE, cost=cost(1, per_minute))
    assert cell - MINUTE <= cost(1, per_minute)
    assert advanced(cell, cell + wait, 0) <= cell + wait


@given(st.integers(1, 10**12), st.lists(st.integers(1, 10**10), min_size=1, max_size=20))
def test_bytes_over_the_limit_are_paid_for_by_those_that_follow(
    per_minute: int, sizes: list[int]
) -> None:
    now = cell = MINUTE
    for size in sizes:
        now = max(now, cell)
        cell = advanced(cell, now, cost(size, per_minute))
    due = sum(sizes[:-1]) * MINUTE // per_minute
    assert now - MINUTE >= due - SLACK
