"""Senders hear of what became of their mail, with peers that refuse, defer, accept and vanish."""

from __future__ import annotations

import email
from email.message import Message as Mail
from pathlib import Path
from typing import Any

import pytest
import trio
from flufl.bounce import all_failures

from mailerq.mail import verp
from mailerq.message import Message
from mailerq.queues import Settlement
from mailerq.rules.bounces import MARK
from mailerq.rules.reporting import Reports
from mailerq.rules.rows import Rows
from tests.outbound.kit import Bench, open_bench
from tests.outbound.memory_queues import NOW
from tests.outbound.test_delivery_lmtp import open_mailbox
from tests.outbound.test_stops import error, suppress

BODY = "Message-ID: <m1@b.test>\r\nSubject: Hi\r\n\r\nhello\r\n"


def received(**more: Any) -> dict[str, Any]:
    """What mail that came by SMTP has."""
    return {"received": "2026-01-01 11:00:00", "message-id": "0a1b", **more}


async def reports(bench: Bench, count: int = 1, queue: str = "dsn") -> list[Message]:
    """The reports, once all is settled and there are so many."""
    await bench.queues.until(lambda queues: len(queues[queue]) >= count and not queues.leased)
    assert len(bench.queues[queue]) == count
    return bench.queues[queue]


def fields(report: Message, recipient: int = 0) -> dict[str, str]:
    """The fields about a recipient."""
    assert report.body is not None
    parsed = email.message_from_bytes(report.body)
    parts: Any = parsed.get_payload()
    return dict(parts[1].get_payload()[recipient + 1].items())


def mails(bench: Bench) -> list[Any]:
    """What the peer took. A mail without a body was given up after its envelope was refused."""
    return [mail for mail in bench.peer.mails if mail.body]


def parsed(report: Message) -> Mail:
    assert report.body is not None
    return email.message_from_bytes(report.body)


def told(bench: Bench) -> list[str]:
    """The recipients that the reports are about."""
    blocks: list[Any] = [parsed(each).get_payload() for each in bench.queues["dsn"]]
    return [
        part["Final-Recipient"].removeprefix("rfc822; ")
        for parts in blocks
        for part in parts[1].get_payload()[1:]
    ]


async def test_the_sender_of_a_refused_mail_gets_a_report_by_mail() -> None:
    async with open_bench() as bench:
        bench.peer.answers["RCPT", "c@d.test"] = ["550 5.1.1 no such user"]
        bench.send(**received(dsn={"envid": "e1", "orcpt": "rfc822;x@d.test"}), body=BODY)
        await bench.results("failure")
        await bench.queues.until(lambda queues: bool(mails(bench)) and not queues.leased)
        (mail,) = mails(bench)
        assert (mail.envelope, mail.recipient) == ("", "a@b.test")
        report = email.message_from_bytes(mail.body)
        assert report["To"] == "a@b.test"
        assert report["In-Reply-To"] == "<m1@b.test>"
        assert set(all_failures(report)[1]) == {b"x@d.test"}
        found = fields(Message({}, mail.body))
        assert (found["Status"], found["Action"]) == ("5.1.1", "failed")
        assert found["Diagnostic-Code"] == "smtp; 550 5.1.1 no such user"
        assert found["Remote-MTA"] == "dns; mx.test"
        assert bench.dispatcher.statistics()["reports"] == 1


async def test_a_document_of_an_application_makes_a_report_only_if_it_asks() -> None:
    async with open_bench(rabbitmq_dsn="dsn") as bench:
        bench.peer.answers["RCPT", ""] = ["550 no"] * 3
        bench.send("one@d.test", body=BODY)
        await bench.results("failure")
        bench.send("two@d.test", body=BODY, dsn={})
        await bench.results("failure", 2)
        (report,) = await reports(bench)
        assert fields(report)["Final-Recipient"] == "rfc822; two@d.test"
        assert report.properties[MARK]["event"] == "failed"


@pytest.mark.parametrize(
    ("answers", "more", "status", "diagnostic"),
    [
        # time or attempts are up
        ({"RCPT": ["450 4.2.0 busy"]}, {"maxattempts": 1}, "4.2.0", "smtp; 450 4.2.0 busy"),
        (
            {"RCPT": ["450 4.2.0 busy"]},
            {"maxdelivertime": "2026-01-01 12:05:00"},
            "4.2.0",
            "smtp; 450 4.2.0 busy",
        ),
        (
            {},
            {"maxdelivertime": "2025-01-01 12:05:00"},
            "4.4.7",
            "X-mailerq; past its time before an attempt",
        ),
        # unsendable
        ({}, {"smarthost": {}, "recipient": "no address"}, "5.1.3", "X-mailerq; 553 5.1.3"),
        ({}, {"body": None}, "5.6.0", "X-mailerq; there is no body to send"),
        # hop limit
        ({}, {"body": "Received: x\r\n" * 101 + "\r\n"}, "5.4.6", "X-mailerq; 554 5.4.6"),
        # refused later
        ({".": ["554 5.7.1 spam"]}, {}, "5.7.1", "smtp; 554 5.7.1 spam"),
        ({"DATA": ["554 no"]}, {}, "5.0.0", "smtp; 554 no"),
    ],
)
async def test_every_failure_is_reported(
    answers: dict[str, list[str]], more: dict[str, Any], status: str, diagnostic: str
) -> None:
    async with open_bench(rabbitmq_dsn="dsn") as bench:
        bench.peer.answers = {(verb, ""): replies for verb, replies in answers.items()}
        bench.send(**{"body": BODY, **received(), **more})
        (report,) = await reports(bench)
        assert len(bench.queues["failure"]) == 1
        found = fields(report)
        assert found["Action"] == "failed"
        assert found["Status"].startswith(status)
        assert found["Diagnostic-Code"].startswith(diagnostic)


async def test_a_mail_that_expires_while_it_waits_comes_back_with_the_cause() -> None:
    async with open_bench(rabbitmq_dsn="dsn") as bench:
        results = [
            {"attempt": 1, "type": "error", "state": "rcpt to", "to": "192.0.2.1", "code": 452,
             "status": "4.2.2", "description": "full", "mta": "mx.d.test",
             "time": "2025-01-01 12:00:00"},
        ]  # fmt: skip
        bench.send(**received(maxdelivertime="2025-01-01 12:05:00", results=results), body=BODY)
        (report,) = await reports(bench)
        found = fields(report)
        assert (found["Status"], found["Remote-MTA"]) == ("4.2.2", "dns; mx.d.test")
        assert found["Diagnostic-Code"] == "smtp; 452 4.2.2 full"
        assert found["Last-Attempt-Date"] == "Wed, 1 Jan 2025 12:00:00 +0000"
        hostile = [{"code": "x", "to": 7, "type": [], "time": None, "mta": {}}]
        bench.send(**received(maxdelivertime="2025-01-01 12:05:00", results=hostile), body=BODY)
        _, report = await reports(bench, 2)
        assert fields(report)["Action"] == "failed"


async def test_nobody_hears_of_mail_that_is_delivered_or_tried_again() -> None:
    async with open_bench(rabbitmq_dsn="dsn") as bench:
        bench.peer.answers["RCPT", ""] = ["450 busy"]
        bench.send(**received(dsn={"notify": "FAILURE"}), body=BODY)
        await bench.retried()
        bench.send("e@d.test", **received(), body=BODY)
        await bench.results("success")
        assert bench.queues["dsn"] == []
        assert bench.dispatcher.statistics()["reports"] == 0


@pytest.mark.parametrize("offered", [False, True])
async def test_a_peer_without_dsn_takes_mail_whose_sender_wants_to_know(offered: bool) -> None:
    async with open_bench(rabbitmq_dsn="dsn") as bench:
        bench.peer.extensions = ("PIPELINING", "DSN") if offered else ("PIPELINING",)
        bench.send(**received(dsn={"notify": "SUCCESS"}), body=BODY)
        await bench.results("success")
        (rcpt,) = [line for line in bench.peer.commands if line.startswith("RCPT")]
        assert rcpt == "RCPT TO:<c@d.test>" + (" NOTIFY=SUCCESS" if offered else "")
        if offered:
            assert bench.queues["dsn"] == []
            return
        (report,) = await reports(bench)
        found = fields(report)
        assert (found["Action"], found["Status"]) == ("relayed", "2.0.0")
        assert found["Diagnostic-Code"] == "smtp; 250 2.0.0 taken"


CLAUSES: list[tuple[str | None, str, str | None, str]] = [
    # NOTIFY, the reply to RCPT, Action of our report, and the clause of RFC 3461
    ("SUCCESS", "250", "relayed", "5.2.2 b"),
    ("SUCCESS,FAILURE", "250", "relayed", "5.2.2 b"),
    ("SUCCESS,FAILURE", "550", "failed", "5.2.2 c"),
    ("FAILURE", "550", "failed", "5.2.2 c"),
    ("NEVER", "250", None, "5.2.2 d"),
    ("NEVER", "550", None, "5.2.2 d"),
    (None, "250", None, "5.2.2 e"),
    (None, "550", "failed", "5.2.2 f"),
    ("FAILURE,DELAY", "250", None, "5.2.2 b"),
    ("SUCCESS", "550", None, "5.2.6 b"),
    ("DELAY", "550", None, "5.2.6 b"),
]


@pytest.mark.parametrize("offered", [False, True])
@pytest.mark.parametrize(("notify", "reply", "action", "clause"), CLAUSES)
async def test_the_clauses_about_relayed_mail(
    notify: str | None, reply: str, action: str | None, clause: str, offered: bool
) -> None:
    dsn = {"envid": "QQ+1=2", "ret": "FULL", "orcpt": "rfc822;Old+Name@d.test", "notify": notify}
    async with open_bench(rabbitmq_dsn="dsn") as bench:
        bench.peer.extensions = ("PIPELINING", "DSN") if offered else ("PIPELINING",)
        bench.peer.answers["RCPT", "c@d.test"] = [f"{reply} 2.1.5 so it is"]
        bench.send(**received(dsn={key: value for key, value in dsn.items() if value}), body=BODY)
        await bench.results("success" if reply == "250" else "failure")
        await bench.queues.until(lambda queues: not queues.leased)
        commands = [line for line in bench.peer.commands if line.startswith(("MAIL", "RCPT"))]
        wishes = [line.partition("> ")[2] for line in commands]
        if offered:  # 5.2.1: all as it came, and nothing that did not
            notified = f"NOTIFY={notify} " if notify else ""
            assert wishes[0].split()[-2:] == ["RET=FULL", "ENVID=QQ+2B1+3D2"]
            assert wishes[1] == f"{notified}ORCPT=rfc822;Old+2BName@d.test"
        else:
            assert not any(word in " ".join(wishes) for word in ("ENVID", "RET", "NOTIFY", "ORCPT"))
        expected = None if offered and action == "relayed" else action
        found = [fields(report) for report in bench.queues["dsn"]]
        assert [each["Action"] for each in found] == ([expected] if expected else []), clause
        for report in bench.queues["dsn"]:
            assert report.body is not None
            assert fields(report)["Original-Recipient"] == "rfc822; Old+Name@d.test"
            assert b"\r\nOriginal-Envelope-Id: QQ+1=2\r\n" in report.body
            # 6.2: the whole mail comes back for a failure only.
            assert (b"\r\nhello\r\n" in report.body) is (expected == "failed")


async def test_the_envelope_of_a_report_asks_for_no_report() -> None:
    """RFC 3461, section 6.1."""
    async with open_bench(dsn_ret="FULL", dsn_notify=("FAILURE", "SUCCESS")) as bench:
        bench.peer.extensions = ("PIPELINING", "DSN")
        bench.peer.answers["RCPT", "c@d.test"] = ["550 no"]
        bench.send(**received(dsn={"envid": "e1", "ret": "FULL"}), body=BODY)
        await bench.results("failure")
        await bench.queues.until(lambda queues: bool(mails(bench)) and not queues.leased)
        envelope = [line for line in bench.peer.commands if line.startswith(("MAIL", "RCPT"))][-2:]
        assert envelope == ["MAIL FROM:<>", "RCPT TO:<a@b.test> NOTIFY=NEVER"]
        assert bench.dispatcher.statistics()["reports"] == 1


async def test_mail_that_an_lmtp_server_has_is_delivered(tmp_path: Path) -> None:
    async with open_mailbox(tmp_path, rabbitmq_dsn="dsn") as bench:
        bench.send(**received(dsn={"notify": "SUCCESS"}), body=BODY)
        bench.send("bob@e.test", **received(), body=BODY)
        await bench.results("success", 2)
        (report,) = await reports(bench)
        found = fields(report)
        assert (found["Action"], found["Status"]) == ("delivered", "2.0.0")
        assert found["Final-Recipient"] == "rfc822; c@d.test"


async def test_a_delay_is_reported_once_after_some_time() -> None:
    async with open_bench(rabbitmq_dsn="dsn", dsn_delay=1000, max_delivertime=86400) as bench:
        bench.peer.answers["RCPT", "c@d.test"] = ["450 4.2.0 busy"] * 3
        bench.peer.answers["RCPT", "e@d.test"] = ["450 4.2.0 busy"] * 2
        bench.send(**received(dsn={"notify": "DELAY"}), body=BODY)
        bench.send("e@d.test", **received(dsn={"notify": "FAILURE"}), body=BODY)
        await bench.results("retry", 2)
        await bench.pass_time(601)
        await bench.queues.until(lambda queues: len(queues["retry"]) == 4)
        assert bench.queues["dsn"] == []
        await bench.pass_time(601)
        (report,) = await reports(bench)
        found = fields(report)
        assert (found["Action"], found["Status"]) == ("delayed", "4.2.0")
        assert found["Final-Recipient"] == "rfc822; c@d.test"
        assert found["Will-Retry-Until"] == "Fri, 2 Jan 2026 12:00:00 +0000"
        await bench.pass_time(601)
        await bench.queues.until(lambda queues: len(mails(bench)) == 2 and not queues.leased)
        assert len(bench.queues["dsn"]) == 1
        done = {message.recipient: message.properties for message in bench.queues["success"]}
        assert done["c@d.test"]["dsn-delayed"] == "2026-01-01 12:20:02"
        assert "dsn-delayed" not in done["e@d.test"]


@pytest.mark.parametrize("size", [10, 200_000])
async def test_the_report_of_a_delay_leaves_the_mail_whole(size: int) -> None:
    """A body that is loaded for the report belongs to the retry too."""
    async with open_bench(rabbitmq_dsn="dsn", dsn_delay=1) as bench:
        bench.peer.answers["RCPT", ""] = ["450 4.2.0 busy"] * 2
        bench.send(**received(dsn={"notify": "DELAY"}), body=BODY + "x" * size + "\r\n")
        await bench.retried()
        await bench.pass_time(601)
        (report,) = await reports(bench)
        assert fields(report)["Action"] == "delayed"
        await bench.pass_time(601)
        await bench.queues.until(lambda queues: bool(mails(bench)) and not queues.leased)
        assert mails(bench)[0].body == (BODY + "x" * size + "\r\n").encode()


async def test_recipients_of_one_mail_that_fail_in_one_batch_share_a_report() -> None:
    async with open_bench(rabbitmq_dsn="dsn") as bench:
        bench.peer.answers["RCPT", ""] = ["550 no"] * 30
        bench.queues.may_ack = trio.Event()
        bench.send("first@d.test", **received(), body=BODY)
        await bench.queues.until(lambda queues: len(queues.leased) == 1)
        for number in range(20):
            bench.send(f"c{number}@d.test", **received(), body=BODY)
        await bench.until(lambda figures: figures["failed"] == 21)
        bench.queues.may_ack.set()
        await bench.queues.until(lambda queues: not queues.leased)
        assert sorted(told(bench)) == sorted(["first@d.test"] + [f"c{n}@d.test" for n in range(20)])
        assert len(bench.queues["dsn"]) < 12, "most of them were settled together"


async def test_the_report_is_in_the_commit_of_the_failure() -> None:
    commits: list[list[tuple[str, ...]]] = []

    def note(settlement: Settlement) -> None:
        commits.append([tuple(each.queue for each in settlement.others)])

    async with open_bench(rabbitmq_dsn="dsn") as bench:
        bench.queues.object_to = note  # type: ignore[assignment]
        bench.peer.answers["RCPT", ""] = ["550 no"]
        bench.send(**received(), body=BODY)
        await reports(bench)
    assert commits == [[("dsn",)]]


async def test_a_disk_that_is_full_loses_no_report_and_doubles_none() -> None:
    async with open_bench(rabbitmq_dsn="dsn") as bench:
        bench.queues.failures = 2
        bench.peer.answers["RCPT", ""] = ["550 no"]
        bench.send(**received(), body=BODY)
        await reports(bench)


async def test_a_report_that_no_queue_takes_does_not_keep_its_message() -> None:
    async with open_bench(rabbitmq_dsn="dsn") as bench:
        bench.queues.impossible = {"dsn"}
        bench.peer.answers["RCPT", ""] = ["550 no"]
        bench.send(**received(), body=BODY)
        await bench.results("failure")
        assert bench.queues["dsn"] == []
        assert bench.queues["outbox"] == []


async def test_a_message_that_is_gone_takes_the_reports_of_others_with_it_into_no_grave() -> None:
    """The lease of the first of several is over when the batch is committed."""
    gone: list[int] = []

    def object_to(settlement: Settlement) -> Exception | None:
        if settlement.lease.message.recipient == "first@d.test":
            gone.append(settlement.lease.id)
            return ValueError("the lease is over")
        return None

    async with open_bench(rabbitmq_dsn="dsn") as bench:
        bench.peer.answers["RCPT", ""] = ["550 no"] * 3
        bench.queues.may_ack = trio.Event()
        bench.send("zero@d.test", **received(), body="Subject: zero\r\n\r\n")
        bench.send("one@d.test", **received(), body="Subject: one\r\n\r\n")
        await bench.until(lambda figures: figures["failed"] == 2)
        bench.peer.answers["RCPT", ""] = ["550 no"] * 3
        bench.send("first@d.test", **received(), body=BODY)
        bench.send("second@d.test", **received(), body=BODY)
        await bench.until(lambda figures: figures["failed"] == 4)
        bench.queues.object_to = object_to
        bench.queues.may_ack.set()
        await bench.queues.until(
            lambda queues: any(b"second@d.test" in (each.body or b"") for each in queues["dsn"])
        )
        bench.queues.leased.clear()
    assert gone


async def test_a_report_that_fails_ends_or_goes_to_one_address() -> None:
    async with open_bench() as bench:
        bench.peer.answers["RCPT", ""] = ["550 no"] * 2
        bench.send(**received(), body=BODY)
        await bench.results("failure", 2)
        assert mails(bench) == []
        assert bench.dispatcher.statistics()["reports"] == 1
    async with open_bench(dsn_double_bounce="post@me.test") as bench:
        bench.peer.answers["RCPT", ""] = ["550 no"] * 3
        bench.send(**received(), body=BODY)
        await bench.results("failure", 3)
        assert mails(bench) == []
        told = [message.recipient for message in bench.queues["failure"]]
        assert told == ["c@d.test", "a@b.test", "post@me.test"]


async def test_a_null_sender_gets_nothing() -> None:
    async with open_bench() as bench:
        bench.peer.answers["RCPT", ""] = ["550 no"]
        bench.send(**received(envelope="", dsn={"notify": "FAILURE"}), body=BODY)
        await bench.results("failure")
        assert bench.dispatcher.statistics()["reports"] == 0
        assert bench.queues["outbox"] == []


async def test_the_mail_that_was_made_is_the_one_that_comes_back() -> None:
    async with open_bench(rabbitmq_dsn="dsn") as bench:
        bench.peer.answers[".", ""] = ["550 no"]
        body = "Message-ID: <t@b.test>\r\nSubject: Hi {$name}\r\n\r\nhello\r\n"
        bench.send(**received(data={"name": "Ann"}), body=body)
        (report,) = await reports(bench)
        assert parsed(report)["Subject"] == "Undelivered mail: Hi Ann"


async def test_a_whole_mail_comes_back_if_wanted() -> None:
    async with open_bench(rabbitmq_dsn="dsn") as bench:
        bench.peer.answers["RCPT", ""] = ["550 no"] * 2
        large = BODY + "x\r\n" * 10_000
        bench.send(**received(dsn={"ret": "FULL"}), body=large)
        (report,) = await reports(bench)
        assert report.body is not None
        assert large.encode() in report.body
        bench.send(**received(dsn={"ret": "FULL"}), body=BODY + "x\r\n" * 100_000)
        _, report = await reports(bench, 2)
        assert len(report.body or b"") < 3000


async def test_a_suppressed_recipient_and_a_forced_error_are_reported() -> None:
    async with open_bench(rabbitmq_dsn="dsn") as bench:
        bench.dispatcher.stops.change(suppress("c@d.test"))
        bench.send(**received(), body=BODY)
        (report,) = await reports(bench)
        assert fields(report)["Diagnostic-Code"] == "X-mailerq; 550 5.7.1 complained"
        bench.dispatcher.stops.change(Rows([error(code=554, description="not now")]))
        bench.send("e@d.test", **received(), body=BODY)
        _, report = await reports(bench, 2)
        assert fields(report)["Diagnostic-Code"] == "X-mailerq; 554 not now"


async def test_mail_goes_out_with_a_return_address_of_its_own(tmp_path: Path) -> None:
    keys = verp.parse_keys("a AeJ2xBrJJPd1vlTV7pVf3OlB")
    async with open_bench(
        verp_key_file=str(tmp_path / "keys"), verp_domains=("list.test",)
    ) as bench:
        bench.dispatcher.reload(None, reroute=False, reports=Reports(verp_keys=keys))
        bench.send(envelope="news@List.test", body=BODY)
        bench.send("e@d.test", body=BODY)
        bench.send("f@d.test", envelope="news@list.test", verp=False, body=BODY)
        bench.send("g@d.test", verp=True, body=BODY)
        bench.send("h@d.test", verp="bounce@list.test", body=BODY)
        bench.send("i@d.test", envelope="", verp="bounce@list.test", body=BODY)
        bench.send("j@d.test", verp="no address", body=BODY)
        await bench.results("success", 7)
        sent = {mail.recipient: mail.envelope for mail in mails(bench)}

        def base(recipient: str) -> str:
            found = verp.verify(sent[recipient], keys, now=NOW, max_age=86400)
            assert isinstance(found, verp.Return)
            assert found.recipient == recipient
            return found.base

        assert base("c@d.test") == "news@List.test"
        assert sent["e@d.test"] == "a@b.test"
        assert sent["f@d.test"] == "news@list.test"
        assert base("g@d.test") == "a@b.test"
        assert base("h@d.test") == "bounce@list.test"
        assert sent["i@d.test"] == ""
        assert base("j@d.test") == "a@b.test"
        envelopes = {message.recipient: message.envelope for message in bench.queues["success"]}
        assert envelopes["c@d.test"] == "news@List.test"
