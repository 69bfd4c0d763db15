"""Sending hours, with a real peer and a clock that the test sets: it is a Thursday, 12:00 UTC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio.testing

from mailerq.outbound.explaining import Question
from mailerq.rules.shaping import Shaping
from tests.outbound.kit import Bench, PeerConnection, StubResolver, open_bench
from tests.outbound.test_delivery_limits import limits_file

HOUR = 3600.0

NIGHT = """
[[limit]]
domain = "d.test"
hours = "20:00-06:00"
"""
HELD = "closed until 2026-01-01 20:00:00 by hours of d.test ({path}:4)"


async def at_rest(bench: Bench) -> None:
    await bench.queues.until(lambda queues: not queues.leased)
    await trio.testing.wait_all_tasks_blocked(0.01)


def takes(bench: Bench) -> int:
    """How often mail has been read from the queue."""
    subscription: Any = bench.queues.subscriptions["outbox"]
    return len(subscription.takes)


def waiting(bench: Bench) -> dict[str, int]:
    found: dict[str, int] = bench.dispatcher.limits.statistics()["limits"]
    return found


async def test_mail_waits_for_its_hours_and_costs_nothing(tmp_path: Path) -> None:
    path = limits_file(tmp_path, NIGHT)
    async with open_bench(limits_file=path) as bench:
        bench.send()
        await at_rest(bench)
        before, groups = takes(bench), len(bench.queues.groups)
        for number in range(50):
            bench.send("c@d.test", body=f"{number}\r\n")
        await at_rest(bench)
        for _ in range(7):
            bench.queues.pass_time(HOUR)
            await at_rest(bench)
        assert waiting(bench) == {HELD.format(path=path): 1}
        assert bench.peer.connections == 0
        assert (takes(bench), len(bench.queues.groups)) == (before, groups)
        bench.queues.pass_time(HOUR - 1)
        await at_rest(bench)
        assert bench.peer.connections == 0
        bench.queues.pass_time(1)
        results = await bench.results(count=51)
        assert {result["attempt"] for result in results} == {1}
        assert waiting(bench) == {}


async def test_other_mail_goes_meanwhile(tmp_path: Path) -> None:
    async with open_bench(limits_file=limits_file(tmp_path, NIGHT), rabbitmq_qos=4) as bench:
        for _ in range(30):
            bench.send()
        for number in range(30):
            bench.send(f"c@other{number}.test")
        await bench.results(count=30)
        assert not any(mail.recipient == "c@d.test" for mail in bench.peer.mails)


async def test_mail_in_memory_goes_back_when_the_hours_end(tmp_path: Path) -> None:
    text = "[[limit]]\nhours = '08:00-20:00'\n"
    told = trio.Event()

    async def waits(peer: PeerConnection) -> None:
        await peer.hello()
        while not (line := await peer.line()).startswith("DATA"):
            await peer.send("250 ok\r\n")
        await peer.send("354 go\r\n")
        await peer.body()
        told.set()
        await closed.wait()
        await peer.send("250 taken\r\n")
        while line := await peer.line():
            await peer.send("221 bye\r\n" if line == "QUIT" else "250 ok\r\n")
            if line == "QUIT":
                return

    closed = trio.Event()
    path = limits_file(tmp_path, text)
    # No PIPELINING: no envelope has gone ahead.
    async with open_bench(waits, limits_file=path, domain_maxconnections=1) as bench:
        bench.peer.extensions = ()
        for _ in range(5):
            bench.send()
        await told.wait()
        bench.queues.pass_time(8 * HOUR)
        await trio.testing.wait_all_tasks_blocked(0.01)
        closed.set()
        await bench.results(count=1)
        await at_rest(bench)
        await bench.until(lambda figures: figures["connections"] == 0)
        assert (bench.peer.connections, len(bench.queues["results"])) == (1, 1)
        assert sum(waiting(bench).values()) == 1
        bench.queues.pass_time(12 * HOUR)
        await bench.results(count=5)


async def test_connections_grow_from_one_after_the_opening(tmp_path: Path) -> None:
    path = limits_file(tmp_path, "[[limit]]\nhours = '08:00-20:00'\n")
    let_in = trio.Event()

    async def slow(peer: PeerConnection) -> None:
        peer.peer.queues.touch()
        await let_in.wait()
        await peer.serve()

    async with open_bench(limits_file=path, connection_maxidle=500) as bench:
        for _ in range(300):
            bench.send()
        await bench.results(count=300)
        assert bench.peer.most > 2, "the flow has grown"
        await bench.until(lambda figures: figures["connections"] == 0)
        bench.queues.pass_time(8 * HOUR)
        for _ in range(300):
            bench.send()
        await at_rest(bench)
        bench.peer.scripts = [slow] * 100
        bench.peer.most = bench.peer.connections = 0
        bench.queues.pass_time(12 * HOUR)
        await bench.queues.until(lambda queues: bench.peer.connections > 0)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert bench.peer.connections == 1
        let_in.set()
        await bench.results(count=600)


async def test_mail_that_expires_meanwhile_is_not_sent(tmp_path: Path) -> None:
    path = limits_file(tmp_path, NIGHT)
    async with open_bench(limits_file=path, max_delivertime=int(4 * HOUR)) as bench:
        bench.send()
        await at_rest(bench)
        bench.queues.pass_time(8 * HOUR)
        (result,) = await bench.results("failure")
        assert (result["type"], bench.peer.connections) == ("expired", 0)


async def test_a_host_that_is_down_is_not_asked_outside_the_hours(tmp_path: Path) -> None:
    async def says_421(peer: PeerConnection) -> None:
        await peer.send("421 4.3.2 not now\r\n")

    path = limits_file(tmp_path, "[[limit]]\ndomain = 'd.test'\nhours = '08:00-20:00'\n")
    async with open_bench(says_421, limits_file=path, retry_interval=(60,)) as bench:
        bench.send()
        await bench.retried()
        await at_rest(bench)
        bench.queues.pass_time(8 * HOUR)
        bench.dispatcher.flush()
        await at_rest(bench)
        before = takes(bench)
        assert sum(waiting(bench).values()) == 1
        for _ in range(11):
            bench.queues.pass_time(HOUR)
            bench.dispatcher.flush()
            await at_rest(bench)
        assert (bench.peer.connections, takes(bench)) == (1, before)
        bench.queues.pass_time(HOUR)
        await bench.results(count=1)


async def test_a_site_and_its_provider_must_both_be_open(tmp_path: Path) -> None:
    text = """
[[provider]]
name = "big"
mx = ["d.test"]
[[limit]]
provider = "big"
hours = "16:00-22:00"
[[limit]]
domain = "d.test"
hours = "14:00-18:00"
"""
    path = limits_file(tmp_path, text)
    resolver = StubResolver(d_test=["127.0.0.1"])
    async with open_bench(resolver=resolver, limits_file=path) as bench:
        bench.send()
        await at_rest(bench)
        before = takes(bench)
        bench.queues.pass_time(3 * HOUR)
        await at_rest(bench)
        assert (bench.peer.connections, takes(bench)) == (0, before)
        assert list(waiting(bench)) == [
            f"closed until 2026-01-01 16:00:00 by hours of provider big ({path}:7)"
        ]
        bench.queues.pass_time(HOUR)
        await bench.results()


async def test_hours_that_never_meet_hold_mail_and_say_so(tmp_path: Path) -> None:
    text = NIGHT.replace("20:00-06:00", "01:00-02:00") + (
        "[[provider]]\nname = 'big'\nmx = ['d.test']\n"
        "[[limit]]\nprovider = 'big'\nhours = '03:00-04:00'\n"
    )
    resolver = StubResolver(d_test=["127.0.0.1"])
    path = limits_file(tmp_path, text)
    async with open_bench(resolver=resolver, limits_file=path) as bench:
        bench.send()
        await at_rest(bench)
        for _ in range(40):
            bench.queues.pass_time(12 * HOUR)
            await at_rest(bench)
        assert bench.peer.connections == 0
        assert sum(waiting(bench).values()) == 1


ADDRESSES = """
[[pool]]
name = "both"
addresses = ["127.0.0.2", "127.0.0.3"]
"""


async def test_another_address_of_the_pool_sends_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "addresses.toml").write_text(ADDRESSES)
    path = limits_file(tmp_path, "[[limit]]\nlocal-ip = '127.0.0.2'\nhours = '20:00-06:00'\n")
    settings: Any = {"addresses_file": str(tmp_path / "addresses.toml"), "limits_file": path}
    async with open_bench(**settings) as bench:
        for _ in range(20):
            bench.send(pool="both")
        results = await bench.results(count=20)
        assert {result["from"] for result in results} == {"127.0.0.3"}


@pytest.mark.parametrize("text", ["", NIGHT.replace("20:00-06:00", "10:00-14:00")])
async def test_changed_hours_hold_at_once_for_waiting_mail(tmp_path: Path, text: str) -> None:
    path = limits_file(tmp_path, NIGHT)
    async with open_bench(limits_file=path) as bench:
        bench.send()
        await at_rest(bench)
        shaping = Shaping.parse(text.encode(), path, bench.dispatcher.config)
        if bench.dispatcher.limits.change(shaping):
            bench.dispatcher.reload(None, reroute=True)
        await bench.results()


async def test_a_clock_that_is_put_back_closes_again(tmp_path: Path) -> None:
    path = limits_file(tmp_path, NIGHT)
    async with open_bench(limits_file=path) as bench:
        bench.queues.pass_time(9 * HOUR)
        bench.send()
        await bench.results()
        bench.queues.pass_time(-3 * HOUR)
        bench.send()
        await at_rest(bench)
        assert len(bench.peer.mails) == 1
        assert list(waiting(bench)) == [HELD.format(path=path)]


async def test_explain_and_top_say_what_holds_mail_and_until_when(tmp_path: Path) -> None:
    path = limits_file(tmp_path, NIGHT)
    async with open_bench(limits_file=path, domain_maxmessages=600) as bench:
        bench.send()
        await at_rest(bench)
        answer = await bench.dispatcher.seeing.explainer().explain(Question("c@d.test"))
        (source,) = answer["from"]
        limits = {each["limit"]: each for each in source["limits"]}
        assert limits["closed"]["until"] == "2026-01-01 20:00:00"
        assert limits["closed"]["waiting"] == 1
        assert limits["hours"]["value"] == "20:00-06:00 UTC"
        assert limits["hours"]["where"] == f"{path}:4"
        assert "messages-per-minute" in limits
        (flow,) = source["flows"]
        assert flow["limited-by"] == HELD.format(path=path)
        assert (flow["until"], flow["memory"]) == ("2026-01-01 20:00:00", 0)
        bench.queues.pass_time(8 * HOUR)
        await bench.results()
        answer = await bench.dispatcher.seeing.explainer().explain(Question("c@d.test"))
        names = [each["limit"] for each in answer["from"][0]["limits"]]
        assert "closed" not in names
        assert "hours" in names
