"""Header fields: where the header ends, what is in it, what is put on top of it."""

from __future__ import annotations

import email.utils
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mailerq.mail import headers
from mailerq.mail.headers import (
    HOP_LIMIT,
    Header,
    has_ascii_header,
    head_of,
    prepend,
    received,
    remove,
)

# Text that is made of what matters to a header, so that drawn messages are full of edges.
PIECES = st.sampled_from([
    b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"To", b"x-mq-a", b"b", b"\xff",
])  # fmt: skip
MESSAGES = st.lists(PIECES, max_size=40).map(b"".join)


def normalised(mime: bytes) -> bytes:
    """What the message looks like when each line end has become CRLF."""
    return mime.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")


@pytest.mark.parametrize(
    ("mime", "raw", "body"),
    [
        (b"A: b\r\n\r\nbody", b"A: b\r\n", b"body"),
        (b"A: b\r\n\r\n\r\nbody", b"A: b\r\n", b"\r\nbody"),
        (b"A: b\r\n", b"A: b\r\n", b""),
        (b"A: b", b"A: b", b""),
        (b"\r\nbody\r\n\r\n", b"", b"body\r\n\r\n"),
        (b"", b"", b""),
        (b"just text\r\nA: b\r\n\r\n", b"", b"just text\r\nA: b\r\n\r\n"),
        (b" folded: at once\r\n\r\n", b"", b" folded: at once\r\n\r\n"),
        (b"A: b\n\nbody\r\n\r\nmore", b"A: b\n", b"body\r\n\r\nmore"),
        (b"A: b\r\rbody", b"A: b\r", b"body"),
        (b"A: b\r\n\nbody", b"A: b\r\n", b"body"),
        (b"A: b\n\r\nbody", b"A: b\n", b"body"),
        (b"A: b\r\r\nbody", b"A: b\r", b"body"),
        (b"A: b\r\n \r\n c\r\n\r\nbody", b"A: b\r\n \r\n c\r\n", b"body"),
    ],
)
def test_header_ends_at_the_first_empty_line(mime: bytes, raw: bytes, body: bytes) -> None:
    header = Header(mime)
    assert (header.raw, mime[header.body :]) == (raw, body)
    assert header.end == len(raw)


@pytest.mark.parametrize("mime", [
    b"A: b\r\n\r\nbody", b"A: b\n\nbody", b"A: b\r\rbody", b"A: b\n\r\nbody\r\n\r\n", b"A: b\r\n",
    b"just text\r\n\r\n", b"\r\nbody", b"", b"A: b\r\n" + headers.HEADER_LIMIT * b"x" + b"\r\n\r\n",
])  # fmt: skip
def test_the_head_of_a_view_has_the_header_of_the_mail(mime: bytes) -> None:
    head = head_of(memoryview(mime))
    assert mime.startswith(head)
    whole, part = Header(mime), Header(head)
    assert (part.raw, part.body, part.is_whole) == (whole.raw, whole.body, whole.is_whole)
    assert prepend(head, b"X: 1\r\n") + mime[len(head) :] == prepend(mime, b"X: 1\r\n")


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\n\n", b"\r\r", b"\n\r\n", b"\r\n\n"])
def test_only_the_header_must_be_ascii(end: bytes) -> None:
    assert has_ascii_header(b"Subject: x" + end + b"\xff")
    assert has_ascii_header(b"Subject: x" + end + b"\xff\r\n\r\n")
    assert not has_ascii_header(b"Subject: \xff" + end + b"x")
    assert not has_ascii_header(b"A: " + 300_000 * b"x" + b"\r\nSubject: \xff" + end + b"x")


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
@pytest.mark.parametrize("name", ["Received:", "RECEIVED :", "received\t:"])
def test_a_mail_with_more_received_fields_than_the_limit_is_looping(name: str, end: str) -> None:
    def mail(count: int) -> Header:
        other = f"Received-SPF: pass{end}X-Received: x{end}"
        return Header((other + count * f"{name} by a{end}" + end + f"{name} by a{end}").encode())

    found = [mail(count).is_looping() for count in (99, 100, 101)]
    assert found == [False, False, True]
    found = [mail(count).is_looping(added=1) for count in (98, 99, 100)]
    assert found == [False, False, True]
    assert HOP_LIMIT == 100


def test_text_without_a_header_is_not_looping() -> None:
    assert not Header(b"hello\r\n" + 200 * b"Received: by a\r\n" + b"\r\n").is_looping()
    assert not Header(b"").is_looping()


@given(MESSAGES)
@example(b"A:\r\nB:\r\r\nC:\n\n")
def test_the_header_is_the_same_one_after_line_ends_are_normalised(mime: bytes) -> None:
    before, after = Header(mime), Header(normalised(mime))
    assert normalised(before.raw) == after.raw
    assert [field.name for field in before.fields()] == [field.name for field in after.fields()]


@given(MESSAGES)
def test_fields_cover_the_header_without_a_gap(mime: bytes) -> None:
    header = Header(mime)
    position = 0
    for field in header.fields():
        assert field.start == position
        assert field.end > position
        position = field.end
    assert position == header.end


@given(MESSAGES, st.sampled_from([b"to", b"x-mq-a", b"tob"]))
def test_count_finds_what_walking_the_fields_finds(mime: bytes, name: bytes) -> None:
    header = Header(mime)
    names = [field.name for field in header.fields()]
    assert header.count(name, limit=100) == names.count(name)
    assert header.has(name) == (name in names)


def test_a_name_is_found_in_any_case_and_with_blanks_before_its_colon() -> None:
    header = Header(b"SUBJECT \t: x\r\nTo: y\r\n message-id: folded\r\n\r\ncc: body")
    assert header.has(b"subject")
    assert not header.has(b"message-id")
    assert not header.has(b"cc")
    assert not header.has(b"subj")


def test_a_folded_value_becomes_one_line() -> None:
    first, second = Header(b"To: a@b.test,\r\n\t c@d.test \r\nTo:\r\n e@f.test\r\n").fields()
    assert headers.unfold(first.value) == b"a@b.test, c@d.test"
    assert headers.unfold(second.value) == b"e@f.test"


def test_received_lines_are_counted_up_to_the_limit() -> None:
    header = Header(b"Received: from a\r\n by b\r\n" * 101 + b"\r\nReceived: body\r\n")
    assert header.count(b"received", limit=1000) == 101
    assert header.count(b"received", limit=10) == 10


def test_a_header_is_read_up_to_its_limit() -> None:
    most = b"a: b\r\n" * 174_000
    header = Header(most + b"\r\n" + b"x" * 10_000_000)
    assert header.is_whole
    assert header.raw == most
    assert not header.has(b"message-id")
    assert header.count(b"a", limit=50) == 50
    assert sum(1 for _ in header.fields()) == 174_000
    endless = Header(2 * most + b"\r\n")
    assert not endless.is_whole
    assert len(endless.raw) == headers.HEADER_LIMIT
    assert Header(most).is_whole
    assert Header(b"x" * 2_000_000).is_whole


@pytest.mark.parametrize("blank", [b" ", b"\t", b" \t", b"\r\n ", b"\n\t", b"\r ", b" \r\n "])
def test_unfolding_takes_time_in_proportion_to_the_value(blank: bytes) -> None:
    def seconds(count: int) -> float:
        value = b"a" + count * blank + b"x" + count * blank + b"\r\n b"
        start = time.thread_time()
        assert headers.unfold(value).split() == [b"a", b"x", b"b"]
        return time.thread_time() - start

    assert seconds(100_000) < 1.0  # it takes some 10 ms; squared it would be a minute


def test_prepend_leaves_every_byte_behind_it_alone() -> None:
    mime = b"A: b\r\n\r\nbo\ndy\r"
    assert prepend(mime, b"X: 1\r\n", b"Y: 2\r\n") == b"X: 1\r\nY: 2\r\n" + mime
    assert prepend(b"\r\nbody", b"X: 1\r\n") == b"X: 1\r\n\r\nbody"


@pytest.mark.parametrize("text", [b"just text\r\n", b" looks folded\r\n", b": no name\r\n"])
def test_prepend_ends_the_header_before_text_that_is_none(text: bytes) -> None:
    assert prepend(text, b"X: 1\r\n") == b"X: 1\r\n\r\n" + text


def test_remove_does_not_join_two_line_ends_to_one() -> None:
    mime = b"A: b\rx-mq-c: d\r\n\nx-mq-body: 1\r\n"
    fields = [field for field in Header(mime).fields() if field.name == b"x-mq-c"]
    left = remove(mime, fields)
    assert left == b"A: b\r\n\nx-mq-body: 1\r\n"
    assert Header(left).raw == b"A: b\r\n"


DATE = "Tue, 24 Nov 2026 07:26:00 +0000"
NOW = 1795505160.9


def test_dates_are_those_of_rfc_5322() -> None:
    assert headers.format_date(NOW) == DATE
    assert headers.date_field(NOW) == f"Date: {DATE}\r\n".encode()


@given(st.integers(0, 4_000_000_000))
def test_dates_are_read_back_by_others(now: int) -> None:
    assert email.utils.parsedate_to_datetime(headers.format_date(now)).timestamp() == now


def test_received_names_client_server_protocol_and_recipient() -> None:
    field = received(
        hostname="mx.example.test", id="5f3a", now=NOW, protocol="ESMTPS",
        helo="client.example.test", client_ip="192.0.2.7", recipient="ann@example.test",
    )  # fmt: skip
    assert field == (
        b"Received: from client.example.test ([192.0.2.7])\r\n"
        b"\tby mx.example.test with ESMTPS id 5f3a\r\n"
        b"\tfor <ann@example.test>; " + DATE.encode() + b"\r\n"
    )


def test_received_writes_an_ipv6_literal_and_no_recipient_of_several() -> None:
    field = received(
        hostname="mx.test", id="1", now=NOW, protocol="SMTP", helo="x", client_ip="2001:db8::1"
    )
    assert b"([IPv6:2001:db8::1])" in field
    assert b"for <" not in field


def test_received_without_a_socket_says_whose_mail_it_was() -> None:
    field = received(hostname="mx.test", id="1", now=NOW, user="www-data")
    assert field == (
        b"Received: by mx.test (from user www-data) id 1;\r\n\t" + DATE.encode() + b"\r\n"
    )


@given(
    helo=st.text(max_size=400),
    ip=st.text(max_size=60),
    hostname=st.text(max_size=300),
    id=st.text(max_size=60),
    recipient=st.text(max_size=400),
)
@example("a" * 255, "2001:db8:1111:2222:3333:4444:5555:6666", "b" * 255, "c" * 32, "d" * 200)
@example("evil)\r\n by x", "1.1.1.1", "h", "i\r\nX: y", "a@b>\r\nBcc: c")
def test_received_is_one_folded_field_whatever_is_put_in(
    helo: str, ip: str, hostname: str, id: str, recipient: str
) -> None:
    field = received(
        hostname=hostname, id=id, now=NOW, protocol="ESMTP", helo=helo, client_ip=ip,
        recipient=recipient,
    )  # fmt: skip
    lines = field.split(b"\r\n")
    assert lines.pop() == b""
    assert b"\r" not in b"".join(lines)
    assert b"\n" not in b"".join(lines)
    assert all(line.startswith(b"\t") and line.strip() for line in lines[1:])
    for line in lines:
        assert len(line) <= 78 or len(line.split()) <= 3
        assert len(line) <= 998
    assert field.decode("ascii").replace("\r\n\t", " ").rstrip().endswith(f"; {DATE}")
    assert field.count(b"(") == field.count(b")") == (1 if ip else 0)


@pytest.mark.parametrize(
    ("extended", "secure", "authenticated", "name"),
    [
        (False, False, False, "SMTP"),
        (True, False, False, "ESMTP"),
        (True, True, False, "ESMTPS"),
        (True, False, True, "ESMTPA"),
        (True, True, True, "ESMTPSA"),
    ],
)
def test_protocol_name_is_that_of_rfc_3848(
    extended: bool, secure: bool, authenticated: bool, name: str
) -> None:
    found = headers.protocol_name(extended=extended, secure=secure, authenticated=authenticated)
    assert found == name


def test_message_id_field_cannot_be_broken_by_its_id() -> None:
    assert headers.message_id_field("a1b2", "mx.test") == b"Message-ID: <a1b2@mx.test>\r\n"
    assert headers.message_id_field("a>\r\nB: <", "m") == b"Message-ID: <a???B???@m>\r\n"
