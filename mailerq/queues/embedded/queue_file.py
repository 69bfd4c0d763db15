"""Reads and writes a queue file, synchronously: for the command line, and for the writer thread.

Nothing here knows trio: the embedded queue drives it from its threads, the command line
straight from its own (an injector starts once per message, so this module imports little).

Numbers of messages come in blocks: taking one is a commit of its own, before the first of the
block is used, and a block is never given back. So no number is used twice, whichever process
writes.

Guarantees
----------
- `Store.write` makes all of its batch durable or raises and none of it is. Only where the disk
  fails beneath a commit, what was refused may be found later all the same.
- An error leaves the object usable: the next call tries again, on a new connection where
  the old one may be spoilt.
- Several processes may write at once. Only one can open the directory exclusively.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple, Self
from zlib import crc32

import apsw

from mailerq.errors import MessageError, QueueError, QueueFull
from mailerq.message import decode_properties, encode_properties
from mailerq.queues.embedded.disk import Room, check_sound, room
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
from mailerq.queues.embedded.shares import first_number
from mailerq.queues.embedded.sqlite_file import (
    APPLICATION_ID,
    BUSY_TIMEOUT_MS,
    INCOMING,
    PAGE_SIZE,
    ROWS_PER_STATEMENT,
    SCHEMA,
    SCHEMA_VERSION,
    Reader,
    bind,
    connect,
    translate,
)
from mailerq.queues.interface import Publication
from mailerq.queues.ownership import DirectoryLock

__all__ = ["FILE_NAME", "Bounds", "Store", "lock_directory"]

logger = logging.getLogger("mailerq.queues")

FILE_NAME: Final = "queue.db"

NUMBERS: Final = 10_000
"""Numbers taken at a time by a process that stays; a short one takes what it needs."""

LARGE_BYTES: Final = 1 << 15
"""A body from this size on goes into its table without a view and a trigger, which copy it."""

PIECE_BYTES: Final = 1 << 20
"""A larger body is written in such pieces: SQLite copies what it is given twice."""

NO_ROW: Final = (None,) * 7
"""What stands behind a number in the view ``incoming`` to delete that message."""

WORK_ROWS: Final = 2_000
"""Rows that one commit of a purge deletes: others are let in between."""


LAST: Final = (2**63 - 1, 2**63 - 1)
"""A due time and a number behind those of all messages."""


class Bounds(NamedTuple):
    """How many messages of a queue are kept, and for how many seconds; 0: no limit.

    With `reports_only`, what has its body is mail and stays, however much there is.
    """

    queue: str
    messages: int
    seconds: float
    reports_only: bool = False


@functools.cache
def _insert(rows: int) -> str:
    return "INSERT INTO incoming VALUES " + ", ".join(["(?, ?, ?, ?, ?, ?, ?, ?)"] * rows)


def _message_row(insert: Insert) -> tuple[Any, ...]:
    """The row of a publication in ``message``."""
    body, body_crc, properties = insert.reference, insert.body_crc, insert.properties
    crc = checksum(insert.id, insert.queue, body, body_crc, properties)
    return (insert.id, insert.queue, insert.due, body, body_crc, crc, properties)


def _write_body(connection: apsw.Connection, table: str, row: tuple[Any, ...], body: bytes) -> None:
    """Insert a row that ends with a body, and begins with its number."""
    insert = f"INSERT INTO {table} VALUES (?{len(row) * ', ?'})"
    if len(body) <= PIECE_BYTES:
        connection.execute(insert, (*row, body))
        return
    connection.execute(insert, (*row, apsw.zeroblob(len(body))))
    view = memoryview(body)
    with connection.blob_open("main", table, "data", row[0], True) as blob:
        for start in range(0, len(body), PIECE_BYTES):
            blob.write(view[start : start + PIECE_BYTES])


class Store(Reader):
    """Reads and writes a queue file; what the command line uses, and the embedded queue's writer.

    >>> import tempfile
    >>> from mailerq.message import Message
    >>> with tempfile.TemporaryDirectory() as directory, Store.open(directory) as store:
    ...     numbers = store.publish([Publication("outbox", Message({"recipient": "a@b.test"}))])
    ...     [entry.message.recipient for entry in store.browse("outbox")]
    ['a@b.test']
    """

    def __init__(
        self,
        path: str,
        locks: list[int],
        numbers: int,
        daemon_lock: DirectoryLock | None = None,
    ) -> None:
        super().__init__(path)
        self._directory = os.path.dirname(path) or "."
        self._locks = locks
        self._daemon_lock = daemon_lock
        self._inode = 0
        self._block = numbers
        self._next = self._end = 0

    @classmethod
    def open(cls, directory: str, *, daemon_lock: DirectoryLock | None = None) -> Self:
        """Open the queue of a directory; the directory and the file are made if missing.

        Raises `QueueError`; a damaged file is left alone and is `QueueDamaged`. Come by
        `mailerq.queues.opening`, which looks at the log first: to open the file is to
        believe its log, and the last one to close it throws away what was not believed.
        """
        path = os.path.join(directory, FILE_NAME)
        locks: list[int] = []
        store = cls(path, locks, 1 if daemon_lock is None else NUMBERS, daemon_lock)
        try:
            os.makedirs(directory, mode=0o750, exist_ok=True)
            locks.append(lock_directory(directory, fcntl.LOCK_SH))
            store.create()
        except (OSError, apsw.Error, QueueError) as error:
            store.close()
            raise translate(error, path) from error
        return store

    def create(self) -> None:
        """Make the file if there is none. Raises `QueueError`, and what SQLite raises."""
        connection = self._connection = connect(self.path, create=True)
        self._inode = os.stat(self.path).st_ino
        if self._layout(connection) == SCHEMA_VERSION:
            return
        connection.pragma("page_size", PAGE_SIZE)
        connection.pragma("journal_mode", "wal")
        connection.execute("BEGIN IMMEDIATE")
        layout = self._layout(connection)
        if layout != SCHEMA_VERSION:  # else another process was faster
            if layout:
                connection.execute("DROP VIEW incoming")
            else:
                connection.execute(SCHEMA)
                first = first_number(os.path.dirname(self.path))
                connection.execute("INSERT INTO number VALUES (?)", (first,))
                connection.pragma("application_id", APPLICATION_ID)
            connection.execute(INCOMING)
            connection.pragma("user_version", SCHEMA_VERSION)
        connection.execute("COMMIT")

    def _layout(self, connection: apsw.Connection) -> int:
        """The layout of the file, 0 of an empty one. Raises `QueueError` for what is not ours."""
        found: list[Any] = connection.execute(
            "SELECT user_version, application_id, (SELECT count(*) FROM sqlite_schema) "
            "FROM pragma_user_version, pragma_application_id"
        ).fetchall()
        version, application, tables = found[0]
        if tables and application != APPLICATION_ID:
            raise QueueError(f"{self.path}: is a database of another program")
        if version > SCHEMA_VERSION:
            raise QueueError(
                f"{self.path}: written by a newer mailerq (layout {version}, this one reads "
                f"up to {SCHEMA_VERSION}); install that one, or start with another directory"
            )
        return int(version)

    def close(self) -> None:
        super().close()
        closing: list[Callable[[], None]] = [
            functools.partial(os.close, lock) for lock in self._locks
        ]
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
        """Make all of them durable and return their numbers, or raise and none of them is."""
        now = time.time()
        batch = Batch([prepare(publication, now) for publication in publications])
        size = sum(insert.size for insert in batch.inserts)
        if not (found := self.room(size)).holds(size):
            raise self.no_room(found)
        self.number(batch.inserts)
        self.write(batch)
        return [insert.id for insert in batch.inserts]

    def room(self, size: int) -> Room:
        """Look what room there is, as far as it matters for so many bytes."""
        found = room(self.path)
        if found.holds(size):
            return found
        # A file does not become smaller when mail has left it.
        try:
            pages = int(self.connection.pragma("freelist_count"))
        except apsw.Error as error:
            raise self.failed(error) from error
        return replace(found, free=found.free + pages * PAGE_SIZE)

    def no_room(self, found: Room) -> QueueFull:
        """The error to raise when the disk has no room for new mail."""
        return QueueFull(
            f"{self.path}: no space left for the queue: {found.free} bytes are free, and "
            f"{found.reserve} of them are kept for the mail in it"
        )

    def remove(self, numbers: Iterable[int]) -> None:
        """Delete messages by their numbers, those that a daemon holds included."""
        self.write(Batch(removals=list(numbers)))

    def purge(self, queue: str) -> int:
        """Delete a queue, what a daemon holds included; how many that were."""
        return sum(self.purge_steps(queue, list))

    def purge_steps(self, queue: str, held: Callable[[], Iterable[int]]) -> Iterator[int]:
        """Delete a queue, some rows a commit; `held` says before each what must stay."""
        return self._delete_up_to(queue, LAST, held)

    def trim_steps(
        self, bounds: Bounds, now: int, held: Callable[[], Iterable[int]]
    ) -> Iterator[int]:
        """Delete what is beyond the bounds of a queue, oldest due first; see `purge_steps`.

        It looks along the index once, so it is for now and then, not for each message.
        """
        end = (-1, -1)
        if bounds.seconds:
            end = (now - int(bounds.seconds * 1000), LAST[1])
        if bounds.messages:
            try:
                for due, number in self.connection.execute(
                    "SELECT due, id FROM message INDEXED BY message_due WHERE queue = ? "
                    "ORDER BY due DESC, id DESC LIMIT 1 OFFSET ?",
                    (bounds.queue, bounds.messages),
                ):
                    end = max(end, (due, number))
            except apsw.Error as error:
                raise self.failed(error) from error
        only = " AND body IS NULL" if bounds.reports_only else ""
        yield from self._delete_up_to(bounds.queue, end, held, only)

    def _delete_up_to(
        self, queue: str, end: tuple[int, int], held: Callable[[], Iterable[int]], only: str = ""
    ) -> Iterator[int]:
        last = (-1, -1)
        while found := self._find(
            "queue = ? AND (due, id) > (?, ?) AND (due, id) <= (?, ?)", (queue, *last, *end)
        ):
            last = found[-1]
            numbers = {number for _, number in found}
            yield self._change(
                "DELETE FROM message NOT INDEXED "
                f"WHERE id IN (SELECT value FROM carray(?)) AND queue = ?{only}",
                (bind(numbers.difference(held())), queue),
            )

    def set_back(self, now: int, before: int) -> Iterator[int]:
        """The clock went from `before` back to `now` (ms): due times go back with it.

        What was due is due now, and what was to wait for less than the clock lost waits for as
        long as it would have. Some rows a commit.
        """
        lost = before - now
        for depth in self.depths():
            last = (now, 0)
            while found := self._find(
                "queue = ? AND (due, id) > (?, ?) AND due <= ?",
                (depth.queue, *last, before + lost),
            ):
                last = found[-1]
                yield self._change(
                    "UPDATE message SET due = max(due - ?, ?) "
                    "WHERE id IN (SELECT value FROM carray(?))",
                    (lost, now, bind(number for _, number in found)),
                )

    def hasten(self, queue: str, now: int) -> Iterator[int]:
        """Make due (ms) what waits after an attempt; what its sender delayed keeps its time.

        Some rows a commit. A row that a daemon has changed meanwhile stays as that left it.
        """
        last = (now, 0)
        while found := self._find("queue = ? AND (due, id) > (?, ?)", (queue, *last)):
            last = found[-1]
            try:
                self.connection.execute("BEGIN IMMEDIATE")
                count = 0
                for _, number in found:
                    count += self._hasten(number, now)
                self.connection.execute("COMMIT")
                check_sound(self._directory)
            except (apsw.Error, OSError) as error:
                raise self.failed(error) from error
            except Exception as error:
                self.failed(error)
                raise
            yield count

    def _hasten(self, number: int, now: int) -> int:
        found: list[Any] = self.connection.execute(
            "SELECT id, queue, due, body, body_crc, crc, properties, NULL FROM message "
            "WHERE id = ? AND due > ?",
            (number, now),
        ).fetchall()
        row = Row(*found[0]) if found else None
        if row is None or not proven(row):
            return 0  # a daemon says what is wrong with it, and sets it aside
        properties = decode_properties(row.properties)
        if not properties.get("results"):
            return 0
        properties.pop("delayed", None)
        data = encode_properties(properties)
        crc = checksum(row.id, row.queue, row.body, row.body_crc, data)
        self.connection.execute(
            "UPDATE message SET due = ?, crc = ?, properties = ? WHERE id = ?",
            (now, crc, data, number),
        )
        return 1

    def _find(self, where: str, values: tuple[Any, ...]) -> list[tuple[int, int]]:
        """Due time and number of some messages, oldest due first."""
        try:
            found: list[Any] = self.connection.execute(
                f"SELECT due, id FROM message INDEXED BY message_due WHERE {where} "
                "ORDER BY due, id LIMIT ?",
                (*values, WORK_ROWS),
            ).fetchall()
        except apsw.Error as error:
            raise self.failed(error) from error
        return found

    def _change(self, statement: str, values: tuple[Any, ...]) -> int:
        try:
            self.connection.execute(statement, values)
            check_sound(self._directory)
            return self.connection.changes()
        except (apsw.Error, OSError) as error:
            raise self.failed(error) from error

    def number(self, inserts: Sequence[Insert]) -> None:
        """Give publications their numbers; `QueueError` when the file cannot hold the block."""
        if self._end - self._next < len(inserts):
            count = max(self._block, len(inserts))
            connection = self._writable()
            try:
                found = connection.execute(
                    "UPDATE number SET next = next + ? RETURNING next", (count,)
                ).get
                check_sound(self._directory)
            except (apsw.Error, OSError) as error:
                raise self.failed(error) from error
            self._end = int(found)
            self._next = self._end - count
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
            if len(rows) <= ROWS_PER_STATEMENT and not (shared or large or batch.retries):
                self._write_rows(connection, rows)  # a commit of its own
                check_sound(self._directory)
                return
            connection.execute("BEGIN IMMEDIATE")
            for reference, users, body in shared:
                _write_body(connection, "shared", (reference, users), body)
            for row, body in large:
                _write_body(connection, "body", row[:1], body)
                connection.execute("INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?)", row)
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
        connection.execute(
            "UPDATE message SET due = ?, crc = ?, properties = ? WHERE id = ? AND queue = ?",
            (insert.due, crc, insert.properties, retry.id, insert.queue),
        )
        if connection.changes():
            return
        # Purged by another process while we held it: a message that is held is kept.
        body = insert.body
        reference = None if body is None else 0
        body_crc = None if body is None else crc32(body)
        crc = checksum(retry.id, insert.queue, reference, body_crc, insert.properties)
        connection.execute(
            _insert(1),
            (retry.id, insert.queue, insert.due, reference, body_crc, crc, insert.properties, body),
        )
        retry.reference, retry.body_crc = reference, body_crc

    def _writable(self) -> apsw.Connection:
        """The connection, if what it writes will be found again."""
        try:
            if os.stat(self.path).st_ino == self._inode:
                return self.connection
        except (OSError, apsw.Error) as error:
            raise self.failed(error) from error
        raise QueueError(f"{self.path}: was replaced while mailerq runs; start it again")


def lock_directory(directory: str, kind: int) -> int:
    """Share a directory with others that use it, or have it alone while it is salvaged.

    Returns the descriptor that holds the lock. Raises `QueueError` and `OSError`.
    """
    lock = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    until = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(lock)
                raise QueueError(f"{directory}: another process is busy with it") from None
            time.sleep(0.05)
        except BaseException:
            os.close(lock)
            raise
        else:
            return lock
