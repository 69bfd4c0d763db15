"""Recognise mail that reports on other mail, and read what it says.

Reports are delivery status notifications (RFC 3464, RFC 6533), complaints (RFC 5965, RFC 6591),
disposition notifications (RFC 8098), TLS reports (RFC 8460), aggregate reports of DMARC, automatic
replies (RFC 3834), and bounces in no standard form.

Theory of operation
-------------------
`is_candidate` looks at some header fields only, which decide for nearly all mail. `recognise` takes
the mail apart (`mailerq.mail.report_parts`) and asks for each type in turn, the most exact first:
a part that is a report, the header of a report, the text of a bounce, the mark of an automatic
reply. The first part of a known type decides, because many reports lack the parameter
``report-type``, and some have a wrong one.

Everything that a report says may be a lie. Which message of ours a report is about, and whether
that is proved, is the matter of `mailerq.rules.reports`.

Guarantees: `recognise` raises nothing, whatever the bytes are. Time and memory are bounded by
`SCAN_BYTES`. For a small mail the work takes a fraction of a millisecond; for a mail of
`LONG_BYTES` or more, do the work in a thread.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, Final, NamedTuple

import msgspec

from mailerq.mail.bounce_texts import read_bounce
from mailerq.mail.headers import Finder, Header, unfold
from mailerq.mail.report_fields import (
    Fields,
    address_in,
    code_in,
    groups_of,
    number,
    one_line,
    status_in,
    typed,
)
from mailerq.mail.report_parts import Entity, entities, fields_of
from mailerq.mail.tls_reports import TlsReport, read_tls_report

__all__ = [
    "LONG_BYTES",
    "TYPES",
    "Recipient",
    "Recognised",
    "Report",
    "is_candidate",
    "recognise",
]

LONG_BYTES: Final = 1 << 13
"""Bytes of a mail above which the work can take more than some milliseconds."""

HEAD_BYTES: Final = 1 << 16
"""Bytes of a header that are searched for marks."""

MAX_MARKS: Final = 100
"""Fields that are looked at of one header."""

MAX_RECIPIENTS: Final = 100
"""Recipients of a report that are named; there may be more."""

TYPES: Final = {
    "delivery-status": "A delivery status notification (RFC 3464).",
    "bounce": "A bounce in no standard form, as far as its text can be read.",
    "complaint": "A complaint or another report about the abuse of mail (RFC 5965).",
    "disposition": "A notification that a mail was shown or deleted (RFC 8098).",
    "auto-reply": "An automatic reply, such as an out-of-office note (RFC 3834).",
    "tls": "A report about TLS (RFC 8460).",
    "dmarc": "An aggregate report of DMARC.",
    "other": "Any other mail to a return address that this server has signed.",
}
"""The types of reports, and their meanings."""

NULL_SENDER: Final = "null-sender"
"""The mark of an automatic reply that has no other mark than its sender."""

MAX_GROUPS: Final = 2 * MAX_RECIPIENTS + 1
"""Groups of fields that are read; others are counted."""

_MARKS: Final = re.compile(
    rb"\n(?:content-type|subject|from|auto-submitted|precedence|x-autoreply|x-autorespond"
    rb"|x-auto-response-suppress|x-ms-exchange-inbox-rules-loop|x-failed-recipients"
    rb"|tls-report-domain)[ \t]*+:"
).finditer
_DAEMON: Final = re.compile(
    r"(?:^|[<\s\"'(])(?:mailer-daemon|mail-daemon|mailerdaemon|postmaster|mdaemon)(?:@|>|$|[\s\"'])",
    re.IGNORECASE,
).search
_DMARC_FILE: Final = re.compile(
    r"(?:^|[\s\"=])([\w.-]{1,253})!([\w.-]{1,253})!(\d{1,12})!(\d{1,12})(?:!([^!\s\"]{1,200}))?"
    r"\.(?:xml|xml\.gz|zip|gz)(?:$|[\s\";])"
).search
_DMARC_SUBJECT: Final = re.compile(
    r"report domain: ?([\w.-]{1,253})(?: submitter: ?([\w.-]{1,253}))?"
    r"(?: report-id: ?<?([^<>\s]{1,200})>?)?",
    re.IGNORECASE,
).search
_JMRP_SUBJECT: Final = re.compile(
    r"complaint about message from ([0-9a-f.:]{3,45})", re.IGNORECASE
).match
_BREAK: Final = re.compile(r"<(?:br|/?p|/?div|/tr|/h\d|/li)\b[^<>]{0,200}>", re.IGNORECASE).sub
_TAG: Final = re.compile(r"<[^<>]{0,2000}>").sub
_WORD: Final = re.compile(r"[A-Za-z-]{0,40}").match
_PRECEDENCE: Final = re.compile(r"auto[-_]?reply", re.IGNORECASE).match

HTML_CHARS: Final = 1 << 16
"""Characters of an HTML text that are read."""

STATUS_KINDS: Final = frozenset((b"message/delivery-status", b"message/global-delivery-status"))
DISPOSITION_KINDS: Final = frozenset(
    (b"message/disposition-notification", b"message/global-disposition-notification")
)
COMPLAINT_KINDS: Final = frozenset((b"message/feedback-report",))
TLS_KINDS: Final = frozenset((b"application/tlsrpt+gzip", b"application/tlsrpt+json"))
PART_KINDS: Final = STATUS_KINDS | DISPOSITION_KINDS | COMPLAINT_KINDS | TLS_KINDS
QUOTED_KINDS: Final = frozenset(
    (
        b"message/rfc822", b"message/global", b"text/rfc822-headers", b"text/rfc822-header",
        b"message/rfc822-headers", b"message/global-headers",
    )
)  # fmt: skip
"""Types of the mail that a report is about, or of its header."""

_OF_REPORT_TYPE: Final[Mapping[bytes, bytes]] = {
    b"delivery-status": b"message/delivery-status",
    b"global-delivery-status": b"message/delivery-status",
    b"feedback-report": b"message/feedback-report",
    b"disposition-notification": b"message/disposition-notification",
}
"""What the second part is meant to be if its own type does not tell."""

ACTIONS: Final = frozenset(("failed", "delayed", "delivered", "relayed", "expanded"))
SEVERITY: Final = ("failed", "delayed", "expanded", "relayed", "delivered", "")
"""Actions, the gravest first."""


class _Struct(msgspec.Struct, frozen=True, omit_defaults=True, rename="kebab"):
    """A part of the JSON object; what is empty is left out."""


class Recipient(_Struct, frozen=True):
    """What a report says about one recipient."""

    action: str = ""
    status: str = ""
    code: int = 0
    """The code of the reply in `diagnostic`; 0: there is none."""
    recipient: str = ""
    original_recipient: str = ""
    diagnostic: str = ""
    remote_mta: str = ""
    last_attempt: str = ""
    retry_until: str = ""
    log_id: str = ""


class Original(_Struct, frozen=True):
    """What came back of the header of the mail that a report is about."""

    message_id: str = ""
    subject: str = ""
    author: str = msgspec.field(default="", name="from")
    to: str = ""
    date: str = ""


class Aggregate(_Struct, frozen=True):
    """What the name and the subject of an aggregate report say."""

    domain: str = ""
    submitter: str = ""
    report_id: str = ""
    begin: int = 0
    end: int = 0
    """Seconds since 1970."""
    file: str = ""


class Report(Recipient, frozen=True, kw_only=True):
    """A report. What is said about the gravest recipient stands beside the rest.

    `recipients` has all of them, up to `MAX_RECIPIENTS`, if there are several.
    """

    type: str
    reporting_mta: str = ""
    received_from_mta: str = ""
    arrival: str = ""
    envid: str = ""
    recipients: list[Recipient] = []
    recipient_count: int = 0
    """How many recipients there are, if that is more than one."""
    feedback_type: str = ""
    user_agent: str = ""
    source_ip: str = ""
    original_sender: str = ""
    reported_domain: str = ""
    incidents: int = 0
    auth_failure: str = ""
    delivery_result: str = ""
    disposition: str = ""
    mode: str = ""
    error: str = ""
    auto_submitted: str = ""
    subject: str = ""
    original: Original | None = None
    tls: TlsReport | None = None
    dmarc: Aggregate | None = None
    problem: str = ""
    """Why a part of the report could not be read."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {"type": self.type, **msgspec.to_builtins(self)}


class Recognised(NamedTuple):
    """A report, and the header fields of the mail that the report is about, as they came back."""

    report: Report
    quoted: list[tuple[bytes, bytes]]

    @property
    def is_guess(self) -> bool:
        """Whether nothing but the null sender says that the mail is an automatic reply.

        Nearly all such mail is one (RFC 5321, section 4.5.5), or a bounce in a form of its own.
        """
        return self.report.auto_submitted == NULL_SENDER

    def quoted_values(self, name: bytes) -> list[bytes]:
        """The values of the quoted fields with this name (in lower case)."""
        return [value for key, value in self.quoted if key == name]


class _Marks(dict[bytes, bytes]):
    """The first value of each mark in the header of a mail."""

    @classmethod
    def of(cls, head: bytes) -> _Marks:
        marks = cls()
        find: Finder = _MARKS
        for field in islice(Header(head).found_by(find), MAX_MARKS):
            marks.setdefault(field.name, unfold(field.value))
        return marks

    def text(self, name: bytes) -> str:
        return one_line(self.get(name, b""))

    def is_from_daemon(self, sender: str) -> bool:
        """Whether a mail server wrote the mail, by its envelope or its author."""
        return not sender or bool(_DAEMON(sender) or _DAEMON(self.text(b"from")))

    def auto_submitted(self, sender: str) -> str:
        """The mark of an automatic reply, or an empty string (RFC 3834, section 5)."""
        value = self.text(b"auto-submitted")
        match = _WORD(value)
        word = match[0].lower() if match else ""
        if word == "auto-replied":
            return word
        if b"x-autoreply" in self or b"x-autorespond" in self:
            return word or "x-autoreply"
        if _PRECEDENCE(self.text(b"precedence")):
            return "precedence"
        # Exchange marks out-of-office notes so, and others mark mail of programs so.
        if word == "auto-generated" and (
            not sender
            or b"x-auto-response-suppress" in self
            or b"x-ms-exchange-inbox-rules-loop" in self
        ):
            return word
        return ""


def is_candidate(mail: bytes | memoryview, sender: str) -> bool:
    """Whether a mail may be a report; False for nearly all mail that is none.

    `sender` is the address of MAIL FROM. The time is that of a search in 64 kB at most.
    """
    marks = _Marks.of(bytes(mail[:HEAD_BYTES]))
    kind = marks.get(b"content-type", b"")[:100].lower().lstrip()
    return (
        not sender
        or kind.startswith((b"multipart/report", *PART_KINDS))
        or b"tls-report-domain" in marks
        or b"x-failed-recipients" in marks
        or bool(marks.auto_submitted(sender))
        or marks.is_from_daemon(sender)
        or bool(_DMARC_SUBJECT(subject := marks.text(b"subject")) or _JMRP_SUBJECT(subject))
    )


def recognise(mail: bytes | memoryview, sender: str) -> Recognised | None:
    r"""Read a mail as a report; None if the mail is none. `sender` is the address of MAIL FROM.

    >>> mail = b"Auto-Submitted: auto-replied\r\nSubject: Away\r\n\r\nSorry"
    >>> recognise(mail, "a@b.test").report.to_dict()
    {'type': 'auto-reply', 'auto-submitted': 'auto-replied', 'subject': 'Away'}
    """
    marks = _Marks.of(bytes(mail[:HEAD_BYTES]))
    parts = list(entities(mail))
    whole, daemon = parts[0], marks.is_from_daemon(sender)
    subject = marks.text(b"subject")
    is_report = whole.kind == b"multipart/report"
    quoted = _quoted(parts)
    report: Report | None = None
    part = _report_part(parts, is_report, trusts_mixed=daemon or _named_as_report(marks))
    if part is None and b"tls-report-domain" in marks:
        part = _tls_part(parts)
    if part is not None:
        kind, entity = part
        report = _READERS[kind](entity._replace(kind=kind))
    if report is None and (_named_as_report(marks) or is_report):
        report = _aggregate(parts, subject)
    if report is None and (match := _JMRP_SUBJECT(subject)):
        report = _forwarded_complaint(match[1], quoted)
    if daemon and (report is None or _is_silent(report)):
        read = _bounce(parts, marks, subject)
        if read is not None:
            report, quoted = _completed(report, read[0]), quoted or read[1]
    if report is None:
        mark = marks.auto_submitted(sender)
        denied = is_report or marks.text(b"auto-submitted").lower() == "no"
        if not (sender or mark or denied):
            mark = NULL_SENDER
        if not mark:
            return None
        report = Report(type="auto-reply", auto_submitted=mark, subject=subject)
    if report.type not in ("auto-reply", "tls", "dmarc"):
        original = _original(quoted)
        if original is not None:
            report = msgspec.structs.replace(report, original=original)
    return Recognised(report, quoted)


def _is_silent(report: Report) -> bool:
    """Whether a delivery status names no recipient, as those of some servers do."""
    return report.type == "delivery-status" and not (report.recipient or report.action)


def _completed(report: Report | None, read: Report) -> Report:
    """What the text says, beside what the fields of a silent delivery status say."""
    if report is None:
        return read
    return msgspec.structs.replace(
        read,
        type=report.type,
        reporting_mta=report.reporting_mta,
        received_from_mta=report.received_from_mta,
        arrival=report.arrival,
        envid=report.envid,
    )


def _named_as_report(marks: _Marks) -> bool:
    return b"tls-report-domain" in marks or bool(_DMARC_SUBJECT(marks.text(b"subject")))


def _report_part(
    parts: list[Entity], is_report: bool, *, trusts_mixed: bool
) -> tuple[bytes, Entity] | None:
    """The first part that is a report, and its kind."""
    if not (is_report or trusts_mixed or parts[0].kind in PART_KINDS):
        if not any(part.kind == b"multipart/report" for part in parts[:4]):
            return None  # somebody has attached a report to a mail
    for part in parts:
        if part.kind in PART_KINDS:
            return part.kind, part
    # Some programs give the second part the type text/plain, or none.
    meant = _OF_REPORT_TYPE.get(parts[0].parameters.get(b"report-type", b"").strip().lower())
    if is_report and meant:
        second = [part for part in parts if part.depth == 1][1:2]
        if second and second[0].kind in (b"text/plain", b"application/octet-stream"):
            return meant, second[0]
    return None


def _tls_part(parts: list[Entity]) -> tuple[bytes, Entity] | None:
    """The file of a TLS report whose type is not that of RFC 8460."""
    for part in parts:
        name = part.filename.lower()
        for ending, kind in ((".json.gz", b"gzip"), (".json", b"json")):
            if name.endswith(ending):
                return b"application/tlsrpt+" + kind, part
    return None


def _quoted(parts: list[Entity]) -> list[tuple[bytes, bytes]]:
    """The header fields of the mail that a report is about."""
    for part in parts:
        if part.kind in QUOTED_KINDS:
            content = part.content().lstrip(b"\r\n")
            end = content.find(b"\r\n\r\n")
            return fields_of(content[:end] if end >= 0 else content)
    return []


def _first(quoted: list[tuple[bytes, bytes]], name: bytes) -> bytes:
    return next((value for key, value in quoted if key == name), b"")


def _original(quoted: list[tuple[bytes, bytes]]) -> Original | None:
    if not quoted:
        return None
    names = (b"message-id", b"subject", b"from", b"to", b"date")
    found = [one_line(_first(quoted, name)) for name in names]
    if not any(found):
        return None
    return Original(
        message_id=found[0], subject=found[1], author=found[2], to=found[3], date=found[4]
    )


# Delivery status


def _delivery_status(entity: Entity) -> Report | None:
    groups, count = groups_of(entity.content(), most=MAX_GROUPS)
    about = Fields()
    if groups and b"final-recipient" not in groups[0] and b"original-recipient" not in groups[0]:
        about = groups[0]
    elif groups and b"reporting-mta" in groups[0]:
        about = groups[0]  # no empty line between the message and the recipient
    recipients = [
        _recipient(group)
        for group in groups
        if b"final-recipient" in group or b"original-recipient" in group or b"action" in group
    ]
    if not (recipients or b"reporting-mta" in about):
        return None
    recipients.sort(key=lambda each: SEVERITY.index(each.action))
    first = recipients[0] if recipients else Recipient()
    number_of_all = len(recipients) + max(0, count - len(groups))
    several = number_of_all > 1
    return Report(
        type="delivery-status",
        reporting_mta=about.typed(b"reporting-mta"),
        received_from_mta=about.typed(b"received-from-mta"),
        arrival=about.time(b"arrival-date"),
        envid=about.text(b"original-envelope-id"),
        recipients=recipients[:MAX_RECIPIENTS] if several else [],
        recipient_count=number_of_all if several else 0,
        **msgspec.structs.asdict(first),
    )


def _recipient(fields: Fields) -> Recipient:
    diagnostic = fields.typed(b"diagnostic-code")
    status = status_in(fields.text(b"status")) or status_in(diagnostic)
    said = fields.text(b"action").partition(" ")[0].partition(";")[0].lower()
    code = code_in(diagnostic)
    action = said if said in ACTIONS else ""
    if not action and (digit := status[:1] or str(code)[0]) in "245":
        action = {"2": "delivered", "4": "delayed", "5": "failed"}[digit]
    return Recipient(
        action=action,
        status=status,
        code=code,
        recipient=_address(fields, b"final-recipient"),
        original_recipient=_address(fields, b"original-recipient"),
        diagnostic=diagnostic,
        remote_mta=fields.typed(b"remote-mta"),
        last_attempt=fields.time(b"last-attempt-date"),
        retry_until=fields.time(b"will-retry-until"),
        log_id=fields.text(b"final-log-id"),
    )


def _address(fields: Fields, name: bytes) -> str:
    """An address of a report; what is no address of mail, such as one of X.400, stays as it is."""
    text = fields.typed(name)
    return address_in(text) or text[:320]


# Complaints


def _complaint(entity: Entity) -> Report | None:
    groups, _ = groups_of(entity.content(), most=10)
    if not groups:
        return None
    fields = Fields()
    for group in groups:
        for name, value in group.items():
            fields.setdefault(name, value)
    kind = fields.text(b"feedback-type").lower()
    if not kind and b"version" not in fields and b"user-agent" not in fields:
        return None
    arrival = fields.time(b"arrival-date") or fields.time(b"received-date")
    recipient = fields.get(b"original-rcpt-to") or fields.get(b"removal-recipient") or b""
    return Report(
        type="complaint",
        feedback_type=kind[:40],
        user_agent=fields.text(b"user-agent"),
        source_ip=fields.text(b"source-ip")[:45],
        original_sender=address_in(fields.text(b"original-mail-from")),
        recipient=address_in(typed(recipient)),
        reported_domain=fields.text(b"reported-domain")[:253],
        reporting_mta=fields.typed(b"reporting-mta"),
        envid=fields.text(b"original-envelope-id"),
        arrival=arrival,
        incidents=number(fields.text(b"incidents")) or 0,
        auth_failure=fields.text(b"auth-failure")[:40],
        delivery_result=fields.text(b"delivery-result")[:40],
    )


def _forwarded_complaint(source_ip: str, quoted: list[tuple[bytes, bytes]]) -> Report | None:
    """A complaint of the junk mail reporting program of Outlook.com: the mail, in a mail."""
    if not quoted:
        return None
    return Report(
        type="complaint",
        feedback_type="abuse",
        source_ip=source_ip,
        recipient=address_in(one_line(_first(quoted, b"x-hmxmroriginalrecipient"))),
    )


# Dispositions


def _disposition(entity: Entity) -> Report | None:
    groups, _ = groups_of(entity.content(), most=10)
    fields = next((group for group in groups if b"disposition" in group), None)
    if fields is None:
        return None
    mode, _, rest = fields.text(b"disposition").partition(";")
    what, _, modifier = rest.partition("/")
    found = fields.text(b"original-message-id")
    error = fields.text(b"error") or fields.text(b"failure") or fields.text(b"warning")
    return Report(
        type="disposition",
        disposition=what.strip().lower()[:40],
        mode=mode.strip().lower()[:80],
        error=error or modifier.strip()[:80],
        recipient=_address(fields, b"final-recipient"),
        original_recipient=_address(fields, b"original-recipient"),
        user_agent=fields.text(b"reporting-ua"),
        envid=fields.text(b"original-envelope-id"),
        original=Original(message_id=found) if found else None,
    )


# TLS and DMARC


def _tls(entity: Entity) -> Report:
    found = read_tls_report(entity)
    if isinstance(found, str):
        return Report(type="tls", problem=found)
    return Report(type="tls", tls=found)


def _aggregate(parts: list[Entity], subject: str) -> Report | None:
    """An aggregate report: its name is read, and its content is not."""
    by_subject = _DMARC_SUBJECT(subject)
    for part in parts:
        name = part.filename
        by_name = _DMARC_FILE(name)
        if by_name is not None:
            return Report(
                type="dmarc",
                dmarc=Aggregate(
                    domain=by_name[2].lower(),
                    submitter=by_name[1].lower(),
                    begin=int(by_name[3]),
                    end=int(by_name[4]),
                    report_id=(by_subject[3] if by_subject else None) or by_name[5] or "",
                    file=one_line(name),
                ),
            )
    if by_subject is None or not by_subject[2]:
        return None
    return Report(
        type="dmarc",
        dmarc=Aggregate(
            domain=by_subject[1].lower(),
            submitter=by_subject[2].lower(),
            report_id=by_subject[3] or "",
        ),
    )


# Bounces in no standard form


def _bounce(
    parts: list[Entity], marks: _Marks, subject: str
) -> tuple[Report, list[tuple[bytes, bytes]]] | None:
    text = _words_of(parts)
    if not text:
        return None
    found = read_bounce(subject, text, marks.text(b"x-failed-recipients"))
    if found is None:
        return None
    recipients = [
        Recipient(
            action=found.action,
            status=each.status,
            code=each.code,
            recipient=each.recipient,
            diagnostic=each.diagnostic,
        )
        for each in found.failures
    ]
    several = len(recipients) > 1
    report = Report(
        type="bounce",
        recipients=recipients if several else [],
        recipient_count=len(recipients) if several else 0,
        **msgspec.structs.asdict(recipients[0]),
    )
    _, _, rest = found.quoted.partition("\n\n")
    head = (rest if found.quoted.lstrip().startswith("-") else found.quoted).partition("\n\n")[0]
    return report, fields_of(head.replace("\n", "\r\n").encode(errors="replace"))


def _words_of(parts: list[Entity]) -> str:
    """The text for people, without the tags of HTML if there is no plain one."""
    for part in parts:
        if part.kind == b"text/plain" and (text := part.text).strip():
            return text
    for part in parts:
        if part.kind == b"text/html":
            return html.unescape(_TAG("", _BREAK("\n", part.text[:HTML_CHARS])))
    return ""


_READERS: Final[Mapping[bytes, Callable[[Entity], Report | None]]] = {
    **dict.fromkeys(STATUS_KINDS, _delivery_status),
    **dict.fromkeys(COMPLAINT_KINDS, _complaint),
    **dict.fromkeys(DISPOSITION_KINDS, _disposition),
    **dict.fromkeys(TLS_KINDS, _tls),
}
