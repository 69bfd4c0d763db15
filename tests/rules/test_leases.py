"""One owner for each address: whatever is lost, late or cut off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from mailerq.rules.leases import (
    LEASE,
    MEMORY_SECONDS,
    RETRY,
    STEP,
    TAKEOVER,
    Lease,
    Ownership,
    ranked,
)
from mailerq.rules.rates import MINUTE, advanced, cost

IP = "192.0.2.1"
SECOND = 1_000_000_000
NAMES = ("a", "b", "c")


@dataclass
class Instance:
    """An instance, its connection as the broker sees it, and answers that are on their way."""

    name: str
    owner: Ownership
    connected: bool = True  # at the broker
    believes: bool = True  # that it is connected
    answers: list[tuple[int, int]] = field(default_factory=list)
    cell: int = 0
    seen: int = 0


class World:
    """A broker with one lock, and instances whose links do what links do."""

    def __init__(self) -> None:
        self.now = 1000 * SECOND
        self.holder = ""
        self.instances = {name: Instance(name, self.started(name)) for name in NAMES}
        self.sent: list[int] = []

    @staticmethod
    def started(name: str) -> Ownership:
        owner = Ownership(name, {IP: 0.0})
        owner.offer([IP], 0.0)
        return owner

    def others(self, name: str) -> dict[str, list[str]]:
        return {each: [IP] for each in NAMES if each != name}

    def try_lock(self, each: Instance) -> None:
        free = self.holder in ("", each.name)
        if each.connected and each.believes and free and each.owner.attempts(self.now, {}):
            self.holder = each.name
            each.owner.locked(IP, self.now)

    def publish(self, each: Instance, delay: int) -> None:
        """The broker answers what it gets; the answer comes later, or never."""
        if each.connected and each.believes:
            each.answers.append((self.now + delay, self.now))

    def deliver(self, each: Instance) -> None:
        for due, sent in list(each.answers):
            if due <= self.now and each.believes:
                each.answers.remove((due, sent))
                each.owner.proved(sent)

    def cut(self, each: Instance) -> None:
        """The broker drops the connection; the instance does not hear of it."""
        each.connected = False
        if self.holder == each.name:
            self.holder = ""

    def notice(self, each: Instance) -> None:
        if not each.connected and each.believes:
            each.believes = False
            each.answers.clear()
            each.owner.disconnected()

    def reconnect(self, each: Instance) -> None:
        self.notice(each)
        if not each.believes:
            each.connected = each.believes = True

    def kill(self, each: Instance) -> None:
        self.cut(each)
        each.connected = each.believes = True
        each.answers.clear()
        each.owner, each.cell = self.started(each.name), 0

    def check(self) -> None:
        valid = [
            each.name
            for each in self.instances.values()
            if each.owner.leases[IP].is_valid(self.now)
        ]
        assert len(valid) <= 1, valid


STEPS = st.tuples(
    st.sampled_from(("", "", "", "cut", "notice", "reconnect", "kill")),
    st.sampled_from(NAMES),
    st.sampled_from((SECOND // 10, SECOND, SECOND, 2 * SECOND, LEASE - 1)),
    st.sets(st.sampled_from(NAMES), max_size=2),
)
"""What happens to one instance, how much time passes, and which instances are slow."""

Step = tuple[str, str, int, set[str]]


def play(world: World, steps: list[Step]) -> Iterator[Instance]:
    """Yield each instance in each step, after all of them had their turn."""
    for what, name, passed, slow in steps:
        world.now += passed
        if what:
            getattr(world, what)(world.instances[name])
        for each in world.instances.values():
            world.deliver(each)
            if each.name not in slow:
                world.try_lock(each)
                world.publish(each, 0 if what else passed)
                world.deliver(each)
        yield from world.instances.values()


@settings(max_examples=300)
@given(st.lists(STEPS, min_size=20, max_size=60))
def test_two_instances_never_use_an_address_at_a_time(steps: list[Step]) -> None:
    world = World()
    for _ in play(world, steps):
        world.check()


@given(st.lists(STEPS, max_size=60), st.sampled_from((1, 2, 10, 60)))
def test_the_instances_together_never_exceed_a_limit(steps: list[Step], limit: int) -> None:
    """Each counts alone, and begins anew with each lease; no minute sees more than the limit."""
    world = World()
    price = cost(1, limit)
    for each in play(world, steps):
        lease = each.owner.leases[IP]
        # What `outbound.limits` does with each right to send.
        while lease.is_valid(world.now) and max(each.cell, lease.begin() + price) <= world.now:
            each.cell = advanced(each.cell, world.now, price)
            world.sent.append(world.now)
    for index, begin in enumerate(world.sent):
        assert sum(begin <= when < begin + MINUTE for when in world.sent[index:]) <= limit


def test_the_next_owner_waits_until_the_lease_of_a_cut_off_one_has_ended() -> None:
    world = World()
    first, second = world.instances["a"], world.instances["b"]
    world.try_lock(first)
    world.now += TAKEOVER
    world.publish(first, 0)
    world.deliver(first)
    world.cut(first)
    world.try_lock(second)
    for _ in range(12):
        world.publish(second, 0)
        world.deliver(second)
        world.check()
        world.now += SECOND // 2
    assert second.owner.leases[IP].is_valid(world.now)


def test_a_lease_lasts_while_the_broker_answers_and_no_longer() -> None:
    owner = World.started("a")
    owner.locked(IP, 0)
    lease = owner.leases[IP]
    owner.proved(TAKEOVER - SECOND)
    assert not lease.is_valid(TAKEOVER - 1)
    assert lease.is_valid(TAKEOVER)
    end = TAKEOVER - SECOND + LEASE
    assert lease.is_valid(end - 1)
    assert not lease.is_valid(end)
    owner.proved(0)  # late
    assert lease.is_valid(end - 1)
    owner.disconnected()
    assert not lease.is_valid(TAKEOVER)


def test_an_address_that_nobody_else_has_needs_no_broker() -> None:
    owner = Ownership("a")
    owner.offer([IP], 0.0)
    assert owner.leases[IP].is_valid(0)
    assert owner.leases[IP].begin() == 0
    owner.heard([IP], 5.0)
    assert not owner.leases[IP].is_valid(0)
    again = Ownership("a", owner.rivals)
    again.offer([IP], 6.0)
    assert not again.leases[IP].is_valid(0)  # over a restart as well
    again.forget(5.0 + MEMORY_SECONDS)
    assert not again.leases[IP].is_valid(0)
    again.forget(6.0 + MEMORY_SECONDS)
    assert again.leases[IP].is_valid(0)


def test_a_rival_for_another_address_changes_nothing() -> None:
    owner = Ownership("a")
    owner.offer([IP], 0.0)
    owner.heard(["192.0.2.9"], 5.0)
    assert owner.leases[IP].is_valid(0)
    assert not owner.rivals


def test_the_first_in_rank_tries_first_and_others_follow() -> None:
    names = ranked(IP, NAMES)
    others = {name: [IP] for name in NAMES}
    owners = {name: World.started(name) for name in names}
    for place, name in enumerate(names):
        rivals = {each: others[each] for each in NAMES if each != name}
        owner = owners[name]
        assert bool(owner.attempts(0, rivals)) == (place == 0)
        if place:
            assert not owner.attempts(place * STEP - 1, rivals)
            assert owner.attempts(place * STEP, rivals) == [IP]


def test_an_address_that_another_instance_holds_is_not_tried_until_it_is_free() -> None:
    owner = World.started("a")
    assert owner.attempts(0, {"b": [IP]}, {IP}) == []
    assert owner.attempts(RETRY // 2, {}, ()) == [IP]


def test_an_attempt_that_failed_is_made_again_later() -> None:
    owner = World.started("a")
    assert owner.attempts(0, {}) == [IP]
    assert owner.attempts(RETRY - 1, {}) == []
    assert owner.attempts(RETRY, {}) == [IP]


def test_an_address_that_is_no_longer_there_is_given_up() -> None:
    owner = World.started("a")
    owner.locked(IP, 0)
    assert owner.offer(["192.0.2.2"], 0.0) == [IP]
    assert set(owner.leases) == {"192.0.2.2"}
    assert not owner.held
    owner.proved(0)


def test_a_lease_shows_what_it_is() -> None:
    assert "192.0.2.1 from 1 until 2, alone" in repr(Lease(IP, 1, 2, alone=True))
