"""``mailerq sts``: the MTA-STS policies of recipients' domains that deliveries know.

The policies are in a file of the queue directory (`mailerq.store.sts_file`). The commands read and
change that file themselves, and then have the daemon forget what its processes know, if one runs.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
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
from mailerq.store.sts_file import Entry, Kept, StsFile

__all__ = ["main"]

DESCRIPTION: Final = """\
Show the MTA-STS policies that deliveries know, fetch one now, or forget some.

Exit status: 0 done; 1 there is no such policy, or it cannot be fetched."""

PAGE: Final = 1000
"""Rows read at a time."""


def main(settings: list[str], rest: list[str]) -> int:
    """Show, refresh or purge, see DESCRIPTION."""
    options = _parse(rest)
    config = Config.load(settings)
    store = StsFile(config.queue_directory, config.user)
    return with_store(store, config, options)


def _parse(rest: Sequence[str]) -> Namespace:
    parser = command_parser("sts", DESCRIPTION)
    command = subcommands(parser)
    show = command("show", "show the policy of a domain, or a line for each policy", _show)
    show.add_argument("domain", nargs="?", type=domain_name, metavar="DOMAIN")
    refresh = command("refresh", "ask for the record and the policy of a domain now", _refresh)
    refresh.add_argument("domain", type=domain_name, metavar="DOMAIN")
    purge = command("purge", "forget what is known of a domain; mail asks for it anew", _purge)
    which = purge.add_mutually_exclusive_group(required=True)
    which.add_argument("domain", nargs="?", type=domain_name, metavar="DOMAIN")
    which.add_argument("--all", action="store_true", help="all that 'show' lists")
    return parser.parse_args(rest)


# The commands


def _show(file: StsFile, config: Config, options: Namespace) -> int:
    if options.domain:
        entry = file.get(options.domain)
        if entry is None:
            complain(f"nothing is known of {options.domain}")
            return 1
        _print(entry, options.json)
        return os.EX_OK
    if options.json:
        for entry in _entries(file):
            print_json(Kept.of(entry).describe(time.time()))
        return os.EX_OK
    headings = ["DOMAIN", "MODE", "ID", "FETCHED", "EXPIRES", "USED", "PROBLEM"]
    now = time.time()
    rows = ([*_row(Kept.of(entry).describe(now))] for entry in _entries(file))
    print_table(headings, rows)
    return os.EX_OK


def _refresh(file: StsFile, config: Config, options: Namespace) -> int:
    if not config.mta_sts:
        complain("mta-sts is false: deliveries do not ask for policies")
    entry, problem = _fetch(file, config, options.domain)
    note = _tell(config, options.domain)
    if problem:
        complain(f"{options.domain}: {problem}")
    if entry is not None:
        _print(entry, options.json)
    if note:
        complain(note)
    return 1 if problem else os.EX_OK


def _fetch(file: StsFile, config: Config, domain: str) -> tuple[Entry | None, str]:
    import trio

    from mailerq.live import Live
    from mailerq.net.https import Https
    from mailerq.net.resolver import Resolver
    from mailerq.outbound.sts import StsPolicies

    async def run() -> tuple[Entry | None, str]:
        resolver = Resolver(config)
        policies = StsPolicies(Live(config), resolver, Https(resolver.addresses), file)
        _, problem = await policies.refresh(domain)
        return file.get(domain), problem

    return trio.run(run)


def _purge(file: StsFile, config: Config, options: Namespace) -> int:
    removed = file.remove(None if options.all else options.domain)
    note = _tell(config, "" if options.all else options.domain)
    if options.json:
        print_json({"removed": removed, "in_force": not note})
    else:
        sys.stdout.write(f"{removed} removed{f' ({note})' if note else ''}\n")
    if removed or options.all:
        return os.EX_OK
    complain(f"nothing is known of {options.domain}")
    return 1


def _tell(config: Config, domain: str) -> str:
    """Have all processes of the daemon forget what they know; what is to be said about that."""
    try:
        reply = control.ask(config.queue_directory, "policies", forget=domain)
    except OSError:
        return "no daemon answers"
    return "" if reply.get("ok") else "not all processes answer; they follow within an hour"


# Words out


def _entries(file: StsFile) -> Iterator[Entry]:
    after = ""
    while page := file.entries(after, PAGE):
        yield from page
        after = page[-1].domain


def _row(document: dict[str, Any]) -> Iterator[object]:
    mode = document.get("mode", "no policy")
    if mode != "no policy" and not document["in-force"]:
        mode = f"{mode}, expired"
    yield from (document["domain"], mode)
    for name in ("id", "fetched", "expires", "used"):
        yield document.get(name, "")
    yield document.get("problem", {}).get("text", "")


def _print(entry: Entry, as_json: bool) -> None:
    document = Kept.of(entry).describe(time.time())
    if as_json:
        print_json(document)
        return
    problem = document.pop("problem", None)
    hosts = document.pop("mx", [])
    rows = [[name, value] for name, value in document.items()]
    rows += [["mx", host] for host in hosts]
    if problem is not None:
        rows.append(["problem", f"{problem['text']} ({problem['time']}, id {problem['id']})"])
    print_table(("WHAT", "VALUE"), rows)
