"""A subscription to the embedded queue: effects that only a real file can have."""

from __future__ import annotations

import gc
import logging
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.errors import MessageDamaged, QueueDamaged, QueueError
from mailerq.message import Message
from mailerq.queues import DAMAGED_QUEUE, Lease, Publication, Settlement
from mailerq.queues.embedded import open_queues, reader, taking
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.queues import EmbeddedQueues
from mailerq.queues.embedded.taking import Wanted
from mailerq.queues.opening import open_embedded
from mailerq.turns import EndOfTurn
from tests.queues.contract import LARGE, Recorder, again, mail, tag_of
from tests.queues.kit import Clock
from tests.support import until


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def queues(tmp_path: Path, clock: Clock) -> AsyncIterator[EmbeddedQueues]:
    async with open_embedded(str(tmp_path), clock=clock) as queues:
        yield queues


def count_polls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Let the reader look at the clock often; the list grows with each time."""
    polls: list[None] = []
    poll = reader.Reader._poll

    def counted(self: reader.Reader) -> None:
        poll(self)
        polls.append(None)

    monkeypatch.setattr(reader, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(reader.Reader, "_poll", counted)
    return polls


def changed(directory: Path) -> dict[str, int]:
    """The time of the last write to each file."""
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("queue.db*")}


async def ready(queues: EmbeddedQueues) -> None:
    """Wait until the first scan of the outbox is over."""
    await until(lambda: queues._queues.queues["outbox"].complete)


async def test_a_lone_new_message_is_neither_read_nor_told(queues: EmbeddedQueues) -> None:
    recorder = Recorder()
    async with queues.subscribe("outbox", recorder, prefetch=10, window=10):
        await ready(queues)
        before = queues.statistics()["reads"]
        for tag in range(20):
            await queues.publish([mail(tag, f"d{tag}.test")])
            await recorder.until(lambda recorder, tag=tag: tag in recorder.tags)
            await queues.ack([Settlement(recorder.leases[-1])])
        assert (recorder.told, queues.statistics()["reads"]) == ([], before)
        # What is over leaves nothing in memory.
        assert queues._queues.queues["outbox"].destinations == {}


def notice_rest(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Let the reader do nothing unasked; the list has something once it rests after its scan."""
    rests: list[None] = []
    timeout = reader.Reader._timeout

    def noted(self: reader.Reader) -> float | None:
        outbox = self._queues.queues.get("outbox")
        if outbox is not None and outbox.complete:
            rests.append(None)
        return timeout(self)

    monkeypatch.setattr(reader, "POLL_SECONDS", 600.0)
    monkeypatch.setattr(reader.Reader, "_timeout", noted)
    return rests


async def test_a_delivery_begins_when_the_reply_to_its_client_has_left(
    queues: EmbeddedQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A reader that is awake may wake the receiver before the writer does.
    rests = notice_rest(monkeypatch)
    happened: list[str] = []
    end = EndOfTurn.of_this_loop()

    class Delivery(Recorder):
        def arrived(self, leases: Sequence[Lease]) -> None:
            happened.append("delivery")
            super().arrived(leases)

    recorder = Delivery()
    async with queues.subscribe("outbox", recorder, prefetch=10, window=10):
        await until(lambda: rests)
        for tag in range(5):
            await queues.publish([mail(tag)])
            happened.append("accepted")
            # As a stream does with what it writes.
            end.call(lambda _: bool(happened.append("reply")))
            await recorder.until(lambda recorder, tag=tag: tag in recorder.tags)
            await queues.ack([Settlement(recorder.leases[-1])])
    assert happened == 5 * ["accepted", "reply", "delivery"]


@pytest.mark.parametrize("count", [1, 3])
def test_a_defect_of_a_receiver_ends_the_loop(tmp_path: Path, count: int) -> None:
    """After the reply to a lone client, and in the batch of several."""

    class Defective(Quiet):
        def arrived(self, leases: object) -> None:
            raise ZeroDivisionError

    async def main() -> None:
        async with (
            open_embedded(str(tmp_path)) as queues,
            queues.subscribe("outbox", Defective(), prefetch=10, window=10),
            trio.open_nursery() as nursery,
        ):
            await ready(queues)
            for tag in range(count):
                nursery.start_soon(queues.publish, [mail(tag)])
            nursery.start_soon(trio.sleep_forever)

    with pytest.raises(trio.TrioInternalError) as raised:
        trio.run(main)
    group = raised.value.__cause__
    assert isinstance(group, ExceptionGroup)
    assert group.subgroup(ZeroDivisionError) is not None


async def test_what_nobody_takes_costs_nothing(
    queues: EmbeddedQueues, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls = count_polls(monkeypatch)
    recorder = Recorder()
    async with queues.subscribe("outbox", recorder, prefetch=10, window=0):
        await ready(queues)
        await queues.publish([mail(tag, f"d{tag % 50}.test", due=0) for tag in range(1000)])
        await recorder.until(lambda recorder: len(recorder.told) == 50)
        before = (queues.statistics(), changed(tmp_path))
        seen = len(polls)
        await until(lambda: len(polls) >= seen + 20)
        assert (queues.statistics(), changed(tmp_path)) == before
        assert len(recorder.told) == 50


async def test_many_destinations_are_small(queues: EmbeddedQueues) -> None:
    count = 5000
    for start in range(0, count, 1000):
        await queues.publish(
            [
                mail(tag, f"destination-{number}.example.test")
                for number in range(start, start + 1000)
                for tag in range(4)
            ]
        )
    gc.collect()
    tracemalloc.start()
    try:
        async with queues.subscribe("outbox", Quiet(), prefetch=10, window=10) as subscription:
            await ready(queues)
            # One message of each was in memory, and waits again.
            for number in range(count):
                key = f"destination-{number}.example.test"
                (lease,) = (await subscription.take(key, 1)).leases
                queues.release(lease)
            gc.collect()
            used, _ = tracemalloc.get_traced_memory()
            assert len(queues._queues.queues["outbox"].destinations) == count
    finally:
        tracemalloc.stop()
    assert used / count < 300


class Quiet:
    """A receiver that records nothing."""

    def arrived(self, leases: object) -> None:
        pass

    def waiting(self, destination: str, due: float | None) -> None:
        pass


async def test_bytes_bound_what_a_take_brings_and_what_comes_by_itself(
    queues: EmbeddedQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taking, "READ_BYTES", 25_000)
    monkeypatch.setattr(open_queues, "HELD_BYTES", 25_000)
    recorder = Recorder()
    await queues.publish([mail(tag, body=bytes(10_000)) for tag in range(5)])
    async with queues.subscribe("outbox", recorder, prefetch=99, window=99) as subscription:
        await ready(queues)
        sizes = []
        more = True
        while more:
            taken = await subscription.take("a.test", 99)
            sizes.append(len(taken.leases))
            more = taken.more
        assert sizes == [2, 2, 1]
        # While so much is leased, bodies stay in the file until they are asked for.
        (last,) = taken.leases
        assert not last.loaded
        await subscription.load(last)
        assert last.message.body == bytes(10_000)
        recorder.told.clear()
        await queues.publish([mail(9, "b.test")])  # 50 kB are leased
        await recorder.until(lambda recorder: recorder.destinations == {"b.test"})


async def test_a_damaged_row_is_set_aside_and_the_others_come(
    queues: EmbeddedQueues, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await queues.publish([mail(tag, body=LARGE if tag == 3 else b"body") for tag in range(5)])
    with QueueFile.open(str(tmp_path)) as file:
        change = file.connection.execute
        change("UPDATE message SET properties = x'7b7d' WHERE id = 1")
        change("UPDATE body SET data = x'00' WHERE id = 2")
        change("DELETE FROM body WHERE id = 3")
        change("UPDATE body SET data = zeroblob(100000) WHERE id = 4")
    async with queues.subscribe("outbox", Recorder(), prefetch=9, window=9) as subscription:
        taken = await subscription.take("a.test", 9)
        assert [tag_of(lease) for lease in taken.leases] == [3, 4]
        with pytest.raises(MessageDamaged, match="checksum of the body"):
            await subscription.load(taken.leases[0])
        with pytest.raises(ValueError, match="over"):
            await queues.ack([Settlement(taken.leases[0])])
        async with queues.consume(DAMAGED_QUEUE, prefetch=9) as consumer:
            with trio.fail_after(60):
                for _ in range(4):
                    await consumer.receive()
        assert (await subscription.take("a.test", 9)).leases == []
    assert "message 2 goes to queue damaged" in caplog.text


async def test_a_body_that_was_deleted_elsewhere_cannot_be_loaded(
    queues: EmbeddedQueues, tmp_path: Path
) -> None:
    await queues.publish([mail(tag, body=LARGE) for tag in range(2)])
    async with queues.subscribe("outbox", Recorder(), prefetch=9, window=9) as subscription:
        one, two = (await subscription.take("a.test", 9)).leases
        with QueueFile.open(str(tmp_path)) as file:
            assert file.purge("outbox") == 2
        with pytest.raises(MessageDamaged, match="deleted"):
            await subscription.load(one)
        await queues.ack([Settlement(two, [again(two)])])  # there is nothing left to be tried
        assert await queues.browse("outbox") == []


async def test_a_read_that_fails_leases_nothing(
    queues: EmbeddedQueues, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await queues.publish([mail(1)])
    async with queues.subscribe("outbox", Recorder(), prefetch=9, window=9) as subscription:
        await ready(queues)

        def fail(wanted: Wanted) -> Any:
            raise QueueError("the disk is tired")

        with monkeypatch.context() as patch:
            patch.setattr(queues._reader._file, "take_together", lambda wanted: [None])
            patch.setattr(queues._reader._file, "take", fail)
            with pytest.raises(QueueError, match="tired"):
                await subscription.take("a.test", 1)
        taken = await subscription.take("a.test", 1)
        assert [tag_of(lease) for lease in taken.leases] == [1]
    assert caplog.records == []  # the subscriber was told


async def test_damage_of_the_file_reaches_a_take(queues: EmbeddedQueues) -> None:
    async with queues.subscribe("outbox", Recorder(), prefetch=9, window=9) as subscription:
        await ready(queues)
        queues._queues.damage(QueueDamaged("broken"))
        with pytest.raises(QueueDamaged):
            await subscription.take("a.test", 1)


async def test_mail_of_other_processes_is_found_by_its_number(
    queues: EmbeddedQueues, tmp_path: Path
) -> None:
    recorder = Recorder()
    async with queues.subscribe("outbox", recorder, prefetch=99, window=99) as subscription:
        await ready(queues)
        with QueueFile.open(str(tmp_path)) as other:
            for turn in range(30):
                # In between are numbers of our own.
                await queues.publish([mail(turn, "own.test")])
                other.publish([mail(1000 + turn, f"d{turn}.test", due=0)])
                if turn % 7 == 0:
                    queues.wake()
            queues.wake()
            await recorder.until(lambda recorder: len(recorder.told) == 30)
        assert [key for key, _ in recorder.told] == [f"d{turn}.test" for turn in range(30)]
        for turn in range(30):
            taken = await subscription.take(f"d{turn}.test", 9)
            assert [tag_of(lease) for lease in taken.leases] == [1000 + turn]


@pytest.mark.parametrize("by", ["another process", "the clock"])
async def test_mail_that_becomes_due_sooner_is_told(
    queues: EmbeddedQueues, tmp_path: Path, clock: Clock, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    due = clock.now + 600
    await queues.publish([mail(1, "a.test", due=due, results=[{"attempt": 1}])])
    async with queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription:
        await recorder.until(lambda recorder: recorder.told == [("a.test", due)])
        if by == "the clock":
            await until(lambda: queues._reader._latest > 0)
            clock.now -= 3600
            await recorder.until(lambda recorder: len(recorder.told) == 2)
            assert recorder.told[1] == ("a.test", due - 3600)
            assert "set back" in caplog.text
            clock.now += 601
        else:
            with QueueFile.open(str(tmp_path)) as other:
                assert sum(other.hasten("outbox", int(clock.now * 1000))) == 1
            queues.wake(everything=True)
            await recorder.until(lambda recorder: len(recorder.told) == 2)
            assert recorder.told[1] == ("a.test", None)
        taken = await subscription.take("a.test", 9)
        assert [tag_of(lease) for lease in taken.leases] == [1]


async def test_a_consumer_beside_a_subscription_gets_other_mail(queues: EmbeddedQueues) -> None:
    recorder = Recorder()
    await queues.publish([mail(tag, f"d{tag % 3}.test") for tag in range(30)])
    seen: list[int] = []
    async with (
        queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription,
        queues.consume("outbox", prefetch=3) as consumer,
    ):
        with trio.fail_after(60):
            while len(seen) < 30:
                leases: list[Lease] = []
                with trio.move_on_after(0.02):
                    leases.append(await consumer.receive())
                for number in range(3):
                    leases += (await subscription.take(f"d{number}.test", 2)).leases
                seen += map(tag_of, leases)
                await queues.ack([Settlement(lease) for lease in leases])
    assert sorted(seen) == list(range(30))


async def test_a_purge_leaves_what_is_leased(queues: EmbeddedQueues) -> None:
    await queues.publish([mail(tag, f"d{tag % 3}.test") for tag in range(30)])
    async with queues.subscribe("outbox", Recorder(), prefetch=9, window=9) as subscription:
        taken = await subscription.take("d1.test", 4)
        assert await queues.purge("outbox") == 26
        assert (await subscription.take("d1.test", 9)).leases == []
        await queues.ack([Settlement(lease) for lease in taken.leases])
    assert await queues.depths() == []


async def test_mail_of_the_outbox_without_a_place_gets_one(
    queues: EmbeddedQueues, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process has configured another queue as the outbox."""
    recorder = Recorder()
    async with queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription:
        await ready(queues)
        with QueueFile.open(str(tmp_path), outbox="another") as other:
            other.publish([mail(1, due=0)])
        queues.wake()
        await recorder.until(lambda recorder: recorder.destinations == {"a.test"})
        taken = await subscription.take("a.test", 9)
        assert [tag_of(lease) for lease in taken.leases] == [1]
        await until(lambda: "1 messages of the outbox were sorted" in caplog.text)


async def test_a_queue_that_was_the_outbox_is_consumed_whole(tmp_path: Path) -> None:
    async with open_embedded(str(tmp_path)) as queues:
        await queues.publish([mail(tag, f"d{tag}.test") for tag in range(5)])
    async with open_embedded(str(tmp_path), outbox="new") as queues:
        await queues.publish([mail(5)])
        async with queues.consume("outbox", prefetch=9) as consumer:
            with trio.fail_after(60):
                leases = [await consumer.receive() for _ in range(6)]
            assert sorted(map(tag_of, leases)) == list(range(6))
            await queues.ack([Settlement(lease) for lease in leases])
    async with open_embedded(str(tmp_path), outbox="results") as queues:
        assert await queues.depths() == []


async def test_only_the_daemon_takes(tmp_path: Path) -> None:
    async with open_embedded(str(tmp_path), exclusive=False) as queues:
        with pytest.raises(QueueError, match="only its daemon"):
            async with queues.subscribe("outbox", Recorder(), prefetch=9, window=9):
                raise AssertionError


async def test_a_subscription_belongs_to_its_loop(queues: EmbeddedQueues) -> None:
    async with queues.subscribe("outbox", Recorder(), prefetch=9, window=9) as subscription:
        problems: list[BaseException] = []

        def elsewhere() -> None:
            try:
                trio.run(subscription.take, "a.test", 1)
            except RuntimeError as error:
                problems.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await trio.to_thread.run_sync(thread.join)
    assert len(problems) == 1


def test_a_take_costs_the_same_however_much_waits(tmp_path: Path) -> None:
    """Steps of SQLite's machine for a take from many lanes, behind mail for later."""
    costs = []
    for count in (300, 3000):
        with QueueFile.open(str(tmp_path / str(count))) as file:
            file.publish([
                mail(tag, envelope=f"s{tag % 20}@x.test", due=0 if tag % 2 else 4e9)
                for tag in range(count)
            ])  # fmt: skip
            costs.append(steps(file, lambda file=file: file.take(wanted(20))))  # type: ignore[misc]
    assert 0 < costs[1] < 1.5 * costs[0]


def wanted(limit: int) -> Wanted:
    return Wanted("outbox", "a.test", 10**13 // 5, limit, (), taking.FIRST_TURN, 1 << 16, False)


def steps(file: QueueFile, work: Callable[[], Any]) -> int:
    import apsw

    total = 0

    def count(event: dict[str, Any]) -> None:
        nonlocal total
        total += event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]

    file.connection.trace_v2(apsw.SQLITE_TRACE_PROFILE, count)
    work()
    file.connection.trace_v2(0)
    return total


async def test_mail_without_a_recipient_has_a_destination_too(
    queues: EmbeddedQueues, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        await queues.publish([Publication("outbox", Message({"recipient": 7}))])
        recorder = Recorder()
        async with queues.subscribe("outbox", recorder, prefetch=9, window=9) as subscription:
            await recorder.until(lambda recorder: recorder.destinations == {""})
            assert len((await subscription.take("", 9)).leases) == 1
    assert caplog.records == []
