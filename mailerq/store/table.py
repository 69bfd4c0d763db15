"""The operator's rows in memory, as the lines of their file leave them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from mailerq.rules.row import SUPPRESSION, Row

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
        self.addresses: dict[str, Row] = {}
        self.domains: dict[str, Row] = {}
        self.counts: dict[int, int] = {}
        """Addresses and domains of each suppression."""
        self.hits: dict[int, int] = {}
        self.next_id = 1

    def apply(self, line: Line) -> None:
        """Change what a line says."""
        self.next_id = max(self.next_id, line.next)
        row = line.row
        if row is not None:
            row = self._put(row)
            self.next_id = max(self.next_id, row.id + 1)
            for value in line.values:
                places = self.addresses if "@" in value else self.domains
                before = places.get(value)
                if before is None or before.id != row.id:
                    if before is not None:
                        self._uncount(before)
                    self.counts[row.id] = self.counts.get(row.id, 0) + 1
                places[value] = row
        for number in line.end:
            self._end(number)
        for value in line.free:
            places = self.addresses if "@" in value else self.domains
            if (freed := places.pop(value, None)) is not None:
                self._uncount(freed)
        for number, more in line.hits.items():
            if number in self.rows:
                self.hits[number] = self.hits.get(number, 0) + more

    def _put(self, row: Row) -> Row:
        if row.hits:
            self.hits[row.id] = row.hits
            row = msgspec.structs.replace(row, hits=0)
        before = self.rows.get(row.id)
        self.rows[row.id] = row
        if before is not None and before != row and row.id in self.counts:
            for places in (self.addresses, self.domains):
                for value, found in places.items():
                    if found.id == row.id:
                        places[value] = row
        return row

    def _uncount(self, row: Row) -> None:
        self.counts[row.id] -= 1
        if not self.counts[row.id]:
            del self.counts[row.id], self.rows[row.id]
            self.hits.pop(row.id, None)

    def _end(self, number: int) -> None:
        row = self.rows.pop(number, None)
        self.hits.pop(number, None)
        if row is not None and self.counts.pop(number, 0):
            for places in (self.addresses, self.domains):
                for value in [value for value, found in places.items() if found.id == number]:
                    del places[value]

    def expire(self, now: float) -> None:
        """Drop the rows whose end has come."""
        for number in [number for number, row in self.rows.items() if row.is_over(now)]:
            self._end(number)

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
        by_row: dict[int, list[str]] = {}
        for value, row in self.values():
            by_row.setdefault(row.id, []).append(value)
        for row in self.rows.values():
            yield from lines_of(row, by_row.get(row.id, ()))
        if self.hits:
            yield Line(hits=self.hits)


def lines_of(row: Row, values: Iterable[str] = ()) -> Iterator[Line]:
    """The lines that add a row."""
    values = list(values)
    if not values and row.kind != SUPPRESSION:
        yield Line(row=row)
    for start in range(0, len(values), LINE_VALUES):
        yield Line(row=row, values=values[start : start + LINE_VALUES])
