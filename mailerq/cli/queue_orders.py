"""``mailerq queue hold``, ``release``, ``retry``, ``delete``, ``bounce`` and ``reroute``.

The command finds the messages in the files. Where a daemon delivers from a share it is asked to
change them, some at a time, because only the daemon knows what is under way. Elsewhere the command
changes the file. While a file is open here, no daemon can begin to deliver from it.
"""

from __future__ import annotations

import logging
import os
import pwd
import sys
import time
from argparse import Namespace
from array import array
from contextlib import ExitStack
from typing import Any, Final, Self

import msgspec

from mailerq import ids
from mailerq.address import parse_host, queue_problem, split_host_port
from mailerq.cli import control, logs
from mailerq.cli.common import Parser, complain, positive, print_json
from mailerq.cli.queue_selection import add_criteria, selection_of
from mailerq.config import Config
from mailerq.errors import AddressError, ConfigError, QueueError
from mailerq.escaping import escape
from mailerq.queues.opening import QueueFile, open_files, open_idle, share_of
from mailerq.rules.changes import Order
from mailerq.rules.reporting import NO_REPORTS, Reports
from mailerq.rules.routes import SMTP_PORT
from mailerq.rules.selection import Selection

__all__ = ["ORDERS", "add_order", "run_order"]

NUMBERS: Final = 2_000
"""Messages that a daemon is asked to change at a time."""

ASK_SECONDS: Final = 20.0

ORDERS: Final = {
    "hold": "keep messages in the outbox, without attempts, until they are released",
    "release": "end a hold; mail whose time is over fails at its next attempt",
    "retry": "try now what waits after a failed attempt; held mail, and mail that its sender "
    "delayed, stays",
    "delete": "delete messages for good; nobody is told",
    "bounce": "fail messages now, with the results and the report to the sender that any failure "
    "has",
    "reroute": "send messages by another host, or move them to another queue",
}

DONE: Final = {
    "hold": "held",
    "release": "released",
    "retry": "made due now",
    "delete": "deleted",
    "bounce": "bounced",
    "reroute": "rerouted",
}

FINAL: Final = ("delete", "bounce")
"""What asks for a confirmation."""

ANY_QUEUE: Final = ("delete", "reroute")
"""What may be done in other queues than the outbox."""


def add_order(parser: Parser, action: str) -> None:
    """Add the options of a command."""
    add_criteria(parser)
    parser.add_argument("--all", action="store_true", help="all messages of the queue")
    if action in ANY_QUEUE:
        parser.add_argument("--queue", metavar="QUEUE", help="by default the outbox")
    parser.add_argument("--limit", type=positive, metavar="N", help="no more than N messages")
    parser.add_argument("--reason", default="", metavar="TEXT", help="why, for the log")
    parser.add_argument(
        "--dry-run", action="store_true", help="change nothing, and say how many it would be"
    )
    if action in FINAL:
        parser.add_argument("--yes", action="store_true", help="do not ask")
    if action == "reroute":
        target = parser.add_mutually_exclusive_group(required=True)
        target.add_argument("--via", metavar="HOST[:PORT]", help="send by this smarthost")
        target.add_argument(
            "--direct", action="store_true", help="send to the hosts of the domains again"
        )
        target.add_argument("--to-queue", metavar="QUEUE", help="move to this queue")


def run_order(config: Config, options: Namespace, parser: Parser) -> int:
    """Select messages, ask if need be, change them, and say how many they were."""
    action, selection = options.action, selection_of(options)
    if not (selection.is_narrow or options.all):
        parser.error("which messages? select some, or say --all")
    order, queue = _order(options, parser), getattr(options, "queue", None)
    queue = queue or config.rabbitmq_outbox
    chosen = _choose(config, queue, _fitting(selection, action), options.limit)
    count = sum(len(numbers) for _, numbers in chosen)
    if options.dry_run or not count:
        return _tell(options, queue, count, count, 0)
    if action in FINAL and not options.yes and not _confirmed(parser, options, queue, count):
        return 1
    audit = _Audit(config, options, queue, f"{order.who}: {action} in {queue}")
    audit.say(f"{count} messages ({selection.describe()})")
    done = leased = 0
    try:
        for share, numbers in chosen:
            with _Share(config, share, queue, order) as opened:
                for start in range(0, len(numbers), NUMBERS):
                    changed = opened.change(numbers[start : start + NUMBERS])
                    done, leased = done + changed[0], leased + changed[1]
    except BaseException:
        complain(f"{done} of {count} messages were {DONE[action]} before this error")
        raise
    finally:
        audit.say(f"{done} of {count} messages were {DONE[action]}{_under_way(leased)}")
    return _tell(options, queue, count, done, leased)


def _fitting(selection: Selection, action: str) -> Selection:
    """The selected messages to which a command applies."""
    if action == "release":
        return msgspec.structs.replace(selection, held=True)
    if action in ("hold", "retry"):
        return msgspec.structs.replace(selection, held=False, waits=action == "retry")
    return selection


def _order(options: Namespace, parser: Parser) -> Order:
    # Arguments may be no UTF-8, and results are JSON.
    options.reason = options.reason.encode(errors="backslashreplace").decode()
    fields: dict[str, Any] = {"action": options.action, "who": _who(), "reason": options.reason}
    if options.action == "reroute":
        fields["direct"] = options.direct
        if options.to_queue is not None:
            if (problem := queue_problem(options.to_queue)) is not None:
                parser.error(f"argument --to-queue: the name {problem}")
            fields["to_queue"] = options.to_queue
        if options.via is not None:
            try:
                fields["smarthost"], fields["port"] = _host(options.via)
            except AddressError as error:
                parser.error(f"argument --via: {error}")
    return Order(**fields)


def _host(text: str) -> tuple[str, int]:
    """A host with or without a port. Raises `AddressError`."""
    try:
        return str(parse_host(text)), SMTP_PORT
    except AddressError:
        host, port = split_host_port(text)
    if not port:
        raise AddressError("0 is no port")
    return str(parse_host(host)), port


def _who() -> str:
    """The account that gives the order, and behind sudo the person."""
    try:
        account = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        account = f"uid {os.getuid()}"
    person = os.environ.get("SUDO_USER")
    return f"{person} as {account}" if person and not os.getuid() else account


def _choose(
    config: Config, queue: str, selection: Selection, limit: int | None
) -> list[tuple[int, array[int]]]:
    """The numbers of the selected messages, by share. No file stays open."""
    chosen = []
    with open_files(config) as files:
        for file in files:
            numbers = array("q")
            for page in file.selected(queue, selection):
                numbers += page
                if limit is not None and len(numbers) >= limit:
                    del numbers[limit:]
                    break
            chosen.append((share_of(os.path.dirname(file.path)), numbers))
            if limit is not None and not (limit := limit - len(numbers)):
                break
    return chosen


def _confirmed(parser: Parser, options: Namespace, queue: str, count: int) -> bool:
    """Ask on the terminal. No file is open while the user decides."""
    action: str = options.action
    if not sys.stdin.isatty():
        parser.error(f"{action} is for good: say --yes, or answer on a terminal")
    sys.stderr.write(f"{action.capitalize()} {count} messages of {escape(queue)}? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    complain(f"no message was {DONE[action]}")
    return False


def _tell(options: Namespace, queue: str, count: int, done: int, leased: int) -> int:
    action: str = options.action
    if options.json:
        print_json({
            "queue": queue, "action": action, "selected": count, "done": done,
            "under_way": leased, "dry_run": options.dry_run,
        })  # fmt: skip
        return os.EX_OK
    text = f"{done} messages of {escape(queue)} "
    if options.dry_run:
        text += f"would be {DONE[action]}"
    else:
        text += f"were {DONE[action]}{_under_way(leased)}"
        if gone := count - done - leased:
            text += f"; {gone} had changed or gone meanwhile"
    sys.stdout.write(text + "\n")
    return os.EX_OK


def _under_way(leased: int) -> str:
    return f"; {leased} are under way and stay as they are" if leased else ""


class _Share:
    """Changes messages of one share: through the daemon that delivers from it, or directly."""

    def __init__(self, config: Config, share: int, queue: str, order: Order) -> None:
        self._config = config
        self._share = share
        self._queue = queue
        self._order = order
        self._stack = ExitStack()
        self._file: QueueFile | None = None
        self._reports = NO_REPORTS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def change(self, numbers: array[int]) -> tuple[int, int]:
        """How many messages changed, and how many are under way. Raises `QueueError`, OSError."""
        if self._file is None:
            reply = self._ask(numbers)
            if "done" in reply:
                return int(reply["done"]), int(reply["leased"])
            if self._order.action == "bounce":
                ids.set_machine(self._config.server_id, self._config.hostname)
                self._reports = Reports.of(self._config)
            self._file = self._stack.enter_context(open_idle(self._config, self._share))
        now = time.time()
        what = self._order.change(
            self._queue, self._config, now=now, reports=self._reports, next_id=ids.new_id
        )
        return self._file.change(self._queue, numbers, what, now), 0

    def _ask(self, numbers: array[int]) -> dict[str, Any]:
        """The reply of the daemon; empty if none delivers from this share."""
        try:
            reply = control.ask(
                self._config.queue_directory,
                "queue-change",
                timeout=ASK_SECONDS,
                share=self._share,
                queue=self._queue,
                numbers=list(numbers),
                order=msgspec.to_builtins(self._order),
            )
        except (FileNotFoundError, ConnectionRefusedError):
            return {}
        if "error" in reply:
            raise QueueError(f"the daemon says: {reply['error']}")
        return reply


class _Audit:
    """Writes into the application log: through the daemon, or where its settings say."""

    def __init__(self, config: Config, options: Namespace, queue: str, head: str) -> None:
        self._config = config
        self._head = head
        self._reason = f"; reason: {options.reason}" if options.reason else ""
        self._here = False

    def say(self, text: str) -> None:
        text = f"{self._head}: {text}{self._reason}"
        if not self._here:
            try:
                control.ask(self._config.queue_directory, "note", text=text)
                return
            except OSError:
                self._here = True
                self._open()
        logging.getLogger("mailerq.operator").info("%s", text)

    def _open(self) -> None:
        """Open the log files of the daemon. Its terminal is not ours."""
        places = logs.names(self._config.application_log)
        files = ",".join(name for name in places if name not in ("stderr", "stdout"))
        try:
            logs.configure(self._config.replace(application_log=files))
        except ConfigError as error:
            complain(str(error))
