"""Which message a report is about, what proves that, and whom it makes the operator suppress."""

from __future__ import annotations

from typing import Any

import pytest

from mailerq.mail import verp
from mailerq.mail.reports import Recipient, Recognised, Report, recognise
from mailerq.mail.trace import trace_field
from mailerq.rules.reports import (
    HARD_STATUSES,
    Keys,
    Match,
    Suppressed,
    Wishes,
    document,
    find_match,
    is_hard,
    said,
    to_suppress,
)
from tests.mail import report_shapes as shapes

NOW = 1_750_000_000.0
SECRETS = verp.parse_keys("a AeJ2xBrJJPd1vlTV7pVf3OlB")
KEYS = Keys(SECRETS, 30 * 86400.0, b"x-trace")
BOUNCES = "bounces@list.test"
ALL = Wishes(complaints=True, bounces=True)
ANYBODY = ALL._replace(unproved=True)


def read(mail: bytes) -> Recognised:
    found = recognise(mail, "")
    assert found is not None
    return found


def match(mail: bytes | None, recipient: str = BOUNCES, keys: Keys = KEYS) -> Match:
    found = None if mail is None else read(mail)
    return find_match(found, recipient, keys, hostname="mq.list.test", now=NOW)


def returned(recipient: str, message_id: str = "", base: str = "news@list.test") -> str:
    address = verp.encode(base, recipient, SECRETS, now=NOW, message_id=message_id)
    assert address is not None
    return address


def traced(mail: bytes, recipient: str = "ann@example.org", at: bytes = b"Message-ID: <") -> bytes:
    field = trace_field("X-Trace", "7f", recipient, SECRETS, now=NOW)
    place = mail.rindex(at)
    return mail[:place] + field + mail[place:]


OURS = (
    b"Received: from c.test by mq.list.test with ESMTP id abc123;"
    b" Mon, 16 Jun 2025 08:00:00 +0000\r\n"
)
WITHOUT_ENVID = shapes.POSTFIX.replace(b"Original-Envelope-Id: campaign-77\r\n", b"")


def with_received(mail: bytes) -> bytes:
    place = mail.rindex(b"Message-ID: <")
    return mail[:place] + OURS + mail[place:]


# The order of evidence


def test_the_best_evidence_counts() -> None:
    mail = with_received(traced(shapes.POSTFIX))
    assert match(mail, returned("ann@example.org"))[:4] == ("verp", True, "ann@example.org", "7f")
    assert match(mail)[:4] == ("envid", True, "ann@example.org", "7f")
    mail = with_received(traced(WITHOUT_ENVID))
    assert match(mail)[:4] == ("trace", True, "ann@example.org", "7f")
    assert match(with_received(WITHOUT_ENVID))[:4] == ("received", False, "", "abc123")
    assert match(WITHOUT_ENVID)[:4] == ("message-id", False, "", "")
    assert match(shapes.EXCHANGE_OLD)[:4] == ("recipient", False, "", "")
    assert match(None) == Match()


def test_without_a_signature_nothing_is_proved() -> None:
    for mail in (shapes.POSTFIX, WITHOUT_ENVID, with_received(WITHOUT_ENVID), shapes.EXCHANGE_OLD):
        assert not match(mail).proved


def test_signatures_need_keys() -> None:
    mail, address = traced(WITHOUT_ENVID), returned("ann@example.org")
    others = Keys(verp.parse_keys("a 0000000000000000000000000"), 30 * 86400.0, b"x-trace")
    found = match(mail, address, others)
    assert (found.by, found.proved, found.returned) == ("message-id", False, verp.Problem.FORGED)
    found = match(mail, address, Keys())
    assert (found.by, found.proved) == ("message-id", False)


def test_a_trace_of_another_name_is_not_looked_at() -> None:
    assert match(traced(WITHOUT_ENVID), keys=KEYS._replace(trace_header=b"x-other")).by != "trace"
    assert match(traced(WITHOUT_ENVID), keys=KEYS._replace(trace_header=b"")).by != "trace"


def test_a_trace_outside_the_quoted_mail_proves_nothing() -> None:
    field = trace_field("X-Trace", "7f", "ann@example.org", SECRETS, now=NOW)
    assert not match(field + shapes.POSTFIX).proved


def test_a_trace_for_another_recipient_does_not_add_to_a_return_address() -> None:
    found = match(traced(WITHOUT_ENVID, "bob@example.org"), returned("ann@example.org"))
    assert found[:4] == ("verp", True, "ann@example.org", "")


def test_a_return_address_may_name_the_message_instead_of_the_recipient() -> None:
    long = 60 * "a" + "@example.org"
    found = match(WITHOUT_ENVID, returned(long, "7f"))
    assert found[:4] == ("verp", True, "", "7f")
    found = match(traced(WITHOUT_ENVID, long), returned(long, "7f"))
    assert found[:4] == ("verp", True, long, "7f")


def test_a_received_field_of_another_server_is_not_ours() -> None:
    mail = with_received(WITHOUT_ENVID).replace(b"by mq.list.test", b"by mq.list.test.evil.test")
    assert match(mail).by == "message-id"


# The property


def test_the_property_says_what_is_known() -> None:
    mail = traced(WITHOUT_ENVID)
    value = document(said(read(mail)), match(mail, returned("ann@example.org")))
    assert value["type"] == "delivery-status"
    assert value["matched-by"] == "verp"
    assert value["proved"] is True
    assert value["message-id"] == "7f"
    assert value["verp"] == {
        "verified": True, "envelope": "news@list.test", "recipient": "ann@example.org",
    }  # fmt: skip
    value = document(said(read(mail)), match(mail))
    assert value["trace"] == {"recipient": "ann@example.org"}
    forged = returned("ann@example.org").replace("ann=", "bob=")
    value = document(said(read(shapes.POSTFIX)), match(shapes.POSTFIX, forged))
    assert value["verp"] == {"verified": False, "problem": "forged"}
    value = document(said(None), match(None, returned("ann@example.org")))
    assert (value["type"], value["proved"]) == ("other", True)


# Whom to suppress


@pytest.mark.parametrize(
    ("fields", "hard"),
    [
        *[({"status": status}, True) for status in HARD_STATUSES],
        ({"status": "5.0.0", "diagnostic": "550 User Unknown"}, True),
        ({"status": "", "code": 550, "diagnostic": "550 no such user here"}, True),
        ({"status": "", "code": 450, "diagnostic": "450 no such user here"}, False),
        ({"status": "5.2.2"}, False),
        ({"status": "5.7.1", "diagnostic": "550 user unknown to the policy"}, False),
        ({"status": "5.4.7"}, False),
        ({"status": "4.1.1"}, False),
        ({"status": "5.1.1", "action": "delayed"}, False),
        ({"status": "5.1.1", "action": ""}, False),
    ],
)
def test_what_is_hard(fields: dict[str, Any], hard: bool) -> None:
    assert is_hard(Recipient(**{"action": "failed", **fields})) is hard


def proved(recipient: str) -> Match:
    return Match("verp", True, recipient)


def failed(**fields: Any) -> Report:
    return Report(type="delivery-status", **{"action": "failed", "status": "5.1.1", **fields})


@pytest.mark.parametrize(
    ("report", "suppressed"),
    [
        (failed(recipient="ann@example.org"), True),
        (failed(recipient="ANN@Example.ORG"), True),
        (failed(recipient="x@inside.test", original_recipient="ann@example.org"), True),
        (failed(recipient="ann@inside.test"), True),
        (failed(), True),
        (failed(recipient="x400 address"), True),
        (failed(recipient="bob@elsewhere.test"), False),
        (failed(recipient="bob@a.test", original_recipient="list@a.test"), False),
        (failed(status="5.2.2"), False),
        (failed(action="delivered"), False),
        (
            failed(
                recipient="bob@a.test",
                recipients=[
                    Recipient(action="failed", status="5.1.1", recipient="bob@a.test"),
                    Recipient(action="failed", status="5.1.1", recipient="ann@example.org"),
                ],
            ),
            True,
        ),
    ],
)
def test_a_proved_bounce_suppresses_the_recipient_that_it_is_about(
    report: Report, suppressed: bool
) -> None:
    found = to_suppress(report, proved("ann@example.org"), ALL)
    assert [each.address for each in found] == (["ann@example.org"] if suppressed else [])


@pytest.mark.parametrize("kind", ["abuse", "fraud", "opt-out", "not-spam", "auth-failure", "virus"])
def test_a_proved_complaint_suppresses_who_complains(kind: str) -> None:
    report = Report(type="complaint", feedback_type=kind, recipient="redacted@example.org")
    wanted = kind in ("abuse", "fraud", "opt-out")
    expected = [Suppressed("ann@example.org", f"complaint ({kind})")] if wanted else []
    assert to_suppress(report, proved("ann@example.org"), ALL) == expected
    assert to_suppress(report, proved("ann@example.org"), ALL._replace(complaints=False)) == []


def test_what_is_not_proved_needs_a_wish() -> None:
    report = failed(recipient="ann@example.org", reporting_mta="mx.test")
    for evidence in (Match(), Match("envid"), Match("message-id"), Match("verp", True, "")):
        assert to_suppress(report, evidence, ALL) == []
        assert to_suppress(report, evidence, ANYBODY) == [
            Suppressed("ann@example.org", "hard bounce 5.1.1, reported by mx.test, not proved")
        ]
    assert to_suppress(report, Match(), ANYBODY._replace(bounces=False)) == []
    assert to_suppress(Report(type="complaint", feedback_type="abuse"), Match(), ANYBODY) == []


@pytest.mark.parametrize("kind", ["disposition", "auto-reply", "tls", "dmarc", "other"])
def test_other_reports_suppress_nobody(kind: str) -> None:
    report = Report(type=kind, action="failed", status="5.1.1", recipient="ann@example.org")
    assert to_suppress(report, proved("ann@example.org"), ANYBODY) == []
