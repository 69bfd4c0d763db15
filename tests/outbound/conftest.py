"""Fixtures that several tests of deliveries use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.signing_kit import Keys


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """An empty `dkim-directory`."""
    directory = tmp_path / "dkim"
    directory.mkdir()
    return Keys(directory)
