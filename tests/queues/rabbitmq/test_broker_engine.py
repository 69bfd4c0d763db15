"""The daemon on a real broker: in by SMTP or by an application, and out to another server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio

from mailerq import Config, Engine
from mailerq.queues.rabbitmq.addresses import Address
from tests.queues.rabbitmq.kit import channel_to
from tests.queues.rabbitmq.kit import send as publish
from tests.support import DEADLINE, configure, open_sink, send


def on_broker(directory: Path, vhost: Address, **settings: Any) -> Config:
    """Settings of a daemon whose queues are in the broker."""
    address = f"amqp://{vhost.user}:{vhost.password}@{vhost.host}:{vhost.port}/{vhost.vhost}"
    return configure(directory, rabbitmq_address=address, **settings)


async def test_mail_comes_in_by_smtp_and_goes_out(tmp_path: Path, vhost: Address) -> None:
    async with open_sink() as sink:
        config = on_broker(
            tmp_path, vhost, smtp_sink_address="127.0.0.1", smtp_sink_port=sink.port,
            rabbitmq_results="results",
        )  # fmt: skip
        async with Engine(config) as engine:
            code, _ = await send(engine.addresses[0])
            assert code == 250
            (mail,) = await sink.wait_for(1)
            async with engine.consume("results") as leases:
                with trio.fail_after(DEADLINE):
                    lease = await leases.receive()
                assert lease.message.properties["results"][-1]["type"] == "success"
                await engine.ack(lease)
    assert (mail.sender, mail.recipients) == ("a@b.test", ["c@d.test"])
