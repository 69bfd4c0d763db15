"""The state of the disk below a queue file: whether it is readable, and how much room it has.

SQLite reports an unreadable page and a damaged page alike. A disk that does not answer may recover,
and then nothing is lost; damage is permanent.

A message leaves the queue by a commit, which takes room like any other. So new mail leaves
a reserve for the results of the mail already there: a queue that has filled its disk can still
empty itself. When half of the reserve is used, a retry gets its new due time and keeps its old
properties, because the results of many attempts would fill any disk.

A sync can succeed for lost data. When ext4 meets an error and aborts its journal, the running
transaction is dropped; a later sync finds no transaction to wait for, and returns 0. So every
commit checks the file system once more.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Final

import apsw

from mailerq.errors import NO_SPACE

__all__ = ["Room", "check_sound", "room", "unreadable"]

BLOCK_BYTES: Final = 1 << 16

RESERVE_BYTES: Final = 64 << 20
RESERVE_SHARE: Final = 8
"""On a small disk the reserve is one part in this many."""

COPIES: Final = 3
"""Copies that a byte of mail may take: in the log, in the file, and in partly filled pages."""


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes free on a disk and in a file on it, and the bytes reserved from new mail."""

    free: int
    reserve: int

    @property
    def tight(self) -> bool:
        """Whether more than half of the reserve is used."""
        return self.free < self.reserve // 2

    def holds(self, size: int) -> bool:
        """Whether there is room for `size` bytes of new mail."""
        return self.free - COPIES * size >= self.reserve


def room(path: str) -> Room:
    """Measure the disk of a file. A disk that cannot be queried counts as having room."""
    try:
        found = os.statvfs(path)
    except OSError:
        return Room(sys.maxsize, 0)
    reserve = min(RESERVE_BYTES, found.f_blocks * found.f_frsize // RESERVE_SHARE)
    return Room(found.f_bavail * found.f_frsize, reserve)


def check_sound(directory: str) -> None:
    """Raise `OSError` if the file system of a directory has failed, as a sync may not tell.

    The first touch needs the journal, and makes the kernel notice the failure; the second is then
    refused. Neither `statvfs` nor another sync would reveal it at once. A full disk is sound.
    """
    try:
        os.utime(directory)
        os.utime(directory)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise


def unreadable(path: str) -> tuple[int, int]:
    """Count the bytes of a queue file and its log that cannot be read now, and all their bytes.

    Reads all of them. SQLite may have the file open meanwhile.
    """
    bad = size = 0
    for part in (_file(path), _log(path + "-wal")):
        bad += part[0]
        size += part[1]
    return bad, size


def _file(path: str) -> tuple[int, int]:
    # Use SQLite to open: a plain close would drop its locks on the file.
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
