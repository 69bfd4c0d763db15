"""What all sessions of an engine share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from mailerq.inbound.clients import Clients
from mailerq.inbound.spool import Memory
from mailerq.inbound.terms import Terms
from mailerq.net.logs import LogFile, Ration
from mailerq.net.misspelt import Misspelt
from mailerq.net.slots import Slots
from mailerq.net.tls import Handshakes
from mailerq.net.worker import Worker
from mailerq.plugins import Plugins
from mailerq.queues import Queues
from mailerq.wire import smtp
from mailerq.wire.smtp import Reply

__all__ = ["Counters", "Services"]

log = logging.getLogger("mailerq.server")

IGNORED_PER_MINUTE: Final = 60
"""Lines about x-mq-* fields that were ignored; the others are counted."""

LOADERS: Final = 4
"""Mails of a worker that are read from their files at a time."""


@dataclass(slots=True)
class Counters:
    """What sessions have seen since the start."""

    connections: int = 0
    refused_connections: int = 0
    lost_connections: int = 0
    timeouts: int = 0
    transactions: int = 0
    messages: int = 0
    bytes: int = 0
    refused_senders: int = 0
    refused_recipients: int = 0
    refused_messages: int = 0
    queue_errors: int = 0
    tls: int = 0
    logins: int = 0
    failed_logins: int = 0
    spilled: int = 0
    failed_recipients: int = 0


@dataclass(slots=True, kw_only=True)
class Services:
    """What sessions have between them. Any thread may read it.

    `terms` are exchanged as a whole when settings change. A session takes the new ones when no
    transaction is under way. What counts over sessions (`clients`, `slots`, `memory`, `handshakes`)
    and the logs are told, and change at once.
    """

    terms: Terms
    clients: Clients
    plugins: Plugins
    queues: Queues
    slots: Slots
    memory: Memory
    handshakes: Handshakes
    received_log: LogFile | None = None
    refused_log: LogFile | None = None
    clock: Callable[[], float] = time.time
    counters: Counters = field(default_factory=Counters)
    misspelt: Misspelt = field(default_factory=Misspelt)
    say_untaken: Ration = field(
        default_factory=partial(Ration, log.error, 1, "and %d mails more were not taken")
    )
    """A full disk must not fill the log as well."""
    say_no_way: Ration = field(
        default_factory=partial(Ration, log.error, 1, "and %d local recipients more were refused")
    )
    say_ignored: Ration = field(
        default_factory=partial(
            Ration, log.warning, IGNORED_PER_MINUTE, "and %d x-mq-* fields more were ignored"
        )
    )
    loaders: dict[Worker, trio.CapacityLimiter] = field(default_factory=dict)

    def admit(self, address: str, standing: str) -> Reply | str:
        """Let a client in and count it, or say why not.

        It is admitted by its address, and counted by its `standing` (see `Client`): `Clients.left`
        gets what this returns, once the client is gone.
        """
        if not self.terms.access.may_connect(address):
            return smtp.NOT_ADMITTED
        return self.clients.came(standing)

    def no_way(self, recipient: str) -> Reply:
        """Refuse a local recipient where nobody keeps local mail, and let the log say so."""
        self.say_no_way(
            "mail for %s is refused: it is local, and neither rabbitmq-local nor another inbox"
            " than the outbox nor smarthost is set",
            ascii(recipient),
        )
        return smtp.NO_WAY

    def loader(self, worker: Worker) -> trio.CapacityLimiter:
        """The turns of that worker's mails in files to be in memory as a whole; for its thread."""
        limiter = self.loaders.get(worker)
        if limiter is None:
            limiter = self.loaders[worker] = trio.CapacityLimiter(LOADERS)
        return limiter
