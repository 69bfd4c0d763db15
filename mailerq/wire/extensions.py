"""The extensions that a server offers: its reply to EHLO or HELO, and what a client reads there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from mailerq.wire.parameters import XCLIENT_ATTRIBUTES
from mailerq.wire.smtp import Reply

__all__ = ["Settings", "hello_reply", "offers", "session_limits"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)  # a fast key of `hello_reply`
class Settings:
    """The settings of a server, shared by all of its sessions.

    `max_size` is in bytes and announced as SIZE (RFC 1870). `starttls` offers STARTTLS on
    connections without TLS. `mechanisms` are the `sasl.MECHANISMS` that AUTH offers; without TLS
    only in sessions with `auth_in_clear`. `lmtp` speaks LMTP (RFC 2033). `extended` offers the
    extensions that deliveries can pass on. `dsn` offers DSN (RFC 3461), a promise to send reports.
    `normalize` turns bare CRs and LFs in a mail into CRLF instead of refusing the mail.
    """

    hostname: str
    max_size: int = 100_000_000
    max_recipients: int = 1000
    starttls: bool = False
    mechanisms: tuple[str, ...] = ()
    lmtp: bool = False
    extended: bool = True
    dsn: bool = True
    normalize: bool = False


@lru_cache(maxsize=64)
def hello_reply(
    settings: Settings, extended: bool, secure: bool, auth: bool, xclient: bool
) -> Reply:
    """Make the reply to EHLO (`extended`) or HELO in the current state of a session.

    `auth`: AUTH may be used now.
    """
    if not extended:
        return Reply(250, settings.hostname)
    lines = ["PIPELINING", f"SIZE {settings.max_size}"]
    if settings.starttls and not secure:
        lines.append("STARTTLS")
    if settings.mechanisms and auth:
        lines.append("AUTH " + " ".join(settings.mechanisms))
    lines += ["8BITMIME", "ENHANCEDSTATUSCODES"]
    if settings.extended:
        lines += ["SMTPUTF8", "CHUNKING", "BINARYMIME"]
        if settings.dsn:
            lines.append("DSN")
        if secure:
            lines.append("REQUIRETLS")
        lines.append(f"LIMITS RCPTMAX={settings.max_recipients}")
    if xclient:
        lines.append("XCLIENT " + " ".join(XCLIENT_ATTRIBUTES))
    return Reply(250, "\n".join([settings.hostname, *lines]))


@lru_cache(maxsize=256)
def offers(text: str) -> dict[str, str]:
    r"""The extensions in the text of a reply to EHLO: upper-case keyword -> its parameters.

    All peers with this text share the dict: do not change it.

    >>> offers("mx.test\nSTARTTLS\nsize 1000")
    {'STARTTLS': '', 'SIZE': '1000'}
    """
    extensions = {}
    for line in text.split("\n")[1:]:
        keyword, _, parameters = line.strip().partition(" ")
        extensions[keyword.upper()] = parameters.strip()
    return extensions


_LIMIT: Final = re.compile(r"(?i:(MAILMAX|RCPTDOMAINMAX))=([1-9][0-9]{0,5})", re.ASCII)


def session_limits(parameters: str) -> tuple[int, int]:
    """The limits of LIMITS that matter to mails with one recipient each (RFC 9422, section 4).

    Returns the mails, and the domains of their recipients, that a session takes; 0: no limit.

    >>> session_limits("MAILMAX=20 RCPTMAX=5")
    (20, 0)
    """
    found = {"MAILMAX": 0, "RCPTDOMAINMAX": 0}
    for word in parameters.split():
        if match := _LIMIT.fullmatch(word):
            found[match[1].upper()] = int(match[2])
    return found["MAILMAX"], found["RCPTDOMAINMAX"]
