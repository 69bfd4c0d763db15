"""``make run`` from the moment when all is built: a server, a sink, a first mail, a clean end."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 30


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what ``make run`` works on, with plugins built and ports of its own."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/run", tmp_path / "tools/run")
    plugins = tmp_path / "build/plugins"
    plugins.mkdir(parents=True)
    for name in ("trace", "footer"):
        subprocess.run(
            [
                *("cc", "-shared", "-fPIC", "-I", ROOT / "include"),
                *(ROOT / f"plugins/{name}.c", "-o", plugins / f"{name}.so"),
            ],
            check=True,
        )
    return tmp_path


@pytest.fixture
def running(tree: Path) -> Iterator[subprocess.Popen[str]]:
    server, sink = free_ports(2)
    process = subprocess.Popen(
        [sys.executable, tree / "tools/run", f"--smtp-port={server}", f"--smtp-sink-port={sink}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def read_welcome(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Ctrl-C" in line:
            return "".join(lines)
    raise AssertionError("it ended: " + "".join(lines))


def test_run_takes_a_first_mail_as_it_says_and_ends_cleanly(
    tree: Path, running: subprocess.Popen[str]
) -> None:
    welcome = read_welcome(running)
    command = re.search(r"python3 -c (.*)$", welcome, re.MULTILINE)
    assert command, welcome
    pids = [running.pid, *descendants(running.pid)]
    assert len(pids) == 3, "itself, the sink and the server"

    subprocess.run(command[0].replace("python3", sys.executable, 1), shell=True, check=True)

    mails = tree / "var/sink"
    eventually(lambda: [*mails.glob("*.eml")] and [*mails.glob("*.json")])
    (mail,) = mails.glob("*.eml")
    assert b"\r\nA first mail." in mail.read_bytes()
    (envelope,) = mails.glob("*.json")
    assert "you@example.test" in json.dumps(json.loads(envelope.read_text()))
    assert {"smtp-sink-address: 127.0.0.1", "smtp-sink-port: 2526"} < {
        *(tree / "var/config.txt").read_text().splitlines()
    }
    assert {path.name for path in (tree / "var/plugins").iterdir()} == {"trace.so", "footer.so"}

    running.send_signal(signal.SIGINT)
    running.communicate(timeout=PATIENCE_SECONDS)
    assert running.returncode == 0
    assert not [pid for pid in pids if alive(pid)]


def test_run_leaves_no_orphan_when_it_is_killed(running: subprocess.Popen[str]) -> None:
    read_welcome(running)
    children = descendants(running.pid)
    assert len(children) == 2
    running.kill()
    running.wait()
    eventually(lambda: not any(map(alive, children)))


@pytest.mark.parametrize("setting", ["smtp-port", "smtp-sink-port"])
def test_run_says_which_port_is_taken(tree: Path, setting: str) -> None:
    other = {"smtp-port": "smtp-sink-port", "smtp-sink-port": "smtp-port"}[setting]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [
                *(sys.executable, tree / "tools/run"),
                *(f"--{setting}={port}", f"--{other}={free_ports(1)[0]}"),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
    assert done.returncode == 1
    assert f"Port {port} is in use" in done.stderr
