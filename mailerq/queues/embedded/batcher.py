"""Batches the requests of a trio loop's tasks for the writer, while the loop is busy.

A thread that wakes beside a busy loop competes for Python's lock, and commits little. So the
requests are handed over together when the loop is about to sleep: at once for a lone client, in one
batch for all sessions under load.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

import trio

from mailerq.queues.embedded.writer import Request

__all__ = ["Batcher"]

MAX_WAIT_SECONDS: Final = 0.003
"""Longest wait of a request for a loop that is never idle."""


class Batcher(trio.abc.Instrument):
    """One batcher for each loop. Callers of `add` and `flush` hold `lock`."""

    def __init__(self, put: Callable[[Request], None], lock: threading.Lock) -> None:
        self._put = put
        self._lock = lock
        self._requests: list[Request] = []
        self._since = 0.0

    def add(self, request: Request) -> None:
        """Add a request, on this batcher's loop."""
        if not self._requests:
            self._since = time.monotonic()
        self._requests.append(request)

    def flush(self) -> None:
        """Hand over the batch."""
        for request in self._requests:
            self._put(request)
        self._requests.clear()

    def before_io_wait(self, timeout: float) -> None:
        """Called by trio before it polls for events, or sleeps at most `timeout` seconds."""
        if self._requests and (timeout or time.monotonic() - self._since > MAX_WAIT_SECONDS):
            with self._lock:
                self.flush()
