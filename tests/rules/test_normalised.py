"""Replies are counted by their reasons, not by their addresses and numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.rules.normalised import Unclassified, normalised


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("421 4.7.0 [192.0.2.7] too much", "421 4.7.0 [IP] too much"),
        ("421 4.7.0 [2001:db8::7] too much", "421 4.7.0 [IP] too much"),
        ("550 5.1.1 <a.b+c@d.test>: unknown", "550 5.1.1 ADDRESS: unknown"),
        ("450 since 2026-11-26 10:11:12", "450 since TIME"),
        ("450 at 10:11:12 again", "450 at TIME again"),
        ("450 try https://d.test/x?id=5 again", "450 try URL again"),
        ("450 queued as 4Xy7Zk2Qw9z", "450 queued as ID"),
        ("450 id d41d8cd98f00b204e9800998ecf8427e", "450 id ID"),
        ("450 1732612345 is the number", "450 N is the number"),
        ("450   several\tblanks ", "450 several blanks"),
        ("554 5.7.1 AUP#I-1310 is kept", "554 5.7.1 ID is kept"),
        ("550 5.7.606 Access denied (S3150)", "550 5.7.606 Access denied (S3150)"),
    ],
)
def test_what_differs_from_reply_to_reply_becomes_a_mark(reply: str, expected: str) -> None:
    assert normalised(reply) == expected


@given(st.text())
def test_a_text_is_short_and_keeps_its_form(reply: str) -> None:
    text = normalised(reply)
    assert len(text) <= 200 and text == " ".join(text.split())


def test_the_oldest_texts_are_dropped() -> None:
    texts = Unclassified(most=10)
    for letter in "abcdefghijklmnopqrstuvwxyz":
        texts.add(f"450 reason {letter}")
    texts.add("450 reason z")
    assert len(texts) == 10
    assert texts.most(2) == {"450 reason z": 2, "450 reason q": 1}
    texts.clear()
    assert texts.most(2) == {}
