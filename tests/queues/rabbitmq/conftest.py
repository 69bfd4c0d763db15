"""One broker for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mailerq.queues.rabbitmq.addresses import Address
from tests.queues.rabbitmq.kit import Broker, running_broker
from tests.storage.conftest import postgres, s3

__all__ = ["broker", "postgres", "s3", "vhost"]


@pytest.fixture(scope="session")
def broker() -> Iterator[Broker]:
    """A real RabbitMQ. A test that stops it starts it again."""
    with running_broker() as running:
        yield running


@pytest.fixture
def vhost(broker: Broker) -> Iterator[Address]:
    """An empty vhost of the broker."""
    address = broker.vhost()
    yield address
    broker.drop_vhost(address)
