"""Peers with scripted behaviour, for flows.py: healthy, silent, slow, and worse.

    python benches/scripted.py KIND COUNTERS ADDRESS:PORT …

Each kind answers SMTP with PIPELINING, but:

- ``healthy`` does nothing else;
- ``silent`` accepts connections and never says anything;
- ``slow`` takes one mail a second, over all its connections;
- ``421`` says 421 in the place of the banner, and closes;
- ``busy`` refuses every recipient with 451, and says that mail comes too fast;
- ``closing`` closes after each 250 to a mail.

A peer writes its numbers of mails and connections to the file COUNTERS, and the times at which the
first and the last mail were complete. `Scripted` maps the file, so counting wakes no process.
`Refusing` keeps ports on which nothing listens.
"""

from __future__ import annotations

import asyncio
import mmap
import resource
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from peers import LOOPBACK, START_SECONDS, Failed, Program

from mailerq.address import host_port, split_host_port

__all__ = ["KINDS", "Refusing", "Scripted", "reserve"]

KINDS: Final = ("healthy", "silent", "slow", "421", "busy", "closing")
SLOW_SECONDS: Final = 1.0
BUSY: Final = b"451 4.7.1 mail comes too fast\r\n"
BACKLOG: Final = 4000

MAILS, CONNECTIONS, FIRST, LAST, READY = range(5)
"""The places of the counters: doubles, so that a process reads whole values."""

COUNTERS_BYTES: Final = 5 * 8


class Peer(asyncio.Protocol):
    """The peer's end of one connection."""

    next_mail = 0.0
    """The time of a slow peer's next mail, on the loop's clock."""

    def __init__(self, kind: str, counters: memoryview[float]) -> None:
        self.kind = kind
        self.counters = counters
        self.buffer = b""
        self.in_body = False
        self.ends = False
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.counters[CONNECTIONS] += 1
        if self.kind == "421":
            transport.write(b"421 4.3.2 mx.test comes back later\r\n")
            transport.close()
        elif self.kind != "silent":
            transport.write(b"220 mx.test ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        if self.kind == "silent" or self.transport.is_closing():
            return
        self.buffer += data
        self._go_on()

    def _go_on(self) -> None:
        replies: list[bytes] = []
        while self._step(replies):
            pass
        if replies:
            self.transport.write(b"".join(replies))
        if self.ends:
            self.transport.close()

    def _step(self, replies: list[bytes]) -> bool:
        """Answer one command or body; False if none is complete, or no more are wanted."""
        if self.in_body:
            _, end, rest = self.buffer.partition(b"\r\n.\r\n")
            if not end:
                return False
            self.in_body, self.buffer = False, rest
            self.counters[LAST] = now = time.monotonic()
            self.counters[FIRST] = self.counters[FIRST] or now
            self.counters[MAILS] += 1
            if self.kind == "slow":
                self._answer_slowly()
                return False
            replies.append(b"250 2.0.0 taken\r\n")
            self.ends = self.kind == "closing"
            return not self.ends
        line, end, rest = self.buffer.partition(b"\r\n")
        if not end:
            return False
        self.buffer = rest
        verb = line[:4].upper()
        if verb == b"EHLO":
            replies.append(b"250-mx.test\r\n250-PIPELINING\r\n250 8BITMIME\r\n")
        elif verb == b"DATA":
            self.in_body = self.kind != "busy"
            replies.append(b"354 go on\r\n" if self.in_body else b"503 5.5.1 no recipient\r\n")
        elif verb == b"RCPT" and self.kind == "busy":
            replies.append(BUSY)
        elif verb == b"QUIT":
            replies.append(b"221 2.0.0 bye\r\n")
            self.ends = True
        else:
            replies.append(b"250 2.0.0 fine\r\n")
        return not self.ends

    def _answer_slowly(self) -> None:
        """Answer a mail in its turn; later input on this connection waits."""
        loop = asyncio.get_running_loop()
        when = Peer.next_mail = max(loop.time(), Peer.next_mail) + SLOW_SECONDS
        self.transport.pause_reading()
        loop.call_at(when, self._answer)

    def _answer(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"250 2.0.0 taken\r\n")
            self.transport.resume_reading()
            self._go_on()


async def serve(kind: str, counters: memoryview[float], places: Sequence[tuple[str, int]]) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as tasks:
        for host, port in places:
            server = await loop.create_server(
                lambda: Peer(kind, counters), host, port, backlog=BACKLOG
            )
            tasks.create_task(server.serve_forever())
        counters[READY] = 1.0


def reserve(addresses: Sequence[str] = (LOOPBACK,)) -> int:
    """A port that is free now on all these addresses of the loopback interface."""
    for _ in range(100):
        with ExitStack() as stack:
            port = 0
            try:
                for address in addresses:
                    sock = stack.enter_context(socket.socket())
                    sock.bind((address, port))
                    port = sock.getsockname()[1]
            except OSError:
                continue
            return port
    raise Failed(f"no port is free on all of {', '.join(addresses)}")


class Scripted(Program):
    """A peer of one kind, in a process of its own, on one port of some addresses."""

    def __init__(
        self, directory: Path, kind: str, *, addresses: Sequence[str] = (LOOPBACK,), port: int = 0
    ) -> None:
        super().__init__(directory)
        self.name = f"the {kind} peer"
        self.kind = kind
        self.addresses = list(addresses)
        self.host = self.addresses[0]
        self.port = port or reserve(self.addresses)

    def prepare(self) -> list[str]:
        path = self.directory / "counters"
        path.write_bytes(bytes(COUNTERS_BYTES))
        with open(path, "r+b") as file:
            self._counters = memoryview(mmap.mmap(file.fileno(), COUNTERS_BYTES)).cast("d")
        places = (host_port(address, self.port) for address in self.addresses)
        return [sys.executable, __file__, self.kind, str(path), *places]

    def _wait_for_banner(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._counters[READY]:
            self.check()
            if time.monotonic() > deadline:
                raise Failed(f"{self.name} does not start\n{self.tail()}")
            time.sleep(0.01)

    @property
    def mails(self) -> int:
        """Complete mails since the start."""
        return int(self._counters[MAILS])

    @property
    def connections(self) -> int:
        return int(self._counters[CONNECTIONS])

    @property
    def first(self) -> float:
        """The time of the first complete mail, in the form of `last`."""
        return self._counters[FIRST]

    @property
    def last(self) -> float:
        """The time of the last complete mail, on the monotonic clock of this machine."""
        return self._counters[LAST]

    def waiting(self) -> int:
        return 0


class Refusing:
    """Ports that refuse connections: they are taken, and nothing listens."""

    kind = "refusing"

    def __init__(self, addresses: Sequence[str] = (LOOPBACK,), port: int = 0) -> None:
        self.addresses = list(addresses)
        self.host = self.addresses[0]
        self.port = port or reserve(self.addresses)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for address in self.addresses:
            sock = self._stack.enter_context(socket.socket())
            # Connections to the port's previous peer may linger.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, self.port))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def main() -> None:
    kind, path, *places = sys.argv[1:]
    if kind not in KINDS:
        sys.exit(f"there is no peer of the kind {kind}, only {', '.join(KINDS)}")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with open(path, "r+b") as file:
        counters = memoryview(mmap.mmap(file.fileno(), COUNTERS_BYTES)).cast("d")
    asyncio.run(serve(kind, counters, [split_host_port(place) for place in places]))


if __name__ == "__main__":
    main()
