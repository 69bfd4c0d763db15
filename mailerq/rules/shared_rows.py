"""Rows that all instances of a cluster share: changes that merge in any order.

Theory of operation
-------------------
A `Change` is what one instance did to shared rows. Each has a version, one more than the instance
had seen, and the name of its server; together they are its stamp, and the later stamp wins:

- of two changes of a row, such as of its end;
- of two changes of a suppressed address: which row suppresses it, or none.

The removal of a row is final, whatever its stamp: ids are never used again, and a pause that was
removed does not come back by a change that was made elsewhere at the same time. An address is
suppressed if its row is there.

So changes may come in any order, twice, or by way of others, and all instances end up with the same
rows. `Shared.digest` tells whether they have.

Removed rows and freed addresses are remembered, up to `MAX_DEAD` and `MAX_FREED`, the oldest are
forgotten first. What is forgotten comes back from an instance that has been away since before.

A row that is over leaves no trace: all know its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from mailerq.errors import RowError
from mailerq.rules.row import ERROR, PAUSE, SUPPRESSION, Row, checked, suppressible

__all__ = ["FIRST_ID", "LAST_ID", "Change", "Effect", "Shared", "checked_change", "is_shared"]

FIRST_ID: Final = 100_000_000_000
LAST_ID: Final = 999_999_999_999
"""Ids of shared rows, made at random; those of other rows count from 1."""

MAX_DEAD: Final = 10_000
MAX_FREED: Final = 100_000

MAX_VALUES: Final = 1000
"""Addresses, or ids, in one change."""

MAX_VERSION: Final = 1 << 53
MAX_NAME: Final = 255

Key = TypeVar("Key")


class Change(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one instance did to shared rows at one time, or a part of that."""

    version: int
    server: str
    who: str = ""
    why: str = ""
    row: Row | None = None
    """A new row, or a row with other parts."""
    values: tuple[str, ...] = ()
    """Addresses and domains that the row suppresses from now on."""
    end: tuple[int, ...] = ()
    """Rows that are removed."""
    free: tuple[str, ...] = ()
    """Addresses and domains that are no longer suppressed."""


class Effect(NamedTuple):
    """What a change means for the rows in force. `values` are suppressed by `row`."""

    row: Row | None = None
    values: tuple[str, ...] = ()
    ended: tuple[int, ...] = ()
    freed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any(self)


class _Held(NamedTuple):
    """Which row suppresses an address, 0 for none, since which stamp."""

    version: int
    server: str
    row: int


def is_shared(number: int) -> bool:
    """Whether an id is that of a shared row."""
    return FIRST_ID <= number <= LAST_ID


def checked_change(change: Change) -> Change:
    """A change from another host, in the form that is merged. Raises `RowError`."""
    if not 0 < change.version < MAX_VERSION:
        raise RowError(f"a version of {change.version}")
    if not 0 < len(change.server) <= MAX_NAME or not change.server.isprintable():
        raise RowError("no server")
    if max(map(len, (change.values, change.end, change.free))) > MAX_VALUES:
        raise RowError("too many at a time")
    if len(change.who) > MAX_NAME or not change.who.isprintable():
        raise RowError("who holds a character that cannot be printed, or many")
    row = change.row
    if row is not None:
        if row.kind not in (PAUSE, ERROR, SUPPRESSION) or not is_shared(row.id) or row.values:
            raise RowError("no row that can be shared")
        row = checked(msgspec.structs.replace(row, hits=0))
    if change.values and (row is None or row.kind != SUPPRESSION):
        raise RowError("addresses without a suppression")
    if not all(map(is_shared, change.end)):
        raise RowError("ids of rows that are not shared")
    why = "".join(each if each.isprintable() else "?" for each in change.why)[:1000]
    return msgspec.structs.replace(
        change,
        row=row,
        why=why,
        values=tuple(map(suppressible, change.values)),
        free=tuple(map(suppressible, change.free)),
    )


class Shared:
    """The shared rows that an instance knows.

    >>> row = Row(kind=PAUSE, id=FIRST_ID, domain="a.test")
    >>> one, other = Shared(), Shared()
    >>> added = Change(version=1, server="a", row=row)
    >>> removed = Change(version=2, server="b", end=(FIRST_ID,))
    >>> for shared, changes in ((one, (added, removed)), (other, (removed, added))):
    ...     for change in changes:
    ...         _ = shared.merge(change)
    >>> one.rows, other.rows, one.digest == other.digest
    ({}, {}, True)
    """

    def __init__(self) -> None:
        self.version = 0
        """The latest version seen."""
        self.rows: dict[int, tuple[int, str, Row]] = {}
        """The rows that are there, each with the stamp of its last change."""
        self.dead: dict[int, None] = {}
        self.digest = 0
        """Equal if two instances have the same rows and suppressed addresses."""
        self._values: dict[str, _Held] = {}
        self._freed: dict[str, _Held] = {}
        self._sums: dict[int, int] = {}  # what the addresses of each row add to the digest

    def __len__(self) -> int:
        """How many rows and suppressed addresses there are."""
        return len(self.rows) + len(self._values)

    @property
    def suppressed(self) -> int:
        """How many addresses and domains are suppressed by shared rows."""
        return len(self._values)

    def merge(self, change: Change) -> Effect:
        """Take in a change; returns what it means for the rows in force."""
        self.version = max(self.version, change.version)
        stamp = change.version, change.server
        ended = tuple(number for number in change.end if self._end(number))
        row = change.row
        shown: Row | None = None
        if row is not None and row.id not in self.dead:
            before = self.rows.get(row.id)
            if before is None or before[:2] < stamp:
                self._toggle_row(row.id)
                self.rows[row.id] = (*stamp, row)
                self._toggle_row(row.id)
                shown = row
            else:
                row = before[2]
        freed: list[str] = []
        values: list[str] = []
        if row is not None and change.values:
            held = _Held(*stamp, row.id)
            found = values if row.id in self.rows else freed
            found += [value for value in change.values if self._hold(value, held)]
        if change.free:
            held = _Held(*stamp, 0)
            freed += [value for value in change.free if self._hold(value, held)]
        self._forget()
        if values and shown is None:
            shown = row
        return Effect(shown, tuple(values), ended, tuple(freed))

    def is_news(self, change: Change) -> bool:
        """Whether `merge` would change anything."""
        stamp, row = (change.version, change.server), change.row
        if any(number not in self.dead for number in change.end):
            return True
        if row is not None and row.id not in self.dead:
            before = self.rows.get(row.id)
            if before is None or before[:2] < stamp:
                return True
        number = 0 if row is None else row.id
        for values, target in ((change.values, number), (change.free, 0)):
            for value in values:
                held = self._values.get(value) or self._freed.get(value)
                if held is None or held < _Held(*stamp, target):
                    return True
        return False

    def _end(self, number: int) -> bool:
        """Remove a row for good; whether it was there."""
        if number in self.dead:
            return False
        self.dead[number] = None
        return self._drop(number, freed=True)

    def over(self, numbers: Iterable[int]) -> None:
        """Drop rows whose end has come."""
        for number in numbers:
            self._drop(number, freed=False)

    def _drop(self, number: int, *, freed: bool) -> bool:
        if number not in self.rows:
            return False
        self._toggle_row(number)
        row = self.rows.pop(number)[2]
        self.digest ^= self._sums.pop(number, 0)
        if row.kind == SUPPRESSION:
            for value in [value for value, held in self._values.items() if held.row == number]:
                held = self._values.pop(value)
                if freed:
                    self._freed[value] = held
        return True

    def _hold(self, value: str, held: _Held) -> bool:
        """Take in which row suppresses an address; whether that is news."""
        before = self._values.get(value) or self._freed.get(value)
        if before is not None and before >= held:
            return False
        if before is not None and self._values.pop(value, None) is not None:
            self._toggle_value(value, before)
        self._freed.pop(value, None)
        if held.row in self.rows:
            self._values[value] = held
            self._toggle_value(value, held)
        else:
            self._freed[value] = held
        return True

    def _forget(self) -> None:
        _shorten(self.dead, MAX_DEAD)
        _shorten(self._freed, MAX_FREED)

    def _toggle_row(self, number: int) -> None:
        found = self.rows.get(number)
        if found is not None:
            self.digest ^= _digest(f"{number} {found[0]} {found[1]}")

    def _toggle_value(self, value: str, held: _Held) -> None:
        digest = _digest(f"{value} {held.version} {held.server} {held.row}")
        self.digest ^= digest
        self._sums[held.row] = self._sums.get(held.row, 0) ^ digest

    def is_suppressing(self, value: str) -> bool:
        """Whether a shared row suppresses an address or a domain."""
        return value in self._values

    def changes(self) -> Iterator[Change]:
        """The fewest changes that make these rows, in parts of bounded size.

        Changes that are merged meanwhile may be among them or not.
        """
        dead = list(self.dead)
        for start in range(0, len(dead), MAX_VALUES):
            yield Change(version=1, server="-", end=tuple(dead[start : start + MAX_VALUES]))
        for version, server, row in list(self.rows.values()):
            yield Change(version=version, server=server, row=row)
        for known in (self._values, self._freed):
            groups: dict[_Held, list[str]] = {}
            for value, held in list(known.items()):
                groups.setdefault(held, []).append(value)
            for held, values in groups.items():
                found = self.rows.get(held.row)
                for start in range(0, len(values), MAX_VALUES):
                    part = tuple(values[start : start + MAX_VALUES])
                    if found is not None:
                        yield Change(
                            version=held.version, server=held.server, row=found[2], values=part
                        )
                    else:
                        yield Change(version=held.version, server=held.server, free=part)


def _shorten(known: dict[Key, Any], most: int) -> None:
    """Forget the oldest."""
    if (many := len(known) - most) > 0:
        for key in list(islice(known, many)):
            del known[key]


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())
