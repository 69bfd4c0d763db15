"""What RabbitMQ notes of the queues that a message has waited in never leaves us again."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mailerq import Engine
from mailerq.queues.rabbitmq import moving
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.coding import REASON
from mailerq.queues.rabbitmq.connection import Channel
from mailerq.queues.rabbitmq.queues import Options, open_rabbitmq
from mailerq.queues.rabbitmq.takers import Taker
from mailerq.queues.rabbitmq.topology import QueueType
from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.queues.contract import Recorder, mail
from tests.queues.kit import Clock
from tests.queues.rabbitmq.engine_kit import depth, document, into, on_broker, started
from tests.queues.rabbitmq.kit import channel_to, send
from tests.support import open_sink, until, until_found

TYPES: list[QueueType] = ["classic", "quorum"]


@dataclass
class Seen:
    """The names of headers: those with which messages came, and those of our publications."""

    came: Counter[str] = field(default_factory=Counter)
    went: Counter[str] = field(default_factory=Counter)
    rounds: list[int] = field(default_factory=list)
    """For each message that came out of a wait queue, how often it had been there."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """All messages of the process, between the client and the queues."""
    seen = Seen()
    came, publish = Taker.came, Channel.publish

    def note_came(taker: Taker, delivery: Any) -> bool:
        headers = delivery.properties.headers or {}
        seen.came.update(headers.keys())
        if "x-death" in headers:
            seen.rounds.append(sum(each["count"] for each in headers["x-death"]))
        return came(taker, delivery)

    def note_went(channel: Channel, exchange: str, queue: str, body: bytes, said: Any) -> None:
        seen.went.update((said.headers or {}).keys())
        assert b"x-death" not in body
        publish(channel, exchange, queue, body, said)

    monkeypatch.setattr(Taker, "came", note_came)
    monkeypatch.setattr(Channel, "publish", note_went)
    return seen


def only_ours(names: Counter[str]) -> bool:
    """Whether there is no header that a broker adds."""
    return all(name.startswith(("x-mailerq-", "x-own")) for name in names)


@pytest.mark.parametrize("queue_type", TYPES)
async def test_mail_that_waits_in_steps_and_parks_leaves_them_behind(
    vhost: Address, seen: Seen, queue_type: QueueType
) -> None:
    recorder, clock = Recorder(), Clock()
    options = Options(queue_type=queue_type)
    async with (
        open_rabbitmq([vhost], options, clock=clock) as queues,
        queues.subscribe("outbox", recorder, prefetch=9, window=0) as subscription,
    ):
        # It waits a second, again and again, until the clock says that it is due.
        await queues.publish([mail(1, due=clock.now + 1.2)])
        await until(lambda: len(seen.rounds) >= 2)
        clock.now += 10
        await recorder.until(lambda recorder: bool(recorder.told))
        (lease,) = (await subscription.take("a.test", 1)).leases
        assert seen.rounds == [1] * len(seen.rounds)
        assert {"x-death", "x-first-death-queue"} <= seen.came.keys()
        assert only_ours(seen.went)
        assert "x-death" not in lease.message.properties


@pytest.mark.parametrize("queue_type", TYPES)
async def test_what_cannot_be_read_is_set_aside_without_them(
    vhost: Address, seen: Seen, queue_type: QueueType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue for it is not there for some seconds, so it waits, again and again."""
    monkeypatch.setattr(moving, "ASIDE_SECONDS", 1)
    options = Options(queue_type=queue_type, declare=False)
    async with channel_to(vhost) as channel:
        await channel.declare("outbox", arguments={"x-queue-type": queue_type})
        async with (
            open_rabbitmq([vhost], options) as queues,
            queues.subscribe("outbox", Recorder(), prefetch=9, window=9),
        ):
            await send(channel, "outbox", b"no json", headers={"x-own": "1"})
            seen.went.clear()
            await until(lambda: len(seen.rounds) >= 2)
            await channel.declare("damaged", arguments={"x-queue-type": queue_type})
            await until_found(partial(depth, vhost, "damaged"), lambda found: found == 1)
            assert seen.rounds == [1] * len(seen.rounds)
            assert only_ours(seen.went)
            ((found,), _) = await channel.fetch("damaged", 1)
            assert set(found.properties.headers) == {"x-own", REASON}


@pytest.mark.parametrize("queue_type", TYPES)
async def test_they_are_in_no_retry_and_no_result(
    tmp_path: Path, vhost: Address, seen: Seen, queue_type: QueueType
) -> None:
    """The peer refuses twice, so the mail waits twice before its result."""
    refusals = [Reply(451, "4.3.0 later")] * 2

    def decide(event: server.Event) -> Reply | None:
        return refusals.pop() if refusals and isinstance(event, server.Rcpt) else None

    async with open_sink() as sink, channel_to(vhost) as channel:
        sink.decide = decide
        config = on_broker(
            tmp_path, vhost, **into(sink), retry_interval=(1,), rabbitmq_results="results",
            rabbitmq_retry="retries", rabbitmq_queue_type=queue_type,
        )  # fmt: skip
        async with Engine(config):
            await started(vhost)
            foreign = {"x-death": [{"count": 9}], "x-delivery-count": 3, "x-own": "1"}
            await send(channel, "outbox", document(own="kept"), headers=foreign)
            seen.went.clear()
            await sink.wait_for(1)
            await until_found(partial(depth, vhost, "results"), lambda found: found == 1)
            await until_found(partial(depth, vhost, "retries"), lambda found: found == 2)
        for queue, count in (("results", 1), ("retries", 2)):
            found, _ = await channel.fetch(queue, count)
            for each in found:
                assert not each.properties.headers
                assert json.loads(each.body)["own"] == "kept"
                assert b"death" not in each.body
    assert seen.rounds[0] == 9  # as from its sender
    assert len(seen.rounds) >= 3 and set(seen.rounds[1:]) == {1}  # out of each wait
    assert only_ours(seen.went)
