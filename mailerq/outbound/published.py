"""What recipients' domains publish about TLS: found, kept, and reported to them, for an engine.

Theory of operation
-------------------
`Published` puts together the policies of MTA-STS (`mailerq.outbound.sts`), the counts and reports
of TLS-RPT (`mailerq.outbound.tls_reports`), and the files that both keep in the queue directory.
All processes of a daemon find policies and count sessions. What must happen once for all of them,
policies that are fetched again without mail and the reports of a day, is the work of the process
that holds the lock of `LOCK_NAME`. The kernel releases the lock when the process ends, and another
one takes over at its next look.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from mailerq.errors import MailerqError
from mailerq.live import Live
from mailerq.locks import Lead
from mailerq.message import Message
from mailerq.net.control import Request
from mailerq.net.https import Https
from mailerq.net.resolver import Resolver
from mailerq.outbound.policies import Dane, Policies
from mailerq.outbound.sts import StsPolicies
from mailerq.outbound.tls_reports import TlsReports
from mailerq.store.sts_file import StsFile
from mailerq.store.tls_counts import TlsCounts

__all__ = ["Published"]

log = logging.getLogger("mailerq")

LOCK_NAME: Final = "policies.lock"
"""The file in the queue directory whose lock one process of the daemon holds."""

ROUND_SECONDS: Final = 60.0
"""Interval of the look for policies and reports that are due, and for a free lock."""


class Published:
    """The policies of an engine. `run` is its task, `close` writes the last counts.

    `publish` puts a message into the outbox. `dane` finds TLSA records, if anything does.
    """

    def __init__(
        self,
        live: Live,
        resolver: Resolver,
        publish: Callable[[Message], Awaitable[None]],
        *,
        dane: Dane | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        directory = live.current.config.queue_directory  # fixed
        self._https = https = Https(resolver.addresses)
        self._sts_file = StsFile(directory, clock=clock)
        self._counts = TlsCounts(directory, clock=clock)
        self.sts = StsPolicies(
            live,
            resolver,
            https,
            self._sts_file,
            report=lambda *values: self.reports.policy_failed(*values),
            clock=clock,
        )
        self.reports = TlsReports(
            live,
            resolver,
            https,
            self._counts,
            publish,
            lines=self.sts.lines,
            doubt=self.sts.doubt,
            clock=clock,
        )
        self.policies = Policies(sts=self.sts, dane=dane, recorder=self.reports)
        self._lead = Lead(os.path.join(directory, LOCK_NAME))
        self._wake = trio.Event()

    def reload(self) -> None:
        """Apply changed settings, and read the authorities of certificates again."""
        self._https.forget_authorities()
        self.sts.forget()

    async def run(self) -> None:
        """Do what is due until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.reports.run)
            nursery.start_soon(self._rounds, self.sts.round)
            nursery.start_soon(self._rounds, self.reports.round)

    async def _rounds(self, function: Callable[[], Awaitable[None]]) -> None:
        while True:
            wake = self._wake  # before the round: it may be set meanwhile
            if self._is_mine():
                await function()
            with trio.move_on_after(ROUND_SECONDS):
                await wake.wait()

    def _is_mine(self) -> bool:
        """Whether this process does what one process does for all."""
        try:
            return self._lead.take()
        except OSError as error:
            log.error("%s cannot be locked: %s", self._lead.path, error.strerror or error)
            return False

    async def command(self, request: Request) -> None:
        """What operators' commands ask of each process; see `mailerq.cli.sts`.

        ``forget`` is a domain whose policy has changed, or "" for all; ``flush`` writes the counts,
        and ``send`` has reports that are due sent. Raises `MailerqError`.
        """
        domain = request.get("forget")
        if domain is not None:
            if not isinstance(domain, str):
                raise MailerqError("forget: expected a domain")
            self.sts.forget(domain or None)
        if request.get("flush"):
            await self.reports.flush()
        if request.get("send"):
            wake, self._wake = self._wake, trio.Event()
            wake.set()

    async def explained(self, answer: dict[str, Any]) -> dict[str, Any]:
        """An answer of `Explainer`, with the MTA-STS policy of the domain if that counts."""
        if answer.get("route", {}).get("by") != "MX records":
            return answer
        if (policy := await self.sts.describe(answer["domain"])) is not None:
            answer["mta-sts"] = policy
        return answer

    async def close(self) -> None:
        """Write the last counts, and leave the work for all to another process."""
        await self.reports.flush()
        self._sts_file.close()
        self._counts.close()
        try:
            self._lead.close()
        except OSError as error:
            log.error("%s: %s", self._lead.path, error.strerror or error)
