"""Publishes what leaves a queue for another one: to be parked, to wait, or to be set aside.

Theory of operation
-------------------
Mail is parked over a connection of its own, and set aside in a publication of its own, so that a
queue which takes nothing keeps up no other. What such a queue does not take waits in a wait queue,
comes again, and is tried again: it must not stay with the consumer, where others wait behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from mailerq.message import encode_properties
from mailerq.queues.interface import DAMAGED_QUEUE
from mailerq.queues.rabbitmq.coding import beside, encoding_of, header
from mailerq.queues.rabbitmq.connection import BrokerError, Delivery
from mailerq.queues.rabbitmq.publisher import Copy, Place, Publisher
from mailerq.queues.rabbitmq.takers import BrokerLease, Move

if TYPE_CHECKING:
    from mailerq.queues.rabbitmq.queues import RabbitQueues

__all__ = ["Moving"]

log = logging.getLogger("mailerq.queues")

ASIDE_SECONDS: Final = 60
"""How long a message waits that cannot be used, if the queue for such messages does not take it:
one of `DELAYS`."""


class Moving:
    """The moves of all queues. Belongs to their loop."""

    def __init__(self, queues: RabbitQueues) -> None:
        self._queues = queues
        self._said = ""

    async def publish(self, queue: str, moves: Sequence[Move], keys: Sequence[str]) -> None:
        """Publish messages that move, and destinations that get their first parked message.

        Raises `QueueError`; some of the messages may be safe then, see `Move.safe`.
        """
        queues = self._queues
        await queues.wait_ready()
        can_park = {
            key: await queues.lots.may_park(queue, key)
            for key in {move.key for move in moves if move.parks}
        }
        indexes = {key: self.index_copy(queue, key) for key in keys if can_park[key]}
        copies: dict[Move, Copy] = {}
        for move in moves:
            move.elsewhere = move.parks and not can_park[move.key]
            copies[move] = copy = await self._moved_copy(queue, move)
            if move.parks and not move.elsewhere and queues.parker.is_suspected(copy.place.name):
                can_park[move.key] = False  # one message is enough for a trial
        await queues.home.counted(partial(self._republish, queue, indexes, copies))

    async def _republish(
        self, queue: str, indexes: dict[str, Copy], copies: dict[Move, Copy]
    ) -> None:
        """Publish what moves. What cannot be parked, or set aside, waits elsewhere."""
        queues = self._queues
        parked = [move for move in copies if move.parks and not move.elsewhere]
        aside = [move for move in copies if move.reason is not None]
        if (error := await self._try(queue, queues.parker, parked, copies)) is not None:
            log.debug("mail of %s cannot be parked: %s", queue, error)
        if (error := await self._try(queue, queues.publisher, aside, copies)) is not None:
            self._say_not_aside(queue, str(error))
        elif aside:
            self._said = ""
        left = [copy for copy in copies.values() if not copy.is_safe]
        try:
            await queues.publisher.publish([*indexes.values(), *left])
        finally:
            for move, copy in copies.items():
                move.safe = copy.is_safe
                index = indexes.get(move.key) if move.parks else None
                move.is_listed = index is None or index.is_safe

    async def _try(
        self, queue: str, publisher: Publisher, moves: Sequence[Move], copies: dict[Move, Copy]
    ) -> BrokerError | None:
        """Publish copies of moves; those that are not taken get a copy for a wait queue."""
        try:
            await publisher.publish([copies[move] for move in moves])
        except BrokerError as error:
            for move in moves:
                copy = copies[move]
                move.elsewhere = not copy.is_safe
                if move.elsewhere:
                    # The first copy may be there all the same.
                    identity = str(copy.properties.message_id)
                    publisher.note_repeated(identity)
                    copies[move] = await self._moved_copy(queue, move, identity)
            return error
        return None

    def _say_not_aside(self, queue: str, error: str) -> None:
        if error != self._said:
            self._said = error
            log.error(
                "what cannot be read of the queue %s waits in %s, and is tried again after"
                " %d seconds: %s",
                queue,
                self._queues.topology.wait(queue, ASIDE_SECONDS)[0],
                ASIDE_SECONDS,
                error,
            )

    async def _moved_copy(self, queue: str, move: Move, identity: str = "") -> Copy:
        queues = self._queues
        origin = move.origin
        if isinstance(origin, BrokerLease):
            body = await queues.encode(origin.restored(), again=True)
            priority, encoding = origin.priority, encoding_of(body)
        else:
            body, encoding = origin.body, origin.properties.content_encoding
            priority = origin.properties.priority or 0
        identity = identity or queues.publisher.identity()
        if move.reason is not None:
            assert isinstance(origin, Delivery)
            if not move.elsewhere:
                properties = beside(origin.properties, identity, f"{queue}: {move.reason}")
                return Copy(queues.place(DAMAGED_QUEUE), body, properties)
            place = queues.wait_place(queue, ASIDE_SECONDS)
            return Copy(place, body, beside(origin.properties, identity, move.reason))
        if move.due is not None:
            delay = move.due - queues.clock()
            return queues.copy_to(
                queue, body, delay, due=move.due, priority=priority, encoding=encoding
            )
        if move.elsewhere:
            return queues.copy_to(
                queue,
                body,
                queues.lots.wait_seconds(queue, move.key),
                due=None,
                priority=priority,
                encoding=encoding,
                identity=identity,
            )
        place = queues.parked_place(queue, move.key)
        return Copy(place, body, header(identity, priority=priority, encoding=encoding))

    def index_copy(self, queue: str, key: str) -> Copy:
        queues = self._queues
        body = encode_properties({"destination": key})
        return Copy(Place(*queues.topology.index(queue)), body, header(queues.publisher.identity()))
