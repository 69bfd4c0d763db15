"""The record and the policy of MTA-STS: what they mean, and that nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mailerq.rules.security import StsMode, StsPolicy
from mailerq.rules.sts import (
    MAX_AGE_SECONDS,
    MAX_PATTERNS,
    MAX_POLICY_BYTES,
    Document,
    Wrong,
    parse_policy,
    record_id,
)
from tests.support import least_seconds

GOOD = (
    b"version: STSv1\r\nmode: enforce\r\n"
    b"mx: mail.d.example\r\nmx: *.m.example\r\nmax_age: 86400\r\n"
)


def read(text: bytes) -> Document:
    found = parse_policy(text)
    assert isinstance(found, Document), found
    return found


def wrong(text: bytes) -> Wrong:
    found = parse_policy(text)
    assert isinstance(found, Wrong), found
    return found


@pytest.mark.parametrize(
    ("record", "number"),
    [
        (b"v=STSv1; id=20160831085700Z;", "20160831085700Z"),
        (b"v=STSv1;id=1", "1"),
        (b"v=STSv1;\tid=abc ; more=x:y ;", "abc"),
        (b"v=STSv1; more=x; id=a", "a"),
        (b"v=STSv1; id=a; id=b", "a"),
        (b"v=STSv1; id=" + b"a" * 32, "a" * 32),
        (b"v=STSv1; id=" + b"a" * 33, None),
        (b"v=STSv1; id=", None),
        (b"v=STSv1; id=a-b", None),
        (b"v=STSv1; id=a b", None),
        (b"v=STSv1; ID=a", None),
        (b"v=STSv1;", None),
        (b"v=STSv1", None),
        (b"v=stsv1; id=a", None),
        (b"v=STSv2; id=a", None),
        (b" v=STSv1; id=a", None),
        (b"v=STSv1;; id=a", None),
        (b"v=STSv1; id=a; nonsense", None),
        (b"v=STSv1; id=\xff", None),
    ],
)
def test_the_id_of_a_record(record: bytes, number: str | None) -> None:
    assert record_id([record]) == number


def test_other_records_do_not_count_and_two_are_none() -> None:
    good = b"v=STSv1; id=a;"
    assert record_id([]) is None
    assert record_id([b"v=spf1 -all", good, b"v=TLSRPTv1; rua=mailto:a@b"]) == "a"
    assert record_id([good, good]) is None
    assert record_id([good, b"v=STSv1; nonsense"]) is None


def test_a_policy_is_read_with_either_end_of_line() -> None:
    found = read(GOOD)
    assert found == read(GOOD.replace(b"\r\n", b"\n")) == read(b"\xef\xbb\xbf" + GOOD)
    assert found.mode is StsMode.ENFORCE and found.max_age == 86400
    assert found.patterns == ("mail.d.example", "*.m.example")
    assert found.lines[0] == "version: STSv1" and len(found.lines) == 5
    assert found.policy("d.example", "7") == StsPolicy(
        "d.example", "7", StsMode.ENFORCE, found.patterns
    )


def test_blank_lines_unknown_keys_and_repeated_keys_do_not_matter() -> None:
    text = GOOD.replace(b"mode:", b"\r\nodd: 1\r\n\r\nmode :")
    assert read(text + b"mode: none\r\nmax_age: 1\r\nversion: STSv2\r\n\r\n")[:3] == read(GOOD)[:3]


def test_names_are_compared_in_one_form() -> None:
    text = GOOD.replace(b"mail.d.example", "MÄIL.d.Example.".encode())
    assert read(text).patterns[0] == "xn--mil-qla.d.example"


def test_an_address_is_no_mistake_and_matches_nothing() -> None:
    for address in (b"192.0.2.1", b"[192.0.2.1]", b"2001:db8::1", b"*.192.0.2.1"):
        text = b"version: STSv1\nmode: enforce\nmax_age: 9\nmx: " + address + b"\n"
        policy = read(text).policy("d.example", "1")
        assert policy.mx_patterns == ()
        assert not policy.allows("192.0.2.1") and not policy.allows("mx.d.example")


def test_a_policy_of_mode_none_needs_no_hosts() -> None:
    assert read(b"version: STSv1\nmode: none\nmax_age: 0").patterns == ()
    assert wrong(b"version: STSv1\nmode: testing\nmax_age: 0").text == "mx is missing"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (b"version: STSv1\r\n", b"", 0),
        (b"version: STSv1", b"version: STSv2", 1),
        (b"version: STSv1", b"Version: STSv1", 0),
        (b"version: STSv1", b"<!doctype html>", 1),
        (b"mode: enforce", b"mode: Enforce", 2),
        (b"mode: enforce", b"mode:", 2),
        (b"mode: enforce", b"mode", 2),
        (b"mode: enforce", b"mode: \xff", 2),
        (b"mode: enforce\r\n", b"", 0),
        (b"mail.d.example", b"*", 3),
        (b"mail.d.example", b"", 3),
        (b"mail.d.example", b"*mail.d.example", 3),
        (b"mail.d.example", b"a.*.d.example", 3),
        (b"mail.d.example", b"*.*.d.example", 3),
        (b"mail.d.example", b"a..d.example", 3),
        (b"mail.d.example", b"a d.example", 3),
        (b"mail.d.example", b"a/d.example", 3),
        (b"mail.d.example", b"a." * 200 + b"example", 3),
        (b"mail.d.example", "\u202e.example".encode(), 3),
        (b"86400", b"-1", 5),
        (b"86400", b"1 day", 5),
        (b"86400", b"1e3", 5),
        (b"86400", b"99999999999", 5),
        (b"86400", "٣".encode(), 5),
        (b"max_age: 86400\r\n", b"", 0),
    ],
)
def test_what_is_no_policy_says_in_which_line(old: bytes, new: bytes, line: int) -> None:
    found = wrong(GOOD.replace(old, new))
    assert found.line == line and str(found).isprintable()


def test_a_policy_is_valid_for_a_year_at_most() -> None:
    assert read(GOOD.replace(b"86400", b"31557600")).max_age == MAX_AGE_SECONDS
    assert read(GOOD.replace(b"86400", b"9999999999")).max_age == MAX_AGE_SECONDS
    assert read(GOOD.replace(b"86400", b"0")).max_age == 0


def test_a_policy_has_bounds() -> None:
    many = b"".join(b"mx: h%d.example\n" % n for n in range(MAX_PATTERNS + 1))
    assert wrong(GOOD + many).line > MAX_PATTERNS
    assert read(GOOD + b"mx: h.example\n" * (MAX_PATTERNS - 2)).patterns[2:] == ("h.example",)
    assert wrong(GOOD + b"x" * MAX_POLICY_BYTES).line == 0


@pytest.mark.parametrize(
    "unit",
    [b"mx: a\n", b"\n", b":", b"a:\n", b" ", b"mx: " + b"a." * 120 + b"\n", "mx: ä\n".encode()],
)
def test_hostile_policies_are_read_quickly(unit: bytes) -> None:
    text = (unit * MAX_POLICY_BYTES)[:MAX_POLICY_BYTES]
    assert least_seconds(lambda: parse_policy(text)) < 0.25
    assert least_seconds(lambda: record_id([text, b"v=STSv1;" + text])) < 0.25


@given(st.binary(max_size=2000) | st.lists(st.sampled_from(GOOD.split(b"\r\n"))).map(b"\n".join))
@example(b"\xff")
def test_any_bytes_are_a_policy_or_a_problem_with_its_line(text: bytes) -> None:
    found = parse_policy(text)
    if isinstance(found, Wrong):
        assert 0 <= found.line <= text.count(b"\n") + 1
        assert str(found).isprintable()
    else:
        assert found.mode is StsMode.NONE or b"mx" in text
        assert 0 <= found.max_age <= MAX_AGE_SECONDS
        assert parse_policy("\n".join(found.lines).encode()) == found


@given(st.lists(st.binary(max_size=100) | st.just(b"v=STSv1; id=a")))
def test_any_records_have_an_id_or_none(records: list[bytes]) -> None:
    found = record_id(records)
    assert found is None or (0 < len(found) <= 32 and found.isalnum() and found.isascii())


label = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
name = st.lists(label, min_size=1, max_size=4).map(".".join)


@given(name, name, label)
def test_a_star_stands_for_one_label(base: str, other: str, one: str) -> None:
    text = f"version: STSv1\nmode: enforce\nmax_age: 1\nmx: *.{base}\n".encode()
    policy = read(text).policy("d.example", "1")
    if not policy.mx_patterns:
        return  # an address
    assert policy.allows(f"{one}.{base}") and policy.allows(f"{one}.{base}.".upper())
    assert not policy.allows(base)
    assert not policy.allows(f"a.{one}.{base}")
    assert not policy.allows(f"{one}{base}")
    if not other.endswith(f".{base}"):
        assert not policy.allows(other)


@given(name, name)
def test_a_host_matches_only_itself(host: str, other: str) -> None:
    text = f"version: STSv1\nmode: enforce\nmax_age: 1\nmx: {host}\n".encode()
    policy = read(text).policy("d.example", "1")
    if policy.mx_patterns:
        assert policy.allows(host) and policy.allows(f"{host}.")
    assert policy.allows(other) is (other == host and bool(policy.mx_patterns))
