"""The MTA-STS policies that have been fetched: durable, for all processes of a daemon.

A row has the policy of a domain as it was published, the ``id`` of the record at that time, and
what is known of failed fetches since. A fetch that fails leaves the policy alone. A checksum covers
the policy: a row that the disk has changed is no policy.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Final, NamedTuple, Self
from zlib import crc32

import apsw
import msgspec

from mailerq.message import format_time
from mailerq.rules.security import StsPolicy
from mailerq.rules.sts import Document, Wrong, parse_policy
from mailerq.store.database import Database

__all__ = ["FILE_NAME", "Entry", "Kept", "StsFile"]

FILE_NAME: Final = "sts-policies"

MAX_ROWS: Final = 100_000
MAX_BYTES: Final = 256 << 20
"""Policies, and bytes of their texts, that are kept. Beyond these the policies go that have
expired, and then those that were not used for the longest time."""

ROOM_EVERY: Final = 100
"""New policies between two looks at these bounds."""

UNUSED_SECONDS: Final = 180 * 86400.0
"""A policy for which there is no mail in this time is forgotten."""

EXPIRED_SECONDS: Final = 30 * 86400.0
"""How long an expired policy is shown, and asked for again."""

SCHEMA: Final = """
CREATE TABLE policies (
    domain TEXT NOT NULL PRIMARY KEY,
    id TEXT NOT NULL DEFAULT '',
    text BLOB NOT NULL DEFAULT x'',
    fetched REAL NOT NULL DEFAULT 0,
    expires REAL NOT NULL DEFAULT 0,
    sum INTEGER NOT NULL DEFAULT 0,
    used REAL NOT NULL DEFAULT 0,
    next REAL NOT NULL DEFAULT 0,
    failed_id TEXT NOT NULL DEFAULT '',
    failed REAL NOT NULL DEFAULT 0,
    problem TEXT NOT NULL DEFAULT ''
);
CREATE INDEX by_next ON policies (next);
CREATE INDEX by_used ON policies (used);
"""

COLUMNS: Final = "domain, id, text, fetched, expires, sum, used, next, failed_id, failed, problem"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a domain; times are seconds since 1970."""

    domain: str
    id: str = ""
    text: bytes = b""
    """The policy as it was published; empty if none was ever fetched."""
    fetched: float = 0.0
    expires: float = 0.0
    used: float = 0.0
    """When mail last asked for it, to a day."""
    next: float = 0.0
    """When to ask for it again without mail."""
    failed_id: str = ""
    """The ``id`` for which the last fetch failed, unless one has succeeded since."""
    failed: float = 0.0
    problem: str = ""

    @property
    def sum(self) -> int:
        """The checksum of the policy."""
        parts = (self.domain, self.id, repr(self.fetched), repr(self.expires))
        return crc32(self.text, crc32("\0".join(parts).encode()))


class Kept(NamedTuple):
    """What the file knows of a domain, and its policy in parts; None: not one, or damaged."""

    entry: Entry
    document: Document | None

    @classmethod
    def of(cls, entry: Entry) -> Self:
        """Read the policy of an entry; a large one takes some time."""
        document = parse_policy(entry.text) if entry.text else None
        return cls(entry, None if isinstance(document, Wrong) else document)

    def policy(self, now: float) -> StsPolicy | None:
        """The policy that is in force, of any mode."""
        if self.document is None or now >= self.entry.expires:
            return None
        return self.document.policy(self.entry.domain, self.entry.id)

    def describe(self, now: float) -> dict[str, Any]:
        """What is known, for programs; times as text."""
        entry, policy = self
        said: dict[str, Any] = {"domain": entry.domain}
        if entry.text:
            said |= {
                "id": entry.id,
                "mode": None if policy is None else str(policy.mode),
                "mx": [] if policy is None else list(policy.patterns),
                "max-age": None if policy is None else policy.max_age,
                "fetched": format_time(entry.fetched),
                "expires": format_time(entry.expires),
                "in-force": self.policy(now) is not None,
                "refresh": format_time(entry.next),
            }
        said["used"] = format_time(entry.used)
        if entry.problem:
            said["problem"] = {
                "id": entry.failed_id,
                "time": format_time(entry.failed),
                "text": entry.problem,
            }
        return said


class StsFile:
    """The file of a queue directory. One thread at a time may call the methods.

    All of them raise `StoreError`.
    """

    def __init__(
        self, directory: str, user: str = "", *, clock: Callable[[], float] = time.time
    ) -> None:
        path = os.path.join(directory, FILE_NAME)
        self._file = Database(
            path, SCHEMA, most_bytes=2 * MAX_BYTES, user=user, salvage=_salvage, clock=clock
        )
        self._clock = clock
        self._new = 0

    def get(self, domain: str) -> Entry | None:
        """What is known of a domain."""
        query = f"SELECT {COLUMNS} FROM policies WHERE domain = ?"
        return next(iter(self._found(query, (domain,))), None)

    def entries(self, after: str = "", limit: int = 1000) -> list[Entry]:
        """Some entries in the order of domains, behind a domain."""
        query = f"SELECT {COLUMNS} FROM policies WHERE domain > ? ORDER BY domain LIMIT ?"
        return self._found(query, (after, limit))

    def due(self, limit: int) -> list[Entry]:
        """Some policies to fetch again now, the most urgent first."""
        now = self._clock()
        query = (
            f"SELECT {COLUMNS} FROM policies WHERE next <= ? AND text <> x'' AND used > ? "
            "AND expires > ? ORDER BY next LIMIT ?"
        )
        values = (now, now - UNUSED_SECONDS, now - EXPIRED_SECONDS, limit)
        return self._found(query, values)

    def _found(self, query: str, values: tuple[float | str, ...]) -> list[Entry]:
        if self._file.is_missing:
            return []
        return [*_sound(self._file.read(lambda file: file.execute(query, values).fetchall()))]

    def keep(self, entry: Entry) -> None:
        """Keep a policy that was fetched, in place of the one before."""
        statement = (
            "INSERT INTO policies (domain, id, text, fetched, expires, sum, used, next) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (domain) DO UPDATE SET "
            "id = excluded.id, text = excluded.text, fetched = excluded.fetched, "
            "expires = excluded.expires, sum = excluded.sum, next = excluded.next, "
            "used = max(used, excluded.used), failed_id = '', failed = 0, problem = ''"
        )
        values = (
            entry.domain, entry.id, entry.text, entry.fetched, entry.expires, entry.sum,
            entry.used, entry.next,
        )  # fmt: skip

        def work(file: apsw.Connection) -> None:
            if self._new % ROOM_EVERY == 0:
                _make_room(file, self._clock())
            file.execute(statement, values)

        self._file.write(work)
        self._new += 1

    def failed(self, domain: str, number: str, problem: str, next_time: float) -> None:
        """Note that the policy with an ``id`` could not be fetched now; what is there stays."""
        now = self._clock()
        statement = (
            "INSERT INTO policies (domain, failed_id, failed, problem, next, used) "
            "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (domain) DO UPDATE SET "
            "failed_id = excluded.failed_id, failed = excluded.failed, "
            "problem = excluded.problem, next = excluded.next"
        )
        values = (domain, number, now, problem, next_time, now)

        def work(file: apsw.Connection) -> None:
            if self._new % ROOM_EVERY == 0:
                _make_room(file, now)
            file.execute(statement, values)

        self._file.write(work)
        self._new += 1

    def use(self, domain: str) -> None:
        """Note that mail has used the policy."""
        statement = "UPDATE policies SET used = ? WHERE domain = ?"
        self._file.write(lambda file: file.execute(statement, (self._clock(), domain)))

    def postpone(self, domain: str, next_time: float) -> None:
        """Ask for the policy again at another time."""
        statement = "UPDATE policies SET next = ? WHERE domain = ?"
        self._file.write(lambda file: file.execute(statement, (next_time, domain)))

    def remove(self, domain: str | None) -> int:
        """Remove the row of a domain, or all; returns how many there were."""
        if self._file.is_missing:
            return 0

        def work(file: apsw.Connection) -> int:
            if domain is None:
                file.execute("DELETE FROM policies")
            else:
                file.execute("DELETE FROM policies WHERE domain = ?", (domain,))
            return file.changes()

        return self._file.write(work)

    def forget(self) -> int:
        """Remove what is of no use any more; returns how many rows that were."""
        if self._file.is_missing:
            return 0
        return self._file.write(lambda file: _make_room(file, self._clock()))

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        self._file.close()


def _sound(rows: Iterable[Any]) -> Iterator[Entry]:
    """The rows whose policy is as it was written."""
    for domain, number, text, fetched, expires, check, used, next_time, *failure in rows:
        failed_id, failed, problem = failure
        entry = Entry(
            domain=domain, id=number, text=text, fetched=fetched, expires=expires, used=used,
            next=next_time, failed_id=failed_id, failed=failed, problem=problem,
        )  # fmt: skip
        if not text or entry.sum == check:
            yield entry


def _make_room(file: apsw.Connection, now: float) -> int:
    """Drop what is of no use, and keep the bounds."""
    file.execute(
        "DELETE FROM policies WHERE used < ? OR (text = x'' AND failed < ?) "
        "OR (text <> x'' AND expires < ?)",
        (now - UNUSED_SECONDS, now - 86400.0, now - EXPIRED_SECONDS),
    )
    dropped = file.changes()
    while True:
        ((rows, size),) = file.execute("SELECT count(*), total(length(text)) FROM policies")
        if rows <= MAX_ROWS and size <= MAX_BYTES:
            return dropped
        file.execute(
            "DELETE FROM policies WHERE domain IN "
            "(SELECT domain FROM policies ORDER BY expires > ?, used LIMIT ?)",
            (now, max(rows // 100, 1)),
        )
        dropped += file.changes()


def _salvage(old: apsw.Connection, new: apsw.Connection) -> int:
    """Copy the sound policies of a damaged file."""
    saved = 0
    for entry in _readable(old):
        new.execute(
            "INSERT OR IGNORE INTO policies "
            "(domain, id, text, fetched, expires, sum, used, next) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                entry.domain, entry.id, entry.text, entry.fetched, entry.expires,
                entry.sum, entry.used, entry.next,
            ),
        )  # fmt: skip
        saved += new.changes()
    return saved


def _readable(old: apsw.Connection) -> Iterator[Entry]:
    """The sound policies from both ends, up to what cannot be read."""
    for order in ("rowid", "rowid DESC"):
        with suppress(apsw.Error):
            rows = old.execute(f"SELECT {COLUMNS} FROM policies ORDER BY {order}")
            yield from (entry for entry in _sound(rows) if entry.text)
