"""Turn the end of an attempt into an outcome, and decide what follows.

Everything that can end an attempt, from a missing domain to the reply to the final dot, becomes an
`Outcome` here. Its words appear in the results that applications read: `type` and `state` use the
words of version 2.1, `result` uses the newer words. The states ``process``, ``dns``, ``bind`` and
``storage`` are newer words too, because 2.1 has none for them, and so is ``personalize``.
"""

from __future__ import annotations

import errno
import os
from enum import Enum, auto
from typing import Final

import msgspec

from mailerq.rules.row import Row
from mailerq.rules.security import TlsFailure
from mailerq.wire import smtp
from mailerq.wire.client import Accepted, Event, Failed, Problem, Refused, Step
from mailerq.wire.smtp import Reply

__all__ = [
    "EXPIRED",
    "NOT_CONVERTIBLE",
    "NO_BINARY",
    "NO_DATA",
    "OWN_FAULT",
    "RESULTS",
    "STATES",
    "TOO_MANY_HOPS",
    "TYPES",
    "Fate",
    "Outcome",
    "accepted",
    "body_missing",
    "at_the_end",
    "bounced",
    "cannot_bind",
    "cannot_sign",
    "connect_failed",
    "connect_timed_out",
    "ending",
    "failed",
    "forced",
    "login_in_clear",
    "no_fitting_address",
    "no_hosts",
    "no_pool",
    "not_made",
    "outweighs",
    "refused",
    "refused_on_arrival",
    "rejected_by_plugin",
    "storage_fails",
    "suppressed",
    "tls_failed",
    "unsendable",
]

MAX_DESCRIPTION: Final = 1000
"""Characters of a description, which is stored in every result of a message."""

TYPES: Final = {
    "success": "The peer accepted the mail.",
    "nohosts": "No host was found for the domain of the recipient.",
    "bind": "The mail could not be sent from any address that it may use.",
    "refused": "The host refused the connection.",
    "connect": "The connection to the host failed.",
    "tls": "The connection does not prove the TLS that is demanded.",
    "noaccess": "The session ended at the banner, EHLO, HELO or the login.",
    "error": "The peer or this server refused the mail: for now with a `code` of 4xx, else for"
    " good.",
    "lost": "The connection broke, or the peer answered out of step.",
    "timeout": "The peer did not answer in time.",
    "overflow": "A reply of the peer was too long.",
    "idle": "The peer closed the connection before the mail's turn.",
    "nodata": "There was no mail to send: neither the document nor a plugin supplied it.",
    "expired": "The mail expired before an attempt.",
    "responsive": "The mail could not be made of the properties `mime`, `data`, `headers` and"
    " `inlinecss`.",
}
"""The words of ``type`` in results, and their meanings."""

STATES: Final = {
    "process": "Before the first step.",
    "suppression": "The recipient is suppressed.",
    "storage": "Fetching the mail.",
    "responsive": "Making the mail.",
    "personalize": "Filling `data` into the mail.",
    "dns": "Looking up the hosts of the domain.",
    "bind": "Choosing the address to send from.",
    "connect": "Connecting.",
    "init": "Waiting for the banner.",
    "ehlo": "EHLO was sent, or LHLO of LMTP.",
    "helo": "HELO was sent.",
    "starttls": "TLS was begun, or its certificate was checked.",
    "authplain": "AUTH PLAIN was sent.",
    "authlogin": "AUTH LOGIN was sent.",
    "authusername": "The user name was sent for AUTH LOGIN.",
    "authpassword": "The password was sent for AUTH LOGIN.",
    "authcram": "AUTH CRAM-MD5 was sent.",
    "authresponse": "The response for AUTH CRAM-MD5 was sent.",
    "reset": "RSET was sent.",
    "mail from": "MAIL FROM was sent.",
    "rcpt to": "RCPT TO was sent.",
    "data": "DATA was sent, or a plugin rejected the mail there.",
    "received": "The whole mail was sent.",
    "accept": "The peer accepted the mail.",
    "idle": "The connection waited for mail.",
    "close": "QUIT was sent.",
}
"""The words of ``state`` in results: the last step of an attempt."""

RESULTS: Final = {
    "accepted": "The peer accepted the mail.",
    "error": "The peer refused the mail, or this host could not continue.",
    "lost": "The connection broke.",
    "timeout": "The peer did not answer in time, or the mail expired.",
    "invalid": "A reply or the message itself was not valid.",
}
"""The words of ``result`` in results, which newer versions use instead of ``type``."""

_STATES: Final = {
    Step.INTRO: "init",
    Step.EHLO: "ehlo",
    Step.HELO: "helo",
    Step.STARTTLS: "starttls",
    **{step: str(step) for step in Step if step.startswith("auth")},
    Step.RESET: "reset",
    Step.MAILFROM: "mail from",
    Step.RCPTTO: "rcpt to",
    Step.DATA: "data",
    Step.MESSAGE: "received",
    Step.QUIT: "close",
    Step.IDLE: "idle",
}

_HELLO: Final = frozenset((
    Step.INTRO, Step.EHLO, Step.HELO, Step.STARTTLS,
    *(step for step in Step if step.startswith("auth")),
))  # fmt: skip
"""The steps before a session takes mail."""

_OWN_ERRORS: Final = frozenset({
    # no descriptor, no memory
    errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM,
    # no address to send from, or no free port
    errno.EADDRNOTAVAIL, errno.EADDRINUSE,
    # no such family here, no route, or a link-local address
    errno.EAFNOSUPPORT, errno.ENETDOWN, errno.ENETUNREACH, errno.EINVAL,
    # a firewall or a sandbox of this host
    errno.EACCES, errno.EPERM,
})  # fmt: skip
"""Errors of connect() that are faults of this host, not of the peer.

EHOSTUNREACH is not one of them: firewalls of peers, and routers before peers, answer with it."""


class Fate(Enum):
    """The consequence of an outcome."""

    DELIVERED = auto()
    RETRY = auto()
    FAILED = auto()


_DELIVERED: Final = Fate.DELIVERED  # the members of an enumeration take long to look up


class Outcome(msgspec.Struct, frozen=True):
    """The end of an attempt, without its time and place.

    `own_fault`: a fault of this host kept the message from being sent. That is never final.
    `from_peer`: the code, the status and the description are the peer's reply. `kind` and `rule`
    are what a pattern says about the reply, with the time of the next attempt (`retry_after`, in
    seconds), and whether this one is `counted`. `pins`: the next one may have to leave from the
    same local address. `other_ip`: it leaves from another one.
    """

    type: str
    state: str
    result: str
    fate: Fate
    code: int | None = None
    status: str | None = None
    description: str | None = None
    own_fault: bool = False
    from_peer: bool = False
    kind: str = ""
    rule: str = ""
    retry_after: float | None = None
    counted: bool = True
    pins: bool = True
    other_ip: bool = False

    @property
    def reply(self) -> str:
        """The reply on one line."""
        return " ".join(str(each) for each in (self.code, self.status, self.description) if each)


EXPIRED: Final = Outcome(
    "expired", "process", "timeout", Fate.FAILED, description="past its time before an attempt"
)
NO_DATA: Final = Outcome(
    "nodata", "storage", "error", Fate.FAILED, description="there is no body to send"
)


def body_missing(problem: str) -> Outcome:
    """The storage has no body for the ``key`` of a message, and never will have."""
    description = f"there is no body to send: {problem}"[:MAX_DESCRIPTION]
    return msgspec.structs.replace(NO_DATA, description=description)


def storage_fails(problem: str, seconds: float) -> Outcome:
    """The storage cannot give a body now: the message waits, and the attempt does not count."""
    outcome = _answered("error", "storage", "error", Fate.RETRY, smtp.not_now(problem))
    return msgspec.structs.replace(outcome, own_fault=True, counted=False, retry_after=seconds)


def accepted(event: Accepted) -> Outcome:
    """The peer accepted the message."""
    return _answered("success", "accept", "accepted", _DELIVERED, event.reply)


def refused(event: Refused) -> Outcome:
    """The peer refused the message, for now (4xx) or for good, or refused the session."""
    state, theirs = _STATES[event.step], not event.ours
    if event.step in _HELLO:
        return _answered("noaccess", state, "error", Fate.RETRY, event.reply, from_peer=theirs)
    return _answered("error", state, "error", _fate(event.reply), event.reply, from_peer=theirs)


def failed(event: Failed) -> Outcome:
    """The session broke."""
    problem = event.problem
    result = "invalid" if problem is Problem.OVERFLOW else str(problem)
    if problem is Problem.OVERFLOW:
        kind = "overflow"
    elif event.step in _HELLO:
        kind = "noaccess"
    elif event.step is Step.IDLE:
        kind = "idle"
    else:
        kind = "timeout" if problem is Problem.TIMEOUT else "lost"
    description = event.description[:MAX_DESCRIPTION]
    return Outcome(kind, _STATES[event.step], result, Fate.RETRY, description=description)


def ending(event: Event | None) -> Outcome:
    """What ended an attempt on a connection."""
    if isinstance(event, Accepted):
        return accepted(event)
    if isinstance(event, Refused):
        return refused(event)
    assert isinstance(event, Failed), f"{event} ends nothing"
    return failed(event)


def connect_failed(error: OSError, host: str) -> Outcome:
    """Connecting to `host` failed with `error`."""
    text = os.strerror(error.errno) if error.errno else str(error)
    description = f"{host}: {text}"
    if error.errno == errno.ECONNREFUSED:
        return Outcome("refused", "connect", "error", Fate.RETRY, description=description)
    result = "timeout" if error.errno == errno.ETIMEDOUT else "error"
    own = error.errno in _OWN_ERRORS
    return Outcome("connect", "connect", result, Fate.RETRY, description=description, own_fault=own)


def login_in_clear(host: str) -> Outcome:
    """`host` must not get a login over a connection without TLS."""
    description = (
        f"{host}: the login would go over a connection without TLS; smtp-out-clear-range lists the"
        " networks where it may"
    )
    return Outcome(
        "noaccess", "connect", "error", Fate.RETRY, description=description, own_fault=True
    )


def tls_failed(failure: TlsFailure, *, state: str = "starttls") -> Outcome:
    """A host, or a connection to it, does not prove what is demanded; never final by itself."""
    reply = (smtp.requiretls_failed if failure.requiretls else smtp.tls_failed)(failure.text)
    outcome = _answered("tls", state, "error", Fate.RETRY, reply)
    return msgspec.structs.replace(outcome, result="timeout") if failure.timed_out else outcome


def at_the_end(outcome: Outcome) -> Outcome:
    """The outcome that no attempt follows: REQUIRETLS has a status of its own (RFC 8689)."""
    if outcome.type != "tls" or outcome.status != "4.7.30":
        return outcome
    reply = smtp.REQUIRETLS_FAILED
    return msgspec.structs.replace(outcome, code=reply.code, status=reply.status)


def cannot_bind(error: OSError, local_ip: str) -> Outcome:
    """Binding to `local_ip` failed with `error`."""
    text = os.strerror(error.errno) if error.errno else str(error)
    return _bind(f"cannot send from {local_ip}: {text}")


def no_fitting_address(host: str, local_ip: str) -> Outcome:
    """`host` has no address of the family of `local_ip`."""
    family = "IPv6" if ":" in local_ip else "IPv4"
    return _bind(f"cannot send from {local_ip}: {host} has no {family} address")


def no_pool(problem: str) -> Outcome:
    """A message names a pool that `addresses-file` does not have."""
    return _bind(problem)


def _bind(description: str) -> Outcome:
    return Outcome("bind", "bind", "error", Fate.RETRY, description=description, own_fault=True)


def outweighs(outcome: Outcome, other: Outcome) -> bool:
    """Whether to report `outcome` rather than `other`, the outcome of an earlier host.

    The answer of a peer outweighs a failure to reach one. A fault of this host weighs least, so
    that it hides neither.
    """
    return _weight(outcome) >= _weight(other)


def _weight(outcome: Outcome) -> int:
    if outcome.own_fault:
        return 0
    if outcome.state == "connect":
        return 2 if outcome.type == "refused" else 1
    return 3


def connect_timed_out(host: str) -> Outcome:
    """`host` did not answer in time."""
    return Outcome(
        "connect", "connect", "timeout", Fate.RETRY, description=f"{host}: no answer in time"
    )


def no_hosts(description: str, reply: Reply | None) -> Outcome:
    """No host was found for the domain. A `reply` decides whether that is final."""
    if reply is not None:
        return _answered("error", "dns", "error", _fate(reply), reply)
    return Outcome("nohosts", "dns", "error", Fate.RETRY, description=description[:MAX_DESCRIPTION])


def unsendable(problem: str, reply: Reply | None = None) -> Outcome:
    """The message itself has a mistake, and is never tried. A `reply` gives its codes."""
    code, status = (reply.code, reply.status) if reply is not None else (None, None)
    return Outcome("error", "process", "invalid", Fate.FAILED, code, status, problem)


def bounced(text: str) -> Outcome:
    """An operator has given the message up; `text` says who, and why."""
    return _answered("error", "process", "error", Fate.FAILED, smtp.bounced(text))


def not_made(state: str, reason: str) -> Outcome:
    """The mail cannot be made of its properties."""
    return Outcome("responsive", state, "error", Fate.FAILED, description=reason[:MAX_DESCRIPTION])


def cannot_sign(problem: str) -> Outcome:
    """A key of the mail cannot be used, and the operator wants no mail without its signature."""
    description = f"the mail cannot be signed: {problem}"[:MAX_DESCRIPTION]
    return Outcome(
        "error", "process", "error", Fate.RETRY, 451, "4.3.5", description, own_fault=True
    )


def rejected_by_plugin(reply: Reply) -> Outcome:
    """A plugin rejected the message before its body was sent."""
    return _answered("error", "data", "error", _fate(reply), reply)


def refused_on_arrival(reply: Reply) -> Outcome:
    """A plugin rejected the message on arrival, while others of the same mail were accepted."""
    return _answered("error", "process", "error", Fate.FAILED, reply)


def suppressed(row: Row) -> Outcome:
    """An operator has suppressed the recipient."""
    return _ordered(row, "error", "suppression", "error", Fate.FAILED)


def forced(row: Row) -> Outcome:
    """An operator wants this reply in place of an attempt: 2xx takes the mail, 5xx fails it."""
    if row.code < 300:
        return _ordered(row, "success", "process", "accepted", Fate.DELIVERED)
    fate = Fate.FAILED if row.code >= 500 else Fate.RETRY
    return _ordered(row, "error", "process", "error", fate)


def _ordered(row: Row, kind: str, state: str, result: str, fate: Fate) -> Outcome:
    return Outcome(kind, state, result, fate, row.code, row.status or None, row.description or None)


def _fate(reply: Reply) -> Fate:
    return Fate.FAILED if reply.code >= 500 else Fate.RETRY


def _answered(
    kind: str,
    state: str,
    result: str,
    fate: Fate,
    reply: Reply,
    *,
    own_fault: bool = False,
    from_peer: bool = False,
) -> Outcome:
    description = reply.description[:MAX_DESCRIPTION]
    return Outcome(
        kind, state, result, fate, reply.code, reply.status, description, own_fault, from_peer
    )


NO_BINARY: Final = _answered("error", "process", "invalid", Fate.FAILED, smtp.NO_BINARY)
NOT_CONVERTIBLE: Final = _answered("error", "process", "invalid", Fate.FAILED, smtp.NOT_CONVERTIBLE)
TOO_MANY_HOPS: Final = _answered("error", "process", "error", Fate.FAILED, smtp.TOO_MANY_HOPS)
OWN_FAULT: Final = _answered(
    "error", "process", "error", Fate.RETRY, smtp.OWN_FAULT, own_fault=True
)
