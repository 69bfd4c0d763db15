"""Reads and writes a queue file synchronously, for the command line and the writer thread.

This module does not know trio: the embedded queue calls it from its threads, the command line
directly. It imports little, because an injector starts once per message.

Message numbers ascend. A daemon takes them in blocks: each block is a separate commit, made before
its first number is used, and a block is never given back. Other processes take numbers in the
commit of the messages, so a daemon finds their mail, once, by the numbers outside its own blocks.
So no number is used twice, whichever process writes.

Guarantees
----------
- `QueueFile.write` makes its whole batch durable, or raises with none of it durable. Only if the
  disk fails during a commit may a refused batch be found later.
- After an error the object is usable: the next call tries again, on a new connection if the old one
  may be broken.
- Several processes may write at once. Only one can open the directory exclusively.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self
from zlib import crc32

import apsw

from mailerq.config import Config
from mailerq.errors import MessageError, QueueError, QueueFull
from mailerq.locks import SHARED, FileLock, Held, open_directory
from mailerq.message import decode_properties, encode_properties
from mailerq.queues.embedded.disk import Room, check_sound, room
from mailerq.queues.embedded.layout import HELD, PAGE_SIZE, UNSORTED, prepare_file
from mailerq.queues.embedded.queue_reader import QueueReader, Waiting
from mailerq.queues.embedded.records import (
    Batch,
    Insert,
    Retry,
    Row,
    checksum,
    prepare,
    proven,
    share,
)
from mailerq.queues.embedded.sqlite_file import (
    BUSY_TIMEOUT_MS,
    ROWS_PER_STATEMENT,
    bind,
    connect,
    translate,
)
from mailerq.queues.interface import Publication
from mailerq.queues.ownership import DirectoryLock
from mailerq.rules.destinations import place_of

if TYPE_CHECKING:
    from mailerq.rules.changes import Change

__all__ = ["FILE_NAME", "WORK_ROWS", "Bounds", "QueueFile", "lock_directory"]

logger = logging.getLogger("mailerq.queues")

FILE_NAME: Final = "queue.db"

NUMBERS: Final = 10_000
"""Numbers in the block of a long-lived process; a short-lived one takes what it needs."""

LARGE_BYTES: Final = 1 << 15
"""A body of at least this size goes directly into its table: a view and a trigger would copy it."""

PIECE_BYTES: Final = 1 << 20
"""A larger body is written in pieces of this size: SQLite copies its input twice."""

NO_ROW: Final = (None,) * 9
"""The values after a number that make the view ``incoming`` delete that message."""

WORK_ROWS: Final = 2_000
"""Rows that one commit of a purge deletes; other commits go between."""

SORT_ROWS: Final = 500
"""Rows that one commit sorts; sorting reads the properties."""

PLACE: Final = "queue = ? AND destination = ? AND lane = ?"

SORTING: Final = f"""
SELECT m.id, m.queue, m.due, m.body, m.body_crc, m.crc, m.properties, NULL FROM (
    SELECT id FROM message INDEXED BY message_place WHERE {PLACE} ORDER BY due, id LIMIT ?
) AS found CROSS JOIN message m NOT INDEXED ON m.id = found.id
"""

LAST: Final = (2**63 - 1, 2**63 - 1)
"""A due time and a number above those of all messages."""


class Bounds(NamedTuple):
    """How many messages of a queue are kept, and for how many seconds; 0: no limit.

    With `reports_only`, messages with a body are mail and stay, without limit.
    """

    queue: str
    messages: int
    seconds: float
    reports_only: bool = False

    @classmethod
    def of(cls, config: Config) -> tuple[Self, ...]:
        """The bounds of the queue for failed mail."""
        reports_only = not config.failure_is_named
        return (cls(config.failure_queue, *config.failure_bounds, reports_only),)


@functools.cache
def _insert(rows: int) -> str:
    return "INSERT INTO incoming VALUES " + ", ".join([f"(?{', ?' * 9})"] * rows)


def _message_row(insert: Insert) -> tuple[Any, ...]:
    """The row of a publication in ``message``."""
    body, body_crc, properties = insert.reference, insert.body_crc, insert.properties
    crc = checksum(insert.id, insert.queue, body, body_crc, properties)
    place = (insert.destination, insert.lane)
    return (insert.id, insert.queue, insert.due, body, body_crc, crc, properties, *place)


def _write_body(connection: apsw.Connection, table: str, row: tuple[Any, ...], body: bytes) -> None:
    """Insert a row that begins with its number and ends with a body."""
    insert = f"INSERT INTO {table} VALUES (?{len(row) * ', ?'})"
    if len(body) <= PIECE_BYTES:
        connection.execute(insert, (*row, body))
        return
    connection.execute(insert, (*row, apsw.zeroblob(len(body))))
    view = memoryview(body)
    with connection.blob_open("main", table, "data", row[0], True) as blob:
        for start in range(0, len(body), PIECE_BYTES):
            blob.write(view[start : start + PIECE_BYTES])


class QueueFile(QueueReader):
    """Reads and writes a queue file, for the command line and the embedded queue's writer.

    >>> import tempfile
    >>> from mailerq.message import Message
    >>> with tempfile.TemporaryDirectory() as directory, QueueFile.open(directory) as file:
    ...     numbers = file.publish([Publication("outbox", Message({"recipient": "a@b.test"}))])
    ...     [entry.message.recipient for entry in file.browse("outbox")]
    ['a@b.test']
    """

    def __init__(
        self,
        path: str,
        locks: list[FileLock],
        *,
        outbox: str,
        block: int = 0,
        daemon_lock: DirectoryLock | None = None,
    ) -> None:
        super().__init__(path)
        self._directory = os.path.dirname(path) or "."
        self._daemon_lock = daemon_lock
        self.outbox = outbox
        """The queue that is sorted by destination."""
        self.blocks: list[range] = []
        """The blocks of numbers taken here. Other threads may read the list."""
        self._locks = locks
        self._inode = 0
        self.exclusive = block > 0
        self._block = block
        self._next = self._end = 0

    @classmethod
    def open(
        cls, directory: str, *, outbox: str = "outbox", daemon_lock: DirectoryLock | None = None
    ) -> Self:
        """Open the queue of a directory; the directory and the file are created if missing.

        The mail of the queue `outbox` is sorted by destination. Raises `QueueError`; a damaged file
        raises `QueueDamaged` and is left untouched. Call through `mailerq.queues.opening`, which
        checks the log first: opening the file accepts its log, and the last close discards the
        frames that were not accepted.
        """
        path = os.path.join(directory, FILE_NAME)
        locks: list[FileLock] = []
        block = 0 if daemon_lock is None else NUMBERS
        file = cls(path, locks, outbox=outbox, block=block, daemon_lock=daemon_lock)
        try:
            os.makedirs(directory, mode=0o750, exist_ok=True)
            locks.append(lock_directory(directory, SHARED))
            file.create()
        except (OSError, apsw.Error, QueueError) as error:
            file.close()
            raise translate(error, path) from error
        return file

    def create(self) -> None:
        """Create the file if missing. Raises `QueueError`, and SQLite's errors."""
        connection = self._connection = connect(self.path, create=True)
        self._inode = os.stat(self.path).st_ino
        prepare_file(connection, self.path)

    def close(self) -> None:
        super().close()
        closing: list[Callable[[], None]] = []
        closing += (lock.close for lock in self._locks)
        if self._daemon_lock is not None:
            closing.append(self._daemon_lock.release)
        self._locks, self._daemon_lock = [], None
        for close in closing:
            try:
                close()
            except OSError as error:
                logger.error(
                    "%s: a lock cannot be closed (%s): a plugin closes descriptors that are not "
                    "its own",
                    self.path,
                    error.strerror,
                )

    def publish(self, publications: Iterable[Publication]) -> list[int]:
        """Make all publications durable and return their numbers, or raise with none durable."""
        now = time.time()
        batch = Batch([prepare(publication, now, self.outbox) for publication in publications])
        size = sum(insert.size for insert in batch.inserts)
        if not (found := self.room(size)).holds(size):
            raise self.no_room(found)
        self.number(batch.inserts)
        self.write(batch)
        return [insert.id for insert in batch.inserts]

    def room(self, size: int) -> Room:
        """Measure the room, as far as it matters for `size` bytes."""
        found = room(self.path)
        if found.holds(size):
            return found
        # A file does not shrink when mail leaves.
        try:
            pages = int(self.connection.pragma("freelist_count"))
        except apsw.Error as error:
            raise self.failed(error) from error
        return replace(found, free=found.free + pages * PAGE_SIZE)

    def no_room(self, found: Room) -> QueueFull:
        """The error for new mail without room on the disk."""
        return QueueFull(
            f"{self.path}: no space left for the queue: {found.free} bytes are free, and "
            f"{found.reserve} of them are kept for the mail in it"
        )

    def remove(self, numbers: Iterable[int]) -> None:
        """Delete messages by number, including those that a daemon holds."""
        self.write(Batch(removals=list(numbers)))

    def change(
        self, queue: str, numbers: Sequence[int], what: Change, now: float | None = None
    ) -> int:
        """Change messages of a queue that no daemon delivers from; return their number."""
        from mailerq.queues.embedded.changing import change

        moment = time.time() if now is None else now
        return sum(step.done for step in change(self, queue, numbers, what, moment))

    def purge(self, queue: str) -> int:
        """Delete a queue, including messages that a daemon holds; return their number."""
        return sum(self.purge_steps(queue, list))

    def purge_steps(self, queue: str, held: Callable[[], Iterable[int]]) -> Iterator[int]:
        """Delete a queue, some rows per commit; before each, `held` names the messages to keep.

        Messages with later numbers, which come in meanwhile, stay too.
        """
        try:
            end = self.connection.execute("SELECT next FROM number").get
        except apsw.Error as error:
            raise self.failed(error) from error
        while numbers := self._numbers(
            "queue = ? AND id < ? AND id NOT IN (SELECT value FROM carray(?)) LIMIT ?",
            (queue, end, bind(held()), WORK_ROWS),
        ):
            yield self.delete(queue, numbers)

    def trim_steps(
        self, bounds: Bounds, now: int, held: Callable[[], Iterable[int]]
    ) -> Iterator[int]:
        """Delete the messages beyond the bounds of an unsorted queue; see `purge_steps`.

        Oldest due first. Each call scans the index once, so call it from time to time, not for each
        message.
        """
        place = (bounds.queue, *UNSORTED)
        end = (-1, -1)
        if bounds.seconds:
            end = (now - int(bounds.seconds * 1000), LAST[1])
        if bounds.messages:
            for first in self._due(
                f"{PLACE} ORDER BY due DESC, id DESC LIMIT 1 OFFSET ?", (*place, bounds.messages)
            ):
                end = max(end, first)
        only = " AND body IS NULL" if bounds.reports_only else ""
        last = (-1, -1)
        while found := self._due(
            f"{PLACE} AND (due, id) > (?, ?) AND (due, id) <= (?, ?) ORDER BY due, id LIMIT ?",
            (*place, *last, *end, WORK_ROWS),
        ):
            last = found[-1]
            numbers = {number for _, number in found}
            yield self.delete(bounds.queue, numbers.difference(held()), only)

    def set_back(self, now: int, before: int) -> Iterator[int]:
        """The clock went from `before` back to `now` (ms): set due times back too.

        Due messages stay due. A message that had less left to wait than the clock lost keeps its
        remaining wait. Some rows per commit.
        """
        lost = before - now
        for depth in self.depths():
            numbers = self._numbers(
                "queue = ? AND due > ? AND due <= ?", (depth.queue, now, before + lost)
            )
            for start in range(0, len(numbers), WORK_ROWS):
                yield self._change(
                    "UPDATE message SET due = max(due - ?, ?) "
                    "WHERE id IN (SELECT value FROM carray(?)) AND due > ?",
                    (lost, now, bind(numbers[start : start + WORK_ROWS]), now),
                )

    def hasten(self, queue: str, now: int) -> Iterator[int]:
        """Make retries due at `now` (ms); held mail, and mail that its sender delayed, stays.

        Some rows per commit. A row that a daemon has changed meanwhile stays as changed.
        """
        numbers = self._numbers("queue = ? AND due > ? AND due < ?", (queue, now, HELD))
        for start in range(0, len(numbers), WORK_ROWS):
            count = 0
            with self.commit() as connection:
                for number in numbers[start : start + WORK_ROWS]:
                    count += self._hasten(connection, number, now)
            yield count

    def sort_steps(self) -> Iterator[list[Waiting]]:
        """Give unsorted mail of the outbox its place, oldest due first.

        Some rows per commit; yields the sorted messages after each.
        """
        while True:
            sorted_rows = []
            with self.commit() as connection:
                found: list[Any] = connection.execute(
                    SORTING, (self.outbox, *UNSORTED, SORT_ROWS)
                ).fetchall()
                for row in (Row(*values) for values in found):
                    place = place_of(_properties(row))
                    connection.execute(
                        "UPDATE message SET destination = ?, lane = ? WHERE id = ?",
                        (*place, row.id),
                    )
                    due = row.due if isinstance(row.due, int) else 0
                    sorted_rows.append(Waiting(row.id, self.outbox, *place, due))
            if not sorted_rows:
                return
            yield sorted_rows

    def compact(self) -> tuple[int, int]:
        """Rewrite the file without its free space; return its bytes before and after.

        The file must not be open elsewhere. The contents need room twice; without it, raises
        `QueueFull`.
        """
        found = room(self.path)
        if not found.holds(self.free()[1]):
            raise QueueFull(f"{self.path}: {found.free} bytes are free, too few to compact it")
        try:
            connection = self.connection
            before = os.stat(self.path).st_size
            connection.pragma("temp_store", "file")
            connection.execute("VACUUM")
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            connection.pragma("temp_store", "memory")
            return before, os.stat(self.path).st_size
        except (apsw.Error, OSError) as error:
            raise self.failed(error) from error

    def _hasten(self, connection: apsw.Connection, number: int, now: int) -> int:
        found: list[Any] = connection.execute(
            "SELECT id, queue, due, body, body_crc, crc, properties, NULL FROM message "
            "WHERE id = ? AND due > ? AND due < ?",
            (number, now, HELD),
        ).fetchall()
        row = Row(*found[0]) if found else None
        if row is None or not proven(row):
            return 0  # a daemon reports what is wrong, and sets the message aside
        properties = decode_properties(row.properties)
        if not properties.get("results"):
            return 0
        properties.pop("delayed", None)
        data = encode_properties(properties)
        crc = checksum(row.id, row.queue, row.body, row.body_crc, data)
        connection.execute(
            "UPDATE message SET due = ?, crc = ?, properties = ? WHERE id = ?",
            (now, crc, data, number),
        )
        return 1

    def _numbers(self, where: str, values: tuple[Any, ...]) -> array[int]:
        """The numbers of messages, found along the index."""
        try:
            return array(
                "q",
                (
                    number
                    for (number,) in self.connection.execute(
                        f"SELECT id FROM message INDEXED BY message_place WHERE {where}", values
                    )
                ),
            )
        except apsw.Error as error:
            raise self.failed(error) from error

    def _due(self, where: str, values: tuple[Any, ...]) -> list[tuple[int, int]]:
        """Due time and number of messages, found along the index."""
        return self._all(
            f"SELECT due, id FROM message INDEXED BY message_place WHERE {where}", values
        )

    def delete(self, queue: str, numbers: Iterable[int], only: str = "") -> int:
        """Delete messages of a queue; return their number. `only` is a condition in SQL."""
        return self._change(
            "DELETE FROM message NOT INDEXED "
            f"WHERE id IN (SELECT value FROM carray(?)) AND queue = ?{only}",
            (bind(numbers), queue),
        )

    @contextmanager
    def commit(self) -> Iterator[apsw.Connection]:
        """A transaction that ends with the block; an error rolls it back and is translated."""
        try:
            connection = self.connection
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
            check_sound(self._directory)
        except (apsw.Error, OSError) as error:
            raise self.failed(error) from error
        except BaseException as error:
            if isinstance(error, Exception):
                self.failed(error)
            raise

    def _change(self, statement: str, values: tuple[Any, ...]) -> int:
        try:
            self.connection.execute(statement, values)
            check_sound(self._directory)
            return self.connection.changes()
        except (apsw.Error, OSError) as error:
            raise self.failed(error) from error

    def number(self, inserts: Sequence[Insert]) -> None:
        """Number publications; `QueueError` if the file cannot store the block.

        Without blocks, begins the commit that `write` ends.
        """
        if self._end - self._next < len(inserts):
            connection = self._writable()
            count = max(self._block, len(inserts))
            try:
                if not self._block:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")  # nothing was written after the last number
                    connection.execute("BEGIN IMMEDIATE")
                found = connection.execute(
                    "UPDATE number SET next = next + ? RETURNING next", (count,)
                ).get
                if self._block:
                    check_sound(self._directory)
            except (apsw.Error, OSError) as error:
                raise self.failed(error) from error
            self._end = int(found)
            self._next = self._end - count
            if self._block:
                self.blocks.append(range(self._next, self._end))
        for insert in inserts:
            insert.id = self._next
            self._next += 1

    def write(self, batch: Batch) -> None:
        """Commit a batch whose inserts have their numbers.

        Raises `QueueError`, and `MessageError` for what no file can hold.
        """
        connection = self._writable()
        shared = share(batch.inserts)
        large: list[tuple[tuple[Any, ...], bytes]] = []
        rows: list[tuple[Any, ...]] = []
        for insert in batch.inserts:
            row = _message_row(insert)
            body = insert.body if insert.reference == 0 else None
            if body is not None and len(body) >= LARGE_BYTES:
                large.append((row, body))
            else:
                rows.append((*row, body))
        rows += [(number, *NO_ROW) for number in batch.removals]
        try:
            if not connection.in_transaction:
                if len(rows) <= ROWS_PER_STATEMENT and not (shared or large or batch.retries):
                    self._write_rows(connection, rows)  # a separate commit
                    check_sound(self._directory)
                    return
                connection.execute("BEGIN IMMEDIATE")
            for reference, users, body in shared:
                _write_body(connection, "shared", (reference, users), body)
            for row, body in large:
                _write_body(connection, "body", row[:1], body)
                connection.execute(f"INSERT INTO message VALUES (?{', ?' * 8})", row)
            for start in range(0, len(rows), ROWS_PER_STATEMENT):
                self._write_rows(connection, rows[start : start + ROWS_PER_STATEMENT])
            for retry in batch.retries:
                self._retry(connection, retry, batch.tight)
            connection.execute("COMMIT")
            check_sound(self._directory)
        except apsw.TooBigError as error:
            self.failed(error)
            raise MessageError(f"a document is too large for the queue file: {error}") from error
        except (apsw.Error, OSError) as error:
            raise self.failed(error) from error
        except Exception as error:
            self.failed(error)
            raise

    def _write_rows(self, connection: apsw.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
        if rows:
            connection.execute(_insert(len(rows)), [value for row in rows for value in row])

    def _retry(self, connection: apsw.Connection, retry: Retry, tight: bool) -> None:
        insert = retry.insert
        if tight:
            connection.execute(
                "UPDATE message SET due = ? WHERE id = ? AND queue = ?",
                (insert.due, retry.id, insert.queue),
            )
            if connection.changes():
                return
        crc = checksum(retry.id, insert.queue, retry.reference, retry.body_crc, insert.properties)
        place = (insert.destination, insert.lane)
        connection.execute(
            "UPDATE message SET due = ?, crc = ?, properties = ?, destination = ?, lane = ?, "
            "queue = ? WHERE id = ? AND queue = ?",
            (
                *(insert.due, crc, insert.properties, *place),
                *(insert.queue, retry.id, retry.queue or insert.queue),
            ),
        )
        if connection.changes():
            return
        # Another process purged the message while we held it: keep the message, unless its body was
        # only in the file.
        if not retry.whole:
            return
        body = insert.body
        reference = None if body is None else 0
        body_crc = None if body is None else crc32(body)
        crc = checksum(retry.id, insert.queue, reference, body_crc, insert.properties)
        connection.execute(
            _insert(1),
            (
                *(retry.id, insert.queue, insert.due, reference, body_crc, crc, insert.properties),
                *(*place, body),
            ),
        )
        retry.reference, retry.body_crc = reference, body_crc

    def _writable(self) -> apsw.Connection:
        """The connection, if the path still leads to its file."""
        try:
            if os.stat(self.path).st_ino == self._inode:
                return self.connection
        except (OSError, apsw.Error) as error:
            raise self.failed(error) from error
        raise QueueError(f"{self.path}: was replaced while mailerq runs; start it again")


def _properties(row: Row) -> dict[str, Any]:
    """The readable properties of a row."""
    try:
        return decode_properties(row.properties)
    except (MessageError, TypeError):
        return {}


def lock_directory(directory: str, kind: int) -> FileLock:
    """Share a directory with other users of it, or lock it exclusively for a salvage.

    Raises `QueueError` and `OSError`.
    """
    until = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            return FileLock(open_directory(directory), kind)
        except Held:
            if time.monotonic() >= until:
                raise QueueError(f"{directory}: another process is busy with it") from None
            time.sleep(0.05)
