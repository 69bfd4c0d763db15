"""Failures of one mail wait for each other, and share a report; nothing else waits for them."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.outbound.kit import Bench, StubResolver, open_bench
from tests.outbound.test_bounces import BODY, fields, mails, received, reports, told

LONG = 10.0
"""Seconds in which a test has done its work: the report comes when the delivery is stopped."""


async def stopped(bench: Bench) -> None:
    """End deliveries as a daemon that stops does."""
    await bench.dispatcher.stop(LONG)
    assert not bench.queues.leased


async def test_recipients_of_one_mail_share_one_report_whatever_batch_they_fail_in() -> None:
    async with open_bench(rabbitmq_dsn="dsn", dsn_wait=LONG) as bench:
        bench.peer.answers["RCPT", ""] = ["550 no"] * 30
        for number in range(20):
            bench.send(f"c{number}@d.test", **received(), body=BODY)
            await bench.until(lambda figures, count=number: figures["failed"] == count + 1)  # type: ignore[misc]
        bench.send("other@d.test", **received(dsn={"envid": "e2"}), body=BODY)
        bench.send("mail@d.test", **received(), body="Subject: other\r\n\r\n")
        await bench.until(lambda figures: figures["failed"] == 22)
        assert bench.dispatcher.statistics()["unsettled"] == len(bench.queues.leased) == 22
        assert bench.queues["dsn"] == bench.queues["failure"] == []
        await stopped(bench)
        assert len(bench.queues["dsn"]) == 3
        assert len(bench.queues["failure"]) == len(set(told(bench))) == 22


async def test_recipients_at_hosts_that_answer_at_different_times_share_a_report() -> None:
    resolver = StubResolver(d_test=["127.0.0.1"], e_test=["127.0.0.1"])
    options: dict[str, Any] = {"resolver": resolver, "smtp_out_forbidden": ()}
    async with open_bench(rabbitmq_dsn="dsn", dsn_wait=LONG, **options) as bench:
        bench.peer.answers["RCPT", ""] = ["550 no"] * 2
        bench.send("c@d.test", **received(), body=BODY)
        await bench.until(lambda figures: figures["failed"] == 1)
        bench.send("c@e.test", **received(), body=BODY)
        await bench.until(lambda figures: figures["failed"] == 2)
        await stopped(bench)
        assert len(bench.queues["dsn"]) == 1
        assert sorted(told(bench)) == ["c@d.test", "c@e.test"]


async def test_a_failure_waits_only_for_its_time() -> None:
    async with open_bench(rabbitmq_dsn="dsn", dsn_wait=0.3) as bench:
        bench.peer.answers["RCPT", ""] = ["550 no"] * 2
        began = trio.current_time()
        bench.send(**received(), body=BODY)
        await reports(bench)
        assert trio.current_time() - began >= 0.3
        bench.send(**received(), body=BODY)
        await reports(bench, 2)
        assert trio.current_time() - began >= 0.6


async def test_the_session_goes_on_and_the_next_mail_is_safe_at_once() -> None:
    async with open_bench(rabbitmq_dsn="dsn", dsn_wait=LONG, domain_maxconnections=1) as bench:
        bench.peer.answers["RCPT", "gone@d.test"] = ["550 no"]
        bench.send("gone@d.test", **received(), body=BODY)
        bench.send("c@d.test", **received(), body=BODY)
        await bench.until(lambda figures: figures["delivered"] == figures["unsettled"] == 1)
        assert len(bench.queues["success"]) == len(bench.queues.leased) == 1
        assert (len(mails(bench)), bench.peer.connections) == (1, 1)
        assert [each.held for each in bench.dispatcher.flows.live] == [0]
        assert bench.queues["dsn"] == []
        await stopped(bench)
        assert told(bench) == ["gone@d.test"]


async def test_a_failure_without_a_report_does_not_wait() -> None:
    async with open_bench(dsn_wait=LONG) as bench:
        bench.peer.answers["RCPT", ""] = ["550 no"]
        bench.send(body=BODY)
        await bench.results("failure")
        await bench.queues.until(lambda queues: not queues.leased)


@pytest.mark.parametrize(
    ("options", "recipients", "size"), [({"rabbitmq_qos": 16}, 4, 10), ({}, 3, 6 << 20)]
)
async def test_few_messages_are_held(options: dict[str, Any], recipients: int, size: int) -> None:
    """A quarter of the messages in memory, and 16 MB of mail."""
    async with open_bench(rabbitmq_dsn="dsn", dsn_wait=LONG, **options) as bench:
        bench.peer.answers["RCPT", ""] = ["550 no"] * recipients
        body = BODY + "x" * 70 + "\r\n" + ("y" * 70 + "\r\n") * (size // 72)
        for number in range(recipients):
            assert bench.queues["dsn"] == []
            bench.send(f"c{number}@d.test", **received(), body=body)
            await bench.until(lambda figures, count=number: figures["failed"] == count + 1)  # type: ignore[misc]
        (report,) = await reports(bench)
        assert [fields(report, n)["Final-Recipient"] for n in range(recipients)] == [
            f"rfc822; c{number}@d.test" for number in range(recipients)
        ]


async def test_a_crash_meanwhile_repeats_the_attempt() -> None:
    """Nothing about a failure is in the queue before its report is."""
    async with open_bench(rabbitmq_dsn="dsn", dsn_wait=LONG) as bench:
        bench.peer.answers["RCPT", ""] = ["550 no"]
        bench.send(**received(), body=BODY)
        await bench.until(lambda figures: figures["failed"] == 1)
        (lease,) = bench.queues.leased.values()
        assert "results" not in lease.message.properties
        assert not bench.queues.groups
        await stopped(bench)
        assert len(bench.queues.groups) == 1
        assert told(bench) == ["c@d.test"]
