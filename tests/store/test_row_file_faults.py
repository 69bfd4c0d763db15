"""The file of rows below crashes, damage, full disks and clocks that are set back."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import thread_time

import pytest

from mailerq.rules.row import PAUSE, SUPPRESSION, Row
from mailerq.store import row_file
from mailerq.store.row_file import AUDIT_NAME, FILE_NAME, RowFile
from mailerq.store.table import Line, Table
from tests.store.test_row_file import (
    NOW,
    PAUSED,
    SUPPRESSED,
    Clock,
    audit,
    clock,
    contents,
    reread,
    rows,
)

__all__ = ["clock", "rows"]


@contextmanager
def failing(name: str, number: int = 1, before: Callable[[], object] = lambda: 0) -> Iterator[None]:
    """The calls of a function of `os` fail from that number on, `before` is called then."""
    real, calls = getattr(os, name), 0

    def fail(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls < number:
            return real(*arguments)
        before()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, fail)
        yield


# Changes that the disk does not take

ROW_SYNC = 3
"""The syncs of a change: the audit file, the directory if that file is new, the rows."""


@pytest.mark.parametrize("tag", ["x", "held", "a longer name " * 9])
def test_a_reader_forgets_the_lines_that_were_taken_back(
    tmp_path: Path, rows: RowFile, tag: str
) -> None:
    rows.add(PAUSED, who="ann")
    reader = RowFile(str(tmp_path), clock=lambda: NOW)
    with failing("fsync", 2, before=reader.read), pytest.raises(OSError, match="space"):
        rows.add(Row(kind=PAUSE, tag="gone"), who="ann")
    assert len(reader.table.rows) == 2
    rows.add(Row(kind=PAUSE, tag=tag), who="ann")
    changed = os.stat(tmp_path / FILE_NAME).st_mtime_ns + 10**7
    os.utime(tmp_path / FILE_NAME, ns=(changed, changed))  # a clock that is not too coarse
    assert reader.is_behind()
    assert contents(reader.read()) == contents(reread(tmp_path))
    assert [row.tag for row in reader.table.rows.values()] == ["", tag]
    # The reader may be a writer too, and sees no damage.
    reader.add(PAUSED, who="bob")
    assert len(reread(tmp_path).rows) == 3
    assert not list(tmp_path.glob("*damaged*"))


@pytest.mark.parametrize("number", [1, 2])
def test_a_change_that_is_not_made_is_not_in_the_audit_file(
    tmp_path: Path, rows: RowFile, number: int
) -> None:
    rows.add(PAUSED, who="ann")
    with failing("fsync", number), pytest.raises(OSError, match="space"):
        rows.end([1], who="bob")
    assert [line["action"] for line in audit(tmp_path)] == ["add"]
    rows.end([1], who="eve")
    assert [line["who"] for line in audit(tmp_path)] == ["ann", "eve"]


def test_a_line_of_the_audit_file_that_a_crash_has_cut_spoils_no_other(
    tmp_path: Path, rows: RowFile
) -> None:
    rows.add(PAUSED, who="ann")
    path = tmp_path / AUDIT_NAME
    path.write_bytes(path.read_bytes()[:-9])
    rows.end([1], who="bob")
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1])["who"] == "bob"


def test_a_change_stays_made_when_the_file_cannot_be_written_anew(
    tmp_path: Path, rows: RowFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(row_file, "SPARE_LINES", 0)
    rows.add(PAUSED, who="ann")
    with failing("rename"):
        for number in range(9):
            assert rows.change(1, who="ann", reason=f"{number}") is not None
    assert reread(tmp_path).rows[1].reason == "8"
    assert "cannot be written anew" in caplog.text
    assert sorted(each.name for each in tmp_path.iterdir()) == [FILE_NAME, AUDIT_NAME]
    rows.change(1, who="ann", reason="small")
    assert len((tmp_path / FILE_NAME).read_bytes().splitlines()) == 2


def test_a_damaged_file_stays_as_it_is_while_the_disk_is_full(
    tmp_path: Path, rows: RowFile
) -> None:
    rows.add(PAUSED, who="ann")
    path = tmp_path / FILE_NAME
    path.write_bytes(damaged := path.read_bytes() + b"damage\n")
    with failing("rename"), pytest.raises(OSError, match="space"):
        RowFile(str(tmp_path)).add(PAUSED, who="ann")
    assert path.read_bytes() == damaged
    assert sorted(each.name for each in tmp_path.iterdir()) == [FILE_NAME, AUDIT_NAME]


# Damage


def cut(data: bytes) -> bytes:
    """A sector was lost."""
    at = data.index(b"user250")
    return data[: at - 6] + bytes(24) + data[at + 18 :]


def by_hand(data: bytes) -> bytes:
    return data.replace(b'["user0@', b'["more@b.test","user0@')


def flip(data: bytes) -> bytes:
    return data.replace(b"user250@", b"user2\xff0@")


def join(data: bytes) -> bytes:
    """The ends of lines are gone."""
    return data.rstrip(b"\n").replace(b"\n", b"\0") + b"\n"


@pytest.mark.parametrize("damage", [cut, by_hand, flip, join])
def test_what_can_be_read_of_suppressions_in_a_damaged_line_stays_suppressed(
    tmp_path: Path,
    rows: RowFile,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = [f"user{number}@b.test" for number in range(1500)] + ["gone.test"]
    rows.add(SUPPRESSED, names, who="ann")
    path = tmp_path / FILE_NAME
    path.write_bytes(damage(path.read_bytes()))
    reader = RowFile(str(tmp_path), clock=lambda: NOW)
    for table in (reader.read(), reread(tmp_path)):
        found = {*table.addresses, *table.domains}
        assert len({*names} - found) <= 3
        assert "gone.test" in table.domains
        assert {row.code for row in table.suppressions.values()} == {550}
        reader.repair()
        assert "are damaged" in caplog.text
    assert len(list(tmp_path.glob("rows.damaged-*"))) == 1


def test_a_damaged_line_that_is_no_suppression_suppresses_nobody(
    tmp_path: Path, rows: RowFile
) -> None:
    rows.add(Row(kind=PAUSE, domain="b.test", reason="ann@b.test"), who="ann")
    rows.free(["ann@b.test"], who="ann")
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes().replace(b"b.test", b"c.test"))
    table = reread(tmp_path)
    assert not (table.addresses or table.domains or table.rows)


def test_ids_of_rows_that_cannot_be_read_are_not_used_again(tmp_path: Path, rows: RowFile) -> None:
    """Mail waits for the end of a pause by its id."""
    rows.add(PAUSED, who="ann")
    rows.add(Row(kind=PAUSE, tag="news"), who="ann")
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes().replace(b"news", b"sewn"))
    assert RowFile(str(tmp_path), clock=lambda: NOW).add(PAUSED, who="ann").id > 2


# The clock, and many rows


def test_rows_are_in_force_again_when_the_clock_is_set_back_before_their_end(
    tmp_path: Path, rows: RowFile, clock: Clock
) -> None:
    rows.add(Row(kind=PAUSE, tag="news", until=NOW + 60), who="ann")
    rows.add(Row(kind=SUPPRESSION, code=550, until=NOW + 60), ["ann@b.test"], who="ann")
    reader = RowFile(str(tmp_path), clock=clock)
    clock.now += 3600
    assert not reader.read().rows and not reader.table.addresses
    assert not reader.is_behind()
    clock.now -= 3590
    assert reader.is_behind()
    assert list(reader.read().rows) == [1] and list(reader.table.addresses) == ["ann@b.test"]
    assert not reader.is_behind()


def test_the_end_of_many_suppressions_takes_one_look_at_all_addresses() -> None:
    table = Table()
    for number in range(1, 20_001):
        row = Row(id=number, kind=SUPPRESSION, code=550, until=NOW)
        table.apply(Line(row=row, values=[f"user{number}@b.test"]))
    began = thread_time()
    table.apply(Line(end=list(range(1, 10_001))))
    assert len(table.addresses) == 10_000
    table.expire(NOW)
    assert not table.addresses
    assert thread_time() - began < 1.0  # a look for each of them takes ten seconds
