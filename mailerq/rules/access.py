"""The access rules: which clients may connect, and to which recipients they may send."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Self

from mailerq.address import parse_domain, parse_mailbox, parse_peer
from mailerq.config import Config
from mailerq.errors import AddressError

__all__ = ["Access", "domain_of", "is_within"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def domain_of(address: str) -> str:
    """Return the text after the last "@", in lower case and without a trailing dot."""
    return address.rpartition("@")[2].lower().rstrip(".")


def _ascii(domain: str) -> str:
    if domain.isascii():
        return domain
    try:
        return parse_domain(domain)
    except AddressError:
        return domain


class Access:
    """The access rules of one server, from the settings of networks and domains.

    With empty `clients`, everybody may connect. With empty `relays`, relaying needs a login.
    """

    def __init__(
        self,
        clients: Sequence[Network],
        relays: Sequence[Network],
        local_domains: Collection[str] = (),
        *,
        relay_domains: Collection[str] = (),
        proxies: Sequence[Network] = (),
        xclients: Sequence[Network] = (),
    ) -> None:
        self._clients = tuple(clients)
        self._relays = tuple(relays)
        # Cached by client only: called several times for each mail, and networks hash slowly.
        self._may_relay = lru_cache(maxsize=4096)(self._look_up_relay)
        self._proxies = tuple(proxies)
        self._xclients = tuple(xclients)
        self._local_domains = _names(local_domains)
        self._relay_domains = _names(relay_domains)

    @classmethod
    def of(cls, config: Config) -> Self:
        """The rules in the settings."""
        return cls(
            config.smtp_range,
            config.smtp_relay_range,
            config.smtp_local_domains,
            relay_domains=config.smtp_relay_domains,
            proxies=config.smtp_proxy,
            xclients=config.smtp_xclient_range,
        )

    def may_connect(self, client: str) -> bool:
        return not self._clients or is_within(client, self._clients)

    def may_relay(self, client: str) -> bool:
        """Whether a client may send to any recipient without a login."""
        return self._may_relay(client)

    def _look_up_relay(self, client: str) -> bool:
        return is_within(client, self._relays)

    def is_proxy(self, peer: str) -> bool:
        """Whether a peer must send a PROXY header."""
        return bool(self._proxies) and is_within(peer, self._proxies)

    def may_xclient(self, client: str) -> bool:
        """Whether a client may name its own client with XCLIENT."""
        return bool(self._xclients) and is_within(client, self._xclients)

    def is_in_local_domain(self, recipient: str) -> bool:
        """Whether a recipient is in a local domain, so that anybody may send to it.

        A route in the local part is refused: here, ``victim%elsewhere.test@local.test`` is a
        mailbox of local.test, but the next host may relay it. The bare ``postmaster`` is always
        local (RFC 5321, section 4.5.1).
        """
        return "@" not in recipient or _is_in(recipient, self._local_domains)

    def is_relayed(self, recipient: str) -> bool:
        """Whether a recipient is in a relay domain, so that anybody may send to it."""
        return _is_in(recipient, self._relay_domains)


def _names(domains: Collection[str]) -> frozenset[str]:
    return frozenset(domain_of("@" + name) for name in domains)


def _is_in(recipient: str, domains: Collection[str]) -> bool:
    """Whether a recipient is in one of the domains and holds no route to another."""
    if _ascii(domain_of(recipient)) not in domains:
        return False
    try:
        return not parse_mailbox(recipient).routed
    except AddressError:  # a plugin may have set any text
        return False


@lru_cache(maxsize=4096)
def is_within(client: str, networks: tuple[Network, ...]) -> bool:
    """Whether an IP address is in one of the networks; ``::ffff:127.0.0.1`` is 127.0.0.1."""
    address = parse_peer(client)
    return any(address.version == network.version and address in network for network in networks)
