"""Deliveries of one engine to the server of another."""

from __future__ import annotations

from pathlib import Path

from mailerq import Engine
from tests.engine.kit import inbox, open_dialog, serve
from tests.support import configure, without_received


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
