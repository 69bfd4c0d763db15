"""Deliveries: what is sent, how each message ends, and the results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from mailerq.message import Message, Result
from mailerq.net.logs import LogFile
from mailerq.net.resolver import NoHosts
from mailerq.outbound.dispatcher import Dispatcher
from mailerq.outbound.settlement import _log_line
from mailerq.wire.smtp import Reply
from tests.outbound.kit import StubResolver, open_bench
from tests.outbound.memory_queues import NOW
from tests.support import unescape


async def test_a_message_arrives_and_its_result_is_published() -> None:
    async with open_bench() as bench:
        bench.send(body="Subject: x\r\n\r\nhi\r\n.dot\r\n", custom=77)
        (result,) = await bench.results()
        (mail,) = bench.peer.mails
        assert (mail.envelope, mail.recipient) == ("a@b.test", "c@d.test")
        assert mail.body == b"Subject: x\r\n\r\nhi\r\n.dot\r\n"
        assert result == {
            "attempt": 1,
            "type": "success",
            "state": "accept",
            "result": "accepted",
            "time": "2026-01-01 12:00:00",
            "mta": "mx.test",
            "from": "127.0.0.1",
            "to": "127.0.0.1",
            "messages": 1,
            "code": 250,
            "status": "2.0.0",
            "description": "taken",
        }
        (message,) = bench.queues["results"]
        assert message.body is None
        assert message.properties["custom"] == 77
        assert bench.queues["outbox"] == bench.queues["failure"] == bench.queues["retry"] == []
        assert len(bench.queues["success"]) == 1
        assert not bench.queues.leased


async def test_a_temporary_refusal_is_tried_again_when_its_time_has_come() -> None:
    async with open_bench() as bench:
        bench.peer.answers["RCPT", "c@d.test"] = ["451 4.7.1 greylisted"]
        bench.send(custom=[1, {"deep": None}])
        result = await bench.retried()
        assert (result["type"], result["state"], result["result"]) == ("error", "rcpt to", "error")
        assert (result["code"], result["status"]) == (451, "4.7.1")
        assert result["description"] == "greylisted"
        ((due, message),) = bench.queues.queues["outbox"]
        assert due == NOW + 600
        assert message.body == b"hi\r\n"
        assert message.properties["delayed"] == "2026-01-01 12:10:00"
        assert message.properties["seen"] == "2026-01-01 12:00:00"
        assert bench.queues["results"] == []
        bench.queues.pass_time(600)
        (result,) = await bench.results()
        assert (result["type"], result["attempt"]) == ("success", 2)
        (message,) = bench.queues["success"]
        assert [r["type"] for r in message.results] == ["error", "success"]
        assert message.properties["custom"] == [1, {"deep": None}]


@pytest.mark.parametrize(
    ("verb", "state"),
    [("MAIL", "mail from"), ("RCPT", "rcpt to"), ("DATA", "data"), (".", "received")],
)
async def test_a_permanent_refusal_is_final(verb: str, state: str) -> None:
    async with open_bench() as bench:
        bench.peer.answers[verb, ""] = ["550-5.7.1 go\r\n550 5.7.1 away"]
        bench.send()
        (result,) = await bench.results("failure")
        assert (result["type"], result["state"], result["code"]) == ("error", state, 550)
        assert result["description"] == "go away"
        assert len(bench.queues["results"]) == 1
        assert bench.queues["outbox"] == bench.queues["retry"] == []


async def test_a_message_has_its_own_retries_and_attempts() -> None:
    async with open_bench() as bench:
        bench.peer.answers["RCPT", ""] = ["450 no"] * 9
        bench.send(retries=[5, 30], maxattempts=4)
        for count, delay in enumerate((5, 30, 30), 1):
            await bench.queues.until(lambda q, n=count: len(q["retry"]) == n)
            ((due, _),) = bench.queues.queues["outbox"]
            assert due == bench.queues.now + delay
            bench.queues.pass_time(delay)
        (result,) = await bench.results("failure")
        assert (result["attempt"], result["code"]) == (4, 450)


async def test_what_would_go_after_its_expiry_has_failed_now() -> None:
    async with open_bench(max_delivertime=900) as bench:
        bench.peer.answers["RCPT", ""] = ["450 no"] * 9
        bench.send()
        await bench.retried()
        bench.queues.pass_time(600)
        (result,) = await bench.results("failure")
        assert (result["type"], result["attempt"]) == ("error", 2)


async def test_a_message_past_its_time_is_not_tried() -> None:
    async with open_bench() as bench:
        bench.send(maxdelivertime="2026-01-01 11:59:59")
        bench.send(seen="2025-12-31 11:59:59")
        for result in await bench.results("failure", 2):
            assert (result["type"], result["state"]) == ("expired", "process")
            assert result["result"] == "timeout"
        assert bench.peer.connections == 0


async def test_a_delayed_message_is_put_back_until_it_is_due() -> None:
    async with open_bench() as bench:
        bench.send(delayed="2026-01-03 12:00:00")
        await bench.queues.until(lambda queues: bool(queues.groups))
        ((due, message),) = bench.queues.queues["outbox"]
        assert due == NOW + 2 * 86400
        assert "seen" not in message.properties
        assert message.results == []
        bench.queues.pass_time(2 * 86400)
        await bench.results()


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"retries": "5"}, "retries"),
        ({"envelope": 7}, "envelope"),
        ({"results": "none"}, "results"),
        ({"queues": {"failure": 5}}, "queues"),
        ({"recipient": None}, "recipient"),
        ({"recipient": "nobody"}, "recipient"),
        ({"recipient": "c@d.test\r\nDATA"}, "recipient"),
        ({"envelope": "a@b.test>\r\nRCPT TO:<x@y.test"}, "envelope"),
        ({"smarthost": {"port": 25}}, "smarthost"),
        ({"smarthost": {"hostname": "x.test", "port": "many"}}, "smarthost"),
        ({"smarthost": {"hostname": "a b"}}, "a b"),
        ({"ips": ["localhost"]}, "ips"),
    ],
)
async def test_a_message_that_cannot_be_sent_fails_with_a_reason(
    properties: dict[str, Any], words: str
) -> None:
    async with open_bench() as bench:
        bench.send(**properties)
        (result,) = await bench.results("failure")
        assert (result["state"], result["result"]) == ("process", "invalid")
        assert words in result["description"]
        (message,) = bench.queues["results"]
        kept = {name: message.properties[name] for name in properties}
        assert kept == properties or "results" in properties
        assert bench.peer.connections == 0


async def test_queues_of_a_message_come_before_the_configured_ones() -> None:
    async with open_bench() as bench:
        bench.send(queues={"success": None, "results": "mine"})
        await bench.results("mine")
        assert bench.queues["success"] == bench.queues["results"] == []
        bench.peer.answers["RCPT", ""] = ["550 no"]
        bench.send(queues={"failure": "bad", "retry": "again"})
        await bench.results("bad")
        assert len(bench.queues["results"]) == 1


async def test_without_any_queue_a_delivered_message_is_gone() -> None:
    async with open_bench(rabbitmq_results="", rabbitmq_success="") as bench:
        bench.send()
        await bench.queues.until(lambda queues: bool(queues.groups))
        assert not any(bench.queues.queues.values())
        assert not bench.queues.leased


async def test_keepmime_keeps_the_body_in_results() -> None:
    async with open_bench() as bench:
        bench.peer.answers["RCPT", ""] = ["450 no"]
        bench.send(keepmime=True)
        await bench.retried()
        assert [message.body for message in bench.queues["retry"]] == [b"hi\r\n"]
        bench.queues.pass_time(600)
        await bench.results()
        assert [message.body for message in bench.queues["success"]] == [b"hi\r\n"]


async def test_a_message_without_a_body_fails() -> None:
    async with open_bench() as bench:
        bench.send(body=None)
        bench.send(body=None, mime={"subject": 1})
        results = await bench.results("failure", 2)
        types = sorted(result["type"] for result in results)
        assert types == ["nodata", "responsive"]
        assert all("mime" not in message.properties for message in bench.queues["results"])
        assert bench.peer.connections == 0


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
async def test_a_message_that_runs_in_circles_fails(end: str) -> None:
    async with open_bench() as bench:
        bench.send(body=f"Received: by a{end}" * 101 + end + "body\r\n\r\n")
        (result,) = await bench.results("failure")
        assert (result["code"], result["status"]) == (554, "5.4.6")
        bench.send(body="RECEIVED: by a\r\n" * 100 + "\r\n" + "Received: by a\r\n" * 100)
        await bench.results("success")


async def test_bodies_and_addresses_that_are_not_ascii() -> None:
    async with open_bench() as bench:
        bench.send(body="grüße\r\n", recipient="c@bücher.test")
        await bench.results()
        assert "MAIL FROM:<a@b.test> SIZE=9 BODY=8BITMIME" in bench.peer.commands
        assert "RCPT TO:<c@xn--bcher-kva.test>" in bench.peer.commands
        bench.send(recipient="jösé@d.test")
        (result,) = await bench.results("failure")
        assert (result["code"], result["status"]) == (553, "5.6.7")


async def test_a_null_sender_is_a_null_sender() -> None:
    async with open_bench() as bench:
        bench.send(envelope=None)
        bench.send(envelope="")
        await bench.results(count=2)
        assert [mail.envelope for mail in bench.peer.mails] == ["", ""]


async def test_a_bare_line_feed_arrives_as_crlf() -> None:
    async with open_bench() as bench:
        bench.send(body="a\n.\nb\r\n.\r")
        await bench.results()
        assert bench.peer.mails[0].body == b"a\r\n.\r\nb\r\n.\r\n"


async def test_the_smarthost_of_a_message_comes_before_its_domain() -> None:
    async with open_bench(resolver=StubResolver()) as bench:
        bench.send(smarthost={"hostname": "127.0.0.1", "port": str(bench.port)})
        bench.send(smarthost={"name": "127.0.0.1", "port": bench.port}, recipient="e@f.test")
        await bench.results(count=2)
        assert {mail.recipient for mail in bench.peer.mails} == {"c@d.test", "e@f.test"}


async def test_domains_have_queues_of_their_own_also_with_a_sink() -> None:
    async with open_bench(domain_maxconnections=1) as bench:
        bench.send(recipient="c@one.test")
        bench.send(recipient="c@two.test")
        await bench.results(count=2)
        assert bench.peer.connections == 2


async def test_a_smarthost_makes_one_queue_of_all_domains() -> None:
    async with open_bench(smarthost="smart.test", domain_maxconnections=1) as bench:
        bench.send(recipient="c@one.test")
        bench.send(recipient="c@two.test")
        await bench.results(count=2)
        assert bench.peer.connections == 1


async def test_an_unknown_domain_is_tried_again_and_a_null_mx_is_not() -> None:
    null = NoHosts("", Reply(556, "5.1.10 no mail here"))
    async with open_bench(resolver=StubResolver(null_test=null)) as bench:
        bench.send(recipient="c@unknown.test")
        result = await bench.retried()
        assert (result["type"], result["state"], result["result"]) == ("nohosts", "dns", "error")
        bench.send(recipient="c@null.test")
        (result,) = await bench.results("failure")
        assert (result["code"], result["status"]) == (556, "5.1.10")


async def test_the_send_log_has_one_line_for_each_attempt(tmp_path: Path) -> None:
    path = tmp_path / "send.log"
    send_log = LogFile(str(path), clock=lambda: NOW)
    async with open_bench(send_log=send_log) as bench:
        bench.peer.answers["RCPT", ""] = ["550 5.1.1 bad\x1b[31m\x00"]
        bench.send(tags=["spring", "sale\n[fake]"])
        await bench.results()
        bench.send(recipient="e@d.test")
        await bench.results("success")
    send_log.close()
    assert path.read_text().splitlines() == [
        "[2026-01-01 12:00:00] rcpt to:error 1 <a@b.test> <c@d.test> [127.0.0.1] [127.0.0.1]"
        " spring,sale\\x0a\\x5bfake\\x5d 550 5.1.1 bad?[31m?",
        "[2026-01-01 12:00:00] accept:accepted 1 <a@b.test> <e@d.test> [127.0.0.1] [127.0.0.1]"
        "  250 2.0.0 taken",
    ]


SEND_LINE = re.compile(
    r"(?P<state>[a-z ]+):(?P<result>[a-z]+) (?P<attempt>\d+)"
    r" <(?P<envelope>[^ ]*)> <(?P<recipient>[^ ]*)> \[(?P<local>[^ ]*)\] \[(?P<remote>[^ ]*)\]"
    r" (?P<tags>[^ ]*) (?P<code>\d*) (?P<status>[\d.]*) (?P<description>.*)"
)
"""The reading of a send log line as docs/operations.md describes it."""

LOGGED = st.text(st.characters() | st.sampled_from(" ,<>[]\\\n"), max_size=20)


@given(LOGGED, LOGGED, st.lists(LOGGED.filter(bool)), LOGGED)
def test_nobody_can_forge_a_field_of_the_send_log(
    envelope: str, recipient: str, tags: list[str], description: str
) -> None:
    message = Message({"envelope": envelope, "recipient": recipient, "tags": tags})
    result = Result(
        attempt=3,
        type="error",
        state="rcpt to",
        result="error",
        time="2026-01-01 12:00:00",
        code=550,
        status="5.1.1",
        description=description,
    )
    match = SEND_LINE.fullmatch(_log_line(message, result))
    assert match is not None
    read = {name: unescape(text) for name, text in match.groupdict().items()}
    assert (read["envelope"], read["recipient"]) == (envelope, recipient)
    assert list(map(unescape, filter(None, match["tags"].split(",")))) == tags
    assert read["description"] == description
    assert (read["state"], read["attempt"], read["code"]) == ("rcpt to", "3", "550")


async def test_statistics_count_what_happened() -> None:
    async with open_bench() as bench:
        bench.peer.answers["RCPT", ""] = ["450 no", "550 no"]
        for _ in range(3):
            bench.send()
        await bench.queues.until(lambda queues: sum(queues.groups) == 3)
        figures = bench.dispatcher.statistics()
        assert figures["attempts"] == figures["consumed"] == 3
        assert (figures["delivered"], figures["failed"], figures["retried"]) == (1, 1, 1)
        assert figures["opened"] == bench.peer.connections
        assert figures["waiting"] == 0
        assert msgspec.json.encode(figures)


async def test_deliveries_that_are_stopped_before_they_run_take_nothing() -> None:
    async with open_bench() as bench:
        first = bench.dispatcher
        await first.stop(0)
        await trio.testing.wait_all_tasks_blocked()
        dispatcher = Dispatcher(
            first._live,
            bench.queues,
            first.worker,
            plugins=first._plugins,
            resolver=StubResolver(),  # type: ignore[arg-type]
            openings=first.openings,
            limits=first.limits,
        )
        bench.send()
        await dispatcher.stop(0)
        with trio.fail_after(60):
            await dispatcher.run()
        assert dispatcher.is_over
        assert bench.queues["outbox"]
        assert not bench.queues.leased
