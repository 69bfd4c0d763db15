"""Instances on an exchange in memory: who is there, who owns what, whose rows are alike."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from mailerq.clustering.lease_file import LeaseFile, State
from mailerq.clustering.row_sync import MAX_WAITING
from mailerq.locks import Lead
from mailerq.rules.cluster import SILENCE, AskRows, Hello, Here, RowChanges, read, write
from mailerq.rules.leases import LEASE, TAKEOVER
from mailerq.rules.shared_rows import FIRST_ID, Change
from tests.clustering.kit import Bench, open_bench

Clock = trio.testing.MockClock

X, Y = "192.0.2.1", "192.0.2.2"
SECOND = 1_000_000_000


def alive(bench: Bench, name: str) -> list[str]:
    return sorted(bench.instances[name].cluster._members.alive)


async def test_instances_hear_of_each_other_and_of_the_end_of_one(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        for name in "abc":
            await bench.start(name)
        await bench.until(lambda: alive(bench, "a") == ["b", "c"], 2)
        await bench.until(lambda: alive(bench, "c") == ["a", "b"], 2)
        await bench.instances["b"].stop()
        await bench.until(lambda: alive(bench, "a") == ["c"], 0.5)
        bench.instances["c"].kill()
        await bench.until(lambda: alive(bench, "a") == [], 7)


async def test_one_of_the_instances_with_an_address_owns_it(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        for name in "abc":
            await bench.start(name, [X] if name != "c" else [Y])
        await bench.owned(X)
        assert bench.users(Y) == ["c"]
        for _ in range(100):
            await trio.sleep(0.1)
            assert len(bench.users(X)) == 1


async def test_another_instance_takes_over_after_the_lease_of_one_that_is_killed(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        for name in "ab":
            await bench.start(name, [X])
        owner = (await bench.owned(X)).name
        bench.instances[owner].kill()
        killed = trio.current_time()
        assert (await bench.owned(X)).name != owner
        passed = (trio.current_time() - killed) * SECOND
        assert TAKEOVER <= passed < SILENCE + TAKEOVER + 4 * SECOND


async def test_an_instance_that_stops_hands_over_without_a_silence(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        for name in "ab":
            await bench.start(name, [X])
        owner = (await bench.owned(X)).name
        await bench.instances[owner].stop()
        await bench.until(lambda: bench.users(X), TAKEOVER / SECOND + 1)


async def test_an_owner_that_is_cut_off_stops_before_another_begins(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        for name in "ab":
            await bench.start(name, [X])
        owner = (await bench.owned(X)).name
        link = bench.instances[owner].link
        link.frozen = True
        bench.exchange.drop(link.queue)  # the broker has given it up
        begun = trio.current_time()
        users = []
        while not users or users[-1] in ([owner], []):
            await trio.sleep(0.05)
            users.append(bench.users(X))
            assert len(users[-1]) <= 1
            assert trio.current_time() - begun < 30
        assert [] in users
        # It comes back, and hears that the address has another owner.
        link.frozen = False
        link.cut()
        for _ in range(200):
            await trio.sleep(0.05)
            assert bench.users(X) == users[-1]


async def test_an_owner_whose_broker_is_slow_keeps_its_lock(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        for name in "ab":
            await bench.start(name, [X])
        owner = (await bench.owned(X)).name
        bench.instances[owner].link.frozen = True
        await bench.until(lambda: bench.users(X) == [], LEASE / SECOND + 1)
        bench.instances[owner].link.frozen = False
        await bench.until(lambda: bench.users(X) == [owner], 2)


async def test_an_address_of_one_instance_works_without_the_exchange(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        bench.exchange.down = True
        await bench.start("a", [X])
        assert bench.users(X) == ["a"]
        bench.exchange.down = False
        await bench.start("b", [X])
        await bench.until(lambda: bench.users(X) != ["a", "b"], 3)
        for _ in range(300):
            await trio.sleep(0.05)
            assert len(bench.users(X)) <= 1
        assert len(bench.users(X)) == 1


async def test_a_shared_address_waits_for_the_exchange_also_after_a_restart(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        for name in "ab":
            await bench.start(name, [X])
        owner = (await bench.owned(X)).name
        await trio.sleep(1)
        bench.exchange.down = True
        for each in bench.instances.values():
            each.kill()
        await trio.sleep(1)
        again = await bench.start(owner, [X])
        await trio.sleep(30)
        assert not again.uses(X)
        bench.exchange.down = False
        await bench.until(lambda: again.uses(X), 15)


async def test_an_address_that_the_host_has_lost_is_left_to_others(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        for name in "ab":
            await bench.start(name, [X])
        owner = (await bench.owned(X)).name
        bench.instances[owner].ips.remove(X)
        await bench.until(lambda: bench.users(X) not in ([], [owner]), 30)
        assert X not in bench.instances[owner].cluster.leases


async def test_a_lock_that_an_operator_deletes_is_lost(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        each = await bench.start("a", [X])
        await bench.start("b", [X])
        each = await bench.owned(X)
        each.link.on_unlocked(X)
        assert not each.uses(X)


async def test_a_pause_reaches_all_within_a_second_and_its_end_too(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        rows = {name: (await bench.start(name)).rows for name in "abc"}
        await bench.until(lambda: len(alive(bench, "a")) == 2, 2)
        rows["a"].add(1)
        await bench.until(lambda: all(each.numbers == [1] for each in rows.values()), 1)
        rows["c"].end(1)
        await bench.until(lambda: not any(each.numbers for each in rows.values()), 1)


async def test_an_instance_that_was_away_gets_what_it_has_missed(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        first, second = await bench.start("a"), await bench.start("b")
        first.rows.add(1)
        await bench.until(lambda: second.rows.numbers == [1], 10)
        kept = second.rows
        second.kill()
        first.rows.end(1)
        first.rows.add(2)
        kept.add(3)
        for number in range(100, 800):
            first.rows.add(number)
        again = await bench.start("b", rows=kept)
        await bench.until(lambda: len(first.rows.numbers) == len(again.rows.numbers) == 702, 20)
        assert first.rows.shared.digest == again.rows.shared.digest
        assert first.rows.numbers[:2] == [2, 3]


async def test_rows_that_get_lost_are_asked_for(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_bench(tmp_path) as bench:
        rows = {name: (await bench.start(name)).rows for name in "abc"}
        await bench.until(lambda: len(alive(bench, "a")) == 2, 2)
        bench.exchange.lose = lambda data: b'"kind":"rows"' in data
        rows["a"].add(1)
        await trio.sleep(1)
        assert not rows["b"].numbers
        await bench.until(lambda: all(each.numbers == [1] for each in rows.values()), 20)


async def test_equal_rows_are_not_sent_again(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_bench(tmp_path) as bench:
        rows = {name: (await bench.start(name)).rows for name in "ab"}
        rows["a"].add(1)
        await bench.until(lambda: rows["b"].numbers == [1], 10)
        await trio.sleep(30)
        bench.exchange.seen.clear()
        await trio.sleep(60)
        assert {type(read(data)) for data in bench.exchange.seen} == {Here}
        assert 80 < len(bench.exchange.seen) < 250


async def test_foreign_and_hostile_documents_are_ignored_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        each = await bench.start("a", [X])
        await bench.until(lambda: each.link.is_open, 2)
        for _ in range(5000):
            bench.exchange.copy(b'{"reload": true}', "")
        await trio.sleep(1)
        bench.exchange.copy(write(Here(name="b", run="1", serial=1, ips=(Y,))), "")
        await bench.until(lambda: alive(bench, "a") == ["b"], 2)
    assert len([each for each in caplog.records if "none of ours" in each.getMessage()]) <= 2
    assert len([each for each in caplog.records if "no document" in each.getMessage()]) == 1


async def test_a_storm_of_greetings_makes_few_announcements(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        each = await bench.start("a")
        await bench.until(lambda: each.link.is_open, 2)
        await trio.sleep(1)
        bench.exchange.seen.clear()
        for _ in range(1000):
            bench.exchange.copy(write(Hello()), "")
            await trio.sleep(0.001)
        assert len([data for data in bench.exchange.seen if isinstance(read(data), Here)]) < 10


async def test_an_exchange_that_is_away_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        bench.exchange.down = True
        each = await bench.start("a", [X])
        await trio.sleep(30)
        assert each.cluster.statistics()["connected"] == 0
        bench.exchange.down = False
        await bench.until(lambda: each.cluster.statistics()["connected"], 3)
        assert each.cluster.statistics()["usable"] == 1
        await each.stop()
    lost = [each for each in caplog.records if "cannot be heard" in each.getMessage()]
    assert len(lost) == 1


async def test_the_processes_of_a_daemon_are_one_instance(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        first = await bench.start("a", [X], place="here")
        follower = await bench.start("a ", [X], place="here")
        other = await bench.start("b", [X])
        assert (first.cluster.leads, follower.cluster.leads) == (True, False)
        await bench.owned(X)
        if other.uses(X):
            await other.stop()
            await bench.until(lambda: first.uses(X), 15)
        await bench.until(lambda: follower.uses(X), 2)
        first.kill()
        await bench.until(lambda: follower.cluster.leads, 2)
        await bench.until(lambda: follower.uses(X) or other.uses(X), 30)


async def test_mail_for_an_address_of_another_instance_goes_there(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        first, second = await bench.start("a", [X]), await bench.start("b", [Y])
        first.facts.takes = second.facts.takes = "outbox"
        assert first.cluster.keeper_of([Y]) is None  # not known yet
        assert first.cluster.keeper_of([X]) == ""
        await bench.until(lambda: first.cluster.keeper_of([Y]) == "b", 10)
        assert first.cluster.keeper_of([X]) == ""
        assert first.cluster.keeper_of([X, Y]) == ""
        await bench.until(lambda: first.cluster.keeper_of(["192.0.2.9"]) == "", 4)
        bench.exchange.down = True
        first.link.cut()
        await trio.sleep(1)
        assert first.cluster.keeper_of(["192.0.2.9"]) is None


async def test_a_process_that_follows_waits_for_a_word_of_the_one_that_leads(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    # After a boot, the file names rivals, and its leases are void.
    place = tmp_path / "here"
    place.mkdir()
    state = State(boot="another", leases={X: (0, 1 << 62, False)}, rivals={X: 0.0})
    (place / "cluster.leases").write_bytes(msgspec.json.encode(state))
    other = Lead(str(place / "cluster.lock"))
    assert other.take()
    async with open_bench(tmp_path) as bench:
        follower = await bench.start("a", [X, Y], place="here")
        assert not follower.cluster.leads
        assert bench.users(X) == []
        assert bench.users(Y) == ["a"]
        await trio.sleep(5)
        assert bench.users(X) == []
        other.close()
        await bench.until(lambda: bench.users(X) == ["a"], 3600)


async def test_without_its_lock_file_an_instance_leaves_shared_addresses_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, autojump_clock: Clock
) -> None:
    place = tmp_path / "a"
    place.mkdir()
    (place / "cluster.leases").write_bytes(msgspec.json.encode(State(rivals={X: 0.0})))
    (place / "cluster.lock").symlink_to("/nowhere")  # what is no file of ours is not opened
    async with open_bench(tmp_path) as bench:
        await bench.start("a", [X, Y])
        await trio.sleep(20)
        assert (bench.users(X), bench.users(Y)) == ([], ["a"])
        (place / "cluster.lock").unlink()
        await bench.until(lambda: bench.users(X) == ["a"], 3600)
    said = [each.getMessage() for each in caplog.records if "cannot be locked" in each.getMessage()]
    assert len(said) == 1
    assert "mail from addresses that others have too waits" in said[0]


@pytest.mark.parametrize("content", [b"", b'{"boot": "x", "riv', b"\xff"])
async def test_a_damaged_lease_file_lets_nobody_send_without_a_lock(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, autojump_clock: Clock, content: bytes
) -> None:
    place = tmp_path / "a"
    place.mkdir()
    (place / "cluster.leases").write_bytes(content)
    async with open_bench(tmp_path) as bench:
        bench.exchange.down = True
        await bench.start("a", [X])
        await trio.sleep(5)
        assert bench.users(X) == []
        bench.exchange.down = False
        await bench.until(lambda: bench.users(X) == ["a"], 3600)
    assert "cluster.leases cannot be read" in caplog.text


async def test_a_full_disk_leaves_the_lease_file_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = LeaseFile(str(tmp_path))
    file.write(State(rivals={X: 1.0}))
    large = State(rivals={f"192.0.2.{number}": 1.0 for number in range(200)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        file.write(large)
        file.write(large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found = LeaseFile(str(tmp_path)).read()
    assert found is not None
    assert found.rivals == {X: 1.0}
    assert caplog.text.count("cannot be written: File too large") == 1
    file.write(large)
    assert (LeaseFile(str(tmp_path)).read() or State()).rivals == large.rivals


async def test_a_storm_of_instances_makes_few_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, autojump_clock: Clock
) -> None:
    caplog.set_level("INFO")
    async with open_bench(tmp_path) as bench:
        each = await bench.start("a", [X])
        await bench.until(lambda: each.link.is_open, 3600)
        for second in range(10):
            for number in range(500):
                document = Here(name=f"x{number}", run=f"{second}", serial=1, ips=(Y,))
                bench.exchange.copy(write(document), "")
            await trio.sleep(1)
        await trio.sleep(10)
        assert alive(bench, "a") == []
    assert len(caplog.records) < 300


async def test_a_forged_question_sends_nothing_to_the_outbox(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        each = await bench.start("a", [X])
        await bench.until(lambda: each.link.is_open, 3600)
        each.rows.add(1)
        sent = []
        copy = bench.exchange.copy
        bench.exchange.copy = lambda data, queue: (sent.append(queue), copy(data, queue))  # type: ignore
        for queue in ("outbox", "", "amq.gen-b"):
            copy(write(AskRows(name="b", queue=queue, talk=f"t{queue}", part=0)), "")
        await trio.sleep(3)
        assert set(sent) == {"", "amq.gen-b"}
        assert sent.count("amq.gen-b") == 1


async def test_changes_that_wait_to_be_written_are_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, autojump_clock: Clock
) -> None:
    async with open_bench(tmp_path) as bench:
        each = await bench.start("a", [X])
        await bench.until(lambda: each.link.is_open, 3600)
        merged: list[int] = []

        async def merge(changes: Sequence[Change]) -> int:
            merged.append(len(changes))
            await trio.sleep(60)
            return 0

        each.rows.merge = merge  # type: ignore[method-assign]
        change = Change(version=1, server="b", end=(FIRST_ID,), why="x" * 400_000)
        for _ in range(300):
            bench.exchange.copy(write(RowChanges(name="b", changes=(change,))), "")
        await trio.sleep(130)
    assert sum(merged) <= 2 * (MAX_WAITING // 400_000)
    assert "faster than they can be written" in caplog.text
