"""Measure the costs of a full queue: time to start, memory, and the rate of accepting mail.

    python benches/waiting.py [--waiting N | --full] [--rabbitmq]

Fills a queue with messages of 2 KiB that are due from the day after tomorrow on, one every 10 ms.
Starts the project on this queue, and once more on an empty queue. Both accept and relay the load of
relay.py, in turns. Then the full one is killed as by a power cut, and started again.

With ``--rabbitmq`` the messages wait in a RabbitMQ, quorum queues, and only memory and starts are
measured: a broker of another program accepts the mail.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import trio
from broker import OnBroker
from figures import Figure, print_document, progress
from peers import Mailerq, Sink, machine
from relay import Load, compare, measure, summarise

from mailerq.message import Message
from mailerq.queues import Publication
from mailerq.queues.embedded.queue_file import QueueFile

FULL: Final = 1_000_000
BATCH: Final = 1000
SIZE_BYTES: Final = 2048
AFTER_SECONDS: Final = 2 * 86_400.0
APART_SECONDS: Final = 0.01


def messages(count: int, after: float) -> Iterator[Publication]:
    """Messages that are due one after another, starting `after` seconds from now."""
    start = time.time() + after
    for number in range(count):
        properties = {
            "envelope": "c@d.test",
            "recipient": f"recipient{number}@b{number % 1000}.test",
            "message-id": f"{number:032}",
            "time": "2026-01-01 00:00:00",
            "ip": "127.0.0.1",
        }
        # Random, so that no layer below can compress it.
        message = Message(properties, os.urandom(SIZE_BYTES // 2).hex().encode())
        yield Publication("outbox", message, start + number * APART_SECONDS)


def fill(directory: Path, count: int, after: float = AFTER_SECONDS) -> None:
    """Make a queue in a directory, with this number of messages."""
    start = time.monotonic()
    publications = messages(count, after)
    with QueueFile.open(str(directory)) as store:
        for _ in range(0, count, BATCH):
            store.publish(islice(publications, BATCH))
    size = (directory / "queue.db").stat().st_size
    progress(f"{count:,} waiting, {size / 1e6:,.0f} MB, in {time.monotonic() - start:.0f} s")


def start_seconds(system: Mailerq) -> float:
    """Start the system; returns the seconds until its banner."""
    start = time.monotonic()
    system.__enter__()
    return time.monotonic() - start


def run(options: argparse.Namespace, directory: Path) -> list[Figure]:
    full, empty = f"mailerq+{options.waiting}", "mailerq"
    with Sink(directory / "sink-1") as first_sink, Sink(directory / "sink-2") as second_sink:
        system = Mailerq(directory / full, first_sink, name=full)
        fill(directory / full / "queue", options.waiting)
        first = start_seconds(system)
        try:
            before = system.memory("Rss")
            load = Load(options.messages, sessions=20, size=SIZE_BYTES, timeout=120.0)
            with Mailerq(directory / empty, second_sink) as other:
                runs = measure(
                    [(system, first_sink), (other, second_sink)],
                    load,
                    rounds=options.rounds,
                    ways=(False, True),
                )
                fresh = other.memory("Rss")
            after = system.memory("Rss")
            system.kill()
            again = start_seconds(system)
        finally:
            system.__exit__(None, None, None)
    detail = (
        f"{options.waiting:,} waiting; {before / 1e6:.0f} MB before the load; with the empty queue "
        f"{fresh / 1e6:.0f} MB"
    )
    return [
        Figure("start to banner", first, "s"),
        Figure("start to banner after a kill", again, "s"),
        Figure("memory", after / 1e6, "MB", detail),
        *(
            replace(figure, name=figure.name.replace(full, "full").replace(empty, "empty"))
            for figure in compare(summarise(runs), empty)
        ),
    ]


def run_on_broker(options: argparse.Namespace, directory: Path) -> list[Figure]:
    name = "mailerq+rabbitmq"
    with Sink(directory / "sink") as sink:
        system = OnBroker(directory / name, sink, name=name)
        address = system.start_broker()
        try:
            trio.run(_fill_broker, address, options.waiting)
            first = start_seconds(system)
            load = Load(options.messages, sessions=20, size=SIZE_BYTES, timeout=120.0)
            measure([(system, sink)], load, rounds=1, ways=(True,), warm_up=0)
            memory = system.memory("Rss")
            system.kill_alone()
            again = start_seconds(system)
            waiting = system.depth("outbox.wait.86400")
        finally:
            system.__exit__(None, None, None)
    detail = f"{waiting:,} waiting"
    return [
        Figure("start to banner", first, "s", detail),
        Figure("start to banner after a kill", again, "s", detail),
        Figure("memory", memory / 1e6, "MB", detail),
    ]


async def _fill_broker(address: Any, count: int) -> None:
    from mailerq.queues.rabbitmq.queues import open_rabbitmq

    start = time.monotonic()
    publications = messages(count, AFTER_SECONDS)
    async with open_rabbitmq([address]) as queues:
        for _ in range(0, count, BATCH):
            await queues.publish([*islice(publications, BATCH)])
    progress(f"{count:,} waiting, in {time.monotonic() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="what a full queue costs")
    parser.add_argument("--waiting", type=int, default=100_000, help="messages (%(default)s)")
    parser.add_argument("--full", dest="waiting", action="store_const", const=FULL,
                        help=f"{FULL:,} of them: 3 GB of disk, some minutes")  # fmt: skip
    parser.add_argument("--rabbitmq", action="store_true", help="the messages are in RabbitMQ")
    parser.add_argument("-n", "--messages", type=int, default=3000, help="in a run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each (%(default)s)")
    parser.add_argument("--directory", help="where the queues go (a temporary directory)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="waiting-", dir=options.directory) as root:
        Path(root).chmod(0o755)
        figures = (run_on_broker if options.rabbitmq else run)(options, Path(root))
    print_document(figures, as_json=options.json, machine=machine(), waiting=options.waiting)


if __name__ == "__main__":
    main()
