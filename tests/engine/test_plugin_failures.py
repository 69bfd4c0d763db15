"""Plugins that fail for some recipients of a mail: after a 250 every message is in a queue."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq import Engine
from mailerq.errors import QueueError
from mailerq.message import Message
from mailerq.plugins import Connection, Reject
from tests.engine.kit import open_dialog, serve
from tests.support import DEADLINE, compile_plugin

PLUGIN = r"""
#include <mailerq.h>
#include <json-c/json.h>
#include <cstring>
#include <stdexcept>

MQ_EXPORT int mq_version() { return MQ_API_VERSION; }

MQ_EXPORT bool mq_smtp_in_message(MQ_Context *context, MQ_SmtpConnection *connection,
                                  MQ_Message *message)
{
    const char *recipient = MQ_Recipient(message);
    auto is = [recipient](const char *name) { return !strncmp(recipient, name, strlen(name)); };
    if (is("redirected")) MQ_SetRecipient(message, "elsewhere@d.test", 16);
    if (is("later") || is("redirected")) MQ_Reject(connection, 452, "4.2.2 full");
    if (is("never")) MQ_Reject(connection, 550, "5.1.1 gone");
    if (is("throws")) throw std::runtime_error("no");
    if (is("retries")) MQ_Retry(context);
    if (is("wrongtype"))
        json_object_object_add(MQ_Json(message), "tags", json_object_new_int(5));
    return is("retries") || is("hangs");
}
"""

TEMPORARY = {
    "later": (452, "4.2.2"),
    "redirected": (452, "4.2.2"),
    "throws": (451, "4.3.0"),
    "retries": (451, "4.3.0"),
    "wrongtype": (451, "4.3.0"),
    "hangs": (451, "4.3.0"),
    "raises": (451, "4.3.0"),
}
PERMANENT = {"never": (550, "5.1.1")}
FAILURES = TEMPORARY | PERMANENT


@pytest.fixture(scope="session")
def failing(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("failing") / "plugins"
    compile_plugin(directory, "failing.cpp", PLUGIN)
    return str(directory)


def handler(connection: Connection, message: Message) -> Reject | None:
    if message.recipient.startswith("raises"):
        raise ZeroDivisionError
    return None


@asynccontextmanager
async def failing_engine(directory: Path, plugins: str, **settings: Any) -> AsyncIterator[Engine]:
    defaults = {"plugin_directory": plugins, "plugin_timeout": 0.1, "rabbitmq_failure": "failure"}
    async with serve(directory, **{**defaults, **settings}) as engine:
        engine.on("message", handler)
        yield engine


async def drain(engine: Engine, queue: str) -> list[Message]:
    """Everything that is in a queue now."""
    depths = {depth.queue: depth.total for depth in await engine.queues.depths()}
    messages = []
    with trio.fail_after(DEADLINE):
        async with engine.consume(queue) as leases:
            for _ in range(depths.get(queue, 0)):
                lease = await leases.receive()
                messages.append(lease.message)
                await engine.ack(lease)
    return messages


def addresses(messages: list[Message]) -> list[str]:
    return sorted(message.recipient for message in messages)


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("name", FAILURES)
async def test_a_recipient_that_fails_beside_others_becomes_a_failure(
    tmp_path: Path, failing: str, caplog: pytest.LogCaptureFixture, name: str, position: int
) -> None:
    code, status = FAILURES[name]
    recipients = ["a@d.test", "b@d.test"]
    recipients.insert(position, f"{name}@d.test")
    async with (
        failing_engine(tmp_path, failing) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        reply = await dialog.mail(*recipients)
        assert reply.startswith("250-2.0.0 Message accepted for some recipients\n")
        assert f"{code} {name}@d.test" in reply
        assert addresses(await drain(engine, "inbox")) == ["a@d.test", "b@d.test"]
        (failure,) = await drain(engine, "failure")
        assert engine.statistics()["incoming"]["failed_recipients"] == 1
    assert (failure.envelope, failure.recipient) == ("a@b.test", f"{name}@d.test")
    (result,) = failure.results
    assert (result["code"], result["status"]) == (code, status)
    assert (result["type"], result["state"], result["result"]) == ("error", "process", "error")
    # What may be tried again can be: nobody else has the mail.
    if name in TEMPORARY:
        assert failure.body is not None
        assert failure.body.endswith(b"hi\r\n")
    else:
        assert failure.body is None
    (line,) = [
        text
        for logger, level, text in caplog.record_tuples
        if (logger, level) == ("mailerq.server", logging.WARNING)
    ]
    assert f"for 1 of 3 recipients after others were taken: {failure.properties['message-id']}" in (
        line
    )
    assert f"<{name}@d.test> {code} {status}" in line


@pytest.mark.parametrize("name", FAILURES)
async def test_when_all_recipients_fail_nothing_is_written(
    tmp_path: Path, failing: str, name: str
) -> None:
    async with (
        failing_engine(tmp_path, failing) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        code, status = FAILURES[name]
        assert (await dialog.mail(f"{name}@d.test")).startswith(f"{code} {status}")
        for pair in ((f"{name}@d.test", "never@d.test"), ("never@d.test", f"{name}@d.test")):
            assert (await dialog.mail(*pair)).startswith(f"{code} ")
        assert await engine.queues.depths() == []


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("name", FAILURES)
async def test_lmtp_answers_for_each_recipient(
    tmp_path: Path, failing: str, name: str, position: int
) -> None:
    recipients = ["a@d.test", "b@d.test"]
    recipients.insert(position, f"{name}@d.test")
    async with (
        failing_engine(tmp_path, failing, lmtp_port=(0,)) as engine,
        open_dialog(engine.addresses[-1], hello="LHLO c.test") as dialog,
    ):
        replies = [await dialog.mail(*recipients), await dialog.reply(), await dialog.reply()]
        expected = [250, 250]
        expected.insert(position, FAILURES[name][0])
        assert [int(reply[:3]) for reply in replies] == expected
        assert addresses(await drain(engine, "inbox")) == ["a@d.test", "b@d.test"]
        assert await drain(engine, "failure") == []


@pytest.mark.parametrize("name", TEMPORARY)
async def test_where_no_queue_would_tell_a_4xx_is_the_reply_for_all(
    tmp_path: Path, failing: str, name: str
) -> None:
    async with (
        failing_engine(tmp_path, failing, rabbitmq_failure="") as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        code, status = FAILURES[name]
        for pair in (("a@d.test", f"{name}@d.test"), (f"{name}@d.test", "a@d.test")):
            assert (await dialog.mail(*pair)).startswith(f"{code} {status}")
        assert await engine.queues.depths() == []
        # A 5xx is final, and is in the log.
        assert (await dialog.mail("a@d.test", "never@d.test")).startswith("250")
        assert addresses(await drain(engine, "inbox")) == ["a@d.test"]


async def test_results_get_a_failure_as_well_and_keepmime_holds(
    tmp_path: Path, failing: str
) -> None:
    body = b"x-mq-keepmime: 1\r\nSubject: x\r\n\r\nhi\r\n"
    async with (
        failing_engine(
            tmp_path, failing, rabbitmq_results="results", smtp_extract=("all",)
        ) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        assert (await dialog.mail("a@d.test", "never@d.test", body=body)).startswith("250")
        written = [await drain(engine, queue) for queue in ("results", "failure")]
    for messages in written:
        (message,) = messages
        assert message.recipient == "never@d.test"
        assert message.body is not None


async def test_every_recipient_of_a_crowd_is_somewhere(
    tmp_path: Path, failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"{name}{number}@d.test" for name in ("later", "never", "a") for number in range(30)]
    async with (
        failing_engine(tmp_path, failing) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        assert (await dialog.mail(*names)).startswith("250")
        found = [*await drain(engine, "inbox"), *await drain(engine, "failure")]
    assert addresses(found) == sorted(names)
    (line,) = [text for text in caplog.messages if "after others were taken" in text]
    assert "for 60 of 90 recipients" in line
    assert "and 50 more" in line


async def test_a_queue_that_fails_takes_no_failure_either(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(publications: object) -> None:
        raise QueueError("no")

    async with (
        failing_engine(tmp_path, failing) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        monkeypatch.setattr(engine.queues, "publish", fail)
        assert (await dialog.mail("a@d.test", "never@d.test")).startswith("451")
        assert engine.statistics()["incoming"]["failed_recipients"] == 0
