"""What the tests of queues share: a clock, runs of steps, and the SQL of files before layout 3."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from zlib import crc32

import apsw
import trio

from mailerq.message import encode_properties
from mailerq.queues.embedded.layout import APPLICATION_ID, PAGE_SIZE
from mailerq.queues.embedded.records import checksum

__all__ = ["Clock", "Old", "Run", "explore", "write_old_file"]


class Clock:
    """A wall clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class Run(Protocol):
    """A queue beside a model of it, which agree after each step."""

    async def open(self) -> None: ...
    async def step(self, step: tuple[Any, ...]) -> None: ...
    async def drain(self) -> None: ...
    async def close(self) -> None: ...


def explore(kind: Callable[[str], Run], steps: Sequence[tuple[Any, ...]]) -> None:
    """Take steps in a directory of their own, then empty the queue."""

    async def example() -> None:
        with tempfile.TemporaryDirectory() as directory:
            run = kind(directory)
            await run.open()
            try:
                for step in steps:
                    await run.step(step)
                await run.drain()
            finally:
                await run.close()

    trio.run(example)


SCHEMA = """
CREATE TABLE number (next INTEGER);
CREATE TABLE message (
    id INTEGER PRIMARY KEY, queue TEXT, due INTEGER,
    body INTEGER, body_crc INTEGER, crc INTEGER, properties BLOB);
CREATE INDEX message_due ON message (queue, due);
CREATE TABLE body (id INTEGER PRIMARY KEY, data BLOB);
CREATE TABLE shared (id INTEGER PRIMARY KEY, users INTEGER, data BLOB);
CREATE TRIGGER message_gone AFTER DELETE ON message WHEN old.body = 0
BEGIN
    DELETE FROM body WHERE id = old.id;
END;
CREATE TRIGGER message_share_gone AFTER DELETE ON message WHEN old.body > 0
BEGIN
    UPDATE shared SET users = users - 1 WHERE id = old.body;
    DELETE FROM shared WHERE id = old.body AND users <= 0;
END;
CREATE VIEW incoming (id, queue, due, body, body_crc, crc, properties, data)
    AS SELECT 0, 0, 0, 0, 0, 0, 0, 0;
"""
BODY = """
CREATE TRIGGER incoming_body INSTEAD OF INSERT ON incoming WHEN new.body = 0
BEGIN
    INSERT INTO body VALUES (new.id, new.data);
END;
"""
MESSAGE = """
CREATE TRIGGER incoming_message INSTEAD OF INSERT ON incoming WHEN new.queue IS NOT NULL
BEGIN
    INSERT INTO message VALUES
        (new.id, new.queue, new.due, new.body, new.body_crc, new.crc, new.properties);
END;
"""
REMOVAL = """
CREATE TRIGGER incoming_removal INSTEAD OF INSERT ON incoming WHEN new.queue IS NULL
BEGIN
    DELETE FROM message WHERE id = new.id;
END;
"""


class Old(NamedTuple):
    """A message of an old file. Those with the same `shared` number share a body."""

    queue: str
    due: float
    properties: dict[str, object]
    body: bytes | None
    shared: int = 0


def write_old_file(directory: Path, messages: Iterable[Old], *, layout: int = 2) -> None:
    """Write a file of layout 1 or 2, with numbers from 1 on."""
    directory.mkdir(parents=True, exist_ok=True)
    connection = apsw.Connection(str(directory / "queue.db"))
    connection.pragma("page_size", PAGE_SIZE)
    connection.pragma("journal_mode", "wal")
    connection.execute(SCHEMA + (BODY + MESSAGE + REMOVAL if layout == 2 else MESSAGE))
    connection.pragma("application_id", APPLICATION_ID)
    connection.pragma("user_version", layout)
    connection.execute("BEGIN")
    number = 0
    for number, old in enumerate(messages, start=1):
        properties = encode_properties(old.properties)
        reference = body_crc = None
        if old.body is not None:
            reference, body_crc = old.shared, crc32(old.body)
            if not reference:
                connection.execute("INSERT INTO body VALUES (?, ?)", (number, old.body))
            else:
                connection.execute(
                    "INSERT INTO shared VALUES (?, 1, ?) "
                    "ON CONFLICT (id) DO UPDATE SET users = users + 1",
                    (reference, old.body),
                )
        crc = checksum(number, old.queue, reference, body_crc, properties)
        connection.execute(
            "INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?)",
            (number, old.queue, int(old.due * 1000), reference, body_crc, crc, properties),
        )
    connection.execute("INSERT INTO number VALUES (?)", (number + 1,))
    connection.execute("COMMIT")
    connection.close()
