"""A flow: the mail that goes to one site from one local address, and the sessions that send it.

Theory of operation
-------------------
A flow keeps a small window of its mail in memory (`jobs`). The rest stays in the queue, under the
destinations in `ready`. Sessions pull: each takes the next job after settling the last one, and is
idle when there is none. Below half of the window the flow is refilled. The window follows what the
sessions use.

A connection costs more than a message, so not every waiting message gets one: `sessions_for` has
the curve. Further connections hide the latency of the network. Where there is none, and many such
flows keep the machine busy, a flow has one. If the first job still waits for `STALL_SECONDS`, the
sessions are slow, and one more is opened, and so on, unless other flows wait for a connection. Idle
sessions stay open for more mail. The session used last is used first, so that the others can time
out. To a near peer that pipelines, busy sessions take further messages along, each in one round
trip; an idle one gets a message if more sessions suit the mail, or after `SPARE_SECONDS`.

While other flows wait for a connection, a session without mail ends, and any session after its
share of messages or of time. If mail of its flow waits in the queue, a session stays until its last
result is committed, which makes room in memory.

Until a session is let in, the flow does not know whether its hosts answer. So a flow begins with
one connection, and may double them after each that is let in: 1, 2, 4.

When the last session that could open has failed, the flow goes down. The first job gets the
failure as its result, the others go back to the queue unchanged, and a pause takes the flow's place
(`mailerq.outbound.flows`). Each failure doubles the pause. A flow that comes back from a pause has
one message, and is *down* until a session is let in.

A flow has one time at which it looks again (`look`); all other events are reported to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Final

from mailerq.outbound.choice import BUSY
from mailerq.outbound.jobs import Job, Report
from mailerq.outbound.rights import Rights
from mailerq.outbound.session import Session
from mailerq.rules import responses
from mailerq.rules.security import LEVEL_DEMANDS, NOTHING, Demands
from mailerq.rules.shaping import HOURS, Bound
from mailerq.wire.login import Login

if TYPE_CHECKING:
    from mailerq.config import Config
    from mailerq.net.client_tls import ClientTls
    from mailerq.net.resolver import Host
    from mailerq.net.stream import Stream
    from mailerq.outbound.dispatcher import Dispatcher
    from mailerq.outbound.intake import Destination
    from mailerq.outbound.limits import Refusal
    from mailerq.outbound.pause import Pause
    from mailerq.outbound.policies import Policies
    from mailerq.outbound.sites import Site
    from mailerq.rules.responses import Outcome

__all__ = ["FIRST_WINDOW", "LEAST_WINDOW", "MAX_ASK_SECONDS", "MAX_WINDOW", "Flow", "sessions_for"]

HOLD_SECONDS: Final = 5.0
"""Open no further connection for this long after one failed while others work: the peer may want
no more."""

FAIR_MESSAGES: Final = 100
FAIR_SECONDS: Final = 5.0
"""A session ends after this number of messages, or this time, if another flow waits for a slot. The
time keeps slow peers from holding the slots of other flows."""

STALL_SECONDS: Final = 1.0
"""A flow does not keep up when its first job has waited this long: open one more connection."""

NEAR_SECONDS: Final = 0.005
"""A peer with a shorter round trip is near."""

SPARE_SECONDS: Final = 0.02
"""Longest wait of a message to a near peer for a busy session while other sessions are idle. An
idle session needs twice the system calls for the message."""

ASK_SECONDS: Final = 30.0
MAX_ASK_SECONDS: Final = 600.0
"""Longest pause before one message asks again whether a site that was down answers."""

LEAST_WINDOW: Final = 8
"""Messages of one flow in memory, at least, unless `rabbitmq-qos` is very small: enough for
envelopes to go ahead."""

FIRST_WINDOW: Final = 32
MAX_WINDOW: Final = 500
"""Most messages of one flow that are taken from the queue ahead."""

DIRECT_WINDOWS: Final = 4
"""A flow may keep up while it holds fewer windows of mail than this, or less mail than it has sent
since its last refill."""


class Flow:
    """The mail to one site from one local address, over connections that prove `demands`."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        site: Site,
        local_ip: str | None,
        demands: Demands = NOTHING,
    ) -> None:
        self.site = site
        self.site_key = site.key
        self.local_ip = local_ip
        self.demands = demands
        self.login: Login | None = demands.login
        # Lists and dicts, because there are many flows: an empty deque takes ten times a list.
        self.jobs: list[Job] = []
        self.destinations: dict[Destination, None] = {}
        self.ready: dict[Destination, None] = {}
        """Destinations with due mail in the queue."""
        self.held = 0
        """Messages given to the flow and not settled yet."""
        self.reported = 0
        """Of these, the messages with a result that is not committed yet."""
        self.window = min(FIRST_WINDOW, dispatcher.max_window)
        self.sent = self.window // 2
        """Messages since the last refill. A new flow starts as if it had used its window."""
        self.refilling = False
        self.sessions: dict[Session, None] = {}
        self.opening: dict[Session, None] = {}
        self.idle: list[Session] = []
        self.last: Report | str | None = None
        """The last result of a message or of a connection, or its words."""
        self.ended_messages = 0
        """Messages of the sessions that have ended."""
        self.proven = False
        """A session has been let in since the flow was last down."""
        self.is_near = False
        """The round trip to the last host that let a session in is short."""
        self.takes_along = False
        """The last host that let a session in is near and pipelines."""
        self.reserved = False
        """The flow may try its site, and has no connection yet; kept by `Openings`."""
        self.patient = False
        """The hosts have not answered quickly."""
        self.down = False
        """The flow asks with one message, and takes no other; or a pause is in its place."""
        self.paused = 0
        """The operator's row for which the flow ends: a pause takes its place."""
        self.when = math.inf
        """When to look again, on the monotonic clock; kept by `Times`."""
        self.history = dispatcher.history
        self._dispatcher = dispatcher
        self._openings = dispatcher.openings
        self._allowed = 1  # connections allowed until more are let in
        self._failures = 0  # consecutive times that the flow went down
        self._held_until = 0.0
        self._ahead = True
        self._wanted: Demands | None = None
        self._wanted_number = -1  # of the limits at that time
        self.rights = Rights(dispatcher.limits, site, local_ip)

    @property
    def config(self) -> Config:
        """The settings in force now."""
        return self._dispatcher.config

    @property
    def takes_mail(self) -> bool:
        """Whether mail may come into memory."""
        return not (self.down or self.rights.rest)

    @property
    def keeps_up(self) -> bool:
        """Whether hosts take mail as it comes: no limit slows it, and no message waits long."""
        if not (self.proven and self.sessions) or self.rights.are_paced:
            return False
        jobs = self.jobs
        return not jobs or (
            len(jobs) < max(DIRECT_WINDOWS * self.window, self.sent)
            and monotonic() < jobs[0].since + STALL_SECONDS
        )

    @property
    def is_crowded(self) -> bool:
        """Whether more connections are open than the changed settings allow."""
        most = self.rights.allowance.most
        return 0 < most < len(self.sessions) or self._openings.slots.are_exceeded

    @property
    def held_until(self) -> float:
        """No further connection is opened before this time: the last one failed."""
        return self._held_until

    # Mail in

    def link(self, destination: Destination) -> None:
        """Mail of a destination goes to this flow."""
        self.destinations[destination] = None
        if destination.waits:
            self.ready[destination] = None

    def unlink(self, destination: Destination) -> None:
        """Undo `link`."""
        self.destinations.pop(destination, None)
        self.ready.pop(destination, None)

    def add(self, job: Job) -> None:
        """Send a message as soon as possible."""
        job.flow = self
        job.since = monotonic()
        self.held += 1
        jobs = self.jobs
        place = len(jobs)
        if job.priority:  # most mail has none
            while place and jobs[place - 1].priority < job.priority:
                place -= 1
        jobs.insert(place, job)
        self.pump()

    def mail_waits(self, destination: Destination) -> None:
        """Mail of a destination is due in the queue."""
        self.ready[destination] = None
        if not self.down:
            self.pump()

    def nothing_waits(self, destination: Destination) -> None:
        """A destination has no due mail in the queue."""
        self.ready.pop(destination, None)

    def next_window(self) -> int:
        """The window for the next refill: twice the messages sent since the last one, or more."""
        used = max(2 * self.sent, LEAST_WINDOW)
        self.window = min(used, self._dispatcher.max_window)
        self.sent = 0
        return self.window

    # What sessions call

    def next_job(self, session: Session) -> Job | None:
        """The next job for a session. None: no job now; the session is woken when there is one."""
        self._busy(session)
        openings = self._openings
        if session.leaving or self._dispatcher.stopping:
            return None
        rights = self.rights
        contended = self.is_contended(session)
        if self._should_end(session, contended):
            session.leave()
            return None
        may_send = not self.jobs or rights.may_send(self, session, self.jobs[0])
        job = self._pop() if may_send else None
        if not may_send and rights.waits_to_send:
            self._dispatcher.flows.hand_over(self)
        if self.rights.rest:
            self._put_back()
        if job is None:
            if (contended and not self.gets_mail) or not rights.may_idle(session):
                session.leave()
                return None
            if not session.waits_for:
                self.idle.append(session)
            if not self.gets_mail:
                openings.idle(session)
        elif self.jobs and rights.are_paced:
            self.pump()
        return job

    @property
    def gets_mail(self) -> bool:
        """Whether more mail comes from the queue at once, or after the commit of results."""
        return self.refilling or (bool(self.reported) and bool(self.ready) and self.takes_mail)

    def committed(self) -> None:
        """A result is committed: a session without mail gets some, or gives way.

        A flow without a session, and now without mail in memory, gets some to wait for a slot with.
        """
        self.reported -= 1
        if self.ready and not self.jobs and (self.idle or not self.sessions):
            self.pump()

    def is_contended(self, session: Session) -> bool:
        """Whether others wait for what a session holds."""
        return self._openings.are_wanted or self.rights.contended(session)

    def _should_end(self, session: Session, contended: bool, under_way: int = 0) -> bool:
        """Whether a session should end although there may be mail."""
        messages = session.messages + under_way
        if contended and messages:
            if messages >= FAIR_MESSAGES or monotonic() - session.since > FAIR_SECONDS:
                return True
        return self.is_crowded or self.rights.are_over(session) or not session.is_covered()

    def job_ahead(self, session: Session) -> Job | None:
        """A job to begin before the current one is settled, unless another session will take it."""
        others = len(self.opening) + (0 if self._spares_idle else len(self.idle))
        if (
            not self._ahead
            or len(self.jobs) <= others
            or not self._dispatcher.is_here(self.jobs[0])
            or self._dispatcher.stopping
            or self._should_end(session, self.is_contended(session), under_way=1)
            or self.history.was_out_of_step(session.remote)
            or not self.rights.may_go_ahead(session, self.jobs[0])
        ):
            return None
        job = self._pop()
        if job is not None:
            self._dispatcher.ahead_jobs += 1
            if not job.is_ready:
                self._dispatcher.make_now(job)
        return job

    def _pop(self) -> Job | None:
        job = None
        while self.jobs:
            job = self.jobs.pop(0)
            self.sent += 1
            if not self._dispatcher.has_expired(job):
                break
            job = None
        if self.ready:
            self._dispatcher.refill(self)
        return job

    async def load(self, job: Job) -> Outcome | None:
        """Fetch or make a body; return the outcome if that fails."""
        return await self._dispatcher.load(job)

    def settle(self, session: Session, job: Job, report: Report) -> None:
        """Settle an attempt; the session is told when the result is safe."""
        self.last = report
        self._dispatcher.settle(job, report, session)

    def heard(self, outcome: Outcome, session: Session | None = None) -> None:
        """A peer has refused something that is not the result of a message."""
        refusals = self._dispatcher.limits.refusals
        if refusals is not None:
            refusals.heard(self, outcome, session, session.messages if session is not None else 0)

    def has_other_ip(self, job: Job) -> bool:
        """Whether a message may leave from another address that no peer has refused it for."""
        able = self._dispatcher.flows.choice.able(job, self.site)
        return any(ip != self.local_ip and ip not in job.plan.refused for ip in able)

    def leave_host(self, address: str, seconds: float) -> None:
        """A host is busy: for some seconds the mail goes to the others, where there are any."""
        self.history.leave(address, seconds)
        for flow in self.site.flows.values():
            if flow.has_other_host():
                for session in flow.sessions:
                    if session in flow.opening:
                        session.shuns = address
                    elif session.remote == address:
                        session.leave()

    def has_other_host(self) -> bool:
        """Whether some host seems to be neither busy nor down."""
        return any(not self.history.is_doubtful(host.address) for host in self.hosts())

    def may_pass_on(self, job: Job, session: Session) -> bool:
        """Whether another host may get a message at once that this one is too busy for."""
        attempt = f"{job.lease.id}.{job.attempt}"
        return self.has_other_host() and self.history.passes_on(session.remote, attempt)

    @property
    def beside(self) -> Iterable[Flow]:
        """All flows of this delivery that can send."""
        return self._dispatcher.flows.live

    def give_back(self, job: Job, *, ahead: bool = False) -> None:
        """Take back an untried job: the peer had gone, or was slow after an envelope `ahead`."""
        if ahead:
            self._ahead = False
        if self._dispatcher.stopping or self.paused:
            self._dispatcher.put_back(job)
        else:
            self._dispatcher.body_waits(job)
            self.jobs.insert(0, job)
            self.pump()

    def opened(self, session: Session, *, pipelines: bool) -> None:
        """A host let a session in."""
        dispatcher = self._dispatcher
        dispatcher.opened_sessions += 1
        self.history.let_in(session.remote, self.local_ip)
        self.opening.pop(session, None)
        self.rights.opened(session)
        self.proven = True
        self.is_near = session.round_trip < NEAR_SECONDS
        self.takes_along = self.is_near and pipelines
        self.down = bool(self.paused)
        self._failures = 0
        self._allowed = min(2 * self._allowed, 1 << 20)
        self._end_try(session)
        self.patient = False
        if session.shuns == session.remote:
            session.leave()
        # The session itself takes the first job.
        self.pump(beside=1)

    def ended(self, session: Session, report: Report | None) -> None:
        """A session has ended; `report` says why no host let the session in."""
        self._busy(session)
        self.sessions.pop(session, None)
        self.ended_messages += session.messages
        was_opening = session in self.opening
        self.opening.pop(session, None)
        self._end_try(session)
        self._dispatcher.session_over(session)
        self.rights.ended(session)
        if was_opening and not self._dispatcher.stopping:
            if session.was_put_off:
                self._wait_for_try()
            elif session.refusal is not None:
                self._wait_for_limit(session.refusal)
            else:
                self._not_let_in(report or Report(responses.OWN_FAULT))
        self.pump()

    def _busy(self, session: Session) -> None:
        if session in self.idle:
            self.idle.remove(session)
        self._openings.busy(session)
        self.rights.busy(session)

    def _end_try(self, session: Session) -> None:
        if session.is_try:
            session.is_try = False
            self._openings.end_try(self, patient=session.patient)

    # Connections

    def resume(self) -> None:
        """A slot that the flow waited for may be available."""
        self.pump()

    def look(self) -> None:
        """The time to look has come."""
        self.pump()

    def limit_over(self, key: str) -> None:
        """A limit that the flow waits for may allow more."""
        self.rights.limit_over(key)
        if (closed := self.rights.closed()) is not None:
            self.rights.leave(self)
            self._wait_for_limit(closed)
            self._put_back()
            return
        if key.startswith(HOURS):
            # Connections grow anew, so mail that has waited for its hours is no wave.
            self.proven = bool(self.sessions)
            self._allowed = len(self.sessions) + 1
        self.pump()

    def pump(self, beside: int = 0) -> None:
        """Wake idle sessions for waiting mail, open more if useful, and refill.

        `beside` counts jobs that are about to be taken.
        """
        if self._dispatcher.stopping:
            return
        if self.paused:
            if not self.sessions:
                self._dispatcher.flows.rest(self)
            return
        waiting = len(self.jobs) - beside
        if waiting > 0:
            if self.rights.are_paced:
                # Each session that may send wakes the next.
                waiting = 0 if self.rights.waits_to_send else 1
            elif self.idle and self._spares_idle:
                waiting = self._worth_waking(waiting)
            for session in self.idle[-waiting:] if waiting else ():
                self._openings.busy(session)
                session.wake()
            while self._wants_session(beside) and self._open():
                pass
        if self.ready and not self.down:
            self._dispatcher.refill(self)
        if not self.jobs:
            if self.idle and not self.gets_mail:
                for session in list(self.idle):
                    if self.is_contended(session):
                        session.leave()
                    else:
                        self._openings.idle(session)
            if self.reserved:
                self._openings.forget(self)
            if not (self.sessions or self.ready or self.refilling):
                self._dispatcher.flows.forget(self)

    @property
    def _spares_idle(self) -> bool:
        """Whether a message may wait for a busy session while others are idle."""
        return self.takes_along and self._ahead and not self.rights.are_paced

    def _worth_waking(self, waiting: int) -> int:
        """How many idle sessions to wake for this number of waiting messages."""
        busy = len(self.sessions) - len(self.opening) - len(self.idle)
        suiting = self._suiting(waiting + busy) - busy
        if suiting >= waiting:
            return waiting
        spared_until = self.jobs[0].since + SPARE_SECONDS
        if monotonic() >= spared_until:
            return waiting
        self._dispatcher.flows.look_at(self, spared_until)
        return max(suiting, 0)

    def _wants_session(self, beside: int) -> bool:
        waiting = len(self.jobs) - beside
        there = len(self.idle) + len(self.opening)
        if waiting <= there:
            return False
        count = len(self.sessions)
        rights = self.rights
        if count >= self._allowed or rights.waits_to_open or 0 < rights.allowance.most <= count:
            return False
        if rights.are_paced and (self.idle or rights.waits_to_send):
            return False
        if rights.limited and not rights.has_free_host():
            return False
        now = monotonic()
        if now < self._held_until:
            self._dispatcher.flows.look_at(self, self._held_until)
            return False
        if count < self._suiting(len(self.jobs) + count - there):
            return True
        if count and self._openings.contended:
            return False
        stalled = self.jobs[beside].since + STALL_SECONDS
        if now < stalled:
            self._dispatcher.flows.look_at(self, stalled)
        return now >= stalled and not self.opening

    def _suiting(self, messages: int) -> int:
        """How many sessions suit this number of messages, waiting and under way."""
        if messages > 1 and self.is_near and self._dispatcher.flows.many_send_nearby():
            return 1
        return sessions_for(messages)

    @property
    def sends_nearby(self) -> bool:
        """Whether mail is under way to a near peer, and more waits in memory."""
        busy = len(self.sessions) - len(self.opening) - len(self.idle)
        return self.is_near and busy > 0 and bool(self.jobs)

    def _open(self) -> bool:
        """Open one more connection, or wait for the right to open one."""
        dispatcher = self._dispatcher
        if (report := self._cannot_try()) is not None:
            self._not_let_in(report)
            return False
        openings, rights = self._openings, self.rights
        if (refusal := rights.may_open()) is not None:
            self._wait_for_limit(refusal)
            return False
        if not self.proven and not openings.reserve_try(self):
            self._wait_for_try()
            return False
        if not openings.take(self):
            if not self.sessions:
                self._wait_for_slot()
            return False
        if (refusal := rights.take(self)) is not None:
            openings.release()
            self._wait_for_limit(refusal)
            return False
        session = Session(self, dispatcher.worker)
        rights.give_to(session)
        session.is_try = openings.use_try(self)
        session.patient = self.patient
        self.sessions[session] = None
        self.opening[session] = None
        dispatcher.start_session(session)
        return True

    def _wait_for_slot(self) -> None:
        """Wait for a slot with one message in memory, or without if others wait for a message.

        If an idle connection ends for it, the slot comes soon, and the flow keeps its messages.
        """
        if self._openings.gets_slot(self):
            return
        if self.proven and self._dispatcher.flows.some_are_bare:
            self._openings.forget(self)
            self._put_back()
        else:
            self._put_back(keep=1)

    def _wait_for_limit(self, refusal: Refusal) -> None:
        """Wait for the right to open a connection, with one message in memory and no try."""
        if self.reserved:
            self._openings.forget(self)
        if refusal.want.name == HOURS:
            self.down = False  # at the opening the flow takes its mail from the queue
        self.rights.wait_to_open(self, refusal)
        if not self.sessions:
            self._dispatcher.flows.hand_over(self)
            self._put_back(keep=0 if self.rights.rest and not self.down else 1)

    def _cannot_try(self) -> Report | None:
        """Report why there is no host to connect to; None if there is one."""
        site = self.site
        if site.outcome is not None:
            return Report(site.outcome)
        if self.local_ip is not None and not site.fits(self.local_ip):
            return Report(responses.no_fitting_address(site.name, self.local_ip), self.local_ip)
        return None

    def hosts(self) -> list[Host]:
        """The hosts for a session to try, best first."""
        hosts = self.site.in_order(self.local_ip, self.history)
        return self._dispatcher.stops.unpaused(hosts, self.local_ip)

    @property
    def limits_number(self) -> int:
        """Changes whenever limits or other settings do."""
        return self._dispatcher.limits.number

    @property
    def tls(self) -> ClientTls:
        """The contexts for TLS handshakes."""
        return self._dispatcher.tls

    @property
    def policies(self) -> Policies:
        """What looks up policies of TLS, and is told what came of them."""
        return self._dispatcher.policies

    @property
    def secure(self) -> Bound:
        """The `Level` of TLS that the operator wants for the site, and the place that says so."""
        return self._dispatcher.limits.secure(self.config, self.site, self.local_ip)

    @property
    def wanted(self) -> Demands:
        """What connections must prove, whatever their host, by the settings in force now."""
        number = self.limits_number
        if self._wanted is None or number != self._wanted_number:
            level = LEVEL_DEMANDS[int(self.secure.value)]
            self._wanted = level | self.demands | self.site.policy.demands
            self._wanted_number = number
        return self._wanted

    def policy_domain(self) -> str:
        """The domain whose policy a connection serves, for reports."""
        sts = self.site.policy.sts
        if sts is not None:
            return sts.domain
        return self.jobs[0].plan.domain if self.jobs else self.site.label

    def name_of(self, stream: Stream) -> str | None:
        """The name to give in EHLO, by the local address of a connection; None: `hostname`."""
        local = self._dispatcher.limits.shaping.local_ips
        return local.name_of(stream.local[0]) if local.names else None

    def _not_let_in(self, report: Report) -> None:
        """No host accepted one more connection."""
        self.last = report
        if self.sessions:
            self.heard(report.outcome)
            if report.outcome.state == "bind":
                # Nobody answers the sessions of an address that this host has lost.
                self._dispatcher.flows.hand_over(self, BUSY)
            self._held_until = monotonic() + HOLD_SECONDS
            self._allowed = len(self.sessions) + 1
            return
        self._failures += 1
        seconds = min(ASK_SECONDS * 2 ** min(self._failures - 1, 10), MAX_ASK_SECONDS)
        flows = self._dispatcher.flows
        flows.look_at(self.go_down(), monotonic() + seconds)
        first = True
        while self.jobs:
            job = self.jobs.pop(0)
            if flows.place_elsewhere(job):
                continue
            if first:
                first = False
                self._dispatcher.settle(job, report, None)
            else:
                self._dispatcher.put_back(job)
        if report.outcome.own_fault and report.outcome.state != "bind":
            self._dispatcher.say_own_fault(self.site.label, report.outcome)

    def overdue(self, session: Session) -> None:
        """A session that is a try has had no answer yet."""
        self._openings.overdue(session)

    def put_off(self, session: Session) -> None:
        """A session has had no answer yet, and other flows wait to try."""
        self.patient = session.was_put_off = True
        session.cut()

    def _wait_for_try(self) -> None:
        """Wait, without mail in memory, for the right to try the site."""
        pause = self.go_down()
        self._put_back()
        pause.resume()

    def _put_back(self, keep: int = 0) -> None:
        """Return waiting mail to the queue unchanged."""
        jobs = self.jobs[keep:]
        del self.jobs[keep:]
        for job in jobs:
            self._dispatcher.put_back(job)

    def go_down(self) -> Pause:
        """Go down: from here on a pause stands for this flow."""
        self.down = True
        return self._dispatcher.flows.pause(self, failures=self._failures, ahead=self._ahead)

    def end(self, row: int) -> None:
        """End for the operator's row: finish what is under way, and put back what waits."""
        self.paused = row
        self.down = True
        self.rights.leave(self)
        self._openings.forget(self)
        self._put_back()
        for session in list(self.sessions):
            if session in self.opening:
                del self.opening[session]  # its end is no failure
                session.cut()
            else:
                session.leave()
        self.pump()

    def go_on(self) -> None:
        """The row that ended this flow is over, and some sessions have not ended yet."""
        self.paused = 0
        self.down = False
        self._allowed = len(self.sessions) + 1
        self.pump()

    def take_out(self, condition: Callable[[Job], bool]) -> None:
        """Put back the waiting messages that meet a condition."""
        if not self.jobs:
            return
        out = {job: None for job in self.jobs if condition(job)}
        if out:
            self.jobs[:] = [job for job in self.jobs if job not in out]
            for job in out:
                self._dispatcher.put_back(job)
            self.pump()

    def resume_from(self, pause: Pause) -> None:
        """Take the place of a pause, with the right to try if the pause has it."""
        self.down = not pause.is_new
        self.reserved, pause.reserved = pause.reserved, False
        self.patient, self._ahead, self._failures = pause.patient, pause.ahead, pause.failures
        self.last = pause.said
        self.destinations = dict.fromkeys(pause.destinations)
        self.ready = dict.fromkeys(pause.ready())
        if self._failures:
            self.sent = 0  # the window begins small

    def end_holds(self) -> None:
        """Open connections now instead of waiting."""
        self._held_until = 0.0
        self._dispatcher.flows.look_at(self, 0.0)


def sessions_for(messages: int, most: int = 32) -> int:
    """How many sessions suit this number of messages, waiting and under way.

    >>> [sessions_for(messages) for messages in (0, 1, 2, 4, 10, 20, 100, 500)]
    [0, 1, 1, 2, 4, 7, 22, 32]
    """
    return math.ceil(most * (1 - math.exp(-0.0115 * messages)))
