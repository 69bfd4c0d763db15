"""The file of MTA-STS policies: what it keeps, what it forgets, and never a changed policy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import apsw
import pytest

from mailerq.store import sts_file
from mailerq.store.sts_file import EXPIRED_SECONDS, UNUSED_SECONDS, Entry, StsFile

DAY = 86400.0


@dataclass
class Clock:
    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def entry(clock: Clock, domain: str = "d.example", number: str = "1", text: bytes = b"x") -> Entry:
    return Entry(
        domain=domain, id=number, text=text, fetched=clock.now, expires=clock.now + 7 * DAY,
        used=clock.now, next=clock.now + DAY,
    )  # fmt: skip


def test_a_policy_is_there_after_a_restart(tmp_path: Path, clock: Clock) -> None:
    file = StsFile(str(tmp_path), clock=clock)
    assert file.get("d.example") is None
    file.keep(entry(clock))
    file.close()
    assert StsFile(str(tmp_path), clock=clock).get("d.example") == entry(clock)


def test_a_failed_fetch_leaves_the_policy_and_a_good_one_ends_it(
    tmp_path: Path, clock: Clock
) -> None:
    file = StsFile(str(tmp_path), clock=clock)
    file.keep(entry(clock))
    file.failed("d.example", "2", "status 404", clock.now + 60)
    found = file.get("d.example")
    assert found is not None and (found.id, found.text) == ("1", b"x")
    assert (found.failed_id, found.failed, found.problem) == ("2", clock.now, "status 404")
    file.keep(entry(clock, number="2", text=b"y"))
    assert file.get("d.example") == entry(clock, number="2", text=b"y")


def test_a_failure_without_a_policy_is_remembered_for_a_day(tmp_path: Path, clock: Clock) -> None:
    file = StsFile(str(tmp_path), clock=clock)
    file.failed("d.example", "2", "status 404", clock.now + 60)
    found = file.get("d.example")
    assert found is not None and found.text == b"" and found.failed_id == "2"
    assert not file.due(10)
    clock.now += DAY + 1
    assert file.forget() == 1 and file.get("d.example") is None


def test_policies_that_are_due_come_most_urgent_first(tmp_path: Path, clock: Clock) -> None:
    file = StsFile(str(tmp_path), clock=clock)
    for number, domain in enumerate(("a", "b", "c")):
        file.keep(
            Entry(
                domain=domain,
                text=b"x",
                expires=clock.now + 90 * DAY,
                used=clock.now,
                next=clock.now + 10 - number,
            )
        )
    assert not file.due(10)
    clock.now += 9
    assert [each.domain for each in file.due(10)] == ["c", "b"]
    assert [each.domain for each in file.due(1)] == ["c"]
    file.postpone("c", clock.now + 100)
    assert [each.domain for each in file.due(10)] == ["b"]


def test_unused_and_long_expired_policies_are_forgotten(tmp_path: Path, clock: Clock) -> None:
    file = StsFile(str(tmp_path), clock=clock)
    start = clock.now
    file.keep(Entry(domain="used", text=b"x", expires=start + 999 * DAY, used=start))
    file.keep(Entry(domain="idle", text=b"x", expires=start + 999 * DAY, used=start))
    file.keep(Entry(domain="over", text=b"x", expires=start + DAY, used=start))
    clock.now = start + DAY + EXPIRED_SECONDS + 1
    file.use("used")
    assert file.forget() == 1 and file.get("over") is None
    clock.now = start + UNUSED_SECONDS + 1
    assert file.forget() == 1
    assert [each.domain for each in file.entries()] == ["used"]


def test_beyond_the_bounds_expired_policies_go_before_unused_ones(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sts_file, "MAX_ROWS", 3)
    file = StsFile(str(tmp_path), clock=clock)
    file.keep(Entry(domain="old", text=b"x", expires=clock.now + DAY, used=clock.now - 5))
    file.keep(Entry(domain="over", text=b"x", expires=clock.now - 1, used=clock.now))
    file.keep(Entry(domain="new", text=b"x", expires=clock.now + DAY, used=clock.now))
    file.keep(Entry(domain="newer", text=b"x", expires=clock.now + DAY, used=clock.now))
    assert file.forget() == 1
    assert [each.domain for each in file.entries()] == ["new", "newer", "old"]
    monkeypatch.setattr(sts_file, "MAX_BYTES", 2)
    assert file.forget() == 1
    assert [each.domain for each in file.entries()] == ["new", "newer"]


def test_one_or_all_are_removed(tmp_path: Path, clock: Clock) -> None:
    file = StsFile(str(tmp_path), clock=clock)
    for domain in ("a", "b", "c"):
        file.keep(entry(clock, domain))
    assert (file.remove("a"), file.remove("a"), file.remove(None)) == (1, 0, 2)
    assert not file.entries()


def test_pages_of_entries_follow_each_other(tmp_path: Path, clock: Clock) -> None:
    file = StsFile(str(tmp_path), clock=clock)
    for domain in ("a", "b", "c"):
        file.keep(entry(clock, domain))
    first = file.entries(limit=2)
    rest = file.entries(first[-1].domain, 2)
    assert [each.domain for each in (*first, *rest)] == ["a", "b", "c"]


def test_a_changed_policy_is_none(tmp_path: Path, clock: Clock) -> None:
    file = StsFile(str(tmp_path), clock=clock)
    file.keep(entry(clock, text=b"mx: good.example"))
    file.close()
    with apsw.Connection(str(tmp_path / "sts-policies")) as connection:
        connection.execute("UPDATE policies SET text = ?", (b"mx: evil.example",))
    assert file.get("d.example") is None and not file.entries()
    file.keep(entry(clock))
    assert file.get("d.example") == entry(clock)


def test_sound_policies_survive_a_damaged_page(tmp_path: Path, clock: Clock) -> None:
    file = StsFile(str(tmp_path), clock=clock)
    for number in range(200):
        file.keep(entry(clock, f"d{number:03}.example", text=b"x" * 1000))
    file.close()
    path = tmp_path / "sts-policies"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = b"\xff" * 4096
    path.write_bytes(content)
    found = file.entries()
    assert 20 < len(found) < 201 and all(each.text == b"x" * 1000 for each in found)
    assert any("damaged" in name for name in os.listdir(tmp_path))
