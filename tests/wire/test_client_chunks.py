"""Binary mail out of the client machine: BDAT, one chunk a mail, byte for byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.wire import server
from mailerq.wire.client import (
    NEED_DATA,
    Accepted,
    ClientProtocol,
    Failed,
    Problem,
    Ready,
    Refused,
    SendBody,
    Step,
)
from mailerq.wire.framing import BLOCK_BYTES
from mailerq.wire.smtp import Reply

BOTH = ("PIPELINING", "CHUNKING", "BINARYMIME")
BODY = b"Subject: x\n\n.\r\n\0\xff\r"
ENVELOPE = b"MAIL FROM:<a@b.test> BODY=BINARYMIME\r\nRCPT TO:<c@d.test>\r\n"


def opened(*offers: str) -> ClientProtocol:
    protocol = ClientProtocol("me.test")
    lines = "".join(f"250-{offer}\r\n" for offer in offers)
    protocol.receive_data(f"220 mx.test\r\n250-mx.test\r\n{lines}250 8BITMIME\r\n".encode())
    assert isinstance(protocol.next_event(), Ready)
    output(protocol)
    return protocol


def output(protocol: ClientProtocol) -> bytes:
    return b"".join(iter(protocol.data_to_send, b""))


def sending(body: bytes = BODY, *, last: bool = False) -> ClientProtocol:
    """A client whose envelope was taken, with the body to be sent."""
    protocol = opened(*BOTH)
    protocol.mail("a@b.test", "c@d.test", binary=True)
    output(protocol)
    protocol.receive_data(b"250 ok\r\n250 ok\r\n")
    assert isinstance(protocol.next_event(), SendBody)
    protocol.send_body(body, last=last)
    return protocol


def test_a_binary_mail_is_one_chunk_behind_the_replies_to_its_envelope() -> None:
    protocol = opened(*BOTH)
    protocol.mail("a@b.test", "c@d.test", binary=True, eight_bit=True)
    assert output(protocol) == ENVELOPE
    protocol.receive_data(b"250 ok\r\n")
    assert protocol.next_event() is NEED_DATA
    protocol.receive_data(b"250 ok\r\n")
    assert isinstance(protocol.next_event(), SendBody)
    protocol.send_body(BODY)
    assert output(protocol) == b"BDAT %d LAST\r\n%b" % (len(BODY), BODY)
    protocol.receive_data(b"250 taken\r\n")
    assert protocol.next_event() is NEED_DATA
    assert output(protocol) == b"RSET\r\n"
    protocol.receive_data(b"250 ok\r\n")
    assert protocol.next_event() == Accepted(Reply(250, "taken"))


@pytest.mark.parametrize("offers", [(), ("CHUNKING",), ("BINARYMIME",)])
def test_a_peer_that_does_not_offer_both_extensions_gets_lines(offers: tuple[str, ...]) -> None:
    protocol = opened(*offers)
    assert not protocol.takes_binary
    protocol.mail("a@b.test", "c@d.test", binary=True, eight_bit=True)
    assert output(protocol) == b"MAIL FROM:<a@b.test> BODY=8BITMIME\r\n"


def test_other_mail_goes_out_by_data() -> None:
    protocol = opened(*BOTH)
    protocol.mail("a@b.test", "c@d.test")
    assert output(protocol) == b"MAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\nDATA\r\n"


def test_no_envelope_goes_ahead_of_a_chunk_or_behind_it() -> None:
    assert not sending().may_go_ahead
    protocol = opened(*BOTH)
    protocol.mail("a@b.test", "c@d.test")
    output(protocol)
    protocol.receive_data(b"250 ok\r\n250 ok\r\n354 go\r\n")
    protocol.next_event()
    protocol.send_body(b"hi\r\n")
    assert protocol.may_go_ahead
    assert not protocol.mail("a@b.test", "c@d.test", binary=True)
    assert output(protocol) == b"hi\r\n.\r\n"


@pytest.mark.parametrize(
    ("replies", "step", "code"),
    [
        (b"550 no\r\n503 MAIL first\r\n", Step.MAILFROM, 550),
        (b"250 ok\r\n550 no\r\n", Step.RCPTTO, 550),
    ],
)
def test_quit_proves_that_an_envelope_is_refused(replies: bytes, step: Step, code: int) -> None:
    protocol = opened(*BOTH)
    protocol.mail("a@b.test", "c@d.test", binary=True)
    output(protocol)
    protocol.receive_data(replies)
    assert protocol.next_event() is NEED_DATA
    assert output(protocol) == b"QUIT\r\n"
    protocol.receive_data(b"221 bye\r\n")
    assert protocol.next_event() == Refused(step, Reply(code, "no"))


def test_503_to_a_chunk_is_out_of_step() -> None:
    protocol = sending()
    output(protocol)
    protocol.receive_data(b"503 MAIL first\r\n")
    event = protocol.next_event()
    assert isinstance(event, Failed)
    assert (event.step, event.problem) == (Step.MESSAGE, Problem.INVALID)
    assert protocol.out_of_step


@pytest.mark.parametrize("size", [BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES])
def test_a_large_chunk_goes_out_in_blocks(size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    protocol = sending(body, last=True)
    pieces = list(iter(protocol.data_to_send, b""))
    assert max(map(len, pieces)) <= BLOCK_BYTES + 50
    assert b"".join(pieces) == b"BDAT %d LAST\r\n%bQUIT\r\n" % (size, body)


def test_a_reply_in_the_middle_of_a_chunk_keeps_back_its_end() -> None:
    body = b"x" * (3 * BLOCK_BYTES)
    protocol = sending(body)
    protocol.data_to_send()
    protocol.data_to_send()
    protocol.receive_data(b"552 too big\r\n")
    assert protocol.data_to_send() == b""
    assert protocol.next_event() == Refused(Step.DATA, Reply(552, "too big"))
    assert protocol.ended


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=4), st.sampled_from([1, 3, 10_000]))
def test_any_bytes_arrive_as_they_are(bodies: list[bytes], step: int) -> None:
    """Both machines, with a network between them that delivers `step` bytes at a time."""
    client = ClientProtocol("me.test")
    peer = server.ServerProtocol(server.Settings(hostname="mx.test"))
    peer.greet()
    waiting, taken = list(bodies), list[bytes]()
    while waiting or not client.reusable:
        data = output(client)
        for at in range(0, len(data), step):
            peer.receive_data(data[at : at + step])
            while not isinstance(event := peer.next_event(), server.NoEvent):
                if isinstance(event, server.Content):
                    taken.append(bytes(event.body))
                peer.accept()
        replies = peer.data_to_send()
        assert data or replies, "both sides wait"
        for at in range(0, len(replies), step):
            client.receive_data(replies[at : at + step])
            event_ = client.next_event()
            assert not isinstance(event_, Refused | Failed)
            if isinstance(event_, SendBody):
                client.send_body(waiting.pop(0))
            elif isinstance(event_, Ready | Accepted) and waiting:
                client.mail("a@b.test", "c@d.test", binary=True)
    assert taken == bodies
