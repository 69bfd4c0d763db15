"""``smtp-processes``: how a daemon of several processes starts, or does not, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.crash.kit import (
    Daemon,
    Ledger,
    Load,
    all_arrive,
    arrivals,
    command,
    daemon,
    is_alive,
    switches_in,
)
from tests.engine.kit import Certificate
from tests.processes_kit import (
    ONE_ABORTS,
    SESSIONS,
    TWO,
    Gate,
    all_run,
    connected,
    locked,
    marked,
    rows,
    send_all,
)
from tests.support import ROOT, closed_port, compile_plugin, in_thread, mailerq, open_sink, until


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[dict[str, str]]:
    with marked(tmp_path) as environment:
        yield environment


# A start that fails.


def start(directory: Path, count: int, *more: str, env: dict[str, str]) -> tuple[int, str]:
    """The exit status, and what it says beside the log, when a daemon is to start."""
    switches = switches_in(directory, 1, f"--smtp-processes={count}", *more)
    switches = [each for each in switches if not each.startswith("--application-log")]
    done = mailerq(*switches, env=env)
    lines = done.stderr.decode().splitlines(keepends=True)
    return done.returncode, "".join(
        line for line in lines if not line.startswith(("[Info] [", "[Warning] ["))
    )


@contextmanager
def bad_plugin(directory: Path) -> Iterator[list[str]]:
    (directory / "plugins").mkdir()
    (directory / "plugins" / "bad.so").write_text("no ELF")
    yield [f"--plugin-directory={directory}/plugins"]


@contextmanager
def port_in_use(directory: Path) -> Iterator[list[str]]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield [f"--smtp-port={taken.getsockname()[1]}"]


@contextmanager
def bad_certificate(directory: Path) -> Iterator[list[str]]:
    certificate = Certificate.make(directory)
    certificate.chain.write_text("nonsense")
    yield certificate.switches


@contextmanager
def queue_in_use(directory: Path) -> Iterator[list[str]]:
    (directory / "queue").mkdir()
    (directory / "queue" / "queue.lock").write_text("4711\n")
    with locked(directory / "queue"):
        yield []


@contextmanager
def strange_address(directory: Path) -> Iterator[list[str]]:
    yield ["--smtp-ip=192.0.2.1"]


@contextmanager
def no_log(directory: Path) -> Iterator[list[str]]:
    yield [f"--send-log-file={directory}/no/log"]


@contextmanager
def no_account(directory: Path) -> Iterator[list[str]]:
    yield ["--user=nobody-has-this-name"]


@contextmanager
def slow_plugin(directory: Path) -> Iterator[list[str]]:
    source = """
    #include <mailerq.h>
    MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }
    MQ_EXPORT bool mq_context_initialize(MQ_Context *context) { return context != NULL; }
    """
    compile_plugin(directory / "plugins", "slow.c", source)
    yield [f"--plugin-directory={directory}/plugins", "--plugin-timeout=0.2"]


@pytest.mark.parametrize(
    ("trouble", "status"),
    [
        (bad_plugin, 2),
        (port_in_use, 2),
        (bad_certificate, 2),
        (queue_in_use, os.EX_TEMPFAIL),
        (strange_address, 2),
        (no_log, 2),
        (no_account, 2),
        (slow_plugin, 2),
    ],
)
def test_a_start_that_fails_says_what_one_process_says(
    tmp_path: Path, mark: dict[str, str], trouble: Any, status: int
) -> None:
    with trouble(tmp_path) as switches:
        alone = start(tmp_path, 1, *switches, env=mark)
        several = start(tmp_path, 2, *switches, env=mark)
    assert alone[0] == status, alone
    assert alone[1].startswith("mailerq: ")
    assert several == alone
    assert not (tmp_path / "pid").exists()


def test_a_process_that_dies_at_the_start_ends_the_start(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    compile_plugin(tmp_path / "plugins", "one.c", ONE_ABORTS)
    (tmp_path / "aborts").touch()
    env = {**mark, "ABORTS": f"{tmp_path}/aborts"}
    status, text = start(tmp_path, 3, f"--plugin-directory={tmp_path}/plugins", env=env)
    assert status == os.EX_SOFTWARE
    last, line = text.splitlines()
    assert last.endswith("] process 1: SIGABRT in mq_initialize of plugin one.so")
    assert line.startswith("mailerq: process 1 (pid ")
    assert line.endswith(") was ended by SIGABRT at its start")


@pytest.mark.parametrize("count", [2, 1])
async def test_two_daemons_share_neither_port_nor_queue(
    tmp_path: Path, mark: dict[str, str], count: int
) -> None:
    second = tmp_path / "second"
    with closed_port() as port:
        async with daemon(tmp_path, port, TWO, env=mark) as running:
            second.mkdir()

            async def another(directory: Path, *more: str) -> tuple[int, str]:
                return await in_thread(lambda: start(directory, count, *more, env=mark))

            status, text = await another(second, f"--smtp-port={running.port}")
            assert status == 2
            assert text.count("\n") == 1
            assert f"smtp-port: cannot listen on 127.0.0.1:{running.port}: " in text
            status, text = await another(second, f"--queue-directory={running.queue}")
            assert status == os.EX_TEMPFAIL
            assert text.count("\n") == 1
            assert f"queue.lock: held by another mailerq, process {running.children[0]};" in text
            status, text = await another(tmp_path)
            assert status == 2
            assert f"another mailerq is running (process {running.process.pid})" in text
            assert all_run(await rows(running))


# The end.


@pytest.mark.parametrize("to", ["parent", "group", "all"])
async def test_a_signal_ends_all_under_load_and_nothing_is_lost(
    tmp_path: Path, mark: dict[str, str], to: str
) -> None:
    ledger = Ledger()
    load = Load(ledger, "x")
    async with open_sink() as sink:
        async with (
            daemon(tmp_path, sink.port, TWO, env=mark, prefix=["setsid"]) as running,
            trio.open_nursery() as nursery,
        ):
            children = running.children
            for _ in range(SESSIONS):
                nursery.start_soon(load.session, running.port)
            await until(lambda: len(ledger.accepted) > 100)
            if to == "parent":
                running.process.send_signal(signal.SIGTERM)
            elif to == "group":
                os.killpg(running.process.pid, signal.SIGINT)
            else:  # as a service manager that means all of its processes
                for pid in (*children, running.process.pid):
                    os.kill(pid, signal.SIGTERM)
            with trio.fail_after(60):
                assert await running.process.wait() == 0
            assert not any(map(is_alive, children))
            assert not (tmp_path / "pid").exists()
            assert not (running.queue / "control").exists()
            assert "Traceback" not in running.log
        async with daemon(tmp_path, sink.port, TWO, env=mark) as running:
            await all_arrive(sink, ledger.accepted)
            await running.until_empty()
            assert await running.stop() == 0
    ledger.check(arrivals(sink))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("later", [0.0, 0.1, 0.4])
async def test_a_signal_ends_a_start(
    tmp_path: Path, mark: dict[str, str], number: signal.Signals, later: float
) -> None:
    with closed_port() as port, (tmp_path / "stderr").open("w+b") as said:
        switches = switches_in(tmp_path, port, "--smtp-processes=3")
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "mailerq", *switches],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **mark},
            stderr=said,
            process_group=0,
        )
        running = Daemon(process, tmp_path, 0)
        await until(lambda: bool(running.children))
        await trio.sleep(later)
        os.killpg(process.pid, number)
        with trio.fail_after(60):
            assert await process.wait() == 0
        said.seek(0)
        assert said.read() == b""
        assert "Traceback" not in running.log
        assert "Critical" not in running.log
        assert not (tmp_path / "pid").exists()


async def test_what_a_terminal_says_to_all_is_for_the_parent(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    with closed_port() as port:
        async with daemon(tmp_path, port, TWO, env=mark, prefix=["setsid"]) as running:
            before = running.children
            for pid in before:
                os.kill(pid, signal.SIGINT)
                os.kill(pid, signal.SIGHUP)
            os.killpg(running.process.pid, signal.SIGHUP)
            await until(lambda: "SIGHUP" in running.log)
            assert all_run(await rows(running))
            assert running.children == before
            assert await running.stop() == 0


async def test_a_second_signal_ends_all_at_once(tmp_path: Path, mark: dict[str, str]) -> None:
    with closed_port() as port:
        async with (
            daemon(tmp_path, port, TWO, "--shutdown-timeout=600", env=mark) as running,
            connected(running.port) as stream,
        ):
            children = running.children
            for line in (b"MAIL FROM:<a@b.test>\r\n", b"RCPT TO:<c@d.test>\r\n", b"DATA\r\n"):
                await command(stream, line)
            running.process.send_signal(signal.SIGTERM)
            await until(lambda: "SIGTERM: stopping" in running.log)
            running.process.send_signal(signal.SIGINT)
            with trio.fail_after(60):
                assert await running.process.wait() == -signal.SIGINT
            await until(lambda: not any(map(is_alive, children)))


async def test_processes_without_a_parent_stop_and_a_new_daemon_starts(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    async with open_sink() as sink:
        gate = Gate(sink)
        async with daemon(tmp_path, sink.port, TWO, env=mark) as running:
            children = running.children
            sent = await send_all(running.port, "a")
            running.kill()
            await running.process.wait()
            await until(lambda: not any(map(is_alive, children)))
        gate.closed = False
        async with daemon(tmp_path, sink.port, TWO, env=mark) as running:
            await all_arrive(sink, sent)
            await running.until_empty()
            assert await running.stop() == 0
    assert len(sink.mails) == len(sent)
