"""Failures that wait a moment, so that recipients of one mail share a report.

Theory of operation
-------------------
Each recipient of a mail is a message of its own, and reports are made for a batch of settlements.
Recipients at different hosts fail at different moments, and would be in different batches. So a
failure with a report is held, with its lease, until `dsn-wait` has passed since the first failure
whose report it could share; then all of them are settled, in one batch. Whatever happens
meanwhile, nothing is lost: the message is in the outbox until the commit, and a crash repeats its
attempt.

Only memory is occupied meanwhile, and there is a limit of that: see `Together.add`. Sessions and
flows go on as if the failure were settled.

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
"""One in so many messages of `rabbitmq-qos` may be held."""

T = TypeVar("T", bound=Reported)


class _Group(Generic[T]):
    """Failures that could share a report, and when they are settled, in trio's time."""

    __slots__ = ("members", "until")

    def __init__(self, until: float) -> None:
        self.until = until
        self.members: list[T] = []


class Together(Generic[T]):
    """Holds failures, and gives them to `settle` group by group. `run` is a task."""

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
        """Hold a settlement. If too many are held, in number or in bytes, all are given on."""
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
            self._give_all()
        elif len(group.members) >= MAX_TOGETHER:
            self._give(key)

    def close(self) -> None:
        """Give on what is held, and hold nothing any more."""
        self._closed = True
        self._give_all()

    async def run(self) -> None:
        """Give on each group at its time."""
        while True:
            while not self._groups:
                await self._wake.park()
            key, group = next(iter(self._groups.items()))
            if trio.current_time() < group.until:
                await trio.sleep_until(group.until)  # it may have been given on meanwhile
            else:
                self._give(key)

    def _give_all(self) -> None:
        for key in list(self._groups):
            self._give(key)

    def _give(self, key: tuple[object, ...]) -> None:
        members = self._groups.pop(key).members
        self._count -= len(members)
        self._bytes -= sum(each.settlement.lease.size for each in members)
        self._settle(members)
