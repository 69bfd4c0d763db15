"""The account of a soak: what explains a mail that arrived twice, and what does not."""

from __future__ import annotations

import pytest

from tests.soak.fleet import COPIED, LEASE_LOST, UNSETTLED, Arrival, Kill, why_twice

TWICE_BY_ONE = [Arrival(10.0, "mx0.test"), Arrival(20.0, "mx0.test")]
BY_TWO = [Arrival(10.0, "mx0.test"), Arrival(20.0, "mx1.test")]


@pytest.mark.parametrize(
    ("arrivals", "kills", "why"),
    [
        (TWICE_BY_ONE, [], None),
        (BY_TWO, [], None),
        (TWICE_BY_ONE, [Kill(11.0, 13.0, "mx0.test")], UNSETTLED),
        (TWICE_BY_ONE, [Kill(9.0, 11.0, "mx0.test")], UNSETTLED),
        (TWICE_BY_ONE, [Kill(15.0, 16.0, "mx0.test")], None),
        (TWICE_BY_ONE, [Kill(11.0, 14.0, ""), Kill(15.0, 16.0, "mx0.test")], UNSETTLED),
        (TWICE_BY_ONE, [Kill(11.0, 13.0, "mx1.test")], None),
        (TWICE_BY_ONE, [Kill(11.0, 14.0, "")], None),
        (BY_TWO, [Kill(11.0, 14.0, "")], LEASE_LOST),
        (BY_TWO, [Kill(15.0, 18.0, "")], None),
        (BY_TWO, [Kill(2.0, 4.0, "")], COPIED),
        (TWICE_BY_ONE, [Kill(2.0, 4.0, "")], None),
        (TWICE_BY_ONE, [Kill(2.0, 4.0, "mx1.test")], COPIED),
        (BY_TWO, [Kill(0.5, 0.8, "")], None),
    ],
)
def test_a_second_arrival_has_a_reason_or_none(
    arrivals: list[Arrival], kills: list[Kill], why: str | None
) -> None:
    assert why_twice(1.0, arrivals, kills) == why
