"""The server machine under attack: linear work, whole replies, and no secrets in logs."""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mailerq.wire import server, smtp
from mailerq.wire.server import ServerProtocol, Settings
from mailerq.wire.smtp import Reply

SETTINGS = Settings(hostname="mx.test", max_size=100_000, max_recipients=3)
CLEAR = replace(SETTINGS, starttls=True, mechanisms=("PLAIN", "LOGIN", "CRAM-MD5"))
LMTP = replace(SETTINGS, lmtp=True)

HELLO = b"EHLO c.test\r\n"
MAIL = HELLO + b"MAIL FROM:<a@b.test>\r\n"
RCPT = MAIL + b"RCPT TO:<c@d.test>\r\n"


def talk(machine: ServerProtocol, data: bytes, *, read: int = 65536) -> bytes:
    """Feed the machine, accept every event, and return the replies."""
    out = b""
    for start in range(0, len(data), read):
        machine.receive_data(data[start : start + read])
        while not isinstance(event := machine.next_event(), server.NoEvent):
            if isinstance(event, server.Closing):
                return out + machine.data_to_send()
            machine.accept()
            if isinstance(event, server.StartTls):
                machine.tls_started()
        out += machine.data_to_send()
    return out


def machine_for(settings: Settings = CLEAR, before: bytes = b"") -> ServerProtocol:
    machine = ServerProtocol(settings, auth_in_clear=True, xclient=True)
    machine.greet()
    machine.data_to_send()
    talk(machine, before)
    return machine


def steps(work: Callable[[], object]) -> int:
    """Count the function calls, of Python and of C, that some work takes."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


PIECES = st.sampled_from(
    [
        b"x", b"\r\n", b"\n", b"\r", b".", b"\r\n.", b"<", b">", b'"', b"\\", b"@", b" ", b"\0",
        b"NOOP\r\n", b"RSET\r\n", b"MAIL FROM:<a@b.test>\r\n", b"RCPT TO:<c@d.test>\r\n",
        b"BDAT 1\r\nx", b"BDAT 0 LAST\r\n", b"DATA\r\n", b"AUTH LOGIN\r\n", b"AUTH PLAIN x\r\n",
        b"MAIL FROM:<", b"RCPT TO:<", b"XCLIENT ", b"ADDR=1 ", b"EHLO x\r\n", b"\xff", b"=",
        b"STARTTLS\r\n",
    ]
)  # fmt: skip


@given(st.lists(PIECES, min_size=1, max_size=6).map(b"".join), st.sampled_from([HELLO, MAIL, RCPT]))
@example(b"BDAT 1\r\nx", RCPT)
@example(b'"\\', RCPT + b"RCPT TO:<")
@example(b"\r\n.", RCPT + b"DATA\r\n")
def test_work_is_linear_in_what_comes_in(piece: bytes, before: bytes) -> None:
    """Twice the input takes at most twice the steps, for any input."""

    def work(times: int, read: int) -> int:
        machine = machine_for(before=before)
        data = times * piece
        return steps(lambda: talk(machine, data, read=read))

    for read in (1, 50):
        few, many = work(100, read), work(200, read)
        assert many <= 2.2 * few + 200


@given(st.integers(1, 2000), st.sampled_from([b"a", b'"', b"\\", b"@", b"a.", b"<", b":", b"a,@"]))
def test_a_path_of_any_kind_is_read_in_one_go(count: int, piece: bytes) -> None:
    machine = machine_for(before=MAIL)
    line = b"RCPT TO:<" + count * piece + b">\r\n"
    assert steps(lambda: talk(machine, line)) < 400


def test_chunks_do_not_copy_what_comes_behind_them() -> None:
    machine = machine_for(before=RCPT)
    machine.receive_data(1000 * (b"BDAT 64\r\n" + 64 * b"x"))
    whole = machine._buffer
    assert isinstance(machine.next_event(), server.Data)
    machine.accept()
    assert machine.next_event() is server.NEED_DATA
    assert machine._buffer is whole
    assert machine.content_size == 64_000


@pytest.mark.parametrize("size", [0, 1, server.TINY_CHUNK - 1])
def test_tiny_chunks_are_commands_that_bring_no_mail_forward(size: int) -> None:
    chunk = b"BDAT %d\r\n" % size + size * b"x"
    machine = machine_for(before=RCPT)
    assert codes(talk(machine, 1000 * chunk)) == server.IDLE_COMMAND_LIMIT * [250] + [421]


def test_a_mail_in_chunks_is_one_step_however_many_they_are() -> None:
    machine = machine_for(before=RCPT)
    steps_before = machine.steps
    talk(machine, b"BDAT 1\r\nx")
    assert machine.steps == steps_before + 1
    talk(machine, 50 * b"BDAT 1\r\nx" + b"NOOP\r\nBDAT 70\r\n")
    assert machine.steps == steps_before + 1
    assert machine.in_content
    talk(machine, 70 * b"x" + b"RSET\r\n")
    assert machine.steps == steps_before + 2
    assert not machine.in_content


@pytest.mark.parametrize("before", [b"", HELLO, RCPT + b"DATA\r\n", RCPT + b"BDAT 99999\r\n"])
def test_memory_does_not_follow_what_is_only_thrown_away(before: bytes) -> None:
    machine = machine_for(before=before)
    held = 0
    for _ in range(64):
        machine.receive_data(65536 * b"x")
        event = machine.next_event()
        held = max(held, len(machine._buffer) + sum(map(len, machine._body._pieces)))
        if isinstance(event, server.Closing):
            break
    assert held < 400_000


# Replies.


@given(st.binary(max_size=60).filter(lambda name: b"\n" not in name), st.sampled_from([0, 1, 2]))
def test_nothing_that_came_in_can_end_or_forge_a_reply(junk: bytes, where: int) -> None:
    line = (b"EHLO " + junk, b"MAIL FROM:<" + junk + b"@b.test>", junk)[where] + b"\r\n"
    out = talk(machine_for(before=HELLO if where else b""), line)
    assert re.fullmatch(rb"([2-5]\d\d[ -][^\x00-\x1f\x7f]*\r\n)*", out)


@pytest.mark.parametrize("bad", [b"\r", b"\n", b"\0", b"\r\n", b"\x1b", b"\x7f", b"\xc2\x85"])
@pytest.mark.parametrize(
    "line",
    [
        b"EHLO a%b.test",
        b"MAIL FROM:<a%b@c.test>",
        b'MAIL FROM:<"a%b"@c.test> SMTPUTF8',
        b"MAIL FROM:<a@b.test> ENVID=a%b",
        b"MAIL FROM:<a@b.test> ENVID=a+0D+0Ab",
        b"RCPT TO:<c%d@e.test>",
        b"RCPT TO:<c@d.test> ORCPT=rfc822;a%b",
        b"RCPT TO:<c@d.test> NOTIFY=%",
    ],
)
def test_what_could_break_a_line_is_refused_at_the_door(line: bytes, bad: bytes) -> None:
    before = b"" if line.startswith(b"EHLO") else MAIL if line.startswith(b"RCPT") else HELLO
    machine = machine_for(before=before)
    events = []
    machine.receive_data(line.replace(b"%", bad) + b"\r\n")
    while not isinstance(event := machine.next_event(), server.NoEvent):
        events.append(event)
        machine.accept()
    if bad not in (b"\r\n", b"\n") or b"+0D" in line:
        assert events == []
    for event in events:
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]", str(event).encode().decode("unicode_escape"))


def test_what_is_data_stays_data() -> None:
    for local in ("$%&'*+/=?^_`{|}~-", '"; $(x) \\" ../../etc"', 64 * "a"):
        machine = machine_for(before=MAIL)
        machine.receive_data(f"RCPT TO:<{local}@d.test>\r\n".encode())
        event = machine.next_event()
        assert isinstance(event, server.Rcpt)
        assert event.recipient == f"{local}@d.test"
    machine = machine_for(before=MAIL)
    assert talk(machine, b"RCPT TO:<" + 300 * b"a" + b"@d.test>\r\n").startswith(b"553")


# Refusals, for the log.


def refusals(data: bytes, settings: Settings = CLEAR) -> list[tuple[str, int]]:
    machine = ServerProtocol(settings, auth_in_clear=True)
    machine.refusals = []
    machine.greet()
    talk(machine, data)
    return [(command, reply.code) for command, reply in machine.refusals]


def test_what_is_refused_is_told_with_its_reply() -> None:
    assert refusals(b"DATA\r\nMAIL FROM:<a@b.test>\r\nVRFY\r\nNOOP\r\n") == [
        ("DATA", 503),
        ("MAIL FROM:<a@b.test>", 503),
        ("VRFY", 501),
    ]
    assert refusals(RCPT + b"BDAT 4 LAST\r\na\nb\nGET / HTTP/1.1\r\n") == [
        ("(mail) from <a@b.test> to <c@d.test>", 550),
        ("(16 bytes that are no command)", 421),
    ]
    machine = ServerProtocol(SETTINGS)
    machine.refusals = []
    machine.greet(smtp.NOT_ADMITTED)
    assert machine.refusals == [("(connection)", smtp.NOT_ADMITTED)]
    machine = ServerProtocol(SETTINGS)
    machine.refusals = []
    machine.greet()
    machine.receive_data(MAIL)
    machine.next_event()
    machine.accept()
    machine.next_event()
    machine.reject(Reply(550, "5.7.1 no"))
    assert machine.refusals == [("MAIL FROM:<a@b.test>", Reply(550, "5.7.1 no"))]


@pytest.mark.parametrize(
    "lines",
    [
        b"AUTH PLAIN %\r\n",
        b"AUTH %\r\n",
        b"AUTH LOGIN\r\n%\r\n%x\r\n",
        b"AUTH PLAIN\r\n%x\r\n",
        b"AUTH LOGIN %x\r\n%\r\n",
        b"auth cram-md5\r\n%\r\n",
        b"%\r\n",
        b"AUTH GSSAPI\r\n%\r\n%\r\n",
    ],
)
def test_no_secret_is_among_the_refusals(lines: bytes) -> None:
    secret = base64.b64encode(b"hunter2hunter2")
    found = refusals(HELLO + lines.replace(b"%", secret))
    assert found
    for command, _ in found:
        assert secret.decode() not in command
        assert "hunter2" not in command


# More of the standards.


def codes(data: bytes) -> list[int]:
    return [int(line[:3]) for line in data.split(b"\r\n")[:-1] if line[3:4] == b" "]


def test_the_examples_of_rfc_5321_appendix_d2_to_d4() -> None:
    aborted = (
        b"EHLO foo.com\r\nMAIL FROM:<Smith@bar.com>\r\nRCPT TO:<Jones@foo.com>\r\n"
        b"RCPT TO:<Green@foo.com>\r\nRSET\r\nQUIT\r\n"
    )
    assert codes(talk(machine_for(SETTINGS), aborted)) == [250, 250, 250, 250, 250, 221]
    machine = machine_for(SETTINGS)
    relayed = b"EHLO bar.com\r\nMAIL FROM:<JQP@bar.com>\r\nRCPT TO:<Jones@XYZ.COM>\r\nDATA\r\n"
    assert codes(talk(machine, relayed)) == [250, 250, 250, 354]
    mail = b"Received: from bar.com by foo.com\r\n\r\nGood morning.\r\n.\r\nQUIT\r\n"
    assert codes(talk(machine, mail)) == [250, 221]
    verifying = b"EHLO bar.com\r\nVRFY Crispin\r\nMAIL FROM:<EAK@bar.com>\r\nQUIT\r\n"
    assert codes(talk(machine_for(SETTINGS), verifying)) == [250, 252, 250, 221]


def test_the_example_of_rfc_3030_section_4() -> None:
    machine = machine_for(SETTINGS)
    sent = (
        b"EHLO cnri.reston.va.us\r\nMAIL FROM:<ned@ymir.claremont.edu> BODY=BINARYMIME\r\n"
        b"RCPT TO:<gvaudre@cnri.reston.va.us>\r\nRCPT TO:<jstewart@cnri.reston.va.us>\r\n"
        b"BDAT 5\r\n12\n45BDAT 3\r\n678BDAT 0 LAST\r\nQUIT\r\n"
    )
    assert codes(talk(machine, sent)) == [250, 250, 250, 250, 250, 250, 250, 221]


LMTP_TABLE = """
LHLO c.test          250 250 250 250
EHLO c.test          500 500 500 500
HELO c.test          500 500 500 500
MAIL FROM:<a@b.test> 503 250 503 503
RCPT TO:<c@d.test>   503 503 250 250
DATA                 503 503 503 354
NOOP                 250 250 250 250
QUIT                 221 221 221 221
"""


@pytest.mark.parametrize("line", LMTP_TABLE.strip().splitlines())
def test_lmtp_each_command_in_each_state(line: str) -> None:
    command, *expected = line.rsplit(maxsplit=4)
    for before, code in zip((b"", HELLO, MAIL, RCPT), expected, strict=True):
        machine = machine_for(LMTP, before.replace(b"EHLO", b"LHLO"))
        assert codes(talk(machine, command.encode() + b"\r\n")) == [int(code)]


def test_normalizing_leaves_one_mail_at_every_split() -> None:
    machine = machine_for(replace(SETTINGS, normalize=True), RCPT + b"DATA\r\n")
    raw = b"a\nb\r\r\n\n.\nc\r\n.\r\n"
    for cut in range(len(raw)):
        machine = machine_for(replace(SETTINGS, normalize=True), RCPT + b"DATA\r\n")
        bodies = []
        for piece in filter(None, (raw[:cut], raw[cut:])):
            machine.receive_data(piece)
            if isinstance(event := machine.next_event(), server.Content):
                bodies.append(event.body)
                machine.accept()
        assert bodies == [b"a\r\nb\r\n\r\n\r\n.\r\nc\r\n"]


def test_a_nuisance_is_known_before_its_limit() -> None:
    machine = machine_for(before=HELLO)
    talk(machine, server.ERROR_LIMIT // 2 * b"WHAT\r\n")
    assert not machine.nuisance
    talk(machine, b"WHAT\r\n")
    assert machine.nuisance
    assert machine.failures == server.ERROR_LIMIT // 2 + 1


def test_a_limit_may_be_larger_than_any_machine() -> None:
    machine = server.ServerProtocol(server.Settings(hostname="mx.test", max_size=1 << 70))
    machine.greet()
    machine.receive_data(b"EHLO c.test\r\n")
    assert isinstance(machine.next_event(), server.Hello)
    machine.accept()
    assert b"SIZE 1180591620717411303424" in machine.data_to_send()


def test_a_refused_mail_is_told_with_its_envelope() -> None:
    recipients = b"".join(b"RCPT TO:<%d@d.test>\r\n" % number for number in range(5))
    mail = MAIL + recipients + b"BDAT 3 LAST\r\na\nb"
    shown = "(mail) from <a@b.test> to <0@d.test>, <1@d.test>, <2@d.test> and 2 more"
    assert refusals(mail, replace(CLEAR, max_recipients=5)) == [(shown, 550)]
    assert refusals(b"(mail) from <a@b.test> to <c@d.test>\r\n") == [
        ("(38 bytes that are no command)", 500)
    ]
