"""A pause: what is kept of a flow that cannot send."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mailerq.outbound.jobs import words_of
from mailerq.rules.security import Demands

if TYPE_CHECKING:
    from mailerq.outbound.flow import Flow
    from mailerq.outbound.flows import Flows
    from mailerq.outbound.intake import Destination

__all__ = ["Key", "Pause"]

Key = tuple[bytes, str | None, Demands]
"""The key of a site, a local address, and what a connection must prove."""


class Pause:
    """A flow that is down: a record that takes its place until its hosts are asked again.

    Whole domains can be down for days, so a pause is small: it has no site, no mail and no
    sessions. It answers what the intake and the openings ask of a flow.
    """

    __slots__ = (
        "ahead", "asking", "destinations", "failures", "flows", "has_hosts", "key", "line",
        "patient", "paused", "reserved", "said", "when",
    )  # fmt: skip

    down = True
    takes_mail = False
    proven = keeps_up = False
    jobs = ()
    window = 0

    def __init__(self, flows: Flows, flow: Flow, failures: int, *, ahead: bool) -> None:
        self.flows = flows
        self.key: Key = (flow.site_key, flow.local_ip, flow.demands)
        self.failures = failures
        """Consecutive times that the flow went down."""
        self.when = math.inf
        """When to look again, on the monotonic clock; kept by `Times`."""
        self.paused = 0
        """The operator's row that forbids to ask."""
        self.asking = False
        """Some mail is being examined, to ask with one message."""
        self.has_hosts = bool(flow.site.hosts)
        self.patient = flow.patient
        self.said = words_of(flow.last)
        """Why no host lets us in."""
        self.reserved = False
        """The site may be tried; kept by `Openings`, as is `line`."""
        self.line: deque[Pause] | None = None
        """Where the pause waits for that right."""
        self.ahead = ahead
        # Destinations with due mail come first, in turn. Most pauses have one destination.
        found = dict.fromkeys([*flow.ready, *flow.destinations])
        self.destinations: dict[Destination, None] | tuple[Destination, ...]
        self.destinations = found if len(found) > 1 else tuple(found)

    @property
    def site_key(self) -> bytes:
        return self.key[0]

    @property
    def local_ip(self) -> str | None:
        return self.key[1]

    @property
    def demands(self) -> Demands:
        return self.key[2]

    @property
    def is_new(self) -> bool:
        """Whether no try of the site has failed, or been slow, since a host last let mail in."""
        return not (self.failures or self.patient)

    @property
    def may_ask(self) -> bool:
        """Whether a message may be tried now."""
        return self.reserved or not self.has_hosts

    def ready(self) -> Sequence[Destination]:
        """The destinations with due mail in the queue, as far as is known."""
        return [destination for destination in self.destinations if destination.waits]

    def link(self, destination: Destination) -> None:
        """Mail of a destination goes to this flow."""
        found = self.destinations
        if isinstance(found, tuple):
            found = dict.fromkeys(found)
        found[destination] = None
        self.destinations = found if len(found) > 1 else tuple(found)

    def unlink(self, destination: Destination) -> None:
        """Undo `link`."""
        if isinstance(self.destinations, dict):
            self.destinations.pop(destination, None)
        elif destination in self.destinations:
            self.destinations = ()

    def to_the_end(self, destination: Destination) -> None:
        """The other destinations have their turn first."""
        found = self.destinations
        if isinstance(found, dict) and destination in found:
            del found[destination]
            found[destination] = None

    def mail_waits(self, destination: Destination) -> None:
        """Mail that waits changes nothing: its host must be asked first."""

    def nothing_waits(self, destination: Destination) -> None:
        """See `ready`."""

    def resume(self) -> None:
        """The right to try that the pause waits for may be available."""
        self.flows.looks.discard(self)
        self.flows.ask(self)

    def look(self) -> None:
        """The time to look has come."""
        self.flows.ask(self, examine=True)
