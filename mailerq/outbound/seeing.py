"""What people may see of the flows of a dispatcher: their figures, and what limits each.

Everything here runs on the home worker, and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from mailerq.message import format_time
from mailerq.outbound.explaining import Explainer, words_of_row
from mailerq.outbound.jobs import words_of
from mailerq.outbound.limits import CONNECTIONS
from mailerq.outbound.pause import Pause
from mailerq.rules.destinations import parked_by

if TYPE_CHECKING:
    from mailerq.outbound.dispatcher import Dispatcher
    from mailerq.outbound.flow import Flow
    from mailerq.outbound.intake import Destination, Intake
    from mailerq.outbound.limits import Limits
    from mailerq.outbound.openings import Openings
    from mailerq.outbound.sites import Site, Sites
    from mailerq.rules.routes import Route
    from mailerq.rules.security import Demands

__all__ = ["Reason", "Seeing"]


class Reason(NamedTuple):
    """What a flow waits for, and until when on `monotonic`; infinity if nobody knows."""

    text: str
    until: float = math.inf


class Seeing:
    """Describes the flows of one dispatcher."""

    def __init__(self, dispatcher: Dispatcher, intake: Intake, sites: Sites) -> None:
        self.dispatcher = dispatcher
        self.intake = intake
        self.sites = sites
        self._looking_up: set[Route] = set()

    def explainer(self) -> Explainer:
        """Explains with the settings in force now."""
        dispatcher = self.dispatcher
        return Explainer(
            dispatcher.config,
            dispatcher.limits,
            self.sites,
            dispatcher.decide,
            now=dispatcher.now,
            rows=dispatcher.stops.rows,
            seeing=self,
            signer=dispatcher.signer,
            look_up=self._look_up,
        )

    def _look_up(self, route: Route) -> None:
        """Find the hosts of a target, however long that takes."""
        if route not in self._looking_up:
            self._looking_up.add(route)
            self.dispatcher.start_soon(self._find, route)

    async def _find(self, route: Route) -> None:
        try:
            await self.sites.find(route)
        finally:
            self._looking_up.discard(route)

    def flow_of(self, site: Site, local_ip: str | None, demands: Demands) -> Flow | Pause | None:
        """The flow to a site from a local address, or the pause in its place."""
        flow = site.flows.get((local_ip, demands))
        return flow or self.dispatcher.flows.pauses.get((site.key, local_ip, demands))

    def describe(self, each: Flow | Pause) -> dict[str, Any]:
        """The figures of a flow now, and what limits it."""
        reason = self.reason(each)
        return {
            "memory": 0 if isinstance(each, Pause) else each.held,
            "connections": 0 if isinstance(each, Pause) else len(each.sessions),
            "opening": 0 if isinstance(each, Pause) else len(each.opening),
            "idle": 0 if isinstance(each, Pause) else len(each.idle),
            "limited-by": reason.text,
            **self.when(reason.until),
            "reply": each.said if isinstance(each, Pause) else words_of(each.last),
        }

    def when(self, until: float) -> dict[str, Any]:
        """A time of `monotonic` for people, and in how many seconds it comes."""
        if until == math.inf:
            return {"until": None, "seconds": None}
        seconds = max(until - monotonic(), 0.0)
        when = round(self.dispatcher.now() + seconds)  # hours begin at 20:00:00, not at 19:59:59
        return {"until": format_time(when), "seconds": round(seconds, 3)}

    def destination(self, key: str) -> dict[str, Any]:
        """What is known of the mail that waits under a key of `rules.destinations`."""
        found: Destination | None = self.intake.known(key)
        due = math.inf if found is None else found.when
        return {
            "key": key,
            "due": found is not None and found.waits,
            "next": None if due == math.inf else format_time(due),
        }

    # What limits

    def reason(self, each: Flow | Pause) -> Reason:
        """What keeps a flow from sending more now; the first of all reasons."""
        if each.paused:
            return self.reason_of_row(each.paused)
        reasons = _of_pause(each) if isinstance(each, Pause) else self._of_flow(each)
        return next(reasons)

    def reason_of_row(self, number: int) -> Reason:
        """The operator's row that stops mail."""
        rows = self.dispatcher.stops.rows
        row = None if rows is None else rows.by_id.get(number)
        if row is None:
            return Reason(f"pause {number}")
        until = math.inf if row.until is None else row.until - self.dispatcher.now() + monotonic()
        return Reason(words_of_row(row), until)

    def reason_of_key(self, key: str) -> str:
        """Why mail under a key has no flow."""
        if row := parked_by(key):
            return self.reason_of_row(row).text
        found = self.intake.known(key)
        if found is not None and found.waits:
            return "its hosts are to be found"
        return "a time to come: it is not due yet"

    def _of_flow(self, flow: Flow) -> Iterator[Reason]:
        dispatcher, rights = self.dispatcher, flow.rights
        if dispatcher.stopping:
            yield Reason("the daemon stops")
        if flow.down:
            yield Reason("one message asks whether a host lets us in")
        for key in (rights.waits_to_send, rights.waits_to_open):
            yield from _of_limit(dispatcher.limits, key)
        for session in rights.limited:
            yield from _of_limit(dispatcher.limits, session.waits_for)
        yield from _of_connections(dispatcher.openings, flow)
        if self.intake.awaits(flow):
            yield Reason("room in memory (rabbitmq-qos)")
        if flow.refilling and not flow.jobs:
            yield Reason("mail is read from the queue")
        if flow.opening and len(flow.opening) == len(flow.sessions):
            yield Reason("the host has not let us in yet")
        yield Reason("the replies of the host" if flow.held else "")


def _of_limit(limits: Limits, key: str) -> Iterator[Reason]:
    """The limit in whose line something waits."""
    found = limits.awaited(key) if key else None
    if found is not None:
        yield Reason(str(found[0]), found[1])


def _of_connections(openings: Openings, flow: Flow) -> Iterator[Reason]:
    """Why a flow with waiting mail opens no further connection."""
    if openings.awaits(flow):
        yield Reason("a free connection (smtp-connections-out, smtp-connections)")
    if flow.jobs:
        if flow.held_until > monotonic():
            yield Reason("the host lets in no further connection", flow.held_until)
        allowance = flow.rights.allowance
        if 0 < allowance.most <= len(flow.sessions):
            for want in allowance.opening.each:
                if want.name == CONNECTIONS and want.bound.value == allowance.most:
                    yield Reason(str(want))


def _of_pause(pause: Pause) -> Iterator[Reason]:
    """Why a flow is down."""
    if pause.asking:
        yield Reason("one message is about to ask whether a host lets us in")
    if pause.line is not None:
        yield Reason("its turn to try: hosts of other domains do not answer either")
    if pause.failures:
        times = "once" if pause.failures == 1 else f"{pause.failures} times in a row"
        yield Reason(f"no host let us in, {times}; then one message asks", pause.when)
    yield Reason("its turn to try", pause.when)
