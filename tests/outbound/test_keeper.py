"""The keeper of rows: follows the file, and changes it for rules of the engine."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from mailerq.errors import RowError
from mailerq.outbound import keeper
from mailerq.outbound.keeper import Keeper
from mailerq.rules.row import PAUSE, SUPPRESSION, Row
from mailerq.rules.rows import NOBODY, Rows
from mailerq.store.row_file import FILE_NAME, RowFile
from tests.support import until

NOW = 1_800_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def open_keeper(directory: Path, clock: Clock) -> AsyncIterator[tuple[Keeper, list[Rows]]]:
    told: list[Rows] = []
    found = Keeper(str(directory), lambda rows: told.append(rows), clock=clock)
    await found.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.run)
        yield found, told
        nursery.cancel_scope.cancel()
    await found.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "LOOK_SECONDS", 0.01)


async def test_changes_of_others_are_in_force_soon_and_at_once_when_asked(tmp_path: Path) -> None:
    async with open_keeper(tmp_path, Clock()) as (found, _):
        assert found.rows is None
        other = RowFile(str(tmp_path), clock=Clock())
        other.add(Row(kind=PAUSE, tag="news"), who="ann")
        await found.look()
        assert found.rows is not None and list(found.rows.by_id) == [1]
        other.add(Row(kind=SUPPRESSION, code=550), ["ann@b.test"], who="ann")
        other.end([1], who="ann")
        await until(lambda: found.rows is not None and not found.rows.by_id)
        assert found.statistics() == {"pauses": 0, "errors": 0, "suppressed": 1}
        other.free(["ann@b.test"], who="ann")
        await until(lambda: found.rows is None)


async def test_rows_know_the_addresses_of_their_pools_and_follow_them(tmp_path: Path) -> None:
    told: list[Rows | None] = []
    keeper = Keeper(str(tmp_path), told.append, pools={"bulk": ("192.0.2.1",)}, clock=Clock())
    await keeper.open()
    await keeper.add(Row(kind=PAUSE, pool="bulk"), who="ann")

    def is_paused(ip: str) -> bool:
        assert told[-1] is not None
        return told[-1].flow_pause("", ip, NOBODY) is not None

    assert [is_paused("192.0.2.1"), is_paused("192.0.2.2")] == [True, False]
    keeper.change_pools({"bulk": ("192.0.2.2",)})
    assert [is_paused("192.0.2.1"), is_paused("192.0.2.2")] == [False, True]
    # While a thread changes the file, the rows are let alone.
    count = len(told)
    async with keeper._turn:
        keeper.change_pools({"bulk": ("192.0.2.3",)})
        assert len(told) == count
    await keeper.look()
    assert is_paused("192.0.2.3")


async def test_a_row_is_dropped_when_its_end_comes(tmp_path: Path) -> None:
    clock = Clock()
    async with open_keeper(tmp_path, clock) as (found, told):
        await found.add(Row(kind=PAUSE, tag="news", until=NOW + 60), who="ann")
        await found.add(Row(kind=PAUSE, tag="other", until=NOW + 90), who="ann")
        clock.now += 60
        await until(lambda: found.rows is not None and list(found.rows.by_id) == [2])
        clock.now += 60
        await until(lambda: found.rows is None)
        assert told[-1] is None


async def test_a_rule_keeps_what_it_has_decided_and_extends_it(tmp_path: Path) -> None:
    rule = Row(
        kind="slower", origin="responses.toml:7", provider="big", until=NOW + 60, hits=1,
        sample="421 too fast", values={"rate": 300},
    )  # fmt: skip
    async with open_keeper(tmp_path, Clock()) as (found, _):
        added = await found.add(rule, who="process 0")
        found.hits[added.id] = 4
        await found.change(added.id, who="process 0", until=NOW + 600, sample="421 still too fast")
    async with open_keeper(tmp_path, Clock()) as (found, _):
        (row,) = found.table
        assert (row.origin, row.values, row.hits) == ("responses.toml:7", {"rate": 300}, 5)
        assert (row.until, row.sample) == (NOW + 600, "421 still too fast")
        assert not await found.end([99], who="process 0")
        assert await found.end([row.id], who="process 0", why="the provider is well again")
        assert not found.table


async def test_rows_stay_in_force_while_their_file_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_keeper(tmp_path, Clock()) as (found, _):
        await found.add(Row(kind=PAUSE, tag="news"), who="ann")
        path = tmp_path / FILE_NAME
        path.rename(tmp_path / "aside")
        path.mkdir()
        await until(lambda: "stay as they were" in caplog.text)
        assert found.rows is not None
        with pytest.raises((OSError, RowError)):
            await found.add(Row(kind=PAUSE, tag="other"), who="ann")
        path.rmdir()
        os.rename(tmp_path / "aside", path)
        await found.add(Row(kind=PAUSE, tag="other"), who="ann")
        assert found.rows is not None and len(found.rows.by_id) == 2


async def test_a_file_that_is_damaged_while_it_is_in_force_is_set_aside_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_keeper(tmp_path, Clock()) as (found, _):
        await found.add(Row(kind=PAUSE, tag="news"), who="ann")
        await found.add(Row(kind=PAUSE, tag="other"), who="ann")
        edited = (tmp_path / FILE_NAME).read_bytes().replace(b"news", b"olds")
        (tmp_path / "edited").write_bytes(edited)
        os.rename(tmp_path / "edited", tmp_path / FILE_NAME)
        await until(lambda: "are damaged" in caplog.text)
        (kept,) = tmp_path.glob("rows.damaged-*")
        assert kept.read_bytes() == edited
        assert found.rows is not None and list(found.rows.by_id) == [2]


async def test_rows_that_are_gone_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_keeper(tmp_path, Clock()) as (found, _):
        assert not caplog.text
        await found.add(Row(kind=PAUSE, tag="news"), who="ann")
        (tmp_path / FILE_NAME).unlink()
        await until(lambda: found.rows is None)
        assert "gone" in caplog.text
    caplog.clear()
    async with open_keeper(tmp_path, Clock()):
        assert "missing or empty" in caplog.text


async def test_rows_come_back_with_the_clock(tmp_path: Path) -> None:
    clock = Clock()
    async with open_keeper(tmp_path, clock) as (found, _):
        await found.add(Row(kind=PAUSE, tag="news", until=NOW + 60), who="ann")
        clock.now += 3600
        await until(lambda: found.rows is None)
        clock.now -= 3600
        await until(lambda: found.rows is not None)


async def test_changes_of_others_are_in_force_after_a_change_that_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Keeper(str(tmp_path), lambda rows: None, clock=Clock())
    await found.open()
    RowFile(str(tmp_path), clock=Clock()).add(Row(kind=PAUSE, tag="news"), who="ann")

    def fail(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="space"):
            await found.add(Row(kind=PAUSE, tag="other"), who="ann")
    assert found.rows is not None and list(found.rows.by_id) == [1]


async def test_a_start_that_cannot_read_the_rows_fails_and_says_so(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(RowError, match="cannot be read"):
        await Keeper(str(tmp_path), lambda rows: None).open()
