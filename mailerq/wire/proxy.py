"""The PROXY protocol, versions 1 and 2, by which a load balancer names its client.

A header is read only from peers that are configured as proxies, because its sender can choose any
address. These peers must send a header.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from typing import Final

from mailerq.address import parse_ip

__all__ = ["Header", "ProxyError", "parse"]

V1_LIMIT: Final = 107
"""Bytes of a version 1 line with its CR LF, from the specification."""

V2_LIMIT: Final = 4096
"""Bytes of a version 2 body. Addresses need 36; extensions, which are skipped, need the rest."""

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"

_V2_HEAD: Final = struct.Struct("!12sBBH")
_FAMILIES: Final = {0x11: struct.Struct("!4s4sHH"), 0x21: struct.Struct("!16s16sHH")}


class ProxyError(Exception):
    """The peer sent no valid header; the connection is closed."""


@dataclass(frozen=True, slots=True)
class Header:
    """A complete header.

    Without `source`, the proxy speaks for itself (a health check) or does not know its client. The
    address of the proxy then gives no rights.
    """

    length: int
    source: tuple[str, int] | None = None
    destination: tuple[str, int] | None = None


def parse(data: bytes) -> Header | None:
    """Parse the header at the start of `data`; return None if it is incomplete.

    Raises `ProxyError`.
    """
    if data[: len(SIGNATURE)] == SIGNATURE[: len(data)]:
        return _parse_v2(data)
    if data[:6] == b"PROXY "[: len(data)]:
        return _parse_v1(data)
    raise ProxyError("no PROXY header")


def _parse_v1(data: bytes) -> Header | None:
    end = data.find(b"\r\n", 0, V1_LIMIT)
    if end < 0:
        if len(data) >= V1_LIMIT:
            raise ProxyError("PROXY line without end")
        return None
    words = data[:end].split(b" ")
    if len(words) >= 2 and words[1] == b"UNKNOWN":
        return Header(end + 2)
    if len(words) != 6 or words[1] not in (b"TCP4", b"TCP6"):
        raise ProxyError("malformed PROXY line")
    version = 4 if words[1] == b"TCP4" else 6
    source = _ip(words[2], version), _port(words[4])
    destination = _ip(words[3], version), _port(words[5])
    return Header(end + 2, source, destination)


def _ip(word: bytes, version: int) -> str:
    try:
        text = word.decode("ascii")
        if (":" in text) != (version == 6):
            raise ProxyError("address of the wrong family in PROXY line")
        return str(parse_ip(text))
    except ValueError:
        raise ProxyError("malformed address in PROXY line") from None


def _port(word: bytes) -> int:
    if not word.isdigit() or len(word) > 5 or int(word) > 65535:
        raise ProxyError("malformed port in PROXY line")
    return int(word)


def _parse_v2(data: bytes) -> Header | None:
    if len(data) < _V2_HEAD.size:
        return None
    _, version, family, size = _V2_HEAD.unpack_from(data)
    if version >> 4 != 2 or version & 15 > 1:
        raise ProxyError("unknown version or command in PROXY header")
    if size > V2_LIMIT:
        raise ProxyError("PROXY header too long")
    length = _V2_HEAD.size + size
    if len(data) < length:
        return None
    if version & 15 == 0:
        return Header(length)
    layout = _FAMILIES.get(family)
    if layout is None:
        raise ProxyError("PROXY header of a family that is not TCP")
    if size < layout.size:
        raise ProxyError("PROXY header too short for its addresses")
    source, destination, source_port, destination_port = layout.unpack_from(data, _V2_HEAD.size)
    return Header(
        length,
        (_unpacked(source), source_port),
        (_unpacked(destination), destination_port),
    )


def _unpacked(address: bytes) -> str:
    return str(parse_ip(str(ipaddress.ip_address(address))))
