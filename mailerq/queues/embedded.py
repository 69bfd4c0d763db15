"""The embedded queue: SQLite with group commit, one writing and one reading thread.

Theory of operation
-------------------
Tasks hand what they publish and settle to the **writer**, a thread that commits whatever has
gathered since its last commit and then wakes all of these tasks together, with one call into
each trio loop. While it syncs, the next batch gathers: the more load, the larger the batch.

A message that is due when it is published goes to a consumer straight from memory, once it
is committed, as long as the consumer has credit and nothing older waits in the file.
Otherwise it stays in the file, and the **reader**, a thread with its own connection, fetches
it when there is credit again. So memory holds what is leased, never what waits.

The reader also keeps the time: while a consumer is open it looks at least once a second, by
the monotonic clock, whether something became due by the wall clock, and whether another
process has published.

A published message belongs to the queue: the publisher must not change its properties any
more, because the consumer may get the very same dict.

Guarantees
----------
- One lock guards the feeds (`mailerq.queues.feed`); it is never held while the file is read
  or written.
- The writer alone writes, the reader alone reads; `depths` and `browse` open their own.
- A task that has handed something over is woken exactly once, whatever happens.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Final, Self

import outcome
import trio

from mailerq.errors import QueueDamaged, QueueError
from mailerq.message import Message, decode_properties
from mailerq.queues.feed import START, EmbeddedConsumer, Feed, HeldLease, Position
from mailerq.queues.interface import (
    Consumer,
    Depth,
    Entry,
    Lease,
    Publication,
    Queues,
    Settlement,
)
from mailerq.queues.store import (
    DAMAGED_QUEUE,
    Batch,
    Insert,
    Reader,
    Retry,
    Row,
    Store,
    aside,
    check,
    mark,
    prepare,
    translate,
)

__all__ = ["EmbeddedQueues"]

logger = logging.getLogger("mailerq.queues")

POLL_SECONDS: Final = 1.0
"""How late at most another process's message, or a jump of the clock, is noticed."""

BATCH_MESSAGES: Final = 1_000
BATCH_BYTES: Final = 64 << 20
"""Bounds of one commit: what comes later waits for the next."""

READ_BYTES: Final = 16 << 20
"""Bytes of messages that one read brings into memory; one message is always allowed."""


@dataclass(slots=True, eq=False)
class _Request:
    """What one task hands to the writer."""

    inserts: list[Insert] = field(default_factory=list)
    retries: list[tuple[HeldLease, Retry]] = field(default_factory=list)
    removals: list[HeldLease] = field(default_factory=list)
    purge: Iterator[int] | None = None
    purged: int = 0
    task: trio.lowlevel.Task | None = None
    token: trio.lowlevel.TrioToken | None = None
    result: outcome.Outcome[int] = field(default_factory=lambda: outcome.Value(0))

    @property
    def count(self) -> int:
        return len(self.inserts) + len(self.retries) + len(self.removals)

    @property
    def size(self) -> int:
        return sum(insert.size for insert in self.inserts)

    @property
    def leases(self) -> list[HeldLease]:
        return [*self.removals, *(lease for lease, _ in self.retries)]


def _complete(requests: Sequence[_Request]) -> None:
    """Wake the tasks of one loop, on that loop."""
    for request in requests:
        assert request.task is not None
        trio.lowlevel.reschedule(request.task, request.result)


class EmbeddedQueues(Queues):
    """The queues in one directory.

    >>> import tempfile
    >>> async def example(directory):
    ...     async with EmbeddedQueues.open(directory) as queues:
    ...         await queues.publish([Publication("outbox", Message({"recipient": "a@b.test"}))])
    ...         async with queues.consume("outbox", prefetch=10) as consumer:
    ...             lease = await consumer.receive()
    ...             await queues.ack([Settlement(lease)])
    ...             return lease.message.recipient
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     trio.run(example, directory)
    'a@b.test'
    """

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._reader = Reader(store.path)
        self._clock = clock
        self._lock = threading.Lock()
        self._feeds: dict[str, Feed] = {}
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._reads: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._closed = False
        self._damaged: QueueDamaged | None = None
        self._version = -1
        self._commits = 0
        self._messages = 0
        self._seconds = 0.0
        self._largest = 0

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        directory: str,
        *,
        exclusive: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> AsyncIterator[Self]:
        """Open the queues of a directory, which is made if missing; raises `QueueError`.

        `exclusive` refuses a directory that another process has opened so, and salvages a
        damaged file. `clock` is the wall clock in seconds since 1970. When the context ends,
        what was handed over is still committed.
        """
        store = await trio.to_thread.run_sync(lambda: Store.open(directory, exclusive=exclusive))
        queues = cls(store, clock)
        threads = [
            threading.Thread(target=queues._write_forever, name="mailerq queue writer"),
            threading.Thread(target=queues._read_forever, name="mailerq queue reader"),
        ]
        for thread in threads:
            thread.start()
        try:
            yield queues
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(queues._close, threads)

    def _close(self, threads: Sequence[threading.Thread]) -> None:
        with self._lock:
            self._closed = True
        self._reads.put(None)
        self._requests.put(None)
        for thread in threads:
            thread.join()
        self._reader.close()
        self._store.close()

    # What tasks call

    async def publish(self, publications: Sequence[Publication]) -> None:
        now = self._clock()
        inserts = [prepare(publication, now) for publication in publications]
        if not inserts:
            await trio.lowlevel.checkpoint()
            return
        await trio.lowlevel.checkpoint_if_cancelled()
        await self._hand_over(_Request(inserts))

    async def ack(self, settlements: Sequence[Settlement]) -> None:
        if not settlements:
            await trio.lowlevel.checkpoint()
            return
        await trio.lowlevel.checkpoint_if_cancelled()
        now = self._clock()
        request = _Request()
        for settlement in settlements:
            self._settle(settlement, now, request)
        leases = request.leases
        with self._lock:
            for lease in leases:
                feed = self._feeds.get(lease.queue)
                if feed is None or feed.held.get(lease.id) is not lease or lease.settling:
                    raise QueueError(
                        f"message {lease.id} of queue {lease.queue}: the lease is over"
                    )
            if len(leases) != len(set(map(id, leases))):
                raise QueueError("a lease is settled twice in one call")
            for lease in leases:
                lease.settling = True
        await self._hand_over(request)

    def _settle(self, settlement: Settlement, now: float, request: _Request) -> None:
        """Turn a settlement into rows; the message that goes round again keeps its row."""
        lease = settlement.lease
        if not isinstance(lease, HeldLease):
            raise QueueError(f"message {lease.id}: not a lease of this queue")
        again: Insert | None = None
        for publication in settlement.publications:
            insert = prepare(publication, now)
            if again is None and insert.queue == lease.queue and insert.body == lease.stored_body:
                again = insert
            else:
                request.inserts.append(insert)
        if again is None:
            request.removals.append(lease)
        else:
            retry = Retry(lease.id, lease.reference, lease.body_crc, again)
            request.retries.append((lease, retry))

    async def _hand_over(self, request: _Request) -> int:
        with self._lock:
            problem = self._damaged
            if problem is None and self._closed:
                self._unsettle(request)
                raise QueueError("the queue is closed")
            if problem is not None:
                self._unsettle(request)
                raise QueueDamaged(str(problem))
            request.task = trio.lowlevel.current_task()
            request.token = trio.lowlevel.current_trio_token()
            self._requests.put(request)
        result: int = await trio.lowlevel.wait_task_rescheduled(
            lambda _: trio.lowlevel.Abort.FAILED
        )
        return result

    def _unsettle(self, request: _Request) -> None:
        for lease in request.leases:
            lease.settling = False

    def release(self, lease: Lease) -> None:
        with self._lock:
            feed = self._feeds.get(lease.queue)
            if (
                feed is None
                or not isinstance(lease, HeldLease)
                or feed.held.get(lease.id) is not lease
                or lease.settling
            ):
                raise QueueError(f"message {lease.id} of queue {lease.queue}: the lease is over")
            self._give_back(feed, lease)
            self._pump(feed)

    @asynccontextmanager
    async def consume(self, queue: str, *, prefetch: int) -> AsyncIterator[Consumer]:
        if prefetch < 1:
            raise ValueError(f"prefetch {prefetch}: expected 1 or more")
        with self._lock:
            if self._closed:
                raise QueueError("the queue is closed")
            feed = self._feeds.setdefault(queue, Feed(queue))
            consumer = EmbeddedConsumer(feed, prefetch, self._take)
            consumer.error = self._damaged
            feed.consumers.append(consumer)
            self._pump(feed)
        try:
            yield consumer
        finally:
            with self._lock:
                feed.consumers.remove(consumer)
                for lease in list(feed.held.values()):
                    if lease.consumer is consumer and not lease.settling:
                        self._give_back(feed, lease)
                consumer.ready.clear()
                self._tidy(feed)
                self._pump(feed)

    async def depths(self) -> list[Depth]:
        def look() -> list[Depth]:
            with Reader(self._store.path) as reader:
                return reader.depths(self._clock())

        return await trio.to_thread.run_sync(look)

    async def browse(self, queue: str, *, limit: int = 100, after: int = 0) -> list[Entry]:
        def look() -> list[Entry]:
            with Reader(self._store.path) as reader:
                return reader.browse(queue, limit=limit, after=after)

        return await trio.to_thread.run_sync(look)

    async def purge(self, queue: str) -> int:
        def held() -> list[int]:
            with self._lock:
                feed = self._feeds.get(queue)
                return list(feed.held) if feed is not None else []

        await trio.lowlevel.checkpoint_if_cancelled()
        return await self._hand_over(_Request(purge=self._store.purge_steps(queue, keep=held)))

    def wake(self) -> None:
        """Look now for what another process has published; any thread."""
        with self._lock:
            for feed in self._feeds.values():
                self._look_again(feed)

    def statistics(self) -> dict[str, Any]:
        """Counters since the start: commits, messages in them, seconds they took, leases."""
        with self._lock:
            return {
                "commits": self._commits,
                "messages": self._messages,
                "messages_per_commit": self._messages / max(self._commits, 1),
                "largest_commit": self._largest,
                "commit_seconds": self._seconds,
                "leased": {queue: len(feed.held) for queue, feed in self._feeds.items()},
            }

    # With the lock held

    def _give_back(self, feed: Feed, lease: HeldLease) -> None:
        feed.drop(lease)
        with suppress(ValueError):
            if lease.consumer is not None:
                lease.consumer.ready.remove(lease)
        feed.note(lease.due, lease.id, self._now())

    def _look_again(self, feed: Feed) -> None:
        feed.backlog = True
        feed.rewind(START)
        self._pump(feed)

    def _pump(self, feed: Feed) -> None:
        """Have the reader read for a feed if that is worth it."""
        if feed.hungry(self._now()):
            self._begin_read(feed)

    def _begin_read(self, feed: Feed) -> None:
        after, limit = feed.begin_read()
        self._reads.put(lambda: self._read(feed, after, limit))

    def _make_ready(self, lease: HeldLease, notify: set[EmbeddedConsumer]) -> None:
        consumer = lease.consumer
        assert consumer is not None
        consumer.ready.append(lease)
        if consumer.starving:
            consumer.starving = False
            notify.add(consumer)

    # Without the lock

    def _now(self) -> int:
        return int(self._clock() * 1000)

    def _take(self, consumer: EmbeddedConsumer) -> Lease | None:
        with self._lock:
            if consumer.error is not None:
                raise QueueDamaged(str(consumer.error))
            lease = consumer.ready.popleft() if consumer.ready else None
            consumer.starving = lease is None
            if not consumer.ready:
                self._pump(consumer.feed)
            return lease

    def _notify(self, consumer: EmbeddedConsumer) -> None:
        """Give what is ready to the tasks that wait; on the loop of the consumer."""
        with self._lock:
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
                self._pump(consumer.feed)

    def _notify_all(self, consumers: set[EmbeddedConsumer]) -> None:
        for consumer in consumers:
            # A loop that has ended took its consumer's context with it.
            with suppress(trio.RunFinishedError):
                consumer.token.run_sync_soon(self._notify, consumer)

    # The writer

    def _write_forever(self) -> None:
        purges: deque[_Request] = deque()
        stop = False
        while not stop or purges:
            batch: list[_Request] = []
            messages = size = 0
            while not stop and messages < BATCH_MESSAGES and size < BATCH_BYTES:
                try:
                    request = self._requests.get(block=not batch and not purges)
                except Empty:
                    break
                if request is None:
                    stop = True
                elif request.purge is not None:
                    purges.append(request)
                else:
                    batch.append(request)
                    messages += request.count
                    size += request.size
            if batch:
                self._commit(batch)
            if purges:
                self._purge_step(purges)

    def _commit(self, requests: list[_Request]) -> None:
        started = time.perf_counter()
        inserts = [insert for request in requests for insert in request.inserts]
        batch = Batch(
            inserts,
            [retry for request in requests for _, retry in request.retries],
            [lease.id for request in requests for lease in request.removals],
        )
        reserved: dict[int, HeldLease] = {}
        notify: set[EmbeddedConsumer] = set()
        try:
            self._store.number(inserts)
            reserved = self._reserve(inserts)
            self._store.write(batch)
        except Exception as error:
            problem = translate(error, self._store.path)
            if not isinstance(error, QueueError):
                logger.exception("the writer of the queue met an error of its own")
            self._undo(requests, reserved, problem)
        else:
            self._settle_commit(requests, inserts, reserved, notify)
            self._commits += 1
            self._messages += sum(request.count for request in requests)
            self._largest = max(self._largest, len(inserts))
            self._seconds += time.perf_counter() - started
        self._wake_tasks(requests)
        self._notify_all(notify)

    def _wake_tasks(self, requests: Sequence[_Request]) -> None:
        loops: dict[trio.lowlevel.TrioToken, list[_Request]] = {}
        for request in requests:
            if request.token is not None:
                loops.setdefault(request.token, []).append(request)
        for token, group in loops.items():
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(_complete, group)

    def _reserve(self, inserts: Sequence[Insert]) -> dict[int, HeldLease]:
        """Lease what can go to a consumer as soon as it is committed."""
        reserved: dict[int, HeldLease] = {}
        given: set[int] = set()
        with self._lock:
            if not self._feeds:
                return reserved
            now = self._now()
            for insert in inserts:
                feed = self._feeds.get(insert.queue)
                if feed is None or insert.due > now or not feed.direct(now):
                    continue
                consumer = feed.choose()
                if consumer is None:
                    continue
                properties = insert.message.properties
                if id(properties) in given:
                    properties = decode_properties(insert.properties)
                given.add(id(properties))
                message = Message(properties, insert.body)
                lease = HeldLease(
                    insert.id, insert.queue, message, insert.due, insert.size, None, None, None
                )
                feed.hold(lease, consumer)
                reserved[insert.id] = lease
        return reserved

    def _settle_commit(
        self,
        requests: Sequence[_Request],
        inserts: Sequence[Insert],
        reserved: dict[int, HeldLease],
        notify: set[EmbeddedConsumer],
    ) -> None:
        """A batch is durable: end its leases, hand over what was reserved."""
        now = self._now()
        touched: dict[str, Feed] = {}
        with self._lock:
            for request in requests:
                for lease in request.removals:
                    feed = self._feeds[lease.queue]
                    feed.drop(lease)
                    touched[feed.queue] = feed
                for lease, retry in request.retries:
                    feed = self._feeds[lease.queue]
                    feed.drop(lease)
                    feed.note(retry.insert.due, lease.id, now)
                    touched[feed.queue] = feed
            for insert in inserts:
                if (open_feed := self._feeds.get(insert.queue)) is None:
                    continue
                touched[insert.queue] = open_feed
                held = reserved.get(insert.id)
                if held is not None and open_feed.held.get(insert.id) is held:
                    held.reference = insert.reference
                    held.body_crc = insert.body_crc
                    held.stored_body = insert.body
                    self._make_ready(held, notify)
                else:
                    open_feed.note(insert.due, insert.id, now)
            for feed in touched.values():
                self._pump(feed)
                self._tidy(feed)
                if feed.next_due is not None and feed.next_due < now + POLL_SECONDS * 1000:
                    self._reads.put(_nothing)

    def _undo(
        self, requests: Sequence[_Request], reserved: dict[int, HeldLease], problem: QueueError
    ) -> None:
        """A batch failed: nothing was published, and what was leased still is."""
        with self._lock:
            for lease in reserved.values():
                if (feed := self._feeds.get(lease.queue)) is not None:
                    feed.drop(lease)
                    self._tidy(feed)
            for request in requests:
                request.result = outcome.Error(type(problem)(str(problem)))
                self._unsettle(request)
                for lease in request.leases:
                    feed = self._feeds[lease.queue]
                    if lease.consumer is not None and lease.consumer not in feed.consumers:
                        self._give_back(feed, lease)
                        self._tidy(feed)
        if isinstance(problem, QueueDamaged):
            self._damage(problem)

    def _purge_step(self, purges: deque[_Request]) -> None:
        request = purges[0]
        assert request.purge is not None
        try:
            request.purged += next(request.purge)
            return
        except StopIteration:
            request.result = outcome.Value(request.purged)
        except Exception as error:
            problem = translate(error, self._store.path)
            request.result = outcome.Error(problem)
            if isinstance(problem, QueueDamaged):
                self._damage(problem)
        purges.popleft()
        self._wake_tasks([request])

    # The reader

    def _read_forever(self) -> None:
        tick = time.monotonic()
        while True:
            with self._lock:
                wait = self._patience()
            try:
                job = self._reads.get(timeout=wait)
            except Empty:
                job = _nothing
            if job is None:
                return
            job()
            now = time.monotonic()
            if now >= tick:
                tick = now + POLL_SECONDS
                self._poll()
            with self._lock:
                for feed in self._feeds.values():
                    self._pump(feed)

    def _patience(self) -> float | None:
        """How long the reader may sleep, in seconds; without a consumer for ever."""
        wait: float | None = None
        now = self._now()
        for feed in self._feeds.values():
            if feed.consumers:
                wait = POLL_SECONDS if wait is None else wait
                if feed.next_due is not None and feed.credit():
                    wait = min(wait, max((feed.next_due - now) / 1000, 0.001))
        return wait

    def _poll(self) -> None:
        """Notice what other processes have published."""
        with self._lock:
            if not any(feed.credit() for feed in self._feeds.values()):
                return
        try:
            version = self._reader.version()
        except QueueError as error:
            logger.error("%s", error)
            return
        if version == self._version:
            return
        self._version = version
        with self._lock:
            for feed in self._feeds.values():
                if feed.credit():
                    self._look_again(feed)

    def _read(self, feed: Feed, after: Position, limit: int) -> None:
        notify: set[EmbeddedConsumer] = set()
        try:
            found, later = self._reader.scan(feed.queue, after, self._now(), limit)
            more = len(found) >= limit
            with self._lock:
                wanted = self._choose(feed, found)
            if wanted and wanted[-1] < len(found) - 1:
                more = True
                found = found[: wanted[-1] + 1]
            numbers = [found[index][1] for index in wanted]
            rows = self._reader.fetch(feed.queue, numbers) if numbers else []
            messages = [(row, check(row)) for row in rows]
        except Exception as error:
            if not isinstance(error, QueueError):
                logger.exception("the reader of the queue met an error of its own")
            problem = translate(error, self._store.path)
            with self._lock:
                feed.end_read(None, True, None)
            if isinstance(problem, QueueDamaged):
                self._damage(problem)
            else:
                logger.error("cannot read the queue, trying again: %s", problem)
                time.sleep(0.1)
            return
        reached: Position | None = found[-1][:2] if found else None
        with self._lock:
            for row, message in messages:
                if row.id in feed.held or row.id in feed.settled:
                    continue
                if isinstance(message, str):
                    self._set_aside(feed, row, message)
                    continue
                consumer = feed.choose()
                if consumer is None:
                    more = True
                    reached = (row.due, row.id - 1)
                    break
                size = len(row.properties) + len(row.data or b"")
                lease = HeldLease(
                    row.id,
                    row.queue,
                    message,
                    row.due,
                    size,
                    row.body,
                    row.body_crc,
                    message.body,
                )
                feed.hold(lease, consumer)
                self._make_ready(lease, notify)
            feed.end_read(reached, more, later)
            self._tidy(feed)
        self._notify_all(notify)

    def _choose(self, feed: Feed, found: Sequence[tuple[int, int, int]]) -> list[int]:
        """Which of the messages found to fetch, by credit and by bytes."""
        credit = feed.credit()
        size = 0
        wanted: list[int] = []
        for index, (_, number, length) in enumerate(found):
            if number in feed.held or number in feed.settled:
                continue
            if len(wanted) >= credit or (wanted and size + length > READ_BYTES):
                break
            wanted.append(index)
            size += length
        return wanted

    def _set_aside(self, feed: Feed, row: Row, reason: str) -> None:
        """Move a damaged record to the queue for such; it stays leased to nobody until then."""
        logger.error(
            "queue %s: message %d is damaged, moved to queue %s: %s",
            feed.queue,
            row.id,
            DAMAGED_QUEUE,
            reason,
        )
        lease = HeldLease(row.id, feed.queue, Message(), 0, 0, None, None, None, settling=True)
        feed.held[row.id] = lease
        insert = prepare(aside(row, reason), self._clock())
        self._requests.put(_Request([insert], removals=[lease]))

    def _damage(self, problem: QueueDamaged) -> None:
        """The file is broken: nothing more goes in or out until a restart salvages it."""
        notify: set[EmbeddedConsumer] = set()
        with self._lock:
            if self._damaged is not None:
                return
            self._damaged = problem
            for feed in self._feeds.values():
                for consumer in feed.consumers:
                    consumer.error = problem
                    consumer.starving = False
                    notify.add(consumer)
        logger.critical("%s; stop mailerq and start it again", problem)
        try:
            mark(self._store.path, str(problem))
        except OSError as error:
            logger.critical("%s", error)
        self._notify_all(notify)

    def _tidy(self, feed: Feed) -> None:
        """Forget a feed that nobody consumes any more."""
        if not feed.consumers and not feed.held and not feed.reading:
            self._feeds.pop(feed.queue, None)


def _nothing() -> None:
    """Wakes the reader, so that it looks at the clock."""
