"""kill -9, a full disk and failing disks: messages reported as published are there."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio

from mailerq.errors import QueueError
from mailerq.message import Message
from mailerq.queues import Publication, Settlement
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.opening import open_embedded, open_exclusive

ROOT = Path(__file__).parent.parent.parent

WORK = """
import os, sys, trio
from mailerq.message import Message
from mailerq.queues import Publication, Settlement
from mailerq.queues.opening import open_embedded

async def publish(queues, first):
    for tag in range(first, 10**9, 20):
        await queues.publish([Publication("outbox", Message({"tag": tag}, b"x" * (tag % 9000)))])
        os.write(1, b"published %d\\n" % tag)

async def deliver(queues):
    async with queues.consume("outbox", prefetch=50) as consumer:
        async for lease in consumer:
            tag = lease.message.properties["tag"]
            if tag % 3 == 0:
                continue
            await queues.ack([Settlement(lease, [Publication("results", Message({"tag": tag}))])])
            os.write(1, b"delivered %d\\n" % tag)

async def main():
    async with open_embedded(sys.argv[1]) as queues, trio.open_nursery() as nursery:
        nursery.start_soon(deliver, queues)
        for first in range(20):
            nursery.start_soon(publish, queues, first)

trio.run(main)
"""


def start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def tags(store: QueueFile, queue: str) -> list[int]:
    return [entry.message.properties["tag"] for entry in store.browse(queue, limit=10**6)]


def test_kill_at_any_moment_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    dice = random.Random(1)
    for round_ in range(4):
        directory = tmp_path / str(round_)
        process = start(WORK, str(directory))
        assert process.stdout is not None and process.stderr is not None
        lines = [process.stdout.readline() for _ in range(dice.randrange(10, 600))]
        process.kill()
        lines += process.stdout.read().splitlines(keepends=True)
        assert process.wait() == -signal.SIGKILL
        assert process.stderr.read() == b""
        process.stdout.close()
        process.stderr.close()
        published, delivered = set(), set()
        for line in lines:
            if line.endswith(b"\n"):
                word, tag = line.split()
                (published if word == b"published" else delivered).add(int(tag))
        with open_exclusive(str(directory)) as store:
            waiting, results = tags(store, "outbox"), tags(store, "results")
        assert not list(directory.glob("*.damaged-*"))
        assert published <= {*waiting, *results}
        assert delivered <= set(results)
        assert len({*waiting, *results}) == len(waiting) + len(results)


FULL = """
import resource, signal, sys, trio
from mailerq.errors import QueueError
from mailerq.message import Message
from mailerq.queues import Publication
from mailerq.queues.opening import open_embedded

async def main():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    async with open_embedded(sys.argv[1]) as queues:
        published, refused = [], 0
        for tag in range(60):
            if tag == 40:
                resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            if tag == 20:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, -1))
            try:
                await queues.publish([Publication("outbox", Message({"tag": tag}, bytes(100_000)))])
                published.append(tag)
            except QueueError:
                refused += 1
        assert refused >= 10, refused
        assert published[-20:] == list(range(40, 60)), published
        entries = await queues.browse("outbox")
        assert [entry.message.properties["tag"] for entry in entries] == published
        print(*published)

trio.run(main)
"""


def test_no_room_for_the_log_refuses_and_recovers_without_a_restart(tmp_path: Path) -> None:
    process = start(FULL, str(tmp_path))
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
    with open_exclusive(str(tmp_path)) as store:
        assert tags(store, "outbox") == [int(tag) for tag in output.split()]
    assert not list(tmp_path.glob("*.damaged-*"))


SOUND_DISK = apsw.vfs_names()[0]


class Faults:
    """The operations that the disk refuses at the moment."""

    sync = write = read = False


class FaultyFile(apsw.VFSFile):
    def xSync(self, flags: int) -> None:
        if Faults.sync:
            raise apsw.IOError("fsync failed")
        super().xSync(flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        if Faults.write:
            raise apsw.IOError("write failed")
        super().xWrite(data, offset)

    def xRead(self, amount: int, offset: int) -> bytes:
        if Faults.read:
            raise apsw.IOError("read failed")
        return super().xRead(amount, offset)


class FaultyDisk(apsw.VFS):
    def __init__(self) -> None:
        super().__init__("faulty", SOUND_DISK)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return FaultyFile(SOUND_DISK, name, flags)


@pytest.fixture
def faulty_disk() -> Iterator[type[Faults]]:
    disk = FaultyDisk()
    apsw.set_default_vfs("faulty")
    yield Faults
    Faults.sync = Faults.write = Faults.read = False
    apsw.set_default_vfs(SOUND_DISK)
    disk.unregister()


@pytest.mark.parametrize("fault", ["sync", "write"])
async def test_failing_disk_refuses_and_recovers_without_a_restart(
    tmp_path: Path, faulty_disk: type[Faults], fault: str
) -> None:
    def publication(tag: int) -> Publication:
        return Publication("outbox", Message({"tag": tag}, bytes(10_000)))

    with trio.fail_after(60):
        async with (
            open_embedded(str(tmp_path)) as queues,
            queues.consume("outbox", prefetch=100) as consumer,
        ):
            await queues.publish([publication(1), publication(2)])
            first, _ = await consumer.receive(), await consumer.receive()
            setattr(faulty_disk, fault, True)
            for _ in range(3):
                with pytest.raises(QueueError):
                    await queues.publish([publication(3), publication(4)])
                with pytest.raises(QueueError):
                    await queues.ack([Settlement(first, [publication(5)])])
            setattr(faulty_disk, fault, False)
            assert [e.message.properties["tag"] for e in await queues.browse("outbox")] == [1, 2]
            await queues.publish([publication(6)])
            await queues.ack([Settlement(first)])
            assert (await consumer.receive()).message.properties["tag"] == 6
    with open_exclusive(str(tmp_path)) as store:
        assert tags(store, "outbox") == [2, 6]
    assert not list(tmp_path.glob("*.damaged-*"))


async def test_unreadable_disk_delays_and_loses_nothing(
    tmp_path: Path, faulty_disk: type[Faults]
) -> None:
    with QueueFile.open(str(tmp_path)) as store:
        store.publish(
            Publication("outbox", Message({"tag": tag}, bytes(20_000))) for tag in range(20)
        )
    with trio.fail_after(60):
        async with (
            open_embedded(str(tmp_path)) as queues,
            queues.consume("outbox", prefetch=3) as consumer,
        ):
            received = []
            for _ in range(6):
                lease = await consumer.receive()
                received.append(lease.message.properties["tag"])
                await queues.ack([Settlement(lease)])
            faulty_disk.read = True
            with trio.move_on_after(0.3):
                while True:
                    lease = await consumer.receive()
                    received.append(lease.message.properties["tag"])
            faulty_disk.read = False
    with open_exclusive(str(tmp_path)) as store:
        assert tags(store, "outbox") == list(range(6, 20))
    assert received == list(range(len(received)))
