"""Python handlers of a running engine: they see the same events as plugins."""

from __future__ import annotations

import smtplib
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from mailerq import Engine, Message
from mailerq.plugins import Connection
from tests.engine.kit import Certificate, open_dialog, serve
from tests.support import DEADLINE, configure, in_thread, open_sink, send

SESSION = ("connect", "mailfrom", "rcptto", "data", "message", "close")


async def test_handlers_see_mail_come_and_go(tmp_path: Path) -> None:
    seen: list[str] = []

    def note(event: str) -> Callable[..., None]:
        return lambda *arguments: seen.append(event)

    def write(connection: object, message: Message, stored: Message) -> None:
        seen.append("out_data")
        message.body = b"Subject: of this attempt\r\n"
        stored.properties["seen-by"] = "handler"

    async with open_sink() as sink:
        config = configure(
            tmp_path,
            smtp_sink_address="127.0.0.1",
            smtp_sink_port=sink.port,
            rabbitmq_success="success",
        )
        async with Engine(config) as engine:
            await send(engine.addresses[0], sender="before@b.test")
            await sink.wait_for(1)  # the connection to the sink is there before the handlers
            for event in (*SESSION, "out_sent"):
                engine.on(event, note(event))
            engine.on("out_data", write)
            await send(engine.addresses[0], sender="after@b.test")
            await sink.wait_for(2)
            async with engine.consume("success") as leases:
                with trio.fail_after(60):
                    stored = [(await leases.receive()).message for _ in range(2)]
    assert [event for event in seen if event in SESSION] == list(SESSION)
    assert [event for event in seen if event not in SESSION] == ["out_data", "out_sent"]
    assert sink.mails[1].body == b"Subject: of this attempt\r\n"
    assert sink.connections == 1
    assert [message.properties.get("seen-by") for message in stored] == [None, "handler"]


async def test_a_handler_supplies_a_body_that_a_message_lacks(tmp_path: Path) -> None:
    def write(connection: object, message: Message, stored: Message) -> None:
        message.body = b"Subject: made\r\n"

    async with open_sink() as sink:
        config = configure(tmp_path, smtp_sink_address="127.0.0.1", smtp_sink_port=sink.port)
        async with Engine(config) as engine:
            engine.on("out_data", write)
            await engine.publish({"envelope": "a@b.test", "recipient": "c@d.test"})
            (mail,) = await sink.wait_for(1)
    assert mail.body == b"Subject: made\r\n"


async def test_a_handler_that_spoils_a_message_does_not_end_the_session(tmp_path: Path) -> None:
    def spoil(connection: object, message: Message) -> None:
        if message.recipient.startswith("odd@"):
            message.properties["connection"] = 7
        else:
            message.properties["x"] = object()

    def converse(address: tuple[str, int]) -> None:
        with smtplib.SMTP(*address) as client:
            with pytest.raises(smtplib.SMTPDataError) as refused:
                client.sendmail("a@b.test", ["c@d.test"], "Subject: x")
            assert refused.value.smtp_code == 451
            client.sendmail("a@b.test", ["odd@d.test"], "Subject: x")

    log = tmp_path / "received.log"
    config = configure(tmp_path, rabbitmq_inbox="inbox", received_log_file=str(log))
    async with Engine(config) as engine:
        engine.on("message", spoil)
        await in_thread(converse, engine.addresses[0])
        assert [depth.total for depth in await engine.queues.depths()] == [1]
    assert log.read_text().endswith("<a@b.test> <odd@d.test> [] []\n")


@pytest.mark.parametrize("name", ["a" * 256, "a\0b", "\ud800"])
async def test_a_handler_cannot_name_a_queue_that_cannot_be(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(connection: object, message: Message) -> None:
        message.properties["queues"] = {"success": name}

    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        engine.on("message", spoil)
        assert (await dialog.mail("c@d.test")).startswith("451")
        assert await engine.queues.depths() == []
    assert "property" in caplog.text or "the properties cannot be used" in caplog.text


async def test_a_handler_alone_can_know_the_logins(tmp_path: Path) -> None:
    async def check(connection: object, login: str, password: str) -> bool:
        return password == "right"

    def log_in(address: tuple[str, int], password: str) -> int:
        with smtplib.SMTP(*address) as client:
            client.ehlo()
            return client.login("ann", password)[0]

    async with Engine(configure(tmp_path)) as engine:
        with pytest.raises(smtplib.SMTPNotSupportedError):
            await in_thread(log_in, engine.addresses[0], "right")
        engine.on("authenticate", check)
        assert await in_thread(log_in, engine.addresses[0], "right") == 235
        with pytest.raises(smtplib.SMTPAuthenticationError):
            await in_thread(log_in, engine.addresses[0], "wrong")


async def test_a_handler_may_be_given_before_the_start(tmp_path: Path) -> None:
    seen: list[object] = []
    engine = Engine(configure(tmp_path))
    engine.on("connect", seen.append)
    with pytest.raises(ValueError, match="no event"):
        engine.on("timer", seen.append)
    async with engine:
        await send(engine.addresses[0])
    assert len(seen) == 1


async def test_what_a_handler_sends_is_not_held_back_until_it_ends(tmp_path: Path) -> None:
    release = trio.Event()

    async def delay(connection: Connection, address: str) -> None:
        connection.send(b"250-please wait\r\n")
        await release.wait()

    async with serve(tmp_path) as engine:
        engine.on("rcptto", delay)
        async with open_dialog(engine.addresses[0]) as dialog:
            await dialog.send(b"MAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\n")
            assert (await dialog.reply()).startswith("250 2.1.0")  # in its place, before it
            await dialog.receive_until(b"250-please wait\r\n")
            release.set()
            assert await dialog.reply() == "250-please wait\n250 2.1.5 Ok"


async def test_much_that_is_sent_while_the_client_is_waited_for_arrives_whole(
    tmp_path: Path,
) -> None:
    size = 1 << 24  # more than the sockets take
    connections: list[Connection] = []

    def keep(connection: Connection, address: str) -> None:
        connections.append(connection)

    async with serve(tmp_path) as engine:
        engine.on("mailfrom", keep)
        async with open_dialog(engine.addresses[0]) as dialog:
            assert await dialog.codes("MAIL FROM:<a@b.test>") == [250]
            await trio.to_thread.run_sync(connections[0].send, bytes(size))
            received = 0
            with trio.fail_after(DEADLINE):
                while received < size:
                    received += len(await dialog.stream.receive_some())
            assert await dialog.codes("RCPT TO:<c@d.test>") == [250]


async def test_what_a_handler_sends_after_a_handshake_is_not_held_back_either(
    tmp_path: Path,
) -> None:
    certificate = Certificate.make(tmp_path)
    release = trio.Event()

    async def delay(connection: Connection) -> None:
        connection.send(b"220-please wait\r\n")
        await release.wait()

    settings = {"smtp_secure_port": (0,), "smtp_port": (), **certificate.settings}
    async with serve(tmp_path, **settings) as engine:
        engine.on("secure", delay)
        async with open_dialog(engine.addresses[0], greeted=False) as dialog:
            await dialog.start_tls(certificate.trust)
            await dialog.receive_until(b"220-please wait\r\n")
            release.set()
            assert (await dialog.reply()).startswith("220-please wait\n220 ")
