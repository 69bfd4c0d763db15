"""Programs that people have, run against an engine within the test."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from mailerq import Engine
from mailerq.message import Message
from tests.engine.kit import Certificate, inbox
from tests.support import ROOT

LOGIN = {"smtp_auth": ("hardcoded://ann:s3cret",)}
MAIL = b"Subject: from a program\n\nhello\n.dot\n"


def program(name: str) -> str:
    """The path of a program; the test is skipped where it is missing."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: tools/packages test does that")
    return path


@dataclass
class Outcome:
    """How a program ended, and what it said."""

    status: int
    text: str


async def run(
    *command: str | Path, input: bytes = b"", env: dict[str, str] | None = None, seconds: float = 60
) -> Outcome:
    """Run a program beside the engine, with a home of its own."""
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LC_ALL": "C"}
    with trio.fail_after(seconds):
        process = await trio.run_process(
            [str(word) for word in command],
            stdin=input,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
            env={**environ, **(env or {})},
        )
    return Outcome(process.returncode, process.stdout.decode(errors="replace"))


async def succeed(*command: str | Path, **options: Any) -> str:
    """`run` what must end with 0: what it said."""
    outcome = await run(*command, **options)
    assert outcome.status == 0, outcome.text
    return outcome.text


async def only_message(engine: Engine) -> Message:
    """The message that has come in."""
    (message,) = await inbox(engine)
    return message


def authority_file(certificate: Certificate, directory: Path) -> Path:
    """A file with the authority that the certificate is of."""
    path = directory / "ca.pem"
    certificate.authority.cert_pem.write_to_path(str(path))
    return path


def postfix(directory: Path, port: int, **settings: str) -> AbstractContextManager[Any]:
    """A Postfix that sends everything to a port of this host; `port` says where it listens."""
    from benches.peers import Postfix, Unavailable

    class Relay(Postfix):
        def prepare(self) -> list[str]:
            try:
                command = super().prepare()
            except Unavailable as error:
                pytest.skip(str(error))
            with (self.directory / "etc" / "main.cf").open("a") as file:
                file.writelines(f"{key} = {value}\n" for key, value in settings.items())
            return command

        def _services(self) -> str:
            more = "tlsmgr unix - - n 1000? 1 tlsmgr\nlmtp unix - - n - - lmtp\n"
            return super()._services() + more

    program("postconf")
    directory.mkdir()
    return Relay(directory, SimpleNamespace(host="127.0.0.1", port=port))  # type: ignore[arg-type]


EXIM = """\
spool_directory = {directory}/spool
log_file_path = {directory}/log/%s
primary_hostname = exim.test
trusted_users = root
keep_environment =
acl_smtp_rcpt = accept
smtp_accept_queue_per_connection = 0
deliver_drop_privilege = true
domainlist local_domains =
begin acl
begin routers
all:
  driver = manualroute
  route_list = * 127.0.0.1
  self = send
  transport = smtp
begin transports
smtp:
  driver = smtp
  port = {port}
  {options}
begin retry
* * F,2h,15m
begin authenticators
{authenticators}
"""


@dataclass
class Exim:
    """An Exim with a configuration and a spool of its own; it is no daemon, it sends at once.

    It may be unpacked only, beside another mail transfer agent that is installed; the account
    that it insists on then is an invention of nss_wrapper.
    """

    directory: Path
    binary: str
    env: dict[str, str]

    @classmethod
    def prepare(
        cls, directory: Path, port: int, options: str = "", authenticators: str = ""
    ) -> Exim:
        unpacked = ROOT / ".venv" / "exim" / "usr" / "sbin" / "exim4"
        wrapper = next(Path("/usr/lib").glob("*/libnss_wrapper.so"), None)
        env: dict[str, str] = {}
        if (path := shutil.which("exim4")) is None:
            if not unpacked.exists() or wrapper is None or os.geteuid() != 0:
                pytest.skip("exim4 is not there: tools/packages test unpacks it for root")
            path = str(unpacked)
            env = {
                "LD_PRELOAD": str(wrapper),
                "NSS_WRAPPER_PASSWD": str(directory / "passwd"),
                "NSS_WRAPPER_GROUP": str(directory / "group"),
            }
        for name in ("", "spool", "log"):
            (directory / name).mkdir(mode=0o777, exist_ok=True)
            (directory / name).chmod(0o777)
        account = "x:65534:65534::/:/bin/false"
        users = f"root:x:0:0::/root:/bin/sh\nDebian-exim:{account}\n"
        (directory / "passwd").write_text(users)
        (directory / "group").write_text("root:x:0:\nDebian-exim:x:65534:\n")
        configuration = EXIM.format(
            directory=directory,
            port=port,
            options=options,
            authenticators=authenticators,
        )
        (directory / "exim.conf").write_text(configuration)
        return cls(directory, path, env)

    async def send(self, mail: bytes, *recipients: str, sender: str = "a@b.test") -> str:
        """Send a mail at once; what it said. Whether it has gone stands in its log."""
        command = (self.binary, "-C", self.directory / "exim.conf", "-odf", "-oi", "-v")
        return await succeed(*command, "-f", sender, *recipients, input=mail, env=self.env)

    @contextmanager
    def listening(self) -> Iterator[int]:
        """Take mail by SMTP, and send it on at once: on which port of this host."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            self.binary,
            "-C",
            self.directory / "exim.conf",
            "-bdf",
            "-oX",
            f"127.0.0.1.{port}",
        ]
        server = subprocess.Popen(command, env=os.environ | self.env, process_group=0)
        try:
            for _ in range(1000):
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
            yield port
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()

    def log(self) -> str:
        return "".join(path.read_text() for path in (self.directory / "log").iterdir())
