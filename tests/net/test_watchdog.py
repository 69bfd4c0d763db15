"""A worker whose loop stands still is noticed, with what it is in; one that turns is not."""

from __future__ import annotations

import ctypes
import re
import threading
import time
from pathlib import Path

import pytest
import trio

from tests.engine.kit import open_dialog, serve
from tests.support import DEADLINE, compile_plugin, until

BLOCK = r"""
#define _POSIX_C_SOURCE 200809L
#include <mailerq.h>
#include <string.h>
#include <time.h>

MQ_EXPORT int mq_version() { return MQ_API_VERSION; }

MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size)
{
    struct timespec pause = {0, 700 * 1000 * 1000};
    (void)context; (void)connection;
    if (size > 5 && memcmp(rcptto, "block", 5) == 0) nanosleep(&pause, 0);
    return false;
}
"""


def texts(caplog: pytest.LogCaptureFixture, about: str = "") -> list[str]:
    """What the watchdog says about something; on a busy machine there may be more."""
    said = [one.getMessage() for one in caplog.records if one.name == "mailerq.watchdog"]
    return [text for text in said if about in text]


@pytest.mark.parametrize("threads", [1, 3])
async def test_a_plugin_that_blocks_is_named_while_it_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, threads: int
) -> None:
    compile_plugin(tmp_path / "plugins", "block.c", BLOCK)
    settings = {
        "plugin_directory": str(tmp_path / "plugins"),
        "smtp_threads": threads,
        "watchdog_seconds": 0.2,
    }
    async with serve(tmp_path, **settings) as engine, open_dialog(engine.addresses[0]) as dialog:
        assert await dialog.codes("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>") == [250, 250]
        assert texts(caplog, "block.so") == []
        assert await dialog.codes("RCPT TO:<block@d.test>") == [250]
        await until(lambda: any("goes on" in text for text in texts(caplog, "block.so")))
        figures = engine.statistics()["watchdog"]
    assert figures["stalls"] >= 1
    assert figures["places"]["block.so mq_smtp_in_rcptto"] == 1
    assert figures["standing"] == 0
    assert figures["longest"] > 0.4
    first, *_, last = texts(caplog, "block.so")
    where = "in mq_smtp_in_rcptto of plugin block.so"
    assert re.fullmatch(rf"worker \d has stood still for \d+\.\d s, {where}", first)
    assert re.fullmatch(
        r"worker \d goes on; it stood still for \d+\.\d s, in block.so mq_smtp_in_rcptto", last
    )


async def test_others_read_of_a_worker_that_stands_still(tmp_path: Path) -> None:
    """The statistics come from the home worker, and a second one stands still."""
    compile_plugin(tmp_path / "plugins", "block.c", BLOCK)
    settings = {
        "plugin_directory": str(tmp_path / "plugins"),
        "smtp_threads": 2,
        "watchdog_seconds": 0.1,
    }
    async with (
        serve(tmp_path, **settings) as engine,
        open_dialog(engine.addresses[0]) as first,
        open_dialog(engine.addresses[0]) as second,
    ):
        # The first one is on the home worker, which has the fewest sessions then.
        assert await second.codes("MAIL FROM:<a@b.test>") == [250]
        await second.send(b"RCPT TO:<block@d.test>\r\n")
        await until(lambda: engine.statistics()["watchdog"]["standing"] == 1)
        assert await first.codes("NOOP") == [250]
        assert (await second.reply()).startswith("250")
        await until(lambda: engine.statistics()["watchdog"]["standing"] == 0)


async def test_a_handler_that_blocks_is_named_with_its_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def think(*arguments: object) -> None:
        end = time.monotonic() + DEADLINE
        while len(texts(caplog, "think")) < 2 and time.monotonic() < end:
            time.sleep(0.01)

    async with serve(tmp_path, watchdog_seconds=0.1) as engine:
        engine.on("rcptto", think)
        async with open_dialog(engine.addresses[0]) as dialog:
            await dialog.codes("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>")
        await until(lambda: any("goes on" in text for text in texts(caplog, "think")))
    first, second, *_ = texts(caplog, "think")
    assert re.search(r"in \S+think \(test_watchdog\.py:\d+\), called by ", first)
    assert "has stood still" in second  # it says so again when it has been twice as long


async def test_what_holds_pythons_lock_is_noticed_afterwards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def hold_the_lock(*arguments: object) -> None:
        ctypes.PyDLL(None).usleep(400_000)

    async with serve(tmp_path, watchdog_seconds=0.1) as engine:
        engine.on("rcptto", hold_the_lock)
        async with open_dialog(engine.addresses[0]) as dialog:
            await dialog.codes("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>")
        await until(lambda: "process" in engine.statistics()["watchdog"]["places"])
    assert re.match(r"the process has stood still for \d+\.\d s", texts(caplog, "process")[0])


async def test_zero_is_no_watchdog(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serve(tmp_path, watchdog_seconds=0) as engine:
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]
        time.sleep(0.1)  # noqa: ASYNC251 - the loop stands still
        await trio.lowlevel.checkpoint()
        assert engine.statistics()["watchdog"]["stalls"] == 0
    async with serve(tmp_path, watchdog_seconds=60.0):
        assert "watchdog" in [thread.name for thread in threading.enumerate()]
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
    assert texts(caplog) == []
