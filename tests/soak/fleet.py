"""Daemons on brokers, under load, of which some are killed; and the account of every mail."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

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
    twice: int = 0
    explained: int = 0
    """Of these, mail that was on a connection to the sink when its instance was killed."""
    near: int = 0
    """Of the others, mail that had arrived shortly before a kill."""
    kills: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)
    """Of lost mail: the depths of the broker's queues, and the queues of each instance."""

    def __str__(self) -> str:
        kills = ", ".join(f"{count} × {kind}" for kind, count in sorted(self.kills.items()))
        return (
            f"kills: {kills or 'none'}; {self.sent} sent, {self.accepted} got 250, {self.arrived} "
            f"arrived, {len(self.lost)} lost, {len(self.foreign)} of unknown origin, "
            f"{self.twice} arrived more than once, {self.explained} of these under way at a kill of"
            f" their instance, {self.near} shortly before a kill; replies {dict(self.codes)}"
        )


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
        self._under_way: set[str] = set()
        self._is_over = False
        self._starts = 0
        self._times: list[float] = []
        """When each mail came to the sink."""
        self._killed: list[float] = []
        """When something was killed."""
        sink.decide = self._decide

    def _decide(self, event: server.Event) -> Reply | None:
        if isinstance(event, server.Content):
            self._times.append(trio.current_time())
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
            daemon(directory, self.sink.port, *self._switches)
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
        self._killed.append(trio.current_time())
        self.running[number].kill()
        self._under_way.update(self.sink.last_mails.values())
        self._loads[number].ending = True
        await self._stacks.pop(number).aclose()
        # What the kernel had taken from the instance may still come.
        self._under_way.update(self.sink.last_mails.values())
        await self.start(number)

    async def kill_broker(self, broker: Broker) -> None:
        """kill -9 a broker, and start it again after a while."""
        self.kills["broker"] += 1
        self._killed.append(trio.current_time())
        await trio.to_thread.run_sync(broker.kill)
        await trio.sleep(self.dice.uniform(0.0, 4.0))
        await trio.to_thread.run_sync(broker.start)

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
        counts = Counter(_id(mail.recipients[0]) for mail in self.sink.mails)
        twice = {id for id, count in counts.items() if count > 1}
        under_way = set(map(_id, self._under_way))
        first: dict[str, float] = {}
        for mail, time in zip(self.sink.mails, self._times, strict=True):
            first.setdefault(_id(mail.recipients[0]), time)
        near = {
            id
            for id in twice - under_way
            if any(0 <= kill - first[id] <= NEAR_SECONDS for kill in self._killed)
        }
        return Account(
            sent=len(ledger.entries),
            accepted=len(ledger.accepted),
            arrived=len(counts),
            lost=ledger.accepted - counts.keys(),
            foreign=counts.keys() - ledger.ids(Fate.ACCEPTED, Fate.UNKNOWN, Fate.REFUSED),
            twice=len(twice),
            explained=len(twice & under_way),
            near=len(near),
            kills=self.kills,
            codes=ledger.codes + Counter(entry.code for entry in ledger.entries.values()),
        )


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
