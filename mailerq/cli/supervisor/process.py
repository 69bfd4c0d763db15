"""A process of several as its parent sees it: start it, send requests, read replies.

The standard input of the process is a socket. The parent sends a head and the settings, then
requests, one per line. The process sends a line when it serves or cannot serve, and then a reply to
each request, in order.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import struct
import sys
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Self

import trio

from mailerq.cli import EX_CONFIGURATION
from mailerq.errors import MailerqError
from mailerq.live import Snapshot
from mailerq.message import decode_properties, encode_properties

__all__ = ["HEAD", "Ended", "NoStart", "Process", "describe"]

log = logging.getLogger("mailerq")

HEAD: Final = struct.Struct("!Q")
"""The parent's first bytes: the length of the pickled ``(share, config, number)`` behind them."""

MAX_QUESTIONS: Final = 100
"""Unanswered requests per process."""

MAX_REQUEST_BYTES: Final = 256
"""Bytes of a request: so few and short requests always fit into a socket's buffer."""

READ_BYTES: Final = 1 << 16

MAX_REPLY_BYTES: Final = 16 << 20
"""Bytes of one reply; a process that sends more without an end is broken."""

EXIT_SECONDS: Final = 5.0
"""How long a process may take to end after it has said that it cannot start, or continue."""


class Ended(Exception):
    """A process ended, or does not answer."""


class NoStart(Exception):
    """A process says why it cannot start. `status` is its exit status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


@dataclass(slots=True, eq=False)
class _Question:
    """A request; its reply is None if the process has ended."""

    answered: trio.Event = field(default_factory=trio.Event)
    reply: dict[str, Any] | None = None


@dataclass(slots=True, eq=False)
class Process:
    """A process, its socket, and the requests that it has not answered."""

    index: int
    program: trio.Process
    sock: trio.socket.SocketType
    questions: deque[_Question] = field(default_factory=deque)
    over: trio.Event = field(default_factory=trio.Event)

    @classmethod
    async def start(cls, index: int) -> Self:
        """Start a process for a share. Raises `NoStart`."""
        with ExitStack() as stack:
            try:
                ours, theirs = socket.socketpair()
                stack.enter_context(theirs)
                stack.callback(ours.close)
                program = await trio.lowlevel.open_process(
                    # -P: do not import from the working directory.
                    [sys.executable, "-P", "-m", "mailerq.cli.supervisor.child", str(index)],
                    stdin=theirs.fileno(),
                    # Signals of a terminal (Ctrl-C, hang-up) are for the parent, even before the
                    # process can ignore them.
                    process_group=0,
                )
            except OSError as error:
                raise NoStart(
                    f"process {index} cannot be started: {error.strerror or error}", os.EX_OSERR
                ) from None
            theirs.close()
            stack.pop_all()
        return cls(index, program, trio.socket.from_stdlib_socket(ours))

    async def until_ready(self, snapshot: Snapshot) -> list[tuple[str, int]]:
        """Send the settings and wait until the process serves; returns its addresses. Raises
        `NoStart`.
        """
        question = _Question()
        self.questions.append(question)
        settings = pickle.dumps((self.index, snapshot.config, snapshot.number))
        # The process has ended or is about to.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await trio.SocketStream(self.sock).send_all(HEAD.pack(len(settings)) + settings)
        await question.answered.wait()
        reply = question.reply
        if reply is None:
            how = describe(await self.program.wait())
            raise NoStart(f"{self} {how} at its start", os.EX_SOFTWARE)
        if "failed" in reply:
            status = os.EX_TEMPFAIL if reply.get("temporary") else EX_CONFIGURATION
            raise NoStart(str(reply["failed"]), status)
        try:
            return [(str(ip), int(port)) for ip, port in reply["addresses"]]
        except (KeyError, TypeError, ValueError):
            raise NoStart(f"{self} does not say where it listens", os.EX_SOFTWARE) from None

    async def ask(
        self, command: str, seconds: float, *, file: int | None = None, **arguments: object
    ) -> dict[str, Any]:
        """The reply to a request. Raises `Ended`, or `MailerqError` with the error of the process.

        A `file` goes along, for data longer than a request.
        """
        if self.over.is_set() or len(self.questions) >= MAX_QUESTIONS:
            raise Ended(f"{self} does not answer")
        request = encode_properties({"command": command, **arguments}) + b"\n"
        if len(request) > MAX_REQUEST_BYTES:
            raise MailerqError(f"{command}: the request is too long")
        question = _Question()
        self.questions.append(question)
        # Shielded: replies are matched by order, so every listed request must be sent.
        with (
            trio.CancelScope(shield=True),
            suppress(OSError, trio.ClosedResourceError),  # its end will be noticed
        ):
            if file is None:
                await self.sock.send(request)
            else:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", file))
                await self.sock.sendmsg([request], [rights])
        with trio.move_on_after(seconds):
            await question.answered.wait()
        if question.reply is None:
            raise Ended(f"{self} does not answer")
        if "error" in question.reply:
            raise MailerqError(f"{self}: {question.reply['error']}")
        return question.reply

    async def connect(self, seconds: float) -> trio.SocketStream:
        """A connection to the process, for one request. Raises as `ask`, and OSError."""
        with ExitStack() as stack:
            ours, theirs = socket.socketpair()
            stack.enter_context(theirs)
            stack.callback(ours.close)
            await self.ask("connect", seconds, file=theirs.fileno())
            theirs.close()
            stack.pop_all()
        return trio.SocketStream(trio.socket.from_stdlib_socket(ours))

    async def listen(self) -> None:
        """Give each reply to the oldest request, until the process ends."""
        failed = False
        try:
            failed = await self._hear()
        except (OSError, trio.ClosedResourceError):
            pass
        except MailerqError as error:
            log.critical("%s says what is no reply, it is killed: %s", self, error)
            self.program.kill()
        self.over.set()
        for question in self.questions:
            question.answered.set()
        if failed:
            with trio.move_on_after(EXIT_SECONDS):
                await self.program.wait()
            self.program.kill()

    async def _hear(self) -> bool:
        """Whether the process announced its end, instead of just ending.

        Raises `MailerqError` for an invalid reply: a plugin may have written on the socket, for
        example.
        """
        unread = b""
        serves = False
        while data := await self.sock.recv(READ_BYTES):
            *lines, unread = (unread + data).split(b"\n")
            if len(unread) > MAX_REPLY_BYTES:
                raise MailerqError("a line that does not end")
            for line in lines:
                reply = decode_properties(line)
                if serves and "failed" in reply:  # it explains its end, and answers no more
                    log.critical("%s: %s", self, reply["failed"])
                    return True
                serves = True
                if self.questions:
                    question = self.questions.popleft()
                    question.reply = reply
                    question.answered.set()
        return False

    def leave(self) -> None:
        """Tell the process to stop in its time."""
        with suppress(OSError):  # it has ended already
            self.sock.shutdown(socket.SHUT_WR)

    async def end(self) -> None:
        """Stop listening, and make sure that the process ends."""
        self.over.set()
        self.sock.close()
        with trio.move_on_after(EXIT_SECONDS, shield=True):
            await self.program.wait()
        if self.program.returncode is None:
            self.program.kill()
            with trio.CancelScope(shield=True):
                await self.program.wait()

    def __str__(self) -> str:
        return f"process {self.index} (pid {self.program.pid})"


def describe(status: int) -> str:
    """An exit status for people."""
    if status < 0:
        try:
            return f"was ended by {signal.Signals(-status).name}"
        except ValueError:  # a real-time signal
            return f"was ended by signal {-status}"
    return f"ended with status {status}"
