"""The embeddable engine: a whole mail transfer agent inside a trio program.

The daemon is a thin shell around the engine; `Engine` has an example.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Self, overload

import trio

from mailerq import ids
from mailerq.address import host_port
from mailerq.clustering.running import EngineCluster
from mailerq.config import Config
from mailerq.errors import EngineError, MailerqError, MessageError
from mailerq.inbound.clients import Clients
from mailerq.inbound.explaining import explain_arrival
from mailerq.inbound.listener import Listener, bind
from mailerq.inbound.services import Counters as SessionCounters
from mailerq.inbound.services import Services
from mailerq.inbound.spool import Memory
from mailerq.inbound.terms import Terms
from mailerq.live import Live, Reload, alike
from mailerq.message import Message, format_time
from mailerq.net import control, late, unbound
from mailerq.net.client_tls import ClientTls
from mailerq.net.dane import Dane
from mailerq.net.logs import LogFile
from mailerq.net.misspelt import Misspelt
from mailerq.net.resolver import Resolver
from mailerq.net.seen import merged_answers, merged_pages
from mailerq.net.slots import Slots
from mailerq.net.statistics import total
from mailerq.net.tls import Handshakes
from mailerq.net.tracing import Traceable, Tracing
from mailerq.net.watchdog import Watchdog
from mailerq.net.worker import Worker, open_workers
from mailerq.outbound import operators
from mailerq.outbound.cells import SharedCells
from mailerq.outbound.dispatcher import Counters as DeliveryCounters
from mailerq.outbound.dispatcher import Dispatcher
from mailerq.outbound.explaining import Question
from mailerq.outbound.keeper import Keeper
from mailerq.outbound.kept import KeptActions
from mailerq.outbound.key_records import KeyRecords
from mailerq.outbound.limits import Limits
from mailerq.outbound.listing import Wanted, list_flows
from mailerq.outbound.openings import Openings
from mailerq.outbound.published import Published
from mailerq.outbound.refusals import react
from mailerq.outbound.signer import Signer
from mailerq.outbound.suppressing import Suppressor
from mailerq.outbound.warmup import Days
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
from mailerq.preparing import (
    LOGS,
    Prepared,
    count_connections,
    count_incoming,
    count_outgoing,
    prepare,
    writable,
)
from mailerq.privileges import become
from mailerq.queues import Consumer, Lease, Publication, Queues, Settlement
from mailerq.queues.adoption import Adoption, own, prove
from mailerq.queues.opening import make_directory, open_queues, share_directory
from mailerq.queues.ownership import DirectoryLock
from mailerq.rules.answers import Answers
from mailerq.rules.documents import problems
from mailerq.rules.rows import Rows
from mailerq.rules.shaping import Shaping
from mailerq.storage import Storage, open_storage

__all__ = ["Engine"]

log = logging.getLogger("mailerq")

MIN_PLUGIN_SECONDS: Final = 1.0
"""Minimum time for plugins with an event when the engine must end quickly."""

GIVE_BACK_SECONDS: Final = 5.0
"""Time for deliveries from a share that returns to its own process."""

HANDED: Final = -1
"""Stands for the mail that other instances of the cluster hand over, in place of a share."""

CELLS: Final = "limits.cells"
"""The file in the queue directory where all processes count limits."""

DAYS: Final = "warmup.json"
"""The file there for the days on which addresses have sent."""

MAX_IDS: Final = 10_000
"""Message ids in one request of another program."""

ROUTES: Final = (
    "local_delivery", "smtp_local_domains",
    "smarthost", "smarthost_port", "smarthost_username", "smarthost_password",
    "smtp_sink_address", "smtp_sink_port", "smtp_sink_username", "smtp_sink_password",
    "max_delivertime",
)  # fmt: skip
"""Settings that decide where, and how long, mail waiting in memory goes."""

PREFETCH: Final = 100
"""Default number of messages that `Engine.consume` holds at a time."""


class Engine:
    """A mail transfer agent that runs while its context is open.

    Entering opens ports, plugins, queues, workers and deliveries, in this order; leaving closes
    them in reverse order, and gives transactions under way at most `shutdown-timeout`. Entering
    raises `ConfigError`, `PluginError` or `QueueError`, each with a remedy. If the engine must end
    by itself, the body of the context is cancelled, and leaving raises `QueueError`, or
    `EngineError` for any other cause.

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

    def __init__(
        self,
        config: Config | None = None,
        *,
        share: int | None = None,
        number: int = 1,
        commands: control.Commands | None = None,
    ) -> None:
        """By default the engine has the whole queue directory.

        With a `share` the engine is one of several processes on a directory: it opens only this
        share (see `mailerq.queues.opening`), and shares its ports with the others; `number` is the
        number of the settings. The control socket answers `commands` beside the engine's own.
        """
        self._live = Live(config if config is not None else Config.load(), number)
        self._share = share
        self._more_commands = commands or {}
        self.plugins: Plugins
        self.queues: Queues
        self._workers: list[Worker] = []
        self._server: Services
        self._listener: Listener
        self._logs: dict[str, LogFile] = {}
        self._connections: Slots
        self._resolver: Resolver
        self._storage: Storage | None = None
        self._tls: ClientTls
        self._outgoing: Slots
        self._openings: Openings
        self._misspelt = Misspelt()
        self._deliveries: dict[int, _Delivery] = {}
        self._keeper: Keeper
        self._cluster: EngineCluster
        self._published: Published
        self._tracing: Tracing
        self._watchdog: Watchdog
        self._nursery: trio.Nursery
        self._handlers: list[tuple[str, Handler]] = []
        self._opened = False
        self._stopping = False
        self._started: float | None = None
        self._ended: float | None = None
        self._failed = False
        self._stack = AsyncExitStack()

    @property
    def config(self) -> Config:
        """The settings in force."""
        return self._live.current.config

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
        # Pass the error around the nurseries, not through them, so that it stays as it is.
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
        late.import_all()
        unbound.check(config)
        terms, shaping = Terms.of(config), Shaping.of(config)
        self._tls = ClientTls.of(config)
        answers = Answers.of(config, shaping.providers)
        self._signer = Signer(self._live)
        ports = bind(config, shared=self._share is not None)
        for port in ports:
            stack.callback(port.sock.close)
        if config.user:
            make_directory(config.queue_directory, config.user)
            become(config)
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
        directory = share_directory(config.queue_directory, share)
        lock = None
        if config.has_broker:
            make_directory(config.queue_directory)
        elif self._share is not None:
            lock = await own(directory)
        self._storage = await stack.enter_async_context(open_storage(lambda: self.config))
        self.queues = await stack.enter_async_context(
            open_queues(config, share, lock, self._storage)
        )
        plugins.initialize()
        stack.callback(plugins.cleanup)
        self._workers = await stack.enter_async_context(open_workers(config.smtp_threads, plugins))
        self._watchdog.look_after(self._workers)
        self._logs = {name: _log_file(config, name, stack) for name in LOGS}
        connections = self._connections = Slots(count_connections(config))
        incoming = Slots(count_incoming(config, connections), within=connections)
        self._server = Services(
            terms=terms.asking_plugins(plugins.listens("authenticate")),
            clients=Clients(config, terms.access),
            plugins=plugins,
            queues=self.queues,
            slots=incoming,
            memory=Memory(config.max_memory),
            misspelt=self._misspelt,
            handshakes=Handshakes(config.smtp_handshakes),
            received_log=self._log("received_log_file"),
            refused_log=self._log("refused_log_file"),
        )
        self._resolver = Resolver(config)
        stack.callback(self._resolver.close)
        dane = Dane(self._resolver)
        self._key_records = KeyRecords(self._live, self._resolver)
        self._outgoing = Slots(count_outgoing(config, connections), within=connections)
        self._openings = Openings(self._outgoing, self._workers[0])
        processes = 1 if self._share is None else config.smtp_processes
        cells = SharedCells(os.path.join(config.queue_directory, CELLS), share, processes)
        stack.callback(cells.close)
        self._limits = Limits(shaping, cells, processes)
        pools = shaping.local_ips.pools
        directory, member = config.queue_directory, config.cluster_member
        self._keeper = Keeper(directory, self._rows_changed, pools=pools, server=member)
        self._cluster = EngineCluster(
            self._live, self._keeper, self._limits, self._dispatchers, self.queues
        )
        self._kept = KeptActions(self._keeper)
        react(self._limits, answers, self._kept)
        suppressor = Suppressor(
            self._keeper, self._workers[0], shared=lambda: self.config.shares_rows
        )
        self._server.suppress = suppressor.suppress
        await self._keeper.open()
        stack.push_async_callback(self._keeper.close)
        await self._cluster.open(stack)
        self._published = Published(self._live, self._resolver, self._publish_report, dane=dane)
        stack.push_async_callback(self._published.close)
        self._listener = Listener(self._server, self._workers, ports, incoming)
        self._limits.days = Days(os.path.join(config.queue_directory, DAYS))
        name = "" if self._share is None else f"{share}."
        self._tracing = Tracing(self._workers, self._sessions_of, name)
        nursery = self._nursery = await stack.enter_async_context(trio.open_nursery())
        stack.push_async_callback(self._stop)
        if self._share is None:
            await nursery.start(
                control.serve, config.queue_directory, {**self.commands(), **self._more_commands}
            )
        if not share:
            nursery.start_soon(dane.say)
            nursery.start_soon(self._key_records.run)
        nursery.start_soon(self._limits.run)
        nursery.start_soon(self._keeper.run)
        nursery.start_soon(self._kept.run)
        nursery.start_soon(self._published.run)
        nursery.start_soon(suppressor.run)
        nursery.start_soon(self._cluster.run)
        await nursery.start(self._delivery(share, self.queues).dispatcher.run)
        if handed := self._cluster.queue:
            await nursery.start(self._delivery(HANDED, self.queues, handed).dispatcher.run)
        if lock is not None:
            nursery.start_soon(prove, lock)
        await nursery.start(self._listener.run)
        if not config.has_broker:
            adoption = Adoption(config.queue_directory, share, processes, self._adopt)
            nursery.start_soon(adoption.run)
        self._started = time.time()

    def _delivery(self, share: int, queues: Queues, handed: str = "") -> _Delivery:
        """The delivery of a share's outbox, once its dispatcher runs; or of the queue `handed`."""
        dispatcher = Dispatcher(
            self._live,
            queues,
            self._workers[0],
            plugins=self.plugins,
            resolver=self._resolver,
            openings=self._openings,
            limits=self._limits,
            send_log=self._log("send_log_file"),
            misspelt=self._misspelt,
            policies=self._published.policies,
            tls=self._tls,
            reports=self._server.terms.reports,
            signer=self._signer,
            storage=self._storage,
            handed=handed,
        )
        dispatcher.keeper_of = self._cluster.keeper_of if self._cluster.queue else None
        dispatcher.stops.rows, dispatcher.stops.hits = self._keeper.rows, self._keeper.hits
        delivery = self._deliveries[share] = _Delivery(queues, dispatcher)
        return delivery

    def _dispatchers(self) -> list[Dispatcher]:
        return [delivery.dispatcher for delivery in self._deliveries.values()]

    def _rows_changed(self, rows: Rows | None) -> None:
        self._kept.follow(self._keeper.table, self._limits.refusals)
        for delivery in self._deliveries.values():
            delivery.dispatcher.stops.change(rows)
        self._cluster.rows_changed()

    async def _adopt(self, share: int, lock: DirectoryLock, until: trio.Event) -> None:
        """Deliver from another share of the queue directory too, until `until` is set."""
        async with open_queues(self.config, share, lock) as queues:
            if self._stopping:
                return
            delivery = self._delivery(share, queues)
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(delivery.dispatcher.run)
                    nursery.start_soon(prove, lock)
                    await until.wait()
                    await delivery.dispatcher.stop(GIVE_BACK_SECONDS)
                    nursery.cancel_scope.cancel()
            finally:
                del self._deliveries[share]

    async def _stop(self) -> None:
        """End work under way: in its own time, or at once after an error."""
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
            await self._cluster.stop()
        # mq_context_cleanup gets the rest of the time.
        left = max(end - trio.current_time(), MIN_PLUGIN_SECONDS)
        self.plugins.timeout = min(self.plugins.timeout, left)
        self._nursery.cancel_scope.cancel()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """The addresses and ports for SMTP clients; empty unless the engine runs."""
        running = self._started is not None and self._ended is None
        return self._listener.addresses if running else []

    async def publish(
        self,
        message: Message | dict[str, Any] | bytes | str,
        *,
        queue: str | None = None,
        due: float | None = None,
    ) -> None:
        """Put a message into a queue, by default the outbox; the message is safe when this returns.

        A message is a `Message`, the JSON document, or that document as a dict, in which "mime" may
        also be bytes. `due` is seconds since 1970. The engine owns a `Message` from here on.

        Raises `QueueError` when the message cannot be kept now, and `MessageError`, which names the
        property, for a document that cannot be read or kept. A document for the outbox must also be
        fit to send: known properties have the right types and forms, recipient and envelope are
        addresses, smarthost and ips are readable, there is a body (or a plugin or handler listens
        to "out_data" and may supply one), its time has not passed, no result goes back to the
        outbox, the mail does not loop, and it asks for nothing that deliveries cannot do.

        Other mistakes are found at delivery, and are in the result: whether the domain exists and
        takes mail, whether `smtp-out-forbidden` allows the smarthost, whether this host has the
        address in ips, and what a plugin or handler makes of the message. A property for the outbox
        that may be misspelt is a warning in the log, see ``docs/messages.md``.
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

        Messages not given to `ack` by the end of the context go back into the queue. Messages that
        other processes left in other shares of the queue directory do not arrive here: the engine
        delivers the outbox there; for other queues use ``mailerq queue``.
        """
        self._check_open()
        return self.queues.consume(queue, prefetch=prefetch)

    async def ack(self, lease: Lease) -> None:
        """Remove a consumed message for good. Raises `QueueError`."""
        self._check_open()
        await self.queues.ack([Settlement(lease)])

    def reload(self, config: Config | None = None, *, number: int | None = None) -> Reload:
        """Put settings in force, or read again what the current ones name: a new snapshot.

        Transactions and attempts under way end with their old settings; totals across them
        (connections, memory, client limits) follow at once. No session ends. Settings that are
        fixed until a restart keep their values, and are in `Reload.pending`. `number` is the
        snapshot's number where several engines are one server.

        Raises `ConfigError` with all mistakes, and then nothing changes. Files of logins and of
        local addresses need no reload: they are checked when used.
        """
        self._check_open()
        if self._stopping:
            raise EngineError("the engine stops")
        notes: list[str] = []
        plan = self._live.plan(self.config if config is None else config, number)
        terms, shaping, answers, self._tls, logs = self._prepare(plan, notes)
        # From here on nothing can fail.
        before, config = self.config, plan.snapshot.config
        self._live.exchange(plan.snapshot)
        for name, file in logs.items():
            self._logs[name].move(config.text(name) or os.devnull, file)
        for log_file in self._logs.values():
            log_file.check_soon()
        services = self._server
        services.received_log = self._log("received_log_file")
        services.refused_log = self._log("refused_log_file")
        services.terms = terms.asking_plugins(self.plugins.listens("authenticate"))
        services.clients.set_limits(config, terms.access)
        services.memory.limit = config.max_memory
        services.handshakes.limit = config.smtp_handshakes
        self._connections.limit = count_connections(config)
        services.slots.limit = count_incoming(config, self._connections)
        self._outgoing.limit = count_outgoing(config, self._connections)
        if config.plugin_timeout != before.plugin_timeout:
            self.plugins.set_timeout(config.plugin_timeout)
        if not alike(config, before, "server_id", "hostname"):
            ids.set_machine(config.server_id, config.hostname)
        self._resolver.configure(config)
        self._published.reload()
        self._key_records.reload()
        react(self._limits, answers, self._kept)
        self._kept.follow(self._keeper.table, self._limits.refusals)
        regrouped = self._limits.change(shaping)
        self._keeper.change_pools(shaping.local_ips.pools)
        self._cluster.reload()
        reroute = regrouped or not alike(config, before, *ROUTES)
        for delivery in self._deliveries.values():
            delivery.queues.configure(config)
            delivery.dispatcher.reload(
                self._log("send_log_file"), reroute=reroute, tls=self._tls, reports=terms.reports
            )
        try:
            self._watchdog.set_seconds(config.watchdog_seconds)
        except OSError as error:
            notes.append(f"watchdog-seconds: nobody looks, until the next reload: {error}")
        return replace(plan, notes=tuple(notes))

    def plan(self, config: Config) -> Reload:
        """What `reload` would change, and what it could not; reads nothing."""
        return self._live.plan(config)

    def check(self, config: Config) -> list[str]:
        """Whether `reload` could use all that these settings name; returns its `notes`.

        Raises `ConfigError`.
        """
        self._check_open()
        notes: list[str] = []
        for file in self._prepare(self.plan(config), notes).logs.values():
            os.close(file)
        return notes

    def _prepare(self, plan: Reload, notes: list[str]) -> Prepared:
        config = plan.snapshot.config
        return prepare(config, self.config, self._server.terms, self._tls, notes)

    def _log(self, name: str) -> LogFile | None:
        return self._logs[name] if getattr(self.config, name) else None

    def statistics(self) -> dict[str, Any]:
        """Counters since the start, as a tree of numbers that can become JSON.

        Before the start, and after a failed one, "started" is None, counters are 0, and parts that
        do not exist are empty. After the end the figures are the last ones.
        """
        if self._started is None:
            return self._nothing_yet()
        deliveries = self._deliveries.values()
        return {
            "started": format_time(self._started),
            "uptime": (self._ended or time.time()) - self._started,
            "pid": os.getpid(),
            "hostname": self.config.hostname,
            "listening": [host_port(*address) for address in self.addresses],
            "workers": len(self._workers),
            "shares": sorted(share for share in self._deliveries if share != HANDED),
            "settings": self._settings(),
            "incoming": {
                "open": self._listener.open_sessions,
                "memory": self._server.memory.used,
                "held": self._server.memory.held,
                **asdict(self._server.counters),
            },
            "outgoing": {
                **total([each.dispatcher.statistics() for each in deliveries]),
                **self._limits.statistics(),
            },
            "replies": self._limits.replies(),
            "queue": total([each.statistics() for each in {each.queues for each in deliveries}]),
            "rows": self._keeper.statistics(),
            **({"storage": self._storage.statistics()} if self._storage is not None else {}),
            "cluster": self._cluster.statistics(),
            "plugins": self.plugins.statistics(),
            "watchdog": self._watchdog.statistics(),
        }

    def _settings(self) -> dict[str, Any]:
        snapshot = self._live.current
        return {"number": snapshot.number, "loaded": format_time(snapshot.loaded)}

    def _nothing_yet(self) -> dict[str, Any]:
        return {
            "started": None,
            "uptime": 0.0,
            "pid": os.getpid(),
            "hostname": self.config.hostname,
            "listening": [],
            "workers": 0,
            "shares": [],
            "settings": self._settings(),
            "incoming": {"open": 0, "memory": 0, "held": 0, **asdict(SessionCounters())},
            "outgoing": asdict(DeliveryCounters()),
            "replies": {},
            "queue": {},
            "rows": {},
            "cluster": {},
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

        A handler added before the context is entered misses no event. New connections offer logins
        while somebody listens to "authenticate".
        """
        check_handler(event, handler)
        self._handlers.append((event, handler))
        if not self._opened:
            return
        self.plugins.on(event, handler)
        if event == "authenticate":
            self._server.terms = self._server.terms.asking_plugins(True)

    def commands(self) -> control.Commands:
        """The requests of other programs on this host, see `mailerq.net.control`."""
        return {
            "status": lambda request: self.statistics(),
            "wake": self._wake,
            "rows": self._look_at_rows,
            "explain": self._explain,
            "top": self._top,
            "message-ids": self._message_ids,
            "queue-change": lambda request: operators.change(
                self._deliveries, self.config, request
            ),
            "note": control.note,
            "policies": self._look_at_policies,
            "trace": self._trace,
        }

    def _trace(self, request: control.Request) -> control.Lines:
        """The dialogue of sessions, see `mailerq.net.tracing`."""
        return control.Lines(partial(self._tracing.write, self._tracing.check(request)))

    def _sessions_of(self, worker: Worker) -> list[Traceable]:
        """The open sessions of a worker, on its thread."""
        sessions: list[Traceable] = [*self._listener.sessions_of(worker)]
        if worker is self._workers[0]:
            for delivery in self._deliveries.values():
                sessions += delivery.dispatcher.sessions
        return sessions

    def _wake(self, request: control.Request) -> dict[str, bool]:
        for delivery in self._deliveries.values():
            delivery.queues.wake(everything=bool(request.get("everything")))
            if request.get("everything"):
                delivery.dispatcher.flush()
        return {"ok": True}

    async def _publish_report(self, message: Message) -> None:
        await self.queues.publish([Publication(self.config.rabbitmq_outbox, message)])

    async def _look_at_rows(self, request: control.Request) -> dict[str, bool]:
        await self._keeper.look()
        return {"ok": True}

    async def _look_at_policies(self, request: control.Request) -> dict[str, bool]:
        await self._published.command(request)
        if "forget" in request:
            for delivery in self._deliveries.values():
                delivery.dispatcher.forget_policies(request["forget"])
        return {"ok": True}

    async def _explain(self, request: control.Request) -> dict[str, Any]:
        """What would be decided about mail to a recipient now, see `Explainer`."""
        question = Question.of(request)
        terms = self._server.terms
        local = explain_arrival(
            question.recipient, terms.config, terms.access, terms.local_addresses,
            keys=terms.reports.verp_keys, now=time.time(),
        )  # fmt: skip
        if local is not None:
            return {**question.answer(), **local}
        answers = [
            await delivery.dispatcher.seeing.explainer().explain(question)
            for delivery in list(self._deliveries.values())
        ]
        return await self._published.explained(merged_answers(answers))

    async def _top(self, request: control.Request) -> dict[str, Any]:
        """A page of the flows of all deliveries."""
        wanted = Wanted.of(request)
        return merged_pages([
            await list_flows(delivery.dispatcher.seeing, wanted)
            for delivery in list(self._deliveries.values())
        ])  # fmt: skip

    def _message_ids(self, request: control.Request) -> dict[str, list[str]]:
        """Ids for messages that a program without plugins is about to publish."""
        count = request.get("count", 1)
        if not isinstance(count, int) or not 0 < count <= MAX_IDS:
            raise MailerqError(f"count: expected a number from 1 to {MAX_IDS}")
        return {"ids": [self.plugins.message_id() for _ in range(count)]}


@dataclass(slots=True, eq=False)
class _Delivery:
    """An open share of the queue directory, and the dispatcher that empties its outbox."""

    queues: Queues
    dispatcher: Dispatcher


def _plain(group: ExceptionGroup[Exception]) -> MailerqError:
    """One error to catch for all errors that ended the tasks of an engine."""
    error: Exception = group
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, MailerqError):
        return error
    return EngineError(f"the engine had to end: {type(error).__name__}: {error}")


def _log_file(config: Config, name: str, stack: AsyncExitStack) -> LogFile:
    """A log; it writes nothing while its setting is empty."""
    with writable(config, name):
        log_file = LogFile(config.text(name) or os.devnull)
    stack.callback(log_file.close)
    return log_file
