"""Find the known name that a misspelt name was meant to be.

The names come from messages, so the cost of a look-up depends on the length of the name only, not
on the number of known names. Recent look-ups are cached: most messages have the same names.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Final

__all__ = ["Spelling"]

LENGTH_LIMIT: Final = 40
"""Longer names are not looked up: no known name is this long."""

REMEMBERED: Final = 1024
"""Cached look-ups."""

LETTERS: Final = 6
"""In a name shorter than this, one different letter often makes another word: date is not data."""

_SEPARATORS: Final = str.maketrans("", "", "-_. ")


class Spelling:
    """Find known names at a distance of one slip.

    A slip is one letter that is missing, extra, misplaced or wrong. Letter case and separators are
    ignored.

    >>> spelling = Spelling(["maxattempts", "tags", "data"])
    >>> spelling.meant("Max_Attempt"), spelling.meant("date"), spelling.meant("tags")
    ('maxattempts', None, None)
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {_plain(name): name for name in names}
        self._exact = frozenset(self._names.values())
        self._shorter: dict[str, list[str]] = {}
        for plain in self._names:
            for form in _shorter(plain):
                self._shorter.setdefault(form, []).append(plain)
        self._find = functools.lru_cache(REMEMBERED)(self._look_up)

    def knows(self, name: str) -> bool:
        """Whether a name is one of the known names."""
        return name in self._exact

    def meant(self, name: str) -> str | None:
        """Return the known name that was meant; None if `name` is known or resembles none."""
        if name in self._exact or len(name) > LENGTH_LIMIT:
            return None
        return self._find(name)

    def _look_up(self, name: str) -> str | None:
        plain = _plain(name)
        found = plain if plain in self._names else self._one_slip_away(plain)
        return None if found is None else self._names[found]

    def _one_slip_away(self, plain: str) -> str | None:
        if (longer := self._shorter.get(plain)) is not None:
            return longer[0]
        forms = list(_shorter(plain))
        for form in forms:
            if form in self._names:
                return form
        for form in forms:
            for other in self._shorter.get(form, ()):
                if len(other) >= LETTERS or sorted(other) == sorted(plain):
                    return other
        return None


def _plain(name: str) -> str:
    return name.lower().translate(_SEPARATORS)


def _shorter(plain: str) -> Iterator[str]:
    """Yield the name without its first letter, without its second letter, and so on."""
    return (plain[:at] + plain[at + 1 :] for at in range(len(plain)))
