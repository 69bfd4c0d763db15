"""Keeps what patterns have done as rows, beside those of the operator.

Theory of operation
-------------------
Each `Action` of `Refusals` is a row of the kind `REACTION`: its scope, its pattern as the origin,
since when, until when, a reply and the state of its recovery. So the actions of all processes are
listed by ``mailerq rows list``, and hold in all processes and over restarts.

Whoever changes a row changes the action: without its row an action is over, and with a later end
its pause is longer. A row that has ended by its own time leaves its action, which probes then.

Rows are written by one task, the last state of each scope once. What this task has written comes
back with the next `follow`, and changes nothing.

Everything here runs on the home worker.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import trio

from mailerq.address import parse_domain
from mailerq.errors import AddressError, RowError
from mailerq.net.logs import Ration
from mailerq.outbound.refusals import Action, Scope
from mailerq.rules.recovery import Recovery
from mailerq.rules.row import SUPPRESSED, SUPPRESSION, Row, is_status, suppressible

if TYPE_CHECKING:
    from mailerq.outbound.keeper import Keeper
    from mailerq.outbound.refusals import Refusals
    from mailerq.rules.responses import Outcome

__all__ = ["REACTION", "KeptActions"]

log = logging.getLogger("mailerq.delivery")

REACTION: Final = "reaction"
"""The kind of the rows."""

WHO: Final = "mailerq"
"""Who makes the rows, in the audit file."""

ENDLESS_SECONDS: Final = 10 * 365 * 86400.0
"""How long an action lasts whose row has no end."""

RETRY_SECONDS: Final = 10.0
"""When a row that could not be written is written again."""


class KeptActions:
    """The rows of actions. `run` writes them."""

    def __init__(self, keeper: Keeper, *, clock: Callable[[], float] = time.time) -> None:
        self._keeper = keeper
        self._clock = clock
        self._rows: dict[Scope, list[Row]] = {}
        """The rows of each scope, as the file has them; two processes may have made one each."""
        self._told: Refusals | None = None
        self._due: dict[Scope, Action | None] = {}
        """What is to be written; None: no row any more."""
        self._recipients: dict[str, dict[str, Outcome]] = {}
        """Recipients to be suppressed, by the pattern that says so."""
        self._something = trio.Event()
        self._say_unwritten = Ration(log.error, 1, "they could not be written %d times more")

    # What refusals tell

    def keep(self, action: Action) -> None:
        self._due[action.scope] = action
        self._something.set()

    def drop(self, action: Action) -> None:
        self._due[action.scope] = None
        self._something.set()

    def suppress(self, recipient: str, rule: str, outcome: Outcome) -> None:
        self._recipients.setdefault(rule, {})[recipient] = outcome
        self._something.set()

    # What the file says

    def follow(self, rows: Iterable[Row], refusals: Refusals | None) -> None:
        """Take over what others have changed: other processes, and operators."""
        if self._told is not refusals:
            self._told, self._rows = refusals, {}
        before, self._rows = self._rows, {}
        for row in rows:
            if row.kind == REACTION:
                self._rows.setdefault(_scope_of(row), []).append(row)
        if refusals is None:
            return
        now = self._clock()
        for scope, found in self._rows.items():
            row = found[-1]
            known = before.get(scope)
            if scope in self._due or (known is not None and _same(row, known[-1])):
                continue  # as this process has written it, or is about to
            if (action := _action_of(row, now)) is not None:
                refusals.adopt(action)
        for scope, found in before.items():
            if scope not in self._rows and scope not in self._due and not found[-1].is_over(now):
                refusals.cancel(scope)

    # Writing

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            while not (self._due or self._recipients):
                self._something = trio.Event()
                await self._something.wait()
            # In turn: there may be recipients all the time, or an action that cannot be written.
            written = [await self._try(self._write_first), await self._try(self._write_some)]
            if not all(written):
                await trio.sleep(RETRY_SECONDS)

    async def _try(self, write: Callable[[], Awaitable[None]]) -> bool:
        try:
            await write()
        except (OSError, RowError) as error:
            self._say_unwritten("what a pattern says cannot be kept: %s", error)
            return False
        return True

    async def _write_first(self) -> None:
        if self._due:
            scope, action = next(iter(self._due.items()))
            try:
                await self._write(scope, action)
            except (OSError, RowError):
                self._due[scope] = self._due.pop(scope)  # the others come first
                raise

    async def _write_some(self) -> None:
        if self._recipients:
            await self._write_recipients(*self._recipients.popitem())

    async def _write_recipients(self, rule: str, recipients: dict[str, Outcome]) -> None:
        """Suppress recipients; the reply to one of them is the reason of all."""
        outcome = next(iter(recipients.values()))
        code, status = outcome.code or 0, outcome.status or ""
        row = Row(
            kind=SUPPRESSION,
            origin=rule,
            code=code if 500 <= code <= 599 else SUPPRESSED[0],
            status=status if is_status(status) and status.startswith("5") else SUPPRESSED[1],
            description=outcome.description or "",
            sample=outcome.reply,
        )
        names = []
        for recipient in recipients:
            with suppress(RowError):  # no address: mail to it has no need of a row
                names.append(suppressible(recipient))
        try:
            if names:
                await self._keeper.add(row, names, who=WHO)
        except (OSError, RowError):
            self._recipients[rule] = {**recipients, **self._recipients.get(rule, {})}
            raise

    async def _write(self, scope: Scope, action: Action | None) -> None:
        rows = self._rows.get(scope, [])
        wanted = None if action is None else _row_of(action)
        if wanted is None:
            if rows:
                await self._keeper.end([row.id for row in rows], who=WHO, why="recovered")
        elif not rows:
            await self._keeper.add(wanted, who=WHO)
        else:
            await self._keeper.change(
                rows[-1].id, who=WHO, until=wanted.until, origin=wanted.origin,
                reason=wanted.reason, sample=wanted.sample, values=wanted.values, hits=wanted.hits,
            )  # fmt: skip
        if self._due[scope] is not action:
            return  # there is something newer
        if action is None or wanted is None or _same(_row_of(action), wanted):
            del self._due[scope]  # and it has not changed meanwhile


def _row_of(action: Action) -> Row:
    place = action.label.partition(" from ")[0]
    provider, domain = place, ""
    if action.scope.key.startswith("site "):
        provider, domain = "", _domain(place)
    return Row(
        kind=REACTION,
        local_ip=action.scope.local_ip,
        provider=provider,
        domain=domain,
        since=action.since,
        until=action.until,
        origin=action.rule,
        reason=f"{action.label}: {action.where}",
        hits=action.hits,
        sample=action.sample,
        values={
            "key": action.scope.key,
            "label": action.label,
            "where": action.where,
            **action.recovery.to_dict(),
        },
    )


def _domain(label: str) -> str:
    """The label of a site if that is a domain."""
    try:
        return parse_domain(label)
    except AddressError:
        return ""


def _scope_of(row: Row) -> Scope:
    return Scope(str(row.values.get("key", "")), row.local_ip)


def _same(row: Row, other: Row) -> bool:
    """Whether two rows say the same of a scope."""
    return row.until == other.until and row.values == other.values


def _action_of(row: Row, now: float) -> Action | None:
    """The action of a row, with the end that the row has; None if the row makes no sense."""
    values: dict[str, Any] = dict(row.values)
    key, label, where = (str(values.pop(name, "")) for name in ("key", "label", "where"))
    try:
        recovery = Recovery.from_dict(values)
    except ValueError:
        return None
    action = Action(
        Scope(key, row.local_ip),
        label,
        row.origin,
        where,
        row.since,
        row.sample,
        recovery,
        row.hits,
    )
    until = now + ENDLESS_SECONDS if row.until is None else row.until
    if until != action.until:
        action.extend(until, now)
    return action if key else None
