"""Where a mail ends, and what its bytes are, when it comes in pieces of any size.

Theory of operation
-------------------
What a DATA brings is looked at once. The last bytes that could begin CR LF "." CR LF are held
back until more is there, so an end that is split over reads is found, and what has been taken
never ends within something that must be seen whole. Taken bytes gather raw; a mail of ordinary
size is made ready in one piece at its end. A large one is made ready block by block, and each
block goes to a `Sink`, which may keep it elsewhere than in memory. Dots are unstuffed and
newlines looked at in the same way for both, so the result does not depend on the pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from mailerq.wire._lines import BARE, DOTTED, Buffer, look

__all__ = [
    "BLOCK_BYTES",
    "Body",
    "InBlocks",
    "MemorySink",
    "Sink",
    "encode_blocks",
    "has_bare_newline",
    "in_pairs",
]

BLOCK_BYTES: Final = 1 << 17
"""Bytes from which on what has come in is made ready before the end is there."""

PIECES: Final = 512
"""Pieces that gather before they are joined: one byte alone costs forty."""

PIECE_BYTES: Final = 16384
"""Pieces of a mail in blocks below this are sent together."""

END: Final = b"\r\n.\r\n"


class InBlocks(Protocol):
    """A mail that is not there as a whole. Its blocks have only CRLF pairs, which may be split."""

    def __len__(self) -> int: ...

    def blocks(self) -> Iterator[bytes]: ...


class Sink(Protocol):
    """Takes a large mail block by block. The last call is `finish` or `discard`."""

    def write(self, block: bytes) -> None:
        """Take a block, which is ready."""

    def finish(self) -> bytes | memoryview:
        """All that was written."""

    def discard(self) -> None:
        """Forget it: the mail is refused. May be called more than once."""


class MemorySink:
    """Keeps a mail in memory."""

    def __init__(self) -> None:
        self._buffer = Buffer()

    def write(self, block: bytes) -> None:
        self._buffer.add(block)

    def finish(self) -> bytes:
        return self._buffer.take()

    def discard(self) -> None:
        self._buffer = Buffer()


class Body:
    """The bytes of one mail as they come in, up to `limit`; beyond it they are only counted.

    It is fed either by `receive_stuffed` (DATA: lines that end with a dot alone) or by
    `add` (BDAT: bytes whose number was told before). A bare CR or LF is made a pair where
    `normalize` says so, and the bytes that this adds count towards the limit; otherwise it makes
    the mail `is_bare`, and no more of it is kept. `binary` allows them.
    """

    __slots__ = (
        "_binary", "_held", "_limit", "_normalize", "_pieces", "_settled", "_sink", "_stuffed",
        "_waiting", "is_bare", "size",
    )  # fmt: skip

    def __init__(
        self,
        limit: int = 0,
        sink: Sink | None = None,
        *,
        normalize: bool = False,
        binary: bool = False,
    ) -> None:
        self.size = 0
        self.is_bare = False
        self._limit = limit
        self._sink = sink
        self._normalize = normalize
        self._binary = binary
        self._pieces: list[bytes] = []
        self._waiting = 0  # bytes in `_pieces`
        self._settled = False
        self._stuffed = False
        self._held = b"\r\n"  # the CR LF that ended DATA: an end may begin with it

    @property
    def is_too_big(self) -> bool:
        return self.size > self._limit > 0

    @property
    def kept(self) -> int:
        """Bytes that are not forgotten."""
        return 0 if self.is_too_big or self.is_bare else self.size

    def add(self, data: bytes) -> None:
        """Take bytes as they are."""
        self.size += len(data)
        if self.is_too_big or self.is_bare:
            self.discard()
            return
        self._pieces.append(data)
        self._waiting += len(data)
        if self._waiting >= BLOCK_BYTES:
            self._settle()
        elif len(self._pieces) >= PIECES:
            self._pieces = [b"".join(self._pieces)]

    def receive_stuffed(self, data: bytes) -> bytes | None:
        """Take bytes up to CR LF "." CR LF: what lies behind it, or None while it is not there."""
        window = self._held + data
        # Five bytes are not looked for where two of them are not, which is seen much faster.
        end = window.find(END) if look(window) & DOTTED else -1
        if end >= 0:
            taken, rest = end + 2, window[end + 5 :]  # the CR LF before the dot is the mail's
        else:
            taken, rest = len(window) - _overlap(window), None
        start = 0
        if not self._stuffed and taken:
            # All but the CR LF that ended DATA, and a first line may be stuffed as well.
            self._stuffed = True
            start = 3 if taken > 2 and window[2] == 46 else 2
        self._held = window[taken:] if rest is None else b""
        if taken > start:
            self.add(window[start:taken])
        return rest

    def finish(self) -> bytes | memoryview:
        """All bytes of the mail, without the dots that stuffing put in; once."""
        if self._settled and self._sink is not None and not (self.is_too_big or self.is_bare):
            self._settle(last=True)
            return self._sink.finish()
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        return self._ready(body)

    def discard(self) -> None:
        """Forget what was taken."""
        self._pieces.clear()
        self._waiting = 0
        if self._settled and self._sink is not None:
            self._sink.discard()

    def _settle(self, *, last: bool = False) -> None:
        block = b"".join(self._pieces)
        self._pieces.clear()
        self._waiting = 0
        if block.endswith(b"\r") and not last:
            self._pieces.append(b"\r")  # perhaps half of a pair
            self._waiting = 1
            block = block[:-1]
        block = self._ready(block)
        if self.is_bare or self.is_too_big:
            self.discard()
            return
        if self._sink is None:
            self._sink = MemorySink()
        self._settled = True
        self._sink.write(block)

    def _ready(self, block: bytes) -> bytes:
        found = look(block)
        # The first dot of each line that starts with one goes (RFC 5321, section 4.5.2).
        if self._stuffed and found & DOTTED:
            block = block.replace(b"\r\n.", b"\r\n")
        if found & BARE and not self._binary:
            if self._normalize:
                pairs = in_pairs(block)
                self.size += len(pairs) - len(block)
                return pairs
            self.is_bare = True
        return block


def _overlap(data: bytes) -> int:
    """How many of the last bytes could begin the end of a mail."""
    for size in (4, 3, 2, 1):
        if data.endswith(END[:size]):
            return size
    return 0


def in_pairs(text: bytes) -> bytes:
    """Each CR LF, bare CR and bare LF as one CR LF."""
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")


def has_bare_newline(body: bytes) -> bool:
    """Whether there is a CR or an LF that is not part of a pair."""
    return bool(look(body) & BARE)


def encode_blocks(body: InBlocks) -> tuple[Iterator[bytes], bytes]:
    """A mail as it follows DATA, and what ends it, as `mailerq.wire.client.encode_body` has it."""
    return _stuffed(_joined(body.blocks())), b".\r\n"


def _stuffed(blocks: Iterator[bytes]) -> Iterator[bytes]:
    before = b"\r\n"  # a dot behind it is doubled
    for block in blocks:
        stuffed = (before + block).replace(b"\r\n.", b"\r\n..")
        yield stuffed[len(before) :]
        before = block[-2:] if len(block) > 1 else before[-1:] + block
    if before != b"\r\n":
        yield b"\r\n"


def _joined(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Small ones together."""
    gathered: list[bytes] = []
    size = 0
    for piece in pieces:
        gathered.append(piece)
        size += len(piece)
        if size >= PIECE_BYTES:
            yield b"".join(gathered)
            gathered.clear()
            size = 0
    if size:
        yield b"".join(gathered)
