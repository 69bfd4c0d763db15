"""The shares of a queue directory: a queue file for each process that works in it.

Share 0 is the directory itself, so a single process needs nothing else. The others are
subdirectories, ``share-1``, ``share-2`` and so on, each a complete queue directory with its own
file and lock. Each share has its own range of message numbers, so a number is unique in all shares.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import Final

__all__ = ["first_number", "share_directory", "share_of", "shares_in"]

NUMBERS_OF_A_SHARE: Final = 10**12
"""Distance between the numbers of two shares: more than a share will ever use."""

_NAME: Final = re.compile(r"share-([1-9][0-9]{0,5})")


def share_directory(directory: str, share: int) -> str:
    """The directory of a share.

    >>> share_directory("/var/spool/mailerq", 0), share_directory("/var/spool/mailerq", 2)
    ('/var/spool/mailerq', '/var/spool/mailerq/share-2')
    """
    return os.path.join(directory, f"share-{share}") if share else directory


def shares_in(directory: str) -> list[int]:
    """The existing shares, in order; share 0 exists once the directory does."""
    found = [0]
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        folders = [entry.name for entry in entries if entry.is_dir()]
        found += sorted(int(match[1]) for name in folders if (match := _NAME.fullmatch(name)))
    return found


def share_of(directory: str) -> int:
    """The share in `directory`.

    >>> share_of("/var/spool/mailerq"), share_of("/var/spool/mailerq/share-2")
    (0, 2)
    """
    match = _NAME.fullmatch(os.path.basename(os.path.abspath(directory)))
    return int(match[1]) if match else 0


def first_number(directory: str) -> int:
    """The first message number of the share in `directory`.

    >>> first_number("/var/spool/mailerq"), first_number("/var/spool/mailerq/share-2")
    (1, 2000000000001)
    """
    return 1 + NUMBERS_OF_A_SHARE * share_of(directory)
