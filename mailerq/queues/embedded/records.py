"""What lies in the queue file for a message, and how it proves itself.

Every row carries two checksums, of its body and of all the rest but the due time. They prove
a record when it is read, and when it is found loose in a damaged file. The due time is moved
when the clock is set back, and nothing is lost when it is wrong.
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
from mailerq.queues.interface import DAMAGED_QUEUE, Publication

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
"""Bytes from which on a body with several users is stored once."""

MAX_SIZE: Final = 999_000_000
"""Bytes of one body or of one message's properties: SQLite's own limit, less a row's rest."""


class Row(NamedTuple):
    """A message as it lies in the file, where damage may have left any value in any column."""

    id: int
    queue: Any
    due: Any
    body: Any
    body_crc: Any
    crc: Any
    properties: Any
    data: Any


class Insert(msgspec.Struct, eq=False):
    """A publication made ready for the file. `Store` fills in what stands after `body`."""

    message: Message
    queue: str
    due: int
    properties: bytes
    body: bytes | None
    id: int = 0
    reference: int | None = None
    body_crc: int | None = None

    @property
    def size(self) -> int:
        return len(self.properties) + len(self.body or b"")


class Retry(msgspec.Struct, eq=False):
    """New properties and a new due time for a message that keeps its number and its body.

    `insert` is the same as a publication: it stands in when somebody deleted the row.
    """

    id: int
    reference: int | None
    body_crc: int | None
    insert: Insert


class Batch(msgspec.Struct, eq=False):
    """What goes into one commit. `tight`: retries get their due time only, which takes no room."""

    inserts: list[Insert] = []
    retries: list[Retry] = []
    removals: list[int] = []
    tight: bool = False


def prepare(publication: Publication, now: float) -> Insert:
    """Encode and check a publication; `MessageError` says what of it no file can hold."""
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
    due = now if publication.due is None else min(max(0.0, publication.due), LAST_SECOND)
    return Insert(message, queue, int(due * 1000), properties, body)


def checksum(
    number: int, queue: str, body: int | None, body_crc: int | None, properties: bytes
) -> int:
    """Prove a row: all of it but the due time, which is moved when the clock is set back."""
    head = f"{number} {queue} {body} {body_crc} "
    return crc32(properties, crc32(head.encode()))


def proven(row: Row) -> bool:
    """Whether all of a row but its body is as it was written."""
    number, queue, due, body, body_crc, crc, properties, _ = row
    return (
        isinstance(queue, str)
        and isinstance(due, int)
        and isinstance(properties, bytes)
        and checksum(number, queue, body, body_crc, properties) == crc
    )


def check(row: Row) -> Message | str:
    """Decode a row that is as it was written; otherwise say what is wrong with it."""
    if not proven(row):
        return "the checksum of the properties does not fit"
    data = row.data
    if row.body is not None:
        if not isinstance(data, bytes):
            return "the body is missing"
        if crc32(data) != row.body_crc:
            return "the checksum of the body does not fit"
    try:
        return Message(decode_properties(row.properties), data)
    except MessageError as error:
        return str(error)


def aside(row: Row, reason: str) -> Publication:
    """Wrap what is left of a damaged row into a message for the queue `DAMAGED_QUEUE`."""
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
    """Say in each insert where its body lies; the rows for ``shared`` are what comes back."""
    users: dict[int, list[Insert]] = {}
    for insert in inserts:
        if insert.body is None:
            insert.reference = insert.body_crc = None
        else:
            # A short body is cheaper to copy than to share; b"" is one object everywhere.
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
