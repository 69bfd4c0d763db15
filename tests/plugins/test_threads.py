"""Several workers, threads of plugins, what they log and what they send."""

from __future__ import annotations

import ctypes
import logging
import threading
from pathlib import Path

import pytest
import trio

from mailerq.plugins import Plugins
from tests.plugins.kit import SOURCES, Calls, Scripted, build, connected, install, names


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return install(tmp_path, threads=build(SOURCES / "threads.c", "-lpthread"))


def run_workers(plugins: Plugins, count: int, address: str) -> None:
    """Give one recipient to each of some workers at the same time, each on a thread of its own."""
    barrier = threading.Barrier(count)

    async def worker(index: int) -> None:
        context = await plugins.open_context(index)
        connection = context.connection(-1)
        await connection.connect()
        barrier.wait(10)
        await connection.rcptto(address)
        await connection.close()
        await context.close()

    threads = [
        threading.Thread(target=trio.run, args=(worker, index), daemon=True)
        for index in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_callbacks_of_different_workers_run_in_parallel(directory: Path) -> None:
    plugins = Plugins.load(str(directory))
    plugins.initialize()
    run_workers(plugins, 2, "meet")
    library = ctypes.CDLL(str(directory / "threads.so"))
    assert ctypes.c_int.in_dll(library, "most_inside").value == 2
    assert plugins.statistics()["threads.so"]["rcptto"]["calls"] == 2


def test_each_worker_has_its_own_context_data(directory: Path) -> None:
    plugins = Plugins.load(str(directory))
    for _ in range(3):
        run_workers(plugins, 4, "same data")
    assert plugins.statistics()["threads.so"]["context_initialize"]["calls"] == 12


def test_hand_backs_find_their_worker(tmp_path: Path, calls: Calls) -> None:
    # Three plugins that all hand back from threads of their own, on four workers at once.
    scripted = Scripted(tmp_path, 3)
    plugins = Plugins.load(str(tmp_path))
    scripted.script("", *["pc " * 4] * 2)
    run_workers(plugins, 4, "a@b.test")
    order = names([line for line in calls.take() if line.endswith("rcptto")])
    assert sorted(order) == sorted("abc" * 4)
    assert calls.take_warnings() == []


async def test_threads_log_and_send(directory: Path, calls: Calls) -> None:
    async with connected(directory) as (_, context, _):
        told = trio.Event()
        talkative = context.connection(-1, on_output=told.set)
        assert await talkative.rcptto("chatter") is None
        output = b""
        with trio.fail_after(60):
            while len(output) < 4 * 200 * 10:
                if not (more := talkative.take_output()):
                    await told.wait()
                    told = trio.Event()
                    talkative.on_output = told.set
                    more = talkative.take_output()
                output += more
        ctypes.CDLL(str(directory / "threads.so")).join()
        assert output == b"0123456789" * 800
        lines = calls.take()
        assert all(line.startswith("threads line ") for line in lines)
        assert len(lines) == 800
        await talkative.close()


async def test_output_in_an_event_is_left_to_the_engine(directory: Path) -> None:
    async with connected(directory) as (_, context, _):
        told: list[bool] = []
        connection = context.connection(-1, on_output=lambda: told.append(True))
        assert connection.take_output() == b""
        await connection.rcptto("send")
        await trio.testing.wait_all_tasks_blocked()
        assert told == []
        assert connection.take_output() == b"220-hello\r\n"
        assert connection.take_output() == b""
        await connection.close()


async def test_output_of_a_suspended_event_does_not_wait_for_it(directory: Path) -> None:
    async with connected(directory) as (_, context, _):
        told: list[bytes] = []
        connection = context.connection(-1)
        connection.on_output = lambda: told.append(connection.take_output())
        await connection.rcptto("send and wait")
        assert told == [b"220-hello\r\n"]
        await connection.close()


async def test_log_lines_have_priority_and_name_and_are_escaped_by_the_log(directory: Path) -> None:
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Keep()
    logger = logging.getLogger("mailerq.plugins")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        async with connected(directory) as (_, _, connection):
            await connection.rcptto("priorities")
            await connection.rcptto("long")
    finally:
        logger.removeHandler(handler)
    assert [(record.levelname, record.getMessage()) for record in records[:-1]] == [
        ("CRITICAL", "[threads.so] critical"),
        ("WARNING", "[threads.so] warning"),
        ("INFO", "[threads.so] other"),
        ("INFO", "[threads.so] a\r\nb\x1b[1mé\\xff\u2028"),
    ]
    assert records[-1].getMessage() == "[threads.so] " + "x" * 4000


async def test_a_flood_of_log_lines_is_bounded(directory: Path, calls: Calls) -> None:
    async with connected(directory) as (_, _, connection):
        await connection.rcptto("flood")
    assert len(calls.take()) == 10_000
    assert calls.take_warnings() == ["10000 log lines of plugins were dropped: they came too fast"]


def test_lines_of_before_any_worker_are_not_lost(directory: Path, calls: Calls) -> None:
    Plugins.load(str(directory))
    ctypes.CDLL(None).MQ_Log(2, b"from nowhere")
    assert calls.take_warnings() == ["plugin from nowhere"]


async def test_connection_may_be_dropped_on_another_thread(directory: Path) -> None:
    async with connected(directory) as (_, context, _):
        before = context.live["connections"]
        holder = [context.connection(-1) for _ in range(3)]
        await trio.to_thread.run_sync(holder.clear)
        another = context.connection(-1)
        assert context.live["connections"] == before + 1
        await another.close()
