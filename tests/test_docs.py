"""The pages below docs/: the code in them runs, and says what the page says that it does."""

from __future__ import annotations

import os
import re
import signal
import smtplib
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from mailerq import Engine
from tests.engine.kit import open_dialog, serve
from tests.support import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page in order: the language and the text."""
    return [(match[1], match[2]) for match in FENCE.finditer((ROOT / "docs" / page).read_text())]


EMBEDDING = blocks("embedding.md")
PROGRAMS = [number for number, (language, _) in enumerate(EMBEDDING) if language == "python"]


def test_each_program_of_the_page_says_what_it_prints() -> None:
    assert PROGRAMS
    assert [EMBEDDING[number + 1][0] for number in PROGRAMS] == ["text"] * len(PROGRAMS)
    assert {language for language, _ in EMBEDDING} == {"python", "text"}


@pytest.mark.parametrize("number", PROGRAMS)
def test_a_program_of_the_page_does_what_the_page_says(tmp_path: Path, number: int) -> None:
    (tmp_path / "program.py").write_text(EMBEDDING[number][1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "program.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, EMBEDDING[number + 1][1]), done.stderr
    assert "Traceback" not in done.stderr


def test_the_programs_of_the_page_pass_a_strict_type_checker(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="`make lint` installs mypy")
    for number in PROGRAMS:
        (tmp_path / f"program{number}.py").write_text(EMBEDDING[number][1])
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *sorted(tmp_path.iterdir())],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# docs/plugins.md

PLUGINS = blocks("plugins.md")
SOURCES = {
    text.partition(".c:")[0].removeprefix("/* "): text
    for language, text in PLUGINS
    if language == "c"
}
((BUILD_LINE, CHECK_LINE),) = (text.splitlines() for name, text in PLUGINS if name == "sh")
MISSPELT, CRASH = (text for language, text in PLUGINS if language == "text")


def shell(line: str, name: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Type a line of the page about hello for another plugin, with mailerq on the path."""
    program = directory / "bin" / "mailerq"
    if not program.exists():
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mailerq "$@"\n')
        program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    return subprocess.run(
        line.replace("hello", name),
        shell=True,
        cwd=directory,
        env={"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def build(name: str, directory: Path) -> str:
    """Compile a plugin of the page as the page says: the directory for `plugin-directory`."""
    (directory / f"{name}.c").write_text(SOURCES[name])
    done = shell(BUILD_LINE, name, directory)
    assert (done.returncode, done.stderr) == (0, "")
    return str(directory)


def test_the_tutorial_has_the_plugins_that_are_tried_here() -> None:
    assert set(SOURCES) == {"hello", "client", "slow", "ask", "think", "misspelt", "crash"}
    assert {language for language, _ in PLUGINS} == {"c", "sh", "text"}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_plugin_of_the_tutorial_compiles_and_is_found_good(tmp_path: Path, name: str) -> None:
    build(name, tmp_path)
    done = shell(CHECK_LINE, name, tmp_path)
    if name == "misspelt":
        assert (done.returncode, done.stdout) == (1, MISSPELT)
    else:
        assert done.returncode == 0, done.stdout
        assert done.stdout.startswith(f"{name}.so: good\n")


MAIL = "MAIL FROM:<a@b.test>"


async def recipients(engine: Engine, *names: str) -> list[int]:
    async with open_dialog(engine.addresses[0]) as dialog:
        commands = [f"RCPT TO:<{name}@d.test>" for name in names]
        return (await dialog.codes(MAIL, *commands))[1:]


async def test_hello_refuses_one_recipient(tmp_path: Path) -> None:
    async with serve(tmp_path, plugin_directory=build("hello", tmp_path)) as engine:
        assert await recipients(engine, "spam", "ann") == [550, 250]


async def test_client_knows_the_client_behind_a_proxy(tmp_path: Path) -> None:
    settings = {"smtp_proxy": ("127.0.0.1",), "smtp_local_domains": ("d.test",)}
    plugins = build("client", tmp_path)
    async with serve(tmp_path, plugin_directory=plugins, **settings) as engine:
        for address, code in (("192.0.2.7", 530), ("127.0.0.9", 250)):
            async with open_dialog(engine.addresses[0], greeted=False) as dialog:
                await dialog.send(f"PROXY TCP4 {address} 192.0.2.1 4711 25\r\n".encode())
                await dialog.reply()
                assert await dialog.codes("EHLO c.test", MAIL) == [250, code]


async def test_slow_lets_a_recipient_wait(tmp_path: Path) -> None:
    async with serve(tmp_path, plugin_directory=build("slow", tmp_path)) as engine:
        assert await recipients(engine, "ann", "bob") == [250, 250]
        row = engine.statistics()["plugins"]["slow.so"]["rcptto"]
        assert (row["calls"], row["suspensions"]) == (2, 2)


async def test_ask_does_as_the_server_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "socket"
    monkeypatch.setenv("ASK_SOCKET", str(path))
    asked: list[bytes] = []

    async def answer() -> None:
        while True:
            stream = trio.SocketStream((await listening.accept())[0])
            async with stream:
                line = b""
                while not line.endswith(b"\n"):
                    line += await stream.receive_some()
                asked.append(line)
                if not line.startswith(b"hangs-up@"):
                    await stream.send_all(b"y" if line.startswith(b"ann@") else b"n")

    async with serve(tmp_path, plugin_directory=build("ask", tmp_path)) as engine:
        assert await recipients(engine, "ann") == [451]  # nobody listens
        with trio.socket.socket(trio.socket.AF_UNIX) as listening:
            await listening.bind(str(path))
            listening.listen()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer)
                assert await recipients(engine, "ann", "bob", "hangs-up") == [250, 550, 451]
                nursery.cancel_scope.cancel()
    assert asked == [b"ann@d.test\n", b"bob@d.test\n", b"hangs-up@d.test\n"]


async def test_think_decides_in_a_thread(tmp_path: Path) -> None:
    async with serve(tmp_path, plugin_directory=build("think", tmp_path)) as engine:
        assert await recipients(engine, "ann", "xavier", "ann") == [250, 550, 250]
        assert engine.statistics()["plugins"]["think.so"]["rcptto"]["suspensions"] == 3


def test_crash_is_named_by_the_last_line(tmp_path: Path) -> None:
    plugins = build("crash", tmp_path)
    command = [
        sys.executable, "-m", "mailerq", "--smtp-ip=127.0.0.1", "--smtp-port=0",
        f"--plugin-directory={plugins}", f"--queue-directory={tmp_path / 'queue'}",
    ]  # fmt: skip
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "listens on" in line:
                port = int(line.rpartition(":")[2])
                with smtplib.SMTP("127.0.0.1", port, timeout=60) as client:
                    client.ehlo()
                    client.mail("a@b.test")
                    with pytest.raises((OSError, smtplib.SMTPServerDisconnected)):
                        client.rcpt("c@d.test")
                    client.close()
    assert process.returncode == -signal.SIGSEGV
    assert lines[-1].endswith(f"] {CRASH}")
