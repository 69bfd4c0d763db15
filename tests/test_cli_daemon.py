"""``mailerq`` alone: the daemon as a service manager and its users see it."""

from __future__ import annotations

import json
import os
import signal
import smtplib
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mailerq.cli import _COMMANDS
from mailerq.cli.daemon import _lock
from mailerq.cli.status import FIGURES, WORDS, _flatten
from mailerq.config import Config
from tests.support import DEADLINE, ROOT, closed_port, compile_plugin, mailerq, wait_for_line

MAIL = b"From: a@b.test\r\n\r\nhello\r\n"


class Daemon:
    def __init__(self, process: subprocess.Popen[str], settings: Sequence[str]) -> None:
        self.process = process
        self.settings = settings
        self.port = int(self.wait_for("listens on").rpartition(":")[2].partition(",")[0])

    def wait_for(self, text: str) -> str:
        """The first line of the log that holds the text."""
        return wait_for_line(self.process, text)

    def connect(self) -> smtplib.SMTP:
        return smtplib.SMTP("127.0.0.1", self.port, local_hostname="client.test", timeout=60)

    def wait(self) -> int:
        return self.process.wait(DEADLINE)


def settings_in(directory: Path, *more: str) -> list[str]:
    return [
        "--hostname=mx.test",
        "--smtp-ip=127.0.0.1",
        "--smtp-port=0",
        "--plugin-directory=",
        f"--queue-directory={directory / 'queue'}",
        f"--lock={directory / 'pid'}",
        *more,
    ]


@contextmanager
def daemon(directory: Path, *more: str) -> Iterator[Daemon]:
    settings = settings_in(directory, *more)
    command = [sys.executable, "-m", "mailerq", *settings]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield Daemon(process, settings)
        finally:
            process.kill()


def test_sigterm_ends_it_with_a_goodbye_and_status_0(tmp_path: Path) -> None:
    with daemon(tmp_path) as running:
        assert (tmp_path / "pid").read_text() == f"{running.process.pid}\n"
        with running.connect() as client:
            client.ehlo()
            running.process.send_signal(signal.SIGTERM)
            assert client.getreply()[0] == 421
            client.close()
        running.wait_for("SIGTERM: stopping")
        running.wait_for("stopped")
        assert running.wait() == 0
    assert not (tmp_path / "pid").exists()
    assert not (tmp_path / "queue" / "control").exists()


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with daemon(tmp_path) as running, running.connect() as client:
        client.ehlo()
        client.mail("a@b.test")
        client.rcpt("c@d.test")
        assert client.docmd("DATA")[0] == 354
        running.process.send_signal(signal.SIGTERM)
        running.wait_for("SIGTERM: stopping")
        running.process.send_signal(signal.SIGINT)
        running.wait_for("SIGINT again: stopping at once")
        assert running.wait() == -signal.SIGINT
        client.close()


def test_sighup_changes_nothing_and_stops_nothing(tmp_path: Path) -> None:
    with daemon(tmp_path) as running:
        running.process.send_signal(signal.SIGHUP)
        running.wait_for("SIGHUP")
        with running.connect() as client:
            assert client.noop()[0] == 250


def test_a_mail_from_the_command_line_is_delivered_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mailerq", "sink", "--listen=127.0.0.1:0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as sink:
        assert sink.stdout is not None
        port = json.loads(sink.stdout.readline())["listening"][1]
        with daemon(
            tmp_path, "--smtp-sink-address=127.0.0.1", f"--smtp-sink-port={port}"
        ) as running:
            assert mailerq("c@d.test", *running.settings, input=MAIL).returncode == 0
            taken = json.loads(sink.stdout.readline())
        sink.terminate()
    assert (taken["envelope"], taken["recipients"]) == ("a@b.test", ["c@d.test"])


def test_status_and_queues_of_a_running_daemon(tmp_path: Path) -> None:
    with daemon(tmp_path, "--rabbitmq-inbox=inbox") as running:
        with running.connect() as client:
            client.sendmail("a@b.test", ["c@d.test"], MAIL)
        status = json.loads(mailerq("status", "--json", *running.settings).stdout)
        assert status["pid"] == running.process.pid
        assert status["listening"] == [f"127.0.0.1:{running.port}"]
        assert status["incoming"]["messages"] == 1
        listed = mailerq("queue", "list", "--json", *running.settings).stdout
        depths = {depth["queue"]: depth["total"] for depth in json.loads(listed)}
        assert depths["inbox"] == 1


def test_a_flush_tries_what_waits(tmp_path: Path) -> None:
    with closed_port() as port:
        sink = ("--smtp-sink-address=127.0.0.1", f"--smtp-sink-port={port}")
        with daemon(tmp_path, *sink, "--smtp-processes=2") as running:
            with running.connect() as client:
                client.sendmail("a@b.test", ["c@d.test"], MAIL)
            for attempts in (1, 2, 3):
                shown = {"attempts": 0}
                while shown["attempts"] < attempts:
                    done = mailerq("queue", "show", "--json", *running.settings)
                    shown = json.loads(done.stdout)
                assert shown["reason"] == "127.0.0.1: Connection refused"
                assert mailerq("-q", *running.settings).stdout == b""


def test_the_help_names_every_command() -> None:
    said = mailerq("--help").stdout.decode()
    assert [name for name in _COMMANDS if f"mailerq {name} " not in said] == []


def test_every_figure_of_status_is_explained(tmp_path: Path) -> None:
    with daemon(tmp_path, "--smtp-processes=2") as running:
        with running.connect() as client:
            client.sendmail("a@b.test", ["c@d.invalid"], MAIL)
        tree = json.loads(mailerq("status", "--json", *running.settings).stdout)
    assert tree.pop("processes")
    assert set(tree.pop("plugins", {})) == set()
    names = [name for name, _ in _flatten(tree)]
    assert len(names) > 40
    assert WORDS.keys() > set(FIGURES)
    whole = {name.rpartition(".")[0] for name in WORDS} - {""}
    for name in names:
        parts = name.split(".")
        known = {".".join(parts[:length]) for length in range(1, len(parts) + 1)} - whole
        assert known & WORDS.keys(), f"{name} is not in WORDS"
    said = mailerq("status", "--help").stdout.decode()
    assert all(text in said for text in WORDS.values())


def test_a_lock_whose_descriptor_a_plugin_has_closed_costs_no_other_file(tmp_path: Path) -> None:
    lock, precious = tmp_path / "pid", tmp_path / "precious"
    precious.write_text("mail")
    with _lock(Config.load(settings_in(tmp_path))):
        (fd,) = [int(name) for name in os.listdir("/proc/self/fd") if is_open(name, lock)]
        with precious.open("r+b") as file:
            os.dup2(file.fileno(), fd)
        lock.unlink()
    assert precious.read_text() == "mail"
    assert is_open(str(fd), precious)
    os.close(fd)


def is_open(fd: str, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.readlink(f"/proc/self/fd/{fd}") == str(path)
    return False


def test_a_second_daemon_is_turned_away_and_told_by_whom(tmp_path: Path) -> None:
    with daemon(tmp_path) as running:
        second = mailerq(*running.settings)
        assert second.returncode == 2
        assert f"another mailerq is running (process {running.process.pid})" in (
            second.stderr.decode()
        )
        running.process.kill()
        running.wait()
        assert (tmp_path / "pid").exists()
    with daemon(tmp_path):  # What a killed one left does not matter.
        pass


def test_a_lock_is_no_link_to_somewhere_else(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    (tmp_path / "pid").symlink_to(tmp_path / "precious")
    done = mailerq(*settings_in(tmp_path))
    assert done.returncode == 2
    assert b"lock: cannot open" in done.stderr
    assert (tmp_path / "precious").read_text() == "data"


def test_a_port_that_is_taken_exits_2_and_says_which(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = mailerq(
            *settings_in(tmp_path)[:2], *settings_in(tmp_path)[3:], f"--smtp-port={port}"
        )
    assert done.returncode == 2
    assert f"smtp-port: cannot listen on 127.0.0.1:{port}: " in done.stderr.decode()


def test_an_address_that_is_not_of_this_host_is_what_the_error_is_about(tmp_path: Path) -> None:
    settings = [text for text in settings_in(tmp_path) if not text.startswith("--smtp-ip")]
    done = mailerq(*settings, "--smtp-ip=192.0.2.1")
    assert done.returncode == 2
    assert "--smtp-ip: smtp-ip: cannot listen on 192.0.2.1:" in done.stderr.decode()


def test_a_queue_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "queue").write_text("a file")
    done = mailerq(*settings_in(tmp_path))
    assert done.returncode == os.EX_TEMPFAIL
    assert f"queue-directory {tmp_path}/queue cannot be made: File exists" in done.stderr.decode()


def test_a_plugin_that_is_none_exits_2_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.so").write_text("no ELF")
    settings = [text for text in settings_in(tmp_path) if not text.startswith("--plugin")]
    done = mailerq(*settings, f"--plugin-directory={tmp_path}")
    assert done.returncode == 2
    assert f"{tmp_path}/bad.so" in done.stderr.decode()
    assert b"Traceback" not in done.stderr


HOLD = """
#include <mailerq.h>
#include <stdlib.h>
static int workers;
MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }
MQ_EXPORT bool mq_context_initialize(MQ_Context *context)
{
    if (!context || ++workers < atoi(getenv("WORKERS"))) return false;
    MQ_Log(MQ_INFO, "holding");
    return true;
}
"""


@pytest.fixture
def holding(tmp_path: Path, workers: int) -> list[str]:
    """Settings with a plugin that never hands back the last mq_context_initialize."""
    compile_plugin(tmp_path / "plugins", "hold.c", HOLD)
    settings = [text for text in settings_in(tmp_path) if not text.startswith("--plugin")]
    return [*settings, f"--plugin-directory={tmp_path / 'plugins'}", f"--smtp-threads={workers}"]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_plugin_that_holds_up_the_start_exits_2_and_is_named(
    holding: list[str], workers: int
) -> None:
    done = mailerq(*holding, "--plugin-timeout=0.1", env={"WORKERS": str(workers)})
    assert done.returncode == 2
    assert b"mailerq: hold.so: mq_context_initialize failed: timed out" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("workers", [1, 3])
def test_a_signal_ends_a_start_that_a_plugin_holds_up(holding: list[str], workers: int) -> None:
    command = [sys.executable, "-m", "mailerq", *holding]
    environ = {**os.environ, "WORKERS": str(workers)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environ
    ) as process:
        assert process.stderr is not None
        assert any("holding" in line for line in process.stderr)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert "hold.so" in process.communicate(timeout=DEADLINE)[1]


@pytest.mark.parametrize("log", ["send", "received"])
def test_a_log_that_cannot_be_written_exits_2_and_is_named(tmp_path: Path, log: str) -> None:
    done = mailerq(*settings_in(tmp_path, f"--{log}-log-file={tmp_path}/no/log"))
    assert done.returncode == 2
    assert f"{log}-log-file: cannot write {tmp_path}/no/log: " in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_the_application_log_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with daemon(tmp_path, f"--application-log={path},stderr") as running:
        *_, line = path.read_text().splitlines()
        assert line.startswith("[Info] [2")
        assert line.endswith(f"listens on 127.0.0.1:{running.port}")


def test_an_application_log_that_cannot_be_written_exits_2(tmp_path: Path) -> None:
    done = mailerq(*settings_in(tmp_path, f"--application-log={tmp_path}/no/log"))
    assert done.returncode == 2
    assert f"application-log: cannot write to {tmp_path}/no/log: " in done.stderr.decode()
