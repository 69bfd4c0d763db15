"""Events that were given up: what they hold up, what they keep, and that no end overtakes them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import trio
import trio.testing

from mailerq.message import Message
from mailerq.plugins import (
    EACH_SECONDS,
    GIVEN_UP,
    MORE_SECONDS,
    NOTHING,
    Connection,
    Context,
    Plugins,
)
from tests.plugins.kit import Calls, Scripted, connected, opened


async def quiet() -> None:
    with trio.fail_after(5):
        await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize("decision", "cxr")
async def test_the_end_of_a_connection_is_told_after_the_hand_back(
    tmp_path: Path, calls: Calls, autojump_clock: trio.testing.MockClock, decision: str
) -> None:
    scripted = Scripted(tmp_path, 2)
    async with opened(tmp_path, timeout=1) as (_, context):
        connection = context.connection(-1)
        scripted.script("kc kc")
        assert await connection.rcptto("a@b.test") == GIVEN_UP
        assert await connection.rcptto("c@d.test") == GIVEN_UP
        calls.take()
        assert connection.close() is NOTHING  # nobody waits
        connection = context.connection(-1)  # of another connection nothing is told either
        await quiet()
        assert calls.take() == []
        scripted.release("a", decision)
        await quiet()
        assert calls.take() == ["a close", "b close"]
        assert context.live["events"] == 0
        await connection.close()
        assert calls.take() == ["a close", "b close"]


async def test_a_connection_that_closes_within_an_event_waits_only_until_that_is_given_up(
    tmp_path: Path, calls: Calls, autojump_clock: trio.testing.MockClock
) -> None:
    scripted = Scripted(tmp_path, 1)
    async with opened(tmp_path, timeout=100) as (_, context):
        connection = context.connection(-1)
        scripted.script("kc")
        with trio.move_on_after(10):
            await connection.rcptto("a@b.test")
        calls.take()
        await connection.close()
        assert trio.current_time() == pytest.approx(100)
        assert calls.take() == []
        scripted.release("a", "c")
        await quiet()
        assert calls.take() == ["a close"]


async def test_a_context_ends_after_the_late_ends_of_its_connections(
    tmp_path: Path, calls: Calls, autojump_clock: trio.testing.MockClock
) -> None:
    scripted = Scripted(tmp_path, 1)
    plugins = Plugins.load(str(tmp_path), timeout=100)
    context = await plugins.open_context()
    connection = context.connection(-1)
    scripted.script("kc kc")
    assert await connection.rcptto("a@b.test") == GIVEN_UP
    await connection.close()
    scripted.release("a", "c")
    await scripted.wait_kept("a")  # the close
    calls.take()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(context.close)
        await trio.sleep(50)
        assert calls.take() == []
        scripted.release("a", "c")
    assert calls.take() == ["a context_cleanup"]
    assert trio.current_time() == pytest.approx(150)


async def test_a_context_does_not_wait_for_what_is_never_handed_back(
    tmp_path: Path, calls: Calls, autojump_clock: trio.testing.MockClock
) -> None:
    scripted = Scripted(tmp_path, 1)
    plugins = Plugins.load(str(tmp_path), timeout=1)
    context = await plugins.open_context()
    connection = context.connection(-1)
    scripted.script("kc")
    assert await connection.rcptto("a@b.test") == GIVEN_UP
    await connection.close()
    calls.take()
    await context.close()
    assert calls.take() == ["a context_cleanup"]


async def test_what_is_kept_is_counted_until_it_is_handed_back(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    scripted = Scripted(tmp_path, 1)

    def kept(plugins: Plugins, event: str) -> tuple[float, float]:
        row = plugins.statistics()["a.so"][event]
        return row["kept"], row["kept_bytes"]

    async with connected(tmp_path, timeout=1) as (plugins, _, connection):
        scripted.script("kc kc kc")
        assert await connection.data(memoryview(b"x" * 1000 + b"\0")[:-1]) == GIVEN_UP
        assert await connection.data(b"y" * 10) == GIVEN_UP
        message = Message({"recipient": "a@b.test"}, b"z" * 100)
        assert await connection.message(message) == GIVEN_UP
        assert kept(plugins, "data") == (2, 1010)
        assert kept(plugins, "message") == (1, 100)
        scripted.release("a", "c")
        await quiet()
        assert kept(plugins, "data") == kept(plugins, "message") == (0, 0)


async def give_up_all(connection: Connection, count: int) -> None:
    for _ in range(count):
        assert await connection.rcptto("a@b.test") == GIVEN_UP


async def test_events_with_a_deadline_take_not_much_longer_in_sum(
    tmp_path: Path, calls: Calls, autojump_clock: trio.testing.MockClock
) -> None:
    scripted = Scripted(tmp_path, 1)
    async with connected(tmp_path, timeout=300) as (plugins, _, connection):
        connection.deadline = plugins.deadline()
        scripted.script("kc " * 100)
        await give_up_all(connection, 100)
        assert trio.current_time() == pytest.approx(300 + MORE_SECONDS)
        connection.deadline = math.inf
        scripted.script("kc")
        await give_up_all(connection, 1)
        assert trio.current_time() == pytest.approx(600 + MORE_SECONDS)
        scripted.release("a", "c")
        await quiet()
    warnings = calls.take_warnings()
    given_up = "a mq_smtp_in_rcptto was not handed back within 300 seconds"
    assert warnings[:101] == [f"{given_up}, all recipients; given up"] * 100 + [
        f"{given_up}; given up"
    ]


async def test_the_deadline_holds_for_the_whole_chain(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    scripted = Scripted(tmp_path, 2)
    async with connected(tmp_path, timeout=100) as (plugins, _, connection):
        connection.deadline = plugins.deadline()
        scripted.script("kc", "kc")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_up_all, connection, 1)
            await trio.sleep(80)
            scripted.release("a", "c")
        assert trio.current_time() == pytest.approx(100)
        scripted.release("b", "c")
        await quiet()


async def test_after_the_deadline_a_quick_answer_still_counts(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    scripted = Scripted(tmp_path, 1)

    async def answer() -> None:
        await scripted.wait_kept("a")
        await trio.sleep(EACH_SECONDS / 2)
        scripted.release("a", "c")

    async with connected(tmp_path, timeout=100) as (plugins, _, connection):
        connection.deadline = plugins.deadline()
        await trio.sleep(101)
        scripted.script("kc")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            assert await connection.rcptto("a@b.test") is None


async def test_a_deadline_holds_for_handlers_in_python(
    autojump_clock: trio.testing.MockClock,
) -> None:
    plugins = Plugins.load(None, timeout=100)

    async def sleep(connection: Connection, address: str) -> None:
        await trio.sleep_forever()

    plugins.on("rcptto", sleep)
    context: Context = await plugins.open_context()
    connection = context.connection(-1)
    connection.deadline = plugins.deadline()
    await give_up_all(connection, 50)
    assert trio.current_time() == pytest.approx(100 + MORE_SECONDS)
    await context.close()
