"""What is done to queues of a broker beside taking: they are counted, emptied, hastened, trimmed.

A broker can neither list nor search: messages are fetched from the head of a queue, and go back if
nothing is to be done to them. They are on a channel of their own, so that they go back too if this
process ends.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

import trio

from mailerq.errors import MessageError
from mailerq.message import Message
from mailerq.queues.interface import Depth
from mailerq.queues.rabbitmq.coding import decode, decode_soon, encoding_of, header
from mailerq.queues.rabbitmq.connection import BrokerError, Channel, Delivery
from mailerq.queues.rabbitmq.options import Bound
from mailerq.queues.rabbitmq.publisher import Copy
from mailerq.queues.rabbitmq.subscription import BrokerSubscription

if TYPE_CHECKING:
    from mailerq.queues.rabbitmq.queues import RabbitQueues

__all__ = [
    "MAX_INDEX",
    "Trimmer",
    "channel_of",
    "depth_of",
    "hasten",
    "parked_keys",
    "purge",
    "read_head",
    "read_keys",
    "ready",
]

log = logging.getLogger("mailerq.queues")

MAX_INDEX: Final = 50_000
"""Entries of an index to read at a time; a prefetch has 16 bits."""

MAX_ENTRY: Final = 2000
"""Bytes of an entry of an index; a longer one is not ours."""

TURN_ENTRIES: Final = 500
"""Entries read in one turn of the loop."""

READ_MESSAGES: Final = 1000
"""Messages shown together."""

TRIM_SECONDS: Final = 60.0
TRIM_MESSAGES: Final = 1000
"""Messages looked at together."""

MOST_BYTES: Final = 64 << 20
"""Bytes fetched at a time."""


@asynccontextmanager
async def channel_of(queues: RabbitQueues) -> AsyncIterator[Channel]:
    """A channel to fetch on; what is not acknowledged goes back at the end."""
    connection = await queues.consuming.connection()
    channel = await connection.channel()
    try:
        yield channel
    finally:
        with trio.move_on_after(1, shield=True), suppress(BrokerError):
            await channel.close()


async def ready(queues: RabbitQueues, name: str) -> int:
    """How many messages of a queue nobody has; 0 without such a queue. Raises `BrokerError`."""
    found = await queues.publisher.look(name)
    return 0 if found is None else found.messages


async def depth_of(queues: RabbitQueues, queue: str) -> Depth:
    """Count a queue with the mail that is parked or waits for its time. Raises `BrokerError`."""
    due = await ready(queues, queue)
    for name in await _parked_names(queues, queue):
        due += await ready(queues, name)
    due += sum(taker.unsettled for taker in queues.takers(queue))
    delayed = 0
    for name in queues.wait_names(queue):
        delayed += await ready(queues, name)
    return Depth(queue, due, delayed)


async def purge(queues: RabbitQueues, queue: str) -> int:
    """Empty a queue, with its parked and waiting mail; return the number of messages.

    Raises `BrokerError`.
    """
    count = await queues.publisher.purge(queue)
    for name in (*await _parked_names(queues, queue), *queues.wait_names(queue)):
        count += await queues.publisher.purge(name)
    return count


async def _parked_names(queues: RabbitQueues, queue: str) -> list[str]:
    takers = queues.takers(queue)
    if not takers and queue != queues.options.outbox:
        return []
    keys = set(await parked_keys(queues, queue))
    for taker in takers:
        if isinstance(taker, BrokerSubscription):
            keys.update(taker.destinations)
    return [queues.topology.parked(queue, key)[0] for key in sorted(keys)]


async def hasten(queues: RabbitQueues, queue: str) -> int:
    """Have retries of a queue come now; return the number of messages. Raises `BrokerError`.

    Mail that its sender delayed stays.
    """
    count = 0
    async with channel_of(queues) as channel:
        for name, _ in queues.topology.waits(queue):
            found = await queues.publisher.look(name)
            left = 0 if found is None else found.messages
            kept: list[int] = []
            while left > 0:  # and not what comes meanwhile
                limit = min(queues.options.fetch, left)
                deliveries, _ = await channel.fetch(name, limit, MOST_BYTES)
                if not deliveries:
                    break
                left -= len(deliveries)
                while deliveries:
                    moved, size = [], 0
                    while deliveries and size <= MOST_BYTES:
                        each = deliveries.pop(0)
                        copy = await _hastened(queues, queue, each)
                        if copy is None:
                            kept.append(each.tag)
                        else:
                            moved.append((each.tag, copy))
                            size += len(copy.body)
                    await queues.publisher.publish([copy for _, copy in moved])
                    for tag, _ in moved:
                        channel.ack(tag)
                    count += len(moved)
            for tag in kept:  # not before, or they would be fetched again
                channel.nack(tag)
    return count


async def _hastened(queues: RabbitQueues, queue: str, delivery: Delivery) -> Copy | None:
    """A copy of a retry that may go now; None for other mail."""
    encoding = delivery.properties.content_encoding
    try:
        message = await decode_soon(delivery.body, encoding)
        results = message.properties.get("results")
        if not isinstance(results, list) or not results:
            return None
        message.properties.pop("delayed", None)
        body = await queues.encode(message, again=True)
    except MessageError:
        return None  # it is set aside when its time has come
    properties = header(
        queues.publisher.identity(),
        priority=delivery.properties.priority or 0,
        due=queues.clock(),
        encoding=encoding_of(body),
        now=queues.clock(),
    )
    return Copy(queues.place(queue), body, properties)


async def parked_keys(queues: RabbitQueues, queue: str) -> list[str]:
    """The destinations with parked mail, as far as no other process reads the list now.

    Raises `BrokerError`.
    """
    name = queues.topology.index(queue)[0]
    async with channel_of(queues) as channel:
        if await queues.publisher.look(name) is None:
            return []
        return (await read_keys(channel, name))[1]


async def read_keys(channel: Channel, index: str) -> tuple[list[Delivery], list[str]]:
    """Fetch the entries of the list of destinations with parked mail, and the destinations in them.

    Raises `BrokerError`.
    """
    entries, _ = await channel.fetch(index, MAX_INDEX, MOST_BYTES)
    keys: dict[str, None] = {}
    for number, entry in enumerate(entries):
        if number % TURN_ENTRIES == 0:
            await trio.lowlevel.checkpoint()
        if len(entry.body) > MAX_ENTRY:
            continue  # not ours
        with suppress(MessageError):
            key = decode(entry.body, None).properties.get("destination")
            if isinstance(key, str):
                keys[key] = None
    return entries, list(keys)


async def read_head(
    queues: RabbitQueues,
    queue: str,
    limit: int,
    show: Callable[[Sequence[Message]], None],
    *,
    remove: bool = False,
) -> None:
    """Show up to `limit` messages from the head of a queue; with `remove` they are gone then.

    Those that cannot be read are left out, and stay. Raises `BrokerError`.
    """
    left = limit
    async with channel_of(queues) as channel:
        if await queues.publisher.look(queue) is None:
            return
        while left > 0:
            deliveries, _ = await channel.fetch(queue, min(left, READ_MESSAGES), MOST_BYTES)
            if not deliveries:
                return
            left -= len(deliveries)
            while deliveries:
                messages, readable, size = [], [], 0
                while deliveries and size <= MOST_BYTES:
                    each = deliveries.pop(0)
                    with suppress(MessageError):
                        message = await decode_soon(each.body, each.properties.content_encoding)
                        messages.append(message)
                        readable.append(each)
                        size += len(message.body or b"")
                show(messages)
                if remove:
                    for each in readable:
                        channel.ack(each.tag)


class Trimmer:
    """Removes the oldest messages of queues that keep a number of messages, or for some time."""

    def __init__(self, queues: RabbitQueues) -> None:
        self._queues = queues
        self.trimmed = 0
        """Messages removed so far."""

    async def run(self) -> None:
        """Look once a minute until cancelled."""
        said = ""
        while True:
            await trio.sleep(TRIM_SECONDS)
            for bound in self._queues.options.bounds:
                try:
                    await self.trim(bound)
                    said = ""
                except BrokerError as error:
                    if str(error) != said and self._queues.consuming.open is not None:
                        said = str(error)
                        log.warning("the queue %s is not trimmed: %s", bound.queue, error)

    async def trim(self, bound: Bound) -> int:
        """Remove what is too much or too old; return the number. Raises `BrokerError`."""
        if not bound.messages and not bound.seconds:
            return 0
        queues, removed = self._queues, 0
        async with channel_of(queues) as channel:
            while True:
                found = await queues.publisher.look(bound.queue)
                if found is None or not found.messages:
                    break
                excess = max(found.messages - bound.messages, 0) if bound.messages else 0
                if not excess and not bound.seconds:
                    break
                before = queues.clock() - bound.seconds if bound.seconds else 0.0
                deliveries, _ = await channel.fetch(bound.queue, TRIM_MESSAGES, MOST_BYTES)
                gone = 0
                for each in deliveries:
                    since = each.properties.timestamp
                    is_old = isinstance(since, int) and 0 < since < before
                    if (gone < excess or is_old) and not (
                        bound.reports_only and await _is_mail(each)
                    ):
                        channel.ack(each.tag)
                        gone += 1
                    else:
                        channel.nack(each.tag)
                removed += gone
                if not gone or gone < len(deliveries):
                    break
        self.trimmed += removed
        return removed


async def _is_mail(delivery: Delivery) -> bool:
    await trio.lowlevel.checkpoint()
    try:
        message = await decode_soon(delivery.body, delivery.properties.content_encoding)
    except MessageError:
        return True  # nothing that we wrote
    return message.body is not None or "key" in message.properties
