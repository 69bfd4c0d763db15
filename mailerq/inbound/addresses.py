"""Local recipients: the address list in the file of `smtp-local-addresses`, and local domains."""

from __future__ import annotations

import logging
from typing import Self

from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.net.files import WatchedFile
from mailerq.rules.access import Access
from mailerq.rules.addresses import AddressList

__all__ = ["LocalAddresses", "is_local"]

log = logging.getLogger("mailerq.server")


class LocalAddresses:
    """An `AddressList` in a file, read again when the file changes; empty without a path.

    If the file can no longer be read, the last list stays in force. Raises ValueError if the first
    read fails.
    """

    def __init__(self, path: str = "") -> None:
        self._file = WatchedFile(path, AddressList.parse) if path else None
        self._list = AddressList()
        self._broken = False
        if self._file is not None:
            try:
                self._list = self._file.read()
            except (OSError, ValueError) as error:
                raise ValueError(f"cannot use {path}: {error}") from None

    @classmethod
    def of(cls, config: Config) -> Self:
        """The list that the settings name. Raises `ConfigError`."""
        try:
            return cls(config.smtp_local_addresses)
        except ValueError as error:
            where = config.origin("smtp-local-addresses")
            raise ConfigError(where, f"smtp-local-addresses: {error}") from None

    def has(self, address: str) -> bool:
        """Whether the list has an address now."""
        if self._file is None:
            return False
        try:
            self._list = self._file.read()
            self._broken = False
        except (OSError, ValueError) as error:
            if not self._broken:
                log.warning("%s: %s; what stood there before still holds", self._file.path, error)
            self._broken = True
        return self._list.has(address)


def is_local(recipient: str, access: Access, listed: LocalAddresses) -> bool:
    """Whether anybody may send to a recipient, whose mail ends here."""
    return access.is_in_local_domain(recipient) or listed.has(recipient)
