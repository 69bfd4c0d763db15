"""The thread that commits in batches what tasks publish and settle.

Theory of operation
-------------------
The writer takes all requests that came since its last commit, up to a limit, commits them, and
wakes the tasks together, with one call into each trio loop. While the writer syncs, the next batch
forms. A busy loop holds its requests back until it is about to sleep
(`mailerq.queues.embedded.batcher`): the higher the load, the larger the batch. Mail of a single
client never waits; the settlement of its last mail waits for the next one.

Before the commit the writer leases the messages that can go to a taker at once (see
`mailerq.queues.embedded.open_queues`), and hands them over after it; the message of a lone client
when the client has its reply.

A purge is split into many commits, with other batches between them.

Guarantees
----------
- A task that has handed over a request is woken exactly once, whatever happens.
- After an error nothing of the batch is in the file, and the leases are unchanged. An error of one
  request, not of the disk, does not affect the others of its batch.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final

import outcome
import trio

from mailerq.errors import MailerqError, MessageError, QueueDamaged, QueueError
from mailerq.message import Message, decode_properties
from mailerq.queues.embedded.open_queues import (
    HeldLease,
    OpenQueue,
    OpenQueues,
    Taker,
    Wakeable,
    wake_all,
)
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.records import Batch, Insert, Retry
from mailerq.queues.embedded.sqlite_file import translate
from mailerq.turns import EndOfTurn, woken

__all__ = ["Request", "Writer"]

logger = logging.getLogger("mailerq.queues")

BATCH_MESSAGES: Final = 1_000
BATCH_BYTES: Final = 64 << 20
"""Limit of one commit: further requests wait for the next."""

PUBLISHED_SECONDS: Final = 0.01
SETTLE_SECONDS: Final = 0.002
"""Just after mail was published, a batch of settlements alone waits this long for the next mail.
Only the next message of a connection waits for a settlement, while a client that sends one mail
after another waits for every commit."""


class Request:
    """A task's request to the writer; a request without a task has no waiter."""

    __slots__ = (
        "can_wait", "count", "inserts", "problem", "removals", "retries", "rows", "settles",
        "size", "task", "token", "work",
    )  # fmt: skip

    def __init__(
        self,
        inserts: Sequence[Insert] = (),
        retries: Sequence[tuple[HeldLease, Retry]] = (),
        removals: Sequence[HeldLease] = (),
        *,
        work: Iterator[int] | None = None,
        can_wait: bool = False,
    ) -> None:
        self.inserts = inserts
        self.retries = retries
        self.removals = removals
        self.count = len(inserts) + len(retries) + len(removals)
        self.size = _size(inserts, retries)
        self.settles = bool(removals or retries)
        """Whether the request settles consumed messages; otherwise it publishes new ones."""
        self.work = work
        """Work in many commits instead: each step is one, and yields its number of rows."""
        self.can_wait = can_wait
        """Whether the work may be left to the next start."""
        self.rows = 0
        self.task: trio.lowlevel.Task | None = None
        self.token: trio.lowlevel.TrioToken | None = None
        self.problem: Exception | None = None
        """The error for the task, instead of the number of rows."""

    @property
    def leases(self) -> list[HeldLease]:
        return [*self.removals, *(lease for lease, _ in self.retries)]

    def wake(self) -> None:
        """Wake the task, on its loop."""
        assert self.task is not None
        # Drop the reference: the frame that raises the error knows the request, which is a cycle.
        problem, self.problem = self.problem, None
        result = woken(self.rows) if problem is None else outcome.Error(problem)
        trio.lowlevel.reschedule(self.task, result)


def _size(inserts: Sequence[Insert], retries: Sequence[tuple[HeldLease, Retry]]) -> int:
    size = 0
    for insert in inserts:
        size += insert.size
    for _, retry in retries:
        insert = retry.insert
        size += insert.size
    return size


def _lone(group: Sequence[Request]) -> Request | None:
    """The request of a client that sends one mail after another, if there is only this client.

    The batch may settle its last mail.
    """
    new = [request for request in group if not request.settles]
    return new[0] if len(new) == 1 and len(group) <= 2 else None


class AfterReply:
    """Wakes a taker when the reply to a lone client has left the loop of both.

    Otherwise the client would wait while the delivery of its mail begins. Under load a turn more
    for each batch costs more than it saves.
    """

    __slots__ = ("taker", "token")

    def __init__(self, taker: Taker) -> None:
        self.taker = taker
        self.token = taker.token

    def wake(self) -> None:
        EndOfTurn.of_this_loop().call_last(self._wake)

    def _wake(self, idle: bool) -> bool:
        try:
            self.taker.wake()
        except Exception as error:
            # `EndOfTurn` would log a defect of a receiver, and its mail would stay leased. Such a
            # defect ends the loop, as it does in a call from a thread.
            assert self.token is not None
            self.token.run_sync_soon(outcome.Error(error).unwrap)
        return True


class Writer:
    """Commits to a file, which belongs to the writer from now on."""

    def __init__(self, file: QueueFile, queues: OpenQueues) -> None:
        self._file = file
        self._queues = queues
        self._requests: SimpleQueue[Request | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="queue writer")
        self._commits = self._messages = self._largest = 0
        self._seconds = 0.0
        self._published = 0.0
        self._ended = False
        self._thread.start()

    def put(self, request: Request | None) -> None:
        """Hand over a request; None ends the writer."""
        self._requests.put(request)

    def join(self) -> None:
        self._thread.join()

    def statistics(self) -> dict[str, Any]:
        """Commits, the messages in them (published, retried, settled), and the time taken."""
        return {
            "commits": self._commits,
            "messages": self._messages,
            "messages_per_commit": self._messages / max(self._commits, 1),
            "largest_commit": self._largest,
            "commit_seconds": self._seconds,
        }

    def _run(self) -> None:
        # A finished sync need not preempt the thread on this core: until that pauses, more requests
        # come. If the policy is refused we only pay more; an operator's own policy is left alone.
        with suppress(OSError):
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        works: deque[Request] = deque()
        while not self._ended or works:
            group: list[Request] = []  # drop the last batch, whose bodies may be large
            self._fill(group, works)
            if group:
                lately = time.monotonic() - self._published < PUBLISHED_SECONDS
                if lately and all(request.settles for request in group):
                    self._fill(group, works, SETTLE_SECONDS)
                self._commit(group)
            if self._ended:
                works = deque(work for work in works if not work.can_wait)
            if works:
                self._work(works)

    def _fill(
        self, group: list[Request], works: deque[Request], timeout: float | None = None
    ) -> list[Request]:
        """Add pending requests; wait for the first, for some seconds or, without work, for ever."""
        count = size = 0
        for request in group:
            count += request.count
            size += request.size
        while not self._ended and count < BATCH_MESSAGES and size < BATCH_BYTES:
            waits = timeout is not None or not (group or works)
            try:
                found = self._requests.get(block=waits, timeout=timeout)
            except Empty:
                break
            if found is None:
                self._ended = True
                continue
            request = found
            if request.work is not None:
                works.append(request)
            else:
                group.append(request)
                timeout = None
                count += request.count
                size += request.size
        return group

    def _commit(self, group: Sequence[Request]) -> None:
        started = time.perf_counter()
        group, tight = self._with_room(group)
        if not group:
            return
        inserts: list[Insert] = []
        retries: list[Retry] = []
        removals: list[int] = []
        count, settles = 0, True
        for request in group:
            inserts += request.inserts
            retries += [retry for _, retry in request.retries]
            removals += [lease.id for lease in request.removals]
            count += request.count
            settles = settles and request.settles
        now = self._queues.now()
        for insert in inserts:
            insert.keep_wait(now)
        for retry in retries:
            retry.insert.keep_wait(now)
        batch = Batch(inserts, retries, removals, tight)
        reserved: dict[int, HeldLease] = {}
        try:
            self._file.number(inserts)
            self._reserve(inserts, reserved)
            self._file.write(batch)
        except (TypeError, ValueError, OverflowError) as error:
            self._withdraw(reserved)
            if len(group) > 1:
                # One request is to blame, and the others must not suffer.
                for request in group:
                    self._commit([request])
                return
            self._refuse(group, MessageError(f"the queue file cannot hold it: {error}"))
        except Exception as error:
            if not isinstance(error, QueueError):
                logger.exception("an error in the writer of the queue")
            self._withdraw(reserved)
            self._refuse(group, translate(error, self._file.path))
        else:
            try:
                self._hand_out(group, reserved)
            except Exception:  # the batch is durable all the same
                logger.exception("an error in the writer of the queue")
            if not settles:
                self._published = time.monotonic()
            self._commits += 1
            self._messages += count
            self._largest = max(self._largest, count)
            self._seconds += time.perf_counter() - started
        self._wake(group)

    def _with_room(self, group: Sequence[Request]) -> tuple[Sequence[Request], bool]:
        """Refuse new mail if the disk has no room for it.

        Returns the rest of the batch, and whether the reserve is running out.
        """
        new = [request for request in group if not request.settles]
        size = sum(request.size for request in new)
        try:
            found = self._file.room(size)
        except QueueError:
            return group, False  # the commit will fail if there is no room
        if not new or found.holds(size):
            return group, found.tight
        for request in new:
            request.problem = self._file.no_room(found)
        self._wake(new)
        return [request for request in group if request.settles], found.tight

    def _reserve(self, inserts: Sequence[Insert], reserved: dict[int, HeldLease]) -> None:
        """Lease messages that can go to a taker as soon as they are committed."""
        given: set[int] = set()
        with self._queues.lock:
            if not self._queues.queues:
                return
            now = self._queues.now()
            for insert in inserts:
                queue = self._queues.queues.get(insert.queue)
                if queue is None or insert.due > now:
                    continue
                taker = queue.reserve(insert.destination, now)
                if taker is None:
                    continue
                properties = insert.message.properties
                if id(properties) in given:  # one message for two queues: each needs its own dict
                    properties = decode_properties(insert.properties)
                given.add(id(properties))
                body, size = insert.body, insert.size
                loaded = body is None or len(body) <= taker.direct_bytes()
                if not loaded:
                    body = None
                lease = HeldLease(
                    insert.id,
                    insert.queue,
                    Message(properties, body),
                    insert.destination,
                    size,
                    loaded,
                    insert.due / 1000,
                    insert.due,
                    memory=size if loaded else len(insert.properties),
                )
                queue.hold(lease, taker)
                reserved[insert.id] = lease

    def _hand_out(self, group: Sequence[Request], reserved: dict[int, HeldLease]) -> None:
        """A batch is durable: end its leases, and hand new messages to their takers."""
        queues = self._queues
        now = queues.now()
        touched: dict[str, OpenQueue] = {}
        with queues.lock:
            for request in group:
                for lease in request.leases:
                    queue = touched[lease.queue] = queues.queues[lease.queue]
                    queue.drop(lease)
                for lease, retry in request.retries:
                    queues.note_new(touched[lease.queue], retry.insert, now)
                for insert in request.inserts:
                    found = queues.queues.get(insert.queue)
                    if found is None:
                        continue
                    touched[insert.queue] = found
                    held = reserved.get(insert.id)
                    if held is not None and found.held.get(insert.id) is held:
                        held.reference = insert.reference
                        held.body_crc = insert.body_crc
                        held.stored_body = insert.body if held.loaded else None
                        queues.give(held)
                    else:
                        queues.note_new(found, insert, now)
            for queue in touched.values():
                queues.pump(queue)
                queues.tidy(queue)
                if queue.timers and queue.timers[0][0] < now + 1000:
                    queues.jobs.put(None)  # the reader may sleep for longer

    def _withdraw(self, reserved: dict[int, HeldLease]) -> None:
        """A batch failed: drop the leases of its new messages."""
        queues = self._queues
        with queues.lock:
            for lease in reserved.values():
                if (queue := queues.queues.get(lease.queue)) is not None:
                    queue.drop(lease)
                    queues.tidy(queue)

    def _refuse(self, group: Sequence[Request], problem: MailerqError) -> None:
        """Report an error to the tasks of a batch; their leases remain."""
        queues = self._queues
        with queues.changing():
            for request in group:
                request.problem = type(problem)(str(problem))
                for lease in request.leases:
                    if lease.taker is None:
                        continue  # a damaged record stays leased until a restart
                    lease.settling = False
                    if lease.taker.closed:
                        queue = queues.queues[lease.queue]
                        queues.give_back(queue, lease)
                        queues.pump(queue)
                        queues.tidy(queue)
        if isinstance(problem, QueueDamaged):
            queues.damage(problem)

    def _work(self, works: deque[Request]) -> None:
        """Do one step of long work."""
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
            problem = request.problem = translate(error, self._file.path)
            if isinstance(problem, QueueDamaged):
                self._queues.damage(problem)
        works.popleft()
        self._wake([request])

    def _wake(self, group: Sequence[Request]) -> None:
        """Wake the tasks of a batch, and takers with new mail: one call into each loop."""
        with self._queues.lock:
            takers = self._queues.to_wake()
        waiting: list[Wakeable] = [*group]
        lone = _lone(group)
        for taker in takers:
            later = lone is not None and lone.token is taker.token
            waiting.append(AfterReply(taker) if later else taker)
        wake_all(waiting)
