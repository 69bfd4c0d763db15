"""Read the sender and the recipients of a mail from its header (RFC 5322, sections 3.4 and 4.4).

This is for mail without an envelope, from the command line. Addresses are returned as written,
without names and comments. They are not checked: `mailerq.address` does that. A name without a
domain is returned as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from mailerq.errors import AddressError
from mailerq.mail.headers import Header, unfold

__all__ = ["addresses", "recipients", "sender"]

# One token: blanks, a word (a run of characters, a quoted text or a domain literal), or a special
# character. A dot is part of a word, so "a..b" is one word.
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
    """List the addresses in To, Cc and Bcc, each once. Raises `AddressError`, naming the field.

    In a mail with Resent-* fields, the topmost Resent-* block is used instead (section 3.6.6).
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
    """Return the sender of a mail: empty for the null sender, None if no field names one.

    The sender is the first address in X-Mq-Envelope, Return-Path, Sender and From (or Resent-Sender
    and Resent-From), in this order. A field without an address is skipped.
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
    """Return the unfolded values of all fields. A Resent-* block replaces the original ones."""
    fields: dict[bytes, list[bytes]] = {}
    for field in header.fields():
        fields.setdefault(field.name, []).append(unfold(field.value))
    block = _resent(header)
    if not block.keys().isdisjoint({b"to", b"cc", b"bcc"}):
        fields.update({name: block.get(name, []) for name in _REPLACED})
    return fields


_REPLACED: Final = (b"sender", b"from", b"to", b"cc", b"bcc")


def _resent(header: Header) -> dict[bytes, list[bytes]]:
    """Return the topmost block of Resent-* fields, by name without "resent-"."""
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
    """Yield each address of an address list, also in groups and after obsolete source routes.

    Raises `AddressError` if the text is not an address list.

    >>> list(addresses('Ann <ann@a.test>, "b, b"@b.test (Bob), list: c@c.test, root;'))
    ['ann@a.test', '"b, b"@b.test', 'c@c.test', 'root']
    """
    words: list[str] = []  # words so far of the current address, or of the name before it
    inside: list[str] | None = None  # words so far after a <
    mailbox: str | None = None  # the address between < and >
    for token in _tokens(text):
        if inside is not None:
            if token == ">":
                mailbox, inside = _mailbox(inside), None
            elif token == ":":
                inside = []  # the words were a source route
            else:
                inside.append(token)
        elif token == "<" and mailbox is None:
            inside = []
        elif token in (",", ";"):
            if mailbox or words:
                yield mailbox or _mailbox(words)
            words, mailbox = [], None
        elif token == ":" and mailbox is None and words:
            words = []  # the words were the name of a group
        elif mailbox is None and token not in (":", ">"):
            words.append(token)
        else:
            raise AddressError(f"{token!r} is out of place")
    if inside is not None:
        raise AddressError("a < has no >")
    if mailbox or words:
        yield mailbox or _mailbox(words)


def _mailbox(words: Sequence[str]) -> str:
    """Join the words of an address: words with dots between them, one @, a domain or a literal."""
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
    """Yield words and special characters, without blanks and comments."""
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
    """Return the end of the comment that was opened before `position`."""
    depth = 1
    while depth:
        match = _IN_COMMENT(text, position)
        if match is None:
            raise AddressError("a ( has no )")
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        position = match.end()
    return position
