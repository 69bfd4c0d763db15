"""When a message goes again."""

from typing import Any

import pytest

from mailerq.message import parse_time
from mailerq.rules.retry import expires_at, next_attempt, not_before

INTERVALS = (600, 600, 1800)
NOON = parse_time("2026-01-01 12:00:00")


def due(properties: dict[str, Any] | None = None, **changes: Any) -> float | None:
    settings = {
        "attempt": 1,
        "now": NOON,
        "expires": NOON + 86400,
        "intervals": INTERVALS,
        "max_attempts": 0,
    }
    at = next_attempt(properties or {}, **(settings | changes))
    return None if at is None else at - changes.get("now", NOON)


@pytest.mark.parametrize(("attempt", "delay"), list(enumerate([600, 600, 1800, 1800, 1800], 1)))
def test_each_attempt_has_its_delay_and_the_last_repeats(attempt: int, delay: int) -> None:
    assert due(attempt=attempt) == delay


def test_retries_of_the_message_come_first() -> None:
    assert due({"retries": [5, 7]}) == 5
    assert due({"retries": [5, 7]}, attempt=9) == 7
    assert due({"retries": []}) == 600


def test_a_delay_of_nothing_is_still_a_second() -> None:
    assert due({"retries": [0]}) == 1


@pytest.mark.parametrize(
    ("properties", "limit", "attempt", "goes_on"),
    [
        ({}, 0, 10**6, True),
        ({}, 3, 2, True),
        ({}, 3, 3, False),
        ({"maxattempts": 5}, 3, 4, True),
        ({"maxattempts": 5}, 0, 5, False),
        ({"maxattempts": 0}, 3, 4, True),
        ({"maxattempts": -1}, 3, 4, True),
        ({"maxattempts": 1}, 0, 1, False),
    ],
)
def test_attempts_have_a_limit(
    properties: dict[str, Any], limit: int, attempt: int, goes_on: bool
) -> None:
    assert (due(properties, max_attempts=limit, attempt=attempt) is not None) is goes_on


def test_what_would_go_after_its_expiry_has_failed() -> None:
    assert due(expires=NOON + 600) == 600
    assert due(expires=NOON + 599) is None


def test_expiry_counts_from_the_first_sight() -> None:
    def expires(**properties: str) -> float:
        return expires_at(properties, now=NOON, max_delivertime=3600) - NOON

    assert expires() == 3600
    assert expires(seen="2026-01-01 11:30:00") == 1800
    assert expires(maxdelivertime="2026-01-01 12:01:00") == 60
    assert expires(maxdelivertime="2026-01-01 12:01:00", seen="2025-01-01 00:00:00") == 60
    assert expires(seen="yesterday") == 3600


def test_delayed_says_not_before() -> None:
    assert not_before({"delayed": "2026-01-01 12:00:00"}, now=0) == NOON
    assert not_before({}, now=0) is None


def test_a_delay_from_an_attempt_in_the_future_is_void() -> None:
    tried = {"results": [{"time": "2026-01-01 12:00:00"}], "delayed": "2026-01-01 12:10:00"}
    assert not_before(tried, now=NOON) == NOON + 600
    assert not_before(tried, now=NOON - 3600) is None
    for results in ([], ["x"], [{"time": 1}], "x"):
        assert not_before({**tried, "results": results}, now=0) == NOON + 600


def test_an_attempt_that_this_host_spoiled_is_not_the_last() -> None:
    for properties, limit in (({"maxattempts": 1}, 0), ({}, 1)):
        assert due(properties, max_attempts=limit, attempt=1) is None
        assert due(properties, max_attempts=limit, attempt=1, own_fault=True) == 600


def test_a_lot_moves_the_delays_of_the_settings_by_a_tenth_at_most() -> None:
    assert due(lot=0.0) == 540
    assert due(lot=0.25) == 570
    assert due(lot=1.0) == 660
    assert due({"retries": [600]}, lot=1.0) == 600
    assert due(intervals=(1,), lot=0.0) == 1


def test_a_lot_does_not_move_an_attempt_past_its_expiry() -> None:
    assert due(lot=1.0, expires=NOON + 610) == 610
    assert due(lot=0.0, expires=NOON + 590) is None
