"""A worker that ends by a defect: the engine ends, and says why."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio

from mailerq import Engine
from mailerq.errors import EngineError
from mailerq.plugins import Context
from tests.engine.kit import open_dialog
from tests.support import DEADLINE, configure, until


async def defect() -> None:
    raise RuntimeError("a defect")


async def test_the_engine_ends_and_names_the_defect(tmp_path: Path) -> None:
    async def run() -> None:
        async with Engine(configure(tmp_path, smtp_threads=2)) as engine:
            engine._workers[1].spawn(defect)
            await trio.sleep_forever()

    with trio.fail_after(DEADLINE), pytest.raises(EngineError, match="RuntimeError: a defect"):
        await run()


async def test_a_connection_for_a_worker_that_ends_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plugin may take its time to leave the worker, and the others do not know of its end yet."""
    ends, may_end = threading.Event(), threading.Event()

    async def close(context: Context) -> None:
        if context.worker:
            ends.set()
            await trio.to_thread.run_sync(may_end.wait)
        await closing(context)

    async def run() -> None:
        async with (
            Engine(configure(tmp_path, smtp_threads=2)) as engine,
            open_dialog(engine.addresses[0]),  # on the first worker
        ):
            engine._workers[1].spawn(defect)
            await until(ends.is_set)
            try:
                async with open_dialog(engine.addresses[0], greeted=False) as client:
                    assert await client.closed()
            finally:
                may_end.set()
            await trio.sleep_forever()

    closing = Context.close
    monkeypatch.setattr(Context, "close", close)
    with trio.fail_after(DEADLINE), pytest.raises(EngineError, match="RuntimeError: a defect"):
        await run()
