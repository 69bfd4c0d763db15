"""Fields of reports are read as far as they make sense, whatever stands in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.mail.fields import clean
from mailerq.mail.report_fields import (
    TEXT_LIMIT,
    address_in,
    code_in,
    first_address,
    groups_of,
    number,
    one_line,
    status_in,
    time_of,
    typed,
)
from mailerq.mail.report_parts import fields_of, parameters_of, value_text


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("Thu, 7 Jul 1994 17:15:49 -0400", "1994-07-07 21:15:49"),
        ("Thu, 7 Jul 1994 17:15:49 -0400 (EDT)", "1994-07-07 21:15:49"),
        ("Thu, 8 Mar 2005 14:00:00 EDT", "2005-03-08 18:00:00"),
        ("Mon, 16 Jun 2025 08:00:00 UTC", "2025-06-16 08:00:00"),
        ("Mon, 16 Jun 2025 08:00:00", "2025-06-16 08:00:00"),
        ("16 Jun 2025 08:00", "2025-06-16 08:00:00"),
        ("16 June 2025", "2025-06-16 00:00:00"),
        ("16-Jun-2025 08:00:00 +0530", "2025-06-16 02:30:00"),
        ("Mon Jun 16 08:00:00 2025", "2025-06-16 08:00:00"),
        ("2025-06-16T08:00:00.123+02:00", "2025-06-16 06:00:00"),
        ("2025-06-16", "2025-06-16 00:00:00"),
        ("7 Jul 94 17:15 GMT", "1994-07-07 17:15:00"),
        ("7 Jul 25 17:15 XYZ", "2025-07-07 17:15:00"),
        ("31 Jun 2025 08:00 +9999", "2025-06-27 03:21:00"),
        ("16 Foo 2025 08:00", ""),
        ("16 Jun 2025 25:00:00", ""),
        ("0 Jun 2025", ""),
        ("2025-13-01", ""),
        ("1 Jan 1970 00:00 +0100", ""),
        ("16 Jun 0001", ""),
        ("yesterday", ""),
        ("", ""),
    ],
)
def test_dates_are_read(text: str, time: str) -> None:
    assert time_of(text) == time


@given(st.text(max_size=60) | st.from_regex(r"[\dA-Za-z :,+()-]{0,60}", fullmatch=True))
def test_any_text_is_a_date_or_none(text: str) -> None:
    assert len(time_of(text)) in (0, 19)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ann@example.org", "ann@example.org"),
        (" <ann@example.org> ", "ann@example.org"),
        ("Ann B. <ann@example.org>", "ann@example.org"),
        ("mailto:ann@example.org", "ann@example.org"),
        ("ann@example.org (gone)", "ann@example.org"),
        ('"a b"@example.org', '"a b"@example.org'),
        ("ann@[192.0.2.1]", "ann@[192.0.2.1]"),
        ("nobody", ""),
        ("@", ""),
        ("<a@b@c>", ""),
    ],
)
def test_addresses_are_found(text: str, address: str) -> None:
    assert address_in(text) == address


def test_the_first_address_of_a_text_is_found() -> None:
    assert first_address("the mailbox ann@example.org. is full") == "ann@example.org"
    assert first_address("no address @ all") == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"rfc822; ann@example.org", "ann@example.org"),
        (b"RFC822;ann@example.org", "ann@example.org"),
        (b"ann@example.org", "ann@example.org"),
        (b"smtp; 550 5.1.1 no; really", "550 5.1.1 no; really"),
        (b'"a;b"@example.org', '"a;b"@example.org'),
        (b"utf-8; b\\x{FC}cher@example.org", "bücher@example.org"),
        (b"utf-8; \\x{D800}\\x{110000}\\x{0A}x", "\\x{D800}\\x{110000} x"),
        (b"dns; mx.test", "mx.test"),
        (b"", ""),
    ],
)
def test_typed_values_lose_their_type(value: bytes, text: str) -> None:
    assert typed(value) == text


def test_codes_are_found_in_replies_only() -> None:
    assert status_in("550-5.1.1 no") == "5.1.1"
    assert status_in("host 10.5.1.1 said") == ""
    assert status_in("5.1.1.1") == ""
    assert code_in("smtp; 550 no") == 550
    assert code_in("said: 421-4.7.0 x") == 421
    assert code_in("after 5500 bytes of 250.5") == 0


def test_numbers_are_small() -> None:
    assert [number(text) for text in (" 7", "-1", "x", "", "²", 19 * "9")] == [7] + 5 * [None]


def test_text_is_on_one_line_and_short() -> None:
    assert one_line(b"a\r\n\tb\x00\x1b[2Jc") == "a b [2Jc"
    assert one_line(b"=?utf-8?b?w7w=?= =?iso-8859-1?q?=FC?=") == "üü"
    assert len(one_line(100_000 * b"x")) == TEXT_LIMIT
    assert one_line(b"\xfc") == "ü"


def test_groups_of_fields_are_parted_by_empty_lines() -> None:
    mixed = b"\n\nA: b\nA: c\nno field\n d: e\n\n\n\nB: c\r\n\r\nC: d\r\r"
    groups, count = groups_of(mixed, 9)
    assert groups == [{b"a": b"b"}, {b"b": b"c"}, {b"c": b"d"}]
    assert count == 3
    assert groups_of(b"A: b\n\n" * 10, most=2) == ([{b"a": b"b"}] * 2, 10)


def test_lines_that_are_no_fields_are_left_out() -> None:
    assert fields_of(b"A: b\r\n c\r\nx y: z\r\n: e\r\nB :\t d ") == [(b"a", b"b c"), (b"b", b"d")]


@pytest.mark.parametrize(
    ("value", "parameters"),
    [
        (b"x; a=b; c=\"d;e\"", {b"a": b"b", b"c": b"d;e"}),
        (b"x; a*=utf-8'en'%C3%BC", {b"a": "ü".encode()}),
        (b"x; a*0=b; a*2=d; a*1=c", {b"a": b"bcd"}),
        (b"x; a*0*=utf-8''%41; a*1=%41; a*2*=%42", {b"a": b"A%41B"}),
        (b"x; a=b; a=c", {b"a": b"b"}),
        (b"x; a*0=long; a=short", {b"a": b"long"}),
        (b"x; *=b; a**=c; a*x=d", {}),
        (b"", {}),
    ],
)  # fmt: skip
def test_parameters_are_joined_and_decoded(value: bytes, parameters: dict[bytes, bytes]) -> None:
    assert parameters_of(value) == parameters


@given(st.binary(max_size=100))
def test_any_bytes_are_fields(data: bytes) -> None:
    groups_of(data, 9)
    parameters_of(b"x;" + data)
    value_text(data)
    for text in (one_line(data), typed(data)):
        assert clean(text) == text
