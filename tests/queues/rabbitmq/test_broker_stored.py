"""The daemon on a real broker, with bodies in a directory."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq import Config, Engine
from mailerq.message import Message
from mailerq.queues import Publication, Settlement
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.connection import BrokerError
from mailerq.queues.rabbitmq.options import Options
from mailerq.queues.rabbitmq.queues import open_rabbitmq
from mailerq.queues.rabbitmq.storing import Storing, Terms
from mailerq.queues.rabbitmq.topology import DELAYS
from mailerq.storage.keys import is_ours
from tests.queues.rabbitmq.kit import channel_to
from tests.storage.kit import opened
from tests.support import DEADLINE, Sink, configure, open_sink, send, until

CLASSIC = Options(queue_type="classic", first_pause_seconds=0.02)
TEXT = b"Subject: hi\r\n\r\nstored\r\n"
MAIL = Publication("outbox", Message({"recipient": "c@d.test"}, TEXT))


def settings(tmp_path: Path, vhost: Address, sink: Sink | None = None, **more: Any) -> Config:
    address = f"amqp://{vhost.user}:{vhost.password}@{vhost.host}:{vhost.port}/{vhost.vhost}"
    if sink is not None:
        more |= {"smtp_sink_address": "127.0.0.1", "smtp_sink_port": sink.port}
    more.setdefault("storage_address", f"directory://{tmp_path}/bodies")
    more |= {"rabbitmq_queue_type": "classic", "rabbitmq_results": "results"}
    return configure(tmp_path, rabbitmq_address=address, **more)


def bodies(tmp_path: Path) -> list[Path]:
    """The files of stored bodies."""
    return [
        path for path in (tmp_path / "bodies").rglob("*-*") if path.is_file() and is_ours(
            str(path.relative_to(tmp_path / "bodies"))
        )
    ]  # fmt: skip


async def put(vhost: Address, properties: dict[str, Any], body: bytes | None = None) -> None:
    """Publish what an application publishes."""
    async with open_rabbitmq([vhost], CLASSIC) as queues:
        await queues.publish([Publication("outbox", Message(properties, body))])


async def documents(vhost: Address, queue: str) -> list[dict[str, Any]]:
    """What lies in a queue, as any program sees it; it stays there."""
    async with channel_to(vhost) as channel:
        deliveries, _ = await channel.fetch(queue, 10_000)
        found = [json.loads(delivery.body) for delivery in deliveries]
        for delivery in deliveries:
            channel.nack(delivery.tag)
        return found


async def waiting(vhost: Address) -> list[dict[str, Any]]:
    """The mail that waits for its time."""
    found = []
    for seconds in DELAYS:
        with suppress(BrokerError):  # there is no such queue
            found += await documents(vhost, f"outbox.wait.{seconds}")
    return found


async def test_mail_that_comes_in_is_stored_before_250_and_sent(
    tmp_path: Path, vhost: Address
) -> None:
    async with open_sink() as sink:
        config = settings(tmp_path, vhost, sink)
        async with Engine(config) as engine:
            assert (await send(engine.addresses[0]))[0] == 250
            (stored,) = bodies(tmp_path)
            (mail,) = await sink.wait_for(1)
            assert mail.body.replace(b"\n", b"\r\n").replace(b"\r\r", b"\r") in (
                stored.read_bytes(), mail.body
            )  # fmt: skip
            assert engine.statistics()["storage"]["put"] == 1
            async with engine.consume("results") as leases:
                with trio.fail_after(DEADLINE):
                    lease = await leases.receive()
                properties = lease.message.properties
                assert properties["results"][-1]["type"] == "success"
                assert lease.message.body is None
                assert "key" not in properties
                await engine.ack(lease)


async def test_all_recipients_of_a_mail_share_a_body(tmp_path: Path, vhost: Address) -> None:
    config = settings(tmp_path, vhost, rabbitmq_inbox="inbox")
    async with Engine(config) as engine:
        recipients = tuple(f"c{number}@d.test" for number in range(20))
        assert (await send(engine.addresses[0], recipients=recipients))[0] == 250
        found = await documents(vhost, "inbox")
    assert len(found) == 20
    assert len({document["key"] for document in found}) == 1
    assert all("mime" not in document for document in found)
    (stored,) = bodies(tmp_path)
    assert str(stored).endswith(found[0]["key"])


async def test_an_application_publishes_a_key(tmp_path: Path, vhost: Address) -> None:
    (tmp_path / "bodies/campaign").mkdir(parents=True)
    (tmp_path / "bodies/campaign/7").write_bytes(TEXT)
    async with open_sink() as sink:
        config = settings(tmp_path, vhost, sink, storage_policy="none")
        async with Engine(config):
            for number in range(3):
                await put(vhost, {"recipient": f"c{number}@d.test", "key": "campaign/7"})
            mails = await sink.wait_for(3)
            assert {mail.body for mail in mails} == {TEXT}
    assert bodies(tmp_path) == []


async def test_a_retry_moves_the_body_of_an_application_out_of_the_queue(
    tmp_path: Path, vhost: Address
) -> None:
    async with trio.open_nursery() as nursery:
        # Nothing listens on port 1.
        config = settings(
            tmp_path, vhost, smtp_sink_address="127.0.0.1", smtp_sink_port=1,
            rabbitmq_retry="retry", storage_policy="out", retry_interval=(3600,),
        )  # fmt: skip
        async with Engine(config) as engine:
            await put(vhost, {"recipient": "c@d.test", "keepmime": True, "own": 1}, TEXT)
            await until(lambda: engine.statistics()["outgoing"]["retried"] == 1)
        (again,) = await waiting(vhost)
        (copy,) = await documents(vhost, "retry")
        nursery.cancel_scope.cancel()
    assert is_ours(again["key"])
    assert (again["own"], "mime" in again) == (1, False)
    assert copy["mime"] == TEXT.decode()  # the policy is about the outbox
    (stored,) = bodies(tmp_path)
    assert stored.read_bytes() == TEXT


async def test_a_body_above_the_limit_is_stored_whatever_the_policy(
    tmp_path: Path, vhost: Address
) -> None:
    """A broker of today takes 16 MiB, and a body of 20 MB all the same goes through."""
    async with open_sink() as sink:
        config = settings(tmp_path, vhost, sink, storage_policy="out", smtp_maxsize=30_000_000)
        async with Engine(config) as engine:
            line = b"x" * 990 + b"\r\n"
            large = TEXT + line * 21_000
            assert (await send(engine.addresses[0], large))[0] == 250
            assert (await send(engine.addresses[0]))[0] == 250
            await sink.wait_for(2)
    (stored,) = bodies(tmp_path)
    assert stored.stat().st_size > 20_000_000


async def test_a_body_that_no_broker_takes_is_refused_without_a_storage(
    tmp_path: Path, vhost: Address
) -> None:
    config = settings(tmp_path, vhost, storage_address="", smtp_maxsize=30_000_000)
    async with Engine(config) as engine:
        code, text = await send(engine.addresses[0], TEXT + (b"x" * 990 + b"\r\n") * 21_000)
        assert (code, text[:5]) == (552, "5.3.4")
        assert (await send(engine.addresses[0]))[0] == 250


async def test_mail_is_taken_while_the_storage_is_away(tmp_path: Path, vhost: Address) -> None:
    (tmp_path / "bodies").write_bytes(b"a file, and no directory")
    config = settings(
        tmp_path, vhost, rabbitmq_inbox="inbox", smtp_maxsize=30_000_000, fallback_maxsize=0
    )
    async with Engine(config) as engine:
        assert (await send(engine.addresses[0]))[0] == 250
        (document,) = await documents(vhost, "inbox")
        assert "mime" in document
        assert engine.statistics()["storage"]["problems"]
        # Above what stays inside, and what is too large when it is escaped.
        for line in (b"x" * 990, b"\x01" * 800):
            code, _ = await send(engine.addresses[0], TEXT + (line + b"\r\n") * 9_000)
            assert code == 451


async def test_mail_that_waited_in_the_broker_for_days_has_expired_with_its_body(
    tmp_path: Path, vhost: Address
) -> None:
    """The time of a mail runs from its arrival, not from its first attempt."""
    terms = Terms.of(Config(max_delivertime=100.0, storage_ttl=0.0))
    then = 1_700_000_000.0
    async with opened(f"directory://{tmp_path}/bodies") as storage:
        storing = Storing(storage, terms)
        async with open_rabbitmq([vhost], CLASSIC, clock=lambda: then, storing=storing) as queues:
            await queues.publish([MAIL])
    config = settings(tmp_path, vhost, smtp_sink_address="127.0.0.1", smtp_sink_port=1)
    async with Engine(config) as engine, engine.consume("results") as leases:
        with trio.fail_after(DEADLINE):
            lease = await leases.receive()
        assert lease.message.properties["results"][-1]["type"] == "expired"
        await engine.ack(lease)


async def test_what_is_republished_is_whole_at_every_moment(tmp_path: Path, vhost: Address) -> None:
    """A settlement stores its bodies first; one that fails leaves the lease as it was."""
    terms = Terms.of(Config())
    async with (
        opened(f"directory://{tmp_path}/bodies") as storage,
        open_rabbitmq([vhost], CLASSIC, storing=Storing(storage, terms)) as queues,
        queues.consume("outbox", prefetch=5) as consumer,
    ):
        await queues.publish([MAIL])
        with trio.fail_after(DEADLINE):
            lease = await consumer.receive()
        key = lease.message.properties["key"]
        assert lease.message.body is None
        assert await storage.get(key) == TEXT
        await queues.ack([Settlement(lease, [Publication("outbox", lease.message)])])
        with trio.fail_after(DEADLINE):
            lease = await consumer.receive()
        assert lease.message.properties["key"] == key
        await queues.ack([Settlement(lease)])
    assert len(bodies(tmp_path)) == 1


CHILD = """
import sys, trio
from mailerq import Config, Engine

async def main():
    async with Engine(Config.load(sys.argv[1:])) as engine:
        print(engine.addresses[0][1], flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


async def test_no_crash_loses_a_body_that_was_accepted(tmp_path: Path, vhost: Address) -> None:
    """Killed while mail comes in: each 250 has its message, and each message its body."""
    config = settings(tmp_path, vhost, rabbitmq_inbox="inbox")
    switches = [
        f"--rabbitmq-address={config.rabbitmq_address}", "--rabbitmq-queue-type=classic",
        f"--storage-address={config.storage_address}", "--rabbitmq-inbox=inbox",
        f"--queue-directory={config.queue_directory}", "--smtp-ip=127.0.0.1", "--smtp-port=0",
        "--hostname=me.test",
    ]  # fmt: skip
    taken: list[int] = []
    for run in range(3):
        process = await trio.lowlevel.open_process(
            [sys.executable, "-c", CHILD, *switches], stdout=-1
        )
        assert process.stdout is not None
        with trio.fail_after(DEADLINE):
            port = int(await process.stdout.receive_some())

        async def feed(first: int, port: int = port) -> None:
            for number in range(first, first + 200):
                text = b"Subject: %d\r\n\r\n%d\r\n" % (number, number)
                try:
                    code, _ = await send(("127.0.0.1", port), text)
                except (OSError, AssertionError, trio.BrokenResourceError):
                    return
                if code != 250:
                    return
                taken.append(number)

        before = len(taken)
        async with trio.open_nursery() as nursery:
            for lane in range(4):
                nursery.start_soon(feed, run * 10_000 + lane * 1000)
            await until(lambda before=before: len(taken) >= before + 20)
            os.kill(process.pid, signal.SIGKILL)
        await process.wait()
    found: set[int] = set()
    async with opened(f"directory://{tmp_path}/bodies") as storage:
        for document in await documents(vhost, "inbox"):
            body = await storage.get(document["key"])
            found.add(int(body.partition(b"Subject: ")[2].split()[0]))
    assert set(taken) <= found
    assert len(taken) >= 60


@pytest.mark.parametrize("kind", ["directory", "s3", "postgres"])
async def test_every_kind_serves_the_daemon(
    tmp_path: Path, vhost: Address, kind: str, request: pytest.FixtureRequest
) -> None:
    if kind == "postgres":
        address = request.getfixturevalue("postgres") + f"&table=t{os.getpid()}"
    elif kind == "s3":
        boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
        endpoint = request.getfixturevalue("s3")
        boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id="key", aws_secret_access_key="secret",
            region_name="us-east-1",
        ).create_bucket(Bucket="bodies")  # fmt: skip
        address = f"s3://key:secret@us-east-1/bodies?endpoint={endpoint}&compression=gzip"
    else:
        address = f"directory://{tmp_path}/bodies?depth=2"
    async with open_sink() as sink:
        config = settings(tmp_path, vhost, sink, storage_address=address)
        async with Engine(config) as engine:
            for _ in range(5):
                assert (await send(engine.addresses[0]))[0] == 250
            await sink.wait_for(5)
            engine._storage._cache.clear()  # type: ignore[union-attr]
            assert engine.statistics()["storage"]["put"] == 5
            assert "problems" not in engine.statistics()["storage"]
