"""One process of several: it answers its parent in order, and stops when the parent is gone."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import trio
import trio.testing

from mailerq.cli.supervisor import child


class Engine:
    """What a process needs of its engine to answer."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(shutdown_timeout=5.0)
        self.plugins = SimpleNamespace(timeout=5.0)

    def commands(self) -> dict[str, Any]:
        return {"status": lambda request: {"number": request["number"]}}


class Bench:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.parent = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
        self.engine = Engine()
        self.started = trio.Event()
        self.stop = trio.Event()
        self._said = b""

    async def ask(self, command: str, **arguments: object) -> None:
        await self.parent.send_all(json.dumps({"command": command, **arguments}).encode() + b"\n")

    async def reply(self) -> dict[str, Any]:
        while b"\n" not in self._said:
            self._said += await self.parent.receive_some()
        line, _, self._said = self._said.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply


@asynccontextmanager
async def serving(*, started: bool = True) -> AsyncIterator[Bench]:
    bench = Bench()
    if started:
        bench.started.set()
    requests = child._Requests(bench.stream, 0, bench.engine, bench.started, bench.stop)  # type: ignore[arg-type]
    async with bench.parent, bench.stream, trio.open_nursery() as nursery:
        nursery.start_soon(requests.serve)
        with trio.fail_after(60):
            yield bench
        nursery.cancel_scope.cancel()


async def test_requests_are_answered_in_their_order() -> None:
    async with serving() as bench:
        for number in range(3):
            await bench.ask("status", number=number)
        assert [(await bench.reply())["number"] for _ in range(3)] == [0, 1, 2]


async def test_no_reply_comes_before_the_line_that_tells_of_the_start() -> None:
    async with serving(started=False) as bench:
        await bench.ask("status", number=1)
        await trio.testing.wait_all_tasks_blocked()
        await bench.stream.send_all(b"{}\n")
        bench.started.set()
        assert [await bench.reply() for _ in range(2)] == [{}, {"number": 1}]


async def test_what_cannot_be_done_is_said_and_the_next_request_is_answered() -> None:
    async with serving() as bench:
        await bench.ask("nonsense")
        await bench.ask("status", number=7)
        assert "unknown command" in (await bench.reply())["error"]
        assert await bench.reply() == {"number": 7}


async def test_the_end_of_the_parent_stops_the_engine() -> None:
    async with serving() as bench:
        await bench.ask("status", number=1)
        await bench.parent.send_eof()
        await bench.stop.wait()
        assert await bench.reply() == {"number": 1}
