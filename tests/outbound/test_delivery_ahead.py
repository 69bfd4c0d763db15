"""Envelopes sent ahead, right behind a body: when, and how they end."""

from __future__ import annotations

import select
import socket
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.outbound import session as outgoing
from mailerq.outbound import sites
from tests.outbound.kit import Mail, PeerConnection, Script, StubPlugins, open_bench
from tests.wire.step_kit import TAKEN, Fate, Fault, Server, faults

OK = "250 ok\r\n"
GO = OK * 2 + "354 go\r\n"


@pytest.fixture
def all_are_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine must not make any peer count as slow."""
    monkeypatch.setattr(outgoing, "PROMPT_SECONDS", 60.0)


async def envelope(peer: PeerConnection) -> None:
    for verb in ("MAIL", "RCPT", "DATA"):
        assert (await peer.line()).startswith(verb)


async def until_second(peer: PeerConnection) -> None:
    """Play a peer until it asks for the second body."""
    await peer.hello()
    await envelope(peer)
    await peer.send(GO)
    await peer.take("250 one\r\n")
    await envelope(peer)
    await peer.send(GO)


async def until_ahead(peer: PeerConnection) -> None:
    """Play a peer until the third envelope has come, before the second body is answered."""
    await until_second(peer)
    await peer.body()
    await envelope(peer)


async def until_body_waits(peer: PeerConnection) -> None:
    """Play a peer until the third body waits for the commit of the second result."""
    await until_ahead(peer)
    peer.peer.queues.may_ack = trio.Event()
    await peer.send("250 two\r\n" + GO)


def says(reply: str) -> Script:
    """A peer with this reply to the second body; it closes after a 421 or an empty reply."""

    async def script(peer: PeerConnection) -> None:
        await until_ahead(peer)
        if reply:
            await peer.send(f"{reply}\r\n")
        if reply and not reply.startswith("421"):
            await peer.send(GO)
            await peer.take()
            await peer.line()

    return script


@pytest.mark.usefixtures("all_are_prompt")
async def test_the_envelope_of_a_message_that_waits_goes_out_behind_the_body() -> None:
    async with open_bench(says("250 two"), domain_maxconnections=1) as bench:
        for _ in range(3):
            bench.send()
        results = await bench.results(count=3)
        assert [result["messages"] for result in results] == [1, 2, 3]
        assert bench.peer.connections == 1
        assert not bench.queues.leased


@pytest.mark.usefixtures("all_are_prompt")
async def test_a_body_that_is_refused_does_not_cost_the_message_behind_it() -> None:
    async with open_bench(says("452 full"), domain_maxconnections=1) as bench:
        for _ in range(3):
            bench.send()
        await bench.results("success", 2)
        assert (await bench.retried())["code"] == 452
        assert bench.peer.commands.count("RSET") == 2  # behind the first and the last body


@pytest.mark.usefixtures("all_are_prompt")
@pytest.mark.parametrize("last", ["421 4.3.2 stopping", ""])
async def test_a_message_whose_envelope_went_ahead_moves_on_when_the_connection_ends(
    last: str,
) -> None:
    async with open_bench(says(last), domain_maxconnections=1) as bench:
        for number in range(3):
            bench.send(recipient=f"c{number}@d.test")
        await bench.results("success", 2)
        await bench.retried()
        moved = next(m for m in bench.queues["success"] if m.recipient == "c2@d.test")
        assert [result["attempt"] for result in moved.results] == [1]
        assert bench.peer.connections == 2


@pytest.mark.usefixtures("all_are_prompt")
@pytest.mark.parametrize(("size", "count"), [(50_000, 1), (70_000, 0)])
async def test_only_a_body_that_is_not_long_takes_an_envelope_along(size: int, count: int) -> None:
    body = "x" * 70 + "\r\n"
    async with open_bench(domain_maxconnections=1) as bench:
        for _ in range(3):
            bench.send(body=body * (size // len(body)))
        await bench.results("success", 3)
        assert bench.dispatcher.statistics()["ahead"] == count


@pytest.mark.usefixtures("all_are_prompt")
async def test_a_connection_that_ends_within_a_body_does_not_cost_the_message_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connect = socket.socket.connect

    def connect_narrow(sock: socket.socket, address: Any) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connect(sock, address)

    async def script(peer: PeerConnection) -> None:
        peer.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await until_second(peer)
        while not bench.dispatcher.statistics()["ahead"]:
            await trio.testing.wait_all_tasks_blocked()
        unread = peer.stream.socket.recv(1 << 20, socket.MSG_PEEK)
        unread_sizes.append(len(await unread))

    monkeypatch.setattr(socket.socket, "connect", connect_narrow)
    unread_sizes: list[int] = []
    body = ("x" * 70 + "\r\n") * 800
    async with open_bench(script, domain_maxconnections=1) as bench:
        for number in range(3):
            bench.send(recipient=f"c{number}@d.test", body=body)
        await bench.results("success", 2)
        await bench.retried()
        moved = next(m for m in bench.queues["success"] if m.recipient == "c2@d.test")
        assert [result["attempt"] for result in moved.results] == [1]
        assert [mail.recipient for mail in bench.peer.mails] == ["c2@d.test"]
    assert unread_sizes[0] < len(body), "the rest had not left us"


async def test_nothing_goes_ahead_to_a_peer_that_takes_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outgoing, "PROMPT_SECONDS", 0.0)
    seen: list[Any] = []

    async def script(peer: PeerConnection) -> None:
        await peer.hello()
        for _ in range(3):
            await envelope(peer)
            await peer.send(GO)
            await peer.body()
            await trio.testing.wait_all_tasks_blocked()
            seen.extend(select.select([peer.stream.socket], [], [], 0)[0])
            await peer.prove()
        await peer.line()

    async with open_bench(script, domain_maxconnections=1) as bench:
        for _ in range(3):
            bench.send()
        await bench.results("success", 3)
        assert seen == []


@pytest.mark.usefixtures("all_are_prompt")
async def test_a_body_waits_for_the_result_before_it_though_its_envelope_went_ahead() -> None:
    asked, came = trio.Event(), trio.Event()

    async def script(peer: PeerConnection) -> None:
        await until_body_waits(peer)
        asked.set()
        await peer.take("250 three\r\n")
        came.set()
        await peer.line()

    async with open_bench(script, domain_maxconnections=1) as bench:
        for _ in range(3):
            bench.send()
        with trio.fail_after(60):
            await asked.wait()
        for _ in range(20):
            await trio.testing.wait_all_tasks_blocked()
        assert not came.is_set()
        bench.queues.may_ack.set()
        await bench.results("success", 3)


@pytest.mark.usefixtures("all_are_prompt")
@pytest.mark.parametrize("words", ["", "250 early\r\n", "421 bye\r\n"])
async def test_a_peer_that_leaves_or_speaks_while_a_body_waits_does_not_get_it(words: str) -> None:
    left = trio.Event()

    async def script(peer: PeerConnection) -> None:
        await until_body_waits(peer)
        for _ in range(20):
            await trio.testing.wait_all_tasks_blocked()
        if words:
            await peer.send(words)
            assert await peer.line() == ""
        left.set()

    async with open_bench(script, domain_maxconnections=1) as bench:
        for _ in range(3):
            bench.send()
        with trio.fail_after(60):
            if words:
                await bench.queues.until(
                    lambda _: bool(bench.queues.leased) and not bench.peer.open
                )
            await left.wait()
        for _ in range(20):
            await trio.testing.wait_all_tasks_blocked()
        bench.queues.may_ack.set()
        await bench.results("success", 2)
        await bench.results("retry", 1)
        assert not bench.peer.mails


@pytest.mark.usefixtures("all_are_prompt")
async def test_a_body_that_waits_does_not_leave_when_the_session_is_cut() -> None:
    lines = []
    asked = trio.Event()

    async def script(peer: PeerConnection) -> None:
        await until_body_waits(peer)
        asked.set()
        lines.append(await peer.line())

    async with open_bench(script, domain_maxconnections=1) as bench:
        for _ in range(3):
            bench.send()
        with trio.fail_after(60):
            await asked.wait()
        for _ in range(20):
            await trio.testing.wait_all_tasks_blocked()
        ((session,),) = [flow.sessions for flow in bench.dispatcher.flows.live]
        session.cut()
        session.settled()  # the commit may be done before the task has ended
        for _ in range(20):
            await trio.testing.wait_all_tasks_blocked()
        bench.queues.may_ack.set()
        await bench.results("success", 3)
        assert lines == [""]
        assert len(bench.peer.mails) == 1


@pytest.mark.usefixtures("all_are_prompt")
async def test_what_a_plugin_sends_gets_into_no_mail_whose_envelope_went_ahead() -> None:
    plugins = StubPlugins()
    bodies = []

    async def script(peer: PeerConnection) -> None:
        await until_ahead(peer)
        plugins.send(b"NOOP one\r\n")
        await trio.testing.wait_all_tasks_blocked()
        plugins.send(b"NOOP two\r\n")
        await peer.send("250 two\r\n" + GO)
        bodies.append(await peer.body())
        assert await peer.line() == "NOOP one"
        assert await peer.line() == "NOOP two"
        await peer.prove("250 three\r\n")
        await peer.line()

    async with open_bench(script, plugins=plugins, domain_maxconnections=1) as bench:
        for number in range(3):
            bench.send(body=f"{number}\r\n")
        await bench.results("success", 3)
        await bench.queues.until(lambda _: "NOOP two" in bench.peer.commands)
        assert bodies == [b"2\r\n"]


@pytest.mark.usefixtures("all_are_prompt")
async def test_what_was_held_goes_out_when_the_mail_that_went_ahead_is_refused() -> None:
    plugins = StubPlugins()

    async def script(peer: PeerConnection) -> None:
        await until_ahead(peer)
        plugins.send(b"NOOP\r\n")
        await peer.send("250 two\r\n550 no\r\n503 no\r\n503 no\r\n")
        assert await peer.line() == "NOOP"

    async with open_bench(script, plugins=plugins, domain_maxconnections=1) as bench:
        for _ in range(3):
            bench.send()
        await bench.results("success", 2)
        await bench.results("failure", 1)
        await bench.queues.until(lambda _: "NOOP" in bench.peer.commands)


@pytest.mark.usefixtures("all_are_prompt")
async def test_a_message_does_not_wait_long_for_the_reply_to_the_one_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outgoing, "WITHDRAW_SECONDS", 0.05)
    went_ahead, may_answer = trio.Event(), trio.Event()

    async def slow(peer: PeerConnection) -> None:
        await until_ahead(peer)
        went_ahead.set()
        await may_answer.wait()
        await peer.send("250 two\r\n" + GO)
        assert await peer.line() == ""

    async def late(peer: PeerConnection) -> None:
        await went_ahead.wait()
        await peer.serve()

    async with open_bench(slow, late, domain_maxconnections=2, smtp_out_timeout=10) as bench:
        for _ in range(5):
            bench.send()
        await bench.results("success", 4)
        assert bench.dispatcher.statistics()["ahead"] == 1
        may_answer.set()
        await bench.results("success", 5)
        assert [message.results[-1]["attempt"] for message in bench.queues["success"]] == [1] * 5
        await bench.queues.until(lambda _: bench.peer.open == 1)


@pytest.mark.usefixtures("all_are_prompt")
async def test_stop_lets_a_message_end_whose_envelope_went_ahead() -> None:
    async with open_bench(says("250 two"), domain_maxconnections=1) as bench:
        for _ in range(6):
            bench.send()
        await bench.queues.until(lambda _: bench.peer.commands.count("DATA") == 3)
        with trio.fail_after(60):
            await bench.dispatcher.stop(5)
        assert len(bench.queues["success"]) == 3
        assert len(bench.queues["outbox"]) == 3
        assert not bench.queues.leased


# Peers out of step


def answers_dots_late(replies: int) -> Script:
    """A peer that answers commands at once, and a dot behind so many of them or after 30 ms."""

    async def script(peer: PeerConnection) -> None:
        await peer.hello()
        recipient = late = ""
        count = 0
        while True:
            with trio.move_on_after(0.03 if late else float("inf")) as scope:
                line = await peer.line()
            if scope.cancelled_caught or not line:
                await peer.send(late)
                late = ""
                if scope.cancelled_caught:
                    continue
                return
            if line.startswith("RCPT"):
                recipient = line.partition("<")[2].partition(">")[0]
            await peer.send({"DATA": "354 go\r\n", "QUIT": "221 bye\r\n"}.get(line, OK))
            count -= 1
            if late and count == 0:
                await peer.send(late)
                late = ""
            if line == "DATA":
                body = await peer.body()
                late, count = "550 no\r\n", replies
                if not recipient.startswith("bad"):
                    peer.peer.mails.append(Mail(peer.number, "a@b.test", recipient, body))
                    late = OK

    return script


@pytest.mark.usefixtures("all_are_prompt")
@pytest.mark.parametrize("replies", [1, 2, 3, 100])
async def test_a_refused_body_is_never_credited_with_the_reply_to_a_command(
    replies: int, caplog: pytest.LogCaptureFixture
) -> None:
    recipients = [f"{'bad' if number % 4 == 3 else 'good'}{number}@d.test" for number in range(40)]
    async with open_bench(*[answers_dots_late(replies)] * 100, domain_maxconnections=2) as bench:
        for recipient in recipients:
            bench.send(recipient=recipient)
        while len(bench.queues["results"]) < 40:
            await bench.pass_time(600)
        delivered = {message.recipient for message in bench.queues["success"]}
        refused = {message.recipient for message in bench.queues["failure"]}
        assert delivered == {recipient for recipient in recipients if recipient.startswith("good")}
        assert refused == {recipient for recipient in recipients if recipient.startswith("bad")}
        assert len({mail.recipient for mail in bench.peer.mails}) == 30
        assert len(bench.peer.mails) <= 30 + bench.dispatcher.statistics()["ahead"]
        if replies >= 3:
            assert 1 <= bench.dispatcher.statistics()["ahead"] <= 2  # for each connection
            assert len([r for r in caplog.records if "out of step" in r.getMessage()]) == 1


async def says_250_before_it_refuses(peer: PeerConnection) -> None:
    """A peer that refuses each body, and says 250 unasked before."""
    await peer.hello()
    late = ""
    while line := await peer.line():
        await peer.send(late + {"DATA": "354 go\r\n", "QUIT": "221 bye\r\n"}.get(line, OK))
        late = ""
        if line == "DATA":
            await peer.body()
            await peer.send(OK)
            late = "550 no\r\n"


@pytest.mark.parametrize("extensions", [("8BITMIME",), ("8BITMIME", "PIPELINING")])
async def test_no_body_is_credited_with_a_reply_that_the_peer_says_unasked_before_its_own(
    extensions: tuple[str, ...],
) -> None:
    settings: Any = {"domain_maxconnections": 1, "max_attempts": 3}
    async with open_bench(*[says_250_before_it_refuses] * 30, **settings) as bench:
        bench.peer.extensions = extensions
        for _ in range(6):
            bench.send()
        while len(bench.queues["results"]) < 6:
            await bench.pass_time(600)
        assert len(bench.queues["success"]) == 0
        assert len(bench.queues["failure"]) == 6


@pytest.mark.usefixtures("all_are_prompt")
@pytest.mark.parametrize("seconds", [0.0, 3600.0])
async def test_a_host_that_was_out_of_step_gets_nothing_ahead_for_some_time(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "OUT_OF_STEP_SECONDS", seconds)
    settings: Any = {"domain_maxconnections": 1, "connection_maxidle": 60}
    async with open_bench(says("250 early\r\n354 DATA"), **settings) as bench:
        for _ in range(4):
            bench.send()
        await bench.retried()
        await bench.results("success", 3)
        with trio.fail_after(60):
            while bench.dispatcher.statistics()["destinations"]:
                await trio.testing.wait_all_tasks_blocked(0.01)
        assert bench.dispatcher.statistics()["ahead"] == 1
        for _ in range(4):
            bench.send()
        await bench.results("success", 7)
        went_ahead = bench.dispatcher.statistics()["ahead"]
        assert went_ahead > 1 if seconds == 0 else went_ahead == 1


@pytest.mark.usefixtures("all_are_prompt")
async def test_a_peer_that_never_answers_a_dot_does_not_harm_the_message_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outgoing, "WITHDRAW_SECONDS", 0.05)

    async def mute(peer: PeerConnection) -> None:
        await until_ahead(peer)
        await peer.send(GO)
        await trio.sleep_forever()

    async def silent(peer: PeerConnection) -> None:
        await until_ahead(peer)
        await trio.sleep_forever()

    for script in (mute, silent):
        async with open_bench(script, domain_maxconnections=1, smtp_out_timeout=0.1) as bench:
            for number in range(3):
                bench.send(recipient=f"c{number}@d.test")
            assert (await bench.retried())["state"] == "received"
            await bench.results("success", 2)
            behind = next(m for m in bench.queues["success"] if m.recipient == "c2@d.test")
            assert [result["attempt"] for result in behind.results] == [1]
            bench.queues.pass_time(600)
            await bench.results("success", 3)


FATES: list[Fate] = [TAKEN, ("dot", 550), ("rcpt", 550), TAKEN, ("dot", 550), TAKEN]


def plays(server: Server) -> Script:
    async def script(peer: PeerConnection) -> None:
        server.greet()
        while True:
            while server.replies:
                await peer.send(server.replies.pop(0))
            if server.closed:
                return
            with trio.move_on_after(0.01) as scope:
                if not (data := await peer.stream.receive_some()):
                    return
                server.feed(data)
            if scope.cancelled_caught:
                server.say_late()

    return script


@pytest.mark.usefixtures("all_are_prompt")
@pytest.mark.parametrize(
    "kind", ["twice", "omit", "insert", "early", "late", "lates", "cut", "mute"]
)
async def test_every_message_gets_the_answer_that_was_meant_for_it(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outgoing, "FINAL_MINUTES", 1)
    for fault in faults(20):
        if fault.kind != kind or fault.value not in (0, 1, 2, 3, 250, 500, 503):
            continue
        servers = [Server(FATES, fault), *(Server(FATES, Fault()) for _ in range(20))]
        settings: Any = {"domain_maxconnections": 1, "smtp_out_timeout": 0.1}
        async with open_bench(*map(plays, servers), **settings) as bench:
            for number in range(len(FATES)):
                bench.send(envelope=f"{number}@a.test")
            while len(bench.queues["results"]) < len(FATES):
                await bench.pass_time(600)
            for queue, codes in (("success", {250}), ("failure", {550})):
                for message in bench.queues[queue]:
                    number = int(message.envelope.partition("@")[0])
                    truths = {server.truth.get(number) for server in servers}
                    assert truths & codes, (fault, number, message.results)


MADE = {"body": "Subject: {$x}\r\n\r\nhi {$x}\r\n", "data": {"x": 7}}


@pytest.mark.usefixtures("all_are_prompt")
async def test_a_mail_that_is_made_quickly_goes_ahead_as_it_was_made() -> None:
    async with open_bench(domain_maxconnections=1) as bench:
        for number in range(6):
            bench.send(f"{number}@d.test", **MADE)
        await bench.results("success", 6)
        assert bench.dispatcher.statistics()["ahead"] >= 1
        assert all(b"Subject: 7\r\n" in mail.body for mail in bench.peer.mails)
        assert all(b"\r\n\r\nhi 7\r\n" in mail.body for mail in bench.peer.mails)


@pytest.mark.parametrize(
    "more", [{"data": {"x": 7, "l": list(range(5000))}}, {"data": None, "headers": {"add": {}}}]
)
@pytest.mark.usefixtures("all_are_prompt")
async def test_a_mail_that_takes_long_to_make_does_not_go_out_as_it_is_stored(
    more: dict[str, Any],
) -> None:
    body = "Subject: x\r\n\r\nhi {foreach $y in $l}{$y}{/foreach}\r\n"
    made = {**MADE, "body": body, **more}
    if more["data"] is None:
        made["body"] = "Subject: x\r\n\r\n" + 40_000 * "x\n"
    async with open_bench(domain_maxconnections=1) as bench:
        for number in range(6):
            bench.send(f"{number}@d.test", **made)
        await bench.results("success", 6)
        for mail in bench.peer.mails:
            assert b"{foreach" not in mail.body and b"x\nx" not in mail.body


@pytest.mark.usefixtures("all_are_prompt")
async def test_what_is_behind_a_message_that_has_expired_is_made_before_it_goes() -> None:
    """The message that goes ahead need not be the one that was looked at."""

    async def expire(peer: PeerConnection) -> None:
        await peer.hello()
        await envelope(peer)
        await peer.send(GO)
        await peer.take("250 one\r\n")
        await envelope(peer)
        bench.queues.now += 120
        await peer.send(GO)
        bodies.append(await peer.body())
        await peer.send("250 two\r\n")
        while line := await peer.line():
            await peer.send("354 go\r\n" if line == "DATA" else OK)
            if line == "DATA":
                bodies.append(await peer.body())
                await peer.send("250 three\r\n")

    bodies: list[bytes] = []
    slow = {**MADE, "data": {"x": list(range(3000))}}
    slow["body"] = "Subject: x\r\n\r\n{foreach $y in $x}{$y}{/foreach}\r\n"
    async with open_bench(expire, domain_maxconnections=1) as bench:
        bench.send()
        bench.send()
        bench.send(maxdelivertime="2026-01-01 12:01:00")
        bench.send(**slow)
        await bench.results("success", 3)
        (result,) = await bench.results("failure")
        assert result["type"] == "expired"
        assert b"01234" in bodies[-1]
