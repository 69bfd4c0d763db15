"""Make DKIM signatures (RFC 6376) with RSA and Ed25519 (RFC 8301, RFC 8463).

Theory of operation
-------------------
`HeaderFields` finds the fields of a header once, for all signatures of a mail. `body_hash` brings a
body into canonical form and hashes it. `unsigned_field` makes the field of a signature without the
signature itself, `signed_data` the text that a key signs, and `signed_field` the complete field.

What is signed is the mail as it goes on the wire: a bare CR or LF counts as CRLF, dots are not
stuffed, and a last line without an end has one.

A field that others may not add either is *oversigned*: its name stands once more in ``h=`` than
there are such fields. `OVERSIGNED` are the fields that mail programs show, or read the text by.
Others are signed where present; Message-ID is one of them, because the next host may add one.
A name with more than `MAX_INSTANCES` fields is not oversigned: the lowest of them are signed.
"""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Final, Literal

import msgspec

from mailerq.mail._canonical import (
    Body,
    counted_names,
    field_places,
    folded,
    relaxed_field,
    relaxed_text,
    simple_field,
)
from mailerq.mail.headers import boundaries

__all__ = [
    "NEVER_SIGNED",
    "OVERSIGNED",
    "SIGNED",
    "Algorithm",
    "HeaderFields",
    "Terms",
    "body_hash",
    "canonical",
    "field_size",
    "signed_data",
    "signed_field",
    "unsigned_field",
]

Algorithm = Literal["rsa-sha256", "ed25519-sha256"]

OVERSIGNED: Final = (
    b"from", b"to", b"cc", b"subject", b"date", b"reply-to", b"mime-version", b"content-type",
    b"content-transfer-encoding", b"in-reply-to", b"references",
)  # fmt: skip

SIGNED: Final = frozenset((
    b"message-id", b"sender", b"feedback-id", b"tls-required", b"tls-report-domain",
    b"tls-report-submitter", b"list-id", b"list-unsubscribe", b"list-unsubscribe-post",
    b"list-help", b"list-subscribe", b"list-post", b"list-owner", b"list-archive",
))  # fmt: skip
"""Signed where present. RFC 8058 demands List-Unsubscribe and List-Unsubscribe-Post."""

NEVER_SIGNED: Final = frozenset((
    b"return-path", b"received", b"bcc", b"resent-bcc", b"authentication-results",
    b"dkim-signature", b"arc-seal", b"arc-message-signature", b"arc-authentication-results",
))  # fmt: skip
"""Fields that hosts add, change or remove on the way, also if a key asks for them."""

MAX_INSTANCES: Final = 100
"""Fields of one name that are signed, from the bottom up: a strange mail must not make a strange
signature."""

LINE_BYTES: Final = 76
"""Length of a line of a signature, without CRLF."""

TEN_DIGITS: Final = 1e9
"""A time as long as all times until the year 2286."""

BLOCK_BYTES: Final = 1 << 18
"""Bytes of a body to read at a time."""


class Terms(msgspec.Struct, frozen=True):
    """How to sign: what stands in the field besides the hashes.

    `domain` and `selector` are A-labels in lower case. `extra` are names of more fields to sign, in
    lower case. The signature is valid for `lifetime` seconds and until `until`, seconds since
    1970; 0 is no limit. `report` asks for reports of failures (RFC 6651).
    """

    domain: str
    selector: str
    algorithm: Algorithm = "rsa-sha256"
    relaxed_header: bool = True
    relaxed_body: bool = False
    extra: tuple[bytes, ...] = ()
    lifetime: int = 0
    until: float = 0.0
    report: bool = False


class HeaderFields:
    """The fields of a header, by name, and their canonical forms.

    `mail` begins with the header, whose `bounds` are those of `mailerq.mail.headers.boundaries`;
    `body` is the offset of the body in `mail`. A header that is too long is not `is_whole`.
    """

    __slots__ = ("_forms", "_names", "_places", "body", "is_whole", "mail")

    def __init__(self, mail: bytes, bounds: tuple[int, int, bool] | None = None) -> None:
        end, self.body, self.is_whole = boundaries(mail) if bounds is None else bounds
        self.mail = mail
        self._places = field_places(mail, end)
        self._forms: dict[tuple[bytes, bool], list[bytes]] = {}
        self._names: dict[Collection[bytes], tuple[tuple[bytes, int], ...]] = {}

    def __contains__(self, name: bytes) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._places)

    def count(self, name: bytes) -> int:
        """The number of fields with a name, in lower case."""
        return len(self._places.get(name, ()))

    def values(self, name: bytes) -> list[bytes]:
        """The values of the fields with a name, from the top, folded and with their line ends."""
        return [
            self.mail[start:end].partition(b":")[2] for start, end in self._places.get(name, ())
        ]

    def whole(self, name: bytes) -> list[bytes]:
        """The fields with a name, from the top, each with its line end."""
        return [self.mail[start:end] for start, end in self._places.get(name, ())]

    def forms(self, name: bytes, *, relaxed: bool) -> list[bytes]:
        """The canonical forms of the fields with a name, from the bottom up, each with CRLF."""
        key = (name, relaxed)
        if key not in self._forms:
            form = relaxed_field if relaxed else simple_field
            places = reversed(self._places.get(name, ())[-MAX_INSTANCES:])
            self._forms[key] = [form(self.mail, start, end) + b"\r\n" for start, end in places]
        return self._forms[key]

    def relaxed_text(self, names: Sequence[tuple[bytes, int]], field: bytes) -> bytes:
        """See `signed_data`."""
        return relaxed_text(self.mail, self._places, names, field, MAX_INSTANCES)

    def names(self, extra: tuple[bytes, ...]) -> tuple[tuple[bytes, int], ...]:
        """The names for ``h=``, each with how often it stands there.

        `extra` are names in lower case that are signed where present.
        """
        found = self._names.get(extra)
        if found is None:
            found = counted_names(self._places, OVERSIGNED, _wanted(extra), MAX_INSTANCES)
            self._names[extra] = found
        return found


@lru_cache(maxsize=512)
def _wanted(extra: tuple[bytes, ...]) -> frozenset[bytes]:
    """The names that are signed where present."""
    return SIGNED.union(extra).difference(NEVER_SIGNED, OVERSIGNED)


def body_hash(
    pieces: Iterable[bytes | memoryview], *, relaxed: bool, binary: bool = False
) -> bytes:
    r"""Return the SHA-256 of a body in canonical form (RFC 6376, section 3.4).

    >>> import base64
    >>> base64.b64encode(body_hash([], relaxed=False))
    b'frcCV1k9oG9oKj3dpUqdJg1PxRT2RSN/XKdLCPjaYaY='
    """
    digest = hashlib.sha256()
    body = Body(digest, relaxed=relaxed, binary=binary)
    for piece in pieces:
        if len(piece) <= BLOCK_BYTES:
            body.add(piece)
            continue
        view = memoryview(piece)
        for start in range(0, len(piece), BLOCK_BYTES):
            body.add(view[start : start + BLOCK_BYTES])
    body.end()
    return digest.digest()


def unsigned_field(
    terms: Terms,
    names: Sequence[tuple[bytes, int]],
    hash: bytes,
    now: float,
    *,
    begin: str = "DKIM-Signature: v=1;",
) -> bytes:
    """Return the field of a signature with an empty ``b=``, without its line end.

    `hash` is that of the body. `now` is the time of the signature, seconds since 1970.
    """
    at = int(now)
    ends = [at + terms.lifetime] if terms.lifetime else []
    if terms.until:
        ends.append(int(terms.until))
    times = b"%d" % at, b"%d" % max(min(ends), at + 1) if ends else b""
    pieces = _frame(terms, tuple(names), begin, len(times[0]), len(times[1]))
    return b"".join((pieces[0], times[0], pieces[1], times[1], pieces[2], _base64(hash), LAST))


LAST: Final = b";\r\n\tb="

AT: Final = "\0"
END: Final = "\1"
"""Stand for the digits of times in the frame of a field."""


@lru_cache(maxsize=512)
def _frame(
    terms: Terms, names: tuple[tuple[bytes, int], ...], begin: str, at: int, end: int
) -> tuple[bytes, bytes, bytes]:
    """The field of a signature up to the hash: what is before, between and behind its times.

    Those have `at` and `end` digits; the field has no second one if that is 0.
    """
    header = "relaxed" if terms.relaxed_header else "simple"
    body = "relaxed" if terms.relaxed_body else "simple"
    tags = [f"a={terms.algorithm};", f"c={header}/{body};", f"d={terms.domain};"]
    tags += [f"s={terms.selector};", f"t={AT * at};"]
    if end:
        tags.append(f"x={END * end};")
    if terms.report:
        tags.append("r=y;")
    words = [tag.encode("ascii") for tag in tags]
    lines, line = [], begin.encode("ascii")
    for word in words:
        if len(line) + 1 + len(word) > LINE_BYTES:
            lines.append(line)
            line = b"\t" + word
        else:
            line += b" " + word
    lines.append(line)
    line = b"\th="
    for name, count in names:
        for _ in range(count):
            if len(line) + len(name) + 1 > LINE_BYTES and len(line) > 1:
                lines.append(line)
                line = b"\t"
            line += name + b":"
    lines.append(line[:-1] + b";")
    lines.append(b"\tbh=")
    before, _, rest = b"\r\n".join(lines).partition(AT.encode() * at)
    between, _, behind = rest.partition(END.encode() * end) if end else (b"", b"", rest)
    return before, between, behind


def signed_data(
    fields: HeaderFields, names: Sequence[tuple[bytes, int]], field: bytes, *, relaxed: bool
) -> bytes:
    """Return the text that a key signs: the named fields, and the signature's own `field`."""
    if relaxed:
        return fields.relaxed_text(names, field)
    pieces: list[bytes] = []
    for name, count in names:
        forms = fields.forms(name, relaxed=False)
        pieces += forms if count >= len(forms) else forms[:count]
    pieces.append(canonical(field, relaxed=False))
    return b"".join(pieces)


def canonical(field: bytes, *, relaxed: bool) -> bytes:
    """The canonical form of one field, without its line end."""
    return relaxed_field(field, 0, len(field)) if relaxed else simple_field(field, 0, len(field))


def signed_field(field: bytes, signature: bytes) -> bytes:
    """Return the complete field, with its line end."""
    return folded(field, _base64(signature), LINE_BYTES - len(b"\tb="), LINE_BYTES - 1)


@lru_cache(maxsize=1024)
def field_size(terms: Terms, names: Sequence[tuple[bytes, int]], signature_bytes: int) -> int:
    """The length of a complete field, before the hashes are known."""
    field = unsigned_field(terms, names, bytes(32), TEN_DIGITS)
    return len(signed_field(field, bytes(signature_bytes)))


def _base64(data: bytes) -> bytes:
    return binascii.b2a_base64(data, newline=False)
