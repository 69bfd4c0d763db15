"""Deliver the outbox: plan, site, flow, session, settlement.

Theory of operation
-------------------
`mailerq.rules.plan` judges each message from the queue (`mailerq.outbound.intake`). A message that
cannot be sent is finished, an early one goes back until it is due, the rest become `Job`s. The
target of a job has a site (`mailerq.outbound.sites`). The site and the local address select the
flow (`mailerq.outbound.flow`, `mailerq.outbound.flows`). The flow's sessions
(`mailerq.outbound.session`) pull jobs, and `mailerq.outbound.settlement` settles the results. Each
message taken is either settled or put back unchanged.

One task serves all times: when flows look again, and when mail becomes due. The task sleeps until
the earliest of them.

Everything here runs on the home worker, sessions included. Other workers serve clients only.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio

from mailerq.config import Config
from mailerq.errors import BodyMissing, MessageDamaged, QueueError, StorageError
from mailerq.live import Live
from mailerq.mail.made import MADE_OF, is_made
from mailerq.mail.trace import trace_field
from mailerq.message import Message, Result, format_time
from mailerq.net.client_tls import ClientTls
from mailerq.net.logs import RATION_SECONDS, LogFile, Ration
from mailerq.net.misspelt import Misspelt
from mailerq.net.resolver import NoHosts, Resolver
from mailerq.outbound.bodies import Bodies
from mailerq.outbound.flow import FIRST_WINDOW, MAX_WINDOW
from mailerq.outbound.flows import Flows
from mailerq.outbound.inliner import Inliner
from mailerq.outbound.intake import SORTERS, Destination, Intake
from mailerq.outbound.jobs import Job, Report
from mailerq.outbound.limits import Limits
from mailerq.outbound.making import form_problem, make_body, make_quickly
from mailerq.outbound.openings import Openings
from mailerq.outbound.pause import Pause
from mailerq.outbound.policies import NO_POLICIES, Policies
from mailerq.outbound.seeing import Seeing
from mailerq.outbound.session import Session
from mailerq.outbound.settlement import MIN_BACKOFF_SECONDS, Counters, Settlements
from mailerq.outbound.signer import Signer
from mailerq.outbound.signing import Signing
from mailerq.outbound.sites import HostHistory, Site, Sites
from mailerq.outbound.stops import Stops
from mailerq.queues import Lease, Queues
from mailerq.rules import responses
from mailerq.rules.plan import Hold, Park, Plan, Refuse, Send, body_problem, plan
from mailerq.rules.reporting import NO_REPORTS, Reports
from mailerq.rules.responses import Outcome
from mailerq.rules.retry import expires_at
from mailerq.rules.routes import Route

if TYPE_CHECKING:
    from mailerq.net.worker import Worker
    from mailerq.outbound.flow import Flow
    from mailerq.plugins import Plugins
    from mailerq.storage import Storage

__all__ = ["Counters", "Dispatcher"]

log = logging.getLogger("mailerq.delivery")

NO_STORAGE: Final = "property key: the mail is in a storage, and storage-address is not set"

WINDOW_SHARE: Final = 4
"""One flow's window is at most 1/`WINDOW_SHARE` of the messages in memory."""

LOOK_UP_SHARE: Final = 4
"""At most 1/`LOOK_UP_SHARE` of the messages in memory may wait for DNS."""

TICK_SECONDS: Final = 0.5
"""Interval of the check for late sessions; shorter if the timeouts are shorter."""

CLOCK_SECONDS: Final = 60.0
"""Interval of the check of the wall clock, which may be set at any time."""

CUT_SECONDS: Final = 5.0
"""Grace period for sessions that are cut: a plugin may still hold a message."""

UNKNOWN_SECONDS: Final = 5.0
"""How long a message waits while nobody knows which instance has its addresses."""

MAX_HANDOVERS: Final = 5
HANDOVER_SECONDS: Final = 60.0
"""A message that was handed over `MAX_HANDOVERS` times before an attempt waits this long."""

MAX_NAMED: Final = 20
"""Flows with waiting mail that `Dispatcher.statistics` names."""


class Dispatcher:
    """Delivers the outbox. `run` is its task; `stop` shuts down in order."""

    def __init__(
        self,
        live: Live,
        queues: Queues,
        worker: Worker,
        *,
        plugins: Plugins,
        resolver: Resolver,
        openings: Openings,
        limits: Limits,
        send_log: LogFile | None = None,
        misspelt: Misspelt | None = None,
        policies: Policies = NO_POLICIES,
        tls: ClientTls | None = None,
        signer: Signer | None = None,
        clock: Callable[[], float] = time.time,
        lot: Callable[[], float] = random.random,
        reports: Reports = NO_REPORTS,
        storage: Storage | None = None,
        handed: str = "",
    ) -> None:
        """`handed` is the queue of mail that other instances hand over, in place of the outbox."""
        self._live = live
        self._storage = storage
        self.handed = handed
        self.keeper_of: Callable[[Sequence[str]], str | None] | None = None
        """Names the queue of the instance that should send from some addresses, if not this one;
        None while that is not known."""
        self.queues = queues
        self.worker = worker
        self.openings = openings
        self.limits = limits
        self.counters = Counters()
        self.history = HostHistory()
        self.now = clock
        self.signer = Signer(live, clock) if signer is None else signer
        self.signer.chains.resolver = resolver
        qos = openings.messages = self.config.rabbitmq_qos  # fixed
        self.max_window = max(min(qos // WINDOW_SHARE, MAX_WINDOW), 1)
        self.opened_sessions = 0
        self.ahead_jobs = 0
        self.stopping = False
        self._plugins = plugins
        self._misspelt = Misspelt() if misspelt is None else misspelt
        self._sites = Sites(
            resolver,
            lambda domain: limits.shaping.group_of(domain),
            lambda domain: self.stops.apart_of(domain),
            lambda group: limits.shaping.ignores_policies(group),
            policies,
        )
        self.policies = policies
        self.tls = ClientTls.of(self.config) if tls is None else tls
        self._intake = Intake(self, qos)
        self.stops = Stops(self, self._intake, self._sites)
        self.flows = Flows(self, self._intake, self._sites)
        self.seeing = Seeing(self, self._intake, self._sites)
        self._settlements = Settlements(
            live, queues, self, send_log=send_log, clock=clock, lot=lot,
            next_id=plugins.message_id, reports=reports, tls_report_ended=policies.report_ended,
        )  # fmt: skip
        self._bodies: Bodies
        self._inliner = Inliner()
        self._sessions: dict[Session, None] = {}
        self._some_session = trio.Event()
        self._no_session = trio.Event()
        self._next_look = self._next_due = 0.0
        self._times_changed = trio.Event()
        self._looking_up: dict[Route, list[Job]] = {}
        self.looked_up = 0
        self._say_to_and_fro = Ration(log.warning, 1, "and %d times more from hand to hand")
        self._say_own_fault = Ration(log.error, 1, "and %d times more for a fault of this host")
        self._stopped = trio.Event()
        self._life = trio.CancelScope()
        self._nursery: trio.Nursery
        self._working: trio.Nursery

    @property
    def config(self) -> Config:
        """The settings in force now."""
        return self._live.current.config

    @property
    def reports(self) -> Reports:
        """The texts of reports to senders, and the keys of their return addresses."""
        reports: Reports = self._settlements.reports
        return reports

    def reload(
        self,
        send_log: LogFile | None,
        *,
        reroute: bool,
        tls: ClientTls | None = None,
        reports: Reports | None = None,
    ) -> None:
        """Apply changed settings; with `reroute` judge all waiting mail anew."""
        self.tls = ClientTls.of(self.config) if tls is None else tls
        self._settlements.send_log = send_log
        if reports is not None:
            self._settlements.reports = reports
        self._sites.forget_all()
        if reroute:
            for jobs in self._looking_up.values():
                while jobs:
                    self.looked_up -= 1
                    job = jobs.pop()
                    self.put_back(job)
                    self._intake.placed(job.lease.destination)
        self.flows.reload(reroute=reroute)
        self.openings.serve()

    def forget_policies(self, domain: str) -> None:
        """What a domain has published about TLS has changed; an empty name stands for all."""
        self._sites.forget_domains(lambda name: not domain or name == domain)

    # The start and the end

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Deliver until `stop` has finished."""
        try:
            await self._run(task_status)
        finally:
            # Whatever ended deliveries, the leases have gone back and no more results are written.
            self.stopping = True
            self._stopped.set()
            for session in list(self._sessions):
                session.cut()
            self._inliner.close()
            self._flush_log()

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        config, intake = self.config, self._intake
        queue, window = self.handed or config.rabbitmq_outbox, min(FIRST_WINDOW, self.max_window)
        taking = self.queues.subscribe(queue, intake, prefetch=config.rabbitmq_qos, window=window)
        async with taking as subscription, AsyncExitStack() as stack:
            stack.callback(self._stopped.set)  # the subscription gives back all that is left
            self._nursery = await stack.enter_async_context(trio.open_nursery())
            self._bodies = Bodies(subscription)
            self._settlements.nursery = self._nursery
            for task in self._settlements.tasks:
                self._nursery.start_soon(task)
            self._nursery.start_soon(self._sum_up)
            self._nursery.start_soon(self._watch_sessions)
            with self._life:
                async with trio.open_nursery() as self._working:
                    for _ in range(SORTERS):
                        self._working.start_soon(intake.sort)
                    self._working.start_soon(self._watch_times)
                    intake.begin(subscription)
                    task_status.started()
                    try:
                        await trio.sleep_forever()
                    finally:
                        self.stopping = True  # also when cancelled from outside
            await self._stopped.wait()
            self._nursery.cancel_scope.cancel()

    async def stop(self, timeout: float) -> None:
        """Take no more messages; give those under way at most `timeout` seconds to end."""
        self.stopping = True
        if self._stopped.is_set():
            return
        deadline = trio.current_time() + timeout
        self._life.cancel()  # also before `run`: an adoption can end while it begins
        self.flows.stop()
        for jobs in self._looking_up.values():
            for job in jobs:
                self.put_back(job)
        self._looking_up.clear()
        for session in list(self._sessions):
            if session in session.flow.opening:
                session.cut()
            else:
                session.leave()
        for seconds in (timeout, CUT_SECONDS):
            with trio.move_on_after(seconds):
                while self._sessions:
                    await self._no_session.wait()
            for session in list(self._sessions):
                session.cut()
        with trio.move_on_at(max(deadline, trio.current_time() + MIN_BACKOFF_SECONDS)):
            await self._settlements.wait_empty()
        if left := len(self._settlements):
            log.warning("%d results could not be written; those messages go out again", left)
        self._stopped.set()

    @property
    def is_over(self) -> bool:
        """Whether all leases have been returned."""
        return self._stopped.is_set()

    def statistics(self) -> dict[str, Any]:
        """Totals since the start, and the current state."""
        flows, waiting = self.flows, dict[str, int]()
        for flow in flows.live:
            waiting[flow.site.label] = waiting.get(flow.site.label, 0) + len(flow.jobs)
        longest = sorted(waiting.items(), key=lambda item: -item[1])[:MAX_NAMED]
        return {
            **{name: getattr(self.counters, name) for name in self.counters.__slots__},
            "unsettled": len(self._settlements),
            "connections": len(self._sessions),
            "opening": sum(len(flow.opening) for flow in flows.live),
            "idle": sum(len(flow.idle) for flow in flows.live),
            "opened": self.opened_sessions,
            "ahead": self.ahead_jobs,
            "destinations": len(flows.live) + len(flows.pauses),
            "waiting": sum(waiting.values()) + self.looked_up,
            **self.stops.statistics(),
            "domains": dict(longest),
        }

    @property
    def in_memory(self) -> int:
        """Messages in memory that are not settled yet."""
        leased: int = self._intake.leased
        return leased

    @property
    def connections(self) -> int:
        """Connections that are open or opening."""
        return len(self._sessions)

    async def _sum_up(self) -> None:
        """Summarise suppressed log lines once a minute."""
        while True:
            await trio.sleep(RATION_SECONDS)
            self._flush_log()

    def _flush_log(self) -> None:
        self._settlements.flush_log()
        self._intake.flush_log()
        if self.limits.refusals is not None:
            self.limits.refusals.flush_log()
        self._misspelt.flush()

    def say_own_fault(self, label: str, outcome: Outcome) -> None:
        """Log that mail waits for a fault that only the operator of this host can fix."""
        self._say_own_fault(
            "mail to %s waits for a fault of this host to end: %s", label, outcome.description
        )

    # Messages in

    @property
    def room_to_look_up(self) -> int:
        """How many more messages may wait for DNS."""
        return max(int(self.config.rabbitmq_qos) // LOOK_UP_SHARE, 1) - self.looked_up

    def admit(self, lease: Lease, wanted: Flow | None = None) -> None:
        """Send a message on its way, finish it, or put it back until it is due.

        `wanted` is the flow that the message was taken for, and may have gone down since.
        """
        if wanted is not None and wanted.down:
            self._intake.put_back(lease)
        elif (job := self.judge(lease)) is not None:
            self.send(job, wanted)

    def send(self, job: Job, wanted: Flow | None = None) -> None:
        """Place a message, after a lookup of its hosts if they are not known; see `admit`."""
        route = job.plan.route
        found = self._sites.known(route)
        if found is not None:
            self.place(job, found, wanted)
            return
        self._intake.destination(job.lease.destination).placing += 1
        self.looked_up += 1
        jobs = self._looking_up.get(route)
        if jobs is not None:
            jobs.append(job)
        else:
            self._looking_up[route] = [job]
            self.start_soon(self._find, route)

    def judge(self, lease: Lease) -> Job | None:
        """Return a job if the message goes now; else finish it or put it back, and return None."""
        self.counters.consumed += 1
        message = lease.message
        properties = message.properties
        now = self.now()
        seen = min(lease.since or now, now)
        try:
            if "seen" not in properties:
                self._misspelt.properties(properties)
            decision = self.decide(message, now, seen)
            if isinstance(decision, Hold):
                self._settlements.hold(lease, decision.until)
                return None
            if decision.domain:
                properties["domain"] = decision.domain
                properties.setdefault("seen", format_time(seen))
                if not properties.get("message-id"):
                    properties["message-id"] = self._plugins.message_id()
            if not isinstance(decision, Send):
                self.stop_message(lease, decision)
                return None
            if decision.local_ips and self._is_elsewhere(lease, decision.local_ips):
                return None
            key = self._key_of(lease) if message.body is None else ""
            if key and self._storage is None:
                fault = responses.storage_fails(NO_STORAGE, self.config.storage_reschedule)
                self.say_own_fault(decision.domain, fault)
                self._settlements.finish(lease, Report(fault), decision.expires)
                return None
            outcome = self._body_problem(message) if lease.loaded and not key else None
            if self.reports.verp_keys:
                decision = self._with_return_path(properties, decision, now)
            to_make = not MADE_OF.isdisjoint(properties) and is_made(properties)
            if outcome is None and to_make:
                outcome = form_problem(properties)
            if self._traces:
                to_make = True
            if outcome is not None:
                self._settlements.finish(lease, Report(outcome))
                return None
            job = Job(lease, message, decision, len(message.results) + 1, to_make=to_make, key=key)
            # A plugin may add keys to the document.
            signs = self.signer.is_active or "dkim" in properties
            if signs or self._plugins.listens("out_data"):
                job.signing = Signing(self.signer)
            return job
        except Exception:
            # Our own defect must not stop the mail behind this message.
            log.exception("message %d cannot be handled", lease.id)
            properties.setdefault("seen", format_time(seen))
            expires = expires_at(properties, now=seen, max_delivertime=self.config.max_delivertime)
            self._settlements.finish(lease, Report(responses.OWN_FAULT), expires)
            return None

    def _is_elsewhere(self, lease: Lease, ips: Sequence[str]) -> bool:
        """Hand a message over if another instance has its addresses; whether it is gone."""
        if self.keeper_of is None or (queue := self.keeper_of(ips)) == "":
            return False
        if queue is None:
            self._settlements.hold(lease, self.now() + UNKNOWN_SECONDS)
            return True
        properties = lease.message.properties
        attempt = len(lease.message.results) + 1
        before = properties.get("handover")
        count = 1
        if isinstance(before, dict) and before.get("attempt") == attempt:
            count += before["count"] if isinstance(before.get("count"), int) else 0
        if count > MAX_HANDOVERS:
            del properties["handover"]
            self._say_to_and_fro("mail for %s goes to and fro between instances", ", ".join(ips))
            self._settlements.hold(lease, self.now() + HANDOVER_SECONDS)
        else:
            properties["handover"] = {"attempt": attempt, "count": count}
            self._settlements.hand_over(lease, queue)
        return True

    def _with_return_path(self, properties: dict[str, Any], decision: Send, now: float) -> Send:
        envelope = self.reports.return_path(properties, decision.envelope, self.config, now=now)
        if envelope == decision.envelope:
            return decision
        return msgspec.structs.replace(decision, envelope=envelope)

    def stop_message(self, lease: Lease, decision: Refuse | Hold | Park) -> None:
        """Do what is decided about a message that is not sent now."""
        if isinstance(decision, Hold):
            self._settlements.hold(lease, decision.until)
            return
        if decision.row:
            self.stops.hit(decision.row)
        if isinstance(decision, Refuse):
            if decision.outcome.own_fault:
                self.say_own_fault(decision.domain, decision.outcome)
            self._settlements.finish(lease, Report(decision.outcome), decision.expires)
        else:
            self.stops.park(lease, decision.row)
            self._settlements.park(lease, decision.row)

    def take_out(self, condition: Callable[[Job], bool]) -> None:
        """Put back the messages that meet a condition, of those whose hosts are looked up."""
        for jobs in self._looking_up.values():
            for job in [job for job in jobs if condition(job)]:
                jobs.remove(job)
                self.looked_up -= 1
                self.put_back(job)
                self._intake.placed(job.lease.destination)

    def decide(self, message: Message, now: float, seen: float) -> Plan:
        """What to do about a message now, by its properties alone."""
        local, rows = self.limits.shaping.local_ips, self.stops.rows
        return plan(message, self.config, now=now, seen=seen, local=local, rows=rows)

    def _key_of(self, lease: Lease) -> str:
        """The key of a body that the storage has; a body that is in the queue counts more."""
        properties = lease.message.properties
        key = properties.get("key")
        if not key or not lease.loaded or properties.get("mime") is not None:
            return ""
        if self._storage is None and self._plugins.listens("out_data"):
            return ""  # the plugin may know the key
        return str(key)

    def _body_problem(self, message: Message) -> Outcome | None:
        supplied = message.body is None and self._plugins.listens("out_data")
        return body_problem(message, supplied=supplied)

    async def _find(self, route: Route) -> None:
        """Find the hosts of a target, and place its messages.

        If the lookup takes long, the messages wait in the queue, and are taken again after it.
        """
        found = await self._sites.find_quickly(route)
        destinations = []
        for job in self._looking_up.pop(route, ()):
            self.looked_up -= 1
            destinations.append(job.lease.destination)
            if found is None:
                self.put_back(job)
            else:
                self.place(job, found)
        late = found is None and self._sites.crowded
        if found is None and not late:
            self._intake.serve()
            await self._sites.find(route)
        for destination in destinations:
            self._intake.placed(destination, late=late)

    def place(self, job: Job, found: Site | NoHosts, wanted: Flow | Pause | None = None) -> None:
        """Give a message to its flow. The message of a pause that is `wanted` asks."""
        if isinstance(found, NoHosts):
            outcome = responses.no_hosts(found.description, found.reply)
            self._settlements.finish(job.lease, Report(outcome), job.plan.expires)
            return
        if self.stops.rows is not None and (stop := self.stops.late(job, found)) is not None:
            self.stop_message(job.lease, stop)
            return
        flow = self.flows.find(job, found, wanted)
        asks = False
        if isinstance(flow, Pause) and flow is wanted and not self.stops.keeps(flow, found):
            flow, asks = self.flows.resume(flow, found), True
        destination = self._intake.destination(job.lease.destination)
        is_new = flow not in destination.flows
        self._intake.link(destination, flow)
        waits = isinstance(flow, Pause) or flow.rights.rest or (flow.down and not asks)
        if len(job.plan.local_ips) > 1 and (is_new or waits):
            self.flows.set_width(destination, job, found, waits=waits)
        if waits or isinstance(flow, Pause):
            if self.stops.rows is None or not self.stops.set_aside(job, destination, flow):
                self.put_back(job)
        else:
            flow.add(job)

    # What flows ask for

    def has_expired(self, job: Job) -> bool:
        """Finish a message that has expired; return whether it had."""
        if self.now() <= job.plan.expires:
            return False
        self._finish(job, Report(responses.EXPIRED), 0.0)
        return True

    async def load(self, job: Job) -> Outcome | None:
        """Fetch or make a body, and find its keys; return the outcome if that fails."""
        if job.key and (problem := await self._fetch_stored(job)) is not None:
            return problem
        try:
            await self._bodies.load(job.lease)
        except MessageDamaged:
            return responses.OWN_FAULT  # the queue has set the message aside, and its lease is over
        except QueueError as error:
            self.counters.queue_errors += 1
            log.error("cannot read the body of message %d: %s", job.lease.id, error)
            return responses.OWN_FAULT
        outcome = None
        if job.to_make and isinstance(job.stored, dict):
            outcome = form_problem(job.source[0])
        if outcome is None and job.to_make:
            outcome = await make_body(
                job, self.config, self.now(), self._inliner, self._bodies, self._trace_field(job)
            )
        outcome = outcome or self._body_problem(Message(job.message.properties, job.body))
        if outcome is None and job.signing is not None:
            outcome = await job.signing.prepare(job, job.body)
        return outcome

    async def _fetch_stored(self, job: Job) -> Outcome | None:
        """Fetch a body from the storage; return the outcome if that fails."""
        assert self._storage is not None, "a job has no key without it"
        try:
            await self._bodies.fetch(job, self._storage)
        except StorageError as error:
            return responses.storage_fails(str(error), self.config.storage_reschedule)
        except BodyMissing as error:
            return responses.body_missing(str(error))
        return None

    def is_here(self, job: Job) -> bool:
        """Whether the body is in memory, perhaps that of the storage."""
        if job.key and self._storage is not None:
            key, to_make = job.key, job.to_make
            if (found := self._storage.at_hand(key)) is not None:
                self._bodies.put(job, found)
                if self._body_problem(Message(*job.source)) is not None:
                    # It is fetched in its turn, which says what is wrong.
                    job.key, job.stored, job.to_make = key, None, to_make
        return job.is_here

    def make_now(self, job: Job) -> None:
        """Make and prepare a body if that is quick and finds no problem; else in its turn."""
        if not job.is_here or isinstance(job.stored, dict):
            return
        if job.to_make and make_quickly(job, self.config, self.now(), self._trace_field(job)):
            if self._body_problem(Message(job.message.properties, job.made)) is not None:
                job.made, job.to_make = None, True
        if job.signing is not None and not job.to_make:
            job.signing.prepare_now(job, job.body)

    @property
    def _traces(self) -> bool:
        """Whether mail gets a trace field."""
        return bool(self.config.trace_header and self.reports.verp_keys)

    def _trace_field(self, job: Job) -> bytes:
        """The field that proves what mail a report quotes, if the settings want one."""
        if not self._traces:
            return b""
        properties = job.message.properties
        return trace_field(
            self.config.trace_header,
            str(properties.get("message-id") or ""),
            job.message.recipient,
            self.reports.verp_keys,
            now=self.now(),
        )

    def body_waits(self, job: Job) -> None:
        """A body is in memory and in no session: sessions that wait for room go first.

        Such sessions have slots, and the job may need one of those.
        """
        self._bodies.drop(job.lease)
        if job.made is not None:
            job.made, job.to_make = None, True
        if job.stored is not None:
            job.key, job.stored = str(job.message.properties.get("key") or ""), None
        if job.signing is not None:
            job.signing.forget()

    def refill(self, flow: Flow) -> None:
        """Take mail for a flow if the flow needs more."""
        self._intake.refill(flow)

    def start_soon(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        """Start a task that is cancelled when deliveries stop. After the stop, start nothing."""
        if not self.stopping:
            self._working.start_soon(function, *args)

    def start_session(self, session: Session) -> None:
        """Start a session's task."""
        self._sessions[session] = None
        self.worker.load += 1
        self._some_session.set()
        self._nursery.start_soon(session.run)

    @property
    def sessions(self) -> list[Session]:
        """The open sessions."""
        return list(self._sessions)

    def session_over(self, session: Session) -> None:
        """Note that a session has ended."""
        del self._sessions[session]
        self.worker.load -= 1
        self.openings.release()
        if not self._sessions:
            self._no_session.set()
            self._no_session = trio.Event()

    def settle(self, job: Job, report: Report, session: Session | None) -> None:
        """Settle an attempt; the session is told when the result is safe."""
        refusals = self.limits.refusals
        if refusals is not None and job.flow is not None:
            judged = refusals.settled(job.flow, job, report, session)
            if judged is None:
                self.counters.put_off += 1
                job.flow.give_back(job)
                if session is not None:
                    session.settled()
                return
            report = judged
        self._finish(job, report, job.plan.expires, session)

    def _finish(
        self, job: Job, report: Report, expires: float, session: Session | None = None
    ) -> None:
        if job.flow is not None:
            job.flow.reported += 1
        self._settlements.finish(job.lease, report, expires, job, session)

    def put_back(self, job: Job) -> None:
        """Return an untried message to the queue unchanged."""
        self._gone(job)
        self._intake.put_back(job.lease)

    def recall(self, numbers: Collection[int]) -> None:
        """Give these messages back to the queue, except those that are under way."""
        self.take_out(lambda job: job.lease.id in numbers)
        self.flows.recall(numbers)

    def try_now(self, destinations: Collection[str]) -> None:
        """Mail of these destinations is due although their hosts may be down: ask them."""
        self._sites.forget_failures()
        for key in destinations:
            self._intake.came_due(self._intake.destination(key))

    def gave_up(self, finished: Sequence[tuple[Message, Result]]) -> None:
        """Count and log messages that an operator has failed in the queue."""
        self._settlements.gave_up(finished)

    def _gone(self, job: Job) -> None:
        self._bodies.drop(job.lease)
        if job.flow is not None:
            job.flow.held -= 1
            job.flow = None

    # What settlements ask for

    def lease_over(self, lease: Lease, job: Job | None) -> None:
        """Note that the settlement of a message is committed."""
        flow = job.flow if job is not None else None
        if job is not None:
            self._gone(job)
        self._intake.lease_over()
        if flow is not None:
            flow.committed()

    def lease_kept(self, lease: Lease) -> None:
        """Ignore the next `lease_over`: the settlement is committed later."""
        self._intake.leased += 1

    async def fetch(self, lease: Lease) -> None:
        """Fetch a body that is not loaded. Raises `QueueError`."""
        await self._intake.subscription.load(lease)

    async def stored(self, lease: Lease) -> bytes | None:
        """The body in the storage, for a report; None if there is none, or not now."""
        key, storage = self._key_of(lease), self._storage
        if not key or lease.message.body is not None or storage is None or storage.is_away:
            return None
        try:
            return await storage.get(key)
        except (StorageError, BodyMissing) as error:
            log.warning("a report goes without its mail: %s", error)
            return None

    # Times

    def flush(self) -> None:
        """Retry hosts that were down now, and check all times."""
        self._sites.forget_failures()
        self.flows.flush()
        self.wake()

    def wake(self) -> None:
        """Check all times now: the clock may have been set."""
        self._times_changed.set()

    def times_changed(self, *, look: float = math.inf, wall: float = math.inf) -> None:
        """Note that a flow looks at `look`, or that mail is due at `wall`, on the wall clock."""
        if look < self._next_look or wall < self._next_due:
            self._times_changed.set()

    async def _watch_times(self) -> None:
        while True:
            self._times_changed = trio.Event()
            self.flows.look()
            destination: Destination
            for destination in self._intake.dues.pop_until(self.now()):
                self._intake.came_due(destination)
            self._next_look, self._next_due = self.flows.looks.first, self._intake.dues.first
            seconds = min(self._next_look - monotonic(), self._next_due - self.now())
            with trio.move_on_after(min(max(seconds, 0.0), CLOCK_SECONDS)):
                await self._times_changed.wait()

    async def _watch_sessions(self) -> None:
        while True:
            if not self._sessions:
                self._some_session = trio.Event()
                await self._some_session.wait()
            config = self.config
            shortest = min(config.smtp_out_timeout, self.limits.shaping.shortest_idle)
            seconds = min(TICK_SECONDS, max(min(shortest, config.connect_timeout) / 4, 0.02))
            began = monotonic()
            await trio.sleep(seconds)
            late = max(monotonic() - began - seconds, 0.0)
            for session in list(self._sessions):
                session.check(late)
