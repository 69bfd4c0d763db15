"""Reports are as safe as all mail that comes in: after kill -9, and on a disk that fails."""

from __future__ import annotations

import errno
import smtplib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio

from mailerq import Engine
from mailerq.rules.row import suppressible
from mailerq.store.row_file import RowFile
from tests.crash.kit import Call, daemon, open_faults
from tests.mail import report_shapes as shapes
from tests.support import DEADLINE, configure, until

SENDERS = 4


class Reporters:
    """Clients that send bounces until they are told to end; new connections when theirs end."""

    def __init__(self, port: int) -> None:
        self.accepted: list[str] = []
        """Recipients whose mail got a 250; each is used once."""
        self.refused: list[int] = []
        self.suppressed: list[str] = []
        self._port = port
        self._ending = False
        self._lock = threading.Lock()
        self._number = 0

    @contextmanager
    def working(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._work) for _ in range(SENDERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ending = True
            for thread in threads:
                thread.join()

    def _work(self) -> None:
        while not self._ending:
            with (
                suppress(OSError, smtplib.SMTPException),
                smtplib.SMTP("127.0.0.1", self._port, timeout=DEADLINE) as client,
            ):
                client.ehlo("c.test")
                while not self._ending:
                    self._send(client)

    def _send(self, client: smtplib.SMTP) -> None:
        with self._lock:
            self._number += 1
            number = self._number
        mime = shapes.QMAIL.replace(b"eve@example.net", b"eve-%d@example.net" % number)
        client.mail("")
        code, _ = client.rcpt(f"bounces-{number}@d.test")
        assert code == 250
        code, _ = client.data(mime)
        if code == 250:
            self.accepted.append(f"bounces-{number}@d.test")
            self.suppressed.append(f"eve-{number}@example.net")
        else:
            self.refused.append(code)
            client.rset()


SWITCHES = (
    "--rabbitmq-reports=reports",
    "--rabbitmq-local=local",
    "--smtp-local-domains=d.test",
    "--suppress-bounces=hard",
    "--suppress-unproved=true",
)


async def reported(directory: Path, count: int) -> list[str]:
    """The recipients of all reports in the queue, which are at least so many."""
    found = []
    async with Engine(configure(directory)) as engine, engine.consume("reports") as leases:
        with trio.move_on_after(DEADLINE):
            while len(found) < count:
                lease = await leases.receive()
                assert lease.message.properties["report"]["type"] == "bounce"
                found.append(lease.message.recipient)
                await engine.ack(lease)
        with trio.move_on_after(0.2):
            while True:
                found.append((await leases.receive()).message.recipient)
    return found


async def test_what_was_accepted_is_there_after_kill_and_has_had_its_effect(
    tmp_path: Path,
) -> None:
    async with daemon(tmp_path, 1, *SWITCHES) as running:
        reporters = Reporters(running.port)
        async with trio.open_nursery() as nursery:
            stop = threading.Event()

            def work() -> None:
                with reporters.working():
                    stop.wait(DEADLINE)

            nursery.start_soon(trio.to_thread.run_sync, work)
            await until(lambda: len(reporters.accepted) >= 50)
            running.kill()
            await running.process.wait()
            stop.set()
    found = await reported(tmp_path, len(reporters.accepted))
    assert set(reporters.accepted) <= set(found)
    assert len(found) == len(set(found))
    addresses = RowFile(str(tmp_path / "queue")).read().addresses
    assert [each for each in reporters.suppressed if suppressible(each) not in addresses] == []


@pytest.mark.parametrize(
    ("error", "code"), [(errno.ENOSPC, 452), (errno.EIO, 451)], ids=["full", "broken"]
)
async def test_a_disk_that_fails_refuses_reports_for_now(
    tmp_path: Path, error: int, code: int
) -> None:
    with open_faults(tmp_path) as faults:
        async with daemon(tmp_path, 1, *SWITCHES, env=faults.env) as running:
            reporters = Reporters(running.port)
            async with trio.open_nursery() as nursery:
                stop = threading.Event()

                def work() -> None:
                    with reporters.working():
                        stop.wait(DEADLINE)

                nursery.start_soon(trio.to_thread.run_sync, work)
                await until(lambda: len(reporters.accepted) >= 10)
                faults.set(Call.WRITE, error=error)
                await until(lambda: len(reporters.refused) >= 10)
                faults.clear()
                before = len(reporters.accepted)
                await until(lambda: len(reporters.accepted) >= before + 10)
                stop.set()
            assert await running.stop() == 0
            assert "Traceback" not in running.log
    assert set(reporters.refused) == {code}
    found = await reported(tmp_path, len(reporters.accepted))
    # What was refused at that moment may have been written all the same.
    assert set(reporters.accepted) <= set(found)
    assert len(found) == len(set(found))
