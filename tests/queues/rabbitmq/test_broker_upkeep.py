"""What is done to queues of a real broker beside taking, and what large messages may take."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pika
import pytest
import trio

from mailerq import Engine
from mailerq.message import Message
from mailerq.queues import Lease, Publication, Settlement
from mailerq.queues.rabbitmq import subscription as subscriptions
from mailerq.queues.rabbitmq import takers
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.options import Bound, Options
from mailerq.queues.rabbitmq.queues import open_rabbitmq
from mailerq.queues.rabbitmq.upkeep import Trimmer, hasten
from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.queues.contract import Recorder, mail, tag_of
from tests.queues.rabbitmq.engine_kit import depth, document, into, on_broker, recipients, started
from tests.queues.rabbitmq.kit import channel_to, send
from tests.support import DEADLINE, open_sink, until, until_found

CLASSIC = Options(queue_type="classic", first_pause_seconds=0.02)
QUORUM = Options(first_pause_seconds=0.02)


# Trimming


async def left(vhost: Address, queue: str) -> list[Any]:
    """What is left in a queue, in order."""
    found = []
    async with channel_to(vhost) as channel:
        deliveries, _ = await channel.fetch(queue, 100)
        found = [json.loads(each.body) for each in deliveries]
    return found


@pytest.mark.parametrize("options", [CLASSIC, QUORUM])
async def test_the_oldest_failures_go_and_mail_stays(vhost: Address, options: Options) -> None:
    async with open_rabbitmq([vhost], options) as queues:
        trimmer = Trimmer(queues)
        await queues.publish([
            Publication("failure", Message({"n": number}, b"mail" if number == 1 else None))
            for number in range(6)
        ])  # fmt: skip
        assert await trimmer.trim(Bound("failure", 0, 0)) == 0
        assert await trimmer.trim(Bound("failure", 6, 3600)) == 0
        await until_found(lambda: depth(vhost, "failure"), lambda found: found == 6)
        assert await trimmer.trim(Bound("failure", 3, 0, reports_only=True)) == 3
        await until_found(lambda: depth(vhost, "failure"), lambda found: found == 3)
        assert await trimmer.trim(Bound("failure", 2, 0)) == 1
        await until_found(lambda: depth(vhost, "failure"), lambda found: found == 2)
        assert trimmer.trimmed == 4
    assert [each["n"] for each in await left(vhost, "failure")] == [4, 5]


async def test_what_is_too_old_goes(vhost: Address) -> None:
    ahead = 0.0
    async with open_rabbitmq([vhost], CLASSIC, clock=lambda: time.time() + ahead) as queues:
        await queues.publish([Publication("failure", Message({"n": 1}, None))])
        ahead = 100.0
        await queues.publish([Publication("failure", Message({"n": 2}, None))])
        assert await Trimmer(queues).trim(Bound("failure", 0, 50)) == 1
        await until_found(lambda: depth(vhost, "failure"), lambda found: found == 1)
    assert [each["n"] for each in await left(vhost, "failure")] == [2]


# Mail that waits


async def test_retries_are_hastened_and_mail_that_its_sender_delayed_is_not(vhost: Address) -> None:
    async with open_rabbitmq([vhost], CLASSIC) as queues:
        due = time.time() + 3600
        retry = {"recipient": "r@a.test", "results": [{"type": "x"}], "delayed": "2999-01-01 00:00"}
        await queues.publish([
            Publication("outbox", Message(dict(retry)), due),
            Publication("outbox", Message({"recipient": "later@a.test"}), due),
        ])  # fmt: skip
        assert await hasten(queues, "outbox") == 1
        (found,) = await left(vhost, "outbox")
        assert found["recipient"] == "r@a.test" and "delayed" not in found
        waiting = sum([await depth(vhost, "outbox.wait.3600") or 0])
        assert waiting == 1


async def test_mail_whose_time_has_come_asks_a_host_that_is_down(
    tmp_path: Path, vhost: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause of a host that refuses is 30 seconds; a retry that is due earlier ends it."""
    # Mail is parked at once, in a queue that is just declared.
    monkeypatch.setattr("mailerq.queues.rabbitmq.options.SETTLE_SECONDS", 0.0)
    refusing = True

    def decide(event: server.Event) -> Reply | None:
        return Reply(421, "4.3.2 not now") if refusing else None

    async with open_sink() as sink:
        sink.decide = decide
        config = on_broker(tmp_path, vhost, **into(sink), retry_interval=(2,))
        async with Engine(config) as engine, channel_to(vhost) as channel:
            await started(vhost)
            for number in range(5):
                await send(channel, "outbox", document(f"r{number}@d.test"))
            await until(lambda: engine.statistics()["outgoing"]["retried"] >= 1)
            refusing = False
            began = trio.current_time()
            await sink.wait_for(5)
            assert trio.current_time() - began < 25
    assert sorted(recipients(sink)) == [f"r{number}@d.test" for number in range(5)]


async def test_mail_that_another_process_has_parked_is_found(
    vhost: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriptions, "INDEX_LOOK_SECONDS", 0.05)
    one, other = Recorder(), Recorder()
    async with (
        open_rabbitmq([vhost], CLASSIC) as first,
        open_rabbitmq([vhost], CLASSIC) as second,
        first.subscribe("outbox", one, prefetch=9, window=0),
    ):
        await first.publish([mail(1)])
        await one.until(lambda recorder: recorder.destinations == {"a.test"})
        async with second.subscribe("outbox", other, prefetch=9, window=0) as subscription:
            await other.until(lambda recorder: recorder.destinations == {"a.test"})
            leases: list[Lease] = []
            with trio.fail_after(DEADLINE):
                while not leases:
                    leases += (await subscription.take("a.test", 9)).leases
                    await trio.sleep(0.02)
            assert [tag_of(lease) for lease in leases] == [1]
            await second.ack([Settlement(lease) for lease in leases])


# Large messages


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> int:
    """The most bytes of messages that a taker may hold."""
    for module in (takers, subscriptions):
        monkeypatch.setattr(module, "MAX_BYTES", 1_000_000)
    monkeypatch.setattr(takers, "MOST_BYTES", 2_000_000)
    return 2_000_000


@pytest.mark.parametrize("min_qos", [2, 100])
@pytest.mark.parametrize("options", [CLASSIC, QUORUM])
async def test_large_messages_are_held_by_their_bytes(
    vhost: Address, options: Options, min_qos: int, small_memory: int
) -> None:
    options = Options(queue_type=options.queue_type, min_qos=min_qos, hold_seconds=0.1)
    seen: list[int] = []
    recorder = Recorder()
    async with (
        open_rabbitmq([vhost], options) as queues,
        queues.subscribe("outbox", recorder, prefetch=200, window=200) as subscription,
    ):
        assert isinstance(subscription, subscriptions.BrokerSubscription)
        await queues.publish([mail(tag, f"d{tag}.test", body=b"x" * 200_000) for tag in range(60)])
        most = 0
        with trio.fail_after(DEADLINE):
            while len(seen) < 60:
                most = max(most, subscription.bytes)
                leases = recorder.leases[:]
                recorder.leases.clear()
                for key in {key for key, _ in recorder.told}:
                    leases += (await subscription.take(key, 9)).leases
                seen += map(tag_of, leases)
                await trio.sleep(0.05)
                await queues.ack([Settlement(lease) for lease in leases])
        assert sorted(seen) == list(range(60))
        assert 0 < most <= small_memory
        assert subscription.refused < 100  # they do not come and go all the time
        await until(lambda: subscription.bytes == 0)


async def test_a_message_larger_than_the_bound_comes_alone(
    vhost: Address, small_memory: int
) -> None:
    async with open_rabbitmq([vhost], CLASSIC) as queues:
        await queues.publish([mail(tag, body=b"x" * 3_000_000) for tag in range(3)])
        async with queues.consume("outbox", prefetch=50) as consumer:
            for _ in range(3):
                with trio.fail_after(DEADLINE):
                    lease = await consumer.receive()
                assert len(lease.message.body or b"") == 3_000_000
                await queues.ack([Settlement(lease)])


# A reload


async def test_a_reload_changes_the_encoding_and_the_throttle(
    tmp_path: Path, vhost: Address
) -> None:
    config = on_broker(tmp_path, vhost, rabbitmq_inbox="inbox", rabbitmq_results="results")
    async with Engine(config) as engine, channel_to(vhost) as channel:
        await engine.publish(document(), queue="inbox")
        outcome = engine.reload(
            config.replace(
                rabbitmq_encoding="gzip", rabbitmq_throttle=7, rabbitmq_queue_type="classic"
            )
        )
        assert {change.key for change in outcome.changed} == {
            "rabbitmq-encoding", "rabbitmq-throttle",
        }  # fmt: skip
        assert [change.key for change in outcome.pending] == ["rabbitmq-queue-type"]
        await engine.publish(document(), queue="inbox")
        deliveries, _ = await channel.fetch("inbox", 2)
        assert [each.properties.content_encoding for each in deliveries] == [None, "gzip"]
        assert isinstance(deliveries[0].properties, pika.BasicProperties)
