"""Take a mail that may be a report apart, within bounds of size, depth and number of parts.

Theory of operation
-------------------
Reports are small, and what they say comes first: the text for people, the fields for programs, and
then the mail that they are about, of which the header is enough. So only the first `SCAN_BYTES` of
a mail are looked at, `MAX_PARTS` parts, `MAX_DEPTH` levels and `PART_BYTES` of each part. What lies
beyond is as if it were not there. Whatever the bytes are, the result is a list of parts, and the
time grows with `SCAN_BYTES`.

Senders of reports make mistakes in MIME. A boundary that never ends, a transfer encoding that is
wrong and a part without a header are read as well as possible.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from mailerq.mail.headers import Header, unfold
from mailerq.mail.parts import MAX_BOUNDARY, PARAMETER, codec_of, paired, unquote

__all__ = ["PART_BYTES", "SCAN_BYTES", "Entity", "entities", "fields_of", "value_text"]

SCAN_BYTES: Final = 1 << 20
"""Bytes of a mail that are looked at."""

PART_BYTES: Final = 1 << 18
"""Bytes of a part that are decoded; a report about a thousand recipients has as many."""

HEAD_BYTES: Final = 1 << 16
"""Bytes of the header of a mail or a part; what is longer is cut off."""

MAX_FIELDS: Final = 1000
"""Fields that are read of one header."""

MAX_PARTS: Final = 50
"""Parts of a mail. A report has three, and gateways add a few."""

MAX_DEPTH: Final = 4
"""Levels of nested multiparts. Lists and scanners wrap a report once or twice."""

MAX_PARAMETERS: Final = 40
"""Parameters of one field."""

MAX_VALUE: Final = 1 << 14
"""Bytes of a field that are searched for parameters."""

_TYPE: Final = re.compile(rb"\s*+([\w!#$&^.+-]++)\s*+/\s*+([\w!#$&^.+-]++)").match
_NUMBERED: Final = re.compile(rb"([^*]++)(?:\*([0-9]{1,2}))?(\*)?").fullmatch
_PERCENT: Final = re.compile(rb"%([0-9A-Fa-f]{2})").sub
_BREAK: Final = re.compile(rb"\r\n(?![ \t])").finditer


class Entity(NamedTuple):
    """A mail or one of its parts. `kind` is its type in lower case, such as ``text/plain``.

    `raw` is its content in its transfer encoding, up to `SCAN_BYTES`; see `content`. `depth` is 0
    for the mail itself.
    """

    kind: bytes
    fields: list[tuple[bytes, bytes]]
    parameters: dict[bytes, bytes]
    raw: bytes
    depth: int

    def get(self, name: bytes) -> bytes:
        """The unfolded value of the first field with this name (in lower case), or b""."""
        return next((value for key, value in self.fields if key == name), b"")

    def content(self, limit: int = PART_BYTES) -> bytes:
        """The decoded content, cut at `limit` bytes."""
        encoding = self.get(b"content-transfer-encoding").strip().lower()
        if encoding == b"quoted-printable":
            return binascii.a2b_qp(self.raw[: 3 * limit])[:limit]
        if encoding == b"base64":
            return _from_base64(self.raw[: 2 * limit])[:limit]
        return self.raw[:limit]

    @property
    def text(self) -> str:
        """The decoded content as text, whatever its charset is said to be."""
        return _text(self.content(), self.parameters.get(b"charset", b""))

    @property
    def filename(self) -> str:
        """The name of the file that the part is, or an empty string."""
        disposition = parameters_of(self.get(b"content-disposition"))
        name = disposition.get(b"filename") or self.parameters.get(b"name", b"")
        return value_text(name)


def entities(mail: bytes | memoryview) -> Iterator[Entity]:
    """Yield the mail, and then the parts of its multiparts in their order, outermost first.

    What is in a message/rfc822 part is not taken apart. A mail whose first line is no field has no
    header, as everywhere else; a part may begin with such a line.
    """
    data = paired(bytes(mail[:SCAN_BYTES]))
    if Header(data[:HEAD_BYTES]).end:
        first = _entity(data, 0, b"text/plain")
    else:
        first = Entity(b"text/plain", [], {}, data.removeprefix(b"\r\n"), 0)
    waiting, count = [first], 0
    while waiting:
        entity = waiting.pop(0)
        yield entity
        if not entity.kind.startswith(b"multipart/") or entity.depth >= MAX_DEPTH:
            continue
        boundary = entity.parameters.get(b"boundary", b"").rstrip(b" \t")[:MAX_BOUNDARY]
        if not boundary:
            continue
        default = b"message/rfc822" if entity.kind == b"multipart/digest" else b"text/plain"
        for piece in _pieces(entity.raw, boundary):
            count += 1
            if count > MAX_PARTS:
                break
            waiting.append(_entity(piece, entity.depth + 1, default))


def _entity(data: bytes, depth: int, default: bytes) -> Entity:
    start = 2 if data.startswith(b"\r\n") else 0
    end = 0 if start else data.find(b"\r\n\r\n", 0)
    if end < 0:
        end = len(data)
    fields = [] if start else fields_of(data[: min(end, HEAD_BYTES)])
    if not start and not fields:
        end = -4  # no header at all
    value = next((value for name, value in fields if name == b"content-type"), b"")
    match = _TYPE(value[:MAX_VALUE])
    kind = b"/".join(match.groups()).lower() if match else default
    return Entity(kind, fields, parameters_of(value), data[start or end + 4 :], depth)


def _pieces(data: bytes, boundary: bytes) -> Iterator[bytes]:
    """Yield what stands between the delimiters; a multipart may lack its last one."""
    delimiter = b"\r\n--" + boundary
    data = b"\r\n" + data
    at = data.find(delimiter)
    if at < 0:
        return
    at += len(delimiter)
    while True:
        line_end = data.find(b"\r\n", at)
        rest = data[at : line_end if line_end >= 0 else len(data)][:MAX_BOUNDARY]
        closes = rest.startswith(b"--")
        is_other = bool(rest.strip(b" \t")) and not closes  # a longer boundary
        if closes or line_end < 0:
            return
        found = data.find(delimiter, line_end)
        if not is_other:
            yield data[line_end + 2 : found if found >= 0 else len(data)]
        if found < 0:
            return
        at = found + len(delimiter)


def fields_of(head: bytes) -> list[tuple[bytes, bytes]]:
    """The fields of a header whose lines end with CRLF: names in lower case, unfolded values.

    Lines that are no fields are left out, and what comes after `MAX_FIELDS` lines.
    """
    fields: list[tuple[bytes, bytes]] = []
    start = 0
    for number, found in enumerate(_BREAK(head)):
        if number >= MAX_FIELDS:
            return fields
        if (field := _field(head[start : found.start()])) is not None:
            fields.append(field)
        start = found.end()
    if (field := _field(head[start:])) is not None:
        fields.append(field)
    return fields


def _field(line: bytes) -> tuple[bytes, bytes] | None:
    name, colon, value = line.partition(b":")
    name = name.rstrip(b" \t").lower()
    if not colon or not name or len(name) > 100 or b" " in name or b"\r" in name:
        return None
    return name, unfold(value)


def parameters_of(value: bytes) -> dict[bytes, bytes]:
    """The parameters of a field, with continuations and percent signs decoded (RFC 2231)."""
    simple: dict[bytes, bytes] = {}
    pieces: dict[bytes, dict[int, bytes]] = {}
    for count, found in enumerate(PARAMETER.finditer(value[:MAX_VALUE])):
        if count >= MAX_PARAMETERS:
            break
        match = _NUMBERED(found[2].lower())
        if match is None:
            continue
        name, number, extended = match.groups()
        text = unquote(found[4])
        if number is None and not extended:
            simple.setdefault(name, text)
            continue
        if extended:
            if not number or int(number) == 0:
                text = text.split(b"'", 2)[-1]  # after the charset and the language
            text = _PERCENT(lambda each: bytes.fromhex(each[1].decode()), text)
        pieces.setdefault(name, {}).setdefault(int(number or 0), text)
    for name, numbered in pieces.items():
        simple[name] = b"".join(numbered[key] for key in sorted(numbered))
    return simple


def value_text(value: bytes) -> str:
    """The text of a field: UTF-8 if that is what it is, else Latin-1."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _text(data: bytes, charset: bytes) -> str:
    codec = codec_of(charset.decode("ascii", "replace")) if charset else ""
    return value_text(data) if codec in ("", "ascii", "utf-8") else data.decode(codec, "replace")


def _from_base64(data: bytes) -> bytes:
    """Decode as far as that goes."""
    try:
        return binascii.a2b_base64(data)
    except binascii.Error:
        clean = re.sub(rb"[^A-Za-z0-9+/]+", b"", data)
        return binascii.a2b_base64(clean[: len(clean) // 4 * 4])
