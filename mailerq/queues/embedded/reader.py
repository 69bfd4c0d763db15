"""The thread that reads waiting messages from the file, and runs the timers.

Theory of operation
-------------------
The reader serves jobs in turn: some mail of a destination (`Take`), a body (`Load`), a part of the
list of destinations (`Scan`). All pending jobs are served in one go, and the results are delivered
with one call into each loop. A take is bounded in messages and bytes, so a destination with
a million messages, or with huge ones, costs only the memory of its leases. Mail without a taker is
not read.

Takes come in groups. A group is one read transaction: SQLite looks once at the log, and keeps its
pages. The destinations are marked before the transaction begins, because the mark says what the
read will find. A group ends early when it has read much or for long; the rest is the next group.

While there are takers, the thread checks at least once a second whether mail for consumers became
due, whether another process has published, and whether the clock was set back. After a clock change
due times are set back too; otherwise mail would wait an hour that no sender asked for. Once
a minute the writer is asked to delete mail beyond the bounds of a queue. New messages of other
processes are found by their numbers: all outside our own blocks.

A damaged record is moved by the writer to the queue ``damaged``, with the reason, and reading goes
on.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty
from typing import Any, Final, NamedTuple, cast

import outcome

from mailerq.errors import MessageDamaged, QueueDamaged, QueueError
from mailerq.message import Message
from mailerq.queues.embedded.open_queues import (
    Checked,
    Destination,
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
from mailerq.queues.embedded.taking import READ_BYTES, Found, Wanted
from mailerq.queues.embedded.together import chunk_of
from mailerq.queues.embedded.writer import Request
from mailerq.queues.interface import DAMAGED_QUEUE, Taken

__all__ = ["Maintenance", "Reader"]


class Read(NamedTuple):
    """A take whose destination is marked as being read."""

    take: Take
    destination: Destination
    wanted: Wanted


logger = logging.getLogger("mailerq.queues")

POLL_SECONDS: Final = 1.0
"""Interval at which another process's messages, or a jump of the clock, are noticed."""

TRIM_SECONDS: Final = 60.0
"""Interval at which mail beyond the bounds of a queue is deleted."""

BACKWARD_MS: Final = 1_000
"""A smaller step back of the clock is ignored."""

SCAN_PLACES: Final = 500
"""Lanes that a scan reads before other jobs get their turn."""

TURN_SECONDS: Final = 0.005
"""After serving jobs for this long, report the finished ones."""

GROUP_TAKES: Final = 200
GROUP_SECONDS: Final = 0.02
"""Takes of one transaction, and its longest time: meanwhile the log cannot be used anew."""

GROUP_BARRED: Final = 1_000
"""Each take has a copy of the numbers that must not be leased; if they are more, it is alone."""

ERROR_SECONDS: Final = 0.1
"""Pause after a disk error."""


@dataclass(frozen=True, slots=True)
class Maintenance:
    """Work for the writer that the reader starts on time."""

    set_back: Callable[[int, int], Iterator[int]]
    trim: Callable[[], Iterator[int]]
    sort: Callable[[], Iterator[int]]


class Reader:
    """Reads from its own connection."""

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
        self.has_opened = threading.Event()
        """The connection is open, or could not be opened. An open connection keeps its file, even
        if another file takes the path."""
        self._thread = threading.Thread(target=self._run, name="queue reader")
        self._thread.start()

    def join(self) -> None:
        self._thread.join()
        self._file.close()

    def statistics(self) -> dict[str, Any]:
        """How often the file was read for takers, and how many messages the reads found."""
        return {"reads": self._reads, "read_messages": self._messages}

    def _run(self) -> None:
        queues = self._queues
        poll = time.monotonic()
        try:
            self._try(self._look)  # from here on: scans find the earlier mail
        finally:
            self.has_opened.set()
        while True:
            with queues.lock:
                timeout = self._timeout()
            job: Job | Sequence[Take] | None = None
            try:
                job = queues.jobs.get(timeout=timeout)
            except Empty:
                pass
            self._serve(job)
            if queues.reader_ends:
                if queues.jobs.empty():
                    return
                continue  # the tasks of those jobs wait
            if queues.look_now or time.monotonic() >= poll:
                poll = time.monotonic() + POLL_SECONDS
                self._poll()
            with queues.changing():
                for queue in queues.queues.values():
                    queues.pump(queue)

    def _timeout(self) -> float | None:
        """Seconds until there is work; None, without takers, means no limit."""
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

    def _serve(self, job: Job | Sequence[Take] | None) -> None:
        """Serve a job and all pending ones, and report the results."""
        queues = self._queues
        done: list[Wakeable] = []
        began = since = time.monotonic()
        while True:
            if isinstance(job, Load | Scan):
                self._do(job)
                if job.task is not None:
                    done.append(job)
            elif job is not None:
                takes = job if isinstance(job, Sequence) else [cast("Take", job)]
                while takes:
                    served, takes = self._take_some(takes)
                    done += (take for take in served if take.task is not None)
                    if takes:
                        self._tell(done)
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
            self._check_open()
            match job:
                case Load():
                    self._load(job)
                case Scan():
                    self._scan(job)
            self._failed = False
        except Exception as error:
            self._fail(job, error)

    def _check_open(self) -> None:
        if self._queues.reader_ends:
            raise QueueError("the queue is closed")

    def _fail(self, job: Job, error: Exception) -> None:
        """Note the error as the result of a job."""
        if not isinstance(error, QueueError):
            logger.exception("an error in the reader of the queue", exc_info=error)
        problem = translate(error, self._queues.path)
        job.result = outcome.Error(problem)
        self._complain(problem, told=job.task is not None)

    def _take_some(self, takes: Sequence[Take]) -> tuple[list[Take], list[Take]]:
        """Serve the first takes in one transaction; return the served ones, and the others."""
        queue = takes[0].queue
        reads, served, others = self._mark(queue, takes)
        problem: Exception | None = None
        try:
            self._check_open()
            with self._file.snapshot():
                until, left = time.monotonic() + GROUP_SECONDS, READ_BYTES
                while reads and left > 0 and (not served or time.monotonic() < until):
                    wanted = [read.wanted for read in reads]
                    for found in self._file.take_together(wanted[: chunk_of(wanted)]):
                        left -= self._take(reads[0], found)
                        served.append(reads.pop(0).take)
        except Exception as error:  # the transaction did not begin, or not end
            problem = error
        with self._queues.lock:
            self._end(queue)
            for read in reads:
                more = read.destination.end_read(True, None)
                if problem is not None:
                    self._queues.end_take(read.take, more)
            self._queues.tidy(queue)
        if problem is None:
            return served, [*(read.take for read in reads), *others]
        if not reads:
            self._complain(translate(problem, self._queues.path))
        for read in reads:
            self._fail(read.take, problem)
            served.append(read.take)
        return served, others

    def _mark(
        self, queue: OpenQueue, takes: Sequence[Take]
    ) -> tuple[list[Read], list[Take], list[Take]]:
        """Begin to read for some takes of a queue, each of another destination.

        Returns the reads, the takes that need none any more, and the others.
        """
        reads: list[Read] = []
        over: list[Take] = []
        others: list[Take] = []
        with self._queues.lock:
            self._begin(queue)
            now = self._queues.now()
            most = GROUP_TAKES if len(queue.barred) <= GROUP_BARRED else 1
            for take in takes:
                if take.taker.closed:
                    take.result = outcome.Error(QueueError("nobody takes any more"))
                    over.append(take)
                    continue
                if take.queue is not queue or len(reads) >= most:
                    others.append(take)
                    continue
                destination = queue.destination(take.destination)
                if destination.reading:  # for another take of the group
                    others.append(take)
                    continue
                destination.begin_read()
                wanted = Wanted(
                    queue.name,
                    take.destination,
                    now,
                    take.limit,
                    (*destination.held, *queue.barred),
                    destination.turns,
                    take.taker.body_bytes(),
                    not queue.is_sorted,
                )
                reads.append(Read(take, destination, wanted))
        return reads, over, others

    def _take(self, read: Read, found: Found | None) -> int:
        """Lease what was found for a take, or read alone; return the bytes in memory."""
        take, destination, wanted = read
        checked: list[Checked] = []
        try:
            if found is None:
                found = self._file.take(wanted)
            checked = [(row, size, _checked(row, size)) for row, size in found.rows]
            self._reads += 1
            self._messages += len(found.rows)
            self._failed = False
        except Exception as error:
            self._fail(take, error)
            found = Found([], True, None, wanted.turns)  # the next read corrects this
        with self._queues.lock:
            more = not self._lease(take, checked) or found.more
            destination.turns = found.turns
            more = destination.end_read(more, found.next_due)
            self._queues.end_take(take, more)
        if take.result is None:
            next_due = None if found.next_due is None else found.next_due / 1000
            take.result = outcome.Value(Taken(take.leases, more, next_due))
        return sum(lease.memory for lease in take.leases)

    def _lease(self, take: Take, checked: Sequence[Checked]) -> bool:
        """Lease the messages read; False if there was no room for all."""
        room, damaged = self._queues.lease(take, checked)
        for row, reason in damaged:
            self._put_aside(take.queue, take.destination, row, reason)
        return room

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
        """The body, if another message in memory shares it."""
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
            # Resume here; a disk error must not make us forget mail.
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
        """Have a damaged record moved; until then the record is leased, without a taker."""
        logger.error(
            "queue %s: message %d goes to queue %s: %s", queue.name, row.id, DAMAGED_QUEUE, reason
        )
        lease = HeldLease(row.id, queue.name, Message(), key)
        queue.hold(lease, None)
        insert = prepare(aside(row, reason), self._queues.clock(), self._queues.outbox)
        self._write(Request([insert], removals=[lease]))

    # The clock, and other processes

    def _poll(self) -> None:
        """Notice messages of other processes, and a clock that was set back."""
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
        # The writer only appends.
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
        """Report that the file cannot be read. Jobs that are `told` decide when to try again."""
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
    """Decode a row; a body that was not read is checked when it is read."""
    return check(row, loaded=row.data is not None or size is None)
