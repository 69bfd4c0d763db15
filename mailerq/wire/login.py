"""The client side of AUTH (RFC 4954): a login, and the lines that prove it."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Callable, Generator
from typing import Final

import msgspec

from mailerq.wire.client_events import Step
from mailerq.wire.smtp import Reply

__all__ = ["MECHANISMS", "Exchange", "Login", "hidden", "mechanism_of", "next_move"]

MAX_COMMAND: Final = 510
"""Bytes of a command. A longer response waits for 334 (RFC 4954, section 4)."""


SHORTEST: Final = 4
"""Characters of a secret to hide. To hide every "5" would spoil replies, and guard nothing."""


class Login(msgspec.Struct, frozen=True):
    """A user name and its password, neither empty; equal logins may share a connection.

    >>> Login("ann", "secret")
    Login('ann')
    """

    username: str
    password: str

    def __repr__(self) -> str:
        return f"Login({self.username!r})"


Exchange = Generator[tuple[Step, bytes], bytes, None]
"""Yields steps and the lines to send, and is sent the challenges, without base64."""


def _cram_md5(login: Login) -> Exchange:
    """RFC 2195: the password does not go over the connection."""
    challenge = yield Step.AUTHCRAM, b"AUTH CRAM-MD5"
    digest = hmac.new(login.password.encode(), challenge, "md5").hexdigest()
    yield Step.AUTHRESPONSE, base64.b64encode(f"{login.username} {digest}".encode())


def _plain(login: Login) -> Exchange:
    """RFC 4616."""
    response = base64.b64encode(f"\0{login.username}\0{login.password}".encode())
    command = b"AUTH PLAIN " + response
    if len(command) > MAX_COMMAND:
        yield Step.AUTHPLAIN, b"AUTH PLAIN"
        command = response
    yield Step.AUTHPLAIN, command


def _login(login: Login) -> Exchange:
    """The obsolete LOGIN, the only mechanism of some servers. The prompts have no fixed text."""
    yield Step.AUTHLOGIN, b"AUTH LOGIN"
    yield Step.AUTHUSERNAME, base64.b64encode(login.username.encode())
    yield Step.AUTHPASSWORD, base64.b64encode(login.password.encode())


MECHANISMS: Final[dict[str, Callable[[Login], Exchange]]] = {
    "CRAM-MD5": _cram_md5,
    "PLAIN": _plain,
    "LOGIN": _login,
}
"""Mechanisms by name, best first."""


def mechanism_of(offered: str) -> str | None:
    """The mechanism to use, of those in the parameters of AUTH in the reply to EHLO.

    >>> mechanism_of("login plain XOAUTH2"), mechanism_of("GSSAPI")
    ('PLAIN', None)
    """
    names = offered.upper().split()
    return next((name for name in MECHANISMS if name in names), None)


def next_move(exchange: Exchange, reply: Reply) -> tuple[Step, bytes] | None:
    """The next step and line after a reply below 400; None if the exchange has succeeded.

    Raises ValueError if the reply cannot answer the last line.
    """
    challenge = _decode_challenge(reply.text) if reply.code == 334 else b""
    if reply.code not in (334, 235) or challenge is None:
        raise ValueError("neither 334 with a challenge nor 235")
    try:
        move = exchange.send(challenge)
    except StopIteration:
        move = None
    if (move is None) is not (reply.code == 235):
        raise ValueError("334 after the last line, or 235 before")
    return move


def _decode_challenge(text: str) -> bytes | None:
    """The challenge in the text of a 334; None if it is no base64."""
    try:
        return base64.b64decode(text.strip().encode(), validate=True)
    except (binascii.Error, ValueError):
        return None


def hidden(text: str, login: Login) -> str:
    """A text of the peer without the password, as it is or as it was sent.

    >>> hidden("535 no: c2VjcmV0, secret", Login("ann", "secret"))
    '535 no: (hidden), (hidden)'
    """
    password = login.password.encode()
    plain = f"\0{login.username}\0".encode() + password
    coded = base64.b64encode(plain).decode(), base64.b64encode(password).decode()
    for secret in (*coded, login.password, repr(password)[2:-1]):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, "(hidden)")
    return text
