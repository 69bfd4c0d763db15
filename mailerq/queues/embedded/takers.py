"""Takers of the embedded queue: consumers, and subscriptions by destination."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Final

import outcome
import trio

from mailerq.errors import QueueDamaged, QueueError
from mailerq.queues.embedded import open_queues
from mailerq.queues.embedded.batcher import Batcher
from mailerq.queues.embedded.open_queues import (
    Destination,
    HeldLease,
    Load,
    OpenQueue,
    OpenQueues,
    Take,
    TakeGroup,
    Taker,
)
from mailerq.queues.interface import Consumer, Lease, Receiver, Subscription, Taken

__all__ = ["EmbeddedConsumer", "EmbeddedSubscription"]

MAX_BODY_BYTES: Final = 1 << 16
"""A larger body is loaded on request only; while much is leased, every body is."""

DIRECT_BYTES: Final = 64 << 20
"""New mail brings its body along, however large, while leased mail in memory takes less than this
many bytes."""

TAKES_TOGETHER: Final = 100
"""Takes that the reader serves with two statements and one transaction."""

REST_SECONDS: Final = 0.01
"""Pause after a read for a consumer that can take less than a quarter of its prefetch. Otherwise,
if few messages are settled at a time, each read would bring only those few."""


class EmbeddedConsumer(Taker, Consumer):
    """A consumer of the embedded queue; call `receive` on the loop that opened it."""

    def __init__(self, queues: OpenQueues, queue: OpenQueue, prefetch: int) -> None:
        super().__init__(queue, prefetch)
        self.ready: deque[HeldLease] = deque()
        self.waiting: dict[trio.lowlevel.Task, None] = {}
        self.starving = False
        """A task found no message ready: the next message must wake it."""
        self.reading = False
        self.rests_until = 0.0
        self._queues = queues
        queue.consumers.append(self)

    def wants_from(self) -> float | None:
        """When a read is worthwhile, by time.monotonic; None: not before something changes."""
        credit = 0 if self.reading else self.credit()
        if credit and credit * 4 >= self.prefetch:
            return 0.0
        return self.rests_until if credit and not self.ready else None

    def wants(self) -> int:
        """How many messages to read now; 0 if a read is not worthwhile."""
        at = self.wants_from()
        return self.credit() if at is not None and time.monotonic() >= at else 0

    def taken(self) -> None:
        self.reading = False
        self.rests_until = time.monotonic() + REST_SECONDS

    def give(self, lease: HeldLease) -> bool:
        self.ready.append(lease)
        starving, self.starving = self.starving, False
        return starving

    def damaged(self) -> None:
        self.starving = False

    def close(self) -> None:
        super().close()
        for task in self.waiting:
            error = trio.ClosedResourceError("the consumer is closed")
            trio.lowlevel.reschedule(task, outcome.Error(error))
        self.waiting.clear()
        self.ready.clear()
        self.queue.consumers.remove(self)

    async def receive(self) -> Lease:
        """Wait for the next due message; `QueueDamaged` if the file is broken.

        Not a checkpoint if a message is ready.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if trio.lowlevel.current_trio_token() is not self.token:
            raise RuntimeError("a consumer belongs to the trio loop that opened it")
        lease = self._next()
        if lease is not None:
            return lease
        task = trio.lowlevel.current_task()
        self.waiting[task] = None
        # No nested function here: compiled, it forms a cycle with its captured variables, and the
        # received message would stay in memory until Python's cycle collector runs.
        found: Lease = await trio.lowlevel.wait_task_rescheduled(partial(self._leave, task))
        return found

    def _leave(self, task: trio.lowlevel.Task, _: object) -> trio.lowlevel.Abort:
        """A waiting task is cancelled."""
        self.waiting.pop(task, None)
        return trio.lowlevel.Abort.SUCCEEDED

    def _next(self) -> Lease | None:
        """The next ready message; if none, the next one to come must wake the loop."""
        with self._queues.lock:
            if self.closed:
                raise trio.ClosedResourceError("the consumer is closed")
            if self.error is not None:
                raise QueueDamaged(str(self.error))
            lease = self.ready.popleft() if self.ready else None
            self.starving = lease is None
            if not self.ready:
                self._queues.pump(self.queue)
            return lease

    def wake(self) -> None:
        """Give ready messages to waiting tasks."""
        with self._queues.lock:
            waiting = self.waiting
            while waiting and (self.ready or self.error is not None):
                task = next(iter(waiting))
                del waiting[task]
                if self.ready:
                    trio.lowlevel.reschedule(task, outcome.Value(self.ready.popleft()))
                else:
                    error = QueueDamaged(str(self.error))
                    trio.lowlevel.reschedule(task, outcome.Error(error))
            self.starving = bool(waiting)
            if not self.ready:
                self._queues.pump(self.queue)


class EmbeddedSubscription(Taker, Subscription):
    """A subscription to the embedded queue; call all methods on the loop that subscribed."""

    takes_together = TAKES_TOGETHER

    def __init__(
        self,
        queues: OpenQueues,
        queue: OpenQueue,
        batcher: Batcher,
        receiver: Receiver,
        *,
        prefetch: int,
        window: int,
    ) -> None:
        super().__init__(queue, prefetch)
        self._queues = queues
        self._batcher = batcher
        self._receiver = receiver
        self._window = window
        self._arrived: list[HeldLease] = []
        # News of destinations: mail is due, and the first time for which mail waits.
        self._due: dict[str, None] = {}
        self._times: dict[str, int] = {}
        queue.subscriptions.append(self)

    def room(self, destination: Destination) -> int:
        window = self._window if destination.window is None else destination.window
        return min(self.credit(), window - len(destination.held))

    def body_bytes(self) -> int:
        return MAX_BODY_BYTES if self.bytes < open_queues.HELD_BYTES else 0

    def direct_bytes(self) -> int:
        # A body that is in memory anyway need not be read again, nor be there twice meanwhile.
        return max(self.body_bytes(), DIRECT_BYTES - self.bytes)

    def give(self, lease: HeldLease) -> bool:
        has_news = self._has_news
        self._arrived.append(lease)
        return not has_news

    def tell(self, key: str, due: int | None) -> bool:
        """Note news of a destination; return whether the loop must be woken for it.

        `due` in milliseconds; None if mail is due.
        """
        has_news = self._has_news
        if due is None:
            self._due[key] = None
        else:
            self._times[key] = min(due, self._times.get(key, due))
        return not has_news

    @property
    def _has_news(self) -> bool:
        return bool(self._arrived or self._due or self._times)

    def close(self) -> None:
        super().close()
        self._arrived.clear()
        self._due.clear()
        self._times.clear()
        self.queue.subscriptions.remove(self)

    def wake(self) -> None:
        """Report news to the receiver."""
        with self._queues.lock:
            arrived, self._arrived = self._arrived, []
            due, self._due = self._due, {}
            times, self._times = self._times, {}
            arrived = [lease for lease in arrived if self.queue.held.get(lease.id) is lease]
        if arrived:
            self._receiver.arrived(arrived)
        for key in due:
            self._receiver.waiting(key, None)
        for key, time_ in times.items():
            self._receiver.waiting(key, time_ / 1000)

    def set_window(self, destination: str, messages: int) -> None:
        with self._queues.lock:
            self._check_open()
            self.queue.destination(destination).window = messages

    def forget(self, destination: str) -> None:
        with self._queues.lock:
            found = self.queue.destinations.get(destination)
            if found is not None:
                found.window = None
                self.queue.tidy(found)

    async def take(self, destination: str, limit: int) -> Taken:
        if limit < 1:
            raise ValueError(f"limit {limit}: expected 1 or more")
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._queues.lock:
            self._check_open()
            job = Take(self.queue, destination, limit, self, self._give_back)
            job.wait_here()
            self._batcher.add_take(job)
        taken: Taken = await trio.lowlevel.wait_task_rescheduled(job.abandon)
        return taken

    async def take_each(self, wanted: Sequence[tuple[str, int]]) -> Sequence[Taken | QueueError]:
        if any(limit < 1 for _, limit in wanted):
            raise ValueError(f"limits {wanted}: expected 1 or more")
        await trio.lowlevel.checkpoint_if_cancelled()
        takes = [
            Take(self.queue, destination, limit, self, self._give_back)
            for destination, limit in wanted
        ]
        with self._queues.lock:
            self._check_open()
            group = TakeGroup(takes)
            for take in takes:
                self._batcher.add_take(take)
        await trio.lowlevel.wait_task_rescheduled(group.abandon)
        return [take.taken() for take in takes]

    def _give_back(self, leases: Sequence[HeldLease]) -> None:
        """Give back leases whose task no longer waits."""
        with self._queues.changing():
            for lease in leases:
                if self.queue.held.get(lease.id) is lease and not lease.settling:
                    self._queues.give_back(self.queue, lease)

    async def load(self, lease: Lease) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._queues.lock:
            self._check_open()
            if lease.loaded:
                return
            if not isinstance(lease, HeldLease) or self.queue.held.get(lease.id) is not lease:
                raise ValueError(f"message {lease.id} of queue {lease.queue}: the lease is over")
            job = Load(self.queue, lease)
            job.wait_here()
            self._queues.jobs.put(job)
        body: bytes = await trio.lowlevel.wait_task_rescheduled(job.abandon)
        with self._queues.lock:
            if lease.memory >= lease.size:
                return  # another task was faster
            lease.stored_body = body
            lease.loaded = True
            if self.queue.held.get(lease.id) is lease:
                lease.memory += len(body)
                self.bytes += len(body)
        lease.message.body = body

    def _check_open(self) -> None:
        if trio.lowlevel.current_trio_token() is not self.token:
            raise RuntimeError("a subscription belongs to the trio loop that opened it")
        if self.closed:
            raise trio.ClosedResourceError("the subscription is closed")
        if self.error is not None:
            raise QueueDamaged(str(self.error))
        if self._queues.reader_ends:
            raise QueueError("the queue is closed")
