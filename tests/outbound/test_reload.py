"""Settings that change between attempts, and while messages wait."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from mailerq.config import Config
from mailerq.live import Snapshot
from mailerq.net.logs import LogFile
from mailerq.net.resolver import Host, NoHosts
from mailerq.net.slots import Slots
from mailerq.rules import routes
from mailerq.rules.shaping import Shaping
from tests.outbound.kit import Bench, PeerConnection, StubResolver, open_bench
from tests.outbound.test_flows import listening, open_wide


def change(bench: Bench, *, reroute: bool = False, **settings: Any) -> None:
    live = bench.dispatcher._live
    config = live.current.config.replace(**settings)
    live.exchange(Snapshot(config, live.current.number + 1))
    bench.dispatcher.limits.change(Shaping.of(config))
    bench.dispatcher.reload(bench.dispatcher._settlements.send_log, reroute=reroute)


async def take_mail(peer: PeerConnection) -> None:
    """Read a mail, and leave the reply to its dot to the script."""
    for reply in ("250 ok", "250 ok", "354 go"):
        await peer.line()
        await peer.send(f"{reply}\r\n")
    await peer.body()


async def test_results_go_to_the_queues_that_are_set_when_they_are_known() -> None:
    async with open_bench() as bench:
        bench.send()
        await bench.results("results")
        change(bench, rabbitmq_results="others", rabbitmq_success="")
        bench.send()
        await bench.results("others")
        assert len(bench.queues["results"]) == len(bench.queues["success"]) == 1


async def test_a_message_is_tried_again_after_the_time_that_is_set_then() -> None:
    async def refuse(peer: PeerConnection) -> None:
        await peer.send("421 not now\r\n")

    async with open_bench(*[refuse] * 3) as bench:
        bench.send()
        await bench.results("retry", 1)
        change(bench, max_attempts=1)
        bench.send()
        await bench.pass_time(30)
        await bench.results("failure", 1)


async def test_a_shorter_timeout_holds_for_the_next_message_of_a_connection() -> None:
    reading, go = trio.Event(), trio.Event()

    async def slow_then_silent(peer: PeerConnection) -> None:
        await peer.hello()
        await take_mail(peer)
        reading.set()
        await go.wait()
        await peer.prove()
        await peer.line()
        await trio.sleep_forever()

    async with open_bench(slow_then_silent, smtp_out_timeout=20.0) as bench:
        bench.send()
        await reading.wait()
        change(bench, smtp_out_timeout=0.05)
        await trio.sleep(0.5)  # longer than the new one allows
        go.set()
        await bench.results("success", 1)
        bench.send()
        result = await bench.retried()
        assert "no reply in time" in result["description"]
        assert bench.peer.connections == 1


async def test_what_waits_for_a_connection_goes_where_the_settings_say_now() -> None:
    reading, go = trio.Event(), trio.Event()

    async def hold(peer: PeerConnection) -> None:
        reading.set()
        await go.wait()
        await peer.serve()

    settings: dict[str, Any] = {"domain_maxconnections": 1}
    async with open_bench(hold, **settings) as bench, open_bench() as other:
        for _ in range(5):
            bench.send()
        await reading.wait()
        change(bench, reroute=True, smtp_sink_port=other.port)
        with trio.fail_after(60):
            await bench.results("success", 5)
        assert len(other.peer.mails) == 5
        go.set()


async def test_a_message_under_way_ends_where_it_began() -> None:
    reading, go = trio.Event(), trio.Event()

    async def hold(peer: PeerConnection) -> None:
        await peer.hello()
        await take_mail(peer)
        reading.set()
        await go.wait()
        await peer.prove()

    async with open_bench(hold) as bench, open_bench() as other:
        bench.send()
        await reading.wait()
        change(bench, reroute=True, smtp_sink_port=other.port, max_delivertime=0)
        go.set()
        await bench.results("success", 1)
        assert not other.peer.mails


async def test_connections_above_a_lower_limit_end_after_their_message() -> None:
    slots = Slots(10)
    async with open_bench(domain_maxconnections=4, slots=slots) as bench:
        for lower in ("domain", "slots"):
            before = len(bench.queues["success"])
            for _ in range(200):
                bench.send()
            await bench.queues.until(lambda queues, n=before: len(queues["success"]) > n)
            if lower == "domain":
                change(bench, domain_maxconnections=2)
            else:
                change(bench, domain_maxconnections=10)
                slots.limit = 1
            await bench.queues.until(lambda queues, n=before: len(queues["success"]) == n + 200)
            bench.peer.most = bench.peer.open
            for _ in range(20):
                bench.send()
            await bench.queues.until(lambda queues, n=before: len(queues["success"]) == n + 220)
            assert bench.peer.open <= (2 if lower == "domain" else 1)


async def test_an_idle_connection_is_kept_as_long_as_is_set_now() -> None:
    async with open_bench(connection_maxidle=60_000.0) as bench:
        change(bench, connection_maxidle=0.0)
        bench.send()
        await bench.results("success")
        await bench.queues.until(lambda _: "QUIT" in bench.peer.commands)


async def test_the_send_log_may_begin_and_end(tmp_path: Any) -> None:
    path = tmp_path / "log"
    log = LogFile(str(path))
    async with open_bench() as bench:
        for number, send_log in enumerate((None, log, None), 1):
            bench.dispatcher.reload(send_log, reroute=False)
            bench.send()
            await bench.results("success", number) if number == 1 else None
            await bench.queues.until(lambda queues, n=number: len(queues["success"]) == n)
    log.close()
    assert path.read_text().count("<c@d.test>") == 1


def test_a_snapshot_has_the_queues_for_results() -> None:
    config = Config(rabbitmq_results="r", rabbitmq_retry="again")
    assert config.result_queues == {
        "results": "r",
        "success": "",
        "failure": "failure",
        "retry": "again",
    }
    assert config.report_queue == "failure"
    assert config.replace(rabbitmq_failure="failure").report_queue == ""


async def test_mail_that_asks_and_waits_for_a_slot_goes_after_a_reroute() -> None:
    async def refuse(peer: PeerConnection) -> None:
        await peer.send("421 not now\r\n")

    slots = Slots(1)
    async with open_bench(refuse, slots=slots) as bench:
        bench.send()
        await bench.retried()
        bench.send()
        await bench.until(lambda found: found["connections"] == 0)
        assert slots.take()
        bench.dispatcher.flush()
        await bench.until(lambda found: found["waiting"] == 1)
        change(bench, reroute=True)
        slots.release()
        await bench.results("success", 1)


async def test_more_connections_are_opened_at_once_when_more_may_be() -> None:
    go = trio.Event()

    async def slow(peer: PeerConnection) -> None:
        await peer.hello()
        await go.wait()

    async with open_bench(slow, domain_maxconnections=1) as bench:
        for _ in range(6):
            bench.send()
        await bench.until(lambda found: found["opened"] == 1)
        change(bench, domain_maxconnections=0)
        await bench.results("success", 5)


async def test_who_waits_for_a_slot_has_it_when_there_are_more() -> None:
    async def slow(stream: trio.SocketStream) -> None:
        await PeerConnection(bench.peer, stream, 99).hello()
        await trio.sleep_forever()

    slots = Slots(1)
    async with open_wide(slots=slots, smtp_out_timeout=60.0) as bench, listening(slow) as target:
        bench.send(smarthost=target)
        await bench.until(lambda found: found["opened"] == 1)
        bench.send("c@quick.test")
        await bench.until(lambda found: found["waiting"] == 1)
        slots.limit = 10
        change(bench)
        await bench.results("success", 1)


async def test_what_waits_for_a_name_goes_where_the_settings_say_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_answer = trio.Event()

    class Slow(StubResolver):
        async def mail_hosts(self, domain: str) -> tuple[Host, ...] | NoHosts:
            await may_answer.wait()
            return await super().mail_hosts(domain)

    async def refuse(peer: PeerConnection) -> None:
        await peer.send("554 this is the old host\r\n")

    async def serve(stream: trio.SocketStream) -> None:
        await PeerConnection(bench.peer, stream, 99).serve()

    resolver = Slow(d_test=["127.0.0.1"])
    async with open_bench(refuse, resolver=resolver) as bench, listening(serve) as target:
        monkeypatch.setattr(routes, "SMTP_PORT", bench.port)
        bench.send()
        await bench.until(lambda found: found["waiting"] == 1)
        change(bench, reroute=True, smtp_sink_address="127.0.0.1", smtp_sink_port=target["port"])
        may_answer.set()
        await bench.results("success", 1)
        assert bench.peer.connections == 0
        assert bench.dispatcher.statistics()["waiting"] == 0
