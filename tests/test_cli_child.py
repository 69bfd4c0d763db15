"""One process of several: what its parent asks for while it is at something that takes long."""

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
    """Takes over only shares below 5: the others take for ever."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(shutdown_timeout=5.0)
        self.plugins = SimpleNamespace(timeout=5.0)
        self.shares: set[int] = set()
        self.tried: list[int] = []

    def commands(self) -> dict[str, Any]:
        return {"status": lambda request: {"shares": sorted(self.shares)}}

    async def take_over(self, share: int) -> None:
        self.tried.append(share)
        if share >= 5:
            await trio.sleep_forever()
        self.shares.add(share)

    async def give_back(self, share: int) -> None:
        self.shares.discard(share)


class Bench:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.parent = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
        self.engine = Engine()
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
async def serving() -> AsyncIterator[Bench]:
    bench = Bench()
    started = trio.Event()
    started.set()
    requests = child._Requests(bench.stream, 0, bench.engine, started, bench.stop)  # type: ignore[arg-type]
    async with bench.parent, bench.stream, trio.open_nursery() as nursery:
        nursery.start_soon(requests.serve)
        with trio.fail_after(20):
            yield bench
        nursery.cancel_scope.cancel()


async def test_the_end_of_the_parent_does_not_wait_for_a_share() -> None:
    async with serving() as bench:
        await bench.ask("take-over", share=7)
        await bench.ask("take-over", share=1)
        await trio.testing.wait_all_tasks_blocked()
        assert bench.engine.tried == [7]
        await bench.parent.send_eof()
        await bench.stop.wait()
        assert "about to stop" in (await bench.reply())["error"]
        await trio.testing.wait_all_tasks_blocked()
        assert bench.engine.tried == [7]


async def test_an_engine_that_stops_takes_no_share_over() -> None:
    async with serving() as bench:
        await bench.ask("take-over", share=7)
        await trio.testing.wait_all_tasks_blocked()
        bench.stop.set()
        assert "about to stop" in (await bench.reply())["error"]
        await bench.ask("take-over", share=1)
        assert "about to stop" in (await bench.reply())["error"]
        await bench.ask("status")
        assert await bench.reply() == {"shares": []}


async def test_a_share_that_is_called_back_is_not_taken_over_first() -> None:
    async with serving() as bench:
        await bench.ask("take-over", share=7)
        await trio.testing.wait_all_tasks_blocked()
        await bench.ask("take-over", share=1)
        await bench.ask("take-over", share=2)
        await bench.ask("give-back", share=1)
        await bench.ask("give-back", share=7)
        replies = [await bench.reply() for _ in range(5)]
        assert bench.engine.tried == [7, 2]
        assert bench.engine.shares == {2}
        assert [reply.get("error", "") for reply in replies] == [
            "it is called back", "it is called back", "", "", ""
        ]  # fmt: skip
