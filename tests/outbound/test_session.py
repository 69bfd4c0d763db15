"""A session without its dispatcher: events while it waits, and plugin output."""

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
from mailerq.outbound.jobs import Job
from mailerq.outbound.limits import Allowance, Limits
from mailerq.outbound.policies import NO_POLICIES
from mailerq.outbound.session import Session
from mailerq.outbound.sites import HostHistory, Site
from mailerq.queues import Lease
from mailerq.rules.plan import Send
from mailerq.rules.routes import Route
from mailerq.rules.security import NOTHING
from mailerq.rules.shaping import Shaping
from tests.outbound.kit import Peer, PeerConnection, Script, StubPlugins, StubWorker
from tests.outbound.memory_queues import MemoryQueues


class StubRights:
    """Allows everything."""

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance

    def take_host(self, session: Session, host: Host) -> None:
        return None

    def give_back_host(self, session: Session) -> None:
        pass


class StubFlow:
    """A flow with the jobs of a test and one session."""

    local_ip = login = None
    demands = wanted = NOTHING
    limits_number = 0
    policies, tls = NO_POLICIES, None
    config = Config(hostname="me.test", connection_maxidle=60_000)

    def __init__(self, port: int) -> None:
        self.route = Route("d.test", "d.test", port, mx=False)
        self.site = Site(b"key", self.route)
        self.history = HostHistory()
        self.jobs: list[Job] = []
        self.open = trio.Event()
        self.rights = StubRights(Limits(Shaping(self.config)).of_flow(self.site, None))

    def name_of(self, stream: Any) -> None:
        return None

    def hosts(self) -> list[Host]:
        return [Host("mx.test", "127.0.0.1")]

    def opened(self, session: Session, *, pipelines: bool) -> None:
        self.open.set()

    def next_job(self, session: Session) -> Job | None:
        return self.jobs.pop() if self.jobs else None

    def job_ahead(self, session: Session) -> Job | None:
        return None

    def settle(self, session: Session, job: Job, report: Any) -> None:
        session.settled()

    def give_back(self, job: Job, *, ahead: bool = False) -> None:
        self.jobs.append(job)

    def ended(self, session: Session, report: Any) -> None:
        pass


class Bench:
    def __init__(self, peer: Peer, port: int, worker: StubWorker) -> None:
        self.peer = peer
        self.flow = StubFlow(port)
        self.session = Session(self.flow, worker)  # type: ignore[arg-type]

    def give(self) -> None:
        message = Message({"envelope": "a@b.test", "recipient": "c@d.test"})
        message.body = b"hi\r\n"
        lease = Lease(1, "outbox", message)
        plan = Send(self.flow.route, "d.test", "a@b.test", "c@d.test", 1e12)
        self.flow.jobs.append(Job(lease, message, plan, 1))
        self.session.wake()


@asynccontextmanager
async def open_idle(*scripts: Script, plugins: StubPlugins | None = None) -> AsyncIterator[Bench]:
    """A session that waits for its first job."""
    async with trio.open_nursery() as nursery:
        peer = Peer(MemoryQueues(), list(scripts))
        listeners = await nursery.start(partial(trio.serve_tcp, peer.handle, 0, host="127.0.0.1"))
        worker = StubWorker(0, nursery, plugins or StubPlugins())
        bench = Bench(peer, listeners[0].socket.getsockname()[1], worker)
        nursery.start_soon(bench.session.run)
        with trio.fail_after(60):
            await bench.flow.open.wait()
            await trio.testing.wait_all_tasks_blocked()
            yield bench
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("leave", [False, True])
async def test_news_that_come_right_behind_an_event_without_data_are_not_missed(
    leave: bool,
) -> None:
    async with open_idle() as bench:
        bench.session._stream._socket.notify(select.EPOLLPRI)
        # Nothing runs in between: the session is on its way to find that there is no data.
        if leave:
            bench.session.leave()
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
