"""No mail is part of a reference cycle: its objects are freed at once, not by Python's search."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from mailerq import Engine
from mailerq.errors import QueueError
from mailerq.message import Message
from mailerq.outbound import flow
from mailerq.plugins import Reject
from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.engine.kit import Dialog, open_dialog
from tests.support import closed_port, configure, open_sink

MAILS = 20

BIG = b"Subject: x\r\n\r\n" + 30_000 * (70 * b"x" + b"\r\n")

Scenario = Callable[[Engine, Dialog], Awaitable[None]]


def answer(event: server.Event) -> Reply | None:
    """What the sink says: some recipients there are not, and some are for later."""
    if isinstance(event, server.Rcpt):
        if event.recipient.startswith("bad"):
            return Reply(550, "5.1.1 nobody here")
        if event.recipient.startswith("later"):
            return Reply(450, "4.2.1 not now")
    return None


@asynccontextmanager
async def running(directory: Path, **settings: Any) -> AsyncIterator[Engine]:
    async with open_sink() as sink:
        sink.decide = answer
        defaults = {
            "smtp_sink_address": "127.0.0.1",
            "smtp_sink_port": sink.port,
            "rabbitmq_results": "results",
            "rabbitmq_retry": "retry",
        }
        async with Engine(configure(directory, **(defaults | settings))) as engine:
            yield engine


async def settle(engine: Engine, attempts: int) -> None:
    """Wait until so many attempts were made and nothing is under way."""
    with trio.fail_after(60):
        while (figures := engine.statistics()["outgoing"])["attempts"] < attempts:  # noqa: ASYNC110
            await trio.sleep(0.01)
        while figures["unsettled"] or figures["waiting"]:
            await trio.sleep(0.01)
            figures = engine.statistics()["outgoing"]
    await trio.testing.wait_all_tasks_blocked(0.01)


async def garbage_of(repeat: Callable[[], Awaitable[None]]) -> Counter[str]:
    """The types of what only the search for cycles finds after something was done many times."""
    await repeat()  # what is made once
    gc.collect()
    gc.disable()
    try:
        await repeat()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found = Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    # What stands there a few times has nothing to do with mail.
    return Counter({name: count for name, count in found.items() if count >= MAILS})


async def over_one_connection(engine: Engine, dialog: Dialog) -> None:
    await dialog.mail("c@d.test", "bad@d.test", "later@d.test")


async def over_new_connections(engine: Engine, dialog: Dialog) -> None:
    async with open_dialog(engine.addresses[0]) as other:
        await other.mail("c@d.test", "bad@d.test", "later@d.test")
        await other.say("QUIT")


async def large(engine: Engine, dialog: Dialog) -> None:
    assert (await dialog.mail("c@d.test", "bad@d.test", "later@d.test", body=BIG))[:3] == "250"


async def published(engine: Engine, dialog: Dialog) -> None:
    for name in ("c", "bad", "later"):
        document = {"envelope": "a@b.test", "recipient": f"{name}@d.test", "mime": "x"}
        await engine.publish(document)


@pytest.mark.parametrize(
    ("scenario", "settings"),
    [
        (over_one_connection, {}),
        (over_new_connections, {"connection_maxmessages": 1}),
        (large, {"smtp_spill_size": 100_000}),
        (large, {"smtp_spill_size": 0}),
        (published, {}),
        (published, {"smtp_threads": 2}),
        (published, {"rabbitmq_qos": 1}),
    ],
    ids=["one", "new", "spilled", "large", "published", "threads", "file"],
)
async def test_mail_that_comes_and_goes_leaves_no_cycle(
    tmp_path: Path, scenario: Scenario, settings: dict[str, Any]
) -> None:
    async with running(tmp_path, **settings) as engine, open_dialog(engine.addresses[0]) as dialog:
        attempts = 0

        async def repeat() -> None:
            nonlocal attempts
            attempts += 3 * MAILS
            for _ in range(MAILS):
                await scenario(engine, dialog)
            await settle(engine, attempts)

        assert await garbage_of(repeat) == Counter()
        assert engine.statistics()["outgoing"]["failed"] >= MAILS


async def test_handlers_leave_no_cycle(tmp_path: Path) -> None:
    async def wait(connection: object, message: Message, *more: object) -> Reject | None:
        await trio.lowlevel.checkpoint()
        return Reject(550, "5.7.1 no") if message.recipient.startswith("bad") else None

    async def fail(connection: object, message: Message) -> None:
        if message.recipient.startswith("later"):
            raise ArithmeticError

    async with running(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        for event in ("message", "out_data", "out_sent"):
            engine.on(event, wait)
        engine.on("message", fail)
        attempts = 0

        async def repeat() -> None:
            nonlocal attempts
            attempts += 2 * MAILS
            for _ in range(MAILS):
                await dialog.mail("c@d.test", "bad@d.test", "later@d.test")
                document = {"envelope": "", "recipient": "bad@d.test", "mime": "x"}
                await engine.publish(document)
            await settle(engine, attempts)

        assert await garbage_of(repeat) == Counter()


async def test_mail_for_a_host_that_is_down_leaves_no_cycle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "ASK_SECONDS", 0.1)
    with closed_port() as port:
        async with running(tmp_path, smtp_sink_port=port) as engine:
            attempts = 0

            async def repeat() -> None:
                nonlocal attempts
                attempts += MAILS
                for number in range(MAILS):
                    document = {"envelope": "", "recipient": f"c@d{number}.test", "mime": "x"}
                    await engine.publish(document)
                await settle(engine, attempts)

            assert await garbage_of(repeat) == Counter()


async def test_clients_that_go_within_a_mail_leave_no_cycle(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:

        async def repeat() -> None:
            for _ in range(MAILS):
                async with open_dialog(engine.addresses[0]) as dialog:
                    await dialog.say("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>", "DATA")
                    await dialog.send(BIG[:100_000])
            with trio.fail_after(60):
                while engine.statistics()["incoming"]["open"]:  # noqa: ASYNC110
                    await trio.sleep(0.01)

        assert await garbage_of(repeat) == Counter()


async def test_mail_that_the_queue_does_not_take_leaves_no_cycle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, smtp_client_errors=0) as engine:

        def fail(batch: object) -> None:
            raise QueueError("the disk is tired")

        monkeypatch.setattr(engine.queues._file, "write", fail)  # type: ignore[attr-defined]

        async def repeat() -> None:
            for _ in range(MAILS):
                async with open_dialog(engine.addresses[0]) as dialog:
                    assert (await dialog.mail("c@d.test"))[:3] == "451"
                    with suppress(QueueError):
                        await published(engine, dialog)

        assert await garbage_of(repeat) == Counter()
        monkeypatch.undo()
