"""Log files: one line for each event, whatever is in it, and logrotate."""

from __future__ import annotations

import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio
import trio.testing

from mailerq.net.logs import LogFile, open_log


def test_a_line_has_its_date(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path / "log"), clock=lambda: 0.0)
    log.write("hello")
    log.close()
    assert (tmp_path / "log").read_text() == "[1970-01-01 00:00:00] hello\n"


def test_what_could_forge_a_line_is_escaped(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path / "log"), clock=lambda: 0.0)
    log.write("a\r\n[2026-01-01 00:00:00] forged\x1b[2J")
    log.close()
    text = (tmp_path / "log").read_text()
    assert text.count("\n") == 1
    assert "\\x0d\\x0a[2026" in text
    assert "\x1b" not in text


def test_a_file_that_was_moved_away_is_opened_anew(tmp_path: Path) -> None:
    now = 0.0
    path = tmp_path / "log"
    log = LogFile(str(path), clock=lambda: now)
    log.write("one")
    path.rename(tmp_path / "log.1")
    now = 10.0
    log.write("two")
    log.close()
    assert "one" in (tmp_path / "log.1").read_text()
    assert "two" in path.read_text()


def test_a_log_goes_on_although_its_descriptor_is_above_a_new_limit(tmp_path: Path) -> None:
    now = 0.0
    path = tmp_path / "log"
    lower = os.open(os.devnull, os.O_RDONLY)
    log = LogFile(str(path), clock=lambda: now)
    before = log._file
    os.close(lower)
    path.rename(tmp_path / "log.1")
    now = 10.0
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before, limits[1]))
    try:
        log.write("two")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    log.close()
    os.close(before)
    assert "two" in path.read_text()


def test_a_log_that_cannot_be_written_counts_and_goes_on(tmp_path: Path) -> None:
    log = LogFile("/dev/full")
    log.write("lost")
    assert log.lost_lines == 1
    log.close()


async def test_the_lines_of_a_turn_are_one_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[bytes] = []
    write = os.write

    def noted(file: int, data: bytes) -> int:
        writes.append(data)
        return write(file, data)

    path = tmp_path / "log"
    log = LogFile(str(path), clock=lambda: 0.0)
    monkeypatch.setattr(os, "write", noted)
    for turn in ("ab", "c"):
        for text in turn:
            log.write_soon(text)
        await trio.testing.wait_all_tasks_blocked()
    log.write_soon("d")
    monkeypatch.undo()
    log.close()
    assert [each.count(b"\n") for each in writes] == [2, 1]
    assert [line[-1] for line in path.read_text().splitlines()] == ["a", "b", "c", "d"]


def test_loops_of_several_threads_share_a_log(tmp_path: Path) -> None:
    """What one loop has collected does not wait for the turn of another, and nothing is lost."""
    path = tmp_path / "log"
    log = LogFile(str(path), clock=lambda: 0.0)
    both = threading.Barrier(2, timeout=20)

    async def write(name: str) -> None:
        for number in range(200):
            log.write_soon(f"{name}{number} first")
            both.wait()  # the other loop has a line of this turn too
            log.write_soon(f"{name}{number} second")
            await trio.testing.wait_all_tasks_blocked()
            mine = [line.split()[2:] for line in path.read_text().splitlines() if name in line]
            assert mine[-2:] == [[f"{name}{number}", "first"], [f"{name}{number}", "second"]]
            assert len(mine) == 2 * (number + 1)

    with ThreadPoolExecutor() as pool:
        for result in [pool.submit(trio.run, write, name) for name in "ab"]:
            result.result()
    log.close()
    assert log.lost_lines == 0


async def test_closing_writes_the_lines_of_the_turn(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogFile(str(path), clock=lambda: 0.0)
    log.write_soon("a")
    log.close()
    await trio.testing.wait_all_tasks_blocked()
    assert path.read_text().endswith("] a\n")


async def test_a_disk_that_is_full_within_a_turn_costs_the_lines_that_do_not_fit(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"
    log = LogFile(str(path), clock=lambda: 0.0)
    line = len("[1970-01-01 00:00:00] 0\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number in range(4):
        log.write_soon(str(number))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * line + 5, limits[1]))
    try:
        await trio.testing.wait_all_tasks_blocked()
        log.write("4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write("5")
    assert log.lost_lines == 3
    lines = path.read_text().splitlines()
    assert [len(text) for text in lines] == [line - 1, line - 1, 5, line - 1]
    assert [text[-1] for text in lines] == ["0", "1", "0", "5"]
    log.close()


def test_a_log_goes_on_in_another_file_under_the_same_descriptor(tmp_path: Path) -> None:
    """Another thread may be about to write to it."""
    one, two = tmp_path / "one", tmp_path / "two"
    log = LogFile(str(one))
    descriptor = log._file
    for text, path in (("a", str(two)), ("b", os.devnull), ("c", str(one)), ("d", str(one))):
        log.write(text)
        log.move(path, open_log(path))
        assert log._file == descriptor
    log.write("e")
    log.close()
    assert [line[-1] for line in one.read_text().splitlines()] == ["a", "d", "e"]
    assert [line[-1] for line in two.read_text().splitlines()] == ["b"]
