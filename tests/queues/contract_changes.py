"""What every browsable queue backend does besides: find, hold and change mail without taking it.

A backend runs these by a class of its own, as those of `tests.queues.contract`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import trio

from mailerq.message import Message
from mailerq.queues import BrowsableQueues, Changed, Depth, Queues, Settlement
from mailerq.rules.changes import Copy, Decision, Kept
from mailerq.rules.selection import Selection
from tests.queues.contract import LARGE, Backend, Recorder, again, mail, needs, receive, tag_of

__all__ = ["ChangeContract"]


def browsable(queues: Queues) -> BrowsableQueues:
    assert isinstance(queues, BrowsableQueues)
    return queues


class ChangeContract:
    """What a browsable backend has to do."""

    @pytest.fixture
    def backend(self) -> Backend:
        raise NotImplementedError

    async def test_a_selection_finds_messages_by_what_they_say(self, backend: Backend) -> None:
        async with backend.open() as opened:
            queues = browsable(opened)
            await queues.publish([mail(tag, f"{'ab'[tag % 2]}.test") for tag in range(6)])
            await queues.publish([mail(6, "b.test", ips=["192.0.2.1"], tags=["x"])])
            await queues.publish([mail(7, "b.test", smarthost={"hostname": "relay.test"})])
            entries = {
                entry.id: entry.message.properties["tag"] for entry in await queues.browse("outbox")
            }

            async def found(**criteria: Any) -> list[int]:
                numbers = await queues.select("outbox", Selection(**criteria))
                assert numbers == sorted(set(numbers))
                return [entries[number] for number in numbers]

            assert await found() == [*range(8)]
            assert await found(domains=("B.test",)) == [1, 3, 5, 6, 7]
            assert await found(domains=("*.test",), tags=("X",)) == [6]
            assert await found(ids=(min(entries), 10**9)) == [0]
            assert await found(senders=("nobody@*",)) == []
            assert await queues.select("other", Selection()) == []

    async def test_held_mail_becomes_due_when_it_is_released(self, backend: Backend) -> None:
        recorder = Recorder()
        async with backend.open() as opened:
            queues = browsable(opened)
            await queues.publish([mail(1), mail(2, due=backend.now + 60)])
            numbers = await queues.select("outbox", Selection())
            assert await queues.change("outbox", numbers, "hold") == Changed(2, 0)
            assert await queues.change("outbox", numbers, "hold") == Changed(0, 0)
            assert await queues.depths() == [Depth("outbox", 0, 0, 2)]
            assert await queues.select("outbox", Selection(held=False)) == []
            assert await queues.select("outbox", Selection(held=True)) == numbers
            backend.now += 3600
            async with queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription:
                taken = await subscription.take("a.test", 9)
                assert (taken.leases, taken.more, taken.next_due) == ([], False, None)
                recorder.told.clear()
                assert await queues.change("outbox", numbers[:1], "release") == Changed(1, 0)
                await recorder.until(lambda recorder: recorder.destinations == {"a.test"})
                taken = await subscription.take("a.test", 9)
                assert [tag_of(lease) for lease in taken.leases] == [1]
            (held,) = [entry for entry in await queues.browse("outbox") if entry.held]
            assert held.due == pytest.approx(backend.now - 3540, abs=0.001)

    async def test_a_hold_survives_a_start(self, backend: Backend) -> None:
        needs(backend, "durable")
        async with backend.open() as opened:
            queues = browsable(opened)
            await queues.publish([mail(1)])
            await queues.change("outbox", await queues.select("outbox", Selection()), "hold")
        async with backend.open() as queues, queues.consume("outbox", prefetch=9) as consumer:
            await queues.publish([mail(2, "b.test")])
            (lease,) = await receive(consumer, 1)
            assert tag_of(lease) == 2
            with trio.move_on_after(0.05) as scope:
                await consumer.receive()
            assert scope.cancelled_caught

    async def test_a_change_leaves_leased_messages_alone(self, backend: Backend) -> None:
        async with backend.open() as opened:
            queues = browsable(opened)
            await queues.publish([mail(1), mail(2)])
            async with queues.consume("outbox", prefetch=1) as consumer:
                (lease,) = await receive(consumer, 1)
                numbers = await queues.select("outbox", Selection())
                assert len(numbers) == 2
                assert await queues.change("outbox", numbers, "delete") == Changed(1, 1)
                await queues.ack([Settlement(lease, [again(lease)])])
                (lease,) = await receive(consumer, 1)
                assert tag_of(lease) == 1
            assert await queues.depths() == [Depth("outbox", 1, 0)]

    async def test_what_is_released_during_a_change_is_changed_and_not_leased_anew(
        self, backend: Backend
    ) -> None:
        async with backend.open() as opened:
            queues = browsable(opened)
            await queues.publish([mail(tag) for tag in range(9)])
            async with queues.consume("outbox", prefetch=9) as consumer:
                leases = await receive(consumer, 9)
                numbers = [lease.id for lease in leases]

                def recall(wanted: Collection[int]) -> None:
                    assert set(wanted) == set(numbers)
                    for lease in leases[1:]:
                        queues.release(lease)

                done = await queues.change("outbox", numbers, "delete", recall=recall)
                assert done == Changed(8, 1)
                await queues.ack([Settlement(leases[0])])
                with trio.move_on_after(0.05) as scope:
                    await consumer.receive()
                assert scope.cancelled_caught
            assert sum(depth.total for depth in await queues.depths()) == 0

    async def test_changes_of_the_same_messages_at_a_time_change_each_once(
        self, backend: Backend
    ) -> None:
        async with backend.open() as opened:
            queues = browsable(opened)
            await queues.publish([mail(tag) for tag in range(40)])
            numbers = await queues.select("outbox", Selection())
            done: list[int] = []

            async def delete() -> None:
                done.append((await queues.change("outbox", numbers, "delete")).done)

            async with queues.consume("outbox", prefetch=9) as consumer:
                leases = await receive(consumer, 9)
                async with trio.open_nursery() as nursery:
                    for _ in range(3):
                        nursery.start_soon(delete)
                assert sorted(done) == [0, 0, 31]
                await queues.ack([Settlement(lease) for lease in leases])
                await queues.publish([mail(41)])
                assert [tag_of(lease) for lease in await receive(consumer, 1)] == [41]

    async def test_holds_beside_deliveries_lose_and_double_nothing(self, backend: Backend) -> None:
        seen: list[int] = []
        async with backend.open() as opened:
            queues = browsable(opened)
            await queues.publish([mail(tag, f"d{tag % 7}.test") for tag in range(300)])

            async def hold_and_release() -> None:
                while len(seen) < 200:
                    numbers = await queues.select("outbox", Selection())
                    await queues.change("outbox", numbers, "hold")
                    await queues.change("outbox", numbers, "release")

            async with (
                queues.consume("outbox", prefetch=5) as consumer,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(hold_and_release)
                while len(seen) < 300:
                    (lease,) = await receive(consumer, 1)
                    seen.append(tag_of(lease))
                    await queues.ack([Settlement(lease)])
            assert sorted(seen) == [*range(300)]
            assert sum(depth.total for depth in await queues.depths()) == 0

    async def test_a_change_that_does_not_apply_leaves_messages_to_be_taken(
        self, backend: Backend
    ) -> None:
        async with backend.open() as opened:
            queues = browsable(opened)
            await queues.publish([mail(tag) for tag in range(3)])
            async with queues.consume("outbox", prefetch=9) as consumer:
                leases = await receive(consumer, 3)

                def recall(wanted: Collection[int]) -> None:
                    for lease in leases:
                        queues.release(lease)

                numbers = [lease.id for lease in leases]
                done = await queues.change("outbox", numbers, lambda message: None, recall=recall)
                assert done == Changed(0, 0)
                assert sorted(map(tag_of, await receive(consumer, 3))) == [0, 1, 2]

    async def test_what_was_held_since_its_selection_is_not_made_due(
        self, backend: Backend
    ) -> None:
        def now(message: Message) -> Decision:
            return Decision(Kept("outbox", message.properties, backend.now))

        def same(message: Message) -> Decision:
            return Decision(Kept("outbox", {**message.properties, "changed": True}))

        async with backend.open() as opened:
            queues = browsable(opened)
            await queues.publish([mail(tag, due=backend.now + 60) for tag in range(2)])
            numbers = await queues.select("outbox", Selection())
            await queues.change("outbox", numbers[:1], "hold")
            assert await queues.change("outbox", numbers, now) == Changed(1, 0)
            assert await queues.select("outbox", Selection(held=True)) == numbers[:1]
            assert await queues.change("outbox", numbers, same) == Changed(2, 0)
            assert await queues.select("outbox", Selection(held=True)) == numbers[:1]

    async def test_a_decision_keeps_the_body_and_sorts_the_message_anew(
        self, backend: Backend
    ) -> None:
        def decide(message: Message) -> Decision | None:
            if message.properties["tag"] == 3:
                return None
            if message.properties["tag"] == 2:
                copies = [Copy("report", {"tag": 20}, False), Copy("kept", {"tag": 21}, True)]
                return Decision(None, copies)
            return Decision(Kept("outbox", {"tag": 10, "recipient": "r@new.test"}, backend.now))

        recorder = Recorder()
        async with backend.open() as opened:
            queues = browsable(opened)
            later = backend.now + 60
            await queues.publish([mail(tag, body=LARGE, due=later) for tag in (1, 2, 3)])
            numbers = await queues.select("outbox", Selection())
            async with queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription:
                assert await queues.change("outbox", numbers, decide) == Changed(2, 0)
                await recorder.until(lambda recorder: "new.test" in recorder.destinations)
                (lease,) = (await subscription.take("new.test", 9)).leases
                assert (lease.id, tag_of(lease)) == (numbers[0], 10)
                await subscription.load(lease)
                assert lease.message.body == LARGE
            for queue, body in (("report", None), ("kept", LARGE)):
                async with queues.consume(queue, prefetch=1) as consumer:
                    (copy,) = await receive(consumer, 1)
                    assert copy.message.body == body
            assert await queues.select("outbox", Selection()) == [numbers[0], numbers[2]]

    async def test_a_decision_moves_a_message_to_those_who_consume_another_queue(
        self, backend: Backend
    ) -> None:
        def decide(message: Message) -> Decision:
            return Decision(Kept("other", message.properties, backend.now))

        async with backend.open() as opened:
            queues = browsable(opened)
            await queues.publish([mail(1, due=backend.now + 60, body=LARGE)])
            numbers = await queues.select("outbox", Selection())
            async with queues.consume("other", prefetch=1) as consumer:
                assert await queues.change("outbox", numbers, decide) == Changed(1, 0)
                (lease,) = await receive(consumer, 1)
                assert (lease.queue, lease.message.body) == ("other", LARGE)
                await queues.ack([Settlement(lease)])
            assert await queues.select("outbox", Selection()) == []
