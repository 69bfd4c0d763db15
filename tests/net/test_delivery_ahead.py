"""An envelope goes out right behind the body before it: when, and what becomes of it."""

from __future__ import annotations

import select
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.net import outgoing
from tests.net.delivery_kit import PeerConnection, Script, StubPlugins, open_bench

GO = "250 ok\r\n250 ok\r\n354 go\r\n"


@pytest.fixture
def all_are_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy makes nobody slow."""
    monkeypatch.setattr(outgoing, "PROMPT_SECONDS", 60.0)


async def envelope(peer: PeerConnection) -> None:
    for verb in ("MAIL", "RCPT", "DATA"):
        assert (await peer.line()).startswith(verb)


async def until_ahead(peer: PeerConnection) -> None:
    """Play a peer until the third envelope has come, before the second body is answered."""
    await peer.hello()
    await envelope(peer)
    await peer.send(GO)
    await peer.body()
    await peer.send("250 one\r\n")
    await envelope(peer)
    await peer.send(GO)
    await peer.body()
    await envelope(peer)


def says(reply: str) -> Script:
    """A peer that says this of the second body; after a 421, or without a word, it closes."""

    async def script(peer: PeerConnection) -> None:
        await until_ahead(peer)
        if reply:
            await peer.send(f"{reply}\r\n")
        if reply and not reply.startswith("421"):
            await peer.send(GO)
            await peer.body()
            await peer.send("250 taken\r\n")
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
        assert "RSET" not in bench.peer.commands


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
            await peer.send("250 taken\r\n")
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
        await until_ahead(peer)
        bench.queues.may_ack = trio.Event()
        await peer.send("250 two\r\n" + GO)
        asked.set()
        await peer.body()
        came.set()
        await peer.send("250 three\r\n")
        await peer.line()

    async with open_bench(script, domain_maxconnections=1) as bench:
        for _ in range(3):
            bench.send()
        with trio.fail_after(10):
            await asked.wait()
        for _ in range(20):
            await trio.testing.wait_all_tasks_blocked()
        assert not came.is_set()
        bench.queues.may_ack.set()
        await bench.results("success", 3)


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
        await peer.send("250 three\r\n")
        assert await peer.line() == "NOOP one"
        assert await peer.line() == "NOOP two"
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
        with trio.fail_after(10):
            await bench.dispatcher.stop(5)
        assert len(bench.queues["success"]) == 3
        assert len(bench.queues["outbox"]) == 3
        assert not bench.queues.leased
