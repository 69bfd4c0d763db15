"""The file of the operator's rows: durable, for several processes, readable while it is written.

Theory of operation
-------------------
The file `FILE_NAME` in the queue directory has a change on each line, in JSON behind a checksum.
Writers hold a lock on the file and append; a change is synced before the caller hears of it.
Readers take no lock: they read complete lines from where they stopped (`follow`). When many lines
are out of date, a writer replaces the file, and readers read the new one from its start.

A writer takes back the lines of a change that the disk did not take, and a reader may have read
them, while other lines are in their place already. So a reader compares the last line that it has
read with the file, and reads all again if that line is not there any more.

A line that was not written to its end was not confirmed to anybody, and is dropped. If another line
is damaged, the next writer keeps a copy of the file beside it, says so in the log, and writes
a file of the lines that are sound. Of a damaged line the suppressed addresses that can still be
read stay suppressed: mail that was kept back can be sent later, and not the other way round.

Rows that a cluster shares are changes in lines of their own (`mailerq.rules.shared_rows`): those
made here get the next version, those of others come by `merge`.

Each change is also a line of `AUDIT_NAME`, before it is made: who, when, why. The line of a change
that the disk did not take is taken back. That file may be renamed or emptied at any time.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final
from zlib import crc32

import msgspec

from mailerq.errors import RowError
from mailerq.locks import FileLock, Held
from mailerq.message import format_time
from mailerq.privileges import as_owner
from mailerq.rules.row import SUPPRESSED, SUPPRESSION, Row, checked, suppressible
from mailerq.rules.shared_rows import (
    FIRST_ID,
    LAST_ID,
    MAX_VALUES,
    Change,
    checked_change,
    is_shared,
)
from mailerq.store.table import VERSION, Line, Table, lines_of

__all__ = ["AUDIT_NAME", "FILE_NAME", "RowFile"]

log = logging.getLogger("mailerq")

FILE_NAME: Final = "rows"
AUDIT_NAME: Final = "rows.audit"

MAX_ROWS: Final = 10_000
"""Rows that are not suppressions."""

MAX_SUPPRESSED: Final = 2_000_000
"""Suppressed addresses and domains."""

READ_BYTES: Final = 1 << 16
"""Bytes that `follow` reads at a time: some milliseconds of work."""

LOCK_SECONDS: Final = 10.0
LOCK_AGAIN_SECONDS: Final = 0.01

SPARE_LINES: Final = 1000
"""Lines that may be out of date before the file is replaced, beside as many as are needed."""

SKIPPED_IDS: Final = 1000
"""Ids that are not used after damage: mail may still wait for a pause that cannot be read."""

COMPLAIN_SECONDS: Final = 60.0
"""Between lines of the log about rows of others that cannot be used: there may be many."""

MAX_LEAP: Final = 1 << 32
"""A version that is so much later than all seen is a mistake."""

AUDITED_VALUES: Final = 10
"""Suppressed addresses that a line of the audit file names; it has their number too."""

MODE: Final = 0o640

VALUES: Final = b'"values":['
_find_id: Final = re.compile(rb'"id":([0-9]{1,12})').search
_find_words: Final = re.compile(rb'"([^"\\\x00-\x20]{3,254})"').findall

_decode: Final = msgspec.json.Decoder(Line).decode
_encode: Final = msgspec.json.Encoder().encode


class RowFile:
    """The rows of a queue directory. One thread at a time may call the methods."""

    def __init__(
        self,
        directory: str,
        user: str = "",
        *,
        clock: Callable[[], float] = time.time,
        server: str = "",
    ) -> None:
        """Root acts as the owner of the directory, or as `user` if that is root.

        `server` is the name of this instance in changes of rows that a cluster shares.
        """
        self.table = Table()
        self.damaged = 0
        """Lines that cannot be read."""
        self._directory = directory
        self._path = os.path.join(directory, FILE_NAME)
        self._user = user
        self._clock = clock
        self._server = server
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._lines = 0
        self._last = b""  # the last line that was read
        self._changed = 0  # when the file last changed, in nanoseconds of its own clock
        self._unusable = 0  # changes of others, since the log told of some
        self._complained = -math.inf
        self._next: RowFile | None = None  # reads a file that has replaced this one

    # Reading

    def read(self) -> Table:
        """Read all that there is, and drop what is over. Raises `RowError` and `OSError`."""
        while self.follow():
            pass
        self.table.expire(self._clock())
        return self.table

    def is_behind(self) -> bool:
        """Whether there is something to read. Raises `OSError`."""
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return self._identity is not None
        return (
            self._clock() < self.table.last_end
            or (found.st_dev, found.st_ino) != self._identity
            or found.st_size != self._offset
            or found.st_mtime_ns != self._changed
        )

    def follow(self) -> bool:
        """Read some of what was written since the last call; whether there may be more.

        While a file that replaces this one is read, `table` stays as it was. Raises `RowError` and
        `OSError`.
        """
        try:
            file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            if self._identity is not None:
                self._take_over(
                    RowFile(self._directory, self._user, clock=self._clock, server=self._server)
                )
            return False
        try:
            found = os.fstat(file)
            identity = found.st_dev, found.st_ino
            if self._identity is None:
                self._identity = identity
            self._changed = found.st_mtime_ns
            # The clock may have been set back before the end of a row that was dropped.
            early = self._clock() < self.table.last_end
            if self._next or early or identity != self._identity or self._was_cut(file):
                other = self._next
                if other is None or other._identity not in (None, identity) or other._was_cut(file):
                    other = RowFile(
                        self._directory, self._user, clock=self._clock, server=self._server
                    )
                self._next, other._changed = other, found.st_mtime_ns
                if other._read_some(file, identity):
                    return True
                self._take_over(other)
                return False
            return self._read_some(file, identity)
        finally:
            os.close(file)

    def _was_cut(self, file: int) -> bool:
        """Whether the last line that was read is not in its place any more."""
        start = self._offset - len(self._last)
        return os.pread(file, len(self._last), start) != self._last

    def _take_over(self, other: RowFile) -> None:
        if self._lines and not other._lines:
            log.error("%s is gone or empty: there are no rows any more", self._path)
        self.table, self.damaged = other.table, other.damaged
        self._identity, self._offset, self._lines = other._identity, other._offset, other._lines
        self._last, self._changed = other._last, other._changed
        self._next = None

    def _read_some(self, file: int, identity: tuple[int, int]) -> bool:
        self._identity = identity
        data = os.pread(file, READ_BYTES, self._offset)
        end = data.rfind(b"\n") + 1
        size = READ_BYTES
        while not end and len(data) == size:  # a long line
            size *= 2
            data = os.pread(file, size, self._offset)
            end = data.rfind(b"\n") + 1
        if not end:
            return False
        for text in data[: end - 1].split(b"\n"):
            line = _parse(text)
            if line is None:
                self.damaged += 1
                self._save(text)
            elif line.version > VERSION:
                raise RowError(f"{self._path}: a newer mailerq has written this file")
            else:
                self.table.apply(line)
            self._lines += 1
        self._offset += end
        self._last = _last_line(data[:end])
        return True

    def _save(self, text: bytes) -> None:
        """Apply what a damaged line suppresses."""
        row, values = _salvaged(text)
        if row is not None:
            found = self.table.get(row.id) or row
            if is_shared(row.id):
                # Not all of the change is known, so the suppression stays with this instance.
                found = msgspec.structs.replace(found, id=self.table.next_id)
            if found.kind == SUPPRESSION:
                self.table.apply(Line(row=found, values=values))

    @property
    def is_lost(self) -> bool:
        """Whether there is nothing, although the audit file tells of rows. Raises `OSError`."""
        if self._lines:
            return False
        try:
            return os.stat(os.path.join(self._directory, AUDIT_NAME)).st_size > 0
        except FileNotFoundError:
            return False

    # Changes

    def add(self, row: Row, values: Iterable[str] = (), *, who: str, shared: bool = False) -> Row:
        """Add a row, and return it with its id. A suppression has `values`, by `suppressible`.

        A `shared` row is for all instances of the cluster. Raises `RowError` and `OSError`, as all
        changes do; nothing is changed then.
        """
        names = list(dict.fromkeys(values))
        now = self._clock()
        with self._locked() as file:
            number = self._shared_id() if shared else self.table.next_id
            row = checked(msgspec.structs.replace(row, id=number, who=who, since=row.since or now))
            self._check_room(row, names)
            if shared:
                parts = [names[i : i + MAX_VALUES] for i in range(0, len(names), MAX_VALUES)]
                lines = [
                    self._shared_line(who, row.reason, row=row, values=tuple(part))
                    for part in parts or [[]]
                ]
            else:
                lines = list(lines_of(row, names))
            self._write(file, lines, who, "add", row.reason, row=row, values=names)
        return row

    def _check_room(
        self, row: Row, names: Sequence[str], rows: int = 0, suppressed: int = 0
    ) -> None:
        """Raise `RowError` if there are too many; some more are about to be added."""
        if row.kind == SUPPRESSION:
            new = len(names)
            if self.table.suppressed + suppressed + new > MAX_SUPPRESSED:
                new = sum(
                    value not in self.table.addresses and value not in self.table.domains
                    for value in names
                )
            if self.table.suppressed + suppressed + new > MAX_SUPPRESSED:
                raise RowError(f"more than {MAX_SUPPRESSED} addresses cannot be suppressed")
        elif row.id not in self.table.rows and len(self.table.rows) + rows >= MAX_ROWS:
            raise RowError(f"there are {MAX_ROWS} rows, which is the most")

    # Rows that a cluster shares

    def _shared_id(self) -> int:
        while True:
            number = FIRST_ID + secrets.randbelow(LAST_ID - FIRST_ID + 1)
            if number not in self.table.shared.rows and number not in self.table.shared.dead:
                return number

    def _shared_line(self, who: str, why: str, **parts: Any) -> Line:
        """A line for a change of this instance; one command may write several."""
        if not self._server:
            raise RowError("the row belongs to a cluster, and there is none: set cluster-address")
        version = self.table.shared.version + 1
        change = Change(version=version, server=self._server, who=who, why=why, **parts)
        return Line(change=change)

    def merge(self, changes: Iterable[Change]) -> int:
        """Take in changes of other instances; returns how many were news.

        Each is durable, with a line of the audit file that names the instance. The log tells of
        some that cannot be taken in. Raises `RowError` and `OSError` if the file cannot be written.
        """
        lines: list[Line] = []
        documents: list[dict[str, Any]] = []
        added: set[int] = set()
        suppressed, problem = 0, ""
        with self._locked() as file:
            for change in changes:
                try:
                    change = checked_change(change)
                    if not self._is_news(change):
                        continue
                    row = change.row
                    if row is not None and (change.values or row.id not in added):
                        self._check_room(row, change.values, len(added), suppressed)
                except (RowError, UnicodeError) as error:
                    self._unusable += 1
                    problem = f"of instance {change.server[:100]!a}: {error}"
                    continue
                lines.append(Line(change=change))
                documents.append(self._audit_of(change, added))
                suppressed += len(change.values)
                if row is not None and row.id not in self.table.shared.rows:
                    added.add(row.id)
            if lines:
                with self._audited(*documents):
                    self._append(file, lines)
        if problem and not 0 <= self._clock() - self._complained < COMPLAIN_SECONDS:
            log.error("%d rows cannot be used, the last one %s", self._unusable, problem)
            self._complained, self._unusable = self._clock(), 0
        return len(lines)

    def _audit_of(self, change: Change, added: Collection[int]) -> dict[str, Any]:
        """The line of the audit file for a change of another instance; `added` were just added."""
        action = "remove" if change.end or change.free else "add"
        row = change.row
        known = row is not None and (row.id in self.table.shared.rows or row.id in added)
        if known and not change.values:
            action = "change"
        rows = [found for number in change.end if (found := self.table.get(number))]
        every = [row] if row is not None else rows
        document = self._document(
            change.who, action, change.why, every, change.values or change.free
        )
        document["server"] = change.server
        return document

    def _is_news(self, change: Change) -> bool:
        """Whether a change has any effect, now or on changes that come later."""
        shared, row = self.table.shared, change.row
        if change.version > shared.version + MAX_LEAP:
            raise RowError(f"version {change.version} is far ahead of {shared.version}")
        if row is not None and row.is_over(self._clock()) and row.id not in shared.rows:
            return False
        return shared.is_news(change)

    def end(self, ids: Collection[int], *, who: str, why: str = "") -> list[Row]:
        """End rows; returns those that there were."""
        with self._locked() as file:
            found = [row for number in ids if (row := self.table.get(number)) is not None]
            if found:
                lines = []
                if own := [row.id for row in found if not is_shared(row.id)]:
                    lines.append(Line(end=own))
                every = [row.id for row in found if is_shared(row.id)]
                for start in range(0, len(every), MAX_VALUES):
                    part = tuple(every[start : start + MAX_VALUES])
                    lines.append(self._shared_line(who, why, end=part))
                self._write(file, lines, who, "remove", why, rows=found)
        return found

    def free(self, values: Iterable[str], *, who: str, why: str = "") -> list[str]:
        """End the suppression of addresses and domains; returns those that were suppressed."""
        with self._locked() as file:
            found = [
                value
                for value in dict.fromkeys(values)
                if value in self.table.addresses or value in self.table.domains
            ]
            if found:
                every = {value for value in found if self.table.shared.is_suppressing(value)}
                own = [value for value in found if value not in every]
                named = [value for value in found if value in every]
                lines = [Line(free=own[start : start + 1000]) for start in range(0, len(own), 1000)]
                lines += [
                    self._shared_line(who, why, free=tuple(named[start : start + MAX_VALUES]))
                    for start in range(0, len(named), MAX_VALUES)
                ]
                self._write(file, lines, who, "remove", why, values=found)
        return found

    def change(self, number: int, *, who: str, why: str = "", **parts: Any) -> Row | None:
        """Change parts of a row that are not its scope, such as `until`; returns the row, or None.

        The `hits` given are those that the row has from now on.
        """
        with self._locked() as file:
            found = self.table.get(number)
            if found is None:
                return None
            row = checked(msgspec.structs.replace(self.table.shown(found), **parts))
            line = Line(row=row)
            if is_shared(number):
                line = self._shared_line(who, why, row=msgspec.structs.replace(row, hits=0))
            self._write(file, [line], who, "change", why, row=row)
        return row

    def note(self, hits: Mapping[int, int]) -> None:
        """Add to the hits of rows. They are not synced, and no line of the audit file."""
        with self._locked() as file:
            known = {number: more for number, more in hits.items() if self.table.get(number)}
            if known:
                self._append(file, [Line(hits=known)], sync=False)

    def repair(self) -> None:
        """Set a damaged file aside. Raises `RowError` and `OSError`."""
        with self._locked():
            pass

    # Writing

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the lock of the file, and know all of it."""
        with as_owner(self._directory, self._user):
            lock = self._open_locked()
            try:
                self.read()
                if self.damaged:
                    self._set_aside()
                    lock.close()
                    lock = self._open_locked()
                    self.read()
                # A line without an end was confirmed to nobody.
                if os.fstat(lock.fd).st_size > self._offset:
                    os.ftruncate(lock.fd, self._offset)
                yield lock.fd
                if self._lines > 2 * self._needed() + SPARE_LINES:
                    self._tidy()
            finally:
                lock.close()

    def _tidy(self) -> None:
        """Write the file anew if the disk takes it; the changes that are made stay made."""
        try:
            self._replace()
        except OSError as error:
            log.error("%s cannot be written anew, and grows: %s", self._path, error)

    def _needed(self) -> int:
        """About how many lines the table needs."""
        rows = len(self.table.rows) + len(self.table.suppressions)
        return rows + self.table.suppressed // 1000 + 1

    def _open_locked(self) -> FileLock:
        end = time.monotonic() + LOCK_SECONDS
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        while True:
            try:
                file = os.open(self._path, flags)
            except FileNotFoundError:
                file = os.open(self._path, flags | os.O_CREAT, MODE)
                _sync_directory(self._directory)
            try:
                lock = FileLock(file)
            except Held:
                if time.monotonic() > end:
                    raise RowError(f"{self._path}: another process keeps the lock") from None
                time.sleep(LOCK_AGAIN_SECONDS)
                continue
            try:
                found, there = os.fstat(file), os.stat(self._path)
                if (found.st_dev, found.st_ino) == (there.st_dev, there.st_ino):
                    return lock
            except FileNotFoundError:
                pass
            except BaseException:
                lock.close()
                raise
            lock.close()

    def _write(
        self,
        file: int,
        lines: Sequence[Line],
        who: str,
        action: str,
        why: str,
        *,
        row: Row | None = None,
        rows: Sequence[Row] = (),
        values: Sequence[str] = (),
    ) -> None:
        """Make a change durable, with its line in the audit file, and apply it."""
        every = [row] if row is not None else list(rows)
        with self._audited(self._document(who, action, why, every, values)):
            self._append(file, lines)

    def _document(
        self, who: str, action: str, why: str, rows: Sequence[Row], values: Sequence[str]
    ) -> dict[str, Any]:
        document: dict[str, Any] = {
            "time": format_time(self._clock()),
            "who": who,
            "action": action,
            "why": why,
        }
        if rows:
            document["rows"] = [msgspec.to_builtins(each) for each in rows]
        if values:
            document |= {"values": values[:AUDITED_VALUES], "count": len(values)}
        return document

    @contextmanager
    def _audited(self, *documents: dict[str, Any]) -> Iterator[None]:
        """Write a line of the audit file for each change that is made meanwhile."""
        path = os.path.join(self._directory, AUDIT_NAME)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(path, flags, MODE)
        try:
            size = os.fstat(file).st_size
            data = b"".join(_encode(document) + b"\n" for document in documents)
            if size and os.pread(file, 1, size - 1) != b"\n":
                data = b"\n" + data  # a crash has cut the last line
            try:
                _write_all(file, data)
                os.fsync(file)
                if not size:
                    _sync_directory(self._directory)
                yield
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file, size)
                raise
        finally:
            os.close(file)

    def _append(self, file: int, lines: Sequence[Line], *, sync: bool = True) -> None:
        new = not self._offset
        lines = [Line(version=VERSION), *lines] if new else lines
        data = b"".join(map(_format, lines))
        try:
            _write_all(file, data)
            if sync:
                os.fsync(file)
        except OSError:
            os.ftruncate(file, self._offset)
            raise
        for line in lines:
            self.table.apply(line)
        self._offset += len(data)
        self._lines += len(lines)
        self._last = _last_line(data)
        self._changed = os.fstat(file).st_mtime_ns

    def _set_aside(self) -> None:
        """Keep a copy of a damaged file, and replace the file by its sound lines."""
        name = f"{FILE_NAME}.damaged-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(self._clock()))}"
        number = 0
        while os.path.exists(copy := os.path.join(self._directory, f"{name}-{number}")):
            number += 1
        self.table.next_id += SKIPPED_IDS
        damaged, lines = self.damaged, self._lines
        self._replace(copy)
        log.error(
            "%s: %d of %d lines are damaged; the file is kept as %s. The other lines are in force,"
            " and the suppressions of damaged lines as far as they can be read. Compare 'mailerq"
            " pause list', 'error list' and 'suppress list' with %s",
            self._path,
            damaged,
            lines,
            copy,
            AUDIT_NAME,
        )

    def _replace(self, copy: str = "") -> None:
        """Write the file anew, and keep the old one as `copy`."""
        path = f"{self._path}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(path, flags, MODE)
        try:
            lines = size = 0
            for line in self.table.lines():
                data = _format(line)
                _write_all(file, data)
                lines, size = lines + 1, size + len(data)
            os.fsync(file)
            found = os.fstat(file)
            if copy:
                os.link(self._path, copy)
            os.rename(path, self._path)
        except OSError:
            for each in filter(None, (path, copy)):
                with suppress(OSError):
                    os.unlink(each)
            raise
        finally:
            os.close(file)
        _sync_directory(self._directory)
        self.damaged = 0
        self._identity = found.st_dev, found.st_ino
        self._lines, self._offset = lines, size
        self._last, self._changed = data, found.st_mtime_ns


def _last_line(data: bytes) -> bytes:
    """The last line of data that ends with a line."""
    return data[data.rfind(b"\n", 0, -1) + 1 :]


def _format(line: Line) -> bytes:
    data = _encode(line)
    return b"%08x %s\n" % (crc32(data), data)


def _parse(text: bytes) -> Line | None:
    """A line of the file; None if it is damaged."""
    checksum, _, data = text.partition(b" ")
    try:
        if int(checksum, 16) == crc32(data):
            return _decode(data)
    except (ValueError, msgspec.DecodeError, RecursionError):
        pass
    return None


def _salvaged(text: bytes) -> tuple[Row | None, list[str]]:
    """The suppressions of a damaged line that can still be read."""
    start, number = text.find(VALUES), _find_id(text)
    values: list[str] = []
    if b'"suppression"' not in text or start < 0 or number is None:
        return None, values
    for word in _find_words(text, start + len(VALUES)):
        if b"@" in word or b"." in word:
            with suppress(RowError, UnicodeError):
                values.append(suppressible(word.decode()))
    code, status, description = SUPPRESSED
    row = Row(
        kind=SUPPRESSION,
        id=int(number[1]),
        code=code,
        status=status,
        description=description,
        reason="read from a damaged line",
    )
    return (row, values) if values else (None, values)


def _write_all(file: int, data: bytes) -> None:
    while data:
        written = os.write(file, data)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data = data[written:]


def _sync_directory(path: str) -> None:
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
