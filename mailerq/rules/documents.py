"""What keeps a document from ever being sent, for its own sake: said when it is published."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from mailerq.address import parse_host, parse_mailbox
from mailerq.config import Config
from mailerq.errors import AddressError
from mailerq.message import Message
from mailerq.rules.retry import expires_at
from mailerq.rules.routes import count_hops, loop_problem, route_of, unmet_promise

__all__ = ["MAX_HOPS", "document_problem"]

T = TypeVar("T")

MAX_HOPS: Final = 100
"""Received lines of a message that is still believed not to run in circles (RFC 5321, 6.3)."""


def document_problem(message: Message, config: Config, *, now: float, supplied: bool) -> str | None:
    """Say what is wrong with a message for the outbox, or None. It names the property.

    A delivery would fail for the same reasons, later. `supplied` says whether a plugin may supply
    a body.
    """
    properties = message.properties
    body: object = message.body
    if body is not None and not isinstance(body, bytes):
        return f"property mime: expected bytes for the body, found {type(body).__name__}"
    problem = message.problem() or loop_problem(properties, config.rabbitmq_outbox)
    if problem is not None:
        return problem
    try:
        mailbox = _read(parse_mailbox, "recipient", message.recipient)
        if message.envelope:
            _read(parse_mailbox, "envelope", message.envelope)
        route_of(properties, mailbox.domain, config)
        for ip in properties.get("ips") or ():
            if isinstance(_read(parse_host, "ips", ip), str):
                return f"property ips: {ip[:80]!a} is no IP address"
    except AddressError as error:
        return str(error)
    if now > expires_at(properties, now=now, max_delivertime=config.max_delivertime):
        if properties.get("maxdelivertime") is not None:
            return f"property maxdelivertime: {properties['maxdelivertime']} has passed"
        return f"property seen: {properties['seen']} is longer ago than max-delivertime allows"
    if (problem := _body_problem(message, supplied)) is not None:
        return problem
    if (reason := unmet_promise(properties, message.body)) is not None:
        text = reason.partition(" ")[2]
        name = "requiretls" if properties.get("requiretls") is True else "binarymime"
        return text if text.startswith("property ") else f"property {name}: {text}"
    return None


def _read(read: Callable[[str], T], name: str, text: str) -> T:
    try:
        return read(text)
    except AddressError as error:
        raise AddressError(f"property {name}: {error}") from None


def _body_problem(message: Message, supplied: bool) -> str | None:
    if message.body is not None:
        if count_hops(message.body) > MAX_HOPS:
            return f"property mime: has more than {MAX_HOPS} Received lines: a mail loop"
        return None
    if supplied:
        return None
    if message.properties.get("mime"):
        return "property mime: is an object, and generating mail is not supported"
    return "property mime: is missing, and no plugin supplies a body"
