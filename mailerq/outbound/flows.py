"""All flows of a dispatcher: those that can send, and the pauses of the others.

Theory of operation
-------------------
A flow exists while there is something to do for it. A flow that goes down leaves a `Pause` in its
place, which keeps little more than the number of failures and the time to look again. When that
time comes, when a message's own retry time comes, or when the pause gets the right to try its site,
some of its mail is examined. Expired messages are finished, and one message asks: its target is
looked up anew, and a new flow, which stays down until a host lets it in, tries that message. If no
host does, a pause takes the flow's place again. A pause that follows no failed or slow try is
*new*, and its flow begins with several messages. A pause without mail is dropped when its time is
over.

Silent hosts, however many, keep most pauses waiting for the right to try, for hours perhaps.
A pause that waits looks for expired mail meanwhile.

Everything here runs on the home worker.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final

from mailerq.outbound.choice import BUSY, FREE, Choice
from mailerq.outbound.flow import LEAST_WINDOW, MAX_ASK_SECONDS, Flow
from mailerq.outbound.jobs import Job
from mailerq.outbound.pause import Key, Pause
from mailerq.outbound.timers import Times

if TYPE_CHECKING:
    from mailerq.net.resolver import NoHosts
    from mailerq.outbound.dispatcher import Dispatcher
    from mailerq.outbound.intake import Destination, Intake
    from mailerq.outbound.sites import Site, Sites
    from mailerq.rules.security import Demands

__all__ = ["Flows"]

ASK_MESSAGES: Final = 100
"""Messages examined each time a flow that has failed asks; some have expired."""

NEW_MESSAGES: Final = LEAST_WINDOW
"""Messages of a new pause with which its flow begins."""

WAIT_MESSAGES: Final = 10
"""Messages examined when a pause that waits for a try looks; there may be many such pauses."""

MANY: Final = 8
"""Above this number, flows to near peers keep the machine busy with one connection each."""

COUNT_SECONDS: Final = 0.05
"""`many_send_nearby` counts the flows once in this time."""

NEXT_LOOK_SECONDS: Final = 0.1
"""Pause before more mail is examined, if none of the last could ask."""


class _Look:
    """The examination of a pause's mail."""

    __slots__ = ("destinations", "jobs", "left", "pause")

    def __init__(self, pause: Pause, has_slot: bool) -> None:
        self.pause = pause
        self.destinations = list(pause.ready())
        """The destinations that are not examined yet."""
        self.jobs: list[Job] = []
        """What may be sent: one message, or some if the pause is new."""
        self.left = WAIT_MESSAGES
        """How many more messages to examine, at most."""
        if pause.may_ask:
            self.left = (NEW_MESSAGES if has_slot else 1) if pause.is_new else ASK_MESSAGES

    @property
    def is_over(self) -> bool:
        return self.left < 1 or not self.destinations


class Flows:
    """The flows of a dispatcher."""

    def __init__(self, dispatcher: Dispatcher, intake: Intake, sites: Sites) -> None:
        self.live: dict[Flow, None] = {}
        self.pauses: dict[Key, Pause] = {}
        self.looks: Times[Flow | Pause] = Times()
        """When flows and pauses look again, on the monotonic clock."""
        self._dispatcher = dispatcher
        self._intake = intake
        self._sites = sites
        self._openings = dispatcher.openings
        self._asking: list[Pause] = []
        """Pauses whose mail is examined in the next turn of the loop."""
        self._many, self._counted_until = False, 0.0
        self.choice = Choice(dispatcher, self.pauses)

    # Which flow a message goes to

    def find(self, job: Job, site: Site, wanted: Flow | Pause | None = None) -> Flow | Pause:
        """Return a flow to the site that may send the message; prefer one that is not down."""
        local_ip, demands = None, job.plan.demands
        if job.plan.local_ips:
            asked = wanted.local_ip if wanted is not None else None
            local_ip = self.choice.choose(job, site, asked)[0]
        flow = site.flows.get((local_ip, demands))
        if flow is not None:
            return flow
        pause = self.pauses.get((site.key, local_ip, demands))
        return pause or self._begin(site, local_ip, demands)

    def _begin(self, site: Site, local_ip: str | None, demands: Demands) -> Flow | Pause:
        """A new flow, or the pause in its place if the operator wants one."""
        flow = self._add(site, local_ip, demands)
        row = self._dispatcher.stops.flow_pause(site, local_ip)
        if not row:
            return flow
        pause = flow.go_down()
        pause.paused = row
        return pause

    def _add(self, site: Site, local_ip: str | None, demands: Demands) -> Flow:
        flow = site.flows[local_ip, demands] = Flow(self._dispatcher, site, local_ip, demands)
        self.live[flow] = None
        return flow

    def place_elsewhere(self, job: Job, state: int = BUSY) -> bool:
        """Move a message to another of its local addresses, if one is at least in this state."""
        old = job.flow
        assert old is not None, "it was placed"
        if len(job.plan.local_ips) < 2:
            return False
        local_ip, found = self.choice.choose(job, old.site)
        if found > state or local_ip == old.local_ip:
            return False
        demands = job.plan.demands
        flow = old.site.flows.get((local_ip, demands)) or self._add(old.site, local_ip, demands)
        old.held -= 1
        self._intake.link(self._intake.destination(job.lease.destination), flow)
        flow.add(job)
        return True

    def hand_over(self, flow: Flow, state: int = FREE) -> None:
        """Move mail of a flow that may not send now to other addresses, see `place_elsewhere`."""
        number = 0
        while flow.local_ip is not None and number < len(flow.jobs):
            job = flow.jobs[number]
            if len(job.plan.local_ips) < 2 or job.plan.pinned:
                number += 1
                continue
            del flow.jobs[number]
            if not self.place_elsewhere(job, state):
                flow.jobs.insert(number, job)
                break

    def set_width(self, destination: Destination, job: Job, site: Site, *, waits: bool) -> None:
        """Note how many flows may send the mail of a destination.

        If its mail `waits`, all of them get it: the first that can takes it.
        """
        if not waits:
            destination.width = len(self.choice.usable(job, site))
            return
        for flow in self.choice.flows(job, site):
            self._intake.link(destination, flow)
        destination.width = len(destination.flows)

    # The end of a flow, and pauses

    def forget(self, flow: Flow) -> None:
        """Drop a flow that has no mail and no state worth keeping."""
        if self._remove(flow):
            self._intake.forget(flow)

    def _remove(self, flow: Flow) -> bool:
        if self.live.pop(flow, 0) == 0:
            return False
        del flow.site.flows[flow.local_ip, flow.demands]
        self.looks.discard(flow)
        self._openings.forget(flow)
        flow.rights.leave(flow)
        return True

    def pause(self, flow: Flow, *, failures: int, ahead: bool) -> Pause:
        """Put a pause in the place of a flow that goes down."""
        self._remove(flow)
        for job in flow.jobs:
            # The next message to ask finds the hosts of the target anew.
            self._sites.forget(job.plan.route)
        pause = Pause(self, flow, failures, ahead=ahead)
        self.pauses[pause.key] = pause
        self._intake.replace(flow, pause)
        return pause

    def rest(self, flow: Flow) -> None:
        """Put a pause in the place of a flow that the operator's row has ended."""
        if flow in self.live:
            pause = flow.go_down()
            pause.paused = flow.paused
            self._dispatcher.stops.rests(pause)

    def resume(self, pause: Pause, site: Site) -> Flow:
        """Put a flow in the place of a pause, to ask with one message."""
        del self.pauses[pause.key]
        self.looks.discard(pause)
        flow = self._add(site, pause.local_ip, pause.demands)
        flow.resume_from(pause)
        self._intake.replace(pause, flow)
        return flow

    def ask(self, pause: Pause, *, examine: bool = False) -> None:
        """Test whether a flow can send again, if its site may be tried now.

        Otherwise the pause waits in line for that. With `examine`, finish expired mail anyway.
        """
        if self._dispatcher.stopping or pause.paused:
            return
        may_ask = not pause.has_hosts or self._openings.reserve_try(pause)
        if not may_ask:
            self.look_at(pause, monotonic() + MAX_ASK_SECONDS)
        if (may_ask or examine) and not pause.asking:
            pause.asking = True
            if not self._asking:
                self._dispatcher.start_soon(self._examine_together)
            self._asking.append(pause)

    async def _examine_together(self) -> None:
        """Examine mail of the pauses that ask in one turn of the loop, with few reads."""
        asking, self._asking = self._asking, []
        most = self._intake.subscription.takes_together
        while asking:
            self._dispatcher.start_soon(self._examine, asking[:most])
            del asking[:most]

    async def _examine(self, pauses: Sequence[Pause]) -> None:
        """Examine some mail of pauses: finish expired messages, and try what each may try."""
        dispatcher, intake = self._dispatcher, self._intake
        slots = dispatcher.openings.free_slots(sum([pause.reserved for pause in pauses]))
        looks = [_Look(pause, n < slots) for n, pause in enumerate(pauses)]
        while looks:
            takes = self._next_takes(looks)
            found = await intake.take_each([(each, limit) for _, each, limit in takes])
            for (look, destination, _), leases in zip(takes, found, strict=True):
                look.left -= max(len(leases), 1)
                for lease in leases:
                    job = dispatcher.judge(lease)
                    if job is None:
                        continue
                    if look.jobs and not look.pause.is_new:
                        dispatcher.put_back(job)
                    else:
                        look.jobs.append(job)
                intake.taken(destination)
            for look in looks:
                if look.is_over:
                    self._try(look.pause, look.jobs)
            looks = [look for look in looks if not look.is_over]

    def _next_takes(self, looks: Sequence[_Look]) -> list[tuple[_Look, Destination, int]]:
        """For each look the destination to examine next, with the number of messages to take."""
        takes: list[tuple[_Look, Destination, int]] = []
        room = self._intake.room
        for look in looks:
            while not look.is_over:
                destination = look.destinations.pop(0)
                if not (destination.taking or destination.placing):
                    look.pause.to_the_end(destination)
                    limit = max(min(look.left, room), 1)
                    room -= limit
                    destination.taking = True
                    takes.append((look, destination, limit))
                    break
        return takes

    def _try(self, pause: Pause, jobs: list[Job]) -> None:
        """Try the site of a pause with the messages that were examined, if it may be tried now."""
        may_ask = pause.may_ask
        if jobs and may_ask:
            site = self._sites.known(jobs[0].plan.route)
            if site is None:
                while len(jobs) > 1:  # the lookup may take long
                    self._dispatcher.put_back(jobs.pop())
                self._dispatcher.start_soon(self._find_and_try, pause, jobs[0])
                return
            self._place(pause, jobs, site)
        else:
            for job in jobs:
                self._dispatcher.put_back(job)
        self._examined(pause, again=bool(jobs) and not may_ask)

    async def _find_and_try(self, pause: Pause, job: Job) -> None:
        """Find the hosts of a pause's message, and try them."""
        self._place(pause, [job], await self._sites.find(job.plan.route))
        self._examined(pause)

    def _place(self, pause: Pause, jobs: Sequence[Job], site: Site | NoHosts) -> None:
        first, *more = jobs
        pause.to_the_end(self._intake.destination(first.lease.destination))
        self._dispatcher.place(first, site, pause)
        for job in more:
            self._dispatcher.send(job)

    def _examined(self, pause: Pause, *, again: bool = False) -> None:
        """Some mail of a pause was examined: look for more, or drop the pause.

        `again`: there is mail to try the site with, and it might not be tried then.
        """
        pause.asking = False
        if self.pauses.get(pause.key) is not pause:
            return  # a flow asks
        if pause.paused:
            self.looks.discard(pause)
            self._openings.forget(pause)
        elif again:
            self.ask(pause)
        elif pause.ready():
            # All of that mail had expired, or now goes elsewhere.
            self.look_at(pause, monotonic() + NEXT_LOOK_SECONDS)
        else:
            self._openings.forget(pause)
            if pause.when == math.inf:  # and the time of the pause is over
                del self.pauses[pause.key]
                self._intake.forget(pause)

    @property
    def some_are_bare(self) -> bool:
        """Whether flows wait for a message, to wait for a connection with."""
        return bool(self._intake.has_bare)

    # Times

    def look_at(self, flow: Flow | Pause, when: float) -> None:
        """Have a flow or a pause look again at `when`, on the monotonic clock."""
        self.looks.set_earlier(flow, when)
        self._dispatcher.times_changed(look=when)

    def many_send_nearby(self) -> bool:
        """Whether many flows are sending to near peers, so that the machine is busy."""
        now = monotonic()
        if now >= self._counted_until:
            self._counted_until = now + COUNT_SECONDS
            flow: Flow
            count = 0
            for flow in self.live:
                count += flow.sends_nearby
                if count > MANY:
                    break
            self._many = count > MANY
        return self._many

    def look(self) -> None:
        """Look where the time to look has come."""
        for each in self.looks.pop_until(monotonic()):
            each.look()

    def flush(self) -> None:
        """Try now instead of waiting for a time."""
        for flow in self.live:
            flow.end_holds()
        for pause in self.pauses.values():
            self.looks.set(pause, 0.0)

    # Changed settings, and the end

    def reload(self, *, reroute: bool) -> None:
        """Apply changed settings; with `reroute` give all waiting mail back, to be judged anew."""
        for flow in list(self.live):
            if reroute:
                self._intake.forget(flow)
                self._put_back(flow)
            flow.pump()  # there may be more connections now
        if reroute:
            for pause in list(self.pauses.values()):
                self._intake.forget(pause)

    def seek(self) -> None:
        """Look for mail that other instances have set apart: more of it may be sent here now."""
        self._intake.look()

    def hand_on(self) -> None:
        """Judge mail anew that was handed to this instance, and whose addresses others own by now.

        Nobody else finds this mail: what is parked of it is in queues of this instance.
        """
        keeper_of = self._dispatcher.keeper_of
        if not self._dispatcher.handed or keeper_of is None or self._dispatcher.stopping:
            return
        ips = {flow.local_ip for flow in self.live if flow.local_ip is not None}
        gone = {ip for ip in ips if keeper_of((ip,))}
        for flow in [flow for flow in self.live if flow.local_ip in gone]:
            for destination in list(flow.destinations):
                if all(other.local_ip in gone for other in destination.flows):
                    self._intake.unlink(destination, flow)
            flow.pump()

    def recall(self, numbers: Collection[int]) -> None:
        """Give these messages back if they wait in memory."""
        for flow in list(self.live):
            waiting = [job for job in flow.jobs if job.lease.id in numbers]
            if waiting:
                flow.jobs = [job for job in flow.jobs if job.lease.id not in numbers]
                for job in waiting:
                    self._dispatcher.put_back(job)
                flow.pump()

    def stop(self) -> None:
        """Give all waiting mail back, for good."""
        waiting: Sequence[Flow | Pause] = [*self.live, *self.pauses.values()]
        for each in waiting:
            self._openings.forget(each)
        self._openings.tidy()
        for flow in self.live:
            flow.rights.leave(flow)
            self._put_back(flow)

    def _put_back(self, flow: Flow) -> None:
        while flow.jobs:
            self._dispatcher.put_back(flow.jobs.pop(0))
