"""The syntax of mailboxes, domains, address literals and queue names: one for everybody.

It is that of RFC 5321, sections 4.1.2 and 4.1.3, with the characters that RFC 6531 adds.
Nothing that passes holds a CR, LF, NUL or other control character, so it may go into a
command line, a header or a log as it is.

Ordinary ASCII addresses, nearly all there are, take one match of one expression; all others
take the long way, which also knows how to say what is wrong.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import Final, NamedTuple

from mailerq.errors import AddressError

__all__ = [
    "Mailbox",
    "parse_domain",
    "parse_host",
    "parse_ip",
    "parse_literal",
    "parse_mailbox",
    "parse_path",
    "queue_problem",
]

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

LOCAL_LIMIT: Final = 64
"""Bytes of a local part (RFC 5321, section 4.5.3.1.1)."""

DOMAIN_LIMIT: Final = 253
"""Bytes of a domain. RFC 5321 says 255, which is the form on the wire of DNS; written with
dots that is 253."""

MAILBOX_LIMIT: Final = 254
"""Bytes of a mailbox: 256 for a path (RFC 5321, section 4.5.3.1.3) without its brackets."""

QUEUE_LIMIT: Final = 255
"""Bytes of a queue's name: a short string of AMQP 0-9-1."""

ROUTE_LIMIT: Final = 1024
"""Bytes of a source route, which nobody has any use for."""

# Every match is linear: runs of characters are possessive where they could give back, and each
# round of a group begins with what no other part can take. Groups are not possessive, because
# Python before 3.11.5 gets those wrong.
_LABEL: Final = r"(?![A-Za-z0-9-]*-(?:\.|\Z))[A-Za-z0-9][A-Za-z0-9-]{0,62}+"
# A last label of digits only would make a domain of what others read as an IPv4 address.
_NAME: Final = rf"(?:{_LABEL}\.)*(?![0-9]+\Z){_LABEL}"
_ATEXT: Final = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\-"
_ATOMS: Final = rf"[{_ATEXT}]++(?:\.[{_ATEXT}]++)*"
# RFC 6531 allows every character above ASCII; C1 controls, line and paragraph separators,
# surrogates and noncharacters can do nothing but harm.
_ABOVE: Final = "\u00a0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff"

# These two are compiled when first needed: their large sets take milliseconds.
_LOCAL: Final = (
    rf"[{_ATEXT}{_ABOVE}]++(?:\.[{_ATEXT}{_ABOVE}]++)*"
    rf'|"(?:[ !#-\[\]-~{_ABOVE}]|\\[ -~])*"'
)
_NAME_ABOVE: Final = rf"[A-Za-z0-9.\-{_ABOVE}]+"

_match_ordinary: Final = re.compile(rf"({_ATOMS})@({_NAME})").fullmatch
_match_name: Final = re.compile(_NAME).fullmatch
_find_quoted_end: Final = re.compile(r'"(?:[^"\\]|\\.)*"(?=@)', re.DOTALL).match
_match_route: Final = re.compile(r"(@[^,:@\[\]]++(?:,@[^,:@\[\]]++)*):(.*)", re.DOTALL).fullmatch
_match_dotted: Final = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}").fullmatch


class Mailbox(NamedTuple):
    """A mailbox in two parts; `str` puts it together in a form that ASCII can say if any can.

    >>> mailbox = parse_mailbox("Ann@Bücher.Example")
    >>> mailbox.domain, str(mailbox)
    ('xn--bcher-kva.example', 'Ann@xn--bcher-kva.example')
    """

    local: str
    """As it was written, with its quotes if it had any: only its host knows what it means."""

    domain: str
    """In lower case and A-labels, or a literal as ``[192.0.2.1]`` or ``[IPv6:2001:db8::1]``."""

    @property
    def literal(self) -> IPAddress | None:
        """The address where the domain is a literal."""
        return parse_literal(self.domain) if self.domain.startswith("[") else None

    @property
    def routed(self) -> bool:
        """Whether the local part may hold a second address: ``a%b``, ``b!a``, ``"a@b"``.

        Some hosts send on what is addressed so (RFC 5321, appendix F.2 and C): who may not
        relay may not use it to get round that.
        """
        return not {"%", "!", "@"}.isdisjoint(self.local)

    @property
    def unquoted(self) -> str:
        r"""What the local part says: without quotes and backslashes.

        >>> parse_mailbox(r'"ann \"b\""@example.test').unquoted
        'ann "b"'
        """
        if not self.local.startswith('"'):
            return self.local
        return re.sub(r"\\(.)", r"\1", self.local[1:-1])

    def __str__(self) -> str:
        return f"{self.local}@{self.domain}"


def parse_mailbox(text: str, *, utf8: bool = True) -> Mailbox:
    """Read ``local@domain``. Raises `AddressError`.

    Without `utf8` only ASCII passes, as in a session without SMTPUTF8.
    """
    if len(text) <= MAILBOX_LIMIT and (mailbox := _parse_ordinary(text)):
        return mailbox
    return _parse_unusual(text, utf8)


@lru_cache(maxsize=4096)  # between its command and its delivery an address comes here twice
def _parse_ordinary(text: str) -> Mailbox | None:
    if match := _match_ordinary(text):
        local, domain = match.groups()
        if len(local) <= LOCAL_LIMIT:
            return Mailbox(local, domain.lower())
    return None


def _parse_unusual(text: str, utf8: bool) -> Mailbox:
    if len(text) > MAILBOX_LIMIT or len(text.encode(errors="replace")) > MAILBOX_LIMIT:
        raise AddressError(f"{_shown(text)} is longer than {MAILBOX_LIMIT} bytes")
    if not utf8 and not text.isascii():
        raise AddressError(f"{_shown(text)} holds a character that is not ASCII")
    if quoted := _find_quoted_end(text):
        local, domain = quoted[0], text[quoted.end() + 1 :]
    else:
        local, at, domain = text.rpartition("@")
        if not at:
            raise AddressError(f"{_shown(text)} has no @")
    if len(local.encode(errors="replace")) > LOCAL_LIMIT:
        raise AddressError(f"{_shown(text)}: what is before the @ exceeds {LOCAL_LIMIT} bytes")
    if not re.fullmatch(_LOCAL, local):
        raise AddressError(f"{_shown(text)}: {_shown(local)} cannot stand before the @")
    if domain.startswith("["):
        address = parse_literal(domain)
        tag = "IPv6:" if address.version == 6 else ""
        return Mailbox(local, f"[{tag}{address}]")
    return Mailbox(local, parse_domain(domain))


def parse_path(
    text: str,
    *,
    null: bool = False,
    postmaster: bool = False,
    routes: bool = True,
    utf8: bool = True,
) -> str:
    """Read the ``<local@domain>`` of MAIL and RCPT and give back the mailbox as it is written.

    `null` allows ``<>``, which is ``""``; `postmaster` allows ``<postmaster>`` (RFC 5321,
    section 4.1.1.3). A source route is checked and dropped (appendix F.2), or refused without
    `routes`. Raises `AddressError`.

    >>> parse_path("<@relay.test,@mx.test:ann@example.test>")
    'ann@example.test'
    """
    if not (text.startswith("<") and text.endswith(">") and len(text) >= 2):
        raise AddressError(f"{_shown(text)} is not in angle brackets")
    mailbox = text[1:-1]
    if not mailbox:
        if null:
            return ""
        raise AddressError("<> is for senders only")
    if mailbox[0] == "@":
        mailbox = _drop_route(mailbox, routes)
    elif postmaster and mailbox.lower() == "postmaster":
        return mailbox
    parse_mailbox(mailbox, utf8=utf8)
    return mailbox


def _drop_route(path: str, allowed: bool) -> str:
    match = _match_route(path) if allowed and len(path) <= ROUTE_LIMIT + MAILBOX_LIMIT else None
    if match is None:
        raise AddressError(f"{_shown(path)} starts with an @")
    for hop in match[1].split(","):
        parse_domain(hop[1:])
    return match[2]


def parse_domain(text: str) -> str:
    """Read a domain name, and give it back in lower case and A-labels (RFC 5890).

    No trailing dot, no underscore, no address literal. Raises `AddressError`.
    """
    if len(text) > DOMAIN_LIMIT:
        raise AddressError(f"{_shown(text)} is longer than {DOMAIN_LIMIT} bytes")
    if _match_name(text):
        return text.lower()
    if text.isascii() or not re.fullmatch(_NAME_ABOVE, text):
        raise AddressError(f"{_shown(text)} is not a domain")
    import idna  # its tables are large and few addresses need them

    try:
        name = idna.encode(text, uts46=True).decode()
    except (idna.IDNAError, UnicodeError) as error:
        raise AddressError(f"{_shown(text)} is not a domain: {error}") from None
    # What the mapping makes of a character may be a dot or worse.
    if len(name) > DOMAIN_LIMIT or not _match_name(name):
        raise AddressError(f"{_shown(text)} is not a domain")
    return name


def parse_literal(text: str) -> IPAddress:
    """Read an address literal, ``[192.0.2.1]`` or ``[IPv6:2001:db8::1]``.

    Raises `AddressError`, for general address literals (``[tag:…]``) too: none is in use.
    """
    inner = text[1:-1]
    if text.startswith("[") and text.endswith("]"):
        try:
            if _match_dotted(inner):
                return ipaddress.IPv4Address(inner)
            if inner[:5].lower() == "ipv6:" and "%" not in inner:
                return ipaddress.IPv6Address(inner[5:])
        except ValueError:
            pass
    raise AddressError(f"{_shown(text)} is not an address literal")


def parse_ip(text: str) -> IPAddress:
    """Read the address of a host, without a zone. Raises ValueError.

    An IPv4 address written as IPv6 (RFC 4291, section 2.5.5.2) is the IPv4 address: a host has
    the same rights, limits and name in logs whichever kind of socket it came by.

    >>> str(parse_ip("::ffff:192.0.2.1"))
    '192.0.2.1'
    """
    if "%" in text:
        raise ValueError(f"{_shown(text)} has a zone")
    address = ipaddress.ip_address(text)
    return (address.ipv4_mapped or address) if address.version == 6 else address


def parse_host(text: str) -> str | IPAddress:
    """Read what a person may name as a host: a domain, an IP address, or it in brackets.

    An IPv6 address has no zone. Raises `AddressError`.
    """
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if bare[:5].lower() == "ipv6:":
        return parse_literal(text)
    try:
        if "%" not in bare:
            return ipaddress.ip_address(bare)
    except ValueError:
        pass
    return parse_domain(text)


def _shown(text: str) -> str:
    """The text on one line, whatever is in it, and not too long."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")


def queue_problem(name: str) -> str | None:
    r"""Say why no queue can have this name, or None.

    >>> queue_problem("bounces"), queue_problem("a\0b")
    (None, 'holds a character that cannot be printed')
    """
    if not name:
        return "is empty"
    if not name.isprintable():  # which half a surrogate pair is not either
        return "holds a character that cannot be printed"
    if len(name.encode()) > QUEUE_LIMIT:
        return f"is longer than {QUEUE_LIMIT} bytes"
    return None
