"""A process of several as its parent knows it: how its end is told."""

from __future__ import annotations

import os
import signal

import pytest

from mailerq.cli.process import describe


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "ended with status 0"),
        (os.EX_SOFTWARE, "ended with status 70"),
        (-signal.SIGKILL, "was ended by SIGKILL"),
        (-(signal.SIGRTMIN + 6), f"was ended by signal {signal.SIGRTMIN + 6}"),
    ],
)
def test_every_way_to_end_has_its_words(status: int, text: str) -> None:
    assert describe(status) == text
