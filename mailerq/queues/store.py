"""The queue file: a SQLite database, read and written synchronously.

`Reader` looks, `Store` also writes. Neither knows trio: the embedded queue drives them from
its threads, the command line straight from its own (an injector starts once per message, so
this module imports little).

Theory of operation
-------------------
A message is one row of ``message``: its queue, its due time in milliseconds since 1970, its
properties as JSON. Its body lies apart, so that a retry rewrites the small row and never the
body: in ``body`` under the number of the message, or, when one commit brings the same
`bytes` object for several recipients, once in ``shared``, which counts its users. Column
``message.body`` tells which: NULL for no body, 0 for ``body``, else a number in ``shared``.
Triggers keep these tables together, so that every deletion is one statement on ``message``.

Every row carries two checksums, of its body and of all the rest but the due time. They
prove a record when it is read, and when it is found loose in a damaged file.

Numbers come in blocks: taking one is a commit of its own, before the first of the block is
used, and a block is never given back. So no number is used twice, whichever process writes.

Statements are few and long, because the interpreter lock is dropped around every step of a
statement, and a thread beside a busy one may wait a scheduling interval to get it back.

Guarantees
----------
- `Store.write` makes all of its batch durable or raises and none of it is.
- An error leaves the object usable: the next call tries again, on a new connection where
  the old one may be spoilt.
- Several processes may write at once. Only one can open the directory exclusively.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, NamedTuple, Self
from zlib import crc32

import apsw

from mailerq.errors import MessageError, QueueDamaged, QueueError
from mailerq.message import Message, decode_properties, encode_properties
from mailerq.queues.interface import Depth, Entry, Publication

__all__ = [
    "DAMAGED_QUEUE",
    "Batch",
    "Insert",
    "Reader",
    "Retry",
    "Row",
    "Store",
    "aside",
    "check",
    "mark",
    "prepare",
    "proven",
    "translate",
]

FILE_NAME: Final = "queue.db"
LOCK_NAME: Final = "queue.lock"
MARK_SUFFIX: Final = ".check"
"""A file of this name beside the queue file makes the next start check all of it."""

DAMAGED_QUEUE: Final = "damaged"

APPLICATION_ID: Final = 0x4D51_5151
"""``MQQQ`` in the header of the file: what `file` and SQLite's own tools see."""

SCHEMA_VERSION: Final = 1
PAGE_SIZE: Final = 8192
"""Three mails of 2 KiB fit in a page; with 4096 it is one, and half of the file is air."""

BUSY_TIMEOUT_MS: Final = 5_000
"""How long to wait for another process that writes."""

NUMBERS: Final = 10_000
"""Numbers taken at a time by a process that stays; a short one takes what it needs."""

ROWS_PER_STATEMENT: Final = 32
WORK_ROWS: Final = 2_000
"""Rows that one commit of a purge deletes: others are let in between."""

SHARED_SIZE: Final = 1024
"""Bytes from which on a body with several users is stored once."""

MAX_NAME: Final = 255
MAX_SIZE: Final = 999_000_000
"""Bytes of one body or of one message's properties: SQLite's own limit, less a row's rest."""

SCHEMA: Final = """
CREATE TABLE number (next INTEGER);
CREATE TABLE message (
    id INTEGER PRIMARY KEY, queue TEXT, due INTEGER,
    body INTEGER, body_crc INTEGER, crc INTEGER, properties BLOB);
CREATE INDEX message_due ON message (queue, due);
CREATE TABLE body (id INTEGER PRIMARY KEY, data BLOB);
CREATE TABLE shared (id INTEGER PRIMARY KEY, users INTEGER, data BLOB);
CREATE VIEW incoming (id, queue, due, body, body_crc, crc, properties, data)
    AS SELECT 0, 0, 0, 0, 0, 0, 0, 0;
CREATE TRIGGER incoming_body INSTEAD OF INSERT ON incoming WHEN new.body = 0
BEGIN
    INSERT INTO body VALUES (new.id, new.data);
END;
CREATE TRIGGER incoming_message INSTEAD OF INSERT ON incoming
BEGIN
    INSERT INTO message VALUES
        (new.id, new.queue, new.due, new.body, new.body_crc, new.crc, new.properties);
END;
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

ROW: Final = """
SELECT m.id, m.queue, m.due, m.body, m.body_crc, m.crc, m.properties,
    CASE WHEN m.body = 0 THEN (SELECT data FROM body WHERE id = m.id)
         WHEN m.body > 0 THEN (SELECT data FROM shared WHERE id = m.body) END
FROM message m NOT INDEXED
"""
"""Rows by their numbers: left alone, SQLite may rather look at all of a queue."""

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


class Row(NamedTuple):
    """A message as it lies in the file, where damage may have left any value in any column."""

    id: int
    queue: Any
    due: Any
    body: Any
    body_crc: Any
    crc: Any
    properties: Any
    data: Any


@dataclass(slots=True, eq=False)
class Insert:
    """A publication made ready for the file. `Store` fills in what stands after `body`."""

    message: Message
    queue: str
    due: int
    properties: bytes
    body: bytes | None
    id: int = 0
    reference: int | None = None
    body_crc: int | None = None

    @property
    def size(self) -> int:
        return len(self.properties) + len(self.body or b"")


@dataclass(slots=True, eq=False)
class Retry:
    """New properties and a new due time for a message that keeps its number and its body.

    `insert` is the same as a publication: it stands in when somebody deleted the row.
    """

    id: int
    reference: int | None
    body_crc: int | None
    insert: Insert


@dataclass(slots=True, eq=False)
class Batch:
    """What goes into one commit."""

    inserts: list[Insert] = field(default_factory=list)
    retries: list[Retry] = field(default_factory=list)
    removals: list[int] = field(default_factory=list)


def prepare(publication: Publication, now: float) -> Insert:
    """Encode and check a publication; `MessageError` says what of it no file can hold."""
    queue = publication.queue
    message = publication.message
    try:
        if not 0 < len(queue.encode()) <= MAX_NAME or "\0" in queue:
            raise MessageError(f"queue name {queue!r}: expected 1 to {MAX_NAME} bytes, no NUL")
        properties = encode_properties(message.properties)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, MessageError):
            raise
        raise MessageError(f"not to be written as JSON: {error}") from None
    body = message.body
    if len(properties) > MAX_SIZE or (body is not None and len(body) > MAX_SIZE):
        raise MessageError(f"larger than {MAX_SIZE} bytes")
    due = now if publication.due is None else min(max(publication.due, 0.0), 1e12)
    return Insert(message, queue, int(due * 1000), properties, body)


def checksum(
    number: int, queue: str, body: int | None, body_crc: int | None, properties: bytes
) -> int:
    """Prove a row: all of it but the due time, which is moved when the clock is set back."""
    head = f"{number} {queue} {body} {body_crc} "
    return crc32(properties, crc32(head.encode()))


def proven(row: Row) -> bool:
    """Whether all of a row but its body is as it was written."""
    number, queue, due, body, body_crc, crc, properties, _ = row
    return (
        isinstance(queue, str)
        and isinstance(due, int)
        and isinstance(properties, bytes)
        and checksum(number, queue, body, body_crc, properties) == crc
    )


def check(row: Row) -> Message | str:
    """Decode a row that is as it was written; otherwise say what is wrong with it."""
    if not proven(row):
        return "the checksum of the properties does not fit"
    data = row.data
    if row.body is not None:
        if not isinstance(data, bytes):
            return "the body is missing"
        if crc32(data) != row.body_crc:
            return "the checksum of the body does not fit"
    try:
        return Message(decode_properties(row.properties), data)
    except MessageError as error:
        return str(error)


def aside(row: Row, reason: str) -> Publication:
    """Wrap what is left of a damaged row into a message for the queue `DAMAGED_QUEUE`."""
    from base64 import b64encode

    properties, data = row.properties, row.data
    if isinstance(properties, str):
        properties = properties.encode(errors="surrogateescape")
    account = {
        "reason": reason,
        "id": row.id,
        "queue": row.queue if isinstance(row.queue, str) else repr(row.queue),
        "due": row.due if isinstance(row.due, int | float) else repr(row.due),
        "properties-base64": b64encode(bytes(properties or b"")).decode(),
    }
    if isinstance(data, str):
        data = data.encode(errors="surrogateescape")
    return Publication(
        DAMAGED_QUEUE, Message({"damaged": account}, data if isinstance(data, bytes) else None)
    )


def translate(error: Exception, path: str) -> QueueError:
    """Say in the words of `mailerq.errors` what SQLite or the system complains about."""
    if isinstance(error, QueueError):
        return error
    code = getattr(error, "extendedresult", None)
    name = apsw.mapping_extended_result_codes.get(code) if code is not None else None
    text = f"{path}: {error}" + (f" ({name})" if isinstance(name, str) else "")
    if isinstance(error, apsw.CorruptError | apsw.NotADBError):
        return QueueDamaged(f"{text}: the queue file is damaged, a restart salvages it")
    if isinstance(error, apsw.FullError):
        return QueueError(f"{text}: no space left for the queue")
    if isinstance(error, apsw.BusyError):
        return QueueError(f"{text}: another process holds the queue for too long")
    return QueueError(text)


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def mark(path: str, reason: str) -> None:
    """Have the next start check the whole file. Raises `OSError`."""
    with open(path + MARK_SUFFIX, "w", encoding="utf-8") as file:
        file.write(f"{reason}\n")


def connect(path: str, *, create: bool = False) -> apsw.Connection:
    """Open the file with our settings. Raises what SQLite raises."""
    flags = apsw.SQLITE_OPEN_READWRITE | (apsw.SQLITE_OPEN_CREATE if create else 0)
    connection = apsw.Connection(path, flags=flags, statementcachesize=3 * ROWS_PER_STATEMENT)
    try:
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        connection.execute("PRAGMA synchronous = FULL")
    except BaseException:
        connection.close(True)
        raise
    return connection


class Reader:
    """Looks into a queue file. One thread at a time; raises `QueueError`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._connection: apsw.Connection | None = None

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
        if connection is not None:
            try:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            except apsw.Error:
                self.close()
            else:
                if not isinstance(error, apsw.BusyError | apsw.FullError):
                    self.close()
        return translate(error, self.path)

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

    def fetch(self, queue: str, numbers: Sequence[int]) -> list[Row]:
        """Read the messages with these numbers, in the order of `numbers`.

        What is no longer in that queue is left out.
        """
        try:
            rows = {
                row[0]: Row(*row)
                for row in self.connection.execute(
                    ROW + "WHERE m.id IN (SELECT value FROM carray(?)) AND m.queue = ?",
                    (_carray(numbers), queue),
                )
            }
        except apsw.Error as error:
            raise self.failed(error) from error
        return [rows[number] for number in numbers if number in rows]


def _carray(numbers: Iterable[int]) -> Any:
    """Numbers as one parameter of a statement, ``SELECT value FROM carray(?)``."""
    # An empty one is refused; no message has number 0.
    return apsw.carray(array("q", numbers) or array("q", (0,)))


@functools.cache
def _insert(rows: int) -> str:
    return "INSERT INTO incoming VALUES " + ", ".join(["(?, ?, ?, ?, ?, ?, ?, ?)"] * rows)


class Store(Reader):
    """Reads and writes a queue file; what the command line uses, and the embedded queue's writer.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory, Store.open(directory) as store:
    ...     numbers = store.publish([Publication("outbox", Message({"recipient": "a@b.test"}))])
    ...     [entry.message.recipient for entry in store.browse("outbox")]
    ['a@b.test']
    """

    def __init__(self, path: str, locks: Sequence[int], numbers: int) -> None:
        super().__init__(path)
        self._locks = list(locks)
        self._block = numbers
        self._next = self._end = 0

    @classmethod
    def open(cls, directory: str, *, exclusive: bool = False) -> Self:
        """Open the queue of a directory; the directory and the file are made if missing.

        `exclusive` is for the daemon: it refuses a directory that another one has, checks
        the file, and salvages a damaged one. Without it a damaged file is `QueueDamaged`.
        """
        path = os.path.join(directory, FILE_NAME)
        locks: list[int] = []
        try:
            os.makedirs(directory, mode=0o750, exist_ok=True)
            if exclusive:
                locks.append(_lock_daemon(os.path.join(directory, LOCK_NAME)))
            locks.append(os.open(directory, os.O_RDONLY | os.O_CLOEXEC))
            if exclusive:
                from mailerq.queues.salvage import recover

                _lock_directory(locks[-1], fcntl.LOCK_EX, path)
                recover(path)
            _lock_directory(locks[-1], fcntl.LOCK_SH, path)
            store = cls(path, locks, NUMBERS if exclusive else 1)
            store.create()
        except (OSError, apsw.Error, QueueError) as error:
            for lock in locks:
                os.close(lock)
            raise translate(error, path) from error
        return store

    def create(self) -> None:
        """Make the file if there is none. Raises `QueueError`, and what SQLite raises."""
        connection = self._connection = connect(self.path, create=True)
        if self._known(connection):
            return
        connection.pragma("page_size", PAGE_SIZE)
        connection.pragma("journal_mode", "wal")
        connection.execute("BEGIN IMMEDIATE")
        if not self._known(connection):  # else another process was faster
            connection.execute(SCHEMA)
            connection.execute("INSERT INTO number VALUES (1)")
            connection.pragma("application_id", APPLICATION_ID)
            connection.pragma("user_version", SCHEMA_VERSION)
        connection.execute("COMMIT")

    def _known(self, connection: apsw.Connection) -> bool:
        """Whether the file is one of ours; an empty one is not yet. Raises `QueueError`."""
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
        return bool(version == SCHEMA_VERSION)

    def close(self) -> None:
        super().close()
        locks, self._locks = self._locks, []
        for lock in locks:
            os.close(lock)

    def publish(self, publications: Iterable[Publication]) -> list[int]:
        """Make all of them durable and return their numbers, or raise and none of them is."""
        now = time.time()
        batch = Batch([prepare(publication, now) for publication in publications])
        self.number(batch.inserts)
        self.write(batch)
        return [insert.id for insert in batch.inserts]

    def remove(self, numbers: Iterable[int]) -> None:
        """Delete messages by their numbers, those that a daemon holds included."""
        self.write(Batch(removals=list(numbers)))

    def purge(self, queue: str) -> int:
        """Delete a queue, what a daemon holds included; how many that were."""
        return sum(self.purge_steps(queue, list))

    def purge_steps(self, queue: str, held: Callable[[], Iterable[int]]) -> Iterator[int]:
        """Delete a queue, some rows a commit; `held` says before each what must stay."""
        last = (-1, -1)
        while found := self._find("queue = ? AND (due, id) > (?, ?)", (queue, *last)):
            last = found[-1]
            numbers = {number for _, number in found}
            yield self._change(
                "DELETE FROM message NOT INDEXED "
                "WHERE id IN (SELECT value FROM carray(?)) AND queue = ?",
                (_carray(numbers.difference(held())), queue),
            )

    def set_back(self, now: int, before: int) -> Iterator[int]:
        """The clock went from `before` back to `now` (ms): what was due then is due now.

        Some rows a commit.
        """
        for depth in self.depths():
            while found := self._find(
                "queue = ? AND due > ? AND due <= ?", (depth.queue, now, before)
            ):
                yield self._change(
                    "UPDATE message SET due = ? WHERE id IN (SELECT value FROM carray(?))",
                    (now, _carray(number for _, number in found)),
                )

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
            return self.connection.changes()
        except apsw.Error as error:
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
            except apsw.Error as error:
                raise self.failed(error) from error
            self._end = int(found)
            self._next = self._end - count
        for insert in inserts:
            insert.id = self._next
            self._next += 1

    def write(self, batch: Batch) -> None:
        """Commit a batch whose inserts have their numbers. Raises `QueueError`."""
        connection = self._writable()
        shared = _share(batch.inserts)
        rows = [
            (
                insert.id,
                insert.queue,
                insert.due,
                insert.reference,
                insert.body_crc,
                checksum(
                    insert.id,
                    insert.queue,
                    insert.reference,
                    insert.body_crc,
                    insert.properties,
                ),
                insert.properties,
                insert.body if insert.reference == 0 else None,
            )
            for insert in batch.inserts
        ]
        try:
            connection.execute("BEGIN IMMEDIATE")
            if shared:
                connection.executemany("INSERT INTO shared VALUES (?, ?, ?)", shared)
            for start in range(0, len(rows), ROWS_PER_STATEMENT):
                part = rows[start : start + ROWS_PER_STATEMENT]
                connection.execute(_insert(len(part)), [value for row in part for value in row])
            for retry in batch.retries:
                self._retry(connection, retry)
            if batch.removals:
                connection.execute(
                    "DELETE FROM message WHERE id IN (SELECT value FROM carray(?))",
                    (_carray(batch.removals),),
                )
            connection.execute("COMMIT")
        except apsw.Error as error:
            raise self.failed(error) from error

    def _retry(self, connection: apsw.Connection, retry: Retry) -> None:
        insert = retry.insert
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
        try:
            return self.connection
        except apsw.Error as error:
            raise self.failed(error) from error


def _share(inserts: Sequence[Insert]) -> list[tuple[int, int, bytes]]:
    """Say in each insert where its body lies; the rows for ``shared`` are what comes back."""
    users: dict[int, list[Insert]] = {}
    for insert in inserts:
        if insert.body is None:
            insert.reference = insert.body_crc = None
        else:
            # A short body is cheaper to copy than to share; b"" is one object everywhere.
            key = id(insert.body) if len(insert.body) >= SHARED_SIZE else -insert.id
            users.setdefault(key, []).append(insert)
    shared = []
    for group in users.values():
        first = group[0]
        body = first.body
        assert body is not None
        crc = crc32(body)
        reference = 0
        if len(group) > 1:
            reference = first.id
            shared.append((reference, len(group), body))
        for insert in group:
            insert.reference = reference
            insert.body_crc = crc
    return shared


def _lock_directory(lock: int, kind: int, path: str) -> None:
    """Share the directory with others that use it, or have it alone while it is salvaged."""
    until = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise QueueError(f"{path}: another process is busy with it") from None
            time.sleep(0.05)
        else:
            return


def _lock_daemon(path: str) -> int:
    """Take the lock of a running daemon and write our process id into it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
    except OSError as error:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise QueueError(
                f"{path}: held by another mailerq, process {holder}; stop it or use another "
                "queue-directory"
            ) from None
        raise
    return lock
