"""The syntax of mailboxes, domains, address literals and queue names.

The grammar is RFC 5321, sections 4.1.2 and 4.1.3, plus the characters of RFC 6531. Accepted text
holds no CR, LF, NUL or other control character, so it is safe in a command line, a header or a
log.

Ordinary ASCII addresses match one expression. All others take a slower path, which also produces
the error texts.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import Final, NamedTuple

from mailerq.errors import AddressError

__all__ = [
    "Mailbox",
    "host_port",
    "is_loopback",
    "parse_domain",
    "parse_host",
    "parse_ip",
    "parse_literal",
    "parse_lmtp",
    "parse_mailbox",
    "parse_path",
    "parse_peer",
    "queue_leads_to",
    "queue_problem",
    "split_host_port",
]

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

LMTP_PORT: Final = 24
"""The port of LMTP by custom; RFC 2033 has none, and forbids 25."""

SOCKET_PATH_BYTES: Final = 107
"""Bytes of the path of a Unix socket (unix(7))."""

IP_LIMIT: Final = 64
"""Characters beyond which a text is no IP address without a zone; the longest has 45."""

LOCAL_LIMIT: Final = 64
"""Bytes of a local part (RFC 5321, section 4.5.3.1.1)."""

DOMAIN_LIMIT: Final = 253
"""Bytes of a domain. The 255 of RFC 5321 counts DNS wire format, which is 253 with dots."""

MAILBOX_LIMIT: Final = 254
"""Bytes of a mailbox: 256 for a path (RFC 5321, section 4.5.3.1.3) without its brackets."""

QUEUE_LIMIT: Final = 255
"""Bytes of a queue name: the short string of AMQP 0-9-1."""

ROUTE_LIMIT: Final = 1024
"""Bytes of a source route. Routes are dropped, so a long one has no use."""

# Every match takes linear time. Runs of characters are possessive where backtracking could start,
# and each repetition of a group begins with a character that no other part matches. Groups are not
# possessive: Python before 3.11.5 matches possessive groups wrongly.
_LABEL: Final = r"(?![A-Za-z0-9-]*-(?:\.|\Z))[A-Za-z0-9][A-Za-z0-9-]{0,62}+"
# The last label must not be all digits: other software would read an IPv4 address.
_NAME: Final = rf"(?:{_LABEL}\.)*(?![0-9]+\Z){_LABEL}"
_ATEXT: Final = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\-"
_ATOMS: Final = rf"[{_ATEXT}]++(?:\.[{_ATEXT}]++)*"
# RFC 6531 allows every character above ASCII. C1 controls, line and paragraph separators,
# surrogates and noncharacters are refused: they only do harm.
_ABOVE: Final = "\u00a0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff"

# Compiled on first use: the large character sets take milliseconds.
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
    """A mailbox in two parts. `str` joins them; the result is ASCII if the local part is.

    >>> mailbox = parse_mailbox("Ann@Bücher.Example")
    >>> mailbox.domain, str(mailbox)
    ('xn--bcher-kva.example', 'Ann@xn--bcher-kva.example')
    """

    local: str
    """As written, quotes included: only the destination host may interpret a local part."""

    domain: str
    """In lower case and A-labels, or a literal as ``[192.0.2.1]`` or ``[IPv6:2001:db8::1]``."""

    @property
    def routed(self) -> bool:
        """Whether the local part may hold a second address: ``a%b``, ``b!a``, ``"a@b"``.

        Some hosts relay such mail (RFC 5321, appendices C and F.2). A client that may not relay
        must not get round that rule with such an address.
        """
        return not {"%", "!", "@"}.isdisjoint(self.local)

    def __str__(self) -> str:
        return f"{self.local}@{self.domain}"


def parse_mailbox(text: str, *, utf8: bool = True) -> Mailbox:
    """Read ``local@domain``. Raises `AddressError`.

    Without `utf8` the address must be ASCII, as in a session without SMTPUTF8.
    """
    if len(text) <= MAILBOX_LIMIT and (mailbox := _parse_ordinary(text)):
        return mailbox
    return _parse_unusual(text, utf8)


@lru_cache(maxsize=4096)  # each address is parsed twice: in its command and at its delivery
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
    """Read the ``<local@domain>`` of MAIL and RCPT; return the mailbox as written.

    `null` allows ``<>`` and returns ``""``. `postmaster` allows ``<postmaster>`` (RFC 5321,
    section 4.1.1.3). A source route is checked and dropped (appendix F.2), or refused if `routes`
    is false. Raises `AddressError`.

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
    """Read a domain name; return lower case A-labels (RFC 5890).

    No trailing dot, no underscore, no address literal. Raises `AddressError`.
    """
    if len(text) > DOMAIN_LIMIT:
        raise AddressError(f"{_shown(text)} is longer than {DOMAIN_LIMIT} bytes")
    if _match_name(text):
        return text.lower()
    if text.isascii() or not re.fullmatch(_NAME_ABOVE, text):
        raise AddressError(f"{_shown(text)} is not a domain")
    import idna  # imported here: the tables are large, and few addresses need them

    try:
        name = idna.encode(text, uts46=True).decode()
    except (idna.IDNAError, UnicodeError) as error:
        raise AddressError(f"{_shown(text)} is not a domain: {error}") from None
    # The mapping may turn a character into a dot, or worse.
    if len(name) > DOMAIN_LIMIT or not _match_name(name):
        raise AddressError(f"{_shown(text)} is not a domain")
    return name


def parse_literal(text: str) -> IPAddress:
    """Read an address literal, ``[192.0.2.1]`` or ``[IPv6:2001:db8::1]``.

    Raises `AddressError`, also for general address literals (``[tag:…]``): none is in use.
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

    An IPv4-mapped IPv6 address (RFC 4291, section 2.5.5.2) becomes the IPv4 address, so a host has
    one set of rights, limits and log entries whichever kind of socket accepted it.

    >>> str(parse_ip("::ffff:192.0.2.1"))
    '192.0.2.1'
    """
    if "%" in text:
        raise ValueError(f"{_shown(text)} has a zone")
    address = ipaddress.ip_address(text)
    return (address.ipv4_mapped or address) if address.version == 6 else address


def parse_host(text: str) -> str | IPAddress:
    """Read a host that a person named: a domain or an IP address, with or without brackets.

    An IPv6 address must have no zone. Raises `AddressError`.
    """
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if bare[:5].lower() == "ipv6:":
        return parse_literal(text)
    address = _ip_of(bare) if len(bare) <= IP_LIMIT else None
    return parse_domain(text) if address is None else address


@lru_cache(maxsize=4096)
def _ip_of(text: str) -> IPAddress | None:
    """The IP address without a zone that a text is, or None. Hosts are read again and again."""
    try:
        return None if "%" in text else ipaddress.ip_address(text)
    except ValueError:
        return None


def parse_peer(text: str) -> IPAddress:
    """Parse the address of a connection. The zone of a link-local address is dropped.

    >>> parse_peer("fe80::1%eth0")
    IPv6Address('fe80::1')
    """
    return parse_ip(text.partition("%")[0])


@lru_cache(maxsize=4096)
def is_loopback(text: str) -> bool:
    """Whether a text is a loopback address, in any form that `parse_peer` reads.

    >>> is_loopback("::ffff:127.0.0.1"), is_loopback("192.0.2.1"), is_loopback("localhost")
    (True, False, False)
    """
    try:
        return parse_peer(text).is_loopback
    except ValueError:
        return False


def host_port(host: str, port: int) -> str:
    """Write a host and a port, with an IPv6 address in brackets (RFC 3986, section 3.2.2).

    >>> host_port("192.0.2.1", 25), host_port("2001:db8::1", 25)
    ('192.0.2.1:25', '[2001:db8::1]:25')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_host_port(text: str) -> tuple[str, int]:
    """Split what `host_port` writes. The host is empty if `text` is a port alone.

    Raises `AddressError`.

    >>> split_host_port("[2001:db8::1]:25"), split_host_port("mx.test:25"), split_host_port("25")
    (('2001:db8::1', 25), ('mx.test', 25), ('', 25))
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise AddressError(f"{text!r} is not of the form HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _shown(text: str) -> str:
    """Return the text as printable ASCII, cut to 80 characters."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")


def queue_leads_to(name: str, queue: str) -> bool:
    """Whether a broker moves the mail of the queue `name` to `queue` sooner or later.

    `mailerq.queues.rabbitmq.topology` names such queues after their queue.

    >>> queue_leads_to("outbox.wait.60", "outbox"), queue_leads_to("outbox.old", "outbox")
    (True, False)
    """
    rest = name.removeprefix(queue)
    return rest != name and rest.startswith((".wait.", ".parked.", ".at."))


def queue_problem(name: str) -> str | None:
    r"""Return why a queue cannot have this name, or None.

    >>> queue_problem("bounces"), queue_problem("a\0b")
    (None, 'holds a character that cannot be printed')
    """
    if not name:
        return "is empty"
    if not name.isprintable():  # false for half a surrogate pair, too
        return "holds a character that cannot be printed"
    if len(name.encode()) > QUEUE_LIMIT:
        return f"is longer than {QUEUE_LIMIT} bytes"
    return None


def parse_lmtp(uri: str) -> tuple[str, int]:
    """Read the URI of an LMTP server: its host and port, or the path of its socket and 0.

    Raises `AddressError`.

    >>> parse_lmtp("lmtp://mailbox.test:2424"), parse_lmtp("lmtp://[::1]")
    (('mailbox.test', 2424), ('::1', 24))
    >>> parse_lmtp("lmtp:///run/dovecot/lmtp")
    ('/run/dovecot/lmtp', 0)
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme.lower() != "lmtp":
        raise AddressError(f"{uri[:80]!r} is not of the form lmtp://host:port or lmtp:///path")
    if rest.startswith("/"):
        if len(rest.encode()) > SOCKET_PATH_BYTES or "\0" in rest:
            raise AddressError(f"{rest[:80]!r} is too long for a socket")
        return rest, 0
    host, colon, port = rest, "", ""
    if not rest.endswith("]"):
        head, colon, tail = rest.rpartition(":")
        if colon:
            host, port = head, tail
    if colon and not (port.isdecimal() and port.isascii() and 0 < int(port[:6]) < 65536):
        raise AddressError(f"{port[:80]!r} is not a port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return str(parse_host(host)), int(port) if colon else LMTP_PORT
