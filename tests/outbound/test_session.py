"""One connection without its pool: what it is told while it waits, and what plugins send."""

from __future__ import annotations

import select
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.config import Config
from mailerq.message import Message
from mailerq.net.resolver import Host
from mailerq.outbound.session import Connection, Job
from mailerq.queues import Lease
from mailerq.rules.routes import Route
from tests.outbound.kit import (
    MemoryQueues,
    Peer,
    PeerConnection,
    Script,
    StubPlugins,
    StubWorker,
)


class StubPool:
    """The employer of one connection, who has no more jobs."""

    def __init__(self, worker: StubWorker) -> None:
        self.config = Config(hostname="me.test", connection_maxidle=60_000)
        self.worker = worker
        self.open = trio.Event()

    def opened(self, connection: Connection) -> None:
        self.open.set()

    def finished(self, connection: Connection, job: Job, report: Any, reusable: bool) -> None:
        connection.settled()

    def next_job(self, connection: Connection) -> Job | None:
        return None

    def leaving(self, connection: Connection) -> None:
        pass

    def closed(self, connection: Connection, job: Job | None, report: Any) -> None:
        pass


class Bench:
    def __init__(self, peer: Peer, port: int, pool: StubPool) -> None:
        self.peer = peer
        self.route = Route("d.test", "d.test", port, mx=False)
        self.pool = pool
        self.connection = Connection(pool, pool.worker, self.route, None)  # type: ignore[arg-type]

    def give(self) -> None:
        message = Message({"envelope": "a@b.test", "recipient": "c@d.test"})
        message.body = b"hi\r\n"
        lease = Lease(1, "outbox", message)
        self.connection.give(Job(lease, message, self.route, None, "a@b.test", "c@d.test", 1, 1e12))


@asynccontextmanager
async def open_idle(*scripts: Script, plugins: StubPlugins | None = None) -> AsyncIterator[Bench]:
    """A connection that waits for its first job."""
    async with trio.open_nursery() as nursery:
        peer = Peer(MemoryQueues(), list(scripts))
        listeners = await nursery.start(partial(trio.serve_tcp, peer.handle, 0, host="127.0.0.1"))
        pool = StubPool(StubWorker(0, nursery, plugins or StubPlugins()))
        bench = Bench(peer, listeners[0].socket.getsockname()[1], pool)
        nursery.start_soon(bench.connection.run, [Host("mx.test", "127.0.0.1")])
        with trio.fail_after(10):
            await pool.open.wait()
            await trio.testing.wait_all_tasks_blocked()
            yield bench
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("leave", [False, True])
async def test_news_that_come_right_behind_an_event_without_data_are_not_missed(
    leave: bool,
) -> None:
    async with open_idle() as bench:
        bench.connection._stream._socket.notify(select.EPOLLPRI)
        # Nothing runs in between: the connection is on its way to find that there is no data.
        if leave:
            bench.connection.leave()
        else:
            bench.give()
        await bench.peer.queues.until(
            lambda _: bench.peer.commands[-1] == "QUIT" if leave else bool(bench.peer.mails)
        )


@pytest.mark.parametrize("idle", [False, True])
async def test_much_that_a_plugin_sends_while_the_connection_waits_goes_out_whole(
    idle: bool,
) -> None:
    plugins = StubPlugins()
    size = 1 << 24  # more than the sockets take
    asked, may_read, done = trio.Event(), trio.Event(), trio.Event()

    async def wait_for_it(peer: PeerConnection) -> None:
        await peer.hello()
        if not idle:
            while not (await peer.line()).startswith("DATA"):
                pass
        asked.set()
        await may_read.wait()
        received = 0
        while received < size:
            received += len(await peer.stream.receive_some())
        done.set()

    async with open_idle(wait_for_it, plugins=plugins) as bench:
        if not idle:
            bench.give()
        await asked.wait()
        await trio.testing.wait_all_tasks_blocked()
        plugins.send(bytes(size))
        may_read.set()
        await done.wait()
