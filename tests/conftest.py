"""What all tests share: how hypothesis looks for examples. Fixtures live beside their tests."""

import os
from pathlib import Path

import hypothesis
import pytest

PACKAGE = Path(__file__).parent.parent / "mailerq"

# No deadline for one example: the machine may be busy with something else.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_sessionstart() -> None:
    """Test what is written, not what was compiled from it before."""
    for compiled in PACKAGE.glob("*/*.so"):
        sources = PACKAGE.glob(f"*/{compiled.name.partition('.')[0]}.p*")
        beside = [source for source in sources if source.parent == compiled.parent]
        if max(source.stat().st_mtime for source in beside) > compiled.stat().st_mtime:
            pytest.exit(f"{beside[0]} was compiled before it was changed: run make build", 3)
