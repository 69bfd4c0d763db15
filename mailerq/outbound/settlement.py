"""Settles messages: results are recorded, many in one commit.

Theory of operation
-------------------
A finished attempt becomes a settlement. In one step the message leaves the outbox, or returns with
a later due time, and the copies for the result queues are published.

Two tasks commit settlements in batches. While one waits for the queue, the other can hand over the
settlements that came since, for the very next commit. A session is told when the batch with its
result is safe, and sends no further body before. With one task, that wait limited deliveries before
the processor did.

While the queue cannot be written, a batch is retried; deliveries stall by themselves, and nothing
is lost. A settlement that the queue itself refuses is taken out of its batch and settled with less:
without the impossible parts, and at the very last set aside. So no lease is kept for ever, and no
message is lost.

A message whose sender is to hear of it gets a report (`mailerq.outbound.bounces`), which is
published in the same commit. Messages that failed together, of one mail, share a report; so such a
failure waits a moment for others (`mailerq.outbound.together`), and its session does not: no mail
has gone that a crash could have sent twice.

Everything here runs on the home worker.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec
import trio

from mailerq.config import Config
from mailerq.errors import MessageDamaged, MessageError, QueueError
from mailerq.escaping import escape, escape_field
from mailerq.live import Live
from mailerq.mail.tls_report import is_report
from mailerq.message import (
    Message,
    Result,
    check_nesting,
    encode_properties,
    format_time,
    without_password,
)
from mailerq.net.logs import LogFile, Ration
from mailerq.outbound.bounces import add_reports
from mailerq.outbound.jobs import Job, Report
from mailerq.outbound.session import Session
from mailerq.outbound.together import Together
from mailerq.queues import DAMAGED_QUEUE, Lease, Publication, Queues, Settlement
from mailerq.rules import bounces
from mailerq.rules.bounces import Bounce
from mailerq.rules.local_ips import avoid, pin
from mailerq.rules.reporting import NO_REPORTS, Reports
from mailerq.rules.responses import Fate, at_the_end
from mailerq.rules.retry import next_attempt
from mailerq.rules.routes import result_queues

__all__ = ["Counters", "Settlements"]

log = logging.getLogger("mailerq.delivery")

SETTLERS: Final = 8
"""Batches handed to the queue at a time. During one commit, results come in over several turns of a
busy loop. A result without a free task waits for one more commit, and so does its session."""

WITH_BODIES: Final = 2
"""Of these, the batches that fetch bodies or make reports: each may hold `MAX_HELD` bytes."""

MIN_BACKOFF_SECONDS: Final = 0.1
MAX_BACKOFF_SECONDS: Final = 10.0
"""Longest pause after a queue error; the pause doubles each time."""

MIN_PUT_OFF_SECONDS: Final = 1.0
"""The least wait of a message whose attempt is not counted."""

FAILURES_PER_MINUTE: Final = 60
"""Log lines about messages that failed for good; further ones are counted."""

MAX_REASON: Final = 300
"""Characters of an address or a reply in such a line."""

REDUCED_PER_MINUTE: Final = 10
"""Log lines about results that had to be reduced."""

MAX_HELD: Final = 64 << 20
"""Bytes of bodies fetched for one batch, and of reports; then the batch is committed first."""

BODIES: Final = frozenset(("mime", "key"))
"""Properties that are the mail, or name it."""

HEARD: Final = frozenset(("queues", "dsn", "tags"))
"""Properties that may ask for the result of a delivery."""

MAX_REPRESENTATION: Final = 10_000
"""Characters kept of a property that is not JSON."""


# Looking up a member of an enumeration is slow.
_RETRY: Final = Fate.RETRY
_DELIVERED: Final = Fate.DELIVERED

_ON_SUCCESS: Final = ("results", "success")


@dataclass(slots=True)
class Counters:
    """Delivery totals since the start.

    `held` counts messages delayed by their senders, `put_off` those whose attempt ended by a reply
    that is not about them, `handed_over` those that went to another instance of the cluster,
    `reports` the reports made for senders.
    """

    consumed: int = 0
    held: int = 0
    attempts: int = 0
    delivered: int = 0
    failed: int = 0
    retried: int = 0
    queue_errors: int = 0
    put_off: int = 0
    handed_over: int = 0
    reports: int = 0


class Finished(msgspec.Struct, eq=False):
    """A settlement under way; `job` and `session` are None if the message was not tried."""

    settlement: Settlement
    job: Job | None = None
    session: Session | None = None
    needs_body: bool = False
    """Fetch the body first: one of the publications needs it."""
    bounce: Bounce | None = None
    """The report that the sender gets."""
    made: bytes | None = None
    """The mail that was sent, if that is not what is stored."""


class Settled(Protocol):
    """The interface that `Settlements` needs from the dispatcher."""

    counters: Counters

    def lease_over(self, lease: Lease, job: Job | None) -> None:
        """The settlement of a message is committed."""

    def lease_kept(self, lease: Lease) -> None:
        """Ignore the next `lease_over`: the settlement is committed later."""

    async def fetch(self, lease: Lease) -> None:
        """Fetch a body that is not loaded. Raises `QueueError`."""

    async def stored(self, lease: Lease) -> bytes | None:
        """The body in the storage, for a report; None if there is none, or not now."""


class Settlements:
    """Writes settlements, in several `tasks`; see `Dispatcher`."""

    def __init__(
        self,
        live: Live,
        queues: Queues,
        told: Settled,
        *,
        send_log: LogFile | None,
        clock: Callable[[], float],
        lot: Callable[[], float] = random.random,
        next_id: Callable[[], str],
        reports: Reports = NO_REPORTS,
        tls_report_ended: Callable[[str, str], object] = lambda address, problem: None,
    ) -> None:
        self.reports = reports
        self.nursery: trio.Nursery
        self.send_log = send_log
        self._live = live
        self._outbox = live.current.config.rabbitmq_outbox  # fixed
        self._queues = queues
        self._told = told
        self._counters = told.counters
        self._clock = clock
        self._lot = lot
        self._next_id = next_id
        self._tls_report_ended = tls_report_ended
        self._say_unwritten = Ration(log.error, 1, "they could not be written %d times more")
        self._say_reduced = Ration(log.error, REDUCED_PER_MINUTE, "and %d messages more")
        self._say_failure = Ration(
            log.warning, FAILURES_PER_MINUTE, "and %d messages more have failed"
        )
        self._unsettled: list[Finished] = []
        self._together: Together[Finished] = Together(live, self._add_all)
        self._settling = 0
        self._settlers = trio.lowlevel.ParkingLot()
        self._with_bodies = trio.Semaphore(WITH_BODIES)
        self._settled = trio.Event()

    @property
    def _config(self) -> Config:
        return self._live.current.config

    def __len__(self) -> int:
        """Settlements not written yet."""
        return len(self._unsettled) + self._settling + len(self._together)

    def __bool__(self) -> bool:
        return True

    async def wait_empty(self) -> None:
        """Wait until all settlements are written. From now on none waits for others."""
        self._together.close()
        while len(self):
            await self._settled.wait()

    def flush_log(self) -> None:
        """Log the count of suppressed lines."""
        for ration in (self._say_failure, self._say_reduced, self._say_unwritten):
            ration.flush()

    # What became of a message

    def hand_over(self, lease: Lease, queue: str) -> None:
        """Give a message to the instance of the cluster that consumes a queue."""
        self._counters.handed_over += 1
        settlement = Settlement(lease, (Publication(queue, lease.message),))
        self._finished(settlement, None, None, None, needs_body=not lease.loaded)

    def hold(self, lease: Lease, until: float) -> None:
        """Put a message back until a time."""
        self._counters.held += 1
        publication = Publication(self._outbox, lease.message, until, self._clock())
        self._add(Finished(Settlement(lease, (publication,))))

    def park(self, lease: Lease, row: int) -> None:
        """Put a message back where nothing reads it until a pause has ended."""
        message = Message({**lease.message.properties, "paused": row}, lease.message.body)
        self._add(Finished(Settlement(lease, (Publication(self._outbox, message),))))

    def finish(
        self,
        lease: Lease,
        report: Report,
        expires: float = 0.0,
        job: Job | None = None,
        session: Session | None = None,
    ) -> None:
        """Append the result, decide what follows, and queue the settlement."""
        now = self._clock()
        message = lease.message
        outcome = report.outcome
        if not outcome.counted and outcome.fate is _RETRY:
            until = now + (outcome.retry_after or MIN_PUT_OFF_SECONDS)
            if outcome.own_fault and now <= expires:
                # The time of a message may end it, and not a fault of this host.
                until = min(until, expires + MIN_PUT_OFF_SECONDS)
            if until <= expires or (outcome.own_fault and now <= expires):
                self._counters.put_off += 1
                if outcome.other_ip or "refusedips" in message.properties:
                    message = Message(dict(message.properties), message.body)
                    avoid(message.properties, report.local_ip if outcome.other_ip else None)
                result = _result(report, 0, now)
                bounce = self._delay(message.properties, report, result, expires, now)
                if bounce is not None:
                    told = {**message.properties, "dsn-delayed": format_time(now)}
                    message = Message(told, message.body)
                again = Publication(self._outbox, message, until, now)
                self._finished(Settlement(lease, (again,)), job, session, bounce)
                return
        results = message.properties.get("results")
        results = results if isinstance(results, list) else []
        result = _result(report, len(results) + 1, now)
        if outcome.fate is _DELIVERED and self._is_untold(message.properties):
            self._counters.attempts += 1
            self._counters.delivered += 1
            self._finished(Settlement(lease, ()), job, session, None)
            if self.send_log is not None:
                self.send_log.write_soon(_log_line(message, result))
            return
        properties = {**message.properties, "results": [*results, result.to_dict()]}
        properties.pop("paused", None)
        due = None
        if outcome.fate is _RETRY:
            due = next_attempt(
                properties,
                attempt=result.attempt,
                now=now,
                expires=expires,
                intervals=self._config.retry_interval,
                max_attempts=self._config.max_attempts,
                own_fault=outcome.own_fault,
                after=outcome.retry_after,
                lot=self._lot(),
            )
        ending = outcome if due is not None else at_the_end(outcome)
        if ending is not outcome:
            report = msgspec.structs.replace(report, outcome=ending)
            result = _result(report, result.attempt, now)
            properties["results"] = [*results, result.to_dict()]
        if not outcome.pins or "refusedips" in properties:
            other_ip = outcome.other_ip and due is not None
            avoid(properties, report.local_ip if other_ip else None)
        if outcome.pins and job is not None and len(job.plan.local_ips) > 1:
            pin(properties)
        publications = []
        bounce = None
        if due is not None:
            properties["delayed"] = format_time(due)
            bounce = self._delay(properties, report, result, expires, now)
            if bounce is not None:
                properties["dsn-delayed"] = format_time(now)
            again = Publication(self._outbox, Message(properties, message.body), due, now)
            publications.append(again)
            kinds: tuple[str, ...] = ("retry",)
            self._counters.retried += 1
        elif outcome.fate is _DELIVERED:
            kinds = _ON_SUCCESS
            self._counters.delivered += 1
            if "dsn" in properties or self._config.tells_success:
                bounce = self._success(properties, report, result)
            if "tags" in properties and is_report(properties):
                self._tls_report_ended(message.recipient, "")
        else:
            kinds = ("results", "failure")
            self._counters.failed += 1
            bounce = self._bounce(properties, bounces.FAILED, report, result)
            if is_report(properties) and not outcome.own_fault:
                self._tls_report_ended(message.recipient, _problem(result))
        self._counters.attempts += 1
        queues = result_queues(properties, self._config.result_queues, *kinds, outbox=self._outbox)
        for queue in queues:
            # The default report queue, trimmed after a while, gets a report without the mail.
            body = message.body if queue != self._config.report_queue else None
            publications.append(Publication(queue, _copy(properties, body)))
        if due is None and outcome.fate is not _DELIVERED:
            self._tell_failure(message, result, queues, reported=bounce is not None)
        needs_body = not lease.loaded and any(
            each.queue != self._config.report_queue and properties.get("keepmime")
            for each in publications
            if each.queue != self._outbox
        )
        settlement = Settlement(lease, publications)
        self._finished(settlement, job, session, bounce, needs_body=needs_body)
        if self.send_log is not None:
            self.send_log.write_soon(_log_line(message, result))

    def _is_untold(self, properties: dict[str, Any]) -> bool:
        """Whether only the logs record a delivery: no queue and no report needs its result."""
        if not properties.keys().isdisjoint(HEARD):
            return False
        config = self._config
        if config.tells_success:
            return False
        return not result_queues({}, config.result_queues, *_ON_SUCCESS, outbox=self._outbox)

    def _finished(
        self,
        settlement: Settlement,
        job: Job | None,
        session: Session | None,
        bounce: Bounce | None,
        *,
        needs_body: bool = False,
    ) -> None:
        made = None
        if job is not None and bounce is not None:
            made = job.made
            if made is None and isinstance(job.stored, bytes):
                made = job.stored
        finished = Finished(settlement, job, session, needs_body, bounce, made)
        if bounce is None or not self._together.takes(finished):
            self._add(finished)
            return
        # The flow and the session go on.
        self._told.lease_kept(settlement.lease)
        self._told.lease_over(settlement.lease, job)
        if session is not None:
            session.settled()
        finished.job = finished.session = None
        self._together.add(finished)

    def _success(self, properties: dict[str, Any], report: Report, result: Result) -> Bounce | None:
        """What to report of a mail that a peer has taken."""
        event = bounces.of_success(properties, lmtp=report.lmtp, peer_reports=report.dsn)
        return self._bounce(properties, event, report, result) if event else None

    def _delay(
        self,
        properties: dict[str, Any],
        report: Report,
        result: Result,
        expires: float,
        now: float,
    ) -> Bounce | None:
        """What to report of a mail that waits; once for each mail, when it has waited long."""
        if "dsn-delayed" in properties or not properties.get("envelope"):
            return None
        if not bounces.is_wanted(properties, bounces.DELAYED, self._config):
            return None
        seen = bounces.time_in(properties, "seen")
        if seen is None or now - seen < self._config.dsn_delay:
            return None
        return self._bounce(properties, bounces.DELAYED, report, result, until=expires or None)

    def _bounce(
        self,
        properties: dict[str, Any],
        event: str,
        report: Report,
        result: Result,
        until: float | None = None,
    ) -> Bounce | None:
        outcome = report.outcome
        from_peer = outcome.from_peer or outcome.fate is _DELIVERED
        if outcome.type == "expired":
            result, from_peer = bounces.cause(properties) or (result, from_peer)
        return bounces.about(
            properties, event, result, self._config, from_peer=from_peer, until=until
        )

    def gave_up(self, finished: Sequence[tuple[Message, Result]]) -> None:
        """Count and log messages that an operator has failed in the queue."""
        self._counters.failed += len(finished)
        if self.send_log is not None:
            for message, result in finished:
                self.send_log.write_soon(_log_line(message, result))

    def _tell_failure(
        self, message: Message, result: Result, queues: Sequence[str], *, reported: bool
    ) -> None:
        """Log a failed message: often nobody else is told."""
        self._say_failure(
            "message %s from <%s> to <%s> has failed: %s%s; %s",
            _shown(message.properties.get("message-id") or "?"),
            _shown(message.envelope),
            _shown(message.recipient),
            f"{result.remote_ip}: " if result.remote_ip else "",
            _problem(result),
            _told(queues, reported),
        )

    # Settlements

    def _add(self, finished: Finished) -> None:
        self._unsettled.append(finished)
        if len(self._unsettled) == 1:
            self._settlers.unpark()

    def _add_all(self, group: Sequence[Finished]) -> None:
        """Add settlements for one batch."""
        for finished in group:
            self._add(finished)

    @property
    def tasks(self) -> list[Callable[[], Awaitable[None]]]:
        """The tasks to run."""
        return [*[self.run] * SETTLERS, self._together.run]

    async def run(self) -> None:
        """Commit batch after batch, and tell the sessions."""
        while True:
            while not self._unsettled:
                if not self._settling:
                    self._settled.set()
                    self._settled = trio.Event()
                await self._settlers.park()
            await self._settle(self._take())

    # Separate functions: compiled, a loop in the task would keep the last mail alive while waiting.

    def _take(self) -> list[Finished]:
        """Take the next batch."""
        group, self._unsettled = self._unsettled, []
        self._settling += len(group)
        return group

    async def _settle(self, group: list[Finished]) -> None:
        for finished in group:
            if finished.needs_body or finished.bounce is not None:
                async with self._with_bodies:
                    await self._write(group)
                return
        await self._write_part(group)

    async def _write(self, group: list[Finished]) -> None:
        held, largest = 0, self._config.dsn_maxsize
        for number, finished in enumerate(group):
            lease, reports = finished.settlement.lease, finished.bounce is not None
            fetch = finished.needs_body or (reports and finished.made is None and not lease.loaded)
            size = (lease.size if fetch else 0) + (min(lease.size, largest) if reports else 0)
            if held and held + size > MAX_HELD:
                await self._write_part(group[:number])
                await self._write(group[number:])
                return
            held += size
            if fetch:
                await self._fetch_body(finished)
            if reports and finished.made is None and lease.message.body is None:
                finished.made = await self._told.stored(lease)
        await self._write_part(group)

    async def _write_part(self, group: list[Finished]) -> None:
        if any(finished.bounce is not None for finished in group):
            count = await add_reports(
                group, self.reports, self._config, next_id=self._next_id, now=self._clock()
            )
            self._counters.reports += count  # another task may have counted meanwhile
        await self._commit([finished.settlement for finished in group])
        self._settling -= len(group)
        for finished in group:
            self._told.lease_over(finished.settlement.lease, finished.job)
            if finished.session is not None:
                finished.session.settled()

    async def _fetch_body(self, finished: Finished) -> None:
        """Fetch the body, and add it where a copy of the mail is published.

        From now on a retry has to bring the body too: without, it would be a mail without a body.
        """
        lease = finished.settlement.lease
        await self._fetch(lease)
        publications = []
        for each in finished.settlement.publications:
            wanted = finished.needs_body and each.queue != self._config.report_queue
            if wanted or each.queue == self._outbox:
                copy = Message(each.message.properties, lease.message.body)
                each = Publication(each.queue, copy, each.due, each.since)
            publications.append(each)
        finished.settlement = Settlement(lease, publications)

    async def _fetch(self, lease: Lease) -> None:
        """Fetch a body; wait while the queue cannot be read."""
        backoff = MIN_BACKOFF_SECONDS
        while not lease.loaded:
            try:
                await self._told.fetch(lease)
            except (MessageDamaged, ValueError):
                return  # the queue has set the message aside, and the lease is over
            except QueueError as error:
                self._counters.queue_errors += 1
                self._say_unwritten("cannot read the body of %d, trying again: %s", lease.id, error)
                await trio.sleep(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    async def _commit(self, settlements: list[Settlement]) -> None:
        """Write a batch; a bad settlement does not hold up the others."""
        error = await self._ack(settlements)
        if error is None:
            return
        if type(error) is ValueError and len(settlements) == 1 and settlements[0].others:
            await self._publish(settlements[0].others)  # they may be about other messages too
            return
        if len(settlements) == 1:
            await self._settle_with_less(settlements[0], error)
            return
        half = len(settlements) // 2
        await self._commit(settlements[:half])
        await self._commit(settlements[half:])

    async def _ack(self, settlements: list[Settlement]) -> Exception | None:
        """Write settlements; wait while the queue cannot be written. Return any other error."""
        backoff = MIN_BACKOFF_SECONDS
        while True:
            try:
                await self._queues.ack(settlements)
            except QueueError as error:
                self._counters.queue_errors += 1
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
        """Settle a message whose result cannot be written, with less and less of the result."""
        lease = settlement.lease
        wanted = settlement.publications
        others = [each for each in settlement.others if self._is_possible(each)]
        possible = [each for each in wanted if self._is_possible(each)]
        forms = [possible, []]
        if any(each.queue == self._outbox for each in wanted):
            # The message is to be tried again, so it must stay in the outbox.
            again = [each for each in possible if each.queue == self._outbox]
            if not again:
                await self._fetch(lease)
            aside = [Publication(DAMAGED_QUEUE, _set_aside(lease.message, error))]
            forms = [possible, again, aside] if again else [aside]
        ways = [(form, others) for form in forms]
        ways += [(form, []) for form in forms if others]
        for form, added in ways:
            problem = await self._ack([Settlement(lease, form, added)])
            if problem is None:
                self._say_reduced(
                    "message %d: %s; %d of %d documents about it were written, to %s",
                    lease.id,
                    error,
                    len(form) + len(added),
                    len(wanted) + len(settlement.others),
                    ", ".join(each.queue for each in (*form, *added)) or "no queue",
                )
                return
            if type(problem) is ValueError:
                return  # the lease is over
        self._say_reduced("message %d cannot be settled, trying later: %s", lease.id, error)
        self._told.lease_kept(lease)
        self.nursery.start_soon(self._settle_later, settlement)

    async def _publish(self, publications: Sequence[Publication]) -> None:
        """Publish reports whose own settlement is void; wait while the queue cannot be written."""
        backoff = MIN_BACKOFF_SECONDS
        while True:
            try:
                await self._queues.publish(publications)
            except QueueError as error:
                self._counters.queue_errors += 1
                self._say_unwritten("cannot write a report, trying again: %s", error)
                await trio.sleep(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
            except MessageError as error:
                self._say_reduced("a report cannot be written: %s", error)
                return
            else:
                return

    def _is_possible(self, publication: Publication) -> bool:
        try:
            self._queues.check(publication)
        except MessageError:
            return False
        return True

    async def _settle_later(self, settlement: Settlement) -> None:
        await trio.sleep(MAX_BACKOFF_SECONDS)
        self._add(Finished(settlement))


def _result(report: Report, attempt: int, now: float) -> Result:
    outcome, tls = report.outcome, report.tls or {}
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
        kind=outcome.kind or None,
        rule=outcome.rule or None,
        authentication=report.mechanism,
        cipher=tls.get("cipher"),
        certificate=tls.get("certificate"),
    )


def _problem(result: Result) -> str:
    """Why a message has failed, in a bounded text."""
    reply = (result.code, result.status, result.description)
    words = " ".join(str(part) for part in reply if part)[:MAX_REASON]
    return words or f"{result.type} ({result.state})"


def _copy(properties: dict[str, Any], body: bytes | None) -> Message:
    """The message for the result queues: with a body only if ``keepmime`` asks for one."""
    properties = without_password(properties)
    if properties.get("keepmime"):
        return Message(dict(properties), body)
    return Message({name: value for name, value in properties.items() if name not in BODIES})


def _set_aside(message: Message, error: Exception) -> Message:
    """A form that any queue accepts, of a message that no queue takes as it is."""
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


def _told(queues: Sequence[str], reported: bool) -> str:
    """Who hears of a failed message."""
    if not queues:
        if reported:
            return "its sender gets a report"
        return "no queue gets a report of it, see rabbitmq-failure"
    text = f"'mailerq queue read {queues[-1]}' has its report"
    return f"{text}, and its sender gets one" if reported else text


def _shown(value: object) -> str:
    """A property for the log; a value of another type may have any size."""
    return value[:MAX_REASON] if isinstance(value, str) else f"({type(value).__name__})"


def _log_line(message: Message, result: Result) -> str:
    """One line of the send log, without its date. README.md documents the form."""
    tags = message.properties.get("tags")
    return " ".join(
        (
            f"{result.state}:{result.result}",
            str(result.attempt),
            f"<{escape_field(message.envelope)}> <{escape_field(message.recipient)}>",
            f"[{result.local_ip or ''}] [{result.remote_ip or ''}]",
            ",".join(map(escape_field, map(str, tags))) if isinstance(tags, list) else "",
            f"{result.code or ''} {result.status or ''} {escape(result.description or '')}",
            *((f"({result.cipher['version']})",) if result.cipher else ()),
        )
    )
