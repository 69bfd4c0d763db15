"""Orders of operators while an engine delivers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from mailerq import Engine
from mailerq.cli import control, main
from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.outbound.kit import Peer, PeerConnection
from tests.support import DEADLINE, Sink, configure, in_thread, open_sink, until_found

LATER = Reply(450, "4.2.0 not now")
BUSY = Reply(421, "4.3.2 not now")


@asynccontextmanager
async def delivering(tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[Engine, Sink]]:
    async with open_sink() as sink:
        config = configure(
            tmp_path,
            smtp_sink_address="127.0.0.1",
            smtp_sink_port=sink.port,
            retry_interval=(3600,),
            **settings,
        )
        async with Engine(config) as engine:
            yield engine, sink


class Commands:
    """``mailerq queue`` against a running engine."""

    def __init__(self, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
        self._directory = engine.config.queue_directory
        self._capsys = capsys

    async def __call__(self, *words: str, status: int = 0) -> Any:
        arguments = ["queue", *words, "--json", f"--queue-directory={self._directory}"]
        self._capsys.readouterr()
        assert await in_thread(main, arguments) == status
        lines = self._capsys.readouterr().out.splitlines()
        return [json.loads(line) for line in lines]


def mail(name: str, **more: Any) -> dict[str, Any]:
    return {
        "envelope": "a@b.test",
        "recipient": f"{name}@d.test",
        "mime": f"Subject: {name}\r\n\r\nhello\r\n",
        **more,
    }


def names(sink: Sink) -> list[str]:
    return [each.recipients[0].partition("@")[0] for each in sink.mails]


async def put_off(engine: Engine, sink: Sink, *wanted: str) -> None:
    """Have a first attempt of messages fail."""
    sink.decide = lambda event: LATER if isinstance(event, server.Mail) else None
    for name in wanted:
        await engine.publish(mail(name))

    await tried(engine, len(wanted))
    sink.decide = lambda event: None


async def tried(engine: Engine, count: int) -> None:
    """Wait until this many attempts have failed, and no message is under way."""

    async def figures() -> tuple[int, int]:
        found = engine.statistics()
        return found["outgoing"]["retried"], found["queue"]["leased"].get("outbox", 0)

    await until_found(figures, lambda found: found[0] >= count and found[1] == 0)


async def settled(engine: Engine, delivered: int) -> None:
    """Wait until so many messages are delivered, and no more is under way."""

    async def figures() -> tuple[int, int]:
        found = engine.statistics()
        return found["outgoing"]["delivered"], found["queue"]["leased"].get("outbox", 0)

    await until_found(figures, lambda found: found == (delivered, 0))


class Holding:
    """A peer that takes one mail and says nothing until it may go on."""

    def __init__(self) -> None:
        self.begun, self.go = trio.Event(), trio.Event()
        self.taken: list[str] = []

    async def play(self, peer: PeerConnection) -> None:
        await peer.hello()
        recipient = ""
        while line := await peer.line():
            if line.startswith("RCPT"):
                recipient = line.partition("<")[2].partition("@")[0]
            if line != "DATA":
                await peer.send("221 bye\r\n" if line == "QUIT" else "250 ok\r\n")
                continue
            await peer.send("354 go\r\n")
            await peer.body()
            self.begun.set()
            await self.go.wait()
            self.taken.append(recipient)
            await peer.send("250 taken\r\n")


@asynccontextmanager
async def holding(tmp_path: Path) -> AsyncIterator[tuple[Engine, Holding]]:
    """An engine whose one connection is in the middle of a mail; twenty others wait in memory."""
    script = Holding()
    nobody: Any = SimpleNamespace(touch=lambda: None)
    peer = Peer(nobody, [script.play], extensions=())
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, peer.handle, 0, host="127.0.0.1"))
        config = configure(
            tmp_path,
            smtp_sink_address="127.0.0.1",
            smtp_sink_port=listeners[0].socket.getsockname()[1],
            domain_maxconnections=1,
        )
        async with Engine(config) as engine:
            await engine.publish(mail("first"))
            await script.begun.wait()
            for number in range(20):
                await engine.publish(mail(f"m{number}"))

            async def leased() -> int:
                return int(engine.statistics()["queue"]["leased"]["outbox"])

            await until_found(leased, lambda count: count == 21)
            yield engine, script
        nursery.cancel_scope.cancel()


async def test_held_mail_stays_over_a_flush_and_a_restart_until_it_is_released(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with delivering(tmp_path) as (engine, sink):
        command = Commands(engine, capsys)
        await put_off(engine, sink, "ann", "bob")
        (done,) = await command("hold", "--recipient=ann@*")
        assert (done["selected"], done["done"], done["under_way"]) == (1, 1, 0)
        await command("flush")
        await sink.wait_for(1)
        assert names(sink) == ["bob"]
    async with delivering(tmp_path) as (engine, sink):
        command = Commands(engine, capsys)
        await engine.publish(mail("carl"))
        await sink.wait_for(1)
        await settled(engine, 1)
        (rows,) = await command("list")
        (depth,) = [row for row in rows if row["queue"] == "outbox"]
        assert (depth["due"], depth["delayed"], depth["held"]) == (0, 0, 1)
        (entry,) = await command("show")
        assert entry["held"]
        assert (await command("release", "--all"))[0]["done"] == 1
        await command("retry", "--all")
        await sink.wait_for(2)
        assert names(sink) == ["carl", "ann"]


async def test_what_waits_in_memory_is_deleted_and_what_is_under_way_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with holding(tmp_path) as (engine, peer):
        command = Commands(engine, capsys)
        (done,) = await command("delete", "--all", "--yes")
        assert (done["selected"], done["done"], done["under_way"]) == (21, 20, 1)
        peer.go.set()
        await settled(engine, 1)
        assert peer.taken == ["first"]
        assert await command("show") == []


async def test_what_waits_in_memory_is_held_and_goes_out_after_its_release(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with holding(tmp_path) as (engine, peer):
        command = Commands(engine, capsys)
        (done,) = await command("hold", "--all")
        assert (done["done"], done["under_way"]) == (20, 1)
        peer.go.set()
        await settled(engine, 1)
        (done,) = await command("release", "--all")
        assert done["done"] == 20
        await settled(engine, 21)
        assert sorted(peer.taken) == sorted(["first", *(f"m{number}" for number in range(20))])
        assert len(peer.taken) == 21


async def test_a_bounce_has_the_results_of_any_failure_and_says_who_did_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "send.log"
    caplog.set_level("INFO")
    settings = {"send_log_file": str(log), "rabbitmq_results": "results"}
    async with delivering(tmp_path, **settings) as (engine, sink):
        command = Commands(engine, capsys)
        await put_off(engine, sink, "ann", "bob")
        async with engine.consume("results") as results:
            options = ("--recipient=ann@d.test", "--reason=spam run", "--yes")
            ((done),) = await command("bounce", *options)
            assert done["done"] == 1
            with trio.fail_after(DEADLINE):
                lease = await results.receive()
            *_, result = lease.message.results
            assert (result["attempt"], result["type"], result["code"]) == (2, "error", 554)
            assert result["description"].startswith("bounced by ")
            assert result["description"].endswith(": spam run")
        (document,) = await command("read", "failure")
        assert document["recipient"] == "ann@d.test"
        assert engine.statistics()["outgoing"]["failed"] == 1
        assert [entry["recipient"] for entry in await command("show")] == ["bob@d.test"]
    assert "spam run" in log.read_text().splitlines()[-1]
    lines = [record.getMessage() for record in caplog.records if "bounce in" in record.getMessage()]
    assert "1 messages (recipient ann@d.test); reason: spam run" in lines[0]
    assert "1 of 1 messages were bounced" in lines[1]


async def test_rerouted_mail_goes_to_the_other_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with open_sink() as other, open_sink() as first:
        config = configure(
            tmp_path,
            smarthost="127.0.0.1",
            smarthost_port=first.port,
            retry_interval=(3600,),
            smtp_out_forbidden=(),
        )
        async with Engine(config) as engine:
            command = Commands(engine, capsys)
            await put_off(engine, first, "ann", "bob")
            via = f"--via=127.0.0.1:{other.port}"
            (done,) = await command("reroute", "--recipient=ann@d.test", via)
            assert done["done"] == 1
            await command("retry", "--all")
            await other.wait_for(1)
            await first.wait_for(1)
            assert names(other) == ["ann"]
            assert names(first) == ["bob"]


async def test_mail_behind_deleted_mail_that_waited_for_a_limit_goes_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text('[[limit]]\ndomain = "slow.test"\nmessages-per-minute = 60\n')
    async with delivering(tmp_path, limits_file=str(limits)) as (engine, sink):
        command = Commands(engine, capsys)
        async with trio.open_nursery() as nursery:  # few writes: the limit frees one each second
            for number in range(30):
                one = mail(f"m{number}", recipient=f"m{number}@slow.test")
                nursery.start_soon(engine.publish, one)
        await sink.wait_for(1)
        (done,) = await command("delete", "--all", "--yes")
        assert done["done"] >= 20
        # What was delivered in between is neither.
        left = done["selected"] - done["done"] - done["under_way"]
        assert 0 <= left <= len(sink.mails)
        await engine.publish(mail("last", recipient="last@slow.test"))
        while "last" not in names(sink):
            await sink.wait_for(len(sink.mails) + 1)
        assert len(sink.mails) <= 30 + 1 - done["done"]
        await settled(engine, len(sink.mails))


async def test_a_retry_asks_a_host_that_was_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with delivering(tmp_path) as (engine, sink):
        command = Commands(engine, capsys)
        sink.decide = lambda event: BUSY if isinstance(event, server.Hello) else None
        await engine.publish(mail("ann"))
        await engine.publish(mail("bob"))

        await tried(engine, 1)
        sink.decide = lambda event: None
        (done,) = await command("retry", "--all")
        assert done["done"] >= 1
        await sink.wait_for(2)


async def test_a_request_that_is_not_valid_is_refused(tmp_path: Path) -> None:
    async with delivering(tmp_path) as (engine, _):
        directory = engine.config.queue_directory
        request = {"share": 0, "queue": "outbox", "numbers": [1], "order": {"action": "hold"}}

        async def ask(**changes: Any) -> dict[str, Any]:
            arguments = {**request, **changes}
            return await in_thread(partial(control.ask, directory, "queue-change", **arguments))

        assert await ask() == {"done": 0, "leased": 0}
        assert await ask(share=7) == {}
        for changes in (
            {"numbers": "all"},
            {"numbers": [*range(2001)]},
            {"order": {"action": "burn"}},
            {"order": {"action": "reroute", "to_queue": "a\0b"}},
        ):
            assert "error" in await ask(**changes)
