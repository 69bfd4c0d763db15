"""What a type checker knows of mailerq, for a program that embeds it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import ROOT

PROGRAM = '''\
"""A program with a handler for each event."""

import mailerq
from mailerq import Connection, Engine, Message, Reject


def client(connection: Connection) -> None:
    address: str | None = connection.address
    port: int = connection.port
    texts: list[str | None] = [
        address, connection.helo, connection.login,
        connection.tls_version, connection.tls_cipher, connection.tls_name,
    ]
    reveal_type(texts)
    reveal_type(connection.secure)
    reveal_type(port)


async def connect(connection: Connection) -> Reject | None:
    return Reject(421, "4.3.2 Not now") if connection.address == "192.0.2.1" else None


def authenticate(connection: Connection, login: str, password: str) -> bool | None:
    return True if (login, password) == ("ann", "secret") else None


def mailfrom(connection: Connection, sender: str) -> Reject:
    return Reject(550, sender)


def data(connection: Connection, mime: bytes | memoryview) -> None:
    bytes(mime[:10])


async def message(connection: Connection, message: Message) -> None:
    message.properties["tags"] = [message.recipient]


def out(connection: Connection, sent: Message, stored: Message) -> None:
    sent.body = (sent.body or b"") + b"--\\r\\n"


def any_event(*arguments: object) -> None:
    print(arguments)


async def main(config: mailerq.Config) -> None:
    engine = Engine(config)
    engine.on("connect", connect)
    engine.on("secure", client)
    engine.on("authenticate", authenticate)
    engine.on("mailfrom", mailfrom)
    engine.on("rcptto", lambda connection, recipient: Reject(550, recipient.lower()))
    engine.on("data", data)
    engine.on("message", message)
    engine.on("close", client)
    engine.on("out_data", out)
    engine.on("out_sent", out)
    for event in mailerq.EVENTS:
        engine.on(event, any_event)
    async with engine:
        await engine.publish({"recipient": "c@d.test", "mime": b"x"}, due=1.0)
        async with engine.consume("results") as leases:
            async for lease in leases:
                reveal_type(lease.message.results)
                await engine.ack(lease)
    reveal_type(mailerq.MessageError("x"))
    reveal_type(engine.addresses)
'''

REVEALED = [
    "list[str | None]",
    "bool",
    "int",
    "list[dict[str, Any]]",
    "mailerq.errors.MessageError",
    "list[tuple[str, int]]",
]

WRONG = """\
from mailerq import Connection, Engine, Message, Reject


def check(engine: Engine) -> None:
    engine.on("connect", lambda connection: True)
    engine.on("rcptto", takes_message)
    engine.on("message", takes_address)
    engine.on("close", rejects)
    engine.on("out_data", takes_message)
    engine.on("out_sent", lambda connection, sent, stored: Reject(550, "too late"))
    engine.on("authenticate", takes_address)
    engine.on("data", takes_bytes)
    engine.on("rcpt", takes_address)


def takes_message(connection: Connection, message: Message) -> None: ...
def takes_address(connection: Connection, address: str) -> None: ...
def takes_bytes(connection: Connection, mime: bytes) -> None: ...
def rejects(connection: Connection) -> Reject: return Reject(550, "")
"""

OPTIONS = ["--no-error-summary", "--hide-error-context"]

Check = Callable[[str], list[str]]


def by_make(directory: Path, libraries: Path) -> None:
    """As `make` installs into its .venv."""
    python = directory / "bin/python"
    subprocess.run([python, ROOT / "tools/install"], check=True)


def by_pip(directory: Path, libraries: Path) -> None:
    """As ``pip install --editable`` does, without the compiling."""
    code = "from setuptools import setup; setup()"
    command = [sys.executable, "-c", code, "--quiet", "editable_wheel", f"--dist-dir={directory}"]
    tree = directory / "tree"
    tree.mkdir()
    # What setuptools leaves beside the sources must not stay there.
    for name in ("pyproject.toml", "README.md", "LICENSE", "mailerq"):
        (tree / name).symlink_to(ROOT / name)
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (wheel,) = directory.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(libraries)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=[by_make, by_pip], ids=["make", "editable"])
def check(request: pytest.FixtureRequest, tmp_path: Path, cache: Path) -> Check:
    """Check a program that stands somewhere else, strictly: what mypy says of it, line by line."""
    pytest.importorskip("mypy", reason="`make lint` installs mypy")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    libraries = Path(sysconfig.get_paths(vars={"base": str(environment)})["purelib"])
    libraries.joinpath("others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    request.param(environment, libraries)

    def run(source: str) -> list[str]:
        (tmp_path / "program.py").write_text(source)
        python = f"--python-executable={environment}/bin/python"
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", python, *OPTIONS, "program.py"],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "MYPY_CACHE_DIR": str(cache)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        return done.stdout.splitlines()

    return run


def test_a_program_with_a_handler_for_each_event_is_right(check: Check) -> None:
    said = check(PROGRAM)
    assert [re.sub(r".* is \"(.*)\"", r"\1", line) for line in said] == REVEALED


def test_a_handler_that_does_not_fit_its_event_is_found(check: Check) -> None:
    lines = [line for line in check(WRONG) if ": error: " in line]
    wanted = {n for n, line in enumerate(WRONG.splitlines(), 1) if "engine.on(" in line}
    assert {int(line.split(":")[1]) for line in lines} == wanted
