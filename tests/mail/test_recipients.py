"""Who a mail is from and whom it is for, read from its header."""

from __future__ import annotations

import email.utils
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.errors import AddressError
from mailerq.mail.headers import Header
from mailerq.mail.recipients import addresses, recipients, sender


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        (" , ,", []),
        ("ann@a.test", ["ann@a.test"]),
        ("Ann Lee <ann@a.test>, <bob@b.test>", ["ann@a.test", "bob@b.test"]),
        ('"Lee, Ann" <ann@a.test>', ["ann@a.test"]),
        ('"a b"@a.test', ['"a b"@a.test']),
        ('a."b c".d@a.test', ['a."b c".d@a.test']),
        ("ann@a.test (Ann (the \\) first)), (x) bob@b.test", ["ann@a.test", "bob@b.test"]),
        ("ann . lee @ a . test", ["ann.lee@a.test"]),
        ("a..b@a.test", ["a..b@a.test"]),
        (
            "team: ann@a.test, Bob <bob@b.test>; eve@e.test",
            ["ann@a.test", "bob@b.test", "eve@e.test"],
        ),
        ("undisclosed-recipients:;", []),
        ("ann@a.test; bob@b.test", ["ann@a.test", "bob@b.test"]),
        ("<@relay.test,@mx.test:ann@a.test>", ["ann@a.test"]),
        ("ann@[192.0.2.1], bob@[IPv6:2001:db8::1]", ["ann@[192.0.2.1]", "bob@[IPv6:2001:db8::1]"]),
        ("root, Admin <postmaster>", ["root", "postmaster"]),
        ("jörg@bücher.test", ["jörg@bücher.test"]),
        ("=?utf-8?q?J=C3=B6rg?= <j@a.test>", ["j@a.test"]),
        ("ann@a.test\r\n\t,bob@b.test", ["ann@a.test", "bob@b.test"]),
    ],
)
def test_addresses_of_a_list(text: str, found: list[str]) -> None:
    assert list(addresses(text)) == found


@pytest.mark.parametrize(
    "text",
    [
        "Ann Lee",
        "Ann ann@a.test",
        "ann@a.test@b.test",
        "ann@",
        "@a.test",
        "<ann@a.test",
        "ann@a.test>",
        "<>",
        "<ann@a.test> bob@b.test",
        "<ann@a.test, bob@b.test>",
        "<<ann@a.test>>",
        '"ann@a.test',
        "ann@a.test (Ann",
        "ann@a.test)",
        "ann\\@a.test",
        "[192.0.2.1]",
        "ann@[192.0.2.1].test",
    ],
)
def test_what_is_no_list_of_addresses_is_refused(text: str) -> None:
    with pytest.raises(AddressError):
        list(addresses(text))


NAMES = st.text('abc .,()<>@"\\:;ü', max_size=12)
LOCALS = st.from_regex(r"\A[a-z0-9!#$%&'*+/=?^_{|}~-]{1,8}(\.[a-z]{1,4})?\Z")
DOMAINS = st.from_regex(r"\A[a-z]{1,8}(\.[a-z]{1,4}){1,3}\Z")
MAILBOXES = st.builds("{}@{}".format, LOCALS, DOMAINS)


@given(st.lists(st.tuples(NAMES, MAILBOXES), max_size=5))
def test_lists_that_others_write_are_read(pairs: list[tuple[str, str]]) -> None:
    text = ", ".join(email.utils.formataddr(pair) for pair in pairs)
    assert list(addresses(text)) == [address for _, address in pairs]


@given(st.text('ab@.,:;<>()[]"\\ \t', max_size=30))
def test_any_text_ends_in_addresses_or_an_error(text: str) -> None:
    try:
        found = list(addresses(text))
    except AddressError:
        return
    assert all(address and list(addresses(f"<{address}>")) == [address] for address in found)


@pytest.mark.parametrize(
    "text",
    [
        "ann@a.test, " * 100_000,
        "(" * 300_000,
        '"\\' * 300_000,
        "a<" * 300_000,
        "a." * 300_000 + "@",
        "[" * 300_000,
    ],
)
def test_long_lists_take_linear_time(text: str) -> None:
    started = time.thread_time()
    try:
        count = sum(1 for _ in addresses(text))
    except AddressError:
        count = 100_000
    assert count == 100_000
    assert time.thread_time() - started < 20  # seconds; it takes less than one


def test_recipients_are_those_of_to_cc_and_bcc_once_each() -> None:
    header = Header(
        b"bcc: dora@d.test\r\nTo: ann@a.test,\r\n bob@b.test\r\nCc: ann@a.test\r\n"
        b"CC : Carl <carl@c.test>\r\nReply-To: x@x.test\r\n\r\nTo: body@b.test\r\n"
    )
    assert recipients(header) == [
        "ann@a.test",
        "bob@b.test",
        "carl@c.test",
        "dora@d.test",
    ]


def test_an_unreadable_recipient_is_named_with_its_field() -> None:
    with pytest.raises(AddressError, match=r"^Cc: 'Ann Lee' is no address$"):
        recipients(Header(b"To: ann@a.test\r\nCc: Ann Lee\r\n\r\n"))


def test_the_sender_is_the_first_that_is_named() -> None:
    fields = [
        (b"X-Mq-Envelope: <e@e.test>\r\n", "e@e.test"),
        (b"Return-Path: <r@r.test>\r\n", "r@r.test"),
        (b"Sender: Sue <s@s.test>\r\n", "s@s.test"),
        (b"From: f@f.test, g@g.test\r\n", "f@f.test"),
        (b"To: t@t.test\r\n", None),
    ]
    for start, (_, expected) in enumerate(fields):
        mime = b"".join(field for field, _ in reversed(fields[start:]))
        assert sender(Header(mime)) == expected


def test_the_null_sender_and_an_unreadable_one() -> None:
    assert sender(Header(b"Return-Path: <>\r\nFrom: f@f.test\r\n\r\n")) == ""
    assert sender(Header(b"Sender: no one\r\nFrom: f@f.test\r\n\r\n")) == "f@f.test"
    assert sender(Header(b"From: <>\r\n\r\n")) is None


def test_a_resent_mail_goes_to_whom_it_was_resent_last() -> None:
    header = Header(
        b"Resent-From: me@m.test\r\nResent-To: new@n.test\r\n"
        b"Resent-From: old@o.test\r\nResent-To: older@o.test\r\n"
        b"Received: x\r\nResent-Cc: oldest@o.test\r\n"
        b"From: f@f.test\r\nSender: s@s.test\r\nTo: t@t.test\r\n\r\n"
    )
    assert sender(header) == "me@m.test"
    assert recipients(header) == ["new@n.test"]
