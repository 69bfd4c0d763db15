"""``mailerq rcpt@…`` as sendmail: what is read from stdin, whom it goes to, and which way."""

from __future__ import annotations

import getpass
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mailerq.cli import main
from mailerq.message import Message
from mailerq.queues.embedded.queue_file import Store
from tests.support import ROOT, closed_port, mailerq, without_received

MAIL = b"From: a@b.test\r\nTo: c@d.test\r\nDate: x\r\nMessage-ID: <1@b.test>\r\n\r\nhello\r\n"


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    directory = tmp_path / "queue"
    directory.mkdir()
    return directory


Inject = Callable[..., str]


@pytest.fixture
def inject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Inject:
    """Run the injector in this process; what it says, on stdout or else on stderr."""
    for name in [name for name in os.environ if name.startswith("MAILERQ_")]:
        monkeypatch.delenv(name)

    def run(directory: Path, *arguments: str, mail: bytes = MAIL, status: int = 0) -> str:
        (tmp_path / "stdin").write_bytes(mail)
        with open(tmp_path / "stdin") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            words = [*arguments, f"--queue-directory={directory}", "--hostname=mx.test"]
            try:
                found = main(words)
            except SystemExit as exit:
                found = exit.code
        said = capsys.readouterr()
        assert found == status, said.err
        return said.err if status else said.out

    return run


def kept(queue: Path, name: str = "outbox") -> list[Message]:
    with Store.open(str(queue)) as store:
        return [entry.message for entry in store.browse(name)]


def body(queue: Path) -> bytes:
    message, *_ = kept(queue)
    assert message.body is not None
    return without_received(message.body)


def test_a_mail_becomes_a_message_for_each_recipient(inject: Inject, queue: Path) -> None:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    assert inject(queue, "ann@a.test", "Bob <bob@b.test>, ann@a.test") == ""
    ann, bob = kept(queue)
    assert (ann.recipient, bob.recipient) == ("ann@a.test", "bob@b.test")
    assert ann.envelope == "a@b.test"
    assert ann.properties["received"] >= started
    assert ann.properties["hostname"] == "mx.test"
    assert ann.properties["message-id"] != bob.properties["message-id"]
    cli = ann.properties["cli"]
    assert cli["arguments"] == ["ann@a.test", "Bob <bob@b.test>, ann@a.test"]
    assert cli["user"] == getpass.getuser()
    assert cli["command"] == sys.argv[0]
    assert body(queue) == MAIL
    assert ann.body is not None
    assert ann.body.startswith(b"Received: by mx.test (from user ")
    assert b"for <" not in ann.body


def test_it_says_in_json_what_became_of_the_mail(inject: Inject, queue: Path) -> None:
    document = json.loads(inject(queue, "ann@a.test", "--json"))
    (message,) = kept(queue)
    assert document == {
        "via": "queue",
        "messages": [
            {"message-id": message.properties["message-id"], "recipient": "ann@a.test"}
        ],
    }  # fmt: skip
    assert message.body is not None
    assert b"for <ann@a.test>" in message.body


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        (b"A: b\n\nx\n", [], b"A: b\r\n\r\nx\r\n"),
        (b"A: b\r\n\r\nx", [], b"A: b\r\n\r\nx\r\n"),
        (b"A: b\n\nx\n.\ny\n", [], b"A: b\r\n\r\nx\r\n"),
        (b"A: b\r\n\r\nx\r\n.\r\ny\r\n", [], b"A: b\r\n\r\nx\r\n"),
        (b"A: b\n\nx\n.", [], b"A: b\r\n\r\nx\r\n"),
        (b"A: b\n\n..x\n.y\n...\n", [], b"A: b\r\n\r\n.x\r\n.y\r\n..\r\n"),
        (b"A: b\n\n..x\n.\ny\n", ["--ignore-dot"], b"A: b\r\n\r\n..x\r\n.\r\ny\r\n"),
        (b"A: b\n\n.\ny\n", ["-i"], b"A: b\r\n\r\n.\r\ny\r\n"),
        (b"A: b\n\n.\ny\n", ["-oi"], b"A: b\r\n\r\n.\r\ny\r\n"),
        (b"A: b\n\nx\ry\n", [], b"A: b\r\n\r\nx\r\ny\r\n"),
        (b"From ann Mon Jan 1\nA: b\n\nx\n", [], b"A: b\r\n\r\nx\r\n"),
        (b"A: b\n\n\xff\x00\n", [], b"A: b\r\n\r\n\xff\x00\r\n"),
        (b".\n", [], b""),
        (b"", [], b""),
        (b"just text\n", [], b"\r\njust text\r\n"),
        (b"\njust text\n", [], b"\r\njust text\r\n"),
    ],
)
def test_lines_and_dots(
    inject: Inject, queue: Path, text: bytes, arguments: list[str], expected: bytes
) -> None:
    inject(queue, *arguments, "-f", "s@s.test", "c@d.test", mail=text)
    added = [b"From: s@s.test", b"Date: ", b"Message-ID: <"]
    found = body(queue)
    while found.startswith(tuple(added)):
        found = found.partition(b"\r\n")[2]
    assert found == expected


def test_the_mail_ends_with_its_dot_while_the_input_stays_open(queue: Path) -> None:
    command = [sys.executable, "-m", "mailerq", "c@d.test", f"--queue-directory={queue}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        for part in (b"A: b\n\nx\n", b".", b"\n"):
            process.stdin.write(part)
            process.stdin.flush()
        assert process.wait(30) == 0
    assert body(queue).endswith(b"\r\n\r\nx\r\n")


def test_recipients_come_from_the_header_and_bcc_is_left_out(inject: Inject, queue: Path) -> None:
    mail = (
        b"From: a@b.test\nTo: Ann <ann@a.test>\ncc: bob@b.test\n"
        b"Bcc: eve@e.test,\n root\nX: y\n\nx\n"
    )
    inject(queue, "-t", "also@a.test", mail=mail)
    assert [message.recipient for message in kept(queue)] == [
        "also@a.test",
        "ann@a.test",
        "bob@b.test",
        "eve@e.test",
        "root@mx.test",
    ]
    assert b"eve" not in body(queue)
    assert b"cc: bob@b.test\r\nX: y\r\n" in body(queue)


@pytest.mark.parametrize(
    ("arguments", "head", "expected"),
    [
        (
            ["--envelope", "e@e.test"],
            b"x-mq-envelope: x@x.test\nReturn-Path: <r@r.test>\n",
            "e@e.test",
        ),
        (["-f", "<e@e.test>"], b"", "e@e.test"),
        (["-fe@e.test"], b"", "e@e.test"),
        (["-r", "joe"], b"", "joe@mx.test"),
        (["--envelope="], b"Return-Path: <r@r.test>\n", ""),
        (["-f", "<>"], b"", ""),
        ([], b"x-mq-envelope: x@x.test\nReturn-Path: <r@r.test>\n", "x@x.test"),
        ([], b"Return-Path: <r@r.test>\nSender: s@s.test\n", "r@r.test"),
        ([], b"Return-Path: <>\nSender: s@s.test\n", ""),
        ([], b"Sender: s@s.test\n", "s@s.test"),
        ([], b"", "a@b.test"),
    ],
)
def test_the_envelope(
    inject: Inject, queue: Path, arguments: list[str], head: bytes, expected: str
) -> None:
    inject(queue, *arguments, "c@d.test", mail=head + MAIL)
    (message,) = kept(queue)
    assert message.envelope == expected
    assert b"Return-Path" not in body(queue)
    assert b"x-mq-" not in body(queue)


def test_a_mail_that_names_nobody_is_from_its_user(inject: Inject, queue: Path) -> None:
    inject(queue, "-F", 'Joe "J" Doe', "c@d.test", mail=b"Subject: x\n\nhello\n")
    user = f"{getpass.getuser()}@mx.test"
    assert kept(queue)[0].envelope == user
    head = body(queue).partition(b"\r\n\r\n")[0].decode()
    assert f'From: "Joe \\"J\\" Doe" <{user}>' in head
    assert "\r\nDate: " in head
    assert "Message-ID: <" in head


def test_x_mq_fields_become_properties_and_bad_ones_are_named(queue: Path) -> None:
    mail = b"x-mq-tag: a\nx-mq-tag: b\nx-mq-my: 1\nx-mq-maxattempts: many\n" + MAIL
    done = mailerq("c@d.test", f"--queue-directory={queue}", input=mail)
    assert done.returncode == 0
    assert done.stderr == b"mailerq: ignored x-mq-maxattempts: expected a whole number\n"
    (message,) = kept(queue)
    assert message.properties["tags"] == ["a", "b"]
    assert message.properties["my"] == "1"
    assert body(queue) == MAIL


def test_mail_goes_to_the_inbox_or_the_local_queue_where_there_are_such(
    inject: Inject, queue: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "addresses"
    arguments = [
        *("--rabbitmq-inbox=in", "--rabbitmq-local=home", "--smtp-local-domains=a.test"),
        f"--smtp-local-addresses={listed}",
    ]
    said = inject(queue, *arguments, "ann@a.test", status=os.EX_CONFIG)
    assert f"smtp-local-addresses: cannot use {listed}" in said
    listed.write_text("cyd@*.test\n")
    inject(queue, *arguments, "ann@a.test", "bob@b.test", "cyd@c.test")
    assert [message.recipient for message in kept(queue, "in")] == ["bob@b.test"]
    assert [message.recipient for message in kept(queue, "home")] == ["ann@a.test", "cyd@c.test"]


def test_programs_that_know_sendmail_can_use_it(queue: Path, tmp_path: Path) -> None:
    script = tmp_path / "sendmail"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from mailerq.cli import main\nsys.exit(main())\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    environ = {"MAILERQ_QUEUE_DIRECTORY": str(queue), "MAILERQ_HOSTNAME": "mx.test"}
    for arguments in (["root"], ["-oi", "-oem", "-bm", "-f", "s@s.test", "--", "root"]):
        subprocess.run([str(script), *arguments], input=MAIL, check=True, env=environ)
    assert [message.recipient for message in kept(queue)] == ["root@mx.test"] * 2
    assert [message.envelope for message in kept(queue)] == ["a@b.test", "s@s.test"]


@pytest.mark.parametrize(
    ("arguments", "mail", "status", "text"),
    [
        (["-t"], b"From: a@b.test\n\nx\n", os.EX_DATAERR, "no recipient is named"),
        (["-t"], b"To: Ann Lee\n\nx\n", os.EX_DATAERR, "To: 'Ann Lee' is no address"),
        (["-t"], b"To: a@-b-.test\n\nx\n", os.EX_DATAERR, "'-b-.test' is not a domain"),
        (["ann@"], MAIL, os.EX_USAGE, "'ann @' is no address"),
        (["ann@a.test\r\nDATA"], MAIL, os.EX_USAGE, "is more than one line"),
        (["ann@a.test\nRCPT TO:<x@y.test>"], MAIL, os.EX_USAGE, "is more than one line"),
        (["-f", "x\n@y", "c@d.test"], MAIL, os.EX_USAGE, "cannot stand before the @"),
        (["--ignore-dot"], MAIL, os.EX_USAGE, "name a recipient"),
        (["c@d.test", "--frob"], MAIL, os.EX_USAGE, "unrecognized arguments: --frob"),
        (["-bd", "c@d.test"], MAIL, os.EX_USAGE, "-b: invalid choice: 'd'"),
        (["c@d.test", "--smtp-port=x"], MAIL, os.EX_CONFIG, "'x' is not a whole number"),
        (["c@d.test", "--smtp-maxsize=50"], MAIL, os.EX_DATAERR, "larger than smtp-maxsize (50"),
        (["a@a.test", "b@b.test", "--smtp-maxrecipients=1"], MAIL, os.EX_DATAERR, "2 recipients"),
        (["c@d.test"], b"Received: x\n" * 100 + MAIL, os.EX_DATAERR, "it is looping"),
        (["-t"], 300_000 * b"A: b\n" + MAIL, os.EX_DATAERR, "a header of more than 1048576 bytes"),
        (["c@d.test"], 700 * b"x-mq-tag: a\n" + MAIL, os.EX_DATAERR, "8192 bytes of x-mq-* fields"),
    ],
)  # fmt: skip
def test_what_is_refused_says_why(
    inject: Inject, queue: Path, arguments: list[str], mail: bytes, status: int, text: str
) -> None:
    assert text in inject(queue, *arguments, mail=mail, status=status)
    assert list(queue.iterdir()) == []


def test_blanks_in_a_folded_field_take_no_time(inject: Inject, queue: Path) -> None:
    started = time.thread_time()
    fields = b"To: c@d.test," + 900_000 * b" " + b"\n e@f.test\n"
    inject(queue, "-t", mail=fields + MAIL)
    assert time.thread_time() - started < 5  # it takes some 0.1 s; squared it would be an hour
    assert [message.recipient for message in kept(queue)] == ["c@d.test", "e@f.test"]


def test_the_daemon_gives_the_id_and_is_told(inject: Inject, queue: Path) -> None:
    requests = []

    def answer() -> None:
        for reply in (b'{"ids":["from-a-plugin"]}\n', b'{"ok":true}\n'):
            connection, _ = listening.accept()
            with connection:
                requests.append(json.loads(connection.recv(1000)))
                connection.sendall(reply)

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(queue / "control"))
        listening.listen()
        listening.settimeout(30)
        thread = threading.Thread(target=answer)
        thread.start()
        inject(queue, "c@d.test")
        thread.join()
    assert requests == [{"command": "message-ids", "count": 1}, {"command": "wake"}]
    assert kept(queue)[0].properties["message-id"] == "from-a-plugin"


class Server:
    """``mailerq sink`` for mail that goes through the SMTP port."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mailerq", "sink", "--listen=127.0.0.1:0", "--json", *arguments],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        self.arguments = ["--smtp-ip=127.0.0.1", f"--smtp-port={self.line()['listening'][1]}"]

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    running = Server(getattr(request, "param", ()))
    with running.process:
        yield running
        running.process.terminate()


def test_without_the_right_to_the_queue_mail_goes_through_the_port(
    inject: Inject, tmp_path: Path, server: Server
) -> None:
    mail = b"x-mq-tag: a\nBcc: eve@e.test\n" + MAIL.replace(b"hello", b"..h\xc3\xa9llo")
    text = inject(
        tmp_path / "missing", *server.arguments, "-t", "--json", "c@d.test", mail=mail
    )  # fmt: skip
    document = json.loads(text)
    assert document["via"] == "smtp"
    assert document["recipients"] == ["c@d.test", "eve@e.test"]
    taken = server.line()
    assert taken["envelope"] == "a@b.test"
    assert taken["recipients"] == ["c@d.test", "eve@e.test"]
    # The field stays for the server to take out; Bcc, one stuffed dot and no more are gone.
    assert taken["size"] == len(b"x-mq-tag: a\r\n" + MAIL) + 2


@pytest.mark.parametrize(
    ("server", "status", "text"),
    [
        (["--reply=rcpt=550 5.1.1 nobody"], os.EX_NOUSER, "<c@d.test> says 550 5.1.1 nobody"),
        (["--reply=rcpt=450 4.7.1 later"], os.EX_TEMPFAIL, "says 450 4.7.1 later"),
        (["--reply=mail=550 5.7.1 not you"], os.EX_UNAVAILABLE, "says 550 5.7.1 not you"),
        (["--reply=message=554 5.6.0 no"], os.EX_UNAVAILABLE, "says 554 5.6.0 no"),
        (["--reply=data=451 4.3.0 full"], os.EX_TEMPFAIL, "says 451 4.3.0 full"),
        (["--reply=connect=554 5.3.2 no"], os.EX_UNAVAILABLE, "says 554 5.3.2 no"),
        (["--drop=message"], os.EX_TEMPFAIL, "does not answer"),
    ],
    indirect=["server"],
)
def test_a_refusal_of_the_port_is_told_with_its_status(
    inject: Inject, tmp_path: Path, server: Server, status: int, text: str
) -> None:
    assert text in inject(tmp_path / "no", *server.arguments, "c@d.test", status=status)


def test_with_neither_queue_nor_port_it_is_to_be_tried_again(
    inject: Inject, tmp_path: Path
) -> None:
    with closed_port() as port:
        text = inject(
            tmp_path / "no", "--smtp-ip=127.0.0.1", f"--smtp-port={port}", "c@d.test",
            status=os.EX_TEMPFAIL,
        )  # fmt: skip
    assert f"{tmp_path}/no is not there yet" in text
    assert f"127.0.0.1 port {port} does not answer (Connection refused)" in text


def test_an_injector_does_not_load_the_event_loop() -> None:
    source = (
        "import sys\nfrom mailerq.cli import inject, control\nfrom mailerq.queues import opening\n"
        "print([name for name in ('trio', 'dns', 'ssl', 'asyncio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, cwd=ROOT, check=True)
    assert done.stdout == b"[]\n"


def test_a_field_that_may_be_misspelt_is_told(queue: Path) -> None:
    done = mailerq(
        "ann@a.test", f"--queue-directory={queue}", input=b"x-mq-maxattempt: 7\r\n" + MAIL
    )
    assert (done.returncode, len(kept(queue))) == (0, 1)
    assert done.stderr.decode() == (
        "mailerq: x-mq-maxattempt is not known and changes nothing; is x-mq-maxattempts meant?\n"
    )
