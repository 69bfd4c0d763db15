"""Plugins in the whole engine: every callback at its time, and what each may change."""

from __future__ import annotations

import logging
import re
import smtplib
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq import Engine
from mailerq.errors import PluginError
from mailerq.inbound import listener
from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.support import (
    ROOT,
    compile_plugin,
    configure,
    in_thread,
    open_sink,
    send,
    until,
)

POLICY = r"""
#include <mailerq.h>
#include <string.h>

static bool starts(const char *text, const char *with)
{
    return strncmp(text, with, strlen(with)) == 0;
}

MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }

MQ_EXPORT bool mq_smtp_in_mailfrom(MQ_Context *context, MQ_SmtpConnection *connection,
                                   const char *mailfrom, size_t size)
{
    (void)context; (void)size;
    if (starts(mailfrom, "refused@")) MQ_Reject(connection, 550, "not you");
    if (starts(mailfrom, "later@")) MQ_Reject(connection, 451, "4.7.5 come\r\nagain");
    if (starts(mailfrom, "friend@")) MQ_SetSmtpAuthenticated(connection, true);
    if (starts(mailfrom, "raw@")) MQ_SmtpSend(connection, "250-raw\r\n", 9);
    if (starts(mailfrom, "bye@")) MQ_Reject(connection, 421, "bye");
    return false;
}

MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size)
{
    (void)size;
    if (starts(rcptto, "nobody@")) {
        MQ_Reject(connection, 550, "5.1.1 nobody");
        MQ_Continue(context);
        return true;
    }
    MQ_Complete(context);
    return true;
}

MQ_EXPORT bool mq_smtp_in_data(MQ_Context *context, MQ_SmtpConnection *connection,
                               const char *mime, size_t size)
{
    (void)context;
    if (size > 4 && memcmp(mime, "EVIL", 4) == 0) MQ_Reject(connection, 554, "evil");
    return false;
}

MQ_EXPORT bool mq_smtp_in_message(MQ_Context *context, MQ_SmtpConnection *connection,
                                  MQ_Message *message)
{
    (void)context;
    if (starts(MQ_Recipient(message), "full@")) MQ_Reject(connection, 452, "full");
    if (starts(MQ_Recipient(message), "gone@")) MQ_Reject(connection, 550, "gone");
    if (starts(MQ_Recipient(message), "old@")) {
        MQ_SetRecipient(message, "new@d.test", 10);
        MQ_SetEnvelope(message, "", 0);
        MQ_SetMime(message, "changed\r\n", 9);
    }
    if (starts(MQ_Recipient(message), "local@")) MQ_SetLocal(message, true);
    return false;
}

MQ_EXPORT bool mq_smtp_out_data(MQ_Context *context, MQ_SmtpConnection *connection,
                                MQ_Message *message)
{
    (void)context;
    if (starts(MQ_Recipient(message), "stop@")) MQ_Reject(connection, 554, "5.7.9 stop");
    if (starts(MQ_Recipient(message), "rewrite@")) MQ_SetMime(message, "out\n.\n", 6);
    return false;
}
"""


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("policy") / "plugins"
    compile_plugin(directory, "policy.c", POLICY)
    return str(directory)


@pytest.fixture(scope="session")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("trace") / "plugins"
    compile_plugin(directory, "trace.c", (ROOT / "plugins" / "trace.c").read_text())
    return str(directory)


async def test_every_callback_is_called_at_its_moment(
    tmp_path: Path, trace: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mailerq.plugins")
    async with open_sink() as sink:
        config = configure(
            tmp_path,
            plugin_directory=trace,
            smtp_sink_address="127.0.0.1",
            smtp_sink_port=sink.port,
        )
        async with Engine(config) as engine:
            await send(engine.addresses[0], recipients=("c@d.test", "e@f.test"))
            await sink.wait_for(2)
    lines = [record.getMessage().removeprefix("[trace.so] ") for record in caplog.records]
    pattern = re.compile(r"(?:worker \d+: |\d+/[\d-]+ )?((?:in_|out_|context_)?[a-z]+)")
    names = [match[1] for line in lines if (match := pattern.match(line))]
    assert [name for name in names if name.startswith("in_")] == [
        "in_connect",
        "in_mailfrom",
        "in_rcptto",
        "in_rcptto",
        "in_data",
        "in_message",
        "in_message",
        "in_close",
    ]
    outgoing = [name for name in names if name.startswith("out_")]
    assert sorted(outgoing) == ["out_data", "out_data", "out_sent", "out_sent"]
    assert outgoing.index("out_data") < outgoing.index("out_sent")
    assert names[:3] == ["initialize", "context_initialize", "in_connect"]
    assert names[-2:] == ["context_cleanup", "cleanup"]


async def test_a_plugin_may_refuse_in_each_event(tmp_path: Path, policy: str) -> None:
    config = configure(
        tmp_path, plugin_directory=policy, rabbitmq_inbox="inbox", rabbitmq_failure="failure"
    )
    async with Engine(config) as engine:
        address = engine.addresses[0]
        with pytest.raises(smtplib.SMTPSenderRefused) as sender:
            await send(address, sender="refused@b.test")
        assert (sender.value.smtp_code, sender.value.smtp_error) == (550, b"5.7.1 not you")
        with pytest.raises(smtplib.SMTPSenderRefused) as sender:
            await send(address, sender="later@b.test")
        assert sender.value.smtp_code == 451
        assert b"come\nagain" in sender.value.smtp_error.replace(b"\n4.7.5 ", b"\n")
        with pytest.raises(smtplib.SMTPRecipientsRefused) as recipient:
            await send(address, recipients=("nobody@d.test",))
        assert recipient.value.recipients["nobody@d.test"] == (550, b"5.1.1 nobody")
        assert (await send(address, b"EVIL: x\r\n\r\nhi\r\n"))[0] == 554
        assert await send(address, recipients=("full@d.test",)) == (452, "4.3.1 full")
        code, text = await send(address, recipients=("full@d.test", "c@d.test"))
        assert code == 250
        assert "some recipients" in text
        assert "452 full@d.test" in text
        depths = {depth.queue: depth.total for depth in await engine.queues.depths()}
        assert depths == {"inbox": 1, "failure": 1, "outbox": 1}, "a report to the sender"
        # One that may be tried again speaks for all, in whichever order they come.
        for recipients in (("full@d.test", "gone@d.test"), ("gone@d.test", "full@d.test")):
            assert (await send(address, recipients=recipients))[0] == 452


async def test_a_421_of_a_plugin_ends_the_session(tmp_path: Path, policy: str) -> None:
    async with Engine(configure(tmp_path, plugin_directory=policy)) as engine:
        with pytest.raises((smtplib.SMTPServerDisconnected, smtplib.SMTPSenderRefused)):
            await send(engine.addresses[0], sender="bye@b.test")


async def test_a_plugin_may_let_a_stranger_relay_and_send_bytes(
    tmp_path: Path, policy: str
) -> None:
    config = configure(
        tmp_path, plugin_directory=policy, smtp_relay_range=(), rabbitmq_inbox="inbox"
    )
    async with Engine(config) as engine:
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            await send(engine.addresses[0])
        assert (await send(engine.addresses[0], sender="friend@b.test"))[0] == 250

        def raw() -> bytes:
            with smtplib.SMTP(*engine.addresses[0]) as client:
                client.ehlo()
                return client.mail("raw@b.test")[1]

        assert await in_thread(raw) == b"raw\n2.1.0 Ok"


async def test_what_a_plugin_leaves_in_a_message_is_published(tmp_path: Path, policy: str) -> None:
    config = configure(
        tmp_path, plugin_directory=policy, rabbitmq_inbox="inbox", rabbitmq_local="local"
    )
    async with Engine(config) as engine:
        await send(engine.addresses[0], recipients=("old@d.test", "local@d.test"))
        async with engine.consume("inbox") as leases:
            message = (await leases.receive()).message
        async with engine.consume("local") as leases:
            local = (await leases.receive()).message
    assert (message.envelope, message.recipient, message.body) == ("", "new@d.test", b"changed\r\n")
    assert local.recipient == "local@d.test"
    assert local.body is not None
    assert local.body.endswith(b"hello\r\n")


async def test_a_plugin_changes_one_attempt_and_a_retry_keeps_the_original(
    tmp_path: Path, policy: str
) -> None:
    refusals = [Reply(451, "4.2.0 again")]

    def decide(event: server.Event) -> Reply | None:
        return refusals.pop() if isinstance(event, server.Content) and refusals else None

    async with open_sink() as sink:
        sink.decide = decide
        config = configure(
            tmp_path,
            plugin_directory=policy,
            smtp_sink_address="127.0.0.1",
            smtp_sink_port=sink.port,
            retry_interval=(0,),
            rabbitmq_success="success",
        )
        async with Engine(config) as engine:
            await engine.publish(
                {
                    "envelope": "a@b.test",
                    "recipient": "rewrite@d.test",
                    "mime": "original\r\n",
                    "keepmime": True,
                }
            )
            (mail,) = await sink.wait_for(1)
            async with engine.consume("success") as leases:
                with trio.fail_after(60):
                    message = (await leases.receive()).message
    assert mail.body == b"out\r\n.\r\n"
    assert message.body == b"original\r\n"
    assert [result["type"] for result in message.results] == ["error", "success"]


async def test_a_plugin_stops_an_outgoing_message(tmp_path: Path, policy: str) -> None:
    async with open_sink() as sink:
        config = configure(
            tmp_path,
            plugin_directory=policy,
            smtp_sink_address="127.0.0.1",
            smtp_sink_port=sink.port,
            rabbitmq_failure="failure",
        )
        async with Engine(config) as engine:
            await engine.publish(
                {"envelope": "a@b.test", "recipient": "stop@d.test", "mime": "x\r\n"}
            )
            async with engine.consume("failure") as leases:
                with trio.fail_after(60):
                    message = (await leases.receive()).message
        assert sink.mails == []
    (result,) = message.results
    assert (result["code"], result["status"], result["state"]) == (554, "5.7.9", "data")


async def test_plugin_statistics_are_in_the_engines(tmp_path: Path, policy: str) -> None:
    config = configure(tmp_path, plugin_directory=policy, rabbitmq_inbox="inbox")
    async with Engine(config) as engine:
        await send(engine.addresses[0])
        figures = engine.statistics()["plugins"]["policy.so"]
    rows = {name.removeprefix("mq_smtp_in_"): row for name, row in figures.items()}
    assert rows["mailfrom"]["calls"] == 1
    assert rows["rcptto"]["calls"] == 1


async def test_a_bad_plugin_stops_the_start_and_closes_the_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports: list[listener.Port] = []

    def bind(*arguments: Any, **more: Any) -> list[listener.Port]:
        ports.extend(listener.bind(*arguments, **more))
        return ports

    monkeypatch.setattr("mailerq.engine.bind", bind)
    plugins = tmp_path / "plugins"
    compile_plugin(plugins, "bad.c", "int mq_version(void) { return 99; }")
    config = configure(tmp_path, plugin_directory=str(plugins))
    with pytest.raises(PluginError, match=r"bad\.so.*99"):
        async with Engine(config):
            pass
    # A look at the port itself might find another program, which has got its number.
    assert [port.sock.fileno() for port in ports] == [-1]


async def test_a_stop_does_not_wait_for_a_plugin_that_keeps_its_events(tmp_path: Path) -> None:
    source = """
        #include <mailerq.h>
        MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }
        MQ_EXPORT bool mq_smtp_in_close(MQ_Context *context, MQ_SmtpConnection *connection)
        { return context && connection; }
    """
    compile_plugin(tmp_path / "plugins", "keep.c", source)
    config = configure(
        tmp_path,
        plugin_directory=str(tmp_path / "plugins"),
        shutdown_timeout=0.2,
        rabbitmq_inbox="inbox",
    )
    async with Engine(config) as engine:
        await send(engine.addresses[0])
        await until(lambda: bool(engine.statistics()["plugins"]["keep.so"]))
        start = trio.current_time()
    assert trio.current_time() - start < 10
