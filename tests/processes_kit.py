"""What the tests of several processes share: clients, what the parent says, what is left."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

from mailerq.net.stream import Stream
from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.crash.kit import BODY, Daemon, command, is_alive
from tests.support import DEADLINE, Sink

LATER = Reply(451, "4.3.0 not now")

SESSIONS = 24
"""Connections of which each of two processes gets one, but for once in some millions."""

TWO = "--smtp-processes=2"

ONE_ABORTS = """
#include <mailerq.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }
MQ_EXPORT void mq_initialize(void)
{
    char line[4096] = "";
    FILE *file = fopen("/proc/self/cmdline", "r");
    size_t size = fread(line, 1, sizeof line - 1, file);
    fclose(file);
    if (size > 1 && !strcmp(line + size - 2, "1") && !access(getenv("ABORTS"), F_OK)) abort();
}
"""
"""A plugin: the second process cannot start while there is a file, which ABORTS names."""


class Gate:
    """Refuses mail for now while it is closed: what was taken waits in the shares."""

    def __init__(self, sink: Sink) -> None:
        self.closed = True
        sink.decide = self

    def __call__(self, event: server.Event) -> Reply | None:
        return LATER if self.closed and isinstance(event, server.Mail) else None


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Stream]:
    stream = await Stream.connect("127.0.0.1", port)
    try:
        assert await command(stream, None) == 220
        assert await command(stream, b"EHLO client.test\r\n") == 250
        yield stream
    finally:
        stream.close()


async def put(stream: Stream, name: str, body: bytes = BODY) -> int:
    for line in (b"MAIL FROM:<a@b.test>\r\n", b"RCPT TO:<%b@d.test>\r\n" % name.encode()):
        assert await command(stream, line) == 250
    assert await command(stream, b"DATA\r\n") == 354
    return await command(stream, body + b".\r\n")


async def send_all(port: int, prefix: str, count: int = SESSIONS) -> set[str]:
    """Send mails, each on a connection of its own: their ids."""
    names = {f"{prefix}-{number}" for number in range(count)}

    async def one(name: str) -> None:
        async with connected(port) as stream:
            assert await put(stream, name) == 250

    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(one, name)
    return names


async def rows(running: Daemon) -> list[dict[str, Any]]:
    """The rows of the processes, once all that run answer the parent in its time."""
    return await until_rows(
        running, lambda found: all(row["state"] != "does not answer" for row in found)
    )


async def until_rows(running: Daemon, wanted: Any) -> list[dict[str, Any]]:
    """Wait until the rows of the processes are as wanted."""
    return (await running.until_statistics(lambda found: wanted(found["processes"])))["processes"]


def all_run(found: list[dict[str, Any]]) -> bool:
    """Whether each process runs and has its own share, and no other."""
    return all(row["state"] == "runs" and row["shares"] == [row["process"]] for row in found)


def left_of(directory: Path) -> list[int]:
    """The processes that live with the environment of `marked`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environ = (process / "environ").read_bytes()
        except OSError:
            continue
        if f"TEST_MARK={directory}\0".encode() in environ and is_alive(int(process.name)):
            found.append(int(process.name))
    return found


@contextmanager
def marked(directory: Path) -> Iterator[dict[str, str]]:
    """The environment of daemons; none of their processes may be there in the end."""
    yield {"TEST_MARK": str(directory)}
    deadline = time.monotonic() + DEADLINE
    while left := left_of(directory):
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"processes were left behind: {left}")
        time.sleep(0.02)


@contextmanager
def locked(share: Path) -> Iterator[None]:
    with (share / "queue.lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
