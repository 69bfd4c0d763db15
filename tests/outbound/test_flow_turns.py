"""Flows take turns: for memory, for connections, and by destination and priority."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.net.slots import Slots
from mailerq.outbound import flow
from tests.outbound.kit import PeerConnection, open_bench


async def test_destinations_of_one_flow_are_served_in_turn() -> None:
    settings: Any = {"smarthost": "smart.test", "rabbitmq_qos": 100}
    async with open_bench(domain_maxconnections=2, **settings) as bench:
        for number in range(2000):
            bench.send(recipient=f"c{number}@bulk.test")
        for number in range(5000):
            bench.send(recipient=f"c@d{number}.test")
        await bench.queues.until(lambda queues: len(queues.queues["success"]) >= 5500)
        small = sum(mail.recipient.startswith("c@d") for mail in bench.peer.mails)
        assert small > 4900  # the bulk has not had more than its turns
        await bench.queues.until(lambda queues: len(queues.queues["success"]) == 7000)
        assert bench.peer.connections <= 4
        assert not bench.queues.leased


async def test_flows_that_wait_for_a_slot_take_turns() -> None:
    settings: Any = {"rabbitmq_qos": 1000, "connection_maxidle": 60_000}
    async with open_bench(slots=Slots(4), **settings) as bench:
        for number in range(1500):
            bench.send(recipient=f"c{number}@bulk{number % 3}.test")
        for number in range(300):
            bench.send(recipient=f"c@d{number}.test")
        await bench.queues.until(lambda queues: len(queues.queues["success"]) == 1800)
        assert bench.peer.most <= 4
        last = max(i for i, mail in enumerate(bench.peer.mails) if mail.recipient.startswith("c@d"))
        assert last < 1700 or bench.peer.mails[-1].recipient.startswith("c@d")
        runs = Counter(mail.connection for mail in bench.peer.mails[:last])
        assert max(runs.values()) <= flow.FAIR_MESSAGES


@pytest.mark.parametrize(("limit", "value", "most"), [("MESSAGES", 5, 5), ("SECONDS", 0.0, 1)])
async def test_a_connection_gives_way_after_its_share_when_others_wait(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: float, most: int
) -> None:
    monkeypatch.setattr(flow, f"FAIR_{limit}", value)
    async with open_bench(slots=Slots(1)) as bench:
        for number in range(60):
            bench.send(recipient=f"c{number}@d{number % 2}.test")
        await bench.results("success", 60)
        runs = Counter(mail.connection for mail in bench.peer.mails)
        assert max(list(runs.values())[:-1]) == most


@pytest.mark.parametrize("most", [4, 8, 40])
async def test_a_flow_without_connection_and_mail_is_not_forgotten_while_others_fill_memory(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Connections change hands, and the flows that have one keep memory full."""
    monkeypatch.setattr(flow, "FAIR_MESSAGES", 10)
    async with open_bench(slots=Slots(4), rabbitmq_qos=most) as bench:
        for number in range(2000):
            bench.send(recipient=f"c{number}@d{number % 10}.test")
        await bench.queues.until(lambda queues: len(queues.queues["success"]) >= 1000)
        counts = Counter(mail.recipient.partition("@")[2] for mail in bench.peer.mails)
        assert len(counts) == 10
        assert min(counts.values()) > 50, counts
        await bench.queues.until(lambda queues: len(queues.queues["success"]) == 2000)


async def test_mail_for_one_more_destination_waits_for_few_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flow, "FAIR_MESSAGES", 1)
    async with open_bench(slots=Slots(1)) as bench:
        for number in range(1000):
            bench.send(recipient=f"c{number}@d{number % 50}.test")
        await bench.queues.until(lambda queues: len(queues.queues["success"]) >= 200)
        assert len({mail.recipient.partition("@")[2] for mail in bench.peer.mails}) == 50
        before = len(bench.peer.mails)
        bench.send(recipient="c@fresh.test")

        def place() -> int | None:
            found = (mail.recipient for mail in bench.peer.mails)
            return next((n for n, each in enumerate(found) if each == "c@fresh.test"), None)

        await bench.queues.until(lambda queues: place() is not None)
        assert place() - before < 10  # type: ignore[operator]
        await bench.results("success", 1001)


async def test_mail_of_a_higher_priority_goes_before_other_mail_of_a_flow() -> None:
    settings: Any = {"smarthost": "smart.test", "domain_maxconnections": 1}
    async with open_bench(**settings) as bench:
        go_on = trio.Event()

        async def waits(peer: PeerConnection) -> None:
            await go_on.wait()
            await peer.serve()

        bench.peer.scripts.append(waits)
        for number in range(20):
            bench.send(recipient=f"c@d{number}.test", priority=number % 3)
        await bench.until(lambda figures: figures["opening"] == 1)
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
        await bench.results("success", 20)
        numbers = [int(mail.recipient[3:].partition(".")[0]) for mail in bench.peer.mails]
        assert [number % 3 for number in numbers] == 6 * [2] + 7 * [1] + 7 * [0]


async def test_an_idle_connection_is_closed_for_a_flow_that_waits() -> None:
    async with open_bench(slots=Slots(1), connection_maxidle=60_000) as bench:
        bench.send(recipient="c@one.test")
        await bench.results("success")
        assert bench.dispatcher.statistics()["idle"] == 1
        bench.send(recipient="c@two.test")
        await bench.results("success", 2)


async def test_flows_that_wait_are_forgotten_when_deliveries_stop() -> None:
    async with open_bench(slots=Slots(1), connection_maxidle=60_000) as bench:

        async def stalls(peer: PeerConnection) -> None:
            await peer.hello()
            await trio.sleep_forever()

        bench.peer.scripts += [stalls] * 3
        for number in range(20):
            bench.send(recipient=f"c@d{number}.test")
        await bench.until(lambda figures: figures["connections"] == 1)
        await bench.dispatcher.stop(0)
        assert not bench.dispatcher.openings.contended
        assert bench.dispatcher.openings.slots.used == 0
        assert not bench.queues.leased
