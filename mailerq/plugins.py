"""Load plugins, give each worker thread a context, and wait for suspended plugins.

Theory of operation
-------------------
`mailerq._core` calls the whole chain of C plugins in one call, without Python's lock. `Connection`
is part of the core: ``await connection.rcptto(address)`` costs one test if no plugin listens, and
one call without a task switch if the plugins decide at once.

This module handles the other cases: a plugin suspended, rejected or spoilt an event, or a handler
in Python listens. The core then makes a `Call` and awaits `Context.settle`. A suspended call puts
its task to sleep. When a plugin hands the event back, on any thread, the eventfd of the context
becomes readable. The listener of the context then takes a turn in the core and wakes the tasks of
finished calls. The same turn runs timers and watchers, and asks the engine to send what plugins
have queued.

Guarantees
----------
- A `Context` and its connections are used on the thread of their worker only; `Plugins` on any.
- Every event ends: it is handed back, or given up after the timeout. A cancelled event stays with
  its plugin, and `Connection.close` waits for the plugin.
- No plugin sees the end of a connection while a plugin still has an event of the connection. Events
  that were given up are not waited for: `close` follows when the last one is handed back.
- An error in a handler costs its event a 451 and a logged traceback, and nothing else.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, Literal, NamedTuple, Protocol, Self, TypeAlias, get_args

import trio

from mailerq import _core, ids
from mailerq._core import NOTHING, Call, Connection, crypt
from mailerq.address import parse_mailbox
from mailerq.errors import AddressError, PluginError
from mailerq.inspection import announce, plugins_in
from mailerq.message import Message, decode_properties, encode_properties
from mailerq.wire import smtp

__all__ = [
    "EVENTS",
    "NOTHING",
    "Answer",
    "Connection",
    "Context",
    "Done",
    "EachHandler",
    "EventName",
    "Handler",
    "Plugins",
    "Reject",
    "Statistics",
    "check_handler",
    "crypt",
    "stray_close",
]

logger: Final = logging.getLogger("mailerq.plugins")

Statistics = dict[str, dict[str, dict[str, float]]]
"""Figures by plugin and event: calls, suspensions, rejects, timeouts, seconds, kept, kept_bytes.

`kept` counts events that were given up and not handed back. `kept_bytes` is the mail that they hold
in memory or on disk.
"""


class Reject(NamedTuple):
    """The reply to send instead of the normal one; `text` starts with an enhanced status code."""

    code: int
    text: str


EventName = Literal[
    "connect", "secure", "authenticate", "mailfrom", "rcptto", "data", "message", "close",
    "out_data", "out_sent",
]  # fmt: skip
"""The events for which Python handlers can be added; `Engine.on` lists their arguments."""

EVENTS: Final[tuple[EventName, ...]] = get_args(EventName)

Answer: TypeAlias = Reject | Awaitable[Reject | None] | None
"""The result of a handler for an event that can be refused: plain or awaitable."""

Done: TypeAlias = Awaitable[None] | None
"""The result of a handler for an event that cannot be refused."""


class EachHandler(Protocol):
    """A handler for any event, because it accepts any arguments."""

    def __call__(self, *arguments: object) -> Done: ...


Handler = Callable[..., "Reject | bool | Awaitable[Reject | bool | None] | None"]
"""A function, plain or async, that gets the `Connection` and the arguments of the event."""

GIVEN_UP: Final = Reject(smtp.GIVEN_UP.code, smtp.GIVEN_UP.text)

MORE_SECONDS: Final = 10.0
"""Total time for events after the `deadline` of their connection. Without it, a plugin that timed
out at one recipient would fail at all later recipients too."""

EACH_SECONDS: Final = 1.0
"""Time for one event after the `deadline` of its connection."""

EXHAUSTED_SECONDS: Final = 0.1
"""Pause when the process has no descriptors left."""

TEXT_LIMIT: Final = 2000
"""Characters of the text of a reject. The core cuts the text of MQ_Reject at the same length."""

LINE_LIMIT: Final = 480
"""Characters of one reply line. RFC 5321, section 4.5.3.1.5, allows 512 with code and CRLF."""


def clean_reject(code: int, text: str) -> Reject:
    r"""Make a reject valid on the wire: lines of printable ASCII, and a matching status code.

    >>> clean_reject(550, "No\r\nmailbox")
    Reject(code=550, text='5.7.1 No\nmailbox')
    >>> clean_reject(450, "5.7.1 Sp\xe4ter\x1b")
    Reject(code=450, text='4.7.1 Sp?ter')
    """
    lines: list[str] = []
    for line in text[:TEXT_LIMIT].splitlines():
        words = "".join(character if character.isprintable() else " " for character in line)
        words = words.strip().encode("ascii", "replace").decode()
        lines += textwrap.wrap(words, LINE_LIMIT)
    text = "\n".join(lines)
    status = smtp.STATUS.match(text)
    if status is None:
        return Reject(code, f"{smtp.status_for(code)} {text or 'Refused'}")
    rest = text[status.end() :].lstrip()
    return Reject(code, f"{code // 100}{status[2]} {rest or 'Refused'}")


class _Guarded:
    """Restore a message that a handler leaves in an unusable state."""

    def __init__(self, message: Message) -> None:
        self._message = message
        self._properties = encode_properties(message.properties)
        self._body = message.body

    def problem(self) -> str | None:
        """Return what is wrong with the message, after restoring it, or None."""
        message = self._message
        try:
            problem = _problem(message) or self._address_problem()
        except Exception as error:
            problem = f"the properties cannot be used: {error}"
        if problem is not None:
            message.properties = decode_properties(self._properties)
            message.body = self._body
        return problem

    def _address_problem(self) -> str | None:
        """Return what is wrong with an address that the handler changed, or None."""
        for name in ("envelope", "recipient"):
            address = self._message.properties.get(name)
            try:
                if address:
                    parse_mailbox(address)
            except AddressError as error:
                if decode_properties(self._properties).get(name) != address:
                    return f"property {name}: {error}"
        return None


def _problem(message: Message) -> str | None:
    encode_properties(message.properties)  # raises for a value that no queue can hold
    body: object = message.body
    if body is not None and not isinstance(body, bytes):
        return f"the body is no bytes but {type(body).__name__}"
    for name in ("envelope", "recipient"):
        value = message.properties.get(name)
        # A control character could end the SMTP command that carries the address.
        if isinstance(value, str) and _core.UNPRINTABLE.search(value):
            return f"property {name}: holds a control character"
    return message.problem()


def check_handler(event: str, handler: object) -> None:
    """Raise ValueError for an unknown event, TypeError for a handler that cannot be called."""
    if event not in EVENTS:
        raise ValueError(f"no event {event!r}: there are {', '.join(EVENTS)}")
    if not callable(handler):
        raise TypeError(f"the handler for {event} cannot be called: {handler!r}")


def stray_close(what: str) -> None:
    """Log that foreign code closed one of our descriptors, or closed and reused it."""
    names = ", ".join(dict.fromkeys(_core.opened_plugins())) or "none is loaded"
    logger.error(
        "%s was closed, and not by mailerq: a plugin closes descriptors that are not its own (%s)",
        what,
        names,
    )


def describe(handler: Handler) -> str:
    """Return the name of a handler for logs and statistics."""
    return f"{handler.__module__}.{getattr(handler, '__qualname__', type(handler).__name__)}"


class Plugins:
    """The plugins of one engine."""

    def __init__(self, library: _core.Library, timeout: float) -> None:
        self.handlers: dict[str, list[Handler]] = {}
        self.contexts: set[Context] = set()
        """The open contexts."""
        self._timeout = timeout
        self._library = library
        self._figures: Statistics = {}

    @classmethod
    def load(
        cls,
        directory: str | None,
        *,
        timeout: float = 300,
        hostname: str = "",
        server_id: int | None = None,
    ) -> Self:
        """Load every plugin of a directory. A missing directory has no plugins.

        Raises `PluginError` if a plugin cannot be used.
        """
        paths: list[str] = []
        if directory:
            try:
                paths = plugins_in(os.path.abspath(directory))
            except FileNotFoundError:
                pass
            except OSError as error:
                problem = f"the plugins cannot be listed: {error.strerror}"
                raise PluginError(f"plugin-directory {directory}: {problem}") from None
        ids.set_machine(server_id, hostname)
        library = _core.Library(paths)
        announce(library)
        return cls(library, timeout)

    @property
    def timeout(self) -> float:
        """Seconds until a suspended event is given up; 0: never.

        May be set on any thread. Events that are suspended now then get at most the new time from
        now on.
        """
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._timeout = seconds
        for context in tuple(self.contexts):
            context.hurry()

    def set_timeout(self, seconds: float) -> None:
        """Give events that begin from now on that many seconds; those under way keep theirs."""
        self._timeout = seconds

    def deadline(self) -> float:
        """Return the deadline of an event that starts now, on the clock of the calling loop."""
        return trio.current_time() + self._timeout if self._timeout else math.inf

    @property
    def names(self) -> tuple[str, ...]:
        """The file names, in load order."""
        return self._library.names

    def listens(self, event: str) -> bool:
        """Whether a plugin or handler wants an event: "rcptto", "message", "out_data" and so on."""
        return self._library.listens(event)

    def initialize(self) -> None:
        """Call mq_initialize of each plugin. Contexts may be opened afterwards.

        Raises `PluginError` if one fails, after cleaning up the plugins before it.
        """
        self._library.initialize()

    def cleanup(self) -> None:
        """Call mq_cleanup of each initialized plugin. The last context must be closed."""
        self._library.cleanup()

    async def open_context(self, worker: int = 0) -> Context:
        """Make the calling thread a worker; wait until every plugin has initialized its context.

        Call it in the trio loop of the thread. Raises `PluginError` if a plugin does not hand back
        in time.
        """
        context = Context(self, worker)
        try:
            await context.open()
        except BaseException:
            await context.abort()
            raise
        return context

    def message_id(self) -> str:
        """Return a message id of the plugin that supplies ids, or of the built-in generator."""
        return self._library.message_id()

    def statistics(self) -> Statistics:
        """Return the figures of each plugin and each Python handler so far."""
        figures: Statistics = dict(self._library.figures())
        return figures | {name: dict(rows) for name, rows in self._figures.items()}

    def figures_of(self, handler: Handler, event: str) -> dict[str, float]:
        """Return the row of a handler in `statistics`, for updating."""
        row: dict[str, float] = dict.fromkeys(
            ("calls", "suspensions", "rejects", "timeouts", "kept", "kept_bytes", "seconds"), 0
        )
        return self._figures.setdefault(describe(handler), {}).setdefault(event, row)

    def on(self, event: str, handler: Handler) -> None:
        """Add a handler for an event. It runs after the C plugins and after earlier handlers.

        `event` is a name such as "rcptto"; `handler` is a plain or async function. The handler gets
        the `Connection` and the arguments of the event: the address; login and password; the text
        of the mail, valid until the handler ends; the `Message`, which it may edit. For "out_data"
        and "out_sent", the arguments are the `Message` to send and the stored one. The handler
        returns None to go on, or a `Reject`; for "authenticate" also True or False. If it raises,
        or leaves a `Message` that no queue could hold, the event gets a 451 and the log says why.
        """
        check_handler(event, handler)
        self.handlers.setdefault(event, []).append(handler)
        self._library.set_handled(event)


class Context(_core.Context):
    """A worker thread, as plugins see it. Made by `Plugins.open_context`."""

    def __new__(cls, plugins: Plugins, worker: int) -> Self:
        return super().__new__(cls, plugins._library)

    def __init__(self, plugins: Plugins, worker: int) -> None:
        self.plugins = plugins
        self.worker = worker
        self._scope = trio.CancelScope()
        self._ended: trio.Event | None = None
        self._scopes: set[trio.CancelScope] = set()
        self._late: set[Connection] = set()
        self._late_over = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._token = trio.lowlevel.current_trio_token()

    async def open(self) -> None:
        """Start listening to the plugins and call mq_context_initialize."""
        self.plugins.contexts.add(self)
        self._ended = trio.Event()
        trio.lowlevel.spawn_system_task(self._listen)
        await self.start()

    async def close(self) -> None:
        """Call mq_context_cleanup, wait until all plugins have handed back, and end the worker.

        All connections of the context must have been closed.
        """
        try:
            while self._late:
                await self._late_over.wait()
            await self.stop()
        finally:
            await self.abort()

    async def abort(self) -> None:
        """End the worker without telling the plugins; cannot be cancelled."""
        self.plugins.contexts.discard(self)
        if self._ended is None:
            self.end()
            return
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self._ended.wait()

    def connection(
        self,
        fd: int,
        *,
        secure: bool = False,
        on_output: Callable[[], None] | None = None,
        incoming: bool = True,
    ) -> Connection:
        """Make the plugins' side of a new SMTP connection.

        `incoming`: the client opened the connection. Only the end of an incoming connection is an
        event.

        `on_output` is called on the thread of the worker when a plugin queues bytes outside an
        event of the connection. After an event the engine checks for output itself.
        """
        return Connection(self, fd, secure, on_output, incoming)

    async def _listen(self) -> None:
        # Only this task waits for the eventfd, so it must end the worker: a context that is opened
        # later may get the same descriptor.
        assert self._ended is not None
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    await self._turns()
        finally:
            self.end()
            self._ended.set()

    async def _turns(self) -> None:
        while True:
            try:
                await trio.lowlevel.wait_readable(self.fileno())
            except (OSError, trio.ClosedResourceError):
                # Without a descriptor nobody can wake this task, so it looks from time to time.
                await trio.sleep(0.0 if self.mend() else EXHAUSTED_SECONDS)
            try:
                self._turn()
            except Exception:
                logger.exception("a turn of the plugins failed")

    def _turn(self) -> None:
        for call in self.turn():
            if call.finished:
                if call.task is not None:
                    task, call.task = call.task, None
                    trio.lowlevel.reschedule(task)
                elif call.cancelled:
                    call.close()
            elif call.scope is not None:
                call.scope.deadline = self._deadline(call.connection)

    def stray(self) -> None:
        """Log that a plugin closed the eventfd; the core has opened another."""
        stray_close(f"the descriptor that wakes worker {self.worker}")

    def close_now(self, connection: Connection) -> None:
        """Close a connection whose last outstanding event has been handed back."""
        closing = connection.close()
        if closing is not NOTHING and self._nursery is not None:
            self._late.add(connection)
            self._nursery.start_soon(self._close_late, connection, closing)

    async def _close_late(self, connection: Connection, closing: Awaitable[None]) -> None:
        try:
            await closing
        except Exception:
            logger.exception("the end of a connection could not be told to plugins")
        finally:
            self._late.discard(connection)
            self._late_over.set()
            self._late_over = trio.Event()

    def _deadline(self, connection: Connection | None) -> float:
        deadline = self.plugins.deadline()
        if connection is None:
            return deadline
        now, end = trio.current_time(), connection.deadline
        return min(deadline, max(end, min(now + EACH_SECONDS, end + MORE_SECONDS)))

    @contextmanager
    def _until(self, deadline: float) -> Iterator[trio.CancelScope]:
        """Open a cancel scope whose deadline `hurry` may bring forward."""
        with trio.CancelScope(deadline=deadline) as scope:
            self._scopes.add(scope)
            try:
                yield scope
            finally:
                self._scopes.discard(scope)

    def hurry(self) -> None:
        """Limit events that are suspended now to `Plugins.timeout` from now. Any thread."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._hurry)

    def _hurry(self) -> None:
        deadline = self.plugins.deadline()
        for scope in self._scopes:
            scope.deadline = min(scope.deadline, deadline)

    async def settle(self, call: Call) -> Reject | bool | None:
        """Wait for a call to finish, ask the Python handlers, and return the outcome."""
        await self._wait(call)
        outcome, plugin, code, text = call.outcome, call.plugin, call.code, call.text
        function, name = call.function, call.name
        call.close()
        match outcome:
            case "rejected":
                return clean_reject(code, text.decode("utf-8", "replace"))
            case "undecided" | "decided":
                pass
            case _:
                if outcome == "looped":
                    logger.warning("[%s] %s was retried 100 times; given up", plugin, function)
                if name == "context_initialize":
                    raise PluginError(f"{plugin}: {function} failed: {outcome}")
                return GIVEN_UP
        if outcome == "undecided" and name in self.plugins.handlers:
            if (answer := await self._ask_handlers(call, name)) is not None:
                return answer
        if name == "authenticate" and call.connection.decided:
            return call.connection.authenticated
        return None

    async def close_later(self, connection: Connection, call: Call) -> None:
        """Close a connection once its cancelled event is handed back."""
        await self._wait(call)
        call.close()
        await connection.close()

    async def _wait(self, call: Call) -> None:
        # Sleep until the call is over. If the task is cancelled, the call lives on, and a later
        # waiter has the same deadline.
        fresh = call.scope is None
        deadline = self._deadline(call.connection) if fresh else call.scope.deadline
        try:
            while not call.finished:
                if await self._sleep(call, deadline):
                    continue
                deadline = self._deadline(call.connection)
                plugin, function = call.plugin, call.function
                if call.give_up():
                    form = "[%s] %s was not handed back within %s; given up"
                    logger.warning(form, plugin, function, self._time_of(call.connection))
        except trio.Cancelled:
            call.cancel()
            raise

    def _time_of(self, connection: Connection | None) -> str:
        whole = "" if connection is None or connection.deadline == math.inf else ", all recipients"
        return f"{self.plugins.timeout:g} seconds{whole}"

    async def _sleep(self, call: Call, deadline: float) -> bool:
        # Return False at the deadline, which moves when the next plugin of the chain is called.
        def abort(raise_cancel: object) -> trio.lowlevel.Abort:
            call.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        with self._until(deadline) as call.scope:
            call.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(abort)
        return not call.scope.cancelled_caught

    async def _ask_handlers(self, call: Call, event: str) -> Reject | bool | None:
        arguments = [argument for argument in (call.first, call.second) if argument is not None]
        decided: bool | None = None
        for handler in self.plugins.handlers[event]:
            name, figures = describe(handler), self.plugins.figures_of(handler, event)
            guards = [_Guarded(argument) for argument in arguments if isinstance(argument, Message)]
            problems: list[str] = []
            figures["calls"] += 1
            start = time.perf_counter()
            try:
                with self._until(self._deadline(call.connection)) as scope:
                    answer = handler(call.connection, *arguments)
                    if inspect.isawaitable(answer):
                        figures["suspensions"] += 1
                        answer = await answer
            except Exception:
                logger.exception("[%s] failed in %s; given up", name, event)
                return GIVEN_UP
            finally:
                figures["seconds"] += time.perf_counter() - start
                problems += filter(None, [guard.problem() for guard in guards])
            if problems:
                logger.error("[%s] in %s: %s; given up", name, event, problems[0])
                return GIVEN_UP
            if scope.cancelled_caught:
                figures["timeouts"] += 1
                limit = self._time_of(call.connection)
                logger.warning("[%s] %s did not end in %s; given up", name, event, limit)
                return GIVEN_UP
            match answer:
                case None:
                    pass
                case Reject(int(code), str(text)) if 400 <= code <= 599:
                    figures["rejects"] += 1
                    return clean_reject(code, text)
                case bool() if event == "authenticate":
                    call.connection.authenticated = decided = answer
                case _:
                    logger.error("[%s] returned %r for %s; given up", name, answer, event)
                    return GIVEN_UP
        return decided
