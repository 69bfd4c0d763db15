"""Deadlines of sessions: how long a peer may take for what it is doing.

Theory of operation
-------------------
A session notes, with plain numbers, since when it waits for its peer and how much has come. One
task for each worker looks at all of its sessions every second at most. That costs less than a
deadline of trio's that is moved at each read, and since the bounds are looked up anew each
time, they follow the settings, and tighten by themselves when most connection slots are in use,
for sessions that are open already too.

What is bounded is always a whole: a command from its first byte to its last, a mail from its
first byte to its dot, a handshake, a session. So a peer that sends a byte now and then gains
nothing by it.
"""

from __future__ import annotations

from time import monotonic
from typing import Final, Protocol

import trio

from mailerq.inbound.services import Services

__all__ = ["Deadlines", "Watched"]

LOOKS: Final = 4
"""The shortest bound is looked at so many times before it is over."""


class Watched(Protocol):
    """What a session is to its deadlines."""

    def is_overdue(self, now: float, short: bool) -> bool:
        """Whether the peer takes longer than it may; `short`: connection slots are."""

    def expire(self) -> None:
        """The time is up."""

    def shut_down(self, seconds: float) -> None:
        """The engine stops, and waits so long."""


class Deadlines:
    """Looks at the sessions of one worker; `sessions` is for its thread."""

    def __init__(self, services: Services) -> None:
        self.sessions: dict[Watched, None] = {}
        self._services = services
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Look until `stop`."""
        with self._scope:
            while True:
                await trio.sleep(min(1.0, self._services.terms.bounds.shortest / LOOKS))
                now, short = monotonic(), self._services.slots.are_short
                for session in [one for one in self.sessions if one.is_overdue(now, short)]:
                    session.expire()

    def shut_down(self, seconds: float) -> None:
        """End all sessions, in their own time but at most in `seconds`."""
        for session in list(self.sessions):
            session.shut_down(seconds)

    def stop(self) -> None:
        self._scope.cancel()
