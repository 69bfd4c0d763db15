"""The keys of signed return addresses, from the file of `verp-key-file`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

from mailerq.errors import ConfigError, Problem
from mailerq.mail import verp
from mailerq.rules.tables import file_bytes

if TYPE_CHECKING:
    from mailerq.config import Config

__all__ = ["NO_REPORTS", "Reports", "read_keys"]

KEYS_KEY: Final = "verp-key-file"


class Reports:
    """The keys in force. Immutable; any thread may use it."""

    def __init__(self, verp_keys: tuple[verp.Key, ...] = ()) -> None:
        self.verp_keys = verp_keys

    @classmethod
    def of(cls, config: Config) -> Self:
        """Read what the settings name. Raises `ConfigError` with all mistakes."""
        return cls(read_keys(config))


NO_REPORTS: Final = Reports()


def read_keys(config: Config) -> tuple[verp.Key, ...]:
    """The keys of `verp-key-file`, the signing one first. Raises `ConfigError`."""
    path = config.verp_key_file
    if not path:
        return ()
    data = file_bytes(path, KEYS_KEY, config.origin(KEYS_KEY))
    try:
        return verp.parse_keys(data.decode())
    except UnicodeDecodeError:
        text = "is not UTF-8"
    except ValueError as error:
        text = str(error)
    problem = Problem(config.origin(KEYS_KEY), f"{KEYS_KEY}: {path}: {text}", KEYS_KEY)
    raise ConfigError.of([problem])
