"""``mailerq top``: the flows of a running daemon, live: how much waits, and what limits each."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from mailerq.cli import control
from mailerq.cli.common import command_parser, complain, positive, print_json, print_table
from mailerq.cli.screen import ESCAPE, Screen, keys_in, on_terminal
from mailerq.config import Config
from mailerq.errors import MailerqError, QueueError
from mailerq.escaping import escape
from mailerq.message import format_time

if TYPE_CHECKING:
    import trio

__all__ = ["Rows", "View", "main"]

DESCRIPTION: Final = """\
Show the flows of the daemon that runs on this host: for each site and local address how much mail
waits in the queue and in memory, connections, messages a minute, what limits it now, and what a
host said last. Several processes are added up. In a terminal the figures change each second; keys:
q quit, s next order, / show only names with some text (Enter keeps it, Esc shows all)."""

ORDERS: Final = ("waiting", "rate", "connections", "memory", "name")

SECONDS: Final = 1.0
"""Interval between looks, and the least time for a rate."""

DEPTH_SHARE: Final = 20
DEPTH_SECONDS: Final = 2.0
"""After counting the mail in the queue, wait `DEPTH_SHARE` times as long as that took, and at least
`DEPTH_SECONDS`."""

MAX_ROWS: Final = 500
MIN_ASKED: Final = 100
MAX_KEYS: Final = 100
"""Rows to ask for, and destinations with the most mail in the queue."""

MINUTE: Final = 60.0

ONCE_ROWS: Final = 40

Row = dict[str, Any]


def main(settings: list[str], rest: list[str]) -> int:
    """Show the flows, see DESCRIPTION."""
    parser = command_parser("top", DESCRIPTION)
    parser.add_argument("--once", action="store_true", help="print one table, and end")
    parser.add_argument(
        "--json", action="store_true",
        help="for programs: one JSON object each second, or one with --once",
    )  # fmt: skip
    parser.add_argument("--sort", choices=ORDERS, default=ORDERS[0], help="the order of the rows")
    parser.add_argument("--filter", metavar="TEXT", default="", help="only names with this text")
    parser.add_argument("--limit", type=positive, metavar="N", help="no more than N rows")
    options = parser.parse_args(rest)
    config = Config.load(settings)
    if options.limit is not None:
        options.limit = min(options.limit, MAX_ROWS)
    live = on_terminal() and not (options.once or options.json)
    rows = Rows(config)
    try:
        # Rates are differences: a first look comes before the one that is shown.
        rows.look(options.sort, options.filter, options.limit or ONCE_ROWS)
        if live:
            return _run_live(View(rows, options.sort, options.filter, options.limit))
        while True:
            time.sleep(SECONDS)
            page = rows.look(options.sort, options.filter, options.limit or ONCE_ROWS)
            if options.json:
                print_json(page)
                sys.stdout.flush()
            else:
                print_table([name for name, *_ in COLUMNS], [_cells(row) for row in page["rows"]])
            if options.once or not options.json:
                return os.EX_OK
    except PermissionError:
        complain(f"you may not ask the daemon on {config.queue_directory}; its user and root may")
        return os.EX_NOPERM
    except OSError as error:
        complain(f"no daemon answers on {config.queue_directory}: {error.strerror or error}")
        return os.EX_UNAVAILABLE
    except MailerqError as error:
        complain(str(error))
        return os.EX_SOFTWARE


class Rows:
    """Looks at the daemon and at its queue, and keeps what the next look compares with."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._depths: dict[str, int] | None = None
        self._next_depths = 0.0
        self._messages: dict[tuple[Any, ...], int] = {}
        self._delivered: int | None = None
        self._looked = 0.0

    def look(self, sort: str, text: str, limit: int) -> dict[str, Any]:
        """The page now. Raises OSError if no daemon answers, and `MailerqError`."""
        self._count()
        depths = self._depths or {}
        wanted = [key for key in depths if text.lower() in key.lower()]
        wanted.sort(key=lambda key: -depths[key])
        # Rates are not known to the daemon, which sends the flows with the most connections.
        asked = MAX_ROWS if sort == "rate" else min(max(2 * limit, MIN_ASKED), MAX_ROWS)
        page = control.ask(
            self._config.queue_directory,
            "top",
            sort=sort,
            filter=text,
            limit=asked,
            keys=wanted[: min(limit, MAX_KEYS)] if sort == "waiting" else [],
        )
        if "error" in page:
            raise MailerqError(f"the daemon says: {page['error']}")
        self._add_figures(page)
        page["rows"].sort(key=_KEYS[sort])
        del page["rows"][limit:]
        return page

    def _add_figures(self, page: dict[str, Any]) -> None:
        """Add what is known here: times, rates, and mail in the queue."""
        now, depths = time.monotonic(), self._depths
        seconds = now - self._looked
        messages = {}
        for row in page["rows"]:
            key = row["id"], row["local-ip"], *row["demands"]
            before, messages[key] = self._messages.get(key), row["messages"]
            # A flow that has begun anew counts from zero.
            row["rate"] = (
                None
                if before is None
                else (row["messages"] - min(before, row["messages"])) / seconds * MINUTE
            )
            row["waiting"] = (
                None if depths is None else sum(depths.get(name, 0) for name in row["destinations"])
            )
        delivered, self._delivered = self._delivered, page["delivered"]
        page["rate"] = (
            None if delivered is None else max(page["delivered"] - delivered, 0) / seconds * MINUTE
        )
        page["waiting"] = None if depths is None else sum(depths.values())
        page["time"] = format_time(time.time())
        self._messages, self._looked = messages, now

    def _count(self) -> None:
        """Count the mail of each destination in the queue, if that is due and allowed."""
        began = time.monotonic()
        if began < self._next_depths:
            return
        from mailerq.queues.opening import waiting_by_destination

        try:
            self._depths = waiting_by_destination(self._config)
        except (OSError, QueueError):
            self._depths = None
        took = time.monotonic() - began
        self._next_depths = time.monotonic() + max(DEPTH_SHARE * took, DEPTH_SECONDS)


_KEYS: Final = {
    "waiting": lambda row: (-(row["waiting"] or 0), -row["memory"], row["site"]),
    "rate": lambda row: (-(row["rate"] or 0.0), -row["connections"], row["site"]),
    "connections": lambda row: (-row["connections"], row["site"]),
    "memory": lambda row: (-row["memory"], row["site"]),
    "name": lambda row: (row["site"], row["local-ip"] or ""),
}


# What is shown


def _waiting(row: Row) -> object:
    if row["waiting"] is None:
        return None
    return f"{row['waiting']}+" if row["more-destinations"] else row["waiting"]


def _limit(row: Row) -> str:
    if row["seconds"] is None:
        return f"{row['limited-by']}, until {row['until']}" if row["until"] else row["limited-by"]
    return f"{row['seconds']:.1f} s: {row['limited-by']}"


def _cells(row: Row) -> list[object]:
    return [
        row["site"],
        row["local-ip"],
        _waiting(row),
        row["memory"],
        row["connections"],
        None if row["rate"] is None else round(row["rate"]),
        _limit(row),
        row["reply"],
    ]


COLUMNS: Final = (
    ("SITE", 0.3, False),
    ("FROM", 15, False),
    ("WAITING", 8, True),
    ("MEMORY", 6, True),
    ("CONN", 5, True),
    ("PER MIN", 7, True),
    ("LIMITED BY", 0.4, False),
    ("LAST REPLY", 0.3, False),
)
"""Name, width in characters or as a part of what is left, and whether numbers stand there."""


def _widths(columns: int, used: Sequence[bool]) -> list[int]:
    """The width of each column of the screen; 0 for one that is not used."""
    fixed = sum(int(size) + 2 for (_, size, _), on in zip(COLUMNS, used, strict=True)
                if on and size >= 1)  # fmt: skip
    left = max(columns - fixed, 30) - 2 * sum(size < 1 for _, size, _ in COLUMNS)
    return [
        (int(size) if size >= 1 else int(size * left)) if on else 0
        for (_, size, _), on in zip(COLUMNS, used, strict=True)
    ]


class View:
    """What the screen shows; keys change it."""

    def __init__(self, rows: Rows, sort: str, text: str, limit: int | None) -> None:
        self.rows = rows
        self.sort = sort
        self.text = text
        self.typed: str | None = None
        """The text that is being typed, None if none is."""
        self.page: dict[str, Any] | None = None
        self.problem = ""
        self._limit = limit

    def press(self, key: str) -> bool:
        """Do what a key means; False to quit."""
        if self.typed is not None:
            if key == "\n":
                self.text, self.typed = self.typed, None
            elif key == ESCAPE:
                self.text, self.typed = "", None
            elif key == "\x08":
                self.typed = self.typed[:-1]
            else:
                self.typed += key
        elif key == "q":
            return False
        elif key == "s":
            self.sort = ORDERS[(ORDERS.index(self.sort) + 1) % len(ORDERS)]
        elif key == "/":
            self.typed = self.text
        elif key == ESCAPE:
            self.text = ""
        return True

    def look(self, height: int) -> None:
        """Look once; what is wrong is shown."""
        try:
            limit = min(self._limit or max(height - len(HEAD) - 2, 1), MAX_ROWS)
            self.page = self.rows.look(self.sort, self.text, limit)
            self.problem = ""
        except (OSError, MailerqError) as error:
            self.problem = f"no answer: {getattr(error, 'strerror', None) or error}"

    def lines(self, columns: int, height: int) -> list[str]:
        """The screen: totals, headings, rows, keys."""
        page = self.page or {"rows": []}
        rows = [[*map(_shown, _cells(row))] for row in page["rows"]]
        used = [name != "FROM" or any(row[1] for row in rows) for name, *_ in COLUMNS]
        widths = _widths(columns, used)
        table = [
            "  ".join(
                (cell[:width].rjust(width) if right else cell[:width].ljust(width))
                for cell, width, (_, _, right) in zip(row, widths, COLUMNS, strict=True)
                if width
            ).rstrip()
            for row in ([name for name, *_ in COLUMNS], *rows)
        ]
        lines = [*self._head(page), *table]
        room = max(height - 1, 1)
        lines = lines[:room] + [""] * (room - len(lines))
        return [*lines, self._foot()]

    def _head(self, page: dict[str, Any]) -> Iterator[str]:
        if self.problem:
            yield escape(self.problem)
        elif "time" not in page:
            yield "…"
        else:
            yield (
                f"{page['time']} UTC  {page['flows']} flows, {page['pauses']} down,"
                f" {page['connections']} connections, {page['memory']} messages in memory,"
                f" {'?' if page['waiting'] is None else page['waiting']} in the queue,"
                f" {'?' if page['rate'] is None else round(page['rate'])} delivered a minute"
            )
        yield ""

    def _foot(self) -> str:
        if self.typed is not None:
            return f"show names with: {escape(self.typed)}_"
        kept = f" of names with {escape(self.text)!r}" if self.text else ""
        return f"q quit  s sort  / filter     sorted by {self.sort}{kept}"


HEAD: Final = ("totals", "", "headings")
"""The lines above the rows."""


def _shown(cell: object) -> str:
    return "" if cell is None else escape(str(cell))


# The screen


def _run_live(view: View) -> int:
    import trio

    screen = Screen()
    with screen.whole():
        return trio.run(_live, view, screen)


async def _live(view: View, screen: Screen) -> int:
    """Look and draw until a key or a signal ends it; the exit status."""
    import trio

    changed = trio.Event()
    status = os.EX_OK

    def draw() -> None:
        screen.draw(view.lines(*screen.size), bold=(len(HEAD) - 1,))

    async def look() -> None:
        nonlocal changed
        while True:
            changed = trio.Event()
            # A daemon that stands still must not hold up the keys.
            await trio.to_thread.run_sync(view.look, screen.size[1], abandon_on_cancel=True)
            draw()
            with trio.move_on_after(SECONDS):
                await changed.wait()

    async def obey(signals: AsyncIterator[int]) -> None:
        nonlocal status
        async for number in signals:
            if number == signal.SIGTSTP:
                screen.leave()
                os.kill(os.getpid(), signal.SIGSTOP)
                screen.enter()
            elif number != signal.SIGWINCH:
                status = 128 + number
                nursery.cancel_scope.cancel()
                return
            draw()

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGWINCH)
    with trio.open_signal_receiver(*watched) as signals:
        nursery: trio.Nursery
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            nursery.start_soon(obey, signals)
            await _read_keys(view, screen, draw, lambda: changed.set())
            nursery.cancel_scope.cancel()
    return status


async def _read_keys(view: View, screen: Screen, draw: Any, changed: Any) -> None:
    """Obey keys, until one says to quit or the terminal is gone."""
    import trio

    while True:
        await trio.lowlevel.wait_readable(screen.input)
        data = screen.read()
        if not data:
            return
        before = view.sort, view.text
        for key in keys_in(data):
            if not view.press(key):
                return
        draw()
        if (view.sort, view.text) != before:
            changed()
