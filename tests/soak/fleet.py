"""Daemons on brokers, under load, of which some are killed; and the account of every mail."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import trio

from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.crash.kit import Daemon, Fate, Ledger, Load, daemon
from tests.queues.rabbitmq.kit import Broker
from tests.support import DEADLINE, Sink, open_sink

__all__ = ["Account", "Fleet", "open_fleet"]

SESSIONS = 6
"""Of the whole fleet: a host of two cores, the broker among them, should deliver what they send."""

REFUSED_SHARE = 0.1
"""Of the recipients, so many are refused for now: their mail waits at the broker."""

NEAR_SECONDS = 3.0
"""Within this time a result is confirmed, and a connection is open to a broker that is back."""

STILL_SECONDS = 240.0
"""How long nothing at all may arrive while mail is missing: a broker starts, a queue that does not
answer is left alone, a retry waits. A backlog that drains slowly is not a loss. Mail whose wait
ends while RabbitMQ starts may come three minutes later: its dead lettering tries a queue that has
no leader yet, and again after `dead_letter_worker_publisher_confirm_timeout`. No depth shows it
meanwhile."""

THROTTLE = 100
"""Copies that a process has on the way at a time, and that may be twice if its broker is killed."""


@dataclass
class Account:
    """What has become of every mail."""

    sent: int = 0
    accepted: int = 0
    arrived: int = 0
    lost: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)
    """What arrived though nobody has sent it, or though it was refused."""
    twice: Counter[str] = field(default_factory=Counter)
    """Mail that arrived more than once, by what explains it."""
    unexplained: list[str] = field(default_factory=list)
    """Mail that arrived more than once for no known reason, with its times in seconds."""
    kills: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)
    """Of lost mail: the depths of the broker's queues, and the queues of each instance."""

    def __str__(self) -> str:
        kills = ", ".join(f"{count} × {kind}" for kind, count in sorted(self.kills.items()))
        twice = ", ".join(f"{count} {why}" for why, count in sorted(self.twice.items()))
        return (
            f"kills: {kills or 'none'}; {self.sent} sent, {self.accepted} got 250, {self.arrived} "
            f"arrived, {len(self.lost)} lost, {len(self.foreign)} of unknown origin, "
            f"{self.twice.total()} arrived more than once ({twice or 'none'}), "
            f"{len(self.unexplained)} of these for no known reason; replies {dict(self.codes)}"
        ) + "".join(f"\n{each}" for each in self.unexplained)


class Arrival(NamedTuple):
    """A mail at the sink: when (monotonic), and the name of the instance that delivered it."""

    time: float
    by: str


class Kill(NamedTuple):
    """A kill: when it was, when the process served again (monotonic), and the name of the instance.

    The name is empty for a broker.
    """

    time: float
    back: float
    name: str


UNDER_WAY = "under way at a kill of their instance"
UNSETTLED = "delivered and not settled at a kill of their instance"
LEASE_LOST = "leased while a broker was away, and delivered by two instances"
COPIED = "written again when a broker or an instance was killed"


def why_twice(sent: float, arrivals: Sequence[Arrival], kills: Sequence[Kill]) -> str | None:
    """Return the reason of docs/rabbitmq.md for which a mail arrived more than once, if any.

    Mail that was on a connection at a kill is not looked at here: the connection is better proof.
    """
    first, last = arrivals[0], arrivals[-1]
    away = [
        kill
        for kill in kills
        if not kill.name and kill.time - NEAR_SECONDS <= first.time <= kill.back + NEAR_SECONDS
    ]
    # A result waits for a broker that is away.
    settled = max([first.time, *(kill.back for kill in away)]) + NEAR_SECONDS
    if any(
        kill.name == first.by
        # The kernel still sends what it had taken from the instance.
        and (first.time <= kill.time <= settled or kill.time <= first.time <= kill.back)
        for kill in kills
    ):
        return UNSETTLED
    if away and first.by != last.by:
        return LEASE_LOST
    for kill in kills:
        # Another instance takes the copy; but an instance moves its own reserve again after a kill.
        if sent <= kill.time <= first.time and (kill.name or first.by != last.by):
            return COPIED
    return None


class Fleet:
    """Instances that share queues. `start` and `kill` belong to one task."""

    def __init__(
        self,
        directory: Path,
        sink: Sink,
        addresses: Sequence[str],
        instances: int,
        nursery: trio.Nursery,
        *switches: str,
        dice: random.Random,
    ) -> None:
        self.sink = sink
        self.dice = dice
        self.ledger = Ledger()
        self.kills: Counter[str] = Counter()
        self.running: dict[int, Daemon] = {}
        self._directory = directory
        self._sessions = max(SESSIONS // instances, 1)
        self._switches = (
            f"--rabbitmq-address={','.join(addresses)}",
            f"--rabbitmq-throttle={THROTTLE}",
            *switches,
        )
        self._nursery = nursery
        self._stacks: dict[int, AsyncExitStack] = {}
        self._loads: dict[int, Load] = {}
        self._under_way: set[tuple[str, str]] = set()
        """The last mails on the connections at a kill, with the instance that was killed."""
        self._is_over = False
        self._starts = 0
        self._times: list[float] = []
        """When each mail came to the sink."""
        self._killed: list[Kill] = []
        sink.decide = self._decide

    def _decide(self, event: server.Event) -> Reply | None:
        if isinstance(event, server.Content):
            self._times.append(time.monotonic())
        if (
            not self._is_over
            and isinstance(event, server.Rcpt)
            and self.dice.random() < REFUSED_SHARE
        ):
            return Reply(450, "4.2.0 not now")
        return None

    async def start(self, number: int) -> None:
        """Start an instance, and its load."""
        stack = self._stacks[number] = AsyncExitStack()
        directory = self._directory / f"instance{number}"
        directory.mkdir(exist_ok=True)
        running = await stack.enter_async_context(
            daemon(directory, self.sink.port, *self._switches, f"--hostname={_name(number)}")
        )
        self.running[number] = running
        self._starts += 1
        load = self._loads[number] = Load(self.ledger, f"{number}-{self._starts}")
        for _ in range(self._sessions):
            self._nursery.start_soon(self._session, load, running.port)

    async def _session(self, load: Load, port: int) -> None:
        await load.session(port, again=True, pause=0.05)

    async def kill(self, number: int) -> None:
        """kill -9 an instance, and start it again."""
        self.kills["instance"] += 1
        name, killed = _name(number), time.monotonic()
        self.running[number].kill()
        self._note_under_way(name)
        self._loads[number].ending = True
        await self._stacks.pop(number).aclose()
        # What the kernel had taken from the instance may still come.
        self._note_under_way(name)
        await self.start(number)
        self._killed.append(Kill(killed, time.monotonic(), name))

    def _note_under_way(self, name: str) -> None:
        self._under_way.update((name, _id(last)) for last in self.sink.last_mails.values())

    async def kill_broker(self, broker: Broker) -> None:
        """kill -9 a broker, and start it again after a while."""
        self.kills["broker"] += 1
        killed = time.monotonic()
        await trio.to_thread.run_sync(broker.kill)
        await trio.sleep(self.dice.uniform(0.0, 4.0))
        await trio.to_thread.run_sync(broker.start)
        self._killed.append(Kill(killed, time.monotonic(), ""))

    async def finish(self, broker: Broker) -> Account:
        """End the load, wait for all mail, and stop: what has become of it.

        `broker` is asked where mail is that does not arrive.
        """
        for load in self._loads.values():
            await load.end()
        self._is_over = True
        missing, seen = set(self.ledger.accepted), 0
        while missing:
            mails = self.sink.mails[seen:]
            missing -= {_id(mail.recipients[0]) for mail in mails}
            seen += len(mails)
            if not mails:
                self.sink.arrived = trio.Event()
                with trio.move_on_after(STILL_SECONDS) as scope:
                    await self.sink.arrived.wait()
                if scope.cancelled_caught:
                    break
        places = await self._places(broker) if missing else []
        with trio.move_on_after(3):  # what comes twice comes now
            await trio.sleep_forever()
        for number, running in self.running.items():
            with trio.fail_after(DEADLINE):
                await running.stop()
            await self._stacks.pop(number).aclose()
        account = self._account()
        account.places = places
        return account

    async def _places(self, broker: Broker) -> list[str]:
        """Where mail may be that has not arrived."""
        places = [str(await trio.to_thread.run_sync(broker.depths))]
        for number, running in sorted(self.running.items()):
            found = await running.statistics()
            places.append(f"instance {number}: {found['queue']}, {found['outgoing']}")
        return places

    def _account(self) -> Account:
        ledger = self.ledger
        arrivals: dict[str, list[Arrival]] = defaultdict(list)
        for mail, at in zip(self.sink.mails, self._times, strict=True):
            arrivals[_id(mail.recipients[0])].append(Arrival(at, mail.helo))
        twice: Counter[str] = Counter()
        unexplained: list[str] = []
        for id, found in arrivals.items():
            if len(found) == 1:
                continue
            sent = ledger.entries[id].sent
            is_under_way = any((each.by, id) in self._under_way for each in found)
            why = UNDER_WAY if is_under_way else why_twice(sent, found, self._killed)
            twice[why or "for no known reason"] += 1
            if why is None:
                times = [f"{each.time - sent:.1f} by {each.by}" for each in found]
                times += [
                    f"{kill.name or 'a broker'} away from {kill.time - sent:.1f} to"
                    f" {kill.back - sent:.1f}"
                    for kill in self._killed
                    if sent <= kill.back and kill.time <= found[-1].time
                ]
                unexplained.append(f"{id}: {', '.join(times)}")
        return Account(
            sent=len(ledger.entries),
            accepted=len(ledger.accepted),
            arrived=len(arrivals),
            lost=ledger.accepted - arrivals.keys(),
            foreign=arrivals.keys() - ledger.ids(Fate.ACCEPTED, Fate.UNKNOWN, Fate.REFUSED),
            twice=twice,
            unexplained=unexplained,
            kills=self.kills,
            codes=ledger.codes + Counter(entry.code for entry in ledger.entries.values()),
        )


def _name(number: int) -> str:
    return f"mx{number}.test"


def _id(recipient: str) -> str:
    return recipient.partition("@")[0]


@asynccontextmanager
async def open_fleet(
    directory: Path,
    addresses: Sequence[str],
    instances: int,
    *switches: str,
    seed: int = 1,
) -> AsyncIterator[Fleet]:
    """Instances under load that send to a sink."""
    async with open_sink() as sink, trio.open_nursery() as nursery:
        fleet = Fleet(
            directory, sink, addresses, instances, nursery, *switches, dice=random.Random(seed)
        )
        for number in range(instances):
            await fleet.start(number)
        yield fleet
        nursery.cancel_scope.cancel()
