"""Remove the x-mq-* fields of a header and turn them into properties of the message.

The fields control delivery, so they have an effect only in mail of clients that may relay, and
only if `Rights` allow the field. Other x-mq-* fields are removed and ignored, so none ever leaves
this server. `FIELDS` is the table of known fields.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from mailerq.address import parse_mailbox, queue_leads_to, queue_problem
from mailerq.errors import MessageError
from mailerq.mail.headers import Field, Header, remove, unfold
from mailerq.message import parse_time
from mailerq.spelling import Spelling

__all__ = [
    "EVERYTHING",
    "FIELDS",
    "FIELDS_LIMIT",
    "Extraction",
    "Known",
    "Rights",
    "doubts",
    "extract",
    "rights_of",
]

OTHERS: Final = "custom"
"""The name, in `Rights` and in `smtp-extract`, for all fields that are not in the table."""

FIELDS_LIMIT: Final = 1 << 13
"""Bytes of all x-mq-* fields of a mail. The message of each recipient has a copy."""

IGNORED_LIMIT: Final = 10
"""Ignored fields that are listed by name; the rest is a number."""

_OURS: Final = re.compile(rb"\nx-(?:mq-[^\r\n:]*+|normalize[ \t]*+):").finditer


class Extraction(NamedTuple):
    """The result of `extract`.

    `ignored` has a text with name and reason for each field that did not become a property, up to
    `IGNORED_LIMIT`. The texts are safe for a log line.
    """

    properties: dict[str, Any]
    mime: bytes
    ignored: Sequence[str] = ()


class Rights(NamedTuple):
    """The fields that a client may use.

    `fields` are names of `FIELDS`, and `OTHERS`. Times may be at most `longest` seconds ahead.
    """

    fields: frozenset[str]
    longest: float = math.inf


def extract(
    mime: bytes,
    *,
    trusted: bool,
    rights: Rights | None = None,
    now: float = 0.0,
    outbox: str = "",
    limit: int = IGNORED_LIMIT,
    header: Header | None = None,
) -> Extraction | None:
    r"""Remove every x-mq-* field, and x-normalize, from `mime`.

    If `trusted`, the fields that `rights` allow (by default all) become properties. A field is
    ignored and listed if it is not allowed, has an invalid value or a reserved name, or is
    repeated; so is a result queue that is the `outbox`, which would send results as mail. All other
    bytes are kept, and a mail without such fields is returned as the same object. At most `limit`
    ignored fields are named. `header` is the header of `mime`, if the caller has parsed it. Return
    None if the fields exceed `FIELDS_LIMIT` together.

    >>> extract(b"x-mq-tag: spring\r\nTo: a@b.test\r\n\r\nhi", trusted=True)
    Extraction(properties={'tags': ['spring']}, mime=b'To: a@b.test\r\n\r\nhi', ignored=[])
    """
    if header is None:
        header = Header(mime)
    if not (header.holds(b"x-mq-") or header.holds(b"x-normalize")):
        return Extraction({}, mime)
    found: list[Field] = []
    size = 0
    for field in header.found_by(_OURS):
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
            if reason := _take(
                field, properties, EVERYTHING if rights is None else rights, now, outbox
            ):
                ignored.append(f"{_printable(field.name)}: {reason}")
        if "smarthost" in properties and not properties["smarthost"].keys() & {"name", "hostname"}:
            del properties["smarthost"]
            ignored.append("x-mq-smarthost-*: without x-mq-smarthost-hostname")
        if (more := len(ignored) - limit) > 0:
            ignored[limit:] = [f"{more} more x-mq-* fields"]
    return Extraction(properties, remove(mime, found), ignored)


def doubts(properties: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield unknown fields that may be misspelt, each with the name that was probably meant.

    `properties` is the result of `extract`.

    >>> list(doubts({"tags": ["a"], "maxattempt": "7", "my-id": "x"}))
    [('x-mq-maxattempt', 'x-mq-maxattempts')]
    """
    for name in properties:
        if name not in _PATHS and (meant := _SPELLING.meant(name)):
            yield f"x-mq-{name}", f"x-mq-{meant}"


def _printable(name: bytes) -> str:
    text = name[:80].decode("ascii", "replace")
    return text if text.isprintable() else ascii(text)[1:-1]


def _take(
    field: Field, properties: dict[str, Any], rights: Rights, now: float, outbox: str
) -> str | None:
    """Store one field in `properties`; return None, or why the field is ignored."""
    try:
        name = field.name.decode("ascii")
        text = unfold(field.value).decode()
    except UnicodeDecodeError:
        return "holds bytes that are not UTF-8"
    if any(not character.isprintable() for character in text.replace("\t", " ")):
        return "holds control characters"
    short = name.removeprefix("x-mq-")
    known = FIELDS.get(short)
    path, read = (known.path, known.read) if known is not None else ((short,), str)
    if short in _RESERVED or not short.isprintable() or " " in short or not short:
        hint = f"; is x-mq-{meant} meant?" if (meant := _SPELLING.meant(short)) else ""
        return f"is no name for a property{hint}"
    word = path[0] if known is not None else OTHERS
    if (short if known is not None else OTHERS) not in rights.fields:
        return (
            f"may not be set by this client; add {word} to smtp-extract, or the client to"
            " smtp-extract-range or smtp-extract-logins"
        )
    try:
        value = read(text)
    except (ValueError, MessageError) as error:
        return str(error)
    if value is _SKIP:
        return None
    if path[0] == "queues" and value and value == outbox:
        return "is the outbox, where a result would be sent as mail"
    if path[0] == "queues" and value and queue_leads_to(value, outbox):
        return "is a part of the outbox, where a result would be sent as mail"
    if read is _time and parse_time(value) > now + rights.longest:
        return "is later than max-delivertime lets this client say"
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


_SKIP: Final = object()  # the value of a flag that is off, which gets no property


def _flag(text: str) -> Any:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
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
    if not text:
        return None  # an empty name disables this queue for this message
    if (problem := queue_problem(text)) is not None:
        raise ValueError(problem)
    return text


def _envelope(text: str) -> str:
    if text.startswith("<") and text.endswith(">"):
        text = text[1:-1]
    if text:
        parse_mailbox(text)
    return text


class Known(NamedTuple):
    """A known field: the path of its property, the function that reads it, and its risk.

    `safe` fields affect only the mail of their sender, so all clients that may relay may use them.
    `meaning` describes the field and, if it is not safe, the harm that it could do.
    """

    path: tuple[str, ...]
    read: Callable[[str], Any]
    safe: bool
    meaning: str


FIELDS: Final[dict[str, Known]] = {
    "envelope": Known(
        ("envelope",), _envelope, False,
        "The address for MAIL FROM. Bounces would go to somebody else.",
    ),
    "ip": Known(
        ("ips",), _ip, False,
        "An address of this host to send from. Its reputation is the operator's.",
    ),
    "pool": Known(
        ("pool",), _word, False,
        "A pool of such addresses.",
    ),
    "tag": Known(
        ("tags",), _tag, True,
        "A label for logs, results and statistics.",
    ),
    "delayed": Known(
        ("delayed",), _time, True,
        "The time before which the mail is not sent, at most max-delivertime ahead.",
    ),
    "maxdelivertime": Known(
        ("maxdelivertime",), _time, True,
        "The time when the mail is given up, at most max-delivertime ahead.",
    ),
    "maxattempts": Known(
        ("maxattempts",), _number, False,
        "The number of attempts. More attempts burden peers and cost reputation.",
    ),
    "retries": Known(
        ("retries",), _numbers, False,
        "Seconds between attempts. More attempts burden peers and cost reputation.",
    ),
    "inlinecss": Known(
        ("inlinecss",), _flag, True,
        "Move style sheets into the elements.",
    ),
    "keepmime": Known(
        ("keepmime",), _flag, False,
        "Keep the mail in results. It fills queues that are meant for small documents.",
    ),
    "normalize": Known(
        ("normalize",), _flag, True,
        "Turn bare CRs and LFs into CRLF.",
    ),
    "x-normalize": Known(
        ("normalize",), _flag, True,
        "The older name, without x-mq-.",
    ),
    "results-queue": Known(
        ("queues", "results"), _queue, False,
        "The queue for final results. Queues belong to applications, and some of them send mail.",
    ),
    "failure-queue": Known(
        ("queues", "failure"), _queue, False,
        "The queue for failures; see x-mq-results-queue.",
    ),
    "success-queue": Known(
        ("queues", "success"), _queue, False,
        "The queue for deliveries; see x-mq-results-queue.",
    ),
    "retry-queue": Known(
        ("queues", "retry"), _queue, False,
        "The queue for a copy at each retry; see x-mq-results-queue.",
    ),
    "smarthost-name": Known(
        ("smarthost", "name"), _word, False,
        "The older name of x-mq-smarthost-hostname.",
    ),
    "smarthost-hostname": Known(
        ("smarthost", "hostname"), _word, False,
        "The host to deliver to. It could be a host in the operator's network.",
    ),
    "smarthost-port": Known(
        ("smarthost", "port"), _port, False,
        "Its port. Any service could be contacted.",
    ),
    "smarthost-username": Known(
        ("smarthost", "username"), _word, False,
        "The login there.",
    ),
    "smarthost-password": Known(
        ("smarthost", "password"), _word, False,
        "Its password.",
    ),
    "dsn-notify": Known(
        ("dsn", "notify"), _word, True,
        "The events that the sender wants reports of, as NOTIFY of RCPT.",
    ),
    "dsn-ret": Known(
        ("dsn", "ret"), _word, True,
        "The part of the mail that reports contain, as RET of MAIL.",
    ),
    "dsn-orcpt": Known(
        ("dsn", "orcpt"), _word, True,
        "The original recipient, as ORCPT of RCPT.",
    ),
    "dsn-envid": Known(
        ("dsn", "envid"), _word, True,
        "The sender's id of the mail, as ENVID of MAIL.",
    ),
    "dsn-envelope": Known(
        ("dsn", "envelope"), _word, False,
        "The sender of reports. It could name somebody else.",
    ),
    "dsn-mta": Known(
        ("dsn", "mta"), _word, False,
        "The reporting host. It could name somebody else.",
    ),
}  # fmt: skip
"""The known fields, by name without "x-mq-".

Any other field becomes a string property of its own name, for applications that read the results.
That is safe, because nothing in mailerq reads such properties (`_RESERVED`).
"""

_PATHS: Final = frozenset(known.path[0] for known in FIELDS.values())
_SPELLING: Final = Spelling(name for name in FIELDS if name != "x-normalize")

EVERYTHING: Final = Rights(frozenset((*FIELDS, OTHERS)))
"""For the command line, documents and plugins, which could also write to the queue."""

_WORDS: Final[dict[str, frozenset[str]]] = {
    "none": frozenset(),
    "all": EVERYTHING.fields,
    "safe": frozenset((OTHERS, *(name for name, known in FIELDS.items() if known.safe))),
    OTHERS: frozenset((OTHERS,)),
    # a property means all of its fields
    **{
        known.path[0]: frozenset(n for n, other in FIELDS.items() if other.path[0] == known.path[0])
        for known in FIELDS.values()
    },
}
"""The words of `smtp-extract`, and the fields that each allows."""


def rights_of(words: Sequence[str], *, longest: float) -> Rights:
    """Return the rights that words of `smtp-extract` give, with times at most `longest` ahead.

    ``all`` has no limit for times. Raises ValueError for an unknown word.
    """
    for word in words:
        if word not in _WORDS:
            raise ValueError(f"{word!r} is none of {', '.join(sorted(_WORDS))}")
    if "none" in words and len(words) > 1:
        raise ValueError("none must be the only word")
    if "all" in words:
        return EVERYTHING
    return Rights(frozenset().union(*(_WORDS[word] for word in words)), longest)


_REPEATABLE: Final = frozenset({"ips", "tags"})

_RESERVED: Final = frozenset({
    # set by the server only
    "recipient", "message-id", "received", "hostname", "connection", "cli", "spool", "http",
    "checks", "results", "seen", "forcedip", "refusedips", "domain", "nextattempt", "extracted",
    "report", "dsn-delayed", "dsn-of",
    # parameters of MAIL
    "smtputf8", "requiretls", "binarymime", "tlsrequired",
    # the body, and properties of a type that a field cannot carry
    "mime", "mime-base64", "key", "data", "dkim", "dsn", "headers", "ips",
    "priority", "queues", "security", "force", "smarthost", "tags", "verp",
})  # fmt: skip
