"""Plugins under valgrind: nothing is lost, and nothing used after its end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.plugins.kit import ROOT, build, build_text, install

PROGRAM = """
import logging
import sys
import trio
from mailerq.message import Message
from mailerq.plugins import GIVEN_UP, Plugins

async def everything(directory):
    plugins = Plugins.load(directory)
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
    print("calls:", sum(row["calls"] for row in plugins.statistics()["trace.so"].values()))

async def late(directory):
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    plugins = Plugins.load(directory, timeout=0.1)
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
    plugins.cleanup()

trio.run(everything, sys.argv[1])
trio.run(late, sys.argv[2])
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

pytestmark = [
    pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed"),
    pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="either of the two"),
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """What valgrind says of one process, which takes it half a minute to start."""
    plugins = {"trace": build(ROOT / "plugins" / "trace.c"), "late": build_text(LATE)}
    directories = [
        install(tmp_path_factory.mktemp(name), **{name: file}) for name, file in plugins.items()
    ]
    options = ["--leak-check=full", "--num-callers=30"]
    return subprocess.run(
        ["valgrind", *options, sys.executable, "-c", PROGRAM, *directories],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONMALLOC": "malloc", "PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_nothing_is_used_that_is_not_there(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert re.findall(r"Invalid (?:read|write|free).*", done.stderr) == [], done.stderr
    assert f"calls: {20 * 10 + 2}\n" in done.stdout
    assert "[late.so] still here\n" in done.stdout


def test_nothing_is_lost(done: subprocess.CompletedProcess[str]) -> None:
    losses = [
        block
        for block in re.split(r"==\d+== \n", done.stderr)
        if LOST.search(block)
        and re.search(r"_core|trace\.so|late\.so", block)
        # The table of hooks stays: a thread of a plugin may look into it at any time.
        and "Library___cinit__" not in block
    ]
    assert "definitely lost" in done.stderr
    assert losses == []
