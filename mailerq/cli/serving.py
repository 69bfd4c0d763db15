"""Shared by every serving process: a single daemon, a parent, its processes."""

from __future__ import annotations

import errno
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn

from mailerq.address import host_port
from mailerq.config import Config
from mailerq.privileges import no_new_privileges
from mailerq.sockets import keep_little

if TYPE_CHECKING:
    import trio

    from mailerq.engine import Engine

__all__ = [
    "OVERDUE_SECONDS",
    "RELOAD_SIGNAL",
    "STOP_SIGNALS",
    "fail",
    "join",
    "make_room",
    "obey",
    "overdue_seconds",
    "prepare",
    "stop_soon",
]

log = logging.getLogger("mailerq")

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
RELOAD_SIGNAL: Final = signal.SIGHUP

OTHER_DESCRIPTORS: Final = 256
"""Descriptors beside connections: queue, logs, plugins, mail in files."""

HURRY_SECONDS: Final = 1.0
"""How long plugins may delay a start that is to end."""

OVERDUE_SECONDS: Final = 5.0
"""Time after `shutdown-timeout` before a process ends that cannot end by itself, for example
because a plugin is in a deadlock. The exit status is then EX_SOFTWARE.
"""

COLLECT_AFTER: Final = (10_000, 20, 50)
"""Thresholds of Python's search for cycles. There are almost none, and at the default thresholds
the search took a twentieth of the processor time of a message.
"""


def prepare(config: Config) -> None:
    """Prepare the process for its number of connections, and no more.

    The memory of a large mail returns to the system when the mail is gone.
    """
    no_new_privileges()
    keep_little()
    gc.set_threshold(*COLLECT_AFTER)
    make_room(config)


def make_room(config: Config) -> None:
    """Raise the descriptor limit to what the connections need, as far as allowed."""
    wanted = config.smtp_connections + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard):
        limits = (max(soft, min(wanted, hard)), hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def obey(
    signals: AsyncIterator[int],
    stopping: trio.Event,
    *,
    stop: Callable[[], object],
    reload: Callable[[], object],
    abandon: Callable[[], object] = lambda: None,
) -> None:
    """The first signal to stop calls `stop`, which sets `stopping`; the second ends the process.

    The second is safe at any moment: accepted mail is on disk. `abandon` is called before.
    """
    async for number in signals:
        if number == RELOAD_SIGNAL:
            reload()
        elif not stopping.is_set():
            log.info("%s: stopping", signal.Signals(number).name)
            stop()
        else:
            abandon()
            _end_at_once(number)


def stop_soon(engine: Engine, started: trio.Event, stop: trio.Event) -> None:
    """Let an engine stop in its time; a start that is under way is to end soon."""
    stop.set()
    if not started.is_set():
        engine.plugins.timeout = HURRY_SECONDS


def overdue_seconds(config: Config) -> float:
    """Time from a signal to the end of a process that cannot end by itself."""
    return config.shutdown_timeout + OVERDUE_SECONDS


def _end_at_once(number: int) -> None:
    """End the process by a signal."""
    log.warning("%s again: stopping at once", signal.Signals(number).name)
    logging.shutdown()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def fail(error: BaseException) -> NoReturn:
    """Log the error that ended the engine, and end the process: its threads may wait for ever.

    That is safe: accepted mail is on disk. If a descriptor is closed, a plugin did it.
    """
    from mailerq.plugins import stray_close

    log.critical("the engine failed", exc_info=error)
    if any(isinstance(cause, OSError) and cause.errno == errno.EBADF for cause in _causes(error)):
        stray_close("a descriptor that the process cannot do without")
    logging.shutdown()
    sys.stderr.flush()
    os._exit(os.EX_SOFTWARE)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and all its causes."""
    if error is None:
        return
    yield error
    yield from _causes(error.__cause__ or error.__context__)
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _causes(part)


def join(addresses: Iterable[tuple[str, int]]) -> str:
    """Addresses and ports for people."""
    return ", ".join(host_port(*address) for address in addresses)
