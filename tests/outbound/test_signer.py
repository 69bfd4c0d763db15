"""Signatures that a thread makes, because many are due: who waits, wakes once, whatever happens."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest
import trio
import trio.testing

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
    """Signatures none of which is made at once."""
    made = Signatures()
    made._spent = made._began = float("inf")
    return made


async def test_a_task_that_waits_for_a_signature_wakes_once(key: SigningKey) -> None:
    made, steps = busy(), Steps()
    done: dict[int, bytes] = {}

    async def sign(number: int) -> None:
        done[number] = await made.make(key, b"%d" % number)

    trio.lowlevel.add_instrument(steps)
    async with trio.open_nursery() as nursery:
        for number in range(MANY):
            nursery.start_soon(sign, number, name=f"task {number}")
    trio.lowlevel.remove_instrument(steps)
    assert done == {number: key.sign(b"%d" % number) for number in range(MANY)}
    assert {steps.counts[f"task {number}"] for number in range(MANY)} == {2}


async def test_a_key_that_fails_is_told_to_its_own_task_only(key: SigningKey) -> None:
    class Broken:
        def sign(self, data: bytes) -> bytes:
            raise ZeroDivisionError(data)

    made = busy()
    told: list[str] = []

    async def fail() -> None:
        try:
            await made.make(Broken(), b"x")  # type: ignore[arg-type]
        except ZeroDivisionError as error:
            told.append(str(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        assert await made.make(key, b"y") == key.sign(b"y")
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
            await made.make(key, b"x")
    assert await made.make(key, b"x") == key.sign(b"x")


async def test_what_is_cancelled_before_its_turn_is_not_signed(key: SigningKey) -> None:
    going, done = threading.Event(), []

    class Slow:
        def sign(self, data: bytes) -> bytes:
            done.append(data)
            assert going.wait(60)
            return data

    made, slow = busy(), Slow()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.make, slow, b"first")
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(made.make, slow, b"cancelled")
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        nursery.start_soon(made.make, slow, b"last")
        await trio.testing.wait_all_tasks_blocked()
        going.set()
    assert done == [b"first", b"last"]


async def test_a_turn_of_the_loop_makes_signatures_for_some_milliseconds_only() -> None:
    class Slow:
        def sign(self, data: bytes) -> bytes:
            time.sleep(0.002)
            return data

    made, slow, count = Signatures(), Slow(), 0
    while made.make_now(slow, b"x") is not None:  # type: ignore[arg-type]
        count += 1
    assert 1 <= count <= 10
