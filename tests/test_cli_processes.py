"""``smtp-processes``: several processes as clients, operators and misfortune see them."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import smtplib
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq.cli import control
from mailerq.cli.supervisor.parent import ASK_SECONDS
from mailerq.message import Message
from mailerq.net.stream import Stream, StreamLost
from mailerq.queues import Publication
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.queues.embedded.reader import POLL_SECONDS
from mailerq.queues.embedded.shares import share_directory
from tests.crash.kit import BODY, Daemon, all_arrive, command, daemon, is_alive, switches_in
from tests.engine.kit import Certificate
from tests.processes_kit import (
    ONE_ABORTS,
    SESSIONS,
    TWO,
    Gate,
    all_run,
    connected,
    locked,
    marked,
    put,
    rows,
    send_all,
    until_rows,
)
from tests.support import (
    DEADLINE,
    closed_port,
    compile_plugin,
    in_thread,
    mailerq,
    open_sink,
    until,
    without_received,
)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[dict[str, str]]:
    with marked(tmp_path) as environment:
        yield environment


# In good order.


async def test_both_processes_take_and_deliver_mail_byte_for_byte(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    dice = random.Random(1)
    bodies = {
        f"m-{number}": b"From: a@b.test\r\nDate: x\r\nMessage-ID: <%d@b.test>\r\n\r\n" % number
        + b"".join(
            b"x" + bytes(dice.choices([*range(32, 128), *range(160, 256)], k=70)) + b"\r\n"
            for _ in range(dice.randrange(200))
        )
        for number in range(SESSIONS)
    }
    async with open_sink() as sink, daemon(tmp_path, sink.port, TWO, env=mark) as running:
        opened = trio.Event()
        waiting = len(bodies)

        async def client(name: str, body: bytes) -> None:
            nonlocal waiting
            async with connected(running.port) as stream:
                waiting -= 1
                await opened.wait()
                assert await put(stream, name, body) == 250

        async with trio.open_nursery() as nursery:
            for name, body in bodies.items():
                nursery.start_soon(client, name, body)
            await until(lambda: not waiting)
            each = [row["connections"] for row in await rows(running)]
            assert min(each) > 0 and sum(each) == len(bodies)
            opened.set()
        await all_arrive(sink, set(bodies))
        status = await running.until_statistics(
            lambda found: found["outgoing"]["delivered"] >= len(bodies)
        )
        assert status["incoming"]["messages"] == status["outgoing"]["delivered"] == len(bodies)
        assert status["pid"] == running.process.pid
        assert status["listening"] == [f"127.0.0.1:{running.port}"]
        assert [row["pid"] for row in status["processes"]] != [running.process.pid] * 2
        assert sorted(row["pid"] for row in status["processes"]) == running.children
        assert await running.stop() == 0
    assert {name.partition("@")[0]: without_received(mail.body) for mail in sink.mails
            for name in mail.recipients} == bodies  # fmt: skip
    assert len(sink.mails) == len(bodies)
    assert all((tmp_path / "queue" / share / "queue.db").exists() for share in (".", "share-1"))


async def test_a_mail_from_the_command_line_goes_out_at_once(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    async with open_sink() as sink, daemon(tmp_path, sink.port, TWO, env=mark) as running:
        switches = switches_in(tmp_path, sink.port)
        done = await in_thread(lambda: mailerq("c@d.test", *switches, input=BODY))
        assert done.returncode == 0, done.stderr
        await all_arrive(sink, {"c"})

        def ask(command: str, **arguments: object) -> dict[str, Any]:
            return control.ask(str(running.queue), command, timeout=DEADLINE, **arguments)

        # As the injector does it, ten times in a row: unasked, a queue looks once in a second, so
        # each mail would wait for the look after the last one. Load is waited out.
        took = list[float]()
        numbers, began = count(), time.monotonic()
        with QueueFile.open(str(running.queue)) as store:
            while len(took) < 10 or statistics.median(took[-10:]) >= 0.8 * POLL_SECONDS:
                assert time.monotonic() - began < DEADLINE, took
                number, started = next(numbers), time.monotonic()
                recipient = f"w{number}@d.test"
                message = Message({"envelope": "a@b.test", "recipient": recipient}, BODY)
                store.publish([Publication("outbox", message)])
                ask("wake")
                await all_arrive(sink, {f"w{number}"})
                took.append(time.monotonic() - started)
        for nonsense in ({"count": 10_000 * "x"}, {"count": 0}, {"seconds": 1, "count": -1}):
            assert "count" in ask("message-ids", **nonsense)["error"] or len(str(nonsense)) > 1000
        assert len(ask("message-ids", count=3)["ids"]) == 3
        # A process that stands still holds up no injector.
        still = running.children[1]
        os.kill(still, signal.SIGSTOP)
        # To wait for its answer would take `ASK_SECONDS` in each round. Load is waited out.
        began = started = time.monotonic()
        while True:
            for _ in range(2):
                assert len(ask("message-ids")["ids"]) == 1
                assert ask("wake") == {"ok": True}
            if time.monotonic() - started < ASK_SECONDS:
                break
            started = time.monotonic()
            assert started - began < DEADLINE
        os.kill(still, signal.SIGCONT)


async def test_limits_are_divided_and_port_0_is_one_port_for_all(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    switches = [TWO, "--smtp-connections-in=3", "--smtp-secure-port=0,0"]
    switches += Certificate.make(tmp_path).switches
    with closed_port() as port:
        async with daemon(tmp_path, port, *switches, env=mark) as running:
            streams = [await Stream.connect("127.0.0.1", running.port) for _ in range(40)]
            try:
                codes = [await command(stream, None) for stream in streams]
            finally:
                for stream in streams:
                    stream.close()
            assert codes.count(220) == 2 * 2
            assert codes.count(421) == 40 - 2 * 2
            listening = (await running.statistics())["listening"]
            assert len(set(listening)) == len(listening) == 3


async def certificates(running: Daemon, certificate: Certificate) -> set[bytes]:
    """What the processes show to clients; each has some."""

    def shown(client: smtplib.SMTP) -> bytes:
        client.starttls(context=certificate.trust)
        return client.sock.getpeercert(binary_form=True)

    clients = [
        await in_thread(smtplib.SMTP, "127.0.0.1", running.port, "c.test", 20)
        for _ in range(SESSIONS)
    ]
    try:
        assert all(row["connections"] for row in await rows(running))
        return {await in_thread(shown, client) for client in clients}
    finally:
        for client in clients:
            client.close()


async def test_sighup_has_all_processes_read_the_certificate(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    certificate = Certificate.make(tmp_path)
    with closed_port() as port:
        switches = [TWO, *certificate.switches]
        async with daemon(tmp_path, port, *switches, env=mark) as running:
            (before,) = await certificates(running, certificate)
            certificate.issue()
            running.process.send_signal(signal.SIGHUP)
            await until_rows(running, lambda found: [row["settings"] for row in found] == [2, 2])
            (after,) = await certificates(running, certificate)
            assert before != after
            certificate.chain.write_text("nonsense")
            running.process.send_signal(signal.SIGHUP)
            await until(lambda: "the settings stay as they were" in running.log)
            assert running.log.count("chain.pem") == 1  # one process has tried
            assert await certificates(running, certificate) == {after}


ONE_WAITS = """
#define _DEFAULT_SOURCE
#include <mailerq.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }
MQ_EXPORT void mq_initialize(void)
{
    if (access(getenv("WAITS"), F_OK)) return;
    fclose(fopen(getenv("WAITING"), "w"));
    while (!access(getenv("WAITS"), F_OK)) usleep(1000);
}
"""


async def test_sighup_reaches_a_process_that_is_about_to_start(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    certificate = Certificate.make(tmp_path)
    compile_plugin(tmp_path / "plugins", "one.c", ONE_WAITS)
    waits, waiting = tmp_path / "waits", tmp_path / "waiting"
    switches = [TWO, *certificate.switches, f"--plugin-directory={tmp_path}/plugins"]
    env = {**mark, "WAITS": str(waits), "WAITING": str(waiting)}
    with closed_port() as port:
        async with daemon(tmp_path, port, *switches, env=env) as running:
            waits.touch()
            os.kill(running.children[1], signal.SIGKILL)
            await until(waiting.exists)  # it has read the certificate
            certificate.issue()
            running.process.send_signal(signal.SIGHUP)
            await until(lambda: "SIGHUP: settings 2 are in force" in running.log)
            waits.unlink()
            await until_rows(running, lambda found: [row["settings"] for row in found] == [2, 2])
            assert len(await certificates(running, certificate)) == 1


# Processes that end.


async def test_a_killed_process_is_replaced_and_nothing_of_its_share_is_lost(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    async with open_sink() as sink, daemon(tmp_path, sink.port, TWO, env=mark) as running:
        gate = Gate(sink)
        sent = await send_all(running.port, "before")
        assert min(running.depths("outbox")) > 0
        before = await rows(running)
        os.kill(before[1]["pid"], signal.SIGKILL)
        await until(lambda: not is_alive(before[1]["pid"]))
        sent |= await send_all(running.port, "after")
        after = await until_rows(running, all_run)
        assert after[0]["pid"] == before[0]["pid"]
        assert after[1]["pid"] != before[1]["pid"]
        assert [row["starts"] for row in after] == [1, 2]
        sent |= await send_all(running.port, "again")
        gate.closed = False
        await all_arrive(sink, sent)
        await running.until_empty()
        assert await running.stop() == 0
    assert len(sink.mails) == len(sent)


async def test_the_other_delivers_for_a_process_that_cannot_be_started(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    compile_plugin(tmp_path / "plugins", "one.c", ONE_ABORTS)
    aborts = tmp_path / "aborts"
    switches = [TWO, f"--plugin-directory={tmp_path}/plugins"]
    env = {**mark, "ABORTS": str(aborts)}
    async with open_sink() as sink, daemon(tmp_path, sink.port, *switches, env=env) as running:
        gate = Gate(sink)
        sent = await send_all(running.port, "a")
        assert min(running.depths("outbox")) > 0
        aborts.touch()
        os.kill((await rows(running))[1]["pid"], signal.SIGKILL)
        await until_rows(running, lambda found: found[0]["shares"] == [0, 1])
        gate.closed = False
        await all_arrive(sink, sent)
        await until(lambda: "was ended by SIGABRT at its start" in running.log)
        aborts.unlink()
        await until_rows(running, all_run)
        sent |= await send_all(running.port, "b")
        await all_arrive(sink, sent)
        await running.until_empty()
        assert await running.stop() == 0
    assert len(sink.mails) == len(sent)


@contextmanager
def barred(share: Path) -> Iterator[None]:
    """Another thing has its name, as root too cannot pass it by."""
    aside = share.with_name("aside")
    share.rename(aside)
    share.touch()
    try:
        yield
    finally:
        share.unlink()
        aside.rename(share)


@pytest.mark.parametrize("trouble", [locked, barred])
async def test_a_share_that_nobody_can_open_waits_until_its_process_can(
    tmp_path: Path, mark: dict[str, str], trouble: Any
) -> None:
    async with open_sink() as sink, daemon(tmp_path, sink.port, TWO, env=mark) as running:
        gate = Gate(sink)
        sent = await send_all(running.port, "a")
        waiting = running.depths("outbox")
        assert min(waiting) > 0
        (_, victim) = await rows(running)
        # While the parent looks away, so that the trouble is there before it can do anything.
        running.process.send_signal(signal.SIGSTOP)
        os.kill(victim["pid"], signal.SIGKILL)
        await until(lambda: not is_alive(victim["pid"]))
        with trouble(running.queue / "share-1"):
            running.process.send_signal(signal.SIGCONT)
            await until_rows(running, lambda found: found[1]["starts"] > 1)
            gate.closed = False
            more = await send_all(running.port, "b")
            await all_arrive(sink, more)
        await all_arrive(sink, sent)
        await until_rows(running, all_run)
        assert await running.stop() == 0
    assert len(sink.mails) == len(sent | more)
    assert "Traceback" not in running.log


POISON = """
#include <mailerq.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }
MQ_EXPORT bool mq_smtp_out_data(MQ_Context *context, MQ_SmtpConnection *connection,
                                MQ_Message *message)
{
    (void)context;
    (void)connection;
    if (strstr(MQ_Recipient(message), "poison") && access(getenv("CURED"), F_OK)) abort();
    return false;
}
"""


async def test_a_share_that_kills_who_delivers_it_does_not_take_the_others_along(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    compile_plugin(tmp_path / "plugins", "poison.c", POISON)
    cured = tmp_path / "cured"
    switches = [TWO, f"--plugin-directory={tmp_path}/plugins"]
    env = {**mark, "CURED": str(cured)}
    async with open_sink() as sink, daemon(tmp_path, sink.port, *switches, env=env) as running:
        async with connected(running.port) as stream:
            assert await put(stream, "poison") == 250
        said = re.compile(r"share (\d) of the queue is not adopted: 1 processes ended soon")
        await until(lambda: said.search(running.log) is not None)
        marked = int(said.findall(running.log)[0])
        healthy = 1 - marked
        found = await until_rows(running, lambda found: found[healthy]["state"] == "runs")
        starts, deaths = found[healthy]["starts"], found[marked]["starts"]
        await until_rows(running, lambda found: found[marked]["starts"] >= deaths + 2)
        sent: set[str] = set()
        while len(sent) < 5:
            try:
                sent |= await send_all(running.port, f"m{len(sent)}", 1)
            except (OSError, EOFError, StreamLost, AssertionError):
                await trio.sleep(0.02)  # it was one of the process that is about to end
        after = await rows(running)
        assert after[healthy]["starts"] == starts
        assert after[healthy]["state"] == "runs"
        assert marked not in after[healthy]["shares"]
        cured.touch()
        await all_arrive(sink, {"poison", *sent})
        await until_rows(running, all_run)
        assert await running.stop() == 0


SUDDEN = """
#define _DEFAULT_SOURCE
#include <mailerq.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
static void *watch(void *path)
{
    for (;; usleep(100)) {
        int pid = 0;
        FILE *file = fopen(path, "r");
        if (!file) continue;
        if (fscanf(file, "%d", &pid) == 1 && pid == getpid()) abort();
        fclose(file);
    }
}
MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }
MQ_EXPORT void mq_initialize(void)
{
    pthread_t thread;
    pthread_create(&thread, NULL, watch, getenv("SUDDEN"));
}
"""


async def test_a_share_that_kills_before_it_is_open_is_not_given_to_one_after_the_other(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    compile_plugin(tmp_path / "plugins", "sudden.c", SUDDEN)
    share = tmp_path / "queue" / "share-7"
    share.mkdir(parents=True)
    env = {**mark, "SUDDEN": str(share / "queue.lock")}
    switches = ["--smtp-processes=3", f"--plugin-directory={tmp_path}/plugins"]
    with closed_port() as port:
        async with daemon(tmp_path, port, *switches, env=env) as running:
            await until(lambda: running.log.count("was ended by SIGABRT") == 1)
            await until_rows(running, all_run)
            await until(lambda: "share 7 of the queue is not adopted: 1 processes" in running.log)
            assert running.log.count("was ended by SIGABRT") == 1
            assert await running.stop() == 0


async def test_a_process_that_stands_still_holds_up_neither_status_nor_restarts(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    with closed_port() as port:
        async with daemon(tmp_path, port, "--smtp-processes=3", env=mark) as running:
            pids = [row["pid"] for row in await rows(running)]
            os.kill(pids[0], signal.SIGSTOP)
            try:
                os.kill(pids[2], signal.SIGKILL)
                await until(lambda: len({*running.children, *pids}) == 4)
                switches = switches_in(tmp_path, port)
                shown: dict[str, bytes] = {}

                async def show(*arguments: str) -> None:
                    done = await in_thread(mailerq, "status", *arguments, *switches)
                    shown["".join(arguments)] = done.stdout

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(show, "--json")
                    nursery.start_soon(show)
                first, second, third = json.loads(shown["--json"])["processes"]
                assert (first["state"], second["state"]) == ("does not answer", "runs")
                assert third["starts"] == 2
                lines = [line.split() for line in shown[""].decode().splitlines()]
                assert ["0", str(pids[0]), "does", "not", "answer"] in [line[:5] for line in lines]
            finally:
                os.kill(pids[0], signal.SIGCONT)
            await until_rows(running, all_run)
            assert (await rows(running))[0]["pid"] == pids[0]


# The next start.


@pytest.mark.parametrize("count", [2, 1])
async def test_fewer_processes_deliver_what_more_have_left(
    tmp_path: Path, mark: dict[str, str], count: int
) -> None:
    queue = tmp_path / "queue"
    for share in range(4):
        with QueueFile.open(share_directory(str(queue), share)) as store:
            store.publish([
                Publication("outbox", Message({"envelope": "a@b.test", "recipient":
                                               f"s{share}-{number}@d.test"}, BODY))
                for number in range(5)
            ])  # fmt: skip
    sent = {f"s{share}-{number}" for share in range(4) for number in range(5)}
    processes = f"--smtp-processes={count}"
    async with open_sink() as sink, daemon(tmp_path, sink.port, processes, env=mark) as running:
        await all_arrive(sink, sent)
        await running.until_empty()
        assert await running.stop() == 0
    assert len(sink.mails) == len(sent)


@pytest.mark.parametrize("count", [2, 1])
async def test_a_share_left_by_more_processes_may_be_out_of_reach(
    tmp_path: Path, mark: dict[str, str], count: int
) -> None:
    """The daemon serves without the share, and says so."""
    (tmp_path / "queue" / "share-2").mkdir(parents=True)
    (tmp_path / "queue" / "share-2" / "queue.lock").touch()
    with locked(tmp_path / "queue" / "share-2"), closed_port() as port:
        async with daemon(tmp_path, port, f"--smtp-processes={count}", env=mark) as running:
            await until(lambda: "share 2 of the queue is not adopted" in running.log)
            assert "share-2/queue.lock: held by another mailerq" in running.log
            assert await running.stop() == 0


async def test_queue_commands_work_beside_the_processes(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    async with open_sink() as sink, daemon(tmp_path, sink.port, TWO, env=mark) as running:
        gate = Gate(sink)
        sent = await send_all(running.port, "a")
        done = await in_thread(
            lambda: mailerq("queue", "read", "outbox", "--remove", *switches_in(tmp_path, 1))
        )
        taken = [json.loads(line) for line in done.stdout.splitlines()]
        assert {document["recipient"].partition("@")[0] for document in taken} == sent
        gate.closed = False
        sent = await send_all(running.port, "b")
        await all_arrive(sink, sent)
        await running.until_empty()
        assert await running.stop() == 0


async def test_orders_reach_the_mail_of_all_processes(tmp_path: Path, mark: dict[str, str]) -> None:
    async with (
        open_sink() as sink,
        daemon(tmp_path, sink.port, TWO, "--retry-interval=3600", env=mark) as running,
    ):
        gate = Gate(sink)
        sent = await send_all(running.port, "a")
        await running.until_statistics(
            lambda found: (
                found["outgoing"]["retried"] >= len(sent)
                and found["queue"]["leased"].get("outbox", 0) == 0
            )
        )

        async def order(*words: str) -> tuple[int, int]:
            command = ["queue", *words, "--json", *switches_in(tmp_path, 1)]
            done = await in_thread(lambda: mailerq(*command))
            assert done.returncode == 0, done.stderr
            reply = json.loads(done.stdout)
            return reply["done"], reply["under_way"]

        assert await order("hold", "--all") == (len(sent), 0)
        gate.closed = False
        await all_arrive(sink, await send_all(running.port, "b"))
        assert await order("bounce", "--recipient=a-1@*", "--yes") == (1, 0)
        assert await order("release", "--domain=d.test") == (len(sent) - 1, 0)
        await order("retry", "--all")
        await all_arrive(sink, sent - {"a-1"})
        await running.until_empty()
        names = [mail.recipients[0].partition("@")[0] for mail in sink.mails]
        assert sorted(name for name in names if name.startswith("a-")) == sorted(sent - {"a-1"})
        assert "hold in outbox: 24 of 24 messages were held" in running.log
        assert await running.stop() == 0
