"""Where a message goes: the host, and the queues for its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from mailerq.address import host_port, parse_host, parse_lmtp, queue_leads_to, queue_problem
from mailerq.config import Config
from mailerq.errors import AddressError

__all__ = [
    "SMTP_PORT",
    "Route",
    "loop_problem",
    "reception_queue",
    "result_queues",
    "route_of",
]

SMTP_PORT: Final = 25


class Route(msgspec.Struct, frozen=True):
    """A way out. Messages with equal routes share a queue and its connections.

    `name` is the domain or the smarthost, for people and statistics. `host` is the host to connect
    to, or the path of a socket; with `mx`, the domain whose MX hosts take the mail. The operator
    vouches for a `trusted` host: `smtp-out-forbidden` does not apply. `lmtp`: the host speaks LMTP.
    `setting` is the key of the setting that chose the host; empty for the domain itself, and for a
    smarthost of the message. `waived`: what the domain has published about TLS does not count,
    because the message says so (RFC 8689, section 5).
    """

    name: str
    host: str
    port: int
    mx: bool
    trusted: bool = False
    lmtp: bool = False
    setting: str = ""
    waived: bool = False


def route_of(properties: Mapping[str, Any], domain: str, config: Config) -> Route:
    """The route of a message to `domain`. Raises `AddressError` for a bad smarthost.

    The message's own smarthost comes first, then `local-delivery`, then the configured smarthost. A
    sink takes the connections of
    either, and those of each domain, which keep their queues.
    """
    name, host, port, mx, trusted = domain, domain, config.smtp_out_port, True, False
    lmtp, setting = False, ""
    smarthost = properties.get("smarthost")
    if smarthost:
        host, port = _smarthost(smarthost)
        name, mx = host_port(host, port), False
    elif domain in config.local_names:
        name, mx, trusted, lmtp = config.local_delivery, False, True, True
        host, port = parse_lmtp(config.local_delivery)
        setting = "local-delivery"
    elif config.smarthost:
        host, port, mx, trusted = config.smarthost, config.smarthost_port, False, True
        setting = "smarthost"
        name = host_port(host, port)
    if config.smtp_sink_address:
        host, port, mx, trusted = config.smtp_sink_address, config.smtp_sink_port, False, True
        lmtp, setting = False, "smtp-sink-address"
    waived = mx and properties.get("tlsrequired") is False
    if waived and properties.get("requiretls") is True:
        waived = False
    return Route(name, host, port, mx, trusted, lmtp, setting, waived)


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


def result_queues(
    properties: Mapping[str, Any], configured: Mapping[str, str], *kinds: str, outbox: str
) -> list[str]:
    """The queues for results of these kinds, never `outbox` or one that leads there.

    A kind that the message's ``queues`` does not mention goes to the configured queue; a kind that
    is null or empty there goes nowhere.

    >>> result_queues({"queues": {"success": None}}, {"results": "r", "success": "s"},
    ...     "results", "success", outbox="o")
    ['r']
    """
    names: Mapping[str, Any] = configured
    own = properties.get("queues")
    if isinstance(own, dict):
        # An unusable name makes the message fail, and must not hide that result.
        names = {**configured, **{k: v for k, v in own.items() if _is_usable(v, outbox)}}
    return [
        name
        for kind in kinds
        if (name := names.get(kind)) and name != outbox and not queue_leads_to(name, outbox)
    ]


def _is_usable(name: object, outbox: str) -> bool:
    """Whether a message may send results to that queue, or to none."""
    if name is None or name == "":
        return True
    return (
        isinstance(name, str)
        and name != outbox
        and not queue_leads_to(name, outbox)
        and queue_problem(name) is None
    )


def loop_problem(properties: Mapping[str, Any], outbox: str) -> str | None:
    """Return an error if a result queue of a message is the outbox, or leads there, or None.

    Mail published there would be delivered: in an endless loop, or to the recipient twice.
    """
    queues = properties.get("queues")
    if not isinstance(queues, dict):
        return None
    for kind, name in queues.items():
        # Reports are mail of their own, and go to the outbox anyway.
        if name == outbox and kind != "dsn":
            return f"property queues: {outbox} is the outbox, where a result would be sent as mail"
        if isinstance(name, str) and queue_leads_to(name, outbox):
            return (
                f"property queues: {ascii(name)[:80]} is a part of the outbox, where a result"
                " would be sent as mail"
            )
    return None


def reception_queue(config: Config, *, local: bool) -> str:
    """The queue for received mail; empty where the configuration drops it."""
    if local and config.rabbitmq_local:
        return config.rabbitmq_local
    inbox = config.rabbitmq_inbox
    return config.rabbitmq_outbox if inbox is None else inbox
