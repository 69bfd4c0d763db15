"""Measure what `smtp-threads` gives, with a plugin that computes for each mail that comes in.

    python benches/threads.py [--threads N] [--microseconds N] [--rounds N]

The plugin (compute.c) runs without Python's lock, so workers can run it at once, each on a core of
its own. A server of one worker and one of N take turns; each relays mail as relay.py does it, over
kept connections. With ``--microseconds 0`` the plugin does nothing, and what is left is the price
of more workers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from figures import Figure, print_document
from peers import Failed, Mailerq, Sink, Unavailable, compile_plugin, machine
from relay import Load, measure

HERE = Path(__file__).resolve().parent


def run(options: argparse.Namespace, directory: Path) -> list[Figure]:
    plugins = directory / "plugins"
    plugins.mkdir()
    compile_plugin(HERE / "compute.c", plugins / "compute.so")
    numbers = (1, options.threads)
    load = Load(options.messages, sessions=20, size=2048, timeout=120.0)
    with ExitStack() as stack:
        systems = []
        for number in numbers:
            sink = stack.enter_context(Sink(directory / f"sink-{number}"))
            name = f"{number} workers"
            command = ["env", f"COMPUTE_MICROSECONDS={options.microseconds}", *Mailerq.find()]
            settings = [f"--smtp-threads={number}"]
            system = Mailerq(
                directory / name, sink, name=name, command=command, plugins=plugins,
                options=settings,
            )  # fmt: skip
            systems.append((stack.enter_context(system), sink))
        runs = measure(systems, load, rounds=options.rounds, ways=(True,), warm_up=options.messages)
    rates = {
        system.name: statistics.median(run.accept for run in runs if run.system == system.name)
        for system, _ in systems
    }
    one, many = rates.values()
    detail = f"{many:,.0f} and {one:,.0f} messages/s, {options.microseconds} us in the plugin"
    return [Figure(f"{options.threads} workers / one, accept", many / one, "x", detail)]


def main() -> None:
    parser = argparse.ArgumentParser(description="what more workers give")
    add = parser.add_argument
    add("--threads", type=int, default=max(len(os.sched_getaffinity(0)), 2),
        help="workers of the second server (%(default)s)")  # fmt: skip
    add("--microseconds", type=int, default=1000, help="of the plugin, a mail (%(default)s)")
    add("-n", "--messages", type=int, default=2000, help="messages in a run (%(default)s)")
    add("--rounds", type=int, default=3, help="runs of each (%(default)s)")
    add("--directory", help="where the queues go (a temporary directory)")
    add("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="threads-", dir=options.directory) as root:
        Path(root).chmod(0o755)
        try:
            figures = run(options, Path(root))
        except (Failed, Unavailable) as reason:
            sys.exit(str(reason))
    print_document(figures, as_json=options.json, machine=machine())


if __name__ == "__main__":
    main()
