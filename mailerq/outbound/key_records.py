"""Compare the keys that sign with their DNS records, and warn of records that do not fit.

Theory of operation
-------------------
After the start, after a reload, and each hour, `KeyRecords.run` looks for keys of `dkim-file` and
`dkim-directory` that are in force and were not compared before. A key whose name servers have
answered is compared once, until its file changes. Otherwise the next look tries again, without
a warning, because the name servers have said nothing about the key.

At most `MAX_KEYS` keys are compared in one look, `MAX_LOOK_UPS` at a time. Files are read in a
thread. Neither mail nor the end of the daemon waits for this.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import trio

from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.live import Live
from mailerq.mail.dkim_record import GOOD, standing
from mailerq.net.logs import Ration
from mailerq.net.resolver import NoHosts, Resolver
from mailerq.rules.signing import SigningFile
from mailerq.store.signing_keys import KeyProblem, SigningKey, keys_in_force, read_key

__all__ = ["KeyRecords"]

log = logging.getLogger("mailerq.delivery")

ROUND_SECONDS: Final = 3600.0
"""Time between two looks for new keys."""

MAX_KEYS: Final = 300
"""Keys that are compared in one look."""

MAX_LOOK_UPS: Final = 4
"""Records that are looked up at a time."""

MAX_COMPARED: Final = 10_000
"""Limit of keys remembered as compared; further keys are not compared."""

WARNINGS_PER_MINUTE: Final = 20

Place = tuple[str, str]
"""The name of a key's DNS record, and the path of its file."""

State = tuple[int, int, int]
"""Modification time, inode and size of a file."""


class _Due(NamedTuple):
    """A key to compare, and the state of its file."""

    domain: str
    selector: str
    path: str
    state: State
    key: SigningKey

    @property
    def name(self) -> str:
        return f"{self.selector}._domainkey.{self.domain}"


class KeyRecords:
    """The comparison of keys with their DNS records, for a daemon. `run` is its task.

    `clock` is the time, in seconds since 1970.
    """

    def __init__(
        self, live: Live, resolver: Resolver, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._live = live
        self._resolver = resolver
        self._clock = clock
        self._compared: dict[Place, State] = {}
        self._wake = trio.Event()
        self._reader = trio.CapacityLimiter(1)
        self._warn = Ration(
            log.warning,
            WARNINGS_PER_MINUTE,
            "%d more keys do not fit their DNS records; 'mailerq dkim check' names them",
        )

    def reload(self) -> None:
        """Look for keys soon: the settings have changed."""
        wake, self._wake = self._wake, trio.Event()
        wake.set()

    async def run(self) -> None:
        """Compare keys until cancelled."""
        while True:
            wake = self._wake  # before the look: it may be set meanwhile
            await self.compare()
            with trio.move_on_after(ROUND_SECONDS):
                await wake.wait()

    async def compare(self) -> None:
        """Compare the keys that are due."""
        config = self._live.current.config
        if not (config.dkim_directory or config.dkim_file):
            return
        try:
            due = await trio.to_thread.run_sync(
                self._due, config, abandon_on_cancel=True, limiter=self._reader
            )
        except (ConfigError, OSError, RuntimeError) as error:  # RuntimeError: no more threads
            log.info("keys are not compared with their DNS records now: %s", error)
            return
        slots = trio.CapacityLimiter(MAX_LOOK_UPS)
        async with trio.open_nursery() as nursery:
            for each in due:
                nursery.start_soon(self._compare_one, each, slots)
        self._warn.flush()

    def _due(self, config: Config) -> list[_Due]:
        """Find keys that were not compared before; in a thread. Raises `ConfigError` and OSError.

        Keys that cannot be read are left out: mail that needs one has the log say what is wrong.
        """
        due: list[_Due] = []
        file = SigningFile.of(config)
        for domain, selector, path in keys_in_force(config.dkim_directory, file, self._clock()):
            if len(due) >= MAX_KEYS or len(self._compared) + len(due) >= MAX_COMPARED:
                break
            try:
                found = os.stat(path)
                state = found.st_mtime_ns, found.st_ino, found.st_size
                name = f"{selector}._domainkey.{domain}"
                if self._compared.get((name, path)) != state:
                    due.append(_Due(domain, selector, path, state, read_key(path)[0]))
            except (KeyProblem, OSError) as error:
                log.debug("%s is not compared with its DNS record: %s", path, error)
        return due

    async def _compare_one(self, due: _Due, slots: trio.CapacityLimiter) -> None:
        async with slots:
            texts = await self._resolver.texts(due.name)
        if isinstance(texts, NoHosts):
            log.info("%s is not compared with its DNS record: %s", due.path, texts.description)
            return
        self._compared[due.name, due.path] = due.state
        found = standing(texts[0], due.key.algorithm, due.key.public)
        if found.state != GOOD:
            self._warn(
                "verifiers refuse signatures of the key %s: the DNS record %s does not fit: %s."
                " Publish the record that 'mailerq dkim show %s %s' prints",
                due.path, due.name, found.reason, due.domain, due.selector,
            )  # fmt: skip
