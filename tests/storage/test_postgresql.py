"""Bodies in a real PostgreSQL, which the test starts."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import trio

from mailerq.errors import StorageError
from mailerq.storage import open_storage
from tests.storage.contract import *  # noqa: F403
from tests.storage.contract import NOW, fresh
from tests.storage.kit import Clock, Settings, opened
from tests.support import DEADLINE

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")


def run(address: str, *statements: str) -> list[Any]:
    """Run statements as the owner of the database; return the rows of the last one."""
    with psycopg.connect(address.partition("&")[0], autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def table_of(address: str) -> str:
    return address.partition("&table=")[2].partition("&")[0]


@pytest.fixture(params=["", "&compression=gzip"])
def address(postgres: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """A table of the test's own."""
    table = f"t{secrets.token_hex(6)}"
    yield f"{postgres}&table={table}{request.param}"
    run(postgres, f"DROP TABLE IF EXISTS {table}")


@pytest.fixture
def plain(postgres: str) -> Iterator[str]:
    table = f"t{secrets.token_hex(6)}"
    yield f"{postgres}&table={table}"
    run(postgres, f"DROP TABLE IF EXISTS {table}")


async def test_rows_say_when_they_expire(plain: str, clock: Clock) -> None:
    async with opened(plain, clock=clock) as storage:
        key = await storage.put(b"body", NOW + 10)
    rows = run(plain, f"SELECT key, extract(epoch FROM expires)::int, body FROM {table_of(plain)}")
    assert rows == [(key, NOW + 3600, b"body")]


async def test_a_row_of_an_application_without_a_time_stays(plain: str, clock: Clock) -> None:
    async with opened(plain, clock=clock) as storage:
        await storage.put(b"body", NOW)
        run(plain, f"INSERT INTO {table_of(plain)} (key, body) VALUES ('mine', 'hello')")
        assert await storage._backend.expire(NOW + 10**9) == 1
        assert await storage.get("mine") == b"hello"


async def test_lost_connections_are_replaced(plain: str, clock: Clock) -> None:
    async with opened(plain, clock=clock, storage_threads=1) as storage:
        key = await storage.put(b"body", NOW)
        for _ in range(2):
            run(
                plain,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'mailerq'",
            )
            storage._cache.clear()
            assert await storage.get(key) == b"body"  # at once, without an error


async def test_a_table_that_was_dropped_is_created_again(plain: str, clock: Clock) -> None:
    async with opened(plain, clock=clock, storage_threads=1) as storage:
        await storage.put(b"body", NOW)
        run(plain, f"DROP TABLE {table_of(plain)}")
        with suppress(StorageError):  # unless the look for expired rows has noticed
            await storage.put(b"other", NOW)
        key = await storage.put(b"other", NOW)
        assert await fresh(plain, key, clock) == b"other"


async def test_a_server_that_is_away_makes_mail_wait(clock: Clock) -> None:
    address = "postgresql://me:se%24ame@127.0.0.1:1/db"
    async with opened(address, clock=clock) as storage:
        for call in (lambda: storage.put(b"body", NOW), lambda: storage.get("x")):
            with pytest.raises(StorageError, match="onnection refused") as caught:
                await call()
            assert "ame" not in str(caught.value).replace("name", "")
            assert str(caught.value).startswith("postgresql://127.0.0.1:1/db")


async def test_a_password_is_in_no_error(postgres: str, clock: Clock) -> None:
    address = postgres.replace("mailerq@", "nobody:sesame@") + "&options=-csesame"
    async with opened(address, clock=clock) as storage:
        with pytest.raises(StorageError) as caught:
            await storage.get("x")
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me:se%2Fs%40me@127.0.0.1:1/db?bad=1",
        "postgresql://me@127.0.0.1:1/db?password=se%2Fs%40me&bad=1",
        "postgresql://127.0.0.1:1/db?sslpassword=se%2Fs%40me&bad=1",
    ],
)
async def test_an_encoded_password_is_in_no_error(
    address: str, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(address, clock=clock) as storage:
        with pytest.raises(StorageError) as caught:
            await storage.get("x")
        for words in ("invalid URI query parameter se/s@me", "in URI se%2Fs%40me"):
            error = psycopg.OperationalError(words)
            assert "s@me" not in storage._backend._words(error)  # type: ignore[attr-defined]
            assert "s%40me" not in storage._backend._words(error)  # type: ignore[attr-defined]
        told = [
            str(caught.value),
            caplog.text,
            repr(storage._backend.__dict__),
            str(storage.statistics()),
        ]
    assert not any("s@me" in text or "s%40me" in text for text in told)


async def test_rights_that_are_missing_are_named(plain: str, clock: Clock) -> None:
    table, user = table_of(plain), f"u{secrets.token_hex(6)}"
    async with opened(plain, clock=clock) as storage:
        key = await storage.put(b"body", NOW)
    run(plain, f"CREATE USER {user}", f"GRANT SELECT ON {table} TO {user}")
    try:
        async with opened(plain.replace("mailerq@", f"{user}@"), clock=clock) as storage:
            assert await storage.get(key) == b"body"
            with pytest.raises(StorageError, match=f"needs SELECT, INSERT.* on {table}"):
                await storage.put(b"other", NOW)
    finally:
        run(plain, f"DROP OWNED BY {user}", f"DROP USER {user}")


async def test_a_locked_table_makes_mail_wait(plain: str, clock: Clock) -> None:
    settings = Settings(plain)
    async with open_storage(settings, clock=clock) as storage:
        assert storage is not None
        key = await storage.put(b"body", NOW)
        storage._cache.clear()
        with psycopg.connect(plain.partition("&")[0]) as holder:
            holder.execute(f"LOCK TABLE {table_of(plain)}")
            settings.change(storage_timeout=0.3)
            with pytest.raises(StorageError, match=r"has not answered in 0\.3 s|canceling"):
                await storage.get(key)
        settings.change(storage_timeout=DEADLINE)
        assert await storage.get(key) == b"body"


async def test_a_server_that_hangs_costs_no_thread_for_good(
    plain: str, clock: Clock, no_looks: None
) -> None:
    stopped: list[int] = []

    def hang() -> None:
        """Stop the server's processes of our connections; others still work."""
        rows = run(plain, "SELECT pid FROM pg_stat_activity WHERE application_name = 'mailerq'")
        for (pid,) in rows:
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)

    try:
        settings = Settings(plain, storage_threads=2)
        async with open_storage(settings, clock=clock) as storage:
            assert storage is not None
            key = await storage.put(b"body", NOW)

            async def until_it_works() -> None:
                storage._cache.clear()
                with trio.fail_after(10):
                    while True:
                        with suppress(StorageError):
                            assert await storage.get(key) == b"body"
                            return

            settings.change(storage_timeout=0.5)  # which connects anew
            await until_it_works()
            for _ in range(3):
                hang()
                storage._cache.clear()
                with pytest.raises(StorageError, match=r"has not answered in 0\.5 s"):
                    await storage.get(key)
                await until_it_works()
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


async def test_processes_that_start_together_create_one_table(plain: str, clock: Clock) -> None:
    keys: list[str] = []

    async def start(number: int) -> None:
        async with opened(plain, clock=clock) as storage:
            keys.append(await storage.put(b"body %d" % (number // 2), NOW))

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(start, number)
    assert len(set(keys)) == 3
    assert run(plain, f"SELECT count(*) FROM {table_of(plain)}") == [(3,)]


async def test_a_damaged_row_makes_mail_wait(plain: str, clock: Clock) -> None:
    async with opened(plain, clock=clock) as storage:
        key = await storage.put(b"body", NOW)
        storage._cache.clear()
        run(plain, f"UPDATE {table_of(plain)} SET body = 'bodY'")
        with pytest.raises(StorageError, match="damaged"):
            await storage.get(key)
