"""The queue file in a program without an event loop, and the cost of its statements."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw
import pytest

from mailerq.errors import QueueError
from mailerq.message import Message
from mailerq.queues import Publication
from mailerq.queues.embedded.layout import UNSORTED
from mailerq.queues.embedded.queue_file import LARGE_BYTES, PIECE_BYTES, QueueFile
from mailerq.queues.embedded.records import Batch, Insert, Retry, prepare, proven
from mailerq.queues.embedded.taking import ANY_SIZE, FIRST_TURN, Wanted


def publication(
    tag: int, queue: str = "outbox", due: float | None = 1e9, **more: str
) -> Publication:
    return Publication(queue, Message({"tag": tag, **more}, b"x" * tag), due)


def wanted(destination: str, limit: int, held: Sequence[int] = ()) -> Wanted:
    """The part of a destination that a subscription reads."""
    return Wanted("outbox", destination, 10**13, limit, held, FIRST_TURN, ANY_SIZE, False)


def test_publish_look_take_and_purge(tmp_path: Path) -> None:
    with QueueFile.open(str(tmp_path / "new" / "directory")) as store:
        numbers = store.publish([publication(1), publication(2), publication(3, "other", 2e9)])
        assert [(depth.queue, depth.due, depth.delayed) for depth in store.depths(1.5e9)] == [
            ("other", 0, 1),
            ("outbox", 2, 0),
        ]
        entries = store.browse("outbox", limit=1)
        assert [(entry.id, entry.due, entry.message.body) for entry in entries] == [
            (numbers[0], 1e9, b"x")
        ]
        store.remove(entry.id for entry in entries)
        assert store.purge("outbox") == 1
        assert store.purge("nothing") == 0
        assert [depth.queue for depth in store.depths()] == ["other"]


def test_bodies_of_any_size_come_and_go_together(tmp_path: Path) -> None:
    """One commit writes small, large and shared bodies in different ways."""
    shared = bytes(100_000)
    in_pieces, shared_in_pieces = (
        b"".join(b"%d %d\r\n" % (kind, number) for number in range(PIECE_BYTES // 4))
        for kind in range(2)
    )
    bodies = [None, b"", b"small", bytes(LARGE_BYTES - 1), bytes(LARGE_BYTES), shared, shared]
    bodies += [bytes(PIECE_BYTES), in_pieces, shared_in_pieces, shared_in_pieces]
    publications = [
        Publication("outbox", Message({"tag": tag}, body)) for tag, body in enumerate(bodies)
    ]
    with QueueFile.open(str(tmp_path)) as store:
        numbers = store.publish(publications)
        entries = store.browse("outbox")
        assert [entry.id for entry in entries] == numbers
        assert [entry.message.body for entry in entries] == bodies
        rows = [store.row(number) for number in numbers]
        assert [row and row.data for row in rows] == bodies
        assert all(row and proven(row) for row in rows)
        assert [entry.message.properties["tag"] for entry in entries] == [*range(len(bodies))]
        count = "SELECT (SELECT count(*) FROM body), (SELECT count(*) FROM shared)"
        assert store.connection.execute(count).get == (6, 2)
        store.remove(numbers)
        assert store.browse("outbox") == []
        assert store.connection.execute(count).get == (0, 0)


def test_the_file_is_not_for_everybody(tmp_path: Path) -> None:
    with QueueFile.open(str(tmp_path / "queue")) as store:
        store.publish([publication(1)])
        for path in (tmp_path / "queue").iterdir():
            assert path.stat().st_mode & 0o007 == 0


def test_it_starts_without_an_event_loop() -> None:
    """An injector starts once for each mail."""
    program = "import sys, mailerq.queues.embedded.queue_file; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent.parent,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout.split()
    assert not {b"trio", b"ssl", b"asyncio", b"mailerq.queues.recovery.salvage"} & set(output)


def steps(store: QueueFile, work: Callable[[], Any]) -> int:
    """The number of SQLite machine steps that a call takes."""
    total = 0

    def count(event: dict[str, Any]) -> None:
        nonlocal total
        total += event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]

    store.connection.trace_v2(apsw.SQLITE_TRACE_PROFILE, count)
    work()
    store.connection.trace_v2(0)
    return total


def retry(store: QueueFile, number: int) -> None:
    insert = Insert(Message(), "outbox", 10**12, *UNSORTED, b"{}", None)
    store.write(Batch(retries=[Retry(number, None, None, insert)]))


WORK: dict[str, Callable[[QueueFile], Any]] = {
    "take": lambda store: store.take(wanted("a.test", 10)),
    "take behind what is held": lambda store: store.take(wanted("a.test", 10, range(101, 111))),
    "take from a small one": lambda store: store.take(wanted("b.test", 10)),
    "find the destinations": lambda store: store.places("outbox", UNSORTED, 100),
    "publish": lambda store: store.publish([publication(1)]),
    "remove": lambda store: store.remove([151]),
    "retry": lambda store: retry(store, 152),
    "a step of a purge": lambda store: next(store.purge_steps("other", list)),
    "browse a small queue": lambda store: store.browse("other"),
}


@pytest.mark.parametrize("work", WORK)
def test_a_full_queue_costs_no_more_than_an_empty_one(tmp_path: Path, work: str) -> None:
    costs = []
    for count in (300, 6000):
        with QueueFile.open(str(tmp_path / str(count))) as store:
            store.publish(publication(1, "other") for _ in range(100))
            store.publish(publication(1, recipient="x@a.test") for _ in range(count))
            store.publish(publication(1, recipient="x@b.test") for _ in range(10))
            costs.append(steps(store, lambda store=store: WORK[work](store)))  # type: ignore[misc]
    assert 0 < costs[1] < 1.5 * costs[0]


CHANGES: list[Callable[[QueueFile], object]] = [
    lambda store: store.publish([publication(1)]),
    lambda store: store.publish([publication(LARGE_BYTES)]),
    lambda store: store.remove([1]),
    lambda store: store.purge("outbox"),
    lambda store: sum(store.set_back(0, 10**12)),
    lambda store: sum(store.hasten("outbox", 0)),
]
CHANGE_IDS = ["publish", "large", "remove", "purge", "set_back", "hasten"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[QueueFile]:
    with QueueFile.open(str(tmp_path)) as store:
        store.publish([publication(1)])
        yield store


def touches_fail(monkeypatch: pytest.MonkeyPatch, error: int) -> list[str]:
    touched: list[str] = []

    def fail(path: str) -> None:
        touched.append(path)
        raise OSError(error, os.strerror(error), path)

    monkeypatch.setattr(os, "utime", fail)
    return touched


@pytest.mark.parametrize("change", CHANGES, ids=CHANGE_IDS)
def test_a_commit_is_not_believed_on_a_disk_that_gave_up(
    store: QueueFile, monkeypatch: pytest.MonkeyPatch, change: Callable[[QueueFile], object]
) -> None:
    with monkeypatch.context() as patch:
        touches_fail(patch, errno.EROFS)
        with pytest.raises(QueueError, match="Read-only file system"):
            change(store)
    store.publish([publication(2)])  # it was repaired


@pytest.mark.parametrize("change", CHANGES, ids=CHANGE_IDS)
def test_a_commit_is_believed_on_a_disk_that_is_full(
    store: QueueFile, monkeypatch: pytest.MonkeyPatch, change: Callable[[QueueFile], object]
) -> None:
    touched = touches_fail(monkeypatch, errno.ENOSPC)
    change(store)
    assert set(touched) == {os.path.dirname(store.path)}


def test_mail_that_is_committed_after_the_clock_was_set_back_is_due() -> None:
    insert = prepare(Publication("outbox", Message({"tag": 1})), 5000.0, "outbox")
    insert.keep_wait(5_000_001)
    assert insert.due == 5_000_000
    insert.keep_wait(1_400_000)
    assert insert.due == 1_400_000
