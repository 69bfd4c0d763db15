"""What instances tell each other: read with care, kept by the receiver's clock."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.rules.cluster import (
    MAX_DOCUMENT,
    MAX_MEMBERS,
    PART_BYTES,
    SILENCE,
    AskRows,
    Document,
    Gone,
    Hello,
    Here,
    Members,
    Ration,
    RowChanges,
    RowPart,
    packed,
    read,
    write,
)
from mailerq.rules.leases import Ownership
from mailerq.rules.row import PAUSE, Row
from mailerq.rules.shared_rows import FIRST_ID, Change
from tests.support import least_seconds

SECOND = 1_000_000_000


def here(name: str = "b", run: str = "1", serial: int = 1, **more: Any) -> Here:
    return Here(name=name, run=run, serial=serial, **more)


CHANGE = Change(version=1, server="b", row=Row(kind=PAUSE, id=FIRST_ID, domain="a.test"))
DOCUMENTS: list[Document] = [
    here(ips=("192.0.2.1", "2001:db8::1"), holds=("192.0.2.1",), messages=1.5, takes="o"),
    Gone(name="b", run="1"),
    Hello(),
    RowChanges(name="b", changes=(CHANGE,)),
    AskRows(name="b", queue="amq.gen-x_-Y", talk="t", part=0),
    RowPart(name="b", talk="t", part=0, changes=(CHANGE,), last=True),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda each: type(each).__name__)
def test_a_document_is_read_as_it_was_written(document: Document) -> None:
    assert read(write(document)) == document


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda each: type(each).__name__)
def test_a_part_of_a_document_is_none(document: Document) -> None:
    data = write(document)
    assert {read(data[:end]) for end in range(len(data))} == {"no document of mailerq"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""}, {"name": "a\n"}, {"name": "a" * 300}, {"run": ""}, {"queue": "\x1b"},
        {"version": "x" * 300}, {"digest": "x" * 300}, {"ips": ["x"]}, {"ips": ["1" * 46]},
        {"ips": [""]}, {"holds": ["fe80::1%eth0"]}, {"ips": ["192.0.2.1"] * 10_001},
        {"serial": "1"}, {"ips": "192.0.2.1"}, {"v": 2}, {"messages": "many"}, {"kind": "there"},
    ],
    ids=lambda wrong: str(wrong)[:40],
)  # fmt: skip
def test_an_announcement_that_cannot_be_is_not_taken(wrong: dict[str, Any]) -> None:
    document = json.loads(write(here()))
    assert isinstance(read(json.dumps(document).encode()), Here)
    assert isinstance(read(json.dumps(document | wrong).encode()), str)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_document_or_a_reason(data: bytes) -> None:
    assert isinstance(read(data), str | Document)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000, b'{"kind":' * 50_000, b" " * (MAX_DOCUMENT + 1), b"\xff\xfe",
        b'{"reload":true}',
    ],
    ids=["nested", "objects", "large", "no UTF-8", "of MailerQ"],
)  # fmt: skip
def test_hostile_and_foreign_documents_have_a_reason(data: bytes) -> None:
    assert isinstance(read(data), str)


def test_an_instance_is_gone_after_its_silence_by_the_clock_of_the_receiver() -> None:
    members = Members("a", "0")
    assert members.hear(here(started=9e9), now=0) == "b joined"
    assert members.hear(here(serial=2), now=SECOND) == ""
    assert members.expire(SILENCE + SECOND) == []
    assert members.expire(SILENCE + SECOND + 1) == ["b"]
    assert members.alive == {}


def test_a_copy_of_an_announcement_does_not_keep_an_instance_alive() -> None:
    members = Members("a", "0")
    members.hear(here(serial=5), now=0)
    members.hear(here(serial=5), now=SILENCE)
    members.hear(here(serial=4), now=SILENCE)
    assert members.expire(SILENCE + 1) == ["b"]


@given(
    st.lists(st.tuples(st.sampled_from("bc"), st.integers(1, 5), st.integers(0, 9)), max_size=40)
)
def test_the_latest_announcement_counts_in_any_order(heard: list[tuple[str, int, int]]) -> None:
    members = Members("a", "0")
    latest: dict[str, int] = {}
    for index, (name, serial, connections) in enumerate(heard):
        members.hear(here(name, serial=serial, connections=connections), now=index)
        latest[name] = max(latest.get(name, 0), serial)
    assert {name: each.here.serial for name, each in members.alive.items()} == latest


def test_an_instance_that_stops_is_gone_unless_it_has_started_again() -> None:
    members = Members("a", "0")
    members.hear(here(run="1"), now=0)
    assert members.hear(here(run="2"), now=1) == "b started again"
    assert not members.leave(Gone(name="b", run="1"))
    assert members.leave(Gone(name="b", run="2"))
    assert not members.leave(Gone(name="b", run="2"))


def test_two_instances_of_one_name_are_told_once() -> None:
    members = Members("a", "0")
    assert members.hear(here("a", run="0"), now=0) == ""
    assert "server-id" in members.hear(here("a", run="1", hostname="mx7"), now=0)
    assert members.hear(here("a", run="1", serial=2), now=0) == ""
    assert members.is_doubled
    assert not members.alive


@pytest.mark.parametrize("queue", ["outbox", "", "results", "amq.gen-", "amq.gen-a\n", "amq.gen-é"])
def test_documents_go_to_queues_of_instances_only(queue: str) -> None:
    assert isinstance(read(write(AskRows(name="b", queue=queue, talk="t", part=0))), str)
    if queue:
        assert isinstance(read(write(here(queue=queue))), str)


@pytest.mark.parametrize(("talk", "part"), [("", 0), ("t" * 65, 0), ("t", -1)])
def test_a_talk_is_short(talk: str, part: int) -> None:
    assert isinstance(read(write(AskRows(name="b", queue="amq.gen-b", talk=talk, part=part))), str)
    assert isinstance(read(write(RowPart(name="b", talk=talk, part=part, changes=()))), str)


def test_the_addresses_of_all_instances_are_bounded() -> None:
    members = Members("a", "0")
    ips = tuple(f"10.0.{number // 256}.{number % 256}" for number in range(10_000))
    news = [members.hear(here(f"x{number}", ips=ips, holds=ips), now=0) for number in range(5)]
    assert sorted(members.alive) == ["x0", "x1"]
    assert "x2 is left out" in news[2]
    members.hear(here("x1", serial=2), now=0)
    members.hear(here("x3", ips=ips), now=0)
    members.leave(Gone(name="x0", run="1"))
    assert members.hear(here("x4", ips=ips, holds=ips), now=0) == "x4 joined"
    assert sorted(members.alive) == ["x1", "x3", "x4"]


def test_a_thousand_instances_cost_little_time() -> None:
    members = Members("a", "0")
    owner = Ownership("a")
    owner.offer({f"192.0.2.{number}" for number in range(20)}, 0.0)
    for number in range(MAX_MEMBERS):
        ips = tuple(f"10.{number // 256}.{number % 256}.{last}" for last in range(25))
        members.hear(here(f"x{number}", ips=ips, holds=ips, takes="o"), now=0)
    assert len(members.alive) == MAX_MEMBERS
    assert least_seconds(lambda: owner.attempts(SECOND, members.ips, members.holds)) < 0.05

    def ask() -> None:
        for _ in range(100):
            assert members.keeper_of(("203.0.113.9",), (), (), "o") is None

    assert least_seconds(ask) < 0.05


def test_what_an_instance_has_now_counts() -> None:
    members = Members("a", "0")
    members.hear(here(ips=(X,), takes="o"), now=0)
    assert members.keeper_of((X,), (), (), "o") is members.alive["b"]
    members.hear(here(serial=2, ips=(Y,), takes="o"), now=0)
    assert members.keeper_of((X,), (), (), "o") is None
    members.hear(here(serial=3, ips=(Y,), takes="p"), now=0)
    assert members.keeper_of((Y,), (), (), "o") is None
    assert members.keeper_of((Y,), (), (), "p") is members.alive["b"]
    members.expire(SILENCE + 1)
    assert members.keeper_of((Y,), (), (), "p") is None


def test_the_number_of_instances_is_bounded() -> None:
    members = Members("a", "0")
    for number in range(MAX_MEMBERS + 5):
        members.hear(here(f"x{number}"), now=0)
    assert len(members.alive) == MAX_MEMBERS


X, Y = "192.0.2.1", "192.0.2.2"


@pytest.mark.parametrize(
    ("b", "c", "held", "available", "expected"),
    [
        ({"ips": (X,), "holds": (X,)}, {}, (), (), "b"),
        ({"ips": (X,), "holds": (X,)}, {}, (), (X,), "b"),
        ({"ips": (X,)}, {}, (), (X,), None),
        ({"ips": (X,)}, {}, (), (), "b"),
        ({"ips": (X,)}, {"ips": (X,), "holds": (X,)}, (), (), "c"),
        ({"ips": (X,), "holds": (X,)}, {}, (Y,), (Y,), None),
        ({"ips": (X,), "holds": (X,), "takes": "other"}, {}, (), (), None),
        ({}, {}, (), (), None),
    ],
    ids=[
        "the owner", "the owner, though we could", "we could", "another could", "owner first",
        "we own one", "does not take mail", "nobody",
    ],
)  # fmt: skip
def test_mail_for_an_address_goes_to_the_instance_that_owns_it(
    b: dict[str, Any], c: dict[str, Any], held: Any, available: Any, expected: str | None
) -> None:
    members = Members("a", "0")
    for name, facts in (("b", b), ("c", c)):
        members.hear(here(name, **{"takes": "o", **facts}), now=0)
    found = members.keeper_of((X, Y), held, available, "o")
    assert (None if found is None else found.here.name) == expected


def test_changes_are_packed_into_documents_that_can_be_read() -> None:
    values = tuple(f"{'x' * 50}{number}@b.test" for number in range(1000))
    row = Row(kind="suppression", id=FIRST_ID, code=550)
    changes = [
        Change(version=n + 1, server="a", row=row, values=values[: 10 * n]) for n in range(100)
    ]
    groups = list(packed(changes))
    assert [each for group in groups for each in group] == changes
    assert 10 < len(groups) < 100
    for group in groups:
        data = write(RowChanges(name="a", changes=group))
        assert len(data) < 2 * PART_BYTES or len(group) == 1
        assert isinstance(read(data), RowChanges)
    worst = tuple(f"{'ü' * 200}{number}@{'b' * 60}.test" for number in range(1000))
    big = Change(version=1, server="a", row=row, values=worst)
    assert len(write(RowChanges(name="a", changes=(big,)))) < MAX_DOCUMENT


def test_a_flood_is_cut_off_until_the_next_second() -> None:
    ration = Ration(3)
    assert [ration.take(5) for _ in range(5)] == [True, True, True, False, False]
    assert ration.take(5 + SECOND)


def test_documents_are_small_where_nothing_is_said() -> None:
    assert len(msgspec.json.encode(here())) < 400
