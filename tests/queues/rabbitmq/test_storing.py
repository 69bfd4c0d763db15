"""Which bodies leave their messages, and for how long they are stored."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from mailerq.config import Config
from mailerq.errors import StorageError
from mailerq.message import Message, format_time
from mailerq.queues import DAMAGED_QUEUE, Publication
from mailerq.queues.rabbitmq.storing import INSIDE_BYTES, OTHERS_SECONDS, Storing, Terms

NOW = 1_800_000_000.0
LARGE = 100_000


class Shelf:
    """A storage that notes what it gets."""

    def __init__(self, *, away: bool = False) -> None:
        self.away = away
        self.puts: list[tuple[bytes, float]] = []

    async def put(self, body: bytes, until: float) -> str:
        await trio.lowlevel.checkpoint()
        if self.away:
            raise StorageError("away")
        self.puts.append((body, until))
        return f"key{len(self.puts)}"


def terms(policy: str = "all", **more: Any) -> Terms:
    return Terms.of(Config(storage_policy=policy, max_delivertime=1000.0, storage_ttl=10.0, **more))


def publication(
    body: bytes | None = b"body", queue: str = "outbox", due: float | None = None, **properties: Any
) -> Publication:
    return Publication(queue, Message({"recipient": "c@d.test", **properties}, body), due)


@pytest.mark.parametrize(
    ("policy", "size", "incoming", "retry", "result"),
    [
        ("all", 4, True, True, True),
        ("in", 4, True, False, False),
        ("out", 4, False, True, False),
        ("none", 4, False, False, False),
        ("in", LARGE, True, True, True),
        ("out", LARGE, True, True, True),
        ("none", LARGE, False, False, False),
    ],
)
def test_the_policy_says_which_bodies_are_stored(
    policy: str, size: int, incoming: bool, retry: bool, result: bool
) -> None:
    found = terms(policy)
    tried = [{"state": "rcptto"}]
    assert found.wants(publication(bytes(size))) is incoming
    assert found.wants(publication(bytes(size), results=tried)) is retry
    assert found.wants(publication(bytes(size), "results", results=tried)) is result
    assert not found.wants(publication(None, key="k", results=tried))


async def test_a_message_without_its_body_names_it() -> None:
    shelf = Shelf()
    storing = Storing(shelf, terms())
    (found,) = await storing.store([publication(own=1)], now=NOW)
    assert found.message.body is None
    assert found.message.properties == {
        "recipient": "c@d.test", "own": 1, "key": "key1", "seen": format_time(NOW),
    }  # fmt: skip
    assert shelf.puts == [(b"body", NOW + 1010)]


async def test_the_message_of_the_caller_is_not_changed() -> None:
    """The caller publishes it again if the broker does not take it."""
    mail = publication()
    await Storing(Shelf(), terms()).store([mail], now=NOW)
    assert (mail.message.body, "key" in mail.message.properties) == (b"body", False)


async def test_a_body_that_messages_share_is_stored_once_and_for_the_longest() -> None:
    shelf, body = Shelf(), b"shared"
    many = [publication(body, due=NOW + number) for number in range(50)]
    other = publication(b"other", queue="results")
    found = await Storing(shelf, terms()).store([*many, other], now=NOW)
    assert len(shelf.puts) == 2
    assert len({each.message.properties["key"] for each in found[:50]}) == 1
    assert (body, NOW + 49 + 1010) in shelf.puts
    assert [each.due for each in found[:50]] == [each.due for each in many]
    assert "seen" not in found[50].message.properties


@pytest.mark.parametrize(
    ("properties", "due", "until"),
    [
        ({}, None, NOW + 1000),
        ({}, NOW + 500, NOW + 1500),
        ({"seen": format_time(NOW - 900)}, NOW + 50, NOW + 100),
        ({"seen": format_time(NOW - 9000)}, None, NOW),
        ({"maxdelivertime": format_time(NOW + 77)}, None, NOW + 77),
        ({"delayed": format_time(NOW + 300)}, None, NOW + 1300),
        ({"maxdelivertime": "9999-12-31 23:59:59"}, None, NOW + 400 * 86400 - 10),
        ({"maxdelivertime": "nonsense", "seen": 7}, None, NOW + 1000),
    ],
)
def test_a_body_is_kept_as_long_as_its_mail_may_be_tried(
    properties: dict[str, Any], due: float | None, until: float
) -> None:
    assert terms().until(publication(due=due, **properties), NOW) == until + 10


def test_bodies_for_other_programs_are_kept_longer() -> None:
    assert terms().until(publication(queue="inbox"), NOW) == NOW + OTHERS_SECONDS + 10


@pytest.mark.parametrize("size", [4, LARGE, INSIDE_BYTES])
async def test_what_a_broker_takes_stays_inside_while_the_storage_is_away(size: int) -> None:
    mail = [publication(bytes(size)), publication(b"other")]
    assert await Storing(Shelf(away=True), terms()).store(mail, now=NOW) == mail


async def test_what_a_broker_may_not_take_waits_for_the_storage() -> None:
    mail = [publication(bytes(INSIDE_BYTES + 1)), publication()]
    with pytest.raises(StorageError, match="away"):
        await Storing(Shelf(away=True), terms()).store(mail, now=NOW)


async def test_what_people_look_at_stays_inside() -> None:
    shelf = Shelf()
    storing = Storing(shelf, terms())
    small, large = bytes(LARGE), bytes(INSIDE_BYTES + 1)
    mail = [publication(small, DAMAGED_QUEUE), publication(large, DAMAGED_QUEUE)]
    inside, outside = await storing.store(mail, now=NOW)
    assert inside.message.body == small
    assert outside.message.body is None
    assert len(shelf.puts) == 1


@given(
    st.sampled_from(["all", "in", "out", "none"]),
    st.sampled_from([None, b"", b"x", bytes(70_000)]),
    st.sampled_from(["outbox", "inbox", DAMAGED_QUEUE]),
    st.dictionaries(
        st.sampled_from(["seen", "delayed", "maxdelivertime", "key", "results"]),
        st.none() | st.integers() | st.text(max_size=5) | st.just(format_time(NOW)),
    ),
)
def test_a_message_always_has_its_body_or_its_key(
    policy: str, body: bytes | None, queue: str, properties: dict[str, Any]
) -> None:
    mail = publication(body, queue, **properties)
    shelf = Shelf()

    async def store() -> Publication:
        (found,) = await Storing(shelf, terms(policy)).store([mail], now=NOW)
        return found

    found = trio.run(store)
    if shelf.puts:
        assert found.message.body is None
        assert found.message.properties["key"] == "key1"
        assert NOW + 10 <= shelf.puts[0][1] <= NOW + 400 * 86400
    else:
        assert found is mail
