"""Which process owns a queue directory: a lock that also records how its holders ended.

Theory of operation
-------------------
A process holds an exclusive lock on ``queue.lock`` while it has the directory open for deliveries.
The kernel releases the lock when the process ends, for any reason. The text of the file is for the
next holder: the process id, and for an adopted share the time of the adoption and the number of
adopters that ended soon afterwards.

A message can kill every process that touches it. So each adoption counts as a death until `prove`
says that it lasted, and each death doubles the pause before the next adoption. The share's own
process starts as often as its parent allows, and keeps the count.

The own process claims its share by a lock on ``queue.wanted``. The holder of an adopted share
checks for that lock (`is_wanted`) and releases the share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, Self

from mailerq.errors import QueueError, QueueHeld
from mailerq.locks import SHARED, FileLock, Held, holder_of
from mailerq.privileges import give_to

__all__ = ["LOCK_NAME", "DirectoryLock", "holder", "make_directory", "wanted"]

LOCK_NAME: Final = "queue.lock"
WANTED_NAME: Final = "queue.wanted"

MIN_QUARANTINE_SECONDS: Final = 60.0
MAX_QUARANTINE_SECONDS: Final = 3600.0
"""Longest pause before a share is adopted again; each early death of an adopter doubles it."""


class DirectoryLock:
    """The lock of one directory, held from `take` or `adopt` to `release`."""

    def __init__(self, directory: str) -> None:
        """Take the lock. Raises `QueueHeld`, and `OSError`."""
        path = os.path.join(directory, LOCK_NAME)
        self._directory = directory
        self.deaths = 0
        """Processes that ended soon after adopting the directory, this one included."""
        self._since = 0.0
        self._before = (0, 0.0)
        self._noted = False
        try:
            self.file = FileLock(_create(path))
        except Held as held:
            raise QueueHeld(
                f"{path}: held by another mailerq, process {held.holder}; stop it or use another "
                "queue-directory",
                adopted=_parse(held.text)[0],
            ) from None
        _, self.deaths, self._since = _parse(self.file.text)
        self._before = self.deaths, self._since

    @classmethod
    def take(cls, directory: str) -> Self:
        """Lock a directory for its own process. Raises `QueueHeld`, `OSError`."""
        lock = cls(directory)
        lock._write("own")
        return lock

    @classmethod
    def adopt(cls, directory: str, now: float) -> Self:
        """Lock a directory for another than its own process.

        Raises `QueueHeld`, `OSError`, and `QueueError` while the directory is in quarantine.
        """
        lock = cls(directory)
        seconds = quarantine_seconds(lock.deaths)
        if 0 <= now - lock._since < seconds:
            deaths = lock.deaths
            lock.release()
            raise QueueError(
                f"{deaths} processes ended soon after they had adopted {directory}: no process "
                f"adopts it for {seconds:.0f} seconds"
            )
        lock.deaths += 1
        lock._since = now
        lock._write("adopted")
        return lock

    def prove(self) -> None:
        """The holder has lasted: the directory's contents kill no process. Raises `OSError`."""
        if self.deaths and self.file.fd >= 0:
            self.file.check()
            self.deaths, self._since = 0, 0.0
            self._before = 0, 0.0
            self._write("adopted" if _parse(self.file.text)[0] else "own")

    def is_wanted(self) -> bool:
        """Whether the directory's own process waits for it."""
        try:
            file = os.open(os.path.join(self._directory, WANTED_NAME), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        return holder_of(file) is not None

    def release(self) -> None:
        """Release the lock, once: an adoption that ends in order is no death. Raises `OSError`."""
        if self.file.fd < 0:
            return
        self.deaths, self._since = self._before
        with suppress(OSError):  # on a disk now read-only the lock file keeps its text
            if self._noted:
                self.file.check()
                self._write("free")
        self.file.close()

    def _write(self, role: str) -> None:
        text = f"{os.getpid()}"
        if self.deaths or role != "own":
            text += f" {role} {self.deaths} {self._since!r}"
        self._noted = True
        self.file.write(text)


def _create(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)


def _parse(text: str) -> tuple[bool, int, float]:
    """Whether the holder adopted the directory, deaths, and time of the adoption."""
    words = text.split()
    words += ["0", "own", "0", "0"][len(words) :]
    try:
        int(words[0])
        return words[1] == "adopted", int(words[2]), float(words[3])
    except ValueError:
        return False, 0, 0.0


def quarantine_seconds(deaths: int) -> float:
    """The pause after this many deaths before a directory may be adopted.

    >>> [quarantine_seconds(deaths) for deaths in (0, 1, 2, 3, 100)]
    [0.0, 60.0, 120.0, 240.0, 3600.0]
    """
    if not deaths:
        return 0.0
    return min(MIN_QUARANTINE_SECONDS * 2.0 ** min(deaths - 1, 30), MAX_QUARANTINE_SECONDS)


def holder(directory: str) -> str | None:
    """The process that delivers from a directory, None if there is none. Raises `OSError`."""
    try:
        file = os.open(os.path.join(directory, LOCK_NAME), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    return holder_of(file)


def make_directory(directory: str, user: str = "") -> None:
    """Create the directory if it is missing, so that it survives a power cut.

    Root creates it for `user`, the account that the daemon changes to. Raises `QueueError`.
    """
    if os.path.isdir(directory):
        return
    try:
        os.makedirs(directory, mode=0o750, exist_ok=True)
        give_to(user, directory)
        above = os.open(os.path.dirname(os.path.abspath(directory)), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(above)
        finally:
            os.close(above)
    except OSError as error:
        raise QueueError(f"queue-directory {directory} cannot be made: {error.strerror}") from error


@contextmanager
def wanted(directory: str) -> Iterator[None]:
    """Signal that the directory's own process waits for it. Raises `OSError`."""
    # Others hold the lock for a moment to see whether it is held.
    lock = FileLock(_create(os.path.join(directory, WANTED_NAME)), SHARED, wait=True)
    try:
        yield
    finally:
        lock.close()
