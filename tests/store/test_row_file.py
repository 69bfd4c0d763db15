"""The file of rows: durable, followed by readers, shared by writers, never losing what is sound."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.errors import RowError
from mailerq.rules.row import ERROR, PAUSE, SUPPRESSION, Row
from mailerq.store import row_file
from mailerq.store.row_file import AUDIT_NAME, FILE_NAME, RowFile
from mailerq.store.table import Line, Table

NOW = 1_800_000_000.0

PAUSED = Row(kind=PAUSE, domain="b.test", reason="asked")
SUPPRESSED = Row(kind=SUPPRESSION, code=550, reason="complaints")


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rows(tmp_path: Path, clock: Clock) -> RowFile:
    return RowFile(str(tmp_path), clock=clock)


def reread(directory: Path, clock: Callable[[], float] = lambda: NOW) -> Table:
    return RowFile(str(directory), clock=clock).read()


def contents(table: Table) -> tuple[Any, ...]:
    return (
        table.rows,
        table.suppressions,
        table.addresses,
        table.domains,
        table.counts,
        table.hits,
        table.next_id,
    )


def audit(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / AUDIT_NAME).read_text().splitlines()]


def test_a_row_is_there_for_the_next_reader_with_its_id_time_and_author(
    tmp_path: Path, rows: RowFile
) -> None:
    added = rows.add(PAUSED, who="ann")
    assert (added.id, added.since, added.who) == (1, NOW, "ann")
    assert reread(tmp_path).rows == {1: added}


def test_each_change_is_a_line_of_the_audit_file(tmp_path: Path, rows: RowFile) -> None:
    rows.add(PAUSED, who="ann")
    rows.change(1, who="bob", why="longer", until=NOW + 60)
    rows.end([1], who="eve", why="done")
    rows.add(SUPPRESSED, [f"a{number}@b.test" for number in range(30)], who="ann")
    lines = audit(tmp_path)
    assert [(line["who"], line["action"], line["why"]) for line in lines] == [
        ("ann", "add", "asked"),
        ("bob", "change", "longer"),
        ("eve", "remove", "done"),
        ("ann", "add", "complaints"),
    ]
    assert lines[1]["rows"][0]["until"] == NOW + 60
    assert (lines[3]["count"], len(lines[3]["values"])) == (30, 10)


def test_a_row_that_is_over_is_dropped_and_its_id_is_not_used_again(
    tmp_path: Path, rows: RowFile, clock: Clock
) -> None:
    rows.add(Row(kind=PAUSE, tag="news", until=NOW + 10), who="ann")
    rows.add(Row(kind=SUPPRESSION, code=550, until=NOW + 10), ["ann@b.test", "c.test"], who="ann")
    clock.now += 10
    table = reread(tmp_path, clock)
    assert not (table.rows or table.suppressions or table.addresses or table.domains)
    assert rows.add(PAUSED, who="ann").id == 3


def test_what_is_suppressed_again_belongs_to_the_newest_row(rows: RowFile) -> None:
    rows.add(SUPPRESSED, ["ann@b.test", "bob@b.test"], who="ann")
    rows.add(SUPPRESSED, ["ann@b.test"], who="ann")
    assert rows.table.addresses["ann@b.test"].id == 2
    assert rows.end([2], who="ann")
    assert list(rows.table.addresses) == ["bob@b.test"]
    assert rows.free(["bob@b.test", "nobody@b.test"], who="ann") == ["bob@b.test"]
    assert not rows.table.suppressions


def test_hits_are_added_up_and_kept(tmp_path: Path, rows: RowFile) -> None:
    rows.add(PAUSED, who="ann")
    rows.note({1: 2, 99: 5})
    rows.note({1: 3})
    table = reread(tmp_path)
    assert table.shown(table.rows[1]).hits == 5
    assert len(audit(tmp_path)) == 1


changes = st.lists(
    st.one_of(
        st.tuples(st.just("pause"), st.sampled_from(["b.test", "c.test"])),
        st.tuples(st.just("suppress"), st.lists(st.sampled_from("abcd"), min_size=1, max_size=4)),
        st.tuples(st.just("free"), st.lists(st.sampled_from("abcd"), max_size=3)),
        st.tuples(st.just("end"), st.integers(1, 8)),
        st.tuples(st.just("hits"), st.integers(1, 8)),
        st.tuples(st.just("change"), st.integers(1, 8)),
        st.tuples(st.just("follow"), st.just(0)),
    ),
    max_size=20,
)


@given(changes, st.integers(0, 30))
def test_readers_and_writers_agree_whatever_changes_and_when_the_file_is_replaced(
    tmp_path_factory: pytest.TempPathFactory, changes: list[Any], spare: int
) -> None:
    directory = tmp_path_factory.mktemp("rows")
    writers = [RowFile(str(directory), clock=lambda: NOW) for _ in range(2)]
    follower = RowFile(str(directory), clock=lambda: NOW)
    rows: dict[int, str] = {}
    suppressed: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_file, "SPARE_LINES", spare)
        for number, (name, value) in enumerate(changes):
            writer = writers[number % 2]
            match name:
                case "pause":
                    rows[writer.add(Row(kind=PAUSE, domain=value), who="a").id] = value
                case "suppress":
                    values = [f"{each}@b.test" for each in value]
                    new = writer.add(SUPPRESSED, values, who="a").id
                    suppressed |= dict.fromkeys(values, new)
                case "free":
                    values = [f"{each}@b.test" for each in value]
                    writer.free(values, who="a")
                    suppressed = {k: v for k, v in suppressed.items() if k not in values}
                case "end":
                    writer.end([value], who="a")
                    rows.pop(value, None)
                    suppressed = {k: v for k, v in suppressed.items() if v != value}
                case "hits":
                    writer.note({value: 1})
                case "change":
                    writer.change(value, who="a", reason=f"{number}")
                case _:
                    follower.follow()
    table = reread(directory)
    assert {k: v.domain for k, v in table.rows.items()} == rows
    assert {k: v.id for k, v in table.addresses.items()} == suppressed
    assert set(table.suppressions) == set(suppressed.values())
    assert contents(follower.read()) == contents(table)
    assert not follower.is_behind()


def test_readers_see_nothing_of_a_line_that_is_being_written(tmp_path: Path, rows: RowFile) -> None:
    rows.add(PAUSED, who="ann")
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    reader = RowFile(str(tmp_path), clock=lambda: NOW)
    assert not reader.read().rows
    path.write_bytes(whole)
    assert list(reader.read().rows) == [1]
    assert not reader.damaged


def test_a_line_that_was_cut_by_a_crash_is_dropped_by_the_next_writer(
    tmp_path: Path, rows: RowFile
) -> None:
    rows.add(PAUSED, who="ann")
    path = tmp_path / FILE_NAME
    with path.open("ab") as file:
        file.write(b"01234567 {half of a li")
    writer = RowFile(str(tmp_path), clock=lambda: NOW)
    writer.add(Row(kind=PAUSE, tag="news"), who="ann")
    assert not list(tmp_path.glob("*damaged*"))
    assert list(reread(tmp_path).rows) == [1, 2]


@pytest.mark.parametrize("damage", [b"\0", b"\n", b"x"])
def test_a_damaged_file_is_kept_and_said_and_its_sound_lines_are_in_force(
    tmp_path: Path, rows: RowFile, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    for domain in ("a.test", "b.test", "c.test"):
        rows.add(Row(kind=PAUSE, domain=domain), who="ann")
    path = tmp_path / FILE_NAME
    data = path.read_bytes()
    middle = data.index(b"b.test")
    data = data[:middle] + damage + data[middle + 1 :]
    path.write_bytes(data)
    reader = RowFile(str(tmp_path), clock=lambda: NOW)
    assert {row.domain for row in reader.read().rows.values()} == {"a.test", "c.test"}
    assert reader.damaged and path.read_bytes() == data
    reader.add(Row(kind=PAUSE, domain="d.test"), who="ann")
    (kept,) = tmp_path.glob("rows.damaged-*")
    assert kept.read_bytes() == data
    assert str(kept) in caplog.text
    after = RowFile(str(tmp_path), clock=lambda: NOW)
    assert {row.domain for row in after.read().rows.values()} == {"a.test", "c.test", "d.test"}
    assert not after.damaged and max(after.table.rows) > 3


@given(st.binary(max_size=200))
def test_any_content_of_the_file_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    directory = tmp_path_factory.mktemp("rows")
    (directory / FILE_NAME).write_bytes(data)
    rows = RowFile(str(directory), clock=lambda: NOW)
    rows.read()
    rows.add(PAUSED, who="ann")
    assert [row.domain for row in reread(directory).rows.values()] == ["b.test"]


def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(row_file._format(Line(version=9)))
    with pytest.raises(RowError, match="newer"):
        RowFile(str(tmp_path)).read()
    with pytest.raises(RowError, match="newer"):
        RowFile(str(tmp_path)).add(PAUSED, who="ann")
    assert path.read_bytes() == row_file._format(Line(version=9))


def test_a_change_that_the_disk_does_not_take_is_not_made(
    tmp_path: Path, rows: RowFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows.add(PAUSED, who="ann")

    def fail(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="error"):
            rows.add(Row(kind=PAUSE, tag="news"), who="ann")
    assert list(rows.table.rows) == list(reread(tmp_path).rows) == [1]
    assert rows.add(Row(kind=PAUSE, tag="news"), who="ann").id == 2


def test_processes_that_write_at_a_time_lose_nothing(tmp_path: Path) -> None:
    program = """
        import sys
        from mailerq.rules.row import Row
        from mailerq.store import row_file
        row_file.SPARE_LINES = 3
        rows = row_file.RowFile(sys.argv[1])
        for number in range(40):
            row = rows.add(Row(kind="pause", tag=f"{sys.argv[2]}-{number}"), who="a")
            if number % 2:
                rows.end([row.id], who="a")
    """
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), str(number)]
        )
        for number in range(3)
    ]
    follower = RowFile(str(tmp_path))
    while any(writer.poll() is None for writer in writers):
        follower.follow()
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    wanted = {f"{writer}-{number}" for writer in range(3) for number in range(0, 40, 2)}
    assert {row.tag for row in reread(tmp_path).rows.values()} == wanted
    assert {row.tag for row in follower.read().rows.values()} == wanted
    assert len({row.id for row in follower.table.rows.values()}) == len(wanted)


def test_rows_and_addresses_are_bounded(rows: RowFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_file, "MAX_ROWS", 1)
    monkeypatch.setattr(row_file, "MAX_SUPPRESSED", 3)
    rows.add(PAUSED, who="ann")
    with pytest.raises(RowError, match="the most"):
        rows.add(Row(kind=ERROR, code=550), who="ann")
    rows.add(SUPPRESSED, ["a@b.test", "b@b.test", "c@b.test"], who="ann")
    rows.add(SUPPRESSED, ["a@b.test"], who="ann")
    with pytest.raises(RowError, match="more than 3"):
        rows.add(SUPPRESSED, ["d@b.test"], who="ann")


def test_many_addresses_are_added_with_few_lines(tmp_path: Path, rows: RowFile) -> None:
    rows.add(SUPPRESSED, (f"user{number}@b.test" for number in range(25_000)), who="ann")
    assert len((tmp_path / FILE_NAME).read_bytes().splitlines()) < 40
    assert len(reread(tmp_path).addresses) == 25_000
    assert rows.end([1], who="ann")
    assert not reread(tmp_path).addresses


def test_rows_are_gone_when_their_file_is(tmp_path: Path, rows: RowFile) -> None:
    rows.add(PAUSED, who="ann")
    (tmp_path / FILE_NAME).unlink()
    assert rows.is_behind()
    assert not rows.read().rows
    assert not rows.is_behind()


# Rows that a cluster shares


@pytest.fixture
def both(tmp_path: Path, clock: Clock) -> tuple[RowFile, RowFile]:
    """The files of two instances."""
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        found.append(RowFile(str(tmp_path / name), clock=clock, server=name))
    return found[0], found[1]


def give(one: RowFile, other: RowFile) -> int:
    """Have another instance take in what is new."""
    changes, one.table.recent = one.table.recent, []
    return other.merge(changes)


def test_a_shared_row_has_one_id_at_all_instances_and_local_ids_go_on(
    tmp_path: Path, both: tuple[RowFile, RowFile]
) -> None:
    one, other = both
    added = one.add(PAUSED, who="ann", shared=True)
    assert added.id >= 10**11
    assert one.add(PAUSED, who="ann").id == 1
    assert give(one, other) == 1
    assert other.table.rows == {added.id: added}
    assert reread(tmp_path / "b").rows == {added.id: added}
    assert give(one, other) == 0


def test_the_audit_line_of_a_shared_row_names_who_and_which_instance(
    tmp_path: Path, both: tuple[RowFile, RowFile]
) -> None:
    one, other = both
    row = one.add(PAUSED, who="ann", shared=True)
    one.change(row.id, who="bob", why="longer", until=NOW + 60)
    one.end([row.id], who="eve", why="done")
    assert give(one, other) == 3
    lines = audit(tmp_path / "b")
    assert [(each["who"], each["action"], each["server"]) for each in lines] == [
        ("ann", "add", "a"), ("bob", "change", "a"), ("eve", "remove", "a"),
    ]  # fmt: skip
    assert "server" not in audit(tmp_path / "a")[0]
    assert not other.table.rows


def test_either_instance_may_change_and_end_a_shared_row(
    both: tuple[RowFile, RowFile],
) -> None:
    one, other = both
    row = one.add(PAUSED, who="ann", shared=True)
    give(one, other)
    other.change(row.id, who="bob", until=NOW + 60)
    give(other, one)
    assert one.table.rows[row.id].until == NOW + 60
    one.end([row.id], who="ann")
    assert give(one, other) == 1
    assert not other.table.rows


def test_shared_suppressions_are_freed_one_by_one_and_by_their_row(
    tmp_path: Path, both: tuple[RowFile, RowFile]
) -> None:
    one, other = both
    names = [f"u{number}@b.test" for number in range(2100)]
    row = one.add(SUPPRESSED, names, who="ann", shared=True)
    give(one, other)
    assert other.table.suppressed == 2100
    other.add(SUPPRESSED, ["own@b.test"], who="bob")
    assert other.free(["u5@b.test", "own@b.test"], who="bob") == ["u5@b.test", "own@b.test"]
    give(other, one)
    assert one.table.suppressed == 2099
    assert "u5@b.test" not in one.table.addresses
    one.end([row.id], who="ann")
    give(one, other)
    for name in ("a", "b"):
        assert reread(tmp_path / name).suppressed == 0


def test_a_local_suppression_of_an_address_that_is_shared_stays_local(
    both: tuple[RowFile, RowFile],
) -> None:
    one, other = both
    one.add(SUPPRESSED, ["x@b.test"], who="ann", shared=True)
    give(one, other)
    own = other.add(SUPPRESSED, ["x@b.test"], who="bob")
    one.free(["x@b.test"], who="ann")
    give(one, other)
    assert other.table.addresses["x@b.test"].id == own.id


def test_a_file_that_is_written_anew_keeps_shared_rows_and_removals(
    tmp_path: Path, both: tuple[RowFile, RowFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_file, "SPARE_LINES", 3)
    one, other = both
    kept = one.add(PAUSED, who="ann", shared=True)
    ended = one.add(PAUSED, who="ann", shared=True)
    changes = list(one.table.recent)
    one.add(SUPPRESSED, ["x@b.test", "y@b.test"], who="ann", shared=True)
    one.free(["y@b.test"], who="ann")
    one.end([ended.id], who="ann")
    digest = one.table.shared.digest
    for _ in range(40):
        one.change(kept.id, who="ann", reason="again")
        one.note({kept.id: 1})
    again = RowFile(str(tmp_path / "a"), clock=lambda: NOW, server="a")
    table = again.read()
    assert again._lines < 40
    assert set(table.rows) == {kept.id}
    assert set(table.addresses) == {"x@b.test"}
    assert again.merge(changes) == 0  # the removed row stays removed
    assert table.shared.version == one.table.shared.version
    assert table.shared.digest == one.table.shared.digest != digest
    assert other.merge(table.shared.changes()) > 0
    assert other.table.shared.digest == table.shared.digest


def test_a_shared_row_that_is_over_is_dropped_and_not_taken_again(
    both: tuple[RowFile, RowFile], clock: Clock
) -> None:
    one, other = both
    row = msgspec.structs.replace(PAUSED, until=NOW + 10)
    one.add(row, who="ann", shared=True)
    changes = list(one.table.recent)
    clock.now += 11
    assert other.merge(changes) == 0
    one.read()
    assert not one.table.rows
    assert not one.table.shared.rows


def test_changes_that_cannot_be_used_are_logged_and_the_others_taken(
    both: tuple[RowFile, RowFile], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = both
    row = one.add(PAUSED, who="ann", shared=True)
    (change,) = one.table.recent
    bad = msgspec.structs.replace(change, row=msgspec.structs.replace(row, domain="a b"))
    late = msgspec.structs.replace(change, version=1 << 50)
    assert other.merge([bad, late, change]) == 1
    assert set(other.table.rows) == {row.id}
    assert "2 rows cannot be used, the last one of instance" in caplog.text
    # A flood of them makes few lines.
    for _ in range(1000):
        assert other.merge([bad]) == 0
    assert caplog.text.count("cannot be used") == 1
    clock.now += 61
    assert other.merge([bad]) == 0
    assert "1001 rows cannot be used" in caplog.text


def test_more_shared_rows_than_there_may_be_are_refused(
    both: tuple[RowFile, RowFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = both
    monkeypatch.setattr(row_file, "MAX_ROWS", 3)
    for _ in range(3):
        one.add(PAUSED, who="ann", shared=True)
    other.add(PAUSED, who="bob")
    assert give(one, other) == 2


def test_a_shared_row_needs_the_name_of_its_instance(tmp_path: Path, rows: RowFile) -> None:
    with pytest.raises(RowError, match="cluster-address"):
        rows.add(PAUSED, who="ann", shared=True)
    assert not reread(tmp_path).rows


def test_suppressions_of_a_damaged_shared_line_stay(
    tmp_path: Path, both: tuple[RowFile, RowFile]
) -> None:
    one, _ = both
    one.add(SUPPRESSED, ["x@b.test"], who="ann", shared=True)
    path = tmp_path / "a" / FILE_NAME
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    again = RowFile(str(tmp_path / "a"), clock=lambda: NOW, server="a")
    again.repair()
    assert set(reread(tmp_path / "a").addresses) == {"x@b.test"}
