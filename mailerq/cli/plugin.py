"""``mailerq plugin check``: report whether plugins can be used, and their mistakes."""

from __future__ import annotations

import os
import pwd
import sys
from dataclasses import asdict
from typing import Final

from mailerq.cli.common import Parser, command_parser, complain, print_json
from mailerq.config import Config
from mailerq.escaping import escape
from mailerq.inspection import SECONDS, Report, examine, plugins_in

__all__ = ["main"]

DESCRIPTION: Final = """\
Examine each file without running it, then load it in a separate process. That process runs
the constructors of the plugin, mq_version and mq_message_id_size, and ends.

exit status:
  0  all plugins can be used, without findings
  1  all plugins can be used, with warnings
  2  mailerq would not start with one of the plugins
"""


def main(settings: list[str], rest: list[str]) -> int:
    """Check the given files, or those of `plugin-directory`; see DESCRIPTION."""
    parser = command_parser("plugin", "Work with plugins.")
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=Parser, prog=parser.prog
    )
    check = commands.add_parser(
        "check", help="report whether plugins can be used", description=DESCRIPTION
    )
    check.add_argument(
        "files", metavar="FILE", nargs="*",
        help="a plugin or a directory of plugins; default: plugin-directory",
    )  # fmt: skip
    check.add_argument("--json", action="store_true", help="print one JSON array, for programs")
    check.add_argument(
        "--no-open", dest="opens", action="store_false", help="only read the files; run nothing"
    )
    check.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=SECONDS,
        help="deadline for loading a plugin [%(default)g]",
    )  # fmt: skip
    options = parser.parse_args(rest)
    config = Config.load(settings)
    names = options.files or [config.plugin_directory]
    try:
        files = [path for name in names for path in _files(name)]
    except OSError as error:
        complain(f"the plugins of {os.fsdecode(error.filename)} cannot be listed: {error.strerror}")
        return 2
    if not files:
        complain("no plugin to check")
    owners = [each.pw_uid for each in pwd.getpwall() if each.pw_name == config.user]
    reports = [
        examine(path, seconds=options.timeout, opens=options.opens, owners=owners) for path in files
    ]
    if options.json:
        print_json([{**asdict(report), "status": report.status} for report in reports])
    else:
        for report in reports:
            _print(report)
    return max((report.status for report in reports), default=0)


def _files(name: str) -> list[str]:
    """Return the file itself, or the plugins of a directory. Raises OSError."""
    if os.path.isdir(name):
        return plugins_in(name)
    return [name] if name else []


VERDICTS: Final = ("good", "can be used, but", "cannot be used")


def _print(report: Report) -> None:
    lines = [f"{report.path}: {VERDICTS[report.status]}"]
    if report.version is not None:
        lines.append(f"  interface version {report.version}")
    if report.functions:
        lines.append(f"  exports {', '.join(report.functions)}")
    if report.id_size:
        lines.append(f"  makes message ids of at most {report.id_size} bytes")
    lines += [f"  {finding.level}: {finding.text}" for finding in report.findings]
    sys.stdout.write("".join(f"{escape(line)}\n" for line in lines))
