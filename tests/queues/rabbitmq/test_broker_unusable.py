"""What an application publishes and nobody can read is set aside as it was, and stops no other."""

from __future__ import annotations

import datetime
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pika
import pytest

from mailerq.queues import DAMAGED_QUEUE, Settlement
from mailerq.queues.rabbitmq import moving
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.coding import ID, REASON
from mailerq.queues.rabbitmq.connection import Channel, Delivery
from mailerq.queues.rabbitmq.queues import Options, RabbitQueues, open_rabbitmq
from mailerq.queues.rabbitmq.topology import QueueType
from tests.queues.contract import Recorder, mail, tag_of
from tests.queues.rabbitmq.engine_kit import depth
from tests.queues.rabbitmq.kit import channel_to, send
from tests.support import until_found

OPTIONS = Options(first_pause_seconds=0.02)
TYPES: list[QueueType] = ["classic", "quorum"]
HEADERS: dict[str, Any] = {
    "x-order": 7,
    "x-nested": {"list": [1, "two", None, True]},
    "x-when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "x-bytes": b"\xff\x00",
}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not taken is tried again after a second."""
    monkeypatch.setattr(moving, "ASIDE_SECONDS", 1)


@asynccontextmanager
async def taking(
    vhost: Address, options: Options
) -> AsyncIterator[tuple[RabbitQueues, Recorder, Channel]]:
    """A subscription, once its queue is there, and an application."""
    recorder = Recorder()
    async with channel_to(vhost) as channel:
        if not options.declare:
            arguments = {"x-queue-type": options.queue_type}
            await channel.declare("outbox", arguments=arguments)
        async with (
            open_rabbitmq([vhost], options) as queues,
            queues.subscribe("outbox", recorder, prefetch=5, window=5),
        ):
            await queues.publish([mail(0)])
            await recorder.until(lambda recorder: recorder.tags == [0])
            yield queues, recorder, channel


async def aside(vhost: Address, count: int) -> list[Delivery]:
    """Wait for messages in the queue of what cannot be used, and take them."""
    await until_found(partial(depth, vhost, DAMAGED_QUEUE), lambda found: found == count)
    async with channel_to(vhost) as channel:
        found, left = await channel.fetch(DAMAGED_QUEUE, count + 1)
        assert left == 0
        return found


@pytest.mark.parametrize("queue_type", TYPES)
async def test_it_is_set_aside_with_all_that_its_sender_said(
    vhost: Address, queue_type: QueueType
) -> None:
    bodies = [b"no \xff json", b"[1]", b"", b'{"recipient": "a']
    async with taking(vhost, replace(OPTIONS, queue_type=queue_type)) as (_, recorder, channel):
        for body in bodies:
            await send(
                channel, "outbox", body, headers=HEADERS, message_id="order-7",
                content_type="text/x-own", type="mail", app_id="shop", timestamp=1_700_000_000,
                correlation_id="c-7", reply_to="answers",
            )  # fmt: skip
        await send(channel, "outbox", mail(1).message.to_json())
        await recorder.until(lambda recorder: recorder.tags == [0, 1])
        found = await aside(vhost, len(bodies))
        assert sorted(each.body for each in found) == sorted(bodies)
        for each in found:
            said = each.properties
            assert said.headers.pop(REASON).startswith("outbox: ")
            assert said.headers == {**HEADERS, ID: "order-7"}
            assert (said.content_type, said.correlation_id, said.reply_to, said.type) == (
                "text/x-own", "c-7", "answers", "mail",
            )  # fmt: skip
            assert (said.app_id, said.timestamp, said.delivery_mode) == ("shop", 1_700_000_000, 2)


async def test_what_concerned_its_delivery_is_not_done_again(vhost: Address) -> None:
    """An expiry, a login, copies to other queues, an answer to a connection that is gone."""
    async with taking(vhost, OPTIONS) as (_, _recorder, channel):
        await channel.declare("copies")
        await send(
            channel, "outbox", b"no json", headers={"CC": ["copies"], "x-death": [{"count": 3}]},
            expiration="600000", user_id=vhost.user,
        )  # fmt: skip
        (found,) = await aside(vhost, 1)
        assert set(found.properties.headers) == {REASON}
        assert (found.properties.expiration, found.properties.user_id) == (None, None)
        assert await depth(vhost, "copies") == 1


@pytest.mark.parametrize(
    "headers", [{"x-long": "y" * 100_000}, {f"x-{n}": "y" * 100 for n in range(1000)}]
)
async def test_headers_that_do_not_fit_beside_the_reason_are_left_out(
    vhost: Address, headers: dict[str, str]
) -> None:
    async with taking(vhost, OPTIONS) as (_, recorder, channel):
        await send(channel, "outbox", b"no json", headers=headers, message_id="order-7")
        await send(channel, "outbox", mail(1).message.to_json())
        await recorder.until(lambda recorder: recorder.tags == [0, 1])
        (found,) = await aside(vhost, 1)
        assert "its headers are lost" in found.properties.headers[REASON]
        assert found.properties.headers[ID] == "order-7"


class Unreadable(pika.BasicProperties):  # type: ignore[misc]
    """Properties with a table of headers as it is on the wire."""

    def __init__(self, table: bytes) -> None:
        super().__init__(content_type="text/x-own", message_id="order-7")
        self._table = table

    def encode(self) -> list[bytes]:
        flags = self.FLAG_CONTENT_TYPE | self.FLAG_HEADERS | self.FLAG_MESSAGE_ID
        return [
            struct.pack(">H", flags),
            b"\x0atext/x-own",
            struct.pack(">I", len(self._table)) + self._table,
            b"\x07order-7",
        ]


def nested(depth: int) -> bytes:
    """The fields of a table that has a table in it, and so on."""
    fields = b""
    for _ in range(depth):
        fields = b"\x01aF" + struct.pack(">I", len(fields)) + fields
    return fields


@pytest.mark.parametrize("body", ["mail", "no json"])
@pytest.mark.parametrize(
    "table",
    [b"\x01aT" + struct.pack(">Q", 1 << 62), nested(5000), b"\x01\xffS\0\0\0\x01\xff"],
    ids=["a time beyond all calendars", "tables in tables", "no UTF-8"],
)
async def test_headers_that_cannot_be_read_end_no_connection(
    vhost: Address, table: bytes, body: str
) -> None:
    async with taking(vhost, OPTIONS) as (queues, recorder, channel):
        document = mail(1).message.to_json() if body == "mail" else b"no json"
        await send(channel, "outbox", document, Unreadable(table))
        await send(channel, "outbox", mail(2).message.to_json())
        await recorder.until(lambda recorder: 2 in recorder.tags)
        if body == "mail":
            assert recorder.tags == [0, 1, 2]
        else:
            (found,) = await aside(vhost, 1)
            assert found.properties.content_type == "text/x-own"
            assert found.properties.headers[ID] == "order-7"
        assert queues.consuming.connections == 1


async def missing(channel: Channel) -> None:
    """The queue is not there, and may not be declared."""


async def full(channel: Channel) -> None:
    """The queue has one message, which is all that it takes."""
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    await channel.declare(DAMAGED_QUEUE, arguments=arguments)
    await send(channel, DAMAGED_QUEUE, b"the first")


async def other(channel: Channel) -> None:
    """The queue has arguments that we do not declare."""
    await channel.declare(DAMAGED_QUEUE, arguments={"x-max-length": 7})


@pytest.mark.parametrize(
    ("trouble", "declare", "said"),
    [
        (missing, False, "'damaged' is not there"),
        (full, False, "no room for the queue 'damaged'"),
        (other, True, "exists with other arguments"),
    ],
)
@pytest.mark.parametrize("queue_type", TYPES)
async def test_it_waits_for_its_queue_and_the_rest_goes_on(
    vhost: Address,
    queue_type: QueueType,
    trouble: Callable[[Channel], Any],
    declare: bool,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """More of it than the subscription takes at a time; each comes to its queue once in the end."""
    options = replace(OPTIONS, queue_type=queue_type, declare=declare)
    bad = [b"no json %d" % number for number in range(20)]
    async with channel_to(vhost) as channel:
        await trouble(channel)
    async with taking(vhost, options) as (queues, recorder, channel):
        for number, body in enumerate(bad):
            await send(channel, "outbox", body, headers=HEADERS, message_id=f"order-{number}")
        # Mail for later goes the same way as what cannot be read, in the same batches.
        for tag in range(1, 10):
            await send(channel, "outbox", mail(tag, f"d{tag}.test").message.to_json())
            await recorder.until(lambda recorder, tag=tag: tag_of(recorder.leases[-1]) == tag)
            await queues.ack([Settlement(lease) for lease in recorder.leases[-1:]])
        assert recorder.tags == list(range(10))
        waits = partial(depth, vhost, "outbox.wait.1")
        await until_found(waits, lambda found: found)
        assert said in caplog.text
        async with channel_to(vhost) as again:
            if trouble is not missing:
                await again.delete(DAMAGED_QUEUE)
            if not declare:
                await again.declare(DAMAGED_QUEUE, arguments={"x-queue-type": queue_type})
        found = await aside(vhost, len(bad))
        assert sorted(each.body for each in found) == sorted(bad)
        for each in found:
            headers = each.properties.headers
            assert headers.pop(REASON).startswith("outbox: ")
            number = bad.index(each.body)
            assert headers == {**HEADERS, ID: f"order-{number}"}
        assert await depth(vhost, "outbox.wait.1") == await depth(vhost, "outbox") == 0
        assert len(await aside(vhost, len(bad))) == len(bad)
    assert sum(said in record.message for record in caplog.records) < 5
    assert "Traceback" not in caplog.text
