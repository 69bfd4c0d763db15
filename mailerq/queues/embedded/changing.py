"""Changes messages of a queue file without taking them, for an operator.

The command line calls `change` where no daemon has the file. A daemon calls it on its writer's
thread, for messages that it keeps from being leased meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import apsw

from mailerq.message import Message
from mailerq.queues.embedded.layout import HELD
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.queue_reader import ROW, Waiting
from mailerq.queues.embedded.records import Batch, Insert, Retry, Row, check, prepare, proven
from mailerq.queues.embedded.sqlite_file import bind
from mailerq.queues.interface import Publication
from mailerq.rules.changes import Change, Copy, Decide, Decision

__all__ = ["CHANGE_ROWS", "Step", "change"]

CHANGE_ROWS: Final = 500
"""Rows of one commit of a change."""

COPY_BYTES: Final = 64 << 20
"""Bytes of copied bodies after which a commit ends."""

HOLD: Final = """
UPDATE message SET due = due + ?1
WHERE id IN (SELECT value FROM carray(?2)) AND queue = ?3 AND due < ?1
"""

RELEASE: Final = """
UPDATE message SET due = due - ?1
WHERE id IN (SELECT value FROM carray(?2)) AND queue = ?3 AND due >= ?1
"""

ROWS: Final = (
    ROW.replace("data FROM", "NULL FROM")
    + "WHERE m.id IN (SELECT value FROM carray(?)) AND m.queue = ? ORDER BY m.id"
)


class Step(NamedTuple):
    """What one commit did: the number of messages changed, and what is now in other queues."""

    done: int
    elsewhere: Sequence[Waiting] = ()


def change(
    file: QueueFile, queue: str, numbers: Sequence[int], what: Change, now: float
) -> Sequence[Step]:
    """Change messages, in one commit unless bodies are copied. Raises `QueueError`.

    `now` is seconds since 1970. Messages that are gone, damaged, or changed already are left out.
    """
    if callable(what):
        return _Deciding(file, queue, what, now).run(numbers)
    if what == "delete":
        return [Step(file.delete(queue, numbers))]
    with file.commit() as connection:
        statement = HOLD if what == "hold" else RELEASE
        connection.execute(statement, (HELD, bind(numbers), queue))
        return [Step(connection.changes())]


class _Deciding:
    """A change that reads the documents."""

    def __init__(self, file: QueueFile, queue: str, decide: Decide, now: float) -> None:
        self._file = file
        self._queue = queue
        self._decide = decide
        self._now = now
        self._steps: list[Step] = []
        self._batch = Batch([], [], [])
        self._elsewhere: list[Insert] = []
        self._bytes = 0

    def run(self, numbers: Sequence[int]) -> Sequence[Step]:
        try:
            found: list[Any] = self._file.connection.execute(
                ROWS, (bind(numbers), self._queue)
            ).fetchall()
        except apsw.Error as error:
            raise self._file.failed(error) from error
        for values in found:
            row = Row(*values)
            message = check(row, loaded=False) if proven(row) else ""
            if not isinstance(message, Message):
                continue  # a daemon reports what is wrong, and sets the message aside
            decision = self._decide(message)
            if decision is not None:
                self._add(row, decision)
            if self._bytes >= COPY_BYTES:
                self._commit()
        self._commit()
        return self._steps

    def _add(self, row: Row, decision: Decision) -> None:
        kept = decision.kept
        if row.due >= HELD and kept is not None and kept.queue == self._queue:
            if kept.due is not None:
                return  # held since the message was selected
        body: bytes | None = None
        if decision.made or any(copy.with_body for copy in decision.copies):
            whole = self._file.row(row.id)
            body = whole.data if whole is not None else None
        inserts = [self._copy(copy, body) for copy in decision.copies]
        for made in decision.made:
            publication = Publication(made.queue, made.make(body))
            inserts.append(prepare(publication, self._now, self._file.outbox))
        for insert in inserts:
            self._batch.inserts.append(insert)
            self._elsewhere.append(insert)
            self._bytes += insert.size
        if kept is None:
            self._batch.removals.append(row.id)
            return
        publication = Publication(kept.queue, Message(kept.properties), kept.due)
        insert = prepare(publication, self._now, self._file.outbox)
        insert.id = row.id
        if kept.due is None:
            insert.due = row.due
        self._batch.retries.append(
            Retry(row.id, row.body, row.body_crc, insert, whole=False, queue=self._queue)
        )
        if kept.queue != self._queue:
            self._elsewhere.append(insert)

    def _copy(self, copy: Copy, body: bytes | None) -> Insert:
        message = Message(copy.properties, body if copy.with_body else None)
        return prepare(Publication(copy.queue, message), self._now, self._file.outbox)

    def _commit(self) -> None:
        batch = self._batch
        done = len(batch.retries) + len(batch.removals)
        if done:
            self._file.number(batch.inserts)
            self._file.write(batch)
            elsewhere = [
                Waiting(each.id, each.queue, each.destination, each.lane, each.due)
                for each in self._elsewhere
            ]
            self._steps.append(Step(done, elsewhere))
        self._batch = Batch([], [], [])
        self._elsewhere = []
        self._bytes = 0
