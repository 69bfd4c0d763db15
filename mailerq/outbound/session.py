"""One connection to a host that takes mail: from connect to QUIT, message after message.

Theory of operation
-------------------
A session is one task on the home worker. It belongs to a `Flow` and pulls mail from there:
`next_job` when the session can send, `settle` with the result. A session tries the flow's hosts
until one lets it in, and only then takes a job. One body is under way at a time. Without a job the
session is idle, and waits for `wake` or for the peer.

The envelope of the next message may go ahead, right behind a body that is not long. Conditions: a
message waits that no other session will take, and the peer pipelines and answered the last
body promptly. A message then costs one round trip. From then on the message belongs to this
session. It goes back to the flow if the session ends first, or if the reply to the body is slow.
Plugin output outside an event waits for the next dot: else it would become part of that mail.

`mailerq.outbound.securing` has the TLS of a connection, and `mailerq.outbound.patience` the time
that a peer has for each step.

A peer may close, or refuse with 421, before any reply to a mail. If the peer took mail on this
connection before, the message is not charged an attempt: it goes back to the flow.

A peer may answer out of step. `mailerq.wire.client` states when a reply counts, and has each body
followed by an envelope, RSET or QUIT as proof. The message in doubt is tried again, and at once on
another connection if its body was not sent. The host is remembered for a while: nothing is sent
behind a body, and new connections to the host end after each mail.

A body that is only in the queue is loaded when its turn comes, and its text is checked then. A peer
that takes binary mail (RFC 3030) gets a mail that says `binarymime` byte for byte. A peer
without 8BITMIME gets an ASCII body (`mailerq.mail.seven_bit`). Signatures come last
(`mailerq.outbound.signing`). Each session given the message
determines the encodings and the size once, in a thread if the body is long. Blocks of a long body
are encoded while they are sent.

Another task commits results in batches. Meanwhile a session sends the next envelope, but not the
next body until its last result is safe (`settled`). So if the process dies, each session sends at
most one message twice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final

import trio

from mailerq.mail.headers import has_ascii_header
from mailerq.mail.seven_bit import Converted
from mailerq.message import Message
from mailerq.net.resolver import Host
from mailerq.net.stream import LONG_BYTES, Stream, StreamLost
from mailerq.outbound import traced
from mailerq.outbound.encodings import (
    LOOK_BYTES,
    finished_body,
    is_ascii_body,
    is_binary_body,
    must_convert,
    to_ascii,
)
from mailerq.outbound.jobs import Job, Report
from mailerq.outbound.limits import Allowance
from mailerq.outbound.openings import QUICK_SECONDS
from mailerq.outbound.patience import (
    BLOCK_MINUTES,
    FINAL_MINUTES,
    QUIT_SECONDS,
    REPLY_MINUTES,
    WITHDRAW_SECONDS,
    TooLate,
    patience,
)
from mailerq.outbound.race import reach
from mailerq.outbound.securing import Securing
from mailerq.plugins import NOTHING
from mailerq.rules import responses
from mailerq.rules.responses import Outcome
from mailerq.wire import smtp
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
    StartTls,
    Step,
)
from mailerq.wire.framing import BLOCK_BYTES, InBlocks
from mailerq.wire.smtp import Reply

if TYPE_CHECKING:
    from mailerq.config import Config
    from mailerq.net.worker import Worker
    from mailerq.outbound.flow import Flow
    from mailerq.outbound.limits import Refusal
    from mailerq.plugins import Connection as PluginConnection

__all__ = ["Session"]

log = logging.getLogger("mailerq.delivery")

MAX_HOSTS: Final = 8
"""Hosts that one connection tries before giving up; RFC 5321 asks for two."""

AHEAD_BYTES: Final = 1 << 16
"""A longer body takes no envelope along: its transfer may take long, while another connection may
become free."""

PROMPT_SECONDS: Final = 0.1
"""A peer slower than this for the last body gets no envelope ahead: the next message would wait for
the reply, while another connection may become free."""

UNLIMITED: Final = Allowance(-1, (), {})

CLEAR: Final = Report(responses.OWN_FAULT)
"""TLS has failed: the next connection to the host goes in clear."""


class Session:
    """A session of a flow; `run` is its task. Call all methods on the home worker's thread."""

    def __init__(self, flow: Flow, worker: Worker) -> None:
        self.flow = flow
        self.worker = worker
        self.remote = ""
        self.messages = 0
        """Messages taken by the peer on this connection."""
        self.body_bytes = 0
        """Bytes of the bodies sent on this connection."""
        self.leaving = False
        """The session takes no more jobs."""
        self.is_try = False
        """The session holds a try of `Openings`, a patient one if `patient` is set."""
        self.patient = False
        self.allowance = UNLIMITED
        """The limits of the remote address."""
        self.waits_for = ""
        """The key of the limit of the remote address that the session waits for."""
        self.counts: tuple[str, ...] = ()
        self.starting: tuple[str, ...] = ()
        self.idle_counts: tuple[str, ...] = ()
        """What the session has taken of limits; kept by the flow."""
        self.limits_number = -1
        """The limits at the time at which the connection was opened."""
        self.borrowed = False
        """The connection is beyond this process's part of a limit."""
        self.refusal: Refusal | None = None
        """The limit for which no host could be tried."""
        self.was_put_off = False
        """The session ends without a result: other flows take their turn to try."""
        self.shuns = ""
        """The host that has become busy since the session was begun."""
        self.since = self._started = monotonic()
        self._timeout = flow.config.smtp_out_timeout
        self._deadline = math.inf
        self._life = trio.CancelScope()
        self._scope: trio.CancelScope | None = None  # of a TLS handshake
        self._connecting = False
        self._idle = False
        self._sending = False
        self._domains: set[str] = set()  # of recipients, if the peer limits them
        self._held = b""  # plugin output that must not come in between
        self._job: Job | None = None
        self._ahead: Job | None = None
        self._begun = False  # an envelope went ahead, and its body has not followed yet
        self._prompt = False
        self._asked = math.inf  # when the last body was sent
        self._unsettled = 0
        self._waiting: trio.lowlevel.Task | None = None  # for `settled`
        self._protocol: ClientProtocol
        self._stream: Stream
        self._plugin: PluginConnection
        self._local = ""
        self._converted: bytes | Converted | None = None
        self._body: bytes | InBlocks | None = None  # waits for `settled`
        self._securing: Securing
        self._clear: set[str] = set()  # hosts with which TLS has failed

    # Told by the flow

    @property
    def round_trip(self) -> float:
        """Seconds of a round trip to the peer, without the peer's own time."""
        return self._stream.round_trip

    @property
    def _config(self) -> Config:
        return self.flow.config

    def wake(self) -> None:
        """A job may be available."""
        if self._idle:
            self._stream.wake()

    def limit_over(self, key: str) -> None:
        """The limit of the remote address may allow a message."""
        self.wake()

    def leave(self) -> None:
        """End after the current message."""
        self.leaving = True
        self.wake()

    def cut(self) -> None:
        """End now."""
        self._life.cancel()

    def check(self, late: float) -> None:
        """End a wait for a reply or a job that has timed out.

        `late` is the delay of this check in seconds, while this process stood still. The peer does
        not lose this time: the reply may have come, and nobody has read it.
        """
        now = monotonic()
        self._deadline += late
        if self.is_try and not self.patient:
            self._started = min(self._started + late, now)
            if now - self._started > QUICK_SECONDS:
                self.flow.overdue(self)
        if now - self._asked > WITHDRAW_SECONDS:
            self._withdraw()
        if now < self._deadline:
            return
        if self._idle:
            self.leave()
        elif self._connecting or not self._is_patient(now):
            # A scope of trio for each connection would cost more than all that is sent there.
            if self._scope is not None:
                self._scope.cancel()
            else:
                self._stream.interrupt(TooLate())  # or a later check, if nobody waits there now

    def _is_patient(self, now: float) -> bool:
        """Whether to wait beyond the deadline: the step takes time, and nobody else waits."""
        if self.flow.is_contended(self):
            return False
        minutes = BLOCK_MINUTES if self._sending else REPLY_MINUTES.get(self._protocol.step, 1)
        return now < self._deadline + patience(self._timeout, minutes) - self._timeout

    def is_covered(self) -> bool:
        """Whether the connection has proved what the settings in force now demand of it."""
        return self._securing.still_covers(self.flow.limits_number)

    def trace(self) -> bool:
        """Let the traces of the worker see the session; False: not now, ask again."""
        return traced.join(self)

    def settled(self) -> None:
        """A reported result is committed."""
        self._unsettled -= 1
        if self._unsettled == 0 and self._waiting is not None:
            task, self._waiting = self._waiting, None
            trio.lowlevel.reschedule(task)
        elif self._unsettled == 0 and self._body is not None and not self._life.cancel_called:
            self._send_waiting_body(self._body)

    def _send_waiting_body(self, body: bytes | InBlocks) -> None:
        self._body = None
        try:
            self._put_body(body, told=False)
            while data := self._protocol.data_to_send():
                self._stream.write(data)
            self._asked = monotonic()
            self._expect(self._seconds)
            self._release()
        except Exception:
            # Our own defect costs this session, and not the commits of others.
            log.exception("the connection to %s failed", self.flow.site.label)
            self.cut()

    def _withdraw(self) -> None:
        """Give back the message sent ahead; the peer never gets its body."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self.flow.give_back(ahead, ahead=True)

    # The task

    async def run(self) -> None:
        """Connect to the first host that lets us in, and send the flow's mail."""
        report = None
        try:
            with self._life:
                report = await self._try_hosts(self.flow.hosts())
                await self._wait_settled()
        except Exception:
            # Our own defect costs a message one attempt, and does not end the engine.
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

        Of several reports the most informative counts. Hosts that this host cannot reach do not
        count towards `MAX_HOSTS`, so addresses behind them get their turn. Hosts whose limits
        allow no connection now are passed over.
        """
        best: Report | None = None
        tried = 0
        left = list(hosts)
        while left:
            host = left.pop(0)
            refusal = self.flow.rights.take_host(self, host)
            if refusal is not None:
                if self.refusal is None or refusal.until < self.refusal.until:
                    self.refusal = refusal
                continue
            report = await self._session(host, left)
            if report is CLEAR:
                self.flow.rights.give_back_host(self)
                continue
            if self.worker.traces and report is not None and report.remote_ip is None:
                traced.not_connected(self, host, report)
            self.flow.rights.give_back_host(self)
            if report is None:
                self.refusal = None
                return None
            if best is None or responses.outweighs(report.outcome, best.outcome):
                best = report
            if report.outcome.state == "bind":
                break  # all other hosts would give the same answer
            if report.outcome.type != "tls":  # other mail may find the host good enough
                self.flow.history.kept_out(self.remote or host.address)
            tried += not report.outcome.own_fault
            if tried == MAX_HOSTS:
                break
        return best

    async def _session(self, host: Host, others: list[Host]) -> Report | None:
        """Connect and serve; one of the `others` may have its turn together with `host`.

        `CLEAR`: TLS has failed, and the host, now the first of the `others`, gets mail in clear.
        """
        flow, history = self.flow, self.flow.history
        self.remote = ""
        self._timeout = self._config.smtp_out_timeout
        securing = await Securing.prepare(flow, host, clear=host.address in self._clear)
        if isinstance(securing, Report):
            return securing
        stream, reached = await reach(self, host, others)
        if isinstance(stream, Report):
            return stream
        if reached is not host:
            host, clear = reached, reached.address in self._clear
            securing = await Securing.prepare(flow, host, clear=clear)
            if isinstance(securing, Report):
                stream.close()
                return securing
        self._stream, self._securing = stream, securing
        self._protocol = ClientProtocol(
            flow.name_of(stream) or self._config.hostname,
            careful=history.was_out_of_step(host.address),
            login=flow.login,
            lmtp=flow.site.lmtp,
            tls=securing.tries,
            must_tls=securing.demands.encrypts,
        )
        self.messages = self.body_bytes = 0
        self._domains.clear()
        try:
            self._local, self.remote = stream.local[0], host.address
            if self.worker.traces:
                traced.join(self)
            report = await self._talk()
        finally:
            if self._protocol.secure:
                securing.keep_ticket(stream)
            stream.close()
            if self._protocol.out_of_step:
                history.out_of_step(host.address, flow.site.label)
        if report is CLEAR:
            self._clear.add(host.address)
            history.tls_broke(host.address, self._config.connection_tls_retry)
            others.insert(0, host)
        return report

    async def _talk(self) -> Report | None:
        """Run the whole session; a report says that the session was not let in."""
        ready = False
        event: Event | None = None
        securing, failure = self._securing, None
        try:
            event = await self._exchange()
            if isinstance(event, StartTls):
                event = await self._start_tls()
            if isinstance(event, Ready):
                failure = securing.judge(self._protocol, self._stream)
                if failure is not None:
                    await self._quit()
            if isinstance(event, Ready) and failure is None:
                ready = True
                securing.show(self._stream)
                if self.flow.login is not None:
                    self.flow.history.logged_in(self.remote, self.flow.login)
                self.flow.opened(self, pipelines="PIPELINING" in self._protocol.extensions)
                await self._serve()
        except TooLate:
            event = self._protocol.abort(Problem.TIMEOUT, "no reply in time")
            if self._job is not None:
                self._finish(self._job, responses.ending(event))
        if ready:
            return None
        if failure is None:
            failure = securing.ended(event, self._stream, self._protocol.mta or "")
        if failure is not None:
            return CLEAR if securing.goes_clear else self._report(securing.outcome(failure))
        report = self._report(responses.ending(event))
        flow, login = self.flow, self.flow.login
        if login is not None and isinstance(event, Refused):
            if event.step.startswith("auth") or event.reply is smtp.NO_MECHANISM:
                flow.history.login_refused(flow.site.label, self.remote, login, report.outcome)
        return report

    async def _start_tls(self) -> Event:
        """Do the TLS handshake within the time of one reply, and begin anew inside TLS."""
        self._expect(self._timeout)
        protocol, securing = self._protocol, self._securing
        try:
            # A handshake waits for more than the peer.
            with trio.CancelScope() as self._scope:
                await securing.handshake(self._stream, helo=protocol.mta or "")
            if self._scope.cancelled_caught:
                raise TooLate
        except StreamLost as error:
            return protocol.abort(Problem.LOST, str(error))
        finally:
            self._scope = None
        if securing.failure is not None:
            return protocol.abort(Problem.INVALID, securing.failure.text)
        protocol.secured()
        return await self._exchange()

    async def _quit(self) -> None:
        if self._protocol.reusable:
            self._protocol.quit()
            self._timeout = QUIT_SECONDS
            await self._exchange()

    async def _serve(self) -> None:
        """Send jobs until none are left, or until the session can no longer be used."""
        self._plugin = self.worker.context.connection(
            self._stream.fileno(),
            secure=self._protocol.secure,
            on_output=self._output_came,
            incoming=False,
        )
        try:
            while job := self._job or await self._next_job():
                self._job = job
                if self._protocol.max_domains and not self._takes_domain(job.plan.domain):
                    self._job, self.leaving = None, True
                    self.flow.give_back(job)
                    break
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
            await self._quit()
        finally:
            if (closing := self._plugin.close()) is not NOTHING:
                with trio.CancelScope(shield=True):
                    await closing

    def _may_go_on(self) -> bool:
        if self.leaving or self._is_used_up(self.messages, self.body_bytes):
            return False
        return self._protocol.reusable and self._protocol.next_event() is NEED_DATA

    def _is_used_up(self, messages: int, size: int) -> bool:
        """Whether the connection has reached a limit of one connection, ours or the peer's."""
        allowance = self.flow.rights.allowance
        return (
            0 < allowance.connection_messages <= messages
            or 0 < allowance.connection_bytes <= size
            or 0 < self._protocol.max_mails <= messages
        )

    def _takes_domain(self, domain: str) -> bool:
        """Whether the peer takes one more recipient in that domain on this connection."""
        self._domains.add(domain.lower())
        return len(self._domains) <= self._protocol.max_domains

    def _finish(self, job: Job, outcome: Outcome) -> None:
        """Report the result of the current job."""
        self._job = None
        self._unsettled += 1
        if outcome.code is None and outcome.type in ("lost", "timeout"):
            self.flow.history.broke_off(self.remote)
        self.flow.settle(self, job, self._report(outcome))

    def _report(self, outcome: Outcome) -> Report:
        protocol, messages = self._protocol, self.messages or None
        local_ip = self._local or None
        tls = self._securing.words(self._stream)
        return Report(
            outcome, local_ip, self.remote, protocol.mta, messages, protocol.mechanism, tls,
            self.flow.site.lmtp, "DSN" in protocol.extensions,
        )  # fmt: skip

    async def _next_job(self) -> Job | None:
        """Take the next job, or be idle until there is one.

        None: the session timed out, the flow ends it, or the peer has sent something.
        """
        self._expect(self.flow.rights.allowance.connection_idle)
        try:
            while (job := self.flow.next_job(self)) is None and not self.leaving:
                self._idle = True
                # The wait may end without data, and not by `wake` alone.
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
            self._deadline = math.inf
            self._waiting = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._wait_no_more)

    def _wait_no_more(self, _: object) -> trio.lowlevel.Abort:
        self._waiting = None
        return trio.lowlevel.Abort.SUCCEEDED

    # One message

    async def _deliver(self, job: Job) -> Outcome | None:
        """Send one message; None if the peer had left or fallen out of step before."""
        protocol = self._protocol
        replies = protocol.replies
        event = protocol.next_event()
        if event is NEED_DATA:
            if not self._begun:
                if not job.is_ready:
                    self._deadline = math.inf  # the delay is not the peer's
                    if (problem := await self.flow.load(job)) is not None:
                        return problem
                self._converted = None
                body = job.body
                if body is not None and len(body) > LOOK_BYTES:
                    self._deadline = math.inf
                if body is not None and job.is_ascii is None:
                    short = len(body) <= LOOK_BYTES
                    job.is_ascii = body.isascii() if short else await is_ascii_body(body)
                binary = job.message.properties.get("binarymime") is True
                if binary and body is not None and not protocol.takes_binary:
                    if await is_binary_body(body):
                        return responses.NO_BINARY
                if body is not None and must_convert(job, body, job.is_ascii is True, protocol):
                    self._deadline = math.inf
                    whole = self._plugin.listens("out_data") or self._plugin.listens("out_sent")
                    self._converted = await to_ascii(body, whole=whole)
                    if self._converted is None:
                        return responses.NOT_CONVERTIBLE
                self._begin(job)
            event = await self._exchange()
        if isinstance(event, SendBody):
            return await self._send_message(job)
        self._begun = False
        self._release()
        if isinstance(event, Failed):
            left = protocol.replies == replies or protocol.out_of_step
        else:
            left = isinstance(event, Refused) and event.reply.code == 421
        if left and not protocol.reusable and self.messages:
            if isinstance(event, Refused):
                self.flow.heard(responses.ending(event), self)
            return None
        return responses.ending(event)

    def _begin(self, job: Job) -> bool:
        """Send the envelope; False if it cannot be sent ahead."""
        stored, properties = job.body, job.message.properties
        body = stored if self._converted is None else self._converted
        return self._protocol.mail(
            job.envelope,
            job.recipient,
            size=None if body is None else len(body) + job.added,
            eight_bit=stored is not None and self._converted is None and not job.is_ascii,
            binary=properties.get("binarymime") is True,
            utf8=properties.get("smtputf8") is True and not has_ascii_header(stored or b""),
            require_tls=self._securing.asks_for_tls(properties, self._protocol),
            dsn=properties.get("dsn"),
        )

    def _go_ahead(self, body: bytes | InBlocks) -> None:
        """Put the next envelope behind the current body, if useful."""
        if (
            self._prompt
            and len(body) <= AHEAD_BYTES
            and not self._held
            and self._protocol.may_go_ahead
            and not self._protocol.max_domains
            and (job := self.flow.job_ahead(self)) is not None
        ):
            self._ahead = job
            self._converted = None
            if not job.is_ready:
                return  # its turn comes without an envelope ahead
            if job.message.properties.get("binarymime") is True:
                return
            ahead = job.body
            if ahead is not None and job.is_ascii is None:
                if len(ahead) > LOOK_BYTES:
                    return
                job.is_ascii = ahead.isascii()
            convert = ahead and must_convert(job, ahead, job.is_ascii is True, self._protocol)
            self._begun = not convert and self._begin(job)

    async def _send_message(self, job: Job) -> Outcome:
        """Answer 354 with the body, or send nothing if there is no body.

        A plugin's changes to the body hold for this attempt; its changes to the JSON stay.
        """
        protocol, plugin, stored = self._protocol, self._plugin, job.message
        converted, self._converted = self._converted, None
        body = converted if isinstance(converted, bytes) else job.body
        message = Message(dict(stored.properties), body)
        try:
            self._deadline = math.inf
            refusal = await plugin.out_data(message, stored)
            await self._send_output()
            if refusal is not None:
                protocol.abort(Problem.LOST, "a plugin stopped the message")
                return responses.rejected_by_plugin(Reply(refusal.code, refusal.text))
            self._deadline = math.inf
            told = plugin.listens("out_sent")
            facts = told or plugin.listens("out_data"), self._stream.tap
            sent = await finished_body(job, message, converted, protocol, *facts)
            if isinstance(sent, Outcome):
                protocol.abort(Problem.LOST, "there is no body to send")
                return sent
            if self._unsettled and len(sent) < LONG_BYTES and not told:
                # `settled` sends the body, and this task sleeps until there is a reply.
                self._body = sent
            else:
                await self._wait_settled()
                if (early := self._stream.receive_known()) is not None:
                    # Input before the dot is no answer to the dot.
                    protocol.receive_data(early)
                self._put_body(sent, told=told)
                if protocol.step is Step.MESSAGE:
                    await self._send_due()
                    if told:
                        await self._stream.drain()  # the event says that the body has left
                        self._deadline = math.inf
                        await plugin.out_sent(message, stored)
                        await self._send_output()
                self._asked = monotonic()
        except StreamLost as error:
            return responses.ending(await self._last_words(error))
        try:
            event = await self._exchange(patience(self._timeout, FINAL_MINUTES))
        finally:
            self._body = None
        self._prompt = monotonic() - self._asked < PROMPT_SECONDS
        self._asked = math.inf
        return responses.ending(event)

    def _put_body(self, body: bytes | InBlocks, *, told: bool) -> None:
        """Put a body into the output, and the next envelope behind it, if useful."""
        self.body_bytes += len(body)
        last = self.leaving or self._is_used_up(self.messages + 1, self.body_bytes)
        # Plugin output must not come behind QUIT.
        self._protocol.send_body(body, last=last and not (told or self._held))
        self._begun = False
        if self._protocol.step is Step.MESSAGE and not (last or told):
            self._go_ahead(body)  # plugin output must not come behind an envelope

    # Bytes

    async def _exchange(self, timeout: float | None = None) -> Event:
        """Send what is due, and read until there is an event.

        Each reply may take `timeout` seconds, by default `smtp-out-timeout`.
        """
        protocol = self._protocol
        self._event: Event = NEED_DATA
        self._seconds = timeout or self._timeout
        try:
            if (event := protocol.next_event()) is NEED_DATA:
                await self._send_due()
                self._replies = protocol.replies
                if self._body is None:
                    self._expect(self._seconds)
                await self._stream.receive_each(self._heard)
                event = self._event
        except StreamLost as error:
            return await self._last_words(error)
        return event

    def _heard(self, data: bytes) -> bool:
        """Take input, and answer with commands; return whether there is an event."""
        protocol = self._protocol
        protocol.receive_data(data)
        if (event := protocol.next_event()) is not NEED_DATA:
            self._event = event
            self._body = None  # the peer has left, or answers what it has not got
            return True
        if self._replies != protocol.replies:
            self._replies = protocol.replies
            self._expect(self._seconds)
        while command := protocol.data_to_send():
            self._stream.write(command)
        return False

    async def _send_due(self) -> None:
        self._sending = True
        sent = 0
        while data := self._protocol.data_to_send():
            self._expect(self._timeout)
            self._stream.write(data)
            sent += len(data)
            data = b""  # free the block before making the next
            if self._stream.is_full:
                await self._stream.drain()
            if sent >= BLOCK_BYTES:
                sent = 0
                await trio.lowlevel.checkpoint()  # a fast peer must not starve the others
                if (early := self._stream.receive_nowait()) is not None:
                    self._protocol.receive_data(early)  # no answer to the dot, which is still due
        self._sending = False
        self._release()

    def _output_came(self) -> None:
        """A plugin sent output outside an event: send it now, or behind a whole mail."""
        self._held += self._plugin.take_output()
        self._release()

    def _release(self) -> None:
        """Send held output, unless a peer would take it for part of a mail."""
        if self._held and not (self._sending or self._begun or self._body is not None):
            held, self._held = self._held, b""
            self._stream.write(held)
            self._stream.flush()

    async def _send_output(self) -> None:
        if output := self._plugin.take_output():
            self._expect(self._timeout)
            self._stream.write(output)
            if self._stream.is_full:
                await self._stream.drain()

    async def _last_words(self, error: StreamLost) -> Event:
        """The connection broke; read the reason that a peer may have sent before closing."""
        protocol, self._body = self._protocol, None
        step = protocol.step
        self._expect(self._timeout)
        try:
            protocol.receive_data(await self._stream.receive())
            event = protocol.next_event()
        except StreamLost:
            event = NEED_DATA
        if event is NEED_DATA:
            event = protocol.abort(Problem.LOST, str(error))
        if isinstance(event, Accepted) and step is not Step.MESSAGE:
            return event  # The event came before, and the proof was due.
        if not isinstance(event, Refused | Failed):
            # Not even a 250 counts: the message did not get through.
            protocol.abort(Problem.LOST, str(error))
            event = Failed(step, Problem.LOST, str(error))
        return event

    def _expect(self, seconds: float) -> None:
        """Set the deadline `seconds` from now."""
        self._deadline = monotonic() + seconds
