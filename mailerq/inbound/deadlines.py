"""Deadlines of sessions: how long a peer may take for its current step.

Theory of operation
-------------------
A session notes as plain numbers when its wait for the peer began and how much has arrived. One
task per worker looks at all its sessions, at least once a second. That costs less than moving a
trio deadline at each read. The bounds are looked up each time, so they follow the settings, and
they tighten when most connection slots are in use, for open sessions too.

Each bound is for a whole: a command from its first byte to its last, a mail from its first byte to
its dot, a handshake, a session. A peer gains nothing by sending a byte now and then.
"""

from __future__ import annotations

from time import monotonic
from typing import Final, Protocol

import trio

from mailerq.inbound.services import Services

__all__ = ["Deadlines", "Watched"]

LOOKS: Final = 4
"""Checks within the shortest bound."""


class Watched(Protocol):
    """A session as its deadlines see it."""

    def is_overdue(self, now: float, short: bool) -> bool:
        """Whether the peer has run out of time; `short`: connection slots are short."""

    def expire(self) -> None:
        """End the session: its time is up."""

    def shut_down(self, seconds: float) -> None:
        """End the session within `seconds`: the engine stops."""

    def trace(self) -> bool:
        """Let the traces of the worker see the session; False: not now, ask again."""


class Deadlines:
    """Watches the sessions of one worker; only the worker's thread uses `sessions`."""

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
        """End all sessions in their own time, within `seconds`."""
        for session in list(self.sessions):
            session.shut_down(seconds)

    def stop(self) -> None:
        self._scope.cancel()
