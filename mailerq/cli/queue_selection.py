"""The options of ``mailerq queue`` that select messages."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError, Namespace
from typing import Final

from mailerq.cli.common import Parser
from mailerq.rules.selection import Selection

__all__ = ["add_criteria", "message_id", "selection_of"]

MAX_ID: Final = 2**63 - 1

SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

SELECTING: Final = """
Words are compared without regard to case, and * stands for any text. Repeated, an option selects
what fits any of its words; different options must all fit.
"""


def add_criteria(parser: Parser) -> None:
    """Add the options that `selection_of` reads."""
    group = parser.add_argument_group("which messages", SELECTING)

    def add(name: str, metavar: str, text: str, **more: object) -> None:
        group.add_argument(f"--{name}", metavar=metavar, help=text, default=[], **more)  # type: ignore[arg-type]

    add("id", "ID", "the messages with these ids", type=message_id, action="append")
    add("sender", "ADDRESS", "the address for MAIL FROM; <> for the null sender", action="append")
    add("recipient", "ADDRESS", "the address for RCPT TO", action="append")
    add("domain", "DOMAIN", "the domain of the recipient", action="append")
    add("tag", "TAG", "one of the tags", action="append")
    add("error", "TEXT", "a part of the last error: code, status and text", action="append")
    age = "since the mail was received, or first became due: 90s, 30m, 2h, 7d"
    group.add_argument("--older", metavar="AGE", type=_age, help=f"at least this old, {age}")
    group.add_argument("--younger", metavar="AGE", type=_age, help="less old than this")
    held = group.add_mutually_exclusive_group()
    held.add_argument(
        "--held", action="store_const", const=True, help="only messages that are held"
    )
    held.add_argument(
        "--not-held", dest="held", action="store_const", const=False, help="only the others"
    )


def selection_of(options: Namespace) -> Selection:
    """The selection that the options make."""
    return Selection(
        ids=tuple(options.id),
        senders=tuple(options.sender),
        recipients=tuple(options.recipient),
        domains=tuple(options.domain),
        tags=tuple(options.tag),
        errors=tuple(options.error),
        older=options.older,
        younger=options.younger,
        held=options.held,
    )


def message_id(text: str) -> int:
    """The argument type for message ids, within SQLite's range."""
    try:
        number = int(text)
    except ValueError:
        number = MAX_ID + 1
    if abs(number) > MAX_ID:
        raise ArgumentTypeError(f"{text!r} is not an id")
    return number


def _age(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9})([smhdw]?)", text)
    if match is None:
        raise ArgumentTypeError(f"{text!r} is not an age such as 90s, 30m, 2h or 7d")
    return float(int(match[1]) * SECONDS[match[2]])
