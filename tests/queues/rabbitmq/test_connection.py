"""A connection to a broker that misbehaves: each end has one clear message."""

from __future__ import annotations

import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

import pika
import pytest
import trio
import trustme
from pamqp import commands, header

from mailerq.queues.rabbitmq.adapter import TrioServices
from mailerq.queues.rabbitmq.connection import BrokerError, connect
from mailerq.queues.rabbitmq.options import Options
from mailerq.queues.rabbitmq.queues import open_rabbitmq
from mailerq.queues.rabbitmq.takers import SPARE_MESSAGES
from tests.net.certificate_kit import common_name_context
from tests.queues.rabbitmq.fake import FakeBroker, Peer, fake_broker
from tests.support import DEADLINE


async def refusal(broker: FakeBroker, **more: Any) -> str:
    """What an attempt to connect is told."""
    with trio.fail_after(DEADLINE), pytest.raises(BrokerError) as caught:
        async with connect(broker.address, **more):
            raise AssertionError
    return str(caught.value)


@pytest.mark.parametrize("one_byte", [False, True])
async def test_the_handshake_comes_in_pieces_or_at_once(one_byte: bool) -> None:
    async with fake_broker() as broker:
        broker.one_byte = one_byte
        async with connect(broker.address) as connection:
            assert connection.version == (3, 10, 8)
            assert connection.product == "RabbitMQ 3.10.8"
            channel = await connection.channel()
            assert (await channel.declare("q")).messages == 0
        assert broker.peers[0].seen[-1] == "Connection.Close"
        assert connection.reason is not None


@pytest.mark.parametrize("version", ["", "x", "4.1.0-rc.1", "9" * 400, "3.10.8\n\x1b[2J"])
async def test_any_version_is_read(version: str) -> None:
    async with fake_broker() as broker:
        broker.version = version
        async with connect(broker.address) as connection:
            assert all(part < 10**9 for part in connection.version)
            assert connection.product.isprintable()


async def test_an_older_protocol_is_named() -> None:
    async with fake_broker() as broker:
        broker.greeting = b"AMQP\0\0\x08\0"
        assert "does not speak AMQP 0-9-1" in await refusal(broker)


async def test_another_service_is_named() -> None:
    async with fake_broker() as broker:
        broker.greeting = b"220 mail.test ESMTP\r\n"
        assert "does not speak AMQP" in await refusal(broker)


async def test_a_broker_that_says_nothing_is_given_up() -> None:
    async with fake_broker() as broker:
        broker.answer = lambda peer, each: (None,)
        assert "within 0.2 seconds" in await refusal(broker, open_seconds=0.2)


async def test_a_broker_without_confirms_is_refused() -> None:
    async with fake_broker() as broker:
        broker.capabilities = {"basic.nack": True}
        assert "it lacks publisher_confirms" in await refusal(broker)


async def test_a_refused_login_names_the_user_and_not_the_password() -> None:
    def answer(peer: Peer, each: Any) -> tuple[Any, ...]:
        if each.name == "Connection.StartOk":
            return (commands.Connection.Close(403, "ACCESS_REFUSED - secret", 0, 0),)
        return ()

    async with fake_broker() as broker:
        broker.answer = answer
        text = await refusal(broker)
    assert "refuses user 'user'" in text and "secret" not in text


async def test_a_missing_vhost_is_named() -> None:
    def answer(peer: Peer, each: Any) -> tuple[Any, ...]:
        if each.name == "Connection.Open":
            return (commands.Connection.Close(530, "NOT_ALLOWED - vhost / not found", 0, 0),)
        return ()

    async with fake_broker() as broker:
        broker.answer = answer
        assert "has no vhost '/'" in await refusal(broker)


async def test_tls_is_verified_against_the_name() -> None:
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with fake_broker(server) as broker:
        async with connect(broker.address, context=trusting) as connection:
            await (await connection.channel()).declare("q")
        assert "is not trusted" in await refusal(broker)
        plain = broker.address._replace(tls=False)
        with pytest.raises(BrokerError, match=r"lost|AMQP"):
            async with connect(plain, open_seconds=5):
                raise AssertionError


async def test_a_common_name_is_no_name_of_a_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    good = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(good)
    only = common_name_context(authority, "localhost")
    async with fake_broker(good) as broker, fake_broker(only) as other:
        for each in (broker, other):
            each.address = each.address._replace(host="localhost")
        async with connect(broker.address) as connection:
            await (await connection.channel()).declare("q")
        assert "is not trusted" in await refusal(other)


async def test_silence_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    call_later = TrioServices.call_later

    def sooner(services: TrioServices, delay: float, callback: Any) -> Any:
        return call_later(services, delay / 50, callback)  # pika looks every 6 seconds

    monkeypatch.setattr(TrioServices, "call_later", sooner)
    async with fake_broker() as broker:
        broker.heartbeat = 1
        broker.answer = lambda peer, each: (None,) if each.name == "Heartbeat" else ()
        async with connect(broker.address, heartbeat_seconds=1) as connection:
            with trio.fail_after(DEADLINE):
                reason = await connection.wait_closed()
        assert "silent for too long" in str(reason)


async def test_calls_under_way_get_the_reason_when_the_broker_goes() -> None:
    def answer(peer: Peer, each: Any) -> tuple[Any, ...]:
        if each.name == "Queue.Declare":
            return (commands.Connection.Close(320, "CONNECTION_FORCED - bye", 0, 0),)
        return ()

    async with fake_broker() as broker:
        broker.answer = answer
        async with connect(broker.address) as connection:
            channel = await connection.channel()
            with pytest.raises(BrokerError, match="320 CONNECTION_FORCED - bye") as caught:
                await channel.declare("q")
            assert caught.value.code == 320
            with pytest.raises(BrokerError, match="CONNECTION_FORCED"):
                await connection.channel()
            with pytest.raises(BrokerError, match="CONNECTION_FORCED"):
                channel.publish("", "q", b"", pika.BasicProperties())
            channel.ack(1)  # nobody is there to hear it


async def test_a_refusal_ends_the_channel_and_not_the_connection() -> None:
    def answer(peer: Peer, each: Any) -> tuple[Any, ...]:
        if each.name == "Queue.Declare" and each.queue == "bad":
            return (commands.Channel.Close(406, "PRECONDITION_FAILED - x-queue-type", 0, 0),)
        return ()

    async with fake_broker() as broker:
        broker.answer = answer
        async with connect(broker.address) as connection:
            channel = await connection.channel()
            with pytest.raises(BrokerError, match="rabbitmq-declare: false") as caught:
                await channel.declare("bad")
            assert caught.value.code == 406
            with pytest.raises(BrokerError, match="406"):
                await channel.declare("good")
            assert (await (await connection.channel()).declare("good")).consumers == 0


async def test_a_blocked_broker_says_what_is_short() -> None:
    async with fake_broker() as broker, connect(broker.address) as connection:
        said: list[str | None] = []
        news = [trio.Event(), trio.Event()]

        def tell() -> None:
            said.append(connection.blocked)
            news[len(said) - 1].set()

        connection.on_blocked.append(tell)
        with trio.fail_after(DEADLINE):
            await broker.peers[0].send(commands.Connection.Blocked("low on \x1bdisk"))
            await news[0].wait()
            await broker.peers[0].send(commands.Connection.Unblocked())
            await news[1].wait()
        assert said == ["low on ?disk", None]


async def test_the_messages_of_a_cancelled_fetch_go_back() -> None:
    begun, returned = trio.Event(), trio.Event()
    consumers: list[str] = []

    def answer(peer: Peer, each: Any) -> tuple[Any, ...]:
        match each.name:
            case "Queue.Declare":
                return (commands.Queue.DeclareOk(each.queue, 2, 0),)
            case "Basic.Qos":
                return (commands.Basic.QosOk(),)
            case "Basic.Consume":
                consumers.append(each.consumer_tag)
                begun.set()
                return (commands.Basic.ConsumeOk(each.consumer_tag),)
            case "Basic.Cancel":
                return (commands.Basic.CancelOk(each.consumer_tag),)
            case "Basic.Nack":
                assert each.delivery_tag == 7 and each.requeue
                returned.set()
        return ()

    async with fake_broker() as broker:
        broker.answer = answer
        async with connect(broker.address) as connection:
            channel = await connection.channel()
            with trio.fail_after(DEADLINE):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(channel.fetch, "q", 2)
                    await begun.wait()
                    first = commands.Basic.Deliver(consumers[0], 7, False, "", "q")
                    await broker.peers[0].deliver(first, b"one", commands.Basic.Properties())
                    # The answer to a later call says that the delivery is here.
                    await channel.declare("other")
                    nursery.cancel_scope.cancel()
                await returned.wait()
            assert connection.is_open


@pytest.mark.parametrize(
    "junk",
    [
        b"\0" * 8,
        b"\x09\0\x01\0\0\0\x01x\xce",  # no such kind of frame
        b"\x01\0\0\0\0\0\x04\0\x0a\0\x1fx",  # another end than agreed
        b"\x01\0\x01\0\0\0\x04\0\xff\0\xff\xce",  # no such method
    ],
)
async def test_junk_ends_the_connection_and_nothing_else(junk: bytes) -> None:
    async with fake_broker() as broker, connect(broker.address) as connection:
        await connection.channel()
        await broker.peers[0].write(junk)
        with trio.fail_after(DEADLINE):
            reason = await connection.wait_closed()
        assert str(broker.address) in str(reason)


async def test_a_frame_without_an_end_is_not_kept() -> None:
    async with fake_broker() as broker, connect(broker.address) as connection:
        with trio.fail_after(DEADLINE):
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await broker.peers[0].write(b"\x03\0\x01\x7f\xff\xff\xff" + bytes(1 << 20))
            reason = await connection.wait_closed()
        assert "longer than agreed" in str(reason)


async def test_a_message_without_an_end_is_not_kept() -> None:
    def answer(peer: Peer, each: Any) -> tuple[Any, ...]:
        return (
            (commands.Basic.ConsumeOk(each.consumer_tag),) if each.name == "Basic.Consume" else ()
        )

    async with fake_broker() as broker:
        broker.answer = answer
        async with connect(broker.address) as connection:
            channel = await connection.channel()
            consumer = await channel.consume("q", lambda delivery: None, lambda: None)
            with trio.fail_after(DEADLINE):
                await broker.peers[0].send(
                    commands.Basic.Deliver(consumer, 1, False, "", "q"),
                    header.ContentHeader(0, 1 << 62, commands.Basic.Properties()),
                    channel=1,
                )
                reason = await connection.wait_closed()
            assert f"a message of {1 << 62} bytes" in str(reason)


async def test_a_broker_that_sends_more_than_was_asked_for_is_left() -> None:
    sent = 0

    def answer(peer: Peer, each: Any) -> tuple[Any, ...]:
        match each.name:
            case "Basic.Qos":
                return (commands.Basic.QosOk(),)
            case "Basic.Consume":
                nursery.start_soon(flood, peer, each.consumer_tag)
                return (commands.Basic.ConsumeOk(each.consumer_tag),)
        return ()

    async def flood(peer: Peer, consumer: str) -> None:
        nonlocal sent
        properties = commands.Basic.Properties()
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while sent < 20_000:
                sent += 1
                method = commands.Basic.Deliver(consumer, sent, False, "", "outbox")
                await peer.deliver(method, b"{}", properties, channel=1)

    options = Options(queue_type="classic", declare=False, first_pause_seconds=0.02)
    async with fake_broker() as broker, trio.open_nursery() as nursery:
        broker.answer = answer
        async with (
            open_rabbitmq([broker.address], options) as queues,
            queues.consume("outbox", prefetch=5) as consumer,
        ):
            with trio.fail_after(DEADLINE):
                while not consumer.said:  # type: ignore[attr-defined] # noqa: ASYNC110
                    await trio.sleep(0.01)
            assert "more messages than were asked for" in consumer.said  # type: ignore[attr-defined]
            most = 2 * 5 + SPARE_MESSAGES + 1
            assert consumer.unsettled <= most + 5 + 1  # type: ignore[attr-defined]
            nursery.cancel_scope.cancel()


async def test_cancelling_the_context_closes_the_connection() -> None:
    async with fake_broker() as broker:
        with trio.fail_after(DEADLINE), trio.CancelScope() as scope:
            async with connect(broker.address):
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert broker.peers[0].seen[-1] == "Connection.Close"


async def test_an_error_of_the_user_comes_out_as_it_is() -> None:
    async with fake_broker() as broker:
        with pytest.raises(KeyError):
            async with connect(broker.address):
                raise KeyError


async def test_a_defect_of_a_callback_ends_the_connection() -> None:
    def broken(delivery: object) -> None:
        raise ZeroDivisionError

    def answer(peer: Peer, each: Any) -> tuple[Any, ...]:
        if each.name == "Basic.Consume":
            return (commands.Basic.ConsumeOk(each.consumer_tag),)
        return ()

    async with fake_broker() as broker:
        broker.answer = answer
        async with connect(broker.address) as connection:
            channel = await connection.channel()
            consumer = await channel.consume("q", broken, lambda: None)
            deliver = commands.Basic.Deliver(consumer, 1, False, "", "q")
            await broker.peers[0].deliver(deliver, b"x", commands.Basic.Properties())
            with trio.fail_after(DEADLINE):
                reason = await connection.wait_closed()
            assert "ZeroDivisionError" in str(reason)
