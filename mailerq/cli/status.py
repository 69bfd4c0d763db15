"""``mailerq status``: how a running daemon is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any, Final

from mailerq.cli import control
from mailerq.cli.common import command_parser, complain, print_json, print_table
from mailerq.config import Config

__all__ = ["main"]

FIGURES: Final = (
    "calls", "suspensions", "rejects", "timeouts", "kept", "kept_bytes", "seconds",
)  # fmt: skip
"""What is counted for each event of a plugin, see `mailerq.plugins.Plugins.statistics`."""


PROCESS: Final = ("process", "pid", "state", "starts", "uptime", "connections", "shares")
"""What is said of each process where there are several, see `mailerq.cli.parent`."""


def main(settings: list[str], rest: list[str]) -> int:
    """Ask the daemon on this queue directory and show what it says."""
    parser = command_parser("status", "Show how the daemon that runs on this host is.")
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")
    options = parser.parse_args(rest)
    config = Config.load(settings)
    try:
        reply = control.ask(config.queue_directory, "status")
    except PermissionError:
        complain(f"you may not ask the daemon on {config.queue_directory}; its user and root may")
        return os.EX_NOPERM
    except OSError as error:
        complain(f"no daemon answers on {config.queue_directory}: {error.strerror or error}")
        return os.EX_UNAVAILABLE
    if "error" in reply:
        complain(f"the daemon says: {reply['error']}")
        return os.EX_SOFTWARE
    if options.json:
        print_json(reply)
    else:
        plugins = reply.pop("plugins", {})
        processes = reply.pop("processes", [])
        print_table(("WHAT", "VALUE"), list(_flatten(reply)))
        if processes:
            sys.stdout.write("\n")
            print_table([name.upper() for name in PROCESS], [_process(row) for row in processes])
        if plugins:
            sys.stdout.write("\n")
            print_table(("PLUGIN", "EVENT", *map(str.upper, FIGURES)), list(_rows(plugins)))
    return os.EX_OK


def _process(row: dict[str, Any]) -> list[Any]:
    uptime, shares = row["uptime"], ", ".join(map(str, row["shares"]))
    shown = {**row, "uptime": None if uptime is None else round(uptime, 1), "shares": shares}
    return [shown[name] for name in PROCESS]


def _rows(plugins: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """What each plugin did in each event."""
    for plugin, events in plugins.items():
        for event, row in events.items():
            figures = [row.get(name, 0) for name in FIGURES]
            yield plugin, event, *figures[:-1], f"{figures[-1]:.6f}"


def _flatten(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree of numbers, each with its way from the root."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{path}{name}.")
        elif isinstance(value, list):
            yield f"{path}{name}", ", ".join(map(str, value))
        else:
            yield f"{path}{name}", f"{value:.1f}" if isinstance(value, float) else value
