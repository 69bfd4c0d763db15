"""Measure the memory of an idle connection.

    python benches/idle.py [--connections N] [--systems mailerq,postfix]

Clients in another process connect, say EHLO, and then nothing. The figure is the growth of the
server's memory per client. Pages that its processes share count once (PSS); kernel memory (sockets)
is left out. A few connections are opened first, so that one-time loading does not count.
"""

from __future__ import annotations

import argparse
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from figures import Figure, print_document, progress
from peers import Destination, Failed, Mailerq, Postfix, Program, Unavailable, free_port, machine

from mailerq.address import split_host_port

WARM_UP: Final = 50
POSTFIX_MOST: Final = 150
"""Postfix runs one process per connection: this number gives a clear figure."""
SPARE_FILES: Final = 200


def hold(host: str, port: int, count: int) -> None:
    """The clients: open the connections, report, and hold them until stdin ends."""
    clients = []
    for _ in range(count):
        client = socket.create_connection((host, port), timeout=30)
        with client.makefile("rb") as replies:
            replies.readline()
            client.sendall(b"EHLO client.test\r\n")
            while (line := replies.readline())[3:4] == b"-":
                pass
        if not line.startswith(b"250"):
            raise SystemExit(f"connection {len(clients)}: {line!r}")
        clients.append(client)
    print("open", flush=True)
    sys.stdin.read()


@contextmanager
def idle(system: Program, count: int) -> Iterator[None]:
    """Idle connections, open while the context lasts."""
    command = [sys.executable, __file__, "--hold", system.address]
    with subprocess.Popen(
        [*command, "--connections", str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as clients:
        assert clients.stdout is not None
        if clients.stdout.readline() != b"open\n":
            raise Failed(f"{system.name} does not take {count} connections\n{system.tail()}")
        yield


def measure(system: Program, count: int) -> Figure:
    with idle(system, WARM_UP):
        before = system.memory()
        with idle(system, count):
            after = system.memory()
    growth = after - before
    detail = f"{count:,} of them: from {before / 1e6:.1f} to {after / 1e6:.1f} MB"
    return Figure(f"{system.name}, an idle connection", growth / count / 1000, "KB", detail)


def make(name: str, directory: Path, count: int) -> Program:
    nowhere: Destination = argparse.Namespace(host="127.0.0.1", port=free_port())
    if name == "postfix":
        return Postfix(directory, nowhere)
    return Mailerq(directory, nowhere, options=[f"--smtp-connections={count + SPARE_FILES}"])


def main() -> None:
    parser = argparse.ArgumentParser(description="what an idle connection costs in memory")
    parser.add_argument("--connections", type=int, default=5000, help="how many (%(default)s)")
    parser.add_argument("--systems", default="mailerq,postfix", help="which (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--hold", metavar="HOST:PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if options.hold:
        return hold(*split_host_port(options.hold), options.connections)
    count = min(options.connections, most - SPARE_FILES)
    if count < options.connections:
        progress(f"{most} files may be open here (ulimit -Hn): {count} connections")
    figures = []
    with tempfile.TemporaryDirectory(prefix="idle-") as root:
        Path(root).chmod(0o755)
        for name in options.systems.split(","):
            try:
                with make(name, Path(root, name), count) as system:
                    number = min(count, POSTFIX_MOST) if name == "postfix" else count
                    figures.append(measure(system, number))
            except Unavailable as reason:
                progress(f"{name} is left out: {reason}")
    print_document(figures, as_json=options.json, machine=machine())
    return None


if __name__ == "__main__":
    main()
