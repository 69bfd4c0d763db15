"""Large bodies in memory: fetched or made shortly before they are sent, within a limit."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from mailerq.errors import MessageError
from mailerq.message import PROPERTIES_LIMIT, decode_properties
from mailerq.outbound.jobs import Job
from mailerq.queues import Lease, Subscription
from mailerq.storage.keys import size_of

if TYPE_CHECKING:
    from mailerq.storage import Storage

__all__ = ["Bodies"]

MAX_BYTES: Final = 64 << 20
"""Bytes of large bodies in memory at a time; one body is always allowed. As much again may be in
bodies that were made."""

LIKELY_BYTES: Final = 1 << 20
"""The size of a stored body whose key does not say it."""


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
        if not lease.loaded:
            await self._take_room(lease, lease.size)
        if not lease.loaded:
            try:
                await self._subscription.load(lease)
            except BaseException:
                self.drop(lease)
                raise

    async def fetch(self, job: Job, storage: Storage) -> None:
        """Fetch the body of a job from the storage once there is room; see `Storage.get`.

        The body counts until `drop`.
        """
        lease, size = job.lease, size_of(job.key)
        await self._take_room(lease, LIKELY_BYTES if size is None else size)
        try:
            found = await storage.get(job.key)
        except BaseException:
            self.drop(lease)
            raise
        self._bytes += len(found) - self._loaded[lease.id]
        self._loaded[lease.id] = len(found)
        self.put(job, found)

    def put(self, job: Job, found: bytes) -> None:
        """Give a job what the storage has under its key: a mail, or JSON to make one of."""
        job.key, job.stored = "", found
        if found.startswith(b"{") and len(found) <= PROPERTIES_LIMIT:
            with suppress(MessageError):
                job.stored = decode_properties(found)
                job.to_make = True

    async def _take_room(self, lease: Lease, size: int) -> None:
        while lease.id not in self._loaded:
            if self._bytes == 0 or self._bytes + size <= MAX_BYTES:
                self._loaded[lease.id] = size
                self._bytes += size
            else:
                await self._waiting.park()

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
