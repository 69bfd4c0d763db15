"""Which addresses of this host a message may leave from, and the names they give in EHLO.

A message leaves from one of its ``ips``, else from an address of its ``pool``, else from one of
`smtp-default-ips`, else from the address that the system chooses. The file of `addresses-file` has
the pools, and names and weights of addresses; docs/addresses.md explains it to operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from mailerq.address import parse_domain, parse_host, parse_ip
from mailerq.errors import AddressError, ConfigError, Problem
from mailerq.rules.access import is_within
from mailerq.rules.tables import TableReader, file_bytes
from mailerq.spelling import Spelling

if TYPE_CHECKING:
    from mailerq.config import Config

__all__ = ["NO_ADDRESSES", "LocalIps", "NoPool", "Warmup", "avoid", "is_mapped", "pin"]

KEY: Final = "addresses-file"
HELO_KEY: Final = "dns-helofile"

SPELLINGS: Final = {
    "address": Spelling(("ip", "ehlo", "weight")),
    "pool": Spelling(("name", "addresses")),
    "warmup": Spelling(("pool", "addresses", "provider", "messages")),
}

MAX_WEIGHT: Final = 1000
MAX_MESSAGES: Final = 10**12

PINNED_ATTEMPTS: Final = 5
"""Attempts from one address in a row; with the default `retry-interval` more than an hour."""

ANY: Final = {False: "0.0.0.0", True: "::"}
"""What stands for all other addresses, by whether they are IPv6."""


class Warmup(NamedTuple):
    """How much addresses may send on each of their first days, in all or to a provider."""

    ips: frozenset[str]
    provider: str
    messages: tuple[int, ...]
    where: str

    def limit(self, day: int) -> int:
        """The messages of a day of sending, counted from 1; 0: no limit any more."""
        return self.messages[day - 1] if day <= len(self.messages) else 0


class NoPool(Exception):
    """A message names a pool that the file does not have."""


@dataclass(frozen=True, slots=True)
class LocalIps:
    """The local addresses, as the settings name them. Immutable; any thread may use it.

    >>> from mailerq.config import Config
    >>> text = b'pool = [{name = "bulk", addresses = ["192.0.2.1", "192.0.2.2"]}]'
    >>> local = LocalIps.parse(text, "addresses.toml", Config(smtp_default_ips=("192.0.2.9",)))
    >>> local.allowed({"pool": "bulk"}), local.allowed({})
    (('192.0.2.1', '192.0.2.2'), ('192.0.2.9',))
    """

    default: tuple[str, ...] = ()
    """For mail that names neither addresses nor a pool; empty: the system chooses."""
    pools: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    """EHLO names of addresses."""
    weights: Mapping[str, int] = field(default_factory=dict)
    """How often an address is chosen, where that is not 1."""
    warmups: tuple[Warmup, ...] = ()

    @classmethod
    def of(cls, config: Config) -> Self:
        """Read what the settings name. Raises `ConfigError` with all mistakes."""
        names: dict[str, str] = {}
        problems: list[Problem] = []
        data = b""
        try:
            if path := config.dns_helofile:
                lines = file_bytes(path, HELO_KEY, config.origin(HELO_KEY))
                names = _helo_names(lines, path, problems)
        except ConfigError as error:
            problems += error.problems
        try:
            if path := config.addresses_file:
                data = file_bytes(path, KEY, config.origin(KEY))
            local = cls.parse(data, config.addresses_file, config, names)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError.of(problems)
        return local

    @classmethod
    def parse(
        cls, data: bytes, path: str, config: Config, names: Mapping[str, str] | None = None
    ) -> Self:
        """Read the text of an `addresses-file`, whose EHLO names come before those in `names`.

        Raises `ConfigError` with all mistakes.
        """
        reader = _Reader(data, path)
        reader.read()
        if reader.problems:
            raise ConfigError.of(reader.problems)
        return cls(
            config.smtp_default_ips,
            reader.pools,
            {**(names or {}), **reader.names},
            reader.weights,
            tuple(reader.warmups),
        )

    def allowed(self, properties: Mapping[str, Any]) -> tuple[str, ...]:
        """The addresses that a message may leave from; empty: the system chooses.

        Raises `AddressError` if none of its ``ips`` is an address, and `NoPool`.
        """
        if ips := properties.get("ips"):
            return _addresses(ips)
        if not (pool := properties.get("pool")):
            return self.default
        try:
            return self.pools[pool]
        except KeyError:
            raise NoPool(f"property pool: addresses-file has no pool {pool[:80]!a}") from None

    def name_of(self, ip: str) -> str | None:
        """The name to give in EHLO from an address; None: `hostname`."""
        names = self.names
        return (names.get(ip) or names.get(ANY[":" in ip])) if names else None

    def warmups_of(self, ip: str, provider: str) -> list[Warmup]:
        """What limits the first days of an address, for mail to a provider."""
        return [each for each in self.warmups if ip in each.ips and each.provider in ("", provider)]

    def weight_of(self, ip: str) -> int:
        """How often an address is chosen, in relation to others."""
        return self.weights.get(ip, 1)


NO_ADDRESSES: Final = LocalIps()


def pin(properties: dict[str, Any]) -> None:
    """Have the next attempt leave from the address of the last one, if its peer said "later".

    Greylisting lets in the address that it has seen before. But a peer may have something against
    that address, so after `PINNED_ATTEMPTS` the message may leave from another one again.

    >>> properties = {"results": [{"from": "192.0.2.1", "code": 451, "type": "error"}]}
    >>> pin(properties)
    >>> properties["forcedip"]
    '192.0.2.1'
    """
    properties.pop("forcedip", None)
    results = properties["results"]
    ip = results[-1].get("from")
    same = 0
    for result in reversed(results):
        if not isinstance(result, dict) or result.get("from") != ip or not _is_later(result):
            break
        same += 1
    if ip is not None and 0 < same < PINNED_ATTEMPTS:
        properties["forcedip"] = ip


def avoid(properties: dict[str, Any], ip: str | None) -> None:
    """Have the next attempt leave from another address than `ip`; None: from any again.

    >>> properties = {"forcedip": "192.0.2.1", "refusedips": ["192.0.2.3"]}
    >>> avoid(properties, "192.0.2.1")
    >>> properties
    {'refusedips': ['192.0.2.3', '192.0.2.1']}
    """
    properties.pop("forcedip", None)
    refused = properties.pop("refusedips", None)
    if ip is not None:
        properties["refusedips"] = [*(refused if isinstance(refused, list) else ()), ip]


def _is_later(result: Mapping[str, Any]) -> bool:
    """Whether a peer that let us in refused the message for now."""
    code = result.get("code")
    return result.get("type") == "error" and isinstance(code, int) and 400 <= code < 500


def is_mapped(config: Config, ip: str) -> bool:
    """Whether mail that comes in by an address of this host leaves from that address.

    >>> import ipaddress
    >>> from mailerq.config import Config
    >>> config = Config(smtp_mappable_ips=(ipaddress.ip_network("192.0.2.0/24"),))
    >>> is_mapped(config, "192.0.2.1"), is_mapped(config, "127.0.0.1")
    (True, False)
    """
    return is_within(ip, config.smtp_mappable_ips) and not is_within(ip, config.smtp_unmappable_ips)


def _addresses(ips: Sequence[str]) -> tuple[str, ...]:
    """The valid addresses in ``ips``, as files and rows name them, each once.

    Raises `AddressError` if there are none.
    """
    found = []
    for ip in ips:
        try:
            host = parse_host(ip)
        except AddressError:
            continue
        if not isinstance(host, str) and (text := str(parse_ip(str(host)))) not in found:
            found.append(text)
    if not found:
        raise AddressError(f"property ips: {str(ips[0])[:80]!r} is no IP address")
    return tuple(found)


def _helo_names(data: bytes, path: str, problems: list[Problem]) -> dict[str, str]:
    """The names in a file of lines ``<address> <name>``; ``#`` starts a comment line."""
    names: dict[str, str] = {}
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            if len(words) != 2:
                raise ValueError(f"{line.strip()!a} is not an address and a name")
            names[str(parse_ip(words[0]))] = parse_domain(words[1])
        except ValueError as error:
            problems.append(Problem(f"{path}:{number}", str(error), HELO_KEY))
    return names


class _Reader(TableReader):
    """Reads an `addresses-file`, and collects all its mistakes in `problems`."""

    def __init__(self, data: bytes, path: str) -> None:
        super().__init__(data, path, key=KEY, spellings=SPELLINGS)
        self.pools: dict[str, tuple[str, ...]] = {}
        self.names: dict[str, str] = {}
        self.weights: dict[str, int] = {}
        self.warmups: list[Warmup] = []

    def read(self) -> None:
        tree = self.tree()
        seen: set[str] = set()
        for index, table in self.tables(tree, "address"):
            self._address(index, table, seen)
        for index, table in self.tables(tree, "pool"):
            self._pool(index, table)
        for index, table in self.tables(tree, "warmup"):
            self._warmup(index, table)

    def _address(self, index: int, table: Mapping[str, Any], seen: set[str]) -> None:
        if "ip" not in table:
            self.wrong(self.at("address", index), "an [[address]] needs an ip")
            return
        ip = self._ip("address", index, "ip", table["ip"])
        if ip in seen:
            self.wrong(self.at("address", index, "ip"), f"ip: {ip} is there twice")
        seen.add(ip)
        if name := self.text("address", index, table, "ehlo"):
            try:
                self.names[ip] = parse_domain(name)
            except AddressError as error:
                self.wrong(self.at("address", index, "ehlo"), f"ehlo: {error}")
        weight = table.get("weight", 1)
        if type(weight) is not int or not 0 < weight <= MAX_WEIGHT:
            self.wrong(
                self.at("address", index, "weight"),
                f"weight: {weight!r} is not a whole number from 1 to {MAX_WEIGHT}",
            )
        elif weight != 1:
            self.weights[ip] = weight
        if ip in ANY.values() and "weight" in table:
            self.wrong(
                self.at("address", index, "weight"),
                f"weight: {ip} stands for all other addresses, and has an ehlo only",
            )

    def _pool(self, index: int, table: Mapping[str, Any]) -> None:
        name = self.text("pool", index, table, "name")
        if "name" not in table:
            self.wrong(self.at("pool", index), "a [[pool]] needs a name")
        if name in self.pools:
            self.wrong(self.at("pool", index, "name"), f"pool {name!r} is there twice")
        given = table.get("addresses")
        if not isinstance(given, list) or not given:
            if self.is_good:
                line = self.at("pool", index, "addresses")
                self.wrong(line, f'pool {name!r} needs addresses, a list such as ["192.0.2.1"]')
            return
        ips = [self._ip("pool", index, "addresses", ip) for ip in given]
        for ip in {ip for ip in ips if ip and ips.count(ip) > 1}:
            line = self.at("pool", index, "addresses")
            self.wrong(line, f"addresses: {ip} is there twice; its [[address]] can have a weight")
        for ip in set(ips) & set(ANY.values()):
            self.wrong(self.at("pool", index, "addresses"), f"addresses: {ip} is no address")
        if name:
            self.pools[name] = tuple(ips)

    def _warmup(self, index: int, table: Mapping[str, Any]) -> None:
        provider = self.text("warmup", index, table, "provider")
        pool = self.text("warmup", index, table, "pool")
        given = table.get("addresses")
        ips: tuple[str, ...] = ()
        if (given is None) == (not pool):
            line = self.at("warmup", index, "addresses")
            self.wrong(line, "a [[warmup]] needs either a pool or addresses")
        elif given is None:
            ips = self.pools.get(pool, ())
            if not ips:
                self.wrong(self.at("warmup", index, "pool"), f"pool: there is no pool {pool!r}")
        elif isinstance(given, list) and given:
            ips = tuple(self._ip("warmup", index, "addresses", ip) for ip in given)
        else:
            self.wrong(self.at("warmup", index, "addresses"), "addresses: is not a list")
        days = table.get("messages")
        line = self.at("warmup", index, "messages")
        if not isinstance(days, list) or not days:
            self.wrong(line, "a [[warmup]] needs messages, a number for each day: [50, 100, 200]")
        elif not all(type(each) is int and 0 < each <= MAX_MESSAGES for each in days):
            self.wrong(line, f"messages: {days!r} are not whole numbers above 0")
        elif self.is_good:
            where = f"{self.path}:{line}"
            self.warmups.append(Warmup(frozenset(ips), provider, tuple(days), where))

    def _ip(self, kind: str, index: int, key: str, value: object) -> str:
        """An address as messages and results have it; an empty string after a mistake."""
        try:
            return str(parse_ip(str(value)))
        except ValueError:
            self.wrong(self.at(kind, index, key), f"{key}: {value!r} is not an IP address")
            return ""
