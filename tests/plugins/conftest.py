"""Fixtures of the tests of plugins."""

import logging
from collections.abc import Iterator

import pytest

from tests.plugins.kit import Calls


@pytest.fixture
def calls() -> Iterator[Calls]:
    """What plugins log during the test."""
    handler = Calls()
    logger = logging.getLogger("mailerq.plugins")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)
