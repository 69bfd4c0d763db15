"""DANE from the DNS to the peer: real records, real certificates, and what goes how."""

from __future__ import annotations

import hashlib
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from mailerq.config import Config
from mailerq.live import Live
from mailerq.net.dane import Dane
from mailerq.net.resolver import Host, Resolver
from mailerq.outbound.policies import Policies
from mailerq.outbound.tls_reports import TlsReports
from mailerq.rules.security import Reason
from mailerq.settings import DnsServer as Address
from mailerq.store.tls_counts import TlsCounts
from tests.net.dns_server import NXDOMAIN, DnsServer, Records, open_dns_server
from tests.outbound.kit import Bench, PeerConnection, Script, open_bench
from tests.outbound.tls_kit import NAME, Recorded, breaks, starttls

SERVFAIL = 2
DER = serialization.Encoding.DER
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo


class Chain(NamedTuple):
    """A certificate of a peer, its issuer that the peer presents, and a context of a server."""

    leaf: bytes
    issuer: bytes
    context: ssl.SSLContext

    def tlsa(self, usage: int) -> str:
        """The record ``usage 1 1`` for the leaf or the issuer."""
        der = self.leaf if usage == 3 else self.issuer
        key = x509.load_der_x509_certificate(der).public_key().public_bytes(DER, SPKI)
        return f"{usage} 1 1 {hashlib.sha256(key).hexdigest()}"


def make(*names: str, **more: Any) -> Chain:
    authority = trustme.CA().create_child_ca()
    issued = authority.issue_cert(*names, **more)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    issued.configure_cert(context)
    ders = [
        x509.load_pem_x509_certificate(pem.bytes()).public_bytes(DER)
        for pem in (issued.cert_chain_pems[0], authority.cert_pem)
    ]
    return Chain(*ders, context)


@pytest.fixture(scope="module")
def chains() -> dict[str, Chain]:
    from datetime import UTC, datetime, timedelta

    past = [datetime.now(UTC) - timedelta(days=days) for days in (9, 1)]
    return {
        "good": make(NAME),
        "other": make(NAME),
        "misnamed": make("elsewhere.test"),
        "expired": make(NAME, not_before=past[0], not_after=past[1]),
        "domain": make("d.test"),
    }


@asynccontextmanager
async def open_world(
    records: Records,
    *scripts: Script,
    insecure: str = "nothing",
    more: dict[tuple[str, str], Records] | None = None,
    recorder: Any = None,
    dns_timeout: float = 30.0,
    **settings: Any,
) -> AsyncIterator[tuple[Bench, DnsServer, Any]]:
    """Deliveries to d.test and e.test, whose host has these TLSA records, whatever its port."""
    table: dict[tuple[str, str], Records] = {
        ("d.test", "MX"): [f"10 {NAME}."],
        ("e.test", "MX"): [f"10 {NAME}."],
        (NAME, "A"): ["127.0.0.1"],
        (f"_tcp.{NAME}", "TLSA"): records,
        **(more or {}),
    }

    def zone(name: str, kind: str) -> Records:
        name = re.sub(r"^_[0-9]+\.", "", name)
        known = name in {each for each, _ in table}
        return table.get((name, kind), [] if known else NXDOMAIN)

    async with open_dns_server(zone) as server:
        server.secure = lambda name, kind: not name.endswith(insecure)
        config = Config(
            hostname="me.test",
            dns_servers=(Address(server.host, server.port),),
            dns_timeout=dns_timeout,
            dns_attempts=1,
            smtp_out_forbidden=(),
            smtp_out_port=2525,
            dane=settings.get("dane", True),
        )
        resolver: Any = Resolver(config)
        recorded = Recorded()
        policies = Policies(dane=Dane(resolver), recorder=recorder or recorded)
        async with open_bench(*scripts, resolver=resolver, policies=policies, **settings) as bench:
            yield bench, server, recorded


SECURE, VERIFIED, CLEAR, WAITS = "secure", "verified", "clear", "waits"
PEERS = ("good", "misnamed", "expired", "no starttls", "reset")
ANY: dict[str, str] = dict(zip(PEERS, (SECURE, SECURE, SECURE, CLEAR, CLEAR), strict=True))
"""As without DANE: any certificate, and clear where TLS fails."""
ENCRYPTED = dict(zip(PEERS, (SECURE, SECURE, SECURE, WAITS, WAITS), strict=True))
NOTHING = dict.fromkeys(PEERS, WAITS)

MATRIX = {
    "none": ANY,
    "no such name": ANY,
    "insecure domain": ANY,
    "insecure host": ANY,
    "ee ok": dict(zip(PEERS, (VERIFIED, VERIFIED, VERIFIED, WAITS, WAITS), strict=True)),
    "ee bad": NOTHING,
    "ta ok": dict(zip(PEERS, (VERIFIED, WAITS, WAITS, WAITS, WAITS), strict=True)),
    "ta bad": NOTHING,
    "unusable": ENCRYPTED,
    "servfail": NOTHING,
    "silence": NOTHING,
}
REASONS = {
    ("ee bad", "good"): Reason.FAILURE,
    ("ta bad", "good"): Reason.NOT_TRUSTED,
    ("ta ok", "misnamed"): Reason.HOST_MISMATCH,
    ("ta ok", "expired"): Reason.EXPIRED,
    ("ee ok", "no starttls"): Reason.NO_STARTTLS,
    ("unusable", "no starttls"): Reason.NO_STARTTLS,
    ("servfail", "good"): Reason.DNSSEC_INVALID,
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("row", MATRIX)
async def test_each_kind_of_records_with_each_peer(
    chains: dict[str, Chain], row: str, peer: str
) -> None:
    chain = chains.get(peer, chains["good"])
    records: Records = {
        "ee ok": [chain.tlsa(3)],
        "ta ok": [chain.tlsa(2)],
        "ee bad": [chains["other"].tlsa(3)],
        "ta bad": [chains["other"].tlsa(2)],
        "insecure domain": [chains["other"].tlsa(3)],
        "insecure host": SERVFAIL,
        "none": [],
        "no such name": NXDOMAIN,
        "unusable": [f"1 1 1 {'ab' * 32}", f"3 1 9 {'ab' * 32}"],
        "servfail": SERVFAIL,
        "silence": None,
    }[row]
    insecure = {"insecure domain": "d.test", "insecure host": NAME}.get(row, "nothing")
    script = {"no starttls": PeerConnection.serve, "reset": breaks(None)}.get(
        peer, starttls(chain.context)
    )
    expected = MATRIX[row][peer]
    dns_timeout = 1.0 if records is None else 30.0
    world = open_world(records, *[script] * 3, insecure=insecure, dns_timeout=dns_timeout)
    async with world as (bench, server, recorder):
        bench.send()
        if expected is WAITS:
            result = await bench.retried()
            assert (result["type"], result["status"]) == ("tls", "4.7.5")
            assert NAME in result["description"]
            assert bench.peer.mails == []
            assert not any(line.startswith("MAIL") for line in bench.peer.commands)
            if row in ("servfail", "silence"):
                assert bench.peer.connections == 0
            if (row, peer) in REASONS:
                assert recorder.seen[0] == ("d.test", NAME, REASONS[row, peer])
        else:
            (result,) = await bench.results()
            assert result["type"] == "success"
            assert ("cipher" in result) is (expected is not CLEAR)
            if expected is not CLEAR:
                assert result["certificate"]["verified"] is (expected is VERIFIED)
        asked = any(kind == "TLSA" for _, kind in server.questions)
        assert asked is (not row.startswith("insecure"))


@pytest.mark.parametrize(
    ("records", "goes", "results"),
    [
        ("ee ok", True, {("tlsa", "")}),
        ("none", True, {("no-policy-found", "")}),
        ("unusable", True, {("tlsa", "tlsa-invalid")}),
        ("servfail", False, {("tlsa", "dnssec-invalid")}),
    ],
)
async def test_a_tls_report_says_what_became_of_the_records(
    chains: dict[str, Chain],
    tmp_path: Path,
    records: str,
    goes: bool,
    results: set[tuple[str, str]],
) -> None:
    zone: dict[str, Records] = {
        "ee ok": [chains["good"].tlsa(3)],
        "none": [],
        "unusable": [f"1 1 1 {'ab' * 32}", f"3 1 9 {'ab' * 32}"],
        "servfail": SERVFAIL,
    }
    config = Config(
        hostname="me.test",
        queue_directory=str(tmp_path),
        tls_report=True,
        tls_report_contact="a@me.test",
    )
    resolver: Any = Resolver(config)
    file = TlsCounts(config.queue_directory)
    nowhere: Any = None
    reports = TlsReports(Live(config), resolver, nowhere, file, nowhere)
    script = starttls(chains["good"].context)
    async with open_world(zone[records], script, script, recorder=reports) as (bench, _, _):
        bench.send()
        await (bench.results() if goes else bench.retried())
    await reports.flush()
    (day,) = file.days()
    found = file.sessions(day, "d.test")
    assert {(session.kind, session.result) for session, _ in found} == results


@pytest.fixture
def in_the_hosts_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system knows the smarthost, whatever the DNS says."""

    async def host(resolver: Resolver, name: str, *, trusted: bool) -> tuple[Host, ...]:
        return (Host(name, "127.0.0.1"),)

    monkeypatch.setattr(Resolver, "host", host)


@pytest.mark.usefixtures("in_the_hosts_file")
@pytest.mark.parametrize("whose", ["settings", "message"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("ee ok", VERIFIED),
        ("ta ok", VERIFIED),
        ("ee bad", WAITS),
        ("unusable", SECURE),
        ("none", SECURE),
        ("servfail", WAITS),
        ("insecure", SECURE),
        ("unknown", SECURE),
        ("off", SECURE),
        ("ignored", SECURE),
    ],
)
async def test_the_records_of_a_smarthost_count(
    chains: dict[str, Chain], tmp_path: Path, row: str, expected: str, whose: str
) -> None:
    bad: list[str] = [chains["other"].tlsa(3)]
    records: Records = {
        "ee ok": [chains["good"].tlsa(3)],
        "ta ok": [chains["good"].tlsa(2)],
        "unusable": [f"1 1 1 {'ab' * 32}"],
        "none": [],
        "servfail": SERVFAIL,
    }.get(row, bad)
    lines = tmp_path / "limits.toml"
    lines.write_text(f'[[limit]]\ndomain = "{NAME}"\nignore-policies = true\n')
    options: dict[str, Any] = {
        "unknown": {"more": {(NAME, kind): SERVFAIL for kind in ("A", "AAAA")}},
        "ignored": {"limits_file": str(lines)},
    }.get(row, {})
    if whose == "settings":
        options["smarthost"] = NAME
    insecure = NAME if row == "insecure" else "nothing"
    script = starttls(chains["good"].context)
    world = open_world(records, *[script] * 2, insecure=insecure, dane=row != "off", **options)
    async with world as (bench, server, recorder):
        own = {"smarthost": {"hostname": NAME, "port": bench.port}} if whose == "message" else {}
        bench.send(**own)
        if expected is WAITS:
            result = await bench.retried()
            assert (result["type"], result["status"]) == ("tls", "4.7.5")
            assert bench.peer.mails == []
        else:
            (result,) = await bench.results()
            assert result["certificate"]["verified"] is (expected is VERIFIED)
        asked = {kind for _, kind in server.questions}
        assert "MX" not in asked
        assert ("TLSA" in asked) is (row not in ("insecure", "unknown", "off", "ignored"))
        assert all(
            name == f"_{bench.port}._tcp.{NAME}"
            for name, kind in server.questions
            if kind == "TLSA"
        )
        assert recorder.seen == []  # reports are about recipients' domains


async def test_a_smarthost_that_is_an_address_has_no_records(chains: dict[str, Chain]) -> None:
    script = starttls(chains["good"].context)
    world = open_world([chains["other"].tlsa(3)], script, smarthost="127.0.0.1")
    async with world as (bench, server, _):
        bench.send()
        await bench.results()
        assert not server.questions


async def test_the_next_host_is_used_where_the_records_of_one_cannot_be_known(
    chains: dict[str, Chain],
) -> None:
    more: dict[tuple[str, str], Records] = {
        ("d.test", "MX"): ["5 bad.test.", f"10 {NAME}."],
        ("bad.test", "A"): ["127.0.0.1"],
        ("_tcp.bad.test", "TLSA"): SERVFAIL,
    }
    script = starttls(chains["good"].context)
    async with open_world([chains["good"].tlsa(3)], script, more=more) as (bench, _, recorder):
        bench.send()
        await bench.results()
        assert bench.peer.connections == 1
        assert recorder.seen == [
            ("d.test", "bad.test", Reason.DNSSEC_INVALID),
            ("d.test", NAME, ""),
        ]


async def test_domains_share_connections_unless_their_names_count(
    chains: dict[str, Chain],
) -> None:
    """A certificate for d.test is none for e.test, though the same authority issued it."""
    for usage, kind, connections in ((3, "good", 1), (2, "domain", 2)):
        script = starttls(chains[kind].context)
        world = open_world([chains[kind].tlsa(usage)], *[script] * 3)
        async with world as (bench, _, _):
            bench.send("a@d.test")
            await bench.results()
            bench.send("a@e.test")
            if connections == 1:
                await bench.results(count=2)
            else:
                result = await bench.retried()
                assert "the certificate names d.test, not e.test or" in result["description"]
            assert bench.peer.connections == connections


async def test_dane_and_the_settings_hold_together(chains: dict[str, Chain]) -> None:
    """No known authority has issued the certificate, whatever the records say."""
    script = starttls(chains["good"].context)
    world = open_world([chains["good"].tlsa(3)], *[script] * 3, connection_secure="verified")
    async with world as (bench, _, _):
        bench.send()
        assert (await bench.retried())["type"] == "tls"
        assert bench.peer.mails == []


async def test_records_count_even_if_the_settings_want_no_tls(chains: dict[str, Chain]) -> None:
    for record, goes in ((chains["good"].tlsa(3), True), (chains["other"].tlsa(3), False)):
        script = starttls(chains["good"].context)
        world = open_world([record], *[script] * 3, connection_secure="none")
        async with world as (bench, _, _):
            bench.send()
            if goes:
                (result,) = await bench.results()
                assert result["certificate"]["verified"] is True
            else:
                assert (await bench.retried())["type"] == "tls"


@pytest.mark.parametrize("fault", [SERVFAIL, None], ids=["servfail", "silence"])
async def test_mx_records_that_nobody_can_know_are_a_matter_of_the_dns(
    fault: int | None,
) -> None:
    world = open_world([], more={("d.test", "MX"): fault}, dns_timeout=0.5)
    async with world as (bench, server, _):
        bench.send()
        result = await bench.retried()
        assert result["type"] != "tls"
        assert "d.test" in result["description"]
        assert not any(kind == "TLSA" for _, kind in server.questions)


async def test_records_that_change_hold_for_the_next_connection(chains: dict[str, Chain]) -> None:
    """A rollover: the new key has its record before the peer has it."""
    old, new = chains["good"], chains["other"]
    scripts = [starttls(old.context), starttls(new.context)]
    world = open_world([old.tlsa(3), new.tlsa(3)], *scripts, connection_maxmessages=1)
    async with world as (bench, _, _):
        for count in (1, 2):
            bench.send()
            results = await bench.results(count=count)
            assert results[-1]["certificate"]["verified"] is True
        assert bench.peer.connections == 2
