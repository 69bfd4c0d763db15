"""One server of each kind for all tests of a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio

from mailerq.storage import Storage
from tests.storage.kit import moto_server, postgres_server


@pytest.fixture
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No storage looks for expired bodies by itself, at any moment after it was opened."""

    async def rest(storage: Storage) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Storage, "run", rest)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of a real PostgreSQL."""
    # The path of a socket has 107 bytes at most, and the server another account.
    with TemporaryDirectory(prefix="mq") as path:
        os.chmod(path, 0o755)
        server = Path(path, "pg")
        server.mkdir()
        with postgres_server(server) as address:
            yield address


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3 server."""
    with moto_server(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint
