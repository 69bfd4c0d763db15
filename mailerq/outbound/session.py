"""One connection to a host that takes mail: from connecting to QUIT, message after message.

Theory of operation
-------------------
A connection is one task on one worker. It belongs to a `Pool`, which lives on the home
worker: the pool hands it jobs with `give`, and it tells the pool what came of them. Each of
the two calls the other through `Worker.call`, so with a single worker both are plain calls
and a connection finds its next job in its hand when it has reported the last one.

A connection first goes through the hosts that it was made for until one lets it in; only
then does it take a job. One body is under way at a time.

The envelope of the next message may go ahead, in one write with a short body: where one waits that
no other connection could take now, and the peer pipelines and has answered the body before without
delay. A message then costs one round trip. It is bound to this connection from then on, but goes
back to the pool when that ends before its turn, or when the reply to the body takes its time. Only
connections of the home worker do so, because the pool must answer at once. What plugins send
outside of an event meanwhile is held until the next dot, or it would be a part of that mail.

A peer may answer out of step; `mailerq.wire.client` states when a reply counts, and has an
envelope, RSET or QUIT follow each body as proof. The message in doubt is tried again; where its
body was not sent, at once on another connection. The pool remembers the host for a while: it is
sent nothing behind a body, and new connections to it end with each mail.
A peer without 8BITMIME gets a body in ASCII (`mailerq.mail.seven_bit`). Each connection that the
message is given to finds the encodings and the size once, in a thread if the body is long. The
blocks of a long body are encoded while they are sent.

Results are committed in groups by somebody else. A connection sends the next envelope
meanwhile, but not the next body before it has heard that its last result is safe
(`settled`). So if the process dies, at most one message for each connection is sent twice.

The deadline is a plain number, moved forward for each complete reply and each piece of a
body, so that a peer that drips bytes gains nothing by it. The pool's watch has it checked
every now and then (`check`): a deadline of trio's own would cost more than it tells.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
import trio

from mailerq.mail.seven_bit import Converted, convert, to_seven_bit
from mailerq.message import Message
from mailerq.net.resolver import Host
from mailerq.net.stream import CannotBind, Stream, StreamLost
from mailerq.queues import Lease
from mailerq.rules import responses
from mailerq.rules.responses import Outcome
from mailerq.rules.routes import Route, has_ascii_header
from mailerq.wire._lines import is_ascii
from mailerq.wire.client import (
    NEED_DATA,
    Accepted,
    ClientProtocol,
    Event,
    Failed,
    Problem,
    Ready,
    Refused,
    SendBody,
    Step,
)
from mailerq.wire.framing import BLOCK_BYTES
from mailerq.wire.smtp import Reply

if TYPE_CHECKING:
    from mailerq.config import Config
    from mailerq.net.worker import Worker
    from mailerq.plugins import Connection as PluginConnection

__all__ = ["Connection", "Job", "Report"]

log = logging.getLogger("mailerq.delivery")

MAX_HOSTS: Final = 8
"""Hosts that one connection tries before it gives up; RFC 5321 asks for two."""

MAX_MOVES: Final = 3
"""How often a message goes to another connection because a peer was gone when its turn came."""

FINAL_REPLY: Final = 5
"""The reply to the final dot may take so many times `smtp-out-timeout`: the peer does its work
then, and a mail that is given up too early arrives twice (RFC 5321, section 4.5.3.2.6)."""

AHEAD_BYTES: Final = 8192
"""Bytes of a body behind which an envelope still fits into one write: what the kernel did not take
of a longer one, the body or the envelope, nobody could tell."""

PROMPT_SECONDS: Final = 0.1
"""A peer that took longer for the last body gets no envelope ahead: the message behind it would
wait for the reply to this one, while another connection may become free."""

WITHDRAW_SECONDS: Final = 1.0
"""Then such a message goes back to the pool, and the connection ends with the reply."""

LOOK_BYTES: Final = 1 << 20
"""Above this size a thread checks whether a body is ASCII."""

CONVERT_BYTES: Final = 1 << 14
"""Bytes of a body that are converted at once; more of it takes its time in a thread."""

CONVERTERS: Final = 2
"""Such bodies of a worker at a time."""

MIN_IDLE_SECONDS: Final = 0.05
"""How long a connection is kept idle at least: a job may be on its way from another thread."""

QUIT_SECONDS: Final = 2.0
"""How long the reply to QUIT is waited for; it decides nothing."""


class Job(msgspec.Struct, eq=False):
    """A message that is to be sent now. `envelope` and `recipient` are as the wire needs them.

    `attempt` counts from 1; `expires` is seconds since 1970; `local_ip` is the address to send
    from, None for any. `moves` counts the connections that it was given to and that ended before
    its turn. `since` is when it was put into the pool, on the monotonic clock. `is_ascii` is about
    the body, None as long as nobody has looked.
    """

    lease: Lease
    message: Message
    route: Route
    local_ip: str | None
    envelope: str
    recipient: str
    attempt: int
    expires: float
    moves: int = 0
    since: float = 0.0
    is_ascii: bool | None = None


class Report(msgspec.Struct, frozen=True):
    """What came of an attempt, and over which connection if there was one."""

    outcome: Outcome
    local_ip: str | None = None
    remote_ip: str | None = None
    mta: str | None = None
    messages: int | None = None


class Employer(Protocol):
    """Who gives a connection its jobs: what it expects of `mailerq.outbound.pool.Pool`.

    All methods are called on the thread of `worker`.
    """

    worker: Worker

    @property
    def config(self) -> Config:
        """The settings in force now."""

    def host_failed(self, host: Host) -> None:
        """That host did not let us in."""

    def cannot_bind(self, local_ip: str, error: OSError) -> None:
        """Nothing can be sent from that address of this host."""

    def opened(self, connection: Connection) -> None:
        """The connection can take its first job."""

    def finished(self, connection: Connection, job: Job, report: Report, reusable: bool) -> None:
        """A job is over; the connection takes another one only when it is `reusable`."""

    def next_job(self, connection: Connection) -> Job | None:
        """A job that the connection may begin before it has finished the one in hand."""

    def returned(self, job: Job) -> None:
        """A job was not tried, because the peer had gone."""

    def withdrawn(self, connection: Connection, job: Job) -> None:
        """A `next_job` was not tried, because the peer went or was slow."""

    def out_of_step(self, connection: Connection) -> None:
        """The host of the connection answers in an order that proves nothing."""

    def leaving(self, connection: Connection) -> None:
        """The connection takes no more jobs."""

    def closed(self, connection: Connection, job: Job | None, report: Report | None) -> None:
        """The connection has ended; a `report` says why no host let it in."""


class Connection:
    """A connection of a pool; `run` is its task.

    `give`, `leave`, `cut`, `check` and `settled` are for its worker's thread.
    """

    def __init__(self, pool: Employer, worker: Worker, route: Route, local_ip: str | None) -> None:
        self.worker = worker
        self.route = route
        self.local_ip = local_ip
        self.remote = ""
        self._pool = pool
        self._timeout = pool.config.smtp_out_timeout
        self._deadline = math.inf
        self._life = trio.CancelScope()
        self._scope = trio.CancelScope()
        self._idle = False
        self._sending = False
        self._held = b""  # what plugins sent and must not come in between
        self._job: Job | None = None
        self._ahead: Job | None = None
        self._begun = False  # an envelope went ahead, and its body has not followed
        self._prompt = False
        self._asked = math.inf  # when the last body was sent
        self._leaving = False
        self._over = False
        self._unsettled = 0
        self._calm: trio.Event | None = None
        self._protocol: ClientProtocol
        self._stream: Stream
        self._plugin: PluginConnection
        self._doubtful: Collection[str] = ()
        self._local = ""
        self._converted: bytes | Converted | None = None
        self._messages = 0

    # Told by the pool

    def give(self, job: Job) -> None:
        """Take a job; the connection may just have ended, then the job goes back."""
        if self._over:
            self._pool.worker.call(self._pool.returned, job)
            return
        self._job = job
        self._rouse()

    def leave(self) -> None:
        """End after the message under way."""
        self._leaving = True
        self._rouse()

    def cut(self) -> None:
        """End now."""
        self._life.cancel()

    def check(self) -> None:
        """End what has taken too long: the wait for a reply, or for a job."""
        now = monotonic()
        if now - self._asked > WITHDRAW_SECONDS:
            self._withdraw()
        if now < self._deadline:
            return
        if self._idle:
            self.leave()
        else:
            self._scope.cancel()

    def settled(self) -> None:
        """One of the results that were reported is committed."""
        self._unsettled -= 1
        if self._unsettled == 0 and self._calm is not None:
            self._calm.set()

    def _withdraw(self) -> None:
        """Give back the message whose envelope went ahead; the peer never gets its body."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.moves += 1
            self._pool.worker.call(self._pool.withdrawn, self, ahead)

    def _rouse(self) -> None:
        if self._idle:
            self._stream.rouse()

    # The task

    async def run(self, hosts: Sequence[Host], doubtful: Collection[str] = ()) -> None:
        """Connect to the first of `hosts` that lets us in and send what the pool gives.

        The addresses in `doubtful` are of hosts that were out of step.
        """
        self._doubtful = doubtful
        report = None
        try:
            with self._life:
                report = await self._try_hosts(hosts)
                await self._wait_settled()
        except Exception:
            # A defect of ours costs a message one attempt, and not the engine its life.
            log.exception("the connection to %s failed", self.route.name)
            if self._job is not None:
                self._finish(self._job, responses.OWN_FAULT, reusable=False)
            report = Report(responses.OWN_FAULT)
        finally:
            self._over = True
            self._withdraw()
            job, self._job = self._job, None
            self._pool.worker.call(self._pool.closed, self, job, report)

    async def _try_hosts(self, hosts: Sequence[Host]) -> Report | None:
        """Serve on the first host that lets us in; a report says that none did.

        Of several reports the one counts that says most. What this host cannot reach is none of
        the `MAX_HOSTS`, so an address behind it has its turn.
        """
        best: Report | None = None
        tried = 0
        for host in hosts:
            report = await self._session(host)
            if report is None:
                return None
            if best is None or responses.outweighs(report.outcome, best.outcome):
                best = report
            if report.outcome.state == "bind":
                break  # it would be the same for all others
            self._pool.worker.call(self._pool.host_failed, host)
            tried += not report.outcome.own_fault
            if tried == MAX_HOSTS:
                break
        return best

    async def _session(self, host: Host) -> Report | None:
        where = host.address if host.name == host.address else f"{host.name} [{host.address}]"
        stream = None
        try:
            with trio.move_on_after(self._pool.config.connect_timeout):
                stream = await Stream.connect(host.address, self.route.port, local_ip=self.local_ip)
        except CannotBind as error:
            assert self.local_ip is not None, "else nothing is bound"
            self._pool.worker.call(self._pool.cannot_bind, self.local_ip, error)
            return Report(responses.cannot_bind(error, self.local_ip), self.local_ip)
        except OSError as error:
            return Report(responses.connect_failed(error, where))
        if stream is None:
            return Report(responses.connect_timed_out(where))
        self._stream = stream
        self._protocol = ClientProtocol(
            self._pool.config.hostname, careful=host.address in self._doubtful
        )
        self._messages = 0
        try:
            self._local, self.remote = stream.local[0], host.address
            return await self._talk()
        finally:
            stream.close()
            if self._protocol.out_of_step:
                self._pool.worker.call(self._pool.out_of_step, self)

    async def _talk(self) -> Report | None:
        """The whole session; a report says that it was not let in."""
        ready = False
        event: Event | None = None
        with trio.CancelScope() as self._scope:
            event = await self._exchange()
            if isinstance(event, Ready):
                ready = True
                self._pool.worker.call(self._pool.opened, self)
                await self._serve()
        if self._scope.cancelled_caught:
            event = self._protocol.abort(Problem.TIMEOUT, "no reply in time")
            if self._job is not None:
                self._finish(self._job, _outcome(event), reusable=False)
        return None if ready else self._report(_outcome(event))

    async def _serve(self) -> None:
        """Send jobs until there are no more, or the session is of no more use."""
        self._plugin = self.worker.context.connection(
            self._stream.fileno(), on_output=self._output_came, incoming=False
        )
        try:
            while job := self._job or await self._wait_for_job():
                begun = self._begun
                self._timeout = self._pool.config.smtp_out_timeout
                outcome = await self._deliver(job)
                if outcome is None:
                    self._job = None
                    if begun:
                        self._pool.worker.call(self._pool.withdrawn, self, job)
                    else:
                        self._pool.worker.call(self._pool.returned, job)
                    break
                self._messages += 1
                ahead = None if self._protocol.ended else self._ahead
                self._finish(job, outcome, reusable=ahead is None and self._may_go_on())
                if ahead is not None:
                    self._job, self._ahead, self._over = ahead, None, False
                if self._over:
                    break
                job = ahead = None  # an idle connection holds no mail
            self._over = True
            if self._protocol.reusable:
                self._protocol.quit()
                with trio.move_on_after(QUIT_SECONDS):
                    await self._exchange()
        finally:
            with trio.CancelScope(shield=True):
                await self._plugin.close()

    def _may_go_on(self) -> bool:
        limit = self._pool.config.connection_maxmessages
        if self._leaving or 0 < limit <= self._messages:
            return False
        return self._protocol.reusable and self._protocol.next_event() is NEED_DATA

    def _finish(self, job: Job, outcome: Outcome, *, reusable: bool) -> None:
        """Report what came of the job in hand. The pool may put the next one there at once."""
        self._job = None
        self._over = not reusable
        self._unsettled += 1
        self._pool.worker.call(self._pool.finished, self, job, self._report(outcome), reusable)

    def _report(self, outcome: Outcome) -> Report:
        messages = self._messages or None
        return Report(outcome, self._local, self.remote, self._protocol.mta, messages)

    async def _wait_for_job(self) -> Job | None:
        """Be idle. None: the time is up, the pool says so, or the peer has something to say."""
        if not self._leaving:
            self._expect(max(self._pool.config.connection_maxidle / 1000, MIN_IDLE_SECONDS))
            self._idle = True
            try:
                # An event may bring no data, and a job or `leave` come before its turn does.
                while not (self._job or self._leaving) and await self._stream.wait_for_input():
                    if (data := self._stream.receive_nowait()) is not None:
                        self._protocol.receive_data(data)
                        break
            except StreamLost as error:
                self._protocol.abort(Problem.LOST, str(error))
            finally:
                self._idle = False
        if self._job is None:
            self._over = True
            self._protocol.next_event()
            self._pool.worker.call(self._pool.leaving, self)
        return self._job

    async def _wait_settled(self) -> None:
        if self._unsettled:
            self._calm = trio.Event()
            self._deadline = math.inf
            await self._calm.wait()
            self._calm = None

    # One message

    async def _deliver(self, job: Job) -> Outcome | None:
        """Send one message; None: not here, the peer had left or lost its step before."""
        protocol = self._protocol
        replies = protocol.replies
        event = protocol.next_event()
        if event is NEED_DATA:
            if not self._begun:
                self._converted = None
                body = job.message.body
                if body is not None and job.is_ascii is None:
                    short = len(body) <= LOOK_BYTES
                    job.is_ascii = body.isascii() if short else await self._is_ascii(body)
                if body is not None and self._must_convert(job, body, job.is_ascii is True):
                    self._converted = await self._convert(body)
                    if self._converted is None:
                        return responses.NOT_CONVERTIBLE
                self._begin(job)
            event = await self._exchange()
        if isinstance(event, SendBody):
            await self._wait_settled()
            return await self._send_message(job)
        self._begun = False
        self._release()
        if isinstance(event, Failed):
            left = protocol.replies == replies or protocol.out_of_step
        else:
            left = isinstance(event, Refused) and event.reply.code == 421
        if left and not protocol.reusable and self._messages and job.moves < MAX_MOVES:
            job.moves += 1
            return None
        return _outcome(event)

    def _begin(self, job: Job) -> bool:
        """Have the envelope sent; false when that cannot be done ahead."""
        stored, properties = job.message.body, job.message.properties
        body = stored if self._converted is None else self._converted
        return self._protocol.mail(
            job.envelope,
            job.recipient,
            size=None if body is None else len(body),
            eight_bit=stored is not None and self._converted is None and not job.is_ascii,
            utf8=properties.get("smtputf8") is True and not has_ascii_header(stored or b""),
            dsn=properties.get("dsn"),
        )

    async def _is_ascii(self, body: bytes) -> bool:
        """Whether a body is ASCII; a thread reads a long one."""
        if len(body) <= LOOK_BYTES:
            return body.isascii()
        self._deadline = math.inf
        return await trio.to_thread.run_sync(is_ascii, body)

    def _must_convert(self, job: Job, body: bytes, ascii: bool) -> bool:
        """Whether the peer cannot take a body as it is, but could take it in ASCII.

        The header of mail that asks for SMTPUTF8 is not for us to change (RFC 6531, section 3.4).
        """
        return not (
            "8BITMIME" in self._protocol.extensions
            or ascii
            or (job.message.properties.get("smtputf8") is True and not has_ascii_header(body))
        )

    async def _convert(self, body: bytes) -> bytes | Converted | None:
        """A body in ASCII; None where that cannot be.

        A long body is encoded block by block while it is sent. If a plugin may read the body, the
        converted mail is in memory beside the stored one instead.
        """
        if len(body) <= CONVERT_BYTES:
            return to_seven_bit(body)
        self._deadline = math.inf  # it is not the peer who takes time
        shown = self._plugin.listens("out_data") or self._plugin.listens("out_sent")
        return await trio.to_thread.run_sync(
            to_seven_bit if shown else convert,
            body,
            limiter=_converters(),
            abandon_on_cancel=True,
        )

    def _go_ahead(self, body: bytes | Converted) -> None:
        """Put the next envelope behind the body in hand, where that is of use."""
        if (
            self._prompt
            and len(body) <= AHEAD_BYTES
            and not self._held
            and self._protocol.may_go_ahead
            and self.worker is self._pool.worker
            and (job := self._pool.next_job(self)) is not None
        ):
            self._ahead = job
            self._converted = None
            ahead = job.message.body
            if ahead is not None and job.is_ascii is None:
                if len(ahead) > LOOK_BYTES:
                    return
                job.is_ascii = ahead.isascii()
            convert = ahead and self._must_convert(job, ahead, job.is_ascii is True)
            self._begun = not convert and self._begin(job)

    async def _send_message(self, job: Job) -> Outcome:
        """Answer 354 with the body, or, when there is none to send, not at all.

        What plugins do to the body holds for this attempt; what they do to the JSON stays.
        """
        protocol, plugin, stored = self._protocol, self._plugin, job.message
        converted, self._converted = self._converted, None
        body = converted if isinstance(converted, bytes) else stored.body
        message = Message(dict(stored.properties), body)
        try:
            self._deadline = math.inf
            refusal = await plugin.out_data(message, stored)
            await self._send_output()
            if refusal is not None:
                protocol.abort(Problem.LOST, "a plugin stopped the message")
                return responses.rejected_by_plugin(Reply(refusal.code, refusal.text))
            if message.body is None:
                protocol.abort(Problem.LOST, "there is no body")
                return responses.NO_DATA
            sent: bytes | Converted = message.body
            if message.body is body:
                sent = converted or message.body
            elif self._must_convert(job, message.body, await self._is_ascii(message.body)):
                changed = await self._convert(message.body)
                if changed is None:
                    protocol.abort(Problem.LOST, "the body cannot be converted")
                    return responses.NOT_CONVERTIBLE
                sent = changed
                message.body = changed if isinstance(changed, bytes) else message.body
            if (early := self._stream.receive_nowait()) is not None:
                # What comes before the dot is no answer to it.
                protocol.receive_data(early)
            told = plugin.listens("out_sent")
            limit = self._pool.config.connection_maxmessages
            last = self._leaving or 0 < limit <= self._messages + 1
            # Nothing that a plugin sends may come behind QUIT.
            protocol.send_body(sent, last=last and not (told or self._held))
            self._begun = False
            if protocol.step is Step.MESSAGE:
                if not (last or told):  # what a plugin sends may not come behind an envelope
                    self._go_ahead(sent)
                await self._send_due()
                if told:
                    await self._stream.drain()  # the event says that it has left
                    self._deadline = math.inf
                    await plugin.out_sent(message, stored)
                    await self._send_output()
        except StreamLost as error:
            return _outcome(await self._last_words(error))
        self._asked = monotonic()
        event = await self._exchange(FINAL_REPLY * self._timeout)
        self._prompt = monotonic() - self._asked < PROMPT_SECONDS
        self._asked = math.inf
        return _outcome(event)

    # Bytes

    async def _exchange(self, timeout: float | None = None) -> Event:
        """Send what is due, and read until something has happened.

        Each reply may take `timeout` seconds, by default `smtp-out-timeout`.
        """
        protocol = self._protocol
        seconds = timeout or self._timeout
        replies = -1
        try:
            while (event := protocol.next_event()) is NEED_DATA:
                await self._send_due()
                if replies != protocol.replies:
                    if replies >= 0:
                        # More replies are on their way, and often here after the next turn.
                        await trio.lowlevel.checkpoint()
                    replies = protocol.replies
                    self._expect(seconds)
                protocol.receive_data(await self._stream.receive())
        except StreamLost as error:
            return await self._last_words(error)
        return event

    async def _send_due(self) -> None:
        self._sending = True
        sent = 0
        while data := self._protocol.data_to_send():
            self._expect(self._timeout)
            await self._stream.send_all(data)
            sent += len(data)
            data = b""  # before the next block is made
            if sent >= BLOCK_BYTES:
                sent = 0
                await trio.lowlevel.checkpoint()  # a fast peer's mail is not alone
                if (early := self._stream.receive_nowait()) is not None:
                    self._protocol.receive_data(early)  # no answer to the dot, which is still due
        self._sending = False
        self._release()

    def _output_came(self) -> None:
        """A plugin sent something outside of an event: it goes out now, or behind a whole mail."""
        self._held += self._plugin.take_output()
        self._release()

    def _release(self) -> None:
        """Send what was held, unless a peer would take it for a part of a mail."""
        if self._held and not (self._sending or self._begun):
            held, self._held = self._held, b""
            self._stream.send_nowait(held)

    async def _send_output(self) -> None:
        if output := self._plugin.take_output():
            self._expect(self._timeout)
            await self._stream.send_all(output)

    async def _last_words(self, error: StreamLost) -> Event:
        """The connection broke; a peer that refuses and closes may have said why before."""
        protocol = self._protocol
        step = protocol.step
        try:
            protocol.receive_data(await self._stream.receive())
            event = protocol.next_event()
        except StreamLost:
            event = NEED_DATA
        if event is NEED_DATA:
            event = protocol.abort(Problem.LOST, str(error))
        if isinstance(event, Accepted) and step is not Step.MESSAGE:
            return event  # It came before, and the proof was due.
        if not isinstance(event, Refused | Failed):
            # Even a 250: it cannot be the answer to what did not get through.
            protocol.abort(Problem.LOST, str(error))
            event = Failed(step, Problem.LOST, str(error))
        return event

    def _expect(self, seconds: float) -> None:
        """Something has to happen within `seconds`."""
        self._deadline = monotonic() + seconds


_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("converters")


def _converters() -> trio.CapacityLimiter:
    """What bounds the conversions of this loop."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(CONVERTERS)
        _limiter.set(limiter)
        return limiter


def _outcome(event: Event | None) -> Outcome:
    if isinstance(event, Accepted):
        return responses.accepted(event)
    if isinstance(event, Refused):
        return responses.refused(event)
    assert isinstance(event, Failed), f"{event} ends nothing"
    return responses.failed(event)
