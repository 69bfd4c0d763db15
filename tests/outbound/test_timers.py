"""Timers against a table of all times."""

from __future__ import annotations

import gc
import math
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from mailerq.outbound.timers import Times


class Thing:
    __slots__ = ("name", "when")

    def __init__(self, name: int) -> None:
        self.name = name
        self.when = math.inf


times = st.floats(-3.0, 5.0) | st.integers(-3, 5).map(float)
steps = st.lists(
    st.tuples(st.sampled_from(["set", "set_earlier", "discard", "pop"]), st.integers(0, 5), times)
)


@given(steps)
def test_what_has_come_is_popped_in_order(steps: list[tuple[str, int, float]]) -> None:
    things = [Thing(name) for name in range(6)]
    found, model = Times[Thing](), dict[Thing, float]()
    for step, number, when in steps:
        thing = things[number]
        match step:
            case "set":
                found.set(thing, when)
                model[thing] = when
            case "set_earlier":
                found.set_earlier(thing, when)
                model[thing] = min(model.get(thing, math.inf), when)
            case "discard":
                found.discard(thing)
                model.pop(thing, None)
            case "pop":
                popped = list(found.pop_until(when))
                due = {thing: at for thing, at in model.items() if at <= when}
                assert set(popped) == set(due) and len(popped) == len(due)
                assert [due[thing] for thing in popped] == sorted(due.values())
                for thing in popped:
                    del model[thing]
        first = min(model.values(), default=math.inf)
        assert found.first <= first
        assert len(found) == len(model)
    assert [thing.when for thing in things] == [model.get(thing, math.inf) for thing in things]


def test_a_thing_may_be_set_again_while_others_are_popped() -> None:
    one, two, found = Thing(1), Thing(2), Times[Thing]()
    found.set(one, 1.5)
    found.set(two, 1.6)
    popped = []
    for thing in found.pop_until(2.0):
        popped.append(thing)
        if len(popped) == 1:
            found.set(thing, 1.9)
            found.set(two, 7.0)
    assert popped == [one, one]
    assert two.when == 7.0


def test_the_first_time_is_at_most_a_second_early_and_then_exact() -> None:
    thing, found = Thing(1), Times[Thing]()
    found.set(thing, 100.5)
    assert found.first == 100.0
    assert list(found.pop_until(100.0)) == []
    assert found.first == 100.5


def test_times_that_change_leave_nothing_behind() -> None:
    things, found = [Thing(name) for name in range(100)], Times[Thing]()
    gc.collect()
    tracemalloc.start()
    try:
        for turn in range(1000):
            for thing in things:
                found.set(thing, 1e6 - turn + 0.5)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 30_000
    assert len(list(found.pop_until(1e6))) == 100


def test_a_time_that_is_far_is_small() -> None:
    things, found = [Thing(name) for name in range(10_000)], Times[Thing]()
    gc.collect()
    tracemalloc.start()
    try:
        for thing in things:
            found.set(thing, 1000.25 + thing.name % 100)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used / len(things) < 50
