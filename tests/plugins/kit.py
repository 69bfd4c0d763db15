"""What tests of plugins share: compiling the fixtures here, loading them, reading their calls."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache, cached_property
from pathlib import Path
from tempfile import mkdtemp

import trio

from mailerq import _core
from mailerq.plugins import Connection, Context, Plugins

ROOT = Path(__file__).parent.parent.parent
SOURCES = Path(__file__).parent
FLAGS = ["-shared", "-fPIC", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'include'}"]


@cache
def scratch() -> Path:
    """A directory of this process for what is compiled; each source is compiled once."""
    return Path(mkdtemp(prefix="mailerq-tests-"))


@cache
def build(source: Path, *options: str) -> Path:
    """Compile a C or C++ file into a plugin."""
    compiler = (
        os.environ.get("CXX", "c++") if source.suffix == ".cpp" else os.environ.get("CC", "cc")
    )
    target = scratch() / f"{source.name}-{len(list(scratch().iterdir()))}"
    command = [compiler, *FLAGS, "-o", str(target), str(source), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def build_text(text: str, *options: str, name: str = "plugin.c") -> Path:
    """Compile a plugin that stands in a test."""
    directory = Path(mkdtemp(dir=scratch()))
    source = directory / name
    source.write_text(text)
    return build(source, *options)


def install(directory: Path, **files: Path) -> Path:
    """Copy compiled plugins to ``directory/<name>.so``."""
    for name, file in files.items():
        shutil.copy(file, directory / f"{name}.so")
    return directory


@asynccontextmanager
async def opened(directory: Path, *, timeout: float = 30) -> AsyncIterator[tuple[Plugins, Context]]:
    """Load a directory and open one context; at the end nothing that is counted may be left."""
    plugins = Plugins.load(str(directory), timeout=timeout, hostname="mx.test", server_id=1)
    plugins.initialize()
    context = await plugins.open_context(0)
    try:
        yield plugins, context
    finally:
        live = context.live
        await context.close()
        plugins.cleanup()
    del live["connections"]  # they live as long as the test's variables
    assert not any(live.values()), live


@asynccontextmanager
async def connected(
    directory: Path, *, timeout: float = 30
) -> AsyncIterator[tuple[Plugins, Context, Connection]]:
    """The same with a connection."""
    async with opened(directory, timeout=timeout) as (plugins, context):
        connection = context.connection(-1)
        yield plugins, context, connection
        await connection.close()


class Scripted:
    """Copies of script.c, called "a", "b" and so on, and what the log says they were called for."""

    def __init__(self, directory: Path, count: int) -> None:
        self.directory = directory
        self.names = "abcdefghij"[:count]
        file = build(SOURCES / "script.c", "-lev", "-lpthread")
        install(directory, **dict.fromkeys(self.names, file))

    @cached_property
    def libraries(self) -> dict[str, ctypes.CDLL]:
        """The plugins, opened once more, to call what is not part of the interface.

        Not before mailerq has opened them: only then are the MQ_ functions there.
        """
        return {name: ctypes.CDLL(str(self.directory / f"{name}.so")) for name in self.names}

    def script(self, *scripts: str) -> None:
        """Give each plugin its words; those without get none."""
        for name in self.names:
            self.libraries[name].script(b"")
        for name, words in zip(self.names, scripts, strict=False):
            self.libraries[name].script(words.encode())

    def release(self, name: str, decision: str) -> None:
        """Hand back what a plugin has kept, on this thread."""
        self.libraries[name].release(ctypes.c_char(decision.encode()))

    async def wait_kept(self, name: str, count: int = 1) -> None:
        """Wait until a plugin has kept so many events."""
        with trio.fail_after(60):
            while self.libraries[name].kept_count() < count:
                await trio.lowlevel.checkpoint()


class Calls(logging.Handler):
    """The lines that plugins log, as "a rcptto", and warnings about them."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage().replace(".so]", "]").replace("[", "", 1).replace("]", "", 1)
        (self.lines if record.levelno <= logging.INFO else self.warnings).append(line)

    def take(self) -> list[str]:
        """The lines since the last time."""
        _core.flush_log()
        lines, self.lines = self.lines, []
        return lines

    def take_warnings(self) -> list[str]:
        """The warnings since the last time."""
        _core.flush_log()
        warnings, self.warnings = self.warnings, []
        return warnings


def names(calls: Sequence[str]) -> str:
    """Only the plugins, in the order of the calls."""
    return "".join(call.split()[0] for call in calls)
