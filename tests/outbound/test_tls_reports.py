"""TLS reports: what is counted, and reports that arrive by mail and at a web server."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq.config import Config
from mailerq.errors import QueueError
from mailerq.live import Live
from mailerq.mail.tls_report import Day, is_report
from mailerq.message import Message
from mailerq.net.https import Https
from mailerq.net.resolver import Resolver
from mailerq.outbound import tls_reports
from mailerq.outbound.sts import FetchFailed
from mailerq.outbound.tls_reports import TlsReports
from mailerq.rules.security import (
    MX_MISMATCH,
    DomainPolicy,
    Reason,
    StsMode,
    StsPolicy,
    Tlsa,
    TlsaSet,
    TlsFailure,
)
from mailerq.store.tls_counts import TlsCounts
from tests.net.dns_server import DnsServer, open_dns_server
from tests.net.https_server import HttpsServer, open_https_server, response
from tests.outbound.sts_kit import Clock

RECORD = ("_smtp._tls.d.example", "TXT")
HOUR = 3600.0
SERVFAIL = 2

STS = StsPolicy("d.example", "1", StsMode.ENFORCE, ("mx.d.example",))
TLSA = TlsaSet("mx.d.example", frozenset({Tlsa(3, 1, 1, b"\x0f")}))
EXPIRED = TlsFailure(Reason.EXPIRED, "the certificate of mx.d.example has expired")


@dataclass
class Bench:
    directory: Path
    dns: DnsServer
    web: HttpsServer
    config: Config
    clock: Clock
    reports: TlsReports
    published: list[Message] = field(default_factory=list)
    doubted: list[str] = field(default_factory=list)
    refuses: bool = False

    def open(self, **settings: Any) -> TlsReports:
        """What another process has, or this one after a restart."""
        config = self.config.replace(**settings)
        resolver = Resolver(config)
        return TlsReports(
            Live(config),
            resolver,
            Https(resolver.addresses),
            TlsCounts(config.queue_directory, clock=self.clock),
            self.publish,
            lines=lambda policy: ["version: STSv1", f"mode: {policy.mode}"],
            doubt=self.doubted.append,
            clock=self.clock,
            lot=lambda: 0.5,
        )

    async def publish(self, message: Message) -> None:
        await trio.lowlevel.checkpoint()
        if self.refuses:
            raise QueueError("the disk is full")
        self.published.append(message)

    def want(self, *places: str) -> None:
        self.dns.zone[RECORD] = [f'"v=TLSRPTv1; rua={",".join(places)}"'] if places else []

    def tell(
        self,
        failure: TlsFailure | None = None,
        *,
        domain: str = "d.example",
        sts: StsPolicy | None = None,
        tlsa: TlsaSet | None = None,
        to: TlsReports | None = None,
    ) -> None:
        """What a delivery tells."""
        (to or self.reports).handshake(
            domain, DomainPolicy(sts), tlsa, "mx.d.example", "192.0.2.1", "192.0.2.9",
            "helo.d.example", failure,
        )  # fmt: skip

    async def next_day(self, seconds: float = 5 * HOUR) -> None:
        """Write what is counted, and go on to the next day, after all random delays."""
        await self.reports.flush()
        self.clock.now = Day.of(self.clock.now).end + seconds

    def report(self, index: int = -1) -> Any:
        """The report in a mail."""
        body = self.published[index].body
        assert body is not None
        _, report = message_from_bytes(body, policy=policy.default).iter_parts()  # type: ignore[attr-defined]
        return json.loads(gzip.decompress(report.get_content()))


@asynccontextmanager
async def open_bench(directory: Path, **settings: Any) -> AsyncIterator[Bench]:
    (directory / "queue").mkdir()
    zone: dict[tuple[str, str], Any] = {
        RECORD: ['"v=TLSRPTv1; rua=mailto:r@d.example"'],
        ("reports.example", "A"): ["127.0.0.1"],
    }
    async with (
        open_dns_server(zone) as dns,
        open_https_server(directory, "reports.example") as web,
    ):
        config = Config(**{
            "hostname": "me.example",
            "queue_directory": str(directory / "queue"),
            "dns_servers": [dns.address],
            "dns_timeout": 30.0,
            "dns_attempts": 1,
            "smtp_out_forbidden": (),
            "tls_report": True,
            "tls_report_from": "tls@x.example",
            "tls_report_contact": "postmaster@x.example",
            "tls_report_organization": "X",
            **settings,
        })  # fmt: skip
        bench = Bench(directory, dns, web, config, Clock(), None)  # type: ignore[arg-type]
        bench.reports = bench.open()
        yield bench


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with open_bench(tmp_path) as opened:
        yield opened


# Counting


async def test_a_day_is_reported_by_mail_after_it_is_over(bench: Bench) -> None:
    day = Day.of(bench.clock.now)
    for _ in range(3):
        bench.tell(sts=STS)
    bench.tell(EXPIRED, sts=STS)
    bench.tell(EXPIRED, sts=STS)
    await bench.reports.flush()
    await bench.reports.round()
    assert not bench.published
    await bench.next_day()
    await bench.reports.round()
    (message,) = bench.published
    assert (message.envelope, message.recipient) == ("", "r@d.example")
    assert is_report(message.properties)
    report = bench.report()
    number = report.pop("report-id")
    assert number.startswith(day.name) and number.endswith("@x.example")
    assert report == {
        "organization-name": "X",
        "date-range": {
            "start-datetime": f"{day.name}T00:00:00Z",
            "end-datetime": f"{day.name}T23:59:59Z",
        },
        "contact-info": "postmaster@x.example",
        "policies": [
            {
                "policy": {
                    "policy-type": "sts",
                    "policy-string": ["version: STSv1", "mode: enforce"],
                    "policy-domain": "d.example",
                    "mx-host": ["mx.d.example"],
                },
                "summary": {"total-successful-session-count": 3, "total-failure-session-count": 2},
                "failure-details": [
                    {
                        "result-type": "certificate-expired",
                        "sending-mta-ip": "192.0.2.9",
                        "receiving-mx-hostname": "mx.d.example",
                        "receiving-mx-helo": "helo.d.example",
                        "receiving-ip": "192.0.2.1",
                        "failed-session-count": 2,
                    }
                ],
            }
        ],
    }
    await bench.reports.round()
    bench.clock.now += HOUR
    await bench.reports.round()
    assert len(bench.published) == 1


@pytest.mark.parametrize(
    ("failure", "failed"),
    [
        (None, set()),
        (EXPIRED, {"sts"}),
        (TlsFailure(Reason.TLSA_INVALID, "x"), {"tlsa"}),
        (TlsFailure(Reason.FAILURE, "x", MX_MISMATCH), {"sts"}),
        (TlsFailure(Reason.NO_STARTTLS, "x"), {"sts", "tlsa"}),
    ],
)
async def test_a_session_counts_under_the_policy_that_it_is_about(
    bench: Bench, failure: TlsFailure | None, failed: set[str]
) -> None:
    bench.tell(failure, sts=STS, tlsa=TLSA)
    await bench.next_day()
    await bench.reports.round()
    policies = {each["policy"]["policy-type"]: each for each in bench.report()["policies"]}
    found = {
        kind for kind, each in policies.items() if each["summary"]["total-failure-session-count"]
    }
    assert found == failed
    assert set(policies) == (failed or {"sts", "tlsa"})
    if "tlsa" in policies:
        assert policies["tlsa"]["policy"]["policy-string"] == ["3 1 1 0f"]
        assert policies["tlsa"]["policy"]["mx-host"] == ["mx.d.example"]


UNUSABLE = TlsaSet("mx.d.example", frozenset())
UNKNOWN = TlsFailure(Reason.DNSSEC_INVALID, "its TLSA records cannot be known")
NO_STARTTLS = TlsFailure(Reason.NO_STARTTLS, "x")


@pytest.mark.parametrize("sts", [None, STS])
@pytest.mark.parametrize(
    ("tlsa", "failure", "results"),
    [
        (TLSA, None, {"tlsa": "", "sts": ""}),
        (UNUSABLE, None, {"tlsa": "tlsa-invalid", "sts": ""}),
        (UNUSABLE, NO_STARTTLS, {"tlsa": str(Reason.NO_STARTTLS), "sts": str(Reason.NO_STARTTLS)}),
        (None, UNKNOWN, {"tlsa": "dnssec-invalid"}),
        (None, NO_STARTTLS, {"sts": str(Reason.NO_STARTTLS)}),
        (None, None, {"sts": ""}),
    ],
)
async def test_the_state_of_tlsa_records_counts_under_tlsa(
    bench: Bench,
    tlsa: TlsaSet | None,
    failure: TlsFailure | None,
    results: dict[str, str],
    sts: StsPolicy | None,
) -> None:
    """RFC 8460, section 4.3.2.1."""
    bench.tell(failure, sts=sts, tlsa=tlsa)
    await bench.reports.flush()
    day = Day.of(bench.clock.now).begin
    found = TlsCounts(bench.config.queue_directory).sessions(day, "d.example")
    if sts is None:
        without = {kind: result for kind, result in results.items() if kind != "sts"}
        results = without or {"no-policy-found": results["sts"]}
    assert {session.kind: session.result for session, _ in found} == results
    assert all(count == 1 for _, count in found)
    if "tlsa" in results:
        await bench.next_day()
        await bench.reports.round()
        (told,) = [p for p in bench.report()["policies"] if p["policy"]["policy-type"] == "tlsa"]
        assert told["policy"]["mx-host"] == ["mx.d.example"]
        details = told.get("failure-details", [])
        assert [each["result-type"] for each in details] == [results["tlsa"]] * len(details)
        assert bool(details) is bool(results["tlsa"])


async def test_unusable_records_count_beside_a_failure_of_mta_sts(bench: Bench) -> None:
    bench.tell(EXPIRED, sts=STS, tlsa=UNUSABLE)
    await bench.reports.flush()
    day = Day.of(bench.clock.now).begin
    found = TlsCounts(bench.config.queue_directory).sessions(day, "d.example")
    assert {session.kind: session.result for session, _ in found} == {
        "tlsa": "tlsa-invalid",
        "sts": "certificate-expired",
    }


async def test_sessions_without_a_policy_and_policies_without_a_fetch_count_too(
    bench: Bench,
) -> None:
    bench.tell()
    bench.tell(TlsFailure(Reason.NO_STARTTLS, "x"))
    bench.reports.policy_failed("d.example", None, FetchFailed(Reason.STS_WEBPKI, "bad\r\nname"))
    await bench.next_day()
    await bench.reports.round()
    nothing, sts = bench.report()["policies"]
    assert nothing["policy"] == {
        "policy-type": "no-policy-found", "policy-domain": "d.example"
    }  # fmt: skip
    assert nothing["summary"] == {
        "total-successful-session-count": 1, "total-failure-session-count": 1,
    }  # fmt: skip
    assert sts["failure-details"] == [
        {
            "result-type": "sts-webpki-invalid",
            "failed-session-count": 1,
            "failure-reason-code": "bad name",
        }
    ]


async def test_a_failure_under_a_policy_has_the_policy_looked_up_anew(bench: Bench) -> None:
    off = bench.open(tls_report=False)
    bench.tell(sts=STS, to=off)
    bench.tell(EXPIRED, to=off)
    assert bench.doubted == []
    bench.tell(EXPIRED, sts=STS, to=off)
    assert bench.doubted == ["d.example"]


async def test_nothing_is_counted_or_sent_while_the_setting_is_off(bench: Bench) -> None:
    off = bench.reports = bench.open(tls_report=False)
    bench.tell()
    off.policy_failed("d.example", None, FetchFailed(Reason.STS_FETCH, "x"))
    await bench.next_day()
    await off.round()
    assert not bench.published and not bench.dns.questions
    assert not TlsCounts(bench.config.queue_directory).days()


async def test_processes_add_up_and_a_restart_in_between_loses_nothing(bench: Bench) -> None:
    other = bench.open()
    bench.tell(sts=STS)
    bench.tell(sts=STS, to=other)
    await other.flush()
    await bench.reports.flush()
    bench.reports = bench.open()
    bench.tell(sts=STS)
    await bench.next_day()
    bench.reports = bench.open()
    await bench.reports.round()
    (counted,) = bench.report()["policies"]
    assert counted["summary"]["total-successful-session-count"] == 3


async def test_sessions_at_midnight_belong_to_their_own_days(bench: Bench) -> None:
    end = Day.of(bench.clock.now).end
    bench.clock.now = end - 0.5
    bench.tell()
    bench.clock.now = end + 0.5
    bench.tell()
    bench.tell()
    await bench.reports.flush()
    bench.clock.now = end + 5 * HOUR
    await bench.reports.round()
    await bench.next_day()
    await bench.reports.round()
    counts = [
        bench.report(index)["policies"][0]["summary"]["total-successful-session-count"]
        for index in (0, 1)
    ]
    assert counts == [1, 2]


async def test_counts_in_memory_are_bounded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tls_reports, "MAX_PENDING", 5)
    for number in range(100):
        bench.tell(TlsFailure(Reason.FAILURE, "x", str(number)))
    for number in range(100):
        bench.tell(domain=f"d{number}.example")
    await bench.reports.flush()
    file = TlsCounts(bench.config.queue_directory)
    day = Day.of(bench.clock.now).begin
    domains = file.domains(day)
    counted = sum(count for name in domains for _, count in file.sessions(day, name))
    assert len(domains) <= 10
    assert f"{200 - counted} TLS sessions" in caplog.text


async def test_counts_that_cannot_be_written_are_written_later(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    queue = Path(bench.config.queue_directory)
    queue.rmdir()
    bench.tell()
    await bench.reports.flush()
    assert "not written" in caplog.text
    await bench.reports.round()
    queue.mkdir()
    await bench.next_day()
    await bench.reports.round()
    assert len(bench.published) == 1


# Sending


async def test_reports_are_sent_within_hours_after_the_day_at_a_random_time(bench: Bench) -> None:
    for number in range(40):
        name = f"d{number}.example"
        bench.tell(domain=name)
        bench.dns.zone[f"_smtp._tls.{name}", "TXT"] = bench.dns.zone[RECORD]
    await bench.next_day(0)
    counts = []
    for _ in range(25):
        await bench.reports.round()
        counts.append(len(bench.published))
        bench.clock.now += 600
    assert counts[0] == 0 and counts[-1] == 40
    assert len(set(counts)) > 5


async def test_a_report_is_posted_to_a_web_server_whose_certificate_may_be_bad(
    bench: Bench,
) -> None:
    bench.want(f"https://reports.example:{bench.web.port}/v1/tls?x=1", "mailto:r@d.example")
    bench.tell(sts=STS)
    await bench.next_day()
    await bench.reports.round()
    (request,) = bench.web.requests
    assert (request.method, request.target) == ("POST", "/v1/tls?x=1")
    assert request.headers["content-type"] == "application/tlsrpt+gzip"
    assert json.loads(gzip.decompress(request.body)) == bench.report()
    assert len(bench.published) == 1


@pytest.mark.parametrize("trouble", ["500", "closed", "redirect"])
async def test_a_post_that_fails_is_tried_again_for_a_day(bench: Bench, trouble: str) -> None:
    port = 1 if trouble == "closed" else bench.web.port
    bench.web.answer = (
        response(b"", status=500)
        if trouble == "500"
        else response(b"", status=307, more="Location: https://reports.example/\r\n")
    )
    bench.want(f"https://reports.example:{port}/")
    bench.tell()
    await bench.next_day()
    start = bench.clock.now
    file = TlsCounts(bench.config.queue_directory)
    while bench.clock.now < start + 30 * HOUR:
        await bench.reports.round()
        bench.clock.now += 600
    (state,) = file.reports(10)
    assert state.state == "failed" and 4 < state.tries < 20 and state.problem
    if trouble != "closed":
        assert len(bench.web.requests) == state.tries + 1


async def test_a_post_succeeds_when_the_server_is_back_over_a_restart(bench: Bench) -> None:
    bench.web.answer = response(b"", status=503)
    bench.want(f"https://reports.example:{bench.web.port}/")
    bench.tell()
    await bench.next_day()
    await bench.reports.round()
    bench.web.answer = response(b"", status=201)
    bench.clock.now += HOUR
    bench.reports = bench.open()
    await bench.reports.round()
    first, second = bench.web.requests
    assert first.body == second.body
    assert [each.state for each in bench_states(bench)] == ["sent"]


def bench_states(bench: Bench) -> list[Any]:
    return [*TlsCounts(bench.config.queue_directory).reports(10)]


async def test_a_place_on_a_forbidden_address_gets_nothing(bench: Bench) -> None:
    bench.reports = bench.open(smtp_out_forbidden=["127.0.0.0/8"])
    bench.want(f"https://reports.example:{bench.web.port}/")
    bench.tell()
    await bench.next_day()
    await bench.reports.round()
    assert bench.web.connections == 0
    assert "forbidden" in bench_states(bench)[0].problem


async def test_without_a_record_nothing_is_sent_and_nothing_asked_again(bench: Bench) -> None:
    bench.want()
    bench.tell()
    await bench.next_day()
    for _ in range(5):
        await bench.reports.round()
        bench.clock.now += HOUR
    assert not bench.published and bench.dns.questions[RECORD] == 1


async def test_name_servers_that_do_not_answer_are_asked_again(bench: Bench) -> None:
    good = bench.dns.zone[RECORD]
    bench.dns.zone[RECORD] = SERVFAIL
    bench.tell()
    await bench.next_day()
    await bench.reports.round()
    assert not bench.published
    bench.dns.zone[RECORD] = good
    bench.clock.now += HOUR
    await bench.reports.round()
    assert len(bench.published) == 1


async def test_a_queue_that_takes_nothing_is_tried_again(bench: Bench) -> None:
    bench.tell()
    await bench.next_day()
    bench.refuses = True
    await bench.reports.round()
    assert bench_states(bench)[0].problem == "the disk is full"
    bench.refuses = False
    bench.clock.now += HOUR
    await bench.reports.round()
    assert len(bench.published) == 1


async def test_a_daemon_that_was_down_for_two_days_sends_nothing_old(bench: Bench) -> None:
    bench.tell()
    await bench.reports.flush()
    bench.clock.now = Day.of(bench.clock.now).end + 49 * HOUR
    await bench.reports.round()
    assert not bench.published
    assert not TlsCounts(bench.config.queue_directory).days()


async def test_without_a_sender_reports_go_to_web_servers_only(bench: Bench) -> None:
    bench.reports = bench.open(tls_report_from="")
    bench.want(f"https://reports.example:{bench.web.port}/", "mailto:r@d.example")
    bench.tell()
    await bench.next_day()
    await bench.reports.round()
    assert len(bench.web.requests) == 1 and not bench.published
    states = {each.place[:5]: each.state for each in bench_states(bench)}
    assert states == {"https": "sent", "mailt": "unsent"}


async def days(bench: Bench, count: int) -> int:
    """Send the reports of some days; returns how many went out by mail and HTTPS."""
    before = len(bench.published) + len(bench.web.requests)
    for _ in range(count):
        bench.tell()
        await bench.next_day()
        await bench.reports.round()
    return len(bench.published) + len(bench.web.requests) - before


async def test_an_address_that_bounces_gets_no_reports_for_some_days(bench: Bench) -> None:
    assert await days(bench, 1) == 1
    bench.reports.report_ended("r@d.example", "550 5.1.1 no such user")
    assert await days(bench, 2) == 0
    state = bench_states(bench)[0]
    assert state.state == "unsent" and "550 5.1.1 no such user" in state.problem
    bench.reports = bench.open()  # a restart forgets nothing
    assert await days(bench, 1) == 1
    bench.reports.report_ended("r@d.example", "550 5.1.1 no such user")
    assert await days(bench, 5) == 0
    assert await days(bench, 1) == 1
    bench.reports.report_ended("r@d.example", "")
    await bench.reports.flush()
    bench.reports.report_ended("r@d.example", "expired")
    assert await days(bench, 2) == 0
    assert await days(bench, 2) == 2, "a report that arrived made the next failure a first one"


async def test_other_places_of_a_domain_and_other_domains_do_not_rest(bench: Bench) -> None:
    bench.want("mailto:r@d.example", "mailto:s@d.example")
    bench.reports.report_ended("r@d.example", "550 no")
    await days(bench, 1)
    assert [message.recipient for message in bench.published] == ["s@d.example"]


async def test_a_web_server_that_fails_for_a_day_gets_no_reports_for_some_days(
    bench: Bench,
) -> None:
    bench.web.answer = response(b"", status=500)
    bench.want(f"https://reports.example:{bench.web.port}/")
    bench.tell()
    await bench.next_day()
    while bench_states(bench)[:1] == [] or bench_states(bench)[0].state == "waiting":
        await bench.reports.round()
        bench.clock.now += HOUR
    assert bench_states(bench)[0].state == "failed"
    bench.web.answer = response(b"", status=200)
    bench.reports.report_ended("r@d.example", "550 no")  # of another place
    assert await days(bench, 2) == 0
    assert "500" in bench_states(bench)[0].problem
    assert await days(bench, 2) > 0


async def test_places_that_cannot_be_written_are_written_later(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    queue = Path(bench.config.queue_directory)
    queue.rmdir()
    bench.reports.report_ended("r@d.example", "550 no")
    await bench.reports.flush()
    assert "not written" in caplog.text
    queue.mkdir()
    assert await days(bench, 1) == 0


async def test_a_name_server_that_fails_makes_no_place_rest(bench: Bench) -> None:
    good, bench.dns.zone[RECORD] = bench.dns.zone[RECORD], SERVFAIL
    bench.tell()
    await bench.next_day()
    for _ in range(30):
        await bench.reports.round()
        bench.clock.now += HOUR
    bench.dns.zone[RECORD] = good
    assert await days(bench, 1) == 1


async def test_a_defect_in_one_report_does_not_stop_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.tell()
    bench.tell(domain="e.example")
    bench.dns.zone["_smtp._tls.e.example", "TXT"] = bench.dns.zone[RECORD]
    await bench.next_day()
    made = tls_reports.document

    def document(sender: Any, day: Any, number: str, policies: Any) -> Any:
        if policies[0].domain == "d.example":
            raise RuntimeError("a defect")
        return made(sender, day, number, policies)

    monkeypatch.setattr(tls_reports, "document", document)
    await bench.reports.round()
    assert len(bench.published) == 1 and "a defect" in caplog.text


def test_only_messages_with_the_tag_are_reports() -> None:
    assert is_report({"tags": ["tls-report"]})
    assert not is_report({"tags": "tls-report"}) and not is_report({})
