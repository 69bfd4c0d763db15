"""The costs of the embedded queue: publish, ack, with a million waiting, beside busy Python.

    python benches/queues.py [--messages N] [--tasks N] [--size BYTES] [--directory DIR]
    python benches/queues.py --waiting 1000000          how much a full queue costs

Each line is one use of the queue; all of them sync before they report. With "busy" the loop does 60
µs of Python, a write and a read on a socket between two steps of a publisher, like a session. "ms"
is the wait of a publisher: the median and the 99th percentile.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from mailerq.message import Message
from mailerq.queues import Publication, Settlement
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.queues import EmbeddedQueues
from mailerq.queues.opening import open_embedded


def resident() -> float:
    """Megabytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


class Load:
    """Publishers and consumers of messages of one size."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.messages: int = options.messages
        self.tasks: int = options.tasks
        self.body = os.urandom(options.size)
        self.waits: list[float] = []

    def message(self, number: int) -> Message:
        properties = {
            "envelope": "sender@example.test",
            "recipient": f"recipient{number}@example.test",
            "message-id": f"{number:032}",
            "time": "2026-01-01 00:00:00",
            "ip": "127.0.0.1",
        }
        return Message(properties, self.body[:-8] + b"%08d" % number)

    async def publish(self, queues: EmbeddedQueues, numbers: Iterator[int], pair: bool) -> None:
        ends = socket.socketpair() if pair else None
        try:
            for number in numbers:
                if ends is not None:
                    total = 0
                    for step in range(1500):
                        total += step
                    ends[0].send(b"250 OK\r\n")
                    ends[1].recv(100)
                started = time.perf_counter()
                await queues.publish([Publication("outbox", self.message(number))])
                self.waits.append(time.perf_counter() - started)
        finally:
            for end in ends or ():
                end.close()

    async def consume(self, queues: EmbeddedQueues, workers: int) -> None:
        """Take and ack everything, in as many tasks as a delivery has connections."""
        left = self.messages
        async with queues.consume("outbox", prefetch=1000) as consumer:

            async def worker() -> None:
                nonlocal left
                while left > 0:
                    left -= 1
                    lease = await consumer.receive()
                    await queues.ack([Settlement(lease)])

            async with trio.open_nursery() as nursery:
                for _ in range(workers):
                    nursery.start_soon(worker)


@asynccontextmanager
async def measured(name: str, queues: EmbeddedQueues, load: Load) -> AsyncIterator[None]:
    before = queues.statistics()
    processor = time.process_time()
    load.waits.clear()
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    processor = time.process_time() - processor
    after = queues.statistics()
    commits = after["commits"] - before["commits"]
    line = (
        f"{name:22} {load.messages / seconds:8.0f} messages/s {commits / seconds:7.0f} commits/s "
        f"{(after['messages'] - before['messages']) / max(commits, 1):6.1f} a commit "
        f"{1e6 * processor / load.messages:5.0f} µs CPU "
    )
    if load.waits:
        waits = sorted(load.waits)
        line += (
            f"{1e3 * statistics.median(waits):7.2f} ms {1e3 * waits[-len(waits) // 100]:7.2f} ms"
        )
    print(f"{line}  {resident():5.0f} MB", flush=True)


async def run(options: argparse.Namespace, directory: str) -> None:
    load = Load(options)
    if options.waiting:
        started = time.perf_counter()
        with QueueFile.open(directory) as store:
            for first in range(0, options.waiting, 1000):
                store.publish(
                    Publication("outbox", load.message(number))
                    for number in range(first, min(first + 1000, options.waiting))
                )
        size = Path(directory, "queue.db").stat().st_size / 1e6
        print(f"{options.waiting} waiting: {size:.0f} MB, {time.perf_counter() - started:.1f} s")
    started = time.perf_counter()
    async with open_embedded(directory) as queues:
        print(f"opened in {time.perf_counter() - started:.3f} s")
        for name, busy, consume in (
            ("publish", False, False),
            ("publish, busy", True, False),
            ("publish to ack", False, True),
            ("publish to ack, busy", True, True),
        ):
            for _ in range(options.rounds):
                numbers = iter(range(load.messages))
                async with measured(name, queues, load), trio.open_nursery() as nursery:
                    if consume:
                        nursery.start_soon(load.consume, queues, load.tasks)
                    for _ in range(load.tasks):
                        nursery.start_soon(load.publish, queues, numbers, busy)
                if not options.waiting:
                    await queues.purge("outbox")
        if not options.waiting:
            for message in range(0, load.messages, 500):
                await queues.publish(
                    [Publication("outbox", load.message(message + step)) for step in range(500)]
                )
        async with measured("waiting to ack", queues, load):
            await load.consume(queues, load.tasks)
        started = time.perf_counter()
    print(f"closed in {time.perf_counter() - started:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="the embedded queue alone")
    parser.add_argument("--messages", type=int, default=10_000, help="in each run")
    parser.add_argument("--tasks", type=int, default=20, help="that publish, and that consume")
    parser.add_argument("--size", type=int, default=2048, help="bytes of a body")
    parser.add_argument("--waiting", type=int, default=0, help="messages in the queue before")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", help="on the disk to measure (a temporary one in it)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        trio.run(run, options, directory)


if __name__ == "__main__":
    main()
