"""Take the x-mq-* fields out of a header and turn them into properties of the message.

What stands in them steers delivery, so they count only in mail from somebody who may relay, and
of those only the fields that `Rights` allow; all others are taken out and ignored. They never go
out to the world. `FIELDS` is the table of what there is.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from mailerq.address import parse_mailbox, queue_problem
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
"""Stands for all fields that are not in the table, in `Rights` and in `smtp-extract`."""

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


class Rights(NamedTuple):
    """What the fields of somebody may do.

    `fields` are names of `FIELDS`, and `OTHERS`; times may lie `longest` seconds ahead.
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
    r"""Take every x-mq-* field, and x-normalize, out of `mime`.

    When `trusted`, those that `rights` allow (by default all) become properties. A field that
    is not allowed or cannot be used, because its value has a wrong form, or its name is reserved
    or was there before, does not stop the mail: it is ignored and listed. So is a queue for
    results that is the `outbox`, which would send them as mail. All other bytes stay as they are;
    a message without such fields comes back as the same object. None: the fields are longer than
    `FIELDS_LIMIT` together. At most `limit` ignored fields are named. `header` is that of `mime`,
    where it is known.

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
    """The fields of unknown names that may be misspelt, each with the one that is meant.

    `properties` is what `extract` found.

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
    """Put one field into `properties`, or say why not."""
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
    if not text:
        return None  # an empty name switches this queue off for this message
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
    """A field that is known: where its value goes, how it is read, and who may use it.

    `safe` fields are for everybody who may relay: they change nothing but the sender's own
    mail. `meaning` says what the field does, and where it is not safe what that could do to
    others.
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
        "The pool of such addresses.",
    ),
    "tag": Known(
        ("tags",), _tag, True,
        "A label for logs, results and statistics.",
    ),
    "delayed": Known(
        ("delayed",), _time, True,
        "Not to be sent before this time, which is bounded by max-delivertime.",
    ),
    "maxdelivertime": Known(
        ("maxdelivertime",), _time, True,
        "When it is given up; not later than max-delivertime says.",
    ),
    "maxattempts": Known(
        ("maxattempts",), _number, False,
        "How often it is tried. More attempts than the operator's cost peers and reputation.",
    ),
    "retries": Known(
        ("retries",), _numbers, False,
        "Seconds between attempts. More attempts cost peers and reputation.",
    ),
    "inlinecss": Known(
        ("inlinecss",), _flag, True,
        "Move style sheets into the elements, in the sender's own text.",
    ),
    "keepmime": Known(
        ("keepmime",), _flag, False,
        "Keep the text in results. It fills queues that are meant for small documents.",
    ),
    "normalize": Known(
        ("normalize",), _flag, True,
        "Make pairs of bare CRs and LFs, in the sender's own text.",
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
        "The queue for failures. As with x-mq-results-queue.",
    ),
    "success-queue": Known(
        ("queues", "success"), _queue, False,
        "The queue for deliveries. As with x-mq-results-queue.",
    ),
    "retry-queue": Known(
        ("queues", "retry"), _queue, False,
        "The queue for a copy of each attempt that is repeated. As with x-mq-results-queue.",
    ),
    "smarthost-name": Known(
        ("smarthost", "name"), _word, False,
        "The older name of x-mq-smarthost-hostname.",
    ),
    "smarthost-hostname": Known(
        ("smarthost", "hostname"), _word, False,
        "The host that takes this mail. It could be one in the operator's network.",
    ),
    "smarthost-port": Known(
        ("smarthost", "port"), _port, False,
        "Its port. Any service could be spoken to.",
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
        "When the sender wants to hear of it, as NOTIFY of RCPT.",
    ),
    "dsn-ret": Known(
        ("dsn", "ret"), _word, True,
        "How much of the mail a report has, as RET of MAIL.",
    ),
    "dsn-orcpt": Known(
        ("dsn", "orcpt"), _word, True,
        "Whom the mail was for at first, as ORCPT of RCPT.",
    ),
    "dsn-envid": Known(
        ("dsn", "envid"), _word, True,
        "The sender's name for the mail, as ENVID of MAIL.",
    ),
    "dsn-envelope": Known(
        ("dsn", "envelope"), _word, False,
        "The sender of a report: somebody else's name.",
    ),
    "dsn-mta": Known(
        ("dsn", "mta"), _word, False,
        "The reporting host: somebody else's name.",
    ),
}  # fmt: skip
"""Name of the field without "x-mq-" -> what is known of it.

A field that is not here becomes a property of its own name, a string. That is safe: applications
find their own names in the results by it, and nothing in mailerq reads them (`_RESERVED`).
"""

_PATHS: Final = frozenset(known.path[0] for known in FIELDS.values())
_SPELLING: Final = Spelling(name for name in FIELDS if name != "x-normalize")

EVERYTHING: Final = Rights(frozenset((*FIELDS, OTHERS)))
"""For whoever may write the queue as well: the command line, documents, plugins."""

_WORDS: Final[dict[str, frozenset[str]]] = {
    "none": frozenset(),
    "all": EVERYTHING.fields,
    "safe": frozenset((OTHERS, *(name for name, known in FIELDS.items() if known.safe))),
    OTHERS: frozenset((OTHERS,)),
    # a property stands for all of its fields
    **{
        known.path[0]: frozenset(n for n, other in FIELDS.items() if other.path[0] == known.path[0])
        for known in FIELDS.values()
    },
}
"""What may stand in `smtp-extract` -> the fields that it allows."""


def rights_of(words: Sequence[str], *, longest: float) -> Rights:
    """What the words of `smtp-extract` allow; times lie `longest` seconds ahead, but for ``all``.

    Raises ValueError for a word that is none.
    """
    for word in words:
        if word not in _WORDS:
            raise ValueError(f"{word!r} is none of {', '.join(sorted(_WORDS))}")
    if "none" in words and len(words) > 1:
        raise ValueError("none stands alone")
    if "all" in words:
        return EVERYTHING
    return Rights(frozenset().union(*(_WORDS[word] for word in words)), longest)


_REPEATABLE: Final = frozenset({"ips", "tags"})

_RESERVED: Final = frozenset({
    # what the server says about a message is not the sender's to say
    "recipient", "message-id", "received", "hostname", "connection", "cli", "spool", "http",
    "checks", "results", "seen", "forcedip", "domain", "nextattempt", "extracted",
    # what the client has asked for in MAIL
    "smtputf8", "requiretls", "binarymime",
    # the body, and properties of a type that a field cannot carry
    "mime", "mime-base64", "key", "data", "dkim", "dsn", "headers", "ips",
    "priority", "queues", "security", "force", "smarthost", "tags",
})  # fmt: skip
