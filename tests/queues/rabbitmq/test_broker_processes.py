"""Several processes on one broker consume the one outbox; one that is killed loses nothing."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mailerq.queues.rabbitmq.addresses import Address
from tests.crash.kit import all_arrive, daemon
from tests.processes_kit import Gate, marked, send_all, until_rows
from tests.queues.rabbitmq.engine_kit import depth, uri
from tests.support import open_sink, until_found


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[dict[str, str]]:
    with marked(tmp_path) as environment:
        yield environment


@pytest.mark.parametrize("rests", [False, True])
async def test_a_process_that_is_killed_loses_nothing(
    tmp_path: Path, vhost: Address, mark: dict[str, str], *, rests: bool
) -> None:
    """It is killed while it settles attempts, or while all mail `rests` in the broker."""
    interval = f"--retry-interval={10 if rests else 1}"
    switches = ("--smtp-processes=2", f"--rabbitmq-address={uri(vhost)}", interval)
    async with (
        open_sink() as sink,
        daemon(tmp_path, sink.port, *switches, env=mark) as running,
    ):
        gate = Gate(sink)
        before = await send_all(running.port, "before")
        if rests:
            await running.until_statistics(
                lambda found: (
                    found["outgoing"]["retried"] >= len(before)
                    and not found["outgoing"]["unsettled"]
                )
            )
        killed = running.children[1]
        os.kill(killed, signal.SIGKILL)
        await until_rows(
            running,
            lambda found: all(row["state"] == "runs" and row["pid"] != killed for row in found),
        )
        after = await send_all(running.port, "after")
        gate.closed = False
        await all_arrive(sink, before | after)
        status = await running.statistics()
        assert any("connected to amqp://" in text for text in status["queue"]["broker"])
    counts = Counter(mail.recipients[0].partition("@")[0] for mail in sink.mails)
    # A retry that was published before the kill, and whose origin was not yet acknowledged, comes
    # twice. Nothing else does.
    assert all(counts[name] <= (1 if rests else 2) for name in before)
    assert all(counts[name] == 1 for name in after)


async def test_mail_waits_in_the_broker_for_a_daemon_that_was_killed(
    tmp_path: Path, vhost: Address, mark: dict[str, str]
) -> None:
    switches = (f"--rabbitmq-address={uri(vhost)}", "--retry-interval=1")
    async with open_sink() as sink:
        gate = Gate(sink)
        async with daemon(tmp_path, sink.port, *switches, env=mark) as running:
            names = await send_all(running.port, "mail", 12)
            await running.until_statistics(lambda found: found["outgoing"]["retried"] >= 12)
            running.process.kill()
        assert await depth(vhost, "outbox") is not None
        gate.closed = False
        async with daemon(tmp_path, sink.port, *switches, env=mark):
            await all_arrive(sink, names)
            await until_found(lambda: depth(vhost, "outbox"), lambda found: found == 0)
