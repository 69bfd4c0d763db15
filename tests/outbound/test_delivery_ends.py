"""Deliveries that are cancelled: the stop that comes later, and sessions that end later."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from tests.outbound import kit
from tests.outbound.kit import PeerConnection, StubPlugins, StubResolver, open_bench
from tests.outbound.memory_queues import MemoryQueues


class SlowQueues(MemoryQueues):
    """Queues that need a while to end a subscription, whose leases have gone back by then."""

    may_end: trio.Event

    @asynccontextmanager
    async def subscribe(self, *args: Any, **options: Any) -> AsyncIterator[Any]:
        try:
            async with super().subscribe(*args, **options) as subscription:
                yield subscription
        finally:
            with trio.CancelScope(shield=True):
                await self.may_end.wait()


class SlowResolver(StubResolver):
    async def mail_hosts(self, domain: str) -> Any:
        await trio.sleep_forever()


async def test_a_stop_gives_nothing_back_that_the_queue_has_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    SlowQueues.may_end = trio.Event()
    monkeypatch.setattr(kit, "MemoryQueues", SlowQueues)
    async with open_bench(resolver=SlowResolver()) as bench:
        try:
            bench.send()
            await bench.until(lambda _: bench.dispatcher.looked_up == 1)
            bench.dispatcher._nursery.cancel_scope.cancel()
            await bench.queues.until(lambda queues: not queues.leased)
            await bench.dispatcher.stop(0)
        finally:
            SlowQueues.may_end.set()
        assert len(bench.queues["outbox"]) == 1


async def test_mail_that_comes_while_the_last_session_ends_stays_in_the_queue() -> None:
    closes, may_close = trio.Event(), trio.Event()

    class SlowPlugins(StubPlugins):
        async def close(self) -> None:
            closes.set()
            await may_close.wait()

    async def silent(peer: PeerConnection) -> None:
        await peer.hello()
        await peer.line()
        await trio.sleep_forever()

    resolver = StubResolver()
    async with open_bench(silent, plugins=SlowPlugins(), resolver=resolver) as bench:
        try:
            bench.send(smarthost={"hostname": "127.0.0.1", "port": bench.port})
            await bench.queues.until(lambda _: len(bench.peer.commands) == 2)
            bench.dispatcher._nursery.cancel_scope.cancel()
            await closes.wait()
            await trio.testing.wait_all_tasks_blocked()
            bench.send("c@other.test")
            await trio.testing.wait_all_tasks_blocked()
        finally:
            may_close.set()
        await bench.dispatcher.stop(0)
        await bench.queues.until(lambda queues: not queues.leased)
        assert len(bench.queues["outbox"]) == 2
