"""Pauses, forced errors and suppressions by command: at once, in all processes, over restarts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import trio

from tests.crash.kit import Daemon, all_arrive, daemon
from tests.processes_kit import TWO, all_run, connected, marked, put, send_all, until_rows
from tests.support import in_thread, mailerq, open_sink, until


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[dict[str, str]]:
    with marked(tmp_path) as environment:
        yield environment


def run(directory: Path, *words: str, status: int = 0, stdin: bytes = b"") -> str:
    """Run a command on a queue directory; its output, or its complaints if it fails."""
    done = mailerq(*words, f"--queue-directory={directory}", input=stdin)
    assert done.returncode == status, (done.stdout, done.stderr)
    return (done.stderr if status else done.stdout).decode()


def documents(directory: Path, *words: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(directory, *words, "--json").splitlines()]


# Without a daemon


def test_rows_are_added_listed_extended_and_removed(tmp_path: Path) -> None:
    added = run(tmp_path, "pause", "add", "--domain=B.test", "--for=2h", "--reason=asked")
    assert added.startswith("pause 1") and "no daemon" in added
    run(tmp_path, "error", "add", "--tag=news", "--code=451", "--status=4.3.0")
    (pause,) = documents(tmp_path, "pause", "list")
    assert (pause["id"], pause["domain"], pause["reason"]) == (1, "b.test", "asked")
    assert "until" in pause and pause["who"]
    run(tmp_path, "pause", "extend", "1", "--no-end")
    assert "until" not in documents(tmp_path, "pause", "list")[0]
    run(tmp_path, "pause", "extend", "1", "--until=2999-01-01 00:00:00")
    assert documents(tmp_path, "pause", "list")[0]["until"] == "2999-01-01 00:00:00"
    assert [row["kind"] for row in documents(tmp_path, "rows", "list")] == ["pause", "error"]
    assert "domain b.test" in run(tmp_path, "pause", "list")
    assert "no pause 2" in run(tmp_path, "pause", "remove", "1", "2", status=1)
    assert not documents(tmp_path, "pause", "list")
    run(tmp_path, "rows", "remove", "--all")
    assert not documents(tmp_path, "rows", "list")


def test_addresses_are_suppressed_from_a_file_and_freed_by_name_or_by_command(
    tmp_path: Path,
) -> None:
    names = b"# complaints\nAnn@B.test\n\n*.gone.test\nbob@b.test\n"
    run(tmp_path, "suppress", "add", "--from-file=-", "--reason=list", stdin=names)
    run(tmp_path, "suppress", "add", "eve@b.test", "--code=554", "--description=never")
    found = {row["value"]: row for row in documents(tmp_path, "suppress", "list")}
    assert set(found) == {"ann@b.test", "*.gone.test", "bob@b.test", "eve@b.test"}
    assert (found["ann@b.test"]["code"], found["ann@b.test"]["status"]) == (550, "5.7.1")
    assert (found["eve@b.test"]["code"], found["eve@b.test"]["description"]) == (554, "never")
    (one,) = documents(tmp_path, "suppress", "list", "ANN@b.test", "nobody@b.test")
    assert one["value"] == "ann@b.test"
    assert "not suppressed" in run(
        tmp_path, "suppress", "remove", "bob@b.test", "nobody@b.test", status=1
    )
    run(tmp_path, "suppress", "remove", "--id=1")
    assert [row["value"] for row in documents(tmp_path, "suppress", "list")] == ["eve@b.test"]


def test_a_list_of_another_system_is_read_as_it_is_meant(tmp_path: Path) -> None:
    names = "\ufeffann@b.test\r\nbob@b.test\u00a0\r\n".encode()
    run(tmp_path, "suppress", "add", "--from-file=-", stdin=names)
    found = [row["value"] for row in documents(tmp_path, "suppress", "list")]
    assert found == ["ann@b.test", "bob@b.test"]


def test_lists_say_that_rows_may_be_missing(tmp_path: Path) -> None:
    run(tmp_path, "pause", "add", "--tag=news")
    path = tmp_path / "rows"
    path.write_bytes(path.read_bytes().replace(b"news", b"sewn"))
    for kind in ("pause", "suppress", "rows"):
        done = mailerq(kind, "list", f"--queue-directory={tmp_path}")
        assert done.returncode == 0
        assert b"1 lines of the file are damaged" in done.stderr


def test_each_change_names_who_when_and_why_in_the_audit_file(tmp_path: Path) -> None:
    run(tmp_path, "pause", "add", "--everything", "--reason=night")
    run(tmp_path, "pause", "remove", "1", "--reason=morning")
    lines = [json.loads(line) for line in (tmp_path / "rows.audit").read_text().splitlines()]
    assert [(line["action"], line["why"]) for line in lines] == [
        ("add", "night"), ("remove", "morning"),
    ]  # fmt: skip
    assert all(line["who"] and line["time"] for line in lines)


def test_a_pool_of_addresses_is_named(tmp_path: Path) -> None:
    file = tmp_path / "addresses.toml"
    file.write_text('[[pool]]\nname = "bulk"\naddresses = ["192.0.2.1"]\n')
    for kind in ("pause", "error"):
        run(tmp_path, kind, "add", "--pool=bulk", "--domain=b.test", f"--addresses-file={file}")
        (row,) = documents(tmp_path, kind, "list")
        assert row["pool"] == "bulk"
        assert "pool bulk, domain b.test" in run(tmp_path, kind, "list")


@pytest.mark.parametrize(("words", "complaint"), [
    (["pause", "add"], "--everything"),
    (["pause", "add", "--everything", "--tag=news"], "not both"),
    (["pause", "add", "--domain=not a domain"], "domain"),
    (["pause", "add", "--provider=nobody"], "limits-file has no"),
    (["pause", "add", "--pool=bulk"], "addresses-file has no pool 'bulk'"),
    (["error", "add", "--pool=bulk", "--tag=x"], "addresses-file has no pool 'bulk'; it has none"),
    (["pause", "add", "--tag=x", "--until=2001-01-01 00:00:00"], "has passed"),
    (["error", "add", "--tag=x", "--code=700"], "code"),
    (["error", "add", "--tag=x", "--code=550", "--status=4.1.1"], "contradicts"),
    (["suppress", "add"], "name an address"),
    (["suppress", "add", "a@@b.test", "b@b.test"], "argument 1"),
    (["suppress", "add", "--from-file=/nowhere/at/all"], "cannot read"),
    (["pause", "remove"], "--all"),
])  # fmt: skip
def test_mistakes_are_named_and_change_nothing(
    tmp_path: Path, words: list[str], complaint: str
) -> None:
    assert complaint in run(tmp_path, *words, status=os.EX_DATAERR)
    assert not documents(tmp_path, "rows", "list")


@pytest.mark.parametrize("words", [
    ["pause", "add", "--domain=a.test", "--site=b.test"],
    ["pause", "add", "--local-ip=192.0.2.1", "--pool=bulk"],
    ["pause", "add", "--tag=x", "--for=never"],
    ["pause", "extend", "1"],
    ["error", "add", "--remote-ip=192.0.2.1"],
    ["pause"],
])  # fmt: skip
def test_what_the_grammar_does_not_allow_is_a_usage_error(tmp_path: Path, words: list[str]) -> None:
    run(tmp_path, *words, status=os.EX_USAGE)


def test_without_a_queue_directory_nothing_is_made(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert "there is no queue" in run(missing, "pause", "add", "--tag=x", status=os.EX_UNAVAILABLE)
    assert not missing.exists()


def test_check_config_notes_a_damaged_file_and_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path, "pause", "add", "--tag=news")
    run(tmp_path, "pause", "add", "--tag=other")
    path = tmp_path / "rows"
    damaged = path.read_bytes().replace(b"news", b"sewn")
    path.write_bytes(damaged)
    said = mailerq("check-config", f"--queue-directory={tmp_path}", "--smtp-port=0").stdout
    assert b"1 lines are damaged" in said
    assert path.read_bytes() == damaged
    assert sorted(each.name for each in tmp_path.iterdir()) == ["rows", "rows.audit"]


# With a daemon


async def command(running: Daemon, *words: str) -> str:
    return await in_thread(run, running.queue, *words)


async def test_rows_are_in_force_in_all_processes_when_the_command_ends_and_after_a_restart(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    async with open_sink() as sink:
        async with daemon(tmp_path, sink.port, TWO, env=mark) as running:
            await until_rows(running, all_run)
            assert "no daemon" not in await command(running, "pause", "add", "--domain=d.test")
            names = await send_all(running.port, "a")
            await running.until_statistics(lambda found: found["outgoing"]["paused"] == 2)
            figures = await running.statistics()
            assert figures["rows"] == {"pauses": 1, "errors": 0, "suppressed": 0}
            assert not sink.mails
            assert await running.stop() == 0
        async with daemon(tmp_path, sink.port, TWO, env=mark) as running:
            await until_rows(running, all_run)
            await running.until_statistics(lambda found: found["outgoing"]["paused"] == 2)
            assert not sink.mails
            await command(running, "pause", "remove", "1")
            await all_arrive(sink, names)


async def test_a_pause_ends_by_itself_in_all_processes(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    async with open_sink() as sink, daemon(tmp_path, sink.port, TWO, env=mark) as running:
        await until_rows(running, all_run)
        began = monotonic()
        await command(running, "pause", "add", "--everything", "--for=3s")
        await all_arrive(sink, await send_all(running.port, "a"))
        assert monotonic() - began > 2.0
        assert not (await running.statistics())["rows"]["pauses"]


async def test_suppressed_recipients_fail_in_all_processes_and_hits_are_counted(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    async with open_sink() as sink:
        async with daemon(tmp_path, sink.port, TWO, "--dsn-notify=NEVER", env=mark) as running:
            await until_rows(running, all_run)
            await command(running, "suppress", "add", "d.test")
            names = await send_all(running.port, "a")
            await running.until_statistics(lambda found: found["outgoing"]["failed"] == len(names))
            assert not sink.mails
            assert await running.stop() == 0
        (row,) = documents(tmp_path / "queue", "suppress", "list")
        assert row["hits"] == len(names)


async def test_a_damaged_file_is_set_aside_by_a_start_and_said(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    queue = tmp_path / "queue"
    queue.mkdir()
    run(queue, "pause", "add", "--tag=news")
    run(queue, "pause", "add", "--domain=d.test")
    path = queue / "rows"
    damaged = path.read_bytes().replace(b"news", b"sewn")
    path.write_bytes(damaged)
    async with open_sink() as sink, daemon(tmp_path, sink.port, env=mark) as running:
        (kept,) = queue.glob("rows.damaged-*")
        assert kept.read_bytes() == damaged
        assert "1 of 3 lines are damaged" in running.log
        async with connected(running.port) as stream:
            assert await put(stream, "one") == 250
        await running.until_statistics(lambda found: found["outgoing"]["paused"] == 1)
        assert not sink.mails


async def test_processes_follow_a_file_that_changes_without_a_word(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    async with open_sink() as sink, daemon(tmp_path, sink.port, TWO, env=mark) as running:
        await until_rows(running, all_run)
        other = tmp_path / "other"
        other.mkdir()
        run(other, "pause", "add", "--everything")
        os.rename(other / "rows", running.queue / "rows")
        await running.until_statistics(lambda found: found["rows"]["pauses"] == 1)
        # Both processes: each would send otherwise.
        await trio.sleep(1.0)
        await send_all(running.port, "a")
        await running.until_statistics(lambda found: found["outgoing"]["paused"] == 2)
        os.unlink(running.queue / "rows")
        await until(lambda: len(sink.mails) > 0)
