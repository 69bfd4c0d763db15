"""Limits of deliveries when connections end, are refused and are reloaded at awkward times."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.outbound import limits
from mailerq.outbound.cells import Count, Rate, SharedCells
from mailerq.rules.shaping import Shaping
from tests.outbound import kit
from tests.outbound.kit import Bench, PeerConnection, StubResolver, open_bench
from tests.outbound.test_delivery_limits import FAST, PROVIDER, assert_paced, limits_file

ONE_CONNECTION = PROVIDER.replace("messages-per-minute = 1200", "max-connections = 1")


def both_sites() -> StubResolver:
    return StubResolver(one_test=["127.0.0.1"], two_test=["127.0.0.1"])


def reload(bench: Bench, **changes: Any) -> None:
    """What the engine does with changed limits."""
    config = bench.dispatcher._live.current.config.replace(**changes)
    regrouped = bench.dispatcher.limits.change(Shaping.of(config))
    bench.dispatcher.reload(None, reroute=bool(regrouped))


@pytest.mark.parametrize("messages", [1, 3])
async def test_a_flow_that_asks_again_does_not_stop_the_next_turn(
    tmp_path: Path, messages: int
) -> None:
    path = limits_file(tmp_path, ONE_CONNECTION)
    async with open_bench(
        resolver=both_sites(), limits_file=path, connection_maxmessages=messages, **FAST
    ) as bench:
        for _ in range(10):
            bench.send("c@one.test")
            bench.send("c@two.test")
        await bench.results(count=20)


async def test_a_host_is_tried_that_becomes_free_while_another_is_tried() -> None:
    end, answer, trying = trio.Event(), trio.Event(), trio.Event()

    async def holds(peer: PeerConnection) -> None:
        await peer.hello()
        await end.wait()

    async def slow(peer: PeerConnection) -> None:
        trying.set()
        await answer.wait()
        await peer.send("554 no\r\n")

    resolver = StubResolver(a_test=["127.0.0.1"], b_test=["127.0.0.1", "127.0.0.2"])
    async with open_bench(
        holds, slow, resolver=resolver, address="0.0.0.0", ip_maxconnections=1
    ) as bench:
        bench.send("c@a.test")
        await bench.until(lambda figures: figures["opened"] == 1)
        bench.send("c@b.test")
        await trying.wait()
        end.set()
        await bench.until(lambda figures: figures["connections"] == 1)
        answer.set()
        await bench.queues.until(lambda queues: bool(bench.peer.mails))


async def test_a_busy_site_leaves_a_connection_to_the_others_of_its_provider(
    tmp_path: Path,
) -> None:
    path = limits_file(tmp_path, ONE_CONNECTION)
    async with open_bench(resolver=both_sites(), limits_file=path, **FAST) as bench:
        for _ in range(1000):
            bench.send("c@one.test")
        await bench.queues.until(lambda queues: len(bench.peer.mails) > 10)
        bench.send("c@two.test")
        await bench.results(count=1001)
        place = [mail.recipient for mail in bench.peer.mails].index("c@two.test")
        assert place < 500


async def test_an_idle_connection_ends_for_others_once_a_refill_finds_nothing(
    tmp_path: Path,
) -> None:
    path = limits_file(tmp_path, ONE_CONNECTION)
    async with open_bench(resolver=both_sites(), limits_file=path, **FAST) as bench:
        bench.send("c@one.test")
        await bench.results()
        (flow,) = bench.dispatcher.flows.live
        flow.refilling = True  # the queue is slow
        bench.send("c@one.test")
        bench.send("c@two.test")
        await bench.results(count=2)
        await bench.until(lambda figures: figures["idle"] == 1)
        flow.refilling = False
        flow.pump()
        await bench.results(count=3)


async def test_a_raised_rate_holds_at_once() -> None:
    async with open_bench(domain_maxmessages=1, **FAST) as bench:
        for _ in range(5):
            bench.send()
        await bench.results(count=1)
        reload(bench, domain_maxmessages=6000)
        with trio.fail_after(10):
            await bench.results(count=5)


SELECTORS = {
    "all": "",
    "domain": 'domain = "a.test"',
    "provider": 'provider = "big"',
    "each address": 'remote-ip = "*"',
    "a network": 'remote-ip = "127.0.0.0/8"',
    "ours": 'local-ip = "127.0.0.2"',
}
VALUES = {
    "messages": ("messages-per-minute", "1"),
    "bytes": ("bytes-per-minute", "1"),
    "connects": ("connects-per-minute", "1"),
    "hours": ("hours", '"20:00-06:00"'),
}


@pytest.mark.parametrize("end", ["gone", "0", "-1"])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("selector", SELECTORS)
async def test_mail_that_waits_for_a_limit_goes_when_the_limit_is_taken_away(
    tmp_path: Path, selector: str, value: str, end: str
) -> None:
    if value == "hours" and selector in ("each address", "a network"):
        pytest.skip("a host has no hours")
    head = "[[provider]]\nname = 'big'\nmx = ['a.test']\n"
    line = f"[[limit]]\n{SELECTORS[selector]}\n"
    name, number = VALUES[value]
    path = limits_file(tmp_path, f"{head}{line}{name} = {number}\n")
    resolver = StubResolver(a_test=["127.0.0.1"])
    settings = {"limits_file": path, "connection_maxmessages": 1 if value == "connects" else 0}
    async with open_bench(resolver=resolver, **settings, **FAST) as bench:
        for _ in range(4):
            bench.send("c@a.test", ips=["127.0.0.2"])
        await bench.queues.until(
            lambda queues: bool(bench.dispatcher.limits.statistics()["limited"])
        )
        if value != "hours":
            await bench.results(count=1)
        again = "" if end == "gone" else f"{line}{name} = {number}\n{line}{name} = {end}\n"
        limits_file(tmp_path, head + again)
        reload(bench)
        with trio.fail_after(10):
            await bench.results(count=4)


async def test_a_new_line_for_a_domain_holds_for_its_mail_in_memory(tmp_path: Path) -> None:
    path = limits_file(tmp_path, "[[limit]]\nmax-connections = 1\n")
    resolver = StubResolver(a_test=["127.0.0.1"])
    async with open_bench(resolver=resolver, limits_file=path, **FAST) as bench:
        bench.queues.may_ack = trio.Event()
        for _ in range(8):
            bench.send("c@a.test")
        await bench.queues.until(lambda queues: bool(bench.peer.mails))
        limits_file(tmp_path, "[[limit]]\ndomain = 'a.test'\nmessages-per-minute = 600\n")
        reload(bench)
        before = len(bench.peer.mails)
        bench.queues.may_ack.set()
        await bench.results(count=8)
        bench.peer.mails = bench.peer.mails[before + 1 :]
        assert_paced(bench, 0.1)


async def test_a_new_rate_of_an_address_holds_for_open_connections() -> None:
    resolver = StubResolver(a_test=["127.0.0.1"])
    async with open_bench(resolver=resolver, domain_maxconnections=1, **FAST) as bench:
        bench.queues.may_ack = trio.Event()
        for _ in range(8):
            bench.send("c@a.test")
        await bench.queues.until(lambda queues: bool(bench.peer.mails))
        reload(bench, ip_maxmessages=600)
        before = len(bench.peer.mails)
        bench.queues.may_ack.set()
        await bench.results(count=8)
        bench.peer.mails = bench.peer.mails[before + 1 :]
        assert_paced(bench, 0.1)


async def test_connections_beyond_a_lowered_limit_of_an_address_are_closed() -> None:
    async with open_bench(resolver=both_sites(), ip_maxconnections=8, **FAST) as bench:
        for _ in range(1500):
            bench.send("c@one.test")
            bench.send("c@two.test")
        await bench.queues.until(lambda queues: bench.peer.open >= 8)
        reload(bench, ip_maxconnections=2)
        before = len(bench.peer.mails)
        await bench.queues.until(lambda queues: len(bench.peer.mails) >= before + 300)
        assert bench.peer.open <= 2


async def test_a_borrowed_connection_is_kept_while_its_mail_waits_for_a_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of_two(shaping: Shaping, **options: Any) -> limits.Limits:
        return limits.Limits(shaping, processes=2, **options)

    monkeypatch.setattr(kit, "Limits", of_two)
    async with open_bench(domain_maxconnections=1, domain_maxmessages=1200, **FAST) as bench:
        for _ in range(30):
            bench.send()
        with trio.fail_after(6):  # 1.5 s are enough
            await bench.results(count=30)


def test_a_number_that_could_not_be_written_is_written_later(tmp_path: Path) -> None:
    path = str(tmp_path / "cells")
    one, two = SharedCells(path, 0, 2), SharedCells(path, 1, 2)
    assert one.take([Count("k", 1)]) is None
    lock = os.open(path, os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    one.release(["k"])
    assert not one.catch_up()
    os.close(lock)
    assert one.catch_up()
    assert two.take([Count("k", 1)]) is None


def test_what_is_held_counts_when_the_file_is_lost(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    cells = SharedCells(str(tmp_path / "there" / "cells"))
    wants = [Rate("r", 1), Count("k", 2)]
    assert cells.take(wants) is None
    (tmp_path / "there" / "cells").unlink()
    (tmp_path / "there").rmdir()
    assert cells.take(wants[1:]) is None
    busy = cells.take([*wants[1:], Rate("other", 1)])
    assert busy is not None
