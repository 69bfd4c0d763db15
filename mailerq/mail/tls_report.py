"""TLS reports: the record that asks for them, their JSON document, and the mail (RFC 8460)."""

from __future__ import annotations

import gzip
import json
import re
from base64 import encodebytes
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

from mailerq.address import parse_mailbox
from mailerq.errors import AddressError

__all__ = [
    "MEDIA_TYPE",
    "REPORT_TAG",
    "Day",
    "Detail",
    "PolicyCount",
    "Sender",
    "destinations",
    "document",
    "file_name",
    "is_report",
    "pack",
    "record_name",
    "report_mail",
]

MEDIA_TYPE: Final = "application/tlsrpt+gzip"

REPORT_TAG: Final = "tls-report"
"""The tag of messages that are reports."""

VERSION: Final = b"v=TLSRPTv1"
MAX_DESTINATIONS: Final = 10
"""Destinations of a record that get a report."""

MAX_URI: Final = 1000

DAY_SECONDS: Final = 86400

_is_field: Final = re.compile(rb"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}=[\x20-\x3a\x3c-\x7e]+").fullmatch


def is_report(properties: Mapping[str, Any]) -> bool:
    """Whether a message is a report, whose connections do not count."""
    tags = properties.get("tags")
    return isinstance(tags, list) and REPORT_TAG in tags


def record_name(domain: str) -> str:
    """The name at which a domain asks for reports.

    >>> record_name("d.example")
    '_smtp._tls.d.example'
    """
    return f"_smtp._tls.{domain}"


def destinations(records: Iterable[bytes]) -> list[str]:
    """Where the TXT records at `record_name` want reports, each place once (section 3).

    Those are ``mailto:`` with an address, and ``https:`` URLs as they stand. No place without
    exactly one record of the right form; places of another form are left out.

    >>> destinations([b"v=TLSRPTv1; rua=mailto:a@d.example,https://d.example/v1,mailto:a@d.example"])
    ['mailto:a@d.example', 'https://d.example/v1']
    """
    found = [record for record in records if _is_ours(record)]
    if len(found) != 1:
        return []
    fields = [field.strip(b" \t") for field in found[0][len(VERSION) :].split(b";")[1:]]
    if fields and fields[-1] == b"":
        del fields[-1]
    if not all(map(_is_field, fields)):
        return []
    uris = next((field[4:] for field in fields if field.startswith(b"rua=")), b"")
    places = (_place(uri.strip(b" \t").decode("ascii")) for uri in uris.split(b","))
    return list(dict.fromkeys(filter(None, places)))[:MAX_DESTINATIONS]


def _is_ours(record: bytes) -> bool:
    return record.startswith(VERSION) and record[len(VERSION) :].lstrip(b" \t").startswith(b";")


def _place(uri: str) -> str:
    scheme, _, rest = uri.partition(":")
    if len(uri) > MAX_URI:
        return ""
    if scheme.lower() == "https":
        return f"https:{rest}" if rest.startswith("//") else ""
    if scheme.lower() != "mailto":
        return ""
    try:
        address = unquote(rest.partition("?")[0], errors="strict")
        return f"mailto:{parse_mailbox(address, utf8=False)}"
    except (AddressError, UnicodeDecodeError):
        return ""


class Detail(NamedTuple):
    """Sessions that failed in the same way (section 4.4); empty parts are left out."""

    result: str
    sessions: int
    local_ip: str = ""
    host: str = ""
    helo: str = ""
    remote_ip: str = ""
    code: str = ""
    information: str = ""


class PolicyCount(NamedTuple):
    """What became of the sessions under one policy of a domain.

    `kind` is ``sts``, ``tlsa`` or ``no-policy-found``; `strings` is the policy as it was published,
    `hosts` are its patterns.
    """

    kind: str
    domain: str
    strings: Sequence[str] = ()
    hosts: Sequence[str] = ()
    successes: int = 0
    details: Sequence[Detail] = ()


class Sender(NamedTuple):
    """Who reports: a name, an address or URL for questions, and the sender of mail."""

    organization: str
    contact: str
    address: str


class Day(NamedTuple):
    """A day in UTC, by its first second since 1970, as a number.

    >>> Day.of(86400 * 2 + 5.0).name, Day.of(0).end
    ('1970-01-03', 86400)
    """

    begin: int

    @classmethod
    def of(cls, now: float) -> Day:
        """The day of a time."""
        return cls(int(now // DAY_SECONDS) * DAY_SECONDS)

    @classmethod
    def named(cls, name: str) -> Day:
        """The day with a name such as 2026-01-31. Raises `ValueError`."""
        return cls(int(datetime.strptime(name, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()))

    @property
    def end(self) -> int:
        """The first second of the next day."""
        return self.begin + DAY_SECONDS

    @property
    def name(self) -> str:
        """The day for people, and in order."""
        return datetime.fromtimestamp(self.begin, UTC).strftime("%Y-%m-%d")


def document(sender: Sender, day: Day, number: str, policies: Sequence[PolicyCount]) -> Any:
    """The report of a day, as it becomes JSON (section 4.4). `number` is its id."""
    return {
        "organization-name": sender.organization,
        "date-range": {
            "start-datetime": f"{day.name}T00:00:00Z",
            "end-datetime": f"{day.name}T23:59:59Z",
        },
        "contact-info": sender.contact,
        "report-id": number,
        "policies": [_policy(each) for each in policies],
    }


def _policy(found: PolicyCount) -> dict[str, Any]:
    policy: dict[str, Any] = {"policy-type": found.kind}
    if found.strings:
        policy["policy-string"] = list(found.strings)
    policy["policy-domain"] = found.domain
    if found.hosts:
        policy["mx-host"] = list(found.hosts)
    counted: dict[str, Any] = {
        "policy": policy,
        "summary": {
            "total-successful-session-count": found.successes,
            "total-failure-session-count": sum(detail.sessions for detail in found.details),
        },
    }
    if found.details:
        counted["failure-details"] = [_detail(detail) for detail in found.details]
    return counted


def _detail(found: Detail) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "result-type": found.result,
        "sending-mta-ip": found.local_ip,
        "receiving-mx-hostname": found.host,
        "receiving-mx-helo": found.helo,
        "receiving-ip": found.remote_ip,
        "failed-session-count": found.sessions,
        "additional-information": found.information,
        "failure-reason-code": found.code,
    }
    return {key: value for key, value in parts.items() if value != ""}


def pack(report: Any) -> bytes:
    """A report as it is sent: JSON, compressed; equal reports are equal bytes."""
    text = json.dumps(report, ensure_ascii=False, indent=1).encode(errors="replace")
    return gzip.compress(text, mtime=0)


def file_name(sender: Sender, domain: str, day: Day, number: str) -> str:
    """The name of the file with a report (section 5.1)."""
    ours = sender.address.rpartition("@")[2] or sender.organization
    unique = re.sub(r"[^A-Za-z0-9.-]", "-", number.partition("@")[0])
    return f"{ours}!{domain}!{day.begin}!{day.end - 1}!{unique}.json.gz"


def report_mail(
    sender: Sender, domain: str, recipient: str, day: Day, number: str, packed: bytes, *, now: float
) -> bytes:
    """The mail with a report (section 5.3), from the sender's address.

    ``TLS-Required: No`` has the report arrive even if TLS of its recipient is what fails.
    """
    ours = sender.address.rpartition("@")[2]
    boundary = f"=_tlsrpt_{re.sub(r'[^A-Za-z0-9]', '_', number)[:40]}"
    name = file_name(sender, domain, day, number)
    date = format_datetime(datetime.fromtimestamp(int(now), UTC))
    text = (
        f"This is a report about TLS for mail that {ours} has sent to {domain}\r\n"
        f"on {day.name} (UTC), see RFC 8460. Its id is\r\n{number}\r\n"
    )
    lines = [
        f"From: <{sender.address}>",
        f"To: <{recipient}>",
        f"Date: {date}",
        f"Subject: Report Domain: {domain}",
        f" Submitter: {ours}",
        f" Report-ID: <{number}>",
        f"Message-ID: <{number}>",
        f"TLS-Report-Domain: {domain}",
        f"TLS-Report-Submitter: {ours}",
        "TLS-Required: No",
        "Auto-Submitted: auto-generated",
        "MIME-Version: 1.0",
        'Content-Type: multipart/report; report-type="tlsrpt";',
        f' boundary="{boundary}"',
        "",
        f"--{boundary}",
        "Content-Type: text/plain; charset=us-ascii",
        "",
        text,
        f"--{boundary}",
        f"Content-Type: {MEDIA_TYPE}",
        "Content-Transfer-Encoding: base64",
        "Content-Disposition: attachment;",
        f' filename="{name}"',
        "",
        encodebytes(packed).decode().replace("\n", "\r\n") + f"--{boundary}--",
        "",
    ]
    return "\r\n".join(lines).encode("ascii")
