"""The parent of several processes: it starts them, watches them, and answers for them.

Theory of operation
-------------------
Each process (`mailerq.cli.supervisor.child`) is a whole engine with a share of the queue
directory. The processes listen on the same addresses, and the kernel spreads connections over
them. The parent takes no mail. It keeps the addresses reserved, answers on the control socket
for all processes together, and starts a process again when one has ended.

A process that repeatedly ends soon after its start is started later each time. Meanwhile another
process adopts its share (`mailerq.queues.adoption`); the parent has no part in that.

Guarantees
----------
- A share is open in at most one process: its lock ensures that, whatever happens here.
- When the parent is gone its processes stop in their time.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

import trio

from mailerq import __version__
from mailerq.cli import logs
from mailerq.cli.common import complain
from mailerq.cli.reloading import Source, follow, reply, tell
from mailerq.cli.serving import OVERDUE_SECONDS, RELOAD_SIGNAL, STOP_SIGNALS, join, obey
from mailerq.cli.supervisor.process import Ended, NoStart, Process, describe
from mailerq.cli.supervisor.relay import relay
from mailerq.config import Config
from mailerq.errors import ConfigError, MailerqError, Problem
from mailerq.inbound.listener import PORT_OPTIONS, reserve
from mailerq.live import Live, Reload, Snapshot
from mailerq.message import encode_properties, format_time
from mailerq.net import control
from mailerq.net.seen import merged_answers, merged_pages
from mailerq.net.statistics import total
from mailerq.net.tracing import Wanted
from mailerq.privileges import keep_for_ports

__all__ = ["serve"]

log = logging.getLogger("mailerq")

DIVIDED: Final = (
    "smtp_connections",
    "smtp_connections_in",
    "smtp_connections_out",
    "smtp_handshakes",
    "max_memory",
)
"""Limits of the whole server; each process gets its part."""

STEADY_SECONDS: Final = 10.0
"""A process that ran this long did not end because of its start."""

MAX_PAUSE_SECONDS: Final = 60.0
"""Maximum pause before the restart of a process that ends soon after each start."""

ASK_SECONDS: Final = 2.0
"""Timeout for the status of a process."""

CHANGE_SECONDS: Final = 8.0
"""Timeout for a process to change messages in its queue."""

RELOAD_SECONDS: Final = 5.0
"""Timeout for a process to try settings, and to take them."""

BRING_PAUSES: Final = (0.1, 0.3, 1.0, 2.0)
"""Seconds after which a process that could not take the settings is asked to take them again."""

IDS_SECONDS: Final = 0.4
"""Timeout for ids before another process is asked: an injector waits at most a second."""

MAX_NAMES: Final = 1000
"""Characters of a request about policies, which has the name of a domain."""

KILL_SECONDS: Final = 2 * OVERDUE_SECONDS
"""Time after `shutdown-timeout` before a process that has not stopped is killed. Earlier the
process ends itself, and names the plugin it was in.
"""

UNCLEAN: Final = frozenset({
    os.EX_SOFTWARE, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGFPE,
    -signal.SIGILL, -signal.SIGABRT,
})  # fmt: skip
"""Exits of a process that crashes or hangs during a stop: the parent then ends with EX_SOFTWARE."""


async def serve(config: Config, source: Source) -> int:
    """Run `smtp-processes` engines until SIGTERM or SIGINT; the exit status."""
    with reserve(config) as reserved:
        keep_for_ports(account=bool(config.user))
        return await _Parent(config, reserved, source).run()


class _Parent:
    def __init__(self, config: Config, reserved: Config, source: Source) -> None:
        self._settings = Live(config)
        self._ports = {name: getattr(reserved, name) for name in PORT_OPTIONS}
        self._part = self._part_of(self._settings.current)
        """The settings in force in the form for each process."""
        self._source = source
        self._count = config.smtp_processes
        self._started = time.time()
        self._starts = dict.fromkeys(range(self._count), 0)
        self._children: dict[int, Process] = {}
        """The serving processes."""
        self._begun: dict[int, Process] = {}
        """The serving processes and the starting ones."""
        self._reloading = trio.Lock()
        self._started_all = trio.Event()
        self._exit_status = os.EX_OK
        self._stop = trio.Event()
        self._nursery: trio.Nursery

    async def run(self) -> int:
        """Serve until a signal; the exit status."""
        with trio.open_signal_receiver(*STOP_SIGNALS, RELOAD_SIGNAL) as signals:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._obey, signals)
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
        """Start all processes, the first one first, so that each mistake is reported once."""
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
        directory = self._settings.current.config.queue_directory
        await self._nursery.start(control.serve, directory, self._commands())
        self._started_all.set()
        log.info(
            "mailerq %s listens on %s, with %d processes", __version__, join(addresses), self._count
        )

    async def _obey(self, signals: AsyncIterator[int]) -> None:
        """The first signal stops all processes in their time, the second one ends them."""
        hang_up = partial(self._nursery.start_soon, self._hang_up)
        await obey(signals, self._stop, stop=self._end, reload=hang_up, abandon=self._kill)

    def _end(self) -> None:
        """Tell all processes to stop; their keepers wait for them."""
        self._stop.set()
        for child in self._begun.values():
            child.leave()
        self._nursery.start_soon(self._kill_late)

    async def _kill_late(self) -> None:
        await trio.sleep(self._settings.current.config.shutdown_timeout + KILL_SECONDS)
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
        """Keep a process for a share, one after another. Raises `NoStart` for the first."""
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
            failures = 0 if seconds >= STEADY_SECONDS else failures + 1
            if failures:
                with trio.move_on_after(_doubled(1.0, failures - 1, MAX_PAUSE_SECONDS)):
                    await self._stop.wait()
            if self._stop.is_set():
                return None

    async def _live(self, index: int, ready: Callable[[list[tuple[str, int]]], object]) -> float:
        """One process from its start to its end; the seconds it served. Raises `NoStart`."""
        child = await Process.start(index)
        self._begun[index] = child
        self._starts[index] += 1
        self._nursery.start_soon(child.listen)
        if self._stop.is_set():
            child.leave()
        try:
            part = self._part
            addresses = await child.until_ready(part)
            served = time.monotonic()
            self._children[index] = child
            ready(addresses)
            if part is not self._part:
                self._nursery.start_soon(self._bring, child)
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
        return time.monotonic() - served

    # Requests of others

    def _commands(self) -> control.Commands:
        return {
            "status": self._status,
            "wake": self._wake,
            "rows": self._look_at_rows,
            "explain": self._explain,
            "top": self._top,
            "message-ids": self._message_ids,
            "reload": self._answer,
            "queue-change": self._change,
            "note": control.note,
            "policies": self._look_at_policies,
            "trace": self._trace,
        }

    async def _status(self, request: control.Request) -> dict[str, Any]:
        """The totals of all processes, and a row for each."""
        said = await self._ask_all("status")
        trees = [reply for reply in said.values() if reply is not None]
        whole, snapshot = total(trees), self._settings.current
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
                "settings": reply["settings"]["number"] if reply else None,
                "shares": reply["shares"] if reply else [],
            })  # fmt: skip
        return {
            **whole,
            "started": format_time(self._started),
            "uptime": time.time() - self._started,
            "pid": os.getpid(),
            "settings": {"number": snapshot.number, "loaded": format_time(snapshot.loaded)},
            "processes": rows,
        }

    def _wake(self, request: control.Request) -> dict[str, bool]:
        everything = bool(request.get("everything"))
        # Nobody waits for a process that hangs.
        self._nursery.start_soon(partial(self._ask_all, "wake", everything=everything))
        return {"ok": True}

    async def _look_at_rows(self, request: control.Request) -> dict[str, bool]:
        """Have all processes put in force what the file of rows says."""
        replies = await self._ask_all("rows")
        return {"ok": None not in replies.values()}

    async def _look_at_policies(self, request: control.Request) -> dict[str, bool]:
        """Have all processes act on changed policies, see `Published.command`."""
        known = {name: request[name] for name in ("forget", "flush", "send") if name in request}
        if len(str(known)) > MAX_NAMES:
            raise MailerqError("the request is too long")
        replies = await self._ask_all("policies", **known)
        return {"ok": None not in replies.values()}

    async def _explain(self, request: control.Request) -> dict[str, Any]:
        """One answer from those of all processes."""
        answers = await self._pass_to_all("explain", request)
        for index, answer in answers.items():
            for flow in (flow for part in answer.get("from", ()) for flow in part["flows"]):
                flow["process"] = index
        return merged_answers(list(answers.values()))

    async def _top(self, request: control.Request) -> dict[str, Any]:
        """One page from those of all processes."""
        return merged_pages(list((await self._pass_to_all("top", request)).values()))

    async def _pass_to_all(
        self, command: str, request: control.Request
    ) -> dict[int, dict[str, Any]]:
        """The reply of each process that answers. Raises `MailerqError` if none does."""
        with _in_memory(encode_properties(request)) as file:
            replies = await self._ask_all(command, file=file)
        found = {index: reply for index, reply in sorted(replies.items()) if reply is not None}
        if not found:
            raise MailerqError("no process answers")
        return found

    def _trace(self, request: control.Request) -> control.Lines:
        """The lines of all processes."""
        wanted = Wanted.of(request)
        return control.Lines(partial(relay, self._children.values, request, wanted.seconds))

    async def _message_ids(self, request: control.Request) -> dict[str, Any]:
        """Ids from one process; those that owe an answer are asked last."""
        count = request.get("count", 1)
        for child in sorted(self._children.values(), key=lambda child: len(child.questions)):
            with suppress(Ended):
                return await child.ask("message-ids", IDS_SECONDS, count=count)
        raise MailerqError("no process answers")

    async def _change(self, request: control.Request) -> dict[str, Any]:
        """Pass an order of an operator on to the process that delivers from its share."""
        share, silent = request.get("share"), 0
        with _in_memory(encode_properties(request)) as file:
            for child in sorted(self._children.values(), key=lambda child: child.index != share):
                try:
                    reply = await child.ask("queue-change", CHANGE_SECONDS, file=file)
                except Ended:
                    silent += 1
                    continue
                if reply:
                    return reply
        if silent:
            raise MailerqError(f"{silent} processes do not answer")
        return {}

    # Other settings

    async def _hang_up(self) -> None:
        await self._started_all.wait()
        try:
            with suppress(MailerqError):  # logged already
                await self._reload("SIGHUP")
        except OSError as error:  # no descriptor is left
            log.error("SIGHUP: the settings stay as they were: %s", error)

    async def _answer(self, request: control.Request) -> dict[str, Any]:
        # The client may not wait for the outcome; all processes must still hear of the settings.
        with trio.CancelScope(shield=True):
            done = await self._reload("mailerq reload")
        return reply(done)

    async def _reload(self, cause: str) -> Reload | Sequence[Problem]:
        """Read the settings, let one process try them, then let all take them."""
        done: Reload | Sequence[Problem]
        async with self._reloading:
            try:
                done = await self._exchange()
            except ConfigError as error:
                done = error.problems
            except MailerqError as error:
                log.error("%s: the settings stay as they were: %s", cause, error)
                raise
            tell(cause, done)
            if isinstance(done, Reload):
                async with trio.open_nursery() as nursery:
                    for child in list(self._children.values()):
                        nursery.start_soon(self._bring, child)
        return done

    async def _exchange(self) -> Reload:
        """Put other settings in force here. Raises `ConfigError` with all mistakes."""
        problems: list[Problem] = []
        config, wrong = self._source.load(problems)
        if problems:
            with suppress(MailerqError):  # wrong settings have defaults; nobody may answer
                part = self._part_of(self._settings.plan(config).snapshot)
                problems += (await self._try(part, wrong))[0]
            raise ConfigError.of(problems)
        plan = self._settings.plan(config)
        part = self._part_of(plan.snapshot)
        problems, notes = await self._try(part, wrong)
        if problems:
            raise ConfigError.of(problems)
        handlers = follow(plan.snapshot.config, self._settings.current.config)
        if handlers is not None:
            logs.install(handlers, "")
        self._settings.exchange(plan.snapshot)
        self._part = part
        return replace(plan, notes=tuple(notes))

    async def _try(self, part: Snapshot, wrong: set[str]) -> tuple[list[Problem], list[str]]:
        """What prevents a process, with its rights, from using these settings, and its notes."""
        with _written(part, wrong) as file:
            for child in sorted(self._children.values(), key=lambda child: len(child.questions)):
                try:
                    said = await child.ask("reload", RELOAD_SECONDS, file=file, **{"try": True})
                except Ended:
                    continue
                return [Problem(**problem) for problem in said["problems"]], said["notes"]
        raise MailerqError("no process answers")

    async def _bring(self, child: Process) -> None:
        """Let a process take the settings in force. One that cannot is restarted with them.

        A shortage of descriptors, here or there, may pass, so the process is asked several times.
        """
        for pause in (*BRING_PAUSES, 0.0):
            number = self._part.number
            try:
                with _written(self._part, set()) as file:
                    await child.ask("reload", RELOAD_SECONDS, file=file)
                return
            except Ended as error:
                log.warning("settings %d: %s; it takes them when it goes on", number, error)
                return
            except MailerqError as error:
                again = f"it is asked again in {pause:g} s" if pause else "it is started anew"
                log.error("settings %d are not taken, %s: %s", number, again, error)
            await trio.sleep(pause)
        child.leave()

    def _part_of(self, snapshot: Snapshot) -> Snapshot:
        """The settings of one process: the reserved ports, its part of the limits."""
        ports = {
            name: ports
            for name, ports in self._ports.items()
            if ports != getattr(snapshot.config, name)
        }
        return replace(snapshot, config=_divide(snapshot.config.replace(**ports)))

    async def _ask_all(self, command: str, **arguments: Any) -> dict[int, dict[str, Any] | None]:
        """The reply of each process, None if it does not answer."""
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


@contextmanager
def _written(part: Snapshot, wrong: set[str]) -> Iterator[int]:
    """A file in memory with settings for processes. Raises `MailerqError`."""
    with _in_memory(pickle.dumps((part.config, part.number, wrong))) as file:
        yield file


@contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    """A file in memory, for what does not fit into a request. Raises `MailerqError`."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(os.memfd_create("mailerq"), "wb"))
            file.write(content)
            file.flush()
        except OSError as error:
            raise MailerqError(f"it cannot be passed on: {error.strerror}") from error
        yield file.fileno()


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
