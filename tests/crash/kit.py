"""Helpers for crash tests: a daemon, load with a ledger of accepted mail, and faults below it."""

from __future__ import annotations

import ctypes
import enum
import errno
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final

import trio

from mailerq.cli import control
from mailerq.net.stream import Stream, StreamLost
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.shares import share_directory, shares_in
from tests.support import (
    CC_FLAGS,
    DEADLINE,
    ROOT,
    Sink,
    children_of,
    cpu_seconds,
    memory_of,
    until,
    until_found,
)

HERE: Final = Path(__file__).parent

# The daemon.


@dataclass
class Daemon:
    """A running daemon; its directory has ``queue``, ``log`` and ``pid``."""

    process: trio.Process
    directory: Path
    port: int

    @property
    def queue(self) -> Path:
        return self.directory / "queue"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def cpu_seconds(self) -> float:
        return cpu_seconds(self.process.pid)

    @property
    def memory(self) -> int:
        """Bytes of its own that are resident, without what it maps from files."""
        return memory_of(self.process.pid, "RssAnon")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    async def stop(self, seconds: float = DEADLINE) -> int:
        """SIGTERM: its exit status."""
        self.process.send_signal(signal.SIGTERM)
        with trio.fail_after(seconds):
            return await self.process.wait()

    async def statistics(self) -> dict[str, Any]:
        ask = partial(control.ask, timeout=DEADLINE)
        return await trio.to_thread.run_sync(ask, str(self.queue), "status")

    async def until_statistics(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until the statistics are as wanted: this process counts after its peer has seen."""
        return await until_found(self.statistics, wanted)

    async def until_empty(self) -> None:
        """Wait until nothing is in the outbox."""
        await until(lambda: self.depth("outbox") == 0)

    def depth(self, queue: str) -> int:
        return sum(self.depths(queue))

    def depths(self, queue: str) -> list[int]:
        """How many messages of a queue each share has."""
        depths = []
        for share in shares_in(str(self.queue)):
            with QueueFile.open(share_directory(str(self.queue), share)) as store:
                depths.append(sum(each.total for each in store.depths() if each.queue == queue))
        return depths

    @property
    def children(self) -> list[int]:
        """The processes of several that this one is the parent of."""
        found = []
        for pid in children_of(self.process.pid):
            with suppress(OSError):  # it has just gone
                # Libraries start programs of their own, as ctypes does.
                if b"mailerq.cli.supervisor.child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return sorted(found)


def is_alive(pid: int) -> bool:
    """Whether any of its threads is: they have its files, also when the first one has ended."""
    try:
        states = [
            (task / "stat").read_text().rpartition(")")[2].split()[0]
            for task in Path(f"/proc/{pid}/task").iterdir()
        ]
    except (FileNotFoundError, ProcessLookupError):  # one has just gone, or all have
        return Path(f"/proc/{pid}").exists()
    return any(state not in "ZX" for state in states)


def switches_in(directory: Path, sink_port: int, *more: str) -> list[str]:
    """The switches of a daemon that sends all to a sink; those in `more` come before ours."""
    ours = [
        f"--queue-directory={directory / 'queue'}",
        f"--lock={directory / 'pid'}",
        f"--application-log={directory / 'log'}",
        "--hostname=mx.test",
        "--plugin-directory=",
        "--smtp-ip=127.0.0.1",
        "--smtp-port=0",
        "--smtp-sink-address=127.0.0.1",
        f"--smtp-sink-port={sink_port}",
        "--retry-interval=1",
    ]
    given = {switch.partition("=")[0] for switch in more}
    return [*(switch for switch in ours if switch.partition("=")[0] not in given), *more]


@asynccontextmanager
async def daemon(
    directory: Path,
    sink_port: int,
    *more: str,
    env: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
    listens: bool = True,
) -> AsyncIterator[Daemon]:
    """A daemon, by default once it listens; killed at the end if it still runs."""
    log = directory / "log"
    before = log.stat().st_size if log.exists() else 0
    process = await trio.lowlevel.open_process(
        [*prefix, sys.executable, "-m", "mailerq", *switches_in(directory, sink_port, *more)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **(env or {})},
    )
    try:
        running = Daemon(process, directory, 0)
        if listens:
            running.port = await _port(running, before)
        yield running
    finally:
        if process.poll() is None:
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def _port(running: Daemon, offset: int) -> int:
    with trio.fail_after(DEADLINE):
        while True:
            try:
                text = (running.directory / "log").read_bytes()[offset:].decode(errors="replace")
            except FileNotFoundError:
                text = ""
            if found := re.search(r"listens on \S+?:(\d+)", text):
                return int(found[1])
            assert running.is_alive, text
            await trio.sleep(0.01)


# Load.

BODY: Final = b"Subject: x\r\n\r\nhi\r\n"


class Fate(enum.Enum):
    """What a client knows of a mail whose final dot it has sent."""

    ACCEPTED = "250"
    REFUSED = "4xx or 5xx to it"
    UNKNOWN = "no reply"


@dataclass
class Entry:
    """One mail in the ledger: when its dot was sent and when its reply came (monotonic)."""

    fate: Fate
    sent: float
    replied: float = 0.0
    code: int = 0


@dataclass
class Ledger:
    """Every mail whose final dot was sent, by its id."""

    entries: dict[str, Entry] = field(default_factory=dict)
    codes: Counter[int] = field(default_factory=Counter)
    """All replies but those that a mail is made of."""
    mark: Callable[[], int] = lambda: 0
    marks: dict[str, int] = field(default_factory=dict)
    """What `mark` said when the 250 came."""

    def ids(self, *fates: Fate) -> set[str]:
        return {id for id, entry in self.entries.items() if entry.fate in fates}

    @property
    def accepted(self) -> set[str]:
        return self.ids(Fate.ACCEPTED)

    def count(self, fate: Fate, since: float = 0.0) -> int:
        """How many there are whose dot was sent since then."""
        return sum(e.fate is fate and e.sent >= since for e in self.entries.values())

    def check(self, arrived: Sequence[str], may_be_twice: Collection[str] = ()) -> None:
        """Account for every id: what was accepted has arrived, and nothing that was not sent."""
        counts = Counter(arrived)
        assert self.accepted - counts.keys() == set()
        assert counts.keys() - self.ids(Fate.ACCEPTED, Fate.UNKNOWN) == set()
        assert {id for id, count in counts.items() if count > 1} - {*may_be_twice} == set()


class Load:
    """Sessions that send mail after mail. `name` tells their ids from those of other loads."""

    def __init__(self, ledger: Ledger, name: str, body: bytes = BODY) -> None:
        self.ledger = ledger
        self.body = body
        self.ending = False
        self._name = name
        self._count = 0
        self._sessions = 0

    async def session(self, port: int, *, again: bool = False, pause: float = 0.0) -> None:
        """Send until mail is refused, the connection ends, or the load does.

        `again`: on a new connection after that, as clients do.
        """
        self._sessions += 1
        try:
            while True:
                with suppress(StreamLost, EOFError, OSError):
                    await self._session(port, pause)
                if self.ending or not again:
                    return
                await trio.sleep(0.05)
        finally:
            self._sessions -= 1

    async def end(self) -> None:
        """Have the sessions end behind the mail that they are at, and wait for them."""
        self.ending = True
        await until(lambda: not self._sessions)

    async def _session(self, port: int, pause: float) -> None:
        ledger = self.ledger
        stream = await Stream.connect("127.0.0.1", port)
        try:
            if await command(stream, None) != 220:
                return
            await command(stream, b"EHLO load.test\r\n")
            while not self.ending:
                self._count += 1
                id = f"{self._name}-{self._count}"
                for line, expected in (
                    (b"MAIL FROM:<a@b.test>\r\n", 250),
                    (b"RCPT TO:<%b@d.test>\r\n" % id.encode(), 250),
                    (b"DATA\r\n", 354),
                ):
                    code = await command(stream, line)
                    if code != expected:
                        ledger.codes[code] += 1
                        return
                entry = ledger.entries[id] = Entry(Fate.UNKNOWN, time.monotonic())
                entry.code = await command(stream, self.body + b".\r\n")
                entry.replied = time.monotonic()
                if entry.code != 250:
                    entry.fate = Fate.REFUSED
                    return
                entry.fate = Fate.ACCEPTED
                ledger.marks[id] = ledger.mark()
                await trio.sleep(pause)
            await command(stream, b"QUIT\r\n")
        finally:
            stream.close()


async def command(stream: Stream, line: bytes | None) -> int:
    """Send a line, if there is one, and read a whole reply: its code."""
    if line is not None:
        stream.write(line)
        await stream.drain()
    reply = b""
    while not reply.endswith(b"\n") or reply.split(b"\r\n")[-2][3:4] == b"-":
        data = await stream.receive()
        if not data:
            raise EOFError
        reply += data
    return int(reply[:3])


def arrivals(sink: Sink) -> list[str]:
    """The ids that have come to the sink."""
    return [recipient.partition("@")[0] for mail in sink.mails for recipient in mail.recipients]


async def all_arrive(sink: Sink, expected: set[str]) -> None:
    """Wait until all of them have come to the sink, as long as anything comes."""
    missing, seen = set(expected), 0
    while missing:
        with trio.fail_after(DEADLINE):
            while len(sink.mails) == seen:
                sink.arrived = trio.Event()
                with trio.move_on_after(1):
                    await sink.arrived.wait()
        for mail in sink.mails[seen:]:
            missing.difference_update(recipient.partition("@")[0] for recipient in mail.recipients)
        seen = len(sink.mails)


# Faults.


class Call(enum.IntEnum):
    """The calls that faults.c lets fail."""

    SYNC = 0
    WRITE = 1
    TRUNCATE = 2
    OPEN = 3
    READ = 4


class _Control(ctypes.Structure):
    """``struct control`` of faults.c."""

    _fields_ = (
        ("error", ctypes.c_int32 * len(Call)),
        ("one_in", ctypes.c_int32),
        ("partial", ctypes.c_int32),
        ("delay_ms", ctypes.c_int32),
        ("clock_ns", ctypes.c_int64),
        ("failed", ctypes.c_int64 * len(Call)),
    )


@cache
def _shim() -> Path:
    """The library, compiled once for the process."""
    target = Path(mkdtemp(prefix="mailerq-faults-")) / "faults.so"
    source = HERE / "faults.c"
    command = ["cc", "-O1", *CC_FLAGS, "-o", str(target), str(source), "-ldl", "-pthread"]
    subprocess.run(command, check=True)
    return target


class Faults:
    """What fails below the daemons that are started with `env`."""

    def __init__(self, directory: Path, memory: mmap.mmap) -> None:
        self._directory = directory
        self._control = _Control.from_buffer(memory)

    @property
    def env(self) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(_shim()),
            "FAULTS_CONTROL": str(self._directory / "faults"),
            "FAULTS_UNDER": str(self._directory / "queue"),
        }

    def set(
        self, *calls: Call, error: int = errno.EIO, one_in: int = 1, partial: bool = False
    ) -> None:
        """From now on these calls fail, or one of so many of them.

        `partial`: a write that fails has written its first half, as on a full disk.
        """
        self._control.one_in = one_in
        self._control.partial = partial
        for call in calls:
            self._control.error[call] = error

    def clear(self) -> None:
        """Nothing fails any more."""
        for call in Call:
            self._control.error[call] = 0
        self._control.delay_ms = 0

    @property
    def failed(self) -> int:
        return sum(self._control.failed)

    def delay_syncs(self, milliseconds: int) -> None:
        self._control.delay_ms = milliseconds

    @property
    def journal(self) -> Path:
        """What is written to the queue's files from the start of a daemon with `journal_env`."""
        return self._directory / "journal"

    @property
    def journal_env(self) -> dict[str, str]:
        return {**self.env, "FAULTS_JOURNAL": str(self.journal)}

    @property
    def clock(self) -> float:
        """How far the wall clock is off, in seconds."""
        return self._control.clock_ns / 1e9

    def set_clock(self, seconds: float) -> None:
        """The wall clock is so far off from now on."""
        self._control.clock_ns = int(seconds * 1e9)


@contextmanager
def open_faults(directory: Path) -> Iterator[Faults]:
    """Faults for one test; nothing fails yet."""
    path = directory / "faults"
    path.write_bytes(bytes(ctypes.sizeof(_Control)))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        faults = Faults(directory, memory)
        try:
            yield faults
        finally:
            faults.clear()
            del faults._control  # it exports the memory
