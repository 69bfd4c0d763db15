"""The exchange of a cluster on a real broker: copies for all, and locks for one."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.connection import BrokerError
from mailerq.queues.rabbitmq.exchange import Exchange
from tests.queues.rabbitmq.kit import Broker, channel_to
from tests.support import DEADLINE, in_thread


class Heard:
    """An exchange under test, and what came from it."""

    def __init__(self, address: Address, name: str) -> None:
        self.link = Exchange(
            [address], "cluster", clock=time.monotonic_ns, name=name, first_pause=0.02
        )
        self.documents: list[bytes] = []
        self.answered: list[int] = []
        self.lost: list[str] = []
        self.unlocked: list[str] = []
        self._news = trio.Event()
        self.link.on_document = self.documents.append
        self.link.on_answered = self.answered.append
        self.link.on_lost = self.lost.append
        self.link.on_unlocked = self.unlocked.append

    async def until_open(self) -> None:
        with trio.fail_after(DEADLINE):
            while not self.link.is_open:  # noqa: ASYNC110
                await trio.sleep(0.01)

    async def until_heard(self, count: int) -> list[bytes]:
        with trio.fail_after(DEADLINE):
            while len(self.documents) < count:  # noqa: ASYNC110
                await trio.sleep(0.01)
        return self.documents


@asynccontextmanager
async def heard(*addresses: Address) -> AsyncIterator[list[Heard]]:
    found = [Heard(address, f"test{number}") for number, address in enumerate(addresses)]
    async with trio.open_nursery() as nursery:
        for each in found:
            nursery.start_soon(each.link.run)
            await each.until_open()
        yield found
        nursery.cancel_scope.cancel()


async def test_a_document_reaches_all_that_are_connected_and_its_sender(vhost: Address) -> None:
    async with heard(vhost, vhost, vhost) as (first, second, third):
        before = time.monotonic_ns()
        assert first.link.publish(b"hello")
        for each in (first, second, third):
            assert await each.until_heard(1) == [b"hello"]
        with trio.fail_after(DEADLINE):
            while not first.answered:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert before <= first.answered[0] <= time.monotonic_ns()
        assert not second.answered


async def test_a_document_can_go_to_one_and_to_one_that_is_gone(vhost: Address) -> None:
    async with heard(vhost, vhost) as (first, second):
        assert first.link.publish(b"for one", second.link.queue)
        assert first.link.publish(b"for nobody", "amq.gen-gone")
        assert first.link.publish(b"for all")
        assert await second.until_heard(2) == [b"for one", b"for all"]
        assert await first.until_heard(1) == [b"for all"]


async def test_a_lock_belongs_to_one_connection_until_that_ends(vhost: Address) -> None:
    async with heard(vhost, vhost) as (first, second):
        assert await first.link.lock("192.0.2.1")
        assert not await second.link.lock("192.0.2.1")
        assert await second.link.lock("2001:db8::1")
        await first.link.unlock("192.0.2.1")
        assert await second.link.lock("192.0.2.1")
        assert await second.link.lock("192.0.2.1")  # again, which changes nothing
        assert not second.unlocked
    async with heard(vhost) as (third,):
        assert await third.link.lock("192.0.2.1")


async def test_a_lost_connection_gives_its_locks_away_and_comes_back(
    broker: Broker, vhost: Address
) -> None:
    async with heard(vhost, vhost) as (first, second):
        assert await first.link.lock("x")
        queue = first.link.queue
        await in_thread(broker.close_connections)
        with trio.fail_after(DEADLINE):
            while not (first.lost and second.lost):  # noqa: ASYNC110
                await trio.sleep(0.01)
        await first.until_open()
        await second.until_open()
        assert first.link.queue != queue
        assert await second.link.lock("x")
        assert not await first.link.lock("x")


async def test_the_end_of_a_lock_by_an_operator_is_heard(broker: Broker, vhost: Address) -> None:
    async with heard(vhost) as (first,):
        assert await first.link.lock("x")
        name = f'rabbit_misc:r(<<"{vhost.vhost}">>, queue, <<"cluster.lock.x">>)'
        await in_thread(
            broker.call,
            f"{{ok, Q}} = rabbit_amqqueue:lookup({name}), "
            'rabbit_amqqueue:delete(Q, false, false, <<"test">>)',
        )
        with trio.fail_after(DEADLINE):
            while not first.unlocked:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert first.unlocked == ["x"]


async def test_nothing_is_sent_without_a_connection(vhost: Address) -> None:
    each = Heard(vhost._replace(port=1), "test")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(each.link.run)
        with trio.fail_after(DEADLINE):
            while len(each.lost) < 2:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert not each.link.publish(b"x")
        with pytest.raises(BrokerError):
            await each.link.lock("x")
        nursery.cancel_scope.cancel()


async def test_the_queues_of_instances_are_gone_with_them(broker: Broker, vhost: Address) -> None:
    async with heard(vhost) as (first,):
        queue = first.link.queue
        assert await first.link.lock("x")
    async with channel_to(vhost) as channel:
        with pytest.raises(BrokerError, match="404"):
            await channel.declare(queue, passive=True)
