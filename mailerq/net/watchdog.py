"""Detect a worker whose loop is blocked, and log what it is doing.

Theory of operation
-------------------
One thread watches all workers. Once a second it asks each loop to run a function, which a running
loop does at once. If the function has not run after `watchdog-seconds`, the loop is blocked, by a
plugin or by our code. Then the log names what the thread of the worker is doing, and again each
time that the blockage has lasted twice as long.

A call that holds Python's lock blocks this thread as well, and so does a stopped process; this
thread logs the delay afterwards. In the meantime, and before and after the workers exist, a thread
of the core watches, which needs no lock (`mailerq.faults`). It also sees calls that load,
initialize and clean up plugins. Its lines bypass `logging` and go straight to the application log.

The watchdog costs a worker one function call a second.
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

from mailerq.faults import Watch
from mailerq.net.worker import Worker

__all__ = ["Watchdog"]

log = logging.getLogger("mailerq.watchdog")

LOOK_SECONDS: Final = 1.0
MIN_LOOK_SECONDS: Final = 0.01
LOOKS: Final = 4
"""Workers are checked once a second, and at least this often within `watchdog-seconds`."""

FRAMES: Final = 3
"""Python functions to log if no plugin is running; outer callers are rarely the cause."""

PROCESS: Final = "process"
"""The place in the statistics for a blockage of all threads."""


@dataclass(slots=True, eq=False)
class _Pulse:
    """A worker and the state of its loop. Times are on the monotonic clock."""

    worker: Worker
    asked: float | None = None
    """Time of the unanswered request, None without one."""
    took: float = 0.0
    """Seconds that the last answer took."""
    report_after: float = 0.0
    """Seconds after `asked` until the next report."""
    where: str | None = None
    """The place where the worker is blocked, None while its loop runs."""


class Watchdog:
    """Watches while its context is open. With `seconds` 0 it does nothing."""

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
        """Watch the loops of these workers from now on."""
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
        """Return the number of stalls and of blocked workers, the longest stall, and the places."""
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
                self._recovered(pulse)
            pulse.report_after = self._seconds
            pulse.asked = now
            if not pulse.worker.call(_answer, pulse):
                pulse.asked = None
        elif now - asked >= pulse.report_after:
            pulse.report_after *= 2
            self._report(pulse, now - asked)

    def _report(self, pulse: _Pulse, seconds: float) -> None:
        where, detail = _what_runs(pulse.worker)
        if pulse.where is None:
            pulse.where = where
            self._count(where, seconds)
        log.error(
            "worker %d has stood still for %.1f s, in %s", pulse.worker.index, seconds, detail
        )

    def _recovered(self, pulse: _Pulse) -> None:
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
    """Called on the loop of the worker, which therefore runs."""
    assert pulse.asked is not None
    pulse.took = time.monotonic() - pulse.asked
    pulse.asked = None


def _what_runs(worker: Worker) -> tuple[str, str]:
    """Return what a worker is doing: a name for the statistics, and a text for people."""
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
