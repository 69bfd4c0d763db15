"""Limits of deliveries as an operator sees them: one file, all processes, restarts, mistakes."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import monotonic

import pytest
import trio

from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.crash.kit import Daemon, all_arrive, daemon, switches_in, until
from tests.processes_kit import TWO, all_run, connected, marked, put, send_all, until_rows
from tests.support import Sink, in_thread, mailerq, open_sink

TICK_SECONDS = 0.005


class Clock:
    """Notes when mail is seen, and since when it may have been there, unseen by a busy loop."""

    def __init__(self, sink: Sink) -> None:
        self.seen: list[float] = []
        self._since: list[float] = []
        self._ticks = deque([monotonic()], maxlen=2)
        sink.decide = self

    async def run(self) -> None:
        while True:
            self._ticks.append(monotonic())
            await trio.sleep(TICK_SECONDS)

    def __call__(self, event: server.Event) -> Reply | None:
        if isinstance(event, server.Mail):
            self.seen.append(monotonic())
            # What was there at a tick is seen before the next but one.
            self._since.append(self._ticks[0])
        return None

    def assert_paced(self, seconds: float, first: int = 0) -> None:
        """Check that no stretch has more than its share, but for 20 ms that may be made up for."""
        since, seen = self._since[first:], self.seen[first:]
        for count in range(1, len(seen)):
            for start, end in zip(since, seen[count:], strict=False):
                # A process may send one mail later than the other the next, by its own turns.
                assert end - start >= count * seconds - 0.05

    def usual_gap(self, first: int) -> float:
        """What is usual between two mails, also on a machine that stands still now and then."""
        return median(end - start for start, end in pairwise(self.seen[first:]))


@asynccontextmanager
async def clock_of(sink: Sink) -> AsyncIterator[Clock]:
    clock = Clock(sink)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(clock.run)
        yield clock
        nursery.cancel_scope.cancel()


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[dict[str, str]]:
    with marked(tmp_path) as environment:
        yield environment


def limits_in(directory: Path, text: str) -> str:
    path = directory / "limits.toml"
    path.write_text(text)
    return f"--limits-file={path}"


async def delivered(running: Daemon, count: int) -> None:
    with trio.fail_after(60):
        while (await running.statistics())["outgoing"]["delivered"] < count:  # noqa: ASYNC110
            await trio.sleep(0.02)


async def test_two_processes_together_keep_a_rate_and_one_alone_uses_it(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    switch = limits_in(tmp_path, "[[limit]]\ndomain = 'd.test'\nmessages-per-minute = 600\n")
    async with (
        open_sink() as sink,
        clock_of(sink) as clock,
        daemon(tmp_path, sink.port, TWO, switch, env=mark) as running,
    ):
        both = await send_all(running.port, "both")
        await all_arrive(sink, both)
        clock.assert_paced(0.1)
        first = len(clock.seen)
        async with connected(running.port) as stream:
            for number in range(20):
                assert await put(stream, f"one-{number}") == 250
        await all_arrive(sink, {f"one-{number}" for number in range(20)})
        clock.assert_paced(0.1, first)
        # Nine tenths of the limit; a share of a half would be 0.2 seconds.
        assert clock.usual_gap(first) <= 0.1 / 0.9 + 0.05
        await delivered(running, len(both) + 20)


async def test_connections_are_counted_over_all_processes(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    switches = ("--domain-maxconnections=2", "--connection-maxidle=1000000")
    async with (
        open_sink() as sink,
        daemon(tmp_path, sink.port, TWO, *switches, env=mark) as running,
    ):
        await all_arrive(sink, await send_all(running.port, "a"))
        assert sink.most <= 2
        # What a process that died had is free once another has taken its place.
        killed = running.children[0]
        os.kill(killed, signal.SIGKILL)
        await until(lambda: killed not in running.children)
        await until_rows(running, all_run)
        await all_arrive(sink, await send_all(running.port, "b"))
        assert sink.most <= 3  # the sink may notice the end of the dead one's late


async def test_one_connection_at_a_time_serves_all_processes_in_turn(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    switches = ("--domain-maxconnections=1", "--connection-maxidle=1000000")
    async with (
        open_sink() as sink,
        daemon(tmp_path, sink.port, TWO, *switches, env=mark) as running,
    ):
        for name in "abc":
            await all_arrive(sink, await send_all(running.port, name))
        assert sink.most == 1


async def test_a_rate_holds_over_a_restart(tmp_path: Path, mark: dict[str, str]) -> None:
    switch = limits_in(tmp_path, "[[limit]]\nmessages-per-minute = 20\n")
    async with open_sink() as sink, clock_of(sink) as clock:
        for number in range(2):
            async with daemon(tmp_path, sink.port, switch, env=mark) as running:
                async with connected(running.port) as stream:
                    assert await put(stream, f"m-{number}") == 250
                await all_arrive(sink, {f"m-{number}"})
                await delivered(running, 1)
                assert await running.stop() == 0
        clock.assert_paced(3.0)


async def test_status_names_the_limit_that_mail_waits_for(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    switch = limits_in(tmp_path, "[[limit]]\ndomain = 'd.test'\n\nmessages-per-minute = 1\n")
    async with open_sink() as sink, daemon(tmp_path, sink.port, switch, env=mark) as running:
        async with connected(running.port) as stream:
            for number in range(3):
                assert await put(stream, f"m-{number}") == 250
        await all_arrive(sink, {"m-0"})
        text = f"messages-per-minute = 1 of d.test ({tmp_path}/limits.toml:4)"
        with trio.fail_after(30):
            while (await running.statistics())["outgoing"]["limits"] != {text: 1}:  # noqa: ASYNC110
                await trio.sleep(0.02)
        # A mistake changes nothing; what is right holds at once.
        switches = switches_in(tmp_path, sink.port)
        limits_in(tmp_path, "[[limit]]\ndomain = 'd.test'\nmesages-per-minute = 0\n")
        wrong = await in_thread(lambda: mailerq("reload", *switches))
        assert wrong.returncode == 1
        assert (
            f"{tmp_path}/limits.toml:3: unknown key 'mesages-per-minute'" in wrong.stderr.decode()
        )
        limits_in(tmp_path, "[[limit]]\ndomain = 'd.test'\nmessages-per-minute = 0\n")
        done = await in_thread(lambda: mailerq("reload", *switches))
        assert done.returncode == 0, done.stderr
        await all_arrive(sink, {"m-1", "m-2"})


def test_check_config_says_all_mistakes_of_the_file(tmp_path: Path) -> None:
    switch = limits_in(
        tmp_path,
        "[[limit]]\nprovider = 'gmail'\nmax-connections = 3\n[[limit]]\nmax-idle = 'two'\n",
    )
    done = mailerq("check-config", switch, *switches_in(tmp_path, 25))
    assert done.returncode == 1
    path = tmp_path / "limits.toml"
    assert (
        f"{path}:2: provider: no [[provider]] in this file is named 'gmail'" in done.stderr.decode()
    )
    assert f"{path}:5: max-idle: 'two' is not a whole number" in done.stderr.decode()


def test_a_daemon_with_a_wrong_file_does_not_start(tmp_path: Path) -> None:
    switch = limits_in(tmp_path, "[[limit]]\nmax-idle = -7\n")
    done = mailerq(switch, *switches_in(tmp_path, 25))
    assert done.returncode == 2
    assert f"{tmp_path}/limits.toml:2: max-idle: -7 is out of bounds" in done.stderr.decode()


def test_check_config_names_addresses_that_this_host_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "addresses.toml"
    path.write_text("[[pool]]\nname = 'a'\naddresses = ['127.0.0.2', '192.0.2.1']\n")
    switches = ("--addresses-file", str(path), *switches_in(tmp_path, 25))
    done = mailerq("check-config", *switches)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.decode().splitlines() if "cannot leave" in line]
    assert notes == ["note: mail cannot leave from 192.0.2.1: Cannot assign requested address"]
    path.write_text("[[pool]]\nname = 'a'\nadresses = ['127.0.0.2']\n")
    done = mailerq("check-config", *switches)
    assert done.returncode == 1
    assert f"{path}:3: unknown key 'adresses' in [[pool]]; did you mean addresses?" in (
        done.stderr.decode()
    )
