"""STARTTLS in the client machine: nothing that came in clear counts, whatever a peer tries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.wire.client import (
    NEED_DATA,
    ClientProtocol,
    Event,
    Failed,
    Problem,
    Ready,
    Refused,
    StartTls,
    Step,
)
from mailerq.wire.login import Login
from mailerq.wire.smtp import LocalProtocolError

BANNER = b"220 mx.test ESMTP\r\n"
OFFER = b"250-mx.test\r\n250-SIZE 10\r\n250-LIMITS MAILMAX=1\r\n250 STARTTLS\r\n"
GO = b"220 go\r\n"


def feed(protocol: ClientProtocol, *pieces: bytes) -> tuple[Event, bytes]:
    """Feed replies one after the other: the last event, and all output."""
    event, sent = protocol.next_event(), b""
    for piece in pieces:
        protocol.receive_data(piece)
        event = protocol.next_event()
        while data := protocol.data_to_send():
            sent += data
    return event, sent


def test_starttls_is_said_where_it_is_offered_and_everything_begins_anew() -> None:
    protocol = ClientProtocol("me.test", tls=True)
    event, sent = feed(protocol, BANNER, OFFER, GO)
    assert event == StartTls()
    assert sent == b"EHLO me.test\r\nSTARTTLS\r\n"
    assert protocol.step is Step.STARTTLS
    assert (protocol.max_mails, protocol.secure) == (1, False)
    protocol.secured()
    assert (protocol.extensions, protocol.max_mails, protocol.secure) == ({}, 0, True)
    assert protocol.data_to_send() == b"EHLO me.test\r\n"


def test_what_was_offered_in_clear_is_forgotten() -> None:
    protocol = ClientProtocol("me.test", tls=True)
    feed(protocol, BANNER, OFFER, GO)
    protocol.secured()
    assert protocol.data_to_send() == b"EHLO me.test\r\n"
    event, _ = feed(protocol, b"250-mx.test\r\n250 PIPELINING\r\n")
    assert event == Ready("mx.test")
    assert protocol.extensions == {"PIPELINING": ""}


def test_a_second_offer_inside_tls_is_not_taken() -> None:
    protocol = ClientProtocol("me.test", tls=True)
    feed(protocol, BANNER, OFFER, GO)
    protocol.secured()
    protocol.data_to_send()
    event, sent = feed(protocol, OFFER)
    assert (event, sent) == (Ready("mx.test"), b"")


def test_a_peer_without_starttls_goes_on_in_clear_only_if_nothing_demands_tls() -> None:
    assert feed(ClientProtocol("me.test", tls=True), BANNER, b"250 mx.test\r\n")[0] == Ready(
        "mx.test"
    )
    event, _ = feed(ClientProtocol("me.test", must_tls=True), BANNER, b"250 mx.test\r\n")
    assert isinstance(event, Refused)
    assert (event.step, event.ours, event.reply.status) == (Step.STARTTLS, True, "4.7.5")


def test_a_peer_that_knows_only_helo_has_no_tls() -> None:
    for must, expected in ((False, Ready), (True, Refused)):
        protocol = ClientProtocol("me.test", tls=True, must_tls=must)
        event, sent = feed(protocol, BANNER, b"502 what?\r\n", b"250 mx.test\r\n")
        assert isinstance(event, expected)
        assert b"MAIL" not in sent


def test_starttls_is_not_said_unless_asked_for() -> None:
    event, sent = feed(ClientProtocol("me.test"), BANNER, OFFER)
    assert (event, sent) == (Ready("mx.test"), b"EHLO me.test\r\n")


@pytest.mark.parametrize("reply", [b"454 not now\r\n", b"500 what\r\n", b"421 bye\r\n"])
def test_a_refusal_ends_the_session(reply: bytes) -> None:
    for must in (False, True):
        event, _ = feed(ClientProtocol("me.test", tls=True, must_tls=must), BANNER, OFFER, reply)
        assert isinstance(event, Refused)
        assert event.step is Step.STARTTLS
        assert not event.ours


@pytest.mark.parametrize(
    "reply",
    [
        b"250 yes\r\n",
        b"221 bye\r\n",
        b"354 go\r\n",
        b"334 go\r\n",
        b"\x16\x03\x01\x02\r\n",
        b"220 go\r\n250 injected\r\n",
        b"220 go\r\n2",
        b"220 go\r\n\x16\x03\x03",
    ],
)
def test_nonsense_and_input_behind_the_reply_end_the_session(reply: bytes) -> None:
    event, _ = feed(ClientProtocol("me.test", tls=True), BANNER, OFFER, reply)
    assert isinstance(event, Failed)
    assert (event.step, event.problem) == (Step.STARTTLS, Problem.INVALID)


def test_a_peer_that_answers_before_it_is_asked_is_found_out() -> None:
    event, sent = feed(ClientProtocol("me.test", tls=True), BANNER, OFFER + GO)
    assert isinstance(event, Failed)
    assert (event.step, event.problem) == (Step.STARTTLS, Problem.INVALID)
    assert b"STARTTLS" not in sent


def test_every_byte_of_the_way_may_come_alone() -> None:
    protocol = ClientProtocol("me.test", tls=True)
    feed(protocol, BANNER)
    stream = OFFER + GO
    seen: list[Event] = []
    for n in range(len(stream)):
        if n == len(OFFER):
            assert protocol.due == (Step.STARTTLS,)
        event, _ = feed(protocol, stream[n : n + 1])
        seen.append(event)
    assert seen[-1] == StartTls()
    assert set(map(type, seen[:-1])) == {type(NEED_DATA)}


def test_lmtp_begins_anew_with_lhlo() -> None:
    protocol = ClientProtocol("me.test", lmtp=True, tls=True)
    feed(protocol, BANNER, OFFER, GO)
    protocol.secured()
    assert protocol.data_to_send() == b"LHLO me.test\r\n"


def test_the_login_waits_for_tls() -> None:
    protocol = ClientProtocol("me.test", login=Login("ann", "pass"), must_tls=True)
    event, sent = feed(protocol, BANNER, b"250-mx.test\r\n250-AUTH PLAIN\r\n250 STARTTLS\r\n", GO)
    assert event == StartTls()
    assert b"AUTH" not in sent
    protocol.secured()
    protocol.data_to_send()
    _, sent = feed(protocol, b"250-mx.test\r\n250 AUTH PLAIN\r\n")
    assert sent.startswith(b"AUTH PLAIN ")


def test_no_handshake_is_done_out_of_turn() -> None:
    protocol = ClientProtocol("me.test", tls=True)
    with pytest.raises(LocalProtocolError):
        protocol.secured()
    feed(protocol, BANNER, OFFER)
    protocol.abort(Problem.LOST, "gone")
    with pytest.raises(LocalProtocolError):
        protocol.secured()


def test_requiretls_goes_only_to_a_peer_that_offers_it() -> None:
    protocol = ClientProtocol("me.test", tls=True)
    feed(protocol, BANNER, OFFER, GO)
    protocol.secured()
    protocol.data_to_send()
    feed(protocol, b"250-mx.test\r\n250 REQUIRETLS\r\n")
    assert protocol.mail("a@b.test", "c@d.test", require_tls=True)
    assert protocol.data_to_send() == b"MAIL FROM:<a@b.test> REQUIRETLS\r\n"
    plain = ClientProtocol("me.test")
    feed(plain, BANNER, b"250 mx.test\r\n")
    assert plain.mail("a@b.test", "c@d.test", require_tls=True)
    assert plain.data_to_send() == b""
    event = plain.next_event()
    assert isinstance(event, Refused)
    assert (event.ours, event.reply.status) == (True, "4.7.30")


@given(st.binary(max_size=200), st.booleans())
def test_nothing_that_a_peer_says_in_clear_is_taken_for_something_said_inside_tls(
    noise: bytes, must: bool
) -> None:
    """Whatever stands between EHLO and the handshake, no extension of it survives."""
    protocol = ClientProtocol("me.test", tls=True, must_tls=must)
    feed(protocol, BANNER)
    event, sent = feed(protocol, OFFER + noise)
    if noise:
        assert not isinstance(event, StartTls)
        assert b"STARTTLS" not in sent
        return
    event, _ = feed(protocol, GO)
    assert isinstance(event, StartTls)
    protocol.secured()
    assert protocol.extensions == {}
