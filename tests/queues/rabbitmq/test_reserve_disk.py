"""The reserve for a broker that is away, on a disk that fails, is full, or cannot be written."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import trio

from mailerq.queues.rabbitmq.addresses import Address
from tests.crash.kit import (
    Call,
    Daemon,
    Fate,
    Ledger,
    Load,
    all_arrive,
    arrivals,
    daemon,
    open_faults,
)
from tests.crash.test_disk import BIG, small_disk
from tests.queues.rabbitmq.engine_kit import uri
from tests.queues.rabbitmq.kit import Broker
from tests.support import Sink, in_thread, open_sink, until

SESSIONS = 4
SMALL = b"Subject: x\r\n\r\nhi\r\n"


def switches(vhost: Address) -> list[str]:
    """A daemon with the broker, and without a cluster, whose files would be on the disk too.

    Mail is not parked in a new quorum queue, and waits ten seconds instead.
    """
    address = f"--rabbitmq-address={uri(vhost)}"
    return [address, "--rabbitmq-queue-type=classic", "--cluster-exchange="]


@contextmanager
def short_of_memory(broker: Broker) -> Iterator[None]:
    """A broker that takes nothing, and that is back as soon as it does."""
    broker.alarm(True)
    try:
        yield
    finally:
        broker.alarm(False)


@asynccontextmanager
async def under_load(running: Daemon, ledger: Ledger, body: bytes) -> AsyncIterator[Load]:
    """Sessions that send again and again, and some mail in the reserve."""
    load = Load(ledger, "id", body)
    async with trio.open_nursery() as nursery:
        for _ in range(SESSIONS):
            nursery.start_soon(partial(load.session, running.port, again=True, pause=0.01))
        await until(lambda: len(ledger.accepted) >= 5 * SESSIONS)
        yield load
        load.ending = True


async def all_refused(ledger: Ledger) -> tuple[float, float]:
    """Wait until a fault has refused some mail of each session; from when, and to when."""
    began = time.monotonic()
    await until(lambda: ledger.count(Fate.REFUSED, began) >= 3 * SESSIONS)
    return began, time.monotonic()


async def goes_on(ledger: Ledger) -> None:
    """Mail is taken again."""
    since = time.monotonic()
    await until(lambda: ledger.count(Fate.ACCEPTED, since) >= 5 * SESSIONS)


def check(running: Daemon, ledger: Ledger, during: tuple[float, float]) -> None:
    """All mail of a fault got 451."""
    began, ended = during
    found = [each for each in ledger.entries.values() if began < each.sent and each.replied < ended]
    assert {each.code for each in found if each.replied} == {451}
    assert running.is_alive


async def account(running: Daemon, sink: Sink, ledger: Ledger) -> None:
    """Wait until the daemon has moved all that it accepted; each mail has come once."""
    await all_arrive(sink, ledger.accepted)
    await running.until_statistics(lambda found: not found["queue"]["fallback"]["waiting"])
    assert await running.stop() == 0
    assert "Traceback" not in running.log
    assert not list(running.queue.glob("**/*.damaged-*"))
    ledger.check(arrivals(sink))


async def finish(load: Load, broker: Broker, running: Daemon, sink: Sink) -> None:
    """End the load; nothing of it has gone out. Then the broker is back, and gets all of it."""
    await load.end()
    assert sink.mails == []
    await in_thread(broker.alarm, False)
    await account(running, sink, load.ledger)


FAULTS = [
    ([Call.SYNC], errno.EIO, False),
    ([Call.WRITE], errno.EIO, False),
    ([Call.WRITE], errno.ENOSPC, True),
    ([Call.WRITE, Call.TRUNCATE, Call.OPEN], errno.EROFS, False),
]
"""What fails, how, and whether half of it is written: a bad disk, a full one, a read-only one."""


async def test_a_disk_that_fails_refuses_mail_until_it_does_not(
    tmp_path: Path, broker: Broker, vhost: Address
) -> None:
    ledger = Ledger()
    with open_faults(tmp_path) as faults, short_of_memory(broker):
        async with (
            open_sink() as sink,
            daemon(tmp_path, sink.port, *switches(vhost), env=faults.env) as running,
            under_load(running, ledger, SMALL) as load,
        ):
            for calls, error, partly in FAULTS:
                failed = faults.failed
                faults.set(*calls, error=error, partial=partly)
                during = await all_refused(ledger)
                assert faults.failed > failed
                faults.clear()
                check(running, ledger, during)
                await goes_on(ledger)
            await finish(load, broker, running, sink)


async def test_a_disk_without_room_refuses_mail_until_there_is_some(
    tmp_path: Path, broker: Broker, vhost: Address
) -> None:
    """Somebody else fills the disk to the last byte, and the broker is away."""
    ledger = Ledger()
    with small_disk(tmp_path / "queue", "32m"), short_of_memory(broker):
        ballast = tmp_path / "queue" / "ballast"
        async with (
            open_sink() as sink,
            daemon(tmp_path, sink.port, *switches(vhost)) as running,
            under_load(running, ledger, BIG) as load,
        ):
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            during = await all_refused(ledger)
            check(running, ledger, during)
            ballast.unlink()
            await goes_on(ledger)
            await finish(load, broker, running, sink)


async def test_mail_that_is_moved_while_the_disk_fails_goes_out_once(
    tmp_path: Path, broker: Broker, vhost: Address
) -> None:
    """The broker comes back before the disk, and what it has cannot be removed from the reserve."""
    ledger = Ledger()
    with open_faults(tmp_path) as faults, short_of_memory(broker):
        async with (
            open_sink() as sink,
            daemon(tmp_path, sink.port, *switches(vhost), env=faults.env) as running,
        ):
            async with under_load(running, ledger, SMALL) as load:
                await load.end()
            faults.set(Call.SYNC, Call.WRITE)
            await in_thread(broker.alarm, False)
            await all_arrive(sink, ledger.accepted)
            await until(lambda: faults.failed >= 3)
            assert (await running.statistics())["queue"]["fallback"]["waiting"]["outbox"]
            faults.clear()
            await account(running, sink, ledger)
