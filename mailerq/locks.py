"""Locks on files and directories; the kernel releases them when their holder ends."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Final

__all__ = ["EXCLUSIVE", "SHARED", "FileLock", "Held", "Lead", "holder_of", "open_directory"]

EXCLUSIVE: Final = fcntl.LOCK_EX
SHARED: Final = fcntl.LOCK_SH

MAX_TEXT: Final = 100
"""Bytes of a locked file that are read."""


class Held(Exception):
    """Another process holds the lock. `text` is what the file says about the holder."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    @property
    def holder(self) -> str:
        """The first word of the text, the process id of the holder; or "unknown"."""
        words = self.text.split(maxsplit=1)
        return words[0] if words and words[0].isdecimal() else "unknown"


class FileLock:
    """A file that is open and locked until `close`. Its text tells others who holds the lock."""

    def __init__(self, file: int, kind: int = EXCLUSIVE, *, wait: bool = False) -> None:
        """Lock an open file, which from now on belongs to the lock.

        Raises `Held` unless it may `wait`, and `OSError`; either closes the file.
        """
        self.fd = file
        """-1 once it is closed."""
        try:
            fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
            self._identity = _identity(file)
        except OSError as error:
            text = _text(file)
            os.close(file)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise Held(text) from None
            raise

    def check(self) -> None:
        """Raise `OSError` if a plugin has closed the file; its number may be reused by now."""
        if _identity(self.fd) != self._identity:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    @property
    def text(self) -> str:
        return _text(self.fd)

    def write(self, text: str) -> None:
        """Replace the text. Raises `OSError`."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, f"{text}\n".encode(), 0)

    def close(self) -> None:
        """Release the lock, once. Raises `OSError` as `check` does, and leaves the file alone."""
        if self.fd < 0:
            return
        try:
            self.check()
            os.close(self.fd)
        finally:
            self.fd = -1


class Lead:
    """Leadership by a file lock: the process that holds the lock acts for all."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock: FileLock | None = None

    def take(self) -> bool:
        """Whether this process leads; it does from the first time on. Raises `OSError`.

        The kernel releases the lock when the process ends, and another one leads.
        """
        try:
            if self._lock is not None:
                self._lock.check()
                return True
        except OSError:
            self._lock = None  # a plugin has closed the file
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._lock = FileLock(os.open(self.path, flags, 0o600))
        except Held:
            return False
        return True

    def close(self) -> None:
        """Let another process lead. Raises `OSError` as `FileLock.close` does."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()


def open_directory(path: str) -> int:
    """Open a directory, to lock it. Raises `OSError`."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def holder_of(file: int) -> str | None:
    """Who holds the lock of an open file, which is closed; None if nobody. Raises `OSError`.

    For a moment the lock may be ours, and held for others.
    """
    try:
        FileLock(file).close()
    except Held as held:
        return held.holder
    return None


def _identity(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_dev, found.st_ino


def _text(file: int) -> str:
    """The start of a file; empty for a directory, and where the disk cannot be read."""
    try:
        return os.pread(file, MAX_TEXT, 0).decode(errors="replace")
    except OSError:
        return ""
