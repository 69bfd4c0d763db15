"""The embedded queue against a model: dicts, no file, no threads."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from mailerq.message import Message
from mailerq.queues import Consumer, Lease, Publication, Settlement
from mailerq.queues.opening import open_embedded
from mailerq.rules.changes import Decision, Kept
from mailerq.rules.selection import Selection
from tests.queues.kit import explore

QUEUES = ("outbox", "results")
BODIES = (None, b"", b"short", b"\xff\x00long" * 1000)

queues = st.sampled_from(QUEUES)
delays = st.sampled_from([None, 0, 10, 500])
contents = st.tuples(queues, delays, st.sampled_from(BODIES))
picks = st.integers(0, 20)
steps = st.one_of(
    st.tuples(st.just("publish"), st.lists(contents, min_size=1, max_size=4)),
    st.tuples(st.just("receive"), queues),
    st.tuples(st.just("ack"), picks),
    st.tuples(st.just("ack with"), picks, contents),
    st.tuples(st.just("retry"), picks, delays),
    st.tuples(st.just("retry with"), picks, delays, st.sampled_from(BODIES)),
    st.tuples(st.just("release"), picks),
    st.tuples(st.just("advance"), st.sampled_from([1, 20, 1000])),
    st.tuples(st.just("purge"), queues),
    st.tuples(st.just("change"), queues, st.sampled_from(["hold", "release", "delete", "move"])),
    st.tuples(st.just("consume anew"), queues),
    st.tuples(
        st.just("start anew"),
    ),
)


@dataclass
class Known:
    """A message in the model."""

    queue: str
    due: float
    tag: int
    body: bytes | None
    lease: Lease | None = None
    held: bool = False


class Run:
    """One example: the real queue, its consumers, and the model."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.now = 1_000_000_000.0
        self.model: list[Known] = []
        self.tags = 0
        self.consumers: dict[str, Consumer] = {}
        self.contexts: dict[str, AsyncExitStack] = {}
        self.engine = AsyncExitStack()

    async def open(self) -> None:
        self.engine = AsyncExitStack()
        self.queues = await self.engine.enter_async_context(
            open_embedded(self.directory, clock=lambda: self.now)
        )
        for queue in QUEUES:
            await self.open_consumer(queue)

    async def open_consumer(self, queue: str) -> None:
        self.contexts[queue] = AsyncExitStack()
        self.consumers[queue] = await self.contexts[queue].enter_async_context(
            self.queues.consume(queue, prefetch=3)
        )

    async def close_consumer(self, queue: str) -> None:
        await self.contexts[queue].aclose()
        for known in self.model:
            if known.queue == queue:
                known.lease = None

    async def close(self) -> None:
        for queue in QUEUES:
            await self.close_consumer(queue)
        await self.engine.aclose()

    def make(self, queue: str, delay: float | None, body: bytes | None) -> Publication:
        self.tags += 1
        due = None if delay is None else self.now + delay
        self.model.append(Known(queue, self.now if due is None else due, self.tags, body))
        return Publication(queue, Message({"tag": self.tags}, body), due)

    def leased(self, pick: int) -> Known | None:
        leased = [known for known in self.model if known.lease is not None]
        return leased[pick % len(leased)] if leased else None

    def due(self, queue: str) -> list[Known]:
        return [
            known
            for known in self.model
            if known.queue == queue
            and known.lease is None
            and known.due <= self.now
            and not known.held
        ]

    async def receive(self, queue: str) -> None:
        leased = sum(k.queue == queue and k.lease is not None for k in self.model)
        due = self.due(queue)
        if leased >= 3 or not due:
            return
        with trio.fail_after(60):
            lease = await self.consumers[queue].receive()
        tag = lease.message.properties.pop("tag")
        assert lease.queue == queue
        assert not lease.message.properties
        [known] = [known for known in due if known.tag == tag]
        assert lease.message.body == known.body
        known.lease = lease

    async def step(self, step: tuple[Any, ...]) -> None:
        match step:
            case ("publish", list(messages)):
                await self.queues.publish([self.make(*message) for message in messages])
            case ("receive", queue):
                await self.receive(queue)
            case ("ack", pick) if known := self.leased(pick):
                await self.queues.ack([Settlement(self.lease_of(known))])
                self.model.remove(known)
            case ("ack with", pick, content) if known := self.leased(pick):
                publication = self.make(*content)
                await self.queues.ack([Settlement(self.lease_of(known), [publication])])
                self.model.remove(known)
            case ("retry", pick, delay) if known := self.leased(pick):
                await self.retry(known, delay, known.body)
            case ("retry with", pick, delay, body) if known := self.leased(pick):
                await self.retry(known, delay, body)
            case ("release", pick) if known := self.leased(pick):
                self.queues.release(self.lease_of(known))
                known.lease = None
            case ("advance", seconds):
                self.now += seconds
                self.queues.wake()
            case ("purge", queue):
                gone = [k for k in self.model if k.queue == queue and k.lease is None]
                held = [k for k in self.model if k.queue == queue and k.lease is not None]
                count = await self.queues.purge(queue)
                # What lies ready for the consumer is leased, though the model cannot know.
                assert count <= len(gone)
                left = {e.message.properties["tag"] for e in await self.queues.browse(queue)}
                assert {k.tag for k in held} <= left
                self.model = [k for k in self.model if k.queue != queue or k.tag in left]
            case ("change", queue, action):
                await self.change(queue, action)
            case ("consume anew", queue):
                await self.close_consumer(queue)
                await self.open_consumer(queue)
            case ("start anew",):
                await self.close()
                await self.open()
        await self.compare()

    async def change(self, queue: str, action: Any) -> None:
        """Change a whole queue; "move" leaves half of the messages as they are."""
        now = self.now
        other = QUEUES[1 - QUEUES.index(queue)]

        def move(message: Message) -> Decision | None:
            if message.properties["tag"] % 2:
                return None
            return Decision(Kept(other, dict(message.properties), now))

        numbers = await self.queues.select(queue, Selection())
        assert len(numbers) == sum(known.queue == queue for known in self.model)
        changed = await self.queues.change(queue, numbers, move if action == "move" else action)
        entries = [entry for name in QUEUES for entry in await self.queues.browse(name)]
        found = {entry.message.properties["tag"]: entry for entry in entries}
        done = 0
        for known in [known for known in self.model if known.queue == queue]:
            # What lies ready for the consumer is leased, though the model cannot know.
            entry = found.get(known.tag)
            if entry is None:
                assert action == "delete"
                self.model.remove(known)
                done += 1
            elif entry.queue != queue:
                assert (action, known.tag % 2, entry.due) == ("move", 0, now)
                known.queue, known.due, known.held = entry.queue, entry.due, False
                done += 1
            elif entry.held != known.held:
                assert action == ("hold" if entry.held else "release")
                known.held = entry.held
                done += 1
            else:
                continue
            assert known.lease is None
        assert changed.done == done
        assert changed.leased >= sum(
            known.lease is not None for known in self.model if known.queue == queue
        )

    def lease_of(self, known: Known) -> Lease:
        assert known.lease is not None
        return known.lease

    async def retry(self, known: Known, delay: float | None, body: bytes | None) -> None:
        lease = self.lease_of(known)
        publication = self.make(known.queue, delay, body)
        await self.queues.ack([Settlement(lease, [publication])])
        self.model.remove(known)

    async def compare(self) -> None:
        for queue in QUEUES:
            entries = await self.queues.browse(queue)
            found = {
                (entry.message.properties["tag"], entry.due, entry.message.body, entry.held)
                for entry in entries
            }
            assert found == {(k.tag, k.due, k.body, k.held) for k in self.model if k.queue == queue}
        depths = {depth.queue: depth.total for depth in await self.queues.depths()}
        for queue in QUEUES:
            assert depths.get(queue, 0) == sum(known.queue == queue for known in self.model)

    async def drain(self) -> None:
        """At the end all messages come out, and no others."""
        for known in list(self.model):
            if known.lease is not None:
                await self.queues.ack([Settlement(known.lease)])
                self.model.remove(known)
        self.now += 10_000
        self.queues.wake()
        for queue in QUEUES:
            await self.change(queue, "release")
        for queue in QUEUES:
            while self.due(queue):
                await self.receive(queue)
                [known] = [k for k in self.model if k.lease is not None]
                await self.queues.ack([Settlement(self.lease_of(known))])
                self.model.remove(known)
        assert await self.queues.depths() == []


@settings(max_examples=60)
@given(st.lists(steps, max_size=25))
def test_whatever_happens_queue_and_model_agree(steps: list[tuple[Any, ...]]) -> None:
    explore(Run, steps)
