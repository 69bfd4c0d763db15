"""Pauses: what a destination with waiting mail costs while nothing can be sent there."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from mailerq import Engine
from mailerq.message import format_time
from mailerq.net.resolver import Host, NoHosts
from mailerq.net.slots import Slots
from mailerq.outbound import flow, flows
from mailerq.outbound.flow import LEAST_WINDOW
from mailerq.outbound.pause import Pause
from tests.outbound.kit import Bench, PeerConnection, StubResolver, open_bench
from tests.outbound.memory_queues import NOW
from tests.support import configure, until

CLOSED = {"hostname": "127.0.0.1", "port": 1}
"""A host on which nobody listens."""

DESTINATIONS = 1000
MOST_BYTES = 1500
"""Of memory for a destination, its place in the queue included; 1,000 are used."""


async def is_silent(peer: PeerConnection) -> None:
    await trio.sleep_forever()


async def says_421(peer: PeerConnection) -> None:
    await peer.send("421 4.3.2 not now\r\n")


def pauses_of(bench: Bench) -> list[Pause]:
    return list(bench.dispatcher.flows.pauses.values())


def destinations_of(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = bench.dispatcher._intake._destinations
    return found


async def at_rest(bench: Bench) -> None:
    await bench.queues.until(lambda queues: not queues.leased)


# Memory


@asynccontextmanager
async def open_engine(directory: Path, port: int) -> AsyncIterator[Engine]:
    """An engine whose mail all goes to one port of this host, over few connections."""
    config = configure(
        directory,
        smtp_sink_address="127.0.0.1",
        smtp_sink_port=port,
        smtp_connections=40,
        smtp_out_timeout=60.0,
        shutdown_timeout=0.1,
    )
    async with Engine(config) as engine:
        yield engine


async def publish(engine: Engine, count: int) -> None:
    """Publish three messages to each of some destinations."""

    async def some(first: int) -> None:
        for number in range(first, 3 * count, 100):
            domain = f"destination-{number % count}.example.test"
            mail = {"envelope": "a@b.test", "recipient": f"c@{domain}", "mime": "Subject: x\r\n"}
            await engine.publish(mail)

    async with trio.open_nursery() as nursery:
        for first in range(100):
            nursery.start_soon(some, first)


@pytest.mark.parametrize("kind", ["refusing", "silent"])
async def test_a_destination_that_cannot_be_reached_is_small(tmp_path: Path, kind: str) -> None:
    with trio.socket.socket() as sock:
        await sock.bind(("127.0.0.1", 0))
        if kind == "silent":
            sock.listen(1000)
        async with open_engine(tmp_path, sock.getsockname()[1]) as engine:
            (delivery,) = engine._deliveries.values()
            all_flows = delivery.dispatcher.flows

            trying = 20 if kind == "silent" else 0

            async def publish_and_wait(count: int) -> int:
                await publish(engine, count)
                await until(
                    lambda: (
                        len(all_flows.pauses) >= count - trying
                        and len(all_flows.live) <= trying
                        and delivery.dispatcher.in_memory <= LEAST_WINDOW * trying
                    )
                )
                gc.collect()
                return tracemalloc.get_traced_memory()[0]

            tracemalloc.start()
            try:
                # Connections that silent hosts hold are there before.
                before = await publish_and_wait(100)
                used = await publish_and_wait(100 + DESTINATIONS)
            finally:
                tracemalloc.stop()
    assert (used - before) / DESTINATIONS < MOST_BYTES


async def test_of_a_host_that_refuses_only_a_pause_is_kept() -> None:
    async with open_bench(*[says_421] * 20) as bench:
        for number in range(20):
            bench.send(recipient=f"c@d{number % 10}.test")
        await bench.results("retry", 10)
        await at_rest(bench)
        assert len(pauses_of(bench)) == 10
        assert list(bench.dispatcher.flows.live) == []
        assert not bench.dispatcher._sites._found
        assert bench.dispatcher.statistics()["destinations"] == 10


async def test_a_pause_without_mail_is_forgotten_when_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flow, "ASK_SECONDS", 0.2)
    async with open_bench(says_421) as bench:
        bench.send(maxattempts=1)
        await bench.results("failure")
        assert len(pauses_of(bench)) == 1
        await bench.until(lambda found: found["destinations"] == 0)
        assert destinations_of(bench) == {}
        assert len(bench.dispatcher.flows.looks) == 0


# Behaviour across pauses


async def test_fresh_mail_for_a_flow_that_is_down_stays_in_the_queue() -> None:
    async with open_bench(says_421) as bench:
        for _ in range(3):
            bench.send()
        await bench.retried()
        await at_rest(bench)
        takes = bench.queues.subscriptions["outbox"].takes
        before = list(takes)
        for _ in range(50):
            bench.send()
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert not bench.queues.leased
        assert takes == before
        assert bench.dispatcher.statistics()["attempts"] == 1
        bench.dispatcher.flush()
        await bench.results("success", 52)


async def test_a_retry_time_that_passes_during_the_commit_asks_the_host() -> None:
    async with open_bench(*[says_421] * 2) as bench:
        bench.queues.may_ack = trio.Event()
        for _ in range(3):
            bench.send()
        await bench.until(lambda found: found["attempts"] == 1)
        bench.queues.now += 10_000
        bench.queues.may_ack.set()
        await bench.results("retry", 2)
        await at_rest(bench)
        assert bench.dispatcher.statistics()["attempts"] == 2


async def test_failures_are_counted_across_pauses_until_a_host_lets_mail_in() -> None:
    async with open_bench(*[says_421] * 4) as bench:
        for _ in range(10):
            bench.send()
        for count in range(1, 5):
            await bench.results("retry", count)
            await at_rest(bench)
            (pause,) = pauses_of(bench)
            assert pause.failures == count
            bench.dispatcher.flush()
        await bench.results("success", 6)
        (alive,) = bench.dispatcher.flows.live
        assert (alive._failures, alive.down) == (0, False)
        # Each ask was an attempt of one message, and of no other.
        attempts = [result["attempt"] for result in await bench.results("success", 6)]
        assert set(attempts) == {1}


async def test_mail_for_a_silent_host_expires_while_it_waits_for_a_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flows, "MAX_ASK_SECONDS", 0.1)
    settings: dict[str, Any] = {"smtp_out_timeout": 600.0, "slots": Slots(4)}
    async with open_bench(*[is_silent] * 20, **settings) as bench:
        for number in range(3):
            bench.send(recipient=f"c@silent{number}.test")
        await bench.until(lambda found: found["opening"] == 1 and found["destinations"] == 3)
        await bench.until(lambda found: len(pauses_of(bench)) == 2)
        tried = bench.peer.connections
        for number in range(3):
            for _ in range(30):
                late = format_time(NOW + 60)
                bench.send(recipient=f"d@silent{number}.test", maxdelivertime=late)
        bench.queues.now += 3600
        # One host is tried with its mail in memory; the others wait.
        await bench.queues.until(lambda queues: len(queues["failure"]) >= 60)
        kinds = {message.results[-1]["type"] for message in bench.queues["failure"]}
        assert kinds == {"expired"}
        assert bench.peer.connections <= tried + 1
        assert bench.queues["retry"] == []


async def test_destinations_of_a_flow_that_is_down_ask_in_turn() -> None:
    smarthost: Any = {"smarthost": "127.0.0.1"}
    async with open_bench(*[says_421] * 100, **smarthost) as bench:
        for number in range(30):
            bench.send(recipient=f"c@d{number % 3}.test")
        for count in range(1, 7):
            await bench.results("retry", count)
            await at_rest(bench)
            assert len(pauses_of(bench)) == 1
            bench.dispatcher.flush()
        await bench.results("retry", 7)
        domains = [message.recipient.partition("@")[2] for message in bench.queues["retry"]]
        # The first message found the host down; from then on the domains take turns.
        assert all(len(set(domains[n : n + 3])) == 3 for n in range(1, 5)), domains


async def test_mail_leaves_a_pause_when_its_domain_has_moved() -> None:
    class Moving(StubResolver):
        host_name = "old.test"

        async def mail_hosts(self, domain: str) -> tuple[Host, ...] | NoHosts:
            await trio.lowlevel.checkpoint()
            return (Host(self.host_name, "127.0.0.1"),)

    resolver = Moving()
    async with open_bench(says_421, resolver=resolver) as bench:
        for _ in range(5):
            bench.send()
        await bench.retried()
        await at_rest(bench)
        resolver.host_name = "new.test"
        bench.dispatcher.flush()
        await bench.results("success", 4)
        assert pauses_of(bench) == []


async def test_changed_routes_free_the_mail_of_a_pause() -> None:
    async with open_bench(says_421) as bench:
        for _ in range(5):
            bench.send()
        await bench.retried()
        await at_rest(bench)
        (pause,) = pauses_of(bench)
        assert len(list(pause.destinations)) == 1
        bench.dispatcher.reload(None, reroute=True)
        # The mail is judged anew; its flow is still down, and remembers that.
        await at_rest(bench)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert pauses_of(bench) == [pause]
        assert len(list(pause.destinations)) == 1
        bench.dispatcher.flush()
        await bench.results("success", 4)


async def test_what_pauses_keep_is_gone_when_deliveries_stop() -> None:
    async with open_bench(*[is_silent] * 20, slots=Slots(4), smtp_out_timeout=60.0) as bench:
        for number in range(5):
            bench.send(recipient=f"c@silent{number}.test")
        await bench.until(lambda found: len(pauses_of(bench)) == 4)
        await bench.dispatcher.stop(0)
        openings = bench.dispatcher.openings
        assert (openings._quick, openings._patient, openings._trying) == (0, 0, {})
        assert not any(pause.line or pause.reserved for pause in pauses_of(bench))
        assert not openings._quick_line
        assert not openings._patient_line
