"""The thread that reads waiting messages from the file, and keeps the time.

Theory of operation
-------------------
The reader serves jobs in turn: some of a destination (`Take`), a body (`Load`), a piece of the list
of destinations (`Scan`). All jobs that have come are served in one go, and what came of them
is told with one call into each loop. A take is bounded in messages and in bytes, so a destination
of a million messages, or of huge ones, costs no more memory than what is leased of it. What nobody
takes is not read.

While somebody takes, the thread looks at the clock at least once a second: whether something became
due that consumers wait for, whether another process has published something, and whether the
clock was set back. Then due times are set back with it, or mail that nobody delayed would wait for
an hour. Once a minute it has the writer delete what is beyond the bounds of a queue. New messages
of other processes are found by their numbers: all that are not of our own blocks.

A record that does not prove itself is moved to the queue ``damaged``, with the reason, by the
writer, and reading goes on.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty
from typing import Any, Final

import outcome

from mailerq.errors import MessageDamaged, QueueDamaged, QueueError
from mailerq.message import Message
from mailerq.queues.embedded.open_queues import (
    HeldLease,
    Job,
    Load,
    OpenQueue,
    OpenQueues,
    Scan,
    Take,
    Wakeable,
    wake_all,
)
from mailerq.queues.embedded.queue_reader import QueueReader
from mailerq.queues.embedded.records import Row, aside, check, prepare
from mailerq.queues.embedded.sqlite_file import translate
from mailerq.queues.embedded.taking import Found, Wanted
from mailerq.queues.embedded.writer import Request
from mailerq.queues.interface import DAMAGED_QUEUE, Taken

__all__ = ["Maintenance", "Reader"]

Checked = tuple[Row, int | None, Message | str]
"""A row, the size of its body, and its message or what is wrong with it."""

logger = logging.getLogger("mailerq.queues")

POLL_SECONDS: Final = 1.0
"""How late at most another process's message, or a jump of the clock, is noticed."""

TRIM_SECONDS: Final = 60.0
"""How often what is beyond the bounds of a queue is deleted."""

BACKWARD_MS: Final = 1_000
"""What the clock may lose without anybody caring."""

SCAN_PLACES: Final = 500
"""Lanes that a scan looks at before other jobs have their turn."""

TURN_SECONDS: Final = 0.005
"""After this time of serving jobs those that are done are told so."""

ERROR_SECONDS: Final = 0.1
"""How long to wait for a disk that gives errors."""


@dataclass(frozen=True, slots=True)
class Maintenance:
    """Work for the writer that the reader starts when it is time for that."""

    set_back: Callable[[int, int], Iterator[int]]
    trim: Callable[[], Iterator[int]]
    sort: Callable[[], Iterator[int]]


class Reader:
    """Reads from a connection of its own."""

    def __init__(
        self,
        queues: OpenQueues,
        write: Callable[[Request], None],
        own_numbers: list[range],
        maintenance: Maintenance,
    ) -> None:
        self._file = QueueReader(queues.path)
        self._queues = queues
        self._write = write
        self._own_numbers = own_numbers
        self._maintenance = maintenance
        self._known: int | None = None
        self._trimmed = -math.inf
        self._version = -1
        self._latest = 0
        self._failed = False
        self._reads = self._messages = 0
        self._thread = threading.Thread(target=self._run, name="queue reader")
        self._thread.start()

    def join(self) -> None:
        self._thread.join()
        self._file.close()

    def statistics(self) -> dict[str, Any]:
        """How often the file was read for takers, and what messages came of it."""
        return {"reads": self._reads, "read_messages": self._messages}

    def _run(self) -> None:
        queues = self._queues
        poll = time.monotonic()
        self._try(self._look)  # from here on: scans find what is there already
        while True:
            with queues.lock:
                timeout = self._timeout()
            job: Job | None = None
            try:
                job = queues.jobs.get(timeout=timeout)
            except Empty:
                pass
            self._serve(job)
            if queues.reader_ends:
                return
            if queues.look_now or time.monotonic() >= poll:
                poll = time.monotonic() + POLL_SECONDS
                self._poll()
            with queues.changing():
                for queue in queues.queues.values():
                    queues.pump(queue)

    def _timeout(self) -> float | None:
        """How many seconds there is nothing to do; while nobody takes, for ever."""
        timeout: float | None = None
        now = self._queues.now()
        for queue in self._queues.queues.values():
            if not queue.takers:
                continue
            timeout = POLL_SECONDS if timeout is None else timeout
            for consumer in queue.consumers:
                at = consumer.wants_from()
                rest = (consumer.rests_until if at is None else at) - time.monotonic()
                if at is None and rest <= 0:
                    continue  # whatever lets it want something looks for that as well
                if queue.turns:
                    timeout = min(timeout, max(rest, 0.0))
                elif queue.timers:
                    due = (queue.timers[0][0] - now) / 1000
                    timeout = min(timeout, max(rest, due, 0.001))
        return timeout

    # Jobs

    def _serve(self, job: Job | None) -> None:
        """Serve a job and all that have come, and tell those who wait for them."""
        queues = self._queues
        done: list[Wakeable] = []
        began = since = time.monotonic()
        while True:
            if job is not None:
                self._do(job)
                if job.task is not None:
                    done.append(job)
            now = time.monotonic()
            if queues.jobs.empty() or (now - began > POLL_SECONDS and not queues.reader_ends):
                break
            if now - since > TURN_SECONDS:
                self._tell(done)
                since = now
            job = queues.jobs.get()
        self._tell(done)

    def _tell(self, done: list[Wakeable]) -> None:
        with self._queues.lock:
            takers = self._queues.to_wake()
        wake_all([*done, *takers])
        done.clear()

    def _do(self, job: Job) -> None:
        try:
            if self._queues.reader_ends:
                raise QueueError("the queue is closed")
            match job:
                case Take():
                    self._take(job)
                case Load():
                    self._load(job)
                case Scan():
                    self._scan(job)
            self._failed = False
        except Exception as error:
            if not isinstance(error, QueueError):
                logger.exception("an error in the reader of the queue")
            problem = translate(error, self._queues.path)
            job.result = outcome.Error(problem)
            self._complain(problem, told=job.task is not None)

    def _take(self, take: Take) -> None:
        queues, queue = self._queues, take.queue
        with queues.lock:
            if take.taker.closed:
                take.result = outcome.Error(QueueError("nobody takes any more"))
                return
            destination = queue.destination(take.destination)
            destination.begin_read()
            self._begin(queue)
            wanted = Wanted(
                queue.name,
                take.destination,
                queues.now(),
                take.limit,
                tuple(destination.held),
                destination.turns,
                take.taker.body_bytes(),
                not queue.is_sorted,
            )
        checked: list[Checked] = []
        found = Found([], True, None, wanted.turns)  # after an error the next read finds out
        try:
            found = self._file.take(wanted)
            checked = [(row, size, _checked(row, size)) for row, size in found.rows]
            self._reads += 1
            self._messages += len(found.rows)
        finally:
            with queues.lock:
                more = not self._lease(take, checked) or found.more
                self._end(queue)
                destination.turns = found.turns
                more = destination.end_read(more, found.next_due)
                queues.end_take(take, more)
        next_due = None if found.next_due is None else found.next_due / 1000
        take.result = outcome.Value(Taken(take.leases, more, next_due))

    def _lease(self, take: Take, checked: Sequence[Checked]) -> bool:
        """Lease what was read; False when there was no room for all of it."""
        queue, taker = take.queue, take.taker
        for row, size, message in checked:
            if row.id in queue.held or row.id in queue.settled:
                continue
            if isinstance(message, str):
                self._put_aside(queue, take.destination, row, message)
                continue
            if taker.closed or (take.task is None and not taker.credit()):
                return False
            body_size = size or 0
            loaded = message.body is not None or row.body is None
            lease = HeldLease(
                row.id,
                row.queue,
                message,
                take.destination,
                len(row.properties) + body_size,
                loaded,
                row.due / 1000,
                row.due,
                row.body,
                row.body_crc,
                message.body,
                len(row.properties) + len(message.body or b""),
            )
            queue.hold(lease, taker)
            if take.task is None:
                self._queues.give(lease)
            else:
                take.leases.append(lease)
        return True

    def _load(self, load: Load) -> None:
        lease, queue = load.lease, load.queue
        if (body := self._shared_body(load)) is not None:
            load.result = outcome.Value(body)
            return
        row = self._file.row(lease.id)
        message = "another process has deleted it" if row is None else check(row)
        if isinstance(message, Message):
            load.result = outcome.Value(message.body)
            return
        with self._queues.lock:
            if queue.held.get(lease.id) is lease and not lease.settling:
                queue.drop(lease)
                if row is not None:
                    self._put_aside(queue, lease.destination, row, message)
        load.result = outcome.Error(MessageDamaged(f"message {lease.id}: {message}"))

    def _shared_body(self, load: Load) -> bytes | None:
        """The body that a message shares with another one which has it in memory."""
        if not load.lease.reference:
            return None
        with self._queues.lock:
            for other in load.queue.held.values():
                if other.reference == load.lease.reference and other.stored_body is not None:
                    return other.stored_body
        return None

    def _scan(self, scan: Scan) -> None:
        queues, queue = self._queues, scan.queue
        try:
            found, after = self._file.places(queue.name, scan.after, SCAN_PLACES)
        except QueueError:
            # Again from here; mail is not forgotten because a disk hiccups.
            if not queues.reader_ends and queues.damaged is None:
                queues.jobs.put(scan)
            raise
        with queues.lock:
            now = queues.now()
            for place in found:
                queues.note(queue, place.destination, place.due, now)
            if after is not None:
                queues.jobs.put(Scan(queue, after))
                return
            queue.complete = True
            queue.scanning = False
            if queue.scan_again:
                queues.scan(queue)
            queues.tidy(queue)

    def _begin(self, queue: OpenQueue) -> None:
        queue.reading = True
        queue.settled.clear()

    def _end(self, queue: OpenQueue) -> None:
        queue.reading = False
        queue.settled.clear()

    def _put_aside(self, queue: OpenQueue, key: str, row: Row, reason: str) -> None:
        """Have a damaged record moved; it is leased, to nobody, until it is gone."""
        logger.error(
            "queue %s: message %d goes to queue %s: %s", queue.name, row.id, DAMAGED_QUEUE, reason
        )
        lease = HeldLease(row.id, queue.name, Message(), key)
        queue.hold(lease, None)
        insert = prepare(aside(row, reason), self._queues.clock(), self._queues.outbox)
        self._write(Request([insert], removals=[lease]))

    # The clock, and other processes

    def _poll(self) -> None:
        """Notice what others have published, and that the clock was set back."""
        queues = self._queues
        now = queues.now()
        if now < self._latest - BACKWARD_MS:
            logger.warning("the clock was set back %.1f s", (self._latest - now) / 1000)
            self._write(Request(work=self._maintenance.set_back(now, self._latest)))
            self._latest = now
        self._latest = max(self._latest, now)
        if time.monotonic() >= self._trimmed + TRIM_SECONDS:
            self._trimmed = time.monotonic()
            self._write(Request(work=self._maintenance.trim(), can_wait=True))
        queues.look_now = False
        self._try(self._look)
        if queues.unsorted:
            queues.unsorted = False
            self._write(Request(work=self._maintenance.sort(), can_wait=True))

    def _try(self, look: Callable[[], None]) -> None:
        try:
            look()
        except QueueError as error:
            self._complain(error)

    def _look(self) -> None:
        """Find what other processes have published since the last look."""
        queues = self._queues
        version = self._file.version()
        if version == self._version:
            return
        self._version = version
        if self._known is None:
            self._known = self._file.next_number()
            with queues.lock:
                queues.look_again()
            return
        # The writer only adds to them.
        while len(self._own_numbers) > 1 and self._own_numbers[0].stop <= self._known:
            del self._own_numbers[0]
        own = list(self._own_numbers)
        try:
            self._known, found = self._file.new_numbers(self._known, own)
        except QueueError:
            self._version = -1
            raise
        with queues.lock:
            now = queues.now()
            for waiting in found:
                queue = queues.queues.get(waiting.queue)
                if queue is None or waiting.id in queue.held:
                    continue
                if queue.is_sorted and waiting.lane < 0:
                    queues.unsorted = True
                else:
                    queues.note(queue, waiting.destination, waiting.due, now)
        self._tell([])

    def _complain(self, problem: QueueError, *, told: bool = False) -> None:
        """Say that the file cannot be read. Whoever is `told` decides when to try again."""
        if isinstance(problem, QueueDamaged):
            self._queues.damage(problem)
            return
        if told or self._queues.reader_ends:
            return
        if not self._failed:
            logger.error("cannot read the queue, trying until it goes: %s", problem)
        self._failed = True
        time.sleep(ERROR_SECONDS)


def _checked(row: Row, size: int | None) -> Message | str:
    """Decode a row; a body that is there and was not read proves itself when it is."""
    return check(row, loaded=row.data is not None or size is None)
