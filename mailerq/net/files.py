"""Files that people edit while the engine runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["WatchedFile"]

T = TypeVar("T")


class WatchedFile(Generic[T]):
    """What `parse` makes of a text file, made anew when the file has changed.

    Looking costs one stat. A file that is written in place may be seen half written, one that
    is renamed into its place never is.
    """

    def __init__(self, path: str, parse: Callable[[str], T]) -> None:
        self.path = path
        self._parse = parse
        self._seen: tuple[int, int, int] | None = None
        self._value: T

    def read(self) -> T:
        """The newest content. Raises OSError, and ValueError when it is no text or `parse` does.

        After an error the next call tries again.
        """
        status = os.stat(self.path)
        seen = (status.st_mtime_ns, status.st_ino, status.st_size)
        if seen != self._seen:
            with open(self.path, encoding="utf-8") as file:
                self._value = self._parse(file.read())
            self._seen = seen
        return self._value
