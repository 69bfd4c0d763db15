"""Tells a disk that cannot be read from a file that is damaged: SQLite reports both alike.

A disk that does not answer may answer again, and then nothing is lost. What is damaged stays so.
"""

from __future__ import annotations

import os
from typing import Final

import apsw

__all__ = ["unreadable"]

BLOCK_BYTES: Final = 1 << 16


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
