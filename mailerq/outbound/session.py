"""One connection to a host that takes mail: from connecting to QUIT, message after message.

Theory of operation
-------------------
A session is one task on the home worker. It belongs to a `Flow`, and pulls its mail from there:
`next_job` when it can send one, `settle` with what came of it. It first goes through the hosts of
the flow until one lets it in; only then does it take a job. One body is under way at a time.
Without a job it is idle, and waits for `wake` or for what the peer does.

The envelope of the next message may go ahead, in one write with a short body: where one waits that
no other session could take now, and the peer pipelines and has answered the body before without
delay. A message then costs one round trip. It is bound to this session from then on, but goes
back to the flow when that ends before its turn, or when the reply to the body takes its time.
What plugins send outside of an event meanwhile is held until the next dot, or it would be a part
of that mail.

A peer may close, or refuse with 421, before it has answered anything of a mail. Where it took mail
on this connection before, that costs the message nothing: it goes back to the flow.

A peer may answer out of step; `mailerq.wire.client` states when a reply counts, and has an
envelope, RSET or QUIT follow each body as proof. The message in doubt is tried again; where its
body was not sent, at once on another connection. The host is remembered for a while: it is sent
nothing behind a body, and new connections to it end with each mail.
A body that is only in the queue is loaded when its turn comes, and what its text rules out is found
then. A peer without 8BITMIME gets a body in ASCII (`mailerq.mail.seven_bit`). Each session that the
message is given to finds the encodings and the size once, in a thread if the body is long. The
blocks of a long body are encoded while they are sent.

Results are committed in groups by somebody else. A session sends the next envelope
meanwhile, but not the next body before it has heard that its last result is safe
(`settled`). So if the process dies, at most one message for each session is sent twice.

The deadline is a plain number, moved forward for each complete reply and each piece of a
body, so that a peer that drips bytes gains nothing by it. The dispatcher has it checked
every now and then (`check`): a deadline of trio's own would cost more than it tells.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final

import trio

from mailerq.mail.seven_bit import Converted, convert, to_seven_bit
from mailerq.message import Message
from mailerq.net.resolver import Host
from mailerq.net.stream import CannotBind, Stream, StreamLost
from mailerq.outbound.jobs import Job, Report
from mailerq.outbound.openings import QUICK_SECONDS
from mailerq.rules import responses
from mailerq.rules.responses import Outcome
from mailerq.rules.routes import has_ascii_header
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
    from mailerq.outbound.flow import Flow
    from mailerq.plugins import Connection as PluginConnection

__all__ = ["Session"]

log = logging.getLogger("mailerq.delivery")

MAX_HOSTS: Final = 8
"""Hosts that one connection tries before it gives up; RFC 5321 asks for two."""


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
"""Then such a message goes back to the flow, and the session ends with the reply."""

LOOK_BYTES: Final = 1 << 20
"""Above this size a thread checks whether a body is ASCII."""

CONVERT_BYTES: Final = 1 << 14
"""Bytes of a body that are converted at once; more of it takes its time in a thread."""

CONVERTERS: Final = 2
"""Such bodies at a time."""

QUIT_SECONDS: Final = 2.0
"""How long the reply to QUIT is waited for; it decides nothing."""


class Session:
    """A session of a flow; `run` is its task. All methods are for the home worker's thread."""

    def __init__(self, flow: Flow, worker: Worker) -> None:
        self.flow = flow
        self.worker = worker
        self.remote = ""
        self.messages = 0
        """Messages that the connection has taken."""
        self.leaving = False
        """It takes no more jobs."""
        self.is_try = False
        """It keeps one of the tries of `Openings`, a patient one if it is `patient`."""
        self.patient = False
        self.was_put_off = False
        """It ends without a result: others have their turn to try."""
        self._started = monotonic()
        self._timeout = flow.config.smtp_out_timeout
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
        self._unsettled = 0
        self._calm: trio.Event | None = None
        self._protocol: ClientProtocol
        self._stream: Stream
        self._plugin: PluginConnection
        self._local = ""
        self._converted: bytes | Converted | None = None

    # Told by the flow

    @property
    def _config(self) -> Config:
        return self.flow.config

    def wake(self) -> None:
        """There may be a job for it."""
        if self._idle:
            self._stream.rouse()

    def leave(self) -> None:
        """End after the message under way."""
        self.leaving = True
        self.wake()

    def cut(self) -> None:
        """End now."""
        self._life.cancel()

    def check(self) -> None:
        """End what has taken too long: the wait for a reply, or for a job."""
        now = monotonic()
        if self.is_try and not self.patient and now - self._started > QUICK_SECONDS:
            self.flow.overdue(self)
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
            self.flow.give_back(ahead, ahead=True)

    # The task

    async def run(self) -> None:
        """Connect to the first of the flow's hosts that lets us in and send what the flow has."""
        report = None
        try:
            with self._life:
                report = await self._try_hosts(self.flow.hosts())
                await self._wait_settled()
        except Exception:
            # A defect of ours costs a message one attempt, and not the engine its life.
            log.exception("the connection to %s failed", self.flow.site.label)
            if self._job is not None:
                self._finish(self._job, responses.OWN_FAULT)
            report = Report(responses.OWN_FAULT)
        finally:
            self.leaving = True
            self._withdraw()
            job, self._job = self._job, None
            if job is not None:
                self.flow.give_back(job)
            self.flow.ended(self, report)

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
            self.flow.memory.kept_out(host.address)
            tried += not report.outcome.own_fault
            if tried == MAX_HOSTS:
                break
        return best

    async def _session(self, host: Host) -> Report | None:
        where = host.address if host.name == host.address else f"{host.name} [{host.address}]"
        local_ip, memory = self.flow.local_ip, self.flow.memory
        stream = None
        try:
            with trio.move_on_after(self._config.connect_timeout):
                stream = await Stream.connect(host.address, self.flow.site.port, local_ip=local_ip)
        except CannotBind as error:
            assert local_ip is not None, "else nothing is bound"
            memory.cannot_bind(local_ip, error)
            return Report(responses.cannot_bind(error, local_ip), local_ip)
        except OSError as error:
            return Report(responses.connect_failed(error, where))
        if stream is None:
            return Report(responses.connect_timed_out(where))
        self._stream = stream
        self._protocol = ClientProtocol(
            self._config.hostname, careful=memory.was_out_of_step(host.address)
        )
        self.messages = 0
        try:
            self._local, self.remote = stream.local[0], host.address
            return await self._talk()
        finally:
            stream.close()
            if self._protocol.out_of_step:
                memory.out_of_step(host.address, self.flow.site.label)

    async def _talk(self) -> Report | None:
        """The whole session; a report says that it was not let in."""
        ready = False
        event: Event | None = None
        with trio.CancelScope() as self._scope:
            event = await self._exchange()
            if isinstance(event, Ready):
                ready = True
                self.flow.opened(self)
                await self._serve()
        if self._scope.cancelled_caught:
            event = self._protocol.abort(Problem.TIMEOUT, "no reply in time")
            if self._job is not None:
                self._finish(self._job, _outcome(event))
        return None if ready else self._report(_outcome(event))

    async def _serve(self) -> None:
        """Send jobs until there are no more, or the session is of no more use."""
        self._plugin = self.worker.context.connection(
            self._stream.fileno(), on_output=self._output_came, incoming=False
        )
        try:
            while job := self._job or await self._next_job():
                self._job = job
                begun = self._begun
                self._timeout = self._config.smtp_out_timeout
                outcome = await self._deliver(job)
                if outcome is None:
                    self._job = None
                    self.flow.give_back(job, ahead=begun)
                    break
                self.messages += 1
                self._finish(job, outcome)
                if self._ahead is not None and not self._protocol.ended:
                    self._job, self._ahead = self._ahead, None
                elif not self._may_go_on():
                    break
                job = None  # an idle session holds no mail
            self.leaving = True
            if self._protocol.reusable:
                self._protocol.quit()
                with trio.move_on_after(QUIT_SECONDS):
                    await self._exchange()
        finally:
            with trio.CancelScope(shield=True):
                await self._plugin.close()

    def _may_go_on(self) -> bool:
        limit = self._config.connection_maxmessages
        if self.leaving or 0 < limit <= self.messages:
            return False
        return self._protocol.reusable and self._protocol.next_event() is NEED_DATA

    def _finish(self, job: Job, outcome: Outcome) -> None:
        """Report what came of the job in hand."""
        self._job = None
        self._unsettled += 1
        self.flow.settle(self, job, self._report(outcome))

    def _report(self, outcome: Outcome) -> Report:
        messages = self.messages or None
        return Report(outcome, self._local, self.remote, self._protocol.mta, messages)

    async def _next_job(self) -> Job | None:
        """Take the next job, or be idle until there is one.

        None: the time is up, the flow says so, or the peer has something to say.
        """
        self._expect(self._config.connection_maxidle / 1000)
        try:
            while (job := self.flow.next_job(self)) is None and not self.leaving:
                self._idle = True
                # It may end without data, and not by `wake` alone.
                if await self._stream.wait_for_input():
                    if (data := self._stream.receive_nowait()) is not None:
                        self._protocol.receive_data(data)
                        break
        except StreamLost as error:
            self._protocol.abort(Problem.LOST, str(error))
        finally:
            self._idle = False
        if job is None:
            self.leaving = True
            self._protocol.next_event()
        return job

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
                if not job.lease.loaded:
                    self._deadline = math.inf  # it is not the peer who takes time
                    if (problem := await self.flow.load(job)) is not None:
                        return problem
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
        if left and not protocol.reusable and self.messages:
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
            and (job := self.flow.job_ahead(self)) is not None
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
            limit = self._config.connection_maxmessages
            last = self.leaving or 0 < limit <= self.messages + 1
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
