"""``mailerq trace``: an operator sees the dialogue of sessions, and no secret."""

from __future__ import annotations

import base64
import json
import os
import signal
import smtplib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq.errors import MailerqError
from mailerq.net.tracing import MAX_LINES, MAX_TRACES, Wanted
from tests.crash.kit import Daemon, command, daemon
from tests.engine.kit import Certificate
from tests.processes_kit import TWO, connected, marked, put
from tests.support import (
    DEADLINE,
    ROOT,
    closed_port,
    in_thread,
    mailerq,
    open_sink,
    until,
    until_found,
)

PASSWORD = "s3cretWORD"
LOGIN = f"--smtp-auth=hardcoded://ann:{PASSWORD}"
PLAIN = base64.b64encode(f"\0ann\0{PASSWORD}".encode())
BODY = b"Subject: x\r\n\r\nTOPSECRETBODY\r\n"

Lines = list[dict[str, Any]]


class Running:
    """``mailerq trace`` as a program, and what it has printed."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.lines: Lines = []
        self.output = ""

    def texts(self, session: str | None = None) -> list[str]:
        """The lines of one session, or of all, with their directions."""
        return [
            f"{line['direction']} {line['text']}"
            for line in self.lines
            if session in (None, line["session"])
        ]

    @property
    def sessions(self) -> list[str]:
        return list(dict.fromkeys(line["session"] for line in self.lines))

    @property
    def ended(self) -> int:
        return sum(line.get("end", False) for line in self.lines)

    async def until(self, condition: Callable[[], object]) -> None:
        with trio.move_on_after(DEADLINE):
            await until(condition)
        assert condition(), self.texts()


@asynccontextmanager
async def trace(daemon: Daemon, *options: str) -> AsyncIterator[Running]:
    """A trace, once it sees all sessions that begin."""
    process = await trio.lowlevel.open_process(
        [
            sys.executable, "-m", "mailerq", "trace", "--json",
            f"--queue-directory={daemon.queue}", *options,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    running = Running(process)
    assert process.stdout is not None and process.stderr is not None
    said = b""
    with trio.fail_after(DEADLINE):
        while b"\n" not in said:
            data = await process.stderr.receive_some()
            assert data, said
            said += data
    assert b"tracing" in said

    async def read() -> None:
        unread = b""
        assert process.stdout is not None
        async for data in process.stdout:
            running.output += data.decode()
            *lines, unread = (unread + data).split(b"\n")
            running.lines += map(json.loads, lines)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        try:
            yield running
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            with trio.CancelScope(shield=True), trio.move_on_after(DEADLINE):
                await process.wait()
    assert process.returncode == os.EX_OK


async def send(port: int, name: str, *, body: bytes = BODY, login: bool = True) -> None:
    async with connected(port) as stream:
        if login:
            assert await command(stream, b"AUTH PLAIN " + PLAIN + b"\r\n") == 235
        assert await put(stream, name, body) == 250
        assert await command(stream, b"QUIT\r\n") == 221


async def test_the_dialogue_of_two_processes_in_and_out_without_secrets(tmp_path: Path) -> None:
    count = 24
    with marked(tmp_path) as env:
        async with open_sink() as sink, daemon(tmp_path, sink.port, TWO, LOGIN, env=env) as running:
            async with trace(running) as shown:
                async with trio.open_nursery() as nursery:
                    for number in range(count):
                        nursery.start_soon(send, running.port, f"m-{number}")
                await sink.wait_for(count)
                await shown.until(
                    lambda: (
                        len([name for name in shown.sessions if name.startswith("in-")]) == count
                        and sum("RCPT TO" in text for text in shown.texts()) == 2 * count
                    )
                )
                incoming = [name for name in shown.sessions if name.startswith("in-")]
                await shown.until(lambda: "- (closed)" in shown.texts(incoming[0]))
            assert {name.partition(".")[0] for name in shown.sessions} == {
                "in-0", "in-1", "out-0", "out-1",
            }  # fmt: skip
            texts = shown.texts(incoming[0])
            assert texts[0].startswith("- (from 127.0.0.1:")
            assert texts[1] == "> 220 mx.test ESMTP mailerq"
            assert "< AUTH PLAIN ***" in texts
            assert texts[-9:] == [
                "< DATA",
                "> 354 End data with <CR><LF>.<CR><LF>",
                f"< ({len(BODY)} bytes)",
                "< .",
                *texts[-5:],
            ]
            outgoing = next(name for name in shown.sessions if name.startswith("out-"))
            texts = shown.texts(outgoing)
            assert texts[1].startswith("< 220 sink.test")
            assert "> MAIL FROM:<a@b.test>" in [text.partition(" SIZE")[0] for text in texts]
            for secret in (PASSWORD, PLAIN.decode(), "TOPSECRETBODY"):
                assert secret not in shown.output


async def test_only_mail_that_matches_is_shown_with_what_came_before_it(tmp_path: Path) -> None:
    async with open_sink() as sink, daemon(tmp_path, sink.port) as running:
        async with trace(running, "--in", "--recipient=second@d.test") as shown:
            await send(running.port, "other", login=False)
            async with connected(running.port) as stream:
                for name in ("first", "second", "third"):
                    assert await put(stream, name) == 250
                assert await command(stream, b"QUIT\r\n") == 221
            await shown.until(lambda: shown.ended)
        assert len(shown.sessions) == 1
        texts = shown.texts()
        assert texts[1:3] == ["> 220 mx.test ESMTP mailerq", "< EHLO client.test"]
        assert [text for text in texts if "RCPT TO" in text] == ["< RCPT TO:<second@d.test>"]
        assert sum(text == "< MAIL FROM:<a@b.test>" for text in texts) == 1
        assert sum(text.startswith("> 354") for text in texts) == 1


OPTIONS = {
    "--domain=d.test": True,
    "--domain=other.test": False,
    "--sender=@b.test --recipient=x@d.test": True,
    "--sender=<>": False,
    "--peer=127.0.0.0/8 --ip=127.0.0.1": True,
    "--peer=10.0.0.0/8": False,
    "--ip=127.0.0.9": False,
}


async def test_options_select_sessions(tmp_path: Path) -> None:
    async with open_sink() as sink, daemon(tmp_path, sink.port) as running:
        for options, matches in OPTIONS.items():
            async with (
                trace(running, "--in") as all_of_them,
                trace(running, "--in", *options.split()) as shown,
            ):
                await send(running.port, "x", login=False)
                await all_of_them.until(lambda: all_of_them.ended)
                if matches:
                    await shown.until(lambda: shown.ended)
            assert bool(shown.sessions) is matches, options
        async with trace(running, "--out") as shown:
            await send(running.port, "x", login=False)
            await shown.until(lambda: shown.sessions)
        assert {name.partition("-")[0] for name in shown.sessions} == {"out"}


async def test_sessions_that_are_open_already_are_joined_at_their_next_command(
    tmp_path: Path,
) -> None:
    async with (
        open_sink() as sink,
        daemon(tmp_path, sink.port, LOGIN) as running,
        connected(running.port) as idle,
        connected(running.port) as busy,
    ):
        assert await command(busy, b"AUTH PLAIN\r\n") == 334
        await command(idle, b"MAIL FROM:<a@b.test>\r\n")
        await command(idle, b"RCPT TO:<x@d.test>\r\n")
        async with trace(running, "--in") as shown:
            await shown.until(lambda: len(shown.sessions) == 1)
            assert await command(busy, PLAIN + b"\r\n") == 235
            await shown.until(lambda: len(shown.sessions) == 2)
            assert await command(idle, b"DATA\r\n") == 354
            assert await command(idle, BODY + b".\r\n") == 250
            assert await command(busy, b"NOOP\r\n") == 250
            await shown.until(lambda: "< NOOP" in shown.texts() and "< ." in shown.texts())
    for secret in (PASSWORD, PLAIN.decode(), "TOPSECRETBODY"):
        assert secret not in shown.output


async def test_tls_is_shown_decrypted_and_a_body_on_demand(tmp_path: Path) -> None:
    certificate = Certificate.make(tmp_path)
    switches = [
        f"--{name.replace('_', '-')}={value}" for name, value in certificate.settings.items()
    ]

    def work(port: int) -> None:
        with smtplib.SMTP("127.0.0.1", port, timeout=DEADLINE) as client:
            client.starttls(context=certificate.trust)
            client.login("ann", PASSWORD)
            client.sendmail("a@b.test", ["c@d.test"], b"Subject: x\r\n\r\n\x1b[31mred \xff\r\n")

    async with (
        open_sink() as sink,
        daemon(tmp_path, sink.port, LOGIN, *switches) as running,
        trace(running, "--in", "--body") as shown,
    ):
        await in_thread(work, running.port)
        await shown.until(lambda: shown.ended)
    texts = shown.texts()
    assert texts[texts.index("< STARTTLS") + 2].startswith("- (TLSv1.")
    assert "< mail FROM:<a@b.test>" in [text.partition(" size")[0] for text in texts]
    assert r"< \x1b[31mred \xff" in texts
    assert PASSWORD not in shown.output and PLAIN.decode() not in shown.output


async def test_a_slow_reader_loses_lines_and_is_told_how_many(tmp_path: Path) -> None:
    mails, lines = 60, 150
    body = BODY + lines * (90 * b"x" + b"\r\n")
    async with open_sink() as sink, daemon(tmp_path, sink.port) as running:
        request = {"command": "trace", "in": True, "out": False, "bodies": True}
        with socket.socket(socket.AF_UNIX) as slow:
            await in_thread(slow.connect, str(running.queue / "control"))
            slow.sendall(json.dumps(request).encode() + b"\n")
            file = slow.makefile("rb")
            assert json.loads(await in_thread(file.readline)) == {"tracing": True}
            before = running.memory
            async with connected(running.port) as stream:
                for number in range(mails):
                    assert await put(stream, f"m-{number}", body) == 250
            assert running.memory - before < 16 << 20
            async with trace(running, "--in") as shown:
                await send(running.port, "last", login=False)
                await shown.until(lambda: shown.ended)
            got: Lines = []

            def read() -> None:
                while not (got and got[-1]["text"] == "NOOP"):
                    got.append(json.loads(file.readline()))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(in_thread, read)
                # It gets lines again once it has read those that waited.
                while not (got and got[-1]["text"] == "NOOP"):
                    async with connected(running.port) as stream:
                        assert await command(stream, b"NOOP\r\n") == 250
            lost = sum(line.get("lost", 0) for line in got)
            assert lost > 0
            first = next(index for index, line in enumerate(got) if "lost" in line)
            assert first > MAX_LINES // 2
            file.close()


async def test_it_ends_by_itself_after_sessions_or_seconds(tmp_path: Path) -> None:
    with marked(tmp_path) as env:
        async with open_sink() as sink, daemon(tmp_path, sink.port, TWO, env=env) as running:
            async with trace(running, "--in", "--sessions=3") as shown:
                async with trio.open_nursery() as nursery:
                    for number in range(12):
                        nursery.start_soon(partial(send, login=False), running.port, f"m-{number}")
                with trio.fail_after(DEADLINE):
                    await shown.process.wait()
            assert len(shown.sessions) == shown.ended == 3
            async with trace(running, "--seconds=1") as shown:
                with trio.fail_after(DEADLINE):
                    await shown.process.wait()


async def test_a_connection_that_fails_is_shown(tmp_path: Path) -> None:
    with closed_port() as port:
        async with daemon(tmp_path, port) as running, trace(running, "--domain=d.test") as shown:
            await send(running.port, "x", login=False)
            await shown.until(lambda: any("refused" in text for text in shown.texts()))


async def test_a_reader_that_goes_makes_room_for_another(tmp_path: Path) -> None:
    async with open_sink() as sink, daemon(tmp_path, sink.port) as running:

        def ask() -> tuple[socket.socket, dict[str, Any]]:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(running.queue / "control"))
            sock.sendall(b'{"command": "trace"}\n')
            return sock, json.loads(sock.makefile("rb").readline())

        asked = [await in_thread(ask) for _ in range(MAX_TRACES + 1)]
        assert [reply for _, reply in asked[:-1]] == [{"tracing": True}] * MAX_TRACES
        assert asked[-1][1] == {"error": f"{MAX_TRACES} traces are running: end one of them"}
        result = await in_thread(mailerq, "trace", f"--queue-directory={running.queue}")
        assert result.returncode == os.EX_UNAVAILABLE
        assert b"traces are running" in result.stderr
        for sock, _ in asked:
            sock.close()
        again: list[socket.socket] = []

        async def all_are_free() -> int:
            sock, reply = await in_thread(ask)
            (again.append if "tracing" in reply else socket.socket.close)(sock)
            return len(again)

        await until_found(all_are_free, lambda count: count == MAX_TRACES)
        for sock in again:
            sock.close()
        assert "Traceback" not in running.log


def test_without_a_daemon_it_says_so(tmp_path: Path) -> None:
    result = mailerq("trace", f"--queue-directory={tmp_path}")
    assert result.returncode == os.EX_UNAVAILABLE
    assert b"no daemon answers" in result.stderr


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        ({"peers": ["mx.test"]}, "peer: mx.test is no address and no network"),
        ({"ips": ["x"]}, "ip: x is no address"),
        ({"domains": "d.test"}, "domains: expected a list of strings"),
        ({"sessions": -1}, "sessions: expected a number"),
        ({"seconds": True}, "seconds: expected a number"),
    ],
)
def test_a_wrong_request_is_refused(request_: dict[str, Any], problem: str) -> None:
    with pytest.raises(MailerqError, match=problem):
        Wanted.of(request_)
