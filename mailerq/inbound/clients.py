"""Counters per client: connections, and the mail and errors of the last minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from mailerq.config import Config
from mailerq.rules.access import Access
from mailerq.rules.limits import ClientLimits, network_of
from mailerq.wire import smtp
from mailerq.wire.smtp import Reply

__all__ = ["Clients"]


class Clients:
    """Limits per client address. Clients that may relay by their address have none.

    May be used from any thread.
    """

    def __init__(
        self, config: Config, access: Access, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}
        self._rates = ClientLimits({})
        self.set_limits(config, access)

    def set_limits(self, config: Config, access: Access) -> None:
        """Apply these settings from now on; counts are kept."""
        with self._lock:
            self._access = access
            self._most = config.smtp_client_maxconnections
            self._prefixes = config.smtp_client_prefix4, config.smtp_client_prefix6
            self._rates.set_bounds(
                {
                    "connects": config.smtp_client_connects,
                    "messages": config.smtp_client_messages,
                    "recipients": config.smtp_client_recipients,
                    "errors": config.smtp_client_errors,
                    "logins": config.smtp_client_logins,
                }
            )

    def came(self, client: str) -> Reply | str:
        """Count a connection, or return the refusal.

        Returns the network that the connection counts for, empty if it does not count.
        """
        if self._access.may_relay(client):
            return ""
        network = network_of(client, *self._prefixes)
        with self._lock:
            now_open = self._open.get(network, 0)
            if now_open >= self._most > 0:
                return smtp.TOO_MANY_CONNECTIONS
            if not self._rates.take(network, "connects", self._clock()):
                return smtp.CONNECTS_TOO_OFTEN
            self._open[network] = now_open + 1
        return network

    def left(self, network: str) -> None:
        """End a connection that `came` counted for this network."""
        if not network:
            return
        with self._lock:
            if self._open[network] > 1:
                self._open[network] -= 1
            else:
                del self._open[network]

    def may(self, client: str, what: str, count: int = 1) -> bool:
        """Count "messages", "recipients", "errors" or "logins"; False above the limit."""
        if self._access.may_relay(client):
            return True
        network = network_of(client, *self._prefixes)
        with self._lock:
            return self._rates.take(network, what, self._clock(), count)

    def did_not(self, client: str, what: str) -> None:
        """Take back a count of `may`."""
        network = network_of(client, *self._prefixes)
        with self._lock:
            self._rates.give_back(network, what)
