"""Find the text parts of a mail, and put other texts in their places.

Theory of operation
-------------------
`text_parts` walks the mail as a tree, like `mailerq.mail.seven_bit`: lines that start with two
hyphens are compared with the boundaries that are open there, and every byte is read once. What is
attached, signed, encrypted or forwarded is not a part to change.

`rewrite` decodes a part, lets a function change its text, and encodes the text as it was encoded
before, where that is possible. All other bytes stay, and are not copied until the whole is joined.
"""

from __future__ import annotations

import binascii
import codecs
import encodings
import encodings.aliases
import re
from base64 import encodebytes
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final, NamedTuple

from mailerq.mail.headers import HEADER_LIMIT, boundaries, unfold
from mailerq.wire._lines import Buffer
from mailerq.wire.framing import has_bare_newline, in_pairs

__all__ = [
    "FIELDS",
    "MAX_BOUNDARY",
    "MAX_DEPTH",
    "MAX_PARTS",
    "PARAMETER",
    "PART_LIMIT",
    "SHORT_BYTES",
    "Delimiters",
    "Part",
    "PartError",
    "PartHeader",
    "codec_of",
    "encode_text",
    "paired",
    "rewrite",
    "text_parts",
    "unquote",
]

MAX_DEPTH: Final = 50
"""Depth of nested parts. Real mail has about five levels."""

MAX_PARTS: Final = 10_000
"""Parts of one mail. A digest of a busy list has some hundred; each part takes time and memory."""

MAX_BOUNDARY: Final = 200
"""Bytes of a boundary. RFC 2046 allows 70."""

MAX_CHARSET: Final = 40
"""Characters of the name of a charset."""

MAX_PARAMETERS: Final = 1 << 14
"""Bytes of a field that are searched for parameters."""

PART_LIMIT: Final = 4 << 20
"""Bytes of a text part that can be changed, encoded and decoded."""

LINE_LIMIT: Final = 998
"""Bytes of a line without its end (RFC 5322, section 2.1.1)."""

SEARCH_BYTES: Final = 1 << 20
"""Bytes to search at a time, so that other threads can run in between."""

SHORT_BYTES: Final = 60
"""Quoted-printable may be this much longer than base64, because people can read it."""

FIELDS: Final = re.compile(rb"\r\n(?![ \t])").split
"""Split a header into its fields."""

PARAMETER: Final = re.compile(
    rb';(\s*+)([^\s=;"]++)(\s*+=\s*+)("[^"\\]*+(?:\\.[^"\\]*+)*"|[^\s;"]*+)', re.DOTALL
)
"""A parameter of a field: the blanks before, its name, the sign and its value."""

_FIELD: Final = re.compile(rb"[!-9;-~]++[ \t]*+:").match
_TYPE: Final = re.compile(rb"\s*+([\w!#$&^.+-]++)\s*+/\s*+([\w!#$&^.+-]++)").match
_ESCAPE: Final = re.compile(rb"\\(.)", re.DOTALL).sub
_CHARSET: Final = re.compile(
    r"utf-8|ascii|iso8859-\d+|cp\d+|koi8-\w|mac-\w+|gb\w+|big5\w*|euc_\w+|shift_jis\w*"
    r"|iso2022_\w+|hz|tis-620|utf-16.*|utf-32.*|utf-7"
).fullmatch
"""The names of codecs for charsets of mail; Python has others, some of them slow."""

_MORE_NAMES: Final = ("koi8_t", "koi8_u")
"""Codecs without another name."""

_NAMES: Final = frozenset(
    (*encodings.aliases.aliases, *encodings.aliases.aliases.values(), *_MORE_NAMES)
)
"""Python imports a module for any other name, and keeps the name for ever."""

_PLAIN: Final = frozenset((b"", b"7bit", b"8bit", b"binary"))
_TYPED: Final = frozenset((b"content-type", b"content-transfer-encoding"))
_SEALED: Final = frozenset((b"multipart/signed", b"multipart/encrypted"))
_TEXTS: Final = {b"text/plain": "text/plain", b"text/html": "text/html"}


class PartError(Exception):
    """A part cannot be read or changed; the text says which and why."""


class PartHeader:
    """The fields of a message or a part, without line ends. `default` is its type without one."""

    def __init__(self, fields: list[bytes], default: bytes) -> None:
        self._fields = fields
        self._names = [field.partition(b":")[0].rstrip(b" \t").lower() for field in fields]
        value = self.get(b"content-type")[:MAX_PARAMETERS]
        match = _TYPE(value)
        self.kind = b"/".join(match.groups()).lower() if match else default
        encoding = self.get(b"content-transfer-encoding").partition(b";")[0]
        self.encoding = encoding.strip().lower()
        self.boundary = b""
        self.charset = b""
        for parameter in PARAMETER.finditer(value):
            name = parameter[2].lower()
            if name == b"boundary" and not self.boundary:
                self.boundary = unquote(parameter[4]).rstrip(b" ")[:MAX_BOUNDARY]
            elif name == b"charset" and not self.charset:
                self.charset = unquote(parameter[4]).strip().lower()

    def get(self, name: bytes) -> bytes:
        """Return the unfolded value of the first field with this name, or b""."""
        if name not in self._names:
            return b""
        field = self._fields[self._names.index(name)]
        return unfold(field.partition(b":")[2])

    def set(self, name: bytes, value: bytes) -> None:
        """Replace the first field with this name, or add the field at the end."""
        field, key = name + b": " + value, name.lower()
        if key in self._names:
            self._fields[self._names.index(key)] = field
        else:
            self._fields.append(field)
            self._names.append(key)

    def set_charset(self, charset: bytes) -> None:
        """Replace or add the parameter of the Content-Type."""
        value = self.get(b"content-type") or self.kind
        parameters = [
            b'%b="%b"' % (found[2], unquote(found[4]).replace(b"\\", b"").replace(b'"', b""))
            for found in PARAMETER.finditer(value[:MAX_PARAMETERS])
            if found[2].lower() != b"charset"
        ]
        self.set(b"Content-Type", b"; ".join([self.kind, b"charset=" + charset, *parameters]))

    def complete(self) -> None:
        """Add MIME-Version to a mail whose type or encoding readers must heed (RFC 2045, 4)."""
        if b"mime-version" not in self._names and not _TYPED.isdisjoint(self._names):
            self.set(b"MIME-Version", b"1.0")

    def lines(self) -> Iterator[bytes]:
        """Yield the fields with their line ends."""
        for field in self._fields:
            yield field + b"\r\n"

    @property
    def text_kind(self) -> str:
        """``text/plain`` or ``text/html`` if the part is text for a reader, else empty."""
        if self.get(b"content-disposition")[:11].lower().startswith(b"attachment"):
            return ""
        return _TEXTS.get(self.kind, "")


def unquote(value: bytes) -> bytes:
    """Return a quoted string without quotes and escapes, and other text as it is."""
    if len(value) > 1 and value.startswith(b'"') and value.endswith(b'"'):
        return _ESCAPE(rb"\1", value[1:-1])
    return value


def paired(mime: bytes) -> bytes:
    r"""Turn each bare CR and LF of a mail into CRLF, in blocks; return the same object if none is.

    >>> paired(b"a\nb\r\nc\r")
    b'a\r\nb\r\nc\r\n'
    """
    if not has_bare_newline(mime):
        return mime
    whole, start = Buffer(len(mime)), 0
    while start < len(mime):
        stop = start + SEARCH_BYTES
        if mime.startswith(b"\r\n", stop - 1):
            stop += 1
        whole.add(in_pairs(mime[start:stop]))
        start = stop
    return whole.take()


class Part(NamedTuple):
    """A text part: the offsets of its header, of its text and of its end in the mail."""

    header: PartHeader
    start: int
    body: int
    end: int


def text_parts(mime: bytes) -> Iterator[Part]:
    """Yield the text parts of a mail whose lines end with CRLF. Raises `PartError`.

    The first part may be the whole mail: then its `start` is 0.
    """
    return _Walk(mime).entity(0, b"text/plain")


class Delimiters:
    """Finds the delimiters of parts: lines of two hyphens and a boundary that is `open`.

    `line` is where the next line with two hyphens starts. Every byte is read once.
    """

    def __init__(self, mime: bytes) -> None:
        self.mime = mime
        self.open: list[bytes] = []  # boundaries, outermost first
        self.line = 0 if mime.startswith(b"--") else self.hyphens(0)

    def hyphens(self, start: int) -> int:
        """The next line that starts with two hyphens."""
        return min(self.find(b"\r\n--", start) + 2, len(self.mime))

    def find(self, what: bytes, start: int) -> int:
        """Return the offset of `what`, or the end of the mail; let other threads run meanwhile."""
        mime, overlap = self.mime, len(what) - 1
        while start < len(mime):
            found = mime.find(what, start, start + SEARCH_BYTES + overlap)
            if found >= 0:
                return found
            start += SEARCH_BYTES
        return len(mime)

    def delimiter(self, limit: int) -> tuple[int, bool] | None:
        """Move `line` to the next delimiter before `limit`.

        Return the index of its boundary in `open`, and whether it is the closing delimiter.
        """
        while self.line < limit:
            line = self.mime[self.line + 2 : self.line + 6 + MAX_BOUNDARY]
            text, ended, _ = line.partition(b"\r\n")
            name = text.rstrip(b" \t") if ended or len(line) < MAX_BOUNDARY else b""
            for boundary, closes in ((name, False), (name.removesuffix(b"--"), True)):
                if boundary in self.open:
                    return self.open.index(boundary), closes
            self.line = self.hyphens(self.line)
        return None


class _Walk(Delimiters):
    """One pass over a mail."""

    def __init__(self, mime: bytes) -> None:
        super().__init__(mime)
        self._at = 0
        self._parts = 0
        self._blank = -1  # the CRLF before the next empty line

    def entity(self, depth: int, kind: bytes) -> Iterator[Part]:
        """Yield the text parts up to the next delimiter of an enclosing boundary."""
        self._parts += 1
        if depth > MAX_DEPTH or self._parts > MAX_PARTS:
            raise PartError("the mail has too many parts")
        mime, start = self.mime, self._at
        fields: list[bytes] = []
        if mime.startswith(b"\r\n", start):
            self._at = start + 2
        elif _FIELD(mime, start) and self.line != start:
            if self._blank < start:
                self._blank = self.find(b"\r\n\r\n", start)
            if self.delimiter(self._blank) is not None:
                self._at = self.line  # the part ends within its header
                return
            if self._blank - start > HEADER_LIMIT:
                raise PartError("the header of a part is too long")
            fields = FIELDS(mime[start : self._blank].removesuffix(b"\r\n"))
            self._at = min(self._blank + 4, len(mime))
        header = PartHeader(fields, kind)
        plain = header.encoding in _PLAIN
        if header.kind.startswith(b"multipart/") and header.kind not in _SEALED and plain:
            if header.boundary and header.boundary not in self.open:
                yield from self._multipart(header, depth)
                return
        body = self._at
        self.delimiter(len(mime))
        end = self._at = self.line
        if end < len(mime):
            end = max(body, end - 2)  # the CRLF before a delimiter belongs to the delimiter
        if header.text_kind:
            yield Part(header, start, body, end)

    def _multipart(self, header: PartHeader, depth: int) -> Iterator[Part]:
        level = len(self.open)
        part = b"message/rfc822" if header.kind == b"multipart/digest" else b"text/plain"
        self.open.append(header.boundary)
        found = self.delimiter(len(self.mime))
        while found is not None and found[0] == level:
            end = self.mime.find(b"\r\n", self.line)
            self._at = len(self.mime) if end < 0 else end + 2
            self.line = self.hyphens(self._at - 2)
            if found[1]:
                break
            yield from self.entity(depth + 1, part)
            found = self.delimiter(len(self.mime))
        self.open.pop()
        self.delimiter(len(self.mime))
        self._at = self.line


Change = Callable[[str, str], str]
"""A function of the type of a part and its text: the new text."""


def rewrite(mime: bytes, change: Change, *kinds: str) -> tuple[bytes, list[bytes | memoryview]]:
    """Change the text parts of some types, of a mail whose lines end with CRLF.

    Raises `PartError`.

    Return the header of the mail, each field with its line end, and the rest in pieces.
    """
    view = memoryview(mime)
    head = b""
    pieces: list[bytes | memoryview] = []
    _, kept, is_whole = boundaries(mime)
    if not is_whole:
        raise PartError("the header is too long")
    if fields := mime[:kept].removesuffix(b"\r\n").removesuffix(b"\r\n"):
        head = fields + b"\r\n"
    for part in text_parts(mime) if kinds else ():
        if part.header.text_kind not in kinds:
            continue
        changed = _changed(part, mime, change)
        if changed is None:
            continue
        if part.start == 0:
            part.header.complete()
            head = b"".join(part.header.lines())
        else:
            lines = b"".join(part.header.lines())
            pieces += (view[kept : part.start], lines + b"\r\n")
        pieces.append(changed)
        kept = part.end
    pieces.append(view[kept:])
    return head, pieces


def _changed(part: Part, mime: bytes, change: Change) -> bytes | None:
    """Return the new content of a part, and set its fields; None if nothing changes."""
    kind = part.header.text_kind
    if part.end - part.body > PART_LIMIT:
        raise PartError(f"the {kind} part has more than {PART_LIMIT} bytes")
    codec = _codec(part.header)
    text = _decoded(part.header, mime[part.body : part.end], codec)
    changed = change(kind, text)
    return None if changed is text else _encoded(part.header, changed, codec)


@lru_cache(maxsize=64)
def codec_of(charset: str) -> str:
    """The name of the codec for a charset of mail; empty if the charset is unknown.

    >>> codec_of("ISO-8859-1"), codec_of("rot13"), codec_of("x")
    ('iso8859-1', '', '')
    """
    name = encodings.normalize_encoding(charset[:MAX_CHARSET]).lower()
    if name not in _NAMES and name.replace(".", "_") not in _NAMES:
        return ""
    try:
        codec = codecs.lookup(name).name
    except LookupError:  # of another system
        return ""
    return codec if _CHARSET(codec) else ""


def _codec(header: PartHeader) -> str:
    """The codec of a part. ASCII is read as UTF-8, which some programs send without saying so."""
    charset = header.charset.decode("ascii", "replace") or "utf-8"
    codec = codec_of(charset)
    if not codec:
        raise PartError(f"the {header.text_kind} part has the unknown charset {charset[:80]!a}")
    return "utf-8" if codec == "ascii" else codec


def _decoded(header: PartHeader, content: bytes, codec: str) -> str:
    try:
        if header.encoding == b"quoted-printable":
            content = binascii.a2b_qp(content)
        elif header.encoding == b"base64":
            content = binascii.a2b_base64(content)
        elif header.encoding not in _PLAIN:
            raise PartError(f"the {header.text_kind} part has an unknown encoding")
        # What is no UTF-8 passes through unchanged.
        return content.decode(codec, "surrogateescape" if codec == "utf-8" else "strict")
    except (UnicodeError, binascii.Error) as error:
        raise PartError(f"the {header.text_kind} part cannot be decoded: {error}") from None


def _encoded(header: PartHeader, text: str, codec: str) -> bytes:
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\r\n")
    if header.encoding != b"base64" and "\r\n".encode(codec) != b"\r\n":
        codec = "utf-8"  # such as UTF-16, which has no lines in the sense of a mail
        header.set_charset(b"utf-8")
    try:
        content = text.encode(codec, "surrogateescape" if codec == "utf-8" else "strict")
    except UnicodeError:
        codec = "utf-8"
        content = text.encode(errors="replace")
        header.set_charset(b"utf-8")
    if not content.isascii() and codec == "utf-8" and header.charset != b"utf-8":
        header.set_charset(b"utf-8")
    encoding, is_plain = header.encoding, _is_short(content)
    if encoding == b"base64":
        return _base64(content)
    if encoding == b"quoted-printable":
        return _quoted_printable(content)
    if is_plain and (content.isascii() or encoding in (b"8bit", b"binary")):
        return content
    header.set(b"Content-Transfer-Encoding", b"quoted-printable")
    return _quoted_printable(content)


def encode_text(text: str) -> tuple[bytes, bytes]:
    """Encode a text in UTF-8 for a part: its Content-Transfer-Encoding, and the content."""
    content = in_pairs(text.encode(errors="replace"))
    if content.isascii() and _is_short(content):
        return b"7bit", content
    quoted, encoded = _quoted_printable(content), _base64(content)
    if len(quoted) <= len(encoded) + SHORT_BYTES:
        return b"quoted-printable", quoted
    return b"base64", encoded


def _is_short(content: bytes) -> bool:
    """Whether all lines are short enough to be sent as they are, and hold no NUL."""
    return b"\0" not in content and max(map(len, content.split(b"\r\n"))) <= LINE_LIMIT


def _quoted_printable(content: bytes) -> bytes:
    # b2a_qp writes line ends in the form of the first one.
    line_end = b"" if b"\r\n" in content else b"\r\n"
    return binascii.b2a_qp(content + line_end, istext=True).removesuffix(line_end)


def _base64(content: bytes) -> bytes:
    return encodebytes(content).replace(b"\n", b"\r\n")
