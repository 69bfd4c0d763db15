"""Which reports the sender of a message gets (RFC 3461), and about what.

Theory of operation
-------------------
An event becomes a `Bounce` if the sender wants a report of that event and can get one:

    NOTIFY     failed   delayed   delivered   relayed to a peer that makes no reports
    absent     default  default   default     default
    NEVER      -        -         -           -
    FAILURE    report   -         -           -
    DELAY      -        report    -           -
    SUCCESS    -        -         report      report

A peer that offers DSN gets the sender's NOTIFY, and makes these reports itself. *Delivered* is a
mail that an LMTP server or a queue for local mail has taken (RFC 3461, section 5.2.3), *relayed*
one that a peer without DSN has (section 5.2.2). The default is `dsn-notify` for mail that came by
SMTP or the command line, and for documents with a property ``dsn``; it is `dsn-notify-json` for
other documents.

The null sender never gets a report, so a report about a report cannot be. A report of ours that
fails is dropped, or goes to `dsn-double-bounce`, once.

`report` makes one message of bounces with equal keys: about recipients of one mail.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from mailerq.address import parse_domain, parse_ip, parse_mailbox, queue_problem
from mailerq.errors import AddressError, MessageError
from mailerq.mail import dsn
from mailerq.mail.dsn import Excerpt, Facts, Recipient
from mailerq.mail.dsn_texts import Texts
from mailerq.message import Message, Result, parse_time
from mailerq.rules.routes import reception_queue
from mailerq.wire import unitext
from mailerq.wire.parameters import ORCPT_LIMIT, dsn_parameters

if TYPE_CHECKING:
    from mailerq.config import Config

__all__ = [
    "DELAYED",
    "DELIVERED",
    "FAILED",
    "MARK",
    "MAX_TOGETHER",
    "RELAYED",
    "Bounce",
    "about",
    "cause",
    "is_wanted",
    "grouped",
    "of_success",
    "report",
    "time_in",
    "why_not",
]

FAILED: Final = "failed"
DELAYED: Final = "delayed"
DELIVERED: Final = "delivered"
RELAYED: Final = "relayed"

MARK: Final = "dsn-of"
"""The property of our own reports: which message they are about."""

WORDS: Final = {FAILED: "FAILURE", DELAYED: "DELAY", DELIVERED: "SUCCESS", RELAYED: "SUCCESS"}
"""The words of NOTIFY."""

MAX_TOGETHER: Final = 100
"""Recipients of one report."""

AUTHOR: Final = "MAILER-DAEMON"

_STATUS: Final = re.compile(r"[245]\.\d{1,3}\.\d{1,3}").fullmatch
_ATOM: Final = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,80}").fullmatch

_STATUS_OF_TYPE: Final = {
    "nohosts": "4.4.4",  # RFC 3463, section 3.5: unable to route
    "bind": "4.3.5",  # section 3.4: system incorrectly configured
    "refused": "4.4.1",  # section 3.5: no answer from host
    "connect": "4.4.1",
    "noaccess": "4.4.1",
    "lost": "4.4.2",  # bad connection
    "timeout": "4.4.2",
    "overflow": "4.5.0",  # protocol
    "idle": "4.4.2",
    "nodata": "5.6.0",  # content
    "responsive": "5.6.0",
    "expired": "4.4.7",  # delivery time expired
}
"""What a result means that has no status of its own, by its ``type``."""


class Bounce(msgspec.Struct, frozen=True):
    """A report to make about one recipient.

    Bounces with the same `key`, and with the same mail to quote, can be one report. `queue` gets
    it. With `full` the mail itself is wanted. `requiretls`: the mail must not travel without TLS.
    """

    queue: str
    event: str
    to: str
    sender: str
    mta: str
    full: bool
    requiretls: bool
    utf8: bool
    envid: str
    arrival: float | None
    client: str
    double: bool
    recipient: Recipient

    @property
    def key(self) -> tuple[object, ...]:
        return (
            self.queue, self.event, self.to, self.sender, self.mta, self.full,
            self.requiretls, self.utf8, self.envid, self.arrival, self.double,
        )  # fmt: skip


def is_wanted(properties: Mapping[str, Any], event: str, config: Config) -> bool:
    """Whether the sender wants a report of an event; the table above.

    >>> from mailerq.config import Config
    >>> is_wanted({"dsn": {"notify": "SUCCESS"}}, FAILED, Config())
    False
    """
    wishes = properties.get("dsn")
    notify = wishes.get("notify") if isinstance(wishes, dict) else None
    if isinstance(notify, str) and _is_notify(notify):
        return WORDS[event] in notify.upper().replace(" ", "").split(",")
    arrived = isinstance(wishes, dict) or "received" in properties
    return WORDS[event] in (config.dsn_notify if arrived else config.dsn_notify_json)


def of_success(properties: Mapping[str, Any], *, lmtp: bool, peer_reports: bool) -> str:
    """The event of a mail that a peer has taken; empty if that peer makes the report."""
    wishes = properties.get("dsn")
    if peer_reports and isinstance(wishes, dict) and _is_notify(wishes.get("notify")):
        return ""
    return DELIVERED if lmtp else RELAYED


def about(
    properties: Mapping[str, Any],
    event: str,
    result: Result,
    config: Config,
    *,
    from_peer: bool,
    until: float | None = None,
) -> Bounce | None:
    """What to report about an event, or None.

    `result` is that of the last attempt; `from_peer` says that its reply is the peer's. `until` is
    when the message expires.
    """
    to, double = properties.get("envelope"), False
    if not to:
        mark = properties.get(MARK)
        if not (isinstance(mark, dict) and event == FAILED) or mark.get("double"):
            return None
        to, double = config.dsn_double_bounce, True
        if not to:
            return None
    elif not is_wanted(properties, event, config):
        return None
    if why_not(to) is not None:
        return None
    queue = _queue(properties, to, config)
    if not queue:
        return None
    wishes = properties.get("dsn")
    wishes = wishes if isinstance(wishes, dict) else {}
    mta = _mta(wishes.get("mta")) or config.dsn_mta or config.hostname
    ret = wishes.get("ret")
    ret = ret.upper() if isinstance(ret, str) and ret.upper() in ("FULL", "HDRS") else ""
    envid = wishes.get("envid")
    connection = properties.get("connection")
    client = connection.get("remote-ip") if isinstance(connection, dict) else None
    utf8 = properties.get("smtputf8") is True
    requiretls = properties.get("requiretls") is True
    return Bounce(
        queue=queue,
        event=event,
        to=to,
        sender=_author(wishes.get("envelope")) or config.dsn_envelope or f"{AUTHOR}@{mta}",
        mta=mta,
        # Only a failure has the sender need the mail (RFC 3461, section 6.2). A mail that had to
        # travel with TLS never comes back whole (RFC 8689, section 5).
        full=event == FAILED and (ret or config.dsn_ret) == "FULL" and not requiretls,
        requiretls=requiretls,
        utf8=utf8,
        envid=envid if isinstance(envid, str) and any(dsn_parameters({"envid": envid})) else "",
        arrival=time_in(properties, "received") or time_in(properties, "seen"),
        client=_ip(client),
        double=double,
        recipient=_recipient(properties, event, result, wishes, from_peer=from_peer, until=until),
    )


def cause(properties: Mapping[str, Any]) -> tuple[Result, bool] | None:
    """What kept a message from being delivered until it expired, and whether a peer said so.

    That is the element of ``results`` before the last one; None if there is none. Senders should
    hear of the cause, not of the time (RFC 3463, section 3.5, of X.4.7).
    """
    results = properties.get("results")
    last = results[-2] if isinstance(results, list) and len(results) > 1 else None
    if not isinstance(last, dict):
        return None
    code = last.get("code")
    result = Result(
        attempt=0,
        type=str(last.get("type")),
        state=str(last.get("state")),
        result="",
        time=str(last.get("time")),
        remote_ip=_text(last.get("to")),
        mta=_text(last.get("mta")),
        code=code if isinstance(code, int) and 200 <= code < 600 else None,
        status=_text(last.get("status")),
        description=_text(last.get("description")),
    )
    return result, result.code is not None and result.remote_ip is not None


def why_not(sender: object) -> str | None:
    """Why no report can go to a sender, or None."""
    try:
        parse_mailbox(sender if isinstance(sender, str) else "")
    except AddressError as error:
        return str(error)
    return None


def _queue(properties: Mapping[str, Any], to: str, config: Config) -> str:
    """The queue for reports; empty if there are to be none."""
    own = properties.get("queues")
    if isinstance(own, dict) and "dsn" in own:
        name = own["dsn"]
        if not name:
            return ""
        if isinstance(name, str) and queue_problem(name) is None:
            return name
    if config.rabbitmq_dsn:
        return config.rabbitmq_dsn
    # Mail that ends here would come back by MX, if at all.
    if parse_mailbox(to).domain in config.smtp_local_domains:
        return reception_queue(config, local=True)
    return config.rabbitmq_outbox


def _recipient(
    properties: Mapping[str, Any],
    event: str,
    result: Result,
    wishes: Mapping[str, Any],
    *,
    from_peer: bool,
    until: float | None,
) -> Recipient:
    code = result.code
    words = " ".join(str(part) for part in (code, result.status, result.description) if part)
    if not words:
        words = f"{result.type} ({result.state})"
    original = wishes.get("orcpt")
    identifier = properties.get("message-id")
    address = properties.get("recipient")
    return Recipient(
        address=address if isinstance(address, str) else "",
        status=_status(event, result),
        diagnostic=f"smtp; {words}" if from_peer and code else f"X-mailerq; {words}",
        original=original if isinstance(original, str) and _is_orcpt(original) else "",
        remote_mta=_remote(result) if from_peer else "",
        last_attempt=_time(result.time),
        until=until,
        log_id=identifier if isinstance(identifier, str) else "",
    )


def _status(event: str, result: Result) -> str:
    """Three numbers (RFC 3463). A failure may have a 4: time was up before the cause was gone."""
    status, code = result.status, result.code
    allowed = {FAILED: "45", DELAYED: "4"}.get(event, "2")
    if status and _STATUS(status) and status[0] in allowed:
        return status
    if code and str(code)[0] in allowed:
        return f"{str(code)[0]}.0.0"
    found = _STATUS_OF_TYPE.get(result.type, f"{allowed[-1]}.0.0")
    return found if found[0] in allowed else f"{allowed[-1]}.0.0"


def _remote(result: Result) -> str:
    """Who said it: the name in the peer's banner, or else its address."""
    if result.mta:
        try:
            return f"dns; {parse_domain(result.mta)}"
        except AddressError:
            pass
    address = _ip(result.remote_ip)
    return f"dns; [{address}]" if address else ""


def grouped(bounces: Iterable[Bounce]) -> Iterator[list[Bounce]]:
    """Put bounces about one mail together: each list is for one report."""
    groups: dict[tuple[object, ...], list[Bounce]] = {}
    for bounce in bounces:
        groups.setdefault(bounce.key, []).append(bounce)
    for group in groups.values():
        for start in range(0, len(group), MAX_TOGETHER):
            yield group[start : start + MAX_TOGETHER]


def report(
    bounces: Sequence[Bounce],
    quoted: Excerpt,
    texts: Texts,
    *,
    id: str,
    now: float,
) -> Message:
    """Make one report of bounces with the same key. `quoted` is of the mail that they are about."""
    first = bounces[0]
    facts = Facts(
        to=first.to,
        sender=first.sender,
        mta=first.mta,
        id=id,
        now=now,
        envid=first.envid,
        arrival=first.arrival,
        client=first.client,
        utf8=first.utf8,
    )
    body = dsn.make(facts, first.event, [each.recipient for each in bounces], quoted, texts)
    mark: dict[str, Any] = {"event": first.event, "message-id": first.recipient.log_id}
    if first.double:
        mark["double"] = True
    properties: dict[str, Any] = {
        "message-id": id,
        "envelope": "",
        "recipient": first.to,
        "dsn": {"notify": "NEVER"},
        MARK: mark,
    }
    if first.requiretls:
        properties["requiretls"] = True
    if not body.isascii():
        properties["smtputf8"] = True
    return Message(properties, body)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _is_notify(value: object) -> bool:
    return isinstance(value, str) and bool(dsn_parameters({"notify": value})[1])


def _is_orcpt(value: str) -> bool:
    kind, _, address = value.partition(";")
    if kind.lower() == unitext.KIND:
        try:
            unitext.unquote(address)
        except ValueError:
            return False
    return bool(_ATOM(kind) and address) and value.isprintable() and len(value) <= ORCPT_LIMIT


def _author(value: object) -> str:
    return value if isinstance(value, str) and value and why_not(value) is None else ""


def _mta(value: object) -> str:
    try:
        return parse_domain(value) if isinstance(value, str) else ""
    except AddressError:
        return ""


def _ip(value: object) -> str:
    try:
        return str(parse_ip(value)) if isinstance(value, str) else ""
    except ValueError:
        return ""


def time_in(properties: Mapping[str, Any], name: str) -> float | None:
    """The time in a property, in seconds since 1970; None if there is none."""
    return _time(properties.get(name))


def _time(value: object) -> float | None:
    try:
        return parse_time(value) if isinstance(value, str) else None
    except MessageError:
        return None
