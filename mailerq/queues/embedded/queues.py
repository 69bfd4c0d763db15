"""The embedded queue: the queues of one directory, in a SQLite file, on trio.

Theory of operation
-------------------
Tasks hand what they publish and settle to a thread that commits in batches (`writer`). A
message that is due goes to a consumer straight from memory once it is committed, if the
consumer has credit and nothing older waits. Otherwise the message stays in the file until a
second thread (`reader`) fetches it. `subscription` decides who gets which message.

A published message belongs to the queue: the publisher must not change its properties any
more, because the consumer may get the very same dict. A consumer may change its message as it
likes; what is given back comes again as it is in the file.

Guarantees
----------
- What was handed over before the context of `EmbeddedQueues.open` ends is still committed.
- One process has a directory exclusively; others may publish and look into the same file at
  any time, which is noticed within a second, or at once by `EmbeddedQueues.wake`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, Self

import trio

from mailerq.errors import QueueDamaged, QueueError
from mailerq.queues.embedded.batcher import Gatherer
from mailerq.queues.embedded.queue_file import Bounds, Store
from mailerq.queues.embedded.reader import Fetcher
from mailerq.queues.embedded.records import Insert, Retry, prepare
from mailerq.queues.embedded.sqlite_file import Reader
from mailerq.queues.embedded.subscription import Feeds, HeldLease
from mailerq.queues.embedded.writer import Request, Writer
from mailerq.queues.interface import (
    Consumer,
    Depth,
    Entry,
    Lease,
    Publication,
    Queues,
    Settlement,
)
from mailerq.queues.opening import open_exclusive, open_shared
from mailerq.queues.ownership import DirectoryLock

__all__ = ["EmbeddedQueues"]

logger = logging.getLogger("mailerq.queues")

SAY_SECONDS: Final = 3600.0
"""How often at most the log says that documents beyond the bounds of a queue were removed."""


class EmbeddedQueues(Queues):
    """The queues in one directory.

    >>> import tempfile
    >>> from mailerq.message import Message
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

    def __init__(
        self, store: Store, clock: Callable[[], float], bounds: Sequence[Bounds] = ()
    ) -> None:
        self._store = store
        self._feeds = Feeds(store.path, clock)
        self.set_bounds(bounds)
        self._trimmed = self._trimmed_before = 0
        self._said = -math.inf  # when the log said last that something was, by time.monotonic
        self._closed = False
        self._writer = Writer(store, self._feeds)
        self._gatherers: dict[trio.lowlevel.TrioToken, Gatherer] = {}
        self._fetcher = Fetcher(
            store.path, self._feeds, self._writer.put, store.set_back, self._trim
        )

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        directory: str,
        *,
        exclusive: bool = True,
        clock: Callable[[], float] = time.time,
        bounds: Sequence[Bounds] = (),
        lock: DirectoryLock | None = None,
    ) -> AsyncIterator[Self]:
        """Open the queues of a directory, which is made if missing; raises `QueueError`.

        `exclusive` refuses a directory that another process has opened so, checks the file,
        and salvages a damaged one. `clock` is the wall clock, in seconds since 1970. What is
        beyond `bounds` is deleted once a minute. A `lock` on the directory that the caller has
        taken is released at the end.
        """
        opener = partial(open_exclusive, lock=lock) if exclusive else open_shared
        store = await trio.to_thread.run_sync(opener, directory)
        queues = cls(store, clock, bounds)
        try:
            yield queues
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(queues._close)
            queues._retire()

    def _close(self) -> None:
        with self._feeds.lock:
            self._closed = True
            self._feeds.fetcher_ends = True
            self._feeds.reads.put(None)
            for gatherer in self._gatherers.values():
                gatherer.flush()
            self._writer.put(None)
        self._writer.join()
        self._fetcher.join()
        self._store.close()

    def _retire(self) -> None:
        """Leave the loops alone."""
        for token, gatherer in self._gatherers.items():
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(trio.lowlevel.remove_instrument, gatherer)

    async def publish(self, publications: Sequence[Publication]) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        now = self._feeds.clock()
        inserts = [prepare(publication, now) for publication in publications]
        await self._hand_over(Request(inserts))

    def check(self, publication: Publication) -> None:
        prepare(publication, 0.0)

    async def ack(self, settlements: Sequence[Settlement]) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        now = self._feeds.clock()
        inserts: list[Insert] = []
        retries: list[tuple[HeldLease, Retry]] = []
        removals: list[HeldLease] = []
        for settlement in settlements:
            lease = settlement.lease
            if not isinstance(lease, HeldLease):
                raise ValueError(f"message {lease.id}: not leased by this queue")
            again: Retry | None = None
            for publication in settlement.publications:
                insert = prepare(publication, now)
                same = insert.queue == lease.queue and insert.body == lease.stored_body
                if same and again is None:
                    again = Retry(lease.id, lease.reference, lease.body_crc, insert)
                else:
                    inserts.append(insert)
            if again is None:
                removals.append(lease)
            else:
                retries.append((lease, again))
        await self._hand_over(Request(inserts, retries, removals))

    async def _hand_over(self, request: Request) -> int:
        """Wait until the writer is done with it."""
        with self._feeds.lock:
            if self._feeds.damaged is not None:
                raise QueueDamaged(str(self._feeds.damaged))
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
            self._gatherer(request.token).add(request)
        rows: int = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        return rows

    def _gatherer(self, token: trio.lowlevel.TrioToken) -> Gatherer:
        """The gatherer of the loop that this is called in."""
        gatherer = self._gatherers.get(token)
        if gatherer is None:
            gatherer = self._gatherers[token] = Gatherer(self._writer.put, self._feeds.lock)
            trio.lowlevel.add_instrument(gatherer)
        return gatherer

    def _check_lease(self, lease: HeldLease) -> None:
        feed = self._feeds.get(lease.queue)
        if feed is None or feed.held.get(lease.id) is not lease or lease.settling:
            raise ValueError(f"message {lease.id} of queue {lease.queue}: the lease is over")

    def release(self, lease: Lease) -> None:
        if not isinstance(lease, HeldLease):
            raise ValueError(f"message {lease.id}: not leased by this queue")
        with self._feeds.lock:
            self._check_lease(lease)
            feed = self._feeds.feeds[lease.queue]
            self._feeds.give_back(feed, lease)
            self._feeds.pump(feed)

    @asynccontextmanager
    async def consume(self, queue: str, *, prefetch: int) -> AsyncIterator[Consumer]:
        if prefetch < 1:
            raise ValueError(f"prefetch {prefetch}: expected 1 or more")
        with self._feeds.lock:
            if self._closed:
                raise QueueError("the queue is closed")
            consumer = self._feeds.open(queue, prefetch)
        try:
            yield consumer
        finally:
            with self._feeds.lock:
                self._feeds.close(consumer)

    def set_bounds(self, bounds: Sequence[Bounds]) -> None:
        """Keep other queues, or the same ones within other bounds, from the next minute on."""
        self._bounds = [each for each in bounds if each.messages or each.seconds]

    async def depths(self) -> list[Depth]:
        def look() -> list[Depth]:
            with Reader(self._store.path) as reader:
                return reader.depths(self._feeds.clock())

        return await trio.to_thread.run_sync(look)

    async def browse(self, queue: str, *, limit: int = 100, after: int = 0) -> list[Entry]:
        def look() -> list[Entry]:
            with Reader(self._store.path) as reader:
                return reader.browse(queue, limit=limit, after=after)

        return await trio.to_thread.run_sync(look)

    async def purge(self, queue: str) -> int:
        await trio.lowlevel.checkpoint_if_cancelled()
        steps = self._store.purge_steps(queue, partial(self._held, queue))
        return await self._hand_over(Request(work=steps))

    def _held(self, queue: str) -> list[int]:
        with self._feeds.lock:
            feed = self._feeds.get(queue)
            return [] if feed is None else list(feed.held)

    def _trim(self) -> Iterator[int]:
        """Keep queues in their bounds, some rows a commit; on the writer's thread."""
        for bounds in self._bounds:
            queue = bounds.queue
            now = self._feeds.now()
            for count in self._store.trim_steps(bounds, now, partial(self._held, queue)):
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

    def wake(self) -> None:
        with self._feeds.lock:
            for feed in self._feeds.feeds.values():
                self._feeds.look_again(feed)

    def statistics(self) -> dict[str, Any]:
        with self._feeds.lock:
            leased = {queue: len(feed.held) for queue, feed in self._feeds.feeds.items()}
        return {
            **self._writer.statistics(),
            **self._fetcher.statistics(),
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
