"""Assigns messages to takers: the bookkeeping between the queue file and its consumers.

Theory of operation
-------------------
An `OpenQueue` is a queue with takers: consumers, or a subscription by destination. Mail reaches
them in two ways. The writer hands mail over on commit, while its destination has room and no older
mail of that destination waits in the file. Otherwise the reader reads some mail of one destination
at a time from the file.

A `Destination` describes the unleased mail in the file: `backlog` says that some may be due,
`next_due` when the next becomes due. Both may overstate, and a read corrects them. They never
understate: they are set when mail is noted (committed, given back, found by a scan or among the
changes of other processes), and cleared only when a read begins, which finds the current state. No
position in the file is kept: leased mail lies at the front of its lane, and a read walks past it.
A destination without mail, leases and its own window is dropped. Until the first scan of a queue
has ended (`complete`), an unknown destination may have mail in the file; afterwards it has none.

A subscriber is told of a destination when the first mail is noted there, or mail that is due
sooner, and takes at any time. Consumers take from destinations in turn, and the reader keeps their
timers: `turns` are destinations that may have due mail, `timers` those that will have some.

A read sees the file as it was when the read began. Reads of several destinations may be one
transaction: all of them are marked (`begin_read`) before it begins. Messages settled until the
transaction ends are kept in `settled`, so that none is handed out twice.

`OpenQueues` holds all open queues and a lock; the writer, the reader and the tasks share it.

Guarantees
----------
- The lock is held around every method that does not say otherwise, and never while the file is read
  or written, nor while a subscriber is called.
- A message is leased (`held`) before its commit, so no read can find it unleased.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from heapq import heappop, heappush
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, Protocol, cast

import outcome
import trio

from mailerq.errors import QueueDamaged, QueueError
from mailerq.message import Message
from mailerq.queues.embedded.layout import HELD, UNSORTED
from mailerq.queues.embedded.queue_reader import BEFORE_LANES
from mailerq.queues.embedded.records import Insert, Row
from mailerq.queues.embedded.sqlite_file import mark
from mailerq.queues.embedded.taking import ANY_SIZE, FIRST_TURN, Turns
from mailerq.queues.interface import Lease, Taken

if TYPE_CHECKING:
    from mailerq.queues.embedded.takers import EmbeddedConsumer, EmbeddedSubscription

__all__ = [
    "Checked",
    "Destination",
    "HeldLease",
    "Job",
    "Load",
    "OpenQueue",
    "OpenQueues",
    "Scan",
    "Take",
    "TakeGroup",
    "Taker",
    "Wakeable",
    "wake_all",
]

Checked = tuple[Row, int | None, Message | str]
"""A row, the size of its body, and its message or the reason why it is damaged."""

logger = logging.getLogger("mailerq.queues")

HELD_BYTES: Final = 128 << 20
"""Bytes of messages that one taker may hold; one message is always allowed."""

NEVER: Final = 1 << 62
"""The due time of mail that is not there, in milliseconds."""


class Wakeable(Protocol):
    """An object with an event for its trio loop."""

    token: trio.lowlevel.TrioToken | None

    def wake(self) -> None:
        """Called on that loop, without the lock."""


def wake_all(waiting: Iterable[Wakeable]) -> None:
    """Wake all objects, with one call into each loop. Call without the lock."""
    loops: defaultdict[trio.lowlevel.TrioToken, list[Wakeable]] = defaultdict(list)
    for each in waiting:
        if each.token is not None:
            loops[each.token].append(each)
    for token, those in loops.items():
        # A loop that has ended took its tasks and takers along.
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(_wake_each, those)


def _wake_each(waiting: Sequence[Wakeable]) -> None:
    for each in waiting:
        each.wake()


class HeldLease(Lease, eq=False):
    """A lease of this backend: where the message lies, and its taker."""

    due: int = 0
    reference: int | None = None
    body_crc: int | None = None
    stored_body: bytes | None = None
    memory: int = 0
    """Bytes of the message in memory."""
    taker: Taker | None = None
    settling: bool = False

    def keeps(self, body: bytes | None) -> bool:
        """Whether a retry with this body keeps the stored body."""
        return body == self.stored_body if self.loaded else body is None


class Taker:
    """Receives messages of one queue, on one loop."""

    def __init__(self, queue: OpenQueue, prefetch: int) -> None:
        self.queue = queue
        self.prefetch = prefetch
        self.count = 0
        """Messages on the way, ready, or leased and not settled."""
        self.bytes = 0
        self.error: QueueDamaged | None = None
        self.closed = False
        self.token: trio.lowlevel.TrioToken | None = trio.lowlevel.current_trio_token()

    def credit(self) -> int:
        """How many more messages may be handed over on commit."""
        if self.error is not None or (self.bytes >= HELD_BYTES and self.count):
            return 0
        return max(self.prefetch - self.count, 0)

    def room(self, destination: Destination) -> int:
        """How many new messages of a destination may be handed over on commit."""
        return self.credit()

    def direct_bytes(self) -> int:
        """The largest body that comes along with mail which is just committed."""
        return self.body_bytes()

    def body_bytes(self) -> int:
        """The size of the largest body that is read along with its message."""
        return ANY_SIZE

    def give(self, lease: HeldLease) -> bool:
        """Hand over a message; return whether the loop must be woken for it."""
        raise NotImplementedError

    def taken(self) -> None:
        """A read for this taker is over."""

    def damaged(self) -> None:
        """`error` is set, and the loop will be woken."""

    def close(self) -> None:
        self.closed = True

    def wake(self) -> None:
        raise NotImplementedError


class Destination:
    """The state of one destination of an open queue.

    There is one for each destination that has mail, so a destination is small.
    """

    __slots__ = (
        "_new_turn", "_retried_turn", "_step", "backlog", "held", "key", "next_due", "reading",
        "window",
    )  # fmt: skip

    def __init__(self, key: str) -> None:
        self.key = key
        self.held: dict[int, None] | tuple[()] = ()
        """The ids of leased messages; few destinations have any."""
        self.backlog = False
        self.next_due = NEVER
        self.reading = False
        self._new_turn, self._retried_turn, self._step = FIRST_TURN
        self.window: int | None = None
        """None: the default of the subscription."""

    @property
    def turns(self) -> Turns:
        """The position of reads."""
        return Turns(self._new_turn, self._retried_turn, self._step)

    @turns.setter
    def turns(self, turns: Turns) -> None:
        self._new_turn, self._retried_turn, self._step = turns

    def hold(self, number: int) -> None:
        """Note that a message is leased."""
        if not isinstance(self.held, dict):
            self.held = {}
        self.held[number] = None

    def drop(self, number: int) -> None:
        """Note that a lease is over."""
        if isinstance(self.held, dict):
            self.held.pop(number, None)
            self.held = self.held or ()

    def has_due(self, now: int) -> bool:
        """Whether mail in the file may be due."""
        return self.backlog or self.next_due <= now

    def note(self, due: int, now: int) -> bool:
        """Note an unleased message in the file; return whether that is news."""
        if due <= now:
            news = not self.has_due(now)
            self.backlog = True
            return news
        if self.next_due <= now:  # nobody has read since that time
            self.backlog = True
            self.next_due = NEVER
        if self.next_due <= due:
            return False
        self.next_due = due
        return True

    def begin_read(self) -> None:
        self.reading = True
        self.backlog = False
        self.next_due = NEVER

    def end_read(self, more: bool, next_due: int | None) -> bool:
        """Note the result of a read; return whether more is due, mail noted meanwhile included."""
        self.reading = False
        self.backlog = self.backlog or more
        if next_due is not None and next_due < self.next_due:
            self.next_due = next_due
        return self.backlog

    @property
    def empty(self) -> bool:
        return not (
            self.held
            or self.backlog
            or self.reading
            or self.next_due != NEVER
            or self.window is not None
        )


class OpenQueue:
    """One queue with takers."""

    def __init__(self, name: str, *, is_sorted: bool) -> None:
        self.name = name
        self.is_sorted = is_sorted
        self.destinations: dict[str, Destination] = {}
        self.held: dict[int, HeldLease] = {}
        self.settled: set[int] = set()
        self.barred: Counter[int] = Counter()
        """Messages that are being changed, and must not be leased."""
        self.reading = False
        self.complete = False
        self.scanning = False
        self.scan_again = False
        self.consumers: list[EmbeddedConsumer] = []
        self.subscriptions: list[EmbeddedSubscription] = []
        self.turns: dict[str, None] = {}
        self.timers: list[tuple[int, str]] = []

    @property
    def takers(self) -> list[Taker]:
        return [*self.subscriptions, *self.consumers]

    def destination(self, key: str) -> Destination:
        found = self.destinations.get(key)
        if found is None:
            found = self.destinations[key] = Destination(key)
        return found

    def tidy(self, destination: Destination) -> None:
        if destination.empty:
            self.destinations.pop(destination.key, None)

    def reserve(self, key: str, now: int) -> Taker | None:
        """The taker that may get a new message of a destination without a read from the file."""
        destination = self.destinations.get(key)
        if destination is None:
            if not self.complete:
                return None
            destination = Destination(key)
        elif destination.reading or destination.has_due(now):
            return None
        best, most = None, 0
        for taker in self.takers:
            room = taker.room(destination)
            if room > most:
                best, most = taker, room
        return best

    def hold(self, lease: HeldLease, taker: Taker | None) -> None:
        """Lease a message, and count it for its taker."""
        self.held[lease.id] = lease
        self.destination(lease.destination).hold(lease.id)
        lease.taker = taker
        if taker is not None:
            taker.count += 1
            taker.bytes += lease.memory

    def drop(self, lease: HeldLease) -> None:
        """End a lease: the message is removed, or goes back."""
        if self.held.get(lease.id) is not lease:
            return
        del self.held[lease.id]
        if self.reading:
            self.settled.add(lease.id)
        taker = lease.taker
        if taker is not None:
            taker.count -= 1
            taker.bytes -= lease.memory
        destination = self.destinations[lease.destination]
        destination.drop(lease.id)
        self.tidy(destination)

    def bar(self, numbers: Sequence[int]) -> None:
        """Keep messages from being leased until `unbar`."""
        self.barred.update(numbers)

    def unbar(self, numbers: Sequence[int]) -> None:
        """Undo `bar`. A read under way has found the messages as they were before."""
        self.barred.subtract(numbers)
        self.barred = +self.barred
        if self.reading:
            self.settled.update(numbers)

    def next_turn(self, now: int) -> Destination | None:
        """The next destination in which consumers may find mail."""
        while self.timers and self.timers[0][0] <= now:
            self.turns[heappop(self.timers)[1]] = None
        while self.turns:
            key = next(iter(self.turns))
            del self.turns[key]
            destination = self.destinations.get(key)
            if destination is not None and not destination.reading and destination.has_due(now):
                return destination
        return None

    def expect(self, key: str, due: int, now: int) -> None:
        """Consumers will find mail in a destination at `due`."""
        if due <= now:
            self.turns[key] = None
        else:
            heappush(self.timers, (due, key))


class Job:
    """Work for the reader; `wake` is called when the work is done."""

    token: trio.lowlevel.TrioToken | None = None

    def __init__(self, queue: OpenQueue) -> None:
        self.queue = queue
        self.result: outcome.Value[object] | outcome.Error | None = None
        self.task: trio.lowlevel.Task | None = None
        self.abandoned = False

    def wait_here(self) -> None:
        """Note the calling task as the one to wake."""
        self.task = trio.lowlevel.current_task()
        self.token = trio.lowlevel.current_trio_token()

    def abandon(self, _: object) -> trio.lowlevel.Abort:
        """The waiting task is cancelled."""
        self.abandoned = True
        return trio.lowlevel.Abort.SUCCEEDED

    def wake(self) -> None:
        # Drop the reference: an error refers to the frame that raises it, which refers to this job.
        result, self.result = self.result, None
        assert self.task is not None and result is not None
        if not self.abandoned:
            trio.lowlevel.reschedule(self.task, result)


class Take(Job):
    """Lease up to `limit` due messages of a destination."""

    def __init__(
        self, queue: OpenQueue, destination: str, limit: int, taker: Taker, undo: Undo | None = None
    ) -> None:
        super().__init__(queue)
        self.destination = destination
        self.limit = limit
        self.taker = taker
        self.leases: list[HeldLease] = []
        self.group: TakeGroup | None = None
        self._undo = undo

    def taken(self) -> Taken | QueueError:
        """The result of a take that is done; it can be had once."""
        result, self.result = self.result, None
        if isinstance(result, outcome.Value):
            return cast("Taken", result.value)
        assert result is not None
        return cast("QueueError", result.error)

    def wake(self) -> None:
        group, self.group = self.group, None  # no cycle: a lease may have a large body
        if group is not None:
            group.one_is_done()
        else:
            super().wake()
        if self.abandoned and self._undo is not None:
            self._undo(self.leases)


class TakeGroup:
    """Takes that one task waits for: the task that makes the group."""

    def __init__(self, takes: Sequence[Take]) -> None:
        self._takes = takes
        self._left = len(takes)
        for take in takes:
            take.group = self
            take.wait_here()

    def one_is_done(self) -> None:
        """A take has its result."""
        self._left -= 1
        task = self._takes[0].task
        if not (self._left or self._takes[0].abandoned) and task is not None:
            trio.lowlevel.reschedule(task)

    def abandon(self, _: object) -> trio.lowlevel.Abort:
        """The waiting task is cancelled."""
        for take in self._takes:
            take.abandoned = True
        return trio.lowlevel.Abort.SUCCEEDED


Undo = Callable[[Sequence[HeldLease]], None]


class Load(Job):
    """Read the body of a lease."""

    def __init__(self, queue: OpenQueue, lease: HeldLease) -> None:
        super().__init__(queue)
        self.lease = lease


class Scan(Job):
    """Find the destinations of a queue above a place."""

    def __init__(self, queue: OpenQueue, after: tuple[str, int]) -> None:
        super().__init__(queue)
        self.after = after


class OpenQueues:
    """All open queues of one directory, the reader's jobs, and the lock on both."""

    def __init__(self, path: str, clock: Callable[[], float], outbox: str) -> None:
        self.path = path
        self.clock = clock
        self.outbox = outbox
        self.lock = threading.Lock()
        self.queues: dict[str, OpenQueue] = {}
        self.jobs: SimpleQueue[Job | Sequence[Take] | None] = SimpleQueue()
        """Work for the reader; takes may come in groups."""
        self.reader_ends = False
        self.look_now = False
        self.unsorted = False
        """Some mail of the outbox has no place yet, and no sorting is under way."""
        self.damaged: QueueDamaged | None = None
        self._to_wake: dict[Taker, None] = {}

    def now(self) -> int:
        """The wall clock in milliseconds. Needs no lock."""
        return int(self.clock() * 1000)

    def open(self, name: str) -> OpenQueue:
        """The queue of that name, for a new taker."""
        queue = self.queues.get(name)
        if queue is None:
            queue = self.queues[name] = OpenQueue(name, is_sorted=name == self.outbox)
        return queue

    def begin(self, taker: Taker) -> None:
        """Start serving a taker that has been added to its queue."""
        taker.error = self.damaged
        queue = taker.queue
        now = self.now()
        for destination in queue.destinations.values():
            if destination.backlog:
                self._tell(queue, destination.key, None, now)
            elif destination.next_due != NEVER:
                self._tell(queue, destination.key, destination.next_due, now)
        if not queue.complete:
            self.scan(queue)
        self.pump(queue)
        self.jobs.put(None)  # the reader sleeps while there are no takers

    def end(self, taker: Taker) -> None:
        """Remove a taker; its leases go back, except those being settled. Call on its loop."""
        queue = taker.queue
        taker.close()
        for lease in list(queue.held.values()):
            if lease.taker is taker and not lease.settling:
                self.give_back(queue, lease)
        if not queue.takers:
            queue.turns.clear()
            queue.timers.clear()
        self.pump(queue)
        self.tidy(queue)

    def tidy(self, queue: OpenQueue) -> None:
        """Drop a queue without takers."""
        if not (queue.takers or queue.held or queue.barred or queue.reading or queue.scanning):
            if self.queues.get(queue.name) is queue:
                del self.queues[queue.name]

    def scan(self, queue: OpenQueue) -> None:
        """Start a search for all destinations of a queue in the file."""
        if queue.scanning:
            queue.scan_again = True
            return
        queue.scanning = True
        queue.scan_again = False
        # Unsorted mail of the outbox is found when it is sorted.
        self.jobs.put(Scan(queue, UNSORTED if queue.is_sorted else ("", BEFORE_LANES)))

    def look_again(self) -> None:
        """Due times in the file have changed."""
        for queue in self.queues.values():
            self.scan(queue)

    def note(self, queue: OpenQueue, key: str, due: int, now: int) -> None:
        """Note an unleased message in the file; a held one is not due in any time."""
        if due >= HELD:
            return
        destination = queue.destination(key)
        if destination.note(due, now):
            self._tell(queue, destination.key, None if due <= now else due, now)

    def note_new(self, queue: OpenQueue, insert: Insert, now: int) -> None:
        """`note` for a message that was just committed.

        The time for which it waits may have passed during a slow commit.
        """
        if insert.since < insert.due <= now:
            queue.destination(insert.destination).note(insert.due, now)
            self._tell(queue, insert.destination, insert.due, now)
        else:
            self.note(queue, insert.destination, insert.due, now)

    def _tell(self, queue: OpenQueue, key: str, due: int | None, now: int) -> None:
        """Tell the takers that mail of a destination waits for `due`; None: some mail is due."""
        for subscription in queue.subscriptions:
            if subscription.tell(key, due):
                self._to_wake[subscription] = None
        if queue.consumers:
            queue.expect(key, now if due is None else due, now)

    def give(self, lease: HeldLease) -> None:
        """Hand a committed message to its taker."""
        if lease.taker is not None and lease.taker.give(lease):
            self._to_wake[lease.taker] = None

    def give_back(self, queue: OpenQueue, lease: HeldLease) -> None:
        """End the lease of a message that stays in the file."""
        queue.drop(lease)
        self.note(queue, lease.destination, lease.due, self.now())

    def pump(self, queue: OpenQueue) -> None:
        """Have the reader read for the consumers of a queue, if worthwhile."""
        if self.reader_ends or not (queue.turns or queue.timers):
            return
        for consumer in queue.consumers:
            limit = consumer.wants()
            if limit and (destination := queue.next_turn(self.now())) is not None:
                consumer.reading = True
                share = max(limit // (len(queue.turns) + 1), min(limit, consumer.prefetch // 10), 1)
                self.jobs.put(Take(queue, destination.key, share, consumer))

    def lease(self, take: Take, checked: Sequence[Checked]) -> tuple[bool, list[tuple[Row, str]]]:
        """Lease the messages that were read for a take.

        Returns whether there was room for all, and the damaged rows with the reasons.
        """
        queue, taker = take.queue, take.taker
        damaged: list[tuple[Row, str]] = []
        for row, size, message in checked:
            if row.id in queue.held or row.id in queue.settled or row.id in queue.barred:
                continue
            if isinstance(message, str):
                damaged.append((row, message))
                continue
            if taker.closed or (take.task is None and not taker.credit()):
                return False, damaged
            lease = HeldLease(
                row.id,
                row.queue,
                message,
                take.destination,
                len(row.properties) + (size or 0),
                message.body is not None or row.body is None,
                row.due / 1000,
                row.due,
                row.body,
                row.body_crc,
                message.body,
                len(row.properties) + len(message.body or b""),
            )
            queue.hold(lease, taker)
            if take.task is None:
                self.give(lease)
            else:
                take.leases.append(lease)
        return True, damaged

    def end_take(self, take: Take, more: bool) -> None:
        """A read of a destination is over."""
        queue = take.queue
        destination = queue.destination(take.destination)
        now = self.now()
        if queue.consumers:
            if more:
                queue.turns[take.destination] = None
            if destination.next_due != NEVER:
                queue.expect(take.destination, destination.next_due, now)
        take.taker.taken()
        queue.tidy(destination)
        self.pump(queue)
        self.tidy(queue)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock, then wake the loops that have news. Takes the lock itself."""
        with self.lock:
            try:
                yield
            finally:
                takers = self.to_wake()
        wake_all(takers)

    def to_wake(self) -> list[Taker]:
        """The takers to wake, for `wake_all` once the lock is free."""
        takers = [*self._to_wake]
        self._to_wake.clear()
        return takers

    def damage(self, problem: QueueDamaged) -> None:
        """The file is broken: stop all traffic until a restart. Takes the lock itself."""
        with self.lock:
            if self.damaged is not None:
                return
            self.damaged = problem
            takers = [taker for queue in self.queues.values() for taker in queue.takers]
            for taker in takers:
                taker.error = problem
                taker.damaged()
        logger.critical("%s; stop mailerq and start it again", problem)
        try:
            mark(self.path, str(problem))
        except OSError as error:
            logger.critical("%s", error)
        wake_all(takers)
