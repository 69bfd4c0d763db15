"""A broker fulfils the contract of the interface, with both types of queues."""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager

import pytest

from mailerq.queues import Queues
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.queues import Options, open_rabbitmq
from mailerq.queues.rabbitmq.topology import QueueType
from tests.queues.contract import Backend, Capability, Contract


class OnBroker:
    """A vhost of a real broker, on the clock of this host."""

    capabilities: frozenset[Capability] = frozenset({"durable"})

    def __init__(self, address: Address, queue_type: QueueType) -> None:
        self.address = address
        self.options = Options(queue_type=queue_type, hold_seconds=0.05)

    @property
    def now(self) -> float:
        return time.time()

    @now.setter
    def now(self, now: float) -> None:
        raise NotImplementedError("the clock of a broker cannot be moved")

    def open(self) -> AbstractAsyncContextManager[Queues]:
        return open_rabbitmq([self.address], self.options)


class TestClassic(Contract):
    @pytest.fixture
    def backend(self, vhost: Address) -> Backend:
        return OnBroker(vhost, "classic")


class TestQuorum(Contract):
    @pytest.fixture
    def backend(self, vhost: Address) -> Backend:
        return OnBroker(vhost, "quorum")
