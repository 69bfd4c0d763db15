"""What becomes of mail that waits when the address that it leaves from has another owner."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mailerq import Config
from mailerq.message import Message
from mailerq.queues.rabbitmq import subscription
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.subscription import BrokerSubscription
from mailerq.queues.rabbitmq.topology import Topology, instance_queue
from mailerq.rules.leases import Ownership
from tests.queues.contract import mail
from tests.queues.rabbitmq.engine_kit import depth, into, on_broker
from tests.queues.rabbitmq.test_cluster_engines import X, engines, quick
from tests.queues.rabbitmq.test_parked_mail import park
from tests.support import Sink, open_sink, until, until_found

__all__ = ["quick"]


class Owner:
    """Has one instance try to own addresses, and no other."""

    name = ""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        attempts = Ownership.attempts

        def only_owner(ownership: Ownership, *args: Any) -> list[str]:
            return attempts(ownership, *args) if ownership.name == self.name else []

        monkeypatch.setattr(Ownership, "attempts", only_owner)


def all_have_read(monkeypatch: pytest.MonkeyPatch, count: int) -> Callable[[], bool]:
    """Whether all subscriptions have read the list of parked mail that they read at the start."""
    read = BrokerSubscription._read_index
    have_read: set[BrokerSubscription] = set()

    async def noted(self: BrokerSubscription) -> None:
        is_open = self._gets is not None and self._gets.is_open
        await read(self)
        if is_open:
            have_read.add(self)

    monkeypatch.setattr(BrokerSubscription, "_read_index", noted)
    return lambda: len(have_read) == count


def pair(tmp_path: Path, vhost: Address, sink: Sink) -> list[Config]:
    """Two instances that can send from one address."""
    return [
        on_broker(
            tmp_path / name, vhost, **into(sink), hostname=f"{name}.test",
            smtp_default_ips=(X,), rabbitmq_queue_type="classic",
        )
        for name in "ab"
    ]  # fmt: skip


async def test_a_new_owner_finds_what_another_instance_has_parked(
    tmp_path: Path, vhost: Address, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(subscription, "FIRST_LOOK_SECONDS", 600.0)
    monkeypatch.setattr(subscription, "INDEX_LOOK_SECONDS", 600.0)
    owner = Owner(monkeypatch)
    have_read = all_have_read(monkeypatch, 4)  # the outbox, and the queue of each
    async with open_sink() as sink:
        made = pair(tmp_path, vhost, sink)
        async with engines(*made):
            await until(have_read)
            await park(vhost, [mail(tag, "d.test") for tag in (1, 2)], "d.test")
            owner.name = made[1].instance
            await sink.wait_for(2)


async def test_mail_that_was_handed_over_and_parked_follows_its_address(
    tmp_path: Path, vhost: Address, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    owner = Owner(monkeypatch)
    async with open_sink() as sink:
        made = pair(tmp_path, vhost, sink)
        async with engines(*made) as (first, second):
            queue = instance_queue("outbox", made[0].instance)
            for number in range(10):
                properties = {"envelope": "a@b.test", "recipient": f"c{number}@d.test"}
                message = Message(properties, b"Subject: x\r\n\r\nhi\r\n")
                await first.publish(message, queue=queue)
            parked = Topology("classic").parked(queue, "d.test")[0]
            await until_found(partial(depth, vhost, parked), lambda found: found == 10)
            owner.name = made[1].instance
            await sink.wait_for(10)
            await until(lambda: second.statistics()["outgoing"]["delivered"] == 10)
        assert first.statistics()["outgoing"]["handed_over"] == 10
