"""The parent of several processes: what it does with one that cannot take the settings."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from mailerq.cli.reloading import Source
from mailerq.cli.supervisor import parent
from mailerq.cli.supervisor.parent import _Parent
from mailerq.errors import MailerqError
from tests.support import configure


class Unable:
    """A process that looks at the settings, and cannot take them the first `times`."""

    left = False

    def __init__(self, times: int = 1 << 30) -> None:
        self.times = times

    async def ask(self, command: str, seconds: float, **more: Any) -> dict[str, Any]:
        content = os.pread(more["file"], 1 << 20, 0)
        config, number, wrong = pickle.loads(content)
        assert (config.smtp_processes, number, wrong) == (3, 1, set())
        self.times -= 1
        if self.times >= 0:
            raise MailerqError("process 0: smtp-certificate: it is gone")
        return {}

    def leave(self) -> None:
        self.left = True


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "BRING_PAUSES", (0.001, 0.001))


async def test_a_process_that_cannot_take_the_settings_ends_to_be_started_with_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(tmp_path, smtp_processes=3)
    child = Unable()
    await _Parent(config, config, Source([]))._bring(child)  # type: ignore[arg-type]
    assert child.left
    assert "settings 1 are not taken, it is started anew: process 0: smtp-certif" in caplog.text


async def test_a_process_takes_settings_that_it_could_not_take_before(tmp_path: Path) -> None:
    config = configure(tmp_path, smtp_processes=3)
    child = Unable(times=2)
    await _Parent(config, config, Source([]))._bring(child)  # type: ignore[arg-type]
    assert (child.times, child.left) == (-1, False)


async def test_a_parent_without_descriptors_for_a_moment_restarts_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tmp_path, smtp_processes=3)
    create, failures = os.memfd_create, [OSError(errno.EMFILE, "Too many open files")]

    def lack(name: str) -> int:
        if failures:
            raise failures.pop()
        return create(name)

    monkeypatch.setattr(os, "memfd_create", lack)
    child = Unable(times=0)
    await _Parent(config, config, Source([]))._bring(child)  # type: ignore[arg-type]
    assert not failures
    assert (child.times, child.left) == (-1, False)
