"""What recipients' domains and their hosts demand of TLS, and the record of what came of it.

`Policies` asks two sources, each of which may be missing: MTA-STS by the recipient's domain, and
DNSSEC for the MX records of the domain and the TLSA records of its hosts. `mailerq.outbound.sites`
asks for a domain when it finds the hosts of that domain; `mailerq.outbound.session` asks for the
records of a host before it connects. `mailerq.rules.security` has what they return.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final, Protocol

from mailerq.net.dane import Standing
from mailerq.rules.security import DomainPolicy, StsPolicy, TlsaSet, TlsFailure

__all__ = ["NO_POLICIES", "NO_POLICY", "Dane", "MtaSts", "Policies", "TlsRecorder"]

log = logging.getLogger("mailerq.delivery")


class MtaSts(Protocol):
    """Finds MTA-STS policies (RFC 8461). Runs on the home worker."""

    async def find(self, domain: str) -> StsPolicy | None:
        """The policy in force for a recipient's domain, in lower case and A-labels, or None.

        A policy of mode ``none`` is None. Raises `PolicyUnknown` if nobody can know now; any other
        exception is a defect, and mail for the domain waits then too.
        """


class Dane(Protocol):
    """Finds and applies TLSA records (RFC 7672). Runs on the home worker."""

    async def is_secure(self, domain: str) -> bool:
        """Whether DNSSEC proves the MX records of a domain, or that it has none.

        Raises `PolicyUnknown` if that cannot be known now.
        """

    async def is_proved(self, host: str) -> bool:
        """Whether DNSSEC proves the addresses of a host that the operator has named; never raises
        for what the DNS says.
        """

    async def names(self, domain: str) -> tuple[str, ...]:
        """The names of a secure domain that count in certificates of its hosts.

        There are some only if a host has a record for which they count (RFC 7672, section 3.2.2).
        Raises `PolicyUnknown`.
        """

    async def tlsa(self, host: str, port: int, names: Sequence[str] = ()) -> TlsaSet | None:
        """The usable TLSA records of a host of a secure domain, or None if it has none.

        `names` are those of the domain, which become names of the set where they count.
        Returns a set without records if there are some and none is usable. Raises `PolicyUnknown`:
        the host is not used then.
        """

    def standing(self) -> Standing:
        """Whether DANE is in force here."""

    def verify(self, records: TlsaSet, chain: Sequence[bytes], *, now: float) -> TlsFailure | None:
        """Why a certificate chain in DER, the peer's own first, does not match; None if it does.

        `now` is in seconds since 1970. Called once for each handshake that is not resumed; bounded
        in time for any chain.
        """


class TlsRecorder(Protocol):
    """Is told of each new handshake, and of each failure to get to one (RFC 8460).

    It also hears what became of its own reports by mail.
    """

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
        """A connection to `host` for the recipients' `domain` had this end; None: TLS works.

        `policy` is what the domain has published, `records` those of the host. `helo` is the name
        in the peer's banner. An address is empty if there was no connection. A policy in mode
        ``testing`` is checked for this report only: the mail may have gone nevertheless. Never
        raises; called on the home worker.
        """

    def report_ended(self, address: str, problem: str) -> None:
        """A report to an address was delivered, or has failed for good with a problem.

        Never raises; called on the home worker.
        """


class Policies:
    """The policies in force; without sources there are none."""

    def __init__(
        self,
        *,
        sts: MtaSts | None = None,
        dane: Dane | None = None,
        recorder: TlsRecorder | None = None,
    ) -> None:
        self.sts = sts
        self.dane = dane
        self.recorder = recorder

    @property
    def are_recorded(self) -> bool:
        """Whether anybody is told of handshakes."""
        return self.recorder is not None

    @property
    def exist(self) -> bool:
        """Whether there is a source to ask."""
        return self.sts is not None or self.dane is not None

    async def find(self, domain: str) -> DomainPolicy:
        """What a recipient's domain has published. Raises `PolicyUnknown`."""
        policy = await self.sts.find(domain) if self.sts is not None else None
        if self.dane is None or not await self.dane.is_secure(domain):
            return NO_POLICY if policy is None else DomainPolicy(policy)
        return DomainPolicy(policy, True, await self.dane.names(domain))

    async def of_smarthost(self, host: str) -> DomainPolicy:
        """What counts for a host that the operator has named: its TLSA records, if DNSSEC proves
        its addresses. MTA-STS is about MX hosts (RFC 8461, section 2).
        """
        if self.dane is None or not await self.dane.is_proved(host):
            return NO_POLICY
        return DomainPolicy(secure=True)

    async def tlsa(self, policy: DomainPolicy, host: str, port: int) -> TlsaSet | None:
        """The TLSA records of a host, if its domain is secure. Raises `PolicyUnknown`."""
        if self.dane is None or not policy.secure:
            return None
        return await self.dane.tlsa(host, port, policy.names)

    def record(
        self,
        domain: str,
        policy: DomainPolicy,
        records: TlsaSet | None,
        host: str,
        failure: TlsFailure | None,
        *,
        remote_ip: str = "",
        local_ip: str = "",
        helo: str = "",
    ) -> None:
        """Tell the recorder, if there is one; a defect of it costs no mail."""
        if self.recorder is None:
            return
        try:
            self.recorder.handshake(
                domain, policy, records, host, remote_ip, local_ip, helo, failure
            )
        except Exception:
            log.exception("a TLS handshake with %s cannot be recorded", host)

    def report_ended(self, address: str, problem: str) -> None:
        """Tell the recorder what became of a report; a defect of it costs no mail."""
        if self.recorder is None:
            return
        try:
            self.recorder.report_ended(address, problem)
        except Exception:
            log.exception("the end of a TLS report to %s cannot be recorded", address)


NO_POLICY: Final = DomainPolicy()
"""The domain has published nothing."""

NO_POLICIES: Final = Policies()
"""Finds nothing, and records nothing."""
