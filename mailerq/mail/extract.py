"""Take the x-mq-* fields out of a header and turn them into properties of the message.

What stands in them steers delivery, so they count only in mail from somebody who may relay;
from anybody else they are taken out and ignored. They never go out to the world.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from mailerq.address import parse_mailbox
from mailerq.errors import MessageError
from mailerq.mail.headers import HEADER_LIMIT, Field, Header, remove, unfold
from mailerq.message import parse_time

__all__ = ["FIELDS_LIMIT", "Extraction", "extract"]

FIELDS_LIMIT: Final = 1 << 13
"""Bytes of all x-mq-* fields of a mail. Each recipient's message has what they say."""

IGNORED_LIMIT: Final = 10
"""Fields that are named when they cannot be used; of more only the number is said."""

_OURS: Final = re.compile(rb"\nx-(?:mq-[^\r\n:]*+|normalize[ \t]*+):").finditer


class Extraction(NamedTuple):
    """What `extract` found.

    `ignored` has one sentence for each field that was taken out and did not become a
    property, with its name, up to `IGNORED_LIMIT`; it is for a log and holds nothing that
    could end a line.
    """

    properties: dict[str, Any]
    mime: bytes
    ignored: Sequence[str] = ()


def extract(mime: bytes, *, trusted: bool) -> Extraction | None:
    r"""Take every x-mq-* field, and x-normalize, out of `mime`.

    When `trusted`, they become properties. A field that cannot be used, because its value
    has a wrong form, or its name is reserved or was there before, does not stop the mail:
    it is ignored and listed. All other bytes stay as they are; a message without such
    fields comes back as the same object. None: they are longer than `FIELDS_LIMIT` together.

    >>> extract(b"x-mq-tag: spring\r\nTo: a@b.test\r\n\r\nhi", trusted=True)
    Extraction(properties={'tags': ['spring']}, mime=b'To: a@b.test\r\n\r\nhi', ignored=[])
    """
    end = mime.find(b"\r\n\r\n", 0, HEADER_LIMIT)  # nothing of the header stands behind this
    text = mime[: end if end >= 0 else HEADER_LIMIT].lower()
    if b"x-mq-" not in text and b"x-normalize" not in text:
        return Extraction({}, mime)
    found: list[Field] = []
    size = 0
    for field in Header(mime).found_by(_OURS):
        found.append(field)
        size += field.end - field.start
        if size > FIELDS_LIMIT:
            return None
    if not found:
        return Extraction({}, mime)
    properties: dict[str, Any] = {}
    ignored: list[str] = []
    if trusted:
        for field in found:
            if reason := _take(field, properties):
                ignored.append(f"{_printable(field.name)}: {reason}")
        if "smarthost" in properties and not properties["smarthost"].keys() & {"name", "hostname"}:
            del properties["smarthost"]
            ignored.append("x-mq-smarthost-*: without x-mq-smarthost-hostname")
        if (more := len(ignored) - IGNORED_LIMIT) > 0:
            ignored[IGNORED_LIMIT:] = [f"{more} more x-mq-* fields"]
    return Extraction(properties, remove(mime, found), ignored)


def _printable(name: bytes) -> str:
    text = name[:80].decode("ascii", "replace")
    return text if text.isprintable() else ascii(text)[1:-1]


def _take(field: Field, properties: dict[str, Any]) -> str | None:
    """Put one field into `properties`, or say why not."""
    try:
        name = field.name.decode("ascii")
        text = unfold(field.value).decode()
    except UnicodeDecodeError:
        return "holds bytes that are not UTF-8"
    if any(not character.isprintable() for character in text.replace("\t", " ")):
        return "holds control characters"
    short = name.removeprefix("x-mq-")
    path, read = _KNOWN.get(short, ((short,), str))
    if short in _RESERVED or not short.isprintable() or " " in short or not short:
        return "is no name for a property"
    try:
        value = read(text)
    except (ValueError, MessageError) as error:
        return str(error)
    if value is _SKIP:
        return None
    *outer, last = path
    for key in outer:
        properties = properties.setdefault(key, {})
    if isinstance(value, list) and last in _REPEATABLE:
        properties.setdefault(last, []).extend(value)
    elif last in properties:
        return "stands there more than once, the first counts"
    else:
        properties[last] = value
    return None


_SKIP: Final = object()  # a switch that is off is not written down


def _flag(text: str) -> Any:
    match text.lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off":
            return _SKIP
    raise ValueError("expected 1 or 0")


def _number(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return int(text)
    raise ValueError("expected a whole number")


def _port(text: str) -> int:
    if 0 < (port := _number(text)) < 65536:
        return port
    raise ValueError("expected a port from 1 to 65535")


def _numbers(text: str) -> list[int]:
    try:
        return [_number(part.strip()) for part in text.split(",")]
    except ValueError:
        raise ValueError("expected seconds, separated by commas") from None


def _time(text: str) -> str:
    parse_time(text)
    return text


def _ip(text: str) -> list[str]:
    try:
        return [str(ipaddress.ip_address(text))]
    except ValueError:
        raise ValueError("expected an IP address") from None


def _word(text: str) -> str:
    if text:
        return text
    raise ValueError("is empty")


def _tag(text: str) -> list[str]:
    return [_word(text)]


def _queue(text: str) -> str | None:
    return text or None  # an empty name switches this queue off for this message


def _envelope(text: str) -> str:
    if text.startswith("<") and text.endswith(">"):
        text = text[1:-1]
    if text:
        parse_mailbox(text)
    return text


_KNOWN: Final[dict[str, tuple[tuple[str, ...], Callable[[str], Any]]]] = {
    "envelope": (("envelope",), _envelope),
    "ip": (("ips",), _ip),
    "pool": (("pool",), _word),
    "tag": (("tags",), _tag),
    "delayed": (("delayed",), _time),
    "maxdelivertime": (("maxdelivertime",), _time),
    "maxattempts": (("maxattempts",), _number),
    "retries": (("retries",), _numbers),
    "inlinecss": (("inlinecss",), _flag),
    "keepmime": (("keepmime",), _flag),
    "normalize": (("normalize",), _flag),
    "x-normalize": (("normalize",), _flag),
    "results-queue": (("queues", "results"), _queue),
    "failure-queue": (("queues", "failure"), _queue),
    "success-queue": (("queues", "success"), _queue),
    "retry-queue": (("queues", "retry"), _queue),
    "smarthost-name": (("smarthost", "name"), _word),
    "smarthost-hostname": (("smarthost", "hostname"), _word),
    "smarthost-port": (("smarthost", "port"), _port),
    "smarthost-username": (("smarthost", "username"), _word),
    "smarthost-password": (("smarthost", "password"), _word),
    "dsn-notify": (("dsn", "notify"), _word),
    "dsn-ret": (("dsn", "ret"), _word),
    "dsn-orcpt": (("dsn", "orcpt"), _word),
    "dsn-envid": (("dsn", "envid"), _word),
    "dsn-envelope": (("dsn", "envelope"), _word),
    "dsn-mta": (("dsn", "mta"), _word),
}
"""Name of the field without "x-mq-" -> where its value goes, and how it is read."""

_REPEATABLE: Final = frozenset({"ips", "tags"})

_RESERVED: Final = frozenset({
    # what the server says about a message is not the sender's to say
    "recipient", "message-id", "received", "hostname", "connection", "cli", "spool", "http",
    "checks", "results", "seen", "forcedip", "domain", "nextattempt", "extracted",
    # the body, and properties of a type that a field cannot carry
    "mime", "mime-base64", "key", "data", "dkim", "dsn", "headers", "ips",
    "priority", "queues", "security", "force", "smarthost", "tags",
})  # fmt: skip
