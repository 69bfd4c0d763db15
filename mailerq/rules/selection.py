"""Which messages of a queue an operator means: by id, addresses, domain, tag, age, last error.

Words are compared without regard to case, and a ``*`` in them stands for any text. Of the words for
one criterion any may fit, and all criteria must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

import msgspec

from mailerq.address import parse_domain
from mailerq.errors import AddressError
from mailerq.message import format_time

__all__ = ["Matcher", "Range", "Selection", "last_error", "like"]

TIME_LENGTH: Final = 19
"""Characters of a time in a document. Times of that form sort as text."""

LONG_DOMAIN: Final = 190
"""A longer domain may be cut short in a destination (`mailerq.rules.destinations`)."""

LAST: Final = "\U0010ffff"
"""Text that sorts after all other."""


class Range(NamedTuple):
    """Destinations from `first` to `last`. `exact`: all mail there is of the wanted domain."""

    first: str
    last: str
    exact: bool


class Selection(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Criteria for messages; one that is empty or None fits every message.

    `older` and `younger` are an age in seconds: since the mail was received, or first became due.
    `held` tells messages that an operator holds from others. `waits`: only messages that wait for
    their next attempt.
    """

    ids: tuple[int, ...] = ()
    senders: tuple[str, ...] = ()
    recipients: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    older: float | None = None
    younger: float | None = None
    held: bool | None = None
    waits: bool = False

    @property
    def is_narrow(self) -> bool:
        """Whether there is any criterion."""
        return self != Selection(waits=self.waits)

    @property
    def reads_documents(self) -> bool:
        """Whether a match takes more than number, due time and domain."""
        return bool(
            self.senders
            or self.recipients
            or self.tags
            or self.errors
            or self.older is not None
            or self.younger is not None
            or self.waits
        )

    def ranges(self) -> tuple[Range, ...] | None:
        """The destinations in which the selected mail of a sorted queue lies; None: in any.

        >>> [each.first for each in Selection(domains=("Example.com",)).ranges()]
        ['', 'via ', 'example.com', 'example.com ']
        """
        if not self.domains or any("*" in each or len(each) > LONG_DOMAIN for each in self.domains):
            return None
        # Unsorted mail, and mail with a smarthost of its own, has no domain in its destination.
        found = [Range("", "", False), Range("via ", "via " + LAST, False)]
        for domain in sorted({form for each in self.domains for form in _forms(each)}):
            found.append(Range(domain, domain, domain.isprintable()))
            for form in sorted({domain, ascii(domain)[1:-1]}):
                found.append(Range(f"{form} ", f"{form} {LAST}", False))
        return tuple(found)

    def describe(self) -> str:
        """The criteria in words, for the log and for questions."""
        return ", ".join(self._words()) or "all"

    def _words(self) -> Iterator[str]:
        if len(self.ids) > MAX_SHOWN:
            yield f"{len(self.ids)} ids"
        elif self.ids:
            yield f"id {' or '.join(map(str, self.ids))}"
        for name, values in (
            ("sender", self.senders),
            ("recipient", self.recipients),
            ("domain", self.domains),
            ("tag", self.tags),
            ("error", self.errors),
        ):
            if values:
                shown = [value[:MAX_CHARACTERS] or "<>" for value in values[:MAX_SHOWN]]
                more = [f"{len(values) - MAX_SHOWN} more"] if len(values) > MAX_SHOWN else []
                yield f"{name} {' or '.join(shown + more)}"
        if self.older is not None:
            yield f"older than {self.older:.0f} s"
        if self.younger is not None:
            yield f"younger than {self.younger:.0f} s"
        if self.held is not None:
            yield "held" if self.held else "not held"


MAX_SHOWN: Final = 10
MAX_CHARACTERS: Final = 100
"""Words of a criterion that a description has, and characters of each."""


class _Facts(msgspec.Struct):
    """The properties that criteria look at; others are skipped."""

    envelope: Any = None
    recipient: Any = None
    tags: Any = None
    results: msgspec.Raw = msgspec.Raw(b"null")
    received: Any = None
    seen: Any = None


_decode: Final = msgspec.json.Decoder(_Facts).decode
_decode_results: Final = msgspec.json.Decoder(list[msgspec.Raw] | None).decode
_decode_result: Final = msgspec.json.Decoder().decode

Test = Callable[[str], bool]


class Matcher:
    """A selection, made ready for many messages at one time `now`, seconds since 1970."""

    def __init__(self, selection: Selection, now: float) -> None:
        self._selection = selection
        self._now = now
        self._ids = frozenset(selection.ids)
        self._sender = _any(like(each.strip("<>")) for each in selection.senders)
        self._recipient = _any(like(each.strip("<>")) for each in selection.recipients)
        self._domain = _any(_domain_test(each) for each in selection.domains)
        self._tag = _any(map(like, selection.tags))
        self._error = _any(like(f"*{each}*") for each in selection.errors)
        older, younger = selection.older, selection.younger
        self._before = None if older is None else now - older
        self._after = None if younger is None else now - younger
        self._reads = selection.reads_documents or bool(selection.domains)

    def fits(self, number: int, due: float, held: bool, properties: object) -> bool:
        """Whether a message is selected. `properties` is its document as bytes of JSON.

        A damaged document fits only a selection that does not read documents.
        """
        selection = self._selection
        if self._ids and number not in self._ids:
            return False
        if selection.held is not None and held != selection.held:
            return False
        if not self._reads:
            return True
        if not isinstance(properties, bytes):
            return False
        try:
            return self._fits(_decode(properties), due)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return False

    def _fits(self, facts: _Facts, due: float) -> bool:
        if self._sender is not None and not self._sender(_text(facts.envelope)):
            return False
        recipient = _text(facts.recipient)
        if self._recipient is not None and not self._recipient(recipient):
            return False
        if self._domain is not None and not self._domain(recipient.rpartition("@")[2]):
            return False
        if self._tag is not None:
            tags = facts.tags if isinstance(facts.tags, list) else ()
            if not any(self._tag(each.lower()) for each in tags if isinstance(each, str)):
                return False
        if not self._fits_age(facts, due):
            return False
        if self._error is None and not self._selection.waits:
            return True
        results = _decode_results(facts.results)
        if self._selection.waits and not (results and due > self._now):
            return False
        if self._error is None:
            return True
        last = [_decode_result(results[-1])] if results else None
        return self._error((last_error(last) or "").lower())

    def _fits_age(self, facts: _Facts, due: float) -> bool:
        for bound, before in ((self._before, True), (self._after, False)):
            if bound is None:
                continue
            since: str | None = None
            for value in (facts.received, facts.seen):
                if isinstance(value, str) and len(value) == TIME_LENGTH:
                    since = value
                    break
            is_before = since <= format_time(max(bound, 0)) if since is not None else due <= bound
            if is_before is not before:
                return False
        return True


def last_error(results: object) -> str | None:
    """Why the last attempt failed: the peer's words, or ours; None before the first attempt."""
    match results:
        case [*_, {} as last]:
            said = [last.get(name) for name in ("code", "status", "description")]
            words = [str(part) for part in said if part] or [f"{last.get('type', 'error')}"]
            return " ".join(words)
    return None


def like(pattern: str) -> Test:
    """A test of text in lower case; each ``*`` of the pattern stands for any text.

    >>> [like("News*@*.TEST")(text) for text in ("news-7@a.test", "news@test", "x-news@a.test")]
    [True, False, False]
    """
    first, *rest = pattern.lower().split("*")
    if not rest:
        return lambda text: text == first
    *middle, last = rest
    least = sum(map(len, (first, *rest)))

    def test(text: str) -> bool:
        if len(text) < least or not (text.startswith(first) and text.endswith(last)):
            return False
        at, end = len(first), len(text) - len(last)
        for part in middle:
            found = text.find(part, at, end)
            if found < 0:
                return False
            at = found + len(part)
        return True

    return test


def _any(tests: Iterable[Test]) -> Test | None:
    """One test for several of which any may hold; None for none."""
    every = tuple(tests)
    if len(every) < 2:
        return every[0] if every else None
    return lambda text: any(test(text) for test in every)


def _domain_test(pattern: str) -> Test:
    if "*" in pattern:
        return like(pattern)
    forms = _forms(pattern)
    return lambda text: text in forms


def _forms(domain: str) -> frozenset[str]:
    """A domain as given, in A-labels and in U-labels."""
    lower = domain.lower().removeprefix("@")
    forms = {lower}
    try:
        labels = parse_domain(lower)
        forms |= {labels, labels.encode().decode("idna").lower()}
    except (AddressError, UnicodeError):
        pass
    return frozenset(forms)


def _text(value: object) -> str:
    return value.lower() if isinstance(value, str) else ""
