"""A subscription to the embedded queue against a model: dicts, no file, no threads."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from mailerq.queues import Lease, Settlement
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.opening import open_embedded
from tests.queues.contract import LARGE, Recorder, again, mail, tag_of
from tests.queues.kit import explore

DOMAINS = ("a.test", "b.test", "c.test")
WINDOW = 3
PREFETCH = 5

domains = st.sampled_from(DOMAINS)
delays = st.sampled_from([None, 0, 10, 500])
BODIES = {"none": None, "small": b"body", "large": LARGE}  # by name, for a short report
contents = st.tuples(domains, delays, st.sampled_from(list(BODIES)))
picks = st.integers(0, 20)
steps = st.one_of(
    st.tuples(st.just("publish"), st.lists(contents, min_size=1, max_size=4)),
    st.tuples(st.just("inject"), contents),
    st.tuples(st.just("take"), domains, st.integers(1, 4)),
    st.tuples(st.just("ack"), picks),
    st.tuples(st.just("retry"), picks, domains, delays),
    st.tuples(st.just("load"), picks),
    st.tuples(st.just("release"), picks),
    st.tuples(st.just("window"), domains, st.integers(0, 3)),
    st.tuples(st.just("forget"), domains),
    st.tuples(st.just("advance"), st.sampled_from([1, 20, 1000])),
    st.tuples(
        st.just("subscribe anew"),
    ),
    st.tuples(
        st.just("start anew"),
    ),
)


@dataclass
class Known:
    """A message in the model."""

    domain: str
    due: float
    body: bytes | None
    lease: Lease | None = None


class Run:
    """One example: the real queue, its subscriber, and the model."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.now = 1_000_000_000.0
        self.model: dict[int, Known] = {}
        self.tags = 0

    async def open(self) -> None:
        self.engine = AsyncExitStack()
        self.queues = await self.engine.enter_async_context(
            open_embedded(self.directory, clock=lambda: self.now)
        )
        await self.subscribe()

    async def subscribe(self) -> None:
        self.context = AsyncExitStack()
        self.recorder = Recorder()
        self.subscription = await self.context.enter_async_context(
            self.queues.subscribe("outbox", self.recorder, prefetch=PREFETCH, window=WINDOW)
        )
        self.windows = dict.fromkeys(DOMAINS, WINDOW)
        self.reported: set[str] = set()
        """Domains with mail that a take has reported, of which the receiver is not told."""

    async def unsubscribe(self) -> None:
        await self.settled()
        await self.context.aclose()
        for known in self.model.values():
            known.lease = None

    async def close(self) -> None:
        await self.unsubscribe()
        await self.engine.aclose()

    def make(self, domain: str, delay: float | None, kind: str) -> Any:
        self.tags += 1
        due = self.now if delay is None else self.now + delay
        body = BODIES[kind]
        self.model[self.tags] = Known(domain, due, body)
        return mail(self.tags, domain, due=due, body=body)

    def lease(self, lease: Lease) -> None:
        """A message came: the model must have it, unleased."""
        known = self.model[tag_of(lease)]
        assert known.lease is None
        assert known.due <= self.now
        assert lease.destination == known.domain
        assert lease.loaded or known.body is LARGE  # which new mail may bring along
        assert lease.message.body == (known.body if lease.loaded else None)
        known.lease = lease

    async def settled(self) -> None:
        """What is on the way to the subscriber arrives."""
        # What the writer has handed over came with the wake-up of the task that published.
        await trio.lowlevel.checkpoint()
        while self.recorder.leases:
            lease = self.recorder.leases.pop(0)
            # It comes only where there is room.
            assert self.leased_in(lease.destination) < self.windows[lease.destination]
            assert sum(known.lease is not None for known in self.model.values()) < PREFETCH
            self.lease(lease)

    def leased_in(self, domain: str) -> int:
        return sum(k.domain == domain and k.lease is not None for k in self.model.values())

    def pick(self, number: int) -> tuple[int, Known, Lease] | None:
        leased = [(tag, k, k.lease) for tag, k in self.model.items() if k.lease is not None]
        if not leased:
            return None
        tag, known, lease = leased[number % len(leased)]
        assert lease is not None
        return tag, known, lease

    def due(self, domain: str) -> list[int]:
        return [
            tag
            for tag, known in self.model.items()
            if known.domain == domain and known.lease is None and known.due <= self.now
        ]

    async def take(self, domain: str, limit: int) -> int:
        due = self.due(domain)
        later = [
            known.due
            for known in self.model.values()
            if known.domain == domain and known.due > self.now
        ]
        taken = await self.subscription.take(domain, limit)
        assert len(taken.leases) == min(limit, len(due))
        assert {tag_of(lease) for lease in taken.leases} <= set(due)
        assert taken.more == (len(due) > limit)
        assert taken.next_due == min(later, default=None)
        if taken.more or later:
            self.reported.add(domain)
        for lease in taken.leases:
            self.lease(lease)
        return len(taken.leases)

    async def step(self, step: tuple[Any, ...]) -> None:
        match step:
            case ("publish", list(messages)):
                await self.queues.publish([self.make(*message) for message in messages])
            case ("inject", message):
                with QueueFile.open(self.directory) as other:
                    other.publish([self.make(*message)])
                self.queues.wake()
            case ("take", domain, limit):
                await self.take(domain, limit)
            case ("ack", number) if picked := self.pick(number):
                tag, _, lease = picked
                await self.queues.ack([Settlement(lease)])
                del self.model[tag]
            case ("retry", number, domain, delay) if picked := self.pick(number):
                _, known, lease = picked
                due = self.now if delay is None else self.now + delay
                retry = again(lease, due, recipient=f"r@{domain}", results=[1])
                await self.queues.ack([Settlement(lease, [retry])])
                known.domain, known.due, known.lease = domain, due, None
            case ("load", number) if picked := self.pick(number):
                _, known, lease = picked
                await self.subscription.load(lease)
                assert lease.message.body == known.body
            case ("release", number) if picked := self.pick(number):
                _, known, lease = picked
                self.queues.release(lease)
                known.lease = None
            case ("window", domain, messages):
                self.subscription.set_window(domain, messages)
                self.windows[domain] = messages
            case ("forget", domain):
                self.subscription.forget(domain)
                self.windows[domain] = WINDOW
            case ("advance", seconds):
                self.now += seconds
            case ("subscribe anew",):
                await self.unsubscribe()
                await self.subscribe()
            case ("start anew",):
                await self.close()
                await self.open()
        await self.settled()
        depths = {
            d.destination: d.due + d.delayed for d in await self.queues.destinations("outbox")
        }
        for domain in DOMAINS:
            assert depths.get(domain, 0) == sum(k.domain == domain for k in self.model.values())

    async def drain(self) -> None:
        """All mail comes out, from the subscriber's reports alone."""
        self.now += 10_000
        while self.model:
            for tag, known in list(self.model.items()):
                if known.lease is not None:
                    await self.queues.ack([Settlement(known.lease)])
                    del self.model[tag]
            await self.recorder.until(
                lambda recorder: bool(
                    not self.model or recorder.told or recorder.leases or self.reported
                )
            )
            await self.settled()
            told, self.recorder.told = self.recorder.told, []
            assert all(due is None or due <= self.now for _, due in told)
            domains = self.reported | {domain for domain, _ in told}
            self.reported = set()
            for domain in sorted(domains):
                while await self.take(domain, 2):
                    pass
        assert await self.queues.depths() == []


@settings(max_examples=60)
@given(st.lists(steps, max_size=25))
def test_whatever_happens_subscription_and_model_agree(steps: list[tuple[Any, ...]]) -> None:
    explore(Run, steps)
