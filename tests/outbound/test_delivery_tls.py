"""TLS of deliveries with real peers: what goes how, and what never goes."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from mailerq.net.logs import LogFile
from mailerq.net.tracing import Trace, Wanted
from tests.net.certificate_kit import common_name_context
from tests.outbound.kit import Bench, PeerConnection, Script, StubPlugins, open_bench
from tests.outbound.test_reload import change
from tests.outbound.tls_kit import NAME, Certificates, NamedHosts, breaks, starttls

LEVELS = ("none", "opportunistic", "required", "verified")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


def old(certificates: Certificates) -> ssl.SSLContext:
    """A server that speaks TLS 1.0 only."""
    context = certificates.server()
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1
    return context


def peers(certificates: Certificates) -> dict[str, Script]:
    return {
        "good": starttls(certificates.server()),
        "self-signed": starttls(certificates.server(trusted=False)),
        "wrong name": starttls(certificates.server("mx.e.test")),
        "common name": starttls(common_name_context(certificates.trusted, NAME)),
        "expired": starttls(certificates.server(expired=True)),
        "no starttls": PeerConnection.serve,
        "454": starttls(certificates.server(), reply="454 not now\r\n"),
        "nonsense": starttls(certificates.server(), reply="250 yes\r\n"),
        "speaks ahead": starttls(certificates.server(), reply="220 go\r\n250 mx.test\r\n"),
        "reset": breaks(None),
        "garbage": breaks(b"250 this is no TLS\r\n"),
        "tls 1.0": starttls(old(certificates)),
    }


SECURE, CLEAR, WAITS = "secure", "clear", "waits"

UNTRUSTED = {"none": CLEAR, "opportunistic": SECURE, "required": SECURE, "verified": WAITS}
BROKEN = {"none": CLEAR, "opportunistic": CLEAR, "required": WAITS, "verified": WAITS}
MATRIX = {
    "good": {"none": CLEAR, "opportunistic": SECURE, "required": SECURE, "verified": SECURE},
    **dict.fromkeys(("self-signed", "wrong name", "common name", "expired"), UNTRUSTED),
    **dict.fromkeys(
        ("no starttls", "454", "nonsense", "speaks ahead", "reset", "garbage", "tls 1.0"), BROKEN
    ),
}


def settings(certificates: Certificates, **more: Any) -> dict[str, Any]:
    hosts = NamedHosts(d_test=[NAME], e_test=[NAME])
    return {"resolver": hosts, "connection_ca_file": certificates.ca_file, **more}


def count(bench: Bench, command: str) -> int:
    return sum(line.startswith(command) for line in bench.peer.commands)


@pytest.mark.parametrize("kind", MATRIX)
@pytest.mark.parametrize("level", LEVELS)
async def test_each_level_with_each_peer(certificates: Certificates, kind: str, level: str) -> None:
    script = peers(certificates)[kind]
    expected = MATRIX[kind][level]
    config = settings(certificates, connection_secure=level)
    async with open_bench(*[script] * 9, **config) as bench:
        bench.send()
        if expected is WAITS:
            result = await bench.retried()
            assert (result["type"], result["state"]) == ("tls", "starttls")
            assert result["status"] == "4.7.5"
            assert NAME in result["description"]
            assert level in result["description"]
            assert bench.peer.mails == []
            assert count(bench, "MAIL") == 0
            return
        (result,) = await bench.results()
        assert result["type"] == "success"
        is_fallback = expected is CLEAR and level != "none" and kind != "no starttls"
        assert bench.peer.connections == (2 if is_fallback else 1)
        if expected is SECURE:
            assert result["cipher"]["version"] in ("TLSv1.2", "TLSv1.3")
            assert result["certificate"]["verified"] is (level == "verified")
            assert bench.peer.commands.index("STARTTLS") < bench.peer.commands.index("DATA")
        else:
            assert "cipher" not in result
            assert "certificate" not in result
        if level == "none":
            assert count(bench, "STARTTLS") == 0


async def test_a_message_demands_more_than_the_settings(certificates: Certificates) -> None:
    bad = starttls(certificates.server(trusted=False))
    for level, expected in (("optional", CLEAR), ("required", SECURE), ("verified", WAITS)):
        async with open_bench(*[bad] * 3, **settings(certificates)) as bench:
            bench.send(security=level)
            if expected is WAITS:
                assert (await bench.retried())["type"] == "tls"
            else:
                (result,) = await bench.results()
                assert ("cipher" in result) is (expected is SECURE)


async def test_a_message_never_weakens_the_settings(certificates: Certificates) -> None:
    config = settings(certificates, connection_secure="required")
    async with open_bench(*[PeerConnection.serve] * 3, **config) as bench:
        bench.send(security="optional")
        assert (await bench.retried())["type"] == "tls"
        assert bench.peer.mails == []


async def test_mail_in_clear_needs_a_new_connection_and_is_remembered_then_forgotten(
    certificates: Certificates,
) -> None:
    broken = breaks(b"no\r\n")
    good = starttls(certificates.server())
    config = settings(certificates, connection_maxmessages=1)
    async with open_bench(broken, broken, broken, good, **config) as bench:
        bench.send()
        await bench.results()
        first = bench.peer.commands[:]
        assert bench.peer.connections == 2
        assert first.count("STARTTLS") == 1
        assert first.index("STARTTLS") < first.index("MAIL FROM:<a@b.test>")
        bench.send()
        await bench.results(count=2)
        assert count(bench, "STARTTLS") == 1  # at once in clear
        assert bench.peer.connections == 3
        bench.dispatcher.history._broken_tls._until["127.0.0.1"] = 0.0
        bench.send()
        results = await bench.results(count=3)
        assert results[-1]["cipher"]["version"] == "TLSv1.3"


async def test_a_failure_is_not_remembered_if_the_settings_say_so(
    certificates: Certificates,
) -> None:
    config = settings(certificates, connection_maxmessages=1, connection_tls_retry=0.0)
    async with open_bench(*[breaks(b"no\r\n")] * 4, **config) as bench:
        for number in (1, 2):
            bench.send()
            await bench.results(count=number)
            assert count(bench, "STARTTLS") == number
        assert bench.peer.connections == 4


async def test_what_is_remembered_of_a_host_weakens_no_demand(certificates: Certificates) -> None:
    async with open_bench(*[breaks(b"no\r\n")] * 5, **settings(certificates)) as bench:
        bench.send()
        await bench.results()
        bench.send(security="required")
        assert (await bench.retried())["type"] == "tls"
        assert len(bench.peer.mails) == 1


async def test_mail_that_demands_more_never_goes_over_a_weaker_connection(
    certificates: Certificates,
) -> None:
    """The bleed: two domains with the same host, and a certificate that does not suffice."""
    bad = starttls(certificates.server(trusted=False))
    limits = Path(certificates.ca_file).with_name("limits.toml")
    limits.write_text('[[limit]]\ndomain = "e.test"\nsecure = "verified"\n')
    async with open_bench(*[bad] * 9, **settings(certificates, limits_file=str(limits))) as bench:
        bench.send("c@d.test")
        await bench.results()
        assert bench.peer.open == 1  # idle, and good enough for d.test only
        bench.send("c@e.test")
        bench.send("x@d.test", security="verified")
        for result in await bench.results("retry", 2):
            assert result["type"] == "tls"
        bench.send("c@d.test")
        await bench.results(count=2)
        assert {mail.recipient for mail in bench.peer.mails} == {"c@d.test"}


async def test_a_reload_ends_connections_that_prove_too_little(certificates: Certificates) -> None:
    bad = starttls(certificates.server(trusted=False))
    config = settings(certificates, connection_maxidle=60_000.0)
    async with open_bench(*[bad] * 9, **config) as bench:
        bench.send()
        await bench.results()
        assert bench.peer.open == 1
        change(bench, connection_secure="verified")
        bench.send()
        assert (await bench.retried())["type"] == "tls"
        assert len(bench.peer.mails) == 1


async def test_results_and_the_send_log_say_what_tls_was_used(
    certificates: Certificates, tmp_path: Path
) -> None:
    log = LogFile(str(tmp_path / "send.log"))
    good = starttls(certificates.server())
    config = settings(certificates, connection_secure="verified", send_log=log)
    async with open_bench(good, good, **config) as bench:
        bench.send()
        (result,) = await bench.results()
        assert result["cipher"]["bits"] == 256 or result["cipher"]["bits"] == 128
        certificate = result["certificate"]
        assert certificate["verified"] is True
        assert certificate["altnames"] == [NAME]
        assert certificate["self-signed"] is False
        assert certificate["notbefore"] < certificate["notafter"]
        assert certificate["issuer"]["organization"].startswith("trustme")
    (line,) = (tmp_path / "send.log").read_text().splitlines()
    assert line.endswith(f"({result['cipher']['version']})")


async def test_a_session_is_resumed_with_what_it_proved(certificates: Certificates) -> None:
    good = starttls(certificates.server())
    config = settings(certificates, connection_secure="verified", connection_maxmessages=1)
    async with open_bench(*[good] * 5, **config) as bench:
        for number in (1, 2, 3):
            bench.send()
            results = await bench.results(count=number)
            assert results[-1]["certificate"]["verified"] is True
            assert results[-1]["certificate"]["altnames"] == [NAME]
        seen = [line for line in bench.peer.commands if line.startswith("(TLS")]
        assert seen[0] == "(TLSv1.3)"
        assert seen[1:] == ["(TLSv1.3 resumed)"] * 2


async def test_a_ticket_of_a_session_that_nobody_checked_serves_no_stronger_demand(
    certificates: Certificates,
) -> None:
    bad = starttls(certificates.server(trusted=False))
    async with open_bench(*[bad] * 5, **settings(certificates, connection_maxmessages=1)) as bench:
        for number in (1, 2):
            bench.send()
            await bench.results(count=number)
        assert "(TLSv1.3 resumed)" in bench.peer.commands
        bench.send(security="verified")
        assert (await bench.retried())["type"] == "tls"
        assert len(bench.peer.mails) == 2


async def test_a_peer_that_asks_gets_our_certificate(
    certificates: Certificates, tmp_path: Path
) -> None:
    own = certificates.trusted.issue_cert("me.test", common_name="me.test")
    path = tmp_path / "own.pem"
    own.private_key_and_cert_chain_pem.write_to_path(str(path))
    asks = starttls(certificates.server(client_ca=True))
    async with open_bench(*[asks] * 3, **settings(certificates)) as bench:
        bench.send(security="required")
        assert (await bench.retried())["type"] in ("tls", "noaccess")
    config = settings(certificates, connection_certificate=str(path))
    async with open_bench(*[asks] * 3, **config) as bench:
        bench.send(security="required")
        await bench.results()
        assert any("me.test" in line for line in bench.peer.commands if "(client" in line)


async def test_a_login_goes_over_tls_to_any_address(certificates: Certificates) -> None:
    good = starttls(certificates.server(), inside=("PIPELINING", "AUTH PLAIN"))
    config = settings(
        certificates,
        smarthost=NAME,
        smarthost_username="ann",
        smarthost_password="pass-phrase",
        smtp_out_clear_range=("192.0.2.0/24",),
    )
    async with open_bench(*[takes_login(good)] * 3, **config) as bench:
        bench.send()
        (result,) = await bench.results()
        assert result["authentication"] == "plain"
        login = next(n for n, line in enumerate(bench.peer.commands) if line.startswith("AUTH"))
        assert bench.peer.commands.index("(TLSv1.3)") < login


def takes_login(script: Script) -> Script:
    """The peer answers AUTH with 235."""

    async def play(peer: PeerConnection) -> None:
        peer.peer.answers[("AUTH", "")] = ["235 2.7.0 welcome"]
        await script(peer)

    return play


@pytest.mark.parametrize("secure", ["required", "verified", None])
async def test_the_smarthost_has_a_level_of_its_own(
    certificates: Certificates, secure: str | None
) -> None:
    bad = starttls(certificates.server(trusted=False))
    config = settings(certificates, smarthost=NAME, smarthost_secure=secure)
    async with open_bench(*[bad] * 3, **config) as bench:
        bench.send()
        if secure == "verified":
            assert (await bench.retried())["type"] == "tls"
        else:
            (result,) = await bench.results()
            assert "cipher" in result


@pytest.mark.parametrize("level", ["none", "opportunistic", "verified"])
async def test_a_trace_says_what_was_demanded_and_proved(
    certificates: Certificates, level: str
) -> None:
    good = starttls(certificates.server())
    trace = Trace(Wanted(), lambda: None, lambda way: f"{way}-1")
    config = settings(certificates, connection_secure=level)
    async with open_bench(good, **config) as bench:
        bench.worker.traces = (trace,)  # type: ignore[assignment]
        bench.send()
        await bench.results()
    lines = [line["text"] for line in trace.take()[0]]
    said = {
        "none": "(security: none; in clear)",
        "opportunistic": "(security: opportunistic; TLS, the certificate not checked)",
        "verified": "(security: verified; TLS, the certificate proved by an authority)",
    }[level]
    assert said in lines
    assert any(line.startswith("(TLSv1.3") for line in lines) is (level != "none")
    assert any("MAIL FROM" in line for line in lines)  # TLS is shown decrypted


@pytest.mark.parametrize("level", ["none", "verified"])
async def test_plugins_learn_whether_a_connection_uses_tls(
    certificates: Certificates, level: str
) -> None:
    told: list[bool] = []

    class Plugins(StubPlugins):
        def connection(self, fd: int, **options: Any) -> StubPlugins:
            told.append(options["secure"])
            return super().connection(fd, **options)

    good = starttls(certificates.server())
    config = settings(certificates, connection_secure=level, plugins=Plugins())
    async with open_bench(good, **config) as bench:
        bench.send()
        await bench.results()
    assert told == [level == "verified"]
