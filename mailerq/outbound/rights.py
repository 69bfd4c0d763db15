"""The rights of a flow: what the limits allow it, what it waits for, and what its sessions hold."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final

from mailerq.outbound.cells import Count
from mailerq.outbound.limits import BORROW_SECONDS, NOTHING, both
from mailerq.storage.keys import size_of

if TYPE_CHECKING:
    from mailerq.net.resolver import Host
    from mailerq.outbound.flow import Flow
    from mailerq.outbound.jobs import Job
    from mailerq.outbound.limits import Allowance, Limits, Refusal
    from mailerq.outbound.session import Session
    from mailerq.outbound.sites import Site

__all__ = ["Rights"]

REST_SECONDS: Final = 1.0
"""A flow that waits longer than this for a rate gives its mail back to the queue."""


class Rights:
    """What one flow may do. Call all methods on the home worker's thread.

    A flow that is refused waits in the line of one limit, and does not ask again before its turn.
    A session that its remote address refuses waits alone: other hosts may take the mail.
    """

    # Without the flow: the two would be a cycle, and there are many.
    __slots__ = (
        "_allowance", "_limits", "_local_ip", "_site", "limited", "rest", "waits_to_open",
        "waits_to_send",
    )  # fmt: skip

    def __init__(self, limits: Limits, site: Site, local_ip: str | None) -> None:
        self._limits = limits
        self._site = site
        self._local_ip = local_ip
        self._allowance: Allowance | None = None
        self.waits_to_send = self.waits_to_open = ""
        """Keys of the limits that the flow waits for."""
        self.rest = False
        """The flow waits for so long that it should have no mail in memory."""
        self.limited: list[Session] = []
        """Sessions that wait for a limit of their remote address."""

    @property
    def allowance(self) -> Allowance:
        """The limits in force now."""
        found = self._allowance
        if found is None or found.number != self._limits.number:
            found = self._allowance = self._limits.of_flow(self._site, self._local_ip)
        return found

    @property
    def are_paced(self) -> bool:
        """Whether each message needs a right."""
        return self.allowance.sending is not NOTHING

    def closed(self) -> Refusal | None:
        """The hours that allow no mail now."""
        closed = self.allowance.sending.closed is not None
        return self.may_open() if closed else None

    # Waiting

    def limit_over(self, key: str) -> None:
        """Wait no longer for a limit that may allow more."""
        if self.waits_to_send == key:
            self.waits_to_send = ""
        if self.waits_to_open == key:
            self.waits_to_open = ""
        self.rest = False

    def wait_to_open(self, flow: Flow, refusal: Refusal) -> None:
        """Wait for the right to open a connection."""
        if not self.waits_to_open:
            self.waits_to_open = self._limits.wait(flow, refusal)
            self._rest(refusal)

    def _rest(self, refusal: Refusal) -> None:
        self.rest = refusal.until > monotonic() + REST_SECONDS or isinstance(
            refusal.want.taken, Count
        )

    def leave(self, flow: Flow) -> None:
        """Wait for no limit any more."""
        for key in {self.waits_to_send, self.waits_to_open} - {""}:
            self._limits.leave(flow, key)
        self.waits_to_send = self.waits_to_open = ""
        self.rest = False

    # Messages

    def may_send(self, flow: Flow, session: Session, job: Job) -> bool:
        """Take the right to send a message; without it the flow or the session waits."""
        sending, remote = self.allowance.sending, session.allowance.sending
        if sending is NOTHING and remote is NOTHING:
            return True
        if self.waits_to_send:
            return False
        refusal = self._limits.take(both(sending, remote), _size_of(job))
        if refusal is None:
            if self.allowance.warming:
                self._limits.sent(sending)
            return True
        if refusal.want in remote.each:
            session.waits_for = self._limits.wait(session, refusal)
            self.limited.append(session)
        else:
            self.waits_to_send = self._limits.wait(flow, refusal)
            self._rest(refusal)
        return False

    def may_go_ahead(self, session: Session, job: Job) -> bool:
        """Take the right to send a message behind another one, without waiting for the right."""
        sending = self.allowance.sending
        if sending is NOTHING and session.allowance.sending is NOTHING:
            return True
        if self.allowance.warming:
            return False
        return session.allowance.sending is NOTHING and not (
            self.waits_to_send or self._limits.take(sending, _size_of(job))
        )

    # Connections

    def may_open(self) -> Refusal | None:
        """Whether to open a connection now."""
        return self._limits.may_open(self.allowance.sending)

    def take(self, flow: Flow) -> Refusal | None:
        """Take the right to open a connection."""
        return self._limits.open(self.allowance.opening, self.allowance.sending, flow)

    def give_to(self, session: Session) -> None:
        """Have a session hold the right that `take` took."""
        opening = self.allowance.opening
        session.counts, session.starting = opening.counts, opening.starting
        session.borrowed = self._limits.is_borrowed(opening)
        session.limits_number = self._limits.number

    def take_host(self, session: Session, host: Host) -> Refusal | None:
        """Take the right to connect to a host."""
        allowance = self._limits.of_remote(host.address, self._local_ip)
        sending, opening = allowance.sending, allowance.opening
        refusal = self._limits.may_open(sending) or self._limits.open(
            opening, sending, session.flow
        )
        if refusal is None:
            session.allowance = allowance
            session.borrowed = session.borrowed or self._limits.is_borrowed(opening)
            session.counts += opening.counts
            session.starting += opening.starting
        return refusal

    def give_back_host(self, session: Session) -> None:
        """Give back what `take_host` took."""
        self._release(session, session.allowance.opening.counts)

    def opened(self, session: Session) -> None:
        """A session is no longer being opened."""
        self._release(session, session.starting, starting=True)

    def ended(self, session: Session) -> None:
        """A session has ended, and gives back all that it holds."""
        self._release(session, session.counts)

    def _release(self, session: Session, keys: Sequence[str], *, starting: bool = False) -> None:
        kept, released = list(session.counts), []
        for key in keys:
            if key in kept:
                kept.remove(key)
                released.append(key)
        session.counts = tuple(kept)
        self._limits.release(released, borrowed=session.borrowed and not starting)

    def has_free_host(self) -> bool:
        """Whether there is a host that no session waits for."""
        limited = {session.remote for session in self.limited}
        return any(host.address not in limited for host in self._site.hosts)

    # Open connections

    def contended(self, session: Session) -> bool:
        """Whether other flows wait for what a session holds."""
        return bool(session.counts) and self._limits.contended(session.counts)

    def are_over(self, session: Session) -> bool:
        """Whether a session has to end: it borrowed long enough, or its limit was lowered."""
        if session.borrowed and monotonic() - session.since > BORROW_SECONDS:
            return True
        remote, limits = session.allowance, self._limits
        if session.limits_number == limits.number:
            return False  # they have not changed since the connection was opened
        if remote.number != limits.number and session.remote:
            remote = session.allowance = limits.of_remote(session.remote, self._local_ip)
        return limits.exceeded(self.allowance.opening) or limits.exceeded(remote.opening)

    def may_idle(self, session: Session) -> bool:
        """Whether a connection may be kept without a message."""
        if session.borrowed and not self.waits_to_send:
            return False
        if self.allowance.sending.closed is not None:
            return False
        wants = self.allowance.idle
        if wants is not NOTHING:
            if self._limits.take(wants) is not None:
                return False
            session.idle_counts = wants.counts
        self._limits.idle(session)
        return True

    def busy(self, session: Session) -> None:
        """A session is no longer idle, and waits for nothing."""
        if session.waits_for:
            self.limited.remove(session)
            self._limits.leave(session, session.waits_for)
            session.waits_for = ""
        if session.idle_counts:
            self._limits.release(session.idle_counts)
            session.idle_counts = ()
        self._limits.busy(session)


def _size_of(job: Job) -> int:
    """The bytes of a body, or a little more if the body is only in the queue."""
    body = job.unmade
    if body is not None:
        return len(body)
    return job.lease.size + (size_of(job.key) or 0)
