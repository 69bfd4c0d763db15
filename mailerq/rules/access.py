"""Who may connect, and who may send to whom."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Sequence
from functools import lru_cache

__all__ = ["Access", "domain_of", "is_loopback"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def domain_of(address: str) -> str:
    """What stands behind the last "@", in lower case and without a closing dot."""
    return address.rpartition("@")[2].lower().rstrip(".")


class Access:
    """The access rules of one server: `smtp-range`, `smtp-relay-range`, `smtp-local-domains`.

    An empty `clients` admits everybody, an empty `relays` lets nobody relay without a login.
    """

    def __init__(
        self,
        clients: Sequence[Network],
        relays: Sequence[Network],
        local_domains: Collection[str],
    ) -> None:
        self._clients = tuple(clients)
        self._relays = tuple(relays)
        self._local_domains = frozenset(domain_of("@" + name) for name in local_domains)

    def may_connect(self, client: str) -> bool:
        return not self._clients or _within(client, self._clients)

    def may_relay(self, client: str) -> bool:
        """Whether that client may send to anybody without a login."""
        return _within(client, self._relays)

    def is_local(self, recipient: str) -> bool:
        """Whether anybody may send to that recipient.

        Only the domain counts, so a route that hides in the local part gets nobody further:
        ``victim%elsewhere.test@local.test`` is a mailbox of local.test and nothing else.
        The bare ``postmaster`` is always at home (RFC 5321, section 4.5.1).
        """
        return "@" not in recipient or domain_of(recipient) in self._local_domains


@lru_cache(maxsize=4096)
def _within(client: str, networks: tuple[Network, ...]) -> bool:
    address = ipaddress.ip_address(client.partition("%")[0])
    return any(address.version == network.version and address in network for network in networks)


@lru_cache(maxsize=4096)
def is_loopback(client: str) -> bool:
    """Whether that address is this host's own."""
    return ipaddress.ip_address(client.partition("%")[0]).is_loopback
