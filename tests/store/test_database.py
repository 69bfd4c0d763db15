"""A small file for several processes: seen at once, whole after a crash, set aside if damaged."""

from __future__ import annotations

import logging
import multiprocessing
import os
from contextlib import suppress
from pathlib import Path

import apsw
import pytest

from mailerq.errors import StoreError
from mailerq.store.database import Database
from tests.support import public_directory

SCHEMA = "CREATE TABLE facts (name TEXT PRIMARY KEY, count INTEGER NOT NULL)"
ADD = "INSERT INTO facts VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET count = count + 1"


def salvage(old: apsw.Connection, new: apsw.Connection) -> int:
    saved = 0
    with suppress(apsw.Error):
        for name, count in old.execute("SELECT name, count FROM facts"):
            new.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (name, count))
            saved += 1
    return saved


def opened(directory: Path, **more: object) -> Database:
    return Database(str(directory / "facts"), SCHEMA, salvage=salvage, **more)  # type: ignore[arg-type]


def add(file: Database, name: str = "a") -> None:
    file.write(lambda connection: connection.execute(ADD, (name,)))


def facts(file: Database) -> dict[str, int]:
    return dict(file.read(lambda c: c.execute("SELECT name, count FROM facts").fetchall()))


def test_what_one_writes_the_other_reads_at_once(tmp_path: Path) -> None:
    one, two = opened(tmp_path), opened(tmp_path)
    add(one)
    assert facts(two) == {"a": 1}
    add(two)
    assert facts(one) == {"a": 2}
    assert (tmp_path / "facts").stat().st_mode & 0o777 == 0o640


def _add_many(directory: str) -> None:
    file = opened(Path(directory))
    for _ in range(50):
        add(file)
    file.close()


def test_processes_add_up(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_add_many, args=(str(tmp_path),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert facts(opened(tmp_path)) == {"a": 150}


def test_a_change_that_fails_leaves_nothing(tmp_path: Path) -> None:
    file = opened(tmp_path)

    def half(connection: apsw.Connection) -> None:
        connection.execute(ADD, ("b",))
        connection.execute("INSERT INTO nowhere VALUES (1)")

    with pytest.raises(StoreError, match="nowhere"):
        file.write(half)
    assert facts(file) == {}
    add(file)
    assert facts(file) == {"a": 1}


@pytest.mark.parametrize("damage", ["header", "page", "text", "cut"])
def test_a_damaged_file_is_set_aside_and_what_can_be_read_goes_on(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = opened(tmp_path)

    def fill(connection: apsw.Connection) -> None:
        for number in range(1000):
            connection.execute(ADD, (f"{number:04}" + "x" * 100,))

    file.write(fill)
    file.close()
    path = tmp_path / "facts"
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[:100] = b"\xff" * 100
    elif damage == "page":
        middle = len(content) // 2 // 4096 * 4096
        content[middle : middle + 4096] = b"\xff" * 4096
    elif damage == "text":
        content[:] = b"hello\n"
    else:
        del content[len(content) // 2 // 4096 * 4096 :]
    path.write_bytes(content)
    with caplog.at_level(logging.ERROR, logger="mailerq"):
        add(file, "new")
    assert facts(file)["new"] == 1
    (copy,) = [
        name
        for name in os.listdir(tmp_path)
        if name.startswith("facts.damaged-") and not name.endswith(("-wal", "-shm"))
    ]
    assert (tmp_path / copy).read_bytes() == content
    assert copy in caplog.text and "damaged" in caplog.text
    if damage == "page":
        assert len(facts(file)) > 1


def test_another_process_follows_to_the_new_file(tmp_path: Path) -> None:
    one, two = opened(tmp_path), opened(tmp_path)
    add(one)
    add(two)
    one.close()
    os.rename(tmp_path / "facts", tmp_path / "away")
    add(one)
    assert facts(one) == facts(two) == {"a": 1}


def test_a_file_of_a_newer_version_stays_alone(tmp_path: Path) -> None:
    add(opened(tmp_path, version=2))
    with pytest.raises(StoreError, match="another version"):
        add(opened(tmp_path))
    assert os.listdir(tmp_path) == ["facts"] or "facts" in os.listdir(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if "damaged" in name]


def test_a_missing_directory_is_an_error_and_a_later_one_is_used(tmp_path: Path) -> None:
    file = opened(tmp_path / "later")
    with pytest.raises(StoreError):
        add(file)
    with pytest.raises(StoreError):
        assert file.is_missing
    (tmp_path / "later").mkdir()
    add(file)
    assert facts(file) == {"a": 1}


def test_a_path_that_is_a_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "facts").mkdir()
    with pytest.raises(StoreError):
        add(opened(tmp_path))


def test_nothing_is_made_where_nothing_is_to_be_read(tmp_path: Path) -> None:
    file = opened(tmp_path)
    assert file.is_missing and not os.listdir(tmp_path)
    add(file)
    assert not file.is_missing


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file for another account")
def test_root_makes_the_file_for_the_owner_of_the_directory() -> None:
    with public_directory() as directory:
        os.chown(directory, 12345, 12345)
        file = opened(directory)
        add(file)
        for name in os.listdir(directory):
            assert (directory / name).stat().st_uid == 12345
        file.close()
