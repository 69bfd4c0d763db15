"""The services that all sessions of an engine share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from mailerq.inbound.clients import Clients
from mailerq.inbound.reports import Suppress
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
"""Log lines about ignored x-mq-* fields; further ones are counted."""

LOADERS: Final = 4
"""Mails that one worker reads from their files at a time."""


@dataclass(slots=True)
class Counters:
    """Counters of all sessions since the start."""

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
    reports: int = 0


@dataclass(slots=True, kw_only=True)
class Services:
    """Services that sessions share. Any thread may read them.

    A reload replaces `terms` as a whole; a session takes the new ones between transactions.
    Counters across sessions (`clients`, `slots`, `memory`, `handshakes`) and the logs change at
    once.
    """

    terms: Terms
    clients: Clients
    plugins: Plugins
    queues: Queues
    slots: Slots
    memory: Memory
    handshakes: Handshakes
    suppress: Suppress | None = None
    """Suppresses the recipients that reports are a reason for; None: nobody does."""
    received_log: LogFile | None = None
    refused_log: LogFile | None = None
    clock: Callable[[], float] = time.time
    counters: Counters = field(default_factory=Counters)
    misspelt: Misspelt = field(default_factory=Misspelt)
    say_untaken: Ration = field(
        default_factory=partial(Ration, log.error, 1, "and %d mails more were not taken")
    )
    """A full disk must not fill the log too."""
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
        """Admit and count a client, or return the refusal.

        The client is admitted by `address` and counted by `standing` (see `Client`). Give the
        result to `Clients.left` when the client is gone.
        """
        if not self.terms.access.may_connect(address):
            return smtp.NOT_ADMITTED
        return self.clients.came(standing)

    def no_way(self, recipient: str) -> Reply:
        """Refuse a local recipient when nobody keeps local mail, and log that."""
        self.say_no_way(
            "mail for %s is refused: it is local, and neither rabbitmq-local nor another inbox"
            " than the outbox nor smarthost is set, and local-delivery does not take it",
            ascii(recipient),
        )
        return smtp.NO_WAY

    def loader(self, worker: Worker) -> trio.CapacityLimiter:
        """Limits the mails that the worker loads from files at a time; for the worker's thread."""
        limiter = self.loaders.get(worker)
        if limiter is None:
            limiter = self.loaders[worker] = trio.CapacityLimiter(LOADERS)
        return limiter
