"""Which keys sign a mail: those of its From domain, and those that its message brings.

Keys of a From domain come from `dkim-file`, whose lines say for which domains a key signs, and from
`dkim-directory`, where ``DOMAIN/SELECTOR.pem`` signs for DOMAIN alone. A line of the file without
`file` is about keys of the directory: it says how they sign, and for which other domains. Keys in
the property ``dkim`` of a message sign in addition, whatever its From domain.

This module reads names and options. `mailerq.store.signing_keys` reads the keys themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

from mailerq.address import parse_domain
from mailerq.errors import AddressError, ConfigError, MessageError
from mailerq.mail.dkim import NEVER_SIGNED, HeaderFields, Terms
from mailerq.mail.recipients import addresses
from mailerq.message import parse_time
from mailerq.rules.tables import file_bytes

if TYPE_CHECKING:
    from mailerq.config import Config

__all__ = [
    "CANONICALIZATIONS",
    "FILE_KEY",
    "PROTOCOLS",
    "Line",
    "Options",
    "Pattern",
    "SigningFile",
    "Source",
    "field_problem",
    "from_domain",
    "keys_of_message",
    "no_key_in_force",
    "parse_selector",
    "sources",
]

FILE_KEY: Final = "dkim-file"

PROTOCOLS: Final = ("dkim", "arc")
CANONICALIZATIONS: Final = {
    "relaxed/simple": (True, False),
    "relaxed/relaxed": (True, True),
    "simple/simple": (False, False),
    "simple/relaxed": (False, True),
    "relaxed": (True, False),  # RFC 6376, section 3.5: the body is simple then
    "simple": (False, False),
}
"""Words for the forms of the header and the body, and whether each is relaxed."""

MAX_LIFETIME: Final = 10 * 366 * 86400
MAX_PRIORITY: Final = 10**9
MAX_KEYS: Final = 16
"""Keys that sign one mail. Each signature takes space in the header, and time."""
MAX_EXTRA: Final = 100
"""Names of additional fields that a key may sign."""
MAX_FROM: Final = 8192
"""Bytes of a From field in which its first address is searched."""
MAX_NAMED: Final = 3
"""Keys, and places of keys, that one problem names."""
KEY_CHARS: Final = 16384
"""Characters of a key in a message."""

_SELECTOR: Final = re.compile(
    r"[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?){0,7}"
).fullmatch
_FIELD_NAME: Final = re.compile(r"[!-9;-~]{1,76}").fullmatch


class Options(msgspec.Struct, frozen=True):
    """How a key signs. Times are seconds since 1970; 0 is no limit.

    `lifetime` is how long a signature is valid, in seconds. `priority`: the signature of a lower
    number stands nearer to the top.
    """

    relaxed_header: bool = True
    relaxed_body: bool = False
    extra: tuple[bytes, ...] = ()
    lifetime: int = 0
    until: float = 0.0
    not_before: float = 0.0
    not_after: float = 0.0
    report: bool = False
    protocols: frozenset[str] = frozenset(("dkim",))
    priority: int = 0

    def terms(self, domain: str, selector: str, algorithm: Any) -> Terms:
        """What stands in a signature by these options."""
        return Terms(
            domain,
            selector,
            algorithm,
            self.relaxed_header,
            self.relaxed_body,
            self.extra,
            self.lifetime,
            self.until,
            self.report,
        )

    def is_in_force(self, now: float) -> bool:
        """Whether the key may sign at a time."""
        if now < self.not_before or 0 < self.not_after <= now:
            return False
        return not 0 < self.until <= now

    def signs(self, now: float) -> bool:
        """Whether the key may make DKIM signatures at a time."""
        return "dkim" in self.protocols and self.is_in_force(now)


class Source(msgspec.Struct, frozen=True):
    """A key that signs: its names, where it is (`path` or `pem`), and how it signs.

    `where` is the place that names the key: a line of a file, a directory, or a property.
    """

    domain: str
    selector: str
    options: Options
    where: str
    path: str = ""
    pem: str = ""

    @property
    def name(self) -> str:
        """The name of the key's DNS record."""
        return f"{self.selector}._domainkey.{self.domain}"


class Pattern(msgspec.Struct, frozen=True):
    """Domains: one, all that begin and end in a way, or all.

    >>> [Pattern.of(text).matches("news.example.com") for text in ("*", "*.example.com", "x.test")]
    [True, True, False]
    """

    begin: str
    end: str
    is_wild: bool

    @classmethod
    def of(cls, text: str) -> Self:
        """Read a pattern, a domain that may hold one ``*``. Raises `AddressError`."""
        begin, star, end = text.strip().lower().partition("*")
        if not star:
            return cls(parse_domain(begin), "", False)
        probe = f"{begin}x{end}"
        if "*" in end or parse_domain(probe) != probe:
            raise AddressError(f"{text[:80]!a} is not a domain with one *")
        return cls(begin, end, True)

    def __str__(self) -> str:
        return f"{self.begin}*{self.end}" if self.is_wild else self.begin

    @property
    def example(self) -> str:
        """A domain that matches."""
        return f"{self.begin}x{self.end}" if self.is_wild else self.begin

    def matches(self, domain: str) -> bool:
        if not self.is_wild:
            return domain == self.begin
        return (
            len(domain) > len(self.begin) + len(self.end)
            and domain.startswith(self.begin)
            and domain.endswith(self.end)
        )


class Line(msgspec.Struct, frozen=True):
    """One ``[[key]]`` of the file. An empty `selector` is every key of the domain's directory."""

    domain: str
    selector: str
    path: str
    patterns: tuple[Pattern, ...]
    options: Options
    where: str

    def signs_for(self, domain: str) -> bool:
        return any(pattern.matches(domain) for pattern in self.patterns)


class SigningFile(msgspec.Struct, frozen=True):
    """The lines of a `dkim-file`. Immutable."""

    lines: tuple[Line, ...] = ()

    @classmethod
    def of(cls, config: Config) -> Self:
        """Read the file that the settings name. Raises `ConfigError` with all mistakes."""
        if not config.dkim_file:
            return cls()
        data = file_bytes(config.dkim_file, FILE_KEY, config.origin(FILE_KEY))
        return cls.parse(data, config.dkim_file, has_directory=bool(config.dkim_directory))

    @classmethod
    def parse(cls, data: bytes, path: str, *, has_directory: bool = True) -> Self:
        """Read the text of a `dkim-file`. Raises `ConfigError` with all mistakes."""
        from mailerq.rules.signing_file import SigningReader

        reader = SigningReader(data, path)
        lines = reader.read(has_directory=has_directory)
        if reader.problems:
            raise ConfigError.of(reader.problems)
        return cls(tuple(lines))

    @property
    def seals(self) -> bool:
        """Whether a key of the file may make ARC seals."""
        return any("arc" in line.options.protocols for line in self.lines)


def sources(
    file: SigningFile,
    domain: str,
    directory: str,
    selectors_in: Callable[[str], Sequence[str]],
) -> list[Source]:
    """Return the keys that sign for a From domain, in the order of the file.

    `selectors_in` lists the selectors of a domain in `directory`, which is `dkim-directory` or
    empty; it may raise OSError. A key has the options of the first line that names the key.
    """
    found: dict[tuple[str, str], Source] = {}
    for line in file.lines:
        if not line.signs_for(domain):
            continue
        if line.path or line.selector:
            names: Sequence[str] = (line.selector,)
        else:
            names = selectors_in(line.domain) if directory else ()
        for name in names:
            path = line.path or _path(directory, line.domain, name)
            source = Source(line.domain, name.lower(), line.options, line.where, path)
            found.setdefault((line.domain, name.lower()), source)
    if directory and domain:
        for name in selectors_in(domain):
            path = _path(directory, domain, name)
            source = Source(domain, name.lower(), Options(), path, path)
            found.setdefault((domain, name.lower()), source)
    return list(found.values())


def no_key_in_force(
    file: SigningFile,
    domain: str,
    directory: str,
    found: Sequence[Source],
    *,
    has_directory: bool,
) -> str:
    """Say what is wrong with a From domain while no key in `found` makes DKIM signatures.

    `found` are the domain's `sources`. `has_directory`: the domain has a directory in `directory`.
    Empty: the domain has no place for keys, and its mail is meant to go unsigned.
    """
    keys = [source for source in found if "dkim" in source.options.protocols]
    if keys:
        paths = _some([source.path for source in keys])
        places = _some([source.where for source in keys])
        return (
            f"no key is in force now: {paths}. Change not-before or not-after in {places}, or name"
            f" a new key there, which 'mailerq dkim new {keys[0].domain} SELECTOR' makes"
        )
    owners = [(domain, "the directory")] if has_directory else []
    owners += [
        (line.domain, line.where)
        for line in file.lines
        if not line.path and "dkim" in line.options.protocols and line.signs_for(domain)
    ]
    for owner, place in owners:
        folder = f"{directory}/{owner}"
        if not any(source.path.startswith(f"{folder}/") for source in found):
            return (
                f"there is no key in {folder}. Make one with 'mailerq dkim new {owner} SELECTOR',"
                f" or remove {place} if the mail is to go unsigned"
            )
    return ""  # the keys that are there are for ARC alone


def _some(names: Iterable[str]) -> str:
    """The first of names, each once, and how many there are more."""
    each = list(dict.fromkeys(names))
    more = f" and {len(each) - MAX_NAMED} more" if len(each) > MAX_NAMED else ""
    return ", ".join(each[:MAX_NAMED]) + more


def _path(directory: str, domain: str, selector: str) -> str:
    return f"{directory}/{domain}/{selector}.pem"


def from_domain(fields: HeaderFields) -> str:
    r"""Return the domain of the first address in From, as A-labels; empty if there is none.

    >>> from_domain(HeaderFields(b"From: Ann <ann@Example.TEST>, b@c.test\r\n\r\n"))
    'example.test'
    """
    values = fields.values(b"from")
    return _domain_of(values[0][:MAX_FROM]) if values else ""


@lru_cache(maxsize=1024)
def _domain_of(value: bytes) -> str:
    text = value.decode("utf-8", "replace").replace("\r", " ").replace("\n", " ")
    try:
        return parse_domain(next(addresses(text), "").rpartition("@")[2])
    except AddressError:
        return ""


def parse_selector(text: str) -> str:
    """Read a selector (RFC 6376, section 3.1), in lower case. Raises `AddressError`."""
    selector = text.lower()
    if not _SELECTOR(selector) or len(selector) > 200:
        raise AddressError(f"{text[:80]!a} is not a selector")
    return selector


def field_problem(name: str) -> str | None:
    """Why a field of this name cannot be signed in addition."""
    if not _FIELD_NAME(name):
        return f"{name[:80]!a} is not the name of a header field"
    if name.lower().encode() in NEVER_SIGNED:
        return f"{name} is never signed: hosts on the way change it"
    return None


# Keys in messages


def keys_of_message(value: object) -> list[Source]:
    """Read the property ``dkim``: an object, or an array of objects. Raises `MessageError`."""
    if value is None:
        return []
    objects = value if isinstance(value, list) else [value]
    if len(objects) > MAX_KEYS:
        raise MessageError(f"property dkim: has more than {MAX_KEYS} keys")
    return [_key_of_message(each) for each in objects]


def _key_of_message(value: object) -> Source:
    if not isinstance(value, Mapping):
        raise MessageError("property dkim: expected an object or an array of objects")
    try:
        domain = parse_domain(_text(value, "domain"))
        selector = parse_selector(_text(value, "selector"))
    except AddressError as error:
        raise MessageError(f"property dkim: {error}") from None
    pem = _text(value, "key")
    if len(pem) > KEY_CHARS:
        raise MessageError(f"property dkim: key: has more than {KEY_CHARS} characters")
    form = value.get("canonicalization")
    form = "relaxed/simple" if form is None else form
    if not isinstance(form, str) or form.lower() not in CANONICALIZATIONS:
        raise MessageError(f"property dkim: canonicalization: {str(form)[:80]!a} is not known")
    relaxed_header, relaxed_body = CANONICALIZATIONS[form.lower()]
    lifetime, until = _expiry(value.get("expire"))
    options = Options(
        relaxed_header=relaxed_header,
        relaxed_body=relaxed_body,
        extra=_extra(value.get("headers")),
        lifetime=lifetime,
        until=until,
        report=_flag(value.get("report")),
        protocols=_protocols(value.get("protocols")),
        priority=_priority(value.get("priority")),
    )
    return Source(domain, selector, options, "property dkim", pem=pem)


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text:
        raise MessageError(f"property dkim: {key}: expected a text")
    return text


def _expiry(value: object) -> tuple[int, float]:
    """Seconds of validity, or the time at which it ends."""
    if value is None:
        return 0, 0.0
    if isinstance(value, str):
        try:
            return 0, parse_time(value)
        except MessageError as error:
            raise MessageError(f"property dkim: expire: {error}") from None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_LIFETIME:
        return value, 0.0
    raise MessageError("property dkim: expire: expected seconds, or a time")


def _extra(value: object) -> tuple[bytes, ...]:
    if value is None:
        return ()
    names: list[Any] = value if isinstance(value, list) else [value]
    if len(names) > MAX_EXTRA:
        raise MessageError(f"property dkim: headers: more than {MAX_EXTRA} names")
    for name in names:
        if not isinstance(name, str):
            raise MessageError("property dkim: headers: expected names of header fields")
        if (problem := field_problem(name)) is not None:
            raise MessageError(f"property dkim: headers: {problem}")
    return in_bytes(names)


def in_bytes(names: Iterable[str]) -> tuple[bytes, ...]:
    """Names of fields, each once, in lower case."""
    return tuple(dict.fromkeys(name.lower().encode() for name in names))


def _flag(value: object) -> bool:
    if value is None or isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise MessageError("property dkim: report: expected true or false")


def _protocols(value: object) -> frozenset[str]:
    if value is None:
        return frozenset(("dkim",))
    names: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name.lower() in PROTOCOLS for name in names):
        raise MessageError(f"property dkim: protocols: expected some of {', '.join(PROTOCOLS)}")
    return frozenset(name.lower() for name in names)


def _priority(value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_PRIORITY:
        return value
    raise MessageError("property dkim: priority: expected a whole number")
