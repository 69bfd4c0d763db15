"""Handlers in Python: the same events after the C plugins, with the same powers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq import Engine
from mailerq.message import Message
from mailerq.plugins import GIVEN_UP, Connection, Plugins, Reject
from tests.plugins.kit import Calls, Scripted, names
from tests.support import configure

NOBODY = "a@b.test"


@pytest.fixture
def plugins() -> Plugins:
    return Plugins.load(None, timeout=30)


async def open_connection(plugins: Plugins) -> Connection:
    return (await plugins.open_context()).connection(-1)


async def test_events_nobody_listens_to_make_no_object(plugins: Plugins) -> None:
    connection = await open_connection(plugins)
    awaitable = connection.rcptto(NOBODY)
    assert awaitable is connection.connect() is connection.data(b"x")
    assert await awaitable is None
    assert await awaitable is None
    assert not plugins.listens("rcptto")
    plugins.on("rcptto", lambda connection, address: None)
    assert plugins.listens("rcptto")
    assert not plugins.listens("mailfrom")


async def test_every_event_reaches_its_handlers(plugins: Plugins) -> None:
    seen: list[tuple[object, ...]] = []

    def plain(*arguments: object) -> None:
        seen.append(arguments[1:])

    async def slow(*arguments: object) -> None:
        await trio.lowlevel.checkpoint()
        seen.append(arguments[1:])

    connection = await open_connection(plugins)
    message, stored = Message({"recipient": "c@d.test"}, b"x"), Message({"recipient": "c@d.test"})
    for event in ("connect", "secure", "authenticate", "mailfrom", "rcptto", "data", "message",
                  "close", "out_data", "out_sent"):  # fmt: skip
        plugins.on(event, plain)
        plugins.on(event, slow)
    await connection.connect()
    await connection.secured()
    assert await connection.authenticate("ann", "secret") is None
    await connection.mailfrom("")
    await connection.rcptto(NOBODY)
    await connection.data(b"x")
    await connection.message(message)
    await connection.out_data(message, stored)
    await connection.out_sent(message, stored)
    await connection.close()
    expected: list[tuple[object, ...]] = [
        (), (), ("ann", "secret"), ("",), (NOBODY,), (b"x",), (message,), (message, stored),
        (message, stored), (),
    ]  # fmt: skip
    assert seen == [arguments for arguments in expected for _ in range(2)]
    assert connection.secure


async def test_handler_rejects_and_the_others_are_skipped(plugins: Plugins) -> None:
    plugins.on("rcptto", lambda connection, address: Reject(550, "No\r\nsuch user"))
    plugins.on("rcptto", lambda connection, address: pytest.fail("not to be called"))
    connection = await open_connection(plugins)
    assert await connection.rcptto(NOBODY) == Reject(550, "5.7.1 No\nsuch user")


async def test_handler_edits_the_message_and_sends(plugins: Plugins) -> None:
    def edit(connection: Connection, message: Message) -> None:
        message.properties["tags"] = ["seen"]
        message.body = b"y"
        message.local = True
        connection.send(b"raw")

    plugins.on("message", edit)
    connection = await open_connection(plugins)
    message = Message({"recipient": "c@d.test"}, b"x")
    assert await connection.message(message) is None
    assert message.to_dict() == {"recipient": "c@d.test", "tags": ["seen"], "mime": "y"}
    assert message.local
    assert connection.take_output() == b"raw"


async def test_handler_decides_on_a_login(plugins: Plugins) -> None:
    async def check(connection: Connection, login: str, password: str) -> bool | None:
        return None if login == "unknown" else password == "right"

    plugins.on("authenticate", check)
    connection = await open_connection(plugins)
    assert await connection.authenticate("unknown", "right") is None
    assert not connection.authenticated
    assert await connection.authenticate("ann", "right") is True
    assert connection.authenticated
    assert await connection.authenticate("ann", "wrong") is False
    assert not connection.authenticated
    assert await connection.authenticate("\udcff", "\udcfe") is False


async def test_handler_may_set_authenticated_in_any_event(plugins: Plugins) -> None:
    def trust(connection: Connection) -> None:
        connection.authenticated = True

    plugins.on("connect", trust)
    connection = await open_connection(plugins)
    assert await connection.connect() is None
    assert connection.authenticated


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"x": object()}, "cannot be used: Encoding objects of type object"),
        ({"x": "\ud800"}, "cannot be used: 'utf-8' codec"),
        ({"recipient": None}, "property recipient: is missing"),
        ({"recipient": 5}, "property recipient: expected a string, found a number"),
        ({"envelope": "a\r\nb@c.test"}, "property envelope: holds a control character"),
        ({"envelope": "nobody"}, "property envelope: "),
        ({"recipient": "a@b@c.test"}, "property recipient: "),
        (["recipient"], "cannot be used: 'list' object"),
        ("y", "the body is no bytes but str"),
    ],
)
@pytest.mark.parametrize("ends", ["well", "badly"])
async def test_a_handler_that_spoils_a_message_is_given_up_and_the_message_is_as_before(
    plugins: Plugins, caplog: pytest.LogCaptureFixture, change: object, problem: str, ends: str
) -> None:
    def spoil(connection: Connection, message: Message, stored: Message) -> None:
        stored.properties["tags"].append("spoilt")
        if isinstance(change, dict):
            stored.properties.update(change)
        elif isinstance(change, list):
            stored.properties = change  # type: ignore[assignment]
        else:
            stored.body = change  # type: ignore[assignment]
        if ends == "badly":
            raise ZeroDivisionError

    plugins.on("out_data", spoil)
    plugins.on("out_data", lambda connection, message, stored: pytest.fail("not to be called"))
    connection = await open_connection(plugins)
    properties = {"envelope": "a@b.test", "recipient": "c@d.test", "tags": ["x"]}
    stored = Message({**properties, "tags": ["x"]}, b"x")
    assert await connection.out_data(Message(dict(properties), b"x"), stored) == GIVEN_UP
    assert (stored.properties, stored.body) == (properties, b"x")
    if ends == "well":
        assert problem in caplog.text


@pytest.mark.parametrize(
    "answer",
    [True, "550 no", 550, (550, "no"), Reject(250, "ok"), Reject(550, 5)],  # type: ignore[arg-type]
)
async def test_answer_that_means_nothing_is_an_error(
    plugins: Plugins, answer: object, caplog: pytest.LogCaptureFixture
) -> None:
    plugins.on("rcptto", lambda connection, address: answer)  # type: ignore[arg-type, return-value]
    connection = await open_connection(plugins)
    assert await connection.rcptto(NOBODY) == GIVEN_UP
    assert f"returned {answer!r} for rcptto; given up" in caplog.text


async def test_error_in_a_handler_is_a_451_and_a_traceback(
    plugins: Plugins, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(connection: Connection, address: str) -> None:
        raise ZeroDivisionError(address)

    plugins.on("rcptto", fail)
    plugins.on("close", lambda connection: 1 / 0)  # type: ignore[arg-type, return-value]
    connection = await open_connection(plugins)
    assert await connection.rcptto(NOBODY) == GIVEN_UP
    assert await connection.mailfrom(NOBODY) is None
    await connection.close()
    assert "test_error_in_a_handler_is_a_451_and_a_traceback" in caplog.text
    assert f"ZeroDivisionError: {NOBODY}" in caplog.text


async def test_handler_that_takes_too_long_is_given_up(
    plugins: Plugins, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async def sleep(connection: Connection, address: str) -> None:
        await trio.sleep_forever()

    plugins.on("rcptto", sleep)
    connection = await open_connection(plugins)
    assert await connection.rcptto(NOBODY) == GIVEN_UP
    assert trio.current_time() == pytest.approx(30)
    assert "did not end in 30 seconds; given up" in caplog.text
    (figures,) = plugins.statistics().values()
    assert figures["rcptto"]["timeouts"] == 1


async def test_a_shorter_timeout_holds_for_a_handler_that_is_at_work(
    plugins: Plugins, autojump_clock: trio.testing.MockClock
) -> None:
    async def sleep(connection: Connection, address: str) -> None:
        await trio.sleep_forever()

    plugins.on("rcptto", sleep)
    connection = await open_connection(plugins)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.rcptto, NOBODY)
        await trio.sleep(10)
        plugins.timeout = 2
    assert trio.current_time() == pytest.approx(12)


async def test_timeout_of_the_handler_itself_is_an_error_of_its_own(
    plugins: Plugins, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async def ask(connection: Connection, address: str) -> None:
        with trio.fail_after(1):
            await trio.sleep_forever()

    plugins.on("rcptto", ask)
    connection = await open_connection(plugins)
    assert await connection.rcptto(NOBODY) == GIVEN_UP
    assert "TooSlowError" in caplog.text


async def test_cancellation_goes_through_a_handler(plugins: Plugins) -> None:
    async def sleep(connection: Connection, address: str) -> None:
        await trio.sleep_forever()

    plugins.on("rcptto", sleep)
    connection = await open_connection(plugins)
    with trio.move_on_after(0) as scope:
        await connection.rcptto(NOBODY)
    assert scope.cancelled_caught


async def test_handlers_come_after_the_plugins(tmp_path: Path) -> None:
    calls = Calls()
    logger = logging.getLogger("mailerq.plugins")
    logger.addHandler(calls)
    logger.setLevel(logging.INFO)
    scripted = Scripted(tmp_path, 2)
    plugins = Plugins.load(str(tmp_path))
    plugins.on("rcptto", lambda connection, address: logger.info("[z] %s", address))
    context = await plugins.open_context()
    connection = context.connection(-1)
    calls.take()
    for script, order in (("f", "abz"), ("tc", "abz"), ("nx", "a"), ("tx", "a"), ("nc!", "a")):
        scripted.script(script)
        await connection.rcptto(NOBODY)
        assert names(calls.take()) == order
    await connection.close()
    await context.close()
    logger.removeHandler(calls)


def test_unknown_event_is_an_error(plugins: Plugins) -> None:
    for name in ("rcpt", "context_initialize", "timer", "mq_smtp_in_rcptto"):
        with pytest.raises(ValueError, match="no event"):
            plugins.on(name, lambda connection: None)


@pytest.mark.parametrize("handler", [None, "rcptto", 5])
async def test_a_handler_that_cannot_be_called_is_refused_at_once(
    plugins: Plugins, tmp_path: Path, handler: Any
) -> None:
    engine = Engine(configure(tmp_path))
    for register in (plugins.on, engine.on):
        with pytest.raises(
            TypeError, match=f"the handler for rcptto cannot be called: {handler!r}"
        ):
            register("rcptto", handler)
    assert not plugins.listens("rcptto")


async def test_statistics_count_for_each_plugin_and_event(tmp_path: Path) -> None:
    scripted = Scripted(tmp_path, 2)
    plugins = Plugins.load(str(tmp_path), timeout=30)

    async def handler(connection: Connection, address: str) -> Reject:
        return Reject(450, "later")

    plugins.on("rcptto", handler)
    for _ in range(2):
        context = await plugins.open_context()
        connection = context.connection(-1)
        for script in ("f", "tc", "nc", "tx!", "f!", "nx"):
            scripted.script(script)
            await connection.rcptto(NOBODY)
        await connection.close()
        await context.close()
    figures = plugins.statistics()
    for row in (figures["a.so"]["rcptto"], figures["b.so"]["rcptto"]):
        assert 0 < row.pop("seconds") < 1
    rest = {"timeouts": 0, "kept": 0, "kept_bytes": 0}
    assert figures["a.so"]["rcptto"] == {"calls": 12, "suspensions": 4, "rejects": 4, **rest}
    assert figures["b.so"]["rcptto"] == {"calls": 6, "suspensions": 0, "rejects": 0, **rest}
    assert figures["a.so"]["context_initialize"]["calls"] == 2
    assert "mailfrom" not in figures["a.so"]
    (name,) = set(figures) - {"a.so", "b.so"}
    assert name.endswith("test_statistics_count_for_each_plugin_and_event.<locals>.handler")
    assert figures[name]["rcptto"]["calls"] == 6
    assert figures[name]["rcptto"]["rejects"] == 6
