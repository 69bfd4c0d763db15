"""Which of the operator's rows are about some mail: pauses, forced errors and suppressions.

Theory of operation
-------------------
Deliveries ask `Rows` about

- a message before its hosts are known: `suppression`, and `early` for forced errors and pauses;
- a message whose hosts and local address are known (`late`): rows for a site, a provider or
  a remote address that are about only some of the mail there;
- a flow (`flow_pause`): pauses of all of its mail;
- a remote address (`remote_pause`).

A pause of a domain stops a whole flow, because the domain gets a site of its own meanwhile: `apart`
names the pattern. Mail to a smarthost has no flow for each domain, so there the pause stops
messages.

A row for a local address stops a message only if no other address of the message may send it.

Rows are in buckets by one part of their scope, so that a question reads few rows about other mail.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from mailerq.rules.row import ERROR, PAUSE, Row, patterns

__all__ = ["NOBODY", "NO_POOLS", "Early", "Peer", "Rows"]

NO_ROWS: Final[Mapping[str, Row]] = {}
NO_POOLS: Final[Mapping[str, Collection[str]]] = {}


class Peer(NamedTuple):
    """What is known of a site: the names and the addresses of its hosts, and its provider."""

    names: frozenset[str] = frozenset()
    """In lower case."""
    addresses: frozenset[str] = frozenset()
    provider: str = ""


NOBODY: Final = Peer()


class Early(NamedTuple):
    """The row that stops a message, if any, and the local addresses that may send it."""

    row: Row | None
    local_ips: tuple[str, ...]


class Rows:
    """The rows in force. Immutable but for the suppressions, which belong to their owner.

    >>> rows = Rows([Row(id=1, kind=PAUSE, tag="news"), Row(id=2, kind=PAUSE, domain="*.b.test")])
    >>> rows.early("a.b.test", ["news"], ()).row.id, rows.early("a.b.test", [], ()).row
    (1, None)
    >>> rows.apart("a.b.test"), rows.apart("b.test")
    ('*.b.test', '')
    """

    def __init__(
        self,
        rows: Iterable[Row],
        *,
        addresses: Mapping[str, Row] = NO_ROWS,
        domains: Mapping[str, Row] = NO_ROWS,
        pools: Mapping[str, Collection[str]] = NO_POOLS,
    ) -> None:
        """`addresses` and `domains` are suppressed; `pools` has the addresses of each pool."""
        self._addresses = addresses
        self._domains = domains
        self.pools = pools
        ordered = sorted(rows, key=lambda row: row.id)
        self.by_id = {row.id: row for row in ordered if row.kind in (PAUSE, ERROR)}
        errors = [row for row in self.by_id.values() if row.kind == ERROR]
        pauses = [row for row in self.by_id.values() if row.kind == PAUSE]
        tagged = [row for row in pauses if row.tag]
        others = [row for row in pauses if not row.tag]
        self._early = (
            _Buckets(row for row in errors if not row.needs_peer),
            _Buckets(row for row in tagged if not row.needs_peer),
        )
        self._behind_smarthost = (*self._early, _Buckets(row for row in others if row.domain))
        self._late = (
            _Buckets(row for row in errors if row.needs_peer),
            _Buckets(row for row in tagged if row.needs_peer),
        )
        self._flows = _Buckets(row for row in others if not row.remote_ip)
        self._remotes = _Buckets(row for row in others if row.remote_ip)
        self.has_late = any(self._late)
        """Whether `late` can find anything."""
        self.has_remote_pauses = bool(self._remotes)
        self.domains = frozenset(row.domain for row in others if row.domain)
        """Patterns of the domains that have sites of their own."""

    def __bool__(self) -> bool:
        return bool(self.by_id or self._addresses or self._domains)

    # Messages

    def suppression(self, address: str, domain: str) -> Row | None:
        """The row that suppresses a recipient; `address` is in the form of `compared`."""
        row = self._addresses.get(address)
        if row is None and self._domains:
            found = (self._domains.get(name) for name in patterns(domain))
            row = next((each for each in found if each is not None), None)
        return row

    def early(
        self,
        domain: str,
        tags: Collection[str],
        local_ips: tuple[str, ...],
        *,
        by_domain: bool = True,
    ) -> Early:
        """What forced errors, and then pauses, say about a message without its hosts.

        `by_domain`: mail to this domain has flows of its own, other than mail to a smarthost.
        """
        for buckets in self._early if by_domain else self._behind_smarthost:
            for row in buckets.find(tags, domain, NOBODY, local_ips):
                if not _is_about(row, domain, tags):
                    continue
                if not (row.local_ip or row.pool):
                    return Early(row, ())
                if local_ips:
                    local_ips = tuple(ip for ip in local_ips if not self._is_from(row, ip))
                    if not local_ips:
                        return Early(row, ())
        return Early(None, local_ips)

    def late(
        self, domain: str, tags: Collection[str], local_ip: str | None, peer: Peer
    ) -> Row | None:
        """The forced error or the pause that stops a message on its way to these hosts."""
        for buckets in self._late:
            for row in buckets.find(tags, domain, peer, _only(local_ip)):
                if (
                    _is_about(row, domain, tags)
                    and self._is_from(row, local_ip)
                    and _is_at(row, peer)
                ):
                    return row
        return None

    # Flows

    def apart(self, domain: str) -> str:
        """The most exact pattern of a pause that has this domain, or an empty string."""
        if not self.domains:
            return ""
        return next((name for name in patterns(domain) if name in self.domains), "")

    def flow_pause(self, apart: str, local_ip: str | None, peer: Peer) -> Row | None:
        """The pause of all mail of a flow. `apart` says what its site has been set apart for."""
        for row in self._flows.find((), apart, peer, _only(local_ip)):
            if _is_about(row, apart, ()) and self._is_from(row, local_ip) and _is_at(row, peer):
                return row
        if not (self._remotes and peer.addresses):
            return None
        last: Row | None = None
        for address in peer.addresses:
            found = self.remote_pause(local_ip, address)
            if found is None:
                return None
            last = found if last is None or found.id > last.id else last
        return last

    def remote_pause(self, local_ip: str | None, address: str) -> Row | None:
        """The pause of connections from a local address to a remote one."""
        peer = Peer(addresses=frozenset((_bare(address),)))
        for row in self._remotes.find((), "", peer, _only(local_ip)):
            if self._is_from(row, local_ip) and _contains(row.remote_ip, address):
                return row
        return None

    def _is_from(self, row: Row, local_ip: str | None) -> bool:
        if not (row.local_ip or row.pool):
            return True
        if local_ip is None:
            return False
        if row.local_ip:
            return row.local_ip == _plain(local_ip)
        return _plain(local_ip) in self.pools.get(row.pool, ())


class _Buckets:
    """Rows by one part of their scope."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            self._rows.setdefault(_bucket(row), []).append(row)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def find(
        self, tags: Collection[str], domain: str, peer: Peer, local_ips: Sequence[str]
    ) -> Iterable[Row]:
        """The rows that may be about some mail, in the order of their ids."""
        if not self._rows:
            return ()
        keys = [("", ""), ("provider", peer.provider)]
        keys += [("domain", name) for name in patterns(domain)]
        keys += [("site", name) for host in peer.names for name in patterns(host)]
        keys += [("remote_ip", _bare(address)) for address in peer.addresses]
        keys += [("tag", tag) for tag in tags]
        keys += [("local_ip", _plain(ip)) for ip in local_ips]
        found = [self._rows[key] for key in dict.fromkeys(keys) if key in self._rows]
        if len(found) == 1:
            return found[0]
        return sorted((row for rows in found for row in rows), key=lambda row: row.id)


def _bucket(row: Row) -> tuple[str, str]:
    for name in ("domain", "site", "provider", "remote_ip", "tag", "local_ip"):
        # Networks are compared one by one.
        if (value := getattr(row, name)) and "/" not in value:
            return name, value
    return "", ""


def _only(local_ip: str | None) -> tuple[str, ...]:
    return () if local_ip is None else (local_ip,)


def _is_about(row: Row, domain: str, tags: Collection[str]) -> bool:
    """Whether the tag and the domain of a row fit."""
    if row.tag and row.tag not in tags:
        return False
    return not row.domain or row.domain in patterns(domain)


def _is_at(row: Row, peer: Peer) -> bool:
    """Whether the hosts of a row fit."""
    if row.provider:
        return row.provider == peer.provider
    if row.site:
        return any(row.site in patterns(name) for name in peer.names)
    if row.remote_ip:
        return any(_contains(row.remote_ip, address) for address in peer.addresses)
    return True


@lru_cache(maxsize=1024)
def _plain(ip: str) -> str:
    """One way to write an address that people can write in several."""
    try:
        return str(ipaddress.ip_address(ip))
    except ValueError:
        return ip


def _bare(address: str) -> str:
    return _plain(address.partition("%")[0])


def _contains(network: str, address: str) -> bool:
    bare = _bare(address)
    if "/" not in network:
        return network == bare
    ip, wanted = ipaddress.ip_address(bare), _network_of(network)
    return ip.version == wanted.version and ip in wanted


@lru_cache(maxsize=10_000)  # as many as there may be rows: each new flow asks for all of them
def _network_of(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text)
