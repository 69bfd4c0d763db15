"""Who gets which message: the bookkeeping between the queue file and its consumers.

Theory of operation
-------------------
A `Feed` stands for one queue that is consumed. Messages come to it in two ways: handed over
by the writer as they are committed, while a consumer has credit and nothing older waits in
the file; or read from the file, in the order of (due, id), by the reader.

`position` is the last (due, id) that was read. Everything at or below it is leased, or gone,
or was noted since: `note` sets the position back for what comes in below it. `backlog` says
that there may be due messages above the position. `next_due` is when the next delayed one
becomes due, as far as is known; a read finds it anew.

A read sees the file as it was when the read began. What was settled meanwhile is kept in
`settled` until the read ends, so that it is not handed out a second time.

`Feeds` is what the writer, the reader and the tasks share: all feeds and the lock on them.

Guarantees
----------
- Every method of a feed is called with `Feeds.lock` held, and the lock is never held while
  the file is read or written.
- A message is leased (`held`) before its commit, so no read can find it unleased.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Final

import outcome
import trio

from mailerq.errors import QueueDamaged
from mailerq.queues.embedded.sqlite_file import mark
from mailerq.queues.interface import Consumer, Lease

__all__ = ["START", "EmbeddedConsumer", "Feed", "Feeds", "HeldLease", "Position"]

logger = logging.getLogger("mailerq.queues")

Position = tuple[int, int]

START: Final[Position] = (-1, -1)

HELD_BYTES: Final = 128 << 20
"""Bytes of messages that a consumer may hold; one message is always allowed."""

REST_SHARE: Final = 20
REST_SECONDS: Final = 0.01
"""How long after a read there is none for less than a quarter of what a consumer may hold: so many
times as long as it took, at most so many seconds. Where few messages are settled at a time, they
would be read in such few otherwise, with two queries each time, and the reader do nothing else."""


class HeldLease(Lease, eq=False):
    """A lease as this backend knows it: where the message lies, and who has it."""

    due: int
    size: int
    reference: int | None
    body_crc: int | None
    stored_body: bytes | None
    consumer: EmbeddedConsumer | None = None
    settling: bool = False


@dataclass(slots=True, eq=False)
class Feed:
    """One consumed queue."""

    queue: str
    consumers: list[EmbeddedConsumer] = field(default_factory=list)
    held: dict[int, HeldLease] = field(default_factory=dict)
    settled: set[int] = field(default_factory=set)
    position: Position = START
    rewound: Position | None = None
    backlog: bool = True
    next_due: int | None = None
    reading: bool = False
    began: float = 0.0  # the read under way or the last one, by time.monotonic
    rests_until: float = 0.0  # the same; 0: it has rested, and somebody has looked since

    def credit(self) -> int:
        """How many messages the consumers would take."""
        return sum(consumer.credit() for consumer in self.consumers)

    def choose(self) -> EmbeddedConsumer | None:
        """The consumer that has most room, or None."""
        best, most = None, 0
        for consumer in self.consumers:
            credit = consumer.credit()
            if credit > most:
                best, most = consumer, credit
        return best

    def hold(self, lease: HeldLease, consumer: EmbeddedConsumer) -> None:
        """Count a message against the consumer that is to get it."""
        lease.consumer = consumer
        consumer.count += 1
        consumer.bytes += lease.size
        self.held[lease.id] = lease

    def drop(self, lease: HeldLease) -> None:
        """End a lease: the message is gone, or goes back."""
        if self.held.pop(lease.id, None) is None:
            return
        if self.reading:
            self.settled.add(lease.id)
        consumer = lease.consumer
        if consumer is not None:
            consumer.count -= 1
            consumer.bytes -= lease.size

    def direct(self, now: int) -> bool:
        """Whether a message that comes now may pass by the file: nothing older is in it."""
        return not (
            self.reading or self.backlog or (self.next_due is not None and self.next_due <= now)
        )

    def note(self, due: int, number: int, now: int) -> None:
        """A message that nobody holds lies in the file from now on."""
        if due > now:
            if self.next_due is None or due < self.next_due:
                self.next_due = due
            return
        self.backlog = True
        self.rewind((due, number - 1))

    def rewind(self, position: Position) -> None:
        """Let the next read begin no later than above `position`."""
        if self.reading:
            if self.rewound is None or position < self.rewound:
                self.rewound = position
        elif position < self.position:
            self.position = position

    def hungry(self, now: int) -> bool:
        """Whether a read is worth it: something may be due, and consumers run dry."""
        if self.reading:
            return False
        if self.rests_until and time.monotonic() >= self.rests_until:
            self.rests_until = 0.0
        if not self.backlog:
            if self.next_due is None or self.next_due > now:
                return False
            self.backlog = True
            self.next_due = None
        rested = not self.rests_until
        return any(consumer.hungry(rested) for consumer in self.consumers)

    def begin_read(self) -> tuple[Position, int]:
        """Start a read: from where, and how many at most."""
        self.reading = True
        self.began = time.monotonic()
        self.backlog = False
        self.next_due = None
        self.rewound = None
        self.settled.clear()
        # From the start, what is leased lies in the way.
        ahead = len(self.held) if self.position == START else 0
        return self.position, self.credit() + ahead

    def end_read(self, reached: Position | None, more: bool, later: int | None) -> None:
        """A read is over; it came up to `reached`, and `more` is due above that."""
        self.reading = False
        self.settled.clear()
        now = time.monotonic()
        self.rests_until = now + min(REST_SHARE * (now - self.began), REST_SECONDS)
        if reached is not None:
            self.position = reached
        if self.rewound is not None:
            self.backlog = True
            self.position = min(self.position, self.rewound)
            self.rewound = None
        if more:
            self.backlog = True
        if later is not None and (self.next_due is None or later < self.next_due):
            self.next_due = later


class EmbeddedConsumer(Consumer):
    """A consumer of the embedded queue; `receive` is for tasks of the loop that opened it."""

    def __init__(
        self, feed: Feed, prefetch: int, take: Callable[[EmbeddedConsumer], Lease | None]
    ) -> None:
        self.feed = feed
        self.prefetch = prefetch
        self.count = 0
        """Messages on the way to the consumer, ready, or leased and not settled."""
        self.bytes = 0
        self.ready: deque[HeldLease] = deque()
        self.waiting: dict[trio.lowlevel.Task, None] = {}
        self.starving = False
        """Somebody found nothing ready: who makes something ready has to notify."""
        self.error: QueueDamaged | None = None
        self.closed = False
        self.token = trio.lowlevel.current_trio_token()
        self._take = take

    def credit(self) -> int:
        if self.error is not None or (self.bytes >= HELD_BYTES and self.count):
            return 0
        return max(self.prefetch - self.count, 0)

    def hungry(self, rested: bool) -> bool:
        """Whether a read is worth it for this one; `rested`: the last one was some time ago."""
        credit = self.credit()
        return credit > 0 and (credit * 4 >= self.prefetch or (rested and not self.ready))

    async def receive(self) -> Lease:
        """Wait for the next message that is due; `QueueDamaged` when the file is broken.

        It is no checkpoint when a message is ready.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if trio.lowlevel.current_trio_token() is not self.token:
            raise RuntimeError("a consumer belongs to the trio loop that opened it")
        lease = self._take(self)
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


@dataclass(slots=True, frozen=True, eq=False)
class Read:
    """A job for the reader: what is due in a queue, above `after`, at most `limit`."""

    feed: Feed
    after: Position
    limit: int


class Feeds:
    """All feeds of one embedded queue, and the lock on them."""

    def __init__(self, path: str, clock: Callable[[], float]) -> None:
        self.path = path
        self.clock = clock
        self.lock = threading.Lock()
        self.feeds: dict[str, Feed] = {}
        self.reads: SimpleQueue[Read | None] = SimpleQueue()
        self.fetcher_ends = False
        self.damaged: QueueDamaged | None = None

    def now(self) -> int:
        """The wall clock in milliseconds."""
        return int(self.clock() * 1000)

    # With the lock held

    def get(self, queue: str) -> Feed | None:
        return self.feeds.get(queue)

    def open(self, queue: str, prefetch: int) -> EmbeddedConsumer:
        """Add a consumer to a queue, and wake the reader, which sleeps while there is none."""
        feed = self.feeds.setdefault(queue, Feed(queue))
        consumer = EmbeddedConsumer(feed, prefetch, self.take)
        consumer.error = self.damaged
        feed.consumers.append(consumer)
        self.pump(feed)
        self.reads.put(None)
        return consumer

    def close(self, consumer: EmbeddedConsumer) -> None:
        """Take a consumer away; what it holds goes back, but what is being settled.

        On the consumer's own loop.
        """
        feed = consumer.feed
        consumer.closed = True
        for task in consumer.waiting:
            error = trio.ClosedResourceError("the consumer is closed")
            trio.lowlevel.reschedule(task, outcome.Error(error))
        consumer.waiting.clear()
        feed.consumers.remove(consumer)
        consumer.ready.clear()
        for lease in list(feed.held.values()):
            if lease.consumer is consumer and not lease.settling:
                self.give_back(feed, lease)
        self.pump(feed)
        self.tidy(feed)

    def give_back(self, feed: Feed, lease: HeldLease) -> None:
        """End a lease of a message that stays in the file."""
        feed.drop(lease)
        feed.note(lease.due, lease.id, self.now())

    def look_again(self, feed: Feed) -> None:
        """Read a queue anew from its start."""
        feed.backlog = True
        feed.rewind(START)
        self.pump(feed)

    def pump(self, feed: Feed) -> None:
        """Have the reader read for a feed if that is worth it."""
        if not self.fetcher_ends and feed.hungry(self.now()):
            self.reads.put(Read(feed, *feed.begin_read()))

    def set_alarm(self, feed: Feed, now: int) -> None:
        """Wake the reader, in case it sleeps beyond the next due time."""
        if feed.next_due is not None and feed.next_due < now + 1000:
            self.reads.put(None)

    def tidy(self, feed: Feed) -> None:
        """Forget a feed that nobody consumes any more."""
        if not feed.consumers and not feed.held and not feed.reading:
            self.feeds.pop(feed.queue, None)

    def make_ready(self, lease: HeldLease, notify: set[EmbeddedConsumer]) -> None:
        """Let a consumer have its message; who is to be notified is added to `notify`."""
        consumer = lease.consumer
        assert consumer is not None
        consumer.ready.append(lease)
        if consumer.starving:
            consumer.starving = False
            notify.add(consumer)

    # Without the lock

    def take(self, consumer: EmbeddedConsumer) -> Lease | None:
        """The next message that is ready; without one, the next to come is to be notified."""
        with self.lock:
            if consumer.closed:
                raise trio.ClosedResourceError("the consumer is closed")
            if consumer.error is not None:
                raise QueueDamaged(str(consumer.error))
            lease = consumer.ready.popleft() if consumer.ready else None
            consumer.starving = lease is None
            if not consumer.ready:
                self.pump(consumer.feed)
            return lease

    def notify(self, consumers: Iterable[EmbeddedConsumer]) -> None:
        """Wake what waits for these consumers, each on its own loop."""
        for consumer in consumers:
            # A loop that has ended took its consumer's context with it.
            with suppress(trio.RunFinishedError):
                consumer.token.run_sync_soon(self.wake, consumer)

    def wake(self, consumer: EmbeddedConsumer) -> None:
        """Let what waits for a consumer have what is ready, on the consumer's own loop."""
        with self.lock:
            waiting = consumer.waiting
            while waiting and (consumer.ready or consumer.error is not None):
                task = next(iter(waiting))
                del waiting[task]
                if consumer.ready:
                    trio.lowlevel.reschedule(task, outcome.Value(consumer.ready.popleft()))
                else:
                    error = QueueDamaged(str(consumer.error))
                    trio.lowlevel.reschedule(task, outcome.Error(error))
            consumer.starving = bool(waiting)
            if not consumer.ready:
                self.pump(consumer.feed)

    def damage(self, problem: QueueDamaged) -> None:
        """The file is broken: nothing goes in or out until a restart has salvaged it."""
        with self.lock:
            if self.damaged is not None:
                return
            self.damaged = problem
            consumers = {consumer for feed in self.feeds.values() for consumer in feed.consumers}
            for consumer in consumers:
                consumer.error = problem
                consumer.starving = False
        logger.critical("%s; stop mailerq and start it again", problem)
        try:
            mark(self.path, str(problem))
        except OSError as error:
            logger.critical("%s", error)
        self.notify(consumers)
