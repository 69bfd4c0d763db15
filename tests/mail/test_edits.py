"""Edits of a header, against a model."""

from __future__ import annotations

import email
import email.policy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mailerq.mail.edits import apply_edits, problems
from mailerq.mail.fields import FieldError, make_field

NAMES = st.sampled_from(["Subject", "subject", "X-A", "x-a", "To", "X-B", "X-C"])
TEXTS = st.text(st.characters(codec="ascii", min_codepoint=33, max_codepoint=126), max_size=8)
SOME = st.one_of(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
MAPS = st.dictionaries(NAMES, SOME, max_size=3)
EDITS = st.fixed_dictionaries(
    {},
    optional={
        "remove": st.one_of(NAMES, st.lists(NAMES, max_size=3)),
        "replace": MAPS,
        "update": MAPS,
        "prepend": MAPS,
        "append": MAPS,
        "add": MAPS,
    },
)
HEADERS = st.lists(st.tuples(NAMES, TEXTS), max_size=6)

Fields = list[tuple[str, str]]


def several(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


def model(fields: Fields, edits: dict[str, Any]) -> Fields:
    """What the page about messages says, in other words."""
    gone = {name.lower() for name in several(edits.get("remove", []))}
    fields = [field for field in fields if field[0].lower() not in gone]
    for kind in ("replace", "update"):
        last = {name.lower(): (name, value) for name, value in edits.get(kind, {}).items()}
        for lower, (name, value) in last.items():
            places = [at for at, field in enumerate(fields) if field[0].lower() == lower]
            new = [(name, text) for text in several(value)]
            if places:
                kept = [field for field in fields[places[0] :] if field[0].lower() != lower]
                fields = [*fields[: places[0]], *new, *kept]
            elif kind == "replace":
                fields = [*fields, *new]
    front = [(name, text) for name, value in edits.get("prepend", {}).items()
             for text in several(value)]  # fmt: skip
    back = [(name, text) for kind in ("append", "add")
            for name, value in edits.get(kind, {}).items() for text in several(value)]  # fmt: skip
    return [*front, *fields, *back]


def parsed(head: bytes) -> Fields:
    lines = head.decode().split("\r\n")
    assert lines.pop() == ""
    return [(name, value) for name, _, value in (line.partition(": ") for line in lines)]


@settings(max_examples=500)
@given(HEADERS, EDITS)
def test_edits_do_what_the_model_does(fields: Fields, edits: dict[str, Any]) -> None:
    head = "".join(f"{name}: {value}\r\n" for name, value in fields).encode()
    assert list(problems(edits)) == []
    assert parsed(apply_edits(head, edits)) == model(fields, edits)


def test_a_folded_field_is_replaced_whole_and_others_stay_as_they_are() -> None:
    head = b"A: x\r\n y\r\nB : 1\r\n\t2\r\njunk\r\nA: z\r\n"
    assert apply_edits(head, {"update": {"a": "1", "C": "2"}}) == (
        b"a: 1\r\nB : 1\r\n\t2\r\njunk\r\n"
    )


@pytest.mark.parametrize(
    ("edits", "problem"),
    [
        ({"remove": 1}, "property headers.remove: expected a string or an array of strings"),
        ({"remove": ["a", 1]}, "property headers.remove: expected a string or an array of strings"),
        ({"add": ["a"]}, "property headers.add: expected an object"),
        ({"add": {"a b": "c"}}, "property headers.add: 'a b' is no name of a header field"),
        ({"add": {"a:": "c"}}, "property headers.add: 'a:' is no name of a header field"),
        ({"add": {"": "c"}}, "property headers.add: '' is no name of a header field"),
        ({"replace": {"a": "x\r\nBcc: y"}}, "property headers.replace.a: holds a line end"),
        ({"prepend": {"a": ["x", None]}}, "property headers.prepend.a: expected a string"),
        ({"add": {f"x{number}": "" for number in range(1001)}}, "property headers: names more"),
    ],
)
def test_what_is_no_edit_is_named(edits: dict[str, Any], problem: str) -> None:
    assert next(problems(edits)).startswith(problem)


@settings(max_examples=500)
@given(st.sampled_from(["Subject", "X-A", "From", "Content-Disposition", "Message-ID"]), st.text())
def test_a_value_makes_one_field_whatever_the_value_holds(name: str, value: str) -> None:
    try:
        field = make_field(name, value)
    except FieldError:
        return
    assert field.isascii() and field.endswith(b"\r\n")
    lines = field.split(b"\r\n")[:-1]
    assert lines[0].startswith(name.encode() + b":")
    assert all(line[:1] == b" " and line.strip() for line in lines[1:])
    assert max(map(len, lines)) <= 998
    assert not set(field.replace(b"\r\n", b"")) & {0, 10, 13}


@settings(max_examples=300)
@given(st.text(st.characters(codec="utf-8", categories=["L", "N", "Zs"]), min_size=1, max_size=400))
def test_a_subject_is_read_as_it_was_written(value: str) -> None:
    subject = " ".join(value.split())
    mail = make_field("Subject", subject) + b"\r\n"
    read = email.message_from_bytes(mail, policy=email.policy.default)["subject"]
    assert " ".join(str(read).split()) == subject
