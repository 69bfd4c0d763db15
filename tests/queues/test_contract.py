"""The backends fulfil the contract of the interface."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from mailerq.queues import Queues
from mailerq.queues.opening import open_embedded
from tests.queues.contract import Backend, Capability
from tests.queues.contract_changes import ChangeContract
from tests.queues.contract_sorted import SortedContract


class Embedded:
    """The embedded queue, on a clock that the tests move."""

    capabilities: frozenset[Capability] = frozenset({"durable"})

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.now = 1_700_000_000.0

    def open(self) -> AbstractAsyncContextManager[Queues]:
        return open_embedded(str(self.directory), clock=lambda: self.now)


class TestEmbedded(SortedContract, ChangeContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return Embedded(tmp_path)
