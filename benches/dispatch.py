"""The costs of the plugin interface: an event, a plugin in its chain, a suspension, a timer, an id.

    python benches/dispatch.py [--rounds N]

Compiles plugins that do nothing, loads 0, 1, 3 and 10 of them, and calls them as the engine does.
Each figure is the fastest of several rounds, because other load can only add time. "One more
plugin" is the slope from 1 to 10 plugins, in C only.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from figures import Figure, print_document, table
from peers import compile_plugin, machine

from mailerq import _core
from mailerq.plugins import Connection, Plugins

SOURCE = """
#include <mailerq.h>
#include <pthread.h>
int mq_version() { return MQ_API_VERSION; }
bool mq_smtp_in_mailfrom(MQ_Context *context, MQ_SmtpConnection *connection,
                         const char *address, size_t size) { return false; }
bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                       const char *address, size_t size)
{ MQ_Continue(context); return true; }
static void due(void *context) { MQ_Continue(context); }
bool mq_smtp_in_connect(MQ_Context *context, MQ_SmtpConnection *connection)
{ MQ_TimerStart(context, 0, due, context); return true; }
static void nothing(void *data) { }
bool mq_smtp_in_secure(MQ_Context *context, MQ_SmtpConnection *connection)
{
    for (int count = 1; count < 10000; ++count) MQ_TimerStart(context, 0, nothing, 0);
    MQ_TimerStart(context, 0, due, context);
    return true;
}
static void *thread(void *context) { MQ_Continue(context); return 0; }
bool mq_smtp_in_close(MQ_Context *context, MQ_SmtpConnection *connection)
{
    pthread_t id;
    pthread_create(&id, 0, thread, context);
    pthread_detach(id);
    return true;
}
"""


def compile_plugins(directory: Path, count: int) -> None:
    """Put copies of the plugin in a directory; the linker would share a single file."""
    source = directory / "plugin.c"
    source.write_text(SOURCE)
    compile_plugin(source, directory / "0.so")
    for number in range(1, count):
        shutil.copy(directory / "0.so", directory / f"{number}.so")


async def fastest(
    rounds: int, count: int, event: Callable[..., Awaitable[object]], *address: str
) -> float:
    """Nanoseconds for one await of an event, without the loop around it."""
    figures = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        for _ in range(count):
            pass
        empty = time.perf_counter_ns() - start
        if address:
            (argument,) = address
            start = time.perf_counter_ns()
            for _ in range(count):
                await event(argument)
        else:
            start = time.perf_counter_ns()
            for _ in range(count):
                await event()
        figures.append((time.perf_counter_ns() - start - empty) / count)
    return min(figures)


async def measure(count: int, rounds: int) -> dict[str, float]:
    """The costs of events with this number of plugins."""
    with tempfile.TemporaryDirectory() as directory:
        if count:
            compile_plugins(Path(directory), count)
        plugins = Plugins.load(directory)
        plugins.initialize()
        context = await plugins.open_context()
        connection: Connection = context.connection(0)
        figures = {
            "decided": await fastest(rounds, 50_000, connection.mailfrom, "a@b.test"),
            "handed back at once": await fastest(rounds, 50_000, connection.rcptto, "a@b.test"),
            "suspended, new thread": await fastest(rounds, 300, connection.close),
            "suspended, timer": await fastest(rounds, 300, connection.connect),
            "a timer of 10000": await fastest(rounds, 1, connection.secured) / 10_000,
        }
        start = time.perf_counter_ns()
        for _ in range(100_000):
            context.connection(0)
        figures["new connection"] = (time.perf_counter_ns() - start) / 100_000
        await connection.close()
        await context.close()
        plugins.cleanup()
        return figures


def measure_ids() -> tuple[float, float]:
    """Nanoseconds for an id in C, and from Python."""
    plugins = Plugins.load(None)
    start = time.perf_counter_ns()
    _core.generate_ids(2_000_000)
    inside = (time.perf_counter_ns() - start) / 2_000_000
    start = time.perf_counter_ns()
    for _ in range(500_000):
        plugins.message_id()
    return inside, (time.perf_counter_ns() - start) / 500_000


def main() -> None:
    parser = argparse.ArgumentParser(description="What the plugin interface costs.")
    parser.add_argument("--rounds", type=int, default=7, help="of each (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    counts = (0, 1, 3, 10)
    costs = {count: trio.run(measure, count, options.rounds) for count in counts}
    if not options.json:
        lines = [("nanoseconds", *(f"{count} plugins" for count in counts))]
        for name in costs[0]:
            lines.append((name, *(f"{costs[count][name]:.0f}" for count in counts)))
        print(table(lines), end="\n\n")
    inside, outside = measure_ids()
    decided = {count: costs[count]["decided"] for count in counts}
    figures = [
        Figure("one more plugin", (decided[10] - decided[1]) / 9, "ns"),
        Figure("an event with a plugin", decided[1], "ns", f"without {decided[0]:.0f} ns"),
        Figure("message ids, in C", 1000 / inside, "M/s"),
        Figure("message ids, from Python", 1000 / outside, "M/s"),
    ]
    print_document(figures, as_json=options.json, machine=machine(), nanoseconds=costs)


if __name__ == "__main__":
    main()
