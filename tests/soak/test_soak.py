"""kill -9 of instances and brokers under load: what got 250 arrives.

What arrives twice has one of the reasons of docs/rabbitmq.md, "What can go out twice". The mail was
on a connection to the sink, or delivered and not settled, when its instance was killed. Or its
lease was lost with a broker, and another instance got it. Or it was written again after a kill:
from the reserve, or by a publisher without a confirmation.

``make soak`` kills a hundred times; MAILERQ_KILLS sets any number.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import trio

from mailerq.queues.fallback.reserve import GROUP
from tests.queues.rabbitmq.engine_kit import uri
from tests.queues.rabbitmq.kit import running_broker, running_cluster
from tests.soak.fleet import COPIED, LEASE_LOST, THROTTLE, Account, open_fleet

SMALL = int(os.environ.get("MAILERQ_KILLS", "3"))
FULL = int(os.environ.get("MAILERQ_KILLS", "100"))


def moment(dice: random.Random) -> float:
    """Seconds until the next kill: mostly soon, sometimes late enough for things to settle."""
    return dice.uniform(0.2, 1.5) if dice.random() < 0.7 else dice.uniform(4.0, 10.0)


async def kill_instances_and_the_broker(
    directory: Path, kills: int, instances: int, queue_type: str = "quorum"
) -> Account:
    with running_broker() as broker:
        async with open_fleet(
            directory,
            [uri(broker.vhost())],
            instances,
            f"--rabbitmq-queue-type={queue_type}",
            seed=kills,
        ) as fleet:
            await trio.sleep(6)  # RabbitMQ 3.10 forgets queues that were declared just before
            for number in range(kills):
                await trio.sleep(moment(fleet.dice))
                if number % 2:
                    await fleet.kill_broker(broker)
                else:
                    await fleet.kill(fleet.dice.randrange(instances))
            return await fleet.finish(broker)


def check(account: Account, instances: int) -> None:
    print(account)
    assert account.lost == set(), account.places
    assert account.foreign == set()
    assert account.accepted > 100
    assert account.unexplained == []
    # One instance recognises second copies. Each has two publishers.
    again = 2 * THROTTLE * instances * account.kills["broker"] if instances > 1 else 0
    copies = account.twice[COPIED] + account.twice[LEASE_LOST]
    assert copies <= GROUP * account.kills["instance"] + again


@pytest.mark.soak
async def test_a_few_kills(tmp_path: Path) -> None:
    check(await kill_instances_and_the_broker(tmp_path, SMALL, 1), 1)


@pytest.mark.soak
async def test_a_hundred_kills_of_an_instance_and_its_broker(tmp_path: Path) -> None:
    check(await kill_instances_and_the_broker(tmp_path, FULL, 1), 1)


@pytest.mark.soak
async def test_a_hundred_kills_of_three_instances_and_their_broker(tmp_path: Path) -> None:
    check(await kill_instances_and_the_broker(tmp_path, FULL, 3), 3)


async def kill_instances_and_nodes(directory: Path, kills: int) -> Account:
    """Three instances on a cluster of three: one node at a time is killed."""
    with running_cluster() as brokers:
        address = brokers[0].vhost()
        addresses = [uri(address._replace(port=broker.port)) for broker in brokers]
        async with open_fleet(directory, addresses, 3, seed=kills) as fleet:
            await trio.sleep(6)
            for number in range(kills):
                await trio.sleep(moment(fleet.dice))
                if number % 2 == 0:
                    await fleet.kill_broker(fleet.dice.choice(brokers))
                else:
                    await fleet.kill(fleet.dice.randrange(3))
            return await fleet.finish(brokers[0])


@pytest.mark.soak
async def test_kills_of_nodes_of_a_cluster(tmp_path: Path) -> None:
    check(await kill_instances_and_nodes(tmp_path, FULL // 2), 3)
