"""PROXY headers, whole and byte by byte, and input that is not a header."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.wire.proxy import SIGNATURE, V1_LIMIT, Header, ProxyError, parse


def v2(body: bytes, *, command: int = 0x21, family: int = 0x11) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(body)) + body


TCP4 = v2(bytes([192, 0, 2, 1, 198, 51, 100, 2]) + struct.pack("!HH", 40000, 25))
TCP6 = v2(bytes(15) + b"\1" + bytes(15) + b"\2" + struct.pack("!HH", 40000, 25), family=0x21)
MAPPED = bytes(10) + b"\xff\xff" + bytes([192, 0, 2, 1])
V2_MAPPED = v2(2 * MAPPED + struct.pack("!HH", 40000, 25), family=0x21)

GOOD = [
    (b"PROXY TCP4 192.0.2.1 198.51.100.2 40000 25\r\n", ("192.0.2.1", 40000)),
    (b"PROXY TCP6 2001:db8::1 2001:db8::2 40000 25\r\n", ("2001:db8::1", 40000)),
    (b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:192.0.2.2 40000 25\r\n", ("192.0.2.1", 40000)),
    (V2_MAPPED, ("192.0.2.1", 40000)),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN ff ff 1 2\r\n", None),
    (TCP4, ("192.0.2.1", 40000)),
    (TCP6, ("::1", 40000)),
    (v2(b"", command=0x20, family=0), None),
    (v2(TCP4[16:] + b"\x04\x00\x01x"), ("192.0.2.1", 40000)),
]


@pytest.mark.parametrize(("data", "source"), GOOD)
def test_a_header_is_read_whole_and_only_whole(data: bytes, source: tuple[str, int] | None) -> None:
    for cut in range(len(data)):
        assert parse(data[:cut]) is None
    header = parse(data + b"EHLO x\r\n")
    assert header is not None
    assert (header.length, header.source) == (len(data), source)


@pytest.mark.parametrize(
    "data",
    [
        b"EHLO x\r\n",
        b"\r\n\r\nX",
        b"PROXY \r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 40000\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 40000 25 x\r\n",
        b"PROXY TCP4 2001:db8::1 198.51.100.2 40000 25\r\n",
        b"PROXY TCP4 ::ffff:192.0.2.1 198.51.100.2 40000 25\r\n",
        b"PROXY TCP6 192.0.2.1 2001:db8::2 40000 25\r\n",
        b"PROXY TCP6 fe80::1%x 2001:db8::2 40000 25\r\n",
        b"PROXY TCP4 192.0.2.256 198.51.100.2 40000 25\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 65536 25\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 -1 25\r\n",
        b"PROXY UDP4 192.0.2.1 198.51.100.2 1 25\r\n",
        b"PROXY " + V1_LIMIT * b"x",
        v2(b"", command=0x31),
        v2(b"", command=0x22),
        v2(TCP4[16:], family=0x12),
        v2(b"\0\0\0\0"),
        v2(5000 * b"\0"),
    ],
)
def test_what_is_no_header_is_an_error(data: bytes) -> None:
    with pytest.raises(ProxyError):
        parse(data)


@given(st.binary() | st.binary().map(lambda tail: SIGNATURE + tail) | st.binary().map(v2))
def test_any_bytes_are_a_header_or_an_error_or_not_yet_complete(data: bytes) -> None:
    try:
        header = parse(data)
    except ProxyError:
        return
    assert header is None or (isinstance(header, Header) and header.length <= len(data))
