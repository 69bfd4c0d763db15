"""Read from its header who a mail is from and whom it is for (RFC 5322, sections 3.4 and 4.4).

For mail that comes without an envelope: from the command line. Addresses come back as they
are written, without names and comments; whether they can be used is `mailerq.address`'s to
say. A name without a domain comes back as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from mailerq.errors import AddressError
from mailerq.mail.headers import Header, unfold

__all__ = ["addresses", "recipients", "sender"]

# One token: blanks, a word (a run of characters, a quoted text, a domain literal), or a
# special character. A dot is part of a word, so that "a..b" stays in one piece.
_TOKEN: Final = re.compile(
    r"""[ \t\r\n]+
    |   (?P<word> [^ \t\r\n()<>\[\]:;@\\,"]+ | "[^"\\]*+(?:\\.[^"\\]*+)*"
               | \[[^\[\]\\]*+(?:\\.[^\[\]\\]*+)*\])
    |   (?P<special>[()<>:;@,])
    """,
    re.VERBOSE | re.DOTALL,
).match
_IN_COMMENT: Final = re.compile(r"\\.|[()]", re.DOTALL).search


def recipients(header: Header) -> list[str]:
    """Whom To, Cc and Bcc name, each address once. Raises `AddressError`, which names the field.

    Of a mail that was sent on with Resent-* fields their topmost block counts instead (3.6.6).
    """
    fields = _fields(header)
    found: dict[str, None] = {}
    for name in (b"to", b"cc", b"bcc"):
        for value in fields.get(name, ()):
            try:
                found.update(dict.fromkeys(addresses(_text(value))))
            except AddressError as error:
                raise AddressError(f"{name.decode().title()}: {error}") from None
    return list(found)


def sender(header: Header) -> str | None:
    """Who a mail is from: empty for the null sender, None where nobody is named.

    It is the first address in X-Mq-Envelope, Return-Path, Sender and From (or Resent-Sender
    and Resent-From), in this order; a field that holds none is passed over.
    """
    fields = _fields(header)
    for name in (b"x-mq-envelope", b"return-path", b"sender", b"from"):
        for value in fields.get(name, ()):
            if value == b"<>" and name in (b"x-mq-envelope", b"return-path"):
                return ""
            try:
                if address := next(addresses(_text(value)), None):
                    return address
            except AddressError:
                continue
    return None


def _fields(header: Header) -> dict[bytes, list[bytes]]:
    """The unfolded values of all fields, where a Resent-* block stands in for the first ones."""
    fields: dict[bytes, list[bytes]] = {}
    for field in header.fields():
        fields.setdefault(field.name, []).append(unfold(field.value))
    block = _resent(header)
    if not block.keys().isdisjoint({b"to", b"cc", b"bcc"}):
        fields.update({name: block.get(name, []) for name in _REPLACED})
    return fields


_REPLACED: Final = (b"sender", b"from", b"to", b"cc", b"bcc")


def _resent(header: Header) -> dict[bytes, list[bytes]]:
    """The topmost block of Resent-* fields, by their names without Resent-."""
    block: dict[bytes, list[bytes]] = {}
    for field in header.fields():
        name = field.name.removeprefix(b"resent-")
        if name != field.name and name not in block:
            block[name] = [unfold(field.value)]
        elif block:
            break
    return block


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def addresses(text: str) -> Iterator[str]:
    """Each address of an address list, out of groups and obsolete source routes as well.

    Raises `AddressError` where the text is no such list.

    >>> list(addresses('Ann <ann@a.test>, "b, b"@b.test (Bob), list: c@c.test, root;'))
    ['ann@a.test', '"b, b"@b.test', 'c@c.test', 'root']
    """
    words: list[str] = []  # what was read of the current address, or of the name before it
    inside: list[str] | None = None  # the same between < and >
    mailbox: str | None = None  # what stood there
    for token in _tokens(text):
        if inside is not None:
            if token == ">":
                mailbox, inside = _mailbox(inside), None
            elif token == ":":
                inside = []  # that was a source route
            else:
                inside.append(token)
        elif token == "<" and mailbox is None:
            inside = []
        elif token in (",", ";"):
            if mailbox or words:
                yield mailbox or _mailbox(words)
            words, mailbox = [], None
        elif token == ":" and mailbox is None and words:
            words = []  # that was the name of a group
        elif mailbox is None and token not in (":", ">"):
            words.append(token)
        else:
            raise AddressError(f"{token!r} is out of place")
    if inside is not None:
        raise AddressError("a < has no >")
    if mailbox or words:
        yield mailbox or _mailbox(words)


def _mailbox(words: Sequence[str]) -> str:
    """Put an address together: words with dots between them, one @, a domain or a literal."""
    previous = "."
    at = False
    for word in words:
        if word == "@":
            fits = not at and previous != "."
            at = True
        elif word[0] == "[":
            fits = previous == "@"
        else:
            fits = word not in _SPECIALS and (
                previous[-1] in ".@" or (word[0] == "." and previous[0] != "[")
            )
        if not fits:
            break
        previous = word
    else:
        if words and previous != "@":
            return "".join(words)
    raise AddressError(f"{' '.join(words)[:80]!a} is no address")


_SPECIALS: Final = frozenset("()<>:;@,")


def _tokens(text: str) -> Iterator[str]:
    """Words and special characters, without blanks and comments."""
    position = 0
    while position < len(text):
        match = _TOKEN(text, position)
        if match is None:
            raise AddressError(f"{text[position : position + 20]!a} is out of place")
        position = match.end()
        if (token := match["special"]) == "(":
            position = _comment_end(text, position)
        elif token := token or match["word"]:
            yield token


def _comment_end(text: str, position: int) -> int:
    """Where the comment ends whose parenthesis is open before `position`."""
    depth = 1
    while depth:
        match = _IN_COMMENT(text, position)
        if match is None:
            raise AddressError("a ( has no )")
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        position = match.end()
    return position
