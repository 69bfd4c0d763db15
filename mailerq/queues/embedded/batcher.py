"""Batches what a trio loop's tasks ask of the writer and of the reader, while the loop is busy.

A thread that wakes beside a busy loop competes for Python's lock, and commits or reads little. So
the requests are handed over together when the loop is about to sleep and all its replies have left:
at once for a lone client, in one batch for all sessions under load.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Final

from mailerq.queues.embedded.open_queues import Take
from mailerq.queues.embedded.writer import Request
from mailerq.turns import EndOfTurn

__all__ = ["Batcher"]

MAX_WAIT_SECONDS: Final = 0.003
"""Longest wait of a request for a loop that is never idle."""


class Batcher:
    """One batcher for each loop. Callers of `add`, `add_take` and `flush` hold `lock`."""

    def __init__(
        self,
        put: Callable[[Request], None],
        put_takes: Callable[[Sequence[Take]], None],
        lock: threading.Lock,
        end_of_turn: EndOfTurn,
    ) -> None:
        """`put` hands a request to the writer, `put_takes` a group of takes to the reader."""
        self.end_of_turn = end_of_turn
        self._put = put
        self._put_takes = put_takes
        self._lock = lock
        self._requests: list[Request] = []
        self._takes: list[Take] = []
        self._since = 0.0

    def add(self, request: Request) -> None:
        """Add a request for the writer, on this batcher's loop."""
        self._begin()
        self._requests.append(request)

    def add_take(self, take: Take) -> None:
        """Add a take for the reader, on this batcher's loop."""
        self._begin()
        self._takes.append(take)

    def flush(self) -> None:
        """Hand over the batch."""
        requests, self._requests = self._requests, []
        for request in requests:
            self._put(request)
        takes, self._takes = self._takes, []
        if takes:
            self._put_takes(takes)

    def _begin(self) -> None:
        if not (self._requests or self._takes):
            self._since = monotonic()
            self.end_of_turn.call_after(self._hand_over)

    def _hand_over(self, idle: bool) -> bool:
        """Hand over the batch at the end of a turn, or wait for the end of the next."""
        if idle or monotonic() - self._since > MAX_WAIT_SECONDS:
            with self._lock:
                self.flush()
        else:
            self.end_of_turn.call_after(self._hand_over)
        return False
