"""A broker for tests that is away when a test says so: queue files behind a switch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from mailerq.config import Config
from mailerq.errors import MessageError, QueueError
from mailerq.message import Message
from mailerq.queues import (
    Consumer,
    Depth,
    Lease,
    Publication,
    Receiver,
    RemoteQueues,
    Settlement,
    Subscription,
)
from mailerq.queues.embedded.queues import EmbeddedQueues
from mailerq.queues.fallback.queues import FallbackQueues, Patience, open_fallback
from mailerq.queues.interface import Lost
from mailerq.queues.opening import open_embedded
from mailerq.queues.ownership import DirectoryLock

__all__ = ["QUICK", "StandIn", "both", "standin"]

QUICK = Patience(grace=0.02, steady=0.02)


class StandIn(RemoteQueues):
    """A broker whose troubles a test makes."""

    def __init__(self, queues: EmbeddedQueues) -> None:
        self.queues = queues
        self.on_trouble = []
        self.away: str | None = None
        self.refused: dict[str, QueueError | MessageError] = {}
        """What becomes of publications for some queues."""
        self.lost: list[str] = []
        """The identities of leases whose connection is lost."""
        self.recognised: list[str] = []
        self.published: list[list[Publication]] = []
        self.waiting = trio.Event()
        """Set while a publication waits for the broker."""
        self.before_confirm: Callable[[], Awaitable[None]] | None = None
        self._given_up = trio.Event()

    @property
    def trouble(self) -> str | None:
        return self.away

    def set_away(self, text: str | None) -> None:
        self.away = text
        self.give_up()  # what waits looks again
        for callback in self.on_trouble:
            callback()

    def give_up(self) -> None:
        self._given_up.set()
        self._given_up = trio.Event()

    async def publish(self, publications: Sequence[Publication], *, again: bool = False) -> None:
        for publication in publications:
            self.check(publication)
        for publication in publications:
            if (error := self.refused.get(publication.queue)) is not None:
                raise error
        while self.away is not None:
            self.waiting.set()
            await self._given_up.wait()
            if self.away is not None:
                raise QueueError(self.away)
        if self.before_confirm is not None:
            await self.before_confirm()
        await self.queues.publish(publications)
        self.published.append(list(publications))

    async def settle(
        self, settlements: Sequence[Settlement], publish: Callable[[Lost], Awaitable[None]]
    ) -> None:
        for settlement in settlements:
            self.queues._check_lease(settlement.lease)  # type: ignore[arg-type]
        await publish(lambda: self.lost)
        await self.queues.ack([Settlement(settlement.lease) for settlement in settlements])

    async def ack(self, settlements: Sequence[Settlement]) -> None:
        raise NotImplementedError

    def recognise(self, identities: Collection[str]) -> None:
        self.recognised += identities

    def configure(self, config: Config) -> None:
        self.queues.configure(config)

    def check(self, publication: Publication) -> None:
        self.queues.check(publication)

    def release(self, lease: Lease) -> None:
        self.queues.release(lease)

    def consume(self, queue: str, *, prefetch: int) -> AbstractAsyncContextManager[Consumer]:
        return self.queues.consume(queue, prefetch=prefetch)

    def subscribe(
        self, queue: str, receiver: Receiver, *, prefetch: int, window: int
    ) -> AbstractAsyncContextManager[Subscription]:
        return self.queues.subscribe(queue, receiver, prefetch=prefetch, window=window)

    async def depths(self) -> list[Depth]:
        return await self.queues.depths()

    async def purge(self, queue: str) -> int:
        return await self.queues.purge(queue)

    async def read_head(
        self,
        queue: str,
        limit: int,
        show: Callable[[Sequence[Message]], None],
        *,
        remove: bool = False,
    ) -> None:
        raise NotImplementedError

    def wake(self, *, everything: bool = False) -> None:
        self.queues.wake(everything=everything)

    def statistics(self) -> dict[str, Any]:
        return {"leased": {}}


@asynccontextmanager
async def standin(directory: Path) -> AsyncIterator[StandIn]:
    async with open_embedded(str(directory / "broker")) as queues:
        yield StandIn(queues)


@asynccontextmanager
async def both(
    broker: RemoteQueues,
    directory: Path,
    *,
    limit: int = 10_000_000,
    patience: Patience = QUICK,
    share: int = 0,
    processes: int = 1,
) -> AsyncIterator[FallbackQueues]:
    """A broker with a reserve."""

    def open_reserve(path: str, lock: DirectoryLock) -> AbstractAsyncContextManager[EmbeddedQueues]:
        return open_embedded(path, outbox="", lock=lock)

    root = str(directory / "fallback")
    async with open_fallback(
        broker, open_reserve, root, limit=limit, share=share, processes=processes, patience=patience
    ) as queues:
        yield queues
