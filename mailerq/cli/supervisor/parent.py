"""The parent of several processes: it starts them, looks after them, and answers for them.

Theory of operation
-------------------
Each process (`mailerq.cli.supervisor.child`) is a whole engine with a share of the queue
directory. The processes listen on the same addresses, and the kernel spreads connections over
them. The parent takes no mail. It keeps the addresses reserved, answers on the control socket
with what all say together, and starts a process anew when it has ended.

A process that ends soon after its start again and again is started later each time; meanwhile
another one delivers what is in its share. When that one ends as well, soon after it has taken the
share over, there may be something in it that kills whoever touches it: then the share waits for
its own process, and before another one takes it over again it waits longer each time.

What is said of who has which share may be late by a process that answers late. The locks decide,
who comes too late is told so, and what went wrong is tried again. Who was asked to take a share
over may do so when nobody waits for the answer any more: until there is one it counts as who may
have the share, and it is told when the share's own process is about to start.

Guarantees
----------
- A share is open in at most one process: its lock sees to that, whatever happens here.
- When the parent is gone its processes stop in their time.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

import trio

from mailerq import __version__
from mailerq.cli.common import complain
from mailerq.cli.serving import OVERDUE_SECONDS, end_at_once, join
from mailerq.cli.supervisor.process import Ended, NoStart, Process, describe
from mailerq.config import Config
from mailerq.errors import MailerqError
from mailerq.inbound.listener import reserve
from mailerq.message import format_time
from mailerq.net import control
from mailerq.net.statistics import total
from mailerq.privileges import as_owner, keep_for_ports
from mailerq.queues.opening import shares_in

__all__ = ["serve"]

log = logging.getLogger("mailerq")

DIVIDED: Final = (
    "smtp_connections",
    "smtp_connections_in",
    "smtp_connections_out",
    "smtp_handshakes",
    "max_memory",
    "domain_maxconnections",
)
"""Limits of the whole, of which each process gets its part."""

STEADY_SECONDS: Final = 10.0
"""A process that ran for so long has not ended because of how it was started."""

MAX_PAUSE_SECONDS: Final = 60.0
"""How long at most a process stays away that ends soon after each start."""

MIN_QUARANTINE_SECONDS: Final = 60.0
MAX_QUARANTINE_SECONDS: Final = 3600.0
"""How long a share is not taken over after who did has ended; twice as long each time."""

ASK_SECONDS: Final = 2.0
MOVE_SECONDS: Final = 30.0
"""How long a process may take to say how it is, and to open or close a share."""

IDS_SECONDS: Final = 0.4
"""How long for ids, before another one is asked: an injector waits for a second at most."""

KILL_SECONDS: Final = 2 * OVERDUE_SECONDS
"""How long after `shutdown-timeout` a process is killed that has not stopped. Before that it ends
itself, and says which plugin it was in."""

UNCLEAN: Final = frozenset({
    os.EX_SOFTWARE, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGFPE,
    -signal.SIGILL, -signal.SIGABRT,
})  # fmt: skip
"""How a process ends that crashes or hangs when it is to stop: the parent then ends with
EX_SOFTWARE."""


async def serve(config: Config) -> int:
    """Run `smtp-processes` engines until SIGTERM or SIGINT; the exit status."""
    with reserve(config) as reserved:
        keep_for_ports(account=bool(config.user))
        return await _Parent(reserved).run()


class _Parent:
    def __init__(self, config: Config) -> None:
        self._config = _divide(config)
        self._count = config.smtp_processes
        self._started = time.time()
        self._starts = dict.fromkeys(range(self._count), 0)
        self._children: dict[int, Process] = {}
        """Those that serve."""
        self._begun: dict[int, Process] = {}
        """Those, and the ones that are about to."""
        self._loose: set[int] = set()
        """Shares that nobody has, and whose own process does not run."""
        self._offers: dict[int, trio.CancelScope] = {}
        self._quarantine: dict[int, float] = {}
        """Until when nobody takes over a share: who did has ended."""
        self._kills = Counter[int]()
        self._moving = trio.Lock()
        self._reloads = 0
        self._exit_status = os.EX_OK
        self._stop = trio.Event()
        self._nursery: trio.Nursery

    async def run(self) -> int:
        """Serve until a signal; the exit status."""
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        with trio.open_signal_receiver(*signals) as received:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._watch, received)
                async with trio.open_nursery() as keepers:
                    try:
                        await self._start(keepers)
                    except NoStart as error:
                        complain(str(error))
                        self._exit_status = error.status
                    else:
                        await self._stop.wait()
                    self._end()
                self._nursery.cancel_scope.cancel()
        if not self._exit_status:
            log.info("stopped")
        return self._exit_status

    async def _start(self, keepers: trio.Nursery) -> None:
        """Start all processes, the first one first: what it says is wrong is said once."""
        addresses = await keepers.start(self._keep, 0)
        if self._stop.is_set():
            return
        failures: list[NoStart] = []

        async def start(index: int) -> None:
            try:
                await keepers.start(self._keep, index)
            except NoStart as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for index in range(1, self._count):
                nursery.start_soon(start, index)
        if failures:
            raise failures[0]
        if self._stop.is_set():
            return
        directory = self._config.queue_directory
        await self._nursery.start(control.serve, directory, self._commands())
        with as_owner(directory):
            self._loose.update(share for share in shares_in(directory) if share >= self._count)
        self._nursery.start_soon(self._offer_again)
        log.info(
            "mailerq %s listens on %s, with %d processes", __version__, join(addresses), self._count
        )

    async def _watch(self, signals: AsyncIterator[int]) -> None:
        """The first signal stops all processes in their time, the second one ends them."""
        async for number in signals:
            if number == signal.SIGHUP:
                self._reloads += 1
                self._nursery.start_soon(self._reload)
            elif not self._stop.is_set():
                log.info("%s: stopping", signal.Signals(number).name)
                self._end()
            else:
                self._kill()
                end_at_once(number)

    def _end(self) -> None:
        """Have all processes stop; their keepers wait for them."""
        self._stop.set()
        for child in self._begun.values():
            child.leave()
        self._nursery.start_soon(self._kill_late)

    async def _kill_late(self) -> None:
        await trio.sleep(self._config.shutdown_timeout + KILL_SECONDS)
        self._kill()

    def _kill(self) -> None:
        for child in self._begun.values():
            log.error("%s has not stopped, it is killed", child)
            child.program.kill()

    # Processes

    async def _keep(
        self,
        index: int,
        *,
        task_status: trio.TaskStatus[list[tuple[str, int]]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Have a process for a share, one after another. Raises `NoStart` for the first."""
        failures = 0
        first = True

        def ready(addresses: list[tuple[str, int]]) -> None:
            nonlocal first
            if first:
                task_status.started(addresses)
            first = False

        while True:
            seconds = 0.0
            try:
                seconds = await self._live(index, ready)
            except NoStart as error:
                if first and self._stop.is_set():
                    return ready([])
                if first:
                    raise
                log.critical("%s", error)
            if self._stop.is_set():
                return None
            if seconds >= STEADY_SECONDS:
                failures = 0
                self._kills.pop(index, None)
                self._quarantine.pop(index, None)
            else:
                failures += 1
                self._loose.add(index)
                # Not awaited: who is asked may stand still.
                self._nursery.start_soon(self._hand_out)
                with trio.move_on_after(_doubled(1.0, failures - 1, MAX_PAUSE_SECONDS)):
                    await self._stop.wait()
                if self._stop.is_set():
                    return None
                await self._call_back(index)

    async def _live(self, index: int, ready: Callable[[list[tuple[str, int]]], object]) -> float:
        """One process from its start to its end; the seconds that it served. `NoStart`."""
        reloads = self._reloads
        child = await Process.start(index)
        self._begun[index] = child
        self._loose.discard(index)
        self._starts[index] += 1
        self._nursery.start_soon(child.listen)
        if self._stop.is_set():
            child.leave()
        try:
            addresses = await child.until_ready(self._config)
            served = time.monotonic()
            self._children[index] = child
            ready(addresses)
            if reloads != self._reloads:  # it may have read the certificate before
                self._nursery.start_soon(self._reload)
            self._nursery.start_soon(self._hand_out)
            status = await child.program.wait()
        finally:
            self._children.pop(index, None)
            await child.end()
            del self._begun[index]
            if self._stop.is_set() and child.program.returncode in UNCLEAN:
                log.critical("%s %s", child, describe(child.program.returncode))
                self._exit_status = os.EX_SOFTWARE
        if not self._stop.is_set():
            log.critical("%s %s; another one is started", child, describe(status))
            self._bury(child, status)
        return time.monotonic() - served

    def _bury(self, child: Process, status: int) -> None:
        """A process has ended: what it had taken over is nobody's again."""
        now = time.monotonic()
        # What it was asked for last may have been too much for it.
        taken = {**dict.fromkeys(child.offered, now), **child.took}
        for share, since in taken.items():
            if share in self._begun:
                continue
            self._loose.add(share)
            if status and now - since < STEADY_SECONDS:
                seconds = _doubled(
                    MIN_QUARANTINE_SECONDS, self._kills[share], MAX_QUARANTINE_SECONDS
                )
                self._kills[share] += 1
                self._quarantine[share] = now + seconds
                log.critical(
                    "%s ended %s share %d over: no other process does so for %d seconds",
                    child,
                    "soon after it had taken" if share in child.took else "when asked to take",
                    share,
                    seconds,
                )
        if taken:
            self._nursery.start_soon(self._hand_out)

    # Shares

    async def _offer_again(self) -> None:
        """Hand out what is left, and now and then what could not be handed out."""
        while True:
            await self._hand_out()
            await trio.sleep(MAX_PAUSE_SECONDS)

    async def _hand_out(self) -> None:
        """Have loose shares taken over."""
        async with self._moving:
            for child in self._children.values():
                self._loose.difference_update(child.took)  # also by an answer that came late
            for share in sorted(self._loose):
                if share in self._loose and self._quarantine.get(share, 0.0) <= time.monotonic():
                    with trio.CancelScope() as scope:
                        self._offers[share] = scope
                        await self._offer(share)
                    del self._offers[share]

    async def _offer(self, share: int) -> None:
        """Have a share taken over, by the process that has the least to do with others."""
        for child in sorted(self._children.values(), key=_burden):
            if child.over.is_set() or share in child.offered:
                continue
            try:
                await child.ask("take-over", MOVE_SECONDS, share=share)
            except (Ended, MailerqError) as error:
                log.error("share %d of the queue is not taken over: %s", share, error)
            else:
                if not child.over.is_set():
                    self._loose.discard(share)
                    return
            if child.over.is_set():
                return  # perhaps by what is in the share: `_bury` will tell

    async def _call_back(self, index: int) -> None:
        """Have a share given back by who took it over: its own process is about to start.

        Who was asked to take it over and has not answered is told, but not waited for.
        """
        self._loose.discard(index)
        if (offer := self._offers.get(index)) is not None:
            offer.cancel()
        for child in list(self._children.values()):
            if child.took.pop(index, None) is not None:
                await self._ask_back(child, index)
            elif index in child.offered:
                self._nursery.start_soon(self._ask_back, child, index)

    async def _ask_back(self, child: Process, share: int) -> None:
        try:
            await child.ask("give-back", MOVE_SECONDS, share=share)
        except (Ended, MailerqError) as error:
            log.error("share %d of the queue is not given back: %s", share, error)

    # What others ask for

    def _commands(self) -> control.Commands:
        return {
            "status": self._status,
            "wake": self._wake,
            "message-ids": self._message_ids,
        }

    async def _status(self, request: control.Request) -> dict[str, Any]:
        """What all processes say together, and a row for each."""
        said = await self._ask_all("status")
        trees = [reply for reply in said.values() if reply is not None]
        whole = total(trees)
        rows = []
        for index in range(self._count):
            child, reply = self._children.get(index), said.get(index)
            state = "runs" if reply else "does not answer" if child else "is to start"
            rows.append({
                "process": index,
                "pid": child.program.pid if child else None,
                "state": state,
                "starts": self._starts[index],
                "uptime": reply["uptime"] if reply else None,
                "connections": reply["incoming"]["open"] if reply else None,
                "shares": sorted({index, *child.took}) if child else [],
            })  # fmt: skip
        return {
            **whole,
            "started": format_time(self._started),
            "uptime": time.time() - self._started,
            "pid": os.getpid(),
            "processes": rows,
        }

    def _wake(self, request: control.Request) -> dict[str, bool]:
        everything = bool(request.get("everything"))
        # Nobody waits for one that stands still.
        self._nursery.start_soon(partial(self._ask_all, "wake", everything=everything))
        return {"ok": True}

    async def _message_ids(self, request: control.Request) -> dict[str, Any]:
        """Of one process; those that owe an answer are asked last."""
        count = request.get("count", 1)
        for child in sorted(self._children.values(), key=_burden):
            with suppress(Ended):
                return await child.ask("message-ids", IDS_SECONDS, count=count)
        raise MailerqError("no process answers")

    async def _reload(self) -> None:
        replies = await self._ask_all("reload")
        if None in replies.values():
            log.error("SIGHUP: the certificate stays as it was where it could not be read")
        else:
            log.info(
                "SIGHUP: the certificate is read by all; moved log files are opened anew by "
                "themselves"
            )

    async def _ask_all(self, command: str, **arguments: Any) -> dict[int, dict[str, Any] | None]:
        """The reply of each process, None of one that does not answer."""
        replies: dict[int, dict[str, Any] | None] = {}

        async def ask(child: Process) -> None:
            try:
                replies[child.index] = await child.ask(command, ASK_SECONDS, **arguments)
            except (Ended, MailerqError) as error:
                log.error("%s: %s", command, error)
                replies[child.index] = None

        async with trio.open_nursery() as nursery:
            for child in self._children.values():
                nursery.start_soon(ask, child)
        return replies


def _burden(child: Process) -> tuple[int, int]:
    return child.burden


def _divide(config: Config) -> Config:
    """The settings of one process: its part of the limits, rounded up."""
    changes = {}
    for name in DIVIDED:
        if limit := getattr(config, name):
            changes[name] = math.ceil(limit / config.smtp_processes)
    return config.replace(**changes)


def _doubled(seconds: float, times: int, most: float) -> float:
    """Twice as long each time, up to `most`.

    >>> _doubled(1.0, 3, 60.0), _doubled(1.0, 100_000, 60.0)
    (8.0, 60.0)
    """
    return min(seconds * 2.0 ** min(times, 30), most)
