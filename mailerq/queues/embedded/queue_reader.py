"""Reads the contents of a queue file: which messages, how many, and where.

All queries follow the index (queue, destination, lane, due, id) or fetch rows by number, so the
mail of one queue or destination adds no cost to another.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import apsw
import msgspec

from mailerq.queues.embedded.layout import HELD, PAGE_SIZE
from mailerq.queues.embedded.records import Row, aside, check
from mailerq.queues.embedded.sqlite_file import SqliteFile, bind
from mailerq.queues.embedded.taking import Found, Wanted, take
from mailerq.queues.embedded.together import take_together
from mailerq.queues.interface import Depth, DestinationDepth, Entry

if TYPE_CHECKING:
    from mailerq.rules.selection import Selection

__all__ = ["BEFORE_LANES", "ROW", "QueueReader", "Waiting"]

ROW: Final = """
SELECT m.id, m.queue, m.due, m.body, m.body_crc, m.crc, m.properties,
    CASE WHEN m.body = 0 THEN (SELECT data FROM body WHERE id = m.id)
         WHEN m.body > 0 THEN (SELECT data FROM shared WHERE id = m.body) END
FROM message m NOT INDEXED
"""
"""Rows by number. Without the hint SQLite may scan a whole queue."""

LISTED: Final = """
SELECT m.id, m.queue, m.due, m.body, m.body_crc, m.crc, m.properties, NULL,
    CASE WHEN m.body = 0 THEN (SELECT length(data) FROM body WHERE id = m.id)
         WHEN m.body > 0 THEN (SELECT length(data) FROM shared WHERE id = m.body) END
FROM message m NOT INDEXED WHERE m.id IN (SELECT value FROM carray(?)) ORDER BY m.id
"""

SIZES: Final = """
SELECT length(m.properties) + coalesce(
    CASE WHEN m.body = 0 THEN (SELECT length(data) FROM body WHERE id = m.id)
         WHEN m.body > 0 THEN (SELECT length(data) FROM shared WHERE id = m.body) END, 0)
FROM message m NOT INDEXED WHERE m.id IN (SELECT value FROM carray(?)) ORDER BY m.id
"""

NEXT_LANE: Final = """(
    SELECT m.lane FROM message m INDEXED BY message_place
    WHERE m.queue = ?1 AND m.destination = place.destination AND m.lane > place.lane
    ORDER BY m.lane LIMIT 1)"""

PLACES: Final = f"""
WITH RECURSIVE place(destination, lane) AS (
    SELECT ?2, ?3
    UNION ALL
    SELECT
        iif({NEXT_LANE} IS NOT NULL, place.destination,
            (SELECT m.destination FROM message m INDEXED BY message_place
             WHERE m.queue = ?1 AND m.destination > place.destination
             ORDER BY m.destination LIMIT 1)),
        coalesce({NEXT_LANE}, ?5)
    FROM place WHERE place.destination IS NOT NULL
    LIMIT ?4
)
SELECT destination, lane,
    (SELECT m.due FROM message m INDEXED BY message_place
     WHERE m.queue = ?1 AND m.destination = place.destination AND m.lane = place.lane
     ORDER BY m.due LIMIT 1)
FROM place LIMIT -1 OFFSET 1
"""
"""The lanes of a queue, found by steps down the index: the next lane of the current destination,
else the next destination at `BEFORE_LANES`, whose lanes follow."""

BEFORE_LANES: Final = -2
"""A number below all lanes, the lane of unsorted mail included."""

PAGE: Final = 100
"""Messages that a listing reads at a time."""

FIRST_NUMBERS: Final = 1000
"""Messages that a listing looks up before it looks up all."""


class Waiting(NamedTuple):
    """A waiting message, or the first in its lane: its place and due time (ms)."""

    id: int
    queue: str
    destination: str
    lane: int
    due: int


class QueueReader(SqliteFile):
    """Reads a queue file. One thread at a time; raises `QueueError`."""

    def version(self) -> int:
        """A number that changes whenever another connection has changed the file."""
        try:
            return int(self.connection.pragma("data_version"))
        except apsw.Error as error:
            raise self.failed(error) from error

    def depths(self, now: float | None = None) -> list[Depth]:
        """The depth of each queue, in order of name."""
        moment = int((time.time() if now is None else now) * 1000)
        found = self._all(
            "SELECT queue, sum(due <= ?1), sum(due > ?1 AND due < ?2), sum(due >= ?2) "
            "FROM message INDEXED BY message_place GROUP BY queue ORDER BY queue",
            (moment, HELD),
        )
        return [Depth(str(row[0]), *map(_whole, row[1:])) for row in found]

    def destinations(self, queue: str, now: float | None = None) -> Iterator[DestinationDepth]:
        """The depth of each destination of a queue, in order of key."""
        moment = int((time.time() if now is None else now) * 1000)
        try:
            for key, due, delayed, held, first in self.connection.execute(
                "SELECT destination, sum(due <= ?2), sum(due > ?2 AND due < ?3), sum(due >= ?3), "
                "min(due) FROM message INDEXED BY message_place WHERE queue = ?1 "
                "GROUP BY destination ORDER BY destination",
                (queue, moment, HELD),
            ):
                seconds = _whole(first) / 1000 if _whole(first) < HELD else None
                yield DestinationDepth(
                    str(key), _whole(due), _whole(delayed), seconds, _whole(held)
                )
        except apsw.Error as error:
            raise self.failed(error) from error

    def browse(self, queue: str, *, limit: int = 100, after: int = 0) -> list[Entry]:
        """Read without taking; damaged messages appear as `aside` would write them."""
        return self.entries(queue, self.numbers(queue, limit=limit, after=after))

    def entries(self, queue: str, numbers: Sequence[int]) -> list[Entry]:
        """The messages of a queue with these numbers, in the given order."""
        found = self._all(
            ROW + "WHERE m.id IN (SELECT value FROM carray(?)) AND m.queue = ? ORDER BY m.id",
            (bind(numbers), queue),
        )
        return [_entry(Row(*row), _size(row[7]), loaded=True) for row in found]

    def sizes(self, numbers: Sequence[int]) -> list[int]:
        """The bytes of properties and body of the messages with these numbers, in their order."""
        found = self._all(SIZES, (bind(numbers),))
        return [_whole(size) for (size,) in found]

    def listed(self, queue: str, *, limit: int | None = None, after: int = 0) -> Iterator[Entry]:
        """Like `browse`, one by one, and without the bodies."""
        for numbers in self._pages(queue, limit, after):
            yield from self.some(numbers)

    def some(self, numbers: Sequence[int]) -> list[Entry]:
        """The messages with these numbers in their order, without the bodies."""
        found = self._all(LISTED, (bind(numbers),))
        return [_entry(Row._make(row), size, loaded=False) for *row, size in found]

    def selected(
        self, queue: str, selection: Selection, now: float | None = None, *, after: int = 0
    ) -> Iterator[array[int]]:
        """The numbers of the selected messages of a queue above `after`, some at a time."""
        from mailerq.queues.embedded.selecting import selected

        return selected(self, queue, selection, time.time() if now is None else now, after=after)

    def all_entries(
        self, queue: str, *, limit: int | None = None, after: int = 0
    ) -> Iterator[Entry]:
        """Like `browse`, one by one."""
        for numbers in self._pages(queue, limit, after):
            yield from self.entries(queue, numbers)

    def _pages(self, queue: str, limit: int | None, after: int) -> Iterator[array[int]]:
        """The message numbers of a queue, a page at a time."""
        # In a large queue, finding the first few is much faster than finding all.
        first = FIRST_NUMBERS if limit is None else min(limit, FIRST_NUMBERS)
        numbers = self.numbers(queue, limit=first, after=after)
        while numbers:
            for start in range(0, len(numbers), PAGE):
                yield numbers[start : start + PAGE]
            if limit is not None:
                limit -= len(numbers)
            if limit == 0 or len(numbers) < first:
                return
            numbers = self.numbers(queue, limit=limit, after=numbers[-1])

    def numbers(self, queue: str, *, limit: int | None = None, after: int = 0) -> array[int]:
        """The message numbers of a queue above `after`, in order."""
        try:
            return array(
                "q",
                (
                    number
                    for (number,) in self.connection.execute(
                        "SELECT id FROM message INDEXED BY message_place "
                        "WHERE queue = ? AND id > ? ORDER BY id LIMIT ?",
                        (queue, after, -1 if limit is None else limit),
                    )
                ),
            )
        except apsw.Error as error:
            raise self.failed(error) from error

    def places(
        self, queue: str, after: tuple[str, int], limit: int
    ) -> tuple[list[Waiting], tuple[str, int] | None]:
        """The first message of each lane of a queue above a destination and lane, in order.

        The messages have no numbers, because rows are not read. `limit` bounds the result; the
        second value is the place to continue from, None at the end.
        """
        found = self._all(PLACES, (queue, *after, limit, BEFORE_LANES))
        places = [
            Waiting(0, queue, destination, lane, due)
            for destination, lane, due in found
            if isinstance(due, int)
        ]
        if len(found) < limit - 1 or found[-1][0] is None:
            return places, None
        return places, found[-1][:2]

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All reads in the block see one state of the file. A read that fails ends that."""
        try:
            self.connection.execute("BEGIN")
        except apsw.Error as error:
            raise self.failed(error) from error
        try:
            yield
        finally:
            connection = self._connection
            if connection is not None and connection.in_transaction:
                try:
                    connection.execute("COMMIT")
                except apsw.Error as error:
                    raise self.failed(error) from error

    def take(self, wanted: Wanted) -> Found:
        """Read some mail of a destination, see `mailerq.queues.embedded.taking`."""
        try:
            return take(self.connection, wanted)
        except apsw.Error as error:
            raise self.failed(error) from error

    def take_together(self, wanted: Sequence[Wanted]) -> list[Found | None]:
        """Read for several takes, see `mailerq.queues.embedded.together`; None: to be read alone.

        After an error all are to be read alone: the error is in one of them, and comes again there.
        """
        try:
            return take_together(self.connection, wanted)
        except (apsw.Error, msgspec.DecodeError):
            self.close()
            return [None] * len(wanted)

    def row(self, number: int) -> Row | None:
        """One message with its body; only one copy of the body is in memory."""
        found = self._all(ROW.replace("data FROM", "NULL FROM") + "WHERE m.id = ?", (number,))
        if not found:
            return None
        row = Row(*found[0])
        if not isinstance(row.body, int):
            return row
        place = ("body", number) if row.body == 0 else ("shared", row.body)
        try:
            # A query would make two copies of the body: SQLite's and ours.
            with self.connection.blob_open("main", place[0], "data", place[1], False) as blob:
                return row._replace(data=blob.read())
        except apsw.Error:
            pass  # there is no body, or it is no blob
        found = self._all(ROW + "WHERE m.id = ?", (number,))
        return Row(*found[0]) if found else None

    def free(self) -> tuple[int, int]:
        """The free bytes of the file, and the bytes in use."""
        try:
            pages = int(self.connection.pragma("page_count"))
            free = int(self.connection.pragma("freelist_count"))
        except apsw.Error as error:
            raise self.failed(error) from error
        return free * PAGE_SIZE, (pages - free) * PAGE_SIZE

    def next_number(self) -> int:
        """The number that will be assigned next."""
        return int(self._all("SELECT next FROM number", ())[0][0])

    def new_numbers(self, known: int, own: Iterable[range]) -> tuple[int, list[Waiting]]:
        """The next number, and the messages from `known` on that other processes published.

        `own` are the numbers that this process has assigned.
        """
        connection = self.connection
        try:
            connection.execute("BEGIN")
            following = int(connection.execute("SELECT next FROM number").get)
            found: list[Any] = []
            for numbers in _between(known, following, own):
                found += connection.execute(
                    "SELECT id, queue, destination, lane, due FROM message NOT INDEXED "
                    "WHERE id >= ? AND id < ?",
                    (numbers.start, numbers.stop),
                ).fetchall()
            connection.execute("COMMIT")
        except apsw.Error as error:
            raise self.failed(error) from error
        return following, [Waiting(*row) for row in found]

    def waiting(self, queue: str, numbers: Iterable[int]) -> list[Waiting]:
        """The subset of these messages that are in a queue, each with its place."""
        found = self._all(
            "SELECT id, queue, destination, lane, due FROM message NOT INDEXED "
            "WHERE id IN (SELECT value FROM carray(?)) AND queue = ?",
            (bind(numbers), queue),
        )
        return [Waiting(*row) for row in found if isinstance(row[-1], int)]

    def known(self, numbers: Iterable[int]) -> set[int]:
        """The subset of these numbers that are messages in the file."""
        found = self._all(
            "SELECT id FROM message NOT INDEXED WHERE id IN (SELECT value FROM carray(?))",
            (bind(numbers),),
        )
        return {number for (number,) in found}

    def _all(self, statement: str, values: tuple[Any, ...]) -> list[Any]:
        try:
            return self.connection.execute(statement, values).fetchall()
        except apsw.Error as error:
            raise self.failed(error) from error


def _entry(row: Row, size: int | None, *, loaded: bool) -> Entry:
    message = check(row, loaded=loaded)
    damaged = isinstance(message, str)
    if isinstance(message, str):
        message = aside(row, message).message
    due = _whole(row.due)
    held = due >= HELD
    seconds = (due - HELD if held else due) / 1000
    return Entry(row.id, str(row.queue), seconds, message, size, held, damaged)


def _size(data: object) -> int | None:
    return len(data) if isinstance(data, bytes | str) else None


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _between(first: int, end: int, own: Iterable[range]) -> Iterator[range]:
    """The numbers from `first` to `end` that are not own.

    >>> list(_between(1, 50, [range(10, 20), range(20, 30), range(45, 55)]))
    [range(1, 10), range(30, 45)]
    """
    for numbers in own:
        if first < numbers.start:
            yield range(first, min(numbers.start, end))
        first = max(first, numbers.stop)
        if first >= end:
            return
    yield range(first, end)
