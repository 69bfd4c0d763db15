"""An exchange in memory, whose links a test cuts and delays, and instances on it."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from mailerq.clustering.lease_file import LeaseFile
from mailerq.clustering.member import Cluster, Facts
from mailerq.errors import QueueError
from mailerq.rules.row import PAUSE, Row
from mailerq.rules.shared_rows import FIRST_ID, Change, Shared


def now() -> int:
    return int(trio.current_time() * 1e9)


class MemoryExchange:
    """What a broker does: copies documents, and gives each lock to one connection."""

    def __init__(self) -> None:
        self.links: list[MemoryLink] = []
        self.locks: dict[str, tuple[MemoryLink, str]] = {}
        self.down = False
        self.lose: Callable[[bytes], bool] = lambda data: False
        self.seen: list[bytes] = []

    def copy(self, data: bytes, queue: str) -> None:
        self.seen.append(data)
        for link in list(self.links):
            if link.queue and queue in ("", link.queue) and not self.lose(data):
                link.inbox.append(data)
                link.news.set()

    def drop(self, queue: str) -> None:
        """The connection with this queue is over, and its locks are free."""
        for name in [name for name, holder in self.locks.items() if holder[1] == queue]:
            del self.locks[name]


class MemoryLink:
    """A `mailerq.clustering.member.Link`."""

    def __init__(self, exchange: MemoryExchange, name: str) -> None:
        self.exchange = exchange
        self.name = name
        self.queue = ""
        self.inbox: deque[bytes] = deque()
        self.news = trio.Event()
        self.frozen = False  # nothing comes or goes, and neither side knows
        self.connections = 0
        self.lost = trio.Event()
        self.on_open: Callable[[], None] = lambda: None
        self.on_lost: Callable[[str], None] = lambda reason: None
        self.on_document: Callable[[bytes], None] = lambda data: None
        self.on_answered: Callable[[int], None] = lambda sent: None
        self.on_unlocked: Callable[[str], None] = lambda name: None
        exchange.links.append(self)

    @property
    def is_open(self) -> bool:
        return bool(self.queue)

    async def run(self) -> None:
        try:
            while True:
                if self.exchange.down:
                    self.on_lost("the exchange is down")
                    await trio.sleep(0.5)
                    continue
                self.connections += 1
                self.queue, self.lost = (
                    f"amq.gen-{self.name.strip()}.{self.connections}",
                    trio.Event(),
                )
                self.on_open()
                while not self.lost.is_set():
                    self.news = trio.Event()
                    while self.inbox and not self.frozen:
                        self.on_document(self.inbox.popleft())
                    with trio.move_on_after(0.1):
                        await self.news.wait()
                self._end()
                await trio.sleep(0.2)
        finally:
            self._end()
            self.exchange.links.remove(self)

    def _end(self) -> None:
        queue, self.queue = self.queue, ""
        self.exchange.drop(queue)
        self.inbox.clear()
        if queue:
            self.on_lost("cut")

    def cut(self) -> None:
        """The connection ends, and both sides know."""
        self.lost.set()
        self.news.set()

    def publish(self, data: bytes, queue: str = "") -> bool:
        if not self.frozen:
            sent = now()
            self.exchange.copy(data, queue)
            self.on_answered(sent)
        return True

    async def lock(self, name: str) -> bool:
        await trio.sleep(0.01)
        if not self.queue or self.frozen:
            raise QueueError("no connection")
        holder = self.exchange.locks.setdefault(name, (self, self.queue))
        return holder == (self, self.queue)

    async def unlock(self, name: str) -> None:
        await trio.sleep(0.01)
        if self.exchange.locks.get(name, (None, ""))[1] == self.queue:
            del self.exchange.locks[name]


class MemoryRows:
    """A `mailerq.clustering.row_sync.RowKeeper`."""

    def __init__(self, server: str) -> None:
        self.server = server
        self.shared = Shared()
        self.recent: list[Change] = []
        self.changed: Callable[[], None] = lambda: None

    def take_changes(self) -> list[Change]:
        changes, self.recent = self.recent, []
        return changes

    async def merge(self, changes: Sequence[Change]) -> int:
        await trio.sleep(0.001)
        news = [change for change in changes if self.shared.is_news(change)]
        for change in news:
            self._apply(change)
        self.changed()
        return len(news)

    def _apply(self, change: Change) -> None:
        self.shared.merge(change)
        self.recent.append(change)

    def add(self, number: int, **more: Any) -> None:
        row = Row(kind=PAUSE, id=FIRST_ID + number, domain=f"d{number}.test")
        self.change(row=row, **more)

    def end(self, number: int) -> None:
        self.change(end=(FIRST_ID + number,))

    def change(self, **parts: Any) -> None:
        version = self.shared.version + 1
        self._apply(Change(version=version, server=self.server, who="ann", **parts))
        self.changed()

    @property
    def numbers(self) -> list[int]:
        return sorted(number - FIRST_ID for number in self.shared.rows)


@dataclass
class Instance:
    name: str
    link: MemoryLink
    rows: MemoryRows
    cluster: Cluster
    ips: list[str]
    facts: Facts
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    told: int = 0

    def uses(self, ip: str) -> bool:
        lease = self.cluster.leases.get(ip)
        return ip in self.ips and (lease is None or lease.is_valid(now()))

    def kill(self) -> None:
        """End at once, without a word."""
        self.scope.cancel()

    async def stop(self) -> None:
        await self.cluster.stop()
        await trio.sleep(0.01)
        self.scope.cancel()


class Bench:
    """Instances that a test starts."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.exchange = MemoryExchange()
        self.instances: dict[str, Instance] = {}
        self._directory = directory
        self._nursery = nursery

    async def start(
        self, name: str, ips: Sequence[str] = (), *, rows: MemoryRows | None = None, place: str = ""
    ) -> Instance:
        """Start an instance; one of the same `place` is another process of the same daemon."""
        directory = self._directory / (place or name.replace(":", "_"))
        directory.mkdir(exist_ok=True)
        link = MemoryLink(self.exchange, f"{name}{len(self.exchange.links)}")
        rows = rows or MemoryRows(name)
        facts, found = Facts(), list(ips)
        file = LeaseFile(str(directory))
        cluster = Cluster(
            name, link, rows, lambda: facts, lambda: found,
            file=file, clock=now, wall=trio.current_time,
        )  # fmt: skip
        each = Instance(name, link, rows, cluster, found, facts)
        rows.changed = cluster.rows_changed
        await cluster.open()

        async def run() -> None:
            with each.scope:
                await cluster.run()
            file.close()

        self._nursery.start_soon(run)
        self.instances[name] = each
        return each

    def users(self, ip: str) -> list[str]:
        """The instances that may send from an address now."""
        return [each.name for each in self.instances.values()
                if each.uses(ip) and not each.scope.cancel_called]  # fmt: skip

    async def owned(self, ip: str) -> Instance:
        """Wait until an instance owns an address that others have too."""
        found: list[Instance] = []
        with trio.fail_after(60):
            while not found:
                await trio.sleep(0.05)
                found = [
                    each for each in self.instances.values()
                    if each.uses(ip) and not each.cluster.leases[ip].alone
                    and not each.scope.cancel_called
                ]  # fmt: skip
        return found[0]

    async def until(self, condition: Callable[[], object], seconds: float = 60.0) -> None:
        with trio.fail_after(seconds):
            while not condition():  # noqa: ASYNC110
                await trio.sleep(0.05)


@asynccontextmanager
async def open_bench(directory: Path) -> AsyncIterator[Bench]:
    async with trio.open_nursery() as nursery:
        yield Bench(directory, nursery)
        nursery.cancel_scope.cancel()
