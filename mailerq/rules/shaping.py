"""Which limits hold for deliveries: the settings, and the lines of `limits-file`.

Theory of operation
-------------------
The file is TOML with two kinds of table. A ``[[provider]]`` names hosts by suffixes of MX names. A
``[[limit]]`` gives values for all mail, or for a ``domain``, a ``provider`` or a ``remote-ip``.
With ``local-ip`` or ``pool`` the values are for mail that leaves from such an address.

Mail is counted in up to three scopes, and all of them must allow it: its site, the provider of the
site, and the remote address. Each scope counts separately for each local address. The values of a
scope come from all lines that match. More exact lines override less exact ones, and later lines
equally exact earlier ones, value by value: 0 is no limit, and -1 takes what less exact lines say.

Domains with lines of their own do not share a site with others, so their values apply to their mail
alone. `Shaping.group_of` names the lines that set a domain apart.

`hours` say when the mail of a site or a provider may go (`rules.hours`). They override each other
like limits, and both scopes must allow mail.

docs/limits.md explains the file to operators.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from mailerq.address import parse_domain, parse_ip
from mailerq.errors import AddressError, ConfigError, Problem
from mailerq.rules.hours import Hours, zone_of
from mailerq.rules.local_ips import NO_ADDRESSES, LocalIps
from mailerq.rules.security import LEVELS, Level
from mailerq.rules.tables import TableReader, file_bytes
from mailerq.settings import SIZE
from mailerq.spelling import Spelling

if TYPE_CHECKING:
    from mailerq.config import Config

__all__ = ["CONNECTION", "HOURS", "SITE", "Bound", "Bounds", "Shaping"]

KEY: Final = "limits-file"

RATES: Final = ("messages-per-minute", "bytes-per-minute", "connects-per-minute")
COUNTS: Final = ("max-connections", "max-starting", "max-idle")
HOURS: Final = "hours"
CONNECTION: Final = ("connection-messages", "connection-bytes", "connection-idle")
"""What holds for each connection by itself, so without a scope."""

SECURE: Final = "secure"
IGNORE: Final = "ignore-policies"
"""The TLS of connections, and whether what the domain has published about TLS does not count."""

SITE: Final = {
    "messages-per-minute": "domain-maxmessages",
    "bytes-per-minute": "domain-maxbytes",
    "connects-per-minute": "domain-maxconnects",
    "max-connections": "domain-maxconnections",
    "max-starting": "domain-maxstarting",
    "max-idle": "domain-maxidle",
    "connection-messages": "connection-maxmessages",
    "connection-bytes": "connection-maxbytes",
    "connection-idle": "connection-maxidle",
}
"""The settings that are the least exact values of a site and its connections."""

REMOTE: Final = {
    "messages-per-minute": "ip-maxmessages",
    "bytes-per-minute": "ip-maxbytes",
    "connects-per-minute": "ip-maxconnects",
    "max-connections": "ip-maxconnections",
    "max-starting": "ip-maxstarting",
}
"""The settings that are the least exact values of a remote address."""

VALUES: Final = (*RATES, *COUNTS, *CONNECTION, HOURS, SECURE, IGNORE)
SELECTORS: Final = ("domain", "provider", "remote-ip", "local-ip", "pool")
KEYS: Final = {"limit": (*SELECTORS, *VALUES, "timezone"), "provider": ("name", "mx")}
SPELLINGS: Final = {kind: Spelling(keys) for kind, keys in KEYS.items()}
SIZES: Final = frozenset({"bytes-per-minute", "connection-bytes"})
SECONDS: Final = frozenset({"connection-idle"})
MAX_VALUE: Final = 10**15
INHERIT: Final = -1

MAX_CACHED: Final = 10_000

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Bound(NamedTuple):
    """A limit and the place that sets it. The value is seconds for ``connection-idle``.

    With `hours` the value means nothing. For `SECURE` it is a `Level`, for `IGNORE` 0 or 1.
    """

    value: float
    where: str
    hours: Hours | None = None


Bounds = Mapping[str, Bound]
"""Limits by their name in the file; what is missing is not limited."""


class _Line(NamedTuple):
    """A ``[[limit]]`` of the file."""

    where: str
    domain: str
    provider: str
    remote: Network | None
    any_remote: bool
    local_ips: frozenset[str]
    """Empty: any."""
    pool: bool
    values: Mapping[str, Bound]


class _Scope(NamedTuple):
    """What limits are asked for."""

    kind: str
    local_ip: str
    group: str = ""
    provider: str = ""
    remote: str = ""


@dataclass(frozen=True, slots=True)
class _Provider:
    name: str
    suffixes: tuple[str, ...]
    where: str = ""

    def has(self, host: str) -> bool:
        return any(host == suffix or host.endswith("." + suffix) for suffix in self.suffixes)


class Shaping:
    """The limits in force. Immutable; any thread may use it.

    >>> from mailerq.config import Config
    >>> text = '''[[limit]]
    ... domain = "example.com"
    ... messages-per-minute = 600
    ... '''
    >>> shaping = Shaping.parse(text.encode(), "limits.toml", Config())
    >>> shaping.of_site("example.com", "")["messages-per-minute"]
    Bound(value=600, where='limits.toml:3', hours=None)
    """

    def __init__(
        self,
        config: Config,
        lines: Iterable[_Line] = (),
        providers: Iterable[_Provider] = (),
        local_ips: LocalIps | None = None,
    ) -> None:
        self.local_ips = local_ips or NO_ADDRESSES
        self._lines = tuple(lines)
        self._providers = tuple(providers)
        site = _base(config, SITE)
        level = LEVELS[config.connection_secure]
        site[SECURE] = Bound(level, config.place("connection-secure"))
        self._ignores = any(IGNORE in line.values for line in self._lines)
        self._base = {
            "site": site, "connection": site, "provider": {}, "remote": _base(config, REMOTE),
        }  # fmt: skip
        self.groups = frozenset(line.domain for line in self._lines if line.domain)
        """What sets domains apart, see `group_of`."""
        self._cache: dict[_Scope, Bounds] = {}

    @classmethod
    def of(cls, config: Config) -> Self:
        """The limits that the settings ask for. Raises `ConfigError` with all mistakes."""
        path = config.limits_file
        problems: list[Problem] = []
        local_ips: LocalIps | None = None
        try:
            local_ips = LocalIps.of(config)
        except ConfigError as error:
            problems += error.problems
        shaping = cls(config, local_ips=local_ips)
        try:
            if path:
                data = file_bytes(path, KEY, config.origin(KEY))
                shaping = cls.parse(data, path, config, local_ips)
        except ConfigError as error:
            problems += error.problems
        known = {provider.name for provider in shaping._providers}
        for warmup in shaping.local_ips.warmups if not problems else ():
            if warmup.provider and warmup.provider not in known:
                text = f"provider: limits-file has no [[provider]] {warmup.provider!r}"
                problems.append(Problem(warmup.where, text, "addresses-file"))
        if problems:
            raise ConfigError.of(problems)
        return shaping

    @classmethod
    def parse(
        cls, data: bytes, path: str, config: Config, local_ips: LocalIps | None = NO_ADDRESSES
    ) -> Self:
        """Read the text of a `limits-file`; a line may name a pool of `local_ips`, if not None.

        Raises `ConfigError` with all mistakes.
        """
        reader = _Reader(data, path, local_ips)
        lines, providers = reader.read()
        if reader.problems:
            raise ConfigError.of(reader.problems)
        return cls(config, lines, providers, local_ips)

    @property
    def providers(self) -> frozenset[str]:
        """The names of the providers."""
        return frozenset(provider.name for provider in self._providers)

    @property
    def shortest_idle(self) -> float:
        """The shortest time that an idle connection is kept, in seconds."""
        values = [
            line.values["connection-idle"]
            for line in self._lines
            if "connection-idle" in line.values
        ]
        values.append(self._base["connection"]["connection-idle"])
        return min(bound.value for bound in values if bound.value != INHERIT)

    @property
    def hours(self) -> frozenset[Hours]:
        """All hours of the file."""
        found = (line.values[HOURS].hours for line in self._lines if HOURS in line.values)
        return frozenset(hours for hours in found if hours is not None)

    def group_of(self, domain: str) -> str:
        """The most exact ``domain`` of a line that matches, or an empty string.

        `domain` is in lower case, in A-labels. Domains of different groups share no site.
        """
        if not self.groups:
            return ""
        return next((name for name in _patterns(domain) if name in self.groups), "")

    @property
    def provider_names(self) -> tuple[str, ...]:
        """The names of the providers, in the order of the file."""
        return tuple(each.name for each in self._providers)

    def provider_of(self, hosts: Iterable[str]) -> str:
        """The first provider that has all of the hosts, or an empty string."""
        if not self._providers:
            return ""
        names = {host.lower().rstrip(".") for host in hosts}
        found = (each.name for each in self._providers if names and all(map(each.has, names)))
        return next(found, "")

    def where_of_group(self, group: str) -> str:
        """The place of the first line that names a group."""
        return next((line.where for line in self._lines if group and line.domain == group), "")

    def where_of_provider(self, provider: str) -> str:
        """The place of the lines that name a provider's hosts."""
        return next((each.where for each in self._providers if each.name == provider), "")

    def of_site(self, group: str, local_ip: str) -> Bounds:
        """What holds for the mail of one site from one local address, "" if the system chooses."""
        return self._find(_Scope("site", local_ip, group=group))

    def of_provider(self, provider: str, local_ip: str) -> Bounds:
        """What holds for all mail to a provider from one local address."""
        return self._find(_Scope("provider", local_ip, provider=provider)) if provider else {}

    def of_remote(self, address: str, local_ip: str) -> Bounds:
        """What holds for all connections to one address from one local address."""
        return self._find(_Scope("remote", local_ip, remote=address))

    def of_connection(self, group: str, provider: str, local_ip: str) -> Bounds:
        """What holds for each connection to a site, the `CONNECTION` limits."""
        return self._find(_Scope("connection", local_ip, group, provider))

    def secure(self, group: str, provider: str, local_ip: str) -> Bound:
        """The `Level` of TLS to a site, and the place that sets it."""
        found = self.of_connection(group, provider, local_ip).get(SECURE)
        return found or Bound(Level.NONE, "")

    def ignores_policies(self, group: str) -> bool:
        """Whether what a site's domains have published about TLS does not count."""
        return self._ignores and IGNORE in self.of_site(group, "")

    def _find(self, scope: _Scope) -> Bounds:
        found = self._cache.get(scope)
        if found is None:
            if len(self._cache) >= MAX_CACHED:
                self._cache.clear()
            found = self._cache[scope] = self._resolve(scope)
        return found

    def _resolve(self, scope: _Scope) -> Bounds:
        layers: dict[tuple[int, int], dict[str, Bound]] = {}
        for line in self._lines:
            ips = line.local_ips
            rank = _closeness(line, scope) if not ips or scope.local_ip in ips else None
            if rank is not None:
                local = 2 - line.pool if ips else 0
                layers.setdefault((rank, local), {}).update(line.values)
        values = dict(self._base[scope.kind])
        for _, layer in sorted(layers.items()):
            values.update({k: bound for k, bound in layer.items() if bound.value != INHERIT})
        names: tuple[str, ...] = (*RATES, *COUNTS, HOURS, IGNORE)
        if scope.kind == "connection":
            names = (*CONNECTION, SECURE)
        # An idle time of 0 is a limit: no connection is kept.
        kept = (*SECONDS, SECURE)
        return {k: v for k, v in values.items() if k in names and (v.value or k in kept)}


def _base(config: Config, names: Mapping[str, str]) -> dict[str, Bound]:
    found = {}
    for name, key in names.items():
        value = getattr(config, key.replace("-", "_"))
        if key == "connection-maxidle":
            value /= 1000
        found[name] = Bound(value, config.place(key))
    return found


def _patterns(domain: str) -> Iterator[str]:
    """What a line may call a domain, most exact first.

    >>> list(_patterns("a.b.test")), list(_patterns("*.b.test"))
    (['a.b.test', '*.b.test', '*.test'], ['*.b.test', '*.test'])
    """
    if domain:
        yield domain
    rest = domain
    while (rest := rest.partition(".")[2]) and rest:
        if domain != f"*.{rest}":
            yield f"*.{rest}"


def _closeness(line: _Line, scope: _Scope) -> int | None:
    """How exactly a line names a scope; None if the line is not about the scope."""
    if scope.kind == "remote":
        if line.remote is None:
            return 0 if line.any_remote else None
        if scope.remote.startswith("/"):
            return None  # a socket of this host
        ip = ipaddress.ip_address(scope.remote.partition("%")[0])
        fits = ip.version == line.remote.version and ip in line.remote
        return line.remote.prefixlen + 1 if fits else None
    if line.any_remote or line.remote is not None:
        return None
    if line.provider:
        wanted = scope.kind != "site" and line.provider == scope.provider
        return 1 if wanted else None
    if scope.kind == "provider":
        return None
    if not line.domain:
        return 0
    if line.domain not in _patterns(scope.group):
        return None
    # Of two patterns that match one domain the longer one is the more exact.
    return 2 + len(line.domain.removeprefix("*.")) * 2 - line.domain.startswith("*.")


class _Reader(TableReader):
    """Reads a file, and collects all its mistakes in `problems`."""

    def __init__(self, data: bytes, path: str, local_ips: LocalIps | None) -> None:
        super().__init__(data, path, key=KEY, spellings=SPELLINGS)
        self._local_ips = local_ips

    def read(self) -> tuple[list[_Line], list[_Provider]]:
        tree = self.tree()
        providers = [
            provider
            for index, table in self.tables(tree, "provider")
            if (provider := self._provider(index, table)) is not None
        ]
        self._check_providers(providers)
        names = {provider.name for provider in providers}
        lines = [
            limit
            for index, table in self.tables(tree, "limit")
            if (limit := self._limit(index, table, names)) is not None
        ]
        return lines, providers

    # Providers

    def _provider(self, index: int, table: Mapping[str, Any]) -> _Provider | None:
        name = self.text("provider", index, table, "name")
        if "name" not in table:
            self.wrong(self.at("provider", index), "a [[provider]] needs a name")
        given = table.get("mx")
        if isinstance(given, str):
            given = [given]
        if not isinstance(given, list) or not given:
            self.wrong(
                self.at("provider", index, "mx"),
                f"provider {name!r} needs mx, a list of suffixes such as"
                ' ["protection.outlook.com"]',
            )
            return None
        suffixes = []
        for text in given:
            try:
                bare = str(text).strip().removeprefix("*").strip(".")
                suffixes.append(_host(bare if isinstance(text, str) else ""))
            except AddressError:
                self.wrong(
                    self.at("provider", index, "mx"),
                    f"mx: {text!r} is not the end of a host name such as mail.example.com",
                )
        where = f"{self.path}:{self.at('provider', index)}"
        return _Provider(name, tuple(suffixes), where) if name else None

    def _check_providers(self, providers: list[_Provider]) -> None:
        names: set[str] = set()
        owners: dict[str, str] = {}
        for index, provider in enumerate(providers):
            if provider.name in names:
                line = self.at("provider", index, "name")
                self.wrong(line, f"provider {provider.name!r} is there twice")
            names.add(provider.name)
            for suffix in provider.suffixes:
                owner = owners.setdefault(suffix, provider.name)
                if owner != provider.name:
                    line = self.at("provider", index, "mx")
                    self.wrong(line, f"mx: {suffix} belongs to provider {owner!r} already")

    # Limits

    def _limit(self, index: int, table: Mapping[str, Any], providers: set[str]) -> _Line | None:
        domain = self.text("limit", index, table, "domain")
        provider = self.text("limit", index, table, "provider")
        remote = self.text("limit", index, table, "remote-ip")
        local = self.text("limit", index, table, "local-ip")
        pool = self.text("limit", index, table, "pool")
        if len(chosen := [key for key in SELECTORS[:3] if key in table]) > 1:
            self.wrong(
                self.at("limit", index, chosen[1]),
                f"a [[limit]] is for a domain, a provider or a remote-ip; this one has"
                f" {' and '.join(chosen)}",
            )
        if provider and provider not in providers:
            place = self.at("limit", index, "provider")
            self.wrong(place, f"provider: no [[provider]] in this file is named {provider!r}")
        values = {
            key: bound
            for key in VALUES
            if key in table and (bound := self._value(index, table, key, chosen)) is not None
        }
        if self.is_good and not values:
            self.wrong(self.at("limit", index), "this [[limit]] sets nothing")
        if "timezone" in table and HOURS not in table:
            self.wrong(self.at("limit", index, "timezone"), "timezone: this [[limit]] has no hours")
        network = self._network(index, remote) if remote not in ("", "*") else None
        read = _Line(
            f"{self.path}:{self.at('limit', index)}",
            self._domain(index, domain),
            provider,
            network,
            remote == "*",
            self._locals(index, local, pool),
            bool(pool),
            values,
        )
        return read if self.is_good else None

    def _domain(self, index: int, text: str) -> str:
        if text in ("", "*"):
            return ""
        bare = text.removeprefix("*.")
        try:
            domain = parse_domain(bare.rstrip("."))
        except AddressError as error:
            self.wrong(
                self.at("limit", index, "domain"),
                f"domain: {error}; write example.com, or *.example.com for those below it",
            )
            return ""
        return domain if bare == text else f"*.{domain}"

    def _network(self, index: int, text: str) -> Network | None:
        try:
            return ipaddress.ip_network(text)
        except ValueError:
            self.wrong(
                self.at("limit", index, "remote-ip"),
                f"remote-ip: {text!r} is not an address, a network such as 192.0.2.0/24, or *"
                " for each address",
            )
            return None

    def _locals(self, index: int, text: str, pool: str) -> frozenset[str]:
        """The local addresses that a line is for; empty for any, and after a mistake."""
        if text and pool:
            self.wrong(
                self.at("limit", index, "pool"),
                "a [[limit]] is for a local-ip or for a pool; this one has both",
            )
        if pool:
            # After mistakes in the file of addresses its pools are not known.
            found = None if self._local_ips is None else self._local_ips.pools.get(pool)
            if found is None and self._local_ips is not None:
                line = self.at("limit", index, "pool")
                self.wrong(line, f"pool: addresses-file has no pool {pool!r}")
            return frozenset(found or ())
        if not text:
            return frozenset()
        try:
            return frozenset((str(parse_ip(text)),))
        except ValueError:
            self.wrong(
                self.at("limit", index, "local-ip"), f"local-ip: {text!r} is not an IP address"
            )
            return frozenset()

    def _value(
        self, index: int, table: Mapping[str, Any], key: str, chosen: list[str]
    ) -> Bound | None:
        line = self.at("limit", index, key)
        value = table[key]
        if "remote-ip" in chosen and key not in REMOTE:
            self.wrong(line, f"{key} cannot be set for a remote-ip, only for domains")
            return None
        if key == SECURE and value != INHERIT:
            return self._level(line, value)
        if key == IGNORE and value != INHERIT:
            if not isinstance(value, bool):
                self.wrong(line, f"{key}: {value!r} is neither true nor false")
                return None
            if more := {"provider", "local-ip", "pool"} & table.keys():
                self.wrong(line, f"{key} cannot be set for a {min(more)}, only for domains")
                return None
            return Bound(int(value), f"{self.path}:{line}")
        if key == HOURS and (isinstance(value, (str, bool)) or value not in (0, INHERIT)):
            return self._hours(index, table)
        if isinstance(value, str) and key in SIZES:
            try:
                value = SIZE.read(value)
            except ValueError as error:
                self.wrong(line, f"{key}: {error}")
                return None
        numbers = (int, float) if key in SECONDS else int
        if not isinstance(value, numbers) or isinstance(value, bool):
            kind = "number" if key in SECONDS else "whole number"
            self.wrong(line, f"{key}: {value!r} is not a {kind}")
            return None
        if value != INHERIT and not 0 <= value <= MAX_VALUE:
            self.wrong(
                line,
                f"{key}: {value} is out of bounds; 0 is no limit, and -1 takes the value of less"
                " exact lines and of the settings",
            )
            return None
        return Bound(value, f"{self.path}:{line}")

    def _level(self, line: int, value: object) -> Bound | None:
        if isinstance(value, bool) or value in (0, 1):
            value = "opportunistic" if value else "none"
        if not isinstance(value, str) or value not in LEVELS:
            self.wrong(line, f"{SECURE}: {value!r} is none of {', '.join(LEVELS)}")
            return None
        return Bound(LEVELS[value], f"{self.path}:{line}")

    def _hours(self, index: int, table: Mapping[str, Any]) -> Bound | None:
        """The hours of a line, which are not taken back."""
        line = self.at("limit", index, HOURS)
        text, name = table[HOURS], self.text("limit", index, table, "timezone")
        try:
            zone = zone_of(name or "UTC")
        except ValueError as error:
            self.wrong(self.at("limit", index, "timezone"), f"timezone: {error}")
            return None
        try:
            if not isinstance(text, str):
                raise ValueError(f"{text!r} is not written as mon-fri 08:00-20:00")
            return Bound(1, f"{self.path}:{line}", Hours.parse(text, zone))
        except ValueError as error:
            self.wrong(line, f"{HOURS}: {error}")
            return None


def _host(text: str) -> str:
    """A domain, or an address as it names a smarthost. Raises `AddressError`."""
    try:
        return str(parse_ip(text))
    except ValueError:
        return parse_domain(text)
