"""Reads the pages of a SQLite file without SQLite, as far as they make sense.

SQLite refuses a file with one broken page, although most of the contents are intact. This module
implements the parts of the file format (https://sqlite.org/fileformat2.html) that `salvage` needs:
database pages overlaid with those of the write-ahead log, the cells of a page, the columns of
a record, the free list. Files are opened read-only.

Every function accepts garbage and returns less: an invalid page has no cells, an invalid record is
None.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from contextlib import suppress
from typing import Any, Final, NamedTuple

__all__ = [
    "FRAME_HEADER",
    "INDEX_INTERIOR",
    "INDEX_LEAF",
    "LOG_HEADER",
    "TABLE_INTERIOR",
    "TABLE_LEAF",
    "Cell",
    "Pages",
    "is_log_head",
    "record",
    "shape",
]

MAGIC: Final = b"SQLite format 3\0"
INDEX_INTERIOR, TABLE_INTERIOR, INDEX_LEAF, TABLE_LEAF = 2, 5, 10, 13
LOG_MAGIC: Final = 0x377F0682
LOG_VERSION: Final = 3007000
LOG_HEADER: Final = 32
FRAME_HEADER: Final = 24
"""Bytes of the header of the write-ahead log, and of each frame before its page."""

LATER: Final = 1 << 32


class Cell(NamedTuple):
    """One entry of a page: place and length of its payload, its row, its child page."""

    page: int
    place: int
    size: int
    rowid: int
    child: int


class Pages:
    """The pages of a database file, numbered from 1, as of the last readable commit."""

    def __init__(
        self, path: str, page_size: int, *, log: str | None = None, believed: int = 0
    ) -> None:
        """`page_size` is the expected size, used if the header of the file does not tell.

        `log` is the path of its write-ahead log, if not the usual one. The first `believed` frames
        of the log need no proof.
        """
        self._file = _open(path)
        header = _read(self._file, 100, 0)
        self.sound_header = header[:16] == MAGIC
        told = int.from_bytes(header[16:18], "big") if self.sound_header else 0
        told = 65536 if told == 1 else told
        self.page_size = told if told >= 512 and told & (told - 1) == 0 else page_size
        self._last = (0, b"")
        self._log = _open(path + "-wal" if log is None else log)
        self._frames: dict[int, int] = {}
        self._later: dict[int, int] = {}
        self.log_problem: str | None = None
        self.count = -(-_size(self._file) // self.page_size)
        self._read_log(believed)
        size = _size(self._file)
        pages = max(_count_in(header) if self.sound_header else 0, self.count)
        there = -(-size // self.page_size)
        elsewhere = sum(there < number <= pages for number in self._frames)
        self.missing = max((pages - elsewhere) * self.page_size - size, 0)
        """Bytes missing at the end of the file."""

    def close(self) -> None:
        for file in (self._file, self._log):
            if file is not None:
                os.close(file)

    def page(self, number: int) -> bytes:
        """The bytes of a page, fewer at the end of the file."""
        if number == self._last[0]:
            return self._last[1]
        place = self._frames.get(number)
        if number >= LATER:
            place = self._later[number - LATER]
        file = self._file if place is None else self._log
        if place is None:
            place = (number - 1) * self.page_size
        page = _read(file, self.page_size, place)
        self._last = (number, page)
        return page

    def _read_log(self, believed: int) -> None:
        """Find the newest committed frame of every page.

        A frame proves itself by a checksum that continues the checksum of the frame before, which
        that frame stores. So frames behind a broken one can be proven too, for `later`.
        """
        size = _size(self._log)
        if size == 0:
            return
        head = _read(self._log, LOG_HEADER, 0)
        fields = struct.unpack(">8I", head.ljust(LOG_HEADER, b"\0"))
        step = FRAME_HEADER + self.page_size
        order = "big" if fields[0] == LOG_MAGIC | 1 else "little"
        salts, sums = fields[4:6], fields[6:8]
        sums_known = is_log_head(head) and fields[2] == self.page_size
        if not sums_known:
            self.log_problem = "its header is broken"
            first = _read(self._log, FRAME_HEADER, LOG_HEADER).ljust(FRAME_HEADER, b"\0")
            salts = struct.unpack(">2I", first[8:16])
        pending: dict[int, int] = {}
        frames = self._frames
        is_sound = True
        for offset in range(LOG_HEADER, size - step + 1, step):
            sure = offset < LOG_HEADER + believed * step
            frame = _read(self._log, FRAME_HEADER if sure else step, offset)
            if len(frame) < (FRAME_HEADER if sure else step):
                continue
            number, commit, *rest = struct.unpack(">6I", frame[:FRAME_HEADER])
            before, sums = sums, (rest[2], rest[3])
            if tuple(rest[:2]) != salts:
                is_sound = False  # broken, or left over from before the log was restarted
                continue
            is_proven = sure or not (sums_known or offset > LOG_HEADER)
            if not is_proven:
                found = _checksum(frame[:8], before, order)
                is_proven = _checksum(frame[FRAME_HEADER:], found, order) == sums
            if not (is_proven and is_sound):
                self.log_problem = self.log_problem or f"the log is broken before {offset + step}"
                frames = self._later
                frames.update(pending)  # of the same commit, and proven
                pending.clear()
                is_sound = True
            if is_proven:
                pending[number] = offset + FRAME_HEADER
                if commit:
                    frames.update(pending)
                    self.count = max(self.count, commit)
                    pending.clear()
        self.count = max(self.count, *self._later, 0)

    def later(self) -> list[int]:
        """Log pages in and behind a commit with a broken frame, under numbers of their own.

        They may be newer than the `page` at the same place, or belong to a failed commit: there is
        no way to tell.
        """
        return [LATER + number for number in self._later]

    def free(self) -> tuple[set[int], bool]:
        """The pages on the free list, and whether the whole list was readable."""
        head = self.page(1)[:100].ljust(100, b"\0")
        trunk, total = struct.unpack(">2I", head[32:40])
        free: set[int] = set()
        while trunk:
            page = self.page(trunk)
            if len(page) < self.page_size or trunk in free:
                return free, False
            free.add(trunk)
            trunk, count = struct.unpack(">2I", page[:8])
            if count > self.page_size // 4 - 2:
                return free, False
            free.update(struct.unpack(f">{count}I", page[8 : 8 + 4 * count]))
        return free, len(free) == total and self.sound_header

    def kind(self, number: int) -> int:
        """The type byte of a page; 0 if the page cannot be part of a tree."""
        page = self.page(number)
        start = 100 if number == 1 else 0
        if len(page) < self.page_size:
            return 0
        return page[start] if page[start] in _KINDS else 0

    def cells(self, number: int) -> tuple[list[Cell], bool]:
        """The cells of a page in order, and whether all were readable.

        The last cell of an interior page is only its right-most child.
        """
        page = self.page(number)
        start = 100 if number == 1 else 0
        if len(page) < self.page_size or page[start] not in _KINDS:
            return [], False
        kind = page[start]
        interior = kind in (INDEX_INTERIOR, TABLE_INTERIOR)
        first = start + (12 if interior else 8)
        count = int.from_bytes(page[start + 3 : start + 5], "big")
        if first + 2 * count > self.page_size:
            return [], False
        cells = []
        for place in struct.unpack(f">{count}H", page[first : first + 2 * count]):
            if place < first + 2 * count:
                continue
            child = size = rowid = 0
            try:
                if interior:
                    child = int.from_bytes(page[place : place + 4], "big")
                    place += 4
                if kind != TABLE_INTERIOR:
                    size, place = _varint(page, place)
                if kind in (TABLE_LEAF, TABLE_INTERIOR):
                    rowid, place = _varint(page, place)
            except IndexError:
                continue
            cells.append(Cell(number, place, size, rowid, child))
        whole = len(cells) == count
        if interior:
            child = int.from_bytes(page[start + 8 : start + 12], "big")
            cells.append(Cell(number, 0, 0, 0, child))
        return cells, whole

    def local(self, cell: Cell) -> bytes:
        """The part of a cell's payload that lies in its page: at least its first columns."""
        page = self.page(cell.page)
        _, size = self._split(page, cell)
        return page[cell.place : cell.place + size]

    def payload(self, cell: Cell) -> bytes | None:
        """The payload of a cell with its overflow pages; None if invalid."""
        page = self.page(cell.page)
        usable = self.page_size
        whole, local = self._split(page, cell)
        if not 0 <= cell.size <= self.count * usable or cell.place + local > usable:
            return None
        parts = [page[cell.place : cell.place + local]]
        if whole:
            return parts[0]
        left = cell.size - local
        place = cell.place + local
        following = int.from_bytes(page[place : place + 4], "big")
        while left > 0:
            if cell.page >= LATER and following in self._later:
                following += LATER
            overflow = self.page(following) if self._is_page(following) else b""
            if len(overflow) < usable:
                return None
            parts.append(overflow[4 : 4 + min(left, usable - 4)])
            left -= usable - 4
            following = int.from_bytes(overflow[:4], "big")
        return b"".join(parts)

    def _is_page(self, number: int) -> bool:
        return 0 < number <= self.count or number >= LATER

    def _split(self, page: bytes, cell: Cell) -> tuple[bool, int]:
        """Whether a payload lies wholly in its page, and how many bytes of it do."""
        usable = self.page_size
        leaf = page[100 if cell.page == 1 else 0 :][:1] == bytes([TABLE_LEAF])
        most = usable - 35 if leaf else (usable - 12) * 64 // 255 - 23
        if cell.size <= most:
            return True, cell.size
        least = (usable - 12) * 32 // 255 - 23
        local = least + (cell.size - least) % (usable - 4)
        return False, local if local <= most else least


_KINDS: Final = (INDEX_INTERIOR, TABLE_INTERIOR, INDEX_LEAF, TABLE_LEAF)
_INTEGERS: Final = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


def shape(data: bytes) -> list[int]:
    """The column types at the head of a row; empty if invalid."""
    try:
        end, place = _varint(data, 0)
        types = []
        while place < end:
            kind, place = _varint(data, place)
            types.append(kind)
    except IndexError:
        return []
    return types if place == end else []


def record(payload: bytes | None) -> list[Any] | None:
    """The columns of a row; None if invalid."""
    if payload is None or not (types := shape(payload)):
        return None
    values: list[Any] = []
    place = payload[0] if payload[0] < 0x80 else _varint(payload, 0)[0]
    for kind in types:
        size = _INTEGERS.get(kind, 8 if kind == 7 else (kind - 12) // 2 if kind >= 12 else 0)
        data = payload[place : place + size]
        place += size
        value: Any = None
        if len(data) < size or kind in (10, 11) or kind < 0:
            return None
        if kind in (8, 9):
            value = kind - 8
        elif kind in _INTEGERS:
            value = int.from_bytes(data, "big", signed=True)
        elif kind == 7:
            value = struct.unpack(">d", data)[0]
        elif kind >= 12:
            value = data
            if kind & 1:
                with suppress(UnicodeDecodeError):
                    value = data.decode()
        values.append(value)
    return values if place == len(payload) else None


def _count_in(header: bytes) -> int:
    """The page count in a file's header, or 0: a count written by old programs is void."""
    is_valid = header[24:28] == header[92:96]
    return int.from_bytes(header[28:32], "big") if is_valid else 0


def is_log_head(head: bytes) -> bool:
    """Whether `head` is the valid head of a write-ahead log."""
    if len(head) < LOG_HEADER:
        return False
    magic, version, page_size, _, _, _, *sums = struct.unpack(">8I", head)
    order = "big" if magic & 1 else "little"
    return (
        magic | 1 == LOG_MAGIC | 1
        and version == LOG_VERSION
        and 512 <= page_size <= 65536
        and page_size & (page_size - 1) == 0
        and _checksum(head[:24], (0, 0), order) == tuple(sums)
    )


def _open(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _size(file: int | None) -> int:
    return 0 if file is None else os.fstat(file).st_size


def _read(file: int | None, size: int, place: int) -> bytes:
    """Read at a place; empty at the end of the file, or if the disk cannot be read."""
    if file is None or place < 0:
        return b""
    try:
        return os.pread(file, size, place)
    except OSError:
        return b""


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Read an integer of 1 to 9 bytes; return it and the place after it."""
    value = data[place]
    if value < 0x80:
        return value, place + 1
    value &= 0x7F
    for step in range(1, 8):
        byte = data[place + step]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, place + step + 1
    value = value << 8 | data[place + 8]
    return (value - (1 << 64) if value >> 63 else value), place + 9


def _checksum(data: bytes, sums: tuple[int, int], order: str) -> tuple[int, int]:
    """The checksum of the write-ahead log, continued from `sums`."""
    words = array("I", data)
    if order != sys.byteorder:
        words.byteswap()
    first, second = sums
    both = iter(words)
    for one, two in zip(both, both, strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + two + first) & 0xFFFFFFFF
    return first, second
