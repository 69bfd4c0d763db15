"""Where mail is while it comes in: in memory, which is counted, or in a file.

A mail above `smtp-spill-size`, or any large one while memory is short, is written to a file of
the queue directory that has no name, so nothing is left of it when the process dies. What it is
at the end is a view of that file, mapped into memory; behind its last byte is a NUL, as
plugins expect it.
"""

from __future__ import annotations

import logging
import mmap
import tempfile
import threading
from io import FileIO
from typing import Final

import trio

__all__ = ["Memory", "Spool"]

log = logging.getLogger("mailerq.server")

WRITE_BYTES: Final = 1 << 20
"""Bytes that gather before they are written in one go: handing that to a thread costs 0.1 ms."""


class Memory:
    """The bytes of mail that all sessions hold. `limit` 0 is none. Any thread may use it."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()

    @property
    def is_full(self) -> bool:
        return self.used >= self.limit > 0

    def add(self, count: int) -> None:
        """Count bytes that are held from now on, or with a minus sign no longer."""
        with self._lock:
            self.used += count


class Spool:
    """A `mailerq.wire.framing.Sink` for one mail at a time.

    The task that feeds the machine tells it by `came` how much has come in, and awaits `flush`
    when it `is_due`, so that no more than `WRITE_BYTES` and what the machine itself has
    wait in memory. `close` ends a mail in any case, and makes it ready for the next.
    """

    __slots__ = (
        "_blocks", "_counted", "_directory", "_file", "_limit", "_memory", "_threshold",
        "_waiting", "_written", "failed",
    )  # fmt: skip

    def __init__(self, memory: Memory, directory: str, threshold: int) -> None:
        self.failed: OSError | None = None  # why the mail could not be kept, which then is lost
        self._memory = memory
        self._directory = directory
        self._limit = self._threshold = threshold or float("inf")
        self._file: FileIO | None = None
        self._blocks: list[bytes] = []
        self._waiting = 0  # bytes in `_blocks`
        self._written = 0
        self._counted = 0  # bytes that `_memory` knows of

    @property
    def spilled(self) -> bool:
        """Whether it is in a file."""
        return self._file is not None

    @property
    def is_due(self) -> bool:
        """Whether there is enough to write."""
        if self._file is not None:
            return self._waiting >= WRITE_BYTES
        return self._waiting > self._threshold or (self._memory.is_full and self._waiting > 0)

    def came(self, size: int) -> None:
        """Of the mail `size` bytes have come in; those that are in memory are counted."""
        held = max(size - self._written, 0)
        if held != self._counted:
            self._memory.add(held - self._counted)
            self._counted = held

    async def flush(self) -> None:
        """Write what waits. Errors show in `failed`."""
        if self._file is None and self.failed is None:
            try:
                self._file = tempfile.TemporaryFile(  # noqa: SIM115 - `close` closes it
                    dir=self._directory, buffering=0
                )
            except OSError as error:
                log.warning("%s: no file for a large mail: %s", self._directory, error.strerror)
                self._threshold = float("inf")  # there may be memory for it
                return
        await trio.to_thread.run_sync(self._write_out)

    def write(self, block: bytes) -> None:
        self._blocks.append(block)
        self._waiting += len(block)

    def finish(self) -> bytes | memoryview:
        if self._file is None:
            return b"".join(self._blocks)
        self._blocks.append(b"\0")
        self._write_out()
        if self.failed is not None:
            return b""
        return memoryview(mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ))[:-1]

    def discard(self) -> None:
        self._blocks.clear()
        self._waiting = 0
        self._written = 0
        if self._file is not None:
            self._file.close()
            self._file = None
            self._threshold = float("inf")

    def close(self) -> None:
        """Let go of everything but what `finish` gave."""
        if self._counted:
            self._memory.add(-self._counted)
            self._counted = 0
        if self._blocks or self._file is not None or self._threshold != self._limit:
            self.discard()
            self._threshold = self._limit
            self.failed = None

    def _write_out(self) -> None:
        assert self._file is not None
        data = memoryview(b"".join(self._blocks))
        self._blocks.clear()
        self._waiting = 0
        try:
            while data and self.failed is None:
                count = self._file.write(data) or 0
                self._written += count
                data = data[count:]
        except OSError as error:
            self.failed = error
