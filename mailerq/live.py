"""The settings in force: one immutable, numbered snapshot, which a reload replaces as a whole.

Code reads a setting from `Live.current` when needed, once for a transaction or an attempt, and
keeps no copy for longer. `fixed` settings keep their value until a restart.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mailerq.config import SETTINGS, Config, Setting

__all__ = ["Change", "Live", "Reload", "Snapshot", "alike"]


class Change(NamedTuple):
    """A changed setting, in words; `where` is the place of the new value."""

    key: str
    old: str
    new: str
    where: str

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new} ({self.where})"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All settings, their version number, and when they took effect (seconds since 1970)."""

    config: Config
    number: int = 1
    loaded: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Reload:
    """The outcome of a reload: the snapshot, its changes, and what it cannot change.

    `pending` are changes that need a restart; the snapshot has the old values. `notes` lists what
    could not be read again and stays as before.
    """

    snapshot: Snapshot
    changed: tuple[Change, ...]
    pending: tuple[Change, ...]
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """Changes that did not take effect."""
        return [*(f"needs a restart: {change}" for change in self.pending), *self.notes]


class Live:
    """Holds the current snapshot. Any thread may read it; one thread replaces it."""

    __slots__ = ("current",)

    def __init__(self, config: Config, number: int = 1) -> None:
        self.current = Snapshot(config, number)

    def plan(self, config: Config, number: int | None = None) -> Reload:
        """What an exchange for `config` would change.

        Raises `ConfigError` if `config` contradicts a fixed setting.
        """
        before = self.current.config
        pending = tuple(_changes(config, before, fixed=True))
        new = _with_fixed(config, before) if pending else config
        changed = tuple(_changes(new, before, fixed=False))
        number = self.current.number + 1 if number is None else number
        return Reload(Snapshot(new, number), changed, pending)

    def exchange(self, snapshot: Snapshot) -> None:
        self.current = snapshot


def alike(one: Config, other: Config, *names: str) -> bool:
    """Whether all of these settings (attributes) are equal in both."""
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _changes(config: Config, before: Config, *, fixed: bool) -> Iterator[Change]:
    for setting in SETTINGS:
        if setting.fixed is fixed and not alike(config, before, setting.attribute):
            old, new = (_shown(setting, each) for each in (before, config))
            yield Change(setting.key, old, new, config.origin(setting.key))


def _shown(setting: Setting, config: Config) -> str:
    return setting.show(getattr(config, setting.attribute))


def _with_fixed(config: Config, before: Config) -> Config:
    """The new settings, with old values and places for the fixed ones."""
    fixed = {setting.attribute for setting in SETTINGS if setting.fixed}
    kept: dict[str, Any] = {name: getattr(before, name) for name in fixed}
    origins = {name: where for name, where in config.origins.items() if name not in fixed}
    origins |= {name: where for name, where in before.origins.items() if name in fixed}
    return dataclasses.replace(config, **kept, origins=origins)
