"""Measure the latency of a lone message: from the client's connect to the sink.

    python benches/lone.py [--messages N] [--systems mailerq,postfix]

One message at a time, each on a new connection in and a new one out, since the sink closes after
each message. Before each message is a pause in which the server does nothing. The client does not
pipeline. The systems take turns, message by message.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from figures import Figure, print_document, progress
from peers import Failed, Mailerq, Postfix, Program, Unavailable, machine

PAUSE_SECONDS: Final = 0.1
WARM_UP: Final = 5
TIMEOUT_SECONDS: Final = 30.0
BODY: Final = b"Subject: lone\r\n\r\n" + 32 * (b"x" * 62 + b"\r\n")


class Catcher:
    """A sink that takes one message per connection, and notes the time of its end."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.host, self.port = self.listening.getsockname()
        self.caught = threading.Semaphore(0)
        self.when = 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            client, _ = self.listening.accept()
            with client, client.makefile("rb") as lines:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._take(client, lines)

    def _take(self, client: socket.socket, lines: Iterable[bytes]) -> None:
        client.sendall(b"220 sink.test\r\n")
        for line in (rest := iter(lines)):
            command = line[:4].upper()
            if command == b"EHLO":
                client.sendall(b"250-sink.test\r\n250-PIPELINING\r\n250 8BITMIME\r\n")
            elif command == b"DATA":
                client.sendall(b"354 go on\r\n")
                while next(rest) != b".\r\n":
                    pass
                self.when = time.perf_counter()
                client.sendall(b"250 taken\r\n")
                self.caught.release()
                last = next(rest, b"")[:4].upper()
                client.sendall(b"221 bye\r\n" if last == b"QUIT" else b"250 fine\r\n")
                return
            else:
                client.sendall(b"250 fine\r\n")


def send(system: Program, catcher: Catcher) -> tuple[float, float]:
    """Send one message; milliseconds until the client has its 250, and until the sink has the
    message.
    """
    start = time.perf_counter()
    with (
        socket.create_connection((system.host, system.port), TIMEOUT_SECONDS) as client,
        client.makefile("rb") as replies,
    ):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for command in (
            b"",
            b"EHLO client.test\r\n",
            b"MAIL FROM:<c@d.test>\r\n",
            b"RCPT TO:<a@b.test>\r\n",
            b"DATA\r\n",
            BODY + b".\r\n",
        ):
            client.sendall(command)
            while (reply := replies.readline())[3:4] == b"-":
                pass
            if reply[:1] not in (b"2", b"3"):
                raise Failed(f"{system.name} answers {reply!r} to {command[:20]!r}")
        accepted = time.perf_counter()
        client.sendall(b"QUIT\r\n")
        if not catcher.caught.acquire(timeout=TIMEOUT_SECONDS):
            raise Failed(f"{system.name}: nothing in the sink\n{system.tail()}")
    return 1000 * (accepted - start), 1000 * (catcher.when - start)


def figures_of(name: str, times: Sequence[tuple[float, float]]) -> list[Figure]:
    found = []
    for what, values in zip(("accepted", "in the sink"), zip(*times, strict=True), strict=True):
        worst = sorted(values)[len(values) * 9 // 10]
        detail = f"fastest {min(values):.1f} ms, 9 of 10 below {worst:.1f} ms"
        figure = Figure(f"{name}, a lone message {what}", statistics.median(values), "ms", detail)
        found.append(figure)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="how long a lone message is under way")
    parser.add_argument("--messages", type=int, default=60, help="for each (%(default)s)")
    parser.add_argument("--systems", default="mailerq,postfix", help="which (%(default)s)")
    parser.add_argument("--directory", help="where the queues go (a temporary directory)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        root = tempfile.TemporaryDirectory(prefix="lone-", dir=options.directory)
        directory = Path(stack.enter_context(root))
        directory.chmod(0o755)
        systems: list[tuple[Program, Catcher]] = []
        for name in options.systems.split(","):
            catcher = Catcher()
            system = {"mailerq": Mailerq, "postfix": Postfix}[name](directory / name, catcher)
            try:
                systems.append((stack.enter_context(system), catcher))
            except Unavailable as reason:
                progress(f"{name} is left out: {reason}")
        for number in range(-WARM_UP, options.messages):
            for system, catcher in systems:
                time.sleep(PAUSE_SECONDS)
                taken = send(system, catcher)
                if number >= 0:
                    times.setdefault(system.name, []).append(taken)
    figures = [figure for name, found in times.items() for figure in figures_of(name, found)]
    print_document(figures, as_json=options.json, machine=machine())


if __name__ == "__main__":
    main()
