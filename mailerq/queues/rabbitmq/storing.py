"""Move bodies out of the messages for a broker: a storage has the body, and the message a ``key``.

A body is in the storage before the message that names it is published, so a message that is
confirmed is whole. A crash between the two leaves a body that nobody names, until that expires.

A body that the storage cannot take now stays in its message, if that is not too large for a broker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, Self

import msgspec
import trio

from mailerq.config import Config
from mailerq.errors import StorageError
from mailerq.message import Message, format_time
from mailerq.queues.interface import DAMAGED_QUEUE, Publication
from mailerq.rules.retry import expires_at, not_before

__all__ = ["BodyStorage", "Storing", "Terms"]

INSIDE_BYTES: Final = 8 << 20
"""A body that a broker takes in any case: RabbitMQ takes 16 MiB, and JSON escapes some bytes."""

OTHERS_SECONDS: Final = 30 * 86400.0
"""How long bodies are kept at least for queues that other programs read, nobody knows when."""

LONGEST_SECONDS: Final = 400 * 86400.0
"""A message may ask to be tried until the year 9999."""


class BodyStorage(Protocol):
    """What this needs of `mailerq.storage.Storage`."""

    async def put(self, body: bytes, until: float) -> str:
        """Store a body; return its key. Raises `StorageError`."""


@dataclass(slots=True, frozen=True)
class Terms:
    """The settings: which bodies to store, and for how long."""

    policy: str
    max_body: int
    max_delivertime: float
    ttl: float
    outbox: str

    @classmethod
    def of(cls, config: Config) -> Self:
        return cls(
            policy=config.storage_policy,
            max_body=config.rabbitmq_maxbody,
            max_delivertime=config.max_delivertime,
            ttl=config.storage_ttl,
            outbox=config.rabbitmq_outbox,
        )

    def wants(self, publication: Publication) -> bool:
        """Whether the body of a publication goes to the storage.

        A message with results has been tried, and others bring mail in.
        """
        body = publication.message.body
        if body is None or self.policy == "none":
            return False
        if publication.queue == DAMAGED_QUEUE:
            return len(body) > INSIDE_BYTES  # people look into that queue, at any time
        if len(body) > self.max_body or self.policy == "all":
            return True
        tried = bool(publication.message.properties.get("results"))
        if self.policy == "in":
            return not tried
        return tried and publication.queue == self.outbox

    def first_due(self, publication: Publication, now: float) -> float:
        """When a message of the outbox is to be tried first, or next."""
        wanted = not_before(publication.message.properties, now=now) or now
        return max(now, wanted, publication.due or now)

    def until(self, publication: Publication, now: float) -> float:
        """How long the body of a publication may be needed, seconds since 1970."""
        first = self.first_due(publication, now)
        expires = expires_at(
            publication.message.properties, now=first, max_delivertime=self.max_delivertime
        )
        if publication.queue != self.outbox:
            expires = max(expires, now + OTHERS_SECONDS)
        return min(max(expires, now) + self.ttl, now + LONGEST_SECONDS)


class Storing:
    """Stores the bodies of publications."""

    def __init__(self, storage: BodyStorage, terms: Terms) -> None:
        self.terms = terms
        self._storage = storage

    def without_body(self, publication: Publication) -> Publication:
        """What a publication is like without a body that will be stored, to check the rest."""
        if not self.terms.wants(publication):
            return publication
        return self._named(publication, "x" * 64, 0.0)

    async def store(self, publications: Sequence[Publication], *, now: float) -> list[Publication]:
        """Store bodies as the settings say; return the publications to make.

        A body that several messages share is stored once. Raises `StorageError` if a large body
        cannot be stored now.
        """
        result = list(publications)
        shared: dict[int, list[int]] = {}
        for index, publication in enumerate(publications):
            if self.terms.wants(publication):
                shared.setdefault(id(publication.message.body), []).append(index)
        if not shared:
            return result
        errors: list[StorageError] = []

        async def put(indices: list[int]) -> None:
            body = publications[indices[0]].message.body
            assert body is not None, "there is a body to store"
            until = max(self.terms.until(publications[index], now) for index in indices)
            try:
                key = await self._storage.put(body, until)
            except StorageError as error:
                if len(body) > INSIDE_BYTES:
                    errors.append(error)
                return
            for index in indices:
                result[index] = self._named(publications[index], key, now)

        if len(shared) == 1:
            await put(next(iter(shared.values())))
        else:
            # Bodies that come together are written together.
            async with trio.open_nursery() as nursery:
                for indices in shared.values():
                    nursery.start_soon(put, indices)
        if errors:
            raise errors[0]
        return result

    def _named(self, publication: Publication, key: str, now: float) -> Publication:
        """A publication that names its body."""
        properties = {**publication.message.properties, "key": key}
        if publication.queue == self.terms.outbox:
            # The time of the mail runs from here on, wherever it waits, and so does that of its
            # body.
            properties.setdefault("seen", format_time(self.terms.first_due(publication, now)))
        message = Message(properties, None, publication.message.local)
        return msgspec.structs.replace(publication, message=message)
