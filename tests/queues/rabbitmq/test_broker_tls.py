"""A daemon and a real broker with TLS, whose certificate is wrong in each way, and then right."""

from __future__ import annotations

import datetime
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trustme

from mailerq import Engine
from mailerq.queues.rabbitmq import keeper
from mailerq.queues.rabbitmq.addresses import Address
from tests.queues.rabbitmq.engine_kit import into, on_broker, recipients, uri
from tests.queues.rabbitmq.kit import Broker
from tests.support import hold_ports, in_thread, open_sink, send, until

YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)

Listen = Callable[[Broker, int, Path, trustme.CA], None]


def listen(
    broker: Broker, port: int, directory: Path, authority: trustme.CA, name: str = "127.0.0.1",
    not_after: datetime.datetime | None = None,
) -> None:  # fmt: skip
    """Serve TLS with a new certificate."""
    issued = authority.issue_cert(name, not_after=not_after)
    # The server keeps what it has read of a file.
    path = directory / f"{len(list(directory.iterdir()))}.pem"
    issued.private_key_and_cert_chain_pem.write_to_path(str(path))
    broker.listen(port, path)


def stranger(broker: Broker, port: int, directory: Path, _: trustme.CA) -> None:
    listen(broker, port, directory, trustme.CA())


def plain(broker: Broker, port: int, directory: Path, _: trustme.CA) -> None:
    broker.listen(port)


@pytest.fixture
def port() -> Iterator[int]:
    (port,), (hold,) = hold_ports(1)
    yield port
    hold.close()


TRUST = "the certificate of {} is not trusted: "
FAULTS: list[tuple[Listen | None, str, str]] = [
    (None, "{}: Connection refused", ""),
    (
        partial(listen, not_after=YESTERDAY),
        TRUST + "certificate has expired",
        "the broker needs a new one",
    ),
    (
        partial(listen, name="other.test"),
        TRUST + "IP address mismatch, certificate is not valid for '127.0.0.1'",
        "rabbitmq-address needs a name that the certificate has",
    ),
    (
        stranger,
        TRUST + "unable to get local issuer certificate",
        "make its authority known to this host",
    ),
    (plain, "{} does not speak TLS", "does it expect amqp, in place of amqps?"),
]
"""What listens, the fault in the log, and what to do about it."""


# A broker that stops listening resets connections. If it does so before the handshake, the ssl
# module of CPython leaves the socket to the collector.
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
async def test_a_wrong_certificate_is_named_once_and_a_right_one_is_enough(
    tmp_path: Path,
    broker: Broker,
    vhost: Address,
    port: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Mail is taken and kept meanwhile, and goes out when the broker has a good certificate."""
    monkeypatch.setattr(keeper, "MAX_PAUSE_SECONDS", 0.1)
    caplog.set_level(logging.INFO)
    directory = tmp_path / "certificates"
    directory.mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authorities.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authorities.pem"))
    address = vhost._replace(port=port, tls=True)

    def said(fault: str) -> list[str]:
        # The cluster has a connection and a log of its own, and says what follows for addresses.
        return [
            record.message
            for record in caplog.records
            if fault in record.message
            and record.message.startswith("RabbitMQ: ")
            and record.name == "mailerq.queues"
        ]

    async with open_sink() as sink, AsyncExitStack() as listeners:

        async def serve(serve: Listen) -> None:
            """Serve at the port, and nothing else."""
            await listeners.aclose()
            await in_thread(serve, broker, port, directory, authority)
            listeners.callback(broker.hush, port)

        config = on_broker(tmp_path, vhost, **into(sink))
        config = replace(config, rabbitmq_address=uri(address).replace("amqp:", "amqps:"))
        async with Engine(config) as engine:
            for count, (wrong, fault, help) in enumerate(FAULTS, 1):
                text = fault.format(address)
                if wrong is not None:
                    await serve(wrong)
                await until(lambda text=text: said(text))
                code, _ = await send(engine.addresses[0], recipients=(f"r{count}@d.test",))
                assert code == 250
                kept = engine.statistics()["queue"]["fallback"]
                assert (kept["away"], kept["waiting"]) == (1, {"outbox": count})
                (line,) = said(text)
                assert help in line
                assert "sesame" not in line
            assert sink.mails == []
            await serve(listen)
            await sink.wait_for(len(FAULTS))
            assert sorted(recipients(sink)) == [f"r{count}@d.test" for count in range(1, 6)]
            await until(lambda: not engine.statistics()["queue"]["fallback"]["waiting"])
            assert "amqps://" in str(engine.statistics()["queue"]["broker"])
            for _, fault, _ in FAULTS[1:]:
                assert len(said(fault.format(address))) == 1
    gc.collect()
    assert "Traceback" not in caplog.text
