"""The project with its queues in RabbitMQ, for benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from peers import PROJECT, Destination, Mailerq, Unavailable, cpu_seconds

from mailerq.cli import control

__all__ = ["OnBroker"]

NO_SPINNING: Final = "+sbwt none +sbwtdcpu none"
"""Schedulers of Erlang that wait for work otherwise take processor time for nothing."""


class OnBroker(Mailerq):
    """A single process, and a broker of its own that starts and ends with it."""

    def __init__(
        self, directory: Path, sink: Destination, *, name: str, options: Sequence[str] = ()
    ) -> None:
        super().__init__(directory, sink, name=name, options=options)
        self.broker: Any = None
        self._pika: Any = None

    def prepare(self) -> list[str]:
        address = self.start_broker()
        uri = f"amqp://{address.user}:{address.password}@{address.host}:{address.port}/%2F"
        return [*super().prepare(), f"--rabbitmq-address={uri}"]

    def start_broker(self) -> Any:
        """Start the broker, unless it runs; return its address. Raises `Unavailable`."""
        # The tests and the benchmarks start brokers in the same way.
        if str(PROJECT) not in sys.path:
            sys.path.insert(0, str(PROJECT))
        try:
            import pika
            from _pytest.outcomes import Skipped

            from mailerq.queues.rabbitmq.addresses import Address
            from tests.queues.rabbitmq.kit import PASSWORD, USER, Broker
        except ImportError as error:
            raise Unavailable(f"{error.name} is not installed (make test)") from None
        if self.broker is None:
            directory = self.directory / "broker"
            directory.mkdir(parents=True)
            try:
                self.broker = Broker(directory, NO_SPINNING)
                self.broker.start()
            except Skipped as reason:
                raise Unavailable(str(reason)) from None
        address = Address("127.0.0.1", self.broker.port, USER, PASSWORD)
        if self._pika is not None:
            return address
        login = pika.PlainCredentials(USER, PASSWORD)
        self._pika = pika.BlockingConnection(
            pika.ConnectionParameters(address.host, address.port, credentials=login, heartbeat=0)
        )
        return address

    def kill_alone(self) -> None:
        """End the daemon like a power cut, and leave the broker running."""
        broker, self.broker = self.broker, None
        connection, self._pika = self._pika, None
        self.kill()
        self.broker, self._pika = broker, connection

    def depth(self, queue: str) -> int:
        """Messages that are ready in a queue."""
        channel = self._pika.channel()
        ready = channel.queue_declare(queue, passive=True).method.message_count
        channel.close()
        return int(ready)

    def stop_others(self) -> None:
        if self._pika is not None:
            self._pika.close()
        if self.broker is not None:
            self.broker.close()
        self.broker = self._pika = None

    def broker_cpu(self) -> float | None:
        """CPU seconds of the broker since it started."""
        return cpu_seconds(self.broker.pid)

    def waiting(self) -> int:
        """Messages of the outbox: held by the daemon, or ready in the broker."""
        leased = control.ask(str(self.directory / "queue"), "status")["queue"]["leased"]
        return int(sum(leased.values())) + self.depth("outbox")
