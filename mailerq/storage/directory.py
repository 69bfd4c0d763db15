"""Bodies in files of a directory, which may be shared by several machines.

The file of a key lies at that path below the directory. Names that begin with a dot are not keys:

- ``.storage`` is there from the first start on, so that a file system that is not mounted is told
  from one that has lost a body.
- ``.new/`` has files that are being written. A file is synced before its rename, and the folder
  after it; bodies that are put together share the sync of their folder.
- ``.expired/`` has buckets that are being removed, ``.damaged/`` files that people may want to see.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, TypeVar

import trio

from mailerq.config import Config
from mailerq.errors import StorageError
from mailerq.storage.addresses import Directory
from mailerq.storage.interface import Backend, Body
from mailerq.storage.keys import bucket_end
from mailerq.storage.packing import MAX_BODY

__all__ = ["DirectoryBackend"]

T = TypeVar("T")

MARK: Final = ".storage"
NEW: Final = ".new"
EXPIRED: Final = ".expired"
DAMAGED: Final = ".damaged"

FOLDER_MODE: Final = 0o750
FILE_MODE: Final = 0o640
MAX_FOLDERS: Final = 100_000
"""Folders to remember as synced."""

STALE_SECONDS: Final = 86400.0
"""A file in ``.new`` that is this old was left by a crash."""

_NOTHING: Final = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


class DirectoryBackend(Backend):
    """A directory. The work is done in up to ``storage-threads`` threads.

    A thread that waits for a dead file server is left behind, and counts until it ends.
    """

    def __init__(self, location: Directory, threads: int) -> None:
        self.name = str(location)
        self.compress = location.compress
        self.depth = location.depth
        self._root = location.path
        self._limiter = trio.CapacityLimiter(threads)
        self._sweeper = trio.CapacityLimiter(1)
        self._synced: set[str] = set()
        self._prepared = False
        self._preparing = threading.Lock()

    def configure(self, config: Config) -> None:
        self._limiter.total_tokens = config.storage_threads

    async def _in_thread(
        self, work: Callable[[], T], what: str, limiter: trio.CapacityLimiter | None = None
    ) -> T:
        try:
            return await trio.to_thread.run_sync(
                work, abandon_on_cancel=True, limiter=limiter or self._limiter
            )
        except OSError as error:
            raise StorageError(
                f"{self.name} {what}: {error.strerror or error}{_advice(error)}"
            ) from error

    # Put

    async def put(self, bodies: Sequence[Body]) -> None:
        await self._in_thread(lambda: self._put(bodies), "cannot store bodies")

    def _put(self, bodies: Sequence[Body]) -> None:
        self._prepare()
        try:
            self._write(bodies)
        except FileNotFoundError:
            # Somebody has removed a folder, or the file system.
            self._mend_folders()
            self._synced.clear()
            self._write(bodies)

    def _prepare(self) -> None:
        """Make what every directory has, once: what was there must not be made elsewhere."""
        with self._preparing:
            if self._prepared:
                return
            os.makedirs(self._root, FOLDER_MODE, exist_ok=True)
            self._make_folders()
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            os.close(os.open(os.path.join(self._root, MARK), flags, FILE_MODE))
            _sync(self._root)
            _sync(os.path.dirname(self._root))
            self._prepared = True

    def _mend_folders(self) -> None:
        """Make folders that somebody has removed, if the file system is there."""
        self._check_mounted()
        self._make_folders()

    def _make_folders(self) -> None:
        for name in (NEW, DAMAGED, EXPIRED):
            with suppress(FileExistsError):
                os.mkdir(os.path.join(self._root, name), FOLDER_MODE)

    def _write(self, bodies: Sequence[Body]) -> None:
        folders = dict.fromkeys(os.path.dirname(body.key) for body in bodies)
        for folder in folders:
            self._make(folder)
        files: list[tuple[int, str, str]] = []
        try:
            for body in bodies:
                new = os.path.join(self._root, NEW, secrets.token_hex(16))
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                file = os.open(new, flags, FILE_MODE)
                files.append((file, new, os.path.join(self._root, body.key)))
                _write_all(file, body.data)
            # The first sync commits what the file system has of the others too.
            for file, _, _ in files:
                os.fsync(file)
            for _, new, path in files:
                os.rename(new, path)
            for folder in folders:
                _sync(os.path.join(self._root, folder))
        except BaseException:
            for _, new, _ in files:
                with suppress(OSError):
                    os.unlink(new)
            raise
        finally:
            for file, _, _ in files:
                os.close(file)

    def _make(self, folder: str) -> None:
        """Make a folder of a bucket, safely, also if another process has just begun to."""
        if folder in self._synced:
            return
        self._check_mounted()  # or the bodies of this hour would go below the mount point
        above = self._root
        for name in folder.split("/"):
            path = os.path.join(above, name)
            with suppress(FileExistsError):
                os.mkdir(path, FOLDER_MODE)
            _sync(above)
            above = path
        if len(self._synced) >= MAX_FOLDERS:
            self._synced.clear()
        self._synced.add(folder)

    # Get

    async def get(self, key: str) -> bytes | None:
        return await self._in_thread(lambda: self._get(key), "cannot be read")

    def _get(self, key: str) -> bytes | None:
        # A pipe would block, and a device do anything.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            file = os.open(os.path.join(self._root, key), flags)
        except OSError as error:
            if error.errno not in _NOTHING:
                raise
            self._prepare()
            self._check_mounted()
            return None
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                return None
            if found.st_size > MAX_BODY:
                return None
            with open(file, "rb", closefd=False) as stream:
                return stream.read(MAX_BODY)
        finally:
            os.close(file)

    def _check_mounted(self) -> None:
        try:
            os.stat(os.path.join(self._root, MARK))
        except FileNotFoundError:
            raise StorageError(
                f"{self.name} is not there: it has no file {MARK}. Is its file system mounted?"
                " An empty file of this name makes a new directory a storage; mail waits for it"
            ) from None

    async def set_aside(self, key: str) -> str:
        return await self._in_thread(lambda: self._set_aside(key), "cannot be changed")

    def _set_aside(self, key: str) -> str:
        path = os.path.join(self._root, DAMAGED, key.replace("/", "_")[-200:])
        if os.path.lexists(path):  # of an earlier time
            path += f".{secrets.token_hex(4)}"
        self._mend_folders()
        try:
            os.rename(os.path.join(self._root, key), path)
        except FileNotFoundError:
            return ""  # another process was faster
        return f"is now {path}"

    # Expire

    async def expire(self, now: float) -> int:
        """Remove the buckets whose hour is over."""
        work = lambda: self._expire(now)  # noqa: E731
        return await self._in_thread(work, "cannot remove what has expired", self._sweeper)

    def _expire(self, now: float) -> int:
        self._prepare()
        self._mend_folders()
        expired = os.path.join(self._root, EXPIRED)
        removed = 0
        for day in sorted(os.listdir(self._root)):
            if len(day) != 8 or not day.isdecimal():
                continue
            folder = os.path.join(self._root, day)
            try:
                hours = sorted(os.listdir(folder))
            except (NotADirectoryError, FileNotFoundError):
                continue
            for hour in hours:
                end = bucket_end(f"{day}/{hour}")
                if end is None or end > now:
                    continue
                # So that readers see all of it or nothing, and nobody begins to write there.
                gone = os.path.join(expired, f"{day}-{hour}-{secrets.token_hex(4)}")
                with suppress(FileNotFoundError):
                    os.rename(os.path.join(folder, hour), gone)
                    removed += 1
            last = bucket_end(f"{day}/23")
            if last is not None and last <= now:
                with suppress(OSError):
                    os.rmdir(folder)
        for name in os.listdir(expired):
            shutil.rmtree(os.path.join(expired, name), ignore_errors=True)
        self._remove_stale()
        return removed

    def _remove_stale(self) -> None:
        """Remove what a crash has left."""
        until = time.time() - STALE_SECONDS
        with os.scandir(os.path.join(self._root, NEW)) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime < until:
                        os.unlink(entry.path)


def _advice(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "; free space there, or name another storage-address"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "; let the account of mailerq write there"
        case errno.EIO | errno.ESTALE | errno.ETIMEDOUT | errno.EHOSTDOWN:
            return "; look at the disk or the file server"
    return ""


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _sync(folder: str) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
