"""``mailerq tls-report``: what is counted for TLS reports, and the reports that go out (RFC 8460).

The counts are in a file of the queue directory (`mailerq.store.tls_counts`), which the commands
read themselves. A daemon writes its last counts into the file first, and sends reports when asked.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from typing import Any, Final

from mailerq.cli import control
from mailerq.cli.common import (
    command_parser,
    complain,
    domain_name,
    print_json,
    print_table,
    subcommands,
    with_store,
)
from mailerq.config import Config
from mailerq.mail.tls_report import DAY_SECONDS, Day, document
from mailerq.message import format_time
from mailerq.store.tls_counts import TlsCounts

__all__ = ["main"]

DESCRIPTION: Final = """\
Show what is counted for the TLS reports of a day, and the state of reports; or send them now.

Exit status: 0 done; 1 nothing is counted, or no daemon answers."""

PAGE: Final = 1000
"""Rows read at a time."""

MAX_REPORTS: Final = 100_000
"""States of reports that are shown."""


def main(settings: list[str], rest: list[str]) -> int:
    """Show or send, see DESCRIPTION."""
    options = _parse(rest)
    config = Config.load(settings)
    store = TlsCounts(config.queue_directory, config.user)
    return with_store(store, config, options)


def _parse(rest: Sequence[str]) -> Namespace:
    parser = command_parser("tls-report", DESCRIPTION)
    command = subcommands(parser)
    show = command("show", "show the counts of a day, or the report of a domain", _show)
    show.add_argument("domain", nargs="?", type=domain_name, metavar="DOMAIN")
    show.add_argument("--day", type=_day, metavar="YYYY-MM-DD", help="in UTC; today")
    command("list", "list the reports of the last days, and what became of them", _list)
    send = command("send", "send reports now, and not at a random time after midnight", _send)
    send.add_argument("domain", nargs="?", type=domain_name, metavar="DOMAIN")
    send.add_argument("--day", type=_day, metavar="YYYY-MM-DD", help="in UTC; yesterday")
    return parser.parse_args(rest)


def _day(text: str) -> Day:
    try:
        return Day.named(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a day such as 2026-01-31") from None


# The commands


def _show(file: TlsCounts, config: Config, options: Namespace) -> int:
    day = options.day or Day.of(time.time())
    _tell(config, flush=True)
    if not config.tls_report:
        complain("tls-report is false: nothing is counted")
    if options.domain:
        return _show_report(file, config, day, options.domain)
    rows = list(_counts(file, day))
    if options.json:
        for row in rows:
            print_json(row)
    elif rows:
        print_table(("DOMAIN", "POLICY", "GOOD", "FAILED"), [[*row.values()] for row in rows])
    if not rows:
        complain(f"nothing is counted for {day.name}")
    return os.EX_OK if rows else 1


def _show_report(file: TlsCounts, config: Config, day: Day, domain: str) -> int:
    """The report of a domain as it would be sent: JSON, whatever the format asked for."""
    from mailerq.outbound.tls_reports import policies_of, sender_of

    found = file.sessions(day.begin, domain)
    if not found:
        complain(f"nothing is counted for {domain} on {day.name}")
        return 1
    print_json(document(sender_of(config), day, "preview", policies_of(domain, found)))
    return os.EX_OK


def _counts(file: TlsCounts, day: Day) -> Iterator[dict[str, Any]]:
    """A row for each domain and kind of policy."""
    after = ""
    while page := file.domains(day.begin, after, PAGE):
        for domain in page:
            sums: dict[str, list[int]] = {}
            for session, count in file.sessions(day.begin, domain):
                sums.setdefault(session.kind, [0, 0])[bool(session.result)] += count
            for kind, (good, failed) in sorted(sums.items()):
                yield {"domain": domain, "policy": kind, "good": good, "failed": failed}
        after = page[-1]


def _list(file: TlsCounts, config: Config, options: Namespace) -> int:
    rows = [
        {
            "day": Day(each.day).name,
            "domain": each.domain,
            "to": each.place or "(to be asked)",
            "state": each.state,
            "tries": each.tries,
            "next": format_time(each.next) if each.state == "waiting" else None,
            "problem": each.problem,
        }
        for each in file.reports(MAX_REPORTS)
    ]
    if options.json:
        for row in rows:
            print_json(row)
    else:
        headings = ("DAY", "DOMAIN", "TO", "STATE", "TRIES", "NEXT", "PROBLEM")
        print_table(headings, [[*row.values()] for row in rows])
    return os.EX_OK


def _send(file: TlsCounts, config: Config, options: Namespace) -> int:
    now = time.time()
    today = Day.of(now)
    day = options.day or Day(today.begin - DAY_SECONDS)
    if day.begin >= today.begin:
        complain(f"{day.name} is not over in UTC")
        return os.EX_USAGE
    if not config.tls_report:
        complain("tls-report is false: no reports are sent")
        return 1
    _tell(config, flush=True)
    file.plan(today.begin, 0, 1)
    count = file.hurry(now, day.begin, options.domain or "")
    note = _tell(config, send=True)
    if options.json:
        print_json({"due": count, "in_force": not note})
    else:
        sys.stdout.write(f"{count} reports are due now{f' ({note})' if note else ''}\n")
    return 1 if note or not count else os.EX_OK


def _tell(config: Config, **what: bool) -> str:
    """Ask all processes of the daemon; what is to be said about their answers."""
    try:
        reply = control.ask(config.queue_directory, "policies", **what)
    except OSError:
        return "no daemon answers"
    return "" if reply.get("ok") else "not all processes answer"
