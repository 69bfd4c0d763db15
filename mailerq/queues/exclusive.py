"""Opens a queue directory as a daemon does: no second one, and never on a damaged file."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Final

from mailerq.errors import QueueError
from mailerq.queues.database import translate
from mailerq.queues.salvage import recover
from mailerq.queues.store import FILE_NAME, Store, lock_directory

__all__ = ["open_exclusive"]

LOCK_NAME: Final = "queue.lock"


def open_exclusive(directory: str) -> Store:
    """Open the queue of a directory for the one daemon that may have it.

    A damaged file is set aside and salvaged first. Raises `QueueError`, which names the
    process that has the directory.
    """
    path = os.path.join(directory, FILE_NAME)
    try:
        os.makedirs(directory, mode=0o750, exist_ok=True)
        lock = _lock_daemon(os.path.join(directory, LOCK_NAME))
        try:
            alone = lock_directory(directory, fcntl.LOCK_EX)
            try:
                recover(path)
            finally:
                os.close(alone)
        except BaseException:
            os.close(lock)
            raise
    except (OSError, QueueError) as error:
        raise translate(error, path) from error
    return Store.open(directory, daemon_lock=lock)


def _lock_daemon(path: str) -> int:
    """Take the lock of a running daemon and write our process id into it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
    except OSError as error:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise QueueError(
                f"{path}: held by another mailerq, process {holder}; stop it or use another "
                "queue-directory"
            ) from None
        raise
    return lock
