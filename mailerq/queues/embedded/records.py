"""The records of a queue file, and the checksums that prove them.

Every row carries two checksums: one of its body, one of all the rest except due time and place.
They prove a record when it is read, and when it is found loose in a damaged file. Due times move
when the clock is set back, and the place follows from the properties; a wrong value in either loses
no mail.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Any, Final, NamedTuple
from zlib import crc32

import msgspec

from mailerq.address import queue_problem
from mailerq.errors import MessageError
from mailerq.message import (
    LAST_SECOND,
    Message,
    check_nesting,
    decode_properties,
    encode_properties,
)
from mailerq.queues.embedded.layout import UNSORTED
from mailerq.queues.interface import DAMAGED_QUEUE, Publication
from mailerq.rules.destinations import place_of

__all__ = [
    "Batch",
    "Insert",
    "Retry",
    "Row",
    "aside",
    "check",
    "checksum",
    "prepare",
    "proven",
    "share",
]

SHARED_SIZE: Final = 1024
"""A body of at least this many bytes with several users is stored once."""

MAX_SIZE: Final = 999_000_000
"""Bytes of one body or of one message's properties: SQLite's limit, less the rest of a row."""


class Row(NamedTuple):
    """A message in the file; damage may have left any value in any column."""

    id: int
    queue: Any
    due: Any
    body: Any
    body_crc: Any
    crc: Any
    properties: Any
    data: Any


class Insert:
    """A publication ready for the file. `QueueFile` fills in the fields after `size`.

    `since` is when the wait until `due` began, both in milliseconds; 0 if `due` is a date.
    """

    __slots__ = (
        "body", "body_crc", "destination", "due", "id", "lane", "message", "properties", "queue",
        "reference", "since", "size",
    )  # fmt: skip

    def __init__(
        self,
        message: Message,
        queue: str,
        due: int,
        destination: str,
        lane: int,
        properties: bytes,
        body: bytes | None,
        since: int = 0,
    ) -> None:
        self.message = message
        self.queue = queue
        self.due = due
        self.destination = destination
        self.lane = lane
        self.properties = properties
        self.body = body
        self.since = since
        self.size = len(properties) + (0 if body is None else len(body))
        self.id = 0
        self.reference: int | None = None
        self.body_crc: int | None = None

    def keep_wait(self, now: int) -> None:
        """Move `due` if the clock, which says `now` (ms), was set back after the wait began."""
        if self.since > now:
            self.due -= self.since - now
            self.since = now


class Retry(msgspec.Struct, eq=False):
    """New properties, due time and place for a message that keeps its number and its body.

    `insert` is the equivalent publication, used if the row has been deleted. `whole` is False if
    the body is only in the file; then a deleted row stays deleted. `queue` is where the row lies if
    the retry moves it.
    """

    id: int
    reference: int | None
    body_crc: int | None
    insert: Insert
    whole: bool = True
    queue: str = ""


class Batch(msgspec.Struct, eq=False):
    """One commit. `tight`: a retry only updates its due time, which takes no room."""

    inserts: list[Insert] = []
    retries: list[Retry] = []
    removals: list[int] = []
    tight: bool = False


def prepare(publication: Publication, now: float, outbox: str) -> Insert:
    """Encode and check a publication; `MessageError` names what no file can hold.

    Only the mail of the `outbox` is sorted by destination.
    """
    queue = publication.queue
    message = publication.message
    if (problem := queue_problem(queue)) is not None:
        raise MessageError(f"the queue name {ascii(queue)[:80]} {problem}")
    try:
        properties = encode_properties(message.properties)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise MessageError(f"not to be written as JSON: {error}") from None
    check_nesting(message.properties, properties)
    body = message.body
    if len(properties) > MAX_SIZE or (body is not None and len(body) > MAX_SIZE):
        raise MessageError(f"larger than {MAX_SIZE} bytes")
    due, since = publication.due, publication.since
    if due is None:
        due = since = now
    place = place_of(message.properties) if queue == outbox else UNSORTED
    at = int(min(max(0.0, due), LAST_SECOND) * 1000)
    return Insert(message, queue, at, *place, properties, body, int(since * 1000))


def checksum(
    number: int, queue: str, body: int | None, body_crc: int | None, properties: bytes
) -> int:
    """The checksum of a row, without due time and place."""
    head = f"{number} {queue} {body} {body_crc} "
    return crc32(properties, crc32(head.encode()))


def proven(row: Row) -> bool:
    """Whether a row, except its body, is as it was written."""
    number, queue, due, body, body_crc, crc, properties, _ = row
    return (
        isinstance(queue, str)
        and isinstance(due, int)
        and isinstance(properties, bytes)
        and checksum(number, queue, body, body_crc, properties) == crc
    )


def check(row: Row, loaded: bool = True) -> Message | str:
    """Decode an intact row; for any other, return what is wrong.

    A row that is not `loaded` was read without its body.
    """
    if not proven(row):
        return "the checksum of the properties does not fit"
    data = row.data
    if row.body is not None and loaded:
        if not isinstance(data, bytes):
            return "the body is missing"
        if crc32(data) != row.body_crc:
            return "the checksum of the body does not fit"
    try:
        return Message(decode_properties(row.properties), data)
    except MessageError as error:
        return str(error)


def aside(row: Row, reason: str) -> Publication:
    """Wrap the rest of a damaged row into a message for the queue `DAMAGED_QUEUE`."""
    properties, data = row.properties, row.data
    if isinstance(properties, str):
        properties = properties.encode(errors="surrogateescape")
    account = {
        "reason": reason,
        "id": row.id,
        "queue": row.queue if isinstance(row.queue, str) else repr(row.queue),
        "due": row.due if isinstance(row.due, int | float) else repr(row.due),
        "properties-base64": b64encode(bytes(properties or b"")).decode(),
    }
    if isinstance(data, str):
        data = data.encode(errors="surrogateescape")
    return Publication(
        DAMAGED_QUEUE, Message({"damaged": account}, data if isinstance(data, bytes) else None)
    )


def share(inserts: Sequence[Insert]) -> list[tuple[int, int, bytes]]:
    """Set in each insert where its body is stored; return the rows for ``shared``."""
    users: dict[int, list[Insert]] = {}
    for insert in inserts:
        if insert.body is None:
            insert.reference = insert.body_crc = None
        else:
            # Copying a short body is cheaper than sharing it; b"" is one object everywhere.
            key = id(insert.body) if len(insert.body) >= SHARED_SIZE else -insert.id
            users.setdefault(key, []).append(insert)
    shared: list[tuple[int, int, bytes]] = []
    for group in users.values():
        first = group[0]
        body = first.body
        assert body is not None
        crc = crc32(body)
        reference = 0
        if len(group) > 1:
            reference = first.id
            shared.append((reference, len(group), body))
        for insert in group:
            insert.reference = reference
            insert.body_crc = crc
    return shared
