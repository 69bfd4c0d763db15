"""Notice a worker whose loop has stood still, and say what it is in.

Theory of operation
-------------------
One thread looks after all workers. Once a second it asks each loop to run a function of its
soon, which a loop that turns does at once. As long as the answer is due nothing else is asked;
when it has been due for `watchdog-seconds` the worker stands still: a plugin blocks instead of
giving control back, or something of ours does. Then the log has what the worker's thread is in
at that moment, and again each time that it has stood twice as long.

A call that holds Python's lock keeps this thread from looking as well, as does a process that
is stopped. The thread sees afterwards how late it is. What happens meanwhile, and before there are
workers and after, a thread of the core says, which needs no lock (`mailerq.faults`): it looks at
the calls into plugins, those while they are opened, initialized and cleaned up among them. Its
lines go to the application log without passing through `logging`.

A worker pays one function call a second for all this.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Self

import trio

from mailerq.faults import Watch
from mailerq.net.worker import Worker

__all__ = ["Watchdog"]

log = logging.getLogger("mailerq.watchdog")

LOOK_SECONDS: Final = 1.0
MIN_LOOK_SECONDS: Final = 0.01
LOOKS: Final = 4
"""Workers are looked at once a second, and at least so often in `watchdog-seconds`."""

FRAMES: Final = 3
"""Python functions that are named when it is no plugin; who called them is seldom the cause."""

PROCESS: Final = "process"
"""The place where all threads stood still."""


@dataclass(slots=True, eq=False)
class _Pulse:
    """A worker, and what is known of its loop. Times are on the monotonic clock."""

    worker: Worker
    asked: float | None = None
    """Since when the loop has been asked, None when it has answered."""
    took: float = 0.0
    """How long the last answer took."""
    patience: float = 0.0
    where: str | None = None
    """What it stands still in, None while it turns."""


class Watchdog:
    """Looks while its context is open; `seconds` 0 is not at all."""

    def __init__(self, seconds: float) -> None:
        self._seconds = 0.0
        self._wanted = seconds
        self._watch = Watch()
        self._pulses: list[_Pulse] = []
        self._stalls = 0
        self._longest = 0.0
        self._places: dict[str, int] = {}
        self._end = threading.Event()
        self._thread: threading.Thread

    def __enter__(self) -> Self:
        self._start(self._wanted)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def look_after(self, workers: Iterable[Worker]) -> None:
        """From now on, see that the loops of these turn."""
        self._pulses = [_Pulse(worker) for worker in workers]
        if self._seconds:
            self._watch.leave_workers()

    def set_seconds(self, seconds: float) -> None:
        """Another `watchdog-seconds` from now on, while its context is open. Raises OSError."""
        if seconds != self._seconds:
            self._stop()
            self._start(seconds)
            self.look_after([pulse.worker for pulse in self._pulses])

    def _start(self, seconds: float) -> None:
        self._seconds = 0.0
        if seconds:
            self._end = threading.Event()
            self._watch.start(seconds)
            self._seconds = seconds
            self._watch.beat()
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()

    def _stop(self) -> None:
        if self._seconds:
            self._end.set()
            self._thread.join()
            self._watch.stop()

    def statistics(self) -> dict[str, Any]:
        """How often a worker stood still, in what, for how many seconds at most; who does now."""
        return {
            "stalls": self._stalls,
            "standing": sum(pulse.where is not None for pulse in self._pulses),
            "longest": self._longest,
            "places": dict(self._places),
        }

    def _run(self) -> None:
        pause = min(LOOK_SECONDS, max(self._seconds / LOOKS, MIN_LOOK_SECONDS))
        due = time.monotonic() + pause
        while not self._end.wait(pause):
            self._watch.beat()
            late = time.monotonic() - due
            if late >= self._seconds:
                self._count(PROCESS, late)
                log.error(
                    "the process has stood still for %.1f s: it was stopped, or something in it "
                    "held Python's lock",
                    late,
                )
            for pulse in self._pulses:
                self._look(pulse)
            due = time.monotonic() + pause

    def _look(self, pulse: _Pulse) -> None:
        now = time.monotonic()
        asked = pulse.asked
        if asked is None:
            if pulse.where is not None:
                self._goes_on(pulse)
            pulse.patience = self._seconds
            pulse.asked = now
            try:
                pulse.worker.call(_answer, pulse)
            except trio.RunFinishedError:
                pulse.asked = None
        elif now - asked >= pulse.patience:
            pulse.patience *= 2
            self._stands(pulse, now - asked)

    def _stands(self, pulse: _Pulse, seconds: float) -> None:
        where, detail = _what_runs(pulse.worker)
        if pulse.where is None:
            pulse.where = where
            self._count(where, seconds)
        log.error(
            "worker %d has stood still for %.1f s, in %s", pulse.worker.index, seconds, detail
        )

    def _goes_on(self, pulse: _Pulse) -> None:
        self._longest = max(self._longest, pulse.took)
        log.warning(
            "worker %d goes on; it stood still for %.1f s, in %s",
            pulse.worker.index,
            pulse.took,
            pulse.where,
        )
        pulse.where = None

    def _count(self, where: str, seconds: float) -> None:
        self._stalls += 1
        self._longest = max(self._longest, seconds)
        self._places[where] = self._places.get(where, 0) + 1


def _answer(pulse: _Pulse) -> None:
    """On the worker's loop: it turns."""
    assert pulse.asked is not None
    pulse.took = time.monotonic() - pulse.asked
    pulse.asked = None


def _what_runs(worker: Worker) -> tuple[str, str]:
    """What a worker's thread is in: a name to count by, and a text for people."""
    running = worker.context.running
    if running is not None:
        plugin, function = running
        return f"{plugin} {function}", f"{function} of plugin {plugin}"
    names: list[str] = []
    frame = sys._current_frames().get(worker.thread)
    while frame is not None and len(names) < FRAMES:
        code = frame.f_code
        names.append(f"{code.co_qualname} ({os.path.basename(code.co_filename)}:{frame.f_lineno})")
        frame = frame.f_back
    return names[0] if names else "", ", called by ".join(names)
