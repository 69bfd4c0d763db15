"""Timers, watchers and the libev loop: on the worker's thread, in time, and gone at the end."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from mailerq.plugins import Plugins
from tests.plugins.kit import SOURCES, Calls, build, connected, install


class Loops:
    """loops.c, and its counters."""

    def __init__(self, directory: Path) -> None:
        self.directory = install(directory, loops=build(SOURCES / "loops.c", "-lev", "-lpthread"))

    @property
    def library(self) -> ctypes.CDLL:
        return ctypes.CDLL(str(self.directory / "loops.so"))

    def __getattr__(self, name: str) -> float:
        kind = ctypes.c_double if name == "least" else ctypes.c_int
        value: float = kind.in_dll(self.library, name).value
        return value

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(60):
            while not condition():
                await trio.lowlevel.checkpoint()


@pytest.fixture
def loops(tmp_path: Path) -> Loops:
    return Loops(tmp_path)


def helpers() -> int:
    """How many threads this process has that are none of Python's."""
    return len(list(Path("/proc/self/task").iterdir())) - threading.active_count()


async def test_timer_fires_on_time(loops: Loops) -> None:
    async with connected(loops.directory) as (_, _, connection):
        for _ in range(20):
            await connection.rcptto("one timer")
        assert loops.fired == 20
        assert loops.late == 0
        # The promise is 2 ms on an idle machine. This one may be busy, but not each time.
        assert loops.least < 0.05


async def test_ten_thousand_timers_at_once(loops: Loops) -> None:
    async with connected(loops.directory) as (plugins, context, connection):
        await connection.rcptto("many timers")
        await loops.wait_for(lambda: loops.fired == 10_000)
        assert loops.elsewhere == 0
        assert context.live["timers"] == 0
        assert plugins.statistics()["loops.so"]["timer"]["calls"] == 10_001


async def test_timers_are_stopped_and_reset_also_by_themselves(loops: Loops) -> None:
    async with connected(loops.directory) as (_, context, connection):
        await connection.rcptto("stop and reset")
        assert loops.fired == 3
        assert context.live["timers"] == 0


async def test_context_is_good_for_timers_when_its_event_is_over(loops: Loops) -> None:
    async with connected(loops.directory) as (_, _, connection):
        await connection.rcptto("old context")
        assert loops.fired == 100


async def test_a_thousand_watchers(loops: Loops) -> None:
    async with connected(loops.directory) as (plugins, context, connection):
        await connection.rcptto("watch")
        assert context.live["watchers"] == 1000
        loops.library.write_all(ctypes.c_char(b"x"))
        await loops.wait_for(lambda: loops.watched == 1000)
        loops.library.write_all(ctypes.c_char(b"q"))
        await loops.wait_for(lambda: loops.watched == 2000)
        assert context.live["watchers"] == 0
        assert loops.elsewhere == 0
        await connection.rcptto("unwatch")  # they are gone, which is no mistake
        loops.library.unwatch_all()
        assert plugins.statistics()["loops.so"]["watcher"]["calls"] == 2000


async def test_watchers_are_removed_from_outside(loops: Loops) -> None:
    async with connected(loops.directory) as (_, context, connection):
        await connection.rcptto("watch")
        await connection.rcptto("unwatch")
        assert context.live["watchers"] == 0
        loops.library.write_all(ctypes.c_char(b"x"))
        await connection.rcptto("one timer")
        assert loops.watched == 0
        loops.library.unwatch_all()


async def test_libev_callbacks_run_on_the_worker(loops: Loops) -> None:
    async with connected(loops.directory) as (_, _, connection):
        for count in range(1, 20):
            await connection.rcptto("raw")
            assert loops.fired == count
        assert loops.elsewhere == 0


async def test_loop_exists_only_when_a_plugin_asks(loops: Loops) -> None:
    before = helpers()
    async with connected(loops.directory) as (_, _, connection):
        await connection.rcptto("pass")
        assert helpers() == before
        await connection.rcptto("one timer")
        assert helpers() == before + 1
    assert helpers() == before


async def test_timers_and_watchers_end_with_the_worker(loops: Loops, calls: Calls) -> None:
    plugins = Plugins.load(str(loops.directory))
    before = helpers()
    for _ in range(3):
        context = await plugins.open_context()
        connection = context.connection(-1)
        await connection.rcptto("leave")
        assert context.live["timers"] == 1
        await connection.close()
        del connection
        await context.close()
    assert helpers() == before
    assert loops.fired == 0
    assert calls.take_warnings() == []
