"""Plugins under valgrind: nothing is lost, and nothing used after its end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.kit import ROOT, build, build_text, install

PROGRAM = """
import sys
import trio
from mailerq.message import Message
from mailerq.plugins import Plugins

async def main():
    plugins = Plugins.load(sys.argv[1])
    plugins.initialize()
    context = await plugins.open_context()
    for _ in range(20):
        connection = context.connection(0)
        message = Message({"recipient": "c@d.test", "list": [1, {"a": None}, 10**30]}, b"x")
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
        del connection
        plugins.message_id()
    await context.close()
    plugins.cleanup()
    print(sum(row["calls"] for row in plugins.statistics()["trace.so"].values()))

trio.run(main)
"""

LOST = re.compile(r"^==\d+== [\d,]+ .*bytes in .* are (?:definitely|indirectly) lost", re.MULTILINE)


LATE = """
#include <mailerq.h>
#include <stdlib.h>
#include <string.h>

struct session { MQ_Context *context; char text[32]; };

MQ_EXPORT int mq_version() { return MQ_API_VERSION; }

MQ_EXPORT bool mq_smtp_in_connect(MQ_Context *context, MQ_SmtpConnection *connection)
{
    struct session *session = calloc(1, sizeof *session);
    session->context = context;
    strcpy(session->text, "still here");
    MQ_SetSmtpData(connection, session);
    return false;
}

static void due(void *data)
{
    struct session *session = data;
    MQ_Log(MQ_INFO, session->text);
    MQ_Continue(session->context);
}

MQ_EXPORT bool mq_smtp_in_rcptto(MQ_Context *context, MQ_SmtpConnection *connection,
                                 const char *rcptto, size_t size)
{
    struct session *session = MQ_SmtpData(connection);
    session->context = context;
    MQ_TimerStart(context, 0.5f, due, session);
    return rcptto[size] == 0;
}

MQ_EXPORT bool mq_smtp_in_close(MQ_Context *context, MQ_SmtpConnection *connection)
{
    (void)context;
    free(MQ_SmtpData(connection));
    return false;
}
"""

LATE_PROGRAM = """
import logging
import sys
import trio
from mailerq.plugins import GIVEN_UP, Plugins

async def main():
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    plugins = Plugins.load(sys.argv[1], timeout=0.1)
    context = await plugins.open_context()
    connection = context.connection(0)
    await connection.connect()
    assert await connection.rcptto("c@d.test") == GIVEN_UP
    await connection.close()
    del connection
    with trio.fail_after(60):
        while context.live["events"] or context.live["connections"]:
            await trio.sleep(0.01)
    await context.close()

trio.run(main)
"""

pytestmark = [
    pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed"),
    pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="either of the two"),
]


def run(program: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a program under valgrind, which must find no wrong access."""
    options = ["--leak-check=full", "--num-callers=30"]
    done = subprocess.run(
        ["valgrind", *options, sys.executable, "-c", program, directory],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONMALLOC": "malloc", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert re.findall(r"Invalid (?:read|write|free).*", done.stderr) == [], done.stderr
    return done


def test_trace_under_valgrind_loses_nothing(tmp_path: Path) -> None:
    install(tmp_path, trace=build(ROOT / "plugins" / "trace.c"))
    done = run(PROGRAM, tmp_path)
    assert done.stdout.strip() == str(20 * 10 + 2), done.stderr
    losses = [
        block
        for block in re.split(r"==\d+== \n", done.stderr)
        if LOST.search(block) and ("_core" in block or "trace.so" in block)
    ]
    assert losses == []


def test_what_a_plugin_frees_at_the_end_is_not_used_after_it(tmp_path: Path) -> None:
    install(tmp_path, late=build_text(LATE))
    done = run(LATE_PROGRAM, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[late.so] still here\n" in done.stdout
