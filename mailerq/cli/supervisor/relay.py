"""Pass the lines of several processes on to one asker, as they come (see `mailerq.net.control`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import trio

from mailerq.cli.supervisor.process import Ended, Process
from mailerq.errors import MailerqError
from mailerq.message import encode_properties
from mailerq.net.control import Request, Send

__all__ = ["relay"]

ASK_SECONDS: Final = 2.0
"""Timeout for a process to begin; one that hangs does not delay the others."""

LOOK_SECONDS: Final = 1.0
"""Interval of the look for processes that have started meanwhile."""

READ_BYTES: Final = 1 << 16


async def relay(
    processes: Callable[[], Iterable[Process]], request: Request, seconds: float, send: Send
) -> None:
    """Send a request to all processes, and their lines to the asker; return when all have ended.

    The first line comes when all processes have begun. Only one batch of lines of a process is
    here at a time: an asker who does not read makes the process wait, and lose lines.
    """
    line = encode_properties(request) + b"\n"
    asker = _Asker(send)
    known: set[Process] = set()
    open_ones = 0

    async def follow(process: Process, begun: trio.Event) -> None:
        nonlocal open_ones
        try:
            with suppress(Ended, MailerqError, OSError):
                async with await process.connect(ASK_SECONDS) as stream:
                    await stream.send_all(line)
                    await _pass(stream, asker, begun)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the process has ended
        finally:
            begun.set()
            open_ones -= 1

    with trio.move_on_after(seconds or math.inf):
        async with trio.open_nursery() as nursery:
            while True:
                events = []
                for process in list(processes()):
                    if process not in known:
                        known.add(process)
                        events.append(trio.Event())
                        open_ones += 1
                        nursery.start_soon(follow, process, events[-1])
                with trio.move_on_after(ASK_SECONDS):
                    for event in events:
                        await event.wait()
                await asker.begin()
                if not open_ones:
                    return
                await trio.sleep(LOOK_SECONDS)


async def _pass(stream: trio.SocketStream, asker: _Asker, begun: trio.Event) -> None:
    unread = b""
    while data := await stream.receive_some(READ_BYTES):
        *lines, unread = (unread + data).split(b"\n")
        if lines and not begun.is_set():
            begun.set()
            asker.first = asker.first or lines[0]
            if b'"error"' not in lines[0]:
                del lines[0]
        if lines:
            await asker.write(b"\n".join([*lines, b""]))


class _Asker:
    """The asker, for several tasks. The first line of the processes is sent once."""

    def __init__(self, send: Send) -> None:
        self.first = b""
        self._send = send
        self._lock = trio.Lock()
        self._begun = False

    async def begin(self) -> None:
        if not self._begun and self.first:
            self._begun = True
            await self.write(self.first + b"\n")

    async def write(self, lines: bytes) -> None:
        async with self._lock:
            await self._send(lines)
