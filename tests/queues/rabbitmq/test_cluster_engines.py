"""Engines that share a broker: who is there, shared rows, limits of a shared address."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq import Config, Engine
from mailerq.clustering import member
from mailerq.message import Message
from mailerq.outbound.cells import Rate, SharedCells
from mailerq.queues.rabbitmq import topology
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.rules import cluster, leases
from mailerq.rules.rates import MINUTE, SLACK, cost
from tests.queues.rabbitmq.kit import Broker
from tests.queues.rabbitmq.test_broker_engine import into, on_broker
from tests.support import (
    DEADLINE,
    ROOT,
    Sink,
    configure,
    free_port,
    in_thread,
    mailerq,
    open_sink,
    send,
    until,
    until_found,
)

X, Y = "127.0.0.2", "127.0.0.3"
SECOND = 1_000_000_000


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of a second: what takes ten seconds takes two."""
    monkeypatch.setattr(leases, "LEASE", SECOND)
    monkeypatch.setattr(leases, "TAKEOVER", SECOND * 11 // 10)
    monkeypatch.setattr(leases, "STEP", SECOND // 10)
    monkeypatch.setattr(leases, "RETRY", SECOND // 5)
    monkeypatch.setattr(cluster, "SILENCE", SECOND)
    monkeypatch.setattr(member, "TICK_SECONDS", 0.1)


def uri(vhost: Address) -> str:
    return f"amqp://{vhost.user}:{vhost.password}@{vhost.host}:{vhost.port}/{vhost.vhost}"


def switches(config: Config) -> list[str]:
    """The settings that commands need to find an engine and its cluster."""
    return [
        f"--queue-directory={config.queue_directory}", "--plugin-directory=",
        f"--cluster-address={config.cluster_address or config.rabbitmq_address}",
        f"--hostname={config.hostname}", "--smtp-port=0",
    ]  # fmt: skip


def cluster_of(engine: Engine) -> dict[str, Any]:
    found: dict[str, Any] = engine.statistics()["cluster"]
    return found


@asynccontextmanager
async def engines(*configs: Config) -> AsyncIterator[list[Engine]]:
    """Engines that have heard of each other."""
    found: list[Engine] = []
    async with trio.open_nursery() as nursery:
        stop = trio.Event()

        async def run(config: Config, task_status: trio.TaskStatus[Engine]) -> None:
            async with Engine(config) as engine:
                task_status.started(engine)
                await stop.wait()

        for config in configs:
            found.append(await nursery.start(lambda task_status, c=config: run(c, task_status)))
        for engine in found:
            await until(lambda e=engine: cluster_of(e)["instances"] == len(configs))
        yield found
        stop.set()


def configs(tmp_path: Path, vhost: Address, count: int, **settings: Any) -> list[Config]:
    return [
        on_broker(tmp_path / name, vhost, **{"hostname": f"{name}.test", **settings})
        for name in "abc"[:count]
    ]


async def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return await in_thread(mailerq, *arguments)


# Who is there


async def test_the_instances_of_a_cluster_are_listed(tmp_path: Path, vhost: Address) -> None:
    made = configs(tmp_path, vhost, 3, smtp_default_ips=(X,))
    async with engines(*made):
        done = await run("cluster", "list", "--json", *switches(made[0]))
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert [each["hostname"] != "" for each in found] == [True] * 3
        assert {each["name"].partition(":")[0] for each in found} == {"a.test", "b.test", "c.test"}
        assert len({each["digest"] for each in found}) == 1
        assert all(each["ips"] == [X] for each in found)
        table = await run("--list-cluster", *switches(made[1]))
        assert table.returncode == 0
        assert len(table.stdout.splitlines()) == 4
        assert not table.stderr
        status = await run("status", "--cluster", "--json", *switches(made[1]))
        assert len(status.stdout.splitlines()) == 3


async def test_settings_that_differ_are_seen_in_the_list(tmp_path: Path, vhost: Address) -> None:
    made = configs(tmp_path, vhost, 2)
    made[1] = on_broker(tmp_path / "b", vhost, hostname="b.test", domain_maxmessages=7)
    async with engines(*made):
        done = await run("cluster", "list", *switches(made[0]))
        assert b"different settings" in done.stderr


async def test_a_list_without_a_broker_says_why(tmp_path: Path, vhost: Address) -> None:
    config = on_broker(tmp_path, vhost._replace(port=1))
    done = await run("cluster", "list", *switches(config))
    assert done.returncode == 69
    assert b"cannot be heard" in done.stderr
    assert b"sesame" not in done.stderr
    alone = await run("cluster", "list", "--plugin-directory=")
    assert alone.returncode == 78
    assert b"set cluster-address" in alone.stderr


# Rows


@pytest.mark.parametrize("embedded", [False, True], ids=["broker", "embedded queue"])
async def test_a_pause_reaches_the_others_within_a_second_and_survives(
    tmp_path: Path, vhost: Address, embedded: bool
) -> None:
    made = configs(tmp_path, vhost, 3)
    if embedded:
        made = [
            configure(tmp_path / f"e{name}", hostname=f"{name}.test", cluster_address=uri(vhost))
            for name in "abc"
        ]
    async with engines(*made) as found:
        done = await run(
            "pause", "add", "--domain", "d.test", "--cluster", "--json", *switches(made[0])
        )
        with trio.fail_after(1):
            await until(lambda: all(each.statistics()["rows"]["pauses"] for each in found))
        number = str(json.loads(done.stdout)["id"])
    async with engines(*made[1:]) as found:
        assert all(each.statistics()["rows"]["pauses"] == 1 for each in found)
        done = await run("pause", "remove", number, *switches(made[1]))
        assert done.returncode == 0
        with trio.fail_after(1):
            await until(lambda: not any(each.statistics()["rows"]["pauses"] for each in found))
    audit = (Path(made[2].queue_directory) / "rows.audit").read_text().splitlines()
    last = json.loads(audit[-1])
    assert last["server"] == made[1].instance
    assert (last["action"], last["who"] != "") == ("remove", True)
    # The first one was away, and hears of the end.
    async with engines(*made) as found:
        with trio.fail_after(20):
            await until(lambda: not any(each.statistics()["rows"]["pauses"] for each in found))


async def test_suppressions_and_forced_errors_are_shared_and_local_rows_stay(
    tmp_path: Path, vhost: Address
) -> None:
    made = configs(tmp_path, vhost, 2, cluster_rows=True)
    extra = [*switches(made[0]), "--cluster-rows=true"]
    names = tmp_path / "names"
    names.write_text("".join(f"u{number}@d.test\n" for number in range(2500)))
    async with engines(*made) as found:
        await run("suppress", "add", "--from-file", str(names), *extra)
        await run("error", "add", "--domain", "e.test", *extra)
        await run("pause", "add", "--domain", "f.test", "--local", *extra)
        expected = {"pauses": 0, "errors": 1, "suppressed": 2500}
        await until(lambda: found[1].statistics()["rows"] == expected)
        assert found[0].statistics()["rows"] == {**expected, "pauses": 1}
        await run("suppress", "remove", "u7@d.test", *switches(made[1]))
        for each in found:
            await until(lambda e=each: e.statistics()["rows"]["suppressed"] == 2499)
        listed = await run("suppress", "list", "u8@d.test", "--json", *switches(made[1]))
        assert json.loads(listed.stdout)["cluster"] is True


async def test_a_row_for_a_cluster_needs_one(tmp_path: Path) -> None:
    (tmp_path / "queue").mkdir()
    done = await run(
        "pause", "add", "--everything", "--cluster", f"--queue-directory={tmp_path / 'queue'}"
    )
    assert done.returncode == 65
    assert b"set cluster-address" in done.stderr


# Addresses


class Rights:
    """When the limits of all engines of a test let a mail go, by their clock.

    A mail comes later than that by what a busy machine takes.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[int] = []
        advance = SharedCells._advance

        def noted(cells: SharedCells, want: Rate, values: Any, now: int) -> None:
            if want.key.startswith("messages-per-minute"):
                self.taken.append(now)
            advance(cells, want, values, now)

        monkeypatch.setattr(SharedCells, "_advance", noted)

    def check(self, limit: int, sink: Sink) -> None:
        """No minute sees more than the limit, and no mail goes an interval too early."""
        assert len(self.taken) >= len(sink.mails)
        for index, begin in enumerate(self.taken):
            count = sum(begin <= when < begin + MINUTE for when in self.taken[index:])
            assert count <= limit
        distances = [b - a for a, b in zip(self.taken, self.taken[1:], strict=False)]
        assert min(distances) >= cost(1, limit) - SLACK, distances


async def publish(engine: Engine, count: int, **more: Any) -> None:
    for number in range(count):
        await engine.publish(
            Message(
                {"envelope": "a@b.test", "recipient": f"c{number}@d.test", **more},
                b"Subject: x\r\n\r\nhi\r\n",
            )
        )


async def test_two_instances_with_one_address_never_exceed_its_limit(
    tmp_path: Path, vhost: Address, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    limit = 240
    rights = Rights(monkeypatch)
    async with open_sink() as sink:
        made = configs(
            tmp_path, vhost, 2, **into(sink), smtp_default_ips=(X,), domain_maxmessages=limit
        )
        async with engines(*made) as found:
            for engine in found:
                await publish(engine, 12)
            await sink.wait_for(8)
            assert sum(cluster_of(each)["usable"] for each in found) == 1
            owner = next(each for each in found if cluster_of(each)["usable"])
            idle = next(each for each in found if each is not owner)
            done = await run(
                "explain",
                "c@d.test",
                *switches(idle.config),
                f"--smtp-default-ips={X}",
                "--smtp-sink-address=127.0.0.1",
                f"--smtp-sink-port={sink.port}",
            )
            assert b"another instance may send from 127.0.0.2" in done.stdout
            sent = sum(each.statistics()["outgoing"]["delivered"] for each in found)
            assert owner.statistics()["outgoing"]["delivered"] == sent
        rights.check(limit, sink)


async def test_the_limit_holds_over_a_change_of_the_owner(
    tmp_path: Path,
    vhost: Address,
    broker: Broker,
    monkeypatch: pytest.MonkeyPatch,
    quick: None,
) -> None:
    limit = 240
    rights = Rights(monkeypatch)
    async with open_sink() as sink:
        made = configs(
            tmp_path, vhost, 2, **into(sink), smtp_default_ips=(X,), domain_maxmessages=limit
        )
        async with engines(*made) as found:
            for engine in found:
                await publish(engine, 80)
            # A new owner waits for the lease of the old one, and mail without an owner ten seconds.
            await sink.wait_for(3)
            for _ in range(2):
                await in_thread(broker.close_connections)
                await sink.wait_for(len(sink.mails) + 3)
        rights.check(limit, sink)


async def test_mail_goes_on_without_the_exchange_and_the_log_says_so_once(
    tmp_path: Path, vhost: Address, caplog: pytest.LogCaptureFixture, quick: None
) -> None:
    async with open_sink() as sink:
        config = configure(
            tmp_path,
            cluster_address=uri(vhost._replace(port=1)),
            smtp_default_ips=(X,),
            **into(sink),
        )
        async with Engine(config) as engine:
            await publish(engine, 3)
            await sink.wait_for(3)
            await trio.sleep(1)
            assert cluster_of(engine)["connected"] == 0
    lost = [each for each in caplog.records if "cannot be heard" in each.getMessage()]
    assert len(lost) == 1
    assert "sesame" not in caplog.text


async def test_another_daemon_takes_over_from_one_that_is_killed(
    tmp_path: Path, vhost: Address
) -> None:
    """With real times: the silence of the old owner, then the lease of the new one."""
    async with open_sink() as sink:
        settings = {**into(sink), "smtp_default_ips": (X,)}
        (config,) = configs(tmp_path, vhost, 1, **settings)
        directory = tmp_path / "daemon"
        directory.mkdir()
        arguments = [
            f"--queue-directory={directory}", "--plugin-directory=", "--hostname=d.test",
            f"--rabbitmq-address={uri(vhost)}", "--smtp-ip=127.0.0.1", "--smtp-port=0",
            f"--smtp-default-ips={X}", "--smtp-sink-address=127.0.0.1",
            f"--smtp-sink-port={sink.port}",
        ]  # fmt: skip
        async with trio.open_nursery() as nursery:
            command = [sys.executable, "-m", "mailerq", *arguments]
            start = partial(trio.run_process, command, check=False, cwd=ROOT, capture_stderr=True)
            process: trio.Process = await nursery.start(start)

            def owns(each: dict[str, Any]) -> bool:
                return bool(each["name"].startswith("d.test") and each.get("holds") == [X])

            with trio.fail_after(DEADLINE):
                while True:
                    done = await run("cluster", "list", "--json", *switches(config))
                    instances = [json.loads(line) for line in done.stdout.splitlines()]
                    if any(map(owns, instances)):
                        break
            async with Engine(config) as engine:
                await until(lambda: cluster_of(engine)["instances"] == 2)
                assert cluster_of(engine)["usable"] == 0
                process.send_signal(signal.SIGKILL)
                killed = trio.current_time()
                await until(lambda: cluster_of(engine)["usable"] == 1)
                assert trio.current_time() - killed >= leases.TAKEOVER / SECOND
                await publish(engine, 1)
                await sink.wait_for(1)


async def test_the_processes_of_a_daemon_are_one_instance(tmp_path: Path, vhost: Address) -> None:
    (tmp_path / "queue").mkdir()
    async with open_sink() as sink:
        (config,) = configs(
            tmp_path, vhost, 1, **into(sink), smtp_default_ips=(X,), domain_maxmessages=6000
        )
        port = free_port()
        arguments = [
            f"--queue-directory={tmp_path / 'queue'}", "--plugin-directory=", "--hostname=d.test",
            f"--rabbitmq-address={uri(vhost)}", "--smtp-ip=127.0.0.1", f"--smtp-port={port}",
            f"--smtp-default-ips={X}", "--smtp-sink-address=127.0.0.1", "--smtp-processes=2",
            f"--smtp-sink-port={sink.port}", "--smtp-relay-range=127.0.0.1/32",
        ]  # fmt: skip
        async with trio.open_nursery() as nursery:
            command = [sys.executable, "-m", "mailerq", *arguments]
            start = partial(trio.run_process, command, check=False, cwd=ROOT, capture_stderr=True)
            process: trio.Process = await nursery.start(start)

            async def status() -> dict[str, Any]:
                done = await run("status", "--json", *arguments)
                return json.loads(done.stdout)["cluster"] if not done.returncode else {}

            await until_found(status, lambda found: found.get("usable") == 1)
            done = await run("cluster", "list", "--json", *switches(config))
            assert [json.loads(line)["name"] for line in done.stdout.splitlines()] == [
                f"d.test:{port}"
            ]
            for number in range(20):
                await send(("127.0.0.1", port), recipients=(f"c{number}@d.test",))
            await sink.wait_for(20)
            done = await run("pause", "add", "--domain", "d.test", "--cluster", *arguments)
            assert done.stdout.endswith(b"\n")
            assert b"no daemon" not in done.stdout
            process.send_signal(signal.SIGTERM)


# Mail for addresses of others


async def taken(engine: Engine, count: int) -> list[dict[str, Any]]:
    """The last result of each of some messages."""
    found = []
    async with engine.consume("results") as consumer:
        with trio.fail_after(DEADLINE):
            while len(found) < count:
                lease = await consumer.receive()
                found.append(lease.message.properties)
                await engine.ack(lease)
    return found


async def test_mail_leaves_from_the_instance_that_has_its_address(
    tmp_path: Path, vhost: Address, quick: None
) -> None:
    async with open_sink() as sink:
        made = [
            on_broker(
                tmp_path / ip, vhost, **into(sink), hostname=f"h{ip}.test", smtp_default_ips=(ip,),
                rabbitmq_results="results",
            )
            for ip in (X, Y)
        ]  # fmt: skip
        async with engines(*made) as found:
            await until(lambda: all(cluster_of(each)["owned"] == 1 for each in found))
            await trio.sleep(0.5)  # the owners announce themselves
            for ip in (X, Y):
                await publish(found[0], 30, ips=[ip])
            results = await taken(found[0], 60)
            handed = [each.statistics()["outgoing"]["handed_over"] for each in found]
            delivered = [each.statistics()["outgoing"]["delivered"] for each in found]
        assert delivered == [30, 30]
        assert len(sink.mails) == 60
        assert sum(handed) > 0
        assert all(each["results"][-1]["from"] == each["ips"][0] for each in results)
        counts = [each["handover"]["count"] for each in results if "handover" in each]
        assert len(counts) == sum(handed)
        assert set(counts) == {1}


async def test_mail_for_an_instance_that_is_gone_comes_back(
    tmp_path: Path, vhost: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "HANDED_SECONDS", 1)
    async with open_sink() as sink:
        (config,) = configs(tmp_path, vhost, 1, **into(sink))
        async with Engine(config) as engine:
            message = Message(
                {"envelope": "a@b.test", "recipient": "c@d.test"}, b"Subject: x\r\n\r\nhi\r\n"
            )
            queue = topology.instance_queue("outbox", "gone.test:25")
            await engine.publish(message, queue=queue)
            await sink.wait_for(1)
            await until(lambda: engine.statistics()["outgoing"]["delivered"] == 1)


async def test_mail_does_not_go_to_and_fro_for_ever(
    tmp_path: Path, vhost: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two instances that each believe the other one has the address."""
    made = configs(tmp_path, vhost, 2)
    names = [config.instance for config in made]

    def other(self: Any, ips: Any) -> str:
        return names[1] if self.name == names[0] else names[0]

    monkeypatch.setattr(member.Cluster, "keeper_of", other)
    async with engines(*made) as found:
        await publish(found[0], 1, ips=[X])

        def counted(name: str) -> int:
            return sum(int(each.statistics()["outgoing"][name]) for each in found)

        await until(lambda: counted("held") == 1)
        assert counted("handed_over") == 5
