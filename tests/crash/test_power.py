"""The power fails: synced data is on the disk; of the rest, any part may be.

After kill -9 the kernel still writes everything, so that test cannot tell synced mail from mail
that was not synced. Here every write and sync of a daemon under load is recorded, in order. From
the record the files are rebuilt as they may be after a power cut at any moment: each write that no
sync followed is there, or not, or in part. Some syncs fail too; the kernel then forgets what it
could not write.
"""

from __future__ import annotations

import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio

from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.opening import open_exclusive
from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.crash.kit import Call, Ledger, Load, daemon, open_faults
from tests.support import Mail, Sink, open_sink, until

SESSIONS: Final = 10

ENOUGH: Final = 5 * SESSIONS
"""Mails that are taken before the power fails, also on a slow disk."""

ENTRY: Final = struct.Struct("=ccHIq")
"""``struct entry`` of faults.c."""

NAMES: Final = {b"d": "queue.db", b"w": "queue.db-wal", b"j": "queue.db-journal"}

SECTOR_BYTES: Final = 512


@dataclass
class File:
    """A file on the disk, and the writes that may not have come there yet."""

    data: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def apply(self, offset: int, data: bytes | None) -> None:
        if data is None:
            del self.data[offset:]
            self.data.extend(bytes(offset - len(self.data)))
            return
        self.data.extend(bytes(max(offset - len(self.data), 0)))
        self.data[offset : offset + len(data)] = data

    def sync(self) -> None:
        for change in self.pending:
            self.apply(*change)
        self.pending.clear()

    def cut(self, dice: random.Random) -> None:
        """The power fails."""
        for offset, data in self.pending:
            luck = dice.random()
            if luck < 0.4:
                continue
            if luck < 0.6 and data:
                data = data[: dice.randrange(len(data)) // SECTOR_BYTES * SECTOR_BYTES]
            self.apply(offset, data)
        self.pending.clear()


def entries(journal: bytes, end: int) -> Iterator[tuple[bytes, bytes, int, bytes]]:
    """Kind, file, offset and data of what was done until the journal had `end` bytes."""
    place = 0
    while place + ENTRY.size <= end:
        kind, file, _, size, offset = ENTRY.unpack_from(journal, place)
        place += ENTRY.size
        if place + size > end:
            return
        yield kind, file, offset, journal[place : place + size]
        place += size


def restore(base: bytes, journal: bytes, end: int, dice: random.Random, target: Path) -> None:
    """Make the files as a power cut at that place of the journal may leave them."""
    files = {name: File() for name in NAMES.values()}
    files["queue.db"].data.extend(base)
    for kind, letter, offset, data in entries(journal, end):
        file = files[NAMES[letter]]
        match kind:
            case b"W":
                file.pending.append((offset, data))
            case b"T":
                file.pending.append((offset, None))
            case b"S":
                file.sync()
            case b"F":
                file.pending.clear()
    target.mkdir()
    for name, file in files.items():
        file.cut(dice)
        if file.data:
            (target / name).write_bytes(file.data)


def ids_in(store: QueueFile) -> list[str]:
    return [
        entry.message.recipient.partition("@")[0] for entry in store.browse("outbox", limit=10**6)
    ]


class Arrivals(list[Mail]):
    """The mails of a sink, which notes of each, before it answers, what `mark` says."""

    def __init__(self, mark: Callable[[], int]) -> None:
        super().__init__()
        self.marks: dict[str, int] = {}
        self._mark = mark

    def append(self, mail: Mail) -> None:
        super().append(mail)
        self.marks[mail.recipients[0].partition("@")[0]] = self._mark()


async def work(
    directory: Path, sink: Sink, ledger: Ledger, seconds: float, *, fail: bool
) -> tuple[bytes, bytes, dict[str, int]]:
    """Run a daemon: the file at the start, the journal, and when which id came to the sink."""
    with QueueFile.open(str(directory / "queue")) as store:
        assert ids_in(store) == []
    base = (directory / "queue" / "queue.db").read_bytes()
    with open_faults(directory) as faults:

        def size() -> int:
            return os.stat(faults.journal).st_size

        ledger.mark = size
        sink.mails = arrived = Arrivals(size)
        load = Load(ledger, "id", b"Subject: x\r\n\r\n" + 40 * (70 * b"x" + b"\r\n"))
        async with (
            daemon(directory, sink.port, env=faults.journal_env) as running,
            trio.open_nursery() as nursery,
        ):
            for _ in range(SESSIONS):
                nursery.start_soon(partial(load.session, running.port, again=True))
            await until(lambda: len(ledger.accepted) > SESSIONS)
            if fail:
                faults.set(Call.SYNC, one_in=9)
            await trio.sleep(seconds)
            await until(lambda: len(ledger.accepted) > ENOUGH)
            load.ending = True
            running.kill()
            nursery.cancel_scope.cancel()
        return base, faults.journal.read_bytes(), arrived.marks


def busy(event: server.Event) -> Reply | None:
    """Some mail is refused at first, so it is written again."""
    if isinstance(event, server.Content) and random.random() < 0.3:
        return Reply(451, "4.3.2 Not now")
    return None


async def cut_the_power(directory: Path, seconds: float, cuts: int, *, fail: bool) -> None:
    ledger = Ledger()
    dice = random.Random(cuts)
    async with open_sink() as sink:
        sink.decide = busy
        base, journal, arrived = await work(directory, sink, ledger, seconds, fail=fail)
    for number in range(cuts):
        end = dice.randrange(len(journal) // 10, len(journal))
        image = directory / f"cut-{number}"
        restore(base, journal, end, dice, image)
        with open_exclusive(str(image)) as store:
            waiting = Counter(ids_in(store))
            aside = store.browse("damaged", limit=10)
        delivered = {id for id, size in arrived.items() if size <= end}
        accepted = {id for id, size in ledger.marks.items() if size <= end}
        assert accepted - waiting.keys() - delivered == set()
        assert max(waiting.values(), default=1) == 1
        assert aside == []
        assert not list(image.glob("*damaged*"))  # what a crash leaves is no damage


@pytest.mark.parametrize("fail", [False, True], ids=["sound", "failing"])
async def test_a_power_cut_at_any_moment(tmp_path: Path, fail: bool) -> None:
    await cut_the_power(tmp_path, 0.5, 15, fail=fail)


@pytest.mark.soak
@pytest.mark.parametrize("fail", [False, True], ids=["sound", "failing"])
async def test_a_thousand_power_cuts(tmp_path: Path, fail: bool) -> None:
    await cut_the_power(tmp_path, 5.0, 500, fail=fail)
