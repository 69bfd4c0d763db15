"""How a queue file is opened as a SQLite database, and what its complaints mean.

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
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

import apsw

from mailerq.errors import QueueDamaged, QueueError, QueueFull
from mailerq.privileges import as_owner
from mailerq.queues.embedded.disk import NO_SPACE, room, unreadable
from mailerq.queues.embedded.layout import PAGE_SIZE

__all__ = [
    "BUSY_TIMEOUT_MS",
    "MARK_SUFFIX",
    "ROWS_PER_STATEMENT",
    "SqliteFile",
    "bind",
    "connect",
    "mark",
    "translate",
]

MARK_SUFFIX: Final = ".check"
"""A file of this name beside the queue file makes the next start check all of it."""

CACHE_KIB: Final = 256
"""The page cache of a connection. The system caches the file anyway: 2 MB, which one large mail
fills, save no processor time."""

LOG_BYTES: Final = 64 << 20
"""To what the write-ahead log is cut when it has grown beyond. As long as it is there, it also
is room in which a message can be acked on a full disk."""

CHECKPOINT_BYTES: Final = 8_192_000
"""How long the write-ahead log grows before it is written into the file, as SQLite has it."""

BUSY_TIMEOUT_MS: Final = 5_000
"""How long to wait for another process that writes."""

SUSPICION_SECONDS: Final = 60.0
"""Damage that is met twice within this time is believed."""

ROWS_PER_STATEMENT: Final = 32


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


class SqliteFile:
    """A queue file and a connection to it, for one thread at a time."""

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


def bind(numbers: Iterable[int]) -> Any:
    """Bind numbers as one parameter of a statement: as the table that ``carray`` makes of it."""
    # An empty one is refused; no message has number 0.
    return apsw.carray(array("q", numbers) or array("q", (0,)))
