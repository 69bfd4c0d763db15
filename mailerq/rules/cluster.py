"""What instances of a cluster tell each other, and who is there.

Theory of operation
-------------------
Documents are JSON, on an exchange that copies each to all instances. `read` takes only what is
whole, known and small. An instance announces itself each second (`Here`); `Members` keeps what was
heard, and drops an instance that was silent for `SILENCE`. All times are those of the receiver, so
the clocks of hosts need not agree.

Shared rows travel as `RowChanges` when they are made. Announcements have a digest of all rows: an
instance whose digest differs asks another for all its rows (`AskRows`), and gets them in parts
(`RowPart`), each when it asks for the next one.

Everything here is pure. Times are integer nanoseconds of a clock that only goes forward.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from mailerq.rules.shared_rows import Change

__all__ = [
    "MAX_DOCUMENT",
    "AskRows",
    "Document",
    "Gone",
    "Hello",
    "Here",
    "Member",
    "Members",
    "RowChanges",
    "RowPart",
    "Ration",
    "packed",
    "read",
    "write",
]

VERSION: Final = 1
"""Of the documents. Instances ignore those of a later version, and say so once."""

SECOND: Final = 1_000_000_000

SILENCE: Final = 5 * SECOND
"""An instance that announced nothing for this time is gone."""

MAX_DOCUMENT: Final = 1 << 19
"""Bytes of a document: a thousand suppressed addresses fit."""

PART_BYTES: Final = 1 << 16
"""Bytes of changes that are put into one document."""

MAX_MEMBERS: Final = 1000
MAX_IPS: Final = 10_000
MAX_KNOWN: Final = 50_000
"""Addresses of all other instances together, those that they own counted twice."""

MAX_NAME: Final = 255
MAX_TALK: Final = 64
MAX_DOCUMENTS: Final = 2000
"""Documents taken in a second; the rest are dropped."""


class Here(msgspec.Struct, frozen=True, kw_only=True, tag="here", tag_field="kind"):
    """An instance announces itself. `name` is its name, `run` another text at each start."""

    v: int = VERSION
    name: str
    run: str
    serial: int
    """Grows with each announcement of a run."""
    queue: str = ""
    """The queue of the instance, for documents to it alone."""
    hostname: str = ""
    version: str = ""
    """Of the program."""
    started: float = 0.0
    """Seconds since 1970, on the clock of the instance."""
    settings: int = 0
    digest: str = ""
    """Of the settings that all instances should have alike."""
    ips: tuple[str, ...] = ()
    """Addresses that it can send from."""
    holds: tuple[str, ...] = ()
    """Of these, the ones whose lock it has."""
    messages: float = 0.0
    """Deliveries in the last minute."""
    connections: int = 0
    waiting: int = 0
    rows: int = 0
    rows_digest: str = ""
    takes: str = ""
    """It takes mail that others hand over, see `Members.keeper_of`; the name of their outbox."""


class Gone(msgspec.Struct, frozen=True, kw_only=True, tag="gone", tag_field="kind"):
    """An instance stops."""

    v: int = VERSION
    name: str
    run: str


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello", tag_field="kind"):
    """All instances should announce themselves now."""

    v: int = VERSION


class RowChanges(msgspec.Struct, frozen=True, kw_only=True, tag="rows", tag_field="kind"):
    """Changes of shared rows that were made at an instance."""

    v: int = VERSION
    name: str
    changes: tuple[Change, ...]


class AskRows(msgspec.Struct, frozen=True, kw_only=True, tag="ask-rows", tag_field="kind"):
    """An instance wants the shared rows of another: part `part`, the first is 0."""

    v: int = VERSION
    name: str
    queue: str
    talk: str
    """Another text for each exchange of all rows."""
    part: int


class RowPart(msgspec.Struct, frozen=True, kw_only=True, tag="row-part", tag_field="kind"):
    """A part of the shared rows of an instance."""

    v: int = VERSION
    name: str
    talk: str
    part: int
    changes: tuple[Change, ...]
    last: bool = False


Document = Here | Gone | Hello | RowChanges | AskRows | RowPart

_is_address: Final = re.compile("[0-9a-f:.]{2,45}").fullmatch
"""Addresses are only compared: one in another form is no address of anybody."""

_is_queue: Final = re.compile(r"amq\.gen-[A-Za-z0-9_.-]{1,100}", re.ASCII).fullmatch
"""Queues of instances are named by the broker. Documents go to no others: an answer to a forged
question must not end up in the outbox."""

_decode: Final = msgspec.json.Decoder(Document).decode
_encode: Final = msgspec.json.Encoder().encode


class _Version(msgspec.Struct):
    v: int = 0


_version: Final = msgspec.json.Decoder(_Version).decode


def write(document: Document) -> bytes:
    """The bytes of a document."""
    return _encode(document)


def read(data: bytes) -> Document | str:
    """A document from the exchange, or why it is none of ours.

    >>> read(write(Hello()))
    Hello(v=1)
    >>> read(b'{"reload": true}')
    'no document of mailerq'
    """
    if len(data) > MAX_DOCUMENT:
        return f"a document of {len(data)} bytes"
    try:
        if _version(data).v > VERSION:
            return "a document of a newer mailerq"
        document: Document = _decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return "no document of mailerq"
    match document:
        case Here():
            return _problem_of(document) or document
        case RowChanges() | RowPart() | AskRows() | Gone():
            if not _is_name(document.name):
                return "a document without a name"
    match document:
        case AskRows() if not _is_queue(document.queue):
            return "a question from a queue that is none of an instance"
        case AskRows() | RowPart():
            if not 0 < len(document.talk) <= MAX_TALK or document.part < 0:
                return "a part of rows that cannot be"
    return document


def _is_name(text: str) -> bool:
    return 0 < len(text) <= MAX_NAME and text.isprintable()


def _problem_of(here: Here) -> str | None:
    """Why an announcement cannot be used."""
    texts = (here.name, here.run, here.queue, here.hostname, here.version, here.takes)
    if not _is_name(here.name) or not _is_name(here.run):
        return "an announcement without a name"
    if not all(len(text) <= MAX_NAME and (not text or text.isprintable()) for text in texts):
        return "an announcement with texts that cannot be printed"
    if here.queue and not _is_queue(here.queue):
        return "an announcement with a queue that is none of an instance"
    if len(here.digest) > MAX_NAME or len(here.rows_digest) > MAX_NAME:
        return "an announcement with a digest that is none"
    if not (math.isfinite(here.messages) and math.isfinite(here.started)):
        return "an announcement with numbers that are none"
    if len(here.ips) > MAX_IPS or len(here.holds) > MAX_IPS:
        return "an announcement with too many addresses"
    if not all(map(_is_address, (*here.ips, *here.holds))):
        return "an announcement with an address that is none"
    return None


def packed(changes: Iterable[Change]) -> Iterator[tuple[Change, ...]]:
    """Changes in groups that fit into one document each."""
    group: list[Change] = []
    size = 0
    for change in changes:
        length = len(_encode(change))
        if group and size + length > PART_BYTES:
            yield tuple(group)
            group, size = [], 0
        group.append(change)
        size += length
    if group:
        yield tuple(group)


class Member(NamedTuple):
    """Another instance, as it was heard last, at `heard`."""

    here: Here
    heard: int
    ips: frozenset[str] = frozenset()
    holds: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        return len(self.ips) + len(self.holds)


class _Index(NamedTuple):
    """For each address the first instance, by name, that owns it, and that can send from it."""

    holders: dict[str, str]
    havers: dict[str, str]


class Members:
    """The other instances that are there.

    >>> members = Members("a", "1")
    >>> members.hear(Here(name="b", run="2", serial=1, ips=("192.0.2.1",)), now=0)
    'b joined'
    >>> members.expire(SILENCE), members.expire(SILENCE + 1)
    ([], ['b'])
    """

    def __init__(self, name: str, run: str) -> None:
        self.name = name
        self.run = run
        self.alive: dict[str, Member] = {}
        self.is_doubled = False
        """Another instance has the name of this one."""
        self._known = 0
        """Addresses of all members."""
        self._indexes: dict[str, _Index] = {}
        """By what instances take; empty after a change."""

    def hear(self, here: Here, now: int) -> str:
        """Take in an announcement; returns news for the log, or an empty string."""
        if here.name == self.name:
            if here.run != self.run and not self.is_doubled:
                self.is_doubled = True
                return (
                    f"another instance, on host {here.hostname}, has the name {self.name} too: "
                    "give each a server-id of its own"
                )
            return ""
        before = self.alive.get(here.name)
        if before is None:
            if len(self.alive) >= MAX_MEMBERS:
                return ""
            news = f"{here.name} joined"
        elif before.here.run == here.run:
            if here.serial <= before.here.serial:
                return ""  # a copy, or late
            news = ""
        else:
            news = f"{here.name} started again"
        if before is not None and _addresses(before.here) == _addresses(here):
            self.alive[here.name] = before._replace(here=here, heard=now)
            return news
        member = Member(here, now, frozenset(here.ips), frozenset(here.holds))
        known = self._known + member.size - (0 if before is None else before.size)
        if known > MAX_KNOWN:
            return f"{here.name} is left out: all instances have more than {MAX_KNOWN} addresses"
        self._known = known
        self.alive[here.name] = member
        self._indexes.clear()
        return news

    def leave(self, gone: Gone) -> bool:
        """Take in that an instance stops; whether it was there."""
        member = self.alive.get(gone.name)
        if member is None or member.here.run != gone.run:
            return False
        self._drop(gone.name)
        return True

    def expire(self, now: int) -> list[str]:
        """Drop the instances that are silent; returns their names."""
        silent = [name for name, member in self.alive.items() if now - member.heard > SILENCE]
        for name in silent:
            self._drop(name)
        return silent

    def _drop(self, name: str) -> None:
        self._known -= self.alive.pop(name).size
        self._indexes.clear()

    @property
    def ips(self) -> Mapping[str, Collection[str]]:
        """The addresses that each instance can send from."""
        return {name: member.ips for name, member in self.alive.items()}

    @property
    def holds(self) -> set[str]:
        """The addresses that others own."""
        return {ip for member in self.alive.values() for ip in member.holds}

    def keeper_of(
        self,
        ips: Sequence[str],
        held: Collection[str],
        available: Collection[str],
        outbox: str,
    ) -> Member | None:
        """The instance that should have a message which may leave from `ips` only.

        None for this instance, which holds the locks of `held`, and can send from `available`. An
        owner comes before an instance that could own an address, and this one before others. Others
        must share the `outbox`.
        """
        if not outbox or any(ip in held for ip in ips):
            return None
        index = self._index(outbox)
        owners = [index.holders[ip] for ip in ips if ip in index.holders]
        if owners:
            return self.alive[min(owners)]
        if any(ip in available for ip in ips):
            return None
        others = [index.havers[ip] for ip in ips if ip in index.havers]
        return self.alive[min(others)] if others else None

    def _index(self, outbox: str) -> _Index:
        """Find instances by address: this is asked for each message, and there may be many."""
        index = self._indexes.get(outbox)
        if index is None:
            index = self._indexes[outbox] = _Index({}, {})
            for name, member in sorted(self.alive.items()):
                if member.here.takes == outbox:
                    for ip in member.holds:
                        index.holders.setdefault(ip, name)
                    for ip in member.ips:
                        index.havers.setdefault(ip, name)
        return index


def _addresses(here: Here) -> tuple[object, ...]:
    """What the index of members is made of."""
    return here.ips, here.holds, here.takes


class Ration:
    """How many documents are taken in a second."""

    def __init__(self, most: int = MAX_DOCUMENTS) -> None:
        self._most = most
        self._second = -1
        self._taken = 0

    def take(self, now: int) -> bool:
        """Whether one more may be taken."""
        second = now // SECOND
        if second != self._second:
            self._second, self._taken = second, 0
        self._taken += 1
        return self._taken <= self._most
