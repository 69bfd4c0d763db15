"""The document of a message: what is read of it, and how much it may say."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from mailerq.errors import MessageError
from mailerq.message import PROPERTIES_LIMIT, Message

DOCUMENT = {"envelope": "a@b.test", "recipient": "c@d.test"}
LARGE = 3 * PROPERTIES_LIMIT


def document(**more: Any) -> bytes:
    return json.dumps({**DOCUMENT, **more}).encode()


@pytest.mark.parametrize("as_text", [False, True])
def test_a_body_may_be_large(as_text: bool) -> None:
    for body, more in (
        (LARGE * b"x", {"mime": LARGE * "x"}),
        (LARGE * b"\r", {"mime": LARGE * "\r"}),
        (LARGE * b"\xff", {"mime-base64": base64.b64encode(LARGE * b"\xff").decode()}),
    ):
        data = document(**more)
        message = Message.from_json(data.decode() if as_text else data)
        assert message.body == body
        assert message.properties == DOCUMENT


@pytest.mark.parametrize(
    "more",
    [
        {"recipient": LARGE * "x"},
        {"tags": LARGE * ["a"]},
        {"retries": LARGE * [1]},
        {"data": {"deep": LARGE * [{}]}},
        {"mime": {"subject": LARGE * "x"}},
        {"mime": LARGE * [1]},
        {str(number): number for number in range(PROPERTIES_LIMIT // 8)},
    ],
    ids=["text", "strings", "numbers", "objects", "mime", "array", "names"],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_what_is_beside_the_body_has_a_limit(more: dict[str, Any], as_text: bool) -> None:
    data = document(**more)
    with pytest.raises(MessageError, match="more than 1048576 bytes of properties beside its body"):
        Message.from_json(data.decode() if as_text else data)


@pytest.mark.parametrize("data", [LARGE * b"[", LARGE * b" ", b"[" + LARGE * b"1," + b"1]"])
def test_a_large_document_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(MessageError, match="not JSON"):
        Message.from_json(data)


@pytest.mark.parametrize(
    ("more", "good"),
    [
        ({"tags": ["a", "b"]}, True),
        ({"tags": ["a", 1]}, False),
        ({"tags": []}, True),
        ({"retries": [0, 60]}, True),
        ({"retries": [60, -1]}, False),
        ({"retries": [60, True]}, False),
        ({"retries": [60, "x"]}, False),
        ({"retries": []}, True),
        ({"results": [{}, {}]}, True),
        ({"results": [{}, []]}, False),
    ],
)
def test_every_element_of_an_array_has_its_type(more: dict[str, Any], good: bool) -> None:
    assert (Message({**DOCUMENT, **more}).problem() is None) == good


@pytest.mark.parametrize("size", [1, LARGE])
@pytest.mark.parametrize("data", [b'{"a":"\xff%s"}', '{"a":"\ud800%s"}'])
def test_what_is_not_utf_8_is_refused_as_no_json(data: bytes | str, size: int) -> None:
    text = data % (size * b"x") if isinstance(data, bytes) else data % (size * "x")
    with pytest.raises(MessageError, match=r"not JSON|more than 1048576 bytes"):
        Message.from_json(text)


@pytest.mark.parametrize("name", ["requiretls", "smtputf8", "binarymime"])
def test_a_promise_in_words_that_nobody_reads_is_refused(name: str) -> None:
    assert Message({**DOCUMENT, name: True}).problem() is None
    for value in ("true", 1, "yes"):
        problem = Message({**DOCUMENT, name: value}).problem()
        assert problem is not None
        assert problem.startswith(f"property {name}: expected true or false, found a ")


def test_a_demand_for_security_that_is_misspelt_is_refused() -> None:
    assert Message({**DOCUMENT, "security": "optional"}).problem() is None
    for value in ("Required", "", "tls", True, []):
        assert Message({**DOCUMENT, "security": value}).problem() is not None
