"""Opens the queues of a configuration: the one place that knows the backends.

An engine asks for `open_queues`, the command line for `open_files` or, to publish, `open_shared`;
neither of the last two needs an event loop.

SQLite takes a write-ahead log up to its first broken frame, and throws the rest away. What
stands behind a broken frame was committed, and a daemon that starts salvages it. So nobody
may open the file after a crash without having looked at its log.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final

from mailerq.config import Config
from mailerq.errors import QueueDamaged, QueueError
from mailerq.privileges import as_owner, give_to
from mailerq.queues.embedded.queue_file import FILE_NAME, Bounds, QueueFile, lock_directory
from mailerq.queues.embedded.shares import share_directory, shares_in
from mailerq.queues.embedded.sqlite_file import translate
from mailerq.queues.recovery.salvage import broken_log, recover

if TYPE_CHECKING:
    from mailerq.queues.embedded.queues import EmbeddedQueues

__all__ = [
    "QueueFile",
    "compact_files",
    "make_directory",
    "open_embedded",
    "open_exclusive",
    "open_files",
    "open_queues",
    "open_shared",
    "shares_in",
]

logger = logging.getLogger("mailerq.queues")

LOCK_NAME: Final = "queue.lock"

OUTBOX: Final = "outbox"
"""What the outbox is called unless the configuration says otherwise."""

COMPACT_FREE: Final = 64 << 20
COMPACT_USED: Final = 256 << 20
"""A start compacts a file of which so many bytes are free, and more than are in use, while these
are few enough to be copied in some seconds. ``mailerq queue compact`` does it at any size."""


def open_queues(config: Config, share: int = 0) -> AbstractAsyncContextManager[EmbeddedQueues]:
    """The queues of a configuration, for the engine that delivers from them.

    `share` is the part of the queue directory that belongs to this process.
    """
    reports_only = not config.failure_is_named
    bounds = Bounds(config.failure_queue, *config.failure_bounds, reports_only)
    directory = share_directory(config.queue_directory, share)
    return open_embedded(directory, bounds=(bounds,), outbox=config.rabbitmq_outbox)


@asynccontextmanager
async def open_embedded(
    directory: str,
    *,
    exclusive: bool = True,
    clock: Callable[[], float] = time.time,
    bounds: Sequence[Bounds] = (),
    outbox: str = OUTBOX,
) -> AsyncIterator[EmbeddedQueues]:
    """Open the queues of a directory, which is made if missing; raises `QueueError`.

    `exclusive` refuses a directory that another process has opened so, checks the file, and
    salvages a damaged one. `clock` is the wall clock, in seconds since 1970. What is beyond
    `bounds` is deleted once a minute. The mail of the queue `outbox` is sorted by destination.

    >>> import tempfile, trio
    >>> from mailerq.message import Message
    >>> from mailerq.queues import Publication, Settlement
    >>> async def example(directory):
    ...     async with open_embedded(directory) as queues:
    ...         await queues.publish([Publication("outbox", Message({"recipient": "a@b.test"}))])
    ...         async with queues.consume("outbox", prefetch=10) as consumer:
    ...             lease = await consumer.receive()
    ...             await queues.ack([Settlement(lease)])
    ...             return lease.message.recipient
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     trio.run(example, directory)
    'a@b.test'
    """
    # The command line does without.
    import trio

    from mailerq.queues.embedded.queues import EmbeddedQueues

    def opened() -> QueueFile:
        if exclusive:
            return open_exclusive(directory, outbox)
        return open_shared(directory, outbox=outbox)

    file = await trio.to_thread.run_sync(opened)
    async with EmbeddedQueues.run(file, clock=clock, bounds=bounds) as queues:
        yield queues


@contextmanager
def open_files(config: Config) -> Iterator[list[QueueFile]]:
    """The queue files of all shares that have one, for the command line.

    While they are open no process can start that has crashed. Raises `QueueError`,
    `FileNotFoundError` when there is no queue, and `PermissionError`.
    """
    with ExitStack() as stack:
        files = []
        for directory in _directories(config):
            files.append(stack.enter_context(open_shared(directory, outbox=config.rabbitmq_outbox)))
        if not files:
            raise FileNotFoundError
        yield files


def compact_files(config: Config) -> Iterator[tuple[str, int, int]]:
    """Compact the queue files of all shares: the path of each, its bytes before and after.

    Raises `QueueError` while a daemon runs, and as `open_files` does.
    """
    directories = list(_directories(config))
    if not directories:
        raise FileNotFoundError
    for directory in directories:
        with (
            as_owner(directory, config.user),
            open_exclusive(directory, config.rabbitmq_outbox) as file,
        ):
            sizes = file.compact()
        yield (file.path, *sizes)


def _directories(config: Config) -> Iterator[str]:
    """The directories of the shares that have a queue, which this user may use."""
    for share in shares_in(config.queue_directory):
        directory = share_directory(config.queue_directory, share)
        path = os.path.join(directory, FILE_NAME)
        try:
            os.stat(path)  # Looking must not make one.
        except FileNotFoundError:
            continue
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError
        yield directory


def open_exclusive(directory: str, outbox: str = OUTBOX) -> QueueFile:
    """Open the queue of a directory for the one daemon that may have it.

    A damaged file is set aside and salvaged first, one that is mostly air is compacted. Raises
    `QueueError`, which names the process that has the directory.
    """
    path = os.path.join(directory, FILE_NAME)
    try:
        make_directory(directory)
        lock = _lock_daemon(os.path.join(directory, LOCK_NAME))
        try:
            alone = lock_directory(directory, fcntl.LOCK_EX)
            try:
                recover(path)
                _shrink(path)
            finally:
                os.close(alone)
        except BaseException:
            os.close(lock)
            raise
    except (OSError, QueueError) as error:
        raise translate(error, path) from error
    return QueueFile.open(directory, outbox=outbox, daemon_lock=lock)


def _shrink(path: str) -> None:
    """Compact a file that is mostly air. Nobody else has it open."""
    if not os.path.exists(path) or os.path.getsize(path) < COMPACT_FREE:
        return
    with QueueFile(path, [], outbox="") as file:
        free, used = file.free()
        if free < COMPACT_FREE or free < used or used > COMPACT_USED:
            return
        try:
            before, after = file.compact()
        except QueueError as error:
            logger.warning("%s: %d bytes of it are free and stay so: %s", path, free, error)
        else:
            logger.warning("%s: compacted from %d to %d bytes", path, before, after)


def open_shared(directory: str, user: str = "", *, outbox: str = OUTBOX) -> QueueFile:
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
            return QueueFile.open(directory, outbox=outbox)
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
