"""Signatures at the end of a turn and in a thread: who waits, wakes once, whatever happens."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest
import trio
import trio.testing

from mailerq.outbound import signer
from mailerq.outbound.signer import MAX_BATCH, Signatures
from mailerq.store.signing_keys import SigningKey
from tests.signing_kit import ed25519_pem

MANY = 3 * MAX_BATCH + 7


class Steps(trio.abc.Instrument):
    """Counts the steps of all tasks, by their names."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.counts[task.name] += 1


@pytest.fixture
def key() -> SigningKey:
    return SigningKey(ed25519_pem())


def busy() -> Signatures:
    """Signatures all of which a thread makes."""
    made = Signatures()
    made._spent = made._began = float("inf")
    return made


@pytest.fixture(params=["turn", "thread"])
def made(request: pytest.FixtureRequest) -> Signatures:
    return Signatures() if request.param == "turn" else busy()


async def test_a_task_that_waits_for_a_signature_wakes_once(
    key: SigningKey, made: Signatures
) -> None:
    steps = Steps()
    done: dict[int, bytes] = {}

    async def sign(number: int) -> None:
        (done[number],) = await made.make([(key, b"%d" % number)])

    trio.lowlevel.add_instrument(steps)
    async with trio.open_nursery() as nursery:
        for number in range(MANY):
            nursery.start_soon(sign, number, name=f"task {number}")
    trio.lowlevel.remove_instrument(steps)
    assert done == {number: key.sign(b"%d" % number) for number in range(MANY)}
    assert {steps.counts[f"task {number}"] for number in range(MANY)} == {2}


async def test_the_signatures_of_a_task_come_in_their_order(
    key: SigningKey, made: Signatures
) -> None:
    other = SigningKey(ed25519_pem())
    due = [(key, b"x"), (other, b"x"), (key, b"y")]
    assert await made.make(due) == [key.sign(b"x"), other.sign(b"x"), key.sign(b"y")]


async def test_a_key_that_fails_is_told_to_its_own_task_only(
    key: SigningKey, made: Signatures
) -> None:
    class Broken:
        def sign(self, data: bytes) -> bytes:
            raise ZeroDivisionError(data)

    told: list[str] = []

    async def fail() -> None:
        try:
            await made.make([(Broken(), b"x")])  # type: ignore[list-item]
        except ZeroDivisionError as error:
            told.append(str(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        assert await made.make([(key, b"y")]) == [key.sign(b"y")]
    assert told == ["b'x'"]


async def test_without_threads_signatures_fail_and_come_again(
    key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = busy()

    async def no_thread(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(trio.to_thread, "run_sync", no_thread)
        with pytest.raises(RuntimeError, match="new thread"):
            await made.make([(key, b"x")])
    assert await made.make([(key, b"x")]) == [key.sign(b"x")]


async def test_what_is_cancelled_before_its_turn_is_not_signed(key: SigningKey) -> None:
    going, done = threading.Event(), []

    class Slow:
        def sign(self, data: bytes) -> bytes:
            done.append(data)
            assert going.wait(60)
            return data

    made, slow = busy(), Slow()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.make, [(slow, b"first")])
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(made.make, [(slow, b"cancelled")])
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        nursery.start_soon(made.make, [(slow, b"last")])
        await trio.testing.wait_all_tasks_blocked()
        going.set()
    assert done == [b"first", b"last"]


class Told:
    """A key that takes two milliseconds, and tells in which turn of which thread it signed.

    They pass on a clock of the test: on a busy machine, two milliseconds may be a hundred.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.monotonic()
        monkeypatch.setattr(signer, "monotonic", lambda: self.now)
        self.loop = threading.get_ident()
        self.turn = 0
        self.turns: list[int] = []  # 0 is another thread

    def before_io_wait(self, timeout: float) -> None:
        self.turn += 1

    def sign(self, data: bytes) -> bytes:
        self.now += 0.0021
        self.turns.append(self.turn if threading.get_ident() == self.loop else 0)
        return data


async def sign_all(made: Signatures, key: Told, count: int) -> None:
    trio.lowlevel.add_instrument(key)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(made.make, [(key, b"x")])
    trio.lowlevel.remove_instrument(key)  # type: ignore[arg-type]


async def test_a_turn_of_the_loop_makes_signatures_for_some_milliseconds_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = Told(monkeypatch)
    await sign_all(Signatures(), key, 12)
    assert len(key.turns) == 12
    assert all(1 <= count <= 4 for count in Counter(key.turns).values())
    assert 0 not in key.turns, "the loop has time for all"


async def test_the_keys_of_one_mail_are_spread_over_turns_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = Told(monkeypatch)
    trio.lowlevel.add_instrument(key)  # type: ignore[arg-type]
    assert await Signatures().make([(key, b"x")] * 12) == [b"x"] * 12  # type: ignore[list-item]
    trio.lowlevel.remove_instrument(key)  # type: ignore[arg-type]
    assert all(1 <= count <= 4 for count in Counter(key.turns).values())


async def test_a_thread_makes_what_would_take_the_loop_more_than_half_of_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = Told(monkeypatch)
    await sign_all(Signatures(), key, 60)
    assert len(key.turns) == 60
    in_loop = sum(turn > 0 for turn in key.turns)
    assert 1 <= in_loop <= 25
    assert not any(key.turns[in_loop:]), "the first ones come first"


async def test_what_is_due_in_one_turn_is_signed_in_a_row(key: SigningKey) -> None:
    told: list[str] = []

    class Telling:
        def sign(self, data: bytes) -> bytes:
            told.append(f"sign {data.decode()}")
            return data

    made, telling = Signatures(), Telling()

    async def sign(number: int) -> None:
        told.append(f"begin {number}")
        await made.make([(telling, b"%d" % number)])  # type: ignore[list-item]
        told.append(f"end {number}")

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(sign, number)
    assert [word.split()[0] for word in told] == ["begin"] * 3 + ["sign"] * 3 + ["end"] * 3
