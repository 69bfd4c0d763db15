"""Locks of queue directories: one holder, and a record of holders that died."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mailerq.errors import QueueError, QueueHeld
from mailerq.queues.ownership import DirectoryLock, wanted

NOW = 1_700_000_000.0


def die(lock: DirectoryLock) -> None:
    """Release as the kernel does when a holder dies: nothing is written."""
    os.close(lock.file.fd)


def test_one_process_has_a_directory_and_is_named_to_others(tmp_path: Path) -> None:
    lock = DirectoryLock.take(str(tmp_path))
    with pytest.raises(QueueHeld, match=f"held by another mailerq, process {os.getpid()};") as held:
        DirectoryLock.take(str(tmp_path))
    assert not held.value.adopted
    with pytest.raises(QueueHeld):
        DirectoryLock.adopt(str(tmp_path), NOW)
    lock.release()
    DirectoryLock.take(str(tmp_path)).release()


def test_the_own_process_is_told_that_its_share_is_adopted(tmp_path: Path) -> None:
    lock = DirectoryLock.adopt(str(tmp_path), NOW)
    with pytest.raises(QueueHeld) as held:
        DirectoryLock.take(str(tmp_path))
    assert held.value.adopted
    assert not lock.is_wanted()
    with wanted(str(tmp_path)):
        assert lock.is_wanted()
    assert not lock.is_wanted()
    lock.release()


def test_each_adopter_that_dies_doubles_the_time_until_the_next(tmp_path: Path) -> None:
    now = NOW
    for seconds in (60, 120, 240):
        die(DirectoryLock.adopt(str(tmp_path), now))
        with pytest.raises(QueueError, match=f"no process adopts it for {seconds} seconds"):
            DirectoryLock.adopt(str(tmp_path), now + seconds - 1)
        now += seconds
    DirectoryLock.adopt(str(tmp_path), now).release()


def test_the_quarantine_begins_at_once(tmp_path: Path) -> None:
    for part in (0.0, 0.5, 0.9):
        die(DirectoryLock.adopt(str(tmp_path), NOW + part))
        with pytest.raises(QueueError, match="1 processes ended soon"):
            DirectoryLock.adopt(str(tmp_path), NOW + part)
        (tmp_path / "queue.lock").unlink()


def test_the_own_process_may_always_try_and_keeps_the_count(tmp_path: Path) -> None:
    die(DirectoryLock.adopt(str(tmp_path), NOW))
    die(DirectoryLock.take(str(tmp_path)))
    with pytest.raises(QueueError, match="1 processes ended soon"):
        DirectoryLock.adopt(str(tmp_path), NOW + 59)
    lock = DirectoryLock.take(str(tmp_path))
    lock.prove()
    lock.release()
    DirectoryLock.adopt(str(tmp_path), NOW + 59).release()


def test_an_adoption_that_lasts_or_ends_in_order_counts_as_no_death(tmp_path: Path) -> None:
    DirectoryLock.adopt(str(tmp_path), NOW).release()
    lock = DirectoryLock.adopt(str(tmp_path), NOW)
    lock.prove()
    die(lock)
    DirectoryLock.adopt(str(tmp_path), NOW).release()


def test_a_clock_that_was_set_back_ends_a_quarantine(tmp_path: Path) -> None:
    die(DirectoryLock.adopt(str(tmp_path), NOW))
    DirectoryLock.adopt(str(tmp_path), NOW - 10).release()


@pytest.mark.parametrize("text", [b"", b"4711\n", b"\xff\0 x y z\n", b"1 adopted many 0\n"])
def test_whatever_the_file_says_the_lock_can_be_taken(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "queue.lock").write_bytes(text)
    DirectoryLock.take(str(tmp_path)).release()
    DirectoryLock.adopt(str(tmp_path), NOW).release()


def test_a_file_that_has_got_the_descriptor_of_a_lock_is_left_alone(tmp_path: Path) -> None:
    lock = DirectoryLock.adopt(str(tmp_path), NOW)
    other = tmp_path / "other"
    other.write_text("mail")
    os.close(lock.file.fd)  # as a plugin does whose count is wrong
    file = os.open(other, os.O_RDWR)
    assert file == lock.file.fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        lock.prove()
    with pytest.raises(OSError, match="Bad file descriptor"):
        lock.release()
    os.close(file)
    assert other.read_text() == "mail"
