"""Find the hosts that take mail for a domain.

Theory of operation
-------------------
A domain's hosts come from its MX records in order of preference; without MX records the domain
itself is the host (RFC 5321, section 5.1). Answers are cached for the shortest of their TTLs,
within bounds. Hosts of equal preference are put in a new random order at each call. Tasks that ask
for the same domain at the same time share one lookup.

Strangers write the records, so everything is bounded. This host is never a host to send to: if a
record leads here, that record and all of no better preference are left out. Addresses in
`smtp-out-forbidden` are left out too, also for the smarthost of a message. If `smtp-out-port` is
neither 25 nor a port of ours, it belongs to another server: an address of this host then does not
lead here.

A domain that does not exist fails at once (RFC 5321, section 5.1). But a broken resolver says so of
every domain. So a resolver is believed only if it can name the servers of the root zone at that
moment; otherwise the mail is tried again.

Domains in `smtp-relay-domains`, for which this host takes mail and passes it on, never fail here.
If their records lead nowhere, or back to this host, the mail waits, and the log asks the operator
for a remedy.

A resolver belongs to one trio loop. dnspython is imported with the first lookup: a process that
only injects a mail never needs it.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import trio

from mailerq.address import parse_host, parse_literal
from mailerq.config import Config
from mailerq.errors import AddressError
from mailerq.net.logs import Ration
from mailerq.rules.access import is_within
from mailerq.rules.routes import SMTP_PORT
from mailerq.wire import smtp
from mailerq.wire.smtp import Reply

if TYPE_CHECKING:
    import dns.asyncresolver

__all__ = ["Host", "NoHosts", "Resolver", "is_this_host"]

log = logging.getLogger("mailerq.delivery")

MIN_TTL: Final = 60.0
"""Minimum cache time of an answer, also of a negative one; tiny TTLs hurt."""

MAX_TTL: Final = 3600.0
"""Maximum cache time of an answer, so that a mistake does not stay for long."""

MAX_ENTRIES: Final = 10_000
"""Domains in the cache."""

MAX_EXCHANGES: Final = 16
"""MX records considered, best preference first. RFC 5321 asks for two."""

MAX_ADDRESSES: Final = 32
"""Addresses tried for one domain."""

MAX_TEXTS: Final = 100
"""TXT records of a name that are read."""

MAX_ALIASES: Final = 8
"""CNAME records followed."""


@dataclass(frozen=True, slots=True)
class Host:
    """One address of a host that takes mail. A lower `preference` is better."""

    name: str
    address: str
    preference: int = 0


@dataclass(frozen=True, slots=True)
class NoHosts:
    """There is no host now; with a `reply`, which stands for a refusal, there never is.

    `setting` is the key of the setting that decided this, if one did.
    """

    description: str
    reply: Reply | None = None
    setting: str = ""


Found = tuple[Host, ...] | NoHosts


class _NoRecords(Exception):
    """The name has no such records; `nonexistent`: nor any other."""

    def __init__(self, text: str, *, nonexistent: bool = False) -> None:
        super().__init__(text)
        self.nonexistent = nonexistent


class _NoAnswer(Exception):
    """No answer: a timeout, a refusal or a broken reply."""


@dataclass(slots=True)
class _Flight:
    """A lookup under way; `found` stays None if its task is cancelled."""

    landed: trio.Event = field(default_factory=trio.Event)
    found: Found | None = None


@dataclass(slots=True)
class _Exchange:
    """One host of a domain, and the results of its lookups."""

    name: str
    preference: int
    addresses: list[str] = field(default_factory=list)
    ttl: float = MAX_TTL
    problem: str = ""
    unanswered: bool = False


class Resolver:
    """Looks up where mail goes: asks `dns-servers`, within `dns-timeout` and `dns-attempts`.

    `leads_here` says whether an address belongs to this host.
    """

    def __init__(self, config: Config, *, leads_here: Callable[[str], bool] | None = None) -> None:
        self._say_ours_to_mend = Ration(log.error, 1, "and %d times more for a relay domain")
        self._given_leads_here = leads_here
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Apply these settings from now on, and drop the cache."""
        self._hostname = _canonical(config.hostname)
        self._forbidden = config.smtp_out_forbidden
        self._relay_domains = frozenset(config.smtp_relay_domains)
        self._timeout = config.dns_timeout
        self._lifetime = config.dns_timeout * config.dns_attempts
        self._servers = config.dns_servers
        ours = config.smtp_out_port in (SMTP_PORT, *config.smtp_port)
        self._is_here = self._given_leads_here or (is_this_host if ours else _is_nowhere)
        # A lookup under way ends with its old settings, and does not cache its answer.
        self._dns: dns.asyncresolver.Resolver | None = None
        self._cache: dict[tuple[str, bool], tuple[float, Found]] = {}
        self._flights: dict[tuple[str, bool], _Flight] = {}

    async def mail_hosts(self, domain: str) -> Found:
        """The hosts for mail to `domain`, which may be an address literal; best first."""
        try:
            if domain.startswith("["):
                return self._permitted(domain, self._literal(domain))
            found = await self._cached((domain, True), self._look_up_domain)
        except OSError as error:  # no descriptor for the check
            return NoHosts(f"{domain}: {error.strerror or error}")
        found = self._permitted(domain, found)
        if isinstance(found, tuple):
            return _in_order(found)
        if found.reply is not None and _canonical(domain) in self._relay_domains:
            return self._ours_to_mend(domain, found.reply)
        return found

    async def host(self, name: str, *, trusted: bool) -> Found:
        """The addresses of a smarthost or a sink; this host is allowed.

        The system looks the name up, so ``/etc/hosts`` counts. Unless `trusted`, addresses in
        `smtp-out-forbidden` are left out.
        """
        found = await self._addresses_of(name)
        return found if trusted else self._permitted(name, found)

    async def addresses(self, name: str) -> Found:
        """The addresses of a server that a stranger has named, by our name servers.

        Addresses in `smtp-out-forbidden` are left out. `name` may be an IP address.
        """
        try:
            host = parse_host(name)
        except AddressError as error:
            return NoHosts("", smtp.no_such_domain(str(error)))
        if not isinstance(host, str):
            return self._permitted(name, (Host(name, str(host)),))
        exchange = _Exchange(_canonical(host), 0)
        with trio.move_on_after(3 * self._lifetime):
            await self._look_up_addresses(exchange)
            if exchange.addresses:
                hosts = tuple(Host(name, each) for each in exchange.addresses[:MAX_ADDRESSES])
                return self._permitted(name, hosts)
            return NoHosts(exchange.problem)
        return NoHosts(f"{name}: no answer in time")

    async def texts(self, name: str) -> tuple[tuple[bytes, ...], float] | NoHosts:
        """The TXT records of a name, each with its strings joined, and their TTL in seconds.

        CNAME records are followed. No record is an empty tuple; `NoHosts` says that the name
        servers have not answered.
        """
        with trio.move_on_after(3 * self._lifetime):
            try:
                records, ttl = await self._query(name, "TXT")
            except _NoRecords:
                return (), MIN_TTL
            except _NoAnswer as error:
                return NoHosts(str(error))
            return tuple(b"".join(record.strings) for record in records[:MAX_TEXTS]), ttl
        return NoHosts(f"{name}: no answer in time")

    async def _addresses_of(self, name: str) -> Found:
        try:
            host = parse_host(name)
        except AddressError:
            host = name  # The system may know a name that is no domain, with an underscore.
        if not isinstance(host, str):
            return (Host(name, str(host)),)
        return await self._cached((name, False), self._look_up_host)

    def _permitted(self, name: str, found: Found) -> Found:
        """The result without forbidden addresses."""
        if isinstance(found, NoHosts):
            return found
        hosts = tuple(h for h in found if not is_within(h.address, self._forbidden))
        if hosts:
            return hosts
        addresses = ", ".join(dict.fromkeys(host.address for host in found[:3]))
        return NoHosts("", smtp.forbidden_hosts(name, addresses), "smtp-out-forbidden")

    def _ours_to_mend(self, domain: str, reply: Reply) -> NoHosts:
        """Mail of a domain in `smtp-relay-domains` has nowhere to go."""
        self._say_ours_to_mend(
            "mail to %s waits: the domain is in smtp-relay-domains, and its mail cannot be"
            " passed on (%s). Correct its MX records, or set smarthost; if its mail ends here,"
            " list it in smtp-local-domains instead and set rabbitmq-local",
            domain,
            reply.description,
        )
        description = f"{domain} is in smtp-relay-domains: {reply.description}"
        return NoHosts(description, setting="smtp-relay-domains")

    async def _cached(
        self, key: tuple[str, bool], look_up: Callable[[str], Awaitable[tuple[Found, float | None]]]
    ) -> Found:
        while True:
            cached = self._cache.get(key)
            if cached is not None and trio.current_time() < cached[0]:
                return cached[1]
            flight = self._flights.get(key)
            if flight is None:
                break
            await flight.landed.wait()
            if flight.found is not None:
                return flight.found
        cache, flights = self._cache, self._flights
        flight = flights[key] = _Flight()
        try:
            found: Found = NoHosts(f"{key[0]}: no answer in time")
            ttl: float | None = None
            with trio.move_on_after(3 * self._lifetime):
                found, ttl = await look_up(key[0])
            flight.found = found
        finally:
            del flights[key]
            flight.landed.set()
        cache.pop(key, None)
        if ttl is not None:
            if len(cache) >= MAX_ENTRIES:
                del cache[next(iter(cache))]
            cache[key] = (trio.current_time() + min(max(ttl, MIN_TTL), MAX_TTL), found)
        return found

    def _literal(self, domain: str) -> Found:
        try:
            address = str(parse_literal(domain))
        except AddressError as error:
            return NoHosts("", smtp.no_such_domain(str(error)))
        if self._is_here(address):
            return _loop(domain)
        return (Host(domain, address),)

    # A lookup returns the answer and its cache time in seconds; None: not cached.

    async def _look_up_host(self, name: str) -> tuple[Found, float | None]:
        try:
            with trio.fail_after(self._lifetime):
                found = await trio.socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            return NoHosts(f"{name}: {error}"), None
        except trio.TooSlowError:
            return NoHosts(f"{name}: no answer in time"), None
        addresses = [str(sockaddr[0]) for *_, sockaddr in found]
        return tuple(Host(name, address) for address in addresses[:MAX_ADDRESSES]), MIN_TTL

    async def _look_up_domain(self, domain: str) -> tuple[Found, float | None]:
        name, hostname = _canonical(domain), self._hostname
        if len(name) > 253 or not all(0 < len(label) < 64 for label in name.split(".")):
            return NoHosts("", smtp.no_such_domain(f"{domain} is not a domain")), MIN_TTL
        try:
            exchanges, ttl = await self._exchanges(name)
        except _NoRecords as error:
            if await self._is_sound():
                return NoHosts("", smtp.no_such_domain(str(error))), MIN_TTL
            return NoHosts(f"{error}, says a resolver that does not know the root either"), None
        except _NoAnswer as error:
            return NoHosts(str(error)), None
        if not exchanges:
            return NoHosts("", smtp.null_mx(domain)), ttl
        async with trio.open_nursery() as nursery:
            for exchange in exchanges:
                if exchange.name != hostname:
                    nursery.start_soon(self._look_up_addresses, exchange)
        here = (e.preference for e in exchanges if self._leads_here(e, hostname))
        cut = min(here, default=1 << 16)
        exchanges = [exchange for exchange in exchanges if exchange.preference < cut]
        if not exchanges:
            return _loop(domain), MIN_TTL
        hosts = tuple(Host(e.name, a, e.preference) for e in exchanges for a in e.addresses)
        if hosts:
            return hosts[:MAX_ADDRESSES], min(ttl, *(e.ttl for e in exchanges), MAX_TTL)
        problem = "; ".join(exchange.problem for exchange in exchanges[:3])
        return NoHosts(problem), None if any(e.unanswered for e in exchanges) else MIN_TTL

    async def _is_sound(self) -> bool:
        """Whether the resolver knows a name that must exist, now."""
        try:
            return bool(await self._query(".", "NS"))
        except (_NoRecords, _NoAnswer):
            return False

    def _leads_here(self, exchange: _Exchange, hostname: str) -> bool:
        return exchange.name == hostname or any(
            map(self._is_here, exchange.addresses[:MAX_ADDRESSES])
        )

    async def _exchanges(self, name: str) -> tuple[list[_Exchange], float]:
        """The hosts of a domain, best first, without addresses yet; none is a null MX.

        Raises `_NoRecords` if the domain does not exist.
        """
        try:
            records, ttl = await self._query(name, "MX")
        except _NoRecords as error:
            if error.nonexistent:
                raise
            return [_Exchange(name, 0)], MAX_TTL
        exchanges = [_Exchange(_canonical(str(r.exchange)), int(r.preference)) for r in records]
        exchanges = [exchange for exchange in exchanges if exchange.name]
        random.shuffle(exchanges)
        exchanges.sort(key=lambda exchange: exchange.preference)
        return exchanges[:MAX_EXCHANGES], ttl

    async def _look_up_addresses(self, exchange: _Exchange) -> None:
        """IPv4 first: more hosts can use it, and receivers judge it more mildly."""
        for kind in ("A", "AAAA"):
            try:
                records, ttl = await self._query(exchange.name, kind)
            except (_NoRecords, _NoAnswer) as error:
                exchange.problem = str(error)
                if isinstance(error, _NoAnswer):
                    exchange.unanswered = True
            else:
                exchange.addresses += [str(record.address) for record in records]
                exchange.ttl = min(exchange.ttl, ttl)

    async def _query(self, name: str, kind: str) -> tuple[list[Any], float]:
        """The records of one kind and their TTL, through CNAMEs."""
        import dns.asyncresolver
        import dns.exception

        ttl = MAX_TTL
        try:
            if self._dns is None:
                self._dns = self._open_dns()
            target = name
            for _ in range(MAX_ALIASES):
                answer = await self._dns.resolve(
                    target, kind, search=False, raise_on_no_answer=False
                )
                ttl = min(ttl, answer.chaining_result.minimum_ttl)
                if answer.rrset is not None:
                    return list(answer.rrset), ttl
                if answer.canonical_name == answer.qname:
                    raise _NoRecords(f"{name} has no {kind} record")
                target = answer.canonical_name.to_text()
        except dns.resolver.NXDOMAIN:
            raise _NoRecords(f"{name} does not exist", nonexistent=True) from None
        except (dns.exception.DNSException, OSError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise _NoAnswer(f"{name}: {text or type(error).__name__}") from None
        raise _NoAnswer(f"{name}: more than {MAX_ALIASES} aliases")

    def _open_dns(self) -> dns.asyncresolver.Resolver:
        import dns.asyncresolver
        import dns.nameserver

        resolver = dns.asyncresolver.Resolver(configure=not self._servers)
        if self._servers:
            resolver.nameservers = [
                dns.nameserver.Do53Nameserver(server.address, server.port)
                for server in self._servers
            ]
        resolver.timeout = self._timeout
        resolver.lifetime = self._lifetime
        return resolver


def is_this_host(address: str) -> bool:
    """True if data sent to the IP address arrives at this host.

    Asks the system for the source address: an address of this host is its own source. Nothing is
    sent. Raises OSError if no descriptor is left.
    """
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_loopback or ip.is_unspecified:
        return True
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    try:
        probe = socket.socket(family, socket.SOCK_DGRAM)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            return False  # This host has no address of that family.
        raise
    with probe:
        try:
            probe.connect((str(ip), 25))
            return ipaddress.ip_address(probe.getsockname()[0]) == ip
        except OSError:
            return False  # No route.


def _is_nowhere(address: str) -> bool:
    return False


def _canonical(name: str) -> str:
    """A domain in lower case, as A-labels, without the root dot; else the input."""
    name = name.rstrip(".").lower()
    if not name.isascii():
        import idna

        try:
            return idna.encode(name, uts46=True).decode()
        except idna.IDNAError:
            return name
    return name


def _in_order(hosts: Sequence[Host]) -> tuple[Host, ...]:
    """By preference; equal ones in random order."""
    lots = {host.name: random.random() for host in hosts}
    return tuple(sorted(hosts, key=lambda host: (host.preference, lots[host.name])))


def _loop(domain: str) -> NoHosts:
    return NoHosts("", smtp.loops_back(domain))
