"""What happens after a refusal of more mail: a pause, a probe, and a little more at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mailerq.rules.answers import Trigger
from mailerq.rules.reactions import Reaction
from mailerq.rules.recovery import IDLE_SECONDS, Recovery, Stage
from mailerq.rules.triggers import Triggers

PAUSE = Reaction(pause=600.0, max_pause=4 * 3600.0)
SLOW = Reaction(slow=0.5, lasts=1800.0)
FEWER = Reaction(fewer_connections=1, lasts=3600.0)


def refuse(
    recovery: Recovery, reaction: Reaction, now: float, connections: int = 5, most: int = 0
) -> bool:
    return recovery.refuse(reaction, now, connections=connections, most=most)


# Pauses.


def test_after_a_pause_one_connection_probes_and_then_more_follow() -> None:
    recovery = Recovery()
    assert refuse(recovery, PAUSE, 0.0, most=4)
    assert (recovery.stage, recovery.until) == (Stage.PAUSED, 600)
    assert not recovery.advance(599.0)
    assert recovery.advance(600.0)
    assert (recovery.stage, recovery.connections) == (Stage.PROBING, 1)
    assert recovery.succeed(601.0)
    assert (recovery.stage, recovery.connections, recovery.share) == (Stage.RECOVERING, 1, 0.1)
    allowed = []
    for _ in range(6):
        recovery.succeed(602.0)
        allowed.append(recovery.connections)
    assert allowed == [2, 2, 3, 3, 3, None]
    shares = []
    for minute in range(1, 10):
        recovery.advance(601.0 + 60 * minute)
        shares.append(recovery.share)
    assert shares == [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert recovery.stage is Stage.NORMAL


def test_a_refused_probe_pauses_twice_as_long_up_to_the_longest_pause() -> None:
    recovery, now, lengths = Recovery(), 0.0, []
    for _ in range(7):
        assert refuse(recovery, PAUSE, now)
        lengths.append(recovery.until - now)
        now = recovery.until + 1
    assert lengths == [600, 1200, 2400, 4800, 9600, 14400, 14400]


def test_replies_under_way_do_not_prolong_a_pause() -> None:
    recovery = Recovery()
    assert refuse(recovery, PAUSE, 0.0)
    assert not refuse(recovery, PAUSE, 1.0)
    assert not recovery.succeed(2.0)
    assert (recovery.until, recovery.paused_for) == (600, 600)


def test_a_probe_that_nobody_makes_ends_in_time() -> None:
    recovery = Recovery()
    refuse(recovery, PAUSE, 0.0)
    recovery.advance(600.0)
    assert not recovery.advance(600.0 + IDLE_SECONDS - 1)
    assert recovery.next_change == 600.0 + IDLE_SECONDS
    assert recovery.advance(recovery.next_change)
    assert recovery.stage is Stage.NORMAL


# Lower rates and fewer connections.


def test_a_lower_rate_stays_for_its_time_and_comes_back_by_tenths() -> None:
    recovery = Recovery()
    assert refuse(recovery, SLOW, 0.0)
    assert (recovery.stage, recovery.share, recovery.connections) == (Stage.RECOVERING, 0.5, None)
    assert not recovery.advance(1859.0)
    assert recovery.next_change == 1860.0
    assert recovery.advance(1860.0)
    assert recovery.share == 0.6
    assert recovery.advance(1860.0 + 240)
    assert recovery.stage is Stage.NORMAL


def test_a_rate_is_lowered_once_a_minute_at_most() -> None:
    recovery = Recovery()
    assert [refuse(recovery, SLOW, now) for now in (0.0, 1.0, 59.0, 60.0)] == [
        True, False, False, True,
    ]  # fmt: skip
    assert recovery.share == 0.25


def test_connections_are_counted_down_from_what_is_open() -> None:
    recovery = Recovery()
    assert refuse(recovery, FEWER, 0.0, connections=5)
    assert recovery.connections == 4 and recovery.share == 1.0
    assert refuse(recovery, FEWER, 100.0, connections=9)
    assert recovery.connections == 3
    for now in (200.0, 300.0, 400.0):
        refuse(recovery, FEWER, now, connections=3)
    assert recovery.connections == 1
    assert not recovery.succeed(500.0), "they stay for an hour"
    assert recovery.succeed(4001.0) and recovery.connections == 2


def test_a_rate_in_messages_ends_at_its_time() -> None:
    recovery = Recovery()
    reaction = Reaction(messages_per_minute=1, max_connections=1, lasts=5400.0)
    assert refuse(recovery, reaction, 0.0)
    assert (recovery.rate, recovery.connections) == (1, 1)
    assert recovery.next_change == 5400.0
    assert recovery.advance(5400.0)
    assert (recovery.rate, recovery.connections) == (None, 1)


def test_a_success_that_comes_before_the_clock_is_looked_at_tells_what_has_changed() -> None:
    recovery = Recovery()
    assert refuse(recovery, SLOW, 0.0)
    assert not recovery.succeed(1859.0) and recovery.share == 0.5
    assert recovery.succeed(1860.0) and recovery.share == 0.6
    assert recovery.succeed(3600.0) and recovery.stage is Stage.NORMAL


def test_the_state_can_be_kept() -> None:
    recovery = Recovery()
    refuse(recovery, PAUSE, 5.0)
    assert Recovery.from_dict(recovery.to_dict()) == recovery
    with pytest.raises(ValueError):
        Recovery.from_dict({"stage": "asleep"})


class Anything(RuleBasedStateMachine):
    """Refusals, successes and time in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.recovery = Recovery()
        self.now = 0.0

    @rule(seconds=st.sampled_from([0.0, 1.0, 59.0, 60.0, 600.0, 3600.0]))
    def time_goes_on(self, seconds: float) -> None:
        before = self.recovery.share, self.recovery.connections
        self.now += seconds
        self.recovery.advance(self.now)
        assert self.recovery.share >= before[0] and self.recovery.connections == before[1]

    @rule(seconds=st.sampled_from([60.0, 600.0]))
    def time_goes_on_unseen(self, seconds: float) -> None:
        self.now += seconds

    @rule(reaction=st.sampled_from([PAUSE, SLOW, FEWER]), connections=st.integers(0, 50))
    def refusal(self, reaction: Reaction, connections: int) -> None:
        until = self.recovery.until
        was_paused = self.recovery.stage is Stage.PAUSED and self.now < until
        share = self.recovery.share
        refuse(self.recovery, reaction, self.now, connections, most=10)
        assert self.recovery.share <= max(share, 1.0)
        if was_paused:
            assert self.recovery.until == until

    @rule()
    def success(self) -> None:
        before, seen = self.recovery.connections, self.what_flows_see()
        changed = self.recovery.succeed(self.now)
        after = self.recovery.connections
        assert changed or seen == self.what_flows_see()
        assert before is None or after is None or before <= after <= before + 1

    def what_flows_see(self) -> tuple[object, ...]:
        recovery = self.recovery
        return recovery.stage, recovery.share, recovery.rate, recovery.connections

    @invariant()
    def what_is_allowed_is_in_bounds(self) -> None:
        recovery = self.recovery
        assert 0 < recovery.share <= 1
        assert recovery.connections is None or 1 <= recovery.connections <= 10
        assert recovery.paused_for <= 4 * 3600
        if recovery.stage in (Stage.PAUSED, Stage.PROBING):
            assert recovery.connections == 1

    @invariant()
    def a_peer_that_takes_all_gets_all_again(self) -> None:
        recovery = Recovery.from_dict(self.recovery.to_dict())
        now = self.now
        for _ in range(400):
            recovery.advance(now)
            for _ in range(20):
                recovery.succeed(now)
            if recovery.stage is Stage.NORMAL:
                return
            now += 60
        raise AssertionError(recovery)

    @invariant()
    def nothing_changes_before_its_time(self) -> None:
        recovery = Recovery.from_dict(self.recovery.to_dict())
        if recovery.stage is not Stage.NORMAL and recovery.next_change > self.now:
            assert not recovery.advance((self.now + recovery.next_change) / 2)


TestAnything = Anything.TestCase


# Triggers.


@given(
    st.integers(1, 4),
    st.floats(0.5, 5),
    st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 3)), max_size=40),
)
def test_a_trigger_is_met_by_enough_replies_within_its_time(
    replies: int, seconds: float, events: list[tuple[str, float]]
) -> None:
    triggers, now = Triggers(), 0.0
    seen: dict[str, list[float]] = {"a": [], "b": []}
    for key, later in events:
        now += later
        seen[key] = [*(at for at in seen[key] if at > now - seconds), now]
        expected = len(seen[key]) >= replies
        assert triggers.met(key, Trigger(replies, seconds), now) is expected
        if expected:
            seen[key] = []


def test_counters_are_bounded() -> None:
    triggers = Triggers(most=10)
    for key in range(1000):
        triggers.met(key, Trigger(3, 60.0), 0.0)
    assert len(triggers) == 10
    assert not triggers.met(999, Trigger(3, 60.0), 1.0)
    assert triggers.met(999, Trigger(3, 60.0), 2.0), "the last ones are kept"


def test_a_trigger_of_one_keeps_nothing() -> None:
    triggers = Triggers()
    assert triggers.met("a", Trigger(), 0.0) and len(triggers) == 0
