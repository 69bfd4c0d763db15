"""The embedded queue: the queues of one directory, in a SQLite file, on trio.

Theory of operation
-------------------
Tasks hand publications and settlements to a thread that commits in batches (`writer`). Once
committed, a due message goes straight from memory to a consumer or subscriber, if there is room and
no older mail of its destination waits. Otherwise it stays in the file until a second thread
(`reader`) reads it. `open_queues` assigns messages to takers.

A published message belongs to the queue: the publisher must not change its properties any more,
because the consumer may get the very same dict. A consumer may change its message; a message given
back comes again as it is in the file.

Guarantees
----------
- Requests handed over before the context of `EmbeddedQueues.run` ends are still committed.
- One process has a directory exclusively, and only that process takes messages. Others may publish
  and look into the file at any time; new mail is noticed within a second, or at once by
  `EmbeddedQueues.wake`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any, Final, Self, TypeVar

import trio

from mailerq.config import Config
from mailerq.errors import QueueDamaged, QueueError
from mailerq.queues.embedded.batcher import Batcher
from mailerq.queues.embedded.changing import CHANGE_ROWS
from mailerq.queues.embedded.changing import change as apply_change
from mailerq.queues.embedded.open_queues import HeldLease, OpenQueues
from mailerq.queues.embedded.queue_file import WORK_ROWS, Bounds, QueueFile
from mailerq.queues.embedded.queue_reader import QueueReader, Waiting
from mailerq.queues.embedded.reader import Maintenance, Reader
from mailerq.queues.embedded.records import Insert, Retry, prepare
from mailerq.queues.embedded.takers import EmbeddedConsumer, EmbeddedSubscription
from mailerq.queues.embedded.writer import Request, Writer
from mailerq.queues.interface import (
    BrowsableQueues,
    Changed,
    Consumer,
    Depth,
    DestinationDepth,
    Entry,
    Lease,
    Publication,
    Receiver,
    Settlement,
    Subscription,
)
from mailerq.rules.changes import Change
from mailerq.rules.selection import Selection
from mailerq.turns import EndOfTurn

__all__ = ["EmbeddedQueues"]

logger = logging.getLogger("mailerq.queues")

T = TypeVar("T")
SomeTaker = TypeVar("SomeTaker", EmbeddedConsumer, EmbeddedSubscription)

SAY_SECONDS: Final = 3600.0
"""Least interval of log lines about documents removed beyond the bounds of a queue."""


class EmbeddedQueues(BrowsableQueues):
    """The queues of one directory, see `mailerq.queues.opening.open_embedded`."""

    def __init__(
        self, file: QueueFile, clock: Callable[[], float], bounds: Sequence[Bounds] = ()
    ) -> None:
        self._file = file
        self._queues = OpenQueues(file.path, clock, file.outbox)
        self._set_bounds(bounds)
        self._trimmed = self._trimmed_before = 0
        self._said = -math.inf  # time.monotonic of the last such log line
        self._closed = self._sort_failed = False
        self._writer = Writer(file, self._queues)
        self._batchers: dict[trio.lowlevel.TrioToken, Batcher] = {}
        self._reader = Reader(
            self._queues,
            self._writer.put,
            file.blocks,
            Maintenance(self._set_back, self._trim, self._sort),
        )

    @classmethod
    @asynccontextmanager
    async def run(
        cls,
        file: QueueFile,
        *,
        clock: Callable[[], float] = time.time,
        bounds: Sequence[Bounds] = (),
    ) -> AsyncIterator[Self]:
        """Publish to an open file and take from it; the file is closed at the end.

        `clock` is the wall clock, in seconds since 1970. Messages beyond `bounds` are deleted once
        a minute.
        """
        queues = cls(file, clock, bounds)
        try:
            if file.exclusive:
                queues._writer.put(Request(work=queues._sort(), can_wait=True))
            await trio.to_thread.run_sync(queues._reader.has_opened.wait)
            yield queues
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(queues._close)
            queues._retire()

    def _close(self) -> None:
        with self._queues.lock:
            self._closed = True
            for batcher in self._batchers.values():
                batcher.flush()
            self._queues.reader_ends = True
            self._queues.jobs.put(None)
            self._writer.put(None)
        self._writer.join()
        self._reader.join()
        self._file.close()

    def _retire(self) -> None:
        """Detach from the loops."""
        for token, batcher in self._batchers.items():
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(batcher.end_of_turn.leave)

    def configure(self, config: Config) -> None:
        self._set_bounds(Bounds.of(config))

    def _set_bounds(self, bounds: Sequence[Bounds]) -> None:
        self._bounds = [each for each in bounds if each.messages or each.seconds]

    async def publish(self, publications: Sequence[Publication]) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        now = self._queues.clock()
        inserts = [prepare(publication, now, self._file.outbox) for publication in publications]
        await self._hand_over(Request(inserts))

    def check(self, publication: Publication) -> None:
        prepare(publication, 0.0, self._file.outbox)

    async def ack(self, settlements: Sequence[Settlement]) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        now = self._queues.clock()
        inserts: list[Insert] = []
        retries: list[tuple[HeldLease, Retry]] = []
        removals: list[HeldLease] = []
        for settlement in settlements:
            lease = settlement.lease
            if not isinstance(lease, HeldLease):
                raise ValueError(f"message {lease.id}: not leased by this queue")
            again: Retry | None = None
            for publication in settlement.publications:
                insert = prepare(publication, now, self._file.outbox)
                if again is None and insert.queue == lease.queue and lease.keeps(insert.body):
                    again = Retry(lease.id, lease.reference, lease.body_crc, insert, lease.loaded)
                else:
                    inserts.append(insert)
            for publication in settlement.others:
                inserts.append(prepare(publication, now, self._file.outbox))
            if again is None:
                removals.append(lease)
            else:
                retries.append((lease, again))
        await self._hand_over(Request(inserts, retries, removals))

    async def _hand_over(self, request: Request) -> int:
        """Wait until the writer has handled a request."""
        with self._queues.lock:
            if self._queues.damaged is not None:
                raise QueueDamaged(str(self._queues.damaged))
            if self._closed:
                raise QueueError("the queue is closed")
            leases = request.leases
            for lease in leases:
                self._check_lease(lease)
            if len({lease.id for lease in leases}) < len(leases):
                raise ValueError("a lease is settled twice")
            for lease in leases:
                lease.settling = True
            request.task = trio.lowlevel.current_task()
            request.token = trio.lowlevel.current_trio_token()
            self._batcher().add(request)
        rows: int = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        return rows

    def _batcher(self) -> Batcher:
        """The batcher of the calling loop. Call with the lock."""
        token = trio.lowlevel.current_trio_token()
        batcher = self._batchers.get(token)
        if batcher is None:
            queues = self._queues
            batcher = Batcher(
                self._writer.put, queues.jobs.put, queues.lock, EndOfTurn.of_this_loop()
            )
            self._batchers[token] = batcher
        return batcher

    def _check_lease(self, lease: HeldLease) -> None:
        queue = self._queues.queues.get(lease.queue)
        if queue is None or queue.held.get(lease.id) is not lease or lease.settling:
            raise ValueError(f"message {lease.id} of queue {lease.queue}: the lease is over")

    def release(self, lease: Lease) -> None:
        if not isinstance(lease, HeldLease):
            raise ValueError(f"message {lease.id}: not leased by this queue")
        with self._queues.changing():
            self._check_lease(lease)
            queue = self._queues.queues[lease.queue]
            self._queues.give_back(queue, lease)
            self._queues.pump(queue)

    @asynccontextmanager
    async def consume(self, queue: str, *, prefetch: int) -> AsyncIterator[Consumer]:
        def make() -> EmbeddedConsumer:
            return EmbeddedConsumer(self._queues, self._queues.open(queue), prefetch)

        with self._taking(make, prefetch) as consumer:
            yield consumer

    @asynccontextmanager
    async def subscribe(
        self, queue: str, receiver: Receiver, *, prefetch: int, window: int
    ) -> AsyncIterator[Subscription]:
        def make() -> EmbeddedSubscription:
            opened = self._queues.open(queue)
            return EmbeddedSubscription(
                self._queues, opened, self._batcher(), receiver, prefetch=prefetch, window=window
            )

        with self._taking(make, prefetch) as subscription:
            yield subscription

    @contextmanager
    def _taking(self, make: Callable[[], SomeTaker], prefetch: int) -> Iterator[SomeTaker]:
        """A taker for the duration of the context."""
        if prefetch < 1:
            raise ValueError(f"prefetch {prefetch}: expected 1 or more")
        if not self._file.exclusive:
            raise QueueError(f"{self._file.path}: only its daemon takes messages from it")
        with self._queues.changing():
            if self._closed:
                raise QueueError("the queue is closed")
            taker = make()
            self._queues.begin(taker)
        try:
            yield taker
        finally:
            with self._queues.changing():
                self._queues.end(taker)

    async def depths(self) -> list[Depth]:
        return await self._look(lambda reader: reader.depths(self._queues.clock()))

    async def destinations(self, queue: str) -> list[DestinationDepth]:
        return await self._look(
            lambda reader: list(reader.destinations(queue, self._queues.clock()))
        )

    async def browse(self, queue: str, *, limit: int = 100, after: int = 0) -> list[Entry]:
        return await self._look(lambda reader: reader.browse(queue, limit=limit, after=after))

    async def _look(self, look: Callable[[QueueReader], T]) -> T:
        """Read the file, in a thread and on a separate connection."""

        def run() -> T:
            with QueueReader(self._file.path) as reader:
                return look(reader)

        return await trio.to_thread.run_sync(run)

    async def purge(self, queue: str) -> int:
        await trio.lowlevel.checkpoint_if_cancelled()
        steps = self._file.purge_steps(queue, partial(self._held, queue))
        return await self._hand_over(Request(work=steps))

    def _held(self, queue: str) -> list[int]:
        with self._queues.lock:
            found = self._queues.queues.get(queue)
            return [] if found is None else list(found.held)

    async def select(self, queue: str, selection: Selection) -> list[int]:
        def numbers(reader: QueueReader) -> list[int]:
            pages = reader.selected(queue, selection, self._queues.clock())
            return [number for page in pages for number in page]

        return await self._look(numbers)

    async def change(
        self,
        queue: str,
        numbers: Sequence[int],
        change: Change,
        *,
        recall: Callable[[Collection[int]], None] | None = None,
    ) -> Changed:
        await trio.lowlevel.checkpoint_if_cancelled()
        leased: list[int] = []
        with self._queues.lock:
            self._queues.open(queue).bar(numbers)
        try:
            if recall is not None:
                recall(frozenset(numbers))
            work = self._change(queue, numbers, change, leased)
            done = await self._hand_over(Request(work=work))
        except BaseException:
            self._unbar(queue, numbers)
            with self._queues.changing():
                self._queues.look_again()
            raise
        return Changed(done, len(leased))

    def _change(
        self, queue: str, numbers: Sequence[int], change: Change, leased: list[int]
    ) -> Iterator[int]:
        """Change messages that nobody has, some rows per commit; for the writer."""
        rows = CHANGE_ROWS if callable(change) else WORK_ROWS
        copies: list[Waiting] = []
        for start in range(0, len(numbers), rows):
            held = set(self._held(queue))
            some = numbers[start : start + rows]
            leased += (number for number in some if number in held)
            free = [number for number in some if number not in held]
            for step in apply_change(self._file, queue, free, change, self._queues.clock()):
                copies += step.elsewhere
                yield step.done
        self._unbar(queue, numbers, self._file.waiting(queue, numbers), copies)

    def _unbar(self, name: str, numbers: Sequence[int], *waiting: Sequence[Waiting]) -> None:
        """Messages may be leased again. Takers are told of those that wait."""
        queues = self._queues
        with queues.changing():
            queue, now = queues.queues[name], queues.now()
            queue.unbar(numbers)
            touched = {name: queue}
            for each in chain.from_iterable(waiting):
                found = queues.queues.get(each.queue)
                if found is not None and each.id not in found.held:
                    queues.note(found, each.destination, each.due, now)
                    touched[each.queue] = found
            for found in touched.values():
                queues.pump(found)
                queues.tidy(found)
            queues.jobs.put(None)  # the reader may sleep for longer

    def _sort(self) -> Iterator[int]:
        """Sort unsorted mail of the outbox, some rows per commit; for the writer."""
        total = 0
        try:
            for places in self._file.sort_steps():
                with self._queues.changing():
                    now = self._queues.now()
                    queue = self._queues.queues.get(self._file.outbox)
                    if queue is not None:
                        for place in places:
                            self._queues.note(queue, place.destination, place.due, now)
                        self._queues.pump(queue)
                total += len(places)
                yield len(places)
        except QueueDamaged:
            raise
        except QueueError as error:
            if not self._sort_failed:
                logger.error("the outbox cannot be sorted by destination, trying again: %s", error)
            self._sort_failed = self._queues.unsorted = True
        else:
            self._sort_failed = False
        if total:
            logger.warning("%d messages of the outbox were sorted by destination", total)

    def _set_back(self, now: int, before: int) -> Iterator[int]:
        """Set due times back with the clock; for the writer."""
        yield from self._file.set_back(now, before)
        with self._queues.lock:
            self._queues.look_again()

    def _trim(self) -> Iterator[int]:
        """Keep queues within their bounds, some rows per commit; on the writer's thread."""
        for bounds in self._bounds:
            queue = bounds.queue
            now = self._queues.now()
            for count in self._file.trim_steps(bounds, now, partial(self._held, queue)):
                self._trimmed += count
                yield count
            new = self._trimmed - self._trimmed_before
            if new and time.monotonic() >= self._said + SAY_SECONDS:
                self._said, self._trimmed_before = time.monotonic(), self._trimmed
                logger.warning(
                    "queue %s: its %d oldest documents were removed; it keeps %s",
                    queue,
                    new,
                    _describe(bounds),
                )

    def wake(self, *, everything: bool = False) -> None:
        with self._queues.lock:
            self._queues.look_now = True
            if everything:
                self._queues.look_again()
            self._queues.jobs.put(None)

    def statistics(self) -> dict[str, Any]:
        with self._queues.lock:
            leased = {name: len(queue.held) for name, queue in self._queues.queues.items()}
        return {
            **self._writer.statistics(),
            **self._reader.statistics(),
            "trimmed": self._trimmed,
            "leased": leased,
        }


def _describe(bounds: Bounds) -> str:
    return " and ".join(
        text
        for value, text in (
            (bounds.messages, f"{bounds.messages} of them"),
            (bounds.seconds, f"each for {bounds.seconds:.0f} seconds"),
        )
        if value
    )
