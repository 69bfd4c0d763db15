"""What keeps a storage from being opened, and what does not."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import trio

from mailerq import Engine
from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.storage import open_storage
from mailerq.storage.opening import storage_problem
from tests.storage.kit import Settings, opened
from tests.support import configure, mailerq, send


async def test_without_an_address_there_is_no_storage() -> None:
    async with open_storage(Settings("")) as storage:
        assert storage is None
    assert storage_problem(Config()) is None


async def test_an_address_that_can_never_be_used_keeps_the_daemon_from_starting(
    tmp_path: Path,
) -> None:
    config = configure(tmp_path, storage_address="mysql://me:sesame@host/db")
    with pytest.raises(ConfigError, match="mysql is not supported") as caught:
        async with Engine(config):
            pass
    assert caught.value.problems[0].key == "storage-address"
    assert "sesame" not in str(caught.value)


async def test_a_storage_that_is_away_does_not_keep_the_daemon_from_starting(
    tmp_path: Path,
) -> None:
    config = configure(
        tmp_path, storage_address="postgresql://me:sesame@127.0.0.1:1/db", rabbitmq_inbox="inbox"
    )
    async with Engine(config) as engine:
        # The embedded queue has its bodies itself.
        assert (await send(engine.addresses[0]))[0] == 250
        assert engine.statistics()["storage"]["put"] == 0


def test_the_check_of_the_settings_names_the_mistake() -> None:
    result = mailerq("check-config", "--storage-address=redis://:sesame@host/0")
    assert result.returncode != 0
    text = result.stdout + result.stderr
    assert b"redis is not supported" in text
    assert b"sesame" not in text


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    problem = storage_problem(Config(storage_address="postgresql://host/db"))
    assert problem is not None
    assert "pip install 'mailerq[postgresql]'" in str(problem)


async def test_the_error_of_the_user_comes_out_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with opened(f"directory://{tmp_path}/bodies"):
            raise KeyError("mine")


async def test_changed_settings_count_at_once(tmp_path: Path) -> None:
    settings = Settings(f"directory://{tmp_path}/bodies", storage_threads=1)
    async with open_storage(settings) as storage:
        assert storage is not None
        await storage.put(b"body", time.time() + 3600)
        settings.change(storage_threads=7)
        await storage.put(b"body", time.time() + 3600)
        assert storage._backend._limiter.total_tokens == 7  # type: ignore[attr-defined]
        await trio.lowlevel.checkpoint()
