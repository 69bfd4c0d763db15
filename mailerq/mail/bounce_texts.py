"""Read bounces that are written for people only, in the shapes that mail servers are known to use.

Most servers send reports with fields for programs (RFC 3464). Others, such as qmail and older
versions of Exim, sendmail, Exchange and the servers of some large providers, send a text. These
texts have much in common: a subject, a sentence that says what has happened, an address on a line
of its own, below that the reply of the host, and a line before the mail that comes back.

The reading is a guess, so `mailerq.mail.reports` asks only when the sender is null or
a mailer daemon, and says in the report that the form is not a standard one.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from mailerq.address import parse_mailbox
from mailerq.errors import AddressError
from mailerq.mail.report_fields import TEXT_LIMIT, code_in, one_line, status_in

__all__ = ["BounceText", "Failure", "read_bounce"]

TEXT_BYTES: Final = 1 << 15
"""Characters of the text that are read."""

INTRO_CHARS: Final = 4000
"""Within these stands the sentence that says that the text is a bounce."""

MAX_LINES: Final = 1000

MAX_FAILURES: Final = 100

DETAIL_LINES: Final = 12
"""Lines below an address that say why."""

SUBJECTS: Final = (
    "undeliver",
    "returned mail",
    "failure notice",
    "delivery failure",
    "delivery failed",
    "mail delivery failed",
    "delivery status notification",
    "delivery notification",
    "delivery problem",
    "delivery error",
    "non delivery",
    "nondeliver",
    "mail system error",
    "message you sent blocked",
    "returning message to sender",
    "message delayed",
    "delivery delayed",
    "warning: could not send message",
    "failed mail",
    "mail failed",
    "mail delivery warning",
    "processing error",
    "could not be delivered",
    "user unknown",
    "error during delivery",
    "unzustellbar",
    "non remis",
)
"""Parts of subjects, in lower case."""

FAILED: Final = (
    "wasn't able to deliver",
    "not able to deliver",
    "unable to deliver",
    "could not deliver",
    "couldn't deliver",
    "could not be delivered",
    "couldn't be delivered",
    "cannot be delivered",
    "can't be delivered",
    "was not delivered to",
    "wasn't delivered to",
    "failed permanently",
    "permanent fatal errors",
    "permanent delivery failure",
    "did not reach",
    "undeliverable",
    "undelivered",
    "delivery has failed",
    "delivery failed",
    "delivery to the following recipients failed",
    "has been rejected",
    "not been delivered",
    "not be delivered",
    "not delivered",
    "delivery problems",
    "did not receive",
    "could not be reached",
    "failed recipient",
    "failed addresses",
    "no valid recipients",
    "unknown user",
    "user unknown",
    "no such user",
    "no mailbox here",
    "invalid final delivery",
    "was aborted",
    "was detected while processing",
    "encountered an error",
    "konnte nicht zugestellt werden",
    "n'a pas pu être remis",
)
"""What texts say in their first sentences, in lower case."""

DELAYED: Final = (
    "has not been delivered to",
    "has not yet been delivered",
    "delivery to the following recipient has been delayed",
    "will be retried",
    "will continue to be tried",
    "still being retried",
    "no action is required",
    "this is a warning message only",
    "transient non-fatal errors",
    "delivery is delayed",
    "has been delayed",
    "delayed 24 hours",
    "has been postponed",
)

OTHERS: Final = frozenset(("postmaster", "mailer-daemon", "abuse", "helpdesk", "support"))
"""Local parts of addresses in texts that are for questions."""

_LINES: Final = re.compile(r"\r\n|\r|\n").split
_ON_ITS_OWN: Final = re.compile(
    r"[\s>*-]{0,20}(?!(?:from|to|cc|subject|sent|date|sender|reply-to) *:)"
    r'(?:[a-z][\w ()-]{0,40}: {0,8})?(?:"[^"]{0,100}" )?["<]?(?:mailto:)?'
    r'([^\s<>()\[\]:;,"]{1,64}@[\w.-]{1,253})[">]?'
    r"(?:\s*[:;].{0,400}|\s+(?:\(|on\s|\.\.|- ).{0,400}|\s*)",
    re.IGNORECASE,
).fullmatch
_ANYWHERE: Final = re.compile(
    r"""(?<![^\s<("':=])([^\s<>()\[\]:;,"'=@]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8})"""
).finditer
_COMMAND: Final = re.compile(r"\brcpt to: ?<([^<>\s]{3,320})>", re.IGNORECASE).search
_SEPARATOR: Final = re.compile(
    r"\s{0,8}-{2,40} ?(?:.{0,40}(?:below this line|copy of (?:the|your) message|original message"
    r"|returned (?:message|mail)|unsent message|message header|header of the).{0,200}"
    r"|forwarded message.{0,60})"
    r"|.{0,60}(?:original message (?:follows|as received|headers?)|message text follows"
    r"|returned mail follows|(?:start of )?returned message|your message reads"
    r"|(?:top|first) \d{1,4} lines (?:of|follow)|message headers follow).{0,100}",
    re.IGNORECASE,
).fullmatch
_HEADER_LINE: Final = re.compile(r"(?:return-path|received|dkim-signature):", re.IGNORECASE).match
_BARE_STATUS: Final = re.compile(r"#([245]\.\d{1,3}\.\d{1,3})(?!\d)").search


class Failure(NamedTuple):
    """What a bounce says about one recipient; the recipient may be unknown."""

    recipient: str
    status: str
    code: int
    diagnostic: str


class BounceText(NamedTuple):
    """A bounce. `action` is ``failed`` or ``delayed``; `quoted` is the mail that came back."""

    action: str
    failures: list[Failure]
    quoted: str


def read_bounce(subject: str, text: str, failed_recipients: str = "") -> BounceText | None:
    """Read a text as a bounce, or return None if it does not look like one.

    `failed_recipients` is the value of X-Failed-Recipients, which some servers add.
    """
    lines = _LINES(text[:TEXT_BYTES])[:MAX_LINES]
    own, quoted = _split(lines)
    intro = " ".join(" ".join(own)[:INTRO_CHARS].lower().split())
    low = subject.lower()
    fails = any(words in intro for words in FAILED)
    delays = any(words in intro for words in DELAYED) or "delayed" in low
    delays = delays or ("warning:" in low and not fails)
    if not (fails or delays or failed_recipients):
        return None
    says_final = "permanent" in intro or "given up" in intro or "giving up" in intro
    if not (any(words in low for words in SUBJECTS) or failed_recipients or says_final):
        # An intro of a mailer daemon is enough where an address or a code stands below.
        if not (status_in(intro) or code_in(intro) or any(map(_address_on, own))):
            return None
    action = "delayed" if delays and not says_final else "failed"
    return BounceText(action, _failures(own, failed_recipients), "\n".join(quoted))


def _split(lines: list[str]) -> tuple[list[str], list[str]]:
    """The lines of the server, and those of the mail that came back."""
    for number, line in enumerate(lines):
        if _SEPARATOR(line[:400]) or (number and _HEADER_LINE(line) and not lines[number - 1]):
            return lines[:number], lines[number:]
    return lines, []


def _address_on(line: str) -> str:
    """The address on a line that holds nothing else of note."""
    match = _ON_ITS_OWN(line[:800])
    if match is None:
        return ""
    found = match[1].rstrip(".")
    try:
        parse_mailbox(found)
    except AddressError:
        return ""
    return found


def _failures(lines: list[str], named: str) -> list[Failure]:
    """What is said about each recipient."""
    found: dict[str, list[str]] = {}
    details: list[str] = []
    for line in lines:
        address = _address_on(line)
        if address and len(found) < MAX_FAILURES:
            # A second mention belongs to what is said about the first.
            details = found.setdefault(address, details if address in found else [])
            after = line.partition(address)[2].lstrip(">")
            details.append(after.lstrip(": "))
        elif len(details) < DETAIL_LINES:
            details.append(line)
    everything = one_line(" ".join(lines)[:INTRO_CHARS])
    listed = [each for part in named.split(",")[:MAX_FAILURES] if (each := _address_on(part))]
    recipients = listed or list(found)
    if not recipients:
        match = _COMMAND(everything)
        recipients = [match[1] if match else _any_address(everything)]
    return [_failure(each, found.get(each, []), everything) for each in recipients]


def _any_address(text: str) -> str:
    """The first address in a text that is not one for questions."""
    for match in _ANYWHERE(text):
        found = match[1].rstrip(".")
        if found.partition("@")[0].lower() in OTHERS:
            continue
        try:
            parse_mailbox(found)
        except AddressError:
            continue
        return found
    return ""


def _failure(recipient: str, details: list[str], everything: str) -> Failure:
    own = one_line(" ".join(filter(None, map(str.strip, details))))
    for text in (own, everything):
        bare = _BARE_STATUS(text)
        status, code = status_in(text) or (bare[1] if bare else ""), code_in(text)
        if status or code:
            break
    return Failure(recipient, status, code, own[:TEXT_LIMIT])
