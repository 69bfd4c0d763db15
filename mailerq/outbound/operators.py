"""Orders of operators to change waiting messages, which come by the control socket.

A request names up to `MAX_NUMBERS` messages of one share. Messages that only wait in memory go back
to the queue first, so the order reaches all but those that a session has in hand.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final, Protocol

import msgspec

from mailerq.address import queue_problem
from mailerq.config import Config
from mailerq.errors import MailerqError
from mailerq.ids import new_id
from mailerq.message import Message, Result
from mailerq.outbound.dispatcher import Dispatcher
from mailerq.queues import BrowsableQueues, Queues
from mailerq.rules.changes import Decide, Decision, Order
from mailerq.rules.destinations import place_of

__all__ = ["MAX_NUMBERS", "Delivery", "change"]

MAX_NUMBERS: Final = 2_000
"""Messages in one request."""


class Delivery(Protocol):
    """An open share, and the dispatcher that empties its outbox."""

    @property
    def queues(self) -> Queues: ...
    @property
    def dispatcher(self) -> Dispatcher: ...


class _Request(msgspec.Struct):
    share: int
    queue: str
    numbers: list[int]
    order: Order


async def change(
    deliveries: Mapping[int, Delivery], config: Config, request: Mapping[str, Any]
) -> dict[str, Any]:
    """Carry out an order. Raises `MailerqError`.

    The reply has the numbers of messages ``done`` and ``leased``; it is empty if this process does
    not deliver from that share.
    """
    try:
        wanted = msgspec.convert(request, _Request)
    except msgspec.ValidationError as error:
        raise MailerqError(f"the request is not valid: {error}") from None
    if len(wanted.numbers) > MAX_NUMBERS:
        raise MailerqError(f"numbers: expected at most {MAX_NUMBERS}")
    target = wanted.order.to_queue
    if target and (problem := queue_problem(target)) is not None:
        raise MailerqError(f"to_queue: the name {problem}")
    delivery = deliveries.get(wanted.share)
    if delivery is None:
        return {}
    queues, dispatcher = delivery.queues, delivery.dispatcher
    if not isinstance(queues, BrowsableQueues):
        raise MailerqError("messages in this queue cannot be changed")
    finished: list[tuple[Message, Result]] = []
    action = wanted.order.change(
        wanted.queue,
        config,
        now=time.time(),
        finished=lambda message, result: finished.append((message, result)),
        reports=dispatcher.reports,
        next_id=new_id,
    )
    destinations: set[str] = set()
    if wanted.order.action == "retry" and callable(action):
        action = _noting(action, destinations)
    recall = dispatcher.recall if wanted.queue == config.rabbitmq_outbox else None
    done = await queues.change(wanted.queue, wanted.numbers, action, recall=recall)
    dispatcher.gave_up(finished)
    if destinations:
        dispatcher.try_now(destinations)
    return {"done": done.done, "leased": done.leased}


def _noting(decide: Decide, destinations: set[str]) -> Decide:
    """The same decisions; notes the destinations of the messages that change."""

    def noting(message: Message) -> Decision | None:
        decision = decide(message)
        if decision is not None:
            destinations.add(place_of(message.properties).destination)
        return decision

    return noting
