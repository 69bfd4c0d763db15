"""Opens a queue directory, for the one daemon that may have it or beside it.

SQLite takes a write-ahead log up to its first broken frame, and throws the rest away. What
stands behind a broken frame was committed, and a daemon that starts salvages it. So nobody
may open the file after a crash without having looked at its log.
"""

from __future__ import annotations

import fcntl
import os

from mailerq.errors import QueueDamaged, QueueError
from mailerq.privileges import as_owner, give_to
from mailerq.queues.embedded.queue_file import FILE_NAME, Store, lock_directory
from mailerq.queues.embedded.sqlite_file import translate
from mailerq.queues.ownership import DirectoryLock
from mailerq.queues.recovery.salvage import broken_log, recover

__all__ = ["make_directory", "open_exclusive", "open_shared"]


def open_exclusive(directory: str, lock: DirectoryLock | None = None) -> Store:
    """Open the queue of a directory for the one process that may have it.

    A damaged file is set aside and salvaged first. Raises `QueueHeld`, which names the process
    that has the directory, and `QueueError`. A `lock` that was taken before is released with the
    queue, or by the error.
    """
    path = os.path.join(directory, FILE_NAME)
    try:
        if lock is None:
            make_directory(directory)
            lock = DirectoryLock.take(directory)
        try:
            alone = lock_directory(directory, fcntl.LOCK_EX)
            try:
                recover(path)
            finally:
                os.close(alone)
        except BaseException:
            lock.release()
            raise
    except (OSError, QueueError) as error:
        raise translate(error, path) from error
    return Store.open(directory, daemon_lock=lock)


def open_shared(directory: str, user: str = "") -> Store:
    """Open the queue of a directory beside the others that have it open.

    What is missing is made for the `user` of the daemon, also by root. Raises `QueueError`, and
    `QueueDamaged` for what only a daemon's start can salvage; the file then is as it was.
    """
    path = os.path.join(directory, FILE_NAME)
    try:
        make_directory(directory, user)
        with as_owner(directory, user):
            alone = _have_alone(directory)
            if alone is not None:
                try:
                    if (reason := broken_log(path)) is not None:
                        raise QueueDamaged(f"{path}: {reason}; start mailerq, which salvages it")
                finally:
                    os.close(alone)
            # SQLite gives the files that it makes later to the owner of this one.
            return Store.open(directory)
    except (OSError, QueueError) as error:
        raise translate(error, path) from error


def make_directory(directory: str, user: str = "") -> None:
    """Make the directory if it is missing, so that it is there after a power cut as well.

    Root makes it for the account that the daemon will change to, `user`. Raises `QueueError`.
    """
    if os.path.isdir(directory):
        return
    try:
        os.makedirs(directory, mode=0o750, exist_ok=True)
        give_to(user, directory)
        above = os.open(os.path.dirname(os.path.abspath(directory)), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(above)
        finally:
            os.close(above)
    except OSError as error:
        raise QueueError(f"queue-directory {directory} cannot be made: {error.strerror}") from error


def _have_alone(directory: str) -> int | None:
    """A lock that keeps all others out, or None: whoever has it open has looked."""
    lock = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    return lock
