"""Deliveries of mail whose body is in a storage."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq.errors import StorageError
from mailerq.storage import Storage
from mailerq.storage.keys import key_for
from mailerq.storage.packing import pack
from tests.outbound.kit import Bench, StubPlugins, open_bench
from tests.outbound.memory_queues import NOW, MemoryQueues
from tests.storage.kit import Clock, opened

BODY = b"Subject: hi\r\n\r\nstored\r\n"


@asynccontextmanager
async def benches(
    tmp_path: Path, *scripts: Any, **settings: Any
) -> AsyncIterator[tuple[Bench, Storage, Clock]]:
    """A dispatcher beside a directory, with one clock."""
    clock = Clock(NOW)
    address = f"directory://{tmp_path}/bodies"
    async with (
        opened(address, clock=clock) as storage,
        open_bench(*scripts, storage=storage, **settings) as bench,
    ):
        yield bench, storage, clock


def forget(storage: Storage) -> None:
    """Have nothing in memory."""
    storage._cache.clear()
    storage._cached = 0


def waits(queues: MemoryQueues) -> bool:
    """Whether the message lies in the queue and is not due."""
    return bool(queues["outbox"]) and not queues.due and not queues.leased


async def test_a_body_in_the_storage_is_sent(tmp_path: Path) -> None:
    async with benches(tmp_path) as (bench, storage, clock):
        key = await storage.put(BODY, clock.now + 60)
        forget(storage)
        bench.send(body=None, key=key)
        await bench.results("success")
        assert [mail.body for mail in bench.peer.mails] == [BODY]
        assert storage.statistics()["fetched"] == 1
        for queue in ("results", "success"):
            (message,) = bench.queues[queue]
            assert message.body is None
            assert "key" not in message.properties


async def test_a_body_in_memory_is_sent_at_once(tmp_path: Path) -> None:
    async with benches(tmp_path, domain_maxconnections=1) as (bench, storage, clock):
        key = await storage.put(BODY, clock.now + 60)
        for number in range(5):
            bench.send(recipient=f"c{number}@d.test", body=None, key=key)
        await bench.results("success", 5)
        assert [mail.body for mail in bench.peer.mails] == [BODY] * 5
        assert storage.statistics()["fetched"] == 0


async def test_recipients_of_one_body_fetch_it_once(tmp_path: Path) -> None:
    async with benches(tmp_path) as (bench, storage, clock):
        key = await storage.put(BODY, clock.now + 60)
        forget(storage)
        for number in range(20):
            bench.send(recipient=f"c{number}@d{number % 3}.test", body=None, key=key)
        await bench.results("success", 20)
        assert {mail.body for mail in bench.peer.mails} == {BODY}
        assert storage.statistics()["fetched"] == 1


async def test_keepmime_keeps_the_key(tmp_path: Path) -> None:
    async with benches(tmp_path) as (bench, storage, clock):
        key = await storage.put(BODY, clock.now + 60)
        bench.send(body=None, key=key, keepmime=True)
        await bench.results("success")
        (message,) = bench.queues["success"]
        assert (message.properties["key"], message.body) == (key, None)


async def test_a_retry_keeps_the_key_and_not_the_body(tmp_path: Path) -> None:
    async with benches(tmp_path) as (bench, storage, clock):
        key = await storage.put(BODY, clock.now + 3600)
        bench.peer.answers["RCPT", ""] = ["450 no"]
        bench.send(body=None, key=key)
        await bench.retried()
        (message,) = bench.queues["outbox"]
        assert (message.properties["key"], message.body) == (key, None)
        forget(storage)
        await bench.pass_time(600)
        clock.now = bench.queues.now
        await bench.results("success")
        assert bench.peer.mails[-1].body == BODY


async def test_a_storage_that_is_away_makes_mail_wait_and_costs_no_attempt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"storage_reschedule": 50.0, "max_attempts": 1}
    async with benches(tmp_path, **settings) as (bench, storage, clock):
        key = await storage.put(BODY, clock.now + 3600)
        forget(storage)
        (tmp_path / "bodies").rename(tmp_path / "elsewhere")
        bench.send(body=None, key=key)
        for _ in range(3):
            await bench.queues.until(waits)
            (message,) = bench.queues["outbox"]
            assert "results" not in message.properties
            await bench.pass_time(50)
        assert bench.dispatcher.counters.put_off >= 3
        assert not bench.peer.mails
        assert "is its file system mounted" in caplog.text.lower()
        (tmp_path / "elsewhere").rename(tmp_path / "bodies")
        await bench.pass_time(50)
        await bench.results("success")
        assert [mail.body for mail in bench.peer.mails] == [BODY]
        (message,) = bench.queues["success"]
        assert len(message.results) == 1
        assert not bench.queues["retry"]
        assert not bench.queues["failure"]


async def test_mail_waits_for_the_storage_until_it_expires(tmp_path: Path) -> None:
    settings = {"storage_reschedule": 400.0, "max_delivertime": 1000.0}
    async with benches(tmp_path, **settings) as (bench, _, clock):
        bench.send(body=None, key=key_for(BODY, clock.now + 36000))
        waited = 0.0
        while not bench.queues["failure"] and waited < 2000:
            await bench.queues.until(waits)
            await bench.pass_time(200)
            waited += 200
            await trio.testing.wait_all_tasks_blocked(0.01)
        (result,) = await bench.results("failure")
        assert result["type"] == "expired"
        assert waited >= 1000


async def test_a_key_that_is_not_there_fails_for_good(tmp_path: Path) -> None:
    async with benches(tmp_path) as (bench, _, clock):
        bench.send(body=None, key="of-an-application")
        bench.send(body=None, key=key_for(BODY, clock.now - 7200))
        bench.send(body=None, key="../../etc/passwd")
        results = await bench.results("failure", 3)
        assert {(each["type"], each["state"], each["result"]) for each in results} == {
            ("nodata", "storage", "error")
        }
        texts = " ".join(each["description"] for each in results)
        assert "is not there" in texts
        assert "has expired" in texts
        assert "begins with a dot" in texts
        assert not bench.peer.mails


async def test_a_connection_goes_on_after_a_body_that_is_missing(tmp_path: Path) -> None:
    async with benches(tmp_path, domain_maxconnections=1) as (bench, storage, clock):
        key = await storage.put(BODY, clock.now + 60)
        forget(storage)
        for each in ("nothing", key, "nothing-else"):
            bench.send(body=None, key=each)
        await bench.results("results", 3)
        assert [mail.body for mail in bench.peer.mails] == [BODY]
        assert bench.peer.connections == 1


async def test_a_body_in_the_queue_counts_more_than_a_key(tmp_path: Path) -> None:
    async with benches(tmp_path) as (bench, storage, _):
        bench.send(body="inside\r\n", key="of-an-application")
        bench.send(body=None, mime={"subject": "made"}, key="of-an-application")
        await bench.results("success", 2)
        assert b"inside\r\n" in [mail.body for mail in bench.peer.mails]
        assert storage.statistics()["missing"] == 0


async def test_a_stored_object_is_made_into_a_mail(tmp_path: Path) -> None:
    async with benches(tmp_path) as (bench, storage, clock):
        form = {"from": "a@b.test", "subject": "Hi {$name}", "text": "made"}
        wrong = {"subject": 1}
        keys = [await storage.put(json.dumps(each).encode(), clock.now) for each in (form, wrong)]
        for cold in (True, False):
            if cold:
                forget(storage)
            for key in keys:
                bench.send(body=None, key=key, data={"name": "Ann"})
            await bench.results("results", 2 if cold else 4)
        assert len(bench.queues["success"]) == 2
        for mail in bench.peer.mails:
            assert b"Subject: Hi Ann\r\n" in mail.body
        assert {result["type"] for result in await bench.results("failure", 2)} == {"responsive"}
        assert all("mime" not in message.properties for message in bench.queues["results"])


async def test_a_stored_mail_is_a_template(tmp_path: Path) -> None:
    async with benches(tmp_path) as (bench, storage, clock):
        key = await storage.put(b"Subject: {$name}\r\n\r\nx\r\n", clock.now)
        forget(storage)
        bench.send(body=None, key=key, data={"name": "Ann"})
        await bench.results("success")
        assert bench.peer.mails[0].body.startswith(b"Subject: Ann\r\n")


async def test_a_stored_mail_that_runs_in_circles_fails(tmp_path: Path) -> None:
    async with benches(tmp_path, domain_maxconnections=1) as (bench, storage, clock):
        key = await storage.put(b"Received: by a\r\n" * 101 + b"\r\nx\r\n", clock.now)
        for _ in range(3):
            bench.send(body=None, key=key)
        results = await bench.results("failure", 3)
        assert {result["status"] for result in results} == {"5.4.6"}


async def test_a_report_quotes_the_stored_mail(tmp_path: Path) -> None:
    async with benches(tmp_path) as (bench, storage, clock):
        key = await storage.put(BODY, clock.now + 3600)
        forget(storage)
        bench.peer.answers["RCPT", ""] = ["550 no"]
        bench.send(body=None, key=key, dsn={"notify": "FAILURE", "ret": "FULL"})
        await bench.results("failure")
        await bench.queues.until(lambda queues: len(bench.peer.mails) == 2)
        assert b"stored" in bench.peer.mails[-1].body


async def test_a_report_of_mail_that_was_never_tried_quotes_it_too(tmp_path: Path) -> None:
    async with benches(tmp_path) as (bench, storage, clock):
        key = await storage.put(BODY, clock.now + 3600)
        forget(storage)
        wish = {"notify": "FAILURE", "ret": "FULL"}
        bench.send(body=None, key=key, dsn=wish, maxdelivertime="1990-01-01 00:00:00")
        bench.send(body=None, key="nothing", dsn=wish, maxdelivertime="1990-01-01 00:00:00")
        await bench.results("failure", 2)
        await bench.queues.until(lambda queues: len(bench.peer.mails) == 2)
        assert sorted(b"stored" in mail.body for mail in bench.peer.mails) == [False, True]


async def test_without_a_storage_mail_with_a_key_waits(caplog: pytest.LogCaptureFixture) -> None:
    async with open_bench(storage_reschedule=50.0) as bench:
        bench.send(body=None, key="k")
        await bench.queues.until(waits)
        assert bench.peer.connections == 0
        assert "storage-address is not set" in caplog.text


async def test_without_a_storage_a_plugin_may_know_the_key() -> None:
    def supply(message: Any) -> None:
        message.body = b"supplied " + message.properties["key"].encode() + b"\r\n"

    async with open_bench(plugins=StubPlugins(out_data=supply)) as bench:
        bench.send(body=None, key="k")
        await bench.results("success")
        assert [mail.body for mail in bench.peer.mails] == [b"supplied k\r\n"]


async def test_a_compressed_body_of_an_application_is_sent(tmp_path: Path) -> None:
    async with benches(tmp_path) as (bench, storage, clock):
        await storage.put(b"x", clock.now)
        (tmp_path / "bodies/mine").mkdir()
        (tmp_path / "bodies/mine/1").write_bytes(pack(BODY, compress=True))
        bench.send(body=None, key="mine/1")
        await bench.results("success")
        assert [mail.body for mail in bench.peer.mails] == [BODY]


async def test_large_stored_bodies_wait_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mailerq.outbound.bodies.MAX_BYTES", 1000)
    async with benches(tmp_path) as (bench, storage, clock):
        bodies = [b"%d" % number + b"x" * 700 + b"\r\n" for number in range(6)]
        keys = [await storage.put(body, clock.now) for body in bodies]
        forget(storage)
        for number, key in enumerate(keys):
            bench.send(recipient=f"c@d{number}.test", body=None, key=key)
        await bench.results("success", 6)
        assert sorted(mail.body for mail in bench.peer.mails) == sorted(bodies)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert bench.dispatcher._bodies._bytes == 0


async def test_a_defect_of_the_storage_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with benches(tmp_path, storage_reschedule=50.0) as (bench, storage, clock):
        key = await storage.put(BODY, clock.now)
        forget(storage)

        async def fail(key: str) -> bytes:
            raise StorageError("busy")

        monkeypatch.setattr(storage._backend, "get", fail)
        bench.send(body=None, key=key)
        await bench.queues.until(waits)
        monkeypatch.undo()
        await bench.pass_time(50)
        await bench.results("success")
