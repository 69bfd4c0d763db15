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
PATIENCE_SECONDS = 60


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


def test_the_commands_of_the_welcome_find_the_server_when_they_are_pasted(
    tree: Path, running: subprocess.Popen[str], tmp_path: Path
) -> None:
    welcome = read_welcome(running)
    pasted = welcome.partition("what waits in it:\n")[2].partition("\n\n  To deliver")[0]
    assert pasted.count("\n") == 4, welcome
    done = subprocess.run(
        ["sh", "-e"],
        input=pasted,
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^listening +127\.0\.0\.1:\d+$", done.stdout, re.MULTILINE)
    assert re.search(r"^outbox +0 +0 +0 +0$", done.stdout, re.MULTILINE)
    assert "==> var/send.log <==" in done.stdout


def test_the_welcome_says_who_hears_of_failures(running: subprocess.Popen[str]) -> None:
    welcome = read_welcome(running)
    assert "the senders of failed mail get a report" in welcome
    compiled = [*(ROOT / "mailerq" / "wire").glob("server.*.so")]
    assert ("It runs uncompiled: make build" in welcome) is not bool(compiled)


def check_ports(tree: Path, *settings: str, python: str = sys.executable) -> tuple[int, str]:
    done = subprocess.run(
        [python, tree / "tools/run", "--check", *settings],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("setting", ["smtp-port", "smtp-sink-port", "lmtp-port"])
def test_run_says_who_has_a_port_and_what_to_type(tree: Path, setting: str) -> None:
    ports = dict(zip(("smtp-port", "smtp-sink-port"), free_ports(2), strict=True))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = ports[setting] = taken.getsockname()[1]
        settings = [f"--{key}={value}" for key, value in ports.items()]
        status, said = check_ports(tree, *settings)
        assert status == 1
        assert f"Port {port} is in use by process {os.getpid()} (" in said
        again = re.search(rf"make run RUNARGS=(--{setting}=\d+)\n", said)
        assert again
        settings = [text for text in settings if not text.startswith(f"--{setting}=")]
        assert check_ports(tree, *settings, again[1]) == (0, "")
        taken.close()
    assert check_ports(tree, *settings, f"--{setting}={port}") == (0, "")


def test_a_port_of_another_address_is_free(tree: Path) -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = f"--smtp-port={taken.getsockname()[1]}"
        assert check_ports(tree, port, f"--smtp-sink-port={free_ports(1)[0]}") == (0, "")


def test_the_ports_can_be_checked_before_anything_is_installed(tree: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    settings = [f"--smtp-port={free_ports(1)[0]}", f"--smtp-sink-port={free_ports(1)[0]}"]
    assert check_ports(tree, *settings, python=str(bare / "bin/python")) == (0, "")


def test_the_tree_is_put_into_an_environment_without_a_build(tmp_path: Path) -> None:
    environment = tmp_path / "an environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    tree = tmp_path / "tree"
    (tree / "tools").mkdir(parents=True)
    (tree / "mailerq").mkdir()
    for name in ("tools/install", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "mailerq/__init__.py").touch()
    (tree / "mailerq/cli.py").write_text(
        "import sys\ndef main():\n    print(sys.argv)\n    return 7\n"
    )
    for _ in range(2):
        subprocess.run([environment / "bin/python", tree / "tools/install"], check=True)
    for name in ("mailerq", "mailq", "newaliases"):
        program = environment / "bin" / name
        done = subprocess.run(
            [program, "a b", "--c"], capture_output=True, text=True, cwd="/", check=False
        )
        assert (done.returncode, done.stdout) == (7, f"{[str(program), 'a b', '--c']}\n")
