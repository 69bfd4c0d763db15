"""Connections of a flow: how many it opens, and which of them send."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.outbound import flow, session
from tests.outbound.kit import Bench, PeerConnection, open_bench


async def test_not_each_message_that_waits_gets_a_connection() -> None:
    async with open_bench(domain_maxconnections=0) as bench:
        for _ in range(500):
            bench.send()
        await bench.results("success", 500)
        assert bench.peer.connections <= 32


@pytest.mark.parametrize(("near", "least", "most"), [(1.0, 100, 180), (0.0, 200, 400)])
async def test_many_flows_to_near_peers_have_one_connection_each(
    monkeypatch: pytest.MonkeyPatch, near: float, least: int, most: int
) -> None:
    """The first flows are not many yet."""
    monkeypatch.setattr(flow, "NEAR_SECONDS", near)
    monkeypatch.setattr(flow, "STALL_SECONDS", 60.0)
    async with open_bench() as bench:
        for number in range(1000):
            bench.send(recipient=f"c{number}@d{number % 100}.test")
        await bench.results("success", 1000)
        assert least <= bench.peer.connections <= most


async def test_idle_flows_leave_a_near_one_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "NEAR_SECONDS", 1.0)
    monkeypatch.setattr(flow, "STALL_SECONDS", 60.0)
    async with open_bench(connection_maxidle=60_000, domain_maxconnections=0) as bench:
        for number in range(50):
            bench.send(recipient=f"c@d{number}.test")
        await bench.results("success", 50)
        for _ in range(500):
            bench.send(recipient="c@d7.test")
        await bench.results("success", 550)
        assert len(bench.dispatcher.flows.live) >= 50
        assert bench.peer.connections > 60


class Gate:
    """Makes peers wait before they answer a body with the word "slow"."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = trio.Event()
        self.waiting = 0
        self._monkeypatch = monkeypatch

    async def script(self, peer: PeerConnection) -> None:
        read = peer.body

        async def body() -> bytes:
            data = await read()
            if b"slow" in data:
                self.waiting += 1
                await self.opened.wait()
                self.waiting -= 1
            return data

        self._monkeypatch.setattr(peer, "body", body)
        await peer.serve()


@asynccontextmanager
async def open_near(
    monkeypatch: pytest.MonkeyPatch, *, near: float, spare: float, pipelines: bool = True
) -> AsyncIterator[tuple[Bench, Gate]]:
    """A bench with idle connections to one peer, and 20 results so far."""
    monkeypatch.setattr(flow, "NEAR_SECONDS", near)
    monkeypatch.setattr(flow, "SPARE_SECONDS", spare)
    monkeypatch.setattr(flow, "STALL_SECONDS", 60.0)
    monkeypatch.setattr(session, "PROMPT_SECONDS", 60.0)
    gate = Gate(monkeypatch)
    settings: Any = {"connection_maxidle": 60_000, "smtp_out_timeout": 60}
    async with open_bench(*[gate.script] * 50, **settings) as bench:
        if not pipelines:
            bench.peer.extensions = ()
        for _ in range(20):
            bench.send(body="slow\r\n")
        await bench.until(lambda _: bench.peer.connections >= 4)
        gate.opened.set()
        await bench.results("success", 20)
        await bench.until(lambda figures: figures["idle"] == bench.peer.connections)
        gate.opened = trio.Event()
        yield bench, gate


@pytest.mark.parametrize(
    ("near", "pipelines", "connections"), [(1.0, True, 1), (0.0, True, 2), (1.0, False, 2)]
)
async def test_mail_to_a_near_peer_goes_along_with_mail_under_way_while_connections_are_idle(
    monkeypatch: pytest.MonkeyPatch, near: float, pipelines: bool, connections: int
) -> None:
    terms: Any = {"near": near, "pipelines": pipelines}
    async with open_near(monkeypatch, spare=60.0, **terms) as (bench, _):
        for number in range(1, 11):
            bench.send()
            bench.send()
            await bench.results("success", 20 + 2 * number)
            used = {mail.connection for mail in bench.peer.mails[-2:]}
            assert len(used) == connections


async def test_mail_to_a_near_peer_that_is_slow_once_takes_an_idle_connection_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_near(monkeypatch, near=1.0, spare=0.01) as (bench, gate):
        connections = bench.peer.connections
        bench.send(body="slow\r\n")
        await bench.until(lambda _: gate.waiting == 1)
        bench.send()
        await bench.results("success", 21)
        assert bench.peer.mails[-1].body == b"hi\r\n"
        gate.opened.set()
        await bench.results("success", 22)
        assert bench.peer.connections == connections


async def test_a_near_peer_that_was_slow_with_mail_behind_gets_all_mail_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "WITHDRAW_SECONDS", 0.01)
    async with open_near(monkeypatch, near=1.0, spare=60.0) as (bench, gate):
        bench.send(body="slow\r\n")
        bench.send()  # goes ahead, and is withdrawn
        await bench.results("success", 21)
        gate.opened.set()
        await bench.results("success", 22)
        await bench.until(lambda figures: figures["idle"] >= 2)
        bench.send()
        bench.send()
        await bench.results("success", 24)
        assert len({mail.connection for mail in bench.peer.mails[-2:]}) == 2


async def test_more_mail_than_suits_the_busy_sessions_wakes_idle_ones_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_near(monkeypatch, near=1.0, spare=60.0) as (bench, gate):
        before = len(bench.peer.mails)
        for _ in range(20):
            bench.send(body="slow\r\n")
        await bench.until(lambda figures: figures["idle"] == 0)
        gate.opened.set()
        await bench.results("success", 40)
        assert len({mail.connection for mail in bench.peer.mails[before:]}) >= 4


async def test_a_message_that_waits_behind_a_slow_one_gets_a_connection_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flow, "STALL_SECONDS", 0.05)

    async def stalls(peer: PeerConnection) -> None:
        await peer.hello()
        await trio.sleep_forever()

    async with open_bench(*[stalls] * 3, smtp_out_timeout=60) as bench:
        for _ in range(4):
            bench.send()
        await bench.results("success", 1)
        assert bench.peer.connections == 4


async def test_a_peer_that_closes_after_each_mail_costs_no_attempt() -> None:
    async def closes(peer: PeerConnection) -> None:
        await peer.hello()
        for _ in range(3):
            await peer.line()
        await peer.send("250 ok\r\n250 ok\r\n354 go\r\n")
        await peer.body()
        await peer.send("250 taken\r\n")

    async with open_bench(*[closes] * 1000) as bench:
        for _ in range(200):
            bench.send()
        results = await bench.results("success", 200)
        assert {result["attempt"] for result in results} == {1}
        assert bench.queues["retry"] == []


async def test_mail_leaves_from_the_address_that_can_send() -> None:
    blocked = "127.0.0.3"

    async def by_address(peer: PeerConnection) -> None:
        if peer.stream.socket.getpeername()[0] == blocked:
            await peer.send("554 5.7.1 your address is blocked\r\n")
        else:
            await peer.serve()

    async with open_bench(*[by_address] * 100) as bench:
        for _ in range(60):
            bench.send(ips=[blocked, "127.0.0.4", "127.0.0.5"])
        await bench.queues.until(lambda queues: len(queues["success"]) + len(queues["retry"]) >= 60)
        assert len(bench.queues["retry"]) <= 1
        used = {message.results[-1]["from"] for message in bench.queues["success"]}
        assert used
        assert blocked not in used
