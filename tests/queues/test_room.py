"""A disk that fills up: new mail is refused in time, and queued mail can still leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from mailerq.errors import QueueFull
from mailerq.message import Message
from mailerq.queues import Publication, Settlement, opening
from mailerq.queues.embedded import queue_file as store
from mailerq.queues.embedded.disk import Room, room
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.opening import open_embedded, open_exclusive


def publication(tag: int, due: float | None = None) -> Publication:
    return Publication("outbox", Message({"tag": tag}, bytes(20_000)), due)


def pretend(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(store, "room", lambda path: Room(free, 1_000_000))


def test_the_reserve_is_a_part_of_the_disk(tmp_path: Path) -> None:
    found = room(str(tmp_path))
    assert 0 < found.reserve <= 64 << 20
    assert room(str(tmp_path / "no such file")).holds(1 << 40)


def test_mail_from_the_command_line_leaves_the_reserve_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with QueueFile.open(str(tmp_path)) as queue:
        pretend(monkeypatch, 1_050_000)
        with pytest.raises(QueueFull, match="no space left for the queue: 1050000 bytes are free"):
            queue.publish([publication(1)])
        pretend(monkeypatch, 1_100_000)
        queue.publish([publication(2)])
        assert [entry.message.properties["tag"] for entry in queue.browse("outbox")] == [2]


async def test_what_is_in_the_queue_leaves_it_and_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trio.fail_after(60):
        async with (
            open_embedded(str(tmp_path)) as queues,
            queues.consume("outbox", prefetch=20) as consumer,
        ):
            for tag in range(20):
                await queues.publish([publication(tag)])
            leases = [await consumer.receive() for _ in range(20)]
            pretend(monkeypatch, 900_000)
            with pytest.raises(QueueFull, match="no space left"):
                await queues.publish([publication(21)])
            results = [Publication("results", Message({"tag": 0}))]
            await queues.ack([Settlement(leases[0], results)])
            assert len(await queues.browse("results")) == 1
            await queues.ack([Settlement(lease) for lease in leases[1:]])
            await queues.publish([publication(22)])  # into the pages that are free in the file
            assert (await consumer.receive()).message.properties["tag"] == 22


@pytest.mark.parametrize(
    ("free", "kept"), [(600_000, {"tag": 1, "results": [1]}), (400_000, {"tag": 1})]
)
async def test_without_room_a_retry_is_a_new_due_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, kept: dict[str, object]
) -> None:
    with trio.fail_after(60):
        async with (
            open_embedded(str(tmp_path)) as queues,
            queues.consume("outbox", prefetch=2) as consumer,
        ):
            await queues.publish([publication(1)])
            lease = await consumer.receive()
            pretend(monkeypatch, free)
            again = Message({"tag": 1, "results": [1]}, lease.message.body)
            await queues.ack([Settlement(lease, [Publication("outbox", again, 4e9)])])
            (entry,) = await queues.browse("outbox")
            assert (entry.due, entry.message.properties) == (4e9, kept)
            assert entry.message.body == bytes(20_000)


def test_a_start_compacts_a_file_that_is_mostly_air(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opening, "COMPACT_FREE", 1_000_000)
    path = tmp_path / "queue.db"
    with open_exclusive(str(tmp_path)) as file:
        numbers = file.publish([publication(tag) for tag in range(200)])
        file.remove(numbers[:80])
    before = path.stat().st_size
    with open_exclusive(str(tmp_path)) as file:
        assert path.stat().st_size == before  # more of it is in use
        file.remove(numbers[80:190])
    pretend(monkeypatch, 1000)
    with open_exclusive(str(tmp_path)):
        assert path.stat().st_size == before
    assert "too few to compact it" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(opening, "COMPACT_FREE", 1_000_000)
    with open_exclusive(str(tmp_path)) as file:
        assert path.stat().st_size < before // 5
        assert file.browse("outbox")[0].id == numbers[190]
        assert len(file.browse("outbox")) == 10
