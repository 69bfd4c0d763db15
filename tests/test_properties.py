"""The table of properties, and the misspelt names that it tells from a sender's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq import properties as table
from mailerq.message import Message, Result
from mailerq.properties import (
    KNOWN,
    PROPERTIES,
    REMEMBERED_LENGTH,
    REMEMBERED_LIMIT,
    UNKNOWN_LIMIT,
    misspellings,
)
from mailerq.spelling import LENGTH_LIMIT, Spelling
from tests.support import least_seconds

NAMES = st.sampled_from(sorted(KNOWN))


@given(NAMES, st.data())
def test_a_slip_in_a_long_name_is_found(name: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(name) - 2))
    letter = data.draw(st.sampled_from("abcxyz"))
    swapped = name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    forms = [name[:at] + letter + name[at:], name.upper(), name.replace("-", "_"), swapped]
    for form in forms:
        if form not in KNOWN:
            assert Spelling([name]).meant(form) == name


@given(NAMES)
def test_a_known_name_is_no_misspelling(name: str) -> None:
    assert list(misspellings({name: {}})) == []


@pytest.mark.parametrize(
    "name",
    ["my-id", "campaign", "customer_id", "date", "time", "list", "id", "x", "", "type", "name",
     "subject", "user", "bounce", "X-Campaign", "meta", "options", "template", "language"],
)  # fmt: skip
def test_names_of_applications_are_left_alone(name: str) -> None:
    assert list(misspellings({name: 1})) == []


def test_names_are_found_each_time_and_few_are_remembered() -> None:
    for number in range(2 * REMEMBERED_LIMIT):
        assert list(misspellings({f"my-{number}": 1})) == []
        assert len(table._well_spelt) <= REMEMBERED_LIMIT
    assert list(misspellings({"x" * (REMEMBERED_LENGTH + 1): 1})) == []
    assert max(map(len, map("".join, table._well_spelt))) <= REMEMBERED_LENGTH
    for _ in range(2):
        assert list(misspellings({"my-1": 1})) == []
        assert list(misspellings({"my-1": 1, "tagss": []})) == [("tagss", "tags")]
        assert list(misspellings({"my-1": 1, "queues": {"sucess": 1}})) != []


def test_keys_of_objects_are_looked_at_too() -> None:
    found = misspellings({
        "queues": {"sucess": None, "failure": "f"}, "smarthost": {"host-name": "h"}, "dsn": []
    })  # fmt: skip
    assert list(found) == [
        ("smarthost.host-name", "smarthost.hostname"),
        ("queues.sucess", "queues.success"),
    ]


def test_many_long_unknown_names_take_little_time() -> None:
    many = {f"recipient{number:0{LENGTH_LIMIT - 9}}": 1 for number in range(100_000)}
    assert list(misspellings({**many, "queues": many})) == []
    assert least_seconds(lambda: list(misspellings({**many, "queues": many}))) < 0.5
    assert len(list(misspellings({f"tag{c}": 1 for c in map(chr, range(0x4E00, 0x5E00))}))) <= (
        UNKNOWN_LIMIT
    )


def test_the_table_says_something_of_each_property_and_key() -> None:
    assert len(KNOWN) == len(PROPERTIES)
    for known in PROPERTIES:
        for text in (known.meaning, *(key.meaning for key in known.keys)):
            assert text.endswith(".")
        assert known.used == (known.group != "Without effect yet")


def test_the_table_has_the_keys_of_a_result() -> None:
    result = Result(
        attempt=1, type="t", state="s", result="r", time="now", local_ip="l", remote_ip="r",
        mta="m", code=1, status="s", description="d", messages=1, kind="c", rule="r",
        authentication="plain", cipher={}, certificate={},
    )  # fmt: skip
    assert {key.name for key in KNOWN["results"].keys} == set(result.to_dict())


def test_all_that_is_wrong_with_a_message_is_said() -> None:
    message = Message({
        "recipeint": "a@b.test", "ips": "x", "retries": [-1], "delayed": "soon",
        "queues": {"failure": "a\0b"},
    })  # fmt: skip
    assert list(message.problems()) == [
        "property retries: expected an array of seconds, found an array",
        "property ips: expected an array of strings, found a string",
        "property recipient: is missing; is 'recipeint' a misspelling of it?",
        "property delayed: 'soon' is not a time of the form YYYY-MM-DD HH:MM:SS",
        "property queues: the name for 'failure' holds a character that cannot be printed",
    ]
    assert message.problem() == next(message.problems())
    assert Message({"recipient": 5}).problem() == (
        "property recipient: expected a string, found a number"
    )


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.just("2026-01-02 03:04:05"),
    st.just([]), st.just({}), st.just({"failure": "a"}), st.just({"failure": "a\0b"}),
)  # fmt: skip


@given(st.dictionaries(st.one_of(NAMES, st.text(max_size=5)), VALUES, max_size=6))
def test_a_message_has_a_problem_if_any_property_has(more: dict[str, object]) -> None:
    for properties in (more, {"recipient": "a@b.test", **more}):
        message = Message(properties)
        assert message.problem() == next(message.problems(), None)
