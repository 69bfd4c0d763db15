"""Where mail goes, asked of a real DNS server."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import trio

from mailerq.config import Config
from mailerq.net.resolver import MAX_ADDRESSES, MAX_EXCHANGES, Host, NoHosts, Resolver, is_this_host
from tests.net.dns_server import NXDOMAIN, DnsServer, open_dns_server

SERVFAIL, REFUSED = 2, 5
ME = "192.0.2.99"


def resolver_of(server: DnsServer, **settings: Any) -> Resolver:
    config = config_of(server, **settings)
    return Resolver(config, leads_here=lambda address: address in (ME, "127.0.0.1", "::1"))


def config_of(server: DnsServer, **settings: Any) -> Config:
    defaults = {"dns_timeout": 5.0, "dns_attempts": 2, "dns_servers": [server.address]}
    return Config(**{"hostname": "me.test", **defaults, **settings})


def addresses(found: tuple[Host, ...] | NoHosts) -> list[str]:
    assert isinstance(found, tuple), found
    return [host.address for host in found]


def reply_to(found: tuple[Host, ...] | NoHosts) -> tuple[int, str | None]:
    assert isinstance(found, NoHosts), found
    assert found.reply is not None
    return found.reply.code, found.reply.status


def temporary(found: tuple[Host, ...] | NoHosts) -> str:
    assert isinstance(found, NoHosts), found
    assert found.reply is None
    return found.description


async def test_mx_hosts_come_in_the_order_of_their_preference() -> None:
    zone = {
        ("d.test", "MX"): ["20 b.d.test.", "10 A.d.test."],
        ("a.d.test", "A"): ["192.0.2.1"],
        ("a.d.test", "AAAA"): ["2001:db8::1"],
        ("b.d.test", "A"): ["192.0.2.2"],
    }
    async with open_dns_server(zone) as server:
        found = await resolver_of(server).mail_hosts("d.test")
    assert found == (
        Host("a.d.test", "192.0.2.1", 10),
        Host("a.d.test", "2001:db8::1", 10),
        Host("b.d.test", "192.0.2.2", 20),
    )


async def test_hosts_of_equal_preference_share_the_mail() -> None:
    zone: dict[tuple[str, str], Any] = {("d.test", "MX"): ["10 a.test.", "10 b.test."]}
    zone |= {(f"{name}.test", "A"): [f"192.0.2.{i}"] for i, name in enumerate("ab")}
    async with open_dns_server(zone) as server:
        resolver = resolver_of(server)
        first = {addresses(await resolver.mail_hosts("d.test"))[0] for _ in range(100)}
    assert len(first) == 2
    assert server.questions["d.test", "MX"] == 1


async def test_a_domain_without_mx_is_its_own_host() -> None:
    async with open_dns_server({("d.test", "A"): ["192.0.2.1"]}) as server:
        assert addresses(await resolver_of(server).mail_hosts("d.test")) == ["192.0.2.1"]


async def test_null_mx_is_final() -> None:
    zone = {("d.test", "MX"): ["0 ."], ("d.test", "A"): ["192.0.2.1"]}
    async with open_dns_server(zone) as server:
        assert reply_to(await resolver_of(server).mail_hosts("d.test")) == (556, "5.1.10")


ROOT = {("", "NS"): ["a.root-servers.test."]}


async def test_a_domain_that_does_not_exist_is_final() -> None:
    async with open_dns_server({**ROOT, ("alias.test", "CNAME"): ["gone.test."]}) as server:
        resolver = resolver_of(server)
        for name in ("nowhere.test", "alias.test"):
            found = await resolver.mail_hosts(name)
            assert reply_to(found) == (550, "5.1.2")
            assert "does not exist" in found.reply.text  # type: ignore[union-attr]


@pytest.mark.parametrize("root", [None, [], SERVFAIL, REFUSED])
async def test_a_resolver_that_does_not_know_the_root_is_not_believed(
    root: list[str] | int | None,
) -> None:
    zone: dict[tuple[str, str], Any] = {("", "NS"): root}
    async with open_dns_server(zone) as server:
        timeout = 1.0 if root is None else 30.0
        resolver = resolver_of(server, dns_timeout=timeout, dns_attempts=1)
        assert "does not exist" in temporary(await resolver.mail_hosts("nowhere.test"))
        server.zone |= ROOT
        assert reply_to(await resolver.mail_hosts("nowhere.test")) == (550, "5.1.2")


async def test_hosts_that_do_not_exist_are_tried_again() -> None:
    zone = {**ROOT, ("d.test", "MX"): ["10 gone.test."], ("bare.test", "TXT"): ['"x"']}
    async with open_dns_server(zone) as server:
        resolver = resolver_of(server)
        assert "does not exist" in temporary(await resolver.mail_hosts("d.test"))
        assert "no A" in temporary(await resolver.mail_hosts("bare.test"))


async def test_no_mail_goes_to_networks_that_are_forbidden() -> None:
    zone = {
        ("d.test", "MX"): ["10 bad.test.", "20 good.test."],
        ("only.test", "MX"): ["10 bad.test.", "20 worse.test."],
        ("bad.test", "A"): ["192.0.2.1", "169.254.169.254"],
        ("worse.test", "AAAA"): ["::ffff:192.0.2.2", "fe80::1"],
        ("good.test", "A"): ["198.51.100.1"],
    }
    forbidden = (*Config().smtp_out_forbidden, ipaddress.ip_network("192.0.2.0/24"))
    async with open_dns_server(zone) as server:
        resolver = resolver_of(server, smtp_out_forbidden=forbidden)
        assert addresses(await resolver.mail_hosts("d.test")) == ["198.51.100.1"]
        for name in ("only.test", "[192.0.2.9]", "[IPv6:fe80::1]"):
            found = await resolver.mail_hosts(name)
            assert reply_to(found) == (550, "5.7.1")
            assert "smtp-out-forbidden" in found.reply.text  # type: ignore[union-attr]
        for host in ("192.0.2.1", "fe80::1", "localhost", "127.1"):
            assert reply_to(await resolver.host(host, trusted=False)) == (550, "5.7.1")
        assert addresses(await resolver.host("192.0.2.1", trusted=True)) == ["192.0.2.1"]


async def test_a_domain_that_we_relay_waits_for_its_records_to_be_mended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    zone = {
        **ROOT,
        ("relay.test", "MX"): ["10 me.test."],
        ("home.test", "MX"): ["0 ."],
    }
    own = ("relay.test", "home.test", "gone.test", "xn--bcher-kva.test")
    async with open_dns_server(zone) as server:
        resolver = resolver_of(server, smtp_relay_domains=own)
        for name in ("relay.test", "Relay.TEST", "home.test", "gone.test", "bücher.test"):
            assert "in smtp-relay-domains" in temporary(await resolver.mail_hosts(name))
        assert reply_to(await resolver.mail_hosts("other.test")) == (550, "5.1.2")
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert line.startswith("mail to relay.test waits")
    assert "loops back to this host" in line


async def test_mail_for_a_relay_domain_goes_to_the_hosts_before_this_one() -> None:
    zone = {
        ("relay.test", "MX"): ["10 inside.test.", "20 me.test."],
        ("inside.test", "A"): ["192.0.2.1"],
    }
    async with open_dns_server(zone) as server:
        resolver = resolver_of(server, smtp_relay_domains=("relay.test",))
        found = await resolver.mail_hosts("relay.test")
    assert addresses(found) == ["192.0.2.1"]


async def test_without_descriptors_a_lookup_waits() -> None:
    def without_descriptors(address: str) -> bool:
        raise OSError(errno.EMFILE, "Too many open files")

    async with open_dns_server({("d.test", "A"): ["192.0.2.1"]}) as server:
        config = Config(hostname="me.test", dns_servers=[server.address])  # type: ignore[arg-type]
        resolver = Resolver(config, leads_here=without_descriptors)
        for name in ("d.test", "[192.0.2.1]"):
            assert "Too many open files" in temporary(await resolver.mail_hosts(name))


@pytest.mark.parametrize("fault", [SERVFAIL, REFUSED])
async def test_a_server_that_cannot_say_is_not_believed(fault: int) -> None:
    zone: dict[tuple[str, str], Any] = {("d.test", "MX"): fault, ("d.test", "A"): ["192.0.2.1"]}
    async with open_dns_server(zone) as server:
        resolver = resolver_of(server)
        assert temporary(await resolver.mail_hosts("d.test"))
        server.zone["d.test", "MX"] = []
        assert addresses(await resolver.mail_hosts("d.test")) == ["192.0.2.1"]


async def test_silence_has_an_end() -> None:
    async with open_dns_server({("d.test", "MX"): None}) as server:
        resolver = resolver_of(server, dns_timeout=0.1, dns_attempts=5)
        with trio.fail_after(60):
            assert temporary(await resolver.mail_hosts("d.test"))
    assert server.questions["d.test", "MX"] >= 2


async def test_one_dead_host_does_not_hide_the_others() -> None:
    zone: dict[tuple[str, str], Any] = {
        ("d.test", "MX"): ["10 dead.test.", "20 gone.test.", "30 c.test."],
        ("dead.test", "A"): SERVFAIL,
        ("dead.test", "AAAA"): SERVFAIL,
        ("c.test", "A"): ["192.0.2.3"],
    }
    async with open_dns_server(zone) as server:
        assert addresses(await resolver_of(server).mail_hosts("d.test")) == ["192.0.2.3"]


async def test_aliases_are_followed() -> None:
    zone = {
        ("alias.test", "CNAME"): ["d.test."],
        ("d.test", "MX"): ["10 mx.test."],
        ("mx.test", "CNAME"): ["mx1.test."],
        ("mx1.test", "CUT"): [],
        ("mx1.test", "CNAME"): ["mx2.test."],
        ("mx2.test", "A"): ["192.0.2.1"],
    }
    async with open_dns_server(zone) as server:
        assert addresses(await resolver_of(server).mail_hosts("alias.test")) == ["192.0.2.1"]


async def test_a_circle_of_aliases_ends() -> None:
    zone = {
        ("a.test", "CNAME"): ["b.test."],
        ("b.test", "CNAME"): ["a.test."],
        ("a.test", "CUT"): [],
        ("b.test", "CUT"): [],
    }
    async with open_dns_server(zone) as server:
        assert temporary(await resolver_of(server).mail_hosts("a.test"))
        del server.zone["a.test", "CUT"], server.zone["b.test", "CUT"]
        assert temporary(await resolver_of(server).mail_hosts("a.test"))


async def test_a_hundred_hosts_are_cut_to_a_bounded_number() -> None:
    zone: dict[tuple[str, str], Any] = {("d.test", "MX"): [f"{i} mx{i}.test." for i in range(100)]}
    zone |= {(f"mx{i}.test", "A"): [f"192.0.{i}.{j}" for j in range(1, 21)] for i in range(100)}
    async with open_dns_server(zone) as server:
        found = addresses(await resolver_of(server).mail_hosts("d.test"))
    assert len(found) == MAX_ADDRESSES
    assert found[0].startswith("192.0.0.")
    assert sum(kind == "A" for _, kind in server.questions) == MAX_EXCHANGES


@pytest.mark.parametrize(
    ("records", "left"),
    [
        (["10 mx1.test.", "20 me.test.", "30 mx2.test."], ["192.0.2.1"]),
        (["10 mx1.test.", "20 alias-of-me.test.", "20 mx2.test."], ["192.0.2.1"]),
        (["10 mx1.test.", "20 loopback.test."], ["192.0.2.1"]),
        (["10 me.test.", "20 mx1.test."], None),
        (["10 loopback.test."], None),
        (["10 loopback6.test.", "10 mx1.test."], None),
    ],
)
async def test_mail_never_goes_to_this_host_nor_past_it(
    records: list[str], left: list[str] | None
) -> None:
    zone = {
        ("d.test", "MX"): records,
        ("mx1.test", "A"): ["192.0.2.1"],
        ("mx2.test", "A"): ["192.0.2.2"],
        ("alias-of-me.test", "A"): ["192.0.2.77", ME],
        ("loopback.test", "A"): ["127.0.0.1"],
        ("loopback6.test", "AAAA"): ["::1"],
    }
    async with open_dns_server(zone) as server:
        found = await resolver_of(server).mail_hosts("d.test")
    if left is None:
        assert reply_to(found) == (554, "5.4.6")
    else:
        assert addresses(found) == left


async def test_address_literals_need_no_dns() -> None:
    async with open_dns_server({}) as server:
        resolver = resolver_of(server)
        assert addresses(await resolver.mail_hosts("[192.0.2.1]")) == ["192.0.2.1"]
        assert addresses(await resolver.mail_hosts("[IPv6:2001:db8::1]")) == ["2001:db8::1"]
        assert reply_to(await resolver.mail_hosts("[127.0.0.1]")) == (554, "5.4.6")
        assert reply_to(await resolver.mail_hosts("[IPv6:::1]")) == (554, "5.4.6")
        assert reply_to(await resolver.mail_hosts("[nonsense]")) == (550, "5.1.2")
        assert reply_to(await resolver.mail_hosts("[192.0.2.1")) == (550, "5.1.2")
    assert not server.questions


async def test_names_that_cannot_be_asked_for_are_final() -> None:
    async with open_dns_server({}) as server:
        resolver = resolver_of(server)
        for name in ("", "a..b.test", "x" * 64 + ".test", ".".join(["abc"] * 80)):
            assert reply_to(await resolver.mail_hosts(name)) == (550, "5.1.2")


async def test_domains_that_are_not_ascii_are_asked_for_as_a_labels() -> None:
    async with open_dns_server({("xn--bcher-kva.test", "A"): ["192.0.2.1"]}) as server:
        assert addresses(await resolver_of(server).mail_hosts("bücher.test")) == ["192.0.2.1"]


async def test_many_who_ask_at_once_share_one_lookup() -> None:
    async with open_dns_server({("d.test", "A"): ["192.0.2.1"]}) as server:
        resolver = resolver_of(server)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(resolver.mail_hosts, "d.test")
    assert server.questions["d.test", "MX"] == 1


async def test_a_lookup_whose_task_is_cancelled_is_taken_over() -> None:
    async with open_dns_server({("d.test", "A"): ["192.0.2.1"]}) as server:
        resolver = resolver_of(server)
        server.may_answer = trio.Event()
        found: list[Any] = []

        async def ask() -> None:
            found.append(await resolver.mail_hosts("d.test"))

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(resolver.mail_hosts, "d.test")
                await trio.testing.wait_all_tasks_blocked()
                async with trio.open_nursery() as others:
                    others.start_soon(ask)
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
        server.may_answer.set()
        await ask()
        assert addresses(found[-1]) == ["192.0.2.1"]


async def test_answers_are_kept_for_their_ttl_within_bounds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = float("inf")
    async with open_dns_server({("d.test", "A"): ["192.0.2.1"]}) as server:
        resolver = resolver_of(server)
        for ttl, kept in ((0, 60), (300, 300), (10**6, 3600)):
            server.ttl = ttl
            server.questions.clear()
            await resolver.mail_hosts("d.test")
            autojump_clock.jump(kept - 1)
            await resolver.mail_hosts("d.test")
            assert server.questions["d.test", "A"] == 1
            autojump_clock.jump(2)
            await resolver.mail_hosts("d.test")
            assert server.questions["d.test", "A"] == 2
            autojump_clock.jump(4000)


async def test_an_answer_that_was_cut_short_is_asked_for_again_by_tcp() -> None:
    async with open_dns_server({("d.test", "A"): ["192.0.2.1"]}) as server:
        server.truncate = True
        assert addresses(await resolver_of(server).mail_hosts("d.test")) == ["192.0.2.1"]
        assert server.tcp_questions > 0


async def test_the_next_dns_server_is_asked_where_one_does_not_know() -> None:
    zone: dict[tuple[str, str], Any] = {("d.test", "A"): ["192.0.2.1"]}
    async with (
        open_dns_server(lambda name, kind: None) as silent,
        open_dns_server(lambda name, kind: SERVFAIL) as broken,
        open_dns_server(zone, "::1" if socket.has_ipv6 else "127.0.0.1") as good,
        open_dns_server(lambda name, kind: ["192.0.2.2"]) as spare,
    ):
        servers = [each.address for each in (silent, broken, good, spare)]
        resolver = resolver_of(good, dns_servers=servers, dns_timeout=2.0, dns_attempts=50)
        with trio.fail_after(60):
            found = await resolver.mail_hosts("d.test")
    assert addresses(found) == ["192.0.2.1"]
    assert silent.questions["d.test", "MX"] == broken.questions["d.test", "MX"] == 1
    assert not spare.questions


async def test_a_zone_may_have_any_number_of_domains() -> None:
    def zone(name: str, kind: str) -> list[str] | int:
        first, _, rest = name.partition(".")
        if rest != "flow.test":
            return NXDOMAIN
        return {"MX": [f"10 mx{first[1:]}.flow.test."], "A": ["192.0.2.1"]}.get(kind, [])

    async with open_dns_server(zone) as server:
        resolver = resolver_of(server)
        for number in (0, 4999):
            found = await resolver.mail_hosts(f"d{number}.flow.test")
            assert found == (Host(f"mx{number}.flow.test", "192.0.2.1", 10),)


@pytest.mark.parametrize(
    ("settings", "loops"),
    [
        ({}, True),
        ({"smtp_out_port": 2525, "smtp_port": (25, 2525)}, True),
        ({"smtp_out_port": 2525, "smtp_port": (25,)}, False),
    ],
)
async def test_an_address_of_this_host_leads_here_by_a_port_that_is_ours(
    settings: dict[str, Any], loops: bool
) -> None:
    async with open_dns_server({("d.test", "A"): ["127.0.0.1"]}) as server:
        config = Config(dns_servers=(server.address,), smtp_out_forbidden=(), **settings)
        for name in ("d.test", "[127.0.0.1]"):
            found = await Resolver(config).mail_hosts(name)
            if loops:
                assert reply_to(found) == (554, "5.4.6")
            else:
                assert addresses(found) == ["127.0.0.1"]


async def test_a_configured_host_may_be_this_one() -> None:
    resolver = Resolver(Config(hostname="me.test"))
    assert addresses(await resolver.host("127.0.0.1", trusted=True)) == ["127.0.0.1"]
    assert addresses(await resolver.host("[IPv6:::1]", trusted=True)) == ["::1"]
    assert addresses(await resolver.host("[192.0.2.1]", trusted=True)) == ["192.0.2.1"]
    assert "127.0.0.1" in addresses(await resolver.host("localhost", trusted=True))
    assert temporary(await resolver.host("nowhere.invalid", trusted=True))


def test_this_host_knows_its_addresses() -> None:
    for address in ("127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1"):
        assert is_this_host(address)
    for address in ("192.0.2.1", "2001:db8::1", "198.51.100.7"):
        assert not is_this_host(address)


def test_a_host_without_ipv6_is_not_the_one_at_an_ipv6_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_ipv6(family: int, *_: int) -> None:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", without_ipv6)
    assert not is_this_host("2001:db8::1")


def test_dnspython_is_imported_late() -> None:
    code = "import sys, mailerq.net.resolver; sys.exit('dns' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


async def test_other_settings_hold_for_the_next_lookup() -> None:
    networks = Config.load(["--smtp-out-forbidden=192.0.2.0/24"], {}, ()).smtp_out_forbidden
    async with open_dns_server({("d.test", "A"): ["192.0.2.1"]}) as server:
        resolver = resolver_of(server)
        assert addresses(await resolver.mail_hosts("d.test")) == ["192.0.2.1"]
        resolver.configure(config_of(server, smtp_out_forbidden=networks))
        assert reply_to(await resolver.mail_hosts("d.test")) == (550, "5.7.1")
        assert server.questions["d.test", "A"] == 2  # what was known is asked again
        resolver.configure(config_of(server, hostname="d.test"))
        assert reply_to(await resolver.mail_hosts("d.test")) == (554, "5.4.6")


async def test_a_lookup_under_way_keeps_its_answer_to_itself() -> None:
    """Later ones go by other settings: they share neither the lookup nor what it has found."""
    found: list[Any] = []

    async def look() -> None:
        found.append(await resolver.mail_hosts("d.test"))

    async with open_dns_server({("d.test", "A"): ["192.0.2.1"]}) as server:
        resolver = resolver_of(server)
        server.may_answer = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await trio.testing.wait_all_tasks_blocked()
            resolver.configure(config_of(server, hostname="d.test"))
            nursery.start_soon(look)
            await trio.testing.wait_all_tasks_blocked()
            server.may_answer.set()
        kinds = sorted(type(each).__name__ for each in found)
        assert kinds == ["NoHosts", "tuple"]
        assert reply_to(await resolver.mail_hosts("d.test")) == (554, "5.4.6")
