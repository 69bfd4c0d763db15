"""A full window of unacknowledged mail comes back after a lost connection, and none goes twice."""

from __future__ import annotations

from collections import Counter

import pytest
import trio

from mailerq.message import Message
from mailerq.queues import Depth, Lease, Publication, Settlement
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.connection import Channel, Delivery
from mailerq.queues.rabbitmq.queues import Options, RabbitQueues, open_rabbitmq
from mailerq.queues.rabbitmq.takers import Taker
from mailerq.queues.rabbitmq.topology import QueueType
from tests.queues.contract import Recorder, mail, receive, tag_of
from tests.queues.rabbitmq.kit import Broker
from tests.support import until, until_found

COUNT = 1000
DOMAINS = 50
CLASSIC = Options(queue_type="classic", first_pause_seconds=0.02)
QUORUM = Options(queue_type="quorum", first_pause_seconds=0.02)


@pytest.fixture
def redelivered(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """How many deliveries came, by whether the broker flags them as redelivered."""
    counts: Counter[bool] = Counter()
    came = Taker.came

    def counted(taker: Taker, delivery: Delivery) -> bool:
        counts[delivery.redelivered] += 1
        return came(taker, delivery)

    monkeypatch.setattr(Taker, "came", counted)
    return counts


def results(leases: list[Lease]) -> list[Settlement]:
    """What settles mail that was delivered."""
    return [
        Settlement(lease, [Publication("results", Message({"tag": tag_of(lease)}))])
        for lease in leases
    ]


async def empties(queues: RabbitQueues) -> None:
    """Wait until the broker has no mail left."""
    await until_found(queues.depths, lambda found: Depth("outbox", 0, 0) in found)


@pytest.mark.parametrize(
    ("queue_type", "settled"), [("classic", 0), ("quorum", 400), ("classic", COUNT)]
)
async def test_a_subscription_joins_a_thousand_redelivered_messages_with_their_leases(
    vhost: Address, queue_type: QueueType, settled: int, redelivered: Counter[bool]
) -> None:
    """Some are settled while there is no connection, the others after the redelivery."""
    recorder = Recorder()
    async with (
        open_rabbitmq([vhost], CLASSIC if queue_type == "classic" else QUORUM) as queues,
        queues.subscribe("outbox", recorder, prefetch=COUNT, window=COUNT),
    ):
        await queues.publish([mail(tag, f"d{tag % DOMAINS}.test") for tag in range(COUNT)])
        await recorder.until(lambda recorder: len(recorder.leases) == COUNT)
        leases = list(recorder.leases)
        assert redelivered == {False: COUNT}
        connection = queues.consuming.open
        assert connection is not None
        connection.abort("cut by the test")
        if settled:
            await queues.ack([Settlement(lease) for lease in leases[:settled]])
        assert len(queues.held) == COUNT - settled
        assert redelivered == {False: COUNT}
        await until(lambda: redelivered[True] == COUNT)
        await until(lambda: not any(lease.is_stale for lease in queues.held.values()))
        assert len(queues.held) == COUNT - settled
        await queues.ack([Settlement(lease) for lease in leases[settled:]])
        await queues.publish([mail(COUNT, "new.test")])
        await recorder.until(lambda recorder: recorder.tags[COUNT:] == [COUNT])
        await queues.ack([Settlement(recorder.leases[-1])])
        await empties(queues)
    assert sorted(recorder.tags) == list(range(COUNT + 1))
    assert redelivered == {False: COUNT + 1, True: COUNT}


async def test_a_consumer_with_a_thousand_redelivered_messages_hands_out_none_twice(
    broker: Broker, vhost: Address, redelivered: Counter[bool]
) -> None:
    async with (
        open_rabbitmq([vhost], QUORUM) as queues,
        queues.consume("outbox", prefetch=COUNT) as consumer,
    ):
        await queues.publish([mail(tag) for tag in range(COUNT)])
        leases = await receive(consumer, COUNT)
        await trio.to_thread.run_sync(broker.close_connections)
        await queues.ack(results(leases[:400]))
        await until(lambda: redelivered[True] == COUNT)
        await queues.ack(results(leases[400:]))
        await queues.publish([mail(COUNT)])
        (new,) = await receive(consumer, 1)
        assert tag_of(new) == COUNT
        await queues.ack([Settlement(new)])
        await empties(queues)
    assert sorted(map(tag_of, leases)) == list(range(COUNT))


async def test_what_was_delivered_and_not_acknowledged_in_time_does_not_come_again(
    vhost: Address, monkeypatch: pytest.MonkeyPatch, redelivered: Counter[bool]
) -> None:
    """The acknowledgements of a thousand messages are lost with the connection."""
    async with (
        open_rabbitmq([vhost], CLASSIC) as queues,
        queues.consume("outbox", prefetch=COUNT) as consumer,
    ):
        await queues.publish([mail(tag) for tag in range(COUNT)])
        leases = await receive(consumer, COUNT)
        with monkeypatch.context() as lossy:
            lossy.setattr(Channel, "ack", lambda channel, tag: None)
            await queues.ack(results(leases))
            connection = queues.consuming.open
            assert connection is not None
            connection.abort("cut by the test")
        await until(lambda: redelivered[True] == COUNT)
        await queues.publish([mail(COUNT)])
        (new,) = await receive(consumer, 1)
        assert tag_of(new) == COUNT
        await queues.ack([Settlement(new)])
        await empties(queues)
