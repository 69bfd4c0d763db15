"""One process of several: an engine with a share of the queue, for `mailerq.cli.supervisor.parent`.

Standard input is the socket of the parent. It gives the number of the share and the settings
first, and then requests, a line each, as on the control socket. When it closes, or the parent is
gone, the engine stops in its time.

Requests are executed one after another, in their order.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import Any, Final

import trio

from mailerq import faults
from mailerq.cli import logs
from mailerq.cli.serving import HURRY_SECONDS, OVERDUE_SECONDS, fail, prepare
from mailerq.cli.supervisor.process import HEAD
from mailerq.config import Config
from mailerq.engine import Engine
from mailerq.errors import ConfigError, EngineError, MailerqError, PluginError
from mailerq.message import encode_properties
from mailerq.net import control

__all__ = ["main"]

READ_BYTES: Final = 1 << 16


def main() -> int:
    """Serve until the parent closes its end, or SIGTERM."""
    # Ctrl-C and a hang-up go to all processes of a terminal; the parent says what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    parent = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    with parent.makefile("rb", buffering=0) as file:
        (length,) = HEAD.unpack(_read(file, HEAD.size))
        share, config = pickle.loads(_read(file, length))
    try:
        logs.configure(config, f"process {share}: ")
        prepare(config)
        trio.run(_serve, config, share, parent)
    except EngineError as error:
        fail(error)
    except MailerqError as error:
        settings = isinstance(error, ConfigError | PluginError)
        _say(parent, {"failed": str(error), "temporary": not settings})
        return os.EX_CONFIG if settings else os.EX_TEMPFAIL
    except Exception as error:
        fail(error)
    return os.EX_OK


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


async def _serve(config: Config, share: int, parent: socket.socket) -> None:
    engine = Engine(config, share=share)
    failure: MailerqError | None = None
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(parent))
    stop, started = trio.Event(), trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        seconds = config.shutdown_timeout + OVERDUE_SECONDS
        faults.set_deadline(seconds, (signal.SIGTERM,), parent.fileno())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_answer, stream, engine, started, stop)
            nursery.start_soon(_terminate, signals, engine, started, stop)
            try:
                async with engine:
                    started.set()
                    ready = encode_properties({"addresses": engine.addresses})
                    await stream.send_all(ready + b"\n")
                    await stop.wait()
            except MailerqError as error:
                failure = error  # Out of the nursery as it is, not as a group.
            except trio.BrokenResourceError:
                pass  # The parent went while we started.
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _answer(
    stream: trio.SocketStream, engine: Engine, started: trio.Event, stop: trio.Event
) -> None:
    """Execute what the parent asks for; have the engine stop when the parent is gone."""
    commands: control.Commands = {**engine.commands(), "reload": partial(_reload, engine)}
    lines = b""
    with suppress(trio.BrokenResourceError):
        while data := await stream.receive_some(READ_BYTES):
            *requests, lines = (lines + data).split(b"\n")
            for request in requests:
                await stream.send_all(await control.reply_to(request, commands))
    _stop(engine, started, stop)


async def _terminate(
    signals: AsyncIterator[int], engine: Engine, started: trio.Event, stop: trio.Event
) -> None:
    async for _ in signals:
        _stop(engine, started, stop)


def _stop(engine: Engine, started: trio.Event, stop: trio.Event) -> None:
    stop.set()
    if not started.is_set():
        engine.plugins.timeout = HURRY_SECONDS


def _reload(engine: Engine, request: control.Request) -> dict[str, Any]:
    engine.reload()
    return {}


if __name__ == "__main__":
    sys.exit(main())
