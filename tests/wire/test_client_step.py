"""The client machine and a peer whose replies are out of step: none is credited to another mail.

The peer is an honest server, which keeps what became of each mail. Its replies then go through
one `Fault`. The model enumerates the fates of mails, the faults, the reply that each befalls, and
how replies are cut on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.wire.client import (
    NEED_DATA,
    Accepted,
    ClientProtocol,
    Failed,
    Problem,
    Ready,
    Refused,
    SendBody,
)
from tests.wire.step_kit import FATES, MANNERS, TAKEN, Fate, Fault, Server, faults

Cut = Callable[[list[bytes]], Iterator[bytes]]
"""How the replies that leave together arrive: the pieces, between which the client acts."""


def whole(replies: list[bytes]) -> Iterator[bytes]:
    yield b"".join(replies)


def bytewise(replies: list[bytes]) -> Iterator[bytes]:
    for byte in b"".join(replies):
        yield bytes((byte,))


def behind(mask: int) -> Cut:
    """A cut behind each reply whose bit is set."""

    def cut(replies: list[bytes]) -> Iterator[bytes]:
        piece = b""
        for number, reply in enumerate(replies):
            piece += reply
            if mask >> number & 1:
                yield piece
                piece = b""
        yield piece

    return cut


one_by_one = behind(-1)


@dataclass
class Client:
    """Sends mail 0, 1, 2 … as a connection does, and keeps what became of each."""

    server: Server
    ahead: bool
    results: dict[int, object] = field(default_factory=dict)
    followed: set[int] = field(default_factory=set)
    protocol: ClientProtocol = field(default_factory=lambda: ClientProtocol("me.test"))
    _mail: int = -1
    _next: int = 0
    _went_ahead: bool = False

    def run(self, cut: Cut) -> None:
        server = self.server
        server.greet()
        while True:
            replies, server.replies = server.replies, []
            for piece in filter(None, cut(replies)):
                self.protocol.receive_data(piece)
                self.act()
            if not server.replies and not server.say_late():
                break
        if server.closed:
            self.protocol.receive_data(b"")
        else:
            self.protocol.abort(Problem.TIMEOUT, "no reply in time")
        self.act()
        assert self._mail < 0, "the mail under way is neither reported nor given back"

    def act(self) -> None:
        while (event := self.protocol.next_event()) is not NEED_DATA:
            if isinstance(event, SendBody):
                self.protocol.send_body(b"%d\r\n" % self._mail)
                if self.ahead and self._next < len(self.server.fates):
                    if self.protocol.may_go_ahead:
                        self._went_ahead = self._begin(self._next)
                        self.followed.add(self._mail)
            elif isinstance(event, Ready):
                self._take_next()
            elif isinstance(event, Accepted | Refused | Failed):
                if self._mail >= 0:
                    assert self._mail not in self.results
                    self.results[self._mail] = event
                    self._mail = -1
                if self.protocol.ended:
                    return
                self._take_next()
            else:
                return
        self._send()

    def _take_next(self) -> None:
        if self._next < len(self.server.fates):
            self._mail, self._next = self._next, self._next + 1
            # What a driver does: an input that makes no sense ends the session before a mail.
            if not self._went_ahead and self.protocol.reusable:
                self._begin(self._mail)
            self._went_ahead = False

    def _begin(self, number: int) -> bool:
        return self.protocol.mail(f"{number}@a.test", "c@d.test")

    def _send(self) -> None:
        while data := self.protocol.data_to_send():
            self.server.feed(data)


def play(
    fates: Sequence[Fate],
    fault: Fault,
    mode: str,
    manner: str = "503",
    cut: Cut = whole,
    *,
    careful: bool = False,
) -> tuple[Client, Server]:
    server = Server(fates, fault, pipelining=mode != "lock-step", manner=manner)
    protocol = ClientProtocol("me.test", careful=careful)
    client = Client(server, ahead=mode == "ahead", protocol=protocol)
    client.run(cut)
    return client, server


def check(client: Client, server: Server) -> None:
    """The guarantees of `mailerq.wire.client`."""
    for number, event in client.results.items():
        truth = server.truth.get(number, 0)
        if isinstance(event, Accepted) and truth != 250:
            assert server.fault.lies(server.steps, 250), event
            assert number not in client.followed, "an envelope ahead finds it out"
        if isinstance(event, Refused) and event.reply.code >= 500 and truth < 500:
            assert server.fault.lies(server.steps, 550), event


MODES = ("lock-step", "pipelined", "ahead")

SOME_FATES: tuple[Fate, ...] = (TAKEN, ("dot", 550), ("rcpt", 550))


def check_faults(
    fates: Sequence[Fate], mode: str, manner: str = "503", cuts: Sequence[Cut] = (whole, one_by_one)
) -> None:
    honest = play(fates, Fault(), mode, manner)
    check(*honest)
    for fault in faults(len(honest[1].steps)):
        for cut in cuts:
            check(*play(fates, fault, mode, manner, cut))


@pytest.mark.parametrize(
    ("mode", "manner"), [("lock-step", "503"), *product(("pipelined", "ahead"), MANNERS)]
)
def test_two_mails_of_all_fates_hold_through_every_fault(mode: str, manner: str) -> None:
    cuts = (whole, one_by_one) if manner == "503" else (one_by_one,)
    for fates in product(FATES, repeat=2):
        check_faults(fates, mode, manner, cuts)


@pytest.mark.parametrize("mode", ["lock-step", "pipelined"])
def test_a_careful_client_believes_no_reply_to_a_body_that_the_peer_did_not_mean(mode: str) -> None:
    for fate in FATES:
        honest = play((fate,), Fault(), mode, careful=True)
        for fault in faults(len(honest[1].steps)):
            for cut in (whole, one_by_one):
                client, server = play((fate,), fault, mode, cut=cut, careful=True)
                truth = server.truth.get(0, 0)
                event = client.results.get(0)
                if isinstance(event, Accepted):
                    assert truth == 250, fault
                if isinstance(event, Refused) and event.reply.code >= 500:
                    assert truth >= 500, fault


@pytest.mark.parametrize("mode", ["lock-step", "pipelined"])
def test_a_careful_client_believes_an_honest_peer(mode: str) -> None:
    for fate in FATES:
        client, server = play((fate,), Fault(), mode, careful=True)
        event = client.results[0]
        assert isinstance(event, Accepted | Refused)
        assert event.reply.code == server.truth[0]
        assert not client.protocol.out_of_step
        # One that closes in place of a reply to QUIT has left nothing over either.
        if isinstance(event, Accepted):
            client, _ = play((fate,), Fault("cut", len(server.steps) - 1), mode, careful=True)
            assert client.results[0] == event


@pytest.mark.parametrize("replies", range(6, 9))
@pytest.mark.parametrize("manner", MANNERS)
def test_a_peer_that_leaves_behind_a_body_is_believed_where_statuses_tell_replies_apart(
    manner: str, replies: int
) -> None:
    client, _ = play((TAKEN, TAKEN), Fault("cut", replies), "ahead", manner, one_by_one)
    if manner == "554 5.5.1":
        assert isinstance(client.results[0], Accepted)
        assert not client.protocol.out_of_step
    else:
        assert isinstance(client.results[0], Failed)
        assert client.protocol.out_of_step


def test_four_mails_hold_through_every_fault() -> None:
    for fates in product(SOME_FATES, repeat=4):
        check_faults(fates, "ahead")


@pytest.mark.parametrize("mode", ["pipelined", "ahead"])
def test_two_mails_hold_wherever_the_replies_are_cut(mode: str) -> None:
    cuts = [bytewise, *map(behind, range(32))]
    for fates in product(SOME_FATES, repeat=2):
        check_faults(fates, mode, cuts=cuts)


@given(
    st.lists(st.sampled_from(FATES), min_size=3, max_size=30),
    st.sampled_from(MODES),
    st.sampled_from(sorted(MANNERS)),
    st.integers(0, 63),
    st.data(),
)
def test_long_sessions_hold_through_a_fault_anywhere(
    fates: list[Fate], mode: str, manner: str, mask: int, data: st.DataObject
) -> None:
    _, server = play(fates, Fault(), mode, manner)
    fault = data.draw(st.sampled_from(list(faults(len(server.steps)))))
    check(*play(fates, fault, mode, manner, behind(mask)))


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("mode", MODES)
def test_an_honest_peer_is_believed(mode: str, manner: str) -> None:
    for fates in product(FATES, repeat=3):
        both = any(
            body != TAKEN and body[0] == "dot" and sender[0] == "mail"
            for body, sender in pairwise(fates)
        )
        if mode == "ahead" and (both or manner in ("own", "354")):
            continue  # these replies to an envelope ahead prove nothing
        for cut in (whole, one_by_one, bytewise):
            client, server = play(fates, Fault(), mode, manner, cut)
            assert not client.protocol.out_of_step
            for number, event in client.results.items():
                if isinstance(event, Accepted | Refused):
                    assert event.reply.code == server.truth[number]
                else:
                    assert not server.truth.get(number), "its turn came when the session ended"


@pytest.mark.parametrize("manner", MANNERS)
def test_only_a_refusal_with_nothing_behind_it_costs_an_honest_peer_the_connection(
    manner: str,
) -> None:
    for fates in product(FATES, repeat=3):
        for mode, costs in (("lock-step", ("mail", "rcpt", "data")), ("pipelined", ("data",))):
            client, server = play(fates, Fault(), mode, manner)
            ended = "quit" in server.steps
            assert ended is any((step, 550) in fates for step in costs)
            assert ended or len(client.results) == len(fates)


@pytest.mark.parametrize("code", [250, 550])
def test_two_replies_at_once_to_one_body_end_no_mail(code: int) -> None:
    client, server = play([("dot", 451)], Fault("insert", 5, code), "pipelined")
    assert server.steps[5] == "dot"
    assert isinstance(client.results[0], Failed)
