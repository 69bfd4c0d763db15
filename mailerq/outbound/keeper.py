"""Keeps the rows in force: reads their file, drops what is over, and tells the deliveries.

Commands change the file, and then ask the engine to `look`. The engine looks every `LOOK_SECONDS`
as well, so that processes of one daemon hear of each other's changes.

Everything here runs on the home worker, but for writes, which a thread does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import trio

from mailerq.errors import RowError
from mailerq.net.logs import RATION_SECONDS, Ration
from mailerq.rules.row import ERROR, PAUSE, Row
from mailerq.rules.rows import NO_POOLS, Rows
from mailerq.rules.shared_rows import Change, Shared
from mailerq.store.row_file import AUDIT_NAME, FILE_NAME, RowFile

__all__ = ["Keeper"]

log = logging.getLogger("mailerq")

LOOK_SECONDS: Final = 0.5
"""Interval between looks at the file, and at the ends of rows."""

T = TypeVar("T")


class Keeper:
    """The rows of an engine; `run` follows them. `tell` gets each new `Rows`, None for no rows."""

    def __init__(
        self,
        directory: str,
        tell: Callable[[Rows | None], object],
        *,
        pools: Mapping[str, Collection[str]] = NO_POOLS,
        clock: Callable[[], float] = time.time,
        server: str = "",
    ) -> None:
        """`pools` has the local addresses of each pool; `server` is the name of this instance."""
        self.rows: Rows | None = None
        self.hits: dict[int, int] = {}
        """How often rows have met something; written now and then."""
        self._file = RowFile(directory, clock=clock, server=server)
        self._tell = tell
        self._pools = pools
        self._stale = False  # the rows in force know other pools
        self._clock = clock
        self._turn = trio.Lock()
        self._say_unread = Ration(log.error, 1, "they could not be read %d times more")

    async def open(self) -> None:
        """Read the file before mail is sent. Raises `RowError`."""
        try:
            await self._follow()
            is_lost = self._file.is_lost
        except OSError as error:
            raise RowError(f"the operator's rows cannot be read: {error}") from error
        if is_lost:
            log.error(
                "%s is missing or empty, and %s tells of rows: there are no pauses, forced errors"
                " or suppressions",
                FILE_NAME,
                AUDIT_NAME,
            )
        if self._file.damaged:
            await self._repair()
        self._update()

    async def run(self) -> None:
        """Look until cancelled."""
        noted = trio.current_time()
        while True:
            await trio.sleep(LOOK_SECONDS)
            await self.look()
            if self.hits and trio.current_time() > noted + RATION_SECONDS:
                noted = trio.current_time()
                await self._note()
                self._say_unread.flush()

    async def look(self) -> None:
        """Put in force what the file says now."""
        try:
            async with self._turn:
                new = await self._follow()
                if self._file.table.expire(self._clock()) or new or self._stale:
                    self._update()
        except (OSError, RowError) as error:
            self._say_unread("the operator's rows stay as they were: %s", error)
            return
        if new and self._file.damaged:
            await self._repair()

    async def _repair(self) -> None:
        """Set a damaged file aside."""
        try:
            await self._write(self._file.repair)
        except (OSError, RowError) as error:
            log.error(
                "%d lines of the operator's rows are damaged, and the file cannot be replaced: %s",
                self._file.damaged,
                error,
            )

    async def _follow(self) -> bool:
        """Read what is new, in turns of some milliseconds; whether there was something."""
        if not self._file.is_behind():
            return False
        while self._file.follow():
            await trio.lowlevel.checkpoint()
        return True

    def change_pools(self, pools: Mapping[str, Collection[str]]) -> None:
        """Put other pools in force: at once, or when a change of the file is over."""
        if pools == self._pools:
            return
        self._pools, self._stale = pools, True
        if not self._turn.locked():
            self._update()

    def _update(self) -> None:
        table = self._file.table
        table.expire(self._clock())
        self._stale = False
        rows = Rows(
            table.rows.values(),
            addresses=table.addresses,
            domains=table.domains,
            pools=self._pools,
        )
        self.rows = rows if rows else None
        self._tell(self.rows)

    # Changes by the engine itself

    async def add(
        self, row: Row, values: Iterable[str] = (), *, who: str, shared: bool = False
    ) -> Row:
        """Add a row, durably, and put it in force. Raises `RowError` and `OSError`."""
        return await self._write(partial(self._file.add, row, values, who=who, shared=shared))

    async def merge(self, changes: Sequence[Change]) -> int:
        """Take in changes of other instances, see `RowFile.merge`."""
        return await self._write(partial(self._file.merge, changes))

    @property
    def shared(self) -> Shared:
        """The rows that all instances of the cluster share."""
        return self._file.table.shared

    def take_changes(self) -> list[Change]:
        """The changes of shared rows since the last call."""
        table = self._file.table
        changes, table.recent = table.recent, []
        return changes

    async def change(self, number: int, *, who: str, why: str = "", **parts: Any) -> Row | None:
        """Change parts of a row, see `RowFile.change`."""
        return await self._write(partial(self._file.change, number, who=who, why=why, **parts))

    async def end(self, ids: Iterable[int], *, who: str, why: str = "") -> list[Row]:
        """End rows; returns those that there were."""
        return await self._write(partial(self._file.end, list(ids), who=who, why=why))

    @property
    def table(self) -> list[Row]:
        """All rows but suppressions, with the hits that are written."""
        table = self._file.table
        return [table.shown(row) for row in list(table.rows.values())]

    async def _note(self) -> None:
        """Write the hits."""
        hits = dict(self.hits)
        self.hits.clear()
        try:
            await self._write(partial(self._file.note, hits))
        except (OSError, RowError) as error:
            self._say_unread("hits of the operator's rows are not counted: %s", error)

    async def _write(self, function: Callable[[], T]) -> T:
        """Change the file in a thread, while nobody reads."""
        async with self._turn:
            try:
                return await trio.to_thread.run_sync(function)
            finally:
                self._update()  # a change that fails may have read those of others

    async def close(self) -> None:
        """Write the last hits."""
        if self.hits:
            with trio.CancelScope(shield=True):
                await self._note()

    # Seeing

    def statistics(self) -> dict[str, int]:
        """How many rows there are of each kind."""
        table = self._file.table
        # A thread may be changing the table.
        kinds = [row.kind for row in list(table.rows.values())]
        return {
            "pauses": kinds.count(PAUSE),
            "errors": kinds.count(ERROR),
            "suppressed": table.suppressed,
        }
