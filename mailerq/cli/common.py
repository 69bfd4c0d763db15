"""Helpers of the commands: parse arguments, print errors, tables and JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO

from mailerq.address import parse_domain
from mailerq.errors import AddressError, QueueError, RowError, StoreError
from mailerq.escaping import escape
from mailerq.message import without_password
from mailerq.settings import HIDDEN

if TYPE_CHECKING:
    from mailerq.config import Config

__all__ = ["Parser", "complain", "dump_json", "for_people", "positive", "print_json", "print_table"]

FIRST_ROWS: Final = 200
"""Rows of a table that its columns are made to fit."""

_STATUS_OF: Final = {RowError: os.EX_DATAERR, StoreError: os.EX_IOERR}
"""Exit statuses; other errors of a queue may be over later."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors exit with EX_USAGE of sysexits.h."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(os.EX_USAGE, f"{self.prog}: {escape(message)}\nTry '{self.prog} --help'.\n")


def command_parser(name: str, description: str, **options: Any) -> Parser:
    """Make the parser of a command of ``mailerq``; its ``--help`` mentions the settings."""
    return Parser(
        prog=f"mailerq {name}",
        description=description,
        epilog="Settings may be given too, as --key=value; see 'mailerq --help'.",
        **options,
    )


def subcommands(parser: Parser) -> Callable[[str, str, Callable[..., int]], Parser]:
    """Give a parser subcommands; return a function of the name, the help and what to run.

    All of them have ``--json``; the parsed options have what to run as `run`.
    """
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=Parser, prog=parser.prog
    )

    def add(name: str, text: str, run: Callable[..., int]) -> Parser:
        added: Parser = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="for programs: JSON, one per line")
        return added

    return add


def domain_name(text: str) -> str:
    """Parse an argument that is a domain; return it in A-labels."""
    try:
        return parse_domain(text.rstrip("."))
    except AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """Parse an argument that is a number above zero."""
    if text.isdecimal() and (number := int(text)) > 0:
        return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def complain(text: str) -> None:
    """Print an error to the user."""
    sys.stderr.write(f"mailerq: {escape(text)}\n")


def with_files(config: Config, run: Callable[[], int], *, fault: int = os.EX_IOERR) -> int:
    """Run a command on the files of the queue directory; return its exit status.

    A fault is printed, and has a status of its own; `fault` is that of other errors of the system.
    """
    directory = config.queue_directory
    try:
        return run()
    except PermissionError:
        complain(f"you may not use the queue in {directory}; its user and root may")
        return os.EX_NOPERM
    except (FileNotFoundError, NotADirectoryError):
        complain(f"there is no queue in {directory}; set queue-directory?")
        return os.EX_UNAVAILABLE
    except (QueueError, RowError, StoreError) as error:
        if isinstance(error.__cause__, PermissionError):
            complain(f"you may not use {directory}; its user and root may")
            return os.EX_NOPERM
        complain(str(error))
        return _STATUS_OF.get(type(error), os.EX_TEMPFAIL)
    except OSError as error:
        complain(f"{directory}: {error.strerror or error}")
        return fault


def with_store(store: object, config: Config, options: argparse.Namespace) -> int:
    """Run the command in the options with a store of the queue directory, as `with_files` does."""

    def run() -> int:
        os.stat(config.queue_directory)
        return int(options.run(store, config, options))

    return with_files(config, run)


def print_json(document: object, *, default: Callable[[Any], object] = str) -> None:
    """Print a document for programs, on one line."""
    sys.stdout.write(dump_json(document, default=default) + "\n")


def dump_json(document: object, **options: Any) -> str:
    """Dump printable ASCII, safe for a terminal. `json.dumps` escapes all the rest except DEL."""
    return json.dumps(document, **options).replace("\x7f", "\\u007f")


def for_people(document: dict[str, Any]) -> dict[str, Any]:
    """The document for a screen, with passwords hidden."""
    rest = without_password(document)
    if rest is document:
        return document
    return {**rest, "smarthost": {**rest["smarthost"], "password": HIDDEN}}


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], *, file: TextIO | None = None
) -> None:
    """Print rows in columns, with numbers aligned right.

    On a terminal, rich draws the table if it is installed. Otherwise blanks separate the columns,
    and each row is one line, for grep and awk. The columns of a long table fit its first rows;
    later rows are printed as they come.
    """
    file = sys.stdout if file is None else file
    rows = iter(rows)
    first = list(islice(rows, FIRST_ROWS))
    cells = [_cells(row) for row in first]
    to_right = [
        bool(first) and all(isinstance(value, int | float) for value in column)
        for column in zip(*first, strict=True)
    ] or [False] * len(headings)
    whole = len(first) < FIRST_ROWS
    if whole and file.isatty() and _print_rich(headings, cells, to_right, file):
        return
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    for line in chain([headings], cells, map(_cells, rows)):
        aligned = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, to_right, strict=True)
        ]
        file.write("  ".join(aligned).rstrip() + "\n")


def _cells(row: Sequence[object]) -> list[str]:
    return ["" if value is None else escape(str(value)) for value in row]


def _print_rich(
    headings: Sequence[str], cells: Sequence[Sequence[str]], to_right: Sequence[bool], file: TextIO
) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, right in zip(headings, to_right, strict=True):
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    Console(file=file).print(table)
    return True
