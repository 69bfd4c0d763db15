"""The shares of a queue directory: their places, and message numbers unique to a share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mailerq.message import Message
from mailerq.queues import DAMAGED_QUEUE, Publication
from mailerq.queues.embedded.layout import PAGE_SIZE
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.shares import first_number, share_directory, shares_in
from mailerq.queues.interface import Settlement
from mailerq.queues.opening import open_embedded, open_exclusive
from mailerq.queues.recovery.salvage import ROOTS

SHARE = 2
OWN = range(first_number("share-2"), first_number("share-3"))


def publication(tag: int) -> Publication:
    return Publication("outbox", Message({"tag": tag, "recipient": "a@b.test"}, b"body"), 1e9)


def garbage(file: Path, *pages: int) -> None:
    with file.open("r+b") as opened:
        for page in pages:
            opened.seek((page - 1) * PAGE_SIZE)
            opened.write(b"\xff" * PAGE_SIZE)


def test_shares_are_the_folders_of_that_name_in_order(tmp_path: Path) -> None:
    assert shares_in(str(tmp_path / "missing")) == [0]
    for name in ("share-10", "share-2", "share-0", "share-02", "share-1x", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "share-3").touch()
    assert shares_in(str(tmp_path)) == [0, 2, 10]


@pytest.mark.parametrize("opener", [QueueFile.open, open_exclusive])
def test_a_share_that_is_missing_is_made_and_its_numbers_are_its_own(
    tmp_path: Path, opener: Callable[[str], QueueFile]
) -> None:
    directory = tmp_path / "queue"
    for share in (0, 1, SHARE):
        with opener(share_directory(str(directory), share)) as store:
            (number,) = store.publish([publication(share)])
        assert number == first_number(store.path.removesuffix("/queue.db"))
        assert share == number // 10**12
    # Not a letter of it depends on how the directory is written.
    (tmp_path / "link").symlink_to(directory)
    for path in (f"{directory}/share-2/", f"{tmp_path}/link/share-2", f"{directory}/./share-2"):
        with opener(path) as store:
            (number,) = store.publish([publication(0)])
        assert number in OWN


async def test_numbers_beyond_a_million_millions_work_as_small_ones(tmp_path: Path) -> None:
    directory = share_directory(str(tmp_path), 999_999)  # the last there can be
    async with open_embedded(directory) as queues:
        await queues.publish([publication(tag) for tag in range(3)])
        first, second, third = await queues.browse("outbox")
        assert first.id == 999_999 * 10**12 + 1
        assert [entry.id for entry in await queues.browse("outbox", after=first.id, limit=1)] == [
            second.id
        ]
        async with queues.consume("outbox", prefetch=10) as consumer:
            leases = [await consumer.receive() for _ in range(3)]
            again = publication(0)
            await queues.ack([Settlement(leases[0], (again,)), Settlement(leases[1])])
    with QueueFile.open(directory) as store:
        assert [entry.id for entry in store.browse("outbox")] == [first.id, third.id]
        store.remove([third.id])
        assert store.purge("outbox") == 1
        (number,) = store.publish([publication(9)])
        assert number > third.id


@pytest.mark.parametrize("messages", [0, 5])
@pytest.mark.parametrize(
    "lost",
    [
        pytest.param(("number",), id="numbers"),
        pytest.param(("number", "message"), id="numbers and messages"),
        pytest.param(("number", "body"), id="numbers and bodies"),
        pytest.param((), id="first page"),
    ],
)
def test_numbers_of_a_salvaged_share_stay_its_own(
    tmp_path: Path, lost: tuple[str, ...], messages: int
) -> None:
    directory = share_directory(str(tmp_path), SHARE)
    with open_exclusive(directory) as store:
        given = [store.publish([publication(tag)])[0] for tag in range(messages)]
    assert all(number in OWN for number in given)
    garbage(tmp_path / "share-2" / "queue.db", *(ROOTS[name] for name in lost or ("number",)))
    if not lost:
        garbage(tmp_path / "share-2" / "queue.db", 1)
    with open_exclusive(directory) as store:
        found = [*store.browse("outbox"), *store.browse(DAMAGED_QUEUE)]
        assert len(found) == messages
        assert all(entry.id in OWN for entry in found)
        (number,) = store.publish([publication(9)])
    assert number in OWN
    assert number not in given
    assert [name for name in os.listdir(directory) if ".damaged-" in name]
