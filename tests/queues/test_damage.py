"""Damaged queue files: the start continues with the readable part and deletes nothing."""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest
import trio

from mailerq.errors import QueueDamaged, QueueError
from mailerq.message import Message
from mailerq.queues import DAMAGED_QUEUE, Publication, Settlement
from mailerq.queues.embedded.layout import LAYOUT, PAGE_SIZE
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.records import Batch
from mailerq.queues.opening import open_embedded, open_exclusive, open_shared
from mailerq.queues.recovery.pages import Pages
from mailerq.queues.recovery.salvage import ROOTS
from mailerq.rules.selection import Selection

COUNT = 400

Body = bytes | None
Damage = Callable[[Path], None]


def body_of(number: int) -> Body:
    """Bodies of many sizes: none, in a page, over several pages."""
    if number % 7 == 0:
        return None
    return random.Random(number).randbytes((number * 397) % 30_000)


def publications(count: int = COUNT) -> list[Publication]:
    return [
        Publication(
            ("outbox", "results")[number % 2],
            Message({"tag": number, "recipient": f"r{number}@example.test"}, body_of(number)),
            1e9 + number,
        )
        for number in range(1, count + 1)
    ]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound queue, closed; deletions have left free pages, and some share a body."""
    directory = tmp_path_factory.mktemp("filled")
    with open_exclusive(str(directory)) as store:
        gone = store.publish(
            Publication("outbox", Message({"tag": -1}, bytes(9000 + step))) for step in range(150)
        )
        for publication in publications():
            store.publish([publication])
        shared = random.Random(0).randbytes(20_000)
        store.publish(
            Publication("outbox", Message({"tag": tag}, shared), 1e9) for tag in (1001, 1002)
        )
        store.remove(gone)
    return directory


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound queue as kill -9 leaves it: nearly all of it is in the write-ahead log."""
    directory = tmp_path_factory.mktemp("killed")
    copy = tmp_path_factory.mktemp("copy")
    with open_exclusive(str(directory)) as store:
        store.connection.wal_autocheckpoint(0)
        for publication in publications():
            store.publish([publication])
        for name in ("queue.db", "queue.db-wal"):
            shutil.copy(directory / name, copy / name)
    return copy


@pytest.fixture
def directory(tmp_path: Path, filled: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "queue"))


@pytest.fixture
def killed_directory(tmp_path: Path, killed: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "queue"))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def pages_of(directory: Path, table: str) -> list[int]:
    with QueueFile.open(str(directory)) as store:
        found = store.connection.execute(
            "SELECT pageno FROM dbstat WHERE name = ? AND pagetype = 'leaf' ORDER BY pageno",
            (table,),
        ).fetchall()
    return [int(str(row[0])) for row in found]


def content(directory: Path) -> dict[int, tuple[str, float, Body]]:
    """The contents of the queues, without the damaged: queue, due and body by tag."""
    with QueueFile.open(str(directory)) as store:
        found = {}
        for queue in ("outbox", "results"):
            for entry in store.browse(queue, limit=10_000):
                tag = entry.message.properties["tag"]
                assert tag not in found
                found[tag] = (queue, entry.due, entry.message.body)
        return found


def expected() -> dict[int, tuple[str, float, Body]]:
    return {
        publication.message.properties["tag"]: (
            publication.queue,
            publication.due or 0,
            publication.message.body,
        )
        for publication in publications()
    }


def start(directory: Path) -> None:
    open_exclusive(str(directory)).close()


def kept(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("queue.db.damaged-*"))


def check_salvaged(directory: Path, at_least: int) -> dict[int, tuple[str, float, Body]]:
    """Start, and check that the contents are right, and at least `at_least` messages."""
    before = (directory / "queue.db").read_bytes() if (directory / "queue.db").exists() else None
    start(directory)
    names = kept(directory)
    if before is not None:
        assert (directory / names[0]).read_bytes() == before
    found = content(directory)
    right = expected()
    for tag, value in found.items():
        if tag < 1000:
            assert value == right[tag]
    assert sum(tag < 1000 for tag in found) >= at_least
    start(directory)  # the new file is sound
    assert kept(directory) == names
    return found


def test_a_sound_file_stays(directory: Path) -> None:
    start(directory)
    assert kept(directory) == []
    found = content(directory)
    assert len(found) == COUNT + 2


def test_the_log_of_a_killed_process_is_taken_over(killed_directory: Path) -> None:
    start(killed_directory)
    assert kept(killed_directory) == []
    assert content(killed_directory) == expected()


def test_the_trees_begin_where_salvage_expects_them(directory: Path) -> None:
    with QueueFile.open(str(directory)) as store:
        found = store.connection.execute(
            "SELECT name, rootpage FROM sqlite_schema WHERE rootpage > 0"
        ).fetchall()
    assert dict(found) == ROOTS


def test_overwritten_header_loses_nothing(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overwrite(directory / "queue.db", 0, b"garbage" * 100)
    with caplog.at_level(logging.CRITICAL):
        found = check_salvaged(directory, COUNT)
    assert found[1001][2] == found[1002][2]
    assert f"salvaged {COUNT + 2} messages; 0 damaged" in caplog.text
    assert "kept as" in caplog.text


def test_whole_first_page_lost(directory: Path) -> None:
    overwrite(directory / "queue.db", 0, bytes(PAGE_SIZE))
    check_salvaged(directory, COUNT)


def test_a_file_of_garbage_starts_empty(directory: Path) -> None:
    (directory / "queue.db").write_bytes(random.Random(1).randbytes(100_000))
    assert check_salvaged(directory, 0) == {}
    with QueueFile.open(str(directory)) as store:
        assert store.publish([Publication("outbox", Message({"tag": 1}))])[0] >= 1_000_000


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8, 0.99])
def test_truncated_file_keeps_what_is_left_and_says_what_is_known(
    directory: Path, caplog: pytest.LogCaptureFixture, share: float
) -> None:
    size = (directory / "queue.db").stat().st_size
    left = int(size * share) + 100
    os.truncate(directory / "queue.db", left)
    with caplog.at_level(logging.CRITICAL):
        found = check_salvaged(directory, COUNT // 4 if share >= 0.5 else 0)
    with QueueFile.open(str(directory)) as store:
        aside = len(store.browse(DAMAGED_QUEUE, limit=10_000))
    gone = COUNT + 2 - len(found) - aside
    assert f"; the last {size - left} bytes of the file are missing; " in caplog.text
    if known := re.search(r"(\d+) could not be read", caplog.text):
        assert int(known[1]) == gone
    else:
        known = re.search(r"at least (\d+) are lost, and it cannot be told how many", caplog.text)
        assert known is not None
        assert int(known[1]) <= gone


def test_truncated_to_nothing_is_a_new_queue(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(directory / "queue.db", 0)
    start(directory)
    assert content(directory) == {}
    assert "queue.db is empty, it becomes a new queue" in caplog.text


def test_a_lost_root_of_messages_loses_no_message(directory: Path) -> None:
    overwrite(directory / "queue.db", (ROOTS["message"] - 1) * PAGE_SIZE, bytes(PAGE_SIZE))
    check_salvaged(directory, COUNT)


def test_a_lost_root_of_bodies_loses_no_message(directory: Path) -> None:
    overwrite(directory / "queue.db", (ROOTS["body"] - 1) * PAGE_SIZE, b"\xff" * PAGE_SIZE)
    check_salvaged(directory, COUNT)


def test_held_mail_is_held_after_a_salvage(directory: Path) -> None:
    with QueueFile.open(str(directory)) as file:
        held = next(iter(file.selected("outbox", Selection())))[:50]
        assert file.change("outbox", held, "hold") == 50
    overwrite(directory / "queue.db", 0, bytes(100))
    with open_exclusive(str(directory)) as file:
        found = [
            entry
            for numbers in file.selected("outbox", Selection(held=True))
            for entry in file.some(numbers)
        ]
        assert [entry.id for entry in found] == list(held)
        assert all(1e9 < entry.due < 1e9 + COUNT + 1 for entry in found)


def test_a_lost_index_loses_no_message(directory: Path) -> None:
    overwrite(directory / "queue.db", (ROOTS["message_place"] - 1) * PAGE_SIZE, b"\5" * PAGE_SIZE)
    check_salvaged(directory, COUNT)


def test_an_index_that_lacks_entries_is_rebuilt(directory: Path) -> None:
    leaf = pages_of(directory, "message_place")[-1]
    # One entry less in a page, as a lost write of it would leave it.
    place = (leaf - 1) * PAGE_SIZE + 3
    data = (directory / "queue.db").read_bytes()
    count = int.from_bytes(data[place : place + 2], "big")
    overwrite(directory / "queue.db", place, (count - 1).to_bytes(2, "big"))
    check_salvaged(directory, COUNT)


def test_a_lost_page_of_messages_leaves_their_bodies(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leaf = pages_of(directory, "message")[1]
    overwrite(directory / "queue.db", (leaf - 1) * PAGE_SIZE, bytes(PAGE_SIZE))
    with caplog.at_level(logging.CRITICAL):
        found = check_salvaged(directory, COUNT // 2)
    lost = [tag for tag in expected() if tag not in found]
    assert lost
    with QueueFile.open(str(directory)) as store:
        damaged = store.browse(DAMAGED_QUEUE, limit=1000)
    assert {entry.message.body for entry in damaged} == {
        body_of(tag) for tag in lost if body_of(tag) is not None
    }
    assert {entry.message.properties["damaged"]["queue"] for entry in damaged} == {
        "outbox",
        "results",
    }
    without_body = sum(body_of(tag) is None for tag in lost)
    assert f"{len(damaged)} damaged ones" in caplog.text
    assert f"; {without_body} could not be read" in caplog.text


def test_a_lost_page_of_bodies_sets_their_messages_aside(directory: Path) -> None:
    leaf = pages_of(directory, "body")[3]
    overwrite(directory / "queue.db", (leaf - 1) * PAGE_SIZE, bytes(PAGE_SIZE))
    found = check_salvaged(directory, COUNT - 40)
    lost = [tag for tag in expected() if tag not in found]
    assert lost
    with QueueFile.open(str(directory)) as store:
        damaged = store.browse(DAMAGED_QUEUE, limit=1000)
    assert len(damaged) == len(lost)
    assert all("body" in entry.message.properties["damaged"]["reason"] for entry in damaged)


def test_deleted_messages_do_not_come_back(directory: Path) -> None:
    """The free pages still hold deleted messages, and the free list is lost too."""
    pages = Pages(str(directory / "queue.db"), PAGE_SIZE)
    free, whole = pages.free()
    pages.close()
    assert free and whole
    overwrite(directory / "queue.db", 32, b"\0\0\0\0")
    overwrite(directory / "queue.db", (ROOTS["message"] - 1) * PAGE_SIZE, bytes(PAGE_SIZE))
    found = check_salvaged(directory, COUNT)
    assert -1 not in found


@pytest.mark.parametrize("seed", range(12))
def test_random_pages_overwritten(directory: Path, seed: int) -> None:
    dice = random.Random(seed)
    count = (directory / "queue.db").stat().st_size // PAGE_SIZE
    for _ in range(5):
        page = dice.randrange(1, count)
        overwrite(directory / "queue.db", page * PAGE_SIZE, dice.randbytes(PAGE_SIZE))
    check_salvaged(directory, COUNT // 2)


@pytest.mark.parametrize("seed", range(12))
def test_random_bytes_overwritten_is_never_wrong_mail(directory: Path, seed: int) -> None:
    """The start misses some damage; each message comes out right, or is set aside."""
    dice = random.Random(seed)
    size = (directory / "queue.db").stat().st_size
    for _ in range(60):
        overwrite(directory / "queue.db", dice.randrange(100, size), dice.randbytes(3))
    start(directory)
    right = expected()
    with QueueFile.open(str(directory)) as store:
        entries = [
            entry for queue in ("outbox", "results") for entry in store.browse(queue, limit=10_000)
        ]
        aside = len(store.browse(DAMAGED_QUEUE, limit=10_000))
    sound = [entry for entry in entries if "damaged" not in entry.message.properties]
    for entry in sound:
        tag = entry.message.properties["tag"]
        if tag < 1000:
            assert (entry.queue, entry.message.body) == (right[tag][0], right[tag][2])
    assert len(sound) + aside >= COUNT * 3 // 4


def test_zeroed_log_keeps_what_is_in_the_file(killed_directory: Path) -> None:
    log = killed_directory / "queue.db-wal"
    log.write_bytes(bytes(log.stat().st_size))
    check_salvaged(killed_directory, 0)


def test_log_without_a_header_is_read(killed_directory: Path) -> None:
    overwrite(killed_directory / "queue.db-wal", 0, bytes(32))
    check_salvaged(killed_directory, COUNT)


def test_log_with_a_broken_frame_is_read_beyond_it(killed_directory: Path) -> None:
    log = killed_directory / "queue.db-wal"
    overwrite(log, 32 + 200 * (PAGE_SIZE + 24) + 3000, b"broken")
    assert log.stat().st_size > 1000 * (PAGE_SIZE + 24)
    check_salvaged(killed_directory, COUNT - 5)


def test_log_without_its_file_is_read(killed_directory: Path) -> None:
    os.unlink(killed_directory / "queue.db")
    check_salvaged(killed_directory, COUNT)


def test_who_opens_a_broken_log_beside_others_leaves_it_to_the_daemon(
    killed_directory: Path,
) -> None:
    log = killed_directory / "queue.db-wal"
    overwrite(log, 32 + 200 * (PAGE_SIZE + 24) + 3000, b"broken")
    before = log.read_bytes()
    for _ in range(2):
        with pytest.raises(QueueDamaged, match=r"broken after frame 198 of .* start mailerq"):
            open_shared(str(killed_directory))
    assert log.read_bytes() == before
    check_salvaged(killed_directory, COUNT - 5)


@pytest.mark.parametrize("size", [32, 100_000])
def test_a_log_with_a_broken_head_or_no_file_is_left_to_the_daemon_too(
    killed_directory: Path, size: int
) -> None:
    if size == 32:
        overwrite(killed_directory / "queue.db-wal", 0, bytes(size))
    else:
        os.unlink(killed_directory / "queue.db")
    with pytest.raises(QueueDamaged):
        open_shared(str(killed_directory))
    check_salvaged(killed_directory, COUNT)


def test_a_sound_log_is_taken_over_by_whoever_comes(killed_directory: Path) -> None:
    with open_shared(str(killed_directory)) as store, open_shared(str(killed_directory)) as other:
        assert other.publish([publications(1)[0]])
        assert sum(depth.total for depth in store.depths()) == COUNT + 1


def test_log_cut_in_its_last_commit_is_what_a_crash_leaves(killed_directory: Path) -> None:
    log = killed_directory / "queue.db-wal"
    os.truncate(log, log.stat().st_size - 100)
    start(killed_directory)
    assert kept(killed_directory) == []
    assert len(content(killed_directory)) >= COUNT - 1


FRAME = 24 + PAGE_SIZE


def last_commits(directory: Path, count: int) -> list[range]:
    """Where the frames of the last commits of the log begin, the oldest first; 0 is all."""
    log = (directory / "queue.db-wal").read_bytes()
    frames = range(32, len(log), FRAME)
    ends = [frame for frame in frames if log[frame + 4 : frame + 8] != bytes(4)]
    starts = [32, *(end + FRAME for end in ends)]
    commits = [range(start, end + FRAME, FRAME) for start, end in zip(starts, ends, strict=False)]
    return commits[-count:]


def half_commits(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("queue.db.half-commit-*"))


@pytest.mark.parametrize("written", [0, 512, PAGE_SIZE - 30])
def test_a_last_frame_without_its_page_is_what_a_crash_leaves(
    killed_directory: Path, written: int, caplog: pytest.LogCaptureFixture
) -> None:
    """kill -9 comes between the writes of a frame's head and of its page, or within one."""
    last = last_commits(killed_directory, 1)[0][-1]
    overwrite(killed_directory / "queue.db-wal", last + 24 + written, b"old" * 10)
    log = (killed_directory / "queue.db-wal").read_bytes()
    start(killed_directory)
    assert kept(killed_directory) == []
    names = half_commits(killed_directory)
    assert [(killed_directory / name).read_bytes() for name in names] == [log]
    assert "the last commit in its log had not been written to its end" in caplog.text
    assert names[0] in caplog.text
    assert content(killed_directory).items() >= dict(list(expected().items())[:-1]).items()
    start(killed_directory)  # a new log has begun
    assert half_commits(killed_directory) == names


def test_what_proves_itself_of_a_damaged_last_commit_is_taken_in(
    killed_directory: Path, tmp_path: Path
) -> None:
    """That commit may have been safe, and reported as safe."""
    right = expected()
    commit = last_commits(killed_directory, 1)[0]
    taken_in = 0
    for number, frame in enumerate(commit):
        directory = Path(shutil.copytree(killed_directory, tmp_path / str(number)))
        overwrite(directory / "queue.db-wal", frame + 24 + 3000, b"broken")
        start(directory)
        assert kept(directory) == []
        found = content(directory)
        assert found.items() <= right.items()
        assert len(found) >= COUNT - 1
        taken_in += len(found) == COUNT
        with QueueFile.open(str(directory)) as store:
            known = {entry.id for entry in store.browse("outbox", limit=10_000)}
            known |= {entry.id for entry in store.browse("results", limit=10_000)}
            assert store.publish(publications(1))[0] not in known
            assert store.browse(DAMAGED_QUEUE) == []
    assert taken_in >= len(commit) // 2


def test_damage_before_the_last_commit_is_no_crash(killed_directory: Path) -> None:
    before_last, _ = last_commits(killed_directory, 2)
    overwrite(killed_directory / "queue.db-wal", before_last[0] + 24 + 3000, b"broken")
    check_salvaged(killed_directory, COUNT - 1)
    assert half_commits(killed_directory) == []


def one_commit_in_the_log(directory: Path, target: Path, *publications: Publication) -> None:
    """What a crash leaves right after these, when all before has been written into the file."""
    with open_exclusive(str(directory)) as store:
        store.publish([Publication("outbox", Message({"tag": tag}, None), 1e9) for tag in (1, 2)])
        store.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        store.publish(publications)
        target.mkdir()
        for name in ("queue.db", "queue.db-wal"):
            shutil.copy(directory / name, target / name)


@pytest.mark.parametrize("field", [8, 11, 12, 16, 20, 24])
def test_a_log_whose_head_has_a_wrong_bit_is_read(tmp_path: Path, field: int) -> None:
    """Page size, number of the checkpoint, salts and checksum; SQLite throws such a log away."""
    queue = tmp_path / "queue"
    one_commit_in_the_log(tmp_path / "alive", queue, Publication("outbox", Message({"tag": 3})))
    log = queue / "queue.db-wal"
    overwrite(log, field, bytes([log.read_bytes()[field] ^ 1]))
    start(queue)
    assert len(kept(queue)) == 2
    assert content(queue).keys() == {1, 2, 3}


def test_a_frame_with_a_wrong_salt_costs_no_other(killed_directory: Path) -> None:
    frame = last_commits(killed_directory, 9)[0][0]
    overwrite(killed_directory / "queue.db-wal", frame + 8, b"wrong")
    check_salvaged(killed_directory, COUNT - 1)


def test_a_large_mail_before_a_broken_frame_is_taken_in(tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    bodies = [random.Random(tag).randbytes(300_000) for tag in (3, 4)]
    one_commit_in_the_log(
        tmp_path / "alive",
        queue,
        *(Publication("outbox", Message({"tag": 3 + n}, body)) for n, body in enumerate(bodies)),
    )
    overwrite(queue / "queue.db-wal", last_commits(queue, 0)[-1][-1] + 24, b"broken")
    start(queue)
    assert kept(queue) == []
    found = content(queue)
    assert found.keys() == {1, 2, 3}
    assert found[3][2] == bodies[0]


def a_broken_last_commit(directory: Path, queue: Path) -> dict[int, tuple[str, float, Body]]:
    """Make a queue whose long last commit is damaged; return the result of starting on a copy."""
    count = 700
    one_commit_in_the_log(
        directory / "alive",
        queue,
        *(Publication("outbox", Message({"tag": 3 + number})) for number in range(count)),
    )
    overwrite(queue / "queue.db-wal", last_commits(queue, 0)[-1][-1] + 24, b"broken")
    whole = Path(shutil.copytree(queue, directory / "whole"))
    start(whole)
    saved = content(whole)
    assert len(saved) > count // 2
    return saved


@pytest.mark.parametrize("error", [KeyboardInterrupt(), QueueError("no space left")])
def test_a_start_that_was_interrupted_takes_the_last_commit_in_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    queue = tmp_path / "queue"
    saved = a_broken_last_commit(tmp_path, queue)

    def interrupt(self: QueueFile, batch: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(QueueFile, "write", interrupt)
        with pytest.raises(type(error)):
            start(queue)
    with pytest.raises(QueueDamaged, match=r"interrupted .* start mailerq"):
        open_shared(str(queue))
    start(queue)
    assert content(queue).keys() == saved.keys()
    assert len(half_commits(queue)) == 1
    with QueueFile.open(str(queue)) as store:
        assert store.publish([Publication("outbox", Message({}))])


def test_damage_that_is_met_while_the_last_commit_is_taken_in_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is salvaged, and then the commit is taken in into the new one."""
    queue = tmp_path / "queue"
    saved = a_broken_last_commit(tmp_path, queue)
    write, calls = QueueFile.write, []

    def meet_damage(self: QueueFile, batch: Batch) -> None:
        calls.append(batch)
        if len(calls) == 1:
            raise self.failed(apsw.CorruptError("malformed")) from apsw.CorruptError("malformed")
        write(self, batch)

    monkeypatch.setattr(QueueFile, "write", meet_damage)
    start(queue)
    assert kept(queue) != []
    assert len(half_commits(queue)) == 1
    assert content(queue).keys() == saved.keys()


def test_without_room_for_the_copy_of_a_log_nothing_is_changed(
    killed_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = killed_directory / "queue.db-wal"
    overwrite(log, last_commits(killed_directory, 1)[0][-1] + 24, b"old")
    before = log.read_bytes()

    def full(file: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for _ in range(2):
            with pytest.raises(QueueError, match="No space left"):
                start(killed_directory)
    assert log.read_bytes() == before
    assert not list(killed_directory.glob("*half*"))


def test_a_half_commit_is_left_to_the_daemon(killed_directory: Path) -> None:
    log = killed_directory / "queue.db-wal"
    overwrite(log, last_commits(killed_directory, 1)[0][-1] + 24, b"old")
    before = log.read_bytes()
    with pytest.raises(QueueDamaged, match="start mailerq"):
        open_shared(str(killed_directory))
    assert log.read_bytes() == before


def test_a_crash_while_salvaging_starts_over(directory: Path) -> None:
    overwrite(directory / "queue.db", 0, bytes(100))
    (directory / "queue.db.salvaging").write_bytes(b"half a file")
    (directory / "queue.db.salvaging-wal").write_bytes(b"half a log")
    check_salvaged(directory, COUNT)
    assert not list(directory.glob("*.salvaging*"))


@pytest.mark.parametrize("moved", ["", "-wal"])
def test_a_crash_after_salvaging_goes_on(directory: Path, moved: str) -> None:
    """The new file is complete; the old one is there still, or only its log is."""
    (directory / "queue.db").rename(directory / "queue.db.salvaged")
    (directory / f"queue.db{moved}").write_bytes(b"the damaged file")
    start(directory)
    assert len(content(directory)) == COUNT + 2
    assert [path.read_bytes() for path in directory.glob("*.damaged-*")] == [b"the damaged file"]


def test_mark_has_the_next_start_check_all(directory: Path) -> None:
    (directory / "queue.db.check").write_text("seen at run time\n")
    start(directory)
    assert not (directory / "queue.db.check").exists()


def test_names_of_kept_files_do_not_clash(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2026, 1, 2, 3, 4, 5, 4, 2, 0)))
    for _ in range(3):
        overwrite(directory / "queue.db", 0, bytes(100))
        start(directory)
    assert kept(directory) == [
        "queue.db.damaged-20260102-030405",
        "queue.db.damaged-20260102-030405-2",
        "queue.db.damaged-20260102-030405-3",
    ]


def test_a_newer_file_is_refused(directory: Path) -> None:
    connection = apsw.Connection(str(directory / "queue.db"))
    connection.pragma("user_version", LAYOUT + 1)
    connection.close()
    for opener in (open_exclusive, QueueFile.open):
        with pytest.raises(QueueError, match="newer mailerq"):
            opener(str(directory))


def test_a_database_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    connection = apsw.Connection(str(tmp_path / "queue.db"))
    connection.execute("CREATE TABLE theirs (a); INSERT INTO theirs VALUES (1)")
    connection.close()
    before = (tmp_path / "queue.db").read_bytes()
    for opener in (open_exclusive, QueueFile.open):
        with pytest.raises(QueueError, match="another program"):
            opener(str(tmp_path))
    assert (tmp_path / "queue.db").read_bytes() == before


def test_without_exclusive_a_damaged_file_is_left_alone(directory: Path) -> None:
    overwrite(directory / "queue.db", 0, bytes(100))
    with pytest.raises(QueueDamaged, match="restart salvages"):
        QueueFile.open(str(directory))
    assert kept(directory) == []


async def test_damaged_record_is_set_aside_and_the_consumer_goes_on(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(directory)
    with QueueFile.open(str(directory)) as store:
        store.connection.execute(
            "UPDATE message SET properties = CAST('{\"tag\":' AS BLOB) WHERE id = 200"
        )
        store.connection.execute("UPDATE message SET crc = 'x' WHERE id = 202")
        store.connection.execute("UPDATE body SET data = x'00' WHERE id = 204")
        store.connection.execute("DELETE FROM body WHERE id = 210")
        store.connection.execute("UPDATE message SET properties = NULL WHERE id = 208")
    with trio.fail_after(60):
        async with (
            open_embedded(str(directory)) as queues,
            queues.consume("outbox", prefetch=1000) as consumer,
            queues.consume(DAMAGED_QUEUE, prefetch=10) as damaged,
        ):
            tags = [
                (await consumer.receive()).message.properties["tag"]
                for _ in range(COUNT // 2 + 2 - 5)
            ]
            leases = [await damaged.receive() for _ in range(5)]
            accounts = {
                lease.message.properties["damaged"]["id"]: lease.message.properties["damaged"]
                for lease in leases
            }
            await queues.ack([Settlement(lease) for lease in leases])
    assert sorted(accounts) == [200, 202, 204, 208, 210]
    assert accounts[204]["reason"] == "the checksum of the body does not fit"
    assert accounts[210]["reason"] == "the body is missing"
    assert accounts[200]["queue"] == "outbox"
    assert len(set(tags)) == len(tags)
    assert "message 204 goes to queue damaged" in caplog.text


async def test_damage_at_run_time_stops_the_queue_until_a_restart(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with trio.fail_after(60):
        async with open_embedded(str(directory)) as queues:
            leaves = pages_of(directory, "message_place")
            for leaf in [ROOTS["message_place"], *leaves]:
                overwrite(directory / "queue.db", (leaf - 1) * PAGE_SIZE, bytes(PAGE_SIZE))
            async with queues.consume("outbox", prefetch=10) as consumer:
                with pytest.raises(QueueDamaged, match="a restart salvages it"):
                    await consumer.receive()
                with pytest.raises(QueueDamaged):
                    await consumer.receive()
            with pytest.raises(QueueDamaged):
                await queues.publish([Publication("outbox", Message({"tag": 1}))])
    assert "stop mailerq and start it again" in caplog.text
    assert (directory / "queue.db.check").exists()
    check_salvaged(directory, COUNT)
