"""Flows: order of sending, waiting and its cost, and recovery of a host that was down."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from time import monotonic
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.errors import QueueError
from mailerq.message import Message, format_time
from mailerq.net.resolver import Host, NoHosts
from mailerq.net.slots import Slots
from mailerq.outbound import bodies, flow, openings, sites
from mailerq.outbound.flow import LEAST_WINDOW
from mailerq.outbound.sites import Sites
from mailerq.queues.interface import Taken
from mailerq.rules import routes
from mailerq.rules.routes import Route
from tests.outbound.kit import Bench, PeerConnection, StubResolver, open_bench
from tests.outbound.memory_queues import NOW, MemoryQueues, MemorySubscription

Handler = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[dict[str, Any]]:
    """Another server; yields the property smarthost for it."""
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
        yield {"hostname": "127.0.0.1", "port": listeners[0].socket.getsockname()[1]}
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_wide(**settings: Any) -> AsyncIterator[Bench]:
    """A bench that can reach other servers too; its own has the mail of quick.test."""
    resolver = StubResolver(quick_test=["127.0.0.1"])
    async with open_bench(resolver=resolver, **settings) as bench:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(routes, "SMTP_PORT", bench.port)
            yield bench


async def silent(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


def takes(bench: Bench) -> list[tuple[str, int]]:
    return bench.queues.subscriptions["outbox"].takes


class Mailhosts(StubResolver):
    """Knows the (preference, host) pairs of some domains; all hosts are at 127.0.0.1."""

    def __init__(self, domains: dict[str, list[tuple[int, str]]]) -> None:
        super().__init__()
        self.hosts = domains
        self.lookups: Counter[str] = Counter()

    async def mail_hosts(self, domain: str) -> tuple[Host, ...] | NoHosts:
        await trio.lowlevel.checkpoint()
        self.lookups[domain] += 1
        return tuple(Host(name, "127.0.0.1", rank) for rank, name in self.hosts[domain])


# Sites


async def test_domains_with_the_same_hosts_share_connections_and_their_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    domains = {
        "one.test": [(10, "mx1.test"), (20, "mx2.test")],
        "two.test": [(1, "mx1.test"), (2, "MX2.test")],
    }
    resolver = Mailhosts(domains)
    async with open_bench(resolver=resolver, domain_maxconnections=1) as bench:
        monkeypatch.setattr(routes, "SMTP_PORT", bench.port)
        for number in range(20):
            bench.send(recipient=f"c@{('one', 'two')[number % 2]}.test")
        await bench.results("success", 20)
        assert bench.peer.connections == 1
        assert resolver.lookups == {"one.test": 1, "two.test": 1}


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ([(10, "a.x.test"), (10, "b.y.test")], [(10, "a.y.test"), (10, "b.x.test")]),
        ([(10, "a.test"), (20, "b.test")], [(10, "b.test"), (20, "a.test")]),
        ([(10, "a.test"), (20, "b.test")], [(10, "a.test"), (10, "b.test")]),
        ([(10, "a.test")], [(10, "a.test"), (20, "b.test")]),
    ],
)
async def test_domains_with_other_hosts_or_preferences_share_nothing(
    one: list[tuple[int, str]], two: list[tuple[int, str]]
) -> None:
    sites = Sites(Mailhosts({"one.test": one, "two.test": two}), str)  # type: ignore[arg-type]
    first = await sites.find(Route("one.test", "one.test", 25, mx=True))
    second = await sites.find(Route("two.test", "two.test", 25, mx=True))
    other_port = await sites.find(Route("one.test", "one.test", 26, mx=True))
    assert first is not second
    assert first is not other_port
    assert first is await sites.find(Route("one.test", "one.test", 25, mx=True))


async def test_lookups_are_bounded_in_number() -> None:
    class Slow(StubResolver):
        running = most = 0

        async def mail_hosts(self, domain: str) -> tuple[Host, ...] | NoHosts:
            self.running += 1
            self.most = max(self.most, self.running)
            await may_end.wait()
            self.running -= 1
            return await super().mail_hosts(domain)

    may_end = trio.Event()
    resolver = Slow()
    async with open_bench(resolver=resolver) as bench:
        for number in range(500):
            bench.send(recipient=f"c@d{number}.test")
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert resolver.most == 64
        assert len(bench.queues.leased) <= 256  # the others lie in the queue
        may_end.set()
        await bench.results("retry", 500)


# Hosts that do not answer


async def test_a_silent_host_does_not_delay_another() -> None:
    async with (
        open_wide(slots=Slots(20), smtp_out_timeout=600.0) as bench,
        listening(silent) as smarthost,
    ):
        for number in range(50):
            bench.send(recipient=f"c{number}@slow.test", smarthost=smarthost)
        await bench.until(lambda figures: figures["opening"] > 0)
        for number in range(50):
            bench.send(recipient=f"c{number}@quick.test")
        with trio.fail_after(60):
            await bench.results("success", 50)
        figures = bench.dispatcher.statistics()
        assert figures["opening"] == 1
        assert figures["attempts"] == 50


async def test_many_silent_hosts_have_a_part_of_the_slots_and_no_more() -> None:
    hosts = [f"127.1.0.{number}" for number in range(1, 60)]
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, silent, 0, host="0.0.0.0"))
        port = listeners[0].socket.getsockname()[1]
        async with open_wide(slots=Slots(20), smtp_out_timeout=600.0) as bench:
            bench.send(recipient="c@quick.test")
            await bench.results("success")
            for host in hosts:
                bench.send(smarthost={"hostname": host, "port": port})
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert bench.dispatcher.statistics()["opening"] == 20 // openings.TRY_SHARE
            for number in range(50):
                bench.send(recipient=f"c{number}@quick.test")
            await bench.results("success", 51)
            # One that nobody knows yet has its turn soon, and then all the silent ones have theirs.
            bench.send(smarthost={"hostname": "127.0.0.1", "port": bench.port})
            with trio.fail_after(60):
                await bench.results("success", 52)
            assert bench.dispatcher.statistics()["attempts"] == 52
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("qos", [2, 8])
async def test_many_silent_hosts_have_a_part_of_the_memory_and_no_more(qos: int) -> None:
    slots = Slots(1000)
    async with (
        open_wide(slots=slots, rabbitmq_qos=qos, smtp_out_timeout=600.0) as bench,
        AsyncExitStack() as stack,
    ):
        for _ in range(40):
            target = await stack.enter_async_context(listening(silent))
            for _ in range(3):
                bench.send(smarthost=target)
        await bench.until(lambda found: found["opening"] >= min(qos // 2, 2))
        bench.send("c@quick.test")
        await bench.results("success", 1)


async def test_a_host_that_answers_a_process_that_stood_still_is_not_taken_for_silent() -> None:
    async def stands_still(peer: PeerConnection) -> None:
        time.sleep(1.2 * openings.QUICK_SECONDS)  # noqa: ASYNC251 - the session stands still too
        await peer.serve()

    async with (
        open_wide(rabbitmq_qos=8, smtp_out_timeout=600.0) as bench,
        AsyncExitStack() as stack,
    ):
        for _ in range(8):
            bench.send(smarthost=await stack.enter_async_context(listening(silent)))
        # Patient tries are all taken now, until the timeout.
        await bench.until(lambda _: bench.dispatcher.openings._patient == 8 // openings.TRY_SHARE)
        bench.peer.scripts.append(stands_still)
        bench.send("c@quick.test")
        await bench.results("success")
        assert bench.peer.connections == 1


async def test_what_waits_for_a_host_that_is_down_costs_neither_results_nor_writes() -> None:
    async with open_wide() as bench, listening(silent) as smarthost:
        smarthost["port"] = 1  # nobody listens there
        for number in range(300):
            bench.send(recipient=f"c{number}@down.test", smarthost=smarthost)
        await bench.retried()
        await bench.queues.until(lambda queues: not queues.leased)
        assert sum(bench.queues.groups) == 1
        reads = len(takes(bench))
        for number in range(300):
            bench.send(recipient=f"d{number}@down.test", smarthost=smarthost)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert sum(bench.queues.groups) == 1
        assert len(takes(bench)) == reads
        assert len(bench.queues["outbox"]) == 600
        untouched = [m for m in bench.queues["outbox"] if not m.results]
        assert len(untouched) == 599


async def test_each_ask_is_one_attempt_and_the_pause_between_doubles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = monotonic()
    monkeypatch.setattr(flow, "monotonic", lambda: clock)
    async with open_wide() as bench:
        for number in range(300):
            bench.send(
                recipient=f"c{number}@down.test", smarthost={"hostname": "127.0.0.1", "port": 1}
            )
        await bench.retried()
        pauses = []
        for count in range(2, 9):
            (one,) = bench.dispatcher.flows.pauses.values()
            pauses.append(one.when - clock)
            clock = one.when
            one.look()
            await bench.results("retry", count)
            await bench.queues.until(lambda queues: not queues.leased)
        assert pauses == pytest.approx([30, 60, 120, 240, 480, 600, 600])
        recipients = [message.recipient for message in bench.queues["retry"]]
        assert len(set(recipients)) == len(recipients)


async def test_a_message_that_becomes_due_by_its_own_schedule_asks_at_once() -> None:
    async with open_wide() as bench, listening(silent) as smarthost:
        smarthost["port"] = 1
        bench.send(smarthost=smarthost, retries=[5])
        bench.send(smarthost=smarthost, priority=0)
        await bench.retried()
        await bench.queues.until(lambda queues: not queues.leased)
        bench.queues.pass_time(5)
        await bench.results("retry", 2)


async def test_mail_of_a_host_that_is_down_expires() -> None:
    async with open_wide(max_delivertime=600) as bench, listening(silent) as smarthost:
        smarthost["port"] = 1
        for number in range(250):
            bench.send(recipient=f"c{number}@down.test", smarthost=smarthost)
        await bench.retried()
        await bench.queues.until(lambda queues: not queues.leased)
        bench.queues.now += 3600
        bench.dispatcher.flush()
        await bench.results("failure", 250)
        assert bench.queues["outbox"] == []
        kinds = Counter(message.results[-1]["type"] for message in bench.queues["failure"])
        assert kinds["expired"] >= 249
        assert sum(limit > 100 for _, limit in takes(bench)) == 0


async def test_a_host_that_comes_back_gets_one_connection_then_two_then_four() -> None:
    up = False
    opened: list[int] = []
    may_greet = [trio.Event() for _ in range(100)]

    async def serve(peer: PeerConnection) -> None:
        if not up:
            await peer.send("421 4.3.2 not now\r\n")
            return
        opened.append(peer.number)
        await may_greet[len(opened) - 1].wait()
        await peer.serve()

    async with open_bench(*[serve] * 100, domain_maxconnections=0) as bench:
        for _ in range(1000):
            bench.send()
        await bench.retried()
        await bench.queues.until(lambda queues: not queues.leased)
        up = True
        bench.dispatcher.flush()
        for greeted, more in ((0, 1), (1, 2), (2, 4), (4, 8)):
            # Each that is let in makes two of one; those before are busy or wait.
            for event in may_greet[:greeted]:
                event.set()
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert len(opened) <= 2 * more
        for event in may_greet:
            event.set()
        await bench.queues.until(lambda queues: len(queues.queues["success"]) == 999)


async def test_flush_ends_the_pause_of_a_host_that_was_down() -> None:
    async def busy(peer: PeerConnection) -> None:
        await peer.send("421 4.3.2 not now\r\n")

    async with open_bench(busy) as bench:
        for _ in range(10):
            bench.send()
        await bench.retried()
        await bench.queues.until(lambda queues: not queues.leased)
        bench.dispatcher.flush()
        await bench.results("success", 9)


async def test_names_that_are_not_found_are_asked_for_by_one_message() -> None:
    resolver = StubResolver()
    async with open_bench(resolver=resolver) as bench:
        for _ in range(40):
            bench.send()
        result = await bench.retried()
        assert result["type"] == "nohosts"
        await bench.queues.until(lambda queues: not queues.leased)
        assert sum(bench.queues.groups) == 1
        resolver.domains["d.test"] = ["127.0.0.1"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(routes, "SMTP_PORT", bench.port)
            bench.dispatcher.flush()
            await bench.results("success", 39)


async def test_no_flow_waits_for_the_memory_of_others() -> None:
    async with open_wide(rabbitmq_qos=10, smtp_out_timeout=60) as bench:
        bench.send(recipient="c@quick.test")
        await bench.results("success")
        async with listening(silent) as smarthost:
            for number in range(100):
                bench.send(recipient=f"c{number}@slow.test", smarthost=smarthost)
            for number in range(50):
                bench.send(recipient=f"c{number}@quick.test")
            await bench.results("success", 51)
            assert len(bench.queues.leased) <= 10


# Bodies that are fetched late


def with_late_bodies(bench: Bench) -> MemoryQueues:
    bench.queues.late_above = 100
    return bench.queues


async def test_a_large_body_is_fetched_when_it_is_about_to_be_sent() -> None:
    body = "x" * 70 + "\r\n"
    async with open_bench() as bench:
        queues = with_late_bodies(bench)
        bench.peer.answers["RCPT", "e@d.test"] = ["451 4.2.0 later"]
        bench.send(body=10 * body)
        await bench.results("success")
        assert queues.loads == 1
        bench.send(body=20 * body, recipient="e@d.test")
        await bench.retried()
        bench.queues.pass_time(600)
        await bench.results("success", 2)
        sent = [mail.body.decode() for mail in bench.peer.mails if mail.body]
        assert sent == [10 * body, 20 * body]


async def test_what_a_large_body_rules_out_is_found_before_it_is_sent() -> None:
    async with open_bench() as bench:
        with_late_bodies(bench)
        bench.send(body="Received: by a\r\n" * 101 + "\r\nbody\r\n")
        (result,) = await bench.results("failure")
        assert result["status"] == "5.4.6"
        assert "DATA" not in bench.peer.commands


async def test_a_result_that_keeps_the_mail_gets_the_large_body_too() -> None:
    body = "x" * 700 + "\r\n"
    async with open_bench(max_delivertime=600) as bench:
        with_late_bodies(bench)
        bench.send(body=body, keepmime=True, maxdelivertime=format_time(NOW - 1))
        await bench.results("failure")
        (message,) = bench.queues["failure"]
        assert message.body == body.encode()


@pytest.mark.parametrize("expired", [False, True])
async def test_a_large_body_that_is_damaged_costs_its_message_and_no_other(expired: bool) -> None:
    async with open_bench() as bench:
        queues = with_late_bodies(bench)
        queues.damaged.add(1)
        more = {"maxdelivertime": format_time(NOW - 1)} if expired else {}
        bench.send(body="x" * 700 + "\r\n", keepmime=True, **more)
        await queues.until(lambda _: not queues.leased)
        bench.send(body="y" * 700 + "\r\n")
        await bench.results("success")
        assert len(bench.peer.mails) == 1
        assert queues["outbox"] == queues["failure"] == []


async def test_large_bodies_share_a_bound_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_BYTES", 2500)
    most = 0

    async with open_bench() as bench:
        queues = with_late_bodies(bench)
        load = queues.subscriptions["outbox"].load

        async def watched(lease: Any) -> None:
            nonlocal most
            await load(lease)
            loaded = [len(x.message.body or b"") for x in queues.leased.values() if x.loaded]
            most = max(most, sum(loaded))

        monkeypatch.setattr(queues.subscriptions["outbox"], "load", watched)
        for number in range(30):
            bench.send(body="x" * 998 + "\r\n", recipient=f"c@d{number % 10}.test")
        bench.send(body=9 * ("x" * 998 + "\r\n"))
        await bench.results("success", 31)
        assert queues.loads == 31
        assert most <= 9 * 1000


# The schedule of retries


async def test_what_failed_together_does_not_come_back_together() -> None:
    lots = random.Random(1)
    async with open_bench() as bench:
        bench.dispatcher._settlements._lot = lots.random
        bench.peer.answers["RCPT", ""] = ["450 no"] * 40
        for number in range(40):
            bench.send(recipient=f"c{number}@d.test", **({"retries": [600]} if number < 5 else {}))
        await bench.results("retry", 40)
        dues = {m.recipient: due - NOW for due, m in bench.queues.queues["outbox"]}
        exact = [dues.pop(f"c{number}@d.test") for number in range(5)]
        assert exact == [600] * 5
        assert len(set(dues.values())) == 35
        assert 540 <= min(dues.values()) < 560
        assert 640 < max(dues.values()) <= 660


async def test_a_try_that_is_put_off_at_a_stop_leaves_its_right_to_others() -> None:
    async with open_wide(smtp_out_timeout=60.0) as bench, listening(silent) as target:
        bench.send(smarthost=target)
        await bench.until(lambda found: found["opening"] == 1)
        (flow,) = bench.dispatcher.flows.live
        (session,) = flow.opening
        flow.put_off(session)
        await bench.dispatcher.stop(0)
        openings = bench.dispatcher.openings
        assert (openings._quick, openings._patient) == (0, 0)
        assert openings._trying == {}
        assert not any(pause.line for pause in bench.dispatcher.flows.pauses.values())


async def test_a_backlog_stays_in_the_queue_while_its_hosts_are_looked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sites, "QUICK_SECONDS", 0.05)
    may_answer = trio.Event()

    class Slow(StubResolver):
        lookups = 0

        async def mail_hosts(self, domain: str) -> tuple[Host, ...] | NoHosts:
            self.lookups += 1
            if self.lookups > 1:
                await may_answer.wait()
            return await super().mail_hosts(domain)

    resolver = Slow(quick_test=["127.0.0.1"])
    async with open_bench(resolver=resolver) as bench:
        monkeypatch.setattr(routes, "SMTP_PORT", bench.port)
        bench.send("c@quick.test")
        await bench.results("success", 1)
        bench.dispatcher._sites._found.clear()
        for _ in range(400):
            bench.send("c@quick.test")
        await trio.sleep(0.5)
        assert len(bench.queues.leased) <= 100
        assert len(takes(bench)) < 10
        may_answer.set()
        await bench.results("success", 401)


async def test_large_bodies_that_were_given_back_keep_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bodies, "MAX_BYTES", 1500)
    reading, go = trio.Event(), trio.Event()

    async def leaves(peer: PeerConnection) -> None:
        await peer.hello()
        for reply in ("250 ok", "250 ok", "354 go"):
            await peer.line()
            await peer.send(f"{reply}\r\n")
        await peer.body()
        reading.set()
        await go.wait()
        await peer.send("250 taken\r\n")
        line = await peer.line()
        while line == "RSET":
            await peer.send("250 reset\r\n")
            line = await peer.line()
        await peer.send("421 bye\r\n")

    async def other(stream: trio.SocketStream) -> None:
        await PeerConnection(bench.peer, stream, 99).serve()

    large = "x" * 998 + "\r\n"
    slots = Slots(1)
    async with open_wide(slots=slots) as bench, listening(other) as target:
        bench.peer.scripts.append(leaves)
        with_late_bodies(bench)
        bench.send("c@quick.test")
        await reading.wait()
        bench.send("d@quick.test", body=large)
        bench.send("e@f.test", body=large, smarthost=target)
        await bench.until(lambda found: found["waiting"] == 2)
        go.set()
        await bench.results("success", 3)


async def test_a_slow_peer_gets_no_more_connections_while_other_flows_wait_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flow, "STALL_SECONDS", 0.05)
    reached, goes_on = trio.Event(), trio.Event()

    async def stalls(peer: PeerConnection) -> None:
        await peer.hello()
        reached.set()
        await goes_on.wait()
        await peer.talk()

    async with open_bench(stalls, slots=Slots(2), smtp_out_timeout=60) as bench:
        bench.send(recipient="c1@slow.test")
        await reached.wait()
        bench.peer.scripts += [stalls] * 5
        for number in range(3):
            bench.send(recipient=f"c@d{number}.test")
        (slow,) = (each for each in bench.dispatcher.flows.live if each.site.label == "slow.test")
        bench.send(recipient="c2@slow.test")
        await bench.until(
            lambda figures: figures["connections"] == 2 and not figures["opening"] and slow.jobs
        )
        slow.jobs[0].since -= 1.0
        slow.pump()
        assert not bench.dispatcher.openings.awaits(slow)
        goes_on.set()
        await bench.results("success", 5)


# Memory

Wanted = Sequence[tuple[str, int]]
Found = Sequence[Taken | QueueError]


def watch_takes(monkeypatch: pytest.MonkeyPatch, noted: Callable[[Wanted, Found], object]) -> None:
    """Call `noted` with what each take wanted and found."""
    take_each = MemorySubscription.take_each

    async def watched(self: MemorySubscription, wanted: Wanted) -> Found:
        found = await take_each(self, wanted)
        noted(wanted, found)
        return found

    monkeypatch.setattr(MemorySubscription, "take_each", watched)


async def test_a_session_waits_for_the_commit_that_makes_room_for_more_mail() -> None:
    """Flows wait for the slot, and memory has one message for each."""
    async with open_bench(slots=Slots(1), rabbitmq_qos=2) as bench:
        for number in range(40):
            bench.send(recipient=f"c{number}@d{number % 2}.test")
        await bench.results("success", 40)
        assert bench.peer.connections <= 6


async def test_flows_that_wait_for_room_in_memory_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[int]] = []
    leased: list[int] = []

    def noted(wanted: Wanted, _: Found) -> None:
        groups.append([limit for _, limit in wanted])
        leased.append(bench.dispatcher.in_memory)

    watch_takes(monkeypatch, noted)
    qos = 50 * LEAST_WINDOW  # enough for half of the flows
    async with open_bench(rabbitmq_qos=qos, slots=Slots(100)) as bench:
        for number in range(2000):
            bench.send(recipient=f"c{number}@d{number % 100}.test")
        await bench.results("success", 2000)
    assert max(map(len, groups)) > 10, "one read serves many flows"
    limits = [limit for group in groups for limit in group]
    assert statistics.median(limits) <= LEAST_WINDOW
    assert max(leased) <= 2 * qos + 100 * LEAST_WINDOW


async def test_mail_of_a_flow_that_keeps_up_stays_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []
    watch_takes(monkeypatch, lambda wanted, _: taken.extend(key for key, _ in wanted))
    async with open_bench() as bench:
        for count in (1, 2):
            bench.send()
            await bench.results("success", count)
        for number in range(4 * flow.FIRST_WINDOW - 8):
            bench.send(recipient=f"c{number}@d.test")
        await bench.results("success", 4 * flow.FIRST_WINDOW - 6)
    assert not taken


async def test_mail_of_a_flow_that_does_not_keep_up_waits_in_the_queue() -> None:
    goes_on = trio.Event()

    async def stalls(peer: PeerConnection) -> None:
        await peer.hello()
        await goes_on.wait()
        await peer.talk()

    async with open_bench(*[stalls] * 100, smtp_out_timeout=60) as bench:
        for number in range(20):
            bench.send(recipient=f"c{number}@d.test")
        await bench.until(lambda figures: bool(figures["connections"]) and not figures["opening"])
        (slow,) = bench.dispatcher.flows.live
        assert slow.proven and slow.jobs
        slow.jobs[0].since -= 1.0
        for number in range(400):
            bench.send(recipient=f"e{number}@d.test")
        await bench.until(lambda figures: True)
        assert len(slow.jobs) <= flow.FIRST_WINDOW + 20
        goes_on.set()
        await bench.results("success", 420)


async def test_a_destination_without_a_slot_has_one_message_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Further ones would go back to the queue, and be read again."""
    read: list[int] = []

    def noted(_: Wanted, found: Found) -> None:
        read.extend(len(taken.leases) for taken in found if isinstance(taken, Taken))

    watch_takes(monkeypatch, noted)
    count = 60 * LEAST_WINDOW
    async with open_bench(slots=Slots(2)) as bench:
        for number in range(count):
            recipient = f"c{number}@d{number % 60}.test"
            message = Message({"envelope": "a@b.test", "recipient": recipient}, b"hi\r\n")
            bench.queues.put(message, bench.queues.now + 10)
        bench.queues.pass_time(10)
        await bench.results("success", count)
    assert count <= sum(read) < 1.3 * count


async def test_mail_for_a_new_destination_leaves_while_others_fill_memory() -> None:
    """The queue is full of mail for hosts that take it at once, and each keeps memory full."""
    async with open_bench(rabbitmq_qos=20, slots=Slots(100)) as bench:
        for number in range(3000):
            bench.send(recipient=f"c{number}@d{number % 30}.test")
        await bench.queues.until(lambda queues: len(queues["success"]) >= 300)
        bench.send(recipient="fresh@new.test")
        await bench.until(
            lambda figures: any(mail.recipient == "fresh@new.test" for mail in bench.peer.mails)
        )
        assert bench.dispatcher.counters.delivered < 1500
        await bench.results("success", 3001)
