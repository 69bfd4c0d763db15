"""Results: what the result queues get, and what happens if a result cannot be written."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from mailerq.outbound import settlement as delivery
from mailerq.queues import DAMAGED_QUEUE, Settlement
from tests.outbound.kit import StubResolver, open_bench
from tests.outbound.memory_queues import MemoryQueues


def settled(count: int) -> Any:
    return lambda queues: sum(queues.groups) == count and not queues.leased


async def test_a_result_that_cannot_be_written_keeps_neither_its_lease_nor_other_results() -> None:
    def object_to(settlement: Settlement) -> Exception | None:
        bad = settlement.lease.message.recipient == "bad@d.test" and settlement.publications
        return RuntimeError("not this one") if bad else None

    async with open_bench(rabbitmq_qos=3) as bench:
        bench.queues.object_to = object_to
        bench.queues.may_ack = trio.Event()
        for number in range(20):
            bench.send("bad@d.test" if number % 5 == 1 else f"c{number}@d.test")
        await bench.queues.until(lambda queues: len(queues.leased) == 3)
        bench.queues.may_ack.set()
        await bench.queues.until(settled(20))
        assert len(bench.peer.mails) == 20
        for queue in ("results", "success"):
            assert len(bench.queues[queue]) == 16
        assert all(queue == [] for queue in (bench.queues["outbox"], bench.queues["damaged"]))


async def test_the_documents_that_can_be_written_are(caplog: pytest.LogCaptureFixture) -> None:
    async with open_bench() as bench:
        bench.queues.impossible = {"results", "retry"}
        bench.send()
        await bench.results("success")
        bench.peer.answers["RCPT", ""] = ["450 no"]
        bench.send("e@d.test")
        await bench.queues.until(settled(2))
        ((due, message),) = bench.queues.queues["outbox"]
        assert due > bench.queues.now
        assert len(message.results) == 1
    lines = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert lines == [
        "message 1: results is impossible; 1 of 2 documents about it were written, to success",
        "message 3: retry is impossible; 1 of 2 documents about it were written, to outbox",
    ]
    caplog.clear()


async def test_a_message_that_cannot_go_round_again_is_set_aside_with_its_body() -> None:
    async with open_bench() as bench:
        bench.queues.impossible = {"outbox"}
        bench.peer.answers["RCPT", ""] = ["450 no"]
        deep: list[Any] = []
        for _ in range(300):
            deep = [deep]
        bench.send(custom=1, bad={"x": object()}, worse="\ud800", deep=deep)
        await bench.queues.until(settled(1))
        (message,) = bench.queues[DAMAGED_QUEUE]
        assert message.body == b"hi\r\n"
        properties = message.properties
        assert (properties["recipient"], properties["custom"]) == ("c@d.test", 1)
        assert properties["damaged"] == {"reason": "outbox is impossible"}
        assert "object object" in properties["bad"]
        assert properties["worse"] == r"'\ud800'"
        assert properties["deep"].startswith("[[[")
        assert bench.queues["outbox"] == []


async def test_what_cannot_be_settled_at_all_is_tried_later_and_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(delivery, "MAX_BACKOFF_SECONDS", 0.01)
    objections = 50

    def object_to(settlement: Settlement) -> Exception | None:
        nonlocal objections
        if objections and settlement.lease.message.recipient.startswith("bad"):
            objections -= 1
            return RuntimeError("never")
        return None

    async with open_bench() as bench:
        bench.queues.object_to = object_to
        for name in ("bad1", "bad2", "bad3", "good"):
            bench.send(f"{name}@d.test")
        await bench.queues.until(settled(4))
        assert objections == 0
        assert len(bench.peer.mails) == 4
        assert bench.queues[DAMAGED_QUEUE] == []
    assert "cannot be settled, trying later" in caplog.text
    caplog.clear()


async def test_a_copy_of_a_retry_leaves_a_large_mail_whole() -> None:
    """A refused connection ends an attempt before the body is loaded; a copy asks for the body."""
    resolver = StubResolver(d_test=["127.0.0.1"])
    async with open_bench(resolver=resolver, smtp_out_port=1, smtp_out_forbidden=()) as bench:
        body = "Subject: x\r\n\r\n" + "x" * 200_000
        bench.send(body=body, keepmime=True)
        await bench.queues.until(lambda queues: len(queues["retry"]) == 1 and not queues.leased)
        assert bench.queues["retry"][0].body == body.encode()
        ((_, message),) = bench.queues.queues["outbox"]
        assert message.body == body.encode()


async def test_a_lease_that_is_over_is_left_alone() -> None:
    def forget(queues: MemoryQueues) -> Any:
        def object_to(settlement: Settlement) -> Exception | None:
            queues.leased.clear()
            return ValueError("the lease is over")

        return object_to

    async with open_bench() as bench:
        bench.queues.object_to = forget(bench.queues)
        bench.send()
        await bench.queues.until(lambda queues: not queues.leased and bool(bench.peer.mails))
    assert bench.dispatcher.statistics()["unsettled"] == 0


@pytest.mark.parametrize("kind", ["results", "success", "failure", "retry", "any"])
async def test_a_result_queue_that_is_the_outbox_makes_a_message_fail(kind: str) -> None:
    async with open_bench() as bench:
        bench.send(queues={kind: "outbox"}, keepmime=True)
        (result,) = await bench.results("failure")
        assert (result["state"], result["result"]) == ("process", "invalid")
        assert result["description"].startswith("property queues: outbox is the outbox")
        assert len(bench.queues["results"]) == 1
        assert bench.queues["outbox"] == []
        assert bench.peer.connections == 0


@pytest.mark.parametrize("name", ["a" * 256, "ü" * 128, "a\0b", "a\nb", "\u202e"])
async def test_a_queue_name_that_no_queue_can_have_makes_a_message_fail(name: str) -> None:
    async with open_bench() as bench:
        bench.send(queues={"success": name})
        (result,) = await bench.results("failure")
        assert result["description"].startswith("property queues: the name for 'success' ")
        assert bench.peer.connections == 0


async def test_each_final_failure_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with open_bench(rabbitmq_results="") as bench:
        bench.peer.answers["RCPT", "c@d.test"] = ["550 5.1.1 no such user"]
        bench.send(**{"message-id": "one"})
        await bench.results("failure")
        bench.peer.answers["RCPT", "e@d.test"] = ["450 4.2.0 busy"] * 2
        bench.send("e@d.test", maxattempts=1, queues={"failure": None}, **{"message-id": "two"})
        await bench.queues.until(settled(2))
        bench.send("e@d.test", **{"message-id": "three"})
        await bench.retried()
        bench.send("good@d.test")
        await bench.results("success")
        bench.send("x" * 1000, **{"message-id": "four"})
        await bench.results("failure", 2)
    *lines, last = caplog.messages
    assert lines == [
        "message one from <a@b.test> to <c@d.test> has failed: 127.0.0.1: 550 5.1.1 no such user;"
        " 'mailerq queue read failure' has its report",
        "message two from <a@b.test> to <e@d.test> has failed: 127.0.0.1: 450 4.2.0 busy;"
        " no queue gets a report of it, see rabbitmq-failure",
    ]
    assert last.startswith(f"message four from <a@b.test> to <{300 * 'x'}> has failed: 553 5.1.3 ")


async def test_many_failures_are_a_few_lines_and_their_count(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(delivery, "FAILURES_PER_MINUTE", 3)
    async with open_bench() as bench:
        bench.peer.answers["RCPT", ""] = ["550 no"] * 10
        for _ in range(10):
            bench.send()
        await bench.results("failure", 10)
    assert len(caplog.messages) == 4
    assert caplog.messages[-1] == "and 7 messages more have failed"


@pytest.mark.parametrize(("named", "body"), [(None, None), ("failure", b"hi\r\n")])
async def test_a_failure_queue_that_nobody_has_named_gets_no_body(
    named: str | None, body: bytes | None
) -> None:
    async with open_bench(rabbitmq_failure=named) as bench:
        bench.peer.answers["RCPT", ""] = ["550 no"]
        bench.send(keepmime=True)
        await bench.results("failure")
        assert bench.queues["failure"][0].body == body
        assert bench.queues["results"][0].body == b"hi\r\n"
