"""Replies of peers and their patterns: what becomes of the message, and of the mail behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import pytest
import trio

from mailerq.message import format_time
from mailerq.outbound.refusals import Action, Refusals, react
from mailerq.rules.answers import Answers
from mailerq.rules.recovery import Stage
from mailerq.rules.responses import Outcome
from mailerq.rules.triggers import Triggers
from tests.outbound.kit import Bench, PeerConnection, open_bench
from tests.outbound.test_delivery_limits import let_go

FAST: Any = {"connection_maxidle": 60_000}


def pattern(text: str, kind: str, **more: object) -> str:
    keys = {"name": text.replace(" ", "-"), "text": text, "class": kind, **more}
    keys.setdefault("samples", [f"450 {text}"])
    lines = []
    for key, value in keys.items():
        word = str(value).lower() if isinstance(value, bool) else repr(value)
        lines.append(f"{key.replace('_', '-')} = {word}")
    return "\n".join(["[[response]]", *lines, ""])


@asynccontextmanager
async def reacting(*patterns: str, **options: Any) -> AsyncIterator[Bench]:
    answers = Answers.parse("\n".join(patterns).encode(), "answers.toml", ())
    async with open_bench(*options.pop("scripts", ()), **options) as bench:
        react(bench.dispatcher.limits, answers)
        yield bench


def refuse(bench: Bench, *replies: str, verb: str = "RCPT", recipient: str = "") -> None:
    bench.peer.answers[verb, recipient] = list(replies)


def refusals(bench: Bench) -> Refusals:
    found = bench.dispatcher.limits.refusals
    assert found is not None
    return found


def stage(bench: Bench) -> Stage | None:
    """What the only scope that a pattern has acted on is doing."""
    for action in refusals(bench).actions.values():
        return action.recovery.stage
    return None


# The message.


async def test_a_pattern_has_a_5xx_tried_again_and_a_4xx_fail() -> None:
    async with reacting(
        pattern("too fast", "content", message="retry", retry_after="2h"),
        pattern("never", "content", message="fail"),
    ) as bench:
        refuse(bench, "550 5.7.1 you are too fast", recipient="c@d.test")
        bench.send("c@d.test")
        result = await bench.retried()
        assert (result["code"], result["class"], result["rule"]) == (550, "content", "too-fast")
        (message,) = bench.queues["retry"]
        assert message.properties["delayed"] == format_time(bench.queues.now + 7200)
        refuse(bench, "450 we never take this", recipient="e@d.test")
        bench.send("e@d.test")
        (failed,) = await bench.results("failure")
        assert (failed["code"], failed["rule"]) == (450, "never")


async def test_without_patterns_the_code_alone_decides() -> None:
    async with open_bench() as bench:
        refuse(bench, "550 5.7.1 you are too fast", "450 never")
        bench.send("c@d.test")
        (failed,) = await bench.results("failure")
        assert failed["code"] == 550 and "class" not in failed
        bench.send("c@d.test")
        assert (await bench.retried())["code"] == 450
        assert bench.dispatcher.limits.replies() == {}


async def test_greylisted_mail_comes_again_after_the_time_that_the_reply_states() -> None:
    async with reacting(pattern("greylist", "greylist")) as bench:
        refuse(bench, "450 4.2.0 greylisted, try again in 7 minutes")
        bench.send()
        await bench.retried()
        (message,) = bench.queues["retry"]
        assert message.properties["delayed"] == format_time(bench.queues.now + 420)
        await bench.pass_time(421)
        assert (await bench.results())[0]["attempt"] == 2


async def test_a_reply_about_one_recipient_has_no_effect_on_others() -> None:
    async with reacting(pattern("too quickly", "user-rate"), **FAST) as bench:
        refuse(bench, *["550 5.2.1 receives too quickly"] * 3, recipient="busy@d.test")
        for _ in range(3):
            bench.send("busy@d.test")
            bench.send("c@d.test")
        await bench.results(count=3)
        await bench.results("retry", count=3)
        assert refusals(bench).actions == {}
        assert refusals(bench).statistics()["classes"] == {"user-rate": 3}
        for message in bench.queues["retry"]:
            assert message.properties["delayed"] == format_time(bench.queues.now + 3600)


async def test_an_attempt_that_the_connection_ends_is_not_counted() -> None:
    async with reacting(pattern("per connection", "session-limit"), **FAST) as bench:
        refuse(bench, "450 max messages per connection", verb=".", recipient="d@d.test")
        bench.send("c@d.test")
        await bench.results()
        bench.send("d@d.test")
        await bench.until(lambda figures: figures["put_off"] == 1)
        await bench.pass_time(2)
        results = await bench.results(count=2)
        assert [result["attempt"] for result in results] == [1, 1]
        assert bench.peer.connections == 2, "the first one has had enough"
        assert bench.queues["retry"] == [] and refusals(bench).actions == {}


async def test_connections_end_after_the_number_of_messages_that_a_peer_takes() -> None:
    """A peer that takes three messages on a connection refuses a fourth one only once."""
    settings: Any = {"domain_maxconnections": 1, "connection_maxidle": 60_000}
    async with reacting(pattern("per connection", "session-limit"), **settings) as bench:

        async def three(connection: PeerConnection) -> None:
            bench.peer.answers[".", ""] = []
            taken = bench.peer.answers[".", "d@d.test"] = ["250 ok"] * 3
            taken.append("421 max messages per connection")
            await connection.serve()

        bench.peer.scripts += [three] * 20
        for _ in range(12):
            bench.send("d@d.test")
        await bench.until(lambda figures: figures["put_off"] == 1)
        await bench.pass_time(2)
        await bench.results(count=12)
        assert bench.dispatcher.counters.put_off == 1
        assert bench.peer.connections == 4
        assert {result["attempt"] for result in await bench.results(count=12)} == {1}


async def test_a_peer_that_has_had_enough_before_the_first_mail_is_not_asked_each_second() -> None:
    async with reacting(pattern("per connection", "session-limit")) as bench:
        refuse(bench, *["421 max messages per connection"] * 3, verb="MAIL")
        bench.send()
        result = await bench.retried()
        assert (result["attempt"], result["class"]) == (1, "session-limit")
        (message,) = bench.queues["retry"]
        assert message.properties["delayed"] == format_time(bench.queues.now + 600)
        assert bench.dispatcher.counters.put_off == 0


async def test_what_this_host_says_for_a_peer_has_no_meaning() -> None:
    async with reacting(pattern("message has", "size", samples=["552 message has"])) as bench:
        bench.peer.extensions = ["SIZE 3"]
        bench.send(body="too long\r\n")
        (failed,) = await bench.results("failure")
        assert (failed["code"], failed["status"]) == (552, "5.3.4")
        assert "class" not in failed
        figures = bench.dispatcher.limits.replies()
        assert figures["classes"] == figures["unclassified"] == {}


async def test_mail_that_would_expire_before_it_comes_again_fails() -> None:
    async with reacting(pattern("too many", "toomanyconn", retry_after="2d")) as bench:
        refuse(bench, "421 too many")
        bench.send()
        (failed,) = await bench.results("failure")
        assert failed["rule"] == "too-many"


# The mail behind it.


async def test_other_mail_goes_on_during_a_pause() -> None:
    pause = pattern("unusual rate", "reputation-temp", pause="1h")
    async with reacting(pause, domain_maxconnections=2, **FAST) as bench:
        refuse(bench, "421 4.7.28 unusual rate", verb=".", recipient="c@d.test")
        bench.send("c@d.test")
        await bench.retried()
        for number in range(30):
            bench.send(f"c{number}@d.test")
        bench.send("c@other.test")
        await bench.results()
        assert stage(bench) is Stage.PAUSED
        assert [mail.recipient for mail in bench.peer.mails] == ["c@other.test"]
        assert bench.dispatcher.counters.attempts == 2
        (text,) = [each for each in limits_of(bench) if each.startswith("pause until")]
        assert "of d.test (unusual-rate, answers.toml:1)" in text


async def test_a_pause_ends_with_a_probe_and_more_mail_follows() -> None:
    pause = pattern("unusual rate", "reputation-temp", pause=1)
    async with reacting(pause, domain_maxconnections=2, **FAST) as bench:
        refuse(bench, "421 4.7.28 unusual rate", verb=".", recipient="c@d.test")
        bench.send("c@d.test")
        began = monotonic()
        await bench.retried()
        for number in range(30):
            bench.send(f"c{number}@d.test")
        await bench.results(count=30)
        assert min(mail.at for mail in bench.peer.mails) - began > 0.95
        assert bench.dispatcher.counters.attempts == 31
        await bench.until(lambda figures: stage(bench) is Stage.RECOVERING)
        (action,) = refusals(bench).actions.values()
        assert action.recovery.connections is None, "two are enough for this site"


def limits_of(bench: Bench) -> dict[str, int]:
    found: dict[str, int] = bench.dispatcher.limits.statistics()["limits"]
    return found


async def test_a_refused_probe_pauses_again_and_only_the_probe_is_tried() -> None:
    pause = pattern("unusual rate", "reputation-temp", pause=0.5, trigger="2/h")
    async with reacting(pause, **FAST) as bench:
        refuse(bench, *["421 4.7.28 unusual rate"] * 3)
        bench.send("a@d.test")
        await bench.results("retry", count=1)
        assert stage(bench) is None, "one is not enough"
        bench.send("b@d.test")
        await bench.results("retry", count=2)
        assert stage(bench) is Stage.PAUSED
        for number in range(20):
            bench.send(f"c{number}@d.test")
        await bench.results("retry", count=3)
        (action,) = refusals(bench).actions.values()
        assert (action.recovery.stage, action.recovery.paused_for) == (Stage.PAUSED, 1.0)
        assert (action.hits, action.rule) == (3, "unusual-rate")
        assert "unusual rate" in action.sample
        await bench.results(count=19)


async def test_failed_recipients_do_not_make_other_counters_forget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two = lambda most=2: Triggers(min(most, 2))  # noqa: E731
    monkeypatch.setattr("mailerq.outbound.refusals.Triggers", two)
    pause = pattern("unusual rate", "reputation-temp", trigger="2/h")
    gone = pattern("nobody", "user-unknown", suppress=True, trigger="2/h", samples=["550 nobody"])
    async with reacting(pause, gone, **FAST) as bench:
        kept = Suppressed()
        react(bench.dispatcher.limits, None)
        react(bench.dispatcher.limits, Answers.parse(f"{pause}{gone}".encode(), "f", ()), kept)
        refuse(bench, "450 unusual rate")
        bench.send()
        await bench.results("retry", count=1)
        for number in range(4):
            refuse(bench, "550 nobody")
            bench.send(f"c{number}@d.test")
            await bench.results("failure", count=number + 1)
        refuse(bench, "550 nobody")
        bench.send("c3@d.test")
        await bench.results("failure", count=5)
        assert kept.recipients == ["c3@d.test"]
        refuse(bench, "450 unusual rate")
        bench.send()
        await bench.results("retry", count=2)
        assert stage(bench) is Stage.PAUSED


class Suppressed:
    """Keeps nothing but the recipients that are suppressed."""

    def __init__(self) -> None:
        self.recipients: list[str] = []

    def keep(self, action: Action) -> None: ...

    def drop(self, action: Action) -> None: ...

    def suppress(self, recipient: str, rule: str, outcome: Outcome) -> None:
        self.recipients.append(recipient)


async def test_one_connection_less_after_a_reply_about_their_number() -> None:
    fewer = pattern("too many connections", "toomanyconn", retry_after=1)
    async with reacting(fewer, domain_maxconnections=5, **FAST) as bench:
        for number in range(40):
            bench.send(f"c{number}@d.test")
        refuse(bench, "450 too many connections", verb=".", recipient="c39@d.test")
        await bench.until(lambda figures: figures["put_off"] == 1)
        (action,) = refusals(bench).actions.values()
        assert action.recovery.connections is not None and action.recovery.connections < 5
        adjusted = refusals(bench).adjusted({}, *action.scope)
        assert adjusted["max-connections"].value == action.recovery.connections
        await bench.pass_time(2)
        await bench.results(count=40)
        assert bench.dispatcher.counters.retried == 0


async def test_a_lower_rate_holds_for_waiting_mail() -> None:
    slow = pattern("slow down", "speeding", slow=0.5)
    async with reacting(slow, domain_maxmessages=1200, **FAST) as bench:
        refuse(bench, "450 slow down", verb=".")
        bench.send("first@d.test")
        await bench.retried()
        for number in range(9):
            bench.send(f"c{number}@d.test")
        await bench.results(count=9)
        times = let_go(bench, rate="messages-per-minute 600 ")
        assert times[-1] - times[0] > 0.7, "ten a second, not twenty"


async def test_a_cancelled_action_lets_mail_go_at_once() -> None:
    async with reacting(pattern("unusual rate", "reputation-temp", pause="1h"), **FAST) as bench:
        refuse(bench, "421 unusual rate")
        bench.send("a@d.test")
        await bench.retried()
        bench.send("b@d.test")
        await bench.queues.until(lambda queues: bool(limits_of(bench)))
        (scope,) = refusals(bench).actions
        assert refusals(bench).cancel(scope) and not refusals(bench).cancel(scope)
        await bench.results()


async def test_a_reply_that_ends_no_attempt_is_heard_too() -> None:
    """The peer closes a connection on which it has taken mail: the next mail is not charged."""
    async with reacting(pattern("too many connections", "toomanyconn"), **FAST) as bench:
        bench.send("a@d.test")
        await bench.results()
        refuse(bench, "421 too many connections")
        bench.send("b@d.test")
        results = await bench.results(count=2)
        assert [result["attempt"] for result in results] == [1, 1]
        assert refusals(bench).statistics()["classes"] == {"toomanyconn": 1}
        assert bench.dispatcher.counters.put_off == 0


async def test_a_refusal_of_one_more_connection_is_heard() -> None:
    busy, refused = trio.Event(), trio.Event()

    async def slow(connection: PeerConnection) -> None:
        await connection.hello()
        await connection.line()
        busy.set()
        await refused.wait()
        await connection.send("250 ok\r\n")
        await connection.serve()

    async def full(connection: PeerConnection) -> None:
        await connection.send("421 too many connections\r\n")
        refused.set()

    fewer = pattern("too many connections", "toomanyconn")
    async with reacting(fewer, scripts=[slow, full], **FAST) as bench:
        for number in range(60):
            bench.send(f"c{number}@d.test")
        await refused.wait()
        await bench.until(lambda figures: bool(refusals(bench).actions))
        (action,) = refusals(bench).actions.values()
        assert action.recovery.connections == 1 and busy.is_set()


# Seeing.


async def test_replies_that_no_pattern_matches_are_counted() -> None:
    async with reacting(pattern("other", "content")) as bench:
        refuse(bench, "450 no mail from 192.0.2.1", "450 no mail from 192.0.2.77", "550 other")
        for count in (1, 2):
            bench.send()
            await bench.results("retry", count=count)
        bench.send()
        await bench.results("failure")
        figures = bench.dispatcher.limits.replies()
        assert figures["unclassified"] == {"450 no mail from IP": 2}
        assert figures["classes"] == {"content": 1}


async def test_a_reply_without_a_class_is_counted_in_none() -> None:
    adds = "[[response]]\nname = 'adds'\ncode = 450\nfinal = false\nalert = true\n"
    async with reacting(adds) as bench:
        refuse(bench, "450 no")
        bench.send()
        assert "class" not in await bench.retried()
        figures = bench.dispatcher.limits.replies()
        assert figures["classes"] == figures["unclassified"] == {}


async def test_an_alert_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with reacting(pattern("listed", "auth")) as bench:
        refuse(bench, "550 you are listed")
        bench.send()
        await bench.results("failure")
    assert "listed: d.test answers 550 you are listed" in caplog.text
