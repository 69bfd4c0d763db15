"""The thread that commits what tasks publish and settle, in groups.

Theory of operation
-------------------
The writer takes everything that has gathered since its last commit, up to a bound, commits
it, and wakes all the tasks together, with one call into each trio loop. While it syncs, the
next group gathers, and a busy loop keeps what its tasks hand over until it has nothing left to
do (`mailerq.queues.embedded.batcher`): the more load, the larger the group. The mail of a
single client never waits; what became of its last one does, for the next.

Before the commit it leases those messages that can go to a consumer at once (see
`mailerq.queues.embedded.subscription`), and hands them over after it.

A purge is cut into many commits, and groups of other requests go between them.

Guarantees
----------
- A task that has handed over a request is woken exactly once, whatever happens.
- After an error nothing of the group is in the file, and the leases are as they were. An error
  that is about one request, and not about the disk, leaves the others of its group alone.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final

import msgspec
import outcome
import trio

from mailerq.errors import MailerqError, MessageError, QueueDamaged, QueueError
from mailerq.message import Message, decode_properties
from mailerq.queues.embedded.queue_file import Store
from mailerq.queues.embedded.records import Batch, Insert, Retry
from mailerq.queues.embedded.sqlite_file import translate
from mailerq.queues.embedded.subscription import EmbeddedConsumer, Feed, Feeds, HeldLease

__all__ = ["Request", "Writer"]

logger = logging.getLogger("mailerq.queues")

BATCH_MESSAGES: Final = 1_000
BATCH_BYTES: Final = 64 << 20
"""Bounds of one commit: what comes later waits for the next."""

PUBLISHED_SECONDS: Final = 0.01
SETTLE_SECONDS: Final = 0.002
"""When mail was published a moment ago, what is settled alone waits so long for the next mail:
only the next message of its connection waits for it, and a client that sends one mail after
another waits for every commit."""


class Request(msgspec.Struct, eq=False):
    """What one task hands to the writer; without a task nobody waits for it."""

    inserts: Sequence[Insert] = ()
    retries: Sequence[tuple[HeldLease, Retry]] = ()
    removals: Sequence[HeldLease] = ()
    work: Iterator[int] | None = None
    """Work of many commits instead: one for each step, which counts its rows."""
    rows: int = 0
    task: trio.lowlevel.Task | None = None
    token: trio.lowlevel.TrioToken | None = None
    problem: Exception | None = None
    """What the task is to be told instead of the count of rows."""

    @property
    def count(self) -> int:
        return len(self.inserts) + len(self.retries) + len(self.removals)

    @property
    def size(self) -> int:
        inserts = sum(insert.size for insert in self.inserts)
        return inserts + sum(retry.insert.size for _, retry in self.retries)

    @property
    def settles(self) -> bool:
        """Whether it is about consumed messages; otherwise it publishes new ones."""
        return bool(self.removals or self.retries)

    @property
    def leases(self) -> list[HeldLease]:
        return [*self.removals, *(lease for lease, _ in self.retries)]


class Writer:
    """Commits to a store, which is its own from now on."""

    def __init__(self, store: Store, feeds: Feeds) -> None:
        self._store = store
        self._feeds = feeds
        self._requests: SimpleQueue[Request | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="queue writer")
        self._commits = self._messages = self._largest = 0
        self._seconds = 0.0
        self._published = 0.0
        self._ended = False
        self._thread.start()

    def put(self, request: Request | None) -> None:
        """Hand over a request; None is the last one."""
        self._requests.put(request)

    def join(self) -> None:
        self._thread.join()

    def statistics(self) -> dict[str, Any]:
        """Commits, messages in them (published, retried, settled), and the time they took."""
        return {
            "commits": self._commits,
            "messages": self._messages,
            "messages_per_commit": self._messages / max(self._commits, 1),
            "largest_commit": self._largest,
            "commit_seconds": self._seconds,
        }

    def _run(self) -> None:
        # A sync that has ended need not interrupt who runs on this core: until they pause, more
        # gathers. Where that is not allowed it is only dearer; another policy is somebody's wish.
        with suppress(OSError):
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        works: deque[Request] = deque()
        while not self._ended or works:
            group = self._gather([], works)
            if group:
                lately = time.monotonic() - self._published < PUBLISHED_SECONDS
                if lately and all(request.settles for request in group):
                    self._gather(group, works, SETTLE_SECONDS)
                self._commit(group)
                group = []  # release the mail while the thread waits for more
            if works:
                self._work(works)

    def _gather(
        self, group: list[Request], works: deque[Request], patience: float | None = None
    ) -> list[Request]:
        """Add what has come; wait for the first, some seconds or, with nothing to do, for ever."""
        count = sum(request.count for request in group)
        size = sum(request.size for request in group)
        while not self._ended and count < BATCH_MESSAGES and size < BATCH_BYTES:
            waits = patience is not None or not (group or works)
            try:
                request = self._requests.get(block=waits, timeout=patience)
            except Empty:
                break
            if request is None:
                self._ended = True
            elif request.work is not None:
                works.append(request)
            else:
                group.append(request)
                patience = None
                count += request.count
                size += request.size
        return group

    def _commit(self, group: Sequence[Request]) -> None:
        started = time.perf_counter()
        group, tight = self._with_room(group)
        if not group:
            return
        inserts = [insert for request in group for insert in request.inserts]
        batch = Batch(
            inserts,
            [retry for request in group for _, retry in request.retries],
            [lease.id for request in group for lease in request.removals],
            tight,
        )
        reserved: dict[int, HeldLease] = {}
        notify: set[EmbeddedConsumer] = set()
        try:
            self._store.number(inserts)
            self._reserve(inserts, reserved)
            self._store.write(batch)
        except (TypeError, ValueError, OverflowError) as error:
            self._withdraw(reserved)
            if len(group) > 1:
                # One of them is to blame, and the others have nothing to do with it.
                for request in group:
                    self._commit([request])
                return
            self._refuse(group, MessageError(f"the queue file cannot hold it: {error}"))
        except Exception as error:
            if not isinstance(error, QueueError):
                logger.exception("an error in the writer of the queue")
            self._withdraw(reserved)
            self._refuse(group, translate(error, self._store.path))
        else:
            try:
                self._hand_out(group, reserved, notify)
            except Exception:  # the group is durable all the same
                logger.exception("an error in the writer of the queue")
            if not all(request.settles for request in group):
                self._published = time.monotonic()
            count = sum(request.count for request in group)
            self._commits += 1
            self._messages += count
            self._largest = max(self._largest, count)
            self._seconds += time.perf_counter() - started
        self._wake(group, notify)

    def _with_room(self, group: Sequence[Request]) -> tuple[Sequence[Request], bool]:
        """Send new mail away that the disk has no room for.

        Returns the rest of the group, and whether what is kept for that is running out.
        """
        new = [request for request in group if not request.settles]
        size = sum(request.size for request in new)
        try:
            found = self._store.room(size)
        except QueueError:
            return group, False  # the commit will tell
        if not new or found.holds(size):
            return group, found.tight
        for request in new:
            request.problem = self._store.no_room(found)
        self._wake(new)
        return [request for request in group if request.settles], found.tight

    def _reserve(self, inserts: Sequence[Insert], reserved: dict[int, HeldLease]) -> None:
        """Lease what can go to a consumer as soon as it is committed."""
        given: set[int] = set()
        with self._feeds.lock:
            if not self._feeds.feeds:
                return
            now = self._feeds.now()
            for insert in inserts:
                feed = self._feeds.get(insert.queue)
                if feed is None or insert.due > now or not feed.direct(now):
                    continue
                consumer = feed.choose()
                if consumer is None:
                    continue
                properties = insert.message.properties
                if id(properties) in given:  # one message for two queues: a dict for each
                    properties = decode_properties(insert.properties)
                given.add(id(properties))
                message = Message(properties, insert.body)
                lease = HeldLease(
                    insert.id, insert.queue, message, insert.due, insert.size, None, None, None
                )
                feed.hold(lease, consumer)
                reserved[insert.id] = lease

    def _hand_out(
        self,
        group: Sequence[Request],
        reserved: dict[int, HeldLease],
        notify: set[EmbeddedConsumer],
    ) -> None:
        """A group is durable: end its leases, and let the consumers have what is theirs."""
        feeds = self._feeds
        now = feeds.now()
        touched: dict[str, Feed] = {}
        with feeds.lock:
            for request in group:
                for lease in request.leases:
                    feed = touched[lease.queue] = feeds.feeds[lease.queue]
                    feed.drop(lease)
                for lease, retry in request.retries:
                    touched[lease.queue].note(retry.insert.due, lease.id, now)
                for insert in request.inserts:
                    found = feeds.get(insert.queue)
                    if found is None:
                        continue
                    touched[insert.queue] = found
                    held = reserved.get(insert.id)
                    if held is not None and found.held.get(insert.id) is held:
                        held.reference = insert.reference
                        held.body_crc = insert.body_crc
                        held.stored_body = insert.body
                        feeds.make_ready(held, notify)
                    else:
                        found.note(insert.due, insert.id, now)
            for feed in touched.values():
                feeds.pump(feed)
                feeds.tidy(feed)
                feeds.set_alarm(feed, now)

    def _withdraw(self, reserved: dict[int, HeldLease]) -> None:
        """A group failed: what it would have published goes to no consumer."""
        feeds = self._feeds
        with feeds.lock:
            for lease in reserved.values():
                if (feed := feeds.get(lease.queue)) is not None:
                    feed.drop(lease)
                    feeds.tidy(feed)

    def _refuse(self, group: Sequence[Request], problem: MailerqError) -> None:
        """Tell the tasks of a group that failed; what was leased still is."""
        feeds = self._feeds
        with feeds.lock:
            for request in group:
                request.problem = type(problem)(str(problem))
                for lease in request.leases:
                    if lease.consumer is None:
                        continue  # a damaged record stays out of the way until a restart
                    lease.settling = False
                    feed = feeds.feeds[lease.queue]
                    if lease.consumer not in feed.consumers:
                        feeds.give_back(feed, lease)
                        feeds.tidy(feed)
        if isinstance(problem, QueueDamaged):
            feeds.damage(problem)

    def _work(self, works: deque[Request]) -> None:
        """Do one step of work that takes many."""
        request = works[0]
        assert request.work is not None
        try:
            request.rows += next(request.work)
            return
        except StopIteration:
            pass
        except Exception as error:
            if not isinstance(error, QueueError):
                logger.exception("an error in the writer of the queue")
            problem = request.problem = translate(error, self._store.path)
            if isinstance(problem, QueueDamaged):
                self._feeds.damage(problem)
        works.popleft()
        self._wake([request])

    def _wake(self, group: Sequence[Request], consumers: Iterable[EmbeddedConsumer] = ()) -> None:
        """Wake the tasks of a group and what waits for consumers: one call into each loop."""
        loops: defaultdict[trio.lowlevel.TrioToken, tuple[list[Request], list[EmbeddedConsumer]]]
        loops = defaultdict(lambda: ([], []))
        for request in group:
            if request.token is not None:
                loops[request.token][0].append(request)
        for consumer in consumers:
            loops[consumer.token][1].append(consumer)
        for token, (requests, waiting) in loops.items():
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(_wake_here, self._feeds, requests, waiting)


def _wake_here(
    feeds: Feeds, requests: Sequence[Request], consumers: Sequence[EmbeddedConsumer]
) -> None:
    """Wake the tasks of one loop, on that loop."""
    for request in requests:
        assert request.task is not None
        # Not to be kept: where it is raised, the request is known, and they would be a cycle.
        problem, request.problem = request.problem, None
        result = outcome.Value(request.rows) if problem is None else outcome.Error(problem)
        trio.lowlevel.reschedule(request.task, result)
    for consumer in consumers:
        feeds.wake(consumer)
