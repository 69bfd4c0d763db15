"""One process of several: an engine with a share of the queue, for `mailerq.cli.supervisor.parent`.

Standard input is the parent's socket. The parent first sends the number of the share and the
settings, then requests, one per line, as on the control socket. When the socket closes, or the
parent is gone, the engine stops in its time.

Requests are executed one after another, in order.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import struct
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Final

import trio

from mailerq import faults
from mailerq.cli import logs
from mailerq.cli.reloading import attempt, take
from mailerq.cli.serving import fail, overdue_seconds, prepare, stop_soon
from mailerq.cli.supervisor.process import HEAD
from mailerq.config import Config
from mailerq.engine import Engine
from mailerq.errors import ConfigError, EngineError, MailerqError, PluginError
from mailerq.message import decode_properties, encode_properties
from mailerq.net import control

__all__ = ["main"]

READ_BYTES: Final = 1 << 16

LONG: Final = ("explain", "queue-change", "top")
"""Commands whose requests come along as files."""

FILE: Final = struct.Struct("i")
"""A descriptor sent along with a request."""


def main() -> int:
    """Serve until the parent closes its end, or SIGTERM."""
    # Ctrl-C and hang-ups reach all processes of a terminal; the parent decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    parent = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    with parent.makefile("rb", buffering=0) as file:
        (length,) = HEAD.unpack(_read(file, HEAD.size))
        share, config, number = pickle.loads(_read(file, length))
    try:
        logs.configure(config, who(share))
        prepare(config)
        trio.run(_serve, config, share, number, parent)
    except EngineError as error:
        fail(error)
    except MailerqError as error:
        settings = isinstance(error, ConfigError | PluginError)
        _say(parent, {"failed": str(error), "temporary": not settings})
        return os.EX_CONFIG if settings else os.EX_TEMPFAIL
    except Exception as error:
        fail(error)
    return os.EX_OK


def who(share: int) -> str:
    """The prefix of each log line."""
    return f"process {share}: "


def _read(file: Any, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = file.read(length - len(data))
        if not more:
            raise SystemExit(os.EX_UNAVAILABLE)  # The parent is gone.
        data += more
    return data


def _say(parent: socket.socket, document: dict[str, Any]) -> None:
    parent.setblocking(True)
    try:
        parent.sendall(encode_properties(document) + b"\n")
    except BrokenPipeError:
        sys.exit(os.EX_UNAVAILABLE)


async def _serve(config: Config, share: int, number: int, parent: socket.socket) -> None:
    engine = Engine(config, share=share, number=number)
    failure: MailerqError | None = None
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(parent))
    stop, started = trio.Event(), trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        faults.set_deadline(overdue_seconds(config), (signal.SIGTERM,), parent.fileno())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_Requests(stream, share, engine, started, stop).serve)
            nursery.start_soon(_terminate, signals, engine, started, stop)
            try:
                async with engine:
                    ready = encode_properties({"addresses": engine.addresses})
                    await stream.send_all(ready + b"\n")
                    started.set()
                    await stop.wait()
            except MailerqError as error:
                failure = error  # Leave the nursery as the error itself, not as a group.
            except trio.BrokenResourceError:
                pass  # The parent ended while this process started.
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class _Requests:
    """The parent's requests, executed in order.

    `started` is set once the parent has been told that the engine serves. No reply comes before:
    the parent may ask as soon as it has read that line, while the line is still being sent.
    """

    def __init__(
        self,
        stream: trio.SocketStream,
        share: int,
        engine: Engine,
        started: trio.Event,
        stop: trio.Event,
    ) -> None:
        self._stream = stream
        self._who = who(share)
        self._files = deque[int]()
        """Files that came along with requests, in order."""
        self._engine = engine
        self._started = started
        self._stop = stop
        self._nursery: trio.Nursery
        self._of_engine = engine.commands()
        self._commands: control.Commands = {
            **self._of_engine,
            "reload": self._reload,
            "connect": self._connect,
            **{name: self._pass_on(name) for name in LONG},
        }

    async def serve(self) -> None:
        """Execute requests until cancelled; stop the engine when the parent is gone."""
        async with trio.open_nursery() as self._nursery:
            with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                await self._serve()
            self._nursery.cancel_scope.cancel()
        stop_soon(self._engine, self._started, self._stop)

    async def _serve(self) -> None:
        lines = b""
        while data := await self._receive():
            *requests, lines = (lines + data).split(b"\n")
            for request in requests:
                await self._started.wait()
                await self._stream.send_all(await control.reply_to(request, self._commands))

    async def _receive(self) -> bytes:
        """The parent's input, and the files that come along."""
        data, rights, _, _ = await self._stream.socket.recvmsg(
            READ_BYTES, socket.CMSG_SPACE(FILE.size), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, content in rights:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._files.extend(number for (number,) in FILE.iter_unpack(content))
        return data

    def _connect(self, request: control.Request) -> dict[str, Any]:
        """Serve the connection that came along as the control socket serves one."""
        if not self._files:
            raise MailerqError("no descriptor is left for a connection")
        sock = trio.socket.from_stdlib_socket(socket.socket(fileno=self._files.popleft()))
        stream = trio.SocketStream(sock)
        self._nursery.start_soon(control.serve_one, stream, self._of_engine)
        return {}

    def _reload(self, request: control.Request) -> dict[str, Any]:
        """Take the settings in the file that came along, or only report what is wrong with them."""
        config, number, wrong = pickle.loads(self._content())
        if request.get("try"):
            return attempt(self._engine, config, wrong)
        take(self._engine, config, number, self._who)
        return {}

    def _pass_on(self, name: str) -> Callable[[object], Any]:
        """A command whose request is in the file that came along: it is too long for the socket."""
        return lambda request: self._of_engine[name](decode_properties(self._content()))

    def _content(self) -> bytes:
        """The content of the next file that came along."""
        if not self._files:  # the kernel drops a file that this process has no descriptor for
            raise MailerqError("no descriptor is left for the file with the request")
        with open(self._files.popleft(), "rb") as file:
            # Not from its position, which all processes share.
            return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)


async def _terminate(
    signals: AsyncIterator[int], engine: Engine, started: trio.Event, stop: trio.Event
) -> None:
    async for _ in signals:
        stop_soon(engine, started, stop)


if __name__ == "__main__":
    sys.exit(main())
