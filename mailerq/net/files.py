"""Files that people edit while the engine runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["WatchedFile"]

T = TypeVar("T")


class WatchedFile(Generic[T]):
    """The parsed content of a text file, parsed again when the file changes.

    A check costs one stat. A file written in place may be read half written; a file renamed into
    place is always read whole.
    """

    def __init__(self, path: str, parse: Callable[[str], T]) -> None:
        self.path = path
        self._parse = parse
        self._seen: tuple[int, int, int] | None = None
        self._value: T

    def read(self) -> T:
        """Return the current content. Raises OSError, ValueError for invalid text, or errors of
        `parse`.

        After an error the next call tries again.
        """
        status = os.stat(self.path)
        seen = (status.st_mtime_ns, status.st_ino, status.st_size)
        if seen != self._seen:
            with open(self.path, encoding="utf-8") as file:
                self._value = self._parse(file.read())
            self._seen = seen
        return self._value
