"""Measure how fast mail goes through a server: in, safely kept, and out again.

`smtp-source` sends N messages over several sessions to the server under test, which relays all of
them to one `smtp-sink`. *Accept* is N over the time until the last 250. *End to end* is N over the
time until the last message is in the sink and the server's queue is empty. Everything is measured
twice: with a new connection for each message, and with kept connections.

    python benches/relay.py                     the project, and Postfix beside it
    python benches/relay.py --systems mailerq+plugins,mailerq-1 --base mailerq-1
    python benches/relay.py --rabbitmq          the queue in a file, and in a broker
    python benches/relay.py --beside DIRECTORY  one process, and another version's
    python benches/relay.py --target HOST:PORT  a server that runs already

"mailerq" is the project with a process for each core, as Postfix has one for each connection.
"mailerq-1" is a single process. "mailerq+plugins" is a single process with one C plugin that
handles each of the six events of an incoming mail. "mailerq+rabbitmq" is a single process whose
queues are in a RabbitMQ that this program starts, with quorum queues; ``--rabbitmq`` measures it
beside "mailerq-1", whose queue is a file. The systems take turns within one run, because
only figures of one run on one machine can be compared. benches/README.md explains each figure.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, Protocol

from broker import OnBroker
from figures import Figure, print_document, progress, table
from haraka import Haraka
from peers import (
    LOOPBACK,
    Failed,
    Mailerq,
    Postfix,
    Program,
    Running,
    Sink,
    System,
    Unavailable,
    busy_seconds,
    compile_plugin,
    cpu_seconds,
    file_system,
    find_program,
    machine,
)

from mailerq.address import split_host_port

POLL_SECONDS: Final = 0.002
"""Poll interval: fine enough for a run of a second, and costs 1 % of a core."""

WARM_UP_MESSAGES: Final = 10_000
"""Messages that each system relays before measurement: sustained load is what counts. On a file
system without a journal, recently deleted files make new ones expensive: a system that keeps
each mail in a file is twice as fast for its first two thousand as from some eight thousand on.
"""

WARM_UP_SESSIONS: Final = 20
WARM_UP_BYTES: Final = 2048
QUIET: Final = 0.1
"""The share of the machine that other load may take; above it the rates mean little."""

COLUMNS: Final = {
    "accept": ("accept/s", ".0f"),
    "end_to_end": ("end to end/s", ".0f"),
    "cpu": ("CPU ms/message", ".2f"),
    "broker": ("of its broker", ".2f"),
    "peers": ("of client and sink", ".2f"),
}
"""Printed columns: attribute of a run -> heading and format."""

COMPARED: Final = {"accept": "accept", "end_to_end": "end to end", "cpu": "CPU"}
"""Compared figures: attribute of a run -> name of the ratio."""

SYSTEMS: Final = (
    "mailerq", "mailerq-1", "mailerq+plugins", "mailerq+rabbitmq", "postfix", "haraka",
)  # fmt: skip


class CountingSink(Protocol):
    """A sink that counts its mail."""

    def count(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one system. Rates in messages/s; CPU in milliseconds per message.

    `peers` is the CPU of the programs beside the system: client, sink and this benchmark. `others`
    is the share of the machine, from 0 to 1, that other programs took. `broker` is the CPU of
    the broker that the system keeps its queues in, beside `cpu`.
    """

    system: str
    kept: bool
    accept: float
    end_to_end: float | None
    cpu: float | None
    peers: float
    others: float
    broker: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """The load to send. `size` is the body in bytes, `timeout` the limit of a run in seconds."""

    messages: int
    sessions: int
    size: int
    timeout: float


def relay(
    system: System,
    sink: CountingSink | None,
    load: Load,
    *,
    kept: bool,
    source: Callable[[System, Load, bool], list[str]] | None = None,
) -> Run:
    """Send the load through a system once. Raises `Failed`.

    `source` makes the command of the client, from the system, the load, and whether to keep the
    connections; smtp-source by default.
    """
    before = sink.count() if sink else 0
    cpu_before, ours_before = system.cpu(), cpu_seconds(os.getpid())
    broker_before = system.broker_cpu()
    others_before = _others_seconds()
    accepted = finished = None
    start = time.monotonic()
    command = (source or smtp_source)(system, load, kept)
    with _client(command) as client:
        while accepted is None or finished is None:
            now = time.monotonic()
            if accepted is None and client.poll() is not None:
                if client.returncode != 0:
                    reason = client.stderr.read().decode(errors="replace") if client.stderr else ""
                    raise Failed(f"the client of {system.name}: {reason.strip()}\n{system.tail()}")
                accepted = now - start
            if finished is None and sink is None:
                finished = accepted
            elif (
                finished is None
                and sink is not None
                and sink.count() - before >= load.messages
                and system.waiting() == 0
            ):
                finished = now - start
            if now - start > load.timeout:
                raise Failed(_describe_timeout(system, sink, load, before, accepted))
            time.sleep(POLL_SECONDS)
    others = (_others_seconds() - others_before) / ((time.monotonic() - start) * _cores())
    cpu_after, ours = system.cpu(), cpu_seconds(os.getpid()) - ours_before
    used = None if cpu_after is None or cpu_before is None else cpu_after - cpu_before
    if used is not None and isinstance(system, Program):
        ours -= used  # a child of ours too
    broker = system.broker_cpu()
    spent = None if broker is None or broker_before is None else broker - broker_before
    if spent is not None:
        ours -= spent
    return Run(
        system=system.name,
        kept=kept,
        accept=load.messages / accepted,
        end_to_end=None if sink is None else load.messages / finished,
        cpu=None if used is None else 1000 * used / load.messages,
        peers=1000 * ours / load.messages,
        others=max(0.0, others),
        broker=None if spent is None else 1000 * spent / load.messages,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _others_seconds() -> float:
    """CPU time of everything except this benchmark and its children."""
    return busy_seconds() - cpu_seconds(os.getpid())


def _describe_timeout(
    system: System, sink: CountingSink | None, load: Load, before: int, accepted: float | None
) -> str:
    system.check()
    arrived = "" if sink is None else f", {sink.count() - before} of them in the sink"
    return (
        f"{system.name}: not done after {load.timeout:.0f} s with {load.messages} messages: "
        f"{'some' if accepted is None else 'all'} accepted{arrived}, "
        f"{system.waiting()} waiting\n{system.tail()}"
    )


def smtp_source(system: System, load: Load, kept: bool) -> list[str]:
    """The command of a client that sends the load without TLS."""
    command = [find_program("smtp-source", "postfix")]
    command += ["-d"] if kept else []
    command += ["-s", str(load.sessions), "-m", str(load.messages), "-l", str(load.size)]
    return [*command, "-f", "c@d.test", "-t", "a@b.test", system.address]


@contextlib.contextmanager
def _client(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    client = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield client
    finally:
        client.kill()
        client.wait()
        if client.stderr:
            client.stderr.close()


def measure(
    systems: Sequence[tuple[System, CountingSink | None]],
    load: Load,
    *,
    rounds: int,
    ways: Sequence[bool],
    warm_up: int = WARM_UP_MESSAGES,
    source: Callable[[System, Load, bool], list[str]] | None = None,
) -> list[Run]:
    """Warm every system up; run each `rounds` times in each way of connecting, in turns.

    `source` as in `relay`.
    """
    runs = []
    for system, sink in systems:
        if warm_up:
            timeout = load.timeout * max(warm_up / load.messages, 1)
            first = Load(warm_up, WARM_UP_SESSIONS, WARM_UP_BYTES, timeout)
            run = relay(system, sink, first, kept=True, source=source)
            progress(f"{system.name}, {warm_up} messages to warm up: accept {run.accept:.0f}/s")
    for kept in ways:
        for number in range(rounds):
            for system, sink in systems:
                run = relay(system, sink, load, kept=kept, source=source)
                runs.append(run)
                way = "kept" if kept else "new"
                progress(
                    f"{system.name}, {way} connections, {number + 1} of {rounds}: "
                    f"accept {run.accept:.0f}/s, end to end {run.end_to_end or 0:.0f}/s"
                )
    return runs


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Medians, lowest and highest, for each system, with new and with kept connections."""
    groups: dict[tuple[str, bool], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.system, run.kept), []).append(run)
    rows: list[dict[str, Any]] = []
    for (system, kept), members in groups.items():
        row: dict[str, Any] = {"system": system, "kept": kept}
        for figure in COLUMNS:
            values = [value for run in members if (value := getattr(run, figure)) is not None]
            row[figure] = statistics.median(values) if values else None
            row[figure + "_range"] = [min(values), max(values)] if values else None
        rows.append(row)
    return rows


def compare(rows: Sequence[dict[str, Any]], base: str) -> list[Figure]:
    """The medians of each system over those of the base, new and kept."""
    bases = {row["kept"]: row for row in rows if row["system"] == base}
    figures = []
    for row in rows:
        other = bases.get(row["kept"], row)
        for figure, what in COMPARED.items():
            if other is not row and row[figure] is not None and other[figure]:
                way = "kept" if row["kept"] else "new"
                form = COLUMNS[figure][1]
                name = f"{row['system']} / {base}, {what}, {way}"
                detail = f"{row[figure]:{form}} and {other[figure]:{form}}"
                figures.append(Figure(name, row[figure] / other[figure], "x", detail))
    return figures


def _cell(row: dict[str, Any], figure: str, form: str) -> str:
    if row[figure] is None:
        return "-"
    low, high = row[figure + "_range"]
    return f"{row[figure]:{form}} ({low:{form}}-{high:{form}})"


def describe(rows: Sequence[dict[str, Any]], ratios: Sequence[Figure]) -> str:
    """Medians and ratios for people."""
    lines = [("system", "connections", *(heading for heading, _ in COLUMNS.values()))]
    for row in rows:
        cells = (_cell(row, figure, form) for figure, (_, form) in COLUMNS.items())
        lines.append((row["system"], "kept" if row["kept"] else "new", *cells))
    ratio_lines = [(ratio.name, ratio.text, ratio.detail) for ratio in ratios]
    return "\n\n".join(table(part) for part in (lines, ratio_lines) if part)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The relay benchmark: mail in, durably kept, and out again.",
        epilog="Needs smtp-source and smtp-sink (Debian package postfix).",
    )
    add = parser.add_argument
    add("-n", "--messages", type=int, default=3000, help="messages in a run (%(default)s)")
    add("--sessions", type=int, default=20, help="sessions at a time (%(default)s)")
    add("--size", type=int, default=2048, help="bytes of a body (%(default)s)")
    add("--rounds", type=int, default=3, help="runs of each system and way (%(default)s)")
    add("--warm-up", type=int, default=WARM_UP_MESSAGES, metavar="N",
        help="messages that each system relays before (%(default)s)")  # fmt: skip
    add("--ways", choices=("both", "new", "kept"), default="both",
        help="a new connection for each message, kept ones, or both (%(default)s)")  # fmt: skip
    add("--systems", default="mailerq,postfix",
        help=f"what to start, of {', '.join(SYSTEMS)} (%(default)s); empty: none")  # fmt: skip
    add("--rabbitmq", action="store_true",
        help="--systems=mailerq+rabbitmq,mailerq-1 --base=mailerq-1")  # fmt: skip
    add("--beside", type=Path, metavar="DIRECTORY", help="a checkout of another version, built: "
        "--systems=mailerq-1,beside --base=beside")  # fmt: skip
    add("--base", default="postfix", help="which the others are compared with (%(default)s)")
    add("--target", metavar="HOST:PORT", help="measure this running server (alone, unless "
        "--systems is given too)")  # fmt: skip
    add("--target-pid", type=int, metavar="PID", help="its process, to tell its CPU time")
    add("--sink-port", type=int, metavar="PORT", help="start the sink that --target relays to "
        "here; without it only accept is measured")  # fmt: skip
    add("--mailerq", default="", metavar="COMMAND", help="how to start the project")
    add("--mailerq-option", action="append", default=[], metavar="--KEY=VALUE",
        help="one more setting for the project; may be repeated")  # fmt: skip
    add("--plugins", type=Path, metavar="DIRECTORY", help="plugins that the project loads")
    add("--directory", type=Path, help="where the queues go (a temporary directory)")
    add("--timeout", type=float, default=120.0, help="seconds for one run (%(default)s)")
    add("--keep", action="store_true", help="leave queues and logs in place")
    add("--json", action="store_true", help="print JSON, every single run included")
    options = parser.parse_args(arguments)
    if options.rabbitmq:
        options.systems, options.base = "mailerq+rabbitmq,mailerq-1", "mailerq-1"
    if options.beside:
        if options.rabbitmq:
            parser.error("--beside and --rabbitmq are two comparisons: name one")
        if not (options.beside / ".venv" / "bin" / "python").exists():
            parser.error(f"--beside: {options.beside} is not built; run make build there")
        options.systems, options.base = "mailerq-1,beside", "beside"
    for name in ("messages", "sessions", "size", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.warm_up < 0:
        parser.error("--warm-up must be at least 0")
    if options.target and not any(
        argument.split("=")[0] == "--systems" for argument in (arguments or sys.argv[1:])
    ):
        options.systems = ""
    known = [*SYSTEMS, "beside"] if options.beside else SYSTEMS
    unknown = [name for name in _names(options) if name not in known]
    if unknown:
        parser.error(f"--systems: there is no {unknown[0]!r}, only {', '.join(SYSTEMS)}")
    if not options.target and not _names(options):
        parser.error("nothing to measure: name --systems or a --target")
    return options


def _names(options: argparse.Namespace) -> list[str]:
    return [name for name in options.systems.split(",") if name]


@contextlib.contextmanager
def _systems(
    options: argparse.Namespace, directory: Path
) -> Iterator[list[tuple[System, Sink | None]]]:
    """Start the systems to measure; report and leave out a system that this machine lacks."""
    with contextlib.ExitStack() as stack:
        found: list[tuple[System, Sink | None]] = []
        if options.target:
            host, port = split_host_port(options.target)
            target = Running(host or LOOPBACK, port, options.target_pid)
            sink = None
            if options.sink_port:
                sink = stack.enter_context(Sink(directory / "target-sink", options.sink_port))
            found.append((stack.enter_context(target), sink))
        for name in _names(options):
            try:
                sink = stack.enter_context(Sink(directory / f"{name}-sink"))
                found.append((stack.enter_context(_make(name, options, directory, sink)), sink))
            except Unavailable as reason:
                progress(f"{name} is left out: {reason}")
        yield found


def _make(name: str, options: argparse.Namespace, directory: Path, sink: Sink) -> System:
    if name == "postfix":
        return Postfix(directory / name, sink)
    if name == "haraka":
        return Haraka(directory / name, sink)
    if name == "mailerq+rabbitmq":
        return OnBroker(directory / name, sink, name=name, options=options.mailerq_option)
    if name == "beside":
        checkout = options.beside.resolve()
        return Mailerq(directory / name, sink, name=name, checkout=checkout)
    plugins = options.plugins
    if name == "mailerq+plugins":
        plugins = directory / "plugins"
        plugins.mkdir()
        compile_plugin(Path(__file__).with_name("events.c"), plugins / "events.so")
    return Mailerq(
        directory / name,
        sink,
        name=name,
        command=shlex.split(options.mailerq),
        plugins=plugins and plugins.resolve(),
        processes=_cores() if name == "mailerq" else 1,
        options=options.mailerq_option,
    )


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 0 if every system did its work."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _stop)
    load = Load(options.messages, options.sessions, options.size, options.timeout)
    ways = {"both": (False, True), "new": (False,), "kept": (True,)}[options.ways]

    directory = Path(tempfile.mkdtemp(prefix="relay-", dir=options.directory))
    # smtp-sink and the daemons of Postfix run as other users.
    directory.chmod(0o755)
    kind = file_system(directory)
    if kind in ("tmpfs", "ramfs"):
        progress(f"{directory} is on {kind}, where fsync costs nothing: use --directory")
    try:
        with _systems(options, directory) as systems:
            if not systems:
                return 1
            runs = measure(systems, load, rounds=options.rounds, ways=ways, warm_up=options.warm_up)
    except Unavailable as reason:
        progress(str(reason))
        return 1
    except Failed as reason:
        progress(str(reason))
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if options.keep:
            progress(f"queues and logs are in {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    rows = summarise(runs)
    ratios = compare(rows, options.base)
    if options.json:
        print_document(
            ratios,
            as_json=True,
            machine=machine() | {"file_system": kind},
            load=asdict(load) | {"rounds": options.rounds},
            medians=rows,
            runs=[asdict(run) for run in runs],
        )
    else:
        print(
            f"{load.messages} messages of {load.size} bytes, {load.sessions} sessions, "
            f"median of {options.rounds} (lowest-highest), on {kind}\n"
        )
        print(describe(rows, ratios))
        others = statistics.median(run.others for run in runs)
        if others > QUIET:
            print(
                f"\nOther programs took {others:.0%} of the machine meanwhile. A system with many "
                "processes\nthen gets a larger share of the rest than one with few: only the CPU "
                "time can be compared."
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
