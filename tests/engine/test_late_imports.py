"""A running engine imports nothing: a late import fails when no descriptor is left."""

from __future__ import annotations

import smtplib
import subprocess
import sys
import time
from pathlib import Path

import argon2

from mailerq.message import format_time
from tests.net.dns_server import open_dns_server
from tests.support import ROOT, in_thread, open_sink

ENGINE = """
import sys, trio, mailerq
async def main(directory, logins, server, port):
    config = mailerq.Config(
        queue_directory=directory, plugin_directory="", hostname="mx.test",
        smtp_ip=("127.0.0.1",), smtp_port=(0,), smtp_out_port=int(port),
        smtp_auth=(f"file://{logins}",), smtp_out_forbidden=(), dns_servers=mailerq.Config.load(
            [f"--dns-servers={server}"], {}).dns_servers)
    async with mailerq.Engine(config) as engine:
        before = set(sys.modules)
        print(engine.addresses[0][1], flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        print(sorted(set(sys.modules) - before))
trio.run(main, *sys.argv[1:])
"""

HASH = argon2.PasswordHasher(time_cost=1, memory_cost=1024).hash("secret")

ZONE = {
    ("d.test", "MX"): ["10 mx.d.test."],
    ("mx.d.test", "A"): ["127.0.0.1"],
    ("alias.test", "CNAME"): ["d.test."],
    ("xn--bcher-kva.test", "A"): ["127.0.0.1"],
}


def send(port: int) -> None:
    """Mail to known, unknown and internationalized domains, by a client that logs in."""
    with smtplib.SMTP("127.0.0.1", port, timeout=60) as client:
        client.ehlo("client.test")
        client.login("ann", "secret")
        client.docmd("MAIL", "FROM:<a@b.test> SMTPUTF8")
        for recipient in ("one@d.test", "two@alias.test", "three@bücher.test", "four@no.test"):
            client.send(f"RCPT TO:<{recipient}>\r\n".encode())
            assert client.getreply()[0] == 250
        until = format_time(time.time() + 3600)
        code, _ = client.data(f"x-mq-maxdelivertime: {until}\r\nSubject: x\r\n\r\nhi\r\n")
        assert code == 250


async def test_a_running_engine_imports_nothing(tmp_path: Path) -> None:
    logins = tmp_path / "logins"
    logins.write_text(f"ann:{HASH}\n")
    async with open_sink() as sink, open_dns_server(ZONE) as server:
        engine = subprocess.Popen(  # noqa: ASYNC220
            [
                *(sys.executable, "-c", ENGINE, str(tmp_path / "queue"), str(logins)),
                *(server.address, str(sink.port)),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with engine:
            assert engine.stdout is not None
            port = int(await in_thread(engine.stdout.readline))
            await in_thread(send, port)
            await sink.wait_for(3)
            output, _ = await in_thread(engine.communicate, "\n")
        assert (engine.returncode, output) == (0, "[]\n")
