"""Reads a little mail of each of many destinations with two statements.

Theory of operation
-------------------
The SQLite module releases Python's lock around each step of a statement. While the loop is busy,
getting the lock back takes longer than reading a row. So two statements, each with a single row as
its result, serve all takes of a chunk. The first finds the numbers of the messages in the index.
The second reads the messages: all columns as one JSON array, all properties as one blob, and all
bodies as another.

Only plain mail is read this way: all due mail of the destination is in one lane, the properties are
short, and each column has its type. Everything else, damaged rows included, is left to
`mailerq.queues.embedded.taking`, which reads for a single take and knows the order of messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import apsw
import msgspec

from mailerq.queues.embedded import taking
from mailerq.queues.embedded.layout import HELD, UNSORTED
from mailerq.queues.embedded.records import Row
from mailerq.queues.embedded.sqlite_file import bind
from mailerq.queues.embedded.taking import Found, Turns, Wanted, is_retry, sender

__all__ = ["MAX_PART_BYTES", "chunk_of", "take_together"]

MAX_PART_BYTES: Final = 1 << 16
"""Bytes of the largest properties and the largest body that are read this way."""

MAX_LANES: Final = 8
"""Lanes of a destination that are looked at, on average."""

LANES: Final = f"""
WITH RECURSIVE lanes(number, destination, lane) AS (
    SELECT wanted.key, wanted.value, (
        SELECT m.lane FROM message m INDEXED BY message_place
        WHERE m.queue = ?1 AND m.destination = wanted.value AND m.lane >= ?3
        ORDER BY m.lane LIMIT 1)
    FROM json_each(?2) AS wanted
    UNION ALL
    SELECT number, destination, (
        SELECT m.lane FROM message m INDEXED BY message_place
        WHERE m.queue = ?1 AND m.destination = lanes.destination AND m.lane > lanes.lane
        ORDER BY m.lane LIMIT 1)
    FROM lanes WHERE lanes.lane IS NOT NULL
    LIMIT ?7
)
SELECT json_group_array(json_array(number, iif(typeof(lane) = 'blob', 'damaged', lane), json((
        SELECT json_group_array(id) FROM (
            SELECT m.id FROM message m INDEXED BY message_place
            WHERE m.queue = ?1 AND m.destination = lanes.destination AND m.lane = lanes.lane
                AND m.due <= ?4 AND m.id NOT IN (SELECT value FROM carray(?5))
            ORDER BY m.due, m.id LIMIT ?6))), (
        SELECT m.due FROM message m INDEXED BY message_place
        WHERE m.queue = ?1 AND m.destination = lanes.destination AND m.lane = lanes.lane
            AND m.due > ?4 AND m.due < {HELD}
        ORDER BY m.due LIMIT 1)))
FROM lanes
"""
"""The lanes of some destinations, each with its due messages and the time when more become due. The
last row of a destination has NULL as its lane. A blob is replaced, because SQLite would read some
blobs as its binary form of JSON."""

ROWS: Final = """
SELECT
    json_group_array(json_array(
        id, queue, due, body, body_crc, crc, size, octet_length(properties), octet_length(data),
        typeof(properties) = 'blob' AND typeof(data) IN ('blob', 'null') AND 'blob' NOT IN (
            typeof(queue), typeof(due), typeof(body), typeof(body_crc), typeof(crc)))),
    CAST(group_concat(properties, '') AS BLOB),
    CAST(group_concat(data, '') AS BLOB)
FROM (
    SELECT m.id, m.queue, m.due, m.body, m.body_crc, m.crc,
        iif(octet_length(m.properties) <= ?2, m.properties, NULL) AS properties,
        iif(octet_length(b.data) <= ?3, b.data, iif(octet_length(s.data) <= ?3, s.data, NULL))
            AS data,
        coalesce(octet_length(b.data), octet_length(s.data)) AS size
    FROM carray(?1) AS found
    CROSS JOIN message m NOT INDEXED ON m.id = found.value
    LEFT JOIN body b ON m.body = 0 AND b.id = m.id
    LEFT JOIN shared s ON m.body > 0 AND s.id = m.body
)
"""


class _Lane(msgspec.Struct, array_like=True, gc=False):
    """A lane with the number of its take; damage may have left any value in a column."""

    number: int
    lane: Any
    due: list[int]
    later: Any


class _Columns(msgspec.Struct, array_like=True, gc=False):
    """A row, with the lengths of its blobs in place of the blobs."""

    id: int
    queue: Any
    due: Any
    body: Any
    body_crc: Any
    crc: Any
    size: int | None
    properties: int | None
    data: int | None
    is_plain: int


_lanes: Final = msgspec.json.Decoder(list[_Lane])
_columns: Final = msgspec.json.Decoder(list[_Columns])


def chunk_of(wanted: Sequence[Wanted]) -> int:
    """Return how many of the first takes one call of `take_together` may serve; at least one."""
    rows = 0
    for count, each in enumerate(wanted):
        rows += each.limit
        if rows > _most_rows():
            return max(count, 1)
    return len(wanted)


def _most_rows() -> int:
    """The most messages of a chunk: together they have at most `READ_BYTES`, like a single take."""
    return taking.READ_BYTES // (2 * MAX_PART_BYTES)


def take_together(connection: apsw.Connection, wanted: Sequence[Wanted]) -> list[Found | None]:
    """Read for the takes of a chunk, all of one queue and each of another destination.

    None: read that take alone. Raises SQLite's errors, also for damaged rows, which a take that is
    read alone can report.
    """
    found: list[Found | None] = [None] * len(wanted)
    if sum(each.limit for each in wanted) > _most_rows():
        return found
    if any(each.body_bytes > MAX_PART_BYTES for each in wanted):
        return found
    plans = _plan(connection, wanted)
    numbers = [number for plan in plans if plan is not None for number in plan.rows]
    rows = _read(connection, numbers, min(each.body_bytes for each in wanted))
    for place, plan in enumerate(plans):
        if plan is None:
            continue
        read = [rows[number] for number in plan.rows if number in rows]
        if None in read:
            continue
        found[place] = Found(read, plan.more, plan.next_due, plan.turns)  # type: ignore[arg-type]
    return found


class _Plan(msgspec.Struct, gc=False):
    """What to read for a take, and the rest of its result."""

    rows: list[int]
    more: bool
    next_due: int | None
    turns: Turns


def _plan(connection: apsw.Connection, wanted: Sequence[Wanted]) -> list[_Plan | None]:
    """Choose the messages of each take; None where that needs the rules of the order."""
    first = wanted[0]
    keys = msgspec.json.encode([each.destination for each in wanted]).decode()
    held = {number for each in wanted for number in each.held}
    lowest = UNSORTED.lane if first.unsorted else 0
    most = max(each.limit for each in wanted) + 1
    steps = (1 + MAX_LANES) * len(wanted)
    values = (first.queue, keys, lowest, first.now, bind(held), most, steps)
    found: list[Any] = connection.execute(LANES, values).fetchall()
    ((text,),) = found
    complete = [False] * len(wanted)
    due: list[list[_Lane]] = [[] for _ in wanted]
    next_due: list[int | None] = [None] * len(wanted)
    for lane in _lanes.decode(text):
        number, later = lane.number, lane.later
        if lane.lane is None:
            complete[number] = True
        elif lane.due:
            due[number].append(lane)
        if isinstance(later, int):
            before = next_due[number]
            next_due[number] = later if before is None else min(before, later)
    plans: list[_Plan | None] = []
    for each, ended, with_mail, later in zip(wanted, complete, due, next_due, strict=True):
        if not ended or len(with_mail) > 1:
            plans.append(None)
        elif not with_mail:
            plans.append(_Plan([], False, later, each.turns))
        else:
            (lane,) = with_mail
            plan = None
            if isinstance(lane.lane, int):
                more, turns = len(lane.due) > each.limit, _turns(each.turns, lane.lane)
                plan = _Plan(lane.due[: each.limit], more, later, turns)
            plans.append(plan)
    return plans


def _turns(turns: Turns, lane: int) -> Turns:
    """The position after a read from one lane."""
    if is_retry(lane):
        return turns._replace(retried=sender(lane))
    return turns._replace(new=sender(lane))


def _read(
    connection: apsw.Connection, numbers: Sequence[int], body_bytes: int
) -> dict[int, tuple[Row, int | None] | None]:
    """Rows with the sizes of their bodies, by number; None for a row that is not plain."""
    if not numbers:
        return {}
    values = (bind(numbers), MAX_PART_BYTES, body_bytes)
    found: list[Any] = connection.execute(ROWS, values).fetchall()
    ((text, properties, bodies),) = found
    rows: dict[int, tuple[Row, int | None] | None] = {}
    start = body_start = 0
    for columns in _columns.decode(text):
        end, body_end = start + (columns.properties or 0), body_start + (columns.data or 0)
        if columns.is_plain:
            data = None if columns.data is None else bodies[body_start:body_end]
            row = Row(
                columns.id,
                columns.queue,
                columns.due,
                columns.body,
                columns.body_crc,
                columns.crc,
                properties[start:end],
                data,
            )
            rows[columns.id] = (row, columns.size)
        else:
            rows[columns.id] = None
        start, body_start = end, body_end
    return rows
