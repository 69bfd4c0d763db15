"""Reports to senders, as the email package and flufl.bounce read them."""

from __future__ import annotations

import email
import email.policy
import email.utils
import quopri
from email.message import EmailMessage
from typing import Any

import pytest
from flufl.bounce import all_failures, scan_message
from hypothesis import given
from hypothesis import strategies as st

from mailerq.mail import dsn, dsn_texts
from mailerq.mail.dsn import NOTHING, Excerpt, Facts, Recipient, excerpt
from mailerq.mail.dsn_texts import Text, Texts

NOW = 1_750_000_000.0
MAIL = (
    b"Received: from a by b\r\nMessage-ID: <m1@list.test>\r\nSubject: Hello\r\n there\r\n"
    b"From: Ann <ann@b.test>\r\n\r\nbody\r\n"
)
BOB = Recipient(
    "bob@c.test",
    "5.1.1",
    "smtp; 550 5.1.1 no such user",
    original="rfc822;robert@c.test",
    remote_mta="dns; mx.c.test",
    last_attempt=NOW - 10,
    log_id="0a1b",
)


def facts(**more: Any) -> Facts:
    return Facts(
        **{
            "to": "ann@b.test",
            "sender": "MAILER-DAEMON@me.test",
            "mta": "me.test",
            "id": "r1",
            "now": NOW,
            **more,
        }
    )


def made(
    *recipients: Recipient,
    event: str = "failed",
    quoted: Excerpt | None = None,
    texts: Texts = dsn_texts.DEFAULT,
    **more: Any,
) -> bytes:
    if quoted is None:
        quoted = excerpt(MAIL, full=False, limit=50_000)
    return dsn.make(facts(**more), event, recipients or [BOB], quoted, texts)


def parsed(raw: bytes) -> EmailMessage:
    """The report as a reader has it; all of it is lines of ASCII."""
    assert raw.isascii()
    assert raw.endswith(b"\r\n")
    assert raw.count(b"\n") == raw.count(b"\r") == raw.count(b"\r\n")
    assert max(map(len, raw.split(b"\r\n"))) <= 998
    report = email.message_from_bytes(raw, policy=email.policy.default)
    assert isinstance(report, EmailMessage)
    assert report.defects == []
    assert report.get_content_type() == "multipart/report"
    assert report.get_param("report-type") == "delivery-status"
    return report


def status(report: EmailMessage) -> list[dict[str, str]]:
    """The fields of the part for programs, one dict for each block."""
    part = parts(report)[1]
    assert part.get_content_type() == "message/delivery-status"
    return [dict(block.items()) for block in part.get_payload()]


def parts(report: EmailMessage) -> list[Any]:
    payload = report.get_payload()
    assert isinstance(payload, list)
    return payload


def text_of(report: EmailMessage) -> str:
    """What people read."""
    part: Any = parts(report)[0]
    assert part.get_content_type() == "text/plain"
    return str(part.get_content()).replace("\r\n", "\n")


def test_a_report_says_who_failed_where_and_why() -> None:
    raw = made(envid="e 1", arrival=NOW - 100, client="192.0.2.1")
    report = parsed(raw)
    assert report["From"] == "Mail Delivery System <MAILER-DAEMON@me.test>"
    assert report["To"] == "ann@b.test"
    assert report["Subject"] == "Undelivered mail: Hello there"
    assert report["Auto-Submitted"] == "auto-replied"
    assert report["Message-ID"] == "<r1@me.test>"
    assert report["In-Reply-To"] == report["References"] == "<m1@list.test>"
    assert email.utils.parsedate_to_datetime(report["Date"]).timestamp() == NOW
    assert report["MIME-Version"] == "1.0"
    about_mail, about_bob = status(report)
    assert about_mail == {
        "Reporting-MTA": "dns; me.test",
        "Original-Envelope-Id": "e 1",
        "Received-From-MTA": "dns; [192.0.2.1]",
        "Arrival-Date": "Sun, 15 Jun 2025 15:05:00 +0000",
    }
    assert about_bob == {
        "Original-Recipient": "rfc822; robert@c.test",
        "Final-Recipient": "rfc822; bob@c.test",
        "Action": "failed",
        "Status": "5.1.1",
        "Remote-MTA": "dns; mx.c.test",
        "Diagnostic-Code": "smtp; 550 5.1.1 no such user",
        "Last-Attempt-Date": "Sun, 15 Jun 2025 15:06:30 +0000",
        "Final-Log-ID": "0a1b",
    }
    assert "<bob@c.test>\n    mx.c.test: 550 5.1.1 no such user\n" in text_of(report)
    header = parts(report)[2]
    assert header.get_content_type() == "text/rfc822-headers"
    assert header.get_payload() == MAIL.partition(b"\r\n\r\n")[0].decode() + "\r\n"


def test_a_host_without_a_domain_has_no_name_of_the_dns() -> None:
    report = dsn.make(
        Facts(to="a@b.test", sender="M@mail", mta="mail", id="1", now=0.0),
        "failed",
        [Recipient("c@d.test", "5.1.1")],
        NOTHING,
    )
    assert b"\r\nReporting-MTA: x-local-hostname; mail\r\n" in report


def test_a_program_that_reads_bounces_finds_those_that_failed() -> None:
    eve = Recipient("eve@c.test", "5.2.2", "smtp; 552 5.2.2 full", original="rfc822;eve@c.test")
    report = email.message_from_bytes(made(BOB, eve))
    assert set(scan_message(report)) == {b"robert@c.test", b"eve@c.test"}
    temporary, permanent = all_failures(report)
    assert not temporary
    assert b"eve@c.test" in permanent


def test_a_delay_is_no_failure_to_such_a_program() -> None:
    bob = Recipient("bob@c.test", "4.4.1", "X-mailerq; no answer", until=NOW + 3600)
    raw = made(bob, event="delayed")
    temporary, permanent = all_failures(email.message_from_bytes(raw))
    assert (set(temporary), set(permanent)) == ({b"bob@c.test"}, set())
    report = parsed(raw)
    fields = status(report)[1]
    assert (fields["Action"], fields["Status"]) == ("delayed", "4.4.1")
    assert fields["Will-Retry-Until"] == "Sun, 15 Jun 2025 16:06:40 +0000"
    assert fields["Diagnostic-Code"] == "X-mailerq; no answer"
    assert "Sun, 15 Jun 2025 16:06:40 +0000" in text_of(report)


@pytest.mark.parametrize(
    ("event", "given", "expected"),
    [
        ("failed", "5.1.1", "5.1.1"),
        ("failed", "5.1.1 no such user", "5.0.0"),
        ("failed", "", "5.0.0"),
        ("delayed", "x", "4.0.0"),
        ("relayed", "2.6", "2.0.0"),
        ("delivered", "2.1.5\r\nX: y", "2.0.0"),
    ],
)
def test_a_status_is_three_numbers(event: str, given: str, expected: str) -> None:
    report = parsed(made(Recipient("bob@c.test", given), event=event))
    assert status(report)[1]["Status"] == expected


def test_the_whole_mail_comes_back_if_that_is_wanted() -> None:
    quoted = excerpt(MAIL, full=True, limit=50_000)
    assert quoted.whole
    part = parts(parsed(made(quoted=quoted)))[2]
    assert part.get_content_type() == "message/rfc822"
    (inner,) = part.get_payload()
    assert inner["Subject"] == "Hello there"
    assert MAIL in made(quoted=quoted)


@pytest.mark.parametrize(
    ("body", "limit"),
    [
        (MAIL, len(MAIL) - 1),
        (MAIL + b"x" * 999 + b"\r\n", 50_000),
        (MAIL + b"\0\r\n", 50_000),
        (MAIL + b"x" * 60_000, 50_000),
        # No ASCII form: an 8-bit address
        (b"From: \xe9@b.test\r\n\r\n\xe9\r\n", 50_000),
    ],
)
def test_a_mail_that_is_large_or_no_lines_of_ascii_gives_its_header(
    body: bytes, limit: int
) -> None:
    quoted = excerpt(body, full=True, limit=limit)
    assert not quoted.whole
    assert quoted.data == body.partition(b"\r\n\r\n")[0] + b"\r\n"
    kind = parts(parsed(made(quoted=quoted)))[2].get_content_type()
    assert kind == ("text/rfc822-headers" if quoted.data.isascii() else "message/global-headers")


def test_a_mail_of_8_bits_comes_back_in_ascii() -> None:
    body = "Subject: x\r\nContent-Type: text/plain; charset=utf-8\r\n\r\nGrüße\r\n".encode()
    quoted = excerpt(body, full=True, limit=50_000)
    part = parts(parsed(made(quoted=quoted)))[2]
    (inner,) = part.get_payload()
    assert inner.get_content().rstrip() == "Grüße"


def test_bare_line_ends_become_pairs() -> None:
    quoted = excerpt(b"a: 1\nb: 2\r\n\nbody\rmore", full=True, limit=100)
    assert quoted.data == b"a: 1\r\nb: 2\r\n\r\nbody\r\nmore"
    parsed(made(quoted=quoted))


def test_a_long_header_is_cut_at_a_line() -> None:
    body = b"".join(b"X-%d: %s\r\n" % (n, b"y" * 90) for n in range(9_000)) + b"\r\nbody"
    quoted = excerpt(body, full=False, limit=50_000)
    assert 49_000 < len(quoted.data) <= 50_000
    assert quoted.data.endswith(b"y\r\n")
    assert excerpt(b"x: " + b"y" * 5000 + b"\r\n\r\n", full=False, limit=1000).data == b""


def test_a_mail_without_a_header_or_a_body_gives_nothing() -> None:
    for body in (None, b"", b"\r\njust text", b"no header\r\n"):
        quoted = excerpt(body, full=False, limit=1000)
        assert quoted.data == b""
        assert len(parts(parsed(made(quoted=quoted)))) == 2


def test_a_line_of_the_header_that_is_too_long_is_encoded() -> None:
    quoted = excerpt(b"X: " + b"y " * 1000 + b"\r\n\r\n", full=False, limit=50_000)
    part = parts(parsed(made(quoted=quoted)))[2]
    assert part["Content-Transfer-Encoding"] in ("quoted-printable", "base64")
    assert part.get_payload(decode=True) == quoted.data


def test_international_addresses_use_the_types_for_them() -> None:
    recipient = Recipient("jürgen@c.test", "5.1.1", "smtp; 550 nö", original="utf-8;jürgen@c.test")
    report = parsed(made(recipient, utf8=True))
    part = parts(report)[1]
    assert part.get_content_type() == "message/global-delivery-status"
    raw = made(recipient, utf8=True)
    section = raw.split(b"--=_dsn")[2].partition(b"\r\n\r\n")[2]
    text = quopri.decodestring(section).decode()
    assert "Original-Recipient: utf-8; jürgen@c.test" in text
    assert "Final-Recipient: utf-8; jürgen@c.test" in text
    assert "Diagnostic-Code: smtp; 550 nö" in text


@pytest.mark.parametrize(
    "original",
    ["utf-8;jörg+x@c.test", r"utf-8;j\x{F6}rg\x{2B}x@c.test", r"UTF-8;jörg\x{2B}x@c.test"],
)
def test_an_international_original_recipient_has_the_form_of_its_part(original: str) -> None:
    """RFC 6533, section 3: escaped in an ASCII part, plain in a global one."""
    kind = original.partition(";")[0]
    recipient = Recipient("bob@c.test", "5.1.1", original=original)
    told = status(parsed(made(recipient)))[1]
    assert told["Original-Recipient"] == rf"{kind}; j\x{{F6}}rg\x{{2B}}x@c.test"
    section = made(recipient, utf8=True).split(b"--=_dsn")[2].partition(b"\r\n\r\n")[2]
    assert f"Original-Recipient: {kind}; jörg+x@c.test\r\n" in quopri.decodestring(section).decode()
    broken = Recipient("bob@c.test", "5.1.1", original=r"utf-8;\x{D800}@c.test")
    assert "Original-Recipient" not in status(parsed(made(broken)))[1]


def test_a_reply_in_8_bits_is_shown_in_ascii_otherwise() -> None:
    report = parsed(made(Recipient("bob@c.test", "5.0.0", "smtp; 550 café")))
    assert status(report)[1]["Diagnostic-Code"] == r"smtp; 550 caf\xe9"
    assert "550 café" in text_of(report)


def test_an_international_sender_gets_a_header_that_only_smtputf8_carries() -> None:
    raw = made(to="jürgen@b.test", utf8=True)
    assert "To: jürgen@b.test\r\n".encode() in raw
    assert not raw.isascii()


def test_a_long_diagnostic_is_folded() -> None:
    words = " ".join(["word"] * 300)
    fields = status(parsed(made(Recipient("b@c.test", "5.0.0", f"smtp; {words}"))))[1]
    assert " ".join(fields["Diagnostic-Code"].split()) == f"smtp; {words}"
    parsed(made(Recipient("b@c.test", "5.0.0", "smtp; " + "x" * 5000)))


HOSTILE = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        [
            "\r\nBcc: x@y.test", "\r\n\r\n--=_dsn", "a\0b", "\x85x\u2028y",
            "=?utf-8?q?=0D=0AX:_y?=",
            "${recipients}", "x" * 3000, "é" * 1000, "-- \n.\n", "(((", '"', "<a@b.test>", " ",
        ]
    ),
)  # fmt: skip


@given(
    st.builds(
        Recipient,
        HOSTILE,
        HOSTILE,
        diagnostic=HOSTILE,
        original=HOSTILE,
        remote_mta=HOSTILE,
        log_id=HOSTILE,
    ),
    HOSTILE,
    st.booleans(),
    st.sampled_from(dsn_texts.EVENTS),
    st.binary(max_size=300),
)
def test_no_value_ends_a_field_or_a_part(
    recipient: Recipient, value: str, utf8: bool, event: str, body: bytes
) -> None:
    subject = f"Subject: {value}\r\nMessage-ID: {value}\r\n\r\n".encode(errors="replace") + body
    for quoted in (
        excerpt(subject, full=True, limit=2000),
        excerpt(body, full=False, limit=100),
        Excerpt(b"", False, "", value, ()),
        NOTHING,
    ):
        raw = made(recipient, event=event, quoted=quoted, envid=value, client=value, utf8=utf8)
        report = parsed(raw)
        names = {name.lower() for name in report}
        assert names <= {
            "from", "to", "subject", "date", "message-id", "in-reply-to", "references",
            "auto-submitted", "mime-version", "content-type",
        }  # fmt: skip
        assert len(parts(report)) == (3 if quoted.data else 2)
        if parts(report)[1].get_content_type() == "message/delivery-status":
            blocks = status(report)
            assert len(blocks) == 2
            assert set(blocks[1]) <= {
                "Original-Recipient", "Final-Recipient", "Action", "Status", "Remote-MTA",
                "Diagnostic-Code", "Last-Attempt-Date", "Will-Retry-Until", "Final-Log-ID",
            }  # fmt: skip


def test_a_boundary_in_the_mail_is_not_one_of_the_report() -> None:
    first = parsed(made()).get_boundary()
    assert first is not None
    body = f"Subject: x\r\n\r\n--{first}--\r\n".encode()
    quoted = excerpt(body, full=True, limit=1000)
    report = parsed(made(quoted=quoted))
    assert report.get_boundary() != first
    assert len(parts(report)) == 3


def test_the_text_is_in_a_language_of_the_sender() -> None:
    texts = Texts(
        {
            ("de", "failed"): Text("Unzustellbar: ${subject}", "Nicht für ${recipients}", "Post"),
            ("pt-br", "failed"): Text("BR", "${id}", "x"),
        },
        "de",
    )
    for field, subject in (
        ("Accept-Language: de-AT, en;q=0.5", "Unzustellbar: Hi"),
        ("Accept-Language: fr, en", "Undelivered mail: Hi"),
        ("Content-Language: pt-BR", "BR"),
        ("X: y", "Unzustellbar: Hi"),
        ("Accept-Language: " + ",".join(["x"] * 10_000), "Unzustellbar: Hi"),
    ):
        quoted = excerpt(f"{field}\r\nSubject: Hi\r\n\r\n".encode(), full=False, limit=90_000)
        assert parsed(made(quoted=quoted, texts=texts))["Subject"] == subject
    quoted = excerpt(b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n\r\n", full=False, limit=1000)
    report = parsed(made(quoted=quoted, texts=texts))
    assert report["Subject"] == "Unzustellbar: Grüße"
    assert "Nicht für <bob@c.test>" in text_of(report)


def test_a_subject_that_is_missing_leaves_no_colon() -> None:
    assert parsed(made(quoted=NOTHING))["Subject"] == "Undelivered mail"


def test_a_hundred_recipients_are_listed_for_people_and_all_for_programs() -> None:
    recipients = [Recipient(f"c{n}@d.test", "5.0.0", "smtp; 550 no") for n in range(150)]
    report = parsed(made(*recipients))
    assert len(status(report)) == 151
    text = text_of(report)
    assert "<c99@d.test>" in text
    assert "<c100@d.test>" not in text
    assert "(+ 50)" in text
