"""The server side of SASL.

A mechanism is a generator: it yields challenges, is sent responses, both without base64, and
returns the credentials. `BadResponse` ends the exchange with 501.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Generator
from typing import Final, NamedTuple

__all__ = ["MECHANISMS", "BadResponse", "Credentials", "Mechanism"]


class Credentials(NamedTuple):
    """The result of an exchange."""

    login: str
    password: str | None
    """None for a mechanism that proves the password without sending it: see `proves`."""
    challenge: bytes = b""
    response: bytes = b""

    def __repr__(self) -> str:
        return f"Credentials({self.login!r})"

    def proves(self, password: str) -> bool:
        """Whether the client knows `password`. Takes constant time."""
        if self.password is not None:
            # Compare digests: compare_digest returns earlier for different lengths.
            given, known = (
                hashlib.sha256(each.encode()).digest() for each in (self.password, password)
            )
            return hmac.compare_digest(given, known)
        expected = hmac.new(password.encode(), self.challenge, "md5").hexdigest().encode()
        return hmac.compare_digest(expected, self.response)


class BadResponse(Exception):
    """The response of the client does not follow the mechanism."""


Mechanism = Generator[bytes, bytes, Credentials]


def plain(hostname: str) -> Mechanism:
    """RFC 4616: authorization identity, login and password in one response."""
    response = yield b""
    parts = response.split(b"\0")
    if len(parts) != 3:
        raise BadResponse
    identity, login, password = map(_text, parts)
    if not login or (identity and identity != login):
        raise BadResponse
    return Credentials(login, password)


def login(hostname: str) -> Mechanism:
    """The obsolete LOGIN with two prompts, which many clients still try first."""
    name = _text((yield b"Username:"))
    password = _text((yield b"Password:"))
    if not name:
        raise BadResponse
    return Credentials(name, password)


def cram_md5(hostname: str) -> Mechanism:
    """RFC 2195: a keyed digest of a unique challenge."""
    challenge = f"<{secrets.token_hex(16)}@{hostname}>".encode()
    response = yield challenge
    name, separator, digest = response.rpartition(b" ")
    if not separator or not name:
        raise BadResponse
    return Credentials(_text(name), None, challenge, digest.lower())


def _text(value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise BadResponse from None
    if "\0" in text:
        raise BadResponse
    return text


MECHANISMS: Final[dict[str, Callable[[str], Mechanism]]] = {
    "PLAIN": plain,
    "LOGIN": login,
    "CRAM-MD5": cram_md5,
}
"""Mechanisms by name. Each is called with the host name, for its challenges."""
