"""Documents of messages, and what is said beside them."""

from __future__ import annotations

import gzip
import json
import threading
import zlib
from contextlib import suppress
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from pika import spec

from mailerq.errors import MessageError, MessageTooLarge
from mailerq.message import Message
from mailerq.queues.interface import new_identity
from mailerq.queues.rabbitmq.coding import (
    MAX_BYTES,
    REASON,
    SMALL_BYTES,
    beside,
    decode,
    decode_soon,
    due_of,
    encode,
    encoding_of,
    header,
    identity_of,
    is_named,
)

TEXT = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=8,
)
PROPERTIES = st.dictionaries(st.text("nopq", min_size=1), VALUES, max_size=5)


@given(PROPERTIES, st.none() | st.binary(), st.booleans())
def test_a_message_comes_back_as_it_was(
    properties: dict[str, Any], body: bytes | None, compress: bool
) -> None:
    data = encode(Message(properties, body), compress=compress)
    back = decode(data, "gzip" if compress else None)
    assert (back.properties, back.body) == (properties, body)


@given(st.binary(), st.none() | st.text() | st.sampled_from(["gzip", "identity", "GZIP"]))
def test_any_bytes_are_read_or_refused(body: bytes, encoding: str | None) -> None:
    with suppress(MessageError):
        assert isinstance(decode(body, encoding).properties, dict)


def test_a_document_that_is_too_large_is_refused() -> None:
    body = b"x" * (MAX_BYTES + 1)
    with pytest.raises(MessageError, match="more than RabbitMQ takes"):
        encode(Message({}, body))
    assert len(encode(Message({}, body), compress=True)) < MAX_BYTES


@given(st.floats(0, 4e9), st.integers(0, 255))
def test_a_header_says_when_mail_is_due(due: float, priority: int) -> None:
    properties = header("id", priority=priority, due=due)
    assert due_of(properties) == pytest.approx(due, abs=0.001)
    assert (properties.delivery_mode, properties.priority or 0) == (2, priority)
    # What pika writes is read back.
    encoded = b"".join(properties.encode())
    again = spec.BasicProperties()
    again.decode(encoded)
    assert due_of(again) == due_of(properties)


@pytest.mark.parametrize("value", [None, "soon", -1, 1 << 63, 1.5, [], True])
def test_a_due_time_that_is_none_of_ours_is_ignored(value: object) -> None:
    properties = spec.BasicProperties(headers={"x-mailerq-due": value})
    assert due_of(properties) is None


def test_a_copy_without_an_id_is_known_by_its_bytes() -> None:
    for ours in (f"{16 * 'a'}.1f", new_identity()):
        assert identity_of(header(ours), b"x") == ours
    bare = spec.BasicProperties()
    assert identity_of(bare, b"x") == identity_of(bare, b"x") != identity_of(bare, b"y")


def test_messages_to_which_a_sender_gives_one_id_are_told_apart() -> None:
    one, other = (identity_of(header("campaign"), body) for body in (b"x", b"y"))
    assert one != other
    assert one == identity_of(header("campaign"), b"x")
    assert is_named(one)
    assert not is_named(identity_of(spec.BasicProperties(), b"x"))


def test_a_document_that_is_too_large_as_it_is_goes_out_compressed() -> None:
    message = Message({"recipient": "r@a.test"}, b"a line of text\r\n" * 1_200_000)
    with pytest.raises(MessageTooLarge):
        encode(message)
    data = encode(message, squeeze=True)
    assert len(data) < MAX_BYTES
    assert encoding_of(data) == "gzip"
    again = decode(data, encoding_of(data))
    assert (again.properties, again.body) == (message.properties, message.body)
    assert encoding_of(encode(Message({}, b"x"), squeeze=True)) is None
    with pytest.raises(MessageTooLarge):
        encode(message, most=1000, squeeze=True)


def test_a_bomb_is_refused_at_a_ratio() -> None:
    bomb = gzip.compress(b'{"mime":"' + 20_000_000 * b"a" + b'"}', mtime=0)
    with pytest.raises(MessageError, match="more than 250 times"):
        decode(bomb, "gzip")
    small = gzip.compress(b'{"mime":"' + 2_000_000 * b"a" + b'"}', mtime=0)
    assert len(decode(small, "gzip").body or b"") == 2_000_000


@pytest.mark.parametrize("size", [100, SMALL_BYTES - 11, SMALL_BYTES - 10, 3_000_000])
async def test_what_is_large_when_unpacked_takes_a_thread(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    unpack = zlib.decompressobj

    def counted(bits: int) -> Any:
        threads.append(threading.get_ident())
        return unpack(bits)

    monkeypatch.setattr(zlib, "decompressobj", counted)
    body = gzip.compress(b'{"mime":"' + size * b"a" + b'"}', mtime=0)
    message = await decode_soon(body, "GZIP")
    assert len(message.body or b"") == size
    assert (threads[-1] != threading.get_ident()) == (size + 11 > SMALL_BYTES)
    with pytest.raises(MessageError, match="not gzip"):
        await decode_soon(b"junk", "gzip")


@pytest.mark.parametrize("encoding", [None, "gzip"])
async def test_others_have_a_turn_between_messages(encoding: str | None) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    body = json.dumps({"list": list(range(20_000))}).encode()
    if encoding:
        body = gzip.compress(body, mtime=0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        for _ in range(100):
            await decode_soon(body, encoding)
        assert turns >= 95  # trio runs tasks of a turn in any order
        nursery.cancel_scope.cancel()


BROKERS = st.sampled_from(
    ["x-death", "x-first-death-queue", "x-last-death-reason", "x-delivery-count", "CC", "BCC"]
)
NAMES = BROKERS | st.text("xy-", min_size=1) | st.binary(min_size=1, max_size=4) | st.text()
UNWRITABLE = st.just(object()) | st.integers(1 << 64, 1 << 70) | st.just("y" * 100_000)


@given(st.dictionaries(NAMES, VALUES | UNWRITABLE, max_size=8), st.text() | st.none())
def test_what_moves_as_it_is_can_be_written_without_the_headers_of_a_broker(
    headers: dict[Any, Any], id: str | None
) -> None:
    origin = spec.BasicProperties(headers=headers, message_id=id, expiration="1", user_id="u")
    moved = beside(origin, "0123456789abcdef.1", "outbox: why")
    assert sum(map(len, moved.encode())) < 1 << 17
    assert not {"x-death", "x-first-death-queue", "x-last-death-reason"} & moved.headers.keys()
    assert not {"x-delivery-count", "CC", "BCC"} & moved.headers.keys()
    assert moved.headers[REASON].startswith("outbox: why")
    assert (moved.message_id, moved.expiration, moved.user_id) == ("0123456789abcdef.1", None, None)
