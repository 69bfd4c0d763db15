"""What all sessions of an engine share."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from mailerq.config import Config
from mailerq.net.addresses import LocalAddresses
from mailerq.net.auth import Authenticator
from mailerq.net.clients import Clients
from mailerq.net.logs import LogFile
from mailerq.net.memory import Memory
from mailerq.net.slots import Slots
from mailerq.net.tls import Handshakes
from mailerq.net.worker import Worker
from mailerq.plugins import Plugins
from mailerq.queues import Queues
from mailerq.rules.access import Access
from mailerq.wire import smtp
from mailerq.wire.server import Settings
from mailerq.wire.smtp import Reply

__all__ = ["Counters", "Server"]

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
class Server:
    """The settings of sessions, and what they have between them. Any thread may read it.

    `settings` are those of SMTP, `lmtp` those of LMTP. `tls` may be exchanged at any time, for
    handshakes to come.
    """

    config: Config
    settings: Settings
    lmtp: Settings
    access: Access
    local_addresses: LocalAddresses
    clients: Clients
    authenticator: Authenticator
    plugins: Plugins
    queues: Queues
    slots: Slots
    memory: Memory
    handshakes: Handshakes
    tls: ssl.SSLContext | None = None
    received_log: LogFile | None = None
    refused_log: LogFile | None = None
    clock: Callable[[], float] = time.time
    counters: Counters = field(default_factory=Counters)
    loaders: dict[Worker, trio.CapacityLimiter] = field(default_factory=dict)

    def admit(self, client: str) -> Reply | None:
        """Let a client in, and count it, or say why not. `Clients.left` undoes it."""
        if not self.access.may_connect(client):
            return smtp.NOT_ADMITTED
        return self.clients.came(client)

    def is_local(self, recipient: str) -> bool:
        """Whether anybody may send to that recipient."""
        return self.access.is_local(recipient) or self.local_addresses.has(recipient)

    def loader(self, worker: Worker) -> trio.CapacityLimiter:
        """The turns of that worker's mails in files to be in memory as a whole; for its thread."""
        limiter = self.loaders.get(worker)
        if limiter is None:
            limiter = self.loaders[worker] = trio.CapacityLimiter(LOADERS)
        return limiter
