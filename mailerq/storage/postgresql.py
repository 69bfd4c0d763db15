"""Bodies in a table of PostgreSQL, by psycopg, in threads."""

from __future__ import annotations

import math
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

import trio

from mailerq.config import Config
from mailerq.errors import StorageError
from mailerq.escaping import escape
from mailerq.storage.addresses import Postgres
from mailerq.storage.interface import Backend, Body
from mailerq.storage.packing import MAX_BODY

if TYPE_CHECKING:
    from psycopg import Connection

__all__ = ["PostgresBackend"]

T = TypeVar("T")

CONNECT_SECONDS: Final = 10
REMOVE_ROWS: Final = 1000
"""Rows removed in one transaction."""

LOCK: Final = 0x6D61696C
"""The advisory lock of processes that create the table at the same time."""


class _Job:
    """The work of one thread, whose task may go away."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: Connection[Any] | None = None
        self._abandoned = False

    def use(self, connection: Connection[Any] | None) -> None:
        """Note the connection that the thread waits for."""
        with self._lock:
            self._connection = connection
            if self._abandoned:
                self._cut()

    def abandon(self) -> None:
        """End the wait of the thread: a server that hangs would keep it for ever."""
        with self._lock:
            self._abandoned = True
            self._cut()

    def _cut(self) -> None:
        if self._connection is not None and not self._connection.closed:
            with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as sock:
                sock.shutdown(socket.SHUT_RDWR)


class PostgresBackend(Backend):
    """A table with the columns key, expires (in UTC) and body, created if it is missing."""

    def __init__(self, location: Postgres, config: Config) -> None:
        try:
            import psycopg
        except ImportError:
            raise StorageError(
                f"{location} needs psycopg: pip install 'mailerq[postgresql]'"
            ) from None
        self._psycopg = psycopg
        self.name = str(location)
        self.compress = location.compress
        self._location = location
        self._table = location.table
        self._idle: list[Connection[Any]] = []
        self._limiter = trio.CapacityLimiter(config.storage_threads)
        self._sweeper = trio.CapacityLimiter(1)
        self._seconds = config.storage_timeout
        self._made = self._closed = False

    def configure(self, config: Config) -> None:
        self._limiter.total_tokens = config.storage_threads
        if config.storage_timeout != self._seconds:
            self._seconds = config.storage_timeout
            self._forget()

    async def close(self) -> None:
        self._closed = True
        self._forget()

    def _forget(self) -> None:
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    # Connections

    def _connect(self, job: _Job) -> Connection[Any]:
        milliseconds = max(math.ceil(self._seconds * 1000), 1)
        connection = self._psycopg.connect(
            self._location.uri,
            autocommit=False,
            application_name="mailerq",
            connect_timeout=CONNECT_SECONDS,
            tcp_user_timeout=milliseconds,
        )
        job.use(connection)
        try:
            with connection.transaction():
                # The server must not work for long after the task has gone.
                connection.execute(
                    "SELECT set_config('statement_timeout', %s, false)", (str(milliseconds),)
                )
                row = connection.execute("SHOW synchronous_commit").fetchone()
                if row is not None and row[0] == "off":
                    connection.execute("SET synchronous_commit TO on")
            if not self._made:
                self._make(connection)
                self._made = True
        except BaseException:
            connection.close()
            raise
        return connection

    def _make(self, connection: Connection[Any]) -> None:
        """Create the table, unless it is there: an account may have rights on it alone."""
        row = connection.execute("SELECT to_regclass(%s)", (self._table,)).fetchone()
        connection.commit()
        if row is not None and row[0] is not None:
            return
        index = self._table.rpartition(".")[2] + "_expires"
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
            connection.execute(
                f"CREATE TABLE IF NOT EXISTS {self._table} ("
                " key text PRIMARY KEY, expires timestamptz, body bytea NOT NULL)"
            )
            # Bodies are compressed by us, or not at all.
            connection.execute(f"ALTER TABLE {self._table} ALTER body SET STORAGE EXTERNAL")
            connection.execute(f"CREATE INDEX IF NOT EXISTS {index} ON {self._table} (expires)")

    async def _in_thread(
        self,
        work: Callable[[Connection[Any]], T],
        what: str,
        limiter: trio.CapacityLimiter | None = None,
    ) -> T:
        job = _Job()
        try:
            return await trio.to_thread.run_sync(
                self._do, work, job, abandon_on_cancel=True, limiter=limiter or self._limiter
            )
        except trio.Cancelled:
            job.abandon()
            raise
        except self._psycopg.Error as error:
            raise StorageError(f"{self.name} {what}: {self._words(error)}") from None

    def _take(self, job: _Job) -> tuple[Connection[Any], bool]:
        """A connection, and whether it was idle."""
        try:
            connection = self._idle.pop()  # one step, so another thread cannot take it too
        except IndexError:
            return self._connect(job), False
        job.use(connection)
        return connection, True

    def _do(self, work: Callable[[Connection[Any]], T], job: _Job) -> T:
        """Work on a connection; one that was idle may be dead, and then on another one."""
        while True:
            connection, idle = self._take(job)
            try:
                with connection.transaction():
                    result = work(connection)
            except self._psycopg.OperationalError:
                lost = connection.broken or connection.closed
                connection.close()
                if not (idle and lost):
                    raise
            except BaseException:
                connection.close()
                raise
            else:
                job.use(None)
                self._idle.append(connection)
                if self._closed:  # meanwhile
                    self._forget()
                return result

    def _words(self, error: Exception) -> str:
        """The words of an error on one line, without the passwords."""
        text = str(error).strip() or type(error).__name__
        for secret in self._location.secrets:
            text = text.replace(secret, "***")
        advice = ""
        if isinstance(error, self._psycopg.errors.UndefinedTable):
            self._made = False  # the next connection creates it
            self._forget()
            advice = "; the table is created again"
        elif isinstance(error, self._psycopg.errors.InsufficientPrivilege):
            advice = f"; the account needs SELECT, INSERT, UPDATE and DELETE on {self._table}"
        return escape(text[:500]) + advice

    # The interface

    async def put(self, bodies: Sequence[Body]) -> None:
        # In one order, so that two transactions cannot wait for each other.
        rows = sorted({body.key: (body.key, body.expires, body.data) for body in bodies}.values())

        def work(connection: Connection[Any]) -> None:
            with connection.cursor() as cursor:
                cursor.executemany(
                    f"INSERT INTO {self._table} AS old (key, expires, body)"
                    " VALUES (%s, to_timestamp(%s), %b) ON CONFLICT (key) DO UPDATE"
                    " SET expires = greatest(old.expires, excluded.expires), body = excluded.body",
                    rows,
                )

        await self._in_thread(work, "cannot store bodies")

    async def get(self, key: str) -> bytes | None:
        def work(connection: Connection[Any]) -> bytes | None:
            with connection.cursor(binary=True) as cursor:
                cursor.execute(
                    f"SELECT CASE WHEN length(body) <= %s THEN body END"
                    f" FROM {self._table} WHERE key = %s",
                    (MAX_BODY, key),
                )
                row = cursor.fetchone()
            return None if row is None or row[0] is None else bytes(row[0])

        return await self._in_thread(work, "cannot be read")

    async def expire(self, now: float) -> int:
        def work(connection: Connection[Any]) -> int:
            return connection.execute(
                f"DELETE FROM {self._table} WHERE key IN (SELECT key FROM {self._table}"
                " WHERE expires <= to_timestamp(%s) ORDER BY expires LIMIT %s"
                " FOR UPDATE SKIP LOCKED)",
                (now, REMOVE_ROWS),
            ).rowcount

        removed = 0
        while True:
            count = await self._in_thread(work, "cannot remove what has expired", self._sweeper)
            removed += count
            if count < REMOVE_ROWS:
                return removed
