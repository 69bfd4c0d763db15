"""Work that is done on one trio loop for callers on any loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

import outcome
import trio

from mailerq.errors import QueueError

__all__ = ["Home", "Tended", "tended"]

T = TypeVar("T")


class Tended(Protocol):
    """An object with tasks, see `tended`."""

    async def run(
        self,
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run the tasks within `scope`, which ends them."""

    async def close(self) -> None:
        """Finish what is under way; the tasks still run."""


SomeTended = TypeVar("SomeTended", bound=Tended)


@asynccontextmanager
async def tended(
    make: Callable[[trio.Nursery], Awaitable[SomeTended]],
) -> AsyncIterator[SomeTended]:
    """Make an object, and run its tasks for the duration of the context.

    The tasks outlive a cancelled body, which has yet to settle.
    """
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        made = await make(nursery)
        scope = trio.CancelScope(shield=True)
        await nursery.start(made.run, scope)
        try:
            yield made
        except BaseException as error:
            failure = error  # the nursery would wrap it
        finally:
            with trio.CancelScope(shield=True):
                await made.close()
            scope.cancel()
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # the error refers to this frame


class Home:
    """A loop that does work for others, in `nursery`, until `close`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._under_way = 0
        self._idle = trio.Event()
        self._closed = self._over = False

    @property
    def is_here(self) -> bool:
        """Whether the caller is on this loop."""
        return trio.lowlevel.current_trio_token() is self._token

    @property
    def closed(self) -> bool:
        """Whether further work is refused."""
        return self._closed

    def soon(self, call: Callable[..., object], *arguments: object) -> None:
        """Call on this loop soon, from any thread."""
        self._token.run_sync_soon(call, *arguments)

    async def close(self) -> None:
        """Refuse further work, and wait for what is under way."""
        self._closed = True
        while self._under_way:
            self._idle = trio.Event()
            await self._idle.wait()
        self._over = True

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do work on this loop; it cannot be cancelled. `QueueError`: the loop is closed."""
        if self._closed:
            raise QueueError("the queue is closed")
        if self.is_here:
            with trio.CancelScope(shield=True):
                return await self.counted(work)
        task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()

        async def run() -> None:
            with trio.CancelScope(shield=True):
                result = await outcome.acapture(self.counted, work)
            token.run_sync_soon(trio.lowlevel.reschedule, task, result)

        def start() -> None:
            if self._over:
                error = outcome.Error(QueueError("the queue is closed"))
                token.run_sync_soon(trio.lowlevel.reschedule, task, error)
            else:
                self._nursery.start_soon(run)

        try:
            self._token.run_sync_soon(start)
        except trio.RunFinishedError:
            raise QueueError("the queue is closed") from None
        value: T = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        return value

    async def counted(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do work of this loop itself; `close` waits for it."""
        self._under_way += 1
        try:
            return await work()
        finally:
            self._under_way -= 1
            self._idle.set()
