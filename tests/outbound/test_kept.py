"""Actions of patterns as rows: two processes, an operator, and the end of a row's time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from mailerq.config import Config
from mailerq.outbound.keeper import Keeper
from mailerq.outbound.kept import REACTION, KeptActions
from mailerq.outbound.limits import Limits
from mailerq.outbound.refusals import Action, Refusals, Scope, react
from mailerq.rules.answers import Answers
from mailerq.rules.reactions import Reaction
from mailerq.rules.recovery import Recovery, Stage
from mailerq.rules.shaping import Shaping
from mailerq.store.row_file import RowFile

SCOPE = Scope("provider big", "192.0.2.1")
NOW = 1_767_268_800.0
HOUR = 3600.0


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


class Process:
    """What keeps the actions of one process."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.limits = Limits(Shaping.of(Config()))
        self.keeper = Keeper(str(directory), self.changed, clock=clock)
        self.kept = KeptActions(self.keeper, clock=clock)
        self.limits.refusals = Refusals(Answers([]), self.limits, self.kept, clock=clock)

    def changed(self, rows: object) -> None:
        self.kept.follow(self.keeper.table, self.limits.refusals)

    @property
    def refusals(self) -> Refusals:
        assert self.limits.refusals is not None
        return self.limits.refusals

    def pause(self, now: float, seconds: float = HOUR) -> Action:
        recovery = Recovery()
        recovery.refuse(Reaction(pause=seconds), now, connections=1, most=0)
        action = Action(SCOPE, "big from 192.0.2.1", "rule", "f:1", now, "421 no", recovery, hits=1)
        self.refusals.adopt(action)
        self.kept.keep(action)
        return action

    def until(self) -> float | None:
        action = self.refusals.actions.get(SCOPE)
        return None if action is None else action.until


@asynccontextmanager
async def processes(directory: Path, clock: Clock) -> AsyncIterator[list[Process]]:
    both = [Process(directory, clock) for _ in range(2)]
    async with trio.open_nursery() as nursery:
        for each in both:
            await each.keeper.open()
            nursery.start_soon(each.kept.run)
        yield both
        nursery.cancel_scope.cancel()


async def until(both: list[Process], condition: Callable[[Process], bool]) -> None:
    with trio.fail_after(20):
        while not all(map(condition, both)):
            for each in both:
                await each.keeper.look()
            await trio.lowlevel.checkpoint()


async def test_what_one_process_hears_holds_in_all(tmp_path: Path) -> None:
    async with processes(tmp_path, Clock()) as both:
        both[0].pause(NOW)
        await until(both, lambda each: each.until() == NOW + HOUR)
        bounds = both[1].refusals.adjusted({}, *SCOPE)
        assert (bounds["paused"].value, bounds["max-connections"].value) == (NOW + HOUR, 1)
        (row,) = both[1].keeper.table
        assert (row.kind, row.provider, row.local_ip) == (REACTION, "big", "192.0.2.1")
        both[0].refusals.cancel(SCOPE)
        await until(both, lambda each: each.until() is None and not each.keeper.table)


async def test_an_operator_prolongs_and_ends_an_action(tmp_path: Path) -> None:
    clock = Clock()
    async with processes(tmp_path, clock) as both:
        both[0].pause(NOW)
        await until(both, lambda each: each.until() == NOW + HOUR)
        (row,) = both[0].keeper.table
        file = RowFile(str(tmp_path), clock=clock)
        file.read()
        file.change(row.id, who="operator", until=NOW + 2 * HOUR)
        await until(both, lambda each: each.until() == NOW + 2 * HOUR)
        assert both[0].refusals.actions[SCOPE].recovery.stage is Stage.PAUSED
        file.end([row.id], who="operator")
        await until(both, lambda each: each.until() is None)


async def test_after_the_time_of_its_row_an_action_probes(tmp_path: Path) -> None:
    clock = Clock()
    async with processes(tmp_path, clock) as both:
        both[0].pause(NOW)
        await until(both, lambda each: each.until() == NOW + HOUR)
        clock.now += HOUR + 1
        await until(both, lambda each: not each.keeper.table)
        for each in both:
            each.refusals.advance()
            assert each.refusals.actions[SCOPE].recovery.stage is Stage.PROBING
            assert "paused" not in each.refusals.adjusted({}, *SCOPE)


async def test_two_processes_that_hear_the_same_leave_no_row_behind(tmp_path: Path) -> None:
    async with processes(tmp_path, Clock()) as both:
        for each in both:
            each.pause(NOW)
        await until(both, lambda each: bool(each.keeper.table) and each.until() == NOW + HOUR)
        for each in both:
            each.refusals.cancel(SCOPE)
        await until(both, lambda each: each.until() is None and not each.keeper.table)


async def test_patterns_that_come_with_a_reload_find_what_was_kept(tmp_path: Path) -> None:
    async with processes(tmp_path, Clock()) as both:
        both[0].pause(NOW)
        await until(both, lambda each: each.until() == NOW + HOUR)
        process = both[1]
        react(process.limits, None, process.kept)
        process.changed(None)
        react(process.limits, Answers([]), process.kept)
        process.changed(None)
        assert process.until() == NOW + HOUR
