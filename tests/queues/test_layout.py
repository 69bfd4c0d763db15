"""Files of older layouts: upgraded in place with all contents, also after kill -9."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio

from mailerq.errors import QueueFull
from mailerq.message import Message
from mailerq.queues import Lease, Publication, Queues, Settlement, Subscription
from mailerq.queues.embedded import queue_file, reader
from mailerq.queues.embedded.layout import LAYOUT, PAGE_SIZE, UNSORTED
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.shares import share_directory
from mailerq.queues.opening import open_embedded, open_exclusive, open_shared
from mailerq.rules.destinations import place_of
from tests.queues.kit import Clock, Old, write_old_file
from tests.support import mailerq

NOW = 1_700_000_000.0
COUNT = 100_000
DOMAINS = 500


def old_messages(count: int) -> Iterator[Old]:
    """Mail to many domains: some delayed, some with shared bodies or none, some in other queues."""
    shared = b"shared " * 1000
    for tag in range(count):
        queue = "results" if tag % 10 == 9 else "outbox"
        properties: dict[str, Any] = {
            "tag": tag,
            "recipient": f"r{tag}@d{tag % DOMAINS}.test",
            "envelope": f"s{tag % 3}@s.test",
        }
        if tag % 4 == 1:
            properties["results"] = [{"attempt": 1}]
        due = NOW + 3600 if tag % 7 == 3 else NOW - tag % 1000
        if tag % 50 < 2:
            yield Old(queue, due, properties, shared, tag - tag % 50 + 1)
        else:
            yield Old(queue, due, properties, None if tag % 11 == 5 else b"body %d" % tag)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("old")
    write_old_file(directory, old_messages(COUNT))
    return directory


@pytest.fixture
def directory(tmp_path: Path, old: Path) -> Path:
    return Path(shutil.copytree(old, tmp_path / "queue"))


def content(file: QueueFile) -> dict[int, tuple[object, ...]]:
    """The contents of a file by tag."""
    found = {}
    for queue in ("outbox", "results"):
        for entry in file.browse(queue, limit=10**6):
            properties = entry.message.properties
            found[properties["tag"]] = (
                entry.id, queue, entry.due, properties["recipient"], entry.message.body
            )  # fmt: skip
    return found


def expected(count: int) -> dict[int, tuple[object, ...]]:
    return {
        tag: (tag + 1, old.queue, int(old.due * 1000) / 1000, old.properties["recipient"], old.body)
        for tag, old in enumerate(old_messages(count))
    }


class Told:
    """A receiver that records its calls."""

    def __init__(self) -> None:
        self.due: dict[str, float | None] = {}

    def arrived(self, leases: Sequence[Lease]) -> None:
        raise AssertionError("nothing is published")

    def waiting(self, destination: str, due: float | None) -> None:
        self.due[destination] = due


@pytest.mark.parametrize("layout", [1, 2])
@pytest.mark.parametrize("exclusive", [True, False])
def test_an_old_file_is_brought_up_to_date(tmp_path: Path, layout: int, exclusive: bool) -> None:
    write_old_file(tmp_path, old_messages(500), layout=layout)
    opener = open_exclusive if exclusive else open_shared
    with opener(str(tmp_path)) as file:
        assert content(file) == expected(500)
        (number,) = file.publish([Publication("outbox", Message({"tag": 500}, b"new"))])
        assert number == 501
        file.remove([number, 1, 2, 3])
    with open_shared(str(tmp_path)) as file:
        assert content(file) == {tag: row for tag, row in expected(500).items() if tag > 2}
        assert file.connection.execute("SELECT count(*) FROM body WHERE id < 4").get == 0
        assert file.connection.pragma("integrity_check") == "ok"


async def test_mail_of_an_old_file_is_sorted_while_it_is_taken(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = Told()
    began = time.monotonic()
    with trio.fail_after(60):
        async with (
            open_embedded(str(directory), clock=lambda: NOW) as queues,
            queues.subscribe("outbox", told, prefetch=100, window=10) as subscription,
        ):
            while not told.due:  # noqa: ASYNC110
                await trio.sleep(0.001)
            first = time.monotonic() - began
            # What is due longest is sorted first: mail flows before all is sorted.
            taken = await subscription.take(next(iter(told.due)), 1)
            await queues.ack([Settlement(lease) for lease in taken.leases])
            while "were sorted by destination" not in caplog.text:  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert set(told.due) == {
                place_of(old.properties).destination
                for old in old_messages(COUNT)
                if old.queue == "outbox"
            }
            depths = await queues.destinations("outbox")
    assert first < 10
    gone = taken.leases[0].message.properties["tag"]
    with open_shared(str(directory)) as file:
        rows: list[Any] = file.connection.execute(
            "SELECT id, destination, lane FROM message WHERE queue = 'outbox'"
        ).fetchall()
        assert content(file) == {tag: row for tag, row in expected(COUNT).items() if tag != gone}
    places = {tag + 1: place_of(old.properties) for tag, old in enumerate(old_messages(COUNT))}
    assert all((destination, lane) == places[number] for number, destination, lane in rows)
    counts = Counter(destination for _, destination, _ in rows)
    assert {depth.destination: depth.due + depth.delayed for depth in depths} == counts


async def test_every_message_of_an_old_file_is_taken_and_settled(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, told = Clock(), Told()
    messages = [*old_messages(COUNT)]
    assert clock.now == NOW

    def due_in_outbox() -> set[int]:
        return {
            tag
            for tag, old in enumerate(messages)
            if old.queue == "outbox" and old.due <= clock.now
        }

    with trio.fail_after(60):
        async with open_embedded(str(directory), clock=clock) as queues:
            async with queues.subscribe("outbox", told, prefetch=COUNT, window=1) as subscription:
                while "were sorted by destination" not in caplog.text:  # noqa: ASYNC110
                    await trio.sleep(0.01)
                taken = await settle_all(queues, subscription, [*told.due], messages)
                assert taken == due_in_outbox()
                clock.now += 3600
                delayed = await settle_all(queues, subscription, [*told.due], messages)
                assert not taken & delayed
                assert taken | delayed == due_in_outbox()
            assert len(taken) > 70_000
            assert len(delayed) > 10_000
            async with queues.consume("results", prefetch=1000) as consumer:
                results = set[int]()
                while len(results) < COUNT // 10:
                    leases = [await consumer.receive() for _ in range(1000)]
                    results |= settled_tags(leases, messages)
                    await queues.ack([Settlement(lease) for lease in leases])
            assert taken | delayed | results == set(range(COUNT))
            assert await queues.depths() == []
    with open_shared(str(directory)) as file:
        for table in ("message", "body", "shared"):
            assert file.connection.execute(f"SELECT count(*) FROM {table}").get == 0


async def settle_all(
    queues: Queues, subscription: Subscription, destinations: Sequence[str], messages: Sequence[Old]
) -> set[int]:
    """Take and settle all mail that is due, of some destinations in each batch; return the tags."""
    tags = set[int]()
    for start in range(0, len(destinations), 50):
        leases: list[Lease] = []

        async def take(destination: str, leases: list[Lease] = leases) -> None:
            taken = await subscription.take(destination, COUNT)
            assert not taken.more
            leases += taken.leases

        async with trio.open_nursery() as nursery:
            for destination in destinations[start : start + 50]:
                nursery.start_soon(take, destination)
        found = settled_tags(leases, messages)
        assert not tags & found
        tags |= found
        await queues.ack([Settlement(lease) for lease in leases])
    return tags


def settled_tags(leases: Sequence[Lease], messages: Sequence[Old]) -> set[int]:
    """The tags of leases, whose properties and bodies must be those of the old file."""
    tags = set[int]()
    for lease in leases:
        properties = lease.message.properties
        old = messages[properties["tag"]]
        assert properties == old.properties
        assert lease.message.body == old.body
        tags.add(properties["tag"])
    assert len(tags) == len(leases)
    return tags


async def test_sorting_goes_on_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(queue_file, "SORT_ROWS", 100)
    monkeypatch.setattr(reader, "POLL_SECONDS", 0.01)
    write_old_file(tmp_path, old_messages(1000))
    sort_steps, told = QueueFile.sort_steps, Told()

    def fail_once(self: QueueFile) -> Iterator[list[Any]]:
        yield next(sort_steps(self))
        monkeypatch.setattr(QueueFile, "sort_steps", sort_steps)
        raise QueueFull("no space left")

    monkeypatch.setattr(QueueFile, "sort_steps", fail_once)
    with trio.fail_after(60):
        async with (
            open_embedded(str(tmp_path), clock=lambda: NOW) as queues,
            queues.subscribe("outbox", told, prefetch=100, window=10),
        ):
            while len(told.due) < DOMAINS * 9 // 10:  # noqa: ASYNC110
                await trio.sleep(0.01)
    assert "cannot be sorted by destination, trying again: no space left" in caplog.text


@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.8])
def test_killed_while_it_is_brought_up_to_date(directory: Path, seconds: float) -> None:
    program = (
        "import sys, trio\n"
        "from mailerq.queues.opening import open_embedded\n"
        "async def main():\n"
        "    print('now', flush=True)\n"
        "    async with open_embedded(sys.argv[1]) as queues:\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(directory)],
        cwd=Path(__file__).parent.parent.parent,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with open_exclusive(str(directory)) as file:
        for _ in file.sort_steps():
            pass
        assert content(file) == expected(COUNT)
        left = file.connection.execute(
            "SELECT count(*) FROM message WHERE queue = 'outbox' AND destination = ? AND lane = ?",
            UNSORTED,
        ).get
        assert left == 0
    assert [name for name in os.listdir(directory) if "damaged" in name] == []


def test_the_shares_are_brought_up_to_date_as_well(tmp_path: Path) -> None:
    for share in (0, 1):
        write_old_file(Path(share_directory(str(tmp_path), share)), old_messages(50))
    for share in (0, 1):
        with open_exclusive(share_directory(str(tmp_path), share)) as file:
            assert content(file) == expected(50)


def test_a_file_that_was_brought_up_to_date_has_the_new_number(directory: Path) -> None:
    """Older programs refuse a file by its ``user_version``, as this one does below."""
    open_exclusive(str(directory)).close()
    connection = apsw.Connection(str(directory / "queue.db"))
    assert connection.pragma("user_version") == LAYOUT == 3
    connection.close()


@pytest.mark.parametrize("command", [(), ("queue", "show", "outbox")])
def test_a_file_of_a_newer_layout_is_refused(tmp_path: Path, command: Sequence[str]) -> None:
    path = tmp_path / "queue" / "queue.db"
    write_old_file(path.parent, old_messages(50))
    open_exclusive(str(path.parent)).close()
    connection = apsw.Connection(str(path))
    connection.pragma("user_version", LAYOUT + 1)
    connection.pragma("wal_checkpoint(truncate)")
    connection.close()
    before = path.read_bytes()
    done = mailerq(
        *command,
        "--hostname=mx.test",
        "--smtp-ip=127.0.0.1",
        "--smtp-port=0",
        "--plugin-directory=",
        f"--lock={tmp_path / 'pid'}",
        f"--queue-directory={path.parent}",
    )
    assert done.returncode == os.EX_TEMPFAIL, done.stderr
    assert (
        f"{path}: written by a newer mailerq (layout {LAYOUT + 1}, this one reads up to {LAYOUT}); "
        "install that one, or start with another directory"
    ) in done.stderr.decode()
    assert path.read_bytes() == before
    assert [name for name in os.listdir(path.parent) if "damaged" in name] == []


@pytest.mark.parametrize("page", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("state", ["old", "new", "compacted"])
def test_salvage_knows_files_of_both_layouts(tmp_path: Path, page: int, state: str) -> None:
    write_old_file(tmp_path, old_messages(2000))
    if state != "old":
        with open_exclusive(str(tmp_path)) as file:
            for _ in file.sort_steps():
                pass
            if state == "compacted":
                file.compact()
    with (tmp_path / "queue.db").open("r+b") as opened:
        opened.seek((page - 1) * PAGE_SIZE)
        opened.write(b"\xff" * PAGE_SIZE)
    with open_exclusive(str(tmp_path)) as file:
        for _ in file.sort_steps():
            pass
        assert content(file) == expected(2000)
        assert file.connection.pragma("integrity_check") == "ok"
    assert [name for name in os.listdir(tmp_path) if ".damaged-" in name]
