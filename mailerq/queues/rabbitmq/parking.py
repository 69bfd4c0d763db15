"""Decides which parked queues take mail, and how long other mail waits."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from mailerq.queues.rabbitmq.publisher import SilentQueue
from mailerq.queues.rabbitmq.topology import EXPIRES_SECONDS

if TYPE_CHECKING:
    from mailerq.queues.rabbitmq.queues import RabbitQueues

__all__ = ["ParkingLots"]

log = logging.getLogger("mailerq.queues")

MAX_PARKED: Final = 2000
"""Parked queues that this process has the broker keep. One with tens of thousands of quorum queues
is short of memory, as after an outage of the network, when all hosts are down."""

UNPARKED_SECONDS: Final = 10.0
"""Delay of mail that cannot be parked yet."""

CROWDED_SECONDS: Final = 300.0
"""Delay of mail without a parked queue."""


class ParkingLots:
    """The parked queues that this process uses."""

    def __init__(self, queues: RabbitQueues) -> None:
        self._queues = queues
        self._used: dict[str, float] = {}
        """When each was last used: the broker drops it after `EXPIRES_SECONDS`."""
        self._said_silent: set[str] = set()
        self._is_crowded = False

    async def may_park(self, queue: str, destination: str) -> bool:
        """Whether mail is safe in the parked queue of a destination. Raises `BrokerError`."""
        place = self._queues.parked_place(queue, destination)
        if not self._has_room(place.name):
            return False
        parker = self._queues.parker
        try:
            await parker.declare(place)
        except SilentQueue as error:
            if place.name not in self._said_silent:
                self._said_silent.add(place.name)
                log.error("%s", error)
            return False
        return not parker.is_young(place, self._queues.options.settle_seconds)

    def wait_seconds(self, queue: str, destination: str) -> float:
        """Delay of mail that is not parked."""
        name = self._queues.topology.parked(queue, destination)[0]
        return UNPARKED_SECONDS if name in self._used else CROWDED_SECONDS

    def _has_room(self, name: str) -> bool:
        now = trio.current_time()
        if name not in self._used and len(self._used) >= MAX_PARKED:
            over = now - EXPIRES_SECONDS
            for each in [each for each, used in self._used.items() if used < over]:
                del self._used[each]
            if len(self._used) >= MAX_PARKED:
                if not self._is_crowded:
                    self._is_crowded = True
                    log.warning(
                        "mail of %d destinations is parked: that of further ones comes again every"
                        " %d seconds", MAX_PARKED, CROWDED_SECONDS,
                    )  # fmt: skip
                return False
            self._is_crowded = False
        self._used[name] = now
        return True
