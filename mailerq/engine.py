"""The embeddable engine: a whole mail transfer agent inside a trio program.

The daemon is a thin shell around it; `Engine` has the example.
"""

from __future__ import annotations

import logging
import math
import os
import pwd
import resource
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any, Final, Literal, Self, overload

import trio

from mailerq.config import Config
from mailerq.errors import ConfigError, EngineError, MailerqError, MessageError, QueueError
from mailerq.inbound.addresses import LocalAddresses
from mailerq.inbound.auth import Authenticator
from mailerq.inbound.clients import Clients
from mailerq.inbound.listener import Listener, bind
from mailerq.inbound.services import Counters as SessionCounters
from mailerq.inbound.services import Services
from mailerq.inbound.spool import Memory
from mailerq.message import Message, format_time
from mailerq.net import control
from mailerq.net.logs import LogFile
from mailerq.net.misspelt import Misspelt
from mailerq.net.resolver import Resolver
from mailerq.net.slots import Slots
from mailerq.net.statistics import total
from mailerq.net.tls import Handshakes, tls_context
from mailerq.net.watchdog import Watchdog
from mailerq.net.worker import Worker, open_workers
from mailerq.outbound.dispatcher import Counters as DeliveryCounters
from mailerq.outbound.dispatcher import Dispatcher
from mailerq.outbound.openings import Openings
from mailerq.plugins import (
    Answer,
    Connection,
    Done,
    EachHandler,
    EventName,
    Handler,
    Plugins,
    Reject,
    check_handler,
)
from mailerq.queues import Consumer, Lease, Publication, Queues, Settlement
from mailerq.queues.opening import make_directory, open_queues, shares_in
from mailerq.rules.access import Access
from mailerq.rules.documents import problems
from mailerq.rules.steering import Steering
from mailerq.wire import server

__all__ = ["Engine"]

log = logging.getLogger("mailerq")

MIN_PLUGIN_SECONDS: Final = 1.0
"""How long plugins may hold an event when the engine ends in a hurry."""

GIVE_BACK_SECONDS: Final = 5.0
"""How long deliveries from a share may take that is to be given back."""

MAX_IDS: Final = 10_000
"""Message ids that another program may ask for at once."""

SPARE_DESCRIPTORS: Final = 64
"""Descriptors that are for other things than connections: queue, logs, plugins."""

PREFETCH: Final = 100
"""Messages that `Engine.consume` holds at a time, unless it is told otherwise."""


class Engine:
    """A mail transfer agent that runs while its context is open.

    What it needs is opened in order (ports, plugins, queues, workers, deliveries) and
    closed in the opposite one; leaving the context takes at most `shutdown-timeout` for
    the transactions that are under way. Entering raises `ConfigError`, `PluginError` or
    `QueueError`, each of which says what to do. When the engine has to end by itself, the body of
    the context is cancelled, and leaving raises `QueueError`, or `EngineError` for any other cause.

    >>> import tempfile, trio, mailerq
    >>> async def main(directory):
    ...     config = mailerq.Config(
    ...         queue_directory=directory, plugin_directory="", smtp_ip=("127.0.0.1",),
    ...         smtp_port=(0,), rabbitmq_inbox="inbox")
    ...     async with mailerq.Engine(config) as engine:
    ...         await engine.publish(
    ...             {"envelope": "a@b.test", "recipient": "c@d.test", "mime": "Subject: hi"},
    ...             queue="inbox")
    ...         async with engine.consume("inbox") as leases:
    ...             lease = await leases.receive()
    ...             await engine.ack(lease)
    ...             return lease.message.recipient
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     trio.run(main, directory)
    'c@d.test'
    """

    def __init__(self, config: Config | None = None, *, share: int | None = None) -> None:
        """By default it has the queue directory as a whole.

        With a `share` it is one of several processes that work in a directory: it has only that
        one (see `mailerq.queues.opening`), and lets the others listen on its ports as well.
        """
        self.config = config if config is not None else Config.load()
        self._share = share
        self.plugins: Plugins
        self.queues: Queues
        self._workers: list[Worker] = []
        self._server: Services
        self._listener: Listener
        self._send_log: LogFile | None
        self._resolver: Resolver
        self._openings: Openings
        self._misspelt = Misspelt()
        self._deliveries: dict[int, _Delivery] = {}
        self._watchdog: Watchdog
        self._nursery: trio.Nursery
        self._handlers: list[tuple[str, Handler]] = []
        self._opened = False
        self._stopping = False
        self._started: float | None = None
        self._ended: float | None = None
        self._failed = False
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._started = self._ended = None
        self._stopping = False
        try:
            async with AsyncExitStack() as stack:
                try:
                    await self._open(stack)
                except MailerqError as error:
                    failure = error  # As below: around the nurseries.
                    self._failed = True
                else:
                    self._stack = stack.pop_all()
                    return self
        except ExceptionGroup as group:
            raise _plain(group) from group
        finally:
            if self._started is None:
                self._workers = []
        raise failure

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        # The error goes around the nurseries, not through them: it leaves as it came.
        self._failed = error is not None
        try:
            await self._stack.aclose()
        except ExceptionGroup as group:
            raise _plain(group) from group
        finally:
            self._ended = time.time()
        return None

    async def _open(self, stack: AsyncExitStack) -> None:
        config = self.config
        tls = tls_context(config)
        authenticator = Authenticator.of(config)
        local_addresses = LocalAddresses.of(config)
        steering = Steering.of(config)
        ports = bind(config, shared=self._share is not None)
        for port in ports:
            stack.callback(port.sock.close)
        if config.user:
            make_directory(config.queue_directory, config.user)
            _become(config)
        self._watchdog = stack.enter_context(Watchdog(config.watchdog_seconds))
        # Not before: opening a file runs its constructors.
        plugins = self.plugins = Plugins.load(
            config.plugin_directory,
            timeout=config.plugin_timeout,
            hostname=config.hostname,
            server_id=config.server_id,
        )
        self._opened = True
        for event, handler in self._handlers:
            plugins.on(event, handler)
        share = self._share or 0
        self.queues = await stack.enter_async_context(open_queues(config, share))
        plugins.initialize()
        stack.callback(plugins.cleanup)
        self._workers = await stack.enter_async_context(open_workers(config.smtp_threads, plugins))
        self._watchdog.look_after(self._workers)
        connections = Slots(_connections(config))
        incoming = Slots(_limit(config.smtp_connections_in), within=connections)
        settings = server.Settings(
            hostname=config.hostname,
            max_size=config.smtp_maxsize,
            max_recipients=config.smtp_maxrecipients,
            starttls=tls is not None,
            mechanisms=_mechanisms(authenticator, plugins),
            normalize=config.smtp_bare_newline == "normalize",
            dsn=config.dsn_advertise,
        )
        access = Access(
            config.smtp_range,
            config.smtp_relay_range,
            config.smtp_local_domains,
            relay_domains=config.smtp_relay_domains,
            proxies=config.smtp_proxy,
            xclients=config.smtp_xclient_range,
        )
        self._server = Services(
            config=config,
            settings=settings,
            lmtp=replace(settings, lmtp=True),
            access=access,
            local_addresses=local_addresses,
            steering=steering,
            clients=Clients(config, access),
            authenticator=authenticator,
            plugins=plugins,
            queues=self.queues,
            slots=incoming,
            memory=Memory(config.max_memory),
            misspelt=self._misspelt,
            handshakes=Handshakes(config.smtp_handshakes),
            tls=tls,
            received_log=_log_file(config, "received-log-file", stack),
            refused_log=_log_file(config, "refused-log-file", stack),
        )
        self._send_log = _log_file(config, "send-log-file", stack)
        self._resolver = Resolver(config)
        outgoing = config.smtp_connections_out or max(connections.limit // 2, 1)
        self._openings = Openings(Slots(outgoing, within=connections), self._workers[0])
        self._listener = Listener(self._server, self._workers, ports, incoming)
        nursery = self._nursery = await stack.enter_async_context(trio.open_nursery())
        stack.push_async_callback(self._stop)
        if self._share is None:
            await nursery.start(control.serve, config.queue_directory, self.commands())
        await nursery.start(self._delivery(share, self.queues).dispatcher.run)
        if self._share is None:
            # Mail from when there were more processes.
            for left in shares_in(config.queue_directory)[1:]:
                await self.take_over(left)
        await nursery.start(self._listener.run)
        self._started = time.time()

    def _delivery(self, share: int, queues: Queues) -> _Delivery:
        """What delivers the outbox of a share, once its dispatcher runs."""
        dispatcher = Dispatcher(
            self.config,
            queues,
            self._workers[0],
            plugins=self.plugins,
            resolver=self._resolver,
            openings=self._openings,
            send_log=self._send_log,
            misspelt=self._misspelt,
        )
        delivery = self._deliveries[share] = _Delivery(queues, dispatcher)
        return delivery

    async def take_over(self, share: int) -> None:
        """Deliver what is in another share of the queue directory as well, beside the own one.

        Until `give_back`, or to the end. Raises `QueueError`, also when another process has it.
        """
        if self._stopping:
            raise QueueError("the engine stops")
        if share in self._deliveries:
            return
        await self._nursery.start(self._take_over, share)
        log.info("share %d of the queue is delivered from here as well", share)

    async def _take_over(
        self, share: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        delivery: _Delivery | None = None
        try:
            async with open_queues(self.config, share) as queues:
                if self._stopping:
                    raise QueueError("the engine stops")
                delivery = self._delivery(share, queues)
                await delivery.dispatcher.run(task_status=task_status)
        finally:
            if delivery is not None:
                del self._deliveries[share]
                delivery.over.set()

    async def give_back(self, share: int) -> None:
        """Undo `take_over`: when this returns, another process can open that share.

        What is under way there has `GIVE_BACK_SECONDS`; what is not done goes back.
        """
        delivery = self._deliveries.get(share)
        if delivery is None or share == (self._share or 0):
            return
        await delivery.dispatcher.stop(GIVE_BACK_SECONDS)
        await delivery.over.wait()

    async def _stop(self) -> None:
        """End what is under way: in its own time, or at once after an error."""
        self._stopping = True
        timeout = 0.0 if self._failed else self.config.shutdown_timeout
        if timeout < self.plugins.timeout or not self.plugins.timeout:
            self.plugins.timeout = max(timeout, MIN_PLUGIN_SECONDS)
        end = trio.current_time() + timeout
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listener.stop, timeout)
                for delivery in self._deliveries.values():
                    nursery.start_soon(delivery.dispatcher.stop, timeout)
        # What is left of it is for mq_context_cleanup.
        left = max(end - trio.current_time(), MIN_PLUGIN_SECONDS)
        self.plugins.timeout = min(self.plugins.timeout, left)
        self._nursery.cancel_scope.cancel()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """The addresses and ports that SMTP clients can connect to; none but while it runs."""
        running = self._started is not None and self._ended is None
        return self._listener.addresses if running else []

    async def publish(
        self,
        message: Message | dict[str, Any] | bytes | str,
        *,
        queue: str | None = None,
        due: float | None = None,
    ) -> None:
        """Put a message into a queue, by default the outbox; it is safe when this returns.

        A message is a `Message`, the JSON document, or that document as a dict, in which "mime" may
        also be bytes. `due` is seconds since 1970. The engine owns a `Message` from here on.

        Raises `QueueError` when it cannot be kept now, and `MessageError`, which names the
        property, for a document that cannot be read or kept. A document for the outbox must be fit
        to be sent, too: known properties have the right types and forms, recipient and envelope are
        addresses, smarthost and ips can be read, there is a body (or a plugin or handler listens to
        "out_data" and may supply one), its time has not passed, no result goes back to the outbox,
        the mail does not run in circles, and asks for nothing that deliveries cannot do.

        What depends on others is found when it is delivered, and stands in its result: whether
        the domain exists and takes mail, whether `smtp-out-forbidden` allows the smarthost, whether
        this host has the address in ips, and what a plugin or handler makes of it. A property for
        the outbox that may be misspelt is a warning in the log, see ``docs/messages.md``.
        """
        self._check_open()
        if isinstance(message, dict):
            message = Message.from_dict(message)
        elif isinstance(message, bytes | str):
            message = Message.from_json(message)
        elif not isinstance(message, Message):
            raise TypeError(f"expected a Message, JSON or a dict, found {type(message).__name__}")
        name = self.config.rabbitmq_outbox if queue is None else queue
        if due is not None and not math.isfinite(due):
            raise ValueError(f"due: expected seconds since 1970, found {due}")
        if name == self.config.rabbitmq_outbox:
            self._misspelt.properties(message.properties)
            supplied = self.plugins.listens("out_data")
            found = problems(message, self.config, now=time.time(), supplied=supplied)
            problem = next(found, None)
            if problem is not None:
                raise MessageError(problem)
        await self.queues.publish([Publication(name, message, due)])

    def _check_open(self) -> None:
        if not self._workers or self._ended is not None:
            raise RuntimeError("the engine does not run: this is for within its context")

    def consume(
        self, queue: str, *, prefetch: int = PREFETCH
    ) -> AbstractAsyncContextManager[Consumer]:
        """Consume a queue: ``async for lease in leases`` within the context.

        What is not given to `ack` by the end of the context goes back into the queue. What several
        processes have left in other shares of the queue directory does not come this way: the
        outbox there is delivered, other queues are for ``mailerq queue``.
        """
        self._check_open()
        return self.queues.consume(queue, prefetch=prefetch)

    async def ack(self, lease: Lease) -> None:
        """Take a consumed message away for good. Raises `QueueError`."""
        self._check_open()
        await self.queues.ack([Settlement(lease)])

    def reload(self) -> None:
        """Read the certificate anew, for the handshakes to come; no session ends by it.

        Raises `ConfigError`, and the one that was there before stays. Files of logins and of local
        addresses need no such call: they are looked at when they are used.
        """
        self._check_open()
        self._server.tls = tls_context(self.config)

    def statistics(self) -> dict[str, Any]:
        """What has happened since the start, as a tree of numbers that can become JSON.

        Before the start, and after one that failed, nothing has: "started" is None, counters are 0,
        and what has no parts yet is empty. After the end the figures are the last ones.
        """
        if self._started is None:
            return self._nothing_yet()
        deliveries = self._deliveries.values()
        return {
            "started": format_time(self._started),
            "uptime": (self._ended or time.time()) - self._started,
            "pid": os.getpid(),
            "hostname": self.config.hostname,
            "listening": [f"{ip}:{port}" for ip, port in self.addresses],
            "workers": len(self._workers),
            "incoming": {
                "open": self._listener.open_sessions,
                "memory": self._server.memory.used,
                "held": self._server.memory.held,
                **asdict(self._server.counters),
            },
            "outgoing": total([each.dispatcher.statistics() for each in deliveries]),
            "queue": total([each.queues.statistics() for each in deliveries]),
            "plugins": self.plugins.statistics(),
            "watchdog": self._watchdog.statistics(),
        }

    def _nothing_yet(self) -> dict[str, Any]:
        return {
            "started": None,
            "uptime": 0.0,
            "pid": os.getpid(),
            "hostname": self.config.hostname,
            "listening": [],
            "workers": 0,
            "incoming": {"open": 0, "memory": 0, "held": 0, **asdict(SessionCounters())},
            "outgoing": asdict(DeliveryCounters()),
            "queue": {},
            "plugins": {},
            "watchdog": {},
        }

    @overload
    def on(
        self, event: Literal["connect", "secure"], handler: Callable[[Connection], Answer]
    ) -> None: ...
    @overload
    def on(
        self,
        event: Literal["authenticate"],
        handler: Callable[
            [Connection, str, str], Reject | bool | Awaitable[Reject | bool | None] | None
        ],
    ) -> None: ...
    @overload
    def on(
        self, event: Literal["mailfrom", "rcptto"], handler: Callable[[Connection, str], Answer]
    ) -> None: ...
    @overload
    def on(
        self, event: Literal["data"], handler: Callable[[Connection, bytes | memoryview], Answer]
    ) -> None: ...
    @overload
    def on(
        self, event: Literal["message"], handler: Callable[[Connection, Message], Answer]
    ) -> None: ...
    @overload
    def on(self, event: Literal["close"], handler: Callable[[Connection], Done]) -> None: ...
    @overload
    def on(
        self, event: Literal["out_data"], handler: Callable[[Connection, Message, Message], Answer]
    ) -> None: ...
    @overload
    def on(
        self, event: Literal["out_sent"], handler: Callable[[Connection, Message, Message], Done]
    ) -> None: ...
    @overload
    def on(self, event: EventName, handler: EachHandler) -> None: ...
    def on(self, event: str, handler: Handler) -> None:
        """Call `handler` for an event, after the C plugins; see `Plugins.on`.

        Given before the context is entered it misses none. Logins are offered to the connections
        that come when somebody listens to "authenticate".
        """
        check_handler(event, handler)
        self._handlers.append((event, handler))
        if not self._opened:
            return
        self.plugins.on(event, handler)
        if event == "authenticate":
            server = self._server
            mechanisms = _mechanisms(server.authenticator, self.plugins)
            server.settings = replace(server.settings, mechanisms=mechanisms)
            server.lmtp = replace(server.lmtp, mechanisms=mechanisms)

    def commands(self) -> control.Commands:
        """What other programs of this host may ask for, see `mailerq.net.control`."""
        return {
            "status": lambda request: self.statistics(),
            "wake": self._wake,
            "message-ids": self._message_ids,
        }

    def _wake(self, request: control.Request) -> dict[str, bool]:
        for delivery in self._deliveries.values():
            delivery.queues.wake(everything=bool(request.get("everything")))
            if request.get("everything"):
                delivery.dispatcher.flush()
        return {"ok": True}

    def _message_ids(self, request: control.Request) -> dict[str, list[str]]:
        """Ids for what a program without plugins is about to publish."""
        count = request.get("count", 1)
        if not isinstance(count, int) or not 0 < count <= MAX_IDS:
            raise MailerqError(f"count: expected a number from 1 to {MAX_IDS}")
        return {"ids": [self.plugins.message_id() for _ in range(count)]}


@dataclass(slots=True, eq=False)
class _Delivery:
    """A share of the queue directory that is open, and what empties its outbox."""

    queues: Queues
    dispatcher: Dispatcher
    over: trio.Event = field(default_factory=trio.Event)


def _plain(group: ExceptionGroup[Exception]) -> MailerqError:
    """One error to catch for all that ended the tasks of an engine."""
    error: Exception = group
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, MailerqError):
        return error
    return EngineError(f"the engine had to end: {type(error).__name__}: {error}")


def _mechanisms(authenticator: Authenticator, plugins: Plugins) -> tuple[str, ...]:
    """The ways to log in: CRAM-MD5 proves a password only to who knows it, so not to plugins."""
    return ("PLAIN", "LOGIN") if plugins.listens("authenticate") else authenticator.mechanisms


def _connections(config: Config) -> int:
    """The connections that there may be, as far as this process has descriptors for them."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors == resource.RLIM_INFINITY:
        return config.smtp_connections
    possible = max(descriptors - SPARE_DESCRIPTORS, 1)
    if possible < config.smtp_connections:
        log.warning(
            "smtp-connections: there will be %d, not %d, for this process may have %d descriptors",
            possible,
            config.smtp_connections,
            descriptors,
        )
    return min(possible, config.smtp_connections)


def _limit(value: int | None) -> float:
    return math.inf if value is None else value


def _log_file(config: Config, name: str, stack: AsyncExitStack) -> LogFile | None:
    path = config.text(name)
    if not path:
        return None
    try:
        log_file = LogFile(path)
    except OSError as error:
        raise ConfigError(
            config.origin(name), f"{name}: cannot write {path}: {error.strerror}"
        ) from None
    stack.callback(log_file.close)
    return log_file


def _become(config: Config) -> None:
    """Change to the account that `user` names, for good."""
    try:
        account = pwd.getpwnam(config.user)
        os.initgroups(config.user, account.pw_gid)
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
    except KeyError:
        raise ConfigError(config.origin("user"), f"user: {config.user}: no such account") from None
    except OSError as error:
        raise ConfigError(
            config.origin("user"), f"user: cannot become {config.user}: {error.strerror}"
        ) from None
