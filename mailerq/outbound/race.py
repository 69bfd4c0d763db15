"""Connect by IPv4 or IPv6, whichever answers (RFC 8305, "Happy Eyeballs").

A host may have addresses of both families, and one family may lead nowhere. So of two addresses of
equal preference the second one gets its turn when the first has not answered for
`HEAD_START_SECONDS`, or at once when the first fails, and the first answer wins. An address without
a route fails at once, so a family that this host does not have costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from mailerq.net.stream import Stream

if TYPE_CHECKING:
    from mailerq.net.resolver import Host
    from mailerq.outbound.sites import HostMemory

__all__ = ["HEAD_START_SECONDS", "Raced", "race", "rival_of"]

HEAD_START_SECONDS: Final = 0.25
"""RFC 8305, section 5."""


class Raced(NamedTuple):
    """The end of a race: the connection and its host, or what each of the hosts failed with."""

    stream: Stream | None
    host: Host | None
    failures: Sequence[tuple[Host, OSError]]


def rival_of(host: Host, others: Sequence[Host], memory: HostMemory) -> Host | None:
    """The host of the other family that is as good as `host`, or None."""
    six = ":" in host.address
    for other in others:
        if other.preference == host.preference and (":" in other.address) != six:
            doubtful = memory.is_doubtful(other.address), memory.is_doubtful(host.address)
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
