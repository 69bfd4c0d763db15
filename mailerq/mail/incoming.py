"""Turn a received mail into messages: one JSON document for each recipient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from itertools import islice, repeat
from typing import Any, Final

import msgspec

from mailerq.mail import headers
from mailerq.mail.extract import EVERYTHING, FIELDS_LIMIT, IGNORED_LIMIT, Rights, doubts, extract
from mailerq.message import Message, format_time

__all__ = ["Envelope", "Problem", "Reception", "messages"]

OWN_HOPS: Final = 1
"""Received fields that are added here. They count, so a mail that was accepted may be sent."""


class Problem(StrEnum):
    """Why a mail is refused. The values continue a sentence that starts with "the mail"."""

    HEADER = f"has a header of more than {headers.HEADER_LIMIT} bytes"
    FIELDS = f"has more than {FIELDS_LIMIT} bytes of x-mq-* fields"
    LOOP = "has too many Received fields: it is looping"


class Envelope(msgspec.Struct, frozen=True):
    """The origin and the recipients of a mail, apart from its content.

    `properties` go into every message: the object ``connection`` for SMTP, ``cli`` for the command
    line. `recipient_properties`, if given, has the properties of each recipient. `protocol`,
    `helo`, `client_ip` and `user` are for the Received field, see `mailerq.mail.headers.received`.
    If `trusted`, the x-mq-* fields that `rights` allow have an effect. `local_ip` is the address to
    send from, unless such fields name others.
    """

    sender: str
    recipients: Sequence[str]
    properties: dict[str, Any]
    recipient_properties: Sequence[dict[str, Any]] = ()
    protocol: str = ""
    helo: str | None = None
    client_ip: str | None = None
    user: str | None = None
    trusted: bool = False
    rights: Rights = EVERYTHING
    local_ip: str = ""


class Reception(msgspec.Struct, frozen=True):
    """The result of `messages`. `ignored` has a log text for each x-mq-* field without effect.

    `doubtful` has the fields that may be misspelt, each with the name that was probably meant.
    """

    messages: list[Message]
    ignored: Sequence[str] = ()
    doubtful: Sequence[tuple[str, str]] = ()


def messages(
    mime: bytes,
    envelope: Envelope,
    *,
    hostname: str,
    now: float,
    next_id: Callable[[], str],
    outbox: str = "",
) -> Reception | Problem:
    """Build the messages, in the order of the recipients, or return why the mail is refused.

    The body loses its x-mq-* fields, and gets a Received field and, if missing, a Message-ID. All
    messages share one body. Each has its own id and a deep copy of the properties. No x-mq-* field
    can send results to the `outbox`.
    """
    header = headers.Header(mime)
    if not header.is_whole:
        return Problem.HEADER
    if header.is_looping(added=OWN_HOPS):
        return Problem.LOOP
    has_id = header.has(b"message-id")
    waives_tls = header.holds(b"\ntls-required") and _waives_tls(header)
    extraction = extract(
        mime,
        trusted=envelope.trusted,
        rights=envelope.rights,
        now=now,
        outbox=outbox,
        header=header,
    )
    del header  # a long header is not kept beside the edited one
    if extraction is None:
        return Problem.FIELDS
    if extraction.mime is not mime:
        has_id = headers.Header(extraction.mime).has(b"message-id")
    if waives_tls and envelope.properties.get("requiretls") is not True:
        extraction.properties["tlsrequired"] = False
    ids = [next_id() for _ in envelope.recipients]
    fields = [
        headers.received(
            hostname=hostname,
            id=ids[0],
            now=now,
            protocol=envelope.protocol,
            helo=envelope.helo,
            client_ip=envelope.client_ip,
            recipient=envelope.recipients[0] if len(ids) == 1 else None,
            user=envelope.user,
        )
    ]
    if not has_id:
        fields.append(headers.message_id_field(ids[0], hostname))
    body = headers.prepend(extraction.mime, *fields)
    if envelope.local_ip and extraction.properties.keys().isdisjoint(("ips", "pool")):
        extraction.properties["ips"] = [envelope.local_ip]
    received = format_time(now)
    made = [
        Message(
            {
                "message-id": id,
                "received": received,
                "hostname": hostname,
                "envelope": envelope.sender,
                "recipient": recipient,
                **shared,
                **own,
            },
            body,
        )
        for id, recipient, own, shared in zip(
            ids,
            envelope.recipients,
            envelope.recipient_properties or repeat({}),
            _copies({**envelope.properties, **extraction.properties}),
            strict=False,
        )
    ]
    doubtful = tuple(islice(doubts(extraction.properties), IGNORED_LIMIT))
    return Reception(made, extraction.ignored, doubtful)


def _waives_tls(header: headers.Header) -> bool:
    """Whether the only TLS-Required field says No (RFC 8689, section 5)."""
    values = [field.value for field in header.fields() if field.name == b"tls-required"]
    return len(values) == 1 and headers.unfold(values[0]).lower() == b"no"


def _copies(properties: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the properties themselves for the first recipient, then copies."""
    yield properties
    while True:
        yield _copy(properties)


def _copy(value: Any) -> Any:
    """Copy all objects; arrays are copied shallowly, because they hold texts and numbers only."""
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items()}
    return value[:] if isinstance(value, list) else value
