"""The turns of a trio loop: work for the end of a turn, and results that wake tasks.

Bytes to send and requests to commit are cheaper together than one by one, so they are collected
while tasks run, and leave when trio is about to wait for events. One instrument serves the loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, cast

import outcome
import trio

__all__ = ["EndOfTurn", "woken"]

log = logging.getLogger("mailerq.turns")

Callback = Callable[[bool], bool]
"""Gets whether the loop is idle: no task is ready to run. Returns whether a task may be ready now.

A callback may register callbacks, which run at the end of the next turn.
"""


class EndOfTurn:
    """The callbacks of one loop. Use an instance on the thread of its loop only."""

    def __init__(self) -> None:
        self._callbacks: list[Callback] = []
        self._after: list[Callback] = []
        """Called after `_callbacks`."""
        self._last: list[Callback] = []
        """Called at the end of this turn, after the others."""
        self._next_last: list[Callback] = []
        self._awake: trio.lowlevel.Task | None = None
        self._rests = False
        """Whether the task `_awake` waits for the next `call_last`."""
        self._token = trio.lowlevel.current_trio_token()
        self._installed = False
        self._leaving = False

    @classmethod
    def of_this_loop(cls) -> EndOfTurn:
        """Return the instance of the running loop."""
        end = _ends.get(None)
        if end is None:
            end = cls()
            _ends.set(end)
        return end

    def call(self, callback: Callback) -> None:
        """Call `callback` once, at the end of this turn. An exception of the callback is logged."""
        if not self._installed:
            self._install()
        self._callbacks.append(callback)

    def call_after(self, callback: Callback) -> None:
        """Call `callback` once, at the end of this turn, after the callbacks of `call`.

        By then the bytes of this turn have left. A callback that wakes a thread belongs here: each
        send gives up Python's lock, and the thread would take it.
        """
        if not self._installed:
            self._install()
        self._after.append(callback)

    def call_last(self, callback: Callback) -> None:
        """Call `callback` once, as one of the last at the end of the next turn.

        Until then all tasks that are ready now have run, and what they wrote has left.
        """
        if not self._installed:
            self._install()
        self._next_last.append(callback)
        if self._awake is None:
            self._awake = trio.lowlevel.spawn_system_task(self._stay_awake)
        elif self._rests:
            self._rests = False
            trio.lowlevel.reschedule(self._awake)

    async def _stay_awake(self) -> None:
        """Be ready while last callbacks wait, so that trio does not decide to sleep before them.

        Then the loop would have to wake itself through a socket, with five system calls.
        """
        while True:
            while self._last or self._next_last:
                await trio.lowlevel.cancel_shielded_checkpoint()
            self._rests = True
            await trio.lowlevel.wait_task_rescheduled(self._end)

    def _end(self, _: object) -> trio.lowlevel.Abort:
        """The loop ends."""
        self._rests = False
        return trio.lowlevel.Abort.SUCCEEDED

    def leave(self) -> None:
        """Detach from the loop when no callback waits; the next `call` attaches again."""
        self._leaving = self._installed

    def before_io_wait(self, timeout: float) -> None:
        """Called by trio before it polls for events, or sleeps at most `timeout` seconds."""
        if self._callbacks or self._after or self._last or self._next_last:
            callbacks, self._callbacks = self._callbacks, []
            callbacks += self._after
            callbacks += self._last
            self._after = []
            self._last, self._next_last = self._next_last, []
            idle, ready = timeout > 0, False
            for callback in callbacks:
                try:
                    if callback(idle):
                        ready = True
                except Exception:  # trio would remove the instrument
                    log.exception("work at the end of a turn failed")
                    ready = True
            left = self._callbacks or self._after or self._last or self._next_last
            if idle and (ready or left):
                # trio has decided to sleep before the callbacks ran.
                self._token.run_sync_soon(_nothing)
        elif self._leaving:
            trio.lowlevel.remove_instrument(_instrument(self))
            self._installed = self._leaving = False

    def _install(self) -> None:
        trio.lowlevel.add_instrument(_instrument(self))
        self._installed = True


class Woken:
    """The result that `woken` makes; trio only unwraps it."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def unwrap(self) -> object:
        return self.value


def woken(value: object) -> outcome.Outcome[Any]:
    """A result of `trio.lowlevel.wait_task_rescheduled`, for `reschedule`.

    Costs less than `outcome.Value`, which runs Python code when it is made and when it is used. One
    result may wake any number of tasks.
    """
    return cast("outcome.Outcome[Any]", Woken(value))


def _instrument(end: EndOfTurn) -> trio.abc.Instrument:
    # trio finds the methods of an instrument by name, and a compiled class has no base in Python.
    return cast("trio.abc.Instrument", end)


def _nothing() -> None:
    pass


_ends: Final = trio.lowlevel.RunVar[EndOfTurn | None]("ends of turns", None)
