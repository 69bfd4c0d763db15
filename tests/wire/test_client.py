"""The client machine: dialogues in one piece, byte by byte, and against the server machine."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.wire import server
from mailerq.wire.client import (
    CLOSED,
    MAX_REPLY_LINE,
    MAX_REPLY_LINES,
    NEED_DATA,
    Accepted,
    ClientProtocol,
    Event,
    Failed,
    Problem,
    Ready,
    Refused,
    SendBody,
    Step,
)
from mailerq.wire.smtp import LocalProtocolError, Reply

PLAIN = b"250 mx.test\r\n"
PIPELINING = b"250-mx.test\r\n250-SIZE 1000\r\n250-8BITMIME\r\n250 PIPELINING\r\n"
ENVELOPE = b"MAIL FROM:<a@b.test>\r\n", b"RCPT TO:<c@d.test>\r\n", b"DATA\r\n"


def feed(protocol: ClientProtocol, data: bytes, *, bytewise: bool = False) -> list[Event]:
    """Return all events up to the next NEED_DATA, or up to the end of the session."""
    events: list[Event] = []
    for piece in (data[i : i + 1] for i in range(len(data))) if bytewise else (data,):
        protocol.receive_data(piece)
        while (event := protocol.next_event()) is not NEED_DATA:
            if isinstance(event, SendBody):
                events.append(event)
                break
            if events and events[-1] is event:
                break
            events.append(event)
    return events


def output(protocol: ClientProtocol) -> bytes:
    return b"".join(iter(protocol.data_to_send, b""))


def opened(hello: bytes = PLAIN, *, bytewise: bool = False) -> ClientProtocol:
    protocol = ClientProtocol("me.test")
    assert feed(protocol, b"220 mx.test ready\r\n", bytewise=bytewise) == []
    assert output(protocol) == b"EHLO me.test\r\n"
    assert feed(protocol, hello, bytewise=bytewise) == [Ready("mx.test")]
    assert protocol.reusable
    return protocol


def mailing(hello: bytes = PIPELINING) -> ClientProtocol:
    protocol = opened(hello)
    protocol.mail("a@b.test", "c@d.test")
    output(protocol)
    return protocol


@pytest.fixture(params=[False, True], ids=["whole", "bytewise"])
def bytewise(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_a_mail_to_a_peer_that_pipelines_takes_two_writes_and_rset_proves_it(
    bytewise: bool,
) -> None:
    protocol = opened(PIPELINING, bytewise=bytewise)
    protocol.mail("a@b.test", "c@d.test")
    assert protocol.data_to_send() == b"".join(ENVELOPE)
    assert protocol.data_to_send() == b""
    replies = b"250 ok\r\n250 ok\r\n354 go\r\n"
    assert feed(protocol, replies, bytewise=bytewise) == [SendBody()]
    protocol.send_body(b"Subject: x\r\n\r\nhello\r\n")
    assert protocol.data_to_send() == b"Subject: x\r\n\r\nhello\r\n.\r\n"
    assert feed(protocol, b"250-2.0.0 taken\r\n250 2.0.0 as 7\r\n", bytewise=bytewise) == []
    assert output(protocol) == b"RSET\r\n"
    assert feed(protocol, b"250 2.0.0 reset\r\n", bytewise=bytewise) == [
        Accepted(Reply(250, "2.0.0 taken\n2.0.0 as 7"))
    ]
    assert protocol.reusable


def test_a_mail_to_a_peer_that_does_not_pipeline_goes_command_by_command(bytewise: bool) -> None:
    protocol = opened(PLAIN, bytewise=bytewise)
    protocol.mail("a@b.test", "c@d.test")
    for command in ENVELOPE[:2]:
        assert output(protocol) == command
        assert feed(protocol, b"250 ok\r\n", bytewise=bytewise) == []
    assert output(protocol) == ENVELOPE[2]
    assert feed(protocol, b"354 go\r\n", bytewise=bytewise) == [SendBody()]


def test_ehlo_falls_back_to_helo(bytewise: bool) -> None:
    protocol = ClientProtocol("me.test")
    feed(protocol, b"220 mx.test\r\n502 what?\r\n", bytewise=bytewise)
    assert output(protocol) == b"EHLO me.test\r\nHELO me.test\r\n"
    assert feed(protocol, b"250 mx.test\r\n", bytewise=bytewise) == [Ready("mx.test")]
    assert protocol.extensions == {}


@pytest.mark.parametrize(
    ("replies", "step", "code"),
    [
        (b"554 no\r\n", Step.INTRO, 554),
        (b"421 busy\r\n", Step.INTRO, 421),
        (b"220 x\r\n421 busy\r\n", Step.EHLO, 421),
        (b"220 x\r\n450 later\r\n", Step.EHLO, 450),
        (b"220 x\r\n500 what\r\n550 no\r\n", Step.HELO, 550),
    ],
)
def test_a_refused_session_says_at_which_step(
    replies: bytes, step: Step, code: int, bytewise: bool
) -> None:
    protocol = ClientProtocol("me.test")
    (event,) = feed(protocol, replies, bytewise=bytewise)
    assert isinstance(event, Refused)
    assert (event.step, event.reply.code) == (step, code)
    assert not protocol.reusable


def test_parameters_are_sent_only_where_they_are_offered_and_needed() -> None:
    protocol = opened(PIPELINING)
    protocol.mail("", "c@d.test", size=99, eight_bit=True)
    assert output(protocol).startswith(b"MAIL FROM:<> SIZE=99 BODY=8BITMIME\r\n")
    protocol = opened(PLAIN)
    protocol.mail("", "c@d.test", size=99, eight_bit=True)
    assert output(protocol).startswith(b"MAIL FROM:<>\r\n")


def test_addresses_that_are_not_ascii_need_smtputf8() -> None:
    protocol = opened(PLAIN)
    protocol.mail("a@b.test", "jösé@d.test")
    event = protocol.next_event()
    assert isinstance(event, Refused)
    assert (event.step, event.reply.status) == (Step.RCPTTO, "5.6.7")
    assert output(protocol) == b""
    protocol = opened(b"250-mx.test\r\n250-PIPELINING\r\n250 SMTPUTF8\r\n")
    protocol.mail("a@b.test", "jösé@d.test")
    assert output(protocol) == (
        "MAIL FROM:<a@b.test> SMTPUTF8\r\nRCPT TO:<jösé@d.test>\r\nDATA\r\n".encode()
    )


@pytest.mark.parametrize(
    "address",
    [
        "a@b.test\r\nRCPT TO:<victim@d.test",
        "a@b.test\n",
        "a\0@b.test",
        "a@b.test> SIZE=1",
        "a b@c.test",
        '"a"b\r\n"@c.test',
        '"a\\',
        "a\x85@b.test",
        "x" * 2000 + "@b.test",
    ],
)
def test_an_address_that_would_not_be_one_command_is_refused_unsent(address: str) -> None:
    protocol = opened(PIPELINING)
    protocol.mail(address, "c@d.test")
    event = protocol.next_event()
    assert isinstance(event, Refused)
    assert event.reply.code == 553
    protocol.mail("a@b.test", address)
    event = protocol.next_event()
    assert isinstance(event, Refused)
    assert (event.step, event.reply.code) == (Step.RCPTTO, 553)
    assert output(protocol) == b""
    assert protocol.reusable


@pytest.mark.parametrize(
    "address", ['"a b"@c.test', '"a\\"b>"@c.test', "a$%;../b@c.test", "x@[::1]"]
)
def test_odd_addresses_that_are_harmless_go_out_as_they_are(address: str) -> None:
    protocol = opened(PIPELINING)
    protocol.mail(address, address)
    assert output(protocol).startswith(b"MAIL FROM:<%b>\r\n" % address.encode())


def test_a_mail_above_the_peers_size_limit_is_refused_unsent() -> None:
    protocol = opened(PIPELINING)
    protocol.mail("a@b.test", "c@d.test", size=1001)
    event = protocol.next_event()
    assert isinstance(event, Refused)
    assert (event.reply.code, event.reply.status) == (552, "5.3.4")
    assert output(protocol) == b""


def test_a_refused_recipient_with_354_ends_in_a_lone_dot(bytewise: bool) -> None:
    protocol = mailing()
    assert feed(protocol, b"250 ok\r\n550 5.1.1 who?\r\n354 go\r\n", bytewise=bytewise) == []
    assert output(protocol) == b".\r\n"
    assert feed(protocol, b"554 nobody\r\n", bytewise=bytewise) == [
        Refused(Step.RCPTTO, Reply(550, "5.1.1 who?"))
    ]
    protocol.mail("a@b.test", "e@d.test")
    assert output(protocol).startswith(b"MAIL")


def test_a_refused_recipient_without_354_needs_rset_in_the_next_write(bytewise: bool) -> None:
    protocol = mailing()
    assert feed(protocol, b"250 ok\r\n450 who?\r\n503 no\r\n", bytewise=bytewise) == [
        Refused(Step.RCPTTO, Reply(450, "who?"))
    ]
    assert output(protocol) == b""
    protocol.mail("a@b.test", "c@d.test")
    assert output(protocol) == b"RSET\r\n" + b"".join(ENVELOPE)
    replies = b"250 reset\r\n250 ok\r\n250 ok\r\n354 go\r\n"
    assert feed(protocol, replies, bytewise=bytewise) == [SendBody()]


def test_rset_waits_for_its_reply_where_the_peer_does_not_pipeline() -> None:
    protocol = mailing(PLAIN)
    assert feed(protocol, b"250 ok\r\n") == []
    output(protocol)
    (event,) = feed(protocol, b"450 no\r\n")
    assert isinstance(event, Refused)
    protocol.mail("a@b.test", "c@d.test")
    assert output(protocol) == b"RSET\r\n"
    feed(protocol, b"250 ok\r\n")
    assert output(protocol) == ENVELOPE[0]


def test_a_refused_sender_needs_no_rset() -> None:
    protocol = mailing()
    assert feed(protocol, b"550 no\r\n503 no\r\n503 no\r\n") == [
        Refused(Step.MAILFROM, Reply(550, "no"))
    ]
    protocol.mail("a@b.test", "c@d.test")
    assert output(protocol).startswith(b"MAIL")


@pytest.mark.parametrize("code", [450, 550])
@pytest.mark.parametrize("replies", [b"250 ok\r\n354 go\r\n", b"503 no\r\n354 go\r\n"])
def test_a_refused_sender_with_a_recipient_taken_or_354_is_out_of_step(
    code: int, replies: bytes
) -> None:
    protocol = mailing()
    (event,) = feed(protocol, b"%d no\r\n" % code + replies)
    if code == 450:
        assert event == Refused(Step.MAILFROM, Reply(450, "no"))
    else:
        assert isinstance(event, Failed)
        assert event.problem is Problem.INVALID
    assert output(protocol) == b""
    assert protocol.ended
    assert protocol.out_of_step


@pytest.mark.parametrize(
    ("hello", "replies", "step"),
    [
        (PLAIN, b"550 no\r\n", Step.MAILFROM),
        (PIPELINING, b"250 ok\r\n250 ok\r\n550 no\r\n", Step.DATA),
    ],
)
@pytest.mark.parametrize(
    ("last", "confirmed"), [(b"221 bye\r\n", True), (b"503 one too many\r\n", False), (b"", True)]
)
def test_a_refusal_with_nothing_behind_it_needs_221_in_its_place(
    hello: bytes, replies: bytes, step: Step, last: bytes, confirmed: bool, bytewise: bool
) -> None:
    protocol = mailing(hello)
    assert feed(protocol, replies, bytewise=bytewise) == []
    assert output(protocol) == b"QUIT\r\n"
    (event,) = feed(protocol, last, bytewise=bytewise and last != b"")
    assert (event == Refused(step, Reply(550, "no"))) is confirmed
    assert protocol.ended
    assert protocol.out_of_step is not confirmed


def test_a_leftover_that_comes_with_the_end_of_the_stream_confirms_nothing() -> None:
    protocol = mailing(PLAIN)
    assert feed(protocol, b"550 no\r\n") == []
    protocol.receive_data(b"503 one too many\r\n")
    protocol.receive_data(b"")
    assert isinstance(protocol.next_event(), Failed)


def test_a_temporary_refusal_behind_a_final_one_is_out_of_step(bytewise: bool) -> None:
    protocol = mailing()
    (event,) = feed(protocol, b"550 whose?\r\n451 later\r\n", bytewise=bytewise)
    assert isinstance(event, Failed)
    assert (event.step, event.problem) == (Step.MAILFROM, Problem.INVALID)


def test_a_recipient_refused_with_354_behind_it_is_refused_by_the_peer() -> None:
    protocol = mailing()
    assert feed(protocol, b"250 ok\r\n500 who?\r\n354 go\r\n") == []
    assert output(protocol) == b".\r\n"
    assert feed(protocol, b"554 nobody\r\n") == [Refused(Step.RCPTTO, Reply(500, "who?"))]
    assert protocol.reusable


@pytest.mark.parametrize("before", [b"", b"250 ok\r\n", b"250 ok\r\n250 ok\r\n"])
@pytest.mark.parametrize("reply", [b"503 no\r\n", b"554 5.5.1 no\r\n"])
def test_a_command_in_its_place_cannot_be_out_of_sequence(before: bytes, reply: bytes) -> None:
    protocol = mailing()
    (event,) = feed(protocol, before + reply)
    assert isinstance(event, Failed)
    assert event.problem is Problem.INVALID


NEXT = b"MAIL FROM:<a@b.test>\r\n", b"RCPT TO:<e@f.test>\r\n", b"DATA\r\n"


def ahead() -> ClientProtocol:
    """Send the body of a mail, and the envelope of the next mail right behind it."""
    protocol = mailing()
    assert feed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n") == [SendBody()]
    assert not protocol.may_go_ahead
    protocol.send_body(b"hi\r\n")
    assert protocol.may_go_ahead
    assert protocol.mail("a@b.test", "e@f.test")
    assert not protocol.may_go_ahead
    assert protocol.data_to_send() == b"hi\r\n.\r\n" + b"".join(NEXT)
    assert protocol.step is Step.MESSAGE
    return protocol


def test_the_next_envelope_goes_out_with_the_body_and_needs_no_rset(bytewise: bool) -> None:
    protocol = ahead()
    replies = b"250 one\r\n250 ok\r\n250 ok\r\n354 go\r\n"
    events = feed(protocol, replies, bytewise=bytewise)
    assert events == [Accepted(Reply(250, "one")), SendBody()]
    protocol.send_body(b"ho\r\n")
    assert output(protocol) == b"ho\r\n.\r\n"
    assert feed(protocol, b"250 two\r\n", bytewise=bytewise) == []
    assert output(protocol) == b"RSET\r\n"
    assert feed(protocol, b"250 reset\r\n", bytewise=bytewise) == [Accepted(Reply(250, "two"))]
    assert protocol.reusable


def test_each_of_two_mails_gets_its_own_refusal(bytewise: bool) -> None:
    protocol = ahead()
    assert feed(protocol, b"452 full\r\n", bytewise=bytewise) == []
    assert not protocol.reusable
    replies = b"250 ok\r\n550 who\r\n554 5.5.1 none\r\n"
    assert feed(protocol, replies, bytewise=bytewise) == [
        Refused(Step.MESSAGE, Reply(452, "full")),
        Refused(Step.RCPTTO, Reply(550, "who")),
    ]
    assert protocol.reusable
    protocol.mail("a@b.test", "c@d.test")
    assert output(protocol).startswith(b"RSET\r\nMAIL")


@pytest.mark.parametrize(
    "envelope", [b"250 ok\r\n550 who\r\n503 no\r\n", b"250 ok\r\n" * 2 + b"451 no\r\n"]
)
@pytest.mark.parametrize(
    ("last", "confirmed"), [(b"221 bye\r\n", True), (b"503 one too many\r\n", False), (b"", True)]
)
def test_a_refused_body_needs_221_where_the_envelope_behind_it_is_refused(
    envelope: bytes, last: bytes, confirmed: bool, bytewise: bool
) -> None:
    protocol = ahead()
    assert feed(protocol, b"554 spam\r\n" + envelope, bytewise=bytewise) == []
    assert output(protocol) == b"QUIT\r\n"
    (event,) = feed(protocol, last, bytewise=bytewise and last != b"")
    assert (event == Refused(Step.MESSAGE, Reply(554, "spam"))) is confirmed
    assert protocol.ended
    assert protocol.out_of_step is not confirmed


def test_what_ends_the_session_ends_the_mail_whose_reply_is_due(bytewise: bool) -> None:
    protocol = ahead()
    events = feed(protocol, b"421 bye\r\n", bytewise=bytewise)
    assert events == [Refused(Step.MESSAGE, Reply(421, "bye"))]
    assert protocol.ended
    protocol = ahead()
    protocol.receive_data(b"")
    event = protocol.next_event()
    assert isinstance(event, Failed)
    assert event.step is Step.MESSAGE


@pytest.mark.parametrize("end", [b"", b"421 bye\r\n"])
def test_a_body_stays_in_doubt_when_the_session_ends_before_the_next_envelope_is_answered(
    end: bytes,
) -> None:
    protocol = ahead()
    assert feed(protocol, b"250 one\r\n250 ok\r\n250 ok\r\n") == []
    (event,) = feed(protocol, end)
    assert isinstance(event, Failed)
    assert (event.step, event.problem) == (Step.MESSAGE, Problem.LOST)
    assert "250 may answer another command: one" in event.description
    assert protocol.out_of_step


@pytest.mark.parametrize(
    "replies",
    [
        b"250 MAIL\r\n250 RCPT\r\n354 DATA\r\n",
        b"250 MAIL\r\n250 RCPT\r\n550 dot\r\n354 DATA\r\n",
        b"250 MAIL\r\n550 dot\r\n250 RCPT\r\n",
        b"250 MAIL\r\n550 RCPT\r\n503 DATA\r\n550 dot\r\n",
        b"250 MAIL\r\n550 RCPT\r\n554 5.5.1 DATA\r\n554 dot\r\n",
        b"250 MAIL\r\n550 dot\r\n550 RCPT\r\n503 DATA\r\n",
        b"250 MAIL\r\n250 RCPT\r\n451 DATA\r\n550 dot\r\n",
        b"550 MAIL\r\n250 dot\r\n503 RCPT\r\n503 DATA\r\n",
        b"550 MAIL\r\n451 dot\r\n503 RCPT\r\n503 DATA\r\n",
        b"500 what\r\n250 dot\r\n550 MAIL\r\n503 RCPT\r\n503 DATA\r\n",
    ],
)
def test_a_late_answer_to_a_body_leaves_both_mails_in_doubt(replies: bytes, bytewise: bool) -> None:
    protocol = ahead()
    (event,) = feed(protocol, replies, bytewise=bytewise)
    assert isinstance(event, Failed)
    assert (event.step, event.problem) == (Step.MESSAGE, Problem.INVALID)
    assert protocol.ended
    assert protocol.out_of_step


def test_a_mail_that_the_peer_cannot_take_is_not_sent_ahead() -> None:
    protocol = mailing()
    feed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n")
    protocol.send_body(b"hi\r\n")
    assert not protocol.mail("a@b.test", "e@f.test", size=1001)
    assert output(protocol) == b"hi\r\n.\r\n"
    assert feed(protocol, b"250 one\r\n") == []
    assert feed(protocol, b"250 reset\r\n") == [Accepted(Reply(250, "one"))]
    assert protocol.mail("a@b.test", "e@f.test", size=1001)
    assert isinstance(protocol.next_event(), Refused)


def test_nothing_goes_ahead_to_a_peer_that_does_not_pipeline_or_gets_a_lone_dot() -> None:
    protocol = mailing(PLAIN)
    assert feed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n") == [SendBody()]
    protocol.send_body(b"hi\r\n")
    assert not protocol.may_go_ahead
    with pytest.raises(LocalProtocolError):
        protocol.mail("a@b.test", "e@f.test")
    protocol = mailing()
    feed(protocol, b"250 ok\r\n550 who\r\n354 go\r\n")
    assert protocol.step is Step.MESSAGE
    assert not protocol.may_go_ahead


def test_421_refuses_the_mail_and_ends_the_session(bytewise: bool) -> None:
    protocol = mailing()
    assert feed(protocol, b"250 ok\r\n421 bye\r\n", bytewise=bytewise) == [
        Refused(Step.RCPTTO, Reply(421, "bye"))
    ]
    assert not protocol.reusable


def test_a_refusal_is_the_answer_even_when_the_rest_never_comes() -> None:
    protocol = mailing()
    feed(protocol, b"550 no\r\n")
    assert feed(protocol, b"") == [Refused(Step.MAILFROM, Reply(550, "no"))]
    protocol = mailing()
    feed(protocol, b"450 no\r\n")
    assert protocol.abort(Problem.TIMEOUT, "slow") == Refused(Step.MAILFROM, Reply(450, "no"))


@pytest.mark.parametrize("problem", [Problem.LOST, Problem.TIMEOUT])
def test_a_refusal_that_may_be_an_earlier_mails_does_not_count_when_the_rest_never_comes(
    problem: Problem,
) -> None:
    protocol = mailing()
    feed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n")
    protocol.send_body(b"x")
    output(protocol)
    assert feed(protocol, b"250 ok\r\n") == []
    assert feed(protocol, b"250 ok\r\n") == [Accepted(Reply(250, "ok"))]
    protocol.mail("a@b.test", "c@d.test")
    assert feed(protocol, b"550 no\r\n") == []
    event = protocol.abort(problem, "gone")
    assert isinstance(event, Failed)
    assert (event.step, event.problem) == (Step.MAILFROM, problem)


def test_250_before_the_dot_is_no_success(bytewise: bool) -> None:
    protocol = mailing()
    events = feed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n250 got it\r\n", bytewise=bytewise)
    event = events[-1]
    assert isinstance(event, Failed)
    assert (event.step, event.problem) == (Step.DATA, Problem.INVALID)
    assert output(protocol) == b""


def test_250_that_comes_before_the_body_is_written_is_no_success() -> None:
    protocol = mailing()
    feed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n")
    protocol.receive_data(b"250 got it\r\n")
    protocol.send_body(b"x")
    assert output(protocol) == b""
    event = protocol.next_event()
    assert isinstance(event, Failed)
    assert (event.step, event.problem) == (Step.DATA, Problem.INVALID)


def test_a_refusal_before_the_body_is_written_counts() -> None:
    protocol = mailing()
    feed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n")
    protocol.receive_data(b"451 disk full\r\n")
    protocol.send_body(b"x")
    assert output(protocol) == b""
    assert protocol.next_event() == Refused(Step.DATA, Reply(451, "disk full"))


def test_250_in_the_middle_of_a_body_keeps_back_the_dot() -> None:
    protocol = mailing()
    feed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n")
    protocol.send_body(b"x" * 100_000)
    assert protocol.data_to_send() == b"x" * 100_000
    protocol.receive_data(b"250 taken\r\n")
    assert protocol.data_to_send() == b""
    assert isinstance(protocol.next_event(), Failed)
    assert protocol.out_of_step


def test_250_to_data_is_invalid() -> None:
    protocol = mailing()
    (event,) = feed(protocol, b"250 ok\r\n250 ok\r\n250 ok\r\n")
    assert isinstance(event, Failed)
    assert (event.step, event.problem) == (Step.DATA, Problem.INVALID)


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"\r\n",
        b"25 ok\r\n",
        b"250ok\r\n",
        b"150 what\r\n",
        b"650 what\r\n",
        b"250-a\r\n251 b\r\n",
        b"\x16\x03\x01\x02\n",
        b"354 go\r\n",
    ],
)
def test_garbage_is_invalid_at_every_step(garbage: bytes, bytewise: bool) -> None:
    for protocol, step in (
        (ClientProtocol("me.test"), Step.INTRO),
        (mailing(), Step.MAILFROM),
        (opened(), Step.IDLE),
    ):
        (event,) = feed(protocol, garbage, bytewise=bytewise)
        assert isinstance(event, Failed)
        assert (event.step, event.problem) == (step, Problem.INVALID)
        assert not protocol.reusable


def test_an_endless_line_is_an_overflow() -> None:
    protocol = ClientProtocol("me.test")
    (event,) = feed(protocol, b"220 " + b"x" * MAX_REPLY_LINE)
    assert isinstance(event, Failed)
    assert event.problem is Problem.OVERFLOW


def test_endless_ehlo_lines_are_an_overflow() -> None:
    protocol = ClientProtocol("me.test")
    feed(protocol, b"220 hi\r\n")
    (event,) = feed(protocol, b"250-X\r\n" * (MAX_REPLY_LINES + 1))
    assert isinstance(event, Failed)
    assert (event.step, event.problem) == (Step.EHLO, Problem.OVERFLOW)


def test_a_lost_connection_says_what_was_due(bytewise: bool) -> None:
    protocol = mailing()
    feed(protocol, b"250 ok\r\n25", bytewise=bytewise)
    (event,) = feed(protocol, b"")
    assert isinstance(event, Failed)
    assert (event.step, event.problem) == (Step.RCPTTO, Problem.LOST)
    protocol = opened()
    (event,) = feed(protocol, b"")
    assert isinstance(event, Failed)
    assert (event.step, event.problem) == (Step.IDLE, Problem.LOST)


def test_421_on_an_idle_session_is_a_loss_and_not_garbage() -> None:
    (event,) = feed(opened(), b"421 4.4.2 idle too long\r\n")
    assert isinstance(event, Failed)
    assert (event.step, event.problem) == (Step.IDLE, Problem.LOST)


def test_controls_in_replies_do_not_get_through() -> None:
    protocol = mailing()
    (event,) = feed(protocol, b"550 a\x1b[2Jb\rc\0\xff\r\n503\r\n503 x\r\n")
    assert isinstance(event, Refused)
    assert event.reply.text == "a?[2Jb?c?\N{REPLACEMENT CHARACTER}"


def test_quit_ends_in_closed(bytewise: bool) -> None:
    protocol = opened()
    protocol.quit()
    assert output(protocol) == b"QUIT\r\n"
    assert feed(protocol, b"221 bye\r\n", bytewise=bytewise) == [CLOSED]
    protocol = opened()
    protocol.quit()
    assert feed(protocol, b"") == [CLOSED]


def test_calls_out_of_turn_are_our_own_defects() -> None:
    protocol = ClientProtocol("me.test")
    with pytest.raises(LocalProtocolError):
        protocol.mail("a@b.test", "c@d.test")
    with pytest.raises(LocalProtocolError):
        protocol.send_body(b"")


def test_a_large_body_is_handed_out_uncopied() -> None:
    body = b"x" * 100_000 + b"\r\n"
    protocol = mailing()
    feed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n")
    protocol.send_body(body)
    assert protocol.data_to_send() is body
    assert protocol.data_to_send() == b".\r\n"


@given(st.binary(max_size=200))
def test_no_input_makes_the_machine_raise(data: bytes) -> None:
    for protocol in (ClientProtocol("me.test"), mailing(), opened()):
        protocol.receive_data(data)
        event = protocol.next_event()
        protocol.receive_data(b"")
        assert event is not None
        assert protocol.next_event() is not NEED_DATA


REPLIES = st.sampled_from(
    [
        *(b"220 a\r\n", b"250 ok\r\n", b"250-a\r\n250 PIPELINING\r\n", b"354 go\r\n"),
        *(b"450 later\r\n", b"550 no\r\n", b"421 bye\r\n", b"junk\r\n", b"250-a\r\n"),
    ]
)


@given(st.lists(REPLIES, max_size=16), st.data())
def test_where_the_stream_is_split_makes_no_difference(replies: list[bytes], data: st.DataObject):
    def play(pieces: list[bytes]) -> list[Event]:
        protocol = ClientProtocol("me.test")
        events: list[Event] = []
        for piece in [*pieces, b""]:
            protocol.receive_data(piece)
            while (event := protocol.next_event()) is not NEED_DATA:
                if events and events[-1] is event:
                    break
                events.append(event)
                if isinstance(event, SendBody):
                    break
                if protocol.reusable and len(events) < 10:
                    protocol.mail("a@b.test", "c@d.test")
        return [event for event in events if not isinstance(event, Failed)]

    stream = b"".join(replies)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    bounds = [0, *cuts, len(stream)]
    pieces = [stream[a:b] for a, b in pairwise(bounds) if a < b]
    if b"354" in stream:
        return  # What a peer may say behind 354 depends on what we had sent by then.
    assert play(pieces) == play([stream] if stream else [])


# Back to back with the server machine


class BackToBack:
    """Both machines, with a network between them that delivers `step` bytes at a time."""

    def __init__(self, step: int) -> None:
        self.client = ClientProtocol("me.test")
        self.server = server.ServerProtocol(server.Settings(hostname="mx.test"))
        self.step = step
        self.taken: list[tuple[str, list[str], bytes]] = []
        self.server.greet()

    def run(self) -> Event:
        """Exchange bytes until the client has an event, or both wait."""
        while True:
            data = output(self.client)
            for at in range(0, len(data), self.step):
                self.server.receive_data(data[at : at + self.step])
                self.serve()
            replies = self.server.data_to_send()
            for at in range(0, len(replies), self.step):
                self.client.receive_data(replies[at : at + self.step])
            event = self.client.next_event()
            if event is not NEED_DATA:
                return event
            assert data or replies, "both sides wait"

    def serve(self) -> None:
        while True:
            match self.server.next_event():
                case server.NEED_DATA | server.CLOSED | server.Closing():
                    return
                case server.Rcpt(recipient) if recipient.startswith("nobody"):
                    self.server.reject(Reply(550, "5.1.1 nobody"))
                case server.Content(body):
                    self.taken.append((self.server.sender or "", self.server.recipients[:], body))
                    self.server.accept()
                case _:
                    self.server.accept()

    def send(self, recipient: str, body: bytes) -> Event:
        self.client.mail("a@b.test", recipient, size=len(body))
        event = self.run()
        if isinstance(event, SendBody):
            self.client.send_body(body)
            event = self.run()
        return event


@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_client_and_server_agree_on_mail_after_mail(step: int) -> None:
    both = BackToBack(step)
    assert both.run() == Ready("mx.test")
    bodies = [b"hello\r\n", b".\r\n..\r\n.x\r\n", b"", b"a\n.\nb\r"]
    for body in bodies:
        assert isinstance(both.send("c@d.test", body), Accepted)
        assert isinstance(both.send("nobody@d.test", body), Refused)
    assert [body for _, _, body in both.taken] == [*bodies[:3], b"a\r\n.\r\nb\r\n"]
    assert all(to == ["c@d.test"] for _, to, _ in both.taken)


@pytest.mark.parametrize(
    ("dsn", "mail", "rcpt"),
    [
        ({}, b"", b""),
        ({"ret": "hdrs", "envid": "a+b=c d"}, b" RET=HDRS ENVID=a+2Bb+3Dc+20d", b""),
        (
            {"notify": "success, failure", "orcpt": "rfc822;x+y@z.test"},
            b"",
            b" NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;x+2By@z.test",
        ),
        ({"notify": "never"}, b"", b" NOTIFY=NEVER"),
        ({"notify": "never,delay"}, b"", b""),
        ({"notify": "x\r\nRSET"}, b"", b""),
        ({"ret": "x\r\nRSET", "envid": "x\r\nRSET"}, b" ENVID=x+0D+0ARSET", b""),
        ({"orcpt": "rfc822;x\r\nRSET"}, b"", b" ORCPT=rfc822;x+0D+0ARSET"),
        ({"orcpt": "r f c;x"}, b"", b""),
        ({"ret": 1, "envid": None, "notify": ["x"], "orcpt": {}}, b"", b""),
        ({"envid": "ä", "orcpt": "rfc822;ä"}, b"", b""),
        ({"orcpt": "utf-8;ä@z.test"}, b"", rb" ORCPT=utf-8;\x{E4}@z.test"),
    ],
)
def test_dsn_goes_on_to_a_peer_that_knows_it(
    dsn: dict[str, object], mail: bytes, rcpt: bytes
) -> None:
    for offer, known in ((b"250-DSN\r\n", True), (b"", False)):
        protocol = ClientProtocol("client.test")
        protocol.receive_data(b"220 hi\r\n")
        protocol.next_event()
        protocol.data_to_send()
        protocol.receive_data(b"250-mx\r\n" + offer + b"250 PIPELINING\r\n")
        protocol.next_event()
        protocol.mail("a@b.test", "c@d.test", dsn=dsn)
        assert protocol.data_to_send() == (
            b"MAIL FROM:<a@b.test>%b\r\nRCPT TO:<c@d.test>%b\r\nDATA\r\n"
            % ((mail, rcpt) if known else (b"", b""))
        )


def test_a_header_that_is_not_ascii_needs_smtputf8() -> None:
    protocol = ClientProtocol("client.test")
    protocol.receive_data(b"220 hi\r\n")
    protocol.next_event()
    protocol.data_to_send()
    protocol.receive_data(b"250 mx\r\n")
    protocol.next_event()
    protocol.mail("a@b.test", "c@d.test", utf8=True)
    event = protocol.next_event()
    assert isinstance(event, Refused)
    assert event.reply.status == "5.6.7"
    assert protocol.data_to_send() == b""


@pytest.mark.parametrize(
    ("offer", "mails", "domains"),
    [
        ("LIMITS MAILMAX=20 RCPTMAX=100 RCPTDOMAINMAX=1", 20, 1),
        ("limits mailmax=3", 3, 0),
        ("LIMITS RCPTMAX=1000", 0, 0),
        ("LIMITS", 0, 0),
        ("LIMITS MAILMAX=0 RCPTDOMAINMAX=-1", 0, 0),
        ("LIMITS MAILMAX=1000000", 0, 0),
        ("LIMITS MAILMAX=\u0663 =7 MAILMAX", 0, 0),
        ("LIMITS XMAILMAX=7 MAILMAX=999999", 999_999, 0),
    ],
)
def test_a_peer_says_its_limits(offer: str, mails: int, domains: int, bytewise: bool) -> None:
    protocol = opened(f"250-mx.test\r\n250 {offer}\r\n".encode(), bytewise=bytewise)
    assert (protocol.max_mails, protocol.max_domains) == (mails, domains)
