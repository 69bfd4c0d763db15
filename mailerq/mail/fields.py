"""Make and read the header fields of a mail that is made here.

Whatever a value holds, one field comes out: control characters become blanks, so no value can end
its field or the header.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable
from typing import Final

from mailerq.mail.headers import LINE_LIMIT
from mailerq.mail.parts import codec_of
from mailerq.mail.seven_bit import ascii_field

__all__ = [
    "FIELD_LIMIT",
    "FieldError",
    "address_field",
    "clean",
    "in_words",
    "is_field_name",
    "make_field",
    "mark",
    "place_values",
    "quoted",
]

FIELD_LIMIT: Final = 1 << 16
"""Bytes of a field that is made here."""

WORD_LIMIT: Final = 990
"""Bytes of a word that has a line of its own; a line has at most 998."""

START, END = "\x01", "\x02"
"""Around each value in an address field until `place_values` knows where the value stands. No value
has control characters then."""

_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+").sub
_NAME: Final = re.compile(r"[!-9;-~]{1,76}").fullmatch
_ATOMS: Final = re.compile(r"[\w !#$%&'*+/=?^`{|}~-]*").fullmatch
_ADDRESS: Final = re.compile(r'[^\s<>()\[\]:;,"\\]*').fullmatch
_ESCAPED: Final = re.compile(r'(["\\])').sub
_IN_COMMENT: Final = re.compile(r"([()\\])").sub
_WORDS: Final = re.compile(
    r"=\?[^?\s]{1,40}\?[bBqQ]\?[^?\s]*\?=(?:[ \t]+=\?[^?\s]{1,40}\?[bBqQ]\?[^?\s]*\?=)*"
).sub
_WORD: Final = re.compile(r"=\?([^?\s]{1,40})\?([bBqQ])\?([^?\s]*)\?=").findall
_TEXTUAL: Final = frozenset((b"subject", b"comments", b"keywords"))
"""Fields in which any word may be encoded, also one that is ASCII and too long."""


class FieldError(Exception):
    """A value cannot stand in a field; the text says why."""


def is_field_name(name: str) -> bool:
    """Whether a header field may have this name."""
    return _NAME(name) is not None


def clean(text: str) -> str:
    r"""Turn each run of control characters into a blank.

    >>> clean("a\r\nBcc: b")
    'a Bcc: b'
    """
    return text if text.isprintable() else _CONTROLS(" ", text)


def mark(value: str) -> str:
    """Clean a value for a header field, and mark it for `place_values`."""
    return f"{START}{shown(value)}{END}"


def shown(value: str) -> str:
    """Clean a value for a header field. Nothing in the value is read as an encoded word."""
    return clean(value).replace("=?", "= ?")


def quoted(name: str) -> str:
    """Return a display name, in quotes if the grammar asks for quotes (RFC 5322, 3.2.4)."""
    if _ATOMS(name):
        return name
    return '"' + _ESCAPED(r"\\\1", name) + '"'


def place_values(text: str) -> str:
    r"""Write the marked values of an address field so that each stays what it is.

    A name is quoted where needed. A value in an address must be a plain address or a part of one.
    Raises `FieldError`.

    >>> place_values(f"{mark('Ann, B.')} <{mark('a@b.test')}>, {mark('c@d.test')}")
    '"Ann, B." <a@b.test>, c@d.test'
    """
    out: list[str] = []
    at, in_quotes, in_angle, comments = 0, False, False, 0
    known_until, is_name = -1, False  # up to here the text is a name, or an address
    if len(text) > FIELD_LIMIT:
        raise FieldError(f"has more than {FIELD_LIMIT} characters")
    while at < len(text):
        character = text[at]
        if character == START:
            end = text.index(END, at)
            value = text[at + 1 : end]
            if in_quotes:
                value = _ESCAPED(r"\\\1", value)
            elif comments:
                value = _IN_COMMENT(r"\\\1", value)
            else:
                if not in_angle and known_until < at:
                    known_until, is_name = _end_of_phrase(text, end)
                if is_name and not in_angle:
                    value = quoted(value)
                elif not _ADDRESS(value):
                    raise FieldError(f"{value[:80]!a} cannot stand in an address")
            out.append(value)
            at = end + 1
            continue
        if (
            character == "\\"
            and (in_quotes or comments)
            and text[at + 1 : at + 2] not in ("", START)
        ):
            out.append(text[at : at + 2])
            at += 2
            continue
        if in_quotes:
            in_quotes = character != '"'
        elif character == "(":
            comments += 1
        elif comments:
            comments -= character == ")"
        elif character == '"':
            in_quotes = True
        elif character in "<>":
            in_angle = character == "<"
        out.append(character)
        at += 1
    return "".join(out)


def _end_of_phrase(text: str, at: int) -> tuple[int, bool]:
    """Where the text at `at` ends: before an address in angle brackets, and so a name, or not."""
    in_quotes = False
    while at < len(text):
        character = text[at]
        if character == START:
            at = text.index(END, at)
        elif in_quotes:
            if character == "\\":
                at += 1
            in_quotes = character != '"'
        elif character == '"':
            in_quotes = True
        elif character in "<,;":
            return at, character == "<"
        at += 1
    return at, False


def address_field(name: str, address: str) -> str:
    """Return a mailbox with its display name, which may be empty."""
    shown_name = clean(name).strip()
    return f"{quoted(shown_name)} <{address}>" if shown_name else address


def in_words(value: str, wanted: Callable[[str], bool]) -> str:
    """Decode the encoded words (RFC 2047) whose text is `wanted`; other words stay encoded."""
    if "=?" not in value:
        return value

    def decode(words: re.Match[str]) -> str:
        text = "".join(map(_decode_word, _WORD(words[0])))
        return clean(text) if wanted(text) else words[0]

    return _WORDS(decode, value)


def _decode_word(word: tuple[str, str, str]) -> str:
    charset, encoding, text = word
    data = text.encode(errors="replace")
    try:
        if encoding in "qQ":
            data = binascii.a2b_qp(data, header=True)
        else:
            data = binascii.a2b_base64(data + b"=" * (-len(data) % 4))
        codec = codec_of(charset.partition("*")[0])
        return data.decode(codec if codec.startswith(("iso8859", "cp", "utf-8")) else "utf-8")
    except ValueError:
        return data.decode("latin-1")


def make_field(name: str, value: str, *, utf8: bool = False) -> bytes:
    r"""Make a complete field, folded, in ASCII unless `utf8`. Raises `FieldError`.

    >>> make_field("Subject", "Gr\u00fc\u00dfe")
    b'Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n'
    """
    field = f"{name}: {clean(value).strip()}".encode(errors="replace")
    if len(field) > FIELD_LIMIT:
        raise FieldError(f"has more than {FIELD_LIMIT} bytes")
    if name.lower().encode() in _TEXTUAL and max(map(len, field.split(b" "))) > WORD_LIMIT:
        value = " ".join(value[at : at + 60] for at in range(0, len(value), 60))
        field = f"{name}: {clean(value)}".encode(errors="replace")
    if not (utf8 or field.isascii()):
        encoded = ascii_field(field)
        if encoded is None:
            raise FieldError("has characters beside ASCII where only ASCII can stand")
        field = encoded
    return _folded(field) + b"\r\n"


def _folded(field: bytes) -> bytes:
    """Break a field at blanks into lines of at most `LINE_LIMIT` bytes, where possible."""
    if len(field) <= LINE_LIMIT:
        return field
    lines = []
    for line in field.split(b"\r\n"):
        first, *words = line.split(b" ")
        for word in words:
            if len(first) + len(word) >= LINE_LIMIT and first.strip() and word:
                lines.append(first)
                first = b" " + word
            else:
                first += b" " + word
        lines.append(first)
    # A line of blanks would end the header for some readers, and the name needs its value.
    whole = b"\r\n".join(line for line in lines if line.strip())
    name, colon, rest = whole.partition(b":")
    whole = name + colon + (b" " + rest.lstrip(b" \r\n") if rest.startswith(b"\r\n") else rest)
    if max(map(len, whole.split(b"\r\n"))) > WORD_LIMIT + LINE_LIMIT // 10:
        raise FieldError(f"has a word of more than {WORD_LIMIT} bytes")
    return whole
