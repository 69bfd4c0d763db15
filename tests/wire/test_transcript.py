"""Transcripts: what people see of a session, and what nobody may see."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.wire import server, smtp
from mailerq.wire.transcript import BODY_BYTES, HELD_BYTES, Line, Pending, Transcript

PASSWORD = "s3cretWORD"

SECRETS = ("s3cret", "czNjcmV0", "TOPSECRETBODY")
"""Parts of the password, of its base64 form, and of bodies."""


def b64(text: str) -> bytes:
    return base64.b64encode(text.encode())


def play(transcript: Transcript, *steps: tuple[str, bytes]) -> list[Line]:
    """The lines of steps: "C" is the client, "S" the server."""
    lines: list[Line] = []
    for side, data in steps:
        lines += transcript.from_client(data) if side == "C" else transcript.from_server(data)
    return lines


def texts(lines: Iterable[Line]) -> list[str]:
    return [("C: " if line.from_client else "S: ") + line.text for line in lines]


OPENING = (("S", b"220 mx.test\r\n"), ("C", b"EHLO c.test\r\n"), ("S", b"250 mx.test\r\n"))


@pytest.mark.parametrize(
    "client",
    [
        [b"AUTH PLAIN " + b64(f"\0user\0{PASSWORD}")],
        [b"AUTH PLAIN", b64(f"\0user\0{PASSWORD}")],
        [b"auth login", b64("user"), b64(PASSWORD)],
        [b"AUTH LOGIN " + b64("user"), b64(PASSWORD)],
        [b"AUTH  LOGIN  " + b64("user"), b64(PASSWORD)],
        [b"AUTH\tPLAIN\t" + b64(PASSWORD)],
        [b"AUTH " + b64(PASSWORD)],
        [b"AUTH PLAIN", b"QUIT " + b64(PASSWORD)],
        [b"NOOP\rAUTH PLAIN " + b64(PASSWORD)],
        [b"NOOP x\rAUTH PLAIN " + b64(PASSWORD)],
        [b64(PASSWORD)],
        [PASSWORD.encode()],
    ],
)
@pytest.mark.parametrize("end", [b"235 welcome\r\n", b"535 no %b %b\r\n", b"500 %b %b?\r\n"])
@pytest.mark.parametrize("pipelined", [False, True])
def test_no_form_of_a_login_is_shown(client: list[bytes], end: bytes, pipelined: bool) -> None:
    transcript = Transcript()
    lines = play(transcript, *OPENING)
    if b"%b" in end:
        end %= (client[-1].split()[-1], PASSWORD.encode())
    challenges = [b"334 cGFzcw==\r\n"] * (len(client) - 1)
    sent = [line + b"\r\n" for line in client]
    if pipelined:
        lines += play(transcript, ("C", b"".join(sent)), ("S", b"".join([*challenges, end])))
    else:
        for line, reply in zip(sent, [*challenges, end], strict=True):
            lines += play(transcript, ("C", line), ("S", reply))
    lines += play(transcript, ("C", b"NOOP\r\n"), ("S", b"250 fine\r\n"))
    shown = texts(lines)
    assert not [text for text in shown if "czNjcmV0" in text or "s3cret" in text]
    assert shown[-2:] == ["C: NOOP", "S: 250 fine"]


def test_a_dialogue_in_full() -> None:
    lines = play(
        Transcript(),
        *OPENING,
        ("C", b"AUTH LOGIN\r\n"),
        ("S", b"334 VXNlcm5hbWU6\r\n"),
        ("C", b"dXNlcg==\r\n"),
        ("S", b"334 UGFzc3dvcmQ6\r\n"),
        ("C", b"*\r\n"),
        ("S", b"501 5.7.0 cancelled\r\n"),
        ("C", b"MAIL FROM:<a@b.test> SIZE=3\r\nRCPT TO:<c@d.test>\r\nDATA\r\n"),
        ("S", b"250 2.1.0 ok\r\n250 2.1.5 ok\r\n354 go\r\n"),
        ("C", b"Subject: x\r\n\r\nTOPSECRETBODY\r\n.\r\nMAIL FROM:<>\r\n"),
        ("S", b"250 2.0.0 queued\r\n"),
        ("C", b"XCLIENT ADDR=10.0.0.1 login=joe NAME=x\r\n\x1b[31m\xff\r\n"),
    )
    assert texts(lines) == [
        "S: 220 mx.test",
        "C: EHLO c.test",
        "S: 250 mx.test",
        "C: AUTH LOGIN",
        "S: 334 ***",
        "C: ***",
        "S: 334 ***",
        "C: *",
        "S: 501 5.7.0 cancelled",
        "C: MAIL FROM:<a@b.test> SIZE=3",
        "C: RCPT TO:<c@d.test>",
        "C: DATA",
        "S: 250 2.1.0 ok",
        "S: 250 2.1.5 ok",
        "S: 354 go",
        "C: (29 bytes)",
        "C: .",
        "C: MAIL FROM:<>",
        "S: 250 2.0.0 queued",
        "C: XCLIENT ADDR=10.0.0.1 login=*** NAME=x",
        "C: (8 bytes that are no command)",
    ]
    assert [line.mail for line in lines[9:19]] == [*[1] * 8, 2, 1]
    assert (lines[9].sender, lines[10].recipient, lines[17].sender) == ("a@b.test", "c@d.test", "")


def test_a_body_is_shown_on_demand_and_to_a_bound() -> None:
    data = b"Subject: x\r\n\r\n..\x07\\\xe9\xff caf\xc3\xa9\r\n"
    steps = (("C", b"DATA\r\n"), ("S", b"354 go\r\n"))
    lines = play(Transcript((), bodies=True), *steps, ("C", data + b".\r\n"))
    assert texts(line for line in lines if line.is_body) == [
        "C: Subject: x",
        "C: ",
        r"C: ..\x07\\\xe9\xff caf\xc3\xa9",
    ]
    lines = play(
        Transcript((), bodies=True), *steps, ("C", 1000 * (98 * b"x" + b"\r\n") + b".\r\n")
    )
    shown = [line.text for line in lines if line.is_body]
    assert sum(map(len, shown)) <= BODY_BYTES + 100
    assert shown[-1] == "(no more of the body is shown)"
    assert [line.text for line in lines[-2:]] == ["(100000 bytes)", "."]


def test_a_chunk_is_no_command() -> None:
    chunk = b"QUIT TOPSECRETBODY\r\n.\r\nRSET x"
    sent = b"BDAT %d\r\n%bBDAT 3 LAST\r\nabcNOOP\r\n" % (len(chunk), chunk)
    lines = play(Transcript(()), ("C", sent))
    assert texts(lines) == [
        f"C: BDAT {len(chunk)}",
        f"C: ({len(chunk)} bytes)",
        "C: BDAT 3 LAST",
        "C: (3 bytes)",
        "C: NOOP",
    ]
    lines = play(Transcript((), bodies=True), ("C", sent))
    assert texts(line for line in lines if line.is_body)[0] == "C: QUIT TOPSECRETBODY"


@pytest.mark.parametrize("line", [b"BDAT 20", b"bdat  20  last", b"BDAT 20 \t", b"BDAT  020 LAST "])
def test_a_chunk_is_none_either_if_its_size_stands_between_blanks(line: bytes) -> None:
    sent = line + b"\r\nMAIL TOPSECRETBODY\r\nNOOP\r\n"
    machine = server.ServerProtocol(server.Settings(hostname="mx.test"))
    machine.greet()
    machine.receive_data(b"EHLO c.test\r\n" + sent)
    while machine.next_event() is not server.NEED_DATA:
        machine.accept()
    replies = machine.data_to_send().splitlines()
    assert [reply[:3] for reply in replies[-2:]] == [b"503", b"250"]
    assert texts(play(Transcript(()), ("C", sent)))[1:] == ["C: (20 bytes)", "C: NOOP"]


def test_a_transcript_may_begin_within_an_envelope_that_went_ahead() -> None:
    """As a delivery does that a trace joins: the reply to the dot and three more are due."""
    due = (Pending.COMMAND, Pending.COMMAND, Pending.RCPT, Pending.DATA)
    lines = play(
        Transcript(due),
        ("S", b"250 a\r\n250 b\r\n"),
        ("C", b"TOPSECRETBODY\r\n"),
        ("S", b"250 c\r\n354 d\r\n"),
        ("C", b".\r\nQUIT\r\n"),
    )
    assert texts(lines)[2:] == ["S: 250 c", "S: 354 d", "C: (15 bytes)", "C: .", "C: QUIT"]


@pytest.mark.parametrize("extra", [b"250 unasked\r\n", b"421 bye\r\n", b"garbage\r\n"])
def test_replies_that_nobody_asked_for_do_not_show_secrets(extra: bytes) -> None:
    transcript = Transcript()
    lines = play(
        transcript,
        *OPENING,
        ("S", extra),
        ("C", b"NOOP\r\nAUTH LOGIN\r\n"),
        ("S", extra + b"250 fine\r\n" + extra + b"334 x\r\n"),
        ("S", extra),
        ("C", b64(PASSWORD) + b"\r\n" + b64(PASSWORD) + b"\r\n"),
        ("S", b"334 x\r\n" + extra + b"235 ok\r\n"),
        ("C", b"DATA\r\n"),
        ("S", extra + b"354 x\r\n"),
        ("C", b"TOPSECRETBODY\r\n.\r\n"),
    )
    assert not [text for text in texts(lines) if any(secret in text for secret in SECRETS)]


def test_nothing_grows_without_a_bound() -> None:
    for due in ((), (Pending.DATA,), (Pending.AUTH,)):
        transcript = Transcript(due)
        for _ in range(3 * HELD_BYTES // 1000):
            lines = transcript.from_client(1000 * b"x") + transcript.from_server(1000 * b"y")
            assert sum(len(line.text) for line in lines) < 3000
            assert len(transcript._client) + len(transcript._server) < 3 * HELD_BYTES
    transcript = Transcript()
    transcript.from_client(5000 * b"NOOP\r\n")
    assert len(transcript._due) <= 1000


def test_clear_text_before_tls_is_void() -> None:
    transcript = Transcript()
    play(transcript, *OPENING, ("C", b"STARTTLS\r\nDATA\r\nxx"), ("S", b"220 go\r\n"))
    transcript.secured()
    lines = play(transcript, ("C", b"EHLO c.test\r\n"), ("S", b"250 hi\r\n"))
    assert texts(lines) == ["C: EHLO c.test", "S: 250 hi"]


# Any dialogue with our server, in any pieces.

MECHANISMS = ("PLAIN", "LOGIN", "CRAM-MD5")

COMMANDS = [
    b"EHLO c.test",
    b"AUTH PLAIN",
    b"AUTH LOGIN",
    b"AUTH CRAM-MD5",
    b"AUTH PLAIN " + b64(f"\0user\0{PASSWORD}"),
    b"AUTH LOGIN " + b64(PASSWORD),
    b64(f"\0user\0{PASSWORD}"),
    b64(PASSWORD),
    PASSWORD.encode(),
    b"MAIL FROM:<a@b.test>",
    b"RCPT TO:<c@d.test>",
    b"DATA",
    b"TOPSECRETBODY",
    b"x\r\nTOPSECRETBODY\r\n.",
    b"BDAT 16 LAST\r\nTOPSECRETBODY\r\n",
    b"BDAT 13\r\nTOPSECRETBODY",
    b".",
    b"*",
    b"RSET",
    b"NOOP",
]


@given(
    commands=st.lists(st.sampled_from(COMMANDS), max_size=30),
    lmtp=st.booleans(),
    dice=st.randoms(use_true_random=False),
)
def test_no_secret_and_no_body_of_any_dialogue_is_shown(
    commands: list[bytes], lmtp: bool, dice: random.Random
) -> None:
    data = b"".join(command + b"\r\n" for command in commands)
    if lmtp:
        data = data.replace(b"EHLO", b"LHLO")
    settings = server.Settings(hostname="mx.test", mechanisms=MECHANISMS, lmtp=lmtp)
    machine = server.ServerProtocol(settings, auth_in_clear=True)
    machine.greet()
    # One transcript gets the dialogue as it came, the other one byte by byte.
    steps = [("S", machine.data_to_send())]
    while data:
        size = dice.randint(1, 60)
        piece, data = data[:size], data[size:]
        steps.append(("C", piece))
        machine.receive_data(piece)
        over = False
        while (event := machine.next_event()) is not server.NEED_DATA:
            if event is server.CLOSED or isinstance(event, server.Closing):
                over = True
                break
            if dice.random() < 0.3:
                machine.reject(smtp.AUTH_FAILED)
            else:
                machine.accept()
        steps.append(("S", machine.data_to_send()))
        if over:
            break
    whole = play(Transcript(), *steps)
    single = [(side, bytes([byte])) for side, step in steps for byte in step]
    assert texts(play(Transcript(), *single)) == texts(whole)
    assert not [text for text in texts(whole) if any(secret in text for secret in SECRETS)]


@given(st.lists(st.tuples(st.sampled_from("CS"), st.binary(max_size=100)), max_size=20))
def test_any_bytes_are_shown_as_one_line_each(steps: list[tuple[str, bytes]]) -> None:
    for line in play(Transcript(bodies=True), *steps):
        assert line.text.isprintable()
