"""Read the DNS records of keys that verify signatures (RFC 6376, section 3.6.1)."""

from __future__ import annotations

import binascii
import re
from collections.abc import Sequence
from typing import Final, NamedTuple

__all__ = [
    "GOOD",
    "Record",
    "RecordProblem",
    "Standing",
    "read_record",
    "read_tags",
    "standing",
]

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


GOOD: Final = "good"


class Standing(NamedTuple):
    """What the records of a key's name say about the key.

    `state` is `GOOD`, "missing" or "differs"; `reason` says what is wrong, or odd. A key that is
    good may have `others` beside its record.
    """

    state: str
    reason: str = ""
    others: int = 0


def standing(texts: Sequence[bytes], algorithm: str, public: str) -> Standing:
    """Compare a key with the TXT records of its name.

    `algorithm` is that of signatures, `public` the key in base64. Any of several records may have
    the key: verifiers may take any (RFC 6376, section 3.6.2.2).
    """
    if not texts:
        return Standing("missing", "there is no TXT record")
    reasons: list[str] = []
    for text in texts:
        try:
            record = read_record(text)
        except RecordProblem as error:
            reasons.append(str(error))
            continue
        if not record.key:
            reasons.append("the key is revoked: p= is empty")
        elif record.kind != algorithm.partition("-")[0]:
            reasons.append(f"the record is for a key of {record.kind}")
        elif record.key != public:
            reasons.append("the record has another key")
        elif not record.allows_sha256:
            reasons.append("the record does not allow sha256: h=")
        elif not record.allows_mail:
            reasons.append("the record is not for mail: s=")
        else:
            others = len(texts) - 1
            notes = []
            if others:
                notes.append(f"there are {len(texts)} records, and verifiers may take another one")
            if record.is_test:
                notes.append("the record says that the key is a test: t=y")
            return Standing(GOOD, "; ".join(notes), others)
    return Standing("differs", "; ".join(dict.fromkeys(reasons)))
