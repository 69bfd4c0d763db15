"""``mailerq report parse``: what a mail would be recognised as."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from mailerq.mail import verp
from tests.mail import report_shapes as shapes
from tests.support import mailerq

KEY = "a AeJ2xBrJJPd1vlTV7pVf3OlB"


@pytest.fixture
def parse(tmp_path: Path) -> Any:
    file = tmp_path / "mail"

    def run(mail: bytes, *options: str) -> tuple[int, str]:
        file.write_bytes(mail)
        done = mailerq("report", "parse", str(file), "--hostname=mx.test", *options)
        assert done.stderr == b""
        return done.returncode, done.stdout.decode()

    return run


def test_a_report_is_printed(parse: Any) -> None:
    status, text = parse(shapes.POSTFIX)
    assert status == 0
    lines = text.splitlines()
    assert lines[0] == "delivery-status: A delivery status notification (RFC 3464)."
    assert "  recipient: ann@example.org" in lines
    assert "  original.subject: Grüße" in lines
    assert "  proved: false" in lines
    assert not lines[-1].startswith("can suppress")


def test_the_property_is_printed_as_json(parse: Any) -> None:
    status, text = parse(shapes.POSTFIX.replace(b"\r\n", b"\n"), "--json")
    assert status == 0
    value = json.loads(text)
    assert (value["type"], value["status"], value["envid"]) == (
        "delivery-status", "5.1.1", "campaign-77",
    )  # fmt: skip


def test_other_mail_is_none(parse: Any) -> None:
    mail = b"Return-Path: <a@b.test>\r\nSubject: hi\r\n\r\nhello\r\n"
    assert parse(mail) == (1, "no report\n")
    assert parse(mail, "--json") == (1, "null\n")


def test_a_null_sender_counts_alone_if_it_is_given(parse: Any) -> None:
    mail = b"Subject: hi\r\n\r\nhello\r\n"
    assert parse(mail) == (1, "no report\n")
    for given in (parse(mail, "--sender="), parse(b"Return-Path: <>\r\n" + mail)):
        assert (given[0], given[1].partition(":")[0]) == (0, "auto-reply")
        assert "  auto-submitted: null-sender\n" in given[1]


def test_a_proof_and_what_it_allows_are_printed(parse: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    address = verp.encode(
        "news@list.test", "ann@example.org", verp.parse_keys(KEY), now=time.time()
    )
    switches = (f"--recipient={address}", f"--verp-key-file={keys}")
    status, text = parse(shapes.POSTFIX, *switches)
    assert status == 0
    assert "  matched-by: verp\n  proved: true\n" in text
    assert text.endswith(
        "can suppress ann@example.org: hard bounce 5.1.1, reported by mx.example.org\n"
    )
    status, text = parse(b"Subject: hi\r\n\r\nhello\r\n", "--sender=a@b.test", *switches)
    assert (status, text.partition(":")[0]) == (0, "other")


def test_the_mail_may_come_by_standard_input() -> None:
    done = mailerq("report", "parse", "-", input=shapes.QMAIL)
    assert (done.returncode, done.stdout.partition(b":")[0]) == (0, b"bounce")


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    done = mailerq("report", "parse", str(tmp_path / "none"))
    assert done.returncode == 2
    assert b"No such file or directory" in done.stderr


def test_keys_that_cannot_be_read_prove_nothing(tmp_path: Path) -> None:
    done = mailerq("report", "parse", f"--verp-key-file={tmp_path / 'none'}", input=shapes.QMAIL)
    assert done.returncode == 0
    assert b"nothing can be proved: " in done.stderr
