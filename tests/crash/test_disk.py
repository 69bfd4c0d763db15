"""A disk that fails or is full, below a daemon under load.

During the fault mail gets 4xx and never 250. After the fault the daemon goes on without a restart.
All mail that ever got a 250 arrives, once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest
import trio

from mailerq.cli import control
from mailerq.errors import QueueError
from mailerq.message import Message
from mailerq.queues import Publication
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.crash.kit import (
    BODY,
    Call,
    Daemon,
    Fate,
    Faults,
    Ledger,
    Load,
    all_arrive,
    arrivals,
    daemon,
    open_faults,
)
from tests.support import Sink, open_sink, until

SESSIONS = 10

LATER = Reply(451, "4.3.2 Not now")

FAILURES = 5
"""Calls that fail before the disk is sound again."""

BIG = b"Subject: x\r\n\r\n" + 300 * (70 * b"x" + b"\r\n")


@asynccontextmanager
async def under_load(running: Daemon, ledger: Ledger, body: bytes = BIG) -> AsyncIterator[Load]:
    """Sessions that send, on new connections when theirs end, and some mail taken already."""
    load = Load(ledger, "id", body)
    async with trio.open_nursery() as nursery:
        for _ in range(SESSIONS):
            nursery.start_soon(partial(load.session, running.port, again=True))
        await until(lambda: len(ledger.accepted) >= 5 * SESSIONS)
        yield load
        load.ending = True


async def account(running: Daemon, sink: Sink, ledger: Ledger) -> None:
    """All is as it was: what was accepted comes, once, and the daemon is the same process."""
    await all_arrive(sink, ledger.accepted)
    await running.until_empty()
    assert running.is_alive
    assert running.depth("damaged") == 0
    assert await running.stop() == 0
    ledger.check(arrivals(sink))
    assert not list(running.queue.glob("*.damaged-*"))
    assert "Traceback" not in running.log


async def recovers(ledger: Ledger) -> None:
    """Mail is taken again."""
    since = time.monotonic()
    await until(lambda: ledger.count(Fate.ACCEPTED, since) >= 5 * SESSIONS)


@pytest.mark.parametrize(
    ("calls", "error", "partial", "code"),
    [
        ([Call.SYNC], errno.EIO, False, 451),
        ([Call.WRITE], errno.EIO, False, 451),
        ([Call.WRITE], errno.ENOSPC, True, 452),
        ([Call.WRITE], errno.EDQUOT, False, 452),
        ([Call.SYNC, Call.OPEN], errno.ENFILE, False, 451),
        ([Call.WRITE, Call.READ], errno.EIO, False, 451),
    ],
    ids=["sync", "write", "full", "quota", "files", "read"],
)
async def test_what_fails_is_refused_until_it_does_not(
    tmp_path: Path, calls: list[Call], error: int, partial: bool, code: int
) -> None:
    ledger = Ledger()
    with open_faults(tmp_path) as faults:
        async with (
            open_sink() as sink,
            daemon(tmp_path, sink.port, env=faults.env) as running,
        ):
            async with under_load(running, ledger):
                faults.set(*calls, error=error, partial=partial)
                began = time.monotonic()
                await until(lambda: faults.failed >= FAILURES)
                await until(lambda: ledger.count(Fate.REFUSED, began) >= SESSIONS)
                ended = time.monotonic()
                faults.clear()
                await recovers(ledger)
            await account(running, sink, ledger)
            assert 0 < running.log.count("was not taken") <= 2  # one a minute
    during = [one for one in ledger.entries.values() if began < one.sent and one.replied < ended]
    refused = [one for one in during if one.fate is Fate.REFUSED]
    assert len(refused) >= SESSIONS
    assert {one.code for one in refused} == {code}
    assert {one.code // 100 for one in ledger.entries.values()} <= {0, 2, 4}
    assert [one for one in during if one.fate is Fate.ACCEPTED] == []


async def flicker(faults: Faults, seconds: float) -> None:
    """One call in some fails, of every kind."""
    faults.set(*Call, one_in=7)
    await trio.sleep(seconds)
    faults.clear()


async def test_a_disk_that_fails_now_and_then(tmp_path: Path) -> None:
    ledger = Ledger()
    with open_faults(tmp_path) as faults:
        async with (
            open_sink() as sink,
            daemon(tmp_path, sink.port, env=faults.env) as running,
        ):
            async with under_load(running, ledger):
                await flicker(faults, 1.0)
                assert faults.failed
                await recovers(ledger)
            await account(running, sink, ledger)


async def test_a_queue_that_cannot_be_read_at_the_start_is_left_alone(tmp_path: Path) -> None:
    with QueueFile.open(str(tmp_path / "queue")) as store:
        store.publish(
            Publication("outbox", Message({"envelope": "a@b.test", "recipient": "c@d.test"}, BIG))
            for _ in range(100)
        )
    before = (tmp_path / "queue" / "queue.db").read_bytes()
    with open_faults(tmp_path) as faults:
        faults.set(Call.READ)
        async with open_sink() as sink:
            async with daemon(tmp_path, sink.port, env=faults.env, listens=False) as running:
                assert await running.process.wait() == os.EX_TEMPFAIL
            assert (tmp_path / "queue" / "queue.db").read_bytes() == before
            faults.clear()
            async with daemon(tmp_path, sink.port, env=faults.env):
                await sink.wait_for(100)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A file system of its own."""
    path.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def is_full(running: Daemon) -> bool:
    return "no space left for the queue" in running.log


async def test_a_queue_that_has_filled_its_disk_empties_itself(tmp_path: Path) -> None:
    """The peer takes no mail now; mail piles up, and only mail that goes out makes room."""
    ledger = Ledger()
    with small_disk(tmp_path / "queue", "16m"):
        async with open_sink() as sink:
            sink.decide = lambda event: LATER if isinstance(event, server.Mail) else None
            async with daemon(tmp_path, sink.port) as running:
                async with under_load(running, ledger):
                    began = time.monotonic()
                    await until(lambda: ledger.count(Fate.REFUSED, began) >= 3 * SESSIONS)
                    assert is_full(running)
                    # As if each message had been tried for days.
                    await until(lambda: attempts(running) > 5 * len(ledger.accepted))
                    sink.decide = lambda event: None
                    await recovers(ledger)
                await account(running, sink, ledger)
    assert len(ledger.accepted) > 100


def attempts(running: Daemon) -> int:
    outgoing: dict[str, int] = control.ask(str(running.queue), "status")["outgoing"]
    return outgoing["attempts"]


async def test_a_disk_that_somebody_else_fills(tmp_path: Path) -> None:
    """Down to the last byte, and then makes room again."""
    ledger = Ledger()
    with small_disk(tmp_path / "queue", "32m"):
        ballast = tmp_path / "queue" / "ballast"
        async with open_sink() as sink, daemon(tmp_path, sink.port) as running:
            async with under_load(running, ledger):
                with contextlib.suppress(OSError), ballast.open("wb") as file:
                    while True:
                        file.write(bytes(4096))
                began = time.monotonic()
                await until(lambda: ledger.count(Fate.REFUSED, began) >= 3 * SESSIONS)
                assert is_full(running)
                ballast.unlink()
                await recovers(ledger)
            await account(running, sink, ledger)


class BreakableDisk:
    """A file system of its own, which the kernel makes read-only when it finds an error in it."""

    def __init__(self, image: Path, path: Path) -> None:
        self._image = image
        self.path = path
        path.mkdir()
        with image.open("wb") as file:
            file.truncate(128 << 20)
        self._run("mkfs.ext4", "-q", str(image))
        self.mount()

    def _run(self, *command: str) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no file system can be made here: {error}")
        if done.returncode:
            pytest.skip(f"{command[0]}: {done.stderr.strip()}")

    def mount(self) -> None:
        options = ["-o", "loop,errors=remount-ro", str(self._image), str(self.path)]
        self._run("mount", "-t", "ext4", *options)

    def unmount(self, *how: str) -> None:
        subprocess.run(["umount", *how, str(self.path)], check=True)

    def breaks(self) -> None:
        device = os.stat(self.path).st_dev
        name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
        trigger = Path(f"/sys/fs/ext4/{name}/trigger_fs_error")
        try:
            trigger.write_text("1")
        except OSError as error:
            pytest.skip(f"no file system can be broken here: {error}")

    def repair(self) -> None:
        self.unmount()
        subprocess.run(["e2fsck", "-fy", str(self._image)], capture_output=True, check=False)
        self.mount()


WRITERS = 16

ROUNDS = 10
"""One in three loses mail where a commit believes the kernel's sync."""


def test_no_commit_on_a_disk_that_breaks_beneath_it_is_believed(tmp_path: Path) -> None:
    """The kernel's sync succeeds for what its file system is giving up at that moment."""
    for attempt in range(ROUNDS):
        disk = BreakableDisk(tmp_path / f"image-{attempt}", tmp_path / f"disk-{attempt}")
        try:
            with ThreadPoolExecutor(WRITERS) as pool:
                places = [str(disk.path / f"queue-{number}") for number in range(WRITERS)]
                ready = Barrier(WRITERS + 1)
                written = [pool.submit(publish_until_it_fails, place, ready) for place in places]
                ready.wait()
                disk.breaks()
            disk.repair()
            for place, future in zip(places, written, strict=True):
                with QueueFile.open(place) as store:
                    assert set(future.result()) - store.known(future.result()) == set()
        finally:
            disk.unmount()


def publish_until_it_fails(directory: str, ready: Barrier) -> list[int]:
    """Publish one message after another: the numbers of those that were taken."""
    properties = {"envelope": "a@b.test", "recipient": "c@d.test"}
    mail = Publication("outbox", Message(properties, 2 * BIG))
    with QueueFile.open(directory) as store:
        taken = store.publish([mail])
        ready.wait()
        with contextlib.suppress(QueueError):
            while True:
                taken += store.publish([mail])
    return taken


@pytest.mark.parametrize("processes", [1, 2])
async def test_a_stop_on_a_disk_that_is_read_only_now_is_a_stop(
    tmp_path: Path, processes: int
) -> None:
    """Nothing can be written any more, not even that the socket and the lock file are gone."""
    ledger = Ledger()
    disk = BreakableDisk(tmp_path / "image", tmp_path / "queue")
    switches = (f"--smtp-processes={processes}", f"--lock={tmp_path / 'queue' / 'pid'}")
    more = (*switches, "--shutdown-timeout=2")
    try:
        async with open_sink() as sink:
            async with daemon(tmp_path, sink.port, *more) as running:
                async with under_load(running, ledger, BODY):
                    disk.breaks()
                    began = time.monotonic()
                    await until(lambda: ledger.count(Fate.REFUSED, began) >= SESSIONS)
                assert await running.stop() == 0
                assert "Traceback" not in running.log
                assert running.log.rstrip().endswith("stopped")
            disk.repair()
            async with daemon(tmp_path, sink.port, *more) as running:
                await all_arrive(sink, ledger.accepted)
                assert await running.stop() == 0
            # What was refused at that moment may have been written all the same.
            assert ledger.accepted <= set(arrivals(sink))
    finally:
        disk.unmount("--lazy")  # a daemon may be there yet when the test fails


async def test_a_stop_on_a_full_disk_is_a_stop(tmp_path: Path) -> None:
    ledger = Ledger()
    with small_disk(tmp_path / "queue", "32m"):
        ballast = tmp_path / "queue" / "ballast"
        async with open_sink() as sink:
            async with daemon(tmp_path, sink.port, "--shutdown-timeout=2") as running:
                async with under_load(running, ledger):
                    with contextlib.suppress(OSError), ballast.open("wb") as file:
                        while True:
                            file.write(bytes(4096))
                    began = time.monotonic()
                    await until(lambda: ledger.count(Fate.REFUSED, began) >= SESSIONS)
                assert await running.stop() == 0
                assert "Traceback" not in running.log
            ballast.unlink()
            async with daemon(tmp_path, sink.port) as running:
                await all_arrive(sink, ledger.accepted)
                assert await running.stop() == 0
            ledger.check(arrivals(sink), may_be_twice=ledger.accepted)
