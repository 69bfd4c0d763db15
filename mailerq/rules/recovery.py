"""How mail that a peer has slowed down comes back: a pause, a probe, then a little more at a time.

Theory of operation
-------------------
One `Recovery` exists for each scope that a pattern has acted on, and until the scope is normal
again:

    normal ── pause ──> paused ── time ──> probing ── success ──> recovering ──> normal
                          ^                   │ refusal               │ refusal
                          └───────────────────┴───────────────────────┘
    normal ── lower ──> recovering

*Paused*: nothing goes. *Probing*: one connection, so one message until its reply. *Recovering*:
one more connection after as many successes as there are connections, and a tenth of the usual rate
more each minute. A pause that follows before the scope is normal is twice as long as the last one.

A reaction may instead lower the rate or the connections for a time (`lower`), after which they come
back in the same way. A scope is lowered at most once a minute: replies that were under way say
nothing new.

All is pure. `now` is in seconds, on any clock that goes on over restarts if the state does.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

import msgspec

from mailerq.rules.reactions import Reaction

__all__ = ["Recovery", "Stage"]

STEP_SECONDS: Final = 60.0
"""How often the rate grows, and how often it is lowered at most."""

STEP: Final = 0.1
"""By how much of the usual rate it grows."""

LEAST_SHARE: Final = 0.05

USUAL_CONNECTIONS: Final = 20
"""Connections at which a scope without a limit is normal."""

IDLE_SECONDS: Final = 6 * 3600.0
"""A scope without any reply for this long after its pause is normal."""


class Stage(StrEnum):
    """What a scope is doing."""

    PAUSED = "paused"
    PROBING = "probing"
    RECOVERING = "recovering"
    NORMAL = "normal"


class Recovery(msgspec.Struct, kw_only=True):
    """The state of one scope.

    `until` is the end of the pause, `held` the time until which a lowered rate and lowered
    connections stay. `share` is what may be used of the usual rate, `rate` a rate in messages a
    minute, `connections` a number; None is no limit.
    """

    stage: Stage = Stage.NORMAL
    until: float = 0.0
    paused_for: float = 0.0
    held: float = 0.0
    share: float = 1.0
    rate: int | None = None
    connections: int | None = None
    most: int = USUAL_CONNECTIONS
    successes: int = 0
    """Since a connection was added."""
    changed: float = 0.0
    """When the rate last changed."""
    lowered: float = -STEP_SECONDS
    touched: float = 0.0

    # What peers say

    def refuse(
        self, reaction: Reaction, now: float, *, connections: int, most: int, rated: bool = True
    ) -> bool:
        """Act on a reply; return whether something changed.

        `connections` are open now, and at most `most` may be, 0 for no limit. Where no rate is
        set (`rated`), a lower rate means fewer connections.
        """
        self.advance(now)
        if self.stage is Stage.PAUSED:
            return False
        self.touched = now
        self.most = most or USUAL_CONNECTIONS
        lowered = reaction.lowers and self._lower(reaction, now, connections, rated)
        if reaction.pause:
            self._pause(reaction.pause, reaction.max_pause or reaction.pause, now)
            return True
        if lowered and self.stage is Stage.NORMAL:
            self.stage = Stage.RECOVERING
        return lowered

    def _pause(self, seconds: float, most: float, now: float) -> None:
        if self.paused_for:
            seconds = max(seconds, 2 * self.paused_for)
        self.paused_for = min(seconds, max(most, 1.0))
        self.stage = Stage.PAUSED
        self.until = now + self.paused_for
        self.connections = 1
        self.successes = 0

    def _lower(self, reaction: Reaction, now: float, connections: int, rated: bool) -> bool:
        if now < self.lowered + STEP_SECONDS:
            return False
        self.lowered = self.changed = now
        self.held = max(self.held, now + (reaction.lasts or 0.0))
        self.successes = 0
        if reaction.messages_per_minute:
            self.rate = min(reaction.messages_per_minute, self.rate or reaction.messages_per_minute)
        now_open = min(max(connections, 1), self.connections or self.most)
        if reaction.slow and rated:
            self.share = max(self.share * reaction.slow, LEAST_SHARE)
        elif reaction.slow:
            self.connections = max(int(now_open * reaction.slow), 1)
        if reaction.max_connections:
            self.connections = min(reaction.max_connections, self.connections or self.most)
        if reaction.fewer_connections:
            self.connections = max(now_open - reaction.fewer_connections, 1)
        return True

    def succeed(self, now: float) -> bool:
        """A message got an answer that has nothing against its way; return whether more may go."""
        advanced = self.advance(now)
        self.touched = now
        if self.stage is Stage.PROBING:
            self.stage = Stage.RECOVERING
            self.share, self.changed = min(self.share, STEP), now
            self.connections, self.successes = 1, 0
            return True
        if self.stage is not Stage.RECOVERING or self.connections is None or now < self.held:
            return advanced
        self.successes += 1
        if self.successes < self.connections:
            return advanced
        self.successes = 0
        self.connections += 1
        if self.connections >= self.most:
            self.connections = None
        self._end()
        return True

    # Time

    def advance(self, now: float) -> bool:
        """Do what time alone does; return whether something changed."""
        if self.stage is Stage.PAUSED and now >= self.until:
            self.stage = Stage.PROBING
            self.touched = self.until
            return True
        if self.stage is Stage.RECOVERING and now >= self.held:
            steps = int((now - max(self.changed, self.held)) // STEP_SECONDS)
            grown = self.share < 1.0 and steps > 0
            if grown:
                self.share = min(round(self.share + steps * STEP, 6), 1.0)
                self.changed = max(self.changed, self.held) + steps * STEP_SECONDS
            freed = self.rate is not None
            self.rate = None
            before = self.stage
            self._end()
            if grown or freed or self.stage is not before:
                return True
        idle = self.stage in (Stage.PROBING, Stage.RECOVERING)
        if idle and now >= max(self.touched, self.held) + IDLE_SECONDS:
            self.stage = Stage.NORMAL
            return True
        return False

    def _end(self) -> None:
        if self.share >= 1.0 and self.connections is None and self.rate is None:
            self.stage = Stage.NORMAL

    @property
    def next_change(self) -> float:
        """When `advance` may change something."""
        if self.stage is Stage.PAUSED:
            return self.until
        idle = max(self.touched, self.held) + IDLE_SECONDS
        if self.stage is Stage.PROBING:
            return idle
        if self.rate is not None:
            return self.held
        return max(self.changed, self.held) + STEP_SECONDS if self.share < 1.0 else idle

    # Keeping

    def to_dict(self) -> dict[str, Any]:
        """The state, for a file."""
        return {name: getattr(self, name) for name in self.__struct_fields__}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recovery:
        """A kept state. Raises `ValueError` if it is none."""
        return msgspec.convert(values, cls)
