"""``mailerq reload`` and SIGHUP, as users of the daemon see them."""

from __future__ import annotations

import json
import os
import signal
import smtplib
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq.cli.reloading import Reloader, Source
from tests.crash.kit import Daemon, daemon
from tests.engine.kit import Certificate
from tests.processes_kit import all_run, marked, rows, send_all, until_rows
from tests.support import ROOT, Sink, in_thread, mailerq, open_sink, until

PROCESSES = pytest.mark.parametrize("processes", [1, 2])


@asynccontextmanager
async def running(
    directory: Path, text: str = "", *more: str, env: dict[str, str] | None = None
) -> AsyncIterator[tuple[Daemon, Path, Sink]]:
    """A daemon with a file of settings, which the test changes."""
    file = directory / "config.txt"
    file.write_text(text)
    async with open_sink() as sink:
        switches = [f"--config-file={file}", *more]
        async with daemon(directory, sink.port, *switches, env=env) as found:
            yield found, file, sink


async def reload(found: Daemon, *more: str) -> Any:
    """What ``mailerq reload`` says."""
    switches = [f"--queue-directory={found.queue}", *more]
    return await in_thread(lambda: mailerq("reload", *switches))


async def number(found: Daemon) -> int:
    return int((await found.statistics())["settings"]["number"])


@PROCESSES
async def test_a_reload_says_what_changed_and_what_needs_a_restart(
    tmp_path: Path, processes: int
) -> None:
    async with running(tmp_path, "", f"--smtp-processes={processes}") as (found, file, _):
        file.write_text("smtp-maxrecipients: 3\nsmtp-threads: 2\n")
        done = await reload(found)
        assert done.stdout.decode().splitlines() == [
            "settings 2 are in force",
            f"changed: smtp-maxrecipients: 1000 -> 3 ({file}:1)",
            f"needs a restart: smtp-threads: 1 -> 2 ({file}:2)",
        ]
        assert (done.returncode, done.stderr) == (0, b"")
        assert f"mailerq reload: needs a restart: smtp-threads: 1 -> 2 ({file}:2)" in found.log

        def transaction() -> list[int]:
            with smtplib.SMTP("127.0.0.1", found.port, timeout=60) as client:
                client.ehlo("client.test")
                client.mail("a@b.test")
                return [client.rcpt(f"{name}@d.test")[0] for name in "abcd"]

        for _ in range(8):
            assert await in_thread(transaction) == [250, 250, 250, 452]
        (line,) = json.loads((await reload(found, "--json")).stdout)["restart"]
        assert (line["key"], line["old"], line["new"]) == ("smtp-threads", "1", "2")
        assert await number(found) == 3


@PROCESSES
async def test_all_mistakes_are_said_with_their_place_and_nothing_changes(
    tmp_path: Path, processes: int
) -> None:
    async with running(tmp_path, "", f"--smtp-processes={processes}") as (found, file, _):
        file.write_text(
            "smtp-maxsize: 1KB\nnonsense: 1\nmax-attempts: many\n"
            "smtp-certificate: /no/file\nreceived-log-file: /no/log\n"
        )
        done = await reload(found)
        assert done.returncode == 1
        assert done.stdout == b""
        lines = done.stderr.decode().splitlines()
        assert [line.split(": ")[1] for line in lines[:-1]] == [
            f"{file}:2",
            f"{file}:3",
            f"{file}:4",
            f"{file}:5",
        ]
        assert lines[-1] == "mailerq: nothing has changed"
        text = f"mailerq reload: the settings stay as they were: {file}:4: smtp-certificate"
        assert text in found.log
        assert await number(found) == 1
        file.write_text("smtp-secure-port: 1\n")
        found.process.send_signal(signal.SIGHUP)
        await until(lambda: "SIGHUP: the settings stay as they were" in found.log)
        assert await number(found) == 1


async def test_the_layers_are_those_of_the_start(tmp_path: Path) -> None:
    env = {"MAILERQ_MAX_ATTEMPTS": "5"}
    async with running(tmp_path, "", "--smtp-maxsize=1MB", env=env) as (found, file, _):
        file.write_text("max-attempts: 6\nsmtp-maxsize: 2MB\nsmtp-timeout: 60\n")
        done = await reload(found)
        assert done.stdout.decode().splitlines() == [
            "settings 2 are in force",
            f"changed: smtp-timeout: 300 -> 60 ({file}:3)",
        ]


async def test_the_command_finds_the_daemon_by_a_file_that_has_mistakes(tmp_path: Path) -> None:
    async with running(tmp_path) as (found, file, _):
        file.write_text(f"queue-directory: {found.queue}\nnonsense: 1\n")
        done = await in_thread(lambda: mailerq("reload", f"--config-file={file}"))
        assert done.returncode == 1
        assert f"{file}:2: unknown setting 'nonsense'" in done.stderr.decode()


def test_without_a_daemon_the_status_is_69(tmp_path: Path) -> None:
    done = mailerq("reload", f"--queue-directory={tmp_path}")
    assert done.returncode == os.EX_UNAVAILABLE
    assert b"no daemon answers" in done.stderr


@PROCESSES
async def test_the_application_log_follows(tmp_path: Path, processes: int) -> None:
    new, file = tmp_path / "new", tmp_path / "config.txt"
    switches = ["--hostname=mx.test", "--smtp-ip=127.0.0.1", "--smtp-port=0", "--plugin-directory="]
    switches += [f"--smtp-processes={processes}", f"--queue-directory={tmp_path / 'queue'}"]
    file.write_text(f"application-log: {tmp_path / 'log'}\n")
    async with _plain(tmp_path, f"--config-file={file}", *switches) as found:
        await until(lambda: (tmp_path / "log").exists() and "listens on" in found.log)
        before = found.log
        file.write_text(f"application-log: {new}\n")
        assert (await reload(found)).returncode == 0
        await until(lambda: "settings 2 are in force" in new.read_text())
        file.write_text(f"application-log: {tmp_path}/no/log\n")
        assert (await reload(found)).returncode == 1
        assert "application-log: cannot write" in new.read_text()
        assert found.log == before
        assert await found.stop() == 0
        assert "stopped" in new.read_text()


@asynccontextmanager
async def _plain(directory: Path, *switches: str) -> AsyncIterator[Daemon]:
    """A daemon with these switches and no others."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "mailerq", *switches],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
    )
    try:
        yield Daemon(process, directory, 0)
    finally:
        if process.poll() is None:
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def test_a_stop_has_the_time_that_is_set_now(tmp_path: Path) -> None:
    async with running(tmp_path, "shutdown-timeout: 600\n") as (found, file, _):
        file.write_text("shutdown-timeout: 0\n")
        assert (await reload(found)).returncode == 0
        with smtplib.SMTP("127.0.0.1", found.port, timeout=60) as client:
            client.ehlo("client.test")
            client.mail("a@b.test")
            assert await found.stop(60) == 0
            client.close()


@PROCESSES
async def test_sighup_under_load_loses_nothing(tmp_path: Path, processes: int) -> None:
    switches = (f"--smtp-processes={processes}",)
    async with running(tmp_path, "", *switches) as (found, file, sink):
        sent: set[str] = set()
        over = trio.Event()
        count = turn = 0

        async def enough() -> bool:
            """Whether settings were taken, and others not: a slow reload answers many signals."""
            stayed = found.log.count("the settings stay as they were")
            return await number(found) > 3 and stayed > 0

        async def hang_up() -> None:
            nonlocal count
            while not over.is_set():
                count += 1
                wrong = "nonsense: 1" if count % 3 == 0 else ""
                lines = f"smtp-maxsize: {count + 1}MB\nsmarthost: h{count}.test\n{wrong}\n"
                file.write_text(lines)
                found.process.send_signal(signal.SIGHUP)
                await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hang_up)
            while turn < 5 or count < 12 or not await enough():
                turn += 1
                sent |= await send_all(found.port, f"t{turn}")
            over.set()
        await sink.wait_for(len(sent))
        await found.until_empty()
        assert {mail.recipients[0].partition("@")[0] for mail in sink.mails} == sent
        assert len(sink.mails) == len(sent)
        assert await found.stop() == 0


def test_a_sighup_that_comes_during_the_start_counts_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    causes: list[str] = []
    monkeypatch.setattr(Reloader, "_reload", lambda self, cause: causes.append(cause))
    reloader = Reloader(Source([]), None)  # type: ignore[arg-type]
    reloader.hang_up(now=False)
    reloader.hang_up(now=False)
    assert causes == []
    reloader.started()
    assert causes == ["SIGHUP"]


@PROCESSES
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has an account to change to")
async def test_a_key_that_only_root_may_read_stays_and_the_rest_changes(processes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o777)  # pytest's own are closed to others
        certificate = Certificate.make(directory)
        certificate.key.chmod(0o600)
        file, log = directory / "config.txt", directory / "log"
        file.write_text("")
        switches = [
            *("--hostname=mx.test", "--smtp-ip=127.0.0.1", "--smtp-port=0", "--plugin-directory="),
            *(f"--queue-directory={directory / 'queue'}", f"--application-log={log}"),
            *("--user=nobody", f"--smtp-processes={processes}", f"--config-file={file}"),
            *certificate.switches,
        ]
        async with _plain(directory, *switches) as found:
            await until(lambda: log.exists() and "listens on" in found.log)
            file.write_text("smtp-maxrecipients: 7\n")
            done = await reload(found)
            assert (done.returncode, done.stderr) == (0, b"")
            first, changed, note = done.stdout.decode().splitlines()
            assert first == "settings 2 are in force"
            assert "smtp-maxrecipients: 1000 -> 7" in changed
            assert note.startswith(f"smtp-key: this account may not read {certificate.key} again")
            file.write_text("smtp-maxrecipients: 8\nsmtp-ciphers: HIGH\n")
            done = await reload(found)
            assert done.returncode == 1
            assert "Permission denied" in done.stderr.decode()
            assert await number(found) == 2
            assert await found.stop() == 0


# Several processes


async def test_all_processes_report_one_snapshot_and_so_does_one_that_starts_later(
    tmp_path: Path,
) -> None:
    with marked(tmp_path) as env:
        async with running(tmp_path, "", "--smtp-processes=2", env=env) as (found, file, _):
            for count in (2, 3):
                file.write_text(f"smtp-maxrecipients: {count}\n")
                assert (await reload(found)).returncode == 0
                assert [row["settings"] for row in await rows(found)] == [count, count]
                assert await number(found) == count
            os.kill((await rows(found))[1]["pid"], signal.SIGKILL)
            found_rows = await until_rows(found, lambda now: now[1]["starts"] == 2 and all_run(now))
            assert [row["settings"] for row in found_rows] == [3, 3]
            shown = mailerq("status", f"--queue-directory={found.queue}").stdout.decode()
            assert "settings.number" in shown
            assert await found.stop() == 0


async def test_a_process_that_stands_still_takes_them_when_it_goes_on(tmp_path: Path) -> None:
    with marked(tmp_path) as env:
        async with running(tmp_path, "", "--smtp-processes=2", env=env) as (found, file, _):
            file.write_text("smtp-maxrecipients: 7\n")
            stopped = (await rows(found))[1]["pid"]
            os.kill(stopped, signal.SIGSTOP)
            try:
                assert (await reload(found)).returncode == 0
                assert await number(found) == 2
                assert f"process 1 (pid {stopped}) does not answer; it takes them" in found.log
            finally:
                os.kill(stopped, signal.SIGCONT)
            found_rows = await until_rows(found, lambda now: now[1]["settings"] == 2)
            assert found_rows[1]["pid"] == stopped
            assert await found.stop() == 0
