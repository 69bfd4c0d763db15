"""kill -9 at random moments under load.

What got a 250 arrives; what arrives twice was in flight.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from mailerq.net.stream import Stream, StreamLost
from tests.support import ROOT, free_port, open_sink

SESSIONS = 20
ROUNDS = int(os.environ.get("MAILERQ_KILLS", "20"))


@asynccontextmanager
async def daemon(directory: Path, sink_port: int, port: int) -> AsyncIterator[trio.Process]:
    arguments = [
        f"--queue-directory={directory / 'queue'}",
        f"--lock={directory / 'pid'}",
        "--plugin-directory=",
        "--smtp-ip=127.0.0.1",
        f"--smtp-port={port}",
        "--smtp-sink-address=127.0.0.1",
        f"--smtp-sink-port={sink_port}",
        "--retry-interval=1",
        f"--application-log={directory / 'log'}",
    ]
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "mailerq", *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def connect(port: int) -> Stream:
    with trio.fail_after(20):
        while True:
            try:
                return await Stream.connect("127.0.0.1", port)
            except ConnectionRefusedError:
                await trio.sleep(0.02)


class Load:
    """Sessions that send mail after mail and write down which got a 250."""

    def __init__(self, seed: int) -> None:
        self.accepted: list[str] = []
        self._seed = seed
        self._count = 0

    async def session(self, port: int) -> None:
        stream = await connect(port)
        try:
            await self._command(stream, None)
            await self._command(stream, b"EHLO load.test\r\n")
            while True:
                self._count += 1
                id = f"{self._seed}-{self._count}"
                await self._command(stream, b"MAIL FROM:<a@b.test>\r\n")
                await self._command(stream, b"RCPT TO:<%b@d.test>\r\n" % id.encode())
                await self._command(stream, b"DATA\r\n")
                if await self._command(stream, b"Subject: x\r\n\r\nhi\r\n.\r\n") == 250:
                    self.accepted.append(id)
        except (StreamLost, EOFError):
            return
        finally:
            stream.close()

    async def _command(self, stream: Stream, line: bytes | None) -> int:
        if line is not None:
            await stream.send_all(line)
        reply = b""
        while not reply.endswith(b"\n") or reply.split(b"\r\n")[-2][3:4] == b"-":
            data = await stream.receive()
            if not data:
                raise EOFError
            reply += data
        return int(reply[:3])


async def test_every_250_arrives_and_only_what_was_in_flight_arrives_twice(tmp_path: Path) -> None:
    accepted: list[str] = []
    in_flight: set[str] = set()  # the last mail of each connection to the sink at a kill
    async with open_sink() as sink:
        for number in range(ROUNDS):
            port = free_port()
            load = Load(number)
            sink.last_mails.clear()
            async with (
                daemon(tmp_path, sink.port, port) as process,
                trio.open_nursery() as nursery,
            ):
                for _ in range(SESSIONS):
                    nursery.start_soon(load.session, port)
                (await connect(port)).close()
                await trio.sleep(random.uniform(0.05, 0.6))
                process.send_signal(signal.SIGKILL)
            in_flight.update(sink.last_mails.values())
            accepted += load.accepted
        assert len(accepted) > 10 * ROUNDS
        async with daemon(tmp_path, sink.port, free_port()):
            expected = set(accepted)
            with trio.fail_after(60):
                while expected - {mail.recipients[0].partition("@")[0] for mail in sink.mails}:
                    sink.arrived = trio.Event()
                    await sink.arrived.wait()
    counts = Counter(mail.recipients[0] for mail in sink.mails)
    twice = {recipient for recipient, count in counts.items() if count > 1}
    assert twice <= in_flight
    assert (tmp_path / "queue").exists()
