"""Show the SMTP dialogue of sessions while they run: ``mailerq trace``.

Theory of operation
-------------------
A `Trace` is one request: which sessions, for how long, and a bounded buffer of lines. Each worker
has the traces that are active (`Worker.traces`). A session that begins asks `attach` for a `Tap`,
which its stream then gives all bytes in clear, before encryption and after decryption. Sessions
that are open already get a tap when no bytes are under way that the tap would misunderstand; so a
trace asks them again and again (`Traceable.trace`). A session without a tap pays one comparison for
each read and write.

`mailerq.wire.transcript` makes lines of the bytes and hides secrets. A `_View` chooses the lines of
a session that one trace shows: if senders, recipients or domains are asked for, the dialogue of a
mail is kept back until the mail matches.

Guarantees
----------
- A tap belongs to the thread of its session. Only `Trace.put` and `Trace.admit` are called from
  several threads.
- A trace never delays a session: a reader that is too slow loses lines, and is told how many.
- Nothing grows: not the lines of a trace, not those that a view keeps back, not the number of
  traces.
"""

from __future__ import annotations

import ipaddress
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import trio

from mailerq.address import host_port
from mailerq.errors import MailerqError
from mailerq.escaping import escape
from mailerq.message import encode_properties, format_time
from mailerq.wire.transcript import Line, Pending, Transcript

if TYPE_CHECKING:
    from mailerq.net.stream import Stream
    from mailerq.net.worker import Worker

__all__ = ["Tap", "Trace", "Traceable", "Tracing", "Wanted", "attach", "tell"]

log = logging.getLogger("mailerq.trace")

MAX_TRACES: Final = 4
"""Traces at a time."""

MAX_LINES: Final = 4000
"""Lines that wait for a reader."""

KEPT_LINES: Final = 200
"""Lines of one session that a view keeps back until a mail matches."""

ASK_SECONDS: Final = 0.2
"""Interval at which sessions that are open already are asked again."""

GATHER_SECONDS: Final = 0.02
"""Lines are written together for this time."""

STARTED: Final = encode_properties({"tracing": True}) + b"\n"
"""The first line: sessions that begin from now on are seen."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Traceable(Protocol):
    """A session that a trace may join."""

    def trace(self) -> bool:
        """Let the traces of the worker see the session; False: not now, ask again."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which sessions and mails a trace shows. An empty tuple asks for nothing."""

    ways: tuple[str, ...] = ("in", "out")
    peers: tuple[Network, ...] = ()
    local_ips: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    senders: tuple[str, ...] = ()
    recipients: tuple[str, ...] = ()
    sessions: int = 0
    """Sessions to show at most; 0: any number."""
    seconds: float = 0.0
    bodies: bool = False

    @classmethod
    def of(cls, request: dict[str, Any]) -> Self:
        """Read a request. Raises `MailerqError`."""
        peers: list[Network] = []
        for text in _texts(request, "peers"):
            try:
                peers.append(ipaddress.ip_network(text, strict=False))
            except ValueError:
                raise MailerqError(f"peer: {text} is no address and no network") from None
        ips = []
        for text in _texts(request, "ips"):
            try:
                ips.append(str(ipaddress.ip_address(text)))
            except ValueError:
                raise MailerqError(f"ip: {text} is no address") from None
        return cls(
            ways=tuple(way for way in ("in", "out") if request.get(way, True)),
            peers=tuple(peers),
            local_ips=tuple(ips),
            domains=tuple(map(str.lower, _texts(request, "domains"))),
            senders=tuple(map(_pattern, _texts(request, "senders"))),
            recipients=tuple(map(_pattern, _texts(request, "recipients"))),
            sessions=int(_number(request, "sessions")),
            seconds=_number(request, "seconds"),
            bodies=request.get("bodies") is True,
        )

    def fits(self, way: str, remote: str, local: str) -> bool:
        """Whether a session between these addresses may be shown."""
        if way not in self.ways or (self.local_ips and local not in self.local_ips):
            return False
        return not self.peers or any(ipaddress.ip_address(remote) in net for net in self.peers)

    @property
    def by_mail(self) -> bool:
        """Whether the envelope decides."""
        return bool(self.domains or self.senders or self.recipients)

    def fits_sender(self, address: str) -> bool:
        return not self.senders or _matches(self.senders, address)

    def fits_recipient(self, address: str) -> bool:
        if self.recipients and not _matches(self.recipients, address):
            return False
        return not self.domains or address.rpartition("@")[2].lower() in self.domains


def _texts(request: dict[str, Any], name: str) -> list[str]:
    values = request.get(name, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise MailerqError(f"{name}: expected a list of strings")
    return values


def _number(request: dict[str, Any], name: str) -> float:
    value = request.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise MailerqError(f"{name}: expected a number, not below 0")
    return value


def _pattern(text: str) -> str:
    """An address, ``@domain``, or ``<>`` for the empty sender."""
    return text.removeprefix("<").removesuffix(">").lower()


def _matches(patterns: Sequence[str], address: str) -> bool:
    address = address.lower()
    domain = "@" + address.rpartition("@")[2]
    return any(pattern in (address, domain) for pattern in patterns)


class Trace:
    """A request, and the lines that wait for its reader. `wake` must be callable on any thread."""

    def __init__(
        self, wanted: Wanted, wake: Callable[[], object], next_id: Callable[[str], str]
    ) -> None:
        self.wanted = wanted
        self.next_id = next_id
        """The id of a session that comes in or goes out."""
        self.over = False
        self.pending: dict[int, set[Traceable]] = {}
        """Sessions of each worker that are open and have no tap yet; for the worker's thread."""
        self._wake = wake
        self._lock = threading.Lock()
        self._lines: deque[dict[str, Any]] = deque()
        self._lost = 0
        self._awake = False
        self._begun = 0
        self._open = 0

    def put(
        self, now: float, session: str, direction: str, text: str, *, end: bool = False
    ) -> None:
        """Give a line to the reader, if there is room."""
        with self._lock:
            if self.over:
                return
            if len(self._lines) >= MAX_LINES:
                self._lost += 1
                return
            line = _line(now, session, direction, text)
            self._lines.append({**line, "end": True} if end else line)
            awake, self._awake = self._awake, True
        if not awake:
            self._wake()

    def admit(self) -> bool:
        """Whether one more session may be shown."""
        with self._lock:
            if self.over or 0 < self.wanted.sessions <= self._begun:
                return False
            self._begun += 1
            self._open += 1
        return True

    def left(self) -> None:
        """A session that was shown has ended."""
        with self._lock:
            self._open -= 1
            awake, self._awake = self._awake, True
        if not awake:
            self._wake()

    def take(self) -> tuple[list[dict[str, Any]], bool]:
        """The lines so far, and whether more can come."""
        with self._lock:
            lines = list(self._lines)
            self._lines.clear()
            if self._lost:
                text = f"({self._lost} lines are lost: the reader is too slow)"
                lines.append({**_line(time.time(), "", "-", text), "lost": self._lost})
                self._lost = 0
            self._awake = False
            done = 0 < self.wanted.sessions <= self._begun and not self._open
        return lines, not done

    def end(self) -> None:
        with self._lock:
            self.over = True
            self._lines.clear()


def _line(now: float, session: str, direction: str, text: str) -> dict[str, Any]:
    shown = f"{format_time(now)}.{int(now % 1 * 1000):03}"
    return {"time": shown, "session": session, "direction": direction, "text": text}


class _View:
    """What one trace shows of one session."""

    def __init__(self, trace: Trace, session: str, domain: str | None) -> None:
        self.trace = trace
        self._session = session
        self._wanted = trace.wanted
        self._is_shown = False  # admitted by the trace
        self._all = not trace.wanted.by_mail
        self._domain = domain is not None and domain.lower() in trace.wanted.domains
        self._matching: deque[int] = deque(maxlen=2)  # mails: the reply to the last one may be due
        self._sender = False  # the sender of the current mail matches
        self._kept: deque[tuple[float, str, str, int]] = deque(maxlen=KEPT_LINES)

    @property
    def is_over(self) -> bool:
        return self.trace.over

    def note(self, now: float, text: str) -> None:
        self._show(now, "-", text, 0)

    def add(self, now: float, direction: str, line: Line) -> None:
        if line.is_body and not self._wanted.bodies:
            return
        if self._all:
            self._show(now, direction, line.text, line.mail)
            return
        if line.sender is not None:
            self._sender = self._wanted.fits_sender(line.sender)
            # The mail before did not match; only the reply to it may still come.
            self._kept = deque((each for each in self._kept if each[3] == 0), maxlen=KEPT_LINES)
        matches = line.recipient is not None and self._wanted.fits_recipient(line.recipient)
        only_sender = not (self._wanted.recipients or self._wanted.domains)
        if line.mail not in self._matching and self._sender:
            if matches or (only_sender and line.sender is not None):
                self._matching.append(line.mail)
                for kept in self._kept:
                    if kept[3] in (0, line.mail):
                        self._tell(*kept[:3])
                self._kept.clear()
        self._show(now, direction, line.text, line.mail)

    def _show(self, now: float, direction: str, text: str, mail: int) -> None:
        shown = self._all or mail in self._matching or (not mail and self._is_shown)
        if shown or (not mail and self._domain):
            self._tell(now, direction, text)
        else:
            self._kept.append((now, direction, text, mail))

    def _tell(self, now: float, direction: str, text: str) -> None:
        if not self._is_shown:
            if not self.trace.admit():
                return
            self._is_shown = True
        self.trace.put(now, self._session, direction, text)

    def ended(self, now: float) -> None:
        if self._is_shown:
            self.trace.put(now, self._session, "-", "(closed)", end=True)
            self.trace.left()


class Tap:
    """Gets the bytes of one session, in clear. Its methods never raise."""

    def __init__(self, way: str, session: str, due: Iterable[Pending], domain: str | None) -> None:
        self.views: list[_View] = []
        self._session = session
        self._domain = domain
        self._is_server = way == "in"
        self._transcript = Transcript(due)

    def join(self, trace: Trace, text: str) -> None:
        """Show the session to one more trace, from now on."""
        if any(view.trace is trace for view in self.views):
            return
        view = _View(trace, self._session, self._domain)
        self.views.append(view)
        self._transcript.bodies = self._transcript.bodies or trace.wanted.bodies
        view.note(time.time(), text)

    def received(self, data: bytes) -> None:
        """Bytes from the peer; b"" when the peer has closed."""
        if not data:
            self.note("the peer has closed")
            return
        self._pass(data, from_client=self._is_server)

    def sent(self, data: bytes) -> None:
        """Bytes to the peer."""
        self._pass(data, from_client=not self._is_server)

    def secured(self, version: str | None, cipher: tuple[str, str, int] | None) -> None:
        """A TLS handshake is done."""
        self._transcript.secured()
        self.note(f"{version} with {cipher[0] if cipher else 'no cipher'}")

    def note(self, text: str) -> None:
        now, shown = time.time(), f"({escape(text)})"
        for view in self.views:
            view.note(now, shown)

    def ended(self) -> None:
        """The connection is closed."""
        now = time.time()
        for view in self.views:
            view.ended(now)
        self.views.clear()

    def _pass(self, data: bytes, *, from_client: bool) -> None:
        try:
            transcript, now = self._transcript, time.time()
            read = transcript.from_client if from_client else transcript.from_server
            lines = read(data)
            for line in lines:
                direction = "<" if line.from_client is self._is_server else ">"
                for view in self.views:
                    view.add(now, direction, line)
        except Exception:  # a defect here must not end a session
            log.exception("a session cannot be traced any more")
            self.views.clear()


def attach(
    stream: Stream,
    traces: Iterable[Trace],
    way: str,
    remote: tuple[str, int],
    local: tuple[str, int],
    due: Iterable[Pending],
    *,
    domain: str | None = None,
) -> None:
    """Give a stream a tap for the traces that ask for its session.

    `way` is "in" or "out"; `due` are the replies that are due; `domain` is the target of a session
    that goes out. A closed stream gets no tap: the trace would never see its end.
    """
    if stream.is_closed:
        return
    text = f"({'from' if way == 'in' else 'to'} {host_port(*remote)}, here {host_port(*local)})"
    for trace in traces:
        if not trace.over and trace.wanted.fits(way, remote[0], local[0]):
            if stream.tap is None:
                stream.tap = Tap(way, trace.next_id(way), due, domain)
            stream.tap.join(trace, text)


def tell(
    traces: Iterable[Trace], remote: tuple[str, int], local: str | None, text: str, *, domain: str
) -> None:
    """Show a delivery that got no connection, as a session of one line."""
    for trace in traces:
        if not trace.over and trace.wanted.fits("out", remote[0], local or ""):
            tap = Tap("out", trace.next_id("out"), (), domain)
            tap.join(trace, f"(to {host_port(*remote)})")
            tap.note(text)
            tap.ended()


@dataclass(slots=True, eq=False)
class Tracing:
    """The traces of an engine. Use this on the home loop.

    `sessions` returns the open sessions of a worker, on its thread.
    """

    workers: Sequence[Worker]
    sessions: Callable[[Worker], Iterable[Traceable]]
    name: str = ""
    """Names this process of several in the ids of sessions."""
    _active: list[Trace] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def check(self, request: dict[str, Any]) -> Wanted:
        """What a request asks for. Raises `MailerqError`, also if there are too many traces."""
        wanted = Wanted.of(request)
        if len(self._active) >= MAX_TRACES:
            raise MailerqError(f"{MAX_TRACES} traces are running: end one of them")
        return wanted

    async def write(self, wanted: Wanted, send: Callable[[bytes], Awaitable[object]]) -> None:
        """Send lines until the trace ends, or until cancelled."""
        arrived, token = trio.Event(), trio.lowlevel.current_trio_token()

        def wake() -> None:
            token.run_sync_soon(lambda: arrived.set())

        trace = Trace(wanted, wake, self._next_id)
        self._active.append(trace)
        self._set_traces()
        try:
            with trio.move_on_after(wanted.seconds or math.inf):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._ask_sessions, trace)
                    await send(STARTED)
                    goes_on = True
                    while goes_on:
                        await arrived.wait()
                        arrived = trio.Event()
                        lines, goes_on = trace.take()
                        if lines:
                            await send(b"".join(encode_properties(each) + b"\n" for each in lines))
                        await trio.sleep(GATHER_SECONDS)
                    nursery.cancel_scope.cancel()
        finally:
            trace.end()
            self._active.remove(trace)
            self._set_traces()

    def _next_id(self, way: str) -> str:
        return f"{way}-{self.name}{next(self._numbers)}"

    def _set_traces(self) -> None:
        traces = tuple(self._active)
        for worker in self.workers:
            worker.call(setattr, worker, "traces", traces)

    async def _ask_sessions(self, trace: Trace) -> None:
        """Ask sessions that are open already to let the trace join."""
        for worker in self.workers:
            worker.call(self._find, worker, trace)
        while True:
            await trio.sleep(ASK_SECONDS)
            for worker in self.workers:
                worker.call(_ask, worker, trace)

    def _find(self, worker: Worker, trace: Trace) -> None:
        trace.pending[worker.index] = set(self.sessions(worker))
        _ask(worker, trace)


def _ask(worker: Worker, trace: Trace) -> None:
    pending = trace.pending.get(worker.index)
    if pending:
        pending -= {session for session in pending if trace.over or session.trace()}
