"""Subscriptions to queues of a broker; `mailerq.queues.rabbitmq.takers` has the theory."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import trio

from mailerq.errors import QueueError
from mailerq.message import Message
from mailerq.queues.interface import Lease, Receiver, Subscription, Taken
from mailerq.queues.rabbitmq.coding import due_of
from mailerq.queues.rabbitmq.connection import BrokerError, Channel, Connection, Delivery
from mailerq.queues.rabbitmq.publisher import SilentQueue
from mailerq.queues.rabbitmq.takers import (
    AGAIN_SECONDS,
    GROUP,
    HOLD_SECONDS,
    MAX_BYTES,
    MOST_BYTES,
    BrokerLease,
    Move,
    Taker,
)
from mailerq.queues.rabbitmq.topology import PARKED_SECONDS
from mailerq.rules.destinations import place_of

if TYPE_CHECKING:
    from mailerq.queues.rabbitmq.queues import RabbitQueues

__all__ = ["RETURN_SECONDS", "BrokerSubscription", "Destination"]

log = logging.getLogger("mailerq.queues")

PARKING_SECONDS: Final = 5.0
"""How long a `take` waits for mail of its destination that is on the way to the parked queue."""

RETURN_SECONDS: Final = 1.0
"""How long a `take` retries a parked queue that looks empty after a message went back to it."""

LOOK_SECONDS: Final = 0.02
"""Interval of these retries. A quorum queue counts a returned message only after a moment."""

INDEX_AGAIN_SECONDS: Final = float(PARKED_SECONDS)
"""Interval at which a destination with parked mail is written to the list of destinations."""

FIRST_LOOK_SECONDS: Final = 2.0
INDEX_LOOK_SECONDS: Final = 300.0
"""The list of destinations is read again after pauses that double between these. A read misses what
another process holds at that moment or parks just after it. This happens around a lost connection,
a start, and a change of the owner of an address."""

LOOK_SHARE: Final = 5
"""The least pause after a read of the list, in multiples of the time that the read took."""

HELD_BYTES: Final = 64 << 20
"""Bytes of unpacked messages that are held back. More are parked at once."""

MAX_SORTING: Final = 200
"""Messages beyond the prefetch that a subscription may have, to sort them."""


class Destination:
    """What a subscription knows of a destination; dropped once it is `empty`."""

    __slots__ = (
        "backlog", "held", "indexed", "key", "parked", "parking", "returned", "scattered", "taking",
        "window",
    )  # fmt: skip

    def __init__(self, key: str) -> None:
        self.key = key
        self.window: int | None = None
        self.held = 0
        self.backlog = False
        """The parked queue may have mail, and the receiver knows."""
        self.parking = 0
        """Messages on the way to the parked queue."""
        self.parked = trio.Event()
        """Set when none is on the way."""
        self.parked.set()
        self.taking = 0
        """Takes under way."""
        self.indexed = -INDEX_AGAIN_SECONDS
        self.returned = -RETURN_SECONDS
        """When a message last went back to the parked queue."""
        self.scattered = False
        """The parked queue cannot be used: mail waits elsewhere, and has no order any more."""

    @property
    def empty(self) -> bool:
        return not (
            self.held or self.backlog or self.parking or self.taking or self.window is not None
        )


class BrokerSubscription(Taker, Subscription):
    """A subscription; call all methods on the loop that subscribed."""

    def __init__(
        self,
        queues: RabbitQueues,
        queue: str,
        receiver: Receiver,
        *,
        prefetch: int,
        window: int,
        hold_seconds: float = HOLD_SECONDS,
    ) -> None:
        super().__init__(queues, queue, prefetch)
        self.destinations: dict[str, Destination] = {}
        self._receiver = receiver
        self._window = window
        self._hold_seconds = hold_seconds
        self._held_back: deque[tuple[float, Delivery, Message, str]] = deque()
        self._held_bytes = 0
        self._gets: Channel | None = None
        self._fallen: dict[str, None] = {}
        """Destinations with parked mail whose leases ended after their channel."""
        self._look = trio.Event()

    @property
    def quota(self) -> int:
        return self.prefetch + min(max(self.prefetch, 1), MAX_SORTING)

    @property
    def unsettled(self) -> int:
        return super().unsettled + len(self._held_back)

    def _destination(self, key: str) -> Destination:
        found = self.destinations.get(key)
        if found is None:
            found = self.destinations[key] = Destination(key)
        return found

    def _tidy(self, destination: Destination) -> None:
        if destination.empty:
            self.destinations.pop(destination.key, None)

    async def begin(self, connection: Connection) -> None:
        """Forget what the broker delivers again, and read the list of destinations soon."""
        await super().begin(connection)
        self._held_back.clear()
        self._held_bytes = 0
        for destination in self.destinations.values():
            destination.parking = 0
            destination.parked.set()
        await self._open_gets(connection)
        self.look()

    def lost(self) -> None:
        lost = [
            lease
            for lease in self.queues.held.values()
            if lease.taker is self and lease.is_stale and not lease.settling
        ]
        if lost:
            self._receiver.lost(lost)

    def look(self) -> None:
        """Look for destinations with parked mail now, and again soon."""
        self._look.set()

    async def tend(self) -> None:
        """Declare the wait queues, and look for parked mail, until cancelled."""
        said = ""
        while True:
            try:
                connection = await self.queues.publishing.connection()
                # RabbitMQ 3.10 forgot a queue that was declared half a second before a crash.
                await self.queues.declare_waits(self.queue)
                pause, rest = FIRST_LOOK_SECONDS, 0.0
                while connection.is_open:
                    # The random factor keeps processes that lost the same broker out of step.
                    with trio.move_on_after(pause * random.uniform(0.8, 1.2)):
                        await self._look.wait()
                    await trio.sleep(rest)
                    asked, self._look = self._look.is_set(), trio.Event()
                    pause = FIRST_LOOK_SECONDS if asked else min(2 * pause, INDEX_LOOK_SECONDS)
                    begun = trio.current_time()
                    await self._read_index()
                    rest = LOOK_SHARE * (trio.current_time() - begun)
                said = ""
            except BrokerError as error:
                if str(error) != said and self.queues.publishing.open is not None:
                    said = str(error)
                    log.warning("parked mail of %s is not looked for: %s", self.queue, error)
                self.look()
                await trio.sleep(AGAIN_SECONDS)

    async def _read_index(self) -> None:
        """Report destinations with mail that other processes, or earlier ones, have parked."""
        gets = self._gets
        if gets is None or not gets.connection.is_open:
            return  # a new connection reads the list
        if not gets.is_open:
            gets = await self._open_gets(gets.connection)
        for key in await self.queues.read_index(self.queue, gets):
            self._tell(self._destination(key))

    async def _open_gets(self, connection: Connection) -> Channel:
        """Open the channel of `take`."""
        self._gets = await connection.channel()
        # Messages whose channel has ended are in the parked queue again. A take gives each to its
        # lease if that is not over, and leases the others anew.
        fallen, self._fallen = self._fallen, {}
        for lease in self.queues.held.values():
            if lease.taker is self and lease.parked and lease.is_stale:
                fallen[lease.destination] = None
        for key in fallen:
            destination = self._destination(key)
            destination.returned = trio.current_time()
            self._tell(destination)
        return self._gets

    def wait_seconds(self) -> float:
        if not self._held_back:
            return float("inf")
        return max(self._held_back[0][0] - trio.current_time(), 0.0)

    async def sort(self) -> None:
        """Lease, park or hold back what has come, some messages at a time."""
        if self.closed:
            return
        arrived: list[BrokerLease] = []
        waited: list[BrokerLease] = []
        self._sort_held_back(arrived)
        for _ in range(GROUP):
            found = await self.next()
            if found is None:
                break
            delivery, message = found
            key = place_of(message.properties).destination
            has_waited = due_of(delivery.properties) is not None
            if has_waited and self._has_room and self._window_of(self._destination(key)):
                self._destination(key).held += 1
                waited.append(self.lease(delivery, message, key))
            elif not self._place(delivery, message, key, arrived):
                self._hold_back(delivery, message, key)
        if arrived and not self.closed:
            self._receiver.arrived(arrived)
        if waited and not self.closed:
            self._receiver.waited(waited)
        if self.inbox and not self.closed:
            self.notice()
            await trio.lowlevel.checkpoint()

    def _hold_back(self, delivery: Delivery, message: Message, key: str) -> None:
        """Keep a message until memory has room; park it if such messages take too much already."""
        size = len(message.body or b"")
        if self._held_bytes + size > HELD_BYTES:
            self._park(delivery, key)
            return
        self._held_bytes += size
        until = trio.current_time() + self._hold_seconds
        self._held_back.append((until, delivery, message, key))

    def _sort_held_back(self, arrived: list[BrokerLease]) -> None:
        now = trio.current_time()
        while self._held_back:
            until, delivery, message, key = self._held_back[0]
            if until <= now:
                self._park(delivery, key)
            elif not self._place(delivery, message, key, arrived):
                return
            self._held_back.popleft()
            self._held_bytes -= len(message.body or b"")

    def _place(
        self, delivery: Delivery, message: Message, key: str, arrived: list[BrokerLease]
    ) -> bool:
        """Lease or park a message; False if there is no room in memory for now."""
        destination = self._destination(key)
        window = self._window_of(destination)
        # Mail that waits elsewhere comes again later, so new mail does not wait behind it.
        is_behind = destination.backlog or (destination.parking and not destination.scattered)
        if is_behind or destination.held >= window:
            self._park(delivery, key)
        elif not self._has_room:
            self._tidy(destination)
            return False
        else:
            destination.held += 1
            arrived.append(self.lease(delivery, message, key))
        return True

    @property
    def _has_room(self) -> bool:
        """Whether one more message may be leased."""
        return self.count < self.prefetch and not (self.is_heavy and self.count)

    def _window_of(self, destination: Destination) -> int:
        return self._window if destination.window is None else destination.window

    def _park(self, origin: BrokerLease | Delivery, key: str) -> None:
        """Publish a message to the parked queue of its destination, soon."""
        destination = self._destination(key)
        if not destination.parking:
            destination.parked = trio.Event()
        destination.parking += 1
        self.start_move(Move(origin, key=key))

    def new_keys(self, group: Sequence[Move]) -> list[str]:
        until = trio.current_time() - INDEX_AGAIN_SECONDS
        keys = {move.key for move in group if move.parks}
        return [key for key in keys if self._destination(key).indexed <= until]

    def moved(self, group: Sequence[Move]) -> None:
        now = trio.current_time()
        for move in group:
            if move.parks:
                self.parked += not move.elsewhere
                destination = self._destination(move.key)
                destination.scattered = move.elsewhere
                destination.parking = max(destination.parking - 1, 0)
                if not destination.parking:
                    destination.parked.set()
        parked = [move for move in group if move.parks and not move.elsewhere]
        unlisted = {move.key for move in parked if not move.is_listed}
        for key in dict.fromkeys(move.key for move in parked):
            destination = self._destination(key)
            if key not in unlisted and now - destination.indexed >= INDEX_AGAIN_SECONDS:
                destination.indexed = now
            self._tell(destination)
        for key in {move.key for move in group if move.parks and move.elsewhere}:
            self._tidy(self._destination(key))

    def _tell(self, destination: Destination) -> None:
        """Report mail of a destination to the receiver, once."""
        if not destination.backlog and not self.closed:
            destination.backlog = True
            self._receiver.waiting(destination.key, None)

    def over(self, lease: BrokerLease) -> None:
        super().over(lease)
        destination = self._destination(lease.destination)
        destination.held -= 1
        self._tidy(destination)
        if lease.parked and lease.is_stale and not self.closed:
            self._fallen[lease.destination] = None
            self.look()

    def release(self, lease: BrokerLease) -> None:
        if self.closed or lease.is_stale:
            super().release(lease)
        elif lease.parked:
            super().release(lease)
            destination = self._destination(lease.destination)
            destination.returned = trio.current_time()
            if not destination.backlog:
                destination.backlog = True
                self._token.run_sync_soon(self._report, destination.key)
        else:
            self._park(lease, lease.destination)

    def _report(self, key: str) -> None:
        if not self.closed:
            self._receiver.waiting(key, None)

    def set_window(self, destination: str, messages: int) -> None:
        self.check_open()
        self._destination(destination).window = messages

    def forget(self, destination: str) -> None:
        found = self.destinations.get(destination)
        if found is not None:
            found.window = None
            self._tidy(found)

    async def load(self, lease: Lease) -> None:
        """Check the lease: a body always comes with its message."""
        await trio.lowlevel.checkpoint()
        self.check_open()
        if not isinstance(lease, BrokerLease) or self.queues.held.get(lease.id) is not lease:
            raise ValueError(f"message {lease.id} of queue {lease.queue}: the lease is over")

    async def take(self, destination: str, limit: int) -> Taken:
        """Lease up to `limit` messages of a destination in the order in which they came."""
        if limit < 1:
            raise ValueError(f"limit {limit}: expected 1 or more")
        await trio.lowlevel.checkpoint()
        self.check_open()
        found = self.destinations.get(destination)
        if found is None or not (found.backlog or found.parking):
            return Taken([], more=False, next_due=None)
        found.taking += 1
        try:
            return await self._take(found, limit)
        finally:
            found.taking -= 1
            self._tidy(found)

    async def _take(self, found: Destination, limit: int) -> Taken:
        with trio.move_on_after(PARKING_SECONDS):
            await found.parked.wait()
        self.check_open()
        gets = self._gets
        if gets is None or not gets.connection.is_open:
            raise QueueError(self.queues.consuming.state.text)
        if not gets.is_open:
            gets = await self._open_gets(gets.connection)
        limit = min(limit, self.queues.options.fetch)
        # Always fetch one message: its flow may hold the memory that others wait for.
        room = max(MAX_BYTES - self.bytes, 1)
        place = self.queues.parked_place(self.queue, found.key)
        try:
            # A fetch from a queue that has expired would end the channel.
            await self.queues.parker.declare(place)
        except SilentQueue:
            found.backlog = False  # nothing more is parked there: mail comes from elsewhere
            return Taken([], more=False, next_due=None)
        leases: list[BrokerLease] = []
        found.backlog = False  # what is parked from now on is news
        try:
            deliveries, left = await gets.fetch(place.name, limit, room)
            while not deliveries and trio.current_time() < found.returned + RETURN_SECONDS:
                await trio.sleep(LOOK_SECONDS)
                deliveries, left = await gets.fetch(place.name, limit, room)
        except BaseException:
            found.backlog = True
            raise
        dealt = 0
        try:
            for delivery in deliveries:
                if leases and self.bytes > MOST_BYTES:
                    break  # unpacked, messages may need much more memory
                self.bytes += len(delivery.body)
                message = await self.open(delivery)
                dealt += 1
                if message is not None:
                    found.held += 1
                    leases.append(self.lease(delivery, message, found.key, parked=True))
            self.check_open()
            for delivery in deliveries[dealt:]:
                found.backlog, found.returned = True, trio.current_time()
                gets.nack(delivery.tag)
        except BaseException:
            found.backlog = True
            for lease in leases:
                self.queues.end(lease)
                gets.nack(lease.tag)
            for delivery in deliveries[dealt:]:
                gets.nack(delivery.tag)
            raise
        may_return = bool(deliveries) and trio.current_time() < found.returned + RETURN_SECONDS
        found.backlog = found.backlog or left > 0 or may_return
        return Taken(leases, more=found.backlog, next_due=None)
