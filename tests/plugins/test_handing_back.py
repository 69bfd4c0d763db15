"""Every callback, every way of handing back, every decision, one to three plugins deep."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import product
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from mailerq.message import Message
from mailerq.plugins import Connection, Context, Plugins, Reject
from tests.plugins.kit import Calls, Scripted, connected, names

MESSAGE = {"envelope": "a@b.test", "recipient": "c@d.test"}

EVENTS: dict[str, Callable[[Connection], Awaitable[object]]] = {
    "connect": lambda connection: connection.connect(),
    "secure": lambda connection: connection.secured(),
    "authenticate": lambda connection: connection.authenticate("ann", "secret"),
    "mailfrom": lambda connection: connection.mailfrom(""),
    "rcptto": lambda connection: connection.rcptto("a@b.test"),
    "data": lambda connection: connection.data(b"Subject: x\r\n\r\nx\r\n"),
    "message": lambda connection: connection.message(Message(dict(MESSAGE), b"x")),
    "close": lambda connection: connection.close(),
    "out_data": lambda connection: connection.out_data(Message(dict(MESSAGE), b"x")),
    "out_sent": lambda connection: connection.out_sent(Message(dict(MESSAGE), b"x")),
}

NOT_REJECTABLE = {"context_initialize", "context_cleanup", "close", "out_sent"}

DECISIONS = ["f"] + [how + decision for how, decision in product("ntwep", "cxr")]


def expected(event: str, scripts: tuple[str, ...], count: int) -> tuple[str, Reject | None]:
    """The model: which plugins are called, in which order, and what comes of it."""
    words = [script.split() for script in scripts] + [[]] * count
    order, position = "", 0
    while position < count:
        order += "abc"[position]
        word = words[position].pop(0) if words[position] else "f"
        decision = "c" if word[0] == "f" else word[1]
        if decision == "r":
            position = 0
        elif "!" in word and event not in NOT_REJECTABLE:
            return order, Reject(550, "5.7.1 Told to")
        elif decision == "x":
            break
        else:
            position += 1
    return order, None


async def run_context(
    plugins: Plugins, scripted: Scripted, calls: Calls, event: str, scripts: tuple[str, ...]
) -> str:
    """Order of the calls of a context event."""
    if event == "context_initialize":
        scripted.script(*scripts)
    context = await plugins.open_context(1)
    order = names(calls.take())
    scripted.script(*(scripts if event == "context_cleanup" else ()))
    await context.close()
    cleanup = names(calls.take())
    return order if event == "context_initialize" else cleanup


PLACES = [(depth, place) for depth in (1, 2, 3) for place in range(depth)]


@pytest.mark.parametrize(("depth", "place"), PLACES)
async def test_every_callback_with_every_decision(
    tmp_path: Path, calls: Calls, depth: int, place: int
) -> None:
    scripted = Scripted(tmp_path, depth)
    async with connected(tmp_path) as (plugins, _, connection):
        calls.take()
        for decision, event in product([*DECISIONS, *(word + "!" for word in DECISIONS)], EVENTS):
            # One plugin decides; the others let the event pass, on each round.
            scripts = ("",) * place + (decision,)
            scripted.script(*scripts)
            answer = await EVENTS[event](connection)
            order = calls.take()
            assert (names(order), answer) == expected(event, scripts, depth), (event, decision)
            assert all(line.split()[1] == event for line in order)
        for warning in calls.take_warnings():
            assert "mq_smtp_in_close is too late" in warning or "out_sent is too late" in warning
        for decision, event in product(DECISIONS, ["context_initialize", "context_cleanup"]):
            scripts = ("",) * place + (decision,)
            order = await run_context(plugins, scripted, calls, event, scripts)
            assert order == expected(event, scripts, depth)[0], (event, decision)
    assert calls.take_warnings() == []


WORDS = st.lists(
    st.builds(str.__add__, st.sampled_from(DECISIONS), st.sampled_from(["", "", "", "!"])),
    max_size=6,
).map(" ".join)


async def test_random_scripts_behave_as_the_model(tmp_path: Path, calls: Calls) -> None:
    scripted = Scripted(tmp_path, 3)
    async with connected(tmp_path) as (_, context, _):
        await check_random_scripts(context, scripted, calls)


async def check_random_scripts(context: Context, scripted: Scripted, calls: Calls) -> None:
    # hypothesis calls a plain function, so the examples are drawn first and then run.
    examples: list[tuple[str, tuple[str, ...]]] = []

    @settings(max_examples=150, database=None)
    @given(st.sampled_from(sorted(EVENTS)), st.tuples(WORDS, WORDS, WORDS))
    def draw(event: str, scripts: tuple[str, ...]) -> None:
        examples.append((event, scripts))

    draw()
    for event, scripts in examples:
        connection = context.connection(-1)
        calls.take()
        scripted.script(*scripts)
        answer = await EVENTS[event](connection)
        assert (names(calls.take()), answer) == expected(event, scripts, 3), (event, scripts)


async def test_hundreds_of_events_are_suspended_at_once(tmp_path: Path, calls: Calls) -> None:
    scripted = Scripted(tmp_path, 2)
    async with connected(tmp_path) as (_, context, _):
        answers: list[object] = []

        async def session() -> None:
            connection = context.connection(-1)
            answers.append(await connection.rcptto("a@b.test"))
            await connection.close()

        async with trio.open_nursery() as nursery:
            scripted.script("kc " * 500)
            for _ in range(500):
                nursery.start_soon(session)
            await scripted.wait_kept("a", 500)
            assert answers == []
            assert context.live["events"] == 500
            calls.take()
            scripted.release("a", "c")
        assert answers == [None] * 500
        # In the order of the hand-backs each was offered to the next plugin.
        order = calls.take()
        assert order.count("b rcptto") == 500


async def test_threads_hand_back_hundreds_of_events_from_all_plugins(
    tmp_path: Path, calls: Calls
) -> None:
    scripted = Scripted(tmp_path, 3)
    async with connected(tmp_path) as (_, context, _):
        answers: list[object] = []

        async def session() -> None:
            connection = context.connection(-1)
            answers.append(await connection.rcptto("a@b.test"))

        calls.take()
        scripted.script(*["pc " * 300] * 3)
        async with trio.open_nursery() as nursery:
            for _ in range(300):
                nursery.start_soon(session)
        assert answers == [None] * 300
        order = names(calls.take())
        assert sorted(order) == sorted("abc" * 300)


async def test_only_its_own_session_waits(tmp_path: Path, calls: Calls) -> None:
    scripted = Scripted(tmp_path, 1)
    async with connected(tmp_path) as (_, context, connection):
        scripted.script("kc")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.rcptto, "a@b.test")
            await scripted.wait_kept("a")
            other = context.connection(-1)
            assert await other.rcptto("c@d.test") is None
            await other.close()
            scripted.release("a", "c")


async def test_close_comes_after_the_hand_back(tmp_path: Path, calls: Calls) -> None:
    scripted = Scripted(tmp_path, 2)
    async with connected(tmp_path) as (_, _, connection):
        scripted.script("kc")
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.rcptto, "a@b.test")
                await scripted.wait_kept("a")
                calls.take()
                scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.close)
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            assert calls.take() == []
            scripted.release("a", "c")
        # Nobody wants to know about the recipient any more: "b" is not asked.
        assert calls.take() == ["a close", "b close"]
    assert calls.take_warnings() == []


async def test_a_cancelled_event_ends_with_its_hand_back(tmp_path: Path, calls: Calls) -> None:
    scripted = Scripted(tmp_path, 1)
    async with connected(tmp_path) as (_, context, connection):
        scripted.script("kc")
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.rcptto, "a@b.test")
                await scripted.wait_kept("a")
                scope.cancel()
        assert context.live["events"] == 1
        with pytest.raises(RuntimeError, match="still going on"):
            connection.mailfrom("x@y.test")
        scripted.release("a", "c")
        with trio.fail_after(60):
            while context.live["events"]:
                await trio.lowlevel.checkpoint()
        assert await connection.mailfrom("x@y.test") is None
