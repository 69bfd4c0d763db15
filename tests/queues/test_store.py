"""The queue file from a program without an event loop, and what its statements cost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from mailerq.errors import QueueError
from mailerq.message import Message
from mailerq.queues import Publication
from mailerq.queues.embedded.queue_file import LARGE_BYTES, PIECE_BYTES, Store
from mailerq.queues.embedded.records import Batch, Insert, Retry, proven


def publication(tag: int, queue: str = "outbox", due: float | None = 1e9) -> Publication:
    return Publication(queue, Message({"tag": tag}, b"x" * tag), due)


def test_publish_look_take_and_purge(tmp_path: Path) -> None:
    with Store.open(str(tmp_path / "new" / "directory")) as store:
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
    """One commit writes small ones, large ones and shared ones in different ways."""
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
    with Store.open(str(tmp_path)) as store:
        numbers = store.publish(publications)
        entries = store.browse("outbox")
        assert [entry.id for entry in entries] == numbers
        assert [entry.message.body for entry in entries] == bodies
        rows = store.fetch("outbox", numbers)
        assert [row.data for row in rows] == bodies
        assert all(proven(row) for row in rows)
        assert rows[-1].data is rows[-2].data  # in memory once
        known = {rows[-1].body: b"known"}
        assert [row.data for row in store.fetch("outbox", numbers[-2:], known)] == 2 * [b"known"]
        assert [entry.message.properties["tag"] for entry in entries] == [*range(len(bodies))]
        count = "SELECT (SELECT count(*) FROM body), (SELECT count(*) FROM shared)"
        assert store.connection.execute(count).get == (6, 2)
        store.remove(numbers)
        assert store.browse("outbox") == []
        assert store.connection.execute(count).get == (0, 0)


def test_the_file_is_not_for_everybody(tmp_path: Path) -> None:
    with Store.open(str(tmp_path / "queue")) as store:
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


def steps(store: Store, work: Callable[[], Any]) -> int:
    """How many steps of SQLite's machine something takes."""
    total = 0

    def count(event: dict[str, Any]) -> None:
        nonlocal total
        total += event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]

    store.connection.trace_v2(apsw.SQLITE_TRACE_PROFILE, count)
    work()
    store.connection.trace_v2(0)
    return total


def retry(store: Store, number: int) -> None:
    insert = Insert(Message(), "outbox", 10**12, b"{}", None)
    store.write(Batch(retries=[Retry(number, None, None, insert)]))


WORK: dict[str, Callable[[Store], Any]] = {
    "scan from the start": lambda store: store.scan("outbox", (-1, -1), 10**13, 10),
    "scan among equal due": lambda store: store.scan("outbox", (10**12, 150), 10**13, 10),
    "fetch": lambda store: store.fetch("outbox", [151, 152, 199]),
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
        with Store.open(str(tmp_path / str(count))) as store:
            store.publish(publication(1, "other") for _ in range(100))
            store.publish(publication(1) for _ in range(count))
            costs.append(steps(store, lambda store=store: WORK[work](store)))  # type: ignore[misc]
    assert 0 < costs[1] < 1.5 * costs[0]


CHANGES: list[Callable[[Store], object]] = [
    lambda store: store.publish([publication(1)]),
    lambda store: store.publish([publication(LARGE_BYTES)]),
    lambda store: store.remove([1]),
    lambda store: store.purge("outbox"),
    lambda store: sum(store.set_back(0, 10**12)),
    lambda store: sum(store.hasten("outbox", 0)),
]
CHANGE_IDS = ["publish", "large", "remove", "purge", "set_back", "hasten"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(str(tmp_path)) as store:
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
    store: Store, monkeypatch: pytest.MonkeyPatch, change: Callable[[Store], object]
) -> None:
    with monkeypatch.context() as patch:
        touches_fail(patch, errno.EROFS)
        with pytest.raises(QueueError, match="Read-only file system"):
            change(store)
    store.publish([publication(2)])  # it was repaired


@pytest.mark.parametrize("change", CHANGES, ids=CHANGE_IDS)
def test_a_commit_is_believed_on_a_disk_that_is_full(
    store: Store, monkeypatch: pytest.MonkeyPatch, change: Callable[[Store], object]
) -> None:
    touched = touches_fail(monkeypatch, errno.ENOSPC)
    change(store)
    assert set(touched) == {os.path.dirname(store.path)}
