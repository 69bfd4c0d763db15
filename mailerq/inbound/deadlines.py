"""Deadlines of sessions: how long a peer may take for what it is doing.

Theory of operation
-------------------
A session notes, with plain numbers, since when it waits for its peer and how much has come. One
task for each worker looks at all of its sessions every second at most. That costs less than a
deadline of trio's that is moved at each read, and since the bounds are looked up anew each
time, they tighten by themselves, for sessions that are open already too, when most connection
slots are in use.

What is bounded is always a whole: a command from its first byte to its last, a mail from its
first byte to its dot, a handshake, a session. So a peer that sends a byte now and then gains
nothing by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import monotonic
from typing import Final, Protocol

import trio

from mailerq.config import Config
from mailerq.inbound.services import Services

__all__ = ["Bounds", "Deadlines", "Watched"]

STRAINED_SECONDS: Final = 10.0
"""How long a peer may take for anything when connection slots are short."""

LOOKS: Final = 4
"""The shortest bound is looked at so many times before it is over."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """In seconds; `rate` is bytes/s of a mail, beyond the time that `idle` gives."""

    idle: float
    command: float
    handshake: float
    session: float
    rate: float

    @classmethod
    def of(cls, config: Config) -> Bounds:
        return cls(
            config.smtp_timeout,
            config.smtp_command_timeout,
            config.smtp_handshake_timeout,
            config.smtp_session_timeout or math.inf,
            config.smtp_data_minrate,
        )

    def tightened(self) -> Bounds:
        return Bounds(
            min(self.idle, STRAINED_SECONDS),
            min(self.command, STRAINED_SECONDS),
            min(self.handshake, STRAINED_SECONDS),
            self.session,
            self.rate,
        )


class Watched(Protocol):
    """What a session is to its deadlines."""

    def is_overdue(self, now: float, bounds: Bounds) -> bool:
        """Whether the peer takes longer than it may."""

    def expire(self) -> None:
        """The time is up."""

    def shut_down(self, seconds: float) -> None:
        """The engine stops, and waits so long."""


class Deadlines:
    """Looks at the sessions of one worker; `sessions` is for its thread."""

    def __init__(self, services: Services) -> None:
        self.sessions: dict[Watched, None] = {}
        self._services = services
        self._usual = Bounds.of(services.config)
        self._tight = self._usual.tightened()
        shortest = min(self._usual.idle, self._usual.command, self._usual.handshake)
        self._pause = min(1.0, min(shortest, self._usual.session) / LOOKS)
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Look until `stop`."""
        with self._scope:
            while True:
                await trio.sleep(self._pause)
                now = monotonic()
                bounds = self._tight if self._services.slots.are_short else self._usual
                for session in [one for one in self.sessions if one.is_overdue(now, bounds)]:
                    session.expire()

    def shut_down(self, seconds: float) -> None:
        """End all sessions, in their own time but at most in `seconds`."""
        for session in list(self.sessions):
            session.shut_down(seconds)

    def stop(self) -> None:
        self._scope.cancel()
