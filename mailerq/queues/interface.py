"""What a queue backend does: publish, consume, subscribe, ack, depth, purge.

The engine knows queues only through this module, so the embedded queue and a broker are
interchangeable.

Guarantees
----------
- When `Queues.publish` returns, every publication of the call is durable; when it raises, none is,
  except that a broker may have some of them.
- A consumed message stays in its queue, invisible to other consumers, until `Queues.ack` returns or
  the process ends. The publications of `ack` and the removal are one step if the backend supports
  that; otherwise the publications come first.
- In a queue subscribed to by destination, mail costs nothing until taken: no reads, no writes, no
  timer, and no memory for a message.
- All methods may be awaited from the trio loop of any thread. Once handed to the backend, `publish`
  and `ack` cannot be cancelled: a cancelled caller would not know whether the mail is safe.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from mailerq.config import Config
from mailerq.errors import QueueError
from mailerq.message import Message

if TYPE_CHECKING:
    # An injector imports this module, and must start fast.
    from mailerq.rules.changes import Change
    from mailerq.rules.selection import Selection

__all__ = [
    "DAMAGED_QUEUE",
    "BrowsableQueues",
    "Changed",
    "Consumer",
    "Depth",
    "DestinationDepth",
    "Entry",
    "Lease",
    "Lost",
    "Publication",
    "Queues",
    "Receiver",
    "RemoteQueues",
    "Settlement",
    "SortedQueues",
    "Subscription",
    "Taken",
    "new_identity",
]

DAMAGED_QUEUE: Final = "damaged"
"""The queue for unusable messages, set aside with a reason; nothing is deleted there."""


def new_identity() -> str:
    """An id for a copy at a broker, which no other copy has, and whose form no application uses."""
    return f"{secrets.token_hex(8)}.{secrets.token_hex(8)}"


class Publication(msgspec.Struct, frozen=True):
    """One message for one queue. `due` is seconds since 1970; None means at once.

    `since` is the wall clock's time when `due` was chosen, if `due` ends a wait rather than being
    a date. If the clock is set back before the publication is written, such a wait stays as long as
    it was.

    `identity` tells a copy at a broker from all others, if its publisher has chosen one. With
    `again` the broker may have the copy already.
    """

    queue: str
    message: Message
    due: float | None = None
    since: float = 0.0
    identity: str = ""
    again: bool = False


class Lease(msgspec.Struct, eq=False):
    """A message held by a consumer. The message goes back unless `Queues.ack` removes it.

    `id` is the backend's own number of the message, never used twice. `destination` is the key that
    the message waits under (`mailerq.rules.destinations`), empty in unsorted queues. While `loaded`
    is false the body is only in the queue: `message.body` is None, and `Subscription.load` fetches
    the body. `since` is when the message became due, seconds since 1970; 0 if unknown.
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
    """A finished lease, and the publications of the same step.

    `others` are messages of their own, in whatever queue: none of them is a retry of the lease.
    """

    lease: Lease
    publications: Sequence[Publication] = ()
    others: Sequence[Publication] = ()


@dataclass(slots=True, frozen=True)
class Depth:
    """The depth of one queue: `due` messages may go now, `delayed` ones wait.

    `held` ones wait until an operator releases them.
    """

    queue: str
    due: int
    delayed: int
    held: int = 0

    @property
    def total(self) -> int:
        return self.due + self.delayed + self.held


@dataclass(slots=True, frozen=True)
class Entry:
    """A message seen by `Queues.browse`, which removes nothing."""

    id: int
    queue: str
    due: float
    """Seconds since 1970; of a held message, when it would be due."""
    message: Message
    size: int | None = None
    """Bytes of the body, even if the body was not read; None without a body."""
    held: bool = False
    damaged: bool = False
    """The message cannot be used; `message` is what `DAMAGED_QUEUE` will get."""


@dataclass(slots=True, frozen=True)
class DestinationDepth:
    """The depth of one destination of a queue.

    `first_due` is its earliest due time, None if all of its mail is held.
    """

    destination: str
    due: int
    delayed: int
    first_due: float | None
    held: int = 0


@dataclass(slots=True, frozen=True)
class Changed:
    """What `BrowsableQueues.change` did: how many messages changed, and how many are leased.

    Others were gone, or the change does not apply to them.
    """

    done: int
    leased: int


class Consumer(ABC):
    """An endless source of leases, oldest due first; `async for lease in consumer`."""

    @abstractmethod
    async def receive(self) -> Lease:
        """Wait for the next due message."""

    def __aiter__(self) -> AsyncIterator[Lease]:
        return self

    async def __anext__(self) -> Lease:
        return await self.receive()


class Taken(msgspec.Struct, frozen=True):
    """The result of `Subscription.take`."""

    leases: Sequence[Lease]
    more: bool
    """True if more mail is due now."""
    next_due: float | None
    """When the next message becomes due, seconds since 1970."""


class Receiver(Protocol):
    """What a `Subscription` reports to its subscriber, on its loop. No method may raise."""

    def arrived(self, leases: Sequence[Lease]) -> None:
        """New mail is committed that fits the windows of its destinations."""

    def waiting(self, destination: str, due: float | None) -> None:
        """The queue holds unleased mail of a destination.

        `due` is None if some of the mail can go now. Otherwise `due` is the earliest time for which
        a message waits, in seconds since 1970. A slow commit may report a time that has passed.
        Called once for each destination in the queue at the start, and whenever mail is committed
        that does not go to `arrived`, retries included; never for each message of a known backlog,
        nor for mail that a take has already reported.
        A broker calls this only for mail that it has set apart by destination: other mail, and mail
        that waits for its time, arrives.
        """

    def waited(self, leases: Sequence[Lease]) -> None:
        """Mail has waited for its time in a broker, and wants to be tried now.

        Sorted queues tell of such mail by `waiting`.
        """

    def lost(self, leases: Sequence[Lease]) -> None:
        """A connection has ended: the broker gives these messages out again, to whomever.

        Those that are not under way should be released; another process may have them already. A
        lease that is kept is still settled as usual.
        """


class Subscription(ABC):
    """The mail of one queue, taken by destination. Belongs to the loop that subscribed.

    A destination's window limits its leased messages; beyond the window new mail stays in the
    queue. Mail goes directly to `Receiver.arrived` only while its destination has room and the
    queue holds no earlier due mail for it. The window does not limit `take`.
    """

    takes_together = 1
    """How many takes one call of `take_each` may have; together they cost little more than one."""

    @abstractmethod
    def set_window(self, destination: str, messages: int) -> None:
        """Change the window of a destination; 0 closes it, and all new mail stays in the queue."""

    @abstractmethod
    async def take(self, destination: str, limit: int) -> Taken:
        """Lease up to `limit` due messages of a destination, in the order of the backend.

        A broker finds only mail that it has told of by `Receiver.waiting`. Raises `QueueError`, and
        then nothing is leased.
        """

    async def take_each(self, wanted: Sequence[tuple[str, int]]) -> Sequence[Taken | QueueError]:
        """Take from destinations, each with its own limit; return the results in that order.

        At most `takes_together`, and no destination twice. An error concerns one destination only.
        """
        ((destination, limit),) = wanted
        try:
            return [await self.take(destination, limit)]
        except QueueError as error:
            return [error]

    @abstractmethod
    async def load(self, lease: Lease) -> None:
        """Fetch the body of a lease that is not `loaded`. Raises `QueueError`.

        `MessageDamaged`: the body is unusable; the message is set aside, and the lease is over.
        `ValueError`: the lease is over already.
        """

    @abstractmethod
    def forget(self, destination: str) -> None:
        """Drop the state of a destination: its window is the default again."""

    def look(self) -> None:  # noqa: B027 - queues of one process have nothing to look for
        """Look now for mail that other processes have set apart: more of it may be sent here.

        `Receiver.waiting` tells of what is found.
        """


class Queues(ABC):
    """All queues of one engine."""

    @property
    def identity(self) -> str:
        """The same for all hosts that share an outbox; empty if this host has its own."""
        return ""

    @abstractmethod
    async def publish(self, publications: Sequence[Publication]) -> None:
        """Make all publications durable, or raise `QueueError`, see the guarantees above.

        The messages belong to the queue from now on. The publisher must not change their
        properties, because a consumer may get the very same dict. `MessageError` names the part of
        a message that cannot be stored, or an impossible queue name.
        """

    @abstractmethod
    def configure(self, config: Config) -> None:
        """Apply changed settings."""

    @abstractmethod
    def check(self, publication: Publication) -> None:
        """Raise `MessageError` for a publication that `publish` and `ack` would refuse."""

    @abstractmethod
    async def ack(self, settlements: Sequence[Settlement]) -> None:
        """Remove consumed messages and publish their results, all in one step.

        A publication to the lease's own queue is a retry of the message, unless it is one of
        `Settlement.others`. If the lease is not
        loaded, the body stays in the queue unchanged. Raises `QueueError`, or `MessageError` as
        `publish` does; the messages are then still in their queue and still leased. `ValueError`: a
        lease is already over.
        """

    @abstractmethod
    def release(self, lease: Lease) -> None:
        """Return a consumed message unchanged: it may be consumed again at once.

        `ValueError`: the lease is already over.
        """

    @abstractmethod
    def consume(self, queue: str, *, prefetch: int) -> AbstractAsyncContextManager[Consumer]:
        """Consume a queue, with at most `prefetch` unacked leases at a time.

        When the context ends, remaining leases go back.
        """

    def subscribe(
        self, queue: str, receiver: Receiver, *, prefetch: int, window: int
    ) -> AbstractAsyncContextManager[Subscription]:
        """Take the mail of a queue by destination.

        `window` is the default window of a destination. While `prefetch` messages in all are
        leased, new mail stays in the queue. When the context ends, remaining leases go back.
        """
        raise NotImplementedError

    @abstractmethod
    async def depths(self) -> list[Depth]:
        """The depth of each queue, in order of name; empty queues may be missing."""

    @abstractmethod
    async def purge(self, queue: str) -> int:
        """Delete the unleased messages of a queue; return their number."""

    @abstractmethod
    def wake(self, *, everything: bool = False) -> None:
        """Look now for messages that another process has published.

        With `everything`, look also for messages that became due sooner through another process.
        """

    @abstractmethod
    def statistics(self) -> dict[str, Any]:
        """The backend's statistics since the start, as a tree of numbers."""


Lost = Callable[[], Sequence[str]]
"""The identities of leased messages that will be delivered once more, to whomever."""


class RemoteQueues(Queues):
    """Queues of another program, which may be away for a while.

    Attributes and methods here belong to the loop that opened the queues.
    """

    on_trouble: list[Callable[[], None]]
    """Called after `trouble` may have changed."""
    on_recognised: Callable[[str], None] | None = None
    """Called with the identity of a message that came again and was acknowledged at once, because
    `recognise` or a settlement had named it."""

    on_unheard: Callable[[Sequence[str]], None] | None = None
    """Called with the identities of messages whose acknowledgement may be lost with a connection.
    The queues recognise them themselves; another process would not."""

    @property
    @abstractmethod
    def trouble(self) -> str | None:
        """Why nothing can be published now, for people; None if it can."""

    @abstractmethod
    async def publish(self, publications: Sequence[Publication], *, again: bool = False) -> None:
        """Do as `Queues.publish`.

        What was accepted before comes `again`, and may be somewhat larger than what is new: it
        grows by its results.
        """

    @abstractmethod
    def give_up(self) -> None:
        """Have the calls of `publish` and `ack` that wait for a confirmation raise `QueueError`."""

    @abstractmethod
    async def settle(
        self, settlements: Sequence[Settlement], publish: Callable[[Lost], Awaitable[None]]
    ) -> None:
        """Do as `ack`, but have `publish` publish the messages of the settlements, on this loop.

        `publish` may ask at any time which leases are lost, by the identity of their messages. If
        it raises, the messages are still leased.
        """

    @abstractmethod
    async def read_head(
        self,
        queue: str,
        limit: int,
        show: Callable[[Sequence[Message]], None],
        *,
        remove: bool = False,
    ) -> None:
        """Show up to `limit` messages from the head of a queue; with `remove`, delete those shown.

        Unreadable messages are not shown, and stay. All messages are held until the last is shown.
        Raises `QueueError`.
        """

    @abstractmethod
    def recognise(self, identities: Collection[str]) -> None:
        """Messages that were settled: each is acknowledged when it comes again, and not leased."""


class SortedQueues(Queues):
    """Queues that see each message that waits, which a broker does not offer.

    Beyond the guarantees of every backend:

    - `publish` and `ack` that raise have published nothing.
    - `Subscription.take` finds all mail of its destination at any time, in a fair order: a higher
      `priority` first; then senders in turn, and retries to new mail 1 : 4. `Taken.next_due` is
      known. Consumers take from the destinations in turn.
    - `Receiver.waiting` is called for mail that waits for its time, and for retries.
    - The body of a large message may stay in the queue until `Subscription.load`.
    """


class BrowsableQueues(SortedQueues):
    """Queues that can be browsed and changed, too."""

    @abstractmethod
    async def browse(self, queue: str, *, limit: int = 100, after: int = 0) -> list[Entry]:
        """Read without taking: up to `limit` entries in order of `id`, above `after`."""

    @abstractmethod
    async def destinations(self, queue: str) -> list[DestinationDepth]:
        """The depth of each destination of a queue, in order of key."""

    @abstractmethod
    async def select(self, queue: str, selection: Selection) -> list[int]:
        """The numbers of the selected messages, in order, leased ones included."""

    @abstractmethod
    async def change(
        self,
        queue: str,
        numbers: Sequence[int],
        change: Change,
        *,
        recall: Callable[[Collection[int]], None] | None = None,
    ) -> Changed:
        """Change messages that are not leased, without taking them. Raises `QueueError`.

        Until the change is over, none of the messages is leased anew; `recall` is called in
        between, and may release some. A held message stays in the queue and never becomes due,
        until it is released.
        """
