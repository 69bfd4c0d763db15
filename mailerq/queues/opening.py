"""Opens the queues of a configuration: the only module that knows the backends.

An engine calls `open_queues`, which opens files or, with `open_broker`, RabbitMQ. The command line
calls `open_files`, which needs no event loop, and an injector calls `publish`. With a broker there
are no files, and `open_files` says so. No module outside this package imports a backend
(`tools/check_tree.py`).

SQLite accepts a write-ahead log up to its first broken frame, and discards the rest. Frames behind
a broken one were committed, and a daemon salvages them at its start. So after a crash nobody may
open the file before its log has been checked.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from mailerq.config import Config
from mailerq.errors import ConfigError, Problem, QueueDamaged, QueueError
from mailerq.locks import EXCLUSIVE, FileLock, Held, open_directory
from mailerq.privileges import as_owner
from mailerq.queues.embedded.queue_file import FILE_NAME, Bounds, QueueFile, lock_directory
from mailerq.queues.embedded.queue_reader import QueueReader
from mailerq.queues.embedded.shares import share_directory, share_of, shares_in
from mailerq.queues.embedded.sqlite_file import translate
from mailerq.queues.ownership import LOCK_NAME, DirectoryLock, holder, make_directory
from mailerq.queues.recovery.salvage import broken_log, recover

if TYPE_CHECKING:
    from mailerq.queues.embedded.queues import EmbeddedQueues
    from mailerq.queues.fallback.queues import FallbackQueues
    from mailerq.queues.interface import Depth, Publication, Queues
    from mailerq.queues.rabbitmq.exchange import Exchange
    from mailerq.queues.rabbitmq.queues import RabbitQueues
    from mailerq.queues.rabbitmq.storing import BodyStorage

__all__ = [
    "QueueFile",
    "broker_problem",
    "compact_files",
    "instance_queue",
    "make_directory",
    "open_broker",
    "open_embedded",
    "open_exchange",
    "open_exclusive",
    "open_files",
    "open_idle",
    "open_queues",
    "open_shared",
    "publish",
    "reserve_depths",
    "share_directory",
    "share_files",
    "share_of",
    "shares_in",
    "waiting_by_destination",
]

logger = logging.getLogger("mailerq.queues")

OUTBOX: Final = "outbox"
"""The default name of the outbox."""

FALLBACK: Final = "fallback"
"""The folder of the queue directory with mail for a broker that was away."""

COMPACT_FREE: Final = 64 << 20
COMPACT_USED: Final = 256 << 20
"""A start compacts a file with at least `COMPACT_FREE` free bytes, if no more bytes are in use than
free, nor more than `COMPACT_USED`, which takes seconds to copy. ``mailerq queue compact`` compacts
at any size."""


def open_queues(
    config: Config,
    share: int = 0,
    lock: DirectoryLock | None = None,
    storage: BodyStorage | None = None,
) -> AbstractAsyncContextManager[Queues]:
    """Open the queues of a configuration, for the engine that delivers from them.

    `share` is the part of the queue directory that the engine delivers from. A `lock` already held
    on that part is released at the end. With a broker there are no shares: all processes consume
    the one outbox, and `storage` may have bodies.
    """
    if config.has_broker:
        if (problem := broker_problem(config)) is not None:
            raise problem
        return _open_both(config, share, storage)
    directory = share_directory(config.queue_directory, share)
    return open_embedded(
        directory, bounds=Bounds.of(config), outbox=config.rabbitmq_outbox, lock=lock
    )


@asynccontextmanager
async def _open_both(
    config: Config, share: int, storage: BodyStorage | None
) -> AsyncIterator[FallbackQueues]:
    """Open the queues in the broker, and the reserve for the time when the broker is away."""
    from mailerq.queues.fallback.queues import open_fallback

    def open_reserve(
        directory: str, lock: DirectoryLock
    ) -> AbstractAsyncContextManager[EmbeddedQueues]:
        return open_embedded(directory, outbox="", lock=lock)

    async with (
        open_broker(config, storage) as broker,
        open_fallback(
            broker,
            open_reserve,
            os.path.join(config.queue_directory, FALLBACK),
            limit=config.fallback_maxsize,
            share=share,
            processes=config.smtp_processes,
        ) as queues,
    ):
        yield queues


def reserve_depths(config: Config) -> dict[str, Depth]:
    """How much mail waits on this host until the broker takes it, by queue. Raises `QueueError`."""
    from mailerq.queues.fallback.reserve import SETTLED
    from mailerq.queues.interface import Depth

    found: dict[str, Depth] = {}
    root = os.path.join(config.queue_directory, FALLBACK)
    for share in shares_in(root):
        path = os.path.join(share_directory(root, share), FILE_NAME)
        if not os.path.exists(path):  # a look must not create the file
            continue
        with QueueReader(path) as reader:
            for depth in reader.depths():
                if depth.queue != SETTLED:
                    so_far = found.get(depth.queue, Depth(depth.queue, 0, 0))
                    found[depth.queue] = Depth(
                        depth.queue, so_far.due + depth.due, so_far.delayed + depth.delayed
                    )
    return found


def open_broker(
    config: Config, storage: BodyStorage | None = None, *, seconds: float | None = None
) -> AbstractAsyncContextManager[RabbitQueues]:
    """Open the queues in the broker of the settings; bodies go to the `storage` as those say.

    Does not wait for the broker; calls wait up to `seconds`, by default long enough for a restart
    of the broker. Raises `ConfigError` if the package for it is not installed.
    """
    if (problem := broker_problem(config)) is not None:
        raise problem
    # Others do not need pika.
    from mailerq.queues.rabbitmq.addresses import addresses_of
    from mailerq.queues.rabbitmq.options import Options
    from mailerq.queues.rabbitmq.queues import open_rabbitmq
    from mailerq.queues.rabbitmq.storing import Storing, Terms

    options = Options.of(config)
    if seconds is not None:
        options = replace(options, publish_seconds=seconds)
    storing = None if storage is None else Storing(storage, Terms.of(config))
    return open_rabbitmq(addresses_of(config), options, storing=storing)


def open_exchange(config: Config, clock: Callable[[], int] = time.monotonic_ns) -> Exchange:
    """Make a link to the exchange of `cluster-exchange`, not connected yet. Raises `ConfigError`.

    `clock` returns integer nanoseconds.
    """
    if (problem := broker_problem(config)) is not None:
        raise problem
    # Others do not need pika.
    import ssl

    from mailerq.queues.rabbitmq.addresses import cluster_addresses_of
    from mailerq.queues.rabbitmq.exchange import Exchange

    own = config.cluster_address or config.cluster_host
    context = None
    if not config.cluster_verify or not (own or config.rabbitmq_verify):
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return Exchange(
        cluster_addresses_of(config),
        config.cluster_exchange,
        clock=clock,
        name=config.instance,
        context=context,
    )


def instance_queue(outbox: str, instance: str) -> str:
    """The queue at the broker with the mail that others hand to an instance of a cluster."""
    from mailerq.queues.rabbitmq import topology

    return topology.instance_queue(outbox, instance)


def broker_problem(config: Config) -> ConfigError | None:
    """Why RabbitMQ cannot be used with this installation, or None."""
    needed = config.has_broker or config.has_cluster
    if not needed or importlib.util.find_spec("pika") is not None:
        return None
    key = "rabbitmq-address" if config.rabbitmq_address else "rabbitmq-host"
    if not config.has_broker:
        key = "cluster-address"
    text = f"{key} needs the package pika: pip install 'mailerq[rabbitmq]'"
    return ConfigError.of([Problem(config.origin(key), text, key)])


@asynccontextmanager
async def open_embedded(
    directory: str,
    *,
    exclusive: bool = True,
    clock: Callable[[], float] = time.time,
    bounds: Sequence[Bounds] = (),
    outbox: str = OUTBOX,
    lock: DirectoryLock | None = None,
) -> AsyncIterator[EmbeddedQueues]:
    """Open the queues of a directory, created if missing; raises `QueueError`.

    `exclusive` refuses a directory that another process has opened exclusively, checks the file,
    and salvages a damaged one. `clock` is the wall clock, in seconds since 1970. Messages beyond
    `bounds` are deleted once a minute. The mail of the queue `outbox` is sorted by destination. A
    `lock` already held on the directory is released at the end.

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
    # The command line does not need trio.
    import trio

    from mailerq.queues.embedded.queues import EmbeddedQueues

    def opened() -> QueueFile:
        if exclusive:
            return open_exclusive(directory, outbox, lock)
        return open_shared(directory, outbox=outbox)

    file = await trio.to_thread.run_sync(opened)
    async with EmbeddedQueues.run(file, clock=clock, bounds=bounds) as queues:
        yield queues


@contextmanager
def open_files(config: Config) -> Iterator[list[QueueFile]]:
    """The queue files of all shares that have one, for the command line.

    While the files are open, a crashed process cannot restart. Raises `QueueError`,
    `FileNotFoundError` if there is no queue, and `PermissionError`.
    """
    with ExitStack() as stack:
        files = []
        for directory in _directories(config):
            files.append(stack.enter_context(open_shared(directory, outbox=config.rabbitmq_outbox)))
        if not files:
            raise FileNotFoundError
        yield files


def publish(config: Config, publications: Sequence[Publication]) -> None:
    """Publish without an engine, for an injector. Raises `QueueError`, and `MessageError`.

    A daemon that runs notices the messages in a queue file after `control.ask(…, "wake")`.
    """
    if not config.has_broker:
        with open_shared(
            config.queue_directory, config.user, outbox=config.rabbitmq_outbox
        ) as file:
            file.publish(publications)
        return
    import trio

    async def put() -> None:
        async with open_broker(config) as queues:
            await queues.publish(publications)

    trio.run(put)


def waiting_by_destination(config: Config) -> dict[str, int] | None:
    """The number of messages of the outbox for each destination, held ones included.

    None with a broker, which cannot count by destination. Raises the errors of `open_files`.
    """
    if config.has_broker:
        return None
    found: dict[str, int] = {}
    with open_files(config) as files:
        for file in files:
            for depth in file.destinations(config.rabbitmq_outbox):
                count = depth.due + depth.delayed + depth.held
                found[depth.destination] = found.get(depth.destination, 0) + count
    return found


@contextmanager
def open_idle(config: Config, share: int) -> Iterator[QueueFile]:
    """The queue file of a share from which no process delivers, for the command line.

    While the file is open, no process can begin to. Raises `QueueError`.
    """
    directory = share_directory(config.queue_directory, share)
    with open_shared(directory, outbox=config.rabbitmq_outbox) as file:
        if (process := holder(directory)) is not None:
            raise QueueError(
                f"process {process} delivers from {directory}, and does not answer; try again"
            )
        yield file


def compact_files(config: Config) -> Iterator[tuple[str, int, int]]:
    """Compact the queue files of all shares: yields each path, its bytes before and after.

    Raises `QueueError` while a daemon runs, and the errors of `open_files`.
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


def share_files(directory: str) -> Iterator[tuple[str, str, str]]:
    """The directory, the queue file and the lock file of each share; these need not exist.

    `directory` is the queue directory; share 0 is always among the shares.
    """
    for share in shares_in(directory) if os.path.isdir(directory) else [0]:
        path = share_directory(directory, share)
        yield path, os.path.join(path, FILE_NAME), os.path.join(path, LOCK_NAME)


def _directories(config: Config) -> Iterator[str]:
    """The directories of the shares that have a queue and that this user may use."""
    for share in shares_in(config.queue_directory):
        directory = share_directory(config.queue_directory, share)
        path = os.path.join(directory, FILE_NAME)
        try:
            os.stat(path)  # a look must not create the queue
        except FileNotFoundError:
            continue
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError
        yield directory


def open_exclusive(
    directory: str, outbox: str = OUTBOX, lock: DirectoryLock | None = None
) -> QueueFile:
    """Open the queue of a directory for the one process that may deliver from it.

    A damaged file is set aside and salvaged first; a mostly empty one is compacted. Raises
    `QueueHeld`, which names the process that holds the directory, and `QueueError`. A `lock`
    already held is released with the queue, or by the error.
    """
    path = os.path.join(directory, FILE_NAME)
    try:
        if lock is None:
            make_directory(directory)
            lock = DirectoryLock.take(directory)
        try:
            alone = lock_directory(directory, EXCLUSIVE)
            try:
                recover(path)
                _shrink(path)
            finally:
                alone.close()
        except BaseException:
            lock.release()
            raise
    except (OSError, QueueError) as error:
        raise translate(error, path) from error
    return QueueFile.open(directory, outbox=outbox, daemon_lock=lock)


def _shrink(path: str) -> None:
    """Compact a mostly empty file, which must not be open elsewhere."""
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
    """Open the queue of a directory that other processes may have open.

    Missing files are created for the `user` of the daemon, also by root. Raises `QueueError`, and
    `QueueDamaged` for damage that only a daemon's start can salvage; the file is left untouched.
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
                    alone.close()
            # SQLite gives files created later to the owner of this one.
            return QueueFile.open(directory, outbox=outbox)
    except (OSError, QueueError) as error:
        raise translate(error, path) from error


def _have_alone(directory: str) -> FileLock | None:
    """A lock that excludes all others; None if the file is open elsewhere, and so checked."""
    try:
        return FileLock(open_directory(directory), EXCLUSIVE)
    except Held:
        return None
