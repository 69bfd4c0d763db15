"""The trace field: signed, folded, and good for a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.mail.trace import VALUE_LIMIT, Trace, trace_field, verify_trace
from mailerq.mail.verp import Key, Problem, parse_keys

NOW = 1_750_000_000.0
DAY = 86400.0
KEYS = parse_keys("a AeJ2xBrJJPd1vlTV7pVf3OlB")
OTHERS = parse_keys("b 0000000000000000000000000\na 1111111111111111111111111")


def value_of(field: bytes) -> bytes:
    return field.partition(b":")[2]


def made(message_id: str = "7f", recipient: str = "ann@example.org") -> bytes:
    return trace_field("X-Trace", message_id, recipient, KEYS, now=NOW)


def read(value: bytes, keys: tuple[Key, ...] = KEYS, now: float = NOW) -> Trace | Problem | None:
    return verify_trace(value, keys, now=now, max_age=30 * DAY)


@given(st.text(max_size=60).map(lambda text: text.replace("\0", "")), st.text(max_size=120))
def test_what_goes_in_comes_out(message_id: str, recipient: str) -> None:
    field = made(message_id, recipient)
    assert field.isascii()
    assert field.startswith(b"X-Trace:")
    lines = field.removesuffix(b"\r\n").split(b"\r\n")
    assert max(map(len, lines)) <= 78
    assert all(line.startswith(b" ") for line in lines[1:])
    found = read(value_of(field))
    assert isinstance(found, Trace)
    shown = [text.encode(errors="replace").decode() for text in (message_id, recipient)]
    assert [found.message_id, found.recipient] == shown


@pytest.mark.parametrize("blank", [b"", b" ", b"\r\n\t", b"  \n"])
def test_a_field_may_be_folded_anew(blank: bytes) -> None:
    value = blank.join(value_of(made()).split())
    assert isinstance(read(value), Trace)


def test_a_change_anywhere_is_noticed() -> None:
    value = b"".join(value_of(made()).split())
    for at in range(len(value)):
        changed = value[:at] + (b"b" if value[at : at + 1] != b"b" else b"c") + value[at + 1 :]
        assert not isinstance(read(changed), Trace)


def test_other_keys_prove_nothing() -> None:
    value = value_of(made())
    assert read(value, OTHERS) is Problem.FORGED
    assert read(value, OTHERS[:1]) is Problem.FORGED
    assert isinstance(read(value, (OTHERS[0], *KEYS)), Trace)


def test_a_field_expires() -> None:
    value = value_of(made())
    assert isinstance(read(value, now=NOW + 30 * DAY), Trace)
    assert read(value, now=NOW + 32 * DAY) is Problem.EXPIRED
    assert isinstance(read(value, now=NOW - DAY), Trace), "another host's clock may be ahead"
    assert read(value, now=NOW - 4 * DAY) is Problem.EXPIRED


@pytest.mark.parametrize("value", [b"", b"x", b"a.b.c", VALUE_LIMIT * b"a" + b".", b"\xff.\0"])
def test_other_values_are_no_traces(value: bytes) -> None:
    assert read(value) is None


@given(st.binary(max_size=80))
def test_any_value_is_read(value: bytes) -> None:
    assert not isinstance(read(value), Trace)
