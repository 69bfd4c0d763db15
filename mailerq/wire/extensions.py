"""What a server offers, and how it says so in its reply to EHLO or HELO."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mailerq.wire.parameters import XCLIENT_ATTRIBUTES
from mailerq.wire.smtp import Reply

__all__ = ["Settings", "hello_reply"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)  # `hello_reply` looks it up
class Settings:
    """What a server offers; shared by all of its sessions.

    `max_size` is in bytes and announced as SIZE (RFC 1870). `starttls` offers STARTTLS on
    a connection that is not secure. `mechanisms` are those of `sasl.MECHANISMS` that AUTH
    offers, on a connection that is not secure only to a peer that `auth_in_clear` is given
    for. `lmtp` speaks LMTP (RFC 2033). `extended` offers what our own delivery can carry on, and
    `dsn` DSN (RFC 3461), which promises reports.
    `normalize` makes pairs of bare CRs and LFs in a mail instead of refusing it.
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
    """The reply to EHLO (`extended`) or HELO, as it is in a session so far.

    `auth` says that AUTH may be used now.
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
