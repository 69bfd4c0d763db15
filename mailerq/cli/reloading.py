"""Settings that change while a daemon runs: SIGHUP and ``mailerq reload`` inside the daemon.

A single daemon and the parent of several processes read the layers again (`Source`), and report the
outcome (`tell`, `reply`). A process with an engine takes the settings with its own rights (`take`).
One of several processes is first asked whether it could (`attempt`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mailerq import faults
from mailerq.cli import logs
from mailerq.cli.serving import make_room, overdue_seconds
from mailerq.config import Config
from mailerq.errors import ConfigError, EngineError, Problem
from mailerq.live import Reload, alike

if TYPE_CHECKING:
    from mailerq.engine import Engine

__all__ = ["Reloader", "Source", "attempt", "follow", "reply", "take", "tell"]

log = logging.getLogger("mailerq")


class Source:
    """The layers that a daemon was started with: its command line, its environment, its files."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = tuple(arguments)
        self._environ = dict(os.environ)

    def load(self, problems: list[Problem]) -> tuple[Config, set[str]]:
        """The current settings; mistakes go to `problems`, and wrong settings have their defaults.

        The second part lists the settings that are wrong in every layer, so nothing is known of
        them.
        """
        from mailerq.cli.checking import unset

        config = Config.load(self._arguments, self._environ, problems=problems)
        return config, unset(config, problems)


class Reloader:
    """Reloads a daemon whose engine is in this process."""

    def __init__(self, source: Source, engine: Engine) -> None:
        self._source = source
        self._engine = engine
        self._late = False

    def hang_up(self, *, now: bool) -> None:
        """Reload on SIGHUP; if it is too early, reload once the engine has `started`."""
        self._late = not now
        if now:
            try:
                self._reload("SIGHUP")
            except (EngineError, OSError) as error:  # OSError: no descriptor is left
                log.error("SIGHUP: the settings stay as they were: %s", error)

    def started(self) -> None:
        """Reload if a SIGHUP came too early."""
        if self._late:
            self.hang_up(now=True)

    def answer(self) -> dict[str, Any]:
        """Reload for ``mailerq reload``."""
        return reply(self._reload("mailerq reload"))

    def _reload(self, cause: str) -> Reload | Sequence[Problem]:
        from mailerq.cli.checking import examine_changes

        done: Reload | Sequence[Problem]
        problems: list[Problem] = []
        config, wrong = self._source.load(problems)
        problems += examine_changes(config, self._engine.config, wrong)
        try:
            done = problems or take(self._engine, config)
        except ConfigError as error:
            done = error.problems
        tell(cause, done)
        return done


def attempt(engine: Engine, config: Config, wrong: set[str]) -> dict[str, Any]:
    """The outcome of a reload with these settings; nothing is known of those in `wrong`."""
    from mailerq.cli.checking import examine_changes

    notes: list[str] = []
    problems = list(examine_changes(config, engine.config, wrong))
    if not (problems or wrong):
        try:
            notes += engine.check(config)
        except ConfigError as error:
            problems += error.problems
    return {**reply(problems), "notes": notes}


def take(engine: Engine, config: Config, number: int | None = None, who: str = "") -> Reload:
    """Put settings in force in this process. Raises `ConfigError`, and then nothing changes."""
    before = engine.config
    new = engine.plan(config).snapshot.config  # with the account of this process
    handlers = follow(new, before)
    make_room(new)
    try:
        done = engine.reload(config, number=number)
    except ConfigError:
        for handler in handlers or ():
            handler.close()
        raise
    if handlers is not None:
        logs.install(handlers, who)
    faults.move_deadline(overdue_seconds(new))
    return done


def follow(config: Config, before: Config) -> list[logging.Handler] | None:
    """The handlers of a changed `application-log`, for `logs.install`. Raises `ConfigError`."""
    return None if alike(config, before, "application_log") else logs.handlers(config)


def tell(cause: str, done: Reload | Iterable[Problem]) -> None:
    """Log the outcome of a reload."""
    if isinstance(done, Reload):
        log.info("%s: settings %d are in force", cause, done.snapshot.number)
        for change in done.changed:
            log.info("%s: changed: %s", cause, change)
        for line in done.warnings:
            log.warning("%s: %s", cause, line)
    else:
        for problem in done:
            log.error("%s: the settings stay as they were: %s", cause, problem)


def reply(done: Reload | Iterable[Problem]) -> dict[str, Any]:
    """The reply to ``mailerq reload``."""
    if not isinstance(done, Reload):
        return {"problems": [problem._asdict() for problem in done]}
    return {
        "number": done.snapshot.number,
        "changed": [change._asdict() for change in done.changed],
        "restart": [change._asdict() for change in done.pending],
        "notes": list(done.notes),
    }
