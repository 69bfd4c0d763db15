"""The client machine and a peer whose replies are out of step: none is credited to another mail.

The peer is an honest server, which keeps what became of each mail. Its replies then go through
one `Fault`. The model enumerates the fates of mails, the faults, the reply that each befalls, and
how replies are cut on their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.wire.client import Accepted, Failed, Refused
from tests.wire.step_kit import (
    FATES,
    LOGINS,
    MANNERS,
    MODES,
    TAKEN,
    UNASKED,
    UNASKED_OF_AUTH,
    Client,
    Fate,
    Fault,
    Server,
    behind,
    bytewise,
    faults,
    one_by_one,
    play,
    whole,
)


def check(client: Client, server: Server) -> None:
    """The guarantees of `mailerq.wire.client`."""
    for number, event in client.results.items():
        truth = server.truth.get(number, 0)
        if isinstance(event, Accepted):
            assert truth == 250, server.fault
        if isinstance(event, Refused) and event.reply.code >= 500:
            assert truth >= 500, server.fault


SOME_FATES: tuple[Fate, ...] = (TAKEN, ("dot", 550), ("rcpt", 550))

PAIRS = list(product(FATES, repeat=2))

SOME_PAIRS = PAIRS[::4]
"""Each fate is in them as the first and as the second, with several others."""


def check_faults(
    fates: Sequence[Fate],
    mode: str,
    manner: str = "503",
    *,
    careful: bool = False,
    believes: bool = True,
) -> None:
    """Try every fault, with the replies of a batch in one piece and one by one."""
    way: dict[str, bool] = {"careful": careful, "believes": believes}
    honest = play(fates, Fault(), mode, manner, **way)
    check(*honest)
    unasked = UNASKED + UNASKED_OF_AUTH if mode in LOGINS else UNASKED
    for fault in faults(len(honest[1].steps), unasked):
        client, server = play(fates, fault, mode, manner, whole, **way)
        check(client, server)
        if client.longest > 1:
            check(*play(fates, fault, mode, manner, one_by_one, **way))


@pytest.mark.parametrize(
    ("mode", "manner"),
    [
        *((mode, "503") for mode in MODES),
        *product(
            ("pipelined", "ahead", "chunks", "first chunk"),
            [manner for manner in MANNERS if manner != "503"],
        ),
    ],
)
def test_two_mails_hold_through_every_fault(mode: str, manner: str) -> None:
    for fates in SOME_PAIRS:
        check_faults(fates, mode, manner)


@pytest.mark.parametrize("mode", LOGINS)
def test_a_peer_that_does_not_know_the_login_takes_no_mail_through_any_fault(mode: str) -> None:
    for fates in SOME_PAIRS[:6]:
        check_faults(fates, mode, believes=False)
    client, server = play((TAKEN,), Fault(), mode, believes=False)
    assert (client.results, server.truth) == ({}, {})
    assert isinstance(refused := client.protocol.next_event(), Refused)
    assert refused.reply.code == 535


@pytest.mark.parametrize("mode", ["lock-step", "pipelined", "chunks"])
def test_mail_of_a_careful_client_holds_through_every_fault(mode: str) -> None:
    for fates in SOME_PAIRS:
        check_faults(fates, mode, careful=True)


@pytest.mark.soak
@pytest.mark.parametrize("careful", [False, True])
@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("mode", MODES)
def test_two_mails_of_all_fates_hold_through_every_fault(
    mode: str, manner: str, careful: bool
) -> None:
    for fates in PAIRS:
        check_faults(fates, mode, manner, careful=careful)


@pytest.mark.parametrize("mode", MODES)
def test_a_careful_client_believes_an_honest_peer(mode: str) -> None:
    for fate in FATES:
        client, server = play((fate,), Fault(), mode, careful=True)
        event = client.results[0]
        assert isinstance(event, Accepted | Refused)
        assert event.reply.code == server.truth[0]
        assert not client.protocol.out_of_step


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


@pytest.mark.parametrize("count", [3, pytest.param(4, marks=pytest.mark.soak)])
def test_more_mails_hold_through_every_fault(count: int) -> None:
    for fates in product(SOME_FATES, repeat=count):
        check_faults(fates, "ahead")


@pytest.mark.parametrize("mode", ["pipelined", "pipelined, last", "ahead", "chunks", "first chunk"])
def test_two_mails_hold_wherever_the_replies_are_cut(mode: str) -> None:
    for fates in product(SOME_FATES, repeat=2):
        _, honest = play(fates, Fault(), mode)
        for fault in faults(len(honest.steps)):
            check(*play(fates, fault, mode, cut=bytewise))
            mask, masks = 0, 1
            while mask < masks:
                client, server = play(fates, fault, mode, cut=behind(mask))
                check(client, server)
                masks = max(masks, 2**client.longest // 2)
                mask += 1


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
    for fates in (*PAIRS, *product(FATES, repeat=3)):
        both = any(
            body != TAKEN and body[0] == "dot" and sender[0] == "mail"
            for body, sender in pairwise(fates)
        )
        if mode.startswith("ahead") and (both or manner in ("own", "354")):
            continue  # these replies to an envelope ahead prove nothing
        for cut in (whole, bytewise) if len(fates) == 2 else (whole, one_by_one):
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
        for mode, costs in (
            ("lock-step", ("mail", "rcpt", "data", "dot")),
            ("pipelined", ("data", "dot")),
        ):
            client, server = play(fates, Fault(), mode, manner)
            ended = "quit" in server.steps
            assert ended is any((step, 550) in fates for step in costs)
            assert ended or len(client.results) == len(fates)


@pytest.mark.parametrize("code", [250, 550])
def test_two_replies_at_once_to_one_body_end_no_mail(code: int) -> None:
    client, server = play([("dot", 451)], Fault("insert", 5, code), "lock-step")
    assert server.steps[5] == "dot"
    assert isinstance(client.results[0], Failed)
