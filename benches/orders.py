"""Measure ``mailerq queue`` with many messages waiting: seconds, and memory of the command.

    python benches/orders.py [--messages N] [--directory DIR] [--daemon]

The queue is filled first: a thousand domains, ten tags, a tenth of all mail for one domain, each
message tried once and due in a day. Then each command runs once, those that change messages on a
tenth of them. With --daemon a daemon runs beside and makes the changes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from mailerq.cli import control
from mailerq.message import Message, format_time
from mailerq.queues import Publication
from mailerq.queues.embedded.queue_file import QueueFile

BODY: Final = b"Subject: news\r\n\r\n" + b"All that is new, in one line of text.\r\n" * 40

AT_A_TIME: Final = 5_000
DAY: Final = 86_400

START_SECONDS: Final = 60.0

COMMANDS: Final = (
    ("list",),
    ("count", "--domain=large.test"),
    ("count", "--sender=news-7@*"),
    ("count", "--error=mailbox busy"),
    ("count", "--older=1h"),
    ("show", "--tag=run-3", "--limit=20"),
    ("hold", "--tag=run-3"),
    ("count", "--held"),
    ("release", "--tag=run-3"),
    ("reroute", "--tag=run-4", "--via=relay.test"),
    ("bounce", "--tag=run-5", "--yes"),
    ("delete", "--tag=run-6", "--yes"),
    ("delete", "--domain=large.test", "--yes"),
)


def message(number: int, now: float) -> Message:
    domain = "large.test" if number % 10 == 0 else f"d{number % 1000}.test"
    result = {
        "attempt": 1, "type": "error", "state": "rcpt to", "result": "error",
        "time": format_time(now), "mta": f"mx.{domain}", "from": "192.0.2.9", "to": "192.0.2.3",
        "code": 450, "status": "4.2.0", "description": "mailbox busy, try again later",
    }  # fmt: skip
    properties = {
        "envelope": f"news-{number % 100}@sender{number % 50}.test",
        "recipient": f"user{number}@{domain}",
        "tags": [f"run-{number // 7 % 10}", "news"],
        "received": format_time(now - number % 7200),
        "message-id": f"{number:032x}",
        "results": [result],
    }
    return Message(properties, BODY)


def fill(directory: str, count: int) -> None:
    now = time.time()
    with QueueFile.open(directory) as file:
        for start in range(0, count, AT_A_TIME):
            numbers = range(start, min(start + AT_A_TIME, count))
            file.publish(Publication("outbox", message(each, now), now + DAY) for each in numbers)


@contextmanager
def daemon(settings: list[str]) -> Iterator[None]:
    """A daemon on the queue."""
    more = ["--smtp-ip=127.0.0.1", "--smtp-port=0", "--plugin-directory="]
    with subprocess.Popen([sys.executable, "-m", "mailerq", *settings, *more]) as process:
        try:
            directory = settings[0].partition("=")[2]
            end = time.monotonic() + START_SECONDS
            while True:
                try:
                    control.ask(directory, "status")
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > end:
                        raise SystemExit("the daemon does not start") from None
                    time.sleep(0.1)
            yield
        finally:
            process.terminate()


def run(settings: list[str], words: tuple[str, ...]) -> None:
    began = time.perf_counter()
    command = [sys.executable, "-m", "mailerq", "queue", *words, "--json", *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            last = line
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    reply = json.loads(last)
    found = ""
    if isinstance(reply, dict) and ("done" in reply or "count" in reply):
        found = f"{reply.get('done', reply.get('count')):,}"
    memory = usage.ru_maxrss * 1024 / 1e6
    print(f"{' '.join(words):<44}{found:>12}{seconds:>9.2f} s{memory:>8.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path, help="where the queue is made")
    parser.add_argument("--daemon", action="store_true")
    parser.add_argument("--fill", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fill:
        fill(options.fill, options.messages)
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        # In a process of its own: what this one has in memory counts for its children.
        command = [sys.executable, __file__, f"--messages={options.messages}"]
        subprocess.run([*command, f"--fill={directory}"], check=True)
        settings = [f"--queue-directory={directory}", "--hostname=bench.test"]
        settings.append(f"--application-log={directory}/log")
        if not options.daemon:
            for words in COMMANDS:
                run(settings, words)
            return
        with daemon(settings):
            for words in COMMANDS:
                run(settings, words)


if __name__ == "__main__":
    main()
