"""Finds the messages of a queue file that an operator means, with a million of them in seconds.

A criterion that the index answers is asked there: domains, and whether messages are held. The rest
is in the documents, which are read in the order of their numbers. Every page is a read of its own,
so that a long search neither keeps the log of the file from being reused nor needs memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any, Final

import apsw

from mailerq.queues.embedded.layout import HELD
from mailerq.queues.embedded.sqlite_file import SqliteFile, bind
from mailerq.rules.selection import Matcher, Selection

__all__ = ["selected"]

PAGE: Final = 2_000
"""Rows that one read looks at."""

EVER: Final = 2**63 - 1
"""Above all due times and numbers."""

INDEXED: Final = """
SELECT id FROM message INDEXED BY message_place
WHERE queue = ? AND destination BETWEEN ? AND ? AND due >= ? AND due < ?
"""

ALL_PLACES: Final = ("", "\U0010ffff")

BY_NUMBER: Final = """
SELECT id, due, properties FROM message NOT INDEXED
WHERE id IN (SELECT value FROM carray(?)) AND queue = ? ORDER BY id
"""

PAGE_END: Final = """
SELECT max(id) FROM (SELECT id FROM message NOT INDEXED WHERE id > ? ORDER BY id LIMIT ?)
"""

IN_ORDER: Final = """
SELECT id, due, properties FROM message NOT INDEXED WHERE id > ? AND id <= ? AND queue = ?
"""


def selected(
    file: SqliteFile, queue: str, selection: Selection, now: float, *, after: int = 0
) -> Iterator[array[int]]:
    """The numbers of the selected messages above `after`, in order, some at a time.

    `now` is seconds since 1970. Raises `QueueError`.
    """
    search = _Search(file, queue, selection, now)
    try:
        yield from search.run(after)
    except apsw.Error as error:
        raise file.failed(error) from error


class _Search:
    def __init__(self, file: SqliteFile, queue: str, selection: Selection, now: float) -> None:
        self._file = file
        self._queue = queue
        self._selection = selection
        self._matcher = Matcher(selection, now)

    def run(self, after: int) -> Iterator[array[int]]:
        selection = self._selection
        ranges = selection.ranges()
        if selection.ids:
            yield from self._by_number(array("q", set(selection.ids)), after)
        elif ranges is None and (selection.reads_documents or selection.domains):
            yield from self._in_order(after)
        elif ranges is None:
            yield from _pages(self._indexed(*ALL_PLACES), after)
        else:
            sure, doubtful = array("q"), array("q")
            for each in ranges:
                exact = each.exact and not selection.reads_documents
                (sure if exact else doubtful).extend(self._indexed(each.first, each.last))
            if not sure:
                yield from self._by_number(doubtful, after)
                return
            for numbers in self._by_number(doubtful, after):
                sure.extend(numbers)
            yield from _pages(sure, after)

    def _indexed(self, first: str, last: str) -> array[int]:
        held = self._selection.held
        least, end = HELD if held else -EVER, HELD if held is False else EVER
        found = self._file.connection.execute(INDEXED, (self._queue, first, last, least, end))
        return array("q", (number for (number,) in found))

    def _by_number(self, numbers: array[int], after: int) -> Iterator[array[int]]:
        """Those of these messages that are selected."""
        for page in _pages(numbers, after):
            yield from self._matching(BY_NUMBER, (bind(page), self._queue))

    def _in_order(self, after: int) -> Iterator[array[int]]:
        """The selected messages, found by a look at all."""
        while True:
            end = self._file.connection.execute(PAGE_END, (after, PAGE)).get
            if end is None:
                return
            yield from self._matching(IN_ORDER, (after, end, self._queue))
            after = end

    def _matching(self, statement: str, values: tuple[Any, ...]) -> Iterator[array[int]]:
        fits = self._matcher.fits
        found = array("q")
        rows: list[Any] = self._file.connection.execute(statement, values).fetchall()
        for number, due, properties in rows:
            held = isinstance(due, int) and due >= HELD
            seconds = (due - HELD if held else due) / 1000 if isinstance(due, int) else 0.0
            if fits(number, seconds, held, properties):
                found.append(number)
        if found:
            yield found


def _pages(numbers: array[int], after: int) -> Iterator[array[int]]:
    """Numbers above `after`, in order and each once, some at a time."""
    page = array("q")
    for number in sorted(numbers):
        if number > after:
            page.append(number)
            after = number
        if len(page) >= PAGE:
            yield page
            page = array("q")
    if page:
        yield page
