"""Whose x-mq-* fields count, and which."""

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

    To relay and to steer are two things: a client that may send to anybody has no say by that
    in the queues, addresses and relays of its operator.
    """

    def __init__(self, config: Config, rights: Rights) -> None:
        self.others = rights
        """For clients that may relay and are in neither list."""
        self._networks = config.smtp_extract_range
        self._logins = frozenset(config.smtp_extract_logins)

    @classmethod
    def of(cls, config: Config) -> Self:
        """What the settings say. Raises `ConfigError` for a name that no field has."""
        try:
            rights = rights_of(config.smtp_extract, longest=config.max_delivertime)
        except ValueError as error:
            raise ConfigError(config.origin("smtp-extract"), f"smtp-extract: {error}") from None
        return cls(config, rights)

    def rights(self, client: str, login: str, *, authenticated: bool) -> Rights:
        """What the fields of a client may do that may relay; without a login it is empty."""
        if self._logins and authenticated:
            if EVERY_LOGIN in self._logins or login in self._logins:
                return EVERYTHING
        if self._networks and is_within(client, self._networks):
            return EVERYTHING
        return self.others
