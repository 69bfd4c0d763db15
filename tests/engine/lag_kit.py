"""Helpers for tests of the loop's lag: a meter, and clients and peers in their own threads."""

from __future__ import annotations

import functools
import gc
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from time import thread_time
from typing import Any

import trio

from mailerq.sockets import keep_little

RUNS = 3
"""A turn has to be too long in each of these runs for a test to fail."""

Test = Callable[..., Awaitable[Any]]


class Meter(trio.abc.Instrument):
    """Measures what each turn of a loop costs in processor time of its thread.

    Other threads and processes do not count, but a busy virtual machine does: there a thread that
    touches 4,000 pages in memory took up to 7 ms instead of 0.02, and a turn that only lets a
    deadline pass took 50, without a fault, an interrupt or stolen time that the guest could see.
    Therefore `no_turn_above` looks at several runs.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self.turns = 0
        self._began = 0.0

    def after_io_wait(self, timeout: float) -> None:
        self._began = thread_time()

    def before_io_wait(self, timeout: float) -> None:
        if self._began:
            self.longest = max(self.longest, thread_time() - self._began)
            self.turns += 1


@contextmanager
def meter() -> Iterator[Meter]:
    """Measure the turns of this loop, without collections of what the tests have left behind.

    Memory is allocated as in the daemon. Otherwise large objects grow by copies of up to 32 MB,
    depending on what earlier tests have freed.
    """
    keep_little()
    gc.collect()
    gc.freeze()
    instrument = Meter()
    trio.lowlevel.add_instrument(instrument)
    try:
        yield instrument
    finally:
        trio.lowlevel.remove_instrument(instrument)
        gc.unfreeze()


def no_turn_above(seconds: float) -> Callable[[Test], Test]:
    """A test that returns the meter of its turns, and fails where one is as long in each run.

    Noise only adds to a turn, and is not there each time; the work of a turn is. A second and
    third run are made only if the one before had a turn above the bound, each in an empty
    `tmp_path` of its own.
    """

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        async def measured(**fixtures: Any) -> None:
            found: list[float] = []
            for run in range(RUNS):
                if "tmp_path" in fixtures:
                    directory: Path = fixtures["tmp_path"] / f"run-{run}"
                    directory.mkdir()
                    meter = await test(**{**fixtures, "tmp_path": directory})
                else:
                    meter = await test(**fixtures)
                found.append(meter.longest)
                if found[-1] < seconds:
                    return
            raise AssertionError(f"the longest turns took {found} s, allowed are {seconds} s")

        return measured

    return decorate


def connect(address: tuple[str, int]) -> socket.socket:
    connection = socket.create_connection(address, timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def say(address: tuple[str, int], pieces: Iterable[bytes]) -> bytes:
    """A client that sends bytes and QUIT, reading meanwhile; what it was told up to the end."""
    heard = bytearray()
    with closing(connect(address)) as connection:

        def listen() -> None:
            with suppress(OSError):  # it was closed on what we still had to say
                while data := connection.recv(1 << 16):
                    heard.extend(data)

        listener = threading.Thread(target=listen)
        listener.start()
        with suppress(OSError):
            for piece in pieces:
                connection.sendall(piece)
            connection.sendall(b"\r\nQUIT\r\n")
            connection.shutdown(socket.SHUT_WR)
        listener.join()
    return bytes(heard)


def mail(
    address: tuple[str, int],
    pieces: Iterable[bytes],
    *,
    recipients: int = 1,
    sender: bytes = b"a@b.test",
) -> bytes:
    """A client that sends one mail; the reply to its end."""
    with closing(connect(address)) as connection, connection.makefile("rb") as replies:

        def reply() -> bytes:
            lines = []
            while line := replies.readline():
                lines.append(line)
                if line[3:4] != b"-":
                    break
            return b"".join(lines)

        reply()
        connection.sendall(b"EHLO c.test\r\n")
        reply()
        connection.sendall(b"MAIL FROM:<%b>\r\n" % sender)
        assert reply().startswith(b"250")
        for number in range(recipients):
            connection.sendall(b"RCPT TO:<%d@d.test>\r\n" % number)
            assert reply().startswith(b"250")
        connection.sendall(b"DATA\r\n")
        assert reply().startswith(b"354")
        for piece in pieces:
            connection.sendall(piece)
        connection.sendall(b"\r\n.\r\n")
        return reply()


def reply_with(connection: socket.socket, first: bytes, others: Iterable[bytes]) -> None:
    """Say the first, and the others one after each input; then nothing, until the client goes."""
    connection.sendall(first)
    for other in others:
        if len(other) > 1 and not connection.recv(1 << 16):
            return
        connection.sendall(other)
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(1 << 16):
        pass


def document(properties: dict[str, Any]) -> bytes:
    return json.dumps(properties, separators=(",", ":")).encode()


class Peer:
    """A mail server in threads: it takes everything, or says what a script has it say.

    `eight_bit` says whether it offers 8BITMIME.
    """

    def __init__(
        self,
        script: Callable[[socket.socket], None] | None = None,
        *,
        eight_bit: bool = True,
    ) -> None:
        self.taken = 0
        """Mails."""
        self.bytes = 0
        self._refused = 0
        self._eight_bit = eight_bit
        self._script = script or self._serve
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._lock = threading.Lock()

    def refuse(self, count: int) -> None:
        """Say 451 to so many mails from now on."""
        with self._lock:
            self._refused = count

    def __enter__(self) -> Peer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with closing(connection), suppress(OSError):  # the client has gone
            self._script(connection)

    def _serve(self, connection: socket.socket) -> None:
        connection.sendall(b"220 mx.test ESMTP\r\n")
        received = b""
        while True:
            line, end, received = received.partition(b"\r\n")
            if not end:
                data = connection.recv(1 << 16)
                if not data:
                    return
                received = line + data
                continue
            verb = line[:4].upper()
            if verb == b"EHLO":
                offers = b"250-8BITMIME\r\n" if self._eight_bit else b""
                connection.sendall(
                    b"250-mx.test\r\n250-PIPELINING\r\n" + offers + b"250 SMTPUTF8\r\n"
                )
            elif verb == b"DATA":
                connection.sendall(b"354 go on\r\n")
                tail, count = b"\r\n", 0
                while True:
                    window = tail + received
                    at = window.find(b"\r\n.\r\n")
                    if at >= 0:
                        count += at
                        received = window[at + 5 :]
                        break
                    count += len(window)
                    tail = window[-4:]
                    received = connection.recv(1 << 20)
                    if not received:
                        return
                with self._lock:
                    refused = self._refused > 0
                    if refused:
                        self._refused -= 1
                    else:
                        self.taken += 1
                        self.bytes += count
                connection.sendall(b"451 later\r\n" if refused else b"250 taken\r\n")
            elif verb == b"QUIT":
                connection.sendall(b"221 bye\r\n")
                return
            else:
                connection.sendall(b"250 ok\r\n")
