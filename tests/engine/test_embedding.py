"""A program with an embedded engine: its checks, its errors, its figures."""

from __future__ import annotations

import email.message
import json
import subprocess
import sys
import typing
import weakref
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import mailerq
from mailerq import Connection, Engine, EngineError, Message, MessageError, QueueDamaged, Reject
from mailerq.plugins import EVENTS
from mailerq.queues import Publication
from mailerq.turns import EndOfTurn
from tests.engine.kit import open_dialog, serve
from tests.support import ROOT, configure, open_sink, send

GOOD = {"envelope": "a@b.test", "recipient": "c@d.test", "mime": "Subject: hi\r\n\r\nhi\r\n"}

NEVER_SENT: list[tuple[dict[str, Any], str]] = [
    ({"recipient": 7}, "property recipient: expected a string, found a number"),
    ({"recipient": None}, "property recipient: is missing"),
    ({"recipient": "nobody"}, "property recipient: 'nobody' has no @"),
    ({"recipient": "c@d.test>\r\nDATA"}, "property recipient: "),
    ({"envelope": "a@b..test"}, "property envelope: 'b..test' is not a domain"),
    ({"mime": None}, "property mime: is missing"),
    ({"mime": ["x"]}, "property mime: expected a string or an object, found an array"),
    ({"mime": {"content": {"blocks": []}}}, "property mime.content: is an object"),
    ({"mime": "Received: x\r\n" * 101 + "\r\n"}, "property mime: has more than 100 Received"),
    ({"delayed": "tomorrow"}, "property delayed: 'tomorrow' is not a time"),
    ({"maxdelivertime": "2001-01-01 00:00:00"}, "property maxdelivertime: 2001-01-01 00:00:00 has"),
    ({"seen": "2001-01-01 00:00:00"}, "property seen: 2001-01-01 00:00:00 is longer ago"),
    ({"queues": {"success": "a" * 256}}, "property queues: "),
    ({"queues": {"success": "outbox"}}, "property queues: outbox is the outbox"),
    ({"smarthost": {"port": 25}}, "property smarthost: has no hostname"),
    ({"smarthost": {"hostname": "not a host"}}, "property smarthost: 'not a host' is not a domain"),
    ({"smarthost": {"hostname": "h.test", "port": 70000}}, "property smarthost: port is no port"),
    ({"ips": ["mx.test"]}, "property ips: 'mx.test' is no IP address"),
    ({"ips": ["10.0.0"]}, "property ips: "),
    ({"security": "sometimes"}, "property security: "),
]


@pytest.mark.parametrize(("properties", "words"), NEVER_SENT)
async def test_what_could_never_be_sent_is_refused_when_it_is_published(
    tmp_path: Path, properties: dict[str, Any], words: str
) -> None:
    async with Engine(configure(tmp_path)) as engine:
        with pytest.raises(MessageError) as refused:
            await engine.publish({**GOOD, **properties})
        assert str(refused.value).startswith(words)
        assert await engine.queues.depths() == []


async def test_publish_and_delivery_refuse_the_same_documents(tmp_path: Path) -> None:
    documents = [{**GOOD, **properties} for properties, _ in NEVER_SENT]
    async with Engine(configure(tmp_path, rabbitmq_failure="failure")) as engine:
        # As another program leaves them in the queue file.
        await engine.queues.publish(
            [Publication("outbox", Message.from_dict(document)) for document in documents]
        )
        with trio.fail_after(60):
            async with engine.consume("failure") as leases:
                for _ in documents:
                    await engine.ack(await leases.receive())
        assert await engine.queues.depths() == []


async def test_other_queues_take_documents_that_are_no_mail(tmp_path: Path) -> None:
    async with Engine(configure(tmp_path)) as engine:
        await engine.publish({"what": "a note"}, queue="notes")
        with pytest.raises(TypeError, match="expected a Message, JSON or a dict, found int"):
            await engine.publish(7, queue="notes")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="due: expected seconds since 1970, found nan"):
            await engine.publish({"what": "a note"}, queue="notes", due=float("nan"))
        assert [depth.total for depth in await engine.queues.depths()] == [1]


async def test_a_body_may_be_bytes(tmp_path: Path) -> None:
    mail = email.message.EmailMessage()
    mail["Subject"] = "hi"
    mail.set_content("hello")
    body = mail.as_bytes(policy=mail.policy.clone(linesep="\r\n"))
    async with (
        open_sink() as sink,
        Engine(
            configure(tmp_path, smtp_sink_address="127.0.0.1", smtp_sink_port=sink.port)
        ) as engine,
    ):
        await engine.publish({**GOOD, "mime": body})
        (sent,) = await sink.wait_for(1)
    assert sent.body == body


async def test_an_engine_says_what_it_has_done_before_while_and_after_it_runs(
    tmp_path: Path,
) -> None:
    engine = Engine(configure(tmp_path, rabbitmq_inbox="inbox"))
    before = engine.statistics()
    assert (before["started"], before["listening"], engine.addresses) == (None, [], [])
    assert before["incoming"]["messages"] == before["outgoing"]["delivered"] == 0
    async with engine:
        await send(engine.addresses[0])
        running = engine.statistics()
    after = engine.statistics()
    assert after["started"] == running["started"] is not None
    assert after["incoming"]["messages"] == running["incoming"]["messages"] == 1
    assert (after["listening"], engine.addresses) == ([], [])
    assert engine.statistics()["uptime"] == after["uptime"]
    assert before.keys() == running.keys() == after.keys()
    for part in ("incoming", "outgoing"):
        assert before[part].keys() <= running[part].keys() == after[part].keys()
    json.dumps([before, running, after])
    for call in (lambda: engine.consume("inbox"), engine.reload):
        with pytest.raises(RuntimeError, match="does not run"):
            call()
    with pytest.raises(RuntimeError, match="does not run"):
        await engine.publish(GOOD)


async def test_an_engine_that_could_not_start_has_done_nothing(tmp_path: Path) -> None:
    async with serve(tmp_path / "one") as running:
        engine = Engine(configure(tmp_path / "two", smtp_port=(running.addresses[0][1],)))
        with pytest.raises(mailerq.ConfigError):
            async with engine:
                raise AssertionError("it runs")
        assert engine.statistics()["started"] is None
        with pytest.raises(RuntimeError, match="does not run"):
            await engine.publish(GOOD)


async def test_an_engine_can_run_again_with_its_handlers(tmp_path: Path) -> None:
    seen: list[str | None] = []
    engine = Engine(configure(tmp_path, rabbitmq_inbox="inbox"))
    engine.on("mailfrom", lambda connection, sender: seen.append(connection.helo))
    for _ in range(2):
        async with engine:
            await send(engine.addresses[0])
            assert engine.statistics()["incoming"]["messages"] == 1
    assert seen == ["client.test", "client.test"]


@pytest.mark.parametrize(
    ("error", "wanted", "words"),
    [
        (ZeroDivisionError("oh"), EngineError, "the engine had to end: ZeroDivisionError: oh"),
        (QueueDamaged("broken"), QueueDamaged, "broken"),
    ],
)
async def test_what_ends_an_engine_comes_as_one_plain_error(
    tmp_path: Path, error: Exception, wanted: type[Exception], words: str
) -> None:
    async def fail() -> None:
        raise error

    with pytest.raises(wanted, match=words) as raised:  # noqa: PT012
        async with Engine(configure(tmp_path)) as engine:
            engine._nursery.start_soon(fail)
            await trio.sleep_forever()
    assert isinstance(raised.value.__cause__, ExceptionGroup)
    assert isinstance(raised.value, mailerq.MailerqError)


async def test_what_keeps_an_engine_from_starting_comes_as_one_plain_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(*arguments: object, task_status: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("mailerq.net.control.serve", serve)
    engine = Engine(configure(tmp_path))
    with pytest.raises(EngineError, match="the engine had to end: OSError: no room"):
        async with engine:
            raise AssertionError("it runs")
    assert engine.statistics()["started"] is None
    with pytest.raises(RuntimeError, match="does not run"):
        await engine.publish(GOOD)


async def test_an_error_of_the_program_itself_leaves_as_it_came(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with Engine(configure(tmp_path)):
            raise ZeroDivisionError


async def test_a_program_that_is_cancelled_ends_its_engine(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        async with Engine(configure(tmp_path)) as engine:
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert engine.addresses == []


@pytest.mark.parametrize("publishes", [False, True])
async def test_an_engine_leaves_the_loop_of_its_program_alone(
    tmp_path: Path, publishes: bool
) -> None:
    async with Engine(configure(tmp_path)) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            assert await dialog.codes("EHLO c.test", "QUIT") == [250, 221]
        if publishes:
            await engine.queues.publish([Publication("other", Message.from_dict(GOOD))])
    await trio.testing.wait_all_tasks_blocked()
    end: Any = EndOfTurn.of_this_loop()
    with pytest.raises(KeyError):  # what trio says of an instrument that it does not have
        trio.lowlevel.remove_instrument(end)


async def test_a_handler_knows_the_client_behind_a_proxy(tmp_path: Path) -> None:
    clients: list[tuple[str | None, int]] = []
    engine = Engine(configure(tmp_path, smtp_proxy=("127.0.0.1",)))
    engine.on("connect", lambda connection: clients.append((connection.address, connection.port)))
    async with engine, open_dialog(engine.addresses[0], greeted=False) as dialog:
        await dialog.send(b"PROXY TCP6 2001:db8::7 2001:db8::1 4711 25\r\n")
        assert (await dialog.reply()).startswith("220")
    assert clients == [("2001:db8::7", 4711)]


async def test_a_handler_keeps_what_it_knows_of_a_client_by_its_connection(
    tmp_path: Path,
) -> None:
    counts: weakref.WeakKeyDictionary[Connection, int] = weakref.WeakKeyDictionary()

    def count(connection: Connection, recipient: str) -> Reject | None:
        counts[connection] = counts.get(connection, 0) + 1
        return Reject(452, "4.5.3 Too many recipients") if counts[connection] > 2 else None

    engine = Engine(configure(tmp_path, rabbitmq_inbox="inbox"))
    engine.on("rcptto", count)
    async with engine:
        for _ in range(2):
            async with open_dialog(engine.addresses[0]) as dialog:
                rcpt = "RCPT TO:<c@d.test>"
                assert await dialog.codes("MAIL FROM:<>", rcpt, rcpt, rcpt) == [250, 250, 250, 452]


def test_the_events_of_handlers_are_those_of_plugins() -> None:
    header = (ROOT / "include" / "mailerq.h").read_text()
    assert all(f" mq_smtp_in_{name}(" in header or f" mq_smtp_{name}(" in header for name in EVENTS)
    assert header.count("\nMQ_EXPORT bool mq_smtp_") == len(EVENTS)
    *overloads, last = typing.get_overloads(Engine.on)
    assert typing.get_type_hints(last)["event"] is mailerq.EventName
    named = [
        name
        for overload in overloads
        for name in typing.get_args(typing.get_type_hints(overload)["event"])
    ]
    assert sorted(named) == sorted(EVENTS)


def test_importing_the_package_imports_no_module_of_it() -> None:
    code = "import sys, mailerq; print(*(name for name in sys.modules if name[:8] == 'mailerq.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.split() == []


def test_each_public_name_is_there() -> None:
    assert all(getattr(mailerq, name) is not None for name in mailerq.__all__)
