"""What a queue backend does: publish, consume, subscribe, ack, depth, purge.

The engine knows queues only by this page, so that the embedded queue and a broker can
stand in for each other.

Guarantees
----------
- When `Queues.publish` returns, every publication of the call is durable; when it raises,
  none is.
- A message that was consumed stays in its queue, invisible to other consumers, until
  `Queues.ack` returns or the process ends. What `ack` publishes and the removal are one
  step where the backend can do that; where it cannot, the publications come first.
- Mail of a queue that is subscribed to by destination costs nothing while nobody takes it: no
  reading, no writing, no timer and no memory for a message.
- All methods may be awaited from the trio loop of any thread. Once `publish` or `ack` has
  been handed to the backend it cannot be cancelled: a caller that was told nothing could
  not know whether the mail is safe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from mailerq.config import Config
from mailerq.message import Message

__all__ = [
    "DAMAGED_QUEUE",
    "BrowsableQueues",
    "Consumer",
    "Depth",
    "DestinationDepth",
    "Entry",
    "Lease",
    "Publication",
    "Queues",
    "Receiver",
    "Settlement",
    "Subscription",
    "Taken",
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

    `id` is the backend's own number of the message; it is never used twice. `destination` is
    the key that the message waits under (`mailerq.rules.destinations`), empty in queues that are
    not sorted. While `loaded` is false the body is only in the queue: `message.body` is None, and
    `Subscription.load` fetches it. `since` is when the message became due, seconds since 1970;
    0: the backend does not know.
    """

    id: int
    queue: str
    message: Message
    destination: str = ""
    size: int = 0
    """Bytes of properties and body together."""
    loaded: bool = True
    since: float = 0.0


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
    size: int | None = None
    """Bytes of the body, None without one; also where the body itself was not read."""


@dataclass(slots=True, frozen=True)
class DestinationDepth:
    """How full one destination of a queue is; `first_due` is the earliest of its due times."""

    destination: str
    due: int
    delayed: int
    first_due: float


class Consumer(ABC):
    """An endless source of leases, oldest due first; `async for lease in consumer`."""

    @abstractmethod
    async def receive(self) -> Lease:
        """Wait for the next message that is due."""

    def __aiter__(self) -> AsyncIterator[Lease]:
        return self

    async def __anext__(self) -> Lease:
        return await self.receive()


class Taken(msgspec.Struct, frozen=True):
    """What `Subscription.take` found in a destination."""

    leases: Sequence[Lease]
    more: bool
    """True when more is due now."""
    next_due: float | None
    """When the first message that is not due yet becomes due, seconds since 1970."""


class Receiver(Protocol):
    """What a `Subscription` tells its subscriber, on its loop. Neither method may raise."""

    def arrived(self, leases: Sequence[Lease]) -> None:
        """New mail has been committed, and there was room in the windows of its destinations."""

    def waiting(self, destination: str, due: float) -> None:
        """The queue holds mail of a destination that nobody has; the first is due at `due`.

        Comes once for each destination that the queue has at the start, and whenever mail is
        committed that does not go to `arrived`, a retry among it; never for each message of a
        backlog that is known already.
        """


class Subscription(ABC):
    """The mail of one queue, taken by destination. Belongs to the loop that subscribed.

    A destination's window is how many of its messages may be leased at a time before new mail
    stays in the queue. Mail goes to `Receiver.arrived` directly only while its destination has
    room, and nothing in the queue is due before it. `take` is not bound by the window.
    """

    @abstractmethod
    def set_window(self, destination: str, messages: int) -> None:
        """Change the window of a destination; 0 closes it, so that all new mail stays."""

    @abstractmethod
    async def take(self, destination: str, limit: int) -> Taken:
        """Lease up to `limit` messages of a destination that are due, in a fair order.

        Higher `priority` first; then senders in turn, and retries and new mail 1 : 4. Raises
        `QueueError`, and then nothing is leased.
        """

    @abstractmethod
    async def load(self, lease: Lease) -> None:
        """Fetch the body of a lease that is not `loaded`. Raises `QueueError`.

        `MessageDamaged`: the body cannot be used; the message is set aside, and the lease is over.
        """

    @abstractmethod
    def forget(self, destination: str) -> None:
        """The subscriber keeps no state of a destination: its window is the default again."""


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
    def configure(self, config: Config) -> None:
        """Go by other settings from now on."""

    @abstractmethod
    def check(self, publication: Publication) -> None:
        """Raise `MessageError` for what `publish` and `ack` would refuse for its own sake."""

    @abstractmethod
    async def ack(self, settlements: Sequence[Settlement]) -> None:
        """Take consumed messages away and publish what became of them, all in one step.

        A publication to the lease's own queue is the message going round again (a retry).
        In a retry of a lease that is not loaded the body stays as it is in the queue.
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

    def subscribe(
        self, queue: str, receiver: Receiver, *, prefetch: int, window: int
    ) -> AbstractAsyncContextManager[Subscription]:
        """Take the mail of a queue by destination.

        `window` is the window of a destination that has no other. New mail stays in the queue
        while `prefetch` messages in all are leased. When the context ends, what is still leased
        goes back.
        """
        raise NotImplementedError

    @abstractmethod
    async def depths(self) -> list[Depth]:
        """How full each queue is, in the order of their names; empty ones may be missing."""

    @abstractmethod
    async def purge(self, queue: str) -> int:
        """Delete what is in a queue and not leased; how many that were."""

    @abstractmethod
    def wake(self, *, everything: bool = False) -> None:
        """Look now for messages that another process has published.

        With `everything` also for those that it has made due sooner.
        """

    @abstractmethod
    def statistics(self) -> dict[str, Any]:
        """What the backend has done since the start, as a tree of numbers."""


class BrowsableQueues(Queues):
    """Queues that can be looked into: what a broker does not do."""

    @abstractmethod
    async def browse(self, queue: str, *, limit: int = 100, after: int = 0) -> list[Entry]:
        """Read without taking: up to `limit` entries in the order of `id`, above `after`."""

    @abstractmethod
    async def destinations(self, queue: str) -> list[DestinationDepth]:
        """How full each destination of a queue is, in the order of their keys."""
