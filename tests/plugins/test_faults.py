"""When a plugin ends the process, the last line says which one it was, and in what."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.plugins.kit import ROOT, SOURCES, build, build_text, install

PROGRAM = """
import logging, sys, threading
import trio
from mailerq.message import Message
from mailerq.plugins import Plugins

async def main():
    plugins = Plugins.load(sys.argv[1])
    plugins.initialize()
    context = await plugins.open_context()
    connection = context.connection(0)
    message = Message({"recipient": "c@d.test"}, b"x")
    await connection.connect()
    await connection.secured()
    await connection.authenticate("ann", "secret")
    await connection.mailfrom("a@b.test")
    await connection.rcptto("c@d.test")
    await connection.data(b"x")
    await connection.message(message)
    await connection.out_data(message)
    await connection.out_sent(message)
    await connection.close()
    plugins.message_id()
    await context.close()
    plugins.cleanup()
    print("all was called")

def run(thread):
    logging.disable()
    if thread == "main":
        trio.run(main)
    else:
        thread = threading.Thread(target=trio.run, args=(main,))
        thread.start()
        thread.join()
"""

FRESH = PROGRAM + "run(sys.argv[2])"

FORKING = (
    PROGRAM
    + """
import json, os

for line in sys.stdin:
    directory, thread, environ, output = json.loads(line)
    child = os.fork()
    if child == 0:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environ)
        sys.argv[1:] = [directory]
        run(thread)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
)
"""Runs one after the other, each in a fork that has all but the plugins: imports take longest."""

FUNCTIONS = [
    "mq_version", "mq_initialize", "mq_cleanup", "mq_message_id_size", "mq_message_id",
    "mq_context_initialize", "mq_context_cleanup", "mq_smtp_in_connect", "mq_smtp_in_secure",
    "mq_smtp_in_authenticate", "mq_smtp_in_mailfrom", "mq_smtp_in_rcptto", "mq_smtp_in_data",
    "mq_smtp_in_message", "mq_smtp_in_close", "mq_smtp_out_data", "mq_smtp_out_sent",
    "a timer", "a watcher", "a libev callback",
]  # fmt: skip

SIGNALS = ["SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT"]

under_asan = pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer has handlers of its own"
)


@cache
def forking() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FORKING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module", autouse=True)
def end_of_forking() -> Iterator[None]:
    yield
    if forking.cache_info().currsize:
        assert forking().communicate(timeout=60) == ("", None)
        assert forking().returncode == 0
        forking.cache_clear()


def run(directory: Path, where: str = "", what: str = "", thread: str = "main") -> tuple[int, str]:
    """The exit status, and the last line that is said."""
    process = forking()
    assert process.stdin is not None
    assert process.stdout is not None
    output = directory.with_name(f"{directory.name}.out")
    environ = {"FAULT_IN": where, "FAULT": what}
    print(
        json.dumps([str(directory), thread, environ, str(output)]), file=process.stdin, flush=True
    )
    status = int(process.stdout.readline())
    lines = output.read_text().splitlines()
    return status, lines[-1] if lines else ""


def text_of(line: str) -> str:
    match = re.fullmatch(r"\[Critical\] \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] (.*)", line)
    assert match, line
    return match[1]


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A directory with fault.c between two plugins that do nothing."""
    file = build(SOURCES / "fault.c", "-lev", "-lpthread", "-ldl", "-Wno-infinite-recursion")
    quiet = build_text("#include <mailerq.h>\nint mq_version(void) { return 1; }")
    return install(tmp_path, a=quiet, faulty=file, z=quiet)


def test_a_plugin_that_does_nothing_wrong_is_not_blamed(faulty: Path) -> None:
    assert run(faulty) == (0, "all was called")
    assert run(faulty, thread="other") == (0, "all was called")


@under_asan
@pytest.mark.parametrize(
    ("where", "thread"),
    [
        *((function, "main") for function in FUNCTIONS),
        ("mq_initialize", "other"), ("mq_smtp_in_rcptto", "other"), ("a libev callback", "other"),
    ],
)  # fmt: skip
def test_a_crash_names_the_plugin_and_the_function(faulty: Path, where: str, thread: str) -> None:
    status, line = run(faulty, where, "SIGSEGV", thread=thread)
    assert status == -signal.SIGSEGV
    assert text_of(line) == f"SIGSEGV in {where} of plugin faulty.so"


@under_asan
@pytest.mark.parametrize("what", SIGNALS)
def test_each_signal_is_named_and_stays_the_exit_status(faulty: Path, what: str) -> None:
    status, line = run(faulty, "mq_smtp_in_rcptto", what)
    assert status == -signal.Signals[what]
    assert text_of(line) == f"{what} in mq_smtp_in_rcptto of plugin faulty.so"


@under_asan
@pytest.mark.parametrize("thread", ["main", "other"])
def test_a_stack_that_is_used_up_is_no_stack_for_the_line(faulty: Path, thread: str) -> None:
    status, line = run(faulty, "mq_smtp_in_data", "overflow", thread=thread)
    assert status == -signal.SIGSEGV
    assert text_of(line) == "SIGSEGV in mq_smtp_in_data of plugin faulty.so"


@under_asan
@pytest.mark.parametrize("what", ["SIGSEGV", "SIGABRT"])
def test_a_crash_in_a_constructor_names_the_file(faulty: Path, what: str) -> None:
    status, line = run(faulty, "constructor", what)
    assert status == -signal.Signals[what]
    assert text_of(line) == f"{what} in dlopen() or a constructor of plugin faulty.so"


@pytest.mark.parametrize(
    ("where", "what", "thread"),
    [
        ("constructor", "exit", "main"), ("mq_initialize", "exit", "main"),
        ("mq_smtp_in_rcptto", "exit", "main"), ("mq_smtp_in_rcptto", "exit", "other"),
        ("mq_smtp_in_rcptto", "quick_exit", "other"), ("a timer", "quick_exit", "main"),
    ],
)  # fmt: skip
def test_exit_names_who_called_it(faulty: Path, where: str, what: str, thread: str) -> None:
    status, line = run(faulty, where, what, thread=thread)
    assert status == 7
    function = "dlopen() or a constructor" if where == "constructor" else where
    assert text_of(line) == f"exit() was called in {function} of plugin faulty.so"


@under_asan
@pytest.mark.parametrize("what", ["SIGSEGV", "SIGABRT"])
def test_a_thread_of_a_plugin_is_known_by_its_code(faulty: Path, what: str) -> None:
    status, line = run(faulty, "thread", what)
    assert status == -signal.Signals[what]
    assert text_of(line) == (
        f"{what} outside of callbacks, in code of plugin faulty.so: a thread of its own, perhaps"
    )


@pytest.mark.parametrize("options", ["-Wl,-z,now,-z,relro", "-Wl,-z,lazy", "-fno-plt"])
@pytest.mark.parametrize("what", ["_exit", "_Exit"])
@pytest.mark.parametrize("where", ["mq_version", "mq_smtp_in_rcptto", "a libev callback"])
def test_an_exit_that_runs_nothing_is_said_too(
    tmp_path: Path, where: str, what: str, options: str
) -> None:
    file = build(
        SOURCES / "fault.c", "-lev", "-lpthread", "-ldl", "-Wno-infinite-recursion", options
    )
    status, line = run(install(tmp_path, faulty=file), where, what)
    assert status == 7
    assert text_of(line) == f"_exit() was called in {where} of plugin faulty.so"


def test_exit_on_a_thread_of_a_plugin_is_known_by_its_code(faulty: Path) -> None:
    status, line = run(faulty, "thread", "exit")
    assert status == 7
    assert text_of(line) == (
        "exit() was called outside of callbacks, in code of plugin faulty.so: "
        "a thread of its own, perhaps"
    )


@under_asan
def test_an_exception_that_nobody_catches_is_named(tmp_path: Path) -> None:
    text = """
    #include <mailerq.h>
    struct Thrower { Thrower() { throw 1; } };
    static Thrower thrower;
    MQ_EXPORT int mq_version() { return MQ_API_VERSION; }
    """
    install(tmp_path, thrower=build_text(text, name="thrower.cpp"))
    status, line = run(tmp_path)
    assert status == -signal.SIGABRT
    assert text_of(line) == "SIGABRT in dlopen() or a constructor of plugin thrower.so"


@under_asan
def test_a_file_that_is_cut_off_is_named(faulty: Path) -> None:
    """The loader maps what the headers promise, and what is not there cannot be read."""
    whole = (faulty / "faulty.so").read_bytes()
    for size in (5000, 8192, 12288):
        (faulty / "faulty.so").write_bytes(whole[:size])
        _, line = run(faulty)
        assert "faulty.so" in line, size


@under_asan
def test_a_crash_without_a_plugin_blames_none(faulty: Path) -> None:
    program = (
        "import logging; logging.disable();"
        f"from mailerq.plugins import Plugins; Plugins.load({str(faulty)!r}).initialize();"
        "import ctypes; ctypes.string_at(8)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -signal.SIGSEGV
    assert text_of(done.stderr.splitlines()[-1]) == "SIGSEGV outside of callbacks"


@under_asan
def test_pythons_own_handler_has_its_turn(faulty: Path) -> None:
    for what in ("SIGSEGV", "SIGABRT"):
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", FRESH, faulty, "main"],
            capture_output=True,
            text=True,
            env={
                **os.environ, "FAULT_IN": "mq_smtp_in_rcptto", "FAULT": what,
                "PYTHONPATH": str(ROOT),
            },
            check=False,
        )  # fmt: skip
        assert done.returncode == -signal.Signals[what]
        first, *_, last = done.stderr.splitlines()
        assert text_of(first) == f"{what} in mq_smtp_in_rcptto of plugin faulty.so"
        assert "Fatal Python error" in done.stderr
        assert last.startswith("Extension modules")


@under_asan
def test_a_signal_from_another_process_blames_no_plugin(faulty: Path) -> None:
    program = (
        "import logging; logging.disable();"
        f"from mailerq.plugins import Plugins; Plugins.load({str(faulty)!r});"
        "print('ready', flush=True); input()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGSEGV)
        assert process.wait(20) == -signal.SIGSEGV
        assert process.stderr.read() == b""


def test_a_fork_of_a_plugin_may_exit(tmp_path: Path) -> None:
    text = """
    #include <mailerq.h>
    #include <stdlib.h>
    #include <sys/wait.h>
    #include <unistd.h>
    MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }
    MQ_EXPORT void mq_initialize(void)
    {
        pid_t child = fork();
        if (child == 0) exit(3);
        waitpid(child, 0, 0);
        child = fork();
        if (child == 0) _exit(3);
        waitpid(child, 0, 0);
    }
    """
    install(tmp_path, forks=build_text(text))
    assert run(tmp_path) == (0, "all was called")
