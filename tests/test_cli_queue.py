"""``mailerq queue``, ``config`` and ``status`` as users run them."""

from __future__ import annotations

import errno
import json
import os
import pty
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mailerq.cli import main
from mailerq.message import Message, format_time
from mailerq.queues import Publication
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.shares import share_directory
from mailerq.queues.opening import open_exclusive
from tests.support import ROOT, mailerq

MIME = b"Subject: hi\r\n\r\nhello\r\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A queue directory with three messages that wait, one of them for tomorrow."""
    messages = [
        Message({"envelope": "a@b.test", "recipient": f"{name}@d.test", "my-id": 7}, MIME)
        for name in ("ann", "bob", "carl")
    ]
    messages[2].properties["results"] = [
        {"attempt": 1, "type": "error", "code": 450, "status": "4.2.0", "description": "not now"}
    ]
    with QueueFile.open(str(tmp_path)) as store:
        store.publish(
            [
                Publication("outbox", messages[0]),
                Publication("outbox", messages[1]),
                Publication("outbox", messages[2], time.time() + 86400),
            ]
        )
    return tmp_path


def run(directory: Path, *arguments: str, status: int = 0) -> str:
    done = mailerq(*arguments, f"--queue-directory={directory}", "--hostname=mx.test")
    assert done.returncode == status, done.stderr.decode()
    return (done.stdout if status == 0 else done.stderr).decode()


def test_list_shows_how_full_each_queue_is(directory: Path) -> None:
    assert run(directory, "queue", "list", "--rabbitmq-success=good").splitlines() == [
        "QUEUE    DUE  DELAYED  HELD  TOTAL",
        "failure    0        0     0      0",
        "good       0        0     0      0",
        "outbox     2        1     0      3",
    ]
    assert json.loads(run(directory, "queue", "list", "--json", "--rabbitmq-failure=")) == [
        {"queue": "outbox", "due": 2, "delayed": 1, "held": 0, "total": 3}
    ]


def test_show_has_a_line_for_each_message(directory: Path) -> None:
    lines = run(directory, "queue", "show", "outbox").splitlines()
    assert lines[0].split() == ["ID", "DUE", "FROM", "TO", "SIZE", "ATTEMPTS", "REASON"]
    assert [line.split()[4] for line in lines[1:]] == ["ann@d.test", "bob@d.test", "carl@d.test"]
    assert lines[3].split()[5:] == ["22", "1", "450", "4.2.0", "not", "now"]
    found = [
        json.loads(line)
        for line in run(directory, "queue", "show", "outbox", "--json", "--limit=2").splitlines()
    ]
    assert [entry["recipient"] for entry in found] == ["ann@d.test", "bob@d.test"]
    after = run(directory, "queue", "show", "outbox", f"--after={found[1]['id']}")
    assert "carl" in after
    assert "bob" not in after


def test_nothing_that_is_printed_deceives_a_terminal(tmp_path: Path) -> None:
    nasty = '"\x1b[2J\u202e\u200b\xa0\x7f\\\\"@d.test'
    with QueueFile.open(str(tmp_path)) as store:
        message = Message({"envelope": nasty, "recipient": nasty, "tags": [nasty]}, MIME)
        store.publish([Publication("outbox", message)])
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "\x1b[2J\u202e.so").touch()
    shown = run(tmp_path, "queue", "show", "outbox")
    assert shown.count(r'"\x1b[2J\u202e\u200b\xa0\x7f\\\\"@d.test') == 2
    outputs = [
        shown,
        run(tmp_path, "queue", "list"),
        run(tmp_path, "queue", "show", "outbox", "--json"),
        run(tmp_path, "queue", "read", "outbox"),
        run(tmp_path, "queue", "purge", "outbox", "--yes"),
        run(tmp_path, "check-config", f"--plugin-directory={plugins}", status=1),
        run(tmp_path, "queue", "\u202epurge", status=os.EX_USAGE),
        run(tmp_path, "config", "\u202epurge", status=os.EX_USAGE),
        run(tmp_path, "--smtp-\u202eport=1", status=2),
    ]
    assert [output for output in outputs if not output.replace("\n", "").isprintable()] == []


def test_a_terminal_without_the_letters_gets_escapes(tmp_path: Path) -> None:
    with QueueFile.open(str(tmp_path)) as store:
        store.publish([Publication("outbox", Message({"recipient": "ü世@d.test"}, MIME))])
    command = ("queue", "show", f"--queue-directory={tmp_path}")
    done = mailerq(*command, env={"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0
    assert b"\xfc\\u4e16@d.test" in done.stdout


def test_show_counts_by_destination(directory: Path) -> None:
    with QueueFile.open(str(directory)) as file:
        mail = [{"recipient": f"r@{name}.test"} for name in ("a", "z", "z", "z")]
        file.publish([Publication("outbox", Message(properties)) for properties in mail])
    lines = run(directory, "queue", "show", "--destinations").splitlines()
    assert [line.split()[:5] for line in lines] == [
        ["DESTINATION", "DUE", "DELAYED", "HELD", "TOTAL"],
        ["a.test", "1", "0", "0", "1"],
        ["d.test", "2", "1", "0", "3"],
        ["z.test", "3", "0", "0", "3"],
    ]
    (line,) = run(directory, "queue", "show", "--destinations", "--json", "--limit=1").splitlines()
    found = json.loads(line)
    assert found.pop("first")
    assert found == {"destination": "d.test", "due": 2, "delayed": 1, "held": 0, "total": 3}


def test_a_long_table_is_printed_as_it_is_read(directory: Path) -> None:
    with QueueFile.open(str(directory)) as file:
        file.publish([Publication("long", Message({"recipient": "r@a.test"})) for _ in range(2500)])
    lines = run(directory, "queue", "show", "long").splitlines()
    assert len(lines) == 2501
    assert all("r@a.test" in line for line in lines[1:])
    some = run(directory, "queue", "show", "long", "--limit=1234", "--json").splitlines()
    ids = [json.loads(line)["id"] for line in some]
    assert ids == list(range(ids[0], ids[0] + 1234))


def test_compact_gives_free_room_back(directory: Path) -> None:
    path = directory / "queue.db"
    with QueueFile.open(str(directory)) as file:
        numbers = file.publish(
            [Publication("gone", Message({}, bytes(100_000))) for _ in range(50)]
        )
        file.remove(numbers)
    before = path.stat().st_size
    reply = json.loads(run(directory, "queue", "compact", "--json"))
    assert reply == {"file": str(path), "before": before, "after": path.stat().st_size}
    assert reply["after"] < before // 10
    assert len(run(directory, "queue", "show", "--json").splitlines()) == 3
    with open_exclusive(str(directory)):
        said = run(directory, "queue", "compact", status=os.EX_TEMPFAIL)
    assert "held by another mailerq" in said
    assert f"{path}: " in run(directory, "queue", "compact")


def test_show_says_why_the_last_attempt_came_to_nothing(directory: Path) -> None:
    results: list[object] = [
        None,
        "nonsense",
        ["nonsense"],
        [{"code": 450}, {"description": "127.0.0.1: Connection refused\x1b[2J"}],
        [{"type": "lost"}],
    ]
    with QueueFile.open(str(directory)) as store:
        store.publish(
            Publication("tried", Message({"recipient": "a@b.test", "results": found}))
            for found in results
        )
    lines = run(directory, "queue", "show", "tried", "--json").splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert reasons == [None, None, None, "127.0.0.1: Connection refused\x1b[2J", "lost"]
    assert "refused\\x1b[2J\n" in run(directory, "queue", "show", "tried")


@pytest.mark.parametrize("command", [["show"], ["read"], ["purge", "--yes"]])
def test_a_queue_that_is_not_there_is_an_error(directory: Path, command: list[str]) -> None:
    said = run(directory, "queue", *command, "outbx", "--rabbitmq-local=home", status=65)
    assert said == "mailerq: there is no queue outbx; there are failure, home, outbox\n"
    run(directory, "queue", *command, "home", "--rabbitmq-local=home")


# As sendmail's relatives


def test_mailq_shows_the_outbox_in_words_that_monitoring_knows(directory: Path) -> None:
    shown = run(directory, "queue", "show").splitlines()
    listed = run(directory, "-bp").splitlines()
    assert listed == [*shown, "-- 1 Kbytes in 3 Requests."]
    assert run(directory, "-bp", "--json") == run(directory, "queue", "show", "--json")
    run(directory, "queue", "purge", "outbox", "--yes")
    assert run(directory, "-bp") == "Mail queue is empty\n"


def test_the_name_of_the_program_says_what_is_wanted(directory: Path) -> None:
    for name, expected in (("mailq", "-- 1 Kbytes in 3 Requests.\n"), ("newaliases", "")):
        program = directory / name
        program.write_text(f"#!{sys.executable} -P\nfrom mailerq.cli import main\nexit(main())\n")
        program.chmod(0o755)
        environ = {"MAILERQ_QUEUE_DIRECTORY": str(directory), "PYTHONPATH": str(ROOT)}
        said = subprocess.run([program, "-v"], env=environ, capture_output=True, check=True)
        assert said.stdout.decode().endswith(expected)
        assert said.stderr == b""


def test_a_flush_without_a_daemon_changes_nothing_and_says_so(directory: Path) -> None:
    before = run(directory, "queue", "show")
    for command in (["-q"], ["queue", "flush"]):
        said = run(directory, *command, status=os.EX_UNAVAILABLE)
        assert said.startswith(f"mailerq: no daemon runs on {directory}: nothing is tried")
    assert run(directory, "queue", "show") == before
    assert "-q30m is not supported" in run(directory, "-q30m", status=os.EX_USAGE)


def test_a_flush_makes_due_what_was_tried_and_leaves_what_its_sender_delayed(
    directory: Path,
) -> None:
    tomorrow = time.time() + 86400
    delayed = {"recipient": "a@b.test", "delayed": format_time(tomorrow)}
    with open_exclusive(str(directory)) as store:
        waits = Publication("outbox", Message(delayed), tomorrow)
        tried = Message({**delayed, "results": [{"attempt": 1}]}, MIME)
        store.publish([waits, Publication("outbox", tried, tomorrow)])
        now = int(time.time() * 1000)
        assert sum(store.hasten("outbox", now)) == 2
        assert sum(store.hasten("outbox", now)) == 0
        entries = store.browse("outbox")
        assert [entry.due <= time.time() for entry in entries] == [True] * 3 + [False, True]
        assert entries[3].message.properties == delayed
        assert entries[4].message.properties == {
            "recipient": "a@b.test",
            "results": [{"attempt": 1}],
        }
        assert entries[4].message.body == MIME


def test_a_flush_leaves_what_is_damaged_to_the_daemon(directory: Path) -> None:
    with QueueFile.open(str(directory)) as store:
        store.connection.execute("UPDATE message SET properties = x'7b7d' WHERE due > ?", (2**40,))
        assert sum(store.hasten("outbox", int(time.time() * 1000))) == 0


def test_read_prints_the_documents_and_leaves_them(directory: Path) -> None:
    lines = run(directory, "queue", "read", "outbox").splitlines()
    assert json.loads(lines[0]) == {
        "envelope": "a@b.test",
        "recipient": "ann@d.test",
        "my-id": 7,
        "mime": MIME.decode(),
    }
    assert len(lines) == 3
    assert len(run(directory, "queue", "read", "outbox").splitlines()) == 3


def test_read_hides_the_password_of_a_smarthost_from_people(tmp_path: Path) -> None:
    smarthost = {"hostname": "relay.test", "username": "ann", "password": "s3cret"}
    with QueueFile.open(str(tmp_path)) as store:
        message = Message({"recipient": "r@a.test", "smarthost": smarthost}, MIME)
        store.publish([Publication("outbox", message)])
    assert json.loads(run(tmp_path, "queue", "read", "outbox"))["smarthost"] == smarthost
    for words, password in (
        ((), "(hidden)"), (("--json",), "s3cret"), (("--remove",), "s3cret")
    ):  # fmt: skip
        document = json.loads(on_terminal(tmp_path, "queue", "read", "outbox", *words))
        assert document["smarthost"] == {**smarthost, "password": password}
    for command in ("show", "list", "count"):
        assert "s3cret" not in run(tmp_path, "queue", command)


def on_terminal(directory: Path, *arguments: str) -> str:
    """What a command writes to a terminal."""
    master, slave = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mailerq", *arguments, f"--queue-directory={directory}"],
            stdout=slave,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
            timeout=60,
            check=True,
        )
        assert done.returncode == 0
        return os.read(master, 1 << 16).decode()
    finally:
        os.close(master)
        os.close(slave)


def test_read_takes_what_it_printed_when_told_to(directory: Path) -> None:
    shown = run(directory, "queue", "show", "outbox", "--json").splitlines()
    number = str(json.loads(shown[1])["id"])
    (line,) = run(directory, "queue", "read", "outbox", number, "--remove").splitlines()
    assert json.loads(line)["recipient"] == "bob@d.test"
    assert run(directory, "queue", "read", "outbox", number, status=os.EX_DATAERR) == (
        f"mailerq: there is no message {number} in outbox\n"
    )
    assert len(run(directory, "queue", "read", "outbox", "--remove").splitlines()) == 2
    assert run(directory, "queue", "read", "outbox") == ""


def test_purge_wants_a_yes(directory: Path) -> None:
    assert "say --yes" in run(directory, "queue", "purge", "outbox", status=os.EX_USAGE)
    assert run(directory, "queue", "purge", "outbox", "--yes") == "3 messages deleted from outbox\n"
    assert json.loads(run(directory, "queue", "purge", "outbox", "--yes", "--json")) == {
        "queue": "outbox",
        "deleted": 0,
    }


@pytest.mark.parametrize(("answer", "left"), [(b"y\n", 0), (b"\n", 3)])
def test_purge_has_nothing_open_while_it_waits_for_an_answer(
    directory: Path, answer: bytes, left: int
) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "mailerq", "queue", "purge", "outbox"]
    try:
        with subprocess.Popen(
            [*command, f"--queue-directory={directory}"],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
        ) as process:
            assert process.stderr is not None
            prompt = b""
            while not prompt.endswith(b"[y/N] ") and (data := process.stderr.read1()):
                prompt += data
            try:
                assert prompt == b"Delete all 3 messages of outbox for good? [y/N] "
                open_exclusive(str(directory)).close()  # As a process that comes back.
            finally:
                os.write(ours, answer)
                process.communicate()
        assert process.returncode == (1 if left else 0)
    finally:
        os.close(ours)
        os.close(theirs)
    with QueueFile.open(str(directory)) as store:
        assert sum(depth.total for depth in store.depths()) == left


@pytest.fixture
def shares(tmp_path: Path) -> Path:
    """A queue directory with three shares, of which each has five messages."""
    for share in (0, 2, 10):
        with QueueFile.open(share_directory(str(tmp_path / "queue"), share)) as store:
            store.publish(
                Publication("outbox", Message({"recipient": f"s{share}-{number}@d.test"}, MIME))
                for number in range(5)
            )
    return tmp_path / "queue"


def queue(directory: Path, *arguments: str, status: int = 0) -> list[Any]:
    """Run a queue command: the documents that it prints, or what it complains of."""
    done = mailerq("queue", *arguments, "--json", f"--queue-directory={directory}")
    assert done.returncode == status, done.stderr
    lines = (done.stdout if status == 0 else done.stderr).decode().splitlines()
    return lines if status else [json.loads(line) for line in lines]


def test_queue_commands_see_all_shares_as_one(shares: Path) -> None:
    assert queue(shares, "list", "--rabbitmq-failure=") == [
        [{"queue": "outbox", "due": 15, "delayed": 0, "held": 0, "total": 15}]
    ]  # fmt: skip
    shown = queue(shares, "show", "outbox")
    ids = [entry["id"] for entry in shown]
    assert ids == sorted(set(ids))
    assert [entry["recipient"] for entry in shown] == [
        f"s{share}-{number}@d.test" for share in (0, 2, 10) for number in range(5)
    ]
    # Page by page, as a program does: each id once, over the ends of shares.
    paged: list[int] = []
    while page := queue(shares, "show", "outbox", "--limit=4", f"--after={max([0, *paged])}"):
        assert len(page) <= 4
        paged += [entry["id"] for entry in page]
    assert paged == ids
    assert [entry["recipient"] for entry in queue(shares, "read", "outbox", "--limit=7")] == [
        entry["recipient"] for entry in shown[:7]
    ]
    after = queue(shares, "read", "outbox", f"--after={ids[12]}")
    assert [entry["recipient"] for entry in after] == ["s10-3@d.test", "s10-4@d.test"]


def test_queue_read_takes_messages_out_of_the_share_that_has_them(shares: Path) -> None:
    shown = queue(shares, "show", "outbox")
    of = {entry["recipient"].partition("@")[0]: str(entry["id"]) for entry in shown}
    asked = [of["s10-1"], of["s0-4"], of["s2-0"]]
    found = queue(shares, "read", "outbox", *asked, "--remove")
    names = [document["recipient"].partition("@")[0] for document in found]
    assert names == ["s0-4", "s2-0", "s10-1"]
    for asked_again in asked:
        (line,) = queue(shares, "read", "outbox", asked_again, status=os.EX_DATAERR)
        assert line == f"mailerq: there is no message {asked_again} in outbox"
    left = [entry["recipient"].partition("@")[0] for entry in queue(shares, "show", "outbox")]
    assert left == [name for name in of if name not in names]
    taken = queue(shares, "read", "outbox", "--limit=6", "--remove")
    assert [document["recipient"].partition("@")[0] for document in taken] == left[:6]
    assert queue(shares, "purge", "outbox", "--yes") == [{"queue": "outbox", "deleted": 6}]
    assert queue(shares, "show", "outbox") == []


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**30, "x"])
def test_an_id_that_no_message_can_have_is_wrong_usage(shares: Path, number: int | str) -> None:
    for arguments in (["show", "outbox", f"--after={number}"], ["read", "outbox", f" {number}"]):
        *_, line, hint = queue(shares, *arguments, status=os.EX_USAGE)
        assert "Try 'mailerq queue" in hint
        assert "is not an id" in line
    assert queue(shares, "show", "outbox", f"--after={2**63 - 1}") == []


def test_a_queue_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    text = run(tmp_path / "no", "queue", "list", status=os.EX_UNAVAILABLE)
    assert text == f"mailerq: there is no queue in {tmp_path}/no; set queue-directory?\n"
    run(tmp_path, "queue", "list", status=os.EX_UNAVAILABLE)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    run(tmp_path / "file", "queue", "list", status=os.EX_UNAVAILABLE)


def test_a_queue_of_somebody_else_is_not_called_missing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stat(path: str) -> None:  # as for all but root, where the directory may not be entered
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        status = main(["queue", "list", f"--queue-directory={directory}"])
    assert status == os.EX_NOPERM
    assert f"you may not use the queue in {directory}" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["0", "-5", "many"])
def test_a_limit_is_a_positive_number(directory: Path, limit: str) -> None:
    text = run(directory, "queue", "show", "outbox", f"--limit={limit}", status=os.EX_USAGE)
    assert f"argument --limit: '{limit}' is not a positive number" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["queue"], "mailerq queue: the following arguments are required: COMMAND\n"),
        (["queue", "burn"], "mailerq queue: argument COMMAND: invalid choice: 'burn'"),
        (["queue", "list", "-x"], "mailerq queue: unrecognized arguments: -x\n"),
        (["queue", "read"], "mailerq queue read: the following arguments are required: QUEUE, ID"),
        (["status", "now"], "mailerq status: unrecognized arguments: now\n"),
        (["config", "smpt"], "mailerq config: there is no setting smpt\n"),
        (["burn"], "mailerq: there is no command 'burn'; an address needs an @\n"),
    ],
)
def test_wrong_usage_exits_64(tmp_path: Path, arguments: list[str], text: str) -> None:
    assert run(tmp_path, *arguments, status=os.EX_USAGE).startswith(text)


def test_an_unknown_setting_on_the_command_line_exits_2_as_one_in_a_file(tmp_path: Path) -> None:
    text = "mailerq: --smtp-prt: unknown setting; did you mean --smtp-port?\n"
    assert run(tmp_path, "--smtp-prt=1", status=2) == text


def test_config_says_where_each_value_came_from(tmp_path: Path) -> None:
    file = tmp_path / "mailerq.txt"
    file.write_text("# a comment\nsmtp-port: 2525, 2526\nsmtp-password: hush\nsmtp-username: u\n")
    done = mailerq(
        "config", "--config-file", str(file), "--smtp-threads=3", env={"MAILERQ_MAX_ATTEMPTS": "9"}
    )
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.decode().splitlines()}
    assert lines["smtp-port"] == ["2525,2526", f"{file}:2"]
    assert lines["smtp-threads"] == ["3", "--smtp-threads"]
    assert lines["max-attempts"] == ["9", "MAILERQ_MAX_ATTEMPTS"]
    assert lines["smtp-maxsize"] == ["100MB", "default"]
    assert b"hush" not in done.stdout


def test_config_for_programs_has_the_types(tmp_path: Path) -> None:
    document = json.loads(run(tmp_path, "config", "--json", "smtp-port", "smtp-extract", "user"))
    assert document == {
        "smtp-port": {"value": [25], "origin": "default"},
        "smtp-extract": {"value": ["safe"], "origin": "default"},
        "user": {"value": "", "origin": "default"},
    }


@pytest.mark.parametrize(("command", "status"), [(["check-config"], 1), ([], 2), (["status"], 2)])
def test_a_wrong_configuration_is_told_by_its_lines(
    tmp_path: Path, command: list[str], status: int
) -> None:
    file = tmp_path / "mailerq.txt"
    file.write_text("smtp-port: 2525\nsmpt-ip: 127.0.0.1\nsmtp-threads: 0\n")
    done = mailerq(*command, f"--config-file={file}", f"--queue-directory={tmp_path}")
    assert done.returncode == status
    assert done.stderr.decode().splitlines()[:2] == [
        f"mailerq: {file}:2: unknown setting 'smpt-ip'; did you mean smtp-ip?",
        f"mailerq: {file}:3: smtp-threads: 0 is less than 1",
    ]


def test_status_without_a_daemon_exits_69(tmp_path: Path) -> None:
    text = run(tmp_path, "status", status=os.EX_UNAVAILABLE)
    assert text == f"mailerq: no daemon answers on {tmp_path}: No such file or directory\n"


def test_status_shows_what_the_daemon_says(tmp_path: Path) -> None:
    requests = []

    def answer() -> None:
        connection, _ = listening.accept()
        with connection:
            requests.append(connection.recv(1000))
            connection.sendall(b'{"pid":7,"incoming":{"open":2},"listening":["a:1","b:2"]}\n')

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "control"))
        listening.listen()
        listening.settimeout(30)
        for _ in range(2):
            thread = threading.Thread(target=answer)
            thread.start()
            if len(requests) == 0:
                text = run(tmp_path, "status")
            else:
                document = json.loads(run(tmp_path, "status", "--json"))
            thread.join()
    assert requests == [b'{"command": "status"}\n'] * 2
    assert [line.split() for line in text.splitlines()] == [
        ["WHAT", "VALUE"],
        ["pid", "7"],
        ["incoming.open", "2"],
        ["listening", "a:1,", "b:2"],
    ]
    assert document == {"pid": 7, "incoming": {"open": 2}, "listening": ["a:1", "b:2"]}


def test_help_lists_every_setting_in_its_group() -> None:
    done = mailerq("--help")
    text = done.stdout.decode()
    assert done.returncode == 0
    assert "\nSMTP server:\n" in text
    assert "--smtp-port ports" in text
    assert "mailerq queue" in text


def test_version() -> None:
    done = mailerq("--version")
    assert done.stdout.decode().startswith("mailerq 0.")
