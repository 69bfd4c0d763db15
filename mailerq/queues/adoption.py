"""Takes over shares of a directory that no process holds: of the queue, or of its reserve.

Theory of operation
-------------------
The lock of a share decides which process delivers from it (`mailerq.queues.ownership`). Each
process looks every second, and adopts a share that was free at two looks in a row. So the share's
own process, which restarts within a second after a crash, comes first. When that process wants its
share, the share goes back within seconds. A share left over from a larger number of processes stays
adopted.

A share that kills its adopters is adopted less and less often. Any other obstacle, such as a lack
of descriptors, is logged once a minute, and the next look tries again.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from mailerq.errors import QueueError, QueueHeld
from mailerq.plugins import stray_close
from mailerq.queues.embedded.shares import share_directory, shares_in
from mailerq.queues.ownership import DirectoryLock, make_directory, wanted

__all__ = ["Adoption", "own", "prove"]

log = logging.getLogger("mailerq")

LOOK_SECONDS: Final = 1.0
"""Interval between looks for free shares, and for owners that want an adopted one back."""

SAY_SECONDS: Final = 60.0
"""Interval of log lines about a share that cannot be adopted."""

OWN_SECONDS: Final = 60.0
"""How long a process waits for its own share while another delivers from it."""

RETRY_SECONDS: Final = 0.05
LOOKS: Final = 20
"""After this many looks in a row that find the lock held, another daemon owns the share.

Looks count, not seconds: after a stall, two looks may each meet a process that only checks.
"""

STEADY_SECONDS: Final = 10.0
"""A process that works on a share this long is not killed by the content of the share."""


async def own(directory: str) -> DirectoryLock:
    """Lock the share of this process, which another process may have adopted.

    Raises `QueueError`, within about a second if another daemon owns the share.
    """
    end = trio.current_time() + OWN_SECONDS
    looks = 0
    make_directory(directory)
    try:
        with wanted(directory):
            while True:
                try:
                    return DirectoryLock.take(directory)
                except QueueHeld as held:
                    # Other processes hold the lock briefly to see whether the share is free, and
                    # an adopter while it gives the share back.
                    looks = 0 if held.adopted else looks + 1
                    if looks == LOOKS or trio.current_time() > end:
                        raise
                await trio.sleep(RETRY_SECONDS)
    except OSError as error:
        raise QueueError(f"{directory}: cannot be locked: {error.strerror}") from error


async def prove(lock: DirectoryLock) -> None:
    """Record, after a while, that the content of a share does not kill this process."""
    await trio.sleep(STEADY_SECONDS)
    try:
        lock.prove()
    except OSError:
        stray_close("the lock of a queue directory")


class Adoption:
    """Adopts shares for one of `processes` processes, the one with the share `own`.

    `deliver` opens a share, delivers from it until the event, and releases the lock.
    """

    def __init__(
        self,
        directory: str,
        own: int,
        processes: int,
        deliver: Callable[[int, DirectoryLock, trio.Event], Awaitable[None]],
    ) -> None:
        self._directory = directory
        self._own = own
        self._processes = processes
        self._deliver = deliver
        self._adopted: dict[int, tuple[DirectoryLock, trio.Event]] = {}
        self._free: set[int] = set()
        self._said: dict[int | None, float] = {}

    async def run(self) -> None:
        """Look until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                # Sleep first: the contents of a share must not end the start.
                await trio.sleep(LOOK_SECONDS)
                for share in self._shares():
                    if share != self._own and self._look(share, nursery):
                        break  # one at a time: other processes look too

    def _shares(self) -> list[int]:
        """The existing shares; none if they cannot be listed now."""
        try:
            return shares_in(self._directory)
        except OSError as error:
            self._complain(None, f"the shares of the queue cannot be listed: {error}")
            return []

    def _look(self, share: int, nursery: trio.Nursery) -> bool:
        """Check one share; return True if it has been adopted."""
        if (adopted := self._adopted.get(share)) is not None:
            self._give_back_if_wanted(share, *adopted)
            return False
        directory = share_directory(self._directory, share)
        left = share >= self._processes  # it has no process of its own
        try:
            if not (left or share in self._free):
                self._probe(share, directory)
                return False
            lock = DirectoryLock.adopt(directory, time.time())
        except QueueHeld as held:
            self._free.discard(share)
            if left and not held.adopted:
                self._not_adopted(share, held)
        except (QueueError, OSError) as error:
            self._not_adopted(share, error)
        else:
            self._free.discard(share)
            until = trio.Event()
            self._adopted[share] = lock, until
            nursery.start_soon(self._keep, share, lock, until)
            return True
        return False

    def _give_back_if_wanted(self, share: int, lock: DirectoryLock, until: trio.Event) -> None:
        try:
            if lock.is_wanted():
                until.set()
        except OSError as error:
            self._complain(
                share, f"whether share {share} of the queue is wanted cannot be seen: {error}"
            )

    def _probe(self, share: int, directory: str) -> None:
        """Note whether a share is free now."""
        if not os.path.exists(directory):
            return  # the share's process has never started
        DirectoryLock(directory).release()
        self._free.add(share)

    async def _keep(self, share: int, lock: DirectoryLock, until: trio.Event) -> None:
        """Deliver from an adopted share until its own process wants it."""
        log.info("%s is emptied from here as well", share_directory(self._directory, share))
        try:
            await self._deliver(share, lock, until)
        except QueueError as error:
            self._not_adopted(share, error)
        finally:
            del self._adopted[share]
            try:
                lock.release()
            except OSError:
                stray_close("the lock of a queue directory")
        log.info("%s is left to its own process", share_directory(self._directory, share))

    def _not_adopted(self, share: int, error: Exception) -> None:
        self._complain(share, f"share {share} of the queue is not adopted: {error}")

    def _complain(self, share: int | None, text: str) -> None:
        """Log an obstacle, one a minute for each share; None: for all shares."""
        now = time.monotonic()
        if now >= self._said.get(share, 0.0):
            self._said[share] = now + SAY_SECONDS
            log.error("%s", text)
