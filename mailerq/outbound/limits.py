"""Limits of deliveries: what a flow may do now, and whom a limit lets go next.

Theory of operation
-------------------
`rules.shaping` says which limits hold, `cells` counts them. A flow takes the right to send a
message, or to open a connection, from all scopes at once: its site and the site's provider. A
session takes what its remote address allows.

A flow that is refused waits in the line of the limit that refused, under one timer for the line.
When the limit allows more, the first in line has its turn, and the next one if the limit still
allows. So a timer or a freed connection wakes as many flows as can go. While flows wait for a
connection of others, such connections end instead of becoming idle, and after some messages.

A process may hold more than its part of a number of connections while the others do not need them.
Such connections are *borrowed*: they are not kept idle, end after `BORROW_SECONDS`, and are not
borrowed again for `REST_SECONDS`. A process that waits asks every `POLL_SECONDS`, so it gets its
part.

Outside the hours of its mail a flow is *closed*: it waits in a line that has no timer. `run` has
one time for all hours, at which some begin or end. Then flows ask again whose hours have begun.

Everything here runs on the home worker.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import trio

from mailerq.message import format_time
from mailerq.outbound.calendar import Calendar
from mailerq.outbound.cells import Busy, Cells, Count, MemoryCells, Rate
from mailerq.outbound.timers import Times
from mailerq.outbound.warmup import Days
from mailerq.rules.leases import Lease
from mailerq.rules.rates import MINUTE, SLACK, cost, cost_of_day
from mailerq.rules.security import LEVELS
from mailerq.rules.shaping import CONNECTION, HOURS, IGNORE, Bound, Bounds, Shaping

if TYPE_CHECKING:
    from mailerq.config import Config
    from mailerq.outbound.refusals import Refusals
    from mailerq.outbound.sites import Site

__all__ = ["NOTHING", "Allowance", "Limits", "Refusal", "State", "Waiter", "Want", "Wants", "both"]

POLL_SECONDS: Final = 0.2
"""How often a line asks whether another process has ended a connection."""

BORROW_SECONDS: Final = 5.0
"""After this time a borrowed connection ends with its message."""

TURN_SECONDS: Final = 0.1
"""How long the first in line may take to use its turn; less if a rate allows more by then."""

COUNT_TURN_SECONDS: Final = 0.02
"""How long a turn may take if the limit counts connections, of which several may be free."""

REST_SECONDS: Final = 0.5
"""How long after the end of a borrowed connection this process borrows no other."""

MAX_RESTS: Final = 1000
"""Rests at which those that are over are dropped."""

MAX_USUAL: Final = 1000
"""Results kept of `_usual_of`."""

DAY: Final = 1440 * MINUTE
"""No interval of a rate is longer."""

NO_LEASES: Final[Mapping[str, Lease]] = {}

MAX_NAMED: Final = 20
"""Lines in the statistics."""

MESSAGES: Final = "messages-per-minute"
DAILY: Final = "messages-per-day"
BYTES: Final = "bytes-per-minute"
CONNECTS: Final = "connects-per-minute"
CONNECTIONS: Final = "max-connections"
STARTING: Final = "max-starting"
IDLE: Final = "max-idle"
PAUSED: Final = "paused"
"""The pause of a scope, see `refusals`."""

LEASE: Final = "lease"
"""The right of this instance to send from an address, see `mailerq.rules.leases`."""

NANOSECONDS: Final = 1_000_000_000


class Waiter(Protocol):
    """A flow or a session that waits in a line."""

    def limit_over(self, key: str) -> None:
        """The turn of this waiter has come: try again, and wait again if refused."""


class Holder(Protocol):
    """An idle connection."""

    counts: tuple[str, ...]

    def leave(self) -> None:
        """End."""


class Want(NamedTuple):
    """What one limit may refuse: `name` and `bound` say which, `scope` whose."""

    taken: Rate | Count
    name: str
    bound: Bound
    scope: str

    def __str__(self) -> str:
        if self.name == HOURS:
            until = format_time(self.bound.value)
            return f"closed until {until} by hours of {self.scope} ({self.bound.where})"
        if self.name == LEASE:
            return f"another instance may send {self.scope}"
        if self.name == PAUSED:
            until = format_time(self.bound.value)
            return f"pause until {until} of {self.scope} ({self.bound.where})"
        return f"{self.name} = {self.bound.value} of {self.scope} ({self.bound.where})"


class Wants(NamedTuple):
    """What is taken together or not at all."""

    each: tuple[Want, ...]
    taken: tuple[Rate | Count, ...]
    counts: tuple[str, ...]
    """The keys of what has to be given back."""
    starting: tuple[str, ...]
    """Those of `counts` that are given back once the connection is open."""
    sized: bool
    """Whether a size counts."""
    closed: Want | None = None
    """The hours that allow nothing now."""
    lease: Lease | None = None
    """What this instance needs where the address belongs to a cluster."""


NOTHING: Final = Wants((), (), (), (), sized=False)


class Refusal(NamedTuple):
    """The limit that refuses, and until when on `monotonic`."""

    want: Want
    until: float


class State(NamedTuple):
    """A limit as it is now."""

    allowed: bool
    until: float
    """When a rate allows the next, on `monotonic`; infinity if now, or when something ends."""
    used: int
    """Of a number of connections: how many all processes have."""
    waiting: int
    """Flows and sessions of this process that wait for the limit."""


def both(one: Wants, other: Wants) -> Wants:
    """The wants of two scopes together."""
    if one is NOTHING or other is NOTHING:
        return other if one is NOTHING else one
    return Wants(
        one.each + other.each,
        one.taken + other.taken,
        one.counts + other.counts,
        one.starting + other.starting,
        one.sized or other.sized,
        one.closed or other.closed,
        one.lease or other.lease,
    )


class Allowance:
    """What holds for one flow, or for one remote address; `number` is that of the limits then."""

    __slots__ = (
        "connection_bytes", "connection_idle", "connection_messages", "idle", "most", "number",
        "opening", "sending", "warming",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        wants: Sequence[Want],
        connection: Bounds,
        lease: Lease | None = None,
    ) -> None:
        self.number = number
        self.sending = _wants(wants, MESSAGES, DAILY, BYTES, PAUSED, HOURS, lease=lease)
        self.warming = any(want.name == DAILY for want in self.sending.each)
        """The limit of a day of `Days` is among them."""
        self.opening = _wants(wants, CONNECTS, CONNECTIONS, STARTING, lease=lease)
        self.idle = _wants(wants, IDLE)
        found = (want.taken for want in self.opening.each if want.name == CONNECTIONS)
        self.most = min((each.limit for each in found if isinstance(each, Count)), default=0)
        """The least limit of connections; 0: none."""
        # Of one connection; 0 is no limit, except for the idle time in seconds.
        self.connection_messages, self.connection_bytes, self.connection_idle = (
            bound.value if (bound := connection.get(name)) is not None else 0 for name in CONNECTION
        )

    def with_most(self, want: Want, count: Count) -> Allowance:
        """These limits, and that of a site on its own connections; `self` has no wants."""
        made = Allowance.__new__(Allowance)
        made.number, made.warming = self.number, self.warming
        made.sending, made.idle, made.most = self.sending, self.idle, count.limit
        made.opening = Wants(
            (want,), (count,), (count.key,), (), sized=False, lease=self.opening.lease
        )
        made.connection_messages = self.connection_messages
        made.connection_bytes = self.connection_bytes
        made.connection_idle = self.connection_idle
        return made


class _Line:
    """The waiters of one limit, in the order of their turns."""

    __slots__ = ("on_turn", "until", "waiters", "want", "when")

    def __init__(self, want: Want) -> None:
        self.when = math.inf
        """When to serve the line; kept by `Times`."""
        self.want = want
        self.waiters: OrderedDict[Waiter, None] = OrderedDict()
        self.until = 0.0
        self.on_turn: Waiter | None = None
        """The waiter that had the last turn, and may not have used it yet."""


class Limits:
    """The limits of an engine, for all its deliveries; `run` gives waiters their turns."""

    def __init__(
        self,
        shaping: Shaping,
        cells: Cells | None = None,
        processes: int = 1,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.shaping = shaping
        self.refusals: Refusals | None = None
        """The reactions to replies of peers, if there are patterns for such replies."""
        self.days = Days()
        self.leases: Mapping[str, Lease] = NO_LEASES
        """Of the addresses that belong to a cluster."""
        self._calendar = Calendar(clock)
        self._calendar.set(shaping.hours)
        self.number = 0
        """Grows with each change of the limits."""
        self._unlimited = Allowance(self.number, (), {})
        self._usual: dict[tuple[str, str, str], tuple[Allowance, Bound | None]] = {}
        self._usual_number = self.number
        self._cells = MemoryCells() if cells is None else cells
        self._turns = MemoryCells(self._cells.now)
        """When the next connection for messages with a limit may be opened."""
        self._granted = False
        self._processes = processes
        self._poll = POLL_SECONDS if processes > 1 else math.inf
        self._idle: OrderedDict[Holder, None] = OrderedDict()
        self._rests: dict[str, float] = {}
        self._lines: dict[str, _Line] = {}
        self._times: Times[_Line] = Times()
        self._next = math.inf
        self._earlier = trio.Event()

    # What holds

    def change(self, shaping: Shaping) -> bool:
        """Put other limits in force; all waiters ask again.

        Returns whether waiting mail may have another flow now: other domains have a site of their
        own, or other addresses are there to send from.
        """
        before = self.shaping
        regrouped = shaping.groups != before.groups or shaping.local_ips != before.local_ips
        self.shaping = shaping
        self.number += 1
        self._calendar.set(shaping.hours)
        self._calendar.advance()
        self._ask_again(list(self._lines.items()))
        self._earlier.set()
        return regrouped

    def ask_again(self, key: str, local_ip: str) -> None:
        """The limits of one scope have changed; its waiters ask again."""
        self.number += 1
        end = f" {key} {local_ip}"
        self._ask_again([each for each in self._lines.items() if each[0].endswith(end)])
        self._earlier.set()

    def _ask_again(self, lines: Sequence[tuple[str, _Line]]) -> None:
        for key, line in lines:
            if self._lines.get(key) is not line:
                continue  # all its waiters have left
            self._end(line)
            for waiter in line.waiters:
                waiter.limit_over(key)

    def pause(self, until: float, key: str, local_ip: str, seconds: float) -> None:
        """Refuse the messages of a scope for some seconds; `until` tells the pause from others."""
        nanoseconds = int(seconds * NANOSECONDS) + SLACK
        self._cells.take([Rate(_pause_key(until, key, local_ip), nanoseconds)])

    def provider_of(self, site: Site) -> str:
        """The provider of a site, or an empty string."""
        return self.shaping.provider_of({host.name for host in site.hosts})

    def bounds_of(self, site: Site, local_ip: str | None, key: str) -> Bounds:
        """What the settings allow the site, or the provider, of this key."""
        ip = local_ip or ""
        if key.startswith("site "):
            return self.shaping.of_site(site.group, ip)
        return self.shaping.of_provider(key.removeprefix("provider "), ip)

    def of_flow(self, site: Site, local_ip: str | None) -> Allowance:
        """What holds for the mail of a site from a local address."""
        ip, shaping = local_ip or "", self.shaping
        provider = self.provider_of(site)
        kind = site.group, provider, ip
        if self.refusals is None and (usual := self._usual_of(kind)) is not None:
            allowance, most = usual
            return allowance if most is None else self._with_most(allowance, most, site, ip)
        of_site, of_provider = shaping.of_site(site.group, ip), shaping.of_provider(provider, ip)
        key, provider_key = f"site {site.limit_key.hex()}", f"provider {provider}"
        connection = shaping.of_connection(site.group, provider, ip)
        if self.refusals is not None:
            connection = self.refusals.of_connection(connection, site)
            of_site = self.refusals.adjusted(of_site, key, ip)
            of_provider = self.refusals.adjusted(of_provider, provider_key, ip)
        wants = [
            *self._closed(of_site, site.label, key, of_provider, provider_key, ip),
            *_all(of_site, site.label, key, ip),
            *_all(of_provider, provider_key, provider_key, ip),
            *self._warmups(provider, ip),
        ]
        lease = self.leases.get(ip)
        if all(want.name == CONNECTIONS for want in wants) and not of_provider:
            most = of_site.get(CONNECTIONS)
            if self.refusals is None:
                self._usual[kind] = Allowance(self.number, (), connection, lease), most
        return Allowance(self.number, wants, connection, lease)

    def _usual_of(self, kind: tuple[str, str, str]) -> tuple[Allowance, Bound | None] | None:
        """The limits of all sites of a group, provider and address, and most connections to each.

        Most sites have no other limit, and there are many sites.
        """
        if self._usual_number != self.number or len(self._usual) > MAX_USUAL:
            self._usual.clear()
            self._usual_number = self.number
        return self._usual.get(kind)

    def _with_most(self, allowance: Allowance, most: Bound, site: Site, ip: str) -> Allowance:
        count = Count(f"{CONNECTIONS} site {site.limit_key.hex()} {ip}", int(most.value))
        scope = f"{site.label} from {ip}" if ip else site.label
        return allowance.with_most(Want(count, CONNECTIONS, most, scope), count)

    def may_use(self, ip: str) -> bool:
        """Whether this instance may send from an address."""
        lease = self.leases.get(ip)
        return lease is None or lease.is_valid(self._cells.now())

    def lease_of(self, ip: str) -> tuple[Want, bool] | None:
        """The lease that an address needs, and whether it is there; None if it needs none."""
        lease = self.leases.get(ip)
        return None if lease is None else (_want_of(lease), lease.is_valid(self._cells.now()))

    def leases_changed(self) -> None:
        """Leases have begun, or other addresses have one; waiters ask again."""
        self.number += 1
        self._ask_again([each for each in self._lines.items() if each[1].want.name == LEASE])
        self._earlier.set()

    def secure(self, config: Config, site: Site, local_ip: str | None) -> Bound:
        """The `Level` of TLS that the operator wants for a site, and the place that says so."""
        if site.chosen_by == "smarthost" and config.smarthost_secure is not None:
            return Bound(LEVELS[config.smarthost_secure], config.place("smarthost-secure"))
        return self.shaping.secure(site.group, self.provider_of(site), local_ip or "")

    def _closed(
        self, site: Bounds, label: str, key: str, provider: Bounds, provider_key: str, ip: str
    ) -> Iterator[Want]:
        """The hours that allow nothing now, of the site or of its provider."""
        if not self._calendar.every:
            return
        held = [
            (bounds[HOURS], hours, scope)
            for bounds, scope in ((site, label), (provider, provider_key))
            if HOURS in bounds and (hours := bounds[HOURS].hours) is not None
        ]
        if not (until := self._calendar.opening(tuple(hours for _, hours, _ in held))):
            return
        # Those that begin then. There are none if the hours of the two never meet.
        begin = (each for each in held if not each[1].is_open(until - 1))
        bound, _, scope = next(begin, held[0])
        taken = Rate(f"{HOURS} {key} {ip}", 0)
        scope = f"{scope} from {ip}" if ip else scope
        yield Want(taken, HOURS, Bound(until, bound.where), scope)

    def _warmups(self, provider: str, ip: str) -> Iterator[Want]:
        """What limits the first days of an address."""
        for warmup in self.shaping.local_ips.warmups_of(ip, provider):
            scope = f"{warmup.provider} from {ip}" if warmup.provider else f"all mail from {ip}"
            day = self.days.of(scope)
            if limit := warmup.limit(day):
                bound = Bound(limit, f"{warmup.where}, day {day}")
                taken = Rate(f"{DAILY} {limit} {scope}", cost_of_day(limit))
                yield Want(taken, DAILY, bound, scope)

    def sent(self, sending: Wants) -> None:
        """Note a message of an address that has limits for its first days."""
        for want in sending.each:
            if want.name == DAILY and self.days.sent(want.scope):
                self.number += 1  # the limit is another one today

    def of_remote(self, address: str, local_ip: str | None) -> Allowance:
        """What holds for all connections to an address from a local address."""
        ip = local_ip or ""
        bounds = self.shaping.of_remote(address, ip)
        if bounds:
            wants = list(_all(bounds, address, f"ip {address}", ip))
            return Allowance(self.number, wants, {}, self.leases.get(ip))
        # Most connections are to addresses without a limit.
        if self._unlimited.number != self.number:
            self._unlimited = Allowance(self.number, (), {})
        return self._unlimited

    # Taking

    def take(self, wants: Wants, size: int = 0) -> Refusal | None:
        """Take all wants, or none. `size` is the bytes of the message."""
        if not wants.taken:
            return None if wants.lease is None else self._take(self._cells, wants)
        if wants.sized:
            taken = tuple(
                Rate(want.taken.key, cost(size, int(want.bound.value)))
                if want.name == BYTES
                else want.taken
                for want in wants.each
            )
            wants = wants._replace(taken=taken)
        return self._take(self._cells, wants)

    def may_open(self, sending: Wants) -> Refusal | None:
        """Whether a connection for messages that need `sending` is of use now; takes nothing.

        The messages of many flows may have one limit. If all flows opened connections while the
        limit allows one message, most would wait with an open connection.
        """
        if not sending.taken:
            return None if sending.lease is None else self._take(self._cells, sending)
        asked = sending._replace(taken=tuple(Rate(taken.key, 0) for taken in sending.taken))
        return self._take(self._cells, asked) or self._take(self._turns, asked)

    def open(self, opening: Wants, sending: Wants, waiter: Waiter) -> Refusal | None:
        """Take what a connection needs that is for messages that need `sending`.

        Flows that wait for a connection already come first.
        """
        for want in opening.each:
            line = self._lines.get(want.taken.key)
            if line is not None and isinstance(want.taken, Count) and line.on_turn is not waiter:
                return Refusal(want, line.until or math.inf)
            if (until := self._rests_until(want)) is not None:
                return Refusal(want, until)
        refusal = self.take(opening)
        if refusal is None and sending.taken:
            self._turns.take(sending.taken)
        return refusal

    def _part(self, want: Want) -> float:
        """This process's part of a count."""
        if self._processes == 1 or want.name != CONNECTIONS:
            return math.inf
        return int(want.bound.value) // self._processes

    def _rests_until(self, want: Want) -> float | None:
        until = self._rests.get(want.taken.key)
        if until is None:
            return None
        if until <= monotonic():
            del self._rests[want.taken.key]
        elif self._cells.held(want.taken.key) >= self._part(want):
            return until
        return None

    def is_borrowed(self, opening: Wants) -> bool:
        """Whether a connection that was just opened is beyond this process's part of a limit."""
        return any(self._cells.held(want.taken.key) > self._part(want) for want in opening.each)

    def exceeded(self, opening: Wants) -> bool:
        """Whether this process holds more than a limit, which has been lowered."""
        return any(
            isinstance(want.taken, Count) and self._cells.held(want.taken.key) > want.taken.limit
            for want in opening.each
        )

    def contended(self, counts: Sequence[str]) -> bool:
        """Whether others of this process wait for what a connection holds."""
        return bool(self._lines) and any(key in self._lines for key in counts)

    def _take(self, cells: Cells, wants: Wants) -> Refusal | None:
        if wants.closed is not None:
            return Refusal(wants.closed, math.inf)
        if wants.lease is not None:
            refusal = self._lacks(wants, wants.lease)
            if refusal is not None or not wants.taken:
                return refusal
        busy = cells.take(wants.taken)
        if busy is None:
            self._granted = self._granted or any(
                isinstance(taken, Count) or taken.cost for taken in wants.taken
            )
            return None
        return Refusal(wants.each[busy.number], self._when(busy))

    def _lacks(self, wants: Wants, lease: Lease) -> Refusal | None:
        """Why the lease of an address does not allow this now.

        After a change of the owner each rate waits for one of its intervals: the last owner may
        have used it at the end of its own lease.
        """
        now = self._cells.now()
        if not lease.is_valid(now):
            begins = lease.since if now < lease.since else 0
            until = self._when(Busy(0, begins)) if begins else math.inf
            return Refusal(_want_of(lease), until)
        if now < lease.begin() + DAY:
            for want in wants.each:
                first = lease.begin() + _interval(want)
                if now < first:
                    return Refusal(want, self._when(Busy(0, first)))
        return None

    def _when(self, busy: Busy) -> float:
        """When to ask again, on `monotonic`."""
        if busy.until is None:
            return monotonic() + self._poll
        return monotonic() + max((busy.until - self._cells.now()) / NANOSECONDS, 0.0)

    def release(self, keys: Sequence[str], *, borrowed: bool = False) -> None:
        """Give back counts."""
        if keys:
            self._cells.release(keys)
            if not self._cells.catch_up():
                self._earlier.set()  # `run` tries again
            for key in keys:
                if borrowed:
                    self._rest(key)
                if key in self._lines:
                    self._set(self._lines[key], 0.0)

    def _rest(self, key: str) -> None:
        now = monotonic()
        self._rests[key] = now + REST_SECONDS
        if len(self._rests) > MAX_RESTS:
            self._rests = {key: until for key, until in self._rests.items() if until > now}

    def idle(self, holder: Holder) -> None:
        """An idle connection may be ended for waiters that need what it holds."""
        if holder.counts:
            self._idle[holder] = None

    def busy(self, holder: Holder) -> None:
        """A connection is no longer idle."""
        self._idle.pop(holder, None)

    # Waiting

    def wait(self, waiter: Waiter, refusal: Refusal) -> str:
        """Wait for the limit that refused; returns its key."""
        key = refusal.want.taken.key
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(refusal.want)
        line.waiters[waiter] = None
        if isinstance(refusal.want.taken, Count):
            for holder in self._idle:
                if key in holder.counts:
                    holder.leave()
                    break
        line.until = min(line.until or math.inf, refusal.until)
        # What was refused may have been given back before the waiter came here.
        freed = isinstance(line.want.taken, Count) and self._cells.held(key) < line.want.taken.limit
        self._set(line, 0.0 if freed and line.until == math.inf else line.until)
        return key

    def leave(self, waiter: Waiter, key: str) -> None:
        """Wait no longer."""
        line = self._lines.get(key)
        if line is not None:
            line.waiters.pop(waiter, None)
            if not line.waiters:
                self._end(line)

    def _end(self, line: _Line) -> None:
        del self._lines[line.want.taken.key]
        self._times.discard(line)

    def _set(self, line: _Line, when: float) -> None:
        """Serve a line at `when`, unless it has an earlier time: something was given back."""
        self._times.set_earlier(line, when)
        if when < self._next:
            self._earlier.set()

    async def run(self) -> None:
        """Give turns, until cancelled."""
        while True:
            self._earlier = trio.Event()
            if self._calendar.advance():
                self._begin_hours()
            for line in self._times.pop_until(monotonic()):
                self._serve(line)
            self._next = min(self._times.first, monotonic() + self._calendar.seconds)
            if self.refusals is not None and self.refusals.actions:
                self._next = min(self._next, monotonic() + self.refusals.advance())
            if not self._cells.catch_up():
                self._next = min(self._next, monotonic() + POLL_SECONDS)
            with trio.move_on_after(max(self._next - monotonic(), 0.0)):
                await self._earlier.wait()

    def look(self) -> None:
        """Check all times now: the clock may have been set."""
        self._earlier.set()

    def _begin_hours(self) -> None:
        """Some hours have begun or ended: let flows ask again that need not wait any more."""
        self.number += 1
        closed = [each for each in self._lines.items() if each[1].want.name == HOURS]
        now = self._calendar.now()
        self._ask_again([each for each in closed if each[1].want.bound.value <= now])

    def _serve(self, line: _Line) -> None:
        """Give turns to the waiters of a limit, while the limit allows more."""
        line.until = 0.0
        line.on_turn = None
        while line.waiters and not line.until:
            busy = self._probe(line.want.taken)
            if busy is not None:
                line.until = self._when(busy)
            elif not self._give_turn(line):
                # Mail has to be read, a session has to wake or to be opened first.
                line.until = monotonic() + self._turn_seconds(line.want.taken)
        if line.waiters:
            self._set(line, line.until)
        elif self._lines.get(line.want.taken.key) is line:
            self._end(line)

    def _probe(self, taken: Rate | Count) -> Busy | None:
        """Whether a limit allows more."""
        if isinstance(taken, Rate):
            return self._cells.take([Rate(taken.key, 0)])
        busy = self._cells.take([taken])
        if busy is None:
            self._cells.release([taken.key])
        return busy

    @staticmethod
    def _turn_seconds(taken: Rate | Count) -> float:
        if isinstance(taken, Count) or not taken.cost:
            return COUNT_TURN_SECONDS
        return min(taken.cost / NANOSECONDS, TURN_SECONDS)

    def _give_turn(self, line: _Line) -> bool:
        """Have the first in line try, and return whether that took something.

        A waiter that is refused at once stays the first.
        """
        waiter, _ = line.waiters.popitem(last=False)
        self._granted = False
        line.on_turn = waiter
        waiter.limit_over(line.want.taken.key)
        if not self._granted and waiter in line.waiters:
            line.waiters.move_to_end(waiter, last=False)
        return self._granted

    # Seeing

    def state(self, want: Want) -> State:
        """How far a limit is used now; takes nothing."""
        line, taken = self._lines.get(want.taken.key), want.taken
        waiting = 0 if line is None else len(line.waiters)
        if want.name == HOURS:
            return State(allowed=False, until=self._opening(want), used=0, waiting=waiting)
        if isinstance(taken, Count):
            used = self._cells.used(taken.key)
            return State(used < taken.limit, math.inf, used, waiting)
        busy = self._probe(taken)
        return State(busy is None, math.inf if busy is None else self._when(busy), 0, waiting)

    def awaited(self, key: str) -> tuple[Want, float] | None:
        """The limit of a line, and when it may allow more; infinity: something has to end."""
        line = self._lines.get(key)
        if line is None:
            return None
        if line.want.name == HOURS:
            return line.want, self._opening(line.want)
        counts = isinstance(line.want.taken, Count)
        return line.want, math.inf if counts or not line.until else line.until

    def _opening(self, want: Want) -> float:
        """When hours begin, on `monotonic`."""
        return monotonic() + max(want.bound.value - self._calendar.now(), 0.0)

    def statistics(self) -> dict[str, Any]:
        """How many wait for a limit, and for which; at most `MAX_NAMED` limits are named."""
        waiting: dict[str, int] = {}
        for line in self._lines.values():
            name = str(line.want)  # sites may have equal labels
            waiting[name] = waiting.get(name, 0) + len(line.waiters)
        most = sorted(waiting.items(), key=lambda item: -item[1])[:MAX_NAMED]
        return {"limited": sum(waiting.values()), "limits": dict(most)}

    def replies(self) -> dict[str, Any]:
        """What peers have replied; empty without patterns for replies."""
        return {} if self.refusals is None else self.refusals.statistics()

    def close(self) -> None:
        """Give back what the engine holds."""
        self._cells.close()


def _all(bounds: Bounds, scope: str, key: str, local_ip: str) -> Iterator[Want]:
    for name, bound in bounds.items():
        if name in (HOURS, IGNORE):
            continue  # hours that are open limit nothing
        value = int(bound.value)
        where = f"{name} {key} {local_ip}"
        if name in (MESSAGES, BYTES, CONNECTS):
            where = f"{name} {value} {key} {local_ip}"  # a changed rate begins anew
        taken: Rate | Count
        if name == PAUSED:
            taken = Rate(_pause_key(bound.value, key, local_ip), 0)
        elif name == BYTES:
            taken = Rate(where, 0)
        elif name in (MESSAGES, CONNECTS):
            taken = Rate(where, cost(1, value))
        else:
            taken = Count(where, value)
        yield Want(taken, name, bound, f"{scope} from {local_ip}" if local_ip else scope)


def _want_of(lease: Lease) -> Want:
    taken = Rate(f"{LEASE} {lease.ip}", 0)
    return Want(taken, LEASE, Bound(0, "cluster-exchange"), f"from {lease.ip}")


def _interval(want: Want) -> int:
    """The time between two units of a rate; of bytes a minute, in which a large mail was sent."""
    if want.name == BYTES:
        return MINUTE
    return want.taken.cost if isinstance(want.taken, Rate) else 0


def _pause_key(until: float, key: str, local_ip: str) -> str:
    return f"{PAUSED} {until:.6f} {key} {local_ip}"


def _wants(wants: Sequence[Want], *names: str, lease: Lease | None = None) -> Wants:
    each = tuple(want for want in wants if want.name in names)
    if not each and lease is None:
        return NOTHING
    counts = [want for want in each if isinstance(want.taken, Count)]
    return Wants(
        each,
        tuple(want.taken for want in each),
        tuple(want.taken.key for want in counts),
        tuple(want.taken.key for want in counts if want.name == STARTING),
        any(want.name == BYTES for want in each),
        next((want for want in each if want.name == HOURS), None),
        lease,
    )
