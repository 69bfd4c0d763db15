"""A daemon that a plugin ends, or does not let end: its last line and its exit status."""

from __future__ import annotations

import os
import re
import signal
import smtplib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.plugins.kit import SOURCES, build, install
from tests.support import DEADLINE, ROOT

SHUTDOWN = 1.0
"""`shutdown-timeout` here; the process has `OVERDUE_SECONDS` more."""


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    directory: Path

    @property
    def lines(self) -> list[str]:
        return (self.directory / "stderr").read_text().splitlines()

    @property
    def log(self) -> list[str]:
        return (self.directory / "log").read_text().splitlines()

    def wait_for(self, text: str) -> str:
        """The first line that holds the text."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            for line in self.lines:
                if text in line:
                    return line
            time.sleep(0.02)
        raise AssertionError(f"nobody said {text!r}: {self.lines}")

    def talk(self, *commands: str, patience: float = 60.0) -> None:
        """Be a client whose last command gets no answer; others may take `patience` seconds."""
        port = int(self.wait_for("listens on").rpartition(":")[2].split(",")[0])
        with (
            suppress(OSError, smtplib.SMTPException),
            closing(smtplib.SMTP("127.0.0.1", port, timeout=patience)) as client,
        ):
            *others, last = commands
            for command in others:
                client.docmd(command)
            assert client.sock is not None
            client.sock.settimeout(0.5)
            client.docmd(last)

    def stop(self, *numbers: int) -> tuple[int, float]:
        """The exit status after signals, and the seconds that it took."""
        start = time.monotonic()
        for number in numbers or (signal.SIGTERM,):
            self.process.send_signal(number)
        status = self.process.wait(DEADLINE)
        return status, time.monotonic() - start


def fault() -> Path:
    return build(SOURCES / "fault.c", "-lev", "-lpthread", "-ldl", "-Wno-infinite-recursion")


@contextmanager
def daemon(directory: Path, where: str, what: str, *more: str) -> Iterator[Running]:
    (directory / "plugins").mkdir()
    install(directory / "plugins", faulty=fault())
    command = [
        sys.executable, "-m", "mailerq", "--hostname=mx.test", "--smtp-ip=127.0.0.1",
        "--smtp-port=0", f"--plugin-directory={directory / 'plugins'}", "--watchdog-seconds=0.2",
        f"--queue-directory={directory / 'queue'}", f"--lock={directory / 'pid'}",
        f"--shutdown-timeout={SHUTDOWN}", f"--application-log=stderr,{directory / 'log'}", *more,
    ]  # fmt: skip
    environ = {**os.environ, "FAULT_IN": where, "FAULT": what, "PYTHONPATH": str(ROOT)}
    with (directory / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env=environ, process_group=0)
    try:
        yield Running(process, directory)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


MAIL = ("EHLO c.test", "MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>")
RCPTTO = "mq_smtp_in_rcptto of plugin faulty.so"


def test_a_crash_is_the_last_line_of_both_logs(tmp_path: Path) -> None:
    with daemon(tmp_path, "mq_smtp_in_rcptto", "SIGSEGV") as running:
        running.talk(*MAIL)
        assert running.process.wait(DEADLINE) == -signal.SIGSEGV
        for lines in (running.lines, running.log):
            assert re.fullmatch(rf"\[Critical\] \[[-: \d]+\] SIGSEGV in {RCPTTO}", lines[-1])


def test_a_descriptor_that_nobody_can_do_without_is_said_to_be_closed(tmp_path: Path) -> None:
    with daemon(tmp_path, "mq_smtp_in_rcptto", "close") as running:
        running.talk(*MAIL)
        assert running.process.wait(DEADLINE) == os.EX_SOFTWARE
        assert "a plugin closes descriptors that are not its own (faulty.so)" in running.log[-1]


def test_a_crash_is_said_in_the_file_that_logrotate_left(tmp_path: Path) -> None:
    with daemon(tmp_path, "mq_smtp_in_rcptto", "SIGABRT") as running:
        running.wait_for("listens on")
        (tmp_path / "log").rename(tmp_path / "log.1")
        running.process.send_signal(signal.SIGHUP)  # something to say
        running.wait_for("SIGHUP")
        running.talk(*MAIL)
        assert running.process.wait(DEADLINE) == -signal.SIGABRT
        assert any("SIGHUP" in line for line in running.log)
        assert running.log[-1].endswith(f"SIGABRT in {RCPTTO}")


def test_a_crash_of_one_process_of_several_says_of_which(tmp_path: Path) -> None:
    with daemon(tmp_path, "mq_smtp_in_rcptto", "SIGBUS", "--smtp-processes=2") as running:
        running.talk(*MAIL)
        line = running.wait_for("SIGBUS in ")
        assert re.search(rf"\] process [01]: SIGBUS in {RCPTTO}$", line)
        running.wait_for("was ended by SIGBUS; another one is started")


@pytest.mark.parametrize("where", ["constructor", "mq_initialize", "mq_context_initialize"])
def test_a_start_that_hangs_is_said_and_can_be_ended(tmp_path: Path, where: str) -> None:
    with daemon(tmp_path, where, "deadlock") as running:
        function = "dlopen() or a constructor" if where == "constructor" else where
        place = f"{function} of plugin faulty.so"
        line = running.wait_for("stood still in")
        assert re.search(rf"has stood still in {re.escape(place)} for \d+\.\d s$", line)
        status, seconds = running.stop(signal.SIGTERM, signal.SIGINT)
        assert status == os.EX_SOFTWARE
        assert seconds < DEADLINE / 2
        assert "the process has not ended: it ends now, with status 70." in running.lines[-1]
        assert f"It is in {place}" in running.lines[-1]


def test_a_crash_at_the_end_is_the_exit_status_of_the_parent(tmp_path: Path) -> None:
    with daemon(tmp_path, "mq_cleanup", "SIGSEGV", "--smtp-processes=2") as running:
        running.wait_for("listens on")
        assert running.stop()[0] == os.EX_SOFTWARE
        running.wait_for("SIGSEGV in mq_cleanup of plugin faulty.so")
        running.wait_for("was ended by SIGSEGV")


def test_an_initialize_that_takes_long_is_said_to_be_over(tmp_path: Path) -> None:
    with daemon(tmp_path, "mq_initialize", "doze") as running:
        running.wait_for("has stood still in mq_initialize of plugin faulty.so")
        assert "[faulty.so] mq_initialize goes on; it took " in running.wait_for("goes on")
        running.wait_for("listens on")
        assert running.stop()[0] == os.EX_OK
        assert running.lines[-1].endswith("stopped")


# What ends only some seconds behind `shutdown-timeout` does so all at the same time.


def ends_within_the_timeout_and_a_little(
    directory: Path, where: str, what: str, threads: int, *, patience: float = 60.0
) -> None:
    with daemon(directory, where, what, f"--smtp-threads={threads}") as running:
        running.talk(*MAIL, patience=patience)
        line = running.wait_for(f"{where} of plugin")
        if what == "lock":
            assert "Python's lock has been held for" in line
        status, seconds = running.stop()
        assert status == os.EX_SOFTWARE
        assert SHUTDOWN < seconds < SHUTDOWN + DEADLINE / 2
        assert f"It is in {where} of plugin faulty.so" in running.lines[-1]


def ends_with_its_parent(directory: Path, what: str) -> None:
    with daemon(directory, "mq_smtp_in_rcptto", what, "--smtp-processes=2") as running:
        running.talk(*MAIL)
        running.wait_for(RCPTTO)
        status, seconds = running.stop()
        assert status == os.EX_SOFTWARE
        assert SHUTDOWN < seconds < SHUTDOWN + DEADLINE / 2
        line = running.wait_for("asked to stop")
        assert re.search(rf"process [01]: asked to stop .* It is in {RCPTTO}", line)
        running.wait_for("ended with status 70")


def ends_when_its_parent_is_killed(directory: Path) -> None:
    with daemon(directory, "mq_smtp_in_rcptto", "lock", "--smtp-processes=2") as running:
        running.talk(*MAIL)
        running.wait_for(RCPTTO)
        running.process.kill()
        running.wait_for("asked to stop")


def ends_and_says_that_a_cleanup_hangs(directory: Path) -> None:
    with daemon(directory, "mq_cleanup", "deadlock") as running:
        running.wait_for("listens on")
        status, _ = running.stop()
        assert status == os.EX_SOFTWARE
        assert any("has stood still in mq_cleanup" in line for line in running.lines)
        assert "It is in mq_cleanup of plugin faulty.so for " in running.lines[-1]


HANGING: dict[str, Callable[[Path], None]] = {
    "deadlock in a callback": partial(
        ends_within_the_timeout_and_a_little,
        where="mq_smtp_in_rcptto", what="deadlock", threads=3,
    ),
    "deadlock in libev": partial(
        ends_within_the_timeout_and_a_little,
        where="a libev callback", what="deadlock", threads=1, patience=0.5,
    ),
    "lock": partial(
        ends_within_the_timeout_and_a_little, where="mq_smtp_in_rcptto", what="lock", threads=1
    ),
    "deadlock below a parent": partial(ends_with_its_parent, what="deadlock"),
    "lock below a parent": partial(ends_with_its_parent, what="lock"),
    "a parent that is killed": ends_when_its_parent_is_killed,
    "cleanup": ends_and_says_that_a_cleanup_hangs,
}  # fmt: skip


def test_processes_that_hang_end_all_the_same(tmp_path: Path) -> None:
    fault()  # compiled by one thread
    problems = []
    with ThreadPoolExecutor(len(HANGING)) as pool:
        cases = {}
        for number, (name, case) in enumerate(HANGING.items()):
            directory = tmp_path / str(number)
            directory.mkdir()
            cases[name] = pool.submit(case, directory)
        for name, running in cases.items():
            if error := running.exception():
                error.add_note(name)
                problems.append(error)
    if problems:
        raise BaseExceptionGroup("some do not end", problems)
