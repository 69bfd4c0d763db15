"""``mailerq reload``: have a running daemon read its settings anew."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

from mailerq.cli import control
from mailerq.cli.common import command_parser, complain, print_json
from mailerq.config import Config
from mailerq.errors import Problem
from mailerq.escaping import escape

__all__ = ["main"]

RELOAD_SECONDS: Final = 30.0
"""How long the daemon may take: with several processes it asks them."""


def main(settings: list[str], rest: list[str]) -> int:
    """Ask the daemon on this queue directory: 0 when it has the new settings, 1 when not."""
    parser = command_parser(
        "reload",
        "Have the daemon on this queue directory read its settings anew: the same files, and the "
        "command line and environment that it was started with. What is under way ends by the old "
        "ones. Exit status: 0 it goes by the new ones, 1 they have mistakes and nothing changed.",
    )
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")
    options = parser.parse_args(rest)
    # Its mistakes are for the daemon to tell, which may have other settings than we.
    config = Config.load(settings, problems=[])
    try:
        reply = control.ask(config.queue_directory, "reload", timeout=RELOAD_SECONDS)
    except PermissionError:
        complain(f"you may not ask the daemon on {config.queue_directory}; its user and root may")
        return os.EX_NOPERM
    except OSError as error:
        complain(f"no daemon answers on {config.queue_directory}: {error.strerror or error}")
        complain(
            "name its settings with --config-file, or its --queue-directory if that is another"
        )
        return os.EX_UNAVAILABLE
    if "error" in reply:
        complain(f"the daemon says: {reply['error']}")
        return os.EX_SOFTWARE
    if options.json:
        print_json(reply)
    else:
        _print(reply)
    return 1 if "problems" in reply else os.EX_OK


def _print(reply: dict[str, Any]) -> None:
    if "problems" in reply:
        for problem in reply["problems"]:
            complain(str(Problem(**problem)))
        complain("nothing has changed")
        return
    lines = [f"settings {reply['number']} are in force"]
    lines += [f"changed: {_change(each)}" for each in reply["changed"]]
    lines += [f"needs a restart: {_change(each)}" for each in reply["restart"]]
    sys.stdout.write("".join(f"{escape(line)}\n" for line in [*lines, *reply["notes"]]))


def _change(change: dict[str, str]) -> str:
    return f"{change['key']}: {change['old']} -> {change['new']} ({change['where']})"
