"""Messages that are large, or become large when they are unpacked, in a real broker."""

from __future__ import annotations

import gzip
import json

import pytest
import trio

from mailerq.message import Message
from mailerq.queues import Lease, Publication, Settlement
from mailerq.queues.rabbitmq import subscription as subscriptions
from mailerq.queues.rabbitmq import takers
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.queues import Options, open_rabbitmq
from tests.queues.contract import Recorder, gather, mail, tag_of
from tests.queues.rabbitmq.kit import channel_to, send
from tests.support import DEADLINE

CLASSIC = Options(queue_type="classic", first_pause_seconds=0.02)

BODY = 1 << 20
COUNT = 40


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for some messages of `BODY` bytes."""
    monkeypatch.setattr(takers, "MAX_BYTES", 4 * BODY)
    for module in (takers, subscriptions):
        monkeypatch.setattr(module, "MOST_BYTES", 8 * BODY)
    monkeypatch.setattr(subscriptions, "MAX_BYTES", 4 * BODY)
    monkeypatch.setattr(subscriptions, "HELD_BYTES", 2 * BODY)


def packed(tag: int, domain: str, size: int = BODY) -> bytes:
    """A message that has some kilobytes on the wire."""
    text = "".join(f"line {line}\r\n" for line in range(1000))
    document = {"tag": tag, "recipient": f"r@{domain}", "mime": text * (size // len(text))}
    return gzip.compress(json.dumps(document).encode(), 6, mtime=0)


def held(leases: list[Lease]) -> int:
    return sum(len(lease.message.body or b"") for lease in leases)


async def test_mail_that_waits_for_room_does_not_fill_the_memory(vhost: Address) -> None:
    recorder = Recorder()
    seen: list[int] = []
    async with (
        open_rabbitmq([vhost], CLASSIC) as queues,
        queues.subscribe("outbox", recorder, prefetch=COUNT, window=COUNT) as subscription,
        channel_to(vhost) as channel,
    ):
        await queues.publish([mail(1000 + tag, f"d{tag}.test") for tag in range(COUNT)])
        await recorder.until(lambda recorder: len(recorder.tags) == COUNT)
        held_back = getattr(subscription, "_held_back")  # noqa: B009
        for tag in range(COUNT):
            await send(channel, "outbox", packed(tag, "a.test"), content_encoding="gzip")
            assert sum(len(each[2].body or b"") for each in held_back) <= 2 * BODY
        with trio.fail_after(DEADLINE):
            while not recorder.told:
                await recorder.news.wait()
            while len(seen) < 2 * COUNT:
                leases, recorder.leases = recorder.leases, []
                leases += (await subscription.take("a.test", 1)).leases
                for lease in leases:
                    seen.append(tag_of(lease))
                    await queues.ack([Settlement(lease)])
    assert sorted(seen) == [*range(COUNT), *range(1000, 1000 + COUNT)]


async def test_mail_that_is_taken_does_not_fill_the_memory(vhost: Address) -> None:
    recorder = Recorder()
    seen: list[int] = []
    async with (
        open_rabbitmq([vhost], CLASSIC) as queues,
        queues.subscribe("outbox", recorder, prefetch=COUNT, window=0) as subscription,
        channel_to(vhost) as channel,
    ):
        await queues.publish([mail(1000)])
        for tag in range(COUNT):
            await send(channel, "outbox", packed(tag, "a.test"), content_encoding="gzip")
        with trio.fail_after(DEADLINE):
            while subscription.parked <= COUNT:  # type: ignore[attr-defined] # noqa: ASYNC110
                await trio.sleep(0.02)
            while len(seen) < COUNT + 1:
                leases = (await subscription.take("a.test", COUNT)).leases
                assert held(leases) <= 9 * BODY
                seen += map(tag_of, leases)
                await queues.ack([Settlement(lease) for lease in leases])
    assert sorted(seen) == [*range(COUNT), 1000]


async def test_a_message_that_is_too_large_unpacked_parks_waits_and_comes_again(
    vhost: Address,
) -> None:
    recorder = Recorder()
    size = 20 << 20
    async with (
        open_rabbitmq([vhost], CLASSIC) as queues,
        queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription,
        channel_to(vhost) as channel,
    ):
        await queues.publish([mail(1000)])
        await recorder.until(lambda recorder: recorder.tags == [1000])
        await queues.ack([Settlement(recorder.leases.pop())])
        await send(channel, "outbox", packed(1, "a.test", size), content_encoding="gzip")
        await recorder.until(lambda recorder: recorder.tags == [1])
        lease = recorder.leases.pop()
        body = lease.message.body
        queues.release(lease)
        (lease,) = await gather(subscription, recorder, "a.test", 1)
        assert lease.message.body == body
        properties = {**lease.message.properties, "results": [{"attempt": 1}]}
        again = Publication("outbox", Message(properties, body))
        await queues.ack([Settlement(lease, [again])])
        (lease,) = await gather(subscription, recorder, "a.test", 1)
        assert lease.message.body == body
        assert lease.message.properties == properties
