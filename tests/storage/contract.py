"""What every storage does: test modules of the kinds import these tests.

A module has a fixture `address`, the address of an empty storage.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio

from mailerq.errors import BodyMissing, StorageError
from mailerq.storage import Storage
from mailerq.storage.interface import Body
from mailerq.storage.keys import ends_of
from mailerq.storage.packing import pack
from tests.storage.kit import Clock, Settings, opened

__all__ = [
    "clock",
    "storage",
    "test_a_body_comes_back_after_a_restart",
    "test_a_body_is_there_until_its_hour_is_over",
    "test_a_body_that_is_gone_too_early_makes_mail_wait",
    "test_a_key_of_an_application_that_is_not_there_is_missing",
    "test_an_application_may_bring_a_body_of_its_own",
    "test_bodies_of_all_kinds_come_back",
    "test_many_bodies_at_once_are_all_there",
    "test_no_body_is_lost_among_those_that_come_while_others_are_written",
    "test_one_body_put_twice_is_one_body",
]

NOW = 1_800_000_000.0  # an hour begins here


@pytest.fixture
def clock() -> Clock:
    return Clock(NOW)


@pytest.fixture
async def storage(address: str, clock: Clock) -> AsyncIterator[Storage]:
    async with opened(address, clock=clock) as found:
        yield found


async def fresh(address: str, key: str, clock: Clock) -> bytes:
    """What another process gets."""
    async with opened(address, clock=clock) as other:
        return await other.get(key)


async def test_a_body_comes_back_after_a_restart(
    storage: Storage, address: str, clock: Clock
) -> None:
    key = await storage.put(b"From: a@b.test\r\n\r\nhello\r\n", NOW + 10)
    assert await storage.get(key) == b"From: a@b.test\r\n\r\nhello\r\n"
    assert await fresh(address, key, clock) == b"From: a@b.test\r\n\r\nhello\r\n"


async def test_bodies_of_all_kinds_come_back(storage: Storage, address: str, clock: Clock) -> None:
    bodies = [b"", b"\0", b"\x1f\x8b", bytes(range(256)), b"x" * 3_000_000, "ü".encode() * 100]
    keys = [await storage.put(body, NOW + 10) for body in bodies]
    for key, body in zip(keys, bodies, strict=True):
        assert await fresh(address, key, clock) == body


async def test_many_bodies_at_once_are_all_there(
    storage: Storage, address: str, clock: Clock
) -> None:
    keys: dict[int, str] = {}

    async def put(number: int) -> None:
        keys[number] = await storage.put(b"body %d" % number, NOW + number * 60)

    async with trio.open_nursery() as nursery:
        for number in range(60):
            nursery.start_soon(put, number)
    async with opened(address, clock=clock) as other, trio.open_nursery() as nursery:

        async def check(number: int) -> None:
            assert await other.get(keys[number]) == b"body %d" % number

        for number in range(60):
            nursery.start_soon(check, number)
    assert storage.statistics()["put"] == 60


async def test_no_body_is_lost_among_those_that_come_while_others_are_written(
    address: str, clock: Clock
) -> None:
    keys: list[str] = []
    async with opened(address, clock=clock, storage_threads=2) as storage:
        storage._backend.batch_bodies = min(storage._backend.batch_bodies, 3)

        async def lane(number: int) -> None:
            for each in range(8):
                keys.append(await storage.put(b"body %d %d" % (number, each), NOW))

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(lane, number)
        assert storage.statistics()["put"] == 160
        assert storage._writers == 0
    async with opened(address, clock=clock) as other:
        for key in keys:
            assert (await other.get(key)).startswith(b"body ")


async def test_one_body_put_twice_is_one_body(storage: Storage, address: str, clock: Clock) -> None:
    keys = {await storage.put(b"the same", NOW + each) for each in (10, 20)}
    assert len(keys) == 1
    assert await fresh(address, keys.pop(), clock) == b"the same"


async def test_a_body_is_there_until_its_hour_is_over(
    storage: Storage, address: str, clock: Clock
) -> None:
    short = await storage.put(b"short", NOW + 10)
    long = await storage.put(b"long", NOW + 3600 + 10)
    ends = ends_of(short)
    assert ends == NOW + 3600
    async with opened(address, clock=clock) as other:
        assert await other._backend.expire(NOW + 3599) == 0
        assert await other.get(short) == b"short"
        assert await other._backend.expire(NOW + 3600) == 1
    clock.now = NOW + 3600
    with pytest.raises(BodyMissing, match="has expired"):
        await fresh(address, short, clock)
    assert await fresh(address, long, clock) == b"long"


async def test_a_body_that_is_gone_too_early_makes_mail_wait(
    storage: Storage, address: str, clock: Clock
) -> None:
    key = await storage.put(b"body", NOW + 10)
    async with opened(address, clock=clock) as other:
        assert await other._backend.expire(NOW + 3600) == 1
        with pytest.raises(StorageError, match="which has not expired; is it the right"):
            await other.get(key)
        assert other.statistics()["failed"] == 1


async def test_a_key_of_an_application_that_is_not_there_is_missing(storage: Storage) -> None:
    for key in ("campaign/7", "x", "20261126", "campaign/7/body"):
        with pytest.raises(BodyMissing, match="is not there"):
            await storage.get(key)
    with pytest.raises(BodyMissing, match="begins with a dot"):
        await storage.get("../storage/x")
    assert storage.statistics()["missing"] == 5


async def test_an_application_may_bring_a_body_of_its_own(
    storage: Storage, address: str, clock: Clock
) -> None:
    backend = storage._backend
    plain = Body("campaign-7", b"plain", NOW + 86400)
    packed = Body("campaign-8", pack(b"packed", compress=True), NOW + 86400)
    backend.configure(Settings("")())
    await backend.put([plain, packed])
    assert await storage.get("campaign-7") == b"plain"
    assert await fresh(address, "campaign-8", clock) == b"packed"
