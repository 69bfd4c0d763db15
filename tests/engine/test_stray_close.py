"""A plugin that closes foreign descriptors: a session may end, the engine does not."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from mailerq import Engine
from mailerq.cli import control
from mailerq.net import readiness, stream
from tests.engine.kit import Certificate, Dialog, inbox, no_descriptors, open_dialog, serve
from tests.support import compile_plugin, in_thread, until

PLUGIN = r"""
#define _POSIX_C_SOURCE 200809L
#include <mailerq.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }

static void work(MQ_SmtpConnection *connection, const char *what)
{
    if (!strncmp(what, "own@", 4)) close(MQ_SmtpFileDescriptor(connection));
    if (!strncmp(what, "fd", 2)) close(atoi(what + 2));
    /* And somebody else gets the number. */
    if (!strncmp(what, "file", 4)) {
        int fd = atoi(what + 4);
        int other = open("/dev/null", O_RDONLY | O_CLOEXEC);
        dup2(other, fd);
        close(other);
    }
}

MQ_EXPORT bool mq_smtp_in_mailfrom(MQ_Context *context, MQ_SmtpConnection *connection,
                                   const char *mailfrom, size_t size)
{
    (void)context; (void)size;
    work(connection, mailfrom);
    return false;
}

MQ_EXPORT bool mq_smtp_in_data(MQ_Context *context, MQ_SmtpConnection *connection,
                               const char *mime, size_t size)
{
    (void)context; (void)size;
    const char *word = strstr(mime, "close: ");
    if (word) work(connection, word + 7);
    return false;
}

static void wake(void *context) { MQ_Continue(context); }

MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size)
{
    (void)connection; (void)size;
    if (strncmp(rcptto, "timer@", 6)) return false;
    MQ_TimerStart(context, 0.01f, wake, context);
    return true;
}
"""


@pytest.fixture(scope="session")
def closer(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("closer") / "plugins"
    compile_plugin(directory, "closer.c", PLUGIN)
    return str(directory)


@asynccontextmanager
async def closing(directory: Path, closer: str, **settings: Any) -> AsyncIterator[Engine]:
    async with serve(directory, plugin_directory=closer, **settings) as engine:
        yield engine


async def check(engine: Engine, caplog: pytest.LogCaptureFixture, what: str) -> None:
    """The engine works, as far as its plugins and its queue, and the log says what happened."""
    for _ in range(3):
        async with open_dialog(engine.addresses[0]) as dialog:
            assert (await dialog.mail("timer@d.test")).startswith("250")
    assert len(await inbox(engine, 3)) == 3
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    (error,) = dict.fromkeys(errors)
    assert what in error
    assert "closes descriptors that are not its own (closer.so" in error


def descriptor_of(client: Dialog, engine: Engine) -> int:
    """The engine's descriptor of a client's connection."""
    assert isinstance(client.stream, trio.SocketStream)
    ours = client.stream.socket.getsockname()
    (fd,) = [fd for fd, open_ in stream._streams.items() if open_._remote == ours]
    return fd


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("moment", ["mailfrom", "data"])
async def test_the_clients_own(
    tmp_path: Path, closer: str, caplog: pytest.LogCaptureFixture, tls: bool, moment: str
) -> None:
    certificate = Certificate.make(tmp_path)
    async with (
        closing(tmp_path, closer, **certificate.settings) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        if tls:
            await dialog.say("STARTTLS")
            await dialog.start_tls(certificate.trust)
            await dialog.say("EHLO c.test")
        if moment == "mailfrom":
            assert await dialog.say("MAIL FROM:<own@b.test>") == ""
        else:
            assert await dialog.mail("c@d.test", body=b"close: own@\r\n\r\n") == ""
            await inbox(engine)
        await until(lambda: engine.statistics()["incoming"]["open"] == 0)
        await check(engine, caplog, "the connection with 127.0.0.1:")


@pytest.mark.parametrize("how", ["fd", "file"])
async def test_another_clients(
    tmp_path: Path, closer: str, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    hole = os.open("/dev/null", os.O_RDONLY)
    async with (
        closing(tmp_path, closer) as engine,
        open_dialog(engine.addresses[0]) as victim,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        fd = descriptor_of(victim, engine)
        assert (await dialog.say(f"MAIL FROM:<{how}{fd}@b.test>")).startswith("250")
        assert await victim.reply() == ""
        if how == "fd":
            # The next connection gets the number, and nothing of what the other one had.
            fillers = fill_below(fd)
            os.close(hole)  # for the client's end
            async with open_dialog(engine.addresses[0]) as heir:
                assert descriptor_of(heir, engine) == fd
                await until(lambda: engine.statistics()["incoming"]["open"] == 2)
                assert (await heir.mail("c@d.test")).startswith("250")
                await inbox(engine)
            for filler in fillers:
                os.close(filler)
            await check(engine, caplog, "the connection with 127.0.0.1:")
        assert (await dialog.say("NOOP")).startswith("250")
    if how == "file":
        # Nobody noticed before the end, and what has the number now is still open.
        assert os.readlink(f"/proc/self/fd/{fd}") == "/dev/null"
        assert "the connection with 127.0.0.1:" in caplog.text
        os.close(fd)
        os.close(hole)


def fill_below(fd: int) -> list[int]:
    """Open a descriptor for each free number below `fd`."""
    fillers = [os.open("/dev/null", os.O_RDONLY)]
    while fillers[-1] < fd:
        fillers.append(os.open("/dev/null", os.O_RDONLY))
    os.close(fillers.pop())
    return fillers


def one_of(engine: Engine, which: str) -> tuple[int, str]:
    """A descriptor of the engine, and its name in the log."""
    if which == "port":
        port = f"the port 127.0.0.1:{engine.addresses[0][1]}"
        return engine._listener._ports[0].sock.fileno(), port
    if which == "wakeup":
        return engine._workers[0].context.fileno(), "the descriptor that wakes worker 0"
    if which == "control":
        fd = max(fd for fd, name in unix_sockets() if name.endswith("/control"))
        return fd, "the control socket"
    poller = readiness._pollers.get()
    assert poller is not None
    return poller._fd, "a descriptor that watches connections"


@pytest.mark.parametrize("how", ["fd", "file"])
@pytest.mark.parametrize("which", ["port", "wakeup", "poller"])
async def test_one_of_the_engines(
    tmp_path: Path, closer: str, caplog: pytest.LogCaptureFixture, which: str, how: str
) -> None:
    async with closing(tmp_path, closer) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            fd, what = one_of(engine, which)
            assert (await dialog.say(f"MAIL FROM:<{how}{fd}@b.test>")).startswith("250")
            assert (await dialog.say("RSET")).startswith("250")
            await check(engine, caplog, what)
            assert (await dialog.say("NOOP")).startswith("250")
        assert engine.statistics()["listening"]
    if how == "file":
        assert os.readlink(f"/proc/self/fd/{fd}") == "/dev/null"
        os.close(fd)


@pytest.mark.parametrize("which", ["port", "wakeup", "poller", "control"])
async def test_one_of_the_engines_that_cannot_be_opened_again_yet(
    tmp_path: Path, closer: str, caplog: pytest.LogCaptureFixture, which: str
) -> None:
    """The plugin has also taken all other descriptors."""
    async with (
        closing(tmp_path, closer) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        assert (await dialog.mail("timer@d.test")).startswith("250")
        fd, what = one_of(engine, which)
        with socket.socket() as client, socket.socket(socket.AF_UNIX) as asker:
            with no_descriptors():
                await dialog.send(f"MAIL FROM:<fd{fd}@b.test>\r\n".encode())
                if which != "poller":
                    assert (await dialog.reply()).startswith("250")
                client.connect(engine.addresses[0])
                asker.connect(str(tmp_path / "queue" / "control"))
                if which == "wakeup":
                    assert (await dialog.say("RCPT TO:<timer@d.test>")).startswith("250")
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert what not in caplog.text
            if which == "poller":
                assert (await dialog.reply()).startswith("250")
            assert (await dialog.say("RSET")).startswith("250")
            async with trio.SocketStream(trio.socket.from_stdlib_socket(client)) as stream:
                assert (await Dialog(stream).reply()).startswith("220")
        assert (await in_thread(control.ask, engine.config.queue_directory, "status"))["pid"]
        assert (await dialog.mail("timer@d.test")).startswith("250")
        assert what in caplog.text


async def test_the_file_of_a_large_mail(
    tmp_path: Path, closer: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with closing(tmp_path, closer, smtp_spill_size=1000) as engine:
        async with (
            open_dialog(engine.addresses[0]) as victim,
            open_dialog(engine.addresses[0]) as dialog,
        ):
            await victim.say("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>", "DATA")
            await victim.send(1_000_000 * b"x\r\n")
            await until(lambda: bool(spooled(tmp_path)))
            (fd,) = spooled(tmp_path)
            assert (await dialog.say(f"MAIL FROM:<fd{fd}@b.test>")).startswith("250")
            await victim.send(1_000_000 * b"x\r\n" + b".\r\n")
            assert (await victim.reply()).startswith("451")
        caplog.clear()
        async with open_dialog(engine.addresses[0]) as dialog:
            assert (await dialog.mail("timer@d.test")).startswith("250")


def spooled(directory: Path) -> list[int]:
    """The descriptors of files without a name in the queue directory."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            name = os.readlink(entry)
            if name.startswith(str(directory / "queue")) and name.endswith(" (deleted)"):
                found.append(int(entry.name))
    return found


async def test_the_control_socket(
    tmp_path: Path, closer: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        closing(tmp_path, closer) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        fd, what = one_of(engine, "control")
        assert (await dialog.say(f"MAIL FROM:<fd{fd}@b.test>")).startswith("250")
        for _ in range(2):
            reply = await in_thread(control.ask, engine.config.queue_directory, "status")
            assert reply["pid"] == os.getpid()
        assert (await dialog.say("RSET")).startswith("250")
        await check(engine, caplog, what)


async def test_a_log(tmp_path: Path, closer: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "received"
    async with closing(tmp_path, closer, received_log_file=str(path)) as engine:
        log = engine._server.received_log
        assert log is not None
        async with open_dialog(engine.addresses[0]) as dialog:
            fd = log._file
            assert (await dialog.say(f"MAIL FROM:<file{fd}@b.test>")).startswith("250")
        log._checked = 0.0
        await check(engine, caplog, f"the log {path}")
    # What has the number now is nobody's to replace or to close.
    assert os.readlink(f"/proc/self/fd/{fd}") == "/dev/null"
    os.close(fd)
    assert path.read_text().count("timer@d.test") == 3


async def test_a_lock_of_the_queue(
    tmp_path: Path, closer: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with closing(tmp_path, closer) as engine, open_dialog(engine.addresses[0]) as dialog:
        ours = [name for name in os.listdir("/proc/self/fd") if is_lock(tmp_path, name)]
        for fd in ours:
            assert (await dialog.say(f"MAIL FROM:<fd{fd}@b.test>")).startswith("250")
            await dialog.say("RSET")
    assert len(ours) == 1
    assert "a lock cannot be closed (Bad file descriptor)" in caplog.text


def is_lock(directory: Path, fd: str) -> bool:
    with suppress(FileNotFoundError):
        return os.readlink(f"/proc/self/fd/{fd}") == str(directory / "queue" / "queue.lock")
    return False


def unix_sockets() -> list[tuple[int, str]]:
    """The descriptors and names of this process's Unix sockets."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as sock:
            if sock.family == socket.AF_UNIX and isinstance(sock.getsockname(), str):
                found.append((int(name), sock.getsockname()))
    return found
