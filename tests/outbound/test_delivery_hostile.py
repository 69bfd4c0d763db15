"""Peers that break, stall, overflow or lie: bounded, classified, retried."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.net.resolver import Host, NoHosts
from mailerq.net.slots import Slots
from mailerq.rules import responses
from tests.outbound.kit import PeerConnection, Script, StubResolver, open_bench
from tests.support import closed_port

PATIENCE = {"smtp_out_timeout": 0.2}
"""Seconds that are long for a machine and short for a test."""


def says(*pieces: str | bytes, then: str = "close") -> Script:
    """A peer that answers each input with the next piece."""

    async def script(peer: PeerConnection) -> None:
        for number, piece in enumerate(pieces):
            if number:
                await peer.line()
            await peer.send(piece)
        if then == "stall":
            await trio.sleep_forever()
        if then == "listen":
            while await peer.line():
                pass

    return script


def drips(data: bytes, *, before: tuple[str, ...] = ()) -> Script:
    """A peer that sends one byte at a time, always within the read timeout."""

    async def script(peer: PeerConnection) -> None:
        for piece in before:
            await peer.send(piece)
            await peer.line()
        for byte in data:
            await peer.send(bytes([byte]))
            await trio.sleep(0.05)

    return script


def floods(piece: bytes, *, before: tuple[str, ...] = ()) -> Script:
    """A peer that never stops."""

    async def script(peer: PeerConnection) -> None:
        for greeting in before:
            await peer.send(greeting)
            await peer.line()
        while True:
            await peer.send(piece * 1000)

    return script


BANNER = "220 mx.test\r\n"
EHLO = "250-mx.test\r\n250 PIPELINING\r\n"
OK = "250 ok\r\n"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (says(), ("noaccess", "init", "lost")),
        (says(then="stall"), ("noaccess", "init", "timeout")),
        (says("hello there\r\n"), ("noaccess", "init", "invalid")),
        (says("554 go away\r\n"), ("noaccess", "init", "error")),
        (says("421 busy\r\n"), ("noaccess", "init", "error")),
        (says(BANNER), ("noaccess", "ehlo", "lost")),
        (says(BANNER, then="stall"), ("noaccess", "ehlo", "timeout")),
        (says(BANNER, "421 no\r\n"), ("noaccess", "ehlo", "error")),
        (says(BANNER, "502 no\r\n", "550 no\r\n"), ("noaccess", "helo", "error")),
        (says(BANNER, "garbage\r\n"), ("noaccess", "ehlo", "invalid")),
        (says(BANNER, EHLO), ("lost", "mail from", "lost")),
        (says(BANNER, EHLO, then="stall"), ("timeout", "mail from", "timeout")),
        (says(BANNER, EHLO, OK), ("lost", "rcpt to", "lost")),
        (says(BANNER, EHLO, OK * 2), ("lost", "data", "lost")),
        (says(BANNER, EHLO, OK * 2, then="stall"), ("timeout", "data", "timeout")),
        (says(BANNER, EHLO, OK * 3, then="listen"), ("lost", "data", "invalid")),
        (says(BANNER, EHLO, OK * 2 + "354 go\r\n"), ("lost", "received", "lost")),
        (says(BANNER, EHLO, OK * 2 + "354 go\r\n", then="listen"), None),
        (says(BANNER, EHLO, OK * 2 + "354 go\r\n" + OK), ("lost", "data", "invalid")),
        (says(BANNER, EHLO, "421 bye\r\n"), ("error", "mail from", "error")),
        (says(BANNER, EHLO, "nonsense\r\n"), ("lost", "mail from", "invalid")),
        (floods(b"x"), ("overflow", "init", "invalid")),
        (floods(b"220-hello\r\n"), ("overflow", "init", "invalid")),
        (floods(b"250-X-MORE\r\n", before=(BANNER,)), ("overflow", "ehlo", "invalid")),
        (floods(b"250 ok\r\n", before=(BANNER,)), ("idle", "idle", "invalid")),
        (drips(b"220 a banner that takes its time\r\n"), ("noaccess", "init", "timeout")),
        (drips(b"250-a\r\n" * 9, before=(BANNER,)), ("noaccess", "ehlo", "timeout")),
        (drips(b"250 never" * 3, before=(BANNER, EHLO)), ("timeout", "mail from", "timeout")),
    ],
)
async def test_a_peer_that_misbehaves_is_classified_and_tried_again(
    script: Script, expected: tuple[str, str, str] | None
) -> None:
    async with open_bench(script, **PATIENCE) as bench:
        bench.send()
        result = await bench.retried()
        if expected is not None:
            assert (result["type"], result["state"], result["result"]) == expected
        else:
            assert (result["type"], result["result"]) == ("timeout", "timeout")
        assert result["description"]
        assert result["to"] == "127.0.0.1"
        assert bench.peer.mails == []
        bench.queues.pass_time(600)
        await bench.results("success")


async def test_a_250_that_is_there_before_the_body_is_sent_is_no_success() -> None:
    async def hasty(peer: PeerConnection) -> None:
        await peer.hello()
        for reply in ("250 taken\r\n", "250 thanks\r\n"):
            for _ in range(3):
                await peer.line()
            await peer.send("250 ok\r\n250 ok\r\n354 go\r\n")
            if reply == "250 taken\r\n":
                await peer.take(reply)
            else:
                await trio.testing.wait_all_tasks_blocked()
                await peer.send(reply)
        bench.queues.may_ack.set()

    async with open_bench(hasty, domain_maxconnections=1) as bench:
        bench.queues.may_ack = trio.Event()
        bench.send()
        bench.send()
        result = await bench.retried()
        assert (result["type"], result["state"], result["result"]) == ("lost", "data", "invalid")
        assert len(bench.queues["success"]) == 1


async def test_a_refusal_before_a_large_body_is_through_is_heard() -> None:
    async def full(peer: PeerConnection) -> None:
        await peer.hello()
        for _ in range(3):
            await peer.line()
        await peer.send("250 ok\r\n250 ok\r\n354 go\r\n")
        await peer.stream.receive_some()
        await peer.send("552 5.2.2 mailbox full\r\n")

    async with open_bench(full) as bench:
        bench.peer.extensions = ("PIPELINING",)
        bench.send(body="x" * 998 + "\r\n" + "y" * 30_000_000)
        (result,) = await bench.results("failure")
        assert (result["code"], result["status"]) == (552, "5.2.2")


async def test_a_peer_that_stops_reading_a_body_is_given_up() -> None:
    async def deaf(peer: PeerConnection) -> None:
        await peer.hello()
        for _ in range(3):
            await peer.line()
        await peer.send("250 ok\r\n250 ok\r\n354 go\r\n")
        await trio.sleep_forever()

    async with open_bench(deaf, **PATIENCE) as bench:
        bench.peer.extensions = ("PIPELINING",)
        bench.send(body="y" * 30_000_000)
        result = await bench.retried()
        assert result["type"] == "timeout"


@pytest.mark.parametrize("step", range(4))
async def test_a_peer_loses_no_time_while_this_process_stands_still(step: int) -> None:
    replies = ["220 mx.test ESMTP", "250-mx.test\r\n250 PIPELINING", "250 ok\r\n250 ok\r\n354 go"]
    replies += ["250 taken", "250 reset"]

    async def stands_still(peer: PeerConnection) -> None:
        for number, reply in enumerate(replies):
            if number == step:
                time.sleep(6 * PATIENCE["smtp_out_timeout"])  # noqa: ASYNC251 - so does the session
            await peer.send(f"{reply}\r\n")
            for _ in range(3 if number == 1 else number != 2):
                await peer.line()
            if number == 2:
                await peer.body()

    async with open_bench(stands_still, **PATIENCE) as bench:
        bench.send()
        await bench.results("success")
        assert not bench.queues["retry"]


def answers_late(step: str, seconds: float) -> Script:
    """A peer that takes its time over one step, with each mail."""

    async def script(peer: PeerConnection) -> None:
        await peer.hello()
        while verb := (await peer.line()).partition(" ")[0]:
            if verb == step:
                await trio.sleep(seconds)
            await peer.send("354 go\r\n" if verb == "DATA" else "250 ok\r\n")
            if verb == "DATA":
                await peer.body()
                if step == ".":
                    await trio.sleep(seconds)
                await peer.send("250 taken\r\n")

    return script


@pytest.mark.parametrize(("step", "times"), [("MAIL", 3), ("RCPT", 3), ("DATA", 1.5), (".", 6)])
async def test_a_peer_that_takes_its_time_over_a_mail_is_waited_for(
    step: str, times: float
) -> None:
    base = 1.0
    async with open_bench(answers_late(step, times * base), smtp_out_timeout=base) as bench:
        bench.peer.extensions = ()
        bench.send()
        (result,) = await bench.results("success")
        assert result["attempt"] == 1


@pytest.mark.parametrize("step", ["MAIL", "RCPT", "."])
async def test_other_mail_waits_for_no_slow_peer_except_after_the_dot(step: str) -> None:
    slow = answers_late(step, 3.0)
    async with open_bench(slow, slots=Slots(1), smtp_out_timeout=1.0) as bench:
        bench.peer.extensions = ()
        bench.send("c@slow.test")
        await bench.until(lambda figures: figures["opened"] == 1)
        bench.send("c@fast.test")
        await bench.results("success", 2 if step == "." else 1)
        if step == ".":
            assert not bench.queues["retry"]
        else:
            result = await bench.retried()
            assert (result["type"], result["to"]) == ("timeout", "127.0.0.1")
            assert bench.queues["success"][0].recipient == "c@fast.test"


async def test_a_peer_that_takes_a_large_body_slowly_is_given_the_time() -> None:
    async def slow(peer: PeerConnection) -> None:
        await peer.hello()
        for _ in range(3):
            await peer.line()
        await peer.send("250 ok\r\n250 ok\r\n354 go\r\n")
        taken = b""
        while not taken.endswith(b"\r\n.\r\n"):
            taken = taken[-4:] + await peer.stream.receive_some(1 << 19)
            await trio.sleep(0.02)
        await peer.prove("250 at last\r\n")

    async with open_bench(slow, smtp_out_timeout=0.4) as bench:
        bench.peer.extensions = ("PIPELINING",)
        bench.send(body="y" * 20_000_000)
        await bench.results("success")


async def test_a_peer_that_hears_no_dot_with_a_command_behind_it_gets_the_next_one_by_itself() -> (
    None
):
    async def naive(peer: PeerConnection) -> None:
        await peer.hello()
        for _ in range(3):
            await peer.line()
        await peer.send("250 ok\r\n250 ok\r\n354 go\r\n")
        while not (await peer.stream.receive_some()).endswith(b"\r\n.\r\n"):
            pass
        await peer.send("250 taken\r\n")
        assert await peer.line() == "QUIT"
        await peer.send("221 bye\r\n")

    settings: Any = {"connection_maxmessages": 1, "smtp_out_timeout": 0.1}
    async with open_bench(naive, naive, **settings) as bench:
        bench.send()
        result = await bench.retried()
        assert (result["type"], result["state"]) == ("timeout", "received")
        bench.queues.pass_time(600)
        await bench.results("success")


@pytest.mark.parametrize("ips", [{}, {"ips": ["127.0.0.2"]}])
async def test_nobody_listens(ips: dict[str, list[str]]) -> None:
    with closed_port() as port:
        async with open_bench(resolver=StubResolver()) as bench:
            bench.send(smarthost={"hostname": "127.0.0.1", "port": port}, **ips)
            result = await bench.retried()
    assert (result["type"], result["state"]) == ("refused", "connect")
    assert "127.0.0.1" in result["description"]


async def test_a_lookup_that_fails_by_a_defect_costs_an_attempt_and_not_the_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(StubResolver):
        async def mail_hosts(self, domain: str) -> tuple[Host, ...] | NoHosts:
            raise ZeroDivisionError(domain)

    async with open_bench(resolver=Broken()) as bench:
        bench.send()
        bench.send()
        await bench.retried()
        await bench.pass_time(30)
        results = await bench.results("retry", 2)
    assert [result["description"] for result in results] == [responses.OWN_FAULT.description] * 2
    assert "ZeroDivisionError: d.test" in caplog.text


async def one_mail(peer: PeerConnection) -> None:
    for _ in range(3):
        await peer.line()
    await peer.send(OK * 2 + "354 go\r\n")
    await peer.body()


async def test_a_peer_that_talks_when_it_is_idle_loses_the_connection_and_no_mail() -> None:
    async def chatty(peer: PeerConnection) -> None:
        await peer.hello()
        await one_mail(peer)
        await peer.prove()
        await bench.queues.until(lambda queues: len(queues["success"]) == 1)
        await peer.send("250 and one more thing\r\n")
        while await peer.line():
            pass

    async with open_bench(chatty) as bench:
        bench.send()
        await bench.results()
        await bench.queues.until(lambda _: bench.peer.open == 0)
        bench.send()
        results = await bench.results(count=2)
        assert [result["attempt"] for result in results] == [1, 1]


@pytest.mark.parametrize(
    ("replies", "queue"),
    [
        (["250 taken\r\n", "250 reset\r\n"], "success"),
        (["250 taken\r\n"], "success"),
        (["250 taken\r\n250 before RSET is there\r\n"], "retry"),
        (["250 taken\r\n250 and one more thing\r\n", "250 reset\r\n"], "retry"),
        (["250 taken\r\n", "250 and one more thing\r\n250 reset\r\n"], "retry"),
        (["250 in the middle of the body\r\n550 the answer to the dot\r\n"], "retry"),
        (["250 in the middle of the body\r\n", "550 the answer to the dot\r\n"], "retry"),
        (["500 what?\r\n250 taken\r\n", "250 reset\r\n"], "retry"),
        (["500 what?\r\n", "250 taken\r\n221 bye\r\n"], "retry"),
        (["550 no\r\n550 no\r\n", "221 bye\r\n"], "retry"),
        (["550 no\r\n", "550 no\r\n221 bye\r\n"], "retry"),
        (["250 taken\r\n421 enough\r\n"], "retry"),
        (["550 no\r\n421 enough\r\n"], "retry"),
        (["550 no\r\n"], "failure"),
    ],
)
async def test_a_reply_to_a_body_counts_only_when_the_one_behind_it_proves_it(
    replies: list[str], queue: str
) -> None:
    async def script(peer: PeerConnection) -> None:
        await peer.hello()
        await one_mail(peer)
        for reply in replies:
            await peer.send(reply)
            await peer.line()

    async with open_bench(script) as bench:
        bench.send()
        await bench.results(queue)


async def closes(peer: PeerConnection) -> None:
    """A peer that closes with unread input: the client meets a reset."""


async def reads_and_closes(peer: PeerConnection) -> None:
    await peer.line()


async def says_421(peer: PeerConnection) -> None:
    await peer.send("421 enough\r\n")


async def falls_silent(peer: PeerConnection) -> None:
    while await peer.line():
        pass


@pytest.mark.parametrize("extensions", [("PIPELINING",), ()])
@pytest.mark.parametrize("leave", [closes, reads_and_closes, says_421, falls_silent])
@pytest.mark.parametrize("settings", [{}, {"connection_maxmessages": 1}])
@pytest.mark.parametrize("code", [250, 550])
async def test_a_peer_that_leaves_behind_each_reply_to_a_body_gets_one_mail_twice_at_most(
    extensions: tuple[str, ...], leave: Script, settings: Any, code: int
) -> None:
    got = 0

    async def script(peer: PeerConnection) -> None:
        nonlocal got
        await peer.hello()
        if extensions:
            for _ in range(3):
                await peer.line()
            await peer.send(OK * 2 + "354 go\r\n")
        else:
            for reply in (OK, OK, "354 go\r\n"):
                await peer.line()
                await peer.send(reply)
        await peer.body()
        got += 1
        await peer.send(f"{code} done\r\n")
        await leave(peer)

    settings = {"domain_maxconnections": 1, "smtp_out_timeout": 0.1, **settings}
    async with open_bench(*[script] * 10, **settings) as bench:
        bench.peer.extensions = extensions
        for _ in range(3):
            bench.send()
        while len(bench.queues["results"]) < 3:
            await bench.queues.until(lambda queues: not (queues.leased or queues.due))
            bench.queues.pass_time(600)
        assert len(bench.queues["success" if code == 250 else "failure"]) == 3
        assert 3 <= got <= (3 if leave in (closes, reads_and_closes) else 4)


async def test_a_250_in_the_middle_of_a_large_body_keeps_its_end_from_being_sent() -> None:
    async def hasty(peer: PeerConnection) -> None:
        await peer.hello()
        for _ in range(3):
            await peer.line()
        await peer.send(OK * 2 + "354 go\r\n")
        await peer.stream.receive_some()
        await peer.send("250 taken\r\n")
        while data := await peer.stream.receive_some():
            ends.append(data.endswith(b".\r\n"))

    ends: list[bool] = []
    async with open_bench(hasty) as bench:
        bench.peer.extensions = ("PIPELINING",)
        bench.send(body="y" * 30_000_000)
        result = await bench.retried()
        assert (result["type"], result["state"], result["result"]) == ("lost", "data", "invalid")
    assert ends
    assert not any(ends)


@pytest.mark.parametrize("code", [500, 502, 503])
async def test_an_unasked_reply_about_a_command_fails_no_mail(code: int) -> None:
    async def script(peer: PeerConnection) -> None:
        await peer.hello()
        await one_mail(peer)
        await peer.prove(OK)
        await bench.queues.until(lambda queues: len(queues["success"]) == 1)
        assert (await peer.line()).startswith("MAIL")
        await peer.send(f"{code} what?\r\n" + OK * 2 + "354 go\r\n")
        await peer.line()

    async with open_bench(script, domain_maxconnections=1) as bench:
        bench.send()
        bench.send()
        await bench.results("success", 2)
        assert bench.peer.connections == 2


async def test_a_refusal_that_nothing_proves_is_confirmed_by_quit() -> None:
    async with open_bench() as bench:
        bench.peer.extensions = ()
        bench.peer.answers["RCPT", "nobody@d.test"] = ["550 5.1.1 who?"]
        bench.send(recipient="nobody@d.test")
        (result,) = await bench.results("failure")
        assert (result["state"], result["code"]) == ("rcpt to", 550)
        assert bench.peer.commands[-1] == "QUIT"


async def test_a_refusal_that_quit_does_not_confirm_is_tried_again() -> None:
    async def behind(peer: PeerConnection) -> None:
        await peer.hello()
        await peer.line()
        await peer.send("500 what?\r\n")
        assert await peer.line() == "QUIT"
        await peer.send("250 sender ok\r\n221 bye\r\n")

    async with open_bench(behind) as bench:
        bench.peer.extensions = ()
        bench.send()
        result = await bench.retried()
        assert (result["type"], result["state"], result["result"]) == (
            *("lost", "mail from", "invalid"),
        )
        bench.queues.pass_time(600)
        await bench.results("success")


@pytest.mark.parametrize("step", range(1, 6))
async def test_a_peer_that_dies_at_any_moment_gets_each_message_in_the_end(step: int) -> None:
    async def dies(peer: PeerConnection) -> None:
        replies: list[Callable[[], Any]] = [
            lambda: peer.send(BANNER),
            lambda: peer.send(EHLO),
            lambda: peer.send(OK),
            lambda: peer.send(OK),
            lambda: peer.send("354 go\r\n"),
        ]
        for reply in replies[:step]:
            await reply()
            await peer.line()
        peer.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async with open_bench(*[dies] * 3, domain_maxconnections=1) as bench:
        for _ in range(3):
            bench.send(retries=[1])
        while len(bench.queues["success"]) < 3:
            await bench.pass_time(1)
        assert len(bench.peer.mails) == 3
