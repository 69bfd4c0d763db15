"""Mail that is made of its properties when its turn comes, over real sockets."""

from __future__ import annotations

import email
import email.policy
from email.message import EmailMessage
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.message import Message
from mailerq.outbound import bodies, making
from tests.outbound.kit import Bench, PeerConnection, StubPlugins, open_bench
from tests.support import until

TEMPLATE = "From: a@b.test\r\nSubject: Hi {$name}\r\n\r\nDear {$name}, {$recipient}\r\n"
LONG = TEMPLATE + "{foreach $n in $numbers}{$n}{/foreach}\r\n" + 3000 * "x\r\n"

ENDLESS = "{foreach $x as $y}{foreach $x as $z}{foreach $x as $w}{/foreach}{/foreach}{/foreach}"


def read(bench: Bench, number: int = 0) -> EmailMessage:
    mail = bench.peer.mails[number].body
    parsed = email.message_from_bytes(mail, policy=email.policy.default)
    assert isinstance(parsed, EmailMessage)
    return parsed


@pytest.mark.parametrize("body", [TEMPLATE, LONG])
async def test_a_template_is_filled_in_and_the_stored_mail_stays(body: str) -> None:
    data = {"name": "Ann", "numbers": list(range(2000))}
    async with open_bench() as bench:
        bench.send(body=body, data=data, keepmime=True, seen="2026-01-01 11:00:00")
        await bench.results("success")
        parsed = read(bench)
        assert parsed["subject"] == "Hi Ann"
        assert "Dear Ann, c@d.test" in parsed.get_content()
        assert parsed["date"] == "Thu, 01 Jan 2026 11:00:00 +0000"
        assert parsed["message-id"] == "<stub-id@me.test>"
        (report,) = bench.queues["success"]
        assert report.body == body.encode()
        assert report.properties["data"] == data


async def test_an_object_is_sent_as_a_mail_and_kept_as_an_object() -> None:
    mime = {"subject": "Grüße", "text": "hi", "content": "<p>hi</p>"}
    async with open_bench() as bench:
        bench.peer.extensions = ("PIPELINING", "SIZE 1000000")
        bench.send(body=None, mime=mime, keepmime=1)
        bench.send(body=None, mime={**mime, "text": "\u4e16" * 20_000})
        await bench.results("success", 2)
        assert all(mail.body.isascii() for mail in bench.peer.mails)
        assert {read(bench, number)["subject"] for number in range(2)} == {"Grüße"}
        sizes = {
            int(line.rpartition("SIZE=")[2]) for line in bench.peer.commands if "SIZE=" in line
        }
        assert sizes == {len(mail.body) for mail in bench.peer.mails}
        kept = [each.properties.get("mime") for each in bench.queues["success"]]
        assert sorted(kept, key=bool) == [None, mime]


async def test_each_attempt_makes_the_same_mail_of_the_document() -> None:
    bodies: list[bytes] = []

    async def put_off(peer: PeerConnection) -> None:
        await peer.hello()
        while line := await peer.line():
            await peer.send("354 go\r\n" if line == "DATA" else "250 ok\r\n")
            if line == "DATA":
                bodies.append(await peer.body())
                await peer.send("250 taken\r\n" if bodies[1:] else "451 later\r\n")

    async with open_bench(put_off) as bench:
        bench.send(body=TEMPLATE, data={"name": "Ann"}, headers={"add": {"X": "y"}})
        await bench.retried()
        await bench.pass_time(600)
        await bench.results("success")
        assert len(bodies) == 2 and bodies[0] == bodies[1]


@pytest.mark.parametrize(
    ("properties", "state", "reason"),
    [
        ({"data": {}, "body": "A: b\r\n\r\n{$x"}, "personalize",
         "the text/plain part: line 1: expected '}'"),
        ({"data": {"x": [1]}, "body": "A: b\r\n\r\n{$x}"}, "personalize",
         "the text/plain part: line 1: expected a text"),
        ({"data": {"x": 900 * [1]}, "body": "\r\n" + ENDLESS}, "personalize",
         "the text/plain part: line 1: takes too many steps"),
        ({"mime": {"content": {"blocks": []}}}, "responsive", "property mime.content: is"),
        ({"mime": {"attachments": [{"url": "http://x"}]}}, "responsive",
         "property mime.attachments.0: has a url"),
        ({"headers": {"add": {"X": "a\r\nb"}}}, "responsive",
         "property headers.add.X: holds a line end"),
    ],
)  # fmt: skip
async def test_what_cannot_be_made_fails_with_its_reason_and_holds_nobody_up(
    properties: dict[str, Any], state: str, reason: str
) -> None:
    properties.setdefault("body", None if "mime" in properties else "hi")
    async with open_bench(domain_maxconnections=1) as bench:
        bench.send(**properties)
        bench.send()
        (result,) = await bench.results("failure")
        assert (result["type"], result["state"], result["result"]) == ("responsive", state, "error")
        assert result["description"].startswith(reason)
        await bench.results("success")
        assert [mail.body for mail in bench.peer.mails] == [b"hi\r\n"]


@pytest.mark.parametrize(
    ("properties", "named"),
    [
        ({"data": []}, "data"),
        ({"headers": "x"}, "headers"),
        ({"inlinecss": "yes"}, "inlinecss"),
        ({"normalize": "yes"}, "normalize"),
        ({"mime": 5, "body": None}, "mime"),
    ],
)
async def test_a_property_of_a_wrong_type_fails_and_is_named(
    properties: dict[str, Any], named: str
) -> None:
    async with open_bench() as bench:
        bench.send(**properties)
        (result,) = await bench.results("failure")
        assert result["result"] == "invalid"
        assert result["description"].startswith(f"property {named}: expected ")
        assert bench.peer.connections == 0


async def test_a_made_mail_that_loops_fails() -> None:
    async with open_bench() as bench:
        bench.send(body="Subject: x\r\n\r\nhi", headers={"add": {"Received": 101 * ["by x"]}})
        (result,) = await bench.results("failure")
        assert result["status"] == "5.4.6"


async def test_a_plugin_sees_the_mail_that_was_made() -> None:
    seen: list[bytes | None] = []
    plugins = StubPlugins(out_data=lambda message: seen.append(message.body))
    async with open_bench(plugins=plugins) as bench:
        bench.send(body=TEMPLATE.replace("\r", ""), data={"name": "Ann"})
        await bench.results("success")
        assert seen == [bench.peer.mails[0].body]


async def test_a_plugin_may_supply_a_body_that_is_not_there() -> None:
    def supply(message: Message) -> None:
        message.body = b"supplied\r\n"

    async with open_bench(plugins=StubPlugins(out_data=supply)) as bench:
        bench.send(body=None, data={"x": 1})
        await bench.results("success")
        assert bench.peer.mails[0].body == b"supplied\r\n"


async def test_a_mail_that_goes_back_unsent_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def leave_after_one(peer: PeerConnection) -> None:
        await peer.hello()
        while (line := await peer.line()) != "DATA":
            await peer.send("250 ok\r\n")
            assert line
        await peer.send("354 go\r\n")
        await peer.body()
        await peer.send("250 taken\r\n")
        while (line := await peer.line()) == "RSET":
            await peer.send("250 ok\r\n")
        await peer.send("421 bye\r\n")

    async with open_bench(leave_after_one, domain_maxconnections=1) as bench:
        for number in range(3):
            bench.send(f"{number}@d.test", TEMPLATE, data={"name": f"n{number}"})
        results = await bench.results("success", 3)
        assert {result["attempt"] for result in results} == {1}
        assert len(bench.peer.mails) == 2
        for mail in bench.peer.mails:
            assert f"Subject: Hi n{mail.recipient[0]}".encode() in mail.body


@pytest.mark.parametrize("body", [TEMPLATE, LONG])
async def test_a_defect_here_costs_one_attempt_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, body: str
) -> None:
    make = making.make

    def broken(properties: dict[str, Any], *args: Any, **more: Any) -> bytes:
        if properties["recipient"] == "3@d.test":
            raise RuntimeError("a defect")
        return make(properties, *args, **more)

    monkeypatch.setattr(making, "make", broken)
    async with open_bench(domain_maxconnections=1) as bench:
        for number in range(6):
            bench.send(f"{number}@d.test", body, data={"name": "Ann", "numbers": []})
        results = await bench.results("success", 5)
        assert {result["attempt"] for result in results} == {1}
        assert (await bench.retried())["code"] == 451
        assert [mail.recipient for mail in bench.peer.mails].count("3@d.test") == 0
        assert len(bench.peer.mails) == 5 and bench.peer.connections == 1
    assert "a defect" in caplog.text


async def test_bodies_that_are_made_large_are_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bodies, "MAX_BYTES", 1_500_000)
    go, begun = trio.Event(), 0

    async def slow(peer: PeerConnection) -> None:
        nonlocal begun
        await peer.hello()
        while line := await peer.line():
            if line == "DATA":
                begun += 1
                await go.wait()
            await peer.send("354 go\r\n" if line == "DATA" else "250 ok\r\n")
            if line == "DATA":
                await peer.body()
                await peer.send("250 taken\r\n")

    body = TEMPLATE + "{foreach $x in $l}" + 900 * "x" + "\n{/foreach}"
    async with open_bench(*12 * [slow]) as bench:
        for number in range(12):
            bench.send(f"{number}@d.test", body, data={"name": "x", "l": [*range(1000)]})
        await until(lambda: begun >= 2)
        for _ in range(3):  # the others are made, or wait
            await trio.testing.wait_all_tasks_blocked(0.1)
        assert begun <= 2 + making.MAKERS
        go.set()
        await bench.results("success", 12)


async def test_long_work_is_done_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []
    make = making.make

    def watched(*args: Any, **more: Any) -> bytes:
        try:
            trio.lowlevel.current_task()
        except RuntimeError:
            threads.append(True)
        else:
            threads.append(False)
        return make(*args, **more)

    monkeypatch.setattr(making, "make", watched)
    body = TEMPLATE + "{foreach $x in $l}{$x}{/foreach}"
    async with open_bench() as bench:
        bench.send(body=body, data={"l": [1]})
        await bench.results("success")
        bench.send(body=body, data={"l": list(range(5000))})
        await bench.results("success", 2)
        bench.send(body=body + 40_000 * "x", data={"l": [1]})
        await bench.results("success", 3)
    assert threads == [False, False, True, True]
