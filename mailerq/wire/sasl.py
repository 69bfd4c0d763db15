"""The server's side of SASL: challenges out, a login and a password in.

A mechanism is a generator: it yields each challenge, is sent each response, both without
their base64, and returns the credentials. `BadResponse` ends the exchange with 501.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Final, NamedTuple

__all__ = ["MECHANISMS", "BadResponse", "Credentials", "Mechanism"]


class Credentials(NamedTuple):
    """What an exchange comes to."""

    login: str
    password: str


class BadResponse(Exception):
    """The client's response does not follow its mechanism."""


Mechanism = Generator[bytes, bytes, Credentials]


def plain() -> Mechanism:
    """RFC 4616: authorization identity, login and password in one response."""
    response = yield b""
    parts = response.split(b"\0")
    if len(parts) != 3:
        raise BadResponse
    identity, login, password = map(_text, parts)
    if not login or (identity and identity != login):
        raise BadResponse
    return Credentials(login, password)


def login() -> Mechanism:
    """The obsolete LOGIN, still what many clients speak first: two prompts."""
    name = _text((yield b"Username:"))
    password = _text((yield b"Password:"))
    if not name:
        raise BadResponse
    return Credentials(name, password)


def _text(value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise BadResponse from None
    if "\0" in text:
        raise BadResponse
    return text


MECHANISMS: Final[dict[str, Callable[[], Mechanism]]] = {"PLAIN": plain, "LOGIN": login}
