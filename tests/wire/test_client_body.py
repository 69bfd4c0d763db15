"""Bodies on the wire: dot-stuffing and line ends for any content, and sending in blocks."""

import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.wire import framing
from mailerq.wire.client import ClientProtocol, SendBody
from mailerq.wire.framing import encode_blocks, encode_body

ENDINGS = (b"\n.\n", b"\n.\r\n", b"\r.\r", b"\r\n.\n", b"\r\r.\r\r", b"\r\n.\r", b"\n\n.\n\n")


@pytest.mark.parametrize("ending", ENDINGS)
def test_look_alikes_of_the_end_do_not_end_a_mail(ending: bytes) -> None:
    wire = encoded(b"a" + ending + b"MAIL FROM:<x@y.test>\r\n")
    assert wire.count(b"\r\n.\r\n") == 1
    assert wire.endswith(b"\r\n.\r\n")


def encoded(body: bytes) -> bytes:
    blocks, end = encode_body(body)
    return b"".join((*blocks, end))


BODIES = st.lists(st.sampled_from([b"\r", b"\n", b".", b"a", b"\r\n", b"\r\n.\r\n"])).map(b"".join)


@given(BODIES, st.integers(1, 5))
def test_a_body_is_the_same_in_blocks_of_any_size(body: bytes, size: int) -> None:
    expected = encoded(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framing, "BLOCK_BYTES", size)
        assert encoded(body) == expected


class Pieces:
    """A mail that is not there as a whole."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def __len__(self) -> int:
        return sum(map(len, self._pieces))

    def blocks(self) -> Iterator[bytes]:
        return iter(self._pieces)


@given(
    st.lists(st.sampled_from([b"\r\n", b".", b"a", b"..", b"\r\n.\r\n"])).map(b"".join),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_a_mail_that_comes_in_blocks_goes_out_like_any_other(
    body: bytes, size: int, least: int
) -> None:
    pieces = Pieces([body[at : at + size] for at in range(0, len(body), size)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framing, "PIECE_BYTES", least)
        blocks, end = encode_blocks(pieces)
        assert b"".join((*blocks, end)) == encoded(body)


def test_of_a_large_body_no_more_than_a_block_is_encoded_at_a_time() -> None:
    protocol = ClientProtocol("me.test")
    protocol.receive_data(b"220 mx.test\r\n250-mx.test\r\n250 PIPELINING\r\n")
    protocol.next_event()
    protocol.mail("a@b.test", "c@d.test")
    while protocol.data_to_send():
        pass
    protocol.receive_data(b"250 ok\r\n250 ok\r\n354 go\r\n")
    assert isinstance(protocol.next_event(), SendBody)
    body = 300_000 * b".\n"
    protocol.send_body(body)
    sizes, sent = [], b""
    while piece := protocol.data_to_send():
        sizes.append(len(piece))
        sent += piece
    assert max(sizes) <= 3 * framing.BLOCK_BYTES
    assert sent == 300_000 * b"..\r\n" + b".\r\n"


@given(BODIES)
def test_every_body_comes_out_of_the_wire_with_its_line_ends_made_crlf(body: bytes) -> None:
    wire = encoded(body)
    assert b"\r\n.\r\n" not in b"\r\n" + wire[:-1]
    assert (b"\r\n" + wire).endswith(b"\r\n.\r\n")
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)", wire)
    lines = wire.removesuffix(b".\r\n").split(b"\r\n")
    received = b"\r\n".join(line.removeprefix(b".") for line in lines)
    expected = re.sub(rb"\r\n|\r|\n", b"\r\n", body)
    assert received in (expected, expected + b"\r\n")
