"""Helpers for tests of the whole engine: a receiving server, clients, and compiled plugins."""

from __future__ import annotations

import os
import random
import re
import smtplib
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import thread_time
from typing import Any, TypeVar

import trio

from mailerq import Config
from mailerq.net.stream import Stream, StreamLost
from mailerq.wire import server
from mailerq.wire.smtp import Reply

T = TypeVar("T")

ROOT = Path(__file__).parent.parent

DEADLINE = 60.0
"""Seconds after which a test gives up: the machine may be slow, and busy with something else."""

PORT_TRIALS = 200

CC_FLAGS = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'include'}"]


@dataclass
class Mail:
    """A mail that the sink accepted."""

    sender: str
    recipients: list[str]
    body: bytes
    helo: str = ""
    """The name that its client has given."""


Decide = Callable[[server.Event], Reply | None]


@dataclass
class Sink:
    """A receiving server inside the test. `decide` may refuse an event with a reply."""

    port: int
    mails: list[Mail] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    most: int = 0
    """The most connections at a time."""
    last_mails: dict[int, str] = field(default_factory=dict)
    """The recipient of the last mail, by the number of the connection."""
    decide: Decide = lambda event: None
    arrived: trio.Event = field(default_factory=trio.Event)

    async def wait_for(self, count: int) -> list[Mail]:
        with trio.move_on_after(DEADLINE):
            while len(self.mails) < count:
                self.arrived = trio.Event()
                await self.arrived.wait()
        assert len(self.mails) >= count
        return self.mails

    async def serve(self, sock: socket.socket) -> None:
        self.connections += 1
        self.open += 1
        self.most = max(self.most, self.open)
        connection = self.connections
        stream = Stream(sock)
        machine = server.ServerProtocol(server.Settings(hostname="sink.test"))
        machine.greet()
        try:
            while True:
                match event := machine.next_event():
                    case server.NEED_DATA:
                        stream.write(machine.data_to_send())
                        machine.receive_data(await stream.receive())
                    case server.CLOSED:
                        return
                    case server.Closing():
                        stream.write(machine.data_to_send())
                        return
                    case _:
                        self.answer(machine, event, connection)
        except StreamLost:
            return
        finally:
            self.open -= 1
            stream.close()

    def answer(self, machine: server.ServerProtocol, event: server.Event, connection: int) -> None:
        refusal = self.decide(event)
        if refusal is not None:
            machine.reject(refusal)
            return
        if isinstance(event, server.Content):
            assert machine.sender is not None and machine.hello is not None
            mail = Mail(machine.sender, machine.recipients, event.body, machine.hello.name)
            self.mails.append(mail)
            self.last_mails[connection] = machine.recipients[0]
            self.arrived.set()
        machine.accept()


@asynccontextmanager
async def open_sink() -> AsyncIterator[Sink]:
    """Open a sink on a free port, for the duration of the context."""
    with socket.socket() as listening:
        listening.setblocking(False)
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        sink = Sink(listening.getsockname()[1])

        async def accept() -> None:
            while True:
                await trio.lowlevel.wait_readable(listening)
                nursery.start_soon(sink.serve, listening.accept()[0])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            yield sink
            nursery.cancel_scope.cancel()


@contextmanager
def public_directory() -> Iterator[Path]:
    """A directory that other accounts can look into; that of pytest is closed to them."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@contextmanager
def closed_port() -> Iterator[int]:
    """Reserve a port that refuses connections, for the duration of the context."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def hold_ports(count: int) -> tuple[list[int], list[socket.socket]]:
    """Ports that are ours as long as the sockets that come with them are open.

    The kernel gives none of them to a connection or a listener, because they are below its range.
    Test workers agree by a Unix socket with the name of the port, which ends with its process.
    """
    ranges = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    below = int(ranges.split()[0])
    ports: list[int] = []
    holds: list[socket.socket] = []
    for port in random.sample(range(min(10_000, below // 2), below), PORT_TRIALS):
        hold = socket.socket(socket.AF_UNIX)
        try:
            hold.bind(f"\0mailerq-test-port-{port}")
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:  # of another worker, or of a program of this host
            hold.close()
            continue
        ports.append(port)
        holds.append(hold)
        if len(ports) == count:
            return ports, holds
    raise AssertionError(f"no {count} of {PORT_TRIALS} ports are free")


def free_port() -> int:
    """Return a port for a program that needs a number; it is ours until this process ends."""
    (port,), (hold,) = hold_ports(1)
    hold.detach()
    return port


def configure(directory: Path, **settings: Any) -> Config:
    """Make a configuration for a test: one port that the kernel chooses, and no plugins."""
    defaults: dict[str, Any] = {
        "hostname": "mx.test",
        "queue_directory": str(directory / "queue"),
        "plugin_directory": "",
        "smtp_ip": ("127.0.0.1",),
        "smtp_port": (0,),
        "shutdown_timeout": 5.0,
    }
    return Config(**{**defaults, **settings})


def least_seconds(work: Callable[[], object]) -> float:
    """The least processor time of this thread that `work` takes in three runs: noise only adds."""

    def once() -> float:
        began = thread_time()
        work()
        return thread_time() - began

    return min(once() for _ in range(3))


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Run a blocking function, such as a client of the standard library, beside the engine."""
    return await trio.to_thread.run_sync(function, *args)


async def until_found(read: Callable[[], Awaitable[T]], wanted: Callable[[T], bool]) -> T:
    """Read until `wanted`, and return what was read; a failure shows what was read last."""
    end = trio.current_time() + DEADLINE
    while not wanted(found := await read()):
        assert trio.current_time() < end, found
        await trio.sleep(0.02)
    return found


async def send(
    address: tuple[str, int],
    mime: bytes = b"Subject: test\r\n\r\nhello\r\n",
    *,
    sender: str = "a@b.test",
    recipients: tuple[str, ...] = ("c@d.test",),
) -> tuple[int, str]:
    """Send one mail with smtplib; return the reply to its final dot. Raises as smtplib."""

    def work() -> tuple[int, str]:
        with smtplib.SMTP(*address, timeout=DEADLINE) as client:
            client.ehlo("client.test")
            code, text = client.mail(sender)
            if code != 250:
                raise smtplib.SMTPSenderRefused(code, text, sender)
            for recipient in recipients:
                code, text = client.rcpt(recipient)
                if code != 250:
                    raise smtplib.SMTPRecipientsRefused({recipient: (code, text)})
            code, text = client.data(mime)
            return code, text.decode()

    return await in_thread(work)


def without_received(body: bytes) -> bytes:
    """Return a mail without its first Received field."""
    assert body.startswith(b"Received: ")
    lines = body.split(b"\r\n")
    end = 1
    while lines[end][:1] in (b" ", b"\t"):
        end += 1
    return b"\r\n".join(lines[end:])


def compile_plugin(directory: Path, name: str, source: str) -> Path:
    """Compile a plugin. The suffix of its name (.c, .cpp) selects the language."""
    directory.mkdir(exist_ok=True)
    file = directory.parent / name
    file.write_text(source)
    target = directory / (file.stem + ".so")
    compiler = ["cc", "-std=c99"] if file.suffix == ".c" else ["c++", "-std=c++17"]
    subprocess.run([*compiler, *CC_FLAGS, "-o", target, file], check=True)
    return target


def mailerq(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end, with an environment of PATH only."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "mailerq", *arguments],
        capture_output=True,
        env={**environ, **options.pop("env", {})},
        timeout=60,
        check=False,
        **options,
    )


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for something that nobody announces."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)


def wait_for_line(process: subprocess.Popen[str], text: str) -> str:
    """Read what a process says on standard error, up to the first line that holds the text."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return line
    raise AssertionError(f"{text!r} is not in {lines}")


def cpu_seconds(pid: int) -> float:
    """The processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def status_of(pid: int | str) -> dict[str, str]:
    """What the kernel says about a process in /proc/…/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    return dict(re.findall(r"^(\w+):\s*(.*)$", text, re.MULTILINE))


def memory_of(pid: int | str, name: str) -> int:
    """A field of `status_of` in bytes, such as ``VmRSS``, ``RssAnon`` or the peak ``VmHWM``."""
    number, unit = status_of(pid)[name].split()
    assert unit == "kB"
    return int(number) << 10


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, by any of its threads."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread, or the process, has just gone
            found += [int(child) for child in task.read_text().split()]
    return found


def unescape(text: str) -> str:
    """Undo `mailerq.escaping`."""
    codes = r"\\(?:\\|x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8}))"
    return re.sub(codes, lambda match: chr(int(next(filter(None, match.groups()), "5c"), 16)), text)
