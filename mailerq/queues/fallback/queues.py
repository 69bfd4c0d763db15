"""The queues of a broker, with a reserve on the own disk for the time when the broker is away.

Theory of operation
-------------------
Publications go to the broker. The *reserve* (`mailerq.queues.fallback.reserve`) gets them

- while the broker is *away*: it has been unreachable or blocked for `grace` seconds;
- when the broker has refused or not confirmed them;
- while the reserve has earlier mail of their queue, so that the mail of a queue stays in order.

The broker is back when it has taken publications for `steady` seconds, longer after each time that
it did not last. Then a `mailerq.queues.fallback.mover.Mover` publishes the mail of the reserve. New
mail goes behind it until few messages are left; then new mail waits until these are moved. A queue
that the broker refuses concerns no other queue.

A settlement whose results go to the reserve ends its lease. If the connection of the lease is lost,
the message will be delivered again, to this process or another one, so its identity is noted in the
reserve, in the same commit as its results. This process, or the next one, then acknowledges the
message and does not send it again.

Guarantees
----------
- What `publish` and `ack` have accepted is either confirmed by the broker or committed in the
  reserve. A message of the reserve is removed after the broker has confirmed it. A crash in between
  publishes at most one group twice.
- Without room in the reserve, `publish` and `ack` raise `QueueError`, as without a reserve.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import msgspec
import trio

from mailerq.config import Config
from mailerq.errors import MessageError, QueueError
from mailerq.queues.adoption import Adoption, own, prove
from mailerq.queues.embedded.shares import share_directory
from mailerq.queues.fallback.mover import Mover
from mailerq.queues.fallback.reserve import Reserve
from mailerq.queues.home import Home, tended
from mailerq.queues.interface import (
    BrowsableQueues,
    Consumer,
    Depth,
    Lease,
    Lost,
    Publication,
    Queues,
    Receiver,
    RemoteQueues,
    Settlement,
    Subscription,
    new_identity,
)
from mailerq.queues.ownership import DirectoryLock

__all__ = ["FallbackQueues", "Patience", "open_fallback"]

log = logging.getLogger("mailerq.queues")

FEW: Final = 1000
"""Messages of a queue in the reserve for which new mail waits, so that the reserve empties."""

WAIT_SECONDS: Final = 10.0
"""How long new mail waits for these."""

LASTED_SECONDS: Final = 60.0
"""A broker that has been there this long may come back after the first pause again."""

MAX_STEADY_SECONDS: Final = 60.0
MEASURE_SECONDS: Final = 1.0
RECORD_SECONDS: Final = 86400.0
"""How long a settled message is remembered while the broker is there."""

TIDY_SECONDS: Final = 60.0
SMALL_BYTES: Final = 1 << 18
"""More is checked in a thread."""


@dataclass(slots=True, frozen=True)
class Patience:
    """Times, in seconds. A broker that restarts within `grace` costs its clients a short wait."""

    grace: float = 3.0
    steady: float = 1.0


OpenReserve = Callable[[str, DirectoryLock], AbstractAsyncContextManager[BrowsableQueues]]
"""Opens the queue file of a directory, and releases the lock at the end."""


@asynccontextmanager
async def open_fallback(
    broker: RemoteQueues,
    open_reserve: OpenReserve,
    root: str,
    *,
    limit: int,
    share: int = 0,
    processes: int = 1,
    patience: Patience | None = None,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[FallbackQueues]:
    """Use a broker, with a reserve in `root`, in the part of this one of several `processes`.

    `limit` is the size of the files up to which they take mail, in bytes; 0: they take none. Raises
    `QueueError`.
    """
    directory = share_directory(root, share)
    lock = await own(directory)
    async with open_reserve(directory, lock) as file:
        reserve = Reserve(file, directory)

        async def make(nursery: trio.Nursery) -> FallbackQueues:
            share_of_limit = limit // processes
            queues = FallbackQueues(
                nursery, broker, reserve, share_of_limit, patience or Patience(), clock
            )
            await queues.begin()
            return queues

        async with tended(make) as queues:
            adoption = Adoption(root, share, processes, partial(queues.adopt, root, open_reserve))
            queues.start(adoption.run)
            queues.start(partial(prove, lock))
            yield queues


class FallbackQueues(Queues):
    """See `open_fallback`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        broker: RemoteQueues,
        reserve: Reserve,
        limit: int,
        patience: Patience,
        clock: Callable[[], float],
    ) -> None:
        self.broker = broker
        self.reserve = reserve
        self.limit = limit
        self.away = False
        """New mail is not offered to the broker."""
        self._patience = patience
        self._clock = clock
        self._home = Home(nursery)
        self._tasks: trio.Nursery
        self._news = trio.Event()
        self._recognised: set[str] = set()
        self._records = False
        self._unheard: list[str] = []
        self._movers = [Mover(reserve, broker, self._may_move, clock)]
        broker.on_trouble.append(self._notice)
        broker.on_recognised = self._on_recognised
        broker.on_unheard = self._on_unheard

    @property
    def identity(self) -> str:
        return self.broker.identity

    @property
    def moved(self) -> int:
        """Messages moved from this reserve to the broker."""
        return self._movers[0].moved

    async def begin(self) -> None:
        """Take up what the process before has left. Raises `QueueError`."""
        settled = await self.reserve.begin()
        self._records = bool(settled)
        self.broker.recognise(settled)
        if self.reserve.messages:
            log.warning(
                "%d messages wait for the broker in %s",
                self.reserve.messages,
                self.reserve.directory,
            )

    async def run(
        self,
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                self._tasks = nursery
                task_status.started()
                nursery.start_soon(self._follow)
                nursery.start_soon(self._movers[0].run)
                nursery.start_soon(self._measure)
                nursery.start_soon(self._tidy)
                nursery.start_soon(self._note)

    def start(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run something more until the end."""
        self._tasks.start_soon(task)

    async def close(self) -> None:
        """Finish what is under way."""
        await self._home.close()
        self.broker.on_trouble.remove(self._notice)
        self.broker.on_recognised = self.broker.on_unheard = None
        self._notice()

    def configure(self, config: Config) -> None:
        self.limit = config.fallback_maxsize // config.smtp_processes
        self.broker.configure(config)

    def _notice(self) -> None:
        news, self._news = self._news, trio.Event()
        news.set()
        for mover in self._movers:
            mover.notice()

    # Publish

    def check(self, publication: Publication) -> None:
        self.broker.check(publication)
        self.reserve.check(publication)

    async def publish(self, publications: Sequence[Publication]) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        failure: QueueError | None = None
        publications = _named(publications)
        if not self._is_slow(publications):
            try:
                await self.broker.publish(publications)
            except QueueError as error:
                failure = error
            else:
                return
        await self._home.run(partial(self._keep, publications, failure))

    async def _check(self, publications: Sequence[Publication]) -> None:
        """What goes to the reserve must be fit for the broker. Raises `MessageError`."""

        def work() -> None:
            for publication in publications:
                self.check(publication)

        if sum(len(each.message.body or b"") for each in publications) <= SMALL_BYTES:
            work()
        else:
            await trio.to_thread.run_sync(work)

    def _is_slow(self, publications: Sequence[Publication]) -> bool:
        """Whether something may have to go to the reserve."""
        if self.away:
            return True
        lines = self.reserve.lines
        return bool(lines) and any(each.queue in lines for each in publications)

    async def _keep(
        self,
        publications: Sequence[Publication],
        failure: QueueError | None,
        settled: Lost = tuple,
        *,
        again: bool = False,
    ) -> None:
        """Publish at the broker or in the reserve; on the loop of this object."""
        if failure is None and not settled():
            await self._wait_for_few(publications)
            if not self._is_slow(publications):
                try:
                    await self.broker.publish(publications, again=again)
                except QueueError as error:
                    failure = error
                else:
                    return
        if failure is None:
            await self._check(publications)
        try:
            await self.reserve.store(publications, settled(), self.limit)
        except MessageError:
            raise
        except QueueError as error:
            why = failure or self.broker.trouble
            if why is not None:
                raise QueueError(f"{why}; {error}" if self.limit else str(why)) from None
            # The broker is there: better out of order than not at all.
            await self.broker.publish(publications, again=again)
            return
        self._records = self._records or bool(settled())
        if failure is not None and self.broker.trouble is None:
            self._complain(publications, failure)
        self._notice()

    def _complain(self, publications: Sequence[Publication], failure: QueueError) -> None:
        for line in self.reserve.holds(publications):
            if line.said != str(failure):
                line.said = str(failure)
                log.warning(
                    "mail of the queue %s waits in %s: %s",
                    line.name,
                    self.reserve.directory,
                    failure,
                )

    async def _wait_for_few(self, publications: Sequence[Publication]) -> None:
        """Wait while few messages of these queues are being moved."""
        with trio.move_on_after(WAIT_SECONDS):
            while not self.away:
                lines = [
                    line
                    for line in self.reserve.holds(publications)
                    if line.flows and line.count - line.entering <= FEW
                ]
                if not lines:
                    return
                await lines[0].news.wait()

    # Whether the broker is there

    async def _follow(self) -> None:
        """Decide when the broker is away, and when it is back."""
        steady = self._patience.steady
        back = -math.inf
        while True:
            await self._until_trouble(True)
            with trio.move_on_after(self._patience.grace) as scope:
                await self._until_trouble(False)
            if not scope.cancelled_caught:
                continue
            if trio.current_time() - back > LASTED_SECONDS:
                steady = self._patience.steady
            else:
                steady = min(2 * steady, MAX_STEADY_SECONDS)
            self._go_away()
            while True:
                await self._until_trouble(False)
                with trio.move_on_after(steady) as scope:
                    await self._until_trouble(True)
                if scope.cancelled_caught:
                    break
                steady = min(2 * steady, MAX_STEADY_SECONDS)
            self._come_back()
            back = trio.current_time()

    async def _until_trouble(self, wanted: bool) -> None:
        while (self.broker.trouble is not None) is not wanted:
            await self._news.wait()

    def _go_away(self) -> None:
        self.away = True
        if self.limit:
            log.warning(
                "new mail is kept in %s, up to %d bytes, until the broker takes it: %s",
                self.reserve.directory,
                self.limit,
                self.broker.trouble,
            )
        else:
            log.warning(
                "new mail is refused until the broker takes it; fallback-maxsize would keep it: %s",
                self.broker.trouble,
            )
        self.broker.give_up()
        self._notice()

    def _come_back(self) -> None:
        self.away = False
        for mover in self._movers:
            mover.hasten()
        log.warning(
            "the broker takes mail again; %d messages are moved there from %s",
            self.reserve.messages,
            self.reserve.directory,
        )
        self._notice()

    # Moving

    async def adopt(
        self,
        root: str,
        open_reserve: OpenReserve,
        share: int,
        lock: DirectoryLock,
        until: trio.Event,
    ) -> None:
        """Move the mail in the reserve of another process too, until `until` is set.

        See `mailerq.queues.adoption`.
        """
        directory = share_directory(root, share)
        async with open_reserve(directory, lock) as file, trio.open_nursery() as nursery:
            mover = Mover(Reserve(file, directory), self.broker, self._may_move, self._clock)
            self.broker.recognise(await mover.reserve.begin())
            self._movers.append(mover)
            try:
                nursery.start_soon(mover.run)
                nursery.start_soon(prove, lock)
                await until.wait()
            finally:
                self._movers.remove(mover)
                nursery.cancel_scope.cancel()

    def _may_move(self) -> bool:
        return not self.away and self.broker.trouble is None

    async def _measure(self) -> None:
        """Correct the estimate of the size of the reserve."""
        while True:
            await trio.sleep(MEASURE_SECONDS)
            while not self.reserve.lines:
                await self._news.wait()
            try:
                await self.reserve.measure()
            except QueueError as error:
                log.debug("the reserve cannot be measured: %s", error)

    # Settled mail that comes again

    def _on_recognised(self, identity: str) -> None:
        if self._records:
            self._recognised.add(identity)

    def _on_unheard(self, identities: Sequence[str]) -> None:
        if self.limit:
            self._unheard += identities
            self._notice()

    async def _note(self) -> None:
        """Note messages whose acknowledgement may be lost, for the next start."""
        while True:
            while not self._unheard:
                await self._news.wait()
            unheard, self._unheard = self._unheard, []
            try:
                await self.reserve.store([], unheard, self.limit)
            except QueueError as error:
                log.warning("%s cannot note what was delivered: %s", self.reserve.directory, error)
            else:
                self._records = True

    async def _tidy(self) -> None:
        """Forget settled messages that have come again, or that nobody sees any more."""
        while True:
            await trio.sleep(TIDY_SECONDS)
            if not self._records or self.away or self.broker.trouble is not None:
                continue
            known, self._recognised = self._recognised, set()
            until = self._clock() - RECORD_SECONDS

            def over(identity: str, since: float) -> bool:
                return identity in known or since < until  # noqa: B023

            try:
                self._records = await self.reserve.forget(over) > 0
            except QueueError as error:
                self._recognised |= known
                log.warning("%s cannot be tidied: %s", self.reserve.directory, error)

    # The rest is the broker's

    async def ack(self, settlements: Sequence[Settlement]) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        publications = _named(
            [each for one in settlements for each in (*one.publications, *one.others)]
        )

        async def publish(lost: Lost) -> None:
            if publications or (lost() and self.limit):
                await self._keep(publications, None, lost if self.limit else tuple, again=True)

        await self.broker.settle(settlements, publish)

    def release(self, lease: Lease) -> None:
        self.broker.release(lease)

    def consume(self, queue: str, *, prefetch: int) -> AbstractAsyncContextManager[Consumer]:
        return self.broker.consume(queue, prefetch=prefetch)

    def subscribe(
        self, queue: str, receiver: Receiver, *, prefetch: int, window: int
    ) -> AbstractAsyncContextManager[Subscription]:
        return self.broker.subscribe(queue, receiver, prefetch=prefetch, window=window)

    async def depths(self) -> list[Depth]:
        depths = {depth.queue: depth for depth in await self.broker.depths()}
        for depth in await self.reserve.depths():
            there = depths.get(depth.queue, Depth(depth.queue, 0, 0))
            depths[depth.queue] = Depth(
                depth.queue, there.due + depth.due, there.delayed + depth.delayed
            )
        return [depths[name] for name in sorted(depths)]

    async def purge(self, queue: str) -> int:
        return await self.broker.purge(queue) + await self._home.run(
            partial(self.reserve.purge, queue)
        )

    def wake(self, *, everything: bool = False) -> None:
        self.broker.wake(everything=everything)

    def statistics(self) -> dict[str, Any]:
        lines = list(self.reserve.lines.values())
        return {
            **self.broker.statistics(),
            "fallback": {
                "away": int(self.away),
                "waiting": {line.name: line.count for line in lines},
                "bytes": self.reserve.bytes,
                "stored": self.reserve.stored,
                "moved": self.moved,
            },
        }


def _named(publications: Sequence[Publication]) -> list[Publication]:
    """Publications with identities that their copies keep, whoever publishes them and how often."""
    return [
        each if each.identity else msgspec.structs.replace(each, identity=new_identity())
        for each in publications
    ]
