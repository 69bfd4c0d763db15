"""Queues in memory that stand in for a backend, as `mailerq.queues.interface` describes it.

They pass the contract of `tests.queues.contract`, with two exceptions: what is published is gone
with the object, and all calls come from one loop. Failures are made by attributes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Final

import trio

from mailerq.address import queue_problem
from mailerq.config import Config
from mailerq.errors import MessageDamaged, MessageError, QueueError
from mailerq.message import Message, check_nesting, decode_properties, encode_properties
from mailerq.queues import DAMAGED_QUEUE, Depth, Lease, Publication, Settlement, SortedQueues
from mailerq.queues.interface import Consumer, Receiver, Subscription, Taken
from mailerq.rules.destinations import RETRY_LANE, SENDER_LANES, Place, level_of, place_of
from tests.support import DEADLINE

NOW: Final = 1_767_268_800.0  # 2026-01-01 12:00:00

OUTBOX: Final = "outbox"
"""The queue that is sorted by destination."""

UNSORTED: Final = Place("", 0)
CYCLE: Final = 5
"""One of five messages was tried before, while there are such and new ones."""


@dataclass(slots=True)
class Stored:
    """A message that a queue has. A consumer may change `message`, not `encoded` and `body`."""

    number: int
    due: float
    message: Message
    encoded: bytes
    body: bytes | None
    place: Place

    def restored(self) -> Message:
        if not self.encoded:
            return self.message  # no queue would have taken the message: a test put it here
        return Message(decode_properties(self.encoded), self.body)


class MemoryLease(Lease, eq=False):
    stored: Stored | None = None
    taker: MemoryTaker | None = None
    settling: bool = False


class Destination:
    """The mail of one destination that nobody has leased, and what subscribers know about it."""

    def __init__(self) -> None:
        self.lanes: dict[int, list[tuple[float, int]]] = {}
        self.backlog = False
        self.next_due: float | None = None
        self._last = {False: -1, True: -1}
        self._step = 0

    def add(self, stored: Stored) -> None:
        heappush(self.lanes.setdefault(stored.place.lane, []), (stored.due, stored.number))

    def first_due(self, after: float = -1.0) -> float | None:
        dues = (due for lane in self.lanes.values() for due, _ in lane if due > after)
        return min(dues, default=None)

    def has_due(self, now: float) -> bool:
        return any(lane[0][0] <= now for lane in self.lanes.values())

    def note(self, due: float, now: float) -> bool:
        """Mail lies here from now on; whether subscribers do not know that yet."""
        if due <= now:
            known = self.backlog or (self.next_due is not None and self.next_due <= now)
            self.backlog = True
            return not known
        if self.next_due is not None and self.next_due <= now:
            self.backlog, self.next_due = True, None
        known = self.next_due is not None and self.next_due <= due
        self.next_due = self.next_due if known else due
        return not known

    def looked(self, now: float) -> None:
        """A subscriber has seen what there is."""
        self.backlog = self.has_due(now)
        self.next_due = self.first_due(after=now)

    def pop(self, now: float) -> int | None:
        """The number of the next message in the fair order."""
        lanes = [number for number, lane in self.lanes.items() if lane[0][0] <= now]
        if not lanes:
            return None
        level = min(map(level_of, lanes))
        lanes = [lane for lane in lanes if level_of(lane) == level]
        retried = [lane for lane in lanes if lane & RETRY_LANE]
        new = [lane for lane in lanes if not lane & RETRY_LANE]
        tried = not new
        if new and retried:
            tried = self._step == CYCLE - 1
            self._step = (self._step + 1) % CYCLE
        lanes = retried if tried else new
        behind = [lane for lane in lanes if lane % SENDER_LANES > self._last[tried]]
        lane = min(behind or lanes)
        self._last[tried] = lane % SENDER_LANES
        _, number = heappop(self.lanes[lane])
        if not self.lanes[lane]:
            del self.lanes[lane]
        return number


class MemoryQueue:
    """One queue. To iterate gives the due time and the message of all that is not leased."""

    def __init__(self, name: str) -> None:
        self.is_sorted = name == OUTBOX
        self.waiting: dict[int, Stored] = {}
        self.destinations: dict[str, Destination] = {}

    def __iter__(self) -> Iterator[tuple[float, Message]]:
        return ((stored.due, stored.message) for stored in self.waiting.values())

    def __len__(self) -> int:
        return len(self.waiting)

    def destination(self, key: str) -> Destination:
        return self.destinations.setdefault(key, Destination())

    def add(self, stored: Stored) -> None:
        self.waiting[stored.number] = stored
        self.destination(stored.place.destination).add(stored)

    def pop(self, key: str, now: float) -> Stored | None:
        found = self.destinations.get(key)
        number = None if found is None else found.pop(now)
        return None if number is None else self.waiting.pop(number)

    def clear(self) -> int:
        count = len(self.waiting)
        self.waiting.clear()
        self.destinations.clear()
        return count


class ByName(dict[str, MemoryQueue]):
    def __missing__(self, name: str) -> MemoryQueue:
        queue = self[name] = MemoryQueue(name)
        return queue


class MemoryQueues(SortedQueues):
    """Queues that forget everything with the process, and fail when they are told to."""

    def __init__(self) -> None:
        self.now = NOW
        self.queues = ByName()
        self.leased: dict[int, MemoryLease] = {}
        self.released: list[Lease] = []
        self.groups: list[int] = []
        self.failures = 0
        self.impossible: set[str] = set()
        self.object_to: Callable[[Settlement], Exception | None] = lambda settlement: None
        self.may_ack = trio.Event()
        self.may_ack.set()
        self.subscriptions: dict[str, MemorySubscription] = {}
        self.late_above = 1 << 16
        """Subscribers get larger bodies than this many bytes only when they ask for them."""
        self.loads = 0
        self.damaged: set[int] = set()
        """Messages whose bodies cannot be used."""
        self.on_time: Callable[[], None] = lambda: None
        self._numbers = 0
        self._changed = trio.Event()

    def __getitem__(self, queue: str) -> list[Message]:
        return [message for _, message in self.queues[queue]]

    @property
    def due(self) -> int:
        return sum(due <= self.now for due, _ in self.queues[OUTBOX])

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.on_time()
        self.touch()

    def touch(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self) -> None:
        await self._changed.wait()

    async def until(self, condition: Callable[[MemoryQueues], bool]) -> None:
        with trio.move_on_after(DEADLINE):
            while not condition(self):
                await self.changed()
        depths = {name: len(queue) for name, queue in self.queues.items()}
        assert condition(self), (depths, self.leased)

    def put(
        self, message: Message, due: float | None = None, queue: str = OUTBOX, number: int = 0
    ) -> None:
        """Publish without a check, as the tests do to get at what no queue would take.

        A retry keeps its `number` and waits to be taken.
        """
        retry = number != 0
        if not retry:
            self._numbers += 1
            number = self._numbers
        found = self.queues[queue]
        place = place_of(message.properties) if found.is_sorted else UNSORTED
        try:
            encoded = encode_properties(message.properties)
        except (TypeError, ValueError):
            encoded = b""
        stored = Stored(
            number, self.now if due is None else due, message, encoded, message.body, place
        )
        subscription = self.subscriptions.get(queue)
        if retry or subscription is None or not subscription.hand_over(stored):
            self._keep(queue, stored, waited=due is not None)

    def _keep(self, name: str, stored: Stored, *, waited: bool = False) -> None:
        """Let a message lie in its queue, and say so where that is news.

        `waited`: its time was ahead when it was published.
        """
        queue = self.queues[name]
        queue.add(stored)
        key = stored.place.destination
        news = queue.destination(key).note(stored.due, self.now)
        subscription = self.subscriptions.get(name)
        is_due = stored.due <= self.now
        if (news or (waited and is_due)) and subscription is not None:
            subscription.tell(key, None if is_due and not waited else stored.due)

    def lease(self, taker: MemoryTaker, stored: Stored, late_above: int) -> MemoryLease:
        """Lease a message that does not lie in its queue any more."""
        message = stored.message
        size = len(message.body or b"")
        lease = MemoryLease(
            stored.number,
            taker.queue,
            message,
            stored.place.destination,
            size=size + len(stored.encoded),
            since=stored.due,
            stored=stored,
            taker=taker,
        )
        if size > late_above:
            lease.loaded = False
            lease.message = Message(message.properties)
        self.leased[lease.id] = lease
        self.touch()
        return lease

    async def publish(self, publications: Sequence[Publication]) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        for publication in publications:
            self.check(publication)
        for publication in publications:
            self.put(publication.message, publication.due, publication.queue)
        self._report()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def configure(self, config: Config) -> None:
        """There is nothing to configure."""

    def check(self, publication: Publication) -> None:
        name, properties = publication.queue, publication.message.properties
        if (problem := queue_problem(name)) is not None:
            raise MessageError(f"the queue name {name!a} {problem}")
        if name in self.impossible:
            raise MessageError(f"{name} is impossible")
        try:
            encoded = encode_properties(properties)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise MessageError(f"not to be written as JSON: {error}") from None
        check_nesting(properties, encoded)

    async def ack(self, settlements: Sequence[Settlement]) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        for settlement in settlements:
            for publication in (*settlement.publications, *settlement.others):
                self.check(publication)
        leases = [self._held(settlement.lease) for settlement in settlements]
        if len({lease.id for lease in leases}) < len(leases):
            raise ValueError("a lease is settled twice")
        for lease in leases:
            lease.settling = True
        with trio.CancelScope(shield=True):
            await self.may_ack.wait()
            await trio.lowlevel.cancel_shielded_checkpoint()
        try:
            self._fail(settlements)
        except Exception:
            self._unsettle(leases)
            raise
        self.groups.append(len(settlements))
        for lease in leases:
            del self.leased[lease.id]
        for lease, settlement in zip(leases, settlements, strict=True):
            self._publish_result(lease, settlement.publications)
            for publication in settlement.others:
                self.put(publication.message, publication.due, publication.queue)
        self._report()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _report(self) -> None:
        """Tell subscribers of a commit before anybody else sees what it published."""
        for subscription in self.subscriptions.values():
            subscription.report()
        self.touch()

    def _fail(self, settlements: Sequence[Settlement]) -> None:
        """Raise what a test asked for."""
        if self.failures:
            self.failures -= 1
            raise QueueError("disk full")
        for settlement in settlements:
            if (error := self.object_to(settlement)) is not None:
                raise error

    def _unsettle(self, leases: Sequence[MemoryLease]) -> None:
        """Nothing became of a settlement; what its consumer does not want any more goes back."""
        for lease in leases:
            lease.settling = False
            assert lease.taker is not None
            if lease.taker.closed and self.leased.get(lease.id) is lease:
                self._give_back(lease)

    def _publish_result(self, lease: MemoryLease, publications: Sequence[Publication]) -> None:
        assert lease.stored is not None
        number = lease.id
        for publication in publications:
            message = publication.message
            if publication.queue != lease.queue or not number:
                self.put(message, publication.due, publication.queue)
                continue
            if not lease.loaded and message.body is None:
                message = Message(message.properties, lease.stored.body)
            self.put(message, publication.due, publication.queue, number)
            number = 0

    def _held(self, lease: Lease) -> MemoryLease:
        held = self.leased.get(lease.id)
        if held is None or held is not lease or held.settling:
            raise ValueError(f"message {lease.id} of queue {lease.queue}: the lease is over")
        return held

    def release(self, lease: Lease) -> None:
        held = self._held(lease)
        self.released.append(lease)
        self._give_back(held)

    def _give_back(self, lease: MemoryLease) -> None:
        del self.leased[lease.id]
        assert lease.stored is not None
        # The consumer may have changed the message that it had.
        lease.stored.message = lease.stored.restored()
        self._keep(lease.queue, lease.stored)
        self.touch()

    @asynccontextmanager
    async def consume(self, queue: str, *, prefetch: int) -> AsyncIterator[Consumer]:
        consumer = MemoryConsumer(self, queue, prefetch)
        try:
            yield consumer
        finally:
            self._end(consumer)

    @asynccontextmanager
    async def subscribe(
        self, queue: str, receiver: Receiver, *, prefetch: int, window: int
    ) -> AsyncIterator[MemorySubscription]:
        if queue in self.subscriptions:
            raise NotImplementedError("queues in memory have one subscription each")
        subscription = MemorySubscription(self, queue, receiver, prefetch, window)
        self.subscriptions[queue] = subscription
        try:
            for key, destination in self.queues[queue].destinations.items():
                destination.looked(self.now)
                if destination.backlog:
                    subscription.tell(key, None)
                elif destination.next_due is not None:
                    subscription.tell(key, destination.next_due)
            yield subscription
        finally:
            del self.subscriptions[queue]
            self._end(subscription)

    def _end(self, taker: MemoryTaker) -> None:
        """What a consumer still holds goes back, except what is being settled."""
        taker.closed = True
        for lease in list(self.leased.values()):
            if lease.taker is taker and not lease.settling:
                self._give_back(lease)
        self.touch()

    async def depths(self) -> list[Depth]:
        await trio.lowlevel.checkpoint()
        depths = []
        for name in sorted(self.queues):
            dues = [due for due, _ in self.queues[name]]
            dues += [lease.since for lease in self.leased.values() if lease.queue == name]
            now = sum(due <= self.now for due in dues)
            depths.append(Depth(name, now, len(dues) - now))
        return depths

    async def purge(self, queue: str) -> int:
        await trio.lowlevel.checkpoint()
        return self.queues[queue].clear()

    def statistics(self) -> dict[str, Any]:
        return {"commits": len(self.groups), "leased": len(self.leased)}

    def wake(self, *, everything: bool = False) -> None:
        self.touch()

    def set_aside(self, lease: MemoryLease) -> None:
        del self.leased[lease.id]
        assert lease.stored is not None
        self.put(lease.stored.restored(), queue=DAMAGED_QUEUE)
        self.touch()


class MemoryTaker:
    """What consumers and subscriptions share."""

    def __init__(self, queues: MemoryQueues, queue: str, prefetch: int) -> None:
        if prefetch < 1:
            raise ValueError(f"prefetch {prefetch}: expected 1 or more")
        self.queues, self.queue, self.prefetch = queues, queue, prefetch
        self.closed = False

    @property
    def is_full(self) -> bool:
        held = sum(lease.taker is self for lease in self.queues.leased.values())
        return held >= self.prefetch

    def check_open(self) -> None:
        if self.closed:
            raise trio.ClosedResourceError(f"nobody takes from {self.queue} here any more")


class MemoryConsumer(MemoryTaker, Consumer):
    """Takes from the destinations of a queue in turn."""

    def __init__(self, queues: MemoryQueues, queue: str, prefetch: int) -> None:
        super().__init__(queues, queue, prefetch)
        self._served: dict[str, None] = {}
        """Destinations; the last served stands last."""

    async def receive(self) -> Lease:
        await trio.lowlevel.checkpoint()
        while True:
            self.check_open()
            if not self.is_full and (stored := self._next()) is not None:
                return self.queues.lease(self, stored, len(stored.message.body or b""))
            await self.queues.changed()

    def _next(self) -> Stored | None:
        queue = self.queues.queues[self.queue]
        fresh = [key for key in queue.destinations if key not in self._served]
        for key in (*fresh, *self._served):
            if (stored := queue.pop(key, self.queues.now)) is not None:
                self._served.pop(key, None)
                self._served[key] = None
                return stored
        return None


class MemorySubscription(MemoryTaker, Subscription):
    """A queue taken by destination."""

    takes_together = 100

    def __init__(
        self, queues: MemoryQueues, queue: str, receiver: Receiver, prefetch: int, window: int
    ) -> None:
        super().__init__(queues, queue, prefetch)
        self.receiver, self.window = receiver, window
        self.windows: dict[str, int] = {}
        self.takes: list[tuple[str, int]] = []
        self._arrived: list[MemoryLease] = []
        self._told: list[tuple[str, float | None]] = []
        self._token = trio.lowlevel.current_trio_token()

    def hand_over(self, stored: Stored) -> bool:
        """Whether a message goes to the receiver directly."""
        key = stored.place.destination
        lies = self.queues.queues[self.queue].destinations.get(key)
        if (
            stored.due > self.queues.now
            or self.is_full
            or self._leased(key) >= self.windows.get(key, self.window)
            or (lies is not None and lies.has_due(self.queues.now))
        ):
            return False
        self._wake()
        self._arrived.append(self.queues.lease(self, stored, self.queues.late_above))
        return True

    def _leased(self, key: str) -> int:
        leases = self.queues.leased.values()
        return sum(lease.destination == key and lease.queue == self.queue for lease in leases)

    def tell(self, key: str, due: float | None) -> None:
        self._wake()
        self._told.append((key, due))

    def _wake(self) -> None:
        if not (self._arrived or self._told):
            self._token.run_sync_soon(self.report)

    def report(self) -> None:
        """Tell the receiver what is new."""
        arrived, self._arrived = self._arrived, []
        told, self._told = self._told, []
        if self.closed:
            return
        if arrived:
            self.receiver.arrived(arrived)
        for key, due in told:
            self.receiver.waiting(key, due)

    def set_window(self, destination: str, messages: int) -> None:
        self.check_open()
        self.windows[destination] = messages

    async def take(self, destination: str, limit: int) -> Taken:
        (taken,) = await self.take_each([(destination, limit)])
        assert isinstance(taken, Taken)
        return taken

    async def take_each(self, wanted: Sequence[tuple[str, int]]) -> Sequence[Taken | QueueError]:
        if any(limit < 1 for _, limit in wanted):
            raise ValueError(f"limits {wanted}: expected 1 or more")
        await trio.lowlevel.checkpoint()
        self.check_open()
        return [self._take(destination, limit) for destination, limit in wanted]

    def _take(self, destination: str, limit: int) -> Taken:
        self.takes.append((destination, limit))
        queue, now = self.queues.queues[self.queue], self.queues.now
        leases: list[Lease] = []
        while len(leases) < limit and (stored := queue.pop(destination, now)) is not None:
            leases.append(self.queues.lease(self, stored, self.queues.late_above))
        lies = queue.destinations.get(destination)
        if lies is None:
            return Taken(leases, more=False, next_due=None)
        lies.looked(now)
        return Taken(leases, lies.backlog, lies.next_due)

    async def load(self, lease: Lease) -> None:
        await trio.lowlevel.checkpoint()
        self.check_open()
        if lease.loaded:
            return
        held = self.queues._held(lease)
        assert held.stored is not None
        if held.id in self.queues.damaged:
            self.queues.set_aside(held)
            raise MessageDamaged("the checksum does not fit")
        held.message.body = held.stored.body
        held.loaded = True
        self.queues.loads += 1

    def forget(self, destination: str) -> None:
        self.windows.pop(destination, None)
