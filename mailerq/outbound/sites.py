"""Where mail goes: the hosts of a target, looked up once, and what is remembered of hosts.

Theory of operation
-------------------
A *target* is the `Route` that a message names. A *site* is the set of hosts that take its mail.
Domains with the same set of (preference rank, host) share a site, and so its connections, unless
`limits-file` sets one apart. The key of a site is a digest of that set, with the port and the
operator's trust, never a label: two sets can have equal labels. The label is for people.

`Sites.find` asks the resolver, which caches answers for their TTL and shares lookups of one name.
A result is used for `FRESH_SECONDS` without asking again, unless a host does not let us in.

What a domain has published about TLS (`mailerq.outbound.policies`) belongs to its site: domains
with the same hosts and other policies have sites of their own, so they share no connections. They
share their limits nevertheless, by `Site.limit_key`. Hosts that match no pattern of an enforced
MTA-STS policy are left out. Of a smarthost given by name the TLSA records count, if DNSSEC proves
its addresses; of a sink and of `local-delivery` nothing does.

A target that has no hosts for now is a site of its own, with the outcome for its mail. A site
exists while a result or a flow needs it; what waits for a site knows its key only.

A name server that never answers costs a lookup its whole timeout. So a lookup is *quick* at first,
and a slow one starts again as a *patient* one. Each kind has its own limit, so that dead domains,
however many, do not hold up lookups for others for long.

Everything here runs on the home worker.
"""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Collection
from hashlib import blake2b
from time import monotonic
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

import trio

from mailerq.address import parse_host
from mailerq.errors import AddressError
from mailerq.escaping import escape
from mailerq.net.resolver import Host, NoHosts, Resolver
from mailerq.outbound.policies import NO_POLICIES, NO_POLICY, Policies
from mailerq.rules import responses
from mailerq.rules.responses import Outcome
from mailerq.rules.routes import Route
from mailerq.rules.security import (
    MX_MISMATCH,
    Demands,
    DomainPolicy,
    PolicyUnknown,
    Reason,
    StsPolicy,
    TlsFailure,
)
from mailerq.wire.login import Login

if TYPE_CHECKING:
    from mailerq.outbound.flow import Flow

__all__ = ["HostHistory", "Site", "Sites"]

log = logging.getLogger("mailerq.delivery")

SMARTHOSTS: Final = frozenset(("", "smarthost"))
"""The settings that choose a smarthost; "" is the property of a message."""

MAX_LOOKUPS: Final = 64
"""Targets looked up at a time, for each kind of lookup."""

QUICK_SECONDS: Final = 1.0
"""Timeout of a quick lookup."""

MAX_WAITING: Final = 1000
"""Lookups that may wait to become patient."""

FAILED_SECONDS: Final = 5.0
"""How long a failed lookup is remembered; mail for the target is placed meanwhile."""

FRESH_SECONDS: Final = 60.0
"""How long a result is used without asking the resolver, which knows the TTL."""

MAX_TARGETS: Final = 10_000
"""Targets whose sites are remembered; the oldest result is forgotten first."""

DOUBT_SECONDS: Final = 300.0
"""How long a host that did not let us in is tried after the others."""

BREAKS: Final = 3
BREAKS_SECONDS: Final = 60.0
"""A host that breaks off so often in this time is tried after the others for `DOUBT_SECONDS`."""

ASIDE_SECONDS: Final = 300.0
"""How long a local address that cannot be bound is used only if a message has no other."""

OUT_OF_STEP_SECONDS: Final = 3600.0
"""How long a host that answered out of step gets no envelope ahead and is served carefully."""

PASSED_SECONDS: Final = 3600.0
"""How long it is known that a host has passed a message on to another one."""

LOGIN_SECONDS: Final = 3600.0
"""How long the log does not repeat that a host refuses a login."""

MAX_HOSTS: Final = 10_000
"""Hosts of each kind that are remembered; the oldest entry is forgotten first."""


class Site:
    """Hosts that take the same mail, and the flows to them.

    A site without hosts has an `outcome` for its mail.
    """

    __slots__ = (
        "__weakref__",
        "apart",
        "chosen_by",
        "flows",
        "group",
        "hosts",
        "key",
        "label",
        "limit_key",
        "lmtp",
        "mx",
        "name",
        "outcome",
        "policy",
        "port",
        "setting",
        "trusted",
    )

    def __init__(self, key: bytes, route: Route) -> None:
        self.key = self.limit_key = key
        """The second one is that of all sites with the same hosts, whatever their policies."""
        self.mx = route.mx
        self.trusted = route.trusted
        self.policy = NO_POLICY
        """What the domain has published about TLS."""
        self.label = route.name
        self.name = route.host
        self.port = route.port
        self.lmtp = route.lmtp
        self.group = ""
        """The lines of `limits-file` that set the site's domains apart, see `rules.shaping`."""
        self.apart = ""
        """The domains that a pause sets apart, see `rules.rows`."""
        self.hosts: tuple[Host, ...] = ()
        self.outcome: Outcome | None = None
        self.setting = ""
        """The key of the setting that led to this outcome, if one did."""
        self.chosen_by = route.setting
        """The key of the setting that chose the host, if one did."""
        self.flows: dict[tuple[str | None, Demands], Flow] = {}

    def fits(self, local_ip: str) -> bool:
        """Whether a host can be reached from a local address."""
        six = ":" in local_ip
        return any((":" in host.address) == six for host in self.hosts)

    def in_order(self, local_ip: str | None, history: HostHistory) -> list[Host]:
        """The hosts reachable from a local address: by preference, doubtful hosts last.

        Hosts of equal preference come in a new random order each time.
        """
        hosts: Collection[Host] = self.hosts
        if local_ip is not None:
            six = ":" in local_ip
            hosts = [host for host in hosts if (":" in host.address) == six]
        if len(hosts) < 2:
            return list(hosts)
        lots = {host.name: random.random() for host in hosts}
        return sorted(
            hosts,
            key=lambda h: (history.is_doubtful(h.address), h.preference, lots[h.name]),
        )


class Sites:
    """Finds the site of a target."""

    def __init__(
        self,
        resolver: Resolver,
        group_of: Callable[[str], str],
        apart_of: Callable[[str], str] = lambda domain: "",
        ignores_policies: Callable[[str], bool] = lambda group: False,
        policies: Policies = NO_POLICIES,
    ) -> None:
        self._resolver = resolver
        self._group_of = group_of
        self._apart_of = apart_of
        self._ignores_policies = ignores_policies
        self.policies = policies
        self._quick = trio.CapacityLimiter(MAX_LOOKUPS)
        self._patient = trio.CapacityLimiter(MAX_LOOKUPS)
        self._found: OrderedDict[Route, tuple[float, Site | NoHosts]] = OrderedDict()
        self._sites: WeakValueDictionary[bytes, Site] = WeakValueDictionary()

    def known(self, route: Route) -> Site | NoHosts | None:
        """What `find` would return without a lookup, or None."""
        found = self._found.get(route)
        if found is not None and monotonic() < found[0]:
            return found[1]
        return None if route.mx else self._at_address(route)

    def _at_address(self, route: Route) -> Site | NoHosts | None:
        """The site of a target that is an IP address or a socket, which needs no lookup.

        Nothing is published about TLS with such a target.
        """
        if route.host.startswith("/"):
            found: tuple[Host, ...] | NoHosts | None = (Host(route.host, route.host),)
        else:
            found = self._resolver.host_at_address(route.host, trusted=route.trusted)
        return found if found is None else self._came(route, found, NO_POLICY)

    async def find_quickly(self, route: Route) -> Site | NoHosts | None:
        """`find`, limited to `QUICK_SECONDS`; None if the limit passes."""
        async with self._quick:
            if (found := self.known(route)) is None:
                with trio.move_on_after(QUICK_SECONDS):
                    found = await self._look_up(route)
        return found

    async def find(self, route: Route) -> Site | NoHosts:
        """The site of a target, or `NoHosts` with a reply that refuses its mail.

        Never raises.
        """
        async with self._patient:
            return self.known(route) or await self._look_up(route)

    @property
    def crowded(self) -> bool:
        """Whether too many lookups wait to become patient."""
        return self._patient.statistics().tasks_waiting >= MAX_WAITING

    def forget(self, route: Route) -> None:
        """Look up a target again: its hosts did not let us in."""
        self._found.pop(route, None)

    def forget_all(self) -> None:
        """Find all sites anew: other limits may set domains apart. Lookups stay cached."""
        self._found.clear()

    def forget_domains(self, condition: Callable[[str], bool]) -> None:
        """Find the sites of some domains anew: pauses set other domains apart."""
        for route in list(self._found):
            if condition(route.name):
                del self._found[route]

    def forget_failures(self) -> None:
        """Look up again the targets that had no hosts."""
        for route, (_, found) in list(self._found.items()):
            if isinstance(found, Site) and found.outcome is not None:
                del self._found[route]

    async def _look_up(self, route: Route) -> Site | NoHosts:
        outcome, policy = responses.OWN_FAULT, NO_POLICY
        try:
            if route.mx:
                found = await self._resolver.mail_hosts(route.host)
            else:
                found = await self._resolver.host(route.host, trusted=route.trusted)
            if not isinstance(found, NoHosts):
                policy = await self._policy_of(route)
        except PolicyUnknown as error:
            outcome = responses.tls_failed(TlsFailure(Reason.FAILURE, str(error)), state="dns")
        except Exception:
            # Bad data in other people's zones must not end the engine.
            log.exception("looking for the hosts of %s failed", route.name)
        else:
            return self._came(route, found, policy)
        return self._no_hosts(route, outcome)

    def _came(
        self, route: Route, found: tuple[Host, ...] | NoHosts, policy: DomainPolicy
    ) -> Site | NoHosts:
        """Keep the result of a lookup."""
        if not isinstance(found, NoHosts):
            site = self._site_of(route, found, policy)
            return self._keep(route, site, FAILED_SECONDS if site.outcome else FRESH_SECONDS)
        if found.reply is not None:
            return self._keep(route, found)
        return self._no_hosts(route, responses.no_hosts(found.description, None), found.setting)

    def _no_hosts(self, route: Route, outcome: Outcome, setting: str = "") -> Site | NoHosts:
        """A target that has no hosts for now."""
        apart = self._apart_of(route.name)
        site = self._site(_digest("no hosts", route, *(apart and [apart])), route)
        site.outcome, site.setting, site.apart = outcome, setting, apart
        return self._keep(route, site, FAILED_SECONDS)

    async def _policy_of(self, route: Route) -> DomainPolicy:
        """What was published about TLS with a target, if that counts. Raises `PolicyUnknown`."""
        group = self._group_of(route.name if route.mx else route.host.lower())
        if not self.policies.exist or self._ignores_policies(group):
            return NO_POLICY
        if route.mx:
            literal = route.host.startswith("[")
            return NO_POLICY if literal or route.waived else await self.policies.find(route.host)
        if route.lmtp or route.setting not in SMARTHOSTS or not _is_name(route.host):
            return NO_POLICY
        return await self.policies.of_smarthost(route.host)

    def _site_of(self, route: Route, hosts: tuple[Host, ...], policy: DomainPolicy) -> Site:
        group, apart = self._group_of(route.name), self._apart_of(route.name)
        if route.mx:
            ranks = {p: n for n, p in enumerate(sorted({host.preference for host in hosts}))}
            names = sorted({(ranks[host.preference], host.name.lower()) for host in hosts})
            key = _digest(names, route.port, route.trusted, group, *(apart and [apart]))
        else:
            key = _digest(route, *(apart and [apart]))
        if policy == NO_POLICY:
            site = self._site(key, route)
        else:
            site = self._site(_digest(key, policy), route)
            site.limit_key, site.policy = key, policy
            if (enforced := policy.enforced) is not None:
                site.outcome, hosts = self._allowed(route.host, enforced, policy, hosts)
        site.hosts, site.group, site.apart = hosts, group, apart
        return site

    def _allowed(
        self, domain: str, enforced: StsPolicy, policy: DomainPolicy, hosts: tuple[Host, ...]
    ) -> tuple[Outcome | None, tuple[Host, ...]]:
        """The hosts that an MTA-STS policy allows; an outcome if it allows none."""
        allowed = []
        for host in hosts:
            if enforced.allows(host.name):
                allowed.append(host)
                continue
            text = f"{host.name} matches no pattern of {enforced}"
            failure = TlsFailure(Reason.FAILURE, text, MX_MISMATCH)
            self.policies.record(domain, policy, None, host.name, failure)
        outcome = None if allowed else responses.tls_failed(failure, state="dns")
        return outcome, tuple(allowed)

    def _site(self, key: bytes, route: Route) -> Site:
        site = self._sites.get(key)
        if site is None:
            site = self._sites[key] = Site(key, route)
        return site

    def _keep(
        self, route: Route, found: Site | NoHosts, seconds: float = FRESH_SECONDS
    ) -> Site | NoHosts:
        self._found.pop(route, None)
        if len(self._found) >= MAX_TARGETS:
            self._found.popitem(last=False)
        self._found[route] = monotonic() + seconds, found
        return found


def _is_name(host: str) -> bool:
    """Whether a host is a name, and no address or socket."""
    try:
        return isinstance(parse_host(host), str)
    except AddressError:
        return False


def _digest(*parts: object) -> bytes:
    """A short key: there may be many."""
    return blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=16).digest()


class _Recent:
    """Names remembered for a limited time."""

    def __init__(self) -> None:
        self._until: OrderedDict[str, float] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return bool(self._until) and self._until.get(name, 0.0) > monotonic()

    def add(self, name: str, seconds: float) -> bool:
        """Remember a name for `seconds`; return True if the name is new."""
        now = monotonic()
        new = self._until.pop(name, 0.0) <= now
        self._until[name] = now + seconds
        if len(self._until) > MAX_HOSTS:
            self._until.popitem(last=False)
        return new

    def discard(self, name: str) -> None:
        self._until.pop(name, None)


class HostHistory:
    """What is remembered of remote hosts, and of this host's addresses."""

    def __init__(self) -> None:
        self._doubtful = _Recent()
        self._unsound = _Recent()
        self._left = _Recent()
        self._passed = _Recent()
        self._breaks: OrderedDict[str, list[float]] = OrderedDict()
        self._aside = _Recent()
        self._out_of_step = _Recent()
        self._broken_tls = _Recent()
        self._logins = _Recent()

    def is_doubtful(self, address: str) -> bool:
        """Whether a host recently did not let us in, broke off several times, or is left alone."""
        return address in self._doubtful or address in self._unsound or address in self._left

    def is_left(self, address: str) -> bool:
        """Whether a host is left alone, because it has said that it is busy."""
        return address in self._left

    def leave(self, address: str, seconds: float) -> None:
        """A host is busy: the others come first for some seconds."""
        self._left.add(address, seconds)

    def passes_on(self, address: str, attempt: str) -> bool:
        """Whether another host may get a message that a host is too busy for.

        Each host passes an `attempt` of a message on once. So an attempt ends, however often the
        hosts are busy and free again meanwhile.
        """
        return self._passed.add(f"{attempt} {address}", PASSED_SECONDS)

    def let_in(self, address: str, local_ip: str | None) -> None:
        """A host let us in from `local_ip`."""
        self._doubtful.discard(address)
        if local_ip is not None:
            self._aside.discard(local_ip)

    def kept_out(self, address: str) -> None:
        """A host did not let us in."""
        self._doubtful.add(address, DOUBT_SECONDS)

    def broke_off(self, address: str) -> None:
        """A connection to a host ended, or was silent, in the middle of a message."""
        now = monotonic()
        times = [*(t for t in self._breaks.pop(address, ()) if t > now - BREAKS_SECONDS), now]
        if len(times) >= BREAKS:
            self._unsound.add(address, DOUBT_SECONDS)
            return
        self._breaks[address] = times
        if len(self._breaks) > MAX_HOSTS:
            self._breaks.popitem(last=False)

    def is_aside(self, local_ip: str) -> bool:
        """Whether a local address recently could not be bound."""
        return local_ip in self._aside

    def cannot_bind(self, local_ip: str, error: OSError) -> None:
        """A local address cannot be bound."""
        if self._aside.add(local_ip, ASIDE_SECONDS):
            log.error(
                "cannot send from %s: %s; messages that may leave from other addresses use these,"
                " and this one is tried again in %d s. Add the address to an interface of this"
                " host, or remove it from ips, its pool or smtp-default-ips",
                local_ip,
                error.strerror or error,
                ASIDE_SECONDS,
            )

    def is_tls_broken(self, address: str) -> bool:
        """Whether TLS with a host failed recently, so that mail goes in clear where it may."""
        return address in self._broken_tls

    def tls_broke(self, address: str, seconds: float) -> None:
        """TLS with a host failed, and something may go to it in clear."""
        self._broken_tls.add(address, seconds)

    def login_refused(self, label: str, address: str, login: Login, outcome: Outcome) -> None:
        """A host refused a login."""
        if self._logins.add(f"{address} {login.username}", LOGIN_SECONDS):
            reply = (outcome.code, outcome.status, outcome.description)
            log.error(
                "%s [%s] does not let %s log in: %s. The mail waits. The login is in the settings"
                " or in the property smarthost of messages",
                label,
                address,
                escape(login.username),
                escape(" ".join(str(part) for part in reply if part)),
            )

    def logged_in(self, address: str, login: Login) -> None:
        """A host took a login."""
        self._logins.discard(f"{address} {login.username}")

    def was_out_of_step(self, address: str) -> bool:
        """Whether a host recently answered in an order that proves nothing."""
        return address in self._out_of_step

    def out_of_step(self, address: str, label: str) -> None:
        """A host answers in an order that proves nothing; see `mailerq.wire.client`."""
        if self._out_of_step.add(address, OUT_OF_STEP_SECONDS):
            log.warning(
                "%s [%s] answers SMTP out of step: mail in doubt is tried again, and for an hour"
                " the host is sent no envelopes ahead, and one mail on each new connection",
                label,
                address,
            )
