"""Mail that is parked in a broker is found again, by whichever process may send it."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import trio

from mailerq.queues import Publication, Settlement
from mailerq.queues.rabbitmq import subscription as subscriptions
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.coding import encode, header
from mailerq.queues.rabbitmq.queues import Options, open_rabbitmq
from mailerq.queues.rabbitmq.topology import Topology
from tests.queues.contract import Recorder, gather, mail, tag_of
from tests.queues.rabbitmq.kit import channel_to
from tests.support import DEADLINE, until, until_found

OPTIONS = Options(queue_type="classic", first_pause_seconds=0.02)
INDEX = Topology("classic").index("outbox")[0]


async def park(vhost: Address, publications: Iterable[Publication], domain: str) -> None:
    """Do as another process that parks mail: the messages, and an entry in the list."""
    topology = Topology("classic")
    async with channel_to(vhost) as channel:
        name, arguments = topology.parked("outbox", domain)
        await channel.declare(name, arguments=arguments)
        for each in publications:
            tag = each.message.properties["tag"]
            channel.publish("", name, encode(each.message), header(f"other.{tag}"))
        index, arguments = topology.index("outbox")
        await channel.declare(index, arguments=arguments)
        entry = f'{{"destination": "{domain}"}}'.encode()
        channel.publish("", index, entry, header("other.index"))
        await channel.declare(index, passive=True)  # the answer comes behind all that


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of destinations is not read again by itself."""
    monkeypatch.setattr(subscriptions, "FIRST_LOOK_SECONDS", 600.0)


async def test_mail_that_another_process_parks_is_found_when_asked(
    vhost: Address, seldom: None
) -> None:
    recorder = Recorder()
    await park(vhost, [mail(0, "first.test")], "first.test")
    async with (
        open_rabbitmq([vhost], OPTIONS) as queues,
        queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription,
    ):
        await recorder.until(lambda recorder: recorder.destinations == {"first.test"})
        await park(vhost, [mail(1), mail(2)], "a.test")
        subscription.look()
        leases = await gather(subscription, recorder, "a.test", 2)
        assert sorted(map(tag_of, leases)) == [1, 2]


async def test_an_entry_that_another_process_reads_at_the_moment_is_found_later(
    vhost: Address,
) -> None:
    recorder = Recorder()
    await park(vhost, [mail(1)], "a.test")
    async with channel_to(vhost) as channel:
        ((entry,), _) = await channel.fetch(INDEX, 9)
        await park(vhost, [mail(2, "b.test")], "b.test")
        async with (
            open_rabbitmq([vhost], OPTIONS) as queues,
            queues.subscribe("outbox", recorder, prefetch=9, window=9),
        ):
            await recorder.until(lambda recorder: "b.test" in recorder.destinations)
            assert recorder.destinations == {"b.test"}
            channel.nack(entry.tag)
            await recorder.until(lambda recorder: "a.test" in recorder.destinations)


@pytest.mark.parametrize("settled", [False, True], ids=["given back", "settled"])
async def test_parked_mail_whose_channel_is_over_is_taken_again(
    vhost: Address, seldom: None, settled: bool
) -> None:
    """The entry is with another process meanwhile, so the list tells nothing."""
    recorder = Recorder()
    async with channel_to(vhost) as channel:
        async with (
            open_rabbitmq([vhost], OPTIONS) as queues,
            queues.subscribe("outbox", recorder, prefetch=9, window=0) as subscription,
        ):
            await queues.publish([mail(tag) for tag in range(3)])
            leases = await gather(subscription, recorder, "a.test", 3)
            assert len((await channel.fetch(INDEX, 9))[0]) == 1
            recorder.told.clear()
            connection = queues.consuming.open
            assert connection is not None
            connection.abort("cut by the test")
            if settled:
                await queues.ack([Settlement(lease) for lease in leases])
            else:
                for lease in leases:
                    queues.release(lease)
            await recorder.until(lambda recorder: recorder.destinations == {"a.test"})
            if settled:
                with trio.fail_after(DEADLINE):
                    while (taken := await subscription.take("a.test", 9)).more:
                        assert not taken.leases
            else:
                found = await gather(subscription, recorder, "a.test", 3)
                assert sorted(map(tag_of, found)) == [0, 1, 2]
        parked = Topology("classic").parked("outbox", "a.test")[0]
        left = (await channel.declare(parked, passive=True)).messages
        assert left == (0 if settled else 3)


async def test_mail_is_parked_once_though_its_destination_cannot_be_listed(
    vhost: Address, caplog: pytest.LogCaptureFixture
) -> None:
    async with channel_to(vhost) as channel:
        await channel.declare(INDEX, arguments={"x-max-length": 7})
    recorder = Recorder()
    async with (
        open_rabbitmq([vhost], OPTIONS) as queues,
        queues.subscribe("outbox", recorder, prefetch=9, window=0) as subscription,
    ):
        await queues.publish([mail(0)])
        await until(lambda: "cannot be moved" in caplog.text)
        for tag in range(1, 4):
            await queues.publish([mail(tag)])
        await recorder.until(lambda recorder: recorder.destinations == {"a.test"})
        leases = await gather(subscription, recorder, "a.test", 4)
        assert sorted(map(tag_of, leases)) == [0, 1, 2, 3]
        assert not (await subscription.take("a.test", 9)).leases
        await queues.ack([Settlement(lease) for lease in leases])
        await until_found(queues.depths, lambda found: not found[0].total)
