"""What the server machine asks its adapter: the commands that need a decision.

Each is answered with `ServerProtocol.accept` or `ServerProtocol.reject`; `Closing` and the
members of `NoEvent` are told and need no answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

import msgspec

from mailerq.wire.parameters import MailParameters, RcptParameters
from mailerq.wire.sasl import Credentials

__all__ = [
    "CLOSED",
    "NEED_DATA",
    "Auth",
    "Closing",
    "Content",
    "Data",
    "Event",
    "Hello",
    "Mail",
    "NoEvent",
    "Rcpt",
    "StartTls",
    "XClient",
]


class Hello(msgspec.Struct, frozen=True):
    """EHLO or LHLO (`extended`), or HELO."""

    name: str
    extended: bool


@dataclass(frozen=True, slots=True)
class StartTls:
    """STARTTLS. After `accept` send what is due, shake hands, then call `tls_started`."""


@dataclass(frozen=True, slots=True)
class Auth:
    """Credentials of an AUTH exchange, complete. `reject` without a reply is 535."""

    mechanism: str
    credentials: Credentials = field(repr=False)


@dataclass(frozen=True, slots=True)
class XClient:
    """XCLIENT: who the client really is, from a proxy. After `accept` it starts anew."""

    attributes: Mapping[str, str | None]


class Mail(msgspec.Struct, frozen=True):
    """MAIL FROM. `sender` has no angle brackets and is empty for the null sender."""

    sender: str
    parameters: MailParameters


class Rcpt(msgspec.Struct, frozen=True):
    """RCPT TO. `recipient` has no angle brackets and no source route."""

    recipient: str
    parameters: RcptParameters


class Data(msgspec.Struct, frozen=True):
    """DATA, or the first BDAT of a mail, with a sender and at least one recipient accepted."""


@dataclass(frozen=True, slots=True)
class Content:
    """The whole mail, its dots unstuffed; `ServerProtocol.mail` and `rcpts` say whose it is.

    Whatever the answer is, the transaction is over with it.
    """

    body: bytes | memoryview = field(repr=False)
    """A view only where `ServerProtocol.accept` was given a sink that makes one."""


class Closing(msgspec.Struct, frozen=True):
    """The last bytes are due: send them, then close. `reason` is for the log."""

    reason: str


class NoEvent(Enum):
    """There is nothing to decide now."""

    NEED_DATA = auto()
    CLOSED = auto()


NEED_DATA: Final = NoEvent.NEED_DATA
"""Everything received has been dealt with: send what is due, then read."""

CLOSED: Final = NoEvent.CLOSED
"""The peer has closed, in the middle of whatever it was."""

Event = Hello | StartTls | Auth | XClient | Mail | Rcpt | Data | Content | Closing | NoEvent
