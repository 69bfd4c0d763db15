"""Faults of this host, such as no address or no route: mail waits, and the fault is reported."""

from __future__ import annotations

import pytest

from tests.outbound.kit import PeerConnection, StubResolver, open_bench


async def test_an_address_that_is_not_on_this_host_is_tried_again_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_bench() as bench:
        for _ in range(2):
            bench.send(ips=["192.0.2.1"])
        await bench.retried()
        await bench.pass_time(30)
        for result in await bench.results("retry", count=2):
            assert (result["type"], result["state"]) == ("bind", "bind")
            assert result["from"] == "192.0.2.1"
            assert "192.0.2.1: Cannot assign requested address" in result["description"]
        bench.send(ips=["127.0.0.5"])
        (result,) = await bench.results("success")
        assert result["from"] == "127.0.0.5"
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "cannot send from 192.0.2.1" in line
    assert "Cannot assign requested address" in line


async def test_a_message_leaves_from_another_of_its_addresses_when_one_cannot_be_bound() -> None:
    ips = ["192.0.2.1", "127.0.0.5", "2001:db8::1"]
    async with open_bench() as bench:
        for _ in range(20):
            bench.send(ips=ips)
        results = await bench.results("success", count=20)
        assert {(result["from"], result["attempt"]) for result in results} == {("127.0.0.5", 1)}


async def test_a_message_whose_addresses_fit_no_host_waits() -> None:
    async with open_bench() as bench:
        bench.send(ips=["2001:db8::1", "2001:db8::2"])
        result = await bench.retried()
        assert (result["type"], result["state"]) == ("bind", "bind")
        assert result["description"].endswith("127.0.0.1 has no IPv6 address")


@pytest.mark.parametrize("hosts", [["127.0.0.1", "fe80::1"], ["fe80::1", "127.0.0.1"]])
async def test_a_fault_of_this_host_does_not_hide_what_a_peer_said(hosts: list[str]) -> None:
    async def refuse(peer: PeerConnection) -> None:
        await peer.send("554 5.7.1 not you\r\n")

    # A link-local address without its link is one that nothing can be sent to.
    async with open_bench(refuse, resolver=StubResolver(d_test=hosts)) as bench:
        bench.send()
        result = await bench.retried()
        assert (result["type"], result["description"]) == ("noaccess", "not you")


async def test_more_addresses_than_are_tried_that_cannot_be_reached_do_not_hide_one_that_can() -> (
    None
):
    hosts = [f"fe80::{number}" for number in range(1, 20)]
    async with open_bench(resolver=StubResolver(d_test=[*hosts, "127.0.0.1"])) as bench:
        bench.send()
        await bench.results("success")


async def test_a_fault_of_this_host_is_said_and_the_mail_is_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_bench(resolver=StubResolver(d_test=["fe80::1"])) as bench:
        for _ in range(3):
            bench.send()
        for count in (1, 2, 3):
            await bench.results("retry", count)
            await bench.pass_time(30)
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert line.startswith("mail to d.test waits for a fault of this host")


async def test_a_fault_of_this_host_does_not_use_up_the_attempts() -> None:
    async with open_bench(max_attempts=1) as bench:
        bench.send(ips=["192.0.2.1"], maxattempts=1)
        await bench.retried()
        assert not bench.queues["failure"]
