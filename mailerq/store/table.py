"""The operator's rows in memory, as the lines of their file leave them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Final

import msgspec

from mailerq.rules.row import SUPPRESSION, Row
from mailerq.rules.shared_rows import Change, Shared, is_shared

__all__ = ["VERSION", "Line", "Table"]

VERSION: Final = 1

LINE_VALUES: Final = 1000
"""Suppressed addresses in one line."""


class Line(msgspec.Struct, omit_defaults=True):
    """A line of the file: a change. A row with the id of another one replaces that row."""

    version: int = 0
    """Of the file, in its first line."""
    next: int = 0
    """The next id, in the first line: no id is used twice."""
    row: Row | None = None
    values: list[str] = []
    """Addresses and domains that the row suppresses, beside those of lines before."""
    end: list[int] = []
    """Rows that are over."""
    free: list[str] = []
    """Addresses and domains that are no longer suppressed."""
    hits: dict[int, int] = {}
    """How often rows have met something since the last such line."""
    change: Change | None = None
    """A change of rows that a cluster shares."""


class Table:
    """Rows by id, and what is suppressed by which row.

    >>> table = Table()
    >>> table.apply(Line(row=Row(id=4, kind="suppression"), values=["a@b.test", "c.test"]))
    >>> table.apply(Line(free=["a@b.test"]))
    >>> table.addresses, list(table.domains), table.next_id
    ({}, ['c.test'], 5)
    """

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        """All but the suppressions."""
        self.suppressions: dict[int, Row] = {}
        self.addresses: dict[str, Row] = {}
        self.domains: dict[str, Row] = {}
        self.counts: dict[int, int] = {}
        """Addresses and domains of each suppression."""
        self.hits: dict[int, int] = {}
        self.next_id = 1
        self.shared = Shared()
        self.recent: list[Change] = []
        """The changes of shared rows since somebody took them from here."""
        self.first_end = math.inf
        """No row is over before."""
        self.last_end = -math.inf
        """The latest end of the rows that `expire` has dropped."""
        self._last = Row(kind=SUPPRESSION)

    def get(self, number: int) -> Row | None:
        """The row with an id, of any kind."""
        return self.rows.get(number) or self.suppressions.get(number)

    def apply(self, line: Line) -> None:
        """Change what a line says."""
        self.next_id = max(self.next_id, line.next)
        if line.row is not None:
            self._put(line.row, line.values)
        if line.end:
            self._end(line.end)
        for value in line.free:
            places = self._places(value)
            if (freed := places.pop(value, None)) is not None:
                self._uncount(freed)
        for number, more in line.hits.items():
            if self.get(number) is not None:
                self.hits[number] = self.hits.get(number, 0) + more
        if line.change is not None:
            self._merge(line.change)

    def _merge(self, change: Change) -> None:
        self.recent.append(change)
        effect = self.shared.merge(change)
        if effect.row is not None and (effect.row.kind != SUPPRESSION or effect.values):
            self._put(effect.row, effect.values)
        elif effect.row is not None and effect.row.id in self.suppressions:
            self._put(effect.row, ())
        if effect.ended:
            self._end(effect.ended)
        for value in effect.freed:
            places = self._places(value)
            if value in places and is_shared(places[value].id):
                self._uncount(places.pop(value))

    def _put(self, row: Row, values: Iterable[str]) -> None:
        if not is_shared(row.id):
            self.next_id = max(self.next_id, row.id + 1)
        if row.until is not None:
            self.first_end = min(self.first_end, row.until)
        if row.hits:
            self.hits[row.id] = row.hits
            row = msgspec.structs.replace(row, hits=0)
        if row.kind != SUPPRESSION:
            self.rows[row.id] = row
            return
        # Rows that are made one after another share what they have in common.
        last = msgspec.structs.replace(self._last, id=row.id, since=row.since)
        self._last = row = last if last == row else row
        before = self.suppressions.get(row.id)
        if before == row:
            row = before  # one object for all lines of the row
        elif before is not None:
            for places in (self.addresses, self.domains):
                for value in [value for value, found in places.items() if found is before]:
                    places[value] = row
        self.suppressions[row.id] = row
        for value in values:
            places = self._places(value)
            found = places.get(value)
            if found is not row:
                places[value] = row
                self.counts[row.id] = self.counts.get(row.id, 0) + 1
                if found is not None:
                    self._uncount(found)

    def _places(self, value: str) -> dict[str, Row]:
        return self.addresses if "@" in value else self.domains

    def _uncount(self, row: Row) -> None:
        self.counts[row.id] -= 1
        if not self.counts[row.id]:
            del self.counts[row.id], self.suppressions[row.id]
            self.hits.pop(row.id, None)

    def _end(self, numbers: Collection[int]) -> None:
        ended = set()
        for number in numbers:
            self.hits.pop(number, None)
            self.rows.pop(number, None)
            if self.suppressions.pop(number, None) and self.counts.pop(number, 0):
                ended.add(number)
        if ended:  # one look at all addresses, however many rows have ended
            for places in (self.addresses, self.domains):
                for value in [value for value, row in places.items() if row.id in ended]:
                    del places[value]

    def expire(self, now: float) -> bool:
        """Drop the rows whose end has come; whether there were any."""
        if now < self.first_end:
            return False
        rows = [*self.rows.values(), *self.suppressions.values()]
        ends = [row.until for row in rows if row.until is not None and not row.is_over(now)]
        self.first_end = min(ends, default=math.inf)
        over = [row for row in rows if row.is_over(now)]
        self.last_end = max([self.last_end, *(row.until or 0.0 for row in over)])
        self._end({row.id for row in over})
        self.shared.over(row.id for row in over if is_shared(row.id))
        return bool(over)

    def shown(self, row: Row) -> Row:
        """A row with its hits."""
        return msgspec.structs.replace(row, hits=self.hits.get(row.id, 0))

    @property
    def suppressed(self) -> int:
        """How many addresses and domains are suppressed."""
        return len(self.addresses) + len(self.domains)

    def values(self) -> Iterator[tuple[str, Row]]:
        """The suppressed addresses and domains."""
        yield from self.addresses.items()
        yield from self.domains.items()

    def lines(self) -> Iterator[Line]:
        """The fewest lines that make this table."""
        yield Line(version=VERSION, next=self.next_id)
        for row in self.rows.values():
            if not is_shared(row.id):
                yield Line(row=row)
        by_row: dict[int, list[str]] = {}
        for value, row in self.values():
            if not is_shared(row.id):
                by_row.setdefault(row.id, []).append(value)
        for row in self.suppressions.values():
            if not is_shared(row.id):
                yield from lines_of(row, by_row.get(row.id, ()))
        for change in self.shared.changes():
            yield Line(change=change)
        if self.hits:
            yield Line(hits=self.hits)


def lines_of(row: Row, values: Iterable[str] = ()) -> Iterator[Line]:
    """The lines that add a row."""
    values = list(values)
    if not values and row.kind != SUPPRESSION:
        yield Line(row=row)
    for start in range(0, len(values), LINE_VALUES):
        yield Line(row=row, values=values[start : start + LINE_VALUES])
