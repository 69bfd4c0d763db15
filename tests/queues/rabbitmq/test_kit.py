"""The kit of these tests itself: workers beside each other start brokers at the same moment."""

from __future__ import annotations

import socket
import subprocess
import sys

from tests.queues.rabbitmq import kit
from tests.support import ROOT


def test_ports_that_are_held_are_given_to_nobody_else() -> None:
    ports, holds = kit.hold_ports(50)
    try:
        code = (
            "from tests.queues.rabbitmq import kit, test_kit\n"
            f"print(test_kit.is_held({ports[0]}), *kit.hold_ports(50)[0])"
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
    ports, holds = kit.hold_ports(1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert other.getsockname()[1] > ports[0]
    holds[0].close()


def is_held(port: int) -> bool:
    """Whether a worker has this port: another one cannot take it."""
    with socket.socket(socket.AF_UNIX) as hold:
        try:
            hold.bind(f"\0mailerq-test-port-{port}")
        except OSError:
            return True
    return False
