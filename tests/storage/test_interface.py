"""When bodies expire, by clocks that people set."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from mailerq.config import Config
from mailerq.storage.interface import (
    DOUBT_SECONDS,
    EXPIRE_SECONDS,
    GRACE_SECONDS,
    Backend,
    Body,
    Storage,
)

NOW = 1_800_000_000.0
HOUR = 3600.0
LATE = 1.2 * EXPIRE_SECONDS + GRACE_SECONDS + 1
"""The longest pause between two looks, and what clocks may differ by."""


class Expiring(Backend):
    """Knows up to when bodies have been removed."""

    name = "memory"

    def __init__(self) -> None:
        self.until = 0.0

    async def put(self, bodies: Sequence[Body]) -> None:
        raise NotImplementedError

    async def get(self, key: str) -> bytes | None:
        raise NotImplementedError

    async def expire(self, now: float) -> int:
        self.until = max(self.until, now)
        return 0

    def configure(self, config: Config) -> None:
        pass


class Wall:
    """A wall clock that runs, and that people set."""

    def __init__(self) -> None:
        self.wrong = 0.0

    def __call__(self) -> float:
        return NOW + trio.current_time() + self.wrong


@asynccontextmanager
async def opened(wall: Wall) -> AsyncIterator[Expiring]:
    backend = Expiring()
    storage = Storage(backend, Config, clock=wall)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.run)
        yield backend
        nursery.cancel_scope.cancel()


async def test_bodies_expire_in_time(autojump_clock: trio.testing.MockClock) -> None:
    wall = Wall()
    async with opened(wall) as backend:
        for _ in range(50):
            await trio.sleep(HOUR)
            assert wall() - LATE <= backend.until <= wall()


@pytest.mark.parametrize("ahead", [HOUR, 86400.0, 30 * 86400.0])
async def test_a_clock_that_is_set_forward_removes_nothing_for_hours(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, ahead: float
) -> None:
    wall = Wall()
    async with opened(wall) as backend:
        await trio.sleep(HOUR)
        wall.wrong = ahead
        await trio.sleep(DOUBT_SECONDS - HOUR)
        assert backend.until <= wall() - ahead
        assert caplog.text.count("set forward by") == 1
        wall.wrong = 0.0  # somebody has noticed
        await trio.sleep(2 * DOUBT_SECONDS)
        assert wall() - LATE <= backend.until <= wall()


async def test_a_clock_that_stays_set_forward_is_believed(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    wall = Wall()
    wall.wrong = -30 * 86400.0  # a host that has just started, before it asks for the time
    async with opened(wall) as backend:
        await trio.sleep(HOUR)
        wall.wrong = 0.0
        await trio.sleep(DOUBT_SECONDS + HOUR)
        assert wall() - LATE <= backend.until <= wall()
        await trio.sleep(DOUBT_SECONDS)
        assert wall() - LATE <= backend.until <= wall()
    assert caplog.text.count("set forward by") == 1


async def test_a_clock_that_is_set_back_keeps_bodies_longer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    wall = Wall()
    async with opened(wall) as backend:
        await trio.sleep(HOUR)
        wall.wrong = -HOUR
        before = backend.until
        await trio.sleep(HOUR / 2)
        assert backend.until == before
        await trio.sleep(2 * HOUR)
        assert wall() - LATE <= backend.until <= wall()
