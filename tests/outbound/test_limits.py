"""Limits: what is refused, and in which order those who wait have their turns."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from mailerq.config import Config
from mailerq.net.resolver import Host
from mailerq.outbound.cells import MemoryCells, boot_time
from mailerq.outbound.limits import Allowance, Limits, Refusal
from mailerq.outbound.sites import Site
from mailerq.rules.rates import SLACK
from mailerq.rules.routes import Route
from mailerq.rules.shaping import Shaping


def shaping(text: str = "", **settings: object) -> Shaping:
    return Shaping.parse(text.encode(), "limits.toml", Config(**settings))  # type: ignore[arg-type]


def site(domain: str = "a.test", *hosts: str, group: str = "") -> Site:
    made = Site(f"{domain} {hosts}".encode(), Route(domain, domain, 25, True))
    made.hosts = tuple(Host(name, "192.0.2.1", 10) for name in hosts or (f"mx.{domain}",))
    made.group = group
    return made


class HeldClock:
    """The time of a rate; it stands still at `start` until it is let go."""

    def __init__(self) -> None:
        self.start = boot_time()
        self.is_held = True

    def __call__(self) -> int:
        return self.start if self.is_held else boot_time()

    def let_go(self) -> None:
        self.is_held = False


class Sender:
    """Sends as often as it may, `left` times."""

    def __init__(self, name: str, limits: Limits, allowance: Allowance, left: int) -> None:
        self.name = name
        self.limits = limits
        self.allowance = allowance
        self.left = left
        self.waits_for = ""
        self.sent: list[tuple[str, int]] = []

    def limit_over(self, key: str) -> None:
        assert key == self.waits_for
        self.waits_for = ""
        self.go()

    def go(self) -> None:
        while self.left and not self.waits_for:
            refusal = self.limits.take(self.allowance.sending)
            if refusal is None:
                self.left -= 1
                self.sent.append((self.name, boot_time()))
            else:
                self.waits_for = self.limits.wait(self, refusal)


@pytest.fixture
async def nursery() -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)


async def until_sent(*senders: Sender) -> None:
    await until(lambda: not any(sender.left for sender in senders))


def test_a_refusal_names_the_limit_the_place_and_the_scope() -> None:
    limits = Limits(shaping("[[limit]]\ndomain = 'a.test'\nmax-connections = 1\n"))
    allowance = limits.of_flow(site(group="a.test"), "192.0.2.9")
    assert limits.take(allowance.opening) is None
    refusal = limits.take(allowance.opening)
    assert refusal is not None
    assert refusal.want.name == "max-connections"
    assert refusal.want.bound.where == "limits.toml:3"
    assert refusal.want.scope == "a.test from 192.0.2.9"
    limits.release(allowance.opening.counts)
    assert limits.take(allowance.opening) is None


@given(st.lists(st.sampled_from(["message", "connection", "end", "time"]), max_size=30))
def test_a_look_at_a_limit_says_what_a_taker_would_hear_and_takes_nothing(steps: list[str]) -> None:
    text = "[[limit]]\nmessages-per-minute = 60\nmax-connections = 2\n"
    now = 0
    looked_at, other = (
        Limits(shaping(text, domain_maxconnections=0), MemoryCells(lambda: now)) for _ in range(2)
    )
    allowances = [each.of_flow(site(), None) for each in (looked_at, other)]
    held = 0
    for step in steps:
        rate, count = allowances[0].sending, allowances[0].opening
        states = [looked_at.state(want) for want in (rate.each[0], count.each[0])]
        assert states[1].used == held
        if step == "message":
            refusals = [
                each.take(allowance.sending)
                for each, allowance in zip((looked_at, other), allowances, strict=True)
            ]
            assert states[0].allowed is (refusals[0] is None) is (refusals[1] is None)
        elif step == "connection":
            refusals = [
                each.take(allowance.opening)
                for each, allowance in zip((looked_at, other), allowances, strict=True)
            ]
            assert states[1].allowed is (refusals[0] is None) is (refusals[1] is None)
            held += refusals[0] is None
        elif step == "end" and held:
            held -= 1
            for each in (looked_at, other):
                each.release(count.counts)
        else:
            now += 500_000_000


def test_scopes_count_for_each_local_address() -> None:
    limits = Limits(shaping(domain_maxconnections=1))
    for ip in (None, "192.0.2.8", "192.0.2.9"):
        assert limits.take(limits.of_flow(site(), ip).opening) is None
    assert limits.take(limits.of_flow(site(), "192.0.2.9").opening) is not None


PROVIDER = """
[[provider]]
name = "big"
mx = ["big.test"]
[[limit]]
provider = "big"
max-connections = 3
"""


@pytest.mark.parametrize("ip", [None, "192.0.2.9"])
@pytest.mark.parametrize("most", [0, 3])
def test_sites_without_a_line_of_their_own_have_a_limit_each(ip: str | None, most: int) -> None:
    limits = Limits(shaping(domain_maxconnections=most, connection_maxidle=7000))
    first = limits.of_flow(site("a.test"), ip)
    later = [limits.of_flow(site(name), ip) for name in ("a.test", "b.test")]
    for found, name in zip(later, ("a.test", "b.test"), strict=True):
        fresh = Limits(limits.shaping).of_flow(site(name), ip)
        for member in ("number", "sending", "opening", "idle", "most", "warming"):
            assert getattr(found, member) == getattr(fresh, member)
        for member in ("connection_messages", "connection_bytes", "connection_idle"):
            assert getattr(found, member) == getattr(fresh, member)
    assert first.opening == later[0].opening
    assert bool(most) == (later[0].opening != later[1].opening)
    limits.change(shaping(domain_maxconnections=most + 1))
    assert limits.of_flow(site("a.test"), ip).most == most + 1


def test_the_provider_and_the_site_must_both_allow() -> None:
    limits = Limits(shaping(PROVIDER, domain_maxconnections=2))
    one, two = (limits.of_flow(site(name, f"{name}.big.test"), None) for name in ("one", "two"))
    assert [limits.take(one.opening) is None for _ in range(3)] == [True, True, False]
    refusal = limits.take(one.opening)
    assert refusal is not None and refusal.want.scope == "one"
    assert [limits.take(two.opening) is None for _ in range(2)] == [True, False]
    refusal = limits.take(two.opening)
    assert refusal is not None and refusal.want.scope == "provider big"
    assert one.most == two.most == 2


def test_remote_addresses_count_over_all_sites() -> None:
    limits = Limits(shaping(ip_maxconnections=1))
    assert limits.take(limits.of_remote("192.0.2.1", None).opening) is None
    refusal = limits.take(limits.of_remote("192.0.2.1", None).opening)
    assert refusal is not None and refusal.want.scope == "192.0.2.1"
    assert limits.take(limits.of_remote("192.0.2.2", None).opening) is None


def test_a_limit_of_an_address_holds_from_the_change_on() -> None:
    limits = Limits(shaping())
    free = limits.of_remote("192.0.2.1", None)
    assert free.most == 0 and free.number == limits.number
    limits.change(shaping(ip_maxconnections=1))
    assert limits.of_remote("192.0.2.1", None).most == 1
    limits.change(shaping())
    free = limits.of_remote("192.0.2.1", None)
    assert free.most == 0 and free.number == limits.number


def test_starting_is_given_back_before_the_connection() -> None:
    limits = Limits(shaping(domain_maxstarting=1, domain_maxconnections=2))
    opening = limits.of_flow(site(), None).opening
    assert limits.take(opening) is None
    assert limits.take(opening) is not None
    limits.release(opening.starting)
    assert limits.take(opening) is None
    assert len(opening.counts) == 2


async def test_those_who_wait_for_one_limit_take_turns(nursery: trio.Nursery) -> None:
    clock = HeldClock()
    limits = Limits(shaping(domain_maxmessages=600), MemoryCells(clock))
    nursery.start_soon(limits.run)
    senders = [Sender(name, limits, limits.of_flow(site(), None), 3) for name in "abc"]
    for sender in senders:
        sender.go()
    clock.let_go()
    await until_sent(*senders)
    sent = sorted((at, name) for sender in senders for name, at in sender.sent)
    assert sent[-1][0] - clock.start >= 8 * 100_000_000 - SLACK
    # The first takes two: its own, and its turn as the first in line.
    assert [name for _, name in sent] == [*"aabcabcbc"]
    assert limits.statistics() == {"limited": 0, "limits": {}}


async def test_a_freed_connection_wakes_one(nursery: trio.Nursery) -> None:
    limits = Limits(shaping(domain_maxconnections=1))
    nursery.start_soon(limits.run)
    opening = limits.of_flow(site(), None).opening
    taken: list[int] = []

    class Opener:
        def __init__(self, number: int) -> None:
            self.number = number

        def limit_over(self, key: str) -> None:
            refusal = limits.take(opening)
            if refusal is None:
                taken.append(self.number)
            else:
                limits.wait(self, refusal)

    assert limits.take(opening) is None
    for number in range(3):
        refusal = limits.take(opening)
        assert refusal is not None
        limits.wait(Opener(number), refusal)
    named = {"max-connections = 1 of a.test (domain-maxconnections)": 3}
    assert limits.statistics() == {"limited": 3, "limits": named}
    for number in range(3):
        limits.release(opening.counts)
        await until(partial(taken.__contains__, number))
    assert taken == [0, 1, 2] and limits.statistics()["limited"] == 0


async def test_a_change_of_the_limits_asks_everybody_again(nursery: trio.Nursery) -> None:
    limits = Limits(shaping(domain_maxmessages=1))
    nursery.start_soon(limits.run)
    senders = [Sender(name, limits, limits.of_flow(site(), None), 3) for name in "ab"]
    for sender in senders:
        sender.go()
    assert [sender.left for sender in senders] == [2, 3]
    for sender in senders:
        sender.allowance = Allowance(1, (), {})
    limits.change(shaping())
    await until_sent(*senders)


async def test_who_leaves_a_line_is_not_woken(nursery: trio.Nursery) -> None:
    clock = HeldClock()
    limits = Limits(shaping(domain_maxmessages=600), MemoryCells(clock))
    nursery.start_soon(limits.run)
    stays, goes = (Sender(name, limits, limits.of_flow(site(), None), 2) for name in "ab")
    stays.go()
    goes.go()
    limits.leave(goes, goes.waits_for)
    clock.let_go()
    await until_sent(stays)
    assert goes.left == 2


async def test_bytes_are_paid_for_by_what_follows(nursery: trio.Nursery) -> None:
    clock = HeldClock()
    limits = Limits(shaping(domain_maxbytes=60_000), MemoryCells(clock))
    nursery.start_soon(limits.run)
    allowance = limits.of_flow(site(), None)
    assert limits.take(allowance.sending, 200) is None
    sender = Sender("a", limits, allowance, 1)
    sender.go()
    assert sender.left == 1
    clock.let_go()
    await until_sent(sender)
    assert boot_time() - clock.start >= 200_000_000 - SLACK


def test_many_who_wait_for_one_limit_are_not_all_asked_each_time() -> None:
    limits = Limits(shaping(domain_maxmessages=1))
    asked = 0

    class Late:
        def limit_over(self, key: str) -> None:
            nonlocal asked
            asked += 1
            refusal = limits.take(allowance.sending)
            assert refusal is not None
            limits.wait(self, refusal)

    allowance = limits.of_flow(site(), None)
    assert limits.take(allowance.sending) is None
    refusal = limits.take(allowance.sending)
    assert isinstance(refusal, Refusal)
    key = {limits.wait(Late(), refusal) for _ in range(1000)}.pop()
    limits._serve(limits._lines[key])
    assert asked == 0 and limits.statistics()["limited"] == 1000
