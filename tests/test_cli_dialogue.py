"""``sendmail -bs``: a program speaks SMTP to a pipe, and what got a 250 is in the queue."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mailerq.message import Message
from mailerq.queues.embedded.queue_file import Store
from tests.support import ROOT, mailerq, without_received
from tests.test_cli_daemon import daemon

MAIL = b"Subject: x\r\nMessage-ID: <1@b.test>\r\n\r\nhello\r\n..\r\n"


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    directory = tmp_path / "queue"
    directory.mkdir()
    return directory


def speak(queue: Path, said: bytes, *settings: str) -> list[str]:
    """The codes of the replies, the last line of each."""
    here = (f"--queue-directory={queue}", "--hostname=mx.test")
    done = mailerq("-bs", *here, *settings, input=said)
    assert (done.returncode, done.stderr) == (0, b"")
    return [line for line in done.stdout.decode().splitlines() if line[3] == " "]


def kept(queue: Path) -> list[Message]:
    with Store.open(str(queue)) as store:
        return [entry.message for entry in store.browse("outbox")]


def test_a_session_on_a_pipe_leaves_its_mail_in_the_queue(queue: Path) -> None:
    said = (
        b"EHLO me\r\nMAIL FROM:<a@b.test> BODY=8BITMIME\r\nRCPT TO:<c@d.test>\r\n"
        b"RCPT TO:<e@f.test>\r\nDATA\r\n" + MAIL + b".\r\nQUIT\r\n"
    )
    replies = speak(queue, said)
    assert [int(reply[:3]) for reply in replies] == [220, 250, 250, 250, 250, 354, 250, 221]
    ann, bob = kept(queue)
    assert (ann.envelope, ann.recipient, bob.recipient) == ("a@b.test", "c@d.test", "e@f.test")
    assert ann.properties["cli"]["arguments"][0] == "-bs"
    assert ann.body is not None
    assert without_received(ann.body) == MAIL.replace(b"\r\n..\r\n", b"\r\n.\r\n")


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_all_of_it_may_come_at_once_and_lines_may_end_with_lf(queue: Path, end: bytes) -> None:
    one = [b"MAIL FROM:<>", b"RCPT TO:<c@d.test>", b"DATA", b"Subject: x", b"", b"y" * 100_000]
    said = end.join([b"HELO me", *one, b".", *one, b".", b"QUIT", b""])
    replies = speak(queue, said)
    codes = " ".join(reply[:3] for reply in replies)
    assert codes == "220 250 250 250 354 250 250 250 354 250 221"
    assert len(kept(queue)) == 2


def test_a_mail_that_ends_early_is_not_taken(queue: Path) -> None:
    speak(queue, b"HELO me\r\nMAIL FROM:<>\r\nRCPT TO:<c@d.test>\r\nDATA\r\nSubject: x\r\n\r\ny")
    assert kept(queue) == []


def test_what_the_settings_bound_is_bound_here_too(queue: Path) -> None:
    said = (
        b"EHLO me\r\nMAIL FROM:<>\r\nRCPT TO:<c@d.test>\r\nRCPT TO:<e@f.test>\r\nDATA\r\n"
        b"x: y\r\n\r\n"
        + b"z" * 1000
        + b"\r\n.\r\nMAIL FROM:<> SIZE=501\r\nSTARTTLS\r\nAUTH PLAIN\r\n"
    )
    replies = speak(queue, said, "--smtp-maxsize=500", "--smtp-maxrecipients=1")
    assert [int(reply[:3]) for reply in replies[2:]] == [250, 250, 452, 354, 552, 552, 502, 502]
    assert kept(queue) == []


def test_a_looping_mail_and_a_queue_that_cannot_keep_are_replies(queue: Path) -> None:
    head = b"HELO me\r\nMAIL FROM:<>\r\nRCPT TO:<c@d.test>\r\nDATA\r\n"
    assert "554 5.6.0" in speak(queue, head + b"Received: x\r\n" * 100 + b"\r\n.\r\n")[-1]
    (queue / "queue.db").write_bytes(b"no database" * 100)
    assert speak(queue, head + b"\r\n.\r\n")[-1].startswith("451 4.3.0 ")


def test_without_the_right_to_the_queue_it_goes_through_the_port(tmp_path: Path) -> None:
    head = b"HELO me\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\n"
    with daemon(tmp_path, "--rabbitmq-inbox=inbox") as running:
        there = ("--smtp-ip=127.0.0.1", f"--smtp-port={running.port}")
        said = head + b"DATA\r\n" + MAIL + b".\r\n"
        assert speak(tmp_path / "missing", said, *there)[-1].startswith("250 ")
    with Store.open(str(tmp_path / "queue")) as store:
        (entry,) = store.browse("inbox")
    assert entry.message.properties["connection"]["remote-ip"] == "127.0.0.1"
    assert speak(tmp_path / "missing", said, *there)[-1].startswith("451 4.3.0 the mail cannot")


def test_a_client_library_can_talk_to_it(queue: Path) -> None:
    command = [sys.executable, "-m", "mailerq", "-bs", f"--queue-directory={queue}"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"220 ")
        for line, code in ((b"HELO me", b"250"), (b"VRFY x", b"252"), (b"QUIT", b"221")):
            process.stdin.write(line + b"\r\n")
            process.stdin.flush()
            assert process.stdout.readline().startswith(code)
        assert process.wait(30) == os.EX_OK
