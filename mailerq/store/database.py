"""A small SQLite file in the queue directory that all processes of a daemon share.

Theory of operation
-------------------
Each process has its own connection and asks the file each time: what one process has committed the
next question of any other sees. SQLite's locks keep writers apart, readers wait for nobody, and
a crash at any time leaves the last commit. Nothing here is on the way of a message; threads do it.

If the file is damaged, the first process that notices renames it, under a lock of the file itself,
saves into a new file what can be read, and says so in the log. The others see that the path has
another file, and open that one. Nothing is deleted.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeVar

import apsw

from mailerq.errors import StoreError
from mailerq.locks import FileLock
from mailerq.privileges import as_owner

__all__ = ["Database", "Salvage"]

log = logging.getLogger("mailerq")

MODE: Final = 0o640

BUSY_MS: Final = 5_000
"""Timeout for another process that writes."""

PAGE_BYTES: Final = 4096
"""SQLite's own default."""

LOG_BYTES: Final = 1 << 20
"""A write-ahead log that has grown beyond this size is cut back to it."""

T = TypeVar("T")

Salvage = Callable[[apsw.Connection, apsw.Connection], int]
"""Copies what can be read from a damaged file into a new one; returns how many rows that were.
It expects SQLite's errors of the damaged file at any point, and raises only those of the new one.
"""


class Database:
    """A file with a `schema`. One thread at a time may call the methods."""

    def __init__(
        self,
        path: str,
        schema: str,
        *,
        version: int = 1,
        most_bytes: int = 256 << 20,
        user: str = "",
        salvage: Salvage = lambda old, new: 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """The file is made when it is first needed; root makes it for the owner of its directory,
        or for `user` if that is root. It does not grow beyond `most_bytes`.
        """
        self.path = path
        self._schema = schema
        self._version = version
        self._most_pages = most_bytes // PAGE_BYTES
        self._user = user
        self._salvage = salvage
        self._clock = clock
        self._connection: apsw.Connection | None = None
        self._identity: tuple[int, int] | None = None

    @property
    def is_missing(self) -> bool:
        """Whether there is no file yet, so that there is nothing to read.

        Raises `StoreError`, also if its directory is missing.
        """
        try:
            if _identity(self.path) is not None:
                return False
            os.stat(os.path.dirname(self.path) or ".")
            return True
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror or error}") from error

    def read(self, work: Callable[[apsw.Connection], T]) -> T:
        """Do what `work` does with one statement that reads. Raises `StoreError`."""
        return self._run(work, "")

    def write(self, work: Callable[[apsw.Connection], T]) -> T:
        """Do what `work` does, wholly or not at all, durably. Raises `StoreError`."""
        return self._run(work, "BEGIN IMMEDIATE")

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close(True)

    def _run(self, work: Callable[[apsw.Connection], T], begin: str) -> T:
        try:
            try:
                return self._try(work, begin)
            except (apsw.CorruptError, apsw.NotADBError) as error:
                self.close()
                self._set_aside(str(error))
                return self._try(work, begin)
        except apsw.Error as error:
            if not isinstance(error, apsw.BusyError | apsw.FullError):
                self.close()
            raise StoreError(f"{self.path}: {error}") from error
        except OSError as error:
            self.close()
            raise StoreError(f"{self.path}: {error.strerror or error}") from error

    def _try(self, work: Callable[[apsw.Connection], T], begin: str) -> T:
        connection = self._opened()
        if not begin:
            return work(connection)
        connection.execute(begin)
        try:
            done = work(connection)
            connection.execute("COMMIT")
        except BaseException:
            with suppress(apsw.Error):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            raise
        return done

    def _opened(self) -> apsw.Connection:
        """The connection to the file that is at the path now."""
        if self._connection is not None and _identity(self.path) == self._identity:
            return self._connection
        self.close()
        if _identity(self.path) is None:
            with as_owner(os.path.dirname(self.path) or ".", self._user):
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                with suppress(FileExistsError):
                    os.close(os.open(self.path, flags, MODE))
        elif not os.access(self.path, os.R_OK | os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        self._identity = _identity(self.path)
        connection = apsw.Connection(self.path, flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            self._prepare(connection)
        except BaseException:
            connection.close(True)
            raise
        self._connection = connection
        return connection

    def _prepare(self, connection: apsw.Connection) -> None:
        connection.set_busy_timeout(BUSY_MS)
        connection.pragma("journal_mode", "wal")
        connection.execute("PRAGMA synchronous = FULL")
        connection.pragma("temp_store", "memory")
        connection.pragma("journal_size_limit", LOG_BYTES)
        connection.pragma("max_page_count", self._most_pages)
        found = connection.pragma("quick_check", 1)
        if found != "ok":
            raise apsw.CorruptError(str(found))
        version = connection.pragma("user_version")
        if version == 0:
            connection.execute("BEGIN IMMEDIATE")
            if connection.pragma("user_version") == 0:  # no other process was faster
                connection.execute(self._schema)
                connection.execute(f"PRAGMA user_version = {self._version}")
            connection.execute("COMMIT")
        elif version != self._version:
            raise StoreError(f"{self.path}: another version of mailerq has written this file")

    def _set_aside(self, problem: str) -> None:
        """Rename the damaged file, unless another process has, and save what can be read.

        Raises `OSError` and SQLite's errors of the new file.
        """
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        lock = FileLock(file, wait=True)
        try:
            found = os.fstat(file)
            mine = (found.st_dev, found.st_ino)
            if mine != self._identity or mine != _identity(self.path):
                return
            now = time.gmtime(self._clock())
            name = f"{self.path}.damaged-{time.strftime('%Y%m%d-%H%M%S', now)}"
            number = 0
            while os.path.lexists(copy := f"{name}-{number}"):
                number += 1
            for suffix in ("-wal", "-shm", ""):
                with suppress(FileNotFoundError):
                    os.rename(self.path + suffix, copy + suffix)
        finally:
            lock.close()
        saved = self._save(copy)
        log.error(
            "%s is damaged (%s): the file is kept as %s, and %d rows of it are in the new one",
            self.path,
            problem,
            copy,
            saved,
        )

    def _save(self, copy: str) -> int:
        try:
            old = apsw.Connection(copy, flags=apsw.SQLITE_OPEN_READONLY)
        except apsw.Error:
            return 0
        try:
            return self._try(lambda new: self._salvage(old, new), "BEGIN IMMEDIATE")
        finally:
            old.close(True)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
