"""The command line: the daemon, the injector that replaces sendmail, and the tools.

``mailerq`` alone is the daemon. If the first word is a command, that command runs. An argument with
an @, a switch of sendmail, or the program names ``sendmail``, ``mailq`` and ``newaliases`` select
the injector.

The injector runs once for each mail and must start fast, so the module of a command is imported
only when the command runs.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Final

from mailerq.cli.common import complain
from mailerq.errors import ConfigError, PluginError

__all__ = ["EX_CONFIGURATION", "main"]

EX_CONFIGURATION: Final = 2
"""Exit status for settings or plugins that cannot be used; others are those of sysexits.h."""

_COMMANDS: Final = {
    "check": "mailerq.cli.check",
    "check-config": "mailerq.cli.checking",
    "cluster": "mailerq.cli.cluster",
    "config": "mailerq.cli.settings",
    "dkim": "mailerq.cli.dkim",
    "error": "mailerq.cli.rows:error",
    "explain": "mailerq.cli.explain",
    "pause": "mailerq.cli.rows:pause",
    "plugin": "mailerq.cli.plugin",
    "queue": "mailerq.cli.queue",
    "reload": "mailerq.cli.reload",
    "report": "mailerq.cli.report",
    "rows": "mailerq.cli.rows:rows",
    "sink": "mailerq.cli.sink",
    "status": "mailerq.cli.status",
    "sts": "mailerq.cli.sts",
    "suppress": "mailerq.cli.rows:suppress",
    "tls-report": "mailerq.cli.tls_report",
    "top": "mailerq.cli.top",
    "trace": "mailerq.cli.trace",
    "verp": "mailerq.cli.verp",
}
"""The module of each command, and its function if that is not `main`."""

_NAMES: Final = {"sendmail": (), "mailq": ("-bp",), "newaliases": ("-bi",)}
"""Other names of the program, and the switch that each means."""

_INJECTING: Final = frozenset({"--envelope", "--extract-recipients", "--ignore-dot"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name) and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not have all letters
    try:
        status = _run(words)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        for problem in error.problems:
            complain(str(problem))
        return EX_CONFIGURATION
    except PluginError as error:
        complain(str(error))
        return EX_CONFIGURATION
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone: keep Python from flushing the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return os.EX_OK


def _run(words: list[str]) -> int:
    from mailerq.config import split_arguments

    settings, rest = split_arguments(words)
    function = "main"
    name = next((word for word in rest if not word.startswith("-")), "")
    switches = _NAMES.get(os.path.basename(sys.argv[0]))
    if name in _COMMANDS and switches is None:
        rest.remove(name)
        path, _, function = _COMMANDS[name].partition(":")
        module = importlib.import_module(path)
    elif "--list-cluster" in rest:
        module = importlib.import_module("mailerq.cli.cluster")
    elif switches is not None or any(map(_is_injection, rest)):
        rest = [*(switches or ()), *rest]
        module = importlib.import_module("mailerq.cli.inject")
    else:
        module = importlib.import_module("mailerq.cli.daemon")
    status: int = getattr(module, function or "main")(settings, rest)
    return status


def _is_injection(word: str) -> bool:
    if word.startswith("--"):
        return word.partition("=")[0] in _INJECTING
    return "@" in word or (word.startswith("-") and word != "-h")
