"""What plugins see of a message and what becomes of what they change, incoming and outgoing."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mailerq.message import Message
from mailerq.plugins import GIVEN_UP, Connection, Reject
from tests.plugins.kit import SOURCES, Calls, build, connected, install


class Editors:
    """Copies of edit.c, "a" and "b", and a connection to give messages to."""

    def __init__(self, directory: Path, connection: Connection) -> None:
        self.connection = connection
        self._libraries = [ctypes.CDLL(str(directory / f"{name}.so")) for name in "ab"]

    def script(self, *scripts: str) -> None:
        for library, words in zip(self._libraries, (*scripts, "", ""), strict=False):
            library.script(words.encode())


@pytest.fixture
async def editors(tmp_path: Path) -> AsyncIterator[Editors]:
    plugin = build(SOURCES / "edit.c", "-ljson-c")
    install(tmp_path, a=plugin, b=plugin)
    async with connected(tmp_path) as (_, _, connection):
        yield Editors(tmp_path, connection)


def mail(**properties: Any) -> Message:
    return Message({"envelope": "a@b.test", "recipient": "c@d.test", **properties}, b"x\r\n")


async def test_getters_show_the_message(editors: Editors, calls: Calls) -> None:
    editors.script("show")
    message = mail()
    assert await editors.connection.message(message) is None
    assert message.to_dict() == mail().to_dict()
    assert calls.take() == ["a envelope a@b.test", "a recipient c@d.test", "a mime x\r\n"]


async def test_unset_properties_are_null_and_the_null_sender_is_not(
    editors: Editors, calls: Calls
) -> None:
    editors.script("show")
    await editors.connection.out_data(Message({"recipient": "c@d.test"}))
    await editors.connection.message(Message({"recipient": "c@d.test", "envelope": ""}, b""))
    assert calls.take() == [
        "a envelope NULL",
        "a recipient c@d.test",
        "a mime NULL",
        "a envelope ",
        "a recipient c@d.test",
        "a mime ",
    ]


@pytest.mark.parametrize("before", ["", "json ", "suspend "])
async def test_setters_change_what_is_published(editors: Editors, before: str) -> None:
    editors.script(f"{before}envelope new@b.test recipient new@d.test mime y local", "json")
    message = mail(tags=["x"])
    assert await editors.connection.message(message) is None
    assert message.to_dict() == {
        "envelope": "new@b.test",
        "recipient": "new@d.test",
        "mime": "y",
        "tags": ["x"],
    }
    assert message.local


@pytest.mark.parametrize("after", ["", " json"])
async def test_getters_and_json_are_aliases(editors: Editors, calls: Calls, after: str) -> None:
    editors.script(
        f"envelope new@b.test{after} show", 'set mime "z" mime y recipient e@f.test dump'
    )
    message = mail()
    assert await editors.connection.message(message) is None
    assert message.body == b"y"
    shown = calls.take()
    assert shown[0] == "a envelope new@b.test"
    assert json.loads(shown[-1].removeprefix("b ")) == {
        "envelope": "new@b.test",
        "recipient": "e@f.test",
        "mime": "y",
    }


async def test_setters_can_unset(editors: Editors, calls: Calls) -> None:
    editors.script("envelope null mime null show")
    message = mail()
    assert await editors.connection.message(message) is None
    assert message.to_dict() == {"recipient": "c@d.test"}
    assert calls.take() == ["a envelope NULL", "a recipient c@d.test", "a mime NULL"]


async def test_body_is_bytes(editors: Editors) -> None:
    editors.script("bytes", "json")
    message = mail()
    assert await editors.connection.message(message) is None
    assert message.body == b"odd\0body\xff\r\n"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), children, max_size=4)
    ),
    max_leaves=12,
)


async def test_json_survives_the_journey_through_c(editors: Editors) -> None:
    examples: list[dict[str, Any]] = []

    @settings(max_examples=200, database=None)
    @given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), VALUES, max_size=6))
    def draw(properties: dict[str, Any]) -> None:
        # Some names have a meaning, and their values a type.
        examples.append({f"x{name}": value for name, value in properties.items()})

    draw()
    examples.append({"deep": json.loads("[" * 500 + "]" * 500), "half": "\ud800"})
    editors.script("json", "suspend json")
    for properties in examples:
        properties.update(envelope="a@b.test", recipient="c@d.test")
        message = Message(dict(properties), b"\xff\0x")
        assert await editors.connection.message(message) is None
        assert repr_sorted(message.properties) == repr_sorted(properties)
        assert message.body == b"\xff\0x"


def repr_sorted(properties: dict[str, Any]) -> str:
    """A text that tells 1 from 1.0 and True, and 0.0 from -0.0."""
    return repr(sorted(properties.items()))


async def test_properties_are_added_changed_and_deleted(editors: Editors) -> None:
    editors.script(
        'set x-a {"b":[1,2.5,null,true,"z"]} number big del tags set envelope "n@b.test"',
        "set c 1e300 set d 5.0 set e null",
    )
    message = mail(tags=["x"], other=1)
    assert await editors.connection.message(message) is None
    assert repr(message.properties.pop("d")) == "5.0"
    assert message.properties == {
        "envelope": "n@b.test",
        "recipient": "c@d.test",
        "other": 1,
        "x-a": {"b": [1, 2.5, None, True, "z"]},
        "big": 2**64 - 1,
        "c": 1e300,
        "e": None,
    }


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("set envelope 5", "property envelope: expected a string, found a number"),
        ("set tags {}", "property tags: expected an array of strings, found an object"),
        ("set results [1]", "property results: expected an array of objects, found an array"),
        ("set mime 5", "property mime: expected a string or an object, found a number"),
        ("set delayed tomorrow", "property recipient: is missing"),
        ("del recipient", "property recipient: is missing"),
        ("nan x", "property x: is not a finite number"),
        ("latin x", "property x: is not UTF-8"),
        ("latin envelope", "property envelope: is not UTF-8"),
        ("envelope a\rb", "property envelope: holds a control character"),
        ("json recipient a\nb", "property recipient: holds a control character"),
        ("recipient null", "property recipient: is missing"),
        ("recipient nobody", "property recipient: "),
        ("envelope a@b@c", "property envelope: "),
        ("json recipient a@b..c", "property recipient: "),
        ('set envelope "a@"', "property envelope: "),
        ('set recipient "<c@d.test>"', "property recipient: "),
    ],
)
async def test_wrong_types_fail_the_event_and_name_the_plugin(
    editors: Editors, calls: Calls, words: str, problem: str
) -> None:
    if "tomorrow" in words:
        words, problem = (
            'set delayed "tomorrow"',
            "property delayed: 'tomorrow' is not a time of the form YYYY-MM-DD HH:MM:SS",
        )
    editors.script("json", words)
    message = mail()
    assert await editors.connection.message(message) == GIVEN_UP
    (warning,) = calls.take_warnings()
    assert warning.startswith(f"b {problem}")
    assert warning.endswith("; set in mq_smtp_in_message")


async def test_an_address_that_no_plugin_changed_is_left_alone(editors: Editors) -> None:
    editors.script("set seen 1", "envelope null")
    message = Message({"envelope": "odd", "recipient": "odd", "tags": ["x"]}, b"x")
    assert await editors.connection.message(message) is None
    assert message.properties == {"recipient": "odd", "tags": ["x"], "seen": 1}


async def test_reject_keeps_what_was_set_before(editors: Editors) -> None:
    editors.script("set seen 1 reject", "set seen 2")
    message = mail()
    assert await editors.connection.out_data(message) == Reject(450, "4.2.0 Later")
    assert message.properties["seen"] == 1


async def test_outgoing_setters_change_the_attempt_only(editors: Editors, calls: Calls) -> None:
    editors.script("mime new envelope n@b.test recipient n@d.test show")
    attempt, stored = mail(), mail(data={"name": "Ann"})
    assert await editors.connection.out_data(attempt, stored) is None
    assert attempt.body == b"new"
    assert attempt.properties == mail().properties
    assert stored.to_dict() == mail(data={"name": "Ann"}).to_dict()
    assert calls.take() == ["a envelope a@b.test", "a recipient c@d.test", "a mime new"]
    assert calls.take_warnings() == [
        f"a MQ_Set{name} in mq_smtp_out_data is too late; ignored"
        for name in ("Envelope", "Recipient")
    ]


async def test_outgoing_json_is_the_stored_document(editors: Editors, calls: Calls) -> None:
    editors.script('set seen 1 set envelope "n@b.test" show dump')
    attempt, stored = Message({"recipient": "c@d.test"}, b"personal"), mail()
    assert await editors.connection.out_data(attempt, stored) is None
    assert stored.properties["seen"] == 1
    assert (attempt.body, stored.body) == (b"personal", b"x\r\n")
    assert attempt.properties == {"recipient": "c@d.test"}
    assert calls.take()[:3] == ["a envelope NULL", "a recipient c@d.test", "a mime personal"]


async def test_body_from_the_json_supplies_a_missing_one(editors: Editors, calls: Calls) -> None:
    editors.script('set mime "made"', "show")
    attempt, stored = Message({"recipient": "c@d.test"}), Message({"recipient": "c@d.test"})
    assert await editors.connection.out_data(attempt, stored) is None
    assert (attempt.body, stored.body) == (b"made", b"made")
    assert "b mime made" in calls.take()


async def test_last_body_wins_over_older_json(editors: Editors) -> None:
    editors.script("json", "mime new json")
    attempt = mail()
    assert await editors.connection.out_data(attempt) is None
    assert attempt.body == b"new"


async def test_after_the_body_was_sent_only_the_json_can_change(
    editors: Editors, calls: Calls
) -> None:
    editors.script("mime new set seen 1 local reject")
    attempt, stored = mail(), mail()
    assert await editors.connection.out_sent(attempt, stored) is None
    assert attempt.body == b"x\r\n"
    assert stored.properties["seen"] == 1
    assert not stored.local and not attempt.local
    assert calls.take() == ["a local no"]
    assert calls.take_warnings() == [
        f"a {name} in mq_smtp_out_sent is too late; ignored" for name in ("MQ_SetMime", "MQ_Reject")
    ]


async def test_mail_that_no_plugin_looks_into_is_left_alone(editors: Editors) -> None:
    message = mail()
    properties = message.properties
    assert await editors.connection.message(message) is None
    assert message.properties is properties
    assert math.isfinite(len(message.to_json()))
