"""An exchange that copies each document to all instances, and locks that one of them has.

Theory of operation
-------------------
`Exchange.run` keeps a connection of its own, apart from those for mail, with short heartbeats. On
it an instance has a queue that lives as long as the connection, bound to a fanout exchange, so each
document reaches each instance that is connected, its sender too. Nothing is kept for others.

A lock is an exclusive queue: the broker gives its name to one connection at a time, and takes it
away when the connection ends. The instance consumes the queue, to hear if an operator deletes it.

Documents are confirmed by the broker. `Exchange.on_answered` gets the time at which something was
sent whose answer has come, which proves that the connection, and so its locks, existed then.

A queue keeps `MAX_WAITING` documents for `MAX_AGE_SECONDS`: an instance that stands still costs the
broker no more.
"""

from __future__ import annotations

import logging
import random
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import pika
import trio

from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.connection import (
    ACCESS_REFUSED,
    NOT_ALLOWED,
    PRECONDITION_FAILED,
    RESOURCE_LOCKED,
    BrokerError,
    Channel,
    Connection,
    Delivery,
    connect,
)
from mailerq.queues.rabbitmq.topology import lock_name

__all__ = ["Exchange"]

log = logging.getLogger("mailerq.cluster")

HEARTBEAT_SECONDS: Final = 10
"""The broker frees the locks of a host that is gone after two of these at most."""

FIRST_PAUSE_SECONDS: Final = 0.2
MAX_PAUSE_SECONDS: Final = 5.0

REFUSALS: Final = (ACCESS_REFUSED, PRECONDITION_FAILED, NOT_ALLOWED)
REFUSED_PAUSE_SECONDS: Final = 60.0
"""After a refusal that only an operator can end: the broker writes each into its log."""

PREFETCH: Final = 500
MAX_WAITING: Final = 10_000
MAX_AGE_SECONDS: Final = 30

MAX_BUFFERED: Final = 8 << 20
"""Bytes that the kernel has not taken, beyond which nothing is published."""


class Exchange:
    """A connection to a cluster's exchange, most of the time. Belongs to the loop of `run`.

    Its user sets the callbacks before `run`. `clock` returns integer nanoseconds.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        exchange: str,
        *,
        clock: Callable[[], int],
        name: str = "mailerq",
        context: ssl.SSLContext | None = None,
        first_pause: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        self.on_open: Callable[[], None] = lambda: None
        self.on_lost: Callable[[str], None] = lambda reason: None
        """Called once when the connection is over, or cannot be opened."""
        self.on_document: Callable[[bytes], None] = lambda data: None
        self.on_answered: Callable[[int], None] = lambda sent: None
        self.on_unlocked: Callable[[str], None] = lambda name: None
        """Called when somebody has deleted the queue of a lock."""
        self.queue = ""
        """The queue of this instance while there is a connection, else empty."""
        self._addresses = addresses
        self._exchange = exchange
        self._clock = clock
        self._name = name
        self._context = context
        self._first_pause = first_pause
        self._connection: Connection | None = None
        self._channel: Channel | None = None
        self._locks: Channel | None = None
        self._published = 0
        self._unanswered: deque[tuple[int, int]] = deque()

    @property
    def is_open(self) -> bool:
        """Whether documents go out and come in."""
        return bool(self.queue) and self._channel is not None and self._channel.is_open

    async def run(self) -> None:
        """Keep the connection until cancelled."""
        pause = self._first_pause
        turn = 0
        while True:
            address = self._addresses[turn % len(self._addresses)]
            opened = False
            try:
                async with connect(
                    address,
                    context=self._context,
                    heartbeat_seconds=HEARTBEAT_SECONDS,
                    name=f"{self._name} cluster",
                ) as connection:
                    await self._open(connection)
                    opened, pause = True, self._first_pause
                    self.on_open()
                    reason = await self._wait(connection)
            except BrokerError as error:
                reason = error
                if error.code in REFUSALS:
                    pause = REFUSED_PAUSE_SECONDS
            finally:
                was_open, self.queue = self.queue, ""
                self._channel = self._locks = self._connection = None
                self._unanswered.clear()
                if opened and was_open:
                    self.on_lost("the connection is over")
            if not opened:
                self.on_lost(str(reason))
            else:
                log.warning("the cluster cannot be heard: %s", reason)
            turn += 1
            if turn % len(self._addresses) == 0:
                await trio.sleep(pause * random.uniform(0.8, 1.2))
                pause = min(2 * pause, MAX_PAUSE_SECONDS)

    async def _open(self, connection: Connection) -> None:
        """Declare the exchange and the queue, and begin to consume."""
        channel = await connection.channel()
        raw = channel._channel
        await channel._call(raw.exchange_declare, self._exchange, "fanout", durable=True)
        frame = await channel._call(
            raw.queue_declare,
            "",
            exclusive=True,
            auto_delete=True,
            arguments={
                "x-max-length": MAX_WAITING,
                "x-message-ttl": MAX_AGE_SECONDS * 1000,
                "x-queue-type": "classic",
            },
        )
        queue = str(frame.method.queue)
        await channel._call(raw.queue_bind, queue, self._exchange, "")
        self._published = 0
        await channel.confirm(self._confirmed)
        await channel.prefetch(PREFETCH)
        self._locks = await connection.channel()
        await channel.consume(queue, self._delivered, lambda: connection.abort("queue deleted"))
        self._connection, self._channel, self.queue = connection, channel, queue

    async def _wait(self, connection: Connection) -> BrokerError:
        """Wait for the end of the connection, or of one of its channels."""
        reasons: list[BrokerError] = []
        channel, locks = self._channel, self._locks
        assert channel is not None and locks is not None

        async def watch(ended: Connection | Channel) -> None:
            reasons.append(await ended.wait_closed())
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for each in (connection, channel, locks):
                nursery.start_soon(watch, each)
        return reasons[0]

    def _delivered(self, delivery: Delivery) -> None:
        delivery.channel.ack(delivery.tag)
        self.on_document(delivery.body)

    def _confirmed(self, tag: int, multiple: bool, taken: bool) -> None:
        sent = -1
        while self._unanswered and self._unanswered[0][0] <= tag:
            sent = self._unanswered.popleft()[1]
        if sent >= 0:
            self.on_answered(sent)

    def publish(self, data: bytes, queue: str = "") -> bool:
        """Send a document to all instances, or to the one with a queue; False if that cannot be.

        A document may be lost. Without room in the buffer, or while the broker is short of memory
        or disk, nothing is sent.
        """
        connection, channel = self._connection, self._channel
        if connection is None or channel is None or not channel.is_open:
            return False
        if not channel._channel.is_open:  # it is being closed
            return False
        if connection.blocked is not None or connection.buffered > MAX_BUFFERED:
            return False
        properties = pika.BasicProperties(content_type="application/json")
        exchange = "" if queue else self._exchange
        self._published += 1
        self._unanswered.append((self._published, self._clock()))
        channel._channel.basic_publish(exchange, queue, data, properties)
        return True

    # Locks

    async def lock(self, name: str) -> bool:
        """Get a lock; False if another connection has it. Raises `BrokerError`."""
        connection, locks = self._connection, self._locks
        if connection is None or locks is None:
            raise BrokerError("there is no connection")
        queue = self._lock_queue(name)
        channel = await connection.channel()  # a refusal ends it
        try:
            await channel._call(
                channel._channel.queue_declare,
                queue,
                exclusive=True,
                arguments={"x-max-length": 1, "x-queue-type": "classic"},
            )
        except BrokerError as error:
            if error.code == RESOURCE_LOCKED:
                return False
            raise
        await channel.close()

        def ended() -> None:
            if self._locks is locks and locks.is_open:
                self.on_unlocked(name)

        await locks.consume(queue, _ignored, ended)
        return True

    async def unlock(self, name: str) -> None:
        """Give up a lock. Raises `BrokerError`."""
        connection = self._connection
        if connection is not None:
            channel = await connection.channel()
            await channel.delete(self._lock_queue(name))
            await channel.close()

    def _lock_queue(self, name: str) -> str:
        return lock_name(self._exchange, name)


def _ignored(delivery: Any) -> None:
    """Nobody has a reason to publish to the queue of a lock."""
    delivery.channel.ack(delivery.tag)
