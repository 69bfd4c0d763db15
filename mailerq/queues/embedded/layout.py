"""The tables of a queue file, and the upgrade of files with an older layout.

A message is one row of ``message``: its queue, due time in milliseconds since 1970, properties as
JSON, and place in its queue. The body is stored apart, so that a retry rewrites only the small row.
It is in ``body`` under the number of the message, or, when one commit brings one `bytes` object for
several recipients, once in ``shared``, which counts its users. The column ``message.body`` says
which: NULL for no body, 0 for ``body``, else a number in ``shared``. Triggers keep these tables
consistent: every deletion is one statement on ``message``, and every insertion one on the view
``incoming``, except for large bodies, which the view would copy. A row of that view without a queue
is a deletion too.

Only the outbox is sorted by destination and lane (`mailerq.rules.destinations`). Rows of other
queues have the place `UNSORTED`. Unsorted rows of the outbox come from an older layout, from
a salvaged file, or from a time when another queue was the outbox. The running daemon sorts them
(`mailerq.queues.embedded.queue_file.QueueFile.sort_steps`). So an upgrade is a new index, and
rewrites no row.

The place follows from the properties, so no checksum covers it.

A message that an operator holds keeps its place. `HELD` is added to its due time, which makes the
message due in no time to come, and is subtracted again on release. So a hold rewrites no document,
survives a restart, and an older program leaves the message alone too.
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

__all__ = ["HELD", "LAYOUT", "PAGE_SIZE", "PLACES_LAYOUT", "UNSORTED", "prepare_file"]

logger = logging.getLogger("mailerq.queues")

APPLICATION_ID: Final = 0x4D51_5151
"""``MQQQ`` in the header of the file, for `file` and SQLite's own tools."""

LAYOUT: Final = 3
"""The file's ``user_version``. 1: no removals by ``incoming``. 2: no places."""

PLACES_LAYOUT: Final = 3
"""The first layout with places."""

PAGE_SIZE: Final = 8192
"""Three mails of 2 KiB fit in a page; in 4096 bytes only one, and half of the file is empty."""

HELD: Final = 1 << 60
"""Milliseconds added to the due time of a held message: 36 million years."""

UNSORTED: Final = Place("", -1)
"""The place of an unsorted row; real lanes are 0 or more."""

# The order determines the tree roots, also after a VACUUM, which puts indexes last.
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
"""Upgrades a file of layout 1 or 2. Its rows stay unchanged and get the defaults.

The old index is dropped first, so that the new one can reuse its pages."""

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
"""The view for insertions. A file of an older layout gets a new one: the view holds no data."""


def prepare_file(connection: apsw.Connection, path: str) -> None:
    """Create the tables of a new file, or upgrade an older one, in one commit.

    Raises `QueueError` for a foreign file or a newer layout, and SQLite's errors.
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
    """The layout of the file; 0 if empty. Raises `QueueError` for a foreign file."""
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
