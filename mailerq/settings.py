"""What one setting is: its name, and how its value is read from text, checked and written.

`mailerq.config` declares the settings with `setting`; a `Kind` is what settings have in
common, a `Setting` is one row of the table that the declarations make.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, TypeVar

from mailerq.address import (
    host_port,
    parse_domain,
    parse_host,
    parse_ip,
    parse_lmtp,
    parse_mailbox,
    queue_problem,
)
from mailerq.brokers import parse_addresses
from mailerq.errors import AddressError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Value = TypeVar("Value")

ENVIRON_PREFIX: Final = "MAILERQ_"

HIDDEN: Final = "(hidden)"
"""What stands for a secret."""

DNS_PORT: Final = 53


@dataclass(frozen=True, slots=True)
class DnsServer:
    """A DNS server to ask. As text an IPv6 address with a port is in brackets: ``[::1]:5353``."""

    address: str
    port: int = DNS_PORT

    def __str__(self) -> str:
        if self.port == DNS_PORT:
            return self.address
        return host_port(self.address, self.port)


# -- kinds: how the text of a value is read, checked and written ---------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """How the values of a setting are read from text, checked and written as text.

    `read` and `check` raise ValueError with a text that completes "smtp-port: …". `check`
    takes what a program passed and returns the value in its one exact type.
    """

    name: str
    read: Callable[[str], Any]
    check: Callable[[Any], Any]
    write: Callable[[Any], str] = str
    may_be_empty: bool = False
    hide: Callable[[Any], str] = lambda value: HIDDEN
    """The value for people, if the setting is secret."""


def _check_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    if any(char < " " or char == "\x7f" for char in value):
        raise ValueError("holds a control character")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError("is not UTF-8")
    return value


_FLAGS: Final = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


def _read_flag(text: str) -> bool:
    try:
        return _FLAGS[text.lower()]
    except KeyError:
        raise ValueError(f"{text!r} is neither true nor false") from None


def _check_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither True nor False")
    return value


def _read_number(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text, re.ASCII):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def _check_number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _read_seconds(text: str) -> float:
    if not re.fullmatch(r"[+-]?([0-9]{1,18}(\.[0-9]*)?|\.[0-9]+)", text, re.ASCII):
        raise ValueError(f"{text!r} is not a number")
    return float(text)


def _check_seconds(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _plain(number: float) -> str:
    """A number without an exponent, to the microsecond where it is a time."""
    return f"{number:.6f}".rstrip("0").rstrip(".")


_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _read_size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,18}) ?(?:([KMGT])I?B?|B)?", text.upper(), re.ASCII)
    if not match:
        raise ValueError(f"{text!r} is not a size such as 512KB, 100MB or 16GB")
    return int(match[1]) * _UNITS[match[2] or ""]


def _write_size(value: int) -> str:
    for unit in "TGMK":
        if value and value % _UNITS[unit] == 0:
            return f"{value // _UNITS[unit]}{unit}B"
    return str(value)


def _syntax(parse: Callable[[str], Any], value: Any) -> str:
    """Check a text that may be empty against a grammar of `mailerq.address`."""
    text = _check_text(value)
    try:
        if text:
            parse(text)
    except AddressError as error:
        raise ValueError(str(error)) from None
    return text


def _check_host(value: Any) -> str:
    return _syntax(parse_host, value)


def _check_hostname(value: Any) -> str:
    return _syntax(parse_domain, value)


def _check_queue(value: Any) -> str:
    text = _check_text(value)
    if text and (problem := queue_problem(text)) is not None:
        raise ValueError(problem)
    return text


def _check_lmtp(value: Any) -> str:
    return _syntax(parse_lmtp, value)


def _check_sink(value: Any) -> str:
    # The documented default, 0.0.0.0, is the reference's way to write "no sink".
    return "" if value == "0.0.0.0" else _check_host(value)


def _each(text: str) -> list[str]:
    return [part for item in re.split("[;,]", text) if (part := item.strip())]


def _list_kind(
    name: str,
    read: Callable[[str], Iterable[Any]],
    check: Callable[[Any], Any],
    *,
    separator: str = ",",
    repeats: bool = False,
) -> Kind:
    """A list: `read` turns the text of one item into values, `check` checks one value."""

    def read_all(text: str) -> tuple[Any, ...]:
        return tuple(value for item in _each(text) for value in read(item))

    def check_all(values: Any) -> tuple[Any, ...]:
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise ValueError(f"{values!r} is not a list")
        checked = tuple(check(value) for value in values)
        seen: set[Any] = set()
        for value in checked:
            # Port 0 stands for "any free one", and two of them are two ports.
            if value in seen and value != 0 and not repeats:
                raise ValueError(f"{value} stands twice")
            seen.add(value)
        return checked

    def write_all(values: tuple[Any, ...]) -> str:
        return separator.join(map(str, values))

    return Kind(name, read_all, check_all, write_all, may_be_empty=True)


def _read_ports(item: str) -> Iterator[int]:
    first, dash, last = (part.strip() for part in item.partition("-"))
    if not dash:
        yield _check_port(_read_number(first))
        return
    low, high = _check_port(_read_number(first)), _check_port(_read_number(last))
    if low > high:
        raise ValueError(f"the range {item} ends before it starts")
    yield from range(low, high + 1)


def _check_port(value: Any) -> int:
    port = _check_number(value)
    if not 0 <= port <= 65535:
        raise ValueError(f"{port} is not a port (0 to 65535)")
    return port


def _read_network(item: str) -> Network:
    try:
        return _unmapped(ipaddress.ip_network(item))
    except ValueError as error:
        raise ValueError(f"{item!r} is not a network such as 192.0.2.0/24: {error}") from None


def networks(text: str) -> tuple[Network, ...]:
    """Networks with blanks between them."""
    return tuple(_read_network(item) for item in text.split())


def _unmapped(network: Network) -> Network:
    """IPv4 addresses written as IPv6 as they are, as `mailerq.address.parse_ip` has them."""
    mapped = network.network_address.ipv4_mapped if network.version == 6 else None
    if mapped is None or network.prefixlen < 96:
        return network
    return ipaddress.IPv4Network((mapped, network.prefixlen - 96))


def _check_network(value: Any) -> Network:
    if isinstance(value, Network):
        return _unmapped(value)
    return _read_network(_check_text(value))


def _check_ip(value: Any) -> str:
    text = _check_text(value)
    try:
        return str(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address") from None


def _read_dns_server(item: str) -> DnsServer:
    host, colon, port = item, "", ""
    if item.startswith("["):
        host, bracket, rest = item[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"{item!r} is not of the form [IPv6 address]:port")
        colon, port = rest[:1], rest[1:]
    elif item.count(":") == 1:
        host, colon, port = item.partition(":")
    try:
        address = str(parse_ip(host))
    except ValueError:
        raise ValueError(f"{item!r} is not an IP address such as 192.0.2.1:53") from None
    number = _check_port(_read_number(port)) if colon else DNS_PORT
    if not number:
        raise ValueError("0 is not a port of a server (1 to 65535)")
    return DnsServer(address, number)


def _check_dns_server(value: Any) -> DnsServer:
    return _read_dns_server(str(value) if isinstance(value, DnsServer) else _check_text(value))


def _check_domain(value: Any) -> str:
    return parse_domain(_syntax(parse_domain, value))


def choice(*words: str, upper: bool = False) -> Kind:
    """One of some words, all in lower case, or with `upper` in upper case."""

    def check(value: Any) -> str:
        if value not in words:
            raise ValueError(f"{value!r} is none of {', '.join(words)}")
        return str(value)

    return Kind("|".join(words), str.upper if upper else str.lower, check)


_SECURE: Final = ("none", "opportunistic", "required", "verified")


def _read_secure(text: str) -> str:
    # Older configurations have 0 and 1.
    flag = _FLAGS.get(text.lower())
    return text.lower() if flag is None else _SECURE[flag]


def _check_secure(value: Any) -> str:
    if isinstance(value, bool):
        return _SECURE[value]
    if value not in _SECURE:
        raise ValueError(f"{value!r} is none of {', '.join(_SECURE)}")
    return str(value)


def _check_uri(value: Any) -> str:
    # What is wrong with it is said without it: it may hold a password.
    text = _check_text(value)
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ValueError("is not a list of URIs such as file:///etc/mailerq/logins")
    return text


def _read_uris(text: str) -> tuple[str, ...]:
    return tuple(part for item in text.split(";") if (part := item.strip()))


def _check_uris(values: Any) -> tuple[str, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError("is not a list")
    return tuple(_check_uri(value) for value in values)


def _check_brokers(value: Any) -> str:
    # What is wrong with it is said without it: it may hold a password.
    text = _check_text(value)
    if text:
        try:
            parse_addresses(text)
        except AddressError as error:
            raise ValueError(str(error)) from None
    return text


def _hide_passwords(value: str) -> str:
    """Addresses of brokers without their passwords."""
    return ", ".join(repr(address) for address in parse_addresses(value))


def _check_name(value: Any) -> str:
    if not (text := _check_text(value)):
        raise ValueError("one of the names is empty")
    return text


def _read_extract(text: str) -> Any:
    flag = _FLAGS.get(text.lower())
    return tuple(_each(text)) if flag is None else flag


def _check_extract(value: Any) -> tuple[str, ...]:
    # Older configurations have true and false.
    if isinstance(value, bool):
        return ("safe",) if value else ("none",)
    names: tuple[str, ...] = NAMES.check(value)
    return names


def _check_field(value: Any) -> str:
    text = _check_text(value)
    if text and not re.fullmatch(r"[!-9;-~]{1,60}", text):
        raise ValueError(f"{text[:80]!r} cannot be the name of a header field")
    if text.lower().startswith("x-mq-"):
        raise ValueError("servers take x-mq-* fields out of mail")
    return text


def words(*known: str) -> Kind:
    """A list of some words."""

    def check(value: Any) -> tuple[str, ...]:
        names: tuple[str, ...] = NAMES.check(value)
        if wrong := [name for name in names if name not in known]:
            raise ValueError(f"{wrong[0]!r} is none of {', '.join(known)}")
        return names

    return Kind("words", lambda text: tuple(_each(text.lower())), check, ", ".join)


def _check_mailbox(value: Any) -> str:
    return _syntax(parse_mailbox, value)


_EVENTS: Final = ("FAILURE", "DELAY", "SUCCESS")


def _check_events(value: Any) -> tuple[str, ...]:
    names = tuple(name.upper() for name in NAMES.check(value))
    if names in ((), ("NEVER",)):
        return ()
    if wrong := [name for name in names if name not in _EVENTS]:
        raise ValueError(f"{wrong[0]!r} is none of {', '.join(_EVENTS)}, nor NEVER alone")
    return tuple(name for name in _EVENTS if name in names)


def _text_kind(name: str, check: Callable[[Any], str]) -> Kind:
    return Kind(name, str, check, may_be_empty=True)


TEXT: Final = _text_kind("text", _check_text)
PATH: Final = _text_kind("path", _check_text)
QUEUE: Final = _text_kind("queue", _check_queue)
HOST: Final = _text_kind("host", _check_host)
FIELD: Final = _text_kind("field name", _check_field)
MAILBOX: Final = _text_kind("address", _check_mailbox)
HOSTNAME: Final = _text_kind("domain", _check_hostname)
SINK: Final = _text_kind("host", _check_sink)
LMTP: Final = _text_kind("URI", _check_lmtp)
FLAG: Final = Kind("true|false", _read_flag, _check_flag, lambda value: str(value).lower())
NUMBER: Final = Kind("number", _read_number, _check_number)
SECONDS: Final = Kind("number", _read_seconds, _check_seconds, _plain)
SIZE: Final = Kind("size", _read_size, _check_number, _write_size)
PORT: Final = Kind("port", _read_number, _check_port)
PORTS: Final = _list_kind("ports", _read_ports, _check_port)
NUMBERS: Final = _list_kind(
    "numbers", lambda item: (_read_number(item),), _check_number, repeats=True
)
IPS: Final = _list_kind("addresses", lambda item: (item,), _check_ip, separator=";")
DNS_SERVERS: Final = _list_kind(
    "addresses with ports",
    lambda item: (_read_dns_server(item),),
    _check_dns_server,
    separator=", ",
)
NETWORKS: Final = _list_kind(
    "networks", lambda item: (_read_network(item),), _check_network, separator=";"
)
NAMES: Final = _list_kind("names", lambda item: (item,), _check_name, separator=";")
EXTRACT: Final = Kind("names", _read_extract, _check_extract, ", ".join, may_be_empty=True)
SECURE: Final = Kind("|".join(_SECURE), _read_secure, _check_secure)
EVENTS: Final = Kind(
    "events",
    lambda text: tuple(_each(text)),
    _check_events,
    lambda value: ",".join(value) or "NEVER",
    may_be_empty=True,
)
BROKERS: Final = Kind(
    "URIs", lambda text: text, _check_brokers, may_be_empty=True, hide=_hide_passwords
)
URIS: Final = Kind("URIs", _read_uris, _check_uris, ";".join, may_be_empty=True)
DOMAINS: Final = _list_kind("domains", lambda item: (item,), _check_domain, separator=";")


# -- the table ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table: a setting of `mailerq.config.Config`."""

    default: Any
    kind: Kind
    group: str
    text: str
    """One sentence that says what it is for."""
    attribute: str = ""
    """The name in `Config`."""
    unit: str = ""
    """Empty where the kind says it all."""
    minimum: float | None = None
    maximum: float | None = None
    needed: bool = False
    """An empty value is an error."""
    unset: str = ""
    """What an empty or absent value stands for."""
    unlimited: bool = False
    """0 is no limit, and so is -1, as older configurations write it."""
    secret: bool = False
    """The value is not for logs and screens."""
    fixed: bool = False
    """A running daemon keeps its value until a restart."""
    aliases: tuple[str, ...] = ()
    """Other spellings of `key`."""

    @property
    def key(self) -> str:
        """The name in files and switches."""
        return self.attribute.replace("_", "-")

    @property
    def variable(self) -> str:
        """The name in the environment."""
        return ENVIRON_PREFIX + self.attribute.upper()

    @property
    def default_text(self) -> str:
        """The default as a file would hold it, or what it stands for when that is empty."""
        return self.write(self.default) or self.unset

    def write(self, value: Any) -> str:
        """The value as a file would hold it; empty where it is unset."""
        return "" if value is None else self.kind.write(value)

    def show(self, value: Any) -> str:
        """The value for people: what an empty one stands for, and no secrets."""
        if self.secret and value:
            return self.kind.hide(value)
        return self.write(value) or f"({self.unset})"

    def read(self, text: str) -> Any:
        """The checked value that a text stands for. Raises ValueError."""
        if not text and not self.kind.may_be_empty:
            raise ValueError("needs a value")
        if self.unlimited and text == "-1":
            return 0
        return self.check(self.kind.read(_check_text(text)))

    def check(self, value: Any) -> Any:
        """A value that a program passed, in its one exact type. Raises ValueError."""
        if value is None and self.default is None:
            return None
        value = self.kind.check(value)
        if self.needed and not value:
            raise ValueError("needs a value")
        if self.unlimited and value == -1:
            return 0
        minimum = 0 if self.unlimited else self.minimum
        for number in value if isinstance(value, tuple) else (value,):
            if minimum is not None and number < minimum:
                raise ValueError(f"{_plain(number)} is less than {_plain(minimum)}")
            if self.maximum is not None and number > self.maximum:
                limit = f"{_plain(self.maximum)} {self.unit}".rstrip()
                raise ValueError(f"{_plain(number)} is more than {limit}")
        return value


def setting(default: Value, kind: Kind, group: str, text: str, **more: Any) -> Value:
    """Declare a field of `Config` as a setting; `more` are further fields of `Setting`."""
    row = Setting(default, kind, group, text, **more)
    declared: Value = field(default=default, repr=not row.secret, metadata={"setting": row})
    return declared


def fixed(default: Value, kind: Kind, group: str, text: str, **more: Any) -> Value:
    """Declare a setting whose value a running daemon keeps until a restart."""
    return setting(default, kind, group, text, fixed=True, **more)


def table(config: type[Any]) -> tuple[Setting, ...]:
    """The settings that a dataclass declares, in their order."""
    return tuple(
        replace(declared.metadata["setting"], attribute=declared.name)
        for declared in fields(config)
        if "setting" in declared.metadata
    )
