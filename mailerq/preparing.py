"""Every step of a reload that can fail, before anything changes; what settings add up to."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple, TypeVar

from mailerq.config import Config
from mailerq.errors import ConfigError, Problem
from mailerq.inbound.terms import Terms
from mailerq.live import alike
from mailerq.net import unbound
from mailerq.net.client_tls import ClientTls
from mailerq.net.logs import open_log
from mailerq.net.slots import Slots
from mailerq.rules.answers import Answers
from mailerq.rules.shaping import Shaping
from mailerq.rules.signing import SigningFile

__all__ = [
    "LOGS", "Prepared", "count_connections", "count_incoming", "count_outgoing", "prepare",
    "writable",
]  # fmt: skip

log = logging.getLogger("mailerq")

SPARE_DESCRIPTORS: Final = 64
"""Descriptors reserved for the queue, logs and plugins."""

OUTGOING_RESERVE: Final = 50
"""Connections reserved for outgoing mail; at most a tenth of all are reserved."""

LOGS: Final = ("send_log_file", "received_log_file", "refused_log_file")

Part = TypeVar("Part")


class Prepared(NamedTuple):
    """What settings name: the terms of incoming sessions, the limits of deliveries, the patterns
    for replies, the TLS of deliveries, and the descriptors of logs that move."""

    terms: Terms
    shaping: Shaping
    answers: Answers | None
    tls: ClientTls
    logs: dict[str, int]


def prepare(
    config: Config, before: Config, terms: Terms, tls: ClientTls, notes: list[str]
) -> Prepared:
    """Read what the settings name, in place of what was read `before`.

    Raises `ConfigError` with all mistakes. Each of `notes` is about something that stays as it was.
    """
    logs: dict[str, int] = {}
    wrong: list[Problem] = list(unbound.problems(config))

    def part(make: Callable[[], Part]) -> Part | None:
        try:
            return make()
        except ConfigError as error:
            wrong.extend(error.problems)
            return None

    def limits() -> tuple[Shaping, Answers | None]:
        shaping = Shaping.of(config)
        return shaping, Answers.of(config, shaping.providers)

    part(lambda: SigningFile.of(config))
    new_terms = part(lambda: Terms.of(config, terms, notes))
    new_limits = part(limits)
    new_tls = part(lambda: ClientTls.of(config, tls, notes))
    for name in LOGS:
        if not alike(config, before, name):
            try:
                with writable(config, name):
                    logs[name] = open_log(config.text(name) or os.devnull)
            except ConfigError as error:
                wrong += error.problems
    if new_terms is None or new_limits is None or new_tls is None or wrong:
        for file in logs.values():
            os.close(file)
        raise ConfigError.of(wrong)
    return Prepared(new_terms, *new_limits, new_tls, logs)


@contextmanager
def writable(config: Config, name: str) -> Iterator[None]:
    """Raises `ConfigError` for a log that cannot be opened."""
    try:
        yield
    except OSError as error:
        problem = f"{name.replace('_', '-')}: cannot write {config.text(name)}: {error.strerror}"
        raise ConfigError(config.origin(name), problem) from None


def count_connections(config: Config) -> int:
    """The number of connections, limited by the descriptors of this process."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors == resource.RLIM_INFINITY:
        return config.smtp_connections
    possible = max(descriptors - SPARE_DESCRIPTORS, 1)
    if possible < config.smtp_connections:
        log.warning(
            "smtp-connections: there will be %d, not %d, for this process may have %d descriptors",
            possible,
            config.smtp_connections,
            descriptors,
        )
    return min(possible, config.smtp_connections)


def count_outgoing(config: Config, connections: Slots) -> float:
    """Outgoing connections: half of all unless the settings say otherwise."""
    return config.smtp_connections_out or max(connections.limit // 2, 1)


def count_incoming(config: Config, connections: Slots) -> float:
    """Incoming connections: all but a reserve unless the settings say otherwise.

    Without the reserve, clients that hold all connections keep accepted mail from leaving.
    """
    reserve = min(OUTGOING_RESERVE, connections.limit // 10, count_outgoing(config, connections))
    return config.smtp_connections_in or connections.limit - reserve
