"""Hold failures for a moment, so that the recipients of one mail share a report.

Theory of operation
-------------------
Each recipient of a mail is a message of its own, and reports are made for a batch of settlements.
Recipients at different hosts fail at different times, so their failures would be in different
batches. A failure with a report is held, with its lease, until `dsn-wait` has passed since the
first failure that can share the report. Then the group is settled in one batch. The message stays
in the outbox until that commit, so a crash loses nothing and repeats the attempt.

Held failures take only memory, which is bounded (`Together.add`). Sessions and flows go on as if
the failure were settled.

Everything here runs on the home worker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

import trio

from mailerq.live import Live
from mailerq.outbound.bounces import Reported
from mailerq.rules.bounces import FAILED, MAX_TOGETHER

__all__ = ["Together"]

MAX_BYTES: Final = 16 << 20
"""Bytes of the mails that are held."""

SHARE: Final = 4
"""Held failures are at most `rabbitmq-qos` divided by this."""

T = TypeVar("T", bound=Reported)


class _Group(Generic[T]):
    """Failures that could share a report, and when they are settled, in trio's time."""

    __slots__ = ("members", "until")

    def __init__(self, until: float) -> None:
        self.until = until
        self.members: list[T] = []


class Together(Generic[T]):
    """Holds failures, and passes them to `settle` in groups. `run` is a task."""

    def __init__(self, live: Live, settle: Callable[[Sequence[T]], None]) -> None:
        self._live = live
        self._settle = settle
        self._groups: dict[tuple[object, ...], _Group[T]] = {}
        self._count = 0
        self._bytes = 0
        self._closed = False
        self._wake = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        """Failures that are held."""
        return self._count

    def takes(self, reported: T) -> bool:
        """Whether a settlement is one to hold."""
        bounce = reported.bounce
        if bounce is None or bounce.event != FAILED or self._closed:
            return False
        return self._live.current.config.dsn_wait > 0

    def add(self, reported: T) -> None:
        """Hold a settlement; settle all if the limit of messages or bytes is reached."""
        assert reported.bounce is not None
        config = self._live.current.config
        key = reported.bounce.key
        group = self._groups.get(key)
        if group is None:
            if not self._groups:
                self._wake.unpark()
            group = self._groups[key] = _Group(trio.current_time() + config.dsn_wait)
        group.members.append(reported)
        self._count += 1
        self._bytes += reported.settlement.lease.size
        if self._bytes > MAX_BYTES or self._count >= max(config.rabbitmq_qos // SHARE, 1):
            self._settle_all()
        elif len(group.members) >= MAX_TOGETHER:
            self._settle_group(key)

    def close(self) -> None:
        """Settle everything held, and hold nothing from now on."""
        self._closed = True
        self._settle_all()

    async def run(self) -> None:
        """Settle each group when its time comes."""
        while True:
            while not self._groups:
                await self._wake.park()
            key, group = next(iter(self._groups.items()))
            if trio.current_time() < group.until:
                await trio.sleep_until(group.until)  # the group may be settled meanwhile
            else:
                self._settle_group(key)

    def _settle_all(self) -> None:
        for key in list(self._groups):
            self._settle_group(key)

    def _settle_group(self, key: tuple[object, ...]) -> None:
        members = self._groups.pop(key).members
        self._count -= len(members)
        self._bytes -= sum(each.settlement.lease.size for each in members)
        self._settle(members)
