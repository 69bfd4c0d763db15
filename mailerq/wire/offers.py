"""What a server offers, and how it says so in its reply to EHLO."""

from __future__ import annotations

from dataclasses import dataclass

from mailerq.wire.parameters import XCLIENT_ATTRIBUTES

__all__ = ["Settings", "extensions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a server offers; shared by all of its sessions.

    `max_size` is in bytes and announced as SIZE (RFC 1870). `starttls` offers STARTTLS on
    a connection that is not secure. `mechanisms` are those of `sasl.MECHANISMS` that AUTH
    offers, on a connection that is not secure only to a peer that `auth_in_clear` is given
    for. `lmtp` speaks LMTP (RFC 2033). `extended` offers what our own delivery can carry on.
    `normalize` makes pairs of bare CRs and LFs in a mail instead of refusing it.
    """

    hostname: str
    max_size: int = 100_000_000
    max_recipients: int = 1000
    starttls: bool = False
    mechanisms: tuple[str, ...] = ()
    lmtp: bool = False
    extended: bool = True
    normalize: bool = False


def extensions(settings: Settings, *, secure: bool, auth: bool, xclient: bool) -> list[str]:
    """The lines of a reply to EHLO behind the first, as they are in a session so far.

    `auth` says that AUTH may be used now.
    """
    lines = ["PIPELINING", f"SIZE {settings.max_size}"]
    if settings.starttls and not secure:
        lines.append("STARTTLS")
    if settings.mechanisms and auth:
        lines.append("AUTH " + " ".join(settings.mechanisms))
    lines += ["8BITMIME", "ENHANCEDSTATUSCODES"]
    if settings.extended:
        lines += ["SMTPUTF8", "CHUNKING", "BINARYMIME", "DSN"]
        if secure:
            lines.append("REQUIRETLS")
        lines.append(f"LIMITS RCPTMAX={settings.max_recipients}")
    if xclient:
        lines.append("XCLIENT " + " ".join(XCLIENT_ATTRIBUTES))
    return lines
