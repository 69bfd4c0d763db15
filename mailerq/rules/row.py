"""One operator's row: a pause, a forced error, a suppression, or what a rule has decided."""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import Any, Final

import msgspec

from mailerq.address import Mailbox, parse_domain, parse_ip, parse_mailbox
from mailerq.errors import AddressError, RowError

__all__ = [
    "ERROR",
    "OPERATOR",
    "PAUSE",
    "SUPPRESSED",
    "SUPPRESSION",
    "Row",
    "any_of",
    "checked",
    "compared",
    "is_status",
    "patterns",
    "suppressible",
]

PAUSE: Final = "pause"
ERROR: Final = "error"
SUPPRESSION: Final = "suppression"

SUPPRESSED: Final = (550, "5.7.1", "the recipient is suppressed")
"""Default code, status and description of a suppression."""

OPERATOR: Final = "operator"

PLACES: Final = ("domain", "site", "provider", "remote_ip")
"""The parts of a scope of which one at most is set."""

MAX_TEXT: Final = 1000
"""Characters of each text in a row, as in results."""

_QUOTED_PAIR: Final = re.compile(r"\\(.)", re.DOTALL)
_SPECIAL: Final = re.compile(r'[\\"]')
_STATUS: Final = re.compile(r"[245]\.[0-9]{1,3}\.[0-9]{1,3}")


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A row. An empty part of the scope means any; times are seconds since 1970.

    Deliveries use the kinds `PAUSE`, `ERROR` and `SUPPRESSION`. Other kinds are kept and listed, so
    that a rule can keep what it has decided, in `values`. The addresses and domains of
    a suppression are not in the row: there may be many.
    """

    id: int = 0
    kind: str
    local_ip: str = ""
    pool: str = ""
    """A name of several local addresses."""
    domain: str = ""
    """A domain in lower case, in A-labels; ``*.example.com`` means all domains below."""
    site: str = ""
    """The name of a host that takes the mail; ``*.example.com`` means all hosts below."""
    provider: str = ""
    """The name of a ``[[provider]]``."""
    remote_ip: str = ""
    """An address or a network."""
    tag: str = ""
    since: float = 0.0
    until: float | None = None
    origin: str = OPERATOR
    """`OPERATOR`, or the name of the rule that made the row."""
    who: str = ""
    reason: str = ""
    code: int = 0
    status: str = ""
    description: str = ""
    values: dict[str, Any] = msgspec.field(default_factory=dict)
    hits: int = 0
    """How often the row has met a message or a reply."""
    sample: str = ""
    """A reply that a rule has met."""

    def is_over(self, now: float) -> bool:
        """Whether the end of the row has come."""
        return self.until is not None and self.until <= now

    @property
    def needs_peer(self) -> bool:
        """Whether the hosts must be known to tell what the row is about."""
        return bool(self.site or self.provider or self.remote_ip)

    @property
    def scope(self) -> dict[str, str]:
        """The parts of the scope that are set."""
        names = ("local_ip", "pool", *PLACES, "tag")
        return {name: value for name in names if (value := getattr(self, name))}


def checked(row: Row) -> Row:
    """The row in the form that deliveries compare. Raises `RowError`, which names the part.

    >>> checked(Row(kind=PAUSE, domain="*.Example.COM", local_ip="::ffff:192.0.2.1")).scope
    {'local_ip': '192.0.2.1', 'domain': '*.example.com'}
    """
    changes: dict[str, Any] = {}
    for name, parse in (
        ("local_ip", _ip),
        ("domain", _pattern),
        ("site", _pattern),
        ("remote_ip", _network),
    ):
        if value := getattr(row, name):
            try:
                changes[name] = parse(value)
            except ValueError as error:  # an AddressError too
                raise RowError(f"{name.replace('_', '-')}: {error}") from None
    if len([name for name in PLACES if getattr(row, name)]) > 1:
        raise RowError("one of domain, site, provider and remote-ip at most")
    if row.local_ip and row.pool:
        raise RowError("a local-ip or a pool, not both")
    for name in ("kind", "pool", "provider", "tag", "origin", "who", "status"):
        text = getattr(row, name)
        if text and not text.isprintable():
            raise RowError(f"{name} holds a character that cannot be printed")
    for name in ("description", "reason", "sample"):
        text = getattr(row, name)
        changes[name] = "".join(each if each.isprintable() else "?" for each in text)[:MAX_TEXT]
    if any(len(value) > MAX_TEXT for value in row.scope.values()):
        raise RowError("a name is too long")
    if row.kind in (ERROR, SUPPRESSION):
        _check_reply(row)
    if row.kind == ERROR and row.remote_ip:
        raise RowError("a forced error comes before a remote-ip is known")
    return msgspec.structs.replace(row, **changes)


def _check_reply(row: Row) -> None:
    least = 200 if row.kind == ERROR else 500
    if not least <= row.code <= 599:
        raise RowError(f"code: expected a number from {least} to 599, found {row.code}")
    if row.status and not is_status(row.status):
        raise RowError(f"status: expected something like 5.7.1, found {row.status!r}")
    if row.status and not row.status.startswith(str(row.code)[0]):
        raise RowError(f"status: {row.status} contradicts the code {row.code}")


def is_status(text: str) -> bool:
    """Whether a text is an enhanced status code, such as 5.7.1 (RFC 3463)."""
    return _STATUS.fullmatch(text) is not None


def suppressible(text: str) -> str:
    """An address, or a domain or pattern, in the form that is compared. Raises `RowError`.

    >>> suppressible("Ann@Example.COM"), suppressible("*.Example.com")
    ('ann@example.com', '*.example.com')
    """
    try:
        return compared(parse_mailbox(text)) if "@" in text else _pattern(text)
    except AddressError as error:
        raise RowError(str(error)) from None


def compared(mailbox: Mailbox) -> str:
    r"""An address in the form in which suppressions compare addresses.

    Quotes that a local part does not need mean nothing (RFC 5321, section 4.1.2), so mail does not
    get past a suppression by them. Unicode is compared composed (RFC 6532, section 3.1).

    >>> compared(parse_mailbox('"Ann"@b.test')), compared(parse_mailbox('"a\\ b"@b.test'))
    ('ann@b.test', '"a b"@b.test')
    """
    local = mailbox.local
    if local.startswith('"'):
        bare = _QUOTED_PAIR.sub(r"\1", local[1:-1])
        local = '"' + _SPECIAL.sub(r"\\\g<0>", bare) + '"'
        with suppress(AddressError):
            if not bare.startswith('"'):
                local = parse_mailbox(f"{bare}@{mailbox.domain}").local
    if not local.isascii():
        local = unicodedata.normalize("NFC", local)
    return f"{local}@{mailbox.domain}".lower()


def _ip(text: str) -> str:
    return str(parse_ip(text))


def _pattern(text: str) -> str:
    return "*." + parse_domain(text[2:]) if text.startswith("*.") else parse_domain(text)


def _network(text: str) -> str:
    return str(ipaddress.ip_network(text)) if "/" in text else str(parse_ip(text))


def any_of(names: Collection[str]) -> Callable[[str], bool]:
    """Whether one of these domains and patterns is about a domain; quick, for many domains.

    >>> list(map(any_of({"a.test", "*.b.test"}), ("a.test", "x.b.test", "b.test", "x.a.test")))
    [True, True, False, False]
    """
    exact = frozenset(names)
    suffixes = tuple(name[1:] for name in names if name.startswith("*."))
    return lambda domain: domain in exact or domain.endswith(suffixes)


def patterns(domain: str) -> Iterator[str]:
    """What a row may call a domain, the most exact first.

    >>> list(patterns("a.b.test")), list(patterns("*.b.test"))
    (['a.b.test', '*.b.test', '*.test'], ['*.b.test', '*.test'])
    """
    if domain:
        yield domain
    rest = domain.removeprefix("*.")
    while (rest := rest.partition(".")[2]) and rest:
        yield f"*.{rest}"
