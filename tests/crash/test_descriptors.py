"""A daemon whose descriptors are gone for moments, as when plugins or a storm have taken them.

What needs one then fails, and the client or the sender tries again. The daemon goes on, and no mail
that got a 250 is lost.
"""

from __future__ import annotations

import resource
import signal
import smtplib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from mailerq.cli import control
from tests.crash.kit import Daemon, Ledger, Load, all_arrive, arrivals, daemon
from tests.engine.kit import FEW_DESCRIPTORS
from tests.processes_kit import TWO, all_run, until_rows
from tests.support import compile_plugin, in_thread, open_sink, until

SESSIONS = 10

BIG = b"Subject: x\r\n\r\n" + 300 * (70 * b"x" + b"\r\n")

FLICKERS = 100

TIMER = r"""
#include <mailerq.h>

MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }

static void wake(void *context) { MQ_Continue(context); }

MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size)
{
    (void)rcptto; (void)size;
    if (MQ_TimerStart(context, 0.01f, wake, context)) return true;
    MQ_Reject(connection, 451, "4.3.0 No timer");
    return false;
}
"""


@contextmanager
def no_descriptors(*pids: int) -> Iterator[None]:
    """These processes can open nothing."""
    before = [resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids]
    for pid, (_, hard) in zip(pids, before, strict=True):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (FEW_DESCRIPTORS, hard))
    try:
        yield
    finally:
        for pid, limits in zip(pids, before, strict=True):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


async def test_a_plugin_gets_no_timer_and_then_one(tmp_path: Path) -> None:
    plugins = tmp_path / "plugins"
    compile_plugin(plugins, "timer.c", TIMER)

    def dialogue(running: Daemon) -> list[int]:
        with smtplib.SMTP("127.0.0.1", running.port, timeout=60) as client:
            client.ehlo("client.test")
            client.mail("a@b.test")
            with no_descriptors(running.process.pid):
                codes = [client.rcpt("c@d.test")[0]]
            return [*codes, client.rcpt("c@d.test")[0], client.rcpt("d@d.test")[0]]

    async with (
        open_sink() as sink,
        daemon(tmp_path, sink.port, f"--plugin-directory={plugins}") as running,
    ):
        assert await in_thread(partial(dialogue, running)) == [451, 250, 250]
        assert await running.stop() == 0


async def test_a_process_without_descriptors_takes_new_settings_later(tmp_path: Path) -> None:
    async with open_sink() as sink, daemon(tmp_path, sink.port, TWO) as running:
        before = {row["process"]: row["pid"] for row in await until_rows(running, all_run)}
        # The settings are tried in the first process.
        with no_descriptors(before[1]):
            running.process.send_signal(signal.SIGHUP)
            await until(lambda: "no descriptor is left" in running.log)
        after = await until_rows(running, lambda rows: all(row["settings"] == 2 for row in rows))
        assert {row["process"]: row["pid"] for row in after} == before
        assert await running.stop() == 0


@pytest.mark.parametrize("processes", [1, 2])
async def test_descriptors_that_come_and_go(tmp_path: Path, processes: int) -> None:
    ledger = Ledger()
    load = Load(ledger, "id", BIG)
    more = (f"--smtp-processes={processes}", "--smtp-spill-size=10000")
    async with open_sink() as sink, daemon(tmp_path, sink.port, *more) as running:
        pids = [running.process.pid, *running.children]
        async with trio.open_nursery() as nursery:
            for _ in range(SESSIONS):
                nursery.start_soon(partial(load.session, running.port, again=True))
            await until(lambda: len(ledger.accepted) >= 5 * SESSIONS)
            for _ in range(FLICKERS):
                with no_descriptors(*pids):
                    running.process.send_signal(signal.SIGHUP)
                    await trio.sleep(0.02)
                await trio.sleep(0.02)
            with no_descriptors(*pids):
                await until(lambda: "the shares of the queue cannot be listed" in running.log)
            before = len(ledger.accepted)
            await until(lambda: len(ledger.accepted) >= before + 5 * SESSIONS)
            assert control.ask(str(running.queue), "status")["pid"] == running.process.pid
            load.ending = True
        assert running.children == pids[1:]
        await all_arrive(sink, ledger.accepted)
        await running.until_empty()
        assert await running.stop() == 0
        ledger.check(arrivals(sink))
        assert "Traceback" not in running.log
        assert {entry.code // 100 for entry in ledger.entries.values()} <= {0, 2, 4}
