"""The server machine: each command in each state, input split anywhere, and random bytes."""

from __future__ import annotations

import base64
import hmac
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.wire import server, smtp
from mailerq.wire.parameters import MailParameters, RcptParameters
from mailerq.wire.server import ServerProtocol, Settings
from mailerq.wire.smtp import LocalProtocolError, Reply

SETTINGS = Settings(hostname="mx.test", max_size=1000, max_recipients=3)


@dataclass
class Transcript:
    """The result of a session: the codes of the replies, the mails, and the end."""

    out: bytes = b""
    mails: list[tuple[str | None, list[str], bytes]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    closing: str | None = None

    @property
    def codes(self) -> list[int]:
        """The code of each reply, once for a reply of several lines."""
        lines = self.out.split(b"\r\n")[:-1]
        return [int(line[:3]) for line in lines if line[3:4] == b" "]


def feed(machine: ServerProtocol, transcript: Transcript, *chunks: bytes) -> Transcript:
    """Receive chunks and accept every event."""
    for chunk in chunks:
        if transcript.closing is not None:
            break
        machine.receive_data(chunk)
        while not isinstance(event := machine.next_event(), server.NoEvent):
            transcript.events.append(type(event).__name__)
            if isinstance(event, server.Closing):
                transcript.closing = event.reason
                break
            if isinstance(event, server.Content):
                transcript.mails.append((machine.sender, machine.recipients, event.body))
            machine.accept()
            if isinstance(event, server.StartTls):
                machine.tls_started()
        transcript.out += machine.data_to_send()
    return transcript


def session(*chunks: bytes, settings: Settings = SETTINGS, **options: bool) -> Transcript:
    machine = ServerProtocol(settings, **options)
    machine.greet()
    machine.data_to_send()
    return feed(machine, Transcript(), *chunks)


HELLO = b"EHLO c.test\r\n"
MAIL = HELLO + b"MAIL FROM:<a@b.test>\r\n"
RCPT = MAIL + b"RCPT TO:<c@d.test>\r\n"

STATES = {"fresh": b"", "hello": HELLO, "mail": MAIL, "rcpt": RCPT}

# The reply to each command in each state: before EHLO, after it, after MAIL, after RCPT.
TABLE = """
EHLO c.test                          250 250 250 250
HELO c.test                          250 250 250 250
ehlo c.test                          250 250 250 250
EHLO                                 501 501 501 501
EHLO two words                       501 501 501 501
MAIL FROM:<a@b.test>                 503 250 503 503
MAIL FROM:<>                         503 250 503 503
mail from: <a@b.test>                503 250 503 503
MAIL FROM:<a@b.test> SIZE=1000       503 250 503 503
MAIL FROM:<a@b.test> SIZE=1001       503 552 503 503
MAIL FROM:<a@b.test> SIZE=x          503 501 503 503
MAIL FROM:<a@b.test> SIZE            503 501 503 503
MAIL FROM:<a@b.test> BODY=8BITMIME   503 250 503 503
MAIL FROM:<a@b.test> BODY=9BIT       503 501 503 503
MAIL FROM:<a@b.test> COLOUR=blue     503 555 503 503
MAIL FROM:<a@b.test> SIZE=1 SIZE=1   503 501 503 503
MAIL FROM:<a@b.test> SMTPUTF8        503 250 503 503
MAIL FROM:<a@b.test> SMTPUTF8=yes    503 501 503 503
MAIL FROM:<a@b.test> RET=HDRS ENVID=x+2By 503 250 503 503
MAIL FROM:<a@b.test> RET=SOME        503 501 503 503
MAIL FROM:<a@b.test> ENVID=          503 501 503 503
MAIL FROM:<a@b.test> ENVID=x+0Ay     503 501 503 503
MAIL FROM:<a@b.test> REQUIRETLS      503 555 503 503
MAIL FROM:<ä@b.test>                 503 553 503 503
MAIL FROM:<ä@b.test> SMTPUTF8        503 250 503 503
MAIL FROM:a@b.test                   503 501 503 503
MAIL TO:<a@b.test>                   503 501 503 503
MAIL FROM:<a@b@c>                    503 553 503 503
MAIL FROM:<a..b@c.test>              503 553 503 503
MAIL FROM:<"a>b"@c.test>             503 250 503 503
MAIL                                 503 501 503 503
RCPT TO:<c@d.test>                   503 503 250 250
RCPT TO:<@r.test:c@d.test>           503 503 250 250
RCPT TO:<postmaster>                 503 503 250 250
RCPT TO:<c@[192.0.2.1]>              503 503 250 250
RCPT TO:<>                           503 503 553 553
RCPT TO:c@d.test                     503 503 501 501
RCPT TO:<c@d.test> COLOUR=blue       503 503 555 555
RCPT TO:<c@d.test> NOTIFY=NEVER      503 503 250 250
RCPT TO:<c@d.test> NOTIFY=NEVER,DELAY 503 503 501 501
RCPT TO:<c@d.test> NOTIFY=           503 503 501 501
RCPT TO:<c@d.test> ORCPT=rfc822;c+40d.test 503 503 250 250
RCPT TO:<c@d.test> ORCPT=c@d.test    503 503 501 501
RCPT TO:<c@d.test> ORCPT=rfc822;c+0D+0A 503 503 501 501
RCPT TO:<c@d.test> ORCPT=utf-8;ö@d.test 503 503 501 501
RCPT TO:<c@d.test> ORCPT=utf-8;\\x{F6}@d.test 503 503 250 250
RCPT TO:<c@d.test> ORCPT=utf-8;\\x{D800}@d.test 503 503 501 501
RCPT                                 503 503 501 501
DATA                                 503 503 503 354
DATA now                             501 501 501 501
RSET                                 250 250 250 250
RSET now                             501 501 501 501
NOOP                                 250 250 250 250
NOOP anything at all                 250 250 250 250
VRFY c@d.test                        252 252 252 252
VRFY                                 501 501 501 501
HELP                                 214 214 214 214
HELP MAIL                            214 214 214 214
EXPN list                            502 502 502 502
BDAT 0                               503 503 503 250
BDAT 0 LAST                          503 503 503 250
BDAT x LAST                          501 501 501 501
BDAT 9223372036854775808             552 552 552 552
BDAT 1 FIRST                         501 501 501 501
LHLO c.test                          500 500 500 500
XCLIENT ADDR=192.0.2.1               502 502 502 502
STARTTLS                             502 502 502 502
AUTH PLAIN                           502 502 502 502
QUIT                                 221 221 221 221
QUIT now                             501 501 501 501
WHAT                                 500 500 500 500
GET / HTTP/1.1                       421 421 421 421
"""

CASES = [
    (name, line.rsplit(maxsplit=4)[0].strip(), int(code))
    for line in TABLE.strip().splitlines()
    for name, code in zip(STATES, line.rsplit(maxsplit=4)[1:], strict=True)
]


@pytest.mark.parametrize(("state", "command", "code"), CASES)
def test_each_command_in_each_state(state: str, command: str, code: int) -> None:
    before = session(STATES[state]).codes
    after = session(STATES[state] + command.encode() + b"\r\n").codes
    assert after == [*before, code]


def test_every_reply_has_an_enhanced_code_that_agrees_with_its_code() -> None:
    replies = {name: value for name, value in vars(smtp).items() if isinstance(value, Reply)}
    assert len(replies) > 40
    for name, reply in replies.items():
        if reply is smtp.START_DATA:
            continue  # RFC 2034, section 3: none in an intermediate reply
        assert reply.status is not None, name
        assert reply.status[0] == str(reply.code)[0], name


def test_the_example_of_rfc_5321_appendix_d1() -> None:
    transcript = session(
        b"EHLO bar.com\r\n"
        b"MAIL FROM:<Smith@bar.com>\r\n"
        b"RCPT TO:<Jones@foo.com>\r\n"
        b"RCPT TO:<Green@foo.com>\r\n"
        b"RCPT TO:<Brown@foo.com>\r\n"
        b"DATA\r\n",
        b"Blah blah blah...\r\n...etc. etc. etc.\r\n.\r\nQUIT\r\n",
    )
    assert transcript.codes == [250, 250, 250, 250, 250, 354, 250, 221]
    recipients = ["Jones@foo.com", "Green@foo.com", "Brown@foo.com"]
    assert transcript.mails == [
        ("Smith@bar.com", recipients, b"Blah blah blah...\r\n..etc. etc. etc.\r\n")
    ]
    assert transcript.closing == "QUIT"


def test_ehlo_lists_what_is_offered() -> None:
    assert session(HELLO).out.decode().split("\r\n") == [
        "250-mx.test",
        "250-PIPELINING",
        "250-SIZE 1000",
        "250-8BITMIME",
        "250-ENHANCEDSTATUSCODES",
        "250-SMTPUTF8",
        "250-CHUNKING",
        "250-BINARYMIME",
        "250-DSN",
        "250 LIMITS RCPTMAX=3",
        "",
    ]
    assert b"REQUIRETLS" in session(HELLO, secure=True).out
    assert session(b"HELO c.test\r\n").out == b"250 mx.test\r\n"


def test_replies_to_one_read_leave_in_one_write() -> None:
    machine = ServerProtocol(SETTINGS)
    machine.greet()
    feed(machine, Transcript(), RCPT)
    machine.receive_data(b"NOOP\r\nNOOP\r\nRSET\r\n")
    assert machine.next_event() is server.NEED_DATA
    assert machine.data_to_send() == 3 * b"250 2.0.0 Ok\r\n"
    assert machine.data_to_send() == b""


def test_a_refused_banner_closes() -> None:
    machine = ServerProtocol(SETTINGS)
    machine.greet(Reply(554, "5.7.1 go away"))
    assert isinstance(machine.next_event(), server.Closing)
    assert machine.data_to_send() == b"554 5.7.1 go away\r\n"


def test_an_early_talker_is_sent_away() -> None:
    machine = ServerProtocol(SETTINGS)
    machine.receive_data(HELLO)
    machine.greet()
    assert isinstance(machine.next_event(), server.Closing)
    assert machine.data_to_send() == smtp.SYNCHRONIZATION.wire


def test_data_before_354_is_refused() -> None:
    transcript = session(RCPT + b"DATA\r\nSubject: x\r\n\r\nhi\r\n.\r\n")
    assert transcript.codes == [250, 250, 250, 554]
    assert transcript.closing and not transcript.mails


def test_a_mail_resets_the_transaction_and_a_second_one_follows() -> None:
    mail = b"MAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\nDATA\r\n"
    transcript = session(HELLO + mail, b"1\r\n.\r\n" + mail, b"2\r\n.\r\nDATA\r\n")
    assert [body for _, _, body in transcript.mails] == [b"1\r\n", b"2\r\n"]
    assert transcript.codes[-1] == 503


def test_rejections_keep_the_session_sane() -> None:
    machine = ServerProtocol(SETTINGS)
    machine.greet()
    machine.receive_data(MAIL + 2 * b"RCPT TO:<c@d.test>\r\n" + b"DATA\r\n")
    assert isinstance(machine.next_event(), server.Hello)
    machine.accept()
    assert isinstance(machine.next_event(), server.Mail)
    machine.accept()
    for _ in range(2):
        assert isinstance(machine.next_event(), server.Rcpt)
        machine.reject(Reply(450, "4.7.1 later"))
    assert machine.next_event() is server.NEED_DATA
    assert machine.data_to_send().endswith(
        2 * b"450 4.7.1 later\r\n" + smtp.NO_VALID_RECIPIENTS.wire
    )


def test_a_421_closes() -> None:
    machine = ServerProtocol(SETTINGS)
    machine.greet()
    machine.receive_data(MAIL)
    machine.next_event()
    machine.reject(Reply(421, "4.3.2 no"))
    assert isinstance(machine.next_event(), server.Closing)


def test_an_unanswered_event_and_an_answer_to_nothing_are_our_defects() -> None:
    machine = ServerProtocol(SETTINGS)
    machine.greet()
    machine.receive_data(HELLO)
    machine.next_event()
    with pytest.raises(LocalProtocolError):
        machine.next_event()
    machine.accept()
    with pytest.raises(LocalProtocolError):
        machine.accept()
    with pytest.raises(LocalProtocolError):
        machine.reject(smtp.OK)


def test_too_many_recipients_are_told_to_come_again() -> None:
    transcript = session(MAIL + 4 * b"RCPT TO:<c@d.test>\r\n" + b"DATA\r\n", b".\r\n")
    assert transcript.codes == [250, 250, 250, 250, 250, 452, 354, 250]
    assert len(transcript.mails[0][1]) == 3


def test_errors_without_end_close_the_session() -> None:
    transcript = session(10**4 * b"WHAT\r\n")
    assert transcript.codes == [500] * server.ERROR_LIMIT + [421]
    assert transcript.closing == "too many errors"


def test_commands_without_mail_close_the_session() -> None:
    transcript = session(HELLO + 10**4 * b"NOOP\r\n")
    assert transcript.codes == [250] * (1 + server.IDLE_COMMAND_LIMIT) + [421]


def test_a_line_that_is_too_long_is_refused_and_the_next_one_works() -> None:
    transcript = session(b"NOOP " + 5000 * b"x", 5000 * b"x", b"x\r\nNOOP\r\n")
    assert transcript.codes == [500, 250]


def test_a_line_without_end_costs_no_memory_and_is_cut_off() -> None:
    machine = ServerProtocol(SETTINGS)
    machine.greet()
    machine.data_to_send()
    transcript = Transcript()
    for _ in range(100):
        feed(machine, transcript, 65536 * b"x")
        assert len(machine._buffer) == 0
        if transcript.closing:
            break
    assert transcript.closing == "sent a line without end"
    assert transcript.codes == [500]


@pytest.mark.parametrize("line", [b"NOOP\n", b"NOOP\rNOOP\r\n", b"\n", b"MAIL FROM:<a@b.test>\n"])
def test_a_bare_newline_in_a_command_is_refused(line: bytes) -> None:
    assert session(HELLO + line).codes == [250, 500]


def test_eight_bit_and_nul_in_a_command_are_refused() -> None:
    assert session(HELLO + b"MAIL FROM:<\xe4@b.test>\r\n").codes == [250, 500]
    assert session(HELLO + b"MAIL FROM:<a\0@b.test>\r\n").codes == [250, 500]


# Content.


@pytest.mark.parametrize(
    ("sent", "body"),
    [
        (b".\r\n", b""),
        (b"\r\n.\r\n", b"\r\n"),
        (b"..\r\n.\r\n", b".\r\n"),
        (b"...\r\n.\r\n", b"..\r\n"),
        (b".x\r\n.\r\n", b"x\r\n"),
        (b"..x\r\n.y\r\n\r\n..z\r\n.\r\n", b".x\r\ny\r\n\r\n.z\r\n"),
        (b"a.\r\n.\r\n", b"a.\r\n"),
        (b"a\r\n.b\r\n..\r\n.\r\n", b"a\r\nb\r\n.\r\n"),
        (b"a\r\n...b\r\n.\r\n", b"a\r\n..b\r\n"),
        (b"8-bit \xff\xfe\x00\r\n.\r\n", b"8-bit \xff\xfe\x00\r\n"),
    ],
)
def test_content_is_unstuffed_exactly_at_every_split(sent: bytes, body: bytes) -> None:
    for cut in range(len(sent) + 1):
        transcript = (
            session(RCPT + b"DATA\r\n", sent[:cut] or b"", sent[cut:] or b"")
            if 0 < cut < len(sent)
            else session(RCPT + b"DATA\r\n", sent)
        )
        assert [mail[2] for mail in transcript.mails] == [body], cut
        assert transcript.codes[-1] == 250
    whole = session(RCPT + b"DATA\r\n", *(sent[i : i + 1] for i in range(len(sent))))
    assert [mail[2] for mail in whole.mails] == [body]


ENDS_THAT_ARE_NONE = [
    b"\n.\n",
    b"\n.\r\n",
    b"\r\n.\n",
    b"\r.\r",
    b"\r.\r\n",
    b"\r\n.\r",
    b"\n.\r",
    b"\r\n\x00.\r\n",
    b"\r\n.\x00\r\n",
    b"\r\n. \r\n",
    b"\r\r\n.\r\r\n",
    b"\x85.\x85",
]


@pytest.mark.parametrize("end", ENDS_THAT_ARE_NONE)
def test_what_looks_like_the_end_of_data_smuggles_nothing(end: bytes) -> None:
    second = b"MAIL FROM:<evil@b.test>\r\nRCPT TO:<c@d.test>\r\nDATA\r\n"
    sent = b"first" + end + second + b"second\r\n.\r\n"
    for cut in range(len(sent) + 1):
        chunks = [chunk for chunk in (sent[:cut], sent[cut:]) if chunk]
        transcript = session(RCPT + b"DATA\r\n", *chunks)
        assert transcript.events.count("Mail") == 1
        assert len(transcript.mails) <= 1
        assert transcript.codes[4:] in ([250], [550])


def test_a_bare_newline_in_content_is_refused_as_one_mail() -> None:
    for body in (b"a\nb\r\n.\r\n", b"a\rb\r\n.\r\n", b"a\r\r\n.\r\n", b"a\n\r\n.\r\n"):
        transcript = session(RCPT + b"DATA\r\n", body + b"NOOP\r\n")
        assert transcript.codes[4:] == [550, 250]
        assert not transcript.mails


def test_content_over_the_limit_is_refused_and_not_kept() -> None:
    machine = ServerProtocol(SETTINGS)
    machine.greet()
    transcript = feed(machine, Transcript(), RCPT + b"DATA\r\n")
    for _ in range(100):
        feed(machine, transcript, 1000 * b"x")
        assert sum(map(len, machine._body._pieces)) <= 1000
    feed(machine, transcript, b"\r\n.\r\nNOOP\r\n")
    assert transcript.codes[-2:] == [552, 250]


def test_content_just_at_the_limit_is_taken() -> None:
    body = 998 * b"x" + b"\r\n"
    assert session(RCPT + b"DATA\r\n", body + b".\r\n").codes[-1] == 250
    assert session(RCPT + b"DATA\r\n", b"x" + body + b".\r\n").codes[-1] == 552


def test_the_peer_may_hang_up_anywhere() -> None:
    stream = RCPT + b"DATA\r\n"
    for cut in range(len(stream) + 1):
        machine = ServerProtocol(SETTINGS)
        machine.greet()
        if cut:
            feed(machine, Transcript(), stream[:cut])
        machine.receive_data(b"")
        assert machine.next_event() is server.CLOSED


# TLS and AUTH.

TLS = Settings(hostname="mx.test", starttls=True, mechanisms=("PLAIN", "LOGIN"))
CLEAR = replace(TLS, mechanisms=("PLAIN", "LOGIN", "CRAM-MD5"))


def b64(text: str) -> bytes:
    return base64.b64encode(text.encode())


def test_after_starttls_the_session_is_as_new() -> None:
    transcript = session(
        RCPT + b"STARTTLS\r\nMAIL FROM:<evil@b.test>\r\n", b"NOOP\r\n", settings=TLS
    )
    assert transcript.codes == [250, 250, 250, 220, 250]
    assert transcript.events.count("Mail") == 1
    transcript = session(HELLO + b"STARTTLS\r\n", b"MAIL FROM:<a@b.test>\r\n", HELLO, settings=TLS)
    assert transcript.codes == [250, 220, 503, 250]
    assert b"STARTTLS" not in transcript.out.partition(b"220 ")[2]
    assert b"AUTH PLAIN LOGIN" in transcript.out.partition(b"220 ")[2]


def test_starttls_is_refused_when_tls_is_in_use() -> None:
    assert session(b"STARTTLS\r\n", settings=TLS, secure=True).codes == [503]


def test_auth_in_clear_is_neither_offered_nor_taken() -> None:
    transcript = session(HELLO + b"AUTH PLAIN " + b64("\0u\0p") + b"\r\n", settings=TLS)
    assert transcript.codes == [250, 538]
    assert b"AUTH" not in transcript.out.partition(b"538")[0]


@pytest.mark.parametrize(
    "lines",
    [
        [b"AUTH PLAIN " + b64("\0user\0pass")],
        [b"AUTH PLAIN", b64("\0user\0pass")],
        [b"auth plain", b64("user\0user\0pass")],
        [b"AUTH LOGIN", b64("user"), b64("pass")],
        [b"AUTH LOGIN " + b64("user"), b64("pass")],
    ],
)
def test_credentials_come_complete(lines: list[bytes]) -> None:
    machine = ServerProtocol(CLEAR, auth_in_clear=True)
    machine.greet()
    feed(machine, Transcript(), HELLO)
    for line in lines[:-1]:
        machine.receive_data(line + b"\r\n")
        assert machine.next_event() is server.NEED_DATA
        assert machine.data_to_send().startswith(b"334 ")
    machine.receive_data(lines[-1] + b"\r\n")
    event = machine.next_event()
    assert isinstance(event, server.Auth)
    assert event.credentials[:2] == ("user", "pass")
    assert "pass" not in repr(event)
    machine.reject(smtp.AUTH_FAILED)
    assert machine.next_event() is server.NEED_DATA
    assert machine.data_to_send() == smtp.AUTH_FAILED.wire
    assert not machine.authenticated


@pytest.mark.parametrize(
    ("lines", "codes"),
    [
        ([b"AUTH"], [501]),
        ([b"AUTH GSSAPI"], [504]),
        ([b"AUTH PLAIN", b"*"], [334, 501]),
        ([b"AUTH PLAIN", b"="], [334, 501]),
        ([b"AUTH PLAIN ="], [501]),
        ([b"AUTH PLAIN", b"?"], [334, 501]),
        ([b"AUTH PLAIN " + b64("user pass")], [501]),
        ([b"AUTH PLAIN " + b64("\0\0pass")], [501]),
        ([b"AUTH PLAIN " + b64("other\0user\0pass")], [501]),
        ([b"AUTH PLAIN", 10000 * b"A"], [334, 501]),
        ([b"AUTH PLAIN", 13000 * b"A"], [334, 500]),
        ([b"AUTH LOGIN", b64(""), b64("x")], [334, 334, 501]),
        ([b"AUTH LOGIN", b"*"], [334, 501]),
        ([b"AUTH LOGIN", b"/w=="], [334, 501]),
    ],
)
def test_a_broken_exchange_is_refused_and_the_session_goes_on(
    lines: list[bytes], codes: list[int]
) -> None:
    chunks = [line + b"\r\n" for line in lines]
    transcript = session(HELLO, *chunks, b"NOOP\r\n", settings=CLEAR, auth_in_clear=True)
    assert transcript.codes == [250, *codes, 250]
    assert "Auth" not in transcript.events


def test_auth_twice_or_within_a_mail_is_out_of_turn() -> None:
    auth = b"AUTH PLAIN " + b64("\0u\0p") + b"\r\n"
    assert session(HELLO + auth + auth, settings=CLEAR, auth_in_clear=True).codes == [250, 235, 503]
    assert session(MAIL + auth, settings=CLEAR, auth_in_clear=True).codes == [250, 250, 503]
    assert session(auth, settings=CLEAR, auth_in_clear=True).codes == [503]


def test_cram_md5_proves_a_password_without_telling_it() -> None:
    machine = ServerProtocol(CLEAR, auth_in_clear=True)
    machine.greet()
    feed(machine, Transcript(), HELLO)
    machine.receive_data(b"AUTH CRAM-MD5\r\n")
    assert machine.next_event() is server.NEED_DATA
    challenge = base64.b64decode(machine.data_to_send()[4:])
    digest = hmac.new(b"secret", challenge, "md5").hexdigest()
    machine.receive_data(b64(f"us er {digest}") + b"\r\n")
    event = machine.next_event()
    assert isinstance(event, server.Auth)
    assert event.credentials.login == "us er"
    assert event.credentials.password is None
    assert event.credentials.proves("secret")
    assert not event.credentials.proves("other")


# BDAT, RFC 3030.


def bdat(*chunks: bytes) -> bytes:
    heads = [b"BDAT %d\r\n" % len(chunk) for chunk in chunks]
    heads[-1] = heads[-1][:-2] + b" LAST\r\n"
    return b"".join(head + chunk for head, chunk in zip(heads, chunks, strict=True))


@pytest.mark.parametrize(
    "chunks",
    [
        [b""],
        [b"hello\r\n"],
        [b"no newline at the end"],
        [b".\r\n", b"\r\n.\r\nMAIL FROM:<evil@b.test>\r\n", b""],
        [b"BDAT 5 LAST\r\n", b"QUIT\r\n"],
    ],
)
def test_chunks_are_framed_by_their_size_alone(chunks: list[bytes]) -> None:
    sent = RCPT + bdat(*chunks) + b"NOOP\r\n"
    for cut in range(1, len(sent)):
        transcript = session(sent[:cut], sent[cut:])
        assert [mail[2] for mail in transcript.mails] == [b"".join(chunks)]
        assert transcript.codes == [250] * (3 + len(chunks) + 1)
    assert session(*(sent[i : i + 1] for i in range(len(sent)))) == transcript


def test_a_refused_chunk_is_read_to_its_end() -> None:
    chunk = b"BDAT 25\r\nMAIL FROM:<evil@b.test>\r\n"
    for before, codes in ((b"", []), (HELLO, [250]), (MAIL, [250, 250])):
        transcript = session(before + chunk + b"NOOP\r\n")
        assert transcript.codes == [*codes, 503, 250]
        assert transcript.events.count("Mail") == (1 if before == MAIL else 0)


def test_a_rejected_mail_in_chunks_takes_its_chunk_along() -> None:
    machine = ServerProtocol(SETTINGS)
    machine.greet()
    feed(machine, Transcript(), RCPT)
    machine.receive_data(b"BDAT 6\r\nNOOP\r\nBDAT 6 LAST\r\nNOOP\r\nVRFY x\r\n")
    assert isinstance(machine.next_event(), server.Data)
    machine.reject(Reply(452, "4.3.1 no"))
    assert machine.next_event() is server.NEED_DATA
    codes = [int(line[:3]) for line in machine.data_to_send().splitlines()]
    assert codes == [452, 503, 252]


def test_chunks_over_the_limit_are_refused() -> None:
    assert session(RCPT + bdat(600 * b"x", 600 * b"x") + b"NOOP\r\n").codes[3:] == [250, 552, 250]
    transcript = session(RCPT + b"BDAT 1001\r\nNOOP\r\n")
    assert transcript.codes[3:] == [552]
    assert transcript.closing


def test_chunks_and_data_do_not_mix() -> None:
    begun = RCPT + b"BDAT 2\r\nhi"
    assert session(begun + b"DATA\r\n").codes[4:] == [503]
    assert session(begun + b"RCPT TO:<e@f.test>\r\n").codes[4:] == [503]
    assert session(begun + b"RSET\r\nBDAT 0 LAST\r\n").codes[4:] == [250, 503]
    binary = HELLO + b"MAIL FROM:<a@b.test> BODY=BINARYMIME\r\nRCPT TO:<c@d.test>\r\n"
    assert session(binary + b"DATA\r\n").codes[3:] == [503]


def test_only_binarymime_may_hold_bare_newlines() -> None:
    binary = HELLO + b"MAIL FROM:<a@b.test> BODY=BINARYMIME\r\nRCPT TO:<c@d.test>\r\n"
    body = b"a\nb\rc\0\r\n"
    assert session(binary + bdat(body)).mails[0][2] == body
    assert session(RCPT + bdat(body)).codes[3:] == [550]


# Parameters, LMTP, XCLIENT.


def test_parameters_come_decoded() -> None:
    machine = ServerProtocol(SETTINGS, secure=True)
    machine.greet()
    machine.receive_data(
        HELLO
        + b"MAIL FROM:<a@b.test> SIZE=5 BODY=8bitmime ret=full ENVID=a+2Bb SMTPUTF8 REQUIRETLS\r\n"
        + b"RCPT TO:<c@d.test> NOTIFY=success,FAILURE ORCPT=rfc822;c+2Bx@d.test\r\n"
    )
    machine.next_event()
    machine.accept()
    mail = machine.next_event()
    machine.accept()
    rcpt = machine.next_event()
    assert isinstance(mail, server.Mail)
    assert mail.parameters == MailParameters(
        size=5, body="8BITMIME", ret="FULL", envid="a+b", utf8=True, require_tls=True
    )
    assert isinstance(rcpt, server.Rcpt)
    assert rcpt.parameters == RcptParameters(
        notify=("SUCCESS", "FAILURE"), orcpt="rfc822;c+x@d.test"
    )


LMTP = replace(SETTINGS, lmtp=True)


def test_lmtp_replies_for_each_recipient() -> None:
    begin = b"LHLO c.test\r\nMAIL FROM:<a@b.test>\r\n" + 3 * b"RCPT TO:<c@d.test>\r\n"
    assert session(begin + b"DATA\r\n", b"hi\r\n.\r\n", settings=LMTP).codes[6:] == [250] * 3
    assert session(begin + b"DATA\r\n", b"a\nb\r\n.\r\n", settings=LMTP).codes[6:] == [550] * 3
    assert session(begin + bdat(b"hi\r\n"), settings=LMTP).codes[5:] == [250] * 3
    assert session(b"EHLO x\r\nHELO x\r\n", settings=LMTP).codes == [500, 500]
    machine = ServerProtocol(LMTP)
    machine.greet()
    feed(machine, Transcript(), begin + b"DATA\r\n")
    machine.receive_data(b".\r\n")
    assert isinstance(machine.next_event(), server.Content)
    machine.accept(each=[smtp.OK, Reply(450, "4.2.2 full"), smtp.OK])
    assert [line[:3] for line in machine.data_to_send().splitlines()] == [b"250", b"450", b"250"]


def test_in_lmtp_the_end_of_a_mail_is_answered_for_each_recipient_and_a_chunk_once() -> None:
    begin = b"LHLO c.test\r\nMAIL FROM:<a@b.test>\r\n" + 3 * b"RCPT TO:<c@d.test>\r\n"

    def replies(sent: bytes, refusal: Reply | None = None) -> list[int]:
        machine = ServerProtocol(LMTP)
        machine.greet()
        feed(machine, Transcript(), begin)
        machine.receive_data(sent)
        if refusal is not None:
            assert isinstance(machine.next_event(), server.Data)
            machine.reject(refusal)
        return feed(machine, Transcript(), b"").codes

    too_big = 600 * b"x"
    assert replies(b"BDAT 1001 LAST\r\n") == [552] * 3
    assert replies(b"BDAT 1001\r\n") == [552]
    assert replies(b"BDAT 1 LAST\r\nxNOOP\r\n", Reply(452, "no")) == [452] * 3 + [250]
    assert replies(b"BDAT 1\r\nxBDAT 1 LAST\r\nx", Reply(452, "no")) == [452, 503]
    assert replies(bdat(too_big, too_big) + b"NOOP\r\n") == [250] + [552] * 3 + [250]
    assert replies(bdat(too_big, too_big, b"") + b"NOOP\r\n") == [250, 552, 503, 250]


def test_xclient_is_taken_once() -> None:
    line = b"XCLIENT ADDR=192.0.2.7\r\n"
    assert session(b"XCLIENT ADDR\r\n" + line + line + HELLO, xclient=True).codes == [
        501, 220, 502, 250,
    ]  # fmt: skip
    transcript = session(HELLO + line + HELLO, xclient=True)
    assert transcript.out.count(b"XCLIENT") == 1


@pytest.mark.parametrize("blank", ["\t", "\v", "\f", "\x1c", "\x85", "\xa0", "\u2003", "\u3000"])
@pytest.mark.parametrize(
    "line",
    ["MAIL FROM:<a@b.test> SIZE=1{}BODY=7BIT", "MAIL FROM:<a@b.test> AUTH=x{}SIZE=1",
     "MAIL FROM:<a@b.test>{}SIZE=1", "XCLIENT ADDR=192.0.2.7{}PORT=1"],
)  # fmt: skip
def test_only_spaces_separate_parameters(line: str, blank: str) -> None:
    machine = ServerProtocol(SETTINGS, xclient=True)
    machine.greet()
    sent = line.format(blank).encode() + b"\r\n"
    assert feed(machine, Transcript(), HELLO, sent).codes[1:] in ([501], [250, 501])
    good = feed(machine, Transcript(), line.format("  ").encode() + b"\r\n")
    assert good.codes in ([250], [220])


def test_xclient_starts_the_session_anew() -> None:
    lines = b"XCLIENT NAME=[UNAVAILABLE] ADDR=192.0.2.7 HELO=x+2By\r\nMAIL FROM:<a@b.test>\r\n"
    assert session(HELLO + lines, xclient=True).codes == [250, 220, 503]
    machine = ServerProtocol(SETTINGS, xclient=True)
    machine.greet()
    machine.receive_data(lines)
    event = machine.next_event()
    assert isinstance(event, server.XClient)
    assert event.attributes == {"NAME": None, "ADDR": "192.0.2.7", "HELO": "x+y"}


@pytest.mark.parametrize("words", [b"", b"ADDR", b"COLOUR=blue", b"NAME=a+0Ab", b"ADDR=\xff"])
def test_a_broken_xclient_is_refused(words: bytes) -> None:
    assert session(b"XCLIENT " + words + b"\r\n", xclient=True).codes in ([501], [500])


# Replies.


def test_a_reply_cannot_carry_a_line_break_or_a_control_character() -> None:
    reply = Reply(550, "one\r\n250 two\nthree\x1b[0m\x00\r")
    assert reply.wire == b"550-one\r\n550-250 two\r\n550 three?[0m??\r\n"


def test_a_long_reply_line_is_cut() -> None:
    wire = Reply(550, 5000 * "x").wire
    assert len(wire) <= smtp.REPLY_LINE_LIMIT
    assert wire.endswith(b"x\r\n")


@given(st.text(), st.integers(200, 599))
def test_any_text_makes_one_well_formed_reply(text: str, code: int) -> None:
    lines = Reply(code, text).wire.split(b"\r\n")
    assert lines.pop() == b""
    assert all(line.startswith(b"%d-" % code) for line in lines[:-1])
    assert lines[-1].startswith(b"%d " % code)
    assert not any(byte < 32 or byte == 127 for line in lines for byte in line)


# Anything.

WORDS = st.sampled_from(
    [
        HELLO, b"HELO x\r\n", b"MAIL FROM:<a@b.test>\r\n", b"MAIL FROM:<>\r\n",
        b"RCPT TO:<c@d.test>\r\n", b"DATA\r\n", b"RSET\r\n", b"NOOP\r\n", b".\r\n", b"text\r\n",
        b"..\r\n", b"\r\n", b"\n", b"\r", b"AUTH LOGIN\r\n", b"AUTH PLAIN\r\n", b"dXNlcg==\r\n",
        b"STARTTLS\r\n",
        b"BDAT 3\r\n", b"BDAT 0 LAST\r\n", b"XCLIENT ADDR=x\r\n",
        b"VRFY x\r\n", b"QUIT\r\n", b"\0", b"\xff", b"<", b">", b'"',
    ]
)  # fmt: skip


@given(st.lists(WORDS | st.binary(max_size=20), max_size=30))
def test_any_bytes_end_in_replies_or_a_close(chunks: list[bytes]) -> None:
    for in_clear in (False, True):
        transcript = session(
            *filter(None, chunks), settings=TLS, auth_in_clear=in_clear, xclient=in_clear
        )
        for line in transcript.out.split(b"\r\n")[:-1]:
            assert line[:3].isdigit()
            assert line[3:4] in b" -"


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(["c@d.test", "e@f.test"]), min_size=1, max_size=3),
            st.lists(st.sampled_from([b"", b".", b"..", b".x", b"text", b"\xe4"]), max_size=5),
        ),
        max_size=4,
    )
)
def test_a_valid_session_is_the_same_whole_and_byte_by_byte(
    mails: list[tuple[list[str], list[bytes]]],
) -> None:
    chunks = [HELLO]
    for recipients, lines in mails:
        chunks.append(b"MAIL FROM:<a@b.test>\r\n")
        chunks.extend(b"RCPT TO:<%b>\r\n" % name.encode() for name in recipients)
        chunks.append(b"DATA\r\n")
        stuffed = [b"." + line if line.startswith(b".") else line for line in lines]
        chunks.append(b"".join(line + b"\r\n" for line in stuffed) + b".\r\n")
    whole = session(*chunks)
    single = session(*(bytes([byte]) for chunk in chunks for byte in chunk))
    assert single == whole
    assert whole.mails == [
        ("a@b.test", recipients, b"".join(line + b"\r\n" for line in lines))
        for recipients, lines in mails
    ]
