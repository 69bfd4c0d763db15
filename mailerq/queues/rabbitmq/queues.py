"""Queues in a RabbitMQ broker, on trio.

Theory of operation
-------------------
There are three connections. A broker that is short of memory or disk stops reading from one that
publishes, and acknowledgements must still get through. A queue without a leader stops the
connection that publishes to it: `parker`, with one of its own, publishes to the queues of parked
mail, which are many and new. `publisher` publishes and declares,
`takers` consume. `topology` names the queues of the broker.

Where this differs from the embedded queue, as `mailerq.queues.interface` allows a broker:

- `publish` and `ack` that raise may have published some of their messages, and an acknowledgement
  that is lost with its connection is not noticed. Then a message comes again. This process knows
  the messages that it has settled, see `takers`; another one sends such a message twice.
- A due time is kept in steps (`mailerq.queues.rabbitmq.topology.step_for`), up to 2 % late. The
  subscriber is not told of mail that waits for a time: it arrives when it is due.
- The mail of a destination comes in order of arrival, in classic queues by priority first.

Guarantees
----------
- A publication is safe on the broker, persistent and confirmed, before `publish` returns. A
  consumed message is acknowledged after the publications of its settlement are.
- Without a broker, `publish`, `ack` and `take` raise `QueueError` after some seconds, and takers
  wait. Nothing ends because a broker is away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

import trio

from mailerq.address import queue_problem
from mailerq.config import Config
from mailerq.errors import MessageError, MessageTooLarge, QueueError, StorageError
from mailerq.message import Message
from mailerq.queues.home import Home, tended
from mailerq.queues.interface import (
    Consumer,
    Depth,
    Lease,
    Lost,
    Publication,
    Receiver,
    RemoteQueues,
    Settlement,
    Subscription,
)
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.coding import (
    MAX_BYTES,
    MAX_DOCUMENT,
    encode,
    encoding_of,
    header,
    in_thread,
)
from mailerq.queues.rabbitmq.connection import BrokerError, Channel, Delivery
from mailerq.queues.rabbitmq.keeper import Keeper, State
from mailerq.queues.rabbitmq.moving import Moving
from mailerq.queues.rabbitmq.options import Options
from mailerq.queues.rabbitmq.parking import ParkingLots
from mailerq.queues.rabbitmq.publisher import Copy, Place, Publisher, SilentQueue
from mailerq.queues.rabbitmq.settled import Settled
from mailerq.queues.rabbitmq.storing import Storing, Terms
from mailerq.queues.rabbitmq.subscription import RETURN_SECONDS, BrokerSubscription
from mailerq.queues.rabbitmq.takers import (
    BrokerConsumer,
    BrokerLease,
    Taker,
)
from mailerq.queues.rabbitmq.topology import (
    DELAYS,
    Topology,
    name_problem,
    step_for,
)
from mailerq.queues.rabbitmq.upkeep import (
    Trimmer,
    depth_of,
    hasten,
    purge,
    read_head,
    read_keys,
    ready,
)
from mailerq.rules.destinations import priority_of

__all__ = ["Options", "RabbitQueues", "open_rabbitmq"]

log = logging.getLogger("mailerq.queues")

T = TypeVar("T")

PARK_SECONDS: Final = 10.0
"""How long parking may take; the mail waits in another queue then."""

ROOM_BYTES: Final = 1 << 20
"""What a document may grow by before it is published again."""

MAX_NAMES: Final = 10_000
"""Queues to remember, to count their messages; messages name queues for their results."""


@asynccontextmanager
async def open_rabbitmq(
    addresses: Sequence[Address],
    options: Options | None = None,
    *,
    clock: Callable[[], float] = time.time,
    storing: Storing | None = None,
) -> AsyncIterator[RabbitQueues]:
    """Use the first broker that can be reached, for the duration of the context.

    Does not wait for the broker. `clock` is the wall clock, in seconds since 1970. `storing` has
    bodies outside the messages.
    """

    async def make(nursery: trio.Nursery) -> RabbitQueues:
        return RabbitQueues(nursery, addresses, options or Options(), clock, storing)

    async with tended(make) as queues:
        yield queues


class RabbitQueues(RemoteQueues):
    """The queues of one vhost, see `open_rabbitmq`. Takers are opened on its own loop."""

    def __init__(
        self,
        nursery: trio.Nursery,
        addresses: Sequence[Address],
        options: Options,
        clock: Callable[[], float],
        storing: Storing | None = None,
    ) -> None:
        self.options = options
        self._storing = storing
        self.clock = clock

        said: set[str] = set()  # one line for a broker that is away, and not one for each

        def keeper(name: str) -> Keeper:
            return Keeper(
                addresses,
                name=name,
                context=options.context,
                first_pause=options.first_pause_seconds,
                said=said,
            )

        self.publishing = keeper("publishing to RabbitMQ")
        self.publishing.on_change.append(self._state_changed)
        self.on_trouble = []
        self.consuming = keeper("consuming from RabbitMQ")
        self._said: tuple[int, ...] | None = None
        self.publishing.on_change.append(self._say_notes)
        self.publisher = Publisher(
            self.publishing, throttle=options.throttle, publish_seconds=options.publish_seconds
        )
        self.publisher.on_redeclared = self._redeclared
        self.parking = keeper("parking at RabbitMQ")
        self.parker = Publisher(
            self.parking,
            throttle=options.throttle,
            publish_seconds=min(options.publish_seconds, PARK_SECONDS),
        )
        self.lots = ParkingLots(self)
        self.moving = Moving(self)
        self.held: dict[int, BrokerLease] = {}
        self.by_identity: dict[str, BrokerLease] = {}
        self.leases = 0
        """The number of the last lease."""
        self._settled = Settled()
        self._names: set[str] = set(options.names)
        self._waits: set[str] = set()
        """Wait queues that this process has published to."""
        self._takers: dict[Taker, None] = {}
        self._trimmer = Trimmer(self)
        self._hastening = False
        self._nursery = nursery
        self.home = Home(nursery)
        self._news = trio.Event()

    async def run(
        self,
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                task_status.started()
                nursery.start_soon(self.publishing.run)
                nursery.start_soon(self.consuming.run)
                nursery.start_soon(self.publisher.run)
                nursery.start_soon(self.parking.run)
                nursery.start_soon(self.parker.run)
                nursery.start_soon(self._trimmer.run)

    async def close(self) -> None:
        """Finish what is under way."""
        await self.home.close()

    @property
    def states(self) -> tuple[State, State]:
        """What is the case with the two connections, for people."""
        return self.publishing.state, self.consuming.state

    def _say_notes(self, state: State) -> None:
        """Log once for each version of a broker what it cannot do of what the settings say."""
        version = self.publishing.version
        if state.kind == "open" and version != self._said:
            self._said = version
            for note in self.options.notes(version):
                log.warning("%s", note)

    @property
    def trouble(self) -> str | None:
        state = self.publishing.state
        return self.topology.problem() if state.kind == "open" else state.text

    def give_up(self) -> None:
        self.publisher.give_up()
        self.parker.give_up()

    def _redeclared(self, names: Collection[str]) -> None:
        for taker in self._takers:
            if taker.queue in names:
                taker.end(BrokerError("the queue was deleted, and is declared again"))

    def _state_changed(self, state: State) -> None:
        for callback in self.on_trouble:
            callback()

    @property
    def topology(self) -> Topology:
        options = self.options
        version = self.publishing.version or self.consuming.version
        return Topology(
            options.queue_type,
            version,
            options.exchange,
            options.max_priority,
            options.is_lazy(version),
        )

    @property
    def identity(self) -> str:
        """The same for all that share an outbox; empty until there is a connection."""
        connection = self.publishing.open
        if connection is None:
            return ""
        vhost = connection.address.vhost
        return f"{connection.cluster_name} {vhost} {self.options.outbox}"[:200]

    def place(self, queue: str) -> Place:
        """A queue of ours, as a place to publish to."""
        if len(self._names) < MAX_NAMES:
            self._names.add(queue)
        topology = self.topology
        if queue.startswith(f"{self.options.outbox}.at."):
            back = self.place(self.options.outbox)
            return Place(queue, topology.handed(self.options.outbox), back=back)
        arguments = topology.main() if self.options.declare else None
        durable = not self.options.is_transient(queue, topology.version)
        return Place(queue, arguments, exchange=self.options.exchange, durable=durable)

    def wait_place(self, queue: str, seconds: int) -> Place:
        """The queue where mail of a queue waits, for one of the times of `DELAYS`."""
        name, arguments = self.topology.wait(queue, seconds)
        if len(self._waits) < MAX_NAMES:
            self._waits.add(name)
        return Place(name, arguments, back=self.place(queue))

    def parked_place(self, queue: str, destination: str) -> Place:
        """The parked queue of a destination."""
        name, arguments = self.topology.parked(queue, destination)
        return Place(name, arguments, back=self.place(queue), settles=True)

    # Publish

    def check(self, publication: Publication) -> None:
        self._check_name(publication.queue)
        if self._storing is not None:
            publication = self._storing.without_body(publication)
        encode(publication.message)

    def _check_name(self, queue: str) -> None:
        problem = queue_problem(queue) or name_problem(queue)
        if self.options.locks and queue.startswith(self.options.locks):
            problem = "is that of a lock of the cluster"
        if problem is not None:
            raise MessageError(f"the queue name {ascii(queue)[:80]} {problem}")

    async def encode(self, message: Message, *, again: bool = False) -> bytes:
        """The document of a message, or of one that was accepted before and goes out `again`.

        Raises `MessageError`.
        """
        most = MAX_BYTES
        if again and self.topology.version < (4,):
            most = MAX_DOCUMENT
        elif self.options.compress and not again:
            most -= ROOM_BYTES
        work = partial(encode, message, compress=self.options.compress, most=most, squeeze=again)
        return await in_thread(len(message.body or b""), work)

    async def publish(self, publications: Sequence[Publication], *, again: bool = False) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        publications = await self._store(publications)
        bodies = await self._prepare(publications, again=again)
        await self.home.run(partial(self._publish, publications, bodies))

    async def _store(self, publications: Sequence[Publication]) -> Sequence[Publication]:
        """Have bodies stored that are not to be in messages."""
        storing = self._storing
        if storing is None or not any(map(storing.terms.wants, publications)):
            return publications
        return await self.home.run(partial(storing.store, publications, now=self.clock()))

    async def _prepare(
        self, publications: Sequence[Publication], *, again: bool = False
    ) -> list[bytes]:
        for publication in publications:
            self._check_name(publication.queue)
        try:
            return [
                await self.encode(publication.message, again=again) for publication in publications
            ]
        except MessageTooLarge as error:
            if self._storing is None or self._storing.terms.policy == "none":
                raise
            # The storage has not taken the body, and escaped in JSON it is too large.
            raise StorageError(str(error)) from error

    async def _publish(self, publications: Sequence[Publication], bodies: Sequence[bytes]) -> None:
        await self.wait_ready()
        now = self.clock()
        await self.publisher.publish(
            [
                self._copy(publication, body, now)
                for publication, body in zip(publications, bodies, strict=True)
            ]
        )

    async def wait_ready(self) -> None:
        """Wait for a connection; what is declared depends on the version of the broker."""
        with self.publisher.deadline():
            await self.publishing.connection()
            if problem := self.topology.problem():
                raise QueueError(problem)
            return
        raise QueueError(self.publishing.state.text)

    def _copy(self, publication: Publication, body: bytes, now: float) -> Copy:
        due, delay = publication.due, 0.0
        if due is not None:
            delay = due - now
            if publication.since:
                delay = min(delay, due - publication.since)
        copy = self.copy_to(
            publication.queue,
            body,
            delay,
            due=due,
            priority=priority_of(publication.message.properties),
            encoding=encoding_of(body),
            identity=publication.identity,
        )
        return self.publisher.repeat(copy) if publication.again else copy

    def copy_to(
        self,
        queue: str,
        body: bytes,
        delay: float,
        *,
        due: float | None,
        priority: int,
        encoding: str | None,
        identity: str = "",
    ) -> Copy:
        """A copy for a queue, or for one of its wait queues."""
        step = step_for(delay)
        place = self.wait_place(queue, step) if step else self.place(queue)
        properties = header(
            identity or self.publisher.identity(),
            priority=priority,
            due=due if step else None,
            encoding=encoding,
            now=self.clock(),
            persistent=self.options.persistent or queue not in self.options.results,
        )
        return Copy(place, body, properties)

    def _notice(self) -> None:
        news, self._news = self._news, trio.Event()
        news.set()

    # Leases

    async def ack(self, settlements: Sequence[Settlement]) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        publications: Sequence[Publication] = [
            each for one in settlements for each in (*one.publications, *one.others)
        ]
        publications = await self._store(publications)
        bodies = await self._prepare(publications, again=True)

        async def publish(lost: Lost) -> None:
            if publications:
                await self._publish(publications, bodies)

        await self.settle(settlements, publish)

    async def settle(
        self, settlements: Sequence[Settlement], publish: Callable[[Lost], Awaitable[None]]
    ) -> None:
        leases = [self._held(settlement.lease) for settlement in settlements]
        if len({lease.id for lease in leases}) < len(leases):
            raise ValueError("a lease is settled twice")
        for lease in leases:
            lease.settling = True
        await self.home.run(partial(self._settle, leases, publish))

    async def _settle(
        self, leases: Sequence[BrokerLease], publish: Callable[[Lost], Awaitable[None]]
    ) -> None:
        try:
            await publish(lambda: [lease.identity for lease in leases if lease.is_lost])
        except BaseException:
            for lease in leases:
                lease.settling = False
                if lease.taker is not None and lease.taker.closed:
                    self.end(lease)
                    lease.taker.release(lease)
            raise
        for lease in leases:
            self.finish(lease.channel, lease.tag, lease.identity)
            self.end(lease)

    def finish(self, channel: Channel | None, tag: int, identity: str) -> None:
        """Acknowledge a message; one that the broker delivers again is remembered for then."""
        for publisher in (self.publisher, self.parker):
            publisher.deal_with(identity)
        if channel is not None and channel.is_open:
            channel.ack(tag)
            self._settled.acked(identity, channel)
        else:
            self._settled.remember((identity,))

    def was_settled(self, identity: str, delivery: Delivery) -> bool:
        """Whether a message that comes has been settled before; true once for each."""
        if self._settled.comes_again(identity, delivery):
            if self.on_recognised is not None:
                self.on_recognised(identity)
            return True
        return self._settled.lost_ack(identity, delivery)

    def acks_lost(self) -> None:
        """A connection has ended: what was acknowledged last may not have been heard."""
        unheard = self._settled.unheard()
        if unheard and self.on_unheard is not None:
            self.on_unheard(unheard)

    def recognise(self, identities: Collection[str]) -> None:
        self._settled.remember(identities)

    def is_second(self, identity: str, *, again: bool = False) -> bool:
        """Whether a message is the second copy of one that this process has, or had.

        A copy that its publisher has written `again` may be one whoever the publisher is. No other
        message has its id, and what was acknowledged comes no more while its channel is open.
        """
        if again and (identity in self.by_identity or self._settled.was_acked(identity)):
            return True
        for publisher in (self.publisher, self.parker):
            done = publisher.repeated.get(identity)
            if done is not None:
                return done or identity in self.by_identity
        return False

    def end(self, lease: BrokerLease) -> None:
        """A lease is over."""
        del self.held[lease.id]
        if self.by_identity.get(lease.identity) is lease:
            del self.by_identity[lease.identity]
        if lease.taker is not None:
            lease.taker.over(lease)
        self._notice()

    def _held(self, lease: Lease) -> BrokerLease:
        held = self.held.get(lease.id)
        if held is None or held is not lease or held.settling:
            raise ValueError(f"message {lease.id} of queue {lease.queue}: the lease is over")
        return held

    def release(self, lease: Lease) -> None:
        held = self._held(lease)
        if self.home.is_here:
            self._release(held)
        else:
            held.settling = True  # over for everybody from now on
            self.home.soon(self._release, held)

    def _release(self, lease: BrokerLease) -> None:
        self.end(lease)
        if lease.taker is not None:
            lease.taker.release(lease)

    # For takers

    async def read_index(self, queue: str, channel: Channel) -> list[str]:
        """The destinations with parked mail, as processes before this one have noted them.

        What another process has leased is not seen; should that process crash, its mail falls back
        into the queue in time.
        """
        index = Place(*self.topology.index(queue))
        await self.publisher.declare(index)
        entries, keys = await read_keys(channel, index.name)
        found = [key for key in keys if await self._is_parked(queue, key)]
        if len(found) < len(keys):
            # A quorum queue does not count what the process before has just let go.
            await trio.sleep(RETURN_SECONDS)
            found = [key for key in keys if await self._is_parked(queue, key)]
        await self.publisher.publish([self.moving.index_copy(queue, key) for key in found])
        for entry in entries:
            channel.ack(entry.tag)
        return found

    async def declare_waits(self, queue: str) -> None:
        """Declare the wait queues of a queue, long before mail is published to them.

        A broker that is killed may forget a queue that was declared in the seconds before.
        """
        await self.publishing.connection()
        back = self.place(queue)
        for name, arguments in self.topology.waits(queue):
            await self.publisher.declare(Place(name, arguments, back=back))

    async def _is_parked(self, queue: str, destination: str) -> bool:
        try:
            return await ready(self, self.topology.parked(queue, destination)[0]) > 0
        except SilentQueue:
            return False

    # Take

    @asynccontextmanager
    async def consume(self, queue: str, *, prefetch: int) -> AsyncIterator[Consumer]:
        self._check_taking(prefetch)
        consumer = BrokerConsumer(self, queue, prefetch)
        async with self._taking(consumer):
            yield consumer

    @asynccontextmanager
    async def subscribe(
        self, queue: str, receiver: Receiver, *, prefetch: int, window: int
    ) -> AsyncIterator[Subscription]:
        self._check_taking(prefetch)
        subscription = BrokerSubscription(
            self,
            queue,
            receiver,
            prefetch=prefetch,
            window=window,
            hold_seconds=self.options.hold_seconds,
        )
        async with self._taking(subscription):
            yield subscription

    def _check_taking(self, prefetch: int) -> None:
        if prefetch < 1:
            raise ValueError(f"prefetch {prefetch}: expected 1 or more")
        if self.home.closed:
            raise QueueError("the queue is closed")
        if not self.home.is_here:
            raise RuntimeError("messages are taken on the trio loop that opened the queues")

    @asynccontextmanager
    async def _taking(self, taker: Taker) -> AsyncIterator[None]:
        self._takers[taker] = None
        self._names.add(taker.queue)
        moves, takes, tends = _Work(taker.move), _Work(taker.run), _Work(taker.tend)
        for work in (moves, takes, tends):
            self._nursery.start_soon(work.run)
        try:
            yield
        finally:
            taker.close()
            for lease in [lease for lease in self.held.values() if lease.taker is taker]:
                if not lease.settling:
                    self._release(lease)
            with trio.CancelScope(shield=True):
                await tends.end()
                # What is safe elsewhere is acknowledged before the channel closes.
                await moves.end()
                while any(lease.taker is taker for lease in self.held.values()):
                    await self._news.wait()
                await takes.end()
            del self._takers[taker]

    # Seeing

    async def depths(self) -> list[Depth]:
        return await self.home.run(self._depths)

    async def _depths(self) -> list[Depth]:
        await self.wait_ready()
        return [await depth_of(self, queue) for queue in sorted(self._names)]

    async def purge(self, queue: str) -> int:
        await trio.lowlevel.checkpoint_if_cancelled()
        return await self.home.run(partial(self._purge, queue))

    async def _purge(self, queue: str) -> int:
        await self.wait_ready()
        return await purge(self, queue)

    async def read_head(
        self,
        queue: str,
        limit: int,
        show: Callable[[Sequence[Message]], None],
        *,
        remove: bool = False,
    ) -> None:
        await read_head(self, queue, limit, show, remove=remove)

    def takers(self, queue: str) -> list[Taker]:
        """Who takes from a queue."""
        return [taker for taker in self._takers if taker.queue == queue]

    def wait_names(self, queue: str) -> list[str]:
        """The queues in which messages of a queue wait for their time."""
        names = [self.topology.wait(queue, seconds)[0] for seconds in DELAYS]
        return [name for name in names if queue == self.options.outbox or name in self._waits]

    def wake(self, *, everything: bool = False) -> None:
        """A broker needs no hint; with `everything`, mail that waits is taken at once."""
        if everything:
            self.home.soon(self._hasten_soon)

    def _hasten_soon(self) -> None:
        for taker in self._takers:
            if isinstance(taker, BrokerSubscription):
                taker.look()
        if not (self._hastening or self.home.closed):
            self._hastening = True
            self._nursery.start_soon(self._hasten)

    async def _hasten(self) -> None:
        try:
            count = await self.home.counted(partial(hasten, self, self.options.outbox))
            log.info("%d messages that waited in the queue %s come now", count, self.options.outbox)
        except QueueError as error:
            log.error("mail that waits in %s stays there: %s", self.options.outbox, error)
        finally:
            self._hastening = False

    def configure(self, config: Config) -> None:
        """Apply changed settings; those of the topology and of connections are fixed."""
        new = Options.of(config)
        self.options = replace(
            self.options,
            compress=new.compress,
            persistent=new.persistent,
            throttle=new.throttle,
            fetch=new.fetch,
            min_qos=new.min_qos,
            names=new.names,
            results=new.results,
            bounds=new.bounds,
        )
        if self._storing is not None:
            self._storing.terms = Terms.of(config)
        self._names.update(new.names)
        self.publisher.throttle = self.parker.throttle = new.throttle

    def statistics(self) -> dict[str, Any]:
        leased: dict[str, int] = {}
        for taker in list(self._takers):
            leased[taker.queue] = leased.get(taker.queue, 0) + taker.count
        return {
            "published": self.publisher.published + self.parker.published,
            "parked": sum(taker.parked for taker in self._takers),
            "trimmed": self._trimmer.trimmed,
            "connections": self.publishing.connections + self.consuming.connections,
            "broker": [state.text for state in dict.fromkeys(self.states)],
            "leased": leased,
        }


class _Work:
    """A task that is ended, and waited for."""

    def __init__(self, work: Callable[[], Awaitable[None]]) -> None:
        self._work = work
        self._scope = trio.CancelScope(shield=True)
        self._over = trio.Event()

    async def run(self) -> None:
        try:
            with self._scope:
                await self._work()
        finally:
            self._over.set()

    async def end(self) -> None:
        self._scope.cancel()
        await self._over.wait()
