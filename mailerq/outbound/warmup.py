"""On how many days an address has sent, for limits that grow by the day.

An address that begins to send has a limit for its first day, another for its second, and so on. A
day counts only if the address sent on it. The days are those of UTC. They are kept in a small file
of the queue directory, which all its processes share; it is written once a day for each address, by
its first message. While the file cannot be used, each process counts in memory.

Everything here runs on the home worker.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable

from mailerq.locks import FileLock, Held
from mailerq.net.logs import Ration

__all__ = ["Days"]

log = logging.getLogger("mailerq.delivery")


class Days:
    """The days of sending of addresses. Without a `path` they are forgotten with the process.

    >>> days = Days(clock=lambda: 0.0)
    >>> days.of("192.0.2.1"), days.sent("192.0.2.1"), days.of("192.0.2.1"), days.sent("192.0.2.1")
    (1, True, 1, False)
    """

    def __init__(self, path: str | None = None, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._days: dict[str, tuple[int, str]] = {}
        self._say_unkept = Ration(log.error, 1, "the days could not be kept %d times more")
        if path is not None:
            self._read()

    def of(self, key: str) -> int:
        """The number of the day that counts now: of today if there was mail, else of the next."""
        count, last = self._days.get(key, (0, ""))
        return count if last == self._today() else count + 1

    def sent(self, key: str) -> bool:
        """Note that mail has been sent; return whether a new day has begun by that."""
        today = self._today()
        if self._days.get(key, (0, ""))[1] == today:
            return False
        try:
            if self._path is not None:
                self._note(self._path, key, today)
        except Held:
            return False  # another process writes: the next message tries again
        except OSError as error:
            self._say_unkept("cannot keep the days of sending in %s: %s", self._path, error)
        self._count(key, today)
        return True

    def _today(self) -> str:
        return time.strftime("%Y-%m-%d", time.gmtime(self._clock()))

    def _count(self, key: str, today: str) -> None:
        count, last = self._days.get(key, (0, ""))
        if last != today:
            self._days[key] = count + 1, today

    def _note(self, path: str, key: str, today: str) -> None:
        """Count a day in the file, unless another process has. Raises `Held`, OSError."""
        lock = FileLock(os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        try:
            self._read(locked=True)
            self._count(key, today)
            self._write(path)
        finally:
            lock.close()

    def _write(self, path: str) -> None:
        new = path + ".new"
        with open(new, "w", encoding="ascii") as file:
            json.dump(self._days, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)

    def _read(self, *, locked: bool = False) -> None:
        """Take over what the file has, where that is more.

        With the lock, set a damaged file aside, and raise OSError for one that cannot be read.
        """
        assert self._path is not None, "only called with a file"
        try:
            with open(self._path, encoding="ascii") as file:
                found = json.load(file)
            days = {key: (int(count), str(last)) for key, (count, last) in found.items()}
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
            self._say_unkept("cannot read the days of sending in %s: %s", self._path, error)
            if locked and isinstance(error, OSError):
                raise
            if locked:
                os.replace(self._path, self._path + ".damaged")
            return
        for key, (count, last) in days.items():
            self._days[key] = max(self._days.get(key, (0, "")), (count, last))
