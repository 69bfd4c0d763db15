"""Reads some due mail of one destination, in a fair order.

The mail of a destination lies in lanes (`mailerq.rules.destinations`), in each oldest due first.
Lanes of a higher priority are emptied first. Among lanes of one priority senders take turns. Of
five messages four are new and one is a retry; if one kind is missing, the other gets all turns.
`Turns` keeps the position between reads, so that many small reads are as fair as a large one.

Leased mail stays at the front of its lane; a read walks the index past it.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence
from itertools import chain, zip_longest
from typing import Any, Final, NamedTuple

import apsw

from mailerq.queues.embedded.layout import HELD, UNSORTED
from mailerq.queues.embedded.records import Row
from mailerq.queues.embedded.sqlite_file import bind
from mailerq.rules.destinations import RETRY_LANE, SENDER_LANES, level_of

__all__ = [
    "ANY_SIZE",
    "FIRST_TURN",
    "READ_BYTES",
    "Found",
    "Turns",
    "Wanted",
    "is_retry",
    "sender",
    "take",
]

READ_BYTES: Final = 16 << 20
"""Bytes of messages that one read brings into memory; one message is always allowed."""

ANY_SIZE: Final = 1 << 40
"""A body limit that means no limit."""

CYCLE: Final = 5
"""One message in this many is a retry, if there are both retries and new mail."""

LANES_AT_A_TIME: Final = 16
"""Least number of senders that share a read, if there are enough: each costs a query."""

LANES: Final = """
WITH RECURSIVE lanes(lane) AS (
    SELECT (SELECT lane FROM message INDEXED BY message_place
            WHERE queue = ?1 AND destination = ?2 AND lane >= ?3 ORDER BY lane LIMIT 1)
    UNION ALL
    SELECT (SELECT m.lane FROM message m INDEXED BY message_place
            WHERE m.queue = ?1 AND m.destination = ?2 AND m.lane > lanes.lane
            ORDER BY m.lane LIMIT 1)
    FROM lanes WHERE lanes.lane IS NOT NULL
)
SELECT lane,
    (SELECT m.due FROM message m INDEXED BY message_place
     WHERE m.queue = ?1 AND m.destination = ?2 AND m.lane = lanes.lane
     ORDER BY m.due LIMIT 1) <= ?4,
    (SELECT m.due FROM message m INDEXED BY message_place
     WHERE m.queue = ?1 AND m.destination = ?2 AND m.lane = lanes.lane AND m.due > ?4
     ORDER BY m.due LIMIT 1)
FROM lanes WHERE lane IS NOT NULL
"""
"""The lanes of a destination: whether mail is due, and when more becomes due."""

DUE: Final = """
    SELECT id FROM message INDEXED BY message_place
    WHERE queue = ?1 AND destination = ?2 AND lane = ?3 AND due <= ?4
        AND id NOT IN (SELECT value FROM carray(?5)) ORDER BY due, id LIMIT ?6
"""

READ: Final = f"""
SELECT m.id, m.queue, m.due, m.body, m.body_crc, m.crc, m.properties,
    iif(length(b.data) <= ?7, b.data, iif(length(s.data) <= ?7, s.data, NULL)),
    coalesce(length(b.data), length(s.data))
FROM ({DUE}) AS found
CROSS JOIN message m NOT INDEXED ON m.id = found.id
LEFT JOIN body b ON m.body = 0 AND b.id = m.id
LEFT JOIN shared s ON m.body > 0 AND s.id = m.body
"""


class Turns(NamedTuple):
    """The position in a destination: the last senders served, for new mail and for retries."""

    new: int
    retried: int
    step: int
    """The position of the next message in the cycle of new mail and retries."""


FIRST_TURN: Final = Turns(-1, -1, 0)


class Wanted(NamedTuple):
    """A request: up to `limit` messages of a destination, due at `now` (ms), not in `held`.

    Bodies larger than `body_bytes` stay in the file.
    """

    queue: str
    destination: str
    now: int
    limit: int
    held: Collection[int]
    turns: Turns
    body_bytes: int
    unsorted: bool


class Found(NamedTuple):
    """Rows with body lengths, whether more is due, and when the next becomes due (ms)."""

    rows: list[tuple[Row, int | None]]
    more: bool
    next_due: int | None
    turns: Turns


class _Lane:
    """The mail read from a lane. `done`: nothing else in the lane is due."""

    __slots__ = ("done", "number", "rows")

    def __init__(self, number: Any) -> None:
        self.number = number
        self.rows: list[tuple[Row, int | None]] = []
        self.done = False


def take(connection: apsw.Connection, wanted: Wanted) -> Found:
    """Read the wanted mail, up to `READ_BYTES`. Raises SQLite's errors."""
    return _Take(connection, wanted).run()


class _Take:
    def __init__(self, connection: apsw.Connection, wanted: Wanted) -> None:
        self._connection = connection
        self._wanted = wanted
        self._passed = array("q", wanted.held)
        self._left = READ_BYTES
        self._full = False

    def run(self) -> Found:
        wanted = self._wanted
        first = UNSORTED.lane if wanted.unsorted else 0
        found: list[Any] = self._connection.execute(
            LANES, (wanted.queue, wanted.destination, first, wanted.now)
        ).fetchall()
        times = [later for _, _, later in found if isinstance(later, int) and later < HELD]
        next_due = min(times, default=None)
        levels: dict[int, list[_Lane]] = {}
        for lane, due, _ in found:
            if due:
                # Damage may have left any value in a column.
                level = level_of(lane) if isinstance(lane, int) else 1 << 32
                levels.setdefault(level, []).append(_Lane(lane))
        rows: list[tuple[Row, int | None]] = []
        turns = wanted.turns
        for level in sorted(levels):
            if len(rows) >= wanted.limit or self._full:
                break
            more, turns = self._level(levels[level], wanted.limit - len(rows), turns)
            rows += more
        more_due = self._full or any(
            not lane.done and self._has_more(lane) for lane in chain.from_iterable(levels.values())
        )
        return Found(rows, more_due, next_due, turns)

    def _level(
        self, lanes: Sequence[_Lane], limit: int, turns: Turns
    ) -> tuple[list[tuple[Row, int | None]], Turns]:
        """Read from lanes of one priority."""
        new = _from(turns.new, [lane for lane in lanes if not is_retry(lane.number)])
        retried = _from(turns.retried, [lane for lane in lanes if is_retry(lane.number)])
        places = range(turns.step, turns.step + limit)
        for_retried = sum(place % CYCLE == CYCLE - 1 for place in places) if new else limit
        if not retried:
            for_retried = 0
        last_new, last_retried, step = turns
        got, last_new = self._fill(new, limit - for_retried, last_new)
        again, last_retried = self._fill(retried, limit - got, last_retried)
        if got + again < limit and not self._full:
            more, last_new = self._fill(new, limit - got - again, last_new)
            got += more
        rows: list[tuple[Row, int | None]] = []
        ones, others = iter(_in_turn(new)), iter(_in_turn(retried))
        while len(rows) < got + again:
            first, second = (others, ones) if step == CYCLE - 1 else (ones, others)
            row = next(first, None)
            rows.append(row if row is not None else next(second))
            step = (step + 1) % CYCLE
        # With one kind only, neither loses a turn.
        return rows, Turns(last_new, last_retried, step if new and retried else turns.step)

    def _fill(self, lanes: Sequence[_Lane], limit: int, last: int) -> tuple[int, int]:
        """Read up to `limit` messages from lanes in turn; return the number and the last sender."""
        got = 0
        while got < limit and not self._full:
            open_lanes = [lane for lane in lanes if not lane.done]
            if not open_lanes:
                break
            share = -((got - limit) // min(len(open_lanes), LANES_AT_A_TIME))
            for lane in open_lanes:
                found = self._read(lane, min(share, limit - got))
                if found:
                    got += found
                    last = sender(lane.number)
                if got >= limit or self._full:
                    break
        return got, last

    def _read(self, lane: _Lane, count: int) -> int:
        wanted = self._wanted
        found = 0
        place = (wanted.queue, wanted.destination, lane.number, wanted.now)
        cursor = self._connection.execute(
            READ, (*place, bind(self._passed), count, wanted.body_bytes)
        )
        read = []
        for *values, size in cursor:
            row = Row._make(values)
            memory = _length(row.properties) + _length(row.data)
            if memory > self._left and self._left < READ_BYTES:
                self._full = True
                break
            self._left -= memory
            read.append((row, size))
        cursor.close(True)
        found = len(read)
        lane.rows += sorted(read, key=_order)
        self._passed.extend(row.id for row, _ in read)
        lane.done = found < count and not self._full
        return found

    def _has_more(self, lane: _Lane) -> bool:
        wanted = self._wanted
        place = (wanted.queue, wanted.destination, lane.number, wanted.now)
        cursor = self._connection.execute(DUE, (*place, bind(self._passed), 1))
        return bool(cursor.fetchall())


def is_retry(lane: Any) -> bool:
    """Whether a lane has retries; damage may have left any value."""
    return isinstance(lane, int) and lane >= 0 and bool(lane & RETRY_LANE)


def _from(last: int, lanes: Sequence[_Lane]) -> list[_Lane]:
    """Lanes in turn, starting after the sender that was served last."""
    behind = [index for index, lane in enumerate(lanes) if sender(lane.number) > last]
    start = behind[0] if behind else 0
    return [*lanes[start:], *lanes[:start]]


def sender(lane: Any) -> int:
    """The number of a lane's sender within its priority."""
    return lane % SENDER_LANES if isinstance(lane, int) else 0


def _in_turn(lanes: Iterable[_Lane]) -> Iterable[tuple[Row, int | None]]:
    rounds = zip_longest(*(lane.rows for lane in lanes))
    return (row for round_ in rounds for row in round_ if row is not None)


def _length(value: object) -> int:
    return len(value) if isinstance(value, bytes | str) else 0


def _order(found: tuple[Row, int | None]) -> tuple[int, int]:
    row = found[0]
    return (row.due if isinstance(row.due, int) else 0, row.id)
