"""Log files with one line for each event, which survive being moved away by logrotate."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

from mailerq.escaping import escape
from mailerq.message import format_time

__all__ = ["LogFile"]

CHECK_SECONDS: Final = 1.0
"""How often a log looks whether its file is still there."""


class LogFile:
    """A file that lines are appended to.

    Each line is one write to a file opened for appending, so threads and processes can
    share it. When the file is gone (logrotate has moved it) a new one is opened. A disk
    that is full costs log lines, never mail: `lost_lines` counts them.
    """

    def __init__(self, path: str, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._file = _open(path)
        self._checked = 0.0
        self.lost_lines = 0

    def write(self, text: str) -> None:
        """Write one line, with the date before it.

        What comes from outside has been escaped (see `mailerq.escaping`), which makes it
        printable. A line that is not printable is escaped as a whole.
        """
        now = self._clock()
        if abs(now - self._checked) > CHECK_SECONDS:
            self._checked = now
            self._reopen_if_gone()
        shown = text if text.isprintable() else escape(text)
        line = f"[{format_time(now)}] {shown}\n".encode()
        try:
            os.write(self._file, line)
        except OSError:
            self.lost_lines += 1

    def close(self) -> None:
        os.close(self._file)

    def _reopen_if_gone(self) -> None:
        try:
            there, ours = os.stat(self._path), os.fstat(self._file)
            gone = (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)
        except FileNotFoundError:
            gone = True
        except OSError:
            return
        if gone:
            try:
                file = _open(self._path)
            except OSError:
                return
            # The number stays: another thread may be about to write to it.
            os.dup2(file, self._file, inheritable=False)
            os.close(file)


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
