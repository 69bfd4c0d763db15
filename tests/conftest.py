"""What all tests share: how hypothesis looks for examples. Fixtures live beside their tests."""

import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import hypothesis
import pytest

PACKAGE = Path(__file__).parent.parent / "mailerq"

# The tests of every backend share these asserts: without the rewriting they fail without values.
pytest.register_assert_rewrite("tests.queues.contract", "tests.queues.contract_sorted")

# No deadline for one example: the machine may be busy with something else.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_sessionstart() -> None:
    """Test what is written, not what was compiled from it before."""
    suffix = EXTENSION_SUFFIXES[0]
    for compiled in PACKAGE.rglob(f"*{suffix}"):
        source = compiled.with_name(compiled.name.removesuffix(suffix) + ".py")
        sources = [source, source.with_suffix(".pxd")]
        if source.name.startswith("_"):
            parts = source.parent.glob(f"{source.stem}*")
            sources = [path for path in parts if path.suffix in (".pyx", ".pxd", ".pxi")]
        built = compiled.stat().st_mtime
        for path in sources:
            if not path.exists() or path.stat().st_mtime > built:
                pytest.exit(f"{path} has changed since it was compiled: run make build", 3)
