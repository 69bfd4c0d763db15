"""The addresses of brokers: ``amqp://user:password@host:port/vhost``, and how older settings name
them.
"""

from __future__ import annotations

from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

from mailerq.errors import AddressError

__all__ = ["Address", "addresses_of_hosts", "parse_addresses"]

PORTS: Final = {"amqp": 5672, "amqps": 5671}


class Address(NamedTuple):
    """One broker. Its text, also in errors and logs, has no password."""

    host: str
    port: int
    user: str = "guest"
    password: str = "guest"
    vhost: str = "/"
    tls: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'amqps' if self.tls else 'amqp'}://{host}:{self.port}"

    def __repr__(self) -> str:
        return f"<{self} as {self.user}, vhost {self.vhost}>"


def parse_addresses(text: str) -> list[Address]:
    """Read the brokers of ``rabbitmq-address``, in the order to try them. Raises `AddressError`.

    Addresses are separated by commas. One address may also name several hosts, separated by
    semicolons, as before version 4.4. As in the URI specification of RabbitMQ, a missing path is
    the vhost ``/``, and user, password and vhost may be percent-encoded.

    >>> [str(each) for each in parse_addresses("amqp://a.test, amqps://u:p@b.test:5000/mail")]
    ['amqp://a.test:5672', 'amqps://b.test:5000']
    >>> [each.host for each in parse_addresses("amqp://u:p@a.test;b.test:5673/")]
    ['a.test', 'b.test']
    """
    addresses = [
        address for part in text.split(",") if part.strip() for address in _parse(part.strip())
    ]
    if not addresses:
        raise AddressError("names no broker")
    return addresses


def addresses_of_hosts(text: str, user: str, password: str, vhost: str) -> list[Address]:
    """The brokers of ``rabbitmq-host``, a list of hosts with or without a port, and its login.

    Empty: the defaults. Raises `AddressError`.

    >>> [str(each) for each in addresses_of_hosts("a.test;b.test:5673", "u", "p", "")]
    ['amqp://a.test:5672', 'amqp://b.test:5673']
    """
    hosts = [host for part in text.split(",") for host in part.split(";") if host.strip()]
    if not hosts:
        raise AddressError("names no broker")
    known = Address("", 0)
    login = (user or known.user, password or known.password, vhost or known.vhost)
    return [Address(*_host(host, PORTS["amqp"]), *login) for host in hosts]


def _parse(uri: str) -> list[Address]:
    """The brokers of one URI. The texts of errors have no password."""
    scheme, separator, rest = uri.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in PORTS:
        raise AddressError("a broker is amqp://user:password@host:port/vhost, or amqps://…")
    authority, slash, path = rest.partition("/")
    if "/" in path or "?" in path or "#" in path:
        raise AddressError("a vhost with '/', '?' or '#' has them as %2F, %3F and %23")
    login, at, hosts = authority.rpartition("@")
    user, _, password = login.partition(":")
    if at and not user:
        raise AddressError("a broker's address has an '@' but no user in front of it")
    vhost = unquote(path) if slash and path else "/"
    return [
        Address(
            *_host(host, PORTS[scheme]),
            unquote(user) if at else "guest",
            unquote(password) if at else "guest",
            vhost,
            scheme == "amqps",
        )
        for host in hosts.split(";")
    ]


def _host(text: str, default: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text.strip()}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port == 0:
        raise AddressError(f"{text.strip()[:80]!a} is not the host and port of a broker")
    return host, port or default
