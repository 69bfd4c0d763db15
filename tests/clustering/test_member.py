"""Instances on an exchange in memory: who is there, who owns what, whose rows are alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from mailerq.rules.cluster import SILENCE, Hello, Here, read, write
from mailerq.rules.leases import LEASE, TAKEOVER
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
