"""What a validating resolver says of a domain and its hosts, and what DANE makes of that."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from mailerq.config import Config
from mailerq.net.dane import AGAIN_SECONDS, Dane
from mailerq.net.dns_client import Stub
from mailerq.net.resolver import NoHosts, Resolver
from mailerq.rules.security import PolicyUnknown, Tlsa, TlsaSet
from mailerq.settings import DnsServer as Address
from tests.net.dns_server import NXDOMAIN, DnsServer, open_dns_server

SERVFAIL, NOTIMP = 2, 4
KEY = "ab" * 32
ROOT: Any = {("", "NS"): ["a.root-servers.test."]}
ZONE: dict[tuple[str, str], Any] = {
    **ROOT,
    ("d.test", "MX"): ["10 mx.test."],
    ("mx.test", "A"): ["192.0.2.1"],
    ("_25._tcp.mx.test", "TLSA"): [f"3 1 1 {KEY}"],
}
RECORD = Tlsa(3, 1, 1, bytes.fromhex(KEY))


def signed(*insecure: str) -> Callable[[str, str], bool]:
    """All zones are signed but those below these names."""
    return lambda name, kind: not any(f".{name}".endswith(f".{zone}") for zone in insecure)


@asynccontextmanager
async def open_dane(
    zone: dict[tuple[str, str], Any], *insecure: str, **more: Any
) -> AsyncIterator[tuple[Dane, DnsServer]]:
    """DANE by a resolver that validates."""
    async with open_dns_server({**ZONE, **zone}) as server:
        server.secure = signed(*insecure)
        settings = {
            "hostname": "me.test",
            "dns_servers": (Address(server.host, server.port),),
            "dns_timeout": 5.0,
            "dns_attempts": 1,
            **more,
        }
        yield Dane(Resolver(Config(**settings))), server


def asked(server: DnsServer, kind: str) -> set[str]:
    return {name for name, asked in server.questions if asked == kind}


# -- is the domain secure? ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zone", "insecure", "secure"),
    [
        ({}, (), True),
        ({}, ("d.test",), False),
        ({}, ("mx.test",), True),
        ({("d.test", "MX"): [], ("d.test", "A"): ["192.0.2.9"]}, (), True),
        ({("d.test", "MX"): [], ("d.test", "A"): ["192.0.2.9"]}, ("d.test",), False),
        ({("d.test", "MX"): ["0 ."]}, (), True),
        ({("d.test", "MX"): NXDOMAIN}, (), False),
    ],
    ids=["mx", "insecure", "insecure-host", "no-mx", "no-mx-insecure", "null-mx", "gone"],
)
async def test_whether_the_mx_records_are_proved(
    zone: dict[tuple[str, str], Any], insecure: tuple[str, ...], *, secure: bool
) -> None:
    async with open_dane(zone, *insecure) as (dane, server):
        assert await dane.is_secure("d.test") is secure
        await dane.is_secure("d.test")
        assert server.questions["d.test", "MX"] == 1


@pytest.mark.parametrize("fault", [SERVFAIL, None], ids=["servfail", "silence"])
async def test_mx_records_that_nobody_can_know_make_the_mail_wait(fault: int | None) -> None:
    async with open_dane({("d.test", "MX"): fault}, dns_timeout=0.2) as (dane, _):
        with pytest.raises(PolicyUnknown, match=r"d\.test"):
            await dane.is_secure("d.test")
        found = await dane._resolver.mail_hosts("d.test")
        assert isinstance(found, NoHosts) and found.reply is None


async def test_an_address_is_no_domain_that_could_be_proved() -> None:
    async with open_dane({}) as (dane, server):
        assert not await dane.is_secure("[192.0.2.1]")
        assert not server.questions


async def test_a_proved_domain_that_does_not_exist_needs_no_further_proof() -> None:
    """The root is asked only to find out whether a resolver without proof is sound."""
    async with open_dane({}) as (dane, server):
        found = await dane._resolver.mail_hosts("gone.test")
        assert isinstance(found, NoHosts) and found.reply is not None
        assert ("", "NS") not in server.questions


# -- the records of a host --------------------------------------------------------------------


async def test_the_records_of_a_host() -> None:
    async with open_dane({}) as (dane, server):
        assert await dane.is_secure("d.test")
        records = await dane.tlsa("mx.test", 25)
        assert records == TlsaSet("mx.test", frozenset((RECORD,)))
        assert await dane.tlsa("MX.test.", 25) == records
        assert await dane.tlsa("mx.test", 26) is None
        assert server.questions["_25._tcp.mx.test", "TLSA"] == 1
        assert server.questions["mx.test", "A"] == 1  # asked for with the hosts of the domain


async def test_one_question_for_all_that_ask_at_once() -> None:
    async with open_dane({}) as (dane, server):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(dane.tlsa, "mx.test", 25)
        assert server.questions["_25._tcp.mx.test", "TLSA"] == 1


@pytest.mark.parametrize(
    ("records", "usable"),
    [
        ([], None),
        (NXDOMAIN, None),
        ([f"1 1 1 {KEY}", f"0 0 1 {KEY}"], frozenset()),
        ([f"3 1 7 {KEY}"], frozenset()),
        ([r"\# 5 030101abcd"], frozenset()),
        ([r"\# 2 0301", rf"\# 35 030101{KEY}"], frozenset((RECORD,))),
        ([r"\# 4 03010200", r"\# 0 "], frozenset()),
        ([f"1 1 1 {KEY}", f"3 1 1 {KEY}"], frozenset((RECORD,))),
        ([f"2 0 1 {KEY}"], frozenset((Tlsa(2, 0, 1, bytes.fromhex(KEY)),))),
    ],
    ids=[
        "none",
        "nxdomain",
        "pkix",
        "unknown-digest",
        "short",
        "broken",
        "all-broken",
        "mixed",
        "anchor",
    ],
)
async def test_what_the_records_say(records: Any, usable: frozenset[Tlsa] | None) -> None:
    async with open_dane({("_25._tcp.mx.test", "TLSA"): records}) as (dane, _):
        found = await dane.tlsa("mx.test", 25)
        assert found == (None if usable is None else TlsaSet("mx.test", usable))


@pytest.mark.parametrize("fault", [SERVFAIL, NOTIMP, None], ids=["servfail", "notimp", "silence"])
async def test_a_host_whose_records_nobody_can_know_is_not_used(fault: int | None) -> None:
    zone = {("_25._tcp.mx.test", "TLSA"): fault}
    async with open_dane(zone, dns_timeout=1.0 if fault is None else 5.0) as (dane, server):
        for _ in range(3):
            with pytest.raises(PolicyUnknown, match=r"_25\._tcp\.mx\.test"):
                await dane.tlsa("mx.test", 25)
        assert server.questions["_25._tcp.mx.test", "TLSA"] <= 2  # also failure is kept


async def test_a_failure_is_asked_again_soon(autojump_clock: object) -> None:
    zone: dict[tuple[str, str], Any] = {("_25._tcp.mx.test", "TLSA"): SERVFAIL}
    resolver = Resolver(Config(hostname="me.test"))
    resolver._client = TableClient({**ZONE, **zone})  # type: ignore[assignment]
    dane = Dane(resolver)
    with pytest.raises(PolicyUnknown):
        await dane.tlsa("mx.test", 25)
    resolver._client.zone.update(ZONE)  # type: ignore[attr-defined]
    with pytest.raises(PolicyUnknown):
        await dane.tlsa("mx.test", 25)
    await trio.sleep(11)
    assert await dane.tlsa("mx.test", 25) is not None


async def test_servers_of_unsigned_zones_are_not_asked() -> None:
    """Many do not answer."""
    zone = {("_25._tcp.mx.test", "TLSA"): SERVFAIL}
    async with open_dane(zone, "mx.test") as (dane, server):
        assert await dane.is_secure("d.test")
        assert await dane.tlsa("mx.test", 25) is None
        assert not asked(server, "TLSA")
        assert not asked(server, "CNAME")


async def test_one_secure_family_of_addresses_is_enough() -> None:
    zone = {("mx.test", "AAAA"): ["2001:db8::1"]}
    for kind in ("A", "AAAA"):
        async with open_dane(zone) as (dane, server):
            server.secure = lambda name, asked, kind=kind: name != "mx.test" or asked == kind
            assert await dane.tlsa("mx.test", 25) is not None


async def test_one_family_that_fails_does_not_hide_the_other() -> None:
    for kind, other in (("A", "AAAA"), ("AAAA", "A")):
        zone: dict[tuple[str, str], Any] = {("mx.test", other): ["2001:db8::1", "192.0.2.1"][:1]}
        zone[("mx.test", "A")] = SERVFAIL if kind == "A" else ["192.0.2.1"]
        zone[("mx.test", "AAAA")] = SERVFAIL if kind == "AAAA" else ["2001:db8::1"]
        async with open_dane(zone) as (dane, _):
            assert await dane.tlsa("mx.test", 25) is not None
        async with open_dane(zone, "mx.test") as (dane, server):
            assert await dane.tlsa("mx.test", 25) is None
            assert not asked(server, "TLSA")


async def test_a_host_whose_addresses_nobody_can_know_is_not_used() -> None:
    zone = {("mx.test", "A"): SERVFAIL, ("mx.test", "AAAA"): SERVFAIL}
    async with open_dane(zone) as (dane, server):
        with pytest.raises(PolicyUnknown, match=r"mx\.test"):
            await dane.tlsa("mx.test", 25)
        assert not asked(server, "TLSA")


# -- aliases ------------------------------------------------------------------------------------

ALIAS: dict[tuple[str, str], Any] = {
    ("d.test", "MX"): ["10 alias.test."],
    ("alias.test", "CNAME"): ["mx.test."],
}
AT_ALIAS: dict[tuple[str, str], Any] = {("_25._tcp.alias.test", "TLSA"): [f"3 1 1 {'cd' * 32}"]}
NOT_THERE: dict[tuple[str, str], Any] = {("_25._tcp.mx.test", "TLSA"): NXDOMAIN}


@pytest.mark.parametrize(
    ("zone", "insecure", "base"),
    [
        ({**ALIAS, **AT_ALIAS}, (), "mx.test"),
        ({**ALIAS, **AT_ALIAS, **NOT_THERE}, (), "alias.test"),
        ({**ALIAS, **NOT_THERE}, (), None),
        ({**ALIAS, **AT_ALIAS}, ("mx.test",), "alias.test"),
        ({**ALIAS, **AT_ALIAS}, ("alias.test",), None),
        ({**ALIAS, **AT_ALIAS}, ("alias.test", "mx.test"), None),
        ({**ALIAS}, ("mx.test",), None),
    ],
    ids=["both", "only-alias", "neither", "target-insecure", "alias-insecure", "insecure", "none"],
)
async def test_aliases_of_hosts(
    zone: dict[tuple[str, str], Any], insecure: tuple[str, ...], base: str | None
) -> None:
    async with open_dane(zone, *insecure) as (dane, server):
        found = await dane.tlsa("alias.test", 25)
        assert (found and found.base_domain) == base
        if "mx.test" in insecure:
            assert "_25._tcp.mx.test" not in asked(server, "TLSA")
        if "alias.test" in insecure:
            assert not asked(server, "TLSA")


async def test_a_failure_at_the_end_of_an_alias_is_not_passed_over() -> None:
    zone = {**ALIAS, **AT_ALIAS, ("_25._tcp.mx.test", "TLSA"): SERVFAIL}
    async with open_dane(zone) as (dane, server):
        with pytest.raises(PolicyUnknown):
            await dane.tlsa("alias.test", 25)
        assert "_25._tcp.alias.test" not in asked(server, "TLSA")


async def test_an_alias_that_nobody_can_know_makes_the_host_unusable() -> None:
    table = {**ZONE, **ALIAS, **AT_ALIAS}
    resolver = Resolver(Config(hostname="me.test"))
    resolver._client = TableClient(table, "mx.test", fails={("alias.test", "CNAME")})  # type: ignore[assignment]
    with pytest.raises(PolicyUnknown, match=r"alias\.test"):
        await Dane(resolver).tlsa("alias.test", 25)


async def test_records_behind_an_alias_of_their_own() -> None:
    zone: dict[tuple[str, str], Any] = {
        ("_25._tcp.mx.test", "TLSA"): [],
        ("_25._tcp.mx.test", "CNAME"): ["keys.test."],
        ("keys.test", "TLSA"): [f"3 1 1 {KEY}"],
    }
    async with open_dane(zone) as (dane, _):
        found = await dane.tlsa("mx.test", 25)
        assert found == TlsaSet("mx.test", frozenset((RECORD,)))
    async with open_dane(zone, "keys.test") as (dane, _):
        assert await dane.tlsa("mx.test", 25) is None


async def test_names_count_where_an_authority_issues_certificates() -> None:
    anchor = {("_25._tcp.mx.test", "TLSA"): [f"2 0 1 {KEY}"]}
    alias = {
        ("d.test", "MX"): [],
        ("d.test", "CNAME"): ["e.test."],
        ("e.test", "MX"): ["1 mx.test."],
    }
    for zone, names in (
        ({}, ()),
        (anchor, ("d.test",)),
        ({**anchor, **alias}, ("d.test", "e.test")),
    ):
        async with open_dane(zone, smtp_out_port=25) as (dane, _):
            assert await dane.names("d.test") == names
            records = await dane.tlsa("mx.test", 25, names)
            assert records is not None and records.names == names
    async with open_dane(anchor, "d.test") as (dane, _):
        assert await dane.names("d.test") == ()


async def test_a_huge_answer_is_not_read() -> None:
    many = [f"3 1 1 {number:064x}" for number in range(1000)]
    async with open_dane({("_25._tcp.mx.test", "TLSA"): many}) as (dane, _):
        with pytest.raises(PolicyUnknown, match="more than 16384 bytes"):
            await dane.tlsa("mx.test", 25)
    async with open_dane({("_25._tcp.mx.test", "TLSA"): many[:100]}) as (dane, _):
        records = await dane.tlsa("mx.test", 25)
        assert records is not None and len(records.records) == 100


async def test_a_host_name_that_leaves_no_room_has_no_records() -> None:
    name = ".".join(["a" * 60] * 4) + ".test"
    async with open_dane({(name, "A"): ["192.0.2.1"]}) as (dane, server):
        assert await dane.tlsa(name, 25) is None
        assert not asked(server, "TLSA")


# -- whose word counts ------------------------------------------------------------------------


class TableClient:
    """A client that answers from a table."""

    def __init__(
        self, zone: dict[tuple[str, str], Any], *insecure: str, fails: Any = frozenset()
    ) -> None:
        self.zone = dict(zone)
        self.server = DnsServer(self.zone)
        self.secure = signed(*insecure)
        self.fails = fails

    async def ask(self, name: str, kind: str) -> Any:
        import dns.flags
        import dns.message

        from mailerq.net.dns_client import NoAnswer, answer_in

        await trio.lowlevel.checkpoint()
        if (name, kind) in self.fails:
            raise NoAnswer(f"{name}: fails")
        self.server.zone, self.server.secure = self.zone, self.secure
        query = dns.message.make_query(name, kind, flags=dns.flags.RD | dns.flags.AD)
        wire = self.server.answer(query.to_wire())
        assert wire is not None
        message = dns.message.from_wire(wire)
        return answer_in(message, name, secure=bool(message.flags & dns.flags.AD))

    def untrusted(self) -> str:
        return ""

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("servers", "more", "trusted"),
    [
        (["127.0.0.1"], {}, True),
        (["127.0.0.53", "::1"], {}, True),
        (["192.0.2.53"], {}, False),
        (["127.0.0.1", "192.0.2.53"], {}, False),
        (["192.0.2.53"], {"dns_trust_ad": True}, True),
        (["192.0.2.53"], {"dns_validator": "unbound"}, True),
    ],
)
def test_only_servers_on_this_host_are_believed(
    servers: list[str], more: dict[str, Any], *, trusted: bool
) -> None:
    config = Config(hostname="me.test", dns_servers=tuple(map(Address, servers)), **more)
    standing = Dane(Resolver(config)).standing()
    assert standing.in_force is trusted, standing
    if not trusted:
        assert "192.0.2.53 is not on this host" in standing.text
        assert standing.setting == "dns-servers"


async def test_a_bit_that_nobody_may_believe_is_not_asked_for_and_not_read() -> None:
    async with open_dane({}) as (dane, server):
        client = Stub(dane._resolver.config)
        client._far_server = lambda resolver: "192.0.2.53"  # type: ignore[method-assign]
        dane._resolver._client = client
        flags: list[int] = []
        answer = server.answer

        def lying(wire: bytes, *, tcp: bool = False) -> bytes | None:
            """Sets the bit for everybody."""
            import dns.flags

            flags.append(wire[3] & 0x20)
            reply = bytearray(answer(wire, tcp=tcp) or b"")
            reply[3] |= dns.flags.AD
            return bytes(reply)

        server.answer = lying  # type: ignore[method-assign]
        assert not await dane.is_secure("d.test")
        assert await dane.tlsa("mx.test", 25) is None
        assert not any(flags)
        assert not asked(server, "TLSA")


async def test_without_dane_nothing_more_is_asked() -> None:
    async with open_dane({}, dane=False) as (dane, server):
        assert not await dane.is_secure("d.test")
        await dane._resolver.mail_hosts("d.test")
        assert set(server.questions) == {("d.test", "MX"), ("mx.test", "A"), ("mx.test", "AAAA")}
        assert dane.standing().setting == "dane"


async def test_a_resolver_that_does_not_validate_proves_nothing() -> None:
    async with open_dane({}, "test", "") as (dane, server):
        server.secure = lambda name, kind: False
        assert not await dane.is_secure("d.test")
        assert await dane.tlsa("mx.test", 25) is None
        standing = await dane.probe()
        assert not standing.in_force and "does not validate" in standing.text


# -- the probe ------------------------------------------------------------------------------------


async def test_a_resolver_that_validates_is_told() -> None:
    async with open_dane({}) as (dane, _):
        assert (await dane.probe()).text == "DANE is in force: the resolver validates"


@pytest.mark.parametrize(
    ("denial", "words"),
    [
        (SERVFAIL, "does not answer when asked"),
        ([f"3 1 1 {KEY}"], "makes up records"),
        ("insecure", "does not say that it is proved"),
    ],
)
async def test_a_resolver_that_mangles_denials_is_named(denial: Any, words: str) -> None:
    zone = {} if denial == "insecure" else {("_25._tcp", "TLSA"): denial}
    async with open_dane(zone, "_tcp" if denial == "insecure" else "none") as (dane, _):
        standing = await dane.probe()
        assert standing.faulty and standing.in_force
        assert words in standing.text and "mangles negative answers" in standing.text


async def test_a_resolver_that_is_not_up_yet_is_asked_again(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    resolver = Resolver(Config(hostname="me.test"))
    resolver._client = client = TableClient(ZONE, fails={(".", "NS")})  # type: ignore[assignment]
    with caplog.at_level(logging.INFO):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Dane(resolver).say)
            await trio.sleep(AGAIN_SECONDS / 2)
            client.fails = frozenset()
    texts = [record.getMessage() for record in caplog.records]
    assert "does not answer: .: fails" in texts[0]
    assert texts[1:] == ["DANE is in force: the resolver validates"]


# -- smarthosts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zone", "insecure", "proved"),
    [
        ({}, (), True),
        ({}, ("mx.test",), False),
        ({("mx.test", "A"): NXDOMAIN}, (), False),
        ({("mx.test", "A"): SERVFAIL, ("mx.test", "AAAA"): SERVFAIL}, (), False),
        ({("mx.test", "A"): None, ("mx.test", "AAAA"): None}, (), False),
        ({("mx.test", "CNAME"): ["host.test."], ("host.test", "A"): ["192.0.2.1"]}, (), True),
    ],
    ids=["proved", "insecure", "gone", "servfail", "silence", "alias"],
)
async def test_whether_the_addresses_of_a_smarthost_are_proved(
    zone: dict[tuple[str, str], Any], insecure: tuple[str, ...], proved: bool
) -> None:
    async with open_dane(zone, *insecure) as (dane, server):
        with trio.fail_after(4):
            assert await dane.is_proved("mx.test") is proved
        assert not asked(server, "TLSA") and not asked(server, "MX")


async def test_nobody_is_asked_about_a_smarthost_where_dane_is_off() -> None:
    async with open_dane({}, dane=False) as (dane, server):
        assert not await dane.is_proved("mx.test")
        assert not server.questions
