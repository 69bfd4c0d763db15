"""The parent of several processes: what it makes of shares that change hands late."""

from __future__ import annotations

import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq.cli.reloading import Source
from mailerq.cli.supervisor.parent import _Parent
from mailerq.errors import MailerqError
from tests.support import configure


class Child:
    """A process that notes what it is asked."""

    def __init__(self, *, took: dict[int, float] | None = None, offered: set[int] | None = None):
        self.took = took or {}
        self.offered = offered or set()
        self.asked: list[tuple[str, int]] = []
        self.over = trio.Event()
        self.burden = (0, 0)

    async def ask(
        self, command: str, seconds: float, *, share: int = -1, **more: Any
    ) -> dict[str, Any]:
        self.asked.append((command, share))
        return {}

    def __str__(self) -> str:
        return "process 0"


@pytest.fixture
def parent(tmp_path: Path) -> Any:
    config = configure(tmp_path, smtp_processes=3)
    return _Parent(config, config, Source([]))


async def test_what_a_process_was_asked_to_take_over_is_loose_when_it_ends(
    parent: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with trio.open_nursery() as parent._nursery:
        parent._bury(Child(took={1: time.monotonic()}, offered={7}), -signal.SIGKILL)
    assert parent._loose == {1, 7}
    assert "process 0 ended soon after it had taken share 1 over: no other" in caplog.text
    assert "process 0 ended when asked to take share 7 over: no other" in caplog.text


async def test_a_process_that_cannot_take_the_settings_ends_to_be_started_with_them(
    parent: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Unable(Child):
        left = False

        async def ask(
            self, command: str, seconds: float, *, share: int = -1, **more: Any
        ) -> dict[str, Any]:
            content = os.pread(more["file"], 1 << 20, 0)
            config, number, wrong = pickle.loads(content)
            assert (config.smtp_processes, number, wrong) == (3, 1, set())
            raise MailerqError("process 0: smtp-certificate: it is gone")

        def leave(self) -> None:
            self.left = True

    child = Unable()
    await parent._bring(child)
    assert child.left
    assert "settings 1 are not taken, it is started anew: process 0: smtp-certif" in caplog.text


async def test_a_share_whose_own_process_is_there_again_is_not_loose(parent: Any) -> None:
    parent._begun[1] = Child()
    async with trio.open_nursery() as parent._nursery:
        parent._bury(Child(took={1: 0.0, 2: 0.0}), -signal.SIGKILL)
    assert parent._loose == {2}


async def test_who_was_asked_to_take_a_share_over_hears_that_it_is_called_back(
    parent: Any,
) -> None:
    children = [Child(took={1: 0.0}), Child(offered={1}), Child(took={2: 0.0}, offered={3})]
    parent._children.update(enumerate(children))
    async with trio.open_nursery() as parent._nursery:
        await parent._call_back(1)
    assert [child.asked for child in children] == [[("give-back", 1)], [("give-back", 1)], []]


async def test_a_share_that_was_taken_over_late_is_not_offered_again(parent: Any) -> None:
    late, other = Child(took={7: 0.0}), Child()
    parent._children.update({0: late, 1: other})
    parent._loose.update({7, 8})
    await parent._hand_out()
    assert parent._loose == set()
    assert late.asked + other.asked == [("take-over", 8)]
