"""Wait for sockets that are registered with the kernel once, not for each wait.

Theory of operation
-------------------
Every trio loop with streams has one `Poller`: an epoll descriptor, and a system task that waits for
it in the usual way. The first wait for a socket registers it, edge triggered: the kernel reports
each new event. `Socket` stores the event and wakes the waiting task. Without a waiting task, the
next wait finds the stored event and returns at once. trio itself uses one-shot waits: each wait
costs a system call to arm it and some bookkeeping, eight times for each message of a busy relay.

No edge may be lost, so a socket counts as readable until a read has emptied it. A read without
input proves that, and so does a read that got less than its size (epoll(7)). But after the peer has
closed or sent urgent data, a read may stop short, and then only a read without input counts.

Guarantees
----------
- A `Socket` is used in one loop, by one reader at a time.
- If a plugin closes the descriptor of a socket or of the poller, at most one wait ends with
  `StreamLost`: the poller has a copy of its descriptor.
- A cancelled wait loses no event: it is stored for the next wait. A socket that was full once stays
  registered for output, whose edges cost little and end no other wait.
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
from mailerq.turns import woken

__all__ = ["Socket", "StreamLost"]

log = logging.getLogger("mailerq.net")

_INPUT: Final = select.EPOLLIN | select.EPOLLPRI | select.EPOLLRDHUP | select.EPOLLET
_OUTPUT: Final = select.EPOLLOUT
_USUAL: Final = ~(select.EPOLLIN | select.EPOLLOUT)
_END: Final = select.EPOLLHUP | select.EPOLLERR

EXHAUSTED_SECONDS: Final = 0.1
"""Pause when the process has no descriptors left."""


class StreamLost(Exception):
    """The connection broke: reset, timed out by the kernel, or invalid TLS."""


class Socket:
    """The events of a descriptor. The reader uses `readable` and `empties`."""

    __slots__ = (
        "_attendant",
        "_call",
        "_poller",
        "_reader",
        "_wakeable",
        "empties",
        "fd",
        "readable",
    )

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.readable = False
        """Whether a read may find input. A reader that finds none sets this to False."""
        self.empties = True
        """Whether a short read proves that the socket is empty."""
        self._poller: Poller | None = None
        self._reader: trio.lowlevel.Task | None = None
        self._call: Callable[[], None] | None = None
        self._attendant: Callable[[], bool] | None = None
        self._wakeable = False

    def may_have_input(self) -> bool:
        """Whether the poller has reported input, or does not watch the socket yet."""
        return self.readable or self._poller is None

    async def wait_readable(self, *, wakeable: bool = False) -> bool:
        """Wait until a read may find input; return False if `wake` ended the wait.

        `wake` ends only a `wakeable` wait. If there is input already, this is not a checkpoint, so
        a loop of reads must let other tasks run.
        """
        if self.readable:
            return True
        self._begin_to_read()
        self._wakeable = wakeable
        came: bool = await trio.lowlevel.wait_task_rescheduled(self._abort_reader)
        return came

    async def attend(self, attendant: Callable[[], bool]) -> None:
        """Sleep, and call `attendant` each time a read may find input, until it returns True.

        The task wakes only when `attendant` returns True or raises, or on `alarm`. An exception of
        `attendant` is raised here.
        """
        self._begin_to_read()
        self._attendant = attendant
        await trio.lowlevel.wait_task_rescheduled(self._abort_reader)

    def call_when_writable(self, function: Callable[[], None]) -> None:
        """Call `function` once when a full socket takes more output; it must not raise.

        Each socket has one such function. Raises `StreamLost` if the kernel cannot watch the
        socket.
        """
        # Few sockets are ever full. Registering again also reports a socket that has room by now.
        if self._poller is None:
            self._poller = Poller.add(self, _INPUT | _OUTPUT)
        else:
            self._poller.modify(self, _INPUT | _OUTPUT)
        self._call = function

    def wake(self) -> None:
        """End a `wakeable` wait for input."""
        if self._wakeable:
            self._wake_reader(_WOKEN)

    def interrupt(self, error: Exception) -> bool:
        """End the wait of the reader with an exception; return False if there is no reader."""
        if self._reader is None:
            return False
        self._wake_reader(outcome.Error(error))
        return True

    def alarm(self) -> None:
        """Wake the reader for a reason that the kernel does not report."""
        self.readable = True
        if self._reader is not None:
            self._wake_reader(_CAME)

    def stray(self) -> None:
        """Wake the waiting tasks, because another file has this descriptor now. Any thread."""
        poller, self._poller = self._poller, None
        if poller is not None:
            poller.remove(self)
            with suppress(trio.RunFinishedError):
                poller.token.run_sync_soon(self.notify, _END)

    def forget(self) -> None:
        """Unregister the descriptor before it is closed."""
        self._call = None
        if self._poller is not None:
            self._poller.remove(self)

    def notify(self, events: int) -> None:
        """Handle events of the kernel."""
        if events & ~_OUTPUT:
            if events & _USUAL:
                self.empties = False
            if self._attendant is None:
                self.alarm()
            else:
                self.readable = True
                self._attend(self._attendant)
        if events & (_OUTPUT | _END) and self._call is not None:
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
            result = _CAME
        except Exception as error:
            result = outcome.Error(error)
        if self._reader is not None:
            self._wake_reader(result)
        elif isinstance(result, outcome.Error):
            log.error("an attendant failed while no task waits", exc_info=result.error)

    def _wake_reader(self, result: outcome.Outcome[bool]) -> None:
        task, self._reader = self._reader, None
        self._attendant = None
        self._wakeable = False
        assert task is not None
        trio.lowlevel.reschedule(task, result)

    def _abort_reader(self, _: object) -> trio.lowlevel.Abort:
        self._reader = None
        self._attendant = None
        self._wakeable = False
        return trio.lowlevel.Abort.SUCCEEDED


class Poller:
    """The sockets of one trio loop."""

    def __init__(self) -> None:
        with select.epoll() as epoll:
            self._fd = os.dup(epoll.fileno())
            try:
                self._copy = os.dup(self._fd)
            except OSError:
                os.close(self._fd)
                raise
        self._sockets: dict[int, Socket] = {}
        self.token = trio.lowlevel.current_trio_token()

    @classmethod
    def add(cls, socket: Socket, events: int) -> Poller:
        """Register a socket with the poller of this loop; existing events are reported too.

        Raises `StreamLost`.
        """
        poller = _pollers.get(None)
        if poller is None:
            try:
                poller = cls()
            except OSError as error:
                raise StreamLost(f"cannot be waited for: {error.strerror}") from error
            _pollers.set(poller)
            trio.lowlevel.spawn_system_task(poller._run)
        poller._watch(socket, events, known=False)
        poller._sockets[socket.fd] = socket
        return poller

    def modify(self, socket: Socket, events: int) -> None:
        """Change the events of a socket; existing events are reported too."""
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
        """Replace the descriptor of the poller if it caused an error of `watch`."""
        if error.errno == errno.EBADF:
            with suppress(OSError):
                os.fstat(self._fd)
                return False
        elif error.errno != errno.EINVAL:  # EINVAL: the descriptor is another file, not an epoll
            return False
        self._reopen()
        return True

    def _reopen(self) -> None:
        self._fd = os.dup(self._copy)
        stray_close("a descriptor that watches connections")

    def remove(self, socket: Socket) -> None:
        """Stop reporting events to a socket. Closing its descriptor unregisters it.

        If a plugin keeps a copy of the descriptor, its events go to the next socket with the same
        number, whose read then finds nothing.
        """
        if self._sockets.get(socket.fd) is socket:
            del self._sockets[socket.fd]

    async def _run(self) -> None:
        # Runs until the end of the loop.
        sockets = self._sockets
        try:
            while True:
                try:
                    await trio.lowlevel.wait_readable(self._fd)
                    happened = happenings(self._fd)
                except (OSError, trio.ClosedResourceError):
                    # Any error means that a plugin closed the descriptor.
                    try:
                        self._reopen()
                    except OSError:  # no descriptor is left
                        await trio.sleep(EXHAUSTED_SECONDS)
                    continue
                for fd, events in happened:
                    if (socket := sockets.get(fd)) is not None:
                        socket.notify(events)
        finally:
            _pollers.set(None)
            for fd in (self._fd, self._copy):
                with suppress(OSError):
                    os.close(fd)


_CAME: Final = woken(True)
_WOKEN: Final = woken(False)

_pollers: Final = trio.lowlevel.RunVar[Poller | None]("pollers", None)
