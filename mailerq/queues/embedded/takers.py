"""Those who take messages from the embedded queue: consumers, and subscriptions by destination."""

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
from mailerq.queues.embedded.open_queues import (
    Destination,
    HeldLease,
    Load,
    OpenQueue,
    OpenQueues,
    Take,
    Taker,
)
from mailerq.queues.interface import Consumer, Lease, Receiver, Subscription, Taken

__all__ = ["EmbeddedConsumer", "EmbeddedSubscription"]

MAX_BODY_BYTES: Final = 1 << 16
"""A larger body comes to a subscriber only when it is asked for; any does while much is leased."""

REST_SECONDS: Final = 0.01
"""After a read a consumer that can take less than a quarter of its prefetch waits so long for the
next. Where few messages are settled at a time they would be read in such few otherwise."""


class EmbeddedConsumer(Taker, Consumer):
    """A consumer of the embedded queue; `receive` is for tasks of the loop that opened it."""

    def __init__(self, queues: OpenQueues, queue: OpenQueue, prefetch: int) -> None:
        super().__init__(queue, prefetch)
        self.ready: deque[HeldLease] = deque()
        self.waiting: dict[trio.lowlevel.Task, None] = {}
        self.starving = False
        """Somebody found nothing ready: whoever makes something ready has to wake."""
        self.reading = False
        self.rests_until = 0.0
        self._queues = queues
        queue.consumers.append(self)

    def wants_from(self) -> float | None:
        """From when a read is worth it, by time.monotonic; None: not before something changes."""
        credit = 0 if self.reading else self.credit()
        if credit and credit * 4 >= self.prefetch:
            return 0.0
        return self.rests_until if credit and not self.ready else None

    def wants(self) -> int:
        """How many messages to read now; 0 if that is not worth it."""
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
        """Wait for the next message that is due; `QueueDamaged` when the file is broken.

        It is no checkpoint when a message is ready.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if trio.lowlevel.current_trio_token() is not self.token:
            raise RuntimeError("a consumer belongs to the trio loop that opened it")
        lease = self._next()
        if lease is not None:
            return lease
        task = trio.lowlevel.current_task()
        self.waiting[task] = None
        # No function in here: compiled, it and what it sees of ours are a cycle, in which the
        # message that is found would stay until Python looks for those.
        found: Lease = await trio.lowlevel.wait_task_rescheduled(partial(self._leave, task))
        return found

    def _leave(self, task: trio.lowlevel.Task, _: object) -> trio.lowlevel.Abort:
        """A task that waits is cancelled."""
        self.waiting.pop(task, None)
        return trio.lowlevel.Abort.SUCCEEDED

    def _next(self) -> Lease | None:
        """The next message that is ready; without one, the next to come has to wake."""
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
        """Let tasks that wait have what is ready."""
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
    """A subscription to the embedded queue; all of it is for the loop that subscribed."""

    def __init__(
        self,
        queues: OpenQueues,
        queue: OpenQueue,
        receiver: Receiver,
        *,
        prefetch: int,
        window: int,
    ) -> None:
        super().__init__(queue, prefetch)
        self._queues = queues
        self._receiver = receiver
        self._window = window
        self._arrived: list[HeldLease] = []
        self._told: dict[str, int] = {}
        queue.subscriptions.append(self)

    def room(self, destination: Destination) -> int:
        window = self._window if destination.window is None else destination.window
        return min(self.credit(), window - len(destination.held))

    def body_bytes(self) -> int:
        return MAX_BODY_BYTES if self.bytes < open_queues.HELD_BYTES else 0

    def give(self, lease: HeldLease) -> bool:
        self._arrived.append(lease)
        return len(self._arrived) == 1 and not self._told

    def tell(self, key: str, due: int) -> bool:
        """There is news of a destination; whether the loop must be woken for that."""
        before = self._told.get(key)
        self._told[key] = due if before is None else min(due, before)
        return len(self._told) == 1 and not self._arrived

    def close(self) -> None:
        super().close()
        self._arrived.clear()
        self._told.clear()
        self.queue.subscriptions.remove(self)

    def wake(self) -> None:
        """Tell the receiver what there is."""
        with self._queues.lock:
            arrived, self._arrived = self._arrived, []
            told, self._told = self._told, {}
            arrived = [lease for lease in arrived if self.queue.held.get(lease.id) is lease]
        if arrived:
            self._receiver.arrived(arrived)
        for key, due in told.items():
            self._receiver.waiting(key, due / 1000)

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
            self._queues.jobs.put(job)
        taken: Taken = await trio.lowlevel.wait_task_rescheduled(job.abandon)
        return taken

    def _give_back(self, leases: Sequence[HeldLease]) -> None:
        """Nobody waits any more for what was taken."""
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
