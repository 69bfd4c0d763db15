"""Opens the storage of a configuration: the only module that knows the kinds."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from mailerq.config import Config
from mailerq.errors import ConfigError, Problem, StorageError
from mailerq.storage.addresses import S3, Directory, Postgres, parse_address
from mailerq.storage.directory import DirectoryBackend
from mailerq.storage.interface import Backend, Storage
from mailerq.storage.postgresql import PostgresBackend
from mailerq.storage.s3 import S3Backend

__all__ = ["make_backend", "open_storage", "storage_problem"]


@asynccontextmanager
async def open_storage(
    config: Callable[[], Config], *, clock: Callable[[], float] = time.time
) -> AsyncIterator[Storage | None]:
    """Use the storage of ``storage-address`` for the duration of the context; None without one.

    `config` returns the settings in force, `clock` seconds since 1970. Does not wait for the
    storage: one that is away now makes mail wait. Raises `ConfigError` if it can never be used.
    """
    if not config().storage_address:
        yield None
        return
    if (problem := storage_problem(config())) is not None:
        raise problem
    backend = make_backend(config(), clock=clock)
    storage = Storage(backend, config, clock=clock)
    scope = trio.CancelScope()
    over = trio.Event()

    async def run() -> None:
        try:
            with scope:
                await storage.run()
        finally:
            over.set()

    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        try:
            yield storage
        except BaseException as error:
            failure = error  # the nursery would wrap it
        scope.cancel()
        with trio.CancelScope(shield=True):
            await over.wait()
            await backend.close()
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # the error refers to this frame


def storage_problem(config: Config) -> ConfigError | None:
    """Why ``storage-address`` can never be used, or None."""
    if not config.storage_address:
        return None
    try:
        make_backend(config)
    except StorageError as error:
        key = "storage-address"
        return ConfigError.of([Problem(config.origin(key), str(error), key)])
    return None


def make_backend(config: Config, *, clock: Callable[[], float] = time.time) -> Backend:
    """The backend of ``storage-address``. Raises `StorageError`."""
    try:
        location = parse_address(config.storage_address)
        match location:
            case Directory():
                return DirectoryBackend(location, config.storage_threads)
            case S3():
                return S3Backend(location, config.storage_threads, clock=clock)
            case Postgres():
                return PostgresBackend(location, config)
    except ValueError as error:
        raise StorageError(f"storage-address {error}") from None
    raise AssertionError(f"{location} has no backend")
