"""Helpers of the commands: parse arguments, print errors, tables and JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

from mailerq.escaping import escape

__all__ = ["Parser", "complain", "dump_json", "positive", "print_json", "print_table"]


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


def positive(text: str) -> int:
    """Parse an argument that is a number above zero."""
    if text.isdecimal() and (number := int(text)) > 0:
        return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def complain(text: str) -> None:
    """Print an error to the user."""
    sys.stderr.write(f"mailerq: {escape(text)}\n")


def print_json(document: object, *, default: Callable[[Any], object] = str) -> None:
    """Print a document for programs, on one line."""
    sys.stdout.write(dump_json(document, default=default) + "\n")


def dump_json(document: object, **options: Any) -> str:
    """Dump printable ASCII, safe for a terminal. `json.dumps` escapes all the rest except DEL."""
    return json.dumps(document, **options).replace("\x7f", "\\u007f")


def print_table(
    headings: Sequence[str], rows: Sequence[Sequence[object]], *, file: TextIO | None = None
) -> None:
    """Print rows in columns, with numbers aligned right.

    On a terminal, rich draws the table if it is installed. Otherwise blanks separate the columns,
    and each row is one line, for grep and awk.
    """
    file = sys.stdout if file is None else file
    cells = [["" if value is None else escape(str(value)) for value in row] for row in rows]
    to_right = [
        bool(rows) and all(isinstance(value, int | float) for value in column)
        for column in zip(*rows, strict=True)
    ] or [False] * len(headings)
    if file.isatty() and _print_rich(headings, cells, to_right, file):
        return
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    for line in (headings, *cells):
        aligned = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, to_right, strict=True)
        ]
        file.write("  ".join(aligned).rstrip() + "\n")


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
