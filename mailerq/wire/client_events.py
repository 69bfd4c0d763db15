"""What the client machine reports: the events of a session, and the steps and problems in them."""

from __future__ import annotations

from enum import Enum, StrEnum, auto
from typing import Final

import msgspec

from mailerq.wire.smtp import Reply

__all__ = [
    "CLOSED",
    "NEED_DATA",
    "Accepted",
    "Event",
    "Failed",
    "NoEvent",
    "Problem",
    "Ready",
    "Refused",
    "SendBody",
    "StartTls",
    "Step",
]


class Step(StrEnum):
    """The step whose reply is due; the values are the states of the newer results."""

    INTRO = "intro"
    EHLO = "ehlo"
    HELO = "helo"
    STARTTLS = "starttls"
    AUTHPLAIN = "authplain"
    AUTHLOGIN = "authlogin"
    AUTHUSERNAME = "authusername"
    AUTHPASSWORD = "authpassword"
    AUTHCRAM = "authcram"
    AUTHRESPONSE = "authresponse"
    RESET = "reset"
    MAILFROM = "mailfrom"
    RCPTTO = "rcptto"
    DATA = "data"
    MESSAGE = "message"
    QUIT = "quit"
    IDLE = "idle"


class Problem(StrEnum):
    """Why a session cannot continue. The driver has the clock and finds `TIMEOUT`."""

    LOST = "lost"
    INVALID = "invalid"
    OVERFLOW = "overflow"
    TIMEOUT = "timeout"


class Ready(msgspec.Struct, frozen=True):
    """The session is open and takes a mail. `mta` is the name in the peer's banner."""

    mta: str | None


class StartTls(msgspec.Struct, frozen=True):
    """The peer said 220 to STARTTLS: do the handshake, then call `ClientProtocol.secured`."""


class SendBody(msgspec.Struct, frozen=True):
    """The peer said 354, or took the envelope of a binary mail: call `ClientProtocol.send_body`."""


class Accepted(msgspec.Struct, frozen=True):
    """The peer accepted the mail and is responsible for it now."""

    reply: Reply


class Refused(msgspec.Struct, frozen=True):
    """The peer refused `step`; at INTRO, EHLO, HELO, STARTTLS and AUTH the whole session.

    `ours`: the reply is our own, because nothing was sent that the peer could not take.
    """

    step: Step
    reply: Reply
    ours: bool = False


class Failed(msgspec.Struct, frozen=True):
    """The session broke or lost its step while the reply to `step` was due; IDLE: none was due."""

    step: Step
    problem: Problem
    description: str


class NoEvent(Enum):
    """Nothing happened, or nothing more will happen."""

    NEED_DATA = auto()
    CLOSED = auto()


NEED_DATA: Final = NoEvent.NEED_DATA
"""Nothing to report: send the output of `ClientProtocol.data_to_send`, then feed the input."""

CLOSED: Final = NoEvent.CLOSED
"""The session ended after QUIT."""

Event = Ready | StartTls | SendBody | Accepted | Refused | Failed | NoEvent
