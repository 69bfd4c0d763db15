"""Bodies as they are stored."""

from __future__ import annotations

import gzip
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.storage.keys import key_for
from mailerq.storage.packing import Unusable, pack, unpack


@given(st.binary(max_size=2000), st.booleans())
def test_a_body_comes_back_as_it_was(body: bytes, compress: bool) -> None:
    assert unpack(key_for(body, 0.0), pack(body, compress=compress)) == body


@pytest.mark.parametrize("compress", [False, True])
def test_a_body_that_looks_like_gzip_comes_back(compress: bool) -> None:
    for body in (gzip.compress(b"mail"), b"\x1f\x8b", b"\x1f\x8bmail"):
        assert unpack(key_for(body, 0.0), pack(body, compress=compress)) == body


@given(st.binary(max_size=300), st.data())
def test_a_damaged_body_is_noticed(body: bytes, data: st.DataObject) -> None:
    stored = bytearray(pack(body, compress=data.draw(st.booleans())))
    if not stored:
        return
    at = data.draw(st.integers(0, len(stored) - 1))
    stored[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = unpack(key_for(body, 0.0), bytes(stored))
    except Unusable:
        return
    assert found == body  # a bit of the header of gzip that says nothing


@given(st.binary(max_size=300), st.integers(0, 400), st.booleans())
def test_a_cut_body_is_noticed(body: bytes, size: int, compress: bool) -> None:
    stored = pack(body, compress=compress)
    if body and size < len(stored):
        with pytest.raises(Unusable):
            unpack(key_for(body, 0.0), stored[:size])


def test_a_small_file_cannot_fill_the_memory() -> None:
    bomb = gzip.compress(bytes(10_000_000))
    with pytest.raises(Unusable, match="more than 1000 bytes"):
        unpack("of-an-application", bomb, limit=1000)
    assert unpack("of-an-application", bomb, limit=10_000_000) == bytes(10_000_000)


@given(st.binary(max_size=200))
def test_an_application_may_store_any_bytes(stored: bytes) -> None:
    with suppress(Unusable):
        assert unpack("of-an-application", b"\x1f\x8b" + stored) == gzip.decompress(
            b"\x1f\x8b" + stored
        )


def test_bytes_behind_gzip_are_not_dropped() -> None:
    with pytest.raises(Unusable, match="behind the end"):
        unpack("of-an-application", gzip.compress(b"one") + gzip.compress(b"two"))
