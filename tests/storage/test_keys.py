"""Keys: a bucket of an hour, and a digest that proves the body."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.storage.keys import (
    HOUR,
    bucket_end,
    bucket_of,
    ends_of,
    is_ours,
    key_for,
    key_problem,
    matches,
    size_of,
)

TIMES = st.floats(min_value=0, max_value=200_000_000_000)


@given(st.binary(max_size=200), TIMES, st.integers(0, 8))
def test_a_key_says_when_its_body_expires_and_what_it_is(
    body: bytes, until: float, depth: int
) -> None:
    key = key_for(body, until, depth)
    assert key_problem(key) is None
    assert is_ours(key)
    assert key.count("/") == 2 + depth
    ends = ends_of(key)
    assert ends is not None
    assert until < ends <= until + HOUR
    assert size_of(key) == len(body)
    assert matches(key, body)
    assert not matches(key, body + b"x")


@given(TIMES, TIMES)
def test_buckets_are_in_the_order_of_time(one: float, other: float) -> None:
    if one <= other:
        assert bucket_of(one) <= bucket_of(other)


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_a_key_fits_no_other_body(one: bytes, other: bytes) -> None:
    assert matches(key_for(one, 0.0), other) == (one == other)


@given(st.text())
def test_any_text_is_judged(text: str) -> None:
    problem = key_problem(text)
    if problem is None:
        assert not text.startswith(("/", "."))
        assert ".." not in text.split("/")
        assert "\0" not in text
    assert ends_of(text) is None or problem is None
    bucket_end(text)


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../secret", "a/../b", "a//b", "a/", ".new/x", "a/.damaged", "a\nb", "é",
     "a b", "x" * 513, "x" * 256, "a/" + "x" * 256],
)  # fmt: skip
def test_a_key_that_could_name_something_else_is_refused(key: str) -> None:
    assert key_problem(key) is not None


@pytest.mark.parametrize(
    "key",
    ["spring/1", "20261126/20/abc-5", "20261399/20/" + "a" * 40 + "-5", "x" * 40,
     "20261126/24/" + "a" * 40 + "-5"],
)  # fmt: skip
def test_a_key_of_an_application_says_nothing(key: str) -> None:
    assert ends_of(key) is None
    assert key_problem(key) is None
