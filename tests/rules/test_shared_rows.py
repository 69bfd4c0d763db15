"""Rows that a cluster shares end up alike, whatever order their changes come in."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.errors import RowError
from mailerq.rules import shared_rows
from mailerq.rules.row import PAUSE, SUPPRESSION, Row
from mailerq.rules.shared_rows import FIRST_ID, Change, Shared, checked_change

PAUSES = [Row(kind=PAUSE, id=FIRST_ID + n, domain="a.test") for n in range(2)]
LISTS = [Row(kind=SUPPRESSION, id=FIRST_ID + 5 + n, code=550) for n in range(2)]
VALUES = ("a@b.test", "c@b.test", "d.test")

State = tuple[object, ...]


def contents(shared: Shared) -> State:
    return (
        shared.rows,
        dict(shared._values.items()),
        sorted(shared.dead),
        shared.digest,
    )


@st.composite
def histories(draw: st.DrawFn) -> list[Change]:
    """What three instances do, each knowing some of what the others did."""
    servers = {name: Shared() for name in "abc"}
    changes: list[Change] = []
    for _ in range(draw(st.integers(1, 14))):
        name = draw(st.sampled_from("abc"))
        shared = servers[name]
        for change in draw(st.lists(st.sampled_from(changes), max_size=3)) if changes else ():
            shared.merge(change)
        version = shared.version + 1
        kind = draw(st.sampled_from(("add", "end", "suppress", "free")))
        made = {"version": version, "server": name}
        if kind == "add":
            row = draw(st.sampled_from(PAUSES))
            row = msgspec.structs.replace(row, reason=f"{version} {name}")
            change = Change(**made, row=row)
        elif kind == "end":
            change = Change(**made, end=(draw(st.sampled_from(PAUSES + LISTS)).id,))
        elif kind == "suppress":
            values = tuple(draw(st.sets(st.sampled_from(VALUES), min_size=1)))
            change = Change(**made, row=draw(st.sampled_from(LISTS)), values=values)
        else:
            change = Change(**made, free=tuple(draw(st.sets(st.sampled_from(VALUES), min_size=1))))
        shared.merge(change)
        changes.append(change)
    return changes


def merged(changes: Sequence[Change]) -> Shared:
    shared = Shared()
    for change in changes:
        shared.merge(change)
    return shared


@given(histories(), st.randoms(use_true_random=False))
def test_changes_in_any_order_and_more_than_once_make_the_same_rows(
    changes: list[Change], lot: random.Random
) -> None:
    expected = contents(merged(changes))
    for _ in range(3):
        order = changes + lot.sample(changes, len(changes) // 2)
        lot.shuffle(order)
        assert contents(merged(order)) == expected


@given(histories(), st.randoms(use_true_random=False))
def test_instances_that_lost_changes_are_alike_after_they_exchange_all(
    changes: list[Change], lot: random.Random
) -> None:
    one, other = (merged([each for each in changes if lot.random() < 0.6]) for _ in range(2))
    for _ in range(2):
        for change in list(one.changes()):
            other.merge(change)
        for change in list(other.changes()):
            one.merge(change)
    assert contents(one) == contents(other)


@given(histories())
def test_all_rows_in_parts_make_the_same_rows(changes: list[Change]) -> None:
    shared = merged(changes)
    copy = merged([checked_change(change) for change in shared.changes()])
    assert contents(copy) == contents(shared)
    assert not any(map(shared.is_news, copy.changes()))


@given(histories())
def test_what_is_no_news_has_no_effect(changes: list[Change]) -> None:
    shared = Shared()
    for change in changes:
        known, news = contents(shared), shared.is_news(change)
        effect = shared.merge(change)
        assert news or (not effect and contents(shared) == known)
        assert not shared.is_news(change)


def test_a_removed_row_does_not_come_back() -> None:
    row = PAUSES[0]
    shared = merged([Change(version=1, server="a", row=row)])
    assert shared.merge(Change(version=2, server="a", end=(row.id,))).ended == (row.id,)
    assert not shared.merge(Change(version=9, server="b", row=row))
    assert not shared.rows


def test_the_end_of_a_suppression_frees_its_addresses() -> None:
    row = LISTS[0]
    shared = merged([Change(version=1, server="a", row=row, values=("a@b.test",))])
    assert shared.is_suppressing("a@b.test")
    shared.merge(Change(version=2, server="a", end=(row.id,)))
    assert not shared.is_suppressing("a@b.test")
    assert shared.digest == Shared().digest


def test_a_row_that_is_over_leaves_no_trace() -> None:
    shared = merged([Change(version=1, server="a", row=LISTS[0], values=("a@b.test",))])
    shared.over([LISTS[0].id])
    assert contents(shared) == contents(Shared())


def test_what_is_remembered_of_removed_rows_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_rows, "MAX_DEAD", 3)
    monkeypatch.setattr(shared_rows, "MAX_FREED", 2)
    shared = Shared()
    for number in range(9):
        shared.merge(Change(version=number + 1, server="a", end=(FIRST_ID + number,)))
        shared.merge(Change(version=number + 1, server="a", free=(f"{number}@b.test",)))
    assert list(shared.dead) == [FIRST_ID + 6, FIRST_ID + 7, FIRST_ID + 8]
    assert len(list(shared.changes())) == 3


@pytest.mark.parametrize(
    "change",
    [
        Change(version=0, server="a"),
        Change(version=1 << 60, server="a"),
        Change(version=1, server=""),
        Change(version=1, server="a\n"),
        Change(version=1, server="a" * 300),
        Change(version=1, server="a", who="\x1b"),
        Change(version=1, server="a", end=(7,)),
        Change(version=1, server="a", end=tuple(range(FIRST_ID, FIRST_ID + 1001))),
        Change(version=1, server="a", row=Row(kind=PAUSE, id=3)),
        Change(version=1, server="a", row=Row(kind="limit", id=FIRST_ID)),
        Change(version=1, server="a", row=Row(kind=PAUSE, id=FIRST_ID, domain="a b")),
        Change(version=1, server="a", row=Row(kind=PAUSE, id=FIRST_ID, values={"x": 1})),
        Change(version=1, server="a", row=PAUSES[0], values=("a@b.test",)),
        Change(version=1, server="a", row=LISTS[0], values=("a@",)),
        Change(version=1, server="a", free=("a b.test",)),
    ],
    ids=repr,
)
def test_a_change_that_is_none_is_refused(change: Change) -> None:
    with pytest.raises(RowError):
        checked_change(change)


def test_a_change_from_another_host_is_brought_into_form() -> None:
    row = msgspec.structs.replace(LISTS[0], reason="a\nb", hits=7)
    change = Change(version=1, server="a", why="x\ty", row=row, values=("Ann@B.test",))
    found = checked_change(change)
    assert found.row is not None
    assert (found.why, found.values, found.row.reason, found.row.hits) == (
        "x?y", ("ann@b.test",), "a?b", 0,
    )  # fmt: skip
