"""Cells: what one or several processes count together, in memory and in a file."""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.outbound import cells as module
from mailerq.outbound.cells import Busy, Cells, Count, MemoryCells, Rate, SharedCells, boot_time
from mailerq.rules.rates import MINUTE, SLACK, cost

SECOND = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now = 1_000 * MINUTE

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "limits.cells")


Make = Callable[[], Cells]


@pytest.fixture(params=["memory", "file", "file of two"])
def cells(request: pytest.FixtureRequest, clock: Clock, path: str) -> Cells:
    if request.param == "memory":
        return MemoryCells(clock)
    return SharedCells(path, processes=1 + (request.param == "file of two"), clock=clock)


# What all of them do.


def test_a_rate_lets_one_pass_and_names_the_time_for_the_next(cells: Cells, clock: Clock) -> None:
    want = Rate("a", cost(1, 60))
    assert cells.take([want]) is None
    first = Busy(0, clock.now + want.cost - SLACK)
    assert cells.take([want]) == first
    clock.now = first.until or 0
    assert cells.take([want]) is None
    assert cells.take([want]) == Busy(0, clock.now + want.cost)


def test_all_wants_are_tested_before_any_is_taken(cells: Cells, clock: Clock) -> None:
    assert cells.take([Count("b", 1)]) is None
    for _ in range(2):
        assert cells.take([Rate("a", SECOND), Count("c", 1), Count("b", 1)]) == Busy(2, None)
    assert cells.take([Rate("a", SECOND), Count("c", 1)]) is None
    assert cells.take([Count("d", 1), Rate("a", SECOND)]) == Busy(1, clock.now + SECOND - SLACK)
    assert cells.take([Count("d", 1)]) is None


def test_counts_are_given_back(cells: Cells) -> None:
    for _ in range(3):
        assert cells.take([Count("a", 2)]) is None
        assert cells.take([Count("a", 2)]) is None
        assert cells.take([Count("a", 2)]) == Busy(0, None)
        cells.release(["a", "a"])


def test_a_cost_of_nothing_only_asks(cells: Cells, clock: Clock) -> None:
    for _ in range(3):
        assert cells.take([Rate("a", 0)]) is None
    assert cells.take([Rate("a", 5 * SECOND)]) is None
    assert cells.take([Rate("a", 0)]) == Busy(0, clock.now + 5 * SECOND - SLACK)


def test_what_is_used_is_what_was_taken_and_not_given_back(cells: Cells) -> None:
    assert cells.used("a") == 0
    for number in range(3):
        assert cells.take([Count("a", 3)]) is None
        assert cells.used("a") == number + 1
    cells.release(["a", "a"])
    assert cells.used("a") == 1


def test_keys_count_apart(cells: Cells) -> None:
    assert all(cells.take([Rate(key, MINUTE), Count(f"{key} n", 1)]) is None for key in "abcdef")
    assert all(cells.take([Rate(key, MINUTE)]) is not None for key in "abcdef")


# Several processes.


def test_processes_count_together(path: str, clock: Clock) -> None:
    one, two = (SharedCells(path, number, 2, clock) for number in range(2))
    assert one.take([Rate("a", SECOND), Count("n", 2)]) is None
    assert two.take([Rate("a", SECOND)]) == Busy(0, clock.now + SECOND - SLACK)
    assert two.take([Count("n", 2)]) is None
    assert one.take([Count("n", 2)]) == two.take([Count("n", 2)]) == Busy(0, None)
    one.release(["n"])
    assert two.take([Count("n", 2)]) is None


@given(st.integers(1, 5), st.randoms(use_true_random=False))
def test_any_order_of_processes_keeps_the_limit(limit: int, dice: random.Random) -> None:
    clock = Clock()
    path = f"/dev/shm/mailerq-test-{os.getpid()}.cells"
    Path(path).unlink(missing_ok=True)
    try:
        processes = [SharedCells(path, number, 3, clock) for number in range(3)]
        held = [0, 0, 0]
        for _ in range(60):
            who = dice.randrange(3)
            match dice.randrange(3):
                case 0 if held[who]:
                    processes[who].release(["n"])
                    held[who] -= 1
                case 1:
                    processes[who].close()
                    processes[who] = SharedCells(path, who, 3, clock)
                    held[who] = 0
                case _:
                    taken = processes[who].take([Count("n", limit)]) is None
                    assert taken == (sum(held) < limit)
                    held[who] += taken
        for each in processes:
            each.close()
    finally:
        Path(path).unlink()


def test_each_process_sees_what_all_use(path: str, clock: Clock) -> None:
    one, other = (SharedCells(path, process=number, processes=2, clock=clock) for number in (0, 1))
    assert one.take([Count("a", 3)]) is None
    assert other.take([Count("a", 3)]) is None
    assert (one.used("a"), other.used("a")) == (2, 2)
    assert (one.held("a"), other.held("a")) == (1, 1)
    one.release(["a"])
    assert other.used("a") == 1


def test_a_process_that_died_leaves_nothing_behind_once_its_successor_runs(
    path: str, clock: Clock
) -> None:
    one, dead = (SharedCells(path, number, 2, clock) for number in range(2))
    assert dead.take([Count("n", 1), Rate("a", MINUTE)]) is None
    assert one.take([Count("n", 1)]) == Busy(0, None)
    successor = SharedCells(path, 1, 2, clock)
    assert successor.take([Count("other", 1)]) is None
    assert one.take([Count("n", 1)]) is None
    assert one.take([Rate("a", MINUTE)]) is not None


def test_rates_survive_a_restart_with_another_number_of_processes(path: str, clock: Clock) -> None:
    before = SharedCells(path, 0, 2, clock)
    assert before.take([Rate("a", MINUTE), Count("n", 1)]) is None
    after = SharedCells(path, 0, 3, clock)
    assert after.take([Rate("a", MINUTE)]) == Busy(0, clock.now + MINUTE - SLACK)
    assert after.take([Count("n", 1)]) is None


def test_a_file_of_another_boot_begins_anew(
    path: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SharedCells(path, clock=clock).take([Rate("a", MINUTE)]) is None
    monkeypatch.setattr(module, "_boot", lambda: b"b" * 16)
    assert SharedCells(path, clock=clock).take([Rate("a", MINUTE)]) is None


def test_rows_at_rest_are_dropped_and_others_notice(
    path: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 8)
    one, two = (SharedCells(path, number, 2, clock) for number in range(2))
    assert two.take([Rate("kept", 3 * MINUTE), Count("n", 1)]) is None
    for number in range(100):
        assert one.take([Rate(f"a{number}", SECOND)]) is None
        clock.now += SECOND
    assert os.stat(path).st_size < 20 * 32
    assert two.take([Rate("kept", MINUTE)]) is not None
    assert one.take([Count("n", 1)]) == two.take([Count("n", 1)]) == Busy(0, None)
    two.release(["n"])
    assert one.take([Count("n", 1)]) is None


# Faults.


@pytest.mark.parametrize("damage", [b"", b"x", b"x" * 4096, "cut", "rows", "processes", "odd"])
def test_a_damaged_file_begins_anew_with_the_numbers_of_those_that_run(
    path: str, clock: Clock, damage: bytes | str, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = (SharedCells(path, number, 2, clock) for number in range(2))
    assert one.take([Count("n", 2), Rate("a", MINUTE)]) is None
    assert two.take([Count("n", 2)]) is None
    data = bytearray(Path(path).read_bytes())
    if damage == "cut":
        del data[100:]
    elif damage == "rows":
        data[32:40] = b"\xff" * 8
    elif damage == "processes":
        data[24:28] = b"\xff" * 4
    elif damage == "odd":
        data[28] |= 1
    else:
        assert isinstance(damage, bytes)
        data[:] = damage
    with open(path, "r+b") as file:
        file.truncate(0)
        file.write(data)
    for each in (two, one, two):
        assert each.take([Count("n", 0)]) is not None
    assert one.take([Count("n", 2)]) == Busy(0, None)
    assert two.take([Count("n", 2)]) == Busy(0, None)
    said = f"{path} is damaged" in caplog.text
    assert said == (damage not in (b"", "odd"))


def test_a_file_that_is_deleted_begins_anew(path: str, clock: Clock) -> None:
    one, two = (SharedCells(path, number, 2, clock) for number in range(2))
    assert one.take([Count("n", 1)]) is None
    os.unlink(path)
    one.take([Rate("b", 0)])
    assert two.take([Count("n", 1)]) == Busy(0, None)


def test_a_file_that_cannot_be_used_leaves_each_process_its_part(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "directory" / "limits.cells"
    cells = SharedCells(str(path), 0, 2, clock)
    assert cells.take([Rate("a", SECOND), Count("n", 4)]) is None
    assert cells.take([Rate("a", SECOND)]) == Busy(0, clock.now + 2 * SECOND - SLACK)
    assert cells.take([Count("n", 4)]) is None
    assert cells.take([Count("n", 4)]) == Busy(0, None)
    cells.release(["n"])
    assert cells.take([Count("n", 4)]) is None
    assert len(caplog.records) == 1
    assert f"cannot count limits in {path}: No such file" in caplog.text
    path.parent.mkdir()
    clock.now += 10 * SECOND
    assert cells.take([Rate("a", SECOND)]) is None
    assert path.exists()


def test_a_process_that_keeps_the_lock_does_not_stop_the_others(path: str, clock: Clock) -> None:
    cells = SharedCells(path, 0, 2, clock)
    assert cells.take([Count("n", 1)]) is None
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cells.take([Rate("a", 1)]) == Busy(0, clock.now + 2_000_000)
        cells.release(["n"])
    other = SharedCells(path, 1, 2, clock)
    assert other.take([Count("n", 1)]) == Busy(0, None)
    assert cells.take([Rate("a", 1)]) is None
    assert other.take([Count("n", 1)]) is None


def test_a_descriptor_that_became_another_file_is_left_alone(
    path: str, clock: Clock, tmp_path: Path
) -> None:
    cells = SharedCells(path, 0, 2, clock)
    assert cells.take([Rate("a", MINUTE)]) is None
    other = tmp_path / "precious"
    other.write_bytes(b"precious" * 100)
    with open(other, "r+b") as file:
        os.dup2(file.fileno(), cells._file)
    assert cells.take([Rate("a", MINUTE)]) is not None
    assert cells.take([Rate("b", MINUTE)]) is None
    assert other.read_bytes() == b"precious" * 100


def test_the_clock_is_shared_by_all_processes_of_a_boot() -> None:
    code = "from mailerq.outbound.cells import boot_time; print(boot_time())"
    first = boot_time()
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert first < int(other.stdout) < boot_time()


def test_one_process_writes_nothing_for_connections(path: str, clock: Clock) -> None:
    cells = SharedCells(path, clock=clock)
    assert cells.take([Count("n", 1)]) is None
    cells.release(["n"])
    assert not os.path.exists(path)
