"""The parent of several processes: what it does with one that cannot take the settings."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from mailerq.cli.reloading import Source
from mailerq.cli.supervisor.parent import _Parent
from mailerq.errors import MailerqError
from tests.support import configure


class Unable:
    """A process that looks at the settings, and cannot take them."""

    left = False

    async def ask(self, command: str, seconds: float, **more: Any) -> dict[str, Any]:
        content = os.pread(more["file"], 1 << 20, 0)
        config, number, wrong = pickle.loads(content)
        assert (config.smtp_processes, number, wrong) == (3, 1, set())
        raise MailerqError("process 0: smtp-certificate: it is gone")

    def leave(self) -> None:
        self.left = True


async def test_a_process_that_cannot_take_the_settings_ends_to_be_started_with_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(tmp_path, smtp_processes=3)
    parent = _Parent(config, config, Source([]))
    child = Unable()
    await parent._bring(child)  # type: ignore[arg-type]
    assert child.left
    assert "settings 1 are not taken, it is started anew: process 0: smtp-certif" in caplog.text
