"""A host that says it is busy: its mail goes to the next host of the domain (`leave-host`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from mailerq.message import format_time
from mailerq.outbound import sites
from mailerq.outbound.refusals import react
from mailerq.rules.answers import Answers
from mailerq.rules.recovery import Stage
from tests.net.dns_server import Table
from tests.outbound.kit import Bench, PeerConnection, Script
from tests.outbound.test_refusals import pattern, refusals, stage
from tests.outbound.test_sites import by_host, mx, open_hosts, targets

BUSY = pattern("busy", "system", samples=["421 4.3.2 busy"])
SAYS = "421 4.3.2 busy"
TWO: Table = {("d.test", "MX"): mx("10 one", "20 two")}
ALONE: Table = {("d.test", "MX"): mx("10 one")}


def answers(*replies: str, verb: str = "RCPT") -> Script:
    """A host that gives these replies to a command, on each of its connections."""

    async def play(connection: PeerConnection) -> None:
        connection.answers = {(verb, ""): list(replies)}
        await connection.serve()

    return play


@asynccontextmanager
async def busy_hosts(
    zone: Table, *patterns: str, settings: dict[str, Any] | None = None, **hosts: Script
) -> AsyncIterator[Bench]:
    async with open_hosts(zone, by_host(**hosts), **(settings or {})) as (bench, _):
        text = "\n".join(patterns or (BUSY,)).encode()
        react(bench.dispatcher.limits, Answers.parse(text, "answers.toml", ()))
        yield bench


def asked(bench: Bench) -> Counter[str]:
    return Counter(command.partition(" ")[0] for command in bench.peer.commands)


@pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("reply", [SAYS, "451 4.3.2 busy"])
async def test_the_mail_goes_out_by_the_next_host(verb: str, reply: str) -> None:
    async with busy_hosts(TWO, one=answers(reply, verb=verb)) as bench:
        for count in (1, 2):
            bench.send()
            (*_, result) = await bench.results("success", count=count)
            assert (result["to"], result["attempt"]) == ("127.0.0.2", 1)
            assert "class" not in result
        assert bench.queues["retry"] == []
        assert bench.dispatcher.counters.put_off == 1, "the second mail has not been there"
        assert bench.dispatcher.history.is_left("127.0.0.1")
        assert refusals(bench).statistics()["classes"] == {"system": 1}


async def test_a_host_that_is_alone_has_its_mail_tried_again_as_its_code_says() -> None:
    async with busy_hosts(ALONE, one=answers(SAYS)) as bench:
        bench.send()
        result = await bench.retried()
        assert (result["code"], result["class"], result["attempt"]) == (421, "system", 1)
        (message,) = bench.queues["retry"]
        assert message.properties["delayed"] == format_time(bench.queues.now + 600)


async def test_hosts_that_are_down_are_no_next_hosts() -> None:
    async with busy_hosts(TWO, one=answers(SAYS)) as bench:
        bench.dispatcher.history.kept_out("127.0.0.2")
        bench.send()
        assert (await bench.retried())["to"] == "127.0.0.1"
        assert asked(bench)["RCPT"] == 1


async def test_when_all_hosts_are_busy_the_attempt_ends_with_the_last_reply() -> None:
    async with busy_hosts(TWO, one=answers(SAYS), two=answers("451 4.3.1 busy too")) as bench:
        bench.send()
        result = await bench.retried()
        assert (result["to"], result["code"], result["attempt"]) == ("127.0.0.2", 451, 1)
        assert asked(bench)["RCPT"] == 2


async def test_an_attempt_ends_although_each_host_is_free_again_at_once() -> None:
    short = pattern("busy", "system", leave_host=0.001)
    async with busy_hosts(TWO, short, one=answers(SAYS), two=answers(SAYS)) as bench:
        bench.send()
        assert (await bench.retried())["attempt"] == 1
        assert asked(bench)["RCPT"] <= 3, "twice the first host at most"


async def test_a_host_comes_back_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = sites.monotonic()
    monkeypatch.setattr(sites, "monotonic", lambda: now)
    two_minutes = pattern("busy", "system", leave_host="2m")
    settings: dict[str, Any] = {"connection_maxmessages": 1}
    replies = [SAYS]

    async def once(connection: PeerConnection) -> None:
        connection.answers = {("RCPT", ""): replies}
        await connection.serve()

    async with busy_hosts(TWO, two_minutes, settings=settings, one=once) as bench:
        for count, (later, host) in enumerate([(0, "two"), (119, "two"), (2, "one")], 1):
            now += later
            bench.send()
            (*_, result) = await bench.results("success", count=count)
            assert result["mta"] == "mx.test"
            assert result["to"] == {"one": "127.0.0.1", "two": "127.0.0.2"}[host]


async def test_other_connections_to_the_host_end_with_their_mail() -> None:
    gave_up, first = trio.Event(), True

    async def one(connection: PeerConnection) -> None:
        nonlocal first
        if first:
            first = False
            await connection.hello()
            await connection.line()
            await gave_up.wait()  # the other connection, which this one has made possible
            await connection.send("250 ok\r\n")
            connection.answers = {}
            await go_on(connection)
        else:
            await connection.hello()
            await connection.line()
            await connection.send(f"{SAYS}\r\n")
            gave_up.set()

    async def go_on(connection: PeerConnection) -> None:
        """Take the mail whose MAIL has been answered, and no other."""
        assert (await connection.line()).startswith("RCPT")
        await connection.send("250 ok\r\n")
        assert await connection.line() == "DATA"
        await connection.send("354 go\r\n")
        await connection.take()
        taken.append(connection.number)
        assert await connection.line() in ("QUIT", "")

    taken: list[int] = []
    async with busy_hosts(TWO, one=one) as bench:
        for number in range(60):
            bench.send(f"c{number}@d.test")
        await bench.results("success", count=60)
        assert targets(bench) == {"127.0.0.1": 1, "127.0.0.2": 59}
        assert taken == [1]


async def test_a_connection_that_a_busy_host_lets_in_later_gets_no_mail() -> None:
    let_in, said = trio.Event(), trio.Event()
    seen: list[str] = []

    async def one(connection: PeerConnection) -> None:
        if connection.number == 1:
            await connection.hello()
            await connection.line()
            await let_in.wait()
            await connection.send(f"{SAYS}\r\n")
            said.set()
            return
        let_in.set()
        await said.wait()
        await bench.until(lambda figures: bench.dispatcher.history.is_left("127.0.0.1"))
        await connection.hello()
        while line := await connection.line():
            seen.append(line)

    async with busy_hosts(TWO, one=one) as bench:
        for number in range(20):
            bench.send(f"c{number}@d.test")
        await bench.results("success", count=20)
        assert targets(bench) == {"127.0.0.2": 20}
        assert set(seen) <= {"QUIT"}


async def test_mail_for_a_connection_that_has_taken_some_goes_to_the_next_host() -> None:
    async with busy_hosts(TWO, one=answers("250 ok", SAYS, verb="MAIL")) as bench:
        bench.send()
        assert (await bench.results("success"))[0]["to"] == "127.0.0.1"
        bench.send()
        results = await bench.results("success", count=2)
        assert (results[1]["to"], results[1]["attempt"]) == ("127.0.0.2", 1)
        assert asked(bench)["EHLO"] == 2, "no new connection to the first host"


async def test_a_refusal_for_good_goes_on_too_and_fails_at_the_last_host() -> None:
    async with busy_hosts(TWO, one=answers("554 5.3.0 busy")) as bench:
        bench.send()
        assert (await bench.results("success"))[0]["to"] == "127.0.0.2"
    async with busy_hosts(ALONE, one=answers("554 5.3.0 busy")) as bench:
        bench.send()
        assert (await bench.results("failure"))[0]["class"] == "system"


async def test_a_pattern_may_fail_the_message_and_leave_the_host_to_others() -> None:
    fails = pattern("busy", "system", message="fail")
    async with busy_hosts(TWO, fails, one=answers(SAYS)) as bench:
        bench.send()
        assert (await bench.results("failure"))[0]["to"] == "127.0.0.1"
        bench.send()
        assert (await bench.results("success"))[0]["to"] == "127.0.0.2"


async def test_a_pattern_may_have_the_code_decide_alone() -> None:
    async with busy_hosts(TWO, pattern("busy", "system", leave_host=0), one=answers(SAYS)) as bench:
        bench.send()
        assert (await bench.retried())["to"] == "127.0.0.1"
        assert not bench.dispatcher.history.is_left("127.0.0.1")


async def test_a_busy_host_says_nothing_about_a_probe() -> None:
    pause = pattern("unusual rate", "reputation-temp", pause=0.05)
    replies = ["450 unusual rate", "450 4.3.2 busy"]

    async def one(connection: PeerConnection) -> None:
        connection.answers = {("RCPT", ""): replies}
        await connection.serve()

    async with busy_hosts(ALONE, pause, BUSY, one=one) as bench:
        bench.send()
        await bench.results("retry", count=1)
        await bench.until(lambda figures: stage(bench) is Stage.PROBING)
        bench.send()
        await bench.results("retry", count=2)
        assert stage(bench) is Stage.PROBING
        bench.send()
        await bench.results("success")
        assert stage(bench) is Stage.RECOVERING
