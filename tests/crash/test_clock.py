"""A wall clock that jumps an hour: retries stay sane, nothing is lost, no loop spins."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio

from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.crash.kit import Daemon, Faults, Ledger, Load, all_arrive, arrivals, daemon, open_faults
from tests.support import DEADLINE, Sink, open_sink, until

HOUR: Final = 3600.0

RETRY_SECONDS: Final = 1

MESSAGES: Final = 40


class Peer:
    """Refuses each mail until it is `ready`, and counts how often that was."""

    def __init__(self, sink: Sink) -> None:
        self.ready = False
        self.refused = 0
        sink.decide = self.decide

    def decide(self, event: server.Event) -> Reply | None:
        if self.ready or not isinstance(event, server.Rcpt):
            return None
        self.refused += 1
        return Reply(451, "4.3.2 Not now")


async def fill(running: Daemon, ledger: Ledger, name: str) -> None:
    """Some mail that the peer refuses."""
    load = Load(ledger, name)
    before = len(ledger.accepted)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(partial(load.session, running.port))
        await until(lambda: len(ledger.accepted) >= before + MESSAGES)
        load.ending = True


async def is_calm(running: Daemon) -> None:
    """It does not spin."""
    before = running.cpu_seconds
    await trio.sleep(0.5)
    assert running.cpu_seconds - before < 0.3


async def jump(running: Daemon, faults: Faults, ledger: Ledger, peer: Peer, hours: float) -> None:
    """Move the clock while mail waits for its next attempt; it comes when it would have.

    Results that are waiting for a slow disk just then wait as long as the others.
    """
    await fill(running, ledger, f"before {hours:+}".replace(" ", "_"))
    waiting = len(ledger.accepted)
    await until(lambda: peer.refused >= waiting)
    faults.delay_syncs(1_500)
    before = peer.refused
    await until(lambda: peer.refused >= before + waiting)
    noticed = running.log.count("the clock was set back")
    back = faults.clock > hours * HOUR
    faults.set_clock(hours * HOUR)
    await until(lambda: running.log.count("the clock was set back") == noticed + back)
    before = peer.refused
    faults.delay_syncs(0)
    await is_calm(running)
    # Each one is tried again in its time, once or so.
    with trio.fail_after(DEADLINE):
        while peer.refused < before + waiting:  # noqa: ASYNC110
            await trio.sleep(0.02)
    assert peer.refused <= before + 3 * waiting
    await is_calm(running)


@pytest.mark.parametrize("way", [(1.0, 0.0), (-1.0, 0.0)], ids=["forward", "back"])
async def test_retries_when_the_clock_jumps_an_hour_and_returns(
    tmp_path: Path, way: tuple[float, ...]
) -> None:
    ledger = Ledger()
    with open_faults(tmp_path) as faults:
        async with (
            open_sink() as sink,
            daemon(
                tmp_path, sink.port, f"--retry-interval={RETRY_SECONDS}", env=faults.env
            ) as running,
        ):
            peer = Peer(sink)
            for hours in way:
                await jump(running, faults, ledger, peer, hours)
            peer.ready = True
            with trio.fail_after(DEADLINE):
                await all_arrive(sink, ledger.accepted)
            await running.until_empty()
            assert await running.stop() == 0
        ledger.check(arrivals(sink))
    assert "Traceback" not in running.log
