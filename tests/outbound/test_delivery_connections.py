"""Connections: how many are open, how they are reused, and how they end."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.message import Message
from mailerq.net.slots import Slots
from mailerq.rules import routes
from tests.outbound.kit import Bench, PeerConnection, StubPlugins, StubResolver, open_bench
from tests.outbound.memory_queues import MemoryQueues


class Reject(tuple[int, str]):
    code = property(lambda self: self[0])
    text = property(lambda self: self[1])


async def send_one_by_one(bench: Bench, count: int) -> None:
    for number in range(1, count + 1):
        bench.send()
        await bench.results(count=number)


async def test_a_connection_is_kept_and_used_again() -> None:
    async with open_bench() as bench:
        await send_one_by_one(bench, 3)
        assert bench.peer.connections == 1
        assert [c.split()[0] for c in bench.peer.commands] == [
            "EHLO",
            *("MAIL", "RCPT", "DATA", "RSET") * 3,
        ]
        results = [message.results[-1] for message in bench.queues["results"]]
        assert [result["messages"] for result in results] == [1, 2, 3]


async def test_a_refused_message_does_not_cost_the_connection() -> None:
    async with open_bench() as bench:
        bench.peer.answers["RCPT", "nobody@d.test"] = ["550 who?"]
        bench.send(recipient="nobody@d.test")
        await bench.results("failure")
        bench.send()
        await bench.results("success")
        assert bench.peer.connections == 1
        bench.peer.answers["DATA", "c@d.test"] = ["451 no"]
        bench.send()
        await bench.retried()
        bench.send()
        await bench.results("success", 2)
        assert bench.peer.connections == 1
        assert "RSET" in bench.peer.commands


async def test_a_domain_gets_no_more_connections_than_it_may_have() -> None:
    async with open_bench(domain_maxconnections=3) as bench:
        for _ in range(50):
            bench.send()
        for _ in range(5):
            bench.send(recipient="c@other.test")
        await bench.results(count=55)
        assert bench.dispatcher.statistics()["destinations"] == 2
        assert bench.peer.most <= 6


async def test_all_domains_together_share_the_slots() -> None:
    async with open_bench(slots=Slots(2), connection_maxidle=60_000) as bench:
        for number in range(30):
            bench.send(recipient=f"c@d{number % 10}.test")
        await bench.results(count=30)
        assert bench.peer.most <= 2


async def test_slots_that_somebody_else_frees_are_found() -> None:
    slots = Slots(1)
    slots.take()
    async with open_bench(slots=slots) as bench:
        bench.send()
        await bench.queues.until(lambda queues: len(queues.leased) == 1)
        slots.release()
        await bench.results()


async def test_a_connection_takes_so_many_messages_and_no_more() -> None:
    async with open_bench(connection_maxmessages=2, domain_maxconnections=1) as bench:
        for _ in range(5):
            bench.send()
        await bench.results(count=5)
        assert bench.peer.connections == 3
        assert bench.peer.commands.count("QUIT") >= 2


async def test_a_connection_takes_no_more_messages_than_the_peer_says() -> None:
    async with open_bench(connection_maxmessages=5, domain_maxconnections=1) as bench:
        bench.peer.extensions = ("PIPELINING", "LIMITS MAILMAX=3 RCPTMAX=1")
        for _ in range(10):
            bench.send()
        results = await bench.results("success", count=10)
        assert {result["attempt"] for result in results} == {1}
        taken = Counter(mail.connection for mail in bench.peer.mails)
        assert max(taken.values()) <= 3


async def test_a_connection_takes_no_more_domains_than_the_peer_says() -> None:
    async with open_bench(smarthost="127.0.0.1", domain_maxconnections=1) as bench:
        bench.peer.extensions = ("PIPELINING", "LIMITS RCPTDOMAINMAX=2")
        for number in range(9):
            bench.send(f"c@d{number % 3}.test")
        results = await bench.results("success", count=9)
        assert {result["attempt"] for result in results} == {1}
        domains: dict[int, set[str]] = {}
        for mail in bench.peer.mails:
            domains.setdefault(mail.connection, set()).add(mail.recipient)
        assert max(map(len, domains.values())) == 2


async def test_a_peer_that_closes_at_its_own_count_costs_no_attempt() -> None:
    async def counts(peer: PeerConnection) -> None:
        await peer.hello()
        mails = 0
        while verb := (await peer.line()).partition(" ")[0]:
            if verb == "MAIL" and mails == 2:
                await peer.send("421 4.7.0 too many messages on this connection\r\n")
                return
            await peer.send("354 go\r\n" if verb == "DATA" else "250 2.1.0 ok\r\n")
            if verb == "DATA":
                await peer.body()
                mails += 1
                await peer.send("250 2.0.0 taken\r\n")

    async with open_bench(*[counts] * 10, domain_maxconnections=1) as bench:
        for _ in range(10):
            bench.send()
        results = await bench.results("success", count=10)
        assert {result["attempt"] for result in results} == {1}
        assert not bench.queues["retry"]


async def test_an_idle_connection_ends_with_quit() -> None:
    async with open_bench(connection_maxidle=60) as bench:
        bench.send()
        await bench.results()
        await bench.queues.until(lambda queues: bench.peer.open == 0)
        assert bench.peer.commands[-1] == "QUIT"


async def test_no_more_than_the_prefetch_is_taken_from_the_queue() -> None:
    async with open_bench(rabbitmq_qos=3) as bench:
        bench.queues.may_ack = trio.Event()
        for _ in range(10):
            bench.send()
        await bench.queues.until(lambda queues: len(queues.leased) == 3)
        assert len(bench.queues["outbox"]) == 7
        bench.queues.may_ack.set()
        await bench.results(count=10)


async def test_a_stalled_domain_does_not_hold_up_the_others() -> None:
    async def stalls(peer: PeerConnection) -> None:
        await peer.hello()
        commands = [await peer.line() for _ in range(3)]
        if "slow.test" in commands[1]:
            await trio.sleep_forever()
        await peer.send("250 ok\r\n250 ok\r\n354 go\r\n")
        await peer.body()
        await peer.send("250 taken\r\n")

    settings: Any = {"rabbitmq_qos": 50, "domain_maxconnections": 2, "smtp_out_timeout": 60}
    async with open_bench(*[stalls] * 3, connection_maxidle=100, **settings) as bench:
        for _ in range(200):
            bench.send(recipient="c@slow.test")
        bench.send(recipient="c@quick.test")
        await bench.results("success", 1)
        figures = bench.dispatcher.statistics()
        assert figures["attempts"] == 1
        assert sum(bench.queues.groups) == 1  # nothing was written for those that wait
        assert len(bench.queues["outbox"]) >= 150


# Peers that leave


async def closes_when_idle(peer: PeerConnection) -> None:
    await peer.hello()
    for _ in range(3):
        await peer.line()
    await peer.send("250 ok\r\n250 ok\r\n354 go\r\n")
    await peer.take()


async def test_a_message_moves_on_when_the_peer_closed_the_idle_connection() -> None:
    async with open_bench(closes_when_idle) as bench:
        bench.send()
        await bench.results()
        bench.send()
        results = await bench.results(count=2)
        assert [result["attempt"] for result in results] == [1, 1]
        assert bench.peer.connections == 2


async def closes_at_the_second_mail(peer: PeerConnection) -> None:
    await closes_when_idle(peer)
    await peer.line()


async def refuses_the_second_mail(peer: PeerConnection) -> None:
    await closes_when_idle(peer)
    await peer.line()
    await peer.send("421 4.4.2 too many messages\r\n")


@pytest.mark.parametrize("script", [closes_at_the_second_mail, refuses_the_second_mail])
async def test_a_message_moves_on_when_its_connection_was_just_ending(script: Any) -> None:
    async with open_bench(script, domain_maxconnections=1) as bench:
        bench.send()
        bench.send()
        results = await bench.results(count=2)
        assert [result["attempt"] for result in results] == [1, 1]
        assert bench.peer.connections == 2


async def test_a_message_does_not_move_on_for_ever() -> None:
    async with open_bench(*[refuses_the_second_mail] * 20, domain_maxconnections=1) as bench:
        for _ in range(12):
            bench.send()
        await bench.queues.until(lambda queues: sum(queues.groups) == 12)
        assert not bench.queues.leased


# Hosts of a domain


async def test_the_next_host_is_tried_when_one_does_not_let_us_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolver = StubResolver(d_test=["127.0.0.2", "127.0.0.3", "127.0.0.4"])
    async with open_bench(resolver=resolver, address="127.0.0.3") as bench:
        monkeypatch.setattr(routes, "SMTP_PORT", bench.port)
        bench.send()
        (result,) = await bench.results("success")
        assert result["to"] == "127.0.0.3"


async def test_when_no_host_lets_us_in_one_message_says_so_and_the_others_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolver = StubResolver(d_test=["127.0.0.2", "127.0.0.3"])
    async with open_bench(resolver=resolver, address="127.0.0.9") as bench:
        monkeypatch.setattr(routes, "SMTP_PORT", bench.port)
        for _ in range(50):
            bench.send()
        result = await bench.retried()
        assert (result["type"], result["state"]) == ("refused", "connect")
        assert "127.0.0.3" in result["description"]
        await bench.queues.until(lambda queues: not queues.leased)
        assert len(bench.queues["outbox"]) == 50
        assert bench.queues.due == 49
        assert sum(bench.queues.groups) == 1


async def test_a_peer_that_wants_no_more_connections_gets_the_mail_over_those_it_has() -> None:
    async def busy(peer: PeerConnection) -> None:
        await peer.send("421 too many connections\r\n")

    async with open_bench(PeerConnection.serve, *[busy] * 19) as bench:
        for _ in range(40):
            bench.send()
        await bench.results("success", 40)
        assert bench.queues["retry"] == []


# Safety of results


async def test_the_next_body_waits_until_the_last_result_is_safe() -> None:
    async with open_bench(domain_maxconnections=1) as bench:
        bench.queues.may_ack = trio.Event()
        bench.send()
        bench.send()
        await bench.queues.until(lambda _: bench.peer.commands.count("DATA") == 2)
        for _ in range(20):
            await trio.testing.wait_all_tasks_blocked()
        assert len(bench.peer.mails) == 1
        bench.queues.may_ack.set()
        await bench.results(count=2)
        assert len(bench.peer.mails) == 2


async def test_a_connection_that_ends_keeps_its_place_until_its_result_is_safe() -> None:
    async with open_bench(domain_maxconnections=1, connection_maxmessages=1) as bench:
        bench.queues.may_ack = trio.Event()
        bench.send()
        bench.send()
        await bench.queues.until(lambda _: bench.peer.commands.count("QUIT") == 1)
        await trio.testing.wait_all_tasks_blocked()
        assert bench.peer.connections == 1
        bench.queues.may_ack.set()
        await bench.results(count=2)


async def test_a_queue_that_cannot_be_written_is_tried_until_it_can(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "mailerq.delivery")
    async with open_bench() as bench:
        bench.queues.failures = 2
        bench.send()
        await bench.results()
        assert len(bench.peer.mails) == 1
        assert bench.dispatcher.statistics()["queue_errors"] == 2


async def test_a_result_that_can_never_be_written_does_not_hold_up_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL + 1, "mailerq.delivery")

    class PickyQueues(MemoryQueues):
        async def ack(self, settlements: Any) -> None:
            if any("poison" in s.lease.message.properties for s in settlements):
                raise TypeError("cannot encode")
            await super().ack(settlements)

    async with open_bench() as bench:
        bench.queues.__class__ = PickyQueues
        bench.queues.may_ack = trio.Event()
        for number in range(9):
            bench.send(**({"poison": 1} if number == 4 else {}))
        bench.queues.may_ack.set()
        await bench.results(count=8)
        assert len(bench.queues.leased) == 1


async def until_settling(bench: Bench, count: int) -> None:
    """Wait until the results of this number of messages are being committed."""
    leased = bench.queues.leased
    await bench.until(lambda _: sum(lease.settling for lease in leased.values()) == count)


async def test_results_wait_for_no_commit_of_others() -> None:
    async with open_bench() as bench:
        bench.queues.may_ack = trio.Event()
        for number in range(5):
            bench.send(recipient=f"c@d{number}.test")
            await until_settling(bench, number + 1)
        bench.queues.may_ack.set()
        await bench.results(count=5)
        assert bench.queues.groups == [1] * 5


async def test_few_commits_with_reports_are_made_at_a_time() -> None:
    """Each may have many megabytes in memory. Other results do not wait for them."""
    async with open_bench(rabbitmq_dsn="dsn") as bench:
        bench.queues.may_ack = trio.Event()
        for number in range(4):
            wants = {"ip": "192.0.2.1", "dsn": {"notify": "SUCCESS"}}
            bench.send(f"c@d{number}.test", **wants)
            await bench.until(lambda figures, count=number + 1: figures["delivered"] == count)
        await trio.testing.wait_all_tasks_blocked()
        await until_settling(bench, 2)
        bench.send("c@d4.test")
        await until_settling(bench, 3)
        bench.queues.may_ack.set()
        await bench.queues.until(lambda queues: not queues.leased)
        assert len(bench.queues["dsn"]) == 4


async def test_results_are_committed_in_groups() -> None:
    async with open_bench() as bench:
        bench.queues.may_ack = trio.Event()
        for number in range(60):
            bench.send(recipient=f"c@d{number}.test")
        await bench.until(lambda figures: figures["delivered"] == 60)
        bench.queues.may_ack.set()
        await bench.results(count=60)
        assert len(bench.queues.groups) <= 10


# Plugins


async def test_a_plugin_edits_the_body_for_this_attempt_only() -> None:
    def footer(message: Message) -> None:
        assert message.body is not None
        message.body += b"-- \r\nsent\r\n"
        message.properties["edited"] = True

    seen: list[bytes | None] = []
    plugins = StubPlugins(out_data=footer, out_sent=lambda message: seen.append(message.body))
    async with open_bench(plugins=plugins) as bench:
        bench.peer.answers[".", ""] = ["451 not now"]
        bench.send()
        await bench.retried()
        ((_, message),) = bench.queues.queues["outbox"]
        assert message.body == b"hi\r\n"
        assert "edited" not in message.properties
        bench.queues.pass_time(600)
        await bench.results()
        assert bench.peer.mails[0].body == b"hi\r\n-- \r\nsent\r\n"
        assert seen == [bench.peer.mails[0].body] * 2
    assert plugins.open == 0


@pytest.mark.parametrize(("code", "queue"), [(451, "retry"), (550, "failure")])
async def test_a_plugin_that_rejects_keeps_the_body_from_the_wire(code: int, queue: str) -> None:
    plugins = StubPlugins(out_data=lambda message: Reject((code, "5.7.1 not this one")))
    async with open_bench(plugins=plugins) as bench:
        bench.send()
        (result,) = await bench.results(queue)
        assert (result["type"], result["state"], result["code"]) == ("error", "data", code)
        assert bench.peer.mails == []
        await bench.queues.until(lambda _: bench.peer.open == 0)
        assert bench.peer.commands[-1] == "DATA"


async def test_a_plugin_may_take_its_time_and_supply_the_body() -> None:
    async def load(message: Message) -> None:
        await trio.sleep(0.2)
        message.body = b"from a store\r\n"

    plugins = StubPlugins(out_data=load)
    async with open_bench(plugins=plugins, smtp_out_timeout=0.1) as bench:
        bench.send(body=None, key="k")
        await bench.results("success")
        assert bench.peer.mails[0].body == b"from a store\r\n"


async def test_without_a_body_after_the_plugins_there_is_no_mail() -> None:
    plugins = StubPlugins(out_data=lambda message: None)
    async with open_bench(plugins=plugins) as bench:
        bench.send(body=None, key="k")
        (result,) = await bench.results("failure")
        assert (result["type"], result["state"]) == ("nodata", "storage")
        assert bench.peer.mails == []


async def test_what_a_plugin_sends_goes_out_before_the_body() -> None:
    plugins = StubPlugins(out_data=lambda message: setattr(plugins, "output", b"X-Raw: 1\r\n"))
    async with open_bench(plugins=plugins) as bench:
        bench.send()
        await bench.results()
        assert bench.peer.mails[0].body == b"X-Raw: 1\r\nhi\r\n"


async def test_what_a_plugin_sends_outside_of_an_event_goes_out_at_once() -> None:
    plugins = StubPlugins()
    async with open_bench(plugins=plugins) as bench:
        bench.send()
        await bench.results()
        plugins.send(b"NOOP idle\r\n")
        await bench.queues.until(lambda _: bench.peer.commands[-1] == "NOOP idle")


async def test_what_a_plugin_sends_while_a_body_is_sent_comes_behind_it() -> None:
    plugins = StubPlugins()
    may_read = trio.Event()

    async def slow(peer: PeerConnection) -> None:
        await peer.hello()
        for _ in range(3):
            await peer.line()
        await peer.send("250 ok\r\n250 ok\r\n354 go\r\n")
        await may_read.wait()
        bodies.append(await peer.body())
        assert await peer.line() == "NOOP behind"
        await peer.prove()
        await peer.line()

    bodies: list[bytes] = []
    text = 500_000 * "0123456789\r\n"
    async with open_bench(slow, plugins=plugins) as bench:
        bench.peer.extensions = ("PIPELINING",)
        bench.send(body=text)
        await bench.queues.until(lambda _: "DATA" in bench.peer.commands)
        await trio.testing.wait_all_tasks_blocked()
        plugins.send(b"NOOP behind\r\n")
        may_read.set()
        await bench.results("success")
        assert bodies == [text.encode()]


async def test_a_defect_in_a_session_costs_one_attempt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "mailerq.delivery")
    faults = [ZeroDivisionError]

    def out_data(message: Message) -> None:
        if faults:
            raise faults.pop()

    async with open_bench(plugins=StubPlugins(out_data=out_data)) as bench:
        bench.send()
        result = await bench.retried()
        assert result["code"] == 451
        bench.queues.pass_time(600)
        await bench.results("success")


# The end


@pytest.mark.parametrize("qos", [1, 1000])
async def test_stop_lets_what_is_under_way_end_and_gives_the_rest_back(qos: int) -> None:
    may_answer = trio.Event()

    async def slow(peer: PeerConnection) -> None:
        await peer.hello()
        for _ in range(3):
            await peer.line()
        await peer.send("250 ok\r\n250 ok\r\n354 go\r\n")
        await may_answer.wait()
        await peer.take()
        await peer.line()

    async with open_bench(slow, domain_maxconnections=1, rabbitmq_qos=qos) as bench:
        for _ in range(5):
            bench.send()
        await bench.queues.until(lambda queues: bench.peer.commands[-1:] == ["DATA"])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.dispatcher.stop, 10)
            await bench.queues.until(lambda queues: len(queues.leased) == 1)
            await trio.testing.wait_all_tasks_blocked()
            may_answer.set()
        assert len(bench.queues["success"]) == 1
        assert len(bench.queues["outbox"]) == 4
        assert not bench.queues.leased
        assert bench.peer.commands[-1] == "QUIT"


async def test_stop_cuts_what_does_not_end() -> None:
    async def silent(peer: PeerConnection) -> None:
        await peer.hello()
        await peer.line()
        await trio.sleep_forever()

    async with open_bench(silent, smtp_out_timeout=600.0) as bench:
        bench.send()
        await bench.queues.until(lambda _: len(bench.peer.commands) >= 2)
        with trio.fail_after(60):
            await bench.dispatcher.stop(0.1)
        assert len(bench.queues["outbox"]) == 1
        assert not bench.queues.leased


async def test_stop_does_not_wait_for_names() -> None:
    class SlowResolver(StubResolver):
        async def mail_hosts(self, domain: str) -> Any:
            bench.queues.touch()
            await trio.sleep_forever()

    async with open_bench(resolver=SlowResolver()) as bench:
        bench.send()
        await bench.queues.until(lambda queues: bool(queues.leased))
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(60):
            await bench.dispatcher.stop(600)
        assert len(bench.queues["outbox"]) == 1


async def test_idle_connections_end_with_quit_when_the_engine_stops() -> None:
    async with open_bench(connection_maxidle=60_000) as bench:
        bench.send()
        await bench.results()
        await bench.dispatcher.stop(10)
        assert bench.peer.commands[-1] == "QUIT"
