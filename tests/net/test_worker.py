"""Workers: threads with a loop of their own, and what becomes of the others when one ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from mailerq.net.tracing import Tracing, Wanted
from mailerq.net.worker import Worker, open_workers
from mailerq.plugins import Plugins
from tests.support import DEADLINE


async def defect() -> None:
    raise RuntimeError("a defect")


@pytest.fixture
def plugins(tmp_path: Path) -> Plugins:
    return Plugins.load(str(tmp_path), timeout=5.0, hostname="here.test", server_id=0)


async def end_late(workers: list[Worker], late: trio.Event) -> None:
    """End workers that nobody has told to end: their threads would keep the test for ever."""
    await trio.sleep(DEADLINE)
    late.set()
    for worker in workers:
        worker.stop(cancel=True)


@pytest.mark.parametrize("failing", [1, 2])
async def test_the_end_of_one_worker_ends_the_others(plugins: Plugins, failing: int) -> None:
    async def run() -> None:
        async with open_workers(3, plugins) as workers:
            nursery.start_soon(end_late, workers[1:failing], late)
            workers[failing].spawn(defect)
            await trio.sleep_forever()

    late = trio.Event()
    async with trio.open_nursery() as nursery:
        with pytest.raises(BaseExceptionGroup) as caught:
            await run()
        nursery.cancel_scope.cancel()
    assert not late.is_set()
    assert caught.group_contains(RuntimeError, match="a defect")
    assert not caught.group_contains(trio.RunFinishedError)


async def test_a_trace_may_outlive_the_workers(plugins: Plugins) -> None:
    async def send(data: bytes) -> None:
        sent.set()

    sent = trio.Event()
    async with trio.open_nursery() as nursery:
        async with open_workers(2, plugins) as workers:
            tracing = Tracing(workers, lambda worker: [])
            nursery.start_soon(tracing.write, Wanted(), send)
            await sent.wait()
        nursery.cancel_scope.cancel()
