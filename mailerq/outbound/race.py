"""Connect by IPv4 or IPv6, whichever answers (RFC 8305, "Happy Eyeballs").

A host may have addresses of both families, and one family may lead nowhere. So of two addresses of
equal preference the second one gets its turn when the first has not answered for
`HEAD_START_SECONDS`, or at once when the first fails, and the first answer wins. An address without
a route fails at once, so a family that this host does not have costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from mailerq.net.stream import CannotBind, Stream
from mailerq.outbound.jobs import Report
from mailerq.outbound.patience import TooLate
from mailerq.rules import responses

if TYPE_CHECKING:
    from mailerq.net.resolver import Host
    from mailerq.outbound.limits import Allowance
    from mailerq.outbound.session import Session
    from mailerq.outbound.sites import HostHistory

__all__ = ["HEAD_START_SECONDS", "Raced", "connect", "race", "reach", "rival_of", "where"]

HEAD_START_SECONDS: Final = 0.25
"""RFC 8305, section 5."""


class Raced(NamedTuple):
    """The end of a race: the connection and its host, or what each of the hosts failed with."""

    stream: Stream | None
    host: Host | None
    failures: Sequence[tuple[Host, OSError]]


def rival_of(host: Host, others: Sequence[Host], history: HostHistory) -> Host | None:
    """The host of the other family that is as good as `host`, or None."""
    six = ":" in host.address
    for other in others:
        if other.preference == host.preference and (":" in other.address) != six:
            doubtful = history.is_doubtful(other.address), history.is_doubtful(host.address)
            return other if doubtful[0] == doubtful[1] else None
    return None


async def race(first: Host, second: Host, port: int, may_start: Callable[[], bool]) -> Raced:
    """Connect to one of two hosts; `may_start` says whether the second one may be tried."""
    winner: tuple[Stream, Host] | None = None
    failures: list[tuple[Host, OSError]] = []
    over = trio.Event()

    async def run(host: Host) -> None:
        nonlocal winner
        try:
            stream = await Stream.connect(host.address, port)
        except OSError as error:
            failures.append((host, error))
        else:
            if winner is None:
                winner = stream, host
                nursery.cancel_scope.cancel()
            else:
                stream.close()
        over.set()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, first)
            with trio.move_on_after(HEAD_START_SECONDS):
                await over.wait()
            if winner is None and may_start():
                nursery.start_soon(run, second)
    except BaseException:
        if winner is not None:
            winner[0].close()
        raise
    stream, host = winner or (None, None)
    return Raced(stream, host, failures)


async def reach(session: Session, host: Host, others: list[Host]) -> tuple[Stream | Report, Host]:
    """Connect a session to `host`, or to one of the `others` that may have its turn together.

    Returns the host that answered; a report says that none did.
    """
    flow = session.flow
    local_ip, history = flow.local_ip, flow.history
    may_race = others and local_ip is None and flow.login is None
    rival = rival_of(host, others, history) if may_race else None
    stream: Stream | Report | None = None
    try:
        if rival is None and not host.address.startswith("/"):
            stream = await _connect_one(session, host, local_ip)
        else:
            with trio.move_on_after(flow.config.connect_timeout):
                if rival is None:
                    stream = await Stream.connect(host.address, flow.site.port)
                else:
                    others.remove(rival)
                    stream, host = await connect(session, host, rival, others)
    except CannotBind as error:
        assert local_ip is not None, "else nothing is bound"
        history.cannot_bind(local_ip, error)
        return Report(responses.cannot_bind(error, local_ip), local_ip), host
    except OSError as error:
        return Report(responses.connect_failed(error, where(host))), host
    return stream or Report(responses.connect_timed_out(where(host))), host


async def _connect_one(session: Session, host: Host, local_ip: str | None) -> Stream | None:
    """Connect to an IP address; None: it has not answered in time. Raises OSError.

    The session keeps the time: a scope of trio for each connection costs more than to connect.
    """
    port, seconds = session.flow.site.port, session.flow.config.connect_timeout
    stream = session._stream = Stream.dial(host.address, port, local_ip=local_ip)
    session._connecting = True
    session._deadline = monotonic() + seconds
    try:
        await stream.connected()
    except BaseException as error:
        stream.close()
        if isinstance(error, TooLate):
            return None
        raise
    finally:
        session._connecting = False
        session._deadline = math.inf
    return stream


async def connect(
    session: Session, first: Host, rival: Host, others: list[Host]
) -> tuple[Stream | Report, Host]:
    """Connect a session to one of two hosts, `rival` only as far as its limits allow.

    The one that may still answer is put back to the `others`.
    """
    flow, own = session.flow, session.allowance
    taken: Allowance | None = None

    def may_start() -> bool:
        nonlocal taken
        if flow.rights.take_host(session, rival) is not None:
            return False
        taken, session.allowance = session.allowance, own
        return True

    winner: Host | None = None
    try:
        stream, winner, failures = await race(first, rival, flow.site.port, may_start)
    finally:
        if taken is not None:
            # Give back what the loser took.
            session.allowance = own if winner is rival else taken
            flow.rights.give_back_host(session)
            session.allowance = taken if winner is rival else own
    if stream is not None and winner is not None:
        if winner is rival:
            flow.history.kept_out(first.address)  # the others come first for a while
        others.insert(0, first if winner is rival else rival)
        return stream, winner
    if len(failures) == 1:
        others.insert(0, rival)  # its limits allow no connection
    else:
        flow.history.kept_out(rival.address)
    best, *more = [responses.connect_failed(error, where(host)) for host, error in failures]
    for outcome in more:
        best = outcome if responses.outweighs(outcome, best) else best
    return Report(best), first


def where(host: Host) -> str:
    """A host for people."""
    return host.address if host.name == host.address else f"{host.name} [{host.address}]"
