"""A daemon on a real broker, and the command line beside it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from mailerq import Config
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.connection import BrokerError, Declared
from tests.queues.rabbitmq.kit import channel_to
from tests.support import Sink, configure, in_thread, mailerq, until_found

__all__ = ["command", "depth", "document", "into", "on_broker", "recipients", "started", "uri"]


def uri(vhost: Address) -> str:
    return f"amqp://{vhost.user}:{vhost.password}@{vhost.host}:{vhost.port}/{vhost.vhost}"


def on_broker(directory: Path, vhost: Address, **settings: Any) -> Config:
    """Settings of a daemon whose queues are in the broker."""
    return configure(directory, rabbitmq_address=uri(vhost), **settings)


def into(sink: Sink) -> dict[str, Any]:
    """All mail goes to the sink."""
    return {"smtp_sink_address": "127.0.0.1", "smtp_sink_port": sink.port}


def document(recipient: str = "c@d.test", **more: Any) -> bytes:
    """What an application publishes."""
    return json.dumps(
        {"envelope": "a@b.test", "recipient": recipient, "mime": "Subject: x\r\n\r\nhi\r\n", **more}
    ).encode()


def recipients(sink: Sink) -> list[str]:
    return [mail.recipients[0] for mail in sink.mails]


async def depth(vhost: Address, queue: str) -> int | None:
    """Ready messages of a queue; None if it is not there."""
    found = await declared(vhost, queue)
    return None if found is None else found.messages


async def declared(vhost: Address, queue: str) -> Declared | None:
    """What a broker says of a queue; None if it is not there."""
    async with channel_to(vhost) as channel:
        try:
            return await channel.declare(queue, passive=True)
        except BrokerError as error:
            if error.code != 404:
                raise
            return None


async def started(vhost: Address) -> None:
    """Wait until the outbox is there and an engine consumes from it.

    Before, RabbitMQ 3.10 may lose what is published to a quorum queue without confirmation.
    """
    await until_found(partial(consumers, vhost, "outbox"), bool)


async def consumers(vhost: Address, queue: str) -> int:
    """The consumers of a queue; 0 if it is not there."""
    found = await declared(vhost, queue)
    return 0 if found is None else found.consumers


async def command(config: Config, *words: str, status: int = 0, stdin: bytes = b"") -> str:
    """Run a command of the command line beside the daemon; what it prints."""
    done = await in_thread(
        lambda: mailerq(
            *words,
            f"--queue-directory={config.queue_directory}",
            f"--rabbitmq-address={config.rabbitmq_address}",
            input=stdin,
        )
    )
    assert done.returncode == status, (done.stdout, done.stderr)
    return (done.stdout or done.stderr).decode()
