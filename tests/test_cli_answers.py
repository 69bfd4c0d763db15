"""Patterns for replies as an operator sees them: status, reload, mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.crash.kit import Daemon, daemon, switches_in
from tests.processes_kit import connected, marked, put
from tests.support import in_thread, mailerq, open_sink

PATTERN = """
[[response]]
name = "fast"
text = "too fast"
class = "reputation-temp"
pause = "1h"
samples = ["450 too fast"]
"""


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[dict[str, str]]:
    with marked(tmp_path) as environment:
        yield environment


async def replies(running: Daemon, name: str) -> dict[str, Any]:
    """A part of the statistics, once it is there."""
    with trio.fail_after(30):
        while not (found := (await running.statistics())["replies"].get(name)):  # noqa: ASYNC110
            await trio.sleep(0.02)
    assert isinstance(found, dict)
    return found


async def test_status_names_what_patterns_do_and_a_reload_changes_them(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    path = tmp_path / "responses.toml"
    path.write_text("")
    switches = switches_in(tmp_path, 25)
    async with (
        open_sink() as sink,
        daemon(tmp_path, sink.port, f"--responses-file={path}", env=mark) as running,
        connected(running.port) as stream,
    ):
        sink.decide = lambda event: (
            Reply(450, "4.7.0 too fast from 192.0.2.1")
            if isinstance(event, server.Rcpt) and "refused" in event.recipient
            else None
        )
        assert await put(stream, "refused-0") == 250
        assert await replies(running, "unclassified") == {"450 4.7.0 too fast from IP": 1}
        path.write_text(PATTERN.replace("class", "clas"))
        wrong = await in_thread(lambda: mailerq("reload", *switches))
        assert f"{path}:5: unknown key 'clas'" in wrong.stderr.decode()
        path.write_text(PATTERN)
        done = await in_thread(lambda: mailerq("reload", *switches))
        assert done.returncode == 0, done.stderr
        assert await put(stream, "refused-1") == 250
        (name,) = await replies(running, "actions")
        assert name == f"d.test (fast, {path}:2)"
        assert await replies(running, "classes") == {"reputation-temp": 1}
        shown = await in_thread(lambda: mailerq("status", *switches))
        assert f"replies.actions.{name}" in shown.stdout.decode()
        # What a pattern has begun goes on without the pattern.
        path.write_text("")
        done = await in_thread(lambda: mailerq("reload", *switches))
        assert done.returncode == 0, done.stderr
        assert "paused" in str((await running.statistics())["replies"]["actions"])


def test_a_daemon_with_a_wrong_file_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "responses.toml"
    path.write_text(PATTERN.replace("450 too fast", "450 too slow"))
    done = mailerq(f"--responses-file={path}", *switches_in(tmp_path, 25))
    assert done.returncode == 2
    assert f"{path}:2: samples: 'fast' does not match '450 too slow'" in done.stderr.decode()
