"""Measure how fast a queue empties: from the start of the project until the sink has every message.

    python benches/drain.py [--waiting N] [--rounds N]

Fills a queue once with messages of 2 KiB that are due, and starts the project on a copy in each
round.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from figures import Figure, print_document, progress
from peers import Failed, Mailerq, Sink, machine
from waiting import fill

POLL_SECONDS: Final = 0.01
TIMEOUT_SECONDS: Final = 300.0


def drain(queue: Path, directory: Path, count: int) -> tuple[float, float]:
    """Empty a copy of a queue; messages per second, and CPU milliseconds per message."""
    shutil.copytree(queue, directory / "mailerq" / "queue")
    with Sink(directory / "sink") as sink, Mailerq(directory / "mailerq", sink) as system:
        # Messages sent before the banner appeared are not counted.
        start, before, cpu_before = time.monotonic(), sink.count(), system.cpu()
        messages = count - before
        if messages <= 0:
            raise Failed(f"all {count} messages were gone before the banner: take more")
        while sink.count() < count or system.waiting():
            for program in (sink, system):
                program.check()
            if time.monotonic() - start > TIMEOUT_SECONDS:
                raise Failed(f"{count - sink.count()} messages are still there\n{system.tail()}")
            time.sleep(POLL_SECONDS)
        seconds, cpu = time.monotonic() - start, system.cpu()
    assert cpu is not None
    assert cpu_before is not None
    return messages / seconds, 1000 * (cpu - cpu_before) / messages


def main() -> None:
    parser = argparse.ArgumentParser(description="how fast a queue empties")
    parser.add_argument("--waiting", type=int, default=20_000, help="messages (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="starts (%(default)s)")
    parser.add_argument("--directory", help="where the queues go (a temporary directory)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="drain-", dir=options.directory) as root:
        Path(root).chmod(0o755)
        fill(Path(root, "queue"), options.waiting, after=-options.waiting)
        for number in range(1, options.rounds + 1):
            try:
                found.append(drain(Path(root, "queue"), Path(root, str(number)), options.waiting))
            except Failed as reason:
                sys.exit(str(reason))
            progress(f"{number} of {options.rounds}: {found[-1][0]:.0f}/s")
            shutil.rmtree(Path(root, str(number)))
    rates, cpu = zip(*found, strict=True)
    detail = f"{options.waiting:,} waiting, {min(rates):.0f} to {max(rates):.0f}"
    figures = [
        Figure("delivered", statistics.median(rates), "/s", detail),
        Figure("processor time of a message", statistics.median(cpu), "ms"),
    ]
    print_document(figures, as_json=options.json, machine=machine(), waiting=options.waiting)


if __name__ == "__main__":
    main()
