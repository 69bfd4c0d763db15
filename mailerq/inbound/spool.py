"""Where incoming mail is kept: in memory, which is counted, or in a file.

A mail above `smtp-spill-size`, or any large one while memory is short, goes to an unnamed file in
the queue directory, so nothing is left of it when the process dies. The finished mail is a view of
the file, mapped into memory. To publish it, `load` reads it into memory, a few mails at a time.
Plugins may hold any number of mails, within `max-memory` (`Claim`). Other large mail is collected
in a `Buffer`. Plugins get a view of the buffer, which then becomes the body of the messages. A NUL
follows the last byte of either view, as plugins expect.

A mail is in memory once: `load` releases the pages of the file as it copies them.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Awaitable
from contextlib import suppress
from io import FileIO
from typing import Final, TypeVar

import trio

from mailerq.plugins import NOTHING, stray_close
from mailerq.sockets import Mapping
from mailerq.wire._lines import Buffer

__all__ = ["Claim", "Memory", "Spool", "is_in_file", "load"]

T = TypeVar("T")

log = logging.getLogger("mailerq.server")

WRITE_BYTES: Final = 1 << 19
"""Bytes collected for one write: handing it to a thread costs 0.1 ms."""

COPY_BYTES: Final = 1 << 17
"""Bytes copied out of a file at a time; they are in memory twice."""

HELD_SHARE: Final = 0.5
"""The share of memory for large mails that plugins hold; the rest is for other mail."""


class Memory:
    """The bytes of mail that all sessions hold. `limit` 0: none. Any thread may use it."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.used = 0
        self.held = 0
        """The part of `used` that plugins hold of mails read from files."""
        self._lock = threading.Lock()

    @property
    def is_full(self) -> bool:
        return self.used >= self.limit > 0

    def add(self, count: int) -> None:
        """Count bytes that are held from now on; negative: no longer held."""
        with self._lock:
            self.used += count

    def hold(self, count: int) -> None:
        """Count bytes that a plugin holds; negative: no longer holds."""
        with self._lock:
            self.held += count

    def has_room(self, count: int) -> bool:
        """Whether a mail of this size may be read from its file."""
        return not self.held or self.held + count <= self.limit * HELD_SHARE or not self.limit


class Claim:
    """The memory of one mail while plugins see it and it is published.

    A mail in memory counts from the beginning. A mail in a file counts from `load` on; it then has
    one of the worker's few `turns`, except while a plugin holds it. Call `end` in any case.
    """

    __slots__ = ("_counted", "_has_turn", "_memory", "_size", "_turns")

    def __init__(self, memory: Memory, size: int, turns: trio.CapacityLimiter | None) -> None:
        self._memory = memory
        self._size = size
        self._turns = turns
        self._counted = 0
        self._has_turn = False
        if turns is None:
            self._count(size)

    async def load(self) -> bool:
        """Wait until the whole mail may be in memory; False if memory is too full."""
        if self._turns is not None:
            await self._take_turn()
            if not self._memory.has_room(self._size):
                return False
            self._count(self._size)
        return True

    async def ask(self, asked: Awaitable[T]) -> T:
        """Wait for the plugins, and lend the turn to other mails meanwhile."""
        if asked is NOTHING or not self._has_turn:
            return await asked
        self._give_turn()
        self._memory.hold(self._size)
        try:
            answer = await asked
        finally:
            self._memory.hold(-self._size)
        await self._take_turn()
        return answer

    def end(self) -> None:
        self._count(0)
        if self._has_turn:
            self._give_turn()

    def _count(self, size: int) -> None:
        self._memory.add(size - self._counted)
        self._counted = size

    async def _take_turn(self) -> None:
        assert self._turns is not None, "only mails in files take turns"
        await self._turns.acquire_on_behalf_of(self)
        self._has_turn = True

    def _give_turn(self) -> None:
        assert self._turns is not None, "only mails in files take turns"
        self._has_turn = False
        self._turns.release_on_behalf_of(self)


class Spool:
    """A `mailerq.wire.framing.Sink` for one mail at a time.

    The task that feeds the machine reports to `came` how much has arrived, and awaits `flush` when
    `is_due`. So memory holds no more than `WRITE_BYTES` and the machine's own data. `close` ends a
    mail in any case, and makes the spool ready for the next.
    """

    __slots__ = (
        "_buffer", "_counted", "_directory", "_file", "_limit", "_memory", "_threshold", "_written",
        "failed",
    )  # fmt: skip

    def __init__(self, memory: Memory, directory: str, threshold: int) -> None:
        self.failed: OSError | None = None  # why the mail could not be kept and is lost
        self._memory = memory
        self._directory = directory
        self._limit = self._threshold = threshold or float("inf")
        self._file: FileIO | None = None
        self._buffer = Buffer()  # bytes not in the file
        self._written = 0
        self._counted = 0  # bytes counted in `_memory`

    @property
    def is_due(self) -> bool:
        """Whether a flush is due."""
        if self._file is not None:
            return len(self._buffer) >= WRITE_BYTES
        waiting = len(self._buffer)
        return waiting > self._threshold or (self._memory.is_full and waiting > 0)

    def came(self, size: int) -> None:
        """`size` bytes of the mail have arrived; count those in memory."""
        held = max(size - self._written, 0)
        if held != self._counted:
            self._memory.add(held - self._counted)
            self._counted = held

    async def flush(self) -> None:
        """Write the buffer out. Errors show in `failed`."""
        if self._file is None and self.failed is None:
            try:
                self._file = tempfile.TemporaryFile(  # noqa: SIM115 - `close` closes it
                    dir=self._directory, buffering=0
                )
            except OSError as error:
                log.warning("%s: no file for a large mail: %s", self._directory, error.strerror)
                self._threshold = float("inf")  # memory may still have room
                return
        await trio.to_thread.run_sync(self._write_out)

    def write(self, block: bytes) -> None:
        self._buffer.add(block)

    def finish(self) -> memoryview:
        if self._file is None:
            return memoryview(self._buffer)
        self._buffer.add(b"\0")
        self._write_out()
        if self.failed is None:
            try:
                return memoryview(Mapping(self._file.fileno(), self._written))[:-1]
            except OSError as error:
                self.failed = error
        return memoryview(b"")

    def discard(self) -> None:
        self._buffer = Buffer()
        self._written = 0
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                stray_close("the file of a large mail")
            self._file = None
            self._threshold = float("inf")

    def close(self) -> None:
        """Release everything except the result of `finish`."""
        if self._counted:
            self._memory.add(-self._counted)
            self._counted = 0
        if len(self._buffer) or self._file is not None or self._threshold != self._limit:
            self.discard()
            self._threshold = self._limit
            self.failed = None

    def _write_out(self) -> None:
        assert self._file is not None
        with memoryview(self._buffer) as data:
            written = 0
            try:
                while written < len(data) and self.failed is None:
                    written += self._file.write(data[written:]) or 0
            except OSError as error:
                self.failed = error
        self._written += written
        self._buffer.clear()


def is_in_file(body: bytes | memoryview) -> bool:
    """Whether a body from `Spool.finish` is in a file."""
    return isinstance(body, memoryview) and isinstance(body.obj, Mapping)


def load(body: memoryview, count: int, head: bytes) -> bytes:
    """Turn a view from `Spool.finish` into a body, with `head` instead of the first `count` bytes.

    The view is released. This takes time, so run it in a thread for a large mail. If another view
    of a buffer exists, it stays valid, and the body is a copy.
    """
    source = body.obj
    with suppress(BufferError):
        body.release()
    if isinstance(source, Buffer) and not source.views:
        source.replace(count, head)
        return source.take()
    whole = memoryview(source)
    size = len(whole) - isinstance(source, Mapping)  # without the NUL
    copy = Buffer(len(head) + size - count)
    copy.add(head)
    for at in range(count, size, COPY_BYTES):
        copy.add(whole[at : min(at + COPY_BYTES, size)])
        if isinstance(source, Mapping):
            source.forget()
    return copy.take()
