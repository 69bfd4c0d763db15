"""Framing of mails: whole, byte by byte and block by block with the same result."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.wire import framing
from mailerq.wire._lines import BARE, DOTTED, line_ends, look
from mailerq.wire.framing import Body, MemorySink, has_bare_newline

PARTS = st.sampled_from(
    [b"\r\n", b"\r", b"\n", b".", b"..", b"x", b"text", b"\0", b"\r\n.", b"\xff"]
)
CONTENT = st.lists(PARTS, max_size=40).map(b"".join)


def receive(body: Body, pieces: Sequence[bytes]) -> bytes | None:
    """Feed pieces; return the bytes after the end, or None without an end."""
    for number, piece in enumerate(pieces):
        rest = body.receive_stuffed(piece)
        if rest is not None:
            return rest + b"".join(pieces[number + 1 :])
    return None


def whole(raw: bytes) -> tuple[bytes, bytes] | None:
    """Split the bytes after 354 as RFC 5321 says: the content, and the bytes after its end."""
    content, end, rest = (b"\r\n" + raw).partition(b"\r\n.\r\n")
    if not end:
        return None
    return (content + b"\r\n").replace(b"\r\n.", b"\r\n")[2:], rest


def in_pieces(raw: bytes, sizes: Sequence[int]) -> list[bytes]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(raw[start : start + size])
        start += size
    return [piece for piece in [*pieces, raw[start:]] if piece]


@given(CONTENT, CONTENT, st.lists(st.integers(1, 9), max_size=30), st.sampled_from([1, 3, 8, 1000]))
def test_a_mail_is_the_same_in_any_pieces(
    content: bytes, behind: bytes, sizes: list[int], block: int
) -> None:
    raw = content + b"\r\n.\r\n" + behind
    expected = whole(raw)
    assert expected is not None
    before = framing.BLOCK_BYTES
    framing.BLOCK_BYTES = block
    try:
        body = Body(binary=True)
        rest = receive(body, in_pieces(raw, sizes))
        assert (bytes(body.finish()), rest) == expected
        strict = Body()
        receive(strict, in_pieces(raw, sizes))
        kept = strict.finish()
        assert strict.is_bare == has_bare_newline(expected[0])
        assert strict.is_bare or kept == expected[0]
        normal = Body(normalize=True)
        receive(normal, in_pieces(raw, sizes))
        assert bytes(normal.finish()) == re.sub(rb"\r\n|\r|\n", b"\r\n", expected[0])
        assert not normal.is_bare
    finally:
        framing.BLOCK_BYTES = before


@given(st.lists(st.binary(max_size=8) | st.sampled_from([b"\r", b"\n", b"\r\n"]), max_size=20))
def test_chunks_are_kept_as_they_are(chunks: list[bytes]) -> None:
    content = b"".join(chunks)
    before = framing.BLOCK_BYTES
    framing.BLOCK_BYTES = 3
    try:
        binary, strict = Body(binary=True), Body()
        for chunk in chunks:
            binary.add(chunk)
            strict.add(chunk)
        assert binary.finish() == content
        strict.finish()
        assert strict.is_bare == has_bare_newline(content)
    finally:
        framing.BLOCK_BYTES = before


@given(CONTENT, st.integers(0, 70), st.integers(0, 70))
def test_lines_are_seen_wherever_they_lie(content: bytes, before: int, behind: int) -> None:
    content = b"x" * before + content + b"x" * behind
    bare = re.search(rb"(?<!\r)\n|\r(?!\n)", content) is not None
    assert look(content) == bare * BARE + (b"\n." in content) * DOTTED
    assert has_bare_newline(content) == bare


class Recorder(MemorySink):
    """Records the sizes of the blocks that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def write(self, block: bytes) -> None:
        super().write(block)
        self.sizes.append(len(block))

    def discard(self) -> None:
        super().discard()
        self.sizes.clear()


def test_a_large_mail_goes_to_its_sink_block_by_block() -> None:
    sink = Recorder()
    body = Body(sink=sink)
    line = 76 * b"x" + b"\r\n"
    for _ in range(20_000):
        assert body.receive_stuffed(line) is None
        assert body._waiting < 2 * framing.BLOCK_BYTES
    assert len(sink.sizes) > 4
    assert body.receive_stuffed(b".\r\n") == b""
    assert body.finish() == 20_000 * line


@pytest.mark.parametrize("bad", ["size", "newline"])
def test_of_a_mail_that_is_refused_nothing_is_kept(bad: str) -> None:
    sink = Recorder()
    body = Body(1 << 20 if bad == "size" else 0, sink)
    body.receive_stuffed(b"\n" if bad == "newline" else b"x")
    for _ in range(40):
        body.receive_stuffed(framing.BLOCK_BYTES * b"x")
    assert not sink.sizes
    assert not body._pieces
    assert body.is_too_big if bad == "size" else body.is_bare


def test_single_bytes_do_not_pile_up() -> None:
    body = Body()
    for _ in range(200_000):
        body.receive_stuffed(b"x")
    assert sum(map(sys.getsizeof, body._pieces)) < 1.5 * 200_000


def test_the_limit_counts_no_byte_of_the_end() -> None:
    for size in range(1, 8):
        raw = b"12345\r\n.\r\n"
        body = Body(7)
        receive(body, [raw[start : start + size] for start in range(0, len(raw), size)])
        assert not body.is_too_big
        assert body.finish() == b"12345\r\n"


@given(
    st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"a", b"b" * 254, b"\n" * 600])).map(b"".join),
    st.integers(-1, 3000),
)
def test_line_ends_are_counted_as_pairs_or_alone(mail: bytes, limit: int) -> None:
    assert line_ends(mail, limit) == len(re.findall(rb"\r\n|\r|\n", mail[: max(limit, 0)]))
