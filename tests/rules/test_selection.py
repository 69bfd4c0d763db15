"""Selections fit the messages that they describe."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.message import encode_properties, format_time
from mailerq.rules.destinations import place_of
from mailerq.rules.selection import Matcher, Selection, last_error, like

NOW = 1_700_000_000.0


def fits(document: dict[str, Any], due: float = NOW, **criteria: Any) -> bool:
    matcher = Matcher(Selection(**criteria), NOW)
    return matcher.fits(7, due, False, encode_properties(document))


MAIL = {
    "envelope": "News-7@Sender.test",
    "recipient": "ann@Example.COM",
    "tags": ["Run-1", "all"],
    "received": format_time(NOW - 3600),
    "results": [
        {"attempt": 1, "type": "lost"},
        {"code": 450, "status": "4.2.0", "description": "Mailbox busy"},
    ],
}


@pytest.mark.parametrize(
    ("criteria", "expected"),
    [
        ({}, True),
        ({"ids": (6, 7)}, True),
        ({"ids": (6,)}, False),
        ({"senders": ("news-7@sender.test",)}, True),
        ({"senders": ("<news-*@sender.test>",)}, True),
        ({"senders": ("sender.test",)}, False),
        ({"senders": ("",)}, False),
        ({"recipients": ("bob@example.com", "ANN@example.com")}, True),
        ({"domains": ("example.com",)}, True),
        ({"domains": ("@Example.com",)}, True),
        ({"domains": ("*.com",)}, True),
        ({"domains": ("ample.com", "com")}, False),
        ({"tags": ("run-1",)}, True),
        ({"tags": ("run-1", "other"), "domains": ("example.com",)}, True),
        ({"tags": ("run",)}, False),
        ({"tags": ("all",), "domains": ("other.test",)}, False),
        ({"errors": ("450 4.2.0 mailbox",)}, True),
        ({"errors": ("lost",)}, False),
        ({"older": 3600.0}, True),
        ({"older": 3601.0}, False),
        ({"younger": 3601.0}, True),
        ({"younger": 3600.0}, False),
        ({"older": 60.0, "younger": 7200.0}, True),
        ({"held": True}, False),
        ({"held": False}, True),
        ({"waits": True}, False),
    ],
)
def test_a_message_fits_what_describes_it(criteria: dict[str, Any], expected: bool) -> None:
    assert fits(MAIL, **criteria) is expected


def test_a_message_waits_after_a_failed_attempt_and_before_the_next() -> None:
    assert fits(MAIL, due=NOW + 1, waits=True)
    assert not fits({**MAIL, "results": []}, due=NOW + 1, waits=True)


def test_without_a_time_in_the_document_the_age_counts_from_the_due_time() -> None:
    assert fits({"recipient": "a@b.test"}, due=NOW - 60, older=60.0)
    assert not fits({"recipient": "a@b.test"}, due=NOW + 60, older=1.0)
    assert fits({"received": 7, "seen": format_time(NOW - 60)}, due=NOW, older=60.0)


def test_the_null_sender_is_a_sender() -> None:
    assert fits({"envelope": ""}, senders=("<>",))
    assert fits({"recipient": "a@b.test"}, senders=("<>",))


def test_a_domain_is_found_in_either_spelling() -> None:
    for given_, written in (
        ("münchen.test", "xn--mnchen-3ya.test"),
        ("MÜNCHEN.test", "münchen.test"),
    ):
        assert fits({"recipient": f"a@{written}"}, domains=(given_,))
    assert fits({"recipient": "a@münchen.test"}, domains=("xn--mnchen-3ya.test",))


@pytest.mark.parametrize(
    "document", [b"", b"{", b"[]", b'{"recipient": 7}', b"\xff", b'{"tags": "x", "results": 1}']
)
def test_a_damaged_document_fits_only_what_does_not_read_it(document: bytes) -> None:
    assert Matcher(Selection(), NOW).fits(1, NOW, False, document)
    for criteria in ({"tags": ("x",)}, {"domains": ("b.test",)}, {"errors": ("1",)}):
        assert not Matcher(Selection(**criteria), NOW).fits(1, NOW, False, document)  # type: ignore[arg-type]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
words = st.text(alphabet="ab.*@Ü", max_size=6)
names = st.text(alphabet="ab", min_size=1, max_size=3)
domains = st.builds("{}.{}".format, names, names) | st.sampled_from(
    ["münchen.test", "via", "x" * 250]
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "recipient": st.builds("{}@{}".format, names, domains) | json_values,
        "envelope": json_values,
        "tags": json_values,
        "results": json_values,
        "received": json_values,
        "ips": st.lists(st.sampled_from(["192.0.2.1", "2001:db8::1", "\x01"]), max_size=40),
        "smarthost": st.fixed_dictionaries({"hostname": domains}) | json_values,
    },
)


@given(
    documents,
    st.builds(
        Selection,
        domains=st.tuples(words),
        tags=st.tuples(words),
        errors=st.tuples(words),
        older=st.none() | st.floats(0, 1e12),
    ),
)
def test_no_document_is_too_strange(document: dict[str, Any], selection: Selection) -> None:
    Matcher(selection, NOW).fits(1, NOW, False, encode_properties(document))


@given(documents, domains)
def test_the_ranges_of_a_selection_have_all_its_mail(document: dict[str, Any], domain: str) -> None:
    selection = Selection(domains=(domain,))
    key = place_of(document).destination
    ranges = selection.ranges()
    if ranges is None:
        return
    within = [each for each in ranges if each.first <= key <= each.last]
    fitting = Matcher(selection, NOW).fits(1, NOW, False, encode_properties(document))
    assert within or not fitting
    if any(each.exact for each in within):
        assert fitting


@given(words, words)
def test_a_star_stands_for_any_text(pattern: str, text: str) -> None:
    expected = fnmatch.fnmatchcase(text.lower(), pattern.lower())
    assert like(pattern)(text.lower()) == expected


@given(json_values)
def test_a_last_error_is_read_from_anything(results: object) -> None:
    assert last_error(results) is None or isinstance(last_error(results), str)


def test_a_description_is_short() -> None:
    assert Selection().describe() == "all"
    selection = Selection(ids=tuple(range(1000)), senders=("a" * 1000,) * 1000, held=True)
    assert selection.describe().startswith("1000 ids, sender aaa")
    assert len(selection.describe()) < 2000
