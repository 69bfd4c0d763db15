"""Deliveries of one engine to the server of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq import Engine
from mailerq.message import Message
from mailerq.plugins import Reject
from tests.engine.kit import inbox, open_dialog, serve
from tests.support import DEADLINE, configure, without_received


async def test_binary_mail_is_relayed_byte_for_byte(tmp_path: Path) -> None:
    mime = b"Message-ID: <1@b.test>\r\n\r\n\0\n.\r\n\r\xff"
    async with serve(tmp_path / "peer") as peer:
        host, port = peer.addresses[0]
        config = configure(tmp_path / "relay", smarthost=host, smarthost_port=port)
        async with Engine(config) as engine, open_dialog(engine.addresses[0]) as dialog:
            assert await dialog.codes(
                "MAIL FROM:<a@b.test> BODY=BINARYMIME", "RCPT TO:<c@d.test>"
            ) == [250, 250]
            await dialog.send(b"BDAT %d LAST\r\n%b" % (len(mime), mime))
            assert (await dialog.reply()).startswith("250")
            (message,) = await inbox(peer)
    assert message.body is not None
    assert without_received(without_received(message.body)) == mime
    assert message.properties["binarymime"] is True


@pytest.mark.parametrize("password", ["pass-phrase", "wrong"])
async def test_mail_goes_to_a_smarthost_that_wants_a_login(tmp_path: Path, password: str) -> None:
    login = {"smtp_username": "ann", "smtp_password": "pass-phrase"}
    async with serve(tmp_path / "peer", smtp_relay_range=(), **login) as peer:
        host, port = peer.addresses[0]
        config = configure(
            tmp_path / "relay",
            smarthost=host,
            smarthost_port=port,
            smarthost_username="ann",
            smarthost_password=password,
            rabbitmq_success="success",
            rabbitmq_retry="retry",
        )
        async with Engine(config) as engine, open_dialog(engine.addresses[0]) as dialog:
            assert (await dialog.mail("c@d.test")).startswith("250")
            queue = "success" if password == "pass-phrase" else "retry"
            with trio.fail_after(DEADLINE):
                async with engine.consume(queue) as leases:
                    lease = await leases.receive()
                    (result,) = lease.message.results
            if queue == "success":
                (message,) = await inbox(peer)
                assert message.properties["connection"]["user"] == "ann"
                assert result["authentication"] == "cram-md5"
            else:
                assert (result["state"], result["code"]) == ("authresponse", 535)


async def test_no_result_has_the_password_of_a_smarthost(tmp_path: Path) -> None:
    fields = {"Hostname": "127.0.0.1", "Username": "ann", "Password": "pass-phrase"}
    mime = "".join(f"X-MQ-Smarthost-{name}: {value}\r\n" for name, value in fields.items())
    config = configure(tmp_path, smtp_extract=("all",), rabbitmq_results="results")
    async with Engine(config) as engine, open_dialog(engine.addresses[0]) as dialog:

        def refuse_some(connection: object, message: Message) -> Reject | None:
            return Reject(550, "no") if message.recipient == "no@d.test" else None

        engine.on("message", refuse_some)
        body = f"{mime}\r\nhi\r\n".encode()
        assert (await dialog.mail("yes@d.test", "no@d.test", body=body)).startswith("250")
        with trio.fail_after(DEADLINE):
            async with engine.consume("results") as leases:
                found = [(await leases.receive()).message for _ in range(2)]
    assert {message.recipient for message in found} == {"yes@d.test", "no@d.test"}
    for message in found:
        assert message.properties["smarthost"] == {"hostname": "127.0.0.1", "username": "ann"}


@pytest.mark.parametrize("strangers", [True, False])
async def test_mail_for_local_domains_goes_to_an_lmtp_server(
    tmp_path: Path, strangers: bool
) -> None:
    async with serve(tmp_path / "peer", smtp_port=(), lmtp_port=(0,)) as peer:
        host, port = peer.addresses[0]
        settings: dict[str, Any] = {"smtp_relay_range": ()} if strangers else {}
        config = configure(
            tmp_path / "mx",
            smtp_local_domains=("d.test",),
            local_delivery=f"lmtp://{host}:{port}",
            **settings,
        )
        async with Engine(config) as engine, open_dialog(engine.addresses[0]) as dialog:
            for recipient in ("ann@d.test", "postmaster"):
                assert (await dialog.mail(recipient)).startswith("250")
            messages = await inbox(peer, 2)
    assert {message.recipient for message in messages} == {"ann@d.test", "postmaster@mx.test"}


async def test_local_delivery_takes_only_what_it_is_for(tmp_path: Path) -> None:
    """A plugin calls a recipient local whose domain the LMTP server does not have."""
    config = configure(
        tmp_path, smtp_local_domains=("d.test",), local_delivery=f"lmtp://{tmp_path}/lmtp"
    )
    async with Engine(config) as engine, open_dialog(engine.addresses[0]) as dialog:

        def mark(connection: object, message: Message) -> None:
            message.local = True

        engine.on("message", mark)
        assert (await dialog.mail("ann@elsewhere.test")).startswith("451 4.3.5")
        assert (await dialog.mail("ann@d.test")).startswith("250")
