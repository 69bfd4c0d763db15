"""Take messages from the outbox, have them delivered, and say what became of them.

Theory of operation
-------------------
One task consumes the outbox, at most `rabbitmq-qos` messages at a time. Each message is
judged at once: what cannot be sent is finished, what is early goes back until it is due,
the rest becomes a `Job` for the `Pool`, which finds it a connection. Every message comes
back through `Dispatcher.done`, exactly once, with what came of the attempt. That turns into
a settlement: the message leaves the outbox, or goes back to it with a later due time, in
one step with the copies for the result queues.

Settlements are committed in groups by two tasks: while one waits for the queue, the other can
hand over what has come since, so that it is part of the very next commit. The connection that
a result came from is told when its group is safe, and sends no further body before that: with
one task that wait limited deliveries before the processor did. While the queue cannot be
written a group is tried again and again; deliveries come to a halt by themselves, and nothing
is forgotten. A settlement that the queue refuses for its own sake is cut out of its group and
settled with less: without what is impossible of it, at the very last set aside. So no message
keeps its lease for ever, and none is lost.

Everything here runs on the home worker.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import trio

from mailerq.address import parse_mailbox
from mailerq.config import Config
from mailerq.errors import AddressError, MessageError, QueueError
from mailerq.escaping import escape, escape_field
from mailerq.live import Live
from mailerq.message import Message, Result, check_nesting, encode_properties, format_time
from mailerq.net.logs import RATION_SECONDS, LogFile, Ration
from mailerq.net.misspelt import Misspelt
from mailerq.net.resolver import Resolver
from mailerq.net.slots import Slots
from mailerq.outbound.pool import Pool
from mailerq.outbound.session import Connection, Job, Report
from mailerq.queues import DAMAGED_QUEUE, Consumer, Lease, Publication, Queues, Settlement
from mailerq.rules import responses
from mailerq.rules.documents import MAX_HOPS
from mailerq.rules.responses import Fate, Outcome
from mailerq.rules.retry import expires_at, next_attempt, not_before
from mailerq.rules.routes import (
    choose_local_ip,
    count_hops,
    loop_problem,
    result_queues,
    route_of,
    unmet_promise,
)

if TYPE_CHECKING:
    from mailerq.net.worker import Worker
    from mailerq.plugins import Plugins

__all__ = ["Counters", "Dispatcher"]

log = logging.getLogger("mailerq.delivery")

SETTLERS: Final = 2
"""Groups of settlements that are handed to the queue at a time; more were no faster."""

MIN_BACKOFF_SECONDS: Final = 0.1
MAX_BACKOFF_SECONDS: Final = 10.0
"""How long the queue is left alone after an error; twice as long each time."""

FAILURES_PER_MINUTE: Final = 60
"""Lines about messages that have failed for good; the others are counted."""

MAX_REASON: Final = 300
"""Characters of an address or a reply in such a line."""

REDUCED_PER_MINUTE: Final = 10
"""Lines about results that had to be cut down."""

MAX_REPRESENTATION: Final = 10_000
"""Characters that are kept of a property which is no JSON."""


@dataclass(slots=True)
class Counters:
    """What deliveries have come to since the start.

    `held` messages were delayed by whoever sent them, `parked` ones wait for a slow domain.
    """

    consumed: int = 0
    held: int = 0
    parked: int = 0
    attempts: int = 0
    delivered: int = 0
    failed: int = 0
    retried: int = 0
    queue_errors: int = 0


class Dispatcher:
    """Delivers what is in the outbox. `run` is its task; `stop` ends it in order."""

    def __init__(
        self,
        live: Live,
        queues: Queues,
        workers: Sequence[Worker],
        *,
        plugins: Plugins,
        resolver: Resolver,
        slots: Slots,
        send_log: LogFile | None = None,
        misspelt: Misspelt | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.counters = Counters()
        self._live = live
        self._outbox = self._config.rabbitmq_outbox  # fixed
        self._queues = queues
        self._send_log = send_log
        self._misspelt = Misspelt() if misspelt is None else misspelt
        self._clock = clock
        self._plugins = plugins
        self._pool = Pool(live, workers, resolver, slots, self)
        self._say_unread = Ration(log.error, 1, "it could not be read %d times more")
        self._say_unwritten = Ration(log.error, 1, "they could not be written %d times more")
        self._say_reduced = Ration(log.error, REDUCED_PER_MINUTE, "and %d messages more")
        self._say_failure = Ration(
            log.warning, FAILURES_PER_MINUTE, "and %d messages more have failed"
        )
        self._unsettled: list[tuple[Settlement, Connection | None]] = []
        self._settling = 0
        self._settlers = trio.lowlevel.ParkingLot()
        self._settled = trio.Event()
        self._consuming = trio.CancelScope()
        self._stopped = trio.Event()
        self._nursery: trio.Nursery | None = None

    @property
    def _config(self) -> Config:
        return self._live.current.config

    def reload(self, send_log: LogFile | None, *, reroute: bool) -> None:
        """Settings have changed; with `reroute` what waits for a connection is judged anew."""
        self._send_log = send_log
        if reroute:
            self._pool.recall()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Deliver until `stop` has done its work."""
        try:
            await self._run(task_status)
        finally:
            # However it ends, the leases have gone back, and nobody writes results any more.
            self._stopped.set()
            self._pool.cut()
            self._flush_log()

    def _flush_log(self) -> None:
        for ration in (
            self._say_failure, self._say_reduced, self._say_unread, self._say_unwritten
        ):  # fmt: skip
            ration.flush()
        self._misspelt.flush()

    async def _sum_up(self) -> None:
        """Say once a minute what the log has left out."""
        while True:
            await trio.sleep(RATION_SECONDS)
            self._flush_log()

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        prefetch = self._config.rabbitmq_qos
        async with (
            self._queues.consume(self._outbox, prefetch=prefetch) as consumer,
            trio.open_nursery() as nursery,
        ):
            self._nursery = nursery
            await nursery.start(self._pool.run)
            for _ in range(SETTLERS):
                nursery.start_soon(self._settle)
            nursery.start_soon(self._sum_up)
            task_status.started()
            with self._consuming:
                await self._consume(consumer)
            await self._stopped.wait()
            nursery.cancel_scope.cancel()

    async def stop(self, timeout: float) -> None:
        """Take no more messages; what is under way may end, at most in `timeout` seconds."""
        if self._stopped.is_set():
            return
        deadline = trio.current_time() + timeout
        self._consuming.cancel()
        await self._pool.stop(timeout)
        with trio.move_on_at(max(deadline, trio.current_time() + MIN_BACKOFF_SECONDS)):
            while self._unsettled or self._settling:
                await self._settled.wait()
        if left := len(self._unsettled) + self._settling:
            log.warning("%d results could not be written; those messages go out again", left)
        self._stopped.set()

    def statistics(self) -> dict[str, Any]:
        """What has happened since the start, and what is under way now."""
        counters = {name: getattr(self.counters, name) for name in self.counters.__slots__}
        return {
            **counters,
            "unsettled": len(self._unsettled) + self._settling,
            **self._pool.statistics(),
        }

    # Messages in

    async def _consume(self, consumer: Consumer) -> None:
        backoff = MIN_BACKOFF_SECONDS
        while True:
            try:
                lease = await consumer.receive()
            except QueueError as error:
                self.counters.queue_errors += 1
                self._say_unread("cannot read %s: %s", self._outbox, error)
                await trio.sleep(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
                continue
            backoff = MIN_BACKOFF_SECONDS
            self.counters.consumed += 1
            try:
                self._admit(lease)
            except Exception:
                # A defect of ours must not stop the mail behind it.
                log.exception("message %d cannot be handled", lease.id)
                self._fail_admission(lease)
            del lease  # do not hold the mail while waiting for the next lease

    def _admit(self, lease: Lease) -> None:
        """Send a message on its way, or finish it, or put it back until it is due."""
        message = lease.message
        now = self._clock()
        properties = message.properties
        if "seen" not in properties:
            self._misspelt.properties(properties)
        problem = message.problem() or loop_problem(properties, self._outbox)
        if problem is not None:
            return self._refuse(lease, responses.unsendable(problem))
        due = not_before(properties, now=now)
        if due is not None and now < due:
            self.counters.held += 1
            self._add(Settlement(lease, (Publication(self._outbox, message, due),)), None)
            return None
        try:
            mailbox = parse_mailbox(message.recipient)
        except AddressError as error:
            problem = f"property recipient: {error}"
            return self._refuse(lease, responses.unsendable(problem, 553, "5.1.3"))
        envelope, recipient = message.envelope, message.recipient
        try:
            # In A-labels a domain passes through servers that know no SMTPUTF8.
            if not recipient.isascii():
                recipient = str(mailbox)
            if envelope:
                sender = parse_mailbox(envelope)
                envelope = envelope if envelope.isascii() else str(sender)
        except AddressError as error:
            problem = f"property envelope: {error}"
            return self._refuse(lease, responses.unsendable(problem, 553, "5.1.7"))
        expires = expires_at(properties, now=now, max_delivertime=self._config.max_delivertime)
        properties["domain"] = mailbox.domain
        properties.setdefault("seen", format_time(now))
        if not properties.get("message-id"):
            properties["message-id"] = self._plugins.message_id()
        if now > expires:
            return self._refuse(lease, responses.EXPIRED)
        if (outcome := self._body_problem(message)) is not None:
            return self._refuse(lease, outcome)
        if (reason := unmet_promise(properties, message.body)) is not None:
            status, _, text = reason.partition(" ")
            return self._refuse(lease, responses.unsendable(text, 550, status))
        try:
            route = route_of(properties, mailbox.domain, self._config)
            local_ip = choose_local_ip(properties, avoid=self._pool.unusable_ips())
        except AddressError as error:
            return self._refuse(lease, responses.unsendable(str(error)))
        attempt = len(message.results) + 1
        self._pool.put(Job(lease, message, route, local_ip, envelope, recipient, attempt, expires))
        return None

    def _fail_admission(self, lease: Lease) -> None:
        """Try again later what a defect of ours has kept, as long as it may be tried."""
        now = self._clock()
        properties = lease.message.properties
        properties.setdefault("seen", format_time(now))
        expires = expires_at(properties, now=now, max_delivertime=self._config.max_delivertime)
        self._finish(lease, lease.message, Report(responses.OWN_FAULT), expires, None)

    def _body_problem(self, message: Message) -> Outcome | None:
        body = message.body
        if body is not None:
            return responses.TOO_MANY_HOPS if count_hops(body) > MAX_HOPS else None
        if self._plugins.listens("out_data"):
            return None  # a plugin may supply one
        if message.properties.get("mime"):
            return responses.not_generated()
        return responses.NO_DATA

    # Messages out: what the pool calls

    def done(self, job: Job, report: Report, connection: Connection | None) -> None:
        """An attempt is over; `connection` is told when its result is safe."""
        self._finish(job.lease, job.message, report, job.expires, connection)

    def give_back(self, job: Job) -> None:
        """The engine stops before this message had its turn."""
        if not self._stopped.is_set():  # else all leases have gone back with the consumer
            self._queues.release(job.lease)

    def park(self, job: Job, seconds: float) -> None:
        """Its destination is too slow to keep this message in memory."""
        self.counters.parked += 1
        due = self._clock() + seconds
        self._add(Settlement(job.lease, (Publication(self._outbox, job.message, due),)), None)

    def expired(self, job: Job) -> bool:
        """Finish a message that has waited in memory for too long."""
        if self._clock() <= job.expires:
            return False
        self._refuse(job.lease, responses.EXPIRED)
        return True

    def _refuse(self, lease: Lease, outcome: Outcome) -> None:
        """Finish a message that is not tried."""
        self._finish(lease, lease.message, Report(outcome), 0.0, None)

    def _finish(
        self,
        lease: Lease,
        message: Message,
        report: Report,
        expires: float,
        connection: Connection | None,
    ) -> None:
        """Append the result, decide what follows, and have it written."""
        now = self._clock()
        config = self._config
        outcome = report.outcome
        results = message.properties.get("results")
        results = results if isinstance(results, list) else []
        result = _result(report, len(results) + 1, now)
        properties = {**message.properties, "results": [*results, result.to_dict()]}
        due = None
        if outcome.fate is Fate.RETRY:
            due = next_attempt(
                properties,
                attempt=result.attempt,
                now=now,
                expires=expires,
                intervals=config.retry_interval,
                max_attempts=config.max_attempts,
                own_fault=outcome.own_fault,
            )
        publications = []
        if due is not None:
            properties["delayed"] = format_time(due)
            publications.append(Publication(self._outbox, Message(properties, message.body), due))
            kinds: tuple[str, ...] = ("retry",)
            self.counters.retried += 1
        elif outcome.fate is Fate.DELIVERED:
            kinds = ("results", "success")
            self.counters.delivered += 1
        else:
            kinds = ("results", "failure")
            self.counters.failed += 1
        self.counters.attempts += 1
        queues = result_queues(properties, config.result_queues, *kinds, outbox=self._outbox)
        for queue in queues:
            # What nobody has named, and is deleted after a while, gets a report and not the mail.
            body = message.body if queue != config.report_queue else None
            publications.append(Publication(queue, _copy(properties, body)))
        if due is None and outcome.fate is not Fate.DELIVERED:
            self._tell_failure(message, result, queues)
        self._add(Settlement(lease, publications), connection)
        if self._send_log is not None:
            self._send_log.write(_log_line(message, result))

    def _tell_failure(self, message: Message, result: Result, queues: Sequence[str]) -> None:
        """Leave a trace in the log of a message that has failed, for nobody else is told."""
        reply = (result.code, result.status, result.description)
        words = " ".join(str(part) for part in reply if part)[:MAX_REASON]
        self._say_failure(
            "message %s from <%s> to <%s> has failed: %s%s; %s",
            _shown(message.properties.get("message-id") or "?"),
            _shown(message.envelope),
            _shown(message.recipient),
            f"{result.remote_ip}: " if result.remote_ip else "",
            words or f"{result.type} ({result.state})",
            f"'mailerq queue read {queues[-1]}' has its report"
            if queues
            else "no queue gets a report of it, see rabbitmq-failure",
        )

    # Settlements

    def _add(self, settlement: Settlement, connection: Connection | None) -> None:
        self._unsettled.append((settlement, connection))
        if len(self._unsettled) == 1:
            self._settlers.unpark()

    async def _settle(self) -> None:
        """Commit what has gathered, group after group, and tell the connections."""
        while True:
            while not self._unsettled:
                if not self._settling:
                    self._settled.set()
                    self._settled = trio.Event()
                await self._settlers.park()
            settlements, connections = self._take_unsettled()
            await self._commit(settlements)
            self._settling -= len(settlements)
            settlements.clear()  # do not hold settled mail while waiting
            for connection in connections:
                connection.worker.call(connection.settled)

    def _take_unsettled(self) -> tuple[list[Settlement], list[Connection]]:
        """Take the group to settle next, and the connections to tell."""
        # A function of its own: compiled, the loop of the task would hold the last lease.
        group, self._unsettled = self._unsettled, []
        self._settling += len(group)
        return (
            [settlement for settlement, _ in group],
            [connection for _, connection in group if connection is not None],
        )

    async def _commit(self, settlements: list[Settlement]) -> None:
        """Write a group; what is wrong with some of it does not keep the rest."""
        error = await self._ack(settlements)
        if error is None:
            return
        if len(settlements) == 1:
            await self._settle_with_less(settlements[0], error)
            return
        half = len(settlements) // 2
        await self._commit(settlements[:half])
        await self._commit(settlements[half:])

    async def _ack(self, settlements: list[Settlement]) -> Exception | None:
        """Write settlements, and wait while the queue cannot; what else keeps it from that."""
        backoff = MIN_BACKOFF_SECONDS
        while True:
            try:
                await self._queues.ack(settlements)
            except QueueError as error:
                self.counters.queue_errors += 1
                self._say_unwritten(
                    "cannot write %d results, trying again: %s", len(settlements), error
                )
                await trio.sleep(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
            except Exception as error:
                return error
            else:
                return None

    async def _settle_with_less(self, settlement: Settlement, error: Exception) -> None:
        """Settle a message, the result of which cannot be written, with less and less of it."""
        lease = settlement.lease
        wanted = settlement.publications
        possible = [each for each in wanted if self._is_possible(each)]
        forms = [possible, []]
        if any(each.queue == self._outbox for each in wanted):
            # It is to go again, so it must be somewhere.
            again = [each for each in possible if each.queue == self._outbox]
            aside = [Publication(DAMAGED_QUEUE, _set_aside(lease.message, error))]
            forms = [possible, again, aside] if again else [aside]
        for form in forms:
            problem = await self._ack([Settlement(lease, form)])
            if problem is None:
                self._say_reduced(
                    "message %d: %s; %d of %d documents about it were written, to %s",
                    lease.id,
                    error,
                    len(form),
                    len(wanted),
                    ", ".join(each.queue for each in form) or "no queue",
                )
                return
            if type(problem) is ValueError:
                return  # the lease is over
        self._say_reduced("message %d cannot be settled, trying later: %s", lease.id, error)
        assert self._nursery is not None, "it is open while anything is settled"
        self._nursery.start_soon(self._settle_later, settlement)

    def _is_possible(self, publication: Publication) -> bool:
        try:
            self._queues.check(publication)
        except MessageError:
            return False
        return True

    async def _settle_later(self, settlement: Settlement) -> None:
        await trio.sleep(MAX_BACKOFF_SECONDS)
        self._add(settlement, None)


def _result(report: Report, attempt: int, now: float) -> Result:
    outcome = report.outcome
    return Result(
        attempt=attempt,
        type=outcome.type,
        state=outcome.state,
        result=outcome.result,
        time=format_time(now),
        local_ip=report.local_ip,
        remote_ip=report.remote_ip,
        mta=report.mta,
        code=outcome.code,
        status=outcome.status,
        description=outcome.description,
        messages=report.messages,
    )


def _copy(properties: dict[str, Any], body: bytes | None) -> Message:
    """The message as the result queues get it: with a body only where ``keepmime`` says so."""
    if properties.get("keepmime"):
        return Message(dict(properties), body)
    return Message({name: value for name, value in properties.items() if name != "mime"})


def _set_aside(message: Message, error: Exception) -> Message:
    """A message that no queue takes as it is, in a form that any takes."""
    properties: dict[str, Any] = {}
    for name, value in message.properties.items():
        try:
            check_nesting(value, encode_properties({name: value}))
        except Exception:
            properties[ascii(name)[1:-1]] = ascii(value)[:MAX_REPRESENTATION]
        else:
            properties[name] = value
    properties["damaged"] = {"reason": ascii(str(error))[1:-1]}
    return Message(properties, message.body)


def _shown(value: object) -> str:
    """A property in a log; of another type it may be of any size."""
    return value[:MAX_REASON] if isinstance(value, str) else f"({type(value).__name__})"


def _log_line(message: Message, result: Result) -> str:
    """One line of the send log, without its date. docs/operations.md has its form."""
    tags = message.properties.get("tags")
    return " ".join(
        (
            f"{result.state}:{result.result}",
            str(result.attempt),
            f"<{escape_field(message.envelope)}> <{escape_field(message.recipient)}>",
            f"[{result.local_ip or ''}] [{result.remote_ip or ''}]",
            ",".join(map(escape_field, map(str, tags))) if isinstance(tags, list) else "",
            f"{result.code or ''} {result.status or ''} {escape(result.description or '')}",
        )
    )
