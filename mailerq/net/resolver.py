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

What DNSSEC proves about a domain and its hosts is kept with the answers, for DANE (RFC 7672):
`proved_names` and `tlsa_bases`. See `mailerq.net.dns_client` for whose word counts.

A resolver belongs to one trio loop. dnspython is imported with the first lookup: a process that
only injects a mail never needs it.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, NamedTuple

import trio

from mailerq.address import parse_host, parse_literal
from mailerq.config import Config
from mailerq.errors import AddressError
from mailerq.net.dns_client import MAX_TTL, Answer, DnsClient, NoAnswer, Stub
from mailerq.net.logs import Ration
from mailerq.net.shared_cache import SharedCache
from mailerq.rules.access import is_within
from mailerq.rules.routes import SMTP_PORT
from mailerq.wire import smtp
from mailerq.wire.smtp import Reply

__all__ = ["Host", "NoHosts", "Resolver", "is_this_host"]

log = logging.getLogger("mailerq.delivery")

MIN_TTL: Final = 60.0
"""Minimum cache time of an answer, also of a negative one; tiny TTLs hurt."""

FAILED_TTL: Final = 10.0
"""Minimum cache time of answers for DANE, and how long it is known that there is none."""

MAX_EXCHANGES: Final = 16
"""MX records considered, best preference first. RFC 5321 asks for two."""

MAX_ADDRESSES: Final = 32
"""Addresses tried for one domain."""

MAX_TEXTS: Final = 100
"""TXT records of a name that are read."""


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


class _Mail(NamedTuple):
    """Where mail for a domain goes.

    `names` are those of the domain, if DNSSEC proves its MX records or that there are none.
    """

    found: Found
    names: tuple[str, ...] = ()


class _NoRecords(Exception):
    """The name has no such records; `nonexistent`: nor any other."""

    def __init__(self, text: str, answer: Answer) -> None:
        super().__init__(text)
        self.answer = answer
        self.nonexistent = answer.nonexistent


@dataclass(slots=True)
class _Exchange:
    """One host of a domain, and the results of its lookups."""

    name: str
    preference: int
    addresses: list[str] = field(default_factory=list)
    ttl: float = MAX_TTL
    problem: str = ""
    unanswered: bool = False


@lru_cache(maxsize=1024)
def _named_by_address(name: str) -> Host | None:
    """The host whose name is an IP address, or None."""
    try:
        address = parse_host(name)
    except AddressError:
        return None  # The system may know a name that is no domain, with an underscore.
    return None if isinstance(address, str) else Host(name, str(address))


class Resolver:
    """Looks up where mail goes: asks `dns-servers`, within `dns-timeout` and `dns-attempts`.

    `leads_here` says whether an address belongs to this host.
    """

    def __init__(self, config: Config, *, leads_here: Callable[[str], bool] | None = None) -> None:
        self._say_ours_to_mend = Ration(log.error, 1, "and %d times more for a relay domain")
        self._given_leads_here = leads_here
        self._client = _client_of(config)
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
        self.config = config
        self._client.close()
        self._client = _client_of(config)
        self._domains: SharedCache[_Mail] = SharedCache(MIN_TTL, MAX_TTL)
        self._hosts: SharedCache[Found] = SharedCache(MIN_TTL, MAX_TTL)
        self._bases: SharedCache[tuple[str, ...] | str] = SharedCache(FAILED_TTL, MAX_TTL)
        self._answers: SharedCache[Answer | str] = SharedCache(FAILED_TTL, MAX_TTL)

    def close(self) -> None:
        """Free what lookups need, once those under way have ended."""
        self._client.close()

    async def mail_hosts(self, domain: str) -> Found:
        """The hosts for mail to `domain`, which may be an address literal; best first."""
        try:
            if domain.startswith("["):
                return self._permitted(domain, self._literal(domain))
            found = (await self._mail(domain)).found
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
        if (host := _named_by_address(name)) is not None:
            found: Found = (host,)
        else:
            found = await self._hosts.get(
                name, self._look_up_host, late=_no_hosts_yet, seconds=3 * self._lifetime
            )
        return found if trusted else self._permitted(name, found)

    def host_at_address(self, name: str, *, trusted: bool) -> Found | None:
        """What `host` returns if `name` is an IP address, which needs no lookup; else None."""
        if (host := _named_by_address(name)) is None:
            return None
        return (host,) if trusted else self._permitted(name, (host,))

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
            except NoAnswer as error:
                return NoHosts(str(error))
            return tuple(b"".join(record.strings) for record in records[:MAX_TEXTS]), ttl
        return NoHosts(f"{name}: no answer in time")

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

    async def _mail(self, domain: str) -> _Mail:
        return await self._domains.get(
            domain, self._look_up_domain, late=_no_mail_yet, seconds=3 * self._lifetime
        )

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

    async def _look_up_domain(self, domain: str) -> tuple[_Mail, float | None]:
        name, hostname = _canonical(domain), self._hostname
        if len(name) > 253 or not all(0 < len(label) < 64 for label in name.split(".")):
            return _Mail(NoHosts("", smtp.no_such_domain(f"{domain} is not a domain"))), MIN_TTL
        try:
            exchanges, ttl, names = await self._exchanges(name)
        except _NoRecords as error:
            if error.answer.secure or await self._is_sound():
                return _Mail(NoHosts("", smtp.no_such_domain(str(error)))), MIN_TTL
            text = f"{error}, says a resolver that does not know the root either"
            return _Mail(NoHosts(text)), None
        except NoAnswer as error:
            return _Mail(NoHosts(str(error))), None
        if not exchanges:
            return _Mail(NoHosts("", smtp.null_mx(domain)), names), ttl
        found, keep = await self._hosts_of(domain, exchanges, ttl, hostname)
        return _Mail(found, names), keep

    async def _hosts_of(
        self, domain: str, exchanges: list[_Exchange], ttl: float, hostname: str
    ) -> tuple[Found, float | None]:
        """The addresses of the hosts that are better than this host."""
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
        except (_NoRecords, NoAnswer):
            return False

    def _leads_here(self, exchange: _Exchange, hostname: str) -> bool:
        return exchange.name == hostname or any(
            map(self._is_here, exchange.addresses[:MAX_ADDRESSES])
        )

    async def _exchanges(self, name: str) -> tuple[list[_Exchange], float, tuple[str, ...]]:
        """The hosts of a domain, best first, without addresses yet; none is a null MX.

        Also the TTL, and the names of the domain if DNSSEC proves the answer. Raises `_NoRecords`
        if the domain does not exist.
        """
        answer = await self._ask(name, "MX")
        names = tuple(dict.fromkeys((name, answer.name))) if answer.secure else ()
        if not answer.records:
            if answer.nonexistent:
                raise _NoRecords(f"{name} does not exist", answer)
            return [_Exchange(name, 0)], MAX_TTL, names
        exchanges = [
            _Exchange(_canonical(str(r.exchange)), int(r.preference)) for r in answer.records
        ]
        exchanges = [exchange for exchange in exchanges if exchange.name]
        random.shuffle(exchanges)
        exchanges.sort(key=lambda exchange: exchange.preference)
        return exchanges[:MAX_EXCHANGES], answer.ttl, names

    async def _look_up_addresses(self, exchange: _Exchange) -> None:
        """IPv4 first: more hosts can use it, and receivers judge it more mildly."""
        bases = self._bases
        for kind in ("A", "AAAA"):
            try:
                answer = await self._ask(exchange.name, kind)
            except NoAnswer as error:
                exchange.problem = str(error)
                exchange.unanswered = True
                continue
            if not answer.records:
                exchange.problem = _missing(exchange.name, kind, answer)
                continue
            exchange.addresses += [str(record.address) for record in answer.records]
            exchange.ttl = min(exchange.ttl, answer.ttl)
            if answer.secure:
                bases.put(exchange.name, _bases(exchange.name, answer), answer.ttl)

    async def _query(self, name: str, kind: str) -> tuple[list[Any], float]:
        """The records of one kind and their TTL. Raises `_NoRecords`, `NoAnswer`."""
        answer = await self._ask(name, kind)
        if not answer.records:
            raise _NoRecords(_missing(name, kind, answer), answer)
        return list(answer.records), answer.ttl

    async def _ask(self, name: str, kind: str) -> Answer:
        return await self._client.ask(name, kind)

    # What DNSSEC proves

    def untrusted(self) -> str:
        """Why no answer is ever secure; empty if answers can be. Raises `NoAnswer`."""
        return self._client.untrusted()

    async def proved_names(self, domain: str) -> tuple[str, ...] | str:
        """The names of a domain, if DNSSEC proves its MX records or that it has none.

        These are the domain itself and what its CNAME leads to. An empty tuple: nothing proves
        them. A text says why nobody can know now.
        """
        if domain.startswith("[") or not self.config.dane:
            return ()
        mail = await self._mail(domain)
        if mail.names or isinstance(mail.found, tuple) or mail.found.reply is not None:
            return mail.names
        return mail.found.description

    async def tlsa_bases(self, host: str) -> tuple[str, ...] | str:
        """The names below which the TLSA records of a host may be, to be tried in this order.

        There is none if its addresses are insecure, unless an alias itself is secure: many servers
        of unsigned zones do not answer when asked for TLSA records (RFC 7672, section 2.2.2). A
        text says why nobody can know now.
        """
        return await self._bases.get(
            _canonical(host), self._look_up_bases, late=_nothing_yet, seconds=3 * self._lifetime
        )

    async def answer(self, name: str, kind: str) -> Answer | str:
        """The records of one kind at a name, kept for their TTL. A text says why there is none."""
        return await self._answers.get(
            f"{kind} {_canonical(name)}",
            self._look_up,
            late=_nothing_yet,
            seconds=3 * self._lifetime,
        )

    async def _look_up(self, key: str) -> tuple[Answer | str, float]:
        kind, _, name = key.partition(" ")
        try:
            answer = await self._ask(name or ".", kind)
        except NoAnswer as error:
            return str(error), FAILED_TTL
        return answer, answer.ttl

    async def _look_up_bases(self, host: str) -> tuple[tuple[str, ...] | str, float]:
        problem, ttl, aliased, insecure = "", MAX_TTL, False, False
        for kind in ("A", "AAAA"):
            try:
                answer = await self._ask(host, kind)
            except NoAnswer as error:
                problem = str(error)
                continue
            ttl = min(ttl, answer.ttl)
            if answer.secure and answer.records:
                return _bases(host, answer), ttl
            insecure = insecure or not answer.secure
            aliased = aliased or answer.name != host
        if problem and not insecure:
            return problem, FAILED_TTL
        if not aliased:
            return (), ttl
        try:
            alias = await self._ask(host, "CNAME")
        except NoAnswer as error:
            return str(error), FAILED_TTL
        return (host,) if alias.secure and alias.records else (), min(ttl, alias.ttl)


def _client_of(config: Config) -> DnsClient:
    if config.dns_validator == "unbound":
        from mailerq.net.unbound import Unbound

        return Unbound(config)
    return Stub(config)


def _nothing_yet(key: str) -> str:
    return f"{key}: no answer in time"


def _no_hosts_yet(name: str) -> NoHosts:
    return NoHosts(_nothing_yet(name))


def _no_mail_yet(domain: str) -> _Mail:
    return _Mail(_no_hosts_yet(domain))


def _bases(host: str, answer: Answer) -> tuple[str, ...]:
    """The end of the aliases, if there are some, then the host itself (RFC 7672, section 2.2.3)."""
    return tuple(dict.fromkeys((answer.name, host)))


def _missing(name: str, kind: str, answer: Answer) -> str:
    return f"{name} does not exist" if answer.nonexistent else f"{name} has no {kind} record"


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
