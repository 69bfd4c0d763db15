"""Convert a mail with 8-bit bytes to ASCII, for a peer without 8BITMIME.

Theory of operation
-------------------
RFC 6152, section 3, requires a client to convert such a mail or to return it. Only the leaves of a
mail can be encoded (RFC 2045, section 6.4), so the converter walks the mail as a tree. A leaf with
8-bit bytes becomes quoted-printable, or base64 if that is shorter or the leaf is not text. The
containers around a leaf get a new Content-Transfer-Encoding. Boundaries and ASCII parts are kept.
In header fields, 8-bit bytes become encoded words (RFC 2047) and extended parameters (RFC 2231).

The walk reads the bytes once, and finds where each part starts and how to encode the part. It keeps
the headers and these decisions only: `Converted` encodes the parts block by block on each request.

Each line that starts with two hyphens is compared with the boundaries that are open there, so many
parts or deep nesting cannot make the walk slower than linear.

A mail cannot be converted if ASCII cannot express a part of it, for example an address. Conversion
breaks signatures over the converted parts; without it the mail would not be delivered at all.
"""

from __future__ import annotations

import binascii
import re
from base64 import encodebytes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from mailerq.mail.headers import HEADER_LIMIT, unfold
from mailerq.mail.parts import (
    FIELDS,
    MAX_DEPTH,
    MAX_PARTS,
    PARAMETER,
    SHORT_BYTES,
    Delimiters,
    PartHeader,
    unquote,
)
from mailerq.wire._lines import Buffer
from mailerq.wire.framing import has_bare_newline, in_pairs

__all__ = ["Converted", "ascii_field", "convert", "to_seven_bit"]

MAX_FIELD: Final = 1 << 17
"""Bytes of a field with 8-bit bytes: one expression reads the whole field under Python's lock."""

BLOCK_BYTES: Final = 57 << 9
"""Bytes to encode at a time, so that other threads can run in between. A multiple of the 57 bytes
in a line of base64."""

WORD_CHARS: Final = 48
"""Encoded characters of an encoded word: its line has at most 76 (RFC 2047, section 2)."""

_FIELD: Final = re.compile(rb"[!-9;-~]++[ \t]*+:").match
_BLANKS: Final = re.compile(rb"([ \t\r\n]++)").split
# In an address list: quoted text, text in angle brackets, or words with blanks between them.
_IN_LIST: Final = re.compile(
    rb'(?P<quoted>"[^"\\]*+(?:\\.[^"\\]*+)*(?:"|\\?\Z))|(?P<angle><[^>]*+>?)'
    rb'|(?P<words>[^\s"(),:;<>@\[\]\\]++(?:\s++[^\s"(),:;<>@\[\]\\]++)*)|.',
    re.DOTALL,
)

_HIGH_BYTES: Final = bytes(range(128, 256))
_QUESTION_MARKS: Final = bytes.maketrans(_HIGH_BYTES, b"?" * 128)

_ESCAPED: Final = [bytes((byte,)) if byte < 128 else b"=%02X" % byte for byte in range(256)]
_Q_SAFE: Final = frozenset(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!*+/-"
)  # bytes that an encoded word may contain in every place (RFC 2047, section 5)
_Q: Final = [
    bytes((byte,)) if byte in _Q_SAFE else b"_" if byte == 32 else b"=%02X" % byte
    for byte in range(256)
]
_PERCENT: Final = [
    bytes((byte,)) if byte in b"!#$&+-.^_`|~" or bytes((byte,)).isalnum() else b"%%%02X" % byte
    for byte in range(256)
]

_ADDRESSES: Final = frozenset(
    b"from sender reply-to to cc bcc resent-from resent-sender resent-to resent-cc resent-bcc"
    b" disposition-notification-to return-path errors-to".split()
)
_PARAMETERS: Final = frozenset((b"content-type", b"content-disposition"))
_RIGID: Final = frozenset(
    b"received date resent-date message-id resent-message-id in-reply-to references mime-version"
    b" content-transfer-encoding content-id dkim-signature arc-seal arc-message-signature"
    b" arc-authentication-results authentication-results".split()
)
"""Fields whose grammar does not allow encoded words; 8-bit bytes in them are junk."""

_SEVEN: Final = frozenset((b"", b"7bit", b"8bit", b"binary"))


class _CannotConvert(Exception):
    """ASCII cannot express a part of the mail, or the mail exceeds a limit."""


class Converted:
    """A mail in ASCII with CRLF lines, which is encoded on request from the mail it refers to.

    Its length is the total length of its blocks.
    """

    def __init__(self, pieces: Sequence[bytes | _Piece]) -> None:
        self._pieces = pieces
        self._size = sum(map(len, pieces))

    def __len__(self) -> int:
        return self._size

    def blocks(self) -> Iterator[bytes]:
        """Yield the mail in pieces of any length, each encoded on request. Callable again."""
        for piece in self._pieces:
            if isinstance(piece, bytes):
                yield piece
            else:
                yield from piece.encoded()


def convert(mime: bytes) -> Converted | None:
    """Convert a mail with 8-bit bytes to ASCII; return None if that is impossible."""
    if has_bare_newline(mime):
        paired = Buffer()
        for block in _blocks(mime, 0, len(mime)):
            paired.add(in_pairs(block))
        mime = paired.take()
    walk = _Walk(mime)
    try:
        walk.entity(0, message=True)
    except _CannotConvert:
        return None
    return Converted(walk.out)


def to_seven_bit(mime: bytes) -> bytes | None:
    r"""Convert a mail to ASCII with CRLF lines; return None if that is impossible.

    An ASCII mail is returned unchanged.

    >>> to_seven_bit("Subject: Gr\u00fc\u00dfe\r\n\r\nhi".encode())
    b'Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n\r\nhi'
    """
    if mime.isascii():
        return mime
    converted = convert(mime)
    if converted is None:
        return None
    whole = Buffer(len(converted))
    for block in converted.blocks():
        whole.add(block)
    return whole.take()


def ascii_field(field: bytes) -> bytes | None:
    """Convert a header field, without its line end, to ASCII; return None if impossible."""
    if field.isascii():
        return field
    try:
        return _field(field)
    except _CannotConvert:
        return None


class _Walk(Delimiters):
    """One pass over a mail; `out` is the output so far."""

    def __init__(self, mime: bytes) -> None:
        super().__init__(mime)
        self.out: list[bytes | _Piece] = []
        self._done = 0  # end of the input that is in `out`
        self._parts = 0
        self._headers = 0  # bytes of all headers so far
        self._blank = -1  # the CRLF before the next empty line

    def _is_ascii(self, start: int, end: int) -> bool:
        return all(block.isascii() for block in _blocks(self.mime, start, end))

    def _pass(self) -> None:
        """Copy the input up to the end of the line of the delimiter."""
        end = self.mime.find(b"\r\n", self.line)
        end = len(self.mime) if end < 0 else end + 2
        self._put_out(_as_it_is, self._done, end)
        self._done = end
        self.line = self.hyphens(end - 2)

    def _put_out(self, encode: _Encoder, start: int, end: int) -> None:
        if start < end:
            self.out.append(_Piece(encode, self.mime, start, end, end - start))

    def _junk(self) -> None:
        """Copy the text before the first part or after the last; nobody is meant to read it."""
        self.delimiter(len(self.mime))
        self._put_out(_question_marks, self._done, self.line)
        self._done = self.line

    # Entities: each method converts the input up to the next delimiter of an enclosing boundary.

    def entity(self, depth: int, *, message: bool, kind: bytes = b"text/plain") -> None:
        """Convert a message or a part. `kind` is its type if it has no Content-Type."""
        self._parts += 1
        if depth > MAX_DEPTH or self._parts > MAX_PARTS:
            raise _CannotConvert
        mime, start = self.mime, self._done
        fields: list[bytes] = []
        separator = b"\r\n"
        if mime.startswith(b"\r\n", start):
            self._done = start + 2
        elif _FIELD(mime, start) and self.line != start:
            if self._blank < start:
                self._blank = self.find(b"\r\n\r\n", start)
            end, self._done = self._blank, min(self._blank + 4, len(mime))
            if self.delimiter(self._blank) is not None:
                end = self._done = self.line  # the part ends within its header
            self._headers += end - start
            if self._headers > HEADER_LIMIT:
                raise _CannotConvert
            fields = FIELDS(mime[start:end].removesuffix(b"\r\n"))
            separator = mime[max(end, self._done - 2) : self._done]
        else:
            separator = b""
        header = PartHeader([field if field.isascii() else _field(field) for field in fields], kind)
        if header.encoding not in _SEVEN:
            self._leaf(header, separator, message=message)
        elif header.kind.startswith(b"multipart/"):
            self._multipart(header, separator, depth, message=message)
        elif header.kind in (b"message/rfc822", b"message/news"):
            self._put(header, separator, b"7bit", message=message)
            self.entity(depth + 1, message=True)
        else:
            self._leaf(header, separator, message=message)

    def _put(
        self, header: PartHeader, separator: bytes, encoding: bytes | None, *, message: bool
    ) -> None:
        """Write a header and the separator after it."""
        if encoding is not None and header.encoding != encoding:
            if not (encoding == b"7bit" and not header.encoding):  # 7bit is the default
                header.set(b"Content-Transfer-Encoding", encoding)
            if message and not header.get(b"mime-version"):
                header.set(b"MIME-Version", b"1.0")
        self.out += header.lines()
        self.out.append(separator)

    def _multipart(
        self, header: PartHeader, separator: bytes, depth: int, *, message: bool
    ) -> None:
        boundary, level = header.boundary, len(self.open)
        if not boundary or boundary in self.open:
            raise _CannotConvert
        self._put(header, separator, b"7bit", message=message)
        part = b"message/rfc822" if header.kind == b"multipart/digest" else b"text/plain"
        self.open.append(boundary)
        before = self._done
        found = self.delimiter(len(self.mime))
        text = found is None or found[0] != level
        if text and not self._is_ascii(before, self.line):
            raise _CannotConvert  # 8-bit text outside of parts
        self._junk()
        while found is not None and found[0] == level:
            self._pass()
            if found[1]:
                break
            self.entity(depth + 1, message=False, kind=part)
            found = self.delimiter(len(self.mime))
        self.open.pop()
        self.delimiter(len(self.mime))
        self._junk()

    def _leaf(self, header: PartHeader, separator: bytes, *, message: bool) -> None:
        self.delimiter(len(self.mime))
        start, end = self._done, self.line
        if end < len(self.mime):
            end = max(start, end - 2)  # the CRLF before a delimiter belongs to the delimiter
        self._done = end
        if self._is_ascii(start, end):
            self._put(header, separator, None, message=message)
            self._put_out(_as_it_is, start, end)
            return
        encoding, encoded = _encode(header, self.mime, start, end)
        if header.encoding in _SEVEN and not header.get(b"content-type"):
            utf8 = all(map(_is_utf8, _blocks(self.mime, start, end)))
            charset = b"utf-8" if utf8 else b"unknown-8bit"
            header.set(b"Content-Type", b"text/plain; charset=" + charset)
        self._put(header, b"\r\n", encoding, message=message)
        self.out.append(encoded)


# Content


def _blocks(mime: bytes, start: int, end: int) -> Iterator[bytes]:
    """Yield pieces of the input, cut after line ends where possible."""
    while start < end:
        stop = mime.find(b"\r\n", start + BLOCK_BYTES, min(start + 2 * BLOCK_BYTES, end))
        stop = min(start + 2 * BLOCK_BYTES, end) if stop < 0 else stop + 2
        if mime[stop - 1 : stop + 1] == b"\r\n" and stop < end:
            stop += 1
        yield mime[start:stop]
        start = stop


_Encoder = Callable[[bytes, int, int], Iterator[bytes]]


@dataclass(slots=True, frozen=True)
class _Piece:
    """A part of a mail that is encoded on request, and its encoded size."""

    encode: _Encoder
    mime: bytes
    start: int
    end: int
    size: int

    def __len__(self) -> int:
        return self.size

    def encoded(self) -> Iterator[bytes]:
        return self.encode(self.mime, self.start, self.end)


def _as_it_is(mime: bytes, start: int, end: int) -> Iterator[bytes]:
    for at in range(start, end, BLOCK_BYTES):
        yield mime[at : min(at + BLOCK_BYTES, end)]


def _question_marks(mime: bytes, start: int, end: int) -> Iterator[bytes]:
    return (block.translate(_QUESTION_MARKS) for block in _as_it_is(mime, start, end))


def _escape_high(mime: bytes, start: int, end: int) -> Iterator[bytes]:
    """Escape the 8-bit bytes of quoted-printable content."""
    for block in _as_it_is(mime, start, end):
        yield block if block.isascii() else b"".join(map(_ESCAPED.__getitem__, block))


def _drop_high(mime: bytes, start: int, end: int) -> Iterator[bytes]:
    """Remove the 8-bit bytes of base64 content: decoders ignore them."""
    return (block.translate(None, _HIGH_BYTES) for block in _as_it_is(mime, start, end))


def _quoted_printable(mime: bytes, start: int, end: int) -> Iterator[bytes]:
    for block in _blocks(mime, start, end):
        # b2a_qp writes line ends in the form of the first one in the block.
        line_end = b"" if b"\r\n" in block else b"\r\n"
        yield binascii.b2a_qp(block + line_end, istext=True).removesuffix(line_end)


def _base64(mime: bytes, start: int, end: int) -> Iterator[bytes]:
    for block in _as_it_is(mime, start, end):
        yield encodebytes(block).replace(b"\n", b"\r\n")


def _encode(header: PartHeader, mime: bytes, start: int, end: int) -> tuple[bytes, _Piece]:
    """Return an encoding, and the content in this encoding."""
    if header.encoding == b"quoted-printable":
        return header.encoding, _measured(_escape_high, mime, start, end)
    if header.encoding == b"base64":
        return header.encoding, _measured(_drop_high, mime, start, end)
    if header.encoding not in _SEVEN:
        raise _CannotConvert
    if header.kind.startswith((b"text/", b"message/")) and header.encoding != b"binary":
        size = _size_of_quoted_printable(mime, start, end)
        if size is not None:
            return b"quoted-printable", _Piece(_quoted_printable, mime, start, end, size)
    return b"base64", _measured(_base64, mime, start, end)


def _measured(encode: _Encoder, mime: bytes, start: int, end: int) -> _Piece:
    return _Piece(encode, mime, start, end, sum(map(len, encode(mime, start, end))))


def _size_of_quoted_printable(mime: bytes, start: int, end: int) -> int | None:
    """Return the size of the content as quoted-printable, or None if base64 is better."""
    most = (end - start) * 7 // 5 + SHORT_BYTES
    size, seen = 0, start
    for block, encoded in zip(
        _blocks(mime, start, end), _quoted_printable(mime, start, end), strict=True
    ):
        seen += len(block)
        if b"\0" in block or not (block.endswith(b"\r\n") or seen == end):
            return None  # not text, or a line longer than a block
        size += len(encoded)
        if size > most:
            return None
    return size


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


# Fields


def _field(field: bytes) -> bytes:
    """Convert a field with 8-bit bytes."""
    if len(field) > MAX_FIELD:
        raise _CannotConvert
    label, colon, value = field.partition(b":")
    name = label.rstrip(b" \t").lower()
    if not colon or not name.isascii() or name in _RIGID:
        return field.translate(_QUESTION_MARKS)
    if name in _PARAMETERS:
        value = PARAMETER.sub(_parameter, value).translate(_QUESTION_MARKS)
    elif name in _ADDRESSES:
        value = _address_list(value)
    else:
        value = _words(value)
    return label + colon + value


def _words(text: bytes) -> bytes:
    """Turn runs of words with 8-bit bytes into encoded words."""
    pieces: list[bytes] = []
    run: list[bytes] = []
    for index, piece in enumerate(_BLANKS(text)):
        blank = index % 2 == 1
        if not piece.isascii() or (blank and run):
            run.append(piece)
            continue
        if run:
            pieces += _close(run)
            run = []
        pieces.append(piece)
    return b"".join(pieces + _close(run))


def _close(run: list[bytes]) -> list[bytes]:
    """Encode a run of words with the blanks between them; keep the blanks after it."""
    if not run:
        return []
    behind = run.pop() if len(run) % 2 == 0 else b""
    return [_encoded_words(unfold(b"".join(run))), behind]


def _encoded_words(text: bytes) -> bytes:
    """Turn text into encoded words (RFC 2047), in quoted-printable, one on each line."""
    utf8 = _is_utf8(text)
    characters: Iterator[bytes] = (
        (character.encode() for character in text.decode())
        if utf8
        else (bytes((byte,)) for byte in text)
    )
    words: list[bytes] = []
    word: list[bytes] = []
    size = 0
    for character in characters:
        encoded = b"".join([_Q[byte] for byte in character])
        if size + len(encoded) > WORD_CHARS:
            words.append(b"".join(word))
            word, size = [], 0
        word.append(encoded)
        size += len(encoded)
    words.append(b"".join(word))
    charset = b"utf-8" if utf8 else b"unknown-8bit"
    return b"\r\n ".join(b"=?%b?q?%b?=" % (charset, one) for one in words)


def _address_list(value: bytes) -> bytes:
    """Turn names and comments of an address list into encoded words."""
    pieces: list[bytes] = []
    for match in _IN_LIST.finditer(value):
        piece = match[0]
        if piece.isascii():
            pieces.append(piece)
            continue
        after = value[match.end() : match.end() + 1]
        if match["angle"] or after == b"@" or (pieces and pieces[-1] == b"@"):
            raise _CannotConvert  # an address must not be changed
        if match["quoted"]:
            pieces.append(_encoded_words(unfold(unquote(piece))))
        else:
            pieces.append(_words(piece))
    return b"".join(pieces)


def _parameter(match: re.Match[bytes]) -> bytes:
    """Turn a parameter with 8-bit bytes into an extended parameter (RFC 2231)."""
    before, name, _, value = match.groups()
    if value.isascii() or not name.isascii() or b"*" in name:
        return match[0]
    text = unfold(unquote(value))
    encoded = b"".join([_PERCENT[byte] for byte in text])
    charset = b"utf-8" if _is_utf8(text) else b"unknown-8bit"
    pieces = re.findall(rb"(?:%..|[^%]){1,48}", encoded, re.DOTALL)
    pieces[0] = b"%b''%b" % (charset, pieces[0])
    if len(pieces) == 1:
        return b";%b%b*=%b" % (before, name, pieces[0])
    return b"".join(
        b";\r\n %b*%d*=%b" % (name, number, piece) for number, piece in enumerate(pieces)
    )
