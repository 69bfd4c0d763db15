"""``mailerq verp``: read, make and check signed return addresses, and make a key for them."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from typing import Final

from mailerq.address import parse_mailbox
from mailerq.cli.common import Parser, command_parser, complain, print_json
from mailerq.config import Config
from mailerq.errors import AddressError
from mailerq.escaping import escape
from mailerq.mail import verp
from mailerq.mail.verp import Problem
from mailerq.message import format_time
from mailerq.rules.reporting import read_keys

__all__ = ["main"]

SECRET_BYTES: Final = 24

DECODING: Final = """\
Say who sent mail to whom, by the address that its bounce came to.

exit status:
  0  the address is genuine
  1  it is forged or expired, or has no token
"""


def main(settings: list[str], rest: list[str]) -> int:
    """Run a subcommand."""
    parser = command_parser("verp", "Work with signed return addresses (VERP).")
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=Parser, prog=parser.prog
    )
    decode = commands.add_parser(
        "decode", help="say whom a return address is about", description=DECODING
    )
    decode.add_argument("address", metavar="ADDRESS")
    decode.add_argument("--json", action="store_true", help="for programs: one JSON object")
    decode.set_defaults(run=_decode)
    encode = commands.add_parser("encode", help="make the return address for a recipient")
    encode.add_argument("sender", metavar="SENDER", help="the return address without a token")
    encode.add_argument("recipient", metavar="RECIPIENT")
    encode.add_argument("--id", default="", help="the id of the message, for a long recipient")
    encode.set_defaults(run=_encode)
    key = commands.add_parser("key", help="print a new line for verp-key-file")
    key.set_defaults(run=_new_key)
    options = parser.parse_args(rest)
    status: int = options.run(Config.load(settings), options)
    return status


def _keys(config: Config) -> tuple[verp.Key, ...]:
    keys = read_keys(config)
    if not keys:
        complain("verp-key-file is not set")
    return keys


def _decode(config: Config, options: argparse.Namespace) -> int:
    keys = _keys(config)
    if not keys:
        return os.EX_USAGE
    found = verp.verify(options.address, keys, now=time.time(), max_age=config.verp_maxage)
    token = verp.split(options.address)
    if found is None or isinstance(found, Problem):
        verdict = "no token" if found is None else str(found)
        if options.json:
            print_json({"verdict": verdict, "sender": token and token.base})
        else:
            sys.stdout.write(verdict + "\n")
        return 1
    if options.json:
        print_json({
            "verdict": "genuine",
            "sender": found.base,
            "recipient": found.recipient or None,
            "message-id": found.message_id or None,
            "digest": found.digest or None,
            "sent": format_time(found.issued)[:10],
        })  # fmt: skip
        return os.EX_OK
    about = (
        f"to {found.recipient}" if found.recipient
        else f"with the message id {found.message_id}" if found.message_id
        else f"whose message id has the digest {found.digest}"
    )  # fmt: skip
    day = format_time(found.issued)[:10]
    sys.stdout.write(escape(f"genuine: mail of {found.base} {about}, sent on {day}") + "\n")
    return os.EX_OK


def _encode(config: Config, options: argparse.Namespace) -> int:
    keys = _keys(config)
    if not keys:
        return os.EX_USAGE
    for address in (options.sender, options.recipient):
        try:
            parse_mailbox(address)
        except AddressError as error:
            complain(str(error))
            return os.EX_USAGE
    address = verp.encode(
        options.sender, options.recipient, keys, now=time.time(), message_id=options.id
    )
    if address is None:
        complain("there is no room for a token: the sender or the recipient is too long")
        return 1
    sys.stdout.write(address + "\n")
    return os.EX_OK


def _new_key(config: Config, options: argparse.Namespace) -> int:
    taken = {key.id for key in read_keys(config)} if config.verp_key_file else set()
    free = [digit for digit in "abcdefghijklmnopqrstuvwxyz" if digit not in taken]
    if not free:
        complain("verp-key-file has a key for each letter: remove the oldest ones")
        return 1
    sys.stdout.write(f"{free[0]} {secrets.token_urlsafe(SECRET_BYTES)}\n")
    return os.EX_OK
