"""What a queue backend does: publish, consume, ack, depth, browse, purge.

The engine knows queues only by this page, so that the embedded queue and a broker can
stand in for each other.

Guarantees
----------
- When `Queues.publish` returns, every publication of the call is durable; when it raises,
  none is.
- A message that was consumed stays in its queue, invisible to other consumers, until
  `Queues.ack` returns or the process ends. What `ack` publishes and the removal are one
  step where the backend can do that; where it cannot, the publications come first.
- All methods may be awaited from the trio loop of any thread. Once `publish` or `ack` has
  been handed to the backend it cannot be cancelled: a caller that was told nothing could
  not know whether the mail is safe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from mailerq.message import Message

__all__ = [
    "DAMAGED_QUEUE",
    "Consumer",
    "Depth",
    "Entry",
    "Lease",
    "Publication",
    "Queues",
    "Settlement",
]

DAMAGED_QUEUE: Final = "damaged"
"""Where messages are set aside, with a reason, that cannot be used; nothing is deleted there."""


class Publication(msgspec.Struct, frozen=True):
    """One message for one queue. `due` is seconds since 1970; None is at once."""

    queue: str
    message: Message
    due: float | None = None


class Lease(msgspec.Struct, eq=False):
    """A message that a consumer holds. It goes back unless `Queues.ack` takes it away.

    `id` is the backend's own number of the message; it is never used twice.
    """

    id: int
    queue: str
    message: Message


class Settlement(msgspec.Struct, frozen=True):
    """A lease that is over, and what is to be published in the same step."""

    lease: Lease
    publications: Sequence[Publication] = ()


@dataclass(slots=True, frozen=True)
class Depth:
    """How full one queue is: `due` messages that may go now, `delayed` ones that wait."""

    queue: str
    due: int
    delayed: int

    @property
    def total(self) -> int:
        return self.due + self.delayed


@dataclass(slots=True, frozen=True)
class Entry:
    """A message seen by `Queues.browse`, which takes nothing away."""

    id: int
    queue: str
    due: float
    message: Message


class Consumer(ABC):
    """An endless source of leases, oldest due first; `async for lease in consumer`."""

    @abstractmethod
    async def receive(self) -> Lease:
        """Wait for the next message that is due."""

    def __aiter__(self) -> AsyncIterator[Lease]:
        return self

    async def __anext__(self) -> Lease:
        return await self.receive()


class Queues(ABC):
    """All queues of one engine."""

    @abstractmethod
    async def publish(self, publications: Sequence[Publication]) -> None:
        """Make all of them durable, or raise `QueueError` and none of them is.

        The messages belong to the queue from now on: who published them must not change
        their properties, because a consumer may get the very same dict. `MessageError`
        names what of a message cannot be stored, or that the queue cannot have that name.
        """

    @abstractmethod
    def check(self, publication: Publication) -> None:
        """Raise `MessageError` for what `publish` and `ack` would refuse for its own sake."""

    @abstractmethod
    async def ack(self, settlements: Sequence[Settlement]) -> None:
        """Take consumed messages away and publish what became of them, all in one step.

        A publication to the lease's own queue is the message going round again (a retry).
        Raises `QueueError`, or `MessageError` as `publish` does; the messages then still are
        in their queue and still leased. `ValueError`: one of the leases is over already.
        """

    @abstractmethod
    def release(self, lease: Lease) -> None:
        """Give a consumed message back as it was: it may be consumed again at once.

        `ValueError`: the lease is over already.
        """

    @abstractmethod
    def consume(self, queue: str, *, prefetch: int) -> AbstractAsyncContextManager[Consumer]:
        """Consume a queue; at most `prefetch` messages are leased and not acked at a time.

        When the context ends, what is still leased goes back.
        """

    @abstractmethod
    async def depths(self) -> list[Depth]:
        """How full each queue is, in the order of their names; empty ones may be missing."""

    @abstractmethod
    async def browse(self, queue: str, *, limit: int = 100, after: int = 0) -> list[Entry]:
        """Read without taking: up to `limit` entries in the order of `id`, above `after`."""

    @abstractmethod
    async def purge(self, queue: str) -> int:
        """Delete what is in a queue and not leased; how many that were."""

    @abstractmethod
    def wake(self) -> None:
        """Look now for messages that another process has published."""

    @abstractmethod
    def statistics(self) -> dict[str, Any]:
        """What the backend has done since the start, as a tree of numbers."""
