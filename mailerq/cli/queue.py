"""``mailerq queue``: look into the queues, and take messages out of them."""

from __future__ import annotations

import math
import os
import sys
import time
from argparse import SUPPRESS, Namespace
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any, Final

from mailerq.address import queue_problem
from mailerq.cli.common import (
    Parser,
    command_parser,
    complain,
    dump_json,
    for_people,
    positive,
    print_json,
    print_table,
    with_files,
)
from mailerq.cli.queue_flush import flush
from mailerq.cli.queue_orders import ORDERS, add_order, run_order
from mailerq.cli.queue_selection import add_criteria, message_id, selection_of
from mailerq.config import Config
from mailerq.escaping import escape
from mailerq.message import format_time
from mailerq.queues.interface import Entry
from mailerq.queues.opening import QueueFile, compact_files, open_files
from mailerq.rules.selection import Selection, last_error

__all__ = ["main"]

PAGE: Final = 100
"""Selected messages that are read at a time."""

Files = Sequence[QueueFile]
"""The shares of the queue directory, in order."""


def main(settings: list[str], rest: list[str]) -> int:
    """Run one of the commands on the configured queue directory, all shares of it."""
    options, parser = _parse(rest)
    config = Config.load(settings)
    # The daemon that does not answer is the usual error of the system.
    return with_files(config, lambda: _run(config, options, parser), fault=os.EX_UNAVAILABLE)


def _run(config: Config, options: Namespace, parser: Parser) -> int:
    if config.has_broker:
        from mailerq.cli import broker_queue

        return broker_queue.run(config, options)
    if options.queue is not None and not _is_known(config, options.queue):
        return os.EX_DATAERR
    if options.confirm is not None and not options.confirm(config, options, parser):
        return 1
    if options.alone:
        return int(options.run(config, options, parser))
    with open_files(config) as files:
        return int(options.run(files, config, options, parser))


def _parse(rest: Sequence[str]) -> tuple[Namespace, Parser]:
    parser = command_parser("queue", "Look into the queues, and take messages out of them.")
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=Parser, prog=parser.prog
    )

    def command(name: str, text: str, run: Any, json: str, *, queue: bool = True) -> Parser:
        added: Parser = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run, confirm=None, queue=None, alone=False, command=name)
        added.add_argument("--json", action="store_true", help=f"for programs: {json}")
        if queue:
            added.add_argument("queue", metavar="QUEUE")
        return added

    documents = "one JSON document a line"
    command("list", "how full each queue is", _list, "one JSON array", queue=False)
    show = command(
        "show", "the messages of a queue, a line for each", _show, documents, queue=False
    )
    show.add_argument("queue", metavar="QUEUE", nargs="?", help="by default the outbox")
    show.add_argument("--mailq", action="store_true", help=SUPPRESS)
    show.add_argument(
        "--destinations",
        action="store_true",
        help="a line for each destination that mail waits for",
    )
    add_criteria(show)
    count = command(
        "count", "how many messages a queue has", _count, "one JSON object", queue=False
    )
    count.add_argument("queue", metavar="QUEUE", nargs="?", help="by default the outbox")
    add_criteria(count)
    for action, text in ORDERS.items():
        order = command(action, text, run_order, "one JSON object", queue=False)
        order.set_defaults(alone=True, action=action)
        add_order(order, action)
    read = command(
        "read",
        "whole messages, as the JSON documents that they are; on a terminal without the password"
        " of a smarthost, unless --json or --remove is given",
        _read,
        documents,
    )
    read.add_argument(
        "id", nargs="*", type=message_id, metavar="ID", help="only these, by their ids"
    )
    read.add_argument(
        "--remove", action="store_true", help="then delete them; a daemon may have them in hand"
    )
    for added in (show, read):
        added.add_argument("--limit", type=positive, metavar="N", help="no more than N messages")
        added.add_argument(
            "--after", type=message_id, default=0, metavar="ID", help="from behind this id"
        )
    flush = command(
        "flush", "try now what waits after a failed attempt", _flush, "one JSON object", queue=False
    )
    flush.add_argument("--quiet", action="store_true", help="print nothing when it is done")
    compact = command(
        "compact",
        "give the room that is free in the queue files back to the disk; no daemon may run",
        _compact,
        "one JSON object a line",
        queue=False,
    )
    compact.set_defaults(alone=True)
    purge = command("purge", "delete all messages of a queue", _purge, "one JSON object")
    purge.set_defaults(confirm=_confirm)
    purge.add_argument("--yes", action="store_true", help="do not ask")
    return parser.parse_args(rest), parser


def _list(files: Files, config: Config, options: Namespace, parser: Parser) -> int:
    totals = {name: [0, 0, 0] for name in _configured(config)}
    for depth in (depth for file in files for depth in file.depths()):
        total = totals.setdefault(depth.queue, [0, 0, 0])
        total[0] += depth.due
        total[1] += depth.delayed
        total[2] += depth.held
    rows = [(name, *total, sum(total)) for name, total in sorted(totals.items())]
    keys = ("queue", "due", "delayed", "held", "total")
    if options.json:
        print_json([dict(zip(keys, row, strict=True)) for row in rows])
    else:
        print_table([key.upper() for key in keys], rows)
    return os.EX_OK


def _configured(config: Config) -> Iterator[str]:
    for name in ("outbox", "inbox", "results", "success", "retry", "local"):
        if queue := getattr(config, f"rabbitmq_{name}"):
            yield queue
    if config.failure_queue:
        yield config.failure_queue


def _is_known(config: Config, queue: str) -> bool:
    """Whether the queue exists: a setting names it, or it holds something."""
    with open_files(config) as files:
        if not queue_problem(queue) and any(file.numbers(queue, limit=1) for file in files):
            return True
        names = {depth.queue for file in files for depth in file.depths()}
    names.update(_configured(config))
    if queue not in names:
        complain(f"there is no queue {queue}; there are {', '.join(sorted(names))}")
    return queue in names


def _show(files: Files, config: Config, options: Namespace, parser: Parser) -> int:
    options.queue = options.queue or config.rabbitmq_outbox
    if options.destinations:
        return _show_destinations(files, options)
    rows = map(_row, _listed(files, options))
    if options.json:
        keys = ("id", "due", "envelope", "recipient", "size", "attempts", "reason", "held")
        for row in rows:
            print_json(dict(zip(keys, row, strict=True)))
        return os.EX_OK
    count = size = 0

    def counted(rows: Iterator[Row]) -> Iterator[tuple[object, ...]]:
        nonlocal count, size
        for row in rows:
            count += 1
            size += row[4] or 0
            yield (row[0], "held" if row[-1] else row[1], *row[2:-1])

    shown = counted(rows)
    first = list(islice(shown, 1))
    if options.mailq and not first:
        sys.stdout.write("Mail queue is empty\n")  # monitoring looks for these words
        return os.EX_OK
    headings = ("ID", "DUE", "FROM", "TO", "SIZE", "ATTEMPTS", "REASON")
    print_table(headings, chain(first, shown))
    if options.mailq:
        sys.stdout.write(f"-- {-(-size // 1024)} Kbytes in {count} Requests.\n")
    return os.EX_OK


Row = tuple[int, str, str | None, str | None, int | None, int, str | None, bool]


def _row(entry: Entry) -> Row:
    """The columns of a message."""
    message = entry.message
    results = message.properties.get("results")
    attempts = len(results) if isinstance(results, list) else 0
    return (
        entry.id, format_time(entry.due), message.envelope, message.recipient, entry.size,
        attempts, last_error(results), entry.held,
    )  # fmt: skip


def _show_destinations(files: Files, options: Namespace) -> int:
    totals: dict[str, tuple[int, int, int, float]] = {}
    for file in files:
        for depth in file.destinations(options.queue):
            due, delayed, held, first = totals.get(depth.destination, (0, 0, 0, math.inf))
            first = first if depth.first_due is None else min(first, depth.first_due)
            totals[depth.destination] = (
                due + depth.due, delayed + depth.delayed, held + depth.held, first
            )  # fmt: skip
    if options.limit is not None:
        fullest = sorted(totals, key=lambda key: sum(totals[key][:3]), reverse=True)
        totals = {key: totals[key] for key in fullest[: options.limit]}
    rows = [
        (key, *counts, sum(counts), None if first == math.inf else format_time(first))
        for key, (*counts, first) in sorted(totals.items())
    ]
    keys = ("destination", "due", "delayed", "held", "total", "first")
    if options.json:
        for row in rows:
            print_json(dict(zip(keys, row, strict=True)))
    else:
        print_table([key.upper() for key in keys], rows)
    return os.EX_OK


def _count(files: Files, config: Config, options: Namespace, parser: Parser) -> int:
    queue, selection = options.queue or config.rabbitmq_outbox, selection_of(options)
    count = sum(len(page) for file in files for page in file.selected(queue, selection))
    if options.json:
        print_json({"queue": queue, "count": count})
    else:
        sys.stdout.write(f"{count}\n")
    return os.EX_OK


def _flush(files: Files, config: Config, options: Namespace, parser: Parser) -> int:
    def hasten() -> int:
        now = int(time.time() * 1000)
        return sum(sum(file.hasten(config.rabbitmq_outbox, now)) for file in files)

    return flush(config, options, hasten)


def _listed(files: Files, options: Namespace) -> Iterator[Entry]:
    """The requested messages in the order of their ids, without bodies."""
    selection = selection_of(options)
    if selection.is_narrow:
        return islice(_selected(files, options, selection), options.limit)
    listed = (
        file.listed(options.queue, limit=options.limit, after=options.after) for file in files
    )
    return islice(chain.from_iterable(listed), options.limit)


def _selected(files: Files, options: Namespace, selection: Selection) -> Iterator[Entry]:
    for file in files:
        for numbers in file.selected(options.queue, selection, after=options.after):
            for start in range(0, len(numbers), PAGE):
                yield from file.some(numbers[start : start + PAGE])


def _entries(files: Files, options: Namespace) -> Iterator[tuple[QueueFile, Entry]]:
    """The requested messages in the order of their ids, with the file of each."""
    entries = (
        (file, entry)
        for file in files
        for entry in file.all_entries(options.queue, limit=options.limit, after=options.after)
    )
    return islice(entries, options.limit)


def _named(files: Files, options: Namespace) -> Iterator[tuple[QueueFile, Entry]]:
    """The messages with the given ids."""
    for number in sorted(set(options.id)):
        for file in files:
            found = file.browse(options.queue, limit=1, after=number - 1)
            yield from ((file, entry) for entry in found if entry.id == number)


def _read(files: Files, config: Config, options: Namespace, parser: Parser) -> int:
    missing = set(options.id)
    for file, entry in _named(files, options) if options.id else _entries(files, options):
        missing.discard(entry.id)
        document = entry.message.to_dict()
        if options.json or not sys.stdout.isatty():
            print_json(document)
        else:
            # What is removed is nowhere else.
            shown = document if options.remove else for_people(document)
            sys.stdout.write(dump_json(shown, indent=2) + "\n")
        if options.remove:
            # As far as we can know, the reader has it before it is removed here.
            sys.stdout.flush()
            file.remove([entry.id])
    for number in sorted(missing):
        complain(f"there is no message {number} in {options.queue}")
    return os.EX_DATAERR if missing else os.EX_OK


def _confirm(config: Config, options: Namespace, parser: Parser) -> bool:
    """Whether to purge. No file is open while the user decides."""
    if options.yes:
        return True
    with open_files(config) as files:
        depths = [depth for file in files for depth in file.depths()]
    if not sys.stdin.isatty():
        parser.error("purge deletes for good: say --yes, or answer on a terminal")
    total = sum(depth.total for depth in depths if depth.queue == options.queue)
    sys.stderr.write(f"Delete all {total} messages of {escape(options.queue)} for good? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    complain("nothing was deleted")
    return False


def _purge(files: Files, config: Config, options: Namespace, parser: Parser) -> int:
    deleted = sum(file.purge(options.queue) for file in files)
    if options.json:
        print_json({"queue": options.queue, "deleted": deleted})
    else:
        sys.stdout.write(f"{deleted} messages deleted from {escape(options.queue)}\n")
    return os.EX_OK


def _compact(config: Config, options: Namespace, parser: Parser) -> int:
    for path, before, after in compact_files(config):
        if options.json:
            print_json({"file": path, "before": before, "after": after})
        else:
            sys.stdout.write(f"{escape(path)}: {before} bytes before, {after} now\n")
    return os.EX_OK
