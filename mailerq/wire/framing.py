"""Where a mail ends, and what its bytes are, when it comes in pieces of any size."""

from __future__ import annotations

__all__ = ["Body", "has_bare_newline"]


class Body:
    """The bytes of one mail as they come in, up to `limit`; beyond it they are only counted.

    It is fed either by `receive_stuffed` (DATA: lines that end with a dot alone) or by
    `add` (BDAT: bytes whose number was told before).
    """

    __slots__ = ("_chunks", "_limit", "_surplus", "_tail", "size")

    def __init__(self, limit: int) -> None:
        self.size = 0
        self._limit = limit
        self._chunks: list[bytes] = []
        self._surplus = 0
        self._tail = b"\r\n"

    @property
    def is_too_big(self) -> bool:
        return self.size > self._limit > 0

    def add(self, data: bytes) -> None:
        """Take bytes as they are."""
        self.size += len(data)
        if self.is_too_big:
            self._chunks.clear()
        else:
            self._chunks.append(data)

    def receive_stuffed(self, data: bytes) -> bytes | None:
        """Take bytes up to CR LF "." CR LF: what lies behind it, or None while it is not there.

        `_tail` is the last four bytes taken already (at first the CR LF that ended DATA),
        so that an end that is split over reads is found, and nothing is searched twice.
        """
        window = self._tail + data
        end = window.find(b"\r\n.\r\n")
        if end < 0:
            self._tail = window[-4:]
            self.add(data)
            return None
        # The CR LF before the dot belongs to the mail, and may lie in what was taken before.
        # Of an empty mail it is the one that ended DATA.
        length = end + 2 - len(self._tail)
        self.add(data[: max(length, 0)])
        self._surplus = max(-length, 0)
        return data[length + 3 :]

    def take(self) -> bytes:
        """All bytes of a mail by BDAT."""
        chunks, self._chunks = self._chunks, []
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def take_unstuffed(self) -> bytes:
        """All bytes of a mail by DATA, without the dots that stuffing put in.

        The first dot of each line that starts with one goes (RFC 5321, section 4.5.2).
        """
        body = self.take()
        if self._surplus:
            body = body[: -self._surplus]
        if b"\r\n." in body:
            body = body.replace(b"\r\n.", b"\r\n")
        return body[1:] if body.startswith(b".") else body


def has_bare_newline(body: bytes) -> bool:
    """Whether there is a CR or an LF that is not part of a pair."""
    pairs = body.count(b"\r\n")
    return body.count(b"\n") != pairs or body.count(b"\r") != pairs
