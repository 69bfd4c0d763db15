"""Crowds: thousands of slow clients, more connections than descriptors, and a stop under load."""

from __future__ import annotations

import resource
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio

from mailerq.net.stream import Stream, StreamLost
from tests.crash.kit import Daemon, Fate, Ledger, Load, all_arrive, arrivals, command, daemon
from tests.crash.test_kill import plugins
from tests.engine.kit import Certificate
from tests.support import DEADLINE, open_sink, until

OTHER_DESCRIPTORS: Final = 200

IDLE_BYTES: Final = 30_000
"""Memory that one connection may take."""

ENDLESS_SECONDS: Final = 3600
"""A timeout that no test reaches."""

STEPS: Final = 20
"""Bytes that each of a crowd sends beside a healthy client."""

MAILS: Final = 2
"""Mails of the healthy client after each of these bytes."""

STOP_SECONDS: Final = 1
"""How long a stop waits for what is under way."""


@contextmanager
def descriptors(count: int) -> Iterator[None]:
    """Allow this process `count` descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"this process may have {hard} descriptors, and needs {count}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Slow clients.


@dataclass
class Slow:
    """A client that sends a byte now and then, until the server ends the connection."""

    sock: socket.socket
    script: bytes
    ended: bool = False

    def step(self) -> None:
        try:
            while data := self.sock.recv(4096):
                if data.startswith(b"421"):
                    break
            self.ended = True
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True
        if not self.ended:
            byte, self.script = self.script[:1], self.script[1:]
            with suppress(OSError):
                self.sock.send(byte)
        if self.ended:
            self.sock.close()


async def open_slow(number: int, port: int, secure_port: int) -> Slow:
    """One third is slow in a command, one in a mail, and one in a TLS handshake."""
    kind = number % 3
    sock = socket.socket()
    sock.setblocking(False)
    with suppress(BlockingIOError):
        sock.connect(("127.0.0.1", secure_port if kind == 2 else port))
    await trio.lowlevel.wait_writable(sock)
    if kind == 2:
        return Slow(sock, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + 500 * b"x")
    if kind == 0:
        return Slow(sock, b"EHLO " + 500 * b"x")
    stream = Stream(sock.dup())  # takes the descriptor that it is given
    await command(stream, None)
    for line in (b"EHLO a.test", b"MAIL FROM:<a@b.test>", b"RCPT TO:<never@d.test>", b"DATA"):
        await command(stream, line + b"\r\n")
    stream.close()
    return Slow(sock, 5000 * b"x")


@dataclass
class Crowd:
    """A daemon with a crowd of slow clients, and a healthy client that sends mail after mail."""

    running: Daemon
    ledger: Ledger
    slow: list[Slow]
    taken: float
    """Bytes of memory for each of the crowd."""

    async def step(self) -> None:
        """Each of the crowd sends a byte; then the healthy client is served, and a new one."""
        for one in self.slow:
            if not one.ended:
                one.step()
        since = time.monotonic()
        await until(lambda: self.ledger.count(Fate.ACCEPTED, since) >= MAILS)
        stream = await Stream.connect("127.0.0.1", self.running.port)
        assert await command(stream, None) == 220
        stream.close()


@asynccontextmanager
async def crowd(directory: Path, count: int, patience: float) -> AsyncIterator[Crowd]:
    """A crowd of `count` slow clients, each of which the server bears for `patience` seconds.

    At the end all mail of the healthy client is accounted for.
    """
    certificate = Certificate.make(directory)
    switches = [
        f"--smtp-connections={2 * count + 100}",  # where they are short, nobody is borne for long
        f"--smtp-handshakes={count}",
        "--smtp-secure-port=0",
        f"--smtp-certificate={certificate.chain}",
        f"--smtp-key={certificate.key}",
        f"--smtp-timeout={patience}",
        f"--smtp-command-timeout={patience}",
        f"--smtp-handshake-timeout={patience}",
    ]
    ledger = Ledger()
    load = Load(ledger, "id")
    async with (
        open_sink() as sink,
        daemon(directory, sink.port, *switches) as running,
        trio.open_nursery() as nursery,
    ):
        _, secure = (await running.statistics())["listening"]
        secure_port = int(secure.rpartition(":")[2])
        nursery.start_soon(partial(load.session, running.port, pause=0.02))
        await until(lambda: len(ledger.accepted) > 50)
        before = running.memory
        slow: list[Slow] = []

        async def open_some(first: int) -> None:
            for number in range(first, count, 10):
                slow.append(await open_slow(number, running.port, secure_port))

        async with trio.open_nursery() as opening:
            for first in range(10):
                opening.start_soon(open_some, first)
        assert len(slow) == count
        try:
            yield Crowd(running, ledger, slow, (running.memory - before) / count)
        finally:
            for one in slow:
                one.sock.close()
        await load.end()
        await all_arrive(sink, ledger.accepted)
        nursery.cancel_scope.cancel()
        assert running.is_alive
    ledger.check(arrivals(sink))
    assert all(one.fate is Fate.ACCEPTED for one in ledger.entries.values())


async def beside(directory: Path, count: int) -> None:
    """The server bears the crowd for ever, so mail that waits for one of them is never taken."""
    async with crowd(directory, count, patience=ENDLESS_SECONDS) as found:
        for _ in range(STEPS):
            await found.step()
        assert not any(one.ended for one in found.slow)
        if count >= 1000:  # with fewer the allocator's blocks are more than what is in them
            assert found.taken < IDLE_BYTES


async def cut_off(directory: Path, count: int, patience: float) -> None:
    """The server ends each of the crowd, long before the client has sent all of its bytes."""
    async with crowd(directory, count, patience) as found:
        while left := [one for one in found.slow if not one.ended]:
            assert all(one.script for one in left), f"{len(left)} are borne to their last byte"
            await found.step()


async def test_slow_clients_beside_a_healthy_one(tmp_path: Path) -> None:
    with descriptors(300 + OTHER_DESCRIPTORS):
        await beside(tmp_path, 300)


async def test_slow_clients_are_cut_off(tmp_path: Path) -> None:
    with descriptors(300 + OTHER_DESCRIPTORS):
        await cut_off(tmp_path, 300, 2.0)


@pytest.mark.soak
async def test_five_thousand_slow_clients_beside_a_healthy_one(tmp_path: Path) -> None:
    with descriptors(5000 + OTHER_DESCRIPTORS):
        await beside(tmp_path, 5000)


@pytest.mark.soak
async def test_five_thousand_slow_clients_are_cut_off(tmp_path: Path) -> None:
    with descriptors(5000 + OTHER_DESCRIPTORS):
        await cut_off(tmp_path, 5000, 10.0)


# Descriptors.


async def greeting(port: int, hold: trio.Event, words: Counter[int]) -> None:
    """Connect, note the greeting, and stay."""
    stream = await Stream.connect("127.0.0.1", port)
    try:
        words[await command(stream, None)] += 1
        await hold.wait()
    except (StreamLost, EOFError):
        words[0] += 1
    finally:
        stream.close()


async def storm(running: Daemon, ledger: Ledger, clients: int) -> None:
    """Many clients come at once: each gets a greeting or a refusal, and then mail flows again."""
    words: Counter[int] = Counter()
    hold = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(clients):
            nursery.start_soon(greeting, running.port, hold, words)
        await until(lambda: words.total() == clients)
        hold.set()
    assert words[220] + words[421] == clients
    assert words[220] > 50
    since = time.monotonic()
    await until(lambda: ledger.count(Fate.ACCEPTED, since) > 50)


async def storms(directory: Path, rounds: int, clients: int) -> None:
    ledger = Ledger()
    load = Load(ledger, "id")
    prefix = ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")
    async with (
        open_sink() as sink,
        daemon(directory, sink.port, prefix=prefix) as running,
        trio.open_nursery() as nursery,
    ):
        for _ in range(5):
            nursery.start_soon(partial(load.session, running.port, again=True))
        await until(lambda: len(ledger.accepted) > 50)
        for _ in range(rounds):
            await storm(running, ledger, clients)
        await load.end()
        await all_arrive(sink, ledger.accepted)
        await running.until_empty()
        before = running.cpu_seconds
        await trio.sleep(0.5)
        assert running.cpu_seconds - before < 0.25  # it does not spin
        nursery.cancel_scope.cancel()
        assert await running.stop() == 0
    ledger.check(arrivals(sink))
    assert "smtp-connections: there will be 192, not 1000" in running.log
    assert "Traceback" not in running.log


async def test_a_storm_of_connections_with_few_descriptors(tmp_path: Path) -> None:
    with descriptors(600 + OTHER_DESCRIPTORS):
        await storms(tmp_path, 1, 600)


@pytest.mark.soak
async def test_storm_after_storm(tmp_path: Path) -> None:
    with descriptors(3000 + OTHER_DESCRIPTORS):
        await storms(tmp_path, 20, 3000)


# A stop under load.


async def last_word(running: Daemon, lines: list[bytes], words: Counter[int]) -> None:
    """Say some lines and then nothing: what the server says when it ends the session."""
    stream = await Stream.connect("127.0.0.1", running.port)
    try:
        await command(stream, None)
        for line in lines:
            await command(stream, line + b"\r\n")
        words[0] += 1
        words[await command(stream, b"x")] += 1
    finally:
        stream.close()


async def stop_once(running: Daemon, load: Load) -> None:
    """SIGTERM among sessions that send, and four that stand still in each state."""
    ledger = load.ledger
    words: Counter[int] = Counter()
    accepted = len(ledger.accepted)
    envelope = [b"EHLO a.test", b"MAIL FROM:<a@b.test>", b"RCPT TO:<never@d.test>"]
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(load.session, running.port)
        for lines in ([], envelope[:1], envelope[:2], [*envelope, b"DATA"]):
            nursery.start_soon(last_word, running, lines, words)
        await until(lambda: words[0] == 4 and len(ledger.accepted) > accepted + 50)
        assert await running.stop(STOP_SECONDS + DEADLINE) == 0
    assert words == {0: 4, 421: 4}


async def stop_under_load(directory: Path, rounds: int, variant: str) -> None:
    ledger = Ledger()
    switches, env = [f"--shutdown-timeout={STOP_SECONDS}"], {}
    if variant == "threads":
        switches += ["--smtp-threads=3"]
    elif variant == "plugins":
        env = plugins(directory)
        switches += [f"--plugin-directory={directory / 'plugins'}"]
    in_flight: set[str] = set()
    async with open_sink() as sink:
        for number in range(rounds):
            sink.last_mails.clear()
            async with daemon(directory, sink.port, *switches, env=env) as running:
                await stop_once(running, Load(ledger, str(number)))
            in_flight.update(name.partition("@")[0] for name in sink.last_mails.values())
        async with daemon(directory, sink.port, *switches, env=env) as running:
            await all_arrive(sink, ledger.accepted)
            await running.until_empty()
            assert await running.stop() == 0
    ledger.check(arrivals(sink), in_flight)
    # What was not taken was refused for now, or got no answer.
    assert {one.code for one in ledger.entries.values()} <= {0, 250, 421, 451}
    assert "Traceback" not in running.log


@pytest.mark.parametrize("variant", ["plain", "threads", "plugins"])
async def test_a_stop_under_load(tmp_path: Path, variant: str) -> None:
    await stop_under_load(tmp_path, 1, variant)


@pytest.mark.soak
@pytest.mark.parametrize("variant", ["plain", "threads", "plugins"])
async def test_stop_after_stop(tmp_path: Path, variant: str) -> None:
    await stop_under_load(tmp_path, 30, variant)
