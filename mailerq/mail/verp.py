"""Variable return addresses (VERP): a bounce names its recipient, and a token proves that we sent.

Theory of operation
-------------------
A return address ``local@domain`` becomes one of these, for one recipient:

    local+TOKEN-user=host@domain    the recipient, quoted
    local+TOKEN=id@domain           the id of the message, where the recipient is too long
    local+TOKEN_digest@domain       a digest of the id, where the id is too long as well

A local part has at most 64 bytes (RFC 5321, section 4.5.3.1.1). An address that has no room for any
form gets no token.

The token has 20 digits of base 32 (RFC 4648, in lower case): the id of a key, three digits for the
day, and 16 for the first 10 bytes of an HMAC-SHA256 over all other parts of the address. Some hosts
return addresses in lower case, so neither the token nor the HMAC depends on case.

In a quoted recipient ``=`` stands for the ``@``. Characters other than letters, digits, dots,
hyphens and underscores become ``+`` with two hexadecimal digits for each byte of UTF-8.

Several keys verify and the first one signs, so a new key goes to the front, and the old one stays
until its addresses have expired.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from base64 import b32encode
from collections.abc import Sequence
from enum import StrEnum
from typing import Final, NamedTuple

from mailerq.address import LOCAL_LIMIT, MAILBOX_LIMIT, parse_mailbox
from mailerq.errors import AddressError

__all__ = ["Key", "Problem", "Return", "Token", "digest", "encode", "parse_keys", "split", "verify"]

DAY_SECONDS: Final = 86400

DAYS: Final = 32**3
"""Days that three digits count; then they start again, after 89 years."""

EARLY_DAYS: Final = 2
"""Days by which the clock of another server, which signed, may be ahead."""

MAC_BYTES: Final = 10
"""Bytes of the HMAC: nobody tries 2^80 addresses by mail."""

MIN_SECRET: Final = 20
"""Characters of a secret. 20 random ones of base 64 have 120 bits."""

MAX_KEYS: Final = 32

_DIGITS: Final = "abcdefghijklmnopqrstuvwxyz234567"

_find_token: Final = re.compile(r"\+([A-Za-z2-7]{20})([-=_])").search
_is_plain: Final = re.compile(r"[^\x00- \"(),:;<>@\[\\\]\x7f]+").fullmatch
_is_id: Final = re.compile(r"[a-z0-9](?:[a-z0-9_-]|\.(?=[a-z0-9]))*").fullmatch
_quote_plain: Final = re.compile(r"[^A-Za-z0-9._-]").sub
_quote_all: Final = re.compile(r"[^A-Za-z0-9_-]").sub
_is_quoted: Final = re.compile(r"(?:[A-Za-z0-9._-]|\+[0-9A-Fa-f]{2})*").fullmatch
_from_hex: Final = re.compile(r"(?:\+[0-9A-Fa-f]{2})+").sub


class Key(NamedTuple):
    """A key. `id` is one digit of base 32, in lower case."""

    id: str
    secret: bytes

    def __repr__(self) -> str:
        return f"Key(id={self.id!r})"


class Problem(StrEnum):
    """Why a token is not accepted."""

    FORGED = "forged"
    EXPIRED = "expired"


class Token(NamedTuple):
    """An address in its parts, none of them verified.

    `base` is the return address without the token. `kind` is ``-`` before a quoted recipient, ``=``
    before an id, ``_`` before a digest.
    """

    base: str
    key: str
    day: int
    mac: str
    kind: str
    payload: str


class Return(NamedTuple):
    """A verified return address: what the sender of the mail put there.

    One of `recipient`, `message_id` and `digest` is not empty. `digest` is the result of the
    function `digest` for the id of the message. `issued` is when the day of the token began, in
    seconds since 1970.
    """

    base: str
    recipient: str
    message_id: str
    digest: str
    issued: float


def parse_keys(text: str) -> tuple[Key, ...]:
    r"""Read a key file: lines of an id and a secret; ``#`` starts a comment line.

    Raises `ValueError`, which names the line and shows no secret.

    >>> parse_keys("b n0mZVt0L4HcbOCzoUXHOZyTF\na AeJ2xBrJJPd1vlTV7pVf3OlB")
    (Key(id='b'), Key(id='a'))
    """
    keys: dict[str, Key] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2:
            raise ValueError(f"line {number}: expected an id and a secret")
        name, secret = words
        if len(name) != 1 or name not in _DIGITS:
            raise ValueError(f"line {number}: an id is one of a to z and 2 to 7")
        if name in keys:
            raise ValueError(f"line {number}: the id {name} stands there twice")
        if len(secret) < MIN_SECRET:
            raise ValueError(f"line {number}: the secret has fewer than {MIN_SECRET} characters")
        keys[name] = Key(name, secret.encode())
    if not keys:
        raise ValueError("has no key")
    return tuple(keys.values())


def encode(
    base: str, recipient: str, keys: Sequence[Key], *, now: float, message_id: str = ""
) -> str | None:
    """Make the return address `base` for mail to `recipient`; None if there is no room.

    `keys[0]` signs. The result is None too for a `base` that is no plain ``local@domain``, and for
    one with a token. It is ASCII if `base` is, except for its domain.

    >>> keys = parse_keys("a AeJ2xBrJJPd1vlTV7pVf3OlB")
    >>> encode("news@list.test", "ann@example.org", keys, now=1_750_000_000)
    'news+aty64cx3e5bbppcv3khm-ann=example.org@list.test'
    """
    local, _, domain = base.rpartition("@")
    if not domain or not _is_plain(local) or _find_token(local):
        return None
    day = _day_digits(int(now // DAY_SECONDS) % DAYS)
    room = LOCAL_LIMIT - len(local.encode(errors="replace")) - len("+") - 20
    for kind, payload in _payloads(recipient, message_id):
        if len(kind) + len(payload) <= room:
            mac = _mac(keys[0], local, domain, day, kind, payload)
            address = f"{local}+{keys[0].id}{day}{mac}{kind}{payload}@{domain}"
            return address if len(address.encode(errors="replace")) <= MAILBOX_LIMIT else None
    return None


def split(address: str) -> Token | None:
    """Take an address apart, without a key; None if it has no token.

    A search for a token takes a few microseconds, so this serves to look at any address.
    """
    local, _, domain = address.rpartition("@")
    match = _find_token(local) if domain and len(address) <= MAILBOX_LIMIT else None
    if match is None or not match.start():
        return None
    token = match[1].lower()
    day = 0
    for digit in token[1:4]:
        day = day * 32 + _DIGITS.index(digit)
    base = f"{local[: match.start()]}@{domain}"
    return Token(base, token[0], day, token[4:], match[2], local[match.end() :])


def verify(
    address: str, keys: Sequence[Key], *, now: float, max_age: float
) -> Return | Problem | None:
    """Read the address that a bounce came to; None if it has no token.

    A token lives for `max_age` seconds, in whole days and at least until the next day.
    """
    token = split(address)
    if token is None:
        return None
    key = next((each for each in keys if each.id == token.key), None)
    if key is None:
        return Problem.FORGED
    local, _, domain = token.base.rpartition("@")
    day = _day_digits(token.day)
    mac = _mac(key, local, domain, day, token.kind, token.payload)
    if not hmac.compare_digest(mac.encode(), token.mac.encode()):
        return Problem.FORGED
    today = int(now // DAY_SECONDS)
    age = (today - token.day) % DAYS
    if age >= DAYS - EARLY_DAYS:
        age -= DAYS
    if age > max(1, max_age // DAY_SECONDS):
        return Problem.EXPIRED
    recipient = message_id = short = ""
    if token.kind == "-":
        recipient = _unquote(token.payload)
    elif token.kind == "=":
        message_id = token.payload.lower()
    else:
        short = token.payload.lower()
    return Return(token.base, recipient, message_id, short, float(today - age) * DAY_SECONDS)


def digest(message_id: str) -> str:
    """The 16 digits that stand for a long message id, of a form that survives any mail system."""
    raw = hashlib.sha256(b"mailerq verp id\0" + message_id.encode(errors="replace")).digest()
    return b32encode(raw[:MAC_BYTES]).decode().lower()


def _payloads(recipient: str, message_id: str) -> list[tuple[str, str]]:
    """What may stand behind the token, the best form first."""
    payloads = []
    try:
        mailbox = parse_mailbox(recipient)
    except AddressError:
        pass
    else:
        payloads.append(("-", f"{_quote(mailbox.local)}={_quote(mailbox.domain)}"))
    if message_id:
        if _is_id(message_id):
            payloads.append(("=", message_id))
        payloads.append(("_", digest(message_id)))
    return payloads


def _quote(text: str) -> str:
    # Dots of a quoted local part may stand where those of a plain one must not.
    return (_quote_all if text.startswith('"') else _quote_plain)(_in_hex, text)


def _in_hex(match: re.Match[str]) -> str:
    return "".join(f"+{byte:02X}" for byte in match[0].encode(errors="replace"))


def _unquote(payload: str) -> str:
    """The recipient in a verified payload; empty for one that this module has not written."""
    local, separator, domain = payload.rpartition("=")
    if not (separator and _is_quoted(local) and _is_quoted(domain)):
        return ""
    return f"{_plain(local)}@{_plain(domain)}"


def _plain(text: str) -> str:
    return _from_hex(
        lambda match: bytes.fromhex(match[0].replace("+", "")).decode(errors="replace"), text
    )


def _day_digits(day: int) -> str:
    return _DIGITS[day >> 10] + _DIGITS[day >> 5 & 31] + _DIGITS[day & 31]


def _mac(key: Key, local: str, domain: str, day: str, kind: str, payload: str) -> str:
    parts = "\0".join(("mailerq verp", local, domain, key.id + day, kind, payload)).lower()
    mac = hmac.digest(key.secret, parts.encode(errors="replace"), "sha256")
    return b32encode(mac[:MAC_BYTES]).decode().lower()
