"""Timeouts and error limits of clients: deadlines, delays, and storms."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq.inbound import deadlines as watch
from mailerq.inbound import session as module
from mailerq.inbound.terms import Bounds
from mailerq.wire import server, smtp
from tests.engine.kit import Dialog, converse, inbox, open_dialog, serve
from tests.support import DEADLINE, ROOT, cpu_seconds, send, until

TRANSACTION = ("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>", "DATA")


async def drip(dialog: Dialog, data: bytes) -> bool:
    """Send byte by byte until the server has had enough of it; false when it took all."""
    reply = ""

    async def listen() -> None:
        nonlocal reply
        reply = await dialog.reply()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        try:
            for byte in data:
                await dialog.send(bytes([byte]))
                await trio.sleep(0.02)
        except trio.BrokenResourceError:
            await trio.sleep_forever()
        nursery.cancel_scope.cancel()
    return reply == smtp.TIMED_OUT.wire.decode().strip()


# Deadlines.


async def test_an_idle_client_is_sent_away(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        engine.reload(engine.config.replace(smtp_timeout=0.1))
        assert (await dialog.reply()).startswith("421 4.4.2")
        assert await dialog.closed()


async def test_a_command_has_its_time_from_its_first_byte_to_its_last(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        engine.reload(engine.config.replace(smtp_command_timeout=0.2))
        assert await dialog.codes("NOOP") == [250]
        assert await drip(dialog, 1000 * b"x")
        assert await dialog.closed()


async def flood(dialog: Dialog) -> None:
    while True:
        await dialog.send(10_000 * b"BDAT 0\r\n")


async def test_who_sends_on_and_on_and_reads_nothing_is_sent_away(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            engine.reload(engine.config.replace(smtp_timeout=0.5, smtp_command_timeout=0.5))
            assert await dialog.codes("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>") == [250, 250]
            with pytest.raises(trio.BrokenResourceError), trio.fail_after(60):
                await flood(dialog)
        await until(lambda: engine.statistics()["incoming"]["open"] == 0)


@asynccontextmanager
async def in_transaction(directory: Path, *lines: str, **settings: Any) -> AsyncIterator[Dialog]:
    """A dialog behind these commands, which go by the settings.

    They are sent at once: a client that waits for replies may be late on a busy machine, too.
    """
    async with serve(directory) as engine, open_dialog(engine.addresses[0]) as dialog:
        engine.reload(engine.config.replace(**settings))
        await dialog.send(b"".join(f"{line}\r\n".encode() for line in lines))
        yield dialog


async def test_a_mail_has_to_come_at_a_rate(tmp_path: Path) -> None:
    settings = {"smtp_timeout": 0.5, "smtp_data_minrate": 1_000_000}
    async with in_transaction(tmp_path, *TRANSACTION, **settings) as dialog:
        assert [(await dialog.reply())[:3] for _ in TRANSACTION] == ["250", "250", "354"]
        assert await drip(dialog, 1000 * b"x")
    async with in_transaction(tmp_path, *TRANSACTION[:2], "BDAT 1000", **settings) as dialog:
        assert [(await dialog.reply())[:3] for _ in range(2)] == ["250", "250"]
        assert await drip(dialog, 1000 * b"x")


async def test_a_mail_in_chunks_has_to_come_at_a_rate_as_well(tmp_path: Path) -> None:
    settings = {"smtp_timeout": 0.5, "smtp_data_minrate": 10_000_000}
    chunk = "BDAT 72\r\n" + 70 * "x"
    async with in_transaction(tmp_path, *TRANSACTION[:2], chunk, **settings) as dialog:
        assert [(await dialog.reply())[:3] for _ in range(2)] == ["250", "250"]
        reply = await dialog.reply()
        with trio.fail_after(60):
            while reply.startswith("250"):
                with suppress(trio.BrokenResourceError):  # it has had enough
                    await dialog.send(b"BDAT 70\r\n" + 70 * b"x")
                reply = await dialog.reply()
        assert reply.startswith("421 4.4.2")


class Clock:
    """The clock of the deadlines, which only the test moves: a busy machine takes no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.monotonic()
        self.looks = 0
        monkeypatch.setattr(module, "monotonic", lambda: self.now)
        monkeypatch.setattr(watch, "monotonic", self._look)
        monkeypatch.setattr(watch, "LOOKS", 10_000)  # look often, though the bounds are long

    def _look(self) -> float:
        self.looks += 1
        return self.now

    async def pass_by(self, seconds: float) -> None:
        """Let time pass, and have somebody look at the deadlines."""
        self.now += seconds
        before = self.looks
        await until(lambda: self.looks > before + 1)


async def test_a_mail_that_comes_at_a_rate_is_taken_however_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    settings = {"smtp_timeout": 1.0, "smtp_data_minrate": 10}
    async with converse(tmp_path, **settings) as dialog:
        assert await dialog.codes(*TRANSACTION) == [250, 250, 354]
        for byte in 30 * b"x" + b"\r\n.\r":
            await dialog.send(bytes([byte]))
            await clock.pass_by(0.05)
        await dialog.send(b"\n")
        assert (await dialog.reply()).startswith("250")


async def test_a_session_has_its_time_whatever_it_does(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        engine.reload(engine.config.replace(smtp_session_timeout=0.3))
        with trio.fail_after(60):
            while (code := (await dialog.codes("VRFY x"))[0]) == 252:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert code == 421
        assert await dialog.closed()


async def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    """Mail after mail, with as much to reply to before each as is not yet too much."""
    hostname = ".".join(4 * ["x" * 60])
    mail = b"MAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\nBDAT 3 LAST\r\nx\r\n"
    settings = {"smtp_timeout": 0.2, "smtp_command_timeout": 0.2, "hostname": hostname}
    async with serve(tmp_path, **settings) as engine:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(engine.addresses[0])
        client.setblocking(False)
        async with trio.SocketStream(trio.socket.from_stdlib_socket(client)) as stream:
            # The replies fill the buffers of both sides.
            with trio.fail_after(60), pytest.raises(trio.BrokenResourceError):
                await stream.send_all(2000 * (40 * b"EHLO c.test\r\n" + mail))
        await until(lambda: not engine.statistics()["incoming"]["open"])
        assert engine.statistics()["incoming"]["timeouts"] == 1


async def test_a_plugin_that_thinks_costs_the_client_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    async with serve(tmp_path, smtp_timeout=0.5) as engine:

        async def think(*arguments: object) -> None:
            await clock.pass_by(1.0)

        engine.on("rcptto", think)
        async with open_dialog(engine.addresses[0]) as dialog:
            assert (await dialog.mail("c@d.test")).startswith("250")


async def test_deadlines_tighten_when_slots_are_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    settings = {"smtp_connections": 5, "smtp_timeout": 100.0, "smtp_command_timeout": 100.0}
    async with serve(tmp_path, **settings) as engine:
        address = engine.addresses[0]
        async with open_dialog(address) as idle, open_dialog(address) as slow:
            await slow.send(b"NO")
            async with open_dialog(address) as third:
                await clock.pass_by(20.0)
                assert await third.codes("NOOP") == [250]
                async with open_dialog(address) as fourth:
                    for dialog in (idle, slow):
                        assert (await dialog.reply()).startswith("421 4.4.2")
                    assert (await fourth.mail("c@d.test")).startswith("250")
                assert await third.codes("NOOP") == [250]


def test_only_waiting_for_the_client_counts() -> None:
    bounds = Bounds(idle=300, command=60, handshake=30, session=3600, rate=500)
    tight = bounds.tightened()
    assert (tight.idle, tight.command, tight.handshake) == (10, 10, 10)
    assert (tight.session, tight.rate) == (3600, 500)
    short = Bounds(idle=5, command=5, handshake=5, session=5, rate=0)
    assert short.tightened() == short


async def test_slow_clients_take_nothing_from_a_healthy_one(tmp_path: Path) -> None:
    """Case 13: here 300 of them, a third each in commands, in DATA and before the banner.

    What a client says stands in one segment: between two, a busy machine may be late.
    """

    def connect(*lines: str, end: str = "\r\n") -> Dialog:
        client = socket.create_connection(address)
        client.sendall(("\r\n".join(lines) + end).encode())
        client.setblocking(False)
        return Dialog(trio.SocketStream(trio.socket.from_stdlib_socket(client)))

    settings = {"smtp_timeout": 1.0, "smtp_command_timeout": 1.0, "smtp_data_minrate": 100_000}
    async with serve(tmp_path, **settings) as engine:
        address = engine.addresses[0]
        slow: list[Dialog] = []
        for number in range(300):
            begun = (("x",), ("EHLO c.test", *TRANSACTION[:2], "x"), ("EHLO c.test", *TRANSACTION))
            slow.append(connect(*begun[number % 3], end="\r\n" if number % 3 == 2 else ""))
            if number % 3 == 2:
                replies = [await slow[-1].reply() for _ in range(5)]
                if replies[-1].startswith("354"):
                    await slow[-1].send(b"x")
        started = time.monotonic()
        healthy = connect("EHLO c.test", *TRANSACTION[:2], "BDAT 4 LAST", "hi")
        codes = [(await healthy.reply())[:3] for _ in range(5)]
        await healthy.stream.aclose()
        assert codes == ["220", "250", "250", "250", "250"]
        assert time.monotonic() - started < 30
        await until(lambda: not engine.statistics()["incoming"]["open"])
        assert engine.statistics()["incoming"]["timeouts"] == 300
        for dialog in slow:
            await trio.aclose_forcefully(dialog.stream)


# Slowing.


@pytest.mark.parametrize(
    ("command", "limit"), [("NOOP", server.IDLE_COMMAND_LIMIT), ("WHAT", server.ERROR_LIMIT)]
)
async def test_commands_without_end_are_slowed_and_then_end_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, limit: int
) -> None:
    slept = []
    sleep = trio.sleep

    async def note(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0 if seconds == module.TARPIT_SECONDS else seconds)

    monkeypatch.setattr(trio, "sleep", note)
    async with converse(tmp_path) as dialog:
        codes = await dialog.codes(*limit * [command])
        assert 421 not in codes
        assert slept.count(module.TARPIT_SECONDS) >= limit // 2 - 1
        assert (await dialog.say(command)).startswith("421 4.7.0 Too many")
        assert await dialog.closed()


async def test_a_flood_in_one_segment_ends_at_once(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        with suppress(trio.BrokenResourceError):
            await dialog.send(100_000 * b"NOOP\r\n")
        await until(lambda: not engine.statistics()["incoming"]["open"])
        codes = []
        with suppress(trio.BrokenResourceError):  # the rest was sent to nobody
            while reply := await dialog.reply():
                codes.append(reply[:3])
        assert codes in ([], [*server.IDLE_COMMAND_LIMIT * ["250"], "421"])


# Descriptors.

STORM = """
import resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (2048, 2048))
port, count = int(sys.argv[1]), int(sys.argv[2])
clients = []
for _ in range(count):
    client = socket.socket()
    client.settimeout(10)
    client.connect(("127.0.0.1", port))
    clients.append(client)
greetings = {}
for client in clients:
    try:
        word = client.recv(3).decode()
    except OSError:
        word = "lost"
    greetings[word] = greetings.get(word, 0) + 1
print(greetings)
"""


def daemon(
    directory: Path, descriptors: int, *switches: str
) -> tuple[subprocess.Popen[bytes], int]:
    """A daemon with so many descriptors, once it listens, and its port."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mailerq", "--smtp-port=0", "--smtp-ip=127.0.0.1"),
                *(f"--queue-directory={directory / 'queue'}", f"--lock={directory / 'lock'}"),
                *("--plugin-directory=", "--rabbitmq-inbox=inbox", "--hostname=mx.test"),
                *switches,
            ],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
            stderr=log,
            preexec_fn=limit,
        )
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if found := re.search(r"listens on 127\.0\.0\.1:(\d+)\n", (directory / "log").read_text()):
            return process, int(found[1])
        time.sleep(0.02)
    raise AssertionError((directory / "log").read_text())


def test_a_storm_when_plugins_have_taken_the_descriptors(tmp_path: Path) -> None:
    """Case 17, with fewer descriptors than the engine counted with when it started."""
    process, port = daemon(tmp_path, 160, "--smtp-connections=180")
    try:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (64, 160))
        before = cpu_seconds(process.pid)
        storm = subprocess.run(
            [sys.executable, "-c", STORM, str(port), "500"],
            capture_output=True,
            timeout=60,
            check=True,
            text=True,
        )
        greetings: dict[str, int] = eval(storm.stdout)
        assert greetings["220"] >= 30
        assert greetings["220"] + greetings["421"] == 500
        assert cpu_seconds(process.pid) - before < 5
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (160, 160))
        time.sleep(0.3)
        before = cpu_seconds(process.pid)
        time.sleep(0.5)
        assert cpu_seconds(process.pid) - before < 0.25  # it does not spin
        code, _ = trio.run(send, ("127.0.0.1", port))
        assert code == 250
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert log.count("cannot accept connections: Too many open files") == 1


# The clock, and the end.


async def test_a_clock_that_jumps_ends_no_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 26: deadlines and rates are on a clock that does not jump."""
    real = time.time
    settings: dict[str, Any] = {"strangers": True, "smtp_client_messages": 3}
    async with serve(tmp_path, **settings) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            for hours in (0, 1, -1):
                jump = 3600.0 * hours
                monkeypatch.setattr(engine._server, "clock", lambda jump=jump: real() + jump)
                assert (await dialog.mail("c@d.test")).startswith("250")
            assert (await dialog.mail("c@d.test")).startswith("450")
        messages = await inbox(engine, 3)
    assert len({message.properties["received"] for message in messages}) == 3


async def test_stopping_under_load_loses_nothing_that_was_taken(tmp_path: Path) -> None:
    """Case 26: sessions finish what they are at, or hear 421, within a bound."""
    accepted: list[str] = []
    others: list[str] = []

    async def client(address: tuple[str, int]) -> None:
        try:
            async with open_dialog(address) as dialog:
                while True:
                    reply = await dialog.mail("c@d.test")
                    if not reply.startswith("250"):
                        others.append(reply)
                        return
                    accepted.extend(re.findall(r"2\.0\.0 (\w+) for ", reply))
        except (AssertionError, OSError, trio.BrokenResourceError):
            return  # stopped before its turn

    async with trio.open_nursery() as nursery:
        async with serve(tmp_path, shutdown_timeout=5.0) as engine:
            for _ in range(20):
                nursery.start_soon(client, engine.addresses[0])
            await until(lambda: len(accepted) > 100)
            started = time.monotonic()
        assert time.monotonic() - started < 5 + 30
    assert all(reply == "" or reply.startswith("421") for reply in others)
    async with serve(tmp_path, smtp_port=(0,)) as engine:
        stored = await inbox(engine, len(accepted))
    ids = {message.properties["message-id"] for message in stored}
    assert len(ids) == len(accepted)
    assert set(accepted) <= ids | set()
