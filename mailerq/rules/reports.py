"""Which message of ours a report is about, whether that is proved, and whom to suppress.

Theory of operation
-------------------
A report can be forged by anybody. `find_match` asks what names the message, the best evidence
first:

1. the address that the report came to, if that is a return address that this server has signed
   (`mailerq.mail.verp`);
2. the envelope id that comes back in a delivery status (RFC 3461, ENVID);
3. the trace field in the quoted header, which is signed (`mailerq.mail.trace`), or a Received field
   of this server there;
4. the Message-ID of the quoted mail;
5. the recipient that the report names.

Only a signature is a proof: of what was sent to one recipient. So a report that comes with one may
be forged by that recipient and by hosts on the way, who can hurt that recipient only.

`to_suppress` names the recipients that the operator wants suppressed: those who complain, and those
whose address does not exist (a *hard* bounce). A full mailbox, a refused sender or content and a
host that is down are no reasons. Where mail was forwarded, the report may be about another address;
then the one that was signed stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from mailerq.address import parse_mailbox
from mailerq.errors import AddressError
from mailerq.mail import verp
from mailerq.mail.reports import Recipient, Recognised, Report
from mailerq.mail.trace import Trace, verify_trace
from mailerq.message import encode_properties
from mailerq.rules.row import compared

__all__ = [
    "HARD_STATUSES",
    "Keys",
    "Match",
    "Suppressed",
    "Wishes",
    "document",
    "find_match",
    "is_hard",
    "said",
    "to_suppress",
]

DOCUMENT_BYTES: Final = 1 << 16
"""Bytes of what a report says. A delivery status about a hundred recipients has 30 kB."""

MAX_TRACES: Final = 20
"""Fields of the quoted header that are looked at for a trace."""

HARD_STATUSES: Final = {
    "5.1.1": "there is no such mailbox",
    "5.1.2": "there is no such domain",
    "5.1.3": "the address is malformed to its host",
    "5.1.6": "the mailbox has moved, and left no address",
    "5.1.10": "the domain takes no mail, or has no such recipient",
    "5.2.1": "the mailbox is disabled",
}
"""Enhanced status codes of a failure that will not go away (RFC 3463, RFC 7505)."""

VAGUE_STATUSES: Final = frozenset(("", "5.0.0", "5.1.0", "5.2.0", "5.3.0", "5.5.0"))
"""Codes with which the words of the reply count."""

NO_MAILBOX: Final = (
    "user unknown",
    "unknown user",
    "no such user",
    "no such recipient",
    "no such mailbox",
    "no such address",
    "unknown recipient",
    "recipient unknown",
    "recipient not found",
    "mailbox not found",
    "mailbox unavailable or not local",
    "no mailbox here by that name",
    "user does not exist",
    "account does not exist",
    "mailbox does not exist",
    "account is disabled",
    "account has been disabled",
    "mailbox disabled",
)
"""Words of replies, in lower case."""

COMPLAINTS: Final = frozenset(("abuse", "fraud", "opt-out", "opt-out-list"))
"""Kinds of complaints of people who want no more of this mail."""

_RECEIVED: Final = re.compile(r"\bby ([\w.:\[\]-]{1,255})(?: |\))").search
_ID: Final = re.compile(r"\bid ([^\s;]{1,255})").search


class Keys(NamedTuple):
    """The keys of signatures, how long those are good in seconds, and the name of the trace field
    in lower case, empty if there is none.
    """

    keys: Sequence[verp.Key] = ()
    max_age: float = 0.0
    trace_header: bytes = b""


class Match(NamedTuple):
    """The message that a report is about, as far as that is known.

    `by` is ``verp``, ``envid``, ``trace``, ``received``, ``message-id``, ``recipient`` or empty.
    `recipient` and `message_id` are ours; `proved` says that a signature names them. `returned` is
    what the address of the report says.
    """

    by: str = ""
    proved: bool = False
    recipient: str = ""
    message_id: str = ""
    returned: verp.Return | verp.Problem | None = None


class Wishes(NamedTuple):
    """What the operator wants suppressed; `unproved`: whoever says so."""

    complaints: bool = False
    bounces: bool = False
    unproved: bool = False


class Suppressed(NamedTuple):
    """A recipient to suppress, and why."""

    address: str
    reason: str


def find_match(
    recognised: Recognised | None, recipient: str, keys: Keys, *, hostname: str, now: float
) -> Match:
    """Find what a mail to `recipient` is about; without `recognised` only by that address.

    `hostname` is the name of this server in Received fields.
    """
    returned = verp.verify(recipient, keys.keys, now=now, max_age=keys.max_age)
    trace, received = None, ""
    if recognised is not None:
        trace = _trace(recognised, keys, now)
        received = _received(recognised, hostname)
    if isinstance(returned, verp.Return):
        same = trace is not None and _is_same(trace.recipient, returned.recipient)
        found = returned.recipient, returned.message_id
        if trace is not None and (same or not returned.recipient):
            found = trace.recipient, trace.message_id
        return Match("verp", True, *found, returned)
    report = None if recognised is None else recognised.report
    message_id = trace.message_id if trace is not None else received
    address = trace.recipient if trace is not None else ""
    if report is not None and report.envid:
        return Match("envid", trace is not None, address, message_id, returned)
    if trace is not None:
        return Match("trace", True, address, message_id, returned)
    if received:
        return Match("received", False, "", message_id, returned)
    if report is not None and report.original is not None and report.original.message_id:
        return Match("message-id", False, returned=returned)
    if report is not None and (report.recipient or report.original_recipient):
        return Match("recipient", False, returned=returned)
    return Match(returned=returned)


def _trace(recognised: Recognised, keys: Keys, now: float) -> Trace | None:
    """The verified trace field in the quoted header."""
    if not keys.keys or not keys.trace_header:
        return None
    for value in recognised.quoted_values(keys.trace_header)[:MAX_TRACES]:
        found = verify_trace(value, keys.keys, now=now, max_age=keys.max_age)
        if isinstance(found, Trace):
            return found
    return None


def _received(recognised: Recognised, hostname: str) -> str:
    """The id in a Received field of this server: that of the first recipient of the mail."""
    for value in recognised.quoted_values(b"received")[:MAX_TRACES]:
        text = value[:2000].decode("latin-1")
        by = _RECEIVED(text)
        if by is not None and by[1].lower() == hostname.lower():
            match = _ID(text, by.end())
            if match is not None:
                return match[1]
    return ""


def said(recognised: Recognised | None) -> dict[str, Any]:
    """What a report says, as JSON of at most `DOCUMENT_BYTES` and some long texts.

    Each recipient of a mail gets a message with it, and a message has room for its properties
    (`mailerq.message.PROPERTIES_LIMIT`): a report that says very much must not cost the mail its
    place in the queue. Without its lists, a report has some ten texts of a thousand characters.
    """
    report = Report(type="other") if recognised is None else recognised.report
    value = report.to_dict()
    if len(encode_properties(value)) > DOCUMENT_BYTES:
        value["problem"] = f"the report says more than {DOCUMENT_BYTES} bytes: a part is left out"
        value.pop("recipients", None)
        if "tls" in value:
            value["tls"].pop("policies", None)
    return value


def document(said: Mapping[str, Any], match: Match) -> dict[str, Any]:
    """The property ``report``: a new dict that shares the values of what the report has `said`."""
    value = dict(said)
    if match.by:
        value["matched-by"] = match.by
        value["proved"] = match.proved
    if match.message_id:
        value["message-id"] = match.message_id
    if match.returned is not None:
        value["verp"] = _verp(match)
    elif match.recipient:
        value["trace"] = {"recipient": match.recipient}
    return value


def _verp(match: Match) -> dict[str, Any]:
    returned = match.returned
    if not isinstance(returned, verp.Return):
        return {"verified": False, "problem": str(returned)}
    value: dict[str, Any] = {"verified": True, "envelope": returned.base}
    if match.recipient:
        value["recipient"] = match.recipient
    if returned.digest:
        value["digest"] = returned.digest
    return value


def is_hard(recipient: Recipient) -> bool:
    """Whether a failure says that the address does not exist.

    >>> is_hard(Recipient(action="failed", status="5.1.1"))
    True
    >>> is_hard(Recipient(action="failed", status="5.2.2", diagnostic="552 user unknown"))
    False
    """
    if recipient.action != "failed":
        return False
    if recipient.status in HARD_STATUSES:
        return True
    if recipient.status not in VAGUE_STATUSES or recipient.code // 100 not in (0, 5):
        return False
    words = recipient.diagnostic.lower()
    return any(text in words for text in NO_MAILBOX)


def to_suppress(report: Report, match: Match, wishes: Wishes) -> list[Suppressed]:
    """The recipients that a report makes the operator suppress, in the order of the report."""
    if report.type == "complaint":
        if not wishes.complaints or report.feedback_type not in COMPLAINTS:
            return []
        reason = f"complaint ({report.feedback_type})"
        if match.proved and match.recipient:
            return [Suppressed(match.recipient, reason)]
        return _unproved([(report.recipient, reason)], wishes)
    if report.type not in ("delivery-status", "bounce") or not wishes.bounces:
        return []
    hard = [each for each in report.recipients or [report] if is_hard(each)]
    if match.proved and match.recipient:
        about = [each for each in hard if _is_about(each, match.recipient)]
        return [Suppressed(match.recipient, _reason(about[0], report))] if about else []
    return _unproved([(each.recipient, _reason(each, report)) for each in hard], wishes)


def _unproved(found: list[tuple[str, str]], wishes: Wishes) -> list[Suppressed]:
    if not wishes.unproved:
        return []
    return [Suppressed(address, f"{reason}, not proved") for address, reason in found if address]


def _reason(recipient: Recipient, report: Report) -> str:
    status = recipient.status or (str(recipient.code) if recipient.code else "no such recipient")
    by = f", reported by {report.reporting_mta[:80]}" if report.reporting_mta else ""
    return f"hard bounce {status}{by}"


def _is_about(recipient: Recipient, ours: str) -> bool:
    """Whether a failure is about the address that we have sent to.

    Hosts that give a mailbox a domain of their own may name that one, so the local part counts. A
    report that names no address is about the only one that it can be about.
    """
    named = [each for each in (recipient.original_recipient, recipient.recipient) if "@" in each]
    return not named or any(_is_same(each, ours, local_only=True) for each in named)


def _is_same(one: str, other: str, *, local_only: bool = False) -> bool:
    try:
        first, second = compared(parse_mailbox(one)), compared(parse_mailbox(other))
    except AddressError:
        return False
    if local_only:
        first, second = first.rpartition("@")[0], second.rpartition("@")[0]
    return first == second
