"""Queues with bounds: the oldest documents are deleted, all others stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from mailerq.config import Config
from mailerq.message import Message
from mailerq.queues import Publication, Settlement
from mailerq.queues.embedded import queue_file as store
from mailerq.queues.embedded import reader
from mailerq.queues.embedded.queue_file import Bounds, QueueFile
from mailerq.queues.opening import open_embedded
from tests.support import until

NOW = 1_700_000_000.0


def report(tag: int, age: float = 0.0, queue: str = "failure") -> Publication:
    return Publication(queue, Message({"tag": tag}), NOW - age)


def tags(queue: QueueFile, name: str = "failure") -> list[int]:
    return [entry.message.properties["tag"] for entry in queue.browse(name, limit=1000)]


@pytest.mark.parametrize(
    ("messages", "seconds", "left"),
    [
        (0, 0, range(10)),
        (3, 0, range(7, 10)),
        (10, 0, range(10)),
        (11, 0, range(10)),
        (0, 45, range(5, 10)),
        (0, 1000, range(10)),
        (7, 45, range(5, 10)),
        (2, 45, range(8, 10)),
        (1, 1, range(9, 10)),
    ],
)
def test_what_is_beyond_the_bounds_goes_oldest_first(
    tmp_path: Path, messages: int, seconds: float, left: range
) -> None:
    with QueueFile.open(str(tmp_path)) as queue:
        queue.publish([report(tag, 90 - tag * 10) for tag in range(10)])
        queue.publish([report(tag, 1e6, queue="other") for tag in range(10)])
        steps = queue.trim_steps(Bounds("failure", messages, seconds), int(NOW * 1000), list)
        assert sum(steps) == 10 - len(left)
        assert tags(queue) == list(left)
        assert tags(queue, "other") == list(range(10))


def test_mail_among_reports_stays(tmp_path: Path) -> None:
    with QueueFile.open(str(tmp_path)) as store:
        mail = Publication("failure", Message({"tag": 0}, b"the only copy"), 1.0)
        store.publish([mail, *[report(tag, 100.0) for tag in range(1, 5)]])
        bounds = Bounds("failure", 2, 50.0, reports_only=True)
        list(store.trim_steps(bounds, int(NOW * 1000), list))
        assert tags(store) == [0]


def test_many_go_in_steps_and_what_is_held_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "WORK_ROWS", 10)
    with QueueFile.open(str(tmp_path)) as queue:
        numbers = queue.publish([report(tag) for tag in range(50)])
        held = [numbers[3], numbers[30]]
        steps = queue.trim_steps(Bounds("failure", 5, 0), int(NOW * 1000), lambda: held)
        assert list(steps) == [9, 10, 10, 9, 5]
        assert tags(queue) == [3, 30, *range(45, 50)]


async def test_a_running_queue_keeps_its_bounds_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reader, "TRIM_SECONDS", 0.0)
    monkeypatch.setattr(reader, "POLL_SECONDS", 0.01)
    bounds = (Bounds("failure", 20, 3600),)
    async with (
        open_embedded(str(tmp_path), clock=lambda: NOW, bounds=bounds) as queues,
        queues.consume("outbox", prefetch=100) as consumer,
    ):
        await queues.publish([report(tag, queue="outbox") for tag in range(100)])
        with trio.fail_after(60):
            leases = [await consumer.receive() for _ in range(100)]
        for lease in leases:
            tag = lease.message.properties["tag"]
            await queues.ack([Settlement(lease, [report(tag)])])
        await until(lambda: queues.statistics()["trimmed"] == 80)
        left = await queues.browse("failure")
        assert [entry.message.properties["tag"] for entry in left] == list(range(80, 100))
        queues.configure(Config(failure_maxmessages=5, failure_maxage=0))
        await until(lambda: queues.statistics()["trimmed"] == 95)
    assert len(caplog.messages) == 1
    assert "oldest documents were removed; it keeps 20 of them and each for 3600" in caplog.text
