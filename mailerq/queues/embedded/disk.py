"""What the disk below a queue file is up to: whether it can be read, and what room it has.

SQLite reports a page that cannot be read and one that is damaged alike. A disk that does not
answer may answer again, and then nothing is lost; what is damaged stays so.

A message leaves the queue by a commit, which takes room as any other. So that a queue that has
filled its disk can still empty itself, new mail leaves a reserve alone: it is for what becomes of
the mail that is there. When that is half used up as well, a message that is tried again gets its
new due time and keeps its old properties, because results of many attempts would fill any disk.

A sync can succeed for data that is lost. When ext4 meets an error and gives up its journal, the
running transaction is dropped; a sync that looks for this transaction a moment later finds
nothing to wait for, and returns 0. So every commit asks the file system once more.
"""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import dataclass
from typing import Final

import apsw

__all__ = ["NO_SPACE", "Room", "check_sound", "room", "unreadable"]

NO_SPACE: Final = frozenset((errno.ENOSPC, errno.EDQUOT))
"""What the system calls a disk that is full."""

BLOCK_BYTES: Final = 1 << 16

RESERVE_BYTES: Final = 64 << 20
RESERVE_SHARE: Final = 8
"""The reserve is an eighth of a small disk."""

COPIES: Final = 3
"""What a byte of mail may take: in the log, in the file, and in pages that are not quite full."""


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that are free on a disk and in a file on it, and how many new mail may not take."""

    free: int
    reserve: int

    @property
    def tight(self) -> bool:
        """Whether the reserve is in use."""
        return self.free < self.reserve // 2

    def holds(self, size: int) -> bool:
        """Whether there is room for so many bytes of new mail."""
        return self.free - COPIES * size >= self.reserve


def room(path: str) -> Room:
    """Look at the disk of a file. One that cannot be asked has room."""
    try:
        found = os.statvfs(path)
    except OSError:
        return Room(sys.maxsize, 0)
    reserve = min(RESERVE_BYTES, found.f_blocks * found.f_frsize // RESERVE_SHARE)
    return Room(found.f_bavail * found.f_frsize, reserve)


def check_sound(directory: str) -> None:
    """Raise `OSError` when the file system of a directory has given up, as a sync may not tell.

    The first touch needs the journal, and makes the kernel notice what became of it; the second
    one is refused then. Neither `statvfs` nor another sync would show it at once. A disk that is
    merely full is sound.
    """
    try:
        os.utime(directory)
        os.utime(directory)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise


def unreadable(path: str) -> tuple[int, int]:
    """How many bytes of a queue file and its log cannot be read now, and how many they have.

    It reads all of them. May be called while SQLite has the file open.
    """
    bad = size = 0
    for part in (_file(path), _log(path + "-wal")):
        bad += part[0]
        size += part[1]
    return bad, size


def _file(path: str) -> tuple[int, int]:
    # By way of SQLite: a plain close would drop the locks that it has on the file.
    flags = apsw.SQLITE_OPEN_MAIN_DB | apsw.SQLITE_OPEN_READONLY
    try:
        file = apsw.VFSFile("", path, [flags, 0])
    except apsw.Error:
        return (1, 1) if os.path.exists(path) else (0, 0)
    bad = 0
    try:
        size = file.xFileSize()
        for place in range(0, size, BLOCK_BYTES):
            try:
                file.xRead(min(BLOCK_BYTES, size - place), place)
            except apsw.Error:
                bad += BLOCK_BYTES
    finally:
        file.xClose()
    return bad, size


def _log(path: str) -> tuple[int, int]:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0, 0
    except OSError:
        return 1, 1
    bad = 0
    try:
        size = os.fstat(file).st_size
        for place in range(0, size, BLOCK_BYTES):
            try:
                os.pread(file, BLOCK_BYTES, place)
            except OSError:
                bad += BLOCK_BYTES
    finally:
        os.close(file)
    return bad, size
