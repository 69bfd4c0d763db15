"""kill -9 at random moments under load.

Mail that got a 250 arrives; mail that arrives twice was in flight; nothing else arrives. With
several processes, one is killed and then all stop, or the parent is killed, or all are.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import trio

from tests.crash.kit import Daemon, Ledger, Load, all_arrive, arrivals, daemon, is_alive
from tests.support import ROOT, compile_plugin, open_sink, until

SESSIONS = 20

MOST = 10
"""How often as many kills as are wanted may be made, to come among enough mail."""

SMALL = int(os.environ.get("MAILERQ_KILLS", "5"))
FULL = int(os.environ.get("MAILERQ_KILLS", "100"))


def plugins(directory: Path) -> dict[str, str]:
    """Compile two examples: one that holds each recipient for a moment, one that edits."""
    for name in ("delay.c", "footer.c"):
        compile_plugin(directory / "plugins", name, (ROOT / "plugins" / name).read_text())
    return {"DELAY_SECONDS": "0.002", "FOOTER_TEXT": "a footer"}


async def kill_some(running: Daemon, dice: random.Random) -> None:
    """Kill processes of several: the others go on, or stop by themselves."""
    children = running.children
    match dice.randrange(4):
        case 0:  # without their parent they stop
            running.kill()
        case 1:
            for pid in (*children, running.process.pid):
                os.kill(pid, signal.SIGKILL)
        case _:
            os.kill(dice.choice(children), signal.SIGKILL)
            await trio.sleep(dice.uniform(0.0, 2.0))  # it is replaced, or its share moves
            assert await running.stop() == 0
    await until(lambda: not any(map(is_alive, children)))


async def kill_again_and_again(directory: Path, rounds: int, variant: str) -> None:
    ledger = Ledger()
    in_flight: set[str] = set()  # the last mail of each connection to the sink at a kill
    switches, env = [], {}
    several = variant == "processes"
    if variant == "threads":
        switches = ["--smtp-threads=3"]
    elif variant == "plugins":
        env = plugins(directory)
        switches = [f"--plugin-directory={directory / 'plugins'}"]
    elif several:
        switches = ["--smtp-processes=2"]
    dice = random.Random(rounds)
    async with open_sink() as sink:
        for number in count():
            if number >= rounds and len(ledger.accepted) > 10 * rounds:
                break
            assert number < MOST * rounds, f"only {len(ledger.accepted)} mails were taken"
            load = Load(ledger, str(number))
            sink.last_mails.clear()
            async with (
                daemon(directory, sink.port, *switches, env=env) as running,
                trio.open_nursery() as nursery,
            ):
                for _ in range(SESSIONS):
                    nursery.start_soon(partial(load.session, running.port, again=several))
                # Later and later where a slow disk has not let enough mail in.
                await trio.sleep(dice.uniform(0.05, 0.6) * max(1, 1 + (number - rounds) / 4))
                if several:
                    await kill_some(running, dice)
                    load.ending = True
                else:
                    running.kill()
            in_flight.update(name.partition("@")[0] for name in sink.last_mails.values())
        async with daemon(directory, sink.port, *switches, env=env) as running:
            await all_arrive(sink, ledger.accepted)
            await running.until_empty()
            assert running.depth("damaged") == 0
            assert await running.stop() == 0
    ledger.check(arrivals(sink), in_flight)
    assert not list((directory / "queue").rglob("*damaged*"))
    if variant == "plugins":
        assert all(b"a footer" in mail.body for mail in sink.mails)
    shutil.rmtree(directory / "queue")


@pytest.mark.parametrize("variant", ["plain", "threads", "plugins", "processes"])
async def test_kill_at_any_moment(tmp_path: Path, variant: str) -> None:
    await kill_again_and_again(tmp_path, SMALL, variant)


@pytest.mark.soak
@pytest.mark.parametrize("variant", ["plain", "threads", "plugins", "processes"])
async def test_a_hundred_kills(tmp_path: Path, variant: str) -> None:
    await kill_again_and_again(tmp_path, FULL, variant)
