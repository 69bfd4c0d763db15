"""MTA-STS and TLS reports in a whole engine: real name servers, web servers and TLS peers."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq import Engine
from mailerq.mail.tls_report import Day, is_report
from mailerq.store.sts_file import StsFile
from mailerq.store.tls_counts import Session, TlsCounts
from tests.net.dns_server import DnsServer, open_dns_server
from tests.net.https_server import HttpsServer, open_https_server, response
from tests.outbound.kit import Peer
from tests.outbound.memory_queues import MemoryQueues
from tests.outbound.sts_kit import policy_text
from tests.outbound.tls_kit import Certificates, starttls
from tests.signing_kit import Keys, dkimpy_says, signatures, tags
from tests.support import configure, until

RECORD = ("_mta-sts.d.example", "TXT")


@dataclass
class Bench:
    directory: Path
    dns: DnsServer
    web: HttpsServer
    peer: Peer
    port: int
    certificates: Certificates

    def publish(self, number: str | None, text: bytes | None = None) -> None:
        self.dns.zone[RECORD] = [f'"v=STSv1; id={number}"'] if number else []
        if text is not None:
            self.web.answer = response(text)

    def certify(self, *names: str, **options: Any) -> None:
        """Have the peer show a certificate for these names from now on."""
        self.peer.scripts[:] = [starttls(self.certificates.server(*names, **options))] * 50

    @asynccontextmanager
    async def engine(self, **settings: Any) -> AsyncIterator[Engine]:
        config = configure(
            self.directory,
            dns_servers=[self.dns.address],
            smtp_out_port=self.port,
            smtp_out_forbidden=(),
            mta_sts_port=self.web.port,
            connection_ca_file=self.certificates.ca_file,
            connection_maxidle=0,
            rabbitmq_results="results",
            rabbitmq_retry="retry",
            **settings,
        )
        async with Engine(config) as engine:
            yield engine


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    zone: dict[tuple[str, str], Any] = {
        ("d.example", "MX"): ["10 mx.d.example."],
        ("mx.d.example", "A"): ["127.0.0.1"],
        ("mta-sts.d.example", "A"): ["127.0.0.1"],
        RECORD: ['"v=STSv1; id=1"'],
    }
    certificates = Certificates(tmp_path)
    peer = Peer(MemoryQueues())
    async with (
        open_dns_server(zone) as dns,
        open_https_server(tmp_path, "mta-sts.d.example") as web,
        trio.open_nursery() as nursery,
    ):
        web.ca = certificates.trusted
        web.certify("mta-sts.d.example")
        web.answer = response(policy_text())
        certificates.trusted.cert_pem.write_to_path(certificates.ca_file)
        listeners = await nursery.start(lambda task_status: _serve(peer, task_status))
        port = listeners[0].socket.getsockname()[1]
        bench = Bench(tmp_path, dns, web, peer, port, certificates)
        bench.certify("mx.d.example")
        yield bench
        nursery.cancel_scope.cancel()


async def _serve(peer: Peer, task_status: Any) -> None:
    await trio.serve_tcp(peer.handle, 0, host="127.0.0.1", task_status=task_status)


async def send(engine: Engine, domain: str = "d.example", **more: Any) -> None:
    await engine.publish(
        {"envelope": "a@b.example", "recipient": f"c@{domain}", "mime": "Subject: x\r\n\r\nhi\r\n",
         "retries": [1], **more}
    )  # fmt: skip


async def outcome(engine: Engine, queue: str = "results") -> dict[str, Any]:
    async with engine.consume(queue) as leases:
        lease = await leases.receive()
        await engine.ack(lease)
        return lease.message.results[-1]


async def test_mail_goes_to_a_host_that_does_what_the_policy_says(bench: Bench) -> None:
    async with bench.engine() as engine:
        await send(engine)
        await until(lambda: bench.peer.mails)
    assert any(line.startswith("(TLS") for line in bench.peer.commands)
    assert len(bench.web.requests) == 1


@pytest.mark.parametrize("fault", ["certificate", "host", "starttls"])
async def test_a_host_that_does_not_gets_no_mail_until_the_domain_has_another_policy(
    bench: Bench, fault: str
) -> None:
    if fault == "certificate":
        bench.certify("other.example")
    elif fault == "host":
        bench.web.answer = response(policy_text("enforce", "other.d.example"))
    else:
        bench.peer.scripts[:] = []  # a peer in clear
    async with bench.engine() as engine:
        await send(engine)
        result = await outcome(engine, "retry")
        assert (result["code"], result["status"]) == (None, "4.7.5") or result["status"] == "4.7.5"
        assert not bench.peer.mails
        asked = bench.dns.questions[RECORD]
        # The name servers are asked again for each attempt, though their answer is still fresh.
        bench.publish("2", b"version: STSv1\nmode: none\nmax_age: 86400\n")
        await until(lambda: bench.peer.mails)
        assert bench.dns.questions[RECORD] > asked
    assert len(bench.peer.mails) == 1


async def test_a_policy_holds_over_a_restart_without_its_servers(bench: Bench) -> None:
    async with bench.engine() as engine:
        await send(engine)
        await until(lambda: bench.peer.mails)
    bench.publish(None)
    bench.web.answer = response(b"", status=404)
    bench.certify("other.example")
    async with bench.engine() as engine:
        await send(engine)
        assert (await outcome(engine, "retry"))["status"] == "4.7.5"
    assert len(bench.peer.mails) == 1


async def test_a_policy_in_testing_is_reported_and_demands_nothing(bench: Bench) -> None:
    bench.publish("1", policy_text("testing"))
    bench.certify("other.example")
    async with bench.engine(tls_report=True, tls_report_from="t@x.example") as engine:
        await send(engine)
        await until(lambda: bench.peer.mails)
    file = TlsCounts(engine.config.queue_directory)
    (day,) = file.days()
    ((session, count),) = file.sessions(day, "d.example")
    assert (session.kind, session.result, count) == ("sts", "certificate-host-mismatch", 1)
    assert session.host == "mx.d.example" and session.remote_ip == "127.0.0.1"
    assert json.loads(session.policy) == [
        ["version: STSv1", "mode: testing", "mx: mx.d.example", "max_age: 604800"],
        ["mx.d.example"],
    ]


async def test_handshakes_count_once_for_each_connection(bench: Bench) -> None:
    async with bench.engine(
        tls_report=True, tls_report_contact="t@x.example", domain_maxconnections=1
    ) as engine:
        for _ in range(3):
            await send(engine)
        await until(lambda: len(bench.peer.mails) == 3)
        connections = bench.peer.connections
    file = TlsCounts(engine.config.queue_directory)
    ((session, count),) = file.sessions(file.days()[0], "d.example")
    assert session.result == "" and 1 <= count <= connections


def count_yesterday(bench: Bench, day: Day) -> TlsCounts:
    """Count sessions with a domain that wants its reports at another one, the peer's."""
    queue = bench.directory / "queue"
    queue.mkdir()
    file = TlsCounts(str(queue))
    file.add({(day.begin, Session("r.example", "no-policy-found", "")): 3})
    bench.dns.zone["_smtp._tls.r.example", "TXT"] = ['"v=TLSRPTv1; rua=mailto:tls@d.example"']
    return file


async def test_a_report_goes_out_and_causes_no_other_report(bench: Bench) -> None:
    yesterday = Day(Day.of(time.time()).begin - 86400)
    file = count_yesterday(bench, yesterday)
    async with bench.engine(tls_report=True, tls_report_from="t@x.example") as engine:
        file.plan(Day.of(time.time()).begin, 0, 1)
        await engine.commands()["policies"]({"send": True})  # type: ignore[misc]
        await until(lambda: bench.peer.mails)
        (mail,) = bench.peer.mails
        assert (mail.envelope, mail.recipient) == ("", "tls@d.example")
        found: Any = message_from_bytes(mail.body, policy=policy.default)
        _, report = found.iter_parts()
        document = json.loads(gzip.decompress(report.get_content()))
        assert document["policies"][0]["summary"]["total-successful-session-count"] == 3
        await until(lambda: [each.state for each in file.reports(10)] == ["sent"])
        await engine.commands()["policies"]({"flush": True})  # type: ignore[misc]
        assert file.days() == [yesterday.begin]
        await send(engine)
        await until(lambda: len(bench.peer.mails) == 2)
    assert file.domains(Day.of(time.time()).begin) == ["d.example"]


async def test_a_report_is_signed_by_the_domain_of_its_sender_with_its_own_fields(
    bench: Bench,
) -> None:
    file = count_yesterday(bench, Day(Day.of(time.time()).begin - 86400))
    directory = bench.directory / "dkim"
    keys = Keys(directory)
    for domain in ("x.example", "b.example", "mx.test"):
        keys.add(domain, "s1")
    settings = {"tls_report": True, "tls_report_from": "t@X.example"}
    async with bench.engine(dkim_directory=str(directory), **settings) as engine:
        file.plan(Day.of(time.time()).begin, 0, 1)
        await engine.commands()["policies"]({"send": True})  # type: ignore[misc]
        await until(lambda: bench.peer.mails)
    (mail,) = bench.peer.mails
    (signature,) = signatures(mail.body)
    found = tags(signature)
    assert (found["d"], found["s"]) == ("x.example", "s1")
    names = found["h"].lower().split(":")
    for name in ("TLS-Report-Domain", "TLS-Report-Submitter", "TLS-Required"):
        assert names.count(name.lower()) == 1
        assert mail.body.count(f"\r\n{name}: ".encode()) == 1
        wrong = mail.body.replace(f"\r\n{name}: ".encode(), f"\r\n{name}: x".encode())
        assert dkimpy_says(wrong, keys.records) == [False]
    assert {"from", "to", "subject", "date", "content-type", "message-id"} < {*names}
    assert dkimpy_says(mail.body, keys.records) == [True]


async def test_a_report_goes_in_spite_of_the_policy_of_its_recipient(bench: Bench) -> None:
    bench.certify("other.example")
    async with bench.engine() as engine:
        await send(engine, tags=["tls-report"], tlsrequired=False)
        await until(lambda: bench.peer.mails)
    assert is_report({"tags": ["tls-report"]})
    assert any(line.startswith("(TLS") for line in bench.peer.commands)


async def test_explain_shows_the_policy(bench: Bench) -> None:
    async with bench.engine() as engine:
        await send(engine)
        await until(lambda: bench.peer.mails)
        answer: Any = await engine.commands()["explain"]({"recipient": "d.example"})  # type: ignore[misc]
        assert answer["mta-sts"]["id"] == "1" and answer["mta-sts"]["mode"] == "enforce"
        assert answer["mta-sts"]["mx"] == ["mx.d.example"] and answer["mta-sts"]["in-force"]
        other: Any = await engine.commands()["explain"]({"recipient": "no.example"})  # type: ignore[misc]
        assert "mta-sts" not in other


async def test_name_servers_that_do_not_answer_for_the_record_have_the_mail_wait(
    bench: Bench,
) -> None:
    good = bench.dns.zone[RECORD]
    bench.dns.zone[RECORD] = 2  # SERVFAIL
    async with bench.engine() as engine:
        await send(engine)
        result = await outcome(engine, "retry")
        assert "MTA-STS" in result["description"] and not bench.peer.connections
        bench.dns.zone[RECORD] = good
        await until(lambda: bench.peer.mails)


async def test_a_reload_turns_policies_off(bench: Bench) -> None:
    bench.certify("other.example")
    async with bench.engine() as engine:
        await send(engine)
        assert (await outcome(engine, "retry"))["status"] == "4.7.5"
        engine.reload(engine.config.replace(mta_sts=False))
        await until(lambda: bench.peer.mails)
    entry = StsFile(engine.config.queue_directory).get("d.example")
    assert entry is not None and entry.text


async def test_a_purged_policy_is_gone_at_once(bench: Bench) -> None:
    bench.certify("other.example")
    async with bench.engine() as engine:
        await send(engine)
        assert (await outcome(engine, "retry"))["status"] == "4.7.5"
        bench.publish(None)
        StsFile(engine.config.queue_directory).remove("d.example")
        await engine.commands()["policies"]({"forget": "d.example"})  # type: ignore[misc]
        await until(lambda: bench.peer.mails)
