"""Count how TLS works, by recipients' domain and day, and report it to the domains (RFC 8460).

Theory of operation
-------------------
Deliveries tell of each new handshake, and of each that did not come about
(`mailerq.outbound.policies.TlsRecorder`). What is equal is counted together in memory, and added to
a file that all processes share (`mailerq.store.tls_counts`), once a minute and at the end.

When a day in UTC is over, one process of the daemon, see `mailerq.outbound.published`, asks each
domain of the day at a random time of the next hours where it wants its report: at an address, or
at a URL. A report by mail is a message like any other, in the outbox. A report by HTTPS is posted.
What fails is tried again for a day after the end of the day that is reported. A place that took no
report in the end rests: it gets none for some days, and for longer if it fails again after that.
The state of each report, and the places that rest, are in the same file, so a restart goes on where
the last process ended. A crash between the sending of a report and the note of it sends that report
twice, with the same id.

Connections for reports alone are not counted: otherwise each report would make another one the next
day. `mailerq.mail.tls_report.is_report` says which messages those are.

Everything here runs on the home worker; threads use the file.
"""

from __future__ import annotations

import json
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, TypeVar

import trio

from mailerq.address import parse_mailbox
from mailerq.config import Config
from mailerq.errors import AddressError, QueueError, StoreError
from mailerq.live import Live
from mailerq.mail.tls_report import (
    MEDIA_TYPE,
    REPORT_TAG,
    Day,
    Detail,
    PolicyCount,
    Sender,
    destinations,
    document,
    pack,
    record_name,
    report_mail,
)
from mailerq.message import Message, format_time
from mailerq.net.https import Https, NoResponse, Url
from mailerq.net.logs import Ration
from mailerq.net.resolver import NoHosts, Resolver
from mailerq.outbound.sts import FetchFailed
from mailerq.rules.security import MX_MISMATCH, DomainPolicy, Reason, StsPolicy, TlsaSet, TlsFailure
from mailerq.store.tls_counts import Due, Session, TlsCounts

__all__ = ["TlsReports", "policies_of", "sender_of"]

log = logging.getLogger("mailerq.delivery")

FLUSH_SECONDS: Final = 60.0
"""Interval of writes to the file: a crash loses the counts since the last write."""

MAX_PENDING: Final = 10_000
"""Kinds of sessions in memory that are told apart between two writes; as many more have no details,
and what is beyond is not counted."""

MAX_STRINGS: Final = 100
MAX_STRING: Final = 200
"""Lines of a policy in a report, and characters of a line."""

FIRST_SECONDS: Final = 600
"""After the end of a day all processes have written what they have counted."""

SPREAD_SECONDS: Final = 4 * 3600
"""Reports are sent at a random time up to this after the end of the day (section 4.1)."""

PLAN_SECONDS: Final = 600.0
"""Interval of the look for domains whose day is over."""

RETRY_SECONDS: Final = 86400.0
"""Reports are not tried after this time from the end of the day (section 4.1)."""

FORGET_SECONDS: Final = 2 * 86400.0
"""Counts and states of a day are dropped this time after its end."""

FIRST_RETRY_SECONDS: Final = 900.0
MAX_RETRY_SECONDS: Final = 4 * 3600.0
"""The first wait after a failure, which doubles, and the longest."""

REPORTS_AT_A_TIME: Final = 4
REPORTS_OF_A_STEP: Final = 100
STEPS_OF_A_ROUND: Final = 10
"""An answer to the question where a report is wanted makes reports that are due at once."""

MAX_PROBLEM: Final = 200
"""Characters of a problem that are kept."""

MAIL: Final = "mailto:"

NO_POLICY: Final = "no-policy-found"
STS: Final = "sts"
TLSA: Final = "tlsa"

ABOUT_TLSA: Final = (Reason.TLSA_INVALID, Reason.DNSSEC_INVALID, Reason.DANE_REQUIRED)
ABOUT_NAMES: Final = (
    Reason.HOST_MISMATCH, Reason.EXPIRED, Reason.NOT_TRUSTED,
    Reason.STS_FETCH, Reason.STS_INVALID, Reason.STS_WEBPKI,
)  # fmt: skip
"""Failures under one of two policies; others are failures under both."""

UNUSABLE: Final = TlsFailure(
    Reason.TLSA_INVALID, "none of the TLSA records is usable", "no-usable-tlsa-record"
)
"""What counts under records of which none is usable, if nothing else failed. The mail has gone."""

T = TypeVar("T")
Counts = dict[tuple[int, Session], int]


class TlsReports:
    """A `TlsRecorder`, and the sender of reports. `publish` puts a message into the outbox.

    `lines` gives the text of a policy. `doubt` hears of a domain under whose policy a delivery has
    failed.
    """

    def __init__(
        self,
        live: Live,
        resolver: Resolver,
        https: Https,
        file: TlsCounts,
        publish: Callable[[Message], Awaitable[None]],
        *,
        lines: Callable[[StsPolicy], Sequence[str]] = lambda policy: (),
        doubt: Callable[[str], object] = lambda domain: None,
        clock: Callable[[], float] = time.time,
        lot: Callable[[], float] = random.random,
    ) -> None:
        self._live = live
        self._resolver = resolver
        self._https = https
        self._file = file
        self._publish = publish
        self._lines = lines
        self._doubt = doubt
        self._clock = clock
        self._lot = lot
        self._pending: Counts = {}
        self._ended: dict[str, str] = {}
        self._lost = 0
        self._next_plan = -1.0
        self._turn = trio.CapacityLimiter(1)
        self._say_unkept = Ration(log.error, 1, "counts for TLS reports failed %d times more")
        self._say_unsent = Ration(log.warning, 10, "and %d TLS reports more could not be sent")

    @property
    def _config(self) -> Config:
        return self._live.current.config

    # Counting

    def handshake(
        self,
        domain: str,
        policy: DomainPolicy,
        records: TlsaSet | None,
        host: str,
        remote_ip: str,
        local_ip: str,
        helo: str,
        failure: TlsFailure | None,
    ) -> None:
        """Count a session, under each policy that applied to it."""
        if failure is not None and policy.sts is not None:
            self._doubt(domain)
        if not self._config.tls_report or domain.startswith("["):
            return
        applied: list[tuple[str, str]] = []
        unknown = failure is not None and failure.reason is Reason.DNSSEC_INVALID
        if records is not None or unknown:
            applied.append((TLSA, _text(_of_tlsa(records), (host,))))
        if policy.sts is not None:
            applied.append((STS, _text(self._lines(policy.sts), policy.sts.mx_patterns)))
        unusable = records is not None and not records.records
        for kind, text in applied or [(NO_POLICY, "")]:
            own = failure
            if failure is not None and len(applied) > 1 and not _is_about(failure, kind):
                own = None
            if own is None and kind == TLSA and unusable:
                own = UNUSABLE
            if own is not None:
                self._count(
                    Session(
                        domain, kind, text, str(own.reason), local_ip, host[:MAX_STRING],
                        helo[:MAX_STRING], remote_ip, own.code[:MAX_STRING],
                    )
                )  # fmt: skip
            elif failure is None:
                self._count(Session(domain, kind, text))

    def policy_failed(self, domain: str, policy: StsPolicy | None, failed: FetchFailed) -> None:
        """Count a policy of MTA-STS that could not be fetched; `policy` is in force instead."""
        if not self._config.tls_report:
            return
        text = "" if policy is None else _text(self._lines(policy), policy.mx_patterns)
        code = " ".join(failed.text.split())[:MAX_STRING]
        self._count(Session(domain, STS, text, str(failed.reason), code=code))

    def _count(self, session: Session) -> None:
        key = Day.of(self._clock()).begin, session
        self._add(self._pending, key, 1)

    def _add(self, counts: Counts, key: tuple[int, Session], count: int) -> None:
        if key not in counts and len(counts) >= MAX_PENDING:
            key = key[0], key[1].bare
            if key not in counts and len(counts) >= 2 * MAX_PENDING:
                self._lost += count
                return
        counts[key] = counts.get(key, 0) + count

    def report_ended(self, address: str, problem: str) -> None:
        """Remember what became of a report by mail: an empty text if it was delivered."""
        self._end(MAIL + address, problem)

    def _end(self, place: str, problem: str) -> None:
        if place in self._ended or len(self._ended) < MAX_PENDING:
            self._ended[place] = problem[:MAX_PROBLEM]

    async def flush(self) -> None:
        """Add what was counted to the file, and the places that took no report.

        Never raises but for cancellation.
        """
        with trio.CancelScope(shield=True):  # a count in a thread cannot be taken back
            await self._flush_counts()
            await self._flush_ended()

    async def _flush_ended(self) -> None:
        ended, self._ended = self._ended, {}
        if not ended:
            return
        try:
            await self._in_thread(partial(self._file.ended, ended, self._clock()))
        except StoreError as error:
            self._say_unkept("places that took no TLS report are not written: %s", error)
            for place, problem in ended.items():
                self._end(place, self._ended.get(place, problem))

    async def _flush_counts(self) -> None:
        counts, self._pending = self._pending, {}
        if not counts:
            return
        try:
            self._lost += await self._in_thread(partial(self._file.add, counts))
        except StoreError as error:
            self._say_unkept("counts for TLS reports are not written: %s", error)
            for key, count in counts.items():
                self._add(self._pending, key, count)
        if lost := self._lost:
            self._lost = 0
            log.warning("%d TLS sessions are not in the reports: too many kinds of them", lost)

    async def run(self) -> None:
        """Write counts until cancelled."""
        while True:
            await trio.sleep(FLUSH_SECONDS)
            await self.flush()
            self._say_unkept.flush_late()
            self._say_unsent.flush_late()

    # Reports

    async def round(self) -> None:
        """Send the reports that are due. Never raises but for cancellation."""
        now = self._clock()
        try:
            if not 0 <= self._next_plan - now <= PLAN_SECONDS:
                await self._in_thread(partial(self._file.forget, now - FORGET_SECONDS))
                if self._config.tls_report:
                    await self.plan()
                self._next_plan = now + PLAN_SECONDS
            if not self._config.tls_report:
                return
            for _ in range(STEPS_OF_A_ROUND):
                due = await self._in_thread(partial(self._file.due, now, REPORTS_OF_A_STEP))
                if not due:
                    return
                await self._handle_all(due)
        except StoreError as error:
            self._say_unkept("TLS reports cannot be sent: %s", error)

    async def _handle_all(self, due: Sequence[Due]) -> None:
        places = trio.CapacityLimiter(REPORTS_AT_A_TIME)
        async with trio.open_nursery() as nursery:
            for each in due:
                nursery.start_soon(self._handle, each, places)

    async def plan(self) -> None:
        """Have the domains of all days that are over asked. Raises `StoreError`."""
        today = Day.of(self._clock()).begin
        spread = SPREAD_SECONDS - FIRST_SECONDS
        await self._in_thread(partial(self._file.plan, today, FIRST_SECONDS, spread))

    async def _handle(self, due: Due, places: trio.CapacityLimiter) -> None:
        async with places:
            try:
                problem = await self._send(due) if due.place else await self._ask(due)
                if problem is not None:
                    await self._try_again(due, problem[:MAX_PROBLEM])
            except StoreError as error:
                self._say_unkept("the state of TLS reports is not written: %s", error)
            except Exception:
                # Our own defect must not stop the other reports, or the engine.
                log.exception("the TLS report for %s failed", due.domain)
                await self._give_up(due, "a defect of mailerq, see the log")

    async def _try_again(self, due: Due, problem: str) -> None:
        now = self._clock()
        wait = min(FIRST_RETRY_SECONDS * 2.0 ** min(due.tries, 20), MAX_RETRY_SECONDS)
        again = now + wait * (1 + self._lot() / 2)
        if again > Day(due.day).end + RETRY_SECONDS:
            # A mail that no queue took says nothing about its place.
            if due.place and not due.place.startswith(MAIL):
                self._end(due.place, problem)
            await self._give_up(due, problem)
            return
        await self._in_thread(partial(self._file.again, due, again, problem))

    async def _give_up(self, due: Due, problem: str) -> None:
        self._say_unsent(
            "the TLS report of %s for %s could not be sent to %s: %s",
            Day(due.day).name,
            due.domain,
            due.place or "anybody",
            problem,
        )
        try:
            await self._in_thread(partial(self._file.done, due, "failed", problem))
        except StoreError as error:
            self._say_unkept("the state of TLS reports is not written: %s", error)

    async def _ask(self, due: Due) -> str | None:
        """Ask a domain where it wants its report; returns what went wrong. Raises `StoreError`."""
        answer = await self._resolver.texts(record_name(due.domain))
        if isinstance(answer, NoHosts):
            return answer.description
        sender = sender_of(self._config)
        ours = sender.address.rpartition("@")[2] or self._config.hostname
        number = f"{Day(due.day).name}.{secrets.token_hex(8)}@{ours}"
        places = dict.fromkeys(destinations(answer[0]), number)
        await self._in_thread(partial(self._file.wanted, due, places, self._clock()))
        return None

    async def _send(self, due: Due) -> str | None:
        """Send a report to one place; returns what went wrong. Raises `StoreError`."""
        now = self._clock()
        if (rest := await self._in_thread(partial(self._file.resting, due.place, now))) is not None:
            text = f"none until {format_time(rest[0])}, for an earlier one failed: {rest[1]}"
            await self._in_thread(partial(self._file.done, due, "unsent", text))
            return None
        sender = sender_of(self._config)
        day = Day(due.day)
        found = await self._in_thread(partial(self._file.sessions, due.day, due.domain))
        report = document(sender, day, due.number, policies_of(due.domain, found))
        packed = await trio.to_thread.run_sync(pack, report)
        if not due.place.startswith(MAIL):
            problem = await self._post(due.place, packed)
            if problem is not None:
                return problem
            self._end(due.place, "")
            await self._in_thread(partial(self._file.done, due, "sent"))
            return None
        if not sender.address:
            await self._in_thread(
                partial(self._file.done, due, "unsent", "tls-report-from is not set")
            )
            return None
        to = due.place.removeprefix(MAIL)
        body = report_mail(sender, due.domain, to, day, due.number, packed, now=now)
        message = Message(
            {
                "envelope": "",
                "recipient": to,
                "tags": [REPORT_TAG],
                "tlsrequired": False,
                "maxdelivertime": format_time(now + RETRY_SECONDS),
            },
            body,
        )
        try:
            await self._publish(message)
        except QueueError as error:
            return str(error)
        await self._in_thread(partial(self._file.done, due, "sent"))
        return None

    async def _post(self, place: str, packed: bytes) -> str | None:
        """Post a report; returns what went wrong.

        The report says nothing that is secret, so the certificate is not checked (section 5.4).
        """
        try:
            url = Url.parse(place)
        except ValueError as error:
            return str(error)
        response = await self._https.request(
            url, method="POST", headers={"Content-Type": MEDIA_TYPE}, body=packed, verify=False
        )
        if isinstance(response, NoResponse):
            return f"{response.failure}: {response.text}"
        if not 200 <= response.status < 300:
            return f"the web server answers {response.status}"
        return None

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(function, limiter=self._turn)


def sender_of(config: Config) -> Sender:
    """Who reports, by the settings."""
    address = ""
    if config.tls_report_from:
        try:
            address = str(parse_mailbox(config.tls_report_from, utf8=False))
        except AddressError:
            address = ""  # the settings were checked
    organization = config.tls_report_organization or config.hostname
    return Sender(organization, config.tls_report_contact or address, address)


def policies_of(domain: str, sessions: Sequence[tuple[Session, int]]) -> list[PolicyCount]:
    """What a report says of the sessions of a domain."""
    found: dict[tuple[str, str], tuple[int, list[Detail]]] = {}
    for session, count in sessions:
        successes, details = found.get((session.kind, session.policy), (0, []))
        if session.result:
            details.append(
                Detail(
                    session.result, count, session.local_ip, session.host, session.helo,
                    session.remote_ip, session.code, session.information,
                )
            )  # fmt: skip
        else:
            successes += count
        found[session.kind, session.policy] = successes, details
    return [
        PolicyCount(kind, domain, *_parts(text), successes, details)
        for (kind, text), (successes, details) in sorted(found.items(), key=lambda each: each[0])
    ]


def _text(strings: Sequence[str], hosts: Sequence[str]) -> str:
    """A policy as it is counted."""
    return json.dumps([_short(strings), _short(hosts)])


def _short(texts: Sequence[str]) -> list[str]:
    return [text[:MAX_STRING] for text in texts[:MAX_STRINGS]]


def _parts(text: str) -> tuple[Sequence[str], Sequence[str]]:
    if not text:
        return (), ()
    strings, hosts = json.loads(text)
    return strings, hosts


def _of_tlsa(found: TlsaSet | None) -> list[str]:
    return [
        f"{record.usage} {record.selector} {record.matching} {record.data.hex()}"
        for record in sorted(() if found is None else found.records)
    ]


def _is_about(failure: TlsFailure, kind: str) -> bool:
    """Whether a failure is one under this policy, of two that applied."""
    if failure.reason in ABOUT_TLSA:
        return kind == TLSA
    if failure.reason in ABOUT_NAMES or failure.code == MX_MISMATCH:
        return kind == STS
    return True
