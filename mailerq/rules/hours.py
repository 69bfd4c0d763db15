"""At which hours mail may go: spans of a week in the local time of a zone.

A span is open while a clock on the wall shows a time in it. When clocks are put forward, the hour
that is left out is no time of any span; a span that begins in that hour opens with the jump. When
they are put back, the hour that comes twice is open twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from typing import Final, Self
from zoneinfo import ZoneInfo

__all__ = ["Hours", "opening", "zone_of"]

DAY: Final = 86_400
WEEK: Final = 7 * DAY
MONDAY: Final = 3 * DAY
"""Seconds of a week that begins on Monday at the epoch, which was a Thursday."""

MAX_DAYS: Final = 15
"""A span that a change of the clocks leaves out in one week is there in the next."""

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
SPAN: Final = re.compile(
    r"(?:(?P<first>[a-z]+)(?:\s*-\s*(?P<last>[a-z]+))?\s+)?"
    r"(?P<begin>[0-9]{1,2}:[0-9]{2})\s*-\s*(?P<end>[0-9]{1,2}:[0-9]{2})",
    re.IGNORECASE | re.ASCII,
)

Spans = tuple[tuple[int, int], ...]
"""Begin and end of each span in seconds of the week, in order, apart from each other."""


@dataclass(frozen=True, slots=True)
class Hours:
    """Hours of a week. Times are seconds since 1970.

    >>> hours = Hours.parse("mon-fri 08:00-20:00")
    >>> sunday = datetime(2026, 1, 4, 12, tzinfo=UTC).timestamp()
    >>> hours.is_open(sunday), (hours.opening(sunday) - sunday) / 3600
    (False, 20.0)
    """

    text: str
    zone: tzinfo
    open: Spans = field(repr=False)
    shut: Spans = field(repr=False)

    @classmethod
    def parse(cls, text: str, zone: tzinfo = UTC) -> Self:
        """Read spans such as ``mon-fri 08:00-20:00, sat 22:00-02:00``. Raises ValueError."""
        spans = _joined(span for each in text.split(",") for span in _spans(each.strip()))
        return cls(text, zone, spans, _between(spans))

    def is_open(self, now: float) -> bool:
        """Whether mail may go."""
        return self.opening(now) == now

    def opening(self, now: float) -> float:
        """When mail may go: `now`, or the next opening."""
        return self._next(self.open, now)

    def change(self, now: float) -> float:
        """When these hours begin or end next; infinity if never."""
        return self._next(self.shut if self.is_open(now) else self.open, now)

    def _next(self, spans: Spans, now: float) -> float:
        """The first time in a span, not before `now`."""
        when = now
        while when < now + MAX_DAYS * DAY:
            offset, until = self._offset(when)
            second = (math.floor(when) + offset + MONDAY) % WEEK
            if any(begin <= second < end for begin, end in spans):
                return when
            wait = min(((begin - second) % WEEK for begin, _ in spans), default=math.inf)
            if math.floor(when) + wait < until:
                return math.floor(when) + wait
            when = until
        return math.inf

    def _offset(self, now: float) -> tuple[int, int]:
        """Seconds that local time is ahead of UTC, and until when at least."""
        low = math.floor(now)
        high = low + DAY
        offset = self._offset_at(low)
        if self._offset_at(high) == offset:
            return offset, high
        while high - low > 1:
            middle = (low + high) // 2
            if self._offset_at(middle) == offset:
                low = middle
            else:
                high = middle
        return offset, high

    def _offset_at(self, when: int) -> int:
        offset = datetime.fromtimestamp(when, self.zone).utcoffset()
        assert offset is not None, "the time has a zone"
        return int(offset.total_seconds())


def opening(every: tuple[Hours, ...], now: float) -> float:
    """When mail may go that several hours must allow: `now`, or later.

    If no time of `MAX_DAYS` is in all of them, the end of those days, when one may ask again.

    >>> morning, late = Hours.parse("08:00-12:00"), Hours.parse("11:00-20:00")
    >>> opening((morning, late), 0.0) / 3600
    11.0
    """
    when = now
    while when < now + MAX_DAYS * DAY:
        latest = max((hours.opening(when) for hours in every), default=when)
        if latest == when:
            return when
        when = latest
    return when


def zone_of(name: str) -> tzinfo:
    """The zone of a name such as ``Europe/Amsterdam``. Raises ValueError."""
    if name == "UTC":
        return UTC  # without a database of zones too
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"{name!r} is no time zone of this host") from None


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """The spans of a text; each may end in the next week."""
    match = SPAN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not written as mon-fri 08:00-20:00")
    begin, end = _seconds(match["begin"]), _seconds(match["end"])
    if begin in (DAY, end):
        raise ValueError(f"{text!r} has no time in it; a whole day is 00:00-24:00")
    first, last = 0, 6
    if match["first"]:
        first = last = _day(match["first"])
    if match["last"]:
        last = _day(match["last"])
    for number in range((last - first) % 7 + 1):
        day = (first + number) % 7 * DAY
        yield day + begin, day + end + (DAY if end < begin else 0)


def _seconds(text: str) -> int:
    hours, minutes = map(int, text.split(":"))
    seconds = hours * 3600 + minutes * 60
    if minutes > 59 or seconds > DAY:
        raise ValueError(f"{text} is not a time of day")
    return seconds


def _day(text: str) -> int:
    if text.lower() not in DAYS:
        raise ValueError(f"{text!r} is not a day; they are {', '.join(DAYS)}")
    return DAYS.index(text.lower())


def _joined(spans: Iterator[tuple[int, int]]) -> Spans:
    """Spans in order, without what they have in common."""
    parts: list[tuple[int, int]] = []
    for begin, end in spans:
        parts.append((begin, min(end, WEEK)))
        if end > WEEK:
            parts.append((0, end - WEEK))
    found: list[tuple[int, int]] = []
    for begin, end in sorted(parts):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return tuple(found)


def _between(spans: Spans) -> Spans:
    """The rest of the week."""
    edges = [0, *(edge for span in spans for edge in span), WEEK]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return tuple((begin, end) for begin, end in pairs if begin < end)
