"""TLS between two engines, its settings, and what operators see of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq import Engine
from mailerq.cli.control import ask
from mailerq.errors import ConfigError
from mailerq.outbound import flow
from tests.engine.kit import Certificate, inbox, open_dialog, serve
from tests.support import DEADLINE, configure, in_thread


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    made = Certificate.make(tmp_path)
    made.authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return made


async def result_of(engine: Engine, queue: str) -> dict[str, Any]:
    with trio.fail_after(DEADLINE):
        async with engine.consume(queue) as leases:
            lease = await leases.receive()
            await engine.ack(lease)
            return dict(lease.message.results[-1])


async def test_mail_goes_to_a_verified_smarthost_by_tls(
    tmp_path: Path, certificate: Certificate
) -> None:
    async with serve(tmp_path / "peer", **certificate.settings) as peer:
        host, port = peer.addresses[0]
        config = configure(
            tmp_path / "relay",
            smarthost=host,
            smarthost_port=port,
            smarthost_secure="verified",
            connection_ca_file=str(tmp_path / "ca.pem"),
            rabbitmq_results="results",
        )
        async with Engine(config) as engine, open_dialog(engine.addresses[0]) as dialog:
            body = b"Subject: x\r\n\r\n" + b"line\r\n" * 100_000  # several blocks, many records
            assert (await dialog.mail("c@d.test", body=body)).startswith("250")
            (message,) = await inbox(peer)
            result = await result_of(engine, "results")
    assert message.properties["connection"]["secure"] is True
    assert message.body is not None
    assert message.body.endswith(body.partition(b"\r\n\r\n")[2])
    assert b"with ESMTPS" in message.body
    assert result["cipher"]["version"] == "TLSv1.3"
    assert result["certificate"]["verified"] is True


async def test_a_reload_changes_the_authorities_and_a_mistake_changes_nothing(
    tmp_path: Path, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "ASK_SECONDS", 0.1)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    Certificate.make(stranger).authority.cert_pem.write_to_path(str(stranger / "ca.pem"))
    async with serve(tmp_path / "peer", **certificate.settings) as peer:
        host, port = peer.addresses[0]
        config = configure(
            tmp_path / "relay",
            smarthost=host,
            smarthost_port=port,
            connection_secure="verified",
            connection_ca_file=str(stranger / "ca.pem"),
            rabbitmq_results="results",
            rabbitmq_retry="retry",
        )
        async with Engine(config) as engine, open_dialog(engine.addresses[0]) as dialog:
            assert (await dialog.mail("c@d.test")).startswith("250")
            result = await result_of(engine, "retry")
            assert (result["type"], result["status"]) == ("tls", "4.7.5")
            with pytest.raises(ConfigError, match="connection-ca-file"):
                engine.reload(config.replace(connection_ca_file=str(tmp_path / "nowhere.pem")))
            engine.reload(config.replace(connection_ca_file=str(tmp_path / "ca.pem")))
            assert (await dialog.mail("e@d.test")).startswith("250")
            result = await result_of(engine, "results")
            assert result["certificate"]["verified"] is True


async def test_a_certificate_that_cannot_be_used_keeps_an_engine_from_starting(
    tmp_path: Path,
) -> None:
    config = configure(tmp_path, connection_certificate=str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match=r"connection-certificate: cannot use .*none\.pem"):
        async with Engine(config):
            pass


async def test_a_promise_made_on_arrival_is_kept_on_the_way_out(
    tmp_path: Path, certificate: Certificate
) -> None:
    """REQUIRETLS goes through a relay to a smarthost, which the operator names."""
    secure: dict[str, Any] = dict(certificate.settings)
    async with serve(tmp_path / "peer", **secure) as peer:
        host, port = peer.addresses[0]
        config = configure(
            tmp_path / "relay",
            smarthost=host,
            smarthost_port=port,
            connection_ca_file=str(tmp_path / "ca.pem"),
            **secure,
        )
        async with Engine(config) as engine, open_dialog(engine.addresses[0]) as dialog:
            assert (await dialog.say("STARTTLS")).startswith("220")
            await dialog.start_tls(certificate.trust)
            assert await dialog.codes(
                "EHLO c.test", "MAIL FROM:<a@b.test> REQUIRETLS", "RCPT TO:<c@d.test>", "DATA"
            ) == [250, 250, 250, 354]
            await dialog.send(b"Subject: x\r\n\r\nhi\r\n.\r\n")
            assert (await dialog.reply()).startswith("250")
            (message,) = await inbox(peer)
    assert message.properties["requiretls"] is True
    assert message.properties["connection"]["secure"] is True


async def test_explain_says_what_connections_have_to_prove(tmp_path: Path) -> None:
    config = configure(tmp_path, smarthost="192.0.2.1", smarthost_secure="verified")
    async with Engine(config):
        answer = await in_thread(
            partial(ask, config.queue_directory, "explain", recipient="d.test")
        )
    (part,) = answer["answers"][0]["from"] if "answers" in answer else answer["from"]
    assert part["security"] == {
        "level": "verified", "where": "smarthost-secure", "demands": "verified", "mta-sts": None,
        "dnssec": False, "dane": None, "ignored": False, "in-clear": [],
    }  # fmt: skip
