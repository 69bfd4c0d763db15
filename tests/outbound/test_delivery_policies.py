"""MTA-STS, DANE and REQUIRETLS in deliveries: hosts, certificates, pools, and what is recorded."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from mailerq.config import Config
from mailerq.outbound.limits import Limits
from mailerq.outbound.policies import Policies
from mailerq.outbound.sites import Site, Sites
from mailerq.rules.routes import Route
from mailerq.rules.security import (
    PolicyUnknown,
    Reason,
    StsMode,
    StsPolicy,
    Tlsa,
    TlsaSet,
    TlsFailure,
)
from mailerq.rules.shaping import Shaping
from tests.outbound.kit import PeerConnection, open_bench
from tests.outbound.test_delivery_tls import count, settings
from tests.outbound.test_reload import change
from tests.outbound.tls_kit import (
    NAME,
    Certificates,
    FixedDane,
    FixedSts,
    NamedHosts,
    Recorded,
    starttls,
)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


def sts(mode: StsMode = StsMode.ENFORCE, *patterns: str, domain: str = "d.test") -> FixedSts:
    return FixedSts({domain: StsPolicy(domain, "1", mode, patterns or (NAME,))})


def recorded(**sources: Any) -> tuple[Policies, Recorded]:
    recorder = Recorded()
    return Policies(recorder=recorder, **sources), recorder


@pytest.mark.parametrize(
    ("level", "kind", "goes"),
    [
        ("none", "good", True),
        ("opportunistic", "good", True),
        ("opportunistic", "self-signed", False),
        ("none", "self-signed", False),
        ("none", "wrong name", False),
        ("none", "expired", False),
        ("none", "no starttls", False),
    ],
)
async def test_an_enforced_policy_demands_a_valid_certificate_whatever_the_settings_say(
    certificates: Certificates, level: str, kind: str, goes: bool
) -> None:
    script = {
        "good": starttls(certificates.server()),
        "self-signed": starttls(certificates.server(trusted=False)),
        "wrong name": starttls(certificates.server("mx.e.test")),
        "expired": starttls(certificates.server(expired=True)),
        "no starttls": PeerConnection.serve,
    }[kind]
    policies, recorder = recorded(sts=sts())
    config = settings(certificates, connection_secure=level, policies=policies)
    async with open_bench(*[script] * 3, **config) as bench:
        bench.send()
        if goes:
            (result,) = await bench.results()
            assert result["certificate"]["verified"] is True
            assert recorder.seen == [("d.test", NAME, "")]
            assert recorder.told[0]["ip"] == recorder.told[0]["local"] == "127.0.0.1"
            assert recorder.told[0]["helo"] == "mx.test"
        else:
            result = await bench.retried()
            assert (result["type"], result["status"]) == ("tls", "4.7.5")
            assert "MTA-STS policy of d.test (id 1)" in result["description"]
            assert bench.peer.mails == []
            reasons = {
                "self-signed": Reason.NOT_TRUSTED,
                "wrong name": Reason.HOST_MISMATCH,
                "expired": Reason.EXPIRED,
                "no starttls": Reason.NO_STARTTLS,
            }
            assert recorder.seen == [("d.test", NAME, reasons[kind])]


async def test_hosts_that_match_no_pattern_are_left_out(certificates: Certificates) -> None:
    hosts = NamedHosts(d_test=["evil.test", NAME])
    policies, recorder = recorded(sts=sts())
    good = starttls(certificates.server())
    config = settings(certificates, policies=policies)
    async with open_bench(good, good, **{**config, "resolver": hosts}) as bench:
        bench.send()
        await bench.results()
        assert bench.peer.connections == 1
        assert recorder.seen == [("d.test", "evil.test", Reason.FAILURE), ("d.test", NAME, "")]
        assert recorder.told[0]["failure"].code == "mtasts-policy-mx-mismatch"


async def test_mail_waits_if_no_host_matches(certificates: Certificates) -> None:
    policies, recorder = recorded(sts=sts(StsMode.ENFORCE, "*.other.test"))
    async with open_bench(**settings(certificates, policies=policies)) as bench:
        bench.send()
        result = await bench.retried()
        assert (result["type"], result["state"], result["status"]) == ("tls", "dns", "4.7.5")
        assert "matches no pattern of the MTA-STS policy" in result["description"]
        assert bench.peer.connections == 0
        assert len(recorder.seen) == 1


@pytest.mark.parametrize("kind", ["good", "self-signed", "wrong name", "expired", "no starttls"])
async def test_a_policy_in_testing_only_reports(certificates: Certificates, kind: str) -> None:
    script, reason = {
        "good": (starttls(certificates.server()), ""),
        "self-signed": (starttls(certificates.server(trusted=False)), Reason.NOT_TRUSTED),
        "wrong name": (starttls(certificates.server("mx.e.test")), Reason.HOST_MISMATCH),
        "expired": (starttls(certificates.server(expired=True)), Reason.EXPIRED),
        "no starttls": (PeerConnection.serve, Reason.NO_STARTTLS),
    }[kind]
    policies, recorder = recorded(sts=sts(StsMode.TESTING))
    async with open_bench(script, script, **settings(certificates, policies=policies)) as bench:
        bench.send()
        await bench.results()
        assert recorder.seen == [("d.test", NAME, reason)]


async def test_a_host_outside_a_policy_in_testing_is_used_and_reported(
    certificates: Certificates,
) -> None:
    policies, recorder = recorded(sts=sts(StsMode.TESTING, "other.test"))
    good = starttls(certificates.server())
    async with open_bench(good, **settings(certificates, policies=policies)) as bench:
        bench.send()
        await bench.results()
        assert recorder.told[0]["failure"].code == "mtasts-policy-mx-mismatch"


async def test_two_domains_share_hosts_and_no_weaker_connection(
    certificates: Certificates,
) -> None:
    """The bleed: d.test demands nothing, e.test has a policy, and the certificate is bad."""
    policies, _ = recorded(sts=sts(domain="e.test"))
    bad = starttls(certificates.server(trusted=False))
    async with open_bench(*[bad] * 9, **settings(certificates, policies=policies)) as bench:
        bench.send("c@d.test")
        await bench.results()
        bench.send("c@e.test")
        assert (await bench.retried())["type"] == "tls"
        bench.send("c@d.test")
        await bench.results(count=2)
        assert [mail.recipient for mail in bench.peer.mails] == ["c@d.test"] * 2


async def test_domains_with_other_policies_are_counted_together() -> None:
    policies, _ = recorded(sts=sts(domain="e.test"))
    hosts: Any = NamedHosts(d_test=[NAME, "mx2.d.test"], e_test=[NAME, "mx2.d.test"])
    sites = Sites(hosts, lambda domain: "", policies=policies)
    d, e = [await sites.find(Route(name, name, 25, mx=True)) for name in ("d.test", "e.test")]
    assert isinstance(d, Site)
    assert isinstance(e, Site)
    assert d.key != e.key
    assert d.limit_key == e.limit_key
    assert (len(d.hosts), len(e.hosts)) == (2, 1)
    limits = Limits(Shaping(Config(domain_maxmessages=60)))
    assert limits.of_flow(d, None).sending.taken == limits.of_flow(e, None).sending.taken
    again = await sites.find(Route("e.test", "e.test", 25, mx=True, waived=True))
    assert isinstance(again, Site)
    assert again is d


async def test_the_operator_may_ignore_what_a_domain_has_published(
    certificates: Certificates, tmp_path: Path
) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text('[[limit]]\ndomain = "d.test"\nignore-policies = true\n')
    policies, _ = recorded(sts=sts())
    bad = starttls(certificates.server(trusted=False))
    config = settings(certificates, policies=policies, limits_file=str(limits))
    async with open_bench(*[bad] * 5, **config) as bench:
        bench.send()
        await bench.results()
        change(bench, limits_file="", reroute=True)
        bench.send()
        assert (await bench.retried())["type"] == "tls"


async def test_a_mail_that_rather_arrives_waives_the_policy_and_nothing_else(
    certificates: Certificates,
) -> None:
    policies, _ = recorded(sts=sts())
    bad = starttls(certificates.server(trusted=False))
    async with open_bench(*[bad] * 9, **settings(certificates, policies=policies)) as bench:
        bench.send(tlsrequired=False)
        await bench.results()
        bench.send()
        assert (await bench.retried())["type"] == "tls"
        bench.send(tlsrequired=False, security="verified")
        await bench.results("retry", 2)
        bench.send(tlsrequired=False, requiretls=True)
        results = await bench.results("retry", 3)
        assert results[-1]["status"] == "4.7.30"
        assert len(bench.peer.mails) == 1


async def test_mail_waits_while_nobody_knows_the_policy(certificates: Certificates) -> None:
    unknown = FixedSts({"d.test": PolicyUnknown("the name servers do not answer")})
    policies, _ = recorded(sts=unknown)
    async with open_bench(**settings(certificates, policies=policies)) as bench:
        bench.send()
        result = await bench.retried()
        assert (result["type"], result["state"]) == ("tls", "dns")
        assert "do not answer" in result["description"]
        assert bench.peer.connections == 0


async def test_a_defect_in_a_source_keeps_mail_waiting_and_the_engine_running(
    certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    policies, _ = recorded(sts=FixedSts({"d.test": ZeroDivisionError()}))
    good = starttls(certificates.server("mx.e.test", NAME))
    async with open_bench(good, **settings(certificates, policies=policies)) as bench:
        bench.send()
        assert (await bench.retried())["code"] == 451
        bench.send("c@e.test")
        await bench.results()


# DANE

RECORDS = TlsaSet(NAME, frozenset((Tlsa(3, 1, 1, b"x" * 32),)))
UNUSABLE = TlsaSet(NAME, frozenset())


@pytest.mark.parametrize(
    ("records", "failure", "kind", "goes"),
    [
        (RECORDS, None, "self-signed", True),
        (RECORDS, TlsFailure(Reason.FAILURE, "no record matches"), "good", False),
        (UNUSABLE, None, "self-signed", True),
        (UNUSABLE, None, "no starttls", False),
        (RECORDS, None, "no starttls", False),
        (None, None, "self-signed", True),
        (None, None, "no starttls", True),
        (PolicyUnknown("SERVFAIL"), None, "good", False),
    ],
)
async def test_the_records_of_a_host_decide(
    certificates: Certificates,
    records: TlsaSet | Exception | None,
    failure: TlsFailure | None,
    kind: str,
    goes: bool,
) -> None:
    script = {
        "good": starttls(certificates.server()),
        "self-signed": starttls(certificates.server(trusted=False)),
        "no starttls": PeerConnection.serve,
    }[kind]
    found = {} if records is None else {NAME: records}
    dane = FixedDane({"d.test"}, found, failure)
    policies, recorder = recorded(dane=dane)
    async with open_bench(*[script] * 3, **settings(certificates, policies=policies)) as bench:
        bench.send()
        if not goes:
            result = await bench.retried()
            assert (result["type"], result["status"]) == ("tls", "4.7.5")
            assert bench.peer.mails == []
            if isinstance(records, Exception):
                assert bench.peer.connections == 0
                assert recorder.seen == [("d.test", NAME, Reason.DNSSEC_INVALID)]
            return
        (result,) = await bench.results()
        proved = records is RECORDS
        if "certificate" in result:
            assert result["certificate"]["verified"] is proved
        assert len(dane.verified) == proved
        if proved:
            assert len(dane.verified[0][0]) > 300
            assert recorder.told[0]["records"] is RECORDS


async def test_the_next_host_is_used_if_the_records_of_one_fail(
    certificates: Certificates,
) -> None:
    hosts = NamedHosts(d_test=["mx0.d.test", NAME])
    dane = FixedDane({"d.test"}, {"mx0.d.test": PolicyUnknown("bogus"), NAME: RECORDS})
    policies, recorder = recorded(dane=dane)
    good = starttls(certificates.server())
    config = settings(certificates, policies=policies) | {"resolver": hosts}
    async with open_bench(good, **config) as bench:
        bench.send()
        await bench.results()
        assert [host for _, host, _ in recorder.seen] == ["mx0.d.test", NAME]


async def test_a_domain_without_dnssec_has_no_records(certificates: Certificates) -> None:
    dane = FixedDane(set(), {NAME: PolicyUnknown("nobody asks")})
    policies, _ = recorded(dane=dane)
    good = starttls(certificates.server())
    async with open_bench(good, **settings(certificates, policies=policies)) as bench:
        bench.send()
        await bench.results()


async def test_both_policies_hold_together(certificates: Certificates) -> None:
    for trusted, failure in ((False, None), (True, TlsFailure(Reason.FAILURE, "no match"))):
        dane = FixedDane({"d.test"}, {NAME: RECORDS}, failure)
        policies, _ = recorded(dane=dane, sts=sts())
        script = starttls(certificates.server(trusted=trusted))
        config = settings(certificates, policies=policies)
        async with open_bench(*[script] * 3, **config) as bench:
            bench.send()
            assert (await bench.retried())["type"] == "tls"
            assert bench.peer.mails == []


# REQUIRETLS


async def test_requiretls_goes_to_a_proved_host_with_a_valid_certificate_that_offers_it(
    certificates: Certificates,
) -> None:
    offers = starttls(certificates.server(), inside=("PIPELINING", "REQUIRETLS"))
    policies, _ = recorded(sts=sts())
    async with open_bench(offers, **settings(certificates, policies=policies)) as bench:
        bench.send(requiretls=True)
        await bench.results()
        assert "MAIL FROM:<a@b.test> REQUIRETLS" in bench.peer.commands


@pytest.mark.parametrize("missing", ["proof of the hosts", "certificate", "offer", "testing"])
async def test_requiretls_waits_and_fails_at_the_end_with_its_own_status(
    certificates: Certificates, missing: str
) -> None:
    inside = ("PIPELINING",) if missing == "offer" else ("PIPELINING", "REQUIRETLS")
    context = certificates.server(trusted=missing != "certificate")
    script = starttls(context, inside=inside)
    dane = FixedDane({"d.test"})
    source: dict[str, Any] = {"dane": dane}
    if missing == "proof of the hosts":
        source = {}
    if missing == "testing":
        source = {"sts": sts(StsMode.TESTING)}
    policies, _ = recorded(**source)
    config = settings(certificates, policies=policies)
    async with open_bench(*[script] * 5, **config) as bench:
        bench.send(requiretls=True, maxattempts=2)
        result = await bench.retried()
        assert (result["code"], result["status"]) == (450, "4.7.30")
        await bench.pass_time(700)
        (result,) = await bench.results("failure")
        assert (result["code"], result["status"]) == (550, "5.7.30")
        assert bench.peer.mails == []
        assert count(bench, "MAIL") == 0


@pytest.mark.parametrize(
    ("inside", "trusted"),
    [(("REQUIRETLS",), True), (("REQUIRETLS",), False), ((), True), (None, False)],
)
async def test_a_report_about_mail_with_requiretls_asks_for_it_and_is_not_lost_without(
    certificates: Certificates, inside: tuple[str, ...] | None, trusted: bool
) -> None:
    """The mail fails for want of REQUIRETLS; its report goes to a host of the sender's domain."""
    script = PeerConnection.serve
    if inside is not None:
        script = starttls(certificates.server(trusted=trusted), inside=("PIPELINING", *inside))
    async with open_bench(*[script] * 5, **settings(certificates)) as bench:
        body = "Subject: secret\r\n\r\nhello\r\n"
        bench.send(
            envelope="a@d.test", requiretls=True, maxattempts=1, received="2026-01-01 11:00:00",
            dsn={"ret": "FULL"}, body=body,
        )  # fmt: skip
        (result,) = await bench.results("failure")
        assert result["status"] == "5.7.30"
        await bench.results("success")
        (mail,) = bench.peer.mails
        assert (mail.envelope, mail.recipient) == ("", "a@d.test")
        assert b"Subject: secret" in mail.body and b"hello" not in mail.body
        (command,) = [line for line in bench.peer.commands if line.startswith("MAIL")]
        assert command.endswith(" REQUIRETLS") is bool(inside)


@pytest.mark.parametrize(
    "demand",
    [
        {"requiretls": True},
        {"security": "verified"},
        {"security": "required"},
    ],
)
async def test_mail_that_demands_too_much_keeps_no_other_mail_waiting(
    certificates: Certificates, demand: dict[str, Any]
) -> None:
    async with open_bench(*[PeerConnection.serve] * 5, **settings(certificates)) as bench:
        bench.send("first@d.test", **demand)
        await bench.retried()
        began = monotonic()
        bench.send("second@d.test")
        await bench.results("success")
        assert monotonic() - began < 10  # a pause is 30 s or longer
        assert [mail.recipient for mail in bench.peer.mails] == ["second@d.test"]


async def test_dnssec_and_a_matching_record_are_enough_for_requiretls(
    certificates: Certificates,
) -> None:
    context = certificates.server(trusted=False)
    offers = starttls(context, inside=("PIPELINING", "REQUIRETLS"))
    policies, _ = recorded(dane=FixedDane({"d.test"}, {NAME: RECORDS}))
    async with open_bench(offers, **settings(certificates, policies=policies)) as bench:
        bench.send(requiretls=True)
        await bench.results()


async def test_a_resumed_session_is_recorded_once_and_proves_what_it_proved(
    certificates: Certificates,
) -> None:
    dane = FixedDane({"d.test"}, {NAME: RECORDS})
    policies, recorder = recorded(dane=dane)
    script = starttls(certificates.server(trusted=False))
    config = settings(certificates, policies=policies, connection_maxmessages=1)
    async with open_bench(*[script] * 5, **config) as bench:
        for number in (1, 2):
            bench.send()
            results = await bench.results(count=number)
            assert results[-1]["certificate"]["verified"] is True
        assert "(TLSv1.3 resumed)" in bench.peer.commands
        assert len(dane.verified) == len(recorder.seen) == 1
        # Other records: the ticket of before proves nothing.
        dane.records[NAME] = TlsaSet(NAME, frozenset((Tlsa(3, 1, 1, b"y" * 32),)))
        dane.failure = TlsFailure(Reason.FAILURE, "no match")
        bench.send()
        assert (await bench.retried())["type"] == "tls"


async def test_the_recorder_hears_what_became_of_its_own_reports_by_mail() -> None:
    policies, recorder = recorded()
    async with open_bench(PeerConnection.serve, policies=policies, max_attempts=1) as bench:
        bench.peer.answers["RCPT", "gone@d.test"] = ["550 5.1.1 no such user"] * 2
        bench.peer.answers["RCPT", "late@d.test"] = ["450 4.2.1 not now"]
        for name in ("here", "gone", "late"):
            bench.send(f"{name}@d.test", tags=["tls-report"], envelope="")
        bench.send("gone@d.test", tags=["another"])
        bench.send("here@d.test")
        await bench.results("failure", 3)
        await bench.results("success", 2)
    assert sorted(recorder.ended) == [
        ("gone@d.test", "550 5.1.1 no such user"),
        ("here@d.test", ""),
        ("late@d.test", "450 4.2.1 not now"),
    ]


async def test_a_recorder_that_fails_costs_no_mail(
    certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Recorded):
        def handshake(self, *args: Any) -> None:
            raise ZeroDivisionError

        def report_ended(self, address: str, problem: str) -> None:
            raise ZeroDivisionError

    good = starttls(certificates.server())
    policies = Policies(recorder=Broken())
    async with open_bench(good, **settings(certificates, policies=policies)) as bench:
        bench.send()
        await bench.results()
        bench.send(tags=["tls-report"])
        await bench.results("success", 2)
    assert sum("cannot be recorded" in line for line in caplog.messages) == 2
