"""trace.c, which has every callback, under valgrind: neither it nor we lose memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.kit import ROOT, build, install

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


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="either of the two")
def test_trace_under_valgrind_loses_nothing(tmp_path: Path) -> None:
    install(tmp_path, trace=build(ROOT / "plugins" / "trace.c"))
    done = subprocess.run(
        [
            "valgrind",
            "--leak-check=full",
            "--num-callers=30",
            sys.executable,
            "-c",
            PROGRAM,
            tmp_path,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONMALLOC": "malloc", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.stdout.strip() == str(20 * 10 + 2), done.stderr
    losses = [
        block
        for block in re.split(r"==\d+== \n", done.stderr)
        if LOST.search(block) and ("_core" in block or "trace.so" in block)
    ]
    assert losses == []
    errors = re.findall(r"Invalid (?:read|write).*", done.stderr)
    assert errors == []
