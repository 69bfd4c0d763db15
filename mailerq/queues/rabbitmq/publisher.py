"""Publishes to a broker, with confirms, and declares the queues that this needs.

Theory of operation
-------------------
`Publisher.publish` puts copies in line. As many as `throttle` are written and not yet confirmed;
the rest waits, also while the broker is blocked or the connection has much to write. When the
connection is lost, copies that are not confirmed are written again on the next one, so a copy may
be in its queue twice, and never not at all. Both have the same id: where this process takes both,
the second goes nowhere (`Publisher.repeated`). A batch that is not confirmed in time fails, though
some of its copies may be safe.

A refusal ends the channel, and does not say which copy it is about: see `_refused`.

All is published as `mandatory`: a copy for which there is no queue comes back before its
confirmation. Its queue is then declared anew, once for each call.

Guarantees
----------
- `publish` returns when the broker has confirmed every copy, or raises `BrokerError`.
- A turn of the loop writes at most `TURN_COPIES` copies.
"""

from __future__ import annotations

import math
import secrets
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from typing import Any, Final, TypeVar

import trio
from pika import spec

from mailerq.queues.rabbitmq.coding import mark_again
from mailerq.queues.rabbitmq.connection import (
    ACCESS_REFUSED,
    NOT_FOUND,
    BrokerError,
    Channel,
    Connection,
    Declared,
)
from mailerq.queues.rabbitmq.keeper import Keeper
from mailerq.queues.rabbitmq.topology import DECLARE_SECONDS

__all__ = ["Copy", "Place", "Publisher", "SilentQueue"]

T = TypeVar("T")

PUBLISH_SECONDS: Final = 30.0
"""A batch that is not confirmed by then fails. A client waits for its 250 five minutes and more
(RFC 5321, section 4.5.3.2.6), so the failure still reaches the client."""

THROTTLE: Final = 1000
TURN_COPIES: Final = 100
MAX_BUFFERED: Final = 4 << 20
"""Bytes that may wait for the kernel before no more is written."""

MAX_REPEATED: Final = 100_000
MAX_DECLARED: Final = 100_000
AGAIN_SECONDS: Final = 1.0

ASK_TRIES: Final = 3
"""How often the broker is asked about a queue if connections are lost meanwhile."""

ANSWER_SECONDS: Final = 8.0
SILENT_SECONDS: Final = 30.0
MAX_SILENT_SECONDS: Final = 1800.0
"""A queue that has not answered for `ANSWER_SECONDS`, or not confirmed, is left alone for a while,
which doubles between these."""

TRIAL_SECONDS: Final = 3.0
"""How long a queue that was left alone may take to confirm a message; other mail waits for that."""

PROBE_SECONDS: Final = 2.0


class SilentQueue(BrokerError):
    """A queue of the broker does not answer, as a quorum queue without a leader."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the queue {name!a} does not answer: it may have no leader, because nodes of the "
            "cluster are away, or because the broker was killed just after the queue was declared. "
            "In the latter case nothing is in the queue: rabbitmqctl delete_queue would help"
        )


class Place:
    """A queue to publish to, with what declares it; no `arguments`: it is there, or not.

    Messages of this queue fall into the queue `back`, which must be there before. A queue that
    `settles` is declared while mail comes, so `Publisher.is_young` has to know when.
    """

    __slots__ = ("arguments", "back", "durable", "exchange", "name", "settles")

    def __init__(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        exchange: str = "",
        back: Place | None = None,
        durable: bool = True,
        settles: bool = False,
    ) -> None:
        self.name = name
        self.settles = settles
        self.durable = durable
        self.arguments = arguments
        self.exchange = exchange
        self.back = back


class Copy:
    """One message for one queue of the broker."""

    __slots__ = ("batch", "body", "done", "place", "problem", "properties")

    def __init__(self, place: Place, body: bytes, properties: spec.BasicProperties) -> None:
        self.place = place
        self.body = body
        self.properties = properties
        self.batch: _Batch | None = None
        self.done = False
        """The broker has confirmed or refused it."""
        self.problem: str | None = None

    @property
    def is_safe(self) -> bool:
        """Whether the broker has confirmed it, in its queue."""
        return self.done and self.problem is None


class _Batch:
    """The copies of one call that are not confirmed yet."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self.left = len(copies)
        self.refused: list[Copy] = []
        self.over = trio.Event()

    def confirmed(self, copy: Copy) -> None:
        if copy.problem is not None:
            self.refused.append(copy)
        self.left -= 1
        if not self.left:
            self.over.set()


class Publisher:
    """Publishes on the connection of a keeper. Belongs to the loop of `run`."""

    def __init__(
        self, keeper: Keeper, *, throttle: int = THROTTLE, publish_seconds: float = PUBLISH_SECONDS
    ) -> None:
        self.keeper = keeper
        self.published = 0
        """Copies confirmed so far."""
        self.on_redeclared: Callable[[Collection[str]], None] | None = None
        """Called with the names of queues that were not there, and were declared anew."""
        self.throttle = throttle
        """Copies on the way at a time."""
        self._seconds = publish_seconds
        self._prefix = secrets.token_hex(8)
        self._number = 0
        self._waiting: deque[Copy] = deque()
        self._unconfirmed: dict[int, Copy] = {}
        self._one_by_one = 0
        """Copies to write one at a time, because the broker refuses one of them."""
        self._by_identity: dict[str, Copy] = {}
        self._channel: Channel | None = None
        self._tag = 0
        self._more_later = False
        self._admin: Channel | None = None
        # Not a `trio.Lock`: compiled tasks cannot own one.
        self._admin_lock = trio.Semaphore(1)
        self._declared: dict[str, float] = {}
        self._young: dict[str, float] = {}
        self._seen: set[str] = set()
        """Places that settle, and that this process has declared before."""
        self._silent: dict[str, tuple[float, float]] = {}
        self._deadlines: set[trio.CancelScope] = set()
        self.repeated: OrderedDict[str, bool] = OrderedDict()
        """Ids of copies that were written again, so may be in their queue twice; whether this
        process has dealt with the first."""
        self._dealt_with: set[str] = set()
        """Of the copies on the way, those that came back and were dealt with before the broker
        confirmed them."""
        self._token = trio.lowlevel.current_trio_token()

    def identity(self) -> str:
        """A new id for a copy."""
        self._number += 1
        return f"{self._prefix}.{self._number:x}"

    def deal_with(self, identity: str) -> None:
        """A message of a queue is dealt with: should it come again, that is a second copy."""
        if identity in self._by_identity:
            self._dealt_with.add(identity)
        if identity in self.repeated:
            self.repeated[identity] = True

    async def run(self) -> None:
        """Publish until cancelled."""
        while True:
            connection = await self.keeper.connection()
            try:
                channel = await connection.channel()
                self._tag = 0
                await channel.confirm(self._on_confirmed)
                channel.on_return = self._on_return
                connection.on_blocked.append(self._pump)
                self._declared.clear()
                self._channel = channel
                self._pump()
                raise await channel.wait_closed()
            except BrokerError as error:
                # The state of the keeper says why a connection is over.
                if connection.is_open:
                    self._channel = None
                    self._refused(error)
                await trio.sleep(AGAIN_SECONDS)
            finally:
                self._channel = None
                self._again()

    def _refused(self, reason: BrokerError) -> None:
        """Fail what the broker has refused, by ending the channel.

        A right or an exchange that is missing concerns all that goes to the exchange. Else one of
        the copies is at fault, such as one that is too large: they are written one by one.
        """
        unconfirmed = list(self._unconfirmed.values())
        refused: list[Copy] = []
        if reason.code in (ACCESS_REFUSED, NOT_FOUND):
            exchanges = {copy.place.exchange for copy in unconfirmed}
            refused = [each for each in self._waiting if each.place.exchange in exchanges]
            refused = [*unconfirmed, *refused]
        elif len(unconfirmed) == 1:
            refused = unconfirmed
        self._one_by_one = max(self._one_by_one, len(unconfirmed)) - len(refused)
        if not refused:
            return
        gone = set(map(id, refused))
        self._unconfirmed = {
            tag: copy for tag, copy in self._unconfirmed.items() if id(copy) not in gone
        }
        self._waiting = deque(copy for copy in self._waiting if id(copy) not in gone)
        for copy in refused:
            copy.done, copy.problem = True, str(reason)
            if copy.batch is not None:
                copy.batch.confirmed(copy)

    def note_repeated(self, identity: str) -> None:
        """A copy is published once more, elsewhere; the first one may be in its queue, too."""
        self.repeated[identity] = self.repeated.get(identity, False)
        if len(self.repeated) > MAX_REPEATED:
            self.repeated.popitem(last=False)

    def repeat(self, copy: Copy) -> Copy:
        """A copy is to be published that may be in its queue already."""
        self.note_repeated(str(copy.properties.message_id))
        mark_again(copy.properties)
        return copy

    def _again(self) -> None:
        """Put what is not confirmed back in line, in order."""
        for identity, copy in self._by_identity.items():
            known = self.repeated.get(identity, False)
            self.repeated[identity] = known or identity in self._dealt_with
            mark_again(copy.properties)
        self._dealt_with.clear()
        while len(self.repeated) > MAX_REPEATED:
            self.repeated.popitem(last=False)
        self._waiting.extendleft(reversed(self._unconfirmed.values()))
        self._unconfirmed.clear()
        self._by_identity.clear()

    async def publish(self, copies: Sequence[Copy]) -> None:
        """Publish copies and wait for their confirmation. Raises `BrokerError`.

        Not to be cancelled: nobody would know what is safe.
        """
        if not copies:
            return
        try:
            await self._publish(copies)
        except BrokerError:
            for copy in copies:
                identity = str(copy.properties.message_id)
                if copy.done or identity in self._by_identity:
                    self.note_repeated(identity)  # by the caller, who knows of none what is safe
            raise

    async def _publish(self, copies: Sequence[Copy]) -> None:
        begun = trio.current_time()
        is_trial = any(self.is_suspected(copy.place.name) for copy in copies)
        with self.deadline(TRIAL_SECONDS if is_trial else math.inf) as scope:
            await self._declare_all(copies)
            refused = await self._submit(copies)
            missing = [copy for copy in refused if copy.place.name not in self._declared]
            if missing and missing == refused:
                # Somebody deleted the queue.
                await self._declare_all(missing)
                for copy in missing:
                    copy.problem = None
                if self.on_redeclared is not None:
                    self.on_redeclared({copy.place.name for copy in missing})
                refused = await self._submit(missing)
            if refused:
                raise BrokerError(refused[0].problem or "the broker refused a message")
        if scope.cancelled_caught:
            await self._suspect(copies)
            seconds = trio.current_time() - begun
            raise BrokerError(
                f"not confirmed within {seconds:.3g} seconds: {self.keeper.state.text}"
            )

    @contextmanager
    def deadline(self, seconds: float = math.inf) -> Iterator[trio.CancelScope]:
        """Limit how long something waits for the broker; `give_up` ends it too."""
        with trio.move_on_after(min(self._seconds, seconds)) as scope:
            self._deadlines.add(scope)
            try:
                yield scope
            finally:
                self._deadlines.discard(scope)

    def give_up(self) -> None:
        """End all waiting for the broker."""
        for scope in self._deadlines:
            scope.cancel()

    async def _submit(self, copies: Sequence[Copy]) -> list[Copy]:
        batch = _Batch(copies)
        for copy in copies:
            copy.batch = batch
        self._waiting.extend(copies)
        self._pump()
        try:
            await batch.over.wait()
        except trio.Cancelled:
            for copy in copies:
                copy.batch = None  # those not written yet are not written any more
            raise
        return batch.refused

    def _pump(self) -> None:
        """Write what may be written now."""
        channel = self._channel
        if channel is None or not channel.is_open:
            return
        connection = channel.connection
        room = TURN_COPIES
        waiting = self._waiting
        while (
            waiting
            and len(self._unconfirmed) < (1 if self._one_by_one > 0 else self.throttle)
            and connection.blocked is None
            and connection.buffered < MAX_BUFFERED
        ):
            if not room:
                if not self._more_later:
                    self._more_later = True
                    self._token.run_sync_soon(self._pump_later)
                return
            copy = waiting.popleft()
            if copy.batch is None:
                continue
            if self._is_silent(copy.place.name):
                copy.problem = str(SilentQueue(copy.place.name))
                copy.batch.confirmed(copy)
                continue
            room -= 1
            self._tag += 1
            self._unconfirmed[self._tag] = copy
            self._by_identity[str(copy.properties.message_id)] = copy
            channel.publish(copy.place.exchange, copy.place.name, copy.body, copy.properties)

    def _pump_later(self) -> None:
        self._more_later = False
        self._pump()

    def _on_return(self, code: int, queue: str, properties: spec.BasicProperties) -> None:
        copy = self._by_identity.get(str(properties.message_id))
        if copy is not None:
            copy.problem = f"the queue {queue!a} is not there; rabbitmq-declare would create it"
            if copy.place.arguments is not None:
                self._declared.pop(copy.place.name, None)

    def _on_confirmed(self, tag: int, multiple: bool, taken: bool) -> None:
        if not multiple:
            self._finish(tag, taken)
        else:
            # Tags are in order: only those that are confirmed are looked at.
            for each in list(takewhile(lambda each: each <= tag, self._unconfirmed)):
                self._finish(each, taken)
        self._pump()

    def _finish(self, tag: int, taken: bool) -> None:
        copy = self._unconfirmed.pop(tag, None)
        if copy is None:
            return
        identity = str(copy.properties.message_id)
        self._by_identity.pop(identity, None)
        if self._dealt_with:
            self._dealt_with.discard(identity)
        if not taken:
            copy.problem = f"the broker has no room for the queue {copy.place.name!a}, or lost it"
        self.published += copy.problem is None
        copy.done = True
        self._one_by_one = max(self._one_by_one - 1, 0)
        if self._silent:
            self._silent.pop(copy.place.name, None)
        if copy.batch is not None:
            copy.batch.confirmed(copy)

    # Declaring

    async def _declare_all(self, copies: Sequence[Copy]) -> None:
        for place in {copy.place.name: copy.place for copy in copies}.values():
            await self.declare(place)

    async def declare(self, place: Place) -> None:
        """Declare a queue, if that has not been done lately. Raises `BrokerError`."""
        self._check_silent(place.name)
        if place.back is not None:
            await self.declare(place.back)
        if place.arguments is None:
            return
        now = trio.current_time()
        if now - self._declared.get(place.name, -DECLARE_SECONDS) < DECLARE_SECONDS:
            return

        async def work(admin: Channel) -> None:
            await admin.declare(place.name, durable=place.durable, arguments=place.arguments)
            if place.exchange:
                await admin.declare_exchange(place.exchange)
                await admin.bind(place.name, place.exchange)

        # One that is there may be as young: another process has declared it a moment ago.
        is_new = place.settles and (
            place.name not in self._seen or await self.look(place.name) is None
        )
        await self._ask(place.name, work)
        if len(self._declared) >= MAX_DECLARED:
            self._declared.clear()
        self._declared[place.name] = now
        if is_new:
            if len(self._seen) >= MAX_DECLARED:
                self._seen.clear()
            self._seen.add(place.name)
            self._young[place.name] = trio.current_time()

    def is_young(self, place: Place, seconds: float) -> bool:
        """Whether a queue that `settles` was made less than `seconds` ago."""
        now = trio.current_time()
        if now - self._young.get(place.name, -seconds) < seconds:
            return True
        self._young.pop(place.name, None)
        return False

    async def _ask(self, name: str, work: Callable[[Channel], Awaitable[T]]) -> T:
        """Ask the broker about a queue. Raises `BrokerError`.

        After a lost connection the question is repeated on the next one, but not for ever: the
        broker may close the connection because of it.

        A quorum queue without a leader does not answer. That must not keep up what is to be said
        of others, so such a queue is not asked again for a while.
        """
        self._check_silent(name)
        async with self._admin_lock:
            for tries_left in reversed(range(ASK_TRIES)):
                connection = await self.keeper.connection()
                try:
                    admin = await self._admin_channel(connection)
                    with trio.move_on_after(ANSWER_SECONDS):
                        return await work(admin)
                except BrokerError:
                    if connection.is_open or not tries_left:
                        raise
                else:
                    break
            self._admin = None
        await self._note_silent(name)
        self._check_silent(name)
        raise BrokerError(f"no answer within {ANSWER_SECONDS:g} seconds")

    def is_suspected(self, name: str) -> bool:
        """Whether a queue did not answer the last time."""
        return name in self._silent

    def _is_silent(self, name: str) -> bool:
        found = self._silent.get(name) if self._silent else None
        return found is not None and trio.current_time() < found[0]

    def _check_silent(self, name: str) -> None:
        if self._is_silent(name):
            raise SilentQueue(name)

    async def _suspect(self, copies: Sequence[Copy]) -> None:
        """Do something about copies that are not confirmed: one queue may be silent.

        The first message to a queue without a leader stops the channel, and some hundred more stop
        the connection, so a new one is needed. Which queue it was is known if there is only one;
        all queues of parked mail are suspected, because their mail can wait elsewhere.
        """
        connection = self.keeper.open
        if not self._unconfirmed or connection is None or connection.blocked is not None:
            return
        connection.abort("the broker does not confirm")
        names = {copy.place.name: copy.place for copy in copies if not copy.done}
        if len(names) == 1 or all(place.settles for place in names.values()):
            for name in names:
                await self._note_silent(name)

    async def _note_silent(self, name: str) -> None:
        """Note a queue that does not answer, if the broker does."""
        with trio.move_on_after(PROBE_SECONDS), suppress(BrokerError):
            await (await (await self.keeper.connection()).channel()).close()
            if len(self._silent) >= MAX_DECLARED:
                self._silent.clear()
            _, pause = self._silent.get(name, (0.0, SILENT_SECONDS))
            until = trio.current_time() + pause
            self._silent[name] = until, min(2 * pause, MAX_SILENT_SECONDS)

    def forget(self, name: str) -> None:
        """A queue may be gone: the next time it is declared."""
        self._declared.pop(name, None)

    async def look(self, name: str) -> Declared | None:
        """The depth of a queue; None if it is not there. Raises `BrokerError`."""
        try:
            return await self._ask(name, lambda admin: admin.declare(name, passive=True))
        except BrokerError as error:
            if error.code == 404:
                return None
            raise

    async def purge(self, name: str) -> int:
        """Delete the ready messages of a queue; return their number. Raises `BrokerError`."""
        if await self.look(name) is None:
            return 0
        return await self._ask(name, lambda admin: admin.purge(name))

    async def _admin_channel(self, connection: Connection) -> Channel:
        """A channel of its own: a refused declaration ends the channel."""
        if (
            self._admin is None
            or not self._admin.is_open
            or self._admin.connection is not connection
        ):
            self._admin = await connection.channel()
        return self._admin
