"""Read the DNS records of keys that verify signatures (RFC 6376, section 3.6.1)."""

from __future__ import annotations

import binascii
import re
from typing import Final, NamedTuple

__all__ = ["Record", "RecordProblem", "read_record", "read_tags"]

MAX_BYTES: Final = 8192
"""Bytes of a record, or of another list of tags; a key of 4096 bits takes 750."""

_NAME: Final = re.compile(rb"[A-Za-z][A-Za-z0-9_]*").fullmatch
_BLANKS: Final = re.compile(rb"[ \t\r\n]+")


class RecordProblem(Exception):
    """A record cannot be used; the text says why."""


class Record(NamedTuple):
    """A key as its record has it. `key` is in base64 without blanks, empty if revoked."""

    kind: str
    key: str
    hashes: tuple[str, ...]
    services: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def allows_sha256(self) -> bool:
        return not self.hashes or "sha256" in self.hashes

    @property
    def allows_mail(self) -> bool:
        return "*" in self.services or "email" in self.services

    @property
    def is_test(self) -> bool:
        return "y" in self.flags


def read_tags(text: bytes) -> dict[str, bytes]:
    """Read a list of tags (section 3.2), each with its value, with inner blanks.

    Raises `RecordProblem` if it is none, or has a tag twice.
    """
    if len(text) > MAX_BYTES:
        raise RecordProblem(f"has more than {MAX_BYTES} bytes")
    tags: dict[str, bytes] = {}
    pieces = text.split(b";")
    if not pieces[-1].strip(b" \t\r\n"):
        pieces.pop()
    for piece in pieces:
        name, equals, value = piece.partition(b"=")
        name = name.strip(b" \t\r\n")
        if not equals or not _NAME(name):
            raise RecordProblem("is not a list of tags")
        label = name.decode()
        if label in tags:
            raise RecordProblem(f"has the tag {label} twice")
        tags[label] = value.strip(b" \t\r\n")
    return tags


def read_record(text: bytes) -> Record:
    """Read the record of a key. Raises `RecordProblem`."""
    tags = read_tags(text)
    if tags.get("v", b"DKIM1") != b"DKIM1" or ("v" in tags and next(iter(tags)) != "v"):
        raise RecordProblem("is not a record of DKIM: v=")
    if "p" not in tags:
        raise RecordProblem("has no key: p=")
    key = _BLANKS.sub(b"", tags["p"])
    try:
        binascii.a2b_base64(key, strict_mode=True)
    except ValueError:
        raise RecordProblem("has no base64 in p=") from None
    return Record(
        tags.get("k", b"rsa").decode("ascii", "replace").lower(),
        key.decode("ascii"),
        _words(tags.get("h", b"")),
        _words(tags.get("s", b"*")),
        _words(tags.get("t", b"")),
    )


def _words(value: bytes) -> tuple[str, ...]:
    words = value.decode("ascii", "replace").lower().split(":")
    return tuple(word.strip() for word in words if word.strip())
