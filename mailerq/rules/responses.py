"""What became of an attempt, and what follows from it.

Everything that can end an attempt, from a name that does not exist to the reply to the
final dot, is turned into an `Outcome` here. Its words are those of the results that
applications read: `type` and `state` as version 2.1 has them, `result` as the newer ones.
States that 2.1 has no word for (``process``, ``dns``, ``bind``, ``storage``) are the newer
ones.
"""

from __future__ import annotations

import errno
import os
from enum import Enum, auto
from typing import Final

import msgspec

from mailerq.wire.client import Accepted, Failed, Problem, Refused, Step
from mailerq.wire.smtp import Reply

__all__ = [
    "EXPIRED",
    "NOT_CONVERTIBLE",
    "NO_DATA",
    "OWN_FAULT",
    "RESULTS",
    "STATES",
    "TOO_MANY_HOPS",
    "TYPES",
    "Fate",
    "Outcome",
    "accepted",
    "cannot_bind",
    "connect_failed",
    "connect_timed_out",
    "failed",
    "no_fitting_address",
    "no_hosts",
    "not_generated",
    "outweighs",
    "refused",
    "refused_on_arrival",
    "rejected_by_plugin",
    "unsendable",
]

MAX_DESCRIPTION: Final = 1000
"""Characters of a description; it is kept with every result of a message."""

TYPES: Final = {
    "success": "The peer has the mail.",
    "nohosts": "The domain of the recipient has no host that can be found.",
    "bind": "The mail cannot be sent from the addresses that it may leave from.",
    "refused": "The host refused the connection.",
    "connect": "There is no connection to the host.",
    "noaccess": "The session ended before it could take mail, at the banner, EHLO or HELO.",
    "error": "The peer or this server refused the mail: for now by a `code` of 4xx, else for good.",
    "lost": "The connection broke, or the peer answered out of step.",
    "timeout": "The peer did not answer in time.",
    "overflow": "A reply of the peer was too long.",
    "idle": "The peer ended the connection before the mail had its turn.",
    "nodata": "There is no mail to send: neither the document nor a plugin has it.",
    "expired": "It was past its time before an attempt.",
    "responsive": "The mail would have to be generated, which is not supported.",
}
"""The words of ``type`` in results, and what they mean."""

STATES: Final = {
    "process": "Before anything was tried.",
    "storage": "The mail was to be fetched.",
    "responsive": "The mail was to be generated.",
    "dns": "The hosts of the domain were looked for.",
    "bind": "The address to send from was chosen.",
    "connect": "The connection was made.",
    "init": "The banner was awaited.",
    "ehlo": "EHLO was sent.",
    "helo": "HELO was sent.",
    "reset": "RSET was sent.",
    "mail from": "MAIL FROM was sent.",
    "rcpt to": "RCPT TO was sent.",
    "data": "DATA was sent, or a plugin stopped the mail there.",
    "received": "The whole mail was sent.",
    "accept": "The peer has taken the mail.",
    "idle": "The connection waited for mail.",
    "close": "QUIT was sent.",
}
"""The words of ``state`` in results: how far an attempt came."""

RESULTS: Final = {
    "accepted": "The peer has the mail.",
    "error": "The peer refused in a reply, or this host could not go on.",
    "lost": "The connection broke.",
    "timeout": "Nobody answered in time, or the mail is past its time.",
    "invalid": "A reply, or the message itself, has no valid form.",
}
"""The words of ``result`` in results, which newer versions have in place of ``type``."""

_STATES: Final = {
    Step.INTRO: "init",
    Step.EHLO: "ehlo",
    Step.HELO: "helo",
    Step.RESET: "reset",
    Step.MAILFROM: "mail from",
    Step.RCPTTO: "rcpt to",
    Step.DATA: "data",
    Step.MESSAGE: "received",
    Step.QUIT: "close",
    Step.IDLE: "idle",
}

_HELLO: Final = frozenset((Step.INTRO, Step.EHLO, Step.HELO))

_OWN_ERRORS: Final = frozenset({
    # no descriptor, no memory
    errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM,
    # no address to send from, or no free port
    errno.EADDRNOTAVAIL, errno.EADDRINUSE,
    # no such family here, no way there, an address that means something on one link only
    errno.EAFNOSUPPORT, errno.ENETDOWN, errno.ENETUNREACH, errno.EINVAL,
    # a firewall or a sandbox of this host
    errno.EACCES, errno.EPERM,
})  # fmt: skip
"""Errors of connecting that are faults of this host and say nothing of the peer.

EHOSTUNREACH is none: firewalls of peers and routers before them answer so."""


class Fate(Enum):
    """What follows from an outcome."""

    DELIVERED = auto()
    RETRY = auto()
    FAILED = auto()


class Outcome(msgspec.Struct, frozen=True):
    """How an attempt ended, without when and where.

    `own_fault`: this host is what kept the message from being sent. That is never final.
    """

    type: str
    state: str
    result: str
    fate: Fate
    code: int | None = None
    status: str | None = None
    description: str | None = None
    own_fault: bool = False


EXPIRED: Final = Outcome(
    "expired", "process", "timeout", Fate.FAILED, description="past its time before an attempt"
)
NO_DATA: Final = Outcome(
    "nodata", "storage", "error", Fate.FAILED, description="there is no body to send"
)
NOT_CONVERTIBLE: Final = Outcome(
    "error",
    "process",
    "invalid",
    Fate.FAILED,
    554,
    "5.6.3",
    "the mail is 8-bit, cannot be converted, and the peer does not offer 8BITMIME",
)
TOO_MANY_HOPS: Final = Outcome(
    "error", "process", "error", Fate.FAILED, 554, "5.4.6", "too many Received lines: a mail loop"
)
OWN_FAULT: Final = Outcome(
    "error",
    "process",
    "error",
    Fate.RETRY,
    451,
    "4.3.0",
    "internal error, see the application log",
    own_fault=True,
)


def accepted(event: Accepted) -> Outcome:
    """The peer has the message."""
    return _answered("success", "accept", "accepted", Fate.DELIVERED, event.reply)


def refused(event: Refused) -> Outcome:
    """The peer said no: to the message, for now (4xx) or for ever, or to the session."""
    state = _STATES[event.step]
    if event.step in _HELLO:
        return _answered("noaccess", state, "error", Fate.RETRY, event.reply)
    return _answered("error", state, "error", _fate(event.reply), event.reply)


def failed(event: Failed) -> Outcome:
    """The session broke."""
    problem = event.problem
    result = "invalid" if problem is Problem.OVERFLOW else str(problem)
    match problem, event.step:
        case Problem.OVERFLOW, _:
            kind = "overflow"
        case _, Step.INTRO | Step.EHLO | Step.HELO:
            kind = "noaccess"
        case _, Step.IDLE:
            kind = "idle"
        case Problem.TIMEOUT, _:
            kind = "timeout"
        case _:
            kind = "lost"
    description = event.description[:MAX_DESCRIPTION]
    return Outcome(kind, _STATES[event.step], result, Fate.RETRY, description=description)


def connect_failed(error: OSError, host: str) -> Outcome:
    """There is no connection to `host`; `error` says why."""
    text = os.strerror(error.errno) if error.errno else str(error)
    description = f"{host}: {text}"
    if error.errno == errno.ECONNREFUSED:
        return Outcome("refused", "connect", "error", Fate.RETRY, description=description)
    result = "timeout" if error.errno == errno.ETIMEDOUT else "error"
    own = error.errno in _OWN_ERRORS
    return Outcome("connect", "connect", result, Fate.RETRY, description=description, own_fault=own)


def cannot_bind(error: OSError, local_ip: str) -> Outcome:
    """Nothing can be sent from `local_ip`; `error` says why."""
    text = os.strerror(error.errno) if error.errno else str(error)
    return _bind(f"cannot send from {local_ip}: {text}")


def no_fitting_address(host: str, local_ip: str) -> Outcome:
    """`host` has no address of the family of `local_ip`."""
    family = "IPv6" if ":" in local_ip else "IPv4"
    return _bind(f"cannot send from {local_ip}: {host} has no {family} address")


def _bind(description: str) -> Outcome:
    return Outcome("bind", "bind", "error", Fate.RETRY, description=description, own_fault=True)


def outweighs(outcome: Outcome, other: Outcome) -> bool:
    """Whether `outcome` says no less than `other`, which an earlier host of a domain met.

    What a peer answered comes before what kept us from reaching one, and a fault of this
    host comes last: it must not hide either.
    """
    return _weight(outcome) >= _weight(other)


def _weight(outcome: Outcome) -> int:
    if outcome.own_fault:
        return 0
    if outcome.state == "connect":
        return 2 if outcome.type == "refused" else 1
    return 3


def connect_timed_out(host: str) -> Outcome:
    """Nobody answered at `host`."""
    return Outcome(
        "connect", "connect", "timeout", Fate.RETRY, description=f"{host}: no answer in time"
    )


def no_hosts(description: str, reply: Reply | None) -> Outcome:
    """The domain has no host; with a `reply` that will not change."""
    if reply is not None:
        return _answered("error", "dns", "error", _fate(reply), reply)
    return Outcome("nohosts", "dns", "error", Fate.RETRY, description=description[:MAX_DESCRIPTION])


def unsendable(problem: str, code: int | None = None, status: str | None = None) -> Outcome:
    """Something is wrong with the message itself: it is never tried."""
    return Outcome("error", "process", "invalid", Fate.FAILED, code, status, problem)


def not_generated() -> Outcome:
    """``mime`` describes a mail that would have to be generated."""
    text = "the property mime is an object, and generating mail is not supported"
    return Outcome("responsive", "responsive", "error", Fate.FAILED, description=text)


def rejected_by_plugin(reply: Reply) -> Outcome:
    """A plugin stopped the message when its body was about to be sent."""
    return _answered("error", "data", "error", _fate(reply), reply)


def refused_on_arrival(reply: Reply) -> Outcome:
    """Plugins refused the message, or failed at it, when others of the same mail were taken."""
    return _answered("error", "process", "error", Fate.FAILED, reply)


def _fate(reply: Reply) -> Fate:
    return Fate.FAILED if reply.code >= 500 else Fate.RETRY


def _answered(kind: str, state: str, result: str, fate: Fate, reply: Reply) -> Outcome:
    description = reply.description[:MAX_DESCRIPTION]
    return Outcome(kind, state, result, fate, reply.code, reply.status, description)
