"""The queues that stand in for a backend in the tests of deliveries do what the interface says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mailerq.queues import Queues
from tests.outbound.memory_queues import NOW, MemoryQueues
from tests.queues.contract import Backend, Capability
from tests.queues.contract_sorted import SortedContract


class Memory:
    """Queues in memory, on a clock that the tests move."""

    capabilities: frozenset[Capability] = frozenset()

    def __init__(self) -> None:
        self.now = NOW

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Queues]:
        yield _Queues(self)


class _Queues(MemoryQueues):
    def __init__(self, backend: Memory) -> None:
        self._backend = backend
        super().__init__()

    @property
    def now(self) -> float:
        return self._backend.now

    @now.setter
    def now(self, now: float) -> None:
        self._backend.now = now


class TestMemoryQueues(SortedContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return Memory()
