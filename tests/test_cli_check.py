"""``mailerq check``: all that is wrong with a document or a mail is said, with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mailerq.message import NESTING_LIMIT, PROPERTIES_LIMIT
from tests.support import mailerq

NESTED = (NESTING_LIMIT + 1) * "[" + (NESTING_LIMIT + 1) * "]"
GOOD = {"envelope": "a@b.test", "recipient": "c@d.test", "mime": "Subject: x\r\n\r\nhi\r\n"}


@pytest.fixture
def check(tmp_path: Path) -> Any:
    def run(data: bytes, *options: str) -> tuple[int, list[str]]:
        file = tmp_path / "data"
        file.write_bytes(data)
        done = mailerq("check", str(file), "--hostname=mx.test", *options)
        assert done.stderr == b""
        head, *lines = done.stdout.decode().splitlines()
        assert head.startswith(f"{file}: ")
        return done.returncode, [line.strip() for line in lines]

    return run


def document(**more: Any) -> bytes:
    return json.dumps({**GOOD, **more}).encode()


def test_a_good_document_is_good(check: Any) -> None:
    assert check(document()) == (0, [])
    assert check(json.dumps(GOOD, indent=4).encode()) == (0, [])
    assert check(document(**{"größe": 7, "my id": 7})) == (
        0,
        [
            "note: property größe: is not known and travels untouched",
            "note: property 'my id': is not known and travels untouched",
        ],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"recipient": ""}, "property recipient: is missing"),
        ({"recipient": "nobody"}, "property recipient: "),
        ({"envelope": "nobody"}, "property envelope: "),
        ({"ips": ["mx.test"]}, "property ips: 'mx.test' is no IP address"),
        ({"pool": "bulk"}, "property pool: addresses-file has no pool 'bulk'"),
        ({"smarthost": {"port": 25}}, "property smarthost: has no hostname"),
        ({"smarthost": {"hostname": "h.test", "port": "x"}}, "property smarthost: port is no"),
        (
            {"maxdelivertime": "2001-01-01 00:00:00"},
            "property maxdelivertime: 2001-01-01",
        ),
        (
            {"delayed": "9999-01-01 00:00:01", "maxdelivertime": "9999-01-01 00:00:00"},
            "property maxdelivertime: 9999-01-01 00:00:00 is over",
        ),
        ({"delayed": "soon"}, "property delayed: 'soon' is not a time"),
        (
            {"smarthost": {"name": "h.test", "secure": "strong"}},
            "property smarthost: secure is none of none, opp",
        ),
        ({"mime": {"subject": 1}}, "property mime.subject: expected a string"),
        ({"mime": "A: b\r\n\r\n{if $x}", "data": {}}, "the text/plain part: line 1: {if} is not"),
        ({"mime": None}, "property mime: is missing"),
        ({"mime": "Received: x\r\n" * 101 + "\r\n"}, "property mime: has more than 100 Received"),
        ({"queues": {"results": "outbox"}}, "property queues: outbox is the outbox"),
        (
            {"data": json.loads((NESTING_LIMIT + 1) * "[" + (NESTING_LIMIT + 1) * "]")},
            "objects and",
        ),
        ({"x": PROPERTIES_LIMIT * "x"}, "has more than 1048576 bytes of properties"),
    ],
)
def test_what_would_fail_is_an_error(check: Any, more: dict[str, Any], text: str) -> None:
    status, lines = check(document(**more))
    assert status == 2
    assert lines[0].startswith(f"error: {text}")


def test_a_pool_of_the_file_is_good(check: Any, tmp_path: Path) -> None:
    file = tmp_path / "addresses.toml"
    file.write_text('[[pool]]\nname = "bulk"\naddresses = ["127.0.0.1"]\n')
    settings = ("--addresses-file", str(file), "--local-delivery=lmtp://127.0.0.1:24")
    settings = (*settings, "--smtp-local-domains=here.test")
    assert check(document(pool="bulk"), *settings) == (0, [])
    status, lines = check(document(pool="bulks"), *settings)
    assert (status, lines) == (2, ["error: property pool: addresses-file has no pool 'bulks'"])
    # Mail for a mailbox server leaves from no pool.
    assert check(document(pool="bulks", recipient="c@here.test"), *settings) == (0, [])


@pytest.mark.parametrize(
    "data", [b"{", b'{"a":}', b"[1]", b"  [", b'{"a":"\xff"}', b"\xef\xbb\xbf{}"]
)
def test_what_is_no_document_is_an_error(check: Any, data: bytes) -> None:
    status, lines = check(data)
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(("error: not JSON", "error: a message is a JSON object, not list"))


def test_all_that_is_ignored_is_said_once(check: Any) -> None:
    more = {
        "Tags": ["a"],
        "checks": [],
        "queues": {"sucess": None, "dsn": "q", "other": "q"},
        "dsn": {"notify": "SOMETIMES", "ret": "HDRS"},
        "mime": "x-mq-tag: a\r\n\r\nhi",
    }
    assert check(document(**more)) == (
        1,
        [
            "warning: property Tags: is not known and changes nothing; is tags meant?",
            "warning: property queues.sucess: is not known and changes nothing;"
            " is queues.success meant?",
            "warning: property checks: has no effect yet",
            "warning: property queues: has the key other, which is not known",
            "warning: property dsn: its key notify has no valid form and is left out",
            "warning: property mime: has x-mq-* fields; they count in mail that comes in, and in a"
            " document they are sent as they are",
        ],
    )


def test_all_that_is_wrong_is_said_and_not_the_first_alone(check: Any) -> None:
    status, lines = check(document(tags="a", retries="b", queues={"retry": "outbox"}))
    assert status == 2
    assert [line.partition(": expected")[0] for line in lines] == [
        "error: property retries",
        "error: property tags",
        "error: property queues: outbox is the outbox, where a result would be sent as mail",
    ]


def test_documents_of_a_line_each_are_told_by_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "many"
    file.write_bytes(document() + b"\n\n" + document(tags="a") + b"\n")
    done = mailerq("check", "--json", str(file))
    assert done.returncode == 2
    assert [(each["file"], each["status"]) for each in json.loads(done.stdout)] == [
        (f"{file}:1", 0), (f"{file}:3", 2)
    ]  # fmt: skip


def test_fields_of_a_mail_are_checked_with_the_rights_of_their_sender(check: Any) -> None:
    mail = (
        b"x-mq-maxattempt: 7\nX-MQ-Tags: a\nx-mq-ip: here\nx-mq-results-queue: mine\n"
        b"x-mq-delayed: 9999-01-01 00:00:00\nx-mq-my-id: 7\nSubject: x\n\nhi\n"
    )
    tail = [
        "warning: x-mq-maxattempt: is not known and changes nothing; is x-mq-maxattempts meant?",
        "note: property my-id: is not known and travels untouched",
    ]
    assert check(mail) == (
        1,
        [
            "warning: ignored x-mq-tags: is no name for a property; is x-mq-tag meant?",
            "warning: ignored x-mq-ip: expected an IP address",
            tail[0],
            tail[1],
        ],
    )
    status, lines = check(mail, "--client", "--smtp-extract-range=127.0.0.0/8")
    assert status == 1
    assert [line.partition(" may")[0] for line in lines] == [
        "warning: ignored x-mq-tags: is no name for a property; is x-mq-tag meant?",
        "warning: ignored x-mq-ip:",
        "warning: ignored x-mq-results-queue:",
        "warning: ignored x-mq-delayed: is later than max-delivertime lets this client say",
        *tail,
    ]


def test_all_ignored_fields_are_named(check: Any) -> None:
    status, lines = check(b"x-mq-ip: ?\r\n" * 50 + b"\r\n")
    assert (status, len(lines)) == (1, 50)


def test_a_mail_without_fields_and_stdin(check: Any) -> None:
    assert check(b"Subject: x\r\n\r\nx-mq-tag: y\r\n") == (
        0, ["note: the mail has no x-mq-* fields"]
    )  # fmt: skip
    done = mailerq("check", input=document(tags=1))
    assert done.returncode == 2
    assert done.stdout.startswith(b"stdin: cannot be sent\n  error: property tags: expected")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    done = mailerq("check", str(tmp_path / "no\x1b"), str(tmp_path))
    assert done.returncode == 2
    assert b"no\\x1b: cannot be sent\n  error: No such file or directory\n" in done.stdout
    assert b"  error: Is a directory\n" in done.stdout
