"""Bodies as they are stored: plain, or as gzip, whose first bytes begin no mail."""

from __future__ import annotations

import zlib
from typing import Final

from mailerq.storage.keys import matches

__all__ = ["MAX_BODY", "Unusable", "pack", "unpack"]

MAX_BODY: Final = 256 << 20
"""Bytes of a body when it is unpacked."""

GZIP: Final = 16 + zlib.MAX_WBITS
GZIP_LEVEL: Final = 1
MAGIC: Final = b"\x1f\x8b"


class Unusable(ValueError):
    """What is stored under a key is not what the key names; the text says why."""


def pack(body: bytes, *, compress: bool) -> bytes:
    """The form to store."""
    if not compress and not body.startswith(MAGIC):
        return body
    packer = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, GZIP)
    return packer.compress(body) + packer.flush()


def unpack(key: str, stored: bytes, limit: int = MAX_BODY) -> bytes:
    """The body of a key. Raises `Unusable` for a damaged or too large one."""
    body = _inflate(stored, limit) if stored.startswith(MAGIC) else stored
    if len(body) > limit:
        raise Unusable(f"has more than {limit} bytes")
    if not matches(key, body):
        raise Unusable("is not the body that the key names: it is damaged")
    return body


def _inflate(stored: bytes, limit: int) -> bytes:
    unpacker = zlib.decompressobj(GZIP)
    try:
        body = unpacker.decompress(stored, limit + 1)
    except zlib.error as error:
        raise Unusable(f"is not gzip: {error}") from None
    if len(body) <= limit and not unpacker.eof:
        raise Unusable("ends early")
    if unpacker.unused_data:
        raise Unusable("has bytes behind the end of its gzip")
    return body
