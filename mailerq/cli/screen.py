"""The whole screen of a terminal, for a command that shows something live.

The terminal gets back its own screen, cursor and settings however the command ends, except by
`kill -9`.
"""

from __future__ import annotations

import os
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

__all__ = ["ESCAPE", "Screen", "keys_in", "on_terminal"]

ENTER: Final = "\x1b[?1049h\x1b[?25l"
"""Another screen, without a cursor."""

LEAVE: Final = "\x1b[0m\x1b[?25h\x1b[?1049l"

HOME: Final = "\x1b[H"
END_OF_LINE: Final = "\x1b[0m\x1b[K"
END_OF_SCREEN: Final = "\x1b[J"
BOLD: Final = "\x1b[1m"

ESCAPE: Final = "\x1b"

READ_BYTES: Final = 1024


def on_terminal() -> bool:
    """Whether a person is at both ends."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


class Screen:
    """The screen of the terminal at standard input and output."""

    def __init__(self) -> None:
        self.input = sys.stdin.fileno()
        self._output = sys.stdout.fileno()
        self._settings = termios.tcgetattr(self.input)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Take the screen, without echo and line editing, and give it back."""
        try:
            self.enter()
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Take the screen."""
        tty.setcbreak(self.input)
        self._write(ENTER)

    def leave(self) -> None:
        """Give the screen back. The terminal may be gone."""
        with suppress(OSError):
            self._write(LEAVE)
        with suppress(termios.error):
            termios.tcsetattr(self.input, termios.TCSADRAIN, self._settings)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines."""
        try:
            return os.get_terminal_size(self._output)
        except OSError:
            return 80, 24

    def draw(self, lines: Sequence[str], *, bold: Sequence[int] = ()) -> None:
        """Show printable lines, cut to the screen, the numbers of `bold` in bold."""
        columns, height = self.size
        shown = [
            (BOLD if number in bold else "") + line[:columns] + END_OF_LINE
            for number, line in enumerate(lines[:height])
        ]
        self._write(HOME + "\r\n".join(shown) + END_OF_SCREEN)

    def _write(self, text: str) -> None:
        # In another encoding a terminal could read the bytes of letters as its commands.
        data = memoryview(text.encode(sys.stdout.encoding or "ascii", "replace"))
        while data:
            data = data[os.write(self._output, data) :]

    def read(self) -> bytes:
        """What has been typed; empty if the terminal is gone."""
        try:
            return os.read(self.input, READ_BYTES)
        except OSError:
            return b""


def keys_in(data: bytes) -> Iterator[str]:
    r"""The keys in what was typed: printable characters, Enter, Backspace and `ESCAPE`.

    Arrows and other keys that send more than one byte mean nothing.

    >>> list(keys_in(b"a\x1b[Ab\r\x7f")), list(keys_in(b"\x1b"))
    (['a', 'b', '\n', '\x08'], ['\x1b'])
    """
    text = data.decode(errors="ignore")
    index = 0
    while index < len(text):
        key = text[index]
        index += 1
        if key == ESCAPE and text[index : index + 1] in ("[", "O"):
            index += 1
            while index < len(text) and not "@" <= text[index] <= "~":
                index += 1
            index += 1
        elif key in ("\r", "\n"):
            yield "\n"
        elif key in ("\x7f", "\x08"):
            yield "\x08"
        elif key == ESCAPE or key.isprintable():
            yield key
