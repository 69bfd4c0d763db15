r"""Escape text from outside for logs and terminals.

Characters that could end a line, control a terminal, change the direction of text or be invisible
become ``\x1b``, ``\u202e`` or ``\U000e0001``. These are control and format characters, separators
other than the plain space, surrogates, and the few letters and marks that show nothing. A
backslash becomes ``\\``, so the escaping is unambiguous. All other text of any script is kept.

In a field, blanks, commas and brackets are escaped too: they separate the fields of a log line,
and a mail must not be able to forge one.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["escape", "escape_field"]

INVISIBLE: Final = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
) | frozenset(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
"""Fillers, joiners and variation selectors, which Unicode classes as letters and marks."""


class _Escapes:
    """A table for `str.translate`, computed on demand: Unicode has a million characters."""

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
"""Characters that separate the fields of a line."""

_TEXT: Final = _Escapes()
_FIELD: Final = _Escapes(BETWEEN)

_is_plain: Final = re.compile(r"[!-+\--;=?-Z^-~]*+").fullmatch  # ASCII that neither table changes


def escape(text: str) -> str:
    r"""Escape text for the end of a line, where blanks need no escaping.

    >>> print(escape("caf\xe9 \x1b[31m \\ \u202e"))
    café \x1b[31m \\ \u202e
    """
    if text.isascii() and text.isprintable() and "\\" not in text:
        return text
    return text.translate(_TEXT)


def escape_field(text: str) -> str:
    r"""Escape a field within a line.

    >>> print(escape_field('"a> <b"@c.test'))
    "a\x3e\x20\x3cb"@c.test
    """
    return text if _is_plain(text) else text.translate(_FIELD)
