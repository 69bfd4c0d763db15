"""Takers of a broker's queues: consumers, and subscriptions by destination.

Theory of operation
-------------------
A taker consumes its queue with a prefetch. A `Consumer` hands out what comes. A subscription sorts
what comes by destination, message by message:

- A message that is not due yet goes to a wait queue.
- A message whose destination has room goes to the receiver.
- A message whose destination is closed, full, or has earlier mail that waits is *parked*: published
  to the parked queue of the destination and acknowledged. The receiver is told once that the
  destination has mail, and `take` gets it from the parked queue.
- While `prefetch` messages are leased, what comes is held back, and parked after `HOLD_SECONDS`.
- A message that has waited for its time goes to the receiver (`Receiver.waited`) if it finds room
  in memory, whatever else waits for its destination: its host is asked anew.

Large messages count too, as large as they are when unpacked: with more than `MAX_BYTES` the
consumer ends, and begins again with a smaller prefetch when half of them have gone. What comes
beyond `MOST_BYTES` goes back at once. With `HELD_BYTES` held back, further messages without room
are parked at once.

So nothing stays unacknowledged for a wait, and mail that waits costs nothing here, except one
`Destination` for each destination with parked mail. The list of these destinations is in the broker
too (`Topology.index`): it is read at the start and every `INDEX_LOOK_SECONDS`, because other
processes park mail as well, and may be gone.

When a connection is lost, the broker delivers again what was not acknowledged. A message that is
leased is recognised by its identity and joined with its lease. One that was settled meanwhile is
acknowledged and not handed out again. Only another process may send such a message twice.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from mailerq.errors import MessageError, QueueError
from mailerq.message import Message, decode_properties, encode_properties
from mailerq.queues.interface import DAMAGED_QUEUE, Consumer, Lease
from mailerq.queues.rabbitmq.coding import (
    decode_soon,
    due_of,
    identity_of,
    in_thread,
    is_again,
    is_named,
    was_refused,
)
from mailerq.queues.rabbitmq.connection import BrokerError, Channel, Connection, Delivery

if TYPE_CHECKING:
    from mailerq.queues.rabbitmq.queues import RabbitQueues

__all__ = ["BrokerConsumer", "BrokerLease", "Move", "Taker"]

log = logging.getLogger("mailerq.queues")

HOLD_SECONDS: Final = 30.0
"""How long a message may be held back for room in memory. RabbitMQ before 4.3 ends a consumer that
keeps a message for half an hour."""

FETCH_MESSAGES: Final = 1000
"""Messages fetched at a time from a parked queue."""

MIN_MESSAGES: Final = 100
"""Messages held at a time at least, however large they are."""

MAX_BYTES: Final = 256 << 20
"""Bytes of messages in memory above which fewer are held than the prefetch says."""

MOST_BYTES: Final = 2 * MAX_BYTES

USUAL_BYTES: Final = 16 << 10
"""The size of a message before any has come."""

GROUP: Final = 100
"""Messages sorted in one turn of the loop, and parked in one batch."""

SPARE_MESSAGES: Final = 1000
"""Messages beyond twice the prefetch for which a broker is not left yet."""

CHECK_SECONDS: Final = 30.0
AGAIN_SECONDS: Final = 1.0
MAX_AGAIN_SECONDS: Final = 30.0


class BrokerLease(Lease, eq=False):
    """A lease of this backend."""

    taker: Taker | None = None
    channel: Channel | None = None
    tag: int = 0
    identity: str = ""
    priority: int = 0
    parked: bool = False
    """The message came from the parked queue of its destination, and stays there."""
    settling: bool = False
    kept: tuple[bytes, bytes | None] = (b"", None)
    """The properties and the body as they came: the consumer may change its message."""

    @property
    def is_stale(self) -> bool:
        """Whether the broker will deliver the message again."""
        return self.channel is None or not self.channel.is_open

    @property
    def is_lost(self) -> bool:
        """Whether the message will come again, to whomever, and can be told from all others."""
        return self.is_stale and is_named(self.identity)

    def restored(self) -> Message:
        properties, body = self.kept
        return Message(decode_properties(properties), body)


class Move:
    """A message on its way out of a queue, to be acknowledged there once it is safe elsewhere.

    The message goes to the parked queue of `key`, to a wait queue until `due`, or to the queue for
    unusable messages, with a `reason`.
    """

    __slots__ = ("due", "elsewhere", "is_listed", "key", "origin", "reason", "safe", "size")

    def __init__(
        self,
        origin: BrokerLease | Delivery,
        *,
        key: str = "",
        due: float | None = None,
        reason: str | None = None,
    ) -> None:
        self.origin = origin
        self.size = origin.size if isinstance(origin, BrokerLease) else len(origin.body)
        self.key = key
        self.due = due
        self.reason = reason
        self.elsewhere = False
        """The queue cannot be used now: the message waits in another one."""
        self.safe = False
        """The broker has confirmed the message in its new queue."""
        self.is_listed = True
        """The list of destinations with parked mail has the one of the message."""

    @property
    def parks(self) -> bool:
        return self.due is None and self.reason is None

    @property
    def identity(self) -> str:
        return self.origin.identity


class Taker:
    """What consumers and subscriptions share: a consumer of the broker that is kept alive."""

    def __init__(self, queues: RabbitQueues, queue: str, prefetch: int) -> None:
        self.queues = queues
        self.queue = queue
        self.prefetch = prefetch
        self.count = 0
        """Messages leased."""
        self.bytes = 0
        """Bytes of all messages here: leased, unsorted, and on their way out."""
        self.refused = 0
        """Messages that went back for lack of memory."""
        self.overfull = False
        """More came than fits: the consumer must end."""
        self.average = float(USUAL_BYTES)
        """Bytes of a message, of late."""
        self.parked = 0
        """Messages parked so far."""
        self.closed = False
        self.channel: Channel | None = None
        self.inbox: deque[Delivery] = deque()
        self.moves: deque[Move] = deque()
        self.said = ""
        self._ended: list[BrokerError] = []
        self._news = trio.Event()
        self._moving = trio.Event()
        self._idle = trio.Event()
        self._idle.set()
        self._token = trio.lowlevel.current_trio_token()

    @property
    def unsettled(self) -> int:
        """Messages that the broker has given out, and the queue still counts."""
        return self.count + len(self.inbox) + len(self.moves)

    @property
    def quota(self) -> int:
        """Unacknowledged messages to ask the broker for."""
        return self.prefetch

    @property
    def fitting_quota(self) -> int:
        """The quota, or fewer messages if they are large: down to `min_qos`, while they fit."""
        wanted = max(MAX_BYTES / self.average, self.queues.options.min_qos)
        room = (MOST_BYTES - self.bytes) / self.average
        return max(min(self.quota, int(wanted), int(room)), 1)

    @property
    def is_heavy(self) -> bool:
        """Whether no more messages fit into memory."""
        if self.bytes > MOST_BYTES:
            return True
        return self.bytes > MAX_BYTES and self.unsettled >= self.queues.options.min_qos

    @property
    def has_memory_again(self) -> bool:
        """Whether a consumer that ended for lack of memory may begin again."""
        few = self.unsettled < self.queues.options.min_qos // 2
        return self.bytes <= (MAX_BYTES if few else MAX_BYTES // 2)

    def came(self, delivery: Delivery) -> bool:
        """Count a delivery; False, and the message goes back, if there is no memory for it."""
        if self.unsettled - self.count > 2 * self.quota + SPARE_MESSAGES:
            self.end(BrokerError("the broker sends more messages than were asked for"))
            return False
        size = len(delivery.body)
        self.average += (size - self.average) / 32
        if self.bytes and self.bytes + size > MOST_BYTES:
            delivery.channel.nack(delivery.tag)
            self.refused += 1
            self.overfull = True
            return False
        self.bytes += size
        return True

    def notice(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def run(self) -> None:
        """Consume, over all failures, until cancelled."""
        pause = AGAIN_SECONDS
        while True:
            connection = await self.queues.consuming.connection()
            try:
                begun = trio.current_time()
                await self._serve(connection)
            except BrokerError as error:
                self.queues.publisher.forget(self.queue)  # it may have been deleted
                self._say(error, connection)
                if trio.current_time() - begun > MAX_AGAIN_SECONDS:
                    pause = AGAIN_SECONDS
                if connection.is_open:
                    await trio.sleep(pause)
                    pause = min(2 * pause, MAX_AGAIN_SECONDS)

    def _say(self, error: BrokerError, connection: Connection) -> None:
        # Whether there is a connection, the keeper says.
        if connection.is_open and str(error) != self.said:
            self.said = str(error)
            log.error("nothing comes from the queue %s: %s", self.queue, error)

    async def _serve(self, connection: Connection) -> None:
        """Consume on one connection until that ends; raises `BrokerError`."""
        self._forget_unleased()
        if problem := self.queues.topology.problem():
            raise BrokerError(problem)
        await self.queues.publisher.declare(self.queues.place(self.queue))
        channel = await connection.channel()
        try:
            self.channel = channel
            await self.begin(connection)
            ended = self._ended = []

            def cancelled() -> None:
                if ended is self._ended:
                    self.end(BrokerError("the broker ended the consumer: the queue was deleted"))

            def closed(reason: BrokerError) -> None:
                if ended is self._ended:
                    self.end(reason)

            def delivered(delivery: Delivery) -> None:
                if self.came(delivery):
                    self.inbox.append(delivery)
                self.notice()

            async def consume() -> str:
                await channel.prefetch(self.fitting_quota)
                return await channel.consume(self.queue, delivered, cancelled)

            channel.on_closed = closed
            consumer = await consume()
            checked = trio.current_time()
            if self.said:
                self.said = ""
                log.info("mail comes from the queue %s again", self.queue)
            while not ended:
                news = self._news
                await self.sort()
                if consumer and (self.overfull or self.is_heavy):
                    await channel.cancel(consumer)
                    consumer, self.overfull = "", False
                elif not consumer and self.has_memory_again:
                    consumer = await consume()
                if not ended and not news.is_set():
                    with trio.move_on_after(min(self.wait_seconds(), CHECK_SECONDS)):
                        await news.wait()
                if consumer and trio.current_time() >= checked + CHECK_SECONDS:
                    checked = trio.current_time()
                    await self._check(channel)
            raise ended[0]
        finally:
            self.channel = None
            with trio.move_on_after(1, shield=True):
                await channel.close()
            if not connection.is_open and not self.closed:
                self.queues.acks_lost()
                self.lost()

    def _forget_unleased(self) -> None:
        """Forget what the broker delivers again; leases are kept."""
        self.inbox.clear()
        self.bytes = sum(lease.size for lease in self.queues.held.values() if lease.taker is self)

    def end(self, reason: BrokerError) -> None:
        """End the consumer, and begin anew."""
        self._ended.append(reason)
        self.notice()

    async def _check(self, channel: Channel) -> None:
        """Find out whether the broker still knows of the consumer. Raises `BrokerError`.

        RabbitMQ 3.10 does not end the consumers of a quorum queue that was deleted and at once
        declared anew, and does not deliver to them either.
        """
        if not (await channel.declare(self.queue, passive=True)).consumers:
            raise BrokerError("the broker has forgotten the consumer: the queue was deleted")

    def lost(self) -> None:
        """The connection has ended, and with it the hold on what is leased."""

    async def begin(self, connection: Connection) -> None:
        """Prepare for a new connection. What moves is delivered once more."""
        self.moves.clear()
        # What is safe elsewhere meanwhile must be known before it is delivered.
        await self._idle.wait()

    async def tend(self) -> None:
        """Look after the queues beside this one, until cancelled."""

    def start_move(self, move: Move) -> None:
        if isinstance(move.origin, BrokerLease):
            self.bytes += move.size  # the lease is over, and does not count any more
        self.moves.append(move)
        self._moving.set()

    async def move(self) -> None:
        """Publish what moves, until cancelled."""
        while True:
            await self._moving.wait()
            self._moving = trio.Event()
            while self.moves:
                group = [self.moves[at] for at in range(min(GROUP, len(self.moves)))]
                self._idle = trio.Event()
                try:
                    with trio.CancelScope(shield=True):
                        await self.queues.moving.publish(self.queue, group, self.new_keys(group))
                    self._finish_moves(group)
                except QueueError as error:
                    # What is safe must not be published again with what is not.
                    self._finish_moves([move for move in group if move.safe])
                    self._idle.set()
                    self._say_unmoved(error)
                    await trio.sleep(AGAIN_SECONDS)
                finally:
                    self._idle.set()

    def _say_unmoved(self, error: QueueError) -> None:
        if str(error) != self.said:
            self.said = str(error)
            log.warning("mail of %s cannot be moved to other queues: %s", self.queue, error)

    def _finish_moves(self, group: Sequence[Move]) -> None:
        for move in group:
            origin = move.origin
            self.queues.finish(origin.channel, origin.tag, move.identity)
            if self.moves and self.moves[0] is move:
                self.moves.popleft()
                self.bytes -= move.size
            elif move in self.moves:  # others before it stay; else the connection was lost
                self.moves.remove(move)
                self.bytes -= move.size
        self.notice()
        self.moved(group)

    def new_keys(self, group: Sequence[Move]) -> list[str]:
        """Destinations that the list of those with parked mail does not have yet."""
        return []

    def moved(self, group: Sequence[Move]) -> None:
        """Moves are over."""

    def wait_seconds(self) -> float:
        """How long to wait for news at most."""
        return float("inf")

    async def sort(self) -> None:
        """Do something with what has come."""
        raise NotImplementedError

    async def open(self, delivery: Delivery) -> Message | None:
        """The message of a delivery; None if the delivery is dealt with already."""
        queues, size = self.queues, len(delivery.body)
        work = partial(identity_of, delivery.properties, delivery.body)
        delivery.identity = identity = await in_thread(size, work)
        if not delivery.channel.is_open:
            self.bytes -= size
            return None  # it comes again
        known = queues.by_identity.get(identity)
        if known is not None and known.is_stale and known.queue == self.queue:
            known.channel, known.tag = delivery.channel, delivery.tag
            self.bytes -= size
            return None
        again = is_again(delivery.properties)
        if queues.was_settled(identity, delivery) or queues.is_second(identity, again=again):
            delivery.channel.ack(delivery.tag)
            self.bytes -= size
            return None
        try:
            return await decode_soon(delivery.body, delivery.properties.content_encoding)
        except MessageError as error:
            if self.queue == DAMAGED_QUEUE:
                self.bytes -= size
                return None  # it stays where it is
            if not was_refused(delivery.properties):  # else the log has it
                log.error("a message of the queue %s is set aside: %s", self.queue, error)
            self.start_move(Move(delivery, reason=str(error)))
            return None

    def _has_lost(self, delivery: Delivery) -> bool:
        """Whether the first delivery has left during a wait, with its connection or the taker."""
        return self.closed or not self.inbox or self.inbox[0] is not delivery

    async def next(self) -> tuple[Delivery, Message] | None:
        """The next message that is due, out of the inbox; None if there is none for now."""
        while self.inbox and not self.closed:
            delivery = self.inbox[0]
            message = await self.open(delivery)
            if self._has_lost(delivery):
                return None
            self.inbox.popleft()
            if message is None:
                continue
            due = due_of(delivery.properties)
            if due is None or due <= self.queues.clock():
                return delivery, message
            self.start_move(Move(delivery, due=due))
        return None

    def lease(
        self, delivery: Delivery, message: Message, destination: str = "", parked: bool = False
    ) -> BrokerLease:
        """Lease a message."""
        queues = self.queues
        self.count += 1
        queues.leases += 1
        properties = encode_properties(message.properties)
        lease = BrokerLease(
            queues.leases,
            self.queue,
            message,
            destination,
            size=len(properties) + len(message.body or b""),
            since=due_of(delivery.properties) or 0.0,
            taker=self,
            channel=delivery.channel,
            tag=delivery.tag,
            identity=delivery.identity,
            priority=delivery.properties.priority or 0,
            parked=parked,
            kept=(properties, message.body),
        )
        self.bytes += lease.size - len(delivery.body)
        queues.held[lease.id] = lease
        queues.by_identity.setdefault(lease.identity, lease)
        return lease

    def over(self, lease: BrokerLease) -> None:
        """A lease has ended."""
        self.count -= 1
        self.bytes -= lease.size
        self.notice()

    def release(self, lease: BrokerLease) -> None:
        """Return the message of a lease that has ended."""
        if lease.channel is not None:
            lease.channel.nack(lease.tag)

    def close(self) -> None:
        """Take nothing more."""
        self.closed = True

    def check_open(self) -> None:
        if trio.lowlevel.current_trio_token() is not self._token:
            raise RuntimeError("a taker belongs to the trio loop that opened it")
        if self.closed:
            raise trio.ClosedResourceError("nothing is taken here any more")


class BrokerConsumer(Taker, Consumer):
    """A consumer; call `receive` on the loop that opened it."""

    def __init__(self, queues: RabbitQueues, queue: str, prefetch: int) -> None:
        super().__init__(queues, queue, prefetch)
        self._ready: deque[BrokerLease] = deque()
        self._arrived = trio.Event()

    async def sort(self) -> None:
        while self.inbox and not self.closed:
            if len(self._ready) > self.quota or (self._ready and self.bytes > MOST_BYTES):
                return  # unpacked, messages may need much more memory
            found = await self.next()
            if found is None:
                return
            self._ready.append(self.lease(*found))
            self._arrived.set()

    def over(self, lease: BrokerLease) -> None:
        super().over(lease)
        if lease in self._ready:
            self._ready.remove(lease)

    async def receive(self) -> Lease:
        """Wait for the next due message."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            self.check_open()
            if self._ready:
                return self._ready.popleft()
            self._arrived = trio.Event()
            await self._arrived.wait()

    def close(self) -> None:
        super().close()
        self._arrived.set()
