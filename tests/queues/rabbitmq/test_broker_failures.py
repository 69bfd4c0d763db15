"""What becomes of mail when a real broker goes, comes back, or is short of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import trio

from mailerq.errors import QueueError
from mailerq.message import Message
from mailerq.queues import Depth, Publication, Settlement
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.connection import Channel, Declared
from mailerq.queues.rabbitmq.keeper import State
from mailerq.queues.rabbitmq.queues import Options, RabbitQueues, open_rabbitmq
from mailerq.queues.rabbitmq.topology import QueueType
from tests.queues.contract import Recorder, gather, mail, receive, tag_of
from tests.queues.rabbitmq.kit import Broker, channel_to, send
from tests.support import DEADLINE

CLASSIC = Options(queue_type="classic", first_pause_seconds=0.02)
QUORUM = Options(queue_type="quorum", first_pause_seconds=0.02)
TYPES: list[QueueType] = ["classic", "quorum"]


async def until(queues: RabbitQueues, condition: Callable[[State], bool]) -> None:
    """Wait for a state of the connection that publishes."""
    changed = trio.Event()
    queues.publishing.on_change.append(lambda state: changed.set())
    with trio.fail_after(DEADLINE):
        while not condition(queues.publishing.state):
            await changed.wait()
            changed = trio.Event()


@pytest.mark.parametrize("queue_type", TYPES)
async def test_leases_outlive_a_restart_and_nothing_comes_twice(
    broker: Broker, vhost: Address, queue_type: QueueType
) -> None:
    options = Options(queue_type=queue_type, first_pause_seconds=0.02)
    recorder = Recorder()
    async with (
        open_rabbitmq([vhost], options) as queues,
        queues.subscribe("outbox", recorder, prefetch=20, window=2) as subscription,
    ):
        await queues.publish([mail(tag, f"d{tag}.test") for tag in range(4)])
        await queues.publish([mail(10 + tag, "full.test") for tag in range(5)])
        await recorder.until(lambda recorder: len(recorder.leases) == 6 and bool(recorder.told))
        first = list(recorder.leases)
        recorder.leases.clear()
        parked = await gather(subscription, recorder, "full.test", 1)
        await trio.to_thread.run_sync(broker.restart)
        # One half is settled before the broker has delivered it again, one half after.
        document = Publication("results", Message({"tag": 99}))
        await queues.ack([Settlement(lease, [document]) for lease in first[:3]])
        await queues.publish([mail(50, "late.test")])
        await recorder.until(lambda recorder: recorder.tags == [50])
        await queues.ack([Settlement(lease) for lease in (*first[3:], *parked)])
        rest = await gather(subscription, recorder, "full.test", 2)
        assert sorted(map(tag_of, (*first, *parked, *rest))) == [0, 1, 2, 3, 10, 11, 12, 13, 14]
        await queues.ack([Settlement(lease) for lease in (*rest, *recorder.leases)])
        with trio.fail_after(DEADLINE):
            while (depths := await queues.depths())[0].total:
                assert (await subscription.take("full.test", 9)).leases == []
        assert depths == [Depth("outbox", 0, 0), Depth("results", 3, 0)]
        assert recorder.tags == [50]


@pytest.mark.soak
async def test_what_was_confirmed_outlives_a_kill(broker: Broker, vhost: Address) -> None:
    async with open_rabbitmq([vhost], QUORUM) as queues:
        await queues.publish([mail(tag) for tag in range(50)])
        await queues.publish([mail(50, due=time.time() + 1000)])
        # RabbitMQ 3.10 forgets a queue that was declared just before, see docs/rabbitmq.md.
        await trio.sleep(6)
        await trio.to_thread.run_sync(broker.kill)
        await trio.to_thread.run_sync(broker.start)
        async with queues.consume("outbox", prefetch=99) as consumer:
            leases = await receive(consumer, 50)
        assert sorted(map(tag_of, leases)) == list(range(50))
        with trio.fail_after(DEADLINE):
            while await queues.depths() != [Depth("outbox", 50, 1)]:
                pass  # a quorum queue does not count at once what came back


async def test_without_a_broker_a_publication_fails_in_time() -> None:
    options = Options(publish_seconds=0.2, first_pause_seconds=0.02)
    async with open_rabbitmq([Address("127.0.0.1", 1)], options) as queues:
        await until(queues, lambda state: "Connection refused" in state.text)
        with pytest.raises(QueueError, match="Connection refused"):
            await queues.publish([mail(1)])
        async with queues.subscribe("outbox", Recorder(), prefetch=1, window=1) as subscription:
            assert (await subscription.take("a.test", 1)).leases == []
    with pytest.raises(QueueError, match="closed"):
        await queues.publish([mail(1)])


async def test_a_publication_waits_for_a_broker_that_is_short_of_memory(
    broker: Broker, vhost: Address
) -> None:
    recorder = Recorder()
    async with (
        open_rabbitmq([vhost], CLASSIC) as queues,
        queues.subscribe("outbox", recorder, prefetch=9, window=9),
        trio.open_nursery() as nursery,
    ):
        await queues.publish([mail(1)])
        await recorder.until(lambda recorder: recorder.tags == [1])
        broker.alarm(True)
        try:
            nursery.start_soon(queues.publish, [mail(2)])
            await until(queues, lambda state: state.kind == "blocked")
            await queues.ack([Settlement(recorder.leases[0])])  # still works
            assert queues.states[0].text.endswith("low on memory")
        finally:
            broker.alarm(False)
        await recorder.until(lambda recorder: recorder.tags == [1, 2])
        assert queues.publishing.connections == 1


async def test_a_blocked_broker_fails_a_publication_in_time(broker: Broker, vhost: Address) -> None:
    async with open_rabbitmq([vhost], Options(queue_type="classic")) as queues:
        await queues.publish([mail(1)])
        broker.alarm(True)
        queues.publisher._seconds = 0.5
        try:
            with pytest.raises(QueueError, match="not confirmed within"):
                await queues.publish([mail(2)])
        finally:
            queues.publisher._seconds = DEADLINE
            broker.alarm(False)
        await queues.publish([mail(3)])


@pytest.mark.soak
async def test_a_broker_that_lost_everything_is_used_again(broker: Broker) -> None:
    address = broker.vhost()
    recorder = Recorder()
    async with (
        open_rabbitmq([address], CLASSIC) as queues,
        queues.subscribe("outbox", recorder, prefetch=9, window=1) as subscription,
    ):
        await queues.publish([mail(1), mail(2)])
        await recorder.until(lambda recorder: recorder.tags == [1] and bool(recorder.told))
        await trio.to_thread.run_sync(broker.stop)
        broker.wipe()
        await trio.to_thread.run_sync(broker.start)
        await until(queues, lambda state: f"no vhost '{address.vhost}'" in state.text)
        broker.add_vhost(address.vhost)
        await until(queues, lambda state: state.kind == "open")
        await queues.ack([Settlement(recorder.leases[0])])
        await queues.publish([mail(3, "b.test")])
        await recorder.until(lambda recorder: recorder.tags == [1, 3])
        with trio.fail_after(DEADLINE):
            while (await subscription.take("a.test", 1)).more:
                pass
    broker.drop_vhost(address)


async def test_a_connection_lost_while_a_queue_is_declared_keeps_no_mail_back(
    broker: Broker, vhost: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare, declared = Channel.declare, 0

    async def lose_first(channel: Channel, queue: str, **more: Any) -> Declared:
        nonlocal declared
        declared += queue == "outbox"
        if declared == 1:
            await trio.to_thread.run_sync(broker.close_connections)
        return await declare(channel, queue, **more)

    async with open_rabbitmq([vhost], CLASSIC) as queues:
        monkeypatch.setattr(Channel, "declare", lose_first)
        await queues.publish([mail(1)])
        assert declared >= 2
        assert await queues.depths() == [Depth("outbox", 1, 0)]


@pytest.mark.parametrize("queue_type", TYPES)
async def test_nothing_is_lost_over_many_losses_of_the_connections(
    broker: Broker, vhost: Address, queue_type: QueueType
) -> None:
    options = Options(queue_type=queue_type, first_pause_seconds=0.01, hold_seconds=0.1)
    recorder = Recorder()
    settled: list[int] = []
    async with (
        open_rabbitmq([vhost], options) as queues,
        queues.subscribe("outbox", recorder, prefetch=10, window=3) as subscription,
        trio.open_nursery() as nursery,
    ):

        async def publish() -> None:
            for start in range(0, 120, 10):
                await queues.publish(
                    [mail(tag, f"d{tag % 4}.test") for tag in range(start, start + 10)]
                )

        async def disturb() -> None:
            for _ in range(4):
                await trio.sleep(0.3)  # anywhere in the work of the others
                await trio.to_thread.run_sync(broker.close_connections)

        nursery.start_soon(publish)
        nursery.start_soon(disturb)
        with trio.fail_after(DEADLINE):
            while len(set(settled)) < 120:
                leases = list(recorder.leases)
                recorder.leases.clear()
                for number in range(4):
                    try:
                        leases += (await subscription.take(f"d{number}.test", 3)).leases
                    except QueueError:
                        await trio.sleep(0.01)
                for at, lease in enumerate(leases):
                    if at % 5 == 4:
                        queues.release(lease)
                        continue
                    await queues.ack([Settlement(lease)])
                    settled.append(tag_of(lease))
                with trio.move_on_after(0.02):
                    await recorder.news.wait()
    assert set(settled) == set(range(120))


@pytest.mark.parametrize("queue_type", TYPES)
async def test_mail_whose_sender_uses_one_id_for_all_is_not_lost(
    broker: Broker, vhost: Address, queue_type: QueueType
) -> None:
    options = Options(queue_type=queue_type, first_pause_seconds=0.01)
    recorder = Recorder()
    settled: list[int] = []
    total = 8
    async with (
        open_rabbitmq([vhost], options) as queues,
        queues.subscribe("outbox", recorder, prefetch=50, window=50),
    ):
        await queues.publish([mail(0)])
        await recorder.until(lambda recorder: recorder.tags == [0])
        for tag in range(1, total):
            if tag % 3 == 0:
                # Some leases are settled before the connection ends, and some are still held.
                for lease in recorder.leases[1:]:
                    await queues.ack([Settlement(lease)])
                    settled.append(tag_of(lease))
                del recorder.leases[1:]
                await trio.to_thread.run_sync(broker.close_connections)
            async with channel_to(vhost) as channel:
                document = mail(tag).message.to_json()
                await send(channel, "outbox", document, message_id="campaign-7")
        with trio.fail_after(20):
            while len({0, *settled}) < total:
                for lease in recorder.leases[1:]:
                    await queues.ack([Settlement(lease)])
                    settled.append(tag_of(lease))
                del recorder.leases[1:]
                with trio.move_on_after(0.05):
                    await recorder.news.wait()
