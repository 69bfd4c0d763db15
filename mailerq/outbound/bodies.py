"""Large bodies in memory: fetched shortly before they are sent, within a limit."""

from __future__ import annotations

from typing import Final

import trio

from mailerq.queues import Lease, Subscription

__all__ = ["Bodies"]

MAX_BYTES: Final = 64 << 20
"""Bytes of large bodies in memory at a time; one body is always allowed."""


class Bodies:
    """Fetches bodies that are not loaded with their leases."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        self._loaded: dict[int, int] = {}
        self._bytes = 0
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

    def drop(self, lease: Lease) -> None:
        """The lease is over, or its body is no longer needed."""
        size = self._loaded.pop(lease.id, None)
        if size is not None:
            self._bytes -= size
            self._waiting.unpark_all()
