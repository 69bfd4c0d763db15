"""Quorum queues without a leader do not answer, and newly declared ones may be lost with a kill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import trio

from mailerq.errors import QueueError
from mailerq.message import Message
from mailerq.queues import Depth, Publication, Settlement
from mailerq.queues.rabbitmq import parking, publisher
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.queues import Options, RabbitQueues, open_rabbitmq
from mailerq.queues.rabbitmq.subscription import BrokerSubscription
from mailerq.queues.rabbitmq.upkeep import ready
from tests.queues.contract import Recorder, gather, mail, tag_of
from tests.queues.rabbitmq.kit import Broker, channel_to
from tests.support import DEADLINE, until

QUICK = Options(first_pause_seconds=0.02, hold_seconds=0.05, publish_seconds=1.0)


@contextmanager
def silent(broker: Broker, vhost: Address, queue: str) -> Iterator[None]:
    """Suspend the process of a quorum queue, as if it had no leader."""
    name = f"'{vhost.vhost}_{queue}'"
    broker.call(f"sys:suspend({name})")
    try:
        yield
    finally:
        broker.call(f"sys:resume({name})")


async def test_a_queue_that_does_not_answer_keeps_up_no_other(
    broker: Broker, vhost: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_rabbitmq([vhost], replace(QUICK, publish_seconds=DEADLINE)) as queues:
        await queues.publish([Publication("results", Message({"tag": 1}))])
        queues.publisher._seconds = QUICK.publish_seconds
        with silent(broker, vhost, "results"):
            # After some hundred of them RabbitMQ does not read from the connection any more.
            with pytest.raises(QueueError, match="not confirmed within"):
                await queues.publish(
                    [mail(0), *[Publication("results", Message({"tag": 2}))] * 1000, mail(1)]
                )
            # Now it is alone, so it is known, once there is a new connection.
            with trio.fail_after(DEADLINE):
                while not queues.publisher.is_suspected("results"):
                    with pytest.raises(QueueError, match="not confirmed within"):
                        await queues.publish([Publication("results", Message({"tag": 2}))])
            # Whoever waited for the silent queue now would wait longer than the test.
            queues.publisher._seconds = 2 * DEADLINE
            for name in ("TRIAL_SECONDS", "ANSWER_SECONDS", "PROBE_SECONDS"):
                monkeypatch.setattr(publisher, name, 2 * DEADLINE)
            with trio.fail_after(DEADLINE):
                with pytest.raises(QueueError, match="'results' does not answer"):
                    await queues.publish([Publication("results", Message({"tag": 3}))])
                await queues.publish([mail(4)])


async def test_mail_that_cannot_be_parked_waits_elsewhere(broker: Broker, vhost: Address) -> None:
    recorder = Recorder()
    async with (
        open_rabbitmq([vhost], QUICK) as queues,
        queues.subscribe("outbox", recorder, prefetch=9, window=0) as subscription,
    ):
        await queues.publish([mail(1)])
        await recorder.until(lambda recorder: recorder.destinations == {"a.test"})
        queues.publisher.forget("outbox.parked.to.a.test")
        with silent(broker, vhost, "outbox.parked.to.a.test"):
            await queues.publish([mail(2), mail(3, "b.test")])
            await recorder.until(lambda recorder: recorder.destinations == {"a.test", "b.test"})
            await until_waits(queues, 1)
        (lease,) = await gather(subscription, recorder, "b.test", 1)
        assert tag_of(lease) == 3


async def test_one_message_tries_a_parked_queue_that_did_not_answer(
    broker: Broker, vhost: Address
) -> None:
    recorder = Recorder()
    name = "outbox.parked.to.a.test"
    async with (
        open_rabbitmq([vhost], replace(QUICK, publish_seconds=60.0)) as queues,
        queues.subscribe("outbox", recorder, prefetch=9, window=0),
    ):
        await queues.publish([mail(1)])
        await recorder.until(lambda recorder: recorder.destinations == {"a.test"})
        # It has been left alone for long enough.
        queues.parker._silent[name] = 0.0, 30.0
        with silent(broker, vhost, name):
            begun = trio.current_time()
            await queues.publish([mail(number) for number in range(2, 6)])
            await until_waits(queues, 4)
            assert trio.current_time() - begun < 9  # others would wait for this one
            assert len(queues.parker.repeated) == 1
        queues.parker._silent[name] = 0.0, 30.0
        await queues.publish([mail(6)])
        await until(lambda: not queues.parker.is_suspected(name))


async def until_waits(queues: RabbitQueues, count: int) -> None:
    """Wait until so many messages wait for ten seconds."""
    with trio.fail_after(30):
        while (found := await queues.publisher.look("outbox.wait.10")) is None:
            pass
        while found is None or found.messages != count:
            found = await queues.publisher.look("outbox.wait.10")


async def test_mail_is_not_parked_in_a_queue_that_a_kill_may_lose(vhost: Address) -> None:
    recorder = Recorder()
    options = Options(first_pause_seconds=0.02, hold_seconds=0.05, settle_seconds=1000)
    async with (
        open_rabbitmq([vhost], options) as queues,
        queues.subscribe("outbox", recorder, prefetch=9, window=0),
        channel_to(vhost) as channel,
    ):
        await queues.publish([mail(1)])
        await until_waits(queues, 1)
        parked = await channel.declare("outbox.parked.to.a.test", passive=True)
        assert parked.messages == 0
    async with (
        open_rabbitmq([vhost], options) as queues,
        queues.subscribe("outbox", recorder, prefetch=9, window=0),
        channel_to(vhost) as channel,
    ):
        # The queue is there, but this process does not know since when.
        await queues.publish([mail(2)])
        await until_waits(queues, 2)
        parked = await channel.declare("outbox.parked.to.a.test", passive=True)
        assert parked.messages == 0
        queues.options = replace(options, settle_seconds=0.01)
        await queues.publish([mail(3)])
        with trio.fail_after(30):
            while not (await channel.declare("outbox.parked.to.a.test", passive=True)).messages:
                pass


async def test_an_outage_of_all_hosts_makes_a_bounded_number_of_queues(
    vhost: Address, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parking, "MAX_PARKED", 2)
    options = Options(queue_type="classic", first_pause_seconds=0.02, hold_seconds=0.05)
    recorder = Recorder()
    async with (
        open_rabbitmq([vhost], options) as queues,
        queues.subscribe("outbox", recorder, prefetch=20, window=0) as subscription,
    ):
        await queues.publish([mail(tag, f"d{tag % 5}.test") for tag in range(20)])
        with trio.fail_after(30):
            while await queues.depths() != [Depth("outbox", 8, 12)]:  # noqa: ASYNC110
                await trio.sleep(0.02)
            while subscription.parked < 8:  # type: ignore[attr-defined] # noqa: ASYNC110
                await trio.sleep(0.01)
        depths = [
            await queues.publisher.look(f"outbox.parked.to.d{number}.test") for number in range(5)
        ]
        assert sorted(each.messages for each in depths if each is not None) == [4, 4]
        assert (await queues.publisher.look("outbox.wait.300")).messages == 12  # type: ignore[union-attr]
    assert caplog.text.count("mail of 2 destinations is parked") == 1


UNSAFE = Options(first_pause_seconds=0.02, hold_seconds=0.05, settle_seconds=1000)
"""No parked queue may be used yet."""


async def test_mail_on_its_way_elsewhere_keeps_no_room_empty(
    broker: Broker, vhost: Address
) -> None:
    recorder = Recorder()
    async with (
        open_rabbitmq([vhost], UNSAFE) as queues,
        queues.subscribe("outbox", recorder, prefetch=9, window=1) as subscription,
    ):
        assert isinstance(subscription, BrokerSubscription)
        await queues.publish([mail(1)])
        await recorder.until(lambda recorder: len(recorder.leases) == 1)
        await queues.publish([mail(2)])
        await until_waits(queues, 1)
        with silent(broker, vhost, "outbox.wait.10"):
            await queues.publish([mail(3)])
            await until(lambda: subscription.destinations["a.test"].parking == 1)
            await queues.ack([Settlement(recorder.leases[0])])
            await queues.publish([mail(4)])
            await recorder.until(lambda recorder: len(recorder.leases) == 2)
            assert tag_of(recorder.leases[1]) == 4


async def test_a_parked_queue_that_cannot_be_used_is_not_listed(vhost: Address) -> None:
    recorder = Recorder()
    async with (
        open_rabbitmq([vhost], UNSAFE) as queues,
        queues.subscribe("outbox", recorder, prefetch=9, window=0),
    ):
        for count in range(1, 4):
            await queues.publish([mail(count)])
            await until_waits(queues, count)
        assert await ready(queues, "outbox.parked.index") == 0
