"""The file of rows after kill -9 and after a power cut, at any of its writes.

Each call that changes a file or the directory is recorded. From the record the directory is rebuilt
as a crash may leave it: after a kill all calls so far have happened; after a power cut only what
was synced is sure, and of the rest any part may be there.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from mailerq.rules.row import PAUSE, SUPPRESSION, Row
from mailerq.store import row_file
from mailerq.store.row_file import AUDIT_NAME, RowFile
from mailerq.store.table import Table

NOW: Final = 1_800_000_000.0
SECTOR_BYTES: Final = 512
CHANGES: Final = 25


@dataclass
class Disk:
    """Files by their numbers, names, and what may not be on the disk yet."""

    files: dict[int, bytearray] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    writes: list[tuple[int, int, bytes | None]] = field(default_factory=list)
    moves: list[tuple[str, str, int]] = field(default_factory=list)

    def write(self, file: int, offset: int, data: bytes | None) -> None:
        content = self.files.setdefault(file, bytearray())
        del content[offset if data is None else len(content) :]
        content.extend(bytes(max(offset - len(content), 0)))
        if data:
            content[offset : offset + len(data)] = data

    def move(self, old: str, new: str, file: int) -> None:
        self.names.pop(old, None)
        if new:
            self.names[new] = file

    def sync(self, file: int) -> None:
        for write in [write for write in self.writes if write[0] == file]:
            self.write(*write)
        self.writes = [write for write in self.writes if write[0] != file]

    def sync_directory(self) -> None:
        for move in self.moves:
            self.move(*move)
        self.moves.clear()

    def kill(self, dice: random.Random) -> None:
        if self.writes and (data := self.writes[-1][2]) and dice.random() < 0.5:
            file, offset, _ = self.writes.pop()
            self.writes.append((file, offset, data[: dice.randrange(len(data))]))
        for write in self.writes:
            self.write(*write)
        self.sync_directory()

    def cut(self, dice: random.Random) -> None:
        for move in self.moves[: dice.randint(0, len(self.moves))]:
            self.move(*move)
        for file, offset, data in self.writes:
            luck = dice.random()
            if luck < 0.3:
                continue
            if data and luck < 0.7:
                kept = data[: dice.randrange(len(data))]
                if luck < 0.5:  # the size has come to the disk, and not all of the content
                    kept = kept[: len(kept) // SECTOR_BYTES * SECTOR_BYTES]
                    kept += bytes(len(data) - len(kept))
                data = kept
            self.write(file, offset, data)

    def save(self, target: Path) -> None:
        target.mkdir()
        for name, file in self.names.items():
            (target / name).write_bytes(self.files.get(file, b""))


Step = Callable[[Disk], object]


@contextmanager
def recorded(steps: list[Step]) -> Iterator[None]:
    """Record what is done to files, as steps that do the same to a `Disk`."""

    numbers: dict[int, int] = {}

    def number(file: int) -> int:
        """A number that no other file has, as the number of an inode may be used again."""
        return numbers[os.fstat(file).st_ino]

    def name(path: str) -> str:
        return os.path.basename(path)

    def open_(path: str, flags: int, mode: int = 0o777) -> int:
        is_new = flags & os.O_CREAT and not os.path.exists(path)
        file = real.open(path, flags, mode)
        if is_new or os.path.isdir(path):
            numbers[os.fstat(file).st_ino] = len(steps)
        found = number(file)
        if is_new:
            steps.append(lambda disk: disk.moves.append(("", name(path), found)))
        elif flags & os.O_TRUNC:
            steps.append(lambda disk: disk.writes.append((found, 0, None)))
        return file

    def write(file: int, data: bytes) -> int:
        found, offset = number(file), os.fstat(file).st_size
        steps.append(lambda disk: disk.writes.append((found, offset, data)))
        return real.write(file, data)

    def truncate(file: int, size: int) -> None:
        found = number(file)
        steps.append(lambda disk: disk.writes.append((found, size, None)))
        real.ftruncate(file, size)

    def sync(file: int) -> None:
        found, is_file = number(file), not os.path.isdir(f"/proc/self/fd/{file}")
        steps.append(lambda disk: disk.sync(found) if is_file else disk.sync_directory())
        real.fsync(file)

    def rename(old: str, new: str) -> None:
        found = numbers[os.stat(old).st_ino]
        steps.append(lambda disk: disk.moves.append((name(old), name(new), found)))
        real.rename(old, new)

    class real:
        open = staticmethod(os.open)
        write = staticmethod(os.write)
        ftruncate = staticmethod(os.ftruncate)
        fsync = staticmethod(os.fsync)
        rename = staticmethod(os.rename)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", open_)
        patch.setattr(os, "write", write)
        patch.setattr(os, "ftruncate", truncate)
        patch.setattr(os, "fsync", sync)
        patch.setattr(os, "rename", rename)
        yield


def said(table: Table) -> set[tuple[str, str]]:
    """What a table says, one fact for each row and for each suppressed address."""
    return {(row.tag, row.reason) for row in table.rows.values()} | {
        (value, "") for value, _ in table.values()
    }


def change(rows: RowFile, number: int, dice: random.Random) -> None:
    known = [*rows.table.rows, *rows.table.suppressions]
    kinds = ["pause", "pause", "suppress", "suppress", "end", "free", "change", "hits"]
    match dice.choice(kinds if number else ["pause"]):
        case "pause":
            rows.add(Row(kind=PAUSE, tag=f"tag{number}"), who="ann")
        case "suppress":
            count = dice.choice([1, 30, 1500])
            names = [f"user{number}-{each}@b.test" for each in range(count)]
            rows.add(Row(kind=SUPPRESSION, code=550), names, who="ann")
        case "end" if known:
            rows.end([dice.choice(known)], who="ann")
        case "free":
            rows.free(list(rows.table.addresses)[:3], who="ann")
        case "change" if rows.table.rows:
            rows.change(dice.choice([*rows.table.rows]), who="ann", reason=f"{number}")
        case _:
            rows.note(dict.fromkeys(known, 1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("crash", ["kill", "cut"])
def test_what_was_confirmed_is_there_after_a_crash_at_any_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: str, seed: int
) -> None:
    monkeypatch.setattr(row_file, "SPARE_LINES", -10)  # the file is replaced often
    dice = random.Random(seed)
    (tmp_path / "queue").mkdir()
    rows = RowFile(str(tmp_path / "queue"), clock=lambda: NOW)
    steps: list[Step] = []
    confirmed: list[tuple[int, set[tuple[str, str]], int]] = [(0, set(), 0)]
    with recorded(steps):
        for number in range(CHANGES):
            change(rows, number, dice)
            lines = (tmp_path / "queue" / AUDIT_NAME).read_bytes().count(b"\n")
            confirmed.append((len(steps), said(rows.table), lines))
    assert sum(step_name(step) == "rename" for step in steps) > 1
    for end in range(1, len(steps)):
        disk = Disk()
        for step in steps[:end]:
            step(disk)
        getattr(disk, crash)(dice)
        target = tmp_path / f"{end}"
        disk.save(target)
        before = [each for each in confirmed if each[0] <= end][-1]
        after = next((each for each in confirmed if each[0] > end), before)
        found = RowFile(str(target), clock=lambda: NOW)
        sure, possible = before[1] & after[1], before[1] | after[1]
        assert sure <= said(found.read()) <= possible
        found.add(Row(kind=PAUSE, tag="last"), who="eve")
        (again := RowFile(str(target), clock=lambda: NOW)).read()
        assert sure <= said(again.table) - {("last", "")} <= possible
        assert not again.damaged
        if crash == "kill":
            assert not list(target.glob("*damaged*"))
        assert sound_lines(target / AUDIT_NAME) > before[2]


def step_name(step: Step) -> str:
    return step.__qualname__.split(".")[-3]


def sound_lines(path: Path) -> int:
    found: list[Any] = []
    for line in path.read_bytes().split(b"\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return len(found)
