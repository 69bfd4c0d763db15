"""Deliveries from addresses of a cluster: nothing without a lease, no rate too early after one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mailerq.clustering import addresses
from mailerq.clustering.lease_file import LeaseFile, State, follow
from mailerq.config import Config
from mailerq.outbound.cells import MemoryCells, boot_time
from mailerq.outbound.limits import Limits
from mailerq.rules.leases import Lease
from mailerq.rules.local_ips import LocalIps
from mailerq.rules.rates import MINUTE
from mailerq.rules.shaping import Shaping
from tests.outbound.kit import Bench, open_bench

X, Y = "127.0.0.2", "127.0.0.3"
HOUR = 60 * MINUTE


def valid(ip: str = X, since: int | None = None) -> Lease:
    now = boot_time()
    return Lease(ip, now - HOUR if since is None else since, now + HOUR)


async def delivered(bench: Bench, count: int) -> None:
    await bench.until(lambda figures: figures["delivered"] >= count)


async def test_mail_waits_without_a_lease_and_goes_when_there_is_one() -> None:
    async with open_bench(smtp_default_ips=(X,)) as bench:
        limits = bench.dispatcher.limits
        lease = Lease(X)
        limits.leases = {X: lease}
        for number in range(5):
            bench.send(f"c{number}@d.test")
        await bench.until(lambda figures: limits.statistics()["limited"] > 0)
        assert "another instance may send from 127.0.0.2" in str(limits.statistics()["limits"])
        assert bench.peer.connections == 0
        lease.since, lease.until = boot_time(), boot_time() + HOUR
        limits.leases_changed()
        await delivered(bench, 5)
        assert not bench.queues["retry"]  # waiting is no attempt


async def test_an_open_connection_sends_no_more_when_the_lease_is_over() -> None:
    async with open_bench(smtp_default_ips=(X,)) as bench:
        limits = bench.dispatcher.limits
        lease = valid()
        limits.leases = {X: lease}
        bench.send("c1@d.test")
        await delivered(bench, 1)
        lease.until = boot_time()
        bench.send("c2@d.test")
        await bench.until(lambda figures: limits.statistics()["limited"] > 0)
        assert len(bench.peer.mails) == 1
        lease.until = boot_time() + HOUR
        limits.leases_changed()
        await delivered(bench, 2)


async def test_an_address_without_a_lease_leaves_mail_to_the_others_of_the_message() -> None:
    async with open_bench(smtp_default_ips=(X, Y)) as bench:
        bench.dispatcher.limits.leases = {X: Lease(X), Y: valid(Y)}
        for number in range(20):
            bench.send(f"c{number}@d.test")
        results = await bench.results(count=20)
        assert {each["from"] for each in results} == {Y}


async def test_other_addresses_and_mail_without_one_go_as_before() -> None:
    async with open_bench() as bench:
        bench.dispatcher.limits.leases = {X: Lease(X)}
        bench.send("c@d.test")
        await delivered(bench, 1)
        bench.send("e@d.test", ips=[Y])
        await delivered(bench, 2)


async def test_a_lease_that_begins_in_a_moment_is_waited_for() -> None:
    async with open_bench(smtp_default_ips=(X,)) as bench:
        begins = boot_time() + 300_000_000
        bench.dispatcher.limits.leases = {X: Lease(X, begins, begins + HOUR)}
        bench.send("c@d.test")
        await delivered(bench, 1)
        assert boot_time() >= begins


async def test_a_new_owner_waits_for_one_interval_of_each_rate() -> None:
    async with open_bench(smtp_default_ips=(X,), domain_maxmessages=120) as bench:
        begun = time.monotonic()
        bench.dispatcher.limits.leases = {X: valid(since=boot_time())}
        bench.send("c@d.test")
        await delivered(bench, 1)
        assert time.monotonic() - begun >= 0.5
        bench.dispatcher.limits.leases = {X: Lease(X, alone=True)}


@pytest.mark.parametrize("setting", ["domain_maxmessages", "domain_maxconnects", "domain_maxbytes"])
def test_each_kind_of_rate_waits_at_a_new_owner(setting: str) -> None:
    now = [HOUR]
    config = Config(smtp_default_ips=(X,), **{setting: 60})
    limits = Limits(Shaping.of(config), MemoryCells(lambda: now[0]))
    limits.leases = {X: Lease(X, HOUR, 2 * HOUR)}

    class Site:
        group = ""
        label = "d.test"
        limit_key = b"k"
        hosts = ()

    allowance = limits.of_flow(Site(), X)  # type: ignore[arg-type]
    wants = allowance.opening if setting == "domain_maxconnects" else allowance.sending
    refusal = limits.take(wants, 10)
    assert refusal is not None
    assert refusal.want.bound.value == 60
    now[0] += MINUTE if setting == "domain_maxbytes" else 1_010_000_000
    assert limits.take(wants, 10) is None


# The file for the other processes


@pytest.fixture
def file(tmp_path: Path) -> Iterator[LeaseFile]:
    found = LeaseFile(str(tmp_path))
    yield found
    found.close()


def test_the_file_of_leases_is_read_once_by_each_process(tmp_path: Path, file: LeaseFile) -> None:
    assert file.lead()
    other = LeaseFile(str(tmp_path))
    assert not other.lead()
    assert other.read() is None
    file.write(State(leases={X: (1, 2, False)}, held=[X], rivals={X: 5.0}))
    state = other.read()
    assert state is not None
    assert state.leases == {X: (1, 2, False)}
    assert other.read() is None
    leases: dict[str, Lease] = {Y: Lease(Y)}
    assert {X, Y} == set(follow(leases, state.leases))
    assert set(leases) == {X}
    assert follow(leases, state.leases) == []
    assert (leases[X].since, leases[X].until) == (1, 2)
    file.close()
    assert other.lead()
    other.close()


def test_a_file_of_another_boot_tells_of_rivals_only(tmp_path: Path, file: LeaseFile) -> None:
    file.write(State(leases={X: (1, 2, False)}, held=[X], rivals={X: 5.0}))
    later = LeaseFile(str(tmp_path))
    later._boot = "another"
    state = later.read()
    assert state is not None
    assert (state.leases, state.held, state.rivals) == ({}, [], {X: 5.0})


def test_a_broken_file_is_told_once(
    tmp_path: Path, file: LeaseFile, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cluster.leases").write_bytes(b'{"leases": 7')
    assert file.read() is None
    assert file.read() is None
    assert len(caplog.records) == 1


# The addresses of a host


def test_the_addresses_of_the_settings_count_if_the_host_has_them() -> None:
    config = Config(smtp_default_ips=(X, "192.0.2.77"))
    text = b'pool = [{name = "p", addresses = ["127.0.0.3", "::1"]}]'
    local = LocalIps.parse(text, "addresses.toml", config)
    assert addresses.configured(config, local) == [X, "192.0.2.77", Y, "::1"]
    found = addresses.available(config, local)
    assert found[:2] == [X, Y]
    assert "192.0.2.77" not in found


def test_without_addresses_in_the_settings_those_of_the_host_count() -> None:
    config = Config()
    found = addresses.available(config, LocalIps.of(config))
    assert all(map(addresses.has, found))
    assert not [ip for ip in found if ip.startswith("127.") or ip in ("::1",)]
