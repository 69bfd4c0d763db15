"""A buffer is one object from the first piece to the last."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.wire._lines import Buffer, is_ascii


@given(st.lists(st.binary(max_size=600)), st.integers(0, 1000))
def test_it_holds_what_was_added(pieces: list[bytes], room: int) -> None:
    buffer = Buffer(room)
    for piece in pieces:
        buffer.add(piece)
    assert len(buffer) == sum(map(len, pieces))
    assert memoryview(buffer) == b"".join(pieces)
    assert buffer.take() == b"".join(pieces)
    assert len(buffer) == 0
    assert buffer.take() == b""


@given(st.binary(max_size=300), st.data(), st.binary(max_size=300))
def test_its_beginning_can_be_replaced(text: bytes, data: st.DataObject, head: bytes) -> None:
    count = data.draw(st.integers(0, len(text)))
    buffer = Buffer()
    buffer.add(text)
    buffer.replace(count, head)
    assert buffer.take() == head + text[count:]


@pytest.mark.parametrize("size", [1, 4095, 4096, 1 << 20])
def test_a_nul_is_behind_the_last_byte(size: int) -> None:
    buffer = Buffer(size + 10)
    buffer.add((size + 10) * b"x")
    buffer.clear()
    buffer.add(size * b"y")
    whole = buffer.take()
    buffer.add(whole)
    view = memoryview(buffer)
    assert view.readonly
    assert view == size * b"y"


def test_while_somebody_looks_nothing_changes() -> None:
    buffer = Buffer()
    buffer.add(b"abc")
    view = memoryview(buffer)
    part = view[1:]
    view.release()
    assert buffer.views == 1
    for change in (
        lambda: buffer.add(b"d"),
        lambda: buffer.extend(1),
        lambda: buffer.replace(1, b""),
        lambda: buffer.replace(1, b"xyz"),
        buffer.clear,
        buffer.take,
    ):
        with pytest.raises(BufferError):
            change()
    assert bytes(part) == b"bc"
    part.release()
    assert buffer.take() == b"abc"


def test_more_than_there_is_cannot_be_replaced() -> None:
    buffer = Buffer()
    buffer.add(b"abc")
    for count in (-1, 4):
        with pytest.raises(ValueError, match="so many"):
            buffer.replace(count, b"")
    with pytest.raises(ValueError, match="negative"):
        buffer.extend(-1)
    assert bytes(memoryview(buffer)) == b"abc"


def test_without_memory_it_is_empty() -> None:
    buffer = Buffer()
    buffer.add(b"abc")
    with pytest.raises(MemoryError):
        buffer.extend(1 << 62)
    assert buffer.take() == b""
    buffer.add(b"abc")
    assert buffer.take() == b"abc"


@given(st.binary(max_size=100))
def test_ascii_is_what_has_no_high_byte(text: bytes) -> None:
    assert is_ascii(text) == text.isascii()
