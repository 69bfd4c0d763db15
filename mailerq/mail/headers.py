"""Find, count, add and remove header fields.

Every mail passes through here, so the code searches one copy of the header with expressions that
run in C, and loops in Python only over fields that were found. A body is copied only when fields
are added or removed.

Theory of operation
-------------------
A line ends with CRLF, or with a CR or LF alone, because a bare CR or LF becomes CRLF when the mail
is sent: otherwise the next server would see fields that this one missed. The header ends at the
first empty line, where two line ends meet. A mail whose first line is not a field has no header.

A header must end within `HEADER_LIMIT`, or the mail is refused. So a search takes a few
milliseconds at most, and only the start of a large mail is read as a header. Every expression below
reads each byte once: runs are possessive, and a search starts at a line end.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Final, NamedTuple

from mailerq.wire._lines import empty_line

__all__ = [
    "DAY_NAMES",
    "HEADER_LIMIT",
    "HOP_LIMIT",
    "MONTH_NAMES",
    "Field",
    "Header",
    "boundaries",
    "date_field",
    "format_date",
    "has_ascii_header",
    "head_of",
    "message_id_field",
    "prepend",
    "protocol_name",
    "received",
    "remove",
    "unfold",
]

# A field name is printable ASCII without a colon (RFC 5322, section 3.6.8). Blanks before the
# colon are obsolete syntax that must be accepted (section 4.5).
_FIRST_FIELD: Final = re.compile(rb"[!-9;-~]++[ \t]*+:").match
_LINE_END: Final = re.compile(rb"\r\n|\n|\r").match
_NAME: Final = re.compile(rb"([^\r\n:]*+)(:?)").match
# For `Header._lines`, where CRLF may have become two LFs.
_FIELD_END: Final = re.compile(rb"\n(?![ \t\n])").search

_FIELD_STARTS: Final = re.compile(rb"\n(?![ \t\n])([!-9;-~]*+)[ \t]*+(:?)").finditer

Finder = Callable[[bytes], Iterator[re.Match[bytes]]]
"""The `finditer` of an expression."""

HEADER_LIMIT: Final = 1 << 20
"""Bytes of a header. The longest headers of mail programs have some 100 kB."""

HOP_LIMIT: Final = 100
"""Received fields of a mail (RFC 5321, section 6.3). A mail with more is looping."""

LINE_LIMIT: Final = 78
"""Length of a line, without CRLF, of fields that are made here (RFC 5322, section 2.1.1)."""

NAME_LIMIT: Final = 255
"""Length of a name in a Received field; a domain cannot be longer."""


class Field(NamedTuple):
    """One header field of a mail.

    `name` is in lower case. `value` is the text after the colon, still folded, without the last
    line end. `start` and `end` are the offsets of the whole field in the mail.
    """

    name: bytes
    value: bytes
    start: int
    end: int


class Header:
    r"""The header of a mail: its fields and its end.

    >>> header = Header(b"To: a@b.test\r\nSubject: x\r\n\r\nbody")
    >>> header.has(b"subject"), header.has(b"from")
    (True, False)
    """

    __slots__ = ("_lines", "_mime", "body", "end", "is_whole")

    end: int
    """Offset of the end of the last field."""

    body: int
    """Offset of the body, after the empty line; the length of a mail without an empty line."""

    is_whole: bool
    """Whether the header ends within `HEADER_LIMIT`; otherwise `raw` is cut off there."""

    # The header in lower case, with an LF before each line: byte n of `raw` is byte n + 1 here.
    _lines: bytes

    def __init__(self, mime: bytes) -> None:
        self.end, self.body, self.is_whole = boundaries(mime)
        self._mime = mime
        # This order keeps at most two copies of a long header in memory at a time.
        lines = (b"\n" + mime[: self.end]).lower()
        if mime.count(b"\r", 0, self.end) != mime.count(b"\r\n", 0, self.end):
            lines = lines.replace(b"\r", b"\n")
        self._lines = lines

    @property
    def raw(self) -> bytes:
        """The fields, each with its line end."""
        return self._mime[: self.end]

    def holds(self, text: bytes) -> bool:
        """Whether the header contains `text` (in lower case, without line ends)."""
        return text in self._lines

    def has(self, name: bytes) -> bool:
        """Whether there is a field with this name (in lower case)."""
        return self.count(name, limit=1) == 1

    def count(self, name: bytes, *, limit: int) -> int:
        """Count the fields with this name (in lower case), up to `limit`."""
        found = 0
        for _ in islice(_field_named(name)(self._lines), limit):
            found += 1
        return found

    def is_looping(self, *, added: int = 0) -> bool:
        """Whether the mail has more than `HOP_LIMIT` Received fields, with the `added` ones."""
        room = HOP_LIMIT - added
        # Hardly any mail has that many lines that start so, and lines cost less to count.
        if self._lines.count(b"\nreceived") <= room:
            return False
        return self.count(b"received", limit=room + 1) > room

    def fields(self) -> Iterator[Field]:
        """Yield the fields from the top. A line that is not a field has an empty name."""
        end = 0
        while end < self.end:
            field = self._field(end)
            end = field.end
            yield field

    def places(self) -> Iterator[tuple[bytes, int, int]]:
        """Yield the name of each field, in lower case, and its offsets, from the top.

        A line that is not a field is left out.
        """
        name, start = b"", 0
        for match in _FIELD_STARTS(self._lines):
            if name:
                yield name, start, match.start()
            name, start = match[1] if match[2] else b"", match.start()
        if name:
            yield name, start, self.end

    def found_by(self, find: Finder) -> Iterator[Field]:
        r"""Yield the fields whose start matches an expression, from the top.

        The expression is in lower case and starts with the ``\n`` before each line. It should
        include the colon, so that other lines cost nothing in Python.
        """
        for match in find(self._lines):
            yield self._field(match.start())

    def _field(self, start: int) -> Field:
        raw = self._mime
        if last := _FIELD_END(self._lines, start + 1):
            end = last.start()
            stop = end - 2 if raw.startswith(b"\r\n", end - 2) else end - 1
        else:
            end = stop = self.end
        name = _NAME(raw, start, self.end)
        assert name is not None, "it may be empty"
        label = name[1].rstrip(b" \t").lower() if name[2] else b""
        return Field(label, raw[name.end() : stop], start, end)


def head_of(mail: bytes | memoryview) -> bytes:
    """Return the part of a mail that is edited: the header of a view, or all of a small mail.

    A view without a header, or whose header does not end within `HEADER_LIMIT`, is cut off one byte
    after the limit. So `Header` finds the same in the part as in the mail.
    """
    if isinstance(mail, bytes):
        return mail
    end, body, is_whole = boundaries(mail)
    return bytes(mail[: body if end and is_whole else HEADER_LIMIT + 1])


def has_ascii_header(mime: bytes) -> bool:
    """Whether the header of a mail is ASCII; the text may be anything."""
    return mime[: boundaries(mime)[0]].isascii()


@lru_cache(maxsize=16)
def _field_named(name: bytes) -> Finder:
    """Return a finder for fields with this name (in lower case) in `Header._lines`."""
    return re.compile(rb"\n%b[ \t]*+:" % re.escape(name)).finditer


def boundaries(mime: bytes | memoryview) -> tuple[int, int, bool]:
    """Return the end of the header, the start of the body, and whether that is within the limit."""
    if not _FIRST_FIELD(mime, 0, HEADER_LIMIT):
        empty = _LINE_END(mime)
        return 0, empty.end() if empty else 0, True
    end = empty_line(mime, HEADER_LIMIT) + 1
    if not end:
        size = min(len(mime), HEADER_LIMIT)
        return size, size, size == len(mime)
    return end, end + (2 if mime[end : end + 2] == b"\r\n" else 1), True


def unfold(value: bytes) -> bytes:
    """Unfold a value into one line: each fold becomes one space, and outer blanks are removed."""
    if b"\n" in value or b"\r" in value:
        lines = value.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        value = b" ".join([line.strip(b" \t") for line in lines])
    return value.strip(b" \t")


def prepend(mime: bytes, *fields: bytes) -> bytes:
    """Add complete fields, each with its CRLF, at the top of a mail.

    A mail without a header also gets an empty line, so that its text does not become part of the
    header.
    """
    if mime and not _FIRST_FIELD(mime, 0, HEADER_LIMIT) and not _LINE_END(mime):
        return b"".join((*fields, b"\r\n", mime))
    return b"".join((*fields, mime))


def remove(mime: bytes, fields: Iterable[Field]) -> bytes:
    """Remove fields, given from the top, from a mail; keep all other bytes.

    One byte may be added: if a bare CR would be followed by an LF, it gets its own LF first.
    Otherwise the two line ends would become one, and the empty line after the header would be lost.
    """
    view = memoryview(mime)
    pieces: list[bytes | memoryview] = []
    kept = 0
    for field in fields:
        if field.start > kept:
            pieces.append(view[kept : field.start])
        kept = field.end
    if pieces and pieces[-1][-1] == 13 and mime[kept : kept + 1] == b"\n":
        pieces.append(b"\n")
    pieces.append(view[kept:])
    return b"".join(pieces)


DAY_NAMES: Final = (
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
)  # fmt: skip
MONTH_NAMES: Final = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip

_last_date: tuple[int, str] = (-1, "")


def format_date(now: float) -> str:
    """Format seconds since 1970 in UTC as a date of RFC 5322, section 3.3."""
    global _last_date
    second = int(now)
    known, text = _last_date
    if second != known:
        # strftime would use names of the locale.
        year, month, day, hour, minute, sec, weekday, *_ = time.gmtime(second)
        text = (
            f"{DAY_NAMES[weekday][:3]}, {day} {MONTH_NAMES[month - 1][:3]} {year:04}"
            f" {hour:02}:{minute:02}:{sec:02} +0000"
        )
        _last_date = (second, text)
    return text


def date_field(now: float) -> bytes:
    """Make a complete Date field."""
    return f"Date: {format_date(now)}\r\n".encode("ascii")


def message_id_field(id: str, hostname: str) -> bytes:
    """Make a complete Message-ID field for a mail without one."""
    return f"Message-ID: <{_clean_id(id)}@{_clean(hostname)}>\r\n".encode("ascii")


def protocol_name(*, extended: bool, secure: bool, authenticated: bool) -> str:
    """Return the protocol after "with" in a Received field (RFC 3848)."""
    if not extended:
        return "SMTP"
    return f"ESMTP{'S' if secure else ''}{'A' if authenticated else ''}"


_UNCLEAN: Final = re.compile(r"[^A-Za-z0-9.:_\[\]-]")
_UNCLEAN_ID: Final = re.compile(r"[^A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]")
_PLAIN_MAILBOX: Final = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~@:\[\]-]+").fullmatch


@lru_cache(maxsize=1024)
def _clean(name: str) -> str:
    """Replace characters of a name that could end a line, a clause or a comment."""
    return _UNCLEAN.sub("?", name[:NAME_LIMIT]) or "unknown"


def _clean_id(id: str) -> str:
    return _UNCLEAN_ID.sub("?", id)


def received(
    *,
    hostname: str,
    id: str,
    now: float,
    protocol: str = "",
    helo: str | None = None,
    client_ip: str | None = None,
    recipient: str | None = None,
    user: str | None = None,
) -> bytes:
    r"""Make a complete Received field (RFC 5321, section 4.4), folded to `LINE_LIMIT`.

    `helo` and `client_ip` are the name and the address of the client. Both are None for mail that
    did not come over a socket; `user` is then its account. Pass `recipient` only for the single
    recipient of a transaction, because the field would disclose recipients to each other. A
    recipient with a quoted or international local part is left out.

    >>> received(hostname="mx.test", id="7f", now=0, user="ann")
    b'Received: by mx.test (from user ann) id 7f; Thu, 1 Jan 1970 00:00:00 +0000\r\n'
    """
    words = []
    if helo is not None:
        words.append(f"from {_clean(helo)}")
        if client_ip:
            kind = "IPv6:" if ":" in client_ip else ""
            words.append(f" ([{kind}{_clean(client_ip)}])")
        words.append("\n")
    words.append(f"by {_clean(hostname)}")
    if user is not None:
        words.append(f" (from user {_clean(user)})")
    if protocol:
        words.append(f" with {protocol}")
    words.append(f" id {_clean_id(id)}")
    if recipient and len(recipient) <= NAME_LIMIT and _PLAIN_MAILBOX(recipient):
        words.append("\n")
        words.append(f"for <{recipient}>")
    words[-1] += ";"
    words.append(f" {format_date(now)}")
    return _fold("Received: ", words).encode("ascii")


def _fold(line: str, words: list[str]) -> str:
    """Join words. Break the line at an LF, and before a word that would make the line too long."""
    text = ""
    for word in words:
        if word == "\n" or (len(line) + len(word) > LINE_LIMIT and not line.endswith(("\t", ": "))):
            text += line + "\r\n"
            line = "\t" + word.strip()
        else:
            line += word
    return text + line + "\r\n"
