"""A peer that takes mail of many domains, and refuses some for now and some for good.

    python tests/crash/moody_peer.py ADDRESS FILE MESSAGES

It says on which port it is ready. The local part of a recipient is a number, which decides what
the peer says (`temper`). FILE has two bytes for each number: how often the peer said 4xx, and how
often it took the mail.
"""

from __future__ import annotations

import asyncio
import enum
import mmap
import sys
from typing import Final

__all__ = ["BYTES", "Temper", "temper"]

BYTES: Final = 2
"""Bytes of the file for each message."""

BACKLOG: Final = 4000


class Temper(enum.Enum):
    """What the peer does with a message."""

    TAKES = "250"
    SOFT_RCPT = "once 451 to RCPT"
    SOFT_DOT = "once 451 to the dot"
    HARD_RCPT = "550 to RCPT"
    HARD_DOT = "554 to the dot"


def temper(number: int) -> Temper:
    """A tenth of the messages fails at first, a twentieth fails for good.

    >>> from collections import Counter
    >>> sorted(Counter(temper(number).name for number in range(40)).items())
    [('HARD_DOT', 1), ('HARD_RCPT', 1), ('SOFT_DOT', 2), ('SOFT_RCPT', 2), ('TAKES', 34)]
    """
    kinds = {
        3: Temper.SOFT_RCPT, 13: Temper.SOFT_DOT, 23: Temper.SOFT_RCPT, 33: Temper.SOFT_DOT,
        7: Temper.HARD_RCPT, 27: Temper.HARD_DOT,
    }  # fmt: skip
    return kinds.get(number % 40, Temper.TAKES)


class Peer(asyncio.Protocol):
    """The peer's end of one connection."""

    def __init__(self, counts: mmap.mmap) -> None:
        self.counts = counts
        self.buffer = b""
        self.number = -1
        self.in_body = False
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(b"220 mx.test ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        replies = []
        while True:
            line, end, rest = self.buffer.partition(b"\r\n.\r\n" if self.in_body else b"\r\n")
            if not end:
                break
            self.buffer = rest
            replies.append(self.dot() if self.in_body else self.command(line))
        self.transport.write(b"".join(replies))
        if replies and replies[-1].startswith(b"221"):
            self.transport.close()

    def command(self, line: bytes) -> bytes:
        match line[:4].upper():
            case b"EHLO":
                return b"250-mx.test\r\n250-PIPELINING\r\n250 8BITMIME\r\n"
            case b"RCPT":
                return self.rcpt(line)
            case b"DATA":
                if self.number < 0:
                    return b"503 5.5.1 no recipient\r\n"
                self.in_body = True
                return b"354 go on\r\n"
            case b"QUIT":
                return b"221 2.0.0 bye\r\n"
            case _:
                self.number = -1
                return b"250 2.1.0 fine\r\n"

    def rcpt(self, line: bytes) -> bytes:
        number = int(line.partition(b"<")[2].partition(b"@")[0])
        match temper(number):
            case Temper.HARD_RCPT:
                return b"550 5.1.1 nobody here\r\n"
            case Temper.SOFT_RCPT if not self.counts[BYTES * number]:
                self.counts[BYTES * number] = 1
                return b"451 4.7.1 greylisted\r\n"
        self.number = number
        return b"250 2.1.5 fine\r\n"

    def dot(self) -> bytes:
        number, self.number = self.number, -1
        self.in_body = False
        match temper(number):
            case Temper.HARD_DOT:
                return b"554 5.7.1 no such content\r\n"
            case Temper.SOFT_DOT if not self.counts[BYTES * number]:
                self.counts[BYTES * number] = 1
                return b"451 4.3.0 not now\r\n"
        self.counts[BYTES * number + 1] += 1
        return b"250 2.0.0 taken\r\n"


async def serve(address: str, counts: mmap.mmap) -> None:
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Peer(counts), address, 0, backlog=BACKLOG)
    print("ready", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main(address: str, path: str, messages: str) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), BYTES * int(messages)) as counts:
        asyncio.run(serve(address, counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
