"""Opens a queue file as a SQLite database, and translates SQLite's errors.

Statements are few and long: the interpreter lock is released around every step of a statement, and
beside a busy thread it may take a scheduling interval to get the lock back. So most commits are one
statement, without BEGIN and COMMIT.

SQLite's own checkpoints, in the commit that fills the log, stay on: 5 ms for each 8 MB on an SSD,
and almost nothing while mail leaves soon after it comes. A separate thread for checkpoints was no
better.
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

from mailerq.errors import NO_SPACE, QueueDamaged, QueueError, QueueFull
from mailerq.privileges import as_owner
from mailerq.queues.embedded.disk import room, unreadable
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
"""A file with this suffix beside the queue file makes the next start check the whole queue file."""

CACHE_KIB: Final = 2048
"""The page cache of a connection. Settlements of many destinations touch pages all over the file,
some hundred in a commit. A cache that is too small for them writes pages to the log and reads them
back within one commit. The system caches the file anyway, so a larger cache saves nothing more."""

LOG_BYTES: Final = 64 << 20
"""A write-ahead log that has grown beyond this size is cut back to it. The remaining log is also
room for acks on a full disk."""

CHECKPOINT_BYTES: Final = 8_192_000
"""Size at which the write-ahead log is copied into the file: SQLite's default."""

BUSY_TIMEOUT_MS: Final = 5_000
"""Timeout for another process that writes."""

SUSPICION_SECONDS: Final = 60.0
"""Damage met twice within this time is believed."""

ROWS_PER_STATEMENT: Final = 32


def translate(error: Exception, path: str) -> QueueError:
    """Translate an error of SQLite or the system to `mailerq.errors`."""
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
    """Open the file with our settings. Raises SQLite's errors."""
    flags = apsw.SQLITE_OPEN_READWRITE | (apsw.SQLITE_OPEN_CREATE if create else 0)
    if create and not os.path.exists(path):
        # Mail is private. Open only a new file here: closing a file drops the locks that SQLite may
        # have on it elsewhere in this process.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640))
    connection = apsw.Connection(path, flags=flags, statementcachesize=3 * ROWS_PER_STATEMENT)
    try:
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        connection.execute("PRAGMA synchronous = FULL")
        # Otherwise a long statement keeps its undo data in a separate file, and one with a LIMIT is
        # compiled anew for each value.
        connection.pragma("temp_store", "memory")
        connection.pragma("cache_size", -CACHE_KIB)
        connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
        connection.pragma("journal_size_limit", LOG_BYTES)
        # On a small disk the log must not use up the reserve.
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
        """The open connection; a new one after an error. Raises SQLite's errors."""
        if self._connection is None:
            self._connection = connect(self.path)
        return self._connection

    def close(self) -> None:
        """Close the connection; any further call opens a new one."""
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
        """Roll back after an error, and return the error to raise."""
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
            # SQLite detects a full disk on writes, but not everywhere else, and never a quota.
            error = OSError(system_errno, os.strerror(system_errno))
        problem = translate(error, self.path)
        return self._doubt(problem) if isinstance(problem, QueueDamaged) else problem

    def _doubt(self, problem: QueueDamaged) -> QueueError:
        """Believe damage that is met again while the disk can read the whole file."""
        bad, size = unreadable(self.path)
        if bad:
            return QueueError(f"{self.path}: {bad} of {size} bytes cannot be read from the disk")
        before, self._suspected = self._suspected, time.monotonic()
        if self._suspected - before < SUSPICION_SECONDS:
            return problem
        return QueueError(f"{self.path}: it seems damaged, or could not be read for a moment")


def bind(numbers: Iterable[int]) -> Any:
    """Bind numbers as one parameter of a statement: a table made by ``carray``."""
    # An empty table is refused; no message has number 0.
    return apsw.carray(array("q", numbers) or array("q", (0,)))
