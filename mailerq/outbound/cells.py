"""What limits have counted: cells of rates and numbers of connections, shared by processes.

Theory of operation
-------------------
`MemoryCells` counts for one process. `SharedCells` counts in a file that all processes of a queue
directory have open, so a limit holds for their sum, and a process that alone has mail can use all
of it. The file survives restarts. Times are those of `CLOCK_BOOTTIME`, which all processes of a
boot share, and which cannot be set; a file of another boot begins anew.

The file has a header and a row for each key: a digest of the key, its cell, and a number for each
process. Rows are appended. When there are many, those at rest are dropped; a new `generation` in
the header then tells the other processes to read all rows again.

Each operation holds a lock on the file, and does not wait for it long: a process that is stopped
with the lock must not stop the others. Without the lock the answer is to ask again in `RETRY`.

The numbers of connections in memory are the true ones. Each process writes its own, again if the
file has lost them. At its start it clears those that an earlier process with its number left.

While the file cannot be used, each process counts in memory, and may use its part of each limit.

Everything here runs on the home worker.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from typing import Final, NamedTuple, Protocol

from mailerq.rules.rates import advanced

__all__ = ["Busy", "Cells", "Count", "MemoryCells", "Rate", "SharedCells", "boot_time"]

log = logging.getLogger("mailerq.delivery")

MAX_ROWS: Final = 10_000
"""Rows at which those at rest are dropped first."""

MAX_PROCESSES: Final = 256

TRIES: Final = 100
"""Attempts to get the lock of the file before the caller has to ask again."""

RETRY: Final = 2_000_000
"""When to ask again without the lock, in nanoseconds."""

UNUSABLE: Final = 10_000_000_000
"""How long a file that could not be used is not tried again, in nanoseconds."""


class Rate(NamedTuple):
    """Take `cost` nanoseconds of a cell; 0 only asks whether the cell allows anything."""

    key: str
    cost: int


class Count(NamedTuple):
    """Take one of `limit`."""

    key: str
    limit: int


class Busy(NamedTuple):
    """Why nothing was taken: the number of the first want that cannot be met, and until when.

    The time is on the clock of the cells, or None if something else has to end first.
    """

    number: int
    until: int | None


class Cells(Protocol):
    """Counts what limits allow. Times are nanoseconds of `boot_time`."""

    def now(self) -> int:
        """The time on the clock of the cells."""

    def take(self, wants: Sequence[Rate | Count]) -> Busy | None:
        """Take all wants, or none of them."""

    def release(self, keys: Sequence[str]) -> None:
        """Give back one of each count."""

    def held(self, key: str) -> int:
        """How many of a count this process holds."""

    def used(self, key: str) -> int:
        """How many of a count all processes hold, as far as is known."""

    def catch_up(self) -> bool:
        """Tell other processes what they do not know yet; False if this is to be tried again."""

    def close(self) -> None:
        """Give back what this process holds."""


def boot_time() -> int:
    """Nanoseconds since the boot, sleep included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class MemoryCells:
    """`Cells` of one process, which are forgotten with it."""

    def __init__(self, clock: Callable[[], int] = boot_time, share: int = 1) -> None:
        self.now = clock
        self._share = share
        """Each limit is divided by this number; the process may use one part."""
        self._cells: dict[str, int] = {}
        self._counts: dict[str, int] = {}

    def take(self, wants: Sequence[Rate | Count]) -> Busy | None:
        now = self.now()
        for index, want in enumerate(wants):
            if isinstance(want, Count):
                if self._counts.get(want.key, 0) >= max(want.limit // self._share, 1):
                    return Busy(index, None)
            elif (cell := self._cells.get(want.key, 0)) > now:
                return Busy(index, cell)
        for want in wants:
            if isinstance(want, Count):
                self._counts[want.key] = self._counts.get(want.key, 0) + 1
            else:
                self._advance(want, now)
        return None

    def _advance(self, want: Rate, now: int) -> None:
        if want.cost:
            cell = self._cells.get(want.key, 0)
            self._cells[want.key] = advanced(cell, now, want.cost * self._share)
        if len(self._cells) > MAX_ROWS and len(self._cells) & 1023 == 0:
            self._cells = {key: cell for key, cell in self._cells.items() if cell > now}

    def release(self, keys: Sequence[str]) -> None:
        for key in keys:
            left = self._counts.pop(key, 0) - 1
            if left > 0:
                self._counts[key] = left

    def held(self, key: str) -> int:
        return self._counts.get(key, 0)

    used = held

    def catch_up(self) -> bool:
        return True

    def close(self) -> None:
        self._counts.clear()


_HEADER: Final = struct.Struct("=8s16sIIQ24x")
_MAGIC: Final = b"MQCELLS1"
_KEY_BYTES: Final = 16


class _Header(NamedTuple):
    """The header of the file: the boot and the number of processes that it is for.

    `generation` is odd while rows are being rewritten.
    """

    boot: bytes
    processes: int
    generation: int
    rows: int


class _Contended(Exception):
    """The file cannot be used at this moment: ask again in `RETRY`."""


class SharedCells:
    """`Cells` in a file that the processes of a queue directory share.

    `process` is the number of this process among `processes`; one process counts connections in
    memory. Faults of the file are logged, and never raised.
    """

    def __init__(
        self,
        path: str,
        process: int = 0,
        processes: int = 1,
        clock: Callable[[], int] = boot_time,
    ) -> None:
        self.now = clock
        self._path = path
        self._process = process
        self._processes = processes
        self._row = struct.Struct(f"={_KEY_BYTES}sq{processes}I")
        self._fallback = MemoryCells(clock, share=processes)
        self._boot = _boot()
        self._file = -1
        self._identity = (0, 0)
        self._unusable_until = 0
        self._header = _Header(self._boot, processes, -1, 0)
        self._seen: bytes | None = None  # the header in the file
        self._rows: dict[bytes, int] = {}
        self._compact_at = MAX_ROWS
        self._started = False  # numbers of an earlier process are cleared
        self._held: dict[str, int] = {}
        self._unwritten: set[str] = set()  # keys whose number differs from the file

    # What callers see

    def take(self, wants: Sequence[Rate | Count]) -> Busy | None:
        if self._processes == 1 and all(isinstance(want, Count) for want in wants):
            return self._take(wants, {}, 0)
        try:
            with self._locked():
                now = self.now()
                rows = {want.key: self._read(want.key) for want in wants}
                busy = self._take(wants, rows, now)
                if busy is None:
                    for want in wants:
                        if isinstance(want, Rate) and want.cost:
                            self._advance(want, rows[want.key], now)
                    self._write_numbers()
                return busy
        except _Contended:
            return Busy(0, self.now() + RETRY)
        except OSError as error:
            self._give_up(error)
            return self._take_alone(wants)

    def _take_alone(self, wants: Sequence[Rate | Count]) -> Busy | None:
        """Take from this process's part of the limits, without the file."""
        for index, want in enumerate(wants):
            if isinstance(want, Count):
                part = max(want.limit // self._processes, 1)
                if self._held.get(want.key, 0) >= part:
                    return Busy(index, None)
        rates = [(index, want) for index, want in enumerate(wants) if isinstance(want, Rate)]
        busy = self._fallback.take([rate for _, rate in rates])
        if busy is not None:
            return Busy(rates[busy.number][0], busy.until)
        for want in wants:
            if isinstance(want, Count):
                self._hold(want.key, +1)
        return None

    def _take(
        self, wants: Sequence[Rate | Count], rows: Mapping[str, _Values], now: int
    ) -> Busy | None:
        for index, want in enumerate(wants):
            if isinstance(want, Rate):
                if (cell := rows[want.key].cell) > now:
                    return Busy(index, cell)
            else:
                others = rows[want.key].others(self._process) if rows else 0
                if others + self._held.get(want.key, 0) >= want.limit:
                    return Busy(index, None)
        for want in wants:
            if isinstance(want, Count):
                self._hold(want.key, +1)
        return None

    def release(self, keys: Sequence[str]) -> None:
        for key in keys:
            if key in self._held:
                self._hold(key, -1)
        self.catch_up()

    def held(self, key: str) -> int:
        return self._held.get(key, 0)

    def used(self, key: str) -> int:
        others = 0
        if self._processes > 1:
            with suppress(_Contended, OSError), self._locked():
                others = self._read(key).others(self._process)
        return others + self.held(key)

    def close(self) -> None:
        self.release([key for key, number in self._held.items() for _ in range(number)])
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    # In memory

    def _hold(self, key: str, change: int) -> None:
        number = self._held.get(key, 0) + change
        if number:
            self._held[key] = number
        else:
            del self._held[key]
        if self._processes > 1:
            self._unwritten.add(key)

    def catch_up(self) -> bool:
        if self._unwritten:
            try:
                with self._locked():
                    pass
            except _Contended:
                pass
            except OSError as error:
                self._give_up(error)
        return not self._unwritten

    def _give_up(self, error: OSError) -> None:
        if self.now() < self._unusable_until:
            return
        self._unusable_until = self.now() + UNUSABLE
        log.error(
            "cannot count limits in %s: %s; each process counts its part alone, and the file is"
            " tried again every %d s",
            self._path,
            error.strerror or error,
            UNUSABLE // 1_000_000_000,
        )
        if self._file >= 0:
            with suppress(OSError):
                os.close(self._file)
            self._file = -1

    # In the file

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock, know all rows, and have written all numbers.

        Raises `OSError`, or `_Contended` if another process keeps the lock.
        """
        if self.now() < self._unusable_until:
            raise OSError(errno.EAGAIN, "was not usable")
        self._open()
        self._lock()
        try:
            self._look()
            self._write_numbers()
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _open(self) -> None:
        """Open the file, unless it is open and still the one at its path."""
        if self._file >= 0:
            found = os.fstat(self._file)
            if (found.st_dev, found.st_ino) != self._identity:
                self._file = -1  # a plugin closed the descriptor, which is another file's now
            elif not found.st_nlink:
                os.close(self._file)
                self._file = -1
        if self._file < 0:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            found = os.fstat(self._file)
            self._identity = found.st_dev, found.st_ino
            self._header, self._seen = self._header._replace(generation=-1, rows=0), None
            self._unwritten.update(self._held)

    def _lock(self) -> None:
        # Not a `FileLock`, since this file stays open, and is locked for each count.
        for _ in range(TRIES):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.sched_yield()
            else:
                return
        raise _Contended

    def _look(self) -> None:
        """Read the header, and the rows that are new since the last look."""
        data = os.pread(self._file, _HEADER.size, 0)
        if data == self._seen:
            return
        magic, *fields = _HEADER.unpack(data) if len(data) == _HEADER.size else (b"", b"", 0, 1, 0)
        header = _Header(*fields)
        sound = magic == _MAGIC and self._fits(header)
        if not sound or header.generation % 2 or header.boot != self._boot:
            if data and not sound:
                log.warning("%s is damaged: limits begin to count anew", self._path)
            self._rewrite({})
        elif header.processes != self._processes:
            self._rewrite(self._cells_of(header))
        elif header.generation != self._header.generation:
            self._rows.clear()
            self._learn(header, 0)
            self._unwritten.update(self._held)
        else:
            self._learn(header, self._header.rows)
        if not self._started:
            self._started = True
            for key, place in self._rows.items():
                values = self._values(place)
                if values.numbers[self._process]:
                    values.numbers[self._process] = 0
                    self._put(place, key, values)

    def _fits(self, header: _Header) -> bool:
        """Whether the file can hold what its header says."""
        rows = os.fstat(self._file).st_size - _HEADER.size
        row = _KEY_BYTES + 8 + 4 * header.processes
        return 1 <= header.processes <= MAX_PROCESSES and header.rows * row <= rows

    def _learn(self, header: _Header, first: int) -> None:
        """Note the places of the rows from `first` on."""
        size = self._row.size
        data = os.pread(self._file, (header.rows - first) * size, self._offset(first))
        for start in range(0, len(data) - size + 1, size):
            self._rows[data[start : start + _KEY_BYTES]] = first + start // size
        self._header, self._seen = header, _HEADER.pack(_MAGIC, *header)

    def _cells_of(self, header: _Header) -> dict[bytes, _Values]:
        """The cells of a file for another number of processes."""
        row = struct.Struct(f"={_KEY_BYTES}sq{header.processes}I")
        data = os.pread(self._file, header.rows * row.size, _HEADER.size)
        whole = data[: len(data) - len(data) % row.size]
        now = self.now()
        return {
            key: _Values(cell, [0] * self._processes)
            for key, cell, *_ in row.iter_unpack(whole)
            if cell > now
        }

    def _rewrite(self, rows: Mapping[bytes, _Values]) -> None:
        """Replace all rows. A process that ends in the middle leaves a file that begins anew."""
        generation = random.getrandbits(31) | 1  # a new one, even if the file has lost the old one
        self._write_header(_Header(self._boot, self._processes, generation, 0))
        data = b"".join(self._row.pack(key, v.cell, *v.numbers) for key, v in rows.items())
        os.ftruncate(self._file, _HEADER.size)
        if os.pwrite(self._file, data, _HEADER.size) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._write_header(self._header._replace(generation=generation + 1, rows=len(rows)))
        self._rows = {key: place for place, key in enumerate(rows)}
        self._unwritten.update(self._held)
        self._compact_at = max(MAX_ROWS, 2 * len(rows))

    def _write_header(self, header: _Header) -> None:
        self._seen = None
        os.pwrite(self._file, data := _HEADER.pack(_MAGIC, *header), 0)
        self._header, self._seen = header, data

    def _offset(self, place: int) -> int:
        return _HEADER.size + place * self._row.size

    def _read(self, key: str) -> _Values:
        place = self._rows.get(_digest(key))
        return _Values(0, [0] * self._processes) if place is None else self._values(place)

    def _values(self, place: int) -> _Values:
        data = os.pread(self._file, self._row.size, self._offset(place))
        if len(data) < self._row.size:
            self._seen = None  # the file has been cut, which the next look will find
            raise _Contended
        _, cell, *numbers = self._row.unpack(data)
        return _Values(cell, numbers)

    def _advance(self, want: Rate, values: _Values, now: int) -> None:
        values.cell = advanced(values.cell, now, want.cost)
        self._write(want.key, values)

    def _write_numbers(self) -> None:
        while self._unwritten:
            key = next(iter(self._unwritten))
            values = self._read(key)
            values.numbers[self._process] = self._held.get(key, 0)
            self._write(key, values)
            self._unwritten.discard(key)

    def _write(self, key: str, values: _Values) -> None:
        digest = _digest(key)
        place = self._rows.get(digest)
        if place is None:
            if self._header.rows >= self._compact_at:
                self._compact()
            place = self._header.rows
            self._put(place, digest, values)
            self._write_header(self._header._replace(rows=place + 1))
            self._rows[digest] = place
        else:
            self._put(place, digest, values)

    def _put(self, place: int, digest: bytes, values: _Values) -> None:
        data = self._row.pack(digest, values.cell, *values.numbers)
        if os.pwrite(self._file, data, self._offset(place)) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _compact(self) -> None:
        """Drop the rows that are at rest."""
        now = self.now()
        rows = {key: self._values(place) for key, place in self._rows.items()}
        alive = {key: v for key, v in rows.items() if v.cell > now or any(v.numbers)}
        self._rewrite(alive)


class _Values:
    """The values of a row."""

    __slots__ = ("cell", "numbers")

    def __init__(self, cell: int, numbers: list[int]) -> None:
        self.cell = cell
        self.numbers = numbers

    def others(self, process: int) -> int:
        return sum(self.numbers) - self.numbers[process]


def _digest(key: str) -> bytes:
    return blake2b(key.encode(), digest_size=_KEY_BYTES).digest()


def _boot() -> bytes:
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return blake2b(file.read(), digest_size=_KEY_BYTES).digest()
