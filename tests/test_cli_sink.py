"""``mailerq sink`` as users run it: a program, talked to by smtplib."""

from __future__ import annotations

import json
import os
import signal
import smtplib
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

MIME = b"Subject: hi\r\n\r\n.dot\r\n..two\r\n\xff\x00\r\n\r\n"


class Sink:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.port: int = self.line()["listening"][1]

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def connect(self) -> smtplib.SMTP:
        return smtplib.SMTP("127.0.0.1", self.port, local_hostname="client.test", timeout=60)

    def send(self, mime: bytes = MIME) -> None:
        with self.connect() as client:
            client.sendmail("a@b.test", ["c@d.test", "e@f.test"], mime, ["BODY=8BITMIME"])


@contextmanager
def sink(*arguments: str) -> Iterator[Sink]:
    command = [sys.executable, "-m", "mailerq", "sink", "--listen", "127.0.0.1:0", "--json"]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE) as process:
        try:
            yield Sink(process)
        finally:
            process.terminate()


def test_a_mail_is_filed_byte_for_byte_with_its_envelope_beside_it(tmp_path: Path) -> None:
    with sink("--directory", str(tmp_path / "new")) as running:
        running.send()
        line = running.line()
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(20) == 0
    (mail,) = (tmp_path / "new").glob("*.eml")
    assert mail.read_bytes() == MIME
    assert line["file"] == str(mail)
    envelope = json.loads(mail.with_suffix(".json").read_text())
    assert envelope["helo"] == "client.test"
    assert envelope["envelope"] == "a@b.test"
    assert envelope["recipients"] == ["c@d.test", "e@f.test"]
    assert envelope["size"] == len(MIME)
    assert sorted(path.suffix for path in mail.parent.iterdir()) == [".eml", ".json"]


def test_it_ends_after_its_count_of_mails(tmp_path: Path) -> None:
    with sink("--count", "2", "--directory", str(tmp_path)) as running:
        running.send()
        running.send()
        assert running.process.wait(20) == 0
    assert len(list(tmp_path.glob("*.eml"))) == 2


def test_replies_are_those_that_were_asked_for() -> None:
    with (
        sink(
            "--reply", "mail=250 2.1.0 welcome", "--reply", r"rcpt=450 4.7.1 wait\nand wait"
        ) as running,
        running.connect() as client,
    ):
        client.ehlo()
        assert client.mail("a@b.test") == (250, b"2.1.0 welcome")
        assert client.rcpt("c@d.test") == (450, b"4.7.1 wait\nand wait")


def test_the_banner_can_refuse() -> None:
    with sink("--reply", "connect=421 4.3.2 later") as running:
        with pytest.raises(smtplib.SMTPConnectError) as refused:
            running.connect()
        assert refused.value.smtp_code == 421


@pytest.mark.parametrize("event", ["connect", "ehlo", "mail", "rcpt", "data", "message"])
def test_connections_are_dropped_where_that_was_asked_for(event: str) -> None:
    lost = (smtplib.SMTPServerDisconnected, ConnectionError)
    with sink("--drop", event) as running, pytest.raises(lost):
        running.send()


def test_all_mails_fail_at_a_rate_of_one(tmp_path: Path) -> None:
    with sink("--fail-rate", "1", "--directory", str(tmp_path)) as running:
        with pytest.raises(smtplib.SMTPDataError) as failed:
            running.send()
        assert failed.value.smtp_code == 451
        assert running.line()["refused"] == 451
    assert list(tmp_path.iterdir()) == []


def test_a_reply_is_late_where_that_was_asked_for() -> None:
    with sink("--delay", "data=0.3") as running:
        started = time.monotonic()
        running.send()
        assert time.monotonic() - started >= 0.3


def test_people_get_a_line_for_each_mail_and_nothing_that_steers_a_terminal(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "mailerq", "sink", "--listen", "127.0.0.1:0", "--count", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().split(",")[0].rpartition(":")[2])
        with smtplib.SMTP("127.0.0.1", port, timeout=60) as client:
            client.sendmail("", ["c@d.test"], b"x\r\n")
        assert "<> -> <c@d.test>, 3 bytes: taken\n" in process.stdout.read()
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--reply", "rcpt=twice"], "argument --reply: 'twice' is not of the form 'CODE TEXT'"),
        (["--reply", "quit=250"], "argument --reply: 'quit' is none of connect, ehlo, mail"),
        (["--reply", "data=250 x"], "--reply data: 250 is no reply to that"),
        (["--fail-rate", "2"], "argument --fail-rate: '2' is not a number from 0 to 1"),
        (["--listen", "x"], "argument --listen: 'x' is not of the form HOST:PORT"),
        (["--smtp-port=1"], "--smtp-port=1: a sink has no settings"),
        (["--frob"], "unrecognized arguments: --frob"),
    ],
)
def test_wrong_usage_exits_64_and_says_why(arguments: list[str], text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mailerq", "sink", *arguments], capture_output=True, text=True
    )
    assert done.returncode == os.EX_USAGE
    assert done.stderr.startswith(f"mailerq sink: {text}")


def test_a_port_that_cannot_be_had_exits_69() -> None:
    with sink() as running:
        done = subprocess.run(
            [sys.executable, "-m", "mailerq", "sink", "--listen", f"127.0.0.1:{running.port}"],
            capture_output=True,
            text=True,
        )
    assert done.returncode == os.EX_UNAVAILABLE
    assert "in use" in done.stderr
