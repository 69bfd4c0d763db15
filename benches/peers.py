"""Start the systems that a benchmark compares, on ports and in directories of their own.

Each system here is a context manager that runs one program with its children: `Sink` takes mail and
counts it, `Mailerq` is the project, `Postfix` is a peer for comparison, and `Running` stands for a
server that already runs. Nothing that belongs to the machine is touched: not its Postfix
configuration, not its spool, not its service.

A stopped system leaves no children behind, and a system dies with the benchmark when the benchmark
is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import grp
import os
import platform
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Protocol, Self

from mailerq.address import host_port

__all__ = [
    "LOOPBACK",
    "START_SECONDS",
    "Destination",
    "Failed",
    "Mailerq",
    "Postfix",
    "Program",
    "Running",
    "Sink",
    "System",
    "Unavailable",
    "busy_seconds",
    "compile_plugin",
    "cpu_seconds",
    "file_system",
    "find_program",
    "free_port",
    "machine",
]

PROJECT: Final = Path(__file__).resolve().parent.parent
LOOPBACK: Final = "127.0.0.1"
START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 15.0
LOG_TAIL_LINES: Final = 15
TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
DAY_MS: Final = 86_400_000
PR_SET_CHILD_SUBREAPER: Final = 36
EMPTY: Final[Mapping[str, str]] = MappingProxyType({})


class Unavailable(Exception):
    """A system cannot run on this machine; the text says what is missing."""


class Failed(Exception):
    """A system did not start, stopped, or did not do its work in time; the text says which."""


def find_program(name: str, package: str) -> str:
    """The path of a program, also of one that is only in root's PATH."""
    path = os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"
    found = shutil.which(name, path=path)
    if found is None:
        raise Unavailable(f"{name} is not installed (Debian package {package})")
    return found


def compile_plugin(source: Path, target: Path) -> None:
    """Compile a C file to a plugin. Raises `Unavailable` without a compiler."""
    command = [os.environ.get("CC", "cc"), "-std=c99", "-O2", "-fPIC", "-shared"]
    command += [f"-I{PROJECT / 'include'}", "-o", str(target), str(source)]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"{source.name} cannot be compiled: {error}") from None


def machine() -> dict[str, Any]:
    """Facts about the machine that explain the figures."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": model,
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def free_port() -> int:
    """A TCP port of the loopback interface on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def file_system(directory: Path) -> str:
    """The file system that holds a directory, such as ``ext4``, ``ext4 without a journal``."""
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, found, *_ = line.split()
        inside = directory == Path(mount) or Path(mount) in directory.parents
        if inside and len(mount) >= len(best):
            best, kind = mount, found
    number = directory.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if kind == "ext4" and device.exists():
        journals = Path("/proc/fs").glob(f"jbd2/{device.resolve().name}-*")
        kind = kind if any(journals) else "ext4 without a journal"
    return kind


def _processes() -> dict[int, tuple[int, int]]:
    """Every process: id -> (parent, CPU ticks, including dead children)."""
    table = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # The name in parentheses may hold anything: count the fields after it.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                table[int(entry.name)] = (int(fields[1]), sum(map(int, fields[11:15])))
    return table


def _tree(root: int, table: dict[int, tuple[int, int]]) -> list[int]:
    tree = [root] if root in table else []
    for parent in tree:
        tree += [child for child, (owner, _) in table.items() if owner == parent]
    return tree


def cpu_seconds(root: int) -> float:
    """CPU time of a process and all its descendants, including dead ones, in seconds."""
    table = _processes()
    return sum(table[process][1] for process in _tree(root, table)) / TICKS_PER_SECOND


def busy_seconds() -> float:
    """CPU time of the whole machine since its start, in seconds."""
    # proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal.
    fields = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICKS_PER_SECOND


def _adopt_orphans() -> None:
    """Become the parent of orphaned grandchildren, so that we see their end."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _guard(process: int) -> subprocess.Popen[bytes]:
    """Start a shell that ends a process when we are gone, for whatever reason.

    The shell reads from a pipe that only we hold. PR_SET_PDEATHSIG would be shorter, but the kernel
    forgets it when a process changes its user, as Postfix's programs do.
    """
    return subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _; kill -TERM "$0"', str(process)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


class System(ABC):
    """A mail server at `host`:`port`. Entering it starts the server and waits for its banner."""

    name: str
    host: str = LOOPBACK
    port: int

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    @abstractmethod
    def waiting(self) -> int:
        """Messages that the system has accepted and still holds."""

    @abstractmethod
    def cpu(self) -> float | None:
        """CPU seconds of the system since it started; None if unknown."""

    def broker_cpu(self) -> float | None:
        """CPU seconds of the broker that keeps its queues; None if there is none."""
        return None

    @abstractmethod
    def check(self) -> None:
        """Raise `Failed` if the server has ended."""

    def tail(self) -> str:
        """The last lines of its log."""
        return ""

    @property
    def address(self) -> str:
        """Its host and port."""
        return host_port(self.host, self.port)


class Program(System):
    """A system that is our child process; its output goes to a log file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.guard: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def prepare(self) -> list[str]:
        """Write the program's files below `directory`, and return its command.

        Programs that this one needs are started here, and stopped by `stop_others`.
        """

    def stop_others(self) -> None:
        """Stop what `prepare` has started, if anything; this program has ended or did not start."""

    def cwd(self) -> Path:
        return self.directory

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            command = self.prepare()
            _adopt_orphans()
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(
                    command,
                    cwd=self.cwd(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.guard = _guard(self.process.pid)
            self._wait_for_banner()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process, self.process = self.process, None
        try:
            if process is not None:
                self._end(process)
        finally:
            self.stop_others()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """End the process with its children."""
        if self.guard is not None:
            self.guard.kill()
            self.guard.communicate()
        family = _tree(process.pid, _processes())
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        for member in family:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(member, signal.SIGKILL)
        process.wait()
        for member in family[1:]:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(member, 0)

    def kill(self) -> None:
        """End the program like a power cut; it may be entered again."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.__exit__(None, None, None)

    def memory(self, kind: str = "Pss") -> int:
        """Bytes in memory of all its processes; with "Pss" shared pages count once."""
        assert self.process is not None
        total = 0
        for process in _tree(self.process.pid, _processes()):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith(f"{kind}:"):
                    total += 1024 * int(line.split()[1])
        return total

    def _wait_for_banner(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check()
            with (
                contextlib.suppress(OSError),
                socket.create_connection((self.host, self.port), timeout=1.0) as client,
            ):
                banner = client.recv(1024)
                if banner.startswith(b"220"):
                    with contextlib.suppress(OSError):
                        client.sendall(b"QUIT\r\n")
                        client.recv(1024)
                    return
            time.sleep(0.02)
        raise Failed(f"{self.name} gave no banner in {START_SECONDS:.0f} s\n{self.tail()}")

    def check(self) -> None:
        if self.process is None or self.process.poll() is not None:
            status = "" if self.process is None else f" with status {self.process.returncode}"
            raise Failed(f"{self.name} has ended{status}\n{self.tail()}")

    def cpu(self) -> float | None:
        return None if self.process is None else cpu_seconds(self.process.pid)

    def tail(self) -> str:
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()
            return "\n".join(f"  {line}" for line in lines[-LOG_TAIL_LINES:])
        return ""


class Sink(Program):
    """Postfix's `smtp-sink`: takes every mail, throws it away, and counts.

    The sink writes its counters to a file at every message. We read the end of the file when
    needed, so that counting wakes no process.
    """

    name = "smtp-sink"
    BACKLOG: Final = 1000
    SESSIONS: Final = 4000
    COUNTERS_BYTES: Final = 256
    COUNTED: Final = re.compile(rb"mesg=(\d+)\r")

    def __init__(self, directory: Path, port: int = 0) -> None:
        super().__init__(directory)
        self.port = port or free_port()

    def prepare(self) -> list[str]:
        command = [find_program("smtp-sink", "postfix"), "-c", "-m", str(self.SESSIONS)]
        if os.geteuid() == 0:
            command += ["-u", "nobody"]
        return [*command, self.address, str(self.BACKLOG)]

    def count(self) -> int:
        """How many messages have arrived since the sink started."""
        with open(self.log, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - self.COUNTERS_BYTES))
            whole = self.COUNTED.findall(log.read())  # the last may be half written
        return int(whole[-1]) if whole else 0

    def waiting(self) -> int:
        return 0


class Destination(Protocol):
    """The place where a system sends accepted mail."""

    host: str
    port: int


class Running(System):
    """A server that already runs, known by its address only."""

    def __init__(self, host: str, port: int, pid: int | None = None) -> None:
        self.name = host_port(host, port)
        self.host = host
        self.port = port
        self.pid = pid

    def __enter__(self) -> Self:
        self.check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def check(self) -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((self.host, self.port), timeout=5.0).close()
            return
        raise Failed(f"nothing answers at {self.name}")

    def waiting(self) -> int:
        return 0

    def cpu(self) -> float | None:
        return None if self.pid is None else cpu_seconds(self.pid)


class Mailerq(Program):
    """The project with its embedded queue; all mail goes to a sink.

    Both logs are on, because the peers log each message too. `processes` is the value of
    `smtp-processes`, `checkout` the directory of another version, built there.
    """

    def __init__(
        self,
        directory: Path,
        sink: Destination,
        *,
        name: str = "mailerq",
        command: Sequence[str] = (),
        plugins: Path | None = None,
        processes: int = 1,
        options: Sequence[str] = (),
        checkout: Path = PROJECT,
    ) -> None:
        super().__init__(directory)
        self.name = name
        self.processes = processes
        self.port = free_port()
        self.sink = sink
        self.checkout = checkout
        self.command = list(command) or self.find(checkout)
        self.plugins = plugins
        self.options = list(options)

    @staticmethod
    def find(checkout: Path = PROJECT) -> list[str]:
        """The command of the project."""
        installed = checkout / ".venv" / "bin" / "python"
        python = str(installed) if installed.exists() else sys.executable
        return [python, "-m", "mailerq"]

    def cwd(self) -> Path:
        return self.checkout

    def prepare(self) -> list[str]:
        if not (self.checkout / "mailerq" / "__main__.py").exists():
            raise Unavailable(f"{self.checkout} is no checkout of mailerq")
        settings = {
            "hostname": "relay.test",
            "queue-directory": self.directory / "queue",
            "plugin-directory": self.plugins or self.directory / "no-plugins",
            "lock": self.directory / "mailerq.pid",
            "application-log": "stderr",
            "send-log-file": self.directory / "send.log",
            "received-log-file": self.directory / "received.log",
            "smtp-ip": self.host,
            "smtp-port": self.port,
            "smtp-processes": self.processes,
            "smtp-sink-address": self.sink.host,
            "smtp-sink-port": self.sink.port,
        }
        path = self.directory / "config.txt"
        path.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
        return [*self.command, f"--config-file={path}", *self.options]

    def _wait_for_banner(self) -> None:
        super()._wait_for_banner()
        # The first of several processes may listen while the others start.
        deadline = time.monotonic() + START_SECONDS
        while b"listens on" not in self.log.read_bytes():
            self.check()
            if time.monotonic() > deadline:
                raise Failed(f"{self.name} is not complete\n{self.tail()}")
            time.sleep(0.02)

    def waiting(self) -> int:
        """Also counts the next day: waiting.py queues messages that are due later."""
        # The project's SQLite, not Python's older one: two versions would share a WAL.
        import apsw

        due = int(1000 * time.time()) + DAY_MS
        waiting = 0
        for path in (self.directory / "queue").glob("**/queue.db"):
            with contextlib.closing(apsw.Connection(str(path), apsw.SQLITE_OPEN_READONLY)) as queue:
                queue.set_busy_timeout(1000)
                waiting += int(
                    queue.execute(
                        "SELECT count(*) FROM message WHERE queue = 'outbox' AND due < ?", (due,)
                    ).get
                )
        return waiting


class Postfix(Program):
    """Postfix with a configuration, a queue and processes of its own.

    It gives its default guarantee: the queue file is fsynced before 250. Limits below the capacity
    of the machine are raised, DNS is off, and no mail is inspected.
    """

    name = "postfix"

    def __init__(
        self,
        directory: Path,
        sink: Destination,
        *,
        options: Mapping[str, str] = EMPTY,
        services: Sequence[tuple[str, ...]] = (),
    ) -> None:
        super().__init__(directory)
        self.port = free_port()
        self.sink = sink
        self.options = options
        self.services = services
        self.queue = directory / "queue"
        self.log = directory / "maillog"

    def prepare(self) -> list[str]:
        if os.geteuid() != 0:
            raise Unavailable("Postfix's master needs root to start")
        postconf = find_program("postconf", "postfix")
        daemons = self._ask(postconf, "daemon_directory")
        commands = self._ask(postconf, "command_directory")
        owner, group = self._ask(postconf, "mail_owner"), self._ask(postconf, "setgid_group")
        try:
            user, postdrop = pwd.getpwnam(owner), grp.getgrnam(group)
        except KeyError as error:
            raise Unavailable(f"Postfix is not set up: {error}") from None
        self._make_directories(user.pw_uid, postdrop.gr_gid)
        configuration = self.directory / "etc"
        configuration.mkdir(exist_ok=True)
        settings = {
            "compatibility_level": "3.6",
            "queue_directory": self.queue,
            "data_directory": self.directory / "data",
            "daemon_directory": daemons,
            "command_directory": commands,
            "mail_owner": owner,
            "setgid_group": group,
            "maillog_file": self.log,
            "maillog_file_prefixes": self.directory,
            "myhostname": "relay.test",
            "mydestination": "",
            "local_recipient_maps": "",
            "alias_maps": "",
            "alias_database": "",
            "mynetworks": "127.0.0.0/8",
            "inet_interfaces": "127.0.0.1",
            "inet_protocols": "ipv4",
            "relayhost": f"[{self.sink.host}]:{self.sink.port}",
            "smtp_tls_security_level": "none",
            "smtpd_tls_security_level": "none",
            "smtpd_peername_lookup": "no",
            "smtp_dns_support_level": "disabled",
            "default_process_limit": "200",
            "max_use": "10000",
            "in_flow_delay": "0",
            "smtpd_client_connection_count_limit": "0",
            "default_destination_concurrency_limit": "20",
            "initial_destination_concurrency": "20",
            "qmgr_message_active_limit": "100000",
            "qmgr_message_recipient_limit": "100000",
            **self.options,
        }
        lines = [f"{key} = {value}\n" for key, value in settings.items()]
        (configuration / "main.cf").write_text("".join(lines))
        (configuration / "master.cf").write_text(self._services())
        return [f"{daemons}/master", "-c", str(configuration)]

    def _ask(self, postconf: str, parameter: str) -> str:
        # -d: the compiled-in defaults, not the configuration of the machine.
        answer = subprocess.run(
            [postconf, "-dh", parameter], capture_output=True, text=True, check=False
        )
        if answer.returncode != 0:
            raise Unavailable(f"postconf failed: {answer.stderr.strip()}")
        return answer.stdout.strip()

    def _make_directories(self, user: int, postdrop: int) -> None:
        self.directory.chmod(0o755)
        self.queue.mkdir(exist_ok=True)
        for name in ("active", "bounce", "corrupt", "defer", "deferred", "flush", "hold"):
            self._make(self.queue / name, 0o700, user, -1)
        for name in ("incoming", "private", "saved", "trace"):
            self._make(self.queue / name, 0o700, user, -1)
        self._make(self.queue / "maildrop", 0o730, user, postdrop)
        self._make(self.queue / "public", 0o710, user, postdrop)
        self._make(self.queue / "pid", 0o755, 0, -1)
        self._make(self.directory / "data", 0o700, user, -1)

    @staticmethod
    def _make(path: Path, mode: int, user: int, group: int) -> None:
        path.mkdir(exist_ok=True)
        os.chown(path, user, group)
        path.chmod(mode)

    def _services(self) -> str:
        """master.cf: the services for relaying, nothing in a chroot."""
        table = [
            (self.address, "inet", "n", "-", "-", "smtpd"),
            ("pickup", "unix", "n", "60", "1", "pickup"),
            ("cleanup", "unix", "n", "-", "0", "cleanup"),
            ("qmgr", "unix", "n", "300", "1", "qmgr"),
            ("rewrite", "unix", "-", "-", "-", "trivial-rewrite"),
            ("bounce", "unix", "-", "-", "0", "bounce"),
            ("defer", "unix", "-", "-", "0", "bounce"),
            ("trace", "unix", "-", "-", "0", "bounce"),
            ("flush", "unix", "n", "1000?", "0", "flush"),
            ("proxymap", "unix", "-", "-", "-", "proxymap"),
            ("smtp", "unix", "-", "-", "-", "smtp"),
            ("relay", "unix", "-", "-", "-", "smtp"),
            ("showq", "unix", "n", "-", "-", "showq"),
            ("error", "unix", "-", "-", "-", "error"),
            ("retry", "unix", "-", "-", "-", "error"),
            ("anvil", "unix", "-", "-", "1", "anvil"),
            ("scache", "unix", "-", "-", "1", "scache"),
            ("postlog", "unix-dgram", "n", "-", "1", "postlogd"),
            *self.services,
        ]
        return "".join(
            f"{service} {kind} {private} - n {wake_up} {limit} {command}\n"
            for service, kind, private, wake_up, limit, command in table
        )

    def waiting(self) -> int:
        folders = (self.queue / name for name in ("maildrop", "incoming", "active", "deferred"))
        return sum(len(files) for folder in folders for _, _, files in os.walk(folder))
