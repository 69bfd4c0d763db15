"""TLS of one connection: what it needs, the handshake, and what it proves.

Theory of operation
-------------------
`Securing.prepare` says what a connection to a host must prove: what the operator, the message and
the recipient's domain demand, and the TLSA records of the host, which are looked up first. With a
login, TLS is demanded where the login may not go in clear. `handshake` runs when the peer has said
220 to STARTTLS. `judge` compares what is proved with what is demanded once the session is ready.

Where nothing demands TLS and it fails, mail may go in clear, but never over this connection: the
peer and somebody on the way may have different ideas of its state. `goes_clear` tells the session
to begin anew, and the host is remembered for `connection-tls-retry`.

A policy in mode ``testing`` demands nothing. The certificate is checked after the handshake, and
only the recorder is told.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mailerq.mail.tls_report import is_report
from mailerq.net.client_tls import MAX_TICKET_BYTES
from mailerq.net.stream import HandshakeFailed, StreamLost
from mailerq.outbound.jobs import Report
from mailerq.outbound.race import where
from mailerq.rules import responses
from mailerq.rules.certificates import authorities, facts_of, reason_of, webpki_failure
from mailerq.rules.logins import may_go_in_clear
from mailerq.rules.security import (
    MX_MISMATCH,
    Demands,
    Level,
    PolicyUnknown,
    Proof,
    Reason,
    TlsaSet,
    TlsFailure,
    covers,
    missing,
)
from mailerq.wire.client import Failed, Problem, Refused, Step

if TYPE_CHECKING:
    from mailerq.net.client_tls import ClientTls, Ticket
    from mailerq.net.resolver import Host
    from mailerq.net.stream import Stream
    from mailerq.outbound.flow import Flow
    from mailerq.rules.certificates import Facts
    from mailerq.rules.responses import Outcome
    from mailerq.wire.client import ClientProtocol, Event

__all__ = ["Securing"]


class Securing:
    """What one connection of a flow to a host needs of TLS, and has."""

    __slots__ = (
        "_facts", "_key", "_number", "_resumed", "_secured", "_tls", "demands", "failure",
        "flow", "for_login", "host", "proof", "records", "tries",
    )  # fmt: skip

    def __init__(self, flow: Flow, host: Host, demands: Demands) -> None:
        self.flow = flow
        self.host = host
        self.demands = demands
        self.records: TlsaSet | None = None
        self.tries = False
        self.for_login = False
        """TLS is demanded for the login alone."""
        self.proof = Proof(host.name)
        self.failure: TlsFailure | None = None
        self._facts: Facts | None = None
        self._key: object = None
        self._resumed: Ticket | None = None
        self._tls: ClientTls
        self._secured: dict[str, Any] | None = None
        self._number = flow.limits_number

    @classmethod
    async def prepare(cls, flow: Flow, host: Host, *, clear: bool) -> Securing | Report:
        """What a connection to a host needs; a report that the host cannot be used now.

        `clear`: TLS with the host has just failed.
        """
        if host.address.startswith("/"):
            # A socket of this host: nobody listens on the way.
            return cls(flow, host, Demands(logins=flow.demands.logins))
        demands, site = flow.wanted, flow.site
        self = cls(flow, host, demands)
        proved = site.trusted or not site.mx or site.policy.proves_hosts
        if demands.requiretls and not proved:
            text = (
                f"{site.label}: neither MTA-STS nor DNSSEC proves its hosts, which REQUIRETLS"
                " demands"
            )
            return self._report(TlsFailure(Reason.FAILURE, text, requiretls=True), "dns")
        if site.policy.secure:
            try:
                self.records = await flow.policies.tlsa(site.policy, host.name, site.port)
            except PolicyUnknown as error:
                failure = TlsFailure(Reason.DNSSEC_INVALID, f"{where(host)}: {error}")
                self._record(failure)
                return self._report(failure, "dns")
            if self.records is not None:
                self.demands = demands = demands | self.records.demands
        if demands.logins and not demands.encrypts:
            if not may_go_in_clear(host.address, flow.config):
                if not demands.tries:
                    return Report(responses.login_in_clear(where(host)))
                self.demands = demands = demands | Demands(Level.REQUIRED)
                self.for_login = True
        if demands.tries:
            broken = clear or flow.history.is_tls_broken(host.address)
            self.tries = not broken or demands.encrypts
        return self

    def _report(self, failure: TlsFailure, state: str) -> Report:
        return Report(responses.tls_failed(failure, state=state))

    # The handshake

    async def handshake(self, stream: Stream, *, helo: str) -> None:
        """Do the handshake, and check the certificate; `failure` says what went wrong.

        Raises `StreamLost` after a failure that ended the connection.
        """
        demands, host, tls = self.demands, self.host, self.flow.tls
        records = self.records if self.records is not None and self.records.records else None
        verify = demands.webpki
        context = await tls.context(verify=verify)
        name = host.name if records is None or verify else records.base_domain
        self._key = (name, host.name, self.flow.site.port, verify, demands.tlsa)
        self._tls = tls
        ticket = tls.tickets.take(self._key)
        session = None if ticket is None else ticket.session
        try:
            await stream.start_tls(
                context, server_side=False, server_hostname=name, session=session
            )
        except HandshakeFailed as error:
            reason = reason_of(error.verify_code)
            self._fail(reason, str(error), stream, helo)
            raise
        except StreamLost as error:
            self._fail(Reason.FAILURE, str(error), stream, helo)
            raise
        except ValueError as error:
            # Such names come from the DNS: ssl cannot put them into the handshake.
            self._fail(Reason.FAILURE, f"its name cannot be used: {error}", stream, helo)
            raise StreamLost(f"{host.name!a} cannot be named in a TLS handshake") from error
        if ticket is not None and stream.is_resumed:
            # No certificate was sent: what was proved then counts.
            self.proof, self._facts, self._resumed = ticket.proof, ticket.facts, ticket
            return
        chain = stream.peer_chain
        self._facts = facts_of(chain[0]) if chain else None
        proof = Proof(host.name, encrypted=True, webpki=verify)
        if records is not None:
            dane = self.flow.policies.dane
            assert dane is not None, "the records are from there"
            failure = dane.verify(records, chain, now=time.time())
            if failure is not None:
                self._fail(failure.reason, failure.text, stream, helo, failure.code)
                return
            proof = Proof(host.name, True, verify, demands.tlsa)
        self.proof = proof
        await self._tell_success(stream, chain, helo)

    async def _tell_success(self, stream: Stream, chain: list[bytes], helo: str) -> None:
        """Tell the recorder of a handshake; one of a policy in testing may have failed to prove."""
        failure = None
        sts = self.flow.site.policy.sts
        if sts is not None and self.flow.site.policy.enforced is None:
            if not sts.allows(self.host.name):
                text = f"{self.host.name} matches no pattern of {sts}"
                failure = TlsFailure(Reason.FAILURE, text, MX_MISMATCH)
            elif not self.proof.webpki:
                trusted = authorities(await self.flow.tls.authorities())
                found = webpki_failure(chain, self.host.name, trusted, now=time.time())
                if found is not None:
                    failure = TlsFailure(found[0], f"{where(self.host)}: {found[1]}")
        self._record(failure, stream, helo)

    def _fail(
        self,
        reason: Reason,
        text: str,
        stream: Stream | None,
        helo: str,
        code: str = "",
        *,
        timed_out: bool = False,
    ) -> None:
        because = f"; demanded: {self.demands}" if self.demands.encrypts else ""
        requiretls = self.demands.requiretls
        text = f"{where(self.host)}: {text}{because}"
        self.failure = TlsFailure(reason, text, code, requiretls, timed_out)
        self._record(self.failure, stream, helo)

    def _record(
        self, failure: TlsFailure | None, stream: Stream | None = None, helo: str = ""
    ) -> None:
        site, jobs = self.flow.site, self.flow.jobs
        if not site.mx or (jobs and all(is_report(job.message.properties) for job in jobs)):
            return  # a report about a connection for reports would cause the next report
        self.flow.policies.record(
            self.flow.policy_domain(),
            site.policy,
            self.records,
            self.host.name,
            failure,
            remote_ip=self.host.address,
            local_ip="" if stream is None else stream.local[0],
            helo=helo,
        )

    # The end of the beginning

    def ended(self, event: Event | None, stream: Stream, helo: str) -> TlsFailure | None:
        """The failure of TLS for which a session has ended before it was ready, if that is why."""
        if self.failure is not None or not self.tries:
            return self.failure
        if isinstance(event, Refused) and event.step is Step.STARTTLS:
            if event.ours:
                text = "does not offer STARTTLS"
            else:
                text = f"answers STARTTLS with {event.reply.code} {event.reply.description}"
            self._fail(Reason.NO_STARTTLS, text, stream, helo)
        elif isinstance(event, Failed) and event.step is Step.STARTTLS:
            text = f"TLS failed: {event.description}"
            late = event.problem is Problem.TIMEOUT
            self._fail(Reason.FAILURE, text, stream, helo, timed_out=late)
        return self.failure

    @property
    def goes_clear(self) -> bool:
        """Whether TLS failed and mail may go to the host in clear, over another connection."""
        return self.failure is not None and not self.demands.encrypts

    def judge(self, protocol: ClientProtocol, stream: Stream) -> TlsFailure | None:
        """Why a session that is ready does not prove what is demanded, or None."""
        demands = self.demands
        if self.failure is not None:
            return self.failure
        if not (protocol.secure or demands.logins or demands.encrypts):
            if self.tries and self.flow.policies.are_recorded:
                text = f"{where(self.host)} does not offer STARTTLS"
                helo = protocol.mta or ""
                self._record(TlsFailure(Reason.NO_STARTTLS, text), stream, helo)
            return None
        proof = self.proof
        offers = _promises_tls(protocol)
        if offers != proof.requiretls or demands.logins != proof.logins:
            # A session with a login is ready only when the peer has taken the login.
            proof = self.proof = Proof(
                proof.host, proof.encrypted, proof.webpki, proof.tlsa, offers, demands.logins
            )
        if covers(proof, demands):
            return None
        lacks = ", ".join(missing(proof, demands))
        text = f"{where(self.host)}: does not prove {lacks}; demanded: {demands}"
        self.failure = TlsFailure(Reason.FAILURE, text, requiretls=demands.requiretls)
        return self.failure

    def asks_for_tls(self, properties: Mapping[str, Any], protocol: ClientProtocol) -> bool:
        """Whether a message goes with REQUIRETLS: it demands that, or only wishes and gets it."""
        if self.demands.requiretls:
            return True
        return properties.get("requiretls") is True and _promises_tls(protocol)

    def keep_ticket(self, stream: Stream) -> None:
        """Keep the ticket of a connection that ends, if the peer has sent one of a usual size.

        The size is that of what the peer has sent: a session has its ticket and its certificates.
        """
        if not self.proof.encrypted or self.failure is not None:
            return
        session = stream.session
        if session is None or not session.has_ticket:
            return
        if stream.most_spent > MAX_TICKET_BYTES:
            return
        proof = Proof(self.host.name, True, self.proof.webpki, self.proof.tlsa)
        self._tls.tickets.keep(self._key, session, proof, self._facts, self._resumed)

    def outcome(self, failure: TlsFailure) -> Outcome:
        """The end of an attempt for which TLS is not as demanded."""
        if self.for_login and failure.reason is Reason.NO_STARTTLS:
            return responses.login_in_clear(where(self.host))
        return responses.tls_failed(failure)

    def still_covers(self, number: int) -> bool:
        """Whether the connection has proved what the settings in force now demand.

        `number` is that of the settings, `Flow.limits_number`.
        """
        if number == self._number or self.host.address.startswith("/"):
            return True
        if not covers(self.proof, self.flow.wanted):
            return False
        self._number = number
        return True

    def show(self, stream: Stream) -> None:
        """Tell a trace what is demanded and what is proved."""
        if stream.tap is not None:
            stream.tap.note(self._note())

    def _note(self) -> str:
        proof = self.proof
        if not proof.encrypted:
            proved = "in clear"
        elif proof.webpki or proof.tlsa:
            ways = ["an authority"] * proof.webpki + ["TLSA records"] * bool(proof.tlsa)
            proved = f"TLS, the certificate proved by {' and '.join(ways)}"
        else:
            proved = "TLS, the certificate not checked"
        return f"security: {self.demands}; {proved}"

    # For results

    def words(self, stream: Stream) -> dict[str, Any] | None:
        """The members ``cipher`` and ``certificate`` of results; None in clear."""
        if self._secured is None and self.proof.encrypted:
            found: dict[str, Any] = {}
            if (cipher := stream.cipher) is not None:
                found["cipher"] = {
                    "name": cipher[0], "bits": cipher[2], "version": stream.tls_version,
                }  # fmt: skip
            if self._facts is not None:
                verified = self.proof.webpki or bool(self.proof.tlsa)
                found["certificate"] = self._facts.to_dict(verified=verified)
            self._secured = found
        return self._secured


def _promises_tls(protocol: ClientProtocol) -> bool:
    """Whether a peer keeps REQUIRETLS, which counts inside TLS only (RFC 8689, section 4.1)."""
    return protocol.secure and "REQUIRETLS" in protocol.extensions
