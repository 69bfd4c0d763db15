"""Read the fields of reports: groups of fields, typed values, status codes and dates.

Programs write these fields for other programs, and take liberties. So everything here reads as much
as makes sense, and never fails. Texts that come out hold no control characters and are cut at
`TEXT_LIMIT`.
"""

from __future__ import annotations

import calendar
import re
from typing import Final

from mailerq.address import parse_mailbox
from mailerq.errors import AddressError
from mailerq.mail.fields import clean, in_words
from mailerq.mail.report_parts import fields_of, value_text
from mailerq.message import format_time

__all__ = [
    "TEXT_LIMIT",
    "Fields",
    "address_in",
    "code_in",
    "first_address",
    "groups_of",
    "number",
    "one_line",
    "status_in",
    "time_of",
    "typed",
]

TEXT_LIMIT: Final = 1000
"""Characters of a text in a report, as in results."""

ADDRESS_LIMIT: Final = 320

LAST_YEAR: Final = 9999

_EMPTY_LINES: Final = re.compile(rb"\r\n(?:\r\n)+").split
_ANGLE: Final = re.compile(r"<([^<>\s]{1,320})>").search
_ADDRESS: Final = re.compile(
    r'(?<![^\s<("\':;,=])([^\s<>()\[\]:;,"\'@]{1,64}@[\w.-]{1,253}+)(?!@)'
).search
_KIND: Final = re.compile(r" ?([\w.-]{1,30}) ?;").match
_UNICODE: Final = re.compile(r"\\x\{([0-9A-Fa-f]{2,6})\}").sub
_STATUS: Final = re.compile(r"(?<![\d.])([245]\.\d{1,3}\.\d{1,3})(?![\d.]*\d)").search
_CODE: Final = re.compile(r"(?<![\d.])([245]\d\d)(?=[\s-])").search
_DAY: Final = re.compile(
    r"(?:(\d{1,2})[ -]{1,4}([A-Za-z]{3})[a-z]{0,6}[ -]{1,4}(\d{2,4})"
    r"|([A-Za-z]{3}) {1,4}(\d{1,2}) (?=\d\d:)"
    r"|(\d{4})-(\d\d)-(\d\d))"
).search
_TIME: Final = re.compile(r"[ T]{1,3}(\d{1,2}):(\d\d)(?::(\d\d))?(?:\.\d{1,9})?").match
_ZONE: Final = re.compile(r" {0,3}(?:([+-])(\d\d):?(\d\d)|([A-Za-z]{1,5}))").match
_YEAR: Final = re.compile(r" {1,3}(\d{4})").match

_MONTHS: Final = "jan feb mar apr may jun jul aug sep oct nov dec".split()

_ZONES: Final = {
    "edt": -4, "est": -5, "cdt": -5, "cst": -6, "mdt": -6, "mst": -7, "pdt": -7, "pst": -8,
    "cet": 1, "cest": 2, "bst": 1, "jst": 9,
}  # fmt: skip
"""Hours of zones by name; all others count as UTC (RFC 5322, section 4.3)."""


class Fields(dict[bytes, bytes]):
    """A group of fields: the first value of each name in lower case."""

    def text(self, name: bytes) -> str:
        """A value on one line."""
        return one_line(self.get(name, b""))

    def typed(self, name: bytes) -> str:
        """A value without its type, as in ``rfc822; ann@example.org``."""
        return typed(self.get(name, b""))

    def time(self, name: bytes) -> str:
        """A date in the form of timestamps; empty if there is none that can be read."""
        return time_of(self.text(name))


def groups_of(content: bytes, most: int) -> tuple[list[Fields], int]:
    """The groups of fields that empty lines part, up to `most`, and how many there are."""
    content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
    pieces = [piece for piece in _EMPTY_LINES(content) if piece.strip()]
    groups = []
    for piece in pieces[:most]:
        group = Fields()
        for name, value in fields_of(piece):
            group.setdefault(name, value)
        if group:
            groups.append(group)
    return groups, len(groups) + max(0, len(pieces) - most)


def one_line(value: bytes | str) -> str:
    """A value as text on one line, its encoded words decoded."""
    text = value if isinstance(value, str) else value_text(value[: 8 * TEXT_LIMIT])
    text = clean(in_words(text[: 8 * TEXT_LIMIT], lambda word: True))
    return " ".join(text.split())[:TEXT_LIMIT]


def typed(value: bytes) -> str:
    r"""A value behind its type, with the characters that RFC 6533 writes as ``\x{…}``.

    >>> typed(b"rfc822; ann@example.org"), typed(b"ann@example.org")
    ('ann@example.org', 'ann@example.org')
    """
    text = one_line(value)
    match = _KIND(text)
    if match is not None:
        text = text[match.end() :].strip()
        if match[1].lower() == "utf-8":
            text = clean(_UNICODE(_from_hex, text))
    return text


def _from_hex(match: re.Match[str]) -> str:
    code = int(match[1], 16)
    return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else match[0]


def address_in(text: str) -> str:
    """The address that a value holds, without brackets and words; empty if there is none.

    >>> address_in("<ann@example.org>"), address_in("Ann <ann@example.org> (gone)"), address_in("x")
    ('ann@example.org', 'ann@example.org', '')
    """
    text = text.strip()
    if match := _ANGLE(text):
        text = match[1]
    text = text[:ADDRESS_LIMIT].removeprefix("mailto:")
    try:
        parse_mailbox(text)
    except AddressError:
        return first_address(text)
    return text


def first_address(text: str) -> str:
    """The first thing in a text that is an address, or an empty string."""
    match = _ADDRESS(text)
    if match is None:
        return ""
    found = match[1].rstrip(".")
    try:
        parse_mailbox(found)
    except AddressError:
        return ""
    return found


def status_in(text: str) -> str:
    """The first enhanced status code in a text, or an empty string.

    >>> status_in("smtp; 550 5.1.1 unknown"), status_in("from 5.1.1.7 at 15.1.2")
    ('5.1.1', '')
    """
    match = _STATUS(text)
    return match[1] if match else ""


def code_in(text: str) -> int:
    """The first code of an SMTP reply in a text, or 0."""
    match = _CODE(text + " ")
    return int(match[1]) if match else 0


def number(text: str) -> int | None:
    """A whole number of at most 18 digits, or None."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None


def time_of(text: str) -> str:
    """A date of RFC 5322, of ctime or of ISO 8601 as a timestamp in UTC; empty if there is none.

    A zone that is missing or unknown is UTC.

    >>> time_of("Thu, 7 Jul 1994 17:16:05 -0400"), time_of("8 Jul 94 02:00 UTC")
    ('1994-07-07 21:16:05', '1994-07-08 02:00:00')
    >>> time_of("2016-04-01T00:00:00Z"), time_of("Fri Jul  8 02:00:00 1994"), time_of("soon")
    ('2016-04-01 00:00:00', '1994-07-08 02:00:00', '')
    """
    text = text[:200]
    found = _DAY(text)
    if found is None:
        return ""
    day, month, year, second_month, second_day, iso_year, iso_month, iso_day = found.groups()
    clock = _TIME(text, found.end() - (1 if second_month else 0))
    end = clock.end() if clock else found.end()
    if second_month:
        match = _YEAR(text, end)
        if match is None:
            return ""
        day, month, year, end = second_day, second_month, match[1], match.end()
    if iso_year:
        day, year, number_of_month = iso_day, iso_year, int(iso_month)
    elif month.lower() in _MONTHS:
        number_of_month = _MONTHS.index(month.lower()) + 1
    else:
        return ""
    whole_year = int(year)
    if len(year) < 4:
        whole_year += 1900 if len(year) == 3 or whole_year >= 50 else 2000
    hour, minute, second = (int(part or 0) for part in clock.groups()) if clock else (0, 0, 0)
    if not (1970 <= whole_year <= LAST_YEAR and 1 <= number_of_month <= 12):
        return ""
    if not (1 <= int(day) <= 31 and hour < 24 and minute < 60 and second <= 60):
        return ""
    seconds = calendar.timegm((whole_year, number_of_month, int(day), hour, minute, second))
    if zone := _ZONE(text, end):
        sign, hours, minutes, name = zone.groups()
        if sign:
            offset = int(hours) * 3600 + int(minutes) * 60
            seconds -= offset if sign == "+" else -offset
        else:
            seconds -= _ZONES.get(name.lower(), 0) * 3600
    return format_time(seconds) if seconds >= 0 else ""
