"""Measure how throughput grows with the number of processes.

    python benches/processes.py [--processes N]

Clients pipeline transactions of a hundred recipients each, and take them back (RSET); every
fortieth is a mail to one recipient, which is kept and not delivered. So the load is on the
processor (parsing, addresses, rules, replies) and not on the disk. A server of one process and one
of N take turns. If clients, which do almost nothing, and other load leave each process a core of
its own, the ratio is the gain from processes.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

from figures import Figure, print_document, progress
from peers import Failed, Mailerq, Sink, cpu_seconds, machine

RECIPIENTS: Final = 100
TRANSACTIONS: Final = 40
CLIENTS: Final = 8
WARM_UP_SECONDS: Final = 0.5

MAIL: Final = b"MAIL FROM:<c@d.test>\r\n"
TRANSACTION: Final = (
    MAIL
    + b"".join(b"RCPT TO:<recipient%d@b.test>\r\n" % number for number in range(RECIPIENTS))
    + b"RSET\r\n"
)
LAST: Final = MAIL + b"RCPT TO:<recipient@b.test>\r\nDATA\r\n"
BODY: Final = b"Subject: last\r\n\r\n.\r\n"


class Client(threading.Thread):
    """Sends transaction after transaction; `taken` counts their recipients."""

    def __init__(self, server: Mailerq, end: threading.Event) -> None:
        super().__init__(daemon=True)
        self.taken = 0
        self.failure: Exception | None = None
        self._end = end
        self._sock = socket.create_connection((server.host, server.port), timeout=30)

    def run(self) -> None:
        try:
            with self._sock as sock:
                self._read(sock, b"220", 1)
                sock.sendall(b"HELO client.test\r\n")
                self._read(sock, b"250", 1)
                while not self._end.is_set():
                    sock.sendall(TRANSACTIONS * TRANSACTION + LAST)
                    self._read(sock, b"354", TRANSACTIONS * (RECIPIENTS + 2) + 3)
                    self.taken += TRANSACTIONS * RECIPIENTS
                    sock.sendall(BODY)
                    self._read(sock, b"250", 1)
        except (OSError, Failed) as error:
            self.failure = error

    def _read(self, sock: socket.socket, last: bytes, count: int) -> None:
        """Read this number of replies; the last one starts with `last`."""
        data = b""
        while count > 0:
            data = sock.recv(1 << 16)
            if not data:
                raise Failed("the server has closed the connection")
            count -= data.count(b"\n")
        reply = data[data.rfind(b"\n", 0, -1) + 1 :]
        if not reply.startswith(last):
            raise Failed(f"{reply!r} instead of {last!r}")


def rate(server: Mailerq, seconds: float) -> tuple[float, float]:
    """Recipients per second, and processor milliseconds per recipient."""
    end = threading.Event()
    clients = [Client(server, end) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    time.sleep(WARM_UP_SECONDS)
    assert server.process is not None
    before, cpu, start = _taken(clients), cpu_seconds(server.process.pid), time.monotonic()
    time.sleep(seconds)
    count, taken = _taken(clients) - before, time.monotonic() - start
    used = cpu_seconds(server.process.pid) - cpu
    end.set()
    for client in clients:
        client.join()
        if client.failure is not None:
            raise Failed(f"{server.name}: {client.failure}\n{server.tail()}")
    return count / taken, 1000 * used / count


def _taken(clients: list[Client]) -> int:
    return sum(client.taken for client in clients)


def main() -> None:
    parser = argparse.ArgumentParser(description="how processes add up")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=int, default=cores, help="how many (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each (%(default)s)")
    parser.add_argument("--directory", help="where the queues go (a temporary directory)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    numbers = (1, options.processes)
    runs: dict[int, list[tuple[float, float]]] = {number: [] for number in numbers}
    with tempfile.TemporaryDirectory(prefix="processes-", dir=options.directory) as root:
        Path(root).chmod(0o755)
        settings = ["--rabbitmq-inbox=inbox"]
        with Sink(Path(root, "sink")) as sink:
            for number in options.rounds * numbers:
                progress(f"{number} processes")
                # A new directory each time, so that the queue is empty.
                directory = Path(root, f"{number}-{len(runs[number])}")
                with Mailerq(directory, sink, processes=number, options=settings) as server:
                    runs[number].append(rate(server, options.seconds))
    rates = {number: statistics.median(rate for rate, _ in found) for number, found in runs.items()}
    figures = [
        Figure(
            f"{number} processes, recipients taken",
            rates[number],
            "/s",
            f"{statistics.median(cpu for _, cpu in runs[number]):.3f} ms of the processor for one",
        )
        for number in numbers
    ]
    gain = rates[options.processes] / rates[1]
    figures.append(Figure("many processes / one", gain, "x", f"{options.processes} and 1"))
    print_document(figures, as_json=options.json, machine=machine())


if __name__ == "__main__":
    main()
