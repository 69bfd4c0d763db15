"""Measure the project against its targets and its peers, and judge the results.

    python benches/targets.py [--full] [--only PROGRAM,…] [--json FILE] [--plot FILE]

Runs the other programs here one after the other; each starts the installed peers and takes turns
with them. Prints the rates and the processor time of all systems, then a table of results against
minimum and goal, and draws the rates.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from figures import Figure, progress, table
from peers import busy_seconds, cpu_seconds, machine
from plot import draw
from relay import describe

HERE: Final = Path(__file__).resolve().parent

PROGRAMS: Final = {
    "relay": ["relay.py", "--systems=mailerq,mailerq-1,postfix,haraka", "--rounds=5"],
    "single": ["relay.py", "--sessions=1", "--ways=kept", "--messages=1000"],
    "large": ["relay.py", "--size=102400", "--ways=kept", "--messages=1000"],
    "plugins": [
        "relay.py", "--systems=mailerq+plugins,mailerq-1", "--base=mailerq-1", "--rounds=5",
    ],
    "rabbitmq": ["relay.py", "--rabbitmq", "--rounds=5"],
    "broker": ["waiting.py", "--rabbitmq"],
    "trusted": ["trusted.py"],
    "dispatch": ["dispatch.py"],
    "processes": ["processes.py"],
    "threads": ["threads.py"],
    "lone": ["lone.py"],
    "idle": ["idle.py"],
    "waiting": ["waiting.py"],
    "flows": ["flows.py"],
}  # fmt: skip
"""The programs to run, by their names here."""

LONGER: Final = ("waiting", "broker", "flows")
"""The programs with a ``--full`` option."""

MORE_IS_BETTER: Final = ("x", "M/s", "/s")
"""Units of rates and their ratios; for all others less is better."""


@dataclass(frozen=True, slots=True)
class Target:
    """The minimum and the goal for a figure of a program.

    If the project was measured with one process and with several, the better figure counts:
    operators choose too.
    """

    text: str
    program: str
    figure: str
    must: float
    goal: float

    def best(self, found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """The figure that counts, if the program has one."""
        names = (self.figure, self.figure.replace("mailerq / postfix", "mailerq-1 / postfix"))
        ours = [figure for figure in found if figure["name"] in names]
        if len(ours) < 2:
            return next(iter(ours), None)
        best = max(ours, key=lambda figure: float(figure["value"]))
        processes = "several processes" if best["name"] == self.figure else "one process"
        return best | {"detail": f"{best['detail']}, {processes}"}

    def verdict(self, value: float, unit: str) -> str:
        sign = 1 if unit in MORE_IS_BETTER else -1
        if sign * value >= sign * self.goal:
            return "goal"
        return "met" if sign * value >= sign * self.must else "MISSED"


TARGETS: Final = (
    Target("end to end / Postfix, new", "relay", "mailerq / postfix, end to end, new", 4, 8),
    Target("end to end / Postfix, kept", "relay", "mailerq / postfix, end to end, kept", 4, 8),
    Target("accept / Postfix, new", "relay", "mailerq / postfix, accept, new", 3, 8),
    Target("accept / Postfix, kept", "relay", "mailerq / postfix, accept, kept", 3, 8),
    *(
        Target(f"RabbitMQ / queue file, end to end, {way}", "rabbitmq",
               f"mailerq+rabbitmq / mailerq-1, end to end, {way}", 0.4, 0.8)
        for way in ("new", "kept")
    ),
    Target("memory, full broker", "broker", "memory", 200, 100),
    Target("start with a full broker", "broker", "start to banner", 2, 1),
    Target("one client / Postfix", "single", "mailerq / postfix, accept, kept", 1.3, 2),
    Target("100 KiB, end to end / Postfix", "large", "mailerq / postfix, end to end, kept", 2, 4),
    *(
        target
        for way in ("new", "kept")
        for target in (
            Target(f"TLS and DKIM, end to end / Postfix, {way}", "trusted",
                   f"mailerq / postfix, end to end, {way}", 3, 6),
            Target(f"a signature, {way}", "trusted", f"cost of a signature, {way}", 0.4, 0.3),
        )
    ),
    Target("accept with plugins / without, new", "plugins",
           "mailerq+plugins / mailerq-1, accept, new", 0.9, 0.97),
    Target("accept with plugins / without, kept", "plugins",
           "mailerq+plugins / mailerq-1, accept, kept", 0.9, 0.97),
    Target("an event through one more plugin", "dispatch", "one more plugin", 15, 5),
    Target("an event with a plugin, from Python", "dispatch", "an event with a plugin", 200, 100),
    Target("message ids of one thread", "dispatch", "message ids, in C", 5, 20),
    Target("two processes / one", "processes", "many processes / one", 1.7, 1.95),
    Target("a lone message, client to sink", "lone", "mailerq, a lone message in the sink", 10, 10),
    Target("memory of an idle connection", "idle", "mailerq, an idle connection", 12, 5),
    Target("accept, full queue / empty, new", "waiting", "full / empty, accept, new", 0.95, 1),
    Target("accept, full queue / empty, kept", "waiting", "full / empty, accept, kept", 0.95, 1),
    Target("memory with a full queue", "waiting", "memory", 200, 100),
    Target("start with a full queue", "waiting", "start to banner", 2, 2),
    Target("start after a kill, full queue", "waiting", "start to banner after a kill", 2, 2),
    *(
        Target(f"{text}, backlog {kind} / none", "flows", f"behind {kind}, {text}", 2, 1.1)
        for kind in (
            "refusing", "silent", "slow", "421", "limited", "paused", "probed", "60 silent",
        )
        for text in ("a lone message", "1,000")
    ),
    Target("clients refused, 60 silent hosts", "flows", "behind 60 silent, refused clients", 0, 0),
    *(
        Target(f"{what}, backlog {kind}", "flows", f"idle, {kind}, {what}", must, 0)
        for kind in ("refusing", "silent")
        for what, must in (("processor", 1), ("commits", 0), ("reads", 0))
    ),
    *(
        target
        for count in ("5,000", "50,000")
        for target in (
            Target(f"{count} destinations / one", "flows", f"{count} destinations / one", 0.5, 0.8),
            Target(f"memory of one of {count} destinations", "flows",
                   f"{count} destinations, memory of one", 2, 0.5),
        )
    ),
    Target("attempts lost to a peer that closes", "flows",
           "closing, results that cost an attempt", 0, 0),
    *(
        Target(f"a limit of 10 a second, {text}", "flows", f"limited to 10 a second, {text}",
               9.5, 9.9)
        for text in ("one process", "two processes")
    ),
)  # fmt: skip


def run(command: Sequence[str]) -> dict[str, Any] | None:
    """The results of a program, and the share of the machine that others took; None: no results."""
    start, busy, ours = time.monotonic(), busy_seconds(), cpu_seconds(os.getpid())
    program = subprocess.run(
        [sys.executable, HERE / command[0], *command[1:], "--json"],
        stdout=subprocess.PIPE,
        check=False,
    )
    if program.returncode != 0:
        return None
    taken = busy_seconds() - busy - (cpu_seconds(os.getpid()) - ours)
    cores = len(os.sched_getaffinity(0))
    others = max(0.0, taken / (cores * (time.monotonic() - start)))
    return {"command": " ".join(command), "others": others, **json.loads(program.stdout)}


def judge(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets of the programs that have run."""
    rows = []
    for target in TARGETS:
        figure = target.best(found.get(target.program, {}).get("figures", ()))
        if figure is not None:
            rows.append({
                **figure,
                "name": target.text,
                "must": target.must,
                "goal": target.goal,
                "verdict": target.verdict(figure["value"], figure["unit"]),
            })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="everything, beside the peers")
    parser.add_argument("--full", action="store_true", help="a million messages waiting")
    parser.add_argument("--only", default=",".join(PROGRAMS), help="which programs (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rates as SVG")
    options = parser.parse_args()
    found = {}
    names = options.only.split(",")
    for name in names:
        command = PROGRAMS.get(name)
        if command is None:
            parser.error(f"--only: there is no {name!r}, only {', '.join(PROGRAMS)}")
        command = command + ["--full"] * (options.full and name in LONGER)
        progress(f"\n{name}: python benches/{' '.join(command)}")
        document = run(command)
        if document is not None:
            found[name] = document
    for name, document in found.items():
        if "medians" in document and name != "plugins":
            print(f"\n{document['command']}\n\n{describe(document['medians'], [])}")
    rows = judge(found)
    lines = [("", "found", "must", "goal", "", "")]
    for row in rows:
        figure = Figure(row["name"], row["value"], row["unit"], row["detail"])
        cells = (figure.text, f"{row['must']:g}", f"{row['goal']:g}", row["verdict"])
        lines.append((figure.name, *cells, figure.detail))
    print("\n" + table(lines))
    shares = ", ".join(f"{name} {document['others']:.0%}" for name, document in found.items())
    print(f"\nOthers took of the machine meanwhile: {shares}.")
    if missing := [name for name in names if name not in found]:
        print(f"Not measured, see above why: {', '.join(missing)}.")
    document = {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "targets": rows,
        "programs": found,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.plot and "relay" in found:
        options.plot.write_text(draw(document))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
