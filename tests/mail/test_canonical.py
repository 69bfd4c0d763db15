"""The canonical forms of bodies and fields, against dkimpy and by byte."""

from __future__ import annotations

import base64
import hashlib

import pytest
from dkim.canonicalization import Relaxed, Simple
from hypothesis import given, settings
from hypothesis import strategies as st

from mailerq.mail._canonical import (
    Body,
    counted_names,
    field_places,
    folded,
    relaxed_field,
    relaxed_text,
    simple_field,
)
from mailerq.mail.dkim import body_hash
from mailerq.mail.headers import Header
from mailerq.wire.framing import in_pairs

PIECES = st.sampled_from([
    b"\r\n", b"\r\n\r\n", b"\n", b"\r", b" ", b"\t", b"  ", b"word", b"a b", b"\0", b"\x0b",
    b"\xe4", b".", b"x" * 255, b"x" * 256, b"x" * 257, b"line of text\r\n" * 30, b"\r\n" * 300,
])  # fmt: skip
BODIES = st.lists(PIECES, max_size=30).map(b"".join)


class Collected:
    def __init__(self) -> None:
        self.text = b""

    def update(self, block: bytes) -> None:
        self.text += bytes(block)


def canonical(pieces: list[bytes], *, relaxed: bool, binary: bool = False) -> bytes:
    collected = Collected()
    body = Body(collected, relaxed=relaxed, binary=binary)
    for piece in pieces:
        body.add(piece)
    body.end()
    return collected.text


def on_wire(body: bytes) -> bytes:
    """A body as peers get it."""
    pairs = in_pairs(body)
    return pairs if not pairs or pairs.endswith(b"\r\n") else pairs + b"\r\n"


def cut(body: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(body[at : at + size])
        at += size
    return [*pieces, body[at:]]


@settings(max_examples=500)
@given(BODIES, st.lists(st.integers(0, 300), max_size=20))
def test_a_body_is_canonical_as_dkimpy_says_whole_and_in_pieces(
    body: bytes, sizes: list[int]
) -> None:
    for relaxed, other in ((True, Relaxed), (False, Simple)):
        expected = other.canonicalize_body(on_wire(body))
        assert canonical([body], relaxed=relaxed) == expected
        assert canonical(cut(body, sizes), relaxed=relaxed) == expected


@given(BODIES, st.lists(st.integers(1, 2), max_size=50))
def test_pieces_of_a_byte_change_nothing(body: bytes, sizes: list[int]) -> None:
    pieces = [body[at : at + 1] for at in range(len(body))]
    for relaxed in (True, False):
        for binary in (True, False):
            whole = canonical([body], relaxed=relaxed, binary=binary)
            assert canonical(pieces, relaxed=relaxed, binary=binary) == whole


@settings(max_examples=300)
@given(BODIES)
def test_in_a_binary_body_only_crlf_ends_a_line(body: bytes) -> None:
    body = body if not body or body.endswith(b"\r\n") else body + b"\r\n"
    for relaxed, other in ((True, Relaxed), (False, Simple)):
        expected = other.canonicalize_body(body)
        assert canonical([body], relaxed=relaxed, binary=True) == expected


@pytest.mark.parametrize("relaxed", [True, False])
def test_a_body_of_many_empty_lines_takes_no_memory(relaxed: bool) -> None:
    lines = b"\r\n" * 500_000
    empty = b"" if relaxed else b"\r\n"
    assert canonical([lines], relaxed=relaxed) == empty
    with_text = hashlib.sha256(lines + b"x\r\n").digest()
    assert body_hash([lines, b"x"], relaxed=relaxed) == with_text
    assert body_hash([lines, b"x", lines], relaxed=relaxed) == with_text


def test_the_hashes_of_an_empty_body_are_those_of_the_standard() -> None:
    simple = base64.b64encode(body_hash([], relaxed=False))
    assert simple == b"frcCV1k9oG9oKj3dpUqdJg1PxRT2RSN/XKdLCPjaYaY="
    relaxed = base64.b64encode(body_hash([], relaxed=True))
    assert relaxed == b"47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="


def test_the_example_of_the_standard() -> None:
    # RFC 6376, section 3.4.5
    body = b" C \r\nD \t E\r\n\r\n\r\n"
    assert canonical([body], relaxed=True) == b" C\r\nD E\r\n"
    assert canonical([body], relaxed=False) == b" C \r\nD \t E\r\n"
    header = b"A: X\r\nB : Y\t\r\n\tZ  \r\n"
    assert relaxed_field(header, 0, 6) == b"a:X"
    assert relaxed_field(header, 6, len(header)) == b"b:Y Z"
    assert simple_field(header, 6, len(header)) == b"B : Y\t\r\n\tZ  "


NAMES = st.text("ABcd-9", min_size=1, max_size=8).map(str.encode)
VALUES = st.lists(
    st.sampled_from([b" ", b"\t", b"\r\n ", b"\r\n\t", b"a", b"b:c", b"\xc3\xa4", b";"]),
    max_size=12,
).map(b"".join)


@settings(max_examples=500)
@given(NAMES, VALUES)
def test_a_field_is_canonical_as_dkimpy_says(name: bytes, value: bytes) -> None:
    field = name + b":" + value + b"\r\n"
    ((label, text),) = Relaxed.canonicalize_headers([(name, value + b"\r\n")])
    assert relaxed_field(field, 0, len(field)) + b"\r\n" == label + b":" + text
    assert simple_field(field, 0, len(field)) + b"\r\n" == field


@given(NAMES, VALUES, st.sampled_from([b"\n", b"\r"]))
def test_a_bare_line_end_in_a_field_counts_as_crlf(name: bytes, value: bytes, end: bytes) -> None:
    field = name + b":" + value + b"\r\n"
    bare = field.replace(b"\r\n", end)
    assert relaxed_field(bare, 0, len(bare)) == relaxed_field(field, 0, len(field))
    assert simple_field(bare, 0, len(bare)) == simple_field(field, 0, len(field))


@pytest.mark.parametrize("function", [relaxed_field, simple_field])
@pytest.mark.parametrize("place", [(-1, 2), (2, 1), (0, 99)])
def test_offsets_outside_of_the_mail_are_refused(function: object, place: tuple[int, int]) -> None:
    with pytest.raises(ValueError):
        function(b"A: b", *place)  # type: ignore[operator]


HEADERS = st.lists(
    st.sampled_from([
        b"To", b"tO", b"X-Y", b"a", b"\xe4", b"\x7f", b":", b": ", b" :", b" ", b"\t", b"x", b"\0",
        b"\r\n", b"\n", b"\r", b"\r\n ", b"To: a\r\n", b"From : b\n", b"Cc:\r\n\tc\r\n",
    ]),
    max_size=20,
).map(lambda pieces: b"To: x" + b"".join(pieces))  # fmt: skip


@settings(max_examples=1000)
@given(HEADERS)
def test_the_places_of_fields_are_those_that_a_header_has(mail: bytes) -> None:
    header = Header(mail)
    places: dict[bytes, list[tuple[int, int]]] = {}
    for name, start, end in header.places():
        places.setdefault(name, []).append((start, end))
    found = field_places(mail, header.end)
    assert list(found.items()) == list(places.items())


NAMES = st.lists(
    st.tuples(st.sampled_from([b"to", b"from", b"cc", b"x-y", b"no"]), st.integers(0, 4)),
    max_size=6,
)


@settings(max_examples=500)
@given(HEADERS, NAMES, st.integers(0, 3))
def test_the_text_that_is_signed_has_the_relaxed_fields_from_the_bottom_up(
    mail: bytes, names: list[tuple[bytes, int]], most: int
) -> None:
    places = field_places(mail, Header(mail).end)
    expected = b""
    for name, count in names:
        for start, end in places.get(name, [])[::-1][: min(count, most)]:
            expected += relaxed_field(mail, start, end) + b"\r\n"
    assert relaxed_text(mail, places, names, b"X : y\r\n z", most) == expected + b"x:y z"


@pytest.mark.parametrize(("most", "to", "x"), [(1, 1, 1), (2, 2, 2), (3, 4, 2), (9, 4, 2)])
def test_names_are_counted_up_to_a_bound(most: int, to: int, x: int) -> None:
    places = field_places(b"To: 1\nX: 2\nto: 3\nTO: 4\nY: 5\nX: 6\n", 33)
    names = counted_names(places, (b"to", b"cc"), frozenset((b"x", b"z")), most)
    assert names == ((b"to", to), (b"cc", 1), (b"x", x))


def test_places_outside_of_the_mail_are_refused() -> None:
    with pytest.raises(ValueError, match="no such header"):
        field_places(b"To: a", 6)
    for place in ((-1, 3), (2, 6), (4, 3)):
        with pytest.raises(ValueError, match="no such field"):
            relaxed_text(b"To: a", {b"to": [place]}, ((b"to", 1),), b"X: y", 1)
    assert relaxed_field(b"", 0, 0) == b"" == relaxed_text(b"", {}, (), b"", 1)


@given(st.binary(max_size=20), st.binary(max_size=300), st.integers(0, 80), st.integers(1, 80))
def test_a_folded_word_is_whole_and_its_lines_are_full(
    start: bytes, text: bytes, first: int, step: int
) -> None:
    lines = [start + text[:first]]
    lines += [b"\t" + text[at : at + step] for at in range(first, len(text), step)]
    assert folded(start, text, first, step) == b"\r\n".join(lines) + b"\r\n"


def test_a_line_without_room_is_refused() -> None:
    for first, step in ((-1, 5), (5, 0), (5, -3)):
        with pytest.raises(ValueError, match="no room"):
            folded(b"X: ", b"word", first, step)
