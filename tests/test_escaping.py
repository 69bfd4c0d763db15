"""Text from outside in logs and on terminals."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.escaping import BETWEEN, escape, escape_field
from tests.support import unescape

ANY_TEXT = st.text(st.characters())
"""All there is, lone surrogates among it."""


@given(ANY_TEXT)
def test_what_was_escaped_can_be_read_back(text: str) -> None:
    assert unescape(escape(text)) == text
    assert unescape(escape_field(text)) == text


@given(ANY_TEXT)
def test_escaped_text_is_printable_on_one_line(text: str) -> None:
    for shown in (escape(text), escape_field(text)):
        assert all(char == " " or unicodedata.category(char)[0] not in "CZ" for char in shown)
        shown.encode()
    assert not set(BETWEEN) & set(escape_field(text))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, as it is <a@b.test>", "plain text, as it is <a@b.test>"),
        ("Grüße, 你好", "Grüße, 你好"),
        ("\x1b[31m\r\n\x7f\x85", r"\x1b[31m\x0d\x0a\x7f\x85"),
        ("\\x1b", r"\\x1b"),
        ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),
        ("a\u200bb\u2060c\ufeff", r"a\u200bb\u2060c\ufeff"),
        ("a\xa0b\u3000c\u2028\u2029", r"a\xa0b\u3000c\u2028\u2029"),
        ("\u3164\u115f\u2800\ufe0f", r"\u3164\u115f\u2800\ufe0f"),
        ("\U000e0041\ud800\ue000", r"\U000e0041\ud800\ue000"),
    ],
)
def test_what_deceives_a_reader_is_escaped(text: str, shown: str) -> None:
    assert escape(text) == shown
