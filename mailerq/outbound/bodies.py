"""Large bodies in memory: fetched or made shortly before they are sent, within a limit."""

from __future__ import annotations

from typing import Final

import trio

from mailerq.queues import Lease, Subscription

__all__ = ["Bodies"]

MAX_BYTES: Final = 64 << 20
"""Bytes of large bodies in memory at a time; one body is always allowed. As much again may be in
bodies that were made."""


class Bodies:
    """Fetches bodies that are not loaded with their leases, and counts those that are made."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        self._loaded: dict[int, int] = {}
        self._bytes = 0
        self._made: dict[int, int] = {}
        self._made_bytes = 0
        self._waiting = trio.lowlevel.ParkingLot()

    async def load(self, lease: Lease) -> None:
        """Fetch a body once there is room; raises `QueueError`.

        The body counts until `drop`.
        """
        while not lease.loaded and lease.id not in self._loaded:
            if self._bytes == 0 or self._bytes + lease.size <= MAX_BYTES:
                self._loaded[lease.id] = lease.size
                self._bytes += lease.size
            else:
                await self._waiting.park()
        if not lease.loaded:
            try:
                await self._subscription.load(lease)
            except BaseException:
                self.drop(lease)
                raise

    async def room(self) -> None:
        """Wait for room to make a body, whose size nobody knows before.

        Fetched bodies do not count: they may be those of messages that wait for their turn here.
        """
        while self._made_bytes >= MAX_BYTES:
            await self._waiting.park()

    def made(self, lease: Lease, size: int) -> None:
        """A body was made. The body counts until `drop`."""
        self._made_bytes += size - self._made.get(lease.id, 0)
        self._made[lease.id] = size

    def drop(self, lease: Lease) -> None:
        """The lease is over, or its body is no longer needed."""
        size = self._loaded.pop(lease.id, None)
        made = self._made.pop(lease.id, None)
        if size is not None or made is not None:
            self._bytes -= size or 0
            self._made_bytes -= made or 0
            self._waiting.unpark_all()
