"""A mail costs at most its size and a MB of memory, on every path through a separate process.

The measure is the peak of resident memory, mapped files included, above the level after small mail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio

from tests.crash.kit import Daemon, daemon
from tests.engine import lag_kit as kit
from tests.support import ROOT, memory_of, until

MB: Final = 1 << 20

SIZE: Final = 40 * MB
CACHES: Final = 8 * MB

SMALL: Final = b"Subject: x\r\n\r\n" + 28 * (70 * b"x" + b"\r\n")

WARM: Final = 10
RECIPIENTS: Final = 50
"""Small mails that come first, and recipients of each: caches, threads and modules are there
then."""

TEXT: Final = 76 * b"x" + b"\r\n"
LATIN: Final = 5 * b"abcdefghij\xe4" + b"\r\n"
UMLAUTS: Final = 37 * b"\xc3\xa4" + b"\r\n"


class Peak:
    """The most memory that a process has at a time, over what it has now."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        try:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        except OSError:
            pytest.skip("this kernel does not count a peak anew")
        self._before = memory_of(pid, "VmRSS")

    @property
    def bytes(self) -> int:
        return memory_of(self._pid, "VmHWM") - self._before

    @property
    def left(self) -> int:
        """What the process has now and did not have before."""
        return memory_of(self._pid, "VmRSS") - self._before


def blocks(unit: bytes, size: int) -> Iterator[bytes]:
    """A mail of `size` bytes, or a little less, in pieces."""
    head = b"Subject: x\r\n\r\n"
    yield head
    count = (size - len(head)) // len(unit)
    most = max(1, (1 << 16) // len(unit))
    for _ in range(count // most):
        yield most * unit
    yield count % most * unit


def by_chunks(address: tuple[str, int], pieces: Iterator[bytes]) -> bytes:
    """A client that sends one mail by BDAT; the reply to its end."""
    with kit.connect(address) as connection, connection.makefile("rb") as replies:

        def say(command: bytes, data: bytes = b"") -> bytes:
            connection.sendall(command + data)
            while (line := replies.readline())[3:4] == b"-":
                pass
            return line

        say(b"")
        say(b"EHLO c.test\r\n")
        say(b"MAIL FROM:<a@b.test>\r\n")
        say(b"RCPT TO:<c@d.test>\r\n")
        for piece in pieces:
            say(b"BDAT %d\r\n" % len(piece), piece)
        return say(b"BDAT 0 LAST\r\n")


async def settled(running: Daemon, peer: kit.Peer, mails: int) -> None:
    """Wait until the peer has them, and nothing is left of them here."""
    await until(lambda: peer.taken >= mails)
    await running.until_empty()


async def warm_up(running: Daemon, peer: kit.Peer) -> None:
    address = ("127.0.0.1", running.port)
    for number in range(1, WARM + 1):
        send = partial(kit.mail, address, [SMALL], recipients=RECIPIENTS)
        assert (await trio.to_thread.run_sync(send)).startswith(b"250")
        await settled(running, peer, number * RECIPIENTS)
    # The page caches of the queue file, which the process keeps, are full after this.
    send = partial(kit.mail, address, blocks(TEXT, CACHES))
    assert (await trio.to_thread.run_sync(send)).startswith(b"250")
    await settled(running, peer, WARM * RECIPIENTS + 1)


# A unit of text, how much of it is kept, and how it is sent.
MAILS: Final[dict[str, tuple[bytes, float, Callable[..., bytes]]]] = {
    "text": (TEXT, 1.0, kit.mail),
    "dots": (b"..x\r\n", 0.8, kit.mail),
    "bare LF": (b"\n", 2.0, kit.mail),
    "chunks": (TEXT, 1.0, by_chunks),
    "8-bit": (UMLAUTS, 1.0, kit.mail),
    "latin": (LATIN, 1.0, kit.mail),
}


async def relay(running: Daemon, peer: kit.Peer, name: str) -> Peak:
    """Have a mail of `SIZE` relayed: what it cost."""
    unit, kept, send = MAILS[name]
    taken = peer.taken
    peak = Peak(running.process.pid)
    pieces = blocks(unit, int(SIZE / kept))
    reply = await trio.to_thread.run_sync(send, ("127.0.0.1", running.port), pieces)
    assert reply.startswith(b"250")
    await settled(running, peer, taken + 1)
    return peak


@pytest.mark.parametrize("spill", ["0", "1MB"])
@pytest.mark.parametrize("name", MAILS)
async def test_a_mail_that_is_relayed(tmp_path: Path, name: str, spill: str) -> None:
    with kit.Peer() as peer:
        async with daemon(tmp_path, peer.port, f"--smtp-spill-size={spill}") as running:
            await warm_up(running, peer)
            peak = await relay(running, peer, name)
            assert peak.bytes < SIZE + MB
            await until(lambda: peak.left < MB)  # idle tasks hold none of it


async def test_a_mail_that_is_read_back_from_the_queue(tmp_path: Path) -> None:
    with kit.Peer() as peer:
        async with daemon(tmp_path, peer.port) as running:
            await warm_up(running, peer)
            peer.refuse(2)
            peak = await relay(running, peer, "text")
            assert (await running.statistics())["outgoing"]["retried"] == 2
            assert peak.bytes < SIZE + MB


HEADERS: Final[dict[str, tuple[bytes, bytes]]] = {
    "fields": (b"a:\r\n", b"250"),
    "x-mq lines that are no fields": (b"x-mq-\r\n", b"250"),
    "x-mq fields": (b"x-mq-: a\r\n", b"552"),
    "one field": (b" " * 70 + b"\r\n", b"250"),
    "Received fields": (b"Received:\r\n", b"554"),
}


@pytest.mark.parametrize("name", HEADERS)
async def test_a_header_as_long_as_it_may_be(tmp_path: Path, name: str) -> None:
    """It is in memory up to four times while it is looked at and edited."""
    unit, expected = HEADERS[name]
    size = MB - 100
    mail = [b"x-mq-tag: a\r\nx: y\r\n" + size // len(unit) * unit, b"\r\nhi\r\n"]
    with kit.Peer() as peer:
        async with daemon(tmp_path, peer.port) as running:
            await warm_up(running, peer)
            send = partial(kit.mail, ("127.0.0.1", running.port), mail)
            peaks = []
            for _ in range(2):  # what other work of the process needs is seldom there twice
                taken = peer.taken
                peak = Peak(running.process.pid)
                assert (await trio.to_thread.run_sync(send)).startswith(expected)
                await settled(running, peer, taken + expected.startswith(b"250"))
                peaks.append(peak.bytes)
            assert min(peaks) < size + MB + 4 * size


@pytest.mark.parametrize("name", ["8-bit", "latin"])
async def test_a_mail_that_is_converted(tmp_path: Path, name: str) -> None:
    """It becomes base64, or quoted-printable."""
    with kit.Peer(eight_bit=False) as peer:
        async with daemon(tmp_path, peer.port) as running:
            await warm_up(running, peer)
            peak = await relay(running, peer, name)
            assert peer.bytes > 1.05 * SIZE
            assert peak.bytes < SIZE + MB


@pytest.mark.parametrize("recipients", [200, pytest.param(1000, marks=pytest.mark.soak)])
async def test_a_mail_to_many(tmp_path: Path, recipients: int) -> None:
    """They share one body, also when it is read back."""
    size = 5 * MB
    with kit.Peer() as peer:
        async with daemon(tmp_path, peer.port) as running:
            await warm_up(running, peer)
            taken = peer.taken
            peer.refuse(100)
            peak = Peak(running.process.pid)
            send = partial(
                kit.mail, ("127.0.0.1", running.port), blocks(TEXT, size), recipients=recipients
            )
            assert (await trio.to_thread.run_sync(send)).startswith(b"250")
            await settled(running, peer, taken + recipients)
            print(f"{peak.bytes >> 20} MB")
            assert peak.bytes < 60 * MB


# The other ways in.


def run(words: list[str], mail: Iterator[bytes], path: Path) -> int:
    """Run Python with a mail as its input: the most memory that it had, in bytes."""
    with path.open("wb") as file:
        for piece in mail:
            file.write(piece)
    with path.open("rb") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdin=file,
            stdout=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss << 10


@pytest.mark.parametrize("name", ["text", "dots", "bare LF"])
def test_a_mail_from_the_command_line(tmp_path: Path, name: str) -> None:
    unit, kept, _ = MAILS[name]
    (tmp_path / "queue").mkdir()
    words = ["-m", "mailerq", f"--queue-directory={tmp_path}/queue", "--hostname=mx.test"]
    words += ["a@b.test", "--envelope=c@d.test"]
    small = run(words, iter([SMALL]), tmp_path / "small")
    large = run(words, blocks(unit, int(SIZE / kept)), tmp_path / "large")
    assert large - small < SIZE + MB


PUBLISH: Final = """
import sys, trio, mailerq
from pathlib import Path

async def main(directory, kind):
    config = mailerq.Config(
        queue_directory=directory, plugin_directory="", smtp_ip=("127.0.0.1",), smtp_port=(0,),
        rabbitmq_inbox="inbox", hostname="mx.test")
    async with mailerq.Engine(config) as engine:
        message = {"envelope": "a@b.test", "recipient": "c@d.test", "mime": b"Subject: x"}
        for _ in range(20):
            await engine.publish(dict(message), queue="other")
        message["mime"] = sys.stdin.buffer.read()
        await engine.publish(message, queue="other")

trio.run(main, *sys.argv[1:])
"""


def test_a_mail_that_a_program_publishes(tmp_path: Path) -> None:
    words = ["-c", PUBLISH, f"{tmp_path}/queue", "bytes"]
    small = run(words, iter([SMALL]), tmp_path / "small")
    large = run(words, blocks(TEXT, SIZE), tmp_path / "large")
    print((large - small - SIZE) >> 10)
    assert large - small < SIZE + MB
