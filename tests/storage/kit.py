"""Storages for tests: a directory, an S3 server of moto, and a PostgreSQL of the test's own."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from mailerq.config import Config
from mailerq.storage import Storage, open_storage
from tests.support import hold_ports

__all__ = ["Settings", "moto_server", "opened", "postgres_server"]

START_SECONDS = 60.0
PROGRAMS = "/usr/lib/postgresql/*/bin"


class Settings:
    """Settings in force, which a test changes."""

    def __init__(self, address: str, **more: Any) -> None:
        self.config = Config(storage_address=address, **more)

    def __call__(self) -> Config:
        return self.config

    def change(self, **more: Any) -> None:
        self.config = self.config.replace(**more)


class Clock:
    """A clock that a test sets."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def opened(
    address: str, *, clock: Clock | None = None, **more: Any
) -> AsyncIterator[Storage]:
    """A storage of this address."""
    async with open_storage(Settings(address, **more), clock=clock or time.time) as storage:
        assert storage is not None
        yield storage


def _unprivileged() -> dict[str, Any]:
    """PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
    pytest.skip("there is no account to run PostgreSQL as")


@contextmanager
def postgres_server(directory: Path) -> Iterator[str]:
    """A server on a socket in the directory; yields its address."""
    found = sorted(Path("/").glob(PROGRAMS.lstrip("/")))
    if not found:
        pytest.skip("there is no PostgreSQL server, the Debian package postgresql")
    account = _unprivileged()
    for folder in (directory, *directory.parents):
        if not os.access(folder, os.X_OK) or not folder.stat().st_mode & 0o001:
            pytest.skip(f"{folder} cannot be entered by another account")
    data = directory / "data"
    if account:
        os.chown(directory, account["user"], account["group"])
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC"}
    subprocess.run(
        [found[-1] / "initdb", "-D", data, "-U", "mailerq", "-A", "trust", "-E", "UTF8",
         "--no-sync"],
        check=True, stdout=subprocess.DEVNULL, env=environment, cwd=directory, **account,
    )  # fmt: skip
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [found[-1] / "postgres", "-D", data, "-k", directory, "-c", "listen_addresses=",
             "-c", "shared_buffers=16MB", "-c", "max_connections=20"],
            env=environment, cwd=directory, stdout=output, stderr=subprocess.STDOUT, **account,
        )  # fmt: skip
    try:
        _wait(process, log, lambda: _is_ready(process.pid, data))
        yield f"postgresql://mailerq@/postgres?host={quote(str(directory), safe='')}"
    finally:
        process.terminate()
        process.wait(30)


def _is_ready(pid: int, data: Path) -> bool:
    """Whether the server says that it is ready, in its file of the process."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    # The file is empty for a moment.
    return bool(lines) and lines[0] == str(pid) and lines[-1].strip() == "ready"


def _wait(process: subprocess.Popen[bytes], log: Path, ready: Any) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if ready():
            return
        time.sleep(0.02)  # nothing says when a server is ready
    process.kill()
    process.wait()
    raise AssertionError(f"a server does not start: {log.read_text(errors='replace')[-1000:]}")


@contextmanager
def moto_server(directory: Path) -> Iterator[str]:
    """An S3 server of moto in a process of its own; yields the URL of its endpoint."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    (port,), (hold,) = hold_ports(1)
    log = directory / "moto"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output, stderr=subprocess.STDOUT, cwd=directory,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip

    def ready() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    try:
        _wait(process, log, ready)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        hold.close()
