"""Reads for several takes at once find what reads for each take alone find."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from mailerq.errors import QueueError
from mailerq.queues import DAMAGED_QUEUE, Settlement
from mailerq.queues.embedded import batcher, reader, taking, together
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.queues import EmbeddedQueues
from mailerq.queues.embedded.taking import Turns, Wanted
from mailerq.queues.opening import open_embedded
from tests.queues.contract import Recorder, mail, tag_of
from tests.support import until

DESTINATIONS = [f"d{number}.test" for number in range(8)]
NOW_MS = 2_000_000_000_000
LARGE = together.MAX_PART_BYTES + 1


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QueueFile]:
    """Mail of one lane, of two and of twenty, for later, held, large, damaged, and none."""
    with QueueFile.open(str(tmp_path_factory.mktemp("queue"))) as file:
        shared = bytes(2000)
        mails = [mail(tag, "d0.test", body=bytes(tag)) for tag in range(40)]
        mails += [mail(tag, "d1.test", due=0 if tag % 2 else 4e9, body=None) for tag in range(20)]
        mails += [mail(tag, "d2.test", envelope=f"s{tag % 2}@x.test") for tag in range(20)]
        mails += [mail(tag, "d3.test", envelope=f"s{tag % 20}@x.test") for tag in range(40)]
        mails += [mail(tag, "d4.test", body=b"x" * (LARGE if tag == 2 else 9)) for tag in range(5)]
        mails += [mail(tag, "d5.test", body=shared) for tag in range(5)]
        mails += [mail(tag, "d6.test", text="x" * LARGE * (tag == 3)) for tag in range(5)]
        numbers = file.publish(mails)
        file.connection.execute("UPDATE message SET body_crc = x'00' WHERE id = ?", (numbers[-1],))
        yield file


takes = st.lists(
    st.tuples(
        st.sampled_from(DESTINATIONS),
        st.integers(1, 30),
        st.tuples(st.integers(-1, 70_000), st.integers(-1, 70_000), st.integers(0, 4)),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda take: take[0],
)


@given(
    takes=takes,
    held=st.sets(st.integers(1, 140), max_size=80),
    body_bytes=st.sampled_from([0, 10, together.MAX_PART_BYTES]),
)
def test_what_is_read_together_is_what_is_read_alone(
    file: QueueFile,
    takes: list[tuple[str, int, tuple[int, int, int]]],
    held: set[int],
    body_bytes: int,
) -> None:
    wanted = [
        Wanted("outbox", key, NOW_MS, limit, tuple(held), Turns(*turns), body_bytes, False)
        for key, limit, turns in takes
    ]
    chunk = wanted[: together.chunk_of(wanted)]
    for each, found in zip(chunk, file.take_together(chunk), strict=True):
        if found is not None:
            assert found == file.take(each)


@pytest.mark.parametrize("value", [b"\0", b"\1", b"\xff", "text", 1.5])
@pytest.mark.parametrize(
    "column", ["due", "body", "body_crc", "crc", "properties", "lane", "destination"]
)
def test_damage_in_any_column_is_read_alone(tmp_path: Path, column: str, value: object) -> None:
    with QueueFile.open(str(tmp_path)) as file:
        file.publish([mail(tag, f"d{tag % 2}.test") for tag in range(4)])
        file.connection.execute(f"UPDATE message SET {column} = ? WHERE id = 1", (value,))
        wanted = [one("d0.test", 9), one("d1.test", 9)]
        alone = [file.take(each) for each in wanted]
        found = file.take_together(wanted)
        assert all(each in (None, same) for each, same in zip(found, alone, strict=True))


def one(key: str, limit: int, unsorted: bool = False) -> Wanted:
    return Wanted("outbox", key, NOW_MS, limit, (), taking.FIRST_TURN, 1 << 16, unsorted)


@pytest.mark.parametrize(
    ("destination", "is_plain"),
    [
        ("d0.test", True),
        ("d1.test", True),
        ("d2.test", False),  # two lanes
        ("d3.test", False),  # many
        ("d4.test", True),  # the large body stays in the file
        ("d5.test", True),
        ("d6.test", False),  # large properties, and a damaged row
        ("d7.test", True),  # no mail
    ],
)
def test_plain_mail_is_read_together(file: QueueFile, destination: str, is_plain: bool) -> None:
    (found,) = file.take_together([one(destination, 99)])
    assert (found is not None) == is_plain


def test_one_destination_with_many_lanes_does_not_send_the_others_away(file: QueueFile) -> None:
    found = file.take_together([one(key, 5) for key in ("d3.test", "d0.test", "d1.test")])
    assert [each is not None for each in found] == [False, True, True]


def test_a_chunk_is_bounded_in_messages() -> None:
    wanted = [one(key, 50) for key in DESTINATIONS]
    assert together.chunk_of(wanted) == 2
    assert together.chunk_of([one("a.test", 500), *wanted]) == 1
    assert together.chunk_of(wanted[:1]) == 1


# Groups of takes


@pytest.fixture
async def queues(tmp_path: Path) -> Any:
    async with open_embedded(str(tmp_path)) as queues:
        yield queues


async def ready(queues: EmbeddedQueues) -> None:
    await until(lambda: queues._queues.queues["outbox"].complete)


def count_snapshots(queues: EmbeddedQueues, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    begun: list[None] = []
    snapshot = queues._reader._file.snapshot

    def counted() -> Any:
        begun.append(None)
        return snapshot()

    monkeypatch.setattr(queues._reader._file, "snapshot", counted)
    return begun


async def test_the_takes_of_a_turn_are_one_transaction(
    queues: EmbeddedQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queues.publish([mail(tag, f"d{tag % 50}.test") for tag in range(150)])
    found: dict[int, list[int]] = {}
    async with queues.subscribe("outbox", Recorder(), prefetch=999, window=0) as subscription:
        await ready(queues)
        begun = count_snapshots(queues, monkeypatch)

        async def take(number: int) -> None:
            taken = await subscription.take(f"d{number}.test", 2)
            found[number] = [tag_of(lease) for lease in taken.leases]
            assert taken.more

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(take, number)
    assert found == {number: [number, number + 50] for number in range(50)}
    assert len(begun) == 1


async def test_takes_of_one_destination_in_one_turn_share_its_mail(queues: EmbeddedQueues) -> None:
    await queues.publish([mail(tag) for tag in range(9)])
    tags: list[int] = []
    async with queues.subscribe("outbox", Recorder(), prefetch=99, window=0) as subscription:
        await ready(queues)

        async def take() -> None:
            taken = await subscription.take("a.test", 2)
            tags.extend(tag_of(lease) for lease in taken.leases)

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(take)
    assert sorted(tags) == list(range(9))


async def test_a_damaged_row_does_not_touch_the_other_takes_of_its_group(
    queues: EmbeddedQueues, tmp_path: Path
) -> None:
    await queues.publish([mail(tag, f"d{tag % 5}.test") for tag in range(20)])
    with QueueFile.open(str(tmp_path)) as file:
        file.connection.execute("UPDATE message SET body_crc = x'00' WHERE id = 3")
    tags: list[int] = []
    async with queues.subscribe("outbox", Recorder(), prefetch=99, window=0) as subscription:
        await ready(queues)

        async def take(key: str) -> None:
            taken = await subscription.take(key, 9)
            tags.extend(tag_of(lease) for lease in taken.leases)

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(take, f"d{number}.test")
        (numbers, damaged) = (sorted(tags), await queues.browse(DAMAGED_QUEUE))
        assert numbers == [tag for tag in range(20) if tag != 2]
        await until(lambda: queues.statistics()["leased"] == {"outbox": 19})
        assert len(damaged or await queues.browse(DAMAGED_QUEUE)) == 1


async def test_mail_that_comes_or_goes_during_a_group_is_neither_lost_nor_taken_twice(
    queues: EmbeddedQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot of a group is older than what happens while its destinations are read."""
    await queues.publish([mail(tag, f"d{tag % 4}.test") for tag in range(8)])
    recorder = Recorder()
    async with queues.subscribe("outbox", recorder, prefetch=99, window=0) as subscription:
        await ready(queues)
        first = (await subscription.take("d1.test", 1)).leases[0]
        reached, goes_on = trio.Event(), threading.Event()
        token = trio.lowlevel.current_trio_token()
        original, calls = queues._reader._file.take_together, count()

        def slow(wanted: Any) -> Any:
            found = original(wanted)  # the snapshot has begun
            if next(calls) == 0:
                token.run_sync_soon(reached.set)
                goes_on.wait(10)
            return found

        monkeypatch.setattr(queues._reader._file, "take_together", slow)
        monkeypatch.setattr(reader, "GROUP_SECONDS", 60.0)
        monkeypatch.setattr(together, "_most_rows", lambda: 2)
        tags: list[int] = []

        async def take(key: str, limit: int) -> None:
            taken = await subscription.take(key, limit)
            tags.extend(tag_of(lease) for lease in taken.leases)

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(take, f"d{number}.test", 2)
            await reached.wait()
            await queues.ack([Settlement(first)])
            await queues.publish([mail(9, "d3.test")])
            goes_on.set()
        assert sorted(tags) == [0, 2, 3, 4, 5, 6, 7]
        assert tag_of(first) == 1
        # The new one is read next time, and the subscriber hears of it.
        await recorder.until(lambda recorder: "d3.test" in recorder.destinations)
        (last,) = (await subscription.take("d3.test", 9)).leases
        assert tag_of(last) == 9
        assert (await subscription.take("d1.test", 9)).leases == []


async def test_takes_that_were_not_handed_over_yet_are_answered_at_the_end(
    queues: EmbeddedQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher, "MAX_WAIT_SECONDS", 60.0)
    answered: list[int] = []
    async with (
        queues.subscribe("outbox", Recorder(), prefetch=9, window=0) as subscription,
        trio.open_nursery() as nursery,
    ):
        await ready(queues)

        async def take(number: int) -> None:
            with pytest.raises(QueueError, match="closed"):
                await subscription.take(f"d{number}.test", 1)
            answered.append(number)

        for number in range(20):
            nursery.start_soon(take, number)
        while sum(len(each._takes) for each in queues._batchers.values()) < 20:
            await trio.lowlevel.checkpoint()
        queues._close()
    assert len(answered) == 20


async def test_what_an_operator_changes_is_not_copied_for_each_take(
    queues: EmbeddedQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "GROUP_BARRED", 3)
    await queues.publish([mail(tag, f"d{tag % 5}.test") for tag in range(20)])
    found: list[int] = []
    async with queues.subscribe("outbox", Recorder(), prefetch=99, window=0) as subscription:
        await ready(queues)
        begun = count_snapshots(queues, monkeypatch)
        queues._queues.queues["outbox"].bar([1, 2, 3, 4])

        async def take(number: int) -> None:
            taken = await subscription.take(f"d{number}.test", 9)
            found.extend(tag_of(lease) for lease in taken.leases)

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(take, number)
        assert len(begun) == 5
        assert sorted(found) == list(range(4, 20))
        queues._queues.queues["outbox"].unbar([1, 2, 3, 4])
