"""Hand-backs that are wrong, handles that are dead, exceptions, silence: contained and logged."""

from __future__ import annotations

import ctypes
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from mailerq.errors import PluginError
from mailerq.message import Message
from mailerq.plugins import GIVEN_UP, Connection, Context, Plugins, Reject
from tests.plugins.kit import (
    ROOT,
    SOURCES,
    Calls,
    Scripted,
    build,
    build_text,
    connected,
    install,
    opened,
)


@pytest.fixture
def abuse(tmp_path: Path) -> Path:
    """A directory with abuse.c in it, as "abuse" and, after it, as "later"."""
    plugin = build(SOURCES / "abuse.c", "-lpthread")
    return install(tmp_path, abuse=plugin, later=plugin)


def library(directory: Path, name: str = "abuse") -> ctypes.CDLL:
    return ctypes.CDLL(str(directory / f"{name}.so"))


NOT_IN_HANDS = "MQ_Continue: this event is not, or no longer, in the plugin's hands; ignored"


async def test_handing_back_twice_is_ignored(abuse: Path, calls: Calls) -> None:
    async with connected(abuse) as (_, _, connection):
        assert await connection.rcptto("twice") is None
    assert calls.take_warnings() == [f"abuse {NOT_IN_HANDS}", f"later {NOT_IN_HANDS}"]


async def test_handing_back_and_returning_false_is_ignored(abuse: Path, calls: Calls) -> None:
    async with connected(abuse) as (_, _, connection):
        assert await connection.rcptto("both") is None
    text = "mq_smtp_in_rcptto handed back and then returned false; the hand-back is ignored"
    assert calls.take_warnings() == [f"abuse {text}", f"later {text}"]


async def test_late_hand_back_never_touches_another_event(abuse: Path, calls: Calls) -> None:
    async with opened(abuse) as (_, context):
        first, second = context.connection(-1), context.connection(-1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.rcptto, "keep")
            await wait_suspended(context, 1)
            library(abuse).continue_kept()
            await wait_suspended(context, 1)
            stale = library(abuse, "later")
            stale.continue_kept()
        # Both handles are used up now. The next event takes the same place in memory.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(second.rcptto, "take")
            await wait_suspended(context, 1)
            library(abuse).continue_kept()
            stale.continue_kept()
            assert await first.rcptto("stale") is None
            assert context.live["events"] == 1
            library(abuse).continue_initial()
            await wait_suspended(context, 1)
            library(abuse, "later").continue_initial()
    assert calls.take_warnings() == [f"{name} {NOT_IN_HANDS}" for name in ("abuse", "later") * 2]


async def wait_suspended(context: Context, count: int) -> None:
    """Wait until nothing moves and so many events are suspended."""
    with trio.fail_after(5):
        await trio.testing.wait_all_tasks_blocked()
        assert context.live["events"] == count


async def test_a_plugin_cannot_hand_back_what_another_has(abuse: Path, calls: Calls) -> None:
    async with connected(abuse) as (_, context, connection):
        assert await connection.rcptto("keep and pass") is None
        assert context.live["events"] == 0
        library(abuse).continue_kept()
    assert calls.take_warnings() == [f"abuse {NOT_IN_HANDS}"]


async def test_context_of_the_start_hands_back_the_only_event(abuse: Path, calls: Calls) -> None:
    async with opened(abuse) as (_, context):
        connections = [context.connection(-1) for _ in range(2)]
        assert await connections[0].rcptto("initial") is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connections[0].rcptto, "take")
            nursery.start_soon(connections[1].rcptto, "keep")
            await wait_suspended(context, 2)
            library(abuse).continue_initial()
            assert calls.take_warnings() == [
                "abuse MQ_Continue with the context of mq_context_initialize: "
                "more than one of the plugin's events is suspended; nothing is resumed"
            ]
            library(abuse, "later").continue_initial()
            assert calls.take_warnings() == [
                "later MQ_Continue with the context of mq_context_initialize: "
                "none of the plugin's events is suspended; ignored"
            ]
            library(abuse).continue_kept()
            await wait_suspended(context, 2)  # one of them is with "later" now
            library(abuse).continue_initial()
            await wait_suspended(context, 2)
            library(abuse, "later").continue_kept()
            await wait_suspended(context, 1)
            library(abuse, "later").continue_initial()
    assert calls.take_warnings() == []


@pytest.mark.parametrize("how", ["garbage", "gone", "thread", "fd"])
async def test_dead_and_foreign_handles_do_nothing(abuse: Path, calls: Calls, how: str) -> None:
    async with connected(abuse) as (_, context, connection):
        ended = context.connection(-1)
        await ended.connect()
        await ended.message(Message({"recipient": "a@b.test"}, b"x"))
        await ended.close()
        del ended
        await connection.rcptto("make")
        await connection.rcptto("keep and pass")
        calls.take()
        assert await connection.rcptto(how) is None
        assert not connection.authenticated
        assert "data 1" not in str(calls.lines)
        wrong = 1 if how == "thread" else 0
        assert [line for line in calls.take() if "wrong" in line] == [
            f"{name} wrong {wrong}" for name in ("abuse", "later")
        ]


async def test_sending_to_a_connection_that_is_gone(abuse: Path) -> None:
    async with opened(abuse) as (_, context):
        connection = context.connection(-1)
        await connection.connect()
        assert library(abuse).send_kept() == 1
        assert connection.take_output() == b"x"
        await connection.close()
        del connection
        assert library(abuse).send_kept() == 0
        another = context.connection(-1)
        assert library(abuse).send_kept() == 0
        assert another.take_output() == b""
    assert library(abuse).send_kept() == 0


async def test_event_is_given_up_and_a_late_hand_back_logged(
    tmp_path: Path, calls: Calls, autojump_clock: trio.testing.MockClock
) -> None:
    scripted = Scripted(tmp_path, 2)
    async with connected(tmp_path, timeout=300) as (plugins, context, connection):
        calls.take()
        scripted.script("kc")
        start = trio.current_time()
        assert await connection.rcptto("a@b.test") == GIVEN_UP
        assert trio.current_time() - start == pytest.approx(300)
        assert calls.take() == ["a rcptto"]
        assert calls.take_warnings() == [
            "a mq_smtp_in_rcptto was not handed back within 300 seconds; given up"
        ]
        # The session goes on; the plugin still has what the event was about.
        assert await connection.rcptto("c@d.test") is None
        assert context.live["events"] == 1
        scripted.release("a", "c")
        await trio.testing.wait_all_tasks_blocked()
        assert context.live["events"] == 0
        assert calls.take() == ["a rcptto", "b rcptto"]
        assert calls.take_warnings() == [
            "a mq_smtp_in_rcptto was handed back too late, after it had been given up"
        ]
        assert plugins.statistics()["a.so"]["rcptto"]["timeouts"] == 1


async def test_each_plugin_has_the_whole_timeout(
    tmp_path: Path, calls: Calls, autojump_clock: trio.testing.MockClock
) -> None:
    scripted = Scripted(tmp_path, 2)
    async with connected(tmp_path, timeout=100) as (_, _, connection):
        scripted.script("kc", "kc")
        answers: list[Reject | None] = []

        async def session() -> None:
            answers.append(await connection.rcptto("a@b.test"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(session)
            for name in "ab":
                await trio.sleep(80)
                scripted.release(name, "c")
        assert answers == [None]


@pytest.mark.parametrize("before", [300, 0])
async def test_a_shorter_timeout_holds_for_what_is_suspended_already(
    tmp_path: Path, calls: Calls, autojump_clock: trio.testing.MockClock, before: float
) -> None:
    scripted = Scripted(tmp_path, 1)
    async with connected(tmp_path, timeout=before) as (plugins, _, connection):
        scripted.script("kc")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.rcptto, "a@b.test")
            await trio.sleep(10)
            plugins.timeout = 2
        assert trio.current_time() == pytest.approx(12)
        scripted.release("a", "c")
        await trio.testing.wait_all_tasks_blocked()
    assert calls.take_warnings()[0].startswith("a mq_smtp_in_rcptto was not handed back within 2")


async def test_closing_does_not_start_the_time_of_a_cancelled_event_anew(
    tmp_path: Path, calls: Calls, autojump_clock: trio.testing.MockClock
) -> None:
    scripted = Scripted(tmp_path, 1)
    async with connected(tmp_path, timeout=300) as (_, _, connection):
        scripted.script("kc")
        with trio.move_on_after(100):
            await connection.rcptto("a@b.test")
        await connection.close()
        assert trio.current_time() == pytest.approx(300)
        scripted.release("a", "c")
        await trio.testing.wait_all_tasks_blocked()


async def test_timeout_of_zero_is_never(
    tmp_path: Path, calls: Calls, autojump_clock: trio.testing.MockClock
) -> None:
    scripted = Scripted(tmp_path, 1)
    async with connected(tmp_path, timeout=0) as (_, _, connection):
        scripted.script("kc")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.rcptto, "a@b.test")
            await trio.sleep(86_000)
            scripted.release("a", "c")
    assert calls.take_warnings() == []


async def test_events_that_are_never_handed_back_end_with_the_worker(
    tmp_path: Path, calls: Calls, autojump_clock: trio.testing.MockClock
) -> None:
    scripted = Scripted(tmp_path, 1)
    plugins = Plugins.load(str(tmp_path), timeout=1)
    context = await plugins.open_context()
    connection = context.connection(-1)
    scripted.script("kc kc kc")
    message = Message({"recipient": "a@b.test"}, b"x" * 1000)
    assert await connection.rcptto("a@b.test") == GIVEN_UP
    assert await connection.data(b"x") == GIVEN_UP
    assert await connection.message(message) == GIVEN_UP
    await connection.close()
    del connection
    assert context.live["events"] == 3
    await context.close()
    calls.take_warnings()
    scripted.release("a", "c")  # the worker is gone
    assert len(calls.take_warnings()) == 3


async def test_retrying_for_ever_is_given_up(abuse: Path, calls: Calls) -> None:
    async with connected(abuse) as (plugins, _, connection):
        assert await connection.rcptto("retry") == GIVEN_UP
        assert plugins.statistics()["abuse.so"]["rcptto"]["calls"] == 101
        assert await connection.rcptto("pass") is None
    assert calls.take_warnings() == ["abuse mq_smtp_in_rcptto was retried 100 times; given up"]


async def test_reject_is_made_fit_for_the_wire(abuse: Path, calls: Calls) -> None:
    async with connected(abuse) as (_, _, connection):
        assert await connection.rcptto("code") == Reject(451, "4.7.1 1.2.3.4\nQUIT\n[1m")
        assert await connection.rcptto("null") == Reject(452, "4.3.1 Refused")
    assert calls.take_warnings() == [
        "abuse MQ_Reject in mq_smtp_in_rcptto: the code is not 400 to 599; taken as 451"
    ]


@pytest.fixture
def throws(tmp_path: Path) -> Path:
    return install(tmp_path, throws=build(SOURCES / "throws.cpp"))


async def test_exception_in_a_callback_is_contained(throws: Path, calls: Calls) -> None:
    async with connected(throws) as (plugins, context, connection):
        assert await connection.connect() == GIVEN_UP
        assert calls.take() == ["throws unwound"]
        (warning,) = calls.take_warnings()
        assert warning.startswith("throws mq_smtp_in_connect: a C++ exception came out of it: xxx")
        assert await connection.mailfrom("a@b.test") == GIVEN_UP
        assert await connection.message(Message({"recipient": "a@b.test"}, b"x")) == GIVEN_UP
        assert [line.rpartition(": ")[2] for line in calls.take_warnings()] == [
            "not a std::exception",
            "with a message",
        ]
        assert len(plugins.message_id()) == 32
        assert calls.take_warnings() == [
            "throws mq_message_id threw a C++ exception: no id; the message gets a default id"
        ]
        assert context.live["events"] == 0


async def test_exception_in_a_timer_or_watcher_is_contained(throws: Path, calls: Calls) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        async with opened(throws) as (_, context):
            connection = context.connection(ours.fileno())
            assert await connection.rcptto("a@b.test") is None
            await connection.close()
    assert calls.take() == ["throws still running"]
    assert sorted(calls.take_warnings()) == [
        f"throws a timer or watcher: a C++ exception came out of it: {text}"
        for text in ("in a timer", "not a std::exception")
    ]


@pytest.mark.parametrize("function", ["mq_version", "mq_initialize", "mq_message_id_size"])
def test_exception_at_the_start_is_an_error(tmp_path: Path, function: str) -> None:
    text = """
        #include <mailerq.h>
        #include <stdexcept>
        MQ_EXPORT int mq_version() { THROW_VERSION return MQ_API_VERSION; }
        MQ_EXPORT void mq_initialize() { throw std::runtime_error("not today"); }
        MQ_EXPORT size_t mq_message_id_size() { THROW_SIZE return 8; }
        MQ_EXPORT size_t mq_message_id(char *, size_t) { return 0; }
    """
    throw = 'throw std::runtime_error("not today");'
    text = text.replace("THROW_VERSION", throw if function == "mq_version" else "")
    text = text.replace("THROW_SIZE", throw if function == "mq_message_id_size" else "")
    install(tmp_path, bad=build_text(text, name="bad.cpp"))
    with pytest.raises(PluginError, match=rf"bad\.so: .*{function}\(\): not today"):
        Plugins.load(str(tmp_path)).initialize()


async def test_context_that_was_closed_refuses_events(tmp_path: Path) -> None:
    Scripted(tmp_path, 1)
    plugins = Plugins.load(str(tmp_path))
    context = await plugins.open_context()
    connection: Connection = context.connection(-1)
    await connection.close()
    await context.close()
    with pytest.raises(RuntimeError, match="the context has ended"):
        connection.connect()
    with pytest.raises(RuntimeError, match="the context has ended"):
        context.connection(-1)


@pytest.mark.parametrize("ended", [True, False])
def test_a_context_that_is_there_at_the_end_of_the_process_goes_quietly(
    tmp_path: Path, ended: bool
) -> None:
    Scripted(tmp_path, 1)
    program = f"""
import sys, trio
from mailerq.plugins import Plugins

async def main():
    plugins = Plugins.load({str(tmp_path)!r})
    context = await plugins.open_context()
    if {ended}:
        await context.close()
    return context

sys.modules["keep"] = trio.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


async def test_exception_in_one_cleanup_does_not_spare_the_others(
    tmp_path: Path, calls: Calls
) -> None:
    text = """
        #include <mailerq.h>
        MQ_EXPORT int mq_version() { return MQ_API_VERSION; }
        MQ_EXPORT void mq_cleanup() { MQ_Log(MQ_INFO, "cleanup"); throw 1; }
    """
    plugin = build_text(text, name="bad.cpp")
    plugins = Plugins.load(str(install(tmp_path, a=plugin, b=plugin)))
    plugins.initialize()
    plugins.cleanup()
    assert calls.take() == ["a cleanup", "b cleanup"]
    assert len(calls.take_warnings()) == 2
