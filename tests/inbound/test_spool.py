"""Incoming mail: memory counts, files, and cleanup."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from mailerq.inbound import spool as module
from mailerq.inbound.spool import Claim, Memory, Spool, is_in_file, load

BLOCK = 1000 * b"0123456789"


async def fill(spool: Spool, count: int) -> bytes:
    """Give a spool blocks as a session does."""
    for number in range(1, count + 1):
        spool.write(BLOCK)
        spool.came(number * len(BLOCK))
        if spool.is_due:
            await spool.flush()
            spool.came(number * len(BLOCK))
    return count * BLOCK


async def test_a_small_mail_stays_in_memory_and_is_counted(tmp_path: Path) -> None:
    memory = Memory()
    spool = Spool(memory, str(tmp_path), 10 * len(BLOCK))
    content = await fill(spool, 10)
    assert memory.used == len(content)
    body = spool.finish()
    assert not is_in_file(body)
    assert body == content
    spool.close()
    spool.close()
    assert memory.used == 0


async def test_a_large_mail_goes_to_a_file_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITE_BYTES", 3 * len(BLOCK))
    memory = Memory()
    spool = Spool(memory, str(tmp_path), 5 * len(BLOCK))
    content = await fill(spool, 100)
    assert memory.used < 6 * len(BLOCK)
    assert list(tmp_path.iterdir()) == []
    body = spool.finish()
    assert isinstance(body, memoryview)
    spool.close()
    assert memory.used == 0
    assert body == content  # the mapping outlives the file
    whole = memoryview(body.obj)
    assert whole[len(body)] == 0


@pytest.mark.parametrize("extra", range(-2, 3))
async def test_a_nul_follows_at_any_size(tmp_path: Path, extra: int) -> None:
    spool = Spool(Memory(), str(tmp_path), 1)
    content = (4096 + extra) * b"x"
    spool.write(content)
    await spool.flush()
    body = spool.finish()
    assert isinstance(body, memoryview)
    assert body == content
    assert memoryview(body.obj)[-1] == 0
    spool.close()


async def test_without_a_limit_nothing_spills(tmp_path: Path) -> None:
    spool = Spool(Memory(), str(tmp_path), 0)
    await fill(spool, 300)
    assert not is_in_file(spool.finish())
    spool.close()


async def test_when_memory_is_short_all_large_mail_spills(tmp_path: Path) -> None:
    memory = Memory(1000)
    spool = Spool(memory, str(tmp_path), 0)
    content = await fill(spool, 200)
    body = spool.finish()
    assert is_in_file(body)
    assert body == content
    spool.close()


@pytest.mark.parametrize("threshold", [0, 1])
@pytest.mark.parametrize("head", [b"", b"new\r\n", 40 * BLOCK])
@pytest.mark.parametrize("kept", [False, True])
async def test_a_body_is_made_of_what_has_come_in(
    tmp_path: Path, threshold: int, head: bytes, kept: bool
) -> None:
    """A view that somebody has kept still shows what it did."""
    spool = Spool(Memory(), str(tmp_path), threshold)
    content = await fill(spool, 100)
    body = spool.finish()
    spool.close()
    assert is_in_file(body) == bool(threshold)
    slice = body[5:] if kept else None
    assert load(body, 5, head) == head + content[5:]
    if slice is not None:
        assert slice == content[5:]


async def test_what_is_discarded_leaves_nothing_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    memory = Memory()
    spool = Spool(memory, str(tmp_path), 1)
    await fill(spool, 10)
    spool.discard()
    spool.discard()
    spool.close()
    assert memory.used == 0
    assert len(os.listdir("/proc/self/fd")) == before


async def test_where_no_file_can_be_made_it_stays_in_memory(tmp_path: Path) -> None:
    spool = Spool(Memory(), str(tmp_path / "missing"), 1)
    content = await fill(spool, 200)
    assert spool.failed is None
    assert spool.finish() == content
    spool.close()


async def test_a_full_disk_is_told(tmp_path: Path) -> None:
    spool = Spool(Memory(), str(tmp_path), 1)
    spool.write(BLOCK)
    await spool.flush()
    assert spool._file is not None
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, spool._file.fileno())
    os.close(full)
    spool.write(BLOCK)
    await spool.flush()
    assert spool.failed is not None
    assert spool.finish() == b""
    spool.close()


def test_full_is_what_has_reached_its_limit() -> None:
    memory = Memory(10)
    memory.add(9)
    assert not memory.is_full
    memory.add(1)
    assert memory.is_full
    memory.add(-1)
    assert not memory.is_full
    assert not Memory(0).is_full


async def test_a_mail_in_memory_is_counted_from_the_beginning_to_the_end() -> None:
    memory = Memory(5)
    claim = Claim(memory, 10, None)
    assert memory.used == 10
    assert await claim.load()
    event = trio.Event()
    event.set()
    assert await claim.ask(event.wait()) is None
    assert (memory.used, memory.held) == (10, 0)
    claim.end()
    claim.end()
    assert memory.used == 0


async def test_a_mail_in_a_file_gives_up_its_turn_while_it_is_held() -> None:
    memory, turns = Memory(100), trio.CapacityLimiter(1)
    first, second = Claim(memory, 10, turns), Claim(memory, 20, turns)
    decided = trio.Event()
    assert await first.load()
    assert turns.available_tokens == 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(first.ask, decided.wait())
        with trio.fail_after(60):
            assert await second.load()
        assert (memory.used, memory.held) == (30, 10)
        decided.set()
        await trio.testing.wait_all_tasks_blocked()
        assert (memory.used, memory.held, turns.available_tokens) == (30, 0, 0)
        second.end()
    assert (memory.used, turns.available_tokens) == (10, 0)
    first.end()
    assert (memory.used, turns.available_tokens) == (0, 1)


async def test_a_mail_that_is_cancelled_while_it_is_held_leaves_nothing() -> None:
    memory, turns = Memory(100), trio.CapacityLimiter(1)
    claim = Claim(memory, 10, turns)
    assert await claim.load()
    with trio.move_on_after(0):
        await claim.ask(trio.Event().wait())
    claim.end()
    assert (memory.used, memory.held, turns.available_tokens) == (0, 0, 1)


async def test_held_mails_leave_a_part_of_the_memory_to_the_others() -> None:
    memory, turns = Memory(100), trio.CapacityLimiter(1)
    claims = [Claim(memory, size, turns) for size in (90, 10)]
    assert await claims[0].load()  # the only one may have any size
    async with trio.open_nursery() as nursery:
        nursery.start_soon(claims[0].ask, trio.Event().wait())
        await trio.testing.wait_all_tasks_blocked()
        assert not await claims[1].load()
        claims[1].end()
        assert memory.used == 90
        nursery.cancel_scope.cancel()
    claims[0].end()
    assert memory.used == 0
