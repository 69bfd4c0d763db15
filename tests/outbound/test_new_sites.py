"""Mail for many sites that have let nobody in yet: how often it is read, and what it waits for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import trio

from mailerq.message import Message
from mailerq.net.resolver import Host, NoHosts
from mailerq.net.slots import Slots
from mailerq.outbound import intake, session
from mailerq.outbound.openings import Openings
from mailerq.queues.interface import Taken
from tests.outbound.kit import Bench, PeerConnection, StubResolver, open_bench
from tests.outbound.memory_queues import MemorySubscription
from tests.outbound.test_flows import Found, Wanted, watch_takes
from tests.outbound.test_pauses import is_silent, says_421

EACH = 4


class Reads:
    """The reads of the queue: how many takes each has, and how many messages each take finds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.takes: list[int] = []
        self.messages: list[int] = []
        watch_takes(monkeypatch, self._noted)

    def _noted(self, wanted: Wanted, found: Found) -> None:
        self.takes.append(len(wanted))
        self.messages += [len(taken.leases) for taken in found if isinstance(taken, Taken)]


def fill(bench: Bench, domains: list[str], each: int = EACH) -> None:
    """Queue mail for some domains in turns; all of it comes due at once."""
    for number in range(len(domains) * each):
        recipient = f"c{number}@{domains[number % len(domains)]}"
        message = Message({"envelope": "a@b.test", "recipient": recipient}, b"hi\r\n")
        bench.queues.put(message, bench.queues.now + 10)
    bench.queues.pass_time(10)


class SharedHost(StubResolver):
    """All domains exist; some share a host, and each other domain has its own."""

    def __init__(self, *sharing: str) -> None:
        super().__init__()
        self.sharing = sharing

    async def mail_hosts(self, domain: str) -> tuple[Host, ...] | NoHosts:
        await trio.lowlevel.checkpoint()
        return (Host("shared.test" if domain in self.sharing else domain, "127.0.0.1"),)


def make_busy(bench: Bench) -> None:
    """Have the dispatcher believe that many flows send to near peers, for good."""
    bench.dispatcher.flows._many, bench.dispatcher.flows._counted_until = True, math.inf


def domains(count: int) -> list[str]:
    return [f"d{number}.test" for number in range(count)]


async def test_pauses_that_ask_at_one_time_have_their_mail_read_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_bench(*[says_421] * 20) as bench:
        for domain in domains(20):
            for _ in range(2):
                bench.send(recipient=f"c@{domain}")
        await bench.results("retry", 20)
        await bench.until(lambda _: len(bench.dispatcher.flows.pauses) == 20)
        reads = Reads(monkeypatch)
        bench.dispatcher.flush()
        await bench.results("success", 20)
    assert reads.takes[0] == 20


async def test_a_pause_whose_mail_takes_several_reads_does_not_delay_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mail of a site with two domains takes two reads."""
    goes_on = trio.Event()
    take_each = MemorySubscription.take_each
    reads = 0

    async def slow(self: MemorySubscription, wanted: Wanted) -> Found:
        nonlocal reads
        reads += 1
        if reads > 1:
            await goes_on.wait()
        return await take_each(self, wanted)

    async with open_bench(*[says_421] * 2, resolver=SharedHost("a.test", "b.test")) as bench:
        for domain in ("one.test", "a.test", "b.test"):
            for _ in range(2):
                bench.send(recipient=f"c@{domain}")
        await bench.results("retry", 2)
        await bench.until(lambda _: len(bench.dispatcher.flows.pauses) == 2)
        monkeypatch.setattr(MemorySubscription, "take_each", slow)
        bench.dispatcher.flush()
        await bench.results("success", 1)
        assert bench.peer.mails[0].recipient == "c@one.test"
        goes_on.set()
        await bench.results("success", 4)


async def test_a_flow_that_waited_for_its_first_try_begins_with_several_messages() -> None:
    steps = [trio.Event(), trio.Event()]

    def waits(event: trio.Event) -> object:
        async def script(peer: PeerConnection) -> None:
            await event.wait()
            await peer.serve()

        return script

    async with open_bench(*map(waits, steps), slots=Slots(4), domain_maxconnections=1) as bench:
        fill(bench, domains(2))  # and one of four slots may be used for a try
        await bench.until(lambda found: len(bench.dispatcher.flows.pauses) == 1)
        steps[0].set()
        await bench.until(lambda found: bench.peer.connections == 2)
        (second,) = (each for each in bench.dispatcher.flows.live if each.opening)
        assert len(second.jobs) == EACH
        steps[1].set()
        await bench.results("success", 2 * EACH)


async def test_one_idle_connection_ends_for_a_flow_that_waits_and_keeps_its_mail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_bench(slots=Slots(3), domain_maxconnections=1) as bench:
        for count, domain in enumerate(domains(3), 1):
            bench.send(recipient=f"c@{domain}")
            await bench.results("success", count)
        assert bench.dispatcher.statistics()["idle"] == 3
        reads = Reads(monkeypatch)
        for number in range(8):
            bench.send(recipient=f"c{number}@new.test")
        await bench.results("success", 3 + 8)
        assert bench.peer.connections == 4
        assert reads.messages == []
        assert len(bench.dispatcher.flows.live) == 3


def test_a_flow_that_is_let_in_while_it_waits_for_a_slot_waits_in_one_line() -> None:
    class Waiting:
        proven = False

    flow: Any = Waiting()
    worker: Any = None
    openings = Openings(Slots(0), worker)
    assert not openings.take(flow)
    flow.proven = True
    assert not openings.take(flow)
    assert openings.waiting == 1


async def test_a_busy_machine_reads_mail_for_new_sites_when_they_can_be_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intake, "SORT_SECONDS", 60.0)
    reads = Reads(monkeypatch)
    async with open_bench(slots=Slots(80)) as bench:  # 20 tries
        make_busy(bench)
        fill(bench, domains(200))
        await bench.results("success", 200 * EACH)
    # The first read takes a message of each destination that it cannot have tried.
    assert sum(reads.messages) <= 200 * EACH + 100


async def test_mail_for_a_known_site_waits_for_no_try_while_the_machine_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All tries are in use. A domain's site is known once one of its messages is judged."""
    monkeypatch.setattr(session, "QUICK_SECONDS", 600.0)
    scripts = [PeerConnection.serve, *[is_silent] * 20]
    resolver = SharedHost("good1.test", "good2.test")
    settings: dict[str, Any] = {"smtp_out_timeout": 600.0, "slots": Slots(8)}
    async with open_bench(*scripts, resolver=resolver, **settings) as bench:
        make_busy(bench)
        bench.send(recipient="c@good1.test")
        await bench.results("success")
        fill(bench, [f"silent{number}.test" for number in range(6)], 1)
        await bench.until(lambda _: bench.dispatcher.openings.free_tries == 0)
        fill(bench, ["good2.test"], 1)
        await bench.results("success", 2)
        assert bench.peer.mails[-1].recipient.endswith("@good2.test")
