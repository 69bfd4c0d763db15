"""What the daemon gives up, and in whose name it works where an account may write."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mailerq.privileges import DAC_READ_SEARCH, KEPT
from tests.support import (
    ROOT,
    children_of,
    compile_plugin,
    mailerq,
    public_directory,
    status_of,
    wait_for_line,
)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has an account to change to")

NOBODY = pwd.getpwnam("nobody")

MAIL = b"From: a@b.test\r\n\r\nhello\r\n"

CONSTRUCTOR = """
#include <mailerq.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }
__attribute__((constructor)) static void constructed(void)
{
    FILE *file = fopen(getenv("CONSTRUCTED"), "a");
    fprintf(file, "%d\\n", (int) geteuid());
    fclose(file);
}
"""


@pytest.fixture
def place() -> Iterator[Path]:
    with public_directory() as directory:
        yield directory


@pytest.fixture
def writable(place: Path) -> Path:
    """A folder of the account."""
    path = place / "account"
    path.mkdir()
    os.chown(path, NOBODY.pw_uid, NOBODY.pw_gid)
    return path


def settings_in(directory: Path, *more: str) -> list[str]:
    return [
        "--hostname=mx.test",
        "--smtp-ip=127.0.0.1",
        "--smtp-port=0",
        "--rabbitmq-inbox=inbox",
        f"--plugin-directory={directory / 'plugins'}",
        f"--queue-directory={directory / 'queue'}",
        *more,
    ]


@contextmanager
def daemon(settings: list[str], **environ: str) -> Iterator[subprocess.Popen[str]]:
    """A daemon that listens; it is to end well."""
    with subprocess.Popen(
        [sys.executable, "-m", "mailerq", *settings],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environ},
    ) as process:
        try:
            wait_for_line(process, "listens on")
            yield process
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()


@as_root
@pytest.mark.parametrize("processes", [1, 2])
def test_no_code_of_a_plugin_runs_before_the_account_is_changed(
    place: Path, writable: Path, processes: int
) -> None:
    compile_plugin(place / "plugins", "constructor.c", CONSTRUCTOR)
    settings = settings_in(
        place,
        "--user=nobody",
        f"--smtp-processes={processes}",
    )
    file = writable / "constructed"
    with daemon(settings, CONSTRUCTED=str(file)) as running:
        pids = children_of(running.pid) if processes > 1 else [running.pid]
        assert len(pids) == processes
        for pid in pids:
            found = status_of(pid)
            assert set(found["Uid"].split()) == {str(NOBODY.pw_uid)}
            assert found["NoNewPrivs"] == "1"
            assert int(found["CapPrm"], 16) == 0
    assert file.read_text().split() == processes * [str(NOBODY.pw_uid)]


@as_root
def test_a_parent_keeps_what_ports_need_and_can_still_do_its_work(
    place: Path, writable: Path
) -> None:
    log = writable / "log"
    settings = settings_in(
        place, "--user=nobody", "--smtp-processes=2", f"--application-log={log},stderr"
    )
    with daemon(settings) as running:
        found = status_of(running.pid)
        assert int(found["CapPrm"], 16) & ~KEPT == 0
        assert int(found["CapEff"], 16) & ~KEPT == 0
        assert int(found["CapBnd"], 16) & ~(KEPT | DAC_READ_SEARCH) == 0
        log.rename(writable / "log.1")
        os.kill(children_of(running.pid)[1], signal.SIGKILL)
        wait_for_line(running, "another one is started")
        assert "another one is started" in log.read_text()
        assert log.stat().st_uid == NOBODY.pw_uid
        assert mailerq("status", *settings).returncode == 0
    assert not (place / "queue" / "mailerq.pid").exists()
    assert not (place / "queue" / "control").exists()


@as_root
def test_where_capabilities_cannot_be_dropped_the_log_says_so_and_all_goes_on() -> None:
    program = (
        "import logging; logging.basicConfig(format='%(message)s');"
        "from mailerq import _core, privileges;"
        "_core.keep_capabilities(privileges.KEPT, privileges.EVERYTHING);"  # no CAP_SETPCAP
        "privileges.keep_for_ports(account=True); print('on')"
    )
    done = run_python(program)
    assert done.stdout == "on\n"
    assert "capabilities that are not needed cannot be dropped: Operation not" in done.stderr


@pytest.mark.parametrize("uid", [0, NOBODY.pw_uid])
def test_who_has_nothing_to_give_up_is_not_warned(uid: int) -> None:
    if os.geteuid() != 0 and uid == 0:
        pytest.skip("only root has something to give up")
    program = (
        "import logging, os; logging.basicConfig(format='%(message)s');"
        "from mailerq import privileges;"
        f"os.geteuid() or os.setuid({uid});"
        "privileges.no_new_privileges(); privileges.keep_for_ports(account=False);"
        "print(open('/proc/self/status').read())"
    )
    done = run_python(program)
    assert done.stderr == ""
    assert "NoNewPrivs:\t1\n" in done.stdout


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=30,
        check=True,
    )


@as_root
def test_what_root_injects_before_the_first_start_is_for_the_user(place: Path) -> None:
    settings = settings_in(place, "--user=nobody")
    queue = place / "queue"
    queue.mkdir(0o750)
    os.chown(queue, NOBODY.pw_uid, NOBODY.pw_gid)
    assert mailerq("c@d.test", *settings, input=MAIL).returncode == 0
    assert {path.stat().st_uid for path in (queue, *queue.iterdir())} == {NOBODY.pw_uid}
    with daemon(settings):
        assert b" 1 " in mailerq("queue", "list", *settings).stdout
        assert mailerq("c@d.test", *settings, input=MAIL).returncode == 0
        assert {path.lstat().st_uid for path in queue.iterdir()} == {NOBODY.pw_uid}


def test_the_lock_lies_beside_the_queue(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    lock = tmp_path / "queue" / "mailerq.pid"
    with daemon(settings) as running:
        assert lock.read_text() == f"{running.pid}\n"
        second = mailerq(*settings)
        assert second.returncode == 2
        assert f"another mailerq is running (process {running.pid}), {lock}" in (
            second.stderr.decode()
        )
    assert not lock.exists()


def hard_link(lock: Path, precious: Path) -> None:
    lock.hardlink_to(precious)


def soft_link(lock: Path, precious: Path) -> None:
    lock.symlink_to(precious)


def pipe(lock: Path, precious: Path) -> None:
    os.mkfifo(lock)


def somebody_elses(lock: Path, precious: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a file for somebody else")
    lock.touch()
    os.chown(lock, NOBODY.pw_uid, NOBODY.pw_gid)


@pytest.mark.parametrize("plant", [hard_link, soft_link, pipe, somebody_elses])
def test_a_lock_that_somebody_has_planted_is_refused(tmp_path: Path, plant: object) -> None:
    precious = tmp_path / "precious"
    precious.write_text("data")
    assert callable(plant)
    plant(tmp_path / "pid", precious)
    done = mailerq(*settings_in(tmp_path, f"--lock={tmp_path / 'pid'}"))
    assert done.returncode == 2
    assert b"lock: " in done.stderr
    assert b"Traceback" not in done.stderr
    assert precious.read_text() == "data"


@as_root
def test_root_writes_nothing_through_what_an_account_has_planted(place: Path) -> None:
    queue = place / "queue"
    queue.mkdir(0o750)
    os.chown(queue, NOBODY.pw_uid, NOBODY.pw_gid)
    precious = place / "precious"
    precious.write_text("data")
    precious.chmod(0o600)
    (queue / "mailerq.pid").hardlink_to(precious)
    (queue / "queue.lock").symlink_to(precious)
    done = mailerq(*settings_in(place, "--user=nobody"))
    assert done.returncode == 2
    assert b"mailerq.pid as nobody: Permission denied" in done.stderr
    assert precious.read_text() == "data"


@as_root
def test_a_queue_directory_of_root_and_the_group_of_the_user_will_do(place: Path) -> None:
    queue = place / "queue"
    queue.mkdir()
    os.chown(queue, 0, NOBODY.pw_gid)
    queue.chmod(0o2770)
    settings = settings_in(place, "--user=nobody")
    assert mailerq("c@d.test", *settings, input=MAIL).returncode == 0
    with daemon(settings):
        assert {path.lstat().st_uid for path in queue.iterdir()} == {NOBODY.pw_uid}
