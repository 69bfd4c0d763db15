"""The local addresses that an instance can send from."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterable, Iterator
from typing import Final

from mailerq.config import Config
from mailerq.rules.local_ips import LocalIps

__all__ = ["available", "configured", "has", "of_host"]

FIB_FILE: Final = "/proc/net/fib_trie"
IPV6_FILE: Final = "/proc/net/if_inet6"

MISSING: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def configured(config: Config, local: LocalIps) -> list[str]:
    """The addresses that the settings name: in `smtp-default-ips` and in `addresses-file`."""
    found = [*local.default, *config.smtp_default_ips]
    for pool in local.pools.values():
        found += pool
    found += [*local.names, *local.weights]
    for warmup in local.warmups:
        found += sorted(warmup.ips)
    return [ip for ip in dict.fromkeys(found) if ip not in ("0.0.0.0", "::")]


def available(config: Config, local: LocalIps) -> list[str]:
    """The addresses of the settings that this host has; of a host whose settings name none, all.

    Loopback addresses count only if the settings name them. Blocks for some microseconds for each.
    """
    named = configured(config, local)
    return [ip for ip in named if has(ip)] if named else list(of_host())


def has(ip: str) -> bool:
    """Whether this host can send from an address."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.bind((ip, 0))
    except OSError as error:
        return error.errno not in MISSING  # with too few descriptors nothing is known
    return True


def of_host() -> Iterator[str]:
    """The global addresses of this host, from the tables of the kernel."""
    for ip in dict.fromkeys((*_ipv4(_lines(FIB_FILE)), *_ipv6(_lines(IPV6_FILE)))):
        address = ipaddress.ip_address(ip)
        if not (address.is_loopback or address.is_link_local or address.is_multicast):
            yield ip


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.readlines()
    except OSError:
        return []


def _ipv4(lines: Iterable[str]) -> Iterator[str]:
    """The local addresses in ``fib_trie``, each on the line before its ``host LOCAL``.

    >>> list(_ipv4(["     |-- 192.0.2.1", "        /32 host LOCAL", "     |-- 192.0.2.255",
    ...     "        /32 link BROADCAST"]))
    ['192.0.2.1']
    """
    last = ""
    for line in lines:
        _, dashes, text = line.partition("|-- ")
        if dashes:
            last = text.strip()
        elif line.split()[:3] == ["/32", "host", "LOCAL"] and last:
            yield last


def _ipv6(lines: Iterable[str]) -> Iterator[str]:
    """The addresses in ``if_inet6``.

    >>> list(_ipv6(["20010db8000000000000000000000001 02 40 00 80 eth0"]))
    ['2001:db8::1']
    """
    for line in lines:
        digits = line.partition(" ")[0]
        if len(digits) == 32:
            yield str(ipaddress.IPv6Address(int(digits, 16)))
