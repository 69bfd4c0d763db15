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

Guarantees
----------
All of this is guarded by the one lock of the embedded queue: every method is called with the
lock held. A message is leased (`held`) before its commit, so no read can find it unleased.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from mailerq.queues.interface import Consumer, Lease

if TYPE_CHECKING:
    from mailerq.errors import QueueError

__all__ = ["EmbeddedConsumer", "Feed", "HeldLease"]

Position = tuple[int, int]

START: Final[Position] = (-1, -1)

HELD_BYTES: Final = 128 << 20
"""Bytes of messages that a consumer may hold; one message is always allowed."""


@dataclass(slots=True, eq=False)
class HeldLease(Lease):
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
        if not self.backlog:
            if self.next_due is None or self.next_due > now:
                return False
            self.backlog = True
        return any(consumer.hungry() for consumer in self.consumers)

    def begin_read(self) -> tuple[Position, int]:
        """Start a read: from where, and how many at most."""
        self.reading = True
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
        self.error: QueueError | None = None
        self.token = trio.lowlevel.current_trio_token()
        self._take = take

    def credit(self) -> int:
        if self.error is not None or (self.bytes >= HELD_BYTES and self.count):
            return 0
        return max(self.prefetch - self.count, 0)

    def hungry(self) -> bool:
        credit = self.credit()
        return credit > 0 and (not self.ready or credit * 4 >= self.prefetch)

    async def receive(self) -> Lease:
        """Wait for the next message that is due; `QueueDamaged` when the file is broken."""
        await trio.lowlevel.checkpoint_if_cancelled()
        lease = self._take(self)
        if lease is not None:
            return lease
        task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self.waiting.pop(task, None)
            return trio.lowlevel.Abort.SUCCEEDED

        self.waiting[task] = None
        found: Lease = await trio.lowlevel.wait_task_rescheduled(abort)
        return found
