"""Let traces see deliveries (see `mailerq.net.tracing`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mailerq.net.tracing import attach, tell
from mailerq.wire.transcript import Pending

if TYPE_CHECKING:
    from mailerq.net.resolver import Host
    from mailerq.outbound.jobs import Report
    from mailerq.outbound.session import Session

__all__ = ["join", "not_connected"]


def join(session: Session) -> bool:
    """Let the traces of the worker see a session; False: not now, ask again."""
    if session.leaving:
        return True
    if not session.remote:
        return False
    stream, site = session._stream, session.flow.site
    due = None if session._sending else session._protocol.due
    if due is None and stream.tap is None:
        return False
    pending = [Pending.of(step) for step in due or ()]
    where, traces = (session.remote, site.port), session.worker.traces
    attach(stream, traces, "out", where, stream.local, pending, domain=site.label)
    return True


def not_connected(session: Session, host: Host, report: Report) -> None:
    """Show that no connection came about."""
    site, text = session.flow.site, report.outcome.description or "no connection"
    traces, where = session.worker.traces, (host.address, site.port)
    tell(traces, where, session.flow.local_ip, text, domain=site.label)
