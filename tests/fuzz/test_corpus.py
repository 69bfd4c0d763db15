"""The fuzz target over its seeds, whole and cut short everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.wire import framing
from tests.fuzz.server import CORPUS, READS, check

SEEDS = sorted(CORPUS.iterdir())


@pytest.fixture(autouse=True)
def _block_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "BLOCK_BYTES", framing.BLOCK_BYTES)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: seed.name)
def test_a_seed_passes_in_reads_of_any_size(seed: Path) -> None:
    data = seed.read_bytes()
    for read in range(len(READS)):
        check(data[:1] + bytes([read]) + data[2:])


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: seed.name)
def test_a_seed_passes_cut_short_anywhere(seed: Path) -> None:
    data = seed.read_bytes()
    for end in range(2, len(data), 3):
        check(data[:end])


@given(st.binary(max_size=300))
def test_arbitrary_bytes_pass(data: bytes) -> None:
    block = framing.BLOCK_BYTES
    try:
        check(data)
    finally:
        framing.BLOCK_BYTES = block
