"""Find, count, add and take out header fields, without looking at more than they need.

Every message that passes comes through here, so nothing below walks the header in Python
unless something was found in it: the questions are answered by `bytes.find` on one copy of
the header, and a body is copied only when fields are really added or taken out.

Theory of operation
-------------------
A line ends with CRLF, and also with a CR or an LF alone: that is what such a byte turns
into when the message is sent on, and a field that is hidden behind one must not be seen for
the first time by the next server. The header ends at the first empty line, which is where two
line ends meet. A message whose first line is no field has no header, it is all body.

A header ends within `HEADER_LIMIT`, or the mail is refused: so no question costs more than some
milliseconds, whatever was sent, and only the first bytes of a large mail are read as a header.
Every expression below reads a byte once: runs are possessive, and a search starts at a line end.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Final, NamedTuple

__all__ = [
    "HEADER_LIMIT",
    "Field",
    "Header",
    "date_field",
    "format_date",
    "head_of",
    "message_id_field",
    "prepend",
    "protocol_name",
    "received",
    "remove",
    "unfold",
]

# A field name is printable ASCII without the colon (RFC 5322, section 3.6.8); blanks before
# the colon are obsolete syntax that must be read (section 4.5).
_FIRST_FIELD: Final = re.compile(rb"[!-9;-~]++[ \t]*+:").match
_LINE_END: Final = re.compile(rb"\r\n|\n|\r").match
_NAME: Final = re.compile(rb"([^\r\n:]*+)(:?)").match
_END: Final = re.compile(rb"\r\n\r\n").search
# In `Header._lines`, where CR LF may have become two LF.
_FIELD_END: Final = re.compile(rb"\n(?![ \t\n])").search

Finder = Callable[[bytes], Iterator[re.Match[bytes]]]
"""The `finditer` of an expression."""

HEADER_LIMIT: Final = 1 << 20
"""Bytes in which a header must end. The longest that mail programs write have some 100 kB."""

LINE_LIMIT: Final = 78
"""Longest line, without its CRLF, of a field that is made here (RFC 5322, section 2.1.1)."""

NAME_LIMIT: Final = 255
"""Longest name that is copied into a Received field; a domain cannot be longer."""


class Field(NamedTuple):
    """One header field as it stands in the message.

    `name` is in lower case, `value` is what follows the colon with its folding and without
    its last line end, `start` and `end` are the offsets of the whole field in the message.
    """

    name: bytes
    value: bytes
    start: int
    end: int


class Header:
    r"""The header of a message: where it ends and what stands in it.

    >>> header = Header(b"To: a@b.test\r\nSubject: x\r\n\r\nbody")
    >>> header.has(b"subject"), header.has(b"from")
    (True, False)
    """

    __slots__ = ("_lines", "_mime", "body", "end", "is_whole")

    end: int
    """Offset behind the last field."""

    body: int
    """Offset of the body: behind the empty line, or the length of a message without one."""

    is_whole: bool
    """Whether it ends within `HEADER_LIMIT`; otherwise `raw` is cut off there."""

    # The header in lower case, where an LF stands before each line: the byte that is at n in `raw`
    # is at n + 1 here.
    _lines: bytes

    def __init__(self, mime: bytes) -> None:
        self.end, self.body, self.is_whole = _boundaries(mime)
        self._mime = mime
        # In this order no more than two copies of a long one are there at a time.
        lines = (b"\n" + mime[: self.end]).lower()
        if mime.count(b"\r", 0, self.end) != mime.count(b"\r\n", 0, self.end):
            lines = lines.replace(b"\r", b"\n")
        self._lines = lines

    @property
    def raw(self) -> bytes:
        """The fields, each with its line end."""
        return self._mime[: self.end]

    def holds(self, text: bytes) -> bool:
        """Whether that stands anywhere in it, written in lower case and without line ends."""
        return text in self._lines

    def has(self, name: bytes) -> bool:
        """Whether there is a field of that name, which is given in lower case."""
        return self.count(name, limit=1) == 1

    def count(self, name: bytes, *, limit: int) -> int:
        """How many fields have that name (in lower case), counting no further than `limit`."""
        found = 0
        for _ in islice(_field_named(name)(self._lines), limit):
            found += 1
        return found

    def fields(self) -> Iterator[Field]:
        """Walk the fields from the top. A line that is no field comes with an empty name."""
        end = 0
        while end < self.end:
            field = self._field(end)
            end = field.end
            yield field

    def found_by(self, find: Finder) -> Iterator[Field]:
        r"""The fields whose beginning an expression finds, from the top.

        It is for lower case, starts with the ``\n`` that stands before each line, and should go
        on to the colon: other lines then cost nothing in Python.
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
    """The part of a mail that is edited: all of a small one, of a view the header.

    Where no header ends within `HEADER_LIMIT`, it is a byte longer than that: so its `Header` is
    not whole.
    """
    if isinstance(mail, bytes):
        return mail
    found = _END(mail, 0, HEADER_LIMIT + 1)
    return bytes(mail[: found.end() if found else HEADER_LIMIT + 1])


@lru_cache(maxsize=16)
def _field_named(name: bytes) -> Finder:
    """What finds the fields of a name, which is in lower case, in `Header._lines`."""
    return re.compile(rb"\n%b[ \t]*+:" % re.escape(name)).finditer


def _boundaries(mime: bytes) -> tuple[int, int, bool]:
    """Where the header ends, where the body starts, and whether that is within the limit."""
    if not _FIRST_FIELD(mime, 0, HEADER_LIMIT):
        empty = _LINE_END(mime)
        return 0, empty.end() if empty else 0, True
    last = size = min(len(mime), HEADER_LIMIT)
    for pair in (b"\n\r", b"\n\n", b"\r\r"):
        found = mime.find(pair, 0, last + 1)
        if found >= 0:
            last = found
    if last == size:
        return size, size, size == len(mime)
    return last + 1, last + (3 if mime.startswith(b"\r\n", last + 1) else 2), True


def unfold(value: bytes) -> bytes:
    """Make a field's value one line: each fold becomes one space, outer blanks go."""
    if b"\n" in value or b"\r" in value:
        lines = value.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        value = b" ".join([line.strip(b" \t") for line in lines])
    return value.strip(b" \t")


def prepend(mime: bytes, *fields: bytes) -> bytes:
    """Put complete fields, each with its CRLF, on top of a message.

    A message that has no header gets the empty line as well, so that its text does not
    become part of what is added.
    """
    if mime and not _FIRST_FIELD(mime, 0, HEADER_LIMIT) and not _LINE_END(mime):
        return b"".join((*fields, b"\r\n", mime))
    return b"".join((*fields, mime))


def remove(mime: bytes, fields: Iterable[Field]) -> bytes:
    """Take fields, given from the top, out of a message; all other bytes stay as they are.

    One byte can be added: a CR that ended a line alone and would come to stand before an LF
    gets an LF of its own. Together they would be one line end where there were two, and an
    empty line, so the end of the header, would be lost.
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


_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS: Final = (
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
)  # fmt: skip

_last_date: tuple[int, str] = (-1, "")


def format_date(now: float) -> str:
    """Write seconds since 1970 as RFC 5322 section 3.3 wants it, in UTC."""
    global _last_date
    second = int(now)
    known, text = _last_date
    if second != known:
        # Not strftime: the names in a message are English whatever the locale is.
        year, month, day, hour, minute, sec, weekday, *_ = time.gmtime(second)
        text = (
            f"{_DAYS[weekday]}, {day} {_MONTHS[month - 1]} {year:04}"
            f" {hour:02}:{minute:02}:{sec:02} +0000"
        )
        _last_date = (second, text)
    return text


def date_field(now: float) -> bytes:
    """A complete Date field."""
    return f"Date: {format_date(now)}\r\n".encode("ascii")


def message_id_field(id: str, hostname: str) -> bytes:
    """A complete Message-ID field for a message that came without one."""
    return f"Message-ID: <{_clean_id(id)}@{_clean(hostname)}>\r\n".encode("ascii")


def protocol_name(*, extended: bool, secure: bool, authenticated: bool) -> str:
    """What stands behind "with" in a Received field (RFC 3848)."""
    if not extended:
        return "SMTP"
    return f"ESMTP{'S' if secure else ''}{'A' if authenticated else ''}"


_UNCLEAN: Final = re.compile(r"[^A-Za-z0-9.:_\[\]-]")
_UNCLEAN_ID: Final = re.compile(r"[^A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]")
_PLAIN_MAILBOX: Final = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~@:\[\]-]+").fullmatch


@lru_cache(maxsize=1024)
def _clean(name: str) -> str:
    """A name from outside in which nothing can end a line, a clause or a comment."""
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
    r"""A complete Received field (RFC 5321, section 4.4), folded below `LINE_LIMIT`.

    `helo` is what the client called itself and `client_ip` its address; both are None for
    mail that did not come through a socket, and `user` says whose it was then. `recipient`
    is for the only recipient of a transaction; who the others are is nobody's business.
    One with a quoted or an international local part is left out.

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
    """Join words; break the line at an LF, and before a word that would make it too long."""
    text = ""
    for word in words:
        if word == "\n" or (len(line) + len(word) > LINE_LIMIT and not line.endswith(("\t", ": "))):
            text += line + "\r\n"
            line = "\t" + word.strip()
        else:
            line += word
    return text + line + "\r\n"
