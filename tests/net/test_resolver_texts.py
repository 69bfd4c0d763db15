"""TXT records, and the addresses of servers that strangers have named."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import dns.rcode

from mailerq import Config
from mailerq.net.resolver import MAX_TEXTS, NoHosts, Resolver
from mailerq.settings import DnsServer
from tests.net.dns_server import DnsServer as Server
from tests.net.dns_server import Zone, open_dns_server

SERVFAIL = int(dns.rcode.SERVFAIL)


@asynccontextmanager
async def resolver(
    zone: Zone, *, dns_timeout: float = 30.0, **settings: object
) -> AsyncIterator[tuple[Resolver, Server]]:
    async with open_dns_server(zone) as server:
        config = Config(
            hostname="me.example",
            dns_servers=(DnsServer(server.host, server.port),),
            dns_timeout=dns_timeout,
            dns_attempts=1,
            **settings,  # type: ignore[arg-type]
        )
        yield Resolver(config), server


async def test_the_strings_of_each_text_record_are_joined() -> None:
    zone: Zone = {("a.example", "TXT"): ['"v=STS" "v1; id=1"', '"other"']}
    async with resolver(zone) as (resolving, server):
        server.ttl = 77
        found = await resolving.texts("a.example")
    assert not isinstance(found, NoHosts)
    assert sorted(found[0]) == [b"other", b"v=STSv1; id=1"] and found[1] == 77


async def test_aliases_of_text_records_are_followed() -> None:
    zone: Zone = {
        ("a.example", "CNAME"): ["b.example."],
        ("b.example", "TXT"): ['"x"'],
    }
    async with resolver(zone) as (resolving, _):
        found = await resolving.texts("a.example")
    assert not isinstance(found, NoHosts) and found[0] == (b"x",)


async def test_no_text_record_is_told_from_no_answer() -> None:
    zone: Zone = {
        ("a.example", "MX"): ["1 mx.example."],
        ("bad.example", "TXT"): SERVFAIL,
        ("late.example", "TXT"): None,
    }
    async with resolver(zone) as (resolving, _):
        for name in ("a.example", "none.example"):
            found = await resolving.texts(name)
            assert not isinstance(found, NoHosts) and found[0] == ()
        for name in ("bad.example", "a" * 70 + ".example"):
            assert isinstance(await resolving.texts(name), NoHosts)
    async with resolver(zone, dns_timeout=0.2) as (resolving, _):
        assert isinstance(await resolving.texts("late.example"), NoHosts)


async def test_many_text_records_are_bounded() -> None:
    zone: Zone = {("a.example", "TXT"): [f'"{n}"' for n in range(MAX_TEXTS + 50)]}
    async with resolver(zone) as (resolving, _):
        found = await resolving.texts("a.example")
    assert not isinstance(found, NoHosts) and len(found[0]) == MAX_TEXTS


async def test_a_server_has_addresses_of_both_families_but_no_forbidden_ones() -> None:
    zone: Zone = {
        ("a.example", "A"): ["192.0.2.1", "127.0.0.1"],
        ("a.example", "AAAA"): ["2001:db8::1"],
        ("in.example", "A"): ["127.0.0.1"],
    }
    async with resolver(zone) as (resolving, _):
        found = await resolving.addresses("a.example")
        assert not isinstance(found, NoHosts)
        assert [host.address for host in found] == ["192.0.2.1", "2001:db8::1"]
        for name in ("in.example", "127.0.0.1", "::1"):
            refused = await resolving.addresses(name)
            assert isinstance(refused, NoHosts) and refused.setting == "smtp-out-forbidden"
        for name in ("no.example", "a b", "x" * 300):
            assert isinstance(await resolving.addresses(name), NoHosts)
    async with resolver(zone, smtp_out_forbidden=()) as (resolving, _):
        allowed = await resolving.addresses("in.example")
        assert not isinstance(allowed, NoHosts) and allowed[0].address == "127.0.0.1"
