"""The embedded queue on a real file: what consumers get, when, and the state after errors."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
import trio.testing

from mailerq.errors import MessageError, QueueError, QueueFull
from mailerq.message import Message
from mailerq.queues import Consumer, Lease, Publication, Settlement
from mailerq.queues.embedded import open_queues, reader, takers, taking
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.queues import EmbeddedQueues
from mailerq.queues.embedded.records import Batch
from mailerq.queues.opening import open_embedded
from tests.queues.kit import Clock
from tests.support import DEADLINE, until


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def queues(tmp_path: Path, clock: Clock) -> AsyncIterator[EmbeddedQueues]:
    async with open_embedded(str(tmp_path), clock=clock) as queues:
        yield queues


def publication(
    tag: int, body: bytes | None = b"body", queue: str = "outbox", due: float | None = None
) -> Publication:
    return Publication(queue, Message({"tag": tag}, body), due)


def tag_of(lease: Lease) -> int:
    tag: int = lease.message.properties["tag"]
    return tag


async def receive(consumer: Consumer, count: int) -> list[Lease]:
    with trio.fail_after(60):
        return [await consumer.receive() for _ in range(count)]


async def nothing_comes(consumer: Consumer) -> bool:
    with trio.move_on_after(0.05) as scope:
        await consumer.receive()
    return scope.cancelled_caught


async def test_published_before_and_while_consuming(queues: EmbeddedQueues) -> None:
    await queues.publish([publication(1), publication(2)])
    async with queues.consume("outbox", prefetch=10) as consumer:
        assert [tag_of(lease) for lease in await receive(consumer, 2)] == [1, 2]
        await queues.publish([publication(3)])
        assert [tag_of(lease) for lease in await receive(consumer, 1)] == [3]


async def test_consumer_waits_for_what_is_published(queues: EmbeddedQueues) -> None:
    async with queues.consume("outbox", prefetch=10) as consumer, trio.open_nursery() as nursery:
        received = []

        async def wait() -> None:
            received.append(tag_of(await consumer.receive()))

        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked(0.01)
        with trio.fail_after(60):
            await queues.publish([publication(1), publication(2)])
            while len(received) < 2:
                await trio.lowlevel.checkpoint()
    assert sorted(received) == [1, 2]


async def test_iterating_ends_with_a_break(queues: EmbeddedQueues) -> None:
    await queues.publish([publication(1)])
    async with queues.consume("outbox", prefetch=10) as consumer:
        async for lease in consumer:
            assert tag_of(lease) == 1
            break


@pytest.mark.parametrize("body", [None, b"", b"x", b"\0\xff\r\n" * 50_000])
async def test_bodies_survive(queues: EmbeddedQueues, body: bytes | None) -> None:
    await queues.publish([publication(1, body)])
    [entry] = await queues.browse("outbox")
    assert entry.message.body == body
    async with queues.consume("outbox", prefetch=1) as consumer:
        [lease] = await receive(consumer, 1)
        assert lease.message.body == body


async def test_properties_survive_and_the_route_does_not(queues: EmbeddedQueues) -> None:
    properties = {"a": [1, {"b": "ü☃"}], "n": None, "f": 1.5, "big": 2**80}
    message = Message(properties, b"", local=True)
    await queues.publish([Publication("outbox", message)])
    async with queues.consume("outbox", prefetch=1) as consumer:
        [lease] = await receive(consumer, 1)
        assert lease.message.properties == properties
        assert not lease.message.local


@pytest.mark.parametrize(
    "name", ["ü☃", "; DROP TABLE message --", "../x", "%s$1", "a" * 255, "ü" * 127]
)
async def test_queue_names_are_text_and_nothing_else(queues: EmbeddedQueues, name: str) -> None:
    await queues.publish([publication(1, queue=name)])
    assert [depth.queue for depth in await queues.depths()] == [name]
    async with queues.consume(name, prefetch=1) as consumer:
        [lease] = await receive(consumer, 1)
        await queues.ack([Settlement(lease)])
    assert await queues.depths() == []


@pytest.mark.parametrize(
    "bad",
    [
        publication(1, queue=""),
        publication(1, queue="a" * 256),
        publication(1, queue="a\0b"),
        publication(1, queue="a\nb"),
        publication(1, queue="ü" * 128),
        publication(1, queue="\ud800"),
        Publication("outbox", Message({"a": 10**5000})),
        Publication("outbox", Message({"a": functools.reduce(lambda a, _: [a], range(201), [])})),
        Publication("outbox", Message({"a": object()})),
        Publication("outbox", Message({"a": "\ud800"})),
    ],
)
async def test_what_no_file_can_hold_is_refused_alone(
    queues: EmbeddedQueues, bad: Publication
) -> None:
    with pytest.raises(MessageError):
        await queues.publish([publication(1), bad])
    assert await queues.depths() == []


async def test_an_error_about_one_request_leaves_the_others_of_its_commit_alone(
    queues: EmbeddedQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = queues._file.write
    together = []

    def refuse(batch: Batch) -> None:
        together.append(len(batch.inserts))
        if any(insert.queue == "bad" for insert in batch.inserts):
            raise OverflowError("Python int too large to convert to SQLite INTEGER")
        write(batch)

    monkeypatch.setattr(queues._file, "write", refuse)
    await queues.publish([publication(0)])
    outcomes: list[str] = []

    async def publish(tag: int, queue: str) -> None:
        try:
            await queues.publish([publication(tag, queue=queue)])
        except MessageError:
            outcomes.append(queue)

    async with queues.consume("outbox", prefetch=9) as consumer:
        [lease] = await receive(consumer, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish, 1, "outbox")
            nursery.start_soon(publish, 2, "bad")
            nursery.start_soon(publish, 3, "outbox")
        with pytest.raises(MessageError):
            await queues.ack([Settlement(lease, [publication(4, queue="bad")])])
        await queues.ack([Settlement(lease)])  # it is still leased
        assert {tag_of(lease) for lease in await receive(consumer, 2)} == {1, 3}
        assert await nothing_comes(consumer)
    assert 3 in together
    assert outcomes == ["bad"]


async def test_prefetch_bounds_what_is_leased(queues: EmbeddedQueues) -> None:
    await queues.publish([publication(tag) for tag in range(10)])
    async with queues.consume("outbox", prefetch=3) as consumer:
        leases = await receive(consumer, 3)
        assert await nothing_comes(consumer)
        await queues.ack([Settlement(leases[0])])
        await receive(consumer, 1)
        assert await nothing_comes(consumer)
        await queues.publish([publication(10)])
        assert await nothing_comes(consumer)


async def test_bytes_bound_what_is_leased(
    queues: EmbeddedQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_queues, "HELD_BYTES", 25_000)
    monkeypatch.setattr(taking, "READ_BYTES", 25_000)
    await queues.publish([publication(tag, bytes(10_000 + tag)) for tag in range(5)])
    await queues.publish([publication(5, bytes(90_000))])
    async with queues.consume("outbox", prefetch=100) as consumer:
        leases = await receive(consumer, 3)
        assert await nothing_comes(consumer)
        await queues.ack([Settlement(lease) for lease in leases])
        leases = await receive(consumer, 3)
        assert [tag_of(lease) for lease in leases] == [3, 4, 5]


async def test_oldest_first_when_more_waits_than_fits(queues: EmbeddedQueues) -> None:
    count = 500
    for tag in range(0, count, 50):
        await queues.publish([publication(tag + step) for step in range(50)])
    tags = []
    async with queues.consume("outbox", prefetch=20) as consumer:
        for _ in range(count // 10):
            leases = await receive(consumer, 10)
            tags += [tag_of(lease) for lease in leases]
            await queues.ack([Settlement(lease) for lease in leases])
    assert tags == list(range(count))


async def test_settling_one_by_one_reads_many_at_a_time(
    queues: EmbeddedQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takers, "REST_SECONDS", 1000.0)
    count, prefetch = 300, 40
    await queues.publish([publication(tag) for tag in range(count)])
    async with queues.consume("outbox", prefetch=prefetch) as consumer:
        leases = await receive(consumer, prefetch)
        before = queues.statistics()
        tags = []
        while leases:
            lease = leases.pop(0)
            tags.append(tag_of(lease))
            await queues.ack([Settlement(lease)])
            if prefetch - len(leases) >= prefetch // 4:
                leases += await receive(
                    consumer, min(prefetch // 4, count - len(tags) - len(leases))
                )
        after = queues.statistics()
    assert tags == list(range(count))
    assert after["read_messages"] - before["read_messages"] == count - prefetch
    assert after["reads"] - before["reads"] <= 4 * count / prefetch


@pytest.mark.parametrize("late", [False, True])
async def test_the_last_bit_of_credit_is_used_after_a_rest(
    queues: EmbeddedQueues, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Also when the rest ends between the reader's look at its consumers and at the clock."""
    timeout = reader.Reader._timeout

    def look(self: reader.Reader) -> float | None:
        time.sleep(1.1 * takers.REST_SECONDS if late else 0.0)
        return timeout(self)

    monkeypatch.setattr(reader.Reader, "_timeout", look)
    monkeypatch.setattr(reader, "POLL_SECONDS", 60.0)
    await queues.publish([publication(tag) for tag in range(120)])
    async with queues.consume("outbox", prefetch=100) as consumer:
        leases = await receive(consumer, 100)
        for lease, tag in zip(leases[:20], range(100, 120), strict=True):
            await queues.ack([Settlement(lease)])
            (later,) = await receive(consumer, 1)
            assert tag_of(later) == tag


async def test_two_consumers_share_a_queue(queues: EmbeddedQueues) -> None:
    await queues.publish([publication(tag) for tag in range(10)])
    async with (
        queues.consume("outbox", prefetch=5) as one,
        queues.consume("outbox", prefetch=5) as other,
    ):
        leases = await receive(one, 5) + await receive(other, 5)
    assert sorted(map(tag_of, leases)) == list(range(10))


async def test_what_a_consumer_held_goes_back_when_it_ends(queues: EmbeddedQueues) -> None:
    await queues.publish([publication(tag) for tag in range(4)])
    async with queues.consume("outbox", prefetch=3) as consumer:
        leases = await receive(consumer, 2)
        leases[0].message.properties["tag"] = "changed"
    with pytest.raises(ValueError, match="lease is over"):
        await queues.ack([Settlement(leases[0])])
    with pytest.raises(ValueError, match="lease is over"):
        queues.release(leases[1])
    async with queues.consume("outbox", prefetch=10) as consumer:
        assert [tag_of(lease) for lease in await receive(consumer, 4)] == [0, 1, 2, 3]


async def test_release_gives_it_back_as_it_was(queues: EmbeddedQueues) -> None:
    async with queues.consume("outbox", prefetch=2) as consumer:
        await queues.publish([publication(1), publication(2)])
        first, second = await receive(consumer, 2)
        first.message.properties["tag"] = 99
        first.message.body = b"changed"
        queues.release(first)
        [again] = await receive(consumer, 1)
        assert (tag_of(again), again.message.body) == (1, b"body")
        with pytest.raises(ValueError, match="lease is over"):
            await queues.ack([Settlement(first)])
        await queues.ack([Settlement(again), Settlement(second)])
    assert await queues.depths() == []


async def test_ack_publishes_in_the_same_step(queues: EmbeddedQueues) -> None:
    await queues.publish([publication(1)])
    async with queues.consume("outbox", prefetch=2) as consumer:
        [lease] = await receive(consumer, 1)
        results = [publication(1, None, "results"), publication(1, None, "success")]
        await queues.ack([Settlement(lease, results)])
    assert {depth.queue: depth.total for depth in await queues.depths()} == {
        "results": 1,
        "success": 1,
    }


async def test_one_message_for_two_queues_is_two_for_the_consumers(
    queues: EmbeddedQueues,
) -> None:
    async with (
        queues.consume("one", prefetch=2) as one,
        queues.consume("two", prefetch=2) as two,
    ):
        message = Message({"tag": 1})
        await queues.publish([Publication("one", message), Publication("two", message)])
        [first] = await receive(one, 1)
        [second] = await receive(two, 1)
        first.message.properties["changed"] = True
        assert second.message.properties == {"tag": 1}


async def test_retry_keeps_number_and_body_and_waits(
    queues: EmbeddedQueues, clock: Clock, tmp_path: Path
) -> None:
    await queues.publish([publication(1, bytes(20_000))])
    async with queues.consume("outbox", prefetch=2) as consumer:
        [lease] = await receive(consumer, 1)
        again = Message({"tag": 1, "attempts": 1}, lease.message.body)
        await queues.ack([Settlement(lease, [Publication("outbox", again, clock.now + 600)])])
        [depth] = await queues.depths()
        assert (depth.due, depth.delayed) == (0, 1)
        with pytest.raises(ValueError, match="lease is over"):
            await queues.ack([Settlement(lease)])
        assert await nothing_comes(consumer)
        clock.now += 601
        [retried] = await receive(consumer, 1)  # within a second, without being told
        assert retried.id == lease.id
        assert retried.message.properties == {"tag": 1, "attempts": 1}
        assert retried.message.body == bytes(20_000)
        with pytest.raises(ValueError, match="lease is over"):
            await queues.ack([Settlement(lease)])
        await queues.ack([Settlement(retried)])
    assert await queues.depths() == []


async def test_retry_with_another_body_replaces_it(queues: EmbeddedQueues, clock: Clock) -> None:
    await queues.publish([publication(1)])
    async with queues.consume("outbox", prefetch=2) as consumer:
        [lease] = await receive(consumer, 1)
        lease.message.body = b"another"
        await queues.ack([Settlement(lease, [Publication("outbox", lease.message)])])
        [again] = await receive(consumer, 1)
        assert again.message.body == b"another"
        await queues.ack([Settlement(again)])
    assert await queues.depths() == []


async def test_retry_comes_on_time_by_the_real_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "POLL_SECONDS", 600.0)
    started, published = time.time(), False

    def clock() -> float:
        # What is due before its commit comes in the order of the publication.
        return time.time() if published else started

    async with (
        open_embedded(str(tmp_path), clock=clock) as queues,
        queues.consume("outbox", prefetch=2) as consumer,
    ):
        await queues.publish([publication(1, due=started + 0.2), publication(2, due=started + 0.1)])
        published = True
        assert [tag_of(lease) for lease in await receive(consumer, 2)] == [2, 1]
        assert 0.19 < time.time() - started < 60


async def test_delayed_messages_do_not_hold_up_others(queues: EmbeddedQueues, clock: Clock) -> None:
    await queues.publish([publication(tag, due=clock.now + 100) for tag in range(50)])
    async with queues.consume("outbox", prefetch=2) as consumer:
        assert await nothing_comes(consumer)
        await queues.publish([publication(100)])
        assert tag_of((await receive(consumer, 1))[0]) == 100


async def test_clock_set_back_does_not_delay_what_was_due(
    queues: EmbeddedQueues, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with queues.consume("outbox", prefetch=1) as consumer:
        await queues.publish([publication(tag) for tag in range(3)])
        await queues.publish([publication(3, due=clock.now + 600)])
        leases = await receive(consumer, 1)
        with trio.fail_after(60):
            while not queues._reader._latest:
                await trio.lowlevel.checkpoint()
        clock.now -= 3600
        for _ in range(2):
            await queues.ack([Settlement(lease) for lease in leases])
            leases = await receive(consumer, 1)
        await queues.ack([Settlement(lease) for lease in leases])
        # What was to wait ten minutes does so, and not an hour more.
        [entry] = await queues.browse("outbox")
        assert entry.due == pytest.approx(clock.now + 600, abs=0.01)
    assert "the clock was set back 3600.0 s" in caplog.text


async def test_a_wait_that_began_before_the_clock_was_set_back_stays_as_long(
    queues: EmbeddedQueues, clock: Clock
) -> None:
    """Whatever was chosen on the old clock and is written after it was set back.

    The step is one that the reader ignores: it leaves what is in the file as it is.
    """
    async with queues.consume("outbox", prefetch=4) as consumer:
        await queues.publish([publication(tag) for tag in range(2)])
        retried, moved = await receive(consumer, 2)
        old = clock.now
        clock.now -= 0.9
        again = Publication("outbox", retried.message, old + 5, since=old)
        copy = Publication("outbox", Message({"recipient": "b@c.test"}), old + 7, since=old)
        date = Publication("outbox", Message({"recipient": "d@c.test"}), old + 9)
        await queues.ack([Settlement(retried, [again]), Settlement(moved, [copy, date])])
        dues = [entry.due - clock.now for entry in await queues.browse("outbox")]
    assert sorted(dues) == pytest.approx([5, 7, 9.9], abs=0.01)


async def test_a_mail_to_many_stores_its_body_once(queues: EmbeddedQueues, tmp_path: Path) -> None:
    body = bytes(range(256)) * 400
    async with queues.consume("outbox", prefetch=30) as consumer:
        await queues.publish([publication(tag, body) for tag in range(30)])
        assert (tmp_path / "queue.db-wal").stat().st_size < 4 * len(body)
        leases = await receive(consumer, 30)
        await queues.ack([Settlement(leases[0], [publication(0, body, due=2e9)])])
        await queues.ack([Settlement(lease) for lease in leases[1:]])
    [entry] = await queues.browse("outbox")
    assert entry.message.body == body
    assert await queues.purge("outbox") == 1
    with QueueFile.open(str(tmp_path)) as store:
        for table in ("message", "body", "shared"):
            assert store.connection.execute(f"SELECT count(*) FROM {table}").get == 0


async def test_purge_leaves_what_is_leased(queues: EmbeddedQueues) -> None:
    await queues.publish([publication(tag) for tag in range(10)])
    await queues.publish([publication(10, queue="other")])
    async with queues.consume("outbox", prefetch=2) as consumer:
        leases = await receive(consumer, 2)
        assert await queues.purge("outbox") == 8
        assert await nothing_comes(consumer)
        await queues.ack([Settlement(lease) for lease in leases])
    assert [depth.queue for depth in await queues.depths()] == ["other"]


async def test_purge_of_many_lets_others_in(queues: EmbeddedQueues) -> None:
    for _ in range(6):
        await queues.publish([publication(tag, None) for tag in range(1000)])
    async with trio.open_nursery() as nursery:
        purged = []

        async def purge() -> None:
            purged.append(await queues.purge("outbox"))

        nursery.start_soon(purge)
        await queues.publish([publication(1, queue="other")])
    assert purged == [6000]


async def test_browse_goes_on_after_a_number(queues: EmbeddedQueues) -> None:
    await queues.publish([publication(tag) for tag in range(5)])
    first = await queues.browse("outbox", limit=2)
    rest = await queues.browse("outbox", after=first[-1].id)
    assert [entry.message.properties["tag"] for entry in first + rest] == list(range(5))
    assert await queues.browse("nothing") == []


async def test_what_is_handed_over_cannot_be_cancelled(queues: EmbeddedQueues) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            published = []

            async def publish() -> None:
                await queues.publish([publication(1)])
                published.append(1)

            nursery.start_soon(publish)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert published == [1]
    with trio.CancelScope() as scope:
        scope.cancel()
        await queues.publish([publication(2)])
    assert scope.cancelled_caught
    assert [entry.message.properties["tag"] for entry in await queues.browse("outbox")] == [1]


async def test_cancelled_receive_loses_nothing(queues: EmbeddedQueues) -> None:
    async with queues.consume("outbox", prefetch=5) as consumer:
        for _ in range(5):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(consumer.receive)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
        await queues.publish([publication(tag) for tag in range(5)])
        assert [tag_of(lease) for lease in await receive(consumer, 5)] == list(range(5))


async def test_closed_consumer_gives_nothing_more(queues: EmbeddedQueues) -> None:
    async with trio.open_nursery() as nursery:
        refused = []

        async def wait() -> None:
            try:
                await consumer.receive()
            except trio.ClosedResourceError:
                refused.append(1)

        async with queues.consume("outbox", prefetch=5) as consumer:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
        await wait()
    assert refused == [1, 1]


async def test_settling_twice_is_refused_and_changes_nothing(queues: EmbeddedQueues) -> None:
    await queues.publish([publication(1)])
    async with queues.consume("outbox", prefetch=5) as consumer:
        [lease] = await receive(consumer, 1)
        with pytest.raises(ValueError, match="settled twice"):
            await queues.ack([Settlement(lease), Settlement(lease)])
        with pytest.raises(ValueError, match="not leased by this queue"):
            await queues.ack([Settlement(Lease(lease.id, "outbox", lease.message))])
        await queues.ack([Settlement(lease)])


async def test_file_that_was_replaced_takes_nothing(queues: EmbeddedQueues, tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(QueueError, match="No such file"):
        await queues.publish([publication(1)])
    path.write_text("another")
    with pytest.raises(QueueError, match="replaced while mailerq runs"):
        await queues.publish([publication(1)])
    (tmp_path / "elsewhere").rename(path)
    await queues.publish([publication(2)])
    assert [entry.message.properties["tag"] for entry in await queues.browse("outbox")] == [2]


async def test_full_disk_refuses_and_recovers(queues: EmbeddedQueues) -> None:
    await queues.publish([publication(1)])
    async with queues.consume("outbox", prefetch=5) as consumer:
        [lease] = await receive(consumer, 1)
        connection = queues._file.connection
        connection.pragma("max_page_count", connection.pragma("page_count"))
        big = publication(2, bytes(1_000_000))
        for _ in range(2):
            with pytest.raises(QueueFull, match="no space left"):
                await queues.publish([big])
            with pytest.raises(QueueFull, match="no space left"):
                await queues.ack([Settlement(lease, [big])])
        assert [entry.message.properties["tag"] for entry in await queues.browse("outbox")] == [1]
        queues._file.connection.pragma("max_page_count", 1_000_000)
        await queues.ack([Settlement(lease, [big])])
        assert [tag_of(lease) for lease in await receive(consumer, 1)] == [2]


async def test_another_writer_is_waited_for(queues: EmbeddedQueues, tmp_path: Path) -> None:
    with QueueFile.open(str(tmp_path)) as other:
        other.connection.execute("BEGIN IMMEDIATE")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(queues.publish, [publication(1)])
            await trio.sleep(0.05)
            other.connection.execute("COMMIT")
    assert len(await queues.browse("outbox")) == 1


async def test_another_writer_is_not_waited_for_forever(
    queues: EmbeddedQueues, tmp_path: Path
) -> None:
    def is_set() -> bool:
        with suppress(apsw.ThreadingViolationError):  # at the start the writer sorts
            queues._file.connection.set_busy_timeout(50)
            return True
        return False

    await until(is_set)
    with QueueFile.open(str(tmp_path)) as other:
        other.connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(QueueError, match="another process"):
            await queues.publish([publication(1)])
        other.connection.execute("COMMIT")
    await queues.publish([publication(2)])
    assert [entry.message.properties["tag"] for entry in await queues.browse("outbox")] == [2]


@pytest.mark.parametrize("woken", [True, False])
async def test_messages_of_other_processes_are_noticed(
    queues: EmbeddedQueues, tmp_path: Path, woken: bool
) -> None:
    async with queues.consume("outbox", prefetch=5) as consumer:
        assert await nothing_comes(consumer)
        with QueueFile.open(str(tmp_path)) as other:
            other.publish([publication(1, due=0)])
        if woken:
            queues.wake()
        with trio.fail_after(60):
            lease = await consumer.receive()
        assert tag_of(lease) == 1
        await queues.ack([Settlement(lease)])


async def test_purged_by_another_process_while_it_is_leased(
    queues: EmbeddedQueues, tmp_path: Path, clock: Clock
) -> None:
    await queues.publish([publication(1), publication(2)])
    async with queues.consume("outbox", prefetch=5) as consumer:
        one, two = await receive(consumer, 2)
        with QueueFile.open(str(tmp_path)) as other:
            assert other.purge("outbox") == 2
        await queues.ack([Settlement(one)])
        await queues.ack([Settlement(two, [publication(2)])])  # not lost
        [again] = await receive(consumer, 1)
        assert (tag_of(again), again.message.body) == (2, b"body")


async def test_numbers_are_never_used_twice(tmp_path: Path) -> None:
    seen: list[int] = []
    for _ in range(3):
        async with open_embedded(str(tmp_path)) as queues:
            await queues.publish([publication(1), publication(2)])
            with QueueFile.open(str(tmp_path)) as other:
                seen += other.publish([publication(3)])
            seen += [entry.id for entry in await queues.browse("outbox")][:2]
            await queues.purge("outbox")
    assert len(set(seen)) == len(seen) == 9


async def test_a_second_daemon_is_refused_and_told_who(
    queues: EmbeddedQueues, tmp_path: Path
) -> None:
    import os

    with pytest.raises(QueueError, match=rf"queue\.lock: held .* process {os.getpid()}"):
        async with open_embedded(str(tmp_path)):
            raise AssertionError
    async with open_embedded(str(tmp_path), exclusive=False) as other:
        await other.publish([publication(1)])


async def test_after_the_end_nothing_is_taken(tmp_path: Path) -> None:
    async with open_embedded(str(tmp_path)) as queues:
        pass
    with pytest.raises(QueueError, match="closed"):
        await queues.publish([publication(1)])
    with pytest.raises(QueueError, match="closed"):
        async with queues.consume("outbox", prefetch=1):
            raise AssertionError


@pytest.mark.parametrize("problem", ["file in the way", "not a directory"])
async def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path, problem: str) -> None:
    path = tmp_path / "queue"
    path.write_text("")
    directory = path if problem == "file in the way" else path / "below"
    with pytest.raises(QueueError, match=str(path)):
        async with open_embedded(str(directory)):
            raise AssertionError


async def test_error_of_the_writer_itself_reaches_the_tasks(
    queues: EmbeddedQueues, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(batch: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(queues._file, "write", fail)
        with pytest.raises(QueueError):
            await queues.publish([publication(1)])
    assert "an error in the writer" in caplog.text
    await queues.publish([publication(2)])
    caplog.clear()


async def test_reader_goes_on_after_an_error(
    queues: EmbeddedQueues, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await queues.publish([publication(1)])
    original = queues._reader._file.take
    failures = iter(range(3))

    def fail(wanted: Any) -> Any:
        if next(failures, None) is not None:
            raise QueueError("the disk is tired")
        return original(wanted)

    monkeypatch.setattr(queues._reader._file, "take", fail)
    async with queues.consume("outbox", prefetch=1) as consumer:
        assert tag_of((await receive(consumer, 1))[0]) == 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_statistics_count_commits(queues: EmbeddedQueues) -> None:
    before = queues.statistics()
    async with queues.consume("outbox", prefetch=100) as consumer:
        async with trio.open_nursery() as nursery:
            for tag in range(50):
                nursery.start_soon(queues.publish, [publication(tag)])
        leases = await receive(consumer, 50)
        after = queues.statistics()
        assert after["messages"] - before["messages"] == 50
        assert after["commits"] - before["commits"] < 25
        assert after["commit_seconds"] > 0
        assert after["leased"] == {"outbox": len(leases)}


def test_two_loops_publish_and_consume(tmp_path: Path) -> None:
    """Each message that a thread publishes arrives once, in one of the two loops."""
    count = 300
    ready = threading.Barrier(2, timeout=DEADLINE)
    arrived: list[int] = []
    settled: list[int] = []
    shared: list[EmbeddedQueues] = []
    done = threading.Event()

    async def work(queues: EmbeddedQueues, first: int) -> None:
        async def publish(start: int) -> None:
            for tag in range(start, first + count, 10):
                await queues.publish([publication(tag)])

        async def settle(lease: Lease) -> None:
            await queues.ack([Settlement(lease)])
            settled.append(tag_of(lease))
            if len(settled) >= 2 * count:
                done.set()

        async def consume(settling: trio.Nursery) -> None:
            async with queues.consume("outbox", prefetch=7) as consumer:
                async for lease in consumer:
                    arrived.append(tag_of(lease))
                    settling.start_soon(settle, lease)

        with trio.fail_after(DEADLINE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(consume, nursery)
                async with trio.open_nursery() as publishers:
                    for start in range(10):
                        publishers.start_soon(publish, first + start)
                await trio.to_thread.run_sync(done.wait, DEADLINE)
                nursery.cancel_scope.cancel()

    async def second() -> None:
        await trio.to_thread.run_sync(ready.wait)
        await work(shared[0], count)

    async def first() -> None:
        async with open_embedded(str(tmp_path)) as queues:
            shared.append(queues)
            thread = threading.Thread(target=trio.run, args=(second,))
            thread.start()
            await trio.to_thread.run_sync(ready.wait)
            await work(queues, 0)
            await trio.to_thread.run_sync(thread.join)
            assert await queues.depths() == []

    trio.run(first)
    assert sorted(arrived) == list(range(2 * count))
