"""Pages of flows, and what limits each flow, with a whole dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from mailerq.errors import MailerqError
from mailerq.outbound.flow import Flow
from mailerq.outbound.listing import STEP, Wanted, list_flows
from mailerq.outbound.sites import Site
from mailerq.rules.routes import Route
from tests.outbound.kit import Bench, PeerConnection, StubResolver, open_bench


def add_flows(bench: Bench, count: int) -> None:
    """Flows without mail, as if each had something to do."""
    for number in range(count):
        name = f"d{number}.test"
        site = Site(name.encode(), Route(name, name, 25, True))
        flow = site.flows[None, ()] = Flow(bench.dispatcher, site, None)
        bench.dispatcher.flows.live[flow] = None


def wanted(**request: Any) -> Wanted:
    return Wanted.of({"limit": 10, **request})


async def page(bench: Bench, **request: Any) -> dict[str, Any]:
    return await list_flows(bench.dispatcher.seeing, wanted(**request))


async def test_the_loop_goes_on_while_many_flows_are_looked_at() -> None:
    async with open_bench() as bench:
        add_flows(bench, 20_000)
        turns = 0
        found: dict[str, Any] = {}

        async def count() -> None:
            nonlocal turns
            while not found:
                turns += 1
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            found = await page(bench, sort="name")
        assert turns >= 20_000 // STEP - 1  # the first of them begins beside the look
        assert [row["site"] for row in found["rows"]] == sorted(
            f"d{number}.test" for number in range(20_000)
        )[:10]
        assert (found["flows"], found["matching"]) == (20_000, 20_000)


async def test_a_page_has_the_first_of_an_order_and_what_is_asked_for_by_name() -> None:
    async def stall(peer: PeerConnection) -> None:
        await peer.hello()
        while await peer.line():
            pass

    async with open_bench(stall) as bench:
        peer = bench.peer
        add_flows(bench, 5)
        bench.send("c@busy.test")
        await bench.queues.until(lambda queues: any("RCPT" in line for line in peer.commands))
        for sort in ("waiting", "memory", "connections", "rate"):
            found = await page(bench, sort=sort, limit=1)
            (row,) = found["rows"]
            assert (row["site"], row["memory"], row["connections"]) == ("busy.test", 1, 1)
            assert row["limited-by"] == "the replies of the host"
        found = await page(bench, sort="name", limit=1, keys=["busy.test", "no.test"])
        assert [(row["site"], row["kind"]) for row in found["rows"]] == [
            ("no.test", "mail"),
            ("busy.test", "flow"),
        ]
        assert (await page(bench, filter="D3."))["matching"] == 1


async def test_a_site_that_is_down_keeps_the_words_of_its_host() -> None:
    resolver = StubResolver(d_test=["127.0.0.1"])

    async def refuse(peer: PeerConnection) -> None:
        await peer.send("554 5.7.1 not from you\r\n")

    async with open_bench(refuse, resolver=resolver, smtp_out_forbidden=()) as bench:
        bench.send("c@d.test")
        await bench.retried()
        await bench.until(lambda figures: bool(bench.dispatcher.flows.pauses))
        (row,) = (await page(bench))["rows"]
        assert (row["kind"], row["site"]) == ("down", "d.test")
        assert row["limited-by"] == "no host let us in, once; then one message asks"
        assert row["reply"] == "127.0.0.1: 554 5.7.1 not from you"
        assert 0 < row["seconds"] <= 30
        # The flow that asks next still knows.
        await bench.pass_time(700)
        await bench.results()
        (row,) = (await page(bench))["rows"]
        assert (row["kind"], row["messages"]) == ("flow", 1)
        assert row["reply"] == "127.0.0.1: 250 2.0.0 taken"


@pytest.mark.parametrize(
    "request_",
    [
        {"sort": "nothing"},
        {"sort": 3},
        {"limit": 0},
        {"limit": "10"},
        {"filter": "x" * 1000},
        {"keys": ["x"] * 1000},
    ],
)
def test_a_request_that_asks_for_too_much_is_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(MailerqError):
        wanted(**request_)
