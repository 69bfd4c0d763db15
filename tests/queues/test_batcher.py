"""Batches: when the requests of a busy loop reach the writer, and which share a commit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from mailerq.message import Message
from mailerq.queues import Publication
from mailerq.queues.embedded.queues import EmbeddedQueues
from mailerq.queues.embedded.writer import Request
from mailerq.queues.opening import open_embedded


@pytest.fixture
async def queues(tmp_path: Path) -> AsyncIterator[EmbeddedQueues]:
    async with open_embedded(str(tmp_path)) as queues:
        yield queues


def publication(tag: int) -> Publication:
    return Publication("outbox", Message({"tag": tag}, b"body"))


async def test_what_a_busy_loop_has_to_publish_is_one_commit(queues: EmbeddedQueues) -> None:
    async with trio.open_nursery() as nursery:
        for tag in range(50):
            nursery.start_soon(queues.publish, [publication(tag)])
    assert queues.statistics()["commits"] == 1


async def test_requests_are_handed_over_when_the_replies_of_the_loop_have_left(
    queues: EmbeddedQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However long a turn takes, the loop is busy.
    monkeypatch.setattr("mailerq.queues.embedded.batcher.MAX_WAIT_SECONDS", 60.0)
    happened: list[str] = []
    await queues.publish([publication(0)])
    (batcher,) = queues._batchers.values()
    put = queues._writer.put

    def noted(request: Request | None) -> None:
        happened.append("handed over")
        put(request)

    def reply(_: bool) -> bool:
        happened.append("reply")
        return False

    monkeypatch.setattr(batcher, "_put", noted)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(queues.publish, [publication(1)])
        for _ in range(3):
            await trio.lowlevel.checkpoint()
            batcher.end_of_turn.call(reply)
    assert happened == [*3 * ["reply"], "handed over"]


async def test_a_loop_that_is_never_idle_still_publishes(queues: EmbeddedQueues) -> None:
    async def spin() -> None:
        while True:
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(spin)
        with trio.fail_after(60):
            await queues.publish([publication(1)])
        nursery.cancel_scope.cancel()


async def test_the_loop_is_left_alone_when_the_queue_is_closed(tmp_path: Path) -> None:
    async with open_embedded(str(tmp_path)) as queues:
        await queues.publish([publication(1)])
        (batcher,) = queues._batchers.values()
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(KeyError):  # what trio says of an instrument that it does not have
        trio.lowlevel.remove_instrument(batcher.end_of_turn)
