"""The end of a turn: each callback runs once, and trio does not sleep over its effects."""

from __future__ import annotations

import math
import queue
from collections.abc import Awaitable, Callable
from typing import Any

import outcome
import pytest
import trio
import trio.testing

from mailerq.turns import EndOfTurn

Run = Callable[[Callable[[], Awaitable[None]]], None]


def run_in_a_host(main: Callable[[], Awaitable[None]]) -> None:
    """Run trio as a guest of a small loop."""
    jobs: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
    results: list[outcome.Outcome[None]] = []
    trio.lowlevel.start_guest_run(
        main, run_sync_soon_threadsafe=jobs.put, done_callback=results.append
    )
    while not results:
        jobs.get(timeout=10)()
    results[0].unwrap()


RUNS = pytest.mark.parametrize("run", [trio.run, run_in_a_host])


async def turns(count: int) -> None:
    for _ in range(count):
        await trio.lowlevel.checkpoint()


async def test_callbacks_run_once_in_their_order_when_all_tasks_had_their_turn() -> None:
    end, happened = EndOfTurn.of_this_loop(), []

    def note(what: str) -> Callable[[bool], bool]:
        def called(_: bool) -> bool:
            happened.append(what)
            return False

        return called

    async def task() -> None:
        await turns(1)
        happened.append("task")
        end.call(note("callback"))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(task)
    await turns(3)
    assert happened == 3 * ["task"] + 3 * ["callback"]


async def test_callbacks_after_the_others_run_once_when_the_others_of_the_turn_have_run() -> None:
    end, happened = EndOfTurn.of_this_loop(), []

    def note(what: str) -> Callable[[bool], bool]:
        def called(_: bool) -> bool:
            happened.append(what)
            if what == "again":
                end.call_after(note("after"))
            return False

        return called

    end.call_after(note("again"))
    end.call(note("call"))
    await turns(1)
    end.call(note("next"))
    await turns(3)
    assert happened == ["call", "again", "next", "after"]


@RUNS
def test_a_callback_after_the_others_keeps_the_loop_awake_for_its_effects(run: Run) -> None:
    async def main() -> None:
        end, ready = EndOfTurn.of_this_loop(), trio.Event()

        def wake(_: bool) -> bool:
            ready.set()
            return True

        def register(_: bool) -> bool:
            end.call_after(wake)
            return False

        end.call_after(register)
        with trio.fail_after(5):
            await ready.wait()

    run(main)


async def test_a_loop_has_one_instance() -> None:
    end = EndOfTurn.of_this_loop()
    assert EndOfTurn.of_this_loop() is end
    others = await trio.to_thread.run_sync(trio.run, of_another_loop)
    assert others is not end


async def of_another_loop() -> EndOfTurn:
    return EndOfTurn.of_this_loop()


async def test_a_callback_learns_whether_the_loop_is_idle() -> None:
    end, seen, ready = EndOfTurn.of_this_loop(), [], trio.Event()

    def note(idle: bool) -> bool:
        seen.append(idle)
        ready.set()
        return True

    end.call(note)
    await turns(2)
    assert seen == [False]
    ready = trio.Event()
    end.call(note)
    await ready.wait()
    assert seen == [False, True]


async def test_a_failure_is_logged_and_keeps_no_other_callback_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    end, called = EndOfTurn.of_this_loop(), []

    def fail(_: bool) -> bool:
        raise ZeroDivisionError("a defect")

    for _ in range(2):
        end.call(fail)
        end.call(lambda _: bool(called.append(1)))
        await turns(2)
    assert called == [1, 1]
    failures = [record.exc_info for record in caplog.records]
    assert [failure and failure[0] for failure in failures] == 2 * [ZeroDivisionError]


@RUNS
def test_a_task_made_ready_by_a_callback_runs_at_once(run: Run) -> None:
    async def main() -> None:
        end, ready = EndOfTurn.of_this_loop(), trio.Event()

        def wake(_: bool) -> bool:
            ready.set()
            return True

        for _ in range(3):
            ready = trio.Event()
            end.call(wake)
            with trio.fail_after(5):
                await ready.wait()

    run(main)


@RUNS
def test_a_task_made_ready_by_a_failing_callback_runs_at_once(run: Run) -> None:
    async def main() -> None:
        ready = trio.Event()

        def wake(_: bool) -> bool:
            ready.set()
            raise ZeroDivisionError

        EndOfTurn.of_this_loop().call(wake)
        with trio.fail_after(5):
            await ready.wait()

    run(main)


@RUNS
def test_a_callback_registered_by_a_callback_runs_at_the_end_of_the_next_turn(run: Run) -> None:
    async def main() -> None:
        end, ready, left = EndOfTurn.of_this_loop(), trio.Event(), 3

        def again(_: bool) -> bool:
            nonlocal left
            left -= 1
            if left:
                end.call(again)
                return False
            ready.set()
            return True

        end.call(again)
        with trio.fail_after(5):
            await ready.wait()

    run(main)


@RUNS
def test_last_callbacks_follow_what_the_next_turn_registers_and_the_loop_does_not_sleep(
    run: Run,
) -> None:
    async def main() -> None:
        end, happened, idle = EndOfTurn.of_this_loop(), [], []

        async def write() -> None:
            happened.append("written")
            end.call(lambda _: bool(happened.append("left")))

        def last(sleeps: bool) -> bool:
            happened.append("last")
            idle.append(sleeps)
            done.set()
            return True

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                done = trio.Event()
                end.call_last(last)
                nursery.start_soon(write)
                with trio.fail_after(5):
                    await done.wait()
        assert happened == 3 * ["written", "left", "last"]
        assert idle == 3 * [False]

    run(main)


@RUNS
def test_last_callbacks_of_turns_in_a_row_all_run(run: Run) -> None:
    async def main() -> None:
        end, called, done = EndOfTurn.of_this_loop(), 0, trio.Event()

        def last(_: bool) -> bool:
            nonlocal called
            called += 1
            if called == 5:
                done.set()
            return True

        for _ in range(4):
            end.call_last(last)
            await turns(1)
        end.call_last(last)
        with trio.fail_after(5):
            await done.wait()

    run(main)


def is_attached(end: EndOfTurn) -> bool:
    """Whether trio calls it; trio raises KeyError for an instrument that it does not have."""
    instrument: Any = end
    try:
        trio.lowlevel.remove_instrument(instrument)
    except KeyError:
        return False
    trio.lowlevel.add_instrument(instrument)
    return True


async def test_nothing_is_attached_to_the_loop_before_the_first_call() -> None:
    end = EndOfTurn.of_this_loop()
    end.leave()
    assert not is_attached(end)
    end.call(lambda _: False)
    await turns(3)
    assert is_attached(end)


async def test_who_leaves_waits_for_what_is_registered_and_may_come_back() -> None:
    end, called = EndOfTurn.of_this_loop(), []
    for count, call in enumerate((end.call, end.call_last, end.call), 1):
        call(lambda _: bool(called.append(1)))
        end.leave()
        await turns(3)
        assert len(called) == count
        assert not is_attached(end)


async def test_who_leaves_waits_for_what_callbacks_register() -> None:
    end, left = EndOfTurn.of_this_loop(), 3

    def again(_: bool) -> bool:
        nonlocal left
        left -= 1
        if left:
            end.call(again)
        return False

    end.call(again)
    end.leave()
    await turns(5)
    assert left == 0
    assert not is_attached(end)


async def test_a_loop_without_work_sleeps(autojump_clock: trio.testing.MockClock) -> None:
    """The clock jumps only when trio would sleep."""
    EndOfTurn.of_this_loop().call(lambda _: False)
    EndOfTurn.of_this_loop().call_last(lambda _: False)
    with trio.move_on_after(1000) as scope:
        await trio.sleep(math.inf)
    assert scope.cancelled_caught
