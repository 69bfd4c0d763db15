"""A daemon that a plugin ends, or does not let end: its last line and its exit status."""

from __future__ import annotations

import os
import re
import signal
import smtplib
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.plugins.kit import SOURCES, build, install
from tests.support import ROOT

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
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for line in self.lines:
                if text in line:
                    return line
            time.sleep(0.02)
        raise AssertionError(f"nobody said {text!r}: {self.lines}")

    def talk(self, *commands: str) -> None:
        """Be a client whose last command gets no answer."""
        port = int(self.wait_for("listens on").rpartition(":")[2].split(",")[0])
        with (
            suppress(OSError, smtplib.SMTPException),
            closing(smtplib.SMTP("127.0.0.1", port, timeout=5)) as client,
        ):
            client.timeout = 0.5
            assert client.sock is not None
            client.sock.settimeout(0.5)
            for command in commands:
                client.docmd(command)

    def stop(self, *numbers: int) -> tuple[int, float]:
        """The exit status after signals, and the seconds that it took."""
        start = time.monotonic()
        for number in numbers or (signal.SIGTERM,):
            self.process.send_signal(number)
        status = self.process.wait(40)
        return status, time.monotonic() - start


@contextmanager
def daemon(directory: Path, where: str, what: str, *more: str) -> Iterator[Running]:
    file = build(SOURCES / "fault.c", "-lev", "-lpthread", "-ldl", "-Wno-infinite-recursion")
    (directory / "plugins").mkdir()
    install(directory / "plugins", faulty=file)
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
        assert running.process.wait(20) == -signal.SIGSEGV
        for lines in (running.lines, running.log):
            assert re.fullmatch(rf"\[Critical\] \[[-: \d]+\] SIGSEGV in {RCPTTO}", lines[-1])


def test_a_descriptor_that_nobody_can_do_without_is_said_to_be_closed(tmp_path: Path) -> None:
    with daemon(tmp_path, "mq_smtp_in_rcptto", "close") as running:
        running.talk(*MAIL)
        assert running.process.wait(20) == os.EX_SOFTWARE
        assert "a plugin closes descriptors that are not its own (faulty.so)" in running.log[-1]


def test_a_crash_is_said_in_the_file_that_logrotate_left(tmp_path: Path) -> None:
    with daemon(tmp_path, "mq_smtp_in_rcptto", "SIGABRT") as running:
        running.wait_for("listens on")
        (tmp_path / "log").rename(tmp_path / "log.1")
        running.process.send_signal(signal.SIGHUP)  # something to say
        running.wait_for("SIGHUP")
        running.talk(*MAIL)
        assert running.process.wait(20) == -signal.SIGABRT
        assert "SIGHUP" in running.log[0]
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
        assert re.search(rf"has stood still in {re.escape(place)} for 0\.\d s$", line)
        status, seconds = running.stop(signal.SIGTERM, signal.SIGINT)
        assert status == os.EX_SOFTWARE
        assert seconds < 5
        assert "the process has not ended: it ends now, with status 70." in running.lines[-1]
        assert f"It is in {place}" in running.lines[-1]


@pytest.mark.parametrize(
    ("where", "what", "threads"),
    [
        ("mq_smtp_in_rcptto", "lock", 1),
        ("mq_smtp_in_rcptto", "deadlock", 3),
        ("a libev callback", "deadlock", 1),
    ],
)
def test_a_deadlock_ends_within_the_timeout_and_a_little(
    tmp_path: Path, where: str, what: str, threads: int
) -> None:
    with daemon(tmp_path, where, what, f"--smtp-threads={threads}") as running:
        running.talk(*MAIL)
        line = running.wait_for(f"{where} of plugin")
        if what == "lock":
            assert "Python's lock has been held for" in line
        status, seconds = running.stop()
        assert status == os.EX_SOFTWARE
        assert SHUTDOWN < seconds < SHUTDOWN + 8
        assert f"It is in {where} of plugin faulty.so" in running.lines[-1]


@pytest.mark.parametrize("what", ["deadlock", "lock"])
def test_the_processes_of_a_parent_end_with_it(tmp_path: Path, what: str) -> None:
    with daemon(tmp_path, "mq_smtp_in_rcptto", what, "--smtp-processes=2") as running:
        running.talk(*MAIL)
        running.wait_for(RCPTTO)
        status, seconds = running.stop()
        assert status == os.EX_SOFTWARE
        assert SHUTDOWN < seconds < SHUTDOWN + 12
        assert re.search(rf"process [01]: asked to stop .* It is in {RCPTTO}", running.wait_for(
            "asked to stop"))  # fmt: skip
        running.wait_for("ended with status 70")


def test_a_crash_at_the_end_is_the_exit_status_of_the_parent(tmp_path: Path) -> None:
    with daemon(tmp_path, "mq_cleanup", "SIGSEGV", "--smtp-processes=2") as running:
        running.wait_for("listens on")
        assert running.stop()[0] == os.EX_SOFTWARE
        running.wait_for("SIGSEGV in mq_cleanup of plugin faulty.so")
        running.wait_for("was ended by SIGSEGV")


def test_a_cleanup_that_hangs_is_said_and_ends(tmp_path: Path) -> None:
    with daemon(tmp_path, "mq_cleanup", "deadlock") as running:
        running.wait_for("listens on")
        status, _ = running.stop()
        assert status == os.EX_SOFTWARE
        assert any("has stood still in mq_cleanup" in line for line in running.lines)
        assert "It is in mq_cleanup of plugin faulty.so for " in running.lines[-1]


def test_an_initialize_that_takes_long_is_said_to_be_over(tmp_path: Path) -> None:
    with daemon(tmp_path, "mq_initialize", "doze") as running:
        running.wait_for("has stood still in mq_initialize of plugin faulty.so")
        assert "[faulty.so] mq_initialize goes on; it took 0." in running.wait_for("goes on")
        running.wait_for("listens on")
        assert running.stop()[0] == os.EX_OK
        assert running.lines[-1].endswith("stopped")


def test_a_process_whose_parent_is_killed_ends_in_spite_of_a_deadlock(tmp_path: Path) -> None:
    with daemon(tmp_path, "mq_smtp_in_rcptto", "lock", "--smtp-processes=2") as running:
        running.talk(*MAIL)
        running.wait_for(RCPTTO)
        running.process.kill()
        running.wait_for("asked to stop")
