"""Where a message goes: to which host, and what is said of it to which queues."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from typing import Any, Final

import msgspec

from mailerq.address import parse_host, queue_problem
from mailerq.config import Config
from mailerq.errors import AddressError
from mailerq.wire.framing import has_bare_newline

__all__ = [
    "SMTP_PORT",
    "Route",
    "choose_local_ip",
    "count_hops",
    "has_ascii_header",
    "loop_problem",
    "reception_queue",
    "result_queues",
    "route_of",
    "unmet_promise",
]

SMTP_PORT: Final = 25

MAX_HEADER: Final = 1 << 18
"""Bytes in which the end of a header is looked for; what has no end is not read as one."""


class Route(msgspec.Struct, frozen=True):
    """A way out. Messages with the same one share a queue and its connections.

    `name` is the domain or the smarthost, for people and for statistics; `host` is what is
    connected to: with `mx` the hosts that take mail for it. `trusted` is the operator's word
    for `host`: `smtp-out-forbidden` does not hold there.
    """

    name: str
    host: str
    port: int
    mx: bool
    trusted: bool = False


def route_of(properties: Mapping[str, Any], domain: str, config: Config) -> Route:
    """The way for a message to `domain`. Raises `AddressError` for a bad smarthost.

    The message's own smarthost comes before the configured one. A sink takes the
    connections of either, and those of each domain, which keep their queues.
    """
    name, host, port, mx, trusted = domain, domain, config.smtp_out_port, True, False
    smarthost = properties.get("smarthost")
    if smarthost:
        host, port = _smarthost(smarthost)
        name, mx = f"{host}:{port}", False
    elif config.smarthost:
        host, port, mx, trusted = config.smarthost, config.smarthost_port, False, True
        name = f"{host}:{port}"
    if config.smtp_sink_address:
        host, port, mx, trusted = config.smtp_sink_address, config.smtp_sink_port, False, True
    return Route(name, host, port, mx, trusted)


def _smarthost(smarthost: Mapping[str, Any]) -> tuple[str, int]:
    host = smarthost.get("hostname") or smarthost.get("name")
    if not isinstance(host, str):
        raise AddressError("property smarthost: has no hostname")
    port = smarthost.get("port")
    try:
        port = SMTP_PORT if port is None else int(port)
    except (TypeError, ValueError, OverflowError):
        port = 0
    if not 0 < port < 65536:
        raise AddressError("property smarthost: port is no port number")
    try:
        return str(parse_host(host)), port
    except AddressError as error:
        raise AddressError(f"property smarthost: {error}") from None


def choose_local_ip(properties: Mapping[str, Any], *, avoid: Collection[str] = ()) -> str | None:
    """One of the addresses in ``ips``, which the message may leave from; None: any.

    It is none of `avoid` where there is another. Raises `AddressError` for what is no IP address.
    """
    ips = properties.get("ips")
    if not ips:
        return None
    address = random.choice([ip for ip in ips if ip not in avoid] or ips if avoid else ips)
    if isinstance(parse_host(address), str):
        raise AddressError(f"property ips: {address[:80]!r} is no IP address")
    return str(address)


def result_queues(
    properties: Mapping[str, Any], configured: Mapping[str, str], *kinds: str, outbox: str
) -> list[str]:
    """The queues that a result of these kinds goes to, of which `outbox` is never one.

    A kind that the message's ``queues`` does not mention goes to the configured queue; one
    that it says null or nothing for goes nowhere.

    >>> result_queues({"queues": {"success": None}}, {"results": "r", "success": "s"},
    ...     "results", "success", outbox="o")
    ['r']
    """
    names: Mapping[str, Any] = configured
    own = properties.get("queues")
    if isinstance(own, dict):
        # What cannot be used makes a message fail, and then must not hide its result.
        names = {**configured, **{k: v for k, v in own.items() if _is_usable(v, outbox)}}
    return [name for kind in kinds if (name := names.get(kind)) and name != outbox]


def _is_usable(name: object, outbox: str) -> bool:
    """Whether a message may have its results go to that queue, or to none."""
    if name is None or name == "":
        return True
    return isinstance(name, str) and name != outbox and queue_problem(name) is None


def loop_problem(properties: Mapping[str, Any], outbox: str) -> str | None:
    """Say which result queue of a message is the outbox, or None.

    What goes there is delivered: the message would go round and round, or to its recipient twice.
    """
    queues = properties.get("queues")
    if isinstance(queues, dict) and outbox in queues.values():
        return f"property queues: {outbox} is the outbox, where a result would be sent as mail"
    return None


def reception_queue(config: Config, *, local: bool) -> str:
    """The queue for received mail; empty where the configuration drops it."""
    if local and config.rabbitmq_local:
        return config.rabbitmq_local
    inbox = config.rabbitmq_inbox
    return config.rabbitmq_outbox if inbox is None else inbox


def unmet_promise(properties: Mapping[str, Any], body: bytes | None) -> str | None:
    """What was promised when the mail was taken, and deliveries cannot keep: a reason, or None.

    To send it all the same would break RFC 8689 and RFC 3030, or what the message asks for.
    """
    if properties.get("requiretls") is True:
        return "5.7.30 the sender requires TLS all the way, and deliveries do not use TLS yet"
    if (security := properties.get("security")) in ("required", "verified"):
        return f"5.7.10 property security: {security}, and deliveries do not use TLS yet"
    if properties.get("binarymime") is True and body is not None and _is_binary(body):
        return "5.6.3 the mail is binary, and deliveries do not use BDAT yet"
    return None


def _is_binary(body: bytes) -> bool:
    """Whether lines that end in CR LF cannot carry it as it is."""
    return b"\0" in body or has_bare_newline(body)


def has_ascii_header(body: bytes) -> bool:
    """Whether the header of a message is ASCII, whatever its text is."""
    end = body.find(b"\r\n\r\n", 0, MAX_HEADER)
    return body[: end if end >= 0 else MAX_HEADER].isascii()


def count_hops(body: bytes) -> int:
    """How many Received lines are in the header of a message."""
    end = body.find(b"\r\n\r\n", 0, MAX_HEADER)
    if end < 0:
        end = body.find(b"\n\n", 0, MAX_HEADER)
    header = body[: end if end >= 0 else MAX_HEADER].lower()
    return header.count(b"\nreceived:") + header.startswith(b"received:")
