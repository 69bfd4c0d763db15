"""Actions of patterns as rows: two processes, an operator, and the end of a row's time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from mailerq.config import Config
from mailerq.errors import RowError
from mailerq.outbound.keeper import Keeper
from mailerq.outbound.kept import REACTION, KeptActions
from mailerq.outbound.limits import Limits
from mailerq.outbound.refusals import Action, Refusals, Scope, react
from mailerq.rules import responses
from mailerq.rules.answers import Answers, Rule, Trigger
from mailerq.rules.reactions import Reaction
from mailerq.rules.recovery import Recovery, Stage
from mailerq.rules.row import Row
from mailerq.rules.shaping import Shaping
from mailerq.store.row_file import RowFile
from mailerq.wire.client import Refused, Step
from mailerq.wire.smtp import Reply

HOST = SimpleNamespace(name="mx.big.test")
SITE: Any = SimpleNamespace(key=b"key", label="d.test", group="", hosts=(HOST,), flows={})
PROVIDER = "[[provider]]\nname = 'big'\nmx = ['.big.test']\n"
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
        file = directory / "limits.toml"
        file.write_text(PROVIDER)
        self.limits = Limits(Shaping.of(Config(limits_file=str(file))))
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

    def hear(self, reaction: Reaction, trigger: Trigger = Trigger()) -> None:  # noqa: B008
        """A host of the provider refuses a message."""
        rule = Rule(name="rule", where="f:1", kind="", trigger=trigger, reaction=reaction)
        self.refusals.answers = Answers([rule])
        flow: Any = SimpleNamespace(local_ip="192.0.2.1", beside=(), site=SITE)
        self.refusals.heard(flow, responses.refused(Refused(Step.RCPTTO, Reply(421, "no"))))

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


async def operator_of_a_pause(
    both: list[Process], directory: Path, clock: Clock
) -> tuple[RowFile, Row]:
    """Pause for an hour in both processes; return the file as a command opens it, and the row."""
    both[0].pause(NOW)
    await until(both, lambda each: each.until() == NOW + HOUR)
    (row,) = both[0].keeper.table
    file = RowFile(str(directory), clock=clock)
    file.read()
    return file, row


async def test_an_operator_prolongs_and_ends_an_action(tmp_path: Path) -> None:
    clock = Clock()
    async with processes(tmp_path, clock) as both:
        file, row = await operator_of_a_pause(both, tmp_path, clock)
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


async def test_what_is_lowered_behind_a_pause_is_kept_too(tmp_path: Path) -> None:
    clock = Clock()
    async with processes(tmp_path, clock) as both:
        both[0].hear(Reaction(pause=600.0, max_connections=1, messages_per_minute=1, lasts=5400.0))
        await until(both, lambda each: each.until() == NOW + 5400)
        assert both[1].refusals.actions[SCOPE].recovery.until == NOW + 600
    clock.now += 900
    async with processes(tmp_path, clock) as both:
        await until(both, lambda each: len(each.keeper.table) == 1)
        for each in both:
            each.refusals.advance()
            bounds = each.refusals.adjusted({}, *SCOPE)
            assert "paused" not in bounds
            assert (bounds["messages-per-minute"].value, bounds["max-connections"].value) == (1, 1)


async def test_what_is_left_behind_a_pause_is_prolonged_and_not_the_pause(tmp_path: Path) -> None:
    clock = Clock()
    async with processes(tmp_path, clock) as both:
        both[0].hear(Reaction(pause=600.0, max_connections=1, lasts=5400.0))
        await until(both, lambda each: each.until() == NOW + 5400)
        clock.now += 900
        for each in both:
            each.refusals.advance()
        (row,) = both[0].keeper.table
        file = RowFile(str(tmp_path), clock=clock)
        file.read()
        file.change(row.id, who="operator", until=NOW + 2 * HOUR)
        await until(both, lambda each: each.until() == NOW + 2 * HOUR)
        for each in both:
            assert "paused" not in each.refusals.adjusted({}, *SCOPE) or each.refusals.advance()
            assert "paused" not in each.refusals.adjusted({}, *SCOPE)


async def test_a_pause_that_was_prolonged_holds_over_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    async with processes(tmp_path, clock) as both:
        both[0].hear(Reaction(pause=600.0))
        await until(both, lambda each: each.until() == NOW + 600)
        (row,) = both[0].keeper.table
        file = RowFile(str(tmp_path), clock=clock)
        file.read()
        file.change(row.id, who="operator", until=NOW + HOUR)
        await until(both, lambda each: each.until() == NOW + HOUR)
    clock.now += 900
    async with processes(tmp_path, clock) as both:
        await until(both, lambda each: each.until() == NOW + HOUR)
        for each in both:
            each.refusals.advance()
            assert each.refusals.actions[SCOPE].recovery.stage is Stage.PAUSED


async def test_an_operator_has_an_action_last_until_it_is_removed(tmp_path: Path) -> None:
    clock = Clock()
    async with processes(tmp_path, clock) as both:
        file, row = await operator_of_a_pause(both, tmp_path, clock)
        file.change(row.id, who="operator", until=None)
        await until(both, lambda each: each.until() != NOW + HOUR)
        clock.now += 100 * HOUR
        await until(both, lambda each: len(each.keeper.table) == 1)
        for each in both:
            each.refusals.advance()
            assert each.refusals.actions[SCOPE].recovery.stage is Stage.PAUSED
        file.end([row.id], who="operator")
        await until(both, lambda each: each.until() is None)


async def test_a_change_while_the_row_is_written_is_not_lost(tmp_path: Path) -> None:
    async with processes(tmp_path, Clock()) as both:
        add = both[0].keeper.add

        async def add_slowly(row: Row, values: object = (), *, who: str) -> Row:
            added = await add(row, who=who)
            action.extend(NOW + 2 * HOUR, NOW)
            both[0].kept.keep(action)
            return added

        both[0].keeper.add = add_slowly  # type: ignore[method-assign]
        action = both[0].pause(NOW)
        await until(both, lambda each: each.until() == NOW + 2 * HOUR)
        assert [row.until for row in both[1].keeper.table] == [NOW + 2 * HOUR]


async def test_an_action_that_cannot_be_kept_does_not_hold_up_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mailerq.outbound.kept.RETRY_SECONDS", 0.01)
    async with processes(tmp_path, Clock()) as both:
        scope = Scope(f"provider {'x' * 2000}", "192.0.2.1")
        recovery = Recovery(stage=Stage.PAUSED, until=NOW + HOUR)
        both[0].kept.keep(Action(scope, "x" * 2000, "rule", "f:1", NOW, "421 no", recovery))
        both[0].pause(NOW)
        await until(both, lambda each: each.until() == NOW + HOUR)


async def test_recipients_that_come_all_the_time_do_not_hold_up_actions(tmp_path: Path) -> None:
    async with processes(tmp_path, Clock()) as both:
        add, count = both[0].keeper.add, 0

        async def add_and_more(row: Row, values: Iterable[str] = (), *, who: str) -> Row:
            nonlocal count
            if count < 100:
                count += 1
                both[0].kept.suppress(f"c{count}@d.test", "gone", responses.NO_DATA)
            return await add(row, values, who=who)

        both[0].keeper.add = add_and_more  # type: ignore[method-assign]
        both[0].kept.suppress("c@d.test", "gone", responses.NO_DATA)
        await until(both, lambda each: both[0].keeper.statistics()["suppressed"] > 0)
        both[0].pause(NOW)
        await until(both[1:], lambda each: each.until() == NOW + HOUR)
        assert count < 50


async def test_a_suppression_is_written_later_if_the_file_cannot_be_changed_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mailerq.outbound.kept.RETRY_SECONDS", 0.01)
    async with processes(tmp_path, Clock()) as both:
        add, failures = both[0].keeper.add, 3

        async def add_later(row: Row, values: Iterable[str] = (), *, who: str) -> Row:
            nonlocal failures
            if failures:
                failures -= 1
                raise RowError("another process keeps the lock")
            return await add(row, values, who=who)

        both[0].keeper.add = add_later  # type: ignore[method-assign]
        strange = responses.refused(Refused(Step.RCPTTO, Reply(550, "5.1.1234 gone")))
        for recipient in ("c@d.test", "no address"):
            both[0].kept.suppress(recipient, "gone", strange)
        await until(both, lambda each: each.keeper.statistics()["suppressed"] == 1)
        assert not failures


async def test_a_probe_that_is_refused_at_once_pauses_without_a_trigger(tmp_path: Path) -> None:
    clock = Clock()
    process = Process(tmp_path, clock)
    pause = Reaction(pause=600.0, max_pause=HOUR)
    for _ in range(3):
        process.hear(pause, Trigger(3, HOUR))
    assert process.until() == NOW + 600
    clock.now += 600
    process.hear(pause, Trigger(3, HOUR))
    assert process.until() == NOW + 600 + 1200


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
