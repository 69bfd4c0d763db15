"""What `SortedQueues` do beyond other backends: they see each message that waits."""

from __future__ import annotations

from collections import Counter

import pytest
import trio

from mailerq.queues import Lease, Queues, Settlement, Subscription
from tests.queues.contract import (
    LARGE,
    Backend,
    Contract,
    Recorder,
    again,
    mail,
    needs,
    receive,
    tag_of,
)

__all__ = ["SortedContract"]


async def drain(
    queues: Queues, subscription: Subscription, destination: str, limit: int
) -> list[Lease]:
    """All that is due in a destination, some at a time, each settled at once."""
    leases: list[Lease] = []
    more = True
    with trio.fail_after(60):
        while more:
            taken = await subscription.take(destination, limit)
            leases += taken.leases
            await queues.ack([Settlement(lease) for lease in taken.leases])
            more = taken.more
    return leases


class SortedContract(Contract):
    """What a backend has to do that sorts its mail by destination, lane and time."""

    async def test_a_consumer_takes_the_destinations_in_turn(self, backend: Backend) -> None:
        async with backend.open() as queues:
            await queues.publish([mail(tag, "full.test") for tag in range(200)])
            await queues.publish([mail(1000 + tag, f"d{tag}.test") for tag in range(10)])
            seen: list[int] = []
            async with queues.consume("outbox", prefetch=20) as consumer:
                while len(seen) < 210:
                    leases = await receive(consumer, 5)
                    seen += map(tag_of, leases)
                    await queues.ack([Settlement(lease) for lease in leases])
            assert len(set(seen)) == 210
            assert max(seen.index(1000 + tag) for tag in range(10)) < 120

    async def test_what_is_durable_is_there_after_a_start(self, backend: Backend) -> None:
        needs(backend, "durable")
        async with backend.open() as queues:
            await queues.publish([mail(1, body=LARGE), mail(2, due=backend.now + 60)])
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription,
        ):
            await recorder.until(lambda recorder: bool(recorder.told))
            assert recorder.told == [("a.test", None)]
            taken = await subscription.take("a.test", 10)
            assert [tag_of(lease) for lease in taken.leases] == [1]
            assert taken.next_due == pytest.approx(backend.now + 60, abs=0.001)

    async def test_a_window_keeps_the_rest_in_the_queue(self, backend: Backend) -> None:
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=100, window=2) as subscription,
        ):
            await self._settle_in(queues, recorder)
            for tag in range(5):
                await queues.publish([mail(tag)])
            await recorder.until(lambda recorder: len(recorder.leases) == 2 and recorder.told != [])
            assert recorder.tags == [0, 1]
            assert [key for key, _ in recorder.told] == ["a.test"]  # once for all of them
            taken = await subscription.take("a.test", 2)
            assert ([tag_of(lease) for lease in taken.leases], taken.more) == ([2, 3], True)
            taken = await subscription.take("a.test", 2)
            assert ([tag_of(lease) for lease in taken.leases], taken.more) == ([4], False)

    async def test_the_start_tells_of_each_destination_once(self, backend: Backend) -> None:
        async with backend.open() as queues:
            await queues.publish([mail(tag, f"d{tag % 700}.test") for tag in range(2100)])
            await queues.publish([mail(9999, "later.test", due=backend.now + 60)])
            recorder = Recorder()
            async with queues.subscribe("outbox", recorder, prefetch=10, window=10):
                await recorder.until(lambda recorder: len(recorder.destinations) == 701)
                assert len(recorder.told) == 701
                assert dict(recorder.told)["later.test"] == pytest.approx(
                    backend.now + 60, abs=0.001
                )
                assert recorder.leases == []

    async def test_what_is_leased_is_not_taken_twice(self, backend: Backend) -> None:
        recorder = Recorder()
        async with backend.open() as queues:
            await queues.publish([mail(tag) for tag in range(10)])
            async with queues.subscribe("outbox", recorder, prefetch=99, window=99) as subscription:
                first = await subscription.take("a.test", 4)
                second = await subscription.take("a.test", 100)
                tags = [tag_of(lease) for lease in (*first.leases, *second.leases)]
                assert tags == list(range(10))
                assert (first.more, second.more) == (True, False)
                assert (await subscription.take("a.test", 5)).leases == []
                assert (await subscription.take("nothing.test", 5)).leases == []
                queues.release(first.leases[2])
                back = await subscription.take("a.test", 100)
                assert [tag_of(lease) for lease in back.leases] == [2]
            # The end of the context has given all of it back.
            async with queues.subscribe("outbox", recorder, prefetch=99, window=99) as subscription:
                taken = await subscription.take("a.test", 100)
                assert [tag_of(lease) for lease in taken.leases] == list(range(10))

    async def test_takes_of_many_destinations_at_once(self, backend: Backend) -> None:
        async with backend.open() as queues:
            await queues.publish([mail(tag, f"d{tag % 50}.test") for tag in range(500)])
            found: list[int] = []
            async with (
                queues.subscribe("outbox", Recorder(), prefetch=9, window=9) as subscription,
                trio.open_nursery() as nursery,
            ):

                async def take(destination: str) -> None:
                    taken = await subscription.take(destination, 10)
                    assert {lease.destination for lease in taken.leases} == {destination}
                    found.extend(map(tag_of, taken.leases))

                for number in range(50):
                    nursery.start_soon(take, f"d{number}.test")
            assert sorted(found) == list(range(500))

    async def test_a_higher_priority_goes_first(self, backend: Backend) -> None:
        async with backend.open() as queues:
            await queues.publish([mail(tag) for tag in range(5)])
            await queues.publish([mail(10 + tag, priority=tag % 2 + 1) for tag in range(4)])
            async with queues.subscribe("outbox", Recorder(), prefetch=9, window=9) as subscription:
                leases = await drain(queues, subscription, "a.test", 2)
            assert [tag_of(lease) for lease in leases] == [11, 13, 10, 12, *range(5)]

    @pytest.mark.parametrize("limit", [1, 3, 10, 1000])
    async def test_senders_take_turns(self, backend: Backend, limit: int) -> None:
        async with backend.open() as queues:
            await queues.publish([mail(tag, envelope="bulk@x.test") for tag in range(500)])
            singles = [f"s{number}@y.test" for number in range(5)]
            await queues.publish([mail(1000, envelope=sender) for sender in singles])
            async with queues.subscribe("outbox", Recorder(), prefetch=9, window=9) as subscription:
                leases = await drain(queues, subscription, "a.test", limit)
            tags = [tag_of(lease) for lease in leases]
            assert Counter(tags)[1000] == 5
            last = max(index for index, tag in enumerate(tags) if tag == 1000)
            assert last < 20
            assert [tag for tag in tags if tag != 1000] == list(range(500))

    @pytest.mark.parametrize("limit", [1, 7, 50])
    async def test_new_mail_and_retries_share_four_to_one(
        self, backend: Backend, limit: int
    ) -> None:
        async with backend.open() as queues:
            tried = [{"attempt": 1}]
            await queues.publish([mail(tag) for tag in range(60)])
            await queues.publish([mail(100 + tag, results=tried) for tag in range(40)])
            async with queues.subscribe("outbox", Recorder(), prefetch=9, window=9) as subscription:
                leases = await drain(queues, subscription, "a.test", limit)
            tags = [tag_of(lease) for lease in leases]
            assert sorted(tags) == [*range(60), *range(100, 140)]
            for end in (25, 50, 75):
                assert sum(tag >= 100 for tag in tags[:end]) == pytest.approx(end / 5, abs=1)
            assert all(tag >= 100 for tag in tags[75:])  # either takes all when the other is gone

    async def test_a_large_body_stays_until_it_is_asked_for(self, backend: Backend) -> None:
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=9, window=1) as subscription,
        ):
            await self._settle_in(queues, recorder)
            subscription.set_window("a.test", 0)
            await queues.publish([mail(1, body=LARGE)])
            await queues.publish([mail(2, body=LARGE), mail(3), mail(4, body=None)])
            await recorder.until(lambda recorder: bool(recorder.told))
            leases = (await subscription.take("a.test", 9)).leases
            assert [(tag_of(lease), lease.loaded) for lease in leases] == [
                (1, False), (2, False), (3, True), (4, True)
            ]  # fmt: skip
            for lease in leases[:2]:
                assert lease.message.body is None
                assert lease.size > len(LARGE)
                await subscription.load(lease)
                assert lease.loaded and lease.message.body == LARGE
            assert [lease.message.body for lease in leases[2:]] == [b"body", None]
            await queues.ack([Settlement(lease) for lease in leases])

    async def test_a_retry_for_later_tells_when(self, backend: Backend) -> None:
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription,
        ):
            await self._settle_in(queues, recorder)
            for tag in range(3):
                await queues.publish([mail(tag)])
            await recorder.until(lambda recorder: len(recorder.leases) == 3)
            dues = [backend.now + seconds for seconds in (600, 900, 300)]
            for lease, due in zip(list(recorder.leases), dues, strict=True):
                await queues.ack([Settlement(lease, [again(lease, due, results=[1])])])
            await recorder.until(lambda recorder: len(recorder.told) == 2)
            assert recorder.told == [
                ("a.test", pytest.approx(dues[0], abs=0.001)),
                ("a.test", pytest.approx(dues[2], abs=0.001)),
            ]
            # Mail that waits for later is not in the way of new mail.
            await queues.publish([mail(7)])
            await recorder.until(lambda recorder: len(recorder.leases) == 4)
            taken = await subscription.take("a.test", 9)
            assert (taken.leases, taken.more) == ([], False)
            assert taken.next_due == pytest.approx(dues[2], abs=0.001)
            backend.now += 700
            taken = await subscription.take("a.test", 9)
            assert [tag_of(lease) for lease in taken.leases] == [2, 0]
            assert taken.next_due == pytest.approx(dues[1], abs=0.001)

    async def test_the_time_of_a_retry_is_told_although_other_mail_is_due(
        self, backend: Backend
    ) -> None:
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=9, window=9),
        ):
            await self._settle_in(queues, recorder)
            for tag in range(2):
                await queues.publish([mail(tag)])
            await recorder.until(lambda recorder: len(recorder.leases) == 2)
            due, later = recorder.leases
            at = backend.now + 600
            await queues.ack([Settlement(due, [again(due)]), Settlement(later, [again(later, at)])])
            await recorder.until(lambda recorder: len(recorder.told) == 2)
            assert recorder.told == [("a.test", None), ("a.test", pytest.approx(at, abs=0.001))]

    async def test_the_time_of_a_retry_is_told_although_it_passed_before_the_commit(
        self, backend: Backend
    ) -> None:
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=9, window=9),
        ):
            await self._settle_in(queues, recorder)
            for tag in range(3):
                await queues.publish([mail(tag)])
            await recorder.until(lambda recorder: len(recorder.leases) == 3)
            times = [backend.now - 2, backend.now - 1]
            first, second, other = recorder.leases
            queues.release(other)
            await recorder.until(lambda recorder: recorder.told == [("a.test", None)])
            for lease, due in ((first, times[0]), (second, times[1])):
                recorder.told.clear()
                await queues.ack([Settlement(lease, [again(lease, due)])])
                await recorder.until(lambda recorder: recorder.told != [])
                assert recorder.told == [("a.test", pytest.approx(due, abs=0.001))]

    async def test_a_later_time_is_told_when_an_earlier_one_has_passed(
        self, backend: Backend
    ) -> None:
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription,
        ):
            await self._settle_in(queues, recorder)
            for tag in range(2):
                await queues.publish([mail(tag)])
            await recorder.until(lambda recorder: len(recorder.leases) == 2)
            for lease in list(recorder.leases):
                recorder.told.clear()
                due = backend.now + 60
                await queues.ack([Settlement(lease, [again(lease, due)])])
                await recorder.until(lambda recorder: recorder.told != [])
                assert recorder.told == [("a.test", pytest.approx(due, abs=0.001))]
                backend.now += 61
            taken = await subscription.take("a.test", 9)
            assert [tag_of(lease) for lease in taken.leases] == [0, 1]

    async def test_a_retry_may_go_elsewhere(self, backend: Backend) -> None:
        recorder = Recorder()
        async with (
            backend.open() as queues,
            queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription,
        ):
            await self._settle_in(queues, recorder)
            await queues.publish([mail(1)])
            await recorder.until(lambda recorder: recorder.tags == [1])
            (lease,) = recorder.leases
            await queues.ack([Settlement(lease, [again(lease, recipient="r@b.test")])])
            await recorder.until(lambda recorder: recorder.destinations == {"b.test"})
            assert (await subscription.take("a.test", 9)).leases == []
            (moved,) = (await subscription.take("b.test", 9)).leases
            assert (moved.destination, moved.message.recipient) == ("b.test", "r@b.test")
