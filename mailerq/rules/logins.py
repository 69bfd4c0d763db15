"""What a message itself demands of connections, its login at the host, and where that may go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mailerq.config import Config
from mailerq.errors import AddressError
from mailerq.rules.access import is_within
from mailerq.rules.security import LEVELS, NOTHING, Demands
from mailerq.wire.login import Login

__all__ = ["demands_of", "login_of", "may_go_in_clear"]

MAX_CHARS: Final = 4096
"""Characters of a user name or a password; some passwords are tokens."""


def demands_of(properties: Mapping[str, Any], login: Login | None) -> Demands:
    """What a message demands of the connections that take it.

    Its ``security``, and the ``secure`` of its ``smarthost``, add to what the operator demands;
    ``optional`` and ``none`` do without TLS where nothing demands TLS. Raises `AddressError`.

    >>> demands_of({"security": "verified"}, None), demands_of({"security": "optional"}, None)
    (Demands(verified), Demands(none))
    """
    security, smarthost = properties.get("security"), properties.get("smarthost")
    secure = smarthost.get("secure") if smarthost else None
    # A report is better late or seen than lost (RFC 8689, section 5): for mail of the null sender
    # REQUIRETLS is a wish, which peers that can keep it get.
    requiretls = properties.get("requiretls") is True and properties.get("envelope") != ""
    if security is None and secure is None and login is None and not requiretls:
        return NOTHING
    demands = Demands(
        requiretls=requiretls, logins=frozenset() if login is None else frozenset((login,))
    )
    for name, word in (("security", security), ("smarthost: secure", secure)):
        if word is None:
            continue
        if isinstance(word, bool) or word in (0, 1):
            word = "opportunistic" if word else "none"
        if word in ("optional", "none"):
            demands |= Demands(plain=True)
        elif isinstance(word, str) and word in LEVELS:
            demands |= Demands(LEVELS[word])
        else:
            raise AddressError(f"property {name} is none of {', '.join(LEVELS)}")
    return demands


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
