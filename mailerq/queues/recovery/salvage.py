"""Checks a queue file at the start, and salvages a damaged one.

Theory of operation
-------------------
`examine` says whether a file is damaged, in bounded time. SQLite checks all of a small file, and of
a file marked after damage was met; a large file is probed at its ends and at random. Records prove
themselves by checksums whenever they are read, so damage missed here is found later and loses
nothing.

SQLite accepts the write-ahead log up to its first broken frame. A crash may leave the last commit
broken: its last frame is there, and another frame was not written, or only in part. That commit was
not yet reported as safe. But a safe commit that was damaged later looks alike, and so may the
remains of another process that died during a commit. So `recover` takes from that commit the
messages that prove themselves and that the file does not know: a duplicate message or result is
better than a lost one. The messages are read from a copy of the log, which is kept, and from which
an interrupted recovery starts again. More than one such commit is damage, because each commit is
synced before the next begins.

`salvage` reads the pages directly (`mailerq.queues.recovery.pages`), not through SQLite. It walks
the trees of the tables from their roots. If a tree is broken, all other pages that are not free are
read; if the log is broken, the frames behind the break too. Every message with a sound checksum and
a fitting body is written into a new file under its old number. Unsound records go into the queue
``damaged``, with a reason. Free pages may hold deleted messages, and are not read; if the free list
is broken too, the index of messages tells which messages are alive.

The new file replaces the old one only when complete and synced; the old file is moved aside, never
deleted.

Guarantees
----------
- A crash at any moment leaves either the old file in its place or a complete new one, which
  `recover` puts there at the next start.
- A file that `examine` calls damaged is never written to, and a log whose last commit is incomplete
  is kept.
"""

from __future__ import annotations

import logging
import os
import random
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from zlib import crc32

import apsw

from mailerq.errors import QueueDamaged, QueueError
from mailerq.message import Message
from mailerq.queues.embedded.disk import unreadable
from mailerq.queues.embedded.layout import PAGE_SIZE, PLACES_LAYOUT, UNSORTED
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.queue_reader import ROW
from mailerq.queues.embedded.records import Batch, Insert, Row, aside, check, prepare, proven
from mailerq.queues.embedded.shares import first_number
from mailerq.queues.embedded.sqlite_file import MARK_SUFFIX, connect, translate
from mailerq.queues.interface import DAMAGED_QUEUE
from mailerq.queues.recovery.pages import (
    FRAME_HEADER,
    INDEX_INTERIOR,
    INDEX_LEAF,
    LOG_HEADER,
    TABLE_INTERIOR,
    TABLE_LEAF,
    Cell,
    Pages,
    is_log_head,
    record,
    shape,
)

__all__ = ["Finding", "Salvaged", "broken_log", "examine", "recover", "salvage"]

logger = logging.getLogger("mailerq.queues")

FULL_CHECK_BYTES: Final = 128 << 20
"""SQLite checks this much in a second, even on a slow disk; a larger file is probed."""

MAX_UNREADABLE: Final = 0.1
"""A fraction of the file. A few unreadable blocks are damage; more than this is a fault of the
disk, which may recover."""

PROBES: Final = 300
PROBE_SECONDS: Final = 0.3
UNFINISHED: Final = ".salvaging"
FINISHED: Final = ".salvaged"
HALF: Final = ".half-commit"
"""The copy of a log whose last commit is being taken in."""

NUMBER_GAP: Final = 1_000_000
"""How far the numbers jump if the last assigned number is lost."""

BATCH: Final = 500
BATCH_BYTES: Final = 32 << 20
COPY_BYTES: Final = 1 << 20

MESSAGE_COLUMNS: Final = (9, 7)
"""Column counts that identify a row of messages anywhere; the second is from before layout 3."""

INDEXES: Final = ("message_place", "message_due")
"""The index of messages, now and before layout 3."""

ROOTS: Final = {"number": 2, "message": 3, "body": 4, "shared": 5, "message_place": 6}
OLD_ROOTS: Final = {"number": 2, "message": 3, "message_due": 4, "body": 5, "shared": 6}
"""The tree roots, in the order of our schema; used if the file does not tell. A file made before
layout 3 keeps its order, and its new index mostly has the place of the old."""


@dataclass(slots=True, frozen=True)
class Finding:
    """The result of `examine`: `damage` says what is wrong with a file.

    `half` is the size of the log up to the end of an incomplete last commit, 0 if the last commit
    is complete; `believed` is the number of frames before that commit.
    """

    damage: str | None = None
    half: int = 0
    believed: int = 0


class Log(NamedTuple):
    """A write-ahead log: the size of a frame, and the numbers of the frames that end a commit."""

    step: int
    commits: list[int]


@dataclass(slots=True, frozen=True)
class Salvaged:
    """The result of a salvage: `lost` messages are known to have been in the file.

    More may have been lost unless `all_known`. `missing` bytes of the file are not there.
    """

    messages: int
    damaged: int
    lost: int
    all_known: bool
    missing: int

    def __str__(self) -> str:
        lost = f"{self.lost} could not be read"
        if not self.all_known:
            lost = (
                f"at least {self.lost} are lost, and it cannot be told how many, for the index"
                " of them is damaged as well"
            )
        if self.missing:
            lost += f"; the last {self.missing} bytes of the file are missing"
        return (
            f"salvaged {self.messages} messages; {self.damaged} damaged ones are in the queue "
            f"{DAMAGED_QUEUE!r}; {lost}"
        )


def recover(path: str) -> None:
    """Make sure that a sound file or none is at `path`. Raises `QueueError`.

    The file must not be open elsewhere.
    """
    _remove(path + UNFINISHED)
    _remove_file(path + HALF + UNFINISHED)
    try:
        if os.path.exists(path + FINISHED):
            _replace(path)
        damage = _take_in(path) if os.path.exists(path + HALF) else None
        if damage is None:
            finding = examine(path)
            damage = finding.damage
            if damage is None and finding.half:
                _copy_log(path, finding.half)
                damage = _take_in(path, finding.believed)
        if damage is None:
            _remove_file(path + MARK_SUFFIX)
            return
        _renew(path, damage)
        if os.path.exists(path + HALF) and (reason := _take_in(path)) is not None:
            logger.critical("%s: %s; the log was kept as %s", path, reason, _keep_log(path))
    except OSError as error:
        raise translate(error, path) from error


def _renew(path: str, damage: str) -> None:
    """Replace a damaged file with a new one that has all readable contents."""
    bad, size = unreadable(path)
    if bad > size * MAX_UNREADABLE:
        raise QueueError(
            f"{path}: {bad} of {size} bytes cannot be read from the disk; nothing was changed"
        )
    logger.critical("%s is damaged, salvaging what is readable: %s", path, damage)
    found = salvage(path, path + UNFINISHED)
    os.rename(path + UNFINISHED, path + FINISHED)
    kept = _replace(path)
    logger.critical("%s; the damaged file was kept as %s", found, kept)


def _replace(path: str) -> str:
    """Move the old file and its companions aside, and the new one into place."""
    kept = _free_name(f"{path}.damaged")
    for suffix in ("-shm", "-wal", ""):
        if os.path.exists(path + suffix):
            os.rename(path + suffix, kept + suffix)
    os.rename(path + FINISHED, path)
    _remove_file(path + MARK_SUFFIX)
    _sync(os.path.dirname(path) or ".", os.O_RDONLY)
    return kept


def _free_name(base: str) -> str:
    """A name with the time, unused by any file or companion."""
    name = stamped = f"{base}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    count = 1
    while any(os.path.exists(name + suffix) for suffix in ("", "-wal", "-shm")):
        count += 1
        name = f"{stamped}-{count}"
    return name


def _private(path: str, flags: int) -> int:
    """Open a file with mode 0640: mail is private."""
    return os.open(path, flags, 0o640)


def _sync(path: str, flags: int) -> None:
    file = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _remove(path: str) -> None:
    for suffix in ("", "-wal", "-shm"):
        _remove_file(path + suffix)


def _remove_file(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def examine(path: str) -> Finding:
    """Return what is wrong with a file. Raises `QueueError` if the file cannot be judged."""
    try:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        log = os.path.getsize(path + "-wal") if os.path.exists(path + "-wal") else 0
        if size == 0 and log == 0:
            if os.path.exists(path):
                logger.warning("%s is empty, it becomes a new queue; was there mail in it?", path)
            return Finding()
        if size == 0:
            return Finding("the file is gone or empty, its write-ahead log is there")
        found = _log_of(path) if log else Log(0, [])
        if found is None:
            return Finding("the write-ahead log is broken at its head")
        whole = size <= FULL_CHECK_BYTES or os.path.exists(path + MARK_SUFFIX)
        connection = connect(path)
        # The last close would write the log into the file, and delete the log.
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    except (apsw.NotADBError, apsw.CorruptError) as error:
        return Finding(str(error))
    except (OSError, apsw.Error) as error:
        raise translate(error, path) from error
    try:
        return _look(connection, found, whole)
    except (apsw.NotADBError, apsw.CorruptError, apsw.IOError) as error:
        return Finding(str(error))
    except apsw.Error as error:
        raise translate(error, path) from error
    finally:
        connection.close(True)


def broken_log(path: str) -> str | None:
    """Return what is wrong with a file's log, or None. The file must not be open elsewhere."""
    if os.path.exists(path + HALF):
        return "a start was interrupted while it took in the last commit of the write-ahead log"
    if not os.path.exists(path + "-wal") or not os.path.getsize(path + "-wal"):
        return None
    if not os.path.exists(path) or not os.path.getsize(path):
        return "the file is gone or empty, its write-ahead log is there"
    log = _log_of(path)
    if log is None:
        return "the write-ahead log is broken at its head"
    try:
        connection = connect(path)
        try:
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            believed = _believed(connection)
            return _broken(believed, log) if believed < max(log.commits, default=0) else None
        finally:
            connection.close(True)
    except (apsw.NotADBError, apsw.CorruptError) as error:
        return str(error)
    except apsw.Error as error:
        raise translate(error, path) from error


def _believed(connection: apsw.Connection) -> int:
    """How many frames of the log SQLite accepts; the last of them ends a commit."""
    return connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)[0]


def _broken(believed: int, log: Log) -> str:
    return f"the write-ahead log is broken after frame {believed} of {log.commits[-1]}"


def _look(connection: apsw.Connection, log: Log, whole: bool) -> Finding:
    if not int(connection.pragma("user_version")):
        return Finding()  # foreign, or not finished: `QueueFile` decides
    believed = _believed(connection)
    unread = [number for number in log.commits if number > believed]
    if len(unread) > 1:
        return Finding(_broken(believed, log))
    if whole:
        answer = str(connection.execute("PRAGMA integrity_check(1)").get)
        damage = None if answer == "ok" else answer
    else:
        damage = _probe(connection)
    if unread:
        return Finding(damage, LOG_HEADER + unread[0] * log.step, believed)
    return Finding(damage)


def _log_of(path: str) -> Log | None:
    """The structure of a file's log; None if its head is broken."""
    with open(path + "-wal", "rb", buffering=0) as file:
        head = file.read(LOG_HEADER)
        if len(head) < LOG_HEADER:
            return Log(0, [])
        if not is_log_head(head):
            return None
        page_size, *salts = struct.unpack(">I4x2I", head[8:24])
        step = FRAME_HEADER + page_size
        commits = []
        for number in range(1, (os.path.getsize(path + "-wal") - LOG_HEADER) // step + 1):
            frame = os.pread(file.fileno(), 16, LOG_HEADER + (number - 1) * step)
            _, commit, *stamp = struct.unpack(">4I", frame)
            if stamp == salts and commit:
                commits.append(number)
        return Log(step, commits)


def _probe(connection: apsw.Connection) -> str | None:
    """Check the ends of every tree and some rows in between."""
    for table in ("message", "body", "shared"):
        connection.execute(f"SELECT min(id), max(id) FROM {table}").fetchall()
    connection.execute("SELECT queue FROM message ORDER BY queue LIMIT 1").fetchall()
    connection.execute("SELECT queue FROM message ORDER BY queue DESC LIMIT 1").fetchall()
    ends: list[Any] = connection.execute("SELECT min(id), max(id) FROM message").fetchall()
    lowest, highest = ends[0]
    if lowest is None:
        return None
    until = time.monotonic() + PROBE_SECONDS
    for _ in range(PROBES):
        if time.monotonic() > until:
            break
        number = random.randint(lowest, highest)
        found: list[Any] = connection.execute(ROW + "WHERE m.id >= ? LIMIT 1", (number,)).fetchall()
        for values in found:
            row = Row(*values)
            message = check(row)
            if isinstance(message, str):
                return f"message {row.id}: {message}"
            if not _is_indexed(connection, row.id):
                return f"message {row.id} is missing in the index"
    return None


def _is_indexed(connection: apsw.Connection, number: int) -> bool:
    """Whether the index has a message at the place that its row states."""
    columns = "queue, destination, lane, due"
    if int(connection.pragma("user_version")) < PLACES_LAYOUT:
        columns = "queue, due"
    index = INDEXES[columns == "queue, due"]
    found = connection.execute(
        f"SELECT 1 FROM message INDEXED BY {index} WHERE id = ?1 AND ({columns}) = "
        f"(SELECT {columns} FROM message NOT INDEXED WHERE id = ?1)",
        (number,),
    ).get
    return found is not None


def _copy_log(path: str, size: int) -> None:
    """Copy the first `size` bytes of a file's log for `_take_in`."""
    copying = path + HALF + UNFINISHED
    try:
        with open(path + "-wal", "rb") as log, open(copying, "xb", opener=_private) as copy:
            while size > 0 and (data := log.read(min(size, COPY_BYTES))):
                copy.write(data)
                size -= len(data)
            copy.flush()
            os.fsync(copy)
    except BaseException:
        _remove_file(copying)
        raise
    _rename(copying, path + HALF)


def _take_in(path: str, believed: int = 0) -> str | None:
    """Save the new messages of the copied log's last commit; return the file's damage, or None.

    The first `believed` frames of the log need no proof. If the file is damaged, the copy stays for
    the file that will replace it.
    """
    pages = Pages(path, PAGE_SIZE, log=path + HALF, believed=believed)
    try:
        with QueueFile(path, [], outbox="") as file:
            file.create()
            saved = _Salvage(pages, file).take_in()
            file.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except (apsw.Error, QueueError) as error:
        cause = error.__cause__ if isinstance(error, QueueError) else error
        if isinstance(cause, apsw.CorruptError | apsw.NotADBError | apsw.ConstraintError):
            return f"taking in the last commit of its log: {cause}"
        raise translate(error, path) from error
    finally:
        pages.close()
    logger.warning(
        "%s: the last commit in its log had not been written to its end, or is damaged since: %d "
        "new messages of it were whole and were taken in; the log was kept as %s",
        path,
        saved,
        _keep_log(path),
    )
    return None


def _keep_log(path: str) -> str:
    """Set the copied log aside, and return its new name."""
    kept = _free_name(path + HALF)
    _rename(path + HALF, kept)
    return kept


def _rename(old: str, new: str) -> None:
    os.rename(old, new)
    _sync(os.path.dirname(new) or ".", os.O_RDONLY)


def salvage(path: str, new: str) -> Salvaged:
    """Write every readable record of a damaged file into a new one; raises `QueueError`."""
    pages = Pages(path, PAGE_SIZE)
    try:
        with QueueFile(new, [], outbox="") as file:
            try:
                file.create()
                file.connection.execute("PRAGMA synchronous = OFF")
                found = _Salvage(pages, file).run()
                file.connection.execute("PRAGMA synchronous = FULL")
                file.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            except apsw.Error as error:
                raise file.failed(error) from error
        _sync(new, os.O_RDWR)
        return found
    except QueueDamaged as error:
        raise QueueError(f"cannot salvage {path}: {error}") from error
    finally:
        pages.close()


class _Salvage:
    """One walk through one damaged file."""

    def __init__(self, pages: Pages, file: QueueFile) -> None:
        self.pages = pages
        self.file = file
        self.batch: list[Insert] = []
        self.saved: set[int] = set()
        self.set_aside: set[int] = set()
        self.doubtful: list[Cell] = []
        self.bodies: dict[int, list[Cell]] = {}
        self.shared: dict[int, list[Cell]] = {}
        self.sharing: dict[int, bytes] = {}
        self.size = 0
        self.at_once = False  # everything saved is one commit
        self.damaged = 0
        self.guessed = False  # where the index begins
        self.highest = first_number(os.path.dirname(file.path)) - 1

    def run(self) -> Salvaged:
        roots = self.roots()
        seen: set[int] = {1}
        messages, whole = self.walk(roots["message"], seen)
        bodies, bodies_whole = self.walk(roots["body"], seen)
        shares, shares_whole = self.walk(roots["shared"], seen)
        index, index_whole = self.walk(roots["index"], seen)
        numbers, _ = self.walk(roots["number"], seen)
        for page in bodies:
            self.note_bodies(page, self.bodies)
        for page in shares:
            self.note_bodies(page, self.shared)
        loose: list[int] = []
        if not (whole and bodies_whole and shares_whole):
            loose = self.loose(seen)
        later = self.pages.later()
        for page in loose + later:
            self.note_bodies(page, None)
        for page in messages:
            self.take(page)
        living = {number for _, _, number in self.entries(index)} if index_whole else None
        if living is not None and self.guessed and not self.saved <= living:
            index_whole, living = False, None  # another tree, or part of one
        for page in loose:
            self.take(page, loose=True, living=living)
        for page in later:
            self.take(page, loose=True)
        missing = {
            number: (queue, due)
            for queue, due, number in self.entries(index)
            if number not in self.saved
        }
        for cell in self.doubtful:
            self.put_aside(cell)
        for number in list(self.bodies):
            if number not in self.saved and number not in self.set_aside:
                if number in missing or not index_whole:
                    self.put_body_aside(number, missing.get(number))
        self.flush()
        self.number_on(numbers)
        lost = sum(number not in self.set_aside for number in missing)
        all_known = whole or index_whole
        return Salvaged(len(self.saved), self.damaged, lost, all_known, self.pages.missing)

    def take_in(self) -> int:
        """Add in one commit the messages that only the log's last commit has; return the count.

        Messages that the file knows stay unchanged: one that the log's commit deleted or changed is
        tried again.
        """
        pages = self.pages.later()
        numbers: set[int] = set()
        for page in pages:
            self.note_bodies(page, None)
            for cell in self.pages.cells(page)[0]:
                if len(shape(self.pages.local(cell))) in MESSAGE_COLUMNS:
                    numbers.add(cell.rowid)
        known = self.file.known(numbers)
        self.saved |= known
        self.at_once = True
        for page in pages:
            self.take(page, loose=True)
        following = max(numbers, default=0) + 1
        self.file.connection.execute("UPDATE number SET next = max(next, ?)", (following,))
        self.flush()
        return len(self.saved) - len(known)

    def roots(self) -> dict[str, int]:
        """The roots of the trees."""
        found: dict[str, int] = {}
        cells, _ = self.pages.cells(1)
        for cell in cells:
            match record(self.pages.payload(cell)):
                case [_, str(name), _, int(root), _] if 1 < root <= self.pages.count:
                    found[name] = root
        old = self.pages.kind(OLD_ROOTS["message_due"]) in (INDEX_INTERIOR, INDEX_LEAF)
        roots = {**(OLD_ROOTS if old else ROOTS), **found}
        self.guessed = not any(name in found for name in INDEXES)
        index = next((name for name in INDEXES if name in (found or roots)), INDEXES[0])
        return {**roots, "index": roots.get(index, ROOTS[INDEXES[0]])}

    def walk(self, root: int, seen: set[int]) -> tuple[list[int], bool]:
        """The entry pages below a root, and whether the tree is whole.

        For the tree of an index, all of its pages.
        """
        pages: list[int] = []
        whole = True
        stack = [root]
        index = self.pages.kind(root) in (INDEX_INTERIOR, INDEX_LEAF)
        expected = (INDEX_INTERIOR, INDEX_LEAF) if index else (TABLE_INTERIOR, TABLE_LEAF)
        while stack:
            number = stack.pop()
            kind = self.pages.kind(number)
            if number in seen or kind not in expected:
                whole = False
                continue
            seen.add(number)
            if kind != TABLE_INTERIOR:
                pages.append(number)
            if kind in (TABLE_INTERIOR, INDEX_INTERIOR):
                cells, complete = self.pages.cells(number)
                whole = whole and complete
                stack += [cell.child for cell in reversed(cells)]
        return pages, whole

    def loose(self, seen: set[int]) -> list[int]:
        """Pages of rows that no tree leads to and that are not free."""
        free, _ = self.pages.free()
        return [
            number
            for number in range(2, self.pages.count + 1)
            if number not in seen and number not in free and self.pages.kind(number) == TABLE_LEAF
        ]

    def entries(self, index: list[int]) -> Iterator[tuple[str, int, int]]:
        """The entries of the index: queue, due time and number of each message."""
        for page in index:
            for cell in self.pages.cells(page)[0]:
                match record(self.pages.payload(cell)):
                    case [str(queue), _, _, int(due), int(number)]:
                        yield queue, due, number
                    case [str(queue), int(due), int(number)]:
                        yield queue, due, number

    def note_bodies(self, page: int, where: dict[int, list[Cell]] | None) -> None:
        """Note where bodies lie; the number of columns tells bodies from shared ones."""
        for cell in self.pages.cells(page)[0]:
            known = where
            if known is None:
                columns = len(shape(self.pages.local(cell)))
                known = {2: self.bodies, 3: self.shared}.get(columns)
            if known is not None:
                known.setdefault(cell.rowid, []).append(cell)

    def take(self, page: int, *, loose: bool = False, living: set[int] | None = None) -> None:
        """Save the proven messages of a page; note the others for the end."""
        for cell in self.pages.cells(page)[0]:
            number = cell.rowid
            if number in self.saved or (living is not None and number not in living):
                continue
            if loose and len(shape(self.pages.local(cell))) not in MESSAGE_COLUMNS:
                continue
            row = self.row(cell)
            if row is None or isinstance(check(row), str):
                if not loose or (row is not None and proven(row)):
                    self.doubtful.append(cell)
                continue
            self.saved.add(number)
            self.highest = max(self.highest, number)
            # The start sorts the messages found here.
            insert = Insert(Message(), row.queue, row.due, *UNSORTED, row.properties, row.data)
            insert.id = number
            self.save(insert)

    def row(self, cell: Cell) -> Row | None:
        """The row in a cell, with the body that fits best."""
        values = record(self.pages.payload(cell))
        if values is None or len(values) not in MESSAGE_COLUMNS:
            return None
        row = Row._make((cell.rowid, *values[1:7], None))
        return row._replace(data=self.body(row))

    def body(self, row: Row) -> Any:
        reference = row.body
        if reference == 0:
            return self.fitting(self.bodies.get(row.id, ()), row.body_crc)
        if not isinstance(reference, int):
            return None
        if reference not in self.sharing:
            # One object for all users of a body, as long as they are adjacent.
            self.sharing.clear()
            body = self.fitting(self.shared.get(reference, ()), row.body_crc)
            self.sharing[reference] = body
        return self.sharing[reference]

    def fitting(self, cells: Iterable[Cell], body_crc: Any) -> Any:
        best = None
        for cell in cells:
            values = record(self.pages.payload(cell))
            data = values[-1] if values else None
            if isinstance(data, bytes):
                if crc32(data) == body_crc:
                    return data
                best = best or data
        return best

    def put_aside(self, cell: Cell) -> None:
        """Keep the remains of a message whose number may be wrong too."""
        row = self.row(cell)
        if cell.rowid in self.saved:
            return
        if row is None:
            reason = "the row is not of the form that was written"
            left = self.pages.payload(cell) or self.pages.local(cell)
            row = Row(cell.rowid, None, None, None, None, None, left, None)
        else:
            reason = str(check(row))
        self.set_aside.add(cell.rowid)
        self.save_aside(row, reason)

    def put_body_aside(self, number: int, known: tuple[str, int] | None) -> None:
        """Keep a body whose message is lost: its headers may name the recipient."""
        data = self.fitting(self.bodies[number], None)
        if data is None:
            return
        queue, due = known if known is not None else (None, None)
        self.set_aside.add(number)
        self.save_aside(
            Row(number, queue, due, 0, None, None, b"", data), "all but the body is lost"
        )

    def save_aside(self, row: Row, reason: str) -> None:
        insert = prepare(aside(row, reason), time.time(), self.file.outbox)
        self.highest += 1
        insert.id = self.highest
        self.damaged += 1
        self.save(insert)

    def save(self, insert: Insert) -> None:
        self.batch.append(insert)
        self.size += insert.size
        if not self.at_once and (len(self.batch) >= BATCH or self.size >= BATCH_BYTES):
            self.flush()

    def flush(self) -> None:
        self.file.write(Batch(self.batch))
        self.batch = []
        self.size = 0

    def number_on(self, pages: list[int]) -> None:
        """Make the next number one that was never assigned."""
        following = 0
        for page in pages:
            for cell in self.pages.cells(page)[0]:
                match record(self.pages.payload(cell)):
                    case [int(value)] if 0 < value < 1 << 62:
                        following = value
        if not following:
            following = self.highest + NUMBER_GAP
        self.file.connection.execute(
            "UPDATE number SET next = ?", (max(following, self.highest + 1),)
        )
