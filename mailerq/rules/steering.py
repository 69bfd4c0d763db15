"""Decide which x-mq-* fields of a client have an effect."""

from __future__ import annotations

from typing import Final, Self

from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.mail.extract import EVERYTHING, Rights, rights_of
from mailerq.rules.access import is_within

__all__ = ["Steering"]

EVERY_LOGIN: Final = "*"


class Steering:
    """The settings `smtp-extract`, `smtp-extract-range` and `smtp-extract-logins`.

    The right to relay gives no control over the queues, addresses and smarthosts of the operator:
    that is a separate right.
    """

    def __init__(self, config: Config, rights: Rights) -> None:
        self.others = rights
        """The rights of clients that may relay and are in neither list."""
        self._networks = config.smtp_extract_range
        self._logins = frozenset(config.smtp_extract_logins)

    @classmethod
    def of(cls, config: Config) -> Self:
        """Read the settings. Raises `ConfigError` for an unknown field."""
        try:
            rights = rights_of(config.smtp_extract, longest=config.max_delivertime)
        except ValueError as error:
            raise ConfigError(config.origin("smtp-extract"), f"smtp-extract: {error}") from None
        return cls(config, rights)

    def rights(self, client: str, login: str, *, authenticated: bool) -> Rights:
        """Return the rights of a client that may relay. `login` is empty without a login."""
        if self._logins and authenticated:
            if EVERY_LOGIN in self._logins or login in self._logins:
                return EVERYTHING
        if self._networks and is_within(client, self._networks):
            return EVERYTHING
        return self.others
