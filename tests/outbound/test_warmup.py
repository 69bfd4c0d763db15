"""Addresses that begin to send: limits that grow with each day on which they sent."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.net.resolver import Host
from mailerq.outbound.limits import Allowance, Limits
from mailerq.outbound.sites import Site
from mailerq.outbound.warmup import Days
from mailerq.rules.local_ips import LocalIps
from mailerq.rules.routes import Route
from mailerq.rules.shaping import Shaping
from tests.outbound.kit import open_bench
from tests.outbound.test_delivery_limits import let_go
from tests.outbound.test_local_ips import addresses_file, sources

DAY = 86400.0

WARM = """
[[pool]]
name = "new"
addresses = ["127.0.0.2", "127.0.0.3"]

[[warmup]]
addresses = ["127.0.0.2"]
messages = [2, 4]
"""


class Clock:
    now = 1_767_268_800.0

    def __call__(self) -> float:
        return self.now


# Days


@given(st.lists(st.integers(0, 4), max_size=30))
def test_a_day_counts_once_and_only_with_mail(pauses: list[int]) -> None:
    clock = Clock()
    days = Days(clock=clock)
    sent: set[float] = set()
    for pause in pauses:
        clock.now += pause * DAY / 2
        today = clock.now // DAY
        assert days.of("ip") == len(sent | {today})
        assert days.sent("ip") == (today not in sent)
        sent.add(today)
        assert days.of("ip") == len(sent)
        assert days.of("other") == 1


def test_days_are_kept_and_shared_by_processes(tmp_path: Path) -> None:
    path, clock = str(tmp_path / "warmup.json"), Clock()
    one, other = Days(path, clock), Days(path, clock)
    assert one.sent("a")
    clock.now += DAY
    assert other.sent("a"), "the second day, though this process has not sent on the first"
    assert other.of("a") == 2
    assert one.sent("a")
    assert one.of("a") == 2, "the other process has counted the day"
    clock.now += DAY
    assert Days(path, clock).of("a") == 3


def test_a_process_that_writes_holds_up_no_other(tmp_path: Path) -> None:
    path = str(tmp_path / "warmup.json")
    days = Days(path)
    lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert not days.sent("a")
    os.close(lock)
    assert days.sent("a")
    assert Days(path).of("a") == 1


@pytest.mark.parametrize(
    "content", ["", "[]", '{"a": 7}', '{"a": ["x", 1]}', '{"a": [1e999, ""]}', "\xff"]
)
def test_a_file_that_cannot_be_read_counts_from_the_first_day(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "warmup.json"
    path.write_text(content, encoding="latin-1")
    days = Days(str(path))
    assert days.of("a") == 1
    assert days.sent("a")
    assert "cannot read the days of sending" in caplog.text
    assert Days(str(path)).of("a") == 1
    assert Path(f"{path}.damaged").read_text(encoding="latin-1") == content


def test_a_file_that_may_not_be_read_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "warmup.json"
    path.mkdir()
    days = Days(str(path))
    assert days.sent("a") and days.of("a") == 1
    assert "cannot" in caplog.text
    assert path.is_dir()


def test_a_directory_that_cannot_be_written_costs_no_mail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    days = Days(str(tmp_path / "missing" / "warmup.json"))
    assert days.sent("a")
    assert not days.sent("a")
    assert "cannot keep the days of sending" in caplog.text


# Limits


def allowance(limits: Limits, ip: str, *hosts: str) -> Allowance:
    site = Site(b"key", Route("d.test", "d.test", 25, mx=True))
    site.hosts = tuple(Host(host, "192.0.2.1") for host in hosts)
    return limits.of_flow(site, ip)


def test_the_limit_is_that_of_the_day_and_ends_with_the_last() -> None:
    clock = Clock()
    local = LocalIps.parse(WARM.encode(), "addresses.toml", Config())
    limits = Limits(Shaping(Config(), local_ips=local))
    limits.days = Days(clock=clock)
    assert not allowance(limits, "127.0.0.3").warming
    found = []
    for _ in range(4):
        warm = allowance(limits, "127.0.0.2")
        found.append([str(want) for want in warm.sending.each])
        number = limits.number
        limits.sent(warm.sending)
        limits.sent(warm.sending)
        assert limits.number == number + warm.warming
        clock.now += DAY
    text = "messages-per-day = {} of all mail from 127.0.0.2 (addresses.toml:8, day {})"
    assert found == [[text.format(2, 1)], [text.format(4, 2)], [], []]


def test_a_warm_up_may_be_for_one_provider(tmp_path: Path) -> None:
    limits_file = tmp_path / "limits.toml"
    limits_file.write_text("[[provider]]\nname = 'big'\nmx = ['big.test']\n")
    config = Config(
        limits_file=str(limits_file),
        addresses_file=addresses_file(tmp_path, WARM + "provider = 'big'\n"),
    )
    limits = Limits(Shaping.of(config))
    assert allowance(limits, "127.0.0.2", "mx.big.test").warming
    assert not allowance(limits, "127.0.0.2", "mx.small.test").warming
    with pytest.raises(ConfigError, match=r"addresses.toml:8: .*no \[\[provider\]\] 'big'"):
        Shaping.of(config.replace(limits_file=""))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[[warmup]]\nmessages = [1]\n", 1, "either a pool or addresses"),
        ("[[warmup]]\npool = 'a'\nmessages = [1]\n", 2, "there is no pool 'a'"),
        ("[[warmup]]\naddresses = []\nmessages = [1]\n", 2, "is not a list"),
        ("[[warmup]]\naddresses = ['::1']\n", 1, "needs messages"),
        ("[[warmup]]\naddresses = ['::1']\nmessages = [5, 0]\n", 3, "above 0"),
        ("[[warmup]]\naddresses = ['::1']\nmessages = [true]\n", 3, "above 0"),
        ("[[warmup]]\naddresses = ['x']\nmessages = [1]\n", 2, "not an IP address"),
    ],
)
def test_a_mistake_is_said_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LocalIps.parse(text.encode(), "addresses.toml", Config())
    (problem,) = caught.value.problems
    assert problem.where == f"addresses.toml:{line}"
    assert words in problem.text


# Deliveries


async def test_what_a_new_address_may_not_send_leaves_from_the_others_of_its_pool(
    tmp_path: Path,
) -> None:
    async with open_bench(addresses_file=addresses_file(tmp_path, WARM)) as bench:
        for _ in range(30):
            bench.send(pool="new")
        await bench.results("success", count=30)
        assert sources(bench) == {"127.0.0.2": 1, "127.0.0.3": 29}


async def test_mail_that_has_no_other_address_waits_for_its_time(tmp_path: Path) -> None:
    text = WARM.replace("[2, 4]", "[86400]")
    async with open_bench(addresses_file=addresses_file(tmp_path, text)) as bench:
        for _ in range(3):
            bench.send(ips=["127.0.0.2"])
        await bench.results("success", count=3)
        first, _, last = let_go(bench)
        assert last - first > 1.9
        assert bench.queues["retry"] == []
