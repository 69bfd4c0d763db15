"""The queue file as a SQLite database: its tables, and how it is opened, read and complained of.

A message is one row of ``message``: its queue, its due time in milliseconds since 1970, its
properties as JSON. Its body lies apart, so that a retry rewrites the small row and never the
body: in ``body`` under the number of the message, or, when one commit brings the same `bytes`
object for several recipients, once in ``shared``, which counts its users. Column
``message.body`` tells which: NULL for no body, 0 for ``body``, else a number in ``shared``.
Triggers keep these tables together: every deletion is one statement on ``message``, and every
insertion one on the view ``incoming``, but for large bodies, which it would copy. A row of that
view without a queue is a deletion too.

Statements are few and long, because the interpreter lock is dropped around every step of a
statement, and a thread beside a busy one may wait a scheduling interval to get it back. So most
commits are one statement, and no BEGIN and COMMIT around it.

SQLite's own checkpoints, in the commit that fills the log, are left as they are: 5 ms for each
8 MB on an SSD, and next to nothing while what comes in goes out again soon. A thread of its
own for them was tried, and did no better.
"""

from __future__ import annotations

import math
import os
import time
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

import apsw

from mailerq.errors import QueueDamaged, QueueError, QueueFull
from mailerq.privileges import as_owner
from mailerq.queues.embedded.disk import NO_SPACE, room, unreadable
from mailerq.queues.embedded.records import Row, aside, check
from mailerq.queues.interface import Depth, Entry
from mailerq.wire._lines import Buffer

__all__ = [
    "APPLICATION_ID",
    "BUSY_TIMEOUT_MS",
    "INCOMING",
    "MARK_SUFFIX",
    "PAGE_SIZE",
    "ROW",
    "ROWS_PER_STATEMENT",
    "SCHEMA",
    "SCHEMA_VERSION",
    "Reader",
    "bind",
    "connect",
    "mark",
    "translate",
]

MARK_SUFFIX: Final = ".check"
"""A file of this name beside the queue file makes the next start check all of it."""

APPLICATION_ID: Final = 0x4D51_5151
"""``MQQQ`` in the header of the file: what `file` and SQLite's own tools see."""

SCHEMA_VERSION: Final = 2
PAGE_SIZE: Final = 8192
"""Three mails of 2 KiB fit in a page; with 4096 it is one, and half of the file is air."""

CACHE_KIB: Final = 256
"""The page cache of a connection. The system caches the file anyway: 2 MB, which one large mail
fills, save no processor time."""

LOG_BYTES: Final = 64 << 20
"""To what the write-ahead log is cut when it has grown beyond. As long as it is there, it also
is room in which a message can be acked on a full disk."""

CHECKPOINT_BYTES: Final = 8_192_000
"""How much the write-ahead log gathers before it is written into the file, as SQLite has it."""

BUSY_TIMEOUT_MS: Final = 5_000
"""How long to wait for another process that writes."""

SUSPICION_SECONDS: Final = 60.0
"""Damage that is met twice within this time is believed."""

ROWS_PER_STATEMENT: Final = 32

SCHEMA: Final = """
CREATE TABLE number (next INTEGER);
CREATE TABLE message (
    id INTEGER PRIMARY KEY, queue TEXT, due INTEGER,
    body INTEGER, body_crc INTEGER, crc INTEGER, properties BLOB);
CREATE INDEX message_due ON message (queue, due);
CREATE TABLE body (id INTEGER PRIMARY KEY, data BLOB);
CREATE TABLE shared (id INTEGER PRIMARY KEY, users INTEGER, data BLOB);
CREATE TRIGGER message_gone AFTER DELETE ON message WHEN old.body = 0
BEGIN
    DELETE FROM body WHERE id = old.id;
END;
CREATE TRIGGER message_share_gone AFTER DELETE ON message WHEN old.body > 0
BEGIN
    UPDATE shared SET users = users - 1 WHERE id = old.body;
    DELETE FROM shared WHERE id = old.body AND users <= 0;
END;
"""

INCOMING: Final = """
CREATE VIEW incoming (id, queue, due, body, body_crc, crc, properties, data)
    AS SELECT 0, 0, 0, 0, 0, 0, 0, 0;
CREATE TRIGGER incoming_body INSTEAD OF INSERT ON incoming WHEN new.body = 0
BEGIN
    INSERT INTO body VALUES (new.id, new.data);
END;
CREATE TRIGGER incoming_message INSTEAD OF INSERT ON incoming WHEN new.queue IS NOT NULL
BEGIN
    INSERT INTO message VALUES
        (new.id, new.queue, new.due, new.body, new.body_crc, new.crc, new.properties);
END;
CREATE TRIGGER incoming_removal INSTEAD OF INSERT ON incoming WHEN new.queue IS NULL
BEGIN
    DELETE FROM message WHERE id = new.id;
END;
"""
"""The way in. A file of an older layout gets it anew: it holds no data."""

ROW: Final = """
SELECT m.id, m.queue, m.due, m.body, m.body_crc, m.crc, m.properties,
    CASE WHEN m.body = 0 THEN (SELECT data FROM body WHERE id = m.id)
         WHEN m.body > 0 THEN (SELECT data FROM shared WHERE id = m.body) END
FROM message m NOT INDEXED
"""
"""Rows by their numbers: left alone, SQLite may rather look at all of a queue."""

LARGE_BYTES: Final = 1 << 16
"""Larger bodies are read in pieces: otherwise SQLite and the driver hold a copy each."""

READ_BYTES: Final = 1 << 18
"""Bytes of a large body to read at a time."""

LEAN_ROW: Final = ROW.replace(
    "SELECT data",
    f"SELECT iif(typeof(data) = 'blob' AND length(data) > {LARGE_BYTES}, length(data), data)",
)
"""Rows with the length of a large body instead of its bytes."""

SCAN: Final = """
SELECT due, id,
    coalesce((SELECT length(properties) FROM message WHERE message.id = found.id), 0)
    + coalesce((SELECT length(data) FROM body WHERE body.id = found.id), 0)
    + coalesce((SELECT length(data) FROM shared WHERE shared.id = found.body), 0)
FROM (
    SELECT * FROM (
        SELECT due, id, body FROM message INDEXED BY message_due
        WHERE queue = ?1 AND due = ?3 AND id > ?4 AND due <= ?2 ORDER BY id LIMIT ?5)
    UNION ALL
    SELECT * FROM (
        SELECT due, id, body FROM message INDEXED BY message_due
        WHERE queue = ?1 AND due > ?3 AND due <= ?2 ORDER BY due, id LIMIT ?5)
) AS found LIMIT ?5
"""
"""What is due above a place. In two parts: a row value would start at the first of equal due."""


def translate(error: Exception, path: str) -> QueueError:
    """Say in the words of `mailerq.errors` what SQLite or the system complains about."""
    if isinstance(error, QueueError):
        return error
    code = getattr(error, "extendedresult", None)
    name = apsw.mapping_extended_result_codes.get(code) if code is not None else None
    text = f"{path}: {error}" + (f" ({name})" if isinstance(name, str) else "")
    if isinstance(error, apsw.CorruptError | apsw.NotADBError):
        return QueueDamaged(f"{text}: the queue file is damaged, a restart salvages it")
    if isinstance(error, apsw.FullError) or getattr(error, "errno", None) in NO_SPACE:
        return QueueFull(f"{text}: no space left for the queue")
    if isinstance(error, apsw.BusyError):
        return QueueError(f"{text}: another process holds the queue for too long")
    return QueueError(text)


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def mark(path: str, reason: str) -> None:
    """Have the next start check the whole file. Raises `OSError`."""
    with (
        as_owner(os.path.dirname(path) or "."),
        open(path + MARK_SUFFIX, "w", encoding="utf-8") as file,
    ):
        file.write(f"{reason}\n")


def connect(path: str, *, create: bool = False) -> apsw.Connection:
    """Open the file with our settings. Raises what SQLite raises."""
    flags = apsw.SQLITE_OPEN_READWRITE | (apsw.SQLITE_OPEN_CREATE if create else 0)
    if create and not os.path.exists(path):
        # Mail is not for everybody. Only a new file is opened here: closing one drops the
        # locks that SQLite may have on it elsewhere in this process.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640))
    connection = apsw.Connection(path, flags=flags, statementcachesize=3 * ROWS_PER_STATEMENT)
    try:
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        connection.execute("PRAGMA synchronous = FULL")
        # A long statement keeps what it may have to undo in a file elsewhere otherwise, and one
        # with a LIMIT is compiled anew for each value of it.
        connection.pragma("temp_store", "memory")
        connection.pragma("cache_size", -CACHE_KIB)
        connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
        connection.pragma("journal_size_limit", LOG_BYTES)
        # On a small disk the log must not take what is kept for it.
        connection.wal_autocheckpoint(
            max(min(CHECKPOINT_BYTES, room(path).reserve // 4) // PAGE_SIZE, 1)
        )
    except BaseException:
        connection.close(True)
        raise
    return connection


class Reader:
    """Looks into a queue file. One thread at a time; raises `QueueError`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._connection: apsw.Connection | None = None
        self._suspected = -math.inf

    @property
    def connection(self) -> apsw.Connection:
        """The open connection; a new one after an error. Raises what SQLite raises."""
        if self._connection is None:
            self._connection = connect(self.path)
        return self._connection

    def close(self) -> None:
        """Close the connection; any further call opens another one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def failed(self, error: Exception) -> QueueError:
        """Undo what is open after an error and hand back the error to raise."""
        connection = self._connection
        system_errno = 0 if connection is None else connection.system_errno
        if connection is not None:
            try:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            except apsw.Error:
                self.close()
            else:
                if not isinstance(error, apsw.BusyError | apsw.FullError):
                    self.close()
        if isinstance(error, apsw.IOError | apsw.CantOpenError) and system_errno in NO_SPACE:
            # SQLite knows a full disk where it writes, and not in all other places, nor a quota.
            error = OSError(system_errno, os.strerror(system_errno))
        problem = translate(error, self.path)
        return self._doubt(problem) if isinstance(problem, QueueDamaged) else problem

    def _doubt(self, problem: QueueDamaged) -> QueueError:
        """Believe in damage when it is met again, and the disk gives all of the file."""
        bad, size = unreadable(self.path)
        if bad:
            return QueueError(f"{self.path}: {bad} of {size} bytes cannot be read from the disk")
        before, self._suspected = self._suspected, time.monotonic()
        if self._suspected - before < SUSPICION_SECONDS:
            return problem
        return QueueError(f"{self.path}: it seems damaged, or could not be read for a moment")

    def version(self) -> int:
        """A number that is another one after any other connection has changed the file."""
        try:
            return int(self.connection.pragma("data_version"))
        except apsw.Error as error:
            raise self.failed(error) from error

    def depths(self, now: float | None = None) -> list[Depth]:
        """How full each queue is, in the order of their names."""
        moment = int((time.time() if now is None else now) * 1000)
        try:
            found = self.connection.execute(
                "SELECT queue, sum(due <= ?1), sum(due > ?1) FROM message GROUP BY queue "
                "ORDER BY queue",
                (moment,),
            ).fetchall()
        except apsw.Error as error:
            raise self.failed(error) from error
        return [Depth(str(row[0]), _whole(row[1]), _whole(row[2])) for row in found]

    def browse(self, queue: str, *, limit: int = 100, after: int = 0) -> list[Entry]:
        """Read without taking; what is damaged shows as `aside` would write it."""
        try:
            rows = [
                Row(*row)
                for row in self.connection.execute(
                    ROW + "WHERE m.id IN (SELECT id FROM message INDEXED BY message_due "
                    "WHERE queue = ? AND id > ? ORDER BY id LIMIT ?) ORDER BY m.id",
                    (queue, after, limit),
                )
            ]
        except apsw.Error as error:
            raise self.failed(error) from error
        entries = []
        for row in rows:
            message = check(row)
            if isinstance(message, str):
                message = aside(row, message).message
            entries.append(Entry(row.id, queue, _whole(row.due) / 1000, message))
        return entries

    def scan(
        self, queue: str, after: tuple[int, int], now: int, limit: int
    ) -> tuple[list[tuple[int, int, int]], int | None]:
        """Find what is due: (due, id, size) in that order, above `after`, at most `limit`.

        The second value is when the next message after `now` (ms) becomes due, or None.
        """
        try:
            found: list[Any] = self.connection.execute(SCAN, (queue, now, *after, limit)).fetchall()
            later = self.connection.execute(
                "SELECT due FROM message WHERE queue = ? AND due > ? ORDER BY due LIMIT 1",
                (queue, now),
            ).get
        except apsw.Error as error:
            raise self.failed(error) from error
        return sorted(found), later

    def known(self, numbers: Iterable[int]) -> set[int]:
        """Those of these numbers that are messages in the file."""
        try:
            found: list[Any] = self.connection.execute(
                "SELECT id FROM message NOT INDEXED WHERE id IN (SELECT value FROM carray(?))",
                (bind(numbers),),
            ).fetchall()
        except apsw.Error as error:
            raise self.failed(error) from error
        return {number for (number,) in found}

    def fetch(
        self, queue: str, numbers: Sequence[int], shared: dict[int, bytes] | None = None
    ) -> list[Row]:
        """Read the messages with these numbers, in the order of `numbers`.

        What is no longer in that queue is left out. A large body that several messages share is
        read once; `shared` has the bodies that are in memory already, by their reference.
        """
        bodies = {} if shared is None else dict(shared)
        rows: dict[int, Row] = {}
        try:
            connection = self.connection
            connection.execute("BEGIN")
            for values in connection.execute(
                LEAN_ROW + "WHERE m.id IN (SELECT value FROM carray(?)) AND m.queue = ?",
                (bind(numbers), queue),
            ):
                rows[values[0]] = Row(*values)
            for number, row in rows.items():
                if isinstance(row.data, int) and row.data > LARGE_BYTES:
                    rows[number] = row._replace(data=self._large(connection, row, bodies))
            connection.execute("COMMIT")
        except (apsw.Error, MemoryError) as error:
            raise self.failed(error) from error
        return [rows[number] for number in numbers if number in rows]

    def _large(
        self, connection: apsw.Connection, row: Row, bodies: dict[int, bytes]
    ) -> bytes | int:
        """Return the large body of a row, or the number that damage left in its place."""
        if row.body in bodies:
            return bodies[row.body]
        table, key = ("shared", row.body) if row.body else ("body", row.id)
        size: int = row.data
        try:
            blob = connection.blob_open("main", table, "data", key, False)
        except apsw.SQLError:
            return size
        body = Buffer()
        body.extend(size)
        room: Any = body  # apsw accepts any writable buffer
        with blob:
            for at in range(0, size, READ_BYTES):
                blob.read_into(room, at, min(READ_BYTES, size - at))
        whole = body.take()
        if row.body:
            bodies[row.body] = whole
        return whole


def bind(numbers: Iterable[int]) -> Any:
    """Bind numbers as one parameter of a statement: as the table that ``carray`` makes of it."""
    # An empty one is refused; no message has number 0.
    return apsw.carray(array("q", numbers) or array("q", (0,)))
