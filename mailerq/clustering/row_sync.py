"""Keeps the shared rows of an instance and those of the others alike.

Theory of operation
-------------------
What is changed here goes to all others at once. What comes from them waits in a list until a task
has written it into the file of rows, together with all that came meanwhile.

Announcements have a digest of all rows. When that of another instance differs from ours for
`SETTLE` - changes are on their way otherwise - we ask for its rows, part by part, and so does it
for ours. An instance asks one other at a time, and less often while that brings no news: a row may
differ because the clocks of two hosts do not agree on its end.

Everything here runs on the loop of the cluster's task, but for the making of parts, which a thread
does.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

import trio

from mailerq.errors import RowError
from mailerq.net.logs import Ration
from mailerq.rules.cluster import (
    AskRows,
    Document,
    Member,
    RowChanges,
    RowPart,
    packed,
)
from mailerq.rules.shared_rows import Change, Shared

__all__ = ["RowKeeper", "RowSync"]

log = logging.getLogger("mailerq.cluster")

SECOND: Final = 1_000_000_000

SETTLE: Final = 2 * SECOND
FIRST_PAUSE: Final = 5 * SECOND
MAX_PAUSE: Final = 300 * SECOND
"""Between two times that we ask for all rows."""

TALK_SILENCE: Final = 10 * SECOND
"""A talk in which the other one says nothing is over."""

FEW: Final = 1000
"""Rows of which a part is made at once, without a thread."""

MAX_TALKS: Final = 8
MAX_WAITING: Final = 32 << 20
"""Bytes of documents with changes that wait to be written; more are dropped, and asked for later.
"""


class RowKeeper(Protocol):
    """What keeps the rows: `mailerq.outbound.keeper.Keeper`."""

    @property
    def shared(self) -> Shared: ...

    def take_changes(self) -> list[Change]:
        """The changes since the last call, whoever made them."""

    async def merge(self, changes: Sequence[Change]) -> int:
        """Write changes of others; returns how many were news. Raises RowError and OSError."""


class _Talk:
    """An exchange of all rows that another instance has asked for."""

    __slots__ = ("document", "last", "parts")

    def __init__(self, parts: Iterator[tuple[Change, ...]], now: int) -> None:
        self.parts = parts
        self.document: RowPart | None = None
        self.last = now


class RowSync:
    """The shared rows of an instance. `run` writes what comes from others."""

    def __init__(
        self,
        name: str,
        keeper: RowKeeper,
        send: Callable[[Document, str], bool],
        clock: Callable[[], int],
    ) -> None:
        """`send` sends a document to all, or to the instance with a queue."""
        self._name = name
        self._keeper = keeper
        self._send = send
        self._clock = clock
        self._published = keeper.shared.version
        self._groups: deque[tuple[Change, ...]] = deque()
        self._waiting = 0
        self._part: RowPart | None = None
        self._news = trio.Event()
        self._digest = ""
        self._since = clock()
        self._talk = ""
        self._peer = ""
        self._heard = 0
        self._fresh = 0
        self._next = 0
        self._pause = FIRST_PAUSE
        self._talks: dict[str, _Talk] = {}
        self._say_lost = Ration(log.error, 1, "%d times more")
        self.received = 0
        """Changes of others that were news."""

    @property
    def digest(self) -> str:
        return f"{self._keeper.shared.digest:016x}"

    # Our changes

    def changed(self) -> None:
        """The rows have changed, by whomever: tell what was changed here."""
        own = [
            change
            for change in self._keeper.take_changes()
            if change.server == self._name and change.version >= self._published
        ]
        # Several changes may have one version, and copies do no harm.
        if own:
            self._published = max(change.version for change in own)
            for group in packed(own):
                self._send(RowChanges(name=self._name, changes=group), "")

    # Those of others

    def hear(self, document: RowChanges | RowPart | AskRows, size: int, now: int) -> AskRows | None:
        """Take in a document of `size` bytes; returns a question that `answer` has to answer."""
        match document:
            case RowChanges() if document.name != self._name:
                self._add(document.changes, size)
            case RowPart() if document.talk == self._talk and self._talk and self._part is None:
                self._heard = now
                self._part = document
                self._news.set()
            case AskRows() if document.name != self._name:
                return document
        return None

    def _add(self, changes: tuple[Change, ...], size: int) -> None:
        if self._waiting + size > MAX_WAITING:
            self._say_lost("rows of other instances come faster than they can be written")
            return
        self._groups.append(changes)
        self._waiting += size
        self._news.set()

    async def run(self) -> None:
        """Write what comes, until cancelled."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            changes = [change for group in self._groups for change in group]
            self._groups.clear()
            self._waiting = 0
            if changes:
                await self._merge(changes)
            if (part := self._part) is not None:
                self._part = None
                self._fresh += await self._merge(part.changes)
                self._go_on(part)

    async def _merge(self, changes: Sequence[Change]) -> int:
        try:
            count = await self._keeper.merge(changes)
        except (OSError, RowError) as error:
            self._say_lost("rows of other instances cannot be written: %s", error)
            return 0
        self.received += count
        return count

    # All rows

    def compare(self, members: Sequence[Member], now: int, queue: str) -> None:
        """Ask for all rows of one whose digest differs, now and then; call this each second."""
        for talk in [talk for talk, each in self._talks.items() if now - each.last > TALK_SILENCE]:
            del self._talks[talk]
        if self.digest != self._digest:
            self._digest, self._since = self.digest, now
        if self._talk:
            if now - self._heard < TALK_SILENCE:
                return
            self._talk = ""
        different = [
            member for member in members
            if member.here.rows_digest and member.here.rows_digest != self._digest
        ]  # fmt: skip
        if not different:
            self._pause = FIRST_PAUSE
            return
        if now < self._next or now - self._since < SETTLE or not queue:
            return
        names = sorted(member.here.name for member in different)
        self._peer = next((name for name in names if name > self._peer), names[0])
        peer = next(member.here for member in different if member.here.name == self._peer)
        self._talk, self._heard, self._fresh = secrets.token_hex(8), now, 0
        self._next = now + self._pause
        self._pause = min(2 * self._pause, MAX_PAUSE)
        self._ask(queue, peer.queue, 0)
        self._queues = queue, peer.queue

    def hurry(self) -> None:
        """An instance has come, or has come back: compare soon."""
        self._next, self._pause = 0, FIRST_PAUSE

    def _ask(self, queue: str, to: str, part: int) -> None:
        self._send(AskRows(name=self._name, queue=queue, talk=self._talk, part=part), to)

    def _go_on(self, part: RowPart) -> None:
        if part.talk != self._talk:
            return
        if not part.last:
            self._heard = self._clock()
            self._ask(*self._queues, part.part + 1)
            return
        self._talk = ""
        if self._fresh:
            self._pause = FIRST_PAUSE
            log.info("%d changes of shared rows came from %s", self._fresh, part.name)

    async def answer(self, ask: AskRows) -> None:
        """Send a part of our rows to the instance that asked."""
        talk = self._talks.get(ask.talk)
        if talk is None:
            if ask.part or len(self._talks) >= MAX_TALKS:
                return
            talk = _Talk(packed(self._keeper.shared.changes()), self._clock())
            self._talks[ask.talk] = talk
        talk.last = self._clock()
        if talk.document is None or talk.document.part == ask.part - 1:
            if len(self._keeper.shared) < FEW:
                changes = next(talk.parts, None)
            else:
                changes = await trio.to_thread.run_sync(next, talk.parts, None)
            talk.document = RowPart(
                name=self._name,
                talk=ask.talk,
                part=ask.part,
                changes=changes or (),
                last=changes is None,
            )
        if talk.document.part == ask.part:
            self._send(talk.document, ask.queue)
