"""One incoming connection: the protocol machine, the plugins and the queue, driven by trio.

Theory of operation
-------------------
One task runs one session from the first byte to the last: it reads, lets the machine find
the next event, asks the plugins, answers, and sends what has gathered when the machine
wants more. It waits in three places only: for the peer, for a plugin that has taken
control, and for the queue. Deadlines are one cancel scope around it all, moved forward
when the peer moves.

The final reply to a mail is given only after `Queues.publish` has returned. A local fault
of any kind is a 451, and the peer keeps the mail.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from mailerq.config import Config
from mailerq.errors import QueueError
from mailerq.mail import headers, incoming
from mailerq.message import Message
from mailerq.net.logs import LogFile
from mailerq.net.stream import Stream, StreamLost
from mailerq.net.worker import Worker
from mailerq.plugins import Plugins, Reject
from mailerq.queues import Publication, Queues
from mailerq.rules.access import Access, is_loopback
from mailerq.wire import server, smtp
from mailerq.wire.parameters import MailParameters, RcptParameters
from mailerq.wire.sasl import Credentials
from mailerq.wire.smtp import Reply, with_status

__all__ = ["Counters", "Server", "Session"]

log = logging.getLogger("mailerq.server")

TIMEOUT_SLACK: Final = 1.0
"""Seconds by which a deadline may lag behind: it is not moved for less, which is most times."""


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


@dataclass(slots=True, kw_only=True)
class Server:
    """What all sessions of an engine share."""

    config: Config
    settings: server.Settings
    access: Access
    plugins: Plugins
    queues: Queues
    tls: ssl.SSLContext | None = None
    received_log: LogFile | None = None
    clock: Callable[[], float] = time.time
    counters: Counters = field(default_factory=Counters)


class Session:
    """One client. `run` is its task; `shut_down` may be called from its worker's thread."""

    def __init__(
        self, shared: Server, worker: Worker, stream: Stream, *, implicit_tls: bool = False
    ) -> None:
        self.worker = worker
        self._shared = shared
        self._stream = stream
        self._implicit_tls = implicit_tls
        self._local = stream.local
        self._remote = stream.remote
        self._machine = server.ServerProtocol(
            shared.settings, auth_in_clear=is_loopback(self._remote[0])
        )
        self._plugin = worker.context.connection(stream.fileno(), on_output=self._send_output)
        self._scope = trio.CancelScope()
        self._moved = 0.0
        self._reading = False
        self._stopping = False
        self._user = ""

    async def run(self) -> None:
        """Serve until either side closes."""
        shared = self._shared
        shared.counters.connections += 1
        try:
            with self._scope:
                self._touch()
                await self._serve()
            if self._scope.cancelled_caught:
                self._say_goodbye()
        except StreamLost as error:
            shared.counters.lost_connections += 1
            log.debug("connection from %s lost: %s", self._remote[0], error)
        except Exception:
            # A defect of ours must not end the engine, nor cost the peer its mail.
            log.exception("the session with %s failed", self._remote[0])
            self._stream.send_nowait(smtp.LOCAL_FAILURE.wire)
        finally:
            self._plugin.closed_by_peer()
            with trio.CancelScope(shield=True):
                await self._plugin.close()
            self._stream.close()

    def shut_down(self, seconds: float) -> None:
        """End with 421: now when no mail is under way, else after it, at most in `seconds`."""
        self._stopping = True
        if self._reading and self._machine.sender is None:
            self._scope.cancel()
        else:
            deadline = trio.current_time() + seconds
            self._scope.deadline = min(self._scope.deadline, deadline)

    def _say_goodbye(self) -> None:
        """Last words after the scope was cancelled: the time was up, or the engine stops."""
        if self._stopping:
            reply = smtp.CLOSING
        else:
            self._shared.counters.timeouts += 1
            reply = smtp.TIMED_OUT
        if not (self._implicit_tls and not self._machine.secure):
            self._stream.send_nowait(self._machine.data_to_send() + reply.wire)

    def _touch(self) -> None:
        now = trio.current_time()
        if not self._stopping and now - self._moved > TIMEOUT_SLACK:
            self._moved = now
            self._scope.deadline = now + self._shared.config.smtp_timeout

    async def _serve(self) -> None:
        machine = self._machine
        stream = self._stream
        refusal = await self._plugin.connect()
        if self._implicit_tls and refusal is None:
            await self._start_tls()
            machine.secure = True
            refusal = await self._plugin.secured()
        self._take_output()
        machine.greet(_reply(refusal) if refusal else None)
        while True:
            event = machine.next_event()
            match event:
                case server.NEED_DATA:
                    if self._stopping and machine.sender is None:
                        machine.close(smtp.CLOSING, "stopping")
                        continue
                    if data := machine.data_to_send():
                        await stream.send_all(data)
                    self._reading = True
                    data = await stream.receive()
                    self._reading = False
                    self._touch()
                    machine.receive_data(data)
                    continue
                case server.Rcpt():
                    await self._rcpt(event)
                case server.Mail():
                    await self._mail(event)
                case server.Content():
                    await self._content(event)
                case server.Data():
                    machine.accept()
                case server.Hello():
                    machine.accept()
                case server.Auth():
                    await self._auth(event)
                case server.StartTls():
                    await self._starttls()
                case server.Closing():
                    await stream.send_all(machine.data_to_send())
                    return
                case server.CLOSED:
                    return

    async def _mail(self, event: server.Mail) -> None:
        refusal = await self._plugin.mailfrom(event.sender)
        self._take_output()
        if refusal is None:
            self._machine.accept()
        else:
            self._shared.counters.refused_senders += 1
            self._machine.reject(_reply(refusal))

    async def _rcpt(self, event: server.Rcpt) -> None:
        recipient = event.recipient
        if not self._may_send_to(recipient):
            self._shared.counters.refused_recipients += 1
            self._machine.reject(smtp.NO_RELAY)
            return
        refusal = await self._plugin.rcptto(recipient)
        self._take_output()
        if refusal is None:
            self._machine.accept()
        else:
            self._shared.counters.refused_recipients += 1
            self._machine.reject(_reply(refusal))

    def _may_relay(self) -> bool:
        return self._plugin.authenticated or self._shared.access.may_relay(self._remote[0])

    def _may_send_to(self, recipient: str) -> bool:
        return self._may_relay() or self._shared.access.is_local(recipient)

    async def _auth(self, event: server.Auth) -> None:
        counters = self._shared.counters
        login, password, *_ = event.credentials
        decision = None
        if password is not None:
            decision = await self._plugin.authenticate(login, password)
        self._take_output()
        if decision is None:
            decision = self._is_configured_login(event.credentials)
        if decision is True:
            counters.logins += 1
            self._plugin.authenticated = True
            self._user = login
            self._machine.accept()
            return
        counters.failed_logins += 1
        self._plugin.authenticated = False
        if decision is False:
            self._machine.reject(smtp.AUTH_FAILED)
        else:
            self._machine.reject(_reply(decision, permanent="5.7.8"))

    def _is_configured_login(self, credentials: Credentials) -> bool:
        config = self._shared.config
        if not config.smtp_username:
            return False
        # Both are compared, so that the time taken does not tell which one was wrong.
        proven = credentials.proves(config.smtp_password)
        return credentials.login == config.smtp_username and proven

    async def _starttls(self) -> None:
        self._machine.accept()
        await self._stream.send_all(self._machine.data_to_send())
        await self._start_tls()
        self._machine.tls_started()
        refusal = await self._plugin.secured()
        self._take_output()
        if refusal is not None:
            self._machine.close(_reply(refusal), "refused after STARTTLS")

    async def _start_tls(self) -> None:
        context = self._shared.tls
        assert context is not None, "STARTTLS is offered only with a certificate"
        await self._stream.start_tls(context, server_side=True)
        self._plugin.secure = True
        self._shared.counters.tls += 1

    async def _content(self, event: server.Content) -> None:
        """Turn the mail into messages, let the plugins see them, publish, and only then say 250."""
        shared, machine = self._shared, self._machine
        reply = await self._take_mail(event.body)
        self._take_output()
        if reply.code >= 400:
            shared.counters.refused_messages += 1
            machine.reject(reply)
        else:
            shared.counters.transactions += 1
            machine.accept(reply)

    async def _take_mail(self, mime: bytes) -> Reply:
        shared = self._shared
        refusal = await self._plugin.data(mime)
        if refusal is not None:
            return _reply(refusal)
        reception = incoming.messages(
            mime,
            self._envelope(),
            hostname=shared.settings.hostname,
            now=shared.clock(),
            next_id=shared.plugins.message_id,
        )
        if reception is None:
            return smtp.TOO_MANY_HOPS
        for reason in reception.ignored:
            log.warning("mail from %s: ignored %s", self._remote[0], reason)
        refused: list[Reply] = []
        lines: list[str] = []
        publications: list[Publication] = []
        for message in reception.messages:
            recipient = message.recipient
            message.local = shared.access.is_local(recipient)
            refusal = await self._plugin.message(message)
            if refusal is not None:
                refused.append(_reply(refusal))
                lines.append(f"{refusal.code} {recipient}: {refusal.text}")
                continue
            lines.append(f"2.0.0 {message.properties.get('message-id', '')} for {recipient}")
            if queue := self._route(message):
                publications.append(Publication(queue, message))
        if len(refused) == len(reception.messages):
            return refused[0]
        try:
            if publications:
                await shared.queues.publish(publications)
        except QueueError as error:
            shared.counters.queue_errors += 1
            log.error("a mail from %s was not taken: %s", self._remote[0], error)
            return smtp.QUEUE_UNAVAILABLE
        shared.counters.messages += len(lines) - len(refused)
        shared.counters.bytes += len(mime)
        if shared.received_log is not None:
            for publication in publications:
                shared.received_log.write(_received_line(publication.message))
        lines.insert(0, "2.0.0 Message accepted" + (" for some recipients" if refused else ""))
        return Reply(250, "\n".join(lines))

    def _envelope(self) -> incoming.Envelope:
        machine, config = self._machine, self._shared.config
        secure = machine.secure
        authenticated = self._plugin.authenticated
        hello = machine.hello
        assert hello is not None, "the machine asks for EHLO"
        assert machine.mail is not None, "the machine asks for MAIL"
        local, remote = self._local, self._remote
        connection: dict[str, object] = {
            "local-ip": local[0],
            "local-port": local[1],
            "remote-ip": remote[0],
            "remote-port": remote[1],
            "secure": secure,
        }
        if self._user:
            connection["user"] = self._user
        properties: dict[str, object] = {"connection": connection}
        parameters = machine.mail.parameters
        if parameters.utf8:
            properties["smtputf8"] = True
        if parameters.require_tls:
            properties["requiretls"] = True
        if parameters.body == "BINARYMIME":
            properties["binarymime"] = True
        return incoming.Envelope(
            machine.mail.sender,
            machine.recipients,
            properties,
            [_dsn(parameters, rcpt.parameters) for rcpt in machine.rcpts],
            protocol=headers.protocol_name(
                extended=hello.extended, secure=secure, authenticated=authenticated
            ),
            helo=hello.name,
            client_ip=remote[0],
            trusted=config.smtp_extract and self._may_relay(),
        )

    def _route(self, message: Message) -> str:
        """The queue that the message is for; empty where the configuration drops it."""
        config = self._shared.config
        if message.local and config.rabbitmq_local:
            return config.rabbitmq_local
        inbox = config.rabbitmq_inbox
        return config.rabbitmq_outbox if inbox is None else inbox

    def _take_output(self) -> None:
        """Put what plugins sent raw behind what the server has said."""
        if output := self._plugin.take_output():
            self._machine.write(output)

    def _send_output(self) -> None:
        """A plugin sent something while the session waits for the peer."""
        if self._reading:
            self._stream.send_nowait(self._plugin.take_output())


def _reply(refusal: Reject, *, permanent: str = "5.7.1") -> Reply:
    """A plugin's refusal as a reply, with a status code where its text has none."""
    status = "4.7.1" if refusal.code < 500 else permanent
    return Reply(refusal.code, with_status(refusal.code, refusal.text, status))


def _dsn(mail: MailParameters, rcpt: RcptParameters) -> dict[str, object]:
    """The property ``dsn`` from the parameters of RFC 3461, where there are any."""
    dsn: dict[str, object] = {}
    if mail.ret:
        dsn["ret"] = mail.ret
    if mail.envid:
        dsn["envid"] = mail.envid
    if rcpt.notify:
        dsn["notify"] = ",".join(rcpt.notify)
    if rcpt.orcpt:
        dsn["orcpt"] = rcpt.orcpt
    return {"dsn": dsn} if dsn else {}


def _received_line(message: Message) -> str:
    connection = message.properties.get("connection", {})
    return (
        f"{message.properties.get('message-id', '')} <{message.envelope}> <{message.recipient}>"
        f" [{connection.get('remote-ip', '')}] [{connection.get('local-ip', '')}]"
    )
