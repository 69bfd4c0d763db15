"""Explain what would be decided about a message now, by the code that decides.

Theory of operation
-------------------
`Explainer.explain` makes the document of a message that nobody sends, and takes it the way of any
other: the plan, the hosts of its target, their site, and the limits of each local address. With a
running dispatcher the answer has what the flows do now as well. Without one the same code works
from the settings alone.

Each step returns a part of the answer, a dict that can become JSON. A value is followed by its
place: a setting and its origin, or a file and its line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import trio

from mailerq.address import parse_domain
from mailerq.errors import AddressError, MailerqError
from mailerq.message import Message, format_time
from mailerq.net.resolver import NoHosts
from mailerq.outbound.cells import Count
from mailerq.outbound.limits import LEASE, PAUSED
from mailerq.outbound.refusals import Scope
from mailerq.outbound.sites import HostHistory, Site, Sites
from mailerq.outbound.stops import late, peer_of
from mailerq.rules import responses
from mailerq.rules.destinations import place_of
from mailerq.rules.plan import Hold, Park, Plan, Refuse, Send
from mailerq.rules.responses import Fate, Outcome
from mailerq.rules.routes import Route
from mailerq.rules.security import LEVEL_DEMANDS, Level, PolicyUnknown
from mailerq.rules.shaping import HOURS, SECURE, Bound

if TYPE_CHECKING:
    from mailerq.config import Config
    from mailerq.outbound.limits import Limits, Want
    from mailerq.outbound.seeing import Seeing
    from mailerq.outbound.signer import Signer
    from mailerq.rules.row import Row
    from mailerq.rules.rows import Rows

__all__ = ["Explainer", "Question", "words_of_row"]

ANYBODY: Final = "postmaster"
"""The recipient in a domain of which nobody is named."""

MAX_TEXT: Final = 1000
"""Characters of an address in a question."""

CLOSED: Final = "closed"
"""Hours that allow nothing now; the value is when they begin."""

DECISIONS: Final = {Fate.DELIVERED: "done", Fate.RETRY: "wait", Fate.FAILED: "fail"}

MAX_HOSTS: Final = 32
"""Hosts whose limits are listed."""

TLSA_SECONDS: Final = 5.0
"""How long an answer waits for TLSA records."""

MAX_RECORDS: Final = 20
MAX_RECORD: Final = 140
"""TLSA records of a host that are listed, and characters of each: a digest has 128."""


class Question(NamedTuple):
    """What is asked about: an address or a domain, the sender, local addresses, and tags."""

    recipient: str
    envelope: str = ""
    ips: tuple[str, ...] = ()
    pool: str = ""
    tags: tuple[str, ...] = ()

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> Self:
        """The question in a request. Raises `MailerqError`."""
        recipient, envelope = request.get("recipient"), request.get("envelope", "")
        ips, tags = request.get("ips", []), request.get("tags", [])
        pool = request.get("pool", "")
        are_lists = isinstance(ips, list) and isinstance(tags, list)
        texts = [recipient, envelope, pool, *ips, *tags] if are_lists else [None]
        if not all(isinstance(text, str) and len(text) <= MAX_TEXT for text in texts):
            raise MailerqError("expected an address or a domain, a sender, local addresses, tags")
        return cls(str(recipient), str(envelope), tuple(ips), str(pool), tuple(tags))

    def answer(self) -> dict[str, Any]:
        """The beginning of an answer."""
        return {**self._asdict(), "ips": list(self.ips), "tags": list(self.tags)}

    def message(self) -> Message:
        """The document of a message as it is asked about."""
        name = self.recipient
        recipient = name if "@" in name else f"{ANYBODY}@{name}"
        properties: dict[str, Any] = {"envelope": self.envelope, "recipient": recipient}
        if self.ips:
            properties["ips"] = list(self.ips)
        if self.pool:
            properties["pool"] = self.pool
        if self.tags:
            properties["tags"] = list(self.tags)
        return Message(properties)


Decide = Callable[[Message, float, float], Plan]
"""See `Dispatcher.decide`."""


class Explainer:
    """Explains with the settings in force; with `seeing`, also what flows do now."""

    def __init__(
        self,
        config: Config,
        limits: Limits,
        sites: Sites,
        decide: Decide,
        *,
        now: Callable[[], float],
        rows: Rows | None = None,
        seeing: Seeing | None = None,
        signer: Signer | None = None,
        look_up: Callable[[Route], object] | None = None,
    ) -> None:
        self._config = config
        self._limits = limits
        self._sites = sites
        self._decide = decide
        self._now = now
        self._rows = rows
        self._seeing = seeing
        self._signer = signer
        self._look_up = look_up
        """Starts a look-up that may take long; without it `explain` waits for the look-up."""

    async def explain(self, question: Question) -> dict[str, Any]:
        """The answer. It is ``pending`` while the name servers have not answered: ask again."""
        message, now = question.message(), self._now()
        destination = place_of(message.properties).destination
        answer = {
            **question.answer(),
            "time": format_time(now),
            "destination": {"key": destination},
        }
        if self._seeing is not None:
            answer["destination"] = self._seeing.destination(destination)
        decision = self._decide(message, now, now)
        if isinstance(decision, Refuse):
            return {**answer, **_of_outcome(decision.outcome)}
        if isinstance(decision, Hold):
            return {**answer, "decision": "hold", "until": format_time(decision.until)}
        if isinstance(decision, Park):
            return {**answer, **self._of_park(message, decision)}
        answer |= self._of_route(decision)
        found = await self._find(decision.route)
        if found is None:
            reason = "the name servers have not answered yet"
            return {**answer, "decision": "wait", "reason": reason, "pending": True}
        if isinstance(found, NoHosts):
            outcome = responses.no_hosts(found.description, found.reply)
            return {**answer, **_of_outcome(outcome), **self._setting(found.setting)}
        if found.outcome is not None:
            return {**answer, **_of_outcome(found.outcome), **self._setting(found.setting)}
        answer |= self._of_site(found)
        answer |= await self._of_tlsa(found)
        plan: Send | Refuse | Park = decision
        if self._rows is not None:
            plan = late(self._rows, message, decision, found, self._limits.shaping)
        if isinstance(plan, Park):
            return {**answer, **self._of_park(message, plan)}
        if isinstance(plan, Refuse):
            return {**answer, **_of_outcome(plan.outcome)}
        sources = [self._of_source(plan, found, ip) for ip in plan.local_ips or (None,)]
        answer |= await self._of_keys(question.envelope)
        return {**answer, "from": sources, "decision": "send", **_of_waits(sources)}

    async def _find(self, route: Route) -> Site | NoHosts | None:
        """The hosts of a target; None if they take long to find."""
        if self._look_up is None:
            return await self._sites.find(route)
        found = self._sites.known(route) or await self._sites.find_quickly(route)
        if found is None:
            self._look_up(route)
        return found

    # Parts of the answer

    def _setting(self, key: str) -> dict[str, Any]:
        return {"where": self._config.place(key)} if key else {}

    async def _of_keys(self, envelope: str) -> dict[str, Any]:
        """Which keys sign mail whose author is the sender."""
        if self._signer is None or not self._signer.is_active or "@" not in envelope:
            return {}
        try:
            domain = parse_domain(envelope.rpartition("@")[2])
        except AddressError:
            return {}
        found, now = await self._signer.find(domain), self._now()
        keys = [
            {
                "domain": ready.source.domain,
                "selector": ready.source.selector,
                "algorithm": ready.key.algorithm,
                "in-force": ready.source.options.is_in_force(now),
                "protocols": sorted(ready.source.options.protocols),
                "where": ready.source.where,
            }
            for ready in found.keys
        ]
        missing = {"action": self._config.dkim_missing, "where": self._config.place("dkim-missing")}
        return {
            "signing": {
                "from-domain": domain,
                "keys": keys,
                "problems": list(found.problems_at(now)),
                "missing": missing,
            }
        }

    def _of_park(self, message: Message, decision: Park) -> dict[str, Any]:
        """A pause keeps the message, under a key of its own."""
        key = place_of({**message.properties, "paused": decision.row}).destination
        row = None if self._rows is None else self._rows.by_id.get(decision.row)
        return {
            "decision": "wait",
            "reason": f"pause {decision.row}" if row is None else words_of_row(row),
            "where": "mailerq pause",
            "until": None if row is None or row.until is None else format_time(row.until),
            "destination": {"key": key, "due": False, "next": None},
        }

    def _of_route(self, decision: Send) -> dict[str, Any]:
        """Which host, and what decides that."""
        route, config = decision.route, self._config
        return {
            "domain": decision.domain,
            "route": {
                "target": route.name,
                "host": route.host,
                "port": route.port,
                "by": "MX records" if route.mx and not route.host.startswith("[") else "name",
                "protocol": "LMTP" if route.lmtp else "SMTP",
                "login": login.username if (login := decision.demands.login) is not None else None,
                "where": config.place(route.setting) if route.setting else "",
            },
            "expires": {
                "after": config.max_delivertime,
                "where": config.place("max-delivertime"),
            },
        }

    def _of_site(self, site: Site) -> dict[str, Any]:
        """The hosts, and which mail counts together with this."""
        shaping = self._limits.shaping
        provider = shaping.provider_of({host.name for host in site.hosts})
        history = None if self._seeing is None else self._seeing.dispatcher.history
        hosts = sorted(site.hosts, key=lambda host: (host.preference, host.name, host.address))
        return {
            "site": {
                "label": site.label,
                "apart": site.group or site.apart,
                "where": shaping.where_of_group(site.group),
            },
            "provider": {"name": provider, "where": shaping.where_of_provider(provider)},
            "hosts": [
                {
                    "preference": host.preference,
                    "name": host.name,
                    "address": host.address,
                    "state": _of_host(history, host.address),
                }
                for host in hosts
            ],
        }

    def _of_source(self, decision: Send, site: Site, local_ip: str | None) -> dict[str, Any]:
        """What holds for mail from one local address, and what its flow does."""
        local = self._limits.shaping.local_ips
        name = None if local_ip is None else local.name_of(local_ip)
        keys = [key for key in ("addresses-file", "dns-helofile") if self._config.text(key)]
        part: dict[str, Any] = {
            "local-ip": local_ip,
            "weight": 1 if local_ip is None else local.weight_of(local_ip),
            "ehlo": name or self._config.hostname,
            "ehlo-where": " or ".join(map(self._config.place, keys if name else ["hostname"])),
            "security": self._of_security(decision, site, local_ip),
            "limits": [*self._of_limits(site, local_ip)],
            "actions": [*self._of_actions(site, local_ip)],
            "flows": [],
        }
        seeing = self._seeing
        if local_ip is not None and not site.fits(local_ip):
            outcome = responses.no_fitting_address(site.name, local_ip)
            part["problem"] = outcome.description
        if seeing is not None:
            if local_ip is not None and seeing.dispatcher.history.is_aside(local_ip):
                part["problem"] = "could not be bound lately, so other addresses come first"
            flow = seeing.flow_of(site, local_ip, decision.demands)
            if flow is not None:
                part["flows"].append(seeing.describe(flow))
        part.update(self._of_pauses(site, local_ip))
        return part

    def _of_security(self, decision: Send, site: Site, local_ip: str | None) -> dict[str, Any]:
        """What connections must prove, the place that sets the level, and published policies."""
        bound = self._limits.secure(self._config, site, local_ip)
        level = Level(int(bound.value))
        policy, dane = site.policy, self._sites.policies.dane
        demands = LEVEL_DEMANDS[level] | decision.demands | policy.demands
        history = None if self._seeing is None else self._seeing.dispatcher.history
        clear = [] if history is None or demands.encrypts else [
            host.address for host in site.hosts if history.is_tls_broken(host.address)
        ]  # fmt: skip
        return {
            "level": level.name.lower(),
            "where": bound.where,
            "demands": str(demands),
            "mta-sts": None if policy.sts is None else f"{policy.sts}, mode {policy.sts.mode}",
            "dnssec": policy.secure,
            "dane": None
            if dane is None or not (site.mx or policy.secure)
            else dane.standing().text,
            "ignored": self._limits.shaping.ignores_policies(site.group),
            "in-clear": clear,
        }

    async def _of_tlsa(self, site: Site) -> dict[str, Any]:
        """The TLSA records of the hosts of a domain that DNSSEC proves."""
        if not site.policy.secure:
            return {}
        names = list(dict.fromkeys(host.name for host in site.hosts))[:MAX_HOSTS]
        found: dict[str, dict[str, Any]] = {
            name: {"host": name, "problem": "no answer yet"} for name in names
        }
        with trio.move_on_after(TLSA_SECONDS):
            for name in names:
                found[name] = await self._of_records(site, name)
        return {"tlsa": list(found.values())}

    async def _of_records(self, site: Site, host: str) -> dict[str, Any]:
        try:
            records = await self._sites.policies.tlsa(site.policy, host, site.port)
        except PolicyUnknown as error:
            return {"host": host, "problem": f"the host is not used: {error}"}
        if records is None:
            return {"host": host, "base": None, "records": []}
        texts = (f"{r.usage} {r.selector} {r.matching} {r.data.hex()}" for r in records.records)
        shown = sorted(text[:MAX_RECORD] for text in texts)[:MAX_RECORDS]
        return {"host": host, "base": records.base_domain, "records": shown}

    def _of_pauses(self, site: Site, local_ip: str | None) -> Iterator[tuple[str, Any]]:
        """The operator's pauses of mail from one local address, or of some hosts."""
        rows = self._rows
        if rows is None:
            return
        peer = peer_of(site, local_ip, self._limits.shaping)
        row = rows.flow_pause(site.apart, local_ip, peer)
        if row is not None:
            yield "paused", words_of_row(row)
        found = {host.address: rows.remote_pause(local_ip, host.address) for host in site.hosts}
        hosts = {address: words_of_row(row) for address, row in found.items() if row is not None}
        if hosts:
            yield "paused-hosts", hosts

    def _of_limits(self, site: Site, local_ip: str | None) -> Iterator[dict[str, Any]]:
        """All limits that must allow a message, and how far each is used."""
        limits = self._limits
        shaping, seen = limits.shaping, set[str]()
        if (lease := limits.lease_of(local_ip or "")) is not None:
            want, allowed = lease
            yield {
                **_of_bound(want.name, want.bound, want.scope),
                "value": "this instance" if allowed else "another instance",
                "allowed": allowed,
                "waiting": limits.state(want).waiting,
            }
        remote = dict.fromkeys(host.address for host in site.hosts)
        allowances = [limits.of_flow(site, local_ip)]
        allowances += [limits.of_remote(address, local_ip) for address in [*remote][:MAX_HOSTS]]
        for allowance in allowances:
            for want in (*allowance.sending.each, *allowance.opening.each, *allowance.idle.each):
                if want.taken.key not in seen:
                    seen.add(want.taken.key)
                    name = CLOSED if want.name == HOURS else want.name
                    yield {**_of_bound(name, want.bound, want.scope), **self._state(want)}
        provider = shaping.provider_of({host.name for host in site.hosts})
        ip = local_ip or ""
        scopes = {site.label: shaping.of_site(site.group, ip)}
        scopes[f"provider {provider}"] = shaping.of_provider(provider, ip)
        for scope, found in scopes.items():
            if (bound := found.get(HOURS)) is not None and (hours := bound.hours) is not None:
                yield {**_of_bound(HOURS, bound, scope), "value": f"{hours.text} {hours.zone}"}
        bounds = shaping.of_connection(site.group, provider, local_ip or "")
        for name, bound in bounds.items():
            if name != SECURE:
                yield _of_bound(name, bound, "each connection")

    def _of_actions(self, site: Site, local_ip: str | None) -> Iterator[dict[str, Any]]:
        """What patterns of `responses-file` have done after replies of the hosts."""
        refusals = self._limits.refusals
        if refusals is None or not refusals.actions:
            return
        keys = f"site {site.limit_key.hex()}", f"provider {self._limits.provider_of(site)}"
        for key in keys:
            action = refusals.actions.get(Scope(key, local_ip or ""))
            if action is not None:
                yield {
                    "scope": action.label,
                    "rule": action.rule,
                    "where": action.where,
                    "stage": str(action.recovery.stage),
                    "since": format_time(action.since),
                    "until": format_time(action.until) if action.until > self._now() else None,
                    "hits": action.hits,
                    "sample": action.sample,
                }

    def _state(self, want: Want) -> dict[str, Any]:
        """A limit as it is now; nothing without a daemon."""
        if self._seeing is None:
            return {}
        state = self._limits.state(want)
        used = {"used": state.used} if isinstance(want.taken, Count) else {}
        return {
            "allowed": state.allowed,
            **self._seeing.when(state.until),
            **used,
            "waiting": state.waiting,
        }


def _of_waits(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Why mail cannot leave from any address now, for more than its turn at a rate; else empty."""
    waits = []
    for part in sources:
        closed = (
            each
            for each in part["limits"]
            if each["limit"] in (CLOSED, PAUSED) and not each.get("allowed")
        )
        if "paused" in part:
            waits.append({"reason": part["paused"], "where": "mailerq pause"})
        elif any(each["limit"] == LEASE and not each["allowed"] for each in part["limits"]):
            reason = f"another instance may send from {part['local-ip']}"
            waits.append({"reason": reason, "where": "cluster-exchange"})
        elif (limit := next(closed, None)) is not None:
            reason = f"{limit['limit']} until {format_time(limit['value'])} for {limit['scope']}"
            waits.append({"reason": reason, "where": limit["where"]})
        else:
            return {}
    return {"decision": "wait", **waits[0]}


def _of_outcome(outcome: Outcome) -> dict[str, Any]:
    """The end of a message that is not tried, or waits for a fault to end."""
    said = (outcome.code, outcome.status, outcome.description)
    return {
        "decision": DECISIONS[outcome.fate],
        "reason": " ".join(str(part) for part in said if part),
    }


def words_of_row(row: Row) -> str:
    """An operator's row on one line."""
    scope = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in row.scope.items())
    until = "" if row.until is None else f" until {format_time(row.until)}"
    by = f" by {row.who}" if row.who else ""
    reason = f": {row.reason}" if row.reason else ""
    return f"{row.kind} {row.id} of {scope or 'all mail'}{until}{by}{reason}"


def _of_host(history: HostHistory | None, address: str) -> str:
    if history is None:
        return ""
    busy = history.is_left(address)
    doubtful = not busy and history.is_doubtful(address)
    facts: Iterable[str] = (
        "said that it is busy: tried last" if busy else "",
        "did not let us in lately: tried last" if doubtful else "",
        "answers out of step: one mail a connection" if history.was_out_of_step(address) else "",
    )
    return "; ".join(filter(None, facts))


def _of_bound(name: str, bound: Bound, scope: str) -> dict[str, Any]:
    return {"limit": name, "value": bound.value, "scope": scope, "where": bound.where}
