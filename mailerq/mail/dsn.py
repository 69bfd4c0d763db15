r"""Make delivery status notifications: reports to the sender about what became of a mail.

A report is a multipart/report (RFC 6522) of a text for people, a part for programs (RFC 3464), and
the mail or its header. All of it is ASCII, whatever the mail was, so any peer takes it. Mail with
international addresses has the part types of RFC 6533, in an encoding.

Values from outside are cleaned and cut, so none can end a field or a part. Making a report takes
time for what it returns only: `excerpt` takes that from the mail.

>>> mail = b"Message-ID: <1@list.test>\r\nSubject: Hi\r\n\r\nhello\r\n"
>>> report = make(
...     Facts(to="ann@b.test", sender="MAILER-DAEMON@me.test", mta="me.test", id="r1", now=0),
...     "failed",
...     [Recipient("bob@c.test", "5.1.1", "smtp; 550 5.1.1 no such user")],
...     excerpt(mail, full=False, limit=1000),
... )
>>> print(report.decode().partition("\r\n\r\n")[0].replace("\r\n", "\n"))
From: Mail Delivery System <MAILER-DAEMON@me.test>
To: ann@b.test
Subject: Undelivered mail: Hi
Date: Thu, 1 Jan 1970 00:00:00 +0000
Message-ID: <r1@me.test>
In-Reply-To: <1@list.test>
References: <1@list.test>
Auto-Submitted: auto-replied
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status;
 boundary="=_dsn0d9d99d1eb27d6dea0ad4df6643e36f8"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha256
from itertools import islice
from typing import Final, NamedTuple

import msgspec

from mailerq.mail import dsn_texts
from mailerq.mail.dsn_texts import Texts, Words, languages_in
from mailerq.mail.fields import FieldError, address_field, clean, in_words, make_field
from mailerq.mail.headers import (
    LINE_LIMIT,
    Header,
    date_field,
    format_date,
    message_id_field,
    unfold,
)
from mailerq.mail.parts import encode_text
from mailerq.mail.seven_bit import to_seven_bit
from mailerq.wire import unitext
from mailerq.wire.framing import in_pairs

__all__ = ["NOTHING", "Excerpt", "Facts", "Recipient", "excerpt", "is_quick", "make"]

LINE_BYTES: Final = 998
"""Bytes of a line that goes as it is (RFC 5321, section 4.5.3.1.6)."""

WORD: Final = 500
"""Characters of a word in a field; a longer one is broken."""

MAX_VALUE: Final = 2000
"""Characters of a value in the part for programs."""

QUICK_BYTES: Final = 1 << 14
"""Bytes of a mail that `excerpt` takes whole in less than a millisecond."""

MAX_FIELDS: Final = 20
"""Fields of the mail to look at, of those that a report quotes."""

MAX_ID: Final = 250
MAX_SUBJECT: Final = 200

_FIELDS: Final = re.compile(
    rb"\n(?:message-id|subject|accept-language|content-language)[ \t]*+:"
).finditer
_MESSAGE_ID: Final = re.compile(rb"<[!-;=?-~]{1,250}>").fullmatch
_STATUS: Final = re.compile(r"[245]\.\d{1,3}\.\d{1,3}").fullmatch
_PLAIN: Final = re.compile(r"[ -~]*").fullmatch


class Recipient(msgspec.Struct, frozen=True):
    """What became of the mail for one recipient.

    `status` is three numbers (RFC 3463). `diagnostic` is a type and a text: ``smtp; 550 no``.
    `original` is ORCPT, ``type;address``. Times are seconds since 1970.
    """

    address: str
    status: str
    diagnostic: str = ""
    original: str = ""
    remote_mta: str = ""
    last_attempt: float | None = None
    until: float | None = None
    log_id: str = ""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """The report itself, and the mail that it is about.

    `to` is the sender of the mail, `sender` the author of the report, `mta` the host that reports,
    `id` the message id of the report. `arrival` is when the mail came, seconds since 1970.
    `client` is the address of the host that brought it.
    """

    to: str
    sender: str
    mta: str
    id: str
    now: float
    envid: str = ""
    arrival: float | None = None
    client: str = ""
    utf8: bool = False


class Excerpt(NamedTuple):
    """What a report quotes of a mail.

    `data` is the whole mail if `whole`, else its header; empty if there is none. It has CRLF at the
    end of each line. `message_id` has its angle brackets.
    """

    data: bytes = b""
    whole: bool = False
    message_id: str = ""
    subject: str = ""
    languages: tuple[str, ...] = ()


NOTHING: Final = Excerpt()
"""There is no mail to quote."""


def excerpt(body: bytes | None, *, full: bool, limit: int) -> Excerpt:
    """Take what a report quotes: the mail if it is wanted `full`, else its header.

    A mail of more than `limit` bytes, or one that cannot be sent in ASCII lines, gives its header
    only, and of that the first `limit` bytes at most.
    """
    if body is None:
        return NOTHING
    header = Header(body)
    message_id, subject = "", ""
    accepted: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    for field in islice(header.found_by(_FIELDS), MAX_FIELDS):
        value = unfold(field.value[: 2 * MAX_VALUE])
        if field.name == b"message-id":
            message_id = message_id or (value.decode() if _MESSAGE_ID(value) else "")
        elif field.name == b"subject":
            subject = subject or _decoded(value)
        elif field.name == b"accept-language":
            accepted = accepted or languages_in(value.decode("ascii", "replace"))
        else:
            own = own or languages_in(value.decode("ascii", "replace"))
    data = _whole(body) if full and len(body) <= limit else None
    whole = data is not None
    if data is None:
        data = header.raw
        if len(data) > limit:
            data = data[: data.rfind(b"\n", 0, limit) + 1]
        data = in_pairs(data)
        if data and not data.endswith(b"\r\n"):
            data += b"\r\n"
    return Excerpt(data, whole, message_id, subject, (*accepted, *own))


def is_quick(body: bytes | None, *, full: bool, limit: int) -> bool:
    """Whether `excerpt` is quick. Otherwise call it in a thread."""
    return body is None or not full or len(body) <= QUICK_BYTES or len(body) > limit


def _whole(body: bytes) -> bytes | None:
    """The mail in ASCII lines; None if there is no such form."""
    data: bytes | None = in_pairs(body)
    assert data is not None
    if not data.isascii():
        data = to_seven_bit(data)
    return data if data is not None and _is_short(data) else None


def _is_short(data: bytes) -> bool:
    return b"\0" not in data and max(map(len, data.split(b"\r\n"))) <= LINE_BYTES


def _decoded(value: bytes) -> str:
    """A subject for people."""
    text = in_words(value.decode(errors="replace"), lambda words: True)
    return clean(text).strip()[:MAX_SUBJECT]


def make(
    facts: Facts,
    event: str,
    recipients: Sequence[Recipient],
    quoted: Excerpt,
    texts: Texts = dsn_texts.DEFAULT,
) -> bytes:
    """Make a whole mail. `event` is one of `dsn_texts.EVENTS`, the same for all recipients."""
    text = texts.find(event, quoted.languages)
    words = _words(facts, recipients, quoted)
    head = [
        _field("From", address_field(text.name, facts.sender)),
        _field("To", facts.to, utf8=True),
        _field("Subject", words.subject(text)),
        date_field(facts.now),
        message_id_field(facts.id, facts.mta),
    ]
    if quoted.message_id:
        head.append(_field("In-Reply-To", quoted.message_id))
        head.append(_field("References", quoted.message_id))
    head.append(b"Auto-Submitted: auto-replied\r\nMIME-Version: 1.0\r\n")
    encoding, content = encode_text(words.text(text).rstrip("\n") + "\n")
    parts = [
        b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: %b\r\n\r\n%b"
        % (encoding, content),
        _status_part(facts, event, recipients),
    ]
    if quoted.data:
        parts.append(_quoted_part(quoted))
    boundary = _boundary(facts.id, parts)
    head.append(
        b"Content-Type: multipart/report; report-type=delivery-status;\r\n"
        b' boundary="%b"\r\n\r\n' % boundary
    )
    for part in parts:
        head += (b"--", boundary, b"\r\n", part, b"\r\n")
    return b"".join((*head, b"--", boundary, b"--\r\n"))


def _words(facts: Facts, recipients: Sequence[Recipient], quoted: Excerpt) -> Words:
    until = recipients[0].until if recipients else None
    return Words.of(
        {
            "sender": facts.to,
            "subject": quoted.subject,
            "date": "" if facts.arrival is None else format_date(facts.arrival),
            "message-id": quoted.message_id,
            "until": "" if until is None else format_date(until),
            "hostname": facts.mta,
            "id": recipients[0].log_id if recipients else "",
        },
        [(each.address, _said(each)) for each in recipients],
    )


def _said(recipient: Recipient) -> str:
    """What happened, for people."""
    kind, _, text = recipient.diagnostic.partition("; ")
    if kind == "smtp" and recipient.remote_mta:
        return f"{recipient.remote_mta.partition('; ')[2]}: {text}"
    return text


def _field(name: str, value: str, *, utf8: bool = False) -> bytes:
    """A field of the report; a value that cannot stand there is cut and made ASCII."""
    try:
        return make_field(name, value, utf8=utf8)
    except FieldError:
        return make_field(name, _ascii(value))


def _ascii(value: str) -> str:
    """A value in printable ASCII, with words that fit into a line."""
    value = clean(value[:MAX_VALUE]).strip()
    if not value.isascii():
        value = value.encode("ascii", "backslashreplace").decode()
    if len(value) > WORD:
        words = value.split(" ")
        value = " ".join(
            word[at : at + WORD] for word in words for at in range(0, max(len(word), 1), WORD)
        )
    return value


# The part for programs


def _status_part(facts: Facts, event: str, recipients: Sequence[Recipient]) -> bytes:
    is_global = facts.utf8 or not all(each.address.isascii() for each in recipients)
    lines = _Lines(is_global)
    # RFC 3461, section 6.3 (b): "dns" is for names that the DNS may have.
    lines.add("Reporting-MTA", f"{'dns' if '.' in facts.mta else 'x-local-hostname'}; {facts.mta}")
    lines.add("Original-Envelope-Id", facts.envid)
    lines.add("Received-From-MTA", facts.client and f"dns; [{facts.client}]")
    lines.date("Arrival-Date", facts.arrival)
    for each in recipients:
        lines.pieces.append(b"\r\n")
        lines.add("Original-Recipient", _original(each.original, is_global))
        kind = "rfc822" if each.address.isascii() else "utf-8"
        lines.add("Final-Recipient", f"{kind}; {each.address}")
        lines.add("Action", event)
        lines.add("Status", each.status if _STATUS(each.status) else f"{_CLASSES[event]}.0.0")
        lines.add("Remote-MTA", each.remote_mta)
        lines.add("Diagnostic-Code", each.diagnostic)
        lines.date("Last-Attempt-Date", each.last_attempt)
        lines.date("Will-Retry-Until", each.until if event == "delayed" else None)
        lines.add("Final-Log-ID", each.log_id)
    content = b"".join(lines.pieces)
    if not is_global:
        return b"Content-Type: message/delivery-status\r\n\r\n" + content
    encoding, encoded = encode_text(content.decode())
    head = b"Content-Type: message/global-delivery-status\r\nContent-Transfer-Encoding: %b\r\n\r\n"
    return head % encoding + encoded


def _original(orcpt: str, is_global: bool) -> str:
    """The value of Original-Recipient; an address of the type utf-8 is plain in a global part."""
    kind, _, address = orcpt.partition(";")
    if kind.lower() == unitext.KIND:
        try:
            plain = unitext.unquote(address)
        except ValueError:
            return ""  # `Recipient` may have come from anywhere
        address = plain if is_global else unitext.quote(plain, ascii=True)
    return f"{kind}; {address}" if address else ""


_CLASSES: Final = {"failed": 5, "delayed": 4, "delivered": 2, "relayed": 2}


class _Lines:
    """Fields of the part for programs; with `utf8` they keep characters beside ASCII."""

    def __init__(self, utf8: bool) -> None:
        self.pieces: list[bytes] = []
        self._utf8 = utf8

    def add(self, name: str, value: str) -> None:
        """Add a field; one without a value is left out."""
        if not value:
            return
        if len(name) + 2 + len(value) <= LINE_LIMIT and _PLAIN(value):
            self.pieces.append(f"{name}: {value}\r\n".encode())
        elif self._utf8:
            self.pieces.append(_folded(name, clean(value[:MAX_VALUE]).strip()))
        else:
            self.pieces.append(_folded(name, _ascii(value)))

    def date(self, name: str, time: float | None) -> None:
        if time is not None:
            self.pieces.append(f"{name}: {format_date(time)}\r\n".encode())


def _folded(name: str, value: str) -> bytes:
    """Fold a field at blanks. No line starts with a second blank, or is blank."""
    lines, line = [], f"{name}:"
    for word in value.split():
        if len(line) + 1 + len(word) > LINE_LIMIT and not line.endswith(":"):
            lines.append(line)
            line = ""
        line += f" {word}"
    return "\r\n".join((*lines, line)).encode(errors="replace") + b"\r\n"


# The mail


def _quoted_part(quoted: Excerpt) -> bytes:
    data = quoted.data
    if quoted.whole:
        return b"Content-Type: message/rfc822\r\n\r\n" + data
    if data.isascii() and _is_short(data):
        return b"Content-Type: text/rfc822-headers\r\n\r\n" + data
    kind = b"text/rfc822-headers" if data.isascii() else b"message/global-headers"
    encoding, content = encode_text(data.decode(errors="replace"))
    head = b"Content-Type: %b\r\nContent-Transfer-Encoding: %b\r\n\r\n"
    return head % (kind, encoding) + content


def _boundary(id: str, parts: Sequence[bytes]) -> bytes:
    number = 0
    while True:
        seed = f"{id} {number}".encode(errors="replace")
        boundary = b"=_dsn" + sha256(seed).hexdigest()[:32].encode()
        if not any(boundary in part for part in parts):
            return boundary
        number += 1
