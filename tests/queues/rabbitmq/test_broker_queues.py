"""Queues in a real broker: what becomes of mail when the broker does what brokers do."""

from __future__ import annotations

import gzip
import json
import threading
import time
from typing import Any

import pytest
import trio

from mailerq.errors import QueueError
from mailerq.message import Message
from mailerq.queues import DAMAGED_QUEUE, Depth, Publication, Settlement
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.coding import REASON
from mailerq.queues.rabbitmq.queues import Options, open_rabbitmq
from mailerq.queues.rabbitmq.topology import QueueType, Topology
from tests.queues.contract import Recorder, again, gather, mail, receive, tag_of
from tests.queues.rabbitmq.kit import channel_to, send
from tests.support import DEADLINE

CLASSIC = Options(queue_type="classic", first_pause_seconds=0.02)
QUORUM = Options(queue_type="quorum", first_pause_seconds=0.02)
TYPES: list[QueueType] = ["classic", "quorum"]


# What applications publish


@pytest.mark.parametrize("encoding", [None, "gzip"])
async def test_the_document_of_an_application_is_read(vhost: Address, encoding: str | None) -> None:
    document = {"recipient": "r@a.test", "mime": "Subject: x\r\n\r\nhi", "own": [1, {"x": None}]}
    body = json.dumps(document).encode()
    if encoding == "gzip":
        body = gzip.compress(body, mtime=0)
    async with (
        open_rabbitmq([vhost], CLASSIC) as queues,
        queues.consume("outbox", prefetch=5) as consumer,
        channel_to(vhost) as channel,
    ):
        await queues.publish([mail(1)])  # the queue is there from now on
        await send(channel, "outbox", body, content_encoding=encoding, priority=3)
        _, lease = await receive(consumer, 2)
        assert lease.message.body == b"Subject: x\r\n\r\nhi"
        assert lease.message.properties == {"recipient": "r@a.test", "own": [1, {"x": None}]}
        await queues.ack([Settlement(lease)])


async def test_what_is_published_with_gzip_is_small_and_comes_back(vhost: Address) -> None:
    options = Options(queue_type="classic", compress=True)
    text = b"the same line again\r\n" * 20_000
    async with open_rabbitmq([vhost], options) as queues:
        await queues.publish([mail(1, body=text)])
        async with channel_to(vhost) as channel:
            ((delivery,), _) = await channel.fetch("outbox", 1)
            assert delivery.properties.content_encoding == "gzip"
            assert delivery.properties.delivery_mode == 2
            assert len(delivery.body) < len(text) / 20
            channel.nack(delivery.tag)
        async with queues.consume("outbox", prefetch=1) as consumer:
            (lease,) = await receive(consumer, 1)
            assert lease.message.body == text


@pytest.mark.parametrize(
    ("body", "encoding", "reason"),
    [
        (b"no json", None, "not JSON"),
        (b"[1]", None, "object"),
        (b"{}", "br", "encoding"),
        (b"{}", "gzip", "not gzip"),
        (gzip.compress(b"{}" * 1000, mtime=0)[:-9], "gzip", "ends early"),
        (gzip.compress(bytes(65 << 20), 9, mtime=0), "gzip", "too large"),
    ],
)
async def test_a_message_that_cannot_be_used_is_set_aside(
    vhost: Address, body: bytes, encoding: str | None, reason: str
) -> None:
    async with (
        open_rabbitmq([vhost], CLASSIC) as queues,
        queues.subscribe("outbox", recorder := Recorder(), prefetch=5, window=5),
        channel_to(vhost) as channel,
    ):
        await queues.publish([mail(1)])
        await send(channel, "outbox", body, content_encoding=encoding)
        await queues.publish([mail(2)])
        await recorder.until(lambda recorder: recorder.tags == [1, 2])
        with trio.fail_after(DEADLINE):
            while Depth(DAMAGED_QUEUE, 1, 0) not in await queues.depths():
                pass
        ((found,), _) = await channel.fetch(DAMAGED_QUEUE, 1)
        assert found.body == body
        assert reason in found.properties.headers[REASON]


# Later


@pytest.mark.parametrize("queue_type", TYPES)
async def test_mail_for_later_arrives_when_it_is_due(vhost: Address, queue_type: QueueType) -> None:
    recorder = Recorder()
    async with (
        open_rabbitmq([vhost], Options(queue_type=queue_type)) as queues,
        queues.subscribe("outbox", recorder, prefetch=9, window=9),
    ):
        due = time.time() + 1.6  # waits in two steps
        await queues.publish([mail(1, due=due), mail(2), mail(3, due=due + 3600)])
        await recorder.until(lambda recorder: 2 in recorder.tags)
        assert sum(each.delayed for each in await queues.depths()) >= 1
        (lease,) = [lease for lease in recorder.leases if tag_of(lease) == 2]
        await queues.ack([Settlement(lease, [again(lease, time.time() + 1)])])
        await recorder.until(lambda recorder: sorted(recorder.tags) == [1, 2, 2])
        assert due <= time.time()
        assert recorder.told == []


# Queues


async def test_a_queue_that_was_deleted_is_declared_again(vhost: Address) -> None:
    recorder = Recorder()
    async with (
        open_rabbitmq([vhost], CLASSIC) as queues,
        queues.subscribe("outbox", recorder, prefetch=9, window=9),
        channel_to(vhost) as channel,
    ):
        await queues.publish([mail(1), Publication("results", Message({"tag": 2}))])
        await recorder.until(lambda recorder: recorder.tags == [1])
        for name in ("outbox", "results"):
            await channel.delete(name)
        await queues.publish([Publication("results", Message({"tag": 3}))])
        await queues.publish([mail(4)])
        await recorder.until(lambda recorder: 4 in recorder.tags)
        assert (await channel.declare("results", passive=True)).messages == 1


async def test_a_queue_with_other_arguments_is_named_and_the_rest_works(vhost: Address) -> None:
    async with channel_to(vhost) as channel:
        await channel.declare("outbox", arguments={"x-max-length": 7})
    async with open_rabbitmq([vhost], CLASSIC) as queues:
        with pytest.raises(QueueError, match=r"x-max-length.*rabbitmq-declare: false"):
            await queues.publish([mail(1)])
        await queues.publish([Publication("results", Message({}))])
    as_is = Options(queue_type="classic", declare=False)
    async with (
        open_rabbitmq([vhost], as_is) as queues,
        queues.consume("outbox", prefetch=1) as consumer,
    ):
        await queues.publish([mail(1)])
        assert tag_of((await receive(consumer, 1))[0]) == 1
        with pytest.raises(QueueError, match="'nowhere' is not there"):
            await queues.publish([Publication("nowhere", Message({}))])


async def test_an_exchange_passes_mail_on_to_its_queue_and_to_others(vhost: Address) -> None:
    options = Options(queue_type="classic", exchange="mailerq")
    async with (
        open_rabbitmq([vhost], options) as queues,
        channel_to(vhost) as channel,
        queues.consume("outbox", prefetch=1) as consumer,
    ):
        await queues.publish([mail(1)])
        await receive(consumer, 1)
        await channel.declare("tap")
        await channel._call(channel._channel.queue_bind, "tap", "mailerq", "outbox")
        await queues.publish([mail(2)])
        ((tapped,), _) = await channel.fetch("tap", 1)
        assert json.loads(tapped.body)["tag"] == 2


async def test_priorities_of_classic_queues_go_first(vhost: Address) -> None:
    options = Options(queue_type="classic", max_priority=9)
    async with open_rabbitmq([vhost], options) as queues:
        await queues.publish([mail(tag, priority=tag) for tag in range(5)])
        async with queues.consume("outbox", prefetch=1) as consumer:
            seen = []
            for _ in range(5):
                (lease,) = await receive(consumer, 1)
                seen.append(tag_of(lease))
                await queues.ack([Settlement(lease)])
        assert seen == [4, 3, 2, 1, 0]


# Destinations


@pytest.mark.parametrize("queue_type", TYPES)
async def test_parked_mail_is_found_by_the_next_process(
    vhost: Address, queue_type: QueueType
) -> None:
    options = Options(queue_type=queue_type)
    recorder = Recorder()
    async with (
        open_rabbitmq([vhost], options) as queues,
        queues.subscribe("outbox", recorder, prefetch=9, window=0) as subscription,
    ):
        await queues.publish([mail(tag, f"d{tag % 2}.test") for tag in range(6)])
        await recorder.until(lambda recorder: recorder.destinations == {"d0.test", "d1.test"})
        # One destination is emptied, and only its entry is left.
        leases = await gather(subscription, recorder, "d1.test", 3)
        await queues.ack([Settlement(lease) for lease in leases])
    for _ in range(2):
        recorder = Recorder()
        async with (
            open_rabbitmq([vhost], options) as queues,
            queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription,
        ):
            await recorder.until(lambda recorder: bool(recorder.told))
            assert recorder.destinations == {"d0.test"}
            leases = await gather(subscription, recorder, "d0.test", 3)
            assert sorted(map(tag_of, leases)) == [0, 2, 4]
    async with channel_to(vhost) as channel:
        index = Topology(queue_type).index("outbox")[0]
        assert (await channel.declare(index, passive=True)).messages == 1


async def test_mail_of_a_closed_destination_is_not_in_the_way(vhost: Address) -> None:
    recorder = Recorder()
    async with (
        open_rabbitmq([vhost], CLASSIC) as queues,
        queues.subscribe("outbox", recorder, prefetch=5, window=5) as subscription,
    ):
        subscription.set_window("down.test", 0)
        await queues.publish([mail(tag, "down.test") for tag in range(500)])
        await queues.publish([mail(1000, "up.test")])
        await recorder.until(lambda recorder: 1000 in recorder.tags)
        assert recorder.tags == [1000]
        with trio.fail_after(DEADLINE):
            while (depth := (await queues.depths())[0]).total != 501:
                pass
        async with channel_to(vhost) as channel:
            name = Topology().parked("outbox", "down.test")[0]
            with trio.fail_after(DEADLINE):
                while (await channel.declare(name, passive=True)).messages < 500:
                    pass
        assert depth.delayed == 0


# Loops


async def test_another_loop_publishes_and_settles(vhost: Address) -> None:
    async with (
        open_rabbitmq([vhost], CLASSIC) as queues,
        queues.consume("outbox", prefetch=9) as consumer,
    ):

        def elsewhere(work: Any) -> None:
            error: list[BaseException] = []

            def run() -> None:
                try:
                    trio.run(work)
                except BaseException as problem:
                    error.append(problem)

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            if error:
                raise error[0]

        async def publish() -> None:
            await queues.publish([mail(1), mail(2)])
            assert (await queues.depths())[0].queue == "outbox"

        await trio.to_thread.run_sync(elsewhere, publish)
        first, second = await receive(consumer, 2)

        async def settle() -> None:
            queues.release(second)
            await queues.ack([Settlement(first)])

        await trio.to_thread.run_sync(elsewhere, settle)
        (back,) = await receive(consumer, 1)
        assert tag_of(back) == 2
