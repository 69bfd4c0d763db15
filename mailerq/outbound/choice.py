"""Which local address a message leaves from, where it may use several.

Theory of operation
-------------------
Each attempt uses one address. Addresses that fit no host of the site, those that could not be
bound lately, and those that peers have refused the message for, come into question only if there is
no other. Of the others the flow to the site
decides: the best are those whose flow may send now, or does not exist yet; then those that send as
fast as they may; then those that wait for a limit; last those that are down. Among equals a lot
decides, by the weights of the addresses. So a busy pool is used by its weights, and an address that
may not send for now holds up no mail that another one could send.

Mail in the queue is pulled by flows, so it must be linked to each flow that may send it.
`Dispatcher.place` links a destination to the flow of each message. If no address of a message can
take mail, its destination is linked to the flows of all its addresses, and the first that can will
take it. Before that, a destination whose flows cannot take mail is *spread*: sorted again, to find
an address that has no flow yet (`Intake`). A flow that is refused by a limit hands over its mail in
memory to addresses that may send now.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mailerq.outbound.dispatcher import Dispatcher
    from mailerq.outbound.flow import Flow
    from mailerq.outbound.jobs import Job
    from mailerq.outbound.pause import Key, Pause
    from mailerq.outbound.sites import Site
    from mailerq.rules.security import Demands

__all__ = ["BUSY", "FREE", "Choice"]

FREE: Final = 0
"""The flow may send one more message soon."""
BUSY: Final = 1
"""The flow sends, and has enough mail."""
WAITING: Final = 2
"""The flow waits for a limit, and has no mail in memory."""
DOWN: Final = 3


class Choice:
    """Chooses local addresses for a dispatcher."""

    def __init__(self, dispatcher: Dispatcher, pauses: dict[Key, Pause]) -> None:
        self._dispatcher = dispatcher
        self._pauses = pauses

    def able(self, job: Job, site: Site) -> list[str]:
        """The addresses that fit the hosts and can be bound."""
        ips, history = job.plan.local_ips, self._dispatcher.history
        if len(ips) > 1 and (limits := self._dispatcher.limits).leases:
            ips = tuple(ip for ip in ips if limits.may_use(ip)) or ips
        fitting = [ip for ip in ips if site.fits(ip)] or list(ips)
        return [ip for ip in fitting if not history.is_aside(ip)] or fitting

    def usable(self, job: Job, site: Site) -> list[str]:
        """The addresses that come into question for an attempt."""
        plan, found = job.plan, self.able(job, site)
        if plan.refused:
            found = [ip for ip in found if ip not in plan.refused] or found
        return [plan.pinned] if plan.pinned in found else found

    def choose(self, job: Job, site: Site, wanted: str | None = None) -> tuple[str, int]:
        """The address for an attempt, and the state of its flow.

        `wanted` is the address whose flow asks for mail: it gets the message if no other address is
        better, and none is free. An address that is down asks with messages that no other sends.
        """
        ips = self.usable(job, site)
        if len(ips) == 1:
            return ips[0], self.state(site, ips[0], job.plan.demands)
        states = {ip: self.state(site, ip, job.plan.demands) for ip in ips}
        best = min(states.values())
        able = [ip for ip in ips if states[ip] == best]
        if wanted in states and (best > BUSY or FREE < best == states[wanted]):
            return wanted, states[wanted]
        weight_of = self._dispatcher.limits.shaping.local_ips.weight_of
        return random.choices(able, [weight_of(ip) for ip in able])[0], best

    def state(self, site: Site, ip: str, demands: Demands) -> int:
        """How soon the flow from an address can send one more message."""
        flow = site.flows.get((ip, demands))
        if flow is None:
            is_down = (site.key, ip, demands) in self._pauses
            return DOWN if is_down or self._dispatcher.stops.flow_pause(site, ip) else FREE
        if flow.down:
            return DOWN
        if not flow.takes_mail:
            return WAITING
        # Whether a host lets in the first session is not known yet.
        room = flow.window if flow.proven else 1
        return BUSY if flow.rights.waits_to_send or len(flow.jobs) >= room else FREE

    def flows(self, job: Job, site: Site) -> list[Flow | Pause]:
        """The flows, and pauses of flows, of all addresses for an attempt."""
        demands = job.plan.demands
        found = (
            site.flows.get((ip, demands)) or self._pauses.get((site.key, ip, demands))
            for ip in self.usable(job, site)
        )
        return [flow for flow in found if flow is not None]
