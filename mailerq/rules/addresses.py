"""Lists of addresses and patterns, for recipients that anybody may send to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Self

from mailerq.address import Mailbox, parse_mailbox
from mailerq.errors import AddressError

__all__ = ["AddressList"]

_WILDCARDS: Final = {"*": ".*", "?": "."}


class AddressList:
    r"""A list of addresses and patterns, without regard to case.

    ``ann@example.test`` is one address. In ``*@example.test`` and ``sales-?@example.test``, ``*``
    matches any characters and ``?`` matches one. ``/(ann|bob)@.+\.test/`` is a regular expression
    that must match the whole address. A pattern never matches an address that may hold a route in
    its local part (`Mailbox.routed`); an exact entry may be such an address.

    >>> addresses = AddressList.parse("Ann@b.test\n*@c.test\n/[a-z]+@d\\.test/\n")
    >>> [addresses.has(name) for name in ("ann@B.test", "x@c.test", "x@d.test", "1@d.test")]
    [True, True, True, False]
    """

    def __init__(self, exact: Iterable[str] = (), patterns: Iterable[str] = ()) -> None:
        self._exact = frozenset(exact)
        self._patterns = [re.compile(pattern, re.DOTALL).fullmatch for pattern in patterns]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a list with one entry on each line; ``#`` starts a comment line.

        Raises ValueError, which names the line.
        """
        exact: list[str] = []
        patterns: list[str] = []
        for number, line in enumerate(text.splitlines(), 1):
            entry = line.strip()
            if not entry or entry.startswith("#"):
                continue
            try:
                if len(entry) > 1 and entry.startswith("/") and entry.endswith("/"):
                    re.compile(entry[1:-1])
                    patterns.append(f"(?i:{entry[1:-1]})")
                elif "*" in entry or "?" in entry:
                    patterns.append(_wildcard(entry.lower()))
                else:
                    exact.append(_key(parse_mailbox(entry)))
            except (AddressError, re.error) as error:
                raise ValueError(f"line {number}: {error}") from None
        return cls(exact, patterns)

    def has(self, address: str) -> bool:
        """Whether an address, as given in RCPT, is in the list."""
        if not self._exact and not self._patterns:
            return False
        try:
            mailbox = parse_mailbox(address)
        except AddressError:  # the bare postmaster
            return False
        key = _key(mailbox)
        if key in self._exact:
            return True
        return not mailbox.routed and any(fits(key) for fits in self._patterns)


def _key(mailbox: Mailbox) -> str:
    return str(mailbox).lower()


def _wildcard(entry: str) -> str:
    if entry.count("@") != 1:
        raise AddressError(f"{entry!a} is not of the form name@domain")
    return "".join(_WILDCARDS.get(character) or re.escape(character) for character in entry)
