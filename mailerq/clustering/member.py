"""An instance in its cluster: announces itself, hears others, owns addresses, shares rows.

Theory of operation
-------------------
`Cluster.run` is a few tasks around a `Link`, the connection to the exchange:

- once a second the instance announces itself, drops silent ones, and tries to lock addresses that
  nobody has (`mailerq.rules.leases`);
- each document that comes is read at once (`mailerq.rules.cluster`);
- `RowSync` keeps shared rows alike.

Of the processes of a daemon one belongs to the cluster, the one that has the lock of the
`LeaseFile`; the others read that file. `Cluster.leases` is in all of them what deliveries go by.

While the exchange cannot be reached, the log says so once, and mail goes on: that from addresses
which other instances have too waits.

Everything here runs on the home worker.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import trio

from mailerq import __version__
from mailerq.clustering.lease_file import LeaseFile, State, follow
from mailerq.clustering.row_sync import RowKeeper, RowSync
from mailerq.errors import MailerqError
from mailerq.net.logs import Ration as LogRation
from mailerq.rules.cluster import (
    AskRows,
    Document,
    Gone,
    Hello,
    Here,
    Members,
    Ration,
    RowChanges,
    RowPart,
    read,
    write,
)
from mailerq.rules.leases import Lease, Ownership

__all__ = ["Cluster", "Facts", "Link"]

log = logging.getLogger("mailerq.cluster")

SECOND: Final = 1_000_000_000

TICK_SECONDS: Final = 0.5
ANNOUNCE_TICKS: Final = 2
ADDRESS_TICKS: Final = 20

MIN_HELLO: Final = SECOND // 5
"""How often a request to announce is heard."""

LEARN: Final = 3 * SECOND
"""All other instances have announced themselves this long after the connection was opened."""

NEWS_PER_MINUTE: Final = 100
MAX_ASKED: Final = 16
LOCKS_AT_A_TIME: Final = 8
STOP_SECONDS: Final = 1.0


class Link(Protocol):
    """A connection to the exchange of a cluster, see `mailerq.queues.opening.open_exchange`."""

    on_open: Callable[[], None]
    on_lost: Callable[[str], None]
    on_document: Callable[[bytes], None]
    on_answered: Callable[[int], None]
    on_unlocked: Callable[[str], None]
    queue: str

    @property
    def is_open(self) -> bool: ...

    async def run(self) -> None: ...

    def publish(self, data: bytes, queue: str = "") -> bool: ...

    async def lock(self, name: str) -> bool: ...

    async def unlock(self, name: str) -> None: ...


@dataclass(slots=True)
class Facts:
    """What an instance announces of itself."""

    ips: Collection[str] = ()
    settings: int = 0
    digest: str = ""
    delivered: int = 0
    """Messages since the start."""
    connections: int = 0
    waiting: int = 0
    takes: str = ""


@dataclass(slots=True)
class _Rate:
    """Deliveries a minute, from a counter."""

    seen: deque[tuple[int, int]] = field(default_factory=deque)

    def of(self, count: int, now: int) -> float:
        self.seen.append((now, count))
        while len(self.seen) > 2 and self.seen[1][0] <= now - 60 * SECOND:
            self.seen.popleft()
        then, before = self.seen[0]
        seconds = max((now - then) / SECOND, 1.0)
        return max(count - before, 0) * 60 / max(seconds, 60.0)


class Cluster:
    """This instance. `open` comes before any delivery, `run` is its task."""

    def __init__(
        self,
        name: str,
        link: Link,
        keeper: RowKeeper,
        facts: Callable[[], Facts],
        addresses: Callable[[], Sequence[str]],
        *,
        file: LeaseFile,
        clock: Callable[[], int],
        on_leases: Callable[[], None] = lambda: None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`addresses` are those that this host can send from; it is called in a thread.

        `clock` returns nanoseconds of a clock that all processes of the host share. `on_leases` is
        called when a lease has begun.
        """
        self.name = name
        self.leases: dict[str, Lease] = {}
        """What deliveries may use; addresses without a lease have nothing to do with the cluster.

        The dict stays the same.
        """
        self.leads = False
        """This process belongs to the cluster, and not another one of the daemon."""
        self.state = "starting"
        """Why the exchange cannot be reached, or an empty string."""
        self._link = link
        self._keeper = keeper
        self._facts = facts
        self._addresses = addresses
        self._file = file
        self._clock = clock
        self._wall = wall
        self._on_leases = on_leases
        self._run = secrets.token_hex(8)
        self._started = wall()
        self._serial = 0
        self._members = Members(name, self._run)
        self._owner = Ownership(name)
        self._owner.leases = self.leases
        self._takes = ""
        self._told: Collection[str] = ()
        """The addresses that the leading process owns, for a process that follows."""
        self._told_all = False
        self._open_since = 0
        self._valid: set[str] = set()
        self._rate = _Rate()
        self._ration = Ration()
        self._say_foreign = LogRation(log.warning, 1, "%d documents more that are none of ours")
        self._say_news = LogRation(log.info, NEWS_PER_MINUTE, "cluster: %d news more of instances")
        self._say_silent = LogRation(
            log.warning, NEWS_PER_MINUTE, "%d instances more are silent: they count as gone"
        )
        self._say_unlocked = LogRation(log.warning, 10, "and %d times more")
        self._rows = RowSync(name, keeper, self._send, clock)
        self._asked: deque[AskRows] = deque()
        self._asking = trio.Event()
        self._locking: set[str] = set()
        self._stopping = False
        self._greeted = False
        self._announced = 0
        self._wake = trio.Event()
        self._settings_news = trio.Event()
        self._nursery: trio.Nursery | None = None

    async def open(self) -> None:
        """Learn which addresses this host has: none of them sends before this says so."""
        state = self._file.read() or State()
        self._owner.rivals = dict(state.rivals)
        self.leads = self._file.lead()
        self._keeper.take_changes()  # of earlier runs
        if not self.leads and state.leases:
            follow(self.leases, state.leases)
            return
        # Without a word of the process that leads, an address that others may have is not used.
        await self._look_at_addresses()
        if self._file.is_damaged:
            self._owner.heard(tuple(self.leases), self._wall())

    async def run(self) -> None:
        """Belong to the cluster, or follow the process that does, until cancelled."""
        while not self.leads:
            await trio.sleep(TICK_SECONDS)
            self._follow()
            if self._file.lead():
                self.leads = True
                self._members = Members(self.name, self._run)  # not those of another process
                await self._look_at_addresses()
        link = self._link
        link.on_open, link.on_lost = self._opened, self._lost
        link.on_document, link.on_answered = self._hear, self._answered
        link.on_unlocked = self._unlocked
        try:
            async with trio.open_nursery() as self._nursery:
                for task in (link.run, self._rows.run, self._answer, self._watch_addresses):
                    self._nursery.start_soon(task)
                await self._tick()
        finally:
            for ration in (self._say_foreign, self._say_news, self._say_silent, self._say_unlocked):
                ration.flush()

    async def stop(self) -> None:
        """Give up all addresses, and tell the others that this instance stops."""
        self._stopping = True
        if not self.leads:
            return
        with trio.move_on_after(STOP_SECONDS):
            async with trio.open_nursery() as nursery:
                for ip in list(self._owner.held):
                    self._owner.unlocked(ip)
                    nursery.start_soon(self._unlock, ip)
        self._send(Gone(name=self.name, run=self._run))

    def close(self) -> None:
        """Leave the cluster to another process of the daemon."""
        self._file.close()

    # What processes that follow do

    def _follow(self) -> None:
        state = self._file.read()
        if state is not None:
            self._told, self._told_all = set(state.held), state.knows
            self._members = Members(self.name, self._run)
            for here in state.others:
                self._members.hear(here, 0)
            self._takes = self._facts().takes
            if follow(self.leases, state.leases):
                self._on_leases()
        self._look_at_leases()

    # Times

    async def _tick(self) -> None:
        count = 0
        while True:
            now = self._clock()
            for name in self._members.expire(now):
                self._say_silent("instance %s is silent: it counts as gone", name)
                self._wake.set()
            self._owner.forget(self._wall())
            self._look_at_leases()
            if self._link.is_open and not self._stopping:
                self._try_locks(now)
                if count % ANNOUNCE_TICKS == 0 or self._wake.is_set() or self._greeted:
                    self._announce(now)
                self._rows.compare([*self._members.alive.values()], now, self._link.queue)
            self._file.write(self._state())
            count += 1
            self._wake = trio.Event()
            with trio.move_on_after(TICK_SECONDS):
                await self._wake.wait()
            # A storm of news does not make a storm of announcements.
            await trio.sleep(MIN_HELLO / SECOND / 4)

    def _state(self) -> State:
        return State(
            leases={ip: (each.since, each.until, each.alone) for ip, each in self.leases.items()},
            held=sorted(self._owner.held),
            rivals=self._owner.rivals,
            others=[member.here for member in self._members.alive.values()],
            knows=self._knows_all,
        )

    def _look_at_leases(self) -> None:
        """Tell deliveries of leases that have begun."""
        now = self._clock()
        valid = {ip for ip, lease in self.leases.items() if lease.is_valid(now)}
        if valid - self._valid:
            self._on_leases()
        for ip in self._valid - valid:
            if ip in self.leases:
                log.warning("mail from %s waits: the right to send from it has ended", ip)
        self._valid = valid

    async def _look_at_addresses(self) -> None:
        ips = await trio.to_thread.run_sync(self._addresses)
        before = set(self.leases)
        for ip in self._owner.offer(list(ips), self._wall()):
            if self._nursery is not None:
                self._nursery.start_soon(self._unlock, ip)
        if before != set(self.leases):
            self._on_leases()
            self._wake.set()

    async def _watch_addresses(self) -> None:
        while True:
            with trio.move_on_after(TICK_SECONDS * ADDRESS_TICKS):
                await self._settings_news.wait()
            self._settings_news = trio.Event()
            await self._look_at_addresses()

    def settings_changed(self) -> None:
        """Have `run` look for other addresses, as soon as it runs in the process that leads."""
        self._settings_news.set()

    # Locks

    def _try_locks(self, now: int) -> None:
        for ip in self._owner.attempts(now, self._members.ips, self._members.holds):
            if ip not in self._locking:
                self._locking.add(ip)
                assert self._nursery is not None
                self._nursery.start_soon(self._lock, ip, self._link.queue)

    async def _lock(self, ip: str, queue: str) -> None:
        """Try to get the lock of an address on the connection that has a queue."""
        try:
            with trio.move_on_after(STOP_SECONDS * 10):
                taken = await self._link.lock(ip)
                if not taken or self._link.queue != queue:
                    return
                if ip in self.leases:
                    self._owner.locked(ip, self._clock())
                    log.info("this instance owns %s from now on", ip)
                    self._wake.set()
                else:
                    await self._link.unlock(ip)
        except MailerqError as error:
            self._say_unlocked("%s cannot be locked, and mail from there waits: %s", ip, error)
        finally:
            self._locking.discard(ip)

    async def _unlock(self, ip: str) -> None:
        try:
            await self._link.unlock(ip)
        except MailerqError as error:
            log.info("the lock of %s stays for now: %s", ip, error)

    def _unlocked(self, ip: str) -> None:
        if ip in self._owner.held:
            log.warning("somebody has deleted the lock of %s at the broker", ip)
            self._owner.unlocked(ip)

    # The link

    def _opened(self) -> None:
        if self.state:
            log.info("the cluster can be heard")
        self.state = ""
        self._open_since = self._clock()
        self._rows.hurry()
        self._send(Hello())
        self._wake.set()

    def _lost(self, reason: str) -> None:
        self._owner.disconnected()
        if self._stopping:
            return
        if not self.state or self.state == "starting":
            log.warning(
                "the cluster cannot be heard: %s. Mail goes on, but for addresses that other"
                " instances have too",
                reason,
            )
        self.state = reason

    def _answered(self, sent: int) -> None:
        self._owner.proved(sent)

    def _send(self, document: Document, queue: str = "") -> bool:
        return self._link.is_open and self._link.publish(write(document), queue)

    def _announce(self, now: int) -> None:
        facts = self._facts()
        self._takes = facts.takes
        self._serial += 1
        self._greeted = False
        self._announced = now
        shared = self._keeper.shared
        self._send(
            Here(
                name=self.name,
                run=self._run,
                serial=self._serial,
                queue=self._link.queue,
                hostname=socket.gethostname(),
                version=__version__,
                started=self._started,
                settings=facts.settings,
                digest=facts.digest,
                ips=tuple(self.leases),
                holds=tuple(sorted(self._owner.held)),
                messages=round(self._rate.of(facts.delivered, now), 1),
                connections=facts.connections,
                waiting=facts.waiting,
                rows=len(shared),
                rows_digest=self._rows.digest,
                takes=facts.takes,
            )
        )

    def _hear(self, data: bytes) -> None:
        now = self._clock()
        if not self._ration.take(now):
            self._say_foreign("documents come faster than they are taken")
            return
        document = read(data)
        match document:
            case str():
                self._say_foreign("the exchange of the cluster has %s", document)
            case Here():
                was_doubled = self._members.is_doubled
                if news := self._members.hear(document, now):
                    if self._members.is_doubled and not was_doubled:
                        log.error("cluster: %s", news)
                    else:
                        self._say_news("cluster: %s", news)
                    self._rows.hurry()
                    self._wake.set()
                if document.name != self.name:
                    self._owner.heard(document.ips, self._wall())
            case Gone():
                if self._members.leave(document):
                    log.info("cluster: %s stops", document.name)
                    self._wake.set()
            case Hello():
                self._greeted = True
                if now - self._announced > MIN_HELLO:
                    self._wake.set()
            case RowChanges() | RowPart() | AskRows():
                ask = self._rows.hear(document, len(data), now)
                if ask is not None and len(self._asked) < MAX_ASKED:
                    self._asked.append(ask)
                    self._asking.set()

    async def _answer(self) -> None:
        """Answer those that ask for all rows, one after another."""
        while True:
            await self._asking.wait()
            self._asking = trio.Event()
            while self._asked:
                await self._rows.answer(self._asked.popleft())

    # What the engine asks

    def rows_changed(self) -> None:
        """The rows of this instance have changed."""
        if self.leads:
            self._rows.changed()
        else:
            self._keeper.take_changes()

    @property
    def _knows_all(self) -> bool:
        """Whether all that are there have been heard."""
        if not self.leads:
            return self._told_all
        return self._link.is_open and self._clock() > self._open_since + LEARN

    def keeper_of(self, ips: Sequence[str]) -> str | None:
        """The instance that should have a message for these addresses; empty: this one.

        None if that is not known now: the message has to wait a little.
        """
        held = self._owner.held if self.leads else self._told
        member = self._members.keeper_of(ips, held, self.leases, self._takes)
        if member is not None:
            return member.here.name
        return "" if self._knows_all or any(ip in self.leases for ip in ips) else None

    def statistics(self) -> dict[str, Any]:
        """Numbers for `mailerq status`; a process that follows has none."""
        if not self.leads:
            return {}
        now = self._clock()
        return {
            "connected": int(self._link.is_open),
            "instances": len(self._members.alive) + 1,
            "addresses": len(self.leases),
            "owned": len(self._owner.held),
            "usable": sum(lease.is_valid(now) for lease in self.leases.values()),
            "rows": len(self._keeper.shared),
            "received": self._rows.received,
        }
