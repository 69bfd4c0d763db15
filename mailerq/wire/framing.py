"""Bodies on the wire: find the end of one that arrives, and decode it; encode one that leaves.

Theory of operation
-------------------
Each byte of DATA that arrives is searched once. The last bytes that could start CR LF "." CR LF are
held back until more bytes arrive, so an end that is split over reads is found, and accepted pieces
never cut such a sequence. Pieces are collected unchanged. An ordinary mail is decoded in one step
at its end. A large mail is decoded block by block, and each block goes to a `Sink`, which may store
it outside of memory. Both cases unstuff dots and check newlines in the same way, so the result does
not depend on the pieces. What leaves is encoded in blocks as well.
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
    "encode",
    "encode_blocks",
    "encode_body",
    "encode_chunk",
    "has_bare_newline",
    "in_pairs",
    "is_binary",
]

BLOCK_BYTES: Final = 1 << 17
"""Bytes to collect before a block is decoded ahead of the end."""

PIECES: Final = 512
"""Pieces to collect before they are joined: a piece of one byte takes forty bytes of memory."""

PIECE_BYTES: Final = 16384
"""Bytes to collect of small pieces before they are sent."""

END: Final = b"\r\n.\r\n"


class InBlocks(Protocol):
    """A mail that is made block by block. All CRs and LFs are pairs, which blocks may split."""

    def __len__(self) -> int: ...

    def blocks(self) -> Iterator[bytes]: ...


class Sink(Protocol):
    """Receives a large mail block by block. The last call is `finish` or `discard`."""

    def write(self, block: bytes) -> None:
        """Append a decoded block."""

    def finish(self) -> bytes | memoryview:
        """Return everything that was written."""

    def discard(self) -> None:
        """Drop everything: the mail is refused. May be called more than once."""


class MemorySink:
    """A sink in memory."""

    def __init__(self) -> None:
        self._buffer = Buffer()

    def write(self, block: bytes) -> None:
        self._buffer.add(block)

    def finish(self) -> bytes:
        return self._buffer.take()

    def discard(self) -> None:
        self._buffer = Buffer()


class Body:
    """The bytes of one mail as they arrive, up to `limit`; further bytes are only counted.

    Bytes arrive by `receive_stuffed` (DATA: lines up to a lone dot) or by `add` (BDAT: a known
    number of bytes). With `normalize`, a bare CR or LF becomes CRLF, and the added byte counts
    towards the limit. Otherwise it makes the mail `is_bare`, and the mail is dropped. `binary`
    allows bare CRs and LFs.
    """

    __slots__ = (
        "_binary", "_held", "_limit", "_normalize", "_pieces", "_sink", "_spilled", "_stuffed",
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
        self._spilled = False
        self._stuffed = False
        self._held = b"\r\n"  # the CR LF after DATA, which may start the end of the mail

    @property
    def is_too_big(self) -> bool:
        return self.size > self._limit > 0

    @property
    def kept(self) -> int:
        """The number of bytes that are kept."""
        return 0 if self.is_too_big or self.is_bare else self.size

    def add(self, data: bytes) -> None:
        """Append bytes without unstuffing."""
        self.size += len(data)
        if self.is_too_big or self.is_bare:
            self.discard()
            return
        self._pieces.append(data)
        self._waiting += len(data)
        if self._waiting >= BLOCK_BYTES:
            self._write_block()
        elif len(self._pieces) >= PIECES:
            self._pieces = [b"".join(self._pieces)]

    def receive_stuffed(self, data: bytes) -> bytes | None:
        """Append bytes up to CR LF "." CR LF; return the bytes after it, or None without an end."""
        window = self._held + data
        # `look` is much faster than find(), so check for a dot after an LF first.
        end = window.find(END) if look(window) & DOTTED else -1
        if end >= 0:
            taken, rest = end + 2, window[end + 5 :]  # the mail includes the CR LF before the dot
        else:
            taken, rest = len(window) - _overlap(window), None
        start = 0
        if not self._stuffed and taken:
            # Skip the CR LF after DATA, and the stuffed dot of the first line.
            self._stuffed = True
            start = 3 if taken > 2 and window[2] == 46 else 2
        self._held = window[taken:] if rest is None else b""
        if taken > start:
            self.add(window[start:taken])
        return rest

    def finish(self) -> bytes | memoryview:
        """Return the decoded mail. Call this once."""
        if self._spilled and self._sink is not None and not (self.is_too_big or self.is_bare):
            self._write_block(last=True)
            return self._sink.finish()
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        return self._decode(body)

    def discard(self) -> None:
        """Drop the bytes so far."""
        self._pieces.clear()
        self._waiting = 0
        if self._spilled and self._sink is not None:
            self._sink.discard()

    def _write_block(self, *, last: bool = False) -> None:
        block = b"".join(self._pieces)
        self._pieces.clear()
        self._waiting = 0
        if block.endswith(b"\r") and not last:
            self._pieces.append(b"\r")  # perhaps half of a CR LF
            self._waiting = 1
            block = block[:-1]
        block = self._decode(block)
        if self.is_bare or self.is_too_big:
            self.discard()
            return
        if self._sink is None:
            self._sink = MemorySink()
        self._spilled = True
        self._sink.write(block)

    def _decode(self, block: bytes) -> bytes:
        found = look(block)
        # Remove the first dot of each line that starts with a dot (RFC 5321, section 4.5.2).
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
    """Return the number of last bytes that could start the end of a mail."""
    for size in (4, 3, 2, 1):
        if data.endswith(END[:size]):
            return size
    return 0


def in_pairs(text: bytes) -> bytes:
    """Turn each bare CR and bare LF into CR LF."""
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")


def has_bare_newline(body: bytes) -> bool:
    """Whether a CR or LF is not part of a CR LF."""
    return bool(look(body) & BARE)


def is_binary(body: bytes) -> bool:
    """Whether lines that end in CR LF cannot carry a body unchanged."""
    return b"\0" in body or has_bare_newline(body)


def encode(body: bytes | InBlocks, *, binary: bool) -> tuple[Iterator[bytes], bytes]:
    """The blocks of a message and what ends it, as `binary` by BDAT, else as lines by DATA."""
    if not isinstance(body, bytes):
        return encode_blocks(body)
    return encode_chunk(body) if binary else encode_body(body)


def encode_body(body: bytes) -> tuple[Iterator[bytes], bytes]:
    r"""A message as it follows DATA (RFC 5321, section 4.5.2): its blocks, and what ends it.

    A bare CR or LF becomes CRLF, a dot that begins a line is doubled, and the last line is
    ended, so that only the final CRLF.CRLF can end the mail. Each block, of `BLOCK_BYTES`, is
    made when it is asked for: so neither time nor memory grows with the mail.

    >>> blocks, end = encode_body(b".a\n.b")
    >>> list(blocks), end
    ([b'..a\r\n..b'], b'\r\n.\r\n')
    """
    ended = not body or body.endswith((b"\r", b"\n"))
    return _encode(body), b".\r\n" if ended else b"\r\n.\r\n"


def _encode(body: bytes) -> Iterator[bytes]:
    end = 0
    begins_line = True
    while end < len(body):
        start, end = end, end + BLOCK_BYTES
        if body.startswith(b"\r\n", end - 1):
            end += 1  # a pair stays whole
        block = body[start:end]
        found = look(block)
        if found & BARE:
            block = in_pairs(block)
        if found:
            block = block.replace(b"\r\n.", b"\r\n..")
        if begins_line and block.startswith(b"."):
            block = b"." + block
        begins_line = block.endswith(b"\r\n")
        yield block


def encode_blocks(body: InBlocks) -> tuple[Iterator[bytes], bytes]:
    """Return the blocks to send after DATA, and the end, as `encode_body`."""
    return _stuffed(_joined(body.blocks())), b".\r\n"


def encode_chunk(body: bytes) -> tuple[Iterator[bytes], bytes]:
    r"""Return BDAT with the whole body as its one chunk: the blocks, and the end, never empty.

    >>> blocks, end = encode_chunk(b"a\n.\0")
    >>> list(blocks), end
    ([], b'BDAT 4 LAST\r\na\n.\x00')
    """
    command = b"BDAT %d LAST\r\n" % len(body)
    if len(body) <= BLOCK_BYTES:
        return iter(()), command + body
    last = (len(body) - 1) // BLOCK_BYTES * BLOCK_BYTES
    return _sliced(command, body, last), body[last:]


def _sliced(command: bytes, body: bytes, size: int) -> Iterator[bytes]:
    yield command
    for start in range(0, size, BLOCK_BYTES):
        yield body[start : start + BLOCK_BYTES]


def _stuffed(blocks: Iterator[bytes]) -> Iterator[bytes]:
    before = b"\r\n"  # a dot after a CR LF is doubled
    for block in blocks:
        stuffed = (before + block).replace(b"\r\n.", b"\r\n..")
        yield stuffed[len(before) :]
        before = block[-2:] if len(block) > 1 else before[-1:] + block
    if before != b"\r\n":
        yield b"\r\n"


def _joined(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Join small pieces."""
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
