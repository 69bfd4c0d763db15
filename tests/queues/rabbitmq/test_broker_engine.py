"""The daemon on a real broker: in by SMTP or by an application, and out to another server."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pika
import pytest
import trio

from mailerq import Engine
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.topology import DELAYS
from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.net.dns_server import open_dns_server
from tests.queues.rabbitmq.engine_kit import (
    command,
    depth,
    document,
    into,
    on_broker,
    recipients,
    started,
)
from tests.queues.rabbitmq.kit import Broker, channel_to
from tests.queues.rabbitmq.kit import send as publish
from tests.support import (
    DEADLINE,
    Sink,
    in_thread,
    open_sink,
    send,
    until,
    until_found,
)


@asynccontextmanager
async def open_hosts(sink: Sink, dead: Sequence[str] = ()) -> AsyncIterator[dict[str, Any]]:
    """Settings with which the sink is the host of each domain, except those that are `dead`."""

    def zone(name: str, kind: str) -> list[str]:
        address = "127.0.0.9" if name.removeprefix("mx.") in dead else "127.0.0.1"
        return {"MX": [f"10 mx.{name}."], "A": [address]}.get(kind, [])

    async with open_dns_server(zone) as dns:
        yield {
            "dns_servers": (dns.address,),
            "smtp_out_port": sink.port,
            "smtp_out_forbidden": (),
        }


# In, and out


async def test_mail_comes_in_by_smtp_and_goes_out(tmp_path: Path, vhost: Address) -> None:
    async with open_sink() as sink:
        config = on_broker(tmp_path, vhost, **into(sink), rabbitmq_results="results")
        async with Engine(config) as engine:
            code, _ = await send(engine.addresses[0])
            assert code == 250
            (mail,) = await sink.wait_for(1)
            async with engine.consume("results") as leases:
                with trio.fail_after(DEADLINE):
                    lease = await leases.receive()
                assert lease.message.properties["results"][-1]["type"] == "success"
                await engine.ack(lease)
    assert (mail.sender, mail.recipients) == ("a@b.test", ["c@d.test"])


async def test_250_comes_after_the_broker_has_confirmed(
    tmp_path: Path, vhost: Address, broker: Broker
) -> None:
    """A broker that is short of memory takes nothing: the mail is not taken before it does."""
    config = on_broker(tmp_path, vhost, rabbitmq_inbox="inbox")
    async with Engine(config) as engine, channel_to(vhost) as channel:
        assert (await send(engine.addresses[0]))[0] == 250
        assert (await channel.declare("inbox", passive=True)).messages == 1
        codes: list[int] = []
        await in_thread(lambda: broker.alarm(True))

        async def mail() -> None:
            codes.append((await send(engine.addresses[0]))[0])

        async with trio.open_nursery() as nursery:
            try:
                nursery.start_soon(mail)
                # The broker says so to those that publish: the mail is on its way.
                await until(lambda: "takes no publications" in str(engine.statistics()["queue"]))
                assert codes == []
            finally:
                await in_thread(lambda: broker.alarm(False))
        assert codes == [250]
        assert (await channel.declare("inbox", passive=True)).messages == 2


async def test_an_application_publishes_and_reads_results(tmp_path: Path, vhost: Address) -> None:
    """As with pika alone: documents, plain and gzip, go into the outbox, results come out."""

    def application(vhost: Address) -> list[dict[str, Any]]:
        login = pika.PlainCredentials(vhost.user, vhost.password)
        with pika.BlockingConnection(
            pika.ConnectionParameters(vhost.host, vhost.port, vhost.vhost, login)
        ) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            for number in range(4):
                body = document(f"r{number}@d.test", own={"order": number})
                encoding = "gzip" if number % 2 else None
                channel.basic_publish(
                    "", "outbox", gzip.compress(body) if encoding else body,
                    pika.BasicProperties(delivery_mode=2, content_encoding=encoding),
                )  # fmt: skip
            found = []
            for method, properties, body in channel.consume("results", inactivity_timeout=DEADLINE):
                assert method is not None, "no result comes"
                assert properties.content_encoding == "gzip"
                found.append(json.loads(gzip.decompress(body)))
                channel.basic_ack(method.delivery_tag)
                if len(found) == 4:
                    return found
        raise AssertionError

    async with open_sink() as sink:
        config = on_broker(
            tmp_path, vhost, **into(sink), rabbitmq_results="results", rabbitmq_encoding="gzip"
        )
        async with Engine(config), channel_to(vhost) as channel:
            await channel.declare("results", arguments={"x-queue-type": "quorum"})
            await started(vhost)
            results = await in_thread(lambda: application(vhost))
    assert sorted(recipients(sink)) == [f"r{number}@d.test" for number in range(4)]
    assert sorted(result["own"]["order"] for result in results) == [0, 1, 2, 3]
    assert {result["results"][-1]["type"] for result in results} == {"success"}


# Waiting


async def test_a_retry_waits_in_a_queue_of_the_broker(tmp_path: Path, vhost: Address) -> None:
    refusals = [Reply(451, "4.3.0 later")]

    def decide(event: server.Event) -> Reply | None:
        return refusals.pop() if refusals and isinstance(event, server.Rcpt) else None

    async with open_sink() as sink:
        sink.decide = decide
        config = on_broker(tmp_path, vhost, **into(sink), retry_interval=(1,))
        async with Engine(config) as engine:
            await send(engine.addresses[0])
            await sink.wait_for(1)
            await until(lambda: engine.statistics()["outgoing"]["delivered"] == 1)
            assert engine.statistics()["outgoing"]["retried"] == 1
    assert await depth(vhost, "outbox.wait.1") == 0


async def test_the_wait_queues_are_there_from_the_start(tmp_path: Path, vhost: Address) -> None:
    async with Engine(on_broker(tmp_path, vhost)):
        for delay in DELAYS:
            queue = f"outbox.wait.{delay}"
            await until_found(partial(depth, vhost, queue), lambda found: found == 0)


async def test_mail_of_a_dead_destination_does_not_fill_the_window(
    tmp_path: Path, vhost: Address
) -> None:
    """2,000 messages for a host that refuses connections; fresh mail leaves at once."""
    async with open_sink() as sink, open_hosts(sink, dead=["dead.test"]) as hosts:
        config = on_broker(tmp_path, vhost, **hosts, rabbitmq_qos=100)
        async with Engine(config) as engine, channel_to(vhost) as channel:
            await started(vhost)
            for number in range(2000):
                channel.publish(
                    "", "outbox", document(f"r{number}@dead.test"), pika.BasicProperties()
                )
            await publish(channel, "outbox", document("fresh@live.test"))
            await sink.wait_for(1)
            assert recipients(sink) == ["fresh@live.test"]
            # What waits is in queues of its own, and nothing of it is held here.
            parked = partial(depth, vhost, "outbox.parked.to.dead.test")
            await until_found(parked, lambda found: (found or 0) > 1900)
            await until_found(partial(depth, vhost, "outbox"), lambda found: found == 0)
            await until(lambda: engine.statistics()["queue"]["leased"]["outbox"] <= 1)


async def test_parked_mail_goes_out_when_its_pause_ends(tmp_path: Path, vhost: Address) -> None:
    async with open_sink() as sink, open_hosts(sink) as hosts:
        config = on_broker(tmp_path, vhost, **hosts)
        async with Engine(config) as engine, channel_to(vhost) as channel:
            await started(vhost)
            await command(config, "pause", "add", "--domain=d.test")
            for number in range(50):
                await publish(channel, "outbox", document(f"r{number}@d.test"))
            await publish(channel, "outbox", document("x@other.test"))
            await sink.wait_for(1)
            await until(lambda: not engine.statistics()["queue"]["leased"]["outbox"])
            assert recipients(sink) == ["x@other.test"]
            await command(config, "pause", "remove", "1")
            await sink.wait_for(51)
    assert set(Counter(recipients(sink)).values()) == {1}


# Several instances


async def test_two_instances_deliver_each_message_once(tmp_path: Path, vhost: Address) -> None:
    async with open_sink() as sink:
        one = on_broker(tmp_path / "one", vhost, **into(sink), rabbitmq_qos=50)
        two = on_broker(tmp_path / "two", vhost, **into(sink), rabbitmq_qos=50)
        async with Engine(one) as first, Engine(two) as second, channel_to(vhost) as channel:
            await started(vhost)
            for number in range(500):
                channel.publish(
                    "", "outbox", document(f"r{number}@d{number % 7}.test"), pika.BasicProperties()
                )
            await sink.wait_for(500)
            delivered = [each.statistics()["outgoing"]["delivered"] for each in (first, second)]
    assert Counter(recipients(sink)) == Counter(
        f"r{number}@d{number % 7}.test" for number in range(500)
    )
    assert all(count > 0 for count in delivered), delivered


# Trouble


async def test_a_broker_that_restarts_under_load_loses_nothing(
    tmp_path: Path, vhost: Address, broker: Broker
) -> None:
    accepted: list[str] = []
    stop = trio.Event()

    async def client(engine: Engine, name: int) -> None:
        number = 0
        while not stop.is_set():
            recipient = f"r{name}-{number}@d.test"
            code, _ = await send(engine.addresses[0], recipients=(recipient,))
            if code == 250:
                accepted.append(recipient)
            number += 1

    async with open_sink() as sink:
        config = on_broker(tmp_path, vhost, **into(sink))
        async with Engine(config) as engine, trio.open_nursery() as nursery:
            for name in range(4):
                nursery.start_soon(client, engine, name)
            await sink.wait_for(50)
            await in_thread(broker.restart)
            before = len(accepted)
            await until(lambda: len(accepted) >= before + 50)
            stop.set()
            await until(lambda: set(accepted) <= set(recipients(sink)))
    # This process has settled or still had what came again.
    assert max(Counter(recipients(sink)).values()) == 1


async def test_a_deleted_outbox_is_declared_again(tmp_path: Path, vhost: Address) -> None:
    async with open_sink() as sink:
        config = on_broker(tmp_path, vhost, **into(sink))
        async with Engine(config) as engine, channel_to(vhost) as channel:
            await started(vhost)
            await channel.delete("outbox")
            code, _ = await send(engine.addresses[0])
            assert code == 250
            await sink.wait_for(1)


@pytest.mark.parametrize("declare", [True, False])
async def test_a_queue_with_other_arguments_is_used_as_it_is_if_nothing_is_declared(
    tmp_path: Path, vhost: Address, declare: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_sink() as sink, channel_to(vhost) as channel:
        await channel.declare("outbox", arguments={"x-max-length": 1000})  # a classic queue
        config = on_broker(tmp_path, vhost, **into(sink), rabbitmq_declare=declare)
        async with Engine(config) as engine:
            if declare:
                await until(lambda: "rabbitmq-declare: false" in caplog.text)
                assert "exists with other arguments" in caplog.text
            else:
                await publish(channel, "outbox", document())
                await sink.wait_for(1)
                assert (await send(engine.addresses[0]))[0] == 250
                await sink.wait_for(2)
