"""Limits of deliveries, with a real peer: what goes out when, and over how many connections."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.outbound.cells import boot_time
from mailerq.rules.rates import SLACK
from mailerq.rules.shaping import Shaping
from tests.outbound.kit import Bench, PeerConnection, StubResolver, open_bench

FAST: Any = {"connection_maxidle": 60_000}
SLACK_SECONDS = SLACK / 1e9


def limits_file(directory: Path, text: str) -> str:
    path = directory / "limits.toml"
    path.write_text(text)
    return str(path)


def let_go(bench: Bench, *, rate: str = "", recipient: str = "") -> list[float]:
    """When a rate let mails go; checks that each one has reached its peer after that.

    The times at the peer say less: a mail that arrives late is near the next one.
    """
    (granted,) = (times for key, times in bench.cells.granted.items() if key.startswith(rate))
    arrived = [mail.at for mail in bench.peer.mails if recipient in mail.recipient]
    assert len(arrived) <= len(granted)
    for (_, known), at in zip(granted[-len(arrived) :], arrived, strict=True):
        assert known <= at
    return [counted for counted, _ in granted]


def assert_paced(bench: Bench, seconds: float, *, recipient: str = "") -> None:
    """Check that mails are `seconds` apart, but for the slack for late timers."""
    times = let_go(bench, recipient=recipient)
    for count in range(1, len(times)):
        for first, last in zip(times, times[count:], strict=False):
            assert last - first >= count * seconds - SLACK_SECONDS


# Messages.


@pytest.mark.parametrize("settings", [{}, {"connection_maxmessages": 1}, {"connection_maxidle": 0}])
async def test_messages_go_evenly_over_kept_connections_and_new_ones(
    settings: dict[str, Any],
) -> None:
    async with open_bench(domain_maxmessages=600, **{**FAST, **settings}) as bench:
        for _ in range(12):
            bench.send()
        results = await bench.results(count=12)
        assert_paced(bench, 0.1)
        assert {result["attempt"] for result in results} == {1}
        assert bench.dispatcher.limits.statistics()["limited"] == 0


async def test_an_idle_connection_takes_each_message_that_a_rate_lets_go() -> None:
    """A connection that is busy when the next message may go has another one opened."""
    async with open_bench(domain_maxmessages=600, **FAST) as bench:
        now = boot_time()
        bench.cells.clock = lambda: now
        for _ in range(12):
            bench.send()
        for count in range(1, 13):
            await bench.results(count=count)
            await bench.until(lambda figures: figures["idle"] == 1)
            now += 101_000_000
        assert bench.peer.connections == 1


async def test_envelopes_that_go_ahead_are_counted_too() -> None:
    async with open_bench(domain_maxmessages=60_000, domain_maxconnections=1, **FAST) as bench:
        for _ in range(300):
            bench.send()
        await bench.results(count=300)
        assert_paced(bench, 0.001)


async def test_a_limited_destination_holds_up_no_other() -> None:
    async with open_bench(domain_maxmessages=1, rabbitmq_qos=8, **FAST) as bench:
        for _ in range(50):
            bench.send("c@limited.test")
        await bench.queues.until(lambda queues: bool(bench.peer.mails))
        for number in range(20):
            bench.send(f"c@other{number}.test")
        await bench.queues.until(lambda queues: len(queues["results"]) == 21)
        limits = bench.dispatcher.limits.statistics()
        text = "messages-per-minute = 1 of limited.test (domain-maxmessages)"
        assert limits["limits"].get(text) == 1


async def test_destinations_that_wait_for_their_limits_leave_memory_to_others() -> None:
    async with open_bench(domain_maxmessages=6, rabbitmq_qos=64, **FAST) as bench:
        for number in range(40):
            bench.send(f"c@limited{number}.test")
        await bench.queues.until(lambda queues: len(bench.peer.mails) == 40)
        for number in range(40):
            for _ in range(20):
                bench.send(f"c@limited{number}.test")
        for number in range(30):
            bench.send(f"c@other{number}.test")
        await bench.queues.until(lambda queues: len(queues["results"]) == 70)


async def test_sites_that_wait_for_their_provider_leave_memory_to_others(tmp_path: Path) -> None:
    resolver = StubResolver(**{f"s{n}_big_test": ["127.0.0.1"] for n in range(20)})
    resolver.domains |= {f"other{n}.test": ["127.0.0.1"] for n in range(10)}
    text = PROVIDER.replace("1200", "6").replace('"one.test", "two.test"', '"big.test"')
    path = limits_file(tmp_path, text)
    async with open_bench(resolver=resolver, limits_file=path, rabbitmq_qos=8) as bench:
        for number in range(60):
            bench.send(f"c@s{number % 20}.big.test")
        await bench.queues.until(lambda queues: bool(bench.peer.mails))
        for number in range(30):
            bench.send(f"c@other{number % 10}.test")
        await bench.queues.until(lambda queues: len(queues["results"]) == 31)


PROVIDER = """
[[provider]]
name = "big"
mx = ["one.test", "two.test"]
[[limit]]
provider = "big"
messages-per-minute = 1200
"""


async def test_sites_of_one_provider_take_turns(tmp_path: Path) -> None:
    resolver = StubResolver(
        one_test=["127.0.0.1"], two_test=["127.0.0.1"], other_test=["127.0.0.1"]
    )
    path = limits_file(tmp_path, PROVIDER)
    async with open_bench(resolver=resolver, limits_file=path, **FAST) as bench:
        for name in ("one", "two", "other"):
            for _ in range(10):
                bench.send(f"c@{name}.test")
        await bench.results(count=30)
        mails = [mail for mail in bench.peer.mails if "other" not in mail.recipient]
        bench.peer.mails = mails
        assert_paced(bench, 0.05)
        first = Counter(mail.recipient for mail in mails[:10])
        assert 3 <= first["c@one.test"] <= 7


async def test_a_domain_with_a_line_of_its_own_shares_no_connection(tmp_path: Path) -> None:
    path = limits_file(tmp_path, "[[limit]]\ndomain = '*.b.test'\nmessages-per-minute = 600\n")
    resolver = StubResolver(a_test=["127.0.0.1"], x_b_test=["127.0.0.1"])
    resolver.mail_hosts = same_hosts  # type: ignore[method-assign]
    async with open_bench(resolver=resolver, limits_file=path, **FAST) as bench:
        for _ in range(5):
            bench.send("c@x.b.test")
            bench.send("c@y.b.test")
            bench.send("c@a.test")
        await bench.results(count=15)
        assert bench.dispatcher.statistics()["destinations"] <= 2
        assert_paced(bench, 0.1, recipient=".b.test")
        by_connection = {(mail.connection, mail.recipient[3:]) for mail in bench.peer.mails}
        limited = {number for number, domain in by_connection if domain != "test"}
        assert limited.isdisjoint(n for n, domain in by_connection if domain == "test")


async def same_hosts(domain: str) -> Any:
    await trio.lowlevel.checkpoint()
    return await StubResolver(mx_test=["127.0.0.1"]).mail_hosts("mx.test")


async def test_bytes_are_paid_for_by_the_mail_that_follows() -> None:
    async with open_bench(domain_maxbytes=600_000, **FAST) as bench:
        for _ in range(6):
            bench.send(body="x" * 998 + "\r\n")
        await bench.results(count=6)
        assert_paced(bench, 0.1)


# Connections.


async def test_new_connections_are_limited() -> None:
    async with open_bench(domain_maxconnects=600, connection_maxmessages=1) as bench:
        for _ in range(6):
            bench.send()
        await bench.results(count=6)
        assert bench.peer.connections == 6
        assert_paced(bench, 0.1)


async def test_connections_that_are_being_opened_are_limited() -> None:
    greet = trio.Event()

    async def slow(peer: PeerConnection) -> None:
        await greet.wait()
        await peer.serve()

    async with open_bench(*[slow] * 20, domain_maxstarting=1) as bench:
        for _ in range(50):
            bench.send()
        await bench.until(lambda figures: figures["opening"] == 1)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert bench.peer.connections == 1
        greet.set()
        await bench.results(count=50)


async def test_connections_of_a_provider_are_counted_over_its_sites(tmp_path: Path) -> None:
    text = PROVIDER.replace("messages-per-minute = 1200", "max-connections = 2")
    resolver = StubResolver(one_test=["127.0.0.1"], two_test=["127.0.0.1"])
    path = limits_file(tmp_path, text)
    async with open_bench(resolver=resolver, limits_file=path, connection_maxidle=20) as bench:
        for _ in range(50):
            bench.send("c@one.test")
            bench.send("c@two.test")
        await bench.results(count=100)
        assert bench.peer.most <= 2


async def test_idle_connections_beyond_the_limit_are_closed() -> None:
    async with open_bench(domain_maxidle=1, **FAST) as bench:
        for _ in range(100):
            bench.send()
        await bench.results(count=100)
        await bench.queues.until(lambda queues: bench.peer.open == 1)
        assert bench.peer.connections > 1
        bench.send()
        await bench.results(count=101)
        await bench.until(lambda figures: figures["idle"] == 1)


async def test_a_connection_takes_so_many_bytes_and_no_more() -> None:
    async with open_bench(connection_maxbytes=2500, domain_maxconnections=1) as bench:
        for _ in range(6):
            bench.send(body="x" * 998 + "\r\n")
        await bench.results(count=6)
        assert bench.peer.connections == 2


# Remote addresses.


async def test_hosts_whose_limit_is_reached_are_passed_over() -> None:
    resolver = StubResolver(a_test=["127.0.0.1", "127.0.0.2", "127.0.0.3"])
    async with open_bench(
        resolver=resolver, address="0.0.0.0", ip_maxconnections=1, **FAST
    ) as bench:
        for _ in range(60):
            bench.send("c@a.test")
        await bench.results(count=60)
        assert 1 < bench.peer.most <= 3


async def test_an_address_is_limited_over_all_sites() -> None:
    resolver = StubResolver(a_test=["127.0.0.1"], b_test=["127.0.0.1"])
    async with open_bench(resolver=resolver, ip_maxconnections=1, connection_maxidle=20) as bench:
        for _ in range(10):
            bench.send("c@a.test")
            bench.send("c@b.test")
        await bench.results(count=20)
        assert bench.peer.most == 1


@pytest.mark.parametrize("idle", [60_000, 10])
async def test_messages_to_an_address_are_paced(idle: int) -> None:
    resolver = StubResolver(a_test=["127.0.0.1"], b_test=["127.0.0.1"])
    async with open_bench(resolver=resolver, ip_maxmessages=600, connection_maxidle=idle) as bench:
        for _ in range(6):
            bench.send("c@a.test")
            bench.send("c@b.test")
        await bench.results(count=12)
        assert_paced(bench, 0.1)
        if idle > 1000:
            assert bench.peer.connections == 2


# Changes and faults.


async def test_a_raised_limit_lets_waiting_mail_go_at_once() -> None:
    async with open_bench(domain_maxmessages=1, **FAST) as bench:
        for _ in range(5):
            bench.send()
        await bench.results(count=1)
        live = bench.dispatcher._live
        config = live.current.config.replace(domain_maxmessages=0)
        bench.dispatcher.limits.change(Shaping.of(config))
        await bench.results(count=5)


async def test_a_limit_that_comes_with_a_reload_holds_for_waiting_mail() -> None:
    async with open_bench(domain_maxconnections=1, **FAST) as bench:
        bench.queues.may_ack = trio.Event()
        for _ in range(8):
            bench.send()
        await bench.queues.until(lambda queues: bool(bench.peer.mails))
        live = bench.dispatcher._live
        config = live.current.config.replace(domain_maxmessages=600)
        bench.dispatcher.limits.change(Shaping.of(config))
        before = len(bench.peer.mails)
        bench.queues.may_ack.set()
        await bench.results(count=8)
        bench.peer.mails = bench.peer.mails[before + 1 :]
        assert_paced(bench, 0.1)


async def test_a_host_that_is_down_and_limited_is_asked_in_its_time() -> None:
    async def refuses(peer: PeerConnection) -> None:
        await peer.send("554 no\r\n")

    async with open_bench(refuses, domain_maxmessages=600, domain_maxconnects=600) as bench:
        for _ in range(3):
            bench.send()
        await bench.queues.until(lambda queues: bool(queues["retry"] or queues["failure"]))
        await bench.pass_time(700)
        await bench.queues.until(lambda queues: len(bench.peer.mails) >= 2)


async def test_a_stop_waits_for_no_limit() -> None:
    async with open_bench(domain_maxmessages=1, **FAST) as bench:
        for _ in range(5):
            bench.send()
        await bench.results(count=1)
        with trio.fail_after(10):
            await bench.dispatcher.stop(60)
        assert len(bench.queues["outbox"]) == 4
        assert bench.dispatcher.limits.statistics()["limited"] == 0
