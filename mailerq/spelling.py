"""Which of the known names a misspelt one was meant to be.

The names come from messages, so a look-up is bounded by the length of the name and takes no
longer where more names are known. The last ones are remembered, for most messages have the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Final

__all__ = ["Spelling"]

LENGTH_LIMIT: Final = 40
"""Characters of a name that is looked at; no known one is as long."""

REMEMBERED: Final = 1024
"""Names that a look-up was made for."""

LETTERS: Final = 6
"""Below this length a wrong letter may well be another word: date is not data."""

_SEPARATORS: Final = str.maketrans("", "", "-_. ")


class Spelling:
    """Knows names, and finds the one that is a single slip away from another.

    A slip is a letter that is missing, one too many, in the wrong place or wrong; letter case and
    separators do not count.

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

    def meant(self, name: str) -> str | None:
        """The known name that was meant; None for one that is known itself, or like none."""
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
    """The name without one of its letters, for each of them."""
    return (plain[:at] + plain[at + 1 :] for at in range(len(plain)))
