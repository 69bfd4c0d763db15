"""Takes mail from the queue into the flows, by destination, when it can be sent.

Theory of operation
-------------------
The queue sorts its mail by *destination* (`mailerq.rules.destinations`). The flow of a destination
is known once one of its messages has been judged: the plan gives a target, the target a site. From
then on the destination is linked to the flow, and the flow takes from the destination.

Mail comes in two ways. New mail *arrives* directly while its destination has room, and while memory
has much room if its flow keeps up. All other mail *waits*: the queue reports once which destination
has mail, and from when. A destination without a flow is *sorted*: a few messages are taken to find
the flow.

Queued mail costs only one `Destination` for all of its messages. One heap holds the times at which
destinations become due.

Messages in memory are at most `rabbitmq-qos`, plus a few for each flow that has a connection and
nothing to send over it: no flow waits for the memory of others. A flow without a connection gets
a message to wait for one with, while few others do; else the flows that have one could fill memory
for ever. Flows that no host has let in yet share half of the memory, and destinations are sorted
while few such flows exist, so mail for a new destination waits for nobody. While deliveries to near
peers keep the machine busy, sorting keeps pace with the tries: see `SORT_SECONDS`.

Flows stand in line for mail, and those of one turn of the loop take theirs with one read of the
queue, if the queue can do that. The new mail sets out together, so its results come together too.
While flows wait for room, each takes its share of the room that there is: a flow that took its
whole window would keep the others waiting.

Everything here runs on the home worker.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final

import trio

from mailerq.errors import QueueError
from mailerq.net.logs import Ration
from mailerq.outbound.flow import FIRST_WINDOW, LEAST_WINDOW
from mailerq.outbound.pause import Pause
from mailerq.outbound.timers import Times
from mailerq.queues import Lease, Subscription, Taken

if TYPE_CHECKING:
    from mailerq.outbound.dispatcher import Dispatcher
    from mailerq.outbound.flow import Flow

__all__ = ["Destination", "Intake"]

log = logging.getLogger("mailerq.delivery")

SORTERS: Final = 4
"""Tasks that sort destinations. While one waits for the queue, the next gathers what came since."""

MAX_GROUP: Final = 100
"""Messages taken to sort a destination, at most. The first time `LEAST_WINDOW` are taken, or one if
no slot is free."""

FEW_SHARE: Final = 4
"""Flows that wait for a connection, or that no host has let in yet, are few below 1/`FEW_SHARE` of
`rabbitmq-qos`."""

DIRECT_SHARE: Final = 2
"""A flow that keeps up gets all arriving mail while memory holds less than 1/`DIRECT_SHARE` of
`rabbitmq-qos`: a message that goes to the file has to be read again."""

ENOUGH_SHARE: Final = 8
SORT_SECONDS: Final = 0.25
"""While near peers keep the machine busy, destinations are sorted only when 1/`ENOUGH_SHARE` of
memory is free, and only as many as can be tried. Mail that cannot be tried yet would go back to the
queue, and be read again. After `SORT_SECONDS` without sorting, one group is sorted anyway: some of
its mail may be for sites that have let us in, which need no try."""

READ_AGAIN_SECONDS: Final = 5.0
"""Pause before the next read of a destination that the queue could not read."""

LOOK_AGAIN_SECONDS: Final = 60.0
"""Pause for a destination whose hosts could not be looked up for lack of time."""


class Destination:
    """Queued mail with the same possible routes, and its state. There may be many: it is small."""

    __slots__ = (
        "flows", "group", "key", "listed", "news", "placing", "taking", "waits", "when", "width",
        "window",
    )  # fmt: skip

    def __init__(self, key: str) -> None:
        self.key = key
        self.flows: tuple[Flow | Pause, ...] = ()
        self.waits = False
        """Mail of this destination is due in the queue, as far as is known."""
        self.when = math.inf
        """When more becomes due, on the wall clock; kept by `Times`."""
        self.listed = False
        """The destination is in the list of those to sort."""
        self.taking = False
        self.news = False  # the queue reported mail during a take
        self.placing = 0  # messages whose hosts are being looked up
        self.group = LEAST_WINDOW  # messages to take at the next sorting
        self.window = 0  # the window last set in the queue
        self.width = 0  # the flows that may send its mail, if that may leave from several addresses


class Intake:
    """The mail of the outbox, by destination: the `Receiver` of the queue."""

    def __init__(self, dispatcher: Dispatcher, most: int) -> None:
        self.leased = 0
        """Messages in memory that are not settled yet."""
        self.subscription: Subscription
        self._begun = False
        self._early: list[Lease | tuple[str, float | None]] = []
        self.dues: Times[Destination] = Times()
        """When mail in the queue becomes due, on the wall clock."""
        self._dispatcher = dispatcher
        self._most = most
        self._first_window = min(FIRST_WINDOW, dispatcher.max_window)
        self._least = min(LEAST_WINDOW, dispatcher.max_window)
        self._direct = most // DIRECT_SHARE
        self._few = max(most // FEW_SHARE, 1)
        self._enough = most // ENOUGH_SHARE
        self._destinations: dict[str, Destination] = {}
        self._unsorted: deque[Destination] = deque()
        self._sorters = trio.lowlevel.ParkingLot()
        self._newest = True
        self._sort_again = 0.0
        self._serves_soon = False
        self._asked = 0  # messages that are being taken
        self._sorting = 0  # of these, to sort destinations
        self._sorted = 0  # the destinations that are being sorted
        # Flows that get mail at the next take, those that wait for room in memory, and those with
        # neither mail in memory nor a connection.
        self._next_line: OrderedDict[Flow, None] = OrderedDict()
        self._bare_line: OrderedDict[Flow, None] = OrderedDict()
        self._memory_line: OrderedDict[Flow, None] = OrderedDict()
        self._new_line: OrderedDict[Flow, None] = OrderedDict()
        self._say_unread = Ration(log.error, 1, "it could not be read %d times more")

    def begin(self, subscription: Subscription) -> None:
        """Process what the queue reports, and has reported so far."""
        self.subscription = subscription
        self._begun = True
        early, self._early = self._early, []
        for each in early:
            if isinstance(each, Lease):
                self.arrived((each,))
            else:
                self.waiting(*each)

    def look(self) -> None:
        """Look for mail that other processes have set apart."""
        if self._begun:
            self.subscription.look()

    @property
    def room(self) -> int:
        """Messages that still fit into memory."""
        return max(self._most - self.leased - self._asked, 0)

    # What the queue says

    def arrived(self, leases: Sequence[Lease]) -> None:
        """New mail came directly from the queue."""
        if not self._begun:
            self._early += leases
            return
        dispatcher = self._dispatcher
        self.leased += len(leases)
        for lease in leases:
            destination = self.destination(lease.destination)
            if dispatcher.stopping or not self._has_place(destination):
                self.put_back(lease)
            else:
                dispatcher.admit(lease)
                self._widen(destination)
                self._tidy(destination)

    def _widen(self, destination: Destination) -> None:
        """Let more mail of a destination arrive if a flow may keep up with it."""
        if destination.window < self._direct and _is_proven(destination):
            if not self._dispatcher.stops.holds(destination):
                self._set_window(destination)

    def _has_place(self, destination: Destination) -> bool:
        """Whether arriving mail is kept in memory."""
        if not destination.flows:
            return (
                not destination.waits
                and self._dispatcher.room_to_look_up > 0
                and not self._dispatcher.stops.holds(destination)
            )
        if self._may_spread(destination):
            return not destination.waits and self.leased < self._most // 2
        return any(
            flow.takes_mail
            and (
                len(flow.jobs) < max(flow.window, self._first_window)
                or (self.leased < self._direct and flow.keeps_up)
            )
            and (not flow.jobs or self.leased < self._share_of(flow))
            for flow in destination.flows
        )

    def waiting(self, destination: str, due: float | None) -> None:
        """The queue has mail for a destination that is not leased."""
        if not self._begun:
            self._early.append((destination, due))
            return
        found = self.destination(destination)
        if due is None:
            self._mail_waits(found)
        else:
            self.mail_at(found, due)

    def waited(self, leases: Sequence[Lease]) -> None:
        """Mail has waited in a broker for its time; if all its flows are down, one asks with it."""
        self.arrived(leases)
        if not self._begun:
            return
        for key in {lease.destination: None for lease in leases}:
            destination = self.known(key)
            if destination is not None and destination.waits:
                self._ask_if_down(destination)

    def lost(self, leases: Sequence[Lease]) -> None:
        """The broker gives this mail out again: what is not under way is given up."""
        numbers = {lease.id for lease in leases}
        early = [lease for lease in self._early if isinstance(lease, Lease) and lease.id in numbers]
        if early:
            self._early = [each for each in self._early if each not in early]
            for lease in early:
                self._dispatcher.queues.release(lease)
        self._dispatcher.recall(numbers)

    def mail_at(self, destination: Destination, due: float) -> None:
        """Mail of a destination is due at `due`, seconds since 1970."""
        if due > self._dispatcher.now():
            self.dues.set_earlier(destination, due)
            self._dispatcher.times_changed(wall=due)
        else:
            self.came_due(destination)

    def came_due(self, destination: Destination) -> None:
        """A message's own retry time has come; if all its flows are down, one asks with it."""
        self._mail_waits(destination)
        self._ask_if_down(destination)

    def _ask_if_down(self, destination: Destination) -> None:
        if all(flow.down for flow in destination.flows):
            for flow in destination.flows:
                if isinstance(flow, Pause) and not flow.paused:
                    self._dispatcher.flows.ask(flow)
                    break

    def destination(self, key: str) -> Destination:
        destination = self._destinations.get(key)
        if destination is None:
            destination = self._destinations[key] = Destination(key)
        return destination

    def _mail_waits(self, destination: Destination) -> None:
        destination.waits = destination.news = True
        self._tell_flows(destination)

    def _tell_flows(self, destination: Destination) -> None:
        """Tell the flows of waiting mail; have mail sorted that no flow takes."""
        if not destination.flows or self._may_spread(destination):
            self._sort_later(destination)
        for flow in destination.flows:
            flow.mail_waits(destination)

    def _may_spread(self, destination: Destination) -> bool:
        """Whether another address may send what none of the flows takes: `outbound.choice`."""
        flows = destination.flows
        return len(flows) < destination.width and not any(flow.takes_mail for flow in flows)

    # Seeing

    def known(self, key: str) -> Destination | None:
        """A destination that has mail or a flow."""
        return self._destinations.get(key)

    def awaits(self, flow: Flow) -> bool:
        """Whether a flow waits for room in memory."""
        return flow in self._memory_line or flow in self._new_line or flow in self._bare_line

    @property
    def has_bare(self) -> bool:
        """Whether flows without a connection wait for a message."""
        return bool(self._bare_line)

    # Which destinations belong to which flow

    def link(self, destination: Destination, flow: Flow | Pause) -> None:
        """Send a destination's mail to a flow, and unlink flows of other sites."""
        if flow in destination.flows:
            return
        for other in destination.flows:
            if other.site_key != flow.site_key:
                self.unlink(destination, other)
        destination.flows += (flow,)
        flow.link(destination)
        destination.group = LEAST_WINDOW

    def replace(self, old: Flow | Pause, new: Flow | Pause) -> None:
        """Link the destinations of a flow to its pause, or back."""
        alone = (new,)
        for destination in old.destinations:
            flows = destination.flows
            if len(flows) == 1:
                destination.flows = alone
            else:
                destination.flows = tuple(new if flow is old else flow for flow in flows)
            if destination.waits and self._may_spread(destination):
                self._sort_later(destination)
        if not isinstance(old, Pause):
            self._leave_lines(old)

    def unlink(self, destination: Destination, flow: Flow | Pause) -> None:
        """Undo `link`."""
        destination.flows = tuple(other for other in destination.flows if other is not flow)
        flow.unlink(destination)
        if destination.waits and not destination.flows:
            self._sort_later(destination)
        self._tidy(destination)

    def _tidy(self, destination: Destination) -> None:
        """Drop a destination that needs no more work."""
        if not (
            destination.flows
            or destination.waits
            or destination.taking
            or destination.placing
            or destination.when < math.inf
        ):
            self._destinations.pop(destination.key, None)
            self.subscription.forget(destination.key)

    # Taking

    async def take_each(
        self, wanted: Sequence[tuple[Destination, int]]
    ) -> Sequence[Sequence[Lease]]:
        """Take mail of destinations, each with a limit, and note what is left in the queue."""
        for _, limit in wanted:
            self._asked += limit
        return await self._take_each(wanted) if wanted else ()

    async def _take_each(
        self, wanted: Sequence[tuple[Destination, int]]
    ) -> Sequence[Sequence[Lease]]:
        """`take_each`, with limits that `_asked` has already."""
        for destination, _ in wanted:
            destination.taking, destination.news = True, False
        results: Sequence[Taken | QueueError]
        try:
            keys = [(destination.key, limit) for destination, limit in wanted]
            results = await self.subscription.take_each(keys)
        except QueueError as error:
            results = [error] * len(wanted)
        finally:
            for destination, limit in wanted:
                destination.taking = False
                self._asked -= limit
        return [
            self._took(destination, taken)
            for (destination, _), taken in zip(wanted, results, strict=True)
        ]

    def _took(self, destination: Destination, taken: Taken | QueueError) -> Sequence[Lease]:
        dispatcher = self._dispatcher
        if isinstance(taken, QueueError):
            dispatcher.counters.queue_errors += 1
            self._say_unread("cannot read %s: %s", dispatcher.config.rabbitmq_outbox, taken)
            self._nothing_waits(destination)
            again = dispatcher.now() + READ_AGAIN_SECONDS
            self.dues.set_earlier(destination, again)
            dispatcher.times_changed(wall=again)
            return ()
        self.leased += len(taken.leases)
        if not (taken.more or destination.news):
            self._nothing_waits(destination)
        if taken.next_due is not None:
            self.dues.set_earlier(destination, taken.next_due)
            dispatcher.times_changed(wall=taken.next_due)
        if dispatcher.stopping:
            for lease in taken.leases:
                self.put_back(lease)
            return ()
        return taken.leases

    def _nothing_waits(self, destination: Destination) -> None:
        destination.waits = False
        for flow in destination.flows:
            flow.nothing_waits(destination)

    def _set_window(self, destination: Destination) -> None:
        """Set the window for arriving mail to what the destination's flows use."""
        window = max((flow.window for flow in destination.flows), default=0)
        window = max(window, self._first_window)
        if _is_proven(destination):
            window = max(window, self._direct)
        if destination.flows and window != destination.window:
            destination.window = window
            self.subscription.set_window(destination.key, window)

    def refill(self, flow: Flow) -> None:
        """Have mail taken for a flow if the flow needs more."""
        if flow.refilling or not flow.takes_mail or self._dispatcher.stopping:
            return
        window = min(flow.window, self._least) if self._memory_line else flow.window
        if flow.jobs and (len(flow.jobs) > window // 2 or not flow.sessions):
            return
        for destination in flow.ready:
            if not (destination.taking or destination.placing):
                break
        else:
            return  # the flows are pumped afterwards
        is_bare = not (flow.sessions or flow.held)
        if self._memory_for(flow) and not (is_bare and self._bare_line):
            self._leave_lines(flow)
            flow.refilling = True
            self._next_line[flow] = None
            self._serve_soon()
        else:
            self._wait_for_memory(flow)

    def _wait_for_memory(self, flow: Flow) -> None:
        if not (flow.sessions or flow.held):
            line = self._bare_line
        else:
            line = self._memory_line if flow.proven else self._new_line
        if flow not in line:
            self._leave_lines(flow)
            line[flow] = None

    def _serve_soon(self) -> None:
        """Take mail for the flows in line, together with those that join in this turn."""
        if not self._serves_soon:
            self._serves_soon = True
            self._dispatcher.start_soon(self._serve_lines)

    async def _serve_lines(self) -> None:
        self._serves_soon = False
        most = self.subscription.takes_together
        while wanted := self._next_takes(most):
            self._dispatcher.start_soon(self._take_for_flows, wanted)

    async def _take_for_flows(self, wanted: Sequence[tuple[Flow, Destination, int]]) -> None:
        found = await self._take_each([(each, limit) for _, each, limit in wanted])
        for (flow, destination, _), leases in zip(wanted, found, strict=True):
            for lease in leases:
                self._dispatcher.admit(lease, flow)
            self._set_window(destination)
            self.taken(destination)
        for flow in {flow: None for flow, *_ in wanted}:
            flow.refilling = False
            flow.pump()

    def _next_takes(self, most: int) -> list[tuple[Flow, Destination, int]]:
        """At most `most` takes, for the flows that have waited longest."""
        wanted: list[tuple[Flow, Destination, int]] = []
        while len(wanted) < most and (flow := self._next_flow()) is not None:
            flow.refilling = False
            if not flow.takes_mail or self._dispatcher.stopping:
                continue
            left = self._memory_for(flow)
            if not left:
                self._wait_for_memory(flow)
                continue
            need = min(flow.next_window() - len(flow.jobs), left)
            if others := len(self._next_line) + len(self._memory_line) + len(self._new_line):
                need = min(need, max(left // (others + 1), self._least))
            share = -(-need // max(len(flow.ready), 1))
            while (
                need > 0
                and len(wanted) < most
                and (destination := self.next_ready(flow)) is not None
            ):
                limit = min(share, need)
                need -= limit
                self._asked += limit
                destination.taking = flow.refilling = True
                wanted.append((flow, destination, limit))
        return wanted

    def _next_flow(self) -> Flow | None:
        """The flow in line that gets mail next."""
        if self._next_line:
            line = self._next_line
        elif self._bare_line and self._few_wait:
            line = self._bare_line
        elif self._memory_line and self.room:
            line = self._memory_line
        elif self._new_line and self.room > self._most - self._most // 2:
            line = self._new_line
        else:
            return None
        return line.popitem(last=False)[0]

    def _memory_for(self, flow: Flow) -> int:
        """How many more messages a flow may have in memory."""
        left = max(self._share_of(flow) - self.leased - self._asked, 0)
        if flow.held:
            return left
        if flow.sessions:
            return max(left, self._least)
        return max(left, 1) if self._few_wait else left

    @property
    def _few_wait(self) -> bool:
        """Whether few flows wait for a connection, each with a message."""
        waiting: int = self._dispatcher.openings.waiting
        return waiting < self._few

    def _share_of(self, flow: Flow) -> int:
        """How full memory may be when a flow takes more than one message.

        Flows that no host has let in yet leave half to the others: their hosts may be silent.
        """
        return self._most if flow.proven else self._most // 2

    def next_ready(self, flow: Flow) -> Destination | None:
        """The destination that a flow takes from next, in turn."""
        for destination in flow.ready:
            if not (destination.taking or destination.placing):
                del flow.ready[destination]  # to the end
                flow.ready[destination] = None
                return destination
        return None

    def taken(self, destination: Destination) -> None:
        """A take is over, and its messages are placed."""
        if destination.waits:
            self._tell_flows(destination)
        self._tidy(destination)

    # Sorting

    def _sort_later(self, destination: Destination) -> None:
        if not (
            destination.placing or destination.taking or self._dispatcher.stops.holds(destination)
        ):
            if not destination.listed:
                destination.listed = True
                self._unsorted.append(destination)
            self._sorters.unpark()

    async def sort(self) -> None:
        """Take some mail of destinations without a flow, to find the flow."""
        while True:
            while not (wanted := self._next_unsorted()):
                with trio.move_on_after(SORT_SECONDS if self._unsorted else math.inf):
                    await self._sorters.park()
            found = await self._take_each(wanted)
            self._sorting -= sum(limit for _, limit in wanted)
            self._sorted -= len(wanted)
            for (destination, _), leases in zip(wanted, found, strict=True):
                for lease in leases:
                    self._dispatcher.admit(lease)
                self.taken(destination)

    def _next_unsorted(self) -> list[tuple[Destination, int]]:
        """Destinations to sort next, each with the number of messages to take."""
        wanted: list[tuple[Destination, int]] = []
        if self._dispatcher.stopping:
            return wanted
        left = self._room_to_sort()
        most = self.subscription.takes_together
        tries = self._free_tries
        if self._may_wait:
            most = min(most, tries)
        while self._unsorted and left > 0 and len(wanted) < most:
            # Alternate newest and oldest: failing lookups hold up the oldest.
            self._newest = not self._newest
            destination = self._unsorted.pop() if self._newest else self._unsorted.popleft()
            destination.listed = False
            is_sorted = bool(destination.flows) and not self._may_spread(destination)
            if is_sorted or not destination.waits or destination.taking:
                continue  # nothing is to be found any more
            limit = min(destination.group, left)
            if destination.group == LEAST_WINDOW and len(wanted) >= tries:
                limit = 1  # a flow that waits for a slot or a try keeps no more
            destination.group = min(2 * destination.group, MAX_GROUP)
            wanted.append((destination, limit))
            left -= limit
            self._asked += limit
            self._sorting += limit
        self._sorted += len(wanted)
        if wanted:
            self._sort_again = monotonic() + SORT_SECONDS
        return wanted

    def _room_to_sort(self) -> int:
        """Messages that may be taken to find their flows.

        Flows that are busy may fill memory for long, and mail for others must not wait for them.
        """
        dispatcher = self._dispatcher
        beginners = dispatcher.openings.beginners + dispatcher.looked_up + self._sorting
        room = max(self.room, self._few - beginners)
        room = min(room, int(dispatcher.room_to_look_up) - self._sorting)
        few = room < self._enough or self._free_tries < dispatcher.openings.few_tries
        return 0 if few and self._may_wait else room

    @property
    def _free_tries(self) -> int:
        """How many more destinations could be tried at once."""
        return max(int(self._dispatcher.openings.free_tries) - self._sorted, 0)

    @property
    def _may_wait(self) -> bool:
        """Whether destinations that cannot be tried yet wait to be sorted."""
        return self._dispatcher.flows.many_send_nearby() and monotonic() < self._sort_again

    def placed(self, key: str, *, late: bool = False) -> None:
        """A message's hosts are found, and the message is placed.

        `late`: the lookup did not fit in time, and the message waits.
        """
        destination = self.destination(key)
        destination.placing -= 1
        if late and destination.waits and not destination.flows:
            destination.waits = False
            self.mail_at(destination, self._dispatcher.now() + LOOK_AGAIN_SECONDS)
        if destination.waits and not destination.placing:
            self._tell_flows(destination)
        self.serve()
        self._tidy(destination)

    def serve(self) -> None:
        """Sort more, if there is room."""
        if self._unsorted:
            self._sorters.unpark()

    # Pauses of messages

    def close(self, destination: Destination) -> None:
        """Leave new mail of a destination in the queue."""
        self.subscription.set_window(destination.key, 0)

    def reopen(self, key: str) -> None:
        """Sort the mail of a destination that was closed."""
        destination = self.destination(key)
        destination.window = self._first_window
        self.subscription.set_window(key, self._first_window)
        if destination.waits and not destination.flows:
            self._sort_later(destination)
        self._tidy(destination)

    def sort_again(self, condition: Callable[[str], bool]) -> None:
        """Find the flows of the destinations anew whose keys meet a condition."""
        for destination in list(self._destinations.values()):
            if destination.flows and condition(destination.key):
                for flow in destination.flows:
                    self.unlink(destination, flow)

    # Letting go

    def put_back(self, lease: Lease) -> None:
        """Return an untried message to the queue unchanged."""
        if not self._dispatcher.is_over:  # else all leases have been returned
            self._dispatcher.queues.release(lease)
            if not self._dispatcher.stopping:
                self._mail_waits(self.destination(lease.destination))
        self.lease_over()

    def lease_over(self) -> None:
        """A message has left memory."""
        self.leased -= 1
        if self._unsorted and self._room_to_sort() > 0:
            self._sorters.unpark()
        wait_for_room = self._memory_line or self._new_line
        if (wait_for_room and self.leased < self._most) or (self._bare_line and self._few_wait):
            self._serve_soon()

    def forget(self, flow: Flow | Pause) -> None:
        """A flow is over, or its mail is judged anew."""
        if not isinstance(flow, Pause):
            self._leave_lines(flow)
        for destination in list(flow.destinations):
            self.unlink(destination, flow)

    def _leave_lines(self, flow: Flow) -> None:
        if flow in self._next_line:
            del self._next_line[flow]
            flow.refilling = False
        self._bare_line.pop(flow, None)
        self._memory_line.pop(flow, None)
        self._new_line.pop(flow, None)

    def flush_log(self) -> None:
        self._say_unread.flush()


def _is_proven(destination: Destination) -> bool:
    return any(flow.proven for flow in destination.flows)
