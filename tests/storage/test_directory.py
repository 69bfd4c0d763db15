"""Bodies in files."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq.errors import BodyMissing, StorageError
from mailerq.storage import Storage, directory, open_storage
from tests.storage.contract import *  # noqa: F403
from tests.storage.contract import NOW, fresh
from tests.storage.kit import Clock, Settings, opened
from tests.support import DEADLINE


@pytest.fixture(params=["", "?depth=2", "?compression=gzip"])
def address(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return f"directory://{tmp_path}/bodies{request.param}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "bodies"


@pytest.fixture
def plain(root: Path) -> str:
    return f"directory://{root}"


def files(root: Path) -> list[str]:
    """All files below the directory, but for the mark."""
    return sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and path.name != directory.MARK
    )


async def test_the_file_of_a_key_lies_at_that_path(root: Path, plain: str, clock: Clock) -> None:
    async with opened(plain, clock=clock) as storage:
        key = await storage.put(b"body", NOW)
    assert files(root) == [key]
    assert (root / key).read_bytes() == b"body"
    assert (root / key).stat().st_mode & 0o777 & ~0o640 == 0
    assert key.startswith("20270115/08/")


async def test_a_name_is_there_only_after_its_bytes_are_synced(
    root: Path, plain: str, clock: Clock, no_looks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that a crash relies on: write, sync, rename, sync of the folder, return."""
    done: list[tuple[str, str]] = []

    def note(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **more: Any) -> Any:
            target = args[0]
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
            done.append((name, os.path.relpath(path, root)))
            return real(*args, **more)

        monkeypatch.setattr(directory.os, name, call)

    async with opened(plain, clock=clock, storage_threads=1) as storage:
        await storage.put(b"first", NOW)
        for name in ("fsync", "rename", "mkdir"):
            note(name)
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(storage.put, b"body %d" % number, NOW + 7200)
    steps = [(name, path) for name, path in done if not path.startswith("..")]
    made = steps.index(("mkdir", "20270115/10"))
    assert steps[made + 1] == ("fsync", "20270115")
    renames = [at for at, (name, _) in enumerate(steps) if name == "rename"]
    synced = [path for name, path in steps if name == "fsync"]
    assert len(renames) == 5
    for at in renames:
        assert ("fsync", steps[at][1]) in steps[:at]
    assert steps[-1] == ("fsync", "20270115/10")
    # The first is written alone, the four that came meanwhile share the sync of the folder.
    assert synced.count("20270115/10") == 2


async def test_folders_of_other_processes_are_synced_once_by_each(
    root: Path, plain: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have made the folder and not yet have synced it."""
    async with opened(plain, clock=clock) as storage:
        await storage.put(b"first", NOW)
    synced: list[str] = []
    real = directory._sync

    def sync(folder: str) -> None:
        synced.append(os.path.relpath(folder, root))
        real(folder)

    monkeypatch.setattr(directory, "_sync", sync)
    async with opened(plain, clock=clock) as storage:
        await storage.put(b"second", NOW)
        assert {".", "20270115", "20270115/08"} <= set(synced)
        synced.clear()
        await storage.put(b"third", NOW)
        assert [path for path in synced if path[0] != "."] == ["20270115/08"]


async def test_a_crash_while_writing_leaves_no_name(
    root: Path, plain: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(plain, clock=clock) as storage:
        await storage.put(b"first", NOW)
        before = files(root)

        def full(file: int, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(directory, "_write_all", full)
        with pytest.raises(StorageError, match="No space left on device; free space there"):
            await storage.put(b"second", NOW)
        monkeypatch.undo()
        assert files(root) == before
        [problem] = storage.statistics()["problems"]
        assert problem.startswith(f"directory://{root} cannot store")
        await storage.put(b"second", NOW)
        assert len(files(root)) == 2
        assert "problems" not in storage.statistics()


async def test_a_damaged_file_is_set_aside(
    root: Path, plain: str, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(plain, clock=clock) as storage:
        key = await storage.put(b"body", NOW)
    (root / key).write_bytes(b"bodY")
    async with opened(plain, clock=clock) as storage:
        for words in ("damaged", "has no body"):  # which perhaps comes back from a copy
            with pytest.raises(StorageError, match=f"{words}.*[Mm]ail waits"):
                await storage.get(key)
        assert files(root) == [f".damaged/{key.replace('/', '_')}"]
        assert str(root / ".damaged") in caplog.text
        # A body with that key is stored anew.
        assert await storage.put(b"body", NOW) == key
        assert await fresh(plain, key, clock) == b"body"
    # Another one of this name does not replace the first.
    (root / key).write_bytes(b"bOdy")
    async with opened(plain, clock=clock) as storage:
        with pytest.raises(StorageError, match="damaged"):
            await storage.get(key)
    kept = [(root / name).read_bytes() for name in files(root)]
    assert sorted(kept) == [b"bOdy", b"bodY"]


async def test_what_an_application_has_damaged_is_missing_and_stays(
    root: Path, plain: str, clock: Clock
) -> None:
    async with opened(plain, clock=clock) as storage:
        key = await storage.put(b"body", NOW)
        (root / "mine").write_bytes(b"\x1f\x8bno gzip")
        with pytest.raises(BodyMissing, match="is not gzip"):
            await storage.get("mine")
        assert sorted(files(root)) == sorted([key, "mine"])


async def test_a_file_system_that_is_not_mounted_makes_mail_wait(
    root: Path, plain: str, clock: Clock, no_looks: None
) -> None:
    async with opened(plain, clock=clock) as storage:
        key = await storage.put(b"body", NOW)
        root.rename(root.with_name("elsewhere"))
        root.mkdir()  # the mount point
        storage._cache.clear()
        for each in (key, "of-an-application"):
            with pytest.raises(StorageError, match=r"has no file \.storage"):
                await storage.get(each)
        for hours in (0, 5):  # a folder that is there already, and one that has to be made
            with pytest.raises(StorageError, match="Is its file system mounted"):
                await storage.put(b"other", NOW + 3600 * hours)
        with pytest.raises(StorageError, match="Is its file system mounted"):
            await storage._backend.expire(NOW)
        with pytest.raises(StorageError, match="Is its file system mounted"):
            await storage._backend.set_aside(key)
        assert list(root.iterdir()) == []
        root.rmdir()
        root.with_name("elsewhere").rename(root)
        assert await storage.get(key) == b"body"


async def test_a_directory_is_prepared_once(
    root: Path, plain: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a second thread could leave the mark in an empty mount point."""
    entered, second = 0, threading.Event()
    make = directory.os.makedirs

    def slow(*args: Any, **more: Any) -> None:
        nonlocal entered
        entered += 1
        if entered == 1:
            second.wait(0.5)  # which never comes
        else:
            second.set()
        make(*args, **more)

    monkeypatch.setattr(directory.os, "makedirs", slow)
    async with opened(plain, clock=clock) as storage, trio.open_nursery() as nursery:
        nursery.start_soon(storage._backend.expire, NOW)
        nursery.start_soon(storage.put, b"body", NOW)
    assert entered == 1


async def test_links_pipes_and_folders_are_no_bodies(root: Path, plain: str, clock: Clock) -> None:
    async with opened(plain, clock=clock) as storage:
        await storage.put(b"body", NOW)
        (root / "link").symlink_to("/etc/passwd")
        os.mkfifo(root / "pipe")
        for key in ("link", "pipe", "20270115"):
            with pytest.raises(BodyMissing):
                await storage.get(key)


async def test_what_is_not_ours_stays(root: Path, plain: str, clock: Clock) -> None:
    async with opened(plain, clock=clock) as storage:
        await storage.put(b"body", NOW)
        for name in ("19990101/99/x", "19990101/x/x", "1999010/01/x", "campaign/01/x", "20000101"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"x")
        (root / "19990101/05/x").mkdir(parents=True)
        await storage._backend.expire(NOW)  # the storage's own task may have been faster
    kept = set(files(root))
    assert {"19990101/99/x", "19990101/x/x", "1999010/01/x", "campaign/01/x", "20000101"} <= kept
    assert not (root / "19990101/05").exists()


async def test_the_folder_of_a_day_goes_with_its_last_hour(
    root: Path, plain: str, clock: Clock
) -> None:
    async with opened(plain, clock=clock) as storage:
        for hours in (0, 5):
            await storage.put(b"body", NOW + hours * 3600)
        assert await storage._backend.expire(NOW + 3600) == 1
        assert (root / "20270115").is_dir()
        assert await storage._backend.expire(NOW + 86400) == 1
        assert not (root / "20270115").exists()
        assert os.listdir(root / ".expired") == []


async def test_remains_of_a_crash_are_removed_after_a_day(root: Path, plain: str) -> None:
    async with opened(plain) as storage:
        await storage.put(b"body", NOW)
        old, new = root / ".new/old", root / ".new/new"
        for path in (old, new):
            path.write_bytes(b"")
        os.utime(old, (0, 0))
        (root / ".expired/left/deep").mkdir(parents=True)
        await storage._backend.expire(0.0)
        assert (old.exists(), new.exists()) == (False, True)
        assert not (root / ".expired/left").exists()


async def test_a_storage_that_cannot_be_written_is_told_once(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    async with opened(f"directory://{tmp_path}/file/bodies", clock=clock) as storage:
        for _ in range(3):
            with pytest.raises(StorageError, match="Not a directory"):
                await storage.put(b"body", NOW)
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert 1 <= len(errors) <= 2  # one of them is about expiry


async def test_a_slow_storage_makes_mail_wait(
    root: Path, plain: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = threading.Event()
    settings = Settings(plain)
    async with open_storage(settings, clock=clock) as storage:
        assert storage is not None
        key = await storage.put(b"body", NOW)
        storage._cache.clear()
        settings.change(storage_timeout=0.1)
        monkeypatch.setattr(directory, "_sync", lambda folder: stuck.wait(30))
        monkeypatch.setattr(
            directory.DirectoryBackend, "_get", lambda self, key: stuck.wait(30) and None
        )
        try:
            for call in (lambda: storage.get(key), lambda: storage.put(b"other", NOW)):
                with pytest.raises(StorageError, match=r"has not answered in 0\.1 s"):
                    await call()
        finally:
            stuck.set()
        monkeypatch.undo()
        settings.change(storage_timeout=DEADLINE)
        assert await storage.get(key) == b"body"


async def test_simultaneous_gets_read_the_file_once(
    plain: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(plain, clock=clock) as storage:
        key = await storage.put(b"body", NOW)
        storage._cache.clear()
        found: list[bytes] = []

        async def get(scope: trio.CancelScope) -> None:
            with scope:
                found.append(await storage.get(key))

        scopes = [trio.CancelScope() for _ in range(10)]
        async with trio.open_nursery() as nursery:
            for scope in scopes:
                nursery.start_soon(get, scope)
            await trio.testing.wait_all_tasks_blocked()
            scopes[0].cancel()  # perhaps the one that reads: another one goes on
        assert found in ([b"body"] * 9, [b"body"] * 10)
        assert storage.statistics()["fetched"] <= 2


async def test_a_cancelled_put_does_not_hold_up_the_others(plain: str, clock: Clock) -> None:
    async with opened(plain, clock=clock, storage_threads=1) as storage:
        keys: list[str] = []

        async def put(number: int, scope: trio.CancelScope) -> None:
            with scope:
                keys.append(await storage.put(b"body %d" % number, NOW))

        scopes = [trio.CancelScope() for _ in range(20)]
        async with trio.open_nursery() as nursery:
            for number, scope in enumerate(scopes):
                nursery.start_soon(put, number, scope)
            await trio.testing.wait_all_tasks_blocked()
            for scope in scopes[::2]:
                scope.cancel()
        assert len(keys) >= 10
        assert not storage._waiting
        assert storage._writers == 0
        for key in keys:
            await fresh(plain, key, clock)


async def test_memory_for_bodies_is_bounded(plain: str, clock: Clock) -> None:
    async with opened(plain, clock=clock) as storage:
        for number in range(12):
            await storage.put(b"%d" % number + bytes(3 << 20), NOW)
        assert sum(len(body) for _, body in storage._cache.values()) == storage._cached
        assert storage._cached <= 16 << 20


async def test_put_returns_only_bodies_that_were_kept(storage: Storage) -> None:
    key = await storage.put(b"body", NOW)
    assert storage.statistics()["put"] == 1
    assert await storage.get(key) == b"body"
    assert storage.statistics()["from_memory"] == 1
