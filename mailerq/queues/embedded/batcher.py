"""Gathers what the tasks of a trio loop hand to the writer, for as long as the loop is busy.

A thread that wakes beside a busy loop fights with it for Python's lock, and commits little. So
requests are handed over together when the loop has nothing left to do and is about to sleep: at
once when a lone client waits, all that its sessions had to say when there is load.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

import trio

from mailerq.queues.embedded.writer import Request

__all__ = ["Gatherer"]

PATIENCE_SECONDS: Final = 0.003
"""How long a request waits for a loop that is never idle."""


class Gatherer(trio.abc.Instrument):
    """One for each loop. `lock` is held around `add` and `flush` by who calls them."""

    def __init__(self, put: Callable[[Request], None], lock: threading.Lock) -> None:
        self._put = put
        self._lock = lock
        self._requests: list[Request] = []
        self._since = 0.0

    def add(self, request: Request) -> None:
        """Take a request, on the own loop."""
        if not self._requests:
            self._since = time.monotonic()
        self._requests.append(request)

    def flush(self) -> None:
        """Hand over what has gathered."""
        for request in self._requests:
            self._put(request)
        self._requests.clear()

    def before_io_wait(self, timeout: float) -> None:
        """What trio calls before it looks for events, or sleeps at most `timeout` seconds."""
        if self._requests and (timeout or time.monotonic() - self._since > PATIENCE_SECONDS):
            with self._lock:
                self.flush()
