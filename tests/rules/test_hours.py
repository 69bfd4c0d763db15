"""Hours of a week: what is open when, with clocks that are put forward and back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mailerq.rules.hours import DAYS, MAX_DAYS, Hours, opening, zone_of

AMSTERDAM = ZoneInfo("Europe/Amsterdam")
ZONES = [
    "UTC", "Europe/Amsterdam", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu",
    "America/Santiago", "Pacific/Apia", "Africa/Casablanca",
]  # fmt: skip


def at(text: str, zone: ZoneInfo = AMSTERDAM, *, fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold).timestamp()


def minutes(count: int) -> str:
    return f"{count // 60:02}:{count % 60:02}"


SPANS = st.tuples(
    st.integers(0, 6), st.integers(0, 6), st.integers(0, 1439), st.integers(0, 1440)
).filter(lambda span: span[2] != span[3])


def shows(spans: list[tuple[int, int, int, int]], now: float, zone: str) -> bool:
    """Whether a clock on the wall shows a time in one of the spans, without arithmetic of weeks."""
    local = datetime.fromtimestamp(now, ZoneInfo(zone))
    time = local.hour * 60 + local.minute
    for first, last, begin, end in spans:
        days = {(first + number) % 7 for number in range((last - first) % 7 + 1)}
        if begin < end:
            if local.weekday() in days and begin <= time < end:
                return True
        elif (local.weekday() in days and time >= begin) or (
            (local.weekday() - 1) % 7 in days and time < end
        ):
            return True
    return False


@given(
    st.lists(SPANS, min_size=1, max_size=3),
    st.sampled_from(ZONES),
    st.one_of(
        st.integers(946_684_800, 2_114_380_800),
        st.integers(-4000, 4000).map(lambda m: int(at("2026-03-29T01:00")) + 60 * m),
        st.integers(-4000, 4000).map(lambda m: int(at("2026-10-25T01:00")) + 60 * m),
    ),
)
@example([(6, 6, 150, 180)], "Europe/Amsterdam", int(at("2026-03-28T12:00")))
@example([(4, 4, 0, 1440)], "Pacific/Apia", int(at("2011-12-28T12:00", ZoneInfo("Pacific/Apia"))))
def test_hours_are_open_when_a_clock_on_the_wall_says_so(
    spans: list[tuple[int, int, int, int]], zone: str, now: int
) -> None:
    text = ", ".join(
        f"{DAYS[first]}-{DAYS[last]} {minutes(begin)}-{minutes(end)}"
        for first, last, begin, end in spans
    )
    hours = Hours.parse(text, ZoneInfo(zone))
    is_open = shows(spans, now, zone)
    assert hours.is_open(now) == is_open
    found = hours.opening(now)
    assert (found == now) == is_open
    assert shows(spans, found, zone), "it is open then"
    if not is_open:
        assert not shows(spans, found - 1, zone), "and not before"
        step = max(int(found - now) // 100, 1)
        assert not any(shows(spans, when, zone) for when in range(now, int(found), step))
    change = hours.change(now)
    if change < now + MAX_DAYS * 86_400:
        assert shows(spans, change, zone) != is_open
        step = max(int(change - now) // 100, 1)
        assert all(shows(spans, when, zone) == is_open for when in range(now, int(change), step))
    else:
        assert is_open, "always"


@given(st.lists(SPANS, min_size=1, max_size=3), st.floats(0, 4e9))
def test_an_opening_between_two_seconds_is_exact(
    spans: list[tuple[int, int, int, int]], now: float
) -> None:
    text = ",".join(f"{DAYS[s[0]]} {minutes(s[2])}-{minutes(s[3])}" for s in spans)
    hours = Hours.parse(text)
    found = hours.opening(now)
    assert hours.opening(found) == found >= now


@given(SPANS, SPANS, st.integers(0, 2_000_000_000))
def test_several_hours_open_when_all_are_open(
    one: tuple[int, int, int, int], other: tuple[int, int, int, int], now: int
) -> None:
    every = tuple(
        Hours.parse(f"{DAYS[s[0]]}-{DAYS[s[1]]} {minutes(s[2])}-{minutes(s[3])}", ZoneInfo(zone))
        for s, zone in ((one, "Europe/Amsterdam"), (other, "Asia/Kathmandu"))
    )
    found = opening(every, now)
    if found < now + MAX_DAYS * 86_400:
        assert all(hours.is_open(found) for hours in every)
    for when in range(now, int(min(found, now + MAX_DAYS * 86_400)), 3600):
        assert not all(hours.is_open(when) for hours in every)


def test_the_same_local_time_opens_before_and_after_clocks_are_put_forward() -> None:
    hours = Hours.parse("08:00-20:00", AMSTERDAM)
    before, after = at("2026-03-28T08:00"), at("2026-03-29T08:00")
    assert after - before == 23 * 3600
    assert hours.opening(at("2026-03-28T03:00")) == before
    assert hours.opening(at("2026-03-28T20:00")) == after


def test_a_span_that_begins_in_the_hour_left_out_opens_with_the_jump() -> None:
    hours = Hours.parse("02:30-04:00", AMSTERDAM)
    assert hours.opening(at("2026-03-29T01:00")) == at("2026-03-29T03:00")


def test_a_span_in_the_hour_left_out_is_not_open_that_day() -> None:
    hours = Hours.parse("sun 02:00-03:00", AMSTERDAM)
    assert hours.opening(at("2026-03-29T00:00")) == at("2026-04-05T02:00")


def test_a_span_in_the_hour_that_comes_twice_is_open_twice() -> None:
    hours = Hours.parse("02:00-02:30", AMSTERDAM)
    first = at("2026-10-25T02:00")
    assert hours.change(first) == first + 1800
    assert hours.opening(first + 1800) == at("2026-10-25T02:00", fold=1) == first + 3600


def test_a_span_over_midnight_belongs_to_the_day_on_which_it_begins() -> None:
    hours = Hours.parse("sun 22:00-06:00")
    monday = datetime(2026, 1, 5, tzinfo=UTC)
    assert hours.is_open((monday + timedelta(hours=5)).timestamp())
    assert not hours.is_open((monday + timedelta(hours=23)).timestamp())


def test_days_may_go_over_the_end_of_a_week() -> None:
    hours = Hours.parse("Sat-Mon 00:00-24:00")
    days = [datetime(2026, 1, day, 12, tzinfo=UTC).timestamp() for day in range(5, 12)]
    assert [hours.is_open(day) for day in days] == [True, *[False] * 4, True, True]
    assert hours.change(days[5]) == datetime(2026, 1, 13, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not written as"),
        ("mon-fri", "is not written as"),
        ("08:00-20:00,", "is not written as"),
        ("8-20", "is not written as"),
        ("mo 08:00-20:00", "'mo' is not a day; they are mon, tue"),
        ("mon-fry 08:00-20:00", "'fry' is not a day"),
        ("08:60-20:00", "08:60 is not a time of day"),
        ("08:00-24:01", "24:01 is not a time of day"),
        ("08:00-08:00", "has no time in it; a whole day is 00:00-24:00"),
        ("24:00-08:00", "has no time in it"),
    ],
)
def test_a_mistake_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Hours.parse(text)


@pytest.mark.parametrize("name", ["Europe/Nowhere", "Europe", "../etc/passwd", "/etc/localtime"])
def test_a_zone_that_is_not_there_is_a_mistake(name: str) -> None:
    with pytest.raises(ValueError, match="is no time zone of this host"):
        zone_of(name)
