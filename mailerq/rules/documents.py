"""Find mistakes in a message, and properties without effect, before the message is sent."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

from mailerq.address import parse_host, parse_mailbox
from mailerq.config import Config
from mailerq.errors import AddressError, MessageError
from mailerq.mail import made
from mailerq.mail.extract import extract
from mailerq.mail.headers import HOP_LIMIT, Header
from mailerq.message import Message
from mailerq.properties import KNOWN, misspellings
from mailerq.rules.local_ips import NO_ADDRESSES, LocalIps, NoPool
from mailerq.rules.logins import demands_of, login_of
from mailerq.rules.retry import expires_at, not_before
from mailerq.rules.routes import loop_problem, route_of
from mailerq.rules.signing import keys_of_message
from mailerq.wire.parameters import dsn_parameters

__all__ = ["Finding", "examine", "problems"]

SHOWN: Final = 80
"""Characters of a name or a value of a message to show."""


class Finding(NamedTuple):
    """A fact about a message.

    With an error, the message is refused or fails. A warning names a property without effect. A
    note is information only.
    """

    level: Literal["error", "warning", "note"]
    text: str


def examine(
    message: Message, config: Config, *, now: float, local: LocalIps = NO_ADDRESSES
) -> Iterator[Finding]:
    """Yield all findings about a message for the outbox.

    The errors are those of `problems`, a pool that is not there, and why the mail cannot be made.
    Changes by plugins are not considered.
    """
    errors = list(problems(message, config, now=now))
    if not errors:
        errors = [*_no_pool(message, config, local), *_not_made(message, config, now)]
    yield from (Finding("error", text) for text in errors)
    misspelt = dict(misspellings(message.properties))
    for name, meant in misspelt.items():
        text = f"property {_shown(name)}: is not known and changes nothing; is {meant} meant?"
        yield Finding("warning", text)
    yield from (Finding("warning", text) for text in _without_effect(message, misspelt))
    for name in message.properties:
        if name not in KNOWN and name not in misspelt:
            yield Finding("note", f"property {_shown(name)}: is not known and travels untouched")


def problems(
    message: Message, config: Config, *, now: float, supplied: bool = False
) -> Iterator[str]:
    """Yield the mistakes, each with its property, that would make every delivery fail.

    Mistakes within templates are not among them.

    `supplied`: a plugin may supply a body.
    """
    body: object = message.body
    if body is not None and not isinstance(body, bytes):
        yield f"property mime: expected bytes for the body, found {type(body).__name__}"
        return
    wrong = list(message.problems())
    if (loop := loop_problem(message.properties, config.rabbitmq_outbox)) is not None:
        wrong.append(loop)
    yield from wrong or _unusable(message, config, now, supplied)


def _unusable(message: Message, config: Config, now: float, supplied: bool) -> Iterator[str]:
    """Yield properties whose type is right and whose value cannot be used."""
    properties = message.properties
    for name in ("recipient", "envelope"):
        address = properties.get(name)
        try:
            if address:
                str(parse_mailbox(address))
        except AddressError as error:
            yield f"property {name}: {error}"
    for address in properties.get("ips") or ():
        try:
            is_name = isinstance(parse_host(address), str)
        except AddressError:
            is_name = True
        if is_name:
            yield f"property ips: {address[:SHOWN]!a} is no IP address"
    try:
        login = None if route_of(properties, "", config).mx else login_of(properties, config)
        demands_of(properties, login)
    except AddressError as error:
        yield str(error)
    try:
        keys_of_message(properties.get("dkim"))
    except MessageError as error:
        yield str(error)
    yield from _late(properties, config, now)
    yield from _no_body(message, supplied)


def _late(properties: Mapping[str, Any], config: Config, now: float) -> Iterator[str]:
    """Yield times that leave no time for an attempt."""
    due = not_before(properties, now=now)
    first = now if due is None else max(now, due)
    if first <= expires_at(properties, now=first, max_delivertime=config.max_delivertime):
        return
    last = properties.get("maxdelivertime")
    if last is None:
        yield f"property seen: {properties['seen']} is longer ago than max-delivertime allows"
    elif first > now:
        yield f"property maxdelivertime: {last} is over before the first attempt"
    else:
        yield f"property maxdelivertime: {last} has passed"


def _no_body(message: Message, supplied: bool) -> Iterator[str]:
    """Yield mistakes in the mail itself."""
    if message.body is not None:
        if Header(message.body).is_looping():
            yield f"property mime: has more than {HOP_LIMIT} Received lines: a mail loop"
    elif not (supplied or message.properties.get("mime") or message.properties.get("key")):
        yield "property mime: is missing, and only a plugin could supply a body"
    yield from made.problems(message.properties)


def _no_pool(message: Message, config: Config, local: LocalIps) -> Iterator[str]:
    """Yield a missing pool: deliveries fail until `addresses-file` has it."""
    domain = parse_mailbox(message.recipient).domain
    if route_of(message.properties, domain, config).lmtp:
        return  # no local address is chosen
    try:
        local.allowed(message.properties)
    except NoPool as error:
        yield str(error)


def _not_made(message: Message, config: Config, now: float) -> Iterator[str]:
    """Yield why the mail cannot be made. Style sheets are not tried."""
    if not made.is_made(message.properties) or not (message.body or message.properties.get("mime")):
        return
    try:
        body = made.make(message.properties, message.body, hostname=config.hostname, now=now)
    except made.NotMade as error:
        yield error.reason
    else:
        yield from _no_body(Message(message.properties, body), supplied=False)


def _without_effect(message: Message, misspelt: Collection[str]) -> Iterator[str]:
    """Yield known properties without effect, and unknown keys of known properties."""
    properties = message.properties
    for name, value in properties.items():
        known = KNOWN.get(name)
        if known is None:
            continue
        if not known.used:
            yield f"property {name}: has no effect yet"
        elif known.keys and isinstance(value, dict):
            keys = {key.name: key for key in known.keys}
            for key in value:
                if key in keys and keys[key].used:
                    continue
                if key not in keys and f"{name}.{key}" not in misspelt:
                    yield f"property {name}: has the key {_shown(key)}, which is not known"
                elif key in keys:
                    yield f"property {name}: its key {key} has no effect yet"
    yield from _reports(properties.get("dsn"))
    body = message.body
    if body is not None and (extracted := extract(body, trusted=False)) is not None:
        if extracted.mime is not body:
            yield (
                "property mime: has x-mq-* fields; they count in mail that comes in, and in a"
                " document they are sent as they are"
            )


def _reports(dsn: object) -> Iterator[str]:
    """Yield keys of the property ``dsn`` whose value cannot be sent in a command."""
    if isinstance(dsn, Mapping):
        parts: Mapping[str, Any] = dsn
        for name in ("notify", "ret", "orcpt", "envid"):
            if parts.get(name) is not None and not any(dsn_parameters({name: parts[name]})):
                yield f"property dsn: its key {name} has no valid form and is left out"


def _shown(text: str) -> str:
    """Shorten a name or a value for a line; quote it if it is empty or has blanks."""
    shown = text[:SHOWN]
    return f"'{shown}'" if not shown or " " in shown else shown
