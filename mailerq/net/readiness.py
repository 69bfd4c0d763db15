"""Waiting for sockets: each is made known to the kernel once, and not again for each wait.

Theory of operation
-------------------
Every trio loop that uses streams has one `Poller`, an epoll descriptor of its own with a system
task that waits for it the usual way. A socket is added when it is waited for the first time, edge
triggered: the kernel tells each time that something new has come. `Socket` notes that, wakes who
waits for it, and otherwise the next wait finds the note and is none. trio's own way is one shot:
each wait costs a system call to arm it and some bookkeeping, eight times for each message of a
busy relay.

An edge must not be lost: a socket counts as readable until a read has emptied it. A read that
found nothing proves that, and so does one that got less than it asked for (epoll(7)), unless the
peer has closed or sent urgent data, at which a read stops short: from then on only the former.

Guarantees
----------
- A `Socket` is used in one loop, by one reader and one writer at a time.
- A descriptor that a plugin closes, a socket's or the poller's own, ends one wait with `StreamLost`
  at most: the poller has a copy of its descriptor.
- A wait that is cancelled loses nothing: what comes is noted for the next one. A socket that was
  full once stays registered for output, whose edges cost little and end no other wait.
"""

from __future__ import annotations

import errno
import logging
import os
import select
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import outcome
import trio

from mailerq.plugins import stray_close
from mailerq.sockets import happenings, watch

__all__ = ["Socket", "StreamLost"]

log = logging.getLogger("mailerq.net")

_INPUT: Final = select.EPOLLIN | select.EPOLLPRI | select.EPOLLRDHUP | select.EPOLLET
_OUTPUT: Final = select.EPOLLOUT
_USUAL: Final = ~(select.EPOLLIN | select.EPOLLOUT)
_END: Final = select.EPOLLHUP | select.EPOLLERR


class StreamLost(Exception):
    """The connection broke: reset, timed out by the kernel, or TLS that makes no sense."""


class Socket:
    """What is known of a descriptor. `readable` and `empties` are for who reads from it."""

    __slots__ = (
        "_attendant",
        "_call",
        "_poller",
        "_reader",
        "_rousable",
        "_writer",
        "empties",
        "fd",
        "readable",
    )

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.readable = False
        """Whether a read may find something; who finds nothing sets it to False."""
        self.empties = True
        """Whether a read that got less than it asked for has left nothing."""
        self._poller: Poller | None = None
        self._reader: trio.lowlevel.Task | None = None
        self._writer: trio.lowlevel.Task | None = None
        self._call: Callable[[], None] | None = None
        self._attendant: Callable[[], bool] | None = None
        self._rousable = False

    async def wait_readable(self, *, rousable: bool = False) -> bool:
        """Wait until a read may find something; False when `rouse` ended the wait.

        Only a wait that is `rousable` can be ended so. It is no checkpoint when something is there
        already: who reads in a loop has to let others run.
        """
        if self.readable:
            return True
        self._begin_to_read()
        self._rousable = rousable
        came: bool = await trio.lowlevel.wait_task_rescheduled(self._abort_reader)
        return came

    async def attend(self, attendant: Callable[[], bool]) -> None:
        """Have `attendant` called each time that a read may find something, until it returns True.

        Meanwhile the task sleeps: where it is not needed for what came in, it is not woken for
        that. What `attendant` raises, when it is called, is raised here. `alarm` ends it as well.
        """
        self._begin_to_read()
        self._attendant = attendant
        await trio.lowlevel.wait_task_rescheduled(self._abort_reader)

    async def wait_writable(self) -> None:
        """Wait until the socket takes more, after it took less than it was given."""
        if self._writer is not None:
            raise trio.BusyResourceError("another task writes to this socket")
        self._ask_for_output()
        self._writer = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort_writer)

    def call_when_writable(self, function: Callable[[], None]) -> None:
        """Have `function` called once, as `wait_writable` would end; it must not raise.

        There is one for each socket. A task may wait at the same time, and is woken as well.
        """
        self._ask_for_output()
        self._call = function

    def rouse(self) -> None:
        """End a `rousable` wait for input."""
        if self._rousable:
            self._wake_reader(outcome.Value(False))

    def alarm(self) -> None:
        """Let who reads look: there is something that the kernel does not tell."""
        self.readable = True
        if self._reader is not None:
            self._wake_reader(outcome.Value(True))

    def stray(self) -> None:
        """Another file has the number of the descriptor by now. Wake who waits. Any thread."""
        poller, self._poller = self._poller, None
        self._call = None
        if poller is not None:
            poller.remove(self)
            with suppress(trio.RunFinishedError):
                poller.token.run_sync_soon(self.notify, _END)

    def forget(self) -> None:
        """The descriptor is about to be closed."""
        self._call = None
        if self._poller is not None:
            self._poller.remove(self)

    def notify(self, events: int) -> None:
        """The kernel has seen these."""
        if events & ~_OUTPUT:
            if events & _USUAL:
                self.empties = False
            if self._attendant is None:
                self.alarm()
            else:
                self.readable = True
                self._attend(self._attendant)
        if events & (_OUTPUT | _END):
            if self._writer is not None:
                task, self._writer = self._writer, None
                trio.lowlevel.reschedule(task)
            if self._call is not None:
                function, self._call = self._call, None
                function()

    def _begin_to_read(self) -> None:
        if self._poller is None:
            self._poller = Poller.add(self, _INPUT)
        if self._reader is not None:
            raise trio.BusyResourceError("another task reads from this socket")
        self._reader = trio.lowlevel.current_task()

    def _attend(self, attendant: Callable[[], bool]) -> None:
        result: outcome.Outcome[bool]
        try:
            if not attendant():
                return
            result = outcome.Value(True)
        except Exception as error:
            result = outcome.Error(error)
        if self._reader is not None:
            self._wake_reader(result)
        elif isinstance(result, outcome.Error):
            log.error("nobody waits for this any more", exc_info=result.error)

    def _ask_for_output(self) -> None:
        # Only few sockets are ever full. To ask anew also tells when it is not any more.
        if self._poller is None:
            self._poller = Poller.add(self, _INPUT | _OUTPUT)
        else:
            self._poller.modify(self, _INPUT | _OUTPUT)

    def _wake_reader(self, result: outcome.Outcome[bool]) -> None:
        task, self._reader = self._reader, None
        self._attendant = None
        self._rousable = False
        assert task is not None
        trio.lowlevel.reschedule(task, result)

    def _abort_reader(self, _: object) -> trio.lowlevel.Abort:
        self._reader = None
        self._attendant = None
        self._rousable = False
        return trio.lowlevel.Abort.SUCCEEDED

    def _abort_writer(self, _: object) -> trio.lowlevel.Abort:
        self._writer = None
        return trio.lowlevel.Abort.SUCCEEDED


class Poller:
    """The sockets of one trio loop."""

    def __init__(self) -> None:
        with select.epoll() as epoll:
            self._fd = os.dup(epoll.fileno())
        self._copy = os.dup(self._fd)
        self._sockets: dict[int, Socket] = {}
        self.token = trio.lowlevel.current_trio_token()

    @classmethod
    def add(cls, socket: Socket, events: int) -> Poller:
        """Have this loop's poller tell `socket` what comes, and what is there already."""
        poller = _pollers.get(None)
        if poller is None:
            poller = cls()
            _pollers.set(poller)
            trio.lowlevel.spawn_system_task(poller._run)
        poller._watch(socket, events, known=False)
        poller._sockets[socket.fd] = socket
        return poller

    def modify(self, socket: Socket, events: int) -> None:
        """Tell it these from now on, and what of them is there already."""
        self._watch(socket, events, known=True)

    def _watch(self, socket: Socket, events: int, *, known: bool) -> None:
        try:
            try:
                watch(self._fd, socket.fd, events, known=known)
            except OSError as error:
                if not self._mend(error):
                    raise
                watch(self._fd, socket.fd, events, known=known)
        except OSError as error:
            raise StreamLost(f"cannot be waited for: {error.strerror}") from error

    def _mend(self, error: OSError) -> bool:
        """Replace the poller's own descriptor, if that is what an error of `watch` is about."""
        if error.errno == errno.EBADF:
            with suppress(OSError):
                os.fstat(self._fd)
                return False
        elif error.errno != errno.EINVAL:  # what the kernel says of a number that is another file
            return False
        self._reopen()
        return True

    def _reopen(self) -> None:
        self._fd = os.dup(self._copy)
        stray_close("a descriptor that watches connections")

    def remove(self, socket: Socket) -> None:
        """Tell it no more; closing the descriptor does the rest.

        A plugin may keep a copy of it. Then its events are told to whoever has the same number
        next, who finds that there is nothing.
        """
        if self._sockets.get(socket.fd) is socket:
            del self._sockets[socket.fd]

    async def _run(self) -> None:
        # Ends with the loop.
        sockets = self._sockets
        try:
            while True:
                try:
                    await trio.lowlevel.wait_readable(self._fd)
                    happened = happenings(self._fd)
                except (OSError, trio.ClosedResourceError):
                    # Whatever it says: the number is not the poller's any more.
                    self._reopen()
                    continue
                for fd, events in happened:
                    if (socket := sockets.get(fd)) is not None:
                        socket.notify(events)
        finally:
            _pollers.set(None)
            for fd in (self._fd, self._copy):
                with suppress(OSError):
                    os.close(fd)


_pollers: Final = trio.lowlevel.RunVar[Poller | None]("pollers", None)
