"""A real broker with a reserve: the contract of the interface, and every trouble of a broker."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from mailerq import Engine
from mailerq.errors import QueueError
from mailerq.message import Message
from mailerq.queues import Depth, Publication, Queues, Settlement
from mailerq.queues.fallback import queues as fallback
from mailerq.queues.fallback.queues import FallbackQueues, Patience
from mailerq.queues.rabbitmq import publisher
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.queues import Options, RabbitQueues, open_rabbitmq
from tests.queues.contract import (
    Backend,
    Capability,
    Contract,
    Recorder,
    again,
    gather,
    mail,
    receive,
    tag_of,
)
from tests.queues.fallback.standin import QUICK, both
from tests.queues.rabbitmq.engine_kit import (
    command,
    document,
    into,
    on_broker,
    recipients,
    started,
)
from tests.queues.rabbitmq.kit import Broker, channel_to
from tests.queues.rabbitmq.kit import send as publish
from tests.support import DEADLINE, in_thread, open_sink, send, until

OPTIONS = Options(hold_seconds=0.05, first_pause_seconds=0.02)


class WithReserve:
    """A vhost of a real broker, with a reserve that is not needed."""

    capabilities: frozenset[Capability] = frozenset({"durable"})

    def __init__(self, address: Address, directory: Path) -> None:
        self.address = address
        self.directory = directory

    @property
    def now(self) -> float:
        return time.time()

    @now.setter
    def now(self, now: float) -> None:
        raise NotImplementedError("the clock of a broker cannot be moved")

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Queues]:
        # A broker that is not connected yet is no reason to use the reserve.
        async with (
            open_rabbitmq([self.address], OPTIONS) as broker,
            both(broker, self.directory, patience=Patience()) as queues,
        ):
            yield queues
            assert queues.reserve.stored == 0

    def open(self) -> AbstractAsyncContextManager[Queues]:
        return self._open()


class TestWithReserve(Contract):
    @pytest.fixture
    def backend(self, vhost: Address, tmp_path: Path) -> Backend:
        return WithReserve(vhost, tmp_path)


@asynccontextmanager
async def opened(
    address: Address, directory: Path, *, patience: Patience = QUICK, options: Options = OPTIONS
) -> AsyncIterator[tuple[RabbitQueues, FallbackQueues]]:
    async with open_rabbitmq([address], options) as broker:
        await broker.publishing.connection()
        async with both(broker, directory, patience=patience) as queues:
            yield broker, queues


async def until_away(queues: FallbackQueues, away: bool = True) -> None:
    with trio.fail_after(DEADLINE):
        while queues.away is not away:
            await queues._news.wait()


@contextmanager
def endless_waits(queues: FallbackQueues, rabbit: RabbitQueues) -> Iterator[None]:
    """Nothing in the context waits for the broker: each wait would be longer than the test."""
    with pytest.MonkeyPatch.context() as patch, trio.fail_after(DEADLINE):
        for name in ("TRIAL_SECONDS", "ANSWER_SECONDS", "PROBE_SECONDS"):
            patch.setattr(publisher, name, 2 * DEADLINE)
        patch.setattr(fallback, "WAIT_SECONDS", 2 * DEADLINE)
        patch.setattr(rabbit.publisher, "_seconds", 2 * DEADLINE)
        patch.setattr(queues, "_patience", Patience(grace=2 * DEADLINE))
        yield


async def until_empty(queues: FallbackQueues) -> None:
    """Wait until the broker has all that was in the reserve."""
    await until(lambda: not queues.reserve.lines, DEADLINE)


@pytest.mark.parametrize("settled", [False, True], ids=["leased", "settled"])
@pytest.mark.parametrize("who", ["this process", "another process"])
async def test_a_copy_of_the_reserve_that_the_broker_had_already_is_not_handed_out(
    vhost: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settled: bool, who: str
) -> None:
    """The confirmation of the first copy is lost, so the reserve publishes a second one."""
    monkeypatch.setattr(publisher, "SILENT_SECONDS", 0.1)  # how long the queue is left alone
    async with (
        opened(vhost, tmp_path) as (rabbit, queues),
        open_rabbitmq([vhost], OPTIONS) as other,
    ):
        taker: Queues = queues if who == "this process" else other
        await queues.publish([Publication("inbox", Message({"tag": 0}))])  # it is declared
        async with taker.consume("inbox", prefetch=9) as consumer:
            (lease,) = await receive(consumer, 1)
            await taker.ack([Settlement(lease)])
            with monkeypatch.context() as lossy:
                lossy.setattr(rabbit.publisher, "_finish", lambda tag, taken: None)
                lossy.setattr(rabbit.publisher, "_seconds", 0.5)
                await queues.publish([Publication("inbox", Message({"tag": 1}))])
            assert queues.reserve.stored == 1
            (lease,) = await receive(consumer, 1)
            if settled:
                await taker.ack([Settlement(lease)])
            await until_empty(queues)
            await queues.publish([Publication("inbox", Message({"tag": 2}))])
            (new,) = await receive(consumer, 1)
            assert (tag_of(lease), tag_of(new)) == (1, 2)


async def test_a_stopped_broker(broker: Broker, vhost: Address, tmp_path: Path) -> None:
    """Mail is kept, results are kept, and what is settled meanwhile does not come again."""
    recorder = Recorder()
    async with (
        opened(vhost, tmp_path) as (rabbit, queues),
        queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription,
    ):
        for tag in range(3):
            await queues.publish([mail(tag, f"d{tag}.test")])
        await recorder.until(lambda recorder: len(recorder.leases) == 3)
        broker.call("rabbit:stop()")
        try:
            await until_away(queues)
            await until(lambda: rabbit.consuming.open is None)
            done, retried, kept = recorder.leases
            recorder.leases.clear()
            result = Publication("results", Message({"tag": 9}))
            await queues.ack([Settlement(done, [result])])
            await queues.ack([Settlement(retried, [again(retried, tag=10), result])])
            for tag in range(20, 25):
                await queues.publish([mail(tag, f"d{tag}.test")])
            assert queues.statistics()["fallback"]["waiting"] == {"outbox": 6, "results": 2}
            assert await queues.reserve.begin() == [done.identity, retried.identity]  # type: ignore[attr-defined]
        finally:
            broker.call("rabbit:start()")
        await until_empty(queues)
        found = [
            *(await gather(subscription, recorder, f"d{tag_of(retried)}.test", 1)),
            *[
                lease
                for tag in range(20, 25)
                for lease in await gather(subscription, recorder, f"d{tag}.test", 1)
            ],
        ]
        assert sorted(map(tag_of, found)) == [10, 20, 21, 22, 23, 24]
        await queues.ack([Settlement(lease) for lease in (*found, kept)])
        with trio.fail_after(DEADLINE):
            while (await queues.depths())[0].total:
                pass  # a quorum queue does not count at once
        assert (await queues.depths())[1] == Depth("results", 2, 0)
        assert recorder.leases == []
        assert queues._recognised == {done.identity, retried.identity}  # type: ignore[attr-defined]


@pytest.mark.parametrize("resource", ["memory", "disk"])
async def test_an_alarm(broker: Broker, vhost: Address, tmp_path: Path, resource: str) -> None:
    async with (
        opened(vhost, tmp_path) as (rabbit, queues),
        queues.consume("outbox", prefetch=9) as consumer,
    ):
        await queues.publish([mail(1)])
        (lease,) = await receive(consumer, 1)
        broker.alarm(True, resource)
        try:
            # A broker tells of its alarm when it hears from a connection that publishes.
            await queues.publish([mail(2)])
            await until_away(queues)
            await queues.publish([mail(3)])
            await queues.ack([Settlement(lease, [again(lease, tag=4)])])
            assert queues.reserve.messages >= 2
            assert rabbit.trouble is not None and rabbit.trouble.endswith(f"low on {resource}")
        finally:
            broker.alarm(False, resource)
        await until_empty(queues)
        found: set[int] = set()
        while found != {2, 3, 4}:  # 2 may be there twice: its confirmation was under way
            (lease,) = await receive(consumer, 1)
            await queues.ack([Settlement(lease)])
            found.add(tag_of(lease))
        assert rabbit.publishing.connections == 1


async def test_a_broker_that_does_not_confirm(
    broker: Broker, vhost: Address, tmp_path: Path
) -> None:
    """Its process is stopped: the connection stays open, and nothing is answered."""
    options = Options(first_pause_seconds=0.02)
    async with opened(vhost, tmp_path, options=options) as (rabbit, queues):
        await queues.publish([mail(1)])
        broker.pause()
        rabbit.publisher._seconds = 0.3
        try:
            await queues.publish([mail(2)])
            with endless_waits(queues, rabbit):
                for tag in range(3, 20):
                    await queues.publish([mail(tag)])
            assert queues.reserve.messages == 18
        finally:
            rabbit.publisher._seconds = DEADLINE
            broker.resume()
        await until_empty(queues)
        async with queues.consume("outbox", prefetch=99) as consumer:
            found = {tag_of(lease) for lease in await receive(consumer, 19)}
            assert found >= set(range(1, 19))


async def test_a_vhost_that_is_deleted(broker: Broker, tmp_path: Path) -> None:
    address = broker.vhost()
    async with opened(address, tmp_path) as (rabbit, queues):
        await queues.publish([mail(1)])
        broker.drop_vhost(address)
        await until_away(queues)
        await until(lambda: f"no vhost '{address.vhost}'" in (rabbit.trouble or ""))
        await queues.publish([mail(2)])
        broker.add_vhost(address.vhost)
        await until_empty(queues)
        async with queues.consume("outbox", prefetch=9) as consumer:
            (lease,) = await receive(consumer, 1)
            assert tag_of(lease) == 2
    broker.drop_vhost(address)


async def test_a_queue_that_is_deleted(broker: Broker, vhost: Address, tmp_path: Path) -> None:
    recorder = Recorder()
    async with (
        opened(vhost, tmp_path) as (_, queues),
        queues.subscribe("outbox", recorder, prefetch=9, window=9),
    ):
        await queues.publish([mail(1)])
        await recorder.until(lambda recorder: recorder.tags == [1])
        async with channel_to(vhost) as channel:
            await channel.delete("outbox")
        # The lease is all that is left of its message, and its retry is published.
        await queues.ack([Settlement(recorder.leases[0], [again(recorder.leases[0], tag=2)])])
        await queues.publish([mail(3, "b.test")])
        await recorder.until(lambda recorder: sorted(recorder.tags) == [1, 2, 3])
        # If its consumer has ended by then, the retry is kept with a note of the message.
        await until(lambda: not queues.reserve.lines)


async def test_a_queue_that_nobody_may_declare(
    broker: Broker, vhost: Address, tmp_path: Path
) -> None:
    async with (
        opened(vhost, tmp_path, options=Options(declare=False)) as (_, queues),
        channel_to(vhost) as channel,
    ):
        await channel.declare("outbox", arguments={"x-queue-type": "quorum"})
        await queues.publish([mail(1)])
        await queues.publish([Publication("results", Message({"tag": 7}))])
        await queues.publish([mail(2)])
        assert queues.statistics()["fallback"]["waiting"] == {"results": 1}
        await channel.declare("results")
        await until_empty(queues)
        assert (await channel.declare("results", passive=True)).messages == 1


async def test_a_right_to_publish_that_is_taken_away(
    broker: Broker, vhost: Address, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    async with (
        opened(vhost, tmp_path, patience=Patience()) as (rabbit, queues),
        queues.subscribe("outbox", recorder, prefetch=9, window=9),
    ):
        await queues.publish([mail(1)])
        await recorder.until(lambda recorder: recorder.tags == [1])
        broker.allow(vhost, write="")
        # The broker asks for the rights of each channel once.
        await trio.to_thread.run_sync(broker.close_connections)
        begun = trio.current_time()
        await until(lambda: rabbit.publishing.connections == 2)
        await queues.publish([mail(2)])
        await queues.publish([mail(3)])
        assert trio.current_time() - begun < 15
        assert queues.reserve.messages == 2
        assert "mail of the queue outbox waits" in caplog.text
        assert "403 ACCESS_REFUSED" in caplog.text
        assert "set_permissions" in caplog.text
        assert "leader" not in caplog.text
        broker.allow(vhost)
        await until_empty(queues)
        await recorder.until(lambda recorder: sorted(recorder.tags) == [1, 2, 3])


async def test_a_message_that_the_broker_refuses_keeps_up_no_other(
    broker: Broker, vhost: Address, tmp_path: Path
) -> None:
    broker.call("application:set_env(rabbit, max_message_size, 5000)")
    try:
        async with open_rabbitmq([vhost], OPTIONS) as queues:
            failed: dict[int, str] = {}

            async def publish(tag: int) -> None:
                try:
                    await queues.publish([mail(tag, body=b"x" * (9000 if tag == 7 else 10))])
                except QueueError as error:
                    failed[tag] = str(error)

            with trio.fail_after(DEADLINE):
                async with trio.open_nursery() as nursery:
                    for tag in range(20):
                        nursery.start_soon(publish, tag)
            assert list(failed) == [7]
            assert "406" in failed[7]
            await queues.publish([mail(tag) for tag in range(20, 30)])
            async with queues.consume("outbox", prefetch=50) as consumer:
                leases = await receive(consumer, 29)
            assert sorted(map(tag_of, leases)) == [tag for tag in range(30) if tag != 7]
    finally:
        broker.call("application:unset_env(rabbit, max_message_size)")


# The daemon


async def test_the_daemon_takes_mail_while_the_broker_is_away(
    broker: Broker, vhost: Address, tmp_path: Path
) -> None:
    async with open_sink() as sink:
        config = on_broker(tmp_path, vhost, **into(sink))
        async with Engine(config) as engine:
            await started(vhost)
            broker.call("rabbit:stop()")
            try:
                async with trio.open_nursery() as nursery:  # the first wait until it is away

                    async def client(number: int) -> None:
                        recipient = f"r{number}@d.test"
                        code, _ = await send(engine.addresses[0], recipients=(recipient,))
                        assert code == 250

                    for number in range(5):
                        nursery.start_soon(client, number)
                assert isinstance(engine.queues, FallbackQueues)
                assert isinstance(engine.queues.broker, RabbitQueues)
                with endless_waits(engine.queues, engine.queues.broker):
                    assert (await send(engine.addresses[0], recipients=("r5@d.test",)))[0] == 250
                fallback = engine.statistics()["queue"]["fallback"]
                assert (fallback["away"], fallback["waiting"]) == (1, {"outbox": 6})
                said = await command(config, "queue", "count", status=os.EX_TEMPFAIL)
                assert "6 messages wait on this host" in said
            finally:
                broker.call("rabbit:start()")
            await sink.wait_for(6)
            assert sorted(recipients(sink)) == [f"r{number}@d.test" for number in range(6)]
            await until(lambda: engine.statistics()["queue"]["fallback"]["waiting"] == {})
            rows = json.loads(await command(config, "queue", "list", "--json"))
            counted = {row["queue"]: (row["total"], row["fallback"]) for row in rows}
            assert counted["outbox"] == (0, 0)


async def test_without_a_reserve_the_daemon_answers_451(
    broker: Broker, vhost: Address, tmp_path: Path
) -> None:
    config = on_broker(tmp_path, vhost, fallback_maxsize=0)
    async with Engine(config) as engine:
        await started(vhost)
        broker.call("rabbit:stop()")
        try:
            code, text = await send(engine.addresses[0])
            assert (code, text[:5]) == (451, "4.3.0")
            engine.reload(replace(config, fallback_maxsize=1 << 20))
            assert (await send(engine.addresses[0]))[0] == 250
        finally:
            broker.call("rabbit:start()")


async def test_mail_in_memory_goes_once_though_its_connection_is_lost(
    broker: Broker, vhost: Address, tmp_path: Path
) -> None:
    """Two instances, each with mail for a slow host in memory: the broker gives it out again."""
    async with open_sink() as sink:
        one, two = (
            on_broker(tmp_path / name, vhost, **into(sink), domain_maxconnections=1)
            for name in ("one", "two")
        )
        async with Engine(one) as first, Engine(two) as second, channel_to(vhost) as channel:
            await started(vhost)
            for number in range(200):
                await publish(
                    channel, "outbox", document(f"r{number}@d.test"), message_id=f"{number}"
                )
            await until(lambda: len(sink.mails) >= 20)
            await in_thread(broker.close_connections)
            await until(lambda: len(set(recipients(sink))) == 200)
            for engine in (first, second):
                await until(
                    lambda engine=engine: not engine.statistics()["queue"]["leased"].get("outbox")
                )
        # Each instance has one connection, which has one mail under way, and one before it whose
        # acknowledgement the broker may not have read: these the other instance may send too.
        assert len(sink.mails) <= 204
