"""AUTH in the client machine: the mechanisms, what a peer may say to them, and the secrets."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.wire import sasl, server
from mailerq.wire.client import (
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
from mailerq.wire.login import MECHANISMS, Login
from mailerq.wire.smtp import Reply

ANN = Login("ann", "pass-phrase")


def coded(text: str | bytes) -> bytes:
    return base64.b64encode(text.encode() if isinstance(text, str) else text)


PLAIN = coded("\0ann\0pass-phrase")


def output(protocol: ClientProtocol) -> bytes:
    return b"".join(iter(protocol.data_to_send, b""))


def greeted(offer: str, login: Login | None = ANN) -> tuple[ClientProtocol, Event]:
    """A client behind the reply to EHLO, and the event of that."""
    protocol = ClientProtocol("me.test", login=login)
    protocol.receive_data(f"220 mx.test\r\n250-mx.test\r\n250 {offer}\r\n".encode())
    return protocol, protocol.next_event()


def logging_in(offer: str) -> ClientProtocol:
    protocol = ClientProtocol("me.test", login=ANN)
    protocol.receive_data(b"220 mx.test\r\n")
    protocol.next_event()
    output(protocol)
    protocol.receive_data(f"250-mx.test\r\n250 AUTH {offer}\r\n".encode())
    assert protocol.next_event() is NEED_DATA
    return protocol


def say(protocol: ClientProtocol, reply: bytes, *, bytewise: bool = False) -> Event:
    event: Event = NEED_DATA
    for piece in (reply[i : i + 1] for i in range(len(reply))) if bytewise else (reply,):
        protocol.receive_data(piece)
        event = protocol.next_event()
    return event


@pytest.fixture(params=[False, True], ids=["whole", "bytewise"])
def bytewise(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_plain_is_one_command(bytewise: bool) -> None:
    protocol = logging_in("LOGIN PLAIN")
    assert output(protocol) == b"AUTH PLAIN " + PLAIN + b"\r\n"
    assert protocol.step is Step.AUTHPLAIN
    assert say(protocol, b"235 2.7.0 hello ann\r\n", bytewise=bytewise) == Ready("mx.test")
    assert protocol.reusable
    assert protocol.mechanism == "plain"


def test_login_sends_the_name_and_the_password_one_by_one(bytewise: bool) -> None:
    protocol = logging_in("login")
    assert output(protocol) == b"AUTH LOGIN\r\n"
    assert protocol.step is Step.AUTHLOGIN
    say(protocol, b"334 VXNlcm5hbWU6\r\n", bytewise=bytewise)
    assert (protocol.step, output(protocol)) == (Step.AUTHUSERNAME, coded("ann") + b"\r\n")
    say(protocol, b"334 UGFzc3dvcmQ6\r\n", bytewise=bytewise)
    assert (protocol.step, output(protocol)) == (Step.AUTHPASSWORD, coded("pass-phrase") + b"\r\n")
    assert say(protocol, b"235 hello\r\n", bytewise=bytewise) == Ready("mx.test")


def test_cram_md5_is_the_example_of_the_standard() -> None:
    protocol = ClientProtocol("me.test", login=Login("tim", "tanstaaftanstaaf"))
    say(protocol, b"220 mx.test\r\n250-mx.test\r\n250 AUTH PLAIN CRAM-MD5\r\n")
    assert output(protocol).endswith(b"AUTH CRAM-MD5\r\n")
    challenge = coded("<1896.697170952@postoffice.reston.mci.net>")
    say(protocol, b"334 " + challenge + b"\r\n")
    assert protocol.step is Step.AUTHRESPONSE
    digest = b"tim b913a602c7eda7a495b4e6e7334d3890"
    assert output(protocol) == coded(digest) + b"\r\n"


def test_a_long_response_of_plain_waits_for_334() -> None:
    protocol = ClientProtocol("me.test", login=Login("ann", "x" * 500))
    say(protocol, b"220 mx.test\r\n250-mx.test\r\n250 AUTH PLAIN\r\n")
    assert output(protocol).endswith(b"AUTH PLAIN\r\n")
    say(protocol, b"334 \r\n")
    assert output(protocol) == coded("\0ann\0" + "x" * 500) + b"\r\n"
    assert say(protocol, b"235 hello\r\n") == Ready("mx.test")


@pytest.mark.parametrize("offer", ["AUTH", "AUTH GSSAPI XOAUTH2", "AUTH=PLAIN", "XAUTH PLAIN"])
def test_a_peer_without_a_known_mechanism_gets_no_mail(offer: str) -> None:
    protocol, event = greeted(offer)
    assert isinstance(event, Refused)
    assert (event.step, event.reply.status) == (Step.EHLO, "4.7.0")
    assert protocol.ended


def test_a_session_without_a_login_says_no_auth() -> None:
    protocol, event = greeted("AUTH PLAIN", login=None)
    assert event == Ready("mx.test")
    assert protocol.mechanism is None


@pytest.mark.parametrize("code", [421, 454, 501, 535])
@pytest.mark.parametrize(
    ("offer", "prompts", "step"),
    [
        ("PLAIN", (), Step.AUTHPLAIN),
        ("LOGIN", (), Step.AUTHLOGIN),
        ("LOGIN", ("334 x===\r\n",), None),
        ("LOGIN", ("334 \r\n",), Step.AUTHUSERNAME),
        ("LOGIN", ("334 \r\n", "334 \r\n"), Step.AUTHPASSWORD),
        ("CRAM-MD5", (), Step.AUTHCRAM),
        ("CRAM-MD5", ("334 PDE+\r\n",), Step.AUTHRESPONSE),
    ],
)
def test_a_refusal_ends_the_session_where_it_comes(
    offer: str, prompts: tuple[str, ...], step: Step | None, code: int, bytewise: bool
) -> None:
    protocol = logging_in(offer)
    for prompt in prompts:
        event = say(protocol, prompt.encode(), bytewise=bytewise)
    if step is None:
        assert isinstance(event, Failed)
        return
    event = say(protocol, b"%d 5.7.8 no\r\n" % code, bytewise=bytewise)
    assert event == Refused(step, Reply(code, "5.7.8 no"))
    assert protocol.ended
    assert not output(protocol).startswith(b"MAIL")


@pytest.mark.parametrize(
    ("offer", "replies"),
    [
        ("PLAIN", (b"250 ok\r\n",)),
        ("PLAIN", (b"334 \r\n",)),
        ("PLAIN", (b"354 go\r\n",)),
        ("PLAIN", (b"221 bye\r\n",)),
        ("PLAIN", (b"hello\r\n",)),
        ("LOGIN", (b"235 hello\r\n",)),
        ("LOGIN", (b"334 \r\n", b"235 hello\r\n")),
        ("LOGIN", (b"334 \r\n", b"334 \r\n", b"334 \r\n")),
        ("CRAM-MD5", (b"334 no base64!\r\n",)),
        ("CRAM-MD5", (b"235 hello\r\n",)),
    ],
)
def test_what_cannot_answer_auth_ends_the_session(offer: str, replies: tuple[bytes, ...]) -> None:
    protocol = logging_in(offer)
    for reply in replies:
        event = say(protocol, reply)
    assert isinstance(event, Failed)
    assert event.problem is Problem.INVALID
    assert event.step.startswith("auth")


@pytest.mark.parametrize("code", [235, 334, 250, 421, 501, 535])
@pytest.mark.parametrize("offer", MECHANISMS)
@pytest.mark.parametrize("secret", [b"pass-phrase", coded("pass-phrase"), PLAIN])
def test_a_peer_that_echoes_the_password_does_not_get_it_into_a_result(
    offer: str, secret: bytes, code: int
) -> None:
    for words in (b"%d %b\r\n" % (code, secret), b"%d-x\r\n%d %b\r\n" % (code, code, secret)):
        for reply in (words, secret + b"\r\n"):
            protocol = logging_in(offer)
            for _ in range(4):
                if isinstance(event := say(protocol, reply), Refused | Failed):
                    assert "pass-phrase" not in repr(event)
                    assert secret.decode() not in repr(event)


@pytest.mark.parametrize("password", ["2", ".", "5.7", "mx.test", "PLAIN", "AUTH"])
def test_hiding_a_password_spoils_no_reply(password: str) -> None:
    protocol = ClientProtocol("me.test", login=Login("ann", password))
    say(protocol, b"220 mx.test\r\n250-mx.test\r\n250 AUTH PLAIN\r\n")
    assert protocol.mta == "mx.test"
    event = say(protocol, b"535 5.7.8 no\r\n")
    assert event == Refused(Step.AUTHPLAIN, Reply(535, "5.7.8 no"))


def test_nothing_shows_a_password() -> None:
    assert (
        "pass-phrase" not in f"{ANN} {ANN!r} {(ANN,)} {[ANN]!r} {vars(type('X', (), {'a': ANN}))}"
    )


CHARS = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
WORDS = st.text(CHARS, min_size=1, max_size=30)


@given(
    WORDS, WORDS, st.sampled_from(sorted(MECHANISMS)), st.sampled_from([1, 4, 1000]), st.booleans()
)
def test_the_server_machine_learns_every_login(
    username: str, password: str, mechanism: str, step: int, right: bool
) -> None:
    """Both machines, with a network between them that delivers `step` bytes at a time."""
    client = ClientProtocol("me.test", login=Login(username, password))
    settings = server.Settings(hostname="mx.test", mechanisms=(mechanism,))
    peer = server.ServerProtocol(settings, auth_in_clear=True)
    peer.greet()
    known = password if right else password + "x"
    event: Event = NEED_DATA
    while event is NEED_DATA:
        data = output(client)
        for at in range(0, len(data), step):
            peer.receive_data(data[at : at + step])
            while not isinstance(said := peer.next_event(), server.NoEvent):
                if isinstance(said, server.Auth):
                    assert isinstance(said.credentials, sasl.Credentials)
                    assert said.credentials.login == username
                    if said.credentials.proves(known):
                        peer.accept()
                    else:
                        peer.reject(Reply(535, "5.7.8 no"))
                else:
                    peer.accept()
        replies = peer.data_to_send()
        assert data or replies, "both sides wait"
        for at in range(0, len(replies), step):
            client.receive_data(replies[at : at + step])
            event = client.next_event()
    if right:
        assert event == Ready("mx.test")
    else:
        assert isinstance(event, Refused)
        assert event.reply.code == 535


@given(st.lists(st.sampled_from([
    b"220 mx\r\n", b"250-mx\r\n250 AUTH LOGIN\r\n", b"334 \r\n", b"334 !\r\n", b"235 x\r\n",
    b"250 x\r\n", b"421 x\r\n", b"535 x\r\n", b"354 x\r\n", b"x\r\n", b"",
]), max_size=12))  # fmt: skip
def test_no_replies_make_the_machine_raise_or_take_mail_without_a_login(
    replies: list[bytes],
) -> None:
    protocol = ClientProtocol("me.test", login=ANN)
    sent = b""
    for reply in replies:
        protocol.receive_data(reply)
        event = protocol.next_event()
        if isinstance(event, Ready) and protocol.reusable:
            assert coded("pass-phrase") in sent
            protocol.mail("a@b.test", "c@d.test")
        elif isinstance(event, SendBody):
            protocol.send_body(b"hi\r\n")
        sent += output(protocol)
        assert not isinstance(event, Accepted) or b"MAIL" in sent
