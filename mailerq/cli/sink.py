"""``mailerq sink``: a receiving server for tests, which misbehaves on demand.

The sink uses the protocol machine of the real server, without plugins and queues. Each mail becomes
a file with the exact bytes, and a second file with the envelope as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import trio

from mailerq.address import host_port, split_host_port
from mailerq.cli.common import Parser, complain, dump_json, positive
from mailerq.cli.serving import STOP_SIGNALS
from mailerq.errors import AddressError
from mailerq.escaping import escape, escape_field
from mailerq.message import format_time
from mailerq.net.stream import Stream, StreamLost
from mailerq.wire import server, smtp
from mailerq.wire.smtp import Reply

__all__ = ["EVENTS", "Options", "main", "run"]

log = logging.getLogger("mailerq.sink")

EVENTS: Final = ("connect", "ehlo", "mail", "rcpt", "data", "message")
"""The events at which a sink can misbehave; ``message`` is the reply to the final dot."""

DEFAULT_ADDRESS: Final = ("127.0.0.1", 2526)

DEFAULT_MAX_SIZE: Final = 1 << 30

BUSY_SECONDS: Final = 0.1
"""Pause before the next accept when the process has run out of descriptors."""

_EVENTS: Final = {
    server.Hello: "ehlo",
    server.Mail: "mail",
    server.Rcpt: "rcpt",
    server.Data: "data",
    server.Content: "message",
}

FAILED: Final = smtp.not_now("This sink fails some mails on purpose")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The behaviour of a sink.

    `replies`, `delays` (in seconds) and `drops` give, for events of `EVENTS`, the reply, the delay
    before it, and whether to close the connection instead. `fail_rate` is the share of mails, 0 to
    1, that get a 451 after the final dot. The sink ends after `count` mails.
    """

    address: tuple[str, int] = DEFAULT_ADDRESS
    directory: str | None = None
    count: int | None = None
    max_size: int = DEFAULT_MAX_SIZE
    replies: Mapping[str, Reply] = field(default_factory=dict)
    delays: Mapping[str, float] = field(default_factory=dict)
    drops: frozenset[str] = frozenset()
    fail_rate: float = 0.0
    quiet: bool = False
    as_json: bool = False


def run(options: Options) -> None:
    """Serve until SIGINT, SIGTERM, or `Options.count` mails. Raises OSError."""
    if options.directory is not None:
        os.makedirs(options.directory, exist_ok=True)
    host, port = options.address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=4096) as listening:
        listening.setblocking(False)
        sink = _Sink(options)
        sink.announce(listening.getsockname()[:2])
        trio.run(sink.serve, listening)


class _Dropped(Exception):
    """Close the connection without a reply."""


class _Sink:
    def __init__(self, options: Options) -> None:
        self._options = options
        self._settings = server.Settings(
            hostname=socket.gethostname() or "localhost",
            max_size=options.max_size,
            max_recipients=1_000_000,
        )
        self._taken = 0
        self._done = trio.Event()

    def announce(self, address: tuple[str, int]) -> None:
        host, port = address
        if self._options.as_json:
            self._print({"listening": [host, port]}, "")
        else:
            self._print({}, f"listening on {host_port(host, port)}, Ctrl-C ends it")

    def _print(self, document: dict[str, Any], text: str) -> None:
        if self._options.quiet:
            return
        sys.stdout.write(f"{dump_json(document) if self._options.as_json else text}\n")
        sys.stdout.flush()

    async def serve(self, listening: socket.socket) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._accept, listening, nursery)
            nursery.start_soon(self._watch_signals)
            await self._done.wait()
            nursery.cancel_scope.cancel()

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
            async for _ in signals:
                self._done.set()

    async def _accept(self, listening: socket.socket, nursery: trio.Nursery) -> None:
        while True:
            try:
                await trio.lowlevel.wait_readable(listening)
                sock, _ = listening.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                log.warning("cannot accept a connection: %s", error.strerror)
                await trio.sleep(BUSY_SECONDS)
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            nursery.start_soon(self._session, Stream(sock))

    async def _session(self, stream: Stream) -> None:
        machine = server.ServerProtocol(self._settings)
        try:
            reply = await self._misbehave("connect", machine, stream)
            machine.greet(reply)
            await self._converse(machine, stream)
        except (StreamLost, _Dropped):
            return  # not an error in a sink
        finally:
            stream.close()

    async def _converse(self, machine: server.ServerProtocol, stream: Stream) -> None:
        while True:
            event = machine.next_event()
            match event:
                case server.NEED_DATA:
                    await self._flush(machine, stream)
                    machine.receive_data(await stream.receive())
                    continue
                case server.CLOSED:
                    return
                case server.Closing():
                    await self._flush(machine, stream)
                    return
            reply = await self._misbehave(_EVENTS[type(event)], machine, stream)
            if isinstance(event, server.Content):
                reply = self._take(bytes(event.body), machine, stream, reply)
            if reply is not None and reply.code >= 400:
                machine.reject(reply)
            else:
                machine.accept(reply)
            if isinstance(event, server.Content) and self._taken == self._options.count:
                await self._flush(machine, stream)
                self._done.set()

    async def _flush(self, machine: server.ServerProtocol, stream: Stream) -> None:
        if data := machine.data_to_send():
            stream.write(data)
            if stream.is_full:
                await stream.drain()

    async def _misbehave(
        self, event: str, machine: server.ServerProtocol, stream: Stream
    ) -> Reply | None:
        """Wait or drop the connection as the options say; return their reply, or None."""
        options = self._options
        if delay := options.delays.get(event):
            await self._flush(machine, stream)  # do not delay earlier replies
            await trio.sleep(delay)
        if event in options.drops:
            raise _Dropped
        if event == "message" and random.random() < options.fail_rate:
            return FAILED
        return options.replies.get(event)

    def _take(
        self, body: bytes, machine: server.ServerProtocol, stream: Stream, reply: Reply | None
    ) -> Reply | None:
        """File a mail unless it is refused, print its line, and return the reply."""
        if machine.hello is None or machine.sender is None:
            raise RuntimeError("a mail came without EHLO or MAIL")
        now = time.time()
        document: dict[str, Any] = {
            "received": format_time(now),
            "helo": machine.hello.name,
            "remote-ip": stream.remote[0],
            "remote-port": stream.remote[1],
            "envelope": machine.sender,
            "recipients": machine.recipients,
            "size": len(body),
        }
        if reply is not None and reply.code >= 400:
            what = f"refused with {reply.code}"
            document["refused"] = reply.code
        else:
            self._taken += 1
            what = "taken"
            if self._options.directory is not None:
                try:
                    what = document["file"] = self._file(body, document, now)
                except OSError as error:
                    self._taken -= 1
                    log.error("cannot file a mail: %s", error)
                    return smtp.not_now(f"Cannot file it: {error.strerror}")
        recipients = ", ".join(f"<{escape_field(recipient)}>" for recipient in machine.recipients)
        mail = f"<{escape_field(machine.sender)}> -> {recipients}, {len(body)} bytes"
        self._print(document, f"{document['received']} {mail}: {escape(what)}")
        return reply

    def _file(self, body: bytes, document: dict[str, Any], now: float) -> str:
        """Write the envelope and then the mail; each file appears whole or not at all."""
        assert self._options.directory is not None
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
        base = os.path.join(self._options.directory, f"{stamp}-{os.getpid()}-{self._taken:06}")
        _write(f"{base}.json", json.dumps(document, indent=1).encode() + b"\n")
        _write(f"{base}.eml", body)
        return f"{base}.eml"


def _write(path: str, data: bytes) -> None:
    with open(f"{path}.tmp", "wb") as file:
        file.write(data)
    os.replace(f"{path}.tmp", path)


# The command line.

EXAMPLES: Final = """\
events: connect, ehlo, mail, rcpt, data, message (the reply after the mail)

examples:
  mailerq sink --directory var/sink
  mailerq sink --reply 'rcpt=450 4.7.1 greylisted' --delay data=5
  mailerq sink --drop message --fail-rate 0.1 --count 100 --json
"""

Value = TypeVar("Value")


def main(settings: Sequence[str], rest: Sequence[str]) -> int:
    """Run a sink until it is interrupted."""
    parser = Parser(
        prog="mailerq sink",
        description="A receiving server for tests, which accepts every mail.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    # fmt: off
    add("--listen", type=_address, default=DEFAULT_ADDRESS, metavar="HOST:PORT",
        help="address to listen on; port 0: any free port [127.0.0.1:2526]")
    add("--directory", metavar="DIR",
        help="write each mail to DIR as NAME.eml, its envelope to NAME.json")
    add("--count", type=positive, metavar="N", help="end after N mails")
    add("--max-size", type=positive, default=DEFAULT_MAX_SIZE, metavar="BYTES",
        help="size of the largest accepted mail [1 GiB]")
    add("--reply", type=_event(_reply), action="append", default=[], metavar="EVENT=CODE TEXT",
        help="reply to an event; may be given once for each event")
    add("--delay", type=_event(_seconds), action="append", default=[], metavar="EVENT=SECONDS",
        help="wait before answering an event")
    add("--drop", choices=EVENTS, action="append", default=[], metavar="EVENT",
        help="close the connection instead of answering an event")
    add("--fail-rate", type=_share, default=0.0, metavar="P",
        help="refuse this share of the mails, 0 to 1, with a 451")
    add("--quiet", action="store_true", help="print nothing")
    add("--json", action="store_true", help="print JSON lines, for programs")
    # fmt: on
    options = parser.parse_args(rest)
    if settings:
        parser.error(f"{settings[0]}: a sink has no settings")
    replies = dict(options.reply)
    for event, reply in replies.items():
        if reply.code < 400 and reply.code != {"connect": 0, "data": 354}.get(event, 250):
            parser.error(f"--reply {event}: {reply.code} is no reply to that")
    try:
        run(
            Options(
                address=options.listen,
                directory=options.directory,
                count=options.count,
                max_size=options.max_size,
                replies=replies,
                delays=dict(options.delay),
                drops=frozenset(options.drop),
                fail_rate=options.fail_rate,
                quiet=options.quiet,
                as_json=options.json,
            )
        )
    except OSError as error:
        complain(f"sink: {error.filename or 'cannot listen'}: {error.strerror or error}")
        return os.EX_UNAVAILABLE
    return os.EX_OK


def _address(text: str) -> tuple[str, int]:
    try:
        host, port = split_host_port(text)
    except AddressError as error:
        raise ArgumentTypeError(str(error)) from None
    return host if ":" in text else DEFAULT_ADDRESS[0], port


def _share(text: str) -> float:
    return _number(text, 1.0)


def _seconds(text: str) -> float:
    return _number(text, 1e6)


def _number(text: str, most: float) -> float:
    try:
        if 0 <= (number := float(text)) <= most:
            return number
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text!r} is not a number from 0 to {most:g}")


def _reply(text: str) -> Reply:
    code, _, words = text.partition(" ")
    if len(code) == 3 and code.isdecimal() and code[0] in "2345":
        return Reply(int(code), words.replace("\\n", "\n"))
    raise ArgumentTypeError(f"{text!r} is not of the form 'CODE TEXT'")


def _event(read: Callable[[str], Value]) -> Callable[[str], tuple[str, Value]]:
    def read_pair(text: str) -> tuple[str, Value]:
        event, _, value = text.partition("=")
        if event not in EVENTS:
            raise ArgumentTypeError(f"{event!r} is none of {', '.join(EVENTS)}")
        return event, read(value)

    return read_pair
