"""Find the MTA-STS policies of recipients' domains, keep them, and fetch them again in time.

Theory of operation
-------------------
A TXT record of the domain has an ``id``; a web server of the domain has the policy (RFC 8461). If
the ``id`` is that of the policy in `mailerq.store.sts_file`, that policy is in force. Otherwise it
is fetched. An attacker in control of the network can hide the record, change the ``id`` or block
the web server, but cannot have another policy accepted. So none of these ends a policy early:

* Without a record, or if the name servers do not answer, the policy that is kept is in force.
* If the fetch fails, or brings no policy, the policy that is kept is in force, also under another
  ``id``. The fetch is not tried again for that ``id`` within `FAILED_SECONDS`.
* If nothing is kept and the name servers do not answer, nobody can know: the mail waits.

An answer of the name servers is in memory for its TTL, so a domain costs its look-up once in that
time, and tasks that ask meanwhile share it. After a delivery that the policy has stopped, the
next attempt asks the name servers again (`StsPolicies.doubt`): a message never fails for good
without a look for another ``id`` (section 5).

One process of a daemon, see `mailerq.outbound.published`, fetches policies again before they
expire, without mail for them, spread over hours. Policies that nobody uses for half a year are
forgotten.

Everything here runs on the home worker; the file is read and written by a thread. While the file
cannot be used, policies are kept in memory for the TTL of the record.
"""

from __future__ import annotations

import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

import trio

from mailerq.config import Config
from mailerq.errors import StoreError
from mailerq.live import Live
from mailerq.net.https import Failure, Https, NoResponse, Response, Url
from mailerq.net.logs import Ration
from mailerq.net.resolver import NoHosts, Resolver
from mailerq.rules.security import PolicyUnknown, Reason, StsMode, StsPolicy
from mailerq.rules.sts import (
    PATH,
    VERSION,
    Document,
    Wrong,
    parse_policy,
    policy_host,
    record_id,
    record_name,
)
from mailerq.store.sts_file import Entry, Kept, StsFile

__all__ = ["FetchFailed", "StsPolicies"]

log = logging.getLogger("mailerq.delivery")

MAX_KNOWN: Final = 10_000
"""Domains in memory; the oldest is asked for again first."""

MAX_PATTERNS: Final = 200_000
"""Patterns of all policies in memory."""

MIN_TTL: Final = 60.0
MAX_TTL: Final = 3600.0
"""Bounds of the time for which an answer of the name servers is used, in seconds."""

FAILED_SECONDS: Final = 300.0
"""A fetch that failed is not repeated for the same ``id`` (section 3.3), and how long it is used
that the name servers do not answer while a policy is there."""

MIN_AGE_SECONDS: Final = 300.0
"""The least time that a policy is in force, whatever its ``max_age``: it bounds the fetches."""

REFRESH_SECONDS: Final = 86400.0
SPREAD_SECONDS: Final = 3 * 3600.0
"""A policy is fetched again each day without mail (section 3.3), at any time of the last hours."""

MIN_REFRESH_SECONDS: Final = 3600.0
"""Policies are not fetched more often without mail, and failed fetches not repeated."""

USED_SECONDS: Final = 86400.0
"""How exactly the file knows when mail has used a policy."""

MAX_FETCHES: Final = 20
"""Policies that are fetched at a time for mail; the others wait their turn."""

MAX_REFRESHES: Final = 4
REFRESHED_AT_ONCE: Final = 50
"""Policies that are fetched again at a time, and in one round."""

MAX_PROBLEM: Final = 200
"""Characters of a problem that are kept."""

T = TypeVar("T")


class FetchFailed(NamedTuple):
    """Why a policy could not be fetched, in the words of TLS-RPT; `ours`: a fault of this host."""

    reason: Reason
    text: str
    ours: bool = False


class _Unknown(NamedTuple):
    """Nobody can know now whether there is a policy."""

    text: str


Found = StsPolicy | _Unknown | None


class _Known(NamedTuple):
    since: float
    seconds: float
    """How long this is used without a look-up."""
    policy: StsPolicy | None
    """Of any mode."""
    expires: float = 0.0
    max_age: int = 0

    def holds(self, now: float) -> bool:
        # The clock may have been set back.
        return 0 <= now - self.since < self.seconds

    @property
    def weight(self) -> int:
        return 0 if self.policy is None else len(self.policy.mx_patterns)


@dataclass(slots=True)
class _Flight:
    """A look-up under way; `found` has the result, and stays empty if its task is cancelled."""

    landed: trio.Event = field(default_factory=trio.Event)
    found: list[Found] = field(default_factory=list)


Report = Callable[[str, StsPolicy | None, FetchFailed], object]
"""Is told of a domain whose policy could not be fetched, and the policy in force instead."""


class StsPolicies:
    """Finds policies, as `mailerq.outbound.policies.MtaSts` asks for; `run` refreshes them."""

    def __init__(
        self,
        live: Live,
        resolver: Resolver,
        https: Https,
        file: StsFile,
        *,
        report: Report = lambda domain, policy, failed: None,
        keeps: bool = True,
        clock: Callable[[], float] = time.time,
        lot: Callable[[], float] = random.random,
    ) -> None:
        """Without `keeps` the file is only read."""
        self._live = live
        self._resolver = resolver
        self._https = https
        self._file = file
        self._report = report
        self._keeps = keeps
        self._clock = clock
        self._lot = lot
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._flights: dict[str, _Flight] = {}
        self._weight = 0
        self._generation = 0  # of what is known: a look-up under way does not outlive it
        self._turn = trio.CapacityLimiter(1)
        self._fetches = trio.CapacityLimiter(MAX_FETCHES)
        self._say_ours = Ration(log.error, 1, "policies could not be fetched %d times more")
        self._say_unkept = Ration(log.error, 1, "policies could not be kept %d times more")

    @property
    def _config(self) -> Config:
        return self._live.current.config

    # For deliveries

    async def find(self, domain: str) -> StsPolicy | None:
        """The policy in force for a domain in lower case and A-labels; None: none, or ``none``.

        Raises `PolicyUnknown` if nobody can know now.
        """
        if not self._config.mta_sts or domain.startswith("["):
            return None
        while True:
            known = self._known.get(domain)
            if known is not None and known.holds(self._clock()):
                return _in_force(known.policy)
            flight = self._flights.get(domain)
            if flight is None:
                break
            await flight.landed.wait()
            if flight.found:
                return _raised(flight.found[0])
        flight = self._flights[domain] = _Flight()
        try:
            found = await self._look_up(domain)
            flight.found.append(found)
        finally:
            if self._flights.get(domain) is flight:
                del self._flights[domain]
            flight.landed.set()
        return _raised(found)

    def doubt(self, domain: str) -> None:
        """The policy has stopped a delivery: ask the name servers again at the next attempt."""
        known = self._known.get(domain)
        if known is not None:
            self._known[domain] = known._replace(seconds=0.0)

    def forget(self, domain: str | None = None) -> None:
        """Ask the file again about a domain, or about all: another process has changed it."""
        self._generation += 1
        for name in [domain] if domain is not None else list(self._known):
            if (known := self._known.pop(name, None)) is not None:
                self._weight -= known.weight
        if domain is None:
            self._flights.clear()
        else:
            self._flights.pop(domain, None)

    def lines(self, policy: StsPolicy) -> list[str]:
        """A policy as lines, for reports; without ``max_age`` if that is not known any more."""
        known = self._known.get(policy.domain)
        lines = [f"version: {VERSION}", f"mode: {policy.mode}"]
        lines += [f"mx: {pattern}" for pattern in policy.mx_patterns]
        if known is not None and known.policy == policy:
            lines.append(f"max_age: {known.max_age}")
        return lines

    async def _look_up(self, domain: str) -> Found:
        generation = self._generation
        try:
            kept = await self._kept(domain)
        except StoreError as error:
            if self._keeps:
                self._say_unkept("policies of MTA-STS are not kept: %s", error)
            kept = None
            policy, expires = self._remembered(domain)
        else:
            policy, expires = _in_force_by(kept, self._clock())
        answer = await self._resolver.texts(record_name(domain))
        now = self._clock()
        seconds = FAILED_SECONDS
        if isinstance(answer, NoHosts):
            if policy is None:
                return _Unknown(f"the MTA-STS policy of {domain}: {answer.description}")
        else:
            seconds = min(max(answer[1], MIN_TTL), MAX_TTL)
            number = record_id(answer[0])
            if number is not None and (policy is None or policy.id != number):
                again = 0.0 if kept is None else _may_fetch(kept.entry, number, now)
                if again <= now:
                    renewed, failed = await self._renew(domain, number, kept)
                    now = self._clock()
                    if failed is None:
                        kept = renewed
                        policy, expires = _in_force_by(kept, now)
                    again = now if failed is None else now + FAILED_SECONDS
                seconds = min(seconds, max(again - now, MIN_TTL))
        if policy is not None:
            seconds = min(seconds, max(expires - now, 0.0))
            if kept is not None and now - kept.entry.used > USED_SECONDS:
                await self._do(partial(self._file.use, domain))
        if generation == self._generation:
            document = None if kept is None else kept.document
            max_age = 0 if document is None else document.max_age
            self._remember(domain, _Known(now, seconds, policy, expires, max_age))
        return _in_force(policy)

    def _remembered(self, domain: str) -> tuple[StsPolicy | None, float]:
        """The policy in force by what is in memory, and when it expires."""
        known = self._known.get(domain)
        if known is None or self._clock() >= known.expires:
            return None, 0.0
        return known.policy, known.expires

    def _remember(self, domain: str, known: _Known) -> None:
        before = self._known.pop(domain, None)
        self._weight += known.weight - (before.weight if before else 0)
        self._known[domain] = known
        while len(self._known) > MAX_KNOWN or self._weight > MAX_PATTERNS:
            self._weight -= self._known.popitem(last=False)[1].weight

    # For operators

    async def refresh(self, domain: str) -> tuple[Kept | None, str]:
        """Ask the name servers and the web server now; what is kept then, and what went wrong.

        Without a record of the right form nothing is fetched, and what is kept stays. Raises
        `StoreError`.
        """
        kept = await self._kept(domain)
        answer = await self._resolver.texts(record_name(domain))
        if isinstance(answer, NoHosts):
            return kept, answer.description
        number = record_id(answer[0])
        if number is None:
            return kept, f"{record_name(domain)} has no record of MTA-STS, or none that is valid"
        kept, failed = await self._renew(domain, number, kept)
        return kept, "" if failed is None else f"{failed.reason}: {failed.text}"

    async def describe(self, domain: str) -> dict[str, Any] | None:
        """What is kept of a domain, for programs; None: nothing, or the file cannot be read."""
        try:
            kept = await self._kept(domain)
        except StoreError as error:
            self._say_unkept("policies of MTA-STS are not kept: %s", error)
            return None
        return None if kept is None else kept.describe(self._clock())

    # Fetching

    async def _renew(
        self, domain: str, number: str, kept: Kept | None
    ) -> tuple[Kept | None, FetchFailed | None]:
        """Fetch the policy of a domain, and keep it, or that it failed."""
        fetched = await self._fetch(domain)
        now = self._clock()
        if isinstance(fetched, FetchFailed):
            problem = f"{fetched.reason}: {fetched.text}"[:MAX_PROBLEM]
            again = now + MIN_REFRESH_SECONDS * (1 + self._lot())
            await self._do(partial(self._file.failed, domain, number, problem, again))
            if fetched.ours:
                self._say_ours("policies of MTA-STS cannot be fetched: %s", fetched.text)
            else:
                self._report(domain, _in_force_by(kept, now)[0], fetched)
            return kept, fetched
        document, text = fetched
        entry = Entry(
            domain=domain,
            id=number,
            text=text,
            fetched=now,
            expires=now + max(document.max_age, MIN_AGE_SECONDS),
            used=now if kept is None else kept.entry.used,
            next=now + self._refresh_after(document.max_age),
        )
        await self._do(partial(self._file.keep, entry))
        return Kept(entry, document), None

    def _refresh_after(self, max_age: float) -> float:
        """Seconds from a fetch until the next one without mail: a day, but before it expires."""
        daily = REFRESH_SECONDS - SPREAD_SECONDS * self._lot()
        early = max_age * (0.4 + 0.2 * self._lot())
        return max(min(daily, early), MIN_REFRESH_SECONDS)

    async def _fetch(self, domain: str) -> tuple[Document, bytes] | FetchFailed:
        """The policy as the web server has it (section 3.3)."""
        config = self._config
        url = Url(policy_host(domain), config.mta_sts_port, PATH)
        async with self._fetches:
            response = await self._https.request(
                url, headers={"Accept": "text/plain"}, ca_file=config.connection_ca_file
            )
            # A large policy takes longer than a turn of the loop may.
            return await trio.to_thread.run_sync(_read, response)

    # Without mail

    async def round(self) -> None:
        """Fetch again the policies whose time has come; never raises but for cancellation."""
        if not self._config.mta_sts:
            return
        due = await self._do(partial(self._file.due, REFRESHED_AT_ONCE)) or []
        places = trio.CapacityLimiter(MAX_REFRESHES)
        async with trio.open_nursery() as nursery:
            for entry in due:
                nursery.start_soon(self._refresh, entry, places)
        await self._do(self._file.forget)

    async def _refresh(self, entry: Entry, places: trio.CapacityLimiter) -> None:
        async with places:
            kept = await trio.to_thread.run_sync(Kept.of, entry)
            answer = await self._resolver.texts(record_name(entry.domain))
            number = None if isinstance(answer, NoHosts) else record_id(answer[0])
            if number is not None:
                await self._renew(entry.domain, number, kept)
                self.doubt(entry.domain)
                return
            # No record, or no answer: the policy stays until it expires.
            again = self._clock() + MIN_REFRESH_SECONDS * (1 + self._lot())
            await self._do(partial(self._file.postpone, entry.domain, again))

    # The file

    async def _kept(self, domain: str) -> Kept | None:
        """What the file knows of a domain. Raises `StoreError`."""

        def read() -> Kept | None:
            entry = self._file.get(domain)
            return None if entry is None else Kept.of(entry)

        return await trio.to_thread.run_sync(read, limiter=self._turn)

    async def _do(self, function: Callable[[], T]) -> T | None:
        """Use the file in a thread; None if it cannot be used, or is only read."""
        if not self._keeps:
            return None
        try:
            return await trio.to_thread.run_sync(function, limiter=self._turn)
        except StoreError as error:
            self._say_unkept("policies of MTA-STS are not kept: %s", error)
            return None


def _raised(found: Found) -> StsPolicy | None:
    if isinstance(found, _Unknown):
        raise PolicyUnknown(found.text)
    return found


def _in_force(policy: StsPolicy | None) -> StsPolicy | None:
    """A policy unless its mode is ``none``."""
    return None if policy is None or policy.mode is StsMode.NONE else policy


def _in_force_by(kept: Kept | None, now: float) -> tuple[StsPolicy | None, float]:
    """The policy in force by what the file knows, of any mode, and when it expires."""
    return (None, 0.0) if kept is None else (kept.policy(now), kept.entry.expires)


def _may_fetch(entry: Entry, number: str, now: float) -> float:
    """From when on the policy with this ``id`` may be fetched."""
    if entry.failed_id != number or now < entry.failed:
        return now
    return entry.failed + FAILED_SECONDS


def _read(response: Response | NoResponse) -> tuple[Document, bytes] | FetchFailed:
    if isinstance(response, NoResponse):
        certificate = response.failure is Failure.CERTIFICATE
        reason = Reason.STS_WEBPKI if certificate else Reason.STS_FETCH
        ours = response.failure is Failure.LOCAL
        return FetchFailed(reason, f"{response.failure}: {response.text}", ours)
    if response.status != 200:
        return FetchFailed(Reason.STS_FETCH, f"the web server answers {response.status}")
    if response.media_type not in ("", "text/plain"):
        return FetchFailed(Reason.STS_FETCH, f"the policy is {response.media_type!r}, no text")
    document = parse_policy(response.body)
    if isinstance(document, Wrong):
        return FetchFailed(Reason.STS_INVALID, str(document))
    return document, response.body
