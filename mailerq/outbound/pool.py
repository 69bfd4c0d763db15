"""The messages that wait for a connection, and the connections: who gets which.

Theory of operation
-------------------
Messages that go the same way from the same address form a `Destination`. It has as many
connections as its queue can use, up to `domain-maxconnections`, and all destinations
together no more than the slots allow. A connection that has reported gets the next message
of its destination; without one it is idle, and the one that was used last is used first, so
that the others can time out. It may take one that waits earlier, to send its envelope ahead
(`next_job`); a destination where such a job came back once has no more of that, and a host that
answered out of step gets none for an hour.

A destination that finds no slot is starved: an idle connection of another one is closed
for it, connections do not become idle and do not send on for ever meanwhile, and whatever
slot becomes free goes to those that have starved longest.

A destination that is slow or dead must not fill the memory, or the mail of all others would
wait behind it. If its messages wait for long, most of them go back to the outbox for a part
of that time.

When the last connection that could open has failed, what it met is the result of all
messages that wait: there is no telling them apart. Where it was their local address that could
not be used, those that may leave from another one go there instead, and the address is set
aside for some time.

Everything here runs on the home worker; `Connection` says how the two talk.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from mailerq.config import Config
from mailerq.errors import AddressError
from mailerq.live import Live
from mailerq.net.logs import Ration
from mailerq.net.resolver import Host, NoHosts, Resolver
from mailerq.net.slots import Slots
from mailerq.outbound.session import Connection, Job, Report
from mailerq.rules import responses
from mailerq.rules.routes import Route, choose_local_ip

if TYPE_CHECKING:
    from mailerq.net.worker import Worker

__all__ = ["Destination", "Office", "Pool"]

log = logging.getLogger("mailerq.delivery")

HOLD_SECONDS: Final = 5.0
"""After a failure to open one more connection, while others work, none is opened for so long:
the peer may want no more."""

FAIR_MESSAGES: Final = 100
"""Messages after which a connection makes room when another destination finds no slot."""

TICK_SECONDS: Final = 1.0
"""How often it is looked whether a connection is late, a slot became free elsewhere or a hold
has ended; more often where timeouts are that short."""

DOUBT_SECONDS: Final = 300.0
"""How long a host that did not let us in is tried after the others."""

MAX_DOUBTS: Final = 10_000
"""Hosts that are remembered so."""

ASIDE_SECONDS: Final = 300.0
"""How long a local address that cannot be bound is used only where a message has no other."""

MAX_ASIDE: Final = 1000
"""Local addresses that are remembered so."""

CUT_SECONDS: Final = 5.0
"""How long connections that are cut may take to end: a plugin may still hold a message."""

PARK_AFTER_SECONDS: Final = 10.0
"""How long the first message of a destination waits before others behind it are put back."""

PARK_SHARE: Final = 10
"""A tenth of the messages in memory is what such a destination keeps there."""

MAX_PARK_SECONDS: Final = 60.0
"""For how long they are put back at most."""

MAX_NAMED: Final = 20
"""Domains whose queues `Pool.statistics` names."""

OUT_OF_STEP_SECONDS: Final = 3600.0
"""How long a host that answered out of step is sent no envelopes ahead, and served carefully."""

MAX_OUT_OF_STEP: Final = 10_000
"""Hosts that are remembered so; those that answered so longest ago are forgotten."""


class Office(Protocol):
    """Where results go: what `Pool` expects of the dispatcher."""

    def done(self, job: Job, report: Report, connection: Connection | None) -> None:
        """An attempt is over; `connection` is to be told when that is safe."""

    def give_back(self, job: Job) -> None:
        """The job was not tried and will not be."""

    def park(self, job: Job, seconds: float) -> None:
        """The job is not tried now; it comes again after some time."""

    def expired(self, job: Job) -> bool:
        """True when the job is past its time; it is finished then."""


@dataclass(slots=True, eq=False)
class Destination:
    """The messages of one route from one local address, and their connections."""

    route: Route
    local_ip: str | None
    jobs: deque[Job] = field(default_factory=deque)
    connections: set[Connection] = field(default_factory=set)
    opening: set[Connection] = field(default_factory=set)
    idle: list[Connection] = field(default_factory=list)
    held_until: float = 0.0
    ahead: bool = True


class Pool:
    """The connections of an engine to other hosts."""

    def __init__(
        self,
        live: Live,
        workers: Sequence[Worker],
        resolver: Resolver,
        slots: Slots,
        office: Office,
    ) -> None:
        self._live = live
        self.worker = workers[0]
        self._workers = workers
        self._resolver = resolver
        self._slots = slots
        self._office = office
        self._destinations: dict[tuple[Route, str | None], Destination] = {}
        self._idle: dict[Connection, Destination] = {}
        self._starved: dict[Destination, None] = {}
        self._held: dict[Destination, None] = {}
        self._doubts: dict[str, float] = {}
        self._aside: dict[str, float] = {}
        self._say_own_fault = Ration(log.error, 1, "and %d times more for a fault of this host")
        self._connections: dict[Connection, Destination] = {}
        self._stopping = False
        self._empty = trio.Event()
        self._lookups: dict[Connection, trio.CancelScope] = {}
        self._nursery: trio.Nursery
        self.opened_connections = 0
        self.ahead_jobs = 0
        self._out_of_step: dict[str, float] = {}

    @property
    def config(self) -> Config:
        """The settings in force now."""
        return self._live.current.config

    def _tick(self) -> float:
        config = self.config
        shortest = min(config.smtp_out_timeout, config.connection_maxidle / 1000)
        return min(TICK_SECONDS, max(shortest / 4, 0.02))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            try:
                while True:
                    await trio.sleep(self._tick())
                    self._look()
            finally:
                self._stopping = True  # no connection is opened any more

    def _look(self) -> None:
        """What is to be done now and then."""
        for connection in list(self._connections):
            connection.worker.call(connection.check)
        held, self._held = self._held, {}
        for destination in held:
            self._pump(destination)
        self._feed_starved()
        for destination in self._destinations.values():
            self._park_excess(destination)

    def put(self, job: Job) -> None:
        """Send a message as soon as may be."""
        self._queue(job, first=False)

    def _queue(self, job: Job, *, first: bool) -> None:
        if self._stopping:
            self._office.give_back(job)
            return
        key = (job.route, job.local_ip)
        destination = self._destinations.get(key)
        if destination is None:
            destination = self._destinations[key] = Destination(*key)
        if first:
            destination.jobs.appendleft(job)
        else:
            job.since = monotonic()
            destination.jobs.append(job)
        self._pump(destination)

    # Told by connections

    def opened(self, connection: Connection) -> None:
        """It was let in and takes a job."""
        self.opened_connections += 1
        destination = self._connections[connection]
        destination.opening.discard(connection)
        self._doubts.pop(connection.remote, None)
        if connection.local_ip is not None:
            self._aside.pop(connection.local_ip, None)
        self._employ(connection, destination)

    def finished(self, connection: Connection, job: Job, report: Report, reusable: bool) -> None:
        """It has tried a job, and takes another one if it is `reusable`."""
        self._office.done(job, report, connection)
        if reusable:
            destination = self._connections[connection]
            many = report.messages or 0
            if (self._starved and many >= FAIR_MESSAGES) or self._is_crowded(destination):
                connection.worker.call(connection.leave)
            else:
                self._employ(connection, destination)

    def next_job(self, connection: Connection) -> Job | None:
        """What it may begin before it has finished the job in hand, if no other could take it."""
        destination = self._connections[connection]
        jobs = destination.jobs
        may = destination.ahead and not (self._stopping or self._starved)
        if self._was_out_of_step(connection.remote) or self._is_crowded(destination):
            may = False
        while may and len(jobs) > len(destination.opening):
            job = jobs.popleft()
            if not self._office.expired(job):
                self.ahead_jobs += 1
                return job
        return None

    def returned(self, job: Job) -> None:
        """It has not tried a job that it was given; somebody else must."""
        self._queue(job, first=True)

    def withdrawn(self, connection: Connection, job: Job) -> None:
        """It took a job early and has not tried it; somebody else must."""
        self._connections[connection].ahead = False
        self._queue(job, first=True)

    def host_failed(self, host: Host) -> None:
        """A host did not let it in; it goes on with the next one."""
        now = monotonic()
        if len(self._doubts) >= MAX_DOUBTS:
            self._doubts = {a: until for a, until in self._doubts.items() if until > now}
        if len(self._doubts) < MAX_DOUBTS:
            self._doubts[host.address] = now + DOUBT_SECONDS

    def _was_out_of_step(self, address: str) -> bool:
        return bool(self._out_of_step) and self._out_of_step.get(address, 0.0) > monotonic()

    def out_of_step(self, connection: Connection) -> None:
        """Its host answers in an order that proves nothing; see `mailerq.wire.client`."""
        now = monotonic()
        host = connection.remote
        if self._out_of_step.pop(host, 0.0) <= now:
            log.warning(
                "%s [%s] answers SMTP out of step, or not at all: mail in doubt is tried again, and"
                " for an hour the host is sent no envelopes ahead, and one mail on each new"
                " connection",
                connection.route.name,
                host,
            )
        self._out_of_step[host] = now + OUT_OF_STEP_SECONDS
        if len(self._out_of_step) > MAX_OUT_OF_STEP:
            del self._out_of_step[next(iter(self._out_of_step))]

    def cannot_bind(self, local_ip: str, error: OSError) -> None:
        """It cannot use its local address: that one is set aside."""
        now = monotonic()
        if local_ip not in self._aside:
            if len(self._aside) >= MAX_ASIDE:
                self._aside = {ip: until for ip, until in self._aside.items() if until > now}
            if len(self._aside) >= MAX_ASIDE:
                return
            log.error(
                "cannot send from %s, which a message names in ips: %s; other addresses of such"
                " messages are used, and this one is tried again in %d s. Add the address to an"
                " interface of this host, or remove it from ips",
                local_ip,
                error.strerror or error,
                ASIDE_SECONDS,
            )
        self._aside[local_ip] = now + ASIDE_SECONDS

    def unusable_ips(self) -> Collection[str]:
        """Local addresses that are set aside now."""
        if not self._aside:
            return ()
        now = monotonic()
        return {ip for ip, until in self._aside.items() if until > now}

    def leaving(self, connection: Connection) -> None:
        """It takes no more jobs."""
        destination = self._connections[connection]
        if self._idle.pop(connection, None) is not None:
            destination.idle.remove(connection)

    def closed(self, connection: Connection, job: Job | None, report: Report | None) -> None:
        """Its task has ended, with a job in hand or with what kept it from opening."""
        self.leaving(connection)
        destination = self._connections.pop(connection)
        destination.connections.discard(connection)
        was_opening = connection in destination.opening
        destination.opening.discard(connection)
        connection.worker.load -= 1
        self._slots.release()
        if job is not None:
            self.returned(job)
        if was_opening and report is not None:
            self._not_opened(destination, report)
        self._feed_starved()
        self._pump(destination)
        self._forget(destination)
        if self._stopping and not self._connections:
            self._empty.set()

    # Who gets what

    def _pump(self, destination: Destination) -> None:
        """Give waiting messages to idle connections, and open more while they are of use."""
        while destination.jobs and not self._stopping:
            if destination.idle:
                connection = destination.idle.pop()
                del self._idle[connection]
                self._employ(connection, destination)
            elif not self._may_open(destination) or not self._open(destination):
                return

    def _employ(self, connection: Connection, destination: Destination) -> None:
        """Give a connection something to do, or let it be idle, or go."""
        while destination.jobs:
            job = destination.jobs.popleft()
            if not self._office.expired(job):
                connection.worker.call(connection.give, job)
                return
        if self._stopping or self._starved:
            connection.worker.call(connection.leave)
        else:
            destination.idle.append(connection)
            self._idle[connection] = destination

    def _is_crowded(self, destination: Destination) -> bool:
        """Whether more connections are open than may be, since the settings have changed."""
        limit = self.config.domain_maxconnections
        return 0 < limit < len(destination.connections) or self._slots.are_exceeded

    def _may_open(self, destination: Destination) -> bool:
        limit = self.config.domain_maxconnections
        if 0 < limit <= len(destination.connections):
            return False
        if len(destination.opening) >= len(destination.jobs) or destination in self._starved:
            return False
        if monotonic() < destination.held_until:
            self._held[destination] = None
            return False
        return True

    def _open(self, destination: Destination) -> bool:
        """Open one more connection, or queue for a slot."""
        if not self._slots.take():
            self._starved[destination] = None
            if self._idle:
                longest = next(iter(self._idle))
                self.leaving(longest)
                longest.worker.call(longest.leave)
            return False
        worker = min(self._workers, key=_load)
        worker.load += 1
        connection = Connection(self, worker, destination.route, destination.local_ip)
        self._connections[connection] = destination
        destination.connections.add(connection)
        destination.opening.add(connection)
        self._nursery.start_soon(self._start, connection, destination)
        return True

    async def _start(self, connection: Connection, destination: Destination) -> None:
        """Find the hosts of a connection's destination and let it loose on them."""
        route = destination.route
        found: tuple[Host, ...] | NoHosts | None = None
        report: Report | None = None
        try:
            with trio.CancelScope() as self._lookups[connection]:
                if route.mx:
                    answer = await self._resolver.mail_hosts(route.host)
                else:
                    answer = await self._resolver.host(route.host, trusted=route.trusted)
                await trio.lowlevel.checkpoint_if_cancelled()  # then workers take no more tasks
                found = answer
        except Exception:
            # What strangers have in their zones must not end the engine.
            log.exception("looking for the hosts of %s failed", route.name)
            report = Report(responses.OWN_FAULT)
        finally:
            del self._lookups[connection]
            if found is None:
                self.closed(connection, None, report)
        if isinstance(found, NoHosts):
            outcome = responses.no_hosts(found.description, found.reply)
            self.closed(connection, None, Report(outcome))
        elif found is not None:
            hosts = self._in_order(found, destination.local_ip)
            if not hosts and (local_ip := destination.local_ip) is not None:
                outcome = responses.no_fitting_address(route.host, local_ip)
                self.closed(connection, None, Report(outcome, local_ip))
            else:
                doubtful = {h.address for h in hosts if self._was_out_of_step(h.address)}
                connection.worker.spawn(connection.run, hosts, doubtful)

    def _in_order(self, hosts: Sequence[Host], local_ip: str | None) -> list[Host]:
        """The hosts that can be reached from the local address, doubtful ones last."""
        now = monotonic()
        doubts = self._doubts
        if local_ip is not None:
            version_6 = ":" in local_ip
            hosts = [host for host in hosts if (":" in host.address) == version_6]
        return sorted(hosts, key=lambda host: doubts.get(host.address, 0.0) > now)

    def _park_excess(self, destination: Destination) -> None:
        jobs = destination.jobs
        share = max(self.config.rabbitmq_qos // PARK_SHARE, 1)
        if len(jobs) > share:
            age = monotonic() - jobs[0].since
            if age > PARK_AFTER_SECONDS:
                while len(jobs) > share:
                    self._office.park(jobs.pop(), min(age / 4, MAX_PARK_SECONDS))

    def _not_opened(self, destination: Destination, report: Report) -> None:
        if destination.connections:
            destination.held_until = monotonic() + HOLD_SECONDS
            return
        destination.held_until = 0.0
        jobs, destination.jobs = destination.jobs, deque()
        outcome = report.outcome
        for job in jobs:
            if outcome.state != "bind" or not self._move(job):
                self._office.done(job, report, None)
        if outcome.own_fault and outcome.state != "bind":
            self._say_own_fault(
                "mail to %s waits for a fault of this host to end: %s",
                destination.route.name,
                outcome.description,
            )

    def _move(self, job: Job) -> bool:
        """Let a job wait for a connection from another of its addresses, if it has one.

        The address it had cannot be bound, or no host fits its family. It is not come back to:
        of the first kind all are set aside, of the second all of the family are ruled out.
        """
        assert job.local_ip is not None, "without one there is nothing to bind"
        avoid = {*self.unusable_ips(), job.local_ip}
        if job.local_ip not in self._aside:
            version_6 = ":" in job.local_ip
            avoid |= {ip for ip in job.message.properties["ips"] if (":" in ip) == version_6}
        try:
            other = choose_local_ip(job.message.properties, avoid=avoid)
        except AddressError:
            return False  # which the next attempt may say
        if other is None or other in avoid:
            return False
        job.local_ip = other
        self._queue(job, first=False)
        return True

    def _feed_starved(self) -> None:
        starved, self._starved = self._starved, {}
        for destination in starved:
            self._pump(destination)

    def _forget(self, destination: Destination) -> None:
        if not destination.jobs and not destination.connections:
            self._destinations.pop((destination.route, destination.local_ip), None)
            self._starved.pop(destination, None)
            self._held.pop(destination, None)

    # The end, and figures

    def recall(self) -> None:
        """Give back what waits for a connection: it is judged anew, by other settings."""
        for destination in list(self._destinations.values()):
            while destination.jobs:
                self._office.give_back(destination.jobs.popleft())
            self._forget(destination)

    async def stop(self, timeout: float) -> None:
        """Let messages under way end, at most in `timeout` seconds; all others go back."""
        self._stopping = True
        self.recall()
        for scope in list(self._lookups.values()):
            scope.cancel()
        for connection, destination in list(self._connections.items()):
            opening = connection in destination.opening
            connection.worker.call(connection.cut if opening else connection.leave)
        for patience in (timeout, CUT_SECONDS):
            with trio.move_on_after(patience):
                if self._connections:
                    await self._empty.wait()
            for connection in list(self._connections):
                connection.worker.call(connection.cut)

    def cut(self) -> None:
        """End all connections now: nobody hears any more of what they do."""
        self._stopping = True
        for connection in list(self._connections):
            connection.worker.call(connection.cut)

    def statistics(self) -> dict[str, Any]:
        """What is open and what waits; the longest queues by name."""
        queues: dict[str, int] = {}
        for destination in self._destinations.values():
            name = destination.route.name
            queues[name] = queues.get(name, 0) + len(destination.jobs)
        longest = sorted(queues.items(), key=lambda item: -item[1])[:MAX_NAMED]
        return {
            "connections": len(self._connections),
            "opening": sum(len(d.opening) for d in self._destinations.values()),
            "idle": len(self._idle),
            "opened": self.opened_connections,
            "ahead": self.ahead_jobs,
            "destinations": len(self._destinations),
            "waiting": sum(queues.values()),
            "domains": dict(longest),
        }


def _load(worker: Worker) -> int:
    return worker.load
