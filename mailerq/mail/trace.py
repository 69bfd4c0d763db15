"""A signed header field that names a message of ours wherever the mail is quoted.

Theory of operation
-------------------
Complaints and many bounces come to an address that is not a signed return address, and quote the
header of the mail that they are about. Reporters remove addresses from what they quote, but keep
fields that they do not know. So an outgoing mail may carry a field

    X-Trace: abcd.0123456789abcdef.PAYLOAD

with the id of a key and the day, the first 10 bytes of an HMAC-SHA256, both in base 32 as in
`mailerq.mail.verp`, and the id and the recipient of the message in base64url (RFC 4648, section 5).
Blanks mean nothing, because the field is folded, and programs fold anew.

The field proves that its reader had a mail that we sent to this recipient. The recipient and the
hosts on the way can copy the field, and nobody else can make one.
"""

from __future__ import annotations

import binascii
import hmac
import re
from base64 import b32encode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from typing import Final, NamedTuple

from mailerq.mail.headers import LINE_LIMIT
from mailerq.mail.verp import DAY_SECONDS, DAYS, EARLY_DAYS, MAC_BYTES, Key, Problem

__all__ = ["Trace", "trace_field", "verify_trace"]

VALUE_LIMIT: Final = 2000
"""Bytes of a value. An address has at most 254 bytes, and an id some 60."""

ID_LIMIT: Final = 255
"""Bytes of an id that goes into a field."""

_DIGITS: Final = b"abcdefghijklmnopqrstuvwxyz234567"
_PARTS: Final = re.compile(rb"([a-z2-7])([a-z2-7]{3})\.([a-z2-7]{16})\.([A-Za-z0-9_-]+)").fullmatch


class Trace(NamedTuple):
    """A verified field. `issued` is the beginning of its day, in seconds since 1970."""

    message_id: str
    recipient: str
    issued: float


def trace_field(
    name: str, message_id: str, recipient: str, keys: Sequence[Key], *, now: float
) -> bytes:
    """Make the complete field. `keys[0]` signs.

    >>> from mailerq.mail.verp import parse_keys
    >>> keys = parse_keys("a AeJ2xBrJJPd1vlTV7pVf3OlB")
    >>> field = trace_field("X-Trace", "7f", "ann@example.org", keys, now=1_750_000_000)
    >>> verify_trace(field.partition(b":")[2], keys, now=1_750_000_000, max_age=86400)
    Trace(message_id='7f', recipient='ann@example.org', issued=1749945600.0)
    """
    identifier = message_id.encode(errors="replace")[:ID_LIMIT].replace(b"\0", b"")
    payload = urlsafe_b64encode(identifier + b"\0" + recipient.encode(errors="replace"))
    payload = payload.rstrip(b"=")
    day = int(now // DAY_SECONDS) % DAYS
    digits = bytes(_DIGITS[part] for part in (day >> 10, day >> 5 & 31, day & 31))
    stamp = keys[0].id.encode() + digits
    value = stamp + b"." + _mac(keys[0], stamp, payload) + b"." + payload
    width = LINE_LIMIT - 2
    lines = [value[start : start + width] for start in range(0, len(value), width)]
    return name.encode() + b":\r\n " + b"\r\n ".join(lines) + b"\r\n"


def verify_trace(
    value: bytes, keys: Sequence[Key], *, now: float, max_age: float
) -> Trace | Problem | None:
    """Read the value of a field; None if the value has another form.

    A field is good for `max_age` seconds, in whole days and at least until the next day.
    """
    match = _PARTS(b"".join(value.split())) if len(value) <= VALUE_LIMIT else None
    if match is None:
        return None
    name, digits, mac, payload = match.groups()
    key = next((each for each in keys if each.id.encode() == name), None)
    if key is None or not hmac.compare_digest(_mac(key, name + digits, payload), mac):
        return Problem.FORGED
    day = 0
    for digit in digits:
        day = day * 32 + _DIGITS.index(digit)
    today = int(now // DAY_SECONDS)
    age = (today - day) % DAYS
    if age >= DAYS - EARLY_DAYS:
        age -= DAYS
    if age > max(1, max_age // DAY_SECONDS):
        return Problem.EXPIRED
    try:
        text = urlsafe_b64decode(payload + b"=" * (-len(payload) % 4)).decode()
    except (binascii.Error, UnicodeDecodeError):
        return Problem.FORGED  # this module has not written it
    message_id, _, recipient = text.partition("\0")
    return Trace(message_id, recipient, float(today - age) * DAY_SECONDS)


def _mac(key: Key, stamp: bytes, payload: bytes) -> bytes:
    mac = hmac.digest(key.secret, b"\0".join((b"mailerq trace", stamp, payload)), "sha256")
    return b32encode(mac[:MAC_BYTES]).lower()
