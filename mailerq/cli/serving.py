"""What every process that serves does alike: the daemon alone, a parent, its processes."""

from __future__ import annotations

import errno
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final, NoReturn

from mailerq.config import Config
from mailerq.privileges import no_new_privileges
from mailerq.sockets import keep_little

__all__ = [
    "HURRY_SECONDS",
    "OVERDUE_SECONDS",
    "end_at_once",
    "fail",
    "join",
    "make_room",
    "prepare",
]

log = logging.getLogger("mailerq")

OTHER_DESCRIPTORS: Final = 256
"""What the process may have open beside connections: queue, logs, plugins, mail in files."""

HURRY_SECONDS: Final = 1.0
"""How long plugins may hold up a start that is to end."""

OVERDUE_SECONDS: Final = 5.0
"""How long after `shutdown-timeout` a process ends that cannot end by itself: a plugin is in a
deadlock, say. Its exit status is then EX_SOFTWARE."""

COLLECT_AFTER: Final = (10_000, 20, 50)
"""When Python looks for cycles. There are next to none, and at its own thresholds the search took
a twentieth of the processor time of a message."""


def prepare(config: Config) -> None:
    """Make the process fit to serve as many connections as it is to have, and no more than that.

    The memory of a large mail returns to the system when the mail is gone.
    """
    no_new_privileges()
    keep_little()
    gc.set_threshold(*COLLECT_AFTER)
    make_room(config)


def make_room(config: Config) -> None:
    """Let the process have as many descriptors as the connections need, as far as it may."""
    wanted = config.smtp_connections + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard):
        limits = (max(soft, min(wanted, hard)), hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def end_at_once(number: int) -> None:
    """End the process by a signal."""
    log.warning("%s again: stopping at once", signal.Signals(number).name)
    logging.shutdown()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def fail(error: BaseException) -> NoReturn:
    """Log what has ended the engine, and end the process: threads of it may wait for ever.

    That is safe: what was accepted is on disk. A descriptor that is closed is a plugin's doing.
    """
    from mailerq.plugins import stray_close

    log.critical("the engine failed", exc_info=error)
    if any(isinstance(cause, OSError) and cause.errno == errno.EBADF for cause in _causes(error)):
        stray_close("a descriptor that the process cannot do without")
    logging.shutdown()
    sys.stderr.flush()
    os._exit(os.EX_SOFTWARE)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and all that led to it."""
    if error is None:
        return
    yield error
    yield from _causes(error.__cause__ or error.__context__)
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _causes(part)


def join(addresses: Iterable[tuple[str, int]]) -> str:
    """Addresses and ports for people."""
    return ", ".join(f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip, port in addresses)
