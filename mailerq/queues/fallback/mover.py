"""Moves the mail of a reserve to a broker, queue by queue, in the order in which the mail came.

Messages are removed from the reserve after the broker has confirmed them, a group at a time. While
a disk keeps them, they are not published again. After a failure the mail of that queue waits,
longer each time; other queues go on. A message that the broker can never take stays, and the log
names it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Final

import trio

from mailerq.errors import MessageError, QueueError
from mailerq.queues.fallback.reserve import Line, Reserve, restored
from mailerq.queues.interface import DAMAGED_QUEUE, Entry, Publication, RemoteQueues

__all__ = ["Mover"]

log = logging.getLogger("mailerq.queues")

MIN_AGAIN_SECONDS: Final = 1.0
MAX_AGAIN_SECONDS: Final = 60.0
"""The pause after a failure doubles, between these."""


class Mover:
    """Moves the mail of one reserve, while `may_move`."""

    def __init__(
        self,
        reserve: Reserve,
        broker: RemoteQueues,
        may_move: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self.reserve = reserve
        self.moved = 0
        self._broker = broker
        self._may_move = may_move
        self._clock = clock
        self._news = trio.Event()
        self._said_moved = 0

    def notice(self) -> None:
        """Look again: there may be more mail, or the broker may be there."""
        news, self._news = self._news, trio.Event()
        news.set()

    def hasten(self) -> None:
        """Do not wait any more after earlier failures."""
        for line in self.reserve.lines.values():
            line.again = 0.0
        self.notice()

    async def run(self) -> None:
        """Move mail until cancelled."""
        while True:
            news = self._news
            line = self._next() if self._may_move() else None
            if line is None or line.again > trio.current_time():
                with trio.move_on_at(math.inf if line is None else line.again):
                    await news.wait()
                continue
            with trio.CancelScope(shield=True):  # no confirmation is thrown away
                await self._move(line)

    def _next(self) -> Line | None:
        """The queue to move mail of next, now or at its time."""
        lines = [line for line in self.reserve.lines.values() if line.count > line.entering]
        return min(lines, key=lambda line: line.again, default=None)

    async def _move(self, line: Line) -> None:
        try:
            if not line.safe:
                line.safe = await self._publish(line)
            entries = line.safe
            if not entries:
                return
            await self.reserve.remove(line, entries)
            line.safe = []
        except QueueError as error:
            self._failed(line, error)
            return
        self.moved += len(entries)
        line.flows, line.failures, line.said = True, 0, ""
        line.again = trio.current_time()
        if not self.reserve.lines:
            log.warning(
                "%d messages were moved from %s to the broker; none is left",
                self.moved - self._said_moved,
                self.reserve.directory,
            )
            self._said_moved = self.moved

    async def _publish(self, line: Line) -> list[Entry]:
        """Publish the first messages of a queue; return those that the broker has confirmed."""
        entries = await self.reserve.first(line)
        if not entries:
            return []
        try:
            publications = [self._publication(entry) for entry in entries]
            await self._broker.publish(publications, again=True)
        except MessageError:
            return await self._move_one_by_one(line, entries)
        return entries

    def _failed(self, line: Line, error: QueueError) -> None:
        line.flows = False
        pause = min(MIN_AGAIN_SECONDS * 2.0 ** min(line.failures, 10), MAX_AGAIN_SECONDS)
        line.failures += 1
        line.again = trio.current_time() + pause
        line.notice()
        if self._broker.trouble is None and line.said != str(error):
            line.said = str(error)
            log.warning(
                "mail of the queue %s stays in %s: %s", line.name, self.reserve.directory, error
            )

    async def _move_one_by_one(self, line: Line, entries: Sequence[Entry]) -> list[Entry]:
        """Publish what can be published; return that. The rest stays."""
        moved = line.safe  # also if the broker goes away among them
        for entry in entries:
            try:
                await self._broker.publish([self._publication(entry)], again=True)
            except MessageError as error:
                log.error(
                    "message %d of the queue %s stays in %s, the broker cannot take it: %s",
                    entry.id,
                    line.name,
                    self.reserve.directory,
                    error,
                )
                self.reserve.leave(line, entry)
            else:
                moved.append(entry)
        return moved

    def _publication(self, entry: Entry) -> Publication:
        if entry.damaged:
            return Publication(DAMAGED_QUEUE, entry.message)
        due = entry.due if entry.due > self._clock() else None
        return restored(entry, due)
