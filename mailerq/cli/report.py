"""``mailerq report parse``: print what a mail would be recognised as."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from mailerq.cli.common import Parser, command_parser, complain, print_json
from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.escaping import escape
from mailerq.mail.headers import Header, unfold
from mailerq.mail.report_fields import address_in, one_line
from mailerq.mail.reports import TYPES, recognise
from mailerq.rules import reports
from mailerq.rules.reporting import read_keys
from mailerq.rules.reports import Keys, Suppressed, Wishes

__all__ = ["main"]

DESCRIPTION: Final = """\
Read a mail as if it had come in for a local recipient, and print what the property report
would hold, which message the report is about, and whether that is proved. Nothing is queued
and nobody is suppressed. docs/reports.md explains all fields.

The sender is that of --sender, else of Return-Path, else null; only a null sender that is
given makes an automatic reply of a mail that has no other mark. The recipient is that of
--recipient, else of Delivered-To, X-Original-To or To.

exit status:
  0  the mail is a report
  1  the mail is no report
  2  the file cannot be read
"""

NO_REPORT: Final = 1
UNREADABLE: Final = 2

MAX_BYTES: Final = 1 << 21
"""Bytes of a mail that are read; later ones are not looked at anyway."""


def main(settings: list[str], rest: list[str]) -> int:
    """Read the given mail; see DESCRIPTION."""
    parser = command_parser("report", "Work with reports about mail.")
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=Parser, prog=parser.prog
    )
    parse = commands.add_parser(
        "parse", help="print what a mail would be recognised as", description=DESCRIPTION
    )
    parse.add_argument("file", metavar="FILE", nargs="?", default="-", help="default, and -: stdin")
    parse.add_argument("--sender", metavar="ADDRESS", help="the address of MAIL FROM; '' is null")
    parse.add_argument("--recipient", metavar="ADDRESS", help="the address of RCPT TO")
    parse.add_argument("--json", action="store_true", help="print the property as JSON")
    options = parser.parse_args(rest)
    config = Config.load(settings)
    try:
        if options.file == "-":
            mail = sys.stdin.buffer.read(MAX_BYTES)
        else:
            with open(options.file, "rb") as file:
                mail = file.read(MAX_BYTES)
    except OSError as error:
        complain(f"{options.file}: {error.strerror or error}")
        return UNREADABLE
    header = Header(mail)
    sender = options.sender
    if sender is None:
        sender = address_in(_value(header, b"return-path"))
    recipient = options.recipient
    if recipient is None:
        names = (b"delivered-to", b"x-original-to", b"to")
        recipient = next(filter(None, (address_in(_value(header, name)) for name in names)), "")
    keys = Keys(_keys(config), config.verp_maxage, config.trace_header.lower().encode())
    found = recognise(mail, sender)
    if (
        found is not None
        and found.is_guess
        and not (
            options.sender is not None or any(f.name == b"return-path" for f in header.fields())
        )
    ):
        found = None  # nothing says that the sender is null
    match = reports.find_match(found, recipient, keys, hostname=config.hostname, now=time.time())
    if found is None and match.by != "verp":
        if options.json:
            print_json(None)
        else:
            sys.stdout.write("no report\n")
        return NO_REPORT
    value = reports.document(reports.said(found), match)
    if options.json:
        print_json(value)
        return os.EX_OK
    wishes = Wishes(complaints=True, bounces=True)
    _print(value, [] if found is None else reports.to_suppress(found.report, match, wishes))
    return os.EX_OK


def _value(header: Header, name: bytes) -> str:
    """The first field with a name (in lower case)."""
    for field in header.fields():
        if field.name == name:
            return one_line(unfold(field.value))
    return ""


def _keys(config: Config) -> Any:
    """The keys; without those that this account may not read, nothing is proved."""
    try:
        return read_keys(config)
    except ConfigError as error:
        complain(f"nothing can be proved: {error}")
        return ()


def _print(value: Mapping[str, Any], suppressed: list[Suppressed]) -> None:
    meaning = TYPES[value["type"]]
    lines = [f"{value['type']}: {meaning}"]
    lines += [f"  {line}" for line in _lines({k: v for k, v in value.items() if k != "type"})]
    lines += [f"can suppress {each.address}: {each.reason}" for each in suppressed]
    sys.stdout.write("".join(f"{escape(line)}\n" for line in lines))


def _lines(value: Any, name: str = "") -> Iterator[str]:
    """One line for each value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _lines(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for number, inner in enumerate(value, 1):
            yield from _lines(inner, f"{name}.{number}")
    else:
        shown = str(value).lower() if isinstance(value, bool) else value
        yield f"{name}: {shown}"
