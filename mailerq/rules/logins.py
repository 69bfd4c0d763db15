"""Which login a message needs at the host that takes it, and where a login may go in clear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mailerq.config import Config
from mailerq.errors import AddressError
from mailerq.rules.access import is_within
from mailerq.wire.login import Login

__all__ = ["Demand", "login_of", "may_go_in_clear"]

MAX_CHARS: Final = 4096
"""Characters of a user name or a password; some passwords are tokens."""

Demand = Login
"""What a connection must prove before it takes a message."""


def login_of(properties: Mapping[str, Any], config: Config) -> Login | None:
    """The login for a message whose host is a smarthost or a sink; None if it needs none.

    The login of the settings never goes to a host that a message names. Raises `AddressError`.
    """
    if config.smtp_sink_address:
        return _configured(config.smtp_sink_username, config.smtp_sink_password)
    smarthost = properties.get("smarthost")
    if smarthost:
        return _of_message(smarthost)
    return _configured(config.smarthost_username, config.smarthost_password)


def _configured(username: str, password: str) -> Login | None:
    return Login(username, password) if username else None


def _of_message(smarthost: Mapping[str, Any]) -> Login | None:
    username, password = (_word(smarthost, name) for name in ("username", "password"))
    if not username and not password:
        return None
    if not (username and password):
        missing = "password" if username else "username"
        raise AddressError(f"property smarthost: has a login without {missing}")
    return Login(username, password)


def _word(smarthost: Mapping[str, Any], name: str) -> str:
    word = smarthost.get(name)
    if word is None:
        return ""
    if not isinstance(word, str):
        raise AddressError(f"property smarthost: {name} is no string")
    if len(word) > MAX_CHARS or any(char == "\0" or "\ud800" <= char <= "\udfff" for char in word):
        raise AddressError(f"property smarthost: {name} cannot be sent")
    return word


def may_go_in_clear(address: str, config: Config) -> bool:
    """Whether a login may go to an address over a connection without TLS."""
    return is_within(address, config.smtp_out_clear_range)
