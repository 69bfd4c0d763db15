"""What every queue backend does, told by the interface alone.

A backend runs these by a class of its own: ``class TestMine(Contract)`` with a fixture `backend`.
What only `SortedQueues` do is told by `tests.queues.contract_sorted`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Protocol

import pytest
import trio
import trio.testing

from mailerq.errors import MessageError, QueueError
from mailerq.message import Message
from mailerq.queues import (
    Consumer,
    Depth,
    Lease,
    Publication,
    Queues,
    Settlement,
    Subscription,
    Taken,
)

__all__ = [
    "LARGE",
    "Backend",
    "Capability",
    "Contract",
    "Recorder",
    "again",
    "gather",
    "mail",
    "needs",
    "receive",
    "tag_of",
]

LARGE = bytes(range(256)) * 1024
"""A body that stays in the queue until it is asked for."""


Capability = Literal["durable"]
"""`durable`: what was published is there when the backend is opened again."""


class Backend(Protocol):
    """A backend under test."""

    now: float
    capabilities: frozenset[Capability]
    """What this backend can do of that which not every backend can."""

    def open(self) -> AbstractAsyncContextManager[Queues]: ...


class Recorder:
    """A receiver that remembers what it was told."""

    def __init__(self) -> None:
        self.leases: list[Lease] = []
        self.lost_leases: list[Lease] = []
        self.told: list[tuple[str, float | None]] = []
        self.news = trio.Event()
        """Set when something more is told."""

    def arrived(self, leases: Sequence[Lease]) -> None:
        assert leases
        self.leases += leases
        self._notice()

    def waited(self, leases: Sequence[Lease]) -> None:
        self.arrived(leases)

    def lost(self, leases: Sequence[Lease]) -> None:
        self.lost_leases += leases

    def waiting(self, destination: str, due: float | None) -> None:
        self.told.append((destination, due))
        self._notice()

    def _notice(self) -> None:
        self.news.set()
        self.news = trio.Event()

    async def until(self, condition: Callable[[Recorder], bool]) -> None:
        with trio.fail_after(60):
            while not condition(self):
                await self.news.wait()

    @property
    def tags(self) -> list[int]:
        return [tag_of(lease) for lease in self.leases]

    @property
    def destinations(self) -> set[str]:
        return {destination for destination, _ in self.told}


def needs(backend: Backend, capability: Capability) -> None:
    """Skip a test that the backend says it cannot pass."""
    if capability not in backend.capabilities:
        pytest.skip(f"the backend is not {capability}")


def tag_of(lease: Lease) -> int:
    tag: int = lease.message.properties["tag"]
    return tag


def mail(
    tag: int,
    domain: str = "a.test",
    *,
    due: float | None = None,
    body: bytes | None = b"body",
    **more: Any,
) -> Publication:
    properties = {"tag": tag, "recipient": f"r@{domain}", "envelope": "s@s.test", **more}
    return Publication("outbox", Message(properties, body), due)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def again(lease: Lease, due: float | None = None, **more: Any) -> Publication:
    """The message of a lease once more, with the body that the lease has."""
    properties = {**lease.message.properties, **more}
    return Publication(lease.queue, Message(properties, lease.message.body), due)


async def receive(consumer: Consumer, count: int) -> list[Lease]:
    with trio.fail_after(60):
        return [await consumer.receive() for _ in range(count)]


async def cancel_some(take: Callable[[], Awaitable[None]]) -> None:
    """Begin a take and cancel it, five times; one may be over before it is cancelled."""
    for _ in range(5):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(take)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()


async def gather(
    subscription: Subscription, recorder: Recorder, destination: str, count: int
) -> list[Lease]:
    """Leases of a destination, whether they arrive or are taken."""
    leases: list[Lease] = []
    with trio.fail_after(60):
        while True:
            news = recorder.news
            for lease in [each for each in recorder.leases if each.destination == destination]:
                recorder.leases.remove(lease)
                leases.append(lease)
            if len(leases) < count:
                leases += (await subscription.take(destination, count - len(leases))).leases
            if len(leases) >= count:
                return leases
            with trio.move_on_after(0.05):  # what is given back is not always told
                await news.wait()


class Contract:
    """What a backend has to do."""

    @pytest.fixture
    def backend(self) -> Backend:
        raise NotImplementedError

    # Publish, consume, settle

    async def test_what_is_published_comes_once(self, backend: Backend) -> None:
        async with backend.open() as queues:
            await queues.publish([mail(1), mail(2, "b.test")])
            async with queues.consume("outbox", prefetch=10) as consumer:
                leases = await receive(consumer, 2)
                await queues.publish([mail(3, "c.test")])
                leases += await receive(consumer, 1)
                assert sorted(map(tag_of, leases)) == [1, 2, 3]
                await queues.ack([Settlement(lease) for lease in leases])
                with trio.move_on_after(0.05) as scope:
                    await consumer.receive()
                assert scope.cancelled_caught

    async def test_what_is_durable_comes_after_a_start(self, backend: Backend) -> None:
        needs(backend, "durable")
        async with backend.open() as queues:
            await queues.publish([mail(1, body=LARGE), mail(2, due=backend.now + 60)])
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription,
        ):
            (lease,) = await gather(subscription, recorder, "a.test", 1)
            await subscription.load(lease)
            assert (tag_of(lease), lease.message.body) == (1, LARGE)
            assert (await subscription.take("a.test", 9)).leases == []

    async def test_a_publication_that_cannot_be_refuses_all(self, backend: Backend) -> None:
        async with backend.open() as queues:
            bad = Publication("", Message({}))
            with pytest.raises(MessageError):
                queues.check(bad)
            with pytest.raises(MessageError):
                await queues.publish([mail(1), bad])
            await queues.publish([mail(2)])
            async with queues.consume("outbox", prefetch=10) as consumer:
                (lease,) = await receive(consumer, 1)
                assert tag_of(lease) == 2
                with pytest.raises(MessageError):
                    await queues.ack([Settlement(lease, [bad])])
                await queues.ack([Settlement(lease)])  # it is leased still

    async def test_settling_publishes_in_the_same_step(self, backend: Backend) -> None:
        async with backend.open() as queues:
            await queues.publish([mail(1)])
            async with (
                queues.consume("outbox", prefetch=10) as consumer,
                queues.consume("results", prefetch=10) as results,
            ):
                (lease,) = await receive(consumer, 1)
                document = Publication("results", Message({"tag": 7}))
                await queues.ack([Settlement(lease, [document])])
                (result,) = await receive(results, 1)
                assert (tag_of(result), result.queue) == (7, "results")
                with pytest.raises(ValueError, match="over"):
                    await queues.ack([Settlement(lease)])

    @pytest.mark.parametrize("kept", [False, True])
    async def test_other_messages_of_a_step_are_no_retries(
        self, backend: Backend, kept: bool
    ) -> None:
        """Even one for the same queue, with the same body."""
        async with backend.open() as queues:
            await queues.publish([mail(1)])
            async with queues.consume("outbox", prefetch=1) as consumer:
                (lease,) = await receive(consumer, 1)
                retry = [again(lease, tag=2)] if kept else []
                await queues.ack([Settlement(lease, retry, [mail(3)])])
                found = {}
                for _ in range(1 + kept):
                    (lease,) = await receive(consumer, 1)
                    found[tag_of(lease)] = lease.message.body
                    with pytest.raises(MessageError):
                        await queues.ack([Settlement(lease, [], [Publication("", Message({}))])])
                    await queues.ack([Settlement(lease)])
            assert found == {3: b"body", **({2: b"body"} if kept else {})}
            assert sum(depth.total for depth in await queues.depths()) == 0

    async def test_what_is_given_back_comes_again(self, backend: Backend) -> None:
        async with backend.open() as queues:
            await queues.publish([mail(1)])
            async with queues.consume("outbox", prefetch=1) as consumer:
                (lease,) = await receive(consumer, 1)
                queues.release(lease)
                (lease,) = await receive(consumer, 1)
            with pytest.raises(ValueError, match="over"):
                queues.release(lease)
            async with queues.consume("outbox", prefetch=1) as consumer:
                (lease,) = await receive(consumer, 1)
                assert (tag_of(lease), lease.message.body) == (1, b"body")

    async def test_what_is_given_back_is_as_it_was(self, backend: Backend) -> None:
        async with backend.open() as queues:
            await queues.publish([mail(1)])
            async with queues.consume("outbox", prefetch=1) as consumer:
                (lease,) = await receive(consumer, 1)
                lease.message.properties["recipient"] = "changed@b.test"
                lease.message.body = None
                queues.release(lease)
                (back,) = await receive(consumer, 1)
                assert (back.message.recipient, back.message.body) == ("r@a.test", b"body")
                with pytest.raises(ValueError, match="over"):
                    await queues.ack([Settlement(lease)])  # the lease is over, its message is not
                await queues.ack([Settlement(back)])

    async def test_prefetch_bounds_what_a_consumer_holds(self, backend: Backend) -> None:
        async with backend.open() as queues:
            await queues.publish([mail(tag) for tag in range(3)])
            async with queues.consume("outbox", prefetch=2) as consumer:
                leases = await receive(consumer, 2)
                with trio.move_on_after(0.05) as scope:
                    await consumer.receive()
                assert scope.cancelled_caught
                await queues.ack([Settlement(leases[0])])
                assert tag_of((await receive(consumer, 1))[0]) == 2
            with pytest.raises(ValueError, match="prefetch"):
                async with queues.consume("outbox", prefetch=0):
                    raise AssertionError

    async def test_an_ack_with_one_bad_lease_settles_none(self, backend: Backend) -> None:
        async with backend.open() as queues:
            await queues.publish([mail(1), mail(2)])
            async with queues.consume("outbox", prefetch=9) as consumer:
                over, held = await receive(consumer, 2)
                await queues.ack([Settlement(over)])
                document = Publication("results", Message({"tag": 7}))
                for leases in ((held, over), (held, held)):
                    with pytest.raises(ValueError, match=r"over|twice"):
                        await queues.ack([Settlement(lease, [document]) for lease in leases])
                totals = {depth.queue: depth.total for depth in await queues.depths()}
                assert (totals.get("outbox", 0), totals.get("results", 0)) == (1, 0)
                await queues.ack([Settlement(held)])

    @pytest.mark.parametrize("name", ["", "a" * 256, "a\0b", "\u202e", "\ud800"])
    async def test_a_name_that_no_queue_can_have(self, backend: Backend, name: str) -> None:
        async with backend.open() as queues:
            with pytest.raises(MessageError, match="name"):
                await queues.publish([Publication(name, Message({}))])

    async def test_properties_that_cannot_be_stored(self, backend: Backend) -> None:
        async with backend.open() as queues:
            for value in (object(), nested(10_000)):
                with pytest.raises(MessageError):
                    await queues.publish([mail(1), mail(2, more=value)])
            assert sum(depth.total for depth in await queues.depths()) == 0

    async def test_depth_counts_what_is_leased_and_a_purge_leaves_it(
        self, backend: Backend
    ) -> None:
        async with backend.open() as queues:
            await queues.publish([mail(1), mail(2), mail(3, due=backend.now + 60)])
            recorder = Recorder()
            async with queues.subscribe("outbox", recorder, prefetch=9, window=0) as subscription:
                (lease,) = await gather(subscription, recorder, "a.test", 1)
                assert await queues.depths() == [Depth("outbox", 2, 1)]
                assert await queues.purge("outbox") == 2
                assert await queues.depths() == [Depth("outbox", 1, 0)]
                queues.release(lease)
                (lease,) = await gather(subscription, recorder, "a.test", 1)
                assert tag_of(lease) == 1

    # Subscribe: what comes by itself

    async def test_mail_of_a_free_destination_arrives(self, backend: Backend) -> None:
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=100, window=10),
        ):
            await queues.publish([mail(tag, f"d{tag}.test") for tag in range(5)])
            await recorder.until(lambda recorder: len(recorder.leases) + len(recorder.told) >= 5)
            recorder.leases.clear()
            await self._settle_in(queues, recorder)
            await queues.publish([mail(9, "late.test")])
            await recorder.until(lambda recorder: 9 in recorder.tags)
            (lease,) = [lease for lease in recorder.leases if tag_of(lease) == 9]
            assert (lease.destination, lease.queue) == ("late.test", "outbox")
            assert lease.loaded and lease.message.body == b"body"
            assert lease.size > len(b"body")

    async def test_what_does_not_fit_a_window_waits_in_order(self, backend: Backend) -> None:
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=100, window=2) as subscription,
        ):
            await self._settle_in(queues, recorder)
            for tag in range(9):
                await queues.publish([mail(tag)])
            await recorder.until(lambda recorder: recorder.told != [])
            assert recorder.tags == [0, 1]
            assert [key for key, _ in recorder.told] == ["a.test"]  # once for all of them
            recorder.leases.clear()
            leases = await gather(subscription, recorder, "a.test", 2)
            leases += await gather(subscription, recorder, "a.test", 5)
            assert [tag_of(lease) for lease in leases] == [2, 3, 4, 5, 6, 7, 8]
            assert (await subscription.take("a.test", 2)).more is False

    async def test_a_closed_window_and_one_that_is_forgotten(self, backend: Backend) -> None:
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=100, window=10) as subscription,
        ):
            await self._settle_in(queues, recorder)
            subscription.set_window("a.test", 0)
            await queues.publish([mail(1)])
            await recorder.until(lambda recorder: recorder.destinations == {"a.test"})
            # One that waits for one destination keeps nothing from another.
            await queues.publish([mail(2, "b.test")])
            await recorder.until(lambda recorder: recorder.tags == [2])
            taken = await subscription.take("a.test", 10)
            await queues.ack([Settlement(lease) for lease in taken.leases])
            subscription.forget("a.test")
            await queues.publish([mail(3)])
            await recorder.until(lambda recorder: recorder.tags == [2, 3])

    async def test_a_destination_that_is_forgotten_during_a_take_keeps_its_mail(
        self, backend: Backend
    ) -> None:
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=99, window=0) as subscription,
        ):
            for tag in range(6):
                await queues.publish([mail(tag)])
            leases = list(await gather(subscription, recorder, "a.test", 1))
            over = trio.Event()

            async def forget() -> None:
                while not over.is_set():
                    subscription.forget("a.test")
                    await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(forget)
                with trio.fail_after(60):
                    while len(leases) < 6:
                        taken = await subscription.take("a.test", 2)
                        leases += taken.leases
                        await trio.sleep(0.01)
                over.set()
            assert sorted(map(tag_of, leases)) == list(range(6))
            await queues.ack([Settlement(lease) for lease in leases])

    async def test_prefetch_bounds_what_comes_by_itself(self, backend: Backend) -> None:
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=3, window=10) as subscription,
        ):
            await self._settle_in(queues, recorder)
            for tag in range(5):
                await queues.publish([mail(tag, f"d{tag}.test")])
            await recorder.until(lambda recorder: len(recorder.told) == 2)
            assert recorder.tags == [0, 1, 2]
            assert recorder.destinations == {"d3.test", "d4.test"}
            taken = await subscription.take("d3.test", 1)  # that one is asked for
            assert len(taken.leases) == 1

    # Take

    async def test_a_lease_is_not_handed_out_twice(self, backend: Backend) -> None:
        recorder = Recorder()
        async with backend.open() as queues:
            await queues.publish([mail(tag) for tag in range(10)])
            async with queues.subscribe("outbox", recorder, prefetch=99, window=0) as subscription:
                first = await gather(subscription, recorder, "a.test", 4)
                second = await gather(subscription, recorder, "a.test", 6)
                assert [tag_of(lease) for lease in (*first, *second)] == list(range(10))
                assert (await subscription.take("a.test", 5)).leases == []
                assert (await subscription.take("nothing.test", 5)).leases == []
                queues.release(first[2])
                (back,) = await gather(subscription, recorder, "a.test", 1)
                assert tag_of(back) == 2
            # The end of the context has given all of it back.
            recorder = Recorder()
            async with queues.subscribe("outbox", recorder, prefetch=99, window=99) as subscription:
                leases = await gather(subscription, recorder, "a.test", 10)
                assert sorted(map(tag_of, leases)) == list(range(10))

    async def test_what_arrived_may_be_given_back(self, backend: Backend) -> None:
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=99, window=9) as subscription,
        ):
            await self._settle_in(queues, recorder)
            await queues.publish([mail(1)])
            await recorder.until(lambda recorder: recorder.tags == [1])
            lease = recorder.leases.pop()
            lease.message.properties["recipient"] = "changed@b.test"
            queues.release(lease)
            (back,) = await gather(subscription, recorder, "a.test", 1)
            assert (tag_of(back), back.message.recipient) == (1, "r@a.test")
            with pytest.raises(ValueError, match="over"):
                queues.release(lease)
            await queues.ack([Settlement(back)])
            assert (await subscription.take("a.test", 9)).leases == []

    async def test_mail_of_many_destinations_is_taken_at_once(self, backend: Backend) -> None:
        recorder = Recorder()
        async with backend.open() as queues:
            await queues.publish([mail(tag, f"d{tag % 20}.test") for tag in range(100)])
            found: list[int] = []
            async with (
                queues.subscribe("outbox", recorder, prefetch=9, window=0) as subscription,
                trio.open_nursery() as nursery,
            ):
                await recorder.until(lambda recorder: len(recorder.destinations) == 20)

                async def take(destination: str) -> None:
                    leases = await gather(subscription, recorder, destination, 5)
                    assert {lease.destination for lease in leases} == {destination}
                    found.extend(map(tag_of, leases))

                for number in range(20):
                    nursery.start_soon(take, f"d{number}.test")
            assert sorted(found) == list(range(100))

    async def test_takes_of_one_call_have_each_their_result(self, backend: Backend) -> None:
        recorder = Recorder()
        async with backend.open() as queues:
            await queues.publish([mail(tag, f"d{tag % 5}.test") for tag in range(25)])
            async with queues.subscribe("outbox", recorder, prefetch=9, window=0) as subscription:
                await recorder.until(lambda recorder: len(recorder.destinations) == 5)
                most = subscription.takes_together
                found: dict[str, list[int]] = {f"d{number}.test": [] for number in range(5)}
                with trio.fail_after(60):
                    while any(len(tags) < 5 for tags in found.values()):
                        wanted = [(key, 5 - len(tags)) for key, tags in found.items()]
                        wanted = [(key, limit) for key, limit in wanted if limit]
                        wanted = [("nothing.test", 3), *wanted][-most:]
                        results = await subscription.take_each(wanted)
                        assert len(results) == len(wanted)
                        for (key, limit), taken in zip(wanted, results, strict=True):
                            assert isinstance(taken, Taken)
                            assert len(taken.leases) <= limit
                            assert {lease.destination for lease in taken.leases} <= {key}
                            if key in found:
                                found[key] += map(tag_of, taken.leases)
                            else:
                                assert not taken.leases and not taken.more
                assert found == {
                    f"d{number}.test": list(range(number, 25, 5)) for number in range(5)
                }
                with pytest.raises(ValueError, match="limit"):
                    await subscription.take_each([("d1.test", 1), ("d2.test", 0)][-most:])

    async def test_takes_that_are_cancelled_together_lease_nothing(self, backend: Backend) -> None:
        async with backend.open() as queues:
            await queues.publish([mail(tag, f"d{tag % 5}.test") for tag in range(25)])
            recorder = Recorder()
            async with queues.subscribe("outbox", recorder, prefetch=9, window=0) as subscription:
                await recorder.until(lambda recorder: len(recorder.destinations) == 5)
                left = [(f"d{number}.test", 5) for number in range(5)]
                leases: list[Lease] = []

                async def take() -> None:
                    wanted = left[: subscription.takes_together]
                    for taken in await subscription.take_each(wanted):
                        assert isinstance(taken, Taken)
                        leases.extend(taken.leases)
                    left.extend(wanted)
                    del left[: len(wanted)]

                await cancel_some(take)
                with trio.fail_after(60):
                    while len(leases) < 25:
                        await take()
                assert sorted(map(tag_of, leases)) == list(range(25))

    async def test_a_take_that_is_cancelled_leases_nothing(self, backend: Backend) -> None:
        async with backend.open() as queues:
            await queues.publish([mail(tag) for tag in range(10)])
            recorder = Recorder()
            async with queues.subscribe("outbox", recorder, prefetch=99, window=0) as subscription:
                await recorder.until(lambda recorder: recorder.destinations == {"a.test"})
                leases: list[Lease] = []

                async def take() -> None:
                    leases.extend((await subscription.take("a.test", 5)).leases)

                await cancel_some(take)
                with trio.fail_after(60):
                    while len(leases) < 10:
                        await take()
                assert len({lease.id for lease in leases}) == 10

    # Bodies

    async def test_a_lease_that_is_over_is_not_loaded(self, backend: Backend) -> None:
        async with backend.open() as queues:
            await queues.publish([mail(1, body=LARGE)])
            recorder = Recorder()
            async with queues.subscribe("outbox", recorder, prefetch=9, window=0) as subscription:
                (lease,) = await gather(subscription, recorder, "a.test", 1)
                queues.release(lease)
                with pytest.raises(ValueError, match="over"):
                    await subscription.load(lease)

    @pytest.mark.parametrize("loaded", [True, False])
    async def test_a_retry_keeps_the_body(self, backend: Backend, loaded: bool) -> None:
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=9, window=0) as subscription,
        ):
            await queues.publish([mail(1, body=LARGE)])
            for attempt in range(3):
                (lease,) = await gather(subscription, recorder, "a.test", 1)
                if loaded:
                    await subscription.load(lease)
                document = Publication("results", Message({"tag": attempt}))
                await queues.ack([Settlement(lease, [document, again(lease, attempt=attempt)])])
            (lease,) = await gather(subscription, recorder, "a.test", 1)
            await subscription.load(lease)
            assert lease.message.body == LARGE
            assert lease.message.properties["attempt"] == 2

    # Later

    async def test_a_retry_that_goes_elsewhere_is_found_there(self, backend: Backend) -> None:
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription,
        ):
            await self._settle_in(queues, recorder)
            await queues.publish([mail(1)])
            await recorder.until(lambda recorder: recorder.tags == [1])
            lease = recorder.leases.pop()
            await queues.ack([Settlement(lease, [again(lease, recipient="r@b.test")])])
            (moved,) = await gather(subscription, recorder, "b.test", 1)
            assert (moved.destination, moved.message.recipient) == ("b.test", "r@b.test")
            assert (await subscription.take("a.test", 9)).leases == []

    async def test_after_the_end_nothing_is_taken(self, backend: Backend) -> None:
        async with backend.open() as queues:
            async with queues.subscribe("outbox", Recorder(), prefetch=9, window=9) as subscription:
                pass
            with pytest.raises((trio.ClosedResourceError, QueueError)):
                await subscription.take("a.test", 1)
            with pytest.raises(ValueError, match="prefetch"):
                async with queues.subscribe("outbox", Recorder(), prefetch=0, window=1):
                    raise AssertionError

    async def _settle_in(self, queues: Queues, recorder: Recorder) -> None:
        """Wait until the subscription knows that the queue is empty: new mail arrives."""
        with trio.fail_after(60):
            number = 0
            while not recorder.leases:
                await queues.publish([mail(-1, f"first{number}.test")])
                await recorder.until(lambda recorder: bool(recorder.told or recorder.leases))
                recorder.told.clear()
                number += 1
        await queues.ack([Settlement(lease) for lease in recorder.leases])
        recorder.leases.clear()
