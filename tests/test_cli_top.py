"""``mailerq top``: what flows do now, as programs and people at a terminal see it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from mailerq.cli.screen import keys_in
from mailerq.cli.top import ORDERS, View
from mailerq.message import Message
from mailerq.net.seen import merged_pages
from mailerq.queues import Publication
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.shares import share_directory
from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.crash.kit import BODY, Daemon, all_arrive, daemon
from tests.processes_kit import TWO, connected, marked, put, send_all
from tests.support import DEADLINE, ROOT, in_thread, mailerq, open_sink

SLOW = "[[limit]]\ndomain = 'd.test'\nmessages-per-minute = 1\n"


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[dict[str, str]]:
    with marked(tmp_path) as environment:
        yield environment


async def top(running: Daemon, *more: str) -> Any:
    done = await in_thread(lambda: mailerq("top", f"--queue-directory={running.queue}", *more))
    assert done.returncode == 0, done.stderr
    return done.stdout


async def page(running: Daemon, *more: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await top(running, "--once", "--json", *more))
    return found


async def until_page(running: Daemon, wanted: Any, *more: str) -> dict[str, Any]:
    end = trio.current_time() + DEADLINE
    while not wanted(found := await page(running, *more)):
        assert trio.current_time() < end, found
    return found


def limits_in(directory: Path, text: str = SLOW) -> str:
    (directory / "limits.toml").write_text(text)
    return f"--limits-file={directory / 'limits.toml'}"


# For programs


async def test_a_row_has_what_waits_and_what_limits_it(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    switch = limits_in(tmp_path)
    async with open_sink() as sink, daemon(tmp_path, sink.port, switch, env=mark) as running:
        async with connected(running.port) as stream:
            for number in range(4):
                assert await put(stream, f"m-{number}") == 250
        await all_arrive(sink, {"m-0"})
        found = await until_page(
            running,
            lambda found: (
                found["rows"]
                and found["rows"][0]["waiting"] == 3
                and found["rows"][0]["limited-by"].startswith("messages")
            ),
        )
        (row,) = found["rows"]
        text = f"messages-per-minute = 1 of d.test ({tmp_path}/limits.toml:3)"
        assert (row["site"], row["limited-by"]) == ("d.test", text)
        assert 0 < row["seconds"] <= 60
        assert row["reply"].startswith("127.0.0.1: 250 ")
        assert (found["flows"], found["delivered"], found["waiting"]) == (1, 1, 3)
        # Names that do not match are neither sent nor shown.
        assert (await page(running, "--filter=D.TEST"))["rows"]
        other = await page(running, "--filter=other")
        assert (other["rows"], other["matching"]) == ([], 0)
        shown = (await top(running, "--once")).decode()
        assert text in shown


async def test_the_rates_of_two_looks_add_up_to_what_was_delivered(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    limit = limits_in(tmp_path, "[[limit]]\nmessages-per-minute = 600\n")
    message = Message({"envelope": "a@b.test", "recipient": "c@d.test"}, BODY)
    for share in range(2):  # mail for a minute
        with QueueFile.open(share_directory(str(tmp_path / "queue"), share)) as store:
            store.publish([Publication("outbox", message)] * 300)
    async with open_sink() as sink, daemon(tmp_path, sink.port, limit, TWO, env=mark) as running:
        await sink.wait_for(5)
        found = await page(running, "--sort=rate")
        (row,) = found["rows"]
        # Both looks see a part of the 600 a minute; a busy machine is slower.
        assert 0 < row["rate"] <= 1200
        assert row["connections"] == found["connections"] >= 1


async def test_mail_that_is_not_due_and_hosts_that_are_down_are_rows_too(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    def later(event: server.Event) -> Reply | None:
        return Reply(451, "4.7.0 slow down") if isinstance(event, server.Mail) else None

    async with open_sink() as sink:
        sink.decide = later
        settings = ("--retry-interval=600", "--connection-maxidle=0", TWO)
        async with daemon(tmp_path, sink.port, *settings, env=mark) as running:
            names = await send_all(running.port, "m")
            found = await until_page(
                running,
                lambda found: (
                    found["connections"] == 0
                    and found["waiting"] == len(names)
                    and found["flows"] == 0
                ),
            )
            (row,) = found["rows"]
            assert (row["site"], row["waiting"]) == ("d.test", len(names))
            assert row["limited-by"] == "a time to come: it is not due yet"
            assert row["until"] is not None


async def test_several_processes_are_one_row(tmp_path: Path, mark: dict[str, str]) -> None:
    settings = (TWO, "--connection-maxidle=60000")
    async with open_sink() as sink, daemon(tmp_path, sink.port, *settings, env=mark) as running:
        await all_arrive(sink, await send_all(running.port, "m"))
        found = await until_page(
            running,
            lambda found: (
                found["rows"]
                and found["rows"][0]["messages"] == len(sink.mails)
                and found["flows"] == 2
            ),
        )
        (row,) = found["rows"]
        assert row["idle"] == row["connections"] == sink.open >= 2


def test_without_a_daemon_there_is_nothing_to_show(tmp_path: Path) -> None:
    (tmp_path / "queue").mkdir()
    done = mailerq("top", "--once", f"--queue-directory={tmp_path / 'queue'}")
    assert done.returncode == os.EX_UNAVAILABLE
    assert b"no daemon answers" in done.stderr


# For people


class Terminal:
    """A pseudo terminal with a program in it."""

    def __init__(self, *arguments: str) -> None:
        self.master, self._slave = pty.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 240, 0, 0))
        self.before = termios.tcgetattr(self._slave)
        self.output = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mailerq", *arguments],
            stdin=self._slave,
            stdout=self._slave,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TERM": "xterm"},
            start_new_session=True,
        )

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    async def until_shown(self, text: str, *, gone: bool = False) -> None:
        """Read until the last frame has, or no longer has, a text."""
        with trio.fail_after(DEADLINE):
            while (text.encode() in self.output.rpartition(b"\x1b[H")[2]) is gone or (
                not self.output.endswith(b"\x1b[J")
            ):
                await trio.lowlevel.wait_readable(self.master)
                self.output += os.read(self.master, 1 << 16)

    async def ends(self) -> int:
        """The exit status, once the terminal is as it was before."""
        with trio.fail_after(DEADLINE):
            status = await in_thread(self.process.wait)
            while not self.output.endswith(b"\x1b[?25h\x1b[?1049l"):
                await trio.lowlevel.wait_readable(self.master)
                self.output += os.read(self.master, 1 << 16)
        assert termios.tcgetattr(self._slave) == self.before
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stderr is not None
        assert self.process.stderr.read() == b""
        self.process.stderr.close()
        os.close(self.master)
        os.close(self._slave)


@contextmanager
def terminal(running: Daemon, *more: str) -> Iterator[Terminal]:
    opened = Terminal("top", f"--queue-directory={running.queue}", *more)
    try:
        yield opened
    finally:
        opened.close()


async def test_keys_sort_filter_and_quit(tmp_path: Path, mark: dict[str, str]) -> None:
    switch = limits_in(tmp_path)
    async with open_sink() as sink, daemon(tmp_path, sink.port, switch, env=mark) as running:
        async with connected(running.port) as stream:
            for number in range(2):
                assert await put(stream, f"m-{number}") == 250
        with terminal(running) as opened:
            await opened.until_shown("messages-per-minute = 1 of d.test")
            await opened.until_shown("sorted by waiting")
            opened.press("s")
            await opened.until_shown("sorted by rate")
            opened.press("/nothing")
            await opened.until_shown("show names with: nothing_")
            opened.press("\r")
            await opened.until_shown("of names with 'nothing'")
            await opened.until_shown("d.test", gone=True)
            opened.press("\x1b")
            await opened.until_shown("d.test")
            opened.press("q")
            assert await opened.ends() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
async def test_a_signal_gives_the_terminal_back(
    tmp_path: Path, mark: dict[str, str], number: int
) -> None:
    async with open_sink() as sink, daemon(tmp_path, sink.port, env=mark) as running:
        with terminal(running) as opened:
            await opened.until_shown("flows")
            opened.process.send_signal(number)
            assert await opened.ends() == 128 + number


async def test_the_end_of_the_daemon_is_shown_and_its_return_too(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    async with open_sink() as sink, daemon(tmp_path, sink.port, env=mark) as running:
        with terminal(running) as opened:
            await opened.until_shown("0 flows")
            assert await running.stop() == 0
            await opened.until_shown("no answer")
            async with daemon(tmp_path, sink.port, env=mark):
                await opened.until_shown("0 flows")
                opened.press("q")
                assert await opened.ends() == 0


# The parts


@given(st.binary(max_size=40))
def test_any_bytes_are_keys_or_nothing(data: bytes) -> None:
    for key in keys_in(data):
        assert len(key) == 1
        assert key.isprintable() or key in "\n\x08\x1b"


ROW = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["a", "b"]),
        "kind": st.sampled_from(["flow", "down"]),
        "site": st.sampled_from(["d.test", "x\x1b[2J.test", "\u202e" * 300]),
        "local-ip": st.sampled_from([None, "192.0.2.1"]),
        "demands": st.just([]),
        "destinations": st.lists(st.sampled_from(["d.test", "e.test"]), unique=True),
        "more-destinations": st.integers(0, 3),
        "messages": st.integers(0, 10**9),
        "memory": st.integers(0, 10**9),
        "connections": st.integers(0, 10**5),
        "opening": st.integers(0, 9),
        "idle": st.integers(0, 9),
        "limited-by": st.sampled_from(["", "a limit", "y\r\n" * 200]),
        "until": st.sampled_from([None, "2026-11-26 10:00:00"]),
        "seconds": st.sampled_from([None, 0.5, 1e9]),
        "reply": st.sampled_from(["", "250 ok", "\x00" * 300]),
    }
)
PAGE = st.fixed_dictionaries(
    {
        **{name: st.integers(0, 99) for name in ("flows", "pauses", "matching", "memory")},
        **{name: st.integers(0, 99) for name in ("connections", "delivered")},
        "rows": st.lists(ROW, max_size=6, unique_by=lambda row: (row["id"], row["local-ip"])),
    }
)


@given(st.lists(PAGE, min_size=1, max_size=3))
def test_pages_of_processes_add_up(pages: list[dict[str, Any]]) -> None:
    flows = [(row["local-ip"], row["messages"]) for page in pages for row in page["rows"]]
    whole = merged_pages(pages)
    assert whole["delivered"] == sum(page["delivered"] for page in pages)
    assert sum(row["messages"] for row in whole["rows"]) == sum(messages for _, messages in flows)
    keys = [(row["id"], row["local-ip"]) for row in whole["rows"]]
    assert len(keys) == len(set(keys))


def test_mail_without_a_flow_in_one_process_is_that_of_a_flow_in_another() -> None:
    row = {
        **dict.fromkeys(("messages", "memory", "connections", "opening", "idle"), 0),
        "more-destinations": 0,
        "limited-by": "",
        "until": None,
        "seconds": None,
        "reply": "",
        "local-ip": None,
        "demands": [],
        "destinations": ["d.test"],
        "site": "d.test",
    }
    totals = dict.fromkeys(("flows", "pauses", "matching", "memory", "connections"), 0)
    pages = [
        {**totals, "delivered": 0, "rows": [{**row, "id": id, "kind": kind}]}
        for id, kind in (("d.test", "mail"), ("0a", "flow"))
    ]
    assert [each["kind"] for each in merged_pages(pages)["rows"]] == ["flow"]
    assert [each["kind"] for each in merged_pages(pages[:1])["rows"]] == ["mail"]


class Page:
    """Rows as if from a daemon."""

    def __init__(self, page: dict[str, Any]) -> None:
        self.page = page

    def look(self, sort: str, text: str, limit: int) -> dict[str, Any]:
        return self.page


@given(PAGE, st.integers(1, 300), st.integers(1, 60), st.lists(st.characters(), max_size=20))
def test_any_screen_is_filled_with_printable_text(
    page: dict[str, Any], columns: int, height: int, keys: list[str]
) -> None:
    for row in page["rows"]:
        row.update(rate=None, waiting=3)
    page.update(time="2026-11-26 10:00:00", rate=None, waiting=None)
    view = View(Page(page), ORDERS[0], "", None)  # type: ignore[arg-type]
    view.look(height)
    for key in keys:
        view.press(key)
    lines = view.lines(columns, height)
    assert len(lines) == max(height, 2)
    assert all(line.isprintable() for line in lines)
