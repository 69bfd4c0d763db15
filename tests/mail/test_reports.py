"""Reports are recognised and read: those of standards, those of real servers, and hostile ones."""

from __future__ import annotations

import gzip
import json
from base64 import b64encode
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.mail import report_parts, tls_reports
from mailerq.mail.fields import clean
from mailerq.mail.report_parts import SCAN_BYTES, entities
from mailerq.mail.reports import (
    MAX_RECIPIENTS,
    TYPES,
    Recognised,
    is_candidate,
    recognise,
)
from tests.mail import report_samples as samples
from tests.mail import report_shapes as shapes
from tests.support import least_seconds

SENDER = "somebody@example.org"

SECONDS = 0.25
"""More than the longest work on any mail takes here; what a thread does may take a moment."""


def read(mail: bytes, sender: str = "") -> dict[str, Any]:
    found = recognise(mail, sender)
    assert found is not None
    assert is_candidate(mail, sender)
    value = found.report.to_dict()
    assert value["type"] in TYPES
    assert json.loads(json.dumps(value)) == value
    return value


def part(value: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value.get(name) for name in names}


# Delivery status


def test_a_delivery_status_is_read() -> None:
    assert read(samples.DSN) == {
        "type": "delivery-status",
        "action": "failed",
        "status": "4.0.0",
        "code": 426,
        "recipient": "louisl@larry.slip.umd.edu",
        "original-recipient": "louisl@larry.slip.umd.edu",
        "diagnostic": "426 connection timed out",
        "last-attempt": "1994-07-07 21:15:49",
        "reporting-mta": "cs.utk.edu",
    }


def test_a_delivery_status_about_several_names_the_gravest_first() -> None:
    value = read(samples.DSN_OF_SEVERAL)
    assert value["recipient-count"] == 3
    assert [(each["recipient"], each["action"]) for each in value["recipients"]] == [
        ("arathib@vnet.ibm.com", "failed"),
        ("wsnell@sdcc13.ucsd.edu", "failed"),
        ("johnh@hpnjld.njd.hp.com", "delayed"),
    ]
    assert part(value, "action", "recipient", "remote-mta") == {
        "action": "failed", "recipient": "arathib@vnet.ibm.com", "remote-mta": "vnet.ibm.com",
    }  # fmt: skip


def test_a_recipient_of_another_mail_system_is_named() -> None:
    value = read(samples.DSN_OF_GATEWAY)
    assert part(value, "recipient", "status", "reporting-mta") == {
        "recipient": "nair_s", "status": "5.0.0", "reporting-mta": "SYS30",
    }  # fmt: skip


def test_a_delay_is_read() -> None:
    value = read(samples.DSN_DELAYED, "postmaster@nsfnet-relay.ac.uk")
    assert part(value, "action", "status") == {"action": "delayed", "status": "4.0.0"}


def test_an_international_delivery_status_is_read() -> None:
    value = read(samples.DSN_UTF8)
    assert part(value, "recipient", "original-recipient") == {
        "recipient": "bücher@example.org", "original-recipient": "bücher@example.org",
    }  # fmt: skip
    assert value["original"] == {"message-id": "<größe@b.test>"}


def test_all_fields_of_a_delivery_status_are_read() -> None:
    value = read(shapes.POSTFIX)
    assert value == {
        "type": "delivery-status",
        "action": "failed",
        "status": "5.1.1",
        "code": 550,
        "recipient": "ann@example.org",
        "original-recipient": "Ann@example.org",
        "diagnostic": "550 5.1.1 <ann@example.org>: Recipient address rejected: User unknown",
        "remote-mta": "mail.example.org",
        "reporting-mta": "mx.example.org",
        "arrival": "2025-06-16 08:00:04",
        "envid": "campaign-77",
        "original": {
            "message-id": "<77.ann@list.test>",
            "subject": "Grüße",
            "from": "News <news@list.test>",
            "to": "Ann@example.org",
            "date": "Mon, 16 Jun 2025 08:00:00 +0000",
        },
    }
    fields = samples.mail("""
Content-Type: multipart/report; boundary=b; report-type=delivery-status

--b
Content-Type: message/delivery-status

Reporting-MTA: dns; mx.test
Received-From-MTA: dns; mq.test

Final-Recipient: rfc822; <ann@example.org>
Action: delayed
Status: 4.4.1
Will-Retry-Until: Tue, 17 Jun 2025 10:00:00 +0200
Final-Log-ID: 4711
--b--
""")
    value = read(fields)
    assert part(value, "received-from-mta", "retry-until", "log-id", "recipient") == {
        "received-from-mta": "mq.test",
        "retry-until": "2025-06-17 08:00:00",
        "log-id": "4711",
        "recipient": "ann@example.org",
    }


@pytest.mark.parametrize("name", ["EXCHANGE", "GMAIL"])
def test_a_report_with_a_nested_text_is_read(name: str) -> None:
    value = read(samples.ALL[name])
    assert part(value, "type", "action", "code") == {
        "type": "delivery-status", "action": "failed", "code": 550,
    }  # fmt: skip
    assert value["status"] == {"EXCHANGE": "5.1.10", "GMAIL": "5.1.1"}[name]
    assert value["original"]["message-id"].endswith("@list.test>")


def changed(mail: bytes, *pairs: tuple[bytes, bytes]) -> bytes:
    for old, new in pairs:
        assert old in mail
        mail = mail.replace(old, new)
    return mail


STATUS_PART = b"content-type: message/delivery-status\r\n"
FIELDS = samples.DSN.partition(STATUS_PART)[2][2:].partition(b"\r\n--RAA")[0]


@pytest.mark.parametrize(
    "mail",
    [
        changed(samples.DSN, (b" report-type=delivery-status;", b"")),
        changed(samples.DSN, (b"report-type=delivery-status", b"report-type=feedback-report")),
        changed(samples.DSN, (b"multipart/report", b"multipart/mixed")),
        changed(samples.DSN, (b"message/delivery-status", b"text/plain")),
        changed(samples.DSN, (b"report-type=", b"report-type*=us-ascii''")),
        changed(samples.DSN, (b"\r\n", b"\n")),
        changed(samples.DSN, (b"\r\n", b"\r")),
        samples.DSN.partition(b"--RAA14128.773615765/CS.UTK.EDU--")[0],
        changed(
            samples.DSN,
            (STATUS_PART, STATUS_PART + b"Content-Transfer-Encoding: base64\r\n"),
            (FIELDS, b64encode(FIELDS)),
        ),
        changed(
            samples.DSN,
            (STATUS_PART, STATUS_PART + b"Content-Transfer-Encoding: quoted-printable\r\n"),
            (FIELDS, FIELDS.replace(b"rfc822;l", b"rfc822;=6C")),
        ),
        changed(samples.DSN, (b"cs.utk.edu\r\n\r\n", b"cs.utk.edu\r\n")),
        changed(samples.DSN, (b"cs.utk.edu\r\n\r\n", b"cs.utk.edu\r\n\r\n\r\n\r\n")),
        b"Content-Type: multipart/mixed; boundary=outer\r\n\r\n--outer\r\n" + samples.DSN,
        b"Content-Type: message/delivery-status\r\n\r\n" + FIELDS,
    ],
    ids=[
        "no report-type", "a wrong report-type", "multipart/mixed", "text/plain", "RFC 2231",
        "LF", "CR", "cut off", "base64", "quoted-printable", "no empty line", "empty lines",
        "wrapped", "one part",
    ],
)  # fmt: skip
def test_a_report_with_mistakes_is_read(mail: bytes) -> None:
    value = read(mail)
    assert part(value, "type", "action", "recipient", "code") == {
        "type": "delivery-status",
        "action": "failed",
        "recipient": "louisl@larry.slip.umd.edu",
        "code": 426,
    }


@pytest.mark.parametrize(
    ("text", "action"),
    [("2.1.5", "delivered"), ("4.2.2", "delayed"), ("5.2.2", "failed"), ("none", None)],
)
def test_a_report_without_an_action_says_what_its_status_says(text: str, action: str) -> None:
    mail = changed(
        samples.DSN,
        (b"Action: failed\r\n", b""),
        (b"4.0.0", text.encode()),
        (b"smtp; 426 connection timed out", b"x; none"),
    )
    assert read(mail).get("action") == action


def test_a_report_about_very_many_recipients_names_some_and_counts_all() -> None:
    one = b"Final-Recipient: rfc822; %d@example.org\r\nAction: failed\r\nStatus: 5.1.1\r\n\r\n"
    mail = changed(samples.DSN, (FIELDS, b"A: b\r\n\r\n" + b"".join(one % n for n in range(2500))))
    value = read(mail)
    assert len(value["recipients"]) == MAX_RECIPIENTS
    assert value["recipient-count"] == 2500


# Complaints


def test_a_complaint_is_read() -> None:
    value = read(samples.COMPLAINT, "abusedesk@example.com")
    assert value == {
        "type": "complaint",
        "feedback-type": "abuse",
        "user-agent": "SomeGenerator/1.0",
        "source-ip": "192.0.2.1",
        "original-sender": "somespammer@example.net",
        "recipient": "user@example.com",
        "reported-domain": "example.net",
        "reporting-mta": "mail.example.com",
        "arrival": "2005-03-08 18:00:00",
        "original": {
            "message-id": "8787KJKJ3K4J3K4J3K4J3.mail@example.net",
            "from": "<somespammer@example.net>",
            "to": "<Undisclosed Recipients>",
            "subject": "Earn money",
            "date": "Thu, 02 Sep 2004 12:31:03 -0500",
        },
    }


def test_an_authentication_failure_is_read() -> None:
    value = read(samples.AUTH_FAILURE, SENDER)
    assert part(value, "type", "feedback-type", "auth-failure", "envid") == {
        "type": "complaint",
        "feedback-type": "auth-failure",
        "auth-failure": "bodyhash",
        "envid": "o3F52gxO029144",
    }


@pytest.mark.parametrize("name", ["YAHOO_COMPLAINT", "JMRP"])
def test_complaints_of_large_providers_are_read(name: str) -> None:
    value = read(samples.ALL[name], SENDER)
    assert part(value, "type", "feedback-type", "source-ip") == {
        "type": "complaint", "feedback-type": "abuse", "source-ip": "192.0.2.1",
    }  # fmt: skip
    assert value["recipient"] in ("jo@yahoo.example", "kim@hotmail.example")
    assert value["original"]["message-id"] in ("<83.jo@list.test>", "<84.kim@list.test>")


# Others


def test_a_disposition_is_read() -> None:
    assert read(samples.DISPOSITION, SENDER) == {
        "type": "disposition",
        "disposition": "displayed",
        "mode": "manual-action/mdn-sent-manually",
        "recipient": "Joe_Recipient@example.com",
        "original-recipient": "Joe_Recipient@example.com",
        "user-agent": "joes-pc.cs.example.com; Foomail 97.1",
        "original": {"message-id": "<199509192301.23456@example.org>"},
    }
    failed = changed(samples.DISPOSITION, (b"; displayed", b"; processed/error\r\nError: no room"))
    assert part(read(failed), "disposition", "error") == {
        "disposition": "processed", "error": "no room",
    }  # fmt: skip


def test_a_tls_report_is_read() -> None:
    value = read(samples.tls_mail(), SENDER)["tls"]
    assert part(value, "organization", "begin", "end", "successful", "failed") == {
        "organization": "Company-X",
        "begin": "2016-04-01 00:00:00",
        "end": "2016-04-01 23:59:59",
        "successful": 5326,
        "failed": 303,
    }
    (policy,) = value["policies"]
    assert part(policy, "type", "domain", "failed") == {
        "type": "sts", "domain": "company-y.example", "failed": 303,
    }  # fmt: skip
    assert [(each["result-type"], each["sessions"]) for each in policy["failures"]] == [
        ("certificate-expired", 100),
        ("starttls-not-supported", 200),
        ("validation-failure", 3),
    ]


def test_a_tls_report_may_come_without_gzip() -> None:
    mail = b"Content-Type: application/tlsrpt+json\r\n\r\n" + json.dumps(samples.TLS).encode()
    assert read(mail, SENDER)["tls"]["failed"] == 303


@pytest.mark.parametrize("kind", [b"application/gzip", b"application/octet-stream"])
def test_a_tls_report_may_come_with_another_type(kind: bytes) -> None:
    mail = changed(
        samples.tls_mail(), (b"application/tlsrpt+gzip", kind), (b'"tlsrpt"', b'"something"')
    )
    assert read(mail, SENDER)["tls"]["failed"] == 303


@pytest.mark.parametrize(
    ("mail", "problem"),
    [
        (samples.tls_mail(packed=gzip.compress(bytes(50 << 20))), "bytes become more than"),
        (samples.tls_mail(packed=gzip.compress(b"x" * 70_000)), "bytes become more than"),
        (samples.tls_mail(packed=b"nothing"), "cannot be decompressed"),
        (samples.tls_mail(packed=gzip.compress(b"{}")[:-9]), "is cut off"),
        (samples.tls_mail(packed=gzip.compress(b"[1")), "not what RFC 8460 says"),
        (samples.tls_mail(packed=gzip.compress(b"\xff")), "not what RFC 8460 says"),
        (samples.tls_mail(packed=gzip.compress(50_000 * b"[")), "not what RFC 8460 says"),
        (samples.tls_mail([]), "not what RFC 8460 says"),
        (samples.tls_mail({"policies": 7}), "not what RFC 8460 says"),
        (
            b"Content-Type: application/tlsrpt+json\r\n\r\n" + b" " * (1 << 20) + b"{}",
            "has more than 524288 bytes",
        ),
    ],
)
def test_a_tls_report_that_cannot_be_read_is_still_a_report(mail: bytes, problem: str) -> None:
    value = read(mail, SENDER)
    assert value["type"] == "tls"
    assert problem in value["problem"]


def test_a_tls_report_with_very_much_is_cut() -> None:
    detail = {"result-type": 2000 * "x", "failed-session-count": -5}
    one = {"policy": {"policy-domain": "\x1b[2J\n"}, "failure-details": 60 * [detail]}
    big = {"total-successful-session-count": 1 << 62}
    document = {"policies": 60 * [{**one, "summary": big}]}
    mail = b"Content-Type: application/tlsrpt+json\r\n\r\n" + json.dumps(document).encode()
    shown = mail.replace(2000 * b"x", 90 * b"x")
    value = read(shown, SENDER)["tls"]
    assert len(value["policies"]) == tls_reports.MAX_POLICIES
    assert value["policy-count"] == 60
    policy = value["policies"][0]
    assert policy["domain"] == "[2J"
    assert len(policy["failures"]) == tls_reports.MAX_FAILURES
    assert len(policy["failures"][0]["result-type"]) == 80
    assert (policy["failures"][0]["sessions"], value["successful"]) == (0, 1 << 53)


@pytest.mark.parametrize("name", ["DMARC", "DMARC_CONTINUED"])
def test_an_aggregate_report_is_recognised_by_its_name(name: str) -> None:
    value = read(samples.ALL[name], SENDER)
    assert value["type"] == "dmarc"
    assert part(value["dmarc"], "domain", "submitter", "begin", "end") == {
        "domain": "list.test",
        "submitter": "provider.test",
        "begin": 1750000000,
        "end": 1750086399,
    }


@pytest.mark.parametrize("name", ["OUT_OF_OFFICE", "VACATION"])
def test_an_automatic_reply_is_recognised(name: str) -> None:
    for sender in ("", SENDER):
        assert read(samples.ALL[name], sender)["type"] == "auto-reply"


@pytest.mark.parametrize(
    "field",
    [
        b"Auto-Submitted: auto-replied; owner-email=\"a@b.test\"",
        b"X-Autoreply: yes",
        b"X-Autorespond: Away",
        b"Precedence: auto_reply",
    ],
)  # fmt: skip
def test_marks_of_automatic_replies_are_known(field: bytes) -> None:
    mail = b"Subject: x\r\n" + field + b"\r\n\r\nhi"
    assert read(mail, SENDER)["type"] == "auto-reply"


# Bounces in no standard form


@pytest.mark.parametrize(
    ("name", "action", "recipient", "status", "message_id"),
    [
        ("QMAIL", "failed", "eve@example.net", "5.1.1", "<81.eve@list.test>"),
        ("EXIM", "failed", "dora@example.org", "5.2.1", "<80.dora@list.test>"),
        ("EXIM_DELAYED", "delayed", "dora@example.org", None, None),
        ("EXCHANGE_OLD", "failed", "gus@example.net", "5.1.1", None),
        ("SENDMAIL_OLD", "failed", "hal@example.net", "5.3.0", None),
        ("GMAIL_OLD", "failed", "ida@example.net", "5.7.1", "<82.ida@list.test>"),
    ],
)
def test_a_bounce_in_no_standard_form_is_read(
    name: str, action: str, recipient: str, status: str | None, message_id: str | None
) -> None:
    for sender in ("", "mailer-daemon@mx.example.net"):
        value = read(samples.ALL[name], sender)
        assert part(value, "type", "action", "recipient", "status") == {
            "type": "bounce", "action": action, "recipient": recipient, "status": status,
        }  # fmt: skip
        assert value.get("original", {}).get("message-id") == message_id


def test_a_bounce_about_two_names_both() -> None:
    value = read(shapes.QMAIL)
    assert [(each["recipient"], each["status"]) for each in value["recipients"]] == [
        ("eve@example.net", "5.1.1"),
        ("finn@example.net", "5.1.1"),
    ]


def text_bounce(text: str, kind: str = "plain") -> bytes:
    head = (
        f"From: MAILER-DAEMON@mx.test\nContent-Type: text/{kind}\nSubject: Undeliverable mail\n\n"
    )
    return samples.mail(head + text)


@pytest.mark.parametrize(
    ("text", "recipient"),
    [
        ("Failed recipient: ann@example.org\nReason: over quota\n", "ann@example.org"),
        (
            "Unknown user: ann@example.org\n\nOriginal message follows.\n\nb@c.test",
            "ann@example.org",
        ),
        ("The following could not be reached:\n\n  * ann@example.org\n", "ann@example.org"),
        ("It could not be delivered:\n\n> ann@example.org\n", "ann@example.org"),
        ("It was not delivered to\n\n ann@example.org ... unknown host\n", "ann@example.org"),
        (
            'Mail for "ann@example.org" has been postponed. Ask postmaster@mx.test.',
            "ann@example.org",
        ),
        ("Undeliverable. Ask postmaster@mx.test about ann@example.org.", "ann@example.org"),
        (
            "From: b@c.test\nTo: b@c.test\ndid not reach\n\nann@example.org; at 12:00",
            "ann@example.org",
        ),
        ("The mailbox could not be reached.", None),
    ],
)
def test_the_recipient_is_found_in_texts(text: str, recipient: str | None) -> None:
    assert read(text_bounce(text)).get("recipient") == recipient


def test_a_text_in_html_is_read() -> None:
    text = "<p>We could not deliver to:</p><br>ann@example.org<br>550 5.1.1 n&#111;ne</p>"
    assert part(read(text_bounce(text, "html")), "recipient", "status", "action") == {
        "recipient": "ann@example.org", "status": "5.1.1", "action": "failed",
    }  # fmt: skip


def test_the_text_tells_what_a_silent_delivery_status_does_not() -> None:
    mail = changed(samples.DSN, (FIELDS, b"Reporting-MTA: dns; cs.utk.edu\r\n"))
    assert part(read(mail), "type", "recipient", "reporting-mta") == {
        "type": "delivery-status",
        "recipient": "louisl@larry.slip.umd.edu",
        "reporting-mta": "cs.utk.edu",
    }


@pytest.mark.parametrize("name", ["QMAIL", "EXIM", "EXCHANGE_OLD", "SENDMAIL_OLD", "GMAIL_OLD"])
def test_a_forwarded_text_of_a_bounce_is_no_bounce(name: str) -> None:
    text = samples.ALL[name].partition(b"\r\n\r\n")[2]
    assert recognise(b"From: Ann <ann@example.org>\r\nSubject: look\r\n\r\n" + text, SENDER) is None


# What is none


ORDINARY = [
    b"",
    b"\r\n",
    b"Subject: x\r\n\r\nhi",
    b"hello",
    b"Subject: Delivery failure\r\nFrom: ann@example.org\r\n\r\nThe parcel could not be delivered.",
    b"Auto-Submitted: no\r\n\r\nhi",
    b"From: cron@host.test\r\nAuto-Submitted: auto-generated\r\n\r\ndone",
    b"Precedence: bulk\r\nList-Id: <x.list.test>\r\n\r\nhi",
    b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n"
    b"Content-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; x\r\n--b--\r\n",
    b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: message/rfc822\r\n\r\n"
    + shapes.POSTFIX
    + b"\r\n--b--\r\n",
    b"Content-Type: multipart/report; boundary=b\r\n\r\n--b\r\n\r\nhi\r\n--b--\r\n",
    b"Content-Type: multipart/report; report-type=delivery-status; boundary=b\r\n\r\n--b--\r\n",
]


@pytest.mark.parametrize("mail", ORDINARY)
def test_other_mail_is_no_report(mail: bytes) -> None:
    assert recognise(mail, SENDER) is None


def test_nearly_all_other_mail_is_known_by_its_header() -> None:
    assert [mail for mail in ORDINARY[:-2] if is_candidate(mail, SENDER)] == []


@pytest.mark.parametrize(
    ("mail", "mark"),
    [
        (b"", "null-sender"),
        (b"Subject: x\r\n\r\nhi", "null-sender"),
        (b"Precedence: bulk\r\n\r\nhi", "null-sender"),
        (b"Auto-Submitted: auto-generated\r\n\r\nhi", "auto-generated"),
        (b"Auto-Submitted: auto-replied\r\n\r\nhi", "auto-replied"),
        (b"Auto-Submitted: No\r\n\r\nhi", None),
        # reports that cannot be read
        *((mail, None) for mail in ORDINARY[-2:]),
    ],
)
def test_mail_of_the_null_sender_that_is_no_report_is_an_automatic_reply(
    mail: bytes, mark: str | None
) -> None:
    assert is_candidate(mail, "")
    found = recognise(mail, "")
    if mark is None:
        assert found is None
        return
    assert found is not None
    assert (found.report.type, found.report.auto_submitted) == ("auto-reply", mark)
    assert found.is_guess is (mark == "null-sender")


def test_a_report_about_a_report_is_about_the_outer_one() -> None:
    outer = changed(
        samples.DSN, (b"[original message goes here]", samples.COMPLAINT[: len(samples.COMPLAINT)])
    )
    assert read(outer)["type"] == "delivery-status"


# Hostile ones


def deep(levels: int) -> bytes:
    return b"".join(
        b"Content-Type: multipart/report; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n)
        for n in range(levels)
    )


HOSTILE: dict[str, bytes] = {
    "10,000 parts": b"Content-Type: multipart/report; boundary=b\r\n\r\n"
    + 10_000 * b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n",
    "depth 1,000": deep(1000),
    "the same boundary at all depths": 1000
    * b"Content-Type: multipart/report; boundary=b\r\n\r\n--b\r\n",
    "boundaries that nearly match": b"Content-Type: multipart/report; boundary="
    + 150 * b"-"
    + b"b\r\n\r\n"
    + 6000 * (b"\r\n" + 151 * b"-"),
    "a header of 900 kB": b"Content-Type: multipart/report\r\n" + 300_000 * b"a:\r\n" + b"\r\nhi",
    "a folded field": b"Content-Type: multipart/report;" + 300_000 * b"\r\n x" + b"\r\n\r\nhi",
    "parameters": b"Content-Type: multipart/report" + 200_000 * b"; a=b" + b"\r\n\r\nhi",
    "parameters in parts": b"Content-Type: multipart/report"
    + b"".join(b"; boundary*%d*=%%41" % n for n in range(3000))
    + b"\r\n\r\nhi",
    "groups": b"Content-Type: message/delivery-status\r\n\r\n"
    + 100_000 * b"Action: failed\r\n\r\n",
    "fields": b"Content-Type: message/delivery-status\r\n\r\n" + 300_000 * b"a: b\r\n",
    "a long field": b"Content-Type: message/delivery-status\r\n\r\nStatus: " + 900_000 * b"5.",
    "a long diagnostic": b"Content-Type: message/delivery-status\r\n\r\nAction: failed\r\n"
    b"Final-Recipient: " + 100_000 * b"<a@" + b"\r\nDiagnostic-Code: " + 300_000 * b"x@",
    "encoded words": b"Auto-Submitted: auto-replied\r\nSubject: " + 9000 * b"=?utf-8?q?=41?= ",
    "a text of addresses": b"Subject: failure notice\r\n\r\nunable to deliver\r\n"
    + 40_000 * b"<a@b.test>:\r\n",
    "a text of hyphens": b"Subject: failure notice\r\n\r\nunable to deliver\r\n"
    + 200_000 * b"-"
    + 20_000 * b"\r\n--- ",
    "a text without lines": b"Subject: failure notice\r\n\r\nunable to deliver " + 900_000 * b"a@",
    "HTML": b"Subject: failure notice\r\nContent-Type: text/html\r\n\r\n" + 300_000 * b"<br<",
    "entities": b"Subject: failure notice\r\nContent-Type: text/html\r\n\r\n" + 300_000 * b"&#1;&",
    "prefixes": b"Subject: failure notice\r\n\r\nunable to deliver\r\n"
    + 30_000 * b"to a: a@b \r\n",
    "base64 that is none": b"Content-Type: message/delivery-status\r\n"
    b"Content-Transfer-Encoding: base64\r\n\r\n" + 300_000 * b"=A\xff",
    "quoted-printable": b"Content-Type: message/delivery-status\r\n"
    b"Content-Transfer-Encoding: quoted-printable\r\n\r\n" + 300_000 * b"=0",
    "policies": b"Content-Type: application/tlsrpt+json\r\n\r\n{\"policies\":["
    + 300_000 * b"{}," + b"{}]}",
    "80 MB": b"Content-Type: multipart/report; boundary=b\r\n\r\n" + (80 << 20) * b"x",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_report_that_was_made_to_be_slow_is_read_in_time(name: str) -> None:
    mail = HOSTILE[name]
    for sender in ("", SENDER):
        looked = least_seconds(partial(is_candidate, mail, sender))
        assert looked < SECONDS / 5
        assert looked + least_seconds(partial(recognise, mail, sender)) < SECONDS


@pytest.mark.parametrize("name", HOSTILE)
def test_a_report_that_was_made_to_be_large_becomes_a_small_object(name: str) -> None:
    found = recognise(HOSTILE[name], "")
    if found is not None:
        assert len(json.dumps(found.report.to_dict())) < 500_000


def test_no_more_parts_and_levels_are_taken_apart_than_allowed() -> None:
    assert len(list(entities(HOSTILE["10,000 parts"]))) == report_parts.MAX_PARTS + 1
    assert len(list(entities(deep(1000)))) == report_parts.MAX_DEPTH + 1


def test_what_is_beyond_the_first_megabyte_is_not_looked_at() -> None:
    head, boundary, rest = samples.DSN.partition(b"--RAA14128.773615765/CS.UTK.EDU\r\n")
    assert recognise(head + SCAN_BYTES * b"x" + b"\r\n" + boundary + rest, SENDER) is None


WORDS = [
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"--b",
    b"--b\r\n",
    b"--b--",
    b" ",
    b":",
    b";",
    b"\xff",
    b"<",
    b">",
    b"Content-Type: multipart/report; boundary=b\r\n",
    b"Content-Type: multipart/mixed; boundary=b\r\n",
    b"Content-Type: message/delivery-status\r\n",
    b"Content-Type: message/feedback-report\r\n",
    b"Content-Type: application/tlsrpt+gzip\r\n",
    b"Content-Type: message/rfc822\r\n",
    b"Content-Type: message/disposition-notification\r\n",
    b"Content-Transfer-Encoding: base64\r\n",
    b"Content-Transfer-Encoding: quoted-printable\r\n",
    b"Final-Recipient: rfc822; a@b.test\r\n",
    b"Action: failed\r\n",
    b"Status: 5.1.1\r\n",
    b"Diagnostic-Code: smtp; 550 no\r\n",
    b"Arrival-Date: 31 Feb 99999 25:61 +9999\r\n",
    b"Feedback-Type: abuse\r\n",
    b"Incidents: -1\r\n",
    b"Disposition: a;b/c\r\n",
    b"Subject: failure notice\r\n",
    b"Subject: Report Domain: a Submitter: b\r\n",
    b"unable to deliver\r\n",
    b"<a@b.test>:\r\n",
    b"Auto-Submitted: auto-replied\r\n",
    b"; name*0*=x''%41",
    b"Subject: complaint about message from 192.0.2.1\r\n",
    b"utf-8; \\x{D800}\\x{110000}",
    gzip.compress(b"{}"),
]

mails = st.lists(st.sampled_from(WORDS) | st.binary(max_size=8), max_size=40).map(b"".join)


def test_a_mail_whose_first_line_is_no_field_has_no_header() -> None:
    mail = b"--b\r\nContent-Type: application/tlsrpt+gzip\r\n\r\n"
    assert recognise(mail, SENDER) is None
    assert not is_candidate(mail, SENDER)


@given(mails | st.binary(max_size=400), st.sampled_from(["", SENDER, "mailer-daemon@x.test"]))
def test_whatever_a_mail_holds_it_is_read(mail: bytes, sender: str) -> None:
    found = recognise(mail, sender)
    assert recognise(memoryview(mail), sender) == found
    if found is not None:
        assert is_candidate(mail, sender)
        text = json.dumps(found.report.to_dict(), ensure_ascii=False)
        assert clean(text) == text
        assert text.encode()


@given(st.sampled_from(sorted(samples.ALL)), st.data())
def test_a_report_that_is_cut_or_changed_anywhere_is_read(name: str, data: st.DataObject) -> None:
    mail = samples.ALL[name]
    at = data.draw(st.integers(0, len(mail)))
    until = data.draw(st.integers(at, min(len(mail), at + 50)))
    piece = data.draw(st.sampled_from(WORDS) | st.just(b""))
    found = recognise(mail[:at] + piece + mail[until:], "")
    assert found is None or isinstance(found, Recognised)


def test_reading_a_report_costs_little() -> None:
    """A bound against the grossest mistakes: the work takes about 0.2 ms."""
    assert least_seconds(lambda: recognise(shapes.POSTFIX, "")) < 0.01
