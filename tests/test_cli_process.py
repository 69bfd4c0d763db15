"""A process of several as its parent knows it: what it may say, and how its end is told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from mailerq.cli.supervisor import process
from mailerq.cli.supervisor.process import Ended, NoStart, Process, describe
from mailerq.config import Config
from mailerq.live import Snapshot

READY = b'{"addresses": [["192.0.2.1", 25]]}\n'


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[Process, trio.SocketStream]]:
    """A process that is heard, and its end of the socket; the program beside it only waits."""
    ours, theirs = socket.socketpair()
    program = await trio.lowlevel.open_process(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE
    )
    child = Process(1, program, trio.socket.from_stdlib_socket(ours))
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    try:
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(child.listen)
            with trio.fail_after(60):
                yield child, stream
            child.program.kill()
            await child.end()
    finally:
        await program.stdin.aclose()


@pytest.mark.parametrize(
    "line",
    [b"nonsense\n", b"\xff\n", b"17\n", b"[" * 100_000 + b"\n", b"x" * 200_000],
    ids=["words", "bytes", "number", "depth", "endless"],
)
async def test_a_process_that_says_what_is_no_reply_is_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    monkeypatch.setattr(process, "MAX_REPLY_BYTES", 100_000)
    async with listening() as (child, stream):
        await stream.send_all(READY)
        assert await child.until_ready(Snapshot(Config())) == [("192.0.2.1", 25)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, line)
            with pytest.raises(Ended):
                await child.ask("status", 20)
            nursery.cancel_scope.cancel()
        assert child.over.is_set()
        assert await child.program.wait() == -signal.SIGKILL
    assert "process 1 (pid " in caplog.text
    assert "says what is no reply" in caplog.text


@pytest.mark.parametrize("line", [b"{}\n", b'{"addresses": 1}\n', b'{"addresses": [["x"]]}\n'])
async def test_a_process_that_does_not_say_where_it_listens_has_not_started(line: bytes) -> None:
    async with listening() as (child, stream):
        await stream.send_all(line)
        with pytest.raises(NoStart, match="does not say where it listens"):
            await child.until_ready(Snapshot(Config()))


async def test_why_a_process_ends_is_no_answer_and_then_it_has_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "EXIT_SECONDS", 0.05)
    async with listening() as (child, stream):
        await stream.send_all(READY)
        await child.until_ready(Snapshot(Config()))
        await stream.send_all(b'{"failed": "the disk is gone", "temporary": true}\n')
        with pytest.raises(Ended):
            await child.ask("status", 20)
        assert child.over.is_set()
        assert await child.program.wait() == -signal.SIGKILL
    assert "the disk is gone" in caplog.text


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "ended with status 0"),
        (os.EX_SOFTWARE, "ended with status 70"),
        (-signal.SIGKILL, "was ended by SIGKILL"),
        (-(signal.SIGRTMIN + 6), f"was ended by signal {signal.SIGRTMIN + 6}"),
    ],
)
def test_every_way_to_end_has_its_words(status: int, text: str) -> None:
    assert describe(status) == text
