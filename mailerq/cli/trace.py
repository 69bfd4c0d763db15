"""``mailerq trace``: the SMTP dialogue of sessions that match, while they run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from mailerq.cli import control
from mailerq.cli.common import command_parser, complain, dump_json, positive
from mailerq.config import Config

__all__ = ["main"]

DESCRIPTION: Final = """Show what sessions with clients and with other hosts say, until Ctrl-C.

Each line has the time (UTC), the session, the direction (< from the peer, > to the peer, - about
the session) and the text. Logins and passwords are not shown. Options of one kind may be given
several times: one of them must match. Options of different kinds must all match."""


def main(settings: list[str], rest: list[str]) -> int:
    """Print the lines of the daemon on this queue directory."""
    options = _parse(rest)
    config = Config.load(settings)
    request: dict[str, object] = {
        "in": options.way != "out",
        "out": options.way != "in",
        "peers": options.peer,
        "ips": options.ip,
        "domains": options.domain,
        "senders": options.sender,
        "recipients": options.recipient,
        "sessions": options.sessions or 0,
        "seconds": options.seconds or 0,
        "bodies": options.body,
    }
    try:
        with suppress(KeyboardInterrupt):
            for line in _of_sessions(
                control.lines(config.queue_directory, "trace", **request), options.sessions
            ):
                if "error" in line:
                    complain(f"the daemon says: {line['error']}")
                    return os.EX_UNAVAILABLE
                if "session" in line:
                    _print(line, as_json=options.json)
                else:
                    sys.stderr.write("mailerq: tracing; Ctrl-C ends\n")
    except PermissionError:
        complain(f"you may not ask the daemon on {config.queue_directory}; its user and root may")
        return os.EX_NOPERM
    except OSError as error:
        complain(f"no daemon answers on {config.queue_directory}: {error.strerror or error}")
        return os.EX_UNAVAILABLE
    return os.EX_OK


def _parse(rest: list[str]) -> argparse.Namespace:
    parser = command_parser("trace", DESCRIPTION)
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--in", dest="way", action="store_const", const="in", help="only sessions with clients"
    )
    way.add_argument("--out", dest="way", action="store_const", const="out", help="only deliveries")
    parser.set_defaults(way="both")
    for name, metavar, text in (
        ("peer", "ADDRESS|NETWORK", "sessions with this address, or one of this network"),
        ("ip", "LOCAL", "sessions at this address of this host"),
        ("domain", "DOMAIN", "mails to recipients in this domain"),
        ("sender", "ADDRESS|@DOMAIN|<>", "mails from this sender"),
        ("recipient", "ADDRESS|@DOMAIN", "mails to this recipient"),
    ):
        parser.add_argument(f"--{name}", metavar=metavar, action="append", default=[], help=text)
    parser.add_argument(
        "--sessions", metavar="N", type=positive, help="end after this many sessions"
    )
    parser.add_argument("--seconds", metavar="S", type=positive, help="end after this time")
    parser.add_argument("--body", action="store_true", help="show bodies, up to 16 KB of each")
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object a line")
    options: argparse.Namespace = parser.parse_args(rest)
    return options


def _of_sessions(lines: Iterator[dict[str, Any]], most: int | None) -> Iterator[dict[str, Any]]:
    """The lines of the first sessions, to their ends: each process of several counts alone."""
    seen: set[str] = set()
    ended: set[str] = set()
    for line in lines:
        session = line.get("session")
        if most and session:
            if session not in seen and len(seen) == most:
                continue
            seen.add(session)
            if line.get("end"):
                ended.add(session)
        yield line
        if most and len(ended) == most:
            return


def _print(line: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        text = dump_json(line)
    else:
        time, session = line["time"], line["session"] or "-"
        text = f"{time} {session:<8} {line['direction']} {line['text']}"
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
