"""The tables of a queue file, and how a file of an older layout is brought up to date.

A message is one row of ``message``: its queue, its due time in milliseconds since 1970, its
properties as JSON, and its place among the mail of its queue. Its body lies apart, so that a retry
rewrites the small row and never the body: in ``body`` under the number of the message, or, when one
commit brings the same `bytes` object for several recipients, once in ``shared``, which counts its
users. Column ``message.body`` tells which: NULL for no body, 0 for ``body``, else a number in
``shared``. Triggers keep these tables together: every deletion is one statement on ``message``, and
every insertion one on the view ``incoming``, but for large bodies, which it would copy. A row of
that view without a queue is a deletion too.

Only the outbox is sorted by destination and lane (`mailerq.rules.destinations`). Elsewhere all rows
have the place `UNSORTED`. Rows of the outbox that have it as well come from an older layout, from
a salvaged file, or from a time when another queue was the outbox; the daemon sorts these while it
runs (`mailerq.queues.embedded.queue_file.QueueFile.sort_steps`). So bringing a file up to date is
a new index, and no row is rewritten.

The place follows from the properties, so no checksum proves it.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any, Final

import apsw

from mailerq.errors import QueueError
from mailerq.queues.embedded.shares import first_number
from mailerq.rules.destinations import Place

__all__ = ["LAYOUT", "PAGE_SIZE", "PLACES_LAYOUT", "UNSORTED", "prepare_file"]

logger = logging.getLogger("mailerq.queues")

APPLICATION_ID: Final = 0x4D51_5151
"""``MQQQ`` in the header of the file: what `file` and SQLite's own tools see."""

LAYOUT: Final = 3
"""Kept as the file's ``user_version``. 1: no removals by ``incoming``. 2: no places."""

PLACES_LAYOUT: Final = 3
"""The first one with places."""

PAGE_SIZE: Final = 8192
"""Three mails of 2 KiB fit in a page; with 4096 it is one, and half of the file is air."""

UNSORTED: Final = Place("", -1)
"""The place of a row that is not sorted; all lanes are 0 or more."""

# The order tells where the trees begin, also after a VACUUM, which makes indexes last.
TABLES: Final = """
CREATE TABLE number (next INTEGER);
CREATE TABLE message (
    id INTEGER PRIMARY KEY, queue TEXT, due INTEGER,
    body INTEGER, body_crc INTEGER, crc INTEGER, properties BLOB,
    destination TEXT DEFAULT '', lane INTEGER DEFAULT -1);
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
"""

PLACES: Final = """
ALTER TABLE message ADD COLUMN destination TEXT DEFAULT '';
ALTER TABLE message ADD COLUMN lane INTEGER DEFAULT -1;
DROP INDEX message_due;
"""
"""What brings a file of layout 1 or 2 up to date. Its rows stay as they are and have the defaults.

The old index goes first: the new one can have its pages."""

INDEX: Final = """
CREATE INDEX message_place ON message (queue, destination, lane, due);
"""

INCOMING: Final = """
CREATE VIEW incoming (id, queue, due, body, body_crc, crc, properties, destination, lane, data)
    AS SELECT 0, 0, 0, 0, 0, 0, 0, 0, 0, 0;
CREATE TRIGGER incoming_body INSTEAD OF INSERT ON incoming WHEN new.body = 0
BEGIN
    INSERT INTO body VALUES (new.id, new.data);
END;
CREATE TRIGGER incoming_message INSTEAD OF INSERT ON incoming WHEN new.queue IS NOT NULL
BEGIN
    INSERT INTO message VALUES (
        new.id, new.queue, new.due, new.body, new.body_crc, new.crc, new.properties,
        new.destination, new.lane);
END;
CREATE TRIGGER incoming_removal INSTEAD OF INSERT ON incoming WHEN new.queue IS NULL
BEGIN
    DELETE FROM message WHERE id = new.id;
END;
"""
"""The way in. A file of an older layout gets it anew: it holds no data."""


def prepare_file(connection: apsw.Connection, path: str) -> None:
    """Make the tables of a new file, and bring an older one up to date, in one commit.

    Raises `QueueError` for a file that is not ours or is of a newer layout, and what SQLite raises.
    """
    if _layout(connection, path) == LAYOUT:
        return
    connection.pragma("page_size", PAGE_SIZE)
    connection.pragma("journal_mode", "wal")
    connection.execute("BEGIN IMMEDIATE")
    layout = _layout(connection, path)
    if layout != LAYOUT:  # else another process was faster
        if layout:
            _update(connection, path, layout)
        else:
            connection.execute(TABLES + INDEX)
            first = first_number(os.path.dirname(path))
            connection.execute("INSERT INTO number VALUES (?)", (first,))
            connection.pragma("application_id", APPLICATION_ID)
        connection.execute(INCOMING)
        connection.pragma("user_version", LAYOUT)
    connection.execute("COMMIT")


def _update(connection: apsw.Connection, path: str, layout: int) -> None:
    began = time.monotonic()
    logger.warning("%s: bringing it from layout %d to %d", path, layout, LAYOUT)
    connection.execute("DROP VIEW incoming")
    connection.execute(PLACES + INDEX)
    logger.warning("%s: its new index took %.1f s", path, time.monotonic() - began)


def _layout(connection: apsw.Connection, path: str) -> int:
    """The layout of the file, 0 of an empty one. Raises `QueueError` for what is not ours."""
    found: list[Any] = connection.execute(
        "SELECT user_version, application_id, (SELECT count(*) FROM sqlite_schema) "
        "FROM pragma_user_version, pragma_application_id"
    ).fetchall()
    version, application, tables = found[0]
    if tables and application != APPLICATION_ID:
        raise QueueError(f"{path}: is a database of another program")
    if version > LAYOUT:
        raise QueueError(
            f"{path}: written by a newer mailerq (layout {version}, this one reads "
            f"up to {LAYOUT}); install that one, or start with another directory"
        )
    return int(version)
