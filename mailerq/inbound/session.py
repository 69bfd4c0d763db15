"""One incoming connection: the protocol machine, the plugins and the queue, driven by trio.

Theory of operation
-------------------
One task runs one session. It waits for three things only: the peer, a plugin that has taken
control, and the queue. While the task waits for the peer, input is handled where it arrives
(`_receive_data`): the machine finds the events, the handler of each (`_HANDLERS`) answers it, and
the replies leave together. If an answer takes time, the handler returns what the task must wait
for, and the task wakes. The worker's `Deadlines` limit how long the peer may take.

The final reply to a mail is given only after `Queues.publish` has returned. A local fault of any
kind is a 451, and the peer keeps the mail.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any, Final

import trio

from mailerq.address import is_loopback, parse_ip
from mailerq.errors import NO_SPACE
from mailerq.escaping import escape
from mailerq.inbound import reception
from mailerq.inbound.auth import AuthUnavailable
from mailerq.inbound.reception import UNKNOWN, Client, refusal_reply
from mailerq.inbound.services import Services
from mailerq.inbound.spool import Claim, Spool, is_in_file
from mailerq.mail import verp
from mailerq.net.stream import Stream, StreamLost
from mailerq.net.tracing import attach
from mailerq.net.worker import Worker
from mailerq.plugins import NOTHING, Reject
from mailerq.wire import proxy, smtp
from mailerq.wire.events import (
    NEED_DATA,
    Auth,
    Closing,
    Content,
    Data,
    Event,
    Hello,
    Mail,
    NoEvent,
    Rcpt,
    StartTls,
    XClient,
)
from mailerq.wire.refusals import CONTENT_LINE
from mailerq.wire.server import ServerProtocol
from mailerq.wire.smtp import Reply
from mailerq.wire.transcript import Pending

__all__ = ["Session"]

log = logging.getLogger("mailerq.server")

TARPIT_SECONDS: Final = 1.0
"""Delay of a reply to a nuisance."""

LOGIN_DELAY_SECONDS: Final = 0.5
"""Minimum delay of the reply to a failed login; doubles each time, up to the maximum."""

LOGIN_DELAY_MAXIMUM: Final = 8.0

Due = Callable[[], Awaitable[None]]
"""Work that the task of a session awaits before the next event."""

CONTENT_MARK: Final = CONTENT_LINE.decode() + " from"


class Session:
    """The session of one client. `run` is its task. Call the other methods on the worker's thread.

    `admitted` is the result of `Services.admit`; None for a proxy, whose client is not admitted
    yet. `secure`: TLS starts with the first byte; `lmtp`: the port speaks LMTP.
    """

    def __init__(
        self,
        services: Services,
        worker: Worker,
        stream: Stream,
        *,
        admitted: str | None,
        secure: bool = False,
        lmtp: bool = False,
    ) -> None:
        proxied = admitted is None
        self.worker = worker
        self._services = services
        self._terms = services.terms
        self._stream = stream
        self._implicit_tls = secure
        self._proxied = proxied
        self._client = Client(stream.remote, stream.local)
        self._admitted = admitted
        self._machine = ServerProtocol(self._terms.lmtp if lmtp else self._terms.settings)
        self._due: Due | None = None  # what `_receive_data` wakes the task for
        self._over = False
        self._plugin = worker.context.connection(stream.fileno(), on_output=self._send_output)
        self._scope = trio.CancelScope()
        self._relays = False  # may relay by address, without a login
        self._stopping = False
        self._expired = False
        self._mute = proxied or secure  # the connection does not carry SMTP now
        self._interruptible = False
        # For the deadlines: the start of the peer's current step, and the bytes since then.
        self._started = monotonic()
        self._waiting = False
        self._handshaking = False
        self._since = self._started
        self._heard = self._started
        self._steps = -1
        self._bytes = 0
        self._failures = 0
        self._spool: Spool | None = None  # made for the first mail
        self._in_mail = False
        self._failed_logins = 0
        self._machine.refusals = []

    async def run(self) -> None:
        """Serve until either side closes."""
        services = self._services
        services.counters.connections += 1
        try:
            with self._scope:
                if await self._introduce():
                    await self._serve()
            if self._scope.cancelled_caught:
                self._say_goodbye()
        except StreamLost as error:
            services.counters.lost_connections += 1
            log.debug("connection from %s lost: %s", self._client.remote[0], error)
        except Exception:
            # A defect here must neither stop the engine nor lose the mail.
            log.exception("the session with %s failed", self._client.remote[0])
            if not self._mute:
                self._stream.write(smtp.LOCAL_FAILURE.wire)
        finally:
            if self._spool is not None:
                self._spool.close()
            # Free the descriptor first: plugins may take long.
            try:
                closing = self._plugin.close()
            finally:
                self._stream.close()
            if closing is not NOTHING:
                with trio.CancelScope(shield=True):
                    await closing
            if self._admitted is not None:
                services.clients.left(self._admitted)

    def shut_down(self, seconds: float) -> None:
        """End with 421: now if no mail is under way, else after the mail, within `seconds`."""
        self._stopping = True
        idle = self._waiting or self._interruptible
        if idle and self._machine.sender is None:
            self._scope.cancel()
        else:
            deadline = trio.current_time() + seconds
            self._scope.deadline = min(self._scope.deadline, deadline)

    def is_overdue(self, now: float, short: bool) -> bool:
        """Whether the peer has exceeded a timeout. `short`: few connections are left."""
        if not self._waiting:
            return False
        terms = self._services.terms if self._machine.sender is None else self._terms
        bounds = terms.tight if short else terms.bounds
        if now - self._started > bounds.session:
            return True
        waited = now - self._since
        if self._handshaking:
            late = waited > bounds.handshake
        elif self._machine.in_content:
            fair = bounds.idle + self._bytes / bounds.rate if bounds.rate else waited
            late = now - self._heard > bounds.idle or waited > fair
        else:
            late = waited > (bounds.command if self._machine.unfinished else bounds.idle)
        # With unread input this side is late, unless the peer does not read its replies.
        return late and (self._stream.is_stuck or not self._stream.has_input)

    def expire(self) -> None:
        """End the session after a timeout."""
        self._expired = True
        self._scope.cancel()

    def hurry(self) -> None:
        """Give up a handshake, because others wait for its place. For any thread."""
        self.worker.call(self._cut_handshake)

    def trace(self) -> bool:
        """Attach the traces of the worker; False if that must wait for the end of a command."""
        if self._over or self._stream.tap is not None:
            self._join_traces()
            return True
        may_join = self._waiting and self._machine.is_at_command and not self._handshaking
        if may_join:
            self._join_traces()
        return may_join

    def _join_traces(self, *due: Pending) -> None:
        client = self._client
        attach(self._stream, self.worker.traces, "in", client.remote, client.local, due)

    def _cut_handshake(self) -> None:
        if self._handshaking:
            self.expire()

    def _say_goodbye(self) -> None:
        """Send the last reply after a timeout or a shutdown has cancelled the scope."""
        if self._expired:
            self._services.counters.timeouts += 1
        reply = smtp.TIMED_OUT if self._expired else smtp.CLOSING
        if not self._mute:
            self._stream.write(self._machine.data_to_send() + reply.wire)

    # Before the first command.

    async def _introduce(self) -> bool:
        """Prepare the session and send the banner; False if the session is over."""
        machine = self._machine
        reply: Reply | None = None
        if self._proxied:
            if not await self._read_proxy_header():
                return False
            reply = self._admit()
        self._mute = self._implicit_tls
        if self.worker.traces:
            self._join_traces(Pending.COMMAND)
        machine.xclient = self._terms.access.may_xclient(self._client.standing)
        self._know_client()
        if reply is None:
            refusal = await self._plugin.connect()
            reply = refusal_reply(refusal) if refusal is not None else None
        if self._implicit_tls:
            if reply is not None or not self._may_shake_hands():
                return False
            await self._start_tls()
            machine.secure = True
            refusal = await self._plugin.secured()
            reply = refusal_reply(refusal) if refusal is not None else None
        self._take_output()
        if reply is None and self._terms.config.smtp_greet_delay and not self._implicit_tls:
            await self._delay_greeting()
        machine.greet(reply)
        return True

    async def _read_proxy_header(self) -> bool:
        """Read the client's address from the proxy."""
        received = b""
        try:
            with self._handshake():
                while (header := proxy.parse(received)) is None:
                    data = await self._stream.receive()
                    if not data:
                        raise proxy.ProxyError("closed within the PROXY header")
                    received += data
        except proxy.ProxyError as error:
            self._services.counters.refused_connections += 1
            log.warning("proxy %s: %s", self._client.remote[0], error)
            return False
        self._stream.unread(received[header.length :])
        if header.source is not None and header.destination is not None:
            self._client = Client(header.source, header.destination)
        else:
            self._client.named = False
        return True

    def _admit(self) -> Reply | None:
        """Admit the client that a proxy named, or return the refusal."""
        host, standing = self._client.remote[0], self._client.standing
        answer = self._services.admit(host, standing)
        if isinstance(answer, str):
            self._admitted = answer
            return None
        self._services.counters.refused_connections += 1
        log.debug("connection from %s refused: %s", host, answer.text)
        return answer

    def _know_client(self) -> None:
        """Look up what the address of the client allows."""
        self._plugin.address, self._plugin.port = self._client.remote
        host = self._client.standing
        self._relays = self._terms.access.may_relay(host)
        self._machine.auth_in_clear = is_loopback(host)

    def _renew(self) -> None:
        """Take the current settings; no transaction is under way."""
        terms = self._terms = self._services.terms
        self._machine.settings = terms.lmtp if self._machine.settings.lmtp else terms.settings
        self._relays = terms.access.may_relay(self._client.standing)
        if self._spool is not None:
            self._spool.close()
            self._spool = None
            self._in_mail = False  # after an abandoned mail

    async def _delay_greeting(self) -> None:
        """Delay the banner: a client that speaks first is not a mail server."""
        if self._machine.settings.lmtp or self._relays or not self._client.named:
            return
        with trio.move_on_after(self._terms.config.smtp_greet_delay), self._pause():
            self._machine.receive_data(await self._stream.receive())

    # The loop.

    async def _serve(self) -> None:
        """Await what is due until the session is over."""
        while not self._over:
            due, self._due = self._due, None
            if due is None:
                due = self._advance()
            await (self._listen() if due is None else due())

    async def _listen(self) -> None:
        """Send the replies, and wait for the peer."""
        self._wait()
        if replies := self._machine.data_to_send():
            self._stream.write(replies)
        await self._stream.receive_each(self._receive_data)
        self._waiting = False

    async def _listen_later(self) -> None:
        """Do the slow work that comes before the peer's turn."""
        machine = self._machine
        if machine.nuisance:
            await self._sleep(TARPIT_SECONDS)
        if self._in_mail and (spool := self._content_came()) is not None:
            await spool.flush()
            spool.came(machine.content_size)
        await self._listen()

    async def _close(self, event: Closing) -> None:
        """Send the last reply, and end the session."""
        self._failed()
        self._wait()
        self._stream.write(self._machine.data_to_send())
        await self._stream.drain()
        self._waiting = False
        self._over = True

    async def _leave(self, event: NoEvent) -> None:
        """End the session: the peer has closed the connection."""
        self._over = True

    def _receive_data(self, data: bytes) -> bool:
        """Handle input as far as possible without the task; True: wake the task."""
        self._waiting = False
        self._bytes += len(data)
        self._machine.receive_data(data)
        self._due = self._advance()
        if self._due is not None:
            return True
        self._wait()
        if replies := self._machine.data_to_send():
            self._stream.write(replies)
        return False

    def _advance(self) -> Due | None:
        """Answer events up to one that the task must wait for; None: the peer's turn."""
        machine = self._machine
        while True:
            if self._terms is not self._services.terms and machine.sender is None:
                self._renew()
            event = machine.next_event()
            if event is not NEED_DATA:
                due = _HANDLERS[type(event)](self, event)
                if due is not None:
                    return due
            elif machine.failures != self._failures and not self._failed():
                machine.close(smtp.ERRORS_TOO_OFTEN, "too many errors in a minute")
            elif self._stopping and machine.sender is None:
                machine.close(smtp.CLOSING, "stopping")
            elif machine.nuisance or (self._in_mail and self._content_came() is not None):
                return self._listen_later
            else:
                return None

    def _wait(self) -> None:
        """Start the peer's turn; a step already begun keeps its start time."""
        machine = self._machine
        if machine.steps != self._steps or not machine.unfinished:
            self._steps = machine.steps
            self._since = self._heard = monotonic()
            self._bytes = 0
        elif machine.in_content:
            self._heard = monotonic()
        self._waiting = True

    @contextmanager
    def _handshake(self) -> Iterator[None]:
        """The turn of the peer in a TLS handshake or a PROXY header."""
        self._since = monotonic()
        self._waiting = self._handshaking = self._mute = True
        yield
        self._waiting = self._handshaking = False

    @contextmanager
    def _pause(self) -> Iterator[None]:
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    async def _sleep(self, seconds: float) -> None:
        """Delay the peer; a shutdown ends the delay."""
        with self._pause():
            if not self._stopping:
                await trio.sleep(seconds)

    def _failed(self) -> bool:
        """Count the errors of the client; False above the limit per minute."""
        count = self._machine.failures - self._failures
        self._failures = self._machine.failures
        self._log_refusals()
        return self._services.clients.may(self._client.standing, "errors", count)

    def _log_refusals(self) -> None:
        """Write refusals to their log, and those of whole mails to the application log too."""
        refusals, refused_log = self._machine.refusals, self._services.refused_log
        if not refusals:
            return
        host = self._client.remote[0]
        for command, reply in refusals:
            text = reply.text.replace("\n", " ")
            if refused_log is not None:
                # Escape arrows in the command, because readers split the line at the first one.
                shown = escape(command).replace(" -> ", "\\x20->\\x20")
                refused_log.write(f"[{host}] {shown} -> {reply.code} {escape(text)}")
            if command.startswith(CONTENT_MARK):
                log.warning("refused: [%s] %s -> %d %s", host, command, reply.code, text)
        refusals.clear()

    # Events.

    def _hello(self, event: Hello) -> None:
        self._plugin.helo = event.name
        self._machine.accept()

    def _mail(self, event: Mail) -> Due | None:
        """Answer MAIL, or ask the plugins."""
        services = self._services
        if self._terms is not services.terms:
            self._renew()  # the last transaction ended in the same read
        if not (self._relays or services.clients.may(self._client.standing, "messages")):
            self._refuse_sender(smtp.MESSAGES_TOO_OFTEN)
            return None
        return self._ask(self._plugin.mailfrom(event.sender), self._refuse_sender)

    def _refuse_sender(self, reply: Reply) -> None:
        self._services.counters.refused_senders += 1
        self._machine.reject(reply)

    def _rcpt(self, event: Rcpt) -> Due | None:
        """Answer RCPT, or ask the plugins."""
        if (objection := self._objection(event.recipient)) is not None:
            self._refuse_recipient(objection)
            return None
        return self._ask(self._plugin.rcptto(event.recipient), self._refuse_recipient)

    def _objection(self, recipient: str) -> Reply | None:
        """The refusal of a recipient before any plugin is asked, or None."""
        services, terms = self._services, self._terms
        returned = terms.returned(recipient, services.clock())
        if returned is not None and not isinstance(returned, verp.Problem):
            if terms.config.rabbitmq_reports:
                return self._too_often()
        elif returned is not None and terms.is_local(recipient):
            return smtp.RETURN_EXPIRED if returned == "expired" else smtp.RETURN_FORGED
        relays = self._relays or self._plugin.authenticated
        if not (relays or terms.is_ours(recipient)):
            return smtp.NO_RELAY
        if not terms.config.keeps_local_mail and terms.is_local(recipient):
            if not terms.is_delivered(recipient):
                return services.no_way(recipient)
        return self._too_often()

    def _too_often(self) -> Reply | None:
        """Count a recipient; the refusal above the limit of the client."""
        may = self._relays or self._services.clients.may(self._client.standing, "recipients")
        return None if may else smtp.RECIPIENTS_TOO_OFTEN

    def _ask(self, asked: Awaitable[Reject | None], refuse: Callable[[Reply], None]) -> Due | None:
        """Accept if no plugin subscribes to the event; else the task waits for the plugins."""
        if asked is NOTHING:
            self._answer(None, refuse)
            return None
        return partial(self._answer_asked, asked, refuse)

    async def _answer_asked(
        self, asked: Awaitable[Reject | None], refuse: Callable[[Reply], None]
    ) -> None:
        self._answer(await asked, refuse)

    def _answer(self, refusal: Reject | None, refuse: Callable[[Reply], None]) -> None:
        self._take_output()
        if refusal is None:
            self._machine.accept()
        else:
            refuse(refusal_reply(refusal))

    def _refuse_recipient(self, reply: Reply) -> None:
        self._services.counters.refused_recipients += 1
        self._machine.reject(reply)

    async def _auth(self, event: Auth) -> None:
        services, host, standing = self._services, self._client.remote[0], self._client.standing
        asked = trio.current_time()
        login, password, *_ = event.credentials
        # Count before the check, so that parallel logins count.
        if not services.clients.may(standing, "logins"):
            log.warning("too many failed logins from %s", host)
            self._machine.reject(smtp.LOGINS_TOO_OFTEN)
            return
        decision: bool | Reject | None = None
        if password is not None:
            decision = await self._plugin.authenticate(login, password)
        self._take_output()
        try:
            if decision is None:
                decision = await self._terms.authenticator.check(event.credentials)
        except AuthUnavailable as error:
            log.error("logins cannot be checked: %s", error)
            services.clients.did_not(standing, "logins")
            self._machine.reject(smtp.AUTH_UNAVAILABLE)
            return
        if decision is True:
            services.counters.logins += 1
            services.clients.did_not(standing, "logins")
            self._plugin.authenticated = True
            self._client.user = self._plugin.login = login
            self._machine.accept()
            return
        services.counters.failed_logins += 1
        log.info("login of %s from %s failed", ascii(login[:80]), host)
        self._plugin.authenticated = False
        # Delay from the request on: the duration of the check must not reveal known names.
        delay = min(LOGIN_DELAY_SECONDS * 2**self._failed_logins, LOGIN_DELAY_MAXIMUM)
        await self._sleep(max(0.0, asked + delay - trio.current_time()))
        self._failed_logins += 1
        if decision is False:
            self._machine.reject(smtp.AUTH_FAILED)
        else:
            self._machine.reject(refusal_reply(decision))

    async def _starttls(self, event: StartTls) -> None:
        machine = self._machine
        if not self._may_shake_hands():
            machine.reject(smtp.TLS_UNAVAILABLE)
            return
        machine.accept()
        await self._start_tls(machine.data_to_send())
        machine.tls_started()
        self._client.user = ""
        self._plugin.authenticated = False
        self._plugin.login = self._plugin.helo = None
        refusal = await self._plugin.secured()
        self._take_output()
        if refusal is not None:
            machine.close(refusal_reply(refusal), "refused after STARTTLS")

    def _may_shake_hands(self) -> bool:
        """Take a place for a handshake; `_start_tls` returns the place."""
        if self._services.handshakes.begin(self):
            return True
        log.info("no place for a TLS handshake with %s", self._client.remote[0])
        return False

    async def _start_tls(self, before: bytes = b"") -> None:
        """Send the last bytes in clear, and shake hands."""
        services = self._services
        context = self._terms.tls
        assert context is not None, "TLS is offered only with a certificate"
        try:
            with self._handshake():
                if before:
                    self._stream.write(before)
                await self._stream.start_tls(context, server_side=True)
        finally:
            services.handshakes.end(self)
        self._mute = False
        plugin, stream = self._plugin, self._stream
        plugin.secure = True
        plugin.tls_version, plugin.tls_name = stream.tls_version, stream.peer_name
        plugin.tls_cipher = stream.cipher[0] if stream.cipher is not None else None
        services.counters.tls += 1

    def _xclient(self, event: XClient) -> None:
        """Replace the client by the one that a trusted peer names; a previous login is void."""
        attributes, client = event.attributes, self._client
        try:
            remote = _endpoint(attributes, "ADDR", "PORT", client.remote)
            local = _endpoint(attributes, "DESTADDR", "DESTPORT", client.local)
        except ValueError:
            self._machine.reject(smtp.BAD_PARAMETER_VALUE)
            return
        self._client = Client(remote, local, attributes.get("LOGIN") or "")
        self._plugin.authenticated = bool(self._client.user)
        self._plugin.login, self._plugin.helo = self._client.user or None, None
        if remote[0] != client.remote[0]:
            if self._admitted is not None:
                self._services.clients.left(self._admitted)
                self._admitted = None
            if (refusal := self._admit()) is not None:
                self._machine.close(refusal, "the client of a proxy is refused")
                return
        self._know_client()
        if self.worker.traces and not self._machine.unfinished:
            self._join_traces(Pending.COMMAND)
        self._machine.accept()

    # Content.

    def _data(self, event: Data) -> None:
        services = self._services
        if services.memory.is_full:
            self._machine.reject(smtp.NO_MEMORY)
            return
        spool = self._spool
        if spool is None:
            config = self._terms.config
            spool = Spool(services.memory, config.queue_directory, config.smtp_spill_size)
            self._spool = spool
        elif self._in_mail:
            spool.close()  # after a refused or abandoned mail
        self._in_mail = True
        self._machine.accept(sink=spool)

    def _content_came(self) -> Spool | None:
        """Count the bytes of the mail; return its spool if the spool must be written now."""
        spool, machine = self._spool, self._machine
        assert spool is not None, "within a mail"
        if machine.mail is None:
            self._in_mail = False
            spool.close()
            return None
        spool.came(machine.content_size)
        return spool if spool.is_due else None

    async def _content(self, event: Content) -> None:
        """Turn the mail into messages, show the messages to plugins, publish, and reply."""
        services, machine, spool = self._services, self._machine, self._spool
        assert spool is not None, "within a mail"
        body, size = event.body, len(event.body)
        if spool.failed is not None:
            services.say_untaken(
                "a mail from %s was not taken: %s", self._client.remote[0], spool.failed
            )
            full = spool.failed.errno in NO_SPACE
            reply = smtp.NO_MEMORY if full else smtp.QUEUE_UNAVAILABLE
            replies = [reply] * (len(machine.rcpts) if machine.settings.lmtp else 1)
        else:
            spool.close()
            services.counters.spilled += is_in_file(body)
            replies = await self._take(body)
        self._in_mail = False
        spool.close()
        self._take_output()
        if all(reply.code >= 400 for reply in replies):
            services.counters.refused_messages += 1
        else:
            services.counters.transactions += 1
            services.counters.bytes += size
        if machine.settings.lmtp:
            machine.accept(each=replies)
            self._log_refusals()
        elif replies[0].code >= 400:
            machine.reject(replies[0])
        else:
            machine.accept(replies[0])

    async def _take(self, body: bytes | memoryview) -> list[Reply]:
        services = self._services
        turns = services.loader(self.worker) if is_in_file(body) else None
        claim = Claim(services.memory, len(body), turns)
        try:
            return await reception.take(
                services, self._terms, self._client, self._plugin, self._machine, body, claim
            )
        finally:
            claim.end()

    # Raw output of plugins.

    def _take_output(self) -> None:
        """Queue raw output of plugins behind the replies."""
        if output := self._plugin.take_output():
            self._machine.write(output)

    def _send_output(self) -> None:
        """Send output that a plugin made outside an event, behind the pending replies."""
        if not self._mute and (output := self._plugin.take_output()):
            self._stream.write(self._machine.data_to_send() + output)
            self._stream.flush()


Handler = Callable[[Session, Any], Due | None]
"""Answers an event, or returns what the task must wait for before the next event."""


def _later(method: Callable[[Session, Any], Awaitable[None]]) -> Handler:
    """Make a handler that leaves the answer to the task, because the answer takes time."""
    return lambda session, event: partial(method, session, event)


_HANDLERS: Final[dict[type[Event], Handler]] = {
    Hello: Session._hello,
    StartTls: _later(Session._starttls),
    Auth: _later(Session._auth),
    XClient: Session._xclient,
    Mail: Session._mail,
    Rcpt: Session._rcpt,
    Data: Session._data,
    Content: _later(Session._content),
    Closing: _later(Session._close),
    NoEvent: _later(Session._leave),  # CLOSED; `_advance` handles NEED_DATA
}


def _endpoint(
    attributes: Mapping[str, str | None], name: str, port_name: str, known: tuple[str, int]
) -> tuple[str, int]:
    """An address and a port in XCLIENT form. Raises ValueError."""
    host, port = known
    if name in attributes:
        given = attributes[name] or UNKNOWN
        host = str(parse_ip(given[5:] if given[:5].upper() == "IPV6:" else given))
        port = 0
    if text := attributes.get(port_name):
        port = int(text) if text.isascii() else -1
        if not 0 <= port <= 65535:
            raise ValueError("no port")
    return host, port
