"""Queue files with many kinds of damage, through the daemon.

The daemon starts, sets damaged data aside, delivers the rest, logs this, and deletes nothing.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import apsw
import pytest

from mailerq.message import Message
from mailerq.queues import Publication
from mailerq.queues.embedded.layout import PAGE_SIZE
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.recovery.salvage import ROOTS
from tests.crash.kit import arrivals, daemon
from tests.support import open_sink

COUNT: Final = 120

FRAME_BYTES: Final = PAGE_SIZE + 24
LOG_HEADER: Final = 32


def body_of(number: int) -> bytes:
    """Bodies of many sizes: within a page, and over several pages."""
    lines = (number * number * 7) % 300
    return b"Subject: %d\r\n\r\n" % number + lines * (b"%060d\r\n" % number)


def publications() -> list[Publication]:
    return [
        Publication(
            "outbox",
            Message({"envelope": "a@b.test", "recipient": f"{number}@d.test"}, body_of(number)),
        )
        for number in range(COUNT)
    ]


@dataclass(frozen=True)
class Kind:
    """A way to damage a queue: `killed` starts from what kill -9 leaves, all of it in the log.

    At least `delivered` messages still go out. The file is set aside when the damage is `noticed`
    at the start; else what is wrong is found message by message.
    """

    name: str
    damage: Callable[[Path], None]
    delivered: int
    killed: bool = False
    noticed: bool | None = True


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def page(number: int, data: bytes) -> Callable[[Path], None]:
    return lambda queue: overwrite(queue / "queue.db", (number - 1) * PAGE_SIZE, data)


def leaves(queue: Path, table: str) -> list[int]:
    connection = apsw.Connection(str(queue / "queue.db"), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return [
            int(row[0])
            for row in connection.execute(
                "SELECT pageno FROM dbstat WHERE name = ? AND pagetype = 'leaf' ORDER BY pageno",
                (table,),
            )
        ]
    finally:
        connection.close()


def lose_leaf(table: str) -> Callable[[Path], None]:
    return lambda queue: page(leaves(queue, table)[0], bytes(PAGE_SIZE))(queue)


def lose_entry(queue: Path) -> None:
    """One entry less in a page of the index, as a lost write of it would leave it."""
    place = (leaves(queue, "message_place")[0] - 1) * PAGE_SIZE + 3
    data = (queue / "queue.db").read_bytes()
    count = int.from_bytes(data[place : place + 2], "big")
    overwrite(queue / "queue.db", place, (count - 1).to_bytes(2, "big"))


def random_pages(queue: Path) -> None:
    dice = random.Random(1)
    count = (queue / "queue.db").stat().st_size // PAGE_SIZE
    for _ in range(4):
        page(dice.randrange(2, count), dice.randbytes(PAGE_SIZE))(queue)


def random_bytes(queue: Path) -> None:
    dice = random.Random(2)
    size = (queue / "queue.db").stat().st_size
    for _ in range(25):
        overwrite(queue / "queue.db", dice.randrange(100, size), dice.randbytes(3))


def cut(name: str, share: float) -> Callable[[Path], None]:
    return lambda queue: os.truncate(
        queue / name, int((queue / name).stat().st_size * share) // 2 * 2 + 100
    )


def by_sql(*statements: str) -> Callable[[Path], None]:
    """Rows that are wrong in a file that is sound."""

    def damage(queue: Path) -> None:
        connection = apsw.Connection(str(queue / "queue.db"))
        for statement in statements:
            connection.execute(statement)
        connection.close()

    return damage


def zero_log(queue: Path) -> None:
    log = queue / "queue.db-wal"
    log.write_bytes(bytes(log.stat().st_size))


def break_frame(queue: Path) -> None:
    log = queue / "queue.db-wal"
    frames = (log.stat().st_size - LOG_HEADER) // FRAME_BYTES
    overwrite(log, LOG_HEADER + frames // 2 * FRAME_BYTES + 3000, b"broken")


def interrupted_salvage(queue: Path) -> None:
    overwrite(queue / "queue.db", 0, bytes(100))
    (queue / "queue.db.salvaging").write_bytes(b"half a file")
    (queue / "queue.db.salvaging-wal").write_bytes(b"half a log")


def finished_salvage(queue: Path) -> None:
    (queue / "queue.db").rename(queue / "queue.db.salvaged")
    (queue / "queue.db").write_bytes(b"the damaged file")


ALL: Final = COUNT
MOST: Final = COUNT // 2
SOME: Final = 1

KINDS: Final = [
    Kind("header", lambda queue: overwrite(queue / "queue.db", 0, b"garbage" * 14), ALL),
    Kind("first-page", page(1, bytes(PAGE_SIZE)), ALL),
    Kind("root-of-numbers", page(ROOTS["number"], b"\xff" * PAGE_SIZE), ALL),
    Kind("root-of-messages", page(ROOTS["message"], bytes(PAGE_SIZE)), ALL),
    Kind("root-of-bodies", page(ROOTS["body"], b"\xff" * PAGE_SIZE), ALL),
    Kind("root-of-index", page(ROOTS["message_place"], b"\5" * PAGE_SIZE), ALL),
    Kind("leaf-of-messages", lose_leaf("message"), SOME),
    Kind("leaf-of-bodies", lose_leaf("body"), MOST),
    Kind("leaf-of-index", lose_leaf("message_place"), ALL),
    Kind("entry-of-index", lose_entry, ALL),
    Kind("random-pages", random_pages, SOME),
    Kind("random-bytes", random_bytes, SOME, noticed=None),
    Kind("cut-off", cut("queue.db", 0.9), SOME),
    Kind("garbage", lambda queue: (queue / "queue.db").write_bytes(bytes(range(256)) * 99), 0),
    Kind("log-zeroed", zero_log, 0, killed=True),
    Kind(
        "log-header",
        lambda queue: overwrite(queue / "queue.db-wal", 0, bytes(LOG_HEADER)),
        ALL,
        killed=True,
    ),
    Kind("log-frame", break_frame, ALL - 20, killed=True),
    Kind("log-alone", lambda queue: (queue / "queue.db").unlink(), ALL, killed=True),
    Kind("log-torn", cut("queue.db-wal", 0.7), MOST, killed=True, noticed=False),
    Kind(
        "shared-memory",
        lambda queue: (queue / "queue.db-shm").write_bytes(b"garbage" * 1000),
        ALL,
        killed=True,
        noticed=False,
    ),
    Kind(
        "properties",
        by_sql("UPDATE message SET properties = CAST('{\"a\":' AS BLOB) WHERE id % 10 = 3"),
        COUNT - 12,
        noticed=False,
    ),
    Kind(
        "values",
        by_sql(
            "UPDATE message SET crc = 'x' WHERE id % 40 = 1",
            "UPDATE body SET data = x'00' WHERE id % 40 = 2",
            "DELETE FROM body WHERE id % 40 = 3",
            "UPDATE message SET properties = NULL WHERE id % 40 = 4",
        ),
        COUNT - 12,
        noticed=False,
    ),
    Kind("salvage-interrupted", interrupted_salvage, ALL),
    Kind("salvage-finished", finished_salvage, ALL),
]
SAMPLE: Final = ("header", "leaf-of-messages", "log-frame", "properties")
"""What `make test` tries of them; tests/queues has more of it without a daemon."""


def fill(queue: Path, *, killed: bool) -> None:
    """A queue as a daemon leaves it that was stopped, or killed."""
    there = queue.with_name("there")
    with QueueFile.open(str(there)) as store:
        if killed:
            store.connection.wal_autocheckpoint(0)
        for publication in publications():
            store.publish([publication])
        if killed:
            shutil.copytree(there, queue)
    if not killed:
        shutil.copytree(there, queue)


async def start_with(kind: Kind, directory: Path) -> None:
    queue = directory / "queue"
    fill(queue, killed=kind.killed)
    kind.damage(queue)
    before = {path.name: path.read_bytes() for path in queue.iterdir() if path.is_file()}
    async with open_sink() as sink:
        async with daemon(directory, sink.port, "--rabbitmq-results=results") as running:
            await running.until_empty()
            assert len(set(arrivals(sink))) >= kind.delivered
            aside = running.depth("damaged")
            assert await running.stop() == 0
        delivered = len(sink.mails)
        async with daemon(directory, sink.port) as running:  # what was salvaged is sound
            assert await running.stop() == 0
        assert len(sink.mails) == delivered
    for mail in sink.mails:
        number = int(mail.recipients[0].partition("@")[0])
        assert mail.body == body_of(number)
    assert len(set(arrivals(sink))) == delivered
    log = running.log
    kept = [path.read_bytes() for path in queue.glob("queue.db.damaged-*")]
    if kind.noticed is not None:
        assert bool(kept) is kind.noticed
    if kept:
        assert "the damaged file was kept as" in log or kind.name == "salvage-finished"
        assert before.get("queue.db", before.get("queue.db-wal")) in kept
    elif kind.name != "log-torn":
        assert aside == log.count("goes to queue damaged") == COUNT - delivered
    assert "Traceback" not in log


@pytest.mark.parametrize("kind", [one for one in KINDS if one.name in SAMPLE], ids=lambda k: k.name)
async def test_a_damaged_file(tmp_path: Path, kind: Kind) -> None:
    await start_with(kind, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
async def test_a_file_damaged_in_every_way(tmp_path: Path, kind: Kind) -> None:
    await start_with(kind, tmp_path)
