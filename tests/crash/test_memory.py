"""Memory does not grow with past mail, nor start-up time with waiting mail."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from mailerq.message import Message
from mailerq.net.stream import Stream
from mailerq.queues import Publication
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.crash.kit import Daemon, command, daemon
from tests.crash.test_kill import plugins
from tests.support import Mail, open_sink, until

GROWTH_BYTES: Final = 6 << 20
"""What the process may gain after it has warmed up: 0.8 KB for each of 8,000 messages."""

SOAK_GROWTH_BYTES: Final = 24 << 20
"""The same for mails of very different sizes, which the allocator cannot pack as well."""

BODY: Final = b"Subject: x\r\n\r\n" + 28 * (70 * b"x" + b"\r\n")

SOAK_MESSAGES: Final = int(os.environ.get("MAILERQ_SOAK_MESSAGES", "180000"))
"""An hour's worth at 50 a second."""


class Counted(list[Mail]):
    """The mails of a sink, which are counted and not kept."""

    total = 0

    def append(self, mail: Mail) -> None:
        self.total += 1


class Traffic:
    """Sessions that share a number of mails between them."""

    def __init__(self, port: int, left: int, mix: Callable[[], bytes] = lambda: BODY) -> None:
        self.accepted = 0
        self._port = port
        self._left = left
        self._mix = mix

    async def run(self, sessions: int = 20, *, each: int = 1_000_000) -> None:
        """Send all of them, on each connection at most `each`."""
        async with trio.open_nursery() as nursery:
            for _ in range(sessions):
                nursery.start_soon(self._sessions, each)

    async def _sessions(self, each: int) -> None:
        while self._left > 0:
            stream = await Stream.connect("127.0.0.1", self._port)
            try:
                await self._session(stream, each)
            finally:
                stream.close()

    async def _session(self, stream: Stream, each: int) -> None:
        await command(stream, None)
        await command(stream, b"EHLO load.test\r\n")
        for _ in range(each):
            if self._left <= 0:
                break
            self._left -= 1
            stream.write(b"MAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\nDATA\r\n")
            assert await replies(stream, 3) == 354
            code = await command(stream, self._mix() + b".\r\n")
            self.accepted += code == 250
        await command(stream, b"QUIT\r\n")


async def replies(stream: Stream, count: int) -> int:
    """Read so many replies of one line: the code of the last one."""
    data = b""
    while data.count(b"\r\n") < count:
        more = await stream.receive()
        assert more
        data += more
    return int(data.split(b"\r\n")[-2][:3])


async def relay(running: Daemon, mails: Counted, count: int) -> None:
    """Have so many messages relayed, and wait until they are."""
    before = mails.total
    traffic = Traffic(running.port, count)
    await traffic.run()
    assert traffic.accepted == count
    await until(lambda: mails.total >= before + count)
    await running.until_empty()


def is_calm(figures: dict[str, Any]) -> bool:
    """Whether the daemon has heard of its last commit: the file is empty before."""
    return figures["queue"]["leased"] == {"outbox": 0}


async def test_ten_thousand_messages_leave_nothing_behind(tmp_path: Path) -> None:
    async with open_sink() as sink, daemon(tmp_path, sink.port, "--rabbitmq-qos=50") as running:
        sink.mails = mails = Counted()
        await relay(running, mails, 2_000)
        before = running.memory
        await relay(running, mails, 8_000)
        grown = running.memory - before
        figures = await running.until_statistics(is_calm)
    assert grown < GROWTH_BYTES
    assert figures["incoming"]["memory"] == 0
    assert figures["queue"]["leased"] == {"outbox": 0}
    assert figures["outgoing"]["waiting"] == 0


def moody(event: server.Event) -> Reply | None:
    """Refuse some mail for now, and some for good."""
    if isinstance(event, server.Rcpt):
        luck = random.random()
        if luck < 0.05:
            return Reply(451, "4.3.2 Not now")
        if luck < 0.08:
            return Reply(550, "5.1.1 Not here")
    return None


def mixed() -> bytes:
    """Most mails are small, and some are not."""
    lines = int(random.paretovariate(0.7)) % 2000
    return b"Subject: x\r\n\r\n" + lines * (70 * b"x" + b"\r\n")


@pytest.mark.soak
async def test_an_hour_of_traffic(tmp_path: Path) -> None:
    env = plugins(tmp_path)
    switches = [
        f"--plugin-directory={tmp_path / 'plugins'}",
        "--smtp-threads=2",
        "--rabbitmq-qos=200",
    ]
    seen: list[int] = []
    async with open_sink() as sink, daemon(tmp_path, sink.port, *switches, env=env) as running:
        sink.mails = Counted()
        sink.decide = moody
        for _ in range(10):
            traffic = Traffic(running.port, SOAK_MESSAGES // 10, mixed)
            await traffic.run(each=30)
            assert traffic.accepted == SOAK_MESSAGES // 10
            await running.until_empty()
            seen.append(running.memory)
        figures = await running.until_statistics(is_calm)
        assert await running.stop() == 0
    assert max(seen[2:]) - seen[1] < SOAK_GROWTH_BYTES, seen
    assert figures["incoming"]["memory"] == 0
    assert figures["queue"]["leased"] == {"outbox": 0}
    outgoing = figures["outgoing"]
    assert outgoing["delivered"] + outgoing["failed"] == SOAK_MESSAGES
    assert "Traceback" not in running.log


# A full queue.


def fill(directory: Path, count: int) -> None:
    """Mail of 2 KiB that waits for a day."""
    with QueueFile.open(str(directory / "queue")) as store:
        for first in range(0, count, 1000):
            store.publish(
                Publication(
                    "outbox",
                    Message({"envelope": "a@b.test", "recipient": f"{number}@d.test"}, BODY),
                    time.time() + 86_400 * (number % 2),
                )
                for number in range(first, min(first + 1000, count))
            )


async def seconds_to_listen(directory: Path, sink_port: int) -> tuple[float, int]:
    """Start a daemon, and kill it: how long the first banner took, and the most memory it had."""
    began = time.monotonic()
    async with daemon(directory, sink_port) as running:
        stream = await Stream.connect("127.0.0.1", running.port)
        assert await command(stream, None) == 220
        stream.close()
        took = time.monotonic() - began
        memory = 0
        traffic = Traffic(running.port, 2000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(traffic.run)
            while traffic.accepted < 1000:
                await trio.sleep(0.05)
                memory = max(memory, running.memory)
            nursery.cancel_scope.cancel()
        running.kill()
    return took, memory


async def start_full(directory: Path, count: int, seconds: float) -> None:
    await trio.to_thread.run_sync(fill, directory, count)
    async with open_sink() as sink:
        sink.mails = Counted()
        for _ in range(3):  # after an orderly end, and after two kills
            took, memory = await seconds_to_listen(directory, sink.port)
            assert took < seconds
            assert memory < 400 << 20


async def test_a_start_with_many_messages_waiting(tmp_path: Path) -> None:
    await start_full(tmp_path, 20_000, 5.0)


@pytest.mark.soak
async def test_a_start_with_a_million_messages_waiting(tmp_path: Path) -> None:
    await start_full(tmp_path, 1_000_000, 2.0)
