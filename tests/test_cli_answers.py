"""Patterns for replies as an operator sees them: status, reload, mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.crash.kit import Daemon, all_arrive, daemon, switches_in
from tests.processes_kit import TWO, connected, marked, put, send_all
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


def refuse_all(event: server.Event) -> Reply | None:
    return Reply(450, "4.7.0 too fast") if isinstance(event, server.Rcpt) else None


async def rows_of(switches: list[str], *command: str) -> list[dict[str, Any]]:
    """The rows that patterns have made."""
    done = await in_thread(lambda: mailerq("rows", *command, "--json", *switches))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.decode().splitlines()]


async def test_a_pause_is_a_row_that_holds_over_a_restart_and_can_be_removed(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    path = tmp_path / "responses.toml"
    path.write_text(PATTERN)
    switch = f"--responses-file={path}"
    switches = [*switches_in(tmp_path, 25), switch]
    async with open_sink() as sink:
        sink.decide = refuse_all
        async with daemon(tmp_path, sink.port, switch, env=mark) as running:
            async with connected(running.port) as stream:
                assert await put(stream, "refused") == 250
            await replies(running, "actions")
            with trio.fail_after(30):
                while not (rows := await rows_of(switches, "list")):  # noqa: ASYNC110
                    await trio.sleep(0.05)
            assert await running.stop() == 0
        (row,) = rows
        assert (row["kind"], row["domain"], row["origin"]) == ("reaction", "d.test", "fast")
        assert row["sample"] == "450 4.7.0 too fast"
        sink.decide = lambda event: None
        async with daemon(tmp_path, sink.port, switch, env=mark) as running:
            (text,) = (await replies(running, "actions")).values()
            assert text.startswith(("paused for 35", "paused for 3600"))
            async with connected(running.port) as stream:
                assert await put(stream, "waits") == 250
            with trio.fail_after(30):
                while not (await running.statistics())["outgoing"]["limited"]:  # noqa: ASYNC110
                    await trio.sleep(0.02)
            done = await in_thread(lambda: mailerq("rows", "remove", str(row["id"]), *switches))
            assert done.returncode == 0, done.stderr
            await all_arrive(sink, {"waits"})
            assert (await running.statistics())["replies"]["acted_on"] == 0


async def test_a_pause_holds_in_all_processes(tmp_path: Path, mark: dict[str, str]) -> None:
    path = tmp_path / "responses.toml"
    path.write_text(PATTERN)
    switch = f"--responses-file={path}"
    switches = [*switches_in(tmp_path, 25), switch]
    async with (
        open_sink() as sink,
        daemon(tmp_path, sink.port, TWO, switch, env=mark) as running,
    ):
        sink.decide = refuse_all
        async with connected(running.port) as stream:
            assert await put(stream, "refused") == 250
        with trio.fail_after(30):
            while not (rows := await rows_of(switches, "list")):  # noqa: ASYNC110
                await trio.sleep(0.05)
        extend = ["rows", "extend", str(rows[0]["id"]), "--for", "2h"]
        done = await in_thread(lambda: mailerq(*extend, *switches))
        assert done.returncode == 0, "and all processes know of the row"
        assert (await running.statistics())["replies"]["acted_on"] == 1, "it is one site"
        sink.decide = lambda event: None
        await send_all(running.port, "waits")
        await running.until_statistics(lambda figures: figures["outgoing"]["limited"] >= 2)
        assert sink.mails == []


async def test_a_pattern_suppresses_a_recipient_after_enough_failures(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    path = tmp_path / "responses.toml"
    path.write_text(
        "[[response]]\nname = 'gone'\ntext = 'no such user'\nclass = 'user-unknown'\n"
        "suppress = true\ntrigger = '2/30d'\nsamples = ['550 5.1.1 no such user']\n"
    )
    switch = f"--responses-file={path}"
    switches = switches_in(tmp_path, 25)
    async with (
        open_sink() as sink,
        daemon(tmp_path, sink.port, switch, env=mark) as running,
        connected(running.port) as stream,
    ):
        asked = []

        def decide(event: server.Event) -> Reply | None:
            if isinstance(event, server.Rcpt):
                asked.append(event.recipient)
                return Reply(550, "5.1.1 no such user") if "ann" in event.recipient else None
            return None

        sink.decide = decide
        for count in (1, 2):
            assert await put(stream, "ann") == 250
            assert await put(stream, f"bob-{count}") == 250
            await all_arrive(sink, {f"bob-{count}"})
            with trio.fail_after(30):
                while (await running.statistics())["outgoing"]["failed"] < count:  # noqa: ASYNC110
                    await trio.sleep(0.02)
        with trio.fail_after(30):
            while not (await running.statistics())["rows"]["suppressed"]:  # noqa: ASYNC110
                await trio.sleep(0.02)
        (row,) = await rows_of(switches, "list")
        assert (row["origin"], row["code"], row["status"]) == ("gone", 550, "5.1.1")
        assert await put(stream, "ann") == 250
        assert await put(stream, "bob-3") == 250
        with trio.fail_after(30):
            while (await running.statistics())["outgoing"]["failed"] < 3:  # noqa: ASYNC110
                await trio.sleep(0.02)
        assert asked.count("ann@d.test") == 2
