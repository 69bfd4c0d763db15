"""Log files with one line per event, which survive logrotate, and rate limits for log lines."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Final

from mailerq.escaping import escape
from mailerq.message import format_time
from mailerq.plugins import stray_close
from mailerq.turns import EndOfTurn

__all__ = ["RATION_SECONDS", "LogFile", "Ration", "open_log"]

CHECK_SECONDS: Final = 1.0
"""How often a log checks that its file still exists."""

RATION_SECONDS: Final = 60.0


class LogFile:
    """A file for appended lines.

    Whole lines are written to a file opened for appending, so threads and processes can share it.
    When logrotate has moved the file, a new one is opened. A full disk costs log lines, never mail:
    `lost_lines` counts them.
    """

    def __init__(self, path: str, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._file = open_log(path)
        self._opened = _identity(self._file)
        self._checked = 0.0
        self._soon: dict[EndOfTurn, list[bytes]] = {}
        """Lines of this turn, by the loop that they come from."""
        self._is_torn = False
        """The file ends within a line."""
        self.lost_lines = 0

    def write(self, text: str) -> None:
        """Write one line, with the date before it.

        Callers escape foreign text (see `mailerq.escaping`), so it is printable. A line that is not
        printable is escaped as a whole.
        """
        self._append(self._line(text))

    def write_soon(self, text: str) -> None:
        """Write one line together with the others of this turn of the calling loop."""
        end = EndOfTurn.of_this_loop()
        lines = self._soon.get(end)
        if lines is None:
            lines = self._soon[end] = []
            end.call(self._write_turn)
        lines.append(self._line(text))

    def _write_turn(self, _: bool) -> bool:
        self._write_lines(EndOfTurn.of_this_loop())
        return False

    def _write_lines(self, end: EndOfTurn) -> None:
        lines = self._soon.pop(end, None)
        if lines:
            self._append(b"".join(lines))

    def _line(self, text: str) -> bytes:
        now = self._clock()
        if abs(now - self._checked) > CHECK_SECONDS:
            self._checked = now
            self._reopen_if_gone()
        shown = text if text.isprintable() else escape(text)
        return f"[{format_time(now)}] {shown}\n".encode()

    def _append(self, lines: bytes) -> None:
        rest = lines
        try:
            if self._is_torn:
                os.write(self._file, b"\n")
                self._is_torn = False
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            self.lost_lines += rest.count(b"\n")
            if 0 < len(rest) < len(lines):
                self._is_torn = not lines.endswith(b"\n", 0, -len(rest))

    def move(self, path: str, file: int) -> None:
        """Continue in another file, which `open_log` has opened. Any thread may write meanwhile."""
        self._path = path
        self._replace(file)

    def check_soon(self) -> None:
        """Check the file before the next line."""
        self._checked = 0.0

    def close(self) -> None:
        if _identity(self._file) == self._opened:
            for end in list(self._soon):
                self._write_lines(end)
            os.close(self._file)
        else:
            stray_close(f"the log {self._path}")

    def _reopen_if_gone(self) -> None:
        try:
            there = os.stat(self._path)
            gone = (
                _identity(self._file) != self._opened
                or (there.st_dev, there.st_ino) != self._opened
            )
        except FileNotFoundError:
            gone = True
        except OSError:
            return
        if not gone:
            return
        try:
            file = open_log(self._path)
        except OSError:
            return
        self._replace(file)

    def _replace(self, file: int) -> None:
        """Write to a new file from now on."""
        if _identity(self._file) == self._opened:
            # Keep the number: another thread may be about to write to it.
            try:
                os.dup2(file, self._file, inheritable=False)
            except OSError:  # this process may no longer have descriptors of this number
                self._file = file
            else:
                os.close(file)
        else:
            # A plugin may have closed the number, and another file may have it.
            self._file = file
            stray_close(f"the log {self._path}")
        self._opened = _identity(self._file)
        self._is_torn = False


class Ration:
    """Lines of one kind in the program's log, at most `per_minute`. Any thread may use it.

    Further lines are counted. The count is a line of its own before the next line; `flush` and
    `flush_late` write the count if no next line may come.

    >>> seconds, said = 0.0, []
    >>> ration = Ration(lambda form, *values: said.append(form % values), 2,
    ...     "%d more", clock=lambda: seconds)
    >>> for number in range(5):
    ...     ration("line %d", number)
    >>> seconds = 60.0
    >>> ration("line %d", 5)
    >>> said
    ['line 0', 'line 1', '3 more', 'line 5']
    """

    def __init__(
        self,
        say: Callable[..., object],
        per_minute: int,
        summary: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say = say
        self._per_minute = per_minute
        self._summary = summary
        self._clock = clock
        self._lock = threading.Lock()
        self._began = -RATION_SECONDS
        self._said = 0
        self.left_out = 0

    def __call__(self, form: str, *values: object) -> None:
        """Write a line as `logging` does, or count it."""
        with self._lock:
            now = self._clock()
            if now - self._began >= RATION_SECONDS:
                self._began, self._said = now, 0
            self._said += 1
            if self._said > self._per_minute:
                self.left_out += 1
                return
        self.flush()
        self._say(form, *values)

    def flush_late(self) -> None:
        """Log the count if the minute is over; cheap if nothing was left out."""
        if self.left_out and self._clock() - self._began >= RATION_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Log how many lines were left out, if any."""
        with self._lock:
            left_out, self.left_out = self.left_out, 0
        if left_out:
            self._say(self._summary, left_out)


def open_log(path: str) -> int:
    """The descriptor of a log, created if missing. Raises OSError."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)


def _identity(file: int) -> tuple[int, int] | None:
    """The file behind a descriptor; None if closed."""
    try:
        status = os.fstat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino
