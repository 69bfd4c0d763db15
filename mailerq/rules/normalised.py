"""Reply texts without what differs from reply to reply, so that equal reasons can be counted."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Final

__all__ = ["Unclassified", "normalised"]

MAX_TEXTS: Final = 1024
"""Texts that are counted; the one that has not come for the longest time is dropped first."""

MAX_CHARACTERS: Final = 200

_URL: Final = re.compile(r"https?://\S{1,300}")
_ADDRESS: Final = re.compile(r"<?[\w.+=-]{1,64}@[\w.-]{1,255}>?")
_IPV4: Final = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b")
_DATE: Final = re.compile(r"\b(?:19|20)\d\d-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?)?")
_TIME: Final = re.compile(r"\b\d{1,2}:\d\d(?::\d\d)?\b")
_IPV6: Final = re.compile(r"(?<![\w:])[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7}(?![\w:])", re.IGNORECASE)
_WORD: Final = re.compile(r"[^\s<>()\[\]\"',;]+")
_DIGITS: Final = re.compile(r"\b\d{4,}\b")


def normalised(reply: str) -> str:
    """A reply with marks in place of addresses, times, numbers and identifiers.

    The code and the status code at the beginning stay.

    >>> normalised("550 5.7.1 [192.0.2.1] <ann@example.com> is blocked, id 4F2a9Qx81zA-77")
    '550 5.7.1 [IP] ADDRESS is blocked, id ID'
    """
    text = reply[: 4 * MAX_CHARACTERS]
    text = _ADDRESS.sub("ADDRESS", _URL.sub("URL", text))
    text = _TIME.sub("TIME", _DATE.sub("TIME", _IPV4.sub("IP", text)))
    text = _IPV6.sub("IP", text)
    text = _WORD.sub(_marked, text)
    return " ".join(_DIGITS.sub("N", text).split())[:MAX_CHARACTERS]


def _marked(match: re.Match[str]) -> str:
    """A mark for a word that looks like an identifier, a hash or a piece of base64."""
    word = match[0]
    digits = sum(map(str.isdigit, word))
    letters = sum(map(str.isalpha, word))
    mixed = digits >= 2 and letters >= 3 and len(word) >= 8
    return "ID" if mixed or len(word) > 24 else word


class Unclassified:
    """Counts the replies that no pattern matches, in bounded memory.

    >>> texts = Unclassified()
    >>> for host in (1, 2, 3):
    ...     texts.add(f"450 no mail from 192.0.2.{host} now")
    >>> texts.most(1)
    {'450 no mail from IP now': 3}
    """

    def __init__(self, most: int = MAX_TEXTS) -> None:
        self._most = most
        self._counts: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, reply: str) -> None:
        """Count a reply."""
        text = normalised(reply)
        self._counts[text] = self._counts.get(text, 0) + 1
        self._counts.move_to_end(text)
        if len(self._counts) > self._most:
            self._counts.popitem(last=False)

    def most(self, count: int) -> dict[str, int]:
        """The most frequent texts."""
        ordered = sorted(self._counts.items(), key=lambda item: -item[1])
        return dict(ordered[:count])

    def clear(self) -> None:
        """Begin anew: other patterns are in force."""
        self._counts.clear()
