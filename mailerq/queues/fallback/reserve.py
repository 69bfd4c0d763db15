"""A queue file with mail that is to be published at a broker, and with what is settled already.

The queues of the file have the names that their messages are for, and messages keep their due
times. The queue `SETTLED`, a name that no broker allows, has one record for each message that was
settled while the broker could not hear of it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from typing import Final, TypeVar

import msgspec
import trio

from mailerq.errors import QueueError
from mailerq.message import Message
from mailerq.queues.embedded.queue_file import FILE_NAME
from mailerq.queues.embedded.queue_reader import QueueReader
from mailerq.queues.interface import BrowsableQueues, Depth, Entry, Publication

__all__ = ["Line", "Reserve", "restored"]

T = TypeVar("T")

SETTLED: Final = "amq.settled"

GROUP: Final = 200
"""Messages read at a time. As many go out twice if this process is killed between the confirmation
of the broker and the removal here."""

IDENTITY: Final = "fallback-identity"
"""The property of messages here with the identity of their copy at the broker, the same in each
attempt: a list, whose second item is the property of this name that the message had before."""

GROUP_BYTES: Final = 4 << 20
"""Bytes of a group; one message may have more."""

ROW_BYTES: Final = 250
"""What a small message takes in the file beside its body, until the file is measured."""

PAGE: Final = 1000
"""Records read at a time."""


class Line:
    """The mail of one queue that waits here, in order."""

    __slots__ = (
        "after", "again", "count", "entering", "failures", "flows", "name", "news", "safe", "said",
    )  # fmt: skip

    def __init__(self, name: str, count: int = 0) -> None:
        self.name = name
        self.count = count
        self.entering = 0
        """Messages of `count` that are not in the file yet."""
        self.after = 0
        """The number of the last message that the broker refuses for good, and that stays."""
        self.safe: list[Entry] = []
        """Messages that the broker has confirmed, and that are still to be removed here."""
        self.flows = False
        """The last attempt to move mail has succeeded."""
        self.failures = 0
        self.again = 0.0
        """When to try again, by trio's clock."""
        self.said = ""
        self.news = trio.Event()

    def notice(self) -> None:
        self.news.set()
        self.news = trio.Event()


class Reserve:
    """The mail of one file. Belongs to the loop that opened it."""

    def __init__(self, queues: BrowsableQueues, directory: str) -> None:
        self.directory = directory
        self.lines: dict[str, Line] = {}
        """Queues with mail here; also read by other threads."""
        self.bytes = 0
        """Bytes of the file in use, estimated since it was last measured."""
        self.stored = 0
        self._queues = queues
        self._path = os.path.join(directory, FILE_NAME)

    async def begin(self) -> list[str]:
        """Find what is here; return the identities of settled messages."""
        for depth in await self.depths():
            if depth.total:
                self.lines[depth.queue] = Line(depth.queue, depth.total)
        await self.measure()
        return [_identity(record) async for page in self._records() for record in page]

    @property
    def messages(self) -> int:
        return sum(line.count for line in self.lines.values())

    def holds(self, publications: Collection[Publication]) -> Iterator[Line]:
        """The lines of queues that some publications are for."""
        for queue in {publication.queue for publication in publications}:
            if (line := self.lines.get(queue)) is not None:
                yield line

    def check(self, publication: Publication) -> None:
        """Raise `MessageError` for a publication that cannot be kept here."""
        self._queues.check(_kept(publication))

    async def store(
        self, publications: Sequence[Publication], settled: Sequence[str], limit: int
    ) -> None:
        """Keep publications, and note messages as settled, in one commit; `limit` bytes in all.

        Each publication has an identity. Raises `QueueError` with nothing kept, and `MessageError`.
        """
        records = [Publication(SETTLED, Message({"identity": identity})) for identity in settled]
        size = sum(
            ROW_BYTES + len(publication.message.body or b"")
            for publication in (*publications, *records)
        )
        if self.bytes + size > limit:
            raise QueueError(f"{self.directory} is full: fallback-maxsize allows {limit} bytes")
        self.bytes += size
        for publication in publications:
            line = self.lines.get(publication.queue)
            if line is None:
                line = self.lines[publication.queue] = Line(publication.queue)
            line.count += 1
            line.entering += 1
        try:
            await self._queues.publish([*map(_kept, publications), *records])
        except BaseException:
            self.bytes -= size
            for publication in publications:
                self._less(self.lines[publication.queue], 1)
            raise
        finally:
            for publication in publications:
                if (entered := self.lines.get(publication.queue)) is not None:
                    entered.entering -= 1
                    entered.notice()
        self.stored += len(publications)

    def _less(self, line: Line, count: int) -> None:
        line.count -= count
        if line.count <= 0:
            self.lines.pop(line.name, None)
        line.notice()

    async def first(self, line: Line) -> list[Entry]:
        """The first messages of a queue, with their bodies. Raises `QueueError`."""

        def read(reader: QueueReader) -> list[Entry]:
            numbers = reader.numbers(line.name, limit=GROUP, after=line.after)
            room, count = GROUP_BYTES, 0
            for size in reader.sizes(numbers):
                room -= size
                if room < 0 and count:
                    break
                count += 1
            return reader.entries(line.name, numbers[:count])

        entries = await self._read(read)
        if not entries and not line.entering:
            self._less(line, line.count)  # somebody has emptied the queue
        return entries

    async def remove(self, line: Line, entries: Sequence[Entry]) -> None:
        """Remove messages that are safe elsewhere. Raises `QueueError`."""
        await self._queues.change(line.name, [entry.id for entry in entries], "delete")
        self._less(line, len(entries))

    def leave(self, line: Line, entry: Entry) -> None:
        """Let a message stay that cannot be published; the next start tries again."""
        line.after = entry.id
        self._less(line, 1)

    async def depths(self) -> list[Depth]:
        """The depth of each queue with mail here."""
        return [depth for depth in await self._queues.depths() if depth.queue != SETTLED]

    async def purge(self, queue: str) -> int:
        """Delete the mail of a queue; return the number of messages."""
        line = self.lines.get(queue)
        if line is None:
            return 0
        count = await self._queues.purge(queue)
        self._less(line, count)
        return count

    async def measure(self) -> None:
        """Measure the file. Raises `QueueError`."""
        self.bytes = await self._read(lambda reader: reader.free()[1])

    async def forget(self, over: Callable[[str, float], bool]) -> int:
        """Remove the records that are over, by identity and time; return how many are left."""
        left = 0
        async for page in self._records():
            gone = [record.id for record in page if over(_identity(record), record.due)]
            left += len(page) - len(gone)
            if gone:
                await self._queues.change(SETTLED, gone, "delete")
        return left

    async def _records(self) -> AsyncIterator[list[Entry]]:
        after = 0
        while page := await self._queues.browse(SETTLED, limit=PAGE, after=after):
            yield page
            after = page[-1].id

    async def _read(self, read: Callable[[QueueReader], T]) -> T:
        """Read the file, in a thread and on a connection of its own."""

        def run() -> T:
            with QueueReader(self._path) as reader:
                return read(reader)

        return await trio.to_thread.run_sync(run)


def _kept(publication: Publication) -> Publication:
    """What the file has of a publication with an identity."""
    message = publication.message
    value = [publication.identity]
    if IDENTITY in message.properties:
        value.append(message.properties[IDENTITY])
    message = Message({**message.properties, IDENTITY: value}, message.body)
    return msgspec.structs.replace(publication, message=message)


def restored(entry: Entry, due: float | None) -> Publication:
    """The publication that an entry was. The broker may have the copy already."""
    properties = dict(entry.message.properties)
    match properties.pop(IDENTITY, None):
        case [str(identity)]:
            pass
        case [str(identity), before]:
            properties[IDENTITY] = before
        case _:  # of an earlier version
            return Publication(entry.queue, entry.message, due)
    message = Message(properties, entry.message.body)
    return Publication(entry.queue, message, due, identity=identity, again=True)


def _identity(record: Entry) -> str:
    return str(record.message.properties.get("identity", ""))
