"""The thread that fetches waiting messages from the file, and keeps the time.

Theory of operation
-------------------
A read has two steps: find what is due, then fetch as much of it as the consumers have credit
for and as fits the bound in bytes. So a queue of a million messages, or of huge ones, costs no
more memory than what is leased. A consumer that holds most of what it may can wait a little: it is
read for again when it could take a quarter of that, or after a rest.

While a consumer is open the thread looks at the clock at least once a second: whether
something became due by the wall clock, whether another process has changed the file, and
whether the clock was set back. Then due times are set back with it, or mail that nobody
delayed would wait for an hour. Once a minute it has the writer delete what is beyond the bounds
of a queue.

A record that does not prove itself is moved to the queue ``damaged``, with the reason, by the
writer, and reading goes on.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import Empty
from typing import Any, Final

from mailerq.errors import QueueDamaged, QueueError
from mailerq.message import Message
from mailerq.queues.embedded.records import Row, aside, check, prepare
from mailerq.queues.embedded.sqlite_file import LARGE_BYTES, Reader, translate
from mailerq.queues.embedded.subscription import (
    EmbeddedConsumer,
    Feed,
    Feeds,
    HeldLease,
    Position,
    Read,
)
from mailerq.queues.embedded.writer import Request
from mailerq.queues.interface import DAMAGED_QUEUE

__all__ = ["Fetcher"]

logger = logging.getLogger("mailerq.queues")

POLL_SECONDS: Final = 1.0
"""How late at most another process's message, or a jump of the clock, is noticed."""

READ_BYTES: Final = 16 << 20
"""Bytes of messages that one read brings into memory; one message is always allowed."""

TRIM_SECONDS: Final = 60.0
"""How often what is beyond the bounds of a queue is deleted."""

BACKWARD_MS: Final = 1_000
"""What the clock may lose without anybody caring."""


class Fetcher:
    """Reads from a connection of its own."""

    def __init__(
        self,
        path: str,
        feeds: Feeds,
        write: Callable[[Request], None],
        set_back: Callable[[int, int], Iterator[int]],
        trim: Callable[[], Iterator[int]],
    ) -> None:
        self._reader = Reader(path)
        self._feeds = feeds
        self._write = write
        self._set_back = set_back
        self._trim = trim
        self._trimmed = -math.inf
        self._version = -1
        self._latest = 0
        self._failed = False
        self._reads = self._messages = 0
        self._thread = threading.Thread(target=self._run, name="queue reader")
        self._thread.start()

    def join(self) -> None:
        self._thread.join()
        self._reader.close()

    def statistics(self) -> dict[str, Any]:
        """How often the file was read for consumers, and what messages came of it."""
        return {"reads": self._reads, "read_messages": self._messages}

    def _run(self) -> None:
        feeds = self._feeds
        poll = time.monotonic()
        while True:
            with feeds.lock:
                patience = self._patience()
            try:
                read = feeds.reads.get(timeout=patience)
            except Empty:
                read = None
            if feeds.fetcher_ends:
                return
            if read is not None:
                self._read(read)
            if time.monotonic() >= poll:
                poll = time.monotonic() + POLL_SECONDS
                self._poll()
            with feeds.lock:
                for feed in feeds.feeds.values():
                    feeds.pump(feed)

    def _patience(self) -> float | None:
        """How many seconds there is nothing to do; without a consumer for ever."""
        patience: float | None = None
        now = self._feeds.now()
        for feed in self._feeds.feeds.values():
            if feed.consumers:
                patience = POLL_SECONDS if patience is None else patience
                if feed.rests_until:  # also when it is over: somebody may have been put off
                    patience = min(patience, max(feed.rests_until - time.monotonic(), 0.0))
                if feed.next_due is not None and feed.credit():
                    patience = min(patience, max((feed.next_due - now) / 1000, 0.001))
        return patience

    def _poll(self) -> None:
        """Notice what others have published, and that the clock was set back."""
        feeds = self._feeds
        now = feeds.now()
        if now < self._latest - BACKWARD_MS:
            logger.warning("the clock was set back %.1f s", (self._latest - now) / 1000)
            self._write(Request(work=self._set_back(now, self._latest)))
            self._latest = now
            self._version = -1
        self._latest = max(self._latest, now)
        if time.monotonic() >= self._trimmed + TRIM_SECONDS:
            self._trimmed = time.monotonic()
            self._write(Request(work=self._trim()))
        with feeds.lock:
            if not any(feed.credit() for feed in feeds.feeds.values()):
                return
        try:
            version = self._reader.version()
        except QueueError as error:
            self._complain(error)
            return
        if version != self._version:
            self._version = version
            with feeds.lock:
                for feed in feeds.feeds.values():
                    if feed.credit():
                        feeds.look_again(feed)

    def _read(self, read: Read) -> None:
        feed = read.feed
        try:
            found, later = self._reader.scan(feed.queue, read.after, self._feeds.now(), read.limit)
            with self._feeds.lock:
                wanted, passed = self._choose(feed, found)
                shared = _large_bodies(feed) if any(row[2] > LARGE_BYTES for row in found) else {}
            rows = self._reader.fetch(feed.queue, wanted, shared) if wanted else []
            del shared
            checked = [(row, check(row)) for row in rows]
        except Exception as error:
            if not isinstance(error, QueueError):
                logger.exception("an error in the reader of the queue")
            self._complain(translate(error, self._feeds.path))
            with self._feeds.lock:
                feed.end_read(None, True, None)
            return
        self._failed = False
        self._reads += 1
        self._messages += len(rows)
        more = passed < len(found) or len(found) >= read.limit
        reached: Position | None = found[passed - 1][:2] if passed else None
        notify: set[EmbeddedConsumer] = set()
        with self._feeds.lock:
            for row, message in checked:
                if row.id in feed.held or row.id in feed.settled:
                    continue
                if isinstance(message, str):
                    self._put_aside(feed, row, message)
                    continue
                consumer = feed.choose()
                if consumer is None:
                    more = True
                    reached = (row.due, row.id - 1)
                    break
                lease = HeldLease(
                    row.id,
                    row.queue,
                    message,
                    row.due,
                    len(row.properties) + len(row.data or b""),
                    row.body,
                    row.body_crc,
                    message.body,
                )
                feed.hold(lease, consumer)
                self._feeds.make_ready(lease, notify)
            feed.end_read(reached, more, later)
            self._feeds.tidy(feed)
        self._feeds.notify(notify)

    def _choose(self, feed: Feed, found: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
        """Which of the messages found to fetch, and how many of those found this passes."""
        credit = feed.credit()
        size = 0
        wanted: list[int] = []
        for index, (_, number, length) in enumerate(found):
            if number in feed.held or number in feed.settled:
                continue
            size += length
            if len(wanted) >= credit or (wanted and size > READ_BYTES):
                return wanted, index
            wanted.append(number)
        return wanted, len(found)

    def _put_aside(self, feed: Feed, row: Row, reason: str) -> None:
        """Have a damaged record moved; it is leased, to nobody, until it is gone."""
        logger.error(
            "queue %s: message %d goes to queue %s: %s", feed.queue, row.id, DAMAGED_QUEUE, reason
        )
        lease = HeldLease(row.id, feed.queue, Message(), 0, 0, None, None, None)
        feed.held[row.id] = lease
        insert = prepare(aside(row, reason), self._feeds.clock())
        self._write(Request([insert], removals=[lease]))

    def _complain(self, problem: QueueError) -> None:
        if isinstance(problem, QueueDamaged):
            self._feeds.damage(problem)
            return
        if not self._failed:
            logger.error("cannot read the queue, trying until it goes: %s", problem)
        self._failed = True
        time.sleep(0.1)


def _large_bodies(feed: Feed) -> dict[int, bytes]:
    """Return the shared large bodies of leased messages, by their reference."""
    return {
        lease.reference: lease.stored_body
        for lease in feed.held.values()
        if lease.reference and lease.stored_body is not None and lease.size > LARGE_BYTES
    }
