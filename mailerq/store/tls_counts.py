"""Counts of TLS sessions by domain and day, and the reports that are due, for TLS-RPT.

All processes of a daemon add to the same rows. Counts are kept for some days, until the reports of
their day are sent or given up. Each row of a session has the policy that applied to it, as text.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import apsw

from mailerq.store.database import Database

__all__ = ["FILE_NAME", "MAX_REST_SECONDS", "Due", "Kind", "Session", "TlsCounts"]

FILE_NAME: Final = "tls-counts"

MAX_DOMAINS: Final = 100_000
"""Domains of a day that are counted; sessions with others are not."""

MAX_ROWS: Final = 100
"""Kinds of failure of a domain and day that are told apart; further ones have a row without details
of their own."""

DAY_SECONDS: Final = 86400

FIRST_REST_SECONDS: Final = 3 * DAY_SECONDS
MAX_REST_SECONDS: Final = 28 * DAY_SECONDS
"""How long a place that took no report gets none. The time doubles with each failure in a row, up
to the longest."""

MAX_RESTING: Final = 100_000
"""Places that took no report; beyond, the one that rests the shortest is forgotten."""

SCHEMA: Final = """
CREATE TABLE sessions (
    day INTEGER NOT NULL,
    domain TEXT NOT NULL,
    kind TEXT NOT NULL,
    policy TEXT NOT NULL,
    result TEXT NOT NULL,
    local_ip TEXT NOT NULL,
    host TEXT NOT NULL,
    helo TEXT NOT NULL,
    remote_ip TEXT NOT NULL,
    code TEXT NOT NULL,
    information TEXT NOT NULL,
    count INTEGER NOT NULL,
    PRIMARY KEY (day, domain, kind, policy, result, local_ip, host, helo, remote_ip, code,
        information)
) WITHOUT ROWID;
CREATE TABLE reports (
    day INTEGER NOT NULL,
    domain TEXT NOT NULL,
    place TEXT NOT NULL,
    number TEXT NOT NULL DEFAULT '',
    next REAL NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL DEFAULT 'waiting',
    problem TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (day, domain, place)
) WITHOUT ROWID;
CREATE INDEX by_next ON reports (state, next);
CREATE TABLE resting (
    place TEXT PRIMARY KEY,
    until REAL NOT NULL,
    failures INTEGER NOT NULL,
    problem TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX by_until ON resting (until);
"""


class Session(NamedTuple):
    """What is counted together. `policy` is text of the caller; `result` is empty for a success."""

    domain: str
    kind: str
    policy: str
    result: str = ""
    local_ip: str = ""
    host: str = ""
    helo: str = ""
    remote_ip: str = ""
    code: str = ""
    information: str = ""

    @property
    def bare(self) -> Session:
        """The session without the details of its failure."""
        return Session(self.domain, self.kind, self.policy, self.result)


class Due(NamedTuple):
    """A report to send now. An empty `place` stands for the question where reports are wanted."""

    day: int
    domain: str
    place: str
    number: str
    tries: int


class Kind(NamedTuple):
    """A row for people: a report, its state and its last problem; `next` is a time."""

    day: int
    domain: str
    place: str
    state: str
    tries: int
    next: float
    problem: str


class TlsCounts:
    """The file of a queue directory. One thread at a time may call the methods.

    A day is its first second since 1970. All methods raise `StoreError`.
    """

    def __init__(
        self, directory: str, user: str = "", *, clock: Callable[[], float] = time.time
    ) -> None:
        path = os.path.join(directory, FILE_NAME)
        self._file = Database(path, SCHEMA, user=user, clock=clock)

    # Counting

    def add(self, counts: Mapping[tuple[int, Session], int]) -> int:
        """Add sessions by day; returns how many were not counted, beyond the bounds."""

        def work(file: apsw.Connection) -> int:
            lost = 0
            domains = {day: _domains(file, day) for day, _ in counts}
            for (day, session), count in counts.items():
                rows = _rows(file, day, session.domain)
                if not rows:
                    domains[day] += 1
                if domains[day] > MAX_DOMAINS or rows > 2 * MAX_ROWS:
                    lost += count
                    continue
                if rows >= MAX_ROWS and not _is_known(file, day, session):
                    session = session.bare
                file.execute(
                    "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
                    " ON CONFLICT DO UPDATE SET count = count + excluded.count",
                    (day, *session, count),
                )
            return lost

        return self._file.write(work)

    def days(self) -> list[int]:
        """The days with sessions, the oldest first."""
        query = "SELECT DISTINCT day FROM sessions ORDER BY day"
        return [day for (day,) in self._rows(query, ())]

    def domains(self, day: int, after: str = "", limit: int = 1000) -> list[str]:
        """Some domains with sessions on a day, in their order, behind a domain."""
        query = (
            "SELECT DISTINCT domain FROM sessions WHERE day = ? AND domain > ? "
            "ORDER BY domain LIMIT ?"
        )
        found: list[Any] = self._file.read(
            lambda file: file.execute(query, (day, after, limit)).fetchall()
        )
        return [domain for (domain,) in found]

    def sessions(self, day: int, domain: str) -> list[tuple[Session, int]]:
        """The sessions of a domain on a day."""
        query = (
            "SELECT domain, kind, policy, result, local_ip, host, helo, remote_ip, code, "
            "information, count FROM sessions WHERE day = ? AND domain = ?"
        )
        found: list[Any] = self._file.read(
            lambda file: file.execute(query, (day, domain)).fetchall()
        )
        return [(Session(*values), count) for *values, count in found]

    # Reports

    def plan(self, before: int, first: int, spread: int) -> int:
        """Have the domains of all days before one asked where they want reports.

        That is due `first` seconds after the end of the day, and up to `spread` seconds later, at
        another time for each domain. Returns how many domains are new.
        """
        statement = (
            "INSERT OR IGNORE INTO reports (day, domain, place, next) "
            "SELECT DISTINCT day, domain, '', day + ? + abs(random() % ?) FROM sessions "
            "WHERE day < ?"
        )

        if self._file.is_missing:
            return 0

        def work(file: apsw.Connection) -> int:
            file.execute(statement, (DAY_SECONDS + first, spread, before))
            return file.changes()

        return self._file.write(work)

    def due(self, now: float, limit: int) -> list[Due]:
        """Some reports that are due."""
        query = (
            "SELECT day, domain, place, number, tries FROM reports "
            "WHERE state = 'waiting' AND next <= ? ORDER BY next LIMIT ?"
        )
        found: list[Any] = self._file.read(
            lambda file: file.execute(query, (now, limit)).fetchall()
        )
        return [Due(*values) for values in found]

    def wanted(self, due: Due, places: Mapping[str, str], now: float) -> None:
        """A domain wants its report at these places, each with an id; at none: it wants none."""

        def work(file: apsw.Connection) -> None:
            _end(file, due, "asked" if places else "unwanted", "")
            for place, number in places.items():
                file.execute(
                    "INSERT OR IGNORE INTO reports (day, domain, place, number, next) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (due.day, due.domain, place, number, now),
                )

        self._file.write(work)

    def done(self, due: Due, state: str, problem: str = "") -> None:
        """A report has ended: sent, or not to be sent."""
        self._file.write(lambda file: _end(file, due, state, problem))

    def again(self, due: Due, next_time: float, problem: str) -> None:
        """Try a report again later."""
        statement = (
            "UPDATE reports SET next = ?, tries = tries + 1, problem = ? "
            "WHERE day = ? AND domain = ? AND place = ?"
        )
        values = (next_time, problem, due.day, due.domain, due.place)
        self._file.write(lambda file: file.execute(statement, values))

    def hurry(self, now: float, day: int, domain: str = "") -> int:
        """Make the reports of a day due now, of one domain or of all; returns how many.

        Those of one domain that were not sent are due again, also to places that rest.
        """
        if self._file.is_missing:
            return 0

        def work(file: apsw.Connection) -> int:
            if not domain:
                statement = "UPDATE reports SET next = ? WHERE state = 'waiting' AND day = ?"
                file.execute(statement, (now, day))
                return file.changes()
            file.execute(
                "DELETE FROM resting WHERE place IN "
                "(SELECT place FROM reports WHERE day = ? AND domain = ?)",
                (day, domain),
            )
            file.execute(
                "UPDATE reports SET next = ?, state = 'waiting' "
                "WHERE state IN ('waiting', 'unsent') AND day = ? AND domain = ?",
                (now, day, domain),
            )
            return file.changes()

        return self._file.write(work)

    # Places

    def ended(self, reports: Mapping[str, str], now: float) -> None:
        """What became of reports by place: an empty text if it took one, or else the problem.

        Another failure does not prolong a rest.
        """

        def work(file: apsw.Connection) -> None:
            for place, problem in reports.items():
                if problem:
                    _rest(file, place, problem, now)
                else:
                    file.execute("DELETE FROM resting WHERE place = ?", (place,))
            file.execute(
                "DELETE FROM resting WHERE place IN (SELECT place FROM resting "
                "ORDER BY until DESC LIMIT -1 OFFSET ?)",
                (MAX_RESTING,),
            )

        if self._file.is_missing and not any(reports.values()):
            return
        self._file.write(work)

    def resting(self, place: str, now: float) -> tuple[float, str] | None:
        """Until when a place gets no reports, and why; None if it gets them."""
        query = "SELECT until, problem FROM resting WHERE place = ? AND until > ?"
        for until, problem in self._rows(query, (place, now)):
            return until, problem
        return None

    def reports(self, limit: int) -> list[Kind]:
        """The last reports, the newest day first."""
        query = (
            "SELECT day, domain, place, state, tries, next, problem FROM reports "
            "WHERE place <> '' OR state = 'waiting' ORDER BY day DESC, domain, place LIMIT ?"
        )
        found = self._rows(query, (limit,))
        return [Kind(*values) for values in found]

    def forget(self, before: float) -> None:
        """Drop the days that ended before a time, with their reports, and old rests."""
        if self._file.is_missing:
            return

        def work(file: apsw.Connection) -> None:
            for table in ("sessions", "reports"):
                file.execute(f"DELETE FROM {table} WHERE day + ? < ?", (DAY_SECONDS, before))
            # A failure that comes so long after the rest counts as a first one.
            file.execute("DELETE FROM resting WHERE until + ? < ?", (MAX_REST_SECONDS, before))

        self._file.write(work)

    def _rows(self, query: str, values: tuple[float | str, ...]) -> list[Any]:
        if self._file.is_missing:
            return []
        return self._file.read(lambda file: file.execute(query, values).fetchall())

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        self._file.close()


def _end(file: apsw.Connection, due: Due, state: str, problem: str) -> None:
    file.execute(
        "UPDATE reports SET state = ?, problem = ? WHERE day = ? AND domain = ? AND place = ?",
        (state, problem, due.day, due.domain, due.place),
    )


def _rest(file: apsw.Connection, place: str, problem: str, now: float) -> None:
    query = "SELECT until, failures FROM resting WHERE place = ?"
    found: list[Any] = file.execute(query, (place,)).fetchall()
    until, failures = found[0] if found else (0.0, 0)
    if until > now:
        return
    seconds = min(FIRST_REST_SECONDS * 2 ** min(failures, 10), MAX_REST_SECONDS)
    file.execute(
        "INSERT OR REPLACE INTO resting VALUES (?, ?, ?, ?)",
        (place, now + seconds, failures + 1, problem),
    )


def _domains(file: apsw.Connection, day: int) -> int:
    query = "SELECT count(DISTINCT domain) FROM sessions WHERE day = ?"
    ((domains,),) = file.execute(query, (day,))
    return int(domains)


def _rows(file: apsw.Connection, day: int, domain: str) -> int:
    query = "SELECT count(*) FROM sessions WHERE day = ? AND domain = ?"
    ((rows,),) = file.execute(query, (day, domain))
    return int(rows)


def _is_known(file: apsw.Connection, day: int, session: Session) -> bool:
    query = (
        "SELECT 1 FROM sessions WHERE (day, domain, kind, policy, result, local_ip, host, helo,"
        " remote_ip, code, information) = (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    )
    return bool(file.execute(query, (day, *session)).fetchall())
