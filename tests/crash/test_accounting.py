"""Every message is accounted for exactly once, on both sides, while memory stays flat."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from mailerq.net.stream import Stream
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.shares import share_directory
from tests.crash.kit import Daemon, command, daemon
from tests.crash.moody_peer import BYTES, Temper, temper
from tests.net.dns_server import NXDOMAIN, Records, open_dns_server
from tests.support import DEADLINE, ROOT

DOMAINS = 500
SESSIONS = 30

GROWTH_BYTES = 16 << 20
"""Growth from one half to the other: the heap of a process that was busy has holes."""

SOFT = (Temper.SOFT_RCPT, Temper.SOFT_DOT)
HARD = (Temper.HARD_RCPT, Temper.HARD_DOT)

CODES = {
    Temper.TAKES: [250],
    Temper.SOFT_RCPT: [451, 250],
    Temper.SOFT_DOT: [451, 250],
    Temper.HARD_RCPT: [550],
    Temper.HARD_DOT: [554],
}
"""The codes of a message's attempts."""


def zone(name: str, kind: str) -> Records:
    """Each of the domains has a host, and each host an address of this machine."""
    label, _, domain = name.partition(".")
    if kind == "MX" and domain == "test":
        return [f"10 mx.{name}."]
    if kind == "A" and label == "mx":
        number = int(domain[1:].partition(".")[0])
        return [f"127.1.{number // 250}.{number % 250 + 1}"]
    return [] if name.endswith("test") else NXDOMAIN


def address(number: int) -> str:
    # Numbers of all tempers in each domain.
    return f"{number}@d{number // 40 % DOMAINS}.test"


@asynccontextmanager
async def open_peer(file: Path, count: int) -> AsyncIterator[int]:
    """The peer as a process of its own: its port."""
    file.write_bytes(bytes(BYTES * count))
    program = str(ROOT / "tests" / "crash" / "moody_peer.py")
    peer = await trio.lowlevel.open_process(
        [sys.executable, program, "0.0.0.0", str(file), str(count)],
        stdout=subprocess.PIPE,
    )
    try:
        assert peer.stdout is not None
        said = b""
        with trio.fail_after(DEADLINE):
            while not said.endswith(b"\n"):
                said += (more := await peer.stdout.receive_some())
                assert more, said
        yield int(said.removeprefix(b"ready "))
    finally:
        peer.kill()
        with trio.CancelScope(shield=True):
            await peer.wait()


async def send_range(port: int, numbers: range) -> None:
    """Send mails over some sessions; each is taken."""
    left = iter(numbers)

    async def session() -> None:
        stream = await Stream.connect("127.0.0.1", port)
        try:
            assert await command(stream, None) == 220
            assert await command(stream, b"EHLO load.test\r\n") == 250
            for number in left:
                to = address(number).encode()
                stream.write(b"MAIL FROM:<a@b.test>\r\nRCPT TO:<%b>\r\nDATA\r\n" % to)
                reply = b""
                while reply.count(b"\r\n") < 3:
                    reply += await stream.receive()
                assert reply.split(b"\r\n")[2][:3] == b"354", reply
                assert await command(stream, b"Subject: %d\r\n\r\nhello\r\n.\r\n" % number) == 250
        finally:
            stream.close()

    async with trio.open_nursery() as nursery:
        for _ in range(SESSIONS):
            nursery.start_soon(session)


async def until_settled(running: Daemon, count: int) -> None:
    """Wait until so many messages have a final result, as long as anything goes on."""
    done, since = -1, time.monotonic()
    while done < count:
        assert time.monotonic() - since < DEADLINE, (done, count)
        outgoing = (await running.statistics())["outgoing"]
        if (now := outgoing["delivered"] + outgoing["failed"]) > done:
            done, since = now, time.monotonic()
        await trio.sleep(0.5)
    await running.until_statistics(lambda found: found["queue"]["leased"] == {"outbox": 0})


def results(directory: Path, queue: str) -> dict[int, list[list[int]]]:
    """For each message in a queue, the codes of its attempts, for each document that it has."""
    found: dict[int, list[list[int]]] = {}
    with QueueFile.open(share_directory(str(directory / "queue"), 0)) as store:
        for entry in store.listed(queue):
            attempts = entry.message.properties["results"]
            assert [each["attempt"] for each in attempts] == [*range(1, len(attempts) + 1)]
            number = int(entry.message.recipient.partition("@")[0])
            found.setdefault(number, []).append([each["code"] for each in attempts])
    return found


@pytest.mark.parametrize("count", [4_000, pytest.param(200_000, marks=pytest.mark.soak)])
async def test_each_message_is_accounted_for_exactly_once(tmp_path: Path, count: int) -> None:
    """A tenth of the messages fails at first, a twentieth for good, to 500 domains."""
    switches = [
        "--smtp-sink-address=",
        "--smtp-out-forbidden=",
        "--retry-interval=2",
        "--rabbitmq-success=sent",
        "--rabbitmq-failure=failed",
        "--rabbitmq-retry=again",
        "--dsn-notify=NEVER",
    ]
    counts = tmp_path / "counts"
    memory = []
    began = time.monotonic()
    async with open_peer(counts, count) as port, open_dns_server(zone) as names:
        switches += [f"--smtp-out-port={port}", f"--dns-servers={names.address}"]
        async with daemon(tmp_path, port, *switches) as running:
            for half in (range(count // 2), range(count // 2, count)):
                await send_range(running.port, half)
                await until_settled(running, half.stop)
                memory.append(running.memory)
            outgoing, seconds = (await running.statistics())["outgoing"], running.cpu_seconds
            assert await running.stop() == 0
            assert "Traceback" not in running.log
    print(
        f"{count} messages in {time.monotonic() - began:.0f} s; processor {seconds:.0f} s; memory",
        memory,
    )
    said = counts.read_bytes()
    tempers = [temper(number) for number in range(count)]
    sent, failed = results(tmp_path, "sent"), results(tmp_path, "failed")
    again = results(tmp_path, "again")
    # An envelope that goes ahead is withdrawn if the reply to the body before is slow. Its refusal
    # is then no attempt.
    withdrawn = {
        number
        for number, kind in enumerate(tempers)
        if kind is Temper.SOFT_RCPT and sent.get(number) == [[250]]
    }
    wrong = []
    for number, kind in enumerate(tempers):
        hard, soft = kind in HARD, kind in SOFT
        documents, codes = failed if hard else sent, CODES[kind]
        if number in withdrawn:
            codes = codes[1:]
        right = (
            documents.get(number) == [codes]
            and number not in (sent if hard else failed)
            and again.get(number, []) == ([codes[:1]] if len(codes) > 1 else [])
            and tuple(said[BYTES * number : BYTES * number + 2]) == (soft, not hard)
        )
        if not right:
            wrong.append((number, kind, sent.get(number), failed.get(number), again.get(number)))
    assert not wrong, (len(wrong), wrong[:10])
    kinds = Counter(tempers)
    assert outgoing["delivered"] == count - sum(kinds[kind] for kind in HARD)
    assert outgoing["failed"] == sum(kinds[kind] for kind in HARD)
    assert outgoing["retried"] == sum(kinds[kind] for kind in SOFT) - len(withdrawn)
    assert len(withdrawn) < kinds[Temper.SOFT_RCPT] // 4
    assert memory[1] - memory[0] < GROWTH_BYTES, memory
