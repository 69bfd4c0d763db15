"""A connection that is kept open over the failures of real brokers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pika
import pytest
import trio

from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.connection import BrokerError, connect
from mailerq.queues.rabbitmq.keeper import Keeper, State
from tests.queues.rabbitmq.fake import fake_broker
from tests.queues.rabbitmq.kit import Broker
from tests.support import DEADLINE


class Kept:
    """A keeper under test, and the states that it went through."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.states: list[State] = []
        self._news = trio.Event()
        keeper.on_change.append(self._changed)

    def _changed(self, state: State) -> None:
        self.states.append(state)
        self._news.set()
        self._news = trio.Event()

    async def until(self, condition: Callable[[State], bool]) -> None:
        with trio.fail_after(DEADLINE):
            while not condition(self.keeper.state):
                await self._news.wait()


@asynccontextmanager
async def kept(addresses: Sequence[Address]) -> AsyncIterator[Kept]:
    each = Kept(Keeper(addresses, name="test", first_pause=0.01))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(each.keeper.run)
        yield each
        nursery.cancel_scope.cancel()
    assert each.keeper.state.kind == "closed"


async def test_a_real_broker_is_known_by_its_version(vhost: Address) -> None:
    async with kept([vhost]) as each:
        with trio.fail_after(DEADLINE):
            connection = await each.keeper.connection()
        assert connection.version >= (3, 8)
        assert "RabbitMQ" in each.keeper.state.text
        assert each.keeper.open is connection


async def test_wrong_logins_and_vhosts_have_a_message(vhost: Address) -> None:
    cases = (
        (vhost._replace(password="wrong"), "refuses user 'mailerq'"),
        (vhost._replace(vhost="nowhere"), "has no vhost 'nowhere'"),
        (vhost._replace(port=1), "Connection refused"),
        (vhost._replace(tls=True), "does it expect amqp"),
    )
    for address, text in cases:
        with pytest.raises(BrokerError, match=text):
            async with connect(address):
                raise AssertionError


async def test_a_closed_connection_is_opened_again(broker: Broker, vhost: Address) -> None:
    async with kept([vhost]) as each:
        await each.until(lambda state: state.kind == "open")
        broker.close_connections("maintenance")
        await each.until(lambda state: state.kind == "lost")
        assert "maintenance" in each.keeper.state.text
        await each.until(lambda state: state.kind == "open")
        assert each.keeper.connections == 2


async def test_an_alarm_is_a_state_and_passes(broker: Broker, vhost: Address) -> None:
    async with kept([vhost]) as each:
        with trio.fail_after(DEADLINE):
            connection = await each.keeper.connection()
            channel = await connection.channel()
            await channel.declare("q")
        broker.alarm(True)
        try:
            # A broker tells the connections that publish.
            channel.publish("", "q", b"x", pika.BasicProperties())
            await each.until(lambda state: state.kind == "blocked")
            assert "takes no publications: low on memory" in each.keeper.state.text
        finally:
            broker.alarm(False)
        await each.until(lambda state: state.kind == "open")
        assert each.keeper.open is connection


async def test_the_next_broker_takes_over() -> None:
    async with (
        fake_broker() as first,
        fake_broker() as second,
        kept([first.address, second.address]) as each,
    ):
        await each.until(lambda state: state.kind == "open")
        assert str(first.address) in each.keeper.state.text
        await first.peers[0].stream.aclose()
        await each.until(lambda state: str(second.address) in state.text)
        await each.until(lambda state: state.kind == "open")


async def test_a_broker_that_stays_away_is_reported_once(
    caplog: pytest.LogCaptureFixture, vhost: Address
) -> None:
    caplog.set_level("INFO")
    async with kept([vhost._replace(port=1)]) as each:
        await each.until(lambda state: len(each.states) >= 4)
    lost = [record for record in caplog.records if "Connection refused" in record.message]
    assert len(lost) == 1


async def test_a_broker_that_restarts_is_found_again(broker: Broker, vhost: Address) -> None:
    async with kept([vhost]) as each:
        await each.until(lambda state: state.kind == "open")
        await trio.to_thread.run_sync(broker.restart)
        await each.until(lambda state: each.keeper.connections >= 2 and state.kind == "open")
        assert "lost" in {state.kind for state in each.states}


async def test_each_of_several_brokers_that_stay_away_is_reported_once(
    caplog: pytest.LogCaptureFixture, vhost: Address
) -> None:
    caplog.set_level("INFO")
    async with kept([vhost._replace(port=1), vhost._replace(port=2)]) as each:
        await each.until(lambda state: len(each.states) >= 8)
    assert sum("Connection refused" in record.message for record in caplog.records) == 2
