"""The kit of these tests itself: workers beside each other start brokers at the same moment."""

from __future__ import annotations

import socket
import subprocess
import sys

from mailerq.queues.rabbitmq.topology import Topology
from tests.queues.rabbitmq import kit
from tests.support import ROOT, hold_ports

DEAD_LETTERS = "whereis(rabbit_fifo_dlx_sup) =/= undefined"


def test_ports_that_are_held_are_given_to_nobody_else() -> None:
    ports, holds = hold_ports(50)
    try:
        code = (
            "from tests import support\nfrom tests.queues.rabbitmq import test_kit\n"
            f"print(test_kit.is_held({ports[0]}), *support.hold_ports(50)[0])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        held, *others = done.stdout.split()
        assert held == "True"
        assert not {*map(int, others)} & {*ports}
    finally:
        for hold in holds:
            hold.close()
    assert not is_held(ports[0])


def test_no_connection_gets_a_port_that_is_held() -> None:
    ports, holds = hold_ports(1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert other.getsockname()[1] > ports[0]
    holds[0].close()


async def test_a_vhost_is_dropped_though_its_queues_elect_leaders(broker: kit.Broker) -> None:
    address = broker.vhost()
    async with kit.channel_to(address) as channel:
        for name, arguments in Topology().waits("outbox")[:4]:
            await channel.declare(name, arguments=arguments)
    broker.restart()
    broker.drop_vhost(address)
    assert broker.call(DEAD_LETTERS) == "{ok, true}"


def test_dead_letters_are_served_again_before_the_next_test(broker: kit.Broker) -> None:
    broker.call("supervisor:terminate_child(rabbit_sup, rabbit_fifo_dlx_sup)")
    assert broker.call(DEAD_LETTERS) == "{ok, false}"
    broker.drop_vhost(broker.vhost())
    assert broker.call(DEAD_LETTERS) == "{ok, true}"


def is_held(port: int) -> bool:
    """Whether a worker has this port: another one cannot take it."""
    with socket.socket(socket.AF_UNIX) as hold:
        try:
            hold.bind(f"\0mailerq-test-port-{port}")
        except OSError:
            return True
    return False
