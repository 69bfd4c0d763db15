"""``mailerq queue``: look into the queues, and take messages out of them."""

from __future__ import annotations

import os
import sys
import time
from argparse import SUPPRESS, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from mailerq.cli import control
from mailerq.cli.common import (
    Parser,
    command_parser,
    complain,
    dump_json,
    positive,
    print_json,
    print_table,
)
from mailerq.config import Config
from mailerq.errors import QueueError
from mailerq.escaping import escape
from mailerq.message import format_time
from mailerq.queues.embedded.queue_file import FILE_NAME, Store
from mailerq.queues.embedded.shares import share_directory, shares_in
from mailerq.queues.interface import Entry
from mailerq.queues.opening import open_shared

__all__ = ["main"]

Stores = Sequence[Store]
"""The shares of the queue directory, in their order."""

PAGE: Final = 100
"""Messages read at a time; each comes with its body."""

MAX_ID: Final = 2**63 - 1


def main(settings: list[str], rest: list[str]) -> int:
    """Run one of the commands on the queue directory of the configuration, all shares of it."""
    options, parser = _parse(rest)
    config = Config.load(settings)
    try:
        if options.queue is not None and not _is_known(config, options.queue):
            return os.EX_DATAERR
        if options.confirm is not None and not options.confirm(config, options, parser):
            return 1
        with _opened(config) as stores:
            status: int = options.run(stores, config, options, parser)
            return status
    except PermissionError:
        complain(f"you may not use the queue in {config.queue_directory}; its user and root may")
        return os.EX_NOPERM
    except (FileNotFoundError, NotADirectoryError):
        complain(f"there is no queue in {config.queue_directory}; set queue-directory?")
        return os.EX_UNAVAILABLE
    except QueueError as error:
        complain(str(error))
        return os.EX_TEMPFAIL
    except OSError as error:  # a daemon that does not answer
        complain(f"{config.queue_directory}: {error.strerror or error}")
        return os.EX_UNAVAILABLE


@contextmanager
def _opened(config: Config) -> Iterator[Stores]:
    """The shares that have a queue. While they are open no process can start that has crashed."""
    with ExitStack() as stack:
        stores = []
        for share in shares_in(config.queue_directory):
            directory = share_directory(config.queue_directory, share)
            path = os.path.join(directory, FILE_NAME)
            try:
                os.stat(path)  # Looking must not make one.
            except FileNotFoundError:
                continue
            if not os.access(path, os.R_OK | os.W_OK):
                raise PermissionError
            stores.append(stack.enter_context(open_shared(directory)))
        if not stores:
            raise FileNotFoundError
        yield stores


def _parse(rest: Sequence[str]) -> tuple[Namespace, Parser]:
    parser = command_parser("queue", "Look into the queues, and take messages out of them.")
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=Parser, prog=parser.prog
    )

    def command(name: str, text: str, run: Any, json: str, *, queue: bool = True) -> Parser:
        added: Parser = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run, confirm=None, queue=None)
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
    read = command("read", "whole messages, as the JSON documents that they are", _read, documents)
    read.add_argument("id", nargs="*", type=_id, metavar="ID", help="only these, by their ids")
    read.add_argument(
        "--remove", action="store_true", help="then delete them; a daemon may have them in hand"
    )
    for added in (show, read):
        added.add_argument("--limit", type=positive, metavar="N", help="no more than N messages")
        added.add_argument("--after", type=_id, default=0, metavar="ID", help="from behind this id")
    flush = command(
        "flush", "try now what waits after a failed attempt", _flush, "one JSON object", queue=False
    )
    flush.add_argument("--quiet", action="store_true", help="print nothing when it is done")
    purge = command("purge", "delete all messages of a queue", _purge, "one JSON object")
    purge.set_defaults(confirm=_confirm)
    purge.add_argument("--yes", action="store_true", help="do not ask")
    return parser.parse_args(rest), parser


def _id(text: str) -> int:
    """The type of an argument that is the id of a message, as far as SQLite can have it."""
    try:
        number = int(text)
    except ValueError:
        number = MAX_ID + 1
    if abs(number) > MAX_ID:
        raise ArgumentTypeError(f"{text!r} is not an id")
    return number


def _list(stores: Stores, config: Config, options: Namespace, parser: Parser) -> int:
    totals = {name: [0, 0] for name in _configured(config)}
    for depth in (depth for store in stores for depth in store.depths()):
        total = totals.setdefault(depth.queue, [0, 0])
        total[0] += depth.due
        total[1] += depth.delayed
    rows = [(name, due, delayed, due + delayed) for name, (due, delayed) in sorted(totals.items())]
    if options.json:
        keys = ("queue", "due", "delayed", "total")
        print_json([dict(zip(keys, row, strict=True)) for row in rows])
    else:
        print_table(("QUEUE", "DUE", "DELAYED", "TOTAL"), rows)
    return os.EX_OK


def _configured(config: Config) -> Iterator[str]:
    for name in ("outbox", "inbox", "results", "success", "retry", "local"):
        if queue := getattr(config, f"rabbitmq_{name}"):
            yield queue
    if config.failure_queue:
        yield config.failure_queue


def _is_known(config: Config, queue: str) -> bool:
    """Whether there is such a queue: the settings name it, or something is in it."""
    with _opened(config) as stores:
        if any(store.browse(queue, limit=1) for store in stores):
            return True
        names = {depth.queue for store in stores for depth in store.depths()}
    names.update(_configured(config))
    if queue not in names:
        complain(f"there is no queue {queue}; there are {', '.join(sorted(names))}")
    return queue in names


def _show(stores: Stores, config: Config, options: Namespace, parser: Parser) -> int:
    options.queue = options.queue or config.rabbitmq_outbox
    rows = []
    for _, entry in _entries(stores, options):
        message = entry.message
        size = len(message.body) if message.body is not None else None
        results = message.properties.get("results")
        attempts = len(results) if isinstance(results, list) else 0
        row = (
            entry.id, format_time(entry.due), message.envelope, message.recipient, size, attempts,
            _reason(results),
        )  # fmt: skip
        if options.json:
            keys = ("id", "due", "envelope", "recipient", "size", "attempts", "reason")
            print_json(dict(zip(keys, row, strict=True)))
        rows.append(row)
    if options.json:
        return os.EX_OK
    if options.mailq and not rows:
        sys.stdout.write("Mail queue is empty\n")  # the words that monitoring looks for
        return os.EX_OK
    print_table(("ID", "DUE", "FROM", "TO", "SIZE", "ATTEMPTS", "REASON"), rows)
    if options.mailq:
        size = sum(row[4] or 0 for row in rows)
        sys.stdout.write(f"-- {-(-size // 1024)} Kbytes in {len(rows)} Requests.\n")
    return os.EX_OK


def _reason(results: object) -> str | None:
    """Why the last attempt came to nothing: what the peer said, or what we say of it."""
    match results:
        case [*_, {} as last]:
            said = [last.get(name) for name in ("code", "status", "description")]
            words = [str(part) for part in said if part] or [f"{last.get('type', 'error')}"]
            return " ".join(words)
    return None


def _flush(stores: Stores, config: Config, options: Namespace, parser: Parser) -> int:
    """Without a daemon nothing would be tried, so nothing is changed."""
    try:
        control.ask(config.queue_directory, "wake")
    except PermissionError:
        raise
    except OSError:
        complain(f"no daemon runs on {config.queue_directory}: nothing is tried before one does")
        return os.EX_UNAVAILABLE
    now = int(time.time() * 1000)
    count = sum(sum(store.hasten(config.rabbitmq_outbox, now)) for store in stores)
    control.ask(config.queue_directory, "wake")
    if options.json:
        print_json({"queue": config.rabbitmq_outbox, "hastened": count})
    elif not options.quiet:
        sys.stdout.write(f"{count} messages of {config.rabbitmq_outbox} are tried now\n")
    return os.EX_OK


def _entries(stores: Stores, options: Namespace) -> Iterator[tuple[Store, Entry]]:
    """The messages that were asked for, in the order of their ids, and where each lies."""
    left = sys.maxsize if options.limit is None else options.limit
    for store in stores:
        after = options.after
        while left > 0:
            page = store.browse(options.queue, limit=min(left, PAGE), after=after)
            if not page:
                break
            yield from ((store, entry) for entry in page)
            left -= len(page)
            after = page[-1].id


def _named(stores: Stores, options: Namespace) -> Iterator[tuple[Store, Entry]]:
    """The messages whose ids were given."""
    for number in sorted(set(options.id)):
        for store in stores:
            found = store.browse(options.queue, limit=1, after=number - 1)
            yield from ((store, entry) for entry in found if entry.id == number)


def _read(stores: Stores, config: Config, options: Namespace, parser: Parser) -> int:
    missing = set(options.id)
    for store, entry in _named(stores, options) if options.id else _entries(stores, options):
        missing.discard(entry.id)
        document = entry.message.to_dict()
        if options.json or not sys.stdout.isatty():
            print_json(document)
        else:
            sys.stdout.write(dump_json(document, indent=2) + "\n")
        if options.remove:
            # Who reads has it, as far as we can know, before it is gone here.
            sys.stdout.flush()
            store.remove([entry.id])
    for number in sorted(missing):
        complain(f"there is no message {number} in {options.queue}")
    return os.EX_DATAERR if missing else os.EX_OK


def _confirm(config: Config, options: Namespace, parser: Parser) -> bool:
    """Whether to purge. Nothing is open while somebody thinks about it."""
    if options.yes:
        return True
    with _opened(config) as stores:
        depths = [depth for store in stores for depth in store.depths()]
    if not sys.stdin.isatty():
        parser.error("purge deletes for good: say --yes, or answer on a terminal")
    total = sum(depth.total for depth in depths if depth.queue == options.queue)
    sys.stderr.write(f"Delete all {total} messages of {escape(options.queue)} for good? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    complain("nothing was deleted")
    return False


def _purge(stores: Stores, config: Config, options: Namespace, parser: Parser) -> int:
    deleted = sum(store.purge(options.queue) for store in stores)
    if options.json:
        print_json({"queue": options.queue, "deleted": deleted})
    else:
        sys.stdout.write(f"{deleted} messages deleted from {escape(options.queue)}\n")
    return os.EX_OK
