"""A worker: one thread, one trio loop, one plugin context, and their sessions.

Worker 0 is the loop of the engine, called *home* here. With ``smtp-threads`` above one, the other
workers have their own threads. With one worker, every call below is a plain function call.

Guarantees
----------
- `Worker.call` and `Worker.spawn` may be used from any thread, and after the worker's end.
  Calls from one thread to one worker run in order.
- A session stays on its worker, so plugin data of a context or of a connection is used by one
  thread only.
"""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVarTuple

import trio

from mailerq.plugins import Context, Plugins
from mailerq.turns import EndOfTurn

if TYPE_CHECKING:
    from mailerq.net.tracing import Trace

__all__ = ["Worker", "open_workers"]

Ts = TypeVarTuple("Ts")


class Worker:
    """A worker. Use `context` and `nursery` on its thread only."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.load = 0
        """The number of its sessions; the code that assigns sessions maintains this."""
        self.traces: tuple[Trace, ...] = ()
        """The active traces, which sessions that begin may join."""
        self.context: Context
        self.nursery: trio.Nursery
        self._token: trio.lowlevel.TrioToken
        self.thread = 0
        """The identity of its thread, once the worker runs."""
        self._stop: trio.Event
        self._ends = False
        """The nursery takes no more tasks."""

    def call(self, function: Callable[[*Ts], object], *args: *Ts) -> bool:
        """Run a plain function on the thread of this worker: now if called there, else soon.

        Returns False, and calls nothing, if the worker has ended.
        """
        if threading.get_ident() == self.thread:
            function(*args)
            return True
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            return False
        return True

    def spawn(
        self,
        function: Callable[[*Ts], Awaitable[object]],
        *args: *Ts,
        lost: Callable[[], object] = lambda: None,
    ) -> None:
        """Start a task on this worker. If the worker has ended, call `lost` on any thread instead.

        The task must handle its own errors: an exception that escapes ends the engine.
        """

        def start() -> None:
            if self._ends:
                lost()
            else:
                self.nursery.start_soon(function, *args)

        if not self.call(start):
            lost()

    async def run(
        self,
        plugins: Plugins,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `stop`, then wait for the remaining tasks."""
        await self._serve(plugins, task_status.started)

    async def _serve(self, plugins: Plugins, started: Callable[[], object]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self.thread = threading.get_ident()
        self._stop = trio.Event()
        self.context = await plugins.open_context(self.index)
        try:
            async with trio.open_nursery() as self.nursery:
                try:
                    started()
                    await self._stop.wait()
                finally:
                    self._ends = True  # the nursery is open until here
        finally:
            EndOfTurn.of_this_loop().leave()
            with trio.CancelScope(shield=True):
                await self.context.close()

    async def run_in_thread(
        self,
        plugins: Plugins,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Like `run`, in another thread with its own trio loop."""
        home = trio.lowlevel.current_trio_token()
        started = partial(home.run_sync_soon, task_status.started)
        run = partial(trio.run, self._serve, plugins, started)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(run, limiter=trio.CapacityLimiter(math.inf))

    def stop(self, *, cancel: bool = False) -> None:
        """Let `run` end after its tasks; `cancel` ends the tasks now."""
        self.call(self._cancel if cancel else self._finish)

    def _finish(self) -> None:
        self._stop.set()

    def _cancel(self) -> None:
        self.nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_workers(count: int, plugins: Plugins) -> AsyncIterator[list[Worker]]:
    """Start `count` workers, the first in this loop; stop them in reverse order."""
    workers = [Worker(index) for index in range(count)]
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        started: list[Worker] = []
        cancel = True  # until nothing went wrong
        try:
            for worker in workers:
                run = worker.run_in_thread if worker.index else worker.run
                await nursery.start(run, plugins)
                started.append(worker)
            yield workers
            cancel = False
        except Exception as error:
            failure = error  # raised outside of the nursery, which would make a group of it
        finally:
            for worker in reversed(started):
                worker.stop(cancel=cancel)
    if failure is not None:
        raise failure
