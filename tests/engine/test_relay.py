"""The path of a message: in by SMTP, into the queue, and out to another server."""

from __future__ import annotations

import ipaddress
import json
import re
import smtplib
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq import Engine
from mailerq.cli.control import ask
from mailerq.errors import ConfigError, MessageError
from mailerq.message import Message
from mailerq.outbound import sites
from mailerq.queues import Publication
from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.net.dns_server import open_dns_server
from tests.support import (
    Sink,
    closed_port,
    configure,
    in_thread,
    open_sink,
    send,
    until,
    without_received,
)


async def test_a_mail_arrives_byte_for_byte_but_for_the_received_field(tmp_path: Path) -> None:
    mime = b"Message-ID: <1@b.test>\r\nSubject: \xff\r\n\r\n.\r\n..\r\nhello\r\n\r\n"
    async with open_sink() as sink:
        config = configure(tmp_path, smtp_sink_address="127.0.0.1", smtp_sink_port=sink.port)
        async with Engine(config) as engine:
            code, text = await send(engine.addresses[0], mime)
            assert code == 250
            (mail,) = await sink.wait_for(1)
    assert (mail.sender, mail.recipients) == ("a@b.test", ["c@d.test"])
    assert without_received(mail.body) == mime
    id = text.split("\n")[-1].split()[1]
    assert f"id {id}".encode() in mail.body


async def test_each_recipient_gets_a_message_and_an_id_of_its_own(tmp_path: Path) -> None:
    recipients = ("c@d.test", "e@f.test", "g@d.test")
    async with open_sink() as sink:
        config = configure(tmp_path, smtp_sink_address="127.0.0.1", smtp_sink_port=sink.port)
        async with Engine(config) as engine:
            code, text = await send(engine.addresses[0], recipients=recipients)
            mails = await sink.wait_for(3)
    assert code == 250
    lines = [line.split() for line in text.split("\n")[1:]]
    assert [line[-1] for line in lines] == list(recipients)
    assert len({line[1] for line in lines}) == 3
    assert sorted(mail.recipients[0] for mail in mails) == sorted(recipients)


async def test_the_way_out_asks_the_configured_dns_servers(tmp_path: Path) -> None:
    async with open_dns_server({("d.test", "MX"): ["0 ."]}) as dns:
        config = configure(tmp_path, dns_servers=(dns.address,), rabbitmq_results="results")
        async with Engine(config) as engine:
            await send(engine.addresses[0])
            async with engine.consume("results") as leases:
                with trio.fail_after(60):
                    lease = await leases.receive()
    assert "d.test accepts no mail (null MX)" in str(lease.message.results[-1])


async def test_mail_goes_to_the_hosts_of_each_domain_on_another_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A slow machine must not have a question sent again: neither after a quick lookup nor at all.
    monkeypatch.setattr(sites, "QUICK_SECONDS", 60.0)

    def zone(name: str, kind: str) -> list[str]:
        return {"MX": [f"10 mx.{name}."], "A": ["127.0.0.1"]}.get(kind, [])

    recipients = tuple(f"c@d{number}.test" for number in range(100))
    async with open_sink() as sink, open_dns_server(zone) as dns:
        config = configure(
            tmp_path,
            dns_servers=(dns.address,),
            dns_timeout=60.0,
            smtp_out_port=sink.port,
            smtp_out_forbidden=(),
        )
        async with Engine(config) as engine:
            await send(engine.addresses[0], recipients=recipients)
            mails = await sink.wait_for(100)
    assert sorted(mail.recipients[0] for mail in mails) == sorted(recipients)
    asked = {name: count for (name, kind), count in dns.questions.items() if kind == "MX"}
    assert asked == {f"d{number}.test": 1 for number in range(100)}


async def test_a_received_mail_is_one_json_document(tmp_path: Path) -> None:
    config = configure(tmp_path, rabbitmq_inbox="inbox")
    async with Engine(config) as engine:
        await send(engine.addresses[0], b"x-mq-tag: spring\r\nSubject: x\r\n\r\nhi\r\n")
        async with engine.consume("inbox") as leases:
            with trio.fail_after(60):
                lease = await leases.receive()
            document = json.loads(lease.message.to_json())
            await engine.ack(lease)
    assert document["envelope"] == "a@b.test"
    assert document["recipient"] == "c@d.test"
    assert document["hostname"] == "mx.test"
    assert document["tags"] == ["spring"]
    assert document["mime"].endswith("Subject: x\r\n\r\nhi\r\n")
    assert document["connection"]["remote-ip"] == "127.0.0.1"
    assert document["connection"]["secure"] is False
    assert document["message-id"] in document["mime"]


async def test_an_inbox_set_to_nothing_drops_what_comes_in(tmp_path: Path) -> None:
    async with Engine(configure(tmp_path, rabbitmq_inbox="")) as engine:
        code, _ = await send(engine.addresses[0])
        assert code == 250
        assert await engine.queues.depths() == []


async def test_strangers_may_not_relay_but_may_send_to_local_domains(tmp_path: Path) -> None:
    config = configure(
        tmp_path, smtp_relay_range=(), smtp_local_domains=("here.test",), rabbitmq_inbox="inbox"
    )
    async with Engine(config) as engine:
        with pytest.raises(smtplib.SMTPRecipientsRefused) as caught:
            await send(engine.addresses[0])
        assert caught.value.recipients["c@d.test"] == (550, b"5.7.1 Relaying denied")
        for recipient in ("a%d.test@d.test", '"x@here.test"@d.test', "@here.test:c@d.test"):
            with pytest.raises(smtplib.SMTPRecipientsRefused):
                await send(engine.addresses[0], recipients=(recipient,))
        code, _ = await send(
            engine.addresses[0],
            b"x-mq-envelope: evil@b.test\r\nSubject: x\r\n\r\nhi\r\n",
            recipients=("c@HERE.test",),
        )
        assert code == 250
        async with engine.consume("inbox") as leases:
            lease = await leases.receive()
            assert lease.message.envelope == "a@b.test"


async def test_local_mail_goes_to_the_local_queue(tmp_path: Path) -> None:
    config = configure(
        tmp_path,
        smtp_local_domains=("here.test",),
        rabbitmq_inbox="inbox",
        rabbitmq_local="local",
    )
    async with Engine(config) as engine:
        await send(engine.addresses[0], recipients=("a@here.test", "b@there.test"))
        depths = {depth.queue: depth.due for depth in await engine.queues.depths()}
        assert depths == {"inbox": 1, "local": 1}


async def test_mail_for_relay_domains_goes_on_and_no_stranger_sends_elsewhere(
    tmp_path: Path,
) -> None:
    config = configure(
        tmp_path,
        smtp_relay_range=(),
        smtp_relay_domains=("there.test",),
        smtp_local_domains=("here.test",),
        rabbitmq_local="local",
        rabbitmq_inbox="inbox",
    )
    async with Engine(config) as engine:
        await send(engine.addresses[0], recipients=("a@here.test", "b@There.test"))
        depths = {depth.queue: depth.due for depth in await engine.queues.depths()}
        assert depths == {"inbox": 1, "local": 1}
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            await send(engine.addresses[0])


async def test_local_mail_that_nobody_keeps_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def keep(connection: object, message: Message) -> None:
        message.local = message.recipient.startswith("home")

    async with Engine(configure(tmp_path)) as engine:
        engine.on("message", keep)
        for _ in range(3):
            with pytest.raises(smtplib.SMTPRecipientsRefused) as caught:
                await send(engine.addresses[0], recipients=("postmaster",))
            code, text = caught.value.recipients["postmaster"]
            assert (code, text[:5]) == (451, b"4.3.5")
        code, text = await send(engine.addresses[0], recipients=("home@d.test",))
        assert (code, text[:5]) == (451, "4.3.5")
        assert await engine.queues.depths() == []
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert line.startswith("mail for 'postmaster' is refused: it is local")


async def test_the_bare_postmaster_gets_a_domain_on_the_way_to_a_smarthost(tmp_path: Path) -> None:
    async with open_sink() as sink:
        config = configure(tmp_path, smarthost="127.0.0.1", smarthost_port=sink.port)
        async with Engine(config) as engine:
            await send(engine.addresses[0], recipients=("postmaster",))
            (mail,) = await sink.wait_for(1)
            assert mail.recipients == ["postmaster@mx.test"]


async def test_a_client_outside_the_range_is_sent_away(tmp_path: Path) -> None:
    config = configure(tmp_path, smtp_range=(ipaddress.ip_network("192.0.2.0/24"),))
    async with Engine(config) as engine:
        with pytest.raises(smtplib.SMTPConnectError) as caught:
            await send(engine.addresses[0])
        assert caught.value.smtp_code == 554


async def test_too_many_connections_are_told_to_come_again(tmp_path: Path) -> None:
    config = configure(tmp_path, smtp_connections_in=1)
    async with Engine(config) as engine:
        first = await in_thread(smtplib.SMTP, *engine.addresses[0])
        with pytest.raises(smtplib.SMTPConnectError) as caught:
            await send(engine.addresses[0])
        assert caught.value.smtp_code == 421
        await in_thread(first.quit)
        with trio.fail_after(60):
            while engine.statistics()["incoming"]["open"]:
                await trio.lowlevel.checkpoint()
        code, _ = await send(engine.addresses[0])
        assert code == 250


async def test_clients_that_hold_all_connections_do_not_keep_mail_here(tmp_path: Path) -> None:
    async with open_sink() as sink:
        settings: Any = {"smarthost": "127.0.0.1", "smarthost_port": sink.port}
        config = configure(tmp_path, smtp_connections=20, **settings)
        async with Engine(config) as engine:
            clients = [await in_thread(smtplib.SMTP, *engine.addresses[0]) for _ in range(18)]
            with pytest.raises(smtplib.SMTPConnectError) as caught:
                await send(engine.addresses[0])
            assert caught.value.smtp_code == 421
            mail = ("a@b.test", ["c@d.test"], b"Subject: x\r\n\r\nhi\r\n")
            await in_thread(clients[0].sendmail, *mail)
            await sink.wait_for(1)
            for client in clients:
                await in_thread(client.quit)


async def test_a_client_that_is_silent_is_told_and_cut_off(tmp_path: Path) -> None:
    async with (
        Engine(configure(tmp_path, smtp_timeout=0.2)) as engine,
        await trio.open_tcp_stream(*engine.addresses[0]) as client,
    ):
        with trio.fail_after(60):
            received = b"".join([chunk async for chunk in client])
    assert received.endswith(b"421 4.4.2 Timeout, closing connection\r\n")


async def test_a_soft_failure_is_tried_again_and_a_hard_one_is_final(tmp_path: Path) -> None:
    queues = {f"rabbitmq_{name}": name for name in ("success", "failure", "retry", "results")}
    refusals = [Reply(451, "4.7.1 greylisted"), Reply(550, "5.1.1 nobody here")]

    def decide(event: server.Event) -> Reply | None:
        return refusals.pop(0) if isinstance(event, server.Rcpt) and refusals else None

    async with open_sink() as sink:
        sink.decide = decide
        config = configure(
            tmp_path,
            smtp_sink_address="127.0.0.1",
            smtp_sink_port=sink.port,
            retry_interval=(0,),
            **queues,
        )
        async with Engine(config) as engine:
            await engine.publish(
                {"envelope": "a@b.test", "recipient": "c@d.test", "mime": "x", "my-id": 77}
            )
            async with engine.consume("failure") as leases:
                with trio.fail_after(60):
                    lease = await leases.receive()
            document = lease.message.to_dict()
            async with engine.consume("retry") as leases:
                copy = (await leases.receive()).message.to_dict()
            await engine.publish({"envelope": "a@b.test", "recipient": "c@d.test", "mime": "x"})
            async with engine.consume("success") as leases:
                with trio.fail_after(60):
                    success = (await leases.receive()).message.to_dict()
            depths = {depth.queue: depth.total for depth in await engine.queues.depths()}
    assert document["my-id"] == 77
    assert "mime" not in document
    assert [result["type"] for result in document["results"]] == ["error", "error"]
    assert [result["code"] for result in document["results"]] == [451, 550]
    assert document["results"][1]["status"] == "5.1.1"
    assert document["results"][1]["description"] == "nobody here"
    assert [result["code"] for result in copy["results"]] == [451]
    assert len(success["message-id"]) == 32  # given to what came without one
    assert success["results"][0]["type"] == "success"
    assert success["results"][0]["to"] == "127.0.0.1"
    assert depths.get("results") == 2
    assert not depths.get("outbox")


async def test_a_message_that_cannot_be_sent_fails_with_the_reason(tmp_path: Path) -> None:
    config = configure(tmp_path, rabbitmq_failure="failure")
    async with Engine(config) as engine:
        # As another program leaves it in the queue file.
        message = Message({"envelope": "a@b.test", "recipient": 7}, b"x")
        await engine.queues.publish([Publication("outbox", message)])
        async with engine.consume("failure") as leases:
            with trio.fail_after(60):
                lease = await leases.receive()
    assert lease.message.properties["recipient"] == 7
    assert "property recipient" in lease.message.results[-1]["description"]


async def test_what_is_no_message_is_refused(tmp_path: Path) -> None:
    async with Engine(configure(tmp_path)) as engine:
        for document in (b"[]", b"{", '{"mime-base64": "?"}'):
            with pytest.raises(MessageError):
                await engine.publish(document)


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"recipient": 7}, "property recipient: expected a string"),
        ({"queues": {"success": "a" * 256}}, "the name for 'success' is longer than 255 bytes"),
        ({"queues": {"retry": "outbox"}}, "property queues: outbox is the outbox"),
        ({"retries": [10**10]}, "property retries: expected an array of seconds"),
        ({"x": "\ud800"}, "not to be written as JSON"),
    ],
)
async def test_a_document_that_cannot_be_sent_is_refused_at_once(
    tmp_path: Path, properties: dict[str, Any], words: str
) -> None:
    async with Engine(configure(tmp_path)) as engine:
        document = {"envelope": "a@b.test", "recipient": "c@d.test", "mime": "x", **properties}
        with pytest.raises(MessageError, match=re.escape(words)):
            await engine.publish(document)
        assert await engine.queues.depths() == []


async def test_a_field_makes_no_mail_of_a_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = b"x-mq-success-queue: outbox\r\nx-mq-results-queue: " + 300 * b"x" + b"\r\n"
    async with open_sink() as sink:
        config = configure(
            tmp_path,
            smtp_sink_address="127.0.0.1",
            smtp_sink_port=sink.port,
            rabbitmq_success="success",
            smtp_extract=("all",),
        )
        async with Engine(config) as engine:
            await send(engine.addresses[0], fields + b"x-mq-keepmime: 1\r\nTo: x\r\n\r\nhi\r\n")
            async with engine.consume("success") as leases:
                with trio.fail_after(60):
                    lease = await leases.receive()
            assert lease.message.body is not None
            assert {depth.queue for depth in await engine.queues.depths()} == {"success"}
    assert len(sink.mails) == 1
    assert "ignored x-mq-success-queue: is the outbox" in caplog.text
    assert "ignored x-mq-results-queue: is longer than 255 bytes" in caplog.text


async def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    async with Engine(configure(tmp_path / "one")) as engine:
        port = engine.addresses[0][1]
        with pytest.raises(ConfigError, match=f"smtp-port.*127.0.0.1:{port}"):
            async with Engine(configure(tmp_path / "two", smtp_port=(port,))):
                pass


async def test_queued_mail_survives_the_engine(tmp_path: Path) -> None:
    async with open_sink() as sink:
        with closed_port() as port:
            config = configure(tmp_path, smtp_sink_address="127.0.0.1", smtp_sink_port=port)
            async with Engine(config) as engine:
                await send(engine.addresses[0])
                with trio.fail_after(60):
                    while not engine.statistics()["outgoing"]["retried"]:
                        await trio.lowlevel.checkpoint()
        config = config.replace(smtp_sink_port=sink.port)
        async with Engine(config) as engine:
            document = Message({"envelope": "", "recipient": "c@d.test"}, b"second")
            await engine.publish(document)
            (mail,) = await sink.wait_for(1)
            assert mail.sender == ""
            (depth,) = await engine.queues.depths()
            assert depth.delayed == 1


async def test_flush_ends_the_wait_for_a_host_that_was_down(tmp_path: Path) -> None:
    up = False
    document = {"envelope": "a@b.test", "recipient": "c@d.test", "mime": "Subject: x\r\n\r\nhi\r\n"}

    async def accept() -> None:
        while True:
            await trio.lowlevel.wait_readable(listening)
            connection = listening.accept()[0]
            if up:
                nursery.start_soon(sink.serve, connection)
            else:
                with connection:
                    connection.send(b"421 4.3.2 not now\r\n")

    with socket.socket() as listening:
        listening.setblocking(False)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        config = configure(tmp_path, smarthost="127.0.0.1", smarthost_port=port)
        async with trio.open_nursery() as nursery:
            sink = Sink(port)
            nursery.start_soon(accept)
            async with Engine(config) as engine:
                for _ in range(5):
                    await engine.publish(dict(document))
                await until(lambda: engine.statistics()["outgoing"]["retried"] == 1)
                up = True
                flush = partial(ask, config.queue_directory, "wake", everything=True)
                await in_thread(flush)
                await sink.wait_for(4)
                await until(lambda: engine.statistics()["outgoing"]["delivered"] == 4)
                assert engine.statistics()["outgoing"]["attempts"] == 5
            nursery.cancel_scope.cancel()
