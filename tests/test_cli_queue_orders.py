"""``mailerq queue count``, ``hold``, ``delete`` and the others, where no daemon runs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from mailerq.message import Message, format_time
from mailerq.queues import Publication
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.shares import share_directory
from mailerq.queues.ownership import DirectoryLock
from tests.support import mailerq

MIME = b"Subject: hi\r\n\r\nhello\r\n"

SHARES = (0, 3)

ERROR = {"attempt": 1, "type": "error", "code": 450, "status": "4.2.0", "description": "Not now"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two shares with four messages each: to two domains, half of them tried and waiting."""
    for share in SHARES:
        with QueueFile.open(share_directory(str(tmp_path), share)) as file:
            file.publish(_mails(share))
    return tmp_path


def _mails(share: int) -> list[Publication]:
    now = time.time()
    publications = []
    for number in range(4):
        properties: dict[str, Any] = {
            "envelope": f"news-{share}@s.test",
            "recipient": f"r{number}@{'ab'[number % 2]}.test",
            "tags": [f"run-{number}"],
            "received": format_time(now - 3600 * (number + 1)),
        }
        if number < 2:
            properties["results"] = [ERROR]
        publications.append(
            Publication("outbox", Message(properties, MIME), now + 600 if number < 2 else None)
        )
    return publications


def run(directory: Path, *arguments: str, status: int = 0) -> str:
    done = mailerq("queue", *arguments, f"--queue-directory={directory}", "--hostname=mx.test")
    assert done.returncode == status, done.stderr.decode()
    return (done.stdout if status == 0 else done.stderr).decode()


def documents(directory: Path, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(directory, *arguments, "--json").splitlines()]


def shown(directory: Path, *arguments: str) -> list[str]:
    """The recipients that `queue show` finds, without their domains."""
    found = documents(directory, "show", *arguments)
    return [entry["recipient"].partition("@")[0] for entry in found]


@pytest.mark.parametrize(
    ("criteria", "expected"),
    [
        (["--domain=A.test"], ["r0", "r2"]),
        (["--domain=a.test", "--domain=b.test"], ["r0", "r1", "r2", "r3"]),
        (["--domain=a.test", "--tag=run-2"], ["r2"]),
        (["--recipient=r1@b.test", "--recipient=r2@*"], ["r1", "r2"]),
        (["--error=not NOW"], ["r0", "r1"]),
        (["--older=2h", "--younger", "210m"], ["r1", "r2"]),
        (["--held"], []),
        (["--not-held", "--tag=run-*"], ["r0", "r1", "r2", "r3"]),
    ],
)
def test_show_and_count_select_in_all_shares(
    directory: Path, criteria: list[str], expected: list[str]
) -> None:
    assert shown(directory, *criteria) == expected * len(SHARES)
    count = len(expected) * len(SHARES)
    assert run(directory, "count", *criteria) == f"{count}\n"
    assert documents(directory, "count", *criteria) == [{"queue": "outbox", "count": count}]
    assert shown(directory, *criteria, "--limit=3") == (expected * len(SHARES))[:3]


def test_messages_are_selected_by_id_and_sender(directory: Path) -> None:
    entries = documents(directory, "show", "--sender=news-3@*")
    assert len(entries) == 4
    ids = [f"--id={entry['id']}" for entry in entries[:2]]
    assert shown(directory, *ids) == ["r0", "r1"]
    assert shown(directory, *ids, "--tag=run-1") == ["r1"]
    assert run(directory, "count", "--sender=<>") == "0\n"
    after = f"--after={entries[1]['id']}"
    assert shown(directory, "--sender=news-3@s.test", after) == ["r2", "r3"]


def test_held_mail_is_shown_as_held_and_is_due_again_after_its_release(directory: Path) -> None:
    before = documents(directory, "show")
    assert run(directory, "hold", "--domain=a.test") == "4 messages of outbox were held\n"
    assert run(directory, "hold", "--domain=a.test") == "0 messages of outbox were held\n"
    assert [entry["held"] for entry in documents(directory, "show")] == [True, False] * 4
    assert [{**entry, "held": False} for entry in documents(directory, "show")] == before
    lines = run(directory, "show", "--held").splitlines()
    assert [line.split()[1] for line in lines] == ["DUE", *["held"] * 4]
    assert documents(directory, "show", "--destinations")[0] == {
        "destination": "a.test", "due": 0, "delayed": 0, "held": 4, "total": 4, "first": None
    }  # fmt: skip
    (rows,) = documents(directory, "list", "--rabbitmq-failure=")
    assert rows == [{"queue": "outbox", "due": 2, "delayed": 2, "held": 4, "total": 8}]
    assert run(directory, "retry", "--all") == "2 messages of outbox were made due now\n"
    assert run(directory, "count", "--held") == "4\n"
    assert run(directory, "release", "--limit=3", "--all") == "3 messages of outbox were released\n"
    assert run(directory, "release", "--all") == "1 messages of outbox were released\n"
    now = {entry["id"]: entry["due"] for entry in documents(directory, "show", "--domain=a.test")}
    assert now == {
        entry["id"]: entry["due"] for entry in before if entry["recipient"].endswith("@a.test")
    }


def test_delete_asks_and_deletes_the_bodies_too(directory: Path) -> None:
    said = run(directory, "delete", "--tag=run-1", status=os.EX_USAGE)
    assert "delete is for good: say --yes, or answer on a terminal" in said
    assert "select some, or say --all" in run(directory, "delete", "--yes", status=os.EX_USAGE)
    assert run(directory, "delete", "--tag=run-1", "--yes") == "2 messages of outbox were deleted\n"
    assert shown(directory) == ["r0", "r2", "r3"] * 2
    for share in SHARES:
        with QueueFile.open(share_directory(str(directory), share)) as file:
            assert file.connection.execute("SELECT count(*) FROM body").get == 3


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["hold", "--all"], 8),
        (["hold", "--domain=a.test", "--limit=3"], 3),
        (["release", "--all"], 0),
        (["retry", "--all"], 4),
        (["delete", "--all"], 8),
        (["bounce", "--tag=run-0"], 2),
        (["reroute", "--via=relay.test", "--all"], 8),
    ],
)
def test_a_dry_run_says_how_many_and_changes_nothing(
    directory: Path, words: list[str], count: int
) -> None:
    before = run(directory, "read", "outbox"), run(directory, "show")
    (reply,) = documents(directory, *words, "--dry-run")
    assert reply == {
        "queue": "outbox", "action": words[0], "selected": count, "done": count, "under_way": 0,
        "dry_run": True,
    }  # fmt: skip
    assert f"{count} messages of outbox would be" in run(directory, *words, "--dry-run")
    assert (run(directory, "read", "outbox"), run(directory, "show")) == before
    yes = ["--yes"] if words[0] in ("delete", "bounce") else []
    (reply,) = documents(directory, *words, *yes)
    assert (reply["selected"], reply["done"], reply["dry_run"]) == (count, count, False)


def test_a_bounce_leaves_a_document_in_the_queue_for_failures(directory: Path) -> None:
    options = ("--tag=run-0", "--yes", "--reason=a wrong list", "--rabbitmq-failure=failed")
    assert run(directory, "bounce", *options) == "2 messages of outbox were bounced\n"
    assert "r0" not in shown(directory)
    for document in documents(directory, "read", "failed"):
        assert document["recipient"] == "r0@a.test"
        *_, result = document["results"]
        assert (result["attempt"], result["code"], result["status"]) == (2, 554, "5.7.1")
        assert result["description"].endswith(": a wrong list")
        assert "mime" not in document


def test_a_bounce_keeps_the_mail_where_it_is_wanted(tmp_path: Path) -> None:
    with QueueFile.open(str(tmp_path)) as file:
        message = Message({"recipient": "a@b.test", "keepmime": True}, MIME)
        file.publish([Publication("outbox", message)])
    run(tmp_path, "bounce", "--all", "--yes", "--rabbitmq-failure=f", "--rabbitmq-results=r")
    for queue in ("f", "r"):
        (document,) = documents(tmp_path, "read", queue)
        assert document["mime"] == MIME.decode()


def test_arguments_that_are_no_utf8_are_taken_as_they_look(directory: Path) -> None:
    options = ("--tag=run-0", "--yes", "--reason=why\udcff", "--rabbitmq-failure=failed")
    assert run(directory, "bounce", *options) == "2 messages of outbox were bounced\n"
    for document in documents(directory, "read", "failed"):
        assert document["results"][-1]["description"].endswith(": why\\udcff")
    assert run(directory, "hold", "--tag=\udcff") == "0 messages of outbox were held\n"
    said = run(directory, "show", "\udcff", status=os.EX_DATAERR)
    assert "there is no queue \\udcff" in said


def test_rerouted_mail_lies_under_its_new_host_with_its_body(directory: Path) -> None:
    options = ("--domain=a.test", "--via=[2001:db8::1]:2525")
    assert run(directory, "reroute", *options) == "4 messages of outbox were rerouted\n"
    keys = [row["destination"] for row in documents(directory, "show", "--destinations")]
    assert keys == ["b.test", "via 2001:db8::1:2525"]
    assert shown(directory, "--domain=a.test") == ["r0", "r2"] * 2
    found = documents(directory, "read", "outbox")
    assert {document["mime"] for document in found} == {MIME.decode()}
    assert found[0]["smarthost"] == {"hostname": "2001:db8::1", "port": 2525}
    run(directory, "reroute", "--all", "--direct")
    keys = [row["destination"] for row in documents(directory, "show", "--destinations")]
    assert keys == ["a.test", "b.test"]
    run(directory, "reroute", "--tag=run-0", "--via=relay.test")
    keys = [row["destination"] for row in documents(directory, "show", "--destinations")]
    assert keys == ["a.test", "b.test", "via relay.test:25"]


def test_mail_moves_to_another_queue_and_back(directory: Path) -> None:
    run(directory, "hold", "--domain=a.test")
    before = documents(directory, "read", "outbox")
    run(directory, "reroute", "--domain=a.test", "--to-queue=parked")
    assert len(documents(directory, "read", "parked")) == 4
    assert run(directory, "count", "parked", "--held") == "0\n"
    assert run(directory, "count", "parked", "--domain=a.test") == "4\n"
    run(directory, "reroute", "--queue=parked", "--all", "--to-queue=outbox")
    assert documents(directory, "read", "outbox") == before
    assert run(directory, "count", "--domain=a.test") == "4\n"
    keys = [row["destination"] for row in documents(directory, "show", "--destinations")]
    assert keys == ["a.test", "b.test"]
    run(directory, "delete", "--queue=outbox", "--all", "--yes")
    assert run(directory, "count") == "0\n"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["hold"], "which messages? select some, or say --all"),
        (["retry", "--limit=3"], "which messages?"),
        (["hold", "--older=soon"], "'soon' is not an age such as 90s, 30m, 2h or 7d"),
        (["hold", "--id=x"], "'x' is not an id"),
        (["hold", "--held", "--not-held"], "not allowed with argument --held"),
        (["reroute", "--all"], "one of the arguments --via --direct --to-queue is required"),
        (["reroute", "--all", "--via=relay.test:0"], "argument --via: 0 is no port"),
        (["reroute", "--all", "--via=a b"], "argument --via: "),
        (["reroute", "--all", "--to-queue="], "argument --to-queue: the name is empty"),
        (["hold", "--all", "--queue=results"], "unrecognized arguments: --queue=results"),
    ],
)
def test_wrong_usage_changes_nothing(directory: Path, words: list[str], text: str) -> None:
    before = run(directory, "show")
    assert text in run(directory, *words, status=os.EX_USAGE)
    assert run(directory, "show") == before


def test_a_queue_that_is_not_there_has_nothing_to_count(directory: Path) -> None:
    assert "there is no queue outbx" in run(directory, "count", "outbx", status=os.EX_DATAERR)


def test_the_application_log_has_who_did_what_and_why(directory: Path) -> None:
    log = directory / "application.log"
    options = ("--tag=run-2", "--reason=\x1bup", f"--application-log=stderr,{log}")
    run(directory, "hold", *options)
    run(directory, "delete", "--held", "--yes", f"--application-log={log}")
    run(directory, "delete", "--all", "--dry-run", f"--application-log={log}")
    lines = [line.partition("] ")[2].partition("] ")[2] for line in log.read_text().splitlines()]
    assert [line.partition(": ")[2] for line in lines] == [
        "hold in outbox: 2 messages (tag run-2); reason: \\x1bup",
        "hold in outbox: 2 of 2 messages were held; reason: \\x1bup",
        "delete in outbox: 2 messages (held)",
        "delete in outbox: 2 of 2 messages were deleted",
    ]
    assert all(line.partition(": ")[0] for line in lines)


def test_a_share_of_a_process_that_does_not_answer_stays_as_it_is(directory: Path) -> None:
    before = run(directory, "show")
    lock = DirectoryLock.take(str(directory))
    try:
        said = run(directory, "hold", "--all", status=os.EX_TEMPFAIL)
    finally:
        lock.release()
    assert f"process {os.getpid()} delivers from {directory}, and does not answer" in said
    assert run(directory, "show") == before


def test_a_damaged_message_stays_for_the_daemon_but_can_be_deleted(directory: Path) -> None:
    with QueueFile.open(str(directory)) as file:
        file.connection.execute("UPDATE message SET properties = x'7b' WHERE id = 1")
    assert documents(directory, "reroute", "--all", "--direct")[0]["done"] == 7
    said = run(directory, "bounce", "--id=1", "--yes")
    assert said == "0 messages of outbox were bounced; 1 had changed or gone meanwhile\n"
    assert run(directory, "delete", "--id=1", "--yes") == "1 messages of outbox were deleted\n"
