"""Suppresses recipients that complain or do not exist, for sessions that take reports about them.

Theory of operation
-------------------
Sessions of any worker call `suppress`, and wait until the row is durable, at most `WAIT_SECONDS`.
One task writes: all that came meanwhile, in one row for each reason. So a flood of reports costs
few writes. While the rows cannot be written, nobody waits; the recipients are kept here, up to
`MAX_WAITING`, and written when that is possible again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from mailerq.address import parse_mailbox
from mailerq.errors import AddressError, RowError
from mailerq.net.logs import Ration
from mailerq.rules.reports import Suppressed
from mailerq.rules.row import SUPPRESSED, SUPPRESSION, Row, compared, suppressible

if TYPE_CHECKING:
    from mailerq.net.worker import Worker
    from mailerq.outbound.keeper import Keeper

__all__ = ["ORIGIN", "Suppressor"]

log = logging.getLogger("mailerq.delivery")

ORIGIN: Final = "reports"
"""The origin of the rows, and who makes them in the audit file."""

WAIT_SECONDS: Final = 5.0
"""How long the reply to a report waits for the row."""

RETRY_SECONDS: Final = 10.0

MAX_WAITING: Final = 100_000
"""Recipients that wait for rows that cannot be written now."""


class Suppressor:
    """Writes suppressions. `run` is a task of the home worker; `suppress` is for any worker."""

    def __init__(
        self,
        keeper: Keeper,
        home: Worker,
        *,
        clock: Callable[[], float] = time.time,
        shared: Callable[[], bool] = lambda: False,
    ) -> None:
        """`shared` says whether the rows are for all instances of a cluster."""
        self._keeper = keeper
        self._home = home
        self._clock = clock
        self._shared = shared
        self._waiting: dict[str, str] = {}
        """Reasons by recipient, in the form that rows have."""
        self._callers: list[Callable[[], object]] = []
        self._something = trio.Event()
        self._failing = False
        self._say_unwritten = Ration(log.error, 1, "they could not be written %d times more")

    async def suppress(self, found: Sequence[Suppressed]) -> None:
        """Suppress recipients. Returns when that is durable, or cannot be soon."""
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()
        self._home.call(self._add, list(found), partial(_wake, token, done))
        with trio.move_on_after(WAIT_SECONDS):
            await done.wait()

    def _add(self, found: Sequence[Suppressed], done: Callable[[], object]) -> None:
        for each in found:
            try:
                address = suppressible(each.address)
            except RowError:  # no address: mail to it has no need of a row
                continue
            if len(self._waiting) < MAX_WAITING and not self._is_suppressed(address):
                self._waiting.setdefault(address, each.reason)
        if self._failing or not self._waiting:
            done()
        else:
            self._callers.append(done)
        self._something.set()

    def _is_suppressed(self, address: str) -> bool:
        rows = self._keeper.rows
        if rows is None:
            return False
        try:
            mailbox = parse_mailbox(address)
        except AddressError:
            return False
        return rows.suppression(compared(mailbox), mailbox.domain) is not None

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            while not self._waiting:
                self._something = trio.Event()
                await self._something.wait()
            callers, self._callers = self._callers, []
            try:
                await self._write()
            except (OSError, RowError) as error:
                self._failing = True
                self._say_unwritten("recipients cannot be suppressed now: %s", error)
            else:
                self._failing = False
            finally:
                for done in callers:
                    done()
            if self._failing:
                await trio.sleep(RETRY_SECONDS)

    async def _write(self) -> None:
        by_reason: dict[str, list[str]] = {}
        for address, reason in self._waiting.items():
            by_reason.setdefault(reason, []).append(address)
        for reason, addresses in by_reason.items():
            code, status, description = SUPPRESSED
            row = Row(
                kind=SUPPRESSION,
                origin=ORIGIN,
                code=code,
                status=status,
                description=f"{description}: {reason}",
                reason=reason,
            )
            await self._keeper.add(row, addresses, who=ORIGIN, shared=self._shared())
            for address in addresses:
                self._waiting.pop(address, None)


def _wake(token: trio.lowlevel.TrioToken, done: trio.Event) -> None:
    """Wake a caller on its own worker, which may have ended."""
    with suppress(trio.RunFinishedError):
        token.run_sync_soon(done.set)
