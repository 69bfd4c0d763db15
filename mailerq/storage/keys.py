"""Keys of stored bodies: when a body expires, and what it is.

A key of ours is ``<day>/<hour>[/<nesting>]/<digest>-<size>``: the hour in UTC in which the body
expires, and the BLAKE2b digest of the body. So the bodies of an hour can be removed together, a
body is stored once however often it is put, a damaged body is noticed, and a body that is missing
before its time is a fault of the storage.

Applications choose keys of their own, which must be relative paths of plain names. Nothing is known
about what they name.
"""

from __future__ import annotations

import calendar
import re
import time
from hashlib import blake2b
from typing import Final

__all__ = [
    "HOUR",
    "MAX_DEPTH",
    "bucket_end",
    "bucket_of",
    "ends_of",
    "is_ours",
    "key_for",
    "key_problem",
    "matches",
    "size_of",
]

HOUR: Final = 3600
"""Seconds of a bucket."""

MAX_DEPTH: Final = 8
"""Levels of folders in a bucket, each named after one digit of the digest."""

MAX_KEY: Final = 512
"""Characters of a key; S3 allows 1024 bytes with the prefix of a bucket."""

DIGEST_BYTES: Final = 20
LAST_SECOND: Final = 253_402_300_799

_OURS: Final = re.compile(
    r"([0-9]{8})/([0-9]{2})/(?:[0-9a-f]/){0,8}([0-9a-f]{40})-([0-9]{1,12})", re.ASCII
)
_PLAIN: Final = re.compile(r"[A-Za-z0-9._=+@/-]{1,512}", re.ASCII)


def bucket_of(until: float) -> str:
    """The bucket of what expires at `until`, seconds since 1970.

    >>> bucket_of(0.0), bucket_of(3600.0)
    ('19700101/00', '19700101/01')
    """
    return time.strftime("%Y%m%d/%H", time.gmtime(min(max(until, 0.0), LAST_SECOND)))


def bucket_end(bucket: str) -> float | None:
    """When the hour of a bucket ends, seconds since 1970; None for another text.

    >>> bucket_end("19700101/01"), bucket_end("lost+found")
    (7200.0, None)
    """
    if len(bucket) != 11 or bucket[8] != "/" or not (bucket[:8] + bucket[9:]).isdecimal():
        return None
    try:
        return float(calendar.timegm(time.strptime(bucket, "%Y%m%d/%H")) + HOUR)
    except ValueError:
        return None


def _digest(body: bytes) -> str:
    return blake2b(body, digest_size=DIGEST_BYTES).hexdigest()


def key_for(body: bytes, until: float, depth: int = 0) -> str:
    """The key of a body that expires at `until`. Takes 1 ms for each MB.

    >>> key_for(b"", 0.0, depth=2)
    '19700101/00/3/3/3345524abf6bbe1809449224b5972c41790b6cf2-0'
    """
    digest = _digest(body)
    folders = "".join(f"{digit}/" for digit in digest[: min(depth, MAX_DEPTH)])
    return f"{bucket_of(until)}/{folders}{digest}-{len(body)}"


def is_ours(key: str) -> bool:
    """Whether a key was made by `key_for`."""
    return ends_of(key) is not None


def ends_of(key: str) -> float | None:
    """When the body of a key of ours expires, seconds since 1970; None for other keys."""
    found = _OURS.fullmatch(key)
    return None if found is None else bucket_end(f"{found[1]}/{found[2]}")


def size_of(key: str) -> int | None:
    """The bytes of the body of a key of ours; None for other keys."""
    found = _OURS.fullmatch(key)
    return None if found is None else int(found[4])


def matches(key: str, body: bytes) -> bool:
    """Whether a body is the one that a key of ours names; true for other keys."""
    found = _OURS.fullmatch(key)
    return found is None or (int(found[4]) == len(body) and found[3] == _digest(body))


def key_problem(key: str) -> str | None:
    """Why a key cannot be used, or None. A key of an application may be hostile.

    >>> key_problem("spring/mail-7"), key_problem("../etc/passwd")
    (None, 'has a part that is empty or begins with a dot')
    """
    if not _PLAIN.fullmatch(key):
        return f"is not 1 to {MAX_KEY} characters of A-Z a-z 0-9 . _ = + @ / -"
    parts = key.split("/")
    if not all(parts) or any(part[0] == "." for part in parts):
        return "has a part that is empty or begins with a dot"
    if any(len(part) > 255 for part in parts):
        return "has a part of more than 255 characters"
    return None
