"""``mailerq queue`` where the queues are in RabbitMQ, which can neither list nor search."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from mailerq.cli.common import complain, dump_json, for_people, print_json, print_table
from mailerq.cli.queue_flush import flush
from mailerq.cli.queue_selection import selection_of
from mailerq.config import Config
from mailerq.errors import QueueError
from mailerq.escaping import escape
from mailerq.message import Message
from mailerq.queues.interface import DAMAGED_QUEUE, Depth, RemoteQueues
from mailerq.queues.opening import open_broker, reserve_depths

__all__ = ["run"]

ABLE: Final = ("list", "count", "read", "flush", "purge")
CANNOT: Final = (
    "the queues are in RabbitMQ, which cannot find messages in them: here are 'queue list', "
    "'count', 'read', 'flush' and 'purge'"
)
BROKER_SECONDS: Final = 5.0
"""How long a person waits for a broker that does not answer."""

ALL_MESSAGES: Final = 50_000
"""Messages that `read` shows at most: all are held until the last one is shown."""


def run(config: Config, options: Namespace) -> int:
    """Run one of the commands that a broker allows. Raises `QueueError`, and OSError."""
    name: str = options.command
    if name == "show" and options.mailq:
        return _mailq(config)
    if name == "retry" and options.all:
        options.quiet, name = False, "flush"
    if name not in ABLE or (name == "count" and selection_of(options).is_narrow):
        complain(CANNOT)
        return os.EX_UNAVAILABLE
    return int(_COMMANDS[name](config, options))


def with_broker(
    config: Config,
    work: Callable[[RemoteQueues], Awaitable[Any]],
) -> Any:
    """Do something with the queues, in a loop of its own. Raises `QueueError`."""
    import trio

    async def main() -> Any:
        async with open_broker(config, seconds=BROKER_SECONDS) as queues:
            return await work(queues)

    return trio.run(main)


def depths(config: Config) -> dict[str, Depth]:
    """How full each queue of the settings is, at the broker. Raises `QueueError`."""

    async def look(queues: RemoteQueues) -> list[Depth]:
        return await queues.depths()

    try:
        return {depth.queue: depth for depth in with_broker(config, look)}
    except QueueError as error:
        kept = sum(depth.total for depth in reserve_depths(config).values())
        if not kept:
            raise
        raise QueueError(
            f"{error}; {kept} messages wait on this host until a broker takes them"
        ) from None


def _list(config: Config, options: Namespace) -> int:
    keys = ("queue", "due", "delayed", "held", "total", "fallback")
    found, kept = depths(config), reserve_depths(config)
    rows = []
    for queue in sorted({*found, *kept}):
        depth = found.get(queue, Depth(queue, 0, 0))
        here = kept[queue].total if queue in kept else 0
        if depth.total or here or queue != DAMAGED_QUEUE:
            rows.append((queue, depth.due, depth.delayed, depth.held, depth.total + here, here))
    if options.json:
        print_json([dict(zip(keys, row, strict=True)) for row in rows])
    else:
        print_table([key.upper() for key in keys], rows)
    return os.EX_OK


def _total(config: Config, queue: str) -> int:
    """The messages of a queue at the broker, and of those that wait for it on this host."""
    counted = (depths(config).get(queue), reserve_depths(config).get(queue))
    return sum(depth.total for depth in counted if depth is not None)


def _count(config: Config, options: Namespace) -> int:
    queue = options.queue or config.rabbitmq_outbox
    count = _total(config, queue)
    if options.json:
        print_json({"queue": queue, "count": count})
    else:
        sys.stdout.write(f"{count}\n")
    return os.EX_OK


def _mailq(config: Config) -> int:
    count = _total(config, config.rabbitmq_outbox)
    if not count:
        sys.stdout.write("Mail queue is empty\n")  # monitoring looks for these words
    else:
        sys.stdout.write(f"-- {count} Requests, in RabbitMQ, which cannot list them.\n")
    return os.EX_OK


def _read(config: Config, options: Namespace) -> int:
    if options.id or options.after:
        complain("messages in RabbitMQ have no ids to find them by")
        return os.EX_UNAVAILABLE
    limit = min(options.limit or ALL_MESSAGES, ALL_MESSAGES)

    def show(messages: Sequence[Message]) -> None:
        for message in messages:
            document = message.to_dict()
            if options.json or not sys.stdout.isatty():
                print_json(document)
            else:
                shown = document if options.remove else for_people(document)
                sys.stdout.write(dump_json(shown, indent=2) + "\n")
        # As far as we can know, the reader has it before it is removed here.
        sys.stdout.flush()

    async def look(queues: RemoteQueues) -> None:
        await queues.read_head(options.queue, limit, show, remove=options.remove)

    with_broker(config, look)
    return os.EX_OK


def _flush(config: Config, options: Namespace) -> int:
    """Flush by the daemon, which has a connection and moves the mail while it runs."""

    def count() -> int:
        found = depths(config).get(config.rabbitmq_outbox)
        return 0 if found is None else found.delayed

    return flush(config, options, count)


def _purge(config: Config, options: Namespace) -> int:
    async def purge(queues: RemoteQueues) -> int:
        return await queues.purge(options.queue)

    if not options.yes and not _confirmed(config, options):
        return 1
    deleted = with_broker(config, purge)
    if options.json:
        print_json({"queue": options.queue, "deleted": deleted})
    else:
        sys.stdout.write(f"{deleted} messages deleted from {escape(options.queue)}\n")
    return os.EX_OK


def _confirmed(config: Config, options: Namespace) -> bool:
    if not sys.stdin.isatty():
        complain("purge deletes for good: say --yes, or answer on a terminal")
        return False
    total = _total(config, options.queue)
    sys.stderr.write(f"Delete all {total} messages of {escape(options.queue)} for good? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    complain("nothing was deleted")
    return False


_COMMANDS: Final[dict[str, Callable[[Config, Namespace], int]]] = {
    "list": _list,
    "count": _count,
    "read": _read,
    "flush": _flush,
    "purge": _purge,
}
