"""A task that answers what its stream receives, for tests of how often the task wakes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing

from mailerq.net.stream import Stream

__all__ = ["Echo", "echo"]


class Echo(trio.abc.Instrument):
    """Answers each piece of input in angle brackets, up to the piece ``end``."""

    def __init__(self, stream: Stream) -> None:
        self.seen: list[bytes] = []
        self.steps = 0
        """Steps of the task since it first slept."""
        self._stream = stream
        self._task: trio.lowlevel.Task | None = None

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += task is self._task

    async def run(self) -> None:
        self._task = trio.lowlevel.current_task()
        await self._stream.receive_each(self._take)

    def _take(self, data: bytes) -> bool:
        self.seen.append(data)
        if data == b"end":
            return True
        self._stream.write(b"<" + data + b">")
        return False


@asynccontextmanager
async def echo(stream: Stream) -> AsyncIterator[Echo]:
    """Run an `Echo`, which sleeps when the context begins, and wait for its end."""
    answering = Echo(stream)
    trio.lowlevel.add_instrument(answering)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answering.run)
            await trio.testing.wait_all_tasks_blocked()
            answering.steps = 0
            yield answering
    finally:
        trio.lowlevel.remove_instrument(answering)
