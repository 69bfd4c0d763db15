"""Locks on files: one holder, whom the file names, and no harm to a file of another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mailerq.locks import SHARED, FileLock, Held, holder_of, open_directory


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)


@pytest.mark.parametrize(
    ("text", "holder"),
    [("4711", "4711"), ("4711 adopted 2 7.5", "4711"), ("", "unknown"), ("\0 x", "unknown")],
)
def test_a_held_lock_names_its_holder(tmp_path: Path, text: str, holder: str) -> None:
    path = tmp_path / "lock"
    lock = FileLock(opened(path))
    lock.write("a longer text that is replaced")
    lock.write(text)
    assert lock.text == path.read_text() == f"{text}\n"
    with pytest.raises(Held) as held:
        FileLock(opened(path))
    assert held.value.holder == holder_of(opened(path)) == holder
    lock.close()
    lock.close()
    assert holder_of(opened(path)) is None
    FileLock(opened(path)).close()


def test_a_shared_lock_excludes_an_exclusive_one_only(tmp_path: Path) -> None:
    first = FileLock(open_directory(str(tmp_path)), SHARED)
    second = FileLock(open_directory(str(tmp_path)), SHARED)
    for lock in (first, second):
        with pytest.raises(Held):
            FileLock(open_directory(str(tmp_path)))
        lock.close()
    FileLock(open_directory(str(tmp_path))).close()


def test_a_file_is_closed_where_it_cannot_be_locked(tmp_path: Path) -> None:
    lock = FileLock(opened(tmp_path / "lock"))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(Held):
        FileLock(opened(tmp_path / "lock"))
    holder_of(opened(tmp_path / "lock"))
    assert os.listdir("/proc/self/fd") == before
    lock.close()


def test_a_file_that_has_got_the_descriptor_stays_open(tmp_path: Path) -> None:
    lock = FileLock(opened(tmp_path / "lock"))
    os.close(lock.fd)  # as a plugin does whose count is wrong
    other = opened(tmp_path / "other")
    assert other == lock.fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        lock.close()
    os.close(other)
