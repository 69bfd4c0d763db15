r"""How text from outside stands in a log or on a terminal: the one escaping of both.

What could end a line, steer a terminal, turn the direction of text or hide in it becomes ``\x1b``,
``\u202e`` or ``\U000e0001``: control and format characters, separators but the plain space,
surrogates, and the few letters and marks that show nothing. A backslash is ``\\``, so what was
written can be told from what was escaped. All other text stays as it is, in any script.

A field stands between blanks, commas or brackets: these are escaped in it too, so nobody can
write a mail whose line in a log says something else.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["escape", "escape_field"]

INVISIBLE: Final = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
) | frozenset(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
"""Fillers, joiners and variation selectors, which are letters and marks to Unicode."""


class _Escapes:
    """What `str.translate` puts in place of a character. Nothing is kept: there are a million."""

    def __init__(self, more: str = "") -> None:
        self._more = frozenset(more)

    def __getitem__(self, code: int) -> int | str:
        char = chr(code)
        if char == "\\":
            return "\\\\"
        if char.isprintable() and char not in self._more and char not in INVISIBLE:
            return code
        if code < 0x100:
            return f"\\x{code:02x}"
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


BETWEEN: Final = " ,<>[]"
"""What stands between the fields of a line."""

_TEXT: Final = _Escapes()
_FIELD: Final = _Escapes(BETWEEN)

_is_plain: Final = re.compile(r"[!-+\--;=?-Z^-~]*+").fullmatch  # ASCII that stays as it is in both


def escape(text: str) -> str:
    r"""Text as it may stand at the end of a line.

    >>> print(escape("caf\xe9 \x1b[31m \\ \u202e"))
    café \x1b[31m \\ \u202e
    """
    if text.isascii() and text.isprintable() and "\\" not in text:
        return text
    return text.translate(_TEXT)


def escape_field(text: str) -> str:
    r"""Text as it may stand within a line.

    >>> print(escape_field('"a> <b"@c.test'))
    "a\x3e\x20\x3cb"@c.test
    """
    return text if _is_plain(text) else text.translate(_FIELD)
