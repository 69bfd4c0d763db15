"""What is said behind a body, and what it proves: the whole rule, and what no client can tell."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest

from mailerq.wire.client import (
    NEED_DATA,
    Accepted,
    ClientProtocol,
    Event,
    Failed,
    Problem,
    Ready,
    Refused,
    Step,
)
from mailerq.wire.smtp import Reply
from tests.wire.step_kit import CHUNKS, LINES, TAKEN, Fate, Fault, play

Said = tuple[int | str, ...]
"""The codes that a peer says behind a body, and how the session ends where it does."""

CODES = (221, 250, 354, 421, 451, 500, 503, 550)
ENDS = ("closes", "falls silent")
REFUSALS = (500, 503, 550)

SESSIONS = [
    *((mode, False) for mode in LINES + CHUNKS if not mode.startswith(("first", "second"))),
    *((mode, True) for mode in ("lock-step", "pipelined", "slow chunks", "chunks")),
]
"""How the client sends, and whether it is careful."""


def sending(mode: str, careful: bool) -> ClientProtocol:
    """A client whose body is due to be sent."""
    way, _, last = mode.partition(", ")
    chunks = "chunks" in way
    protocol = ClientProtocol("me.test", careful=careful)
    offer = "250-PIPELINING\r\n" if way not in ("lock-step", "slow chunks") else ""
    offer += "250-CHUNKING\r\n250-BINARYMIME\r\n" if chunks else ""
    greeting = f"220 mx.test\r\n250-mx.test\r\n{offer}250 HELP\r\n".encode()
    for replies in (greeting, b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n")[: 4 - chunks]:
        protocol.receive_data(replies)
        event = protocol.next_event()
        if isinstance(event, Ready):
            protocol.mail("a@b.test", "c@d.test", binary=chunks)
        while protocol.data_to_send():
            pass
    protocol.send_body(b"hi\r\n", last=last == "last")
    return protocol


@pytest.mark.parametrize(("mode", "careful"), SESSIONS)
def test_rset_goes_out_behind_the_reply_to_a_body_and_quit_with_the_body(
    mode: str, careful: bool
) -> None:
    protocol = sending(mode, careful)
    assert protocol.may_go_ahead is (mode in ("pipelined", "ahead") and not careful)
    proof = b"QUIT\r\n" if careful or mode.endswith("last") else b"RSET\r\n"
    sent = protocol.data_to_send()
    assert not protocol.may_go_ahead
    protocol.receive_data(b"250 taken\r\n")
    assert protocol.next_event() is NEED_DATA
    sent_behind = protocol.data_to_send()
    body = b"BDAT 4 LAST\r\nhi\r\n" if "chunks" in mode else b"hi\r\n.\r\n"
    if mode in ("pipelined, last", "ahead, last", "chunks, last"):
        assert (sent, sent_behind) == (body + b"QUIT\r\n", b"")
    else:
        assert (sent, sent_behind) == (body, proof)
    protocol.receive_data(b"221 bye\r\n" if proof == b"QUIT\r\n" else b"250 reset\r\n")
    assert isinstance(protocol.next_event(), Accepted)
    assert protocol.reusable is (proof == b"RSET\r\n")


@pytest.mark.parametrize("mode", ["lock-step", "pipelined", "slow chunks", "chunks"])
@pytest.mark.parametrize("code", [451, 554])
def test_only_a_body_that_is_refused_for_good_is_followed_by_quit(mode: str, code: int) -> None:
    protocol = sending(mode, careful=False)
    protocol.data_to_send()
    protocol.receive_data(b"%d no\r\n" % code)
    event = protocol.next_event()
    if code == 554:
        assert event is NEED_DATA
        assert protocol.data_to_send() == b"QUIT\r\n"
        protocol.receive_data(b"221 bye\r\n")
        event = protocol.next_event()
    assert event == Refused(Step.MESSAGE, Reply(code, "no"))
    assert protocol.reusable is (code == 451)
    assert not protocol.out_of_step
    if code == 451:
        protocol.mail("a@b.test", "c@d.test")
        assert protocol.data_to_send().startswith(b"MAIL")


@pytest.mark.parametrize(("mode", "careful"), SESSIONS)
@pytest.mark.parametrize("code", [250, 550])
def test_more_than_was_due_proves_nothing(mode: str, careful: bool, code: int) -> None:
    protocol = sending(mode, careful)
    protocol.data_to_send()
    protocol.receive_data(b"%d done\r\n" % code)
    assert protocol.next_event() is NEED_DATA
    protocol.data_to_send()
    proof = b"221 bye\r\n" if protocol.step is Step.QUIT else b"250 reset\r\n"
    protocol.receive_data(proof + b"550 left over\r\n")
    event = protocol.next_event()
    assert isinstance(event, Failed)
    assert event.problem is Problem.INVALID
    assert protocol.out_of_step


def judge(mode: str, careful: bool, said: Said) -> Event:
    """What a client makes of that, each reply by itself; NEED_DATA before all of it: nothing."""
    protocol = sending(mode, careful)
    for number, word in enumerate(said, 1):
        while protocol.data_to_send():
            pass
        if word == "falls silent":
            event = protocol.abort(Problem.TIMEOUT, "no reply in time")
        else:
            protocol.receive_data(b"" if word == "closes" else b"%d text\r\n" % word)
            event = protocol.next_event()
        if event is not NEED_DATA:
            return event if number == len(said) else NEED_DATA
    return NEED_DATA


def everything() -> Iterator[Said]:
    for count in range(4):
        for codes in product(CODES, repeat=count):
            if codes:
                yield codes
            for end in ENDS:
                yield (*codes, end)


@pytest.mark.parametrize(("mode", "careful"), SESSIONS)
def test_a_lone_body_is_credited_after_these_replies_and_no_others(
    mode: str, careful: bool
) -> None:
    accepted: set[Said]
    # 503 to BDAT says that the envelope is not there, which the peer has taken.
    refusals = set(REFUSALS) - ({503} if "chunks" in mode else set())
    refused: set[Said] = {(code, last) for code in refusals for last in (221, "closes")}
    if careful:
        accepted = {(250, last) for last in (221, 421, *ENDS)}
        refused |= {(code, last) for code in refusals for last in (421, "falls silent")}
    elif mode.endswith("last"):
        accepted = {(250, 221), (250, "closes")}
    else:
        accepted = {(250, 250), (250, "closes")}
    judged = {said: judge(mode, careful, said) for said in everything()}
    assert {said for said, event in judged.items() if isinstance(event, Accepted)} == accepted
    assert {
        said
        for said, event in judged.items()
        if isinstance(event, Refused) and event.reply.code >= 500
    } == refused


@pytest.mark.parametrize(("mode", "careful"), SESSIONS)
@pytest.mark.parametrize("leaves", ["", " and close", " and bye", " and hush"])
@pytest.mark.parametrize(("said", "fate"), [(250, ("dot", 451)), (250, ("dot", 550)), (550, TAKEN)])
def test_a_lie_is_believed_only_where_an_honest_peer_says_the_same(
    mode: str, careful: bool, leaves: str, said: int, fate: Fate
) -> None:
    """Two peers say the same, and one of them means it: a client that believes it believes both."""
    dot = 4 if "chunks" in mode else 5
    liar, lied = play([fate], Fault(f"lie{leaves}", dot, said), mode, careful=careful)
    assert lied.steps[dot] == "dot"
    honesty = Fault(f"lie{leaves}", dot + 1) if leaves else Fault()
    honest, meant = play([("dot", said)], honesty, mode, careful=careful)
    assert (lied.truth, meant.truth) == ({0: fate[1]}, {0: said})
    assert codes(liar.heard) == codes(honest.heard)
    believed = isinstance(liar.results[0], Accepted | Refused)
    assert believed is isinstance(honest.results[0], Accepted | Refused)
    if leaves in (" and bye", " and hush"):
        assert believed is careful
    else:
        assert believed


def codes(heard: bytes) -> list[bytes]:
    return [line[:3] for line in heard.split(b"\r\n")]
