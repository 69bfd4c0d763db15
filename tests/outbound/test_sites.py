"""The hosts of a domain, as a DNS server names them: which of them gets the mail."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq import Engine
from mailerq.config import Config
from mailerq.net.resolver import NoHosts, Resolver
from mailerq.outbound.sites import Site, Sites
from mailerq.rules.routes import Route
from mailerq.settings import DnsServer as DnsAddress
from tests.net.dns_server import DnsServer, Table, open_dns_server
from tests.outbound.kit import Bench, PeerConnection, Script, open_bench
from tests.support import DEADLINE, configure

HOST: Table = {
    ("one.test", "A"): ["127.0.0.1"],
    ("two.test", "A"): ["127.0.0.2"],
    ("three.test", "A"): ["127.0.0.3"],
    ("four.test", "A"): ["127.0.0.4"],
}


def mx(*hosts: str) -> list[str]:
    """MX records: ``10 one`` stands for ``10 one.test.``."""
    return [f"{host}.test." for host in hosts]


def by_host(**scripts: Script) -> Script:
    """A peer that plays each of its addresses; those without a script serve."""
    names = {"127.0.0.1": "one", "127.0.0.2": "two", "127.0.0.3": "three", "127.0.0.4": "four"}

    async def play(peer: PeerConnection) -> None:
        name = names[peer.stream.socket.getsockname()[0]]
        await scripts.get(name, PeerConnection.serve)(peer)

    return play


async def says_421(peer: PeerConnection) -> None:
    await peer.send("421 4.3.2 not now\r\n")


async def breaks_off(peer: PeerConnection) -> None:
    await peer.hello()
    await peer.line()


@asynccontextmanager
async def open_hosts(
    zone: Table, script: Script = PeerConnection.serve, **settings: Any
) -> AsyncIterator[tuple[Bench, DnsServer]]:
    """Hosts at all addresses of 127.0.0.0/8, and the zone that names them."""
    async with open_dns_server({**HOST, **zone}) as server:
        address = DnsAddress(server.host, server.port)
        resolver_settings: dict[str, Any] = {
            "dns_servers": (address,),
            "smtp_out_forbidden": (),
            "smtp_out_port": 2525,  # not the one of this host: its addresses are those of others
            "hostname": "me.test",
        }
        resolver: Any = Resolver(Config(**resolver_settings, dns_timeout=30.0, dns_attempts=1))
        async with open_bench(
            *[script] * 200, resolver=resolver, address="0.0.0.0", **settings
        ) as bench:
            yield bench, server


def targets(bench: Bench) -> Counter[str]:
    return Counter(message.results[-1]["to"] for message in bench.queues["success"])


async def test_hosts_of_the_best_preference_share_the_mail_and_worse_ones_get_none() -> None:
    zone: Table = {("d.test", "MX"): mx("20 three", "10 one", "10 two")}
    async with open_hosts(zone, connection_maxmessages=1) as (bench, _):
        for count in range(1, 31):
            bench.send()
            await bench.results("success", count=count)
        assert set(targets(bench)) == {"127.0.0.1", "127.0.0.2"}


@pytest.mark.parametrize("script", [says_421, breaks_off])
async def test_a_host_that_does_not_let_us_in_is_passed_over(script: Script) -> None:
    async def in_the_greeting(peer: PeerConnection) -> None:
        if script is breaks_off:
            return
        await script(peer)

    zone: Table = {("d.test", "MX"): mx("10 one", "20 two")}
    async with open_hosts(zone, by_host(one=in_the_greeting)) as (bench, _):
        for count in range(1, 6):
            bench.send()
            await bench.results("success", count=count)
        assert targets(bench) == {"127.0.0.2": 5}
        assert bench.queues["retry"] == []
        assert bench.dispatcher.history.is_doubtful("127.0.0.1")


async def test_a_host_that_is_not_there_is_passed_over() -> None:
    zone: Table = {
        ("d.test", "MX"): mx("10 away", "20 two"),
        ("away.test", "AAAA"): ["fe80::1"],  # without its link nothing can be sent there
    }
    async with open_hosts(zone) as (bench, _):
        bench.send()
        (result,) = await bench.results("success")
        assert (result["to"], result["attempt"]) == ("127.0.0.2", 1)


async def test_a_host_that_breaks_off_several_times_is_tried_after_the_others() -> None:
    zone: Table = {("d.test", "MX"): mx("10 one", "20 two")}
    async with open_hosts(zone, by_host(one=breaks_off)) as (bench, _):
        for count in range(1, 4):
            bench.send()
            assert (await bench.results("retry", count=count))[-1]["type"] == "lost"
        for count in range(1, 4):
            bench.send()
            await bench.results("success", count=count)
        assert targets(bench) == {"127.0.0.2": 3}


async def test_refused_recipients_say_nothing_about_a_host() -> None:
    zone: Table = {("d.test", "MX"): mx("10 one", "20 two")}
    async with open_hosts(zone) as (bench, _):
        bench.peer.answers["RCPT", ""] = ["550 5.1.1 nobody", "451 4.2.1 later"] * 5
        for number in range(11):
            bench.send(f"c{number}@d.test")
        await bench.results("success")
        assert targets(bench) == {"127.0.0.1": 1}
        assert not bench.dispatcher.history.is_doubtful("127.0.0.1")


async def test_a_domain_that_takes_no_mail_fails_at_once() -> None:
    async with open_hosts({("d.test", "MX"): ["0 ."]}) as (bench, _):
        bench.send()
        (result,) = await bench.results("failure")
        assert (result["code"], result["status"], result["attempt"]) == (556, "5.1.10", 1)


async def test_a_domain_without_mx_takes_mail_itself_and_an_alias_is_followed() -> None:
    zone: Table = {("d.test", "A"): ["127.0.0.3"], ("e.test", "CNAME"): ["two.test."]}
    async with open_hosts(zone) as (bench, _):
        bench.send("c@d.test")
        await bench.results("success")
        bench.send("c@e.test")
        await bench.results("success", count=2)
        assert targets(bench) == {"127.0.0.3": 1, "127.0.0.2": 1}


async def test_this_host_and_all_worse_ones_get_no_mail() -> None:
    zone: Table = {
        ("d.test", "MX"): mx("10 one", "20 me", "30 two"),
        ("e.test", "MX"): mx("10 me", "30 two"),
        ("me.test", "A"): ["192.0.2.1"],
    }
    async with open_hosts(zone, by_host(one=says_421)) as (bench, _):
        bench.send("c@d.test")
        assert (await bench.retried())["to"] == "127.0.0.1"
        bench.send("c@e.test")
        (result,) = await bench.results("failure")
        assert (result["code"], result["status"]) == (554, "5.4.6")
        assert bench.peer.mails == []


async def test_an_address_that_this_host_listens_on_gets_no_mail(tmp_path: Path) -> None:
    zone: Table = {("d.test", "MX"): mx("10 two", "20 three")}
    async with open_dns_server({**HOST, **zone}) as server:
        config = configure(
            tmp_path,
            smtp_ip=("127.0.0.2",),
            smtp_out_forbidden=(),
            dns_servers=(DnsAddress(server.host, server.port),),
        )
        async with Engine(config) as engine:
            assert engine.addresses[0][0] == "127.0.0.2"
            await engine.publish({"envelope": "a@b.test", "recipient": "c@d.test", "mime": "x"})
            async with engine.consume("failure") as leases:
                with trio.fail_after(DEADLINE):
                    lease = await leases.receive()
    result = lease.message.results[-1]
    assert (result["code"], result["status"]) == (554, "5.4.6")
    assert "loops back" in result["description"]


async def test_one_lookup_serves_all_mail_and_is_asked_again_after_its_time() -> None:
    zone: Table = {("d.test", "MX"): mx("10 one")}
    async with open_hosts(zone) as (bench, server):
        server.may_answer = trio.Event()
        for _ in range(20):
            bench.send()
        await bench.queues.until(lambda queues: len(queues.leased) > 10)
        server.may_answer.set()
        await bench.results("success", count=20)
        assert server.questions["d.test", "MX"] == 1
        assert server.questions["one.test", "A"] == 1


async def test_names_that_are_not_found_are_not_asked_for_by_each_message() -> None:
    async with open_hosts({(".", "NS"): ["a.test."], ("", "NS"): ["a.test."]}) as (bench, server):
        for count in range(1, 6):
            bench.send("c@nowhere.test")
            await bench.results("failure", count=count)
        assert server.questions["nowhere.test", "MX"] == 1


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "2001:db8::1", "[192.0.2.1]", "/run/lmtp", "mx.test"]
)
def test_an_address_or_a_socket_needs_no_lookup(host: str) -> None:
    sites = Sites(Resolver(Config()), lambda domain: "")
    route = Route("d.test", host, 25, mx=False, trusted=True)
    found = sites.known(route)
    if host == "mx.test":
        assert found is None
    else:
        assert isinstance(found, Site)
        assert [each.address for each in found.hosts] == [host.strip("[]")]
        assert sites.known(route) is found


def test_an_address_where_no_mail_may_go_refuses_the_mail() -> None:
    sites = Sites(Resolver(Config()), lambda domain: "")
    found = sites.known(Route("d.test", "127.0.0.1", 25, mx=False))
    assert isinstance(found, NoHosts)
    assert found.reply is not None
    assert found.reply.code == 550
