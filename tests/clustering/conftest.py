"""What the tests of a cluster in memory share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import trio

T = TypeVar("T")


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do the work of threads on the loop: a clock that jumps would not wait for them."""

    async def run_sync(work: Callable[..., T], *values: Any, **more: object) -> T:
        await trio.lowlevel.checkpoint()
        return work(*values)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
